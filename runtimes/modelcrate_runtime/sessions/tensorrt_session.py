"""TensorRT 10 and 11, and TensorRT for RTX: engines that were built for this GPU, with float32 inputs and outputs that stay on the host.

An engine says of itself only that it does not fit. So the manifest has what it was built for, and that is compared before the engine is loaded.
"""

from __future__ import annotations

import importlib
import logging
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, UnsupportedBundleError
from modelcrate_bundle.tensors import Dim, TensorSpec
from modelcrate_runtime.sessions import LayerTime
from modelcrate_runtime.sessions.cuda_device import Gpu, find_gpu, open_cuda

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from modelcrate_bundle.manifest import EngineRecord
    from modelcrate_runtime.sessions import SessionOptions
    from modelcrate_runtime.sessions.cuda_device import Cuda

_LOG: Final = logging.getLogger(__name__)
_AMPERE: Final = (8, 0)
_RTX_CAPABILITIES: Final = ((8, 0), (8, 6), (8, 9))
_RTX_FROM: Final = (12, 0)
"""What TensorRT for RTX 1.7.1.116 runs on, in its own words on an H100: "The engine cannot run on this GPU, which has compute capability 9.0. Supported compute
capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0. TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for it."
"""
_MOST_GRAPHS: Final = 4
"""Shapes that are kept as CUDA graphs. Each has an execution context of its own, since a graph refers to what its context was set to when it was recorded;
and a context has the activations' memory."""

Array = np.ndarray[Any, np.dtype[Any]]


def this_platform() -> str:
    """Operating system and processor, as engines are recorded for them: "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def check_gpu(library: str, gpu: Gpu, *, where: str) -> None:
    """Refuse a GPU that the library has no engines for, so that none can be built for it either.

    Args:
        library: "tensorrt" or "tensorrt_rtx".
        gpu: the GPU here.
        where: what needs it, for the message.

    Raises:
        UnsupportedBundleError: TensorRT for RTX and a GPU of before Ampere, or of a data centre from Hopper on.
    """
    capability = gpu.compute_capability
    if library == "tensorrt_rtx" and capability not in _RTX_CAPABILITIES and capability < _RTX_FROM:
        some = ", ".join(".".join(map(str, one)) for one in _RTX_CAPABILITIES)
        raise UnsupportedBundleError(
            f"{where}: expected a GPU that TensorRT for RTX runs on (compute capability {some}, or 12.0 and newer), "
            f"found {'.'.join(map(str, capability))} ({gpu.name})",
            hint="TensorRT itself runs on it: modelcrate convert ... -t tensorrt-fp16",
        )


def check_engine(record: EngineRecord, *, version: str, gpu: Gpu, where: str) -> None:
    """Refuse an engine that was built for something else, before it is loaded.

    Args:
        record: what it was built for.
        version: of the library here.
        gpu: the GPU here.
        where: the bundle, for the message.

    Raises:
        UnsupportedBundleError: naming what differs.
    """
    here = this_platform()
    capability = ".".join(str(part) for part in gpu.compute_capability)
    wrong = ""
    if record.platform != here:
        wrong = f"platform: expected {record.platform}, found {here}"
    elif not _is_version(record, version):
        wrong = (
            f"{record.library}: expected version {record.version}{' or newer, of the same major version' if record.version_compatible else ''}, found {version}"
        )
    elif record.library == "tensorrt_rtx":
        # Its engines are for every GPU that it runs on, wherever they were built, and are compiled to the end when they are loaded.
        check_gpu(record.library, gpu, where=where)
    elif record.hardware_compatibility == "ampere+" and gpu.compute_capability < _AMPERE:
        wrong = f"compute capability: expected 8.0 or newer, found {capability} ({gpu.name})"
    elif record.compute_capability and record.hardware_compatibility != "ampere+" and record.compute_capability != capability:
        wrong = f"compute capability: expected {record.compute_capability} ({record.gpu}), found {capability} ({gpu.name})"
    if wrong:
        raise UnsupportedBundleError(f"{where}: the engine was built for something else: {wrong}", hint=f"modelcrate rebuild {where}")
    if record.library == "tensorrt" and record.gpu and record.hardware_compatibility == "none" and record.gpu != gpu.name:
        _LOG.warning("%s: the engine was built on %s and tuned for it; here is %s", where, record.gpu, gpu.name)


def _is_version(record: EngineRecord, version: str) -> bool:
    built, here = ([int(part) for part in text.split(".")[:4] if part.isdecimal()] for text in (record.version, version))
    return here == built or (record.version_compatible and here[:1] == built[:1] and here >= built)


def make_logger(trt: Any) -> Any:
    """A logger of TensorRT that gives everything to Python's, and keeps what is wrong in `problems`."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # a class of the library that is there
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING}.get(severity.name, logging.DEBUG)
            if level == logging.ERROR:
                self.problems.append(" ".join(msg.split()))
            _LOG.log(min(level, logging.INFO), "%s", msg)  # what is an error is raised; it is not also printed

    return Logger()


@dataclass(kw_only=True, slots=True)
class _Buffer:
    """Memory of one input or output: on the device, and pinned on the host."""

    name: str
    dtype: np.dtype[Any]
    address: int = 0
    size: int = 0
    host: NDArray[np.uint8] | None = None


class TensorRTSession:
    """One engine, one stream, one execution context for all shapes and one more for each shape that is kept as a CUDA graph.

    Buffers are allocated once for the largest shapes of the optimisation profile. The first shapes that come are recorded as CUDA graphs, where the binding has
    graphs, and launched as such from then on.

    Attributes:
        inputs: the engine's inputs; an axis that may vary has a name.
        outputs: the engine's outputs.
        streams: always 1: one engine fills the GPU.
        binding: which CUDA binding it runs through.
    """

    def __init__(self, files: Mapping[str, Path], options: SessionOptions, *, library: str) -> None:
        """Load.

        Raises:
            ConfigError: another device than cuda, or execution providers.
            MissingBackendError: no GPU, or no binding of CUDA.
            UnsupportedBundleError: an engine for another TensorRT, GPU or platform, or with types that NumPy does not have.
            BundleIntegrityError: the file cannot be read.
        """
        trt: Any = importlib.import_module(library)
        if options.device != "cuda":
            raise ConfigError(f"device: expected cuda for TensorRT, found {options.device!r}")
        if options.providers:
            raise ConfigError("providers: expected none for TensorRT, found some: they are ONNX Runtime's")
        path, record = files["net"], options.built_for
        gpu = find_gpu(options.device_id)
        check_gpu(library, gpu, where=str(path.parent))
        if record is not None:
            check_engine(record, version=trt.__version__, gpu=gpu, where=str(path.parent))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleIntegrityError(f"{path}: expected an engine, found: {error.strerror or error}", hint="copy the bundle again") from error
        self.streams = 1
        self._trt: Any = trt
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._logger: Any = make_logger(trt)
        self._lock = threading.Lock()
        self._cuda: Cuda = open_cuda(options.device_id, options.cuda_binding)
        self.binding = self._cuda.name
        self._buffers: dict[str, _Buffer] = {}
        self._graphs: dict[tuple[tuple[int, ...], ...], Callable[[], None] | None] = {}
        self._recorded: list[Any] = []  # the graphs' contexts
        self._wants_graphs = options.cuda_graphs
        try:
            with self._cuda.active():
                self._load(data, files, record, where=str(path.parent))
        except BaseException:
            self._cuda.close()
            raise

    def _load(self, data: bytes, files: Mapping[str, Path], record: EngineRecord | None, *, where: str) -> None:
        trt = self._trt
        logger = self._logger
        runtime = trt.Runtime(logger)
        if record is not None and record.version_compatible:
            runtime.engine_host_code_allowed = True  # such an engine brings the code that runs it; it comes from the bundle, whose hashes are checked
        judge = getattr(runtime, "get_engine_validity", None)  # TensorRT for RTX alone can say it without loading
        verdict = judge(data)[0].name if judge is not None else "VALID"
        if verdict != "VALID":
            _LOG.warning("%s: %s %s says of the engine: %s", where, trt.__name__, trt.__version__, verdict.lower())
        engine = runtime.deserialize_cuda_engine(data) if verdict != "INVALID" else None
        if engine is None:
            raise UnsupportedBundleError(
                f"{where}: expected an engine that {trt.__name__} {trt.__version__} loads, found one that it refuses: {_last(logger)}",
                hint=f"modelcrate rebuild {where}",
            )
        if record is not None and record.is_stripped:
            refitter = trt.Refitter(engine, logger)
            filler = trt.OnnxParserRefitter(refitter, logger)
            if not (filler.refit_from_file(str(files["source"])) and refitter.refit_cuda_engine()):
                raise UnsupportedBundleError(f"{where}: expected to fill in the weights from {files['source'].name}, found: {_last(logger)}")
        self._runtime, self._engine = runtime, engine
        self._context = context = self._new_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        takes = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._takes, self._gives = takes, [name for name in names if name not in takes]
        self.inputs = tuple(self._spec(name, where) for name in takes)
        self.outputs = tuple(self._spec(name, where) for name in self._gives)
        self._most = {name: tuple(int(dim) for dim in engine.get_tensor_profile_shape(name, 0)[2]) for name in takes}
        self._least = {name: tuple(int(dim) for dim in engine.get_tensor_profile_shape(name, 0)[0]) for name in takes}
        self._allocator: Any = None
        for name in takes:
            self._reserve(name, self._most[name])
            context.set_input_shape(name, self._most[name])
        for name in self._gives:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                # Its size depends on the data: TensorRT asks for memory while it runs.
                self._allocator = self._allocator or self._make_allocator()
                context.set_output_allocator(name, self._allocator)
            else:
                self._reserve(name, shape)

    def _new_context(self, *, is_recorded: bool = False) -> Any:
        """An execution context.

        Args:
            is_recorded: it is for a CUDA graph. TensorRT for RTX compiles kernels for a shape in the background while it runs slower ones; a graph would keep
                the slower ones for good, so for a graph they are compiled at once.
        """
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)  # TensorRT for RTX alone has it
        if is_recorded and strategies is not None:
            config = self._engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise InputError(f"TensorRT: expected memory for the engine on the GPU, found none: {_last(self._logger)}", hint="free some of it")
        return context

    def _spec(self, name: str, where: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(self._trt.nptype(kind))
        except TypeError as error:
            raise UnsupportedBundleError(f"{where}: {name}: expected a type that NumPy has, found {kind}") from error
        self._buffers[name] = _Buffer(name=name, dtype=dtype)
        shape: tuple[Dim, ...] = tuple(
            int(dim) if dim >= 0 else ("batch" if axis == 0 else f"{name}_{axis}") for axis, dim in enumerate(self._engine.get_tensor_shape(name))
        )
        return TensorSpec(name=name, dtype=dtype.name, shape=shape)

    def _reserve(self, name: str, shape: tuple[int, ...]) -> None:
        """Memory for a tensor of this shape; what is there already and large enough stays."""
        buffer = self._buffers[name]
        size = max(math.prod(shape) * buffer.dtype.itemsize, 1)
        if size <= buffer.size:
            return
        if buffer.size:
            address, buffer.address, buffer.host, buffer.size = buffer.address, 0, None, 0  # should there be no memory for more, there is none for it
            self._cuda.free(address)
        buffer.address = self._cuda.allocate(size)
        try:
            buffer.host = self._cuda.pinned(size)
        except BaseException:
            address, buffer.address = buffer.address, 0
            self._cuda.free(address)
            raise
        buffer.size = size
        self._context.set_tensor_address(name, buffer.address)

    def _make_allocator(self) -> Any:
        session = self

        class Allocator(self._trt.IOutputAllocator):  # type: ignore[misc, name-defined]  # a class of the library that is there
            def __init__(self) -> None:
                session._trt.IOutputAllocator.__init__(self)  # an inner class
                self.shapes: dict[str, tuple[int, ...]] = {}
                self.error: Exception | None = None

            def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
                del memory, alignment, stream  # CUDA aligns to 256 bytes, which is all that TensorRT asks for
                buffer = session._buffers[tensor_name]
                try:
                    session._reserve(tensor_name, (-(-size // buffer.dtype.itemsize),))
                except Exception as error:  # noqa: BLE001  # it must not pass through C++; raised again when TensorRT has given up
                    self.error = error
                return buffer.address

            def notify_shape(self, tensor_name: str, shape: Any) -> None:
                self.shapes[tensor_name] = tuple(int(dim) for dim in shape)

        return Allocator()

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once.

        Raises:
            InputError: a name, dtype or shape that the engine does not take; CUDA fails; or the session is closed.
        """
        with self._lock:
            self._require_open()
            self._check(feeds)
            with self._cuda.active():
                return self._run(feeds)

    def _run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        shapes = tuple(feeds[name].shape for name in self._takes)
        for name, shape in zip(self._takes, shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise InputError(f"TensorRT: {name}: expected a shape of the engine's profile, found {list(shape)}: {_last(self._logger)}")
        sizes = {name: tuple(int(dim) for dim in self._context.get_tensor_shape(name)) for name in self._gives}
        for name in self._takes:
            self._fill(name, feeds[name])
        self._launch(shapes, {name: size for name, size in sizes.items() if min(size, default=0) >= 0})
        self._cuda.synchronize()
        late = [name for name, size in sizes.items() if min(size, default=0) < 0]
        for name in late:
            sizes[name] = self._allocator.shapes[name]
            self._to_host(name, sizes[name])
        if late:
            self._cuda.synchronize()
        return {name: self._view(name, sizes[name]).copy() for name in self._gives}

    run_beside = run

    def _launch(self, shapes: tuple[tuple[int, ...], ...], known: Mapping[str, tuple[int, ...]]) -> None:
        """Copy in, run, copy out: as a graph where this shape has one."""

        def work(context: Any) -> None:
            for name, shape in zip(self._takes, shapes, strict=True):
                self._to_device(name, shape)
            if not context.execute_async_v3(self._cuda.stream):
                if self._allocator is not None and self._allocator.error is not None:
                    error, self._allocator.error = self._allocator.error, None
                    raise error
                raise InputError(f"TensorRT: expected to run, found: {_last(self._logger)}")
            for name, shape in known.items():
                self._to_host(name, shape)

        graph = self._graphs.get(shapes)
        if graph is not None:
            graph()
        elif shapes in self._graphs or not self._wants_graphs or self._allocator is not None or len(self._graphs) >= _MOST_GRAPHS:
            work(self._context)
        else:
            context = self._new_context(is_recorded=True)
            for name, shape in zip(self._takes, shapes, strict=True):
                context.set_input_shape(name, shape)
            for buffer in self._buffers.values():
                context.set_tensor_address(buffer.name, buffer.address)
            # The first time a shape comes TensorRT prepares for it, which cannot be recorded.
            work(context)
            self._cuda.synchronize()
            try:
                self._graphs[shapes] = self._cuda.capture(lambda: work(context))
            except InputError as error:
                _LOG.warning("TensorRT: this shape cannot be recorded as a CUDA graph, and is launched without one: %s", error)
                self._graphs[shapes] = None
            if self._graphs[shapes] is not None:
                self._recorded.append(context)

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """See `TimesLayers`. A context of its own runs without graphs, with TensorRT's profiler on."""
        with self._lock:
            self._require_open()
            self._check(feeds)
            with self._cuda.active():
                return self._layer_times(feeds, runs)

    def _layer_times(self, feeds: Mapping[str, NDArray[np.generic]], runs: int) -> list[LayerTime]:
        profiler = _make_profiler(self._trt)
        context = self._new_context()
        context.profiler = profiler
        for name in self._takes:
            context.set_input_shape(name, feeds[name].shape)
            self._fill(name, feeds[name])
        for buffer in self._buffers.values():
            if buffer.address:
                context.set_tensor_address(buffer.name, buffer.address)
        if self._allocator is not None:
            for name in self._gives:
                if not self._buffers[name].address or min(tuple(context.get_tensor_shape(name)), default=0) < 0:
                    context.set_output_allocator(name, self._allocator)
        for turn in range(1 + runs):
            if not context.execute_async_v3(self._cuda.stream):
                raise InputError(f"TensorRT: expected to run, found: {_last(self._logger)}")
            self._cuda.synchronize()
            if not turn:
                profiler.seconds.clear()
        return [LayerTime(name=name, kind="", seconds=statistics.median(those)) for name, those in profiler.seconds.items()]

    def copy_seconds(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[float]:
        """See `TimesCopies`: into pinned memory and to the GPU, and back, each waited for by itself."""
        with self._lock:
            self._require_open()
            self._check(feeds)
            with self._cuda.active():
                outputs = self._run(feeds)
                seconds = []
                for _ in range(runs):
                    start = time.perf_counter()
                    for name in self._takes:
                        self._fill(name, feeds[name])
                        self._to_device(name, feeds[name].shape)
                    for name, value in outputs.items():
                        self._to_host(name, value.shape)
                    self._cuda.synchronize()
                    for name, value in outputs.items():
                        self._view(name, value.shape).copy()
                    seconds.append(time.perf_counter() - start)
                return seconds

    def _require_open(self) -> None:
        if self._context is None:
            raise InputError("TensorRT: expected an open session, found a closed one", hint="run it inside the with block")

    def _fill(self, name: str, value: NDArray[np.generic]) -> None:
        """An input into pinned memory."""
        buffer = self._buffers[name]
        assert buffer.host is not None
        np.copyto(buffer.host[: value.nbytes].view(buffer.dtype).reshape(value.shape), value)

    def _to_device(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self._buffers[name]
        assert buffer.host is not None
        self._cuda.to_device(buffer.address, buffer.host[: math.prod(shape) * buffer.dtype.itemsize])

    def _to_host(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self._buffers[name]
        size = math.prod(shape) * buffer.dtype.itemsize
        if size:
            assert buffer.host is not None
            self._cuda.to_host(buffer.host[:size], buffer.address)

    def _view(self, name: str, shape: tuple[int, ...]) -> Array:
        buffer = self._buffers[name]
        assert buffer.host is not None
        return buffer.host[: math.prod(shape) * buffer.dtype.itemsize].view(buffer.dtype).reshape(shape)

    def _check(self, feeds: Mapping[str, NDArray[np.generic]]) -> None:
        expected = {spec.name: spec for spec in self.inputs}
        is_right = feeds.keys() == expected.keys() and all(
            value.dtype == self._buffers[name].dtype
            and value.ndim == len(self._most[name])
            and all(low <= dim <= high for low, dim, high in zip(self._least[name], value.shape, self._most[name], strict=True))
            for name, value in feeds.items()
        )
        if not is_right:
            wanted = ", ".join(f"{name} {spec.dtype}{list(self._least[name])} to {list(self._most[name])}" for name, spec in expected.items())
            found = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items()) or "nothing"
            raise InputError(f"TensorRT: expected {wanted}, found {found}")

    def close(self) -> None:
        """Free the engine and its memory."""
        with self._lock:
            if self._context is None:
                return
            self._graphs.clear()
            self._recorded.clear()
            self._context = self._engine = self._runtime = self._allocator = None
            with self._cuda.active():
                self._buffers.clear()  # PyCUDA frees pinned memory where its context is current, or in the thread that opened it, and nowhere else
            self._cuda.close()


def _make_profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # a class of the library that is there
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seconds: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seconds.setdefault(layer_name, []).append(1e-3 * ms)

    return Profiler()


def _last(logger: Any) -> str:
    """What TensorRT said last of what is wrong."""
    return str(logger.problems[-1])[:300] if logger.problems else "no reason"


def open_session(files: Mapping[str, Path], options: SessionOptions) -> TensorRTSession:
    """The session of the engine under the role `net`, in TensorRT."""
    return TensorRTSession(files, options, library="tensorrt")


def open_rtx_session(files: Mapping[str, Path], options: SessionOptions) -> TensorRTSession:
    """The same in TensorRT for RTX."""
    return TensorRTSession(files, options, library="tensorrt_rtx")
