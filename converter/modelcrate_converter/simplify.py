"""Folding constants and shapes out of the canonical graph, so that people and other converters can read it.

ONNX Runtime folds for itself: this is for pnnx, TensorRT and readability, and changes no number.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.export import OnnxModel, save_onnx

if TYPE_CHECKING:
    from collections.abc import Mapping


def simplify(model: OnnxModel, *, workdir: Path, metadata: Mapping[str, str]) -> OnnxModel:
    """Run onnxsim.

    Args:
        model: a graph of ours.
        workdir: where `simplified.onnx` goes.
        metadata: as for `save_onnx`.

    Raises:
        ExportError: onnxsim failed or distrusts its own result.
    """
    import onnx
    import onnxsim

    try:
        proto, is_checked = onnxsim.simplify(onnx.load(model.path))
    except Exception as error:  # a C++ library behind a binding
        raise ExportError(f"{model.path.name}: expected onnxsim to simplify the graph, found: {error}", hint="run again with --no-simplify") from error
    if not is_checked:
        raise ExportError(f"{model.path.name}: onnxsim's own check of its result failed", hint="run again with --no-simplify")
    return save_onnx(proto, workdir / "simplified.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata)


def op_table(before: OnnxModel, after: OnnxModel) -> list[tuple[str, int, int]]:
    """(operator, count before, count after), those that changed first, then by name."""
    names = sorted(set(before.op_counts) | set(after.op_counts))
    rows = [(name, before.op_counts.get(name, 0), after.op_counts.get(name, 0)) for name in names]
    return sorted(rows, key=lambda row: (row[1] == row[2], row[0]))
