"""ncnn: one sample per call, on the CPU. Half precision is a matter of storage here: arithmetic stays in float32."""

from __future__ import annotations

import importlib
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, UnsupportedBundleError
from modelcrate_bundle.tensors import Dim, TensorSpec
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.sessions import LayerTime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from modelcrate_runtime.sessions import SessionOptions

MAGIC: Final = "7767517"
"""The first line of a `.param`."""
_PRECISIONS: Final = ("fp32", "fp16", "int8")


class NcnnSession:
    """One ncnn network. ncnn has no batch axis: an array of one sample goes in, and comes out with its batch axis of 1.

    Attributes:
        inputs: the network's inputs; their sizes stand in the Input layers.
        outputs: the network's outputs in ncnn's order, as one run on zeros showed them.
        threads: threads inside one operator.
        streams: always 1: the binding holds Python's lock while a network runs.
    """

    def __init__(self, files: Mapping[str, Path], options: SessionOptions) -> None:
        """Load.

        Raises:
            ConfigError: another device than the CPU, or execution providers.
            BundleIntegrityError: the files are no network that ncnn can read.
            UnsupportedBundleError: an input without sizes, or a precision that ncnn does not have.
        """
        ncnn: Any = importlib.import_module("ncnn")  # a binding without types
        if options.device != "cpu":
            raise ConfigError(f"device: expected cpu for ncnn, found {options.device!r}")
        if options.providers:
            raise ConfigError("providers: expected none for ncnn, found some: they are ONNX Runtime's")
        for name, number in (("threads", options.threads), ("streams", options.streams)):
            if number is not None and number < 1:
                raise ConfigError(f"{name}: expected at least 1, found {number}")
        precision = options.precision or "fp32"
        if precision not in _PRECISIONS:
            raise UnsupportedBundleError(f"{files['net']}: precision: expected one of {', '.join(_PRECISIONS)}, found {precision!r}")
        self.threads = options.threads or usable_cores()
        self.streams = 1
        self._path = path = files["net"]
        self.inputs = input_specs(path)
        net: Any = ncnn.Net()
        net.opt.num_threads = self.threads
        net.opt.use_vulkan_compute = False
        # bfloat16 storage costs 2 % here, and half arithmetic overflows in the heads of pose networks: neither is ever on.
        net.opt.use_bf16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = precision == "fp16"
        if net.load_param(str(path)) != 0 or "weights" not in files or net.load_model(str(files["weights"])) != 0:
            raise BundleIntegrityError(f"{path}: expected a network that ncnn {ncnn.__version__} loads, found one that it refuses", hint="convert again")
        names = [spec.name for spec in self.inputs]
        if sorted(net.input_names()) != sorted(names):
            raise BundleIntegrityError(f"{path}: expected the inputs {', '.join(names)}, found {', '.join(net.input_names())}")
        self._net: Any = net
        self._lock = threading.Lock()
        self._names: list[str] = list(net.output_names())
        zeros = {spec.name: np.zeros(tuple(dim for dim in spec.shape if isinstance(dim, int)), dtype=np.float32) for spec in self.inputs}
        try:
            found = self._extract(zeros)
        except (InputError, ValueError) as error:
            raise BundleIntegrityError(f"{path}: expected a network that runs, found: {error}", hint="convert again") from error
        self.outputs = tuple(TensorSpec(name=name, dtype="float32", shape=value.shape) for name, value in found.items())

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once, with all threads, on arrays with a batch axis of 1.

        Raises:
            InputError: a name, shape or dtype that the network does not take; or the session is closed.
        """
        self._check(feeds)
        return dict(self._extract(feeds))

    run_beside = run

    def blobs(self, feeds: Mapping[str, NDArray[np.generic]], names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        """Run once and show inner blobs, by their names in the `.param`, without a batch axis.

        Raises:
            InputError: as `run`; or there is no such blob.
        """
        self._check(feeds)
        return self._extract(feeds, names)

    def _check(self, feeds: Mapping[str, NDArray[np.generic]]) -> None:
        if self._net is None:
            raise InputError("ncnn: expected an open session, found a closed one", hint="run it inside the with block")
        expected = {spec.name: spec for spec in self.inputs}
        if feeds.keys() != expected.keys() or any(value.dtype != np.float32 or value.shape != expected[name].shape for name, value in feeds.items()):
            wanted = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in self.inputs)
            found = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items()) or "nothing"
            raise InputError(f"ncnn: expected {wanted}, found {found}", hint="ncnn takes one sample at a time")

    def _extract(self, feeds: Mapping[str, NDArray[Any]], blobs: Sequence[str] | None = None) -> dict[str, NDArray[np.generic]]:
        # An extractor belongs to one call; the network's memory pools are shared by all of them.
        with self._lock:
            extractor = self._fed(feeds, is_light=blobs is None)
            results: dict[str, NDArray[np.generic]] = {}
            for name in self._names if blobs is None else blobs:
                status, mat = extractor.extract(name)
                if status != 0:
                    raise InputError(f"ncnn: expected the output {name}, found error {status}: is there memory for it?")
                value = np.array(mat, dtype=np.float32)
                results[name] = value[None] if blobs is None else value
        return results

    def _fed(self, feeds: Mapping[str, NDArray[Any]], *, is_light: bool) -> Any:
        """A new extractor with its inputs set; one that is light frees a blob as soon as the last layer has read it."""
        ncnn: Any = importlib.import_module("ncnn")
        extractor = self._net.create_extractor()
        extractor.set_light_mode(is_light)
        for name, value in feeds.items():
            held = np.ascontiguousarray(value[0])  # a Mat does not keep the array that it is made of
            # A copy: a first layer that works in place ends the process on memory that is not ncnn's.
            if extractor.input(name, ncnn.Mat(held).clone()) != 0:
                raise InputError(f"ncnn: expected to set the input {name}, found that ncnn refuses it")
        return extractor

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """See `TimesLayers`. ncnn has no counters in its package: blob after blob is asked for, and only what is new for one is computed."""
        self._check(feeds)
        layers = [(kind, blobs[0]) for kind, _, blobs in read_layers(self._path) if blobs and kind != "Input"]
        seconds: list[list[float]] = [[] for _ in layers]
        with self._lock:
            for turn in range(1 + runs):
                extractor = self._fed(feeds, is_light=False)
                for i, (_, blob) in enumerate(layers):
                    start = time.perf_counter()
                    extractor.extract(blob)
                    if turn:
                        seconds[i].append(time.perf_counter() - start)
        return [LayerTime(name=blob, kind=kind, seconds=statistics.median(those)) for (kind, blob), those in zip(layers, seconds, strict=True)]

    def copy_seconds(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[float]:
        """See `TimesCopies`."""
        self._check(feeds)
        seconds = []
        with self._lock:
            for _ in range(runs):
                start = time.perf_counter()
                extractor = self._fed(feeds, is_light=True)
                spent = time.perf_counter() - start
                mats = [extractor.extract(name)[1] for name in self._names]
                start = time.perf_counter()
                for mat in mats:
                    np.array(mat, dtype=np.float32)
                seconds.append(spent + time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Free the network."""
        self._net = None


def open_session(files: Mapping[str, Path], options: SessionOptions) -> NcnnSession:
    """The session of the files under the roles `net` (.param) and `weights` (.bin)."""
    return NcnnSession(files, options)


def input_specs(path: Path) -> tuple[TensorSpec, ...]:
    """The inputs of a `.param`: name, and (1, C, H, W) from the parameters 2, 1 and 0 of their layers.

    Raises:
        BundleIntegrityError: no `.param`.
        UnsupportedBundleError: an input that does not say its size.
    """
    specs = []
    for kind, sizes, blobs in read_layers(path):
        if kind != "Input":
            continue
        name = blobs[0]
        dims = [sizes.get(key, 0) for key in (2, 1, 0)]
        if not all(dim > 0 for dim in dims):
            raise UnsupportedBundleError(
                f"{path}: {kind} {name}: expected its width, height and channels (0=, 1=, 2=), found {dims[::-1]}",
                hint="write them into the line of the layer, or convert the checkpoint with modelcrate",
            )
        shape: tuple[Dim, ...] = (1, *dims)
        specs.append(TensorSpec(name=name, dtype="float32", shape=shape))
    return tuple(specs)


def read_layers(path: Path) -> list[tuple[str, dict[int, int], list[str]]]:
    """The layers of a `.param`: kind, whole-number parameters, output blobs.

    Raises:
        BundleIntegrityError: no `.param`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleIntegrityError(f"{path}: expected an ncnn .param file, found: {error}", hint="copy the bundle again, or convert again") from error
    if not lines or lines[0].strip() != MAGIC:
        raise BundleIntegrityError(
            f"{path}: expected an ncnn .param file that begins with {MAGIC}, found another", hint="copy the bundle again, or convert again"
        )
    found = []
    for line in lines[2:]:
        words = line.split()
        if not words:
            continue
        try:
            first = 4 + int(words[2])
            outputs = words[first : first + int(words[3])]
            pairs = (word.split("=", 1) for word in words[first + len(outputs) :] if "=" in word)
            numbers = {int(key): int(value) for key, value in pairs if value.lstrip("-").isdecimal()}
            if words[0] == "Input" and not outputs:
                raise ValueError(line)  # noqa: TRY301  # said below
        except (ValueError, IndexError) as error:
            raise BundleIntegrityError(f"{path}: expected the line of a layer, found {line[:100]!r}", hint="copy the bundle again, or convert again") from error
        found.append((words[0], numbers, outputs))
    return found
