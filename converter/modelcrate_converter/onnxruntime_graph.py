"""The canonical graph as ONNX Runtime computes it soonest: the same numbers, but for the order in which float32 sums are added up.

ONNX Runtime's convolutions on CPUs work on blocks of 16 or 8 channels and on rows of positions. A position near the border is done by itself, and so are
those that are left of a row when its blocks of six are done: rows should be long, and kernels small beside the map.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_converter.export import all_nodes, save_onnx
from modelcrate_converter.observe import normalized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from modelcrate_converter.config import OnnxRuntimeOptions
    from modelcrate_converter.export import OnnxModel

_WIDE: Final = 7
"""The narrowest kernel that is worth it: RTMPose's last convolution has 7x7 over a map of 8x6 or 12x9."""
_LARGEST_MAP: Final = 24 * 18
"""Positions: beyond, what a transposed convolution keeps of all positions and taps no longer fits a core's cache."""
_CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
_WINDOWS: Final = _CONVOLUTIONS | {"MaxPool", "AveragePool", "LpPool"}
_GLOBAL_POOLS: Final = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
_ELEMENTWISE: Final = frozenset({
    "Abs", "Add", "Clip", "Div", "Elu", "Erf", "Exp", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh",
})  # fmt: skip
_SIDES: Final = {"kernel_shape": (1, 0), "strides": (1, 0), "dilations": (1, 0), "output_padding": (1, 0), "pads": (1, 0, 3, 2)}
"""Attributes with a number for each side, and the order in which a map on its side has them."""


def suit(model: OnnxModel, options: OnnxRuntimeOptions, *, workdir: Path) -> OnnxModel:
    """Rewrite a graph for ONNX Runtime.

    Args:
        model: the canonical graph, or the typed one.
        options: what is to be rewritten.
        workdir: where `suited.onnx` goes.

    Returns:
        The graph, its tensors under the names that they had; `model` itself where there is nothing to rewrite.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    is_changed = options.transpose_wide_kernels and transpose_wide_kernels(proto)
    is_changed |= options.lay_portraits_down and lay_portraits_down(proto)
    if not is_changed:
        return model
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(proto, workdir / "suited.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata)


# ------------------------------------------------------------------------------------------------------------------ wide kernels


def transpose_wide_kernels(proto: onnx.ModelProto) -> bool:
    """Rewrite convolutions with wide kernels over small maps as transposed ones.

    A position of a map of 8x6 is always near the border for a kernel of 7x7, and 17 keypoints are padded to 32 channels. A transposed convolution is one
    matrix product, (taps x channels out, channels in) by (channels in, positions), and adds up the shifted results. With K the kernel turned by 180 degrees
    and its channels exchanged, conv(x, W)[p] = sum over t of W[t] x[p + t] = sum over q of K[p - q] x[q]: Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning" (2016), relationship 9.

    Args:
        proto: a normalized graph. Float32 convolutions with constant weights, one group, steps of 1 and a result as large as the map are rewritten.

    Returns:
        Whether there was one.
    """
    graph = proto.graph
    weights, shapes = _float_weights(graph), _shapes(graph)
    readers = _readers(graph)
    wide = [node for node in graph.node if node.input and _is_wide(node, weights, map_hw=shapes.get(node.input[0], ())[2:])]
    # The same weights in two places, one of which may stay as it is, would be in the file twice.
    wide = [node for node in wide if readers[node.input[1]] == 1]
    for node in wide:
        _change(weights[node.input[1]], lambda kernel: kernel[:, :, ::-1, ::-1].swapaxes(0, 1))
        node.op_type = "ConvTranspose"
    return bool(wide)


def _is_wide(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], *, map_hw: Sequence[int]) -> bool:
    """Whether an operator is a convolution that is rewritten; unknown sides of the map are 0."""
    if node.op_type != "Conv" or node.input[1] not in weights or len(map_hw) != 2 or not 0 < map_hw[0] * map_hw[1] <= _LARGEST_MAP:
        return False
    kernel_hw = list(weights[node.input[1]].dims[2:])
    around = [side // 2 for side in kernel_hw]
    plain = {"auto_pad": b"NOTSET", "dilations": [1, 1], "group": 1, "kernel_shape": kernel_hw, "pads": around * 2, "strides": [1, 1]}
    said = _attributes(node)
    is_same_size = all(side % 2 for side in kernel_hw) and said.get("pads") == plain["pads"]
    return is_same_size and min(kernel_hw) >= _WIDE and all(plain[name] == value for name, value in said.items())


# --------------------------------------------------------------------------------------------------------------------- portraits


def lay_portraits_down(proto: onnx.ModelProto) -> bool:
    """Rewrite a network whose input is higher than wide so that its maps lie on their side: rows of 8 instead of 6, of 128 instead of 96.

    The input is transposed, and so are all kernels, paddings and steps. Where something else than convolutions, poolings and what treats every position
    alike reads a map, it is transposed back: before the head's first Reshape, and before an output.

    Args:
        proto: a normalized graph; it is changed only if all its convolutions and poolings can lie.

    Returns:
        Whether it was changed.
    """
    lying = lying_tensors(proto)
    if lying:
        _lay_down(proto.graph, next(value.name for value in proto.graph.input if value.name in lying), lying)
    return bool(lying)


def lying_tensors(proto: onnx.ModelProto) -> set[str]:
    """What `lay_portraits_down` lays on its side in a normalized graph: the input, and what is made from lying tensors alone; nothing if not all can lie."""
    graph = proto.graph
    shapes, weights = _shapes(graph), _float_weights(graph)
    image = next((value.name for value in graph.input if len(shapes[value.name]) == 4), None)
    if image is None or not shapes[image][2] > shapes[image][3] > 0:
        return set()
    lying = {image}
    for node in graph.node:
        if any(name in lying for name in node.input) and _can_lie(node, lying, weights, shapes):
            lying.update(node.output)
    # What has one position has no side.
    windows = [node for node in graph.node if node.op_type in _WINDOWS and shapes.get(node.input[0], ())[2:] != [1, 1]]
    inner = Counter(name for node in all_nodes(graph) for name in node.input) - Counter(name for node in graph.node for name in node.input)
    return lying if windows and all(node.output[0] in lying for node in windows) and not lying & set(inner) else set()


def _can_lie(node: onnx.NodeProto, lying: set[str], weights: Mapping[str, onnx.TensorProto], shapes: Mapping[str, list[int]]) -> bool:
    """Whether an operator that reads lying tensors can make lying ones."""
    said = _attributes(node)
    others = [name for name in node.input if name and name not in lying]
    if node.op_type in _WINDOWS:
        is_whole = node.op_type not in _CONVOLUTIONS or (node.input[1] in weights and len(weights[node.input[1]].dims) == 4)
        return is_whole and node.input[0] in lying and len(node.output) == 1 and said.get("auto_pad", b"NOTSET") == b"NOTSET" and "output_shape" not in said
    if node.op_type == "Concat":
        return said["axis"] == 1 and not others
    # Beside maps there may be numbers, or one for each channel.
    is_spread = all(name in shapes and len(shapes[name]) <= 4 and shapes[name][-2:] in ([], [1], [1, 1]) for name in others)
    return node.op_type in _ELEMENTWISE and is_spread


def _lay_down(graph: onnx.GraphProto, image: str, lying: set[str]) -> None:
    import onnx

    weights, readers = _float_weights(graph), _readers(graph)
    outputs = {value.name for value in graph.output}
    # A lying tensor keeps its name, so that who looks for it by name finds it; the input and the outputs must stand under theirs.
    names = {name: f"{name}_lying" for name in lying if name == image or name in outputs}
    upright = {image: image}
    turned: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []

    def transpose(source: str, target: str) -> str:
        nodes.append(onnx.helper.make_node("Transpose", [source], [target], name=f"{target}_transposed", perm=[0, 1, 3, 2]))
        return target

    transpose(image, names[image])
    for node in graph.node:
        is_lying = bool(lying & set(node.output))
        for i, name in enumerate(node.input):
            if name in lying and (is_lying or node.op_type in _GLOBAL_POOLS):
                node.input[i] = names.get(name, name)
            elif name in lying:
                if name not in upright:
                    upright[name] = transpose(name, f"{name}_upright")
                node.input[i] = upright[name]
        made = [name for name in node.output if is_lying and name in names]
        if is_lying:
            for attribute in node.attribute:
                if attribute.name in _SIDES:
                    attribute.ints[:] = [attribute.ints[i] for i in _SIDES[attribute.name]]
            if node.op_type in _CONVOLUTIONS:
                node.input[1] = _turned(graph, weights, node.input[1], turned, is_shared=readers[node.input[1]] > 1)
            node.output[:] = [names.get(name, name) for name in node.output]
        nodes.append(node)
        for name in made:
            upright[name] = transpose(names[name], name)
    del graph.node[:]
    graph.node.extend(nodes)
    left = _readers(graph)
    for name in [name for name in turned if not left[name]]:
        graph.initializer.remove(weights[name])


def _turned(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], name: str, turned: dict[str, str], *, is_shared: bool) -> str:
    """The name of the same kernel on its side: a copy where something else may read it as it stands."""
    if not is_shared:
        _change(weights[name], lambda kernel: kernel.swapaxes(2, 3))
        return name
    if name not in turned:
        turned[name] = f"{name}_lying"
        copy = graph.initializer.add()
        copy.CopyFrom(weights[name])
        copy.name = turned[name]
        _change(copy, lambda kernel: kernel.swapaxes(2, 3))
    return turned[name]


# --------------------------------------------------------------------------------------------------------------- reading a graph


def _float_weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    import onnx

    return {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Of all tensors that have one; a side that may differ is 0."""
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values if value.type.tensor_type.HasField("shape")}
    return shapes | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def _readers(graph: onnx.GraphProto) -> Counter[str]:
    """Tensor -> how often it is read, inner graphs and the graph's outputs counted."""
    return Counter(name for node in all_nodes(graph) for name in node.input) + Counter(value.name for value in graph.output)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _change(tensor: onnx.TensorProto, how: Any) -> None:
    import onnx

    changed = np.ascontiguousarray(how(onnx.numpy_helper.to_array(tensor)))
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
