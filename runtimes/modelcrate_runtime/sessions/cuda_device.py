"""The GPU: what its driver says of it, and memory, streams and graphs through one small seam with two implementations, PyCUDA and cuda-python.

What is asked of the driver itself goes through its C library: a bundle is judged before anything of CUDA's is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError, MissingBackendError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: CUDA's number of it.
        name: as its driver calls it.
        compute_capability: major and minor.
        cuda: newest CUDA that the driver runs, as 1000 * major + 10 * minor.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    cuda: int


def find_gpu(index: int = 0) -> Gpu:
    """Ask the driver for a GPU.

    Raises:
        MissingBackendError: no driver, no GPU, or fewer of them.
    """
    try:
        driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        status = driver.cuInit(0)
    except (OSError, AttributeError) as error:
        raise MissingBackendError("expected an NVIDIA GPU, found no driver for one", hint="run it on a machine with an NVIDIA GPU and its driver") from error
    count, version, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if status != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        raise MissingBackendError(f"expected an NVIDIA GPU, found none (the driver answers {status})", hint="nvidia-smi lists what the driver sees")
    if index >= count.value:
        raise MissingBackendError(f"device_id: expected one of the {count.value} GPUs here, found {index}", hint="they are counted from 0")
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle)
        capability.append(number.value)
    return Gpu(index=index, name=name.value.decode(errors="replace"), compute_capability=(capability[0], capability[1]), cuda=version.value)


class Cuda(Protocol):
    """What a session needs of CUDA on one GPU. Addresses and stream handles are plain numbers, as TensorRT takes them."""

    @property
    def name(self) -> str:
        """Which binding it is."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the one stream that everything here is ordered on."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Make the GPU the current one of this thread; everything below happens inside."""
        ...

    def allocate(self, size: int) -> int:
        """Device memory of so many bytes; its address."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory that the GPU copies from and to without a detour; it lives as long as the array."""
        ...

    def to_device(self, address: int, source: NDArray[np.uint8]) -> None:
        """Copy to the device, in the stream's order."""
        ...

    def to_host(self, target: NDArray[np.uint8], address: int) -> None:
        """Copy from the device, in the stream's order."""
        ...

    def synchronize(self) -> None:
        """Wait for everything in the stream."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what `work` puts into the stream as a graph, without running it; returns what launches the graph, None where the binding has no graphs."""
        ...

    def close(self) -> None:
        """Free the stream, the graphs and all memory that is left."""
        ...


class _CudaPython:
    """NVIDIA's own binding, cuda-python: the runtime API."""

    name = "cuda-python"

    def __init__(self, index: int) -> None:
        self._api: Any = importlib.import_module("cuda.bindings.runtime")
        self._index = index
        self._memory: set[int] = set()
        self._graphs: list[Any] = []
        self._call("cudaSetDevice", index)
        self._stream = self._call("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            _, text = self._api.cudaGetErrorString(status)
            raise InputError(f"CUDA: {name}: expected to succeed, found: {text.decode() if text else status}", hint=_HINTS.get(int(status), ""))
        return results[0] if results else None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._call("cudaSetDevice", self._index)
        yield

    def allocate(self, size: int) -> int:
        address = int(self._call("cudaMalloc", size))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._memory.discard(address)
        self._call("cudaFree", address)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        address = int(self._call("cudaHostAlloc", size, 0))
        owner = (ctypes.c_uint8 * size).from_address(address)
        array: NDArray[np.uint8] = np.ctypeslib.as_array(owner)
        _finally_free(owner, lambda: self._api.cudaFreeHost(address))
        return array

    def to_device(self, address: int, source: NDArray[np.uint8]) -> None:
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice, self._stream)

    def to_host(self, target: NDArray[np.uint8], address: int) -> None:
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        self._call("cudaStreamBeginCapture", self._stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self._stream)  # also after an error: a stream that records runs nothing
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return lambda: self._call("cudaGraphLaunch", executable, self._stream)

    def close(self) -> None:
        with self.active():
            self.synchronize()
            for executable in self._graphs:
                self._call("cudaGraphExecDestroy", executable)
            for address in sorted(self._memory):
                self.free(address)
            self._call("cudaStreamDestroy", self._stream)
        self._graphs.clear()


class _PyCuda:
    """PyCUDA: the driver API, on the GPU's primary context, which other libraries share. It has no graphs."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        self._api: Any = importlib.import_module("pycuda.driver")
        self._api.init()
        self._context: Any = self._api.Device(index).retain_primary_context()
        self._memory: dict[int, Any] = {}
        with self.active():
            self._stream: Any = self._api.Stream()
        self.stream = int(self._stream.handle)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        except self._api.Error as error:
            raise InputError(f"CUDA: expected to succeed, found: {error}", hint=_HINTS[2] if isinstance(error, self._api.MemoryError) else "") from error
        finally:
            self._context.pop()

    def allocate(self, size: int) -> int:
        memory = self._api.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    def pinned(self, size: int) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = self._api.pagelocked_empty(size, np.uint8)
        return array

    def to_device(self, address: int, source: NDArray[np.uint8]) -> None:
        self._api.memcpy_htod_async(address, source, self._stream)

    def to_host(self, target: NDArray[np.uint8], address: int) -> None:
        self._api.memcpy_dtoh_async(target, address, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        del work
        return None

    def close(self) -> None:
        with self.active():
            self.synchronize()
            for address in sorted(self._memory):
                self.free(address)
            self._stream = None


_HINTS: Final = {2: "free some memory of the GPU, or send fewer inputs at once"}
"""CUDA's error -> what to do: 2 is cudaErrorMemoryAllocation."""
BINDINGS: Final[Mapping[str, tuple[str, Callable[[int], Cuda]]]] = {"cuda-python": ("cuda.bindings.runtime", _CudaPython), "pycuda": ("pycuda.driver", _PyCuda)}
"""Binding -> its module and its implementation; the first that is installed is used."""


def open_cuda(index: int, binding: str | None = None) -> Cuda:
    """CUDA on one GPU.

    Args:
        index: CUDA's number of the GPU.
        binding: "cuda-python" or "pycuda"; None takes what is installed, cuda-python first: it has graphs.

    Raises:
        ConfigError: another name.
        MissingBackendError: the binding is not installed.
    """
    if binding is not None and binding not in BINDINGS:
        raise ConfigError(f"cuda_binding: expected one of {', '.join(BINDINGS)}, found {binding!r}")
    require_binding(binding)
    return next(make(index) for name, (module, make) in BINDINGS.items() if name == (binding or name) and _is_installed(module))


def require_binding(binding: str | None = None) -> None:
    """Refuse early what `open_cuda` would.

    Raises:
        MissingBackendError: the binding, or without a name all of them, are not installed.
    """
    if any(name == (binding or name) and _is_installed(module) for name, (module, _) in BINDINGS.items()):
        return
    raise MissingBackendError(
        f"running on a GPU needs {binding or ' or '.join(BINDINGS)}, not installed",
        hint="pip install pycuda (it is built with the CUDA toolkit)" if binding == "pycuda" else "pip install cuda-bindings",
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _finally_free(owner: object, free: Callable[[], Any]) -> None:
    """Call `free` when nothing reads the memory any more."""
    import weakref

    weakref.finalize(owner, free)
