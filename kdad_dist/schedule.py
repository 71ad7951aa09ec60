"""Learning rates as pure functions of the step: there is no scheduler state to save or restore."""

import math

from kdad_dist.config.run import OptimConfig


def base_lr(optim: OptimConfig, batch_size: int) -> float:
    """The peak learning rate; `blr` is scaled by batch_size / 256 (Goyal et al. 2017, as MAE)."""
    if optim.lr is not None:
        return optim.lr
    assert optim.blr is not None
    return optim.blr * batch_size / 256


def learning_rate(
    step: int, optim: OptimConfig, batch_size: int, steps_per_epoch: int, total_steps: int
) -> float:
    """The learning rate of the update that turns `step` updates into `step` + 1.

    Cosine follows MAE: per step, linear from 0 over the warm-up, then half a cosine down to
    `min_lr`. Multistep and exponential change at whole epochs.
    """
    peak = base_lr(optim, batch_size)
    epoch = step / steps_per_epoch
    if epoch < optim.warmup_epochs:
        return peak * epoch / optim.warmup_epochs
    match optim.schedule:
        case "constant":
            return peak
        case "cosine":
            length = total_steps / steps_per_epoch - optim.warmup_epochs
            progress = (epoch - optim.warmup_epochs) / length
            return optim.min_lr + (peak - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case "multistep":
            return peak * optim.gamma ** sum(int(epoch) >= at for at in optim.milestones)
        case "exponential":
            return peak * optim.gamma ** int(epoch)
