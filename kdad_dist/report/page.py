"""The result of a run as one HTML page: no network, no script, nothing beside the file.

`write_report` reads a run directory (`data`), makes of it what the page shows (`tables`, `charts`,
`pictures`), and fills the template. The same run gives the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from kdad_dist.files import write_text, writing
from kdad_dist.pictures import ANCHORS
from kdad_dist.report import charts
from kdad_dist.report.charts import Chart
from kdad_dist.report.classes import TEMPLATE, classes, tells_classes
from kdad_dist.report.classes import headline as class_headline
from kdad_dist.report.data import METRICS, Example, Figures, RunFiles, Score, Threshold, read_run
from kdad_dist.report.explained import evidence
from kdad_dist.report.pictures import Panels, panels
from kdad_dist.report.png import FIGURES, write_pngs
from kdad_dist.report.tables import (
    curve,
    decisions,
    duration,
    figure,
    headline,
    kind_of,
    moment,
    percent,
    rates,
    table,
    training_facts,
)
from kdad_dist.report.text import latency
from kdad_dist.runtime.progress import progress
from kdad_dist.wording import amount

GROUPS = {
    "miss": (
        "Lowest-scoring defective images",
        "The lowest first: a defect whose score is not above the threshold is missed.",
    ),
    "false_alarm": (
        "Highest-scoring normal images",
        "The highest first: a normal image above the threshold is a false alarm.",
    ),
    "hit": ("Highest-scoring defective images", "The highest first."),
    "normal": ("Normal images", "Normal images that scored low."),
}
"""Kind of example -> heading and explanation, in the order of the page."""


@dataclass(frozen=True)
class Picture:
    example: Example
    panels: Panels
    verdict: str
    ratio: float | None
    """Score in units of the threshold."""

    @property
    def columns(self) -> int:
        """Image and map; the reconstruction, where there is one; the ground truth of a defect."""
        return 2 + (self.panels.reconstruction is not None) + bool(self.example.gt_label)


@dataclass(frozen=True)
class Group:
    title: str
    explanation: str
    pictures: list[Picture]

    @property
    def columns(self) -> int:
        """Pictures side by side, of the example that has most."""
        return max(picture.columns for picture in self.pictures)


@dataclass(frozen=True)
class ColourScale:
    top: float
    threshold: float | None


@dataclass(frozen=True)
class Category:
    """What the page shows of one category; a text stands for what cannot be shown, and says why."""

    name: str
    scores: Chart | str
    roc: Chart | str
    pro: Chart | str
    groups: list[Group]
    scale: ColourScale | None
    """Of the anomaly maps, from 0."""


def write_report(run: Path, png: bool = False) -> Path:
    """Writes RUN/report.html and returns its path.

    Args:
        png: write the charts into RUN/figures too.

    Raises:
        ConfigError: there is no such directory, or it holds no run.
        DataError: a file of the run is damaged, or the page cannot be written.
    """
    found = read_run(run)
    page, path = render(found), run / "report.html"
    with writing(run):
        write_text(path, page)
        if png:
            write_pngs(drawings(found), run / FIGURES)
    return path


def drawings(files: RunFiles) -> dict[str, Chart]:
    """The charts of the page, by the names of their files."""
    charts: dict[str, Chart | str] = {"loss": loss(files)}
    for place, part in enumerate([] if tells_classes(files) else categories(files), 1):
        charts |= {f"{kind}-{place}": getattr(part, kind) for kind in ("scores", "roc", "pro")}
    return {name: chart for name, chart in charts.items() if isinstance(chart, Chart)}


def template(name: str) -> jinja2.Template:
    """A page to be filled in; whatever is filled in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "percent": percent,
        "duration": duration,
        "moment": moment,
        "latency": latency,
        "amount": amount,
    }
    return environment.get_template(name)


def render(files: RunFiles) -> str:
    """The page, as HTML."""
    if tells_classes(files):
        shown = classes(files)
        name, found = TEMPLATE, {"classes": shown, "headline": class_headline(shown)}
    else:
        name, found = "report.html.j2", anomalies(files)
    in_common = {
        "run": files,
        "evidence": evidence(files),
        "loss": loss(files),
        "training": training_facts(files),
        "provenance": files.metrics.provenance if files.metrics else {},
    }
    return template(name).render(found | in_common)


def anomalies(files: RunFiles) -> dict[str, Any]:
    """What the page shows of a run that looks for anomalies alone."""
    rows, notes = table(files)
    threshold = files.metrics.threshold if files.metrics else None
    return {
        "metrics": METRICS,
        "headline": headline(files),
        "rows": rows,
        "notes": notes,
        "threshold": threshold or Threshold(),
        "rates": rates(threshold) if threshold else "",
        "decisions": decisions(files.scores),
        "categories": categories(files),
        "colours": ANCHORS,
    }


def categories(files: RunFiles) -> list[Category]:
    """Charts and pictures of every category that any file of the run names."""
    figures = files.metrics.categories if files.metrics else {}
    named = [
        *figures,
        *(score.category for score in files.scores),
        *files.curves,
        *(example.category for example in files.examples),
    ]
    names, found = list(dict.fromkeys(named)), []
    with progress("drawing", len(names), "categories", brief=True) as bar:
        for name in names:
            found.append(category(files, name, figures.get(name, Figures())))
            bar.advance()
    return found


def category(files: RunFiles, name: str, figures: Figures) -> Category:
    threshold = files.metrics.threshold if files.metrics else None
    value = threshold.value if threshold else None
    pixel_value = threshold.pixel_value if threshold else None
    scores = [score for score in files.scores if score.category == name]
    examples = [example for example in files.examples if example.category == name]
    peaks = [example.map_max for example in examples if example.map]
    top = max([*peaks, 0.0])
    if pixel_value:
        # One image far out must not leave all others dark: the decision is made at 1x.
        top = min(max(top, 1.25 * pixel_value), 2 * pixel_value)
    return Category(
        name=name,
        scores=_score_chart(scores, value),
        roc=_roc_chart(files, name, figures, scores),
        pro=_pro_chart(files, name, figures),
        groups=_groups(files, examples, value, top),
        scale=ColourScale(top, pixel_value) if peaks else None,
    )


def _score_chart(scores: list[Score], threshold: float | None) -> Chart | str:
    if not scores:
        return "No scores: this category has not been scored."
    groups: dict[tuple[bool, str], list[float]] = {}
    for score in scores:
        groups.setdefault((bool(score.gt_label), kind_of(score)), []).append(score.pred_score)
    rows = [(name, defective, groups[defective, name]) for defective, name in sorted(groups)]
    return charts.score_chart(rows, threshold)


def _roc_chart(files: RunFiles, name: str, figures: Figures, scores: list[Score]) -> Chart | str:
    curves = files.curves.get(name, {})
    drawn = []
    for kind, label, metric in (
        ("roc", "images", "image_auroc"),
        ("pixel_roc", "pixels", "pixel_auroc"),
    ):
        curve = curves.get(kind)
        if curve and curve.get("fpr"):
            points = list(zip(curve["fpr"], curve["tpr"], strict=True))
            drawn.append((label, points, getattr(figures, metric)))
    if not drawn:
        reason = figures.notes.get("image_auroc", "it needs normal and defective images")
        return f"No ROC curve: {reason.rstrip('.')}."
    return charts.roc_chart(drawn, _rates(scores))


def _rates(scores: list[Score]) -> tuple[float, float] | None:
    """False and true positive rate at the threshold, where both kinds of image were decided."""
    labels = {kind: [s.pred_label for s in scores if s.gt_label == kind] for kind in (0, 1)}
    if not all(labels.values()) or any(label is None for part in labels.values() for label in part):
        return None
    false, true = (sum(label or 0 for label in part) / len(part) for part in labels.values())
    return false, true


def _pro_chart(files: RunFiles, name: str, figures: Figures) -> Chart | str:
    curve = files.curves.get(name, {}).get("pro")
    if not curve or not curve.get("fpr"):
        reason = figures.notes.get("pixel_aupro", "it needs masks of defective images")
        return f"No PRO curve: {reason.rstrip('.')}."
    points = list(zip(curve["fpr"], curve["pro"], strict=True))
    return charts.pro_chart(points, figures.pixel_aupro)


def _groups(
    files: RunFiles, examples: list[Example], threshold: float | None, top: float
) -> list[Group]:
    groups = []
    for kind, (title, explanation) in GROUPS.items():
        members = [example for example in examples if example.kind == kind]
        members.sort(key=lambda e: e.pred_score, reverse=kind in {"hit", "false_alarm"})
        pictures = [
            Picture(
                example,
                panels(example, files.examples_directory, top),
                _verdict(example),
                example.pred_score / threshold if threshold else None,
            )
            for example in members
        ]
        if pictures:
            groups.append(Group(title, explanation, pictures))
    return groups


def _verdict(example: Example) -> str:
    if example.pred_label is None:
        return "not decided"
    if example.gt_label:
        return "found" if example.pred_label else "missed"
    return "false alarm" if example.pred_label else "passed"


def loss(files: RunFiles) -> Chart | str:
    """The loss chart, or why there is none."""
    train, held_out = curve(files.log, "loss"), curve(files.log, "val_loss")
    scored = files.metrics.provenance.get("checkpoint_step") if files.metrics else None
    chart = charts.loss_chart(train, held_out, scored if isinstance(scored, int) else None)
    return chart or "No loss curve: metrics.jsonl holds no loss yet."
