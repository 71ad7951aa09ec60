import json
from pathlib import Path

import yaml

from kdad_dist.config import RunConfig, load
from kdad_dist.runtime import session
from kdad_dist.runtime.tracker import Tracker


def config(folder: Path) -> RunConfig:
    text = {
        "name": "x",
        "output": str(folder),
        "data": {"shards": "s"},
        "optim": {"lr": 1},
        "train": {"steps": 1},
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(text))
    return load(folder / "x.yaml")


def test_lines_are_json_whatever_the_numbers(tmp_path):
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with session.start() as here:
        tracker = Tracker(tmp_path, here, config(tmp_path), 0)
        tracker.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
        tracker.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(line, parse_constant=no_constant)
    assert found == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


def test_a_resumed_run_drops_later_lines_and_a_line_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with session.start() as here:
        Tracker(tmp_path, here, config(tmp_path), 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
