"""INT8: the ranges are those of the values, the graph has them and nothing else, two backends read it alike, and what costs too much stays in float32."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from modelcrate_bundle.bundle import Bundle, sha256_of
from modelcrate_bundle.errors import BundleError, ExportError, ParityError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import DeployConfig, Gates, Int8Options, OnnxOptions, load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.export import OnnxModel, export_onnx, save_onnx
from modelcrate_converter.models.blueprints import classifier_shapes, heatmap_shapes, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.own_model import read_own_model
from modelcrate_converter.parity import network_inputs, procedural_images
from modelcrate_converter.people import procedural_scenes
from modelcrate_converter.progress import Event, Noted, StageStarted
from modelcrate_converter.quantization import Calibration, calibrate, dequantized, emit_int8, quantizable, sensitivities
from modelcrate_converter.simplify import simplify
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.sessions import SessionOptions, open_artefact

Array = np.ndarray
Weights = list[tuple[Array, Array]]
METHODS = ("minmax", "percentile", "mse")
BACKENDS = ("onnxruntime", "openvino")
KINDS = [Int8Options(activations=kind, quantize_results=results) for kind in ("uint8", "int8") for results in (True, False)]
METADATA = {"checkpoint": "ab" * 32, "model": "made-up"}
SPEC = 'task = "Network"\n[input]\nsize_hw = [16, 16]\nmean = [123.675, 116.28, 103.53]\nstd = [58.395, 57.12, 57.375]\n[resize]\nmode = "stretch"\n'


def kind_name(options: object) -> str:
    if not isinstance(options, Int8Options):
        return str(options)
    return f"{options.activations}{'' if options.quantize_results else '-inputs-only'}"


def random_chain(layers: int = 6, *, seed: int = 0) -> Weights:
    """Weights and biases of 3x3 convolutions from 3 channels over 8 to 4; ReLUs stand between them."""
    rng = np.random.default_rng(seed)
    ends = [(4 if i == layers - 1 else 8, 3 if i == 0 else 8) for i in range(layers)]
    return [
        ((rng.standard_normal((out, into, 3, 3)) * (2 / (9 * into)) ** 0.5).astype(np.float32), (0.1 * rng.standard_normal(out)).astype(np.float32))
        for out, into in ends
    ]


def scaled(weights: Weights, gain: float, *, channels: slice = slice(0, 1), at: int = 2) -> Weights:
    """The same function: what layer `at` makes in some channels is `gain` times larger, and the next layer reads it with 1 / gain."""
    changed = [(weight.copy(), bias.copy()) for weight, bias in weights]
    changed[at][0][channels] *= gain
    changed[at][1][channels] *= gain
    changed[at + 1][0][:, channels] /= gain
    return changed


def saved(weights: Weights, path: Path, *, opset: int = 17, named: bool = True) -> OnnxModel:
    """`conv0`, `relu0` ... with the tensors `c0`, `r0` ... between `input` and `output`, and the weights `w0`, `b0` ..."""
    nodes, initializers, last = [], [], "input"
    for i, (weight, bias) in enumerate(weights):
        is_last = i == len(weights) - 1
        initializers += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        made = "output" if is_last else f"c{i}"
        nodes.append(helper.make_node("Conv", [last, f"w{i}", f"b{i}"], [made], name=f"conv{i}" if named else "", pads=[1] * 4))
        if not is_last:
            nodes.append(helper.make_node("Relu", [made], [f"r{i}"], name=f"relu{i}" if named else ""))
            last = f"r{i}"
    return written(nodes, initializers, path, outputs={"output": len(weights[-1][0])}, opset=opset)


def written(nodes: list[Any], initializers: list[Any], path: Path, *, outputs: dict[str, int], opset: int = 17) -> OnnxModel:
    specs = {name: TensorSpec(name=name, dtype="float32", shape=("batch", count, 16, 16)) for name, count in ({"input": 3} | outputs).items()}
    values = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in specs.values()]
    graph = helper.make_graph(nodes, "made", values[:1], values[1:], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return save_onnx(proto, path, inputs=(specs.pop("input"),), outputs=tuple(specs.values()), metadata=METADATA)


def noise(count: int, *, hw: tuple[int, int] = (16, 16)) -> list[Array]:
    return list(np.random.default_rng(7).standard_normal((count, 1, 3, *hw)).astype(np.float32))


INPUTS = noise(4)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return saved(random_chain(), tmp_path_factory.mktemp("chain") / "chain.onnx")


@pytest.fixture(scope="module")
def ranges(chain: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return found(chain, INPUTS, tmp_path_factory.mktemp("ranges"), method="minmax")


def found(model: OnnxModel, inputs: list[Array], workdir: Path, **options: Any) -> Calibration:
    return calibrate(model, lambda: iter(inputs), Int8Options(**options), workdir=workdir)


def tensors(weights: Weights, inputs: list[Array]) -> dict[str, Array]:
    """What the tensors of a chain are, computed elsewhere."""
    values = {"input": torch.from_numpy(np.concatenate(inputs))}
    last = "input"
    for i, (weight, bias) in enumerate(weights):
        values[f"c{i}"] = functional.conv2d(values[last], torch.from_numpy(weight), torch.from_numpy(bias), padding=1)
        values[f"r{i}"] = torch.relu(values[f"c{i}"])
        last = f"r{i}"
    return {name: value.numpy() for name, value in values.items()}


def run(model: OnnxModel, inputs: list[Array], backend: str = "onnxruntime") -> dict[str, Array]:
    session = open_artefact(backend, {"net": model.path}, SessionOptions(precision="int8", threads=1), where=model.path.name)
    try:
        return session.run({model.inputs[0].name: np.concatenate(inputs)})
    finally:
        session.close()


def distance(ours: dict[str, Array], theirs: dict[str, Array]) -> float:
    """The largest relative L-inf of any output."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A convolution of a quantised graph, as its file says it: (scale, zero point) of what it reads and makes, or None, and its integer weights."""

    input: tuple[Array, Array] | None
    result: tuple[Array, Array] | None
    weight: tuple[Array, Array, Array] | None


def read_back(path: Path) -> dict[str, Read]:
    proto = onnx.load(path)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    made_by = {name: node for node in proto.graph.node for name in node.output}

    def parameters(node: onnx.NodeProto) -> tuple[Array, Array]:
        return values[node.input[1]], values[node.input[2]]

    def dequantized(name: str) -> onnx.NodeProto | None:
        node = made_by.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    read = {}
    for node in proto.graph.node:
        if node.op_type != "Conv":
            continue
        ours, weight = dequantized(node.input[0]), dequantized(node.input[1])
        after = [reader for reader in proto.graph.node if reader.op_type == "QuantizeLinear" and reader.input[0] == node.output[0]]
        if ours is not None:
            assert made_by[ours.input[0]].op_type == "QuantizeLinear"
            assert parameters(made_by[ours.input[0]]) == parameters(ours)
        read[node.name] = Read(
            input=parameters(ours) if ours is not None else None,
            result=parameters(after[0]) if after else None,
            weight=(values[weight.input[0]], *parameters(weight)) if weight is not None else None,
        )
    return read


# ----------------------------------------------------------------------------------------------------------------------- which


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxModel]:
    """Families that are exported, as small as they come."""
    shapes = {
        "pose": rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8),
        "detector": rtmdet_shapes(widen=0.0625, deepen=0.167, classes=3, separable=True),
        "heatmap": heatmap_shapes(widen=0.0625, deepen=0.167, keypoints=3, channels=16),
        "classifier": classifier_shapes(widen=0.0625, deepen=0.167, classes=4),
    }
    folder = tmp_path_factory.mktemp("networks")
    made = {}
    for name, table in shapes.items():
        (folder / name).mkdir()
        path = folder / f"{name}.pth"
        torch.save({"state_dict": random_weights(table, seed=1), "meta": {"cfg": "test_pipeline = [dict(type='Resize', scale=(96, 64))]"}}, path)
        made[name] = export_onnx(read_architecture(read_checkpoint(path)), OnnxOptions(), workdir=folder / name)
    return made


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("pose", ["/head/final_layer/Conv"]),
        ("detector", ["rtm_cls", "rtm_reg"]),
        ("heatmap", ["/head/final_layer/Conv"]),
        ("classifier", ["stage4.2/final_conv"]),
    ],
)
def test_every_convolution_but_the_last_ones_may_be_quantised(name: str, last: list[str], networks: dict[str, OnnxModel], tmp_path: Path) -> None:
    nodes = [node.name for node in onnx.load(networks[name].path).graph.node if node.op_type == "Conv"]
    kept = [node for node in nodes if any(word in node for word in last)]
    assert len(kept) == (6 if name == "detector" else 1)
    assert quantizable(networks[name]) == [node for node in nodes if node not in kept]
    if name == "pose":
        assert quantizable(simplify(networks[name], workdir=tmp_path, metadata=METADATA)) == quantizable(networks[name])


def test_a_convolution_before_another_is_not_the_last_though_its_result_is_an_output(tmp_path: Path) -> None:
    """Of two heads both are last; operators without names get some."""
    rng = np.random.default_rng(0)
    kernels = [numpy_helper.from_array(rng.standard_normal((3, 3, 1, 1)).astype(np.float32), f"w{i}") for i in range(4)]
    ends = [("input", "early"), ("early", "b"), ("b", "left"), ("b", "right")]
    nodes = [helper.make_node("Conv", [into, f"w{i}"], [out]) for i, (into, out) in enumerate(ends)]
    model = written(nodes, kernels, tmp_path / "heads.onnx", outputs={"early": 3, "left": 3, "right": 3})
    chosen = quantizable(model)
    assert len(chosen) == len(set(chosen)) == 2
    quantised = emit_int8(model, found(model, INPUTS, tmp_path), Int8Options(), workdir=tmp_path)
    assert [layer.weight is None for layer in read_back(quantised.path).values()] == [False, False, True, True]
    assert 0 < distance(run(quantised, INPUTS), run(model, INPUTS)) < 0.05


@pytest.mark.parametrize("layers", [0, 1])
def test_without_a_convolution_to_quantise_it_says_so(layers: int, tmp_path: Path) -> None:
    model = written([helper.make_node("Relu", ["input"], ["output"])], [], tmp_path / "none.onnx", outputs={"output": 3})
    if layers:
        model = saved(random_chain(1), tmp_path / "one.onnx")
    assert quantizable(model) == []
    with pytest.raises(ExportError, match="expected convolutions to quantise, found none but the last") as caught:
        found(model, INPUTS, tmp_path)
    assert "float target" in caught.value.hint


# ----------------------------------------------------------------------------------------------------------------- calibration


def test_minmax_is_the_least_and_the_greatest_value_with_zero_among_them(chain: OnnxModel, tmp_path: Path) -> None:
    for inputs in (INPUTS, [np.abs(value) + 2 for value in INPUTS], [-np.abs(value) - 2 for value in INPUTS]):
        calibration = found(chain, inputs, tmp_path, method="minmax")
        values = tensors(random_chain(), inputs)
        assert set(calibration.ranges) == {"input", *(f"c{i}" for i in range(5)), *(f"r{i}" for i in range(4))}
        assert calibration.inputs == len(inputs)
        for name, ends in calibration.ranges.items():
            np.testing.assert_allclose(ends, (min(values[name].min(), 0), max(values[name].max(), 0)), rtol=1e-5, atol=1e-5, err_msg=name)
    assert list(tmp_path.iterdir()) == []


def test_a_percentile_keeps_its_share_and_cuts_both_ends_alike(chain: OnnxModel, tmp_path: Path) -> None:
    ends = found(chain, INPUTS, tmp_path, percentile=90).ranges
    values = tensors(random_chain(), INPUTS)
    low, high = ends["input"]
    below, above = (values["input"] < low).mean(), (values["input"] > high).mean()
    assert 0.045 < below <= 0.05
    assert 0.045 < above <= 0.05
    assert ends["r0"][0] == 0, "nothing to cut where nothing is less than zero"
    assert 0.045 < (values["r0"] > ends["r0"][1]).mean() <= 0.05
    everything = found(chain, INPUTS, tmp_path, percentile=100).ranges
    assert everything == found(chain, INPUTS, tmp_path, method="minmax").ranges


def test_a_percentile_cuts_an_outlier_off(tmp_path: Path) -> None:
    """One pixel of the input and one weight, which makes a whole channel large in two images of 16."""
    inputs = [value.copy() for value in noise(16)]
    inputs[3][0, 1, 5, 6] = 200
    model = saved(random_chain(), tmp_path / "outlier.onnx")
    widest, cut = (found(model, inputs, tmp_path, method="minmax").ranges, found(model, inputs, tmp_path, percentile=99).ranges)
    assert widest["input"][1] == 200
    assert 2 < cut["input"][1] < 5
    assert widest["c0"][1] - widest["c0"][0] > 5 * (cut["c0"][1] - cut["c0"][0])
    assert all(widest[name][0] <= low <= high <= widest[name][1] for name, (low, high) in cut.items())


def test_the_least_square_error_lies_between_a_cut_and_the_ends(chain: OnnxModel, tmp_path: Path) -> None:
    inputs = list(np.random.default_rng(0).laplace(size=(64, 1, 3, 16, 16)).astype(np.float32))
    values = np.concatenate(inputs)
    ends = {name: found(chain, inputs, tmp_path, method=name, percentile=99).ranges["input"] for name in METHODS}
    widths = {name: high - low for name, (low, high) in ends.items()}
    assert widths["percentile"] < widths["mse"] < widths["minmax"]

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        zero = round(-low / step)
        return float(np.square((np.clip(np.round(values / step) + zero, 0, 255) - zero) * step - values).mean())

    errors = {name: error(*pair) for name, pair in ends.items()}
    assert errors["mse"] < 0.95 * errors["minmax"]
    assert errors["mse"] < 0.5 * errors["percentile"]


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_the_same_each_time_and_survives_its_file(chain: OnnxModel, tmp_path: Path, method: str) -> None:
    asked = []

    def inputs() -> Iterator[Array]:
        asked.append(len(asked))
        yield from INPUTS

    first, second = (calibrate(chain, inputs, Int8Options(method=method, percentile=99), workdir=tmp_path) for _ in range(2))
    assert first == second
    assert len(asked) == (2 if method == "minmax" else 4)
    assert (first.method, first.percentile, first.inputs) == (method, 99, 4)
    assert msgspec.json.decode(msgspec.json.encode(first), type=Calibration) == first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.0, -3.0])
def test_a_tensor_that_is_always_the_same_has_a_range_and_a_graph(tmp_path: Path, method: str, level: float) -> None:
    weights = random_chain()
    weights[1] = (np.zeros_like(weights[1][0]), np.full(8, level, dtype=np.float32))
    model = saved(weights, tmp_path / "constant.onnx")
    calibration = found(model, INPUTS, tmp_path, method=method)
    low, high = calibration.ranges["c1"]
    assert (low, high) == (level, 0)
    assert calibration.ranges["r1"] == (0, 0), "ReLU leaves nothing of it"
    for kind in ("uint8", "int8"):
        quantised = emit_int8(model, calibration, Int8Options(activations=kind), workdir=tmp_path)
        for backend in BACKENDS:
            assert distance(run(quantised, INPUTS, backend), run(model, INPUTS)) < 0.05, backend


def test_small_tensors_have_ranges_too(tmp_path: Path) -> None:
    """A layer whose values are all around 1e-8 loses no more than any other."""
    plain, small = saved(random_chain(), tmp_path / "plain.onnx"), saved(scaled(random_chain(), 2.0**-27, channels=slice(None)), tmp_path / "small.onnx")
    expected = run(plain, INPUTS)
    assert distance(run(small, INPUTS), expected) < 1e-5
    moved = [
        distance(run(emit_int8(model, found(model, INPUTS, tmp_path, method="minmax"), Int8Options(), workdir=tmp_path), INPUTS), expected)
        for model in (plain, small)
    ]
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


def test_no_inputs_are_refused(chain: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"chain\.onnx: expected inputs .* found none"):
        found(chain, [], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(chain: OnnxModel, tmp_path: Path, method: str, level: float) -> None:
    inputs = [value.copy() for value in INPUTS]
    inputs[2][0, 0, 3, 4] = level
    with pytest.raises(ExportError, match=r"chain\.onnx: \w+: expected finite values") as caught:
        found(chain, inputs, tmp_path, method=method)
    assert caught.value.hint


# ------------------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("options", KINDS, ids=kind_name)
def test_the_graph_is_standard_onnx_with_float_ends(chain: OnnxModel, ranges: Calibration, options: Int8Options, tmp_path: Path) -> None:
    quantised = emit_int8(chain, ranges, options, workdir=tmp_path)
    proto = onnx.load(quantised.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert proto.ir_version <= 9
    before = onnx.load(chain.path).graph
    for ours, theirs in ((proto.graph.input, before.input), (proto.graph.output, before.output)):
        assert list(ours) == list(theirs)
        assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in ours)
    assert (quantised.inputs, quantised.outputs, quantised.opset) == (chain.inputs, chain.outputs, 17)
    assert {entry.key: entry.value for entry in proto.metadata_props} == METADATA
    assert quantised.sha256 == hashlib.sha256(quantised.path.read_bytes()).hexdigest()
    assert quantised.op_counts["Conv"] == 6
    assert quantised.op_counts["QuantizeLinear"] == (10 if options.quantize_results else 5)


@pytest.mark.parametrize("options", KINDS, ids=kind_name)
def test_activations_have_the_ranges_of_the_calibration(chain: OnnxModel, ranges: Calibration, options: Int8Options, tmp_path: Path) -> None:
    read = read_back(emit_int8(chain, ranges, options, workdir=tmp_path).path)
    assert list(read) == [f"conv{i}" for i in range(6)]
    assert read["conv5"] == Read(input=None, result=None, weight=None)
    for i in range(5):
        layer = read[f"conv{i}"]
        assert layer.input is not None
        assert (layer.result is not None) == options.quantize_results
        pairs = [(layer.input, ranges.ranges[f"r{i - 1}" if i else "input"])] + ([(layer.result, ranges.ranges[f"c{i}"])] if layer.result else [])
        for (scale, zero), (low, high) in pairs:
            assert scale.dtype == np.float32
            assert scale.shape == zero.shape == ()
            assert zero.dtype == np.dtype(options.activations)
            if options.activations == "uint8":
                assert scale == pytest.approx((high - low) / 255, rel=1e-4)
                assert -float(zero) * scale == pytest.approx(low, abs=0.51 * float(scale))
            else:
                assert zero == 0
                assert scale == pytest.approx(max(-low, high) / 127, rel=1e-2)


@pytest.mark.parametrize("options", KINDS, ids=kind_name)
def test_weights_are_int8_per_channel_and_within_half_a_step(chain: OnnxModel, ranges: Calibration, options: Int8Options, tmp_path: Path) -> None:
    read = read_back(emit_int8(chain, ranges, options, workdir=tmp_path).path)
    for i, (weight, _) in enumerate(random_chain()[:5]):
        quantised = read[f"conv{i}"].weight
        assert quantised is not None
        values, scale, zero = quantised
        assert (values.dtype, values.shape) == (np.int8, weight.shape)
        assert (zero.dtype, zero.tolist()) == (np.int8, [0] * 8)
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=(1, 2, 3)) / 127, rtol=0.01)
        steps = scale[:, None, None, None]
        assert (np.abs(values * steps - weight) <= 0.5001 * steps).all()


def test_a_weight_that_is_huge_costs_its_own_channel_alone(tmp_path: Path) -> None:
    weights = random_chain()
    weights[1][0][3, 2, 1, 1] = 1000
    model = saved(weights, tmp_path / "huge.onnx")
    quantised = read_back(emit_int8(model, found(model, INPUTS, tmp_path), Int8Options(), workdir=tmp_path).path)["conv1"].weight
    assert quantised is not None
    values, scale, _ = quantised
    steps = scale[:, None, None, None]
    assert scale[3] > 100 * np.delete(scale, 3).max()
    assert (np.abs(values * steps - weights[1][0]) <= 0.5001 * steps).all()


def test_layers_can_be_left_out_and_taken_alone(chain: OnnxModel, ranges: Calibration, tmp_path: Path) -> None:
    originals = {f"w{i}": weight for i, (weight, _) in enumerate(random_chain())}
    choices: list[tuple[set[str], dict[str, Any]]] = [({"conv0", "conv2", "conv4"}, {"leave_out": ["conv1", "conv3"]}), ({"conv3"}, {"only": "conv3"})]
    for names, choice in choices:
        model = emit_int8(chain, ranges, Int8Options(), workdir=tmp_path, **choice)
        read = read_back(model.path)
        assert {name for name, layer in read.items() if layer.weight} == names
        assert {name for name, layer in read.items() if layer.input} == names
        assert {name for name, layer in read.items() if layer.result} == names
        kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(model.path).graph.initializer}
        for i in range(6):
            assert (f"w{i}" in kept) == (f"conv{i}" not in names)
            if f"w{i}" in kept:
                np.testing.assert_array_equal(kept[f"w{i}"], originals[f"w{i}"])


def test_leaving_out_all_of_them_is_refused(chain: OnnxModel, ranges: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"chain\.onnx: expected convolutions to quantise, found all of them left out"):
        emit_int8(chain, ranges, Int8Options(), workdir=tmp_path, leave_out=quantizable(chain))


def test_two_graphs_are_the_same_bytes_and_smaller(networks: dict[str, OnnxModel], tmp_path: Path) -> None:
    model = networks["pose"]
    calibration = found(model, noise(2, hw=(64, 64)), tmp_path)
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        made.append(emit_int8(model, calibration, Int8Options(), workdir=tmp_path / name))
    assert made[0].path != made[1].path
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert str(tmp_path).encode() not in made[0].path.read_bytes()
    assert made[0].path.stat().st_size < 0.8 * model.path.stat().st_size


@pytest.mark.parametrize("level", [logging.DEBUG, 37])
def test_nothing_is_said_and_the_loggers_stay_as_they_were(
    chain: OnnxModel, ranges: Calibration, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    monkeypatch.setattr(logging.root, "level", level)
    emit_int8(chain, ranges, Int8Options(), workdir=tmp_path)
    assert logging.root.level == level
    assert caplog.records == []
    with pytest.raises(ExportError, match=r"chain\.onnx: expected ONNX Runtime's quantiser to write a graph, found: ") as caught:
        emit_int8(chain, msgspec.structs.replace(ranges, ranges={}), Int8Options(), workdir=tmp_path)
    assert "\n" not in str(caught.value)
    assert logging.root.level == level
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [11, 12, 13, 19])
def test_graphs_of_other_opsets_become_valid_ones(opset: int, tmp_path: Path) -> None:
    """Somebody's ONNX file stays in its opset."""
    model = saved(random_chain(), tmp_path / "theirs.onnx", opset=opset)
    quantised = emit_int8(model, found(model, INPUTS, tmp_path), Int8Options(), workdir=tmp_path)
    proto = onnx.load(quantised.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert quantised.op_counts["QuantizeLinear"] == 10
    for backend in BACKENDS:
        assert 0 < distance(run(quantised, INPUTS, backend), run(model, INPUTS)) < 0.2


# ------------------------------------------------------------------------------------------------------------------ taken apart


SIGNED = [Int8Options(activations="int8", quantize_results=results) for results in (True, False)]


def rounded(weights: Weights, path: Path) -> Weights:
    """The weights of a chain as the quantised graph has them."""
    read = read_back(path)
    made = []
    for i, (weight, bias) in enumerate(weights):
        quantised = read[f"conv{i}"].weight
        made.append((weight if quantised is None else (quantised[0] * quantised[1][:, None, None, None]).astype(np.float32), bias))
    return made


def is_float(model: OnnxModel) -> bool:
    """Whether nothing of the quantisation is left: no operator, and no constant of another type."""
    graph = onnx.load(model.path).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    return kinds == {TensorProto.FLOAT} and not any("quantize" in node.op_type.lower() for node in graph.node)


@pytest.mark.parametrize("options", SIGNED, ids=kind_name)
def test_a_graph_that_is_taken_apart_is_the_float_one_with_its_weights_rounded(
    chain: OnnxModel, ranges: Calibration, options: Int8Options, tmp_path: Path
) -> None:
    quantised = emit_int8(chain, ranges, options, workdir=tmp_path)
    apart, convolutions = dequantized(quantised, workdir=tmp_path)
    onnx.checker.check_model(onnx.load(apart.path), full_check=True)
    assert is_float(apart)
    assert (apart.inputs, apart.outputs, apart.opset) == (chain.inputs, chain.outputs, chain.opset)
    assert apart.op_counts == chain.op_counts
    assert {entry.key: entry.value for entry in onnx.load(apart.path).metadata_props} == METADATA
    weights = rounded(random_chain(), quantised.path)
    assert distance(run(apart, INPUTS), run(saved(weights, tmp_path / "rounded.onnx"), INPUTS)) < 1e-6
    assert 1e-4 < distance(run(apart, INPUTS), run(chain, INPUTS)) < 0.1
    # What a backend needs to quantise it again: the same weights, and the same scales of what they read.
    read = read_back(quantised.path)
    assert len(convolutions) == 5
    for i, convolution in enumerate(convolutions):
        np.testing.assert_array_equal(convolution.weights, weights[i][0])
        layer = read[f"conv{i}"].input
        assert layer is not None
        assert convolution.scale == float(layer[0])


def test_a_family_is_taken_apart_too(networks: dict[str, OnnxModel], tmp_path: Path) -> None:
    model = networks["detector"]
    inputs = noise(2, hw=(64, 96))
    quantised = emit_int8(model, found(model, inputs, tmp_path), SIGNED[1], workdir=tmp_path)
    apart, convolutions = dequantized(quantised, workdir=tmp_path)
    assert is_float(apart)
    assert apart.op_counts == {kind: count for kind, count in model.op_counts.items() if kind != "Constant"}
    assert len(convolutions) == len(quantizable(model))
    assert 1e-4 < distance(run(apart, inputs), run(model, inputs)) < 0.1


@pytest.mark.parametrize("options", SIGNED, ids=kind_name)
def test_a_pair_before_an_output_leaves_the_output(options: Int8Options, tmp_path: Path) -> None:
    """Its name stays, and so does what the next layer reads."""
    weights = random_chain(3)
    kernels = [numpy_helper.from_array(value, f"{name}{i}") for i, pair in enumerate(weights) for name, value in zip("wb", pair, strict=True)]
    ends = [("input", "early"), ("early", "b"), ("b", "late")]
    nodes = [helper.make_node("Conv", [into, f"w{i}", f"b{i}"], [out], name=f"conv{i}", pads=[1] * 4) for i, (into, out) in enumerate(ends)]
    model = written(nodes, kernels, tmp_path / "early.onnx", outputs={"early": 8, "late": 4})
    quantised = emit_int8(model, found(model, INPUTS, tmp_path), options, workdir=tmp_path)
    assert "early" in {name for node in onnx.load(quantised.path).graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    apart, convolutions = dequantized(quantised, workdir=tmp_path)
    onnx.checker.check_model(onnx.load(apart.path), full_check=True)
    assert is_float(apart)
    assert [value.name for value in onnx.load(apart.path).graph.output] == ["early", "late"]
    ours, theirs = run(apart, INPUTS), run(model, INPUTS)
    assert 0 < distance(ours, theirs) < 0.02
    assert len(convolutions) == 2


@pytest.mark.parametrize("options", SIGNED, ids=kind_name)
def test_a_convolution_that_was_left_out_is_not_among_them(options: Int8Options, tmp_path: Path) -> None:
    """Though what it reads is quantised, since another convolution reads it too; nor is a last one."""
    kernels = [numpy_helper.from_array(np.random.default_rng(i).standard_normal((3, 3, 1, 1)).astype(np.float32), f"w{i}") for i in range(5)]
    ends = [("input", "a"), ("a", "b"), ("a", "c"), ("b", "left"), ("c", "right")]
    nodes = [helper.make_node("Conv", [into, f"w{i}"], [out], name=f"conv{i}") for i, (into, out) in enumerate(ends)]
    model = written(nodes, kernels, tmp_path / "branches.onnx", outputs={"left": 3, "right": 3})
    quantised = emit_int8(model, found(model, INPUTS, tmp_path), options, workdir=tmp_path, leave_out=["conv2"])
    assert [name for name, layer in read_back(quantised.path).items() if layer.weight] == ["conv0", "conv1"]
    apart, convolutions = dequantized(quantised, workdir=tmp_path)
    assert len(convolutions) == 2
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(apart.path).graph.initializer}
    for i in (2, 3, 4):
        np.testing.assert_array_equal(kept[f"w{i}"], numpy_helper.to_array(kernels[i]))
        assert not any(np.array_equal(convolution.weights, kept[f"w{i}"]) for convolution in convolutions)


def test_convolutions_that_share_their_weights_have_a_scale_each(tmp_path: Path) -> None:
    weights = random_chain(4)
    weights[2] = weights[1]
    model = saved(weights, tmp_path / "shared.onnx")
    proto = onnx.load(model.path)
    for node in proto.graph.node:
        if node.name == "conv2":
            node.input[1] = "w1"
    del proto.graph.initializer[4]
    model = save_onnx(proto, model.path, inputs=model.inputs, outputs=model.outputs, metadata=METADATA)
    quantised = emit_int8(model, found(model, INPUTS, tmp_path), SIGNED[1], workdir=tmp_path)
    apart, convolutions = dequantized(quantised, workdir=tmp_path)
    assert is_float(apart)
    assert len(convolutions) == 3
    np.testing.assert_array_equal(convolutions[1].weights, convolutions[2].weights)
    assert convolutions[1].scale != convolutions[2].scale


# --------------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in ("chain", "pose") for options in KINDS] + [("detector", Int8Options())], ids=kind_name
)
def test_two_backends_compute_nearly_what_float32_does(
    name: str, options: Int8Options, chain: OnnxModel, networks: dict[str, OnnxModel], tmp_path: Path
) -> None:
    model = chain if name == "chain" else networks[name]
    _, _, height, width = model.inputs[0].shape
    assert isinstance(height, int)
    assert isinstance(width, int)
    inputs = noise(2, hw=(height, width))
    calibration = found(model, inputs, tmp_path)
    quantised = emit_int8(model, calibration, options, workdir=tmp_path)
    expected = run(model, inputs)
    for backend in BACKENDS:
        ours = run(quantised, inputs, backend)
        assert all((ours[spec].shape, ours[spec].dtype) == (value.shape, value.dtype) for spec, value in expected.items())
        assert 1e-4 < distance(ours, expected) < 0.3, backend


# ------------------------------------------------------------------------------------------------------------- what costs most


@pytest.mark.parametrize("results", [True, False])
def test_the_layer_that_reads_an_enormous_range_costs_most(results: bool, chain: OnnxModel, ranges: Calibration, tmp_path: Path) -> None:
    options = Int8Options(method="minmax", quantize_results=results)
    hard = saved(scaled(random_chain(), 1000), tmp_path / "hard.onnx")
    assert distance(run(hard, INPUTS), run(chain, INPUTS)) < 1e-5, "in float32 it is the same function"
    before = sensitivities(chain, ranges, options, INPUTS, workdir=tmp_path)
    calibration = found(hard, INPUTS, tmp_path, method="minmax")
    after = sensitivities(hard, calibration, options, INPUTS, workdir=tmp_path)
    for ranked in (before, after):
        assert sorted(item.layer for item in ranked) == quantizable(chain)
        errors = [item.error for item in ranked]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] > 0
    assert before[0].layer != "conv3"
    assert before[0].error < 0.1
    assert after[0].layer == "conv3"
    assert after[0].error > 0.5
    # The layer that makes it costs as much as the one that reads it only where results are quantised.
    assert {item.layer for item in after if item.error > 0.5} == ({"conv2", "conv3"} if results else {"conv3"})
    alone = emit_int8(hard, calibration, options, workdir=tmp_path, only="conv3")
    assert after[0].error == pytest.approx(distance(run(alone, INPUTS), run(hard, INPUTS)), rel=1e-3)


@dataclasses.dataclass(kw_only=True)
class Searched:
    """One conversion of a chain, with what was reported of it."""

    conversion: Conversion
    events: list[Event]
    canonical: OnnxModel
    spec: Path

    @property
    def stages(self) -> list[str]:
        return [event.name for event in self.events if isinstance(event, StageStarted)]

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Noted) and "float32" in event.text]


Convert = Callable[..., Searched]


@pytest.fixture
def convert_chain(tmp_path: Path) -> Convert:
    def do(weights: Weights, *, gate: float, backend: str = "onnxruntime", verify: bool = True, **int8: Any) -> Searched:
        canonical = saved(weights, tmp_path / "chain.onnx")
        (tmp_path / "chain.toml").write_text(SPEC)
        config = DeployConfig(
            target="small-int8", backend=backend, precision="int8", onnx=OnnxOptions(simplify=False), gates=Gates(relative_linf=gate),
            int8=Int8Options(**({"scenes": 2, "method": "minmax"} | int8)),
        )  # fmt: skip
        events: list[Event] = []
        options = ConvertOptions(out=tmp_path / "out", spec=tmp_path / "chain.toml", verify=verify)
        (conversion,) = convert(canonical.path, [config], options, events.append)
        return Searched(conversion=conversion, events=events, canonical=canonical, spec=options.spec or Path())

    return do


def is_empty(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


def built(searched: Searched) -> Bundle:
    assert searched.conversion.error is None
    assert searched.conversion.status == "built"
    bundle = Bundle.open(searched.conversion.place)
    bundle.verify()
    return bundle


HARD = scaled(random_chain(8), 1000)


@pytest.mark.parametrize(("results", "left_out"), [(True, ["conv2", "conv3"]), (False, ["conv3"])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_that_break_the_gates_stay_in_float32(convert_chain: Convert, backend: str, results: bool, left_out: list[str]) -> None:
    searched = convert_chain(HARD, gate=0.15, backend=backend, quantize_results=results)
    bundle = built(searched)
    (note,) = searched.notes
    assert note.startswith(f"{len(left_out)} of 7 convolutions stay in float32: ")
    assert sorted(note.rpartition(": ")[2].split(", ")) == left_out
    assert searched.stages.count("search sensitive layers") == 1
    assert searched.stages.count("build small-int8") == 1 + len(left_out), "twice as many each time"
    if backend == "onnxruntime":
        read = read_back(bundle.path_of("end2end.onnx"))
        assert [name for name, layer in read.items() if layer.weight is None] == [*left_out, "conv7"]
    # The parity on record is that of the network in the bundle.
    assert bundle.manifest is not None
    record = bundle.manifest.parity
    assert record == searched.conversion.parity
    assert record.verified
    (figure,) = record.outputs
    reference = read_own_model(searched.spec, path=searched.canonical.path, builder=None, name=None, sha256=None)
    inputs = list(network_inputs(reference, procedural_images()))
    session = open_artefact(backend, {role: bundle.path_of(name) for role, name in networks_of(bundle).items()}, SessionOptions(precision="int8"), where="it")
    assert figure.relative_linf == pytest.approx(distance(session.run({"input": np.concatenate(inputs)}), run(searched.canonical, inputs)), rel=1e-3)
    session.close()
    assert 0 < figure.relative_linf <= 0.15
    assert figure.passed


def networks_of(bundle: Bundle) -> dict[str, str]:
    assert bundle.manifest is not None
    return {entry.role: entry.path for entry in bundle.manifest.files if entry.role in {"net", "weights"}}


def test_what_is_inside_its_gates_is_not_searched(convert_chain: Convert) -> None:
    searched = convert_chain(random_chain(), gate=0.15)
    read = read_back(built(searched).path_of("end2end.onnx"))
    assert [name for name, layer in read.items() if layer.weight is None] == ["conv5"]
    assert "search sensitive layers" not in searched.stages
    assert searched.notes == []


def test_gates_that_nothing_meets_leave_no_bundle(convert_chain: Convert, tmp_path: Path) -> None:
    searched = convert_chain(random_chain(), gate=1e-7)
    assert searched.conversion.status == "failed"
    assert isinstance(searched.conversion.error, ParityError)
    assert "output" in str(searched.conversion.error)
    assert searched.conversion.parity is not None
    assert not searched.conversion.parity.passed
    assert "search sensitive layers" in searched.stages
    assert is_empty(tmp_path / "out")
    assert searched.notes == [], "nothing stays anywhere where nothing is written"


def test_a_search_that_is_off_is_not_made(convert_chain: Convert, tmp_path: Path) -> None:
    searched = convert_chain(HARD, gate=0.15, search=False)
    assert isinstance(searched.conversion.error, ParityError)
    assert "search sensitive layers" not in searched.stages
    assert searched.stages.count("build small-int8") == 1
    assert is_empty(tmp_path / "out")


def test_without_verification_there_is_nothing_to_search_for(convert_chain: Convert) -> None:
    searched = convert_chain(HARD, gate=0.15, verify=False)
    manifest = built(searched).manifest
    assert manifest is not None
    assert manifest.parity.verified is False
    assert "search sensitive layers" not in searched.stages


def test_the_only_layer_is_not_left_out(convert_chain: Convert, tmp_path: Path) -> None:
    """A bundle that says INT8 has something in INT8: two convolutions, of which one may be quantised, fail as gates fail."""
    searched = convert_chain(random_chain(2), gate=1e-7)
    assert isinstance(searched.conversion.error, ParityError)
    assert is_empty(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------------ the bundle


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_has_its_calibration_and_says_int8(convert_chain: Convert, method: str, tmp_path: Path) -> None:
    searched = convert_chain(random_chain(), gate=0.5, method=method)
    bundle = built(searched)
    manifest = bundle.manifest
    assert manifest is not None
    assert (manifest.precision, bundle.model.precision, manifest.target) == ("int8", "INT8", "small-int8")
    (entry,) = (entry for entry in manifest.files if entry.role == "calibration")
    path = bundle.path_of("calibration.json")
    assert (entry.path, entry.bytes, entry.sha256) == ("calibration.json", path.stat().st_size, sha256_of(path))
    calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    assert (calibration.method, calibration.percentile, calibration.inputs) == (method, 99.99, 2)
    assert set(calibration.ranges) == {"input", *(f"c{i}" for i in range(5)), *(f"r{i}" for i in range(4))}
    for i, layer in enumerate(read_back(bundle.path_of("end2end.onnx")).values()):
        for name, parameters in ((f"r{i - 1}" if i else "input", layer.input), (f"c{i}", layer.result)):
            if i == 5:
                assert parameters is None
                continue
            assert parameters is not None
            low, high = calibration.ranges[name]
            assert parameters[0] == pytest.approx((high - low) / 255, rel=1e-4)
    assert len(path.read_text().splitlines()) > 10, "it is for reading too"
    shutil.copytree(bundle.root, tmp_path / "changed")
    (tmp_path / "changed" / "calibration.json").write_text(path.read_text().replace(method, "minimax"))
    with pytest.raises(BundleError, match=r"calibration\.json"):
        Bundle.open(tmp_path / "changed").verify()


def test_two_conversions_are_the_same_files(convert_chain: Convert, tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        place = convert_chain(HARD, gate=0.15, method="percentile").conversion.place
        place.rename(tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "manifest.json"})
    assert made[0] == made[1]
    assert "calibration.json" in made[0]


def test_a_network_that_overflows_is_one_error(convert_chain: Convert, tmp_path: Path) -> None:
    weights = random_chain()
    for layer in (1, 3):
        weights[layer][0][:] *= 1e30
    searched = convert_chain(weights, gate=0.5, method="percentile")
    assert isinstance(searched.conversion.error, ExportError)
    assert "finite" in str(searched.conversion.error)
    assert is_empty(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------------- the tasks


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """The trained models: name -> precision or backend -> bundle."""
    out = tmp_path_factory.mktemp("demos")
    made: dict[str, dict[str, Path]] = {}
    for name, scenes in (("demo-pose", 8), ("demo-det", 4)):
        configs = [load_config("onnxruntime")]
        configs += [
            msgspec.structs.replace(c, int8=msgspec.structs.replace(c.int8, scenes=scenes)) for c in map(load_config, ("onnxruntime-int8", "openvino-int8"))
        ]
        conversions = convert(DEMO_MODELS[name], configs, ConvertOptions(out=out, name=name))
        assert [conversion.error for conversion in conversions] == [None] * 3
        made[name] = {conversion.target.removesuffix("-int8") if conversion.target != "onnxruntime" else "fp32": conversion.place for conversion in conversions}
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_keypoints_in_int8_are_where_they_are_in_float32(demos: dict[str, dict[str, Path]], backend: str) -> None:
    shifts = []
    with PoseDetector(demos["demo-pose"]["fp32"]) as reference, PoseDetector(demos["demo-pose"][backend]) as estimator:
        for _, image, box in procedural_scenes(16):
            ours, theirs = (one.estimate(image, box[None]).keypoints_xy for one in (estimator, reference))
            shifts.append(np.linalg.norm(ours - theirs, axis=2))
    assert 0 < np.mean(shifts) < 1.5
    assert np.median(shifts) < 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_in_int8_are_where_they_are_in_float32(demos: dict[str, dict[str, Path]], backend: str) -> None:
    shifts = []
    with Detector(demos["demo-det"]["fp32"]) as reference, Detector(demos["demo-det"][backend]) as detector:
        for _, image, _ in procedural_scenes(8):
            ours, theirs = detector.detect(image), reference.detect(image)
            for box, label, score in zip(theirs.boxes_xyxy, theirs.labels, theirs.scores, strict=True):
                if score < 0.5:
                    continue
                near = [
                    float(np.abs(box - own).max())
                    for own, its in zip(ours.boxes_xyxy[ours.scores > 0.3], ours.labels[ours.scores > 0.3], strict=True)
                    if its == label
                ]
                shifts.append(min(near, default=np.inf))
    assert len(shifts) >= 12
    assert 0 < np.mean(shifts) < 3
    assert max(shifts) < 16


@pytest.mark.parametrize(("name", "task"), [("demo-pose", "PoseDetector"), ("demo-det", "Detector")])
def test_bundles_of_the_demos_are_whole_and_smaller(demos: dict[str, dict[str, Path]], name: str, task: str) -> None:
    sizes = {}
    for key, place in demos[name].items():
        bundle = Bundle.open(place)
        bundle.verify()
        assert bundle.manifest is not None
        assert (bundle.manifest.task, bundle.manifest.precision) == (task, "fp32" if key == "fp32" else "int8")
        assert bundle.manifest.parity.passed
        assert (place / "calibration.json").is_file() == (key != "fp32")
        sizes[key] = sum(bundle.path_of(file).stat().st_size for file in networks_of(bundle).values())
    assert sizes["onnxruntime"] < 0.7 * sizes["fp32"]
