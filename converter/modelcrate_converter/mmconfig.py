"""Reads MMPose and MMDetection configs (mmengine's Python dialect) without executing them.

The text is parsed with `ast`, and a small interpreter evaluates over plain data the part of Python that configs are written in. What it
cannot evaluate becomes an `Unknown` in its place: most of a config is about training, and must not keep us from the network. Inheritance is
mmengine's: `Config._file2dict` for `_base_`, where a child's dicts merge into the base's, and `Config._parse_lazy_import` for `read_base`,
where the base's names are simply in scope.

A config is untrusted. Nothing is imported, only the tables in this file are called, no file but the bases is read and no environment
variable; the size of every value and the work of the whole read are bounded.
"""

from __future__ import annotations

import ast
import contextlib
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelcrate_bundle.errors import ConfigError
from modelcrate_converter.mmconfig_values import (
    BASE,
    FAILURES,
    FORMAT_SPEC,
    FUNCTIONS,
    MAX_DEPTH,
    MAX_ITEMS,
    METHODS,
    OPERATORS,
    READING_METHODS,
    TEXT_METHODS,
    Budget,
    NotDataError,
    Unknown,
    as_key,
    bounded,
    check_size,
    merge,
    operate,
    replace_templates,
    to_text,
    unique,
)

_MAX_FILES = 64
_MAX_FILE_BYTES = 4 << 20

_TEMPLATE = re.compile(r"_t[0-9a-f]{16}_\d+_")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A config as data.

    Attributes:
        values: top-level names to dict, list, tuple, str, int, float, bool, None or `Unknown`, at any depth; a set is a list in written
            order, an imported class the string of its name. Equal parts may be one shared object: copy before you change something.
        source: path or label, for messages.
        missing_bases: `_base_` entries and `read_base` modules that are not there, as written; what they set is not in `values`.
    """

    values: dict[str, Any]
    source: str
    missing_bases: tuple[str, ...]


def read_config_text(text: str, *, source: str) -> ModelConfig:
    """Read a config that is not a file, as the one in a checkpoint's meta; all its bases count as missing.

    Args:
        text: the Python source.
        source: what to call it in messages.

    Raises:
        ConfigError: the text is no Python, is nested too deeply, is too long, or takes too much work.
    """
    reading = _Reading(source)
    values, _ = _read_module(text, source=source, path=None, reading=reading)
    return ModelConfig(values=values, source=source, missing_bases=tuple(dict.fromkeys(reading.missing)))


def read_config_file(path: Path) -> ModelConfig:
    """Read a config file and the bases that lie beside it.

    Raises:
        ConfigError: as `read_config_text`; or a file that is not there, not readable or not UTF-8; or bases in a cycle, or too many.
    """
    reading = _Reading(str(path))
    values, _ = reading.read_file(path)
    return ModelConfig(values=values, source=str(path), missing_bases=tuple(dict.fromkeys(reading.missing)))


@dataclass(slots=True)
class _Reading(Budget):
    """What one read has done so far, over all its files."""

    files: int = 0
    missing: list[str] = field(default_factory=list)
    chain: list[Path] = field(default_factory=list)

    def read_file(self, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """Values and imported names of one file; `chain` is the way from the first file to this one."""
        self.files += 1
        if self.files > _MAX_FILES:
            message = f"{self.source}: expected at most {_MAX_FILES} config files with all bases, found more; the last one is {path}"
            raise ConfigError(message, hint="flatten the config: mmengine's Config.fromfile(path).dump(new_path) writes it as one file")
        try:
            resolved = path.resolve()
            if not resolved.is_file():
                message = f"{path}: expected a config file, found {'something else' if resolved.exists() else 'no such file'}"
                raise ConfigError(message, hint="give the path of the model's .py config")
            with resolved.open("rb") as stream:
                data = stream.read(_MAX_FILE_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:  # the last two: a null byte, a loop of links
            message = f"{path}: expected a readable config file, found: {error}"
            raise ConfigError(message, hint="check the path and its permissions") from error
        if resolved in self.chain:
            way = " -> ".join(str(step) for step in [*self.chain[self.chain.index(resolved) :], resolved])
            message = f"{path}: expected bases that end, found a cycle: {way}"
            raise ConfigError(message, hint="remove one of these `_base_` entries")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"{path}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at offset {error.start}"
            raise ConfigError(message, hint="give the .py config, not the checkpoint; save it as UTF-8") from error
        self.chain.append(resolved)
        result = _read_module(text, source=str(path), path=path.absolute(), reading=self)
        self.chain.pop()
        return result

    def read_base(self, child: Path | None, entry: str, *, label: str) -> tuple[dict[str, Any], dict[str, str]]:
        """As `read_file` for a base of `child`; nothing, after noting `label` as missing, if the file is not there."""
        there = False
        if child is not None and "::" not in entry and entry.endswith(".py"):
            with contextlib.suppress(OSError, ValueError):  # a name too long, or a null byte in it
                there = (child.parent / entry).is_file()
        if child is not None and there:
            return self.read_file(child.parent / entry)
        self.missing.append(label)
        return {}, {}


def _read_module(text: str, *, source: str, path: Path | None, reading: _Reading) -> tuple[dict[str, Any], dict[str, str]]:
    """Evaluate one file's text and merge it into its bases; also returns the names that it imports, which `read_base` hands on."""
    size = len(text.encode("utf-8", "replace"))
    if size > _MAX_FILE_BYTES:
        message = f"{source}: expected a config of at most {_MAX_FILE_BYTES} bytes, found {size} or more"
        raise ConfigError(message, hint="give the model's .py config, not the checkpoint")
    text, templates = replace_templates(text.replace("\r\n", "\n").replace("\r", "\n"), path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a '\d' in somebody's config is not our user's warning
            tree = ast.parse(text)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        line, near = (error.lineno or 1, (error.text or "").strip()[:80]) if isinstance(error, SyntaxError) else (1, "")
        found = f"{error.msg}: {near!r}" if isinstance(error, SyntaxError) else str(error) or "text nested too deeply to parse"
        message = f"{source}, line {line}: expected Python such as `model = dict(...)`, found {found}"
        raise ConfigError(message, hint="give the model's .py config as MMPose or MMDetection loads it") from error
    interpreter = _Interpreter(text=text, source=source, path=path, templates=templates, reading=reading)
    bases = interpreter.read_bases(tree.body)
    interpreter.run(tree.body)
    own = {name: value for name, value in interpreter.scope.items() if not name.startswith("__") and name != BASE}
    for values in (own, bases):  # the bases too: a file can change them through `_base_.x`
        for name, value in values.items():
            try:
                check_size(value, reading, unknown_allowed=True)
            except NotDataError:
                values[name] = Unknown(name, 0, source)
    return merge(own, bases, reading), interpreter.imports


@dataclass(kw_only=True)
class _Interpreter:
    """Runs one file's statements over `scope`."""

    text: str
    source: str
    path: Path | None
    templates: dict[str, str]
    reading: _Reading
    scope: dict[str, Any] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    # Dicts that come from a base, by id: as mmengine's ConfigDict, their update() is recursive, that of a dict written in this file is not.
    inherited: dict[int, dict[Any, Any]] = field(default_factory=dict)
    # Names that are neither data nor what they mean in Python, as after `def max(...)`.
    opaque: set[str] = field(default_factory=set)
    depth: int = 0

    def __post_init__(self) -> None:
        self.lines = [line.encode("utf-8", "replace") for line in self.text.split("\n")]  # ast's columns count bytes

    def read_bases(self, body: list[ast.stmt]) -> dict[str, Any]:
        """Read the files of the first `_base_ = ...`; afterwards the name `_base_` is what they merge to."""
        bases: dict[str, Any] = {}
        self.scope[BASE] = bases
        assignments = (statement for statement in body if isinstance(statement, ast.Assign))
        value = next((a.value for a in assignments if isinstance(a.targets[0], ast.Name) and a.targets[0].id == BASE), None)
        entries = [] if value is None else self.slot(value)
        for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
            label = entry if isinstance(entry, str) else entry.text if isinstance(entry, Unknown) else type(entry).__name__
            values, _ = self.reading.read_base(self.path, entry if isinstance(entry, str) else "", label=label)
            bases.update(merge(values, bases, self.reading))
        self._mark(bases)
        return bases

    def run(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.reading.spend(1)
            if self.depth >= MAX_DEPTH:
                self._forget_all(statement)
                continue
            self.depth += 1
            self._execute(statement)
            self.depth -= 1

    def _execute(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign():
                value = self.slot(statement.value)
                for target in statement.targets:
                    self._assign(target, value)
            case ast.AnnAssign(value=ast.expr() as expression):
                self._assign(statement.target, self.slot(expression))
            case ast.AugAssign():
                self._augment(statement)
            case ast.Expr():
                self.slot(statement.value)  # for what a method call changes
            case ast.Import() | ast.ImportFrom():
                self._import(statement)
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Name(id="read_base")))]):
                for inner in statement.body:
                    if isinstance(inner, ast.ImportFrom):
                        self._import_base(inner)
            case ast.If():
                try:
                    branch = statement.body if self.known(statement.test) else statement.orelse
                except FAILURES:
                    self._forget_all(statement)
                else:
                    self.run(branch)
            case ast.For():
                self._loop(statement)
            case ast.FunctionDef() | ast.ClassDef():
                self._hide(statement.name)
            case ast.AnnAssign() | ast.Pass() | ast.Assert() | ast.Global():
                pass
            case _:
                self._forget_all(statement)

    def _loop(self, statement: ast.For) -> None:
        try:
            items = self.known(statement.iter)
            if any(isinstance(node, (ast.Break, ast.Continue)) for node in ast.walk(statement)):
                raise NotDataError
            items = list(items)  # a copy: the body may change what it iterates over
        except FAILURES:
            self._forget_all(statement)
            return
        self.reading.spend(len(items) + 1)
        for item in items:
            self._assign(statement.target, item)
            self.run(statement.body)
        self.run(statement.orelse)

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            name = alias.asname or (alias.name if isinstance(statement, ast.ImportFrom) else alias.name.partition(".")[0])
            self._hide(name)
            self.imports[name] = alias.name.rpartition(".")[2] if alias.asname else name

    def _import_base(self, statement: ast.ImportFrom) -> None:
        """`from .x import *` inside `with read_base():`; the names come into scope, nothing is merged."""
        module = statement.module or ""
        entry = "../" * (statement.level - 1) + module.replace(".", "/") + (".py" if statement.level else "")  # an absolute one is no file
        values, imports = self.reading.read_base(self.path, entry, label="." * statement.level + module)
        self._mark(values)
        for alias in statement.names:
            names = {name: name for name in [*values, *imports]} if alias.name == "*" else {alias.name: alias.asname or alias.name}
            for name, bound in names.items():
                self._hide(bound)
                if name in imports:
                    self.imports[bound] = imports[name]
                else:
                    self.scope[bound] = values[name] if name in values else self._unknown(statement)

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            if target.id != BASE:  # read before the first statement
                self._hide(target.id)
                self.scope[target.id] = value
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            try:
                owner = self.evaluate(target.value)
                if isinstance(owner, Unknown):
                    return  # and stays unknown
                key = target.attr if isinstance(target, ast.Attribute) else self.known(target.slice)
                if not isinstance(owner, dict if isinstance(target, ast.Attribute) else (dict, list)):
                    raise NotDataError
                owner[as_key(key)] = value
                if id(owner) in self.inherited:
                    self._mark(value)
            except FAILURES:
                self._forget(target.value)
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (tuple, list)) and len(value) == len(target.elts):
            for element, item in zip(target.elts, value, strict=True):
                self._assign(element, item)
        else:
            self._forget_all(target)

    def _augment(self, statement: ast.AugAssign) -> None:
        result: Any = self._unknown(statement)
        try:
            current, value = self.known(statement.target), self.known(statement.value)
            result = operate(statement.op, current, value, self.reading)
            if isinstance(current, list) and isinstance(statement.op, ast.Add):
                current.extend(value)  # += changes the list itself, wherever else it stands
                result = current
        except FAILURES:
            pass
        self._assign(statement.target, result)

    def _is_function(self, name: str) -> bool:
        return name in FUNCTIONS and name not in self.opaque

    def _hide(self, name: str) -> None:
        """Take away what a name meant; data or an import may follow."""
        self.scope.pop(name, None)
        self.imports.pop(name, None)
        self.opaque.add(name)

    def _forget(self, node: ast.expr) -> None:
        """Make the variable below an expression Unknown: something changed it in a way that we cannot follow."""
        place, attribute = node, ""
        while isinstance(place, (ast.Attribute, ast.Subscript)):
            attribute = place.attr if isinstance(place, ast.Attribute) else ""
            place = place.value
        if isinstance(place, ast.Name) and place.id == BASE:
            for name in [attribute] if attribute else list(self.scope[BASE]):
                self.scope[BASE][name] = self._unknown(node)
        elif isinstance(place, ast.Name) and isinstance(place.ctx, ast.Load) and (place.id in self.imports or self._is_function(place.id)):
            pass  # os.system(...), dict.fromkeys(...): no variables
        elif isinstance(place, ast.Name):
            self._hide(place.id)
            self.scope[place.id] = self._unknown(node)

    def _forget_all(self, statement: ast.AST) -> None:
        """Make all variables Unknown that a statement could set or change."""
        for node in ast.walk(statement):
            self.reading.spend(1)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._import(node)
            elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                self._forget(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                self._forget(node.func.value)

    def _mark(self, value: Any) -> None:
        """Note the dicts of a base's value as inherited."""
        pending, seen = [value], set[int]()
        while pending:
            item = pending.pop()
            self.reading.spend(1)
            if not isinstance(item, (dict, list, tuple)) or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, dict):
                self.inherited[id(item)] = item
            pending.extend(item.values() if isinstance(item, dict) else item)

    def _unknown(self, node: ast.expr | ast.stmt) -> Unknown:
        line = self.lines[node.lineno - 1]
        end = node.end_col_offset if node.end_lineno == node.lineno else None
        text = line[node.col_offset : end][:200].decode("utf-8", "ignore")
        for identifier in (match[0] for match in _TEMPLATE.finditer(text)):
            meaning: str = self.templates.get(identifier, identifier)
            text = text.replace(identifier, "{{ " + meaning.removeprefix("=") + " }}")
        return Unknown(text, node.lineno, self.source)

    def slot(self, node: ast.expr) -> Any:
        """The value of an expression that is stored somewhere: data, the name of an imported class, or `Unknown`."""
        if isinstance(node, ast.Name) and node.id in self.imports:
            return self.imports[node.id]
        if isinstance(node, ast.Attribute) and node.attr[0].isupper():  # nn.SiLU is a class; math.pi is a value that we do not know
            place: ast.expr = node
            while isinstance(place, ast.Attribute):
                place = place.value
            if isinstance(place, ast.Name) and place.id in self.imports:
                return node.attr
        try:
            return self.evaluate(node)
        except FAILURES:
            return self._unknown(node)

    def known(self, node: ast.expr) -> Any:
        """The value of an expression that is computed with."""
        value = self.evaluate(node)
        if isinstance(value, Unknown):
            raise NotDataError
        return value

    def evaluate(self, node: ast.expr) -> Any:
        self.reading.spend(1)
        if self.depth >= MAX_DEPTH:
            raise NotDataError
        self.depth += 1
        try:
            return self._evaluate(node)
        finally:
            self.depth -= 1

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return self._fill(node.value) if isinstance(node.value, str) else bounded(node.value, self.reading)
            case ast.Name():
                return self._template(self.templates[node.id]) if node.id in self.templates else self.scope[node.id]
            case ast.List():
                return self._items(node.elts)
            case ast.Tuple():
                return tuple(self._items(node.elts))
            case ast.Set():
                return unique(self._items(node.elts))
            case ast.Dict():
                return self._pairs(zip(node.keys, node.values, strict=True))
            case ast.JoinedStr():
                return bounded("".join(self._format(part) for part in node.values), self.reading)
            case ast.UnaryOp():
                return bounded(OPERATORS[type(node.op)](self.known(node.operand)), self.reading)
            case ast.BinOp():
                return operate(node.op, self.known(node.left), self.known(node.right), self.reading)
            case ast.BoolOp():
                for part in node.values[:-1]:
                    value = self.known(part)
                    if bool(value) is isinstance(node.op, ast.Or):
                        return value
                return self.known(node.values[-1])
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self.evaluate(node.body if self.known(node.test) else node.orelse)
            case ast.Attribute() if isinstance(owner := self.known(node.value), dict):
                return owner[node.attr]
            case ast.Subscript(slice=ast.Slice() as cut):
                lower, upper, step = (None if part is None else self.known(part) for part in (cut.lower, cut.upper, cut.step))
                return bounded(self.known(node.value)[lower:upper:step], self.reading)
            case ast.Subscript():
                return self.known(node.value)[as_key(self.known(node.slice))]
            case ast.Call(func=ast.Name(id=name)) if self._is_function(name):
                return self._call_function(name, node)
            case ast.Call(func=ast.Attribute() as method):
                return self._call_method(method, node)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                items: list[Any] = []
                self._comprehend(node.generators, lambda: items.append(self.slot(node.elt)))
                return unique(items) if isinstance(node, ast.SetComp) else bounded(items, self.reading)
            case ast.DictComp():
                pairs: dict[Any, Any] = {}
                self._comprehend(node.generators, lambda: pairs.update({as_key(self.known(node.key)): self.slot(node.value)}))
                return pairs
        raise NotDataError

    def _template(self, meaning: str) -> Any:
        if meaning.startswith("="):
            return meaning[1:]
        value: Any = self.scope
        for name in meaning.split("."):
            value = value[name]
        return value

    def _fill(self, text: str) -> Any:
        """A string's value: a string that is one template as a whole is that value, of any type."""
        if text in self.templates:
            return self._template(self.templates[text])

        def replace(match: re.Match[str]) -> str:
            value = to_text(self._template(self.templates[match[0]]))
            self.reading.spend(len(value) // 8)
            return value

        return _TEMPLATE.sub(replace, text)

    def _format(self, part: ast.expr) -> str:
        if not isinstance(part, ast.FormattedValue):
            return to_text(self.known(part))
        value, spec = self.known(part.value), "" if part.format_spec is None else self.known(part.format_spec)
        text = to_text(value)
        if not FORMAT_SPEC.fullmatch(spec):
            raise NotDataError
        return format(value if part.conversion < 0 else text if part.conversion == ord("s") else repr(value), spec)

    def _items(self, nodes: list[ast.expr]) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            items.extend(list(bounded(self.known(node.value), self.reading)) if isinstance(node, ast.Starred) else [self.slot(node)])
        return items

    def _pairs(self, nodes: Iterable[tuple[ast.expr | None, ast.expr]]) -> dict[Any, Any]:
        pairs: dict[Any, Any] = {}
        for key, value in nodes:
            if key is not None:
                pairs[as_key(self.known(key))] = self.slot(value)
            elif isinstance(other := bounded(self.known(value), self.reading), dict):
                pairs.update(other)
            else:
                raise NotDataError
        return pairs

    def _compare(self, node: ast.Compare) -> bool:
        left = self.known(node.left)
        for sign, part in zip(node.ops, node.comparators, strict=True):
            right = self.known(part)
            for value in (left, right):
                check_size(value, self.reading)
            if not OPERATORS[type(sign)](left, right):
                return False
            left = right
        return True

    def _comprehend(self, generators: list[ast.comprehension], produce: Callable[[], None]) -> None:
        if len(generators) > 8:
            raise NotDataError
        self.reading.spend(len(self.scope) // 8 + 1)
        outside = dict(self.scope), dict(self.imports), set(self.opaque)

        def loop(index: int) -> None:
            if index == len(generators):
                produce()
                return
            for item in list(bounded(self.known(generators[index].iter), self.reading)):
                self._assign(generators[index].target, item)
                if all(self.known(test) for test in generators[index].ifs):
                    loop(index + 1)

        try:
            loop(0)
        finally:
            self.scope, self.imports, self.opaque = outside

    def _arguments(self, node: ast.Call) -> tuple[list[Any], dict[Any, Any]]:
        arguments = self._items(node.args)
        keywords = self._pairs((ast.Constant(keyword.arg) if keyword.arg else None, keyword.value) for keyword in node.keywords)
        for argument in [*arguments, keywords]:
            check_size(argument, self.reading, unknown_allowed=True)
        return arguments, keywords

    def _call_function(self, name: str, node: ast.Call) -> Any:
        arguments, keywords = self._arguments(node)
        if name == "dict":
            merged: dict[Any, Any] = {}
            for argument in arguments:
                merged.update({as_key(key): value for key, value in (argument.items() if isinstance(argument, dict) else argument)})
            return bounded(merged | keywords, self.reading)
        for argument in [] if name in {"list", "tuple"} else arguments:
            check_size(argument, self.reading)
        return bounded(FUNCTIONS[name](*arguments, **keywords), self.reading)

    def _call_method(self, method: ast.Attribute, node: ast.Call) -> Any:
        try:
            owner = self.evaluate(method.value)
        except FAILURES:
            self._forget(method.value)
            raise
        if not isinstance(owner, (dict, list)):  # what cannot be changed, or is unknown anyway
            if isinstance(owner, str) and method.attr in TEXT_METHODS:
                arguments, _ = self._arguments(node)
                return bounded(TEXT_METHODS[method.attr](owner, *arguments), self.reading)
            raise NotDataError
        self.reading.spend(len(owner) // 64)  # inserting moves all items behind
        name = (type(owner), method.attr)
        try:
            arguments, keywords = self._arguments(node)
            if method.attr in {"update", "merge"} and isinstance(owner, dict) and len(arguments) <= 1:
                return self._update(owner, {**(arguments[0] if arguments else {}), **keywords}, method.attr)
            if method.attr in {"get", "pop", "setdefault"}:
                arguments[:1] = [as_key(key) for key in arguments[:1]]
            if method.attr == "extend" and len(owner) + len(arguments[0]) > MAX_ITEMS:
                raise NotDataError
            return METHODS[name](owner, *arguments, **keywords)
        except FAILURES:
            if name not in METHODS or method.attr not in READING_METHODS:
                self._forget(method.value)
            raise

    def _update(self, owner: dict[Any, Any], other: dict[Any, Any], method: str) -> None:
        inherited = id(owner) in self.inherited
        if method == "merge":
            check_size(owner, self.reading, unknown_allowed=True)
            merged = merge(other, owner, self.reading)
            owner.clear()
            owner.update(merged)
        for key, value in other.items() if method == "update" else ():
            self.reading.spend(1)
            current = owner.get(key)
            if inherited and isinstance(value, dict) and isinstance(current, dict):
                self._update(current, value, method)
            elif not (inherited and isinstance(value, dict) and isinstance(current, Unknown)):  # a change to an unknown stays unknown
                owner[key] = value
        if inherited:
            self._mark(owner)
