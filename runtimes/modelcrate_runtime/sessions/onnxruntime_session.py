"""ONNX Runtime: the providers that were asked for or an error, never a silent fallback."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.tensors import Dim, TensorSpec
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.sessions import LayerTime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from modelcrate_runtime.sessions import SessionOptions

_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}
_UNSUPPORTED: Final = (
    "not a registered function/op",
    "No Op registered for",
    "Unsupported model IR version",
    "is under development and support for this is limited",
    "NOT_IMPLEMENTED",
)
"""What ONNX Runtime says of graphs that are sound and too new, or have operators that it does not know."""
_PROVIDERS: Final = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider")}


class OnnxRuntimeSession:
    """One ONNX file in ONNX Runtime.

    On a CPU, several inputs are done sooner by one thread each than by all threads on one after another: operators are small, and their threads
    wait for each other at the end of each. So there is a second network, of one thread, loaded at the first call of `run_beside`.

    Attributes:
        inputs: the graph's inputs.
        outputs: the graph's outputs.
        providers: the execution providers in force, first choice first.
        threads: threads inside one operator.
        streams: calls of `run_beside` that use all threads.
    """

    def __init__(self, path: Path, options: SessionOptions) -> None:
        """Load.

        Raises:
            ConfigError: an unknown device.
            MissingBackendError: a provider that this ONNX Runtime does not have, or that did not start.
            BundleIntegrityError: the file is no ONNX graph that ONNX Runtime can read.
            UnsupportedBundleError: it needs operators or an IR version that this ONNX Runtime does not have.
        """
        import onnxruntime as ort

        ort.disable_telemetry_events()
        wanted = options.providers or _PROVIDERS.get(options.device)
        if wanted is None:
            raise ConfigError(f"device: expected one of {', '.join(_PROVIDERS)}, found {options.device!r}")
        available = ort.get_available_providers()
        missing = [name for name in wanted if name not in available]
        if missing:
            raise MissingBackendError(
                f"onnxruntime {ort.__version__}: expected the provider {missing[0]}, found {', '.join(available)}",
                hint="install the ONNX Runtime build that has it (for CUDA: pip install onnxruntime-gpu), or use the device cpu",
            )
        for name, number in (("threads", options.threads), ("streams", options.streams)):
            if number is not None and number < 1:
                raise ConfigError(f"{name}: expected at least 1, found {number}")
        self.threads = options.threads or usable_cores()
        self._path = path
        self._file = _identity(path)
        self._chosen: list[Any] = [(name, {"device_id": str(options.device_id)}) if name.startswith("CUDA") else name for name in wanted]
        self._optimize = options.optimize
        self._session: Any = self._load(threads=self.threads)
        self.providers = tuple(self._session.get_providers())
        if self.providers[0] != wanted[0]:
            raise MissingBackendError(
                f"{path}: expected to run on {wanted[0]}, found {self.providers[0]}: the provider did not start", hint="see ONNX Runtime's own message above"
            )
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        can_split = self.providers == ("CPUExecutionProvider",) and all(spec.is_batch_dynamic for spec in self.inputs)
        self.streams = min(options.streams or self.threads, self.threads) if can_split else 1
        self._narrow: Any = None
        self._narrow_lock = threading.Lock()

    def _load(self, *, threads: int, profile: Path | None = None) -> Any:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        if not self._optimize:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Between calls the cores belong to preprocessing and to other networks, not to threads that spin in wait for the next call.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return ort.InferenceSession(str(self._path), settings, providers=self._chosen)
        except Exception as error:
            raise _load_error(self._path, error) from error

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once, with all threads.

        Raises:
            InputError: a name, shape or dtype that the graph does not take; or the session is closed.
        """
        return self._run(self._session, feeds)

    def run_beside(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once, with one of `streams` shares of the threads.

        Raises:
            InputError: as `run`.
            BundleIntegrityError: the file is no longer the one that was loaded, at the first call.
        """
        if self.streams == 1 or self._session is None:
            return self.run(feeds)
        if self._narrow is None:
            with self._narrow_lock:
                if self._narrow is None:
                    if _identity(self._path) != self._file:
                        raise BundleIntegrityError(
                            f"{self._path}: expected the file that was loaded, found another one",
                            hint="open the bundle again; with streams=1 the file is only read when it is opened",
                        )
                    self._narrow = self._load(threads=max(1, self.threads // self.streams))
        return self._run(self._narrow, feeds)

    def _run(self, session: Any, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        if session is None:
            raise InputError("onnxruntime: expected an open session, found a closed one", hint="run it inside the with block")
        try:
            values = session.run(self._names, feeds)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class but Exception
            found = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
            expected = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.inputs)
            raise InputError(f"onnxruntime: expected {expected}, found {found}: {_message(error)[-300:]}") from error
        return dict(zip(self._names, values, strict=True))

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """See `TimesLayers`. The network is loaded once more, with ONNX Runtime's profiler on."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._load(threads=self.threads, profile=Path(folder) / "layers")
            for _ in range(1 + runs):
                self._run(session, feeds)
            events = json.loads(Path(session.end_profiling()).read_bytes())
        seconds: dict[str, list[float]] = {}
        kinds: dict[str, str] = {}
        for event in events:
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                name = name.removesuffix("_kernel_time")
                seconds.setdefault(name, []).append(1e-6 * event["dur"])
                kinds[name] = event["args"].get("op_name", "")
        return [LayerTime(name=name, kind=kinds[name], seconds=statistics.median(those[1:])) for name, those in seconds.items()]

    def close(self) -> None:
        """Free the network."""
        self._session = self._narrow = None


def open_session(files: Mapping[str, Path], options: SessionOptions) -> OnnxRuntimeSession:
    """The session of the ONNX file under the role `net`."""
    return OnnxRuntimeSession(files["net"], options)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when another file is put in a file's place; all zero where there is none: loading will say so."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _spec(node: Any) -> TensorSpec:
    shape: tuple[Dim, ...] = tuple(dim if isinstance(dim, (int, str)) else f"{node.name}_dim_{i}" for i, dim in enumerate(node.shape))
    return TensorSpec(name=node.name, dtype=_DTYPES.get(node.type, str(node.type)), shape=shape)


def _load_error(path: Path, error: Exception) -> BundleIntegrityError | UnsupportedBundleError:
    text = _message(error)
    if any(words in text for words in _UNSUPPORTED):
        return UnsupportedBundleError(
            f"{path}: expected operators that ONNX Runtime has, found: {text[-300:]}",
            hint="convert the checkpoint with modelcrate: its graphs need no custom operators, opset 17 and IR 8",
        )
    return BundleIntegrityError(f"{path}: expected an ONNX graph, found: {text[-300:]}", hint="copy the bundle again from where it was built, or convert again")


def _message(error: Exception) -> str:
    """ONNX Runtime's words without its status prefix, its C++ signatures and its line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition(" failed:")[2].rpartition("&) ")[2]
