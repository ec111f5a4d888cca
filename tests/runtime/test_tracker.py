"""PoseTracker as a user calls it: parameters, states, ids, batches and odd videos. That mode "sdk" gives the SDK's numbers is the conformance tests' business."""

from __future__ import annotations

import gc
import importlib.util
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tracker_bundles
from modelcrate_bundle.errors import ConfigError, InputError, TaskMismatchError
from modelcrate_converter.people.dataset import walk
from modelcrate_runtime import Detector, PoseDetector, PoseTracker, TrackedPoses
from modelcrate_runtime.tracker import TrackerParams
from tracker_bundles import SLOTS, Detection, blank, paint

ROOT = Path(__file__).parents[2]
K = tracker_bundles.K
SIZE_WH = (160, 120)
BRIGHT = 200
"""A level at which every keypoint scores 1.17; at 0 none does."""
PERSON: Detection = (40, 30, 90, 100, 0.9, 0)
OTHER: Detection = (110, 20, 150, 80, 0.9, 0)
MODES = ["fixed", "sdk"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A detector that reads its answer from the frame, and an estimator that finds the same pose in every crop, if it is bright enough."""
    folder = tmp_path_factory.mktemp("tiny")
    return tracker_bundles.write_detector(folder / "detector"), tracker_bundles.write_estimator(folder / "estimator", spread=0.64)


@pytest.fixture(scope="module")
def opened(tiny: tuple[Path, Path]) -> Iterator[dict[str, PoseTracker]]:
    trackers = {mode: PoseTracker(*tiny, mode=mode, threads=1) for mode in MODES}
    yield trackers
    for tracker in trackers.values():
        tracker.close()


@pytest.fixture(params=MODES)
def tracker(request: pytest.FixtureRequest, opened: dict[str, PoseTracker]) -> PoseTracker:
    return opened[request.param]


@pytest.fixture
def fixed(opened: dict[str, PoseTracker]) -> PoseTracker:
    return opened["fixed"]


def seen(*people: Detection, size_wh: tuple[int, int] = SIZE_WH) -> np.ndarray:
    """A frame in which these people are detected, and every pose is a good one."""
    return blank(size_wh, people, level=BRIGHT)


def unseen(size_wh: tuple[int, int] = SIZE_WH) -> np.ndarray:
    return blank(size_wh)


def moved(person: Detection, x: float, y: float = 0.0) -> Detection:
    left, top, right, bottom, score, label = person
    return (left + x, top + y, right + x, bottom + y, score, label)


def textured(shift: float) -> np.ndarray:
    """Two people whose parts differ, on grey."""
    rng = np.random.default_rng(4)
    frame = np.full((SIZE_WH[1], SIZE_WH[0], 3), 60, dtype=np.uint8)
    people = [moved(PERSON, shift), moved(OTHER, -shift / 2)]
    for person in people:
        paint(frame, person[:4], rng.uniform(150, 255, (4, 3, 3)))
    tracker_bundles.write_detections(frame, people)
    return frame


def ids_of(tracker: PoseTracker, state: PoseTracker.State, frames: Sequence[np.ndarray]) -> list[list[int]]:
    return [tracker(state, frame)[2].tolist() for frame in frames]


def assert_same(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------------------------ parameters


def test_defaults_are_mmdeploys() -> None:
    params = TrackerParams.of({})
    assert (params.det_interval, params.det_thr, params.det_nms_thr, params.pose_kpt_thr) == (1, 0.5, 0.7, 0.5)
    assert (params.pose_max_num_bboxes, params.pose_bbox_scale, params.track_iou_thr, params.track_max_missing) == (-1, 1.25, 0.4, 10)
    assert (params.std_weight_position, params.std_weight_velocity, params.smooth_params) == (0.05, 0.00625, (0.007, 1.0, 1.0))


@pytest.mark.parametrize("name", ["track_kpt_thr", "pose_kpt_thr"])
def test_either_name_of_the_keypoints_threshold(name: str, tracker: PoseTracker) -> None:
    assert TrackerParams.of({name: 0.3}).pose_kpt_thr == 0.3
    assert tracker.create_state(**{name: 0.3}).params.pose_kpt_thr == 0.3


def test_both_names_together_are_refused() -> None:
    for first, second in (("track_kpt_thr", "pose_kpt_thr"), ("pose_kpt_thr", "track_kpt_thr")):
        with pytest.raises(ConfigError, match="found both"):
            TrackerParams.of({first: 0.3, second: 0.3})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("det_intervall", "det_interval"), ("track_kp_thr", "track_kpt_thr"), ("keypoint_sigma", "keypoint_sigmas"), ("framerate", "frame_rate")],
)
def test_unknown_parameter_is_refused_with_a_suggestion(name: str, meant: str, tracker: PoseTracker) -> None:
    with pytest.raises(ConfigError, match=f"found '{name}'") as caught:
        tracker.create_state(**{name: 1})
    assert meant in caught.value.hint


def test_unknown_parameter_that_is_like_none_says_where_to_look(tracker: PoseTracker) -> None:
    with pytest.raises(ConfigError, match="expected one of det_interval, det_label"):
        tracker.create_state(xyz=1)


@pytest.mark.parametrize(
    "params",
    [
        {"det_interval": "often"}, {"det_interval": 1.5}, {"det_interval": None}, {"det_thr": "0.5"}, {"smooth_params": [1, 2]}, {"smooth_params": 1.0},
        {"keypoint_sigmas": 0.1}, {"keypoint_sigmas": ["a"] * K}, {"frame_rate": 0}, {"frame_rate": -30.0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_and_values_are_refused(params: dict[str, Any], tracker: PoseTracker) -> None:
    with pytest.raises(ConfigError, match=next(iter(params))):
        tracker.create_state(**params)


def test_numpys_numbers_are_numbers(tracker: PoseTracker) -> None:
    params = tracker.create_state(
        det_interval=np.int64(3), det_thr=np.float32(0.25), keypoint_sigmas=np.full(K, 0.125, dtype=np.float32), smooth_params=np.array([0.5, 1, 2])
    ).params
    assert (params.det_interval, params.det_thr, params.keypoint_sigmas, params.smooth_params) == (3, 0.25, (0.125,) * K, (0.5, 1.0, 2.0))
    assert [type(value) for value in (params.det_interval, params.det_thr)] == [int, float]
    assert tracker.create_state(keypoint_sigmas=[0.1] * K, smooth_params=(1, 1, 1)).params.smooth_params == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [1, K - 1, K + 1])
def test_another_number_of_sigmas_is_refused(count: int, tracker: PoseTracker) -> None:
    with pytest.raises(ConfigError, match=f"keypoint_sigmas: expected {K}, one for each keypoint, found {count}"):
        tracker.create_state(keypoint_sigmas=[0.1] * count)


def test_fixed_takes_the_bundles_sigmas_and_sdk_compares_boxes(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    sigmas = [0.0625] * K
    estimator = tracker_bundles.write_estimator(tmp_path / "estimator", sigmas=sigmas)
    with PoseTracker(tiny[0], estimator) as fixed, PoseTracker(tiny[0], estimator, mode="sdk") as sdk:
        assert fixed.create_state().params.keypoint_sigmas == tuple(sigmas)
        assert fixed.create_state(keypoint_sigmas=[0.25] * K).params.keypoint_sigmas == (0.25,) * K
        assert sdk.create_state().params.keypoint_sigmas == ()


# ------------------------------------------------------------------------------------------------------- results and their ids


def test_nobody_is_mmdeploys_nobody(tracker: PoseTracker) -> None:
    for frame in (unseen(), seen()):
        keypoints, boxes, ids = tracker(tracker.create_state(), frame)
        assert (keypoints.shape, boxes.shape, ids.shape) == ((0, 0, 3), (0, 4), (0,))
        assert (keypoints.dtype, boxes.dtype, ids.dtype) == (np.float32, np.float32, np.uint32)
    assert len(tracker.track(tracker.create_state(), unseen())) == 0


def test_two_people_are_two_tracks(tracker: PoseTracker) -> None:
    state = tracker.create_state()
    for _ in range(5):
        keypoints, boxes, ids = tracker(state, seen(PERSON, OTHER))
        assert (keypoints.shape, boxes.shape, ids.shape) == ((2, K, 3), (2, 4), (2,))
        assert (keypoints.dtype, boxes.dtype, ids.dtype) == (np.float32, np.float32, np.uint32)
        assert ids.tolist() == [0, 1]
        assert np.median(keypoints[..., 2]) == pytest.approx(3 * BRIGHT / 512)  # less where the crop leaves the frame
        np.testing.assert_allclose(boxes, [PERSON[:4], OTHER[:4]], atol=8)
        for points, box in zip(keypoints, boxes, strict=True):
            assert (points[:, :2] > box[:2]).all()
            assert (points[:, :2] < box[2:]).all()


def test_typed_results_are_the_calls(tracker: PoseTracker) -> None:
    plain, typed = tracker.create_state(), tracker.create_state()
    for frame in [textured(t) for t in range(6)] + [unseen()] * 2:
        keypoints, boxes, ids = tracker(plain, frame)
        found = tracker.track(typed, frame)
        assert isinstance(found, TrackedPoses)
        assert len(found) == len(ids)
        np.testing.assert_array_equal(found.boxes_xyxy, boxes)
        np.testing.assert_array_equal(found.track_ids, ids)
        np.testing.assert_array_equal(np.dstack([found.keypoints_xy, found.scores]).reshape(keypoints.shape), keypoints)
    assert tracker.batch([tracker.create_state()], [textured(0)])[0][2].tolist() == [0, 1]


def test_states_are_videos(tracker: PoseTracker) -> None:
    """Each counts from 0, and has its own parameters and people."""
    first, second = tracker.create_state(), tracker.create_state(det_thr=0.95)
    assert isinstance(first, PoseTracker.State)
    assert first is not second
    assert ids_of(tracker, first, [seen(PERSON, OTHER)] * 2) == [[0, 1], [0, 1]]
    assert ids_of(tracker, second, [seen(PERSON)] * 2) == [[], []]
    third = tracker.create_state()
    assert ids_of(tracker, third, [seen(OTHER)]) == [[0]]
    assert ids_of(tracker, first, [seen(PERSON, OTHER)]) == [[0, 1]]


def test_ids_are_never_used_again(tracker: PoseTracker) -> None:
    state = tracker.create_state(track_max_missing=2)
    found = []
    for visit in range(8):
        people = [PERSON, OTHER] if visit % 2 else [OTHER]
        ids = ids_of(tracker, state, [*[seen(*people)] * 2, *[unseen()] * 4])
        assert ids[0] == ids[1]
        assert ids[2:] == [[]] * 4
        found += ids[0]
    assert found == list(range(12))


@pytest.mark.parametrize(("kept", "gap", "comes_back"), [(10, 10, True), (10, 11, False), (0, 1, False), (1, 1, True), (-1, 30, True)])
def test_who_is_missing_comes_back_in_time(kept: int, gap: int, comes_back: bool, tracker: PoseTracker) -> None:
    """The SDK keeps a track for ever when the number is negative."""
    state = tracker.create_state(track_max_missing=kept)
    ids = ids_of(tracker, state, [*[seen(PERSON)] * 4, *[unseen()] * gap, *[seen(PERSON)] * 2])
    assert ids[:4] == [[0]] * 4
    assert ids[4:-2] == [[]] * gap
    assert ids[-2:] == ([[0]] * 2 if comes_back else [[1]] * 2)


def test_recovered_box_is_where_the_person_is(opened: dict[str, PoseTracker]) -> None:
    """The SDK's smoother starts from where the box was lost, with the place as its velocity."""
    off: dict[str, float] = {}
    for mode, tracker in opened.items():
        state = tracker.create_state(track_iou_thr=0.1)
        ids_of(tracker, state, [*[seen(PERSON)] * 4, *[unseen()] * 3])
        found = tracker.track(state, seen(moved(PERSON, 12)))
        alone = tracker.track(tracker.create_state(), seen(moved(PERSON, 12)))
        assert found.track_ids.tolist() == [0]
        off[mode] = float(np.abs(found.boxes_xyxy - alone.boxes_xyxy).max())
    assert off["fixed"] < 1e-3
    assert off["sdk"] > 1


# --------------------------------------------------------------------------------------------------------------- the detector


def test_detector_runs_when_it_is_told_to(tracker: PoseTracker) -> None:
    """1 and 0 say whether, -1 leaves it to the interval; what only the detector sees is not seen without it."""
    state = tracker.create_state(det_interval=2)
    assert [state.wants_detection(detect) for detect in (-1, 0, 1)] == [True, False, True]
    assert tracker(state, seen(PERSON), 0)[2].tolist() == []
    assert tracker(state, seen(PERSON))[2].tolist() == []  # frame 1 of an interval of 2
    assert tracker(state, seen(PERSON))[2].tolist() == [0]
    assert tracker(state, seen(PERSON, OTHER))[2].tolist() == [0]
    assert tracker(state, seen(PERSON, OTHER), 0)[2].tolist() == [0]
    assert tracker(state, seen(PERSON, OTHER), 1)[2].tolist() == [0, 1]
    assert tracker(state, seen(), detect=-1)[2].tolist() == [0, 1]  # between detections the last keypoints say where to look


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_detection_interval(interval: int, tracker: PoseTracker) -> None:
    """A newcomer is found in the next frame that the detector runs on."""
    for arrival in range(1, 2 * interval + 1):
        state = tracker.create_state(det_interval=interval)
        ids = ids_of(tracker, state, [seen(PERSON) if t < arrival else seen(PERSON, OTHER) for t in range(3 * interval)])
        due = -(-arrival // interval) * interval
        assert [len(of_frame) for of_frame in ids] == [1] * due + [2] * (3 * interval - due)


@pytest.mark.parametrize("interval", [0, -1])
def test_no_interval_never_detects(interval: int, tracker: PoseTracker) -> None:
    state = tracker.create_state(det_interval=interval)
    assert ids_of(tracker, state, [seen(PERSON)] * 5) == [[]] * 5
    assert tracker(state, seen(PERSON), 1)[2].tolist() == [0]
    assert ids_of(tracker, state, [seen()] * 5) == [[0]] * 5


def test_which_detections_count(tracker: PoseTracker) -> None:
    left, top, right, bottom, _, _ = PERSON
    cases: list[tuple[Detection, dict[str, Any], bool]] = [
        ((left, top, right, bottom, 0.5, 0), {}, False), ((left, top, right, bottom, 0.52, 0), {}, True), ((left, top, right, bottom, 0.4, 0), {"det_thr": 0.3}, True),
        ((left, top, right, bottom, 0.9, 1), {}, False), ((left, top, right, bottom, 0.9, 1), {"det_label": 1}, True),
        (PERSON, {"det_min_bbox_size": 59.0}, True), (PERSON, {"det_min_bbox_size": 60.0}, False), ((left, top, left + 0.5, top + 1.5, 0.9, 0), {}, False),
        (PERSON, {"pose_max_num_bboxes": 0}, False), (PERSON, {"track_kpt_thr": 1.2}, False),
    ]  # fmt: skip
    for detection, params, counts in cases:
        ids = tracker(tracker.create_state(**params), seen(detection))[2].tolist()
        assert ids == ([0] if counts else []), (detection, params)


def test_two_detections_of_one_person_are_one(tracker: PoseTracker) -> None:
    double = moved(PERSON, 3, -2)
    assert ids_of(tracker, tracker.create_state(), [seen(PERSON, double)] * 3) == [[0]] * 3
    assert ids_of(tracker, tracker.create_state(det_nms_thr=1.0), [seen(PERSON, double)]) == [[0]]  # their poses are alike
    assert ids_of(tracker, tracker.create_state(det_nms_thr=1.0, pose_nms_thr=1.0), [seen(PERSON, double)]) == [[0, 1]]


@pytest.mark.parametrize("thin", [(50, 20, 50.3, 100), (20, 50, 100, 50.4), (50, 20, 50.3, 23.4)], ids=["no width", "no height", "hardly anything"])
def test_boxes_thinner_than_a_pixel(thin: tuple[float, float, float, float], tracker: PoseTracker) -> None:
    """The SDK's tracker rounds their sides to nothing; what is seen around them is found."""
    state = tracker.create_state()
    for t in range(3):
        keypoints, boxes, ids = tracker(state, seen((*thin, 0.9, 0)))
        assert ids.tolist() == [0], t
        assert np.isfinite(keypoints).all()
        assert np.isfinite(boxes).all()


def test_boxes_that_round_to_nothing(tracker: PoseTracker) -> None:
    """In both directions: the SDK answers NaN, and we do not."""
    state = tracker.create_state(det_min_bbox_size=0.0)
    for _ in range(3):
        keypoints, boxes, _ = tracker(state, seen((50, 60, 50.25, 60.25, 0.9, 0)))
        assert np.isfinite(keypoints).all()
        assert np.isfinite(boxes).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_keypoint_is_a_pose_too(mode: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Its box has no area, and its filters no noise: nothing is divided by nothing."""
    estimator = tracker_bundles.write_estimator(tmp_path / "estimator", keypoints=1)
    with PoseTracker(tiny[0], estimator, mode=mode, threads=1) as tracker:
        state = tracker.create_state()
        for _ in range(10):
            keypoints, boxes, ids = tracker(state, seen(PERSON))
            assert ids.tolist() == [0]
            assert keypoints.shape == (1, 1, 3)
            np.testing.assert_allclose(boxes[0].reshape(2, 2), keypoints[0, [0, 0], :2], atol=1e-3)
            assert np.isfinite(keypoints).all()


# --------------------------------------------------------------------------------------------------------------------- batches


def test_batch_is_every_video_alone(tracker: PoseTracker) -> None:
    """Of different sizes, parameters and numbers of people; some frames with the detector, some without."""
    videos = [
        [textured(2 * t) for t in range(12)],
        [seen(*([PERSON, OTHER] if t > 4 else []), size_wh=(200, 150)) for t in range(12)],
        [unseen() for _ in range(12)],
        [textured(-t) if t not in {5, 6} else unseen() for t in range(12)],
    ]
    params: list[dict[str, Any]] = [{}, {"det_interval": 3}, {}, {"track_kpt_thr": 0.3, "det_interval": 2}]
    detects = [[-1, 0, 1][t % 3] for t in range(12)]
    alone, together = ([tracker.create_state(**of_video) for of_video in params] for _ in range(2))
    total = 0
    for t in range(12):
        frames = [video[t] for video in videos]
        chosen = [-1, detects[t], -1, detects[(t + 1) % 12]]
        expected = [tracker(state, frame, detect) for state, frame, detect in zip(alone, frames, chosen, strict=True)]
        for found, one in zip(tracker.batch(together, frames, chosen), expected, strict=True):
            assert_same(found, one)
            total += len(one[2])
    assert total > 50
    assert [state.frames for state in together] == [12] * 4


def test_batch_without_detects_keeps_the_intervals(tracker: PoseTracker) -> None:
    states = [tracker.create_state(), tracker.create_state(det_interval=0)]
    (_, _, first), (_, _, second) = tracker.batch(states, [seen(PERSON)] * 2)
    assert (first.tolist(), second.tolist()) == ([0], [])
    assert tracker.batch([], []) == []


def test_one_video_twice_in_a_batch_is_refused(tracker: PoseTracker) -> None:
    state = tracker.create_state()
    with pytest.raises(InputError, match="different videos"):
        tracker.batch([state, state], [seen(PERSON)] * 2)
    assert state.frames == 0
    assert tracker(state, seen(PERSON))[2].tolist() == [0]


@pytest.mark.parametrize(("states", "frames", "detects"), [(2, 1, 0), (1, 2, 0), (2, 2, 1), (2, 2, 3), (0, 1, 0)])
def test_other_numbers_of_frames_are_refused(states: int, frames: int, detects: int, tracker: PoseTracker) -> None:
    made = [tracker.create_state() for _ in range(states)]
    with pytest.raises(InputError, match=f"found {frames} and {states}"):
        tracker.batch(made, [seen(PERSON)] * frames, [1] * detects)
    assert [state.frames for state in made] == [0] * states


def test_frame_that_is_no_image_changes_nothing(tracker: PoseTracker) -> None:
    """Whoever catches the error goes on with the next frame."""
    state, undisturbed = tracker.create_state(), tracker.create_state()
    for t in range(6):
        if t == 3:
            for wrong in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), dtype=np.uint8)):
                with pytest.raises(InputError, match="image: expected"):
                    tracker(state, wrong)
        assert_same(tracker(state, textured(t)), tracker(undisturbed, textured(t)))


# ------------------------------------------------------------------------------------------------------------------ odd videos


def test_a_minute_of_nothing(tracker: PoseTracker) -> None:
    """Nothing grows, and who comes then is somebody new."""
    state = tracker.create_state()
    assert ids_of(tracker, state, [seen(PERSON)] * 3) == [[0]] * 3
    empty = unseen((64, 48))
    for _ in range(100):
        assert not len(tracker(state, empty)[2])
    assert state.tracks == []
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(1800):
            tracker(state, empty)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert (state.tracks, state.next_id, state.frames) == ([], 1, 1903)
    assert ids_of(tracker, state, [seen(PERSON)] * 2) == [[1]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_people(mode: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Each of them the same from frame to frame, though all of them move."""
    detector = tracker_bundles.write_detector(tmp_path / "detector", slots=100)
    with PoseTracker(detector, tiny[1], mode=mode, threads=1) as tracker:
        state = tracker.create_state()
        first = None
        for t in range(4):
            people = [(12 + 49 * i + t, 10 + 46 * j, 40 + 49 * i + t, 44 + 46 * j, 0.5 + (10 * i + j + 1) / 256, 0) for i in range(10) for j in range(10)]
            found = tracker.track(state, blank((640, 480), people, level=BRIGHT, slots=100))
            assert sorted(found.track_ids.tolist()) == list(range(100))
            middles = {i: (box[:2] + box[2:]) / 2 for i, box in zip(found.track_ids.tolist(), found.boxes_xyxy, strict=True)}
            first = first or middles
            assert max(np.abs(middles[i] - first[i]).max() for i in range(100)) < 8


def test_frame_size_that_shrinks_clips_boxes_in_fixed(fixed: PoseTracker) -> None:
    """And who is outside of what there is now is gone."""
    state = fixed.create_state()
    ids = ids_of(fixed, state, [seen(PERSON, OTHER)] * 5)
    assert ids[-1] == [0, 1]
    small = seen(PERSON, size_wh=(100, 80))
    for _ in range(20):
        found = fixed.track(state, small)
    assert len(found) == 1
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= np.array([100, 80, 100, 80]) + 0.5).all()


def test_frame_size_that_grows_is_known_to_fixed(opened: dict[str, PoseTracker]) -> None:
    """The SDK's boxes end where its first frame did."""
    right = {}
    for mode, tracker in opened.items():
        state = tracker.create_state()
        tracker(state, seen(size_wh=(100, 80)))
        for _ in range(5):
            found = tracker.track(state, seen((110, 20, 150, 100, 0.9, 0), (60, 10, 95, 70, 0.9, 0)))
        right[mode] = found.boxes_xyxy[:, 2].max()
    assert right["fixed"] > 140
    assert right["sdk"] <= 100.5


@pytest.mark.parametrize("form", [lambda grey: grey, lambda grey: grey[:, :, None]], ids=["(H, W)", "(H, W, 1)"])
def test_grey_frames(form: Callable[[np.ndarray], np.ndarray], demo_detector_bundle: Path, demo_pose_bundle: Path) -> None:
    (scene,) = walk(3, frames=1, size_hw=(240, 426), people=3)
    grey = np.ascontiguousarray(scene.image[:, :, 1])
    with PoseTracker(demo_detector_bundle, demo_pose_bundle, threads=1) as tracker:
        states = [tracker.create_state(track_kpt_thr=0.2, det_thr=0.3) for _ in range(2)]
        for _ in range(2):
            found, expected = tracker(states[0], form(grey)), tracker(states[1], np.repeat(grey[:, :, None], 3, axis=2))
            assert_same(found, expected)
        assert len(expected[2]) > 0


def test_frames_are_not_changed(tracker: PoseTracker) -> None:
    frame = textured(0)
    frame.flags.writeable = False
    tracker(tracker.create_state(), frame)
    view = np.repeat(textured(0), 2, axis=1)[:, ::2]
    assert_same(tracker(tracker.create_state(), view), tracker(tracker.create_state(), textured(0)))


def test_whatever_happens_results_are_numbers(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Dropouts, crossings, people of nobody, boxes of one keypoint, and parameters of all kinds; warnings are errors."""
    estimator = tracker_bundles.write_estimator(tmp_path / "estimator")
    with PoseTracker(tiny[0], estimator, threads=1) as tracker:
        people = 0
        for seed in range(12, 36):
            params, detector = tracker_bundles.params_of(seed)
            state = tracker.create_state(**params, frame_rate=float(15 * (1 + seed % 4)))
            rng = np.random.default_rng(seed)
            newest = -1
            for frame in tracker_bundles.sequence(seed, frames=60):
                found = tracker.track(state, frame, int(rng.choice([-1, 0, 1])) if detector == "random" else -1)
                ids = found.track_ids.tolist()
                assert np.isfinite(found.keypoints_xy).all()
                assert np.isfinite(found.boxes_xyxy).all()
                assert ids == sorted(set(ids))  # the oldest first, nobody twice
                assert [i for i in ids if i > newest] == list(range(newest + 1, state.next_id))  # a new track is seen at once
                newest = state.next_id - 1
                people += len(ids)
        assert people > 500


# ------------------------------------------------------------------------------------------------------- opening and closing


@pytest.mark.parametrize("mode", ["SDK", "exact", "", None])
def test_unknown_mode_is_refused(mode: Any, tiny: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="mode: expected 'fixed' or 'sdk', found"):
        PoseTracker(*tiny, mode=mode)


def test_mode_decides_the_geometry(opened: dict[str, PoseTracker], tiny: tuple[Path, Path]) -> None:
    assert opened["fixed"].detector.geometry == opened["fixed"].estimator.geometry == "exact"
    assert opened["sdk"].detector.geometry == opened["sdk"].estimator.geometry == "sdk"
    with PoseTracker(*tiny) as default:
        assert default.mode == "fixed"


@pytest.mark.parametrize("positional", [("cpu", 0), ("cpu",), ()])
def test_arguments_are_mmdeploys(positional: tuple[Any, ...], tiny: tuple[Path, Path]) -> None:
    with PoseTracker(str(tiny[0]), str(tiny[1]), *positional) as by_place:
        assert by_place(by_place.create_state(), seen(PERSON))[2].tolist() == [0]
    with PoseTracker(det_model=str(tiny[0]), pose_model=str(tiny[1]), device_name="cpu", device_id=0) as by_name:
        assert by_name(state=by_name.create_state(), frame=seen(PERSON), detect=-1)[2].tolist() == [0]


def test_closing_frees_both(tiny: tuple[Path, Path]) -> None:
    with PoseTracker(*tiny) as tracker:
        tracker(tracker.create_state(), seen(PERSON))
    tracker.close()  # twice does no harm
    for call in (lambda: tracker.detector(seen()), lambda: tracker.estimator(seen()), lambda: tracker(tracker.create_state(), seen(PERSON))):
        with pytest.raises(Exception):
            call()


def test_bundles_of_other_tasks_are_refused(tiny: tuple[Path, Path]) -> None:
    detector, estimator = tiny
    for pair in ((estimator, detector), (detector, detector), (estimator, estimator)):
        with pytest.raises(TaskMismatchError):
            PoseTracker(*pair)


def native_threads() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Threads:")).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc: Linux")
def test_what_is_refused_leaves_nothing_open(tiny: tuple[Path, Path]) -> None:
    """Not even where the errors, and with them the frames of the constructor, are kept."""
    detector, _ = tiny
    with PoseTracker(*tiny, threads=3) as tracker:  # what libraries start once and keep
        tracker(tracker.create_state(), seen(PERSON))
    before, errors = native_threads(), []
    for _ in range(10):
        with pytest.raises(TaskMismatchError) as caught:
            PoseTracker(detector, detector, threads=3)
        errors.append(caught)
    assert native_threads() <= before + 2
    assert len(errors) == 10


def test_a_bundle_that_is_not_there(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    for pair in ((tmp_path / "none", tiny[1]), (tiny[0], tmp_path / "none")):
        with pytest.raises(Exception, match="none"):
            PoseTracker(*pair)


def test_its_tasks_are_ordinary_ones(fixed: PoseTracker) -> None:
    assert isinstance(fixed.detector, Detector)
    assert isinstance(fixed.estimator, PoseDetector)
    assert fixed.detector(seen(PERSON))[1].tolist() == [0]
    assert fixed.estimator(seen(PERSON), PERSON[:4]).shape == (1, K, 3)
    assert SLOTS * tracker_bundles.PIXELS_PER_SLOT <= SIZE_WH[0]


# -------------------------------------------------------------------------------------------------------------- how good it is


@pytest.fixture(scope="module")
def metrics() -> Iterator[ModuleType]:
    pytest.importorskip("scipy", reason="needs SciPy: pip install scipy")
    spec = importlib.util.spec_from_file_location("tracker_figures", ROOT / "scripts/tracker_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_fixed_is_better_than_the_sdk(metrics: ModuleType, demo_detector_bundle: Path, demo_pose_bundle: Path) -> None:
    """Fewer tracks of nobody, less trembling and less behind, on a video of drawn people who are known."""
    scenes = list(walk(21, frames=120, size_hw=(360, 640), people=4))
    truth = [
        metrics.Frame(
            ids=[person.identity for person in scene.people], keypoints=np.array([person.keypoints[:, :2] for person in scene.people], dtype=float),
            visible=np.array([person.keypoints[:, 2] == 2 for person in scene.people]),
            sizes=np.array([np.sqrt(np.prod(person.box_xyxy[2:] - person.box_xyxy[:2])) for person in scene.people]),
        )
        for scene in scenes
    ]  # fmt: skip
    found = {}
    for mode in MODES:
        with PoseTracker(demo_detector_bundle, demo_pose_bundle, mode=mode) as tracker:
            state = tracker.create_state(track_kpt_thr=0.3, frame_rate=25.0)
            frames = [tracker.track(state, scene.image) for scene in scenes]
        found[mode] = metrics.figures(truth, [metrics.Frame(ids=one.track_ids.tolist(), keypoints=one.keypoints_xy) for one in frames])
    fixed, sdk = found["fixed"], found["sdk"]
    assert fixed.false < sdk.false
    assert fixed.jitter_px < sdk.jitter_px
    assert abs(fixed.lag) < abs(sdk.lag)
    assert fixed.idf1 >= sdk.idf1 - 0.02
    assert fixed.recall > 0.6
