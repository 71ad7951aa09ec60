"""The index of a shard folder: which samples it holds, where their bytes are, what they hash to.

`index.json` describes the folder; `samples.jsonl` beside it has one line for each sample. Both
are written by `data.writer` and normatively described in `shards/README.md`. No torch here.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdad_dist.data.labels import as_classes, as_normal, held_out_keys
from kdad_dist.data.sample import Count, Part, Sample, Split
from kdad_dist.data.source import fetch, join
from kdad_dist.errors import ConfigError, DataError
from kdad_dist.wording import meant

VERSION = 1
INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Shard:
    file: Part
    sha256: str
    bytes: Count
    samples: Count
    split: Split


@dataclass(frozen=True)
class _Described:
    """What an index file must say; it may say more."""

    layout: str
    image_size: Annotated[int, Field(ge=1)] | None
    resize: str
    categories: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples_sha256: str


_INDEX, _SAMPLE = TypeAdapter(_Described), TypeAdapter(Sample)


@dataclass(frozen=True)
class Index:
    root: str
    """Folder or http address."""
    layout: str
    image_size: int | None
    """Side, or shorter side, that images were resized to; None: original bytes."""
    resize: str
    categories: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: tuple[Sample, ...]
    fingerprint: str
    """Hash of the content: of both index files, which hold the hash of every member."""

    @classmethod
    def read(cls, root: str) -> "Index":
        """The index below a folder or an http address, checked against its own hashes.

        Raises:
            DataError: it is missing, damaged, or of another version.
        """
        raw = parse_index(fetch(root, INDEX_FILE), root)
        described = _INDEX.validate_python(raw)
        lines = fetch(root, SAMPLES_FILE)
        if hashlib.sha256(lines).hexdigest() != described.samples_sha256:
            raise DataError(
                f"{join(root, SAMPLES_FILE)} does not match the hash in {INDEX_FILE}",
                "pack the data set again into a new folder",
            )
        try:
            samples = tuple(_SAMPLE.validate_json(line) for line in lines.splitlines())
        except ValidationError as error:
            raise _senseless(join(root, SAMPLES_FILE), error) from None
        return cls(
            root=root,
            layout=described.layout,
            image_size=described.image_size,
            resize=described.resize,
            categories=described.categories,
            shards=described.shards,
            samples=samples,
            fingerprint=raw["fingerprint"],
        )

    def select(
        self,
        split: Split,
        category: str | Sequence[str] = "all",
        normal_class: str | None = None,
        val_fraction: float = 0.2,
        classes: Sequence[str] | None = None,
    ) -> list[Sample]:
        """The samples of a split in index order, every one with its `gt_label`.

        TRAIN and VAL hold normal samples only, or, with `classes`, samples of all of these.

        Raises:
            ConfigError: a category or a class is unknown, missing or not wanted.
        """
        wanted = self.chosen(category)
        chosen = [sample for sample in self.samples if sample.category in wanted]
        if classes is None:
            labelled = as_normal(chosen, normal_class, self.root, self.layout)
        else:
            labelled = as_classes(chosen, classes, self.root, self.layout)
        if split is Split.TEST:
            return [sample for sample in labelled if sample.split is Split.TEST]
        learnt = [s for s in labelled if s.split is Split.TRAIN and (classes or s.gt_label == 0)]
        held_out: set[str] = set()
        for label in {sample.gt_label for sample in learnt}:
            keys = (sample.key for sample in learnt if sample.gt_label == label)
            held_out |= held_out_keys(keys, val_fraction)
        in_val = split is Split.VAL
        return [replace(s, split=split) for s in learnt if (s.key in held_out) is in_val]

    def chosen(self, category: str | Sequence[str]) -> set[str]:
        """The categories that a configuration names.

        Raises:
            ConfigError: one of them is unknown, or there is none.
        """
        if category == "all":
            return set(self.categories)
        wanted = {category} if isinstance(category, str) else set(category)
        unknown = sorted(wanted - set(self.categories))
        if unknown or not wanted:
            names = ", ".join(map(repr, unknown))
            near = meant("".join(unknown[:1]), self.categories)
            raise ConfigError(
                f"data.category of the configuration names {names or 'nothing'}, which {self.root} "
                "does not hold",
                f"{near}choose from: {', '.join(self.categories)}; data.category=all takes all",
            )
        return wanted


def parse_index(text: bytes, root: str) -> dict[str, Any]:
    where = join(root, INDEX_FILE)
    try:
        described = json.loads(text)
        version = described["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{where} is not a shard index", "pack the data set again") from None
    if version != VERSION:
        raise DataError(
            f"{where} has version {version}; this program reads version {VERSION}",
            "pack the data set again, or use the version of kdad_dist that wrote it",
        )
    if described.get("fingerprint") != fingerprint(described):
        raise DataError(f"{where} does not match its own fingerprint", "pack the data set again")
    try:
        _INDEX.validate_python(described)
    except ValidationError as error:
        raise _senseless(where, error) from None
    return described


def _senseless(where: str, error: ValidationError) -> DataError:
    """Of an index that vouches for itself, and yet nobody has packed."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return DataError(f"{where} says of {place}: {first['msg']}", "pack the data set again")


def fingerprint(described: dict[str, Any]) -> str:
    """Hash of everything in the index but the fingerprint itself."""
    content = {key: value for key, value in described.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_sample(row: dict[str, Any]) -> Sample:
    return _SAMPLE.validate_python(row)


def sample_line(sample: Sample) -> str:
    """A sample as a line of samples.jsonl, the same bytes for the same sample."""
    return json.dumps(asdict(sample), sort_keys=True, ensure_ascii=False) + "\n"


def describe(
    parameters: dict[str, Any],
    shards: Sequence[Shard],
    samples: Sequence[Sample],
    skipped: Sequence[tuple[str, str]] = (),
    source_sha256: str = "",
) -> tuple[bytes, bytes]:
    """The bytes of index.json and of samples.jsonl.

    Args:
        parameters: how it was packed; `layout`, `image_size` and `resize` at least.
        skipped: files that were left out, each with the reason.
        source_sha256: hash of the image folder, by which an unchanged one is known again.
    """
    lines = "".join(map(sample_line, samples)).encode()
    described = {
        "version": VERSION,
        **parameters,
        "categories": sorted({sample.category for sample in samples}),
        "counts": count(samples),
        "shards": [asdict(shard) for shard in shards],
        "skipped": [{"file": file, "reason": reason} for file, reason in skipped],
        "source_sha256": source_sha256,
        "samples_sha256": hashlib.sha256(lines).hexdigest(),
    }
    described["fingerprint"] = fingerprint(described)
    # What is not UTF-8 in the name of a skipped file becomes an escape of JSON (\udcff).
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace"), lines


def count(samples: Iterable[Sample]) -> dict[str, dict[str, dict[str, int]]]:
    """Numbers of samples by split, category, and class or defect type ("good": none)."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for sample in samples:
        kinds = counts.setdefault(sample.split, {}).setdefault(sample.category, {})
        kind = sample.class_name or sample.defect_type or "good"
        kinds[kind] = kinds.get(kind, 0) + 1
    return counts
