"""Errors of keypoints against the truth, instance by instance: PCK, AUC, EPE and NME as MMPose defines them (`mmpose.evaluation`).

All take N instances of K keypoints: `found` and `truth` (N, K, 2) in image pixels, `visible` (N, K) bool, and leave out what is not visible. They are NaN
where nothing is left, for which MMPose says 0: of an error that would be perfect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Points: TypeAlias = "NDArray[np.floating[Any]]"
Visible: TypeAlias = "NDArray[np.bool_]"
Sizes: TypeAlias = "NDArray[np.floating[Any]]"

PCK_THRESHOLD: Final = 0.2
"""Of a box's longer side; what MMPose's configs of hands have."""
AUC_PX: Final = 30.0
AUC_STEPS: Final = 20
EYES: Final[Mapping[int, tuple[int, int]]] = {22: (0, 1), 29: (8, 9), 68: (36, 45), 98: (60, 72), 106: (66, 79)}
"""Keypoints of a set -> the two whose distance errors are divided by: Horse-10 (nose and eye), COFW, 300W and COCO-WholeBody's face, WFLW, LaPa (outer eyes)."""


def shares_within(found: Points, truth: Points, visible: Visible, sizes: Sizes, *, threshold: float) -> Sizes:
    """The share of each keypoint's instances that lie nearer to the truth than `threshold` times the instance's size.

    Args:
        found: (N, K, 2).
        truth: (N, K, 2).
        visible: (N, K).
        sizes: (N,) in pixels; instances of size 0 are left out.
        threshold: of the size.

    Returns:
        (K,) from 0 to 1, NaN for a keypoint that is visible in no instance.
    """
    distances = _distances(found, truth, visible, sizes)
    counted = ~np.isnan(distances)
    within = (np.where(counted, distances, np.inf) < threshold).sum(axis=0)
    counts = counted.sum(axis=0)
    shares: Sizes = np.divide(within, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return shares


def pck(found: Points, truth: Points, visible: Visible, sizes: Sizes, *, threshold: float = PCK_THRESHOLD) -> float:
    """Percentage of correct keypoints, from 0 to 1: the mean over the keypoints of `shares_within` (Yang and Ramanan, TPAMI 2013; MMPose `PCKAccuracy`)."""
    return _mean(shares_within(found, truth, visible, sizes, threshold=threshold))


def auc(found: Points, truth: Points, visible: Visible, *, norm_px: float = AUC_PX, steps: int = AUC_STEPS) -> float:
    """Area under the curve of PCK, from 0 to 1: its mean over the thresholds 0, 1, ... `steps` - 1, in parts of `norm_px` (MMPose `AUC`)."""
    sizes = np.full(len(found), norm_px)
    return float(np.mean([pck(found, truth, visible, sizes, threshold=step / steps) for step in range(steps)]))


def epe(found: Points, truth: Points, visible: Visible) -> float:
    """End-point error in pixels: the mean distance of all visible keypoints (MMPose `EPE`)."""
    return nme(found, truth, visible, np.ones(len(found)))


def nme(found: Points, truth: Points, visible: Visible, sizes: Sizes) -> float:
    """Normalised mean error: the mean of all distances, each divided by its instance's size (MMPose `NME`).

    Args:
        found: (N, K, 2).
        truth: (N, K, 2).
        visible: (N, K).
        sizes: (N,) in pixels; instances of size 0 are left out.
    """
    return _mean(_distances(found, truth, visible, sizes))


def spans(truth: Points, pair: tuple[int, int]) -> Sizes:
    """(N,) the distance between two keypoints of each instance in pixels, whether they are visible or not, as MMPose measures it."""
    one, other = pair
    distances: Sizes = np.linalg.norm(truth[:, one] - truth[:, other], axis=1)
    return distances


def _distances(found: Points, truth: Points, visible: Visible, sizes: Sizes) -> Sizes:
    """(N, K) in sizes, NaN for what does not count."""
    counted = visible & (sizes > 0)[:, None]
    distances = np.linalg.norm(np.asarray(found, dtype=np.float64) - truth, axis=2)
    in_sizes: Sizes = np.divide(distances, sizes[:, None], out=np.full(distances.shape, np.nan), where=counted)
    return in_sizes


def _mean(values: Sizes) -> float:
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else math.nan
