"""Accuracy on data with COCO annotations, through the tasks that users run: AP and AR of boxes and of keypoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.average_precision import FIGURES, KEYPOINT_SCORE, Accuracy, box_rows, check_evaluator, coco_figures, pose_rows
from modelcrate_runtime.coco_data import Annotation, Boxes, Dataset
from modelcrate_runtime.images import read_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_runtime.results import Detections
    from modelcrate_runtime.tasks import Detector, PoseDetector

__all__ = [
    "FIGURES", "KEYPOINT_SCORE", "Accuracy", "Boxes", "Dataset", "box_rows", "check_evaluator", "coco_figures", "detect_boxes", "evaluate_boxes",
    "evaluate_keypoints", "find_boxes", "find_keypoints", "pose_rows",
]  # fmt: skip

Report: TypeAlias = Callable[[int, int], None]
"""Called with the number of images that are done, and of all."""


def evaluate_boxes(detector: Detector, dataset: Dataset, report: Report | None = None) -> Accuracy:
    """AP of the boxes of a detector.

    Args:
        detector: an opened detector; all detections that it gives count, whatever their score.
        dataset: images and true boxes.
        report: gets the progress.

    Raises:
        ConfigError: another set of classes.
        InputError: no image could be read.
        MissingBackendError: faster-coco-eval is not installed.
    """
    check_evaluator()
    result = find_boxes(detector, dataset, report)
    result.figures = coco_figures(dataset, result)
    return result


def evaluate_keypoints(
    estimator: PoseDetector,
    dataset: Dataset,
    report: Report | None = None,
    *,
    boxes: Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None,
) -> Accuracy:
    """AP of keypoints, with the sigmas of the bundle's own set.

    Args:
        estimator: an opened pose estimator.
        dataset: images and true keypoints.
        report: gets the progress.
        boxes: image id -> (N, 4) boxes in image pixels and their (N,) scores, of a detector; None takes the true boxes of those who have keypoints.

    Raises:
        ConfigError: data with another number of keypoints.
        InputError: no image could be read.
        MissingBackendError: faster-coco-eval is not installed.
    """
    check_evaluator()
    dataset.require_keypoints(estimator.keypoint_count)
    given: dict[int, Boxes] | None = None
    if boxes is not None:
        category = dataset.keypoint_categories[0]
        given = {image_id: Boxes(boxes_xyxy=of_image, scores=scores, categories=[category] * len(scores)) for image_id, (of_image, scores) in boxes.items()}
    result = find_keypoints(estimator, dataset, report, boxes=given)
    info = estimator.bundle.manifest.keypoints if estimator.bundle.manifest else None
    result.figures = coco_figures(dataset, result, info.sigmas if info else ())
    return result


def find_boxes(detector: Detector, dataset: Dataset, report: Report | None = None, *, batch: int = 1) -> Accuracy:
    """What a detector finds, without figures.

    Args:
        detector: an opened detector.
        dataset: the images.
        report: gets the progress.
        batch: images in one call.

    Raises:
        ConfigError: another set of classes.
        InputError: no image could be read.
    """
    categories = dataset.category_ids(detector.class_names)
    result = Accuracy(kind="bbox")
    for image_id, found in _detections(detector, dataset, result, report, batch=batch):
        if found.labels.max(initial=0) >= len(categories):
            raise ConfigError(
                f"{dataset.annotations}: categories: expected one for each class of the model, found {len(categories)} and the label {found.labels.max()}",
                hint="evaluate on data of the same classes",
            )
        result.rows += box_rows(image_id, found, categories)
    return result


def detect_boxes(detector: Detector, dataset: Dataset, report: Report | None = None, *, batch: int = 1, least_score: float = 0.0) -> dict[int, Boxes]:
    """The boxes of a detector for a pose estimator: those of classes whose objects have keypoints.

    Args:
        detector: an opened detector.
        dataset: the images.
        report: gets the progress.
        batch: images in one call.
        least_score: boxes that score less are left out.

    Returns:
        Image id -> its boxes.

    Raises:
        ConfigError: no such class.
        InputError: no image could be read.
    """
    categories = dataset.pose_categories(detector.class_names)
    boxes: dict[int, Boxes] = {}
    for image_id, found in _detections(detector, dataset, Accuracy(kind="bbox"), report, batch=batch):
        chosen = found[np.isin(found.labels, list(categories)) & (found.scores >= least_score)]
        boxes[image_id] = Boxes(boxes_xyxy=chosen.boxes_xyxy, scores=chosen.scores, categories=[categories[label] for label in chosen.labels.tolist()])
    return boxes


def find_keypoints(
    estimator: PoseDetector, dataset: Dataset, report: Report | None = None, *, boxes: Mapping[int, Boxes] | None = None, batch: int = 1
) -> Accuracy:
    """What a pose estimator finds, without figures.

    Args:
        estimator: an opened pose estimator.
        dataset: images and true keypoints.
        report: gets the progress.
        boxes: image id -> the boxes in it; None takes the true boxes of those who have keypoints.
        batch: images in one call.

    Raises:
        InputError: no image could be read.
    """
    result = Accuracy(kind="keypoints")
    true = dataset.instances()
    given = boxes if boxes is not None else {image_id: _true_boxes(of_image) for image_id, of_image in true.items()}
    # Where nobody is known to be there is nothing to do; where nobody was found, somebody may have been missed.
    ids = [image.id for image in dataset.content.images if boxes is not None or image.id in true]
    for part in read_batches(dataset.names(ids), dataset.folder, result, report, batch=batch, where=dataset.annotations):
        of_part = [given.get(image_id, Boxes.of([])) for image_id, _ in part]
        found = estimator.estimate_batch([image for _, image in part], [one.boxes_xyxy for one in of_part])
        for (image_id, _), own, poses in zip(part, of_part, found, strict=True):
            result.rows += pose_rows(image_id, own.categories, poses, own.scores)
            if boxes is None:
                result.pairs += zip(true[image_id], poses.keypoints_xy, strict=True)
    return result


def read_batches(
    names: Mapping[int, str], folder: Path, result: Accuracy, report: Report | None, *, batch: int, where: Path
) -> Iterator[list[tuple[int, NDArray[np.uint8]]]]:
    """The images, several at a time, read ahead; those that cannot be read are named in the result, with the time that all took.

    Args:
        names: id -> name of the file.
        folder: what the names are relative to.
        result: gets what was counted.
        report: gets the progress, when what was given is used up.
        batch: images at a time.
        where: what names them, for messages.

    Raises:
        InputError: none of them can be read.
    """
    started = time.perf_counter()
    part: list[tuple[int, NDArray[np.uint8]]] = []
    for done, (image_id, image) in enumerate(zip(names, read_images([folder / name for name in names.values()]), strict=True), start=1):
        if isinstance(image, InputError):
            result.skipped[image_id] = str(image)
        else:
            result.images += 1
            part.append((image_id, image))
        if len(part) == batch or (part and done == len(names)):
            yield part
            part = []
        if report and not part:
            report(done, len(names))
    result.seconds = time.perf_counter() - started
    if not result.images:
        raise InputError(
            f"{where}: expected images in {folder}, found none that can be read: {next(iter(result.skipped.values()), 'no image')}",
            hint="say where the images are",
        )


def _detections(detector: Detector, dataset: Dataset, result: Accuracy, report: Report | None, *, batch: int) -> Iterator[tuple[int, Detections]]:
    every = [image.id for image in dataset.content.images]
    for part in read_batches(dataset.names(every), dataset.folder, result, report, batch=batch, where=dataset.annotations):
        yield from zip((image_id for image_id, _ in part), detector.detect_batch([image for _, image in part]), strict=True)


def _true_boxes(instances: Sequence[Annotation]) -> Boxes:
    rows = []
    for one in instances:
        left, top, width, height = one.bbox
        rows.append(([left, top, left + width, top + height], 1.0, one.category_id))
    return Boxes.of(rows)
