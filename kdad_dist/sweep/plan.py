"""Which runs a sweep has: from its configuration, or from what is left of it on the disk."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdad_dist.config.load import CONFIG_FILE, SWEEP_FILE, elsewhere, find, load, override
from kdad_dist.config.run import RunConfig
from kdad_dist.data.index import Index, Split
from kdad_dist.errors import ConfigError, DataError, UsageError
from kdad_dist.report.png import FIGURES
from kdad_dist.sweep.jobs import Job, Sweep
from kdad_dist.sweep.published import by_method, read_published
from kdad_dist.sweep.variants import (
    Variant,
    find_variants,
    read_variants,
    refuse_levelling,
    variant_names,
)
from kdad_dist.wording import kdad, meant

TABLE = "table.json"


def plan(config: str, overrides: Sequence[str], asked: Sequence[str], seeds: int) -> Sweep:
    """The runs of a sweep over classes, every configuration checked.

    Args:
        asked: "all", and names of classes, several in a word with commas between.
        seeds: how many, counted up from the configuration's own.

    Raises:
        ConfigError: the configuration is wrong, or the data hold no such class.
        DataError: the shards have no sound index.
        UsageError: the directory of the sweep is that of a run, or the method knows no
            normal class.
    """
    base = load(config, overrides)
    if base.tells_classes:
        raise UsageError(
            f"{base.method.name} tells all classes apart in one run, and a sweep over classes "
            "makes each of them normal in turn",
            f"compare its variants: {kdad('sweep', config)} --variants FILE.yaml (shipped: "
            f"{', '.join(variant_names())}); one run: {kdad('train', config)}",
        )
    refuse_run(base)
    index = Index.read(base.data.shards)
    is_classes = index.layout == "classes"
    known = (
        {sample.class_name or "" for sample in index.samples if sample.split is Split.TRAIN}
        if is_classes
        else index.categories
    )
    key = "data.normal_class" if is_classes else "data.category"
    names = choose(asked, sorted(known), base.data.shards)
    jobs = [
        Job(name, load(config, [*overrides, *own(base, name, number, {key: name})]))
        for number in range(seeds)
        for name in names
    ]
    refuse_twins(jobs)
    return Sweep(
        base, names, seeds, tuple(jobs), "class", read_published(find(config)), tuple(overrides)
    )


def plan_variants(config: str, overrides: Sequence[str], file: str, seeds: int) -> Sweep:
    """The runs of a sweep over variants of one configuration, every one checked.

    Args:
        file: a YAML file, or the name of one that is shipped.

    Raises:
        ConfigError: the configuration, or a variant of it, is wrong.
        UsageError: the directory of the sweep is that of a run, or an override would level what
            tells the variants apart.
    """
    base = load(config, overrides)
    refuse_run(base)
    path = find_variants(file)
    variants = read_variants(path)
    refuse_levelling(path, variants, overrides)
    jobs = [
        job
        for number in range(seeds)
        for job in of_one_seed(config, overrides, base, variants, number)
    ]
    refuse_twins(jobs)
    names = tuple(variant.name for variant in variants)
    return Sweep(base, names, seeds, tuple(jobs), "variant", read_published(path), tuple(overrides))


def of_one_seed(
    config: str,
    overrides: Sequence[str],
    base: RunConfig,
    variants: Sequence[Variant],
    number: int,
) -> list[Job]:
    """The runs of all variants with one seed, in the order of the table."""
    runs = {v.name: str(base.directory / stem(base, v.name, number)) for v in variants}
    jobs: dict[str, Job] = {}

    def job(variant: Variant) -> Job:
        if variant.name not in jobs:
            needs = tuple(job(other) for other in variants if other.name in variant.needs)
            changes = words(variant.changes(runs))
            try:
                told = [*changes, *overrides, *own(base, variant.name, number, {})]
                jobs[variant.name] = Job(variant.name, load(config, told), needs)
            except ConfigError as error:
                raise ConfigError(
                    f"variant {variant.name!r}: {error.problem}", error.remedy
                ) from None
        return jobs[variant.name]

    return [job(variant) for variant in variants]


def own(base: RunConfig, name: str, number: int, more: Mapping[str, str]) -> list[str]:
    """What tells one run of the sweep from the others, as overrides."""
    folder = stem(base, name, number)
    return words(
        {
            **more,
            "name": f"{base.name}-{folder}",
            "output": str(base.directory / folder),
            "seed": base.seed + number,
            "track.group": base.track.group or base.name,
        }
    )


def words(values: Mapping[str, Any]) -> list[str]:
    return [override(key, value) for key, value in values.items()]


def stem(base: RunConfig, name: str, number: int) -> str:
    """The name of a run's directory."""
    return folder(name) + (f"-seed{base.seed + number}" if number else "")


def refuse_run(base: RunConfig) -> None:
    """Raises:
    UsageError: the directory of the sweep is that of a run.
    """
    if (base.directory / CONFIG_FILE).is_file():
        raise UsageError(
            f"{base.directory} is the directory of a run, and a sweep keeps its runs in one of "
            "its own",
            f"give the sweep another directory: {shlex.quote(elsewhere(base, 'sweep'))}",
        )


def choose(asked: Sequence[str], known: Sequence[str], shards: str) -> tuple[str, ...]:
    """The classes that the words of `--categories` name, in their order.

    Raises:
        ConfigError: some of them are unknown.
    """
    names: list[str] = []
    for word in asked:
        parts = [word] if word in known else [part.strip() for part in word.split(",")]
        names += known if word == "all" else parts
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(
            f"--categories names {', '.join(map(repr, unknown))}, which {shards} does not hold",
            f"{meant(unknown[0], known)}choose from: {', '.join(known)}",
        )
    return tuple(dict.fromkeys(names))


def folder(category: str) -> str:
    """The class as the name of a folder: nearly always itself."""
    name = category.replace("%", "%25").replace("/", "%2F")
    ours = (Path(SWEEP_FILE).stem, FIGURES)
    if name.startswith(".") or name in ours:  # hidden or above, or of the sweep itself
        return f"%{ord(name[0]):02X}{name[1:]}"
    return name


def refuse_twins(jobs: Sequence[Job]) -> None:
    """Raises:
    ConfigError: a class or variant is called as another one's further seed.
    """
    runs = [job.run for job in jobs]
    twins = [job for job in jobs if runs.count(job.run) > 1]
    if twins:
        raise ConfigError(
            f"two runs of the sweep would share {twins[0].run}: {twins[0].name!r} "
            f"and a further seed of {twins[1].name!r}, or the reverse",
            "sweep over one of them in a sweep of another `name`",
        )


def is_sweep(directory: Path) -> bool:
    return (directory / SWEEP_FILE).is_file()


def reopen(directory: Path) -> Sweep:
    """The sweep in a directory, which may have moved, as it was last planned.

    Raises:
        DataError: its table, or the configuration of a run, is missing or damaged.
    """
    path = directory / TABLE
    remedy = "start the same sweep again, which writes it"
    base = load(directory / SWEEP_FILE, words({"output": str(directory)}))
    try:
        found = json.loads(path.read_bytes())
        kind: Literal["class", "variant"] = found.get("rows", "class")
        published = by_method(found.get("published", {}))
        jobs: dict[str, Job] = {}
        waiting = {Path(run["directory"]).name: run for run in found["runs"]}

        def job(name: str) -> Job:
            if name not in jobs:
                config = load(directory / f"{name}.yaml", words({"output": str(directory / name)}))
                needs = tuple(job(need) for need in waiting[name].get("needs", ()))
                jobs[name] = Job(waiting[name]["category"], config, needs)
            return jobs[name]

        runs = tuple(job(name) for name in waiting)
        names, typed = tuple(found["categories"]), tuple(found.get("typed", ()))
        return Sweep(base, names, found["seeds"], runs, kind, published, typed)
    except FileNotFoundError:
        raise DataError(f"{path} is not there", remedy) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{path} is damaged: {error!r}", remedy) from None
