"""From heatmaps to keypoints: the largest cell of each map, refined to a fraction of a cell.

`sdk` refines as MMDeploy's SDK does (spec 3.4), with what it reads beyond the right and the bottom edge; `exact` refines as MMPose does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcrate_runtime.geometry import Points

Maps: TypeAlias = "NDArray[np.float32]"
Cells: TypeAlias = "NDArray[np.intp]"
At: TypeAlias = "Callable[[int, int], Maps]"

_HALF: Final = np.float32(0.5)
_QUARTER: Final = np.float32(0.25)


def peaks(maps: Maps) -> tuple[Cells, Maps]:
    """The first largest cell of each map.

    Args:
        maps: (N, K, h, w) float32.

    Returns:
        (N, K, 2) column and row, -1 where nothing is above zero; (N, K) the values there.
    """
    count, keypoints, _, width = maps.shape
    flat = maps.reshape(count, keypoints, -1)
    best = flat.argmax(axis=2)
    scores = np.take_along_axis(flat, best[..., None], axis=2)[..., 0]
    cells = np.stack([best % width, best // width], axis=2)
    cells[scores <= 0] = -1
    return cells, scores


def quarter_shifted(maps: Maps, cells: Cells, *, low_y: int) -> Points:
    """A quarter of a cell towards the larger neighbour, along each axis (Newell et al. 2016; MMPose `refine_keypoints`).

    Args:
        maps: (N, K, h, w) float32.
        cells: (N, K, 2) from `peaks`.
        low_y: MMPose asks each axis for itself and lets the other be in row or column 1; the SDK asks both for more than 1.

    Returns:
        (N, K, 2) float32 in cells.
    """
    _, _, height, width = maps.shape
    x, y = cells[..., 0], cells[..., 1]
    points = cells.astype(np.float32)
    for axis, (own, limit, other, other_limit) in enumerate(((x, width, y, height), (y, height, x, width))):
        inside = (own > 1) & (own < limit - 1) & (other > low_y) & (other < other_limit - (1 if low_y else 0))
        dx, dy = (1, 0) if axis == 0 else (0, 1)
        difference = _at(maps, x + dx, y + dy) - _at(maps, x - dx, y - dy)
        points[..., axis] += np.where(inside, _QUARTER * np.sign(difference), 0)
    return points


def dark(maps: Maps, cells: Cells, *, kernel: int) -> Points:
    """A Newton step on the logarithm of the blurred map (Zhang et al., "Distribution-Aware Coordinate Representation", CVPR 2020).

    Args:
        maps: (N, K, h, w) float32.
        cells: (N, K, 2) from `peaks`.
        kernel: of the blur, odd.

    Returns:
        (N, K, 2) float32 in cells.
    """
    _, _, height, width = maps.shape
    x, y = cells[..., 0], cells[..., 1]
    v = np.log(np.maximum(blurred(maps, kernel=kernel), np.float32(1e-10)))

    def at(dx: int, dy: int) -> Maps:
        return _at(v, x + dx, y + dy)

    gradient_x, gradient_y = (at(1, 0) - at(-1, 0)) * _HALF, (at(0, 1) - at(0, -1)) * _HALF
    xx, yy = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) * _QUARTER, (at(0, 2) - 2 * at(0, 0) + at(0, -2)) * _QUARTER
    xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) * _QUARTER
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    return _newton(cells, gradient_x, gradient_y, xx, xy, yy, where=inside, least=1e-6)


def dark_udp(maps: Maps, cells: Cells, *, kernel: int) -> Points:
    """The same for UDP, with a stencil of 3x3 (Huang et al., CVPR 2020; MMPose `refine_keypoints_dark_udp`). Edges are repeated.

    Args:
        maps: (N, K, h, w) float32.
        cells: (N, K, 2) from `peaks`.
        kernel: of the blur, odd.

    Returns:
        (N, K, 2) float32 in cells. Where nothing is above zero the cell stays.
    """
    v = np.log(np.clip(blurred(maps, kernel=kernel), np.float32(1e-3), np.float32(50)))
    _, _, height, width = maps.shape
    x, y = cells[..., 0], cells[..., 1]

    def at(dx: int, dy: int) -> Maps:
        return _at(v, np.clip(x + dx, 0, width - 1), np.clip(y + dy, 0, height - 1))

    return _udp_step(cells, at, ridge=float(np.finfo(np.float32).eps))


def dark_udp_sdk(maps: Maps, cells: Cells, *, kernel: int) -> Points:
    """What the SDK makes of it: blurred with mirrored edges and not scaled again; beyond the right edge it reads the next row, beyond the bottom the next map.

    Beyond the last map it reads memory that is not its own; here that map's last cell is repeated.
    """
    smooth = np.stack([cv2.GaussianBlur(one, (kernel, kernel), 0) for one in maps.reshape(-1, *maps.shape[2:])]).reshape(maps.shape)
    v = np.log(np.clip(smooth, np.float32(1e-3), np.float32(50)))
    count, keypoints, height, width = maps.shape
    flat = v.reshape(count, -1)
    x, y = cells[..., 0], cells[..., 1]
    first = np.arange(keypoints)[None, :] * height * width

    def at(dx: int, dy: int) -> Maps:
        index = first + np.maximum(y + dy, 0) * width + np.maximum(x + dx, 0)
        return np.take_along_axis(flat, np.minimum(index, flat.shape[1] - 1), axis=1)

    return _udp_step(cells, at, ridge=0.0)


def blurred(maps: Maps, *, kernel: int) -> Maps:
    """Each map blurred with black around it, and scaled so that its largest value stays (MMPose `gaussian_blur`).

    Args:
        maps: (N, K, h, w) float32.
        kernel: odd; the deviation follows from it as OpenCV has it.
    """
    border = (kernel - 1) // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (border, border), (border, border)))
    smooth = np.stack([cv2.GaussianBlur(one, (kernel, kernel), 0) for one in padded.reshape(-1, *padded.shape[2:])]).reshape(padded.shape)
    smooth = smooth[:, :, border : border + maps.shape[2], border : border + maps.shape[3]]
    largest = smooth.max(axis=(2, 3), keepdims=True)
    factor = np.divide(maps.max(axis=(2, 3), keepdims=True), largest, out=np.ones_like(largest), where=largest != 0)
    scaled: Maps = smooth * factor
    return scaled


def _udp_step(cells: Cells, at: At, *, ridge: float) -> Points:
    here = at(0, 0)
    gradient_x, gradient_y = (at(1, 0) - at(-1, 0)) * _HALF, (at(0, 1) - at(0, -1)) * _HALF
    xx, yy = at(1, 0) - 2 * here + at(-1, 0), at(0, 1) - 2 * here + at(0, -1)
    xy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * here - at(-1, 0) - at(0, -1) + at(-1, -1)) * _HALF
    return _newton(cells, gradient_x, gradient_y, xx + np.float32(ridge), xy, yy + np.float32(ridge), where=cells[..., 0] >= 0, least=0.0)


def _newton(cells: Cells, gradient_x: Maps, gradient_y: Maps, xx: Maps, xy: Maps, yy: Maps, *, where: NDArray[np.bool_], least: float) -> Points:
    """The cells, less the inverse Hessian times the gradient, where its determinant is larger than `least`."""
    determinant = xx * yy - xy * xy
    good = where & (np.abs(determinant) > least)
    safe = np.where(good, determinant, 1)
    points = cells.astype(np.float32)
    points[..., 0] -= np.where(good, (yy * gradient_x - xy * gradient_y) / safe, 0)
    points[..., 1] -= np.where(good, (xx * gradient_y - xy * gradient_x) / safe, 0)
    return points


def _at(maps: Maps, x: Cells, y: Cells) -> Maps:
    """(N, K) the values of each map at one cell; what lies outside is taken from the edge, and not used."""
    _, _, height, width = maps.shape
    index = np.clip(y, 0, height - 1) * width + np.clip(x, 0, width - 1)
    return np.take_along_axis(maps.reshape(*maps.shape[:2], -1), index[..., None], axis=2)[..., 0]
