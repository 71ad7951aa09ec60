"""A shallow vision transformer, one block for each layer of its teacher that it answers to.

With four blocks beside a ViT-B/16 it is that of Strater's notebook, without its head, which nothing
uses: 13,355,264 parameters; 13,364,490 with the head.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdad_dist.config.methods import VitStudentConfig
from kdad_dist.draws import seeded
from kdad_dist.errors import ConfigError
from kdad_dist.models.dropout import RowDropout
from kdad_dist.models.tokens import Form, Tokens


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to what went in."""

    def __init__(self, width: int, config: VitStudentConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, RowDropout(config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp),
            nn.GELU(),
            RowDropout(config.dropout),
            nn.Linear(config.mlp, width),
            RowDropout(config.dropout),
        )
        nn.init.xavier_uniform_(self.qkv.weight)
        for layer in (self.qkv, self.proj):
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def attention(self, tokens: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        images, count, width = tokens.shape
        parts = self.qkv(tokens).view(images, count, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if self.training and self.dropout.rate:  # the fused kernel would draw by itself
            weights = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(dim=3)
            heads = self.dropout(weights) @ value
        else:
            heads = F.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.transpose(1, 2).reshape(images, count, width))


class VitStudent(nn.Module):
    """Gives tokens of its teacher's form after each of its blocks."""

    def __init__(self, form: Form, blocks: Iterable[Block], dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, form.width, form.patch, form.patch)
        self.prefix = nn.Parameter(torch.randn(1, form.prefix, form.width))
        self.positions = nn.Parameter(torch.randn(1, form.prefix + form.grid**2, form.width))
        self.dropout = RowDropout(dropout)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Tokens:
        """Tokens after each block, of images as the teacher gets them. `b` may be 0."""
        if image.shape[0] == 0:
            return tuple(tokens[:0] for tokens in self(image.new_zeros(1, *image.shape[1:])))
        patches = self.embed(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix.expand(image.shape[0], -1, -1), patches], dim=1)
        tokens = self.dropout(tokens + self.positions)
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return tuple(found)


def build_vit_student(form: Form, depth: int, config: VitStudentConfig, seed: int) -> VitStudent:
    """Raises ConfigError where the heads do not divide the teacher's width."""
    if form.width % config.heads:
        raise ConfigError(
            f"method.student.heads is {config.heads}, and the teacher is {form.width} wide, which "
            "cannot be divided among them",
            "choose a number of heads that divides it",
        )
    with seeded(seed, "student"):
        blocks = [Block(form.width, config) for _ in range(depth)]
        return VitStudent(form, blocks, config.dropout)
