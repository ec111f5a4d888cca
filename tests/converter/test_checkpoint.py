"""A checkpoint is read as data: equal to `torch.load` where that is safe, and nothing in it ever runs, hangs or fills the memory."""

from __future__ import annotations

import copyreg
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from modelcrate_bundle.errors import CheckpointError
from modelcrate_converter.checkpoint import Checkpoint, read_checkpoint

REAL = Path(__file__).parents[3] / "shared" / "fixtures" / "checkpoints"
WEIGHT = torch.arange(6.0).reshape(2, 3)
FORMATS = ("zip", "legacy")


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def assert_same_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        wanted = value.detach().float() if value.is_floating_point() else value
        assert found[key].dtype == wanted.dtype, key
        assert found[key].shape == wanted.shape, key
        assert torch.equal(found[key], wanted), key


# ------------------------------------------------------------------------------------------------- the jail: time and memory


class Outcome(NamedTuple):
    result: str
    message: str
    grew_mib: float

    @property
    def harmless(self) -> bool:
        """Read or refused within 200 MiB and the jail's four CPU seconds."""
        return self.result in {"Checkpoint", "CheckpointError"} and self.grew_mib < 200


JAIL = """
import json, os, pickle, resource, signal, sys, warnings
from pathlib import Path
import torch
from modelcrate_bundle.errors import CheckpointError
from modelcrate_converter.checkpoint import read_checkpoint
torch.set_num_threads(1)
def mib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
def answer(how, path):
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 4, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = mib("VmRSS")
    try:
        pickle.loads(Path(path).read_bytes()) if how == "pickle" else read_checkpoint(Path(path))
        result, message = "Checkpoint", ""
    except CheckpointError as error:
        result, message = "CheckpointError", str(error)
    except BaseException as error:
        result, message = type(error).__name__, str(error)
    return [result, message[:500], mib("VmHWM") - start]
def work(requests, answers):
    limit = int((mib("VmSize") + 512) * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("error")
    sys.stdout = sys.stderr
    for line in requests:
        print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)
worker = None
for line in sys.stdin:
    if worker is None:
        (readable, to_worker), (from_worker, writable) = os.pipe(), os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(to_worker), os.close(from_worker)
            work(os.fdopen(readable), os.fdopen(writable, "w"))
            os._exit(0)
        os.close(readable), os.close(writable)
        requests, answers = os.fdopen(to_worker, "w"), os.fdopen(from_worker)
    print(line, end="", file=requests, flush=True)
    reply = answers.readline()
    if not reply:
        reply = json.dumps(["killed", "signal %d" % os.WTERMSIG(os.waitpid(worker, 0)[1]), 0])
        worker = None
    print(reply.strip(), flush=True)
"""


@pytest.fixture(scope="module")
def jail() -> Iterator[Callable[..., Outcome]]:
    """Read a file in a process of its own with 512 MiB and four CPU seconds to spare; `how="pickle"` unpickles it for real instead."""
    if sys.platform != "linux":
        pytest.skip("limits of memory and time are taken from Linux")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", JAIL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(path: Path, how: str = "read") -> Outcome:
            stdin.write(json.dumps([how, str(path)]) + "\n")
            stdin.flush()
            return Outcome(*json.loads(stdout.readline()))

        yield ask
        stdin.close()


# ------------------------------------------------------------------------------------------- pickles by hand, one value at a time


def plain(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def persistent(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"tQ"


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return persistent(plain("storage"), named("torch", kind), plain(key), plain("cpu"), plain(numel))


def tensor(source: bytes | None = None, *, offset: object = 0, size: object = (2, 3), stride: object = (3, 1)) -> bytes:
    hooks = call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), source or storage(), plain(offset), plain(size), plain(stride), plain(False), hooks)


def array(shape: tuple[int, ...], data: bytes, kind: str = "u1") -> bytes:
    dtype = call(named("numpy", "dtype"), plain(kind), plain(False), plain(True)) + plain((3, "|", None, None, None, -1, -1, 0)) + b"b"
    empty = call(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), plain((0,)), plain("b"))
    return empty + b"(" + plain(1) + plain(shape) + dtype + plain(False) + data + b"tb"


def bytes_value(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def program(value: bytes) -> bytes:
    return b"\x80\x04" + value + b"."


def with_meta(value: bytes) -> bytes:
    return program(mapping(state_dict=mapping(w=tensor()), meta=mapping(x=value)))


CLEAN = program(mapping(w=tensor()))
DATA = WEIGHT.numpy().tobytes()


def zip_file(path: Path, pickled: bytes, *, data: bytes = DATA, order: bytes = b"little", more: Mapping[str, bytes] | None = None, compress: str = "") -> Path:
    entries = {"a/data.pkl": pickled, "a/byteorder": order, "a/data/0": data, "a/version": b"3\n"} | dict(more or {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == compress else zipfile.ZIP_STORED)
    whole = bytearray(path.read_bytes())
    whole[6:8] = b"\x08\x08"  # the flags that torch's own writer sets in the first header
    return written(path, bytes(whole))


def legacy_file(path: Path, pickled: bytes, *, data: bytes = DATA, numel: int | None = None, keys: object = ("0",)) -> Path:
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}))
    tail = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2)
    return written(path, head + pickled + tail + struct.pack("<q", len(data) // 4 if numel is None else numel) + data)


def file_of(form: str, path: Path, pickled: bytes) -> Path:
    return zip_file(path, pickled) if form == "zip" else legacy_file(path, pickled)


@pytest.mark.parametrize("form", FORMATS)
def test_handmade_file_reads_like_a_real_one(form: str, tmp_path: Path) -> None:
    """What keeps the hostile files below honest: without the hostile part they are fine."""
    read = read_checkpoint(file_of(form, tmp_path / "a.pth", with_meta(plain([1, 2]) if form == "zip" else array((2,), bytes_value(b"\1\2")))))
    assert_same_weights(read.state_dict, {"w": WEIGHT})
    assert read.meta == {"x": [1, 2]}
    assert read.skipped == ()


# ---------------------------------------------------------------------------------------------------------- what is read, and how


def tricky_weights() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    weights: dict[str, torch.Tensor] = OrderedDict()
    weights["conv.weight"] = base
    weights["conv.transposed"] = base.t()
    weights["conv.sliced"] = base[1:3, ::2]
    weights["conv.last"] = base[3, 5]
    weights["conv.parameter"] = torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    weights["bn.num_batches_tracked"] = torch.tensor(2**40)
    weights["half.weight"] = torch.tensor([1.5, -2.0], dtype=torch.float16)
    weights["brain.weight"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    weights["double.weight"] = torch.tensor([0.1, 1e-9], dtype=torch.float64)
    weights["scalar"] = torch.tensor(3.5)
    weights["empty"] = torch.empty(0, 4)
    for kind in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        weights[f"kind.{kind}"] = torch.tensor([0, 1, 1]).to(kind)
    return weights


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("nested", [False, True], ids=["bare", "nested"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_load_reads(form: str, nested: bool, protocol: int, tmp_path: Path) -> None:
    content = {"state_dict": tricky_weights(), "meta": {"epoch": 3}} if nested else tricky_weights()
    path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=form == "zip", pickle_protocol=protocol)
    read = read_checkpoint(path)
    loaded = torch.load(path, weights_only=False)
    assert_same_weights(read.state_dict, loaded["state_dict"] if nested else loaded)
    assert read.state_key == ("state_dict" if nested else "")
    assert read.meta == ({"epoch": 3} if nested else {})
    assert read.skipped == ()
    assert read.path == path
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.shapes == {key: tuple(value.shape) for key, value in read.state_dict.items()}


def test_state_dict_of_a_module_goes_back_into_the_module(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.PReLU())
    read = read_checkpoint(saved(tmp_path / "a.pth", network.state_dict()))
    assert_same_weights(read.state_dict, network.state_dict())
    network.load_state_dict(read.state_dict)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefix_of_a_wrapper_is_stripped(prefix: str, form: str, tmp_path: Path) -> None:
    weights = {"conv.weight": WEIGHT, "conv.module.bias": WEIGHT[0]}
    path = saved(tmp_path / "a.pth", {prefix + key: value for key, value in weights.items()}, _use_new_zipfile_serialization=form == "zip")
    assert_same_weights(read_checkpoint(path).state_dict, weights)


def test_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    weights = {"module.weight": WEIGHT, "head.weight": WEIGHT + 1}
    assert_same_weights(read_checkpoint(saved(tmp_path / "a.pth", weights)).state_dict, weights)


def test_no_weight_is_lost_when_prefixed_and_plain_names_meet(tmp_path: Path) -> None:
    read = read_checkpoint(saved(tmp_path / "a.pth", {"module.weight": WEIGHT, "weight": WEIGHT + 1}))
    assert len(read.state_dict) == 2


@pytest.mark.parametrize("form", FORMATS)
def test_averaged_weights_win_over_raw_ones(form: str, tmp_path: Path) -> None:
    """MMEngine's EMAHook swaps on save: `state_dict` has the average, `ema_state_dict` the raw weights under `module.`."""
    raw = {"module.conv.weight": WEIGHT + 9, "steps": torch.tensor(7)}
    content = {"ema_state_dict": raw, "state_dict": {"conv.weight": WEIGHT}, "meta": {}}
    read = read_checkpoint(saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=form == "zip"))
    assert_same_weights(read.state_dict, {"conv.weight": WEIGHT})
    assert read.state_key == "state_dict"


def test_weights_under_model_are_found(tmp_path: Path) -> None:
    read = read_checkpoint(saved(tmp_path / "a.pth", {"model": {"a.weight": WEIGHT}, "epoch": 3}))
    assert_same_weights(read.state_dict, {"a.weight": WEIGHT})
    assert read.state_key == "model"


@pytest.mark.parametrize("attributed", [WEIGHT.clone(), torch.nn.Parameter(WEIGHT.clone())], ids=["tensor", "parameter"])
def test_tensor_with_attributes_is_still_a_weight(attributed: torch.Tensor, tmp_path: Path) -> None:
    attributed.note = "mine"  # type: ignore[attr-defined]  # the point: it pickles differently then
    read = read_checkpoint(saved(tmp_path / "a.pth", {"a": attributed, "b": WEIGHT}))
    assert_same_weights(read.state_dict, {"a": attributed, "b": WEIGHT})


META: dict[str, tuple[object, object]] = {
    "text": ("cfg = 1", "cfg = 1"),
    "tuple": ((1, (2.5, "x")), [1, [2.5, "x"]]),
    "nested dict": (
        {"classes": ("person",), "palette": [(220, 20, 60)], "id2name": {0: "nose"}},
        {"classes": ["person"], "palette": [[220, 20, 60]], "id2name": {0: "nose"}},
    ),
    "numpy int": (np.int64(7), 7),
    "numpy float": (np.float32(0.5), 0.5),
    "numpy bool": (np.bool_(True), True),
    "array": (np.arange(6).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
    "float array": (np.array([0.25, -1.0], dtype=np.float16), [0.25, -1.0]),
    "bool array": (np.array([True, False]), [True, False]),
    "big-endian array": (np.arange(3, dtype=">i4"), [0, 1, 2]),
    "fortran array": (np.asfortranarray(np.arange(6).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
    "0-d array": (np.array(3.5), 3.5),
    "empty array": (np.zeros(0, dtype=np.float32), []),
    "ordered": (OrderedDict(a=1), {"a": 1}),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", META)
def test_meta_comes_out_plain(name: str, form: str, tmp_path: Path) -> None:
    value, expected = META[name]
    content = {"state_dict": {"w": WEIGHT}, "meta": {"dataset_meta": {"x": value}}}
    read = read_checkpoint(saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=form == "zip"))
    assert read.meta == {"dataset_meta": {"x": expected}}
    assert type(read.meta["dataset_meta"]["x"]) is type(expected)
    assert json.dumps(read.meta)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_array_in_meta_is_read_from_every_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    content = {"state_dict": {"w": WEIGHT}, "meta": {"x": np.arange(6).reshape(2, 3)}}
    assert read_checkpoint(saved(tmp_path / "a.pth", content, pickle_protocol=protocol)).meta == {"x": [[0, 1, 2], [3, 4, 5]]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_safetensors_is_recognised_by_name_or_content(suffix: str, tmp_path: Path) -> None:
    weights = {"module.a.weight": WEIGHT, "module.a.half": WEIGHT.half(), "module.a.count": torch.tensor(5), "module.a.empty": torch.empty(0, 2)}
    read = read_checkpoint(written(tmp_path / f"a{suffix}", to_safetensors(weights, metadata={"format": "pt", "classes": "person"})))
    assert_same_weights(dict(sorted(read.state_dict.items())), {key.removeprefix("module."): weights[key] for key in sorted(weights)})
    assert read.meta == {"format": "pt", "classes": "person"}
    assert read.skipped == ()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("holds", ["numbers", "a tensor"])
def test_class_of_a_training_run_is_skipped_by_name_and_not_imported(holds: str, form: str, tmp_path: Path) -> None:
    module = types.ModuleType("training_run_classes")
    kind = type("Buffer", (), {"__module__": module.__name__, "__qualname__": "Buffer"})
    module.Buffer = kind  # type: ignore[attr-defined]
    buffer = kind()
    buffer.history = torch.ones(3) if holds == "a tensor" else [0.5, 0.25]
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(WEIGHT).sum().backward()
    optimizer.step()
    content = {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "hooks": {"loss": [buffer]},
        "schedule": {"optimizer": buffer},
        "meta": {"epoch": 1, "buffer": buffer},
    }
    sys.modules[module.__name__] = module
    try:
        path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=form == "zip")
    finally:
        del sys.modules[module.__name__]
    read = read_checkpoint(path)
    assert_same_weights(read.state_dict, network.state_dict())
    assert read.skipped == ("training_run_classes.Buffer",)
    assert read.meta == {"epoch": 1}
    assert module.__name__ not in sys.modules


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real checkpoints of {REAL}")
@pytest.mark.parametrize("name", ["rtmdet_nano_person.pth", "rtmpose_t_random.pth"])
def test_real_checkpoint_equals_torch_load(name: str) -> None:
    read = read_checkpoint(REAL / name)
    assert_same_weights(read.state_dict, torch.load(REAL / name, weights_only=False)["state_dict"])
    assert read.meta["dataset_meta"]
    assert read.skipped == ()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real checkpoints of {REAL}")
def test_real_training_file_reads_without_mmengine() -> None:
    before = set(sys.modules)
    read = read_checkpoint(REAL / "rtmdet_nano_person_train.pth")
    assert read.shapes == read_checkpoint(REAL / "rtmdet_nano_person.pth").shapes
    assert read.state_key == "state_dict"
    assert "mmengine.logging.history_buffer.HistoryBuffer" in read.skipped
    assert not {name for name in set(sys.modules) - before if name.startswith("mmengine")}


# ------------------------------------------------------------------------------------------------------- pickles that want to run


class Payload(NamedTuple):
    value: bytes
    name: str
    live: bool = True  # plain pickle.loads of it creates the canary


def payloads(canary: Path) -> dict[str, Payload]:
    """Ways to create the canary. The neighbours of the canary (`evil.py`, `evil.pth`, `hubconf.py`) come from the fixture."""
    touch, code = plain(f"touch {canary}"), plain(f"open({str(canary)!r}, 'w').close()")
    argv = plain(["touch", str(canary)])
    system, evaluate, partial = named("os", "system"), named("builtins", "eval"), named("functools", "partial")
    os_module = call(named("importlib", "import_module"), plain("os"))
    unsafe = b"\x92"  # NEWOBJ_EX: class, arguments, keywords
    load = partial + b"(" + named("torch", "load") + b"t" + plain({"weights_only": False}) + unsafe
    hub = partial + b"(" + named("torch.hub", "load") + b"t" + plain({"source": "local"}) + unsafe
    inner = plain(pickle.dumps(1, 2)[:2] + call(system, touch) + b".")
    return {
        "os.system": Payload(call(system, touch), "os.system"),
        "posix.system": Payload(call(named("posix", "system"), touch), "posix.system"),
        "subprocess.Popen": Payload(call(named("subprocess", "Popen"), argv), "subprocess.Popen"),
        "subprocess.check_call": Payload(call(named("subprocess", "check_call"), argv), "subprocess.check_call"),
        "eval": Payload(call(evaluate, code), "builtins.eval"),
        "exec": Payload(call(named("builtins", "exec"), code), "builtins.exec"),
        "python 2 eval": Payload(call(named("__builtin__", "eval"), code), "__builtin__.eval", live=False),
        "getattr": Payload(call(call(named("builtins", "getattr"), os_module, plain("system")), touch), "builtins.getattr"),
        "__import__": Payload(
            call(call(named("builtins", "getattr"), call(named("builtins", "__import__"), plain("os")), plain("system")), touch), "builtins.__import__"
        ),
        "attrgetter": Payload(call(call(call(named("operator", "attrgetter"), plain("system")), os_module), touch), "operator.attrgetter"),
        "partial": Payload(call(call(partial, system, touch)), "functools.partial"),
        "nested": Payload(call(evaluate, call(named("builtins", "str"), call(named("builtins", "str"), code))), "builtins.eval"),
        "torch.load": Payload(call(load, plain(str(canary.with_name("evil.pth")))), "torch.load"),
        "torch.hub.load": Payload(call(hub, plain(str(canary.parent)), plain("anything")), "torch.hub.load"),
        "runpy": Payload(call(named("runpy", "run_path"), plain(str(canary.with_name("evil.py")))), "runpy.run_path"),
        "pickle.loads": Payload(call(named("pickle", "loads"), inner), "pickle.loads"),
        "dotted name": Payload(call(named("posixpath", "os.system"), touch), "posixpath.os.system"),
        "INST": Payload(b"(" + touch + b"ios\nsystem\n", "os.system"),
        "OBJ": Payload(b"(" + system + touch + b"o", "os.system"),
        "STACK_GLOBAL": Payload(call(plain("os") + plain("system") + b"\x93", touch), "os.system"),
        "NEWOBJ": Payload(named("subprocess", "Popen") + b"(" + argv + b"t\x81", "subprocess.Popen", live=False),
        "NEWOBJ_EX": Payload(named("subprocess", "Popen") + b"(t" + mapping(args=argv) + unsafe, "subprocess.Popen", live=False),
        "through the subclass rebuilder": Payload(
            call(named("torch._tensor", "_rebuild_from_type_v2"), system, named("builtins", "int"), b"(" + touch + b"t", plain(None)), "os.system"
        ),
        "through numpy": Payload(
            call(named("numpy.core.multiarray", "_reconstruct"), named("subprocess", "Popen"), argv, plain("b")), "subprocess.Popen", live=False
        ),
        "through a codec": Payload(call(call(named("_codecs", "lookup"), plain("rot13"))), "_codecs.lookup", live=False),
        "build state is a call": Payload(call(named("collections", "OrderedDict")) + call(system, touch) + b"b", "os.system", live=False),
        "build on what is skipped": Payload(
            call(named("argparse", "Namespace")) + mapping(__class__=system, __call__=system) + b"b", "argparse.Namespace", live=False
        ),
    }


PLACES: dict[str, Callable[[bytes], bytes]] = {
    "alone": program,
    "beside a weight": lambda value: program(mapping(x=value, w=tensor())),
    "as a key": lambda value: program(b"}(" + value + tensor() + plain("w") + tensor() + b"u"),
    "in meta": with_meta,
    "in optimizer": lambda value: program(mapping(optimizer=b"](" + value + b"e", state_dict=mapping(w=tensor()))),
    "as a persistent id": lambda value: program(mapping(x=value + b"Q", w=tensor())),
    "in a persistent id": lambda value: program(mapping(x=persistent(plain("storage"), value, plain("0"), plain("cpu"), plain(6)), w=tensor())),
    "as a storage": lambda value: program(mapping(x=tensor(value), w=tensor())),
    "as tensor hooks": lambda value: program(mapping(w=tensor()[:-2] + value + b"tR")),
    "as a second pickle": lambda value: CLEAN + program(value),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A path that must not exist afterwards, with files beside it that create it when they are run or unpickled."""
    path = tmp_path / "canary"
    script = f"open({str(path)!r}, 'w').close()\ndef anything():\n    return 1\n"
    (tmp_path / "evil.py").write_text(script)
    (tmp_path / "hubconf.py").write_text(script)
    torch.save(Reduced(os.system, f"touch {path}"), tmp_path / "evil.pth")
    return path


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def read_or_refused(path: Path) -> Checkpoint | None:
    """Read, or a CheckpointError; anything else escapes. Nothing is imported for the file."""
    before = set(sys.modules)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None
    finally:
        assert set(sys.modules) - before <= {"gzip", "bz2", "_bz2", "lzma", "_lzma", "_compression", "encodings.cp437"}  # tarfile's and zipfile's own


@pytest.mark.parametrize("name", [name for name, payload in payloads(Path("x")).items() if payload.live])
def test_payload_is_live_for_an_ordinary_unpickler(name: str, tmp_path: Path, canary: Path, jail: Callable[..., Outcome]) -> None:
    """The control: if these did nothing anyway, the tests below would prove nothing."""
    jail(written(tmp_path / "a.pkl", program(payloads(canary)[name].value)), "pickle")
    for _ in range(500):  # Popen does not wait
        if canary.exists():
            break
        time.sleep(0.01)
    assert canary.exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_hostile_pickle_does_not_run(place: str, form: str, tmp_path: Path, canary: Path) -> None:
    for name, payload in payloads(canary).items():
        read = read_or_refused(file_of(form, tmp_path / "a.pth", PLACES[place](payload.value)))
        assert not canary.exists(), name
        if read is not None:
            assert torch.equal(read.state_dict["w"], WEIGHT), name
            assert payload.name in read.skipped or place == "as a second pickle", name
        if place in {"in meta", "in optimizer", "beside a weight"}:
            assert read is not None, f"{name}: a class that is not known is skipped, the weights are read"


@pytest.mark.parametrize(
    "function", [os.system, subprocess.call, eval, exec, __import__, torch.load, torch.hub.load, getattr, open], ids=lambda function: function.__qualname__
)
@pytest.mark.parametrize("form", FORMATS)
def test_reduce_of_an_ordinary_object_does_not_run(function: Callable[..., object], form: str, tmp_path: Path, canary: Path) -> None:
    evil = Reduced(function, str(canary), "w")
    for content in ({"state_dict": {"w": WEIGHT, "x": evil}, "meta": {"x": evil}, "optimizer": [evil]}, {"w": WEIGHT, "x": Reduced(list, [evil])}):
        read = read_checkpoint(saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=form == "zip"))
        assert_same_weights(read.state_dict, {"w": WEIGHT})
        assert any(name.endswith(f".{function.__name__}") for name in read.skipped)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("name", ["os.system", "eval", "through the subclass rebuilder"])
def test_every_pickle_of_the_legacy_stream_is_guarded(name: str, position: int, tmp_path: Path, canary: Path) -> None:
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2), CLEAN, pickle.dumps(["0"], 2)]
    parts[position] = program(payloads(canary)[name].value)
    read_or_refused(written(tmp_path / "a.pth", b"".join(parts) + struct.pack("<q", 6) + DATA))
    assert not canary.exists()


@pytest.mark.parametrize("cached", [False, True], ids=["registered", "cached"])
@pytest.mark.parametrize("form", FORMATS)
def test_extension_registry_is_no_way_around(form: str, cached: bool, tmp_path: Path, canary: Path) -> None:
    """EXT1 takes names from copyreg; what the process unpickled before comes from a cache that find_class never sees."""
    copyreg.add_extension("os", "system", 0xF0)
    try:
        if cached:
            assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system  # noqa: S301  # our own five bytes
        read_or_refused(file_of(form, tmp_path / "a.pth", with_meta(call(b"\x82\xf0", plain(f"touch {canary}")))))
        assert not canary.exists()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_unknown_extension_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(zip_file(tmp_path / "a.pth", with_meta(b"\x82\xf1")))


STANDINS: dict[str, bytes] = {
    "OrderedDict": named("collections", "OrderedDict"),
    "an OrderedDict": call(named("collections", "OrderedDict")),
    "tensor rebuilder": named("torch._utils", "_rebuild_tensor_v2"),
    "parameter rebuilder": named("torch._utils", "_rebuild_parameter"),
    "subclass rebuilder": named("torch._tensor", "_rebuild_from_type_v2"),
    "torch.Size": named("torch", "Size"),
    "encode": named("_codecs", "encode"),
    "numpy.dtype": named("numpy", "dtype"),
    "a dtype": call(named("numpy", "dtype"), plain("f4")),
    "numpy.ndarray": named("numpy", "ndarray"),
    "array rebuilder": named("numpy.core.multiarray", "_reconstruct"),
    "an array": call(named("numpy.core.multiarray", "_reconstruct")),
    "scalar rebuilder": named("numpy._core.multiarray", "scalar"),
    "torch.FloatStorage": named("torch", "FloatStorage"),
    "a storage": storage(),
    "a tensor": tensor(),
    "a skipped class": named("nowhere", "Thing"),
    "a skipped object": call(named("nowhere", "Thing")),
    "a list": plain([]),
    "a dict": plain({}),
    "a number": plain(1),
}
STATES: dict[str, bytes] = {
    "tensor fields": plain({"offset": -1, "size": (2**40,), "stride": (0,), "storage": 7}),
    "storage fields": plain({"key": "../../etc/passwd", "numel": 2**40, "dtype": 7}),
    "array state": plain((1, (2**40,), "f4", False, b"")),
    "number": plain(3),
    **{
        f"sets {attribute}": mapping(**{attribute: named("os", "system")})
        for attribute in ("__setattr__", "__class__", "__dict__", "__code__", "_function", "value")
    },
}


@pytest.mark.parametrize("name", STANDINS)
def test_build_changes_no_stand_in(name: str, tmp_path: Path, canary: Path) -> None:
    touch = plain(f"touch {canary}")
    for state in STATES.values():
        for described in (state, b"(" + plain(None) + state + b"t", b"(" + state + state + b"t"):  # a dict, slots, both
            changed = STANDINS[name] + described + b"b"
            for attack in (changed, b"](" + changed + call(changed, touch) + b"e"):
                read = read_or_refused(zip_file(tmp_path / "a.pth", program(mapping(x=attack, w=tensor()))))
                assert not canary.exists()
                assert read is None or all(torch.equal(value, WEIGHT) for value in read.state_dict.values())
    assert_same_weights(read_checkpoint(zip_file(tmp_path / "b.pth", CLEAN)).state_dict, {"w": WEIGHT})


PERSISTENT: dict[str, bytes] = {
    "text": b"Panything\n",
    "number": plain(5) + b"Q",
    "list": plain(["storage", 1, "0", "cpu", 6]) + b"Q",
    "short": persistent(plain("storage"), named("torch", "FloatStorage")),
    "other word": persistent(plain("module"), named("torch", "FloatStorage"), plain("0"), plain("cpu"), plain(6)),
    "type as text": persistent(plain("storage"), plain("FloatStorage"), plain("0"), plain("cpu"), plain(6)),
    "type is a function": persistent(plain("storage"), named("os", "system"), plain("0"), plain("cpu"), plain(6)),
    "key is a number": persistent(plain("storage"), named("torch", "FloatStorage"), plain(0), plain("cpu"), plain(6)),
    "key climbs": storage(key="../data.pkl"),
    "negative size": storage(numel=-6),
    "huge size": storage(numel=2**62),
    "size is text": persistent(plain("storage"), named("torch", "FloatStorage"), plain("0"), plain("cpu"), plain("6")),
    "size is true": persistent(plain("storage"), named("torch", "FloatStorage"), plain("0"), plain("cpu"), plain(True)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", PERSISTENT)
def test_persistent_id_that_is_no_storage_makes_no_tensor(name: str, form: str, tmp_path: Path) -> None:
    read = read_or_refused(file_of(form, tmp_path / "a.pth", program(mapping(x=tensor(PERSISTENT[name]), w=tensor()))))
    assert read is None or list(read.state_dict) == ["w"]


# ------------------------------------------------------------------------------------------------------------ damaged and foreign


def small_file(form: str, path: Path) -> bytes:
    content = {"state_dict": {"a.weight": WEIGHT, "a.count": torch.tensor(3)}, "meta": {"x": np.arange(3), "y": np.float32(1)}}
    if form == "safetensors":
        return to_safetensors({"a.weight": WEIGHT, "a.half": WEIGHT.half()}, metadata={"x": "y"})
    return saved(path, content, _use_new_zipfile_serialization=form == "zip").read_bytes()


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_file_truncated_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    whole = small_file(form, tmp_path / "a.pth")
    for length in range(0, len(whole), 1 + len(whole) // 700):
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            read_checkpoint(written(tmp_path / "a.pth", whole[:length]))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_checkpoint_or_an_error(form: str, changes: list[tuple[int, int]], scratch: Path, jail: Callable[..., Outcome]) -> None:
    whole = bytearray(small_file(form, scratch / "whole.pth"))
    for position, change in changes:
        whole[position % len(whole)] ^= change
    outcome = jail(written(scratch / "changed.pth", bytes(whole)))
    assert outcome.harmless, outcome


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    position=st.integers(0, 10**6),
    operation=st.sampled_from(
        b"(.0125FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x85\x86\x87\x88\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98"
    ),
)
def test_changed_operation_gives_a_checkpoint_or_an_error(form: str, position: int, operation: int, scratch: Path, jail: Callable[..., Outcome]) -> None:
    pickled = bytearray(with_meta(array((2,), bytes_value(b"\1\2"))))
    pickled[position % len(pickled)] = operation
    outcome = jail(file_of(form, scratch / "changed.pth", bytes(pickled)))
    assert outcome.harmless, outcome


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
def test_fine_file_passes_the_jail(form: str, scratch: Path, jail: Callable[..., Outcome]) -> None:
    outcome = jail(written(scratch / "fine.pth", small_file(form, scratch / "fine.pth")))
    assert outcome.result == "Checkpoint"
    assert outcome.harmless


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("storages")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"abcd"))
    return stream.getvalue()


FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x80",
    "one zero": b"\0",
    "eight zeros": b"\0" * 8,
    "zeros": b"\0" * 4096,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "html": b"<!DOCTYPE html><html>404</html>",
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + b"\xff" * 200,
    "tar": tar_bytes(),
    "gzipped tar": gzip.compress(tar_bytes(), mtime=2**30 + 1),
    "broken gzip": b"\x1f\x8b\x08\x00\x01\x02\x03\x04\x00\x03" + b"\xff" * 600,
    "empty zip": b"PK\x05\x06" + b"\0" * 18,
    "header of a zip": b"PK\x03\x04\x14\x00\x08\x08" + b"\0" * 100,
    "plain pickle": pickle.dumps({"a": 1}),
    "only the magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
    "bad escape": b"S'\\q'\n." + b"x" * 20,
    "onnx": b"\x08\x08\x12\x07pytorch\x1a\x05" + b"x" * 50,
    **{f"noise {seed}": random.Random(seed).randbytes(997) for seed in range(20)},  # noqa: S311
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_file_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"a{suffix}", FOREIGN[name])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("name", "message"), [("", "folder"), ("missing.pth", "No such file"), ("x" * 300, "too long"), ("a.pth/b.pth", "Not a directory")])
def test_path_that_is_no_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("entry", ["a/code/__torch__.py", "a/constants.pkl"])
def test_torchscript_is_named(entry: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(zip_file(tmp_path / "a.pt", CLEAN, more={entry: b"x"}))


def test_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tar archive"):
        read_checkpoint(written(tmp_path / "a.pth", tar_bytes()))


@pytest.mark.parametrize("entry", ["a/data.pkl", "a/data/0", "a/byteorder"])
def test_compressed_entry_is_refused(entry: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(zip_file(tmp_path / "a.pth", CLEAN, compress=entry))


@pytest.mark.parametrize("entry", ["a/data.pkl", "a/data/0", "a/version", "b/data.pkl"])
def test_doubled_entry_is_refused(entry: str, tmp_path: Path) -> None:
    other = "X" * (len(entry) - 5) + entry[-5:]
    path = zip_file(tmp_path / "a.pth", CLEAN, more={other: b"x"})
    written(path, path.read_bytes().replace(other.encode(), entry.encode()))
    with pytest.raises(CheckpointError, match="doubles|found 2"):
        read_checkpoint(path)


def test_zip_without_a_pickle_is_refused(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "a.pth", CLEAN)
    with pytest.raises(CheckpointError, match=r"one data\.pkl"):
        read_checkpoint(written(path, path.read_bytes().replace(b"a/data.pkl", b"a/date.pkl")))


def test_big_endian_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="big"):
        read_checkpoint(zip_file(tmp_path / "a.pth", CLEAN, order=b"big"))


def test_zip_that_another_tool_packed_reads(tmp_path: Path) -> None:
    """Stored entries and no flag bits, so the first eight bytes end in zeros as those of a safetensors file do."""
    path = saved(tmp_path / "a.pth", {"w": WEIGHT})
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "b.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert_same_weights(read_checkpoint(tmp_path / "b.pth").state_dict, torch.load(tmp_path / "b.pth", weights_only=False))


BAD_TENSORS: dict[str, dict[str, object]] = {
    "beyond its storage": {"size": (3, 3)},
    "offset beyond": {"offset": 1},
    "huge offset": {"offset": 2**80},
    "negative offset": {"offset": -1},
    "huge stride": {"stride": (2**62, 1)},
    "stride beyond 64 bit": {"stride": (2**80, 1)},
    "negative stride": {"stride": (-3, 1)},
    "negative size": {"size": (-2, 3)},
    "huge size": {"size": (2**62, 2**62)},
    "more sizes than strides": {"size": (2, 3, 1)},
    "size is a list": {"size": [2, 3]},
    "size is a float": {"size": (2.0, 3)},
    "size is true": {"size": (True, 3)},
    "size is none": {"size": None},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_impossible_tensor_is_refused(name: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(file_of(form, tmp_path / "a.pth", program(mapping(x=tensor(**BAD_TENSORS[name]), w=tensor()))))  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:4], b"", DATA + b"\0"], ids=["one short", "short", "none", "long"])
def test_storage_of_another_length_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="storage 0: expected 24 bytes"):
        read_checkpoint(zip_file(tmp_path / "a.pth", CLEAN, data=data))
    with pytest.raises(CheckpointError):
        read_checkpoint(legacy_file(tmp_path / "a.pth", CLEAN, data=data, numel=6 if len(data) < len(DATA) else 7))


@pytest.mark.parametrize("keys", [(), ("1",), (["0"],), ("0", "1"), "0", {"0": 1}, None], ids=repr)
def test_legacy_keys_that_do_not_fit_are_refused(keys: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(legacy_file(tmp_path / "a.pth", CLEAN, keys=keys))


def nested(twice: Callable[[bytes], bytes], *, depth: int = 60, seed: bytes = b"]") -> bytes:
    """A value that holds the value before it twice, `depth` times over: 2^depth leaves in a few hundred bytes."""
    value = seed
    for level in range(depth):
        index = struct.pack("<I", 1000 + level)
        value += b"r" + index + b"0" + twice(b"j" + index)
    return value


def list_twice(item: bytes) -> bytes:
    return b"](" + item + item + b"e"


def tuple_twice(item: bytes) -> bytes:
    return item + item + b"\x86"


def dict_twice(item: bytes) -> bytes:
    return mapping(a=item, b=item)


def many(count: int, make: Callable[[int], bytes]) -> bytes:
    return b"}(" + b"".join(plain(f"k{index}") + make(index) for index in range(count)) + b"u"


SHARED = b"B" + struct.pack("<I", 2**20) + b"\1" * 2**20
BOMBS: dict[str, bytes] = {
    "memo index": with_meta(b"Nr\xff\xff\xff\xff"),
    "memo index below": with_meta(b"Nr\xff\xff\xff\x7f"),
    "memo index as text": with_meta(b"Np4294967295\n"),
    "memo index, first in the file": program(b"Nr\xff\xff\xff\xff"),
    "shared lists": with_meta(nested(list_twice)),
    "shared dicts": with_meta(nested(dict_twice)),
    "shared lists as weights": program(mapping(w=tensor(), state_dict=nested(list_twice))),
    "shared tuples as a key": with_meta(b"}" + nested(tuple_twice, seed=b")") + b"Ns"),
    "deep lists": with_meta(b"]" * 200_000 + b"a" * 199_999),
    "deep tuples": with_meta(b")" + b"\x85" * 200_000),
    "deep tuples as a key": with_meta(b"})" + b"\x85" * 200_000 + b"Ns"),
    "list in itself": with_meta(b"]r\xe8\x03\0\0" + b"j\xe8\x03\0\0a"),
    "list in itself a thousand times": with_meta(b"]r\xe8\x03\0\0(" + b"j\xe8\x03\0\0" * 1000 + b"e"),
    "dict in itself": with_meta(b"}r\xe8\x03\0\0" + plain("a") + b"j\xe8\x03\0\0s"),
    "state dict in itself": program(b"}r\xe8\x03\0\0" + plain("state_dict") + b"j\xe8\x03\0\0s"),
    "array of nothing, often": with_meta(array((2**23, 0), bytes_value(b""))),
    "array with a negative side": with_meta(array((-1, -2), bytes_value(b"ab"))),
    "one buffer in many arrays": with_meta(SHARED + b"r\xe8\x03\0\x000" + many(500, lambda _: array((2**20,), b"j\xe8\x03\0\0"))),
    "expanded tensor": program(mapping(w=tensor(size=(2**46,), stride=(0,)))),
    "expanded tensor that would just fit": program(mapping(w=tensor(size=(2**26,), stride=(0,)))),
    "expanded half": program(mapping(w=tensor(storage("HalfStorage", numel=12), size=(2**26,), stride=(0,)))),
    "expanded empty tensor": program(mapping(w=tensor(), x=tensor(size=(2**62, 0, 2**62), stride=(1, 1, 1)))),
    "bytes of 2^40": with_meta(b"\x8e" + struct.pack("<Q", 2**40)),
    "bytearray of 2^40": with_meta(b"\x96" + struct.pack("<Q", 2**40)),
    "text of 2^62": with_meta(b"\x8d" + struct.pack("<Q", 2**62)),
    "frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + with_meta(b"N")[2:],
    "number of 2^31 bytes": with_meta(b"\x8b\xff\xff\xff\x7f"),
    "number of -1 bytes": with_meta(b"\x8b\xff\xff\xff\xff"),
    "long decimal": with_meta(b"L" + b"9" * 10**6 + b"L\n"),
    "marks": with_meta(b"(" * 200_000),
    "many names": with_meta(b"](" + b"".join(named("m", f"n{index}") for index in range(10**4)) + b"e"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BOMBS)
def test_bomb_costs_little_time_and_memory(name: str, form: str, tmp_path: Path, jail: Callable[..., Outcome]) -> None:
    """In the zip under `meta`, where it is made plain; in the legacy file elsewhere, where it is searched for storages."""
    pickled = BOMBS[name] if form == "zip" else BOMBS[name].replace(plain("meta"), plain("rest"))
    outcome = jail(file_of(form, tmp_path / "a.pth", pickled))
    assert outcome.harmless, outcome


def test_many_views_of_one_storage_cost_little_memory(tmp_path: Path, jail: Callable[..., Outcome]) -> None:
    views = many(500, lambda _: tensor(storage("HalfStorage", numel=2**19), size=(2**19,), stride=(1,)))
    outcome = jail(zip_file(tmp_path / "a.pth", program(views), data=b"\0" * 2**20))
    assert outcome.harmless, outcome


def test_storage_that_claims_more_than_the_file_has_costs_little_memory(tmp_path: Path, jail: Callable[..., Outcome]) -> None:
    huge = program(mapping(w=tensor(storage(numel=2**34), size=(2**34,), stride=(1,))))
    outcome = jail(legacy_file(tmp_path / "a.pth", huge, numel=2**34))
    assert (outcome.result, outcome.harmless) == ("CheckpointError", True), outcome


def test_compressed_tar_bomb_costs_little_memory(tmp_path: Path, jail: Callable[..., Outcome]) -> None:
    """Asking whether a file is a tar unpacks it: a long-name header makes tarfile read the whole name into memory."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**28
    bomb = gzip.compress(header.tobuf(tarfile.GNU_FORMAT), mtime=2**30 + 1) + gzip.compress(b"\0" * 2**20) * 256
    outcome = jail(written(tmp_path / "a.pth", bomb))
    assert outcome.harmless, outcome


# ------------------------------------------------------------------------------------------------------------- no usable weights


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
@pytest.mark.parametrize(("bad", "count"), [((math.nan,), 1), ((math.inf, -math.inf), 2), ((math.nan, 1.0, math.inf), 2)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named_and_counted(kind: torch.dtype, bad: tuple[float, ...], count: int, form: str, tmp_path: Path) -> None:
    weights = {"fine.weight": WEIGHT, "head.bias": torch.tensor([0.0, *bad, 1.0], dtype=kind)}
    path = tmp_path / "a.pth"
    if form == "safetensors":
        written(path, to_safetensors(weights))
    else:
        saved(path, weights, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=rf"head\.bias: .*{count} of {len(bad) + 2} ") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("form", FORMATS)
def test_missing_state_dict_lists_what_was_found(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"optimizer": {"state": {0: {"exp_avg": WEIGHT}}}, "epoch": 3}, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="expected a state dict, found .*optimizer, epoch") as caught:
        read_checkpoint(path)
    assert caught.value.hint
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    "content", [[WEIGHT], WEIGHT, 5, "text", None, {}, {"state_dict": {}}, {"state_dict": None}, {"a": {"b": {}}}], ids=lambda content: str(content)[:20]
)
def test_content_without_weights_is_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a state dict"):
        read_checkpoint(saved(tmp_path / "a.pth", content))


@pytest.mark.parametrize("key", [0, (1, 2), None, 1.5], ids=repr)
@pytest.mark.parametrize("form", FORMATS)
def test_key_that_is_no_text_is_refused(key: object, form: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(saved(tmp_path / "a.pth", {"state_dict": {key: WEIGHT}}, _use_new_zipfile_serialization=form == "zip"))


def test_safetensors_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected weights, found none"):
        read_checkpoint(written(tmp_path / "a.safetensors", to_safetensors({})))
