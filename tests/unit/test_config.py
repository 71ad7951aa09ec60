from pathlib import Path

import pytest
import yaml

from kdad_dist.config.changes import changed_keys, digest
from kdad_dist.config.load import dump, load, load_run, override, recipe_names
from kdad_dist.errors import ConfigError

GOOD = """\
name: tile
data: {shards: shards/tile, category: tile}
optim: {name: sgd, lr: 0.4}
train: {epochs: 3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), overrides)
    return str(caught.value)


def test_a_small_file_is_completed_with_defaults(tmp_path):
    config = load(write(tmp_path, GOOD))
    assert config.directory == Path("runs/tile")
    assert config.train.batch_size == 32
    assert config.method.teacher.layers == [1, 2, 3]


def test_overrides_win_over_the_file_and_are_read_as_yaml(tmp_path):
    config = load(write(tmp_path, GOOD), ["train.epochs=7", "data.category=[a, b]", "optim.clip=1"])
    assert (config.train.epochs, config.data.category, config.optim.clip) == (7, ["a", "b"], 1.0)


TEXTS = [
    "/a b/Vorführung",
    "😀",
    "\udcff",
    "3",
    "no",
    "a: #b",
    "'\"",
    "\x85\u2028\x00",
    "a\n...",
    "",
]


@pytest.mark.parametrize("value", [*TEXTS, None, 1e-5, True, ["a, b"], {"a": {"b": ["c", None]}}])
def test_a_value_is_read_from_an_override_as_it_was(value):
    key, _, text = override("data.shards", value).partition("=")
    assert (key, yaml.safe_load(text)) == ("data.shards", value)


def test_an_override_is_written_as_a_person_would():
    assert override("output", "/new user/Vorführung") == "output=/new user/Vorführung"


def test_an_unquoted_no_means_the_precision_no(tmp_path):
    assert load(write(tmp_path, GOOD), ["train.precision=no"]).train.precision == "no"


def test_every_problem_is_named_at_once_with_path_file_and_line(tmp_path):
    text = GOOD.replace("shards:", "shard:").replace("epochs: 3", "epochs: 0") + "seed: many\n"
    message = problems(tmp_path, text, "train.batch_siz=4")
    assert "6 problems" in message or "5 problems" in message
    assert (
        f"{tmp_path / 'run.yaml'}:2: data.shard is not a known key; did you mean data.shards?"
        in message
    )
    assert "run.yaml:2: data.shards is missing" in message
    assert "run.yaml:4: train.epochs" in message
    assert "run.yaml:5: seed" in message
    assert "command line: train.batch_siz is not a known key" in message
    assert "did you mean train.batch_size?" in message


def test_a_key_outside_of_its_section_is_told_its_place(tmp_path):
    assert "did you mean train.epochs?" in problems(tmp_path, GOOD, "epochs=3")
    assert "did you mean optim.lr?" in problems(tmp_path, GOOD, "data.lr=3")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.blr=0.1", "exactly one of lr and blr; the other is null (optim.blr=null"),
        ("train.steps=5", "exactly one of epochs and steps"),
        ("optim.schedule=multistep", "needs milestones"),
        ("data.val_fraction=1", "less than 1"),
        ("optim.lr=.nan", "finite"),
        ("method.name=stfmp", "stfpm"),
        ("name=../x", "that of one folder"),
        ("name=..", "that of one folder"),
        ("name=", "name"),
        ("method.teacher.layers=[]", "method.teacher.layers: must have at least 1, found []"),
        ("score.opening=2", "score.opening: must be true or false, found 2"),
        ("score.opening=[]", "score.opening: must be true or false, found []"),
        ("train", "is not an override"),
        ("optim.lr=[", "is not YAML"),
    ],
)
def test_a_wrong_value_is_explained(tmp_path, override, said):
    assert said in problems(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tile_overlap=70", "command line: data: tile_overlap 70 leaves nothing of a tile"),
        ("method.name=classkd", "run.yaml:5: method.teacher.layers is not a known key; known are"),
        ("data.tile=300", "command line: data: tile 300 is larger"),
        ("data.classes=[a, b]", "command line: data.classes: stfpm looks for anomalies"),
        ("method={name: stfpm, teacher: {layers: 3}}", "command line: method.teacher.layers"),
        ("optim.lr=1", "run.yaml:4: train: give exactly one of epochs and steps"),
    ],
)
def test_what_was_typed_is_blamed_on_who_typed_and_what_was_written_on_the_file(
    tmp_path, override, said
):
    text = GOOD.replace("tile}", "tile, tile: 65}") + "method: {teacher: {layers: [1]}}\n"
    text = text.replace("epochs: 3", "epochs: 3, steps: 2") if "optim" in override else text
    assert said in problems(tmp_path, text, override)


def test_a_sweep_in_place_of_a_run_tells_its_runs(tmp_path):
    (tmp_path / "sweep.yaml").touch()
    with pytest.raises(ConfigError, match="is a sweep; no run of it has begun"):
        load_run(tmp_path)
    for number in range(12):
        (tmp_path / f"c{number:02}").mkdir()
        (tmp_path / f"c{number:02}/config.yaml").touch()
    with pytest.raises(ConfigError, match="is a sweep; its runs are c00, .*c09 and 2 more") as told:
        load_run(tmp_path)
    assert f"such as {tmp_path}/c00" in told.value.remedy


def test_a_key_that_stands_twice_is_refused(tmp_path):
    assert "stands twice" in problems(tmp_path, GOOD + "name: other\n")


@pytest.mark.parametrize(
    "text", ["- a list", "a: [", "!!python/object/apply:os.system ['true']", ""]
)
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path, text):
    assert "run.yaml" in problems(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "override", "said"),
    [
        # pydantic comes to a rule only where the values below it are sound.
        ("shards: shards/tile", "tile: 300", "data.shards=x", "run.yaml:2: data: tile 300 is"),
        (
            "shards: shards/tile, ",
            "",
            "data.shards=x data.tile=300",
            "command line: data: tile 300 is larger",
        ),
        ("3}", "3, steps: 3, batch_size: x}", "train.batch_size=4", "run.yaml:4: train: give"),
        ("", "", "trai.epochs=2", "command line: trai is not a known key"),
        ("", "", "data.shards.x=2", "command line: data.shards: "),
        ("", "", "score.synthetic.x=2", "command line: score.synthetic: "),
    ],
)
def test_what_stands_above_or_beside_what_was_typed_has_its_own_place(
    tmp_path, old, new, override, said
):
    message = problems(tmp_path, GOOD.replace(old, new), *override.split())
    assert f" {said}" in message.replace(str(tmp_path / "run.yaml"), "run.yaml")


def test_an_unknown_recipe_names_the_nearest_and_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine.yaml", tmp_path / "runs/mine/config.yaml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "zzz.yaml").symlink_to("nowhere")
    for typed, said in (
        ("stfpm_mvtek", "did you mean stfpm_mvtec? give a path .* or one of: .*vitkd"),
        ("stfpm_mvtec.yml", "did you mean stfpm_mvtec? check the path"),
        ("mien.yaml", "did you mean mine.yaml? check the path"),
        ("runs/mine", "did you mean runs/mine/config.yaml?"),
        ("zzz", "-> give a path"),
        ("zzz.yaml", "no config file zzz.yaml\n  -> check the path"),
    ):
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            load(typed)
    with pytest.raises(ConfigError, match=r"runs/min does not exist\n.*mean runs/mine\? give"):
        load_run(Path("runs/min"))


def test_every_shipped_recipe_loads():
    for name in recipe_names():
        assert load(name).name


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = load(write(tmp_path, GOOD), ["train.precision=no"])
    path = tmp_path / "again.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_changed_keys_names_what_trains_otherwise_and_nothing_else(tmp_path):
    path = write(tmp_path, GOOD)
    config = load(path)
    free = ["output=x", "checkpoint.keep=9", "score.topk=3", "data.cache=none", "train.max_time=1"]
    assert changed_keys(config, load(path, free)) == []
    [change] = changed_keys(config, load(path, ["optim.lr=0.1"]))
    assert change == "optim.lr: 0.4 in the run, 0.1 now"
    assert digest(config) != digest(load(path, ["seed=1"]))


def test_a_run_from_before_there_were_windows_goes_on(tmp_path):
    config = load(write(tmp_path, GOOD), ["data.augment.crop_margin=8"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config).replace("  centre_margin: 0\n", ""))
    assert "centre_margin" not in path.read_text()
    assert load(path) == config and changed_keys(load(path), config) == []
    [change] = changed_keys(load(path), load(path, ["data.centre_margin=8"]))
    assert change == "data.centre_margin: 0 in the run, 8 now"


def test_a_key_that_allows_several_kinds_is_named_by_its_own_path(tmp_path):
    with pytest.raises(ConfigError, match="data.category: input should be a valid list, found 3"):
        load(write(tmp_path, GOOD), ["data.category=3"])


LORAMAE = [
    "method.name=loramae",
    "method.preset=mae_vit_tiny_patch8",
    "method.weights=random",
    "method.freeze_random=true",
]


def test_what_only_costs_or_only_reads_is_free_to_change_in_a_run(tmp_path):
    path = write(tmp_path, GOOD)
    config = load(path, LORAMAE)
    free = ["method.activation_checkpointing=true", "method.inference.pattern=diagonal"]
    assert changed_keys(config, load(path, [*LORAMAE, *free])) == []
    [change] = changed_keys(config, load(path, [*LORAMAE, "method.lora.rank=2"]))
    assert change == "method.lora.rank: 4 in the run, 2 now"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.freeze_random=false"], "never trained"),
        (["method.lora=null"], "freezes nothing"),
        (["method.lora=null", "method.freeze_random=false"], "leaves no block to train"),
        (["method.inference.partitions=2"], "only with pattern random"),
        (["train.init_from=x.safetensors"], "belongs to method.weights"),
        (["method.lora.rnk=2"], "did you mean method.lora.rank?"),
        (["method.name=loramea"], "did you mean loramae"),
        (["seed=9223372036854775808"], "less than"),
    ],
)
def test_a_wrong_value_of_the_masked_autoencoder_is_explained(tmp_path, overrides, said):
    assert said in problems(tmp_path, GOOD, *LORAMAE, *overrides)
