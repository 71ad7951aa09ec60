"""What a folder of images means: which file is normal, which is defective, which mask is whose.

The four layouts are described in `shards/README.md`. `scan` tells them apart by the names of
folders and files alone and opens no image, but for files that hold many. Images and masks are
paired by their names, never by their order.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from kdad_dist.data.bundles import find_bundle, read_bundle
from kdad_dist.data.image import EXTENSIONS
from kdad_dist.data.index import Split, held_out_keys
from kdad_dist.data.records import (
    GOOD,
    MASKS,
    Layout,
    Masks,
    Record,
    Scan,
    choose,
    folders,
    images,
    is_image,
    key_of,
)
from kdad_dist.data.visa import COLUMNS, find_table, read_visa
from kdad_dist.errors import DataError
from kdad_dist.wording import beside, enumerated

TEST_FRACTION = 0.2
"""Share of the normal images of a plain folder that becomes test data, by a hash of the key."""
MOST = 4
"""Classes that are named where a folder is said to hold some."""
LOOKED_FOR: Mapping[Layout, str] = {
    "mvtec": "train/good (mvtec)",
    "visa": f"split_csv/1cls.csv or another .csv with the columns {','.join(COLUMNS)} (visa)",
    "folder": "a folder named good (folder)",
    "classes": "two or more folders of images, in train/ or directly, or the files of CIFAR-10, "
    "MNIST or Fashion-MNIST (classes)",
}


def scan(
    root: Path,
    layout: Layout | Literal["auto"] = "auto",
    categories: Sequence[str] | None = None,
) -> Scan:
    """The images below one category, or below a folder of categories.

    Raises:
        DataError: `root` cannot be read, is of no known layout or of several, or holds no image.
        UsageError: a category is asked for that is not there.
    """
    root = Path(os.path.abspath(root))  # noqa: PTH100 - a link keeps its own name
    try:
        result = _recognise(root, tuple(LOOKED_FOR) if layout == "auto" else (layout,))
        match result.layout:
            case "visa":
                read_visa(result, categories)
            case "classes":
                _read_classes(result, categories)
            case "mvtec":
                for folder in _category_folders(result, categories):
                    _read_mvtec(result, folder, Masks(folder / MASKS))
            case "folder":
                for folder in _category_folders(result, categories):
                    _read_folder(result, folder, Masks(folder / MASKS))
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error}", "make it readable") from None
    _settle(result)
    return result


def _recognise(root: Path, layouts: Sequence[Layout]) -> Scan:
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        near = beside(root, "*/")
        raise DataError(f"{root} {what}", f"{near}give the folder that holds the images")
    found: list[tuple[Layout, str]] = []
    for name in layouts:
        if reason := _reason(root, name):
            found.append((name, reason))
    if len(found) == 1:
        return Scan(root, *found[0])
    if found:
        choices = ", or ".join(f"{name}, because {reason}" for name, reason in found)
        raise DataError(f"{root} may be {choices}", "name the layout that is meant: --layout")
    held = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{root} has no {'known layout' if len(layouts) > 1 else f'layout {layouts[0]}'}. It "
        f"holds {held}. Looked for, in it and one folder deeper: "
        + "; ".join(LOOKED_FOR[name] for name in layouts),
        "arrange the files like one of these, or give the folder above or below",
    )


def _reason(root: Path, layout: Layout) -> str | None:
    """Why `root` may be of this layout, or None where it is not."""
    table = find_table(root)
    if layout == "visa":
        return table and f"{table.relative_to(root)} has the columns {','.join(COLUMNS)}"
    # Inside a category, train/good and test/good would look like plain folders named so.
    candidates = (root, *(f for f in folders(root) if f.name not in {"train", "test"}))
    kinds = {folder: kind for folder in candidates if (kind := _kind(folder))}
    if layout != "classes":
        if kinds.get(root, layout) != layout or layout not in kinds.values():
            return None
        first = next(folder for folder, kind in kinds.items() if kind == layout)
        return f"{first.name}/{_normal(layout)} exists"
    top = root / "train" if (root / "train").is_dir() else root
    if table or (root / MASKS).is_dir() or (top == root and kinds):
        return None
    classes = [f.name for f in folders(top) if any(is_image(path.name) for path in f.iterdir())]
    names = enumerated(classes, MOST)
    reason = f"the folders {names} in {top.name} hold images" if len(classes) > 1 else None
    if not (bundle := find_bundle(root)):
        return reason
    folder, kind, file = bundle
    if reason:
        raise DataError(f"{root} holds {file} of {kind}, but {reason}", "part the two")
    return f"{folder.name} holds {file} of {kind}"


def _kind(folder: Path) -> Layout | None:
    """The layout of a folder that is a category on its own."""
    if (folder / "train" / GOOD).is_dir():
        return "mvtec"
    return "folder" if (folder / GOOD).is_dir() else None


def _normal(layout: Layout) -> str:
    return f"train/{GOOD}" if layout == "mvtec" else GOOD


def _category_folders(result: Scan, categories: Sequence[str] | None) -> list[Path]:
    found = [result.root]
    if _kind(result.root) != result.layout:
        found = [folder for folder in folders(result.root) if any(images(folder))]
    wanted = choose([folder.name for folder in found], categories, result.root)
    found = [folder for folder in found if folder.name in wanted]
    for folder in found:
        if _kind(folder) != result.layout:
            raise DataError(
                f"{folder} holds images but no folder {_normal(result.layout)}, unlike its "
                f"neighbours ({result.layout}, because {result.reason})",
                f"put its normal images into {_normal(result.layout)}, or move it away",
            )
    return found


def _read_mvtec(result: Scan, folder: Path, masks: Masks) -> None:
    for inner in folders(folder / "train"):
        for path in images(inner):
            if inner.name == GOOD:
                result.add(folder, path, Split.TRAIN)
            else:
                result.faults.append((path, "is in train/, but not in train/good"))
    for inner in folders(folder / "test"):
        for path in images(inner):
            if inner.name == GOOD:
                result.add(folder, path, Split.TEST)
                continue
            defect, name = inner.name, path.relative_to(inner).with_suffix("")
            if defect == "bad" and masks.types and "bad" not in masks.types:
                # Re-foldered: test/bad/crack_000.png and ground_truth/crack/000_mask.png.
                fitting = [kind for kind in masks.types if name.name.startswith(f"{kind}_")]
                if fitting:
                    defect = max(fitting, key=len)
                    name = name.with_name(name.name.removeprefix(f"{defect}_"))
            result.add_defect(folder, path, defect, name, masks)
    _finish_category(result, folder, masks, {"train", "test", MASKS})


def _read_folder(result: Scan, folder: Path, masks: Masks) -> None:
    """Defective images are test data, and so is a part of the normal ones.

    The hash is salted, since the validation images are chosen by the plain hash of the same key:
    unsalted, the test data would take exactly the images that validation wants.
    """
    good = {f"test:{key_of(folder, path)}": path for path in images(folder / GOOD)}
    test = held_out_keys(good, TEST_FRACTION)
    for path in images(folder / GOOD):
        is_test = f"test:{key_of(folder, path)}" in test
        result.add(folder, path, Split.TEST if is_test else Split.TRAIN)
    for inner in folders(folder):
        for path in images(inner) if inner.name not in {GOOD, MASKS} else ():
            name = path.relative_to(inner).with_suffix("")
            result.add_defect(folder, path, inner.name, name, masks)
    _finish_category(result, folder, masks, {inner.name for inner in folders(folder)})


def _finish_category(result: Scan, folder: Path, masks: Masks, known: set[str]) -> None:
    left = sorted(path for paths in masks.left.values() for path in paths)
    result.faults += [(path, "is a mask without an image") for path in left]
    others = [inner for inner in folders(folder) if inner.name not in known]
    result.unused += [inner for inner in others if any(images(inner))]


def _read_classes(result: Scan, categories: Sequence[str] | None) -> None:
    """`<split>/<class>/*`, or `<class>/*`, which is all training data, or files of many images.

    Where there is no test/, val/ is the test split, as in ImageNet.
    """
    root, tops = result.root, {Split.TRAIN: result.root}
    choose([root.name], categories, root)
    if bundle := find_bundle(root):
        read_bundle(result, *bundle[:2])
        return
    if (root / "train").is_dir():
        tops[Split.TRAIN] = root / "train"
        held = [root / name for name in ("test", "val") if (root / name).is_dir()]
        if held:
            tops[Split.TEST] = held[0]
        others = [inner for inner in folders(root) if inner not in tops.values()]
        result.unused += [inner for inner in others if any(images(inner))]
    for split, top in tops.items():
        for inner in folders(top):
            found = list(images(inner))
            if not found and top != root:  # directly in ROOT, a folder need not be a class
                result.faults.append((inner, "is a class with no images"))
            for path in found:
                key = key_of(root, path)
                result.records.append(Record(key, path, split, root.name, inner.name))


def _settle(result: Scan) -> None:
    """Sorts what was read, and refuses what no index could hold."""
    kept: dict[str, Record] = {}
    for record in sorted(result.records, key=lambda r: (r.category, r.split, r.key, r.path)):
        names = (record.category, record.class_name, record.defect_type)
        if not all(name is None or name.isprintable() for name in names):
            reason = "the name of its folder holds characters that cannot be printed"
            result.faults.append((record.path, reason))
        elif record.key in kept:
            reason = f"would have the same key, {record.key}, as {kept[record.key].path.name}"
            result.faults.append((record.path, reason))
        else:
            kept[record.key] = record
    result.records = list(kept.values())
    if not result.records and not result.faults:
        raise DataError(
            f"{result.root} ({result.layout}, because {result.reason}) holds no image",
            f"put images there: {', '.join(sorted(EXTENSIONS.values()))}",
        )
