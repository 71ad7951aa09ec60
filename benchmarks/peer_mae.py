"""A plain masked autoencoder with LoRA, written the way the original (mae-ad) is.

    python peer_mae.py train CATEGORY_FOLDER ARCHITECTURE.json --epochs 20
    python peer_mae.py infer CATEGORY_FOLDER ARCHITECTURE.json --weights FILE.safetensors

Training: PNG files are decoded, resized, cropped and jittered by a DataLoader's workers in every
epoch; all patches are embedded, shuffled and put back; attention is written out; the decoder
predicts every patch; float32; the host waits for the device in every step. Inference: what its
README intends (each mask hides a quarter of the patches, the rest is visible), one mask at a time,
then the Gaussian and the maximum; no metrics. The original's mistakes are not repeated: every image
is put back in its own order, and a short last batch counts. Prints one line of JSON.

`loramae.py` runs it; `peer_mae_same.py` shows that it computes what ours does.
"""

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASKS, RADIUS, SIGMA = 4, 4, 2.0


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = loralib.Linear(dim, 3 * dim, r=rank)
        self.proj = loralib.Linear(dim, dim, r=rank)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, dim = tokens.shape
        split = self.qkv(tokens).reshape(b, n, 3, self.heads, dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, rank: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, rank)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class PlainMae(nn.Module):
    """Parameters have the same names as ours."""

    def __init__(self, a: dict[str, int], size: int, rank: int = 4) -> None:
        super().__init__()
        self.patch, self.grid = a["patch"], size // a["patch"]
        self.count = self.grid**2
        dim, narrow = a["dim"], a["decoder_dim"]
        self.patch_embed = PatchEmbed(self.patch, dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(positions(dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, a["heads"], rank) for _ in range(a["depth"]))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, narrow)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, narrow))
        self.decoder_pos_embed = nn.Parameter(positions(narrow, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(narrow, a["decoder_heads"], rank) for _ in range(a["decoder_depth"])
        )
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.decoder_pred = nn.Linear(narrow, 3 * self.patch**2)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "blocks." in name:
                parameter.requires_grad = "lora_" in name

    def patches(self, image: Tensor) -> Tensor:
        b, p, g = len(image), self.patch, self.grid
        cut = image.reshape(b, 3, g, p, g, p)
        return torch.einsum("bcrpsq->brspqc", cut).reshape(b, self.count, 3 * p * p)

    def targets(self, image: Tensor) -> Tensor:
        patches = self.patches(image)
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6) ** 0.5

    def predict(self, image: Tensor, noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """Predictions of all patches, and which of them (1) were hidden."""
        tokens = self.patch_embed(image) + self.pos_embed[:, 1:]
        b, _, dim = tokens.shape
        shuffled = noise.argsort(dim=1)
        back = shuffled.argsort(dim=1)
        tokens = tokens.gather(1, shuffled[:, :keep, None].repeat(1, 1, dim))
        mask = torch.ones(b, self.count, device=image.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, back)
        cls = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([cls.expand(b, -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.decoder_embed(self.norm(tokens))
        unknown = self.mask_token.repeat(b, self.count - keep, 1)
        ordered = torch.cat([tokens[:, 1:], unknown], dim=1)
        ordered = ordered.gather(1, back[:, :, None].repeat(1, 1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], ordered], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:], mask

    def forward(self, image: Tensor, noise: Tensor, ratio: float = 0.75) -> Tensor:
        """The mean loss of the batch."""
        predicted, mask = self.predict(image, noise, int(self.count * (1 - ratio)))
        error = ((predicted - self.targets(image)) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def maps(self, image: Tensor) -> Tensor:
        """Smoothed error maps, one mask (every fourth column of patches) after another."""
        b, p, g = len(image), self.patch, self.grid
        targets = self.targets(image)
        total, hidden_times = torch.zeros_like(targets), torch.zeros_like(targets[..., :1])
        for number in range(MASKS):
            hides = torch.arange(self.count, device=image.device) % MASKS == number
            noise = hides.float().expand(b, -1).contiguous()
            predicted, mask = self.predict(image, noise, self.count - self.count // MASKS)
            total += (predicted - targets) ** 2 * mask[..., None]
            hidden_times += mask[..., None]
        error = (total / hidden_times).reshape(b, g, g, p, p, 3).mean(dim=-1)
        return smoothed(error.transpose(2, 3).reshape(b, g * p, g * p))


def positions(dim: int, grid: int) -> Tensor:
    angles = torch.outer(torch.arange(grid), 1e4 ** (-torch.arange(dim // 4) / (dim / 4)))
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = line[None].expand(grid, -1, -1), line[:, None].expand(-1, grid, -1)
    table = torch.cat([column, row], dim=-1).reshape(grid * grid, dim)
    return torch.cat([torch.zeros(1, dim), table])[None]


def smoothed(maps: Tensor) -> Tensor:
    """A 9x9 Gaussian; the border is mirrored."""
    side = torch.arange(-RADIUS, maps.shape[-1] + RADIUS, device=maps.device)
    mirror = torch.where(side < 0, -1 - side, side)
    mirror = torch.where(mirror >= maps.shape[-1], 2 * maps.shape[-1] - 1 - mirror, mirror)
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=maps.device) / SIGMA
    line = torch.exp(-(offsets**2) / 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(maps[:, mirror][:, :, mirror][:, None], kernel[None, None])[:, 0]


class Files(Dataset):
    """Image files that are decoded whenever they are asked for."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as file:
            return self.transform(file.convert("RGB"))


def train_transform(size: int) -> transforms.Compose:
    larger = round(1.045 * size)
    return transforms.Compose(
        [
            transforms.Resize((larger, larger), transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(size),
            transforms.ToTensor(),
            transforms.ColorJitter(brightness=(0.98, 1.02), saturation=(0.98, 1.02)),
            transforms.Normalize(MEAN, STD),
        ]
    )


def test_transform(size: int) -> transforms.Compose:
    """Bilinear, as ours resizes, so that scores can be compared."""
    resize = transforms.Resize((size, size), transforms.InterpolationMode.BILINEAR)
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def loader(data: Files, options: argparse.Namespace, shuffle: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_size=options.batch,
        shuffle=shuffle,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4,
        persistent_workers=True,
    )


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 1e-3},
    ]
    return torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95))


def rate(epoch: float, options: argparse.Namespace) -> float:
    lr, warmup = options.blr * options.batch / 256, options.warmup
    if epoch < warmup:
        return lr * epoch / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (options.epochs - warmup)))


def train(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = PlainMae(architecture(options), options.size).to(device).train()
    optimizer = optimizer_of(model)
    files = sorted((options.source / "train/good").iterdir())
    batches = loader(Files(files, train_transform(options.size)), options, shuffle=True)
    losses, ends, start = [], [], time.perf_counter()
    for epoch in range(options.epochs):
        for number, image in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch + number / len(batches), options)
            image = image.to(device, non_blocking=True)
            loss = model(image, torch.rand(len(image), model.count, device=device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss is {losses[-1]}")
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch.norm(torch.stack([torch.norm(g) for g in gradients]))
            optimizer.step()
            wait()
        ends.append(time.perf_counter())
    return {
        "images": len(files) * options.epochs,
        "images_per_second": len(files) * options.epochs / (ends[-1] - start),
        "first_epoch_seconds": ends[0] - start,
        "last_epoch_images_per_second": len(files) / (ends[-1] - [start, *ends][-2]),
        "first_loss": losses[0],
        "loss": sum(losses[-len(batches) :]) / len(batches),
    }


@torch.no_grad()
def infer(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = PlainMae(architecture(options), options.size)
    model.load_state_dict(load_file(options.weights))
    model = model.to(device).eval()
    files = sorted((options.source / "test").glob("*/*"))
    batches = loader(Files(files, test_transform(options.size)), options, shuffle=False)
    scores, start = [], time.perf_counter()
    for image in batches:
        maps = model.maps(image.to(device, non_blocking=True)).cpu()
        scores += [m.max().item() for m in maps]
    seconds = time.perf_counter() - start
    names = [f"{file.parent.name}/{file.stem}" for file in files]
    return {
        "images": len(files),
        "images_per_second": len(files) / seconds,
        "scores": dict(zip(names, scores, strict=True)),
    }


def architecture(options: argparse.Namespace) -> dict[str, int]:
    return json.loads(options.architecture.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "infer"])
    parser.add_argument("source", type=Path, help="a category in the layout of MVTec AD")
    parser.add_argument("architecture", type=Path, help="JSON: patch, dim, depth, heads, decoder_*")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warmup", type=float, default=2)
    parser.add_argument("--blr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"train": train, "infer": infer}[options.what](options, device)
    mebibytes = {
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_rss_of_largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        / 2**10,
        "peak_cuda": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
    }
    workers = {"threads": options.threads, "workers": options.workers, "torch": torch.__version__}
    print(json.dumps(result | {"mebibytes": mebibytes} | workers))


if __name__ == "__main__":
    main()
