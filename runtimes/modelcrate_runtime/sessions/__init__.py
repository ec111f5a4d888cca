"""Sessions: one module per framework, all with the same face, in a static table.

A session module offers `open_session(files, options) -> Session` and imports its framework inside that function, so that this package can be
imported where no framework is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, cast, runtime_checkable

from modelcrate_bundle.errors import MissingBackendError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from modelcrate_bundle.bundle import Bundle
    from modelcrate_bundle.manifest import EngineRecord
    from modelcrate_bundle.tensors import TensorSpec


# ONNX Runtime reports home from the moment it is imported, whoever imports it; this must be set before that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# So does OpenVINO, unasked and from a process of its own, through a package that it can do without; None is Python's way to say that there is no such module.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionOptions:
    """How to run a network.

    Attributes:
        device: "cpu" or "cuda", MMDeploy's names; empty takes the backend's own.
        device_id: which of them.
        threads: threads inside one operator; None is one for each core that this process may use.
        providers: ONNX Runtime's execution providers by name, to use exactly these; None follows `device`.
        streams: calls that may run side by side, see `Session.run_beside`; None is what suits the backend, 1 is never more than one.
        precision: what the network computes in, where that is the session's choice (OpenVINO); None takes the bundle's.
        cache_dir: folder where compiled networks are kept, for backends that compile; None keeps none.
        cuda_binding: what TensorRT's memory and streams go through: "cuda-python" or "pycuda"; None takes what is installed.
        cuda_graphs: whether TensorRT's launches are recorded for shapes that come again.
        built_for: what an engine was built for; it is compared before the engine is loaded. None compares nothing.
        optimize: whether the framework may rewrite the graph; without it a graph is run as it stands, slowly, to compare with.
    """

    device: str = ""
    device_id: int = 0
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    streams: int | None = None
    precision: str | None = None
    cache_dir: Path | None = None
    cuda_binding: str | None = None
    cuda_graphs: bool = True
    built_for: EngineRecord | None = None
    optimize: bool = True


class Session(Protocol):
    """A network that is loaded and can run."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, in the artefact's order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs, in the artefact's order."""
        ...

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once. Arrays by input name in, arrays by output name out; safe to call from several threads."""
        ...

    @property
    def streams(self) -> int:
        """How many calls of `run_beside` at once use the device best; 1 where there is nothing to gain."""
        ...

    def run_beside(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """`run` with a share of the threads: one of `streams` calls that run side by side and finish more than as many calls one after another."""
        ...

    def close(self) -> None:
        """Free the network; a closed session is not run again."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """What one layer takes.

    Attributes:
        name: as the backend calls it.
        kind: its operator, as the backend calls that.
        seconds: of one run, the median of several.
    """

    name: str
    kind: str
    seconds: float


@runtime_checkable
class TimesLayers(Protocol):
    """A session that can say what its layers take."""

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """Run several times with the framework's counters on, which costs time itself: the sum is more than a call of `run` takes.

        Args:
            feeds: as for `run`.
            runs: how often; the first run before them does not count.

        Returns:
            The layers in the order in which they run.
        """
        ...


@runtime_checkable
class TimesCopies(Protocol):
    """A session that copies between the caller's arrays and memory of its own, and can say how long that takes."""

    def copy_seconds(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[float]:
        """Run several times, and say of each how long the copies took, there and back."""
        ...


class _Open(Protocol):
    def __call__(self, files: Mapping[str, Path], options: SessionOptions) -> Session: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One row of the table of frameworks.

    Attributes:
        module: what is imported; distributions differ (onnxruntime, onnxruntime-gpu, ...) and are not asked for.
        extra: the extra of modelcrate that brings it.
        session: our module that runs it.
        opens: its function.
        device: where it runs when nothing else is said.
    """

    module: str
    extra: str
    session: str
    opens: str = "open_session"
    device: str = "cpu"

    @property
    def is_installed(self) -> bool:
        """Whether the framework can be found, without importing it."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def install_command(self) -> str:
        """What to run when it is not installed."""
        if self.module == "tensorrt":
            return TENSORRT_WAYS
        return f"pip install 'modelcrate[{self.extra}]'"


TENSORRT_WAYS: Final = (
    "one of three ways: pip install 'tensorrt>=10.16,<12' with NVIDIA's own index beside PyPI; NVIDIA's container, or JetPack on a Jetson, which have it; "
    "its .deb or .tar archive. Or TensorRT for RTX, from PyPI: pip install 'modelcrate[tensorrt-rtx]' and the target tensorrt-rtx"
)
"""TensorRT's libraries are not on PyPI; what is called so there fetches them from NVIDIA's index."""
BACKENDS: Final[Mapping[str, Backend]] = {
    "onnxruntime": Backend(module="onnxruntime", extra="onnxruntime", session="modelcrate_runtime.sessions.onnxruntime_session"),
    "openvino": Backend(module="openvino", extra="openvino", session="modelcrate_runtime.sessions.openvino_session"),
    "ncnn": Backend(module="ncnn", extra="ncnn", session="modelcrate_runtime.sessions.ncnn_session"),
    "tensorrt": Backend(module="tensorrt", extra="tensorrt", session="modelcrate_runtime.sessions.tensorrt_session", device="cuda"),
    "tensorrt_rtx": Backend(
        module="tensorrt_rtx", extra="tensorrt-rtx", session="modelcrate_runtime.sessions.tensorrt_session", opens="open_rtx_session", device="cuda"
    ),
}
"""Backend name, as deploy.json writes it -> how to run it."""


def open_session(bundle: Bundle, options: SessionOptions) -> Session:
    """Load the network of a bundle.

    Args:
        bundle: an opened bundle.
        options: device, threads, providers.

    Raises:
        UnsupportedBundleError: a backend that there is no session for.
        MissingBackendError: the framework is not installed or lacks the device.
    """
    model = bundle.model
    files = {"net": bundle.path_of(model.net)}
    if model.weights:
        files["weights"] = bundle.path_of(model.weights)
    manifest = bundle.manifest
    if manifest is not None and manifest.engine is not None:
        options = replace(options, built_for=manifest.engine)
        if manifest.engine.is_stripped:
            files["source"] = bundle.path_of(manifest.engine.onnx)
    if options.precision is None:
        options = replace(options, precision=manifest.precision if manifest else model.precision.lower())
    return open_artefact(model.backend, files, options, where=str(bundle.root))


def open_artefact(name: str, files: Mapping[str, Path], options: SessionOptions, *, where: str) -> Session:
    """Load a network that is not, or not yet, in a bundle.

    Args:
        name: the backend's name in deploy.json.
        files: role (net, weights) -> file.
        options: device, threads, providers.
        where: what to call it in messages.

    Raises:
        UnsupportedBundleError: a backend that there is no session for.
        MissingBackendError: the framework is not installed or lacks the device.
    """
    backend = BACKENDS.get(name)
    if backend is None:
        raise UnsupportedBundleError(
            f"{where}: backend: expected one of {', '.join(BACKENDS)}, found {name!r}", hint="convert the checkpoint for one of those: modelcrate convert"
        )
    if not backend.is_installed:
        raise MissingBackendError(f"{where}: needs {name}, which is not installed", hint=backend.install_command)
    open_files = cast("_Open", getattr(importlib.import_module(backend.session), backend.opens))
    return open_files(files, replace(options, device=options.device or backend.device))
