"""Whether a peer's boxes and keypoints are ours: the rules of `scripts/bench_peers.py`, and what is measured for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Found: TypeAlias = tuple[Array, Array]
"""Of one picture: (N, 5) boxes and their scores, NaN where there are none, and (N or 0, K, 2) keypoints."""


SDK, RTMLIB = "mmdeploy_runtime", "rtmlib"
OURS, OURS_SDK = "modelcrate", "modelcrate, geometry sdk"
POSE_WH: Final = (192, 256)
BINS_PER_PX: Final = 2
"""SimCC's, per pixel of the network's input."""
PADDING: Final = 1.25
"""Of a box before it is cut out."""
MARGIN: Final = 1e-4
"""A box whose score is as near to the threshold may be found by one and not by another: as much as ONNX Runtimes differ, and more."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a peer's results are ours.

    Attributes:
        ours: whose results its are.
        box_px: furthest that a side of a box may be off.
        keypoint: furthest that a keypoint may be off along either axis, in `unit`, to count as the same.
        unit: "px" of the picture, or "bins" of the network's answer: half a pixel of its input.
        share: of the keypoints that have to be the same.
    """

    ours: str
    box_px: float
    keypoint: float
    unit: Literal["px", "bins"]
    share: float


RULES: Final[Mapping[str, Rule]] = {
    # Geometry "sdk" is the SDK's arithmetic to the bit, see tests/conformance. What differs is its ONNX Runtime, 1.15.1: boxes move by float32's noise times the
    # size of the picture, keypoints do not move at all unless two bins are equally high, and then by one bin or to the other peak.
    SDK: Rule(ours=OURS_SDK, box_px=0.05, keypoint=1e-3, unit="px", share=0.99),
    # The same conventions and the same ONNX Runtime. Boxes agree. Crops are cut out by the OpenCV that is there, ours as OpenCV 4 did on any: on OpenCV 5 one
    # value in 20 differs, by up to four levels of 255 (see geometry.warp_affine). So a peak may be in the next bin, and where two are nearly of one height in the
    # other one. Of 1547 keypoints of the demo model 50 were one bin away, 4 further, the others at the same place.
    RTMLIB: Rule(ours=OURS, box_px=0.05, keypoint=1.01, unit="bins", share=0.97),
}


def difference(ours: Sequence[Found], theirs: Sequence[Found], *, rule: Rule, thr: float, size_wh: tuple[int, int]) -> dict[str, Any]:
    """How far apart two are on the same pictures.

    rtmlib does not cut boxes at the edges of the picture, keeps those that lie beside it, in the padding, and looks for the pose in another crop then: its boxes
    are cut here, what is left of nothing is no box, and keypoints of what was cut are left out.
    """
    alone = 0
    sides: list[float] = []
    overlaps: list[float] = []
    shifts: list[Array] = []
    units: list[Array] = []
    for (boxes, keypoints), (all_boxes, all_keypoints) in zip(ours, theirs, strict=True):
        cut = np.clip(all_boxes[:, :4], 0, (*size_wh, *size_wh))
        rows = np.flatnonzero((cut[:, 2:] > cut[:, :2]).all(axis=1))
        inside, their_boxes = cut[rows], all_boxes[rows]
        overlap = iou(boxes[:, :4], inside)
        pairs = [(i, int(j)) for i, j in enumerate(overlap.argmax(axis=1)) if overlap[i, j] >= 0.5 and overlap[:, j].argmax() == i] if overlap.size else []
        paired = [set(column) for column in zip(*pairs, strict=True)] or [set(), set()]
        for scores, taken in zip((boxes[:, 4], their_boxes[:, 4]), paired, strict=True):
            alone += sum(not abs(score - thr) <= MARGIN for i, score in enumerate(scores) if i not in taken)
        for i, j in pairs:
            sides.append(float(np.abs(boxes[i, :4] - inside[j]).max()))
            overlaps.append(float(overlap[i, j]))
            if len(keypoints) and np.abs(inside[j] - their_boxes[j, :4]).max() <= rule.box_px:
                shifts.append(np.abs(keypoints[i] - all_keypoints[rows[j]]).max(axis=1))
                units.append(np.full(len(shifts[-1]), bin_px(boxes[i])))
    result: dict[str, Any] = {"boxes": len(sides), "alone": alone, "worst_box_px": worst(sides), "least_iou": float(min(overlaps, default=1.0))}
    has_keypoints = any(len(keypoints) for _, keypoints in ours)
    return result | (of_keypoints(shifts, units, rule) if has_keypoints else {})


def of_keypoints(shifts_px: Sequence[Array], bins_px: Sequence[Array], rule: Rule) -> dict[str, Any]:
    """Statistics of keypoints.

    Args:
        shifts_px: how far they are off along the worse axis, pose by pose.
        bins_px: how wide a bin of the network's answer is there.
        rule: says which shift counts as none.
    """
    shifts = np.concatenate([np.zeros(0), *shifts_px])
    if not len(shifts):
        return {"keypoints": 0}
    allowed = rule.keypoint * (np.concatenate(list(bins_px)) if rule.unit == "bins" else 1.0)
    tolerance = {"share": float((shifts <= allowed).mean()), "within": rule.keypoint, "unit": rule.unit}
    return {"keypoints": len(shifts), **tolerance, "mean_px": float(shifts.mean()), "worst_px": worst(shifts)}


def worst(values: Sequence[float] | Array) -> float:
    return float(max(values, default=0.0))


def iou(a: Array, b: Array) -> Array:
    sides = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]), 0, None)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    both = sides.prod(axis=2)
    return np.asarray(both / (areas[0][:, None] + areas[1][None] - both))


def bin_px(box: Array) -> float:
    """How wide a bin of the network's answer is in the picture."""
    width, height = POSE_WH
    return float(max(box[2] - box[0], (box[3] - box[1]) * width / height)) * PADDING / (width * BINS_PER_PX)


def complaints(rule: Rule, found: Mapping[str, Any]) -> list[str]:
    """Why these results are not the same; none where they are.

    Args:
        rule: what is asked.
        found: figures of `difference` or `of_keypoints`; a figure that is not there is not asked for.
    """
    wrong = [f"there are no {what} to compare" for what in ("boxes", "keypoints") if found.get(what) == 0]
    if found.get("alone"):
        wrong.append(f"{found['alone']} boxes have no partner")
    if found.get("worst_box_px", 0.0) > rule.box_px:
        wrong.append(f"a box is {found['worst_box_px']:.3f} px off, more than {rule.box_px}")
    if found.get("share", 1.0) < rule.share:
        wrong.append(f"{found['share']:.1%} of the keypoints are within {rule.keypoint:g} {rule.unit}, fewer than {rule.share:.0%}")
    if found.get("frames_apart"):
        wrong.append(f"tracks differ in {found['frames_apart']} frames")
    return wrong
