"""Progress of long work that counts frames or images: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from modelcrate_runtime.cli import consoles, raise_if_interrupted

if TYPE_CHECKING:
    from rich.progress import Progress

_TELL_S: Final = 10.0


class CountBar:
    """On standard error, while it is open. What comes from a terminal's Ctrl-C is noticed at every `show`."""

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        """Say what is counted.

        Args:
            what: the work, before the bar.
            unit: one of what is counted: "frame".
            total: how many there are; None where that is not known, or not yet.
        """
        self._what, self._unit, self._total = what, unit, total
        self._console = consoles()[1]
        self._bars: Progress | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

            columns = (SpinnerColumn(), TextColumn(self._what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
            self._task = self._bars.add_task(self._what, total=self._total, note="")
        return self

    def show(self, done: int, note: str, *, total: int | None = None) -> None:
        """Say how far it is.

        Args:
            done: of the total.
            note: how fast it goes, and the like.
            total: where it is known only now.

        Raises:
            KeyboardInterrupt: a signal came while a C++ library had the thread.
        """
        raise_if_interrupted()
        self._total = total if total is not None else self._total
        if self._bars is not None:
            self._bars.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            of = f" of {self._total}" if self._total else ""
            self._console.print(f"  {self._what}: {self._unit} {done}{of}: {note}", soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
