"""Images of procedural people on cluttered backgrounds, with the ground truth that only a painter has: every keypoint, seen or hidden, to the pixel.

A scene is a function of (seed, index, size): the same on every machine with the same OpenCV.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import cv2
import numpy as np

from modelcrate_converter.people.body import INDEX, Pose, joints_in_view, sample_pose
from modelcrate_converter.people.drawing import OCCLUDER, PART, PARTS_PER_PERSON, Image, Look, paint
from modelcrate_runtime.skeletons import COCO_17

if TYPE_CHECKING:
    from numpy.typing import NDArray

DATA_VERSION: Final = "people-1"
"""Changes when the same seed draws something else; models say which data they were trained on."""
MAX_PEOPLE: Final = 7
"""The part map has room for no more."""

Points: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Person:
    """What is true of one person in a scene.

    Attributes:
        box_xyxy: (4,) float32 left, top, right, bottom of what is seen of the person, in pixels; right and bottom exclusive.
        keypoints: (17, 3) float32 COCO keypoints: x, y in pixels and the visibility: 2 seen, 1 hidden, 0 outside the image (x and y are 0).
        area: pixels that are seen.
        share_seen: `area` over what would be seen if nobody and nothing stood in front.
        pose: the kind of pose.
        identity: the same number for the same person in all frames of a video.
    """

    box_xyxy: NDArray[np.float32]
    keypoints: NDArray[np.float32]
    area: int
    share_seen: float
    pose: str
    identity: int

    @property
    def is_hard(self) -> bool:
        """Whether so little is seen that data sets should not count the person (COCO: `iscrowd`)."""
        return self.share_seen < 0.2 or self.area < 60


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """One image and everyone in it.

    Attributes:
        image: (H, W, 3) BGR uint8.
        people: farthest first; those of whom nothing is seen are left out.
    """

    image: Image
    people: list[Person]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Figure:
    """A person who has been posed and placed, before painting.

    Attributes:
        look: the person's.
        pose: the person's.
        joints: (len(JOINTS), 3) x and y in pixels, z towards the viewer in pixels.
        identity: number of the person.
    """

    look: Look
    pose: Pose
    joints: Points
    identity: int

    @classmethod
    def placed(cls, look: Look, pose: Pose, *, center_xy: tuple[float, float], height_px: float, identity: int = 0) -> Figure:
        """Put the middle of the figure's extent at a place.

        Args:
            look: the person's.
            pose: the person's.
            center_xy: in pixels.
            height_px: standing height in pixels.
            identity: number of the person.
        """
        joints = joints_in_view(look.build, pose)
        # A weak perspective: what is nearer is a little larger.
        joints[:, :2] *= 1 + 0.18 * joints[:, 2:]
        joints *= height_px
        low, high = joints[:, :2].min(axis=0), joints[:, :2].max(axis=0)
        joints[:, :2] += np.array(center_xy) - (low + high) / 2
        return cls(look=look, pose=pose, joints=joints, identity=identity)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the joints in pixels."""
        (left, top), (right, bottom) = self.joints[:, :2].min(axis=0).tolist(), self.joints[:, :2].max(axis=0).tolist()
        return left, top, right, bottom


def draw_scene(seed: int, index: int = 0, *, size_hw: tuple[int, int] = (320, 320), people: tuple[int, int] = (1, 6)) -> Scene:
    """Draw one scene.

    Args:
        seed: of the data set.
        index: of the scene in it.
        size_hw: (height, width) in pixels.
        people: least and most people, at most `MAX_PEOPLE`.

    Returns:
        The scene: the same for the same arguments.
    """
    rng = np.random.default_rng((seed, index))
    canvas = draw_background(rng, size_hw)
    figures = _place(rng, size_hw, int(rng.integers(people[0], people[1] + 1)))
    angle = rng.uniform(-math.pi, 0)
    return finish(rng, canvas, figures, light=np.array((math.cos(angle), math.sin(angle))))


def procedural_scenes(count: int = 3, *, size_hw: tuple[int, int] = (480, 640)) -> list[tuple[str, Image, NDArray[np.float32]]]:
    """Scenes with somebody to see in each, always the same ones: what artefacts are compared on when no image is given.

    Args:
        count: how many.
        size_hw: (height, width) in pixels.

    Returns:
        For each scene its name, the (H, W, 3) BGR uint8 image and the (4,) float32 box of the person of whom most is seen.
    """
    found: list[tuple[str, Image, NDArray[np.float32]]] = []
    index = 0
    while len(found) < count:
        scene = draw_scene(_EXAMPLES_SEED, index, size_hw=size_hw, people=(1, 3))
        index += 1
        people = [person for person in scene.people if person.share_seen > 0.8]
        if people:
            best = max(people, key=lambda person: person.area)
            found.append((f"procedural-{len(found)}", scene.image, best.box_xyxy))
    return found


_EXAMPLES_SEED: Final = 0


def finish(rng: np.random.Generator, canvas: Image, figures: list[Figure], *, light: Points, occluders: bool = True, frame: int = 0) -> Scene:
    """Paint figures onto a background, put things in front of them, and photograph it all.

    Args:
        rng: for things and camera: the same state gives the same camera.
        canvas: (H, W, 3) BGR uint8, changed in place.
        figures: farthest first.
        light: (2,) unit vector in the image from which light comes.
        occluders: whether things may stand in front of people.
        frame: of a video: the grain changes from one to the next.
    """
    parts = np.zeros(canvas.shape[:2], dtype=np.uint8)
    ambient = float(rng.uniform(0.7, 1.1))
    alone = []
    for person, figure in enumerate(figures):
        _shadow(canvas, figure)
        # What is painted first is hidden by what follows: each is counted as it is painted.
        paint(canvas, parts, figure.joints, look=figure.look, person=person, light=light, ambient=ambient)
        alone.append(cv2.countNonZero(_mask(parts, person)))
    if occluders and rng.random() < 0.35:
        _occlude(rng, canvas, parts, figures)
    found = [_truth(parts, figure, person, alone[person]) for person, figure in enumerate(figures)]
    return Scene(image=_photograph(rng, canvas, frame=frame), people=[person for person in found if person is not None])


# ------------------------------------------------------------------------------------------------------------------ placement


def _place(rng: np.random.Generator, size_hw: tuple[int, int], count: int) -> list[Figure]:
    """People of similar distance, some partly outside, who may overlap but do not stand in each other."""
    height, width = size_hw
    figures: list[Figure] = []
    # The height of the image that a standing person takes: groups are seen from farther away.
    usual = float(np.exp(rng.uniform(math.log(0.28), math.log(0.95 if count <= 2 else 0.62))))
    for identity in range(count):
        look, pose = Look.sample(rng), sample_pose(rng)
        for _ in range(8):
            height_px = min(height, width) * usual * float(rng.uniform(0.8, 1.25))
            center = (float(rng.uniform(-0.02, 1.02)) * width, float(rng.uniform(0.2, 0.9)) * height)
            figure = Figure.placed(look, pose, center_xy=center, height_px=height_px, identity=identity)
            if _inside(figure, size_hw) > 0.45 and all(_overlap(figure.extent, other.extent) < 0.35 for other in figures):
                figures.append(figure)
                break
    # Whoever stands lower in the image is nearer.
    return sorted(figures, key=lambda f: f.extent[3])


def _inside(figure: Figure, size_hw: tuple[int, int]) -> float:
    """The share of the joints inside the image."""
    x, y = figure.joints[:, 0], figure.joints[:, 1]
    return float(((x >= 0) & (x < size_hw[1]) & (y >= 0) & (y < size_hw[0])).mean())


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over the smaller of the two."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / max(1.0, min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])))


# ---------------------------------------------------------------------------------------------------------------------- truth

_SEEN_ON: Final = {
    "nose": ("head",), "left_eye": ("head",), "right_eye": ("head",), "left_ear": ("head",), "right_ear": ("head",),
    "left_shoulder": ("left_upper_arm", "torso"), "right_shoulder": ("right_upper_arm", "torso"),
    "left_elbow": ("left_upper_arm", "left_forearm"), "right_elbow": ("right_upper_arm", "right_forearm"),
    "left_wrist": ("left_forearm", "left_hand"), "right_wrist": ("right_forearm", "right_hand"),
    "left_hip": ("left_thigh", "torso"), "right_hip": ("right_thigh", "torso"),
    "left_knee": ("left_thigh", "left_shank"), "right_knee": ("right_thigh", "right_shank"),
    "left_ankle": ("left_shank", "left_foot"), "right_ankle": ("right_shank", "right_foot"),
}  # fmt: skip
_KEYPOINT_JOINTS: Final = np.array([INDEX[name] for name in COCO_17.names])
_TABLE: Final = np.zeros((len(COCO_17.names), 256), dtype=bool)
for _row, _name in enumerate(COCO_17.names):
    for _part in _SEEN_ON[_name]:
        _TABLE[_row, PART[_part]] = True
_BEHIND_TORSO: Final = np.array([name.endswith(("shoulder", "hip")) for name in COCO_17.names])
_ON_FACE: Final = np.array([_SEEN_ON[name] == ("head",) for name in COCO_17.names])


def _mask(parts: Image, person: int) -> Image:
    """(H, W) uint8, not zero where the person is seen."""
    return cv2.inRange(parts, person * PARTS_PER_PERSON + 1, person * PARTS_PER_PERSON + PARTS_PER_PERSON - 2)  # type: ignore[return-value]


def _truth(parts: Image, figure: Figure, person: int, alone: int) -> Person | None:
    """What the part map says of one person; None where nothing is seen."""
    base = person * PARTS_PER_PERSON
    mask = _mask(parts, person)
    area = cv2.countNonZero(mask)
    if not area:
        return None
    left, top, width, height = cv2.boundingRect(mask)
    joints = figure.joints[_KEYPOINT_JOINTS]
    x, y, depth = joints.T
    columns, rows = np.floor(x + 0.5).astype(int), np.floor(y + 0.5).astype(int)
    inside = (columns >= 0) & (columns < parts.shape[1]) & (rows >= 0) & (rows < parts.shape[0])
    under = parts[np.where(inside, rows, 0), np.where(inside, columns, 0)]
    own = (under >= base + 1) & (under < base + PARTS_PER_PERSON)
    seen = inside & own & _TABLE[np.arange(len(joints)), np.where(own, under - base, 0)]
    # Shoulders and hips on the far side of the torso, eyes and ears on the far side of the head are under paint of the right part.
    height_px = float(np.sqrt(((figure.joints[INDEX["neck"]] - figure.joints[INDEX["pelvis"]]) ** 2).sum())) / figure.look.build.torso
    torso_depth = float((figure.joints[INDEX["neck"], 2] + figure.joints[INDEX["pelvis"], 2]) / 2)
    is_torso = under == base + PART["torso"]
    seen &= ~(_BEHIND_TORSO & is_torso & (depth < torso_depth - 0.045 * height_px))
    head_depth = float(figure.joints[INDEX["head"], 2])
    seen &= ~(_ON_FACE & (depth < head_depth - 0.1 * figure.look.build.head * height_px))
    keypoints = np.stack([x, y, np.where(seen, 2, 1)], axis=1)
    keypoints[~inside] = 0
    return Person(
        box_xyxy=np.array((left, top, left + width, top + height), dtype=np.float32),
        keypoints=keypoints.astype(np.float32),
        area=area,
        share_seen=min(1.0, area / max(1, alone)),
        pose=figure.pose.name,
        identity=figure.identity,
    )


# ----------------------------------------------------------------------------------------------------------- what is around them

_NOISE: list[Image] = []


def _fractal_noise() -> list[Image]:
    """Eight (640, 640) uint8 textures, each the sum of noise at six scales."""
    if not _NOISE:
        rng = np.random.default_rng(3)
        for _ in range(8):
            total = np.zeros((640, 640), dtype=np.float32)
            roughness = float(rng.uniform(0.5, 0.9))
            for octave in range(2, 8):
                grid = rng.standard_normal((2**octave + 3, 2**octave + 3)).astype(np.float32)
                total += cv2.resize(grid, (640, 640), interpolation=cv2.INTER_CUBIC) * roughness**octave
            total -= total.min()
            _NOISE.append((total * (255 / total.max())).astype(np.uint8))
    return _NOISE


def draw_background(rng: np.random.Generator, size_hw: tuple[int, int]) -> Image:
    """(H, W, 3) BGR uint8: two fields of coloured fractal noise with a horizon, and clutter: boxes, discs, bars, limb-like rods, polygons."""
    height, width = size_hw
    canvas = _texture(rng, size_hw)
    if rng.random() < 0.7:
        horizon = int(height * rng.uniform(0.35, 0.85))
        canvas[horizon:] = _texture(rng, (height - horizon, width))
    unit = min(height, width)
    for _ in range(int(rng.integers(2, 22))):
        color = tuple(rng.uniform(10, 245, 3).tolist())
        kind = rng.random()
        x, y, size = float(rng.uniform(-0.1, 1.1)) * width, float(rng.uniform(-0.1, 1.1)) * height, float(rng.exponential(0.13) + 0.02) * unit
        angle = float(rng.uniform(0, 180))
        if kind < 0.3:
            _polygon(canvas, (x, y), (size, size * float(rng.uniform(0.2, 2.5))), angle if rng.random() < 0.4 else 0.0, 4, color, rng)
        elif kind < 0.5:
            _polygon(canvas, (x, y), (size * 0.6, size * 0.6 * float(rng.uniform(0.5, 1.2))), angle, 16, color, rng)
        elif kind < 0.65:
            _polygon(canvas, (x, y), (size, size), angle, int(rng.integers(3, 7)), color, rng)
        elif kind < 0.85:
            # Rods with round ends, like arms and legs that belong to nobody.
            end = (x + math.cos(angle) * size, y + math.sin(angle) * size)
            thickness = max(2, int(size * float(rng.uniform(0.1, 0.35))))
            for share, shade in ((1.0, 0.65), (0.7, 0.9), (0.35, 1.1)):
                cv2.line(
                    canvas, (int(x), int(y)), (int(end[0]), int(end[1])), tuple(min(255, c * shade) for c in color), max(1, int(thickness * share)), cv2.LINE_AA
                )
        else:
            period = max(3, int(size * 0.25))
            for k in range(int(rng.integers(3, 9))):
                cv2.rectangle(canvas, (int(x) + k * period, int(y)), (int(x) + k * period + period // 2, int(y + size)), color, -1)
    return canvas


def _texture(rng: np.random.Generator, size_hw: tuple[int, int]) -> Image:
    """Fractal noise through a ramp of two or three colours."""
    height, width = size_hw
    tile = _fractal_noise()[int(rng.integers(8))]
    side = int(rng.integers(80, 560))
    top, left = (int(rng.integers(0, 640 - side)) for _ in range(2))
    patch = cv2.resize(tile[top : top + side, left : left + side], (width, height), interpolation=cv2.INTER_LINEAR)
    stops = rng.uniform(5, 250, (3, 3))
    stops[1] += (stops[0] - stops[1]) * rng.uniform(0, 1)
    ramp = np.stack([np.interp(np.arange(256), (0, 128, 255), stops[:, c]) for c in range(3)], axis=1).astype(np.uint8)[None]
    return cv2.LUT(cv2.merge([patch, patch, patch]), ramp)  # type: ignore[return-value]  # OpenCV's stubs lose the dtype


def _polygon(
    canvas: Image, center: tuple[float, float], axes: tuple[float, float], angle: float, corners: int, color: tuple[float, ...], rng: np.random.Generator
) -> None:
    """A regular polygon in an ellipse, in two or three shades so that it looks solid."""
    turn = np.linspace(0, 2 * math.pi, corners, endpoint=False) + math.pi / 4
    points = np.stack([np.cos(turn) * axes[0], np.sin(turn) * axes[1]], axis=1)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = points @ np.array(((c, s), (-s, c)))
    shift = rng.uniform(-0.15, 0.15, 2) * min(axes)
    for share, shade in ((1.0, 0.8), (0.9, 1.0), (0.55, 1.08))[: 2 if corners == 4 else 3]:
        outline = np.rint(np.clip(np.array(center) + points * share + shift * (1 - share) * 4, -2000, 4000) * 16).astype(np.int32)
        cv2.fillConvexPoly(canvas, outline, tuple(min(255.0, v * shade) for v in color), cv2.LINE_AA, 4)


def _shadow(canvas: Image, figure: Figure) -> None:
    """A dark patch of floor under the feet."""
    left, _, right, bottom = figure.extent
    height, width = canvas.shape[:2]
    half_w, half_h = max(4.0, (right - left) * 0.55), max(3.0, (right - left) * 0.12)
    center = ((left + right) / 2, bottom)
    x0, x1 = max(0, int(center[0] - half_w) - 1), min(width, int(center[0] + half_w) + 2)
    y0, y1 = max(0, int(center[1] - half_h) - 1), min(height, int(center[1] + half_h) + 2)
    if x0 >= x1 or y0 >= y1:
        return
    region = canvas[y0:y1, x0:x1]
    shade = region.copy()
    cv2.ellipse(shade, (int(center[0]) - x0, int(center[1]) - y0), (int(half_w), int(half_h)), 0, 0, 360, (0, 0, 0), -1, cv2.LINE_AA)
    cv2.addWeighted(region, 0.6, shade, 0.4, 0, region)


def _occlude(rng: np.random.Generator, canvas: Image, parts: Image, figures: list[Figure]) -> None:
    """One or two things in front of people, over at most about half of one."""
    for _ in range(int(rng.integers(1, 3))):
        if not figures:
            return
        left, top, right, bottom = figures[int(rng.integers(len(figures)))].extent
        width, height = (right - left) * float(rng.uniform(0.25, 0.7)), (bottom - top) * float(rng.uniform(0.1, 0.35))
        x, y = float(rng.uniform(left, max(left + 1, right - width / 2))), float(rng.uniform(top + (bottom - top) * 0.25, bottom))
        color = tuple(rng.uniform(15, 240, 3).tolist())
        corners = np.array(((x, y), (x + width, y), (x + width, y + height), (x, y + height)))
        corners += rng.uniform(-0.12, 0.12, (4, 2)) * min(width, height)
        outline = cv2.convexHull(np.rint(np.clip(corners, -2000, 4000) * 16).astype(np.int32))
        cv2.fillConvexPoly(parts, outline, OCCLUDER, cv2.LINE_8, 4)
        cv2.fillConvexPoly(canvas, outline, color, cv2.LINE_AA, 4)
        inner = corners.mean(axis=0) + (corners - corners.mean(axis=0)) * 0.85
        cv2.fillConvexPoly(canvas, cv2.convexHull(np.rint(inner * 16).astype(np.int32)), tuple(min(255.0, c * 1.15) for c in color), cv2.LINE_AA, 4)


# --------------------------------------------------------------------------------------------------------------------- camera

_GRAIN: list[Image] = []


def _grain() -> list[Image]:
    """Four (768, 768, 3) uint8 fields of Gaussian noise about 128 with a deviation of 32."""
    if not _GRAIN:
        rng = np.random.default_rng(5)
        _GRAIN.extend(np.clip(128 + 32 * rng.standard_normal((768, 768, 3), dtype=np.float32), 0, 255).astype(np.uint8) for _ in range(4))
    return _GRAIN


def _photograph(rng: np.random.Generator, canvas: Image, *, frame: int) -> Image:
    """Uneven light, colour cast and gamma, blur, grain, sometimes JPEG."""
    height, width = canvas.shape[:2]
    if rng.random() < 0.4:
        tile = _fractal_noise()[int(rng.integers(8))]
        field = cv2.resize(tile[:160, :160], (width, height), interpolation=cv2.INTER_LINEAR)
        strength = float(rng.uniform(0.15, 0.5))
        field = cv2.addWeighted(field, strength, field, 0, 128 * (1.15 - strength))
        canvas = cv2.multiply(canvas, cv2.merge([field, field, field]), scale=1 / 128)  # type: ignore[assignment]
    levels = np.arange(256) / 255
    gamma, gain, cast = float(rng.uniform(0.75, 1.35)), float(rng.uniform(0.8, 1.15)), rng.uniform(0.88, 1.1, 3)
    table = np.clip(levels[:, None] ** gamma * gain * cast * 255, 0, 255).astype(np.uint8)[None]
    canvas = cv2.LUT(canvas, table)  # type: ignore[assignment]
    blur = rng.random()
    if blur < 0.35:
        canvas = cv2.GaussianBlur(canvas, (3, 3), float(rng.uniform(0.3, 0.9)))  # type: ignore[assignment]
    elif blur < 0.45:
        canvas = cv2.GaussianBlur(canvas, (5, 5), float(rng.uniform(0.8, 1.5)))  # type: ignore[assignment]
    elif blur < 0.52:
        kernel = np.zeros((5, 5), dtype=np.float32)
        step = ((0, 1), (1, 0), (1, 1))[int(rng.integers(3))]
        for k in range(-2, 3):
            kernel[2 + k * step[0], 2 + k * step[1]] = 0.2
        canvas = cv2.filter2D(canvas, -1, kernel)  # type: ignore[assignment]
    if rng.random() < 0.7 and max(height, width) <= 768:
        grain = _grain()[(int(rng.integers(4)) + frame) % 4]
        top, left = int(rng.integers(0, 769 - height)), int(rng.integers(0, 769 - width))
        strength = float(rng.uniform(0.03, 0.3))
        canvas = cv2.addWeighted(canvas, 1.0, grain[top : top + height, left : left + width], strength, -128 * strength)  # type: ignore[assignment]
    if rng.random() < 0.15:
        _, packed = cv2.imencode(".jpg", canvas, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 90))))
        canvas = cv2.imdecode(packed, cv2.IMREAD_COLOR)  # type: ignore[assignment]
    return canvas
