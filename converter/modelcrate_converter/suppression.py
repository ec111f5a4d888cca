"""The detector's second graph: decode and NonMaxSuppression behind the raw head, in standard ONNX operators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.export import OnnxModel, save_onnx
from modelcrate_converter.exportable import BoxesFacts, DetectorFacts
from modelcrate_converter.models.rtmdet import STRIDES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.exportable import ExportableModel


class _Tail:
    """Nodes and constants that are being appended to a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._count = 0

    def constant(self, value: object, dtype: type[np.generic]) -> str:
        import onnx

        name = f"nms_constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def node(self, op: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or a tuple of names."""
        import onnx

        self._count += 1
        names = [name or f"nms_{op}_{self._count}_{i}" for i in range(outputs)]
        self._graph.node.append(onnx.helper.make_node(op, list(inputs), names, name=f"nms_{op}_{self._count}", **attributes))
        return names[0] if outputs == 1 else tuple(names)


def points(input_hw: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The (A, 4) x, y, x, y of all cells' points in network pixels: level by level, row by row, offset 0."""
    height, width = input_hw
    levels = []
    for stride in STRIDES:
        y, x = np.meshgrid(np.arange(height // stride) * stride, np.arange(width // stride) * stride, indexing="ij")
        levels.append(np.stack([x, y, x, y], axis=-1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def suppressed(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path) -> tuple[OnnxModel, bool]:
    """The graph that a backend gets which can suppress: with NonMaxSuppression for detectors, if the config wants it there.

    Args:
        model: what is being converted.
        source: the canonical graph.
        config: the target.
        workdir: where the graph goes.

    Returns:
        The graph, and whether boxes come out of it suppressed.
    """
    if isinstance(model.postprocess, DetectorFacts) and config.nms.where == "graph":
        metadata = {"checkpoint": model.checkpoint[1], "model": model.name}
        return attach_nms(source, model.postprocess, pre_top_k=config.nms.pre_top_k, workdir=workdir, metadata=metadata), True
    return source, isinstance(model.postprocess, BoxesFacts)


def attach_nms(model: OnnxModel, facts: DetectorFacts, *, pre_top_k: int, workdir: Path, metadata: Mapping[str, str]) -> OnnxModel:
    """Derive the graph that MMDeploy's SDK expects of a detector.

    Boxes are not clipped, as in MMDeploy's graph. Suppression is per class. Unlike MMDeploy's, a batch costs no more than its images, and the
    number of rows is fixed: rows beyond the detections have score 0, box 0 and label -1, and every reader drops them by score.

    Args:
        model: the canonical graph with outputs `cls_*` and `dist_*`.
        facts: thresholds.
        pre_top_k: candidates that enter suppression, by best class score.
        workdir: where `suppressed.onnx` goes.
        metadata: as for `save_onnx`.

    Returns:
        A graph with the outputs `dets` (batch, n, 5), boxes in network pixels and score, best first, and `labels` (batch, n) int64.
    """
    import onnx

    proto = onnx.load(model.path)
    graph = proto.graph
    tail = _Tail(graph)
    classes = next(spec for spec in model.outputs if spec.name == "cls_0").shape[1]
    height, width = model.inputs[0].shape[2:]
    assert isinstance(classes, int)
    assert isinstance(height, int)
    assert isinstance(width, int)
    anchors = points((height, width))
    candidates = min(pre_top_k, len(anchors))
    kept = min(facts.max_per_img, classes * candidates)

    flat = {key: [tail.node("Reshape", f"{key}_{i}", tail.ints(0, size, -1)) for i in range(len(STRIDES))] for key, size in (("cls", classes), ("dist", 4))}
    scores = tail.node("Sigmoid", tail.node("Concat", *flat["cls"], axis=2))  # (B, C, A)
    distances = tail.node("Transpose", tail.node("Concat", *flat["dist"], axis=2), perm=[0, 2, 1])  # (B, A, 4)
    signed = tail.node("Mul", distances, tail.constant([-1, -1, 1, 1], np.float32))
    boxes = tail.node("Add", signed, tail.constant(anchors[None], np.float32))
    if candidates < len(anchors):
        best = tail.node("ReduceMax", scores, axes=[1], keepdims=0)
        _, index = tail.node("TopK", best, tail.ints(candidates), axis=1, outputs=2)
        index = tail.node("Unsqueeze", index, tail.ints(2))
        boxes = tail.node("GatherND", boxes, index, batch_dims=1)
        by_anchor = tail.node("GatherND", tail.node("Transpose", scores, perm=[0, 2, 1]), index, batch_dims=1)
        scores = tail.node("Transpose", by_anchor, perm=[0, 2, 1])
    selected = tail.node(
        "NonMaxSuppression", boxes, scores, tail.ints(kept), tail.constant([facts.iou_threshold], np.float32), tail.constant([facts.score_thr], np.float32)
    )  # (S, 3) image, class, box
    # The survivors' scores on a field of zeros, then the best of each image: rows never mix between images, and their number is fixed.
    zeros = tail.node("ConstantOfShape", tail.node("Shape", scores), value=onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [1], [0.0]))
    survivors = tail.node("ScatterND", zeros, selected, tail.node("GatherND", scores, selected))
    values, index = tail.node("TopK", tail.node("Reshape", survivors, tail.ints(0, -1)), tail.ints(kept), axis=1, outputs=2)
    label = tail.node("Div", index, tail.ints(candidates))
    box = tail.node("Mod", index, tail.ints(candidates))
    rows = tail.node("GatherND", boxes, tail.node("Unsqueeze", box, tail.ints(2)), batch_dims=1)
    valid = tail.node("Greater", values, tail.constant(0, np.float32))
    column = tail.ints(2)
    rows = tail.node("Where", tail.node("Unsqueeze", valid, column), rows, tail.constant(0, np.float32))
    tail.node("Concat", rows, tail.node("Unsqueeze", values, column), axis=2, name="dets")
    tail.node("Where", valid, label, tail.constant(-1, np.int64), name="labels")

    outputs = (
        TensorSpec(name="dets", dtype="float32", shape=("batch", kept, 5)),
        TensorSpec(name="labels", dtype="int64", shape=("batch", kept)),
    )
    del graph.output[:]
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(spec.name) for spec in outputs)
    return save_onnx(proto, workdir / "suppressed.onnx", inputs=model.inputs, outputs=outputs, metadata=metadata)
