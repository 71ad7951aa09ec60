"""Tiles: they cover an image exactly, train as images of their own, and leave no seam in a map."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdad_dist.config.load import load
from kdad_dist.config.run import ScoreConfig
from kdad_dist.data.index import Index, Split
from kdad_dist.data.loader import IndexedLoader
from kdad_dist.data.pixels import open_pixels
from kdad_dist.data.plan import Plan
from kdad_dist.errors import ConfigError
from kdad_dist.methods import build_method
from kdad_dist.methods.base import Method
from kdad_dist.methods.readout import Readout, readout_of
from kdad_dist.methods.tiles import blend, cut, line_weights
from kdad_dist.tiling import Tiling
from kdad_dist.types import Batch, Losses, Prediction
from tests.shards import make_shards

TILINGS = [
    Tiling(100, 100),
    Tiling(100, 50),
    Tiling(100, 40, 10),
    Tiling(101, 40, 32),
    Tiling(64, 63, 0),
    Tiling(1, 1),
]
IMAGE = torch.rand(2, 3, 100, 100, generator=torch.Generator().manual_seed(0))


def around(image: torch.Tensor) -> torch.Tensor:
    """The mean colour of each pixel and its neighbours, mirrored at the borders."""
    return F.avg_pool2d(F.pad(image.mean(1, keepdim=True), (2, 2, 2, 2), "reflect"), 5, 1)[:, 0]


class Toy(Method):
    """Says of a pixel what its neighbourhood looks like; remembers how it was asked."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.says = says
        self.asked: list[int] = []

    def forward(self, batch: Batch) -> Losses:
        return {"loss": batch.image.mean((1, 2, 3))}

    def predict(self, image: torch.Tensor) -> Prediction:
        self.asked.append(len(image))
        if self.says == "score":
            return Prediction(pred_score=image.amax((1, 2, 3)))
        maps = around(image) if self.says == "neighbourhood" else image[:, 0]
        return Prediction(maps, reconstruction=1 - image)


@pytest.mark.parametrize("tiling", TILINGS)
def test_tiles_cover_an_image_exactly_and_share_enough(tiling):
    starts, seen = tiling.starts, np.zeros(tiling.image_size, int)
    for start in starts:
        seen[start : start + tiling.tile] += 1
    assert (starts[0], starts[-1]) == (0, tiling.image_size - tiling.tile)
    assert seen.min() >= 1
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (tiling.tile - gaps >= tiling.overlap).all()
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert len(tiling.corners) == tiling.count == len(starts) ** 2


@pytest.mark.parametrize("tiling", TILINGS[:5])
def test_what_was_cut_and_is_blended_is_the_image_again(tiling):
    image = IMAGE[:, :, : tiling.image_size, : tiling.image_size]
    image = F.interpolate(image, tiling.image_size)
    tiles = cut(image, tiling)
    assert tiles.shape == (2 * tiling.count, 3, tiling.tile, tiling.tile)
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(blend(tiles, tiling), image)
    ones = blend(torch.ones_like(tiles), tiling)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-6, atol=0)


def test_a_tile_comes_in_gently_and_weighs_least_at_its_borders():
    weights = line_weights(Tiling(100, 40, 10))
    assert weights[1, 0] < 0.02 and weights[1, -1] < 0.02
    assert weights[0, 0] == 1, "nothing but the first tile is at the image's border"
    assert weights.diff(dim=1).abs().max() < 0.2, "nothing jumps"
    assert (weights > 0).all()


@pytest.mark.parametrize("says", ["pixel", "neighbourhood"])
def test_the_map_of_a_tiled_image_is_that_of_the_whole_and_has_no_seam(says):
    config = ScoreConfig(smooth_sigma=0, batch_size=4)
    whole = Readout(Toy(says), config, Tiling(100, 100))(IMAGE)
    tiled = Readout(Toy(says), config, Tiling(100, 40, 12))(IMAGE)
    assert whole.anomaly_map is not None and tiled.anomaly_map is not None
    assert tiled.reconstruction is not None
    torch.testing.assert_close(tiled.reconstruction, 1 - IMAGE)
    difference = (tiled.anomaly_map - whole.anomaly_map).abs()
    if says == "pixel":
        assert difference.max() < 1e-6
        torch.testing.assert_close(tiled.pred_score, whole.pred_score)
        return
    # Within two pixels of its border a tile does not see what is beyond, but hardly counts.
    apart = Readout(Toy(says), config, Tiling(100, 50))(IMAGE)
    assert apart.anomaly_map is not None
    assert difference.max() < 0.1 * (apart.anomaly_map - whole.anomaly_map).abs().max()
    near = torch.zeros(100, dtype=torch.bool)
    for start in Tiling(100, 40, 12).starts:
        near[max(start - 3, 0) : start + 3] = near[start + 37 : start + 43] = True
    inside = difference[:, ~near][:, :, ~near]
    assert inside.numel() > 1000 and inside.max() < 1e-6


def test_the_score_of_a_method_without_maps_is_that_of_its_worst_tile():
    toy, image = Toy("score"), IMAGE.clone()
    image[1, 0, 99, 3] = 7
    found = Readout(toy, ScoreConfig(batch_size=5), Tiling(100, 40, 12))(image)
    assert found.anomaly_map is None and found.reconstruction is None
    torch.testing.assert_close(found.pred_score, image.amax((1, 2, 3)))
    assert toy.asked == [5] * 6 + [2], "32 tiles, as many at a time as score.batch_size says"


def test_an_image_that_is_one_tile_is_read_as_it_always_was():
    toy = Toy("pixel")
    found = Readout(toy, ScoreConfig(smooth_sigma=0, batch_size=1), Tiling(100, 100))(IMAGE)
    assert toy.asked == [2] and torch.equal(found.anomaly_map, IMAGE[:, 0])


TEACHER = ["method.teacher.weights=random"]
METHODS = {
    "loramae_small": [
        "method.weights=random",
        "method.freeze_random=true",
        "method.preset=mae_vit_tiny_patch8",
    ],
    "mkd_mvtec": [
        *TEACHER,
        "method.teacher.backbone=vgg11",
        "method.teacher.layers=[1, 2]",
        "method.stretch_maps=false",
        "method.balance=false",
    ],
    "vitkd_cifar10": [
        *TEACHER,
        "method.teacher.backbone=test_vit",
        "method.teacher.layers=[1, 2]",
        "data.augment.crop_margin=0",  # tiles are windows already
    ],
}


@pytest.mark.parametrize("recipe", METHODS)
def test_every_method_judges_images_larger_than_its_network_sees(recipe):
    words = ["data.shards=unused", "data.image_size=80", "data.tile=32", "data.tile_overlap=8"]
    config = load(recipe, [*words, "score.smooth_sigma=1", *METHODS[recipe]])
    readout = Readout(build_method(config), config.score, config.data.tiling)
    found = readout(F.interpolate(IMAGE, 80))
    assert found.pred_score is not None and found.pred_score.isfinite().all()
    assert found.pred_score.shape == (2,) and found.anomaly_map is not None
    for part in (found.anomaly_map, found.reconstruction):
        assert part is None or (part.isfinite().all() and part.shape[-2:] == (80, 80))
    assert (found.reconstruction is None) == (recipe != "loramae_small")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("KDAD_CACHE", str(tmp_path / "cache"))
    return make_shards(tmp_path / "shards")


def test_every_tile_is_learnt_once_per_epoch_and_which_ones_a_step_holds_is_fixed(index):
    tiling, cpu = Tiling(16, 7, 2), torch.device("cpu")
    samples = index.select(Split.TRAIN, val_fraction=0)
    whole = open_pixels(samples, index, 16, "ram", cpu).floats(np.arange(10), cpu)
    expected = cut(whole, tiling)
    pixels = open_pixels(samples, index, 16, "ram", cpu, tiling=tiling)
    assert len(pixels) == len(expected) == 90
    window = open_pixels(samples, index, 12, "ram", cpu, tiling=Tiling(12, 7, 2), margin=4)
    inside = cut(whole[..., 2:14, 2:14], Tiling(12, 7, 2))
    assert torch.equal(window.floats(np.arange(len(window)), cpu), inside)

    def steps(world: int) -> list[list[int]]:
        """The rows of each step of two epochs, all processes together."""
        rows: list[list[int]] = [[] for _ in range(12)]
        for rank in range(world):
            plan = Plan(90, batch_size=16, seed=3, rank=rank, world=world)
            for step, [micro] in enumerate(IndexedLoader(pixels, plan, cpu).steps(0, 12)):
                assert micro.batch.image.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(micro.batch.image, expected[micro.batch.row])
                rows[step] += micro.batch.row.tolist()
        return [sorted(step) for step in rows]

    alone = steps(1)
    assert alone == steps(3) and alone[:6] != alone[6:]
    for epoch in (alone[:6], alone[6:]):
        assert sorted(row for step in epoch for row in step) == list(range(90))


def tiled(*overrides: str):
    words = ["data.shards=unused", "data.image_size=1024", "data.tile=256"]
    return load("stfpm_mvtec", [*words, *overrides])


def test_networks_see_tiles_and_a_unit_of_work_holds_as_many_as_it_may():
    config = tiled()
    assert (config.data.network_size, config.data.tiling.count) == (256, 25)
    assert config.images_per_unit == 1
    assert tiled("score.batch_size=60").images_per_unit == 2
    whole = load("stfpm_mvtec", ["data.shards=unused"])
    assert (whole.data.network_size, whole.data.tiling) == (256, Tiling(256, 256))
    assert whole.images_per_unit == whole.score.batch_size


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.image_size=255", "tile 256 is larger than image_size 255"),
        ("data.tile_overlap=256", "leaves nothing of a tile of 256"),
        ("data.access=stream", "access=stream"),
        ("data.cache=none", "cache=none"),
        ("data.cache=device", "cache=device"),
        ("data.augment.crop_margin=8", "crop_margin"),
    ],
)
def test_what_tiles_do_not_go_with_is_refused_with_the_reason(override, said):
    with pytest.raises(ConfigError, match=said):
        tiled(override)


def test_maps_that_are_stretched_one_by_one_are_refused():
    words = ["data.shards=unused", "data.image_size=512", "data.tile=128"]
    load("mkd_mvtec", [*words, "method.stretch_maps=false"])
    with pytest.raises(ConfigError, match="would not fit together"):
        load("mkd_mvtec", [*words, "method.stretch_maps=true"])


def test_classes_of_tiles_are_refused(tmp_path):
    path = tmp_path / "classes.yaml"
    data = "data: {shards: unused, classes: [cat, dog], tile: 128}"
    path.write_text(
        f"name: x\n{data}\nmethod: {{name: classkd}}\noptim: {{lr: 1}}\ntrain: {{epochs: 1}}\n"
    )
    with pytest.raises(ConfigError, match=r"data\.tile: classkd tells classes of whole images"):
        load(path)


def test_a_threshold_belongs_to_a_way_of_cutting():
    assert readout_of(tiled()) != readout_of(tiled("data.tile_overlap=32"))
    assert readout_of(tiled()) != readout_of(tiled("data.tile=null"))
    assert "tile" not in readout_of(tiled("data.tile=null")).replace("quantile", "")
    assert "centre_margin 8" in readout_of(tiled("data.centre_margin=8"))
    assert "margin" not in readout_of(tiled()), "thresholds from before there were windows hold"
