"""What every backend owes: one suite over every builder and the session that runs what it builds.

A backend that joins both tables is tested here without a line more.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import InputError, MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.builders import BUILDERS
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_runtime.sessions import BACKENDS, Session, SessionOptions, open_artefact, open_session
from modelcrate_runtime.sessions.cuda_device import find_gpu, require_binding

OWN_THREADS = {"openvino": 2}
"""Threads of a framework's scheduler, which wait for the one that computes."""
CASES = [(backend, task) for backend in BUILDERS for task in ("pose", "detector")]


@dataclass(frozen=True)
class Case:
    """A bundle of one backend and one task."""

    bundle: Bundle
    is_pose: bool

    def open(self, **options: object) -> Session:
        return open_session(self.bundle, SessionOptions(**options))

    @property
    def shape(self) -> tuple[int, ...]:
        _, *fixed = self.bundle.manifest.inputs[0].shape
        return tuple(int(dim) for dim in fixed)

    @property
    def most(self) -> int:
        """Inputs that one call may have."""
        return self.bundle.manifest.shape_ranges["input"].max[0]

    def sample(self, count: int, *, seed: int = 0) -> np.ndarray:
        """So many inputs, or as many as a call may have."""
        return np.random.default_rng(seed).standard_normal((min(count, self.most), *self.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    made: dict[tuple[str, str], Bundle] = {}

    def of(backend: str, task: str) -> Bundle:
        if (backend, task) not in made:
            folder = tmp_path_factory.mktemp(f"{backend}-{task}")
            if task == "pose":
                table, cfg = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=5, input_hw=(96, 64), hidden=32, s=16), ""
            else:
                table, cfg = rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=False), "test_pipeline = [dict(type='Resize', scale=(96, 96))]"
            torch.save({"state_dict": random_weights(table, seed=3), "meta": {"cfg": cfg}}, folder / "model.pth")
            (conversion,) = convert(folder / "model.pth", [load_config(backend)], ConvertOptions(out=folder / "crates"))
            assert conversion.error is None, conversion.error
            assert conversion.bundle is not None
            made[backend, task] = conversion.bundle
        return made[backend, task]

    return of


@pytest.fixture(params=CASES, ids=lambda value: "-".join(value))
def case(request: pytest.FixtureRequest, converted: Callable[[str, str], Bundle]) -> Case:
    backend, task = request.param
    if not BACKENDS[backend].is_installed:
        pytest.skip(f"needs {backend}: {BACKENDS[backend].install_command}")
    if BUILDERS[backend].needs_gpu:
        try:
            find_gpu()
            require_binding()
        except MissingBackendError as error:
            pytest.skip(f"{error} ({error.hint})")
    return Case(converted(backend, task), task == "pose")


@pytest.fixture
def session(case: Case) -> Iterator[Session]:
    opened = case.open()
    yield opened
    opened.close()


def test_every_builder_has_a_session_and_an_extra() -> None:
    assert set(BUILDERS) <= set(BACKENDS)
    for backend in BACKENDS.values():
        assert backend.extra in backend.install_command


def test_a_session_has_the_tensors_that_the_manifest_promises(case: Case, session: Session) -> None:
    manifest = case.bundle.manifest
    assert manifest is not None
    assert list(session.inputs) == manifest.inputs
    assert list(session.outputs) == manifest.outputs
    raw = [f"{kind}_{level}" for kind in ("cls", "dist") for level in range(3)]
    boxes = ["dets", "labels"] if case.bundle.pipeline.postprocess.component == "ResizeBBox" else raw
    assert sorted(spec.name for spec in session.outputs) == (["simcc_x", "simcc_y"] if case.is_pose else boxes)
    assert manifest.inputs[0] == TensorSpec(name="input", dtype="float32", shape=("batch" if case.most > 1 else 1, *case.shape))


@pytest.mark.parametrize("count", [1, 3])
def test_arrays_are_what_their_specs_say(case: Case, session: Session, count: int) -> None:
    sample = case.sample(count)
    found = session.run({"input": sample})
    assert list(found) == [spec.name for spec in session.outputs]
    for spec in session.outputs:
        assert found[spec.name].dtype == np.dtype(spec.dtype)
        assert found[spec.name].shape == (len(sample), *spec.shape[1:])
        assert np.isfinite(found[spec.name]).all()


def test_a_batch_is_its_inputs_one_by_one(case: Case, session: Session) -> None:
    if case.most == 1:
        with pytest.raises(InputError, match=r"expected input float32\[1, "):
            session.run({"input": np.zeros((2, *case.shape), dtype=np.float32)})
        return
    batch = case.sample(4)
    together = session.run({"input": batch})
    alone = [session.run({"input": batch[i : i + 1]}) for i in range(4)]
    assert not np.array_equal(together[session.outputs[0].name][0], together[session.outputs[0].name][1])
    for name, value in together.items():
        expected = np.concatenate([one[name] for one in alone])
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * scale)


def test_every_batch_size_that_the_manifest_allows_runs(case: Case, session: Session) -> None:
    limits = case.bundle.manifest.shape_ranges["input"]
    for count in (limits.min[0], limits.opt[0], limits.max[0]):
        assert len(session.run({"input": case.sample(count)})[session.outputs[0].name]) == count


def test_answers_do_not_depend_on_the_call(case: Case, session: Session) -> None:
    """No state: the same input again, with another one between, and the caller's array is as it was."""
    first = case.sample(2)
    before = first.copy()
    expected = session.run({"input": first})
    session.run({"input": case.sample(3, seed=1)})
    again = session.run({"input": first})
    np.testing.assert_array_equal(first, before)
    for name in expected:
        np.testing.assert_array_equal(again[name], expected[name])


def test_arrays_of_any_layout_and_read_only_ones_are_taken(case: Case, session: Session) -> None:
    plain = case.sample(2)
    strided = np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    locked = plain.copy()
    locked.flags.writeable = False
    expected = session.run({"input": plain})
    for other in (strided, locked):
        found = session.run({"input": other})
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_inputs_that_the_network_does_not_take_are_refused_with_both_shapes(case: Case, session: Session) -> None:
    channels, height, width = case.shape
    good = case.sample(1)
    wrong = {
        "size": {"input": np.zeros((1, channels, height + 32, width), dtype=np.float32)},
        "channels": {"input": np.zeros((1, 1, height, width), dtype=np.float32)},
        "rank": {"input": np.zeros((channels, height, width), dtype=np.float32)},
        "dtype": {"input": good.astype(np.float64)},
        "name": {"image": good},
        "surplus": {"input": good, "image": good},
        "none": {},
    }
    for what, feeds in wrong.items():
        with pytest.raises(InputError) as caught:
            session.run(feeds)
        assert "\n" not in str(caught.value), what
        first = "'batch'" if case.most > 1 else "1"
        assert f"input float32[{first}, {channels}, {height}, {width}]" in str(caught.value), what
    session.run({"input": good})


def test_two_sessions_run_in_two_threads(case: Case) -> None:
    sessions = [case.open(threads=1) for _ in range(2)]
    inputs = [case.sample(2, seed=seed) for seed in range(2)]
    expected = [session.run({"input": tensor}) for session, tensor in zip(sessions, inputs, strict=True)]
    barrier = threading.Barrier(2)

    def work(i: int) -> list[dict[str, np.ndarray]]:
        barrier.wait()
        return [sessions[i].run({"input": inputs[i]}) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for i, results in enumerate(pool.map(work, range(2))):
            for found in results:
                for name in expected[i]:
                    np.testing.assert_array_equal(found[name], expected[i][name])
    for session in sessions:
        session.close()


def test_one_session_may_be_called_from_several_threads(case: Case, session: Session) -> None:
    inputs = [case.sample(1, seed=seed) for seed in range(4)]
    expected = [session.run({"input": tensor}) for tensor in inputs]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda k: session.run({"input": inputs[k % 4]}), range(24))):
            for name in found:
                np.testing.assert_allclose(found[name], expected[i % 4][name], rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_is_the_callers_and_changes_no_answer(case: Case) -> None:
    tensor = case.sample(2)
    results = []
    for threads in (1, 2, None):
        session = case.open(threads=threads)
        if threads is not None:
            assert session.threads == threads
        results.append(session.run({"input": tensor}))
        session.close()
    for other in results[1:]:
        for name, value in results[0].items():
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-5 * scale)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads and files in Linux's /proc")
def test_one_thread_is_one_thread(case: Case) -> None:
    """A session that may use one thread starts none that computes."""
    case.open(threads=1).close()
    before = len(os.listdir("/proc/self/task"))
    session = case.open(threads=1)
    session.run({"input": case.sample(2)})
    assert len(os.listdir("/proc/self/task")) <= before + OWN_THREADS.get(case.bundle.model.backend, 0)
    session.close()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads and files in Linux's /proc")
def test_opening_and_closing_leaves_no_threads_files_or_memory(case: Case) -> None:
    tensor = case.sample(1)

    def once() -> None:
        session = case.open(threads=2)
        session.run({"input": tensor})
        session.close()

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for _ in range(20):
        once()
    before, mib = counts(), resident_mib()
    for _ in range(200 if case.is_pose else 30):  # OpenVINO compiles a detector for a quarter of a second each time
        once()
    after = counts()
    assert after[0] <= before[0], f"threads: {before[0]} -> {after[0]}"
    assert after[1] <= before[1], f"open files: {before[1]} -> {after[1]}"
    grown = resident_mib() - mib
    assert grown < 25, f"memory grew by {grown:.1f} MiB"  # one network leaked each time would be hundreds


def test_a_backend_without_a_session_is_refused_with_those_that_exist(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBundleError, match=f"expected one of .*{case.bundle.model.backend}.*found 'abacus'") as caught:
        open_artefact("abacus", {"net": tmp_path / "net"}, SessionOptions(), where="here")
    assert caught.value.hint


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_backend_that_is_not_installed_says_how_to_install_it(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None among the loaded modules is Python's own way to say that there is no such module."""
    monkeypatch.setitem(sys.modules, BACKENDS[backend].module, None)
    with pytest.raises(MissingBackendError, match=f"needs {backend}, which is not installed") as caught:
        open_artefact(backend, {"net": tmp_path / "net"}, SessionOptions(), where="here")
    assert caught.value.hint == BACKENDS[backend].install_command
