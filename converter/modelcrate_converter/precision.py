"""Which operators compute in half precision: a plan on the graph from measured ranges, not a flag of a builder.

Float16 ends at 65504, and what is below 6e-5 loses digits or is flushed to zero. RTMPose's ScaleNorm sums 256 squares, and its attention squares once more:
both leave that range long before the network's answers do. So every backend with float16 gets the same typed graph: half where the ranges allow it,
float32 islands where they do not, float32 at the inputs and outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.export import OnnxModel, save_onnx
from modelcrate_converter.observe import float_tensors, normalized, observe

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

HALF_MAX: Final = 65504.0
HALF_TINY: Final = 2.0**-14
"""Smallest normal float16: below it digits go, and some devices flush to zero."""
_SQUARES: Final = frozenset({"ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum"})
"""Sums of squares or exponentials: inside, they are larger than anything that goes in or comes out."""
_FLOAT32_ONLY: Final = frozenset({
    "NonMaxSuppression", "TopK", "ConstantOfShape", "Range", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "EyeLike",
    "Multinomial", "Celu", "IsInf", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "TfIdfVectorizer",
})  # fmt: skip
_FLOAT32_INPUTS: Final[Mapping[str, frozenset[int]]] = {"Resize": frozenset({1, 2}), "Upsample": frozenset({1})}
"""Inputs that are float32 by definition, whatever the operator computes in."""
_CARRIERS: Final = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"})
"""What may stand between an epsilon and the division by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRange:
    """What a tensor was over all inputs: its least and its greatest value."""

    least: float
    greatest: float

    @property
    def largest(self) -> float:
        """The greatest magnitude."""
        return max(abs(self.least), abs(self.greatest))


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionPlan:
    """What computes in what.

    Attributes:
        precision: of the operators that are no islands.
        islands: operator -> why it stays in float32.
        half: how many operators compute in half precision.
    """

    precision: Literal["fp16"]
    islands: Mapping[str, str]
    half: int

    @property
    def summary(self) -> str:
        """For the console and the manifest."""
        kinds = Counter(reason.partition(":")[0] for reason in self.islands.values())
        return f"{self.half} operators in float16, {len(self.islands)} in float32" + (
            f" ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})" if kinds else ""
        )


def measure_ranges(model: OnnxModel, inputs: Iterable[NDArray[np.float32]], *, workdir: Path) -> dict[str, TensorRange]:
    """The range of every float tensor of a graph.

    Args:
        model: the graph.
        inputs: network inputs (n, C, H, W), run one after another: all tensors of one are held at a time.
        workdir: where a copy of the graph with all its tensors as outputs goes.

    Raises:
        ExportError: there are no inputs, or a tensor is not finite already in float32.
    """
    ranges: dict[str, TensorRange] = {}
    for values in observe(model, inputs, workdir=workdir):
        for name, value in values.items():
            found = TensorRange(least=float(value.min()), greatest=float(value.max()))
            if not (math.isfinite(found.least) and math.isfinite(found.greatest)):
                raise ExportError(f"{model.path.name}: {name}: expected finite values in float32, found others", hint="is the checkpoint sound?")
            before = ranges.get(name, found)
            ranges[name] = TensorRange(least=min(before.least, found.least), greatest=max(before.greatest, found.greatest))
    return ranges


def plan_half(model: OnnxModel, ranges: Mapping[str, TensorRange], *, headroom: float) -> PrecisionPlan:
    """Decide which operators may compute in float16.

    Args:
        model: the graph.
        ranges: of its tensors; see `measure_ranges`.
        headroom: how many times larger a tensor may be on other inputs.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    floats = float_tensors(proto)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    islands: dict[str, str] = {}
    count = 0
    made_by: dict[str, onnx.NodeProto] = {}
    for node in proto.graph.node:
        made_by |= dict.fromkeys(node.output, node)
        if not any(name in floats for name in (*node.input, *node.output)):
            continue  # shapes and indices
        count += 1
        reason = _reason(node, ranges, constants, headroom=headroom)
        if reason is not None:
            islands[node.name] = reason
        if node.op_type in {"Div", "Reciprocal"}:
            chain, divisor = [node], made_by.get(node.input[-1])
            while divisor is not None and divisor.name not in islands and divisor.op_type in _CARRIERS:
                chain.append(divisor)
                divisor = made_by.get(divisor.input[0])
            if divisor is not None and divisor.name in islands:
                for one in chain:
                    islands.setdefault(one.name, "division: by what an island made, which may be as small as its epsilon")
    return PrecisionPlan(precision="fp16", islands=islands, half=count - len(islands))


def _reason(node: onnx.NodeProto, ranges: Mapping[str, TensorRange], constants: Mapping[str, onnx.TensorProto], *, headroom: float) -> str | None:
    """Why an operator cannot compute in float16; None if it can."""
    import onnx

    if node.op_type in _FLOAT32_ONLY or any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
        return f"{node.op_type}: is float32 by definition"
    largest = {name: ranges[name].largest * headroom for name in (*node.input, *node.output) if name in ranges}
    over = next((name for name, value in largest.items() if value > HALF_MAX), None)
    if over is not None:
        return f"range: {over} reaches {largest[over] / headroom:.3g}"
    under = next((name for name in largest if 0 < ranges[name].largest < HALF_TINY), None)
    if under is not None:
        return f"range: {under} stays below {ranges[under].largest:.3g}"
    if node.op_type in _SQUARES:
        return "sum of squares: overflows before its result does"
    for name in node.input:
        tensor = constants.get(name)
        if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT:
            value = float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0))
            if 0 < value < HALF_TINY or value > HALF_MAX:
                return f"constant: {value:.3g}"
    return None


def apply_plan(model: OnnxModel, plan: PrecisionPlan, *, workdir: Path) -> OnnxModel:
    """Write the typed graph: float16 weights and operators, casts around the islands, float32 inputs and outputs.

    Args:
        model: the graph in float32.
        plan: made for it.
        workdir: where `typed.onnx` goes.

    Raises:
        ExportError: a graph with control flow.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    if any(attribute.type == onnx.AttributeProto.GRAPH for node in proto.graph.node for attribute in node.attribute):
        raise ExportError(f"{model.path.name}: expected a graph without control flow for float16, found If or Loop", hint="use a float32 target")
    writer = _Typed(proto, plan)
    writer.rewrite()
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(proto, workdir / "typed.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata)


class _Typed:
    """A graph that is being given types. A tensor has the type of the operator that makes it; who needs the other reads it through a cast."""

    def __init__(self, proto: onnx.ModelProto, plan: PrecisionPlan) -> None:
        self._graph = proto.graph
        self._plan = plan
        self._floats = float_tensors(proto)
        self._constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._is_half: dict[str, bool] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._casts: dict[tuple[str, bool], str] = {}
        self._taken = {name for node in proto.graph.node for name in (node.name, *node.input, *node.output)}
        self._taken |= {value.name for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)}

    def rewrite(self) -> None:
        outputs = {value.name for value in self._graph.output}
        for node in list(self._graph.node):
            is_half = node.name not in self._plan.islands and self._is_float(node)
            fixed = _FLOAT32_INPUTS.get(node.op_type, frozenset())
            for i, name in enumerate(node.input):
                if name in self._floats:
                    node.input[i] = self._read(name, half=is_half and i not in fixed)
            if node.op_type == "Cast" and is_half:
                self._retarget(node)
            self._nodes.append(node)
            for i, name in enumerate(node.output):
                if name in self._floats:
                    self._is_half[name] = is_half and name not in outputs
                    if is_half and name in outputs:
                        self._casts[name, True] = node.output[i] = self._free(f"{name}_half")
                        self._cast(node.output[i], name, half=False)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = outputs.union(*(node.input for node in self._nodes))
        kept = [tensor for tensor in self._constants.values() if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _is_float(self, node: onnx.NodeProto) -> bool:
        return any(name in self._floats for name in (*node.input, *node.output))

    def _read(self, name: str, *, half: bool) -> str:
        """The name under which a tensor is read in a type."""
        if (name, half) in self._casts:
            return self._casts[name, half]
        if name in self._constants:
            self._casts[name, half] = self._constant(name) if half else name
        elif self._is_half.get(name, False) == half:
            return name
        else:
            self._casts[name, half] = self._cast(name, self._free(f"{name}_{'half' if half else 'single'}"), half=half)
        return self._casts[name, half]

    def _constant(self, name: str) -> str:
        import onnx

        value = onnx.numpy_helper.to_array(self._constants[name])
        with np.errstate(over="ignore"):
            half = np.clip(value, -HALF_MAX, HALF_MAX).astype(np.float16)
        target = self._free(f"{name}_half")
        self._constants[target] = onnx.numpy_helper.from_array(half, target)
        return target

    def _free(self, name: str) -> str:
        """A name that nothing has yet."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _cast(self, name: str, target: str, *, half: bool) -> str:
        import onnx

        kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
        self._nodes.append(onnx.helper.make_node("Cast", [name], [target], name=self._free(f"cast_{target}"), to=kind))
        return target

    def _retarget(self, node: onnx.NodeProto) -> None:
        import onnx

        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16


def prescale_norms(model: OnnxModel, *, workdir: Path) -> OnnxModel:
    """Rewrite ScaleNorm so that nothing in it overflows float16: x / clamp(m * (||x / m|| * d^-0.5), eps) with m = max(|x|, 1), which is the same number.

    Source: arithmetic; each row is divided by its largest magnitude before it is squared, and the norm multiplied by it after the factor d^-0.5.

    Args:
        model: a graph with ReduceL2, Mul, Clip, Div over the last axis; norms over other axes stay as they are.
        workdir: where `prescaled.onnx` goes.

    Raises:
        ExportError: there is no ScaleNorm.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.output, *graph.value_info)}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    factors: dict[str, str] = {}
    rewritten = 0
    for node in graph.node:
        is_norm = node.op_type == "ReduceL2" and node.output[0] not in outputs and _keeps_last_axis(node, constants, rank=ranks.get(node.input[0], 0))
        scale = readers.get(node.output[0], []) if is_norm else []
        if len(scale) == 1 and scale[0].op_type == "Mul" and any(name in constants for name in scale[0].input):
            x, prefix = node.input[0], f"prescale_{rewritten}"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, dtype=np.float32), f"{prefix}_one"))
            largest = onnx.helper.make_node("ReduceMax", [f"{prefix}_abs"], [f"{prefix}_max"], name=f"{prefix}_max", keepdims=1)
            if model.opset < 18:
                largest.attribute.append(onnx.helper.make_attribute("axes", [-1]))
            else:
                graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], dtype=np.int64), f"{prefix}_axes"))
                largest.input.append(f"{prefix}_axes")
            nodes += [
                onnx.helper.make_node("Abs", [x], [f"{prefix}_abs"], name=f"{prefix}_abs"),
                largest,
                onnx.helper.make_node("Max", [f"{prefix}_max", f"{prefix}_one"], [f"{prefix}_m"], name=f"{prefix}_m"),
                onnx.helper.make_node("Div", [x, f"{prefix}_m"], [f"{prefix}_x"], name=f"{prefix}_x"),
            ]
            node.input[0] = f"{prefix}_x"
            factors[scale[0].name] = f"{prefix}_m"
            rewritten += 1
        nodes.append(node)
        if node.name in factors:
            (target,) = node.output
            node.output[0] = f"{target}_unscaled"
            nodes.append(onnx.helper.make_node("Mul", [node.output[0], factors[node.name]], [target], name=f"{node.name}_rescaled"))
    if not rewritten:
        raise ExportError(f"{model.path.name}: scale_norm: expected ScaleNorm (ReduceL2, Mul) in the graph, found none", hint='scale_norm = "island"')
    del graph.node[:]
    graph.node.extend(nodes)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(proto, workdir / "prescaled.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata)


def _keeps_last_axis(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], *, rank: int) -> bool:
    """Whether a reduction is over the last axis alone and leaves an axis of 1 there."""
    import onnx

    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    axes = attributes.get("axes", [])
    if len(node.input) > 1 and node.input[1] in constants:  # since opset 18
        axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    return attributes.get("keepdims", 1) == 1 and list(axes) in ([-1], [rank - 1])
