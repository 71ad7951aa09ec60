"""How far two maps agree, in numbers."""

import numpy as np
import pytest

from kdad_dist.metrics.agreement import Agreement, agreement, hottest, mean_agreement

RISING = np.arange(100, dtype=np.float32).reshape(10, 10)


def test_a_map_agrees_with_itself_stretched_and_not_with_its_opposite():
    same = agreement(RISING, 3 * RISING + 1)
    assert same is not None and same == pytest.approx((1, 1))
    opposite = agreement(RISING, -RISING)
    assert opposite is not None and opposite == pytest.approx((-1, 0))


def test_correlation_and_overlap_are_those_of_the_textbook():
    random = np.random.default_rng(0)
    one, other = random.random((2, 20, 30), dtype=np.float32)
    found = agreement(one, other)
    assert found is not None
    assert found.correlation == pytest.approx(np.corrcoef(one.ravel(), other.ravel())[0, 1])
    first, second = (set(np.argsort(values.ravel())[-120:].tolist()) for values in (one, other))
    assert found.overlap == len(first & second) / len(first | second)


def test_a_map_that_points_to_less_than_a_fifth_is_not_filled_up_by_chance():
    pointed = np.zeros((10, 10), dtype=np.float32)
    pointed[2, 3:5] = 1
    assert hottest(pointed).sum() == 2
    found = agreement(pointed, RISING)
    assert found is not None and found.overlap == 0  # of 2 and 20 pixels
    pointed[5:] = np.finfo(np.float32).eps  # rounding is no second place to look at
    pointed[2, 3] = 1 - np.finfo(np.float32).eps
    assert hottest(pointed).sum() == 2


def test_a_constant_map_agrees_with_nothing_and_is_counted():
    constant = np.zeros((4, 4), dtype=np.float32)
    assert agreement(constant, RISING[:4, :4]) is agreement(constant, constant) is None
    enlarged = constant + 1
    enlarged[::3] = np.nextafter(np.float32(1), np.float32(0))  # what enlarging one pixel may do
    assert agreement(enlarged, RISING[:4, :4]) is None
    assert mean_agreement([None, Agreement(0.5, 0.25), Agreement(1, 0.75)]) == {
        "correlation": 0.75,
        "overlap": 0.5,
        "images": 2,
        "without": 1,
    }
    assert mean_agreement([None]) == {
        "correlation": None,
        "overlap": None,
        "images": 0,
        "without": 1,
    }
