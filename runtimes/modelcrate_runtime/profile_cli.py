"""The commands that measure time: `modelcrate profile` and `modelcrate compare`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from modelcrate_bundle.errors import ConfigError
from modelcrate_runtime.cli import CUDA_BINDING, DEVICE, DEVICE_ID, JSON_OPTION, THREADS, app, consoles, exit_on_error, raise_if_interrupted

if TYPE_CHECKING:
    from rich.table import Table

    from modelcrate_runtime.comparison import Comparison
    from modelcrate_runtime.profiler import Profile

_INPUTS = typer.Argument(
    help="Bundles or, where PyTorch is, checkpoints and names of models; then images or folders of images to go through. Without an image: a picture of noise.",
    metavar="SUBJECT... [IMAGE]...",
)
_MIB: Final = 2**20


@app.command()
def profile(
    inputs: Annotated[list[str], _INPUTS],
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each kind that do not count.")] = 50,
    runs: Annotated[int, typer.Option("--runs", "--num-iter", min=1, help="Calls that do.")] = 200,
    batch: Annotated[str, typer.Option(help="Inputs in one call of the network; several with commas: 1,2,4,8.")] = "1",
    streams: Annotated[str, typer.Option(help="Callers at once, with commas: 1,2,4. Default: none.")] = "",
    threads: Annotated[str, typer.Option(help="Threads inside one operator; several with commas. Default: one per usable core.")] = "",
    boxes: Annotated[int, typer.Option(min=1, help="Crops in one call of a pose estimator.")] = 1,
    layers: Annotated[int, typer.Option(min=0, help="Show so many of the slowest layers, where the backend says what they take.")] = 0,
    cold: Annotated[int, typer.Option(min=0, help="Fresh processes for the time to the first result and the memory; 0 for none.")] = 3,
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    cuda_binding: CUDA_BINDING = None,
    save: Annotated[Path | None, typer.Option(help="Write the JSON there, all samples with it, beside the tables.")] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Measure what running bundles, or a checkpoint in PyTorch, costs on this machine: stages, batches, callers at once, the first result, memory, layers."""
    with exit_on_error():
        from modelcrate_runtime.profiler import ProfileOptions
        from modelcrate_runtime.profiler import profile as measure
        from modelcrate_runtime.subjects import find_subjects

        texts, images = split_inputs(inputs)
        options = ProfileOptions(
            warmup=warmup,
            runs=runs,
            batches=numbers("--batch", batch) or (1,),
            streams=numbers("--streams", streams),
            threads=numbers("--threads", threads) or (None,),
            layers=min(runs, 30) if layers else 0,
            cold=cold,
            device=device,
            device_id=device_id,
            cuda_binding=cuda_binding,
        )
        profiles: list[Profile] = []
        try:
            for subject in find_subjects(texts):
                with progress(subject.name) as report:
                    profiles.append(measure(subject, images, options, boxes=boxes, report=report))
                if not as_json:
                    print_profile(profiles[-1], layers=layers)
            if len(profiles) > 1 and not as_json:
                consoles()[0].print(_side_by_side(profiles))
        finally:  # what is measured is measured, whatever becomes of the next one
            if profiles:
                _deliver({"profiles": profiles}, save=save, as_json=as_json)


@app.command()
def compare(
    inputs: Annotated[list[str], _INPUTS],
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 200,
    warmup: Annotated[int, typer.Option(min=0, help="Turns of each that do not count.")] = 3,
    what: Annotated[Literal["call", "network"], typer.Option(help="The whole call from image to result, or the network alone.")] = "call",
    batch: Annotated[int, typer.Option(min=1, help="Network alone: inputs in one call.")] = 1,
    boxes: Annotated[int, typer.Option(min=1, help="Whole call: crops in one call of a pose estimator.")] = 1,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    cuda_binding: CUDA_BINDING = None,
    threads: THREADS = None,
    save: Annotated[Path | None, typer.Option(help="Write the JSON there, all samples with it, beside the table.")] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Say how many times as fast others are as the first, with confidence intervals: all take turns (A B A B), so that a claim holds on a busy machine."""
    with exit_on_error():
        from modelcrate_runtime.comparison import compare as measure
        from modelcrate_runtime.sessions import SessionOptions
        from modelcrate_runtime.subjects import find_subjects

        texts, images = split_inputs(inputs)
        if len(texts) < 2:
            raise ConfigError(f"expected two subjects or more to compare, found {len(texts)}", hint="modelcrate profile measures one")
        subjects = find_subjects(texts)
        options = SessionOptions(device=device, device_id=device_id, threads=threads, cuda_binding=cuda_binding)
        with progress("turns") as report:
            found = measure(
                subjects,
                images,
                options,
                what=what,
                batch=batch,
                boxes=boxes,
                runs=runs,
                warmup=warmup,
                confidence=confidence,
                report=lambda done, total: report("", done, total),
            )
        if not as_json:
            print_comparison(found)
            if 0 < found.images < min(len(images), runs):
                consoles()[0].print(f"on the first {found.images} of {len(images)} images: no more fit into a gibibyte of memory", style="dim", soft_wrap=True)
        _deliver(found, save=save, as_json=as_json)


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[Path]]:
    """What to measure, and the images behind it: an image file, or a folder that is no bundle.

    Raises:
        ConfigError: nothing to measure, or something behind an image.
        InputError: no such image.
    """
    from modelcrate_runtime.images import IMAGE_SUFFIXES, image_files

    def is_image(text: str) -> bool:
        path = Path(text)
        return path.suffix.lower() in IMAGE_SUFFIXES or (path.is_dir() and not (path / "deploy.json").exists())

    first = next((i for i, text in enumerate(inputs) if is_image(text)), len(inputs))
    if first == 0:
        raise ConfigError(f"{inputs[0]}: expected a bundle or a checkpoint first, found images", hint="modelcrate profile BUNDLE IMAGE")
    late = next((text for text in inputs[first:] if (Path(text) / "deploy.json").exists() or Path(text).suffix == ".zip"), None)
    if late is not None:
        raise ConfigError(f"{late}: expected images behind the first image, found a bundle", hint="modelcrate profile BUNDLE BUNDLE IMAGE")
    return list(inputs[:first]), [file for text in inputs[first:] for file in image_files(Path(text))]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on with commas between them; none of an empty text.

    Raises:
        ConfigError: something else.
    """
    try:
        found = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found):
        raise ConfigError(f"{option}: expected whole numbers from 1 on with commas between them, found {text!r}", hint=f"{option} 1,2,4")
    return found


@contextmanager
def progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = consoles()[1]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Nothing is drawn between the turns of a clock: what is drawn in another thread takes time from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=None)

        def report(what: str, done: int, total: int) -> None:
            raise_if_interrupted()
            if done == total or done % max(total // 50, 1) == 0:
                bars.update(task, description=f"{name} {what}".strip(), completed=done, total=total)
                bars.refresh()

        yield report


def print_profile(found: Profile, *, layers: int) -> None:
    """The settings, then the tables."""
    out = consoles()[0]
    out.print(found.name, style="bold", soft_wrap=True)
    out.print(_settings(found))
    out.print(_stages(found))
    out.print(_network(found))
    for batch, why in found.left_out.items():
        out.print(f"batch {batch} left out: {why}", style="yellow", soft_wrap=True)
    if found.cold is not None:
        one = found.cold
        out.print(
            f"first result of a fresh process: {one.total_s:.2f} s (imports {one.import_s:.2f}, load {one.open_s:.2f}, first call {one.first_s:.2f}); memory: "
            f"{_mib(one.imported_bytes)} imported, {_mib(one.opened_bytes)} loaded, {_mib(one.peak_bytes)} at the most",
            soft_wrap=True,
        )
    if found.joules is not None:
        out.print(f"energy of the processor: {1e3 * found.joules:.1f} mJ a call")
    if layers:
        out.print(_layers(found, layers) if found.layers else f"{found.backend} does not say what its layers take")
    for doubt in found.doubts:
        out.print(f"unsure: {doubt.what}; {doubt.do}", style="yellow", soft_wrap=True)


def _settings(found: Profile) -> Table:
    from rich.table import Table

    host = found.host
    table = Table("setting", "", show_header=False)
    table.columns[1].overflow = "fold"
    table.add_row("backend, precision", f"{found.backend}, {found.precision}")
    table.add_row("device, threads", f"{found.device}, {found.threads}")
    table.add_row("input", f"{len(found.images)} images" if len(found.images) > 1 else found.images[0])
    if found.boxes:
        table.add_row("boxes", str(found.boxes))
    table.add_row("warmup, runs", f"{found.warmup}, {found.call.count}")
    table.add_row("size on disk, load", f"{_mib(found.size_bytes)}, {found.open_s:.3f} s")
    table.add_row("processor", f"{host.cpu}, {host.cores} cores ({', '.join(host.features)}){', virtual' if host.is_virtual else ''}")
    table.add_row("governor, frequency", f"{host.governor or 'not said'}, {f'{host.frequency_mhz:.0f} MHz' if host.frequency_mhz else 'not said'}")
    if host.gpu:
        table.add_row("GPU", host.gpu)
    version = next((f"{name} {host.libraries[name]}" for name in _distributions(found.backend) if name in host.libraries), "")
    table.add_row("versions", ", ".join(filter(None, (version, f"modelcrate {host.libraries.get('modelcrate', '?')}", f"Python {host.python}"))))
    return table


def _distributions(backend: str) -> tuple[str, ...]:
    more = {"pytorch": ("torch",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "tensorrt_rtx": ("tensorrt-rtx-cu12",)}
    return more.get(backend, (backend,))


def _stages(found: Profile) -> Table:
    from rich.table import Table

    columns = {("(copy)" if stage == "copy" else stage): of for stage, of in found.stages.items()} | {"image to result": found.call}
    # Seven of them fit into 80 columns, with headings in two lines and figures of seven characters.
    table = Table("ms", *("\n".join(stage.rsplit(" ", 1)) for stage in columns), title="one call")
    for column in table.columns:
        column.justify, column.no_wrap = "left" if column is table.columns[0] else "right", True
    for name, key in _FIGURES:
        table.add_row(name, *(_figure(getattr(of, key)) for of in columns.values()))
    table.add_row("share", *("" if stage == "load image" else f"{of.mean_ms / found.call.mean_ms:.1%}" for stage, of in columns.items()))
    table.add_row("per\nsecond", *(_figure(of.per_second, decimals=1) for of in columns.values()))
    return table


def _figure(value: float, *, decimals: int = 3) -> str:
    """In seven characters or fewer, up to ten millions."""
    return f"{value:.{max(0, min(decimals, 6 - len(f'{value:.0f}')))}f}"


_FIGURES: Final = (
    ("mean", "mean_ms"), ("median", "median_ms"), ("min", "min_ms"), ("max", "max_ms"), ("p90", "p90_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"), ("std", "std_ms"),
)  # fmt: skip


def _network(found: Profile) -> Table:
    from rich.table import Table

    table = Table("batch", "threads", "callers", "median", "p99", "std", "an\ninput", "per\nsecond", title="the network alone, ms")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row in found.network:
        of = row.latency
        figures = (*map(_figure, (of.median_ms, of.p99_ms, of.std_ms, of.median_ms / row.batch)), _figure(of.per_second, decimals=1))
        table.add_row(str(row.batch), str(row.threads), str(row.streams), *figures)
    return table


def _layers(found: Profile, count: int) -> Table:
    from rich.table import Table

    total = sum(layer.seconds for layer in found.layers)
    table = Table(
        "layer", "kind", "ms", "share", title=f"the slowest {min(count, len(found.layers))} of {len(found.layers)} layers; all together {1e3 * total:.3f} ms"
    )
    table.columns[0].overflow = "fold"  # names of layers differ at their ends
    for layer in sorted(found.layers, key=lambda one: -one.seconds)[:count]:
        table.add_row(layer.name, layer.kind, f"{1e3 * layer.seconds:.4f}", f"{layer.seconds / total:.1%}" if total else "")
    return table


def _side_by_side(profiles: Sequence[Profile]) -> Table:
    from rich.table import Table

    table = Table("medians, ms", "call", "before", "infer", "behind", "first, s", "MiB", title="all of them")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for one in profiles:
        stages = [f"{one.stages[stage].median_ms:.3f}" for stage in ("preprocess", "infer", "postprocess")]
        first = f"{one.cold.total_s:.2f}" if one.cold else ""
        table.add_row(one.name, f"{one.call.median_ms:.3f}", *stages, first, f"{one.size_bytes / _MIB:.1f}")
    return table


def print_comparison(found: Comparison) -> None:
    """Each one's figures, and how many times as fast as the first it is."""
    from rich.table import Table

    out = consoles()[0]
    percent = f"{found.rows[0].ratio.confidence:.0%}"
    table = Table(found.what, "median, ms", "p99", "times", percent, "", title=f"{found.rows[0].latency.count} calls of each, in turns")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for i, row in enumerate(found.rows):
        of = row.ratio
        figures = ("1", "", "") if not i else (f"{of.times:.3f}", f"{of.low:.3f}..{of.high:.3f}", of.verdict)
        table.add_row(row.name, f"{row.latency.median_ms:.3f}", f"{row.latency.p99_ms:.3f}", *figures)
    out.print(table)
    for row in found.rows:
        for doubt in row.doubts:
            out.print(f"unsure: {row.name}: {doubt.what}; {doubt.do}", style="yellow", soft_wrap=True)


def _mib(size: int | None) -> str:
    return "not said" if size is None else f"{size / _MIB:.1f} MiB"


def _deliver(found: Any, *, save: Path | None, as_json: bool) -> None:
    if save is None and not as_json:
        return
    import msgspec

    from modelcrate_runtime.images import write_bytes

    text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    if save is not None:
        write_bytes(save, text)
        consoles()[1].print(f"wrote {save}", style="dim")
    if as_json:
        sys.stdout.write(text.decode())
