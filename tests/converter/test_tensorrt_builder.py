"""TensorRT's builder: the real TensorRT for RTX parses and builds every family of networks without a GPU; what is refused, and in whose words; the dry run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
import torch
from click.testing import Result
from onnx import TensorProto, helper
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle, sha256_of
from modelcrate_bundle.errors import ConfigError, ExportError, MissingBackendError
from modelcrate_bundle.manifest import EngineRecord
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders.tensorrt_builder import build_engine, engine_types, examine, layer_types
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.cli import app
from modelcrate_converter.config import DeployConfig, NmsOptions, load_config, target_names
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.export import OnnxModel, export_onnx
from modelcrate_converter.exportable import ExportableModel
from modelcrate_converter.models.blueprints import classifier_shapes, heatmap_shapes, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.parity import network_inputs, procedural_images
from modelcrate_converter.precision import apply_plan, measure_ranges, plan_half
from modelcrate_converter.progress import Advanced, Event, Noted, ignore
from modelcrate_converter.quantization import calibrate, emit_int8
from modelcrate_converter.simplify import simplify
from modelcrate_runtime.sessions import TENSORRT_WAYS
from modelcrate_runtime.sessions.cuda_device import find_gpu
from modelcrate_runtime.sessions.tensorrt_session import make_logger, this_platform

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'modelcrate[tensorrt-rtx]'")


def has_gpu() -> bool:
    try:
        find_gpu()
    except MissingBackendError:
        return False
    return True


no_gpu = pytest.mark.skipif(has_gpu(), reason="is about a machine without an NVIDIA GPU")

INT8 = """
backend = "tensorrt_rtx"
precision = "int8"
[nms]
where = "runtime"
[int8]
activations = "int8"
quantize_results = false
scenes = 2
"""
POSE_CFG = "codec = dict(type='SimCCLabel', input_size=(64, 64), sigma=(4.9, 5.66), simcc_split_ratio=2.0, normalize=False, use_dark=False)"
DETECTOR_CFG = "test_pipeline = [dict(type='Resize', scale=(96, 96))]"
HEATMAP_CFG = "codec = dict(type='UDPHeatmap', input_size=(96, 128), heatmap_size=(24, 32), sigma=1.5)"
FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "rtmpose": (rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8), POSE_CFG),
    "rtmdet": (rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=False), DETECTOR_CFG),
    "rtmdet-separable": (rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=True), DETECTOR_CFG),
    "heatmap": (heatmap_shapes(widen=0.0625, deepen=0.167, keypoints=5, channels=16, deconvs=2), HEATMAP_CFG),
    "classifier": (classifier_shapes(widen=0.0625, deepen=0.167, classes=7), ""),
}
NORMS = {f"/head/{norm}/{op}" for norm in ("mlp/mlp.0", "gau/ln") for op in ("ReduceL2", "Clip", "Div")}
ISLANDS = {"rtmpose": NORMS}
"""Family -> what has to stay in float32, whatever the weights."""
X = (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)


@dataclass(frozen=True, kw_only=True)
class Network:
    """One family: its model and its canonical graph."""

    family: str
    checkpoint: Path
    model: ExportableModel
    graph: OnnxModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, and no cache but one in it."""
    path = tmp_path_factory.mktemp("tensorrt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELCRATE_CACHE", str(path / "cache"))
        patch.setenv("COLUMNS", "200")
        patch.delenv("MODELCRATE_TRACEBACK", raising=False)
        yield path
    if not has_gpu():
        assert not (path / "cache").exists(), "without a GPU there is nothing to remember"


@pytest.fixture(scope="module")
def network_of(folder: Path) -> Callable[[str], Network]:
    made: dict[str, Network] = {}

    def of(family: str) -> Network:
        if family not in made:
            place = folder / family
            place.mkdir()
            table, cfg = FAMILIES[family]
            torch.save({"state_dict": random_weights(table, seed=1), "meta": {"cfg": cfg}}, place / "model.pth")
            model = read_architecture(read_checkpoint(place / "model.pth"))
            exported = export_onnx(model, load_config("tensorrt-rtx").onnx, workdir=place)
            graph = simplify(exported, workdir=place, metadata={"checkpoint": model.checkpoint[1], "model": model.name})
            made[family] = Network(family=family, checkpoint=place / "model.pth", model=model, graph=graph)
        return made[family]

    return of


@pytest.fixture(scope="module")
def pose(network_of: Callable[[str], Network]) -> Network:
    return network_of("rtmpose")


@pytest.fixture(scope="module", params=list(FAMILIES))
def network(request: pytest.FixtureRequest, network_of: Callable[[str], Network]) -> Network:
    return network_of(request.param)


@pytest.fixture(scope="module")
def int8(folder: Path) -> DeployConfig:
    (folder / "rtx-int8.toml").write_text(INT8)
    return load_config(str(folder / "rtx-int8.toml"))


def changed(config: DeployConfig, **options: object) -> DeployConfig:
    """With other options of the engine."""
    return msgspec.structs.replace(config, tensorrt=msgspec.structs.replace(config.tensorrt, **options))


def parsed(path: Path) -> Any:
    """The network that TensorRT makes of a graph; its parser must live as long as it."""
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), logger.problems
    return network, parser, builder


def types_by_layer(network: Any) -> dict[str, str]:
    return {network.get_layer(i).name: network.get_layer(i).get_output(0).dtype.name for i in range(network.num_layers)}


def assert_float32_outside(network: Any) -> None:
    ends = [network.get_input(i) for i in range(network.num_inputs)] + [network.get_output(i) for i in range(network.num_outputs)]
    assert len(ends) > 1
    assert {end.dtype.name for end in ends} == {"FLOAT"}


def built(graph: Path, inputs: tuple[TensorSpec, ...], config: DeployConfig, folder: Path, report: Callable[[Event], None] = ignore) -> EngineRecord:
    place = folder / "end2end.engine"
    record = build_engine(graph, inputs, config, place=place, where="net", report=report)
    assert place.stat().st_size > 1000
    assert (record.onnx, record.onnx_sha256) == (graph.name, sha256_of(graph))
    assert (record.library, record.version, record.platform) == ("tensorrt_rtx", trt.__version__, this_platform())
    return record


def made(folder: Path, *nodes: onnx.NodeProto, domains: tuple[str, ...] = ()) -> OnnxModel:
    """A graph from x to y, right or wrong."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path = folder / "made.onnx"
    onnx.save(helper.make_model(helper.make_graph(list(nodes), "made", values[:1], values[1:]), opset_imports=opsets, ir_version=8), path)
    y = (TensorSpec(name="y", dtype="float32", shape=("batch", 4)),)
    return OnnxModel(path=path, sha256=sha256_of(path), opset=17, inputs=X, outputs=y, op_counts=Counter(one.op_type for one in nodes))


def engines(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.engine*"))


# -------------------------------------------------------------------------------------------------------- every family, every precision


def test_every_family_is_built_in_float32(network: Network, tmp_path: Path) -> None:
    record = built(network.graph.path, network.graph.inputs, load_config("tensorrt-rtx"), tmp_path)
    assert set(record.layers) <= {"float32", "int64"}
    assert record.layers["float32"] > 50
    assert_float32_outside(parsed(network.graph.path)[0])


def test_every_family_is_built_in_float16_with_the_islands_of_its_plan(network: Network, tmp_path: Path) -> None:
    ranges = measure_ranges(network.graph, network_inputs(network.model, procedural_images()), workdir=tmp_path)
    plan = plan_half(network.graph, ranges, headroom=16.0)
    assert plan.islands.keys() >= ISLANDS.get(network.family, set())
    typed = apply_plan(network.graph, plan, workdir=tmp_path)
    tensorrt, *alive = parsed(typed.path)
    kinds = types_by_layer(tensorrt)
    assert {kinds[name] for name in plan.islands} <= {"FLOAT"}
    computing = [node.name for node in onnx.load(typed.path).graph.node if node.op_type in {"Conv", "ConvTranspose", "MatMul", "Gemm", "Sigmoid"}]
    assert computing
    assert {kinds[name] for name in computing if name not in plan.islands and name in kinds} == {"HALF"}
    assert_float32_outside(tensorrt)
    assert Counter(layer_types(tensorrt))["float16"] > plan.half // 2
    record = built(typed.path, typed.inputs, load_config("tensorrt-rtx-fp16"), tmp_path)
    if not record.is_inspected:
        assert record.layers == layer_types(tensorrt)
    assert record.layers["float16"] > 2 * record.layers["float32"]
    del alive


def test_every_family_is_built_in_int8(network: Network, int8: DeployConfig, tmp_path: Path) -> None:
    inputs = list(network_inputs(network.model, procedural_images()))[:2]
    typed = emit_int8(network.graph, calibrate(network.graph, lambda: iter(inputs), int8.int8, workdir=tmp_path), int8.int8, workdir=tmp_path)
    tensorrt, *alive = parsed(typed.path)
    assert_float32_outside(tensorrt)
    kinds = types_by_layer(tensorrt)
    nodes = onnx.load(typed.path).graph.node
    assert {kinds[node.name] for node in nodes if node.op_type == "QuantizeLinear"} == {"INT8"}
    assert {kinds[node.name] for node in nodes if node.op_type == "DequantizeLinear" and node.name in kinds} == {"FLOAT"}
    record = built(typed.path, typed.inputs, int8, tmp_path)
    assert record.layers["int8"] > 10
    assert "float16" not in record.layers
    del alive


def test_convert_rehearses_every_target_from_one_export(pose: Network, int8: DeployConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    configs = [load_config("tensorrt-rtx"), load_config("tensorrt-rtx-fp16"), int8]
    conversions = convert(pose.checkpoint, configs, ConvertOptions(out=tmp_path / "out", dry_run=True, verify=False), events.append)
    for conversion, expected in zip(conversions, ("float32", "float16", "int8"), strict=True):
        assert (conversion.status, conversion.error, conversion.bundle) == ("dry run", None, None)
        assert conversion.support is not None
        assert conversion.support.unsupported == ()
        assert conversion.support.operators >= pose.graph.node_count
        assert conversion.support.layers[expected] > 10
        assert set(conversion.support.layers) <= {"float32", "int64", expected}
        assert {f"parse for {conversion.target}", f"build {conversion.target}"} <= set(conversion.seconds)
    assert sum(isinstance(event, Noted) and "nothing was run on a GPU" in event.text for event in events) == 3
    assert list((tmp_path / "out").iterdir()) == []
    assert engines(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt-rtx-fp16"])
def test_a_graph_of_mixed_types_is_refused_in_tensorrts_words(target: str, tmp_path: Path) -> None:
    """What an implicit cast would hide: in a strongly typed network there is none."""
    nodes = helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16), helper.make_node("Sub", ["half", "x"], ["y"], name="mixed")
    with pytest.raises(ExportError, match=r"net: expected a graph that tensorrt_rtx [\d.]+ reads, found: .*mixed.*must have same input types.*Half and Float"):
        build_engine(made(tmp_path, *nodes).path, X, load_config(target), place=tmp_path / "end2end.engine", where="net", report=ignore)
    assert engines(tmp_path) == []


def test_casting_weights_alone_is_refused(pose: Network, tmp_path: Path) -> None:
    """Float16 as some converters make it: half weights under float32 operators."""
    proto = onnx.load(pose.graph.path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("float16"), tensor.name))
    onnx.save(proto, tmp_path / "naive.onnx")
    with pytest.raises(ExportError, match="reads, found: .*Conv"):
        build_engine(tmp_path / "naive.onnx", pose.graph.inputs, load_config("tensorrt-rtx-fp16"), place=tmp_path / "e.engine", where="net", report=ignore)
    assert engines(tmp_path) == []


def test_an_operator_that_nobody_knows_is_refused_by_the_build(tmp_path: Path) -> None:
    graph = made(tmp_path, helper.make_node("Swirl", ["x"], ["y"], name="swirl", domain="acme"), domains=("acme",))
    with pytest.raises(ExportError, match=r"net: expected a graph that tensorrt_rtx .* reads, found: .*swirl.*Swirl.*Plugin not found"):
        build_engine(graph.path, X, load_config("tensorrt-rtx"), place=tmp_path / "end2end.engine", where="net", report=ignore)
    assert engines(tmp_path) == []


def test_the_dry_run_names_the_operator_that_nobody_knows_and_no_other(pose: Network, tmp_path: Path) -> None:
    nodes = (
        helper.make_node("Relu", ["x"], ["a"], name="before"),
        helper.make_node("Swirl", ["a"], ["b"], name="swirl", domain="acme"),
        helper.make_node("Relu", ["b"], ["y"], name="after"),
    )
    with pytest.raises(ExportError, match=r"expected operators that tensorrt_rtx .* runs, found .*swirl \(Swirl\)") as caught:
        examine(pose.model, made(tmp_path, *nodes, domains=("acme",)), load_config("tensorrt-rtx"), workdir=tmp_path)
    assert "before" not in str(caught.value)
    assert "after" not in str(caught.value)


def test_the_dry_run_of_a_mixed_graph_names_the_operator_that_mixes(pose: Network, tmp_path: Path) -> None:
    nodes = helper.make_node("Cast", ["x"], ["half"], name="fine", to=TensorProto.FLOAT16), helper.make_node("Sub", ["half", "x"], ["y"], name="mixed")
    with pytest.raises(ExportError, match="found .*mixed") as caught:
        examine(pose.model, made(tmp_path, *nodes), load_config("tensorrt-rtx"), workdir=tmp_path)
    assert "fine (Cast)" not in str(caught.value)


def test_junk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 20)
    with pytest.raises(ExportError, match=r"net: expected a graph that tensorrt_rtx .* reads, found: \S"):
        build_engine(tmp_path / "junk.onnx", X, load_config("tensorrt-rtx"), place=tmp_path / "end2end.engine", where="net", report=ignore)


@pytest.mark.parametrize("dry_run", [True, False])
def test_suppression_in_the_graph_is_refused_with_what_to_say_instead(network_of: Callable[[str], Network], dry_run: bool, tmp_path: Path) -> None:
    config = msgspec.structs.replace(load_config("tensorrt-rtx"), nms=NmsOptions(where="graph"))
    (conversion,) = convert(network_of("rtmdet").checkpoint, [config], ConvertOptions(out=tmp_path / "out", dry_run=dry_run, verify=False))
    assert isinstance(conversion.error, ConfigError)
    assert "nms.where: expected runtime for TensorRT for RTX" in str(conversion.error)
    assert conversion.error.hint == "--nms runtime"
    assert list((tmp_path / "out").iterdir()) == []


def test_suppression_in_the_graph_means_nothing_to_a_pose_estimator(pose: Network, tmp_path: Path) -> None:
    config = msgspec.structs.replace(load_config("tensorrt-rtx"), nms=NmsOptions(where="graph"))
    assert examine(pose.model, pose.graph, config, workdir=tmp_path)[1] is False


def test_unsigned_int8_is_refused(pose: Network, int8: DeployConfig, tmp_path: Path) -> None:
    config = msgspec.structs.replace(int8, int8=msgspec.structs.replace(int8.int8, activations="uint8"))
    (conversion,) = convert(pose.checkpoint, [config], ConvertOptions(out=tmp_path / "out", dry_run=True, verify=False))
    assert isinstance(conversion.error, ConfigError)
    assert "int8.activations: expected int8 for TensorRT, whose INT8 is signed, found uint8" in str(conversion.error)


@pytest.mark.parametrize(("target", "lost"), [("tensorrt-rtx-fp16", "float16"), ("rtx-int8", "int8")])
def test_an_engine_that_lost_its_precision_is_an_error(pose: Network, int8: DeployConfig, target: str, lost: str, tmp_path: Path) -> None:
    config = int8 if target == "rtx-int8" else load_config(target)
    with pytest.raises(ExportError, match=rf"net: {target}: expected layers in {lost} in the graph, found \d+ layers in float32"):
        build_engine(pose.graph.path, pose.graph.inputs, config, place=tmp_path / "end2end.engine", where="net", report=ignore)
    with pytest.raises(ExportError, match=f"expected layers in {lost} in the graph"):
        examine(pose.model, pose.graph, config, workdir=tmp_path)
    assert engines(tmp_path) == []


@no_gpu
def test_tensorrt_itself_builds_for_a_gpu_alone(pose: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX under TensorRT's name is enough to come to that question."""
    monkeypatch.setitem(sys.modules, "tensorrt", renamed("11.4.0.106"))
    with pytest.raises(MissingBackendError, match="tensorrt: expected an NVIDIA GPU to build for, found none") as caught:
        build_engine(pose.graph.path, pose.graph.inputs, load_config("tensorrt"), place=tmp_path / "end2end.engine", where="net", report=ignore)
    assert "--dry-run" in caught.value.hint
    assert examine(pose.model, pose.graph, load_config("tensorrt"), workdir=tmp_path)[2].layers["float32"] > 50


def renamed(version: str) -> Any:
    """TensorRT for RTX under the name of TensorRT, in some version."""
    module: Any = type(trt)("tensorrt")
    module.__dict__.update({key: value for key, value in vars(trt).items() if not key.startswith("__")})
    module.__version__ = version
    return module


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0", "10.15.0.9"])
def test_a_library_that_is_too_old_is_refused(pose: Network, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", renamed(version))
    with pytest.raises(MissingBackendError, match=rf"tensorrt: expected version 10\.16 or newer, found {version}"):
        examine(pose.model, pose.graph, load_config("tensorrt"), workdir=tmp_path)


# -------------------------------------------------------------------------------------------------------- progress and interruption


def test_a_build_tells_its_phases(pose: Network, tmp_path: Path) -> None:
    events: list[Event] = []
    built(pose.graph.path, pose.graph.inputs, load_config("tensorrt-rtx"), tmp_path, events.append)
    steps = [event for event in events if isinstance(event, Advanced)]
    assert len({event.name for event in steps}) > 2
    assert all(event.name and event.unit == "items" and event.total is not None and 0 <= event.done <= event.total for event in steps)
    last = {event.name: event for event in steps}
    assert all(event.done == event.total for event in last.values()), "every phase ends"
    assert isinstance(events[-1], Noted)
    assert "layers in float32" in events[-1].text


@pytest.mark.parametrize(("after", "error"), [(0, KeyboardInterrupt), (1, KeyboardInterrupt), (40, KeyboardInterrupt), (5, ConfigError)])
def test_what_the_report_raises_comes_out_of_the_build(pose: Network, after: int, error: type[BaseException], tmp_path: Path) -> None:
    """It must not pass through C++, which would end the process."""
    seen = 0

    def report(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        build_engine(pose.graph.path, pose.graph.inputs, load_config("tensorrt-rtx"), place=tmp_path / "end2end.engine", where="net", report=report)
    assert engines(tmp_path) == []


@no_gpu
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_interruption_leaves_no_bundle(pose: Network, dry_run: bool, tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(pose.checkpoint, [load_config("tensorrt-rtx")], ConvertOptions(out=tmp_path / "out", dry_run=dry_run, verify=False), report)
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------- the record


@no_gpu
def test_an_engine_of_no_gpu_says_so(pose: Network, tmp_path: Path) -> None:
    record = built(pose.graph.path, pose.graph.inputs, load_config("tensorrt-rtx"), tmp_path)
    assert (record.gpu, record.compute_capability, record.cuda, record.is_inspected) == ("", "", 0, False)
    assert (record.hardware_compatibility, record.version_compatible, record.is_stripped) == ("none", False, False)


def test_float32_is_float32(pose: Network, tmp_path: Path) -> None:
    config = load_config("tensorrt-rtx")
    assert built(pose.graph.path, pose.graph.inputs, config, tmp_path).flags == []
    assert built(pose.graph.path, pose.graph.inputs, changed(config, tf32=True), tmp_path).flags == ["TF32"]


@pytest.mark.parametrize("options", [{"workspace_mib": 64}, {"optimization_level": 0}, {"hardware_compatibility": "ampere+"}], ids=str)
def test_other_options_build_too(pose: Network, options: dict[str, object], tmp_path: Path) -> None:
    record = built(pose.graph.path, pose.graph.inputs, changed(load_config("tensorrt-rtx"), **options), tmp_path)
    assert record.hardware_compatibility == options.get("hardware_compatibility", "none")


@no_gpu
@pytest.mark.parametrize("option", ["refit", "strip_weights", "version_compatible"])
def test_what_cannot_be_built_without_a_gpu_is_said_in_tensorrts_words(pose: Network, option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights that change take a GPU in 1.7, and its wheel has no lean runtime."""
    with pytest.raises(ExportError, match=r"net: expected tensorrt_rtx [\d.]+ to build an engine, found: .*(Myelin|libnvinfer_lean|Cuda)"):
        built(pose.graph.path, pose.graph.inputs, changed(load_config("tensorrt-rtx"), **{option: True}), tmp_path)
    assert engines(tmp_path) == []
    capfd.readouterr()


@pytest.mark.parametrize(
    ("outputs", "counts"),
    [
        ([{"Name": "a", "Dimensions": [1, 8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}], {"float16": 1}),
        ([{"Name": "a", "Dimensions": [1, 8], "Format/Datatype": "Row major linear FP32"}], {"float32": 1}),
        ([{"Name": "a", "Dimensions": [1, 8], "Format/Datatype": "Four wide channel vectorized row major Int8 format"}], {"int8": 1}),
        ([{"Name": "a", "Dimensions": [1, 8], "Format/Datatype": "Row major Int8 format"}], {"int8": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format/Datatype": "Row major INT32"}], {"int32": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "Datatype": "Half"}], {"float16": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "DataType": "Half"}], {"float16": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "DataType": "Float"}], {"float32": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "DataType": "Int8"}], {"int8": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "DataType": "BF16"}], {"bfloat16": 1}),
        ([{"Name": "a", "Dimensions": [1], "Format": "Row major linear", "DataType": "FP8"}], {"other": 1}),
        ([{"Name": "a"}], {"other": 1}),
        ([], {}),
    ],
    ids=str,
)
def test_types_in_an_inspectors_json(outputs: list[dict[str, object]], counts: dict[str, int]) -> None:
    layer = {"Name": "conv", "LayerType": "gemm", "Inputs": [], "Outputs": outputs}
    assert engine_types(json.dumps({"Layers": [layer], "Bindings": ["input"]})) == counts
    assert engine_types(json.dumps({"Layers": [layer, layer]})) == {kind: 2 * count for kind, count in counts.items()}


def test_an_inspector_that_gives_names_alone_gives_no_types() -> None:
    """As it does for an engine that was built without details."""
    assert engine_types(json.dumps({"Layers": ["conv + relu", "pool"], "Bindings": []})) == {}
    assert engine_types("{}") == {}


# ----------------------------------------------------------------------------------------------------------------- the command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert error


def test_the_dry_run_says_what_was_not_run_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx-fp16", "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "nothing was run on a GPU" in result.stderr
    assert "all supported" in result.stderr
    assert "build tensorrt-rtx-fp16" in result.stderr
    assert "simcc_x" in result.stdout
    assert "NOT VERIFIED" not in result.stdout
    assert not list(tmp_path.glob("out/*"))


def test_the_dry_run_in_json(folder: Path, tmp_path: Path) -> None:
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx-fp16", "--dry-run", "--json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    assert (entry["status"], entry["error"], entry["files"], entry["exit_code"]) == ("dry run", None, [], 0)
    assert entry["support"]["unsupported"] == []
    assert entry["support"]["operators"] > 100
    assert entry["support"]["layers"]["float16"] > 100 > entry["support"]["layers"]["float32"] > 0
    assert entry["parity"]["verified"] is True
    assert all(output["passed"] for output in entry["parity"]["outputs"])
    assert not list(tmp_path.glob("out/*"))


@no_gpu
def test_without_a_gpu_the_error_says_what_can_be_done(folder: Path, tmp_path: Path) -> None:
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx", "-o", tmp_path / "out")
    assert_one_error(result, 5, "building for tensorrt_rtx", "NVIDIA GPU", "--dry-run", "--no-verify")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unverified(folder: Path) -> Conversion:
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx", "--no-verify", "-o", folder / "unverified", "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    assert entry["status"] == "built"
    assert entry["parity"]["verified"] is False
    place = folder / "unverified" / "demo-pose_tensorrt-rtx"
    return Conversion(id=place.name, target="tensorrt-rtx", place=place, status="built", bundle=Bundle.open(place))


@no_gpu
def test_without_verification_the_bundle_says_what_nobody_did(unverified: Conversion) -> None:
    bundle = unverified.bundle
    assert bundle is not None
    bundle.verify()
    manifest = bundle.manifest
    assert manifest is not None
    assert manifest.parity.verified is False
    assert "Not verified" in bundle.path_of("README.md").read_text()
    record = manifest.engine
    assert record is not None
    assert (record.gpu, record.compute_capability, record.is_inspected) == ("", "", False)
    assert record.layers["float32"] > 100
    roles = {entry.path: (entry.role, entry.sha256) for entry in manifest.files}
    assert roles["end2end.onnx"] == ("source", record.onnx_sha256)
    assert record.onnx_sha256 == sha256_of(bundle.path_of("end2end.onnx"))
    assert roles["end2end.engine"][0] == "net"
    assert (bundle.model.net, bundle.model.backend, bundle.model.precision) == ("end2end.engine", "tensorrt_rtx", "FP32")
    onnx.checker.check_model(str(bundle.path_of("end2end.onnx")))


@no_gpu
def test_what_needs_a_gpu_to_run_says_so_when_it_is_run(unverified: Conversion) -> None:
    result = invoke("verify", unverified.place, "-r", "demo-pose")
    assert_one_error(result, 5, "NVIDIA GPU")


@no_gpu
def test_two_targets_without_verification_end_with_a_summary(folder: Path, tmp_path: Path) -> None:
    """Their engines cannot be timed here, which is no error."""
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx", "-t", "tensorrt-rtx-fp16", "--no-verify", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo-pose_tensorrt-rtx", "demo-pose_tensorrt-rtx-fp16"]
    summary = result.stdout[result.stdout.rindex("┏") :]
    assert summary.count("built") == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--no-verify"]], ids=str)
def test_without_tensorrt_there_are_three_ways_to_get_it(folder: Path, more: list[str], tmp_path: Path) -> None:
    result = invoke("convert", "demo-pose", "-t", "tensorrt", *more, "-o", tmp_path / "out")
    assert_one_error(result, 5, "building for tensorrt needs tensorrt, not installed", TENSORRT_WAYS)
    assert not (tmp_path / "out").exists()


@no_gpu
def test_all_leaves_tensorrt_out_and_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openvino", "ncnn"):  # the others are another test's
        monkeypatch.setitem(sys.modules, module, None)
    torch.save({"state_dict": random_weights(FAMILIES["rtmpose"][0], seed=1), "meta": {"cfg": POSE_CFG}}, tmp_path / "tiny.pth")
    result = invoke("convert", tmp_path / "tiny.pth", "-t", "all", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    left_out = {line.partition(": left out: ")[0]: line for line in result.stderr.splitlines() if ": left out: " in line}
    for target in target_names():
        if target.startswith("tensorrt"):
            assert ("needs tensorrt, not installed" if load_config(target).backend == "tensorrt" else "NVIDIA GPU") in left_out[target]
    assert not any("tensorrt" in entry["target"] for entry in json.loads(result.stdout))


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "cuda:-1", "gpu", "0", ""])
def test_a_device_that_is_no_gpu_is_refused(folder: Path, device: str, tmp_path: Path) -> None:
    result = invoke("convert", "demo-pose", "-t", "tensorrt-rtx", "--dry-run", "--device", device, "-o", tmp_path / "out")
    assert_one_error(result, ConfigError.exit_code, f"--device: expected cuda or cuda:N, found {device!r}")
    assert not (tmp_path / "out").exists()
