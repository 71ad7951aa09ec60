"""The report: complete and safe for whole runs, honest in place for runs that lack something."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kdad_dist.cli.results import report as report_verb
from kdad_dist.errors import DataError, UsageError
from kdad_dist.pictures import colours, heat
from kdad_dist.report import charts as report_charts
from kdad_dist.report.data import read_run
from kdad_dist.report.page import write_report
from kdad_dist.report.pictures import outline
from tests.helpers_run import make_run, write_explained, write_json
from tests.pages import Page

TEMPLATES = Path(report_charts.__file__).parent / "templates"
ATTACK = "<script>alert(1)</script>\"'&"


def report(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def edit(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def test_a_whole_run_gives_a_page_with_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    page = report(run)
    for words in (
        "Image AUROC",
        "Lowest-scoring defective images",
        "Highest-scoring defective images",
        "Highest-scoring normal images",
        "Decision at the threshold",
        "the 0.99 quantile of the scores of 12 held-out normal training images",
        "5ca1ab1e" * 8,
        "backbone: resnet18",
        "3.11.9",
        "1 min 33 s",
        "scored: step 340",
        "2026-01-02 03:04 UTC",
        "Images per second 61.5",
        "Latency 41.3 ms for 4 images together (95 % within 55.8 ms)",
    ):
        assert words in page.text
    assert page.count("svg") == 4
    assert "not scored" not in page.text.lower()
    assert not (run / "figures").exists()
    capsys.readouterr()
    report_verb(run, latex=False, png=True)
    assert capsys.readouterr().err == f"report: {run}/report.html\ncharts: {run}/figures\n"
    drawn = {path.stem for path in (run / "figures").iterdir()}
    assert drawn == {"loss", "scores-1", "roc-1", "pro-1"}
    assert not list(run.glob(".report*"))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert page.count("script") == 0
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy and "default-src 'none'" in policy and "script-src" not in policy


def test_every_table_image_and_drawing_has_a_name(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run")).read_text()
    page = Page(html)
    assert page.count("table") == page.count("caption") == 2
    assert all(a.get("scope") for tag, a in page.elements if tag == "th")
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ET.fromstring(svg)
        named = {element.get("id"): element.text for element in root if element.get("id")}
        assert root.get("role") == "img"
        assert named[root.get("aria-labelledby")] and named[root.get("aria-describedby")]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_what_comes_from_data_is_text_never_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", categories=(ATTACK,), defect_types=(ATTACK,), name=ATTACK)
    edit(run / "environment.json", cpu=ATTACK, version=ATTACK, packages={ATTACK: ATTACK})
    edit(run / "status.json", state=ATTACK, reason=ATTACK, updated=ATTACK)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["provenance"][ATTACK] = ATTACK
    metrics["categories"][ATTACK] |= {"pixel_ap": None, "notes": {"pixel_ap": ATTACK}}
    write_json(run / "metrics.json", metrics)
    page = report(run)
    assert page.count("script") == 0
    assert page.text.count("alert(1)") > 20
    for _, attributes in page.elements:
        assert set(attributes) <= {
            *("id", "class", "lang", "charset", "content", "http-equiv", "name", "rel", "href"),
            *(
                "alt",
                "aria-label",
                "aria-labelledby",
                "aria-describedby",
                "role",
                "tabindex",
                "style",
                "src",
                "width",
            ),
            *("height", "scope", "colspan", "rowspan", "span", "open", "viewbox", "d", "x", "y"),
            *("cx", "cy", "r", "aria-describedby", "aria-hidden"),
        }


def test_a_run_that_only_trained_says_what_is_missing(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", scored=False))
    assert "Not scored yet" in page.text
    assert "No threshold" in page.text
    assert "No provenance" in page.text
    assert page.count("svg") == 1


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scored=False)
    for name in ("metrics.jsonl", "environment.json"):
        (run / name).unlink()
    edit(run / "status.json", state="running", step=3, reason="just started")
    page = report(run)
    assert "No loss curve" in page.text
    assert "No environment.json" in page.text
    assert "This run is running, at step 3 of 400: just started." in page.text


def test_a_run_without_a_status_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scored=False)
    (run / "status.json").unlink()
    assert "This run is" not in report(run).text


def test_several_categories_have_a_mean_and_a_section_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", categories=("tile", "nut", "wood"))
    page = report(run)
    assert page.count("svg") == 3 * 3 + 1
    assert page.count("details") == 3 + 2
    assert "mean" in page.text
    assert page.text.count("Share of images by score") == 3


def test_the_figures_of_synthetic_defects_stand_in_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    write_json(run / "metrics.json", metrics | {"synthetic": metrics["mean"]})
    text = Page(write_report(run).read_text()).text
    assert "held-out, synthetic defects" in text
    assert "no test image takes part" in text


def test_a_category_without_defects_says_why_its_figures_are_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", defect_types=())
    reason = "no defective test images"
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["categories"]["tile"]["notes"] = {"image_auroc": reason, "pixel_aupro": reason}
    write_json(run / "metrics.json", metrics)
    page = report(run)
    assert f"No ROC curve: {reason}." in page.text
    assert f"No PRO curve: {reason}." in page.text
    assert page.count("svg") == 2
    assert page.text.count("\N{EN DASH}") >= 6
    assert "finds" not in page.text
    assert "raises a false alarm on" in page.text


def test_a_category_without_normal_images_is_shown(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", normal=0))
    assert "No ROC curve: it needs normal and defective images." in page.text
    assert (
        "normal images" not in page.text.split("Share of images by score")[1].split("score of")[0]
    )


def test_defects_without_masks_are_shown_without_outline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = run / "scores" / "examples"
    entries = json.loads((folder / "examples.json").read_text())
    write_json(folder / "examples.json", [entry | {"mask": None} for entry in entries])
    curves = json.loads((run / "scores" / "curves.json").read_text())
    write_json(run / "scores" / "curves.json", {"tile": {"roc": curves["tile"]["roc"]}})
    page = report(run)
    assert "no mask" in page.text
    assert "No PRO curve: it needs masks of defective images." in page.text


def panels_of(page: Page) -> list[list[str]]:
    """The names of the pictures of each example, in order, without the image's own key."""
    shown: list[list[str]] = []
    for tag, attributes in page.elements:
        if "panels" in (attributes.get("class") or "").split():
            shown.append([])
        elif tag == "img":
            shown[-1].append((attributes["alt"] or "").split(",")[0])
    return [[names[0].split()[0], *names[1:]] for names in shown]


TRUTH, MAP = "The same image with the annotated defect outlined", "Its anomaly map"


def test_a_reconstruction_stands_between_image_and_ground_truth(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", reconstructs=True))
    rebuilt = "The image as the method reconstructs it"
    shown = panels_of(page)
    assert ["Image", rebuilt, TRUTH, MAP] in shown
    assert ["Image", rebuilt, MAP] in shown
    assert all(rebuilt in names for names in shown)
    assert page.text.count("reconstruction") == len(shown)


def test_where_nothing_is_reconstructed_nothing_is_said_of_it(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert "reconstruct" not in page.text
    assert {tuple(names) for names in panels_of(page)} == {("Image", TRUTH, MAP), ("Image", MAP)}


def test_images_left_out_of_the_pixel_metrics_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["categories"]["tile"]["notes"] = {"masks": "2 of 40 have no mask"}
    write_json(run / "metrics.json", metrics)
    page = report(run)
    assert "2 of 40 have no mask" in page.text
    assert ("a", {"href": "#note-1", "aria-label": "note 1"}) in page.elements


def test_the_last_checkpoint_stands_beside_the_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["mean"]["image_auroc"], metrics["provenance"]["checkpoint_step"] = 0.1234, 400
    write_json(run / "metrics-last.json", metrics)
    page = report(run)
    assert "mean of the last checkpoint, step 400" in page.text
    assert "0.123" in page.text


def test_the_last_checkpoint_has_no_line_where_it_is_the_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(run / "metrics.json", run / "metrics-last.json")
    page = report(run)
    assert "mean of the last checkpoint" not in page.text
    assert "is the last one as well" in page.text


def test_a_run_of_which_only_the_last_checkpoint_was_scored_shows_that(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    expected = report(run).text
    (run / "metrics.json").rename(run / "metrics-last.json")
    (run / "scores").rename(run / "scores-last")
    assert report(run).text == expected


def choose(run: Path, checkpoint: str) -> None:
    """Sets `score.checkpoint` of a run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"score": {"checkpoint": checkpoint}}))


def test_what_counts_is_the_checkpoint_that_the_run_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copytree(run / "scores", run / "scores-last")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["mean"]["image_auroc"], metrics["provenance"]["checkpoint_step"] = 0.1234, 400
    write_json(run / "metrics-last.json", metrics)
    found = {}
    for checkpoint in ("best", "last"):
        choose(run, checkpoint)
        found[checkpoint] = read_run(run)
    assert found["best"].metrics == found["last"].other_metrics
    assert found["last"].metrics == found["best"].other_metrics
    assert found["last"].examples_directory == run / "scores-last/examples"
    page = report(run)
    assert "mean of the selected checkpoint, step 340" in page.text
    assert "last checkpoint" not in page.text

    (run / "metrics-last.json").unlink()  # what is scored counts, whatever was named
    assert read_run(run).metrics == found["best"].metrics
    assert read_run(run).examples_directory == run / "scores/examples"


def test_one_checkpoint_that_was_scored_once_is_shown_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(run / "metrics.json", run / "metrics-last.json")
    (run / "scores-last").mkdir()  # of another step, once
    before = read_run(run)
    choose(run, "last")
    after = read_run(run)
    assert after.is_one_checkpoint and after.other_checkpoint == "selected"
    assert (after.scores, after.curves, after.examples) == (
        *(before.scores, before.curves, before.examples),
    )


def test_the_colour_scale_marks_the_threshold_where_there_is_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "the mark is the threshold, 0.35" in report(run).text
    edit(run / "metrics.json", threshold=None)
    page = report(run)
    assert "Anomaly of each pixel" in page.text
    assert "the mark is the threshold" not in page.text


def test_without_examples_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "scores" / "examples" / "examples.json").unlink()
    page = report(run)
    assert "No example pictures" in page.text
    assert page.count("img") == 0
    assert page.count("svg") == 4


def test_without_a_threshold_nothing_is_decided(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "metrics.json", threshold={"value": None, "quantile": 0.99, "images": 0})
    for name in ("scores/scores.csv", "scores/examples/examples.json"):
        text = (run / name).read_text()
        text = re.sub(r'"pred_label": \d', '"pred_label": null', text)
        (run / name).write_text(re.sub(r",[01]\n", ",\n", text))
    page = report(run)
    assert "No threshold" in page.text
    assert "not decided" in page.text
    assert "\N{MULTIPLICATION SIGN} threshold" not in page.text


def test_lines_that_a_kill_left_unfinished_are_counted_not_fatal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "lo')
    assert "1 unfinished line(s) of metrics.jsonl were left out." in report(run).text


def test_a_step_trained_twice_counts_once_and_the_newest_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scored=False)
    lines = [{"step": s, "loss": v} for s, v in ((10, 9.0), (20, 8.0), (10, 2.0), (20, 1.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Training: from 2 to 1, lowest 1." in report(run).text


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scored=False)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n'
    )
    html = write_report(run).read_text()
    line = re.search(r'class="line first" d="([^"]*)"', html)
    assert line and line[1].count("M") == 2 and "nan" not in line[1]


def test_a_constant_score_and_a_single_loss_can_be_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "scores" / "scores.csv").read_text()
    (run / "scores" / "scores.csv").write_text(re.sub(r",\d\.\d+,", ",0.0,", text))
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 0.0}\n')
    edit(run / "metrics.json", threshold={"value": 0.0})
    page = report(run)
    assert page.count("svg") == 4
    assert any(a.get("class") == "point first" for tag, a in page.elements if tag == "circle")


def test_a_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent does not exist"):
        write_report(tmp_path / "absent")


def test_a_directory_that_holds_no_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", '{"mean": {}'),
        ("metrics.json", '{"mean": {"image_auroc": "high"}, "categories": {}}'),
        ("status.json", "[]"),
        ("scores/curves.json", '{"tile": {"roc": {"fpr": ["a"]}}}'),
        ("scores/scores.csv", "key,category\na,b\n"),
        ("scores/examples/examples.json", "{}"),
        ("config.yaml", "a: [1"),
        ("config.yaml", "just words"),
        ("config.yaml", "\x00"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(run / name))):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_example_picture_is_named(tmp_path: Path, damage: str) -> None:
    run = make_run(tmp_path / "run")
    path = run / "scores" / "examples" / "0000_image.png"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=re.escape(str(path))):
        write_report(run)


def test_a_picture_outside_the_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "scores" / "examples" / "examples.json"
    entries = json.loads(path.read_text())
    entries[0]["image"] = "../../../secret.png"
    write_json(path, entries)
    with pytest.raises(DataError, match="is not a plain file name"):
        write_report(run)


def test_a_full_disk_leaves_the_old_page_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    before = write_report(run).read_bytes()
    names = sorted(run.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_report(run)
    assert sorted(run.iterdir()) == names
    assert (run / "report.html").read_bytes() == before


@pytest.fixture
def read_only_run() -> Iterator[Path]:
    """A run that everybody may read and only its owner write."""
    with tempfile.TemporaryDirectory() as name:
        run = make_run(Path(name), scored=False)
        run.chmod(0o755)
        yield run


def test_a_run_that_cannot_be_written_is_an_error(
    read_only_run: Path, as_unprivileged: None
) -> None:
    if os.access(read_only_run, os.W_OK, effective_ids=True):
        read_only_run.chmod(0o555)
    with pytest.raises(DataError, match=r"report\.html.* cannot be written: Permission denied"):
        write_report(read_only_run)


def test_the_old_page_stays_whole_when_a_new_one_fails(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = write_report(run).read_bytes()
    (run / "metrics.json").write_text("{")
    with pytest.raises(DataError):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_the_report_does_not_load_torch() -> None:
    code = "import sys, kdad_dist.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_colours_brighten_evenly() -> None:
    red, green, blue = colours().T
    brightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(brightness) > 0).all()
    assert brightness[0] < 1 and brightness[-1] > 240


def test_the_map_is_brightest_where_it_is_highest() -> None:
    grey = Image.new("RGB", (4, 1), (128, 128, 128))
    shown = np.asarray(heat(grey, np.array([[0, 0.5, 1, 7]], dtype=np.float32))).sum(axis=2)[0]
    assert shown[0] < shown[1] < shown[2] == shown[3]


def test_the_outline_leaves_the_defect_itself_visible() -> None:
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (12, 12, 20, 20))
    drawn = np.asarray(outline(image, mask))
    assert (drawn[12:20, 12:20] == (200, 100, 50)).all()
    assert (drawn[11, 15] == (0, 229, 255)).all()
    assert (drawn[0, 0] == (200, 100, 50)).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.3), (1e-9, 3e-9), (-5, 12_345), (0.1, 0.11)]
)
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    ticks = report_charts.Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert len({f"{tick:g}" for tick in ticks}) == len(ticks)


def test_scores_over_many_magnitudes_get_a_logarithmic_axis() -> None:
    chart = report_charts.score_chart(
        [("normal", False, [1e-6, 1e-5]), ("hole", True, [0.1])], 1e-4
    )
    assert any("(log)" in mark.text for mark in chart.marks)
    assert any(mark.text == "0.0001" for mark in chart.marks)


def test_large_runs_are_drawn_with_a_bounded_number_of_marks() -> None:
    many = np.random.default_rng(0).random(50_000).tolist()
    chart = report_charts.score_chart([("normal", False, many)], None)
    assert sum(len(str(mark.attributes.get("d", ""))) for mark in chart.marks) < 20_000
    line = report_charts.loss_chart([(i, v) for i, v in enumerate(many)], [], None)
    assert line and sum(len(str(mark.attributes.get("d", ""))) for mark in line.marks) < 20_000


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_has_enough_contrast_in_both_schemes() -> None:
    css = (TEMPLATES / "report.css.j2").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in css.split("@media")[:2]]
    for scheme in schemes:
        for text in ("text", "muted", "accent", "normal", "defect", "second", "good", "bad"):
            assert contrast(scheme[text], scheme["surface"]) >= 4.5, text
        for text in ("text", "muted", "accent"):
            assert contrast(scheme[text], scheme["page"]) >= 4.5, text


def test_what_networks_look_at_stands_side_by_side_with_how_far_they_agree(tmp_path: Path):
    run = make_run(tmp_path)
    assert "What the networks look at" not in report(run).text
    write_explained(run, ("cat", ATTACK))
    page = report(run)
    assert "student and teacher Grad-CAM 0.876 0.543 48 2 " in page.text
    dash = "\N{EN DASH}"
    assert f"teacher and student without teacher Grad-CAM++ {dash} {dash} 0 50" in page.text
    shown = [a["alt"] for tag, a in page.elements if tag == "img" and "Grad-CAM" in a["alt"]]  # type: ignore
    names = ["student", "teacher", "student without teacher"]
    kinds = ["Grad-CAM", "Grad-CAM++"]
    assert shown == 2 * [f"{kind} of the {name}" for kind in kinds for name in names]
    assert page.text.count(ATTACK) >= 3  # as text, and no element


def test_a_map_that_is_missing_is_named(tmp_path: Path):
    run = make_run(tmp_path)
    write_explained(run)
    (run / "scores/explained/0001_beside_gradcam.png").unlink()
    with pytest.raises(DataError, match="0001_beside_gradcam.png"):
        write_report(run)
