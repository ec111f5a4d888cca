"""From the network's outputs to boxes and keypoints, driven by the component of pipeline.json (spec section 3).

A decoder is compiled once per bundle and works on whole batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from modelcrate_bundle.errors import UnsupportedBundleError
from modelcrate_bundle.schema import (
    DeepposeRegressionParams,
    HeatmapDecodeParams,
    LinearClsHeadParams,
    Pipeline,
    RawHeadParams,
    ResizeBBoxParams,
    SimCCLabelDecodeParams,
    TopDownAffine,
)
from modelcrate_runtime import heatmaps
from modelcrate_runtime.geometry import Crop, Geometry, Points, to_image, to_image_sdk
from modelcrate_runtime.results import Classification, Detections, Poses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from modelcrate_runtime.preprocess import ImageMeta

Tensor: TypeAlias = "NDArray[np.float32]"
Outputs: TypeAlias = "Mapping[str, NDArray[np.generic]]"


class BoxDecoder:
    """Boxes of a batch of images: from a network that suppresses in its graph, or from a raw head."""

    def __init__(self, pipeline: Pipeline, *, geometry: Geometry, where: str) -> None:
        """Compile.

        Args:
            pipeline: the bundle's pipeline.json.
            geometry: "sdk" clips and keeps boxes as MMDeploy's SDK does, "exact" clips to the image's edges.
            where: the bundle's name, for messages.

        Raises:
            UnsupportedBundleError: a component that there is no code for.
        """
        params = pipeline.postprocess.params
        if not isinstance(params, (ResizeBBoxParams, RawHeadParams)):
            raise _unsupported(pipeline, ("ResizeBBox", "RTMDetSepBNHead", "BaseDenseHead"), where=where)
        self._params: ResizeBBoxParams | RawHeadParams = params
        self._component = pipeline.postprocess.component
        self._geometry = geometry
        self._where = where

    def decode(self, outputs: Outputs, metas: Sequence[ImageMeta]) -> list[Detections]:
        """Decode one batch.

        Args:
            outputs: network outputs by name: `dets` (B, n, 4 or 5) with `labels` (B, n); or `detection_output` (B, n, 6); or a raw head's maps.
            metas: (B) what preprocessing did to each image.

        Returns:
            (B) detections in image pixels.
        """
        if isinstance(self._params, RawHeadParams):
            return self._decode_raw(outputs, metas, self._params)
        thr = self._params.score_thr if self._params.conf_thr is None else self._params.conf_thr
        if "dets" in outputs and "labels" in outputs:
            dets, labels = np.asarray(outputs["dets"], dtype=np.float32), np.asarray(outputs["labels"])
            scores = dets[..., 4] if dets.shape[2] > 4 else np.zeros(dets.shape[:2], dtype=np.float32)
            has_score = dets.shape[2] > 4
            batch = [(dets[i, :, :4], scores[i], labels[i]) for i in range(len(metas))]
        elif "detection_output" in outputs:
            rows = np.asarray(outputs["detection_output"], dtype=np.float32)
            has_score = True
            batch = []
            for row, meta in zip(rows, metas, strict=True):
                height, width = meta.resized_hw
                batch.append((row[:, 2:6] * np.array([width, height, width, height], dtype=np.float32), row[:, 1], row[:, 0] - 1))
        else:
            raise UnsupportedBundleError(f"{self._where}: expected the outputs dets and labels, or detection_output; found {', '.join(outputs)}")
        results = []
        for (boxes, score, label), meta in zip(batch, metas, strict=True):
            keep = score > thr if has_score else np.ones(len(score), dtype=bool)
            results.append(self._to_image(boxes[keep], score[keep], label[keep], meta))
        return results

    def _to_image(self, boxes: Tensor, scores: Tensor, labels: NDArray[np.generic], meta: ImageMeta) -> Detections:
        """Network pixels to image pixels; spec 3.1 for sdk. Boxes smaller than `min_bbox_size` go."""
        height, width = meta.image_hw
        offset = np.array(meta.pad_left_top * 2, dtype=np.float32)
        scale = np.array(meta.scale_xyxy, dtype=np.float32)
        border = np.array(meta.border_xy * 2, dtype=np.float32)
        # The border is in network pixels; the SDK takes it off as if it were in image pixels.
        mapped = (boxes - offset) / scale - border if self._geometry == "sdk" else (boxes - offset - border) / scale
        if self._geometry == "sdk":
            np.maximum(mapped[:, :2], 0, out=mapped[:, :2])
            mapped[:, 2] = np.minimum(mapped[:, 2], width - 1)
            mapped[:, 3] = np.minimum(mapped[:, 3], height - 1)
        else:
            np.clip(mapped, 0, np.array([width, height, width, height], dtype=np.float32), out=mapped)
        sides = mapped[:, 2:] - mapped[:, :2]
        # MMDetection drops a side that is equal to the least size, the SDK keeps it.
        least = self._params.min_bbox_size
        keep = ((sides >= least) if self._geometry == "sdk" else (sides > max(least, 0.0))).all(axis=1)
        return Detections(boxes_xyxy=mapped[keep], scores=scores[keep].astype(np.float32), labels=labels[keep].astype(np.int32))

    def _decode_raw(self, outputs: Outputs, metas: Sequence[ImageMeta], params: RawHeadParams) -> list[Detections]:
        names = sorted(outputs)
        maps = [np.asarray(outputs[name], dtype=np.float32) for name in names]
        if self._component == "BaseDenseHead":
            boxes, scores = np.asarray(outputs["dets"], dtype=np.float32)[..., :4], np.asarray(outputs["labels"], dtype=np.float32)
        else:
            half = len(maps) // 2
            if len(maps) % 2 or half != len(params.anchor_generator.strides):
                raise UnsupportedBundleError(
                    f"{self._where}: expected class and distance maps for strides {params.anchor_generator.strides}, found outputs {names}"
                )
            boxes, scores = decode_raw_head(maps[:half], maps[half:], strides=params.anchor_generator.strides, offset=params.anchor_generator.offset)
        return [self._suppressed(boxes[i], scores[i], meta, params) for i, meta in enumerate(metas)]

    def _suppressed(self, boxes: Tensor, scores: Tensor, meta: ImageMeta, params: RawHeadParams) -> Detections:
        """Threshold and non-maximum suppression of one image: per class in exact geometry, across classes as the SDK does it."""
        if self._geometry == "sdk":
            labels = scores.argmax(axis=1)
            best = scores[np.arange(len(scores)), labels]
            rows = np.flatnonzero(best >= params.score_thr)
            keep = suppress(boxes[rows], best[rows], iou_threshold=params.iou_threshold)
            rows = rows[keep]
            return self._to_image(boxes[rows], best[rows], labels[rows], meta)
        rows, classes = np.nonzero(scores > params.score_thr)
        values = scores[rows, classes]
        keep = suppress(boxes[rows], values, iou_threshold=params.iou_threshold, classes=classes)[: params.max_per_img]
        return self._to_image(boxes[rows[keep]], values[keep], classes[keep], meta)


def decode_raw_head(class_maps: Sequence[Tensor], distance_maps: Sequence[Tensor], *, strides: Sequence[int], offset: float) -> tuple[Tensor, Tensor]:
    """RTMDet's raw outputs as boxes and scores of all cells, level by level, row by row.

    Args:
        class_maps: per level (B, C, h, w) logits.
        distance_maps: per level (B, 4, h, w) left, top, right, bottom from the cell's point, in network pixels.
        strides: network pixels per cell, per level.
        offset: where in its cell the point lies, as a fraction.

    Returns:
        boxes (B, A, 4) in network pixels and scores (B, A, C) in 0..1.
    """
    boxes, scores = [], []
    for logits, distances, stride in zip(class_maps, distance_maps, strides, strict=True):
        batch, classes, height, width = logits.shape
        x = (np.arange(width, dtype=np.float32) + np.float32(offset)) * np.float32(stride)
        y = (np.arange(height, dtype=np.float32) + np.float32(offset)) * np.float32(stride)
        left, top, right, bottom = (distances[:, i] for i in range(4))
        corners = np.stack([x[None, None] - left, y[None, :, None] - top, x[None, None] + right, y[None, :, None] + bottom], axis=-1)
        boxes.append(corners.reshape(batch, height * width, 4))
        scores.append(_sigmoid(logits).reshape(batch, classes, height * width).transpose(0, 2, 1))
    return np.concatenate(boxes, axis=1), np.concatenate(scores, axis=1)


def _sigmoid(x: Tensor) -> Tensor:
    """Without overflow for large negative logits."""
    half: Tensor = np.tanh(np.float32(0.5) * x) + np.float32(1)
    return half * np.float32(0.5)


def suppress(boxes_xyxy: Tensor, scores: Tensor, *, iou_threshold: float, classes: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
    """Greedy non-maximum suppression: a box goes when its IoU with a better one (of its class) is above the threshold.

    Args:
        boxes_xyxy: (n, 4).
        scores: (n,).
        iou_threshold: strict: equal IoU stays.
        classes: (n,) or None to suppress across classes.

    Returns:
        Indices of the boxes that stay, best first; equal scores keep their order.
    """
    order = np.argsort(-scores, kind="stable")
    # As ONNX's NonMaxSuppression: any two opposite corners will do, and a box of negative distances is measured the right way round.
    (left, top), (right, bottom) = (corner(boxes_xyxy[order, :2], boxes_xyxy[order, 2:]).T for corner in (np.minimum, np.maximum))
    areas = (right - left) * (bottom - top)
    group = None if classes is None else classes[order]
    alive = np.ones(len(order), dtype=bool)
    kept = []
    for i in range(len(order)):
        if not alive[i]:
            continue
        kept.append(i)
        rest = slice(i + 1, None)
        width = np.minimum(right[i], right[rest]) - np.maximum(left[i], left[rest])
        height = np.minimum(bottom[i], bottom[rest]) - np.maximum(top[i], top[rest])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            over = common / (areas[i] + areas[rest] - common) > iou_threshold
        if group is not None:
            over &= group[rest] == group[i]
        alive[rest] &= ~over
    return order[kept]


class KeypointDecoder:
    """Keypoints of a batch of top-down crops."""

    def __init__(self, pipeline: Pipeline, *, geometry: Geometry, where: str) -> None:
        """Compile.

        Args:
            pipeline: the bundle's pipeline.json.
            geometry: "sdk" ignores `use_dark` as MMDeploy's SDK does, "exact" refuses it.
            where: the bundle's name, for messages.

        Raises:
            UnsupportedBundleError: a component or an option that there is no code for.
        """
        params = pipeline.postprocess.params
        if not isinstance(params, (SimCCLabelDecodeParams, DeepposeRegressionParams, HeatmapDecodeParams)):
            raise _unsupported(pipeline, ("SimCCLabelDecode", "DeepposeRegressionHeadDecode", "TopdownHeatmapSimpleHeadDecode and its aliases"), where=where)
        if isinstance(params, SimCCLabelDecodeParams) and params.use_dark and geometry == "exact":
            raise UnsupportedBundleError(f"{where}: use_dark: expected false for SimCC in exact geometry, found true", hint="open it with geometry='sdk'")
        if isinstance(params, HeatmapDecodeParams):
            _check_heatmap(params, geometry=geometry, where=where)
        self._params = params
        self._geometry = geometry
        self._where = where
        affine = pipeline.transform(TopDownAffine)
        # A crop by UDP is as long as the distance between its outer pixels' centres.
        self._is_udp_crop = geometry == "exact" and affine is not None and bool(affine.use_udp)

    def decode(self, outputs: Outputs, crops: list[Crop], *, input_hw: tuple[int, int]) -> Poses:
        """Decode the crops of one image.

        Args:
            outputs: network outputs by name: `simcc_x` (N, K, W * ratio) and `simcc_y` (N, K, H * ratio); or `output`, (N, K, h, w) heatmaps or (N, K, 2).
            crops: (N) maps back to the image.
            input_hw: network input (height, width) in pixels.

        Returns:
            The poses in image pixels.
        """
        if isinstance(self._params, HeatmapDecodeParams):
            maps = _only(outputs, where=self._where)
            if maps.ndim != 4:
                raise UnsupportedBundleError(f"{self._where}: expected heatmaps (N, K, h, w), found an output of shape {list(maps.shape)}")
            points, scores = self._decode_heatmaps(maps, self._params, input_hw=input_hw)
        elif isinstance(self._params, DeepposeRegressionParams):
            values = _only(outputs, where=self._where)
            values = values.reshape(len(values), -1, 2) if values.ndim == 2 else values[..., :2]
            points = values * np.array(input_hw[::-1], dtype=np.float32)
            scores = np.ones(points.shape[:2], dtype=np.float32)
        elif "simcc_x" not in outputs or "simcc_y" not in outputs:
            raise UnsupportedBundleError(f"{self._where}: expected the outputs simcc_x and simcc_y, found {', '.join(outputs)}")
        elif self._params.export_postprocess:
            points, scores = np.asarray(outputs["simcc_x"], dtype=np.float32), np.asarray(outputs["simcc_y"], dtype=np.float32)
        else:
            points, scores = decode_simcc(
                np.asarray(outputs["simcc_x"], dtype=np.float32), np.asarray(outputs["simcc_y"], dtype=np.float32), split_ratio=self._params.simcc_split_ratio
            )
        if self._geometry == "sdk" and isinstance(self._params, SimCCLabelDecodeParams):
            return Poses(keypoints_xy=to_image_sdk(points, crops, size_wh=(input_hw[1], input_hw[0])), scores=scores)
        return Poses(keypoints_xy=to_image(points, crops), scores=scores)

    def _decode_heatmaps(self, maps: Tensor, params: HeatmapDecodeParams, *, input_hw: tuple[int, int]) -> tuple[Points, Tensor]:
        """Peaks in network pixels, refined as the geometry's owner refines them: spec 3.4, or MMPose's UDPHeatmap and MSRAHeatmap codecs."""
        kernel = params.modulate_kernel
        if self._geometry == "sdk":
            is_megvii = params.post_process == "megvii" and not params.use_udp
            searched = heatmaps.blurred(maps, kernel=kernel) if is_megvii else maps
            cells, scores = heatmaps.peaks(searched)
            if params.use_udp:
                points = heatmaps.dark_udp_sdk(maps, cells, kernel=kernel)
            elif params.post_process == "unbiased":
                points = heatmaps.dark(maps, cells, kernel=kernel)
            elif params.post_process == "null":
                points = cells.astype(np.float32)
            else:
                points = heatmaps.quarter_shifted(searched, cells, low_y=1)
                if is_megvii:
                    inside = ((cells > 1) & (cells < np.array(maps.shape[:1:-1]) - 1)).all(axis=2)
                    points[inside] += np.float32(0.5)
                    scores = scores / np.float32(255) + np.float32(0.5)
        else:
            cells, scores = heatmaps.peaks(maps)
            kernel = params.blur_kernel_size or kernel
            if params.use_udp:
                points = heatmaps.dark_udp(maps, cells, kernel=kernel)
            elif params.unbiased:
                points = heatmaps.dark(maps, cells, kernel=kernel)
            else:
                points = heatmaps.quarter_shifted(maps, cells, low_y=0)
        spans = np.array(input_hw[::-1], dtype=np.float64) - self._is_udp_crop
        cells_wh = np.array(maps.shape[:1:-1]) - params.use_udp
        return (points * (spans / cells_wh)).astype(np.float32), scores


def _check_heatmap(params: HeatmapDecodeParams, *, geometry: Geometry, where: str) -> None:
    if params.target_type.lower() != "gaussianheatmap":
        raise UnsupportedBundleError(f"{where}: target_type: expected GaussianHeatmap, found {params.target_type!r}")
    if params.modulate_kernel < 1 or params.modulate_kernel % 2 == 0 or (params.blur_kernel_size or 1) % 2 == 0:
        raise UnsupportedBundleError(f"{where}: modulate_kernel: expected an odd number, found {params.modulate_kernel}")
    if geometry == "exact" and params.post_process == "megvii":
        raise UnsupportedBundleError(f"{where}: post_process: expected default in exact geometry, found 'megvii'", hint="open it with geometry='sdk'")


class ClassDecoder:
    """The best classes of a batch of images."""

    def __init__(self, pipeline: Pipeline, *, where: str) -> None:
        """Compile.

        Args:
            pipeline: the bundle's pipeline.json.
            where: the bundle's name, for messages.

        Raises:
            UnsupportedBundleError: a component that there is no code for.
        """
        params = pipeline.postprocess.params
        if not isinstance(params, LinearClsHeadParams):
            raise _unsupported(pipeline, ("LinearClsHead", "ConformerHead"), where=where)
        if params.topk < 1:
            raise UnsupportedBundleError(f"{where}: topk: expected at least 1, found {params.topk}")
        self._params = params
        self._where = where

    def decode(self, outputs: Outputs) -> list[Classification]:
        """Decode one batch.

        Args:
            outputs: one output by name, (B, C) scores.

        Returns:
            (B) the best classes; equal scores in the order of their labels.
        """
        scores = _only(outputs, where=self._where)
        if self._params.softmax:
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._params.topk]
        return [Classification(labels=labels.astype(np.int32), scores=row[labels]) for labels, row in zip(best, scores, strict=True)]


def decode_simcc(simcc_x: Tensor, simcc_y: Tensor, *, split_ratio: float) -> tuple[Points, Tensor]:
    """The maxima of the two SimCC vectors (Li et al., "SimCC: a Simple Coordinate Classification Perspective", ECCV 2022; MMPose `get_simcc_maximum`).

    Args:
        simcc_x: (N, K, W * split_ratio) float32.
        simcc_y: (N, K, H * split_ratio) float32.
        split_ratio: bins per network pixel.

    Returns:
        (N, K, 2) float32 in network pixels, -1 / split_ratio where the score is not positive; and (N, K) float32 scores, the smaller maximum.
    """
    x, y = simcc_x.argmax(axis=2), simcc_y.argmax(axis=2)
    # `reduce` is what `max` calls, without the way there.
    scores = np.minimum(np.maximum.reduce(simcc_x, axis=2), np.maximum.reduce(simcc_y, axis=2))
    points = np.empty((*scores.shape, 2), dtype=np.float32)
    points[..., 0], points[..., 1] = x, y
    if np.minimum.reduce(scores, axis=None, initial=1) <= 0:
        points[scores <= 0] = -1
    points /= np.float32(split_ratio)
    return points, scores


def _only(outputs: Outputs, *, where: str) -> Tensor:
    """The one output of a network that has one."""
    if len(outputs) != 1:
        raise UnsupportedBundleError(f"{where}: expected one output, found {', '.join(outputs)}")
    return np.asarray(next(iter(outputs.values())), dtype=np.float32)


def _unsupported(pipeline: Pipeline, known: tuple[str, ...], *, where: str) -> UnsupportedBundleError:
    return UnsupportedBundleError(f"{where}: postprocess.component: expected one of {', '.join(known)}, found {pipeline.postprocess.component}")
