"""Shows that the plain masked autoencoder computes what ours does, given a run's weights.

    python peer_mae_same.py RUN ARCHITECTURE.json WEIGHTS.safetensors

Writes the weights of the run's last checkpoint, LoRA unmerged, for `peer_mae.py infer`. Prints one
line of JSON: the largest differences between the smoothed maps of some test images and between the
training losses of the same images under the same masks, both in float32.
"""

import argparse
import json
from pathlib import Path

import torch
from peer_mae import MEAN, STD, PlainMae
from safetensors.torch import load_file, save_file
from torchvision.transforms import Normalize

from kdad_dist.config.load import load_run
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index, Split
from kdad_dist.data.reader import ShardReader
from kdad_dist.draws import hashes
from kdad_dist.methods.readout import Readout
from kdad_dist.runtime.restore import restore
from kdad_dist.types import Batch

IMAGES = 4


def test_images(config: RunConfig) -> torch.Tensor:
    """RGB in [0, 1], as ours reads them."""
    data = config.data
    samples = Index.read(data.shards).select(Split.TEST, data.category, None, 0)
    reader = ShardReader(data.shards, data.image_size, data.centre_margin)
    pixels = torch.stack([torch.tensor(reader.image(sample)) for sample in samples[:IMAGES]])
    return pixels.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("architecture", type=Path)
    parser.add_argument("weights", type=Path, help="the file to write")
    options = parser.parse_args()
    config = load_run(options.run, ["score.checkpoint=last"])
    method = restore(config).method
    weights = method.student.state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, options.weights)
    plain = PlainMae(json.loads(options.architecture.read_text()), config.data.image_size)
    plain.load_state_dict(load_file(options.weights))

    image = test_images(config)
    normal = Normalize(MEAN, STD)(image)
    seed = torch.arange(len(image))
    noise = hashes(seed, plain.count).argsort(dim=1).argsort(dim=1)  # to be sorted as ours
    losses = method.train()(Batch(image, seed, seed))["loss"].mean(), plain.train()(normal, noise)
    ours, theirs = (
        Readout(method, config.score, config.data.tiling)(image).anomaly_map,
        plain.eval().maps(normal),
    )
    assert ours is not None
    result = {
        "images": len(image),
        "map_difference": (ours - theirs).abs().max().item(),
        "map_maximum": theirs.max().item(),
        "loss": losses[1].item(),
        "loss_difference": (losses[0] - losses[1]).abs().item(),
        "largest_lora_b": max(v.abs().max().item() for k, v in weights.items() if "lora_B" in k),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
