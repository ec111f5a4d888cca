"""TensorRT 10.16 to 11, and TensorRT for RTX, by one code path: a strongly typed network, whose precision is in the graph already.

No flag of a precision, no calibrator and no plugin: TensorRT 11 has none of them. The graph stays in the bundle beside the engine, which fits one version of the
library and one kind of GPU, so that it can be built again elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelcrate_bundle.bundle import sha256_of
from modelcrate_bundle.errors import ConfigError, ExportError, MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.manifest import EngineRecord
from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.download import default_cache_dir
from modelcrate_converter.exportable import BoxesFacts, DetectorFacts
from modelcrate_converter.progress import Advanced, Noted, Report
from modelcrate_converter.suppression import suppressed
from modelcrate_runtime.sessions.cuda_device import Gpu, find_gpu, open_cuda
from modelcrate_runtime.sessions.tensorrt_session import check_engine, check_gpu, make_logger, this_platform

if TYPE_CHECKING:
    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel

ENGINE_NAME: Final = "end2end.engine"
"""MMDeploy's name of it."""
_LEAST: Final = {"tensorrt": (10, 16), "tensorrt_rtx": (1, 4)}
_TYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""TensorRT's names of types -> NumPy's."""
_NEEDED: Final = {"fp16": "float16", "int8": "int8"}
"""Precision -> the type that at least one layer must give: an engine that lost it is a float32 engine under another name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """What TensorRT makes of a graph without building it.

    Attributes:
        operators: how many there are.
        unsupported: operators that it cannot run, by name and kind.
        layers: type -> how many layers give it.
    """

    operators: int
    unsupported: tuple[str, ...]
    layers: Mapping[str, int]


def build(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report) -> BackendArtifact:
    """Write `end2end.engine`, and the graph that it is built from as `end2end.onnx`.

    On a machine without a GPU TensorRT for RTX builds an engine for every GPU that it knows; TensorRT itself needs the GPU.

    Args:
        model: what is being converted.
        source: the typed graph: float32, or with float16 operators, or with QuantizeLinear and DequantizeLinear of signed symmetric INT8.
        config: the target.
        workdir: where the files go.
        report: gets the progress of the build.

    Raises:
        ConfigError: suppression in the graph for a library that cannot run it, or unsigned INT8.
        MissingBackendError: a version of the library that is too old, or no GPU for TensorRT.
        ExportError: the graph is refused, the build fails, or the engine does not compute in the target's precision.
    """
    _check_config(model, config)
    source, has_nms = suppressed(model, source, config, workdir=workdir)
    graph = workdir / "end2end.onnx"
    if source.path != graph:
        shutil.copyfile(source.path, graph)
    record = build_engine(graph, source.inputs, config, place=workdir / ENGINE_NAME, where=model.name, report=report)
    return BackendArtifact(
        backend=config.backend,
        files={"net": workdir / ENGINE_NAME, "source": graph},
        precision=config.precision,
        inputs=source.inputs,
        outputs=source.outputs,
        has_nms=has_nms,
        engine=record,
        device_id=config.tensorrt.device_id,
        cuda_binding=config.tensorrt.cuda_binding,
    )


def build_engine(graph: Path, inputs: tuple[TensorSpec, ...], config: DeployConfig, *, place: Path, where: str, report: Report) -> EngineRecord:
    """Build an engine from a typed graph.

    Args:
        graph: the ONNX file.
        inputs: its inputs; an axis with a name takes what the config has for the batch.
        config: the target.
        place: where the engine goes.
        where: for messages.
        report: gets the progress.

    Returns:
        What it was built for.

    Raises:
        MissingBackendError: a version of the library that is too old, or no GPU for TensorRT.
        ExportError: the graph is refused, the build fails, or the engine does not compute in the target's precision.
    """
    trt = import_library(config.backend)
    gpu = gpu_or_none(config)
    if gpu is None and config.backend == "tensorrt":
        raise MissingBackendError(
            f"{config.target}: expected an NVIDIA GPU to build for, found none", hint="--dry-run parses the graph without one; tensorrt-rtx builds without one"
        )
    options = config.tensorrt
    logger = make_logger(trt)
    with _on(gpu, config):
        builder = trt.Builder(logger)
        network, parser = _parsed(trt, builder, logger, graph, where=where)
        layers = layer_types(network)
        _check_types(layers, config, what="graph", where=where)
        settings = builder.create_builder_config()
        flags = _set_flags(trt, settings, config)
        if options.workspace_mib:
            settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
        settings.builder_optimization_level = options.optimization_level
        settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        level = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}[options.hardware_compatibility]
        settings.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        profile = builder.create_optimization_profile()
        for spec in inputs:
            shapes = [tuple(dim if isinstance(dim, int) else size for dim in spec.shape) for size in (config.batch.min, config.batch.opt, config.batch.max)]
            profile.set_shape(spec.name, *shapes)
        settings.add_optimization_profile(profile)
        cache_path = _timing_cache_path(trt, gpu)
        # TensorRT for RTX measures nothing while it builds, and deprecates the calls.
        cache = _load_timing_cache(settings, cache_path) if gpu is not None and config.backend == "tensorrt" else None
        monitor = _make_monitor(trt, report)
        settings.progress_monitor = monitor
        plan = builder.build_serialized_network(network, settings)
        del parser  # the network reads the parser's weights until here
        if monitor.interrupted is not None:
            raise monitor.interrupted
        if plan is None:
            raise ExportError(f"{where}: expected {trt.__name__} {trt.__version__} to build an engine, found: {_said(logger)}")
        place.write_bytes(plan)
        if cache is not None:
            _keep_timing_cache(settings, cache_path)
        is_inspected = gpu is not None
        if is_inspected:
            layers = _inspected(trt, logger, place, config, where=where)
            _check_types(layers, config, what="engine", where=where)
    report(Noted(text=f"{'engine' if is_inspected else 'network'}: {_counts(layers)}"))
    return EngineRecord(
        library=config.backend,
        version=trt.__version__,
        platform=this_platform(),
        gpu=gpu.name if gpu else "",
        compute_capability=".".join(str(part) for part in gpu.compute_capability) if gpu else "",
        cuda=gpu.cuda if gpu else 0,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        is_stripped=options.strip_weights,
        flags=flags,
        onnx=graph.name,
        onnx_sha256=sha256_of(graph),
        layers=dict(layers),
        is_inspected=is_inspected,
    )


def examine(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path) -> tuple[OnnxModel, bool, Support]:
    """What a build would begin with: the graph as the engine would have it, and what the library makes of it. No GPU is needed.

    Returns:
        The graph, whether it suppresses boxes, and the report.

    Raises:
        ConfigError: as `build`.
        ExportError: the graph is refused, or is not in the target's precision.
    """
    _check_config(model, config)
    source, has_nms = suppressed(model, source, config, workdir=workdir)
    trt = import_library(config.backend)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    import onnx

    nodes = onnx.load(source.path).graph.node
    network = builder.create_network(_typed_flag(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.supports_model_v2(source.path.read_bytes()):
        # Its subgraphs are what it could run of such a graph, whatever it says of them; what it cannot is in none of them.
        fine = {i for n in range(parser.num_subgraphs) for i in parser.get_subgraph_nodes(n)}
        bad = [f"{node.name} ({node.op_type})" for i, node in enumerate(nodes) if i not in fine]
        reasons = [" ".join(parser.get_error(i).desc().split()) for i in range(parser.num_errors)]
        raise ExportError(
            f"{model.name}: expected operators that {trt.__name__} {trt.__version__} runs, found {', '.join(bad[:5]) or 'others'}: {(reasons or [_said(logger)])[0][:300]}"
        )
    unsupported: tuple[str, ...] = ()
    del parser
    network, parser = _parsed(trt, builder, logger, source.path, where=model.name)
    layers = layer_types(network)
    del parser
    _check_types(layers, config, what="graph", where=model.name)
    return source, has_nms, Support(operators=len(nodes), unsupported=unsupported, layers=layers)


def _check_config(model: ExportableModel, config: DeployConfig) -> None:
    wants_nms = isinstance(model.postprocess, BoxesFacts) or (isinstance(model.postprocess, DetectorFacts) and config.nms.where == "graph")
    if wants_nms and config.backend == "tensorrt_rtx":
        raise ConfigError(
            f"{config.target}: nms.where: expected runtime for TensorRT for RTX, which parses NonMaxSuppression and cannot run it, found graph",
            hint="--nms runtime",
        )
    if config.precision == "int8" and config.int8.activations != "int8":
        raise ConfigError(f"{config.target}: int8.activations: expected int8 for TensorRT, whose INT8 is signed, found {config.int8.activations}")


def import_library(name: str) -> Any:
    """The library, if it is new enough.

    Raises:
        MissingBackendError: it is older than what this code was written for, or cannot be loaded.
    """
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingBackendError(f"{name}: expected a library that loads, found: {' '.join(str(error).split())[:200]}", hint="install it again") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < _LEAST[name]:
        raise MissingBackendError(f"{name}: expected version {'.'.join(map(str, _LEAST[name]))} or newer, found {trt.__version__}")
    return trt


def gpu_or_none(config: DeployConfig) -> Gpu | None:
    """The GPU that the config names; None where there is none at all, or one that the library cannot run on.

    Raises:
        MissingBackendError: there are GPUs, and not so many.
    """
    try:
        find_gpu()
    except MissingBackendError:
        return None
    gpu = find_gpu(config.tensorrt.device_id)
    try:
        check_gpu(config.backend, gpu, where=config.target)
    except UnsupportedBundleError:
        return None
    return gpu


def fits(record: EngineRecord, config: DeployConfig) -> bool:
    """Whether an engine is what a build here would make: for this GPU and this version; without a GPU nothing can be said, and it is left as it is."""
    gpu = gpu_or_none(config)
    if gpu is None:
        return True
    try:
        check_engine(record, version=import_library(config.backend).__version__, gpu=gpu, where="")
    except UnsupportedBundleError:
        return False
    return True


@contextlib.contextmanager
def _on(gpu: Gpu | None, config: DeployConfig) -> Iterator[None]:
    """With the GPU as the thread's current one: TensorRT builds and loads on that."""
    if gpu is None:
        yield
        return
    cuda = open_cuda(gpu.index, config.tensorrt.cuda_binding or None)
    try:
        with cuda.active():
            yield
    finally:
        cuda.close()


def _typed_flag(trt: Any) -> int:
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parsed(trt: Any, builder: Any, logger: Any, graph: Path, *, where: str) -> tuple[Any, Any]:
    """The network, and the parser, which has to live as long as the network is read."""
    network = builder.create_network(_typed_flag(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [" ".join(str(parser.get_error(i)).split()) for i in range(parser.num_errors)]
        raise ExportError(f"{where}: expected a graph that {trt.__name__} {trt.__version__} reads, found: {(errors or [_said(logger)])[0][:300]}")
    return network, parser


def layer_types(network: Any) -> Counter[str]:
    """Type -> how many layers of a network give it. Of a strongly typed network that is what the engine computes in."""
    return Counter(_TYPES.get(network.get_layer(i).get_output(0).dtype.name, "other") for i in range(network.num_layers) if network.get_layer(i).num_outputs)


def engine_types(information: str) -> Counter[str]:
    """Type -> how many layers of an engine give it, from the JSON of an engine inspector.

    TensorRT 10 writes a sentence under `Format/Datatype`, 11 writes `DataType` beside `Format`.
    """
    counts: Counter[str] = Counter()
    for layer in json.loads(information).get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        if outputs:
            words = str(outputs[0].get("DataType") or outputs[0].get("Datatype") or outputs[0].get("Format/Datatype") or "").lower().replace("-", " ").split()
            counts[next((_ENGINE_WORDS[word] for word in words if word in _ENGINE_WORDS), "other")] += 1
    return counts


_ENGINE_WORDS: Final = {
    "half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32", "int8": "int8", "bf16": "bfloat16", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip


def _inspected(trt: Any, logger: Any, place: Path, config: DeployConfig, *, where: str) -> Counter[str]:
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = config.tensorrt.version_compatible
    loaded = runtime.deserialize_cuda_engine(place.read_bytes())
    if loaded is None:
        raise ExportError(f"{where}: expected {trt.__name__} {trt.__version__} to load the engine that it built, found: {_said(logger)}")
    return engine_types(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _check_types(layers: Mapping[str, int], config: DeployConfig, *, what: str, where: str) -> None:
    needed = _NEEDED.get(config.precision)
    if needed is not None and not layers.get(needed):
        raise ExportError(f"{where}: {config.target}: expected layers in {needed} in the {what}, found {_counts(layers) or 'none'}")


def _counts(layers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} layers in {name}" for name, count in sorted(layers.items(), key=lambda item: -item[1]))


def _set_flags(trt: Any, settings: Any, config: DeployConfig) -> list[str]:
    """Set and clear the builder's flags; returns the names of those that are set."""
    options = config.tensorrt
    wanted = {
        "TF32": options.tf32,  # on by default: ten bits of mantissa are no float32
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_weights,
    }
    for name, is_set in wanted.items():
        flag = getattr(trt.BuilderFlag, name)
        (settings.set_flag if is_set else settings.clear_flag)(flag)
    return [name for name, is_set in wanted.items() if is_set]


def _make_monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of the library that is there
        """Tells the phases of a build. An interruption ends it: an exception must not pass through C++."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interrupted: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 0))

        def _tell(self, phase_name: str, done: int) -> bool:
            total = self.steps.get(phase_name, 0)
            try:
                report(Advanced(name=phase_name, done=min(done, total), total=total, unit="items"))
            except BaseException as error:  # noqa: BLE001  # raised again when the build has ended
                self.interrupted = self.interrupted or error
            return self.interrupted is None

    return Monitor()


def _timing_cache_path(trt: Any, gpu: Gpu | None) -> Path:
    name = "-".join(gpu.name.lower().split()) if gpu else "none"
    return default_cache_dir() / "tensorrt" / f"{trt.__name__}-{trt.__version__}-{name}.timing"


def _load_timing_cache(settings: Any, path: Path) -> Any:
    """The times of kernels that earlier builds measured, of this version on this kind of GPU."""
    content = path.read_bytes() if path.is_file() else b""
    cache = settings.create_timing_cache(content)
    if cache is None:  # of a build that was cut off
        cache = settings.create_timing_cache(b"")
    return cache if settings.set_timing_cache(cache, ignore_mismatch=False) else None


def _keep_timing_cache(settings: Any, path: Path) -> None:
    """A build that cannot keep it is none the worse."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(settings.get_timing_cache().serialize())
        partial.replace(path)


def _said(logger: Any) -> str:
    return "; ".join(logger.problems[-2:])[:400] or "no reason"
