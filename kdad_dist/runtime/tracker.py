"""Where the numbers of a training go: `metrics.jsonl` always, Weights & Biases where asked for."""

import json
import logging
import math
import secrets
from pathlib import Path
from typing import Any

from kdad_dist import files
from kdad_dist.config import RunConfig, plain
from kdad_dist.errors import UsageError
from kdad_dist.runtime.session import Session

log = logging.getLogger(__name__)
Metrics = dict[str, float | int]


class Tracker:
    """Append-only records of the main process; other processes write nothing."""

    def __init__(self, run: Path, session: Session, config: RunConfig, start_step: int) -> None:
        self.session = session
        self.wandb = config.track.wandb != "disabled"
        self.file = None
        if session.is_main:
            path = run / "metrics.jsonl"
            keep_until(path, start_step)
            self.file = path.open("a", encoding="utf-8", buffering=1)
            if self.wandb:
                self._start_wandb(run, config)

    def _start_wandb(self, run: Path, config: RunConfig) -> None:
        self.session.accelerator.init_trackers(
            config.track.project,
            config=plain(config),
            init_kwargs={
                "wandb": {
                    "mode": config.track.wandb,
                    "id": wandb_id(run),
                    "resume": "allow",
                    "name": config.name,
                    "group": config.track.group,
                    "dir": str(run),
                }
            },
        )

    def write(self, metrics: Metrics) -> None:
        """Records one line; `metrics["step"]` says where it belongs."""
        if self.file is None:
            return
        # JSON has no infinity: under fp16 the norm of a gradient may well be one.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        if self.wandb:
            values: dict[str, Any] = {k: v for k, v in metrics.items() if k != "step"}
            self.session.accelerator.log(values, step=int(metrics["step"]))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.wandb:
            self.session.accelerator.end_training()


def check_wandb(mode: str) -> None:
    """Refuses a run that asks for Weights & Biases where the package is not installed."""
    if mode == "disabled":
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UsageError(
            f"track.wandb is {mode}, but the package wandb is not installed",
            "pip install 'kdad_dist[wandb]', or set track.wandb=disabled",
        ) from None


def wandb_id(run: Path) -> str:
    """The one identity that a run keeps over all its resumes; made at the first start."""
    path = run / "wandb_id"
    if not path.exists():
        files.write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after `step` (they will be written again) and a line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    files.write_text(path, "".join(kept))
