"""Paints a posed figure: rounded, shaded, clothed parts, the nearest last, and beside the picture a map of which part is seen where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import cv2
import numpy as np

from modelcrate_converter.people.body import INDEX, Build

if TYPE_CHECKING:
    from numpy.typing import NDArray

Image: TypeAlias = "NDArray[np.uint8]"
Color: TypeAlias = tuple[float, float, float]
"""BGR, 0..255."""

PARTS: Final = (
    "nothing", "torso", "neck", "head", "left_upper_arm", "right_upper_arm", "left_forearm", "right_forearm", "left_hand", "right_hand",
    "left_thigh", "right_thigh", "left_shank", "right_shank", "left_foot", "right_foot",
)  # fmt: skip
PART: Final = {name: i for i, name in enumerate(PARTS)}
PARTS_PER_PERSON: Final = 32
"""The part map holds person * PARTS_PER_PERSON + part; 255 is something in front of everyone."""
OCCLUDER: Final = 255

_SHIFT: Final = 4
_ONE: Final = 1 << _SHIFT
"""OpenCV draws at sixteenths of a pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a person looks like: body, skin, hair and clothes. It stays when the pose changes.

    Attributes:
        build: proportions.
        skin: colour of what is bare.
        hair: colour of the hair.
        shirt: colour of the torso and the sleeves.
        trousers: colour of the legs.
        shoes: colour of the feet.
        long_sleeves: whether the forearms are covered.
        long_trousers: whether the shanks are covered.
        patterns: which pattern of the bank shirt and trousers have, and where in it they begin.
        hair_share: how far the hair goes down, in head radii.
    """

    build: Build
    skin: Color
    hair: Color
    shirt: Color
    trousers: Color
    shoes: Color
    long_sleeves: bool
    long_trousers: bool
    patterns: tuple[int, int]
    hair_share: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Look:
        """Anyone."""
        tone = float(rng.random())
        skin = tuple(float(v) for v in (np.array((72, 98, 132)) * (1 - tone) + np.array((168, 196, 236)) * tone) * rng.uniform(0.9, 1.08, 3))
        hairs = ((20, 22, 28), (30, 48, 82), (48, 92, 140), (90, 160, 205), (150, 152, 158), (40, 60, 150))
        hair = hairs[int(rng.integers(len(hairs)))]
        return cls(
            build=Build.sample(rng),
            skin=(skin[0], skin[1], skin[2]),
            hair=hair,
            shirt=_cloth(rng),
            trousers=_cloth(rng),
            shoes=_cloth(rng, 0.7),
            long_sleeves=bool(rng.random() < 0.5),
            long_trousers=bool(rng.random() < 0.65),
            patterns=(int(rng.integers(_BANK)), int(rng.integers(_BANK))),
            hair_share=float(rng.uniform(0.2, 0.9)),
        )


def _cloth(rng: np.random.Generator, brightness: float = 1.0) -> Color:
    hue, saturation, value = rng.random(), rng.random() ** 0.7 * 0.85, rng.uniform(0.18, 0.98) * brightness
    channels = [value * (1 - saturation * max(0.0, min(1.0, abs((hue * 6 + k) % 6 - 3) - 1))) for k in (0.0, 4.0, 2.0)]
    return (255 * channels[0], 255 * channels[1], 255 * channels[2])


# ------------------------------------------------------------------------------------------------------------------- geometry

_HALF_CIRCLE: Final = np.stack([np.cos(np.linspace(-math.pi / 2, math.pi / 2, 7)), np.sin(np.linspace(-math.pi / 2, math.pi / 2, 7))], axis=1)
_CIRCLE: Final = np.stack([np.cos(np.linspace(0, 2 * math.pi, 12, endpoint=False)), np.sin(np.linspace(0, 2 * math.pi, 12, endpoint=False))], axis=1)
_SHADES: Final = ((1.0, 0.62), (0.86, 0.80), (0.66, 0.94), (0.42, 1.06), (0.2, 1.14))
"""Layers of a rounded part: share of its radius, brightness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A tapered capsule.

    Attributes:
        ends: names of the two joints.
        radii: at both ends, in body heights.
        name: of `PARTS`.
    """

    ends: tuple[str, str]
    radii: tuple[float, float]
    name: str


def _sided(side: str) -> tuple[_Part, ...]:
    return (
        _Part(ends=(f"{side}_shoulder", f"{side}_elbow"), radii=(0.036, 0.027), name=f"{side}_upper_arm"),
        _Part(ends=(f"{side}_elbow", f"{side}_wrist"), radii=(0.027, 0.019), name=f"{side}_forearm"),
        _Part(ends=(f"{side}_wrist", f"{side}_hand"), radii=(0.019, 0.025), name=f"{side}_hand"),
        _Part(ends=(f"{side}_hip", f"{side}_knee"), radii=(0.058, 0.038), name=f"{side}_thigh"),
        _Part(ends=(f"{side}_knee", f"{side}_ankle"), radii=(0.038, 0.024), name=f"{side}_shank"),
        _Part(ends=(f"{side}_heel", f"{side}_toe"), radii=(0.028, 0.022), name=f"{side}_foot"),
    )


_CAPSULES: Final = (*_sided("left"), *_sided("right"), _Part(ends=("neck", "head"), radii=(0.03, 0.03), name="neck"))
_FIRST: Final = np.array([INDEX[part.ends[0]] for part in _CAPSULES])
_SECOND: Final = np.array([INDEX[part.ends[1]] for part in _CAPSULES])
_RADII: Final = np.array([part.radii for part in _CAPSULES])
_TORSO: Final = tuple(INDEX[name] for name in ("left_shoulder", "right_shoulder", "left_hip", "right_hip"))


def _capsules(points: NDArray[np.float64], radii: NDArray[np.float64], light: NDArray[np.float64]) -> NDArray[np.int32]:
    """(parts, shades, 14, 2) outlines in sixteenths of a pixel; brighter layers are smaller and lie towards the light.

    Args:
        points: (joints, 2) in pixels.
        radii: (parts, 2) in pixels.
        light: (2,) unit vector in the image from which light comes.
    """
    start, end = points[_FIRST], points[_SECOND]
    along = end - start
    length = np.sqrt((along**2).sum(axis=1, keepdims=True))
    along = np.where(length > 1e-6, along / np.maximum(length, 1e-6), np.array((0.0, 1.0)))
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    # (parts, 7, 2): half circles about both ends.
    cap = along[:, None] * _HALF_CIRCLE[:, :1] + across[:, None] * _HALF_CIRCLE[:, 1:]
    size = np.array([share for share, _ in _SHADES])[None, :, None, None]
    shift = (1 - size) * 0.75 * light
    outline = np.concatenate(
        [
            end[:, None, None] + (cap[:, None] * size + shift) * radii[:, 1, None, None, None],
            start[:, None, None] + (-cap[:, None] * size + shift) * radii[:, 0, None, None, None],
        ],
        axis=2,
    )
    return _fixed(outline)


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.rint(np.clip(points, -2000, 4000) * _ONE).astype(np.int32)


# -------------------------------------------------------------------------------------------------------------------- painting


def paint(canvas: Image, parts: Image, joints: NDArray[np.float64], *, look: Look, person: int, light: NDArray[np.float64], ambient: float) -> None:
    """Paint one person onto an image and its part map.

    Args:
        canvas: (H, W, 3) BGR uint8, changed in place.
        parts: (H, W) uint8 part map, changed in place.
        joints: (len(JOINTS), 3) x and y in pixels, z towards the viewer in pixels.
        look: the person's.
        person: number of the person in the part map, from 0.
        light: (2,) unit vector in the image from which light comes.
        ambient: brightness of everything, about 1.
    """
    height_px = float(np.sqrt(((joints[INDEX["neck"]] - joints[INDEX["pelvis"]]) ** 2).sum())) / look.build.torso
    radii = _RADII * (look.build.girth * height_px)
    flat = joints[:, :2]
    outlines = _capsules(flat, radii, light)
    depths = ((joints[_FIRST, 2] + joints[_SECOND, 2]) * 0.5).tolist()
    order = [(depth, i) for i, depth in enumerate(depths)]
    torso_depth = float(joints[list(_TORSO), 2].mean())
    order += [(torso_depth + 0.02 * height_px, -1), (float(joints[INDEX["head"], 2]) + 0.03 * height_px, -2)]
    order.sort()
    base = person * PARTS_PER_PERSON
    colors = _part_colors(look)
    for _, i in order:
        if i == -1:
            _paint_torso(canvas, parts, flat, look, radius=0.05 * look.build.girth * height_px, light=light, ambient=ambient, value=base + PART["torso"])
        elif i == -2:
            _paint_head(canvas, parts, joints, look, radius=look.build.head * height_px, light=light, ambient=ambient, value=base + PART["head"])
        else:
            _paint_layers(canvas, parts, outlines[i], colors[i], ambient=ambient, value=base + PART[_CAPSULES[i].name])
    _weave(canvas, parts, look, person=person, height_px=height_px)


def _part_colors(look: Look) -> list[Color]:
    """A colour for each of `_CAPSULES`."""
    of = {
        "upper_arm": look.shirt,
        "forearm": look.shirt if look.long_sleeves else look.skin,
        "hand": look.skin,
        "thigh": look.trousers,
        "shank": look.trousers if look.long_trousers else look.skin,
        "foot": look.shoes,
        "neck": look.skin,
    }
    return [of[part.name.removeprefix("left_").removeprefix("right_")] for part in _CAPSULES]


def _paint_layers(canvas: Image, parts: Image, outlines: NDArray[np.int32], color: Color, *, ambient: float, value: int) -> None:
    cv2.fillConvexPoly(parts, outlines[0], value, cv2.LINE_8, _SHIFT)
    for outline, (_, shade) in zip(outlines, _SHADES, strict=True):
        cv2.fillConvexPoly(canvas, outline, _lit(color, shade * ambient), cv2.LINE_AA, _SHIFT)


def _lit(color: Color, brightness: float) -> Color:
    return (min(255.0, color[0] * brightness), min(255.0, color[1] * brightness), min(255.0, color[2] * brightness))


def _paint_torso(
    canvas: Image, parts: Image, flat: NDArray[np.float64], look: Look, *, radius: float, light: NDArray[np.float64], ambient: float, value: int
) -> None:
    """The hull of balls at shoulders and hips; the hips wear the trousers."""
    corners = flat[list(_TORSO)]
    sizes = np.array((0.86, 0.86, 1.12, 1.12))[:, None, None] * radius
    center = corners.mean(axis=0)
    pelvis = corners[2:]
    for i, (share, shade) in enumerate(_SHADES):
        moved = center + (corners - center) * (0.45 + 0.55 * share) + light * radius * (1 - share)
        hull = cv2.convexHull(_fixed((moved[:, None] + _CIRCLE * (sizes * share)).reshape(-1, 2)))
        if i == 0:
            cv2.fillConvexPoly(parts, hull, value, cv2.LINE_8, _SHIFT)
        cv2.fillConvexPoly(canvas, hull, _lit(look.shirt, shade * ambient), cv2.LINE_AA, _SHIFT)
    for share, shade in _SHADES[::2]:
        moved = pelvis + light * radius * (1 - share)
        hull = cv2.convexHull(_fixed((moved[:, None] + _CIRCLE * (sizes[2:] * share * 0.98)).reshape(-1, 2)))
        cv2.fillConvexPoly(canvas, hull, _lit(look.trousers, shade * ambient), cv2.LINE_AA, _SHIFT)


def _paint_head(
    canvas: Image, parts: Image, joints: NDArray[np.float64], look: Look, *, radius: float, light: NDArray[np.float64], ambient: float, value: int
) -> None:
    """A ball of skin under a cap of hair, with ears, eyes, nose and mouth where they are on the side of the viewer."""
    center = joints[INDEX["head"]]
    axis = (joints[INDEX["crown"]] - center)[:2]
    angle = math.degrees(math.atan2(axis[1], axis[0])) + 90
    cx, cy = float(center[0]), float(center[1])
    axes = (radius * 0.92, radius * 1.12)
    _ellipse(parts, (cx, cy), axes, angle, value, line=cv2.LINE_8)
    front = (joints[INDEX["nose"]] - center) / radius
    for name in ("left_ear", "right_ear"):
        if joints[INDEX[name], 2] < center[2] - 0.1 * radius:
            _ear(canvas, joints[INDEX[name]], radius, angle, _lit(look.skin, 0.75 * ambient))
    _ellipse(canvas, (cx, cy), axes, angle, _lit(look.hair, 0.75 * ambient))
    _ellipse(canvas, (cx + light[0] * radius * 0.2, cy + light[1] * radius * 0.2), (axes[0] * 0.8, axes[1] * 0.8), angle, _lit(look.hair, 1.05 * ambient))
    # The face: a disc of skin on the ball, seen from the side as it turns; gone when it looks away.
    facing = float(front[2])
    if facing > -0.55:
        down = -(joints[INDEX["crown"]] - center)[:2] / radius
        shown = 0.55 + 0.35 * max(-0.6, facing)
        for share, shade, toward in ((1.0, 0.78, 0.0), (0.86, 0.95, 0.1), (0.55, 1.08, 0.25)):
            spot = center[:2] + front[:2] * radius * 0.42 + down * radius * 0.22 * look.hair_share + light * radius * toward
            _ellipse(
                canvas, (float(spot[0]), float(spot[1])), (radius * 0.86 * shown * share, radius * 0.94 * share * min(1.0, shown + 0.1)), angle,
                _lit(look.skin, shade * ambient),
            )  # fmt: skip
    for name in ("left_ear", "right_ear"):
        if joints[INDEX[name], 2] >= center[2] - 0.1 * radius:
            _ear(canvas, joints[INDEX[name]], radius, angle, _lit(look.skin, 0.9 * ambient))
    for name in ("left_eye", "right_eye"):
        if joints[INDEX[name], 2] > center[2] + 0.2 * radius:
            x, y = float(joints[INDEX[name], 0]), float(joints[INDEX[name], 1])
            _ellipse(canvas, (x, y), (radius * 0.2, radius * 0.13), angle, _lit((225.0, 228.0, 230.0), ambient))
            _ellipse(canvas, (x, y), (radius * 0.1, radius * 0.11), angle, _lit((35.0, 30.0, 28.0), ambient))
    if joints[INDEX["mouth"], 2] > center[2] + 0.2 * radius:
        x, y = float(joints[INDEX["mouth"], 0]), float(joints[INDEX["mouth"], 1])
        _ellipse(canvas, (x, y), (radius * 0.26, radius * 0.07), angle, _lit((70.0, 60.0, 140.0), ambient))
    if joints[INDEX["nose"], 2] > center[2]:
        x, y = float(joints[INDEX["nose"], 0]), float(joints[INDEX["nose"], 1])
        _ellipse(canvas, (x, y + 0.03 * radius), (radius * 0.13, radius * 0.2), angle, _lit(look.skin, 0.7 * ambient))
        _ellipse(canvas, (x + light[0] * radius * 0.05, y), (radius * 0.09, radius * 0.15), angle, _lit(look.skin, 1.15 * ambient))


def _ear(canvas: Image, place: NDArray[np.float64], radius: float, angle: float, color: Color) -> None:
    _ellipse(canvas, (float(place[0]), float(place[1])), (radius * 0.17, radius * 0.26), angle, color)


def _ellipse(canvas: Image, center: tuple[float, float], axes: tuple[float, float], angle: float, color: Color | int, *, line: int = cv2.LINE_AA) -> None:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = _CIRCLE[:, 0] * axes[0], _CIRCLE[:, 1] * axes[1]
    outline = np.stack([center[0] + c * x - s * y, center[1] + s * x + c * y], axis=1)
    cv2.fillConvexPoly(canvas, _fixed(outline), color, line, _SHIFT)


# -------------------------------------------------------------------------------------------------------------------- patterns

_BANK: Final = 24
_TILE_PX: Final = 512


def _patterns() -> list[Image]:
    """(`_TILE_PX`, `_TILE_PX`, 3) uint8 factors around 128: plain, stripes, checks, dots and blotches, in several sizes and directions."""
    if not _PATTERNS:
        rng = np.random.default_rng(7)
        y, x = np.mgrid[0:_TILE_PX, 0:_TILE_PX].astype(np.float32)
        for i in range(_BANK):
            angle, period = float(rng.uniform(0, math.pi)), float(rng.uniform(5, 22))
            u, v = (x * math.cos(angle) + y * math.sin(angle)) / period, (y * math.cos(angle) - x * math.sin(angle)) / period
            noise = cv2.resize(rng.standard_normal((_TILE_PX // 3, _TILE_PX // 3)).astype(np.float32), (_TILE_PX, _TILE_PX), interpolation=cv2.INTER_LINEAR)
            kind, depth = i % 6, float(rng.uniform(0.25, 0.8))
            wave = {
                1: np.sign(np.sin(u * 2 * math.pi)),
                2: np.sign(np.sin(u * 2 * math.pi)) * 0.5 + np.sign(np.sin(v * 2 * math.pi)) * 0.5,
                3: np.where(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.28, 1.0, -0.3),
                4: np.sin(u * 2 * math.pi + 2 * np.sin(v)),
            }.get(kind, np.zeros_like(x))
            tint = rng.uniform(0.5, 1.0, 3).astype(np.float32)
            value = 118 + (wave * depth * 60)[..., None] * tint + noise[..., None] * 7
            _PATTERNS.append(np.clip(value, 20, 255).astype(np.uint8))
    return _PATTERNS


_PATTERNS: list[Image] = []
_CLOTHED: Final = ((("torso", "left_upper_arm", "right_upper_arm"), 0, "long_sleeves", ("left_forearm", "right_forearm")),
                   (("left_thigh", "right_thigh"), 1, "long_trousers", ("left_shank", "right_shank")))  # fmt: skip


def _weave(canvas: Image, parts: Image, look: Look, *, person: int, height_px: float) -> None:
    """Multiply what is seen of the clothes with their patterns."""
    base = person * PARTS_PER_PERSON
    table = np.zeros(256, dtype=np.uint8)
    for names, which, is_long, more in _CLOTHED:
        for name in (*names, *(more if getattr(look, is_long) else ())):
            table[base + PART[name]] = which + 1
    worn = cv2.LUT(parts, table)
    x, y, w, h = cv2.boundingRect(worn)
    if not w or min(w, h) > _TILE_PX:
        return
    worn = worn[y : y + h, x : x + w]
    factor = np.full((h, w, 3), 128, dtype=np.uint8)
    for which in (0, 1):
        # Larger people have larger patterns.
        tile = _patterns()[look.patterns[which]]
        zoom = max(0.5, height_px / 180)
        take_w, take_h = min(_TILE_PX, int(w / zoom) + 1), min(_TILE_PX, int(h / zoom) + 1)
        patch = cv2.resize(tile[:take_h, :take_w], (w, h), interpolation=cv2.INTER_LINEAR)
        cv2.copyTo(patch, cv2.inRange(worn, which + 1, which + 1), factor)
    region = canvas[y : y + h, x : x + w]
    cv2.multiply(region, factor, region, 1 / 128)
