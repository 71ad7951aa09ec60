"""The `data` section of a configuration."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from kdad_dist.config.types import CHECKED, Address, Fraction, Name, NonNegative, Positive
from kdad_dist.tiling import Tiling


@dataclass(frozen=True, config=CHECKED)
class AugmentConfig:
    crop_margin: NonNegative = 0
    """Pixels by which training images are read larger than `image_size` before a random window of
    that size is cut out; all other images are read as `centre_margin` says."""
    brightness: Fraction = 0.0
    """Largest relative change, up or down."""
    saturation: Fraction = 0.0
    """Largest relative change, up or down."""
    flip: bool = False
    """Mirror an image, left to right, or leave it: as likely."""


@dataclass(frozen=True, config=CHECKED)
class DataConfig:
    shards: Address
    """Folder, or http address, that `kdad pack` wrote."""
    category: str | list[str] = "all"
    """One category, several, or "all": one model is trained on all of them together."""
    normal_class: Name | None = None
    """For shards of classes (a folder of them, CIFAR-10, MNIST): the one that counts as normal."""
    classes: Annotated[list[Name], Field(min_length=2)] | None = None
    """For methods that tell classes apart: which, in the order of their labels."""
    image_size: Positive = 256
    """Side of the square at which images are read, in pixels."""
    centre_margin: NonNegative = 0
    """Pixels by which images are read larger than `image_size` before the window of that size in
    their centre is cut out, which is all that is seen and judged of them."""
    tile: Positive | None = None
    """Side of the square that the networks see, where images are cut into tiles; whole images where
    not given."""
    tile_overlap: NonNegative = 64
    """Fewest pixels that neighbouring tiles share, and over which their maps are blended."""
    val_fraction: Fraction = 0.2
    """Share of the normal training images (of each class, where classes are told apart) held out,
    chosen by a hash of their keys."""
    access: Literal["indexed", "stream"] = "indexed"
    cache: Literal["ram", "device", "none"] = "ram"
    """Where decoded pixels live: a memory-mapped file that the processes of a node share, the
    device of each process, or nowhere (decode again every epoch)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Of training images, drawn from (seed, epoch, image)."""

    def __post_init__(self) -> None:
        classes = self.classes or []
        if twice := sorted({name for name in classes if classes.count(name) > 1}):
            raise ValueError(f"classes names {', '.join(twice)} twice")
        if self.classes and self.normal_class is not None:
            raise ValueError(
                "normal_class is for methods that look for anomalies, classes for those that tell "
                "classes apart; give one of them"
            )
        crop, centre = self.augment.crop_margin, self.centre_margin
        if crop and centre and crop != centre:
            raise ValueError(
                f"augment.crop_margin {crop} shows training images at another scale than "
                f"centre_margin {centre} shows those that are judged; give both the same number of "
                "pixels, or leave one out"
            )
        if self.tile is not None:
            self._check_tiles(self.tile)

    def _check_tiles(self, tile: int) -> None:
        """Raises ValueError where images cannot be cut into tiles like this."""
        if tile > self.image_size:
            raise ValueError(
                f"tile {tile} is larger than image_size {self.image_size}, the square that is cut; "
                "enlarge image_size (to what the images were packed at), or lower tile"
            )
        if self.tile_overlap >= tile:
            raise ValueError(
                f"tile_overlap {self.tile_overlap} leaves nothing of a tile of {tile} pixels; a "
                "quarter of the tile is a good choice"
            )
        refused = {
            "access=stream": (self.access == "stream", "whole images pass by once"),
            f"cache={self.cache}": (self.cache != "ram", "an image is decoded once for all tiles"),
            "augment.crop_margin": (self.augment.crop_margin > 0, "tiles are windows already"),
        }
        if found := [f"{key} ({why})" for key, (given, why) in refused.items() if given]:
            raise ValueError(
                "tile cuts images out of memory-mapped pixels, which does not go with "
                f"{', '.join(found)}; leave out one or the other"
            )

    @property
    def read_size(self) -> int:
        """Side of the square that an image is resized to, whose centre is judged."""
        return self.image_size + self.centre_margin

    @property
    def network_size(self) -> int:
        """Side of the square that the networks see."""
        return self.tile or self.image_size

    @property
    def tiling(self) -> Tiling:
        """How images are cut; into one tile, which is all of it, where they are not."""
        return Tiling(self.image_size, self.network_size, self.tile_overlap if self.tile else 0)
