"""The tracker's mathematics against plain ones: loops over pairs, and textbook matrices in double."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelcrate_runtime.tracking import Mode, MotionFilter, Smoother, assign, box_as_state, iou, keypoint_box, oks, state_as_box, suppress

GATE = 5.9915
SIZE_WH = (320, 240)
MODES: list[Mode] = ["sdk", "fixed"]

side = st.one_of(st.just(0.0), st.floats(0.0078125, 300, width=32), st.integers(1, 20).map(float))
corner = st.floats(-400, 400, width=32)


@st.composite
def box_arrays(draw: st.DrawFn, most: int = 5) -> np.ndarray:
    rows = draw(st.lists(st.tuples(corner, corner, side, side), max_size=most))
    return np.array([(x, y, x + w, y + h) for x, y, w, h in rows], dtype=np.float32).reshape(-1, 4)


# ------------------------------------------------------------------------------------------------------------------ similarity


def plain_iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


@given(a=box_arrays(), b=box_arrays())
@settings(max_examples=200, deadline=None)
def test_iou_is_that_of_every_pair(a: np.ndarray, b: np.ndarray) -> None:
    found = iou(a, b)
    assert (found.shape, found.dtype) == ((len(a), len(b)), np.float32)
    expected = np.array([[plain_iou(one, other) for other in b.tolist()] for one in a.tolist()]).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)


@given(boxes=box_arrays())
@settings(max_examples=100, deadline=None)
def test_iou_is_symmetric_and_a_share(boxes: np.ndarray) -> None:
    found = iou(boxes, boxes)
    np.testing.assert_allclose(found, found.T, rtol=1e-6)  # the order of a sum
    assert (found >= 0).all()
    assert (found <= 1 + 1e-6).all()
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    np.testing.assert_allclose(np.diag(found), has_area.astype(float), rtol=1e-6)


def test_iou_of_boxes_without_area_is_zero() -> None:
    boxes = np.array([[10, 10, 10, 30], [10, 10, 10, 30], [5, 5, 20, 40], [7, 7, 7, 7]], dtype=np.float32)
    found = iou(boxes, boxes)
    assert found[2, 2] == 1
    found[2, 2] = 0
    assert not found.any()


@given(
    keypoints=hnp.arrays(np.float32, (4, 5, 2), elements=st.floats(-50, 400, width=32)),
    sides=hnp.arrays(np.float32, (4, 2), elements=st.floats(1, 300, width=32)),
    sigmas=hnp.arrays(np.float32, 5, elements=st.floats(0.0250244140625, 0.25, width=32)),
)
@settings(max_examples=100, deadline=None)
def test_oks_is_the_formula(keypoints: np.ndarray, sides: np.ndarray, sigmas: np.ndarray) -> None:
    boxes = np.concatenate([np.full((4, 2), 7, dtype=np.float32), sides + 7], axis=1)
    found = oks(keypoints, boxes, sigmas)
    assert (found.shape, found.dtype) == ((4, 4), np.float32)
    for i in range(4):
        for j in range(4):
            scale = sum(math.hypot(float(w), float(h)) for w, h in ((box[2] - box[0], box[3] - box[1]) for box in (boxes[i], boxes[j]))) / 2
            of_keypoints = [
                math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / (2 * (scale * float(sigma)) ** 2))
                for a, b, sigma in zip(keypoints[i], keypoints[j], sigmas, strict=True)
            ]
            assert found[i, j] == pytest.approx(sum(of_keypoints) / 5, abs=1e-4)
    np.testing.assert_array_equal(np.diag(found), 1)


def test_oks_counts_keypoints_and_forgives_large_people_more() -> None:
    here = np.zeros((3, 4, 2), dtype=np.float32)
    here[1, :2] += 1000  # half of the keypoints are far away
    here[2] += 5
    near = oks(here, np.array([[0, 0, 30, 40]] * 3, dtype=np.float32), np.full(4, 0.1, dtype=np.float32))
    far = oks(here, np.array([[0, 0, 300, 400]] * 3, dtype=np.float32), np.full(4, 0.1, dtype=np.float32))
    assert near[0, 1] == 0.5
    assert near[0, 2] == pytest.approx(math.exp(-50 / (2 * 5**2)))
    assert far[0, 2] > 0.98 > near[0, 2]


# --------------------------------------------------------------------------------------------------------- boxes of keypoints

points = hnp.arrays(np.float32, (6, 2), elements=st.floats(-200, 600, width=32))
shares = hnp.arrays(np.float32, 6, elements=st.floats(0, 1, width=32))


@given(keypoints=points, scores=shares, threshold=st.sampled_from([0.0, 0.25, 0.5, 0.9]), least=st.integers(1, 6), scale=st.floats(1.0, 1.5))
@settings(max_examples=300, deadline=None)
def test_keypoint_box_is_around_those_that_count(keypoints: np.ndarray, scores: np.ndarray, threshold: float, least: int, scale: float) -> None:
    box = keypoint_box(keypoints, scores, size_wh=SIZE_WH, threshold=threshold, least=least, scale=scale)
    counting = keypoints[scores >= np.float32(threshold)]
    if len(counting) < least:
        assert box is None
        return
    assert box is not None
    assert (box.shape, box.dtype) == ((4,), np.float32)
    assert (box[:2] >= 0).all()
    assert (box[:2] <= box[2:]).all()
    assert (box[2:] <= SIZE_WH).all()
    inside_frame = np.clip(counting, 0, SIZE_WH)  # of what is outside of it the box has the edge
    assert (inside_frame >= box[:2] - 1e-3).all()
    assert (inside_frame <= box[2:] + 1e-3).all()


@given(keypoints=hnp.arrays(np.float32, (5, 2), elements=st.floats(100, 140, width=32)), scale=st.floats(1.0, 1.5))
@settings(max_examples=100, deadline=None)
def test_keypoint_box_grows_about_its_middle(keypoints: np.ndarray, scale: float) -> None:
    box = keypoint_box(keypoints, np.ones(5, dtype=np.float32), size_wh=SIZE_WH, threshold=0.5, least=3, scale=scale)
    assert box is not None
    low, high = keypoints.min(axis=0), keypoints.max(axis=0)
    np.testing.assert_allclose((box[:2] + box[2:]) / 2, (low + high) / 2, atol=1e-3)
    np.testing.assert_allclose(box[2:] - box[:2], (high - low) * scale, atol=1e-3)


def test_keypoint_that_scores_the_threshold_counts() -> None:
    keypoints = np.array([[10, 20], [30, 60], [200, 200]], dtype=np.float32)
    arguments = {"size_wh": SIZE_WH, "threshold": 0.3, "scale": 1.0}
    scores = np.array([0.3, 0.8, np.nextafter(np.float32(0.3), np.float32(0))], dtype=np.float32)
    np.testing.assert_array_equal(keypoint_box(keypoints, scores, least=2, **arguments), [10, 20, 30, 60])
    assert keypoint_box(keypoints, scores, least=3, **arguments) is None


def test_box_of_no_keypoint_at_all_is_no_place_to_look() -> None:
    """MMDeploy's turns inside out where none has to count."""
    box = keypoint_box(np.zeros((2, 2), dtype=np.float32), np.zeros(2, dtype=np.float32), size_wh=SIZE_WH, threshold=0.5, least=0, scale=1.25)
    assert box is None or (box[2:] <= box[:2]).all()


@given(boxes=box_arrays())
@settings(max_examples=50, deadline=None)
def test_box_and_state_are_the_same(boxes: np.ndarray) -> None:
    for box in boxes:
        np.testing.assert_allclose(state_as_box(box_as_state(box)), box, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- suppression, assignment


@given(data=st.data(), count=st.integers(0, 7), threshold=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=300, deadline=None)
def test_suppression_keeps_whom_nobody_better_is_like(data: st.DataObject, count: int, threshold: float) -> None:
    levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    ranks = data.draw(st.lists(st.tuples(st.integers(0, 2).map(float), st.integers(0, 3).map(float)), min_size=count, max_size=count))
    similar = data.draw(hnp.arrays(np.float32, (count, count), elements=levels))
    before = data.draw(hnp.arrays(np.bool_, count))
    kept: list[int] = []
    for i in sorted(range(count), key=lambda i: (-ranks[i][0], -ranks[i][1], i)):  # equals in their order
        if before[i] and not any(similar[k, i] >= threshold for k in kept):
            kept.append(i)
    valid = before.copy()
    suppress(ranks, similar, valid, threshold)
    assert np.flatnonzero(valid).tolist() == sorted(kept)


@given(data=st.data(), rows=st.integers(0, 6), columns=st.integers(0, 6), threshold=st.sampled_from([-100.0, 0.0, 0.5]))
@settings(max_examples=300, deadline=None)
def test_assignment_takes_the_best_pair_again_and_again(data: st.DataObject, rows: int, columns: int, threshold: float) -> None:
    values = st.sampled_from([-1000.0, -3.0, 0.0, 0.25, 0.5, 0.75, 1.0])
    scores = data.draw(hnp.arrays(np.float32, (rows, columns), elements=values))
    free_rows, free_columns = data.draw(hnp.arrays(np.bool_, rows)), data.draw(hnp.arrays(np.bool_, columns))
    left, right = set(np.flatnonzero(free_rows).tolist()), set(np.flatnonzero(free_columns).tolist())
    expected = []
    while left and right:
        best = max(((i, j) for i in sorted(left) for j in sorted(right)), key=lambda pair: scores[pair])  # the first of equals
        if scores[best] < threshold:
            break
        expected.append(best)
        left.remove(best[0])
        right.remove(best[1])
    found = assign(scores, free_rows, free_columns, threshold)
    assert found == expected
    assert np.flatnonzero(free_rows).tolist() == sorted(left)
    assert np.flatnonzero(free_columns).tolist() == sorted(right)


# --------------------------------------------------------------------------------------------------------------------- filters


class Textbook:
    """Kalman filters with constant velocity as a book has them: matrices, in double. Points outside the gate start again, where they were measured."""

    def __init__(self, box: np.ndarray, keypoints: np.ndarray, *, position: float, velocity: float, step: float) -> None:
        self.position, self.velocity, self.step = position, velocity, step
        self.transition = np.array([[1, step], [0, 1]])
        self.measures = np.array([[1.0, 0.0]])
        state = as_state(box)
        size = math.sqrt(state[2] * state[3])
        start = np.diag([(2 * position * size) ** 2, (10 * velocity * size) ** 2])
        # One filter of position and velocity for each number: the axes do not depend on each other.
        self.box = [(np.array([value, 0.0]), start.copy()) for value in state]
        self.points = [[(np.array([value, 0.0]), start.copy()) for value in point] for point in keypoints.astype(float)]

    def size(self) -> float:
        return math.sqrt(self.box[2][0][0] * self.box[3][0][0])

    def predict(self) -> tuple[np.ndarray, np.ndarray]:
        size = self.size()
        noise = np.diag([(self.position * size) ** 2, (self.velocity * size) ** 2]) * self.step
        moved = lambda one: (self.transition @ one[0], self.transition @ one[1] @ self.transition.T + noise)
        self.box = [moved(one) for one in self.box]
        self.points = [[moved(one) for one in axes] for axes in self.points]
        return as_box([state[0] for state, _ in self.box]), np.array([[state[0] for state, _ in axes] for axes in self.points])

    def distances(self, keypoints: np.ndarray) -> np.ndarray:
        noise = (self.position * self.size()) ** 2
        return np.array(
            [
                sum((z - state[0]) ** 2 / (covariance[0, 0] + noise) for z, (state, covariance) in zip(point, axes, strict=True))
                for point, axes in zip(keypoints.astype(float), self.points, strict=True)
            ]
        )

    def correct(self, box: np.ndarray, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self.size()
        inside = self.distances(keypoints) < GATE
        again = np.diag([(2 * self.position * size) ** 2, (10 * self.velocity * size) ** 2])
        self.points = [
            [self.corrected(one, z, size) if is_inside else (np.array([z, 0.0]), again.copy()) for one, z in zip(axes, point, strict=True)]
            for axes, point, is_inside in zip(self.points, keypoints.astype(float), inside, strict=True)
        ]
        self.box = [self.corrected(one, z, size) for one, z in zip(self.box, as_state(box), strict=True)]
        return as_box([state[0] for state, _ in self.box]), np.array([[state[0] for state, _ in axes] for axes in self.points])

    def corrected(self, one: tuple[np.ndarray, np.ndarray], z: float, size: float) -> tuple[np.ndarray, np.ndarray]:
        state, covariance = one
        spread = self.measures @ covariance @ self.measures.T + (self.position * size) ** 2
        gain = covariance @ self.measures.T @ np.linalg.inv(spread)
        return state + (gain * (z - state[0]))[:, 0], (np.eye(2) - gain @ self.measures) @ covariance


def as_state(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(v) for v in box)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def as_box(state: list[float]) -> np.ndarray:
    x, y, w, h = state
    return np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


@pytest.mark.parametrize("step", [1.0, 0.5, 1.2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fixed_motion_is_the_textbooks(seed: int, step: float) -> None:
    """Sixty frames of a person who walks and grows, whose keypoints jump now and then, and who is not seen in some frames."""
    rng = np.random.default_rng(seed)
    offsets = rng.uniform(-30, 30, (9, 2))

    def seen(t: int) -> tuple[np.ndarray, np.ndarray]:
        middle = np.array([100 + 3 * t, 200 + 20 * math.sin(t / 5)])
        keypoints = middle + offsets * (1 + t / 100) + rng.normal(0, 1, (9, 2))
        keypoints[rng.random(9) < 0.15] += rng.normal(0, 60, 2)
        half = np.array([35 + t / 3, 60 + t / 4]) + rng.normal(0, 1, 2)
        return np.concatenate([middle - half, middle + half]).astype(np.float32), keypoints.astype(np.float32)

    box, keypoints = seen(0)
    ours = MotionFilter(box, keypoints, position=0.05, velocity=0.00625, mode="fixed", step=step)
    book = Textbook(box, keypoints, position=0.05, velocity=0.00625, step=step)
    inside = outside = 0
    for t in range(1, 60):
        for found, expected in zip(ours.predict(), book.predict(), strict=True):
            np.testing.assert_allclose(found, expected, atol=5e-3)
        if rng.random() < 0.2:
            continue
        box, keypoints = seen(t)
        distances = book.distances(keypoints)
        np.testing.assert_allclose(ours.distances(keypoints), distances, rtol=2e-3, atol=1e-3)
        assert (np.abs(distances - GATE) > 0.01).all()  # no rounding decides here
        inside, outside = inside + int((distances < GATE).sum()), outside + int((distances >= GATE).sum())
        for found, expected in zip(ours.correct(box, keypoints), book.correct(box, keypoints), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=5e-3)
    assert inside > 200
    assert outside > 30


def still(mode: Mode, *, step: float = 1.0) -> tuple[MotionFilter, np.ndarray, np.ndarray]:
    box, keypoints = np.array([100, 100, 160, 220], dtype=np.float32), np.array([[110, 120], [150, 200]], dtype=np.float32)
    return MotionFilter(box, keypoints, position=0.05, velocity=0.00625, mode=mode, step=step), box, keypoints


def test_fixed_gate_does_not_open_with_age() -> None:
    """Whoever jumps again and again starts again every time; the SDK's distances shrink with every frame."""
    far: dict[Mode, list[float]] = {}
    for mode in MODES:
        motion, box, keypoints = still(mode)
        far[mode] = []
        for t in range(60):
            motion.predict()
            jumped = keypoints + np.float32(80 * (t % 2))
            far[mode].append(float(motion.distances(jumped + np.float32(100))[0]))
            motion.correct(box, jumped)
    assert far["fixed"][-1] == pytest.approx(far["fixed"][5], rel=0.05)
    assert far["sdk"][-1] < 0.5 * far["sdk"][5]


def test_fixed_keypoints_lead_where_they_go_and_the_sdks_stay() -> None:
    expected: dict[Mode, np.ndarray] = {}
    for mode in MODES:
        motion, box, keypoints = still(mode)
        for t in range(1, 40):
            motion.predict()
            motion.correct(box + np.float32(t), keypoints + np.float32(t))
        expected[mode] = motion.predict()[1]
    np.testing.assert_allclose(expected["fixed"], keypoints + 40, atol=0.3)
    np.testing.assert_array_equal(expected["sdk"], keypoints + 39)


def test_restart_is_a_new_filter() -> None:
    for mode in MODES:
        motion, box, keypoints = still(mode)
        for t in range(1, 10):
            motion.predict()
            motion.correct(box + np.float32(5 * t), keypoints + np.float32(5 * t))
        motion.restart(box, keypoints)
        new, _, _ = still(mode)
        for _ in range(5):
            for found, expected in zip(motion.predict(), new.predict(), strict=True):
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(motion.distances(keypoints + np.float32(3)), new.distances(keypoints + np.float32(3)))


def test_prediction_does_not_depend_on_the_frame_rate() -> None:
    """The same walk at 30 and at 60 frames a second: the same place half a second after it was last seen."""
    places = []
    for step in (1.0, 0.5):
        motion, box, keypoints = still("fixed", step=step)
        for t in range(1, round(60 / step)):
            motion.predict()
            motion.correct(box + np.float32(2 * t * step), keypoints + np.float32(2 * t * step))
        for _ in range(round(15 / step)):
            expected_box, expected_keypoints = motion.predict()
        seconds = 2 * ((round(60 / step) - 1) * step + 15)
        np.testing.assert_allclose(expected_keypoints, keypoints + seconds, atol=1.0)
        places.append(expected_box - seconds)
    np.testing.assert_allclose(places[0], places[1], atol=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_boxes_without_a_size_are_filtered_too(mode: Mode) -> None:
    """One keypoint alone has a box without area, and so without any noise: nothing is divided by nothing."""
    point = np.array([50, 60, 50, 60], dtype=np.float32)
    keypoints = np.array([[50, 60], [55, 70]], dtype=np.float32)
    motion = MotionFilter(point, keypoints, position=0.05, velocity=0.00625, mode=mode)
    for t in range(1, 6):
        motion.predict()
        assert np.isfinite(motion.distances(keypoints + np.float32(t))).all()
        box, found = motion.correct(point + np.float32(t), keypoints + np.float32(t))
        assert np.isfinite(box).all()
        assert np.isfinite(found).all()
    if mode == "fixed":  # and nobody stays where they were for lack of noise
        np.testing.assert_allclose(found, keypoints + 5, atol=2)
        np.testing.assert_allclose(box, point + 5, atol=2)


def test_box_that_shrank_away_is_found_again_in_fixed() -> None:
    """Its width is extrapolated below zero while it is not seen."""
    motion, box, keypoints = still("fixed")
    for t in range(1, 6):
        motion.predict()
        motion.correct(box + np.array([0, 0, -10 * t, 0], dtype=np.float32), keypoints)
    for _ in range(20):
        expected, _ = motion.predict()
    assert expected[2] < expected[0]
    assert np.isfinite(motion.distances(keypoints)).all()
    corrected, found = motion.correct(box, keypoints)
    assert np.isfinite(corrected).all()
    assert np.isfinite(found).all()


# ------------------------------------------------------------------------------------------------------------------- smoothing

PARAMS = (0.007, 1.0, 1.0)
BOX = np.array([100, 50, 160, 200], dtype=np.float32)
KEYPOINTS = np.array([[110, 60], [150, 190], [130, 120]], dtype=np.float32)


@given(
    mode=st.sampled_from(MODES),
    params=st.tuples(st.floats(0, 1), st.floats(0.01, 3), st.floats(0.01, 3)),
    step=st.sampled_from([0.5, 1.0, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_what_stands_still_stays(mode: Mode, params: tuple[float, float, float], step: float) -> None:
    smoother = Smoother(BOX, KEYPOINTS, params=params, mode=mode, step=step)
    for _ in range(20):
        box, keypoints = smoother.step(BOX, KEYPOINTS)
        np.testing.assert_allclose(box, BOX, atol=1e-3)
        np.testing.assert_allclose(keypoints, KEYPOINTS, atol=1e-3)


@given(mode=st.sampled_from(MODES), jump=st.floats(-200, 200), params=st.tuples(st.floats(0, 1), st.floats(0.05, 3), st.floats(0.05, 3)))
@settings(max_examples=60, deadline=None)
def test_first_step_of_a_jump_is_on_the_way(mode: Mode, jump: float, params: tuple[float, float, float]) -> None:
    """Whatever the parameters, between where it was and where it is."""
    assume(abs(jump) > 1)
    _, keypoints = Smoother(BOX, KEYPOINTS, params=params, mode=mode).step(BOX, KEYPOINTS + np.float32(jump))
    share = (keypoints - KEYPOINTS) / jump
    assert (share > 0).all()
    assert (share <= 1 + 1e-3).all()


def test_fixed_is_not_behind_what_moves_evenly() -> None:
    behind: dict[Mode, float] = {}
    for mode in MODES:
        smoother = Smoother(BOX, KEYPOINTS, params=(0.0, 0.2, 0.2), mode=mode)
        for t in range(1, 80):
            moved = np.float32(3 * t)
            box, keypoints = smoother.step(BOX + moved, KEYPOINTS + moved)
        behind[mode] = float(np.abs(keypoints - KEYPOINTS - moved).max())
        assert float(np.abs(box - BOX - moved).max()) == pytest.approx(behind[mode], abs=1e-3)
    assert behind["fixed"] < 0.01
    assert behind["sdk"] > 1.5


def test_fixed_smooths_what_trembles() -> None:
    rng = np.random.default_rng(0)
    smoother = Smoother(BOX, KEYPOINTS, params=(0.0, 0.05, 0.05), mode="fixed")
    noise = rng.normal(0, 2, (300, *KEYPOINTS.shape)).astype(np.float32)
    found = np.array([smoother.step(BOX, KEYPOINTS + one)[1] for one in noise])
    tremble = lambda series: float(np.abs(np.diff(series, axis=0)).mean())
    assert tremble(found[20:]) < 0.5 * tremble(noise[20:])
    assert np.abs(found[20:].mean(axis=0) - KEYPOINTS).max() < 1.0


def test_recovery_puts_fixed_where_it_is_found() -> None:
    """The SDK puts the new place into the velocities of the box, whose position stays where it was lost."""
    for mode in MODES:
        smoother = Smoother(BOX, KEYPOINTS, params=PARAMS, mode=mode)
        for t in range(1, 10):
            smoother.step(BOX + np.float32(t), KEYPOINTS + np.float32(t))
        smoother.restart(BOX + np.float32(300), KEYPOINTS + np.float32(300))
        box, keypoints = smoother.step(BOX + np.float32(300), KEYPOINTS + np.float32(300))
        np.testing.assert_allclose(keypoints, KEYPOINTS + 300, atol=1e-3)
        if mode == "fixed":
            np.testing.assert_allclose(box, BOX + 300, atol=1e-3)
            again, _ = smoother.step(BOX + np.float32(300), KEYPOINTS + np.float32(300))
            np.testing.assert_allclose(again, BOX + 300, atol=1e-3)
        else:
            assert np.abs(box - BOX - 300).max() > 10


def test_what_shrinks_is_smoothed_as_what_grows_in_fixed() -> None:
    """The SDK takes a signed speed for a size: its cutoff falls where a box shrinks."""
    shares: dict[Mode, list[float]] = {}
    for mode in MODES:
        shares[mode] = []
        for change in (30.0, -30.0):
            box = BOX + np.array([-change / 2, 0, change / 2, 0], dtype=np.float32)
            found, _ = Smoother(BOX, KEYPOINTS, params=(0.005, 0.5, 1.0), mode=mode).step(box, KEYPOINTS)
            shares[mode].append((float(found[2] - found[0]) - 60) / change)
    assert shares["fixed"][0] == pytest.approx(shares["fixed"][1], abs=1e-5)
    assert shares["sdk"][0] > shares["sdk"][1] + 0.05


@pytest.mark.parametrize(("params", "near_px"), [(PARAMS, 0.5), ((0.007, 0.3, 0.3), 0.7), ((0.0005, 0.02, 0.02), 1.0)], ids=["default", "smoother", "slow"])
def test_smoothing_a_second_does_not_depend_on_the_frame_rate(params: tuple[float, float, float], near_px: float) -> None:
    """Half the motion in twice the frames gives the same curve; without the time step it would be another."""

    def curve(step: float, told: float) -> np.ndarray:
        smoother = Smoother(BOX, KEYPOINTS, params=params, mode="fixed", step=told)
        places = []
        for i in range(1, round(60 / step) + 1):
            moved = np.float32(min(i * step, 20) * 4)  # walks for twenty frames, and stands
            _, keypoints = smoother.step(BOX + moved, KEYPOINTS + moved)
            places.append(float(keypoints[0, 0] - KEYPOINTS[0, 0]))
        return np.array(places[round(1 / step) - 1 :: round(1 / step)])

    at_30, at_60 = curve(1.0, 1.0), curve(0.5, 0.5)
    assert at_30.shape == at_60.shape == (60,)
    assert np.abs(at_30 - at_60).max() < near_px
    assert np.abs(at_30 - curve(0.5, 1.0)).max() > np.abs(at_30 - at_60).max()


def test_sdk_ignores_the_frame_rate() -> None:
    for step in (0.5, 2.0):
        ours, plain = (Smoother(BOX, KEYPOINTS, params=PARAMS, mode="sdk", step=one) for one in (step, 1.0))
        np.testing.assert_array_equal(ours.step(BOX, KEYPOINTS + np.float32(9))[1], plain.step(BOX, KEYPOINTS + np.float32(9))[1])
