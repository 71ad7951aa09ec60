import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from kdad_dist.config.load import load
from kdad_dist.config.run import RunConfig, ScoreConfig
from kdad_dist.methods.readout import Moments, Standard, blur_matrix, readout_of, reduce, smooth

MAPS = torch.rand(2, 24, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.7, 4.0])
def test_smoothing_is_scipys_gaussian_filter(sigma):
    expected = np.stack([gaussian_filter(m.double().numpy(), sigma) for m in MAPS])
    np.testing.assert_allclose(smooth(MAPS, sigma).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("sigma", "radius"), [(4.0 / 3, 4), (4.0, 4), (1.0, 30)])
def test_smoothing_of_a_stated_radius_is_scipys(sigma, radius):
    expected = [
        gaussian_filter(m.double().numpy(), sigma, mode="reflect", radius=radius) for m in MAPS
    ]
    found = smooth(MAPS, sigma, radius)
    assert found.shape == MAPS.shape
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=2e-6)


def test_a_radius_of_4_is_a_kernel_of_9_by_9_that_sums_to_1():
    point = torch.zeros(1, 31, 31)
    point[0, 15, 15] = 1
    kernel = smooth(point, 2.0, 4)[0]
    rows, columns = kernel.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 19, 11, 19)
    assert (kernel > 0).sum() == 81
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    rows_of_matrix = blur_matrix(5, 2.0, 4).sum(1)  # shorter than the kernel
    torch.testing.assert_close(rows_of_matrix, torch.ones(5))


def test_smoothing_keeps_size_and_mean_and_a_sigma_of_zero_changes_nothing():
    assert smooth(MAPS, 0) is MAPS
    assert smooth(MAPS, 30).shape == MAPS.shape  # kernel longer than the image
    torch.testing.assert_close(smooth(MAPS, 2).mean(), MAPS.mean(), rtol=1e-5, atol=0)


def test_the_score_of_an_image_is_its_maps_reduction():
    flat = MAPS.flatten(1).sort(dim=1).values
    torch.testing.assert_close(reduce(MAPS, ScoreConfig(reduce="max")), flat[:, -1])
    torch.testing.assert_close(reduce(MAPS, ScoreConfig(reduce="mean")), flat.mean(1))
    top = reduce(MAPS, ScoreConfig(reduce="topk", topk=10))
    torch.testing.assert_close(top, flat[:, -10:].mean(1))
    middle = reduce(MAPS, ScoreConfig(reduce="quantile", quantile=0.5))
    torch.testing.assert_close(middle, flat.median(1).values, atol=2e-3, rtol=0)


def test_topk_of_more_pixels_than_there_are_is_the_mean():
    torch.testing.assert_close(
        reduce(MAPS, ScoreConfig(reduce="topk", topk=10**6)), MAPS.mean((1, 2))
    )


def test_standardising_measures_deviations_above_the_normal_mean():
    standard = Standard.of([Moments.of(MAPS)])
    average, deviation = MAPS.mean(0), MAPS.std(0, correction=0)
    torch.testing.assert_close(standard.mean, average)
    expected = 3 * deviation / (deviation + 0.1 * deviation.mean())
    torch.testing.assert_close(standard((average + 3 * deviation)[None])[0], expected)
    assert standard((average - deviation)[None]).max() == 0


def test_normal_images_may_come_in_units():
    whole, parts = Moments.of(MAPS), [Moments.of(MAPS[:1]), Moments.of(MAPS[1:])]
    torch.testing.assert_close(Standard.of(parts).deviation, Standard.of([whole]).deviation)


def test_a_single_normal_image_gives_finite_maps():
    assert Standard.of([Moments.of(MAPS[:1])])(MAPS).isfinite().all()


def changed(*overrides: str) -> RunConfig:
    method = "loramae_mvtec" if any("inference" in text for text in overrides) else "stfpm_mvtec"
    return load(method, ["data.shards=unused", *overrides])


@pytest.mark.parametrize(
    "override",
    [
        "score.reduce=topk",
        "score.smooth_sigma=2",
        "score.smooth_radius=4",
        "score.standardise=true",
        "score.precision=bf16",
        "data.image_size=112",
        "method.combine=sum",
        "method.read_layers=[1]",
        "method.inference.pattern=stripes",
        "method.inference.masks=2",
        "method.inference.error=normalised",
    ],
)
def test_what_changes_scores_changes_the_description_of_the_readout(override):
    same = ["method.inference.map=pixel"] if "inference" in override else []
    assert readout_of(changed(*same, override)) != readout_of(changed(*same))


def test_the_seed_changes_scores_where_partitions_are_drawn_of_it():
    same = ["method.inference.map=pixel", "method.inference.pattern=random"]
    assert readout_of(changed(*same, "seed=1")) != readout_of(changed(*same))
    assert readout_of(changed(same[0], "seed=1")) == readout_of(changed(same[0]))


def test_what_changes_no_score_leaves_the_description_of_the_readout():
    others = ("score.batch_size=2", "score.save_maps=npy", "seed=1", "score.synthetic=true")
    assert readout_of(changed(*others)) == readout_of(changed())
