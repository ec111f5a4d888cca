"""The accuracy of several subjects on the same data: what is measured of which task, and how far each falls behind the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError, TaskMismatchError
from modelcrate_runtime import keypoint_metrics
from modelcrate_runtime.accuracy import find_boxes, find_keypoints
from modelcrate_runtime.average_precision import Accuracy, average_precision, whole_body_precision
from modelcrate_runtime.class_labels import Labelled, find_classes, read_labels, top_k
from modelcrate_runtime.coco_data import WHOLE_BODY, Boxes, Dataset, read_coco, sift
from modelcrate_runtime.skeletons import COCO_17
from modelcrate_runtime.tasks import Classifier, Detector, PoseDetector

if TYPE_CHECKING:
    from pathlib import Path

    from modelcrate_bundle.manifest import KeypointInfo
    from modelcrate_runtime.accuracy import Report
    from modelcrate_runtime.coco_data import Skipped
    from modelcrate_runtime.sessions import SessionOptions
    from modelcrate_runtime.subjects import Subject, Task

Metric: TypeAlias = Literal["bbox", "keypoints", "pck", "auc", "epe", "nme", "topk"]
Figures: TypeAlias = "dict[str, dict[str, float]]"
"""Metric -> its figures; of the whole body "keypoints_<part>" too."""

METRICS: Final[Mapping[str, tuple[Metric, ...]]] = {
    "detector": ("bbox",),
    "pose estimator": ("keypoints", "pck", "auc", "epe", "nme"),
    "classifier": ("topk",),
}
"""Task -> what may be measured of it."""
MAIN_FIGURES: Final[Mapping[str, str]] = {"bbox": "AP", "keypoints": "AP", "pck": "PCK", "auc": "AUC", "epe": "EPE", "nme": "NME", "topk": "top-1"}
"""Metric -> the figure that stands for it where there is room for one."""
IN_PIXELS_OR_SIZES: Final = frozenset({"EPE", "NME"})
"""Errors: less is better, and a drop is told in their own unit. All other figures are shares."""
_TASKS: Final = {"mmdet": "detector", "mmpose": "pose estimator", "mmcls": "classifier"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFacts:
    """What there is to know of a subject before its network runs.

    Attributes:
        task: a key of `METRICS`.
        keypoints: a pose estimator's.
        class_names: what a detector or a classifier calls its classes; empty where it does not.
    """

    task: str
    keypoints: KeypointInfo | None = None
    class_names: tuple[str, ...] = ()

    @property
    def keypoint_count(self) -> int | None:
        """K of a pose estimator."""
        return len(self.keypoints.names) if self.keypoints else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What all subjects are measured on.

    Attributes:
        metrics: what is measured.
        data: images with the truth.
        boxes: image id -> boxes that pose estimators get; None for the true ones.
        batch: images in one call.
    """

    metrics: tuple[Metric, ...]
    data: Dataset | Labelled
    boxes: Mapping[int, Boxes] | None = None
    batch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What came of one subject.

    Attributes:
        figures: metric -> its figures; NaN where there is nothing to measure.
        result: what was found, and what was not read.
        objects: boxes, poses or images that there are results of.
    """

    figures: Figures
    result: Accuracy
    objects: int

    @property
    def images_per_s(self) -> float:
        """With what reading them took, which goes on beside the network."""
        return self.result.images / self.result.seconds if self.result.seconds > 0 else math.nan


def facts_of(subject: Subject, options: SessionOptions) -> TaskFacts:
    """What a subject is; it is opened only if its files do not say.

    Raises:
        TaskMismatchError: a network of raw tensors, of which there is no accuracy.
        BundleError: a bundle that cannot be run.
        MissingBackendError: the framework is not installed or lacks the device.
    """
    bundle = subject.bundle
    manifest = bundle.manifest if bundle else None
    if bundle is not None and bundle.pipeline.postprocess.module != "mmpose":
        return TaskFacts(task=_task_of(bundle.pipeline.postprocess.module, subject), class_names=tuple(manifest.class_names if manifest else ()))
    if manifest is not None and manifest.keypoints is not None:
        return TaskFacts(task="pose estimator", keypoints=manifest.keypoints)
    with subject.open(options) as task:
        name = _task_of(task.bundle.pipeline.postprocess.module, subject)
        if isinstance(task, PoseDetector):
            return TaskFacts(task=name, keypoints=task.keypoints)
        return TaskFacts(task=name, class_names=tuple(task.class_names) if isinstance(task, (Detector, Classifier)) else ())


def _task_of(module: str, subject: Subject) -> str:
    if module not in _TASKS:
        raise TaskMismatchError(f"{subject.name}: expected a {', a '.join(METRICS)}, found a network of raw tensors, whose meaning only you know")
    return _TASKS[module]


def read_annotations(annotations: Path, folder: Path, facts: TaskFacts, limit: int | None = None) -> tuple[Dataset | Labelled, list[Skipped]]:
    """The truth for a task, and what of it cannot be used.

    Args:
        annotations: COCO's; for classifiers labels too, see `class_labels`.
        folder: of the images.
        facts: whose truth it is to be.
        limit: only so many images, the first ones.

    Raises:
        InputError: no such file, or another one.
        ConfigError: keypoints or classes that are not the subject's.
    """
    if facts.task == "classifier":
        return read_labels(annotations, folder, class_names=facts.class_names, limit=limit)
    return sift(read_coco(annotations), annotations=annotations, folder=folder, limit=limit, keypoints=facts.keypoint_count)


def require_alike(subjects: Sequence[Subject], facts: Sequence[TaskFacts]) -> TaskFacts:
    """What all of them are.

    Raises:
        TaskMismatchError: they are not of one task, or not of one number of keypoints.
    """
    first = facts[0]
    for subject, own in zip(subjects, facts, strict=True):
        if (own.task, own.keypoint_count) != (first.task, first.keypoint_count):
            expected, found = (f"a {one.task}" + (f" of {one.keypoint_count} keypoints" if one.keypoints else "") for one in (first, own))
            raise TaskMismatchError(f"{subject.name}: expected {expected} like {subjects[0].name}, found {found}", hint="test them one after another")
    return max(facts, key=lambda own: len(own.class_names))  # bundles of MMDeploy name no classes


def choose_metrics(facts: TaskFacts, wanted: Sequence[str], *, has_true_boxes: bool) -> tuple[Metric, ...]:
    """What is measured: what is wanted, or what suits the task.

    Without a wish: AP of keypoints where their sigmas are known; PCK, AUC and EPE of hands; NME of faces.

    Args:
        facts: of the subjects.
        wanted: what the user wants; empty for what suits.
        has_true_boxes: whether each object gets exactly one pose.

    Raises:
        ConfigError: a metric that says nothing of this task, or not of these boxes.
    """
    allowed = METRICS[facts.task]
    for metric in wanted:
        if metric not in allowed:
            raise ConfigError(f"--metric {metric}: expected one of {', '.join(allowed)} for a {facts.task}, found {metric}")
    chosen: tuple[Metric, ...] = tuple(metric for metric in allowed if metric in wanted) or _suitable(facts)
    if "keypoints" in chosen and len(_sigmas(facts)) != facts.keypoint_count:
        raise ConfigError(f"--metric keypoints: expected keypoints whose sigmas are known, found {facts.keypoint_count} without", hint="--metric pck")
    paired = [metric for metric in chosen if metric in {"pck", "auc", "epe", "nme"}]
    if paired and not has_true_boxes:
        raise ConfigError(
            f"--metric {paired[0]}: expected true boxes, where each object has one pose, found boxes of a detector",
            hint="leave --det and --det-results out" + (", or --metric keypoints" if _sigmas(facts) else ""),
        )
    return chosen


def _suitable(facts: TaskFacts) -> tuple[Metric, ...]:
    if facts.task != "pose estimator":
        return METRICS[facts.task]
    if facts.keypoint_count == 21:
        return ("pck", "auc", "epe")
    if _sigmas(facts):
        return ("keypoints",)
    return ("nme",) if facts.keypoint_count in keypoint_metrics.EYES else ("pck", "epe")


def _sigmas(facts: TaskFacts) -> Sequence[float]:
    if facts.keypoints is None:
        return ()
    return facts.keypoints.sigmas or (COCO_17.sigmas if len(facts.keypoints.names) == len(COCO_17.names) else ())


def measure(task: Task, facts: TaskFacts, trial: Trial, report: Report | None = None) -> Score:
    """Run a subject on all images.

    Args:
        task: the subject, opened.
        facts: what it is.
        trial: what it is measured on.
        report: gets the progress.

    Raises:
        ConfigError: data of other classes.
        InputError: no image could be read, or there is nothing to find in them.
    """
    if isinstance(task, Classifier):
        assert isinstance(trial.data, Labelled)
        result = find_classes(task, trial.data, report, batch=trial.batch)
        count = len(facts.class_names) or task.session.outputs[0].shape[-1]
        return Score(figures={"topk": top_k(result, trial.data, class_count=count if isinstance(count, int) else None)}, result=result, objects=result.images)
    assert isinstance(trial.data, Dataset)
    if isinstance(task, Detector):
        result = find_boxes(task, trial.data, report, batch=trial.batch)
        return Score(figures={"bbox": average_precision(trial.data, result)}, result=result, objects=len(result.rows))
    assert isinstance(task, PoseDetector)
    result = find_keypoints(task, trial.data, report, boxes=trial.boxes, batch=trial.batch)
    figures: Figures = {}
    if "keypoints" in trial.metrics:
        is_whole_body = facts.keypoint_count == sum(WHOLE_BODY.values())
        sigmas = _sigmas(facts)
        figures |= whole_body_precision(trial.data, result, sigmas) if is_whole_body else {"keypoints": average_precision(trial.data, result, sigmas)}
    if trial.metrics != ("keypoints",):
        figures |= _errors(result, trial)
    return Score(figures={key: figures[key] for key in sorted(figures, key=lambda key: _order(key, trial.metrics))}, result=result, objects=len(result.rows))


def _order(key: str, metrics: Sequence[str]) -> int:
    return metrics.index(key.partition("_")[0])


def _errors(result: Accuracy, trial: Trial) -> Figures:
    if not result.pairs:
        raise InputError(f"{trial.data.annotations}: expected objects with visible keypoints in the images, found none", hint="give other data")
    found = np.stack([points for _, points in result.pairs])
    triples = np.array([one.keypoints for one, _ in result.pairs], dtype=np.float64).reshape(*found.shape[:2], 3)
    truth, visible = triples[..., :2], triples[..., 2] > 0
    longer = np.array([max(one.bbox[2:]) for one, _ in result.pairs])
    pair = keypoint_metrics.EYES.get(found.shape[1])
    figures: Figures = {}
    for metric in trial.metrics:
        if metric == "pck":
            figures["pck"] = {"PCK": keypoint_metrics.pck(found, truth, visible, longer)}
        elif metric == "auc":
            figures["auc"] = {"AUC": keypoint_metrics.auc(found, truth, visible)}
        elif metric == "epe":
            figures["epe"] = {"EPE": keypoint_metrics.epe(found, truth, visible)}
        elif metric == "nme":
            sizes = keypoint_metrics.spans(truth, pair) if pair else longer
            figures["nme"] = {"NME": keypoint_metrics.nme(found, truth, visible, sizes)}
    return figures


def norms_of(metrics: Sequence[Metric], facts: TaskFacts) -> dict[str, str]:
    """Metric -> what its distances are measured in, in words."""
    pair = keypoint_metrics.EYES.get(facts.keypoint_count or 0)
    words = {
        "pck": f"within {keypoint_metrics.PCK_THRESHOLD:g} of the longer side of the box",
        "auc": f"{keypoint_metrics.AUC_STEPS} thresholds below {keypoint_metrics.AUC_PX:g} px",
        "epe": "px",
        "nme": f"of the distance of keypoints {pair[0]} and {pair[1]}" if pair else "of the longer side of the box",
    }
    return {metric: words[metric] for metric in metrics if metric in words}


def drops(figures: Figures, reference: Figures) -> Figures:
    """How much worse than the reference: shares in percentage points, `IN_PIXELS_OR_SIZES` in their own unit; negative where it is better."""
    return {
        metric: {
            name: (value - reference[metric][name]) if name in IN_PIXELS_OR_SIZES else 100 * (reference[metric][name] - value) for name, value in of.items()
        }
        for metric, of in figures.items()
    }


def whole_body_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results with 133 keypoints in COCO-WholeBody's format, the parts apart."""
    names = ["keypoints", *(f"{part}_kpts" for part in list(WHOLE_BODY)[1:])]
    divided = []
    for row in rows:
        start, own = 0, {key: value for key, value in row.items() if key != "keypoints"}
        for name, count in zip(names, WHOLE_BODY.values(), strict=True):
            own[name] = row["keypoints"][3 * start : 3 * (start + count)]
            start += count
        divided.append(own)
    return divided
