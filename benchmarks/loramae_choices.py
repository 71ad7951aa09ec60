"""What each way of reading a LoRA-MAE run is worth: masks, error, read-out, on one checkpoint.

python benchmarks/loramae_choices.py RUN... --out choices.json
python benchmarks/results_tables.py --choices choices.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from choices import Images, Maps, read_groups, read_outs
from torch import Tensor

from kdad_dist.config.load import load_run
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.runtime.restore import restore

SIGMAS = (0.0, 2.0, 4.0)
ERRORS = ("normalised", "pixel")
PATTERNS = {
    "4 stripes": {"pattern": "stripes"},
    "4 diagonal": {"pattern": "diagonal"},
    "4 lattice": {"pattern": "lattice"},
    "4 random": {"pattern": "random"},
    "4 random, 4 partitions": {"pattern": "random", "partitions": 4},
    "2 diagonal": {"pattern": "diagonal", "masks": 2},
    "8 diagonal": {"pattern": "diagonal", "masks": 8},
}
"""M masks hide 1/M of the patches at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="other data, say")
    parser.add_argument("--only", nargs="+", choices=list(PATTERNS), default=list(PATTERNS))
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        groups = read_groups(load_run(run, options.set))
        for name in options.only:
            words = [f"method.inference.{key}={value}" for key, value in PATTERNS[name].items()]
            method = restore(load_run(run, [*options.set, *words])).method
            assert isinstance(method, LoraMae)
            for error, maps in maps_of(method, groups).items():
                reading = {"masks": name, "error": error}
                for row in read_outs(groups, maps, SIGMAS):
                    rows.append(row | {"run": str(run), "reading": reading | row["reading"]})
            options.out.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} candidates in {options.out}")


@torch.no_grad()
def maps_of(method: LoraMae, groups: dict[str, Images]) -> dict[str, Maps]:
    """Anomaly maps of every group by the kind of error, both from the same fillings."""
    read = method.config.inference

    def predict(image: Tensor) -> list[Tensor]:
        normal = (image - method.mean) / method.std
        with torch.autocast("cpu", torch.bfloat16):
            filled = method.fillings(normal)
        maps = []
        for error in ERRORS:
            method.config = replace(method.config, inference=replace(read, error=error))
            maps.append(method.error_map(normal, filled))
        return maps

    found = {name: images.apply(predict) for name, images in groups.items()}
    return {
        error: {name: maps[i] for name, maps in found.items()} for i, error in enumerate(ERRORS)
    }


if __name__ == "__main__":
    main()
