"""What the table and page of a sweep say: of seeds, of both checkpoints, of what is published."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from kdad_dist.cli.results import report
from kdad_dist.config.load import find, load, recipe_names, recipes_directory
from kdad_dist.errors import DataError
from kdad_dist.report.tables import curve
from kdad_dist.sweep.jobs import Sweep
from kdad_dist.sweep.page import curves, unlike, write_page
from kdad_dist.sweep.plan import plan, plan_variants, reopen
from kdad_dist.sweep.published import OWN, by_method, read_published
from kdad_dist.sweep.table import cautions, write_table
from kdad_dist.sweep.text import as_latex
from tests.helpers_run import write_log
from tests.pages import Page
from tests.sweeps import ODD, finish

ATTACK = "<script>alert(1)</script>\"'&"


def planned(config: Path, seeds: int = 1, *overrides: str) -> Sweep:
    return plan(str(config), overrides, ["all"], seeds)


def publish(config: Path, *lines: str, columns: str = "class,metric,value,source,note") -> None:
    rows = [columns, *lines]
    config.with_suffix(".csv").write_text("\n".join(rows) + "\n")


def test_the_table_has_mean_and_deviation_over_seeds_and_says_what_is_missing(config):
    sweep = planned(config, 2)
    odd, zipped, odd_again, zip_again = sweep.jobs
    finish(odd, image_auroc=0.5)
    finish(zipped, image_auroc=0.9, pixel_auroc=0.7)
    finish(odd_again, image_auroc=0.7)
    found = write_table(sweep)
    figures = [found["categories"][name]["image_auroc"] for name in (ODD, "zip")]
    figures.append(found["mean"]["image_auroc"])
    assert [figure["mean"] for figure in figures] == pytest.approx([0.6, 0.9, 0.75])
    assert figures[0]["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert [figure["deviation"] for figure in figures[1:]] == [None, None]
    assert found["mean"]["pixel_auroc"]["mean"] == 0.7
    assert not found["complete"]
    [missing] = found["missing"]
    assert (missing["category"], missing["seed"], missing["state"]) == ("zip", 6, "not started")
    assert "zip, seed 6: not started" in (sweep.directory / "table.md").read_text()

    finish(zip_again, image_auroc=0.9)
    found = write_table(sweep)
    assert found["complete"] and not found["missing"]
    # 0.7 and 0.8 are the means over classes of the two seeds.
    assert found["mean"]["image_auroc"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert json.loads((sweep.directory / "table.json").read_text()) == found


def test_names_survive_csv_and_markdown(config):
    sweep = planned(config)
    for job in sweep.jobs:
        finish(job, image_auroc=0.5)
    write_table(sweep)
    with (sweep.directory / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["runs"], row["is_mean"]) for row in rows] == [
        (ODD, "1", "0"),
        ("zip", "1", "0"),
        ("mean", "2", "1"),
    ]
    assert float(rows[0]["image_auroc"]) == 0.5 and rows[0]["pixel_auroc"] == ""
    lines = (sweep.directory / "table.md").read_text().splitlines()
    columns = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert columns == {
        4
    }  # a name and the one figure that is known, twice: of all seeds, and closely


def test_a_failed_run_stands_in_the_table_with_its_reason(config):
    sweep = planned(config)
    sweep.jobs[1].run.mkdir(parents=True)
    status = {"state": "failed", "reason": "the loss is not finite\nand more"}
    (sweep.jobs[1].run / "status.json").write_text(json.dumps(status))
    write_table(sweep)
    text = (sweep.directory / "table.md").read_text()
    assert "zip, seed 5: failed: the loss is not finite\n" in text
    assert "mean of 0 of 2" in text


def test_both_checkpoints_stand_in_the_table_and_the_configured_one_counts(config):
    sweep = planned(config, 1, "score.checkpoint=last")
    finish(sweep.jobs[0], {"image_auroc": 0.6}, image_auroc=0.7)
    finish(sweep.jobs[1], {"image_auroc": 0.8}, image_auroc=0.9)
    found = write_table(sweep)
    figure = found["categories"][ODD]["image_auroc"]
    assert (figure["mean"], figure["selected"]["mean"], figure["final"]["mean"]) == (0.6, 0.7, 0.6)
    assert found["mean"]["image_auroc"]["mean"] == pytest.approx(0.7)
    assert found["mean"]["image_auroc"]["selected"]["mean"] == pytest.approx(0.8)
    assert found["rules"]["selected"] == ["lowest loss on held-out images"]
    text = (sweep.directory / "table.md").read_text()
    assert "Of the final checkpoints:" in text
    assert "Selected: lowest loss on held-out images (normal images alone);" in text
    assert "| zip " in text and "|   0.9000 | 0.8000 |" in text


def test_a_figure_stands_beside_the_published_one_and_means_are_of_the_same_classes(config):
    publish(config, 'zip,image_auroc,0.75,"A, 2021",chosen on test images')
    sweep = planned(config, 2)
    for job, value in zip(sweep.jobs, (0.5, 0.8, 0.5, 0.9), strict=True):
        finish(job, image_auroc=value)
    found = write_table(sweep)
    row, mean = found["categories"]["zip"]["image_auroc"], found["mean"]["image_auroc"]
    assert row["published"] == {"published": 0.75}
    assert row["difference"] == pytest.approx(0.1)
    assert found["categories"][ODD]["image_auroc"]["difference"] is None
    assert mean["mean"] == pytest.approx(0.675)
    assert (mean["published"], mean["compared"]) == ({"published": 0.75}, 1)
    assert mean["difference"] == pytest.approx(0.1)
    lines = (sweep.directory / "table.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("| mean of the 1 published")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.8500"] * 2 + [
        "0.7500",
        "+0.1000",
    ]
    assert "Published image AUROC: A, 2021 (chosen on test images)." in lines
    with (sweep.directory / "table.csv").open() as file:
        rows = {row["category"]: row for row in csv.DictReader(file)}
    assert float(rows["zip"]["image_auroc_difference"]) == pytest.approx(0.1)
    assert rows[ODD]["image_auroc_published"] == rows[ODD]["published_from"] == ""
    random = f"The teacher's weights are random in: {ODD}, zip."
    assert [row["cautions"] for row in rows.values()] == [random] * 3
    assert found["cautions"] == {random: [ODD, "zip"]}
    assert rows["zip"]["published_from"] == "image_auroc: A, 2021 (chosen on test images)"
    assert random in lines


def test_each_published_method_has_a_column_and_the_difference_is_to_the_first(config):
    lines = ["zip,,image_auroc,0.75,A,", "zip,Pipe | &,image_auroc,0.5,B,old"]
    lines += ['"wo od, |\'q"" $(touch x)",,image_auroc,0.25,A,', "zip,Pipe | &,pixel_ap,0.125,B,"]
    publish(config, *lines, columns="class,method,metric,value,source,note")
    sweep = planned(config)
    for job in sweep.jobs:
        finish(job, image_auroc=0.8, pixel_ap=0.5)
    sweep.write(sweep.jobs)
    found = write_page(sweep, latex=True)
    row, mean = found["categories"]["zip"], found["mean"]
    assert row["image_auroc"]["published"] == {"published": 0.75, "Pipe | &": 0.5}
    assert row["image_auroc"]["difference"] == pytest.approx(0.05)
    # Both classes are compared with the first method; the other one has no mean of them.
    assert mean["image_auroc"]["published"] == {"published": 0.5, "Pipe | &": None}
    # Of a figure that the first does not give, the difference is to the next one.
    assert row["pixel_ap"]["published"] == {"Pipe | &": 0.125}
    assert (row["pixel_ap"]["difference"], mean["pixel_ap"]["compared"]) == (0.375, 1)
    text = (sweep.directory / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    assert ["| class", "selected", "final", "published", "difference", "Pipe \\| & |"] in rows
    assert ["| zip", "0.8000", "0.8000", "0.7500", "+0.0500", "0.5000 |"] in rows
    assert ["| zip", "0.5000", "0.5000", "0.1250", "+0.3750 |"] in rows
    assert "Published image AUROC and pixel AP of" not in text  # their notes differ
    assert "Published image AUROC of Pipe | &: B (old)." in text
    with (sweep.directory / "table.csv").open() as file:
        line = next(row for row in csv.DictReader(file) if row["category"] == "zip")
    assert (line["image_auroc_published"], line["image_auroc_published_Pipe | &"]) == (
        "0.75",
        "0.5",
    )
    told = "image_auroc: A; image_auroc of Pipe | &: B (old); pixel_ap of Pipe | &: B"
    assert line["published_from"] == told
    assert r" & published & difference & Pipe | \&" in (sweep.directory / "table.tex").read_text()
    assert "Pipe | &" in Page((sweep.directory / "report.html").read_text()).text
    assert reopen(sweep.directory).published == sweep.published
    older = json.loads((sweep.directory / "table.json").read_text())["published"][OWN]
    assert by_method(older) == {OWN: sweep.published[OWN]}


def test_before_anything_is_scored_the_configuration_says_which_figures_there_will_be(
    config, tmp_path
):
    ways = plan_variants("classkd_cifar10", [f"output={tmp_path / 'ways'}"], "classkd_cifar10", 1)
    for sweep, is_classes in ((planned(config), False), (ways, True)):
        write_table(sweep)
        text = (sweep.directory / "table.md").read_text()
        assert ("all images, with their labels" in text, "accuracy" in text) == (is_classes,) * 2
        assert ("normal images alone" in text, "AUROC" in text) == (not is_classes,) * 2


def test_curves_of_ways_to_distil_show_the_cross_entropy_of_the_student(tmp_path):
    ways = plan_variants("classkd_cifar10", [f"output={tmp_path}"], "classkd_cifar10", 1)
    assert list(curves(ways)) == ["cross_entropy", "val_loss"]
    told = [
        {"step": 1, "loss": 0.7, "cross_entropy": 2.0, "discriminator": 0.7},
        {"step": 2, "loss": 3.0, "cross_entropy": 1.5},
        {"step": 2, "val_loss": 1.0},
    ]
    assert curve(told, "loss") == [(2, 3.0)]
    assert curve(told, "cross_entropy") == [(2, 1.5)]
    assert curve(told, "val_loss") == [(2, 1.0)]


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("stfpm_mvtec", ["cache_teacher: true"]),
        ("mkd_cifar10", ["student: equal", "use_bias: true", "cache_teacher: true"]),
        ("vitkd_cifar10", ["student.heads: 4", "student.mlp: 64", "cache_teacher: true"]),
        ("loramae_small", ["lora.rank: 2"]),
    ],
)
def test_who_learns_and_what_is_cached_leaves_the_loss_the_same(tmp_path, recipe, keys):
    ways = [f"{i}: {{method.{key}}}\n" for i, key in enumerate(keys)]
    (tmp_path / "ways.yaml").write_text("".join(["as_it_is: {}\n", *ways]))
    sweep = plan_variants(recipe, [f"output={tmp_path}"], str(tmp_path / "ways.yaml"), 1)
    assert len(sweep.jobs) == len(keys) + 1 and unlike(sweep) == []


def test_losses_that_do_not_compare_share_no_axis(config, tmp_path):
    (tmp_path / "ways.yaml").write_text(
        "one: {}\ntwo: {method.combine: sum, optim.lr: 0.1, method.cache_teacher: true}\n"
    )
    for ways, keys in (("", []), ("three: {method.teacher.layers: [2]}", ["teacher.layers"])):
        with (tmp_path / "ways.yaml").open("a") as file:
            file.write(ways)
        sweep = plan_variants(str(config), [], str(tmp_path / "ways.yaml"), 1)
        assert unlike(sweep) == [f"method.{key}" for key in keys]
        assert bool(curves(sweep)) == (not keys)
    for job in sweep.jobs:
        finish(job, image_auroc=0.5)
        write_log(job.run / "metrics.jsonl", 40)
    write_page(sweep)
    page = Page((sweep.directory / "report.html").read_text())
    assert "the variants learn by different losses (method.teacher.layers)" in page.text
    assert page.count("svg") == 1  # of the figures


def test_of_variants_there_is_no_mean(config, tmp_path):
    (tmp_path / "ways.yaml").write_text("one: {}\ntwo: {method.combine: sum}")
    (tmp_path / "ways.csv").write_text("class,metric,value,source,note\none,pixel_ap,0.5,A,\n")
    typed = ["data.category=zip", "track.wandb=disabled", "method.teacher.weights=own.pth"]
    sweep = plan_variants(str(config), typed, str(tmp_path / "ways.yaml"), 1)
    for job in sweep.jobs:
        finish(job, pixel_ap=0.75)
    found = write_table(sweep)
    assert found["mean"] is None and found["rows"] == "variant"
    told = (
        f"Set otherwise than in the configuration: {typed[0]}, {typed[2]}. What is published "
        "knows nothing of it: mind the differences."
    )
    theirs = "The teacher's weights are own.pth in: one, two."
    text = (sweep.directory / "table.md").read_text()
    assert told in text and theirs in text
    assert found["cautions"] == {told: ["one"], theirs: ["one", "two"]}
    with (sweep.directory / "table.csv").open() as file:
        assert [row["cautions"] for row in csv.DictReader(file)] == [f"{told} {theirs}", theirs]
    assert found["categories"]["one"]["pixel_ap"]["difference"] == 0.25
    assert "mean" not in (sweep.directory / "table.csv").read_text().split("is_mean")[1]


def test_classifiers_that_do_not_start_from_published_weights_are_named(tmp_path):
    (tmp_path / "ways.yaml").write_text(
        "one: {method.network.weights: own.pth}\ntwo: {}\n"
        'three: {method.network.weights: "{two}", method.network.freeze: all}\n'
        "four: {method.network.weights: random}\nfive: {method.network.weights: random}"
    )
    ways = str(tmp_path / "ways.yaml")
    sweep = plan_variants("classkd_cifar10", [f"output={tmp_path / 'runs'}"], ways, 1)
    assert cautions(sweep) == {
        "The network's first weights are own.pth in: one.": ["one"],
        "The network's first weights are random in: four, five.": ["four", "five"],
    }
    assert not cautions(plan_variants("classkd_cifar10", [], "classkd_cifar10", 1))


def test_of_shards_of_ones_own_it_is_said_that_published_figures_match_by_name_alone(config):
    publish(config, "zip,pixel_ap,0.5,A,")
    own = f"data.shards={load(config).data.shards}"
    caution, classes = next(iter(cautions(plan(str(config), [own], ["all"], 1)).items()))
    assert f"matched by name alone: whether {own} holds" in caution and classes == ["zip"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zip,image_auc,0.5,A,", "image_auc"),
        ("zip,image_auroc,50,A,", "less than or equal to 1"),
        ("zip,image_auroc,nan,A,", "value"),
        ("zip,image_auroc,0.5,,", "source"),
        (",image_auroc,0.5,A,", "class"),
        ("zip,image_auroc,0.5,A,,more", "many.csv:2: "),
        ("zip,image_auroc,0.5,A,\nzip,image_auroc,0.6,B,", "stands twice"),
    ],
)
def test_a_published_figure_that_cannot_be_is_refused_with_its_line(config, line, message):
    publish(config, line)
    with pytest.raises(DataError, match=message) as raised:
        planned(config)
    assert "many.csv:" in str(raised.value)


def test_what_recipes_quote_as_published_is_sound_and_of_the_classes_they_name() -> None:
    shipped = sorted(recipes_directory().rglob("*.csv"))
    assert {path.stem for path in shipped} >= {"mkd_cifar10", "stfpm_mvtec", "vitkd_cifar10"}
    for path in shipped:
        assert path.with_suffix(".yaml").is_file(), path
        assert read_published(path), path
    means = {  # which systems and papers give themselves
        "mkd_cifar10": {"image_auroc": 0.8718},
        "mkd_mnist": {"image_auroc": 0.9871},
        "mkd_mvtec": {"image_auroc": 0.8774, "pixel_auroc": 0.9071},
        "stfpm_mvtec": {"image_auroc": 0.9555, "pixel_auroc": 0.9702},
        "vitkd_cifar10": {"image_auroc": 0.9683},
    }
    for name, expected in means.items():
        rows = read_published(find(name))["published"].values()
        for key, mean in expected.items():
            values = [row[key].value for row in rows]
            assert sum(values) / len(values) == pytest.approx(mean, abs=3e-4), (name, key)
    ours, salehi = read_published(find("vitkd_cifar10")).values()
    assert all("labels" in row["image_auroc"].note for row in ours.values())
    [theirs] = read_published(find("mkd_cifar10")).values()
    assert {name: row["image_auroc"].value for name, row in salehi.items()} == {
        name: row["image_auroc"].value for name, row in theirs.items()
    }
    assert "demo" in recipe_names() and read_published(find("demo")) == {}


def test_shipped_variants_are_those_of_their_recipe_and_what_is_published_of_them() -> None:
    for path in sorted((recipes_directory() / "variants").glob("*.yaml")):
        sweep = plan_variants(path.stem, [], path.stem, 1)
        assert set(sweep.published["published"]) <= set(sweep.names)
    jobs = {job.name: job for job in plan_variants("classkd_cifar10", [], path.stem, 1).jobs}
    for name, distill in (("ce", "none"), ("kd", "hinton"), ("ld", "discriminator")):
        frozen, unfrozen = (
            jobs[f"{name}{'-r18' * (name == 'ce')}-{kind}"] for kind in ("frozen", "unfrozen")
        )
        freezes = [job.config.method.network.freeze for job in (frozen, unfrozen)]
        assert freezes == ["all_but_bn", "none"] and frozen.config.method.distill == distill
        teachers = [need.name for need in unfrozen.needs]
        assert teachers == ([] if name == "ce" else ["ce-r18-unfrozen", "ce-r50-frozen"])
        if unfrozen.needs:  # beside the same student without a teacher
            alone = (frozen.needs[0], unfrozen.needs[0])
            assert [job.name for job in alone] == ["ce-r18-frozen", "ce-r18-unfrozen"]
            method = unfrozen.config.method
            assert method.explain and method.beside.weights == str(alone[1].run)


def test_a_variant_says_when_the_one_that_it_is_compared_with_has_failed(tmp_path) -> None:
    ways = plan_variants("classkd_cifar10", [f"output={tmp_path}"], "classkd_cifar10", 1)
    jobs = {job.name: job for job in ways.jobs}
    finish(jobs["ce-r50-frozen"], accuracy=0.5)  # the teacher
    neighbour = jobs["ce-r18-unfrozen"].run
    neighbour.mkdir()
    (neighbour / "status.json").write_text('{"state": "failed", "reason": "no"}')
    write_table(ways)
    text = (tmp_path / "table.md").read_text()
    assert "- kd-unfrozen, seed 0: not started: ce-r18-unfrozen failed\n" in text
    assert "- kd-frozen, seed 0: not started: ce-r18-frozen not started\n" in text


def test_the_page_of_a_sweep_shows_tables_curves_links_and_what_is_missing(config, capsys):
    publish(config, "zip,image_auroc,0.75,A,")
    sweep = planned(config, 2)
    odd, zipped, again, _ = sweep.jobs
    for job in (odd, zipped, again):
        finish(job, image_auroc=0.8)
        write_log(job.run / "metrics.jsonl", 40)
        (job.run / "report.html").write_text("")
    sweep.write(sweep.jobs)
    write_table(sweep)
    report(sweep.directory, latex=True, png=True)
    named = [f"{sweep.directory / name}" for name in ("report.html", "table.tex", "figures")]
    told = capsys.readouterr().err.splitlines()[-3:]
    assert told == [f"report: {named[0]}", f"latex: {named[1]}", f"charts: {named[2]}"]
    html = (sweep.directory / "report.html").read_text()
    page = Page(html)
    for words in (
        "Not complete: 1 of 4 runs",
        "zip, seed 6: not started",
        "+0.0500",
        "3 of 4 runs",
    ):
        assert words in page.text
    links = {a["href"] for tag, a in page.elements if tag == "a" and "href" in a}
    assert "zip/report.html" in links and "zip-seed6/report.html" not in links
    assert "wo%20od%2C%20%7C%27q%22%20%24%28touch%20x%29/report.html" in links
    assert page.count("svg") == 3 and page.count("script") == 0
    # Two seeds of one class in one colour, and the other class in another.
    loss = html[html.index('id="chart-loss-title"') :]
    loss = loss[: loss.index("</svg>")]
    assert (loss.count('class="line hue0 dash0"'), loss.count('class="line hue1 dash0"')) == (2, 1)
    latex = (sweep.directory / "table.tex").read_text()
    assert "wo od, |'q\" \\$(touch x)" in latex and latex.count(r"\begin{tabular}") == 2
    assert sorted(path.stem for path in (sweep.directory / "figures").iterdir()) == [
        "image_auroc",
        "loss",
        "val_loss",
    ]
    with Image.open(sweep.directory / "figures/loss.png") as image:
        colours = {colour for _, colour in image.getcolors(1 << 24)}
        assert image.width == 560 * 3 and {(11, 92, 173), (179, 71, 0)} <= colours


def test_names_are_text_on_the_page_and_in_latex(config, tmp_path):
    (tmp_path / "ways.yaml").write_text(json.dumps({ATTACK: {}, "a_b%": {}}))
    sweep = plan_variants(str(config), [], str(tmp_path / "ways.yaml"), 1)
    sweep.jobs[0].log.parent.mkdir()
    sweep.jobs[0].log.write_text(f"== train\nkdad: {ATTACK}\n")
    found = write_page(sweep)
    page = Page((sweep.directory / "report.html").read_text())
    assert page.count("script") == 0 and page.text.count("alert(1)") >= 5
    assert r"a\_b\%" in as_latex(found) and r"\textless{}script\textgreater{}" in as_latex(found)
