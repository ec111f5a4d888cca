"""Stand-ins for what a machine without a GPU lacks: the driver, two bindings of CUDA, and engines that run.

They are strict where the real ones are: copies and launches wait in the stream until it is synchronised, a graph replays the addresses that it recorded, an
execution context cannot be recorded before it ran once with its shapes, and memory that was freed is not there any more. Engines are ONNX files, run by ONNX
Runtime. Where a network is parsed and judged, the real TensorRT for RTX does it.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

SUCCESS, OUT_OF_MEMORY, INVALID = 0, 2, 1
DEVICE_MIB = 2048


class Status(enum.IntEnum):
    cudaSuccess = SUCCESS
    cudaErrorInvalidValue = INVALID
    cudaErrorMemoryAllocation = OUT_OF_MEMORY


@dataclass
class Gpu:
    """One GPU in host memory.

    Attributes:
        name: what the driver calls it.
        capability: major and minor.
        memory: address -> buffer.
        launches: how many graphs were launched.
        captures: how many were recorded.
        reports: how many runs told a profiler what their layers took.
        built: names of the flags that each build had set.
        profiles: input -> its least, best and largest shape, of each build.
    """

    name: str = "Stand-in GPU"
    capability: tuple[int, int] = (9, 0)
    cuda: int = 13000
    count: int = 1
    memory: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    launches: int = 0
    captures: int = 0
    reports: int = 0
    built: list[set[str]] = field(default_factory=list)
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(b"\xaa" * size, size)  # what was never written is not zero
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    @property
    def allocated(self) -> int:
        return sum(len(buffer) for buffer in self.memory.values())

    def require(self, address: int, size: int) -> None:
        """Refuse an address that is in no buffer, as a GPU does."""
        if not any(start <= address and address + size <= start + len(buffer) for start, buffer in self.memory.items()):
            raise RuntimeError(f"illegal memory access of {size} bytes at {address:#x}")


@dataclass
class Stream:
    """Work that waits. While it records, work goes into the graph instead."""

    waiting: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)

    def synchronize(self) -> None:
        if self.recording is not None:
            raise RuntimeError("a stream that records cannot be synchronised")
        while self.waiting:
            self.waiting.pop(0)()


def driver_library(gpu: Gpu) -> Any:
    """libcuda, as far as `find_gpu` asks it."""

    def put(pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return SUCCESS

    def name(buffer: Any, size: int, handle: Any) -> int:
        buffer.value = gpu.name.encode()
        return SUCCESS

    return types.SimpleNamespace(
        cuInit=lambda flags: SUCCESS,
        cuDeviceGetCount=lambda pointer: put(pointer, gpu.count),
        cuDriverGetVersion=lambda pointer: put(pointer, gpu.cuda),
        cuDeviceGet=lambda pointer, index: put(pointer, index),
        cuDeviceGetName=name,
        cuDeviceGetAttribute=lambda pointer, attribute, handle: put(pointer, gpu.capability[attribute - 75]),
    )


def cuda_python(gpu: Gpu) -> dict[str, types.ModuleType]:
    """The modules of cuda-python, as far as they are used."""
    api: Any = types.ModuleType("cuda.bindings.runtime")
    api.cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    api.cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeGlobal": 0, "cudaStreamCaptureModeThreadLocal": 1})
    graphs: dict[int, list[Callable[[], None]]] = {}

    def set_device(index: int) -> tuple[Status]:
        return (Status.cudaSuccess if index < gpu.count else Status.cudaErrorInvalidValue,)

    def malloc(size: int) -> tuple[Status, int]:
        if gpu.allocated + size > DEVICE_MIB * 2**20:
            return Status.cudaErrorMemoryAllocation, 0
        return Status.cudaSuccess, gpu.allocate(size)

    def free(address: int) -> tuple[Status]:
        return (Status.cudaSuccess if gpu.memory.pop(address, None) is not None else Status.cudaErrorInvalidValue,)

    def new_stream(flags: int) -> tuple[Status, int]:
        handle = 4096 + len(gpu.streams)
        gpu.streams[handle] = Stream()
        return Status.cudaSuccess, handle

    def copy(target: int, source: int, size: int, kind: int, stream: int) -> tuple[Status]:
        on_device = target if kind == 1 else source

        def work() -> None:
            gpu.require(on_device, size)
            ctypes.memmove(target, source, size)

        gpu.streams[stream].put(work)
        return (Status.cudaSuccess,)

    def synchronize(stream: int) -> tuple[Status]:
        gpu.streams[stream].synchronize()
        return (Status.cudaSuccess,)

    def begin(stream: int, mode: int) -> tuple[Status]:
        assert not gpu.streams[stream].waiting, "work is waiting"
        gpu.streams[stream].recording = []
        gpu.captures += 1
        return (Status.cudaSuccess,)

    def end(stream: int) -> tuple[Status, int]:
        graph, gpu.streams[stream].recording = gpu.streams[stream].recording, None
        assert graph is not None
        graphs[id(graph)] = graph
        return Status.cudaSuccess, id(graph)

    def launch(graph: int, stream: int) -> tuple[Status]:
        gpu.launches += 1
        for work in graphs[graph]:
            gpu.streams[stream].put(work)
        return (Status.cudaSuccess,)

    api.cudaGetErrorString = lambda status: (Status.cudaSuccess, Status(status).name.encode())
    api.cudaSetDevice, api.cudaMalloc, api.cudaFree, api.cudaMemcpyAsync = set_device, malloc, free, copy
    api.cudaHostAlloc = lambda size, flags: malloc(size)
    api.cudaFreeHost = free
    api.cudaStreamCreateWithFlags, api.cudaStreamSynchronize = new_stream, synchronize
    api.cudaStreamDestroy = lambda stream: (Status.cudaSuccess if gpu.streams.pop(stream, None) is not None else Status.cudaErrorInvalidValue,)
    api.cudaStreamBeginCapture, api.cudaStreamEndCapture = begin, end
    api.cudaGraphInstantiate = lambda graph, flags: (Status.cudaSuccess, graph)
    api.cudaGraphDestroy = lambda graph: (Status.cudaSuccess,)
    api.cudaGraphLaunch = launch
    api.cudaGraphExecDestroy = lambda graph: (Status.cudaSuccess if graphs.pop(graph, None) is not None else Status.cudaErrorInvalidValue,)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    for module in (package, bindings):
        module.__path__ = []  # type: ignore[attr-defined]
    bindings.runtime = api  # type: ignore[attr-defined]
    return {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": api}


def pycuda(gpu: Gpu) -> dict[str, types.ModuleType]:
    """The modules of PyCUDA, as far as they are used. Everything needs the context to be current."""
    api: Any = types.ModuleType("pycuda.driver")

    class Current(threading.local):
        """Every thread has contexts of its own."""

        def __init__(self) -> None:
            self.contexts: list[Any] = []

    current = Current()

    class Error(Exception):
        pass

    class MemoryError(Error):  # noqa: A001
        pass

    def require_context() -> None:
        if not current.contexts:
            raise Error("invalid device context")

    class Context:
        def push(self) -> None:
            current.contexts.append(self)

        def pop(self) -> None:
            assert current.contexts.pop() is self

    class Device:
        def __init__(self, index: int) -> None:
            if index >= gpu.count:
                raise Error("invalid device ordinal")

        def retain_primary_context(self) -> Context:
            return Context()

    class NewStream:
        def __init__(self) -> None:
            require_context()
            self.handle = 4096 + len(gpu.streams)
            gpu.streams[self.handle] = Stream()

        def synchronize(self) -> None:
            require_context()
            gpu.streams[self.handle].synchronize()

    class Allocation:
        def __init__(self, size: int) -> None:
            require_context()
            if gpu.allocated + size > DEVICE_MIB * 2**20:
                raise MemoryError("out of memory")
            self._address = gpu.allocate(size)

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            del gpu.memory[self._address]

    def to_device(address: int, source: Any, stream: NewStream) -> None:
        require_context()
        gpu.require(address, source.nbytes)
        gpu.streams[stream.handle].put(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes) and None)

    def to_host(target: Any, address: int, stream: NewStream) -> None:
        require_context()
        gpu.require(address, target.nbytes)
        gpu.streams[stream.handle].put(lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes) and None)

    api.init = lambda: None
    api.Error, api.MemoryError, api.Device, api.Stream = Error, MemoryError, Device, NewStream
    api.mem_alloc = Allocation
    api.pagelocked_empty = lambda size, dtype: np.empty(size, dtype)
    api.memcpy_htod_async, api.memcpy_dtoh_async = to_device, to_host
    package: Any = types.ModuleType("pycuda")
    package.__path__ = []
    package.driver = api
    return {"pycuda": package, "pycuda.driver": api}


# ------------------------------------------------------------------------------------------------------------------- TensorRT

_TYPES = {"tensor(float)": ("FLOAT", np.float32), "tensor(float16)": ("HALF", np.float16), "tensor(int64)": ("INT64", np.int64)}
PROFILE = {"min": 1, "opt": 8, "max": 32}
"""Of an engine that nobody gave one: the batch."""
SLOW_FIRST = 50
"""How many times as long the first run with a shape takes: what is measured of it is of no run that comes later."""


STRIPPED = b"without weights: "
"""How the engine begins that has none."""


class _Buffer(bytes):
    """What a builder returns: bytes with a size."""

    @property
    def nbytes(self) -> int:
        return len(self)


def tensorrt(gpu: Gpu, *, version: str = "11.4.0.106", name: str = "tensorrt", has_parser: bool = False) -> types.ModuleType:
    """A module whose engines are ONNX files.

    Args:
        gpu: whose memory they read.
        version: the library's.
        name: the module's.
        has_parser: whether builder and parser are there: those of the real TensorRT for RTX, except for what comes out.
    """
    import onnxruntime

    trt: Any = types.ModuleType(name)
    trt.__version__ = version
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT64", "BF16"])
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    numpy_of = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}

    def nptype(kind: Any) -> Any:
        if kind.name not in numpy_of:
            raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {kind}")
        return numpy_of[kind.name]

    trt.nptype = nptype

    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def __init__(self) -> None:
            self.is_made = True

    class IOutputAllocator:
        def __init__(self) -> None:
            self.is_made = True

    class IProfiler:
        def __init__(self) -> None:
            self.is_made = True

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._allocators: dict[str, Any] = {}
            self._ran: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
            self._profiler: Any = None

        @property
        def profiler(self) -> Any:
            return self._profiler

        @profiler.setter
        def profiler(self, profiler: Any) -> None:
            assert profiler.is_made, "its base class was not constructed"
            self._profiler = profiler

        def set_input_shape(self, name: str, shape: Any) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            if len(shape) != len(least) or not all(low <= dim <= high for low, dim, high in zip(least, shape, most, strict=True)):
                self._engine.logger.log(Severity.ERROR, f"IExecutionContext::setInputShape: {name} {tuple(shape)} is not in the profile")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            batch = next(iter(self._shapes.values()))[0] if self._shapes else -1
            shape = self._engine.get_tensor_shape(name)
            return (batch if shape[0] == -1 and self._engine.is_batched(name) else shape[0], *shape[1:])

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def set_output_allocator(self, name: str, allocator: Any) -> bool:
            assert allocator.is_made, "its base class was not constructed"
            self._allocators[name] = allocator
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert not self._engine.lacks_weights, "an engine without weights was run"
            engine, key = self._engine, tuple(sorted(self._shapes.items()))
            missing = [name for name in engine.names if name not in self._addresses and name not in self._allocators]
            if missing or len(self._shapes) != len(engine.inputs):
                engine.logger.log(Severity.ERROR, f"IExecutionContext::enqueueV3: no address or shape of {missing}")
                return False
            if gpu.streams[stream].recording is not None and (key not in self._ran or self._allocators or self._profiler):
                engine.logger.log(Severity.ERROR, "enqueueV3: operation not permitted when stream is capturing")
                return False
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            profiler, is_first = self._profiler, key not in self._ran

            def work() -> None:
                feeds = {}
                for name, shape in shapes.items():
                    dtype = engine.dtypes[name]
                    size = int(np.prod(shape)) * dtype.itemsize
                    gpu.require(addresses[name], size)
                    feeds[name] = np.frombuffer(ctypes.string_at(addresses[name], size), dtype=dtype).reshape(shape)
                for name, value in zip(engine.outputs, engine.session.run(engine.outputs, feeds), strict=True):
                    address = addresses.get(name, 0)
                    if name in self._allocators:
                        address = self._allocate(name, address, value.nbytes, stream)
                        if not address:
                            return
                        self._allocators[name].notify_shape(name, value.shape)
                    if value.nbytes:
                        gpu.require(address, value.nbytes)
                        ctypes.memmove(address, np.ascontiguousarray(value).ctypes.data, value.nbytes)
                if profiler is not None:
                    gpu.reports += 1
                    for name, milliseconds in engine.layers(sum(int(np.prod(shape)) for shape in shapes.values())):
                        # A shape that is new is slow; and every run is a little slower than the one before.
                        profiler.report_layer_time(name, milliseconds * ((SLOW_FIRST if is_first else 1) + 0.01 * gpu.reports))

            gpu.streams[stream].put(work)
            if self._allocators:
                self._lacks_memory = False
                gpu.streams[stream].synchronize()  # such a network waits for its own sizes
                if self._lacks_memory:
                    engine.logger.log(Severity.ERROR, "IExecutionContext::enqueueV3: Error Code 2: OutOfMemory (allocator returned nullptr)")
                    return False
            self._ran.add(key)
            return True

        def _allocate(self, name: str, address: int, size: int, stream: int) -> int:
            """What an allocator raises does not pass through C++."""
            try:
                address = self._allocators[name].reallocate_output_async(name, address, size, 256, stream)
            except Exception:  # noqa: BLE001
                address = 0
            self._lacks_memory = not address
            return address

    class Inspector:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine

        def get_engine_information(self, form: Any) -> str:
            import json

            graph = onnx.load_from_string(self._engine.data).graph
            half = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
            int8 = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
            kinds = ["Half" if half & set(n.input) else "Int8" if int8 & set(n.input) else "Float" for n in graph.node]
            return json.dumps({"Layers": [{"Name": n.name, "Outputs": [{"Name": n.output[0], "DataType": k}]} for n, k in zip(graph.node, kinds, strict=True)]})

    class Engine:
        def __init__(self, data: bytes, logger: Any) -> None:
            self.lacks_weights = data.startswith(STRIPPED)
            self.data, self.logger = data.removeprefix(STRIPPED), logger
            data = self.data
            self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            self.inputs = [value.name for value in self.session.get_inputs()]
            self.outputs = [value.name for value in self.session.get_outputs()]
            self.names = [*self.inputs, *self.outputs]
            self._values = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
            self.dtypes = {name: np.dtype(_TYPES[value.type][1]) for name, value in self._values.items()}
            self.num_io_tensors = len(self.names)

        def is_batched(self, name: str) -> bool:
            return self._values[name].shape[:1] == self._values[self.inputs[0]].shape[:1]

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[_TYPES[self._values[name].type][0]]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(dim if isinstance(dim, int) else -1 for dim in self._values[name].shape)

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            assert name in self.inputs, "TensorRT has no profile of an output"
            shape = self.get_tensor_shape(name)
            return [tuple(PROFILE[which] if dim == -1 else dim for dim in shape) for which in ("min", "opt", "max")]

        def layers(self, elements: int) -> list[tuple[str, float]]:
            """Name and milliseconds: the n-th of them takes n microseconds for each element of the inputs."""
            nodes = onnx.load_from_string(self.data).graph.node
            return [(node.name or f"{node.op_type}_{i}", 1e-3 * i * elements) for i, node in enumerate(nodes, start=1)]

        def create_execution_context(self) -> Context:
            return Context(self)

        def create_engine_inspector(self) -> Inspector:
            return Inspector(self)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert logger.is_made, "its base class was not constructed"
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            try:
                return Engine(bytes(data), self._logger)
            except Exception:  # noqa: BLE001
                self._logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag mismatch)")
                return None

    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            self.engine = engine
            self.is_filled = False

        def refit_cuda_engine(self) -> bool:
            self.engine.lacks_weights = not self.is_filled
            return self.is_filled

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            self._refitter, self._logger = refitter, logger

        def refit_from_file(self, path: str) -> bool:
            with open(path, "rb") as stream:
                self._refitter.is_filled = stream.read() == self._refitter.engine.data
            return self._refitter.is_filled

    trt.ILogger, trt.IOutputAllocator, trt.IProfiler, trt.Runtime = ILogger, IOutputAllocator, IProfiler, Runtime
    trt.Refitter, trt.OnnxParserRefitter = Refitter, OnnxParserRefitter
    if has_parser:
        _add_builder(trt, gpu)
    return trt


def _add_builder(trt: Any, gpu: Gpu) -> None:
    """Builder and parser of the real TensorRT for RTX; what they build is the ONNX file that was parsed."""
    import tensorrt_rtx as real

    class ILogger(real.ILogger):
        def __init__(self) -> None:
            real.ILogger.__init__(self)
            self.is_made = True

    trt.ILogger, trt.IProgressMonitor = ILogger, real.IProgressMonitor
    for name in ("BuilderFlag", "MemoryPoolType", "ProfilingVerbosity", "HardwareCompatibilityLevel", "NetworkDefinitionCreationFlag"):
        setattr(trt, name, getattr(real, name))
    parsed: dict[int, bytes] = {}

    class OnnxParser(real.OnnxParser):
        def __init__(self, network: Any, logger: Any) -> None:
            real.OnnxParser.__init__(self, network, logger)
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            with open(path, "rb") as stream:
                parsed[id(self._network)] = stream.read()
            return real.OnnxParser.parse_from_file(self, path)

    class Builder(real.Builder):
        def create_optimization_profile(self) -> Any:
            self._profile = real.Builder.create_optimization_profile(self)
            return self._profile

        def build_serialized_network(self, network: Any, settings: Any) -> _Buffer | None:
            flags = {name for name, flag in real.BuilderFlag.__members__.items() if settings.get_flag(flag)}
            gpu.built.append(flags)
            inputs = [network.get_input(i).name for i in range(network.num_inputs)]
            gpu.profiles.append({name: tuple(tuple(shape) for shape in self._profile.get_shape(name)) for name in inputs})
            for name in ("VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN"):  # TensorRT for RTX needs a GPU, or a library that its wheel lacks, for them
                settings.clear_flag(real.BuilderFlag.__members__[name])
            plan = real.Builder.build_serialized_network(self, network, settings)
            return None if plan is None else _Buffer((STRIPPED if "STRIP_PLAN" in flags else b"") + parsed[id(network)])

    trt.OnnxParser, trt.Builder = OnnxParser, Builder


@contextlib.contextmanager
def machine_with_gpu(*, gpu: Gpu | None = None, binding: str = "cuda-python", **options: Any) -> Iterator[Gpu]:
    """This machine with a stand-in GPU, its driver, one binding and TensorRT.

    Args:
        gpu: what it has.
        binding: "cuda-python", "pycuda", "both" or "" for none.
        options: as for `tensorrt`.
    """
    gpu = gpu or Gpu()
    real_library = ctypes.CDLL
    modules: dict[str, types.ModuleType | None] = {"cuda": None, "cuda.bindings": None, "cuda.bindings.runtime": None, "pycuda": None, "pycuda.driver": None}
    if binding in {"cuda-python", "both"}:
        modules |= cuda_python(gpu)
    if binding in {"pycuda", "both"}:
        modules |= pycuda(gpu)
    module = tensorrt(gpu, **options)
    modules[module.__name__] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name, *rest, **more: driver_library(gpu) if "libcuda" in str(name) else real_library(name, *rest, **more))
        for name, one in modules.items():
            if one is not None:
                one.__spec__ = types.SimpleNamespace(name=name, submodule_search_locations=[])  # type: ignore[assignment]
            patch.setitem(sys.modules, name, one)
        yield gpu
