"""ONNX Runtime runs the canonical graph nearly as it is: its few wide kernels become transposed ones, and detectors get their suppression in the graph."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.export import all_nodes, save_onnx
from modelcrate_converter.observe import normalized
from modelcrate_converter.suppression import suppressed

if TYPE_CHECKING:
    import onnx

    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.progress import Report

_WIDE: Final = 7
"""The narrowest kernel that is worth it: RTMPose's last convolution has 7x7 over a map of 8x6 or 12x9."""
_LARGEST_MAP: Final = 24 * 18
"""Positions: beyond, what a transposed convolution keeps of all positions and taps no longer fits a core's cache."""


def build(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report) -> BackendArtifact:
    """Write `end2end.onnx`, MMDeploy's name of it.

    Args:
        model: what is being converted.
        source: the canonical graph, or the typed one.
        config: the target.
        workdir: where the file goes.
        report: gets nothing.
    """
    del report  # it takes no time
    if config.onnxruntime.transpose_wide_kernels:
        source = transpose_wide_kernels(source, workdir=workdir)
    raw = source
    source, has_nms = suppressed(model, source, config, workdir=workdir)
    target = workdir / "end2end.onnx"
    shutil.copyfile(source.path, target)
    return BackendArtifact(
        backend="onnxruntime",
        files={"net": target},
        precision=config.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        has_nms=has_nms,
        raw={"net": raw.path},
    )


def transpose_wide_kernels(model: OnnxModel, *, workdir: Path) -> OnnxModel:
    """Rewrite convolutions with wide kernels over small maps as transposed ones, which are the same sums in another order.

    ONNX Runtime's convolution is made for maps that are much larger than the kernel: near the border it does one position at a time, and it pads the
    channels of the result, 17 keypoints, to 32. Its transposed convolution is one matrix product, (taps x channels out, channels in) by (channels in,
    positions), and adds up the shifted results. With K the kernel turned by 180 degrees and its channels exchanged,
    conv(x, W)[p] = sum over t of W[t] x[p + t] = sum over q of K[p - q] x[q]: Dumoulin and Visin, "A guide to convolution arithmetic for deep
    learning" (2016), relationship 9.

    Args:
        model: a graph. Float32 convolutions with constant weights, one group, steps of 1 and a result as large as the map are rewritten.
        workdir: where `transposed.onnx` goes.

    Returns:
        The graph, with the names of all tensors as they were; `model` itself where there is nothing to rewrite.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    readers = Counter(name for node in all_nodes(graph) for name in node.input) + Counter(value.name for value in graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.value_info, *graph.output)}
    wide = [node for node in graph.node if _is_wide(node, weights, map_hw=tuple(shapes.get(node.input[0], ())[2:]) if node.input else ())]
    # The same weights in two places, one of which may stay as it is, would be in the file twice.
    wide = [node for node in wide if readers[node.input[1]] == 1]
    if not wide:
        return model
    for node in wide:
        tensor = weights[node.input[1]]
        kernel = onnx.numpy_helper.to_array(tensor)
        turned = np.ascontiguousarray(kernel[:, :, ::-1, ::-1].swapaxes(0, 1))
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))
        node.op_type = "ConvTranspose"
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(proto, workdir / "transposed.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata)


def _is_wide(node: onnx.NodeProto, weights: dict[str, Any], *, map_hw: tuple[int, ...]) -> bool:
    """Whether an operator is a convolution that `transpose_wide_kernels` rewrites; unknown sides of the map are 0."""
    import onnx

    if node.op_type != "Conv" or node.input[1] not in weights or len(map_hw) != 2 or not 0 < map_hw[0] * map_hw[1] <= _LARGEST_MAP:
        return False
    kernel_hw = list(weights[node.input[1]].dims[2:])
    around = [side // 2 for side in kernel_hw]
    plain = {"auto_pad": b"NOTSET", "dilations": [1, 1], "group": 1, "kernel_shape": kernel_hw, "pads": around * 2, "strides": [1, 1]}
    said = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    is_same_size = all(side % 2 for side in kernel_hw) and said.get("pads") == plain["pads"]
    return is_same_size and min(kernel_hw) >= _WIDE and all(plain[name] == value for name, value in said.items())
