"""What a checkpoint costs: seconds that training stands still, and bytes written.

    python benchmarks/checkpoint.py [--rounds 5] [--methods stfpm large]

Ours, written at once and in the background, against `torch.save` of the whole student and its
optimizer (flushed to the disk, as ours is) and accelerate's `save_state`; on one process and on
two. The ways take turns; medians. Weights are random, the optimizer's moments are there.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from launched import answer_of, machine, noise, settings

from kdad_dist.config.run import RunConfig
from kdad_dist.methods import build_method
from kdad_dist.runtime import session
from kdad_dist.runtime.checkpoint import CheckpointManager, Rotation
from kdad_dist.runtime.engines import build_engine
from kdad_dist.runtime.saved import TrainState
from kdad_dist.runtime.session import Session
from kdad_dist.runtime.tensors import Tensors
from kdad_dist.wording import readable


def measure(config: RunConfig, here: Session, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each save, and bytes of the last, by way."""
    method = build_method(config).to(here.device)
    engine = build_engine(config, method, here)
    assert isinstance(engine.contents, Tensors)
    [optimizer] = engine.contents.optimizers
    for parameter in method.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    engine.step(0.0)
    plain, background = (
        CheckpointManager(folder / name, Rotation(1), {}, name == "background")
        for name in ("plain", "background")
    )

    def whole(step: int) -> None:
        if here.is_main:
            with open(folder / "whole.pt", "wb") as file:
                state = {"student": method.student, "optimizer": optimizer}
                torch.save({name: part.state_dict() for name, part in state.items()}, file)
                file.flush()
                os.fsync(file.fileno())
        here.barrier()

    def state(step: int) -> None:
        here.accelerator.save_state(str(folder / "accelerate"))
        here.barrier()

    ways: dict[str, tuple[Callable[[int], object], Path]] = {
        "ours": (
            lambda step: plain.save(engine.contents, TrainState(step, step), {}),
            folder / "plain",
        ),
        "ours, in the background": (
            lambda step: background.save(engine.contents, TrainState(step, step), {}),
            folder / "background",
        ),
        "torch.save of everything": (whole, folder / "whole.pt"),
        "accelerate save_state": (state, folder / "accelerate"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(1, rounds + 2):  # the first is not counted
        for name, (save, _) in ways.items():
            here.barrier()
            start = time.perf_counter()
            save(step)
            found[name].append(time.perf_counter() - start)
            background.wait()
    return {name: [median(found[name][1:]), written(path)] for name, (_, path) in ways.items()}


def written(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def work(method: str, folder: Path, rounds: int) -> None:
    """Of one of the launched processes."""
    torch.set_num_threads(1)
    config = settings(folder, folder / "shards", method, steps=1, batch_size=1)
    with session.start(trains=True) as here:
        found = measure(config, here, folder / "saves", rounds)
    if here.is_main:
        print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["stfpm", "large"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]), options.rounds)
        return
    print(machine())
    print("| method | processes | way | stands still | written | of torch.save |\n|" + 6 * "---|")
    with tempfile.TemporaryDirectory() as name:
        noise(Path(name), 4)
        for method in options.methods:
            for processes in options.processes:
                words = [sys.argv[0], "--rounds", str(options.rounds), "--work", method, name]
                (Path(name) / "saves").mkdir()
                found = answer_of(words, processes=processes)
                shutil.rmtree(Path(name) / "saves")
                all_of_it = found["torch.save of everything"]
                for way, (seconds, size) in found.items():
                    print(
                        f"| {method} | {processes} | {way} | {seconds:.3f} s | {readable(size)} "
                        f"| {seconds / all_of_it[0]:.2f}x time, {size / all_of_it[1]:.3f}x bytes |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
