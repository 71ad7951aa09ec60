"""Where the squares lie that images are cut into: arithmetic, without torch or pixels."""

from dataclasses import dataclass


def middle(side: int, size: int) -> slice:
    """The `size` pixels in the middle of `side`; an odd one that is left over is behind them."""
    start = (side - size) // 2
    return slice(start, start + size)


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles that cover a square image exactly, spread evenly; one tile is all of it."""

    image_size: int
    tile: int
    """Side of a tile, in pixels."""
    overlap: int = 0
    """Fewest pixels that neighbours share."""

    @property
    def starts(self) -> list[int]:
        """Where tiles begin in either direction: the first at 0, the last so that it ends with the
        image.
        """
        room = self.image_size - self.tile
        gaps = -(-room // (self.tile - self.overlap))
        return [room * number // max(gaps, 1) for number in range(gaps + 1)]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each tile, row by row."""
        return [(top, left) for top in self.starts for left in self.starts]

    @property
    def count(self) -> int:
        """Tiles of an image."""
        return len(self.starts) ** 2
