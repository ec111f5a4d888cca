"""Float16 where it does no harm: what is measured, what stays in float32 and why, the typed graph, and that RTMPose survives where plain float16 does not.

ONNX Runtime's CPU computes float16 operators in float32 inside, and so overflows nowhere. What a GPU does is shown in onnx's reference evaluator, where
float16 arrays are squared and summed as float16.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ExportError, ModelcrateError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import CONFIG_FOLDER, OnnxOptions, load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.export import OnnxModel, export_onnx, save_onnx
from modelcrate_converter.exportable import ExportableModel
from modelcrate_converter.models.blueprints import classifier_shapes, heatmap_shapes, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.models.layers import Shapes
from modelcrate_converter.models.rtmpose import ScaleNorm
from modelcrate_converter.parity import network_inputs, procedural_images
from modelcrate_converter.people import procedural_scenes
from modelcrate_converter.precision import HALF_MAX, HALF_TINY, PrecisionPlan, apply_plan, measure_ranges, plan_half, prescale_norms
from modelcrate_converter.simplify import simplify
from modelcrate_runtime import Detector, PoseDetector

HALF, SINGLE, INT64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
PLAIN = PrecisionPlan(precision="fp16", islands={}, half=0)
"""What a builder's flag does: everything in float16."""
NORMS = {f"/head/{norm}/{op}" for norm in ("mlp/mlp.0", "gau/ln") for op in ("ReduceL2", "Clip", "Div")}
Arrays = dict[str, np.ndarray]
Nodes = list[onnx.NodeProto]
node = helper.make_node


def f32(*values: Any) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], dtype=np.float32)


def made(
    folder: Path,
    nodes: Nodes,
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    x: Sequence[int | str] = ("n", 4),
    y: Mapping[str, Sequence[int | str]] | None = None,
    integers: Sequence[str] = (),
    opset: int = 17,
) -> OnnxModel:
    """A graph of one's own with the input x, through the writer that all graphs go through."""
    inputs = (TensorSpec(name="x", dtype="float32", shape=tuple(x)),)
    outputs = tuple(TensorSpec(name=n, dtype="int64" if n in integers else "float32", shape=tuple(shape)) for n, shape in (y or {"y": x}).items())
    infos = [[helper.make_empty_tensor_value_info(spec.name) for spec in specs] for specs in (inputs, outputs)]
    graph = helper.make_graph(nodes, "made", *infos, [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return save_onnx(proto, fresh(folder) / "made.onnx", inputs=inputs, outputs=outputs, metadata={"model": "made", "checkpoint": "ab" * 32})


def fresh(folder: Path) -> Path:
    """A folder of its own, since graphs have fixed names in theirs."""
    return Path(tempfile.mkdtemp(dir=folder))


def ran(model: OnnxModel | Path, x: np.ndarray) -> Arrays:
    """In ONNX Runtime."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    path = model if isinstance(model, Path) else model.path
    session = onnxruntime.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def evaluated(model: OnnxModel | Path, x: np.ndarray) -> Arrays:
    """Every operator in numpy, in the types that the graph states: float16 overflows as it does on a GPU."""
    evaluator = ReferenceEvaluator(str(model if isinstance(model, Path) else model.path))
    with np.errstate(all="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, {evaluator.input_names[0]: x}), strict=True))


def off(ours: Arrays, theirs: Arrays) -> float:
    """The largest relative L-inf of any output; infinite where something is not finite."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        if not np.isfinite(ours[name]).all():
            return math.inf
        worst = max(worst, float(np.abs(ours[name].astype(np.float64) - value).max() / np.abs(value).max()))
    return worst


def planned(folder: Path, model: OnnxModel, inputs: Sequence[np.ndarray], *, headroom: float = 16.0) -> tuple[OnnxModel, PrecisionPlan]:
    plan = plan_half(model, measure_ranges(model, inputs, workdir=fresh(folder)), headroom=headroom)
    return apply_plan(model, plan, workdir=fresh(folder)), plan


def plan_of(folder: Path, model: OnnxModel, *inputs: np.ndarray, headroom: float = 16.0) -> PrecisionPlan:
    return plan_half(model, measure_ranges(model, inputs, workdir=fresh(folder)), headroom=headroom)


def element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> type, as ONNX infers it from operator to operator, without what the file claims of inner tensors: it claims nothing."""
    assert not proto.graph.value_info
    graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return kinds | {tensor.name: tensor.data_type for tensor in graph.initializer}


def split_casts(proto: onnx.ModelProto) -> tuple[Nodes, Nodes]:
    """The operators, and the casts between the two float types that stand around them."""
    kinds = element_types(proto)
    casts = [one for one in proto.graph.node if one.op_type == "Cast" and {kinds[one.input[0]], kinds[one.output[0]]} <= {HALF, SINGLE}]
    return [one for one in proto.graph.node if one not in casts], casts


def assert_typed(model: OnnxModel, plan: PrecisionPlan, typed: OnnxModel) -> onnx.ModelProto:
    """All that holds of every typed graph."""
    before, proto = onnx.load(model.path), onnx.load(typed.path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version <= 9
    assert {one.domain for one in proto.graph.node} | {entry.domain for entry in proto.opset_import} <= {"", "ai.onnx"}
    assert list(proto.graph.input) == list(before.graph.input)
    assert list(proto.graph.output) == list(before.graph.output)
    assert all(value.type.tensor_type.elem_type in {SINGLE, INT64} for value in (*proto.graph.input, *proto.graph.output))
    assert list(proto.metadata_props) == list(before.metadata_props)
    assert (typed.inputs, typed.outputs, typed.opset) == (model.inputs, model.outputs, model.opset)
    assert len({one.name for one in proto.graph.node}) == len(proto.graph.node), "ONNX Runtime refuses two operators of one name"
    kinds = element_types(proto)
    operators, casts = split_casts(proto)
    ours, theirs = ([one.op_type for one in nodes if one.op_type != "Constant"] for nodes in (operators, before.graph.node))
    assert ours == theirs
    assert plan.islands.keys() <= {one.name for one in operators}
    half = 0
    for one in operators:
        fixed = (1, 2) if one.op_type == "Resize" else ()
        found = {kinds[name] for i, name in enumerate(one.input) if name and i not in fixed} | {kinds[name] for name in one.output if name}
        found &= {HALF, SINGLE}
        if found:
            assert found == ({SINGLE} if one.name in plan.islands else {HALF}), f"{one.op_type} {one.name}"
            half += found == {HALF}
    assert half == plan.half
    for one in casts:
        assert kinds[one.input[0]] != kinds[one.output[0]], "a cast to what it is already"
    of_what = Counter((one.input[0], kinds[one.output[0]]) for one in casts)
    assert set(of_what.values()) <= {1}, "a tensor that is cast twice"
    needed = {name for one in proto.graph.node for name in one.input} | {value.name for value in proto.graph.output}
    made_here = {name for one in proto.graph.node for name in one.output}
    assert {tensor.name for tensor in proto.graph.initializer} <= needed
    assert {one.output[0] for one in casts} <= needed <= made_here | {tensor.name for tensor in proto.graph.initializer} | {"x", "input", ""}
    return proto


def constant_bytes(proto: onnx.ModelProto, *kinds: int) -> int:
    tensors = [*proto.graph.initializer, *(one.attribute[0].t for one in proto.graph.node if one.op_type == "Constant")]
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in tensors if tensor.data_type in kinds)


# --------------------------------------------------------------------------------------------------------------------- ranges


@pytest.fixture
def mixed(tmp_path: Path) -> OnnxModel:
    """Float tensors among integer and boolean ones: a = x w, r = relu(a), y = -0.5 r, i = argmax(a), f = float(i)."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Shape", ["a"], ["s"]),
        node("Relu", ["a"], ["r"]),
        node("Mul", ["r", "c"], ["y"]),
        node("Greater", ["a", "r"], ["b"]),
        node("ArgMax", ["a"], ["i"], axis=1, keepdims=1),
        node("Cast", ["i"], ["f"], to=SINGLE),
        node("Identity", ["f"], ["g"]),
    ]
    weights = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    return made(tmp_path, nodes, {"w": weights, "c": f32(-0.5)}, y={"y": ("n", 3), "g": ("n", 1), "i": ("n", 1)}, integers=("i",))


def test_ranges_are_numpys_over_all_inputs(mixed: OnnxModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((5, 4)).astype(np.float32), 10 * rng.standard_normal((2, 4)).astype(np.float32)
    weights = numpy_helper.to_array(onnx.load(mixed.path).graph.initializer[0])
    workdir = fresh(tmp_path)
    ranges = measure_ranges(mixed, iter([first, second]), workdir=workdir)
    assert not list(workdir.iterdir())
    values: Arrays = {"x": np.concatenate([first, second])}
    values["a"] = values["x"] @ weights
    values["r"] = np.maximum(values["a"], 0)
    values["y"] = -0.5 * values["r"]
    values["f"] = values["g"] = values["a"].argmax(axis=1)
    assert ranges.keys() == values.keys(), "all float tensors, and nothing but them"
    for name, value in values.items():
        assert (ranges[name].least, ranges[name].greatest) == pytest.approx((value.min(), value.max()), rel=1e-5, abs=0), name
        assert ranges[name].largest == pytest.approx(np.abs(value).max(), rel=1e-5), name
    assert ranges["y"].largest == -ranges["y"].least > 0 == ranges["y"].greatest


def test_every_input_widens_the_ranges(mixed: OnnxModel, tmp_path: Path) -> None:
    low, high = f32([[1, 2, 3, 4]]), f32([[-9, 0, 0, 8]])
    ranges, of_low, of_high = (measure_ranges(mixed, inputs, workdir=tmp_path) for inputs in ([low, high], [low], [high]))
    assert ranges == measure_ranges(mixed, [high, low], workdir=tmp_path)
    for name, found in ranges.items():
        assert found.least == min(of_low[name].least, of_high[name].least), name
        assert found.greatest == max(of_low[name].greatest, of_high[name].greatest), name
    assert of_low["x"] != ranges["x"] != of_high["a"]
    assert (ranges["x"].least, ranges["x"].greatest) == (-9, 8)


@pytest.mark.parametrize(("x", "name"), [((1, 0), "y"), ((0, 0), "y"), ((math.nan, 1), "x"), ((1, math.inf), "x")])
def test_what_is_not_finite_in_float32_is_an_error(x: tuple[float, float], name: str, tmp_path: Path) -> None:
    model = made(tmp_path, [node("Split", ["x"], ["a", "b"], axis=1), node("Div", ["a", "b"], ["y"])], x=("n", 2), y={"y": ("n", 1)})
    workdir = fresh(tmp_path)
    with pytest.raises(ExportError, match=rf"made\.onnx: {name}: expected finite"):
        measure_ranges(model, [f32([[1, 2]]), f32([x])], workdir=workdir)
    assert not list(workdir.iterdir())


def test_ranges_of_no_input_or_of_no_graph_are_an_error_and_no_file(mixed: OnnxModel, tmp_path: Path) -> None:
    workdir = fresh(tmp_path)
    with pytest.raises(ExportError, match="expected inputs"):
        measure_ranges(mixed, [], workdir=workdir)
    assert not list(workdir.iterdir())
    with pytest.raises(ModelcrateError):
        measure_ranges(mixed, [np.ones((1, 5), dtype=np.float32)], workdir=workdir)
    assert not list(workdir.iterdir())
    unknown = made(tmp_path, [node("NoSuchOperator", ["x"], ["y"])])
    with pytest.raises(ModelcrateError):
        measure_ranges(unknown, [f32([[1, 2, 3, 4]])], workdir=workdir)
    assert not list(workdir.iterdir())


# ---------------------------------------------------------------------------------------------------------------------- plans


ONES = f32([[1, 1, 1, 1]])


def test_a_tensor_that_leaves_the_range_makes_islands_of_all_that_touch_it(tmp_path: Path) -> None:
    nodes = [
        node("Neg", ["x"], ["small"], name="before"),
        node("Mul", ["small", "many"], ["big"], name="makes"),
        node("Relu", ["big"], ["z"], name="reads"),
        node("Mul", ["big", "few"], ["y"], name="shrinks"),
        node("Neg", ["y"], ["w"], name="after"),
    ]
    model = made(tmp_path, nodes, {"many": f32(5000), "few": f32(0.001)}, y={"w": ("n", 4), "z": ("n", 4)})
    plan = plan_of(tmp_path, model, 2 * ONES)
    assert plan.islands == dict.fromkeys(["makes", "reads", "shrinks"], "range: big reaches 1e+04")
    assert plan.half == 2
    assert plan.summary == "2 operators in float16, 3 in float32 (3 range)"


@pytest.mark.parametrize("sign", [1, -1])
def test_headroom_is_what_a_tensor_may_grow(sign: int, tmp_path: Path) -> None:
    """65504 / 16 = 4094: inside, to the last number."""
    model = made(tmp_path, [node("Mul", ["x", "c"], ["y"], name="op")], {"c": f32(2047 * sign)})
    assert not plan_of(tmp_path, model, 2 * ONES).islands
    assert plan_of(tmp_path, model, f32([[0, 2.001, 1, 0]])).islands == {"op": "range: y reaches 4.1e+03"}
    assert not plan_of(tmp_path, model, f32([[0, 2.001, 1, 0]]), headroom=1).islands
    assert plan_of(tmp_path, model, 33 * ONES, headroom=1).islands


def test_headroom_keeps_brighter_inputs_finite(tmp_path: Path) -> None:
    model = made(tmp_path, [node("Mul", ["x", "c"], ["a"]), node("Div", ["a", "c"], ["y"])], {"c": f32(30000)})
    tight, wide = (planned(tmp_path, model, [ONES], headroom=headroom)[0] for headroom in (1, 16))
    assert off(evaluated(tight, ONES), ran(model, ONES)) < 1e-3
    assert off(evaluated(tight, 5 * ONES), ran(model, 5 * ONES)) == math.inf
    assert off(evaluated(wide, 5 * ONES), ran(model, 5 * ONES)) < 1e-3


@pytest.mark.parametrize("op", ["ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum"])
def test_sums_of_squares_are_islands_however_small(op: str, tmp_path: Path) -> None:
    model = made(tmp_path, [node("Neg", ["x"], ["a"]), node(op, ["x"], ["b"], name="sum", axes=[1]), node("Add", ["a", "b"], ["y"])])
    plan = plan_of(tmp_path, model, ONES)
    assert plan.islands == {"sum": "sum of squares: overflows before its result does"}
    assert plan.summary == "2 operators in float16, 1 in float32 (1 sum of squares)"


@pytest.mark.parametrize(
    ("constant", "reason"),
    [
        (f32(1e-5), "constant: 1e-05"),
        (f32(-1e-5), "constant: 1e-05"),
        (f32([[1e-12]]), "constant: 1e-12"),
        (f32(HALF_TINY), None),
        (np.nextafter(f32(HALF_TINY), f32(0)), "constant: 6.1e-05"),
        (f32(0), None),
        (f32(HALF_MAX), None),
        (f32(-65505), "constant: 6.55e+04"),
        (f32(3.4e38), "constant: 3.4e+38"),
        (f32(-math.inf), "constant: inf"),
        (f32(1e5, 1, 1, 1), "constant: 1e+05"),
        (f32(1, 1, -1e5, 1), "constant: 1e+05"),
        (f32(1e-9, -2e-9, 0, 1e-9), "constant: 2e-09"),
        (f32(1e-9, 1, 0, 1e-9), None),
    ],
)
def test_constants_that_float16_does_not_have_are_islands(constant: np.ndarray, reason: str | None, tmp_path: Path) -> None:
    """A selection, so that no result is out of range because of them."""
    model = made(tmp_path, [node("Greater", ["x", "c"], ["m"], name="op"), node("Where", ["m", "x", "x"], ["y"])], {"c": constant})
    assert plan_of(tmp_path, model, ONES).islands == ({"op": reason} if reason else {})


def test_a_weight_beyond_float16_is_not_cut_down_to_it(tmp_path: Path) -> None:
    x = f32([[1e-3, 1e-3, 2e-3, 1e-3]])
    model = made(tmp_path, [node("Mul", ["x", "c"], ["y"])], {"c": f32(1, 2e5, 3, 4)})
    assert off(ran(planned(tmp_path, model, [x])[0], x), ran(model, x)) < 1e-3


def test_a_division_by_what_an_island_made_is_one(tmp_path: Path) -> None:
    nodes = [
        node("ReduceL2", ["x"], ["n"], name="norm", axes=[1]),
        node("Clip", ["n", "eps"], ["d"], name="clip"),
        node("Div", ["x", "d"], ["y"], name="by island"),
        node("Div", ["d", "x"], ["z"], name="of island"),
        node("Div", ["x", "two"], ["v"], name="by constant"),
        node("Abs", ["x"], ["w"], name="abs"),
        node("Div", ["x", "w"], ["u"], name="by half"),
    ]
    model = made(tmp_path, nodes, {"eps": f32(1e-5), "two": f32(2)}, y={n: ("n", 4) for n in ("y", "z", "v", "u")})
    plan = plan_of(tmp_path, model, ONES)
    assert plan.islands.keys() == {"norm", "clip", "by island"}
    assert plan.islands["by island"].startswith("division: ")
    assert plan.half == 4


@pytest.mark.parametrize("blank", [False, True])
def test_vectors_are_normalised_as_pytorch_writes_it(blank: bool, tmp_path: Path) -> None:
    """Its epsilon of 1e-12 goes through an Expand before anything is divided by it: there it must not become 0, or a blank row is 0/0."""
    nodes = [
        node("ReduceL2", ["x"], ["n"], name="norm", axes=[1]),
        node("Clip", ["n", "eps"], ["c"], name="clip"),
        node("Shape", ["x"], ["s"]),
        node("Expand", ["c", "s"], ["d"], name="expand"),
        node("Div", ["x", "d"], ["y"], name="div"),
    ]
    model = made(tmp_path, nodes, {"eps": f32(1e-12)})
    x = f32([[1, -2, 3, 4], [5, 6, 7, 8]])
    x[1] *= not blank
    typed, plan = planned(tmp_path, model, [x])
    assert plan.islands.keys() == {"norm", "clip", "expand", "div"}
    assert off(evaluated(typed, x), ran(model, x)) < 1e-3


def test_a_root_behind_an_epsilon_is_divided_by_in_float32(tmp_path: Path) -> None:
    nodes = [
        node("ReduceSumSquare", ["x"], ["q"], name="sum", axes=[1]),
        node("Add", ["q", "eps"], ["a"], name="add"),
        node("Sqrt", ["a"], ["r"], name="root"),
        node("Reciprocal", ["r"], ["i"], name="one over"),
        node("Mul", ["i", "few"], ["z"], name="shrink"),
        node("Mul", ["x", "z"], ["y"], name="mul"),
    ]
    model = made(tmp_path, nodes, {"eps": f32(1e-10), "few": f32(0.01)})
    x = f32([[0, 0, 0, 0], [1, 2, 3, 4]])
    typed, plan = planned(tmp_path, model, [x])
    assert plan.islands.keys() == {"sum", "add", "root", "one over", "shrink"}
    assert plan.islands["one over"].startswith("range: ")
    assert off(evaluated(typed, x), ran(model, x)) < 1e-3


ONLY_SINGLE: list[tuple[str, Nodes, dict[str, np.ndarray]]] = [
    ("Celu", [node("Celu", ["x"], ["y"], name="op")], {}),
    ("IsInf", [node("IsInf", ["x"], ["b"], name="op"), node("Where", ["b", "x", "x"], ["y"])], {}),
    ("QuantizeLinear", [node("QuantizeLinear", ["x", "s", "z"], ["q"], name="op"), node("Cast", ["q"], ["y"], to=SINGLE)], {"s": f32(0.1), "z": np.int8(0)}),
    ("DequantizeLinear", [node("Cast", ["x"], ["q"], to=TensorProto.INT8), node("DequantizeLinear", ["q", "s"], ["y"], name="op")], {"s": f32(0.1)}),
    ("TopK", [node("TopK", ["x", "k"], ["y", "i"], name="op")], {"k": np.array([4])}),
    ("ConstantOfShape", [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["o"], name="op"), node("Add", ["x", "o"], ["y"])], {}),
    ("Range", [node("Range", ["l", "h", "d"], ["r"], name="op"), node("Add", ["x", "r"], ["y"])], {"l": f32(0), "h": f32(4), "d": f32(1)}),
    ("EyeLike", [node("EyeLike", ["x"], ["e"], name="op"), node("Add", ["x", "e"], ["y"])], {}),
]
"""Operators that float16 is not defined for, at opset 17 at least, or that make float32 of no float tensor."""


@pytest.mark.parametrize(("op", "nodes", "constants"), ONLY_SINGLE, ids=[op for op, _, _ in ONLY_SINGLE])
def test_operators_without_float16_stay_in_float32(op: str, nodes: Nodes, constants: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = made(tmp_path, nodes, {name: np.asarray(value) for name, value in constants.items()})
    x = f32([[1, -2, 3, 0.5]])
    typed, plan = planned(tmp_path, model, [x])
    assert plan.islands == {"op": f"{op}: is float32 by definition"}
    assert_typed(model, plan, typed)
    assert off(ran(typed, x), ran(model, x)) < 1e-2


# ------------------------------------------------------------------------------------------------------------------ typed graphs


def test_a_harmless_graph_is_half_from_end_to_end(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Div", ["b", "four"], ["c"]),
        node("Softmax", ["c"], ["y"]),
    ]
    model = made(tmp_path, nodes, {"w": np.eye(4, dtype=np.float32) / 3, "four": f32(4)})
    typed, plan = planned(tmp_path, model, [ONES])
    assert plan == PrecisionPlan(precision="fp16", islands={}, half=4)
    assert plan.summary == "4 operators in float16, 0 in float32"
    proto = assert_typed(model, plan, typed)
    assert {tensor.data_type for tensor in proto.graph.initializer} == {HALF}
    assert typed.op_counts == model.op_counts | {"Cast": 2}
    x = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
    assert 0 < off(evaluated(typed, x), ran(model, x)) < 1e-2


def test_constants_that_both_kinds_of_operators_read(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["x", "c"], ["a"], name="half"),
        node("Mul", ["c", "x"], ["b"], name="half too"),
        node("Mul", ["c", "big"], ["d"], name="single"),
        node("Div", ["d", "big"], ["e"], name="single too"),
        node("Sum", ["a", "b", "e"], ["y"], name="end"),
    ]
    x = np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)
    model = made(tmp_path, nodes, {"c": f32(1.1, 2.2, 3.3, 4.4), "big": f32(1e6)})
    typed, plan = planned(tmp_path, model, [x])
    assert plan.islands.keys() == {"single", "single too"}
    proto = assert_typed(model, plan, typed)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert Counter((value.dtype.name, value.shape) for value in stored.values()) == {("float32", (4,)): 1, ("float16", (4,)): 1, ("float32", ()): 1}
    np.testing.assert_array_equal(stored["c"], f32(1.1, 2.2, 3.3, 4.4))
    assert 0 < off(evaluated(typed, x), ran(model, x)) < 1e-3


def test_the_scales_of_a_resize_stay_in_float32(tmp_path: Path) -> None:
    """1.7 in float16 is another number, and another size; the same constant is half for the operator beside it."""
    nodes = [
        node("Mul", ["x", "scales"], ["a"]),
        node("Unsqueeze", ["a", "axes"], ["b"]),
        node("Resize", ["b", "", "scales"], ["c"], name="resize", mode="linear"),
        node("Squeeze", ["c", "axes"], ["y"]),
    ]
    model = made(tmp_path, nodes, {"scales": f32(1, 1, 1, 1.7), "axes": np.array([0, 1])}, y={"y": ("n", 6)})
    x = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    typed, plan = planned(tmp_path, model, [x])
    assert not plan.islands
    proto = assert_typed(model, plan, typed)
    (resize,) = (one for one in proto.graph.node if one.op_type == "Resize")
    assert (resize.input[1], resize.input[2]) == ("", "scales")
    kinds = element_types(proto)
    assert (kinds[resize.input[0]], kinds["scales"], kinds[resize.output[0]]) == (HALF, SINGLE, HALF)
    assert off(ran(typed, x), ran(model, x)) < 1e-2


def test_a_tensor_with_many_readers_is_cast_once(tmp_path: Path) -> None:
    nodes = [
        node("Neg", ["x"], ["a"]),
        node("Abs", ["x"], ["b"]),
        node("Mul", ["a", "b"], ["h"]),
        node("ReduceL2", ["h"], ["s"], name="island", axes=[1]),
        node("ReduceSumSquare", ["h"], ["t"], name="island too", axes=[1]),
        node("Add", ["s", "h"], ["u"]),
        node("Sub", ["s", "u"], ["v"]),
        node("Sub", ["v", "t"], ["y"]),
    ]
    model = made(tmp_path, nodes)
    typed, plan = planned(tmp_path, model, [ONES])
    proto = assert_typed(model, plan, typed)
    assert plan.islands.keys() == {"island", "island too"}
    kinds = element_types(proto)
    found = Counter((cast.input[0], kinds[cast.output[0]]) for cast in split_casts(proto)[1] if cast.output[0] != "y")
    assert found == {("x", HALF): 1, ("h", SINGLE): 1, ("s", HALF): 1, ("t", HALF): 1}


@pytest.mark.parametrize("readers", [(), ("Neg",), ("ReduceL2",), ("Neg", "Abs", "ReduceL2", "ReduceSumSquare")])
@pytest.mark.parametrize("maker", ["Relu", "Celu"])
def test_an_output_that_other_operators_read_too(maker: str, readers: Sequence[str], tmp_path: Path) -> None:
    """Half operators read it as half, islands and the caller as float32."""
    nodes = [node(maker, ["x"], ["y"]), *(node(op, ["y"], [f"y{i}"], **({"axes": [1]} if op.startswith("Reduce") else {})) for i, op in enumerate(readers))]
    model = made(tmp_path, nodes, y={"y": ("n", 4)} | {f"y{i}": ("n", 1 if op.startswith("Reduce") else 4) for i, op in enumerate(readers)})
    x = f32([[1.2345, -2, 3, 0.1]])
    typed, plan = planned(tmp_path, model, [x])
    assert_typed(model, plan, typed)
    assert off(evaluated(typed, x), evaluated(model, x)) < 1e-2


def test_names_that_are_taken_are_not_given_again(tmp_path: Path) -> None:
    """As in a graph that has been typed before."""
    nodes = [
        node("Relu", ["x"], ["x_half"], name="cast_x_half"),
        node("Mul", ["x", "w"], ["a"]),
        node("Mul", ["a", "w_half"], ["y_half"]),
        node("ReduceL2", ["y_half"], ["y_half_single"], axes=[1]),
        node("Sum", ["y_half", "y_half_single", "x_half"], ["y"]),
    ]
    x = f32([[1, -2, 3, 0.5]])
    model = made(tmp_path, nodes, {"w": f32(3, 4, 5, 6), "w_half": f32(7, 8, 9, 10)})
    typed, plan = planned(tmp_path, model, [x])
    assert_typed(model, plan, typed)
    assert off(evaluated(typed, x), ran(model, x)) < 1e-2


@pytest.mark.parametrize(
    "constant",
    [
        {"value": numpy_helper.from_array(f32(0.3))},
        {"value": numpy_helper.from_array(f32(0.3, 1, 2, 3))},
        {"value_float": 0.3},
        {"value_floats": [0.3, 1, 2, 3]},
    ],
    ids=["scalar tensor", "tensor", "float", "floats"],
)
def test_constants_in_every_spelling(constant: dict[str, Any], tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], ["c"], **constant),
        node("Constant", [], ["shape"], value_ints=[-1, 4]),
        node("Reshape", ["x", "shape"], ["a"]),
        node("Mul", ["a", "c"], ["y"]),
    ]
    x = f32([[1, -2, 3, 0.5]])
    model = made(tmp_path, nodes)
    typed, plan = planned(tmp_path, model, [x])
    proto = assert_typed(model, plan, typed)
    assert [tensor.data_type for tensor in proto.graph.initializer].count(HALF) == 1
    assert 0 < off(evaluated(typed, x), ran(model, x)) < 1e-3


def test_constants_that_are_outputs(tmp_path: Path) -> None:
    model = made(tmp_path, [node("Mul", ["x", "c"], ["y"])], {"c": f32(1.1, 2, 3, 4)}, y={"y": ("n", 4), "c": (4,)})
    typed, _ = planned(tmp_path, model, [ONES])
    onnx.checker.check_model(onnx.load(typed.path), full_check=True)
    np.testing.assert_array_equal(ran(typed, ONES)["c"], f32(1.1, 2, 3, 4))


def test_integers_and_shapes_are_left_alone(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["shape"], name="shape"),
        node("Gather", ["shape", "zero"], ["rows"], name="rows"),
        node("Mul", ["rows", "two"], ["double"], name="double"),
        node("Concat", ["double", "two"], ["target"], name="target", axis=0),
        node("Reshape", ["x", "target"], ["pairs"], name="reshape"),
        node("ArgMax", ["pairs"], ["i"], name="argmax", axis=1),
        node("Cast", ["i"], ["f"], name="cast", to=SINGLE),
        node("Mul", ["pairs", "f"], ["y"], name="mul"),
        node("Cast", ["pairs"], ["back"], name="back", to=INT64),
    ]
    integers = {"zero": np.array([0]), "two": np.array([2])}
    model = made(tmp_path, nodes, integers, y={"y": ("m", 2), "back": ("m", 2)}, integers=("back",))
    x = f32([[1, 3, 7, 5], [2, 4, 3, 1]])
    typed, plan = planned(tmp_path, model, [x])
    assert not plan.islands
    assert plan.half == 6, "Shape and Reshape read floats, ArgMax and a Cast read them, a Cast and Mul make them"
    proto = onnx.load(typed.path)
    onnx.checker.check_model(proto, full_check=True)
    before, after = ({one.name: one for one in graph.graph.node} for graph in (onnx.load(model.path), proto))
    for name in ("rows", "double", "target"):
        assert after[name] == before[name]
    assert {tensor.name: tensor.data_type for tensor in proto.graph.initializer} == {"zero": INT64, "two": INT64}
    kinds = element_types(proto)
    assert {kinds[name] for name in ("shape", "rows", "double", "target", "i", "back")} == {INT64}
    assert (kinds["f"], kinds["pairs"], kinds["y"]) == (HALF, HALF, SINGLE)
    for name, value in ran(model, x).items():
        np.testing.assert_array_equal(ran(typed, x)[name], value)


def test_a_cast_in_an_island_still_makes_float32(tmp_path: Path) -> None:
    nodes = [node("ArgMax", ["x"], ["i"], axis=1), node("Mul", ["i", "many"], ["j"]), node("Cast", ["j"], ["y"], name="cast", to=SINGLE)]
    model = made(tmp_path, nodes, {"many": np.array(100_000)}, y={"y": ("n", 1)})
    x = f32([[1, 2, 3, 9]])
    typed, plan = planned(tmp_path, model, [x])
    assert plan.islands == {"cast": "range: y reaches 3e+05"}
    assert evaluated(typed, x)["y"].tolist() == [[300_000.0]]


def test_control_flow_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph([node(op, ["x"], [name])], name, [], [value(name, SINGLE, None)]) for name, op in (("then", "Abs"), ("else", "Neg"))
    }
    model = made(tmp_path, [node("If", ["yes"], ["y"], **branches)], {"yes": np.array(True)})
    plan = plan_of(tmp_path, model, ONES)
    assert list(plan.islands.values()) == ["If: is float32 by definition"]
    workdir = fresh(tmp_path)
    with pytest.raises(ExportError, match=r"made\.onnx: expected a graph without control flow"):
        apply_plan(model, plan, workdir=workdir)
    assert not list(workdir.iterdir())


# -------------------------------------------------------------------------------------------------------------------- networks


POSE = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=5, input_hw=(96, 64), hidden=32, s=16)
SMALL_IMAGES = "test_pipeline = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]\n"
NETWORKS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "pose": (POSE, ""),
    "heatmap": (heatmap_shapes(widen=0.0625, deepen=0.167, keypoints=5, channels=16, deconvs=1), ""),
    "classifier": (classifier_shapes(widen=0.0625, deepen=0.167, classes=7), ""),
    "detector": (rtmdet_shapes(widen=0.0625, deepen=0.167, classes=3, separable=False), SMALL_IMAGES),
    "separable": (rtmdet_shapes(widen=0.0625, deepen=0.167, classes=1, separable=True), SMALL_IMAGES),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its float32 graph and the typed one."""

    graph: OnnxModel
    plan: PrecisionPlan
    typed: OnnxModel
    input_hw: tuple[int, int]

    def sample(self, count: int, *, seed: int = 8) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((count, 3, *self.input_hw)).astype(np.float32)


def read(folder: Path, weights: dict[str, torch.Tensor], *, cfg: str = "") -> ExportableModel:
    path = fresh(folder) / "model.pth"
    torch.save({"state_dict": weights, "meta": {"cfg": cfg} if cfg else {}}, path)
    return read_architecture(read_checkpoint(path))


def exported(folder: Path, model: ExportableModel, options: OnnxOptions | None = None) -> OnnxModel:
    workdir = fresh(folder)
    graph = export_onnx(model, options or OnnxOptions(), workdir=workdir)
    return simplify(graph, workdir=workdir, metadata={"checkpoint": model.checkpoint[1], "model": model.name})


def measured(folder: Path, model: ExportableModel, graph: OnnxModel) -> Case:
    """Planned on two inputs that no test compares on."""
    inputs = np.random.default_rng(7).standard_normal((2, 3, *model.input_hw)).astype(np.float32)
    typed, plan = planned(folder, graph, [inputs[:1], inputs[1:]])
    return Case(graph=graph, plan=plan, typed=typed, input_hw=model.input_hw)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            shapes, cfg = NETWORKS[name]
            folder = tmp_path_factory.mktemp(name)
            model = read(folder, random_weights(shapes, seed=3), cfg=cfg)
            cases[name] = measured(folder, model, exported(folder, model))
        return cases[name]

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_typed_networks_are_half_but_for_their_islands(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    assert case.plan.islands.keys() == (NORMS if name == "pose" else set()), "both ScaleNorms of a pose estimator, and nothing else"
    proto = assert_typed(case.graph, case.plan, case.typed)
    before = onnx.load(case.graph.path)
    assert constant_bytes(proto, HALF) == pytest.approx(constant_bytes(before, SINGLE) / 2, rel=0.01)
    assert constant_bytes(proto, SINGLE) <= 64, "the factors of the ScaleNorms, the scales of a Resize"
    assert case.typed.path.stat().st_size < 0.66 * case.graph.path.stat().st_size
    if name in {"detector", "separable"}:
        kinds = element_types(proto)
        assert [kinds[one.input[2]] for one in proto.graph.node if one.op_type == "Resize"] == [SINGLE] * 2


@pytest.mark.parametrize("name", NETWORKS)
def test_typed_networks_compute_what_float32_computes(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for count in (1, 3):
        x = case.sample(count)
        expected = ran(case.graph, x)
        assert 1e-6 < off(ran(case.typed, x), expected) <= 1e-2
    x = case.sample(1)
    assert 1e-6 < off(evaluated(case.typed, x), ran(case.graph, x)) <= 1e-2


@pytest.mark.parametrize("name", ["pose", "detector"])
def test_two_runs_make_the_same_bytes(name: str, case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of(name)
    inputs = np.random.default_rng(7).standard_normal((2, 3, *case.input_hw)).astype(np.float32)
    typed, plan = planned(tmp_path, case.graph, [inputs[:1], inputs[1:]])
    assert plan == case.plan
    assert typed.sha256 == case.typed.sha256
    assert typed.path.read_bytes() == case.typed.path.read_bytes()


# -------------------------------------------------------------------------------------------------------------------- overflow


def grown(weights: dict[str, torch.Tensor], factor: float, *names: str) -> dict[str, torch.Tensor]:
    return weights | {name: weights[name] * factor for name in names}


@pytest.fixture(scope="module")
def pose_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A pose estimator with some weights times a factor."""
    folder = tmp_path_factory.mktemp("grown")
    cases: dict[tuple[float, tuple[str, ...]], Case] = {}

    def make(factor: float, *names: str) -> Case:
        if (factor, names) not in cases:
            model = read(folder, grown(random_weights(POSE, seed=3), factor, *names))
            cases[factor, names] = measured(folder, model, exported(folder, model))
        return cases[factor, names]

    return make


LAST_CONV = ("head.final_layer.weight", "head.final_layer.bias")
GAMMA = ("head.gau.gamma",)


def inner(folder: Path, case: Case, x: np.ndarray) -> dict[str, float]:
    """Operator of the head -> largest magnitude that it makes."""
    ranges = measure_ranges(case.graph, [x], workdir=fresh(folder))
    return {one.name: ranges[one.output[0]].largest for one in onnx.load(case.graph.path).graph.node if one.output[0] in ranges}


def test_the_reference_evaluator_overflows_where_float16_does(tmp_path: Path) -> None:
    model = made(tmp_path, [node("ReduceL2", ["x"], ["y"], axes=[1])], y={"y": ("n", 1)})
    x = f32([[100, 100, 100, 100], [200, 200, 0, 0], [0, 0, 257, 0]])
    found = evaluated(apply_plan(model, PLAIN, workdir=tmp_path), x)["y"]
    assert found.tolist() == [[200.0], [math.inf], [math.inf]], "a sum, and a square"


@pytest.mark.parametrize(("factor", "least", "most"), [(1e3, 60, 256), (1e4, 600, 65504), (1e6, 65504, math.inf)], ids=["sum", "squares", "convolution"])
def test_scale_norm_overflows_in_plain_float16_and_not_in_the_plan(
    factor: float, least: float, most: float, pose_with: Callable[..., Case], tmp_path: Path
) -> None:
    """The norm cancels whatever the last convolution is multiplied by, if it is computed at all."""
    case = pose_with(factor, *LAST_CONV)
    x = case.sample(3)
    made_by = inner(tmp_path, case, x)
    assert least < made_by["/head/final_layer/Conv"] < most
    assert made_by["/head/mlp/mlp.0/ReduceL2"] > 256, "its square is beyond 65504"
    expected = ran(case.graph, x)
    assert off(expected, ran(pose_with(1).graph, x)) < 1e-5, "the same network"
    plain = evaluated(apply_plan(case.graph, PLAIN, workdir=tmp_path), x)
    assert off(plain, expected) > 0.5
    assert off(evaluated(case.typed, x), expected) <= 1e-2
    assert off(ran(case.typed, x), expected) <= 1e-2
    assert_typed(case.graph, case.plan, case.typed)
    assert case.plan.islands.keys() >= NORMS
    by_range = {name for name, reason in case.plan.islands.items() if reason.startswith("range: ")}
    assert ("/head/final_layer/Conv" in by_range) == (factor == 1e6)


@pytest.mark.parametrize("factor", [1e-4, 1e-6])
def test_scale_norm_underflows_in_plain_float16_and_not_in_the_plan(factor: float, pose_with: Callable[..., Case], tmp_path: Path) -> None:
    case = pose_with(factor, *LAST_CONV)
    x = case.sample(3)
    expected = ran(case.graph, x)
    assert off(evaluated(apply_plan(case.graph, PLAIN, workdir=tmp_path), x), expected) > 1e-2
    assert off(evaluated(case.typed, x), expected) <= 1e-2
    assert_typed(case.graph, case.plan, case.typed)
    assert re.fullmatch(r"range: \S+ stays below .*e-0[57]", case.plan.islands["/head/final_layer/Conv"])


@pytest.mark.parametrize("factor", [8, 64])
def test_attention_overflows_in_plain_float16_and_not_in_the_plan(factor: float, pose_with: Callable[..., Case], tmp_path: Path) -> None:
    case = pose_with(factor, *GAMMA)
    x = case.sample(3)
    made_by = inner(tmp_path, case, x)
    assert made_by["/head/gau/Relu"] < 65504 < made_by["/head/gau/Relu"] ** 2 < made_by["/head/gau/MatMul_1"], "its square overflows, it does not"
    expected = ran(case.graph, x)
    assert off(evaluated(apply_plan(case.graph, PLAIN, workdir=tmp_path), x), expected) == math.inf
    only_norms = PrecisionPlan(precision="fp16", islands=dict.fromkeys(NORMS, "by hand"), half=0)
    assert off(evaluated(apply_plan(case.graph, only_norms, workdir=tmp_path), x), expected) == math.inf
    assert off(evaluated(case.typed, x), expected) <= 1e-2
    assert off(ran(case.typed, x), expected) <= 1e-2
    assert_typed(case.graph, case.plan, case.typed)
    assert case.plan.islands.keys() > NORMS
    assert not any(name.startswith("/backbone") for name in case.plan.islands)


# ------------------------------------------------------------------------------------------------------------------- prescaling


@pytest.mark.parametrize(("dim", "axis"), [(6, -1), (48, 2), (256, -1)])
def test_prescaling_is_exact(dim: int, axis: int, tmp_path: Path) -> None:
    """Every row is measured against its own answer: tiny rows are clamped by the epsilon, and 1e-5 of a large row is no tiny one."""
    nodes = [
        node("ReduceL2", ["x"], ["n"], axes=[axis]),
        node("Mul", ["n", "scale"], ["m"]),
        node("Clip", ["m", "eps"], ["d"]),
        node("Div", ["x", "d"], ["q"]),
        node("Mul", ["q", "g"], ["y"]),
    ]
    model = made(tmp_path, nodes, {"scale": f32(dim**-0.5), "eps": f32(1e-5), "g": f32(1.3)}, x=("n", 3, dim))
    after = prescale_norms(model, workdir=tmp_path)
    onnx.checker.check_model(onnx.load(after.path), full_check=True)
    directions = np.random.default_rng(dim).standard_normal((12, 3, dim))
    directions /= np.sqrt((directions**2).mean(axis=2, keepdims=True))
    rms = np.array([0, 1e-6, 3e-6, 1e-5, 1e-4, 1e-2, 0.5, 1, 16, 37, 300, 3e3])
    x = (directions * rms[:, None, None]).astype(np.float32)
    norm = ScaleNorm(Shapes({"g": (1,)}), dim=dim)
    norm.g.data[:] = 1.3
    with torch.inference_mode():
        reference = norm(torch.from_numpy(x)).numpy()
    ours, theirs = ran(after, x)["y"], ran(model, x)["y"]
    np.testing.assert_allclose(theirs, reference, rtol=1e-6, atol=0)
    assert not ours[0].any()
    largest = np.abs(theirs[1:]).max(axis=2)
    assert (np.abs(ours[1:].astype(np.float64) - theirs[1:]).max(axis=2) <= 1e-6 * largest).all()


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_both_scale_norms_of_a_pose_estimator_are_rewritten(opset: int, tmp_path: Path) -> None:
    """Since opset 18 axes are an input."""
    model = read(tmp_path, random_weights(POSE, seed=3))
    graph = exported(tmp_path, model, OnnxOptions(opset=opset))
    after = prescale_norms(graph, workdir=tmp_path)
    proto = onnx.load(after.path)
    onnx.checker.check_model(proto, full_check=True)
    makers = {name: one.op_type for one in proto.graph.node for name in one.output}
    assert [makers[one.input[0]] for one in proto.graph.node if one.op_type == "ReduceL2"] == ["Div", "Div"]
    assert {op: count - graph.op_counts.get(op, 0) for op, count in after.op_counts.items() if op != "Constant" and count != graph.op_counts.get(op, 0)} == {
        "Abs": 2, "ReduceMax": 2, "Max": 2, "Div": 2, "Mul": 2
    }  # fmt: skip
    assert list(proto.graph.output) == list(onnx.load(graph.path).graph.output)
    assert list(proto.metadata_props) == list(onnx.load(graph.path).metadata_props)
    x = np.random.default_rng(8).standard_normal((3, 3, *model.input_hw)).astype(np.float32)
    assert off(ran(after, x), ran(graph, x)) <= 5e-6, "exact but for the rounding, which fifteen operators pass on"
    assert prescale_norms(graph, workdir=fresh(tmp_path)).sha256 == after.sha256


@pytest.mark.parametrize("factor", [1, 1e3, 1e4, 1e6])
def test_prescaled_norms_need_no_islands(factor: float, pose_with: Callable[..., Case], tmp_path: Path) -> None:
    case = pose_with(factor, *LAST_CONV)
    x = case.sample(3)
    graph = prescale_norms(case.graph, workdir=tmp_path)
    plan = plan_of(tmp_path, graph, case.sample(2, seed=7))
    ranges = {name: reason for name, reason in plan.islands.items() if reason.startswith("range: ")}
    assert bool(ranges) == (factor == 1e6), "what the convolution itself makes of it is out of range"
    assert not any("/gau/" in name for name in ranges)
    bare = PrecisionPlan(precision="fp16", islands=ranges, half=0)
    expected = ran(case.graph, x)
    assert off(evaluated(apply_plan(graph, bare, workdir=tmp_path), x), expected) <= 1e-2
    typed = apply_plan(graph, plan, workdir=tmp_path)
    assert_typed(graph, plan, typed)
    assert off(evaluated(typed, x), expected) <= 1e-2


@pytest.mark.parametrize(("axes", "keepdims", "shape"), [([1], 1, (1, 5)), ([0], 1, (1, 4)), ([1, 2], 1, (1, 1)), ([2], 0, (4,)), ([-2], 1, (1, 5))])
def test_norms_over_other_axes_are_no_scale_norms(axes: list[int], keepdims: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    nodes = [node("ReduceL2", ["x"], ["n"], axes=axes, keepdims=keepdims), node("Mul", ["n", "c"], ["y"])]
    model = made(tmp_path, nodes, {"c": f32(0.5)}, x=("n", 4, 5), y={"y": ("n", *shape)})
    with pytest.raises(ExportError, match="scale_norm: expected ScaleNorm"):
        prescale_norms(model, workdir=tmp_path)


def test_a_norm_that_somebody_else_reads_stays_what_it_is(tmp_path: Path) -> None:
    model = made(tmp_path, [node("ReduceL2", ["x"], ["n"], axes=[-1]), node("Mul", ["n", "c"], ["y"])], {"c": f32(0.5)}, y={"n": ("n", 1), "y": ("n", 1)})
    with pytest.raises(ExportError, match="scale_norm: expected ScaleNorm"):
        prescale_norms(model, workdir=tmp_path)


@pytest.mark.parametrize("name", ["classifier", "detector"])
def test_a_network_without_scale_norm_cannot_be_prescaled(name: str, case_of: Callable[[str], Case], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="scale_norm: expected ScaleNorm") as caught:
        prescale_norms(case_of(name).graph, workdir=tmp_path)
    assert "island" in caught.value.hint
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------- front door


def converted(checkpoint: Path, target: str, out: Path, **options: Any) -> Conversion:
    (conversion,) = convert(checkpoint, [load_config(target)], ConvertOptions(out=out, **options))
    return conversion


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = folder / "pose.pth"
    torch.save({"state_dict": weights}, path)
    return path


def assert_half_bundle(conversion: Conversion, single: Path) -> onnx.ModelProto:
    assert conversion.error is None, conversion.error
    assert conversion.parity is not None
    assert conversion.parity.passed
    assert conversion.parity.verified
    assert "plan precision" in conversion.seconds
    bundle = Bundle.open(conversion.place)
    bundle.verify()
    assert bundle.manifest is not None
    assert (bundle.manifest.precision, bundle.model.precision, bundle.model.backend) == ("fp16", "FP16", "onnxruntime")
    before = Bundle.open(single).manifest
    assert before is not None
    assert (bundle.manifest.inputs, bundle.manifest.outputs) == (before.inputs, before.outputs)
    assert "float16" not in {spec.dtype for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs)}
    net = conversion.place / "end2end.onnx"
    assert 0.48 < net.stat().st_size / (single / "end2end.onnx").stat().st_size < 0.54
    proto = onnx.load(net)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_a_pose_estimator_in_float16_finds_the_same_keypoints(demo_pose_bundle: Path, tmp_path: Path) -> None:
    conversion = converted(DEMO_MODELS["demo-pose"], "onnxruntime-fp16", tmp_path, name="demo-pose")
    assert_half_bundle(conversion, demo_pose_bundle)
    clear, differ = 0, False
    with PoseDetector(demo_pose_bundle) as single, PoseDetector(conversion.place) as half:
        for _, image, box in procedural_scenes(3):
            theirs, ours = single.estimate(image, box[None]), half.estimate(image, box[None])
            is_clear = theirs.scores > 1  # of a flat SimCC vector either of two bins may be the largest
            clear += int(is_clear.sum())
            assert np.abs(ours.keypoints_xy - theirs.keypoints_xy).max(axis=2)[is_clear].max() <= 0.5
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=0.05)
            differ |= bool((ours.scores != theirs.scores).any())
    assert clear >= 40
    assert differ, "not a digit is lost: it is not in float16"


def test_a_detector_in_float16_finds_the_same_boxes(demo_detector_bundle: Path, tmp_path: Path) -> None:
    conversion = converted(DEMO_MODELS["demo-det"], "onnxruntime-fp16", tmp_path, name="demo-det")
    proto = assert_half_bundle(conversion, demo_detector_bundle)
    (nms,) = (one for one in proto.graph.node if one.op_type == "NonMaxSuppression")
    kinds = element_types(proto)
    assert {kinds[name] for name in nms.input} == {SINGLE, INT64}
    found, differ = 0, False
    with Detector(demo_detector_bundle) as single, Detector(conversion.place) as half:
        for _, image, _ in procedural_scenes(3):
            theirs, ours = single.detect(image), half.detect(image)
            theirs, ours = theirs[theirs.scores > 0.3], ours[ours.scores > 0.3]
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, rtol=0, atol=0.5)
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=0.01)
            found += len(theirs)
            differ |= bool((ours.scores != theirs.scores).any())
    assert found >= 3
    assert differ, "not a digit is lost: it is not in float16"


@pytest.mark.parametrize("verify", [True, False])
def test_ranges_are_measured_with_and_without_verification(verify: bool, tmp_path: Path) -> None:
    """A network whose last convolution passes 65504: without ranges nothing would keep it in float32."""
    path = saved(tmp_path, grown(random_weights(POSE, seed=3), 1e6, *LAST_CONV))
    single, half = (converted(path, target, tmp_path / "crates", verify=verify) for target in ("onnxruntime", "onnxruntime-fp16"))
    assert [conversion.error for conversion in (single, half)] == [None, None]
    assert half.parity is not None
    assert half.parity.verified == verify
    assert ("plan precision" in half.seconds, "plan precision" in single.seconds) == (True, False)
    model = read_architecture(read_checkpoint(path))
    x = np.concatenate(list(network_inputs(model, procedural_images())))
    expected = ran(single.place / "end2end.onnx", x)
    assert 1e-6 < off(evaluated(half.place / "end2end.onnx", x), expected) <= 1e-2


def target_file(folder: Path, base: str, section: str) -> str:
    path = folder / "mine.toml"
    text = (CONFIG_FOLDER / f"{base}.toml").read_text(encoding="utf-8")
    assert section.count("=") == 1
    key = section.partition(" =")[0]
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
    if "[fp16]" not in "\n".join(lines):
        lines += ["[fp16]"]
    at = next(i for i, line in enumerate(lines) if line.startswith("[fp16]"))
    path.write_text("\n".join([*lines[: at + 1], section, *lines[at + 1 :]]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("base", "kinds"), [("onnxruntime", {SINGLE}), ("onnxruntime-fp16", {HALF, SINGLE})])
def test_prescaled_norms_are_for_any_precision(base: str, kinds: set[int], tmp_path: Path) -> None:
    path = saved(tmp_path, grown(random_weights(POSE, seed=3), 1e3, *LAST_CONV))
    conversion = converted(path, target_file(tmp_path, base, 'scale_norm = "prescaled"'), tmp_path)
    assert conversion.error is None, conversion.error
    assert conversion.parity is not None
    assert conversion.parity.passed
    proto = onnx.load(conversion.place / "end2end.onnx")
    ops = Counter(one.op_type for one in proto.graph.node)
    assert (ops["ReduceMax"], ops["ReduceL2"]) == (2, 2)
    assert set(element_types(proto).values()) - {INT64} == kinds


def test_a_target_that_prescales_what_has_no_norm_is_an_error(detector_checkpoint: Path, tmp_path: Path) -> None:
    conversion = converted(detector_checkpoint, target_file(tmp_path, "onnxruntime", 'scale_norm = "prescaled"'), tmp_path)
    assert conversion.status == "failed"
    with pytest.raises(ExportError, match="scale_norm: expected ScaleNorm"):
        raise conversion.error or AssertionError
    assert not conversion.place.exists()


def test_the_headroom_of_a_target_is_the_plans(tmp_path: Path) -> None:
    path = saved(tmp_path, random_weights(POSE, seed=3))
    halves = []
    for headroom in (1.0, 1e5):
        conversion = converted(path, target_file(tmp_path, "onnxruntime-fp16", f"headroom = {headroom}"), tmp_path, force=True)
        assert conversion.error is None, conversion.error
        halves.append(sum(kind == HALF for kind in element_types(onnx.load(conversion.place / "end2end.onnx")).values()))
    assert halves[0] > 1.5 * halves[1] > 0
