"""Seconds from a launch to the end of the first optimizer step.

    python benchmarks/launch.py [--rounds 3] [--processes 1 2]

`launch/train.sh` against a bare accelerate script under `accelerate launch`: the same networks,
loss and optimizer, the images read from a folder by a DataLoader. Ours is timed cold (images are
decoded into a new cache) and warm (the cache is there). What is noted is when the first line of
`metrics.jsonl` appears, or the script's word. The ways take turns; medians.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from launched import command, configure, machine, noise

BARE = """
import sys, timm, torch, torch.nn.functional as F
from accelerate import Accelerator
from pathlib import Path
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

accelerator = Accelerator()
options = {"features_only": True, "out_indices": (1, 2, 3)}
teacher = timm.create_model("resnet18", **options).eval().to(accelerator.device)
student = timm.create_model("resnet18", **options)
optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
data = ImageFolder(sys.argv[1], ToTensor())
loader = DataLoader(data, 8 // accelerator.num_processes, shuffle=True)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
for image, _ in loader:
    with torch.no_grad():
        targets = teacher(image)
    loss = 0
    for target, feature in zip(targets, student(image)):
        loss = loss + (F.normalize(target) - F.normalize(feature)).square().sum(1).mean()
    accelerator.backward(loss)
    optimizer.step()
    break
if accelerator.is_main_process:
    Path(sys.argv[2]).write_text("done")
"""


def seconds(started: dict, sign: Path) -> float:
    """From the start of a command until a file is there and not empty, or the command is over."""
    start = time.perf_counter()
    process = subprocess.Popen(**started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (sign.is_file() and sign.stat().st_size):
        time.sleep(0.01)
    took = time.perf_counter() - start
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error[-3000:])
    return took


def ours(folder: Path, config: Path, processes: int, cold: bool) -> float:
    shutil.rmtree(folder / "run", ignore_errors=True)
    if cold:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    started = command(["-m", "kdad_dist", "train", str(config)], processes=processes)
    started["env"]["KDAD_CACHE"] = str(folder / "cache")
    return seconds(started, folder / "run/metrics.jsonl")


def bare(folder: Path, processes: int) -> float:
    (folder / "bare.py").write_text(BARE)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    words = [*launcher, *several, "--num_processes", str(processes), "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", str(folder / "bare.py"), str(folder / "images/box/train")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    sign = folder / "stepped"
    sign.unlink(missing_ok=True)
    return seconds({"args": [*words, str(sign)], "env": environment, "text": True}, sign)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(machine())
    print("| processes | bare accelerate | ours, cold | ours, warm | warm / bare |\n|" + 5 * "---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configure(folder, noise(folder, 200), "stfpm", steps=1, batch_size=8)
        for processes in options.processes:
            rounds = [
                (
                    bare(folder, processes),
                    ours(folder, config, processes, cold=True),
                    ours(folder, config, processes, cold=False),
                )
                for _ in range(options.rounds)
            ]
            plain, cold, warm = map(median, zip(*rounds, strict=True))
            print(
                f"| {processes} | {plain:.1f} s | {cold:.1f} s | {warm:.1f} s "
                f"| {warm / plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
