"""Bundles for the tests of the tracker that cost nothing to run: what the detector finds is written into the frame, and where a pose lies is a matter of
how bright the parts of its crop are.

All arithmetic in the graphs is exact in float32 (sums of bytes, products with powers of two), so that any runtime in batches of any size gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from modelcrate_bundle import BundleWriter, Manifest, TensorSpec
from modelcrate_bundle.manifest import KeypointInfo, ParityRecord, Provenance
from modelcrate_bundle.schema import (
    Collect,
    DefaultFormatBundle,
    DeployInfo,
    DeployModel,
    DetailInfo,
    ImageToTensor,
    LoadImageFromFile,
    NetTask,
    Normalize,
    Params,
    Pipeline,
    PostprocessTask,
    ResizeBBoxParams,
    SimCCLabelDecodeParams,
    TopDownAffine,
    TopDownGetBboxCenterScale,
    Transform,
    TransformTask,
)

K = 17
"""Keypoints of the estimator."""
SLOTS = 10
"""Detections that a frame can hold."""
PIXELS_PER_SLOT = 4
STEPS_PER_PIXEL = 128
"""What a coordinate is rounded to."""
INPUT_WH = (48, 64)
CELL = 16

SIGMAS = [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089]
"""COCO's, as MMDeploy's demo has them."""
SIZE_WH = (160, 120)
"""Of the frames of `sequence`."""
PEOPLE = 4

Detection = tuple[float, float, float, float, float, int]
"""Left, top, right, bottom, score, label."""


def write_detections(frame: np.ndarray, detections: Iterable[Detection], *, slots: int = SLOTS) -> None:
    """Write what the detector is to find into the first row of a frame; scores are rounded to 1/256, and coordinates are from 0 to 511."""
    rows = np.zeros((slots, PIXELS_PER_SLOT * 3), dtype=np.uint8)
    for row, (left, top, right, bottom, score, label) in zip(rows, detections, strict=False):
        for i, value in enumerate((left, top, right, bottom)):
            row[2 * i], row[2 * i + 1] = divmod(round(min(max(value, 0), 511) * STEPS_PER_PIXEL), 256)
        row[8], row[9] = min(round(score * 256), 255), label
    frame[0, : slots * PIXELS_PER_SLOT] = rows.reshape(-1, 3)


def blank(size_wh: tuple[int, int], detections: Iterable[Detection] = (), *, level: int = 0, slots: int = SLOTS) -> np.ndarray:
    """A frame of one grey level with detections in it."""
    frame = np.full((size_wh[1], size_wh[0], 3), level, dtype=np.uint8)
    write_detections(frame, detections, slots=slots)
    return frame


def paint(frame: np.ndarray, box: Sequence[float], cells: np.ndarray, light: float = 1.0) -> None:
    """Paint a person: (4, 3, 3) levels of the parts of a box, brighter or darker by `light`."""
    height, width = frame.shape[:2]
    edges_x, edges_y = (np.linspace(box[i], box[i + 2], n + 1).round().astype(int).clip(0, end) for i, n, end in ((0, 3, width), (1, 4, height)))
    for i in range(4):
        for j in range(3):
            frame[edges_y[i] : edges_y[i + 1], edges_x[j] : edges_x[j + 1]] = np.clip(cells[i, j] * light, 0, 255)


def write_detector(place: Path, *, slots: int = SLOTS) -> Path:
    """A detector that reads its detections from the first row of the frame, whatever the frame's size."""
    bytes_per_slot = PIXELS_PER_SLOT * 3
    decode = np.zeros((bytes_per_slot, 5), dtype=np.float32)
    for i in range(4):
        decode[2 * i, i], decode[2 * i + 1, i] = 256 / STEPS_PER_PIXEL, 1 / STEPS_PER_PIXEL
    decode[8, 4] = 1 / 256
    label = np.zeros((bytes_per_slot, 1), dtype=np.float32)
    label[9] = 1
    constants = {
        "starts": np.array([0, 0], dtype=np.int64), "ends": np.array([1, slots * PIXELS_PER_SLOT], dtype=np.int64),
        "axes": np.array([2, 3], dtype=np.int64), "rows": np.array([0, slots, bytes_per_slot], dtype=np.int64),
        "decode": decode, "label": label, "flat": np.array([0, slots], dtype=np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["input", "starts", "ends", "axes"], ["row"]),
        helper.make_node("Transpose", ["row"], ["pixels"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["pixels", "rows"], ["bytes"]),
        helper.make_node("MatMul", ["bytes", "decode"], ["dets"]),
        helper.make_node("MatMul", ["bytes", "label"], ["labels_float"]),
        helper.make_node("Reshape", ["labels_float", "flat"], ["labels_flat"]),
        helper.make_node("Cast", ["labels_flat"], ["labels"], to=TensorProto.INT64),
    ]
    inputs = {"input": (TensorProto.FLOAT, ("batch", 3, "height", "width"))}
    outputs = {"dets": (TensorProto.FLOAT, ("batch", slots, 5)), "labels": (TensorProto.INT64, ("batch", slots))}
    # No resizing at all: what would round the first row.
    transforms = [LoadImageFromFile(), plain(), DefaultFormatBundle(), collect()]
    return write(place, "Detector", network(nodes, inputs, outputs, constants), transforms, ("mmdet", "ResizeBBox", ResizeBBoxParams(score_thr=0.0)))


def write_estimator(place: Path, *, keypoints: int = K, seed: int = 0, sigmas: Sequence[float] = (), spread: float | None = None) -> Path:
    """A pose estimator: each coordinate of each keypoint has two places, and is where the brighter of two parts of the crop says; that is its
    score too, from 0 to 1.5.

    The places lie in the middle `spread` of the crop, the first keypoints in its corners: with 0.64 of it the box around a pose is the one that it was cut out
    with. Without it they lie anywhere, and boxes change from frame to frame.
    """
    rng = np.random.default_rng(seed)
    width, height = INPUT_WH
    parts = 3 * (height // CELL) * (width // CELL)
    places = {"x": rng.integers(4, 2 * width - 4, (keypoints, 2)), "y": rng.integers(4, 2 * height - 4, (keypoints, 2))}
    if spread is not None:
        for axis, length, corners in (("x", 2 * width, (0, 1, 0, 1)), ("y", 2 * height, (0, 0, 1, 1))):
            low, high = round(length * (1 - spread) / 2), round(length * (1 + spread) / 2)
            places[axis] = np.repeat(rng.integers(low, high + 1, keypoints)[:, None], 2, axis=1)
            places[axis][: len(corners)] = np.where(corners, high, low)[:, None]
    constants = {"shape": np.array([0, keypoints, 1, 2], dtype=np.int64)}
    nodes = [
        helper.make_node("AveragePool", ["input"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Flatten", ["cells"], ["levels"]),
    ]
    for axis, length in (("x", 2 * width), ("y", 2 * height)):
        pick = np.zeros((parts, 2 * keypoints), dtype=np.float32)
        pick[rng.integers(0, parts, 2 * keypoints), np.arange(2 * keypoints)] = 3 / 512
        peaks = np.zeros((keypoints, 2, length), dtype=np.float32)
        for k in range(keypoints):
            peaks[k, [1, 0], places[axis][k, ::-1]] = 1
            if places[axis][k, 0] == places[axis][k, 1]:
                peaks[k, 1] = 0  # one place, one height
        constants |= {f"pick_{axis}": pick, f"peaks_{axis}": peaks, f"shape_{axis}": np.array([0, keypoints, length], dtype=np.int64)}
        nodes += [
            helper.make_node("MatMul", ["levels", f"pick_{axis}"], [f"heights_{axis}"]),
            helper.make_node("Reshape", [f"heights_{axis}", "shape"], [f"pairs_{axis}"]),
            helper.make_node("MatMul", [f"pairs_{axis}", f"peaks_{axis}"], [f"lines_{axis}"]),
            helper.make_node("Reshape", [f"lines_{axis}", f"shape_{axis}"], [f"simcc_{axis}"]),
        ]
    inputs = {"input": (TensorProto.FLOAT, ("batch", 3, height, width))}
    outputs = {f"simcc_{axis}": (TensorProto.FLOAT, ("batch", keypoints, length)) for axis, length in (("x", 2 * width), ("y", 2 * height))}
    transforms = [
        LoadImageFromFile(), TopDownGetBboxCenterScale(image_size=INPUT_WH), TopDownAffine(image_size=INPUT_WH), plain(), ImageToTensor(), collect(),
    ]  # fmt: skip
    decoder = ("mmpose", "SimCCLabelDecode", SimCCLabelDecodeParams(input_size=INPUT_WH, simcc_split_ratio=2.0))
    info = KeypointInfo(names=[f"point {k}" for k in range(keypoints)], sigmas=list(sigmas))
    return write(place, "PoseDetector", network(nodes, inputs, outputs, constants), transforms, decoder, keypoints=info)


def plain() -> Normalize:
    return Normalize(mean=[0.0] * 3, std=[1.0] * 3, to_rgb=False)


def collect() -> Collect:
    return Collect(meta_keys=["img_shape", "ori_shape", "pad_shape", "scale_factor", "center", "scale"])


def network(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, tuple[int | str, ...]]],
    outputs: dict[str, tuple[int, tuple[int | str, ...]]],
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    """A graph that the SDK's old ONNX Runtime reads too."""
    values = [[helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()] for values in (inputs, outputs)]
    graph = helper.make_graph(nodes, "tiny", *values, [numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    onnx.checker.check_model(model)
    return model


def write(
    place: Path, task: str, model: onnx.ModelProto, transforms: list[Transform], decoder: tuple[str, str, Params], *, keypoints: KeypointInfo | None = None
) -> Path:
    module, component, params = decoder
    pipeline = Pipeline(
        input=["img"], output=["post_output"],
        preprocess=TransformTask(input=["img"], output=["prep_output"], transforms=transforms),
        net=NetTask(name="tiny", is_batched=True, input=["prep_output"], output=["infer_output"], input_map={"img": "input"}),
        postprocess=PostprocessTask(module=module, component=component, params=params, output=["post_output"], input=["prep_output", "infer_output"]),
    )  # fmt: skip
    deploy = DeployInfo(version="1.3.1", task=task, models=[DeployModel(name="tiny", net="end2end.onnx", backend="onnxruntime", dynamic_shape=True)])
    manifest = Manifest(
        id="tiny_onnxruntime-fp32", model="tiny", task=task, target="onnxruntime-fp32", backend="onnxruntime", precision="fp32", geometry="exact",
        inputs=[spec(value) for value in model.graph.input], outputs=[spec(value) for value in model.graph.output],
        class_names=["person", "other"] if task == "Detector" else [], keypoints=keypoints, files=[], parity=ParityRecord(verified=False),
        provenance=Provenance(checkpoint="none", checkpoint_sha256="00" * 32),
    )  # fmt: skip
    with BundleWriter(place) as writer:
        writer.add("end2end.onnx", role="net", content=model.SerializeToString())
        writer.commit(deploy=deploy, pipeline=pipeline, detail=DetailInfo(version="1.3.1"), manifest=manifest)
    return place


def spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}[value.type.tensor_type.elem_type]
    return TensorSpec(name=value.name, dtype=kind, shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim))


def sequence(seed: int, *, frames: int) -> list[np.ndarray]:
    """Four people who move, cross, stand still, get darker and brighter; with detections that are not quite right, missing, double or of nobody."""
    rng = np.random.default_rng((seed, 41))
    width, height = SIZE_WH
    background = rng.integers(0, 70, (height, width, 3), dtype=np.uint8)
    cells = rng.uniform(130, 255, (PEOPLE, 4, 3, 3))
    middles, sides = rng.uniform((30, 30), (130, 90), (PEOPLE, 2)), rng.uniform((25, 40), (60, 95), (PEOPLE, 2))
    speeds = rng.normal(0, 2.0, (PEOPLE, 2)) * (rng.random((PEOPLE, 1)) > 0.2)
    noise, dropout = rng.choice([0.0, 0.5, 2.0]), rng.choice([0.05, 0.3])
    hidden = np.zeros(PEOPLE, dtype=int)
    empty = range(frames // 2, frames // 2 + int(rng.integers(0, 16)))  # nobody is there, for longer than a track is kept or not
    result = []
    for t in range(frames):
        middles += speeds
        for axis, end in enumerate(SIZE_WH):
            outside = (middles[:, axis] < -10) | (middles[:, axis] > end + 10)
            speeds[outside, axis] = -np.sign(middles[outside, axis] - end / 2) * np.abs(speeds[outside, axis])
        hidden = np.where(hidden > 0, hidden - 1, np.where(rng.random(PEOPLE) < 0.02, rng.integers(1, 20, PEOPLE), 0))
        frame = background.copy()
        detections: list[Detection] = []
        for i in range(PEOPLE):
            box = np.concatenate([middles[i] - sides[i] / 2, middles[i] + sides[i] / 2])
            if hidden[i] or t in empty:
                continue
            light = 0.9 + 0.3 * np.sin(t / 9 + i) if rng.random() > 0.03 else 0.3
            paint(frame, box, cells[i], light)
            if rng.random() > dropout:
                found = box + rng.normal(0, noise, 4) if noise else box
                detections.append((*found, rng.uniform(0.3, 1.0), int(rng.random() < 0.05)))
            if rng.random() < 0.1:
                detections.append((*(box + rng.normal(0, 4, 4)), rng.uniform(0.3, 1.0), 0))
        if rng.random() < 0.1 and t not in empty:
            corner = rng.uniform((0, 0), (120, 90))
            detections.append((*corner, *(corner + rng.uniform(2, 60, 2)), rng.uniform(0.3, 1.0), 0))
        write_detections(frame, detections)
        result.append(frame)
    return result


def params_of(seed: int) -> tuple[dict[str, Any], str]:
    """Parameters of one sequence, and how the detector runs: by "interval" or at "random"; the first ones are the defaults."""
    rng = np.random.default_rng((seed, 42))
    if seed < 4:
        return {}, "interval"
    params: dict[str, Any] = {
        "det_interval": int(rng.integers(1, 6)), "det_thr": float(rng.uniform(0.3, 0.7)), "det_min_bbox_size": float(rng.choice([-1, 0, 20, 30])),
        "det_nms_thr": float(rng.uniform(0.3, 0.9)), "pose_max_num_bboxes": int(rng.choice([-1, -1, 3, 1])), "track_kpt_thr": float(rng.uniform(0.2, 0.7)),
        "pose_min_keypoints": int(rng.choice([-1, -1, 1, 5, 0])), "pose_bbox_scale": float(rng.uniform(1.0, 1.5)),
        "pose_min_bbox_size": float(rng.choice([-1, 0, 20])), "pose_nms_thr": float(rng.uniform(0.2, 0.8)), "track_iou_thr": float(rng.uniform(0.1, 0.6)),
        "track_max_missing": int(rng.choice([-1, 0, 2, 5, 10])), "std_weight_position": float(rng.uniform(0.02, 0.2)),
        "std_weight_velocity": float(rng.uniform(0.002, 0.02)), "smooth_params": [float(v) for v in rng.uniform((0, 0.2, 0.2), (0.6, 2, 2))],
        "track_history_size": int(rng.integers(1, 4)),
    }  # fmt: skip
    if seed % 3 == 0:
        params["keypoint_sigmas"] = SIGMAS
    if seed % 5 == 0:
        params["det_interval"] = 0
    special = {4: -1, 5: 0}
    if seed in special:
        params["track_max_missing"] = special[seed]
    return params, "random" if seed % 2 or not params["det_interval"] else "interval"
