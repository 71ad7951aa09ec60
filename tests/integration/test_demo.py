"""First contact: `kdad demo`, whole and in processes of its own."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kdad_dist.demo.images import CATEGORY, DEFECTS

PATIENCE = 900
"""Seconds. Two minutes are promised on two idle cores; a machine that runs tests is not idle."""


def demo(out: Path, seed: int, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    words = ["-m", "kdad_dist", "demo", "--out", str(out), "--seed", str(seed)]
    return subprocess.run(
        [python, *words], capture_output=True, text=True, timeout=PATIENCE, cwd=out.parent
    )


@pytest.mark.launch
def test_the_demo_finds_the_defects_that_the_z_score_misses_and_may_be_repeated(
    tmp_path: Path, warm_python: str
) -> None:
    out = tmp_path / "a démo"
    done = demo(out, seed=3000)
    assert done.returncode == 0, done.stderr
    mean = json.loads((out / "run" / "metrics.json").read_text())["mean"]
    assert mean["image_auroc"] >= 0.95 and mean["pixel_auroc"] >= 0.95

    row = next(line for line in done.stderr.splitlines() if line.startswith(f"{CATEGORY} "))
    _, image, image_z, pixel, pixel_z, _ = row.split()
    assert float(image) >= 0.95 and float(pixel) >= 0.95
    assert float(image_z) < 0.75 and float(pixel_z) < 0.75
    assert all(kind in done.stderr for kind in DEFECTS)

    page = out / "run" / "report.html"
    assert str(page.resolve()) in done.stderr and page.stat().st_size > 10_000
    for command in ("kdad pack my_photos", "kdad train stfpm_mvtec", "kdad score", "kdad report"):
        assert command in done.stderr
    assert "2 processes" in done.stderr
    lines = [line.strip().removeprefix("next: ") for line in done.stderr.splitlines()]
    pasted = [shlex.split(line) for line in lines if line.startswith("kdad ") and "a démo" in line]
    assert [words[1] for words in pasted] == ["pack", "train", "score", "score", "report"]
    assert all(words[2] == str(out / "run") for words in pasted[2:])
    assert f"data.shards={out / 'shards'}" in pasted[1]

    scores = (out / "run" / "scores" / "scores.csv").read_bytes()
    again = demo(out, 3000, warm_python)
    assert again.returncode == 0, again.stderr
    assert (out / "run" / "scores" / "scores.csv").read_bytes() == scores

    other = demo(out, 3001, warm_python)
    assert other.returncode == 2 and "holds the demo of seed 3000" in other.stderr
    assert "Traceback" not in other.stderr
