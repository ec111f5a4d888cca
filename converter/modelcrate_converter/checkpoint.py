"""Reading a checkpoint without trusting it: tensors and plain data come out, nothing in it runs.

A `.pth` is a pickle, and unpickling is executing. The reader here resolves names through an allow-list of inert stand-ins: the few callables
that rebuild tensors and numpy arrays are replaced by records of what was asked for, every other class or function by `Skipped`, which swallows
whatever the pickle does to it. Nothing is imported on behalf of the file. Tensors are made afterwards, from bounds-checked bytes.

Read: torch's zip format, its legacy format from before 1.6, and safetensors. Inside: a bare state dict or one under `state_dict` or `model`, EMA
and training files, DataParallel prefixes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, Self

import numpy as np
import torch

from modelcrate_bundle.errors import CheckpointError

_MAX_PICKLE_BYTES: Final = 256 * 2**20
_MAX_STORAGE_BYTES: Final = 64 * 2**30
_MAX_MEMO: Final = 10_000_000
_MAX_META_ITEMS: Final = 1_000_000
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")
_STATE_KEYS: Final = ("state_dict", "model_state_dict", "model", "ema_state_dict", "ema")
_DTYPES: Final = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint holds that a converter can use.

    Attributes:
        path: the file.
        sha256: its hash, 64 hex digits.
        state_dict: the weights, float32 and integer tensors on the CPU, without DataParallel prefixes.
        meta: plain data found under `meta` (config text, dataset_meta), or the metadata of a safetensors file.
        skipped: names of classes and functions that the file asked for and did not get.
        state_key: under which key the weights stood, "" for a bare state dict.
    """

    path: Path
    sha256: str
    state_dict: dict[str, torch.Tensor]
    meta: dict[str, Any]
    skipped: tuple[str, ...]
    state_key: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor."""
        return {key: tuple(value.shape) for key, value in self.state_dict.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file.

    Args:
        path: a `.pth` / `.pt` of any torch version, or a `.safetensors`.

    Raises:
        CheckpointError: not there, empty, truncated, not a checkpoint, without weights, or with weights that are not finite.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a checkpoint file, found a folder", hint="give the .pth or .safetensors file itself")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            head = stream.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint file, found: {error.strerror}", hint="check the path") from error
    if size == 0:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file", hint="download it again")
    if path.suffix == ".safetensors" or head[:8].endswith(b"\x00\x00"):
        tensors, meta = _read_safetensors(path)
        return _finished(path, digest, tensors, meta, skipped=(), state_key="")
    with _as_checkpoint_errors(path):
        content, skipped, materialize = _read_zip(path) if head[:4] == b"PK\x03\x04" else _read_legacy(path)
        state_key, state = _find_state_dict(content, path=path)
        tensors = {key: materialize(value) for key, value in state.items() if isinstance(value, _Tensor)}
        outer = content if isinstance(content, Mapping) else {}
        meta = _plain(outer.get("meta", {})) if state_key else {}
    return _finished(path, digest, tensors, meta if isinstance(meta, dict) else {}, skipped=skipped, state_key=state_key)


def _finished(path: Path, digest: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any], *, skipped: tuple[str, ...], state_key: str) -> Checkpoint:
    """Strip common prefixes, bring floating-point weights to float32, refuse what is not finite."""
    if not tensors:
        raise CheckpointError(f"{path}: expected weights, found none", hint="give a checkpoint that holds a state dict")
    for prefix in _PREFIXES * 2:
        if all(key.startswith(prefix) or "." not in key for key in tensors) and any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    state = {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in tensors.items()}
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise CheckpointError(
                f"{path}: {key}: expected finite weights, found {count} of {value.numel()} that are NaN or infinite",
                hint="the training diverged: take an earlier checkpoint",
            )
    return Checkpoint(path=path, sha256=digest, state_dict=state, meta=meta, skipped=skipped, state_key=state_key)


def _find_state_dict(content: object, *, path: Path) -> tuple[str, Mapping[str, object]]:
    """The weights and the key that they stood under. MMEngine keeps the averaged weights under `state_dict`, the raw ones under `ema_state_dict`."""
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, _Tensor) for value in inner.values()):
                return key, inner
        if any(isinstance(value, _Tensor) for value in content.values()):
            return "", content
        found = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise CheckpointError(f"{path}: expected a state dict, found a mapping with {found}", hint="save model.state_dict(), not the model")
    raise CheckpointError(f"{path}: expected a state dict, found {type(content).__name__.lstrip('_')}", hint="save model.state_dict(), not the model")


# ------------------------------------------------------------------------------------------------------------ inert stand-ins


class Skipped:
    """Stands for every class, function and object that is not on the allow-list, and swallows what the pickle does to it."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Take any arguments."""
        del args, kwargs
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> Skipped:
        """Be called with anything."""
        del args, kwargs
        return Skipped()

    def __setstate__(self, state: object) -> None:
        """Forget the state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Forget the item."""

    def append(self, item: object) -> None:
        """Forget the item."""

    def extend(self, items: object) -> None:
        """Forget the items."""

    def add(self, item: object) -> None:
        """Forget the item."""


class _Frozen:
    """A callable that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: object) -> object:
        return object.__getattribute__(self, "_function")(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the file tries to change {name} of a reader function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file tries to change a reader function")


class _Dict(OrderedDict[Any, Any]):
    """An OrderedDict that ignores the attributes a pickle would set on it."""

    def __setstate__(self, state: object) -> None:
        """Forget `_metadata` and the like."""


class _Record:
    """A request that the pickle made; not to be altered by its BUILD, which would go around the checks."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file tries to change a tensor's description")


class _Storage(_Record):
    __slots__ = ("dtype", "key", "numel")

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel


class _Tensor(_Record):
    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride


class _Dtype:
    """numpy.dtype by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order: Literal["<", ">", "|", "="] = "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def resolve(self) -> np.dtype[Any] | None:
        if self.name[:1] not in "biuf" or not self.name[1:].isdigit():
            return None
        try:
            return np.dtype(self.name).newbyteorder(self.order)
        except TypeError:
            return None


class _Array:
    """numpy.ndarray, filled by its pickle state."""

    def __init__(self) -> None:
        self.value: object = Skipped()

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            return
        _, shape, dtype, _, data = state
        resolved = dtype.resolve() if isinstance(dtype, _Dtype) else None
        if resolved is None or not isinstance(data, bytes) or not isinstance(shape, tuple) or not all(isinstance(n, int) for n in shape):
            return
        if math.prod(shape) * resolved.itemsize == len(data):
            self.value = np.frombuffer(data, dtype=resolved).reshape(shape).tolist()


def _rebuild_tensor(*args: object) -> object:
    if len(args) < 4 or not isinstance(args[0], _Storage):
        return Skipped()
    storage, offset, size, stride = args[:4]
    numbers = (offset, *(size if isinstance(size, tuple) else (None,)), *(stride if isinstance(stride, tuple) else (None,)))
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor with a shape that is no tuple of sizes")
    return _Tensor(storage, offset, size, stride)  # type: ignore[arg-type]  # checked above


def _rebuild_scalar(*args: object) -> object:
    if len(args) != 2 or not isinstance(args[0], _Dtype) or not isinstance(args[1], bytes):
        return Skipped()
    dtype = args[0].resolve()
    return np.frombuffer(args[1], dtype=dtype)[0].item() if dtype is not None and len(args[1]) == dtype.itemsize else Skipped()


def _encode(*args: object) -> object:
    """How Python 2's byte strings are pickled."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin1")
    return Skipped()


def _first(*args: object) -> object:
    return args[0] if args else Skipped()


def _rebuild_from_type(*args: object) -> object:
    """A tensor subclass or a tensor with attributes: the tensor alone."""
    if len(args) >= 3 and isinstance(args[0], _Frozen) and isinstance(args[2], tuple):
        return args[0](*args[2])
    return Skipped()


def _allowed() -> dict[str, object]:
    """Name in the pickle -> inert stand-in. Made anew for each file, so that no file can change it for the next."""
    array = "numpy.core.multiarray", "numpy._core.multiarray"
    table: dict[str, object] = {
        "collections.OrderedDict": _Dict,
        "torch._utils._rebuild_tensor_v2": _Frozen(_rebuild_tensor),
        "torch._utils._rebuild_parameter": _Frozen(_first),
        "torch._tensor._rebuild_from_type_v2": _Frozen(_rebuild_from_type),
        "torch.Size": _Frozen(_first),
        "_codecs.encode": _Frozen(_encode),
        "numpy.dtype": _Frozen(lambda *args: _Dtype(args[0]) if args and isinstance(args[0], str) else Skipped()),
        "numpy.ndarray": Skipped,
    }
    for module in array:
        table[f"{module}._reconstruct"] = _Frozen(lambda *_: _Array())
        table[f"{module}.scalar"] = _Frozen(_rebuild_scalar)
    return table


class _Unpickler(pickle.Unpickler):
    """The pickle machine over the allow-list."""

    def __init__(self, stream: IO[bytes], skipped: set[str]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._table = _allowed()
        self._skipped = skipped

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._table:
            return self._table[full]
        if module in {"torch", "torch.storage"} and name in _DTYPES:
            return _StorageType(name)
        self._skipped.add(full)
        return Skipped

    def persistent_load(self, pid: Any) -> object:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            return Skipped()
        key, numel = pid[2], pid[4]
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel * pid[1].dtype.itemsize <= _MAX_STORAGE_BYTES:
            raise pickle.UnpicklingError("a storage without a key or with an impossible size")
        return _Storage(key, pid[1].dtype, numel)


def _load(stream: IO[bytes], skipped: set[str]) -> object:
    """Load one pickle of the stream, after a look at its operations: a memo index beyond all reason would make the C unpickler fill the memory."""
    start = stream.tell()
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in {"PUT", "BINPUT", "LONG_BINPUT"} and isinstance(argument, int) and argument > _MAX_MEMO:
            raise pickle.UnpicklingError(f"memo index {argument}")
    stream.seek(start)
    return _Unpickler(stream, skipped).load()


class _StorageType:
    """torch.FloatStorage and its like: only the element type is wanted."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "dtype", _DTYPES[name])

    dtype: torch.dtype

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the file tries to change {name} of a storage type")

    def __call__(self, *args: object) -> Skipped:
        del args
        return Skipped()


# -------------------------------------------------------------------------------------------------------------------- formats

Materialize = Callable[[_Tensor], torch.Tensor]


def _read_zip(path: Path) -> tuple[object, tuple[str, ...], Materialize]:
    """Torch's format since 1.6: a zip of stored entries, `<name>/data.pkl` and `<name>/data/<key>`."""
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: expected a checkpoint, found a TorchScript archive", hint="give the state dict that it was traced from")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: expected one data.pkl in the zip, found {len(pickles)}", hint="give a file that torch.save wrote")
    root = pickles[0].removesuffix("data.pkl")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: expected every zip entry once, found doubles", hint="do not use this file: it reads differently in different tools")
    order = _zip_entry(archive, f"{root}byteorder", limit=16) if f"{root}byteorder" in names else b"little"
    if order != b"little":
        raise CheckpointError(f"{path}: expected little-endian tensors, found {order!r}", hint="save it again on a little-endian machine")
    skipped: set[str] = set()
    content = _load(io.BytesIO(_zip_entry(archive, pickles[0], limit=_MAX_PICKLE_BYTES)), skipped)
    cache: dict[str, torch.Tensor] = {}

    def materialize(tensor: _Tensor) -> torch.Tensor:
        storage = tensor.storage
        if storage.key not in cache:
            data = _zip_entry(archive, f"{root}data/{storage.key}", limit=_MAX_STORAGE_BYTES)
            cache[storage.key] = _flat(data, storage)
        return _strided(cache[storage.key], tensor)

    return content, tuple(sorted(skipped)), materialize


def _zip_entry(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed; torch.save never compresses")
    if info.file_size > limit:
        raise pickle.UnpicklingError(f"{name} has {info.file_size} bytes, more than the {limit} allowed")
    return archive.read(info)


def _read_legacy(path: Path) -> tuple[object, tuple[str, ...], Materialize]:
    """Torch's format before 1.6: five pickles, then per storage its length and its bytes."""
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path}: expected a checkpoint, found a tar archive", hint="unpack it, or save the model with torch >= 1.6")
    skipped: set[str] = set()
    with path.open("rb") as stream:
        if _load(stream, skipped) != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("no torch magic number")
        for _ in range(2):  # protocol version, system info
            _load(stream, skipped)
        content = _load(stream, skipped)
        keys = _load(stream, skipped)
        wanted = {storage.key: storage for storage in _storages(content, seen=set())}
        data: dict[str, torch.Tensor] = {}
        for key in keys if isinstance(keys, list) else []:
            (numel,) = struct.unpack("<q", _exactly(stream, 8))
            storage = wanted.get(key)
            if storage is None or numel != storage.numel:
                raise pickle.UnpicklingError(f"storage {key!r} is not the one that a tensor asks for")
            data[key] = _flat(_exactly(stream, numel * storage.dtype.itemsize), storage)

    def materialize(tensor: _Tensor) -> torch.Tensor:
        return _strided(data[tensor.storage.key], tensor)

    return content, tuple(sorted(skipped)), materialize


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"expected {count} more bytes, found {len(data)}")
    return data


def _storages(content: object, *, seen: set[int]) -> Iterator[_Storage]:
    """Every storage that is asked for; containers that refer to themselves or to each other are walked once."""
    if isinstance(content, _Tensor):
        yield content.storage
    elif isinstance(content, _Storage):
        yield content
    elif isinstance(content, (Mapping, list, tuple)) and id(content) not in seen:
        seen.add(id(content))
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _storages(value, seen=seen)


def _flat(data: bytes, storage: _Storage) -> torch.Tensor:
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {storage.key}: expected {storage.numel * storage.dtype.itemsize} bytes, found {len(data)}")
    if not data:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def _strided(flat: torch.Tensor, tensor: _Tensor) -> torch.Tensor:
    if len(tensor.size) != len(tensor.stride):
        raise pickle.UnpicklingError("a tensor with another number of strides than sizes")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    if 0 not in tensor.size and last >= flat.numel():
        raise pickle.UnpicklingError(f"a tensor that reaches element {last} of a storage of {flat.numel()}")
    return flat.as_strided(tensor.size, tensor.stride, tensor.offset)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118  # not a mapping
            return tensors, dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}", hint="download it again") from error


def _plain(value: object, *, depth: int = 0, budget: Iterator[int] | None = None) -> Any:
    """Plain data without stand-ins; what is not plain is left out. The budget ends structures that share themselves to enormous size."""
    budget = iter(range(_MAX_META_ITEMS)) if budget is None else budget
    if depth > 32 or next(budget, None) is None:
        return None
    if isinstance(value, _Array):
        return _plain(value.value, depth=depth + 1, budget=budget)
    if isinstance(value, Mapping):
        pairs = ((key, _plain(item, depth=depth + 1, budget=budget)) for key, item in value.items() if isinstance(key, (str, int)))
        return {key: item for key, item in pairs if item is not None}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item, depth=depth + 1, budget=budget) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None


_DAMAGE: Final = (
    pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError, MemoryError,
    OverflowError, NotImplementedError, struct.error, ImportError, RuntimeError, OSError,
)  # fmt: skip


@contextlib.contextmanager
def _as_checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn all that a damaged or hostile file can raise into one error that names it."""
    try:
        yield
    except _DAMAGE as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint that torch.save wrote, found a damaged or foreign file: {text}",
            hint="download or copy it again, and compare its size",
        ) from error
