"""Pages that are made of other people's names hold text, never markup or script."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import kdad_dist
from kdad_dist.cli.app import main
from kdad_dist.cli.text import say
from kdad_dist.errors import DataError
from kdad_dist.report.data import read_run
from kdad_dist.report.page import write_report
from kdad_dist.score.results import write_scores
from tests.helpers_run import make_run, write_json
from tests.unit.test_report import Page

PACKAGE = Path(kdad_dist.__file__).parent
NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "</style><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "&lt;script&gt;",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_files_classes_and_runs_are_text(tmp_path: Path, name: str):
    run = make_run(tmp_path / "run", categories=(name,), defect_types=(name,), name=name)
    examples = run / "scores/examples/examples.json"
    entries = json.loads(examples.read_text())
    write_json(examples, [entry | {"key": f"{name}/{i}"} for i, entry in enumerate(entries)])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert name in page.text and f"{name}/0" in page.text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form", "input", "a:href"}
    for _, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/", "data:,"))


@pytest.mark.parametrize("place", ["../../secret.png", "/etc/passwd", "a/b.png", "..", ""])
def test_a_picture_is_taken_from_the_run_alone(tmp_path: Path, place: str):
    run = make_run(tmp_path / "run")
    examples = run / "scores/examples/examples.json"
    entries = json.loads(examples.read_text())
    write_json(examples, [entries[0] | {"image": place}])
    with pytest.raises(DataError, match="plain file name|cannot read"):
        write_report(run)


def test_a_name_does_not_steer_the_terminal(tmp_path: Path, capsys, monkeypatch):
    name = "\x1b]0;title\x07\x1b[2J\r\x9bgone"
    monkeypatch.setattr(sys, "argv", ["kdad", "verify", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        main()
    say(f"skipped: {name}\n\tindented")
    said = capsys.readouterr().err
    assert r"\x1b]0;title\x07\x1b[2J\r\x9bgone" in said and "\n\tindented" in said
    assert not set(said) & set("\x1b\x07\r\x9b")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@A1", 'a,"b"', "a\u2028b\nc"])
def test_a_csv_file_holds_names_as_they_are_and_gives_them_back(tmp_path: Path, name: str):
    run = make_run(tmp_path / "run")
    names = dict.fromkeys(("key", "category", "defect_type"), name)
    row = names | {"gt_label": 1, "pred_score": 0.5, "pred_label": 1}
    write_scores(run / "scores/scores.csv", [row])
    [found] = read_run(run).scores
    assert [found.key, found.category, found.defect_type] == [name] * 3


def test_every_template_escapes_by_itself_and_none_is_told_not_to():
    """Markup is made in `report/charts.py` alone, whose texts are escaped one by one."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Environment"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("autoescape") == "True", path
    for path in (PACKAGE / "report" / "templates").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"autoescape\s+false|<script|\bon\w+=|https?://", text), path
