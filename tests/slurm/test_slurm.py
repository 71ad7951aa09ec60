"""The jobs in slurm/, and `kdad sweep --slurm`, on a real SLURM that the tests start."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kdad import kdad, standing_still, succeeds, weights
from tests.launcher import wait_for
from tests.needs import REPOSITORY
from tests.slurm.cluster import Cluster, cluster
from tests.sweeps import ODD, many

pytestmark = pytest.mark.launch

CLASSES = ("nut", "tile", ODD)  # as tasks of an array stand: in the order of their names
SMALL = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
"""What the nodes of the test have instead of GPUs."""


@pytest.fixture(scope="module")
def slurm(warm_python: str) -> Iterator[Cluster]:
    with cluster() as found:
        found.environment |= {
            "KDAD_MODE": "cpu",
            "KDAD_PROCESSES": "1",
            "KDAD_PYTHON": warm_python,
            "KDAD_LAUNCH": str(REPOSITORY / "launch"),
            "KDAD_MAIN_ADDRESS": "127.0.0.1",  # both nodes are this machine, under made-up names
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(REPOSITORY),
        }
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"steps": 200, "batch_size": 4, "log_every": 1, "validate_every": 1000}
    place = tmp_path_factory.mktemp("slurm")
    return many(place, CLASSES, train=train, checkpoint={"every_steps": 10})


def is_training(run: Path) -> bool:
    lines = run / "metrics.jsonl"
    return lines.is_file() and lines.read_bytes().count(b"\n") > 12


def test_an_array_over_classes_survives_requeues_and_is_collected(
    slurm: Cluster, config: Path
) -> None:
    words = ["sweep", config, "--slurm", "--jobs", 2, *(f"--sbatch={word}" for word in SMALL)]
    shown = kdad(*words, "--dry-run")
    assert shown.codes == [0] and "#SBATCH --signal=B:USR1@120" in shown.text, shown.text
    assert "# collect.sbatch:" in shown.text
    assert not (config.parent / "many").exists()
    told = slurm.run(slurm.environment["KDAD_PYTHON"], "-m", "kdad_dist", *words, "--json")
    array, collect = json.loads(told)["jobs"]
    sweep = config.parent / "many"
    first, second, _ = CLASSES
    wait_for(lambda: is_training(sweep / first), 200)
    with standing_still(sweep / first):  # as an administrator would, or a lost node
        slurm.run("scontrol", "requeue", f"{array}_0")
    wait_for(lambda: is_training(sweep / second), 200)
    # What --signal=B:USR1@120 sends; the limit itself is looked at once a minute only.
    with standing_still(sweep / second):
        slurm.run("scancel", "--signal=USR1", "--batch", f"{array}_1")
        wait_for((sweep / second / "PREEMPT").exists)
    slurm.wait(array, collect)

    logs = {name: (sweep / f"{name}.log").read_text() for name in CLASSES}
    table = json.loads((sweep / "table.json").read_text())
    assert table["complete"], logs
    assert sorted(table["categories"]) == sorted(CLASSES)
    for name in (first, second):
        assert "going on from step" in logs[name]
    assert "found" in logs[second] and "PREEMPT" in logs[second]
    assert slurm.state(collect) == "COMPLETED"
    assert "table:" in (sweep / f"slurm-{collect}.log").read_text()
    pages = (sweep / "report.html", *(sweep / name / "report.html" for name in CLASSES))
    assert all(page.is_file() for page in pages)
    for name in (first, second):
        undisturbed = config.parent / "undisturbed" / name
        succeeds("train", sweep / f"{name}.yaml", f"output={undisturbed}")
        assert weights(undisturbed) == weights(sweep / name)
    again = kdad(*words)
    assert again.codes == [0] and "every run is done already" in again.text, again.text


def test_one_training_spans_two_nodes_and_is_scored_by_two_processes(
    slurm: Cluster, config: Path
) -> None:
    run, log = config.parent / "two", config.parent / "two.log"
    common = ["sbatch", "--parsable", *SMALL, "--open-mode=append", f"--output={log}"]
    words = [config, "data.category=tile", "train.steps=20", f"output={run}"]
    train = slurm.run(*common, "--nodes=2", REPOSITORY / "slurm/train.sbatch", *words)
    after = [f"--dependency=afterok:{train}", "--kill-on-invalid-dep=yes", "--cpus-per-task=2"]
    script = REPOSITORY / "slurm/score.sbatch"
    score = slurm.run(*common, *after, script, run, KDAD_PROCESSES="2")
    slurm.wait(train, score)
    text = log.read_text()
    assert (slurm.state(train), slurm.state(score)) == ("COMPLETED", "COMPLETED"), text
    assert text.count("2 processes, mode") == 2, text
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["provenance"]["world_size"] == 2
