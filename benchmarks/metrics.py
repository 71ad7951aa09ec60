"""Pixel AUROC and AUPRO of 200 maps of 256x256: the histogram, a full sort, and anomalib.

    python benchmarks/metrics.py              # the first run makes anomalib's environment
    python benchmarks/metrics.py --no-peer    # without anomalib

Every figure includes what it takes to get from maps and masks to both numbers (updates, finding
the regions, computing). The sort is done once for both metrics, which favours it. anomalib's maps
are rescaled to [0, 1] beforehand, outside its time, because its AUROC would pass others through a
sigmoid. Ours is given one image at a time, anomalib batches of 32. The best of several runs counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kdad_dist.metrics.curves import aupro, auroc
from kdad_dist.metrics.histogram import ScoreHistogram

IMAGES, SIDE = 200, 256
REPEATS = 3
PEER_SCRIPT = Path(__file__).with_name("peer_metrics.py")
TARGETS = {"numpy argsort": 5, "anomalib": 20}  # how many times faster ours is meant to be


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-peer", action="store_true", help="leave anomalib out")
    arguments = parser.parse_args()
    maps, masks = make_maps(np.random.default_rng(0))
    print(f"{IMAGES} maps of {SIDE}x{SIDE}, {masks.mean():.1%} of the pixels defective")
    results = {
        "kdad_dist": best_of(lambda: by_histogram(maps, masks)),
        "numpy argsort": best_of(lambda: by_sorting(maps, masks)),
    }
    if not arguments.no_peer:
        results["anomalib"] = by_anomalib(maps, masks)
    ours, exact = results["kdad_dist"]["seconds"], results["numpy argsort"]
    print(f"{'':14}  seconds  ours is  AUROC (error)        AUPRO (error)")
    for name, result in results.items():
        figures = [
            f"{result[metric]:.6f} ({abs(result[metric] - exact[metric]):.1e})"
            for metric in ("pixel_auroc", "pixel_aupro")
        ]
        ratio = f"{result['seconds'] / ours:6.1f}x"
        print(f"{name:14}  {result['seconds']:7.3f}  {ratio}  {figures[0]}   {figures[1]}")
    for name, target in TARGETS.items():
        if name in results:
            reached = results[name]["seconds"] / ours
            verdict = "reached" if reached >= target else "MISSED"
            print(f"target {target}x against {name}: {reached:.1f}x, {verdict}")
    worst = max(abs(results["kdad_dist"][m] - exact[m]) for m in ("pixel_auroc", "pixel_aupro"))
    print(f"target 1e-4 of the exact value: {worst:.1e}, {'reached' if worst < 1e-4 else 'MISSED'}")


def make_maps(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Smoothed squared distances with blob-shaped defects on half of the images."""
    noise = rng.standard_normal((3, IMAGES, SIDE, SIDE), np.float32)
    noise = ndimage.gaussian_filter(noise, (0, 0, 4, 4))
    noise /= noise.std()
    blobs = ndimage.gaussian_filter(
        rng.standard_normal((IMAGES, SIDE, SIDE), np.float32), (0, 12, 12)
    )
    masks = blobs > np.quantile(blobs, 0.94)
    masks[::2] = False
    return ((noise + np.float32(0.7) * masks) ** 2).sum(axis=0), masks


def best_of(run: Callable[[], tuple[float, float]]) -> dict[str, float]:
    times, pixel_auroc, pixel_aupro = [], 0.0, 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        pixel_auroc, pixel_aupro = run()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "pixel_auroc": pixel_auroc, "pixel_aupro": pixel_aupro}


def by_histogram(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> tuple[float, float]:
    histogram = ScoreHistogram()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        histogram.update(anomaly_map, mask)
    counts = histogram.counts()
    return auroc(counts), aupro(counts)


def by_sorting(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> tuple[float, float]:
    """The exact values: every pixel sorted, thresholds at the distinct scores."""
    weights = np.zeros(masks.shape)
    for image_weights, mask in zip(weights, masks, strict=True):
        labels = np.empty(mask.shape, np.int32)
        ndimage.label(mask, np.ones((3, 3)), output=labels)
        image_weights[mask] = (1 / np.maximum(np.bincount(labels[mask]), 1))[labels[mask]]
    order = np.argsort(maps, axis=None)[::-1]
    scores, defective = maps.ravel()[order], masks.ravel()[order]
    last_of_score = np.append(np.flatnonzero(np.diff(scores)), scores.size - 1)

    def share_above(counts: NDArray) -> NDArray[np.float64]:
        total = np.cumsum(counts)
        return np.append(0, total[last_of_score] / total[-1])

    fpr, tpr = share_above(~defective), share_above(defective)
    pro = share_above(weights.ravel()[order])
    stop = int(np.searchsorted(fpr, 0.3))
    at_limit = np.interp(0.3, fpr[stop - 1 : stop + 1], pro[stop - 1 : stop + 1])
    area = np.trapezoid(np.append(pro[:stop], at_limit), np.append(fpr[:stop], 0.3))
    return float(np.trapezoid(tpr, fpr)), float(area) / 0.3


def by_anomalib(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> dict[str, float]:
    from peers import peer_python

    scaled = (maps - maps.min()) / (maps.max() - maps.min())
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "maps.npz"), maps=scaled, masks=masks)
        command = [str(peer_python()), str(PEER_SCRIPT), f"{folder}/maps.npz", str(REPEATS)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    print(f"anomalib {result['version']} with {result['threads']} threads", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
