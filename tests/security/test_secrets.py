"""What stands in the environment stays there, whatever a run writes down or says."""

from pathlib import Path

import pytest

from tests.kdad import configured, kdad, succeeds

pytestmark = pytest.mark.launch
SECRETS = {
    name: f"5ec2e7{number:02}" * 5
    for number, name in enumerate(
        (
            *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"),
            *("GITHUB_TOKEN", "DATABASE_URL", "KDAD_PASSWORD", "SLURM_JWT", "PGPASSWORD"),
        )
    )
}
CONFIG = {
    "name": "secret",
    "data": {"image_size": 32},
    "method": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1]}},
    "optim": {"name": "adam", "lr": 1.0e-3},
    "train": {"steps": 3, "batch_size": 4, "log_every": 1},
    "track": {"tensorboard": True},
}


def test_no_secret_of_the_environment_is_written_or_said(tmp_path: Path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config, run = configured(tmp_path, CONFIG, 32), tmp_path / "run"
    said = [
        succeeds("train", config, f"output={run}"),
        succeeds("score", run),
        succeeds("report", run),
        # Failures say more than successes, and leave it in status.json.
        kdad("train", config, f"output={run}", f"data.shards={tmp_path}/gone"),
    ]
    assert said[-1].codes == [1], said[-1].text
    files = {path for path in run.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert names >= {"environment.json", "status.json", "report.html", "manifest.json"}
    everything = b"".join(path.read_bytes() for path in files)
    everything += "".join(outcome.text for outcome in said).encode()
    assert not [name for name, value in SECRETS.items() if value.encode() in everything]
