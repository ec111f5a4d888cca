"""One or two bundles on one image: a detector, a pose estimator, the detector's boxes into the pose estimator, or a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from modelcrate_bundle.errors import ConfigError, TaskMismatchError
from modelcrate_runtime.draw import draw_classes, draw_detections, draw_poses
from modelcrate_runtime.geometry import as_boxes
from modelcrate_runtime.results import Classification, Detections, Poses
from modelcrate_runtime.skeletons import require_count
from modelcrate_runtime.tasks import Classifier, Detector, PoseDetector

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from modelcrate_bundle.bundle import Bundle
    from modelcrate_bundle.manifest import KeypointInfo
    from modelcrate_runtime.geometry import Geometry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Instance:
    """One thing in an image.

    Attributes:
        box_xyxy: (4,) float32 left, top, right, bottom in image pixels.
        score: of the detection or the class; None for boxes that the caller gave.
        label: class index.
        class_name: its name, or the index as text.
        keypoints: (K, 3) float32 x, y in image pixels, score; or None.
    """

    box_xyxy: NDArray[np.float32]
    score: float | None
    label: int
    class_name: str
    keypoints: NDArray[np.float32] | None

    def coco(self, file_name: str) -> dict[str, Any]:
        """The instance as a COCO result: `bbox` is x, y, width, height; category ids start at 1; `keypoints` are x, y, score."""
        left, top, right, bottom = (float(v) for v in self.box_xyxy)
        result: dict[str, Any] = {
            "file_name": file_name,
            "category_id": self.label + 1,
            "category": self.class_name,
            "bbox": [round(v, 3) for v in (left, top, right - left, bottom - top)],
            "score": round(self.score if self.score is not None else 1.0, 6),
        }
        if self.keypoints is not None:
            result["keypoints"] = [round(float(v), 4) for v in self.keypoints.ravel()]
            if self.score is None:
                result["score"] = round(float(self.keypoints[:, 2].mean()), 6)
        return result


@dataclass(kw_only=True, slots=True)
class Runner:
    """The loaded bundles.

    Attributes:
        detector: or None.
        estimator: the pose estimator, or None.
        classifier: or None; it stands alone.
        det_thr: least score of a detection.
        det_label: class of the detections that get a pose.
    """

    detector: Detector | None
    estimator: PoseDetector | None
    classifier: Classifier | None
    det_thr: float
    det_label: int
    det_min_bbox_size: float = -1.0
    skeleton: KeypointInfo | None = None

    @classmethod
    def open(
        cls,
        bundles: Sequence[Bundle],
        *,
        geometry: Geometry | None,
        device: str,
        device_id: int,
        threads: int | None,
        cuda_binding: str | None,
        det_thr: float,
        det_label: int,
    ) -> Runner:
        """Load one or two bundles, in any order.

        Raises:
            TaskMismatchError: two of the same task.
            ConfigError: a class that the detector does not have.
        """
        detector: Detector | None = None
        estimator: PoseDetector | None = None
        if any(bundle.pipeline.postprocess.module == "mmcls" for bundle in bundles):
            if len(bundles) > 1:
                raise TaskMismatchError("expected a classifier alone, found another bundle beside it", hint="run them one by one")
            alone = Classifier(bundles[0], device, device_id, geometry=geometry, threads=threads, cuda_binding=cuda_binding)
            return cls(detector=None, estimator=None, classifier=alone, det_thr=det_thr, det_label=det_label)
        for bundle in bundles:
            is_pose = bundle.pipeline.postprocess.module == "mmpose"
            if (estimator if is_pose else detector) is not None:
                raise TaskMismatchError(f"expected a detector and a pose estimator, found two bundles of {bundle.deploy.task}")
            if is_pose:
                estimator = PoseDetector(bundle, device, device_id, geometry=geometry, threads=threads, cuda_binding=cuda_binding)
            else:
                detector = Detector(bundle, device, device_id, geometry=geometry, threads=threads, cuda_binding=cuda_binding)
                if detector.class_names and det_label >= len(detector.class_names):
                    raise ConfigError(f"--det-label: expected a class from 0 to {len(detector.class_names) - 1}, found {det_label}")
        return cls(detector=detector, estimator=estimator, classifier=None, det_thr=det_thr, det_label=det_label)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in (self.detector, self.estimator, self.classifier):
            if task is not None:
                task.close()

    @property
    def keypoints(self) -> KeypointInfo:
        """What the keypoints are: what was chosen, else from the manifest, else from their number."""
        assert self.estimator is not None
        return self.skeleton or self.estimator.keypoints

    def choose_skeleton(self, skeleton: KeypointInfo) -> None:
        """Draw and name the keypoints otherwise than the bundle does.

        Raises:
            ConfigError: another number of keypoints than the network's, or no pose estimator.
        """
        self.skeleton = require_count(skeleton, self.estimator.keypoint_count if self.estimator is not None else 0)

    @property
    def keypoint_names(self) -> list[str]:
        """Their names, in network order."""
        return self.keypoints.names

    def run(self, image: NDArray[np.uint8], boxes: Sequence[Sequence[float]] | None) -> list[Instance]:
        """Find everything in one image.

        Args:
            image: (H, W, 3) BGR uint8.
            boxes: left, top, right, bottom for the pose estimator; with a detector there must be none.
        """
        if self.classifier is not None:
            if boxes:
                raise ConfigError("--box: expected none with a classifier, found some", hint="cut the image, or leave the boxes away")
            return self._classes(self.classifier, image)
        if self.detector is None:
            assert self.estimator is not None
            array = as_boxes(boxes, image_hw=(image.shape[0], image.shape[1]))
            poses = self.estimator.estimate(image, boxes)
            return [self._instance(box, None, 0, points) for box, points in zip(array, _rows(poses), strict=True)]
        if boxes:
            raise ConfigError("--box: expected none with a detector, found some", hint="leave the detector or the boxes away")
        found = self.detector.detect(image)
        sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
        found = found[(found.scores >= self.det_thr) & (sides.prod(axis=1) >= self.det_min_bbox_size**2 * (self.det_min_bbox_size > 0))]
        if self.estimator is None:
            return [self._instance(b, float(s), int(c), None) for b, s, c in zip(found.boxes_xyxy, found.scores, found.labels, strict=True)]
        found = found[found.labels == self.det_label]
        rows = _rows(self.estimator.estimate(image, found.boxes_xyxy)) if len(found) else []
        return [self._instance(b, float(s), int(c), k) for b, s, c, k in zip(found.boxes_xyxy, found.scores, found.labels, rows, strict=True)]

    def _classes(self, classifier: Classifier, image: NDArray[np.uint8]) -> list[Instance]:
        """The likeliest classes, each of the whole image."""
        height, width = image.shape[:2]
        box = np.array((0, 0, width, height), dtype=np.float32)
        names, found = classifier.class_names, classifier.classify(image)
        return [
            Instance(box_xyxy=box, score=score, label=label, class_name=names[label] if label < len(names) else str(label), keypoints=None)
            for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        ]

    def _instance(self, box: NDArray[np.float32], score: float | None, label: int, keypoints: NDArray[np.float32] | None) -> Instance:
        names = self.detector.class_names if self.detector is not None else ["person"]
        return Instance(box_xyxy=box, score=score, label=label, class_name=names[label] if 0 <= label < len(names) else str(label), keypoints=keypoints)

    def draw(self, image: NDArray[np.uint8], instances: Sequence[Instance], *, kpt_thr: float) -> NDArray[np.uint8]:
        """Boxes of the detector, skeletons of the pose estimator."""
        canvas = image
        if self.classifier is not None:
            labels = np.array([i.label for i in instances], dtype=np.int32)
            scores = np.array([i.score for i in instances], dtype=np.float32)
            return draw_classes(canvas, Classification(labels=labels, scores=scores), class_names=self.classifier.class_names)
        if self.detector is not None and instances:
            detections = Detections(
                boxes_xyxy=np.stack([i.box_xyxy for i in instances]),
                scores=np.array([i.score for i in instances], dtype=np.float32),
                labels=np.array([i.label for i in instances], dtype=np.int32),
            )
            canvas = draw_detections(canvas, detections, class_names=self.detector.class_names, score_thr=self.det_thr)
        with_points = [i.keypoints for i in instances if i.keypoints is not None]
        if with_points:
            rows = np.stack(with_points)
            canvas = draw_poses(canvas, Poses(keypoints_xy=rows[:, :, :2], scores=rows[:, :, 2]), keypoints=self.keypoints, score_thr=kpt_thr)
        return canvas


def _rows(poses: Poses) -> list[NDArray[np.float32]]:
    return list(np.concatenate([poses.keypoints_xy, poses.scores[:, :, None]], axis=2))
