"""ONNX Runtime runs the canonical graph in the form that suits it; detectors get their suppression in the graph unless the config leaves it to the runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.onnxruntime_graph import suit
from modelcrate_converter.suppression import suppressed

if TYPE_CHECKING:
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.progress import Report


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
    source = suit(source, config.onnxruntime, workdir=workdir)
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
