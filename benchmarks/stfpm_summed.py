"""`kdad`, with STFPM's loss of a short batch weighted by its share of a whole one, as a sum does.

python benchmarks/stfpm_summed.py BATCH_SIZE train CONFIG ...       on one process
"""

import sys

from kdad_dist.cli.app import main
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.types import Batch, Losses


def weigh_by_size(batch_size: int) -> None:
    forward = Stfpm.forward

    def summed(self: Stfpm, batch: Batch) -> Losses:
        share = len(batch.image) / batch_size if self.training else 1.0
        return {name: share * loss for name, loss in forward(self, batch).items()}

    Stfpm.forward = summed


if __name__ == "__main__":
    weigh_by_size(int(sys.argv.pop(1)))
    main()
