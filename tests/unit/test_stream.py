"""Whole shards from folders and web servers: each image once, nothing run, nothing trusted."""

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from kdad_dist.data import source
from kdad_dist.data.index import Index, Split
from kdad_dist.data.pixels import open_pixels
from kdad_dist.data.plan import StreamPlan, by_shard
from kdad_dist.data.stream import StreamLoader
from kdad_dist.data.writer import pack
from kdad_dist.errors import ConfigError, DataError
from tests.helpers import save_image, texture
from tests.launcher import ends
from tests.needs import REPOSITORY
from tests.shards import make_shards, serve

CPU = torch.device("cpu")


def open_stream(index: Index, size: int = 16, val_fraction: float = 0, **plan) -> StreamLoader:
    samples = index.select(Split.TRAIN, val_fraction=val_fraction)
    shards = tuple(by_shard([sample.shard for sample in samples]).values())
    plan = StreamPlan(shards, **{"batch_size": 4} | plan)
    return StreamLoader(samples, index, plan, size, CPU)


def rows(steps: list) -> list[int]:
    return [int(row) for step in steps for micro in step for row in micro.batch.row]


def read_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kdad-read")]


def test_shards_are_read_by_the_webdataset_library(tmp_path: Path):
    make_shards(tmp_path)
    shards = sorted(map(str, tmp_path.glob("train-*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [entry["__key__"] for entry in found] == [f"tile/train/{i:03}" for i in range(10)]
    assert (found[7]["png"] == texture(7, 16, 16)).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("remote", [False, True])
def test_each_image_comes_once_in_equal_steps(tmp_path: Path, world: int, remote: bool):
    make_shards(tmp_path, train=22)
    with serve(tmp_path) as (address, requests):
        index = Index.read(address if remote else str(tmp_path))
        ranks = [open_stream(index, rank=rank, world=world) for rank in range(world)]
        epoch = [list(rank.steps(0, rank.steps_per_epoch)) for rank in ranks]
    assert [len(steps) for steps in epoch] == [6] * world
    assert sorted(row for steps in epoch for row in rows(steps)) == list(range(22))
    for steps in zip(*epoch, strict=True):
        images = sum(len(micro.batch.row) for step in steps for micro in step)
        assert {micro.step_images for step in steps for micro in step} == {images}
    asked = Counter(path for path in requests if path.endswith(".tar"))
    assert asked == ({f"/train-{i:05}.tar": 1 for i in range(6)} if remote else {})


def test_every_row_carries_its_own_pixels(tmp_path: Path):
    loader = open_stream(make_shards(tmp_path), micro_batch_size=3)
    for step in loader.steps(0, 6):
        for micro in step:
            assert micro.batch.image.is_contiguous(memory_format=torch.channels_last)
            for image, row in zip(micro.batch.image, micro.batch.row, strict=True):
                wanted = torch.from_numpy(texture(int(row), 16, 16)).permute(2, 0, 1) / 255
                assert torch.equal(image, wanted)


def test_held_out_images_are_left_out(tmp_path: Path):
    index = make_shards(tmp_path, train=30)
    samples = index.select(Split.TRAIN, val_fraction=0.4)
    loader = open_stream(index, val_fraction=0.4)
    assert len(samples) < 30
    assert sorted(rows(list(loader.steps(0, loader.steps_per_epoch)))) == list(range(len(samples)))


def test_a_process_without_a_shard_takes_part_with_empty_batches(tmp_path: Path):
    index = make_shards(tmp_path, train=4)
    idle = open_stream(index, rank=1, world=2)
    (step,) = idle.steps(0, 1)
    assert step[0].batch.image.shape == (0, 3, 16, 16) and step[0].step_images == 4


def test_resuming_in_mid_epoch_opens_only_the_shards_still_needed(tmp_path: Path):
    make_shards(tmp_path, train=24)
    with serve(tmp_path) as (address, requests):
        loader = open_stream(Index.read(address))
        whole = rows(list(loader.steps(0, 6)))
        order = [path for path in requests if path.endswith(".tar")]
        requests.clear()
        assert rows(list(loader.steps(3, 6))) == whole[12:]
        assert requests == order[3:]


def test_the_only_shard_is_not_read_again_for_the_next_epoch(tmp_path: Path):
    make_shards(tmp_path, train=4)
    with serve(tmp_path) as (address, requests):
        list(open_stream(Index.read(address)).steps(0, 5))
        assert requests.count("/train-00000.tar") == 1


def test_a_flipped_bit_is_detected_before_its_bytes_are_used(tmp_path: Path):
    index = make_shards(tmp_path)
    sample = index.samples[6]
    shard = tmp_path / sample.shard
    damaged = bytearray(shard.read_bytes())
    damaged[sample.image.offset + 50] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{sample.key} in .*{sample.shard}.*do not match"):
        list(open_stream(index).steps(0, 3))
    assert not read_threads()


@pytest.mark.parametrize("damage", ["truncated", "short", "missing", "text", "swapped"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path, damage: str, remote: bool):
    index = make_shards(tmp_path)
    shard = tmp_path / index.samples[5].shard
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[: index.samples[5].image.offset + 9])
        case "short":
            shard.write_bytes(shard.read_bytes()[: index.samples[5].image.offset - 512])
        case "missing":
            shard.unlink()
        case "text":
            shard.write_text("not a tar\n" * 200)
        case "swapped":
            shard.write_bytes((tmp_path / index.samples[0].shard).read_bytes())
    with serve(tmp_path) as (address, _), pytest.raises(DataError, match=shard.name):
        root = Index.read(address) if remote else index
        list(open_stream(root).steps(0, 3))
    assert not read_threads()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are asked again without a pause."""
    monkeypatch.setattr(source, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("faults", [["dropped", "busy"], ["cut", "cut"], ["busy"] * 3, ["cut"] * 3])
def test_a_server_that_fails_for_a_moment_is_asked_again(tmp_path: Path, at_once, caplog, faults):
    make_shards(tmp_path, train=4)
    with serve(tmp_path, faults=faults) as (address, requests):
        steps = open_stream(Index.read(address)).steps(0, 1)
        if len(faults) < 3:
            assert sorted(rows(list(steps))) == list(range(4))
        else:
            with pytest.raises(DataError, match=r"train-00000\.tar cannot be read"):
                list(steps)
    assert requests.count("/train-00000.tar") == 3
    assert caplog.text.count("train-00000.tar: ") == caplog.text.count("asked again in") == 2
    assert not read_threads()


def test_a_shard_that_the_server_does_not_know_is_asked_for_once(tmp_path: Path):
    make_shards(tmp_path, train=4)
    (tmp_path / "train-00000.tar").unlink()
    with serve(tmp_path) as (address, requests), pytest.raises(DataError, match="404"):
        list(open_stream(Index.read(address)).steps(0, 1))
    assert requests.count("/train-00000.tar") == 1


def test_a_server_that_dies_is_a_clear_error_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
):
    monkeypatch.setattr(source, "TIMEOUT", 9999)
    make_shards(tmp_path / "shards", train=200)
    code = "from tests.shards import *; s = serve(Path(sys.argv[1])); print(s.__enter__()[0])"
    server = subprocess.Popen(
        [sys.executable, "-uc", "import sys; " + code, str(tmp_path / "shards")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout
    steps = open_stream(Index.read(server.stdout.readline().strip())).steps(0, 50)
    next(steps)
    server.kill()
    server.wait()
    with pytest.raises(DataError, match=r"train-\d+.tar cannot be read"):
        ends(lambda: list(steps))
    assert not read_threads()


def test_a_consumer_that_stops_early_leaves_no_thread(tmp_path: Path):
    steps = open_stream(make_shards(tmp_path, train=100)).steps(0, 1_000_000)
    next(steps)
    steps.close()
    assert not read_threads()


def test_addresses_that_would_run_something_are_refused(tmp_path: Path):
    index = make_shards(tmp_path / "shards")
    command = f"pipe:touch {tmp_path}/touched; cat {tmp_path}/shards/train-00000.tar"
    evil = replace(index, root=command)
    with pytest.raises(ConfigError, match="only folders and http"):
        open_stream(evil)
    evil = replace(index, samples=tuple(replace(s, shard=command) for s in index.samples))
    with pytest.raises(DataError, match="not a plain file"):
        list(open_stream(evil).steps(0, 1))
    assert not (tmp_path / "touched").exists()


def test_a_size_beyond_the_packed_one_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--size 32"):
        open_stream(make_shards(tmp_path), size=32)


def test_streaming_and_indexed_reading_agree_on_what_pack_wrote(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("KDAD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images" / "tile"
    names = ["a.b.png", "good.v2.000.png", "ü 平.png", "x" * 150 + ".png", "__meta__.png"]
    for i, name in enumerate([*names, *(f"{i:03}.png" for i in range(40))]):
        save_image(folder / "train" / "good" / name, texture(i))
    save_image(folder / "test" / "good" / "000.png", texture(99))
    pack(tmp_path / "images", tmp_path / "shards", size=16)
    index = Index.read(str(tmp_path / "shards"))
    assert len([shard for shard in index.shards if shard.split is Split.TRAIN]) > 1
    streamed = open_stream(index, batch_size=7)
    samples = index.select(Split.TRAIN, val_fraction=0)
    pixels = open_pixels(samples, index, 16, "ram", CPU)
    steps = list(streamed.steps(0, streamed.steps_per_epoch))
    assert sorted(rows(steps)) == list(range(45))
    for step in steps:
        batch = step[0].batch
        assert torch.equal(batch.image, pixels.floats(batch.row.numpy(), CPU))
