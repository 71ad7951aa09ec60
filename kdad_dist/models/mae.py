"""Masked autoencoder (He et al., CVPR 2022): a ViT that sees some patches and predicts the others.

Parameters have the names of the official checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LONGEST_WRITTEN_OUT = 512
"""Tokens up to which the matrix of attention is kept in memory where that is faster."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of encoder and decoder; `patch` is the side of a patch in pixels."""

    patch: int
    dim: int
    depth: int
    heads: int
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16


PRESETS = {
    "mae_vit_base_patch16": Architecture(16, 768, 12, 12),
    "mae_vit_large_patch16": Architecture(16, 1024, 24, 16),
    "mae_vit_large_patch14": Architecture(14, 1024, 24, 16),
    "mae_vit_large_patch7": Architecture(7, 1024, 24, 16),
    "mae_vit_huge_patch14": Architecture(14, 1280, 32, 16),
    # For a CPU.
    "mae_vit_small_patch7": Architecture(7, 384, 6, 6, 192, 2, 6),
    "mae_vit_tiny_patch8": Architecture(8, 192, 6, 3, 128, 2, 4),
}


class PatchEmbed(nn.Module):
    """A linear map of patches, kept as the convolution that checkpoints hold."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, patches: Float[Tensor, "b n values"]) -> Float[Tensor, "b n dim"]:
        """Patches as `patchify` lays them out."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class MaskedAutoencoder(nn.Module):
    """Predicts hidden patches of square images from visible ones.

    Tokens carry their positions, so attention needs them in no order: visible patches alone are
    embedded, hidden ones alone are predicted, and nothing is ever put back into place.

    Initial weights are drawn from torch's global generator.

    Args:
        image_size: side in pixels, a multiple of the patch.
        activation_checkpointing: compute blocks again in the backward pass while training.
    """

    def __init__(
        self, architecture: Architecture, image_size: int, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        a = architecture
        assert image_size % a.patch == 0
        self.patch = a.patch
        self.grid = image_size // a.patch
        self.patches = self.grid**2
        self.activation_checkpointing = activation_checkpointing

        self.cls_token = nn.Parameter(torch.zeros(1, 1, a.dim))
        # Position tables are parameters that are never trained, not buffers: DDP sends buffers
        # to all processes before every forward pass.
        self.pos_embed = nn.Parameter(position_table(a.dim, self.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(a.patch, a.dim)
        self.blocks = blocks(a.depth, a.dim, a.heads)
        self.norm = LayerNorm(a.dim)

        self.decoder_embed = nn.Linear(a.dim, a.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, a.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            position_table(a.decoder_dim, self.grid), requires_grad=False
        )
        self.decoder_blocks = blocks(a.decoder_depth, a.decoder_dim, a.decoder_heads)
        self.decoder_norm = LayerNorm(a.decoder_dim)
        self.decoder_pred = nn.Linear(a.decoder_dim, a.patch**2 * 3)
        self._initialise()

    def forward(
        self,
        image: Float[Tensor, "b 3 s s"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b h"],
    ) -> Float[Tensor, "b h values"]:
        """The predicted values of the hidden patches, laid out as by `patchify`.

        Args:
            image: normalised; its hidden patches are not looked at. `b` may be 0.
            visible, hidden: patch numbers, row by row.
        """
        if image.shape[0] == 0:  # a blank image stands in, so that all parameters have a gradient
            blank = (given.new_zeros(1, *given.shape[1:]) for given in (image, visible, hidden))
            return self.forward(*blank)[:0]
        return self.decode(self.encode(image, visible), visible, hidden)

    def encode(
        self, image: Float[Tensor, "b 3 s s"], visible: Int64[Tensor, "b v"]
    ) -> Float[Tensor, "b v+1 dim"]:
        """Tokens of CLS and of the visible patches."""
        patches = patchify(image, self.patch)
        seen = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))
        tokens = self.patch_embed(seen) + self.pos_embed[0, 1 + visible]
        cls = (self.cls_token[0] + self.pos_embed[0, :1]).expand(image.shape[0], -1, -1)
        return self.norm(self._run(self.blocks, torch.cat([cls, tokens], dim=1)))

    def decode(
        self,
        encoded: Float[Tensor, "b v+1 dim"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b h"],
    ) -> Float[Tensor, "b h values"]:
        positions = self.decoder_pos_embed[0]
        cls = positions[0].expand(visible.shape[0], 1, -1)
        seen = self.decoder_embed(encoded) + torch.cat([cls, positions[1 + visible]], dim=1)
        unseen = self.mask_token + positions[1 + hidden]
        tokens = self._run(self.decoder_blocks, torch.cat([seen, unseen], dim=1))
        return self.decoder_pred(self.decoder_norm(tokens[:, seen.shape[1] :]))

    def _run(self, layers: nn.ModuleList, tokens: Tensor) -> Tensor:
        fused = not writes_attention_out(tokens)
        for block in layers:
            block.attn.fused_attn = fused  # pyright: ignore
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)


def writes_attention_out(tokens: Float[Tensor, "b n dim"]) -> bool:
    """Whether softmax(q k) v is faster in three steps than fused: in bfloat16 on a CPU.

    Measured on one core of an AMD EPYC, forward and backward: 15 + 24 ms instead of 24 + 64 ms for
    16 x 6 x 257 x 64, 190 + 280 ms instead of 240 + 420 ms for 4 x 16 x 1025 x 64. The matrix of
    all pairs has to fit into memory, hence the limit.
    """
    on_cpu = tokens.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return on_cpu and tokens.shape[1] <= LONGEST_WRITTEN_OUT


def blocks(depth: int, dim: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(Block(dim, heads, mlp_ratio=4, qkv_bias=True) for _ in range(depth))


def position_table(dim: int, grid: int) -> Float[Tensor, "1 grid*grid+1 dim"]:
    """Sines and cosines of each patch's place, after a row of zeros for CLS.

    The first half of the channels encodes the column, the second the row: sines, then cosines, of
    `dim / 4` frequencies 10000^(-4k / dim).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return F.pad(torch.cat([column, row], dim=1), (0, 0, 1, 0)).float()[None]


def patchify(image: Float[Tensor, "b 3 s s"], patch: int) -> Float[Tensor, "b l values"]:
    """The pixels of each patch: by row in the patch, then column, then channel."""
    batch, channels, height, width = image.shape
    rows, columns = height // patch, width // patch
    cut = image.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(patches: Float[Tensor, "b l values"], patch: int) -> Float[Tensor, "b c s s"]:
    """The square images that patches are of; as many channels as the patches have."""
    batch, count, values = patches.shape
    grid, channels = round(count**0.5), values // patch**2
    cut = patches.reshape(batch, grid, grid, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(batch, channels, grid * patch, grid * patch)
