"""OpenVINO and ncnn: what their builders write, INT8 of one calibration, what they refuse to write, and that their bundles find what ONNX Runtime's find."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, ExportError, MissingBackendError, ModelcrateError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import can_build, check_can_build, ncnn_builder
from modelcrate_converter.builders.ncnn_builder import OLDEST_PNNX, lint, named
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.cli import app
from modelcrate_converter.config import DeployConfig, NmsOptions, OnnxOptions, load_config, target_names
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS, HELD_OUT_SEED
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.parity import network_inputs, procedural_images
from modelcrate_converter.people import Scene, draw_scene
from modelcrate_converter.progress import Event, StageFinished, StageStarted
from modelcrate_runtime import Detector, PoseDetector, SessionOptions, open_session
from modelcrate_runtime.results import Detections

pytest.importorskip("openvino", reason="needs openvino: pip install 'modelcrate[openvino]'")
pytest.importorskip("ncnn", reason="needs ncnn: pip install 'modelcrate[ncnn]'")
pytest.importorskip("pnnx", reason="needs pnnx: pip install 'modelcrate[pnnx]'")

TARGETS = {"openvino": "fp32", "openvino-fp16": "fp16", "openvino-bf16": "bf16", "ncnn": "fp32", "ncnn-fp16": "fp16"}
FILES = {"openvino": ["end2end.bin", "end2end.xml"], "ncnn": ["end2end.bin", "end2end.param"]}
JSON_FILES = ["deploy.json", "detail.json", "manifest.json", "pipeline.json"]
INPUT_HW = (64, 96)
DRAWN_BY_NONE = "openvino-bf16"


@pytest.fixture(scope="module")
def pose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pose") / "pose.pth"
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=INPUT_HW, hidden=16, s=8)
    cfg = f"codec = dict(type='SimCCLabel', input_size={INPUT_HW[::-1]}, sigma=(4.9, 5.66), simcc_split_ratio=2.0, normalize=False, use_dark=False)"
    weights = random_weights(shapes, seed=1)
    for axis in "xy":
        weights[f"head.cls_{axis}.weight"] *= 100  # pnnx writes zeros for float16's subnormal numbers
    torch.save({"state_dict": weights, "meta": {"cfg": cfg}}, path)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "detector.pth"
    shapes = rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=True)
    cfg = "test_pipeline = [dict(type='Resize', scale=(96, 96))]"
    torch.save({"state_dict": random_weights(shapes, seed=2), "meta": {"cfg": cfg}}, path)
    return path


def with_nms(target: str, where: str) -> DeployConfig:
    return msgspec.structs.replace(load_config(target), nms=NmsOptions(where=where))


def built(conversions: list[Conversion]) -> dict[str, Bundle]:
    """Target -> bundle; all of them are there and whole."""
    for conversion in conversions:
        assert conversion.error is None, conversion.error
        Bundle.open(conversion.place).verify()
    return {conversion.target: Bundle.open(conversion.place) for conversion in conversions}


def contents(bundle: Bundle, name: str) -> bytes:
    return bundle.path_of(name).read_bytes()


# --------------------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundles(pose: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The pose estimator for every target of the two backends, drawn on a picture where any CPU can; random weights need not pass the gates of half precision."""
    folder = tmp_path_factory.mktemp("crates")
    cv2.imwrite(str(folder / "image.png"), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    drawn = ConvertOptions(out=folder, verify=False, images=(folder / "image.png",))
    made = convert(pose, [load_config(target) for target in TARGETS if target != DRAWN_BY_NONE], drawn)
    return built(made + convert(pose, [load_config(DRAWN_BY_NONE)], ConvertOptions(out=folder, verify=False)))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def bundle(target: str, bundles: dict[str, Bundle]) -> Bundle:
    return bundles[target]


def test_a_bundle_holds_its_two_files_under_mmdeploys_names(target: str, bundle: Bundle) -> None:
    backend = target.partition("-")[0]
    pictures = [] if target == DRAWN_BY_NONE else [f"output_{backend}.jpg", "output_pytorch.jpg"]
    assert sorted(path.name for path in bundle.root.iterdir()) == sorted(["README.md", *FILES[backend], *JSON_FILES, *pictures])
    assert bundle.manifest is not None
    roles = {entry.path: entry.role for entry in bundle.manifest.files}
    assert [roles[name] for name in FILES[backend]] == ["weights", "net"]


def test_deploy_json_has_mmdeploys_fields(target: str, bundle: Bundle) -> None:
    """All seven, or its SDK does not load the model; `batch_size` above 1 is what makes it batch."""
    backend, is_ncnn = target.partition("-")[0], target.startswith("ncnn")
    (model,) = json.loads(contents(bundle, "deploy.json"))["models"]
    assert model == {
        "name": "topdownposeestimator",
        "net": FILES[backend][1],
        "weights": "end2end.bin",
        "backend": backend,
        "precision": TARGETS[target].upper(),
        "batch_size": 1 if is_ncnn else 8,
        "dynamic_shape": not is_ncnn,
    }


def test_pipeline_and_detail_say_whether_inputs_are_batched(target: str, bundle: Bundle) -> None:
    is_ncnn = target.startswith("ncnn")
    (net,) = [task for task in json.loads(contents(bundle, "pipeline.json"))["pipeline"]["tasks"] if task["module"] == "Net"]
    assert (net["is_batched"], net["input_map"]) == (not is_ncnn, {"img": "input"})
    detail = json.loads(contents(bundle, "detail.json"))
    assert detail["backend_config"]["type"] == target.partition("-")[0]
    axes = {name: {"0": "batch"} for name in ("input", "simcc_x", "simcc_y")}
    assert detail["onnx_config"]["dynamic_axes"] == ({} if is_ncnn else axes)


def test_the_manifest_states_precision_shapes_and_limits(target: str, bundle: Bundle) -> None:
    backend, is_ncnn = target.partition("-")[0], target.startswith("ncnn")
    manifest = bundle.manifest
    assert manifest is not None
    assert (manifest.target, manifest.backend, manifest.precision) == (target, backend, TARGETS[target])
    limits = manifest.shape_ranges["input"]
    assert [limits.min, limits.opt, limits.max] == [(number, 3, *INPUT_HW) for number in ((1, 1, 1) if is_ncnn else (1, 8, 32))]
    first = 1 if is_ncnn else "batch"
    assert manifest.inputs == [TensorSpec(name="input", dtype="float32", shape=(first, 3, *INPUT_HW))]
    height, width = INPUT_HW
    assert manifest.outputs == [TensorSpec(name=f"simcc_{axis}", dtype="float32", shape=(first, 3, 2 * side)) for axis, side in (("x", width), ("y", height))]
    assert {backend, "torch", "onnx"} <= set(manifest.provenance.tools)
    assert ("pnnx" in manifest.provenance.tools) or not is_ncnn


def test_the_session_computes_in_what_the_manifest_states(target: str, bundle: Bundle, bundles: dict[str, Bundle]) -> None:
    """Float16 weights are seen in the numbers, and so is bfloat16."""
    sample = np.random.default_rng(0).standard_normal((1, 3, *INPUT_HW)).astype(np.float32)
    exact = open_session(bundles["openvino"], SessionOptions()).run({"input": sample})
    try:
        session = open_session(bundle, SessionOptions())
    except MissingBackendError:
        assert TARGETS[target] == "bf16"
        pytest.skip("this CPU has no bfloat16")
    found = session.run({"input": sample})
    low, high = {"fp32": (-1, 1e-5), "fp16": (1e-5, 0.02), "bf16": (1e-3, 0.2)}[TARGETS[target]]
    for name, value in exact.items():
        assert low < np.abs(found[name] - value).max() / np.abs(value).max() < high
    if target.startswith("openvino"):
        assert session.precision == ("bf16" if TARGETS[target] == "bf16" else "f32")


def test_the_readme_renders(target: str, bundle: Bundle) -> None:
    backend = target.partition("-")[0]
    text = contents(bundle, "README.md").decode()
    assert text.startswith(f"# {bundle.manifest.id}\n")
    assert f"`{bundle.manifest.model}` for {backend}, {TARGETS[target]}." in text
    assert f"pip install 'modelcrate[{backend}]'" in text
    assert f"| input `input` | float32 | {'1' if backend == 'ncnn' else 'batch'} x 3 x 64 x 96 |" in text
    assert "**Not verified.**" in text
    assert (f"output_{backend}.jpg" in text) == (target != DRAWN_BY_NONE)
    assert "None" not in text


def test_fp16_halves_the_weights_and_bf16_does_not(bundles: dict[str, Bundle]) -> None:
    sizes = {target: len(contents(bundle, "end2end.bin")) for target, bundle in bundles.items()}
    for backend in FILES:
        assert 0.5 * sizes[backend] <= sizes[f"{backend}-fp16"] < 0.55 * sizes[backend]
    assert contents(bundles["openvino-bf16"], "end2end.bin") == contents(bundles["openvino"], "end2end.bin")


def test_the_ir_has_its_weights_in_the_precision_that_it_says(bundles: dict[str, Bundle]) -> None:
    """And float32 inputs and outputs in any case."""
    for target, stored in (("openvino", "f32"), ("openvino-bf16", "f32"), ("openvino-fp16", "f16")):
        layers = ET.fromstring(contents(bundles[target], "end2end.xml")).findall("layers/layer")
        constants = [layer.find("data") for layer in layers if layer.get("type") == "Const"]
        sizes = {kind: sum(int(data.get("size", 0)) for data in constants if data.get("element_type") == kind) for kind in ("f16", "f32")}
        assert sizes[stored] > 0.95 * sum(sizes.values()) > 10_000
        assert (sizes["f16"] > 0) == (stored == "f16")
        (given,) = [layer.find("data") for layer in layers if layer.get("type") == "Parameter"]
        assert (given.get("element_type"), given.get("shape")) == ("f32", "?,3,64,96")


def test_ncnns_input_says_its_sizes_and_blobs_have_the_graphs_names(bundles: dict[str, Bundle]) -> None:
    lines = [line.split() for line in contents(bundles["ncnn"], "end2end.param").decode().splitlines()]
    assert lines[0] == ["7767517"]
    assert [line for line in lines if line[0] == "Input"] == [["Input", "input", "0", "1", "input", "0=96", "1=64", "2=3"]]
    blobs = [blob for line in lines[2:] for blob in line[4 : 4 + int(line[2]) + int(line[3])]]
    assert {"input", "simcc_x", "simcc_y"} <= set(blobs)
    assert not [blob for blob in blobs if re.fullmatch(r"(in|out)\d+", blob)]


# ------------------------------------------------------------------------------------------------------------------- detectors


@pytest.fixture(scope="module")
def detectors(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Backend and place of suppression -> bundle, verified."""
    folder = tmp_path_factory.mktemp("detectors")
    cases = [("onnxruntime", "graph"), ("openvino", "graph"), ("openvino", "runtime"), ("ncnn", "runtime")]
    configs = [msgspec.structs.replace(with_nms(backend, where), target=f"{backend}-{where}") for backend, where in cases]
    return built(convert(detector, configs, ConvertOptions(out=folder)))


@pytest.mark.parametrize(("name", "where"), [("openvino-graph", "graph"), ("openvino-runtime", "runtime"), ("ncnn-runtime", "runtime")])
def test_suppression_is_where_it_is_asked_for(detectors: dict[str, Bundle], name: str, where: str) -> None:
    bundle = detectors[name]
    raw = [f"{kind}_{level}" for kind in ("cls", "dist") for level in range(3)]
    assert sorted(spec.name for spec in bundle.manifest.outputs) == (["dets", "labels"] if where == "graph" else raw)
    assert bundle.pipeline.postprocess.component == ("ResizeBBox" if where == "graph" else "RTMDetSepBNHead")
    assert (b"NonMaxSuppression" in contents(bundle, bundle.model.net)) == (where == "graph")
    assert bundle.manifest.parity.verified
    assert not (bundle.root / "raw.xml").exists()


def test_boxes_do_not_depend_on_where_they_are_suppressed(detectors: dict[str, Bundle], scene: tuple[np.ndarray, np.ndarray]) -> None:
    found = {}
    for name, bundle in detectors.items():
        with Detector(bundle.root, threads=1) as detector:
            found[name] = detector.detect(scene[0])
    assert len(found["onnxruntime-graph"]) > 5
    for other in found.values():
        assert_same_boxes(other, found["onnxruntime-graph"])


def test_ncnn_has_no_suppression_in_the_graph(detector: Path, tmp_path: Path) -> None:
    (conversion,) = convert(detector, [with_nms("ncnn", "graph")], ConvertOptions(out=tmp_path))
    assert isinstance(conversion.error, ConfigError)
    assert str(conversion.error) == "ncnn: nms.where: expected runtime for ncnn, which has no NonMaxSuppression, found graph"
    assert conversion.error.hint == "--nms runtime"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_the_same(detector: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(detector), "-t", "ncnn", "--nms", "graph", "-o", str(tmp_path)])
    assert result.exit_code == 4
    assert [line.strip() for line in result.stderr.splitlines() if line.startswith(("error:", " hint:"))] == [
        "error: ncnn: nms.where: expected runtime for ncnn, which has no NonMaxSuppression, found graph", "hint: --nms runtime"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------------------ INT8


INT8 = ["ncnn-int8", "onnxruntime-int8", "openvino-int8"]


def int8(target: str, **changes: object) -> DeployConfig:
    """A target that is calibrated on two scenes."""
    config = load_config(target)
    return msgspec.structs.replace(config, int8=msgspec.structs.replace(config.int8, scenes=2, **changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """One model for all INT8 targets, for ncnn in float32, and as ONNX Runtime's QDQ in ncnn's form of INT8; and what was told of it."""

    bundles: dict[str, Bundle]
    events: list[Event]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(HELD_OUT_SEED, index) for index in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_pose_bundle: Path, demo_detector_bundle: Path) -> dict[tuple[str, str], Path]:
    """(model, backend) -> a bundle of a trained model."""
    folder = tmp_path_factory.mktemp("trained")
    places = {("demo-pose", "onnxruntime"): demo_pose_bundle, ("demo-det", "onnxruntime"): demo_detector_bundle}
    for model in ("demo-pose", "demo-det"):
        made = built(convert(DEMO_MODELS[model], [load_config(backend) for backend in FILES], ConvertOptions(out=folder, name=model)))
        places |= {(model, backend): bundle.root for backend, bundle in made.items()}
    return places


@pytest.fixture(scope="module", params=["demo-pose", "demo-det"])
def quantized(request: pytest.FixtureRequest, trained: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    alike = msgspec.structs.replace(int8("onnxruntime-int8", activations="int8", quantize_results=False), target="alike", nms=NmsOptions(where="runtime"))
    targets = INT8 if request.param == "demo-pose" else INT8[:1]
    events: list[Event] = []
    options = ConvertOptions(out=tmp_path_factory.mktemp("int8"), name=request.param, verify=False)
    made = built(convert(DEMO_MODELS[request.param], [*map(int8, targets), alike], options, events.append))
    return Quantized(bundles=made | {"ncnn": Bundle.open(trained[request.param, "ncnn"])}, events=events)


def test_int8_of_ncnn_says_so_and_is_smaller(quantized: Quantized) -> None:
    bundle = quantized.bundles["ncnn-int8"]
    assert sorted(path.name for path in bundle.root.iterdir()) == sorted(["README.md", "calibration.json", *FILES["ncnn"], *JSON_FILES])
    assert bundle.manifest is not None
    assert (bundle.manifest.backend, bundle.manifest.precision, bundle.model.precision) == ("ncnn", "int8", "INT8")
    assert {entry.path: entry.role for entry in bundle.manifest.files}["calibration.json"] == "calibration"
    (model,) = json.loads(contents(bundle, "deploy.json"))["models"]
    assert (model["backend"], model["precision"], model["batch_size"], model["dynamic_shape"]) == ("ncnn", "INT8", 1, False)
    sizes = {target: len(contents(quantized.bundles[target], "end2end.bin")) for target in ("ncnn", "ncnn-int8")}
    # All of the detector is convolutions, of which the last six stay; half of the pose estimator is its head.
    assert sizes["ncnn-int8"] < (0.35 if bundle.manifest.task == "Detector" else 0.8) * sizes["ncnn"]
    lines = [line.split() for line in contents(bundle, "end2end.param").decode().splitlines()[2:]]
    convolutions = [line for line in lines if line[0].startswith("Convolution")]
    kept = [line for line in convolutions if "8=1" not in line[4:]]
    assert len(convolutions) > 30
    assert len(kept) == (6 if bundle.manifest.task == "Detector" else 1)


def test_all_int8_targets_have_one_calibration(quantized: Quantized) -> None:
    assert [event.name for event in quantized.events if isinstance(event, StageStarted)].count("calibrate") == 1
    found = [contents(bundle, "calibration.json") for target, bundle in quantized.bundles.items() if target != "ncnn"]
    assert len(found) >= 2
    assert len(set(found)) == 1
    assert not (quantized.bundles["ncnn"].root / "calibration.json").exists()


def test_int8_of_ncnn_computes_nearly_what_onnx_runtime_makes_of_the_same_ranges(quantized: Quantized) -> None:
    """Levels fall to one side or the other where sums of float32 differ in their last bit: what is left of that is less than INT8 itself costs."""
    manifest = quantized.bundles["ncnn"].manifest
    inputs = list(network_inputs(read_architecture(read_checkpoint(DEMO_MODELS[manifest.model])), procedural_images()[:2]))
    found: dict[str, list[np.ndarray]] = {}
    for name in ("ncnn", "ncnn-int8", "alike"):
        session = open_session(quantized.bundles[name], SessionOptions(threads=1))
        runs = [session.run({manifest.inputs[0].name: x}) for x in inputs]
        found[name] = [np.concatenate([run[spec.name] for run in runs]) for spec in manifest.outputs]
        session.close()

    def distance(ours: str, theirs: str) -> float:
        """Root mean square, relative to theirs; of the output where it is largest."""
        return max(float(np.sqrt(np.square(a - b).mean() / np.square(b).mean())) for a, b in zip(found[ours], found[theirs], strict=True))

    assert 1e-3 < distance("ncnn-int8", "ncnn") < 0.2
    assert distance("ncnn-int8", "alike") < distance("alike", "ncnn")
    assert distance("ncnn-int8", "ncnn") < 1.3 * distance("alike", "ncnn")


def test_int8_of_ncnn_finds_what_float32_finds(quantized: Quantized, scenes: list[Scene]) -> None:
    ours, theirs = (quantized.bundles[name] for name in ("ncnn-int8", "ncnn"))
    shifts = []
    if ours.manifest.task == "PoseDetector":
        with PoseDetector(ours, threads=1) as estimator, PoseDetector(theirs, threads=1) as reference:
            for scene in scenes:
                boxes = np.array([person.box_xyxy for person in scene.people], dtype=np.float32).reshape(-1, 4)
                found, wanted = (one.estimate(scene.image, boxes) for one in (estimator, reference))
                shifts.append(np.linalg.norm(found.keypoints_xy - wanted.keypoints_xy, axis=2)[wanted.scores > 0.3])
        assert np.concatenate(shifts).mean() < 3
        assert np.median(np.concatenate(shifts)) < 1.5
        return
    with Detector(ours, threads=1) as detector, Detector(theirs, threads=1) as reference:
        for scene in scenes:
            found, wanted = (one.detect(scene.image) for one in (detector, reference))
            shifts += [np.abs(found.boxes_xyxy - box).max(axis=1).min() for box in wanted.boxes_xyxy[wanted.scores > 0.5]]
    assert len(shifts) > 12
    assert np.mean(shifts) < 4


def test_another_method_is_another_calibration(pose: Path, tmp_path: Path) -> None:
    """And one for each export; the type of the activations is no matter of the ranges."""
    events: list[Event] = []
    configs = [
        int8("onnxruntime-int8"), msgspec.structs.replace(int8("openvino-int8", method="minmax"), target="ends"),
        msgspec.structs.replace(int8("onnxruntime-int8", activations="int8"), target="signed"),
        msgspec.structs.replace(int8("onnxruntime-int8"), target="plain", onnx=OnnxOptions(simplify=False)),
    ]  # fmt: skip
    bundles = built(convert(pose, configs, ConvertOptions(out=tmp_path, verify=False), events.append))
    assert [event.name for event in events if isinstance(event, StageStarted)].count("calibrate") == 3
    first, ends, signed, plain = (json.loads(contents(bundle, "calibration.json")) for bundle in bundles.values())
    assert first == signed
    assert (first["method"], ends["method"], plain["method"]) == ("percentile", "minmax", "percentile")
    assert first["ranges"] != ends["ranges"]


def test_unsigned_int8_is_refused_for_ncnn(pose: Path, tmp_path: Path) -> None:
    (conversion,) = convert(pose, [int8("ncnn-int8", activations="uint8")], ConvertOptions(out=tmp_path))
    assert isinstance(conversion.error, ConfigError)
    assert str(conversion.error) == "ncnn-int8: int8.activations: expected int8 for ncnn, whose INT8 is signed, found uint8"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("backend", "needs"), [("onnxruntime", True), ("openvino", False), ("ncnn", False)])
def test_onnx_runtime_is_needed_where_a_typed_graph_is(backend: str, needs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the backend, it is what types it."""
    precisions = [config.precision for config in map(load_config, target_names()) if config.backend == backend]
    assert "int8" in precisions
    assert all(can_build(backend, precision) for precision in precisions)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for precision in precisions:
        assert can_build(backend, precision) == (not needs and precision != "int8"), precision
    assert can_build(backend) == (not needs)
    with pytest.raises(MissingBackendError, match=f"building for {backend} needs onnxruntime, not installed") as caught:
        check_can_build(backend, "int8")
    extras = {"onnxruntime": "onnxruntime", "openvino": "openvino,onnxruntime", "ncnn": "ncnn,pnnx,onnxruntime"}
    assert caught.value.hint == f"pip install 'modelcrate[convert,{extras[backend]}]'"
    with pytest.raises(ConfigError, match="backend: expected one of .*, found 'coreml'"):
        can_build("coreml", "int8")


# ------------------------------------------------------------------------------------------------------------------- agreement


def assert_same_boxes(found: Detections, wanted: Detections) -> None:
    """Every box but those at the threshold has its like on the other side: within 0.05 px and 0.001 of score."""
    for ours, theirs in ((found, wanted), (wanted, found)):
        for box, label, score in zip(ours.boxes_xyxy, ours.labels, ours.scores, strict=True):
            if score < 0.052:
                continue
            alike = (theirs.labels == label) & (np.abs(theirs.boxes_xyxy - box).max(axis=1, initial=0) <= 0.05) & (np.abs(theirs.scores - score) <= 1e-3)
            assert alike.any(), (box, label, score)


THREADS = {"onnxruntime": 2, "openvino": 2, "ncnn": 1}
"""Two, to have streams; ncnn has none, and its threads spin."""


@pytest.mark.parametrize("backend", list(FILES))
def test_trained_detectors_find_the_same(trained: dict[tuple[str, str], Path], scenes: list[Scene], backend: str) -> None:
    """One image alone, and several in as few calls as the backend takes."""
    images = [scene.image for scene in scenes]
    with Detector(trained["demo-det", "onnxruntime"], threads=2) as reference, Detector(trained["demo-det", backend], threads=THREADS[backend]) as detector:
        assert detector.max_batch == (1 if backend == "ncnn" else 32)
        wanted = reference.detect_batch(images)
        assert sum(len(detections) for detections in wanted) > 30
        for found, theirs in zip([*detector.detect_batch(images), detector.detect(images[0])], [*wanted, wanted[0]], strict=True):
            assert_same_boxes(found, theirs)


@pytest.mark.parametrize("backend", list(FILES))
def test_trained_pose_estimators_find_the_same(trained: dict[tuple[str, str], Path], scenes: list[Scene], backend: str) -> None:
    """Of one box, of more than a call takes, and of several images at once. Of a thousand keypoints one may lie between two bins of one height."""
    rng = np.random.default_rng(0)
    boxes = [np.array([person.box_xyxy for person in scene.people], dtype=np.float32).reshape(-1, 4) for scene in scenes]
    crowd = np.concatenate([boxes[0] + rng.normal(0, 3, boxes[0].shape) for _ in range(40)])[:41].astype(np.float32)
    shifts = []
    with (
        PoseDetector(trained["demo-pose", "onnxruntime"], threads=2) as reference,
        PoseDetector(trained["demo-pose", backend], threads=THREADS[backend]) as estimator,
    ):
        assert (estimator.max_batch, estimator.session.streams) == ((1, 1) if backend == "ncnn" else (32, 2))
        assert len(crowd) > 32
        images = [scene.image for scene in scenes]
        pairs = [(estimator.estimate(images[0], given), reference.estimate(images[0], given)) for given in (crowd, crowd[:1])]
        pairs += list(zip(estimator.estimate_batch(images, boxes), reference.estimate_batch(images, boxes), strict=True))
        for found, wanted in pairs:
            np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=1e-3)
            shifts.append(np.linalg.norm(found.keypoints_xy - wanted.keypoints_xy, axis=2).ravel())
    every = np.concatenate(shifts)
    assert len(every) > 800
    assert (every > 0.05).mean() < 0.004
    assert every.mean() < 0.005


def test_a_stream_more_or_less_changes_nothing(trained: dict[tuple[str, str], Path], scenes: list[Scene]) -> None:
    image = scenes[0].image
    boxes = np.tile(np.array(scenes[0].people[0].box_xyxy, dtype=np.float32), (9, 1)) + np.arange(9, dtype=np.float32)[:, None]
    poses = []
    for streams in (1, 2):
        with PoseDetector(trained["demo-pose", "openvino"], threads=2, streams=streams) as estimator:
            assert estimator.session.streams == streams
            poses.append(estimator.estimate(image, boxes))
    np.testing.assert_allclose(poses[0].scores, poses[1].scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(poses[0].keypoints_xy, poses[1].keypoints_xy, rtol=0, atol=0.05)


def test_readmes_of_verified_bundles_have_their_figures(trained: dict[tuple[str, str], Path]) -> None:
    for model, what in (("demo-pose", "keypoint shift"), ("demo-det", "box shift")):
        for backend in FILES:
            text = (trained[model, backend] / "README.md").read_text()
            assert "Compared with eager PyTorch on" in text
            assert re.search(rf"\| {what} \(\d.*\) \| worst .* px, mean .* px \| 0.05 \| ok \|", text)
            assert "FAIL" not in text


# ------------------------------------------------------------------------------------------------------------------ many at once


def test_targets_share_one_export_and_none_stops_the_others(pose: Path, tmp_path: Path, pnnx: Pnnx) -> None:
    pnnx("echo no luck; exit 1")
    events: list[Event] = []
    names = ["openvino", "ncnn", "onnxruntime"]
    made = convert(pose, [load_config(name) for name in names], ConvertOptions(out=tmp_path / "crates"), events.append)
    stages = [event.name for event in events if isinstance(event, StageFinished)]
    assert (stages.count("export ONNX"), stages.count("simplify"), stages.count("write bundle")) == (1, 1, 2)
    assert [(conversion.target, conversion.status) for conversion in made] == [("openvino", "built"), ("ncnn", "failed"), ("onnxruntime", "built")]
    assert isinstance(made[1].error, ExportError)
    assert sorted(path.name for path in (tmp_path / "crates").iterdir()) == ["rtmpose-c64_onnxruntime", "rtmpose-c64_openvino"]


def test_the_command_line_builds_what_it_can_and_fails(pose: Path, tmp_path: Path, pnnx: Pnnx) -> None:
    pnnx("echo no luck; exit 1")
    out = tmp_path / "crates"
    result = CliRunner().invoke(app, ["convert", str(pose), "-t", "openvino", "-t", "ncnn", "-t", "onnxruntime", "-o", str(out)])
    assert result.exit_code == ExportError.exit_code
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "no luck" in result.stderr
    assert result.stderr.count("export ONNX") == 1
    assert sorted(path.name for path in out.iterdir()) == ["rtmpose-c64_onnxruntime", "rtmpose-c64_openvino"]


# -------------------------------------------------------------------------------------------------------------------- own models


def own(path: Path, *, first: str = "", outputs: tuple[str, str] = ("y", "z"), given: str = "x") -> Path:
    """An ONNX file: (b, 3, 8, 8) through up to one operator, a convolution, and two branches."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node(first, [given], ["first"])] if first else []
    nodes += [
        helper.make_node("Conv", ["first" if first else given, "w0"], ["stem"], pads=[1] * 4),
        helper.make_node("Relu", ["stem"], ["trunk"]),
        helper.make_node("Conv", ["trunk", "w1"], ["left"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["left"], [outputs[0]]),
        helper.make_node("Conv", ["trunk", "w2"], ["right"], pads=[1] * 4),
        helper.make_node("Tanh", ["right"], [outputs[1]]),
    ]
    weights = [numpy_helper.from_array((0.2 * rng.standard_normal((4, 4 if i else 3, 3, 3))).astype(np.float32), f"w{i}") for i in range(3)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3 if name == given else 4, 8, 8]) for name in (given, *outputs)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return path


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text('task = "Network"\n[resize]\nmode = "stretch"\n')
    return path


def of_own(file: Path, spec: Path, *targets: str, verify: bool = True) -> list[Conversion]:
    options = ConvertOptions(out=file.parent / "crates", spec=spec, name="own", verify=verify)
    return convert(file, [load_config(target) for target in targets], options)


@pytest.mark.parametrize("outputs", [("1", "2"), ("5", "3"), ("2", "in0"), ("out1", "out0")])
def test_names_of_a_graph_never_meet_pnnxs_numbers(tmp_path: Path, spec: Path, outputs: tuple[str, str]) -> None:
    """Without verification nobody would notice."""
    bundles = built(of_own(own(tmp_path / "own.onnx", outputs=outputs), spec, "onnxruntime", "ncnn", verify=False))
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    ours, theirs = (open_session(bundles[target], SessionOptions()).run({"x": x}) for target in ("ncnn", "onnxruntime"))
    assert set(ours) == set(outputs)
    for name in outputs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_a_name_that_a_param_cannot_hold_is_said(tmp_path: Path, spec: Path) -> None:
    made = of_own(own(tmp_path / "own.onnx", outputs=("the scores", "z")), spec, "ncnn", "openvino")
    assert isinstance(made[0].error, ExportError)
    assert re.search(r"names of tensors without spaces.*'the scores'", str(made[0].error))
    assert made[1].status == "built"


@pytest.mark.parametrize("first", ["Relu", "Neg", "Sigmoid", "Identity"])
def test_a_network_may_begin_with_a_layer_that_works_in_place(tmp_path: Path, spec: Path, first: str) -> None:
    for bundle in built(of_own(own(tmp_path / "own.onnx", first=first), spec, "ncnn", "openvino")).values():
        assert bundle.manifest.parity.verified


def test_an_operator_that_a_backend_does_not_have_is_one_line_and_stops_no_other(tmp_path: Path, spec: Path) -> None:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8]), helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "own.onnx")
    made = {conversion.target: conversion for conversion in of_own(tmp_path / "own.onnx", spec, "openvino", "ncnn", "onnxruntime")}
    assert made["onnxruntime"].status == "built"
    for target in ("openvino", "ncnn"):
        error = made[target].error
        assert isinstance(error, ExportError), target
        assert "Det" in str(error)
        assert "\n" not in str(error)
        assert not made[target].place.exists()


ROWS = np.array([[[1, 1, 5, 5, 0.9], [2, 2, 7, 7, 0.6]]], dtype=np.float32)


def boxes(folder: Path, *means: onnx.NodeProto) -> tuple[Path, Path]:
    """An ONNX file that ends in two boxes and its spec; `means` make `mean` (b, 1) of `x`."""
    nodes = [
        *means,
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "axis"], ["nothings"]),
        helper.make_node("Add", ["nothings", "rows"], ["dets"]),
        helper.make_node("Add", ["nothing", "kinds"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["labels"], to=TensorProto.INT64),
    ]
    constants = {"zero": np.float32([0]), "axis": np.int64([2]), "rows": ROWS, "kinds": np.float32([[0, 1]])}
    outputs = [helper.make_tensor_value_info("dets", TensorProto.FLOAT, ["b", 2, 5]), helper.make_tensor_value_info("labels", TensorProto.INT64, ["b", 2])]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8])]
    graph = helper.make_graph(nodes, "g", given, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "own.onnx")
    (folder / "boxes.toml").write_text('task = "Detector"\n[resize]\nmode = "stretch"\n')
    return folder / "own.onnx", folder / "boxes.toml"


def test_boxes_that_a_graph_suppresses_itself_are_openvinos_and_not_ncnns(tmp_path: Path) -> None:
    """Where the suppression is, is the graph's business: no option of ours is to blame."""
    pool, flat = helper.make_node("ReduceMean", ["x"], ["pool"], axes=[1, 2, 3], keepdims=0), helper.make_node("Unsqueeze", ["pool", "one"], ["mean"])
    openvino, ncnn = of_own(*boxes(tmp_path, helper.make_node("Constant", [], ["one"], value_ints=[1]), pool, flat), "openvino", "ncnn")
    assert openvino.status == "built", openvino.error
    with Detector(openvino.place) as detector:
        np.testing.assert_allclose(detector.detect(np.zeros((8, 8, 3), dtype=np.uint8)).boxes_xyxy, ROWS[0, :, :4], atol=1e-5)
    assert isinstance(ncnn.error, ConfigError)
    assert "suppresses boxes itself" in str(ncnn.error)
    assert "--nms" not in ncnn.error.hint


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_boxes_whose_axes_the_simplifier_changed_are_an_error_and_no_traceback(tmp_path: Path, target: str) -> None:
    """onnxsim makes one of two means with different `keepdims`."""
    means = [helper.make_node("ReduceMean", ["x"], ["map"], axes=[2, 3], keepdims=0), helper.make_node("ReduceMean", ["map"], ["mean"], axes=[1], keepdims=1)]
    (conversion,) = of_own(*boxes(tmp_path, *means), target)
    if conversion.status == "built":
        pytest.skip("this onnxsim is right about them")
    assert isinstance(conversion.error, ExportError)
    assert re.match(r"own: expected dets with 3 axes, found \[1, 1, 1, 2, 5\]", str(conversion.error))
    assert conversion.error.hint == "run again with --no-simplify"


# ---------------------------------------------------------------------------------------------------------- what pnnx loses


def param(*lines: str) -> str:
    return "\n".join(["7767517", f"{len(lines) + 1} {len(lines) + 1}", "Input in0 0 1 in0", *lines]) + "\n"


@pytest.mark.parametrize(
    "kind",
    ["torch.split", "aten::mul", "prim::If", "pnnx.Expression", "F.interpolate", "nn.Module", "Tensor.to", "NonMaxSuppression", "TopK", "GatherND", "Range"],
)
def test_layers_that_are_not_ncnns_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ExportError, match=rf"^my net: expected ncnn layers, found {re.escape(kind)}, for which pnnx has no translation") as caught:
        lint(param(f"{kind} layer 1 1 in0 1", "ReLU relu 1 1 1 2", f"{kind} again 1 1 2 out0"), where="my net")
    assert caught.value.hint


@pytest.mark.parametrize("options", ["0=8 1=0 -23303=0", "0=8 1=0 -23303=0 4=1", "0=3 1=0", "0=8 -23303=0"])
def test_a_reduction_that_lost_its_axes_is_refused(options: str) -> None:
    with pytest.raises(ExportError, match="found Reduction without axes"):
        lint(param(f"Reduction norm 1 1 in0 out0 {options}"), where="net")


@pytest.mark.parametrize("options", ["0=8 1=0 -23303=1,1 4=1", "0=3 1=0 -23303=2,-1,-2", "0=3 1=1", "0=0"])
def test_a_reduction_over_axes_or_over_everything_is_ncnns(options: str) -> None:
    lint(param(f"Reduction norm 1 1 in0 out0 {options}"), where="net")


def test_only_kinds_of_layers_are_linted() -> None:
    """Names and blobs may be called anything."""
    lint(param("ReLU torch.relu 1 1 in0 aten::x", "", "ReLU TopK 1 1 aten::x Range"), where="net")


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ExportError, match="found Range, Reduction without axes, torch.x,"):
        lint(param("torch.x a 1 1 in0 1", "Range b 1 1 1 2", "Reduction c 1 1 2 out0 0=8 1=0 -23303=0"), where="net")


@pytest.mark.parametrize(("exporter", "verify"), [("dynamo", False), ("torchscript", True)])
def test_pnnx_loses_the_axes_of_opset_18_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: str, verify: bool, pose: Path
) -> None:
    """It reports success; that it still does is part of the test. Refused with and without verification."""
    seen: list[str] = []
    real = ncnn_builder.lint
    monkeypatch.setattr(ncnn_builder, "lint", lambda text, *, where: (seen.append(text), real(text, where=where))[1])
    config = msgspec.structs.replace(load_config("ncnn"), onnx=OnnxOptions(exporter=exporter, opset=18))
    (conversion,) = convert(pose, [config], ConvertOptions(out=tmp_path, verify=verify))
    (text,) = seen
    lost = [line for line in text.splitlines() if line.startswith("Reduction") and {"0=8", "1=0", "-23303=0"} <= set(line.split())]
    assert len(lost) == 2  # one for each ScaleNorm
    assert isinstance(conversion.error, ExportError)
    assert "found Reduction without axes" in str(conversion.error)
    assert "--exporter torchscript" in conversion.error.hint
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------- names


def spec_of(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


IMAGE = spec_of("image", "batch", 3, 64, 96)


def renamed(*lines: str, inputs: tuple[TensorSpec, ...] = (IMAGE,), outputs: tuple[TensorSpec, ...] = (spec_of("y", 1), spec_of("z", 1))) -> list[list[str]]:
    """Layers behind the first input's, in words."""
    found = named(param(*lines), inputs=inputs, outputs=outputs).splitlines()
    assert found[:2] == param(*lines).splitlines()[:2]
    assert found[2].split() == ["Input", inputs[0].name, "0", "1", inputs[0].name, "0=96", "1=64", "2=3"]
    return [line.split() for line in found[3:]]


def test_blobs_are_renamed_and_nothing_else_that_is_called_like_them() -> None:
    """Neither a layer's name nor a parameter, nor a blob that only begins so."""
    layers = renamed("Split out0 1 2 in0 in00 1", "Noop in0 2 2 in00 1 out0 out1 0=in0 9=out0", "ReLU relu 1 1 out1 out10")
    assert layers == [
        ["Split", "out0", "1", "2", "image", "in00", "1"],
        ["Noop", "in0", "2", "2", "in00", "1", "y", "z", "0=in0", "9=out0"],
        ["ReLU", "relu", "1", "1", "z", "out10"],
    ]


def test_names_may_be_pnnxs_own_in_another_order() -> None:
    layers = renamed("Noop n 1 2 in0 out0 out1", outputs=(spec_of("out1", 1), spec_of("out0", 1)))
    assert layers == [["Noop", "n", "1", "2", "image", "out1", "out0"]]


def test_a_blob_of_pnnxs_that_is_called_like_an_output_makes_way() -> None:
    layers = renamed("ReLU a 1 1 in0 1", "ReLU b 1 1 1 2", "ReLU c 1 1 2 out0", outputs=(spec_of("1", 1),))
    blobs = [layer[4:6] for layer in layers]
    assert blobs[0][0] == "image"
    assert blobs[2][1] == "1"
    assert blobs[0][1] == blobs[1][0] != "1"
    assert blobs[1][1] == blobs[2][0] == "2"


def test_every_input_gets_its_own_sizes_in_place_of_what_was_there() -> None:
    text = param("Input in1 0 1 in1 0=7 1=7 2=7", "BinaryOp add 2 1 in0 in1 out0 0=0")
    found = named(text, inputs=(IMAGE, spec_of("mask", 1, 1, 32, 48)), outputs=(spec_of("y", 1),))
    assert [line.split() for line in found.splitlines()[2:]] == [
        ["Input", "image", "0", "1", "image", "0=96", "1=64", "2=3"],
        ["Input", "mask", "0", "1", "mask", "0=48", "1=32", "2=1"],
        ["BinaryOp", "add", "2", "1", "image", "mask", "y", "0=0"],
    ]


# ---------------------------------------------------------------------------------------------------------- a pnnx that misbehaves

Pnnx = Callable[[str], Path]
WRITES = 'for a in "$@"; do case $a in ncnnparam=*) p=${a#*=};; ncnnbin=*) b=${a#*=};; esac; done; : > $b; '


@pytest.fixture
def pnnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pnnx]:
    """Put a shell script in pnnx's place; temporary files go where they can be counted."""
    if sys.platform == "win32":
        pytest.skip("replaces pnnx by shell scripts")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def put(body: str) -> Path:
        program = tmp_path / "pnnx"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(ncnn_builder, "check_pnnx", lambda: program)
        return program

    yield put
    assert list((tmp_path / "tmp").iterdir()) == []


def failure(pose: Path, folder: Path, error: type[ModelcrateError] = ExportError) -> ModelcrateError:
    """Building for ncnn fails in one line and leaves nothing; returns the error."""
    config = msgspec.structs.replace(load_config("ncnn"), onnx=OnnxOptions(simplify=False))
    (conversion,) = convert(pose, [config], ConvertOptions(out=folder / "crates", verify=False))
    assert isinstance(conversion.error, error), conversion.error
    assert conversion.status == "failed"
    assert "\n" not in str(conversion.error)
    assert "Traceback" not in str(conversion.error)
    assert not list((folder / "crates").glob("*"))
    return conversion.error


def test_the_script_in_pnnxs_place_is_what_runs(pose: Path, tmp_path: Path, pnnx: Pnnx) -> None:
    """With the graph, one sample's shape, and the precision."""
    pnnx(f'echo "$@" > {tmp_path}/arguments; exit 1')
    failure(pose, tmp_path)
    graph, shape, precision, *_ = (tmp_path / "arguments").read_text().split()
    assert (Path(graph).suffix, shape, precision) == (".onnx", "inputshape=[1,3,64,96]", "fp16=0")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo one; echo two >&2; exit 1", "expected pnnx to succeed, found exit code 1: two one"),
        ("exit 77", "expected pnnx to succeed, found exit code 77"),
        ("kill -SEGV $$", r"expected pnnx to end by itself, found that it crashed \(SIGSEGV\)"),
        ("kill -ABRT $$", r"expected pnnx to end by itself, found that it crashed \(SIGABRT\)"),
        ("kill -40 $$", r"expected pnnx to end by itself, found that it crashed \(signal 40\)"),
        ("printf '\\377\\376 \\200'; exit 3", "expected pnnx to succeed, found exit code 3"),
        ("exit 0", "expected pnnx to write a network, found none"),
        ("echo I did nothing", "expected pnnx to write a network, found none: I did nothing"),
        (WRITES, "expected pnnx to write a network, found none"),
        (f"{WRITES} : > $p", "expected ncnn to succeed, found exit code 1: .*expected an ncnn .param file"),
        (f"{WRITES} echo garbage > $p", "expected ncnn to succeed, found exit code 1: .*expected an ncnn .param file"),
        (f"{WRITES} printf 'a b c d\\ne f g h\\ni j k l\\n' > $p", "expected pnnx to write a .param, found: 'a b c d"),
        (f"{WRITES} printf '\\377\\376\\n\\200\\n' > $p", "expected ncnn to succeed, found exit code 1: .*expected an ncnn .param file"),
        (f"{WRITES} printf '7767517\\n2 2\\nInput in0 0 1 in0\\nReLU r 1 1 in0 out0\\n' > $p", "expected the outputs .*simcc_y.*, found .'simcc_x'."),
        (f"{WRITES} printf '7767517\\n2 2\\nInput in0 0 1 in0\\nWhatever r 1 1 in0 out0\\n' > $p", "expected ncnn to succeed, found exit code 1: .*layer Whatever"),
        (f"{WRITES} printf '7767517\\n2 2\\nInput in0 0 1 in0\\ntorch.x r 1 1 in0 out0\\n' > $p", "expected ncnn layers, found torch.x"),
        (f"{WRITES} printf '7767517\\n2 2\\nInput in0 0 1 in0\\nMatMul m 0 1 out0\\n' > $p", r"expected ncnn to end by itself, found that it crashed \(SIG"),
    ],
    ids=[
        "fails", "another code", "crashes", "aborts", "a nameless signal", "prints no text", "does nothing", "only says so", "only weights", "empty", "garbage",
        "garbage in four words", "no text", "half a network", "an unknown layer", "a foreign layer", "a network that crashes",
    ],
)  # fmt: skip
def test_neither_its_exit_code_nor_its_file_is_believed(pose: Path, tmp_path: Path, pnnx: Pnnx, body: str, message: str) -> None:
    pnnx(body)
    assert re.match(f"rtmpose-c64: {message}", str(failure(pose, tmp_path)))


def test_a_pnnx_that_hangs_is_ended(pose: Path, tmp_path: Path, pnnx: Pnnx, monkeypatch: pytest.MonkeyPatch) -> None:
    pnnx(f"echo $$ > {tmp_path}/number; exec sleep 600")
    monkeypatch.setattr(ncnn_builder, "_TIMEOUT_S", 1)
    assert str(failure(pose, tmp_path)) == "rtmpose-c64: expected pnnx to end within 1 s, found it still running"
    assert not Path(f"/proc/{(tmp_path / 'number').read_text().strip()}").exists()


@pytest.mark.parametrize("is_executable", [True, False])
def test_a_pnnx_that_does_not_start_is_not_blamed_on_the_disk(pose: Path, tmp_path: Path, pnnx: Pnnx, is_executable: bool) -> None:
    program = pnnx("exit 0")
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755 if is_executable else 0o644)
    error = failure(pose, tmp_path)
    assert str(error).startswith("rtmpose-c64: expected to start pnnx, found: ")
    assert str(program) in error.hint


def test_an_old_pnnx_is_said_with_what_to_do(pose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "20230816" if name == "pnnx" else real(name))
    error = failure(pose, tmp_path, MissingBackendError)
    assert str(error) == f"pnnx: expected version {OLDEST_PNNX} or newer, which reads ONNX, found 20230816"
    assert error.hint == "pip install --upgrade pnnx"


def test_a_pnnx_without_its_program_is_not_installed(pose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages" / "pnnx").mkdir(parents=True)
    (tmp_path / "packages" / "pnnx" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "pnnx", raising=False)
    error = failure(pose, tmp_path, MissingBackendError)
    assert str(error) == "building for ncnn needs pnnx, not installed"
    assert error.hint == "pip install 'modelcrate[convert,ncnn,pnnx]'"


@pytest.mark.parametrize(
    ("module", "target", "extras"), [("pnnx", "ncnn", "ncnn,pnnx"), ("ncnn", "ncnn-fp16", "ncnn,pnnx"), ("openvino", "openvino", "openvino")]
)
def test_what_is_not_installed_is_said_before_any_work(
    pose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, target: str, extras: str
) -> None:
    """None among the loaded modules is Python's own way to say that there is no such module."""
    monkeypatch.setitem(sys.modules, module, None)
    events: list[Event] = []
    with pytest.raises(MissingBackendError, match=f"building for {target.partition('-')[0]} needs {module}, not installed") as caught:
        convert(pose, [load_config("onnxruntime"), load_config(target)], ConvertOptions(out=tmp_path / "crates"), events.append)
    assert caught.value.hint == f"pip install 'modelcrate[convert,{extras}]'"
    assert events == []
    assert not (tmp_path / "crates").exists()
