"""Which new images are meant: by files, folders and patterns."""

import glob
import logging
from collections.abc import Iterable
from pathlib import Path

from kdad_dist.data.records import DECODED, images
from kdad_dist.errors import DataError
from kdad_dist.wording import amount, beside

log = logging.getLogger(__name__)


def find_images(patterns: Iterable[str], out: Path) -> list[Path]:
    """The image files that the patterns name, sorted, each once.

    Of a folder, those that `kdad pack` would take; other files are taken whatever they are called.

    Args:
        out: where the results go, resolved: of what lies below it, nothing is taken.

    Raises:
        DataError: a pattern names nothing, a folder cannot be read, or all lies below `out`.
    """
    found: set[Path] = set()
    for pattern in patterns:
        named = named_by(pattern)
        if not named:
            raise none_named(pattern)
        found |= named
    # A command that was killed has left the second.
    results = (out, out.with_name(f"{out.name}.partial"))
    folders = {folder: folder.resolve() for folder in {path.parent for path in found}}
    inside = {name for name, at in folders.items() if any(map(at.is_relative_to, results))}
    kept = sorted(path for path in found if path.parent not in inside)
    if not kept:
        raise DataError(
            f"no image but {len(found)} in {out}, where the results go",
            "give another folder with --out",
        )
    if left := len(found) - len(kept):
        log.info("not used: %s in %s, where the results go", amount(left, "image"), out)
    return kept


def named_by(pattern: str) -> set[Path]:
    """The files that a word of the command line names."""
    path = Path(pattern)
    if path.is_dir():
        try:
            return set(images(path))
        except OSError as error:
            raise DataError(
                f"{pattern} cannot be read: {error}",
                "make it readable, and try again while no folder in it is taken away",
            ) from None
    if path.is_file():
        return {path}
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207 - it may be absolute
    return {Path(name) for name in names if Path(name).is_file()}


def none_named(pattern: str) -> DataError:
    """Why a file, folder or pattern names no image."""
    path, near = Path(pattern), ""
    if path.is_dir():
        wrong = "holds no image"
    elif path.exists() or path.is_symlink():
        wrong = "is a pipe, a device or a link to nothing, not a file"
    elif any(character in pattern for character in "*?["):
        wrong = "matches no file"
    else:
        wrong, near = "does not exist", beside(path, "*")
    return DataError(
        f"{pattern} {wrong}",
        f"{near}give images (they end in {', '.join(sorted(DECODED))}), folders or patterns",
    )
