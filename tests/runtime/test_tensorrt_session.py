"""TensorRT's session on a stand-in GPU: what comes out, in which order, from which memory, and what is refused before anything is loaded."""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import stand_ins
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.manifest import EngineRecord
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_runtime.sessions import Session, SessionOptions, TimesCopies, TimesLayers, open_artefact
from modelcrate_runtime.sessions.cuda_device import Gpu, find_gpu
from modelcrate_runtime.sessions.tensorrt_session import check_engine, this_platform
from stand_ins import machine_with_gpu

SIZE, HIDDEN, OUT = 24, 32, 8
MOST = 32
VERSION = "11.4.0.106"
BINDINGS = ["cuda-python", "pycuda"]
Arrays = dict[str, np.ndarray]


def graph(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: list[tuple[str, int, list[Any]]], *, kind: int = TensorProto.FLOAT) -> bytes:
    """An engine of the stand-in: an ONNX file from x."""
    made = helper.make_graph(
        nodes, "engine", [helper.make_tensor_value_info("x", kind, ["batch", SIZE])], [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def network(seed: int = 0) -> bytes:
    """Two layers, two outputs."""
    rng = np.random.default_rng(seed)
    weights = {"a": rng.standard_normal((SIZE, HIDDEN)).astype(np.float32), "b": rng.standard_normal((HIDDEN, OUT)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "b"], ["y"]),
    ]
    return graph(nodes, weights, [("y", TensorProto.FLOAT, ["batch", OUT]), ("hidden", TensorProto.FLOAT, ["batch", HIDDEN])])


def expected(data: bytes, feeds: Arrays) -> Arrays:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def batch(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, count]).standard_normal((count, SIZE)).astype(np.float32)


def assert_same(found: Arrays, reference: Arrays) -> None:
    assert list(found) == list(reference)
    for name, value in reference.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def opened(place: Path, data: bytes | None = None, **options: Any) -> Session:
    path = place / "end2end.engine"
    path.write_bytes(network() if data is None else data)
    return open_artefact("tensorrt", {"net": path}, SessionOptions(**options), where="bundle")


@pytest.fixture(params=BINDINGS)
def gpu(request: pytest.FixtureRequest) -> Iterator[stand_ins.Gpu]:
    """A machine with a GPU and one of the bindings."""
    with machine_with_gpu(binding=request.param) as one:
        yield one


@pytest.fixture
def cuda_python() -> Iterator[stand_ins.Gpu]:
    with machine_with_gpu(binding="cuda-python") as one:
        yield one


# ------------------------------------------------------------------------------------------------------------------------- results


def test_it_says_what_it_takes_and_gives(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", SIZE)),)
    assert session.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", OUT)), TensorSpec(name="hidden", dtype="float32", shape=("batch", HIDDEN)))
    assert session.streams == 1
    session.close()


@pytest.mark.parametrize("graphs", [True, False])
def test_every_batch_in_any_order_is_what_onnxruntime_computes(gpu: stand_ins.Gpu, graphs: bool, tmp_path: Path) -> None:
    session = opened(tmp_path, cuda_graphs=graphs)
    counts = [*range(1, MOST + 1)] * 3
    random.Random(5).shuffle(counts)
    for seed, count in enumerate(counts):
        sample = batch(count, seed=seed)
        assert_same(session.run({"x": sample}), expected(network(), {"x": sample}))
    session.close()


def test_arrays_of_any_layout_and_read_only_ones_are_taken(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    sample = batch(6)
    frozen = sample.copy()
    frozen.flags.writeable = False
    for given in (np.asfortranarray(sample), np.repeat(sample, 2, axis=0)[::2], sample[::-1][::-1], frozen):
        assert_same(session.run({"x": given}), expected(network(), {"x": sample}))
    session.close()


def test_results_are_the_callers(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    """They neither change when the session runs again or closes, nor change what it answers when they are written to."""
    session = opened(tmp_path)
    sample = batch(4)
    for _ in range(3):
        first = session.run({"x": sample})
        kept = {name: value.copy() for name, value in first.items()}
        session.run({"x": -sample})
        assert_same(first, kept)
        first["y"][:] = np.nan
        assert_same(session.run({"x": sample}), kept)
    last = session.run({"x": sample})
    session.close()
    gc.collect()
    assert_same(last, kept)


def test_the_input_may_change_after_the_call(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    sample = batch(4)
    for scale in (1, 2, 3):
        sample *= scale
        assert_same(session.run({"x": sample}), expected(network(), {"x": sample}))
    session.close()


# -------------------------------------------------------------------------------------------------------------------------- graphs


def test_a_shape_that_comes_again_is_launched_as_a_graph(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    session.run({"x": batch(3)})
    assert (cuda_python.captures, cuda_python.launches) == (1, 0)
    for times in range(1, 4):
        session.run({"x": batch(3, seed=times)})
        assert (cuda_python.captures, cuda_python.launches) == (1, times)
    session.run({"x": batch(4)})
    assert (cuda_python.captures, cuda_python.launches) == (2, 3)
    session.close()


def test_four_shapes_are_recorded_and_no_more(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    for seed in range(3):
        for count in (1, 2, 5, 8, 13, 21, 32):
            sample = batch(count, seed=seed)
            assert_same(session.run({"x": sample}), expected(network(), {"x": sample}))
    assert cuda_python.captures == 4
    assert cuda_python.launches == 2 * 4
    session.close()


def test_nothing_is_recorded_where_nobody_wants_graphs(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path, cuda_graphs=False)
    for _ in range(3):
        session.run({"x": batch(3)})
    assert (cuda_python.captures, cuda_python.launches) == (0, 0)
    session.close()


def test_pycuda_has_no_graphs(tmp_path: Path) -> None:
    with machine_with_gpu(binding="pycuda") as gpu:
        session = opened(tmp_path)
        for _ in range(3):
            assert_same(session.run({"x": batch(3)}), expected(network(), {"x": batch(3)}))
        assert (gpu.captures, gpu.launches) == (0, 0)
        session.close()


# --------------------------------------------------------------------------------------------------------------------------- feeds


@pytest.mark.parametrize(
    ("feeds", "found"),
    [
        ({"image": batch(2)}, r"image float32\[2, 24\]"),
        ({"x": batch(2)[:, :-1]}, r"x float32\[2, 23\]"),
        ({"x": batch(2)[:, :, None]}, r"x float32\[2, 24, 1\]"),
        ({"x": batch(2)[0]}, r"x float32\[24\]"),
        ({"x": batch(33)}, r"x float32\[33, 24\]"),
        ({"x": batch(1)[:0]}, r"x float32\[0, 24\]"),
        ({"x": batch(2).astype(np.float64)}, r"x float64\[2, 24\]"),
        ({"x": batch(2).astype(np.float16)}, r"x float16\[2, 24\]"),
        ({"x": batch(2).astype(">f4")}, r"x >f4\[2, 24\]"),
        ({"x": batch(2), "extra": batch(2)}, r"x float32\[2, 24\], extra float32\[2, 24\]"),
        ({}, "nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_feed_is_an_error_with_both_shapes_and_the_session_goes_on(gpu: stand_ins.Gpu, feeds: Arrays, found: str, tmp_path: Path) -> None:
    session = opened(tmp_path)
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match=rf"TensorRT: expected x float32\[1, 24\] to \[32, 24\], found {found}$"):
            call(feeds)
        assert_same(call({"x": batch(2)}), expected(network(), {"x": batch(2)}))
    session.close()


# ------------------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("sessions", [1, 2])
def test_calls_from_several_threads_answer_as_one_call_does(gpu: stand_ins.Gpu, sessions: int, tmp_path: Path) -> None:
    open_ones = [opened(tmp_path, network(seed)) for seed in range(sessions)]
    counts = (1, 3, 7, 32, 2, 9)
    alone = {(seed, count): expected(network(seed), {"x": batch(count)}) for seed in range(sessions) for count in counts}
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        seed = index % sessions
        barrier.wait()
        for turn in range(30):
            count = counts[(index + turn) % len(counts)]
            assert_same(open_ones[seed].run({"x": batch(count)}), alone[seed, count])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for session in open_ones:
        session.close()
    gc.collect()
    assert gpu.allocated == 0


def test_a_call_that_waits_while_the_session_closes_is_refused(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    """One call runs, the session is being closed, and another call has come already."""
    for _ in range(5):
        session = opened(tmp_path, cuda_graphs=False)
        (stream,) = [one for one in gpu.streams.values() if isinstance(one, stand_ins.Stream)][-1:]
        runs, goes_on = threading.Event(), threading.Event()

        def wait(runs: threading.Event = runs, goes_on: threading.Event = goes_on) -> None:
            runs.set()
            goes_on.wait(10)

        def late(session: Session = session) -> str:
            try:
                session.run({"x": batch(2)})
            except InputError as error:
                return str(error)
            return "ran"

        stream.put(wait)
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(session.run, {"x": batch(2)})
            runs.wait(10)
            closing = pool.submit(session.close)
            time.sleep(0.02)
            second = pool.submit(late)
            time.sleep(0.02)
            goes_on.set()
            assert_same(first.result(), expected(network(), {"x": batch(2)}))
            closing.result()
            assert second.result() == "ran" or "expected an open session, found a closed one" in second.result()


# -------------------------------------------------------------------------------------------------------------------------- memory


def test_closing_frees_the_memory_and_the_stream(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    for count in (1, 2, 2, 32):
        session.run({"x": batch(count)})
    assert gpu.allocated >= MOST * (SIZE + OUT + HIDDEN) * 4
    session.close()
    session.close()
    gc.collect()
    assert gpu.allocated == 0
    if "pycuda" not in sys.modules or sys.modules["pycuda"] is None:
        assert gpu.streams == {}
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match="TensorRT: expected an open session, found a closed one"):
            call({"x": batch(1)})


def test_buffers_are_made_once(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    before = set(gpu.memory)
    for count in (1, 32, 5, 5, 2, 32):
        session.run({"x": batch(count)})
    assert set(gpu.memory) == before
    session.close()


def test_200_times_open_and_close_leave_nothing(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    for _ in range(200):
        session = opened(tmp_path)
        session.run({"x": batch(2)})
        session.close()
    gc.collect()
    assert gpu.allocated == 0
    assert gpu.memory == {}


def test_no_memory_on_the_device_is_an_error_that_leaks_nothing(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    """At whichever allocation it ends."""
    session = opened(tmp_path)
    needed = gpu.allocated
    session.close()
    del session
    gc.collect()
    for limit in range(0, needed, 2048):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stand_ins, "DEVICE_MIB", limit / 2**20)
            with pytest.raises(InputError, match=r"CUDA: .*(cudaErrorMemoryAllocation|out of memory)") as caught:
                opened(tmp_path)
        assert "free some memory" in caught.value.hint
        del caught
        gc.collect()
        assert gpu.memory == {}


# ------------------------------------------------------------------------------------------------------- sizes that depend on the data


def counted() -> bytes:
    """Where x is positive, and x again; how many rows the first has depends on x."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["is_positive"]),
        helper.make_node("NonZero", ["is_positive"], ["where"]),
        helper.make_node("Transpose", ["where"], ["rows"]),
        helper.make_node("Neg", ["x"], ["y"]),
    ]
    outputs = [("rows", TensorProto.INT64, ["found", 2]), ("y", TensorProto.FLOAT, ["batch", SIZE])]
    return graph(nodes, {"zero": np.float32(0)[...]}, outputs)


def test_outputs_may_be_as_large_as_the_data_makes_them(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path, counted())
    assert session.outputs[0] == TensorSpec(name="rows", dtype="int64", shape=("batch", 2))
    for turn, count in enumerate((2, 1, 32, 5, 32, 32, 1)):
        sample = batch(count, seed=turn)
        assert_same(session.run({"x": sample}), expected(counted(), {"x": sample}))
    for sample in (-np.abs(batch(4)), np.abs(batch(32)), -np.abs(batch(32)), batch(3)):  # none of them, all of them
        assert_same(session.run({"x": sample}), expected(counted(), {"x": sample}))
    assert gpu.captures == 0, "a size that is not known cannot be recorded"
    session.close()
    gc.collect()
    assert gpu.allocated == 0


def test_several_threads_share_what_grows(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path, counted())
    samples = [batch(1 + 7 * i, seed=i) for i in range(5)]

    def work(index: int) -> None:
        for turn in range(10):
            sample = samples[(index + turn) % len(samples)]
            assert_same(session.run({"x": sample}), expected(counted(), {"x": sample}))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    session.close()


def test_no_memory_for_what_grows_is_an_error_and_the_session_goes_on(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    """Smaller answers still fit into the memory that was there before."""
    session = opened(tmp_path, counted())
    few = batch(1)
    session.run({"x": few})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "DEVICE_MIB", (cuda_python.allocated + 256) / 2**20)
        with pytest.raises(InputError, match="(?i)memory"):
            session.run({"x": np.abs(batch(32))})
    for count in (1, 32):
        assert_same(session.run({"x": batch(count)}), expected(counted(), {"x": batch(count)}))
    session.close()
    gc.collect()
    assert cuda_python.allocated == 0


# ------------------------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("graphs", [True, False])
def test_layers_are_named_in_order_with_the_median_of_the_runs_after_the_first(gpu: stand_ins.Gpu, graphs: bool, tmp_path: Path) -> None:
    """The stand-in's n-th layer takes n microseconds for each number of the input, fifty times that with a new shape, and 1 % more each time."""
    session: Any = opened(tmp_path, cuda_graphs=graphs)
    assert isinstance(session, TimesLayers)
    for turn, count in enumerate((3, 1, 32, 3)):
        layers = session.layer_times({"x": batch(count)}, runs=5)
        assert gpu.reports == 6 * (turn + 1)
        middle = 1 + 0.01 * (6 * turn + 4)
        assert [layer.name for layer in layers] == ["MatMul_1", "Relu_2", "MatMul_3"]
        assert [layer.seconds for layer in layers] == pytest.approx([1e-6 * i * count * SIZE * middle for i in (1, 2, 3)])
    session.close()
    gc.collect()
    assert gpu.allocated == 0


def test_measuring_layers_leaves_graphs_and_answers_as_they_were(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    session: Any = opened(tmp_path)
    for seed in range(2):
        session.run({"x": batch(3, seed=seed)})
    session.layer_times({"x": batch(3, seed=7)}, runs=2)
    session.copy_seconds({"x": batch(3, seed=8)}, runs=2)
    assert cuda_python.captures == 1
    reports, launches = cuda_python.reports, cuda_python.launches
    for seed in range(3):
        sample = batch(3, seed=seed)
        assert_same(session.run({"x": sample}), expected(network(), {"x": sample}))
    assert cuda_python.launches == launches + 3
    assert cuda_python.reports == reports, "only what is measured has a profiler"
    session.close()


def test_layers_of_a_network_whose_sizes_depend_on_the_data(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    """Its outputs grow while they are measured."""
    session: Any = opened(tmp_path, counted())
    session.run({"x": -np.abs(batch(1))})
    layers = session.layer_times({"x": np.abs(batch(32))}, runs=3)
    assert [layer.name for layer in layers] == ["Greater_1", "NonZero_2", "Transpose_3", "Neg_4"]
    assert all(seconds > 0 for seconds in session.copy_seconds({"x": np.abs(batch(32))}, runs=3))
    for sample in (batch(5), np.abs(batch(32)), -np.abs(batch(2))):
        assert_same(session.run({"x": sample}), expected(counted(), {"x": sample}))
    session.close()
    gc.collect()
    assert gpu.allocated == 0


def test_no_memory_for_what_is_measured_is_an_error_and_the_session_goes_on(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    session: Any = opened(tmp_path, counted())
    session.run({"x": batch(1)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "DEVICE_MIB", (cuda_python.allocated + 256) / 2**20)
        with pytest.raises(InputError, match="(?i)memory"):
            session.layer_times({"x": np.abs(batch(32))}, runs=2)
    for count in (1, 32):
        assert_same(session.run({"x": batch(count)}), expected(counted(), {"x": batch(count)}))
    session.close()
    gc.collect()
    assert cuda_python.allocated == 0


def test_every_run_has_its_copies(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session: Any = opened(tmp_path)
    assert isinstance(session, TimesCopies)
    for count in (1, 32, 5):
        seconds = session.copy_seconds({"x": batch(count)}, runs=7)
        assert len(seconds) == 7
        assert all(one > 0 for one in seconds)
        assert_same(session.run({"x": batch(count)}), expected(network(), {"x": batch(count)}))
    session.close()


def test_what_cannot_be_run_cannot_be_measured(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session: Any = opened(tmp_path)
    for measure in (session.layer_times, session.copy_seconds):
        with pytest.raises(InputError, match=r"TensorRT: expected x float32\[1, 24\] to \[32, 24\], found x float32\[33, 24\]"):
            measure({"x": batch(33)}, runs=1)
    session.close()
    for measure in (session.layer_times, session.copy_seconds):
        with pytest.raises(InputError, match="TensorRT: expected an open session, found a closed one"):
            measure({"x": batch(1)}, runs=1)
    assert gpu.reports == 0


def test_calls_go_on_while_layers_are_measured(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    session: Any = opened(tmp_path)
    barrier = threading.Barrier(3)

    def work(index: int) -> None:
        barrier.wait()
        for turn in range(10):
            sample = batch(1 + (index + turn) % 5)
            if index == 0:
                assert len(session.layer_times({"x": sample}, runs=1)) == 3
            elif index == 1:
                assert len(session.copy_seconds({"x": sample}, runs=1)) == 1
            assert_same(session.run({"x": sample}), expected(network(), {"x": sample}))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    session.close()


# --------------------------------------------------------------------------------------------------------------------------- types


def test_half_and_integer_outputs_are_what_they_are(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
    ]
    data = graph(nodes, {}, [("half", TensorProto.FLOAT16, ["batch", SIZE]), ("best", TensorProto.INT64, ["batch"])])
    session = opened(tmp_path, data)
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.outputs] == [("half", "float16", ("batch", SIZE)), ("best", "int64", ("batch",))]
    for count in (3, 1, 3, 32):
        assert_same(session.run({"x": batch(count)}), expected(data, {"x": batch(count)}))
    session.close()


def test_half_inputs_are_taken_as_halves(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    data = graph([helper.make_node("Neg", ["x"], ["y"])], {}, [("y", TensorProto.FLOAT16, ["batch", SIZE])], kind=TensorProto.FLOAT16)
    session = opened(tmp_path, data)
    sample = batch(3).astype(np.float16)
    assert_same(session.run({"x": sample}), {"y": -sample})
    with pytest.raises(InputError, match=r"expected x float16\[1, 24\] to \[32, 24\], found x float32\[3, 24\]"):
        session.run({"x": batch(3)})
    session.close()


def test_a_type_that_numpy_has_not_is_unsupported(gpu: stand_ins.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stand_ins._TYPES, "tensor(float16)", ("BF16", np.float16))
    data = graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)], {}, [("y", TensorProto.FLOAT16, ["batch", SIZE])])
    with pytest.raises(UnsupportedBundleError, match="y: expected a type that NumPy has, found .*BF16"):
        opened(tmp_path, data)
    gc.collect()
    assert gpu.memory == {}


# ------------------------------------------------------------------------------------------------------------------ what is opened


@pytest.mark.parametrize("content", [b"", b"junk", b"ftrt" + b"\0" * 200])
def test_what_is_no_engine_is_unsupported_and_can_be_built_again(gpu: stand_ins.Gpu, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBundleError, match=rf"expected an engine that tensorrt {VERSION} loads, found one that it refuses: .*magicTag") as caught:
        opened(tmp_path, content)
    assert caught.value.hint == f"modelcrate rebuild {tmp_path}"
    gc.collect()
    assert gpu.memory == {}


def test_no_file_is_an_integrity_error(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    with pytest.raises(BundleIntegrityError, match=r"end2end\.engine: expected an engine, found: No such file"):
        open_artefact("tensorrt", {"net": tmp_path / "end2end.engine"}, SessionOptions(), where="bundle")
    assert gpu.streams == {}


def test_no_driver_is_a_missing_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    with machine_with_gpu():
        real = ctypes.CDLL

        def without(name: Any, *rest: Any, **more: Any) -> Any:
            if "libcuda" in str(name):
                raise OSError("libcuda.so.1: cannot open shared object file")
            return real(name, *rest, **more)

        monkeypatch.setattr(ctypes, "CDLL", without)
        with pytest.raises(MissingBackendError, match="expected an NVIDIA GPU, found no driver for one"):
            opened(tmp_path)
        monkeypatch.undo()


def test_a_driver_without_a_gpu_is_a_missing_backend(tmp_path: Path) -> None:
    with machine_with_gpu(gpu=stand_ins.Gpu(count=0)), pytest.raises(MissingBackendError, match="expected an NVIDIA GPU, found none") as caught:
        opened(tmp_path)
    assert "nvidia-smi" in caught.value.hint


def test_the_gpu_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    with machine_with_gpu(gpu=stand_ins.Gpu(count=2)) as gpu:
        assert find_gpu(1).index == 1
        opened(tmp_path, device_id=1).close()
        with pytest.raises(MissingBackendError, match="device_id: expected one of the 2 GPUs here, found 2"):
            opened(tmp_path, device_id=2)
        assert gpu.streams == {}


@pytest.mark.parametrize(("asked", "hint"), [(None, "cuda-bindings"), ("cuda-python", "cuda-bindings"), ("pycuda", "pycuda")])
def test_a_binding_that_is_not_installed_says_how_to_install_it(asked: str | None, hint: str, tmp_path: Path) -> None:
    with machine_with_gpu(binding=""), pytest.raises(MissingBackendError, match=f"running on a GPU needs {asked or 'cuda-python or pycuda'}") as caught:
        opened(tmp_path, cuda_binding=asked)
    assert f"pip install {hint}" in caught.value.hint


def test_one_binding_does_not_stand_in_for_the_other(tmp_path: Path) -> None:
    for there, asked in (BINDINGS, BINDINGS[::-1]):
        with machine_with_gpu(binding=there), pytest.raises(MissingBackendError, match=f"needs {asked}, not installed"):
            opened(tmp_path, cuda_binding=asked)


@pytest.mark.parametrize(("asked", "taken"), [(None, "cuda-python"), ("cuda-python", "cuda-python"), ("pycuda", "pycuda")])
def test_where_both_bindings_are_installed_one_can_choose(asked: str | None, taken: str, tmp_path: Path) -> None:
    with machine_with_gpu(binding="both") as gpu:
        session: Any = opened(tmp_path, cuda_binding=asked)
        for _ in range(2):
            assert_same(session.run({"x": batch(2)}), expected(network(), {"x": batch(2)}))
        assert session.binding == taken
        assert (gpu.launches > 0) == (taken == "cuda-python")
        session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_binding": "cupy"}, "cuda_binding: expected one of cuda-python, pycuda, found 'cupy'"),
        ({"device": "cpu"}, "device: expected cuda for TensorRT, found 'cpu'"),
        ({"device": "cuda:0"}, "device: expected cuda for TensorRT, found 'cuda:0'"),
        ({"providers": ("CUDAExecutionProvider",)}, "providers: expected none for TensorRT"),
    ],
)
def test_options_that_mean_nothing_are_errors(gpu: stand_ins.Gpu, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **options)
    gc.collect()
    assert (gpu.memory, gpu.streams) == ({}, {})


def test_an_engine_without_its_weights_is_filled_in_from_the_graph(gpu: stand_ins.Gpu, tmp_path: Path) -> None:
    (tmp_path / "end2end.onnx").write_bytes(network())
    (tmp_path / "other.onnx").write_bytes(network(1))
    (tmp_path / "end2end.engine").write_bytes(stand_ins.STRIPPED + network())
    options = SessionOptions(built_for=replace_record(RECORD, is_stripped=True))
    for name in ("end2end.onnx", "other.onnx"):
        files = {"net": tmp_path / "end2end.engine", "source": tmp_path / name}
        if name == "other.onnx":
            with pytest.raises(UnsupportedBundleError, match=r"expected to fill in the weights from other\.onnx"):
                open_artefact("tensorrt", files, options, where="bundle")
            continue
        session = open_artefact("tensorrt", files, options, where="bundle")
        assert_same(session.run({"x": batch(2)}), expected(network(), {"x": batch(2)}))
        session.close()


# ------------------------------------------------------------------------------------------------------------- what it was built for


RECORD = EngineRecord(
    library="tensorrt", version=VERSION, platform=this_platform(), gpu="Stand-in GPU", compute_capability="9.0", cuda=13000, onnx="end2end.onnx", onnx_sha256="0"
)  # fmt: skip
HERE = Gpu(index=0, name="Stand-in GPU", compute_capability=(9, 0), cuda=13000)


def replace_record(record: EngineRecord, **changes: Any) -> EngineRecord:
    import msgspec

    return msgspec.structs.replace(record, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cuda": 12000},
        {"gpu": "", "compute_capability": "", "cuda": 0},
        {"version": "11.3.0.99", "version_compatible": True},
        {"version": "11.0.0", "version_compatible": True},
        {"hardware_compatibility": "ampere+", "compute_capability": "8.0", "gpu": "A100"},
        {"hardware_compatibility": "ampere+", "compute_capability": "12.0", "gpu": "RTX 5090"},
        {"hardware_compatibility": "same_compute_capability", "gpu": "H200"},
        {"gpu": "H200"},
    ],
    ids=str,
)
def test_an_engine_that_fits_is_opened(changes: dict[str, Any], cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    record = replace_record(RECORD, **changes)
    check_engine(record, version=VERSION, gpu=HERE, where="bundle")
    session = opened(tmp_path, built_for=record)
    assert_same(session.run({"x": batch(2)}), expected(network(), {"x": batch(2)}))
    session.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "windows-amd64"}, rf"platform: expected windows-amd64, found {this_platform()}"),
        ({"version": "11.4.0.105"}, rf"tensorrt: expected version 11\.4\.0\.105, found {VERSION}"),
        ({"version": "11.4.0.107"}, rf"tensorrt: expected version 11\.4\.0\.107, found {VERSION}"),
        ({"version": "10.16.1.11"}, rf"tensorrt: expected version 10\.16\.1\.11, found {VERSION}"),
        ({"version": "11.5.0.1", "version_compatible": True}, rf"tensorrt: expected version 11\.5\.0\.1 or newer.*, found {VERSION}"),
        ({"compute_capability": "8.6", "gpu": "RTX 3090"}, r"compute capability: expected 8\.6 \(RTX 3090\), found 9\.0 \(Stand-in GPU\)"),
        ({"compute_capability": "9.1"}, r"compute capability: expected 9\.1 .*found 9\.0"),
        ({"hardware_compatibility": "same_compute_capability", "compute_capability": "8.9"}, r"compute capability: expected 8\.9 .*found 9\.0"),
    ],
    ids=str,
)
def test_an_engine_for_something_else_is_refused_before_it_is_loaded(changes: dict[str, Any], message: str, cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    """What is in the file does not matter: it is not looked at."""
    with pytest.raises(UnsupportedBundleError, match=f"{tmp_path}: the engine was built for something else: {message}") as caught:
        opened(tmp_path, b"junk", built_for=replace_record(RECORD, **changes))
    assert caught.value.hint == f"modelcrate rebuild {tmp_path}"
    assert (cuda_python.memory, cuda_python.streams) == ({}, {})


@pytest.mark.parametrize("capability", [(7, 5), (7, 0)])
def test_what_runs_from_ampere_on_is_refused_before_it(capability: tuple[int, int]) -> None:
    record = replace_record(RECORD, hardware_compatibility="ampere+")
    with pytest.raises(UnsupportedBundleError, match=r"compute capability: expected 8\.0 or newer, found 7\."):
        check_engine(record, version=VERSION, gpu=Gpu(index=0, name="Old", compute_capability=capability, cuda=12000), where="bundle")


def test_a_version_compatible_engine_runs_within_its_major_version() -> None:
    """NVIDIA's support matrix: with newer versions within the same major version."""
    record = replace_record(RECORD, version="10.16.1.11", version_compatible=True)
    check_engine(record, version="10.17.0.3", gpu=HERE, where="bundle")
    with pytest.raises(UnsupportedBundleError, match=r"tensorrt: expected version 10\.16\.1\.11"):
        check_engine(record, version=VERSION, gpu=HERE, where="bundle")


def test_an_engine_of_tensorrt_for_rtx_runs_on_every_gpu_that_it_supports() -> None:
    """As 1.7.1.116 says itself: 8.0, 8.6, 8.9, 12.0, 12.1 and newer, wherever they were built; not Turing, and of the data centres' GPUs not Hopper and its
    Blackwell. To build again would not help, and nobody says so."""
    record = replace_record(RECORD, library="tensorrt_rtx", version="1.7.1.116", gpu="RTX 4090", compute_capability="8.9")
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)):
        check_engine(record, version="1.7.1.116", gpu=replace(HERE, name="RTX", compute_capability=capability), where="bundle")
    for one in (record, replace_record(record, gpu="", compute_capability="")):
        for capability in ((7, 5), (8, 7), (9, 0), (10, 0)):
            with pytest.raises(UnsupportedBundleError, match=r"expected a GPU that TensorRT for RTX runs on .*8\.9, or 12\.0 and newer\), found [0-9.]+ \(H100\)") as caught:
                check_engine(one, version="1.7.1.116", gpu=replace(HERE, name="H100", compute_capability=capability), where="bundle")
            assert "rebuild" not in caught.value.hint
            assert "-t tensorrt-fp16" in caught.value.hint


def test_another_gpu_of_the_same_kind_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_engine(RECORD, version=VERSION, gpu=HERE, where="bundle")
        check_engine(replace_record(RECORD, gpu=""), version=VERSION, gpu=HERE, where="bundle")
        check_engine(replace_record(RECORD, gpu="H200", hardware_compatibility="same_compute_capability"), version=VERSION, gpu=HERE, where="bundle")
        assert not caplog.records
        check_engine(replace_record(RECORD, gpu="H200"), version=VERSION, gpu=HERE, where="bundle")
    assert ["bundle: the engine was built on H200 and tuned for it; here is Stand-in GPU"] == [record.getMessage() for record in caplog.records]


def test_without_a_record_the_library_is_the_judge(cuda_python: stand_ins.Gpu, tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(UnsupportedBundleError, match="found one that it refuses"):
        opened(tmp_path, b"junk")
