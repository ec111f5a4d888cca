"""What is done to the graph for ONNX Runtime: wide kernels over small maps become transposed ones, which compute the same; nothing else changes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.builders.onnxruntime_builder import transpose_wide_kernels
from modelcrate_converter.config import CONFIG_FOLDER, OnnxRuntimeOptions, load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.export import OnnxModel, save_onnx

Array = np.ndarray
METADATA = {"checkpoint": "ab" * 32, "model": "made-up"}
Node = onnx.NodeProto


def conv(source: str = "x", weights: str = "w", made: str = "y", *, name: str = "conv", **attributes: Any) -> Node:
    return helper.make_node("Conv", [source, weights], [made], name=name, **({"pads": [3] * 4} | attributes))


def kernel(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(
    folder: Path,
    *nodes: Node,
    constants: Mapping[str, Array],
    channels: int = 4,
    map_hw: tuple[int | str, int | str] = (8, 6),
    outputs: Mapping[str, tuple[int | str, ...]] | None = None,
) -> OnnxModel:
    """A graph of one's own from `x` to `y`, which has 2 channels and the same map unless it is said otherwise."""
    specs = {"x": ("batch", channels, *map_hw)} | dict(outputs or {"y": ("batch", 2, *map_hw)})
    first, *rest = (TensorSpec(name=name, dtype="float32", shape=tuple(shape)) for name, shape in specs.items())
    values = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in (first, *rest)]
    graph = helper.make_graph(list(nodes), "made", values[:1], values[1:], [numpy_helper.from_array(value, name) for name, value in constants.items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return save_onnx(proto, folder / "made.onnx", inputs=(first,), outputs=tuple(rest), metadata=METADATA)


def run(model: OnnxModel, x: Array, *, level: onnxruntime.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level, options.log_severity_level = 1, level, 4
    session = onnxruntime.InferenceSession(model.path.read_bytes(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {"x": x})
    return found


def sample(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def wide_kinds(place: Path) -> list[str]:
    """What the operators with kernels of 7x7 are in a bundle."""
    graph = onnx.load(place / "end2end.onnx").graph
    wide = {tensor.name for tensor in graph.initializer if list(tensor.dims[2:]) == [7, 7]}
    return [node.op_type for node in graph.node if wide & set(node.input)]


@settings(max_examples=60, deadline=None)
@given(
    kernel_hw=st.tuples(st.sampled_from([7, 9, 11]), st.sampled_from([7, 9, 11])),
    map_hw=st.tuples(st.integers(1, 24), st.integers(1, 18)),
    channels=st.integers(1, 20),
    results=st.integers(1, 20),
    batch=st.integers(1, 3),
    has_bias=st.booleans(),
)
def test_the_rewritten_graph_computes_the_same(
    kernel_hw: tuple[int, int], map_hw: tuple[int, int], channels: int, results: int, batch: int, has_bias: bool
) -> None:
    """Same sums in another order: within the rounding of float32, with and without ONNX Runtime's own rewriting."""
    constants = {"w": kernel(results, channels, *kernel_hw)} | ({"b": kernel(results)} if has_bias else {})
    node = conv(pads=[kernel_hw[0] // 2, kernel_hw[1] // 2] * 2)
    node.input.extend(["b"] if has_bias else [])
    with tempfile.TemporaryDirectory() as name:
        before = made(Path(name), node, constants=constants, channels=channels, map_hw=map_hw, outputs={"y": ("batch", results, *map_hw)})
        after = transpose_wide_kernels(before, workdir=Path(name))
        assert kinds(after.path) == ["ConvTranspose"]
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
        x = sample(batch, channels, *map_hw)
        wanted = run(before, x)[0]
        largest = np.abs(wanted).max()
        for level in (onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL):
            assert np.abs(run(after, x, level=level)[0] - wanted).max() <= 2e-6 * max(largest, 1)


def test_names_of_tensors_and_operators_stay(tmp_path: Path) -> None:
    """`bisect` finds tensors by their names."""
    chain = [conv(made="c", name="first"), helper.make_node("Relu", ["c"], ["r"], name="relu"), conv("r", "v", name="last")]
    before = made(tmp_path, *chain, constants={"w": kernel(3, 4, 7, 7), "v": kernel(2, 3, 7, 7)})
    after = transpose_wide_kernels(before, workdir=tmp_path)
    nodes = onnx.load(after.path).graph.node
    assert [(node.name, node.op_type, list(node.output)) for node in nodes] == [
        ("first", "ConvTranspose", ["c"]), ("relu", "Relu", ["r"]), ("last", "ConvTranspose", ["y"]),
    ]  # fmt: skip
    x = sample(2, 4, 8, 6)
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], atol=2e-4)


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    before = made(tmp_path, conv(), constants={"w": kernel(2, 4, 7, 7)})
    first = transpose_wide_kernels(before, workdir=tmp_path)
    assert transpose_wide_kernels(before, workdir=tmp_path).sha256 == first.sha256 != before.sha256
    assert {entry.key: entry.value for entry in onnx.load(first.path).metadata_props} == METADATA


def test_weights_in_a_constant_operator_are_weights(tmp_path: Path) -> None:
    """Old exporters write them so."""
    weights = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(kernel(2, 4, 7, 7)))
    before = made(tmp_path, weights, conv(), constants={})
    after = transpose_wide_kernels(before, workdir=tmp_path)
    assert kinds(after.path) == ["ConvTranspose"]
    x = sample(1, 4, 8, 6)
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("node", "weights", "map_hw", "result_hw"),
    [
        (conv(strides=[2, 2]), (2, 4, 7, 7), (8, 6), (4, 3)),
        (conv(dilations=[2, 2], pads=[6] * 4), (2, 4, 7, 7), (8, 6), (8, 6)),
        (conv(group=2), (2, 2, 7, 7), (8, 6), (8, 6)),
        (conv(pads=[0] * 4), (2, 4, 7, 7), (8, 9), (2, 3)),
        (conv(pads=[3, 3, 2, 3]), (2, 4, 7, 7), (8, 6), (7, 6)),
        (helper.make_node("Conv", ["x", "w"], ["y"]), (2, 4, 7, 7), (8, 9), (2, 3)),
        (helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), (2, 4, 7, 7), (8, 6), (8, 6)),
        (conv(pads=[2] * 4), (2, 4, 5, 5), (8, 6), (8, 6)),
        (conv(pads=[3, 2] * 2), (2, 4, 7, 5), (8, 6), (8, 6)),
        (conv(pads=[4] * 4), (2, 4, 8, 8), (8, 6), (9, 7)),
        (conv(), (2, 4, 7, 7), (25, 18), (25, 18)),
        (conv(), (2, 4, 7, 7), ("high", "wide"), ("high", "wide")),
    ],
    ids=["strided", "dilated", "grouped", "unpadded", "lopsided", "bare", "automatic", "narrow", "narrow-one-way", "even", "large-map", "any-map"],
)
def test_other_convolutions_stay_as_they_are(
    node: Node, weights: tuple[int, ...], map_hw: tuple[int | str, int | str], result_hw: tuple[int | str, int | str], tmp_path: Path
) -> None:
    before = made(tmp_path, node, constants={"w": kernel(*weights)}, map_hw=map_hw, outputs={"y": ("batch", weights[0], *result_hw)})
    assert transpose_wide_kernels(before, workdir=tmp_path) is before


def test_weights_that_something_else_reads_stay_as_they_are(tmp_path: Path) -> None:
    """Turned, they would be wrong for the other reader."""
    twice = made(tmp_path, conv(made="c", name="first"), conv("c", name="second"), constants={"w": kernel(2, 2, 7, 7)}, channels=2)
    assert transpose_wide_kernels(twice, workdir=tmp_path) is twice
    shown = made(tmp_path, conv(), constants={"w": kernel(2, 4, 7, 7)}, outputs={"y": ("batch", 2, 8, 6), "w": (2, 4, 7, 7)})
    assert transpose_wide_kernels(shown, workdir=tmp_path) is shown
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["inner"])], "branch", [], [helper.make_empty_tensor_value_info("inner")])
    choice = helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)
    inside = made(
        tmp_path, conv(), choice, constants={"w": kernel(2, 4, 7, 7), "yes": np.array(True)}, outputs={"y": ("batch", 2, 8, 6), "z": (2, 4, 7, 7)}
    )
    assert transpose_wide_kernels(inside, workdir=tmp_path) is inside


def test_weights_that_are_computed_stay_as_they_are(tmp_path: Path) -> None:
    """A quantised convolution reads what DequantizeLinear makes."""
    made_by = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"])
    constants = {"q": np.ones((2, 4, 7, 7), dtype=np.int8), "scale": np.array(0.5, dtype=np.float32)}
    before = made(tmp_path, made_by, conv(), constants=constants)
    assert transpose_wide_kernels(before, workdir=tmp_path) is before


def test_rtmposes_last_convolution_is_transposed(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """In float32 and beside INT8, which leaves it in float32; not where the deploy config says no, and not in float16, where it is for GPUs."""
    assert wide_kinds(demo_pose_bundle) == ["ConvTranspose"]
    targets = [load_config(name) for name in ("onnxruntime", "onnxruntime-int8", "onnxruntime-fp16")]
    targets[0] = msgspec.structs.replace(targets[0], onnxruntime=OnnxRuntimeOptions(transpose_wide_kernels=False))
    conversions = convert(DEMO_MODELS["demo-pose"], targets, ConvertOptions(out=tmp_path))
    assert [conversion.error for conversion in conversions] == [None] * 3
    assert [wide_kinds(conversion.place) for conversion in conversions] == [["Conv"], ["ConvTranspose"], ["Conv"]]


def test_the_bundle_says_what_it_said(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """The rewriting is the artefact's business: inputs, outputs and parity are those of the canonical graph."""
    (plain,) = convert(
        DEMO_MODELS["demo-pose"],
        [msgspec.structs.replace(load_config("onnxruntime"), onnxruntime=OnnxRuntimeOptions(transpose_wide_kernels=False))],
        ConvertOptions(out=tmp_path),
    )
    ours, theirs = Bundle.open(demo_pose_bundle).manifest, Bundle.open(plain.place).manifest
    assert ours is not None
    assert theirs is not None
    assert (ours.inputs, ours.outputs, ours.shape_ranges) == (theirs.inputs, theirs.outputs, theirs.shape_ranges)
    assert ours.parity.outputs[0].relative_linf < 1e-5


def test_a_target_of_ones_own_can_say_no(tmp_path: Path) -> None:
    text = (CONFIG_FOLDER / "onnxruntime.toml").read_text(encoding="utf-8")
    assert "transpose_wide_kernels = true" in text
    (tmp_path / "plain.toml").write_text(text.replace("transpose_wide_kernels = true", "transpose_wide_kernels = false"), encoding="utf-8")
    assert load_config(str(tmp_path / "plain.toml")).onnxruntime == OnnxRuntimeOptions(transpose_wide_kernels=False)
