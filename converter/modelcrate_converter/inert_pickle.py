"""Pickles as data: an interpreter of their operations that builds containers, and descriptions of tensors and arrays, and nothing else.

No unpickler runs. The few names that describe tensors and numpy arrays stand for functions of this file; every other class or function becomes
`Skipped`, which swallows whatever the pickle does to it. Nothing is imported, no attribute of anything is read or set, only plain keys are hashed.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, Literal

import numpy as np
import torch

MAX_STORAGE_BYTES: Final = 64 * 2**30
_MAX_ARRAY_ITEMS: Final = 100_000
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


class Skipped:
    """Stands for every class, function and object that is not data."""


class DamagedPickleError(Exception):
    """The operations do not make sense, or reach for what no checkpoint needs."""


@dataclass(frozen=True, slots=True, eq=False)
class StorageRequest:
    """Elements that lie somewhere else in the file, by their key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRequest:
    """A tensor over a storage; offset and strides in elements."""

    storage: StorageRequest
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A global of the pickle: "module.name"."""

    full: str


@dataclass(slots=True, eq=False)
class _Dtype:
    """numpy.dtype by its name and byte order."""

    name: str
    order: Literal["<", ">", "|", "="] = "="

    def resolve(self) -> np.dtype[Any] | None:
        if self.name[:1] not in "biuf" or not self.name[1:].isdigit():
            return None
        try:
            return np.dtype(self.name).newbyteorder(self.order)
        except TypeError:
            return None


@dataclass(slots=True, eq=False)
class ArrayRequest:
    """A numpy array: its description and its bytes, made into lists only where it is wanted."""

    shape: tuple[int, ...] = ()
    dtype: _Dtype | None = None
    is_fortran: bool = False
    data: bytes = b""

    def to_list(self) -> object:
        """Nested lists of numbers; `Skipped` when it is no plain array of a sane size."""
        dtype = self.dtype.resolve() if self.dtype is not None else None
        count = math.prod(max(n, 1) for n in self.shape)
        if dtype is None or count > _MAX_ARRAY_ITEMS or math.prod(self.shape) * dtype.itemsize != len(self.data):
            return Skipped()
        return np.frombuffer(self.data, dtype=dtype).reshape(self.shape, order="F" if self.is_fortran else "C").tolist()


_KEY_TYPES: Final = (str, int, float, bytes, type(None))
_PUSHED: Final = frozenset(
    {
        "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    }
)  # fmt: skip
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class PickleMachine:
    """Interprets pickle operations as data.

    Attributes:
        skipped: the names that were asked for and not given.
        storages: every storage that a tensor asks for, by key.
    """

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.storages: dict[str, StorageRequest] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, stream: IO[bytes]) -> object:
        """Read one pickle; the stream is left behind its end."""
        self._stack, self._marks, self._memo = [], [], {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in old strings
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "STOP":
                    return self._stack.pop()
                self._step(operation.name, argument)
        raise DamagedPickleError("no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSHED:
            stack.append(_CONSTANTS.get(name, argument))
        elif name in {"BINPUT", "LONG_BINPUT", "PUT"}:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in {"BINGET", "LONG_BINGET", "GET"}:
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in _CONTAINERS:
            _CONTAINERS[name](self)
        elif name in {"GLOBAL", "STACK_GLOBAL"}:
            module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self._two()
            stack.append(self.named(f"{module}.{attribute}"))
        elif name in _CALLS:
            _CALLS[name](self, argument)
        elif name not in {"PROTO", "FRAME"}:
            raise DamagedPickleError(f"the operation {name}")

    def named(self, full: str) -> _Name:
        """A global, noted as skipped unless it describes a tensor or an array."""
        module, _, name = full.rpartition(".")
        if full not in _FUNCTIONS and full != "numpy.ndarray" and not (module in {"torch", "torch.storage"} and name in _DTYPES):
            self.skipped.add(full)
        return _Name(full)

    def popped_to_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _two(self) -> tuple[Any, Any]:
        second, first = self._stack.pop(), self._stack.pop()
        return first, second

    def push(self, value: object) -> None:
        """Put on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Take off the stack."""
        return self._stack.pop()

    def top(self) -> Any:
        """Look at the end of the stack."""
        return self._stack[-1]

    def set_items(self, target: object, flat: list[Any]) -> None:
        """Keys that are not plain are left out: to hash a tuple is to walk all that it holds."""
        if isinstance(target, dict):
            target.update((key, value) for key, value in zip(flat[::2], flat[1::2], strict=True) if isinstance(key, _KEY_TYPES))

    def call(self, function: object, arguments: object) -> None:
        """REDUCE and its like: the few known names give data, everything else `Skipped`."""
        result: object = Skipped()
        if isinstance(function, _Name):
            known = _FUNCTIONS.get(function.full)
            if known is not None and isinstance(arguments, tuple):
                result = known(*arguments)
        self._stack.append(result)

    def build(self) -> None:
        """BUILD: only the descriptions of arrays take a state."""
        target, state = self._two()
        if isinstance(target, _Dtype) and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            target.order = state[1]
        elif isinstance(target, ArrayRequest) and isinstance(state, tuple) and len(state) == 5:
            _fill(target, shape=state[1], dtype=state[2], is_fortran=bool(state[3]), data=state[4])
        elif isinstance(target, _Name):
            raise DamagedPickleError(f"a change to {target.full}")
        self._stack.append(target)

    def persistent(self, pid: object) -> None:
        """A storage by its key. Its elements are read later, when a tensor wants them."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Name)):
            self._stack.append(Skipped())
            return
        module, _, name = pid[1].full.rpartition(".")
        dtype = _DTYPES.get(name) if module in {"torch", "torch.storage"} else None
        key, numel = pid[2], pid[4]
        if dtype is None:
            self._stack.append(Skipped())
            return
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel * dtype.itemsize <= MAX_STORAGE_BYTES:
            raise DamagedPickleError("a storage without a key or with an impossible size")
        self._stack.append(self.storages.setdefault(key, StorageRequest(key, dtype, numel)))


def _append(machine: PickleMachine, items: list[Any]) -> None:
    if isinstance(machine.top(), list):
        machine.top().extend(items)


def _add(machine: PickleMachine, items: list[Any]) -> None:
    if isinstance(machine.top(), set):
        machine.top().update(item for item in items if isinstance(item, _KEY_TYPES))


def _drop(machine: PickleMachine) -> None:
    machine.popped_to_mark()


def _new_dict(machine: PickleMachine) -> None:
    flat = machine.popped_to_mark()
    machine.push({})
    machine.set_items(machine.top(), flat)


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.top(), [key, value])


def _set_items(machine: PickleMachine) -> None:
    flat = machine.popped_to_mark()
    machine.set_items(machine.top(), flat)


def _tuple_of(count: int) -> Callable[[PickleMachine], None]:
    def make(machine: PickleMachine) -> None:
        machine.push(tuple(reversed([machine.pop() for _ in range(count)])))

    return make


_CONTAINERS: Final[Mapping[str, Callable[[PickleMachine], None]]] = {
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "EMPTY_SET": lambda machine: machine.push(set()),
    "LIST": lambda machine: machine.push(machine.popped_to_mark()),
    "TUPLE": lambda machine: machine.push(tuple(machine.popped_to_mark())),
    "FROZENSET": lambda machine: machine.push({item for item in machine.popped_to_mark() if isinstance(item, _KEY_TYPES)}),
    "DICT": _new_dict,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine: _append(machine, machine.popped_to_mark()),
    "ADDITEMS": lambda machine: _add(machine, machine.popped_to_mark()),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "POP": lambda machine: machine.pop(),
    "POP_MARK": _drop,
    "DUP": lambda machine: machine.push(machine.top()),
}


def _reduce(machine: PickleMachine, _: object) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_object(machine: PickleMachine, _: object) -> None:
    arguments, cls = machine.pop(), machine.pop()
    machine.call(cls, arguments)


def _new_object_ex(machine: PickleMachine, _: object) -> None:
    machine.pop()  # keyword arguments
    _new_object(machine, None)


def _instance(machine: PickleMachine, argument: str) -> None:
    machine.call(machine.named(argument.replace(" ", ".", 1)), tuple(machine.popped_to_mark()))


def _object(machine: PickleMachine, _: object) -> None:
    cls, *arguments = machine.popped_to_mark()
    machine.call(cls, tuple(arguments))


_CALLS: Final[Mapping[str, Callable[[PickleMachine, Any], None]]] = {
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "INST": _instance,
    "OBJ": _object,
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": lambda machine, argument: machine.persistent(argument),
    "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
}


# ------------------------------------------------------------------------------------------- what the known names stand for


def _fill(array: ArrayRequest, *, shape: object, dtype: object, is_fortran: bool, data: object) -> ArrayRequest:
    if isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) and isinstance(dtype, _Dtype) and isinstance(data, (bytes, bytearray)):
        array.shape, array.dtype, array.is_fortran, array.data = shape, dtype, is_fortran, bytes(data)
    return array


def _rebuild_tensor(*args: object) -> object:
    if len(args) < 4 or not isinstance(args[0], StorageRequest):
        return Skipped()
    storage, offset, size, stride = args[:4]
    numbers = (offset, *(size if isinstance(size, tuple) else (None,)), *(stride if isinstance(stride, tuple) else (None,)))
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise DamagedPickleError("a tensor with a shape that is no tuple of sizes")
    return TensorRequest(storage, offset, size, stride)  # type: ignore[arg-type]  # checked above


def _rebuild_scalar(*args: object) -> object:
    if len(args) != 2 or not isinstance(args[0], _Dtype) or not isinstance(args[1], (bytes, str)):
        return Skipped()
    data = args[1] if isinstance(args[1], bytes) else args[1].encode("latin1", "replace")
    dtype = args[0].resolve()
    return np.frombuffer(data, dtype=dtype)[0].item() if dtype is not None and len(data) == dtype.itemsize else Skipped()


def _encode(*args: object) -> object:
    """How protocol 2 writes bytes."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin1")
    return Skipped()


def _first(*args: object) -> object:
    return args[0] if args else Skipped()


def _rebuild_from_type(*args: object) -> object:
    """A tensor subclass or a tensor with attributes: the tensor alone."""
    if len(args) >= 3 and isinstance(args[0], _Name) and args[0].full in _TENSOR_FUNCTIONS and isinstance(args[2], tuple):
        return _TENSOR_FUNCTIONS[args[0].full](*args[2])
    return Skipped()


def _dict_of(*args: object) -> object:
    """OrderedDict() as torch writes it, or from pairs as Python 2 does."""
    pairs = args[0] if args and isinstance(args[0], list) else []
    plain = (pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2)
    return {key: value for key, value in plain if isinstance(key, _KEY_TYPES)}


def _from_buffer(*args: object) -> object:
    """How protocol 5 writes numpy arrays: buffer, dtype, shape, order."""
    if len(args) != 4:
        return Skipped()
    return _fill(ArrayRequest(), shape=args[2], dtype=args[1], is_fortran=args[3] == "F", data=args[0])


_TENSOR_FUNCTIONS: Final[Mapping[str, Callable[..., object]]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., object]]] = {
    **_TENSOR_FUNCTIONS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _first,
    "collections.OrderedDict": _dict_of,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda *args: Skipped() if args else b"",
    "__builtin__.bytes": lambda *args: Skipped() if args else b"",
    "numpy.dtype": lambda *args: _Dtype(args[0]) if args and isinstance(args[0], str) else Skipped(),
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: ArrayRequest() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _rebuild_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
