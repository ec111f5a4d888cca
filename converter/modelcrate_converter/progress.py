"""What a long operation tells while it runs: typed events to one callback, which the console draws and tests collect.

The library draws and prints nothing. A callback is called on the thread that does the work, and must return quickly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage of a build begins."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished:
    """A stage ended well; `detail` is a phrase for the end of its line."""

    name: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advanced:
    """A countable piece of work moved on; `total` is None when it is not known."""

    name: str
    done: int
    total: int | None
    unit: Literal["bytes", "items"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """Something the user should know: a default that was taken, or a warning."""

    text: str
    level: Literal["info", "warning"] = "info"


Event: TypeAlias = StageStarted | StageFinished | Advanced | Noted
Report: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The report that nobody reads."""
    del event


@dataclass(kw_only=True, slots=True)
class StageClock:
    """Times the stages of one build and reports them.

    Attributes:
        report: where the events go.
        seconds: stage name -> seconds, in the order in which the stages ended.
    """

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Run a block as the stage `name`; what is appended to the yielded list becomes the detail of its line."""
        self.report(StageStarted(name=name))
        started = time.perf_counter()
        detail: list[str] = []
        yield detail
        self.seconds[name] = time.perf_counter() - started
        self.report(StageFinished(name=name, seconds=self.seconds[name], detail=", ".join(detail)))
