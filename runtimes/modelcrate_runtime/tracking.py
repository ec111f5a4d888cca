"""The mathematics of the pose tracker: boxes and poses that are alike, Kalman filters, smoothing. Everything is float32, as in MMDeploy's SDK.

`sdk` is what MMDeploy 1.x's SDK computes, faults included; `fixed` is the same design without them:

- the SDK's gate for keypoints is always empty, so that it never filters one; here those inside it are corrected and the others start again;
- it keeps old covariances between position and velocity when it starts a keypoint again, which opens the gate wider with every frame; here they are cleared;
- when a lost track is found again it puts the box into the smoother's velocities; here into its positions;
- it takes signed speeds of width and height for their size, which smooths what shrinks more than what grows; here their magnitudes;
- its time step is one frame, whatever the frame rate; here it is in units of 1/30 s;
- its smoother forgets the velocity that it has, and is always behind what moves; here it starts from where that velocity leads.

Source: mmdeploy-sdk-spec, section 4; the One-Euro filter is Casiez, Roussel and Vogel, CHI 2012.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[Any]  # of float32, which arithmetic loses in NumPy's stubs
    Mask = NDArray[np.bool_]

Mode: TypeAlias = Literal["sdk", "fixed"]

GATE: Final = np.float32(5.9915)
"""95 % of a chi-squared distribution of two degrees of freedom: a keypoint whose squared distance is below it may be the predicted one."""
_PI: Final = np.float32(3.1415926)
_F: Final = np.float32


def areas(boxes: Floats) -> Floats:
    """(N,) of (N, 4) left, top, right, bottom."""
    result: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return result


def iou(a: Floats, b: Floats) -> Floats:
    """(N, M) intersections over unions of (N, 4) and (M, 4) boxes; 0 where the union is empty."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, _F(0))
    shared: Floats = sides[..., 0] * sides[..., 1]
    union = areas(a)[:, None] + areas(b)[None] - shared
    ratio: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)
    return ratio


def oks(keypoints: Floats, boxes: Floats, sigmas: Floats) -> Floats:
    """(N, N) object keypoint similarities of (N, K, 2) poses with (N, 4) boxes; the scale of two is the mean of their boxes' diagonals."""
    diagonals = np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    scale = (diagonals[:, None] + diagonals[None]) / _F(2)
    squared = ((keypoints[:, None] - keypoints[None]) ** 2).sum(axis=3)
    with np.errstate(divide="ignore", invalid="ignore"):
        similar: Floats = np.exp(-squared / (_F(2) * (scale[:, :, None] * sigmas) ** 2)).mean(axis=2, dtype=np.float32)
    return similar


def keypoint_box(keypoints: Floats, scores: Floats, *, size_wh: tuple[int, int], threshold: float, least: int, scale: float) -> Floats | None:
    """The box around the keypoints that count, inflated about its middle and clipped to the frame; None with fewer than `least` of them.

    Args:
        keypoints: (K, 2) in image pixels.
        scores: (K,).
        size_wh: of the frame.
        threshold: what a keypoint has to score.
        least: how many have to.
        scale: how much larger the box becomes.
    """
    seen = keypoints[scores >= _F(threshold)]
    if len(seen) < least:
        return None
    size = np.array(size_wh, dtype=np.float32)
    low = np.minimum(seen.min(axis=0, initial=np.inf), size)
    high = np.maximum(seen.max(axis=0, initial=-np.inf), _F(0))
    middle, half = (low + high) / _F(2), (high - low) * _F(scale) / _F(2)
    low, high = np.clip(middle - half, _F(0), size), np.clip(middle + half, _F(0), size)
    box: Floats = np.concatenate([low, high]).astype(np.float32)
    return box


def suppress(ranks: Sequence[tuple[float, ...]], similar: Floats, valid: Mask, threshold: float) -> None:
    """Greedy suppression in place: whoever is like one of higher rank is not valid any more."""
    order = sorted(range(len(ranks)), key=lambda i: ranks[i], reverse=True)
    for at, i in enumerate(order):
        if valid[i]:
            for j in order[at + 1 :]:
                if similar[i, j] >= _F(threshold):
                    valid[j] = False


def assign(scores: Floats, rows: Mask, columns: Mask, threshold: float) -> list[tuple[int, int]]:
    """Greedy assignment: the best pair of what is free, again and again, while it reaches the threshold. What is taken is not free any more."""
    pairs = []
    free = np.where(rows[:, None] & columns[None], scores, _F(-np.inf))
    while free.size:
        i, j = divmod(int(np.argmax(free)), free.shape[1])
        if not free[i, j] >= _F(threshold):
            break
        pairs.append((i, j))
        rows[i] = columns[j] = False
        free[i, :] = free[:, j] = -np.inf
    return pairs


def box_as_state(box: Floats) -> Floats:
    """Left, top, right, bottom as middle x, middle y, width, height."""
    state: Floats = np.array([(box[0] + box[2]) / _F(2), (box[1] + box[3]) / _F(2), box[2] - box[0], box[3] - box[1]], dtype=np.float32)
    return state


def state_as_box(state: Floats) -> Floats:
    """The reverse of `box_as_state`."""
    half = state[2:] / _F(2)
    box: Floats = np.concatenate([state[:2] - half, state[:2] + half]).astype(np.float32)
    return box


@dataclass(slots=True)
class _Covariance:
    """Of a position and its velocity, alike in all axes: (K,) variances of both, and what they have in common."""

    position: Floats
    shared: Floats
    velocity: Floats

    @classmethod
    def start(cls, count: int, position: np.float32, velocity: np.float32) -> _Covariance:
        full: Floats = np.ones(count, dtype=np.float32)
        return cls(position=full * position, shared=full * _F(0), velocity=full * velocity)

    def predict(self, step: np.float32, noise_position: np.float32, noise_velocity: np.float32) -> None:
        moved: Floats = step * (_F(2) * self.shared + step * self.velocity)
        self.position = self.position + moved + noise_position
        self.shared = self.shared + step * self.velocity
        self.velocity = self.velocity + noise_velocity

    def correct(self, which: Mask, noise: np.float32) -> tuple[Floats, Floats]:
        """Gains of position and velocity, (K, 1) each; zero where `which` is not."""
        spread = self.position + noise
        inverse = np.divide(which, spread, out=np.zeros_like(spread), where=spread != 0)
        of_position, of_velocity = self.position * inverse, self.shared * inverse
        self.velocity = self.velocity - of_velocity * self.shared
        self.shared = self.shared - of_position * self.shared
        self.position = self.position - of_position * self.position
        return of_position[:, None], of_velocity[:, None]


class _BoxFilter:
    """The box's filter: middle, size and their velocities, all axes alike."""

    def __init__(self, state: Floats, position: np.float32, velocity: np.float32) -> None:
        self.state = state
        self._velocity = np.zeros(4, dtype=np.float32)
        self._covariance = _Covariance.start(4, position**2, velocity**2)

    def predict(self, step: np.float32, position: np.float32, velocity: np.float32) -> None:
        self.state = self.state + step * self._velocity
        self._covariance.predict(step, position**2 * step, velocity**2 * step)

    def correct(self, measured: Floats, position: np.float32) -> None:
        gain, velocity_gain = self._covariance.correct(np.ones(4, dtype=bool), position**2)
        error = measured - self.state
        self.state = self.state + gain[:, 0] * error
        self._velocity = self._velocity + velocity_gain[:, 0] * error


class _OpenCvBoxFilter:
    """The same in OpenCV's own arithmetic, which is the SDK's: boxes are rounded to pixels, and a last digit decides where half a pixel goes."""

    def __init__(self, state: Floats, position: np.float32, velocity: np.float32) -> None:
        self._filter = cv2.KalmanFilter(8, 4, 0, cv2.CV_32F)
        self._filter.transitionMatrix = np.eye(8, dtype=np.float32) + np.eye(8, k=4, dtype=np.float32)
        self._filter.measurementMatrix = np.eye(4, 8, dtype=np.float32)
        self._filter.errorCovPost = _diagonal(position, velocity)
        self._filter.statePost = np.concatenate([state, np.zeros(4, dtype=np.float32)])[:, None]

    @property
    def state(self) -> Floats:
        state: Floats = self._filter.statePost[:4, 0].astype(np.float32)
        return state

    def predict(self, step: np.float32, position: np.float32, velocity: np.float32) -> None:
        del step  # one frame
        self._filter.processNoiseCov = _diagonal(position, velocity)
        self._filter.predict()

    def correct(self, measured: Floats, position: np.float32) -> None:
        self._filter.measurementNoiseCov = np.eye(4, dtype=np.float32) * (position * position)
        self._filter.correct(measured[:, None])


def _diagonal(position: np.float32, velocity: np.float32) -> Floats:
    matrix: Floats = np.diag(np.repeat(np.array([position * position, velocity * velocity], dtype=np.float32), 4))
    return matrix


class MotionFilter:
    """Kalman filters with constant velocity: one for the box (middle and size), one for each keypoint.

    Their noise is a share of the object's size, the square root of its box's area.

    Args:
        box: (4,) left, top, right, bottom.
        keypoints: (K, 2).
        position: noise of a position, as a share of the size.
        velocity: noise of a velocity, likewise.
        mode: see the module.
        step: time from frame to frame, in 1/30 s; one frame for `sdk`.
    """

    def __init__(self, box: Floats, keypoints: Floats, *, position: float, velocity: float, mode: Mode, step: float = 1.0) -> None:
        self._position, self._velocity = _F(position), _F(velocity)
        self._mode = mode
        self._step = _F(1 if mode == "sdk" else step)
        self.restart(box, keypoints)

    def restart(self, box: Floats, keypoints: Floats) -> None:
        """A track that was lost is found here."""
        state = box_as_state(box)
        size = self._size_of(state)
        position, velocity = _F(2) * self._position * size, _F(10) * self._velocity * size
        self._box: _BoxFilter | _OpenCvBoxFilter = (_OpenCvBoxFilter if self._mode == "sdk" else _BoxFilter)(state, position, velocity)
        self._points: Floats = keypoints.astype(np.float32)
        self._points_velocity: Floats = np.zeros_like(self._points)
        self._covariance = _Covariance.start(len(keypoints), position**2, velocity**2)

    def _size(self) -> np.float32:
        return self._size_of(self._box.state)

    def _size_of(self, state: Floats) -> np.float32:
        """The square root of the area; at least a pixel in `fixed`, where noise without a size would fix a track to its place."""
        _, _, width, height = state
        if self._mode == "fixed":
            return np.float32(np.sqrt(max(width, _F(1)) * max(height, _F(1))))
        with np.errstate(invalid="ignore"):
            return np.float32(np.sqrt(width * height))

    def predict(self) -> tuple[Floats, Floats]:
        """Move on by one frame; returns the (4,) box and (K, 2) keypoints that are expected there."""
        size = self._size()
        position, velocity = self._position * size, self._velocity * size
        self._points = self._points + self._step * self._points_velocity
        self._covariance.predict(self._step, position**2 * self._step, velocity**2 * self._step)
        self._box.predict(self._step, position, velocity)
        return state_as_box(self._box.state), self._points.copy()

    def distances(self, keypoints: Floats) -> Floats:
        """(K,) squared Mahalanobis distances of measured keypoints from the expected ones."""
        spread = self._covariance.position + (self._position * self._size()) ** 2
        squared: Floats = ((keypoints - self._points) ** 2).sum(axis=1)
        ratio: Floats = np.divide(squared, spread, out=np.zeros_like(squared), where=spread != 0)
        return ratio

    def correct(self, box: Floats, keypoints: Floats) -> tuple[Floats, Floats]:
        """Take a measurement in; returns the filtered (4,) box, and the (K, 2) keypoints: measured ones in `sdk`, filtered ones in `fixed`."""
        size = self._size()
        position = self._position * size
        inside = self.distances(keypoints) < GATE if self._mode == "fixed" else np.zeros(len(keypoints), dtype=bool)
        gain, velocity_gain = self._covariance.correct(inside, position**2)
        error = keypoints - self._points
        self._points = np.where(inside[:, None], self._points + gain * error, keypoints)
        self._covariance.position[~inside] = (_F(2) * position) ** 2
        self._covariance.velocity[~inside] = (_F(10) * self._velocity * size) ** 2
        if self._mode == "fixed":
            self._points_velocity = np.where(inside[:, None], self._points_velocity + velocity_gain * error, _F(0))
            self._covariance.shared[~inside] = 0
        self._box.correct(box_as_state(box), position)
        return state_as_box(self._box.state), self._points.copy()


@dataclass(slots=True)
class _Euro:
    """One-Euro filters of vectors, side by side: (N, D) positions and velocities."""

    x: Floats
    v: Floats
    measured: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.measured = self.x

    def step(self, x: Floats, cutoffs: _Cutoffs, *, mode: Mode, signed: bool) -> Floats:
        """One frame; `signed` takes a speed that is one number with its sign."""
        dt = cutoffs.dt
        start = self.x if mode == "sdk" else self.x + self.v * dt
        keep = _share(cutoffs.of_velocity, dt)
        # From what was measured: how far the filter is behind, divided by the time step, would be another velocity at another frame rate.
        self.v = (_F(1) - keep) * self.v + keep * ((x - (self.x if mode == "sdk" else self.measured)) / dt)
        self.measured = x
        speed = self.v[:, 0] if signed else np.sqrt((self.v**2).sum(axis=1))
        take = _shares(cutoffs.least + cutoffs.beta * speed, dt)[:, None]
        self.x = (_F(1) - take) * start + take * x
        return self.x


@dataclass(frozen=True, slots=True)
class _Cutoffs:
    """How a One-Euro filter's cutoff grows with the speed, its least one, that of the velocity, and the time step."""

    beta: np.float32
    least: np.float32
    of_velocity: np.float32
    dt: np.float32


def _share(cutoff: np.float32, dt: np.float32) -> np.float32:
    angle = _F(2) * _PI * cutoff * dt
    return np.float32(angle / (angle + _F(1)))


def _shares(cutoffs: Floats, dt: np.float32) -> Floats:
    angles: Floats = _F(2) * _PI * cutoffs * dt
    return angles / (angles + _F(1))


class Smoother:
    """One-Euro filters over what is reported: keypoints and the box's middle as vectors, its width and height as numbers.

    Args:
        box: (4,) left, top, right, bottom.
        keypoints: (K, 2).
        params: (beta, least cutoff, cutoff of the velocity).
        mode: see the module.
        step: as for `MotionFilter`.
    """

    def __init__(self, box: Floats, keypoints: Floats, *, params: Sequence[float], mode: Mode, step: float = 1.0) -> None:
        beta, least, of_velocity = (_F(value) for value in params)
        self._cutoffs = _Cutoffs(beta, least, of_velocity, _F(1 if mode == "sdk" else step))
        self._mode: Mode = mode
        state = box_as_state(box)
        self._points = _Euro(keypoints.astype(np.float32), np.zeros_like(keypoints, dtype=np.float32))
        self._middle = _Euro(state[None, :2], np.zeros((1, 2), dtype=np.float32))
        self._sides = _Euro(state[2:, None], np.zeros((2, 1), dtype=np.float32))

    def restart(self, box: Floats, keypoints: Floats) -> None:
        """A track that was lost is found here."""
        state = box_as_state(box)
        self._points = _Euro(keypoints.astype(np.float32), np.zeros_like(keypoints, dtype=np.float32))
        middle, sides = state[None, :2], state[2:, None]
        if self._mode == "sdk":
            self._middle.v, self._sides.v = middle, sides
        else:
            self._middle, self._sides = _Euro(middle, np.zeros_like(middle)), _Euro(sides, np.zeros_like(sides))

    def step(self, box: Floats, keypoints: Floats) -> tuple[Floats, Floats]:
        """Smooth one frame's (4,) box and (K, 2) keypoints."""
        state = box_as_state(box)
        points = self._points.step(keypoints, self._cutoffs, mode=self._mode, signed=False)
        middle = self._middle.step(state[None, :2], self._cutoffs, mode=self._mode, signed=False)
        sides = self._sides.step(state[2:, None], self._cutoffs, mode=self._mode, signed=self._mode == "sdk")
        return state_as_box(np.concatenate([middle[0], sides[:, 0]])), points.copy()
