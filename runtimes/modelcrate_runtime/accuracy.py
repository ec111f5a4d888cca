"""Accuracy on data with COCO annotations: AP and AR of boxes and of keypoints, as pycocotools computes them, through the tasks that users run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec
import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError, MissingBackendError
from modelcrate_runtime.images import read_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_runtime.results import Detections, Poses
    from modelcrate_runtime.tasks import Detector, PoseDetector

Rows: TypeAlias = "list[dict[str, Any]]"
Report: TypeAlias = Callable[[int, int], None]
"""Called with the number of images that are done, and of all."""

KEYPOINT_SCORE: Final = 0.2
"""Keypoints that score more count in the score of a pose; MMPose's `vis_thr` of COCO."""
_COCO: Final = "images, annotations and categories, as COCO has them"
FIGURES: Final = ("AP", "AP50", "AP75", "AR")


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Category(msgspec.Struct):
    id: int
    name: str = ""


class _Annotation(msgspec.Struct):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    num_keypoints: int = 0
    keypoints: list[float] = msgspec.field(default_factory=list)


class _Content(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Images with COCO annotations.

    Attributes:
        annotations: the file.
        raw: its content, as the evaluation reads it.
        content: the part of it that is read here.
        folder: what the images' names are relative to.
    """

    annotations: Path
    raw: dict[str, Any]
    content: _Content
    folder: Path

    @classmethod
    def read(cls, annotations: Path, folder: Path | None = None, *, limit: int | None = None) -> Dataset:
        """Read annotations.

        Args:
            annotations: a COCO JSON file.
            folder: of the images; None for the file's own.
            limit: only so many images, the first ones.

        Raises:
            InputError: no such file, or not such JSON; the message has the JSON path.
        """
        try:
            raw: dict[str, Any] = msgspec.json.decode(annotations.read_bytes(), type=dict)
        except OSError as error:
            raise InputError(f"{annotations}: expected COCO annotations, found: {error.strerror}", hint="check the path") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{annotations}: expected COCO annotations, found: {error}", hint=_COCO) from error
        return cls.of(raw, annotations=annotations, folder=folder or annotations.parent, limit=limit)

    @classmethod
    def of(cls, raw: dict[str, Any], *, annotations: Path, folder: Path, limit: int | None = None) -> Dataset:
        """From what such a file has in it.

        Raises:
            InputError: not COCO's structure, or no annotations.
        """
        try:
            content = msgspec.convert(raw, _Content)
        except msgspec.ValidationError as error:
            raise InputError(f"{annotations}: expected COCO annotations, found: {error}", hint=_COCO) from error
        if limit is not None:
            content.images = content.images[:limit]
        known = {image.id for image in content.images}
        content.annotations = [one for one in content.annotations if one.image_id in known]
        if not content.annotations:
            raise InputError(f"{annotations}: expected annotated images, found {len(content.images)} images without any annotation")
        return cls(annotations=annotations, raw=raw, content=content, folder=folder)

    def category_ids(self, class_names: Sequence[str]) -> list[int]:
        """Label -> category: by name, or in order where there are as many and no name is known.

        Raises:
            ConfigError: classes that are not the data's.
        """
        by_name = {category.name: category.id for category in self.content.categories}
        if all(name in by_name for name in class_names) and class_names:
            return [by_name[name] for name in class_names]
        if not set(class_names) & by_name.keys() and len(class_names) in {0, len(by_name)}:
            return [category.id for category in self.content.categories]
        missing = next(name for name in class_names if name not in by_name)
        raise ConfigError(
            f"{self.annotations}: categories: expected the model's classes, found none called {missing!r}", hint="evaluate on data of the same classes"
        )


@dataclass(kw_only=True, slots=True)
class Accuracy:
    """What came of an evaluation.

    Attributes:
        kind: "bbox" or "keypoints".
        figures: AP, AP50, AP75, AR, from 0 to 1.
        images: how many were evaluated.
        skipped: ids of images that could not be read, with the reason.
        rows: the results in COCO's format.
    """

    kind: Literal["bbox", "keypoints"]
    figures: dict[str, float] = field(default_factory=dict)
    images: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    rows: Rows = field(default_factory=list)


def check_evaluator() -> None:
    """Refuse early what would fail late.

    Raises:
        MissingBackendError: faster-coco-eval is not installed.
    """
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise MissingBackendError("COCO's AP needs faster-coco-eval, not installed", hint="pip install 'modelcrate[eval]'")


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
    categories = dataset.category_ids(detector.class_names)
    result = Accuracy(kind="bbox")
    for image_id, image in _images(dataset, [image.id for image in dataset.content.images], result, report):
        found = detector.detect(image)
        if found.labels.max(initial=0) >= len(categories):
            raise ConfigError(
                f"{dataset.annotations}: categories: expected one for each class of the model, found {len(categories)} and the label {found.labels.max()}",
                hint="evaluate on data of the same classes",
            )
        result.rows += box_rows(image_id, found, categories)
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
    given: Mapping[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = _true_boxes(dataset) if boxes is None else boxes
    of_people = {one.category_id for one in dataset.content.annotations if one.keypoints}
    expected = {len(one.keypoints) // 3 for one in dataset.content.annotations if one.keypoints}
    if expected != {estimator.keypoint_count}:
        found = " and ".join(str(count) for count in sorted(expected)) or "none"
        raise ConfigError(
            f"{dataset.annotations}: keypoints: expected {estimator.keypoint_count} for each object, as the model has, found {found}",
            hint="evaluate on data of the same set of keypoints",
        )
    info = estimator.bundle.manifest.keypoints if estimator.bundle.manifest else None
    result = Accuracy(kind="keypoints")
    ids = [image.id for image in dataset.content.images if boxes is not None or image.id in given]
    nothing = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)
    for image_id, image in _images(dataset, ids, result, report):
        of_image, box_scores = given.get(image_id, nothing)
        poses = estimator.estimate(image, of_image)
        result.rows += pose_rows(image_id, min(of_people), poses, box_scores)
    result.figures = coco_figures(dataset, result, info.sigmas if info else ())
    return result


def box_rows(image_id: int, found: Detections, categories: Sequence[int]) -> Rows:
    """The detections of one image as COCO's results; `categories` has a label's category."""
    rows = []
    for box, score, label in zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        rows.append({"image_id": image_id, "category_id": categories[label], "bbox": sides, "score": score})
    return rows


def pose_rows(image_id: int, category: int, poses: Poses, box_scores: NDArray[np.floating[Any]]) -> Rows:
    """The poses of one image as COCO's results. As MMPose rescores: a box's score times the mean of its keypoints that are seen."""
    rows = []
    for points, scores, box_score in zip(poses.keypoints_xy, poses.scores, box_scores.tolist(), strict=True):
        seen = scores[scores > KEYPOINT_SCORE]
        flat = np.concatenate([points, scores[:, None]], axis=1).astype(float).ravel().tolist()
        score = box_score * float(seen.mean()) if len(seen) else 0.0
        rows.append({"image_id": image_id, "category_id": category, "keypoints": flat, "score": score})
    return rows


def _true_boxes(dataset: Dataset) -> dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Image id -> the boxes of those who have visible keypoints, crowds aside, as (N, 4) xyxy, and ones."""
    boxes: dict[int, list[list[float]]] = {}
    for one in dataset.content.annotations:
        left, top, width, height = one.bbox
        if not one.iscrowd and any(one.keypoints[2::3]) and width > 0 and height > 0:
            boxes.setdefault(one.image_id, []).append([left, top, left + width, top + height])
    return {image_id: (np.array(of_image, dtype=np.float32), np.ones(len(of_image), dtype=np.float32)) for image_id, of_image in boxes.items()}


def _images(dataset: Dataset, ids: Sequence[int], result: Accuracy, report: Report | None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The images, one after another; those that cannot be read are named in the result."""
    names = {image.id: image.file_name for image in dataset.content.images}
    for done, image_id in enumerate(ids, start=1):
        try:
            image = read_image(dataset.folder / names[image_id])
        except InputError as error:
            result.skipped[image_id] = str(error)
        else:
            result.images += 1
            yield image_id, image
        if report:
            report(done, len(ids))
    if not result.images:
        raise InputError(
            f"{dataset.annotations}: expected images in {dataset.folder}, found none that can be read: {next(iter(result.skipped.values()), 'no image')}",
            hint="say where the images are",
        )


def coco_figures(dataset: Dataset, result: Accuracy, sigmas: Sequence[float] = ()) -> dict[str, float]:
    """COCO's figures of results on the images that could be read; keypoints with the sigmas of their own set, COCO's where there are none."""
    from faster_coco_eval import COCO, COCOeval_faster

    if not result.rows:
        return dict.fromkeys(FIGURES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(_filled(dataset.raw, kind=result.kind))
        own_sigmas = list(sigmas) if sigmas else None
        evaluation = COCOeval_faster(truth, truth.loadRes(result.rows), result.kind, print_function=lambda *_: None, kpt_oks_sigmas=own_sigmas)
        evaluation.params.imgIds = [image.id for image in dataset.content.images if image.id not in result.skipped]
        evaluation.run()
    stats = evaluation.stats
    if stats[0] < 0:  # no gate is to pass on two figures for nothing
        raise InputError(f"{dataset.annotations}: expected objects to find in the images, found none of the classes that is no crowd", hint="give other data")
    return dict(zip(FIGURES, (float(stats[i]) for i in (0, 1, 2, 8 if result.kind == "bbox" else 5)), strict=True))


def _filled(raw: dict[str, Any], *, kind: str) -> dict[str, Any]:
    """A copy, since the evaluation writes into it; of keypoints with what it insists on and not every writer of annotations says."""
    length = max(len(one.get("keypoints", ())) for one in raw["annotations"])
    filled = []
    for one in raw["annotations"]:
        more: dict[str, Any] = {}
        if kind == "keypoints":
            points = one.get("keypoints") or [0] * length
            more = {"area": one.get("area", one["bbox"][2] * one["bbox"][3]), "keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
        filled.append(one | more)
    return raw | {"annotations": filled}
