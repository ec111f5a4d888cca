"""OpenVINO: computes in the precision that the bundle states, which on modern CPUs is not what OpenVINO would choose (bfloat16)."""

from __future__ import annotations

import contextlib
import statistics
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, MissingBackendError, OutputError, UnsupportedBundleError
from modelcrate_bundle.tensors import Dim, TensorSpec
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.sessions import LayerTime

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from modelcrate_runtime.sessions import SessionOptions

_DEVICES: Final = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_HINTS: Final = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32"}
"""Precision of a bundle -> what its floating-point operators compute in on a CPU. Half weights are widened there; quantised operators have their integers in
the graph. On other devices fp16 is f16."""


class OpenVinoSession:
    """One OpenVINO IR.

    Several calls side by side run on streams of one thread each in a second compiled network, compiled at the first call of `run_beside`: as with ONNX
    Runtime, small operators on many threads mostly wait for each other.

    Attributes:
        inputs: the network's inputs.
        outputs: the network's outputs.
        threads: threads inside one operator.
        streams: calls of `run_beside` that use all threads.
        precision: what the floating-point operators really compute in, as the device reports it: f32, bf16 or f16.
    """

    def __init__(self, files: Mapping[str, Path], options: SessionOptions) -> None:
        """Load.

        Raises:
            ConfigError: an unknown device.
            MissingBackendError: OpenVINO has no such device here, or the device cannot compute in the bundle's precision.
            BundleIntegrityError: the files are no IR that OpenVINO can read.
            UnsupportedBundleError: an input or output without a fixed number of axes.
            OutputError: the folder for compiled networks cannot be made.
        """
        import openvino as ov

        self._core: Any = ov.Core()
        self._device = _DEVICES.get(options.device, "")
        if not self._device:
            raise ConfigError(f"device: expected one of {', '.join(_DEVICES)} for OpenVINO, found {options.device!r}")
        available = [name.partition(".")[0] for name in self._core.available_devices]
        if self._device not in available:
            raise MissingBackendError(
                f"openvino {ov.get_version()}: expected the device {self._device}, found {', '.join(available)}",
                hint="install its driver, or use the device cpu",
            )
        if options.providers:
            raise ConfigError("providers: expected none for OpenVINO, found some: they are ONNX Runtime's")
        for name, number in (("threads", options.threads), ("streams", options.streams)):
            if number is not None and number < 1:
                raise ConfigError(f"{name}: expected at least 1, found {number}")
        if options.cache_dir is not None:
            try:
                options.cache_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{options.cache_dir}: expected a folder for compiled networks, found: {error.strerror or error}") from error
            self._core.set_property({"CACHE_DIR": str(options.cache_dir)})
        # A mapped file that is overwritten changes the network, and one that is cut off ends the process.
        self._core.set_property({"ENABLE_MMAP": False})
        self.threads = options.threads or usable_cores()
        path = files["net"]
        try:
            self._model: Any = self._core.read_model(str(path), str(files["weights"]) if "weights" in files else "")
        except Exception as error:  # a C++ library behind a binding
            raise BundleIntegrityError(f"{path}: expected an OpenVINO IR, found: {_message(error)}", hint="copy the bundle again, or convert again") from error
        precision = options.precision or "fp32"
        if precision not in _HINTS:
            raise UnsupportedBundleError(f"{path}: precision: expected one of {', '.join(_HINTS)}, found {precision!r}")
        self._hint = "f16" if precision == "fp16" and self._device != "CPU" else _HINTS[precision]
        self._network: Any = self._compile(path, threads=self.threads, streams=1)
        self.precision = str(self._network.get_property("INFERENCE_PRECISION_HINT").to_string())
        if self.precision != self._hint:
            raise MissingBackendError(
                f"{path}: expected to compute in {self._hint}, found that {self._device} computes in {self.precision} here",
                hint="run it on a device that has this precision, or build the bundle for another one",
            )
        self.inputs = tuple(_spec(port, path) for port in self._network.inputs)
        self.outputs = tuple(_spec(port, path) for port in self._network.outputs)
        can_split = self._device == "CPU" and all(spec.is_batch_dynamic for spec in self.inputs)
        self.streams = min(options.streams or self.threads, self.threads) if can_split else 1
        self._path = path
        self._idle: list[Any] = []
        self._narrow: Any = None
        self._narrow_idle: list[Any] = []
        self._lock = threading.Lock()

    def _compile(self, path: Path, *, threads: int, streams: int, is_counted: bool = False) -> Any:
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self._hint, "PERF_COUNT": is_counted}
        if self._device == "CPU":
            config |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
        try:
            return self._core.compile_model(self._model, self._device, config)
        except Exception as error:  # a C++ library behind a binding
            raise UnsupportedBundleError(f"{path}: expected a network that OpenVINO compiles for {self._device}, found: {_message(error)}") from error

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once, with all threads.

        Raises:
            InputError: a name, shape or dtype that the network does not take; or the session is closed.
        """
        return self._run(self._network, self._idle, feeds)

    def run_beside(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once, on one of `streams` streams.

        Raises:
            InputError: as `run`.
        """
        if self.streams == 1 or self._network is None:
            return self.run(feeds)
        if self._narrow is None:
            with self._lock:
                if self._narrow is None:
                    self._narrow = self._compile(self._path, threads=self.threads, streams=self.streams)
        return self._run(self._narrow, self._narrow_idle, feeds)

    def _run(self, network: Any, idle: list[Any], feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        if network is None:
            raise InputError("openvino: expected an open session, found a closed one", hint="run it inside the with block")
        self._check(feeds)
        tensors = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        with _borrowed(network, idle) as request:
            try:
                # The inputs are read in place; the outputs are copied, since the request's own memory is used again.
                results = request.infer(tensors, share_inputs=True, share_outputs=False)
            except Exception as error:  # a C++ library behind a binding
                raise InputError(f"openvino: expected to run on {_shown(feeds)}, found: {_message(error)}") from error
            return {spec.name: results[i] for i, spec in enumerate(self.outputs)}

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """See `TimesLayers`. The network is compiled once more, with OpenVINO's counters on."""
        network = self._compile(self._path, threads=self.threads, streams=1, is_counted=True)
        requests: list[Any] = []
        seconds: dict[str, list[float]] = {}
        kinds: dict[str, str] = {}
        for turn in range(1 + runs):
            self._run(network, requests, feeds)
            for info in requests[0].profiling_info if turn else ():
                if info.status.name == "EXECUTED":
                    seconds.setdefault(info.node_name, []).append(info.real_time.total_seconds())
                    kinds[info.node_name] = f"{info.node_type} ({info.exec_type})"
        return [LayerTime(name=name, kind=kinds[name], seconds=statistics.median(those)) for name, those in seconds.items()]

    def _check(self, feeds: Mapping[str, NDArray[np.generic]]) -> None:
        """OpenVINO converts dtypes and takes missing inputs for zeros: what does not fit is refused before."""
        expected = {spec.name: spec for spec in self.inputs}
        fits = feeds.keys() == expected.keys() and all(
            value.dtype == expected[name].dtype
            and value.ndim == len(expected[name].shape)
            and all(isinstance(dim, str) or dim == side for dim, side in zip(expected[name].shape, value.shape, strict=True))
            for name, value in feeds.items()
        )
        if not fits:
            wanted = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.inputs)
            raise InputError(f"openvino: expected {wanted}, found {_shown(feeds)}")

    def close(self) -> None:
        """Free the network."""
        self._network = self._narrow = self._model = self._core = None
        self._idle, self._narrow_idle = [], []


def open_session(files: Mapping[str, Path], options: SessionOptions) -> OpenVinoSession:
    """The session of the IR under the roles `net` (.xml) and `weights` (.bin)."""
    return OpenVinoSession(files, options)


@contextlib.contextmanager
def _borrowed(network: Any, idle: list[Any]) -> Iterator[Any]:
    """An infer request that no other thread uses: appending to a list and popping from it are atomic."""
    try:
        request = idle.pop()
    except IndexError:
        request = network.create_infer_request()
    yield request
    idle.append(request)


def _spec(port: Any, path: Path) -> TensorSpec:
    name = port.get_any_name()
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        raise UnsupportedBundleError(f"{path}: {name}: expected a fixed number of axes, found any", hint="convert the checkpoint again")
    dims: tuple[Dim, ...] = tuple(dim.get_length() if dim.is_static else ("batch" if i == 0 else f"{name}_{i}") for i, dim in enumerate(shape))
    return TensorSpec(name=name, dtype=str(np.dtype(port.get_element_type().to_dtype())), shape=dims)


def _shown(feeds: Mapping[str, NDArray[np.generic]]) -> str:
    return ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items()) or "nothing"


def _message(error: Exception) -> str:
    """The last sentence of OpenVINO's chain of exceptions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[-300:]
