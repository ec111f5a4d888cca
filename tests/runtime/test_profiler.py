"""What running something costs: stages on a clock that is ours, and whole profiles of real networks, whose figures must fit together."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import modelcrate_converter.cli  # noqa: F401  # from then on checkpoints are subjects too
from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import BundleError, ConfigError, InputError, MissingBackendError, TaskMismatchError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.reference import TorchSession
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.measurement import Latency, doubts
from modelcrate_runtime.profiler import (
    Profile,
    ProfileOptions,
    Stopwatch,
    beside_seconds,
    call_of,
    latency_ms,
    network_call,
    noise_image,
    profile,
    split_call,
    spread_boxes,
)
from modelcrate_runtime.sessions import BACKENDS, SessionOptions, TimesCopies, TimesLayers, open_artefact
from modelcrate_runtime.subjects import Subject, find_subject, of_bundle
from modelcrate_runtime.tasks import Detector, PoseDetector, open_task
from stand_ins import machine_with_gpu

PATHS = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("sdk_bundle", "runtimes", "converter"))
LOCAL = [name for name in ("onnxruntime", "openvino", "ncnn") if BACKENDS[name].is_installed]
SUBJECTS = [*LOCAL, "pytorch"]
QUICK = ProfileOptions(warmup=1, runs=3, threads=(1,))
MIB = 2**20


class FakeNetwork:
    """A network of one input that takes some seconds of a clock that is ours.

    Attributes:
        streams: as a session's.
        calls: method and thread of each call.
        is_closed: whether it was closed.
    """

    def __init__(self, clock: FakeClock | None = None, *, seconds: float = 0.0, batch: int | str = "batch", streams: int = 1, work: Callable[[], None] = lambda: None) -> None:
        self.inputs = (TensorSpec(name="x", dtype="float32", shape=(batch, 2)),)
        self.outputs = (TensorSpec(name="y", dtype="float32", shape=(batch, 2)),)
        self.streams = streams
        self.calls: list[tuple[str, int]] = []
        self.is_closed = False
        self._clock, self._seconds, self._work = clock, seconds, work

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._run("run", feeds)

    def run_beside(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._run("run_beside", feeds)

    def _run(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append((name, threading.get_ident()))
        self._work()
        if self._clock is not None:
            self._clock.now += self._seconds
        return {"y": 2 * feeds["x"]}

    def close(self) -> None:
        self.is_closed = True


class FakeClock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


# ------------------------------------------------------------------------------------------------------------------------- stages


def test_a_call_is_divided_at_its_network() -> None:
    clock = FakeClock()
    watch = Stopwatch(FakeNetwork(clock, seconds=2.0), clock)

    def call() -> None:
        clock.spend(0.5)
        assert watch.run({"x": np.ones((1, 2))})["y"].tolist() == [[2, 2]]
        clock.spend(0.25)

    for _ in range(2):
        assert split_call(call, watch, clock) == {"preprocess": 0.5, "infer": 2.0, "postprocess": 0.25, "call": 2.75}


@pytest.mark.parametrize("method", ["run", "run_beside"])
def test_what_lies_between_two_runs_of_the_network_prepares_the_second(method: str) -> None:
    clock = FakeClock()
    watch = Stopwatch(FakeNetwork(clock, seconds=4.0), clock)

    def call() -> None:
        for _ in range(3):
            clock.spend(1.0)
            getattr(watch, method)({"x": np.ones((1, 2))})
        clock.spend(0.5)

    assert split_call(call, watch, clock) == {"preprocess": 3.0, "infer": 12.0, "postprocess": 0.5, "call": 15.5}


def test_a_call_without_its_network_is_an_error_and_no_earlier_run_stands_for_it() -> None:
    clock = FakeClock()
    watch = Stopwatch(FakeNetwork(clock, seconds=1.0), clock)
    split_call(lambda: watch.run({"x": np.ones((1, 2))}), watch, clock)
    with pytest.raises(InputError, match="profile: expected a call that runs the network, found one that does not: are there boxes"):
        split_call(lambda: clock.spend(1.0), watch, clock)


def test_a_network_under_a_stopwatch_is_the_network_with_one_stream() -> None:
    network = FakeNetwork(streams=8)
    watch = Stopwatch(network)
    assert (watch.inputs, watch.outputs, watch.streams) == (network.inputs, network.outputs, 1)
    watch.close()
    assert network.is_closed


def test_stages_of_a_real_call_add_up(demo_pose_bundle: Path) -> None:
    watches: list[Stopwatch] = []
    with of_bundle(Bundle.open(demo_pose_bundle)).open(SessionOptions(threads=1), wrap=lambda session: watches.append(Stopwatch(session)) or watches[-1]) as task:
        call = call_of(task, noise_image(), boxes=40)
        stages = split_call(call, watches[0])
    assert len(watches[0].runs) == 2, "40 crops are two calls of the network, which takes 32"
    assert all(seconds > 0 for seconds in stages.values())
    assert stages["preprocess"] + stages["infer"] + stages["postprocess"] == pytest.approx(stages["call"], rel=1e-6)


# -------------------------------------------------------------------------------------------------------------------------- calls


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 60))
def test_boxes_lie_in_the_image_wherever_they_are(height: int, width: int, count: int) -> None:
    boxes = spread_boxes((height, width), count)
    assert (boxes.shape, boxes.dtype) == ((count, 4), np.float32)
    slack = 1e-3 + 1e-6 * max(height, width)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width + slack).all()
    assert (boxes[:, 3] <= height + slack).all()
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], np.broadcast_to([0.4 * width, 0.6 * height], (count, 2)), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(boxes, spread_boxes((height, width), count + 3)[:count])


def test_boxes_are_spread() -> None:
    corners = spread_boxes((1000, 1000), 32)[:, :2]
    distances = np.linalg.norm(corners[:, None] - corners[None], axis=2)
    assert distances[~np.eye(32, dtype=bool)].min() > 30
    assert np.ptp(corners[:, 0]) > 0.8 * 600
    assert np.ptp(corners[:, 1]) > 0.8 * 400


def test_a_call_of_crops_has_as_many_as_asked_and_one_of_images_none(demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    with PoseDetector(demo_pose_bundle) as pose, Detector(demo_detector_bundle) as detector:
        assert call_of(pose, noise_image(), boxes=3)().shape == (3, 17, 3)
        assert call_of(pose, noise_image())().shape == (1, 17, 3)
        boxes, _, _ = call_of(detector, noise_image(), boxes=3)()
        assert boxes.shape[1] == 5


def test_the_network_alone_takes_a_batch(demo_pose_bundle: Path) -> None:
    with PoseDetector(demo_pose_bundle) as estimator:
        assert network_call(estimator.session, batch=3)()["simcc_x"].shape[0] == 3
        assert network_call(estimator.session)()["simcc_x"].shape[0] == 1
        assert latency_ms(estimator.session, runs=3, warmup=1) > 0


def test_a_fixed_batch_is_the_only_one() -> None:
    fixed = FakeNetwork(batch=4)
    for batch in (None, 4):
        assert network_call(fixed, batch=batch)()["y"].shape == (4, 2)
    with pytest.raises(ConfigError, match="batch: expected 4, the only one that the network takes, found 2"):
        network_call(fixed, batch=2)


def test_what_a_network_is_timed_on_is_random_and_the_same_every_time() -> None:
    first, second = (network_call(FakeNetwork(), batch=100)()["y"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert 1.5 < first.std() < 2.5
    assert len(np.unique(first)) == first.size


def test_a_bundle_is_opened_in_the_class_of_its_task(demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    for place, kind in ((demo_pose_bundle, PoseDetector), (demo_detector_bundle, Detector)):
        with open_task(Bundle.open(place), threads=1) as task:
            assert type(task) is kind
    foreign = Bundle.open(demo_pose_bundle)
    foreign.pipeline.postprocess.module = "mmocr"
    with pytest.raises(TaskMismatchError, match="found a bundle of mmocr"):
        open_task(foreign)


# ------------------------------------------------------------------------------------------------------------------------ callers


@pytest.mark.parametrize("callers", [1, 2, 5])
@pytest.mark.parametrize(("streams", "method"), [(1, "run"), (4, "run_beside")])
def test_callers_share_the_runs_and_call_at_once(callers: int, streams: int, method: str) -> None:
    """Each run waits until all callers are in one."""
    together = threading.Barrier(callers)
    network = FakeNetwork(streams=streams, work=lambda: together.wait(30) and None)
    seconds, spent = beside_seconds(network, callers=callers, batch=3, runs=4 * callers, warmup=0)
    assert len(seconds) == len(network.calls) == 4 * callers
    assert {name for name, _ in network.calls} == {method}
    assert len({thread for _, thread in network.calls}) == callers
    assert threading.get_ident() not in {thread for _, thread in network.calls}
    assert all(0 < one <= spent for one in seconds)
    assert sum(seconds) <= callers * spent


def test_the_warmup_of_callers_does_not_count() -> None:
    network = FakeNetwork()
    seconds, _ = beside_seconds(network, callers=2, batch=1, runs=7, warmup=5)
    assert (len(seconds), len(network.calls)) == (7, 12)


def test_more_callers_than_runs_do_no_more_runs() -> None:
    network = FakeNetwork()
    assert len(beside_seconds(network, callers=6, batch=1, runs=2, warmup=0)[0]) == len(network.calls) == 2


def test_the_time_of_all_callers_begins_with_the_first_call_however_late_the_other_threads_wake_up() -> None:
    """The clock of the thread that waits for the callers stands still until they are done, as it does on a machine with too few cores."""
    asking, ticks, done = threading.get_ident(), itertools.count(1), threading.Event()
    network = FakeNetwork(work=lambda: len(network.calls) == 5 and done.set())

    def clock() -> float:
        if threading.get_ident() == asking:
            done.wait(1)
        return float(next(ticks))

    seconds, spent = beside_seconds(network, callers=1, batch=1, runs=5, warmup=0, clock=clock)
    assert seconds == [1.0] * 5
    assert spent >= 9, "from the first tick to the tenth"


def test_an_error_of_one_caller_is_raised_and_no_thread_is_left() -> None:
    before = threading.active_count()
    order = itertools.count()

    def work() -> None:
        if next(order) == 3:
            raise InputError("the fourth")

    with pytest.raises(InputError, match="the fourth"):
        beside_seconds(FakeNetwork(work=work), callers=3, batch=1, runs=50, warmup=0)
    assert threading.active_count() == before


# ----------------------------------------------------------------------------------------------------------------- whole profiles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, demo_pose_bundle: Path) -> dict[str, Path]:
    """Backend -> the trained pose estimator for it."""
    others = [load_config(name) for name in LOCAL if name != "onnxruntime"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelcrate_runtime.sessions.ncnn_session.usable_cores", lambda: 1)  # its threads wait in loops for cores that other tests have
        made = convert(DEMO_MODELS["demo-pose"], others, ConvertOptions(out=tmp_path_factory.mktemp("crates"), name="demo-pose")) if others else []
    for conversion in made:
        if conversion.error is not None:
            raise conversion.error
    return {"onnxruntime": demo_pose_bundle} | {Bundle.open(one.place).model.backend: one.place for one in made}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, size_hw in enumerate(((120, 160), (90, 200))):
        cv2.imwrite(str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (*size_hw, 3), dtype=np.uint8))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def subject_of(bundles: dict[str, Path]) -> Callable[[str], Subject]:
    return lambda backend: find_subject("demo-pose" if backend == "pytorch" else str(bundles[backend]))


@contextmanager
def torch_threads() -> Any:
    """Leave PyTorch with as many as it had: they are the process's."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profiles(subject_of: Callable[[str], Subject], photos: list[Path]) -> dict[str, Profile]:
    """Backend -> all that can be measured in this process."""
    options = ProfileOptions(warmup=1, runs=4, batches=(1, 3), threads=(1,), streams=(1, 2), layers=3)
    with torch_threads():
        return {name: profile(subject_of(name), photos, options, boxes=2) for name in SUBJECTS}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_profile_says_what_was_measured(profiles: dict[str, Profile], bundles: dict[str, Path], photos: list[Path], name: str) -> None:
    found = profiles[name]
    assert (found.name, found.backend, found.precision, found.task) == (f"demo-pose_{name}", name, "fp32", "PoseDetector")
    assert (found.device, found.threads, found.warmup, found.boxes) == ("cpu", 1, 1, 2)
    assert found.images == [str(path) for path in photos]
    files = [DEMO_MODELS["demo-pose"]] if name == "pytorch" else [path for path in bundles[name].iterdir() if path.name.startswith("end2end")]
    assert found.size_bytes == sum(path.stat().st_size for path in files)
    assert found.open_s > 0
    assert found.cold is None
    assert found.schema == "modelcrate.profile/1"
    assert time.strptime(found.at, "%Y-%m-%dT%H:%M:%SZ")
    assert found.host.cores == usable_cores()


@pytest.mark.parametrize("name", SUBJECTS)
def test_all_rows_have_the_same_stages_and_as_many_calls_as_asked(profiles: dict[str, Profile], name: str) -> None:
    found = profiles[name]
    copies = ["copy"] if name == "ncnn" else []
    assert list(found.stages) == ["load image", "preprocess", "infer", "postprocess", *copies]
    assert set(found.samples) == {*found.stages, "call"}
    for stage, seconds in found.samples.items():
        of = found.call if stage == "call" else found.stages[stage]
        assert len(seconds) == of.count == 4
        assert all(one > 0 for one in seconds)
        assert of == Latency.of(seconds)
    parts = np.sum([found.samples[stage] for stage in ("preprocess", "infer", "postprocess")], axis=0)
    np.testing.assert_allclose(parts, found.samples["call"], rtol=1e-6)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_network_alone_has_a_row_for_all_that_was_asked_for(profiles: dict[str, Profile], name: str) -> None:
    """And a batch that it does not take is left out by name, with what it takes."""
    found = profiles[name]
    batches = [1] if name == "ncnn" else [1, 3]
    assert [(row.batch, row.threads, row.streams) for row in found.network] == [(batch, 1, 1) for batch in batches] + [(1, 1, 1), (1, 1, 2)]
    for row in found.network:
        assert len(row.samples) == row.latency.count == 4
        assert all(one > 0 for one in row.samples)
        assert row.latency.median_ms == pytest.approx(1e3 * np.median(row.samples))
        if row.streams == 1 and row.batch > 1:
            assert row.latency.per_second == pytest.approx(row.batch / np.mean(row.samples))
    assert set(found.left_out) == ({3} if name == "ncnn" else set())
    assert all("expected 1, the only one that the network takes, found 3" in why for why in found.left_out.values())


@pytest.mark.parametrize("name", SUBJECTS)
def test_callers_at_once_have_the_throughput_of_all_of_them(profiles: dict[str, Profile], name: str) -> None:
    for row in profiles[name].network[-1:]:
        assert row.streams == 2
        spent = row.latency.count * row.batch / row.latency.per_second
        assert max(row.samples) <= spent * (1 + 1e-9)
        assert sum(row.samples) <= 2 * spent * (1 + 1e-9)


@pytest.mark.parametrize("name", SUBJECTS)
def test_layers_have_names_and_times_that_add_up_to_about_a_call(profiles: dict[str, Profile], name: str) -> None:
    layers = profiles[name].layers
    assert len(layers) > 40
    assert all(layer.name and layer.kind for layer in layers)
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.seconds >= 0 for layer in layers)
    assert sum(layer.seconds > 0 for layer in layers) > 0.3 * len(layers), "OpenVINO counts in microseconds"
    assert 30 < sum("conv" in layer.kind.lower() for layer in layers) < 60, "38 convolutions"
    alone = [row.latency.min_ms for row in profiles[name].network if (row.batch, row.threads, row.streams) == (1, 1, 1)]
    assert 0.05 * min(alone) < 1e3 * sum(layer.seconds for layer in layers) < 30 * min(alone)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_profile_survives_json(profiles: dict[str, Profile], name: str) -> None:
    found = profiles[name]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Profile) == found


@pytest.mark.parametrize("name", SUBJECTS)
def test_doubts_are_of_the_calls_of_the_machine_and_of_rows_by_name(profiles: dict[str, Profile], name: str) -> None:
    found = profiles[name]
    of_rows = [doubt for doubt in found.doubts if doubt.what.startswith("network, ")]
    assert [doubt for doubt in found.doubts if doubt not in of_rows] == doubts(found.samples["call"], found.load)
    assert "few" in [doubt.kind for doubt in found.doubts]
    rows = [f"network, batch {row.batch}, {row.threads} threads, {row.streams} callers: " for row in found.network]
    assert all(any(doubt.what.startswith(row) for row in rows) for doubt in of_rows)
    assert "few" not in [doubt.kind for doubt in of_rows], "that is said once"


def test_without_an_image_noise_is_measured_and_nothing_is_loaded(demo_detector_bundle: Path) -> None:
    found = profile(find_subject(str(demo_detector_bundle)), options=QUICK, boxes=5)
    assert found.task == "Detector"
    assert found.images == ["noise 640x480"]
    assert found.boxes == 0, "a detector has no boxes"
    assert list(found.stages) == ["preprocess", "infer", "postprocess"]
    assert found.layers == []
    assert [(row.batch, row.threads, row.streams) for row in found.network] == [(1, 1, 1)]


def test_threads_that_nobody_chose_are_those_that_it_ran_with() -> None:
    """PyTorch's are the process's: here conftest.py took all but one away."""
    with torch_threads():
        found = profile(find_subject("demo-pose"), options=replace(QUICK, threads=(None,)))
        assert found.threads == found.network[0].threads == torch.get_num_threads() == usable_cores()


def test_what_is_done_is_told(demo_pose_bundle: Path, photos: list[Path]) -> None:
    told: list[tuple[str, int, int]] = []
    options = replace(QUICK, batches=(1, 2), streams=(2,))
    profile(find_subject(str(demo_pose_bundle)), photos, options, report=lambda *done: told.append(done))
    assert told == [("stages", i, 4) for i in (1, 2, 3, 4)] + [("network", i, 3) for i in (1, 2, 3)]


def test_no_batch_that_the_network_takes_is_an_error_with_the_reason(bundles: dict[str, Path], demo_pose_bundle: Path) -> None:
    if "ncnn" not in bundles:
        pytest.skip("needs ncnn: pip install 'modelcrate[ncnn]'")
    with pytest.raises(ConfigError, match="batch: expected 1, the only one that the network takes, found 2") as caught:
        profile(find_subject(str(bundles["ncnn"])), options=replace(QUICK, batches=(2, 4)))
    assert "--batch" in caught.value.hint
    assert str(caught.value).count("batch:") == 1


def test_a_batch_that_there_is_no_memory_for_is_left_out_by_name(demo_pose_bundle: Path) -> None:
    found = profile(find_subject(str(demo_pose_bundle)), options=replace(QUICK, batches=(1, 10**10)))
    assert [row.batch for row in found.network] == [1]
    assert "memory" in found.left_out[10**10].lower()


@pytest.mark.parametrize(("content", "message"), [(None, "found: No such file"), (b"", "found an empty file"), (b"text", "OpenCV cannot decode")])
def test_an_image_that_cannot_be_read_is_an_error_before_anything_is_opened(demo_pose_bundle: Path, photos: list[Path], tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    subject = replace(find_subject(str(demo_pose_bundle)), open_network=lambda options: pytest.fail("opened"))
    with pytest.raises(InputError, match=message):
        profile(subject, [photos[0], tmp_path / "bad.png"], QUICK)


@pytest.mark.parametrize("when", [("stages", 2), ("network", 1), ("network", 2)], ids=str)
def test_ctrl_c_closes_what_is_open(demo_pose_bundle: Path, when: tuple[str, int]) -> None:
    opened: list[Any] = []
    subject = find_subject(str(demo_pose_bundle))
    tracked = replace(subject, open_network=lambda options: opened.append(subject.open_network(options)) or opened[-1])
    networks = itertools.count(1)

    def report(what: str, done: int, total: int) -> None:
        if (what, next(networks) if what == "network" else done) == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(tracked, options=replace(QUICK, threads=(1, 2)), report=report)
    assert len(opened) == (2 if when == ("network", 2) else 1)
    for session in opened:
        with pytest.raises(InputError, match="expected an open session, found a closed one"):
            network_call(session)()


def test_every_number_of_threads_has_a_network_of_its_own_and_all_are_closed(demo_pose_bundle: Path) -> None:
    opened: list[Any] = []
    subject = find_subject(str(demo_pose_bundle))
    tracked = replace(subject, open_network=lambda options: opened.append(subject.open_network(options)) or opened[-1])
    found = profile(tracked, options=replace(QUICK, threads=(1, 2), batches=(1, 2), streams=(2,)))
    expected = [(batch, threads, streams) for threads in (1, 2) for batch, streams in ((1, 1), (2, 1), (1, 2))]
    assert [(row.batch, row.threads, row.streams) for row in found.network] == expected
    assert found.threads == 1
    assert [session.threads for session in opened] == [1, 2]
    for session in opened:
        with pytest.raises(InputError, match="expected an open session, found a closed one"):
            network_call(session)()


def test_a_session_that_can_say_nothing_more_is_still_profiled(demo_pose_bundle: Path) -> None:
    """Neither layers nor copies: a stopwatch has the face of a session and no more."""
    subject = find_subject(str(demo_pose_bundle))
    plain = replace(subject, open_network=lambda options: Stopwatch(subject.open_network(options)))
    found = profile(plain, options=replace(QUICK, layers=2))
    assert found.layers == []
    assert "copy" not in found.stages


# ------------------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", SUBJECTS)
def test_measuring_layers_changes_no_answer_and_leaves_no_file(
    subject_of: Callable[[str], Subject], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session: Any = subject_of(name).open_network(SessionOptions(threads=1))
    feeds = {session.inputs[0].name: np.random.default_rng(1).standard_normal((1, 3, 256, 192)).astype(np.float32)}
    before = session.run(feeds)
    assert isinstance(session, TimesLayers)
    assert isinstance(session, TimesCopies) == (name == "ncnn")
    first, second = (session.layer_times(feeds, runs=runs) for runs in (1, 2))
    if name == "openvino":  # what takes less than a microsecond is not there; a convolution takes more
        convolutions = [[layer.name for layer in layers if layer.kind.startswith("Convolution")] for layers in (first, second)]
        assert convolutions[0] == convolutions[1]
    else:  # ONNX Runtime orders and numbers what it adds anew each time it loads
        assert sorted(layer.kind for layer in first) == sorted(layer.kind for layer in second)
    if name == "ncnn":
        assert len(session.copy_seconds(feeds, runs=3)) == 3
    for key, value in session.run(feeds).items():
        np.testing.assert_array_equal(value, before[key])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="expected"):
        session.layer_times({"nothing": feeds[session.inputs[0].name]}, runs=1)
    session.close()
    with pytest.raises(InputError, match="expected an open session, found a closed one"):
        session.layer_times(feeds, runs=1)


class Reused(torch.nn.Module):
    """One module three times, one inside another, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = torch.nn.ReLU()
        self.block = torch.nn.Sequential(torch.nn.Identity())
        self.idle = torch.nn.Tanh()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        for _ in range(3):
            x = self.relu(x)
        return self.block(x), x


def test_a_module_that_is_used_several_times_is_one_layer() -> None:
    """And hooks are taken off again, whatever happens."""
    model = read_architecture(read_checkpoint(DEMO_MODELS["demo-pose"]), name="demo-pose")
    module = Reused()
    session = TorchSession(replace(model, module=module))
    feeds = {model.input.name: np.zeros((1, 3, 4, 4), dtype=np.float32)}
    layers = session.layer_times(feeds, runs=5)
    assert [(layer.name, layer.kind) for layer in layers] == [("relu", "ReLU"), ("block.0", "Identity")]
    assert all(layer.seconds > 0 for layer in layers)
    assert module.calls == 6
    with pytest.raises(InputError, match="expected the input"):
        session.layer_times({"other": feeds[model.input.name]}, runs=2)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


# ----------------------------------------------------------------------------------------------------------------------- TensorRT


def test_a_profile_on_a_gpu_has_copies_and_layers(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """The stand-in runs the ONNX file of the bundle for ONNX Runtime as its engine."""
    bundle = Bundle.open(demo_pose_bundle)
    engine = tmp_path / "end2end.engine"
    engine.write_bytes(bundle.path_of(bundle.model.net).read_bytes())
    with machine_with_gpu() as gpu:
        subject = replace(
            of_bundle(bundle),
            name="demo-pose_tensorrt",
            backend="tensorrt",
            open_network=lambda options: open_artefact("tensorrt", {"net": engine}, options, where="bundle"),
        )
        found = profile(subject, options=ProfileOptions(warmup=1, runs=3, batches=(1, 2, 33), layers=4, streams=(2,)))
        assert gpu.allocated == 0
    assert found.device == "cuda"
    assert found.host.gpu == "" or found.host.gpu == gpu.name
    assert list(found.stages) == ["preprocess", "infer", "postprocess", "copy"]
    assert len(found.samples["copy"]) == 3
    assert len(found.layers) > 100
    assert gpu.reports == 5
    assert [(row.batch, row.streams) for row in found.network] == [(1, 1), (2, 1), (1, 2)]
    assert "to [32, 3, 256, 192], found input float32[33, 3, 256, 192]" in found.left_out[33]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Profile) == found


# --------------------------------------------------------------------------------------------------------------- a fresh process


@pytest.fixture(scope="module")
def fresh(subject_of: Callable[[str], Subject], photos: list[Path]) -> dict[str, Profile]:
    """The lightest and the heaviest."""
    with torch_threads():
        return {name: profile(subject_of(name), photos[:1], replace(QUICK, cold=1), boxes=2) for name in ("onnxruntime", "pytorch")}


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_the_parts_of_a_first_result_add_up_and_memory_grows(fresh: dict[str, Profile], name: str) -> None:
    cold = fresh[name].cold
    assert cold is not None
    assert min(cold.import_s, cold.open_s, cold.first_s) > 0
    assert cold.import_s + cold.open_s + cold.first_s == pytest.approx(cold.total_s)
    if sys.platform == "linux":
        assert cold.imported_bytes is not None and cold.opened_bytes is not None and cold.peak_bytes is not None  # noqa: PT018
        assert 10 * MIB < cold.imported_bytes < cold.opened_bytes <= cold.peak_bytes + 8 * MIB
        assert cold.peak_bytes < 2000 * MIB
    assert msgspec.json.decode(msgspec.json.encode(fresh[name]), type=Profile) == fresh[name]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: Linux")
def test_what_is_imported_has_the_framework_with_it(fresh: dict[str, Profile]) -> None:
    """PyTorch has more than 100 MiB; the network of this checkpoint has 7."""
    cold = fresh["pytorch"].cold
    assert cold is not None
    assert (cold.imported_bytes or 0) > 120 * MIB


OPEN_S = """
import sys, time
real = time.perf_counter
time.perf_counter = lambda: real() + (1000.0 if "onnxruntime" in sys.modules else 0.0)
from modelcrate_runtime.profiler import ProfileOptions, profile
from modelcrate_runtime.subjects import find_subject
print(profile(find_subject(sys.argv[1]), options=ProfileOptions(warmup=0, runs=1, threads=(1,))).open_s)
"""


def test_opening_does_not_have_the_import_of_the_framework_in_it(demo_pose_bundle: Path) -> None:
    """On a clock that jumps by a thousand seconds when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_S, str(demo_pose_bundle)], env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 500


def test_a_fresh_process_finds_a_zip_and_a_path_that_is_relative(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.make_archive("zipped", "zip", bundles[LOCAL[-1]])
    found = profile(find_subject("zipped.zip"), options=replace(QUICK, cold=1))
    assert found.cold is not None
    assert found.cold.total_s > 0


@pytest.mark.parametrize("cold", [0, 1])
def test_what_cannot_be_opened_is_said_in_its_own_words(demo_pose_bundle: Path, cold: int) -> None:
    """Its kind, which decides the exit code, and its hint are the same whether a fresh process would have met it first or not."""
    with pytest.raises(MissingBackendError, match="expected the provider CUDAExecutionProvider") as caught:
        profile(find_subject(str(demo_pose_bundle)), options=replace(QUICK, device="cuda", cold=cold))
    assert "onnxruntime-gpu" in caught.value.hint


def test_a_fresh_process_that_fails_is_an_error_with_its_last_words(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """The bundle that it should open is not there any more."""
    gone = replace(find_subject(str(demo_pose_bundle)), text=str(tmp_path / "gone"))
    with pytest.raises((InputError, BundleError), match="demo-pose_onnxruntime: expected a first result in a fresh process, found: .*gone"):
        profile(gone, options=replace(QUICK, cold=1))


def test_the_figures_of_a_fresh_process_are_those_of_the_median_one(demo_pose_bundle: Path) -> None:
    found = profile(find_subject(str(demo_pose_bundle)), options=replace(QUICK, cold=2)).cold
    assert found is not None
    assert found.import_s + found.open_s + found.first_s == pytest.approx(found.total_s), "all of one process"


# ------------------------------------------------------------------------------------------------------------------------ options


def test_options_are_those_of_the_session() -> None:
    options = ProfileOptions(device="cuda", device_id=3, cuda_binding="pycuda", threads=(2, None))
    assert options.session(5) == SessionOptions(device="cuda", device_id=3, cuda_binding="pycuda", threads=5)
    assert json.loads(msgspec.json.encode(options))["threads"] == [2, None]
