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
from typing import TYPE_CHECKING, Final, Protocol, cast

from modelcrate_bundle.errors import MissingBackendError, UnsupportedBundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from modelcrate_bundle.bundle import Bundle
    from modelcrate_bundle.tensors import TensorSpec


# ONNX Runtime reports home from the moment it is imported, whoever imports it; this must be set before that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# So does OpenVINO, unasked and from a process of its own, through a package that it can do without; None is Python's way to say that there is no such module.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionOptions:
    """How to run a network.

    Attributes:
        device: "cpu" or "cuda", MMDeploy's names.
        device_id: which of them.
        threads: threads inside one operator; None is one for each core that this process may use.
        providers: ONNX Runtime's execution providers by name, to use exactly these; None follows `device`.
        streams: calls that may run side by side, see `Session.run_beside`; None is what suits the backend, 1 is never more than one.
        precision: what the network computes in, where that is the session's choice (OpenVINO); None takes the bundle's.
        cache_dir: folder where compiled networks are kept, for backends that compile; None keeps none.
        optimize: whether the framework may rewrite the graph; without it a graph is run as it stands, slowly, to compare with.
    """

    device: str = "cpu"
    device_id: int = 0
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    streams: int | None = None
    precision: str | None = None
    cache_dir: Path | None = None
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


class _SessionModule(Protocol):
    def open_session(self, files: Mapping[str, Path], options: SessionOptions) -> Session: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One row of the table of frameworks.

    Attributes:
        module: what is imported; distributions differ (onnxruntime, onnxruntime-gpu, ...) and are not asked for.
        extra: the extra of modelcrate that brings it.
        session: our module that runs it.
    """

    module: str
    extra: str
    session: str

    @property
    def is_installed(self) -> bool:
        """Whether the framework can be found, without importing it."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def install_command(self) -> str:
        """What to run when it is not installed."""
        return f"pip install 'modelcrate[{self.extra}]'"


BACKENDS: Final[Mapping[str, Backend]] = {
    "onnxruntime": Backend(module="onnxruntime", extra="onnxruntime", session="modelcrate_runtime.sessions.onnxruntime_session"),
    "openvino": Backend(module="openvino", extra="openvino", session="modelcrate_runtime.sessions.openvino_session"),
    "ncnn": Backend(module="ncnn", extra="ncnn", session="modelcrate_runtime.sessions.ncnn_session"),
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
    if options.precision is None:
        options = replace(options, precision=bundle.manifest.precision if bundle.manifest else model.precision.lower())
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
    module = cast("_SessionModule", importlib.import_module(backend.session))
    return module.open_session(files, options)
