"""Decoders against plain loops that re-state `mmdeploy-sdk-spec.md` section 3, and upstream's own keypoints."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcrate_bundle.errors import UnsupportedBundleError
from modelcrate_bundle.schema import Pipeline, read_pipeline
from modelcrate_runtime import Detections, PoseDetector, Poses
from modelcrate_runtime.geometry import Crop
from modelcrate_runtime.postprocess import BoxDecoder, KeypointDecoder, decode_raw_head, decode_simcc, suppress
from modelcrate_runtime.preprocess import ImageMeta, Preprocessor

SAME = Crop(step_xy=(1.0, 1.0), origin_xy=(0.0, 0.0))


def pipeline_of(component: str, params: dict[str, Any], *, transforms: list[dict[str, Any]] | None = None) -> Pipeline:
    module = "mmpose" if "Decode" in component else "mmdet"
    tasks = [
        {"type": "Task", "module": "Transform", "input": "img", "output": "prep", "transforms": transforms or [{"type": "LoadImageFromFile"}]},
        {"type": "Task", "module": "Net", "name": "net", "input": "prep", "output": "infer"},
        {"type": "Task", "module": module, "component": component, "params": params, "input": ["prep", "infer"], "output": "post"},
    ]
    return read_pipeline({"pipeline": {"input": "img", "output": "post", "tasks": tasks}})


def boxes_of(
    outputs: dict[str, np.ndarray],
    meta: ImageMeta | list[ImageMeta],
    params: dict[str, Any] | None = None,
    *,
    component: str = "ResizeBBox",
    geometry: str = "sdk",
) -> Any:
    """Decode a batch; for one meta its detections, for several a list."""
    decoder = BoxDecoder(pipeline_of(component, params or {}), geometry=geometry, where="bundle")
    metas = meta if isinstance(meta, list) else [meta]
    results = decoder.decode(outputs, metas)
    assert len(results) == len(metas)
    return results if isinstance(meta, list) else results[0]


def dets(*rows: tuple[float, ...], labels: list[float] | None = None, dtype: str = "int64") -> dict[str, np.ndarray]:
    """`dets` and `labels` of a batch of one."""
    array = np.array([rows], dtype=np.float32)
    return {"dets": array, "labels": np.array([labels if labels is not None else [0] * len(rows)]).astype(dtype)}


def plain(width: int = 640, height: int = 480) -> ImageMeta:
    return ImageMeta(image_hw=(height, width), resized_hw=(height, width))


# ------------------------------------------------------------------------------------------------------------------ ResizeBBox


@pytest.mark.parametrize("geometry", ["sdk", "exact"])
def test_only_scores_above_the_threshold_survive_and_keep_their_order(geometry: str) -> None:
    found = boxes_of(
        dets((1, 2, 30, 40, 0.75), (5, 6, 70, 80, 0.5), (9, 9, 20, 20, 0.5000001), labels=[3, 1, 2]), plain(), {"score_thr": 0.5}, geometry=geometry
    )
    np.testing.assert_array_equal(found.boxes_xyxy, [[1, 2, 30, 40], [9, 9, 20, 20]])
    np.testing.assert_array_equal(found.labels, [3, 2])
    np.testing.assert_allclose(found.scores, [0.75, 0.5000001], atol=1e-7)
    assert (found.boxes_xyxy.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int32)


@pytest.mark.parametrize("geometry", ["sdk", "exact"])
def test_zero_rows_vanish_at_the_default_threshold(geometry: str) -> None:
    found = boxes_of(dets((1, 2, 30, 40, 0.1), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0), labels=[5, -1, 0]), plain(), geometry=geometry)
    assert found.labels.tolist() == [5]


@pytest.mark.parametrize("params", [{"score_thr": 0.9, "conf_thr": 0.2}, {"conf_thr": 0.2}])
def test_conf_thr_wins(params: dict[str, Any]) -> None:
    assert len(boxes_of(dets((1, 2, 30, 40, 0.3), (1, 2, 30, 40, 0.2)), plain(), params)) == 1


def test_conf_thr_of_zero_wins_too() -> None:
    assert len(boxes_of(dets((1, 2, 30, 40, 0.3)), plain(), {"score_thr": 0.9, "conf_thr": 0})) == 1


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_labels_of_every_type(dtype: str) -> None:
    found = boxes_of(dets((1, 2, 30, 40, 0.9), (1, 2, 30, 40, 0.8), labels=[79, 2], dtype=dtype), plain())
    assert found.labels.dtype == np.int32
    assert found.labels.tolist() == [79, 2]


def test_clipping_of_the_sdk_is_one_sided_and_one_pixel_short() -> None:
    found = boxes_of(dets((-5, -6, 700, 500, 0.9), (600, 400, 640, 480, 0.8)), plain(640, 480))
    np.testing.assert_array_equal(found.boxes_xyxy, [[0, 0, 639, 479], [600, 400, 639, 479]])


def test_clipping_of_exact_geometry_is_at_the_edges() -> None:
    found = boxes_of(dets((-5, -6, 700, 500, 0.9), (600, 400, 640, 480, 0.8)), plain(640, 480), geometry="exact")
    np.testing.assert_array_equal(found.boxes_xyxy, [[0, 0, 640, 480], [600, 400, 640, 480]])


@pytest.mark.parametrize("geometry", ["sdk", "exact"])
def test_boxes_that_lie_outside_are_dropped(geometry: str) -> None:
    found = boxes_of(dets((650, 10, 700, 50, 0.9), (10, 490, 50, 600, 0.9), (-50, 10, -10, 50, 0.9), (10, 10, 20, 20, 0.1)), plain(640, 480), geometry=geometry)
    np.testing.assert_array_equal(found.boxes_xyxy, [[10, 10, 20, 20]])


@pytest.mark.parametrize(
    ("geometry", "size", "kept"),
    [
        ("sdk", 0, [0, 1, 2]),
        ("sdk", 10, [0, 1]),
        ("sdk", 10.5, [0]),
        ("sdk", 100, []),
        ("exact", 0, [0, 1, 2]),
        ("exact", 9.5, [0, 1]),
        ("exact", 10.5, [0]),
        ("exact", 100, []),
    ],
)
def test_min_bbox_size_is_in_image_pixels_and_in_the_sdk_inclusive(geometry: str, size: float, kept: list[int]) -> None:
    meta = ImageMeta(image_hw=(480, 640), resized_hw=(240, 320), scale_xyxy=(0.5, 0.5, 0.5, 0.5))
    found = boxes_of(dets((0, 0, 40, 40, 0.9), (0, 0, 5, 40, 0.9), (0, 0, 40, 4.5, 0.9), labels=[0, 1, 2]), meta, {"min_bbox_size": size}, geometry=geometry)
    assert found.labels.tolist() == kept


def test_dets_without_scores_all_stay() -> None:
    found = boxes_of(dets((1, 2, 30, 40), (5, 6, 70, 80)), plain(), {"score_thr": 0.5})
    assert len(found) == 2
    assert found.scores.tolist() == [0, 0]


def test_detection_output_is_normalised_by_the_resized_image() -> None:
    meta = ImageMeta(image_hw=(480, 640), resized_hw=(240, 320), scale_xyxy=(0.5, 0.5, 0.5, 0.5))
    rows = np.array([[[3, 0.9, 0.25, 0.5, 0.5, 0.75], [1, 0.05, 0, 0, 1, 1]]], dtype=np.float32)
    found = boxes_of({"detection_output": rows}, meta, {"score_thr": 0.05 + 1e-6})
    np.testing.assert_allclose(found.boxes_xyxy, [[160, 240, 320, 360]], atol=1e-4)
    assert found.labels.tolist() == [2]
    np.testing.assert_allclose(found.scores, [0.9], atol=1e-7)


def test_outputs_that_are_not_a_detectors_are_named() -> None:
    with pytest.raises(UnsupportedBundleError, match="expected the outputs dets and labels, or detection_output; found heatmap"):
        boxes_of({"heatmap": np.zeros((1, 2, 3), dtype=np.float32)}, plain())


def spec_resize_bbox(rows: np.ndarray, labels: np.ndarray, meta: ImageMeta, *, thr: float, least: float) -> list[tuple[int, list[float]]]:
    """Spec 3.1, box by box in float32."""
    f = np.float32
    height, width = meta.image_hw
    pad_left, pad_top = (f(v) for v in meta.pad_left_top)
    wo, ho = f(-meta.border_xy[0]), f(-meta.border_xy[1])
    sf = [f(v) for v in meta.scale_xyxy]
    emitted = []
    for (x1, y1, x2, y2, score), label in zip(rows, labels, strict=True):
        if score <= thr:
            continue
        left, top = max((x1 - pad_left) / sf[0] + wo, f(0)), max((y1 - pad_top) / sf[1] + ho, f(0))
        right, bottom = min((x2 - pad_left) / sf[2] + wo, f(width - 1)), min((y2 - pad_top) / sf[3] + ho, f(height - 1))
        if right - left < least or bottom - top < least:
            continue
        emitted.append((int(label), [float(left), float(top), float(right), float(bottom), float(score)]))
    return emitted


@pytest.mark.parametrize(
    "meta",
    [
        ImageMeta(image_hw=(480, 640), resized_hw=(240, 320), scale_xyxy=(0.5, 0.5, 0.5, 0.5)),
        ImageMeta(image_hw=(333, 517), resized_hw=(206, 320), scale_xyxy=(320 / 517, 206 / 333, 320 / 517, 206 / 333)),
        ImageMeta(image_hw=(100, 300), resized_hw=(320, 320), scale_xyxy=(1.0667, 1.0667, 1.0667, 1.0667), pad_left_top=(0, 106)),
        ImageMeta(image_hw=(250, 200), resized_hw=(250, 200), border_xy=(27, 2)),
    ],
)
def test_sdk_boxes_are_those_of_the_specification(meta: ImageMeta) -> None:
    rng = np.random.default_rng(8)
    rows = np.concatenate([rng.uniform(-40, 360, (400, 4)), rng.uniform(0, 1, (400, 1))], axis=1).astype(np.float32)
    rows[:300, 2:4] = rows[:300, :2] + rng.uniform(0, 100, (300, 2)).astype(np.float32)
    labels = rng.integers(0, 80, 400)
    found = boxes_of({"dets": rows[None], "labels": labels[None]}, meta, {"score_thr": 0.25, "min_bbox_size": 3})
    expected = spec_resize_bbox(rows, labels, meta, thr=0.25, least=3)
    assert 50 < len(expected) < 300
    assert found.labels.tolist() == [label for label, _ in expected]
    np.testing.assert_allclose(np.column_stack([found.boxes_xyxy, found.scores]), [row for _, row in expected], atol=1e-4)


def test_each_image_of_a_batch_has_its_own_meta() -> None:
    outputs = {"dets": np.array([[[0, 0, 10, 10, 0.9]], [[0, 0, 10, 10, 0.9]]], dtype=np.float32), "labels": np.array([[1], [2]])}
    metas = [plain(), ImageMeta(image_hw=(480, 640), resized_hw=(240, 320), scale_xyxy=(0.5, 0.5, 0.5, 0.5))]
    first, second = boxes_of(outputs, metas)
    np.testing.assert_array_equal(first.boxes_xyxy, [[0, 0, 10, 10]])
    np.testing.assert_array_equal(second.boxes_xyxy, [[0, 0, 20, 20]])
    assert (first.labels.tolist(), second.labels.tolist()) == ([1], [2])


TRANSFORMS = {
    "letterbox": [{"type": "Resize", "size": [320, 320], "keep_ratio": True}, {"type": "Pad", "size": [320, 320]}],
    "stretched": [{"type": "Resize", "size": [320, 320]}],
    "LetterResize": [{"type": "LetterResize", "scale": [320, 320]}],
    "LetterResize, stretched": [{"type": "LetterResize", "scale": [320, 320], "stretch_only": True}],
    "Resize, LetterResize": [{"type": "Resize", "size": [200, 100]}, {"type": "LetterResize", "scale": [320, 320]}],
    "around": [{"type": "Pad", "logical_or_val": 127}],
    "Resize, around": [{"type": "Resize", "size": [160, 160], "keep_ratio": True}, {"type": "Pad", "logical_or_val": 127}],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_exact_boxes_are_where_the_object_was(name: str) -> None:
    """A white rectangle goes through the bundle's own preprocessing, is found there by its pixels, and comes back."""
    image = np.zeros((240, 400, 3), dtype=np.uint8)
    image[60:180, 100:260] = 255
    pipeline = pipeline_of("ResizeBBox", {}, transforms=[{"type": "LoadImageFromFile"}, *TRANSFORMS[name]])
    tensor, meta = Preprocessor(pipeline, geometry="exact", where="bundle").image(image)
    inside = tensor[0, 0] > 127
    y, x = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    rows = np.array([[[x[0], y[0], x[-1] + 1, y[-1] + 1, 0.9]]], dtype=np.float32)
    (found,) = BoxDecoder(pipeline, geometry="exact", where="bundle").decode({"dets": rows, "labels": np.zeros((1, 1))}, [meta])
    # An edge is found to half a network pixel; at 160 and 200 pixels of width one of those is two and a half of the image.
    np.testing.assert_allclose(found.boxes_xyxy, [[100, 60, 260, 180]], atol=1.5)


# ------------------------------------------------------------------------------------------------------------------- raw heads


def raw_outputs(
    rng: np.random.Generator, *, batch: int = 1, classes: int = 3, input_hw: tuple[int, int] = (64, 96)
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits and distances of the levels 8, 16, 32."""
    shapes = [(input_hw[0] // stride, input_hw[1] // stride) for stride in (8, 16, 32)]
    logits = [rng.normal(-1, 2, (batch, classes, h, w)).astype(np.float32) for h, w in shapes]
    distances = [rng.uniform(0, 30, (batch, 4, h, w)).astype(np.float32) for h, w in shapes]
    return logits, distances


def loop_decode(logits: list[np.ndarray], distances: list[np.ndarray], *, offset: float, sample: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cell by cell: boxes (A, 4) and scores (A, C)."""
    boxes, scores = [], []
    for level, stride in enumerate((8, 16, 32)):
        _, _, height, width = logits[level].shape
        for i in range(height):
            for j in range(width):
                x, y = (offset + j) * stride, (offset + i) * stride
                left, top, right, bottom = (float(v) for v in distances[level][sample, :, i, j])
                boxes.append([x - left, y - top, x + right, y + bottom])
                scores.append([1 / (1 + np.exp(-float(v))) for v in logits[level][sample, :, i, j]])
    return np.array(boxes), np.array(scores)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_raw_head_is_decoded_cell_by_cell(offset: float) -> None:
    logits, distances = raw_outputs(np.random.default_rng(1), batch=2)
    boxes, scores = decode_raw_head(logits, distances, strides=[8, 16, 32], offset=offset)
    for sample in range(2):
        expected_boxes, expected_scores = loop_decode(logits, distances, offset=offset, sample=sample)
        np.testing.assert_allclose(boxes[sample], expected_boxes, atol=1e-4)
        np.testing.assert_allclose(scores[sample], expected_scores, atol=1e-6)


def test_scores_of_extreme_logits_are_zero_and_one() -> None:
    logits = np.array([-1e4, -90, 0, 90, 1e4], dtype=np.float32).reshape(1, 5, 1, 1)
    _, scores = decode_raw_head([logits], [np.ones((1, 4, 1, 1), dtype=np.float32)], strides=[8], offset=0.0)
    np.testing.assert_allclose(scores[0, 0], [0, 0, 0.5, 1, 1], atol=1e-7)


def raw_params(**changes: Any) -> dict[str, Any]:
    return {"score_thr": 0.4, "nms": {"type": "nms", "iou_threshold": 0.3}, "anchor_generator": {"offset": 0, "strides": [8, 16, 32]}} | changes


def named(logits: list[np.ndarray], distances: list[np.ndarray]) -> dict[str, np.ndarray]:
    """In an order that is not the names', as a backend may return them."""
    outputs = {f"cls_{i}": value for i, value in enumerate(logits)} | {f"reg_{i}": value for i, value in enumerate(distances)}
    return dict(reversed(outputs.items()))


def test_raw_head_in_sdk_geometry_suppresses_across_classes() -> None:
    logits, distances = raw_outputs(np.random.default_rng(2))
    boxes, scores = loop_decode(logits, distances, offset=0.0)
    candidates = sorted(((float(s.max()), -i) for i, s in enumerate(scores) if s.max() >= 0.4), reverse=True)
    kept: list[int] = []
    for _, minus in candidates:
        if all(iou(boxes[-minus], boxes[k]) <= 0.3 for k in kept):
            kept.append(-minus)
    meta = ImageMeta(image_hw=(128, 192), resized_hw=(64, 96), scale_xyxy=(0.5, 0.5, 0.5, 0.5))
    expected = [
        [max(boxes[k][0] * 2, 0), max(boxes[k][1] * 2, 0), min(boxes[k][2] * 2, 191), min(boxes[k][3] * 2, 127), scores[k].max(), scores[k].argmax()]
        for k in kept
    ]
    expected = [row for row in expected if row[2] >= row[0] and row[3] >= row[1]]
    assert len(expected) > 5
    found = boxes_of(named(logits, distances), meta, raw_params(), component="RTMDetSepBNHead")
    np.testing.assert_allclose(np.column_stack([found.boxes_xyxy, found.scores, found.labels]), expected, atol=1e-3)


@pytest.mark.parametrize("limit", [None, 7])
def test_raw_head_in_exact_geometry_suppresses_per_class(limit: int | None) -> None:
    logits, distances = raw_outputs(np.random.default_rng(3))
    boxes, scores = loop_decode(logits, distances, offset=0.0)
    candidates = sorted(((float(s), -i, c) for i, row in enumerate(scores) for c, s in enumerate(row) if s > 0.4), reverse=True)
    kept: list[tuple[int, int]] = []
    for _, minus, label in candidates:
        if all(label != other or iou(boxes[-minus], boxes[k]) <= 0.3 for k, other in kept):
            kept.append((-minus, label))
    # Wide enough that nothing is clipped away.
    meta = ImageMeta(image_hw=(1000, 1000), resized_hw=(64, 96))
    expected = [[*np.clip(boxes[k], 0, 1000), scores[k][label], label] for k, label in kept[:limit]]
    assert len(expected) > 5
    assert len({label for _, label in kept}) == 3
    found = boxes_of(named(logits, distances), meta, raw_params(max_per_img=limit), component="RTMDetSepBNHead", geometry="exact")
    np.testing.assert_allclose(np.column_stack([found.boxes_xyxy, found.scores, found.labels]), expected, atol=1e-3)


def test_base_dense_head_takes_boxes_and_class_scores() -> None:
    boxes = np.array([[[0, 0, 20, 20], [1, 1, 21, 21], [40, 40, 60, 60], [70, 70, 90, 90]]], dtype=np.float32)
    scores = np.array([[[0.1, 0.9], [0.8, 0.2], [0.5, 0.3], [0.39, 0.1]]], dtype=np.float32)
    params = {"score_thr": 0.4, "nms": {"iou_threshold": 0.5}}
    across = boxes_of({"dets": boxes, "labels": scores}, plain(), params, component="BaseDenseHead")
    assert across.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(across.boxes_xyxy, [[0, 0, 20, 20], [40, 40, 60, 60]])
    per_class = boxes_of({"dets": boxes, "labels": scores}, plain(), params, component="BaseDenseHead", geometry="exact")
    assert per_class.labels.tolist() == [1, 0, 0]


def test_threshold_of_a_raw_head_is_inclusive_in_the_sdk_only() -> None:
    outputs = {"dets": np.array([[[0, 0, 20, 20]]], dtype=np.float32), "labels": np.array([[[0.5]]], dtype=np.float32)}
    assert len(boxes_of(outputs, plain(), {"score_thr": 0.5}, component="BaseDenseHead")) == 1
    assert len(boxes_of(outputs, plain(), {"score_thr": 0.5}, component="BaseDenseHead", geometry="exact")) == 0


@pytest.mark.parametrize("geometry", ["sdk", "exact"])
def test_nothing_above_the_threshold_is_no_detection(geometry: str) -> None:
    logits, distances = raw_outputs(np.random.default_rng(4))
    found = boxes_of(named([v - 50 for v in logits], distances), plain(), raw_params(), component="RTMDetSepBNHead", geometry=geometry)
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


def test_raw_head_with_other_outputs_is_refused() -> None:
    logits, distances = raw_outputs(np.random.default_rng(4))
    with pytest.raises(UnsupportedBundleError, match=r"expected class and distance maps for strides \[8, 16, 32\]"):
        boxes_of(named(logits[:2], distances[:2]), plain(), raw_params(), component="RTMDetSepBNHead")


# ------------------------------------------------------------------------------------------------------------------------- NMS

small_box = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8), st.integers(0, 8)).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


def exact_iou(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return Fraction(common, union) if union else Fraction(0)


@given(
    rows=st.lists(st.tuples(small_box, st.integers(0, 5), st.integers(0, 2)), max_size=25),
    threshold=st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(9, 20), Fraction(1, 2), Fraction(1)]),
    per_class=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_suppress_is_brute_force_suppression(rows: list[tuple[tuple[int, ...], int, int]], threshold: Fraction, per_class: bool) -> None:
    kept: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -rows[i][1]):  # stable: equal scores keep their order
        if all((per_class and rows[i][2] != rows[k][2]) or exact_iou(rows[i][0], rows[k][0]) <= threshold for k in kept):
            kept.append(i)
    boxes = np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4)
    scores = np.array([row[1] for row in rows], dtype=np.float32) / 8
    classes = np.array([row[2] for row in rows], dtype=np.intp)
    assert suppress(boxes, scores, iou_threshold=float(threshold), classes=classes if per_class else None).tolist() == kept


# ----------------------------------------------------------------------------------------------------------------------- SimCC


@given(seed=st.integers(0, 2**32 - 1), ratio=st.sampled_from([1.0, 2.0, 3.0]), levels=st.sampled_from([3, 1000]))
@settings(max_examples=50, deadline=None)
def test_simcc_is_decoded_keypoint_by_keypoint(seed: int, ratio: float, levels: int) -> None:
    """With three levels nearly every maximum is a tie: the first one counts."""
    rng = np.random.default_rng(seed)
    simcc_x = (rng.integers(-levels, levels, (3, 5, 24)) / levels).astype(np.float32)
    simcc_y = (rng.integers(-levels, levels, (3, 5, 32)) / levels).astype(np.float32)
    simcc_x[0, 0] = -np.abs(simcc_x[0, 0])
    simcc_y[1, 1] = 0
    points, scores = decode_simcc(simcc_x, simcc_y, split_ratio=ratio)
    for n in range(3):
        for k in range(5):
            x, y = simcc_x[n, k].tolist(), simcc_y[n, k].tolist()
            score = min(max(x), max(y))
            expected = (x.index(max(x)), y.index(max(y))) if score > 0 else (-1, -1)
            assert scores[n, k] == np.float32(score)
            np.testing.assert_allclose(points[n, k], np.array(expected) / ratio, atol=1e-5)


def keypoints_of(
    outputs: dict[str, np.ndarray], crops: list[Crop], params: dict[str, Any] | None = None, *, component: str = "SimCCLabelDecode", geometry: str = "exact"
) -> Poses:
    decoder = KeypointDecoder(pipeline_of(component, params or {}), geometry=geometry, where="bundle")
    return decoder.decode(outputs, crops, input_hw=(256, 192))


def one_hot(index: int, length: int, *, height: float = 1.0) -> np.ndarray:
    vector = np.zeros((1, 1, length), dtype=np.float32)
    vector[0, 0, index] = height
    return vector


def test_keypoint_goes_through_its_crop() -> None:
    poses = keypoints_of(
        {"simcc_x": one_hot(100, 384, height=0.7), "simcc_y": one_hot(31, 512, height=0.4)}, [Crop(step_xy=(2.0, 3.0), origin_xy=(-10.0, 5.0))]
    )
    assert (poses.keypoints_xy.dtype, poses.scores.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(poses.keypoints_xy, [[[50 * 2 - 10, 15.5 * 3 + 5]]], atol=1e-4)
    np.testing.assert_allclose(poses.scores, [[0.4]], atol=1e-7)


@pytest.mark.parametrize("score", [0.0, -0.5])
def test_score_that_is_not_positive_goes_to_minus_one_bin(score: float) -> None:
    outputs = {"simcc_x": one_hot(100, 384), "simcc_y": np.full((1, 1, 512), score, dtype=np.float32)}
    poses = keypoints_of(outputs, [Crop(step_xy=(2.0, 3.0), origin_xy=(-10.0, 5.0))])
    np.testing.assert_allclose(poses.keypoints_xy, [[[-0.5 * 2 - 10, -0.5 * 3 + 5]]], atol=1e-5)
    assert poses.scores[0, 0] == np.float32(score)


def test_export_postprocess_brings_points_and_scores() -> None:
    outputs = {"simcc_x": np.array([[[10.25, 20.5], [-3, 4]]], dtype=np.float32), "simcc_y": np.array([[0.5, -0.25]], dtype=np.float32)}
    poses = keypoints_of(outputs, [Crop(step_xy=(2.0, 2.0), origin_xy=(1.0, 0.0))], {"export_postprocess": True, "simcc_split_ratio": 2.0})
    np.testing.assert_allclose(poses.keypoints_xy, [[[21.5, 41], [-5, 8]]], atol=1e-5)
    np.testing.assert_array_equal(poses.scores, [[0.5, -0.25]])


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 6)])
def test_regression_heads_give_fractions_of_the_input(shape: tuple[int, ...]) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(shape)
    poses = keypoints_of({"output": values}, [SAME, Crop(step_xy=(2.0, 2.0), origin_xy=(0.0, 0.0))], component="DeepposeRegressionHeadDecode")
    expected = values.reshape(2, 3, 2) * [192, 256]
    expected[1] *= 2
    np.testing.assert_allclose(poses.keypoints_xy, expected, atol=1e-4)
    assert (poses.scores == 1).all()


def test_dark_is_ignored_as_the_sdk_does_and_refused_in_exact_geometry() -> None:
    outputs = {"simcc_x": one_hot(100, 384), "simcc_y": one_hot(31, 512)}
    poses = keypoints_of(outputs, [SAME], {"use_dark": True}, geometry="sdk")
    np.testing.assert_allclose(poses.keypoints_xy, [[[50, 15.5]]], atol=1e-5)
    with pytest.raises(UnsupportedBundleError, match="use_dark") as caught:
        keypoints_of(outputs, [SAME], {"use_dark": True})
    assert "geometry='sdk'" in caught.value.hint


def test_outputs_that_are_not_a_pose_estimators_are_named() -> None:
    with pytest.raises(UnsupportedBundleError, match="expected the outputs simcc_x and simcc_y, found simcc_x, other"):
        keypoints_of({"simcc_x": one_hot(1, 4), "other": one_hot(1, 4)}, [SAME])


def test_components_without_code_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedBundleError, match="expected one of SimCCLabelDecode.*, found MSRAHeatmapDecode"):
        KeypointDecoder(pipeline_of("MSRAHeatmapDecode", {}), geometry="sdk", where="bundle")
    with pytest.raises(UnsupportedBundleError, match="expected one of ResizeBBox.*, found YOLOHead"):
        BoxDecoder(pipeline_of("YOLOHead", {}), geometry="sdk", where="bundle")


def test_keypoints_are_upstreams(shared: Path) -> None:
    upstream = np.load(shared / "fixtures/checkpoints/rtmpose_t_random.npz")
    image = cv2.imread(str(shared / "fixtures/images/000000000785.jpg"))
    with PoseDetector(shared / "fixtures/bundles/mmdeploy-rtmpose-t", geometry="exact") as detector:
        poses = detector.estimate(image, upstream["bbox"])
    np.testing.assert_allclose(poses.keypoints_xy, upstream["noflip_keypoints"], atol=1e-3)
    np.testing.assert_allclose(poses.scores, upstream["noflip_scores"], atol=1e-4)


def test_detections_are_selected_together() -> None:
    found = Detections(
        boxes_xyxy=np.arange(12, dtype=np.float32).reshape(3, 4), scores=np.array([0.9, 0.5, 0.1], dtype=np.float32), labels=np.array([2, 0, 1], dtype=np.int32)
    )
    for index in (found.scores > 0.4, slice(0, 2), np.array([0, 1])):
        part = found[index]
        assert len(part) == 2
        np.testing.assert_array_equal(part.boxes_xyxy, [[0, 1, 2, 3], [4, 5, 6, 7]])
        assert part.labels.tolist() == [2, 0]
