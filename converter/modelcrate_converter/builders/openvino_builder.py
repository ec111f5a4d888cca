"""OpenVINO reads the canonical graph; it is saved as IR with its weights' precision said explicitly, since the default halves them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.suppression import suppressed

if TYPE_CHECKING:
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.progress import Report


def build(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report) -> BackendArtifact:
    """Write `end2end.xml` and `end2end.bin`, MMDeploy's names of them.

    Weights are float16 for `fp16` and float32 else: bfloat16 is what the CPU computes in, not what is stored.

    Args:
        model: what is being converted.
        source: the canonical graph; for `int8` a graph with QuantizeLinear and DequantizeLinear.
        config: the target.
        workdir: where the files go.
        report: gets nothing.

    Raises:
        ExportError: OpenVINO cannot read the graph.
    """
    del report  # it takes no time
    raw = source
    source, has_nms = suppressed(model, source, config, workdir=workdir)
    return BackendArtifact(
        backend="openvino",
        files=_saved(model, source, workdir / "end2end.xml", is_half=config.precision == "fp16"),
        precision=config.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        has_nms=has_nms,
        raw=_saved(model, raw, workdir / "raw.xml", is_half=config.precision == "fp16") if has_nms and source is not raw else {},
    )


def _saved(model: ExportableModel, source: OnnxModel, path: Path, *, is_half: bool) -> dict[str, Path]:
    import openvino as ov

    network: Any
    try:
        network = ov.Core().read_model(str(source.path))
    except Exception as error:  # a C++ library behind a binding
        text = " ".join(str(error).split())[-300:]
        raise ExportError(f"{model.name}: expected OpenVINO {ov.get_version()} to read the graph, found: {text}") from error
    ov.save_model(network, str(path), compress_to_fp16=is_half)
    return {"net": path, "weights": path.with_suffix(".bin")}
