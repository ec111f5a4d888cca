"""Detector, PoseDetector and Classifier: MMDeploy's Python classes with the same calls and returns, and typed ones beside them; Network for any other.

Code written for `mmdeploy_runtime` runs with its import line changed. `detect` and `estimate` return typed results; `batch` and the batched
methods run many inputs in as few network calls as the artefact allows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from typing import TYPE_CHECKING, Final, Self, TypeAlias

import numpy as np

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import BundleFormatError, ConfigError, InputError, TaskMismatchError
from modelcrate_runtime.cores import workers
from modelcrate_runtime.postprocess import BoxDecoder, ClassDecoder, KeypointDecoder
from modelcrate_runtime.preprocess import ImageMeta, PlannedCrops, Preprocessor
from modelcrate_runtime.results import Classification, Detections, Poses, Tensors
from modelcrate_runtime.sessions import Session, SessionOptions, open_session
from modelcrate_runtime.skeletons import keypoint_info

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from modelcrate_bundle.manifest import KeypointInfo
    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_runtime.geometry import Crop, Geometry
    from modelcrate_runtime.preprocess import Tensor

Feed: TypeAlias = "Callable[[range], Tensor]"
Outputs: TypeAlias = "dict[str, NDArray[np.generic]]"
Run: TypeAlias = "Callable[[Mapping[str, NDArray[np.generic]]], Outputs]"

DEFAULT_MAX_BATCH: Final = 32
"""Inputs in one network call where the artefact takes any number and no manifest says otherwise: more only costs memory."""


BESIDE_BATCH: Final = 4
"""Inputs in one of several calls side by side: what a batch saves is saved by then, and its activations still fit into a core's cache."""


def plan_calls(count: int, *, max_batch: int, streams: int) -> tuple[list[list[range]], list[range]]:
    """Divide inputs among network calls.

    Args:
        count: inputs.
        max_batch: inputs that one call may take.
        streams: calls that may run side by side; 1 for none.

    Returns:
        For each stream, as many as there are or none, the calls that it makes one after another: all streams have the same number of inputs.
        And the calls for what remains, fewer than `streams` inputs or all of them, which use the whole device.
    """
    each = count // streams if streams > 1 else 0
    lanes = [_chunks(range(i * each, (i + 1) * each), min(max_batch, BESIDE_BATCH)) for i in range(streams)] if each else []
    return lanes, _chunks(range(each * streams, count), max_batch)


def _chunks(part: range, most: int) -> list[range]:
    """A range in consecutive pieces of nearly equal length."""
    pieces = -(-len(part) // most)
    return [part[len(part) * i // pieces : len(part) * (i + 1) // pieces] for i in range(pieces)]


class _Task:
    """A bundle that is loaded: session, preprocessing, and the batch sizes it takes."""

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Bundle,
        device_name: str = "",
        device_id: int = 0,
        *,
        geometry: Geometry | None = None,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        streams: int | None = None,
        verify: bool = True,
        warmup: int = 0,
        cuda_binding: str | None = None,
        session: Session | None = None,
    ) -> None:
        """Load a bundle.

        Args:
            model_path: a bundle's folder, a zip of it, or an opened bundle.
            device_name: "cpu" or "cuda"; empty takes the backend's own, which is the CPU for all but TensorRT.
            device_id: which of them.
            geometry: "exact" or "sdk"; None takes the manifest's, and "sdk" for bundles that MMDeploy wrote.
            threads: threads inside one operator; None is one per usable core.
            providers: ONNX Runtime's execution providers, to use exactly these.
            streams: network calls side by side when there are at least as many inputs. None is what suits the backend; for ONNX Runtime on a CPU
                one per thread, which loads the network a second time at the first such batch. 1 is never more than one call at a time.
            verify: whether to compare the files with the manifest's hashes first.
            warmup: network calls of each kind on zeros before the constructor returns, so that the first image is not the slow one.
            cuda_binding: what TensorRT's memory and streams go through: "cuda-python" or "pycuda"; None takes what is installed.
            session: the network, already loaded, instead of the bundle's; it is closed with the task.

        Raises:
            BundleError: see `Bundle.open` and `Bundle.verify`.
            TaskMismatchError: a bundle of another task.
            MissingBackendError: the framework is not installed or lacks the device.
        """
        bundle = model_path if isinstance(model_path, Bundle) else Bundle.open(model_path)
        if verify:
            bundle.verify()
        if geometry not in {None, "exact", "sdk"}:
            raise ConfigError(f"geometry: expected 'exact' or 'sdk', found {geometry!r}")
        default: Geometry = "exact" if bundle.manifest and bundle.manifest.geometry == "exact" else "sdk"
        self.bundle: Bundle = bundle
        self.geometry: Geometry = geometry or default
        self._open_decoder()
        self._preprocessor = Preprocessor(
            bundle.pipeline, geometry=self.geometry, where=str(bundle.root), resampling=bundle.manifest.resampling if bundle.manifest else None
        )
        options = SessionOptions(
            device=device_name,
            device_id=device_id,
            threads=threads,
            providers=tuple(providers) if providers else None,
            streams=streams,
            cuda_binding=cuda_binding,
        )
        self.session: Session = session or open_session(bundle, options)
        self._input = self._image_input()
        self._max_batch = self._batch_limit()
        output_map = bundle.pipeline.net.output_map
        self._seen_as = {network: seen for seen, network in output_map.items()}
        for _ in range(warmup):
            shape = [dim if isinstance(dim, int) else 1 for dim in self._input.shape]
            zeros = np.zeros(shape, dtype=self._input.dtype)
            self.session.run({self._input.name: zeros})
            if self.session.streams > 1:
                self.session.run_beside({self._input.name: zeros})

    def _open_decoder(self) -> None:
        raise AssertionError  # each task has its own

    def _image_input(self) -> TensorSpec:
        """The network input that the preprocessed image goes to."""
        inputs = self.session.inputs
        name = self.bundle.pipeline.net.input_map.get("img", inputs[0].name if len(inputs) == 1 else "img")
        for spec in inputs:
            if spec.name == name:
                return spec
        raise BundleFormatError(f"{self.bundle.root}/pipeline.json: input_map: expected one of {', '.join(s.name for s in inputs)} for 'img', found {name!r}")

    @property
    def max_batch(self) -> int:
        """Inputs that one network call may take."""
        return self._max_batch

    def _batch_limit(self) -> int:
        first = self._input.shape[0]
        if isinstance(first, int):
            return first
        manifest = self.bundle.manifest
        limits = manifest.shape_ranges.get(self._input.name) if manifest else None
        return limits.max[0] if limits else self._foreign_max_batch()

    def _foreign_max_batch(self) -> int:
        """The same for bundles that say nothing of it."""
        return DEFAULT_MAX_BATCH

    def _infer(self, count: int, feed: Feed, feed_beside: Feed, *, beside: bool = False) -> list[tuple[range, Outputs]]:
        """Run `count` inputs in as few calls as the artefact allows, or side by side where the backend is faster so.

        Args:
            count: how many inputs there are.
            feed: makes the inputs number `part`, (n, C, h, w) float32, with as many threads as it likes.
            feed_beside: the same in one thread.
            beside: whether another network runs meanwhile, so that this one is to take its share of the threads alone.

        Returns:
            The parts in order, each with its outputs.
        """
        if beside:
            return [(part, self._call(feed_beside(part), self.session.run_beside)) for part in _chunks(range(count), self._max_batch)]
        lanes, rest = plan_calls(count, max_batch=self._max_batch, streams=self.session.streams)
        results = self._side_by_side(lanes, feed_beside) if lanes else []
        return results + [(part, self._call(feed(part), self.session.run)) for part in rest]

    def _side_by_side(self, lanes: list[list[range]], feed: Feed) -> list[tuple[range, Outputs]]:
        """The calls of all lanes, this thread's among them."""

        def lane(parts: list[range]) -> list[tuple[range, Outputs]]:
            return [(part, self._call(feed(part), self.session.run_beside)) for part in parts]

        pending = [workers().submit(lane, parts) for parts in lanes[1:]]
        try:
            results = lane(lanes[0])
        finally:
            wait(pending)  # nobody returns, or raises, while a network of this task is still running
        for future in pending:
            results += future.result()
        return results

    def _infer_images(self, prepared: list[tuple[Tensor, ImageMeta]], *, beside: bool = False) -> Iterator[tuple[list[int], list[ImageMeta], Outputs]]:
        """Run preprocessed images; those of one input shape share calls. Call by call: a graph with NMS may give another number of rows each time.

        Yields:
            The indices of the images of one call, their metas, and its outputs.
        """
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, (tensor, _) in enumerate(prepared):
            by_shape.setdefault(tensor.shape, []).append(i)
        for of_shape in by_shape.values():

            def feed(part: range, of_shape: list[int] = of_shape) -> Tensor:
                tensors = [prepared[of_shape[i]][0] for i in part]
                return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)

            for part, outputs in self._infer(len(of_shape), feed, feed, beside=beside):
                indices = [of_shape[i] for i in part]
                yield indices, [prepared[i][1] for i in indices], outputs

    def _infer_crops(self, planned: Sequence[PlannedCrops], count: int) -> Outputs:
        """Run the crops of several images, counted through all of them; there is at least one."""
        parts = self._infer(count, functools.partial(_render, planned, beside=False), functools.partial(_render, planned, beside=True))
        return parts[0][1] if len(parts) == 1 else {name: np.concatenate([part[name] for _, part in parts]) for name in parts[0][1]}

    def _call(self, tensor: Tensor, run: Run) -> Outputs:
        """One network call; a fixed batch is filled up and its surplus rows dropped."""
        count = len(tensor)
        if self._input.dtype != "float32":
            tensor = tensor.astype(self._input.dtype)
        is_short = isinstance(self._input.shape[0], int) and count < self._max_batch
        if is_short:
            tensor = np.concatenate([tensor, np.zeros((self._max_batch - count, *tensor.shape[1:]), dtype=tensor.dtype)])
        outputs = run({self._input.name: tensor})
        return {self._seen_as.get(name, name): value[:count] if is_short else value for name, value in outputs.items()}

    def close(self) -> None:
        """Free the network."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Detector(_Task):
    """Finds objects in whole images. The constructor's arguments are `_Task`'s.

    Attributes:
        bundle: what was opened.
        geometry: the convention in force, "exact" or "sdk".
        session: the network.
    """

    def _open_decoder(self) -> None:
        _check_task(self.bundle, module="mmdet", expected="Detector")
        self._decoder = BoxDecoder(self.bundle.pipeline, geometry=self.geometry, where=str(self.bundle.root))

    def _foreign_max_batch(self) -> int:
        """MMDeploy's detection graphs have a dynamic batch axis and fail when it is used; their `batch_size` of 1 is to be believed."""
        return max(1, self.bundle.model.batch_size)

    @property
    def class_names(self) -> list[str]:
        """Label -> name; empty for bundles without a manifest."""
        return self.bundle.manifest.class_names if self.bundle.manifest else []

    def __call__(self, img: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int32], list[NDArray[np.float64]]]:
        """Detect, as `mmdeploy_runtime.Detector` does.

        Args:
            img: (H, W, 3) BGR or (H, W) grey, uint8.

        Returns:
            boxes (N, 5) float32 with left, top, right, bottom in image pixels and the score; labels (N,) int32; and N empty masks.
        """
        return _as_mmdeploy(self.detect(img))

    def batch(self, imgs: Sequence[NDArray[np.uint8]]) -> list[tuple[NDArray[np.float32], NDArray[np.int32], list[NDArray[np.float64]]]]:
        """`__call__` for several images, in as few network calls as the artefact allows."""
        return [_as_mmdeploy(detections) for detections in self.detect_batch(imgs)]

    def detect(self, image: NDArray[np.uint8]) -> Detections:
        """Detect in one image.

        Args:
            image: (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, uint8.

        Raises:
            InputError: not such an image.
        """
        return self.detect_batch([image])[0]

    def detect_batch(self, images: Sequence[NDArray[np.uint8]], *, beside: bool = False) -> list[Detections]:
        """Detect in several images, of any sizes; those that need the same network input shape share a call.

        Args:
            images: as `detect` takes them.
            beside: whether another network runs meanwhile, so that this one is to take its share of the threads alone: see `Session.run_beside`.
        """
        results: list[Detections | None] = [None] * len(images)
        for indices, metas, outputs in self._infer_images([self._preprocessor.image(image) for image in images], beside=beside):
            for i, detections in zip(indices, self._decoder.decode(outputs, metas), strict=True):
                results[i] = detections
        return [detections for detections in results if detections is not None]


class Classifier(_Task):
    """Says what whole images show. The constructor's arguments are `_Task`'s.

    Attributes:
        bundle: what was opened.
        geometry: the convention in force, "exact" or "sdk".
        session: the network.
    """

    def _open_decoder(self) -> None:
        _check_task(self.bundle, module="mmcls", expected="Classifier")
        self._decoder = ClassDecoder(self.bundle.pipeline, where=str(self.bundle.root))

    @property
    def class_names(self) -> list[str]:
        """Label -> name; empty for bundles without a manifest."""
        return self.bundle.manifest.class_names if self.bundle.manifest else []

    def __call__(self, img: NDArray[np.uint8]) -> list[tuple[int, float]]:
        """Classify, as `mmdeploy_runtime.Classifier` does.

        Args:
            img: (H, W, 3) BGR or (H, W) grey, uint8.

        Returns:
            The best classes as pairs of label and score, best first.
        """
        return _as_pairs(self.classify(img))

    def batch(self, imgs: Sequence[NDArray[np.uint8]]) -> list[list[tuple[int, float]]]:
        """`__call__` for several images, in as few network calls as the artefact allows."""
        return [_as_pairs(result) for result in self.classify_batch(imgs)]

    def classify(self, image: NDArray[np.uint8]) -> Classification:
        """Classify one image.

        Args:
            image: (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, uint8.

        Raises:
            InputError: not such an image.
        """
        return self.classify_batch([image])[0]

    def classify_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[Classification]:
        """Classify several images, of any sizes."""
        results = [Classification(labels=np.zeros(0, dtype=np.int32), scores=np.zeros(0, dtype=np.float32))] * len(images)
        for indices, _, outputs in self._infer_images([self._preprocessor.image(image) for image in images]):
            for i, result in zip(indices, self._decoder.decode(outputs), strict=True):
                results[i] = result
        return results


class PoseDetector(_Task):
    """Finds the keypoints of objects whose boxes are known. The constructor's arguments are `_Task`'s.

    Attributes:
        bundle: what was opened.
        geometry: the convention in force, "exact" or "sdk".
        session: the network.
    """

    def _open_decoder(self) -> None:
        _check_task(self.bundle, module="mmpose", expected="PoseDetector")
        self._decoder = KeypointDecoder(self.bundle.pipeline, geometry=self.geometry, where=str(self.bundle.root))

    def __call__(self, img: NDArray[np.uint8], bboxes: ArrayLike | None = None, *, box: ArrayLike | None = None) -> NDArray[np.float32]:
        """Estimate, as `mmdeploy_runtime.PoseDetector` does.

        Args:
            img: (H, W, 3) BGR or (H, W) grey, uint8.
            bboxes: (4,) or (N, 4) left, top, right, bottom in image pixels; None for the whole image.
            box: the other name that `mmdeploy_runtime` has for one box.

        Returns:
            (N, K, 3) float32: x and y in image pixels, score. N is 1 when no boxes are given.
        """
        return _stacked(self.estimate(img, box if bboxes is None else bboxes))

    def batch(self, imgs: Sequence[NDArray[np.uint8]], bboxes: Sequence[ArrayLike | None] = ()) -> list[NDArray[np.float32]]:
        """`__call__` for several images, all boxes of all images in as few network calls as the artefact allows.

        Args:
            imgs: the images.
            bboxes: for each image its (N, 4) boxes; empty for whole images.
        """
        return [_stacked(poses) for poses in self.estimate_batch(imgs, bboxes or [None] * len(imgs))]

    def estimate(self, image: NDArray[np.uint8], boxes_xyxy: ArrayLike | None = None) -> Poses:
        """Estimate the poses in one image, all boxes in one network call where the artefact allows it.

        Args:
            image: (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, uint8.
            boxes_xyxy: (4,) or (N, 4) left, top, right, bottom in image pixels; None for the whole image.

        Raises:
            InputError: not such an image, or boxes that cannot be used.
        """
        return self.estimate_batch([image], [boxes_xyxy])[0]

    def estimate_batch(self, images: Sequence[NDArray[np.uint8]], boxes_xyxy: Sequence[ArrayLike | None]) -> list[Poses]:
        """Estimate the poses in several images.

        Args:
            images: the images.
            boxes_xyxy: for each image its boxes, as `estimate` takes them.

        Returns:
            For each image its poses, in the order of its boxes.
        """
        planned = [self._preprocessor.plan_crops(image, boxes) for image, boxes in zip(images, boxes_xyxy, strict=True)]
        crops: list[Crop] = [crop for of_image in planned for crop in of_image.crops]
        if not crops:
            return [_no_poses(self.keypoint_count) for _ in planned]
        outputs = self._infer_crops(planned, len(crops))
        poses = self._decoder.decode(outputs, crops, input_hw=(planned[0].size_wh[1], planned[0].size_wh[0]))
        if len(planned) == 1:
            return [poses]
        results, start = [], 0
        for of_image in planned:
            end = start + len(of_image.crops)
            results.append(Poses(keypoints_xy=poses.keypoints_xy[start:end], scores=poses.scores[start:end]))
            start = end
        return results

    @property
    def keypoints(self) -> KeypointInfo:
        """What the keypoints are: from the manifest, else from their number."""
        manifest = self.bundle.manifest
        return manifest.keypoints if manifest and manifest.keypoints else keypoint_info(self.keypoint_count)

    @functools.cached_property
    def keypoint_count(self) -> int:
        """K, for images without boxes: from the manifest, else from the graph, else by running the network once."""
        if self.bundle.manifest and self.bundle.manifest.keypoints:
            return len(self.bundle.manifest.keypoints.names)
        of_graph = self.session.outputs[0].shape[1]
        if isinstance(of_graph, int):
            return of_graph
        _, channels, height, width = (dim if isinstance(dim, int) else 1 for dim in self._input.shape)
        outputs = self._call(np.zeros((1, channels, height, width), dtype=np.float32), self.session.run)
        return int(next(iter(outputs.values())).shape[1])


class Network(_Task):
    """Any other network: images go in as the bundle says, and what comes out is the caller's business. The constructor's arguments are `_Task`'s.

    Attributes:
        bundle: what was opened.
        geometry: the convention in force, "exact" or "sdk".
        session: the network.
    """

    def _open_decoder(self) -> None:
        _check_task(self.bundle, module="modelcrate", expected="Network")

    @property
    def is_top_down(self) -> bool:
        """Whether it takes crops around boxes, not whole images."""
        return self._preprocessor.is_top_down

    def __call__(self, img: NDArray[np.uint8], bboxes: ArrayLike | None = None) -> Tensors:
        """Run on one image.

        Args:
            img: (H, W, 3) BGR, (H, W, 4) BGRA or (H, W) grey, uint8.
            bboxes: for a network of crops (4,) or (N, 4) left, top, right, bottom in image pixels; None for the whole image.

        Raises:
            InputError: not such an image, or boxes that cannot be used.
        """
        return self.batch([img], [bboxes])[0]

    def batch(self, imgs: Sequence[NDArray[np.uint8]], bboxes: Sequence[ArrayLike | None] = ()) -> list[Tensors]:
        """Run on several images of any sizes, in as few network calls as the artefact allows.

        Args:
            imgs: the images.
            bboxes: for each image its boxes; empty for whole images.
        """
        if not self.is_top_down:
            if any(boxes is not None for boxes in bboxes):
                raise InputError(f"{self.bundle.root}: expected no boxes, since it takes whole images, found some")
            return self._whole(imgs)
        planned = [self._preprocessor.plan_crops(image, boxes) for image, boxes in zip(imgs, bboxes or [None] * len(imgs), strict=True)]
        count = sum(len(of_image.crops) for of_image in planned)
        if count == 0:
            return [Tensors(outputs={}, crops=[]) for _ in planned]
        outputs = self._infer_crops(planned, count)
        results, start = [], 0
        for of_image in planned:
            end = start + len(of_image.crops)
            results.append(Tensors(outputs={name: value[start:end] for name, value in outputs.items()}, crops=of_image.crops))
            start = end
        return results

    def _whole(self, images: Sequence[NDArray[np.uint8]]) -> list[Tensors]:
        results = [Tensors(outputs={}, crops=[])] * len(images)
        for indices, metas, outputs in self._infer_images([self._preprocessor.image(image) for image in images]):
            for row, (i, meta) in enumerate(zip(indices, metas, strict=True)):
                results[i] = Tensors(outputs={name: value[row : row + 1] for name, value in outputs.items()}, crops=[meta.as_crop])
        return results


def open_task(
    bundle: Bundle, device_name: str = "", device_id: int = 0, *, threads: int | None = None, cuda_binding: str | None = None, session: Session | None = None
) -> Detector | PoseDetector | Classifier | Network:
    """Load a bundle in the class of its task; the arguments are those of the class.

    Raises:
        TaskMismatchError: a task that there is no class for.
    """
    kinds: dict[str, type[Detector | PoseDetector | Classifier | Network]] = {
        "mmdet": Detector,
        "mmpose": PoseDetector,
        "mmcls": Classifier,
        "modelcrate": Network,
    }
    kind = kinds.get(bundle.pipeline.postprocess.module)
    if kind is None:
        raise TaskMismatchError(f"{bundle.root}: expected one of {', '.join(kinds)}, found a bundle of {bundle.pipeline.postprocess.module}")
    return kind(bundle, device_name, device_id, threads=threads, cuda_binding=cuda_binding, session=session)


def _render(planned: Sequence[PlannedCrops], part: range, *, beside: bool) -> Tensor:
    """Crops number `part`, counted through all images."""
    tensors, first = [], 0
    for of_image in planned:
        here = range(max(part.start - first, 0), min(part.stop - first, len(of_image.crops)))
        if here:
            tensors.append(of_image.render_here(here) if beside else of_image.render(here))
        first += len(of_image.crops)
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def _check_task(bundle: Bundle, *, module: str, expected: str) -> None:
    found = bundle.pipeline.postprocess.module
    if found != module:
        kind = {"mmdet": "a detector", "mmpose": "a pose estimator", "mmcls": "a classifier", "modelcrate": "a network of raw tensors"}
        raise TaskMismatchError(
            f"{bundle.root}: expected {kind[module]} for {expected}, found {kind.get(found, f'a bundle of {found}')}",
            hint=f"open it with {bundle.deploy.task or 'the class of its task'}",
        )


def _as_pairs(result: Classification) -> list[tuple[int, float]]:
    return list(zip(result.labels.tolist(), result.scores.tolist(), strict=True))


def _as_mmdeploy(detections: Detections) -> tuple[NDArray[np.float32], NDArray[np.int32], list[NDArray[np.float64]]]:
    boxes = np.concatenate([detections.boxes_xyxy, detections.scores[:, None]], axis=1)
    return boxes, detections.labels, [np.zeros(0) for _ in range(len(detections))]


def _stacked(poses: Poses) -> NDArray[np.float32]:
    return np.concatenate([poses.keypoints_xy, poses.scores[:, :, None]], axis=2)


def _no_poses(keypoints: int) -> Poses:
    return Poses(keypoints_xy=np.zeros((0, keypoints, 2), dtype=np.float32), scores=np.zeros((0, keypoints), dtype=np.float32))
