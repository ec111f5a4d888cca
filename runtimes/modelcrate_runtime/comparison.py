"""Which of several is faster, and by how much: all take turns in one process, and the ratio has a confidence interval."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from modelcrate_bundle.errors import TaskMismatchError
from modelcrate_runtime.host import Host, load_between, read_host, take_reading
from modelcrate_runtime.images import hold_images
from modelcrate_runtime.measurement import Call, Doubt, Latency, Ratio, Report, doubts, take_turns
from modelcrate_runtime.profiler import call_of, network_call, noise_image

if TYPE_CHECKING:
    from modelcrate_runtime.sessions import SessionOptions
    from modelcrate_runtime.subjects import Subject, Task

SCHEMA: Final = "modelcrate.comparison/1"
EACH: Final = 10
"""Timed calls in a turn."""
SETTLE_S: Final = 0.02
"""Calls before them in a turn. After a call of ncnn on all cores the next network takes up to twice its time for some 15 ms, since ncnn's threads still spin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One of those that took turns.

    Attributes:
        name: the subject's.
        latency: of its calls.
        ratio: how many times as fast as the first it is.
        doubts: why its figures are not to be believed as they are.
        samples: seconds of its calls; the same position is the same round for all.
    """

    name: str
    latency: Latency
    ratio: Ratio
    doubts: list[Doubt]
    samples: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All of them; the first is what the others are measured by.

    Attributes:
        what: was timed, in words.
        rows: one for each.
        host: the machine.
        at: when, in UTC, ISO 8601.
        images: how many the calls went through, again and again; 0 for a picture of noise.
        schema: of this record.
    """

    what: str
    rows: list[Compared]
    host: Host
    at: str
    images: int = 0
    schema: str = field(default=SCHEMA)


def compare(
    subjects: Sequence[Subject],
    images: Sequence[Path],
    options: SessionOptions,
    *,
    what: Literal["call", "network"] = "call",
    batch: int = 1,
    boxes: int = 1,
    runs: int = 200,
    warmup: int = 3,
    confidence: float = 0.95,
    report: Report | None = None,
) -> Comparison:
    """Let several take turns.

    Args:
        subjects: bundles and checkpoints of one task; the first is the base.
        images: files to go through; none for a picture of noise. They are held in memory: only as many of the first as are timed and fit into a gibibyte.
        options: how to open all of them.
        what: the whole call, or the network alone on random numbers.
        batch: network alone: inputs in one call.
        boxes: whole call: crops in one call of a network of crops.
        runs: timed calls of each, in turns of ten.
        warmup: turns that do not count.
        confidence: of the intervals.
        report: gets the turns that are done, and of all.

    Raises:
        TaskMismatchError: subjects of several tasks.
        ModelcrateError: one of them cannot be opened or run.
    """
    each = min(EACH, runs)
    held = hold_images(images, most=-(-runs // each) * each)
    pixels = held or [noise_image()]
    with contextlib.ExitStack() as stack:
        tasks: list[Task] = []
        for subject in subjects:
            tasks.append(subject.open(options))
            stack.callback(tasks[-1].close)
        kinds = dict.fromkeys(type(task).__name__ for task in tasks)
        if len(kinds) > 1:
            raise TaskMismatchError(f"expected subjects of one task, found {' and '.join(kinds)}", hint="compare what answers the same question")
        calls: dict[str, Call | Sequence[Call]] = {}
        for subject, task in zip(subjects, tasks, strict=True):
            if what == "network":
                calls[subject.name] = network_call(task.session, batch=batch)
            else:
                calls[subject.name] = [call_of(task, image, boxes=boxes) for image in pixels]
        before = take_reading()
        samples = take_turns(calls, rounds=-(-runs // each), warmup=warmup, each=each, settle_s=SETTLE_S, report=report)
        load = load_between(before, take_reading())
    base = next(iter(samples.values()))
    rows = [
        Compared(
            name=name,
            latency=Latency.of(seconds, inputs=batch if what == "network" else 1),
            ratio=Ratio.of(base, seconds, each=each, confidence=confidence),
            # What else the machine did hit all of them alike: it is no doubt about a ratio, and said once.
            doubts=doubts(seconds, load if seconds is base else None),
            samples=seconds,
        )
        for name, seconds in samples.items()
    ]
    of_what = {"call": "image to result", "network": f"the network alone, batch {batch}"}[what]
    return Comparison(what=of_what, rows=rows, host=read_host(), at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), images=len(held))
