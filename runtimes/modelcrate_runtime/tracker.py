"""PoseTracker: who is where in a video, and in which pose; MMDeploy's class with the same calls, parameters and defaults.

A detector runs every so many frames; between them the last keypoints say where to look. Poses are matched to tracks by their keypoints, then by their boxes.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import msgspec
import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.results import Detections, Poses
from modelcrate_runtime.sessions import BACKENDS
from modelcrate_runtime.tasks import Detector, PoseDetector
from modelcrate_runtime.tracking import GATE, Mode, MotionFilter, Smoother, areas, assign, iou, keypoint_box, oks, suppress

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from numpy.typing import NDArray

    from modelcrate_bundle.bundle import Bundle
    from modelcrate_runtime.geometry import Geometry

    Image = NDArray[np.uint8]
    Floats = NDArray[Any]  # of float32, which arithmetic loses in NumPy's stubs

_NO_MATCH: Final = np.float32(-1000)
_VISIBLE, _DETECTED, _MISSING = 2, 1, 0
"""Where a box comes from, in the order of their ranks."""
ALIASES: Final = {"track_kpt_thr": "pose_kpt_thr"}
"""Name that `mmdeploy_runtime` has in Python -> the one that its C API and its program have."""


class TrackerParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How one video is tracked; MMDeploy's names and defaults.

    Attributes:
        det_interval: run the detector in every so many-th frame; 0 and less never do.
        det_label: the class that is tracked.
        det_thr: what a detection has to score more than.
        det_min_bbox_size: least size of a detection: the square root of its area in pixels.
        det_nms_thr: boxes whose IoU reaches it are one.
        pose_max_num_bboxes: most poses in a frame; negative for any number.
        pose_kpt_thr: what a keypoint has to score to count.
        pose_min_keypoints: how many have to; negative for half of them.
        pose_bbox_scale: how much larger than its keypoints a track's box is.
        pose_min_bbox_size: a track's box is used if its size is greater.
        pose_nms_thr: poses that are as much alike are one.
        keypoint_sigmas: (K,) OKS constants to compare poses by; empty compares their boxes in mode "sdk", and takes the bundle's own in "fixed".
        track_iou_thr: boxes whose IoU reaches it may be one track.
        track_max_missing: frames that a track is kept without being seen.
        track_history_size: kept for MMDeploy's sake; it changes nothing there either.
        std_weight_position: noise of positions as a share of the object's size.
        std_weight_velocity: noise of velocities, likewise.
        smooth_params: the One-Euro filter's beta, least cutoff and cutoff of the velocity.
        frame_rate: frames per second; mode "fixed" takes its time step from it.
    """

    det_interval: int = 1
    det_label: int = 0
    det_thr: float = 0.5
    det_min_bbox_size: float = -1.0
    det_nms_thr: float = 0.7
    pose_max_num_bboxes: int = -1
    pose_kpt_thr: float = 0.5
    pose_min_keypoints: int = -1
    pose_bbox_scale: float = 1.25
    pose_min_bbox_size: float = 0.0
    pose_nms_thr: float = 0.5
    keypoint_sigmas: tuple[float, ...] = ()
    track_iou_thr: float = 0.4
    track_max_missing: int = 10
    track_history_size: int = 1
    std_weight_position: float = 0.05
    std_weight_velocity: float = 0.00625
    smooth_params: tuple[float, float, float] = (0.007, 1.0, 1.0)
    frame_rate: Annotated[float, msgspec.Meta(gt=0)] = 30.0

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> TrackerParams:
        """From names and values; `track_kpt_thr` is another name of `pose_kpt_thr`.

        Raises:
            ConfigError: an unknown name, a wrong type, or both names of one parameter.
        """
        known = [field.name for field in msgspec.structs.fields(cls)]
        chosen: dict[str, Any] = {}
        for name, value in params.items():
            own = ALIASES.get(name, name)
            if own not in known:
                near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
                raise ConfigError(
                    f"create_state: expected one of {', '.join(known)}, found {name!r}", hint=f"did you mean {near[0]}?" if near else "see TrackerParams"
                )
            if own in chosen:
                raise ConfigError(f"create_state: expected one of pose_kpt_thr and track_kpt_thr, which are one, found both: {name}")
            chosen[own] = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        try:
            return msgspec.convert(chosen, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"create_state: {error}", hint="the types are those of TrackerParams") from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrackedPoses:
    """Who is seen in one frame, the oldest track first.

    Attributes:
        keypoints_xy: (N, K, 2) float32 in image pixels, smoothed.
        scores: (N, K) float32, of this frame.
        boxes_xyxy: (N, 4) float32 left, top, right, bottom in image pixels: around the keypoints, filtered and smoothed.
        track_ids: (N,) uint32; an id is never used again.
    """

    keypoints_xy: NDArray[np.float32]
    scores: NDArray[np.float32]
    boxes_xyxy: NDArray[np.float32]
    track_ids: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.track_ids)


@dataclass(kw_only=True, slots=True)
class _Track:
    id: int
    motion: MotionFilter
    smoother: Smoother
    scores: Floats
    box: Floats
    keypoints: Floats
    expected_box: Floats
    expected_keypoints: Floats
    missing: int = 0

    def add(self, box: Floats, keypoints: Floats, scores: Floats) -> None:
        """What is reported of this frame."""
        self.scores = scores
        self.box, self.keypoints = self.smoother.step(box, keypoints)


@dataclass(kw_only=True, slots=True, eq=False)
class _Candidates:
    """Boxes to look for a pose in: (N, 4), whose track they are of or -1, and where they come from."""

    boxes: Floats
    owners: list[int]
    kinds: list[int]


@dataclass(kw_only=True, slots=True, eq=False)
class TrackerState:
    """One video: its parameters, its tracks, and how many frames it had. Made by `PoseTracker.create_state`."""

    params: TrackerParams
    mode: Mode
    frames: int = 0
    size_wh: tuple[int, int] = (0, 0)
    next_id: int = 0
    tracks: list[_Track] = field(default_factory=list)

    def wants_detection(self, detect: int = -1, *, frame: int | None = None) -> bool:
        """Whether the detector runs on a frame.

        Args:
            detect: 0 or 1; -1 leaves it to the interval.
            frame: its number, counted from 0; None is the next one.
        """
        interval, number = self.params.det_interval, self.frames if frame is None else frame
        return bool(detect) if detect != -1 else interval > 0 and number % interval == 0

    def candidates(self, size_wh: tuple[int, int], found: Detections | None) -> _Candidates:
        """Where to look for poses in the next frame.

        Args:
            size_wh: of the frame.
            found: the detector's result, if it ran.
        """
        if self.frames == 0 or self.mode == "fixed":
            self.size_wh = size_wh  # the SDK keeps the first frame's
        params = self.params
        boxes: list[Floats] = []
        owners, kinds = [], []
        if found is not None:
            large = areas(found.boxes_xyxy) >= np.float32(params.det_min_bbox_size) ** 2
            for box in found.boxes_xyxy[(found.labels == params.det_label) & (found.scores > np.float32(params.det_thr)) & large]:
                boxes.append(box)
                owners.append(-1)
                kinds.append(_DETECTED)
        smallest = float(params.pose_min_bbox_size) ** 2
        size = np.array([*self.size_wh, *self.size_wh], dtype=np.float32)
        for track in self.tracks:
            box_of = track.expected_box if track.missing else self._keypoint_box(track.expected_keypoints, track.scores)
            if box_of is None:
                continue
            inside = np.clip(box_of, np.float32(0), size)
            if min(inside[2] - inside[0], inside[3] - inside[1]) > 0 and areas(box_of[None])[0] > smallest:
                boxes.append(box_of)
                owners.append(track.id)
                kinds.append(_MISSING if track.missing else _VISIBLE)
        rows = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        ranks = list(zip(kinds, areas(rows).tolist(), strict=True))
        valid = np.ones(len(rows), dtype=bool)
        suppress(ranks, iou(rows, rows), valid, params.det_nms_thr)
        kept = sorted((i for i in range(len(rows)) if valid[i]), key=lambda i: ranks[i], reverse=True)
        if params.pose_max_num_bboxes >= 0:
            kept = kept[: params.pose_max_num_bboxes]
        return _Candidates(boxes=rows[kept], owners=[owners[i] for i in kept], kinds=[kinds[i] for i in kept])

    def _least_keypoints(self, count: int) -> int:
        return self.params.pose_min_keypoints if self.params.pose_min_keypoints >= 0 else (count + 1) // 2

    def _keypoint_box(self, keypoints: Floats, scores: Floats) -> Floats | None:
        params = self.params
        return keypoint_box(
            keypoints, scores, size_wh=self.size_wh, threshold=params.pose_kpt_thr, least=self._least_keypoints(len(scores)), scale=params.pose_bbox_scale
        )

    def update(self, candidates: _Candidates, poses: Poses) -> TrackedPoses:
        """Match the poses that were found in the candidates to the tracks, and move on by one frame.

        Args:
            candidates: as `candidates` gave them.
            poses: one for each.
        """
        keypoints, scores = poses.keypoints_xy, poses.scores
        boxes = [self._keypoint_box(keypoints[i], scores[i]) for i in range(len(scores))]
        free = np.array([box is not None for box in boxes], dtype=bool)
        pose_boxes = np.array([np.zeros(4) if box is None else box for box in boxes], dtype=np.float32).reshape(-1, 4)
        self._suppress_poses(candidates, keypoints, scores, pose_boxes, free)
        by_keypoints, by_boxes = self._similarities(candidates, keypoints, pose_boxes, free)
        before = len(self.tracks)
        visible = np.array([track.missing == 0 for track in self.tracks], dtype=bool)
        unused = visible.copy()
        first = assign(by_keypoints, free, unused, -100.0)
        unused |= ~visible
        second = assign(by_boxes, free, unused, self.params.track_iou_thr)
        for i, j in first:
            track = self.tracks[j]
            box, points = track.motion.correct(pose_boxes[i], keypoints[i])
            track.add(box, points, scores[i])
        for i, j in second:
            track = self.tracks[j]
            track.motion.restart(pose_boxes[i], keypoints[i])
            track.smoother.restart(pose_boxes[i], keypoints[i])
            track.add(pose_boxes[i], keypoints[i], scores[i])
            track.missing = 0
        for i in np.flatnonzero(free).tolist():
            if candidates.owners[i] == -1:
                self._found(pose_boxes[i], keypoints[i], scores[i])
        for j in np.flatnonzero(unused[:before]).tolist():
            track = self.tracks[j]
            track.missing += 1
            if self._is_kept(track):
                track.add(track.expected_box, track.expected_keypoints, np.zeros_like(track.scores))
        self.tracks = [track for track in self.tracks if self._is_kept(track)]
        for track in self.tracks:
            track.expected_box, track.expected_keypoints = track.motion.predict()
        self.frames += 1
        return self._reported(keypoints.shape[1] if keypoints.ndim == 3 else 0)

    def _is_kept(self, track: _Track) -> bool:
        """The SDK compares without a sign: a negative number keeps a track for ever."""
        return self.params.track_max_missing < 0 or track.missing <= self.params.track_max_missing

    def _suppress_poses(self, candidates: _Candidates, keypoints: Floats, scores: Floats, boxes: Floats, free: NDArray[np.bool_]) -> None:
        sigmas = np.array(self.params.keypoint_sigmas, dtype=np.float32)
        similar = oks(keypoints, boxes, sigmas) if len(sigmas) else iou(boxes, boxes)
        missing = {track.id: track.missing for track in self.tracks}
        ranks = [
            (float(owner != -1 and missing[owner] == 0), float(total))
            for owner, total in zip(candidates.owners, scores.sum(axis=1, dtype=np.float32), strict=True)
        ]
        suppress(ranks, similar, free, self.params.pose_nms_thr)

    def _similarities(self, candidates: _Candidates, keypoints: Floats, boxes: Floats, free: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(N, T) of poses and tracks, by keypoints and by boxes; a pose of one track's box is no other's."""
        shape = (len(boxes), len(self.tracks))
        by_keypoints, by_boxes = np.full(shape, _NO_MATCH), np.full(shape, _NO_MATCH)
        if not self.tracks or not len(boxes):
            return by_keypoints, by_boxes
        overlaps = iou(boxes, np.array([track.expected_box for track in self.tracks], dtype=np.float32))
        for i, owner in enumerate(candidates.owners):
            if not free[i]:
                continue
            for j, track in enumerate(self.tracks):
                if owner not in {-1, track.id}:
                    continue
                distances = track.motion.distances(keypoints[i])
                inside = distances[distances < GATE]
                if len(inside) >= max(self._least_keypoints(len(distances)), 0) and len(inside):
                    by_keypoints[i, j] = -(inside.mean(dtype=np.float32) - np.float32(len(inside)) / np.float32(len(distances)))
                by_boxes[i, j] = overlaps[i, j]
        return by_keypoints, by_boxes

    def _found(self, box: Floats, keypoints: Floats, scores: Floats) -> None:
        params, step = self.params, 30.0 / self.params.frame_rate
        motion = MotionFilter(box, keypoints, position=params.std_weight_position, velocity=params.std_weight_velocity, mode=self.mode, step=step)
        smoother = Smoother(box, keypoints, params=params.smooth_params, mode=self.mode, step=step)
        track = _Track(
            id=self.next_id, motion=motion, smoother=smoother, scores=scores, box=box, keypoints=keypoints, expected_box=box, expected_keypoints=keypoints
        )
        track.add(box, keypoints, scores)
        self.tracks.append(track)
        self.next_id += 1

    def _reported(self, count: int) -> TrackedPoses:
        seen = [track for track in self.tracks if track.missing == 0]
        if not seen:
            count = 0 if not self.tracks else count
            return TrackedPoses(
                keypoints_xy=np.zeros((0, count, 2), dtype=np.float32), scores=np.zeros((0, count), dtype=np.float32),
                boxes_xyxy=np.zeros((0, 4), dtype=np.float32), track_ids=np.zeros(0, dtype=np.uint32),
            )  # fmt: skip
        return TrackedPoses(
            keypoints_xy=np.array([track.keypoints for track in seen], dtype=np.float32),
            scores=np.array([track.scores for track in seen], dtype=np.float32),
            boxes_xyxy=np.array([track.box for track in seen], dtype=np.float32),
            track_ids=np.array([track.id for track in seen], dtype=np.uint32),
        )


class PoseTracker:
    """Tracks people, or whatever the detector finds, through videos; one of these serves any number of them.

    Attributes:
        detector: finds them.
        estimator: finds their keypoints.
        mode: "fixed", or "sdk" for the SDK's results, frame for frame.
        seconds: detect, pose and track -> time spent in it so far.
    """

    State = TrackerState

    def __init__(
        self,
        det_model: str | os.PathLike[str] | Bundle,
        pose_model: str | os.PathLike[str] | Bundle,
        device_name: str = "",
        device_id: int = 0,
        *,
        mode: Mode = "fixed",
        threads: int | None = None,
        verify: bool = True,
        warmup: int = 0,
    ) -> None:
        """Load both bundles.

        Args:
            det_model: a detector's bundle.
            pose_model: a pose estimator's.
            device_name: as for `Detector`.
            device_id: likewise.
            mode: "fixed" without the SDK's faults, see `modelcrate_runtime.tracking`, and with exact crops; "sdk" with both.
            threads: threads inside one operator; None is one per usable core.
            verify: whether to compare the files with the manifests' hashes first.
            warmup: network calls on zeros before the constructor returns.

        Raises:
            ConfigError: another mode.
            BundleError: see `Bundle.open`.
            TaskMismatchError: bundles of other tasks.
        """
        if mode not in {"sdk", "fixed"}:
            raise ConfigError(f"mode: expected 'fixed' or 'sdk', found {mode!r}")
        self.mode: Mode = mode
        self.seconds: dict[str, float] = dict.fromkeys(("detect", "pose", "track"), 0.0)
        geometry: Geometry | None = "sdk" if mode == "sdk" else None
        self.detector = Detector(det_model, device_name, device_id, geometry=geometry, threads=threads, verify=verify, warmup=warmup)
        try:
            self.estimator = PoseDetector(pose_model, device_name, device_id, geometry=geometry, threads=threads, verify=verify, warmup=warmup)
        except BaseException:
            self.detector.close()
            raise
        self._device = device_name or BACKENDS[self.estimator.bundle.model.backend].device

    @property
    def is_on_gpu(self) -> bool:
        """Whether its networks run on a GPU, so that the processor is free meanwhile."""
        return self._device == "cuda"

    def create_state(self, **params: Any) -> TrackerState:
        """A new video.

        Args:
            params: see `TrackerParams`; `mmdeploy_runtime`'s `track_kpt_thr` as well.

        Raises:
            ConfigError: an unknown parameter, a wrong type, or another number of sigmas than keypoints.
        """
        chosen = TrackerParams.of(params)
        sigmas, count = len(chosen.keypoint_sigmas), self.estimator.keypoint_count
        if sigmas and count and sigmas != count:
            raise ConfigError(f"keypoint_sigmas: expected {count}, one for each keypoint, found {sigmas}")
        manifest = self.estimator.bundle.manifest
        if self.mode == "fixed" and not sigmas and manifest is not None and manifest.keypoints is not None:
            chosen = msgspec.structs.replace(chosen, keypoint_sigmas=tuple(manifest.keypoints.sigmas))
        return TrackerState(params=chosen, mode=self.mode)

    def __call__(self, state: TrackerState, frame: Image, detect: int = -1) -> tuple[Floats, Floats, NDArray[np.uint32]]:
        """Track, as `mmdeploy_runtime.PoseTracker` does.

        Args:
            state: of this video.
            frame: (H, W, 3) BGR or (H, W) grey, uint8.
            detect: whether to run the detector; -1 leaves it to `det_interval`.

        Returns:
            keypoints (N, K, 3) float32 with x and y in image pixels and the score; boxes (N, 4); track ids (N,) uint32.
        """
        return _as_mmdeploy(self.track(state, frame, detect))

    def batch(self, states: Sequence[TrackerState], frames: Sequence[Image], detects: Sequence[int] = ()) -> list[tuple[Floats, Floats, NDArray[np.uint32]]]:
        """`__call__` for one frame of each of several videos, in as few network calls as possible."""
        return [_as_mmdeploy(tracked) for tracked in self.track_batch(states, frames, detects)]

    def track(self, state: TrackerState, frame: Image, detect: int = -1, *, found: Detections | None = None) -> TrackedPoses:
        """Track one frame; the arguments are those of `__call__`.

        Args:
            state: of this video.
            frame: as there.
            detect: as there.
            found: what the detector found in this frame, where it ran already: see `detect_ahead`.

        Raises:
            InputError: not such an image.
        """
        return self.track_batch([state], [frame], [detect], founds=[found])[0]

    def detect_ahead(self, frame: Image) -> Detections:
        """Run the detector on a frame whose turn has not come, in another thread than the one that tracks.

        It needs nothing of the frames before, and takes its share of the threads alone.

        Raises:
            InputError: not such an image.
        """
        start = time.perf_counter()
        found = self.detector.detect_batch([frame], beside=True)[0]
        self.seconds["detect"] += time.perf_counter() - start
        return found

    def track_batch(
        self, states: Sequence[TrackerState], frames: Sequence[Image], detects: Sequence[int] = (), *, founds: Sequence[Detections | None] = ()
    ) -> list[TrackedPoses]:
        """Track one frame of each of several videos.

        Args:
            states: of different videos.
            frames: one of each.
            detects: for each whether to run the detector; empty leaves it to their intervals.
            founds: for each what the detector found already, or None; empty for none.

        Raises:
            InputError: not such images, another number of them, or one video twice.
        """
        wanted = list(detects) or [-1] * len(states)
        if not len(states) == len(frames) == len(wanted):
            raise InputError(f"expected as many frames as states, found {len(frames)} and {len(states)}" + (f", and {len(detects)} detects" if detects else ""))
        if len({id(state) for state in states}) != len(states):
            raise InputError("expected different videos, found one of them twice", hint="their frames come one after another")
        found = {i: one for i, one in enumerate(founds) if one is not None}
        chosen = [i for i, state in enumerate(states) if i not in found and state.wants_detection(wanted[i])]
        times = [time.perf_counter()]
        if chosen:
            found |= zip(chosen, self.detector.detect_batch([frames[i] for i in chosen]), strict=True)
        times.append(time.perf_counter())
        candidates = [state.candidates((frame.shape[1], frame.shape[0]), found.get(i)) for i, (state, frame) in enumerate(zip(states, frames, strict=True))]
        boxes = [self._rectangles(of_frame.boxes) for of_frame in candidates]
        times.append(time.perf_counter())
        busy = [i for i, of_frame in enumerate(boxes) if len(of_frame)]
        poses = dict(zip(busy, self.estimator.estimate_batch([frames[i] for i in busy], [boxes[i] for i in busy]), strict=True)) if busy else {}
        times.append(time.perf_counter())
        results = [state.update(candidates[i], poses[i] if i in poses else self._none()) for i, state in enumerate(states)]
        times.append(time.perf_counter())
        for stage, seconds in zip(("detect", "track", "pose", "track"), np.diff(times).tolist(), strict=True):
            self.seconds[stage] += seconds
        return results

    def _rectangles(self, boxes: Floats) -> Floats:
        """What the pose estimator gets: the SDK's tracker rounds to whole pixels, and its estimator takes a box to be one pixel larger."""
        if self.mode == "fixed":
            return boxes
        corner = np.rint(np.minimum(boxes[:, :2], boxes[:, 2:]))
        sides = np.rint(np.abs(boxes[:, 2:] - boxes[:, :2]))
        return np.concatenate([corner, corner + sides - np.float32(1)], axis=1)

    def _none(self) -> Poses:
        count = self.estimator.keypoint_count
        return Poses(keypoints_xy=np.zeros((0, count, 2), dtype=np.float32), scores=np.zeros((0, count), dtype=np.float32))

    def close(self) -> None:
        """Free both networks."""
        self.detector.close()
        self.estimator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _as_mmdeploy(tracked: TrackedPoses) -> tuple[Floats, Floats, NDArray[np.uint32]]:
    if not len(tracked):
        return np.zeros((0, 0, 3), dtype=np.float32), np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.uint32)
    keypoints: Floats = np.concatenate([tracked.keypoints_xy, tracked.scores[:, :, None]], axis=2)
    return keypoints, tracked.boxes_xyxy, tracked.track_ids
