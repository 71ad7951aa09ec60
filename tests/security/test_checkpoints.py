"""Checkpoints whose manifest vouches for what it should not."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from kdad_dist.errors import CheckpointError
from kdad_dist.runtime import manifest as manifests
from kdad_dist.runtime.tensors import Tensors
from tests.security.fuzz import altered, fuzzed, survives
from tests.unit.test_checkpoint import make, manager, resealed, save


def vouch(path: Path, body: Any) -> None:
    text = manifests.render(body) if isinstance(body, dict) else json.dumps(body)
    (path / manifests.MANIFEST).write_text(text)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", manifests.MANIFEST])
@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
def test_a_file_that_is_none_of_the_checkpoint_is_neither_followed_nor_waited_for(
    tmp_path: Path, name: str, kind: str
):
    path = save(tmp_path / "run", 1)
    elsewhere = (path / name).rename(tmp_path / "elsewhere")  # the very bytes that are vouched for
    match kind:
        case "link":
            (path / name).symlink_to(elsewhere)
        case "device":
            (path / name).symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is damaged: it is a link"):
        manager(tmp_path / "run").load(path, Tensors(*make()))
    assert manager(tmp_path / "run").latest() is None


def test_a_folder_of_a_checkpoint_may_not_be_a_link(tmp_path: Path):
    path = save(tmp_path / "run", 1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_states.pt").write_bytes(b"x")
    (path / "zero").symlink_to(other)
    body = json.loads((path / manifests.MANIFEST).read_text())
    entry = manifests.file_entry(other / "model_states.pt")
    vouch(path, body | {"files": {**body["files"], "zero/model_states.pt": entry}})
    with pytest.raises(CheckpointError, match="it is a link"):
        manifests.verify(path)


def test_a_run_that_lies_behind_a_link_is_read(tmp_path: Path):
    path = save(tmp_path / "run", 1)
    (tmp_path / "named").symlink_to(tmp_path / "run")
    manifests.verify(tmp_path / "named" / path.name)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../../x",
        "a//b",
        "~/x",
        "zero/../x",
        "a\0b",
        "C:\\x",
        "$(id)",
    ],
)
def test_a_name_that_may_lead_elsewhere_is_refused(tmp_path: Path, name: str):
    path = save(tmp_path, 1)
    resealed(path, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="outside of its directory"):
        manifests.verify(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{}", "null", '{"sha256": 1}', "\xff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str):
    path = save(tmp_path, 1)
    (path / manifests.MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manifests.verify(path)


@fuzzed
def test_no_manifest_brings_anything_but_an_error_that_a_user_understands(
    tmp_path: Path, examples: int
):
    path = save(tmp_path, 1)
    body = json.loads((path / manifests.MANIFEST).read_text())
    student, optimizer = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def check(body: Any) -> None:
        vouch(path, body)
        checkpoints = manager(tmp_path)
        checkpoints.best()
        checkpoints.latest()
        manifests.verify(path)
        checkpoints.check(path, Tensors(student, optimizer))

    survives(examples, check, altered(body))
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())


@fuzzed
def test_no_index_of_tensors_brings_anything_else(tmp_path: Path, examples: int):
    path = save(tmp_path, 1)
    sound = (path / ".metadata").read_bytes()

    def check(change: tuple[int, bytes]) -> None:
        at, content = change
        (path / ".metadata").write_bytes(sound[:at] + content + sound[at + len(content) :])
        resealed(path)
        manager(tmp_path).load(path, Tensors(*make()))

    survives(examples, check, st.tuples(st.integers(0, len(sound)), st.binary(max_size=8)))
