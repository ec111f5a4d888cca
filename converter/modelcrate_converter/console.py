"""How conversions look in a terminal: progress while they run, tables when they end. Everything is drawn on a console that `cli` gives."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Self

from modelcrate_bundle.errors import MissingBackendError, ModelcrateError, UnsupportedBundleError
from modelcrate_runtime.cli import raise_if_interrupted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.status import Status

    from modelcrate_bundle.manifest import ParityRecord
    from modelcrate_converter.convert import Conversion
    from modelcrate_converter.progress import Advanced, Event


class Progress:
    """Draws the events of a conversion: a spinner for the stage that runs, a bar for what can be counted, a line with the seconds of a stage when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def show(self, event: Event) -> None:
        """Draw one event; between two of them is also where an interruption that a library swallowed comes through."""
        raise_if_interrupted()
        from rich.text import Text

        from modelcrate_converter.progress import Advanced, Noted, StageFinished, StageStarted

        if isinstance(event, StageStarted):
            self._start(event.name)
        elif isinstance(event, StageFinished):
            self._stop()
            line = Text.assemble("  ", ("done", "green"), f" {event.name:<24} {event.seconds:7.2f} s  ", (event.detail, "dim"))
            self._console.print(line, soft_wrap=True)
        elif isinstance(event, Noted):
            style = "yellow" if event.level == "warning" else "dim"
            self._console.print(f"  note {event.text}", style=style, soft_wrap=True)
        elif isinstance(event, Advanced):
            self._advance(event)

    def _advance(self, event: Advanced) -> None:
        done, total = event.done, event.total
        if self._console.is_terminal and total:
            self._draw_bar(event.name, done, total, unit=event.unit)
            return
        percent = f"({100 * done // max(total, 1)} %)" if total else ""
        if event.unit == "bytes":
            text = f"{event.name}: {done / 2**20:.1f}" + (f" of {total / 2**20:.1f} MiB {percent}" if total else " MiB")
        else:
            text = f"{event.name}: {done}" + (f" of {total} {percent}" if total else "")
        if self._console.is_terminal:
            self._start(text)
        elif (event.unit == "bytes" and total is not None and done == total) or time.monotonic() - self._drawn > 5:
            self._drawn = time.monotonic()
            self._console.print(f"  {text}")

    def _draw_bar(self, name: str, done: int, total: int, *, unit: str) -> None:
        """One bar for each thing that is counted; one that is full goes when the next appears: TensorRT's phases are many."""
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        if self._bars is None:
            self._stop()
            counted = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn())
            self._bars = Bars(*columns, console=self._console, transient=True)
            self._bars.start()
        if name not in self._tasks:
            for old in [old for old, task in self._tasks.items() if self._bars.tasks[self._bars.task_ids.index(task)].finished]:
                self._bars.remove_task(self._tasks.pop(old))
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, total=total)

    def _start(self, text: str) -> None:
        if self._bars is not None:
            self._stop()
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()


def print_failure(errors: Console, error: ModelcrateError) -> None:
    """One that does not end the command: the others go on."""
    errors.print(f"  failed: {error}", style="red", soft_wrap=True)
    if error.hint:
        errors.print(f"    hint: {error.hint}", soft_wrap=True)


def print_parity(out: Console, name: str, record: ParityRecord) -> None:
    """Every figure with its gate and its verdict."""
    from rich.table import Table
    from rich.text import Text

    from modelcrate_converter.parity import parity_rows

    out.print(f"{name}: parity with {record.reference}", style="italic", soft_wrap=True)
    table = Table()
    for heading in ("what", "figure", "gate", ""):
        table.add_column(heading)
    for row in parity_rows(record):
        table.add_row(row["what"], row["figure"], row["gate"], Text(row["ok"], style={"ok": "green", "FAIL": "bold red"}.get(row["ok"], "yellow")))
    out.print(table)


def print_conversion(out: Console, conversion: Conversion) -> None:
    """What became of one checkpoint for one target: operators, parity, files."""
    from rich.table import Table

    if conversion.status == "current":
        out.print(
            f"{conversion.place}: up to date (same checkpoint, config, images and tools; hashes checked). --force builds it again.",
            markup=False,
            soft_wrap=True,
        )
        return
    if conversion.op_changes:
        out.print(f"{conversion.id}: operators", style="italic", soft_wrap=True)
        table = Table(show_footer=True)
        table.add_column("operator", "all")
        table.add_column("exported", str(sum(before for _, before, _ in conversion.op_changes)), justify="right")
        table.add_column("simplified", str(sum(after for _, _, after in conversion.op_changes)), justify="right")
        for name, before, after in conversion.op_changes:
            table.add_row(name, str(before), str(after), style="bold" if before != after else "dim")
        out.print(table)
    if conversion.parity is not None and conversion.parity.verified:
        print_parity(out, conversion.id, conversion.parity)
    elif conversion.parity is not None and conversion.status == "built":
        out.print("NOT VERIFIED: nobody compared this bundle with PyTorch; the manifest says so", style="bold red")
    if conversion.bundle is not None and conversion.bundle.manifest is not None:
        out.print(str(conversion.place), style="italic", soft_wrap=True)
        table = Table()
        table.add_column("file")
        table.add_column("bytes", justify="right")
        table.add_column("SHA-256")
        for entry in conversion.bundle.manifest.files:
            table.add_row(entry.path, str(entry.bytes), entry.sha256[:16])
        out.print(table)


def print_summary(out: Console, conversions: list[Conversion]) -> None:
    """One line per bundle: size of its network, the worst output and the pixels against PyTorch, median time of one call on one input, verdict."""
    from rich.table import Table

    from modelcrate_runtime.profiler import latency_ms
    from modelcrate_runtime.sessions import SessionOptions, open_session

    has_accuracy = any(conversion.parity is not None and conversion.parity.accuracy for conversion in conversions)
    table = Table("bundle", "MiB", "L-inf", "shift: worst, mean", *(["AP"] if has_accuracy else []), "ms", "verdict")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for column in table.columns[1:-1]:
        column.justify = "right"
    for conversion in conversions:
        record, bundle = conversion.parity, conversion.bundle
        figures = [""] * 4
        if record is not None and record.outputs:
            figures[1] = f"{max(output.relative_linf for output in record.outputs):.1e}"
        shift = next((p for p in record.pixels if p.name.endswith("_px") and p.count), None) if record is not None else None
        if shift is not None:
            figures[2] = f"{shift.worst:.2g}, {shift.mean:.2g} px"
        if bundle is not None and bundle.manifest is not None:
            figures[0] = f"{sum(entry.bytes for entry in bundle.manifest.files if entry.role in {'net', 'weights'}) / 2**20:.1f}"
            with contextlib.suppress(MissingBackendError, UnsupportedBundleError):  # an engine that cannot run here
                session = open_session(bundle, SessionOptions())
                figures[3] = f"{latency_ms(session):.2f}"
                session.close()
        if has_accuracy:
            figures.insert(3, ", ".join(f"{100 * of.value:.1f}" for of in record.accuracy) if record is not None else "")
        table.add_row(conversion.id, *figures, conversion.status)
    out.print(table)
