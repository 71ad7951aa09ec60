"""Curves and areas on examples that can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from kdad_dist.metrics.curves import Counts, Curve, aupro, auroc, average_precision, pro, roc

# The scores 1, 2, 3, 4, 5, 6, 8, 9. Ten normal pixels; region A holds the pixels at 9 and 3,
# region B the one at 6. Unit of the overlap: half a region.
EXAMPLE = Counts(
    normal=np.array([4, 3, 0, 1, 1, 0, 1, 0]),
    defective=np.array([0, 0, 1, 0, 0, 1, 0, 1]),
    overlap=np.array([0, 0, 1, 0, 0, 2, 0, 1]),
)


def test_the_pro_curve_of_the_example_is_the_one_drawn_by_hand():
    curve = pro(EXAMPLE)
    assert curve.x.tolist() == [0, 0, 0.1, 0.1, 0.2, 0.3, 0.3, 0.6, 1]
    assert curve.y.tolist() == [0, 0.25, 0.25, 0.75, 0.75, 0.75, 1, 1, 1]


def test_the_areas_of_the_example_are_those_worked_out_by_hand():
    # 0.1 * 0.25 + 0.2 * 0.75 = 0.175, of 0.3
    assert aupro(EXAMPLE) == pytest.approx(0.175 / 0.3)
    # The limit falls between two points: 0.1 * 0.25 + 0.15 * 0.75, of 0.25
    assert aupro(EXAMPLE, limit=0.25) == pytest.approx(0.1375 / 0.25)
    # Pairs won by the defective pixel at 9, 6, 3: 10, 9, 7 of 10
    assert auroc(EXAMPLE) == pytest.approx(26 / 30)
    # Precision where each is found: 1/1, 2/3, 3/6
    assert average_precision(EXAMPLE) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


def test_the_last_point_below_the_limit_is_joined_to_the_first_above_by_a_line():
    # One score holds everything: the curve is the diagonal.
    constant = Counts(np.array([7]), np.array([3]), np.array([3]))
    curve = pro(constant).up_to(0.3)
    assert curve.x.tolist() == [0, 0.3]
    assert curve.y.tolist() == [0, pytest.approx(0.3)]


def test_a_tie_between_normal_and_defective_counts_half():
    assert auroc(Counts(np.array([1, 1]), np.array([0, 1]), np.array([0, 1]))) == 0.75


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12).filter(
        lambda pairs: any(n for n, _ in pairs) and any(d for _, d in pairs)
    )
)
def test_areas_equal_those_of_scikit_learn(pairs: list[tuple[int, int]]):
    normal, defective = np.array(pairs).T
    score = np.arange(len(pairs))
    labels = np.repeat([0, 1], [normal.sum(), defective.sum()])
    scores = np.concatenate([np.repeat(score, normal), np.repeat(score, defective)])
    counts = Counts(normal, defective, defective)
    assert auroc(counts) == pytest.approx(roc_auc_score(labels, scores))
    assert average_precision(counts) == pytest.approx(average_precision_score(labels, scores))


def test_a_thinned_curve_keeps_its_ends_and_its_area():
    rng = np.random.default_rng(0)
    score = np.arange(5000)
    normal, defective = rng.poisson(np.exp(-score / 900)), rng.poisson(0.3, 5000)
    curve = roc(Counts(normal, defective, defective))
    thin = curve.thinned(200)
    assert len(thin.x) <= 200
    assert (thin.x[0], thin.y[0], thin.x[-1], thin.y[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(thin.x) >= 0)
    assert thin.area() == pytest.approx(curve.area(), abs=1e-3)


def test_a_short_curve_is_not_thinned():
    curve = Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert curve.thinned(200) is curve
