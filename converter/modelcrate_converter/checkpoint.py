"""Reading a checkpoint without trusting it: tensors and plain data come out, nothing in it runs.

A `.pth` is a pickle, and unpickling is executing: `inert_pickle` reads it as data instead. Tensors are made afterwards, from bounds-checked bytes.

Read: torch's zip format, its legacy format from before 1.6, and safetensors. Inside: a bare state dict or one under `state_dict` or `model`, EMA
and training files, DataParallel prefixes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch

from modelcrate_bundle.errors import CheckpointError
from modelcrate_converter.inert_pickle import MAX_STORAGE_BYTES, ArrayRequest, DamagedPickleError, PickleMachine, StorageRequest, TensorRequest

_MAX_PICKLE_BYTES: Final = 256 * 2**20
_MAX_META_ITEMS: Final = 200_000
_MAX_UNFOLDING: Final = 8
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
PREFIXES: Final = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every key: DataParallel, torch.compile, Lightning."""
_STATE_KEYS: Final = ("state_dict", "model_state_dict", "model", "ema_state_dict", "ema")


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

    def require_sha256(self, prefix: str | None) -> None:
        """Refuse a file whose hash does not begin like this.

        Raises:
            CheckpointError: it does not.
        """
        if prefix is not None and not self.sha256.startswith(prefix.lower()):
            raise CheckpointError(f"{self.path}: expected SHA-256 {prefix}, found {self.sha256}", hint="it is another file, or a damaged one")

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
            head = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint file, found: {error.strerror}", hint="check the path") from error
    if size == 0:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file", hint="download it again")
    if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < size):
        tensors, meta = _read_safetensors(path)
        with _as_checkpoint_errors(path):
            return _finished(path, digest, tensors, meta, skipped=(), state_key="")
    with _as_checkpoint_errors(path):
        content, skipped, materialize = _read_zip(path) if head[:4] == b"PK\x03\x04" else _read_legacy(path)
        state_key, state = _find_state_dict(content, path=path)
        described = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, TensorRequest)}
        if sum(math.prod(tensor.size) for tensor in described.values()) > _MAX_UNFOLDING * size:
            raise DamagedPickleError("tensors that share their elements to many times the size of the file")
        tensors = {key: materialize(value) for key, value in described.items()}
        found = _plain(content.get("meta")) if isinstance(content, dict) else None
        return _finished(path, digest, tensors, found if isinstance(found, dict) else {}, skipped=skipped, state_key=state_key)


def _finished(path: Path, digest: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any], *, skipped: tuple[str, ...], state_key: str) -> Checkpoint:
    """Strip common prefixes, bring floating-point weights to float32, refuse what is not finite."""
    if not tensors:
        raise CheckpointError(f"{path}: expected weights, found none", hint="give a checkpoint that holds a state dict")
    tensors.pop("n_averaged", None)  # torch's AveragedModel counts its updates beside `module.`
    for prefix in PREFIXES * 2:
        if tensors and all(key.startswith(prefix) for key in tensors):
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


def _find_state_dict(content: object, *, path: Path) -> tuple[str, Mapping[object, object]]:
    """The weights and the key that they stood under. MMEngine keeps the averaged weights under `state_dict`, the raw ones under `ema_state_dict`."""
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, TensorRequest) for value in inner.values()):
                return key, inner
        if any(isinstance(value, TensorRequest) for value in content.values()):
            return "", content
        found = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise CheckpointError(f"{path}: expected a state dict, found a mapping with {found}", hint="save model.state_dict(), not the model")
    raise CheckpointError(f"{path}: expected a state dict, found {type(content).__name__.lstrip('_')}", hint="save model.state_dict(), not the model")


# -------------------------------------------------------------------------------------------------------------------- formats

Materialize = Callable[[TensorRequest], torch.Tensor]


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
    machine = PickleMachine()
    content = machine.load(io.BytesIO(_zip_entry(archive, pickles[0], limit=_MAX_PICKLE_BYTES)))
    cache: dict[str, torch.Tensor] = {}

    def materialize(tensor: TensorRequest) -> torch.Tensor:
        storage = tensor.storage
        if storage.key not in cache:
            data = _zip_entry(archive, f"{root}data/{storage.key}", limit=MAX_STORAGE_BYTES)
            cache[storage.key] = _flat(data, storage)
        return _strided(cache[storage.key], tensor)

    return content, tuple(sorted(machine.skipped)), materialize


def _zip_entry(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise DamagedPickleError(f"{name} is compressed; torch.save never compresses")
    if info.file_size > limit:
        raise DamagedPickleError(f"{name} has {info.file_size} bytes, more than the {limit} allowed")
    return archive.read(info)


def _read_legacy(path: Path) -> tuple[object, tuple[str, ...], Materialize]:
    """Torch's format before 1.6: five pickles, then per storage its length and its bytes."""
    with path.open("rb") as stream:
        stream.seek(257)
        if stream.read(5) == b"ustar":
            raise CheckpointError(f"{path}: expected a checkpoint, found a tar archive", hint="unpack it, or save the model with torch >= 1.6")
        stream.seek(0)
        machine = PickleMachine()
        if machine.load(stream) != _LEGACY_MAGIC:
            raise DamagedPickleError("no torch magic number")
        for _ in range(2):  # protocol version, system info
            machine.load(stream)
        content = machine.load(stream)
        keys = machine.load(stream)
        data: dict[str, torch.Tensor] = {}
        for key in keys if isinstance(keys, list) else []:
            (numel,) = struct.unpack("<q", _exactly(stream, 8))
            storage = machine.storages.get(key) if isinstance(key, str) else None
            if storage is None or numel != storage.numel:
                raise DamagedPickleError(f"storage {key!r} is not the one that a tensor asks for")
            data[storage.key] = _flat(_exactly(stream, numel * storage.dtype.itemsize), storage)

    def materialize(tensor: TensorRequest) -> torch.Tensor:
        return _strided(data[tensor.storage.key], tensor)

    return content, tuple(sorted(machine.skipped)), materialize


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"expected {count} more bytes, found {len(data)}")
    return data


def _flat(data: bytes, storage: StorageRequest) -> torch.Tensor:
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise DamagedPickleError(f"storage {storage.key}: expected {storage.numel * storage.dtype.itemsize} bytes, found {len(data)}")
    if not data:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def _strided(flat: torch.Tensor, tensor: TensorRequest) -> torch.Tensor:
    if len(tensor.size) != len(tensor.stride):
        raise DamagedPickleError("a tensor with another number of strides than sizes")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    if 0 not in tensor.size and last >= flat.numel():
        raise DamagedPickleError(f"a tensor that reaches element {last} of a storage of {flat.numel()}")
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
    if next(budget, None) is None or depth > 32:
        return None
    if isinstance(value, ArrayRequest):
        return _plain(value.to_list(), depth=depth + 1, budget=budget)
    if isinstance(value, dict):
        pairs = ((key, _plain(item, depth=depth + 1, budget=budget)) for key, item in value.items() if isinstance(key, (str, int)))
        return {key: item for key, item in pairs if item is not None}
    if isinstance(value, (list, tuple, set)):
        items = []
        for item in value:
            plain = _plain(item, depth=depth + 1, budget=budget)
            if plain is None and next(budget, None) is None:
                break
            items.append(plain)
        return items
    return value if isinstance(value, (str, int, float, bool)) else None


_DAMAGE: Final = (
    DamagedPickleError, EOFError, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError, AttributeError, RecursionError, MemoryError,
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
