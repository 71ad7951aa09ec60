"""What each way of reading an STFPM run is worth: layers, how their maps are combined, read-out.

python benchmarks/stfpm_choices.py RUN... --out choices.json
python benchmarks/results_tables.py --choices choices.json
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from choices import read_groups, read_outs

from kdad_dist.config.load import load_run
from kdad_dist.methods.stfpm import Stfpm, combine
from kdad_dist.runtime.restore import restore

SIGMAS = (0.0, 4.0)
Way = Literal["product", "sum"]


def candidates(count: int) -> Iterator[tuple[tuple[int, ...], Way]]:
    """Layers, and how their maps are combined."""
    for size in range(1, count + 1):
        for layers in itertools.combinations(range(count), size):
            yield layers, "product"
            if size > 1:
                yield layers, "sum"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", help="where the shards are now")
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        config = load_run(run, [f"data.shards={options.shards}"] if options.shards else [])
        size = config.data.image_size
        method = restore(config).method
        assert isinstance(method, Stfpm)
        groups = read_groups(config)
        distances = {name: images.apply(method.distances) for name, images in groups.items()}
        for layers, way in candidates(len(method.config.teacher.layers)):
            maps = {
                name: combine([found[i] for i in layers], way, size, size)
                for name, found in distances.items()
            }
            reading = {"layers": "+".join(str(i + 1) for i in layers), "combine": way}
            for row in read_outs(groups, maps, SIGMAS):
                rows.append(row | {"run": str(run), "reading": reading | row["reading"]})
    options.out.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} candidates in {options.out}")


if __name__ == "__main__":
    main()
