"""What only a real driver can show of CUDA: memory, streams, graphs and threads through both bindings, and TensorRT's session on them.

Of the two, TensorRT alone is a stand-in here: its engines compute with torch, on the stream and at the addresses that the session gives them, so that this runs
on GPUs and machines that TensorRT is not for. `pytest -m gpu`, in one process: memory is counted. Everything skips elsewhere, saying what is missing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import logging
import os
import random
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import stand_ins  # type: ignore[import-not-found, unused-ignore]  # beside this folder
from modelcrate_bundle.errors import InputError, MissingBackendError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.builders import BUILDERS, check_can_build
from modelcrate_runtime.sessions import SessionOptions, open_artefact
from modelcrate_runtime.sessions.cuda_device import BINDINGS, Cuda, Gpu, find_gpu, open_cuda, require_binding
from modelcrate_runtime.sessions.tensorrt_session import _MOST_GRAPHS

pytestmark = pytest.mark.gpu

MIB = 2**20
SIZE, MOST = 24, stand_ins.PROFILE["max"]
SLOW = 2_000_000
"""Cycles of the GPU that every engine here idles before it writes anything, about a millisecond: who does not wait reads what was there before."""
VERY_SLOW = 400_000_000
ACTIVATIONS = MIB
"""Bytes that an execution context has for itself."""
ERROR = types.SimpleNamespace(name="ERROR")
"""TensorRT's severity of that name, which stand_ins keeps to itself."""
TORCH: Any = torch.cuda
"""Without its types: some of it has none."""

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Gpu:
    """The GPU; skips where there is none, or where torch cannot reach it."""
    try:
        found = find_gpu()
    except MissingBackendError as error:
        pytest.skip(f"{error} ({error.hint})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} cannot use the GPU: install a build with CUDA, for this driver")
        TORCH.init()
        TORCH._sleep(1)
        torch_works()
    return found


@pytest.fixture(params=list(BINDINGS))
def binding(request: pytest.FixtureRequest) -> str:
    """One binding after the other."""
    return available(request.param)


@pytest.fixture
def cuda_python() -> str:
    """The binding that has graphs."""
    return available("cuda-python")


def available(name: str) -> str:
    """Skip where a binding is not installed; what it warns of when it is imported is not ours."""
    try:
        require_binding(name)
    except MissingBackendError as error:
        pytest.skip(f"{error} ({error.hint})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(BINDINGS[name][0])
    return name


def torch_works() -> None:
    """Torch computes on the primary context."""
    assert torch.arange(1000, device="cuda").sum().item() == 499500


def free_memory() -> int:
    """Bytes that the driver has left."""
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


@contextlib.contextmanager
def opened_cuda(name: str) -> Iterator[Cuda]:
    """CUDA through a binding, current in this thread."""
    cuda = open_cuda(0, name)
    try:
        with cuda.active():
            yield cuda
    finally:
        cuda.close()


def noise(size: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, size]).integers(0, 256, size, dtype=np.uint8)


def round_trip(cuda: Cuda, size: int, *, seed: int = 0) -> None:
    """Pinned, device, pinned. Inside `active`; the memory is given back."""
    address = cuda.allocate(size)
    assert address % 256 == 0, "as TensorRT wants its tensors"
    source, target = cuda.pinned(size), cuda.pinned(size)
    source[:] = noise(size, seed=seed)
    target[:] = ~source
    cuda.to_device(address, source)
    cuda.to_host(target, address)
    cuda.synchronize()
    assert np.array_equal(target, source)
    assert np.array_equal(source, noise(size, seed=seed))
    cuda.free(address)


def device_tensor(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
    """Device memory as torch sees it, not copied."""
    facts = {"shape": tuple(shape), "typestr": dtype.str, "data": (address, False), "strides": None, "version": 3}
    tensor = torch.as_tensor(types.SimpleNamespace(__cuda_array_interface__=facts), device="cuda")
    assert tensor.data_ptr() == address
    return tensor


def enqueue(stream: int, work: Callable[[], object]) -> None:
    """Let torch put its work into a stream that is not torch's."""
    with torch.cuda.stream(TORCH.ExternalStream(stream)):
        work()


def wait_for(stream: int) -> None:
    TORCH.ExternalStream(stream).synchronize()


# ------------------------------------------------------------------------------------------------------------------------ the seam


@pytest.mark.parametrize("size", [1, 3, 255, 256, 4097, MIB + 7, 64 * MIB])
def test_bytes_survive_the_way_there_and_back(binding: str, size: int) -> None:
    with opened_cuda(binding) as cuda:
        assert cuda.name == binding
        round_trip(cuda, size)


def test_parts_of_memory_are_copied_and_the_rest_stays(binding: str) -> None:
    with opened_cuda(binding) as cuda:
        address = cuda.allocate(4096)
        source, target = cuda.pinned(4096), cuda.pinned(4096)
        source[:], target[:] = 1, 9
        cuda.to_device(address, source)
        source_part = cuda.pinned(100)
        source_part[:] = 2
        cuda.to_device(address + 1000, source_part)
        cuda.to_host(target[:1050], address)
        cuda.synchronize()
        assert np.array_equal(target, np.repeat(np.array([1, 2, 9], np.uint8), [1000, 50, 4096 - 1050]))


def test_pinned_memory_is_pinned(binding: str) -> None:
    """What is not would be copied through the driver's own memory, and the copy would wait."""
    with opened_cuda(binding) as cuda:
        array = cuda.pinned(5000)
        assert (array.dtype, array.shape, array.flags.writeable) == (np.dtype(np.uint8), (5000,), True)
        assert torch.from_numpy(array).is_pinned()


def test_copies_come_in_the_order_of_the_stream(binding: str) -> None:
    """Also when they wait for something that takes long."""
    size = 32 * MIB
    with opened_cuda(binding) as cuda:
        address = cuda.allocate(size)
        sources, targets = [cuda.pinned(size) for _ in range(3)], [cuda.pinned(size) for _ in range(3)]
        for value, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
            source[:], target[:] = value, 0
        enqueue(cuda.stream, lambda: TORCH._sleep(VERY_SLOW))
        for source, target in zip(sources, targets, strict=True):
            cuda.to_device(address, source)
            cuda.to_host(target, address)
        cuda.synchronize()
        for value, target in enumerate(targets, 1):
            assert (target == value).all()


def test_what_others_put_into_the_stream_is_waited_for(binding: str) -> None:
    """A kernel of torch, between the copies."""
    with opened_cuda(binding) as cuda:
        address = cuda.allocate(4 * 1000)
        source, target = cuda.pinned(4 * 1000), cuda.pinned(4 * 1000)
        tensor = device_tensor(address, (1000,), np.dtype(np.float32))
        for turn in range(5):
            source.view(np.float32)[:] = np.arange(1000) + turn
            cuda.to_device(address, source)
            enqueue(cuda.stream, lambda: TORCH._sleep(10 * SLOW))
            enqueue(cuda.stream, lambda: tensor.mul_(3))
            cuda.to_host(target, address)
            cuda.synchronize()
            assert np.array_equal(target.view(np.float32), 3.0 * (np.arange(1000) + turn))


def test_a_graph_is_recorded_without_running_and_repeats_what_is_in_the_buffers_then(cuda_python: str) -> None:
    size = MIB + 5
    with opened_cuda(cuda_python) as cuda:
        address = cuda.allocate(size)
        source, target, seen = cuda.pinned(size), cuda.pinned(size), cuda.pinned(size)
        source[:], target[:], seen[:] = 1, 0, 0
        cuda.to_device(address, source)
        cuda.synchronize()

        def work() -> None:
            cuda.to_device(address, source)
            cuda.to_host(target, address)

        source[:] = 2
        launch = cuda.capture(work)
        assert launch is not None
        cuda.to_host(seen, address)
        cuda.synchronize()
        assert (seen == 1).all(), "it was run while it was recorded"
        assert (target == 0).all()
        for value in (3, 4, 5):
            source[:] = value
            launch()
            cuda.synchronize()
            assert (target == value).all()
        again = cuda.capture(work)
        assert again is not None
        for value, one in ((6, again), (7, launch), (8, again)):
            source[:] = value
            one()
            cuda.synchronize()
            assert (target == value).all()


def test_what_cannot_be_recorded_is_an_error_and_the_stream_goes_on(cuda_python: str) -> None:
    """A stream that records runs nothing, so recording has to end whatever happens."""
    with opened_cuda(cuda_python) as cuda:
        address, source = cuda.allocate(100), cuda.pinned(100)

        def waits() -> None:
            cuda.to_device(address, source)
            cuda.synchronize()

        def fails() -> None:
            cuda.to_device(address, source)
            raise ZeroDivisionError

        for _ in range(3):
            with pytest.raises(InputError, match="CUDA: cuda"):
                cuda.capture(waits)
            round_trip(cuda, 5000)
            with pytest.raises(ZeroDivisionError):
                cuda.capture(fails)
            round_trip(cuda, 5000)
    torch_works()


def test_pycuda_has_no_graphs() -> None:
    ran: list[int] = []
    with opened_cuda(available("pycuda")) as cuda:
        assert cuda.capture(lambda: ran.append(1)) is None
        round_trip(cuda, 100)
    assert ran == []


@pytest.mark.parametrize("size", [2**43, 2**50])
def test_more_memory_than_there_is_is_an_error_that_says_what_to_do(binding: str, size: int) -> None:
    cuda = open_cuda(0, binding)
    for _ in range(3):
        with pytest.raises(InputError, match=r"CUDA: .*expected to succeed, found: .*out of memory") as caught, cuda.active():
            cuda.allocate(size)
        assert "free some memory of the GPU" in caught.value.hint
        with cuda.active():
            round_trip(cuda, 4097)
        torch_works()
    cuda.close()


@pytest.mark.parametrize("frees", [True, False], ids=["freed", "left to close"])
def test_memory_comes_back(binding: str, frees: bool) -> None:
    def once() -> int:
        with opened_cuda(binding) as cuda:
            address = cuda.allocate(64 * MIB)
            held = free_memory()
            if frees:
                cuda.free(address)
        after = free_memory()
        assert after - held > 32 * MIB
        return after

    before = [once() for _ in range(3)][-1]
    after = [once() for _ in range(50)][-1]
    assert before - after < 32 * MIB, "50 times 64 MiB were asked for"
    torch_works()


def test_two_threads_each_with_its_own(binding: str) -> None:
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        with opened_cuda(binding) as cuda:
            barrier.wait(30)
            for turn in range(60):
                round_trip(cuda, 100_000 + 1000 * index, seed=turn)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    torch_works()


def test_another_thread_than_the_one_that_opened_it(binding: str) -> None:
    """Uses it, closes it."""
    cuda = open_cuda(0, binding)
    with cuda.active():
        address = cuda.allocate(1000)
        round_trip(cuda, 1000)

    def use() -> None:
        with cuda.active():
            round_trip(cuda, 5000, seed=1)
            cuda.free(address)
            cuda.allocate(1000)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(use).result()
    with cuda.active():
        round_trip(cuda, 1000, seed=2)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cuda.close).result()
    torch_works()


def test_torch_goes_on_after_it_was_closed(binding: str) -> None:
    kept = torch.arange(1000, device="cuda")
    for turn in range(10):
        with opened_cuda(binding) as cuda:
            round_trip(cuda, 10_000, seed=turn)
            torch_works()
        gc.collect()
        torch_works()
        assert kept.sum().item() == 499500


def test_both_bindings_and_torch_are_on_one_context() -> None:
    """An address of one is an address of the others."""
    names = [available(name) for name in BINDINGS]
    with opened_cuda(names[0]) as one, opened_cuda(names[1]) as other:
        for first, second in ((one, other), (other, one)):
            with first.active():
                address, source = first.allocate(1000), first.pinned(1000)
                source[:] = noise(1000)
                first.to_device(address, source)
                first.synchronize()
            assert np.array_equal(device_tensor(address, (1000,), np.dtype(np.uint8)).cpu().numpy(), noise(1000))
            with second.active():
                target = second.pinned(1000)
                second.to_host(target, address)
                second.synchronize()
            assert np.array_equal(target, noise(1000))
        for turn in range(5):
            for cuda in (one, other):
                with cuda.active():
                    round_trip(cuda, 20_000, seed=turn)
            torch_works()
    torch_works()


def test_closing_prints_nothing(binding: str, capfd: pytest.CaptureFixture[str]) -> None:
    """PyCUDA says on the standard error what it could not clean up, and goes on."""
    for _ in range(3):
        with opened_cuda(binding) as cuda:
            round_trip(cuda, 1000)
            left = cuda.pinned(10)
        del cuda, left
        gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_process_ends_in_peace(binding: str) -> None:
    program = (
        "import sys; from modelcrate_runtime.sessions.cuda_device import open_cuda; cuda = open_cuda(0, sys.argv[1])\n"
        "with cuda.active(): cuda.allocate(1000); array = cuda.pinned(1000)\n"
        "cuda.close(); print('closed')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run([sys.executable, "-c", program, binding], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (ended.returncode, ended.stdout) == (0, "closed\n"), ended.stderr
    assert "PyCUDA" not in ended.stderr


# ------------------------------------------------------------------------------------------------ TensorRT's session on real memory


@dataclass(kw_only=True)
class Library:
    """TensorRT, as far as a session needs it.

    Attributes:
        module: what is imported as `tensorrt`.
        executed: the shape of the input, of each time that a context was executed or recorded; not of a graph that was launched.
        waits: whether engines wait for their stream, which cannot be recorded.
    """

    module: Any
    executed: list[tuple[int, ...]] = field(default_factory=list)
    waits: bool = False


def engine_file(nodes: list[onnx.NodeProto], weights: Arrays, outputs: list[tuple[str, int, list[Any]]]) -> bytes:
    """What stand_ins takes for an engine: it says what goes in and comes out. What is computed of it is torch's part, below."""
    made = helper.make_graph(
        nodes,
        "engine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIZE])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    data: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def affine() -> bytes:
    """y = 2 x + 1, and the sum of each row of x."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "one"], ["y"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["sums"], keepdims=0),
    ]
    weights: Arrays = {"two": np.array([2], np.float32), "one": np.array([1], np.float32), "axes": np.array([1], np.int64)}
    return engine_file(nodes, weights, [("y", TensorProto.FLOAT, ["batch", SIZE]), ("sums", TensorProto.FLOAT, ["batch"])])


def positives() -> bytes:
    """Where x is positive, as many rows as there are such places; and -x."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["is_positive"]),
        helper.make_node("NonZero", ["is_positive"], ["where"]),
        helper.make_node("Transpose", ["where"], ["rows"]),
        helper.make_node("Neg", ["x"], ["y"]),
    ]
    outputs: list[tuple[str, int, list[Any]]] = [("rows", TensorProto.INT64, ["found", 2]), ("y", TensorProto.FLOAT, ["batch", SIZE])]
    return engine_file(nodes, {"zero": np.array([0], np.float32)}, outputs)


def expected(x: np.ndarray) -> Arrays:
    return {"y": 2 * x + 1, "sums": x.sum(axis=1)}


def expected_positives(x: np.ndarray) -> Arrays:
    return {"rows": np.argwhere(x > 0), "y": -x}


def batch(count: int, *, seed: int = 0) -> np.ndarray:
    """Whole numbers, so that every sum is exact, in whichever order."""
    return np.random.default_rng([seed, count]).integers(-1000, 1000, (count, SIZE)).astype(np.float32)


def assert_same(found: Any, reference: Arrays) -> None:
    assert list(found) == list(reference)
    for name, value in reference.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def torch_tensorrt() -> Library:
    """The stand-in for TensorRT, on real memory and streams: engines and contexts of stand_ins, except for how they run and whose memory they have."""
    trt: Any = stand_ins.tensorrt(stand_ins.Gpu())
    library = Library(module=trt)
    sample = trt.Runtime(types.SimpleNamespace(is_made=True)).deserialize_cuda_engine(affine())
    any_engine: Any = type(sample)
    any_context: Any = type(sample.create_execution_context())

    class Context(any_context):  # type: ignore[misc]  # a class made inside a function
        def __init__(self, engine: Any) -> None:
            super().__init__(engine)
            self._activations = torch.empty(ACTIVATIONS, dtype=torch.uint8, device="cuda")
            self._tensors: dict[tuple[int, tuple[int, ...], str], torch.Tensor] = {}

        def execute_async_v3(self, stream: int) -> bool:
            engine = self._engine
            missing = [name for name in engine.names if not self._addresses.get(name) and name not in self._allocators]
            if missing or "x" not in self._shapes:
                engine.logger.log(ERROR, f"IExecutionContext::enqueueV3: no address or shape of {missing}")
                return False
            library.executed.append(self._shapes["x"])
            if "rows" in engine.outputs:
                return self._find(stream)
            x, y, sums = (self._tensor(name, self.get_tensor_shape(name)) for name in ("x", "y", "sums"))

            def work() -> None:
                """Allocates nothing, so that it can be recorded."""
                TORCH._sleep(SLOW)
                torch.mul(x, 2, out=y)
                y.add_(1)
                torch.sum(x, dim=1, out=sums)

            enqueue(stream, work)
            try:
                if library.waits:
                    wait_for(stream)
            except RuntimeError as error:
                engine.logger.log(ERROR, f"IExecutionContext::enqueueV3: {error}")
                return False
            return True

        def _find(self, stream: int) -> bool:
            """How many rows there are is known when the GPU has counted them."""
            x, y = (self._tensor(name, self._shapes["x"]) for name in ("x", "y"))
            found: list[torch.Tensor] = []

            def count() -> None:
                TORCH._sleep(SLOW)
                torch.neg(x, out=y)
                found.append(torch.nonzero(x > 0))

            enqueue(stream, count)
            wait_for(stream)
            rows = found[0]
            address = self._allocate("rows", self._addresses.get("rows", 0), rows.nbytes, stream)
            if not address:
                self._engine.logger.log(ERROR, "IExecutionContext::enqueueV3: Error Code 2: OutOfMemory (allocator returned nullptr)")
                return False
            self._allocators["rows"].notify_shape("rows", tuple(rows.shape))
            if rows.numel():
                target = device_tensor(address, tuple(rows.shape), np.dtype(np.int64))
                enqueue(stream, lambda: TORCH._sleep(SLOW))
                enqueue(stream, lambda: target.copy_(rows))
            return True

        def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            """Made the first time, when nothing is recorded yet."""
            key = (self._addresses[name], shape, self._engine.dtypes[name].str)
            if key not in self._tensors:
                self._tensors[key] = device_tensor(key[0], shape, self._engine.dtypes[name])
            return self._tensors[key]

    class Engine(any_engine):  # type: ignore[misc]
        def create_execution_context(self) -> Context:
            return Context(self)

    class Runtime(trt.Runtime):  # type: ignore[misc]
        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            return Engine(bytes(data), self._logger) if super().deserialize_cuda_engine(data) is not None else None

    trt.Runtime = Runtime
    return library


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The stand-in, imported as `tensorrt`."""
    made = torch_tensorrt()
    made.module.__spec__ = types.SimpleNamespace(name="tensorrt", submodule_search_locations=[])
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    return made


def opened(place: Path, binding: str, data: bytes | None = None, **options: Any) -> Any:
    path = place / "end2end.engine"
    path.write_bytes(affine() if data is None else data)
    session: Any = open_artefact("tensorrt", {"net": path}, SessionOptions(cuda_binding=binding, **options), where="bundle")
    assert session.binding == binding
    return session


def test_the_stand_in_refuses_what_tensorrt_refuses(library: Library, tmp_path: Path, binding: str) -> None:
    session = opened(tmp_path, binding)
    context = session._engine.create_execution_context()
    with session._cuda.active():
        assert not context.execute_async_v3(session._cuda.stream)
        assert "no address or shape of ['x', 'y', 'sums']" in session._logger.problems[-1]
        for shape in ((0, SIZE), (MOST + 1, SIZE), (1, SIZE + 1), (SIZE,)):
            assert not context.set_input_shape("x", shape)
            with pytest.raises(InputError, match=rf"TensorRT: expected x float32\[1, 24\] to \[32, 24\], found x float32\[{', '.join(map(str, shape))}\]"):
                session.run({"x": np.zeros(shape, np.float32)})
    assert library.executed == []
    assert_same(session.run({"x": batch(2)}), expected(batch(2)))
    session.close()


def test_it_says_what_it_takes_and_gives(library: Library, binding: str, tmp_path: Path) -> None:
    session = opened(tmp_path, binding)
    assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", SIZE)),)
    assert session.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", SIZE)), TensorSpec(name="sums", dtype="float32", shape=("batch",)))
    session.close()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_every_batch_in_any_order_is_numpy(library: Library, binding: str, graphs: bool, tmp_path: Path) -> None:
    session = opened(tmp_path, binding, cuda_graphs=graphs)
    counts = [*range(1, MOST + 1)] * 3
    random.Random(5).shuffle(counts)
    for seed, count in enumerate(counts):
        x = batch(count, seed=seed)
        assert_same(session.run({"x": x}), expected(x))
    is_recorded = graphs and binding == "cuda-python"
    assert len(library.executed) == len(counts) - (_MOST_GRAPHS if is_recorded else 0), "of three runs two are executed: the first, and once more to record it"
    session.close()


def test_a_shape_that_comes_again_is_the_launch_of_a_graph(library: Library, cuda_python: str, tmp_path: Path) -> None:
    """The engine is executed to prepare it and to record it, and no more; what is launched reads the input that came."""
    session = opened(tmp_path, cuda_python)
    for turn in range(20):
        x = batch(3, seed=turn)
        assert_same(session.run({"x": x}), expected(x))
        assert library.executed == [(3, SIZE)] * 2
    session.close()


def test_shapes_beyond_those_that_are_kept_run_without_a_graph(library: Library, cuda_python: str, tmp_path: Path) -> None:
    session = opened(tmp_path, cuda_python)
    counts = (1, 2, 5, 8, 13, 21, 32)
    kept = set(counts[:_MOST_GRAPHS])
    for turn in range(4):
        library.executed.clear()
        for count in counts:
            x = batch(count, seed=turn)
            assert_same(session.run({"x": x}), expected(x))
        runs = [count for count, _ in library.executed]
        assert runs == [count for count in counts for _ in range(1 if count not in kept else 2 if turn == 0 else 0)]
    session.close()


def test_nothing_is_recorded_where_nobody_wants_graphs(library: Library, cuda_python: str, tmp_path: Path) -> None:
    session = opened(tmp_path, cuda_python, cuda_graphs=False)
    for turn in range(4):
        x = batch(3, seed=turn)
        assert_same(session.run({"x": x}), expected(x))
    assert library.executed == [(3, SIZE)] * 4
    session.close()


def test_what_cannot_be_recorded_runs_without_a_graph(library: Library, cuda_python: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.waits = True
    session = opened(tmp_path, cuda_python)
    with caplog.at_level(logging.WARNING):
        for turn in range(4):
            for count in (3, 7):
                x = batch(count, seed=turn)
                assert_same(session.run({"x": x}), expected(x))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["cannot be recorded as a CUDA graph" in text for text in said] == [True, True]
    assert [count for count, _ in library.executed] == [3, 3, 7, 7] + [3, 7] * 3
    library.waits = False
    assert_same(session.run({"x": batch(9)}), expected(batch(9)))
    library.executed.clear()
    assert_same(session.run({"x": batch(9, seed=1)}), expected(batch(9, seed=1)))
    assert library.executed == [], "a shape that can be recorded is, also after one that could not"
    session.close()
    torch_works()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_outputs_may_be_as_large_as_the_data_makes_them(library: Library, binding: str, graphs: bool, tmp_path: Path) -> None:
    session = opened(tmp_path, binding, positives(), cuda_graphs=graphs)
    for turn, count in enumerate((2, 1, MOST, 5, MOST, MOST, 1)):
        x = batch(count, seed=turn)
        assert_same(session.run({"x": x}), expected_positives(x))
    for x in (-np.abs(batch(4)), np.abs(batch(MOST)) + 1, -np.abs(batch(MOST)), batch(3)):  # none of them, all of them
        assert_same(session.run({"x": x}), expected_positives(x))
    assert len(library.executed) == 7 + 4, "a size that is not known cannot be recorded"
    session.close()
    torch_works()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_results_are_the_callers(library: Library, binding: str, graphs: bool, tmp_path: Path) -> None:
    """Another run does not change them, nor does closing; and writing to them changes nothing."""
    session = opened(tmp_path, binding, cuda_graphs=graphs)
    x = batch(4)
    results = []
    for _ in range(3):
        results.append(session.run({"x": x}))
        session.run({"x": -x})
        session.run({"x": batch(MOST)})
    for one in results:
        assert_same(one, expected(x))
    results[0]["y"][:] = np.nan
    assert_same(session.run({"x": x}), expected(x))
    session.close()
    gc.collect()
    for one in results[1:]:
        assert_same(one, expected(x))


@pytest.mark.parametrize("where", ["session", "torch"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_runs_after_a_slow_kernel_are_right(library: Library, binding: str, graphs: bool, where: str, tmp_path: Path) -> None:
    """Whether it is in the session's stream, which is waited for, or in torch's, which is nobody's business."""
    session = opened(tmp_path, binding, cuda_graphs=graphs)
    for turn in range(3):
        if where == "session":
            enqueue(session._cuda.stream, lambda: TORCH._sleep(VERY_SLOW))
        else:
            TORCH._sleep(VERY_SLOW)
        x = batch(6, seed=turn)
        assert_same(session.run({"x": x}), expected(x))
    session.close()
    torch.cuda.synchronize()


@pytest.mark.parametrize("sessions", [1, 2])
def test_threads_answer_as_one_does(library: Library, binding: str, sessions: int, tmp_path: Path) -> None:
    """Two threads with a session each, or both with the same one; while one records, the other goes on."""
    open_ones = []
    for index in range(sessions):
        (tmp_path / str(index)).mkdir()
        open_ones.append(opened(tmp_path / str(index), binding))
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(30)
        for turn in range(40):
            x = batch((1, 3, 7, MOST, 2, 9)[(index + turn) % 6], seed=100 * index + turn)
            assert_same(open_ones[index % sessions].run({"x": x}), expected(x))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for session in open_ones:
        session.close()
    torch_works()


@pytest.mark.parametrize("data", [affine(), positives()], ids=["affine", "positives"])
def test_another_thread_may_run_and_close_it(library: Library, binding: str, data: bytes, tmp_path: Path) -> None:
    session = opened(tmp_path, binding, data)
    reference = expected if data == affine() else expected_positives

    def work() -> None:
        for turn in range(3):
            x = batch(5 + turn, seed=turn)
            assert_same(session.run({"x": x}), reference(x))

    work()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
        pool.submit(session.close).result()
    with pytest.raises(InputError, match="expected an open session, found a closed one"):
        session.run({"x": batch(1)})
    torch_works()


def test_opening_and_closing_leaves_no_memory_on_the_gpu(library: Library, binding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With buffers so large that thirty of them would be missed; and the contexts, graphs' ones too, are gone."""
    monkeypatch.setitem(stand_ins.PROFILE, "max", 2**16)

    def once() -> tuple[int, int]:
        session = opened(tmp_path, binding)
        for count in (3, 3, 2**16, 7, 3):
            x = batch(count)
            assert_same(session.run({"x": x}), expected(x))
        session.close()
        return free_memory(), torch.cuda.memory_allocated()

    before = [once() for _ in range(3)][-1]
    after = [once() for _ in range(30)][-1]
    assert before[0] - after[0] < 32 * MIB
    assert before[1] == after[1]
    torch_works()


def test_no_memory_for_the_buffers_is_an_error_and_the_next_session_opens(
    library: Library, binding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened(tmp_path, binding).close()
    before = free_memory()

    def refuse() -> None:
        with pytest.raises(InputError, match=r"CUDA: .*expected to succeed, found: .*out of memory") as caught:
            opened(tmp_path, binding)
        assert "free some memory of the GPU" in caught.value.hint

    with monkeypatch.context() as patch:
        patch.setitem(stand_ins.PROFILE, "max", 2**43)
        for _ in range(3):
            refuse()
    gc.collect()
    assert before - free_memory() < 32 * MIB
    session = opened(tmp_path, binding)
    assert_same(session.run({"x": batch(MOST)}), expected(batch(MOST)))
    session.close()
    torch_works()


def test_sessions_of_both_bindings_run_side_by_side(library: Library, tmp_path: Path) -> None:
    names = [available(name) for name in BINDINGS]
    sessions = []
    for name in names:
        (tmp_path / name).mkdir()
        sessions.append(opened(tmp_path / name, name))
    for turn in range(5):
        for session in sessions:
            x = batch(1 + turn % 3, seed=turn)
            assert_same(session.run({"x": x}), expected(x))
        torch_works()
    sessions[0].close()
    assert_same(sessions[1].run({"x": batch(4)}), expected(batch(4)))
    sessions[1].close()
    torch_works()


# ------------------------------------------------------------------------------------------------------------- TensorRT for RTX


def test_tensorrt_for_rtx_is_refused_on_hopper(gpu: Gpu) -> None:
    if gpu.compute_capability != (9, 0):
        pytest.skip(f"for a GPU of compute capability 9.0: this is {gpu.name} with {'.'.join(map(str, gpu.compute_capability))}")
    missing = [name for name in BUILDERS["tensorrt_rtx"].needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'modelcrate[convert,tensorrt-rtx]'")
    with pytest.raises(MissingBackendError, match=r"expected a GPU that TensorRT for RTX runs on .*found 9\.0 \(") as caught:
        check_can_build("tensorrt_rtx")
    assert gpu.name in str(caught.value)
    assert "-t tensorrt-fp16" in caught.value.hint
