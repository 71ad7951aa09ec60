import pytest

from kdad_dist.config.run import OptimConfig
from kdad_dist.schedule import base_lr, learning_rate


def rates(optim: OptimConfig, steps: list[int], per_epoch: int = 10, total: int = 100):
    return [learning_rate(step, optim, 32, per_epoch, total) for step in steps]


def test_blr_is_scaled_by_the_batch_size_over_256():
    assert base_lr(OptimConfig(blr=5e-3), 32) == pytest.approx(6.25e-4)
    assert base_lr(OptimConfig(lr=0.4), 32) == 0.4


def test_a_constant_rate_stays():
    assert rates(OptimConfig(lr=0.4), [0, 50, 99]) == [0.4, 0.4, 0.4]


def test_a_cosine_warms_up_linearly_and_ends_at_min_lr():
    optim = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=2, min_lr=0.1)
    assert rates(optim, [0, 10, 20, 60, 100]) == pytest.approx([0, 0.5, 1.0, 0.55, 0.1])


def test_multistep_and_exponential_change_at_whole_epochs():
    multistep = OptimConfig(lr=1.0, schedule="multistep", milestones=[5, 8], gamma=0.2)
    assert rates(multistep, [49, 50, 79, 80]) == pytest.approx([1, 0.2, 0.2, 0.04])
    exponential = OptimConfig(lr=1.0, schedule="exponential", gamma=0.5)
    assert rates(exponential, [0, 9, 10, 25]) == pytest.approx([1, 1, 0.5, 0.25])


def test_a_warmup_longer_than_the_training_just_never_ends():
    optim = OptimConfig(lr=1.0, schedule="cosine", warmup_epochs=10)
    assert rates(optim, [0, 99]) == pytest.approx([0, 0.99])
