"""What an engine remembers beside its tensors."""

from types import SimpleNamespace

import torch

from kdad_dist.runtime.engine import Native


def test_the_scale_of_the_loss_is_kept_and_begins_anew_after_another_precision():
    engine = Native.__new__(Native)
    engine.accelerator = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))  # type: ignore
    fresh = engine.facts()
    engine.restore({"val_loss": 0.5})  # of a checkpoint that was not trained in fp16
    assert engine.facts() == fresh
    kept = {"scale": 8.0, "_growth_tracker": 3}
    engine.restore({"val_loss": 0.5, **kept})
    assert engine.facts() == kept != fresh
