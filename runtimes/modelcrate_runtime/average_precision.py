"""COCO's AP and AR of boxes and of keypoints, as pycocotools computes them; of the whole body by parts, as xtcocotools does."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from modelcrate_bundle.errors import InputError, MissingBackendError
from modelcrate_runtime.coco_data import WHOLE_BODY, Annotation, Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_runtime.results import Detections, Poses

Rows: TypeAlias = "list[dict[str, Any]]"

KEYPOINT_SCORE: Final = 0.2
"""Keypoints that score more count in the score of a pose; MMPose's `vis_thr` of COCO."""
FIGURES: Final = ("AP", "AP50", "AP75", "AR")
"""What gates look at."""
BOX_FIGURES: Final[Sequence[str]] = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
KEYPOINT_FIGURES: Final[Sequence[str]] = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


@dataclass(kw_only=True, slots=True)
class Accuracy:
    """What came of an evaluation.

    Attributes:
        kind: what the rows are.
        figures: AP, AP50, AP75, AR, from 0 to 1.
        images: how many were evaluated.
        skipped: ids of images that could not be read, with the reason.
        rows: the results in COCO's format; of classes the best labels and their scores.
        pairs: of true boxes: each object, and the (K, 2) float32 keypoints in image pixels that were found in its box.
        seconds: from the first image to the last result, with what reading them took.
    """

    kind: Literal["bbox", "keypoints", "classes"]
    figures: dict[str, float] = field(default_factory=dict)
    images: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    rows: Rows = field(default_factory=list)
    pairs: list[tuple[Annotation, NDArray[np.float32]]] = field(default_factory=list)
    seconds: float = 0.0


def check_evaluator() -> None:
    """Refuse early what would fail late.

    Raises:
        MissingBackendError: faster-coco-eval is not installed.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise MissingBackendError("COCO's AP needs faster-coco-eval, not installed", hint="pip install 'modelcrate[eval]'")


def box_rows(image_id: int, found: Detections, categories: Sequence[int]) -> Rows:
    """The detections of one image as COCO's results; `categories` has a label's category."""
    rows = []
    for box, score, label in zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        rows.append({"image_id": image_id, "category_id": categories[label], "bbox": sides, "score": score})
    return rows


def pose_rows(image_id: int, category: int | Sequence[int], poses: Poses, box_scores: NDArray[np.floating[Any]]) -> Rows:
    """The poses of one image as COCO's results. As MMPose rescores: a box's score times the mean of its keypoints that are seen.

    Args:
        image_id: the image's.
        category: of all, or of each.
        poses: (N) poses.
        box_scores: (N,) of their boxes.
    """
    categories = [category] * len(poses) if isinstance(category, int) else category
    rows = []
    for points, scores, box_score, of_box in zip(poses.keypoints_xy, poses.scores, box_scores.tolist(), categories, strict=True):
        seen = scores[scores > KEYPOINT_SCORE]
        flat = np.concatenate([points, scores[:, None]], axis=1).astype(float).ravel().tolist()
        score = box_score * float(seen.mean()) if len(seen) else 0.0
        rows.append({"image_id": image_id, "category_id": of_box, "keypoints": flat, "score": score})
    return rows


def coco_figures(dataset: Dataset, result: Accuracy, sigmas: Sequence[float] = ()) -> dict[str, float]:
    """`FIGURES` of results on the images that could be read; keypoints with the sigmas of their own set, COCO's where there are none.

    Raises:
        InputError: nothing to find in these images.
    """
    every = average_precision(dataset, result, sigmas)
    return {name: every["AR100" if name == "AR" and result.kind == "bbox" else name] for name in FIGURES}


def average_precision(dataset: Dataset, result: Accuracy, sigmas: Sequence[float] = ()) -> dict[str, float]:
    """`BOX_FIGURES` or `KEYPOINT_FIGURES` of results on the images that could be read, from 0 to 1, NaN where there is nothing of that size.

    Args:
        dataset: the truth.
        result: what was found.
        sigmas: (K) of keypoints; empty for COCO's.

    Raises:
        InputError: nothing to find in these images.
    """
    if not result.rows:
        return dict.fromkeys(BOX_FIGURES if result.kind == "bbox" else KEYPOINT_FIGURES, 0.0)
    images = [image.id for image in dataset.content.images if image.id not in result.skipped]
    kind: Literal["bbox", "keypoints"] = "bbox" if result.kind == "bbox" else "keypoints"
    figures = _evaluate(_filled(dataset.raw, kind=kind), result.rows, images, kind=kind, sigmas=sigmas)
    if math.isnan(figures["AP"]):  # no gate is to pass on two figures for nothing
        raise InputError(f"{dataset.annotations}: expected objects to find in the images, found none of the classes that is no crowd", hint="give other data")
    return figures


def whole_body_precision(dataset: Dataset, result: Accuracy, sigmas: Sequence[float]) -> dict[str, dict[str, float]]:
    """`KEYPOINT_FIGURES` of each part of the whole body and of all, as MMPose's `CocoWholeBodyMetric` and its xtcocotools have them.

    A part counts where any keypoint of it is visible; the sizes are the whole person's, those of what was found the body's.

    Args:
        dataset: the truth, with 133 keypoints in one list.
        result: what was found.
        sigmas: (133).

    Returns:
        "keypoints" for all and "keypoints_<part>" -> figures, NaN where nothing of a part is visible.

    Raises:
        InputError: nothing to find in these images.
    """
    body = WHOLE_BODY["body"]
    rows = [row | {"bbox": _extent(row["keypoints"][: 3 * body])} for row in result.rows]
    everything = Accuracy(kind="keypoints", rows=rows, skipped=result.skipped)
    figures = {"keypoints": average_precision(dataset, everything, sigmas)}
    images = [image.id for image in dataset.content.images if image.id not in result.skipped]
    ends = list(itertools.accumulate(WHOLE_BODY.values()))
    for part, count, end in zip(WHOLE_BODY, WHOLE_BODY.values(), ends, strict=True):
        own = slice(3 * (end - count), 3 * end)
        truth = dataset.raw | {"annotations": [one | {"keypoints": one.get("keypoints", [])[own]} for one in dataset.raw["annotations"]]}
        found = [row | {"keypoints": row["keypoints"][own]} for row in rows if any(score > 0 for score in row["keypoints"][own][2::3])]
        filled = _filled(truth, kind="keypoints")
        nothing: dict[str, float] = dict.fromkeys(KEYPOINT_FIGURES, 0.0)
        figures[f"keypoints_{part}"] = _evaluate(filled, found, images, kind="keypoints", sigmas=sigmas[end - count : end]) if found else nothing
    return figures


def _evaluate(truth: dict[str, Any], rows: Rows, images: list[int], *, kind: Literal["bbox", "keypoints"], sigmas: Sequence[float]) -> dict[str, float]:
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO(truth)
        found = data.loadRes([dict(row) for row in rows])  # copies: it writes into them
        own_sigmas = list(sigmas) if sigmas else None
        evaluation = COCOeval_faster(data, found, kind, print_function=lambda *_: None, kpt_oks_sigmas=own_sigmas)
        evaluation.params.imgIds = images
        evaluation.run()
    names = BOX_FIGURES if kind == "bbox" else KEYPOINT_FIGURES
    values = [float(value) for value in evaluation.stats[: len(names)]]
    return {name: value if value >= 0 else math.nan for name, value in zip(names, values, strict=True)}


def _filled(raw: dict[str, Any], *, kind: str) -> dict[str, Any]:
    """A copy, since the evaluation writes into it; with what it insists on and not every writer of annotations says."""
    length = max(len(one.get("keypoints", ())) for one in raw["annotations"])
    filled = []
    for one in raw["annotations"]:
        more: dict[str, Any] = {"area": one.get("area", one["bbox"][2] * one["bbox"][3])}
        if kind == "keypoints":
            points = one.get("keypoints") or [0] * length
            more |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        filled.append(one | more)
    return raw | {"annotations": filled}


def _extent(keypoints: Sequence[float]) -> list[float]:
    """Left, top, width and height of keypoints, seen or not."""
    x, y = keypoints[0::3], keypoints[1::3]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]
