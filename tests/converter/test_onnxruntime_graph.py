"""What is done to the graph for ONNX Runtime computes the same: wide kernels over small maps become transposed ones, portraits lie on their side."""

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
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.config import CONFIG_FOLDER, OnnxRuntimeOptions, load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.export import OnnxModel, save_onnx
from modelcrate_converter.models.blueprints import heatmap_shapes, random_weights
from modelcrate_converter.onnxruntime_graph import suit

Array = np.ndarray
WIDE = OnnxRuntimeOptions(lay_portraits_down=False)
DOWN = OnnxRuntimeOptions(transpose_wide_kernels=False)
PLAIN = OnnxRuntimeOptions(transpose_wide_kernels=False, lay_portraits_down=False)
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
def test_transposed_kernels_compute_the_same(
    kernel_hw: tuple[int, int], map_hw: tuple[int, int], channels: int, results: int, batch: int, has_bias: bool
) -> None:
    """Same sums in another order: within the rounding of float32, with and without ONNX Runtime's own rewriting."""
    constants = {"w": kernel(results, channels, *kernel_hw)} | ({"b": kernel(results)} if has_bias else {})
    node = conv(pads=[kernel_hw[0] // 2, kernel_hw[1] // 2] * 2)
    node.input.extend(["b"] if has_bias else [])
    with tempfile.TemporaryDirectory() as name:
        before = made(Path(name), node, constants=constants, channels=channels, map_hw=map_hw, outputs={"y": ("batch", results, *map_hw)})
        after = suit(before, WIDE, workdir=Path(name))
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
    after = suit(before, WIDE, workdir=tmp_path)
    nodes = onnx.load(after.path).graph.node
    assert [(node.name, node.op_type, list(node.output)) for node in nodes] == [
        ("first", "ConvTranspose", ["c"]), ("relu", "Relu", ["r"]), ("last", "ConvTranspose", ["y"]),
    ]  # fmt: skip
    x = sample(2, 4, 8, 6)
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], atol=2e-4)


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    before = made(tmp_path, conv(), constants={"w": kernel(2, 4, 7, 7)})
    first = suit(before, WIDE, workdir=tmp_path)
    assert suit(before, WIDE, workdir=tmp_path).sha256 == first.sha256 != before.sha256
    assert {entry.key: entry.value for entry in onnx.load(first.path).metadata_props} == METADATA


def test_weights_in_a_constant_operator_are_weights(tmp_path: Path) -> None:
    """Old exporters write them so."""
    weights = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(kernel(2, 4, 7, 7)))
    before = made(tmp_path, weights, conv(), constants={})
    after = suit(before, WIDE, workdir=tmp_path)
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
    assert suit(before, WIDE, workdir=tmp_path) is before


def test_weights_that_something_else_reads_stay_as_they_are(tmp_path: Path) -> None:
    """Turned, they would be wrong for the other reader."""
    twice = made(tmp_path, conv(made="c", name="first"), conv("c", name="second"), constants={"w": kernel(2, 2, 7, 7)}, channels=2)
    assert suit(twice, WIDE, workdir=tmp_path) is twice
    shown = made(tmp_path, conv(), constants={"w": kernel(2, 4, 7, 7)}, outputs={"y": ("batch", 2, 8, 6), "w": (2, 4, 7, 7)})
    assert suit(shown, WIDE, workdir=tmp_path) is shown
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["inner"])], "branch", [], [helper.make_empty_tensor_value_info("inner")])
    choice = helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)
    inside = made(
        tmp_path, conv(), choice, constants={"w": kernel(2, 4, 7, 7), "yes": np.array(True)}, outputs={"y": ("batch", 2, 8, 6), "z": (2, 4, 7, 7)}
    )
    assert suit(inside, WIDE, workdir=tmp_path) is inside


def test_weights_that_are_computed_stay_as_they_are(tmp_path: Path) -> None:
    """A quantised convolution reads what DequantizeLinear makes."""
    made_by = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"])
    constants = {"q": np.ones((2, 4, 7, 7), dtype=np.int8), "scale": np.array(0.5, dtype=np.float32)}
    before = made(tmp_path, made_by, conv(), constants=constants)
    assert suit(before, WIDE, workdir=tmp_path) is before


# ------------------------------------------------------------------------------------------------------------------- portraits


@st.composite
def portraits(draw: st.DrawFn) -> tuple[list[Node], dict[str, Array], tuple[int, int]]:
    """A network of up to six layers between `x`, (n, 4, H, W) with H > W, and `last`: kernels, steps and paddings that differ from side to side."""
    width = draw(st.integers(5, 14))
    height = draw(st.integers(width + 1, 24))
    nodes: list[Node] = []
    constants: dict[str, Array] = {"low": np.array(-1, dtype=np.float32), "channel": kernel(1, 4, 1, 1), "number": np.array([0.5], dtype=np.float32)}
    sides = st.integers(1, 3)
    source = "x"
    for i in range(draw(st.integers(1, 6))):
        made, kind = f"t{i}", draw(st.sampled_from(["conv", "depthwise", "pool", "sigmoid", "clip", "channel", "number", "square", "join", "attention"]))
        kernel_hw, strides = [draw(sides), draw(sides)], [draw(st.integers(1, 2)) if i == 0 else 1 for _ in range(2)]
        pads = [draw(st.integers(0, side - 1)) for side in kernel_hw * 2]
        if kind == "conv":
            constants[f"w{i}"] = kernel(4, 4, *kernel_hw, seed=i)
            dilations = [draw(st.integers(1, 2)) if side == 1 else 1 for side in kernel_hw]
            nodes.append(helper.make_node("Conv", [source, f"w{i}"], [made], kernel_shape=kernel_hw, strides=strides, pads=pads, dilations=dilations))
        elif kind == "depthwise":
            constants |= {f"w{i}": kernel(4, 1, *kernel_hw, seed=i), f"b{i}": kernel(4, seed=i)}
            nodes.append(helper.make_node("Conv", [source, f"w{i}", f"b{i}"], [made], group=4, pads=pads))
        elif kind == "pool":
            nodes.append(helper.make_node("MaxPool", [source], [made], kernel_shape=kernel_hw, strides=strides, pads=pads))
        elif kind == "attention":
            constants[f"w{i}"] = kernel(4, 4, 1, 1, seed=i)
            nodes += [
                helper.make_node("GlobalAveragePool", [source], [f"p{i}"]),
                helper.make_node("Conv", [f"p{i}", f"w{i}"], [f"f{i}"]),
                helper.make_node("HardSigmoid", [f"f{i}"], [f"h{i}"]),
                helper.make_node("Mul", [source, f"h{i}"], [made]),
            ]
        elif kind == "join":
            constants[f"w{i}"] = kernel(4, 8, 1, 1, seed=i)
            nodes += [helper.make_node("Concat", [source, source], [f"c{i}"], axis=1), helper.make_node("Conv", [f"c{i}", f"w{i}"], [made])]
        else:
            operator, more = {
                "sigmoid": ("Sigmoid", []), "clip": ("Clip", ["low"]), "channel": ("Add", ["channel"]), "number": ("Mul", ["number"]), "square": ("Mul", [source]),
            }[kind]  # fmt: skip
            nodes.append(helper.make_node(operator, [source, *more], [made]))
        source = made
    constants["w"] = kernel(3, 4, 1, 1)
    nodes.append(helper.make_node("Conv", [source, "w"], ["last"]))
    return nodes, constants, (height, width)


def used(nodes: list[Node], constants: Mapping[str, Array]) -> dict[str, Array]:
    """Without weights that no operator reads: those are not written."""
    return {name: value for name, value in constants.items() if any(name in node.input for node in nodes)}


@settings(max_examples=120, deadline=None)
@given(portrait=portraits(), end=st.sampled_from(["map", "rows", "both"]), batch=st.integers(1, 2))
def test_a_portrait_on_its_side_computes_the_same(portrait: tuple[list[Node], dict[str, Array], tuple[int, int]], end: str, batch: int) -> None:
    """Whatever its layers are, and whether its map goes out, or is read by what takes the positions one after another."""
    nodes, constants, map_hw = portrait
    nodes = [*nodes]
    outputs: dict[str, tuple[int | str, ...]] = {}
    if end != "rows":
        outputs["last"] = ("batch", 3, "h", "w")
    if end != "map":
        nodes.append(helper.make_node("Flatten", ["last"], ["rows"]))
        outputs["rows"] = ("batch", "positions")
    with tempfile.TemporaryDirectory() as name:
        try:
            before = made(Path(name), *nodes, constants=used(nodes, constants), map_hw=map_hw, outputs=outputs)
            x = sample(batch, 4, *map_hw)
            wanted = run(before, x)
        except Exception:  # noqa: BLE001  # steps that leave nothing of the map
            assume(False)
        after = suit(before, DOWN, workdir=Path(name))
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
        first = onnx.load(after.path).graph.node[0]
        assert (first.op_type, list(first.input)) == ("Transpose", ["x"])
        for level in (onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL):
            for ours, theirs in zip(run(after, x, level=level), wanted, strict=True):
                assert ours.shape == theirs.shape
                assert np.abs(ours - theirs).max(initial=0) <= 1e-5 * max(np.abs(theirs).max(initial=0), 1)


def down(folder: Path, *nodes: Node, constants: Mapping[str, Array], **more: Any) -> tuple[OnnxModel, OnnxModel]:
    """Before and after."""
    before = made(folder, *nodes, constants=constants, **more)
    return before, suit(before, DOWN, workdir=folder)


SMALL = {"w": kernel(2, 4, 3, 3)}
RESIZE = helper.make_node("Resize", ["x", "", "scales"], ["r"], mode="nearest")


@pytest.mark.parametrize(
    ("nodes", "constants", "map_hw"),
    [
        ([conv(pads=[1] * 4)], SMALL, (6, 8)),
        ([conv(pads=[1] * 4)], SMALL, (8, 8)),
        ([conv(pads=[1] * 4)], SMALL, ("high", "wide")),
        ([helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER")], SMALL, (8, 6)),
        ([helper.make_node("Identity", ["v"], ["w"]), conv(pads=[1] * 4)], {"v": SMALL["w"]}, (8, 6)),
        ([RESIZE, conv("r", pads=[1] * 4)], SMALL | {"scales": np.array([1, 1, 1, 1], dtype=np.float32)}, (8, 6)),
        ([helper.make_node("Mul", ["x", "row"], ["r"]), conv("r", pads=[1] * 4)], SMALL | {"row": kernel(6)}, (8, 6)),
        ([helper.make_node("Add", ["x", "column"], ["r"]), conv("r", pads=[1] * 4)], SMALL | {"column": kernel(8, 1)}, (8, 6)),
        ([helper.make_node("Concat", ["x", "x"], ["r"], axis=2), conv("r", pads=[1] * 4)], SMALL, (8, 6)),
        ([helper.make_node("Sigmoid", ["x"], ["r"]), helper.make_node("Slice", ["r", "zero", "two", "one"], ["y"])], {"zero": np.array([0]), "two": np.array([2]), "one": np.array([1])}, (8, 6)),
    ],
    ids=["landscape", "square", "any-size", "automatic", "computed-weights", "resize", "row", "column", "joined-below", "no-convolution"],
)  # fmt: skip
def test_what_cannot_lie_whole_stays_as_it_is(nodes: list[Node], constants: dict[str, Array], map_hw: tuple[int | str, int | str], tmp_path: Path) -> None:
    outputs = {"y": ("batch", 2, "h", "w")}
    before, after = down(tmp_path, *nodes, constants=constants, map_hw=map_hw, outputs=outputs)
    assert after is before


def test_a_branch_that_reads_a_map_keeps_the_network_upright(tmp_path: Path) -> None:
    """It would read it on its side."""
    branch = helper.make_graph([helper.make_node("Identity", ["c"], ["inner"])], "branch", [], [helper.make_empty_tensor_value_info("inner")])
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    nodes = [conv(made="c", pads=[1] * 4), choice]
    before, after = down(tmp_path, *nodes, constants=SMALL | {"yes": np.array(True)})
    assert after is before
    also = helper.make_node("Sigmoid", ["c"], ["z"])
    before, after = down(tmp_path, *nodes, also, constants=SMALL | {"yes": np.array(True)}, outputs={"y": ("batch", 2, 8, 6), "z": ("batch", 2, 8, 6)})
    assert after is before


def test_shared_kernels_are_turned_once(tmp_path: Path) -> None:
    """And where something else shows them, they stand there as they were."""
    nodes = [conv(made="c", pads=[1] * 4, name="a"), conv("c", pads=[1] * 4, name="b")]
    weights = {"w": kernel(4, 4, 3, 3)}
    outputs: dict[str, tuple[int | str, ...]] = {"y": ("batch", 4, 8, 6)}
    before, after = down(tmp_path, *nodes, constants=weights, outputs=outputs)
    assert len(onnx.load(after.path).graph.initializer) == 1
    x = sample(1, 4, 8, 6)
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], atol=1e-4)
    before, after = down(tmp_path, *nodes, helper.make_node("Identity", ["w"], ["z"]), constants=weights, outputs=outputs | {"z": (4, 4, 3, 3)})
    ours, theirs = run(after, x), run(before, x)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    np.testing.assert_array_equal(ours[1], weights["w"])


def test_a_map_that_many_read_is_stood_up_once(tmp_path: Path) -> None:
    readers = [helper.make_node("Flatten", ["c"], [name]) for name in ("y", "z")]
    outputs: dict[str, tuple[int | str, ...]] = {"y": ("batch", 96), "z": ("batch", 96)}
    before, after = down(tmp_path, conv(made="c", pads=[1] * 4), *readers, constants=SMALL, outputs=outputs)
    assert kinds(after.path) == ["Transpose", "Conv", "Transpose", "Flatten", "Flatten"]
    x = sample(1, 4, 8, 6)
    for ours, theirs in zip(run(after, x), run(before, x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_heatmaps_come_out_upright(tmp_path: Path) -> None:
    """The whole estimator with its deconvolutions, compared in pixels before it is written."""
    checkpoint = tmp_path / "heatmap.pth"
    torch.save({"state_dict": random_weights(heatmap_shapes(widen=0.125, deepen=0.167, keypoints=17, channels=16, deconvs=3), seed=1)}, checkpoint)
    (conversion,) = convert(checkpoint, [load_config("onnxruntime")], ConvertOptions(out=tmp_path))
    assert conversion.error is None
    assert kinds(conversion.place / "end2end.onnx").count("Transpose") == 2
    (output,) = Bundle.open(conversion.place).manifest.outputs  # type: ignore[union-attr]
    assert output.shape == ("batch", 17, 64, 48)


# --------------------------------------------------------------------------------------------------------------------- bundles


def test_rtmposes_last_convolution_is_transposed(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """In float32 and beside INT8, which leaves it in float32; not where the deploy config says no, and not in float16, where it is for GPUs."""
    assert wide_kinds(demo_pose_bundle) == ["ConvTranspose"]
    targets = [load_config(name) for name in ("onnxruntime", "onnxruntime-int8", "onnxruntime-fp16")]
    targets[0] = msgspec.structs.replace(targets[0], onnxruntime=PLAIN)
    conversions = convert(DEMO_MODELS["demo-pose"], targets, ConvertOptions(out=tmp_path))
    assert [conversion.error for conversion in conversions] == [None] * 3
    assert [wide_kinds(conversion.place) for conversion in conversions] == [["Conv"], ["ConvTranspose"], ["Conv"]]


def test_the_bundle_says_what_it_said(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """The rewriting is the artefact's business: inputs, outputs and parity are those of the canonical graph."""
    (plain,) = convert(
        DEMO_MODELS["demo-pose"],
        [msgspec.structs.replace(load_config("onnxruntime"), onnxruntime=PLAIN)],
        ConvertOptions(out=tmp_path),
    )
    ours, theirs = Bundle.open(demo_pose_bundle).manifest, Bundle.open(plain.place).manifest
    assert ours is not None
    assert theirs is not None
    assert (ours.inputs, ours.outputs, ours.shape_ranges) == (theirs.inputs, theirs.outputs, theirs.shape_ranges)
    assert ours.parity.outputs[0].relative_linf < 1e-5


def test_a_target_of_ones_own_can_say_no(tmp_path: Path) -> None:
    text = (CONFIG_FOLDER / "onnxruntime.toml").read_text(encoding="utf-8")
    for name in ("transpose_wide_kernels", "lay_portraits_down"):
        assert f"{name} = true" in text
        text = text.replace(f"{name} = true", f"{name} = false")
    (tmp_path / "plain.toml").write_text(text, encoding="utf-8")
    assert load_config(str(tmp_path / "plain.toml")).onnxruntime == PLAIN
