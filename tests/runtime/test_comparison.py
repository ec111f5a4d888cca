"""Taking turns: who is timed on what, in which order, and that all of them are closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from modelcrate_bundle.errors import InputError, MissingBackendError, TaskMismatchError
from modelcrate_runtime.comparison import EACH, Comparison, compare
from modelcrate_runtime.measurement import Latency
from modelcrate_runtime.profiler import network_call
from modelcrate_runtime.sessions import SessionOptions
from modelcrate_runtime.subjects import Subject, find_subject, find_subjects

ONE_THREAD = SessionOptions(threads=1)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven images that can be told apart by their widths."""
    for i in range(7):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((20, 30 + i, 3), dtype=np.uint8))
    return sorted(tmp_path.glob("*.png"))


def tracked(subject: Subject, opened: list[Any]) -> Subject:
    """The same, noting the sessions that it opens."""
    return replace(subject, open_network=lambda options: opened.append(subject.open_network(options)) or opened[-1])


def assert_closed(opened: list[Any]) -> None:
    for session in opened:
        with pytest.raises(InputError, match="expected an open session, found a closed one"):
            network_call(session)()


class Watched:
    """A task around a network, that notes the width of each image it is called with, and goes round a few times more than it needs.

    Its session is what the subject opened: it is closed with the task.
    """

    def __init__(self, name: str, session: Any, log: list[tuple[str, int]], rounds: int) -> None:
        self.session = session
        self._name, self._log, self._rounds = name, log, rounds

    def __call__(self, image: np.ndarray) -> None:
        self._log.append((self._name, image.shape[1]))
        for _ in range(self._rounds):
            np.sort(np.arange(20_000)[::-1])

    def close(self) -> None:
        self.session.close()


def test_all_are_timed_on_the_same_images_however_fast_they_are(pose_bundle: Path, photos: list[Path]) -> None:
    """What is fast settles with more calls that do not count; they must not decide which images those that count are of."""
    log: list[tuple[str, int]] = []
    subject = find_subject(str(pose_bundle))

    def watched(name: str, rounds: int) -> Subject:
        return replace(subject, name=name, open_around=lambda session: Watched(name, session, log, rounds))  # type: ignore[arg-type, return-value]

    runs = 3 * EACH
    found = compare([watched("a", 1), watched("b", 3), watched("c", 8)], photos, ONE_THREAD, runs=runs, warmup=0)
    # Of three, none is the last of a round and the first of the next one.
    turns = [(name, [width for _, width in calls]) for name, calls in groupby(log, key=lambda call: call[0])]
    assert [name for name, _ in turns] == list("abc" + "bca" + "cab")
    assert all(len(widths) > EACH for _, widths in turns), "at least one call before those that count"
    timed: dict[str, list[int]] = {name: [] for name in "abc"}
    for name, widths in turns:
        timed[name] += widths[-EACH:]
    assert timed["a"] == timed["b"] == timed["c"]
    assert set(timed["a"]) == {30 + i for i in range(7)}
    assert [len(row.samples) for row in found.rows] == [runs] * 3


@pytest.mark.parametrize(("runs", "counted"), [(1, 1), (9, 9), (10, 10), (11, 20), (30, 30)])
def test_turns_are_of_ten_calls_or_of_all_if_there_are_fewer(pose_bundle: Path, runs: int, counted: int) -> None:
    told: list[tuple[int, int]] = []
    subjects = find_subjects([str(pose_bundle)] * 2)
    found = compare(subjects, [], ONE_THREAD, runs=runs, warmup=1, report=lambda *done: told.append(done))
    rounds = 1 + -(-runs // min(runs, EACH))
    assert told == [(i + 1, rounds) for i in range(rounds)]
    for row in found.rows:
        assert len(row.samples) == row.latency.count == row.ratio.rounds == counted
        assert row.latency == Latency.of(row.samples)


def test_the_first_is_what_the_others_are_measured_by(pose_bundle: Path) -> None:
    found = compare(find_subjects([str(pose_bundle)] * 3), [], ONE_THREAD, runs=10, warmup=0, confidence=0.8)
    base = found.rows[0]
    assert (base.ratio.times, base.ratio.low, base.ratio.high) == (1, 1, 1)
    for row in found.rows:
        assert row.ratio.confidence == 0.8
        assert row.ratio.times == pytest.approx(base.latency.median_ms / row.latency.median_ms)
        assert row.ratio.low <= row.ratio.times <= row.ratio.high
    assert found.schema == "modelcrate.comparison/1"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found


@pytest.mark.parametrize(("what", "batch", "inputs"), [("call", 4, 1), ("network", 1, 1), ("network", 4, 4)])
def test_the_throughput_of_the_network_is_of_its_batch(demo_detector_bundle: Path, what: Any, batch: int, inputs: int) -> None:
    found = compare(find_subjects([str(demo_detector_bundle)] * 2), [], ONE_THREAD, what=what, batch=batch, runs=2, warmup=0)
    assert found.what == {"call": "image to result", "network": f"the network alone, batch {batch}"}[what]
    for row in found.rows:
        assert row.latency.per_second == pytest.approx(inputs / np.mean(row.samples))


def test_all_are_closed_at_the_end(pose_bundle: Path) -> None:
    opened: list[Any] = []
    compare([tracked(one, opened) for one in find_subjects([str(pose_bundle)] * 2)], [], ONE_THREAD, runs=2, warmup=0)
    assert len(opened) == 2
    assert_closed(opened)


@pytest.mark.parametrize("how", ["another task", "no such device", "Ctrl-C", "no image", "a broken image"])
def test_whatever_happens_nothing_stays_open(pose_bundle: Path, demo_detector_bundle: Path, photos: list[Path], how: str) -> None:
    opened: list[Any] = []
    subjects = [tracked(one, opened) for one in find_subjects([str(pose_bundle), str(demo_detector_bundle if how == "another task" else pose_bundle)])]
    images: list[Path] = []
    report: Callable[[int, int], None] | None = None
    error: type[BaseException] = InputError
    if how == "another task":
        error = TaskMismatchError
    elif how == "no such device":
        subjects[1] = replace(subjects[1], open_network=lambda options: (_ for _ in ()).throw(MissingBackendError("no such device")))
        error = MissingBackendError
    elif how == "Ctrl-C":

        def report(done: int, total: int) -> None:
            raise KeyboardInterrupt

        error = KeyboardInterrupt
    elif how == "no image":
        images = [photos[0], photos[0].with_name("gone.png")]
    else:
        photos[1].write_bytes(b"no picture")
        images = photos
    with pytest.raises(error):
        compare(subjects, images, ONE_THREAD, runs=2, warmup=0, report=report)
    assert len(opened) == {"another task": 2, "no such device": 1, "Ctrl-C": 2}.get(how, 0)
    assert_closed(opened)


def test_what_hit_all_of_them_alike_is_said_once(pose_bundle: Path) -> None:
    found = compare(find_subjects([str(pose_bundle)] * 2), [], ONE_THREAD, runs=2, warmup=0)
    assert [doubt.kind for doubt in found.rows[0].doubts][:1] == ["few"]
    assert not {doubt.kind for doubt in found.rows[1].doubts} & {"load", "stolen", "throttled", "frequency"}
