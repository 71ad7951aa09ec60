"""The bare STFPM training step: a plain float32 loop as the notebook writes it, and ours.

    python benchmarks/stfpm_step.py WEIGHTS.safetensors [--threads 2] [--compile]

ResNet-18, layers 1 to 3, 256 px, batch 32, images already in memory. `--compile` compiles our
student, as `train.compile` does.
"""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steps import Step, compare, images, options, our_step

from kdad_dist.config.methods import StfpmConfig, TeacherConfig
from kdad_dist.methods.stfpm import Stfpm

LAYERS = (1, 2, 3)


def plain_step(image: torch.Tensor, weights: Path) -> Step:
    """As the notebook: float32, contiguous, the loss layer by layer, Adam."""
    teacher = timm.create_model("resnet18", features_only=True, out_indices=LAYERS).eval()
    teacher.load_state_dict(load_file(weights))
    teacher = teacher.to(image.device)
    student = timm.create_model("resnet18", features_only=True, out_indices=LAYERS).to(image.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-4)

    def step() -> None:
        with torch.no_grad():
            targets = teacher(image)
        loss = image.new_zeros(())
        for target, feature in zip(targets, student(image), strict=True):
            target, feature = F.normalize(target), F.normalize(feature)
            height, width = target.shape[-2:]
            loss = loss + (0.5 / (height * width)) * (target - feature).square().sum()
        optimizer.zero_grad()
        (loss / len(LAYERS)).backward()
        optimizer.step()

    return step


def ours(
    image: torch.Tensor, weights: Path, bf16: bool, cached: bool, compiled: bool = False
) -> Step:
    teacher = TeacherConfig("resnet18", str(weights), list(LAYERS))
    config = StfpmConfig(teacher=teacher, cache_teacher=cached)
    method = Stfpm(config, seed=0).to(image.device)
    if compiled:
        method.student.compile()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.4, momentum=0.9)
    return our_step(method, optimizer, image, bf16)


def main() -> None:
    parser = options(__doc__, batch=32, size=256)
    parser.add_argument("weights", type=Path, help="ImageNet ResNet-18, stem to layer3, timm names")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    image = images(args)
    variants = {
        "plain loop, float32": plain_step(image, args.weights),
        "ours, float32": ours(image, args.weights, bf16=False, cached=False),
        "ours, bf16": ours(image, args.weights, bf16=True, cached=False),
        "ours, bf16, cached teacher": ours(image, args.weights, bf16=True, cached=True),
    }
    if args.compile:
        variants["ours, bf16, compiled student"] = ours(
            image, args.weights, bf16=True, cached=False, compiled=True
        )
    compare("training", variants, args)


if __name__ == "__main__":
    main()
