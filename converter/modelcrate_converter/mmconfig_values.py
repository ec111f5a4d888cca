"""The plain data of a config and what may be done to it: a table of functions, methods and operators, each with a bound on its result.

`mmconfig` interprets a config over these; nothing that is not in a table here is ever called.
"""

from __future__ import annotations

import ast
import hashlib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelcrate_bundle.errors import ConfigError

MAX_STEPS = 3_000_000  # a real config with all its bases takes some thousands
MAX_ITEMS = 1_000_000  # of one value, nested ones and repeated references counted, because whoever walks the value visits them all
MAX_RANGE = 100_000
MAX_DEPTH = 100  # of nested expressions and of values, so that neither our recursion nor a caller's can overflow
MAX_INT = 1 << 64
BASE, DELETE = "_base_", "_delete_"
_PREDEFINED = re.compile(r"\{\{\s*(fileDirname|fileBasename|fileBasenameNoExtension|fileExtname)\s*\}\}")
_ENVIRONMENT = re.compile(r"""\{\{['"]?[ \t]*\$\w+[ \t]*:[ \t]*([^\s{}'"]*)[ \t]*['"]?\}\}""")
_BASE_VARIABLE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
FORMAT_SPEC = re.compile(r"[<>=^+\- #,_]*\d{0,3}(\.\d{1,2})?[a-zA-Z%]?")  # no width that would make a string of gigabytes


@dataclass(frozen=True, slots=True)
class Unknown:
    """Stands where a config computes something that cannot be known without executing it.

    Attributes:
        text: the start of the expression or statement, as written.
        line: its line, from 1; 0 where the value is too large or too deep rather than one expression.
        source: the file or label that it stands in.
    """

    text: str
    line: int
    source: str


@dataclass(slots=True)
class Budget:
    """The work that one read may take, over all its files.

    Attributes:
        source: what is read, for messages.
        steps: what it has taken so far.
    """

    source: str
    steps: int = 0

    def spend(self, steps: int) -> None:
        """Take so many steps.

        Raises:
            ConfigError: there are no more.
        """
        self.steps += steps
        if self.steps > MAX_STEPS:
            message = f"{self.source}: expected a config that is read in {MAX_STEPS} steps, found one that takes more"
            raise ConfigError(message, hint="write the values out instead of computing them")


def merge(child: dict[Any, Any], base: Any, reading: Budget) -> Any:
    """Mmengine's merge of a child's dict into the base's value; neither is changed.

    Where mmengine refuses (a dict over something that is not one, an index outside of the list) the child's value stands alone.
    """
    reading.spend(len(child) + 1)
    if isinstance(base, Unknown):
        return base  # the child changes a part of something that we do not know
    if isinstance(base, list) and child and all(re.fullmatch(r"[0-9]{1,7}", str(key)) and int(key) < len(base) for key in child):
        items = list(base)
        for key, value in child.items():
            items[int(key)] = merge(value, items[int(key)], reading) if isinstance(value, dict) else value
        return items
    merged = dict(base) if isinstance(base, dict) and not child.get(DELETE, False) else {}
    for key, value in child.items():
        if key != DELETE:
            merged[key] = merge(value, merged.get(key), reading) if isinstance(value, dict) else value
    return merged


class NotDataError(Exception):
    """An expression that is not data, or data larger than we take: an `Unknown` will stand for it."""


# What evaluating data can raise: ours, and what Python's operators say to operands that do not fit (1 / 0, [1][7], 'a' - 1).
FAILURES = (NotDataError, ArithmeticError, LookupError, TypeError, ValueError)


def check_size(value: Any, reading: Budget, *, unknown_allowed: bool = False) -> None:
    """Refuse a value that unfolds to too many items or too deep, as one that holds itself does; before anything walks it recursively."""
    level, total = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, Unknown) and not unknown_allowed:
                raise NotDataError
            if isinstance(item, (dict, list, tuple)):
                total += len(item)
                if total > MAX_ITEMS:
                    raise NotDataError
                below.extend(item.values() if isinstance(item, dict) else item)
        reading.spend(len(below) // 8 + 1)
        if not below:
            return
        level = below
    raise NotDataError


def bounded(value: Any, reading: Budget) -> Any:
    """The result of an operation, if it is data of a size that we take."""
    if isinstance(value, (str, list, tuple, dict)):
        if len(value) > MAX_ITEMS:
            raise NotDataError
        reading.spend(len(value) // 8)  # made in C, so cheaper than steps of our own
    elif (isinstance(value, int) and abs(value) >= MAX_INT) or not (value is None or isinstance(value, (int, float))):
        raise NotDataError
    return value


def to_text(value: Any) -> str:
    """`str` of what has one text in every Python."""
    if not (value is None or isinstance(value, (str, int, float))):
        raise NotDataError
    return str(value)


def _sum(values: Iterable[Any], start: float = 0) -> Any:
    if not all(isinstance(value, (int, float)) for value in values):  # sum() of lists copies them again and again
        raise NotDataError
    return sum(values, start)


def _range(*arguments: int) -> list[int]:
    numbers = range(*arguments)
    if len(numbers) > MAX_RANGE:
        raise NotDataError
    return list(numbers)


def _round(number: float, ndigits: int | None = None) -> float:
    if ndigits is not None and abs(ndigits) > 20:  # round(1, -10**9) would compute 10**10**9
        raise NotDataError
    return round(number, ndigits)


def as_key(value: Any) -> Any:
    """A value as a key: hashing may neither recurse without a bound nor take an `Unknown` for a value."""
    if not all(item is None or isinstance(item, (str, int, float)) for item in (value if isinstance(value, tuple) else [value])):
        raise NotDataError
    return value


def unique(values: Iterable[Any] = ()) -> list[Any]:
    """What a set becomes: a list without doubles, in the order written."""
    return list(dict.fromkeys(as_key(value) for value in values))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "set": unique,
    "int": int,
    "float": float,
    "str": to_text,
    "bool": bool,
    "dict": dict,
    "max": max,
    "min": min,
    "len": len,
    "range": _range,
    "sum": _sum,
    "abs": abs,
    "round": _round,
}
TEXT_METHODS: dict[str, Callable[..., Any]] = {
    "lower": str.lower,
    "upper": str.upper,
    "strip": str.strip,
    "split": str.split,
    "startswith": str.startswith,
    "endswith": str.endswith,
}
READING_METHODS = {"get", "copy", "keys", "values", "items", "index", "count"}
METHODS: dict[tuple[type, str], Callable[..., Any]] = {
    (dict, "get"): dict.get,
    (dict, "copy"): dict.copy,
    (dict, "pop"): dict.pop,
    (dict, "setdefault"): dict.setdefault,
    (dict, "keys"): list,
    (dict, "values"): lambda owner: list(owner.values()),
    (dict, "items"): lambda owner: list(owner.items()),
    (list, "copy"): list.copy,
    (list, "index"): list.index,
    (list, "count"): list.count,
    (list, "append"): list.append,
    (list, "extend"): list.extend,
    (list, "insert"): list.insert,
    (list, "pop"): list.pop,
}
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}


def operate(node: ast.operator, left: Any, right: Any, reading: Budget) -> Any:
    """A binary operation, refused before it is computed if its result would be too large."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if isinstance(node, ast.Pow) and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 128:
            raise NotDataError
        if isinstance(node, ast.LShift) and right > 64:
            raise NotDataError
    elif isinstance(node, ast.Add) and isinstance(left, (str, list, tuple)) and type(left) is type(right):
        if len(left) + len(right) > MAX_ITEMS:
            raise NotDataError
    elif isinstance(node, ast.Mult) and isinstance(left, (str, list, tuple, int)) and isinstance(right, (str, list, tuple, int)):
        sequence, count = (right, left) if isinstance(left, int) else (left, right)
        if not isinstance(count, int) or isinstance(sequence, int) or len(sequence) * count > MAX_ITEMS:
            raise NotDataError
    else:
        raise NotDataError  # among others str % values, whose widths have no bound
    return bounded(OPERATORS[type(node)](left, right), reading)


def replace_templates(text: str, path: Path | None) -> tuple[str, dict[str, str]]:
    """Put an identifier where `{{ }}` stands, since that may stand bare, be a whole string or lie inside one; returns what each means.

    That is `=` with a part of the path, or a dotted name. The defaults of environment variables go right into the text: they are code.
    """
    salt = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]  # so that no text can hold such an identifier already
    templates: dict[str, str] = {}

    def note(meaning: str) -> str:
        return templates.setdefault(meaning, f"_t{salt}_{len(templates)}_")

    text = _ENVIRONMENT.sub(lambda match: match[1], text)
    text = _BASE_VARIABLE.sub(lambda match: note(f"{BASE}.{match[1]}"), text)
    parts: dict[str, str] = {}
    if path is not None:
        parts |= {"fileDirname": path.parent.as_posix(), "fileBasename": path.name}
        parts |= {"fileBasenameNoExtension": path.stem, "fileExtname": path.suffix}
    text = _PREDEFINED.sub(lambda match: note("=" + parts[match[1]] if parts else match[1]), text)  # without a file: a name that is not there
    return text, {identifier: meaning for meaning, identifier in templates.items()}
