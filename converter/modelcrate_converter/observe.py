"""What happens inside a graph: the values of its inner tensors on given inputs, for ranges, calibration and the search for a wrong one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcrate_bundle.errors import ExportError
from modelcrate_runtime.sessions import SessionOptions, open_artefact

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from modelcrate_converter.export import OnnxModel


def observe(
    model: OnnxModel, inputs: Iterable[NDArray[np.float32]], *, workdir: Path, names: Collection[str] | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """Run a graph in ONNX Runtime as it stands, and show its float tensors, half ones as they are.

    Args:
        model: the graph.
        inputs: network inputs (n, C, H, W), run one after another: all tensors of one are held at a time.
        workdir: where a copy of the graph with these tensors as outputs goes, while it is needed.
        names: which tensors; None for all that operators make.

    Yields:
        For each input, tensor name -> value; the input itself is among them.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    kinds = dict.fromkeys(float_tensors(proto), onnx.TensorProto.FLOAT)
    kinds |= {value.name: onnx.TensorProto.FLOAT16 for value in proto.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    known = {value.name for value in proto.graph.output}
    produced = [name for node in proto.graph.node for name in node.output if name in kinds and (names is None or name in names)]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in produced if name not in known)
    path = workdir / "observed.onnx"
    onnx.save(proto, path)
    try:
        session = open_artefact("onnxruntime", {"net": path}, SessionOptions(optimize=False), where=model.path.name)
        try:
            ran = False
            for tensor in inputs:
                ran = True
                values: dict[str, NDArray[Any]] = {model.inputs[0].name: tensor, **session.run({model.inputs[0].name: tensor})}
                yield {name: value for name, value in values.items() if name in kinds and (names is None or name in names) and value.size}
        finally:
            session.close()
    finally:
        path.unlink()
    if not ran:
        raise ExportError(f"{model.path.name}: expected inputs to look at it with, found none")


def normalized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With a name for every operator, the same each time; its Constant nodes among the initializers; and inferred types and shapes."""
    import onnx

    kept = []
    for i, node in enumerate(proto.graph.node):
        value = _constant_value(node)
        if value is not None:
            value.name = node.output[0]
            proto.graph.initializer.append(value)
            continue
        node.name = node.name or f"{node.op_type}_{i}"
        kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    if len({node.name for node in kept}) != len(kept):
        for i, node in enumerate(kept):
            node.name = f"{node.name}_{i}"
    return onnx.shape_inference.infer_shapes(proto)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant node says, whichever of its attributes says it; None for other operators, text and sparse tensors."""
    import onnx

    if node.op_type != "Constant":
        return None
    (attribute,) = node.attribute
    dtype = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}.get(attribute.name)
    value: onnx.TensorProto | None = attribute.t if attribute.name == "value" else None
    if dtype is not None:
        value = onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), dtype=dtype))
    return value


def float_tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, weights among them."""
    import onnx

    graph = proto.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    named = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return named | {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
