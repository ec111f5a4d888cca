"""Where the pixels of a network input lie in the image, and back.

Two conventions, chosen by the bundle's manifest and overridable:

exact   what the training code does, and its exact inverse: MMPose's affine crop (with or without UDP), MMDetection's resize, boxes as
        (left, top, right, bottom) with right and bottom exclusive.
sdk     what MMDeploy 1.x's SDK does, to the bit: crops on integer rectangles, boxes one pixel larger, clipping one pixel short.

Image and network coordinates are in pixels, x to the right, y down; the centre of the top-left pixel is (0, 0) in both.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import cv2
import numpy as np

from modelcrate_bundle.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Geometry: TypeAlias = Literal["exact", "sdk"]
Points: TypeAlias = "NDArray[np.float32]"
Image: TypeAlias = "NDArray[np.uint8]"

PIXEL_STD: Final = 200.0
"""MMPose's historical unit: the SDK keeps scales in units of 200 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """The map of one top-down crop from network-input pixels back to image pixels: image = network * step + origin.

    Attributes:
        step_xy: image pixels per network pixel, (x, y).
        origin_xy: image position of network pixel (0, 0), (x, y).
        sdk: the same as the SDK has it, (scale x, scale y, centre x, centre y) in float32, scales in units of 200 pixels; None for exact crops.
    """

    step_xy: tuple[float, float]
    origin_xy: tuple[float, float]
    sdk: tuple[np.float32, np.float32, np.float32, np.float32] | None = None


def to_image(points_xy: Points, crops: list[Crop]) -> Points:
    """Map the keypoints of N crops back to the image.

    Args:
        points_xy: (N, K, 2) float32 in network-input pixels.
        crops: (N) the crops that they were found in.

    Returns:
        (N, K, 2) float32 in image pixels.
    """
    maps = np.array([(*crop.step_xy, *crop.origin_xy) for crop in crops])[:, None]
    mapped = points_xy * maps[..., :2]
    mapped += maps[..., 2:]
    in_image: Points = mapped.astype(np.float32)
    return in_image


def to_image_sdk(points_xy: Points, crops: list[Crop], *, size_wh: tuple[int, int]) -> Points:
    """`to_image` in the SDK's own steps for SimCC, to the last bit: its tracker rounds boxes around keypoints to pixels (spec 3.3).

    Args:
        points_xy: (N, K, 2) float32 in network-input pixels.
        crops: (N) the crops that they were found in; without the SDK's numbers they are mapped as by `to_image`.
        size_wh: network input (width, height) in pixels.

    Returns:
        (N, K, 2) float32 in image pixels.
    """
    mapped = to_image(points_xy, crops)
    for i, crop in enumerate(crops):
        if crop.sdk is not None:
            scale, center = np.array(crop.sdk[:2], dtype=np.float32), np.array(crop.sdk[2:], dtype=np.float32)
            near = points_xy[i] * scale * np.float32(PIXEL_STD) / np.array(size_wh, dtype=np.float32) + center
            mapped[i] = near.astype(np.float64) - (scale * np.float32(PIXEL_STD)).astype(np.float64) * 0.5
    return mapped


_FARTHEST_PX: Final = 1e9
"""No image has such a coordinate; far beyond it float32 arithmetic overflows."""


def as_boxes(boxes: ArrayLike | None, *, image_hw: tuple[int, int], least_side: float = 0.0) -> NDArray[np.float32]:
    """The caller's boxes as an array.

    Args:
        boxes: (4,) or (N, 4) left, top, right, bottom in image pixels; None stands for the whole image.
        image_hw: image (height, width) in pixels.
        least_side: of a box; -1 in the SDK's geometry, where right and bottom are a pixel further on, and where its tracker has boxes without width.

    Returns:
        (N, 4) float32.

    Raises:
        InputError: another shape, or a coordinate that is not finite or beyond 1e9, or a side below the least.
    """
    if boxes is None:
        height, width = image_hw
        return np.array([[0, 0, width, height]], dtype=np.float32)
    try:
        array = np.asarray(boxes, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"boxes: expected numbers of shape (4,) or (N, 4), found {type(boxes).__name__}: {error}") from error
    if array.size == 0:
        return np.zeros((0, 4), dtype=np.float32)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 4:
        raise InputError(f"boxes: expected shape (4,) or (N, 4), found {np.shape(boxes)}", hint="a box is (left, top, right, bottom) in image pixels")
    for index, (left, top, right, bottom) in enumerate(array.tolist()):
        is_near = min(left, top) > -_FARTHEST_PX and max(right, bottom) < _FARTHEST_PX
        if not (is_near and left + least_side <= right and top + least_side <= bottom):  # NaN fails too
            raise InputError(
                f"box {index}: expected finite numbers with left <= right and top <= bottom, found {(left, top, right, bottom)}",
                hint="a box is (left, top, right, bottom) in image pixels; convert (x, y, width, height) first",
            )
    return array


# ---------------------------------------------------------------------------------------------------------------------- exact


def crop_exact(image: Image, box_xyxy: NDArray[np.float32], *, size_wh: tuple[int, int], padding: float, use_udp: bool) -> tuple[Image, Crop]:
    """MMPose's GetBBoxCenterScale and TopdownAffine, bit for bit, and the exact inverse of the warp.

    The shorter side of the padded box grows to the input's aspect ratio. Without UDP network pixel i lies at image position
    c - S/2 + i * S/W (`mmpose.structures.bbox.get_warp_matrix`); with UDP at c - S/2 + i * S/(W-1) (`get_udp_warp_matrix`; Huang et al.,
    "The Devil Is in the Details: Delving into Unbiased Data Processing for Human Pose Estimation", CVPR 2020).

    Args:
        image: (H, W, 3) uint8.
        box_xyxy: (4,) left, top, right, bottom in image pixels. A box without width or height counts as one pixel.
        size_wh: network input (width, height) in pixels.
        padding: factor on both sides of the box.
        use_udp: whether the network was trained with UDP.

    Returns:
        The (height, width, 3) uint8 crop, black where it leaves the image, and its map back.
    """
    row, crop = plan_exact(box_xyxy.tolist(), size_wh=size_wh, padding=padding, use_udp=use_udp)
    return StraightWarps.of([row], size_wh=size_wh).apply(image, 0), crop


def plan_exact(box_xyxy: list[float], *, size_wh: tuple[int, int], padding: float, use_udp: bool) -> tuple[tuple[float, float, float, float], Crop]:
    """The arithmetic of `crop_exact` without the pixels.

    MMPose computes in float32. Here Python's floats are rounded after each operation, which gives the same bits (a double has more than twice
    the digits of a float32) at a fraction of the time of numpy's scalars.

    Args:
        box_xyxy: left, top, right, bottom, each a float32 number.
        size_wh: as `crop_exact`.
        padding: as `crop_exact`.
        use_udp: as `crop_exact`.

    Returns:
        What `StraightWarps.of` takes of this crop, and its map back.
    """
    width, height = size_wh
    left, top, right, bottom = box_xyxy
    center_x, center_y = _float32(left + right) * 0.5, _float32(top + bottom) * 0.5
    factor, aspect = _float32(padding), _float32(width / height)
    size_x = _float32(max(_float32(right - left), 1.0) * factor)
    size_y = _float32(max(_float32(bottom - top), 1.0) * factor)
    if size_x > _float32(size_y * aspect):
        size_y = _float32(size_x / aspect)
    else:
        size_x = _float32(size_y * aspect)
    if use_udp:
        step_x, step_y = size_x / (width - 1), size_y / (height - 1)
        x_row = (_float32(1 / step_x), 0.0, _float32((0.5 * size_x - center_x) / step_x))
        y_row = (0.0, _float32(1 / step_y), _float32((0.5 * size_y - center_y) / step_y))
    else:
        step_x, step_y = size_x / width, size_y / height
        x_row, y_row = _three_point_matrix(center_x, center_y, size_x, size_wh)
    (a00, _, b0), (_, a11, b1) = _inverted(x_row, y_row)
    return (a00, b0, a11, b1), Crop(step_xy=(step_x, step_y), origin_xy=(center_x - 0.5 * size_x, center_y - 0.5 * size_y))


_FLOAT32: Final = struct.Struct("<f")


def _float32(value: float) -> float:
    """The nearest float32."""
    return _FLOAT32.unpack(_FLOAT32.pack(value))[0]  # type: ignore[no-any-return]


Row: TypeAlias = tuple[float, float, float]


def _three_point_matrix(x: float, y: float, box_w: float, size_wh: tuple[int, int]) -> tuple[Row, Row]:
    """The warp as MMPose computes it, from three float32 points: the same rounding gives the same crop.

    The points are the centre, the middle of the left side, and that one moved down by the distance between them.
    """
    left = _float32(x - box_w * 0.5)
    source = np.array(((x, y), (left, y), (left, y + _float32(x - left))), dtype=np.float32)
    x_row, y_row = cv2.getAffineTransform(source, _three_points(size_wh)).tolist()
    return x_row, y_row


@functools.cache
def _three_points(size_wh: tuple[int, int]) -> NDArray[np.float32]:
    half_w, half_h = size_wh[0] * 0.5, size_wh[1] * 0.5
    return np.array(((half_w, half_h), (0, half_h), (0, half_h + half_w)), dtype=np.float32)


_INT16_LIMIT: Final = 2**25
"""Where a position with ten fractional bits leaves int16; OpenCV saturates there."""
_INT16_LIMIT_PX: Final = 2**15 - 2


@functools.cache
def _indices(count: int) -> NDArray[np.float64]:
    return np.arange(count, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StraightWarps:
    """N warps without rotation: OpenCV 4's bilinear `warpAffine` to the bit, on any OpenCV (see `warp_affine`).

    OpenCV 4 is asked itself, which takes two thirds of the time. For others the positions of all samples are computed here: without rotation, one row and
    one column of each warp say it all.

    Attributes:
        matrices: (N, 2, 3) float64 network -> image; None where there are positions.
        positions: (N, 2, longest) int32 image positions of the columns and of the rows in 1/1024 pixel, with the half of 1/32 that rounds when the last
            5 bits are dropped. Only the first `size_wh` of each count.
        size_wh: (width, height) of the results in pixels.
    """

    matrices: NDArray[np.float64] | None = None
    positions: NDArray[np.int32] | None = None
    size_wh: tuple[int, int]

    @classmethod
    def of(cls, warps: list[tuple[float, float, float, float]], *, size_wh: tuple[int, int]) -> StraightWarps:
        """Prepare all warps at once.

        Args:
            warps: (N) step and origin of x, step and origin of y, in image pixels: image = network * step + origin.
            size_wh: (width, height) of the results in pixels.
        """
        width, height = size_wh
        is_far = any(abs(v) >= _INT16_LIMIT_PX for sx, ox, sy, oy in warps for v in (ox, ox + sx * width, oy, oy + sy * height))
        if not is_far and _has_opencv_4s_warp():
            return cls(matrices=np.array([((sx, 0, ox), (0, sy, oy)) for sx, ox, sy, oy in warps]), size_wh=size_wh)
        return cls(positions=_straight_positions(warps, size_wh=size_wh, is_far=is_far), size_wh=size_wh)

    def apply(self, image: Image, index: int) -> Image:
        """Warp number `index` of an (H, W, C) uint8 image: (height, width, C) uint8, black outside the image."""
        width, height = self.size_wh
        if self.matrices is not None:
            warped = cv2.warpAffine(image, self.matrices[index], self.size_wh, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            return warped.reshape(height, width, image.shape[2])  # type: ignore[return-value]  # OpenCV's stubs lose the dtype
        assert self.positions is not None  # one of the two is there
        columns, rows = self.positions[index]
        columns, rows = columns[:width], rows[:height, None]
        # x and y of a sample are 16 bits each and stored as one number: twice as fast as one after the other. All that OpenCV runs on is little-endian.
        whole = (rows & -1024) << 6 | (columns >> 10) & 0xFFFF
        fraction = (rows & 31 << 5).astype(np.uint16) | (columns >> 5 & 31).astype(np.uint16)
        return _sampled(image, whole.view(np.int16).reshape(height, width, 2), fraction)


@functools.cache
def _has_opencv_4s_warp() -> bool:
    """Whether `cv2.warpAffine` gives the bits of OpenCV 4. OpenCV 5 does not, and a build for another processor need not: it is tried, on a warp that tells them apart."""
    warps, size_wh = [(0.8371, -3.219, 1.2943, 2.583)], (48, 40)
    image: Image = np.random.default_rng(0).integers(0, 256, (64, 56, 3), dtype=np.uint8)
    asked = StraightWarps(matrices=np.array([((sx, 0, ox), (0, sy, oy)) for sx, ox, sy, oy in warps]), size_wh=size_wh)
    computed = StraightWarps(positions=_straight_positions(warps, size_wh=size_wh, is_far=False), size_wh=size_wh)
    return np.array_equal(asked.apply(image, 0), computed.apply(image, 0))


def _straight_positions(warps: list[tuple[float, float, float, float]], *, size_wh: tuple[int, int], is_far: bool) -> NDArray[np.int32]:
    """`StraightWarps.positions`: positions have 10 fractional bits while they are added up, 5 are kept, and 16 rounds.

    Args:
        warps: as `StraightWarps.of`.
        size_wh: as `StraightWarps.of`.
        is_far: whether a position may leave int16.
    """
    # Scaling by 1024 commutes with the rounding of doubles. OpenCV rounds the origin of x by itself and that of y with the position.
    numbers = [((sx * 1024, 0.0, round(ox * 1024) + 16.0), (sy * 1024, oy * 1024, 16.0)) for sx, ox, sy, oy in warps]
    steps, before, after = np.array(numbers).reshape(-1, 2, 3, 1).transpose(2, 0, 1, 3)
    exact = steps * _indices(max(size_wh))
    exact += before
    np.rint(exact, out=exact)
    exact += after
    if is_far:
        np.clip(exact, -_INT16_LIMIT, _INT16_LIMIT - 1, out=exact)
    return exact.astype(np.int32)


def _rotated_map(
    x_row: tuple[float, float, float], y_row: tuple[float, float, float], *, size_wh: tuple[int, int]
) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """The same positions for any affine map, as `cv2.remap` takes them; the arguments are the rows of the matrix network -> image."""
    columns, rows = _indices(size_wh[0]), _indices(size_wh[1])
    fixed = []
    for of_column, of_row, offset in (x_row, y_row):
        exact = (np.rint((of_row * rows + offset) * 1024) + 16)[:, None] + np.rint(of_column * columns * 1024)
        fixed.append(np.clip(exact, -_INT16_LIMIT, _INT16_LIMIT - 1).astype(np.int32) >> 5)
    fraction = ((fixed[1] & 31) << 5) | (fixed[0] & 31)
    whole: NDArray[np.int16] = np.stack([axis >> 5 for axis in fixed], axis=-1).astype(np.int16)
    return whole, fraction.astype(np.uint16)


def warp_affine(image: Image, matrix: NDArray[np.floating], *, size_wh: tuple[int, int]) -> Image:
    """OpenCV 4's bilinear `warpAffine` to the bit, on any OpenCV.

    OpenCV 4 rounds the position of every sample to 1/32 pixel, and the networks were trained on such crops; OpenCV 5 no longer does, which
    changes a crop by up to four levels. There the positions are computed as OpenCV 4 computed them, and `remap` takes them as they are.

    Args:
        image: (H, W, C) uint8.
        matrix: (2, 3) image -> network.
        size_wh: (width, height) of the result in pixels.

    Returns:
        (height, width, C) uint8, black outside the image.
    """
    width, height = size_wh
    (a00, a01, b0), (a10, a11, b1) = _inverted(*matrix.astype(np.float64).tolist())
    if abs(a01) * height + abs(a10) * width < 1e-9:
        return StraightWarps.of([(a00, b0, a11, b1)], size_wh=size_wh).apply(image, 0)
    return _sampled(image, *_rotated_map((a00, a01, b0), (a10, a11, b1), size_wh=size_wh))


def _inverted(x_row: Row, y_row: Row) -> tuple[Row, Row]:
    """Image -> network to network -> image, as OpenCV 4 inverts: in double, zeros for a singular matrix."""
    (m00, m01, m02), (m10, m11, m12) = x_row, y_row
    determinant = m00 * m11 - m01 * m10
    inverse = 1.0 / determinant if determinant else 0.0
    a00, a01, a10, a11 = m11 * inverse, m01 * -inverse, m10 * -inverse, m00 * inverse
    return (a00, a01, -a00 * m02 - a01 * m12), (a10, a11, -a10 * m02 - a11 * m12)


def _sampled(image: Image, whole: NDArray[np.int16], fraction: NDArray[Any]) -> Image:
    warped = cv2.remap(image, whole, fraction, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return warped.reshape(*fraction.shape, image.shape[2])  # type: ignore[return-value]  # OpenCV's stubs lose the dtype


# ------------------------------------------------------------------------------------------------------------------------ sdk


def crop_sdk(image: Image, box_xyxy: NDArray[np.float32] | None, *, size_wh: tuple[int, int], padding: float) -> tuple[Image, Crop]:
    """The SDK's TopDownGetBboxCenterScale and TopDownAffine: crop, resize and zero-pad integer rectangles (spec 2.8 and 2.9).

    Args:
        image: (H, W, 3) uint8.
        box_xyxy: (4,) left, top, right, bottom in image pixels, which the SDK widens by one pixel; None for the whole image, which it does not.
        size_wh: network input (width, height) in pixels.
        padding: factor on both sides of the box.

    Returns:
        The (height, width, 3) uint8 crop and its map back.
    """
    cut, crop = plan_sdk(box_xyxy, image_hw=(image.shape[0], image.shape[1]), size_wh=size_wh, padding=padding)
    return cut.apply(image), crop


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A rectangle of the image that is resized into a rectangle of the network input, in whole pixels (x, y, width, height); zeros around it.

    Attributes:
        source: in the image; without area where box and image have nothing in common.
        target: in the network input.
        size_wh: network input (width, height) in pixels.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    size_wh: tuple[int, int]

    def apply(self, image: Image) -> Image:
        """The (height, width, C) uint8 network input of an (H, W, C) uint8 image."""
        patch = np.zeros((self.size_wh[1], self.size_wh[0], image.shape[2]), dtype=np.uint8)
        (sx, sy, sw, sh), (tx, ty, tw, th) = self.source, self.target
        if 0 not in {sw, sh, tw, th}:
            resized = cv2.resize(image[sy : sy + sh, sx : sx + sw], (tw, th), interpolation=cv2.INTER_LINEAR)
            patch[ty : ty + th, tx : tx + tw] = resized.reshape(th, tw, -1)
        return patch


def plan_sdk(box_xyxy: NDArray[np.float32] | None, *, image_hw: tuple[int, int], size_wh: tuple[int, int], padding: float) -> tuple[Cut, Crop]:
    """The arithmetic of `crop_sdk` without the pixels.

    All of it is float32, as there. Unlike the SDK, a box outside the image gives finite keypoints: the nominal rectangle maps back.
    """
    f32 = np.float32
    width, height = size_wh
    image_h, image_w = image_hw
    if box_xyxy is None:
        x, y, w, h = f32(0), f32(0), f32(image_w), f32(image_h)
    else:
        left, top, right, bottom = box_xyxy
        x, y, w, h = left, top, right - left + f32(1), bottom - top + f32(1)
    aspect = f32(width / height)
    center_x, center_y = x + f32(0.5) * w, y + f32(0.5) * h
    if w > aspect * h:
        h = w / aspect
    elif w < aspect * h:
        w = aspect * h
    size_x, size_y = w / f32(PIXEL_STD) * f32(padding) * f32(PIXEL_STD), h / f32(PIXEL_STD) * f32(padding) * f32(PIXEL_STD)
    # Before NumPy 2 a float32 and a Python number make a double: halves are float32 as well.
    roi = (_round(center_x - size_x / f32(2)), _round(center_y - size_y / f32(2)), _round(size_x), _round(size_y))
    source = _intersection(roi, (0, 0, image_w, image_h))
    factor = f32(width) / size_x if size_x > 0 else f32(0)
    target = _intersection(
        (
            _round(f32(source[0] - roi[0]) * factor),
            _round(f32(source[1] - roi[1]) * factor),
            _round(f32(source[2]) * factor),
            _round(f32(source[3]) * factor),
        ),
        (0, 0, width, height),
    )
    cut = Cut(source=source, target=target, size_wh=size_wh)
    if 0 in source[2:] or 0 in target[2:]:
        step = (float(size_x) / width, float(size_y) / height)
        return cut, Crop(step_xy=step, origin_xy=(float(center_x - size_x / f32(2)), float(center_y - size_y / f32(2))))
    sx, sy, sw, sh = source
    tx, ty, tw, th = target
    factor_x, factor_y = f32(tw) / f32(sw), f32(th) / f32(sh)
    new_center = (
        f32(sx + (sw - 1) / 2) + (f32(width / 2) - f32(tx + (tw - 1) / 2)) / factor_x,
        f32(sy + (sh - 1) / 2) + (f32(height / 2) - f32(ty + (th - 1) / 2)) / factor_y,
    )
    new_scale = (f32(width) / factor_x / f32(PIXEL_STD), f32(height) / factor_y / f32(PIXEL_STD))
    new_size = (new_scale[0] * f32(PIXEL_STD), new_scale[1] * f32(PIXEL_STD))
    return cut, Crop(
        step_xy=(float(new_size[0]) / width, float(new_size[1]) / height),
        origin_xy=(float(new_center[0]) - float(new_size[0]) * 0.5, float(new_center[1]) - float(new_size[1]) * 0.5),
        sdk=(*new_scale, *new_center),
    )


def _round(value: np.float32 | float) -> int:
    """C's `round`: half away from zero. In double, where a float32 plus a half is exact."""
    number = float(value)
    return math.floor(number + 0.5) if number >= 0 else -math.floor(-number + 0.5)


def _intersection(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The common part of two (x, y, width, height) rectangles; all zero when there is none, as OpenCV has it."""
    x, y = max(a[0], b[0]), max(a[1], b[1])
    width = min(a[0] + a[2], b[0] + b[2]) - x
    height = min(a[1] + a[3], b[1] + b[3]) - y
    return (x, y, width, height) if width > 0 and height > 0 else (0, 0, 0, 0)
