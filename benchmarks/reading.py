"""Images per second of the indexed reader with its cache, against torchvision's ImageFolder.

    python benchmarks/reading.py                    # on generated photographs of 700 pixels
    python benchmarks/reading.py --root FOLDER      # on the images below FOLDER

Both turn the same files into shuffled float32 batches of 32 on the CPU, with as many workers as
there are cores; ImageFolder keeps its workers from epoch to epoch. Our images are packed before,
once, which is timed on its own line. The first epoch of ours opens an empty cache and fills it.
Memory is the proportional share (PSS) of the mapped cache, added up over the ranks of a node.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdad_dist.data.image import EXTENSIONS
from kdad_dist.data.index import Index, Split
from kdad_dist.data.loader import IndexedLoader
from kdad_dist.data.pixels import open_pixels
from kdad_dist.data.plan import Plan
from kdad_dist.data.writer import pack

BATCH = 32
CPU = torch.device("cpu")
TARGET = 20  # times as many images per second from the second epoch on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder of images (default: generated ones)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        report_share(options.rank, options.size)
        return
    print(
        f"{processor()}, {options.workers} workers, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f} (other work on the machine makes the figures worthless)"
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["KDAD_CACHE"] = str(work / "cache")
        folder = (
            gather(options.root, work / "images") if options.root else generate(work / "images")
        )
        count = sum(1 for _ in (folder / "train" / "good").iterdir())
        started = time.perf_counter()
        pack(folder, work / "shards", size=options.size, workers=options.workers)
        print(f"{count} images, packed at {count / (time.perf_counter() - started):,.0f} images/s")
        ours = rates(our_epochs(work / "shards", options), count, options.epochs)
        theirs = rates(folder_epochs(folder / "train", options), count, options.epochs)
        compare(ours, theirs)
        for ranks in (1, 2):
            share = total_share(work / "shards", options.size, ranks)
            print(f"cache in memory with {ranks} rank(s): {share / 1024:.1f} MiB per node")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def generate(folder: Path, count: int = 120, side: int = 700) -> Path:
    """A folder of photograph-like images: soft shapes under grain, stored as JPEG."""
    random = np.random.default_rng(0)
    (folder / "train" / "good").mkdir(parents=True)
    for i in range(count):
        coarse = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        noisy = np.clip(image + random.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "train" / "good" / f"{i:04}.jpg", quality=92)
    return folder


def gather(root: Path, folder: Path) -> Path:
    """Links to all images below `root`, as one normal class."""
    (folder / "train" / "good").mkdir(parents=True)
    suffixes = {f".{ext}" for ext in EXTENSIONS.values()} | {".jpeg", ".tiff"}
    images = (path for path in root.rglob("*") if path.suffix.lower() in suffixes)
    for i, path in enumerate(sorted(images)):
        link = folder / "train" / "good" / f"{i:06}{path.suffix.lower()}"
        link.symlink_to(path.resolve())
    return folder


def our_epochs(shards: Path, options: argparse.Namespace) -> Iterator[int]:
    """Reads an epoch each time it is advanced; gives the number of images."""
    index = Index.read(str(shards))
    samples = index.select(Split.TRAIN, val_fraction=0)
    pixels = open_pixels(samples, index, options.size, "ram", CPU)
    loader = IndexedLoader(pixels, Plan(len(samples), batch_size=BATCH), CPU)
    length = loader.steps_per_epoch
    for epoch in range(options.epochs):
        steps = loader.steps(epoch * length, (epoch + 1) * length)
        yield sum(len(micro.batch.image) for step in steps for micro in step)


def folder_epochs(folder: Path, options: argparse.Namespace) -> Iterator[int]:
    """The same with ImageFolder, Resize and a DataLoader."""
    size = [options.size, options.size]
    steps = [v2.Resize(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    loader = DataLoader(
        ImageFolder(str(folder), v2.Compose(steps)),
        batch_size=BATCH,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    while True:
        yield sum(len(image) for image, _ in loader)


def rates(epochs: Iterator[int], count: int, number: int) -> list[float]:
    """Images per second of each epoch."""
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        assert next(epochs) == count
        seconds.append(time.perf_counter() - started)
    return [count / s for s in seconds]


def compare(ours: list[float], theirs: list[float]) -> None:
    print(f"{'images/s':12} {'first epoch':>12} {'later epochs':>13}")
    later = [statistics.median(rate[1:]) for rate in (ours, theirs)]
    for name, rate, rest in zip(("kdad_dist", "ImageFolder"), (ours, theirs), later, strict=True):
        print(f"{name:12} {rate[0]:12,.0f} {rest:13,.0f}")
    first, rest = ours[0] / theirs[0], later[0] / later[1]
    print(f"{'ratio':12} {first:11.1f}x {rest:12.1f}x")
    print(f"target 1x in the first epoch: {'reached' if first >= 1 else 'MISSED'}")
    print(f"target {TARGET}x later: {'reached' if rest >= TARGET else 'MISSED'}")


def report_share(shards: Path, size: int) -> None:
    """Reads every image, says so, and prints the cache's share of memory in KiB when asked."""
    index = Index.read(str(shards))
    samples = index.select(Split.TRAIN, val_fraction=0)
    pixels = open_pixels(samples, index, size, "ram", CPU)
    for row in range(len(pixels)):
        pixels.read(np.array([row]))
    print("ready", flush=True)
    sys.stdin.readline()
    maps = Path("/proc/self/smaps").read_text().split(os.environ["KDAD_CACHE"])[1]
    print(next(line.split()[1] for line in maps.splitlines() if line.startswith("Pss:")))
    sys.stdout.flush()
    sys.stdin.readline()


def total_share(shards: Path, size: int, ranks: int) -> int:
    """KiB of the cache in memory, over all ranks."""
    command = [sys.executable, __file__, "--rank", str(shards), "--size", str(size)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(ranks)
    ]
    assert all(heard(process) == "ready" for process in running)
    total = sum(int(heard(process, "measure\n")) for process in running)
    for process in running:
        process.communicate("end\n")
    return total


def heard(process: subprocess.Popen[str], said: str = "") -> str:
    """Its next line, after something was said to it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(said)
    process.stdin.flush()
    return process.stdout.readline().strip()


if __name__ == "__main__":
    main()
