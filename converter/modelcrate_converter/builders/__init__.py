"""Builders: one module per backend, all with the same face, in a static table.

A builder module offers `build(model, source, config, *, workdir, report) -> BackendArtifact` and imports its framework inside that function.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from modelcrate_bundle.errors import ConfigError, MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.progress import ignore
from modelcrate_runtime.sessions import BACKENDS, SessionOptions
from modelcrate_runtime.sessions.cuda_device import find_gpu, require_binding
from modelcrate_runtime.sessions.tensorrt_session import check_gpu

if TYPE_CHECKING:
    from modelcrate_bundle.manifest import EngineRecord
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.progress import Report


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendArtifact:
    """What a builder made.

    Attributes:
        backend: its name in deploy.json.
        files: role (net, weights) -> file; the file's name is its name in the bundle.
        precision: what it computes in.
        inputs: its inputs.
        outputs: its outputs.
        has_nms: whether detections come out suppressed.
        engine: what an engine was built for; None for what is no engine.
        device_id: the GPU to run it on, where it needs one.
        cuda_binding: what that goes through; empty takes what is installed.
        raw: role -> file of the same network without suppression, to compare a detector's head with PyTorch; empty where `files` are that.
    """

    backend: str
    files: Mapping[str, Path]
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    has_nms: bool
    engine: EngineRecord | None = None
    device_id: int = 0
    cuda_binding: str = ""
    raw: Mapping[str, Path] = field(default_factory=dict)

    def options(self) -> SessionOptions:
        """How to run it."""
        return SessionOptions(precision=self.precision, device_id=self.device_id, cuda_binding=self.cuda_binding or None, built_for=self.engine)


class _BuilderModule(Protocol):
    def build(self, model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report) -> BackendArtifact: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """One row of the table of builders.

    Attributes:
        module: our module.
        needs: the modules that it needs.
        extras: the extras that bring them beside `convert` and the backend's own.
        needs_gpu: whether what it builds runs on an NVIDIA GPU alone.
        typed: precisions that it takes as a typed graph, made by `modelcrate_converter.precision`; the others are its own business.
    """

    module: str
    needs: tuple[str, ...]
    extras: tuple[str, ...] = ()
    needs_gpu: bool = False
    typed: tuple[str, ...] = ()


_CONVERT: Final = ("torch", "onnx", "onnxsim", "onnxscript", "safetensors", "jinja2")
"""What every build needs, whatever the backend."""
BUILDERS: Final[Mapping[str, Builder]] = {
    "onnxruntime": Builder(module="modelcrate_converter.builders.onnxruntime_builder", needs=(*_CONVERT, "onnxruntime"), typed=("fp16", "int8")),
    "openvino": Builder(module="modelcrate_converter.builders.openvino_builder", needs=(*_CONVERT, "openvino"), typed=("int8",)),
    "ncnn": Builder(module="modelcrate_converter.builders.ncnn_builder", needs=(*_CONVERT, "ncnn", "pnnx"), extras=("pnnx",), typed=("int8",)),
    "tensorrt": Builder(module="modelcrate_converter.builders.tensorrt_builder", needs=(*_CONVERT, "tensorrt"), needs_gpu=True, typed=("fp16", "int8")),
    "tensorrt_rtx": Builder(module="modelcrate_converter.builders.tensorrt_builder", needs=(*_CONVERT, "tensorrt_rtx"), needs_gpu=True, typed=("fp16", "int8")),
}
"""Backend name -> how to build for it."""


def check_can_build(backend: str, precision: str = "fp32", *, verify: bool = True, device_id: int = 0) -> None:
    """Refuse early what would fail late.

    Args:
        backend: the deploy config's.
        precision: the deploy config's: a typed graph is made with ONNX Runtime, whatever the backend.
        verify: whether what is built is run here too, which for TensorRT takes a GPU and a binding of CUDA.
        device_id: which GPU.

    Raises:
        ConfigError: a backend without a builder.
        MissingBackendError: a module that the builder, or the parity check after it, needs is not installed.
    """
    builder = BUILDERS.get(backend)
    if builder is None:
        raise ConfigError(f"backend: expected one of {', '.join(BUILDERS)}, found {backend!r}")
    typing = ("onnxruntime",) if precision in builder.typed else ()
    missing = [name for name in dict.fromkeys((*builder.needs, *typing)) if importlib.util.find_spec(name) is None]
    if missing:
        extras = dict.fromkeys((BACKENDS[backend].extra, *builder.extras, *typing))
        hint = f"pip install 'modelcrate[convert,{','.join(extras)}]'" if missing != ["tensorrt"] else BACKENDS[backend].install_command
        raise MissingBackendError(f"building for {backend} needs {', '.join(missing)}, not installed", hint=hint)
    if builder.needs_gpu and verify:
        dry = "--dry-run goes as far as is possible without one; --no-verify writes what nobody has run"
        try:
            gpu = find_gpu(device_id)
        except MissingBackendError as error:
            raise MissingBackendError(f"building for {backend}: {error}, to run the engine on and compare it with PyTorch", hint=dry) from error
        try:
            check_gpu(backend, gpu, where=f"building for {backend}")
        except UnsupportedBundleError as error:
            raise MissingBackendError(str(error), hint=f"{error.hint}; {dry}") from error
        require_binding()


def can_build(backend: str, precision: str = "fp32") -> bool:
    """Whether everything is installed that a build for this backend, in this precision, needs."""
    try:
        check_can_build(backend, precision)
    except MissingBackendError:
        return False
    return True


def build(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report = ignore) -> BackendArtifact:
    """Build the artefact of `config.backend` from the canonical graph `source`; files go into `workdir`, progress to `report`."""
    module = cast("_BuilderModule", importlib.import_module(BUILDERS[config.backend].module))
    return module.build(model, source, config, workdir=workdir, report=report)
