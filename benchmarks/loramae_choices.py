"""What each way of reading a LoRA-MAE run is worth: masks, error, read-out, on one checkpoint.

python benchmarks/loramae_choices.py RUN... --out choices.json
python benchmarks/results_tables.py --choices choices.json
"""

import argparse
import json
from pathlib import Path

import torch
from choices import Maps, read_groups, read_outs

from kdad_dist.config import load_run
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.runtime.restore import restore

SIGMAS = (0.0, 2.0, 4.0)
PATTERNS = {
    "stripes": ("stripes", 4, 1),
    "diagonal": ("diagonal", 4, 1),
    "lattice": ("lattice", 4, 1),
    "random": ("random", 4, 1),
    "random, 4 partitions": ("random", 4, 4),
    "random, 2 masks, 4 partitions": ("random", 2, 4),
    "diagonal, 2 masks": ("diagonal", 2, 1),
    "diagonal, 8 masks": ("diagonal", 8, 1),
}
"""Pattern, masks, partitions; M masks hide 1/M of the patches at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", help="where the shards are now")
    parser.add_argument("--only", nargs="+", choices=list(PATTERNS), default=list(PATTERNS))
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        where = [f"data.shards={options.shards}"] if options.shards else []
        groups = read_groups(load_run(run, where))
        for name in options.only:
            pattern, masks, partitions = PATTERNS[name]
            words = [
                f"method.inference.{key}={value}"
                for key, value in [
                    ("pattern", pattern),
                    ("masks", masks),
                    ("partitions", partitions),
                ]
            ]
            for error in ("normalised", "pixel"):
                config = load_run(run, [*where, *words, f"method.inference.error={error}"])
                method = restore(config).method
                assert isinstance(method, LoraMae)
                maps = maps_of(method, groups)
                reading = {"masks": name, "error": error}
                for row in read_outs(groups, maps, SIGMAS):
                    rows.append(row | {"run": str(run), "reading": reading | row["reading"]})
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} candidates in {options.out}")


@torch.no_grad()
def maps_of(method: LoraMae, groups: dict) -> Maps:
    def predict(image: torch.Tensor) -> list[torch.Tensor]:
        anomaly_map = method.predict(image).anomaly_map
        assert anomaly_map is not None
        return [anomaly_map]

    return {name: images.apply(predict)[0] for name, images in groups.items()}


if __name__ == "__main__":
    main()
