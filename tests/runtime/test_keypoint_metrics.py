"""PCK, AUC, EPE and NME: the numbers that MMPose's own tests expect, and what holds of any points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modelcrate_runtime.keypoint_metrics import EYES, auc, epe, nme, pck, shares_within, spans
from modelcrate_runtime.skeletons import DATA_SETS, published_keypoints

# ------------------------------------------------------- tests/test_evaluation/test_functional/test_keypoint_eval.py of MMPose 1.3.2


def points(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array([pairs], dtype=np.float64)


FOUND = points((10, 4), (10, 18), (0, 0), (40, 40), (20, 10))
TRUTH = points((10, 0), (10, 10), (-1, -1), (30, 30), (0, 10))
VISIBLE = np.array([[True, True, False, True, True]])


def two() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found, truth = np.zeros((2, 5, 2)), np.zeros((2, 5, 2))
    found[0] = [(10, 0), (20, 20), (0, 0), (30, 30), (0, 10)]
    truth[0] = [(10, 0), (10, 10), (-1, 0), (30, 30), (0, 10)]
    return found, truth, np.concatenate([VISIBLE, VISIBLE])


@pytest.mark.parametrize(
    ("sizes", "shares", "mean"),
    [
        ((10, 10), (1, 0.5, math.nan, 1, 1), 0.875),
        ((0, 10), (1, 1, math.nan, 1, 1), 1.0),
        ((0, 0), (math.nan,) * 5, math.nan),  # MMPose says -1 of each and 0 of all
    ],
)
def test_pck_is_mmposes(sizes: tuple[float, float], shares: tuple[float, ...], mean: float) -> None:
    found, truth, visible = two()
    of_size = np.array(sizes, dtype=np.float64)
    np.testing.assert_array_equal(shares_within(found, truth, visible, of_size, threshold=0.5), shares)
    assert pck(found, truth, visible, of_size, threshold=0.5) == pytest.approx(mean, nan_ok=True)


def test_auc_epe_and_nme_are_mmposes() -> None:
    assert auc(FOUND, TRUTH, VISIBLE, norm_px=20, steps=4) == pytest.approx(0.375)
    assert epe(FOUND, TRUTH, VISIBLE) == pytest.approx(11.5355339)
    assert nme(FOUND, TRUTH, VISIBLE, np.ones(1)) == pytest.approx(11.5355339)


def test_a_distance_has_to_be_less_than_the_threshold() -> None:
    """So the first threshold of AUC, which is 0, gives nothing to a perfect result: MMPose's best AUC is 0.95."""
    assert pck(points((3, 4)), points((0, 0)), np.ones((1, 1), dtype=bool), np.array([25.0])) == 0
    assert pck(points((3, 4)), points((0, 0)), np.ones((1, 1), dtype=bool), np.array([25.1])) == 1
    assert auc(TRUTH, TRUTH, VISIBLE) == pytest.approx(0.95)


def test_pck_is_of_keypoints_and_nme_of_points() -> None:
    """A keypoint that is seldom visible counts as much as another in PCK, and less in NME."""
    visible = np.array([[True, True], [True, False], [True, False]])
    truth = np.zeros((3, 2, 2))
    found = truth + np.array([[[0, 0], [50, 0]]] * 3)
    assert pck(found, truth, visible, np.full(3, 100.0)) == 0.5
    assert nme(found, truth, visible, np.full(3, 100.0)) == pytest.approx(0.125)


def test_where_nothing_is_visible_nothing_is_measured() -> None:
    nothing = np.zeros((1, 5), dtype=bool)
    for figure in (pck(FOUND, TRUTH, nothing, np.ones(1)), auc(FOUND, TRUTH, nothing), epe(FOUND, TRUTH, nothing), nme(FOUND, TRUTH, nothing, np.ones(1))):
        assert math.isnan(figure)


def test_faces_are_measured_by_their_eyes() -> None:
    """The pairs of MMPose's `NME.DEFAULT_KEYPOINT_INDICES`; of our own sets only LaPa is among them."""
    assert EYES == {22: (0, 1), 29: (8, 9), 68: (36, 45), 98: (60, 72), 106: (66, 79)}
    assert [name for name in DATA_SETS if len(published_keypoints(name).names) in EYES] == ["lapa"]
    truth = np.zeros((2, 106, 2))
    truth[0, 66], truth[0, 79], truth[1, 79] = (10, 10), (13, 14), (0, 2)
    np.testing.assert_array_equal(spans(truth, EYES[106]), [5, 2])
    found = truth + [1.0, 0.0]
    assert nme(found, truth, np.ones((2, 106), dtype=bool), spans(truth, EYES[106])) == pytest.approx((1 / 5 + 1 / 2) / 2)


# ------------------------------------------------------------------------------------------------------------------ properties


@dataclass
class Case:
    found: np.ndarray
    truth: np.ndarray
    visible: np.ndarray
    sizes: np.ndarray

    @property
    def every(self) -> tuple[Any, ...]:
        return self.found, self.truth, self.visible, self.sizes

    @property
    def unsized(self) -> tuple[Any, ...]:
        return self.found, self.truth, self.visible

    def figures(self) -> list[float]:
        return [pck(*self.every), auc(*self.unsized), epe(*self.unsized), nme(*self.every)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, keypoints = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    coordinates = st.integers(-4000, 4000).map(lambda value: value / 8)
    of_points = arrays(np.float64, (count, keypoints, 2), elements=coordinates)
    visible = draw(arrays(np.bool_, (count, keypoints)))
    assume(visible.any())
    sizes = draw(arrays(np.float64, count, elements=st.integers(1, 2000).map(float)))
    return Case(draw(of_points), draw(of_points), visible, sizes)


@given(cases())
def test_the_truth_is_perfect(case: Case) -> None:
    perfect = Case(case.truth, case.truth, case.visible, case.sizes)
    assert perfect.figures() == pytest.approx([1.0, 0.95, 0.0, 0.0])


@given(cases(), st.randoms(use_true_random=False))
def test_what_is_not_visible_and_the_order_do_not_matter(case: Case, random: Any) -> None:
    order = list(range(len(case.found)))
    random.shuffle(order)
    moved = np.where(case.visible[..., None], case.found, case.found + 1234)
    again = Case(moved[order], case.truth[order], case.visible[order], case.sizes[order])
    assert again.figures() == pytest.approx(case.figures())


@given(cases(), st.integers(-50, 50), st.sampled_from([0.25, 2.0, 8.0]))
def test_a_picture_that_is_moved_or_scaled_is_the_same_picture(case: Case, shift: int, scale: float) -> None:
    """Powers of two, so that distances on a threshold stay on it."""
    again = Case(case.found * scale + shift, case.truth * scale + shift, case.visible, case.sizes * scale)
    assert pck(*again.every) == pck(*case.every)
    assert nme(*again.every) == pytest.approx(nme(*case.every))
    assert epe(*again.unsized) == pytest.approx(scale * epe(*case.unsized))
    assert auc(*again.unsized, norm_px=30 * scale) == auc(*case.unsized)


@given(cases(), st.floats(0.01, 2), st.floats(0.01, 2))
def test_more_lies_within_more(case: Case, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert 0 <= pck(*case.every, threshold=less) <= pck(*case.every, threshold=more) <= 1
