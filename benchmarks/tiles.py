"""Tiles against whole images made small: the maps of some runs, compared on the same pixels.

python benchmarks/tiles.py SHARDS SIZE RUN... [--set a.b=c]...

Maps are enlarged to SIZE, at which the masks are read; image scores are those of `kdad score`. The
last column is the time of an image in units of the first run's.
"""

import argparse
from pathlib import Path

from kdad_dist import Detector, load
from kdad_dist.data.index import Index, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.metrics.evaluation import Evaluation
from kdad_dist.predict import laid_over

FIGURES = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro")


def figures(detector: Detector, shards: str, size: int) -> tuple[dict[str, float], float]:
    """Of the whole test split, and the seconds that the network took for an image."""
    index, reader = Index.read(shards), ShardReader(shards, size)
    found, seconds = Evaluation(), []
    for sample in index.select(Split.TEST):
        image = reader.image(sample)
        said = detector.predict(image)
        seconds.append(said.seconds)
        assert said.anomaly_map is not None and sample.gt_label is not None
        found.update(
            sample.key,
            "all",
            sample.defect_type,
            sample.gt_label,
            said.pred_score[0],
            laid_over(image, detector.fit.seen(size, size), said.anomaly_map[0]),
            reader.mask(sample),
        )
    return found.report()["mean"], sum(seconds) / len(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards")
    parser.add_argument("size", type=int)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    options = parser.parse_args()
    print(
        "| run | read at | network sees |",
        *(f"{name} |" for name in FIGURES),
        "ms per image | time |",
    )
    print("| --- |" + " --- |" * (len(FIGURES) + 4))
    first = None
    for run in options.runs:
        detector = load(run, options.set)
        mean, seconds = figures(detector, options.shards, options.size)
        data = detector.config.data
        row = [run.name, f"{data.image_size} px", f"{data.network_size} px"]
        row += [f"{mean[name]:.3f}" for name in FIGURES]
        first = first or seconds
        print(f"| {' | '.join(row)} | {1000 * seconds:.0f} | {seconds / first:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
