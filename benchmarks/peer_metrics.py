"""anomalib's pixel AUROC and AUPRO, run by `metrics.py` inside anomalib's own environment.

peer_metrics.py MAPS.npz REPEATS: prints one line of JSON.
"""

# Runs in an environment of its own, which type checkers of ours do not see.
# pyright: reportMissingImports=false

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC

BATCH = 32


def main() -> None:
    with np.load(sys.argv[1]) as stored:
        maps, masks = torch.from_numpy(stored["maps"]), torch.from_numpy(stored["masks"])
    image = torch.zeros(BATCH, 3, 1, 1)
    times, pixel_auroc, pixel_aupro = [], 0.0, 0.0
    for _ in range(int(sys.argv[2])):
        metrics = [
            AUROC(fields=["anomaly_map", "gt_mask"]),
            AUPRO(fields=["anomaly_map", "gt_mask"]),
        ]
        start = time.perf_counter()
        for i in range(0, len(maps), BATCH):
            rows = slice(i, i + BATCH)
            batch = ImageBatch(
                image=image[: len(maps[rows])], anomaly_map=maps[rows], gt_mask=masks[rows]
            )
            for metric in metrics:
                metric.update(batch)
        pixel_auroc, pixel_aupro = (float(metric.compute()) for metric in metrics)
        times.append(time.perf_counter() - start)
    result = {
        "seconds": min(times),
        "pixel_auroc": pixel_auroc,
        "pixel_aupro": pixel_aupro,
        "version": version("anomalib"),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
