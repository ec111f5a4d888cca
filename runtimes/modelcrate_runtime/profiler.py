"""What running something costs on this machine: stages, batches, calls side by side, the first result, memory, layers. See `measurement` for the statistics.

The same is measured of a bundle of any backend and of a checkpoint in PyTorch, so that their figures stand in one table.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError, ModelcrateError
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.host import Host, energy_between, load_between, peak_resident_bytes, read_host, resident_bytes, take_reading
from modelcrate_runtime.images import read_image
from modelcrate_runtime.measurement import Call, Clock, Doubt, Latency, Load, Report, doubts, measure_seconds
from modelcrate_runtime.sessions import BACKENDS, LayerTime, Session, SessionOptions, TimesCopies, TimesLayers
from modelcrate_runtime.tasks import Network, PoseDetector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_runtime.subjects import Subject, Task

SCHEMA: Final = "modelcrate.profile/1"
STAGES: Final = ("load image", "preprocess", "infer", "postprocess")
"""Of one call, in order; "load image" only where there are files. "copy" is a part of "infer"."""
_NOISE_HW: Final = (480, 640)
_COLD_TIMEOUT_S: Final = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        warmup: calls of each kind that do not count.
        runs: calls that do.
        batches: inputs in one call of the network; those that it does not take are left out and named.
        threads: threads inside one operator; None is one for each core. The first is what all but the table of the network alone is measured with.
        streams: calls side by side.
        layers: calls for the times of layers, 0 for none.
        cold: fresh processes for the time to the first result and the memory, 0 for none.
        device: see `SessionOptions`.
        device_id: see `SessionOptions`.
        cuda_binding: see `SessionOptions`.
    """

    warmup: int = 50
    runs: int = 200
    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    streams: tuple[int, ...] = ()
    layers: int = 0
    cold: int = 0
    device: str = ""
    device_id: int = 0
    cuda_binding: str | None = None

    def session(self, threads: int | None) -> SessionOptions:
        """How to open the network."""
        return SessionOptions(device=self.device, device_id=self.device_id, threads=threads, cuda_binding=self.cuda_binding)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Calls of the network alone, on random numbers.

    Attributes:
        batch: inputs in a call.
        threads: threads inside one operator.
        streams: callers at once.
        latency: of one call; `per_second` is of all callers together.
        samples: seconds, in the order in which calls ended.
    """

    batch: int
    threads: int
    streams: int
    latency: Latency
    samples: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cold:
    """A fresh process, its files in the system's cache; medians of several.

    Attributes:
        import_s: from the start of the process until what is needed is imported.
        open_s: to load the network.
        first_s: the first call, image to result.
        total_s: from the start of the process to the first result.
        imported_bytes: memory in RAM once everything is imported.
        opened_bytes: once the network is loaded.
        peak_bytes: the most until after the first call.
    """

    import_s: float
    open_s: float
    first_s: float
    total_s: float
    imported_bytes: int | None
    opened_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All that was measured of one subject.

    Attributes:
        schema: of this record.
        name: the subject's.
        task: Detector, PoseDetector, Classifier or Network.
        backend: as deploy.json has it, or pytorch.
        precision: what the network really computes in.
        size_bytes: of the files that a device needs.
        device: where it ran.
        threads: threads inside one operator.
        warmup: calls that did not count.
        images: what the stages ran on: files, or "noise 640x480".
        boxes: crops in one call of a pose estimator; 0 for whole images.
        open_s: to load the network, with everything imported.
        stages: stage -> its share of each call; "copy" is a part of "infer".
        call: from an image in memory to its result.
        network: the network alone, by threads, batch and callers.
        left_out: batches that the network does not take, with the reason.
        cold: a fresh process; None if it was not asked for.
        layers: what each layer takes; empty if it was not asked for or the backend does not say.
        joules: energy of the processor for one call, None where the kernel does not say.
        doubts: why the figures are not to be believed as they are.
        samples: stage -> seconds of each call, and "call".
        load: what else the machine did.
        host: the machine.
        at: when, in UTC, ISO 8601.
    """

    name: str
    task: str
    backend: str
    precision: str
    size_bytes: int
    device: str
    threads: int
    warmup: int
    images: list[str]
    boxes: int
    open_s: float
    stages: dict[str, Latency]
    call: Latency
    network: list[Row]
    load: Load
    host: Host
    at: str
    schema: str = SCHEMA
    left_out: dict[int, str] = field(default_factory=dict)
    cold: Cold | None = None
    layers: list[LayerTime] = field(default_factory=list)
    joules: float | None = None
    doubts: list[Doubt] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)


class Stopwatch:
    """A session that notes when its network began and ended: what a task does before is preprocessing, what it does behind is postprocessing."""

    def __init__(self, session: Session, clock: Clock = time.perf_counter) -> None:
        self.session = session
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.streams = 1  # one call after another: what runs side by side has no one moment at which it begins
        self.runs: list[tuple[float, float]] = []
        self._clock = clock

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the network, and note when."""
        start = self._clock()
        outputs = self.session.run(feeds)
        self.runs.append((start, self._clock()))
        return outputs

    run_beside = run

    def close(self) -> None:
        """Free the network."""
        self.session.close()


def split_call(call: Call, watch: Stopwatch, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Call once: stage -> seconds. Between two runs of the network lies the preprocessing for the second.

    Raises:
        InputError: the network did not run.
    """
    watch.runs.clear()
    start = clock()
    call()
    end = clock()
    if not watch.runs:
        raise InputError("profile: expected a call that runs the network, found one that does not: are there boxes?")
    infer = sum(stop - begin for begin, stop in watch.runs)
    post = end - watch.runs[-1][1]
    return {"preprocess": end - start - infer - post, "infer": infer, "postprocess": post, "call": end - start}


def profile(
    subject: Subject,
    images: Sequence[Path] = (),
    options: ProfileOptions | None = None,
    *,
    boxes: int = 1,
    report: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Measure.

    Args:
        subject: a bundle or a checkpoint.
        images: files to go through, again and again, each read when it is its turn; none for a picture of noise.
        options: what to measure.
        boxes: crops in one call of a network of crops.
        report: gets what is being measured, and how far that is.

    Raises:
        ConfigError: no batch that the network takes.
        InputError: an image that cannot be read.
        ModelcrateError: whatever opening it says.
    """
    from modelcrate_runtime.subjects import import_framework

    options = options or ProfileOptions()
    files = images[: options.warmup + options.runs]
    for path in files:  # what cannot be read is said before minutes of measuring
        read_image(path)
    tell = report or (lambda _what, _done, _total: None)
    watch: list[Stopwatch] = []

    def wrapped(session: Session) -> Session:
        watch.append(Stopwatch(session))
        return watch[0]

    import_framework(subject.module)
    begun = time.perf_counter()
    with subject.open(options.session(options.threads[0]), wrap=wrapped) as task:
        open_s = time.perf_counter() - begun
        before = take_reading()
        samples = _stages(task, watch[0], files, options, boxes, lambda done, total: tell("stages", done, total))
        after = take_reading()
        session = watch[0].session
        feeds = _feeds(session, 1)
        if isinstance(session, TimesCopies):
            samples["copy"] = session.copy_seconds(feeds, runs=options.runs)
        layers = session.layer_times(feeds, runs=options.layers) if options.layers and isinstance(session, TimesLayers) else []
        rows, left_out = _network(session, options, options.threads[0], lambda done, total: tell("network", done, total))
        name_of_task = type(task).__name__
        is_of_crops = _takes_boxes(task)
    for threads in options.threads[1:]:
        session = subject.open_network(options.session(threads))
        try:
            more, _ = _network(session, options, threads, lambda done, total: tell("network", done, total))
        finally:
            session.close()
        rows += more
    # Last: what cannot be opened here has then said so itself, with its own kind of error and its hint.
    cold = _median_of([_cold(subject, images[0] if images else None, options, boxes) for _ in range(options.cold)]) if options.cold else None
    load = load_between(before, after)
    energy = energy_between(before, after)
    return Profile(
        name=subject.name,
        task=name_of_task,
        backend=subject.backend,
        precision=subject.precision,
        size_bytes=subject.size_bytes,
        device=options.device or (BACKENDS[subject.backend].device if subject.backend in BACKENDS else "cpu"),
        threads=options.threads[0] or usable_cores(),
        warmup=options.warmup,
        images=[str(path) for path in files] or [f"noise {_NOISE_HW[1]}x{_NOISE_HW[0]}"],
        boxes=boxes if is_of_crops else 0,
        open_s=open_s,
        stages={stage: Latency.of(samples[stage]) for stage in (*STAGES, "copy") if stage in samples},
        call=Latency.of(samples["call"]),
        network=rows,
        left_out=left_out,
        cold=cold,
        layers=layers,
        joules=energy / (options.warmup + options.runs) if energy is not None else None,
        doubts=doubts(samples["call"], load) + [doubt for row in rows for doubt in _of_row(row)],
        samples=samples,
        load=load,
        host=read_host(),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def call_of(task: Task, image: NDArray[np.uint8], *, boxes: int = 1) -> Call:
    """One call from an image to its result; a network of crops gets so many boxes, spread over the image."""
    if not _takes_boxes(task):
        return lambda: task(image)
    rows = spread_boxes(image.shape[:2], boxes)
    return lambda: task(image, rows)  # type: ignore[call-arg]  # those of crops take boxes


def spread_boxes(size_hw: Sequence[int], count: int) -> NDArray[np.float32]:
    """(count, 4) left, top, right, bottom: upright boxes of two fifths of the image, a golden-ratio sequence apart, the same every time."""
    height, width = size_hw
    steps = np.arange(1, count + 1)[:, None] * np.array([0.7548776662466927, 0.5698402909980532]) % 1.0
    side = np.array([0.4 * width, 0.6 * height])
    corners = steps * (np.array([width, height]) - side)
    return np.concatenate([corners, corners + side], axis=1).astype(np.float32)


def network_call(session: Session, *, batch: int | None = None) -> Call:
    """One call of the network alone, on random numbers.

    Args:
        session: the network.
        batch: inputs in the call; None for 1, or the only number that it takes.

    Raises:
        ConfigError: a batch that the network does not take.
    """
    first = session.inputs[0].shape[0]
    if isinstance(first, int) and batch not in {None, first}:
        raise ConfigError(f"batch: expected {first}, the only one that the network takes, found {batch}")
    feeds = _feeds(session, batch or 1)
    return lambda: session.run(feeds)


def latency_ms(session: Session, *, runs: int = 30, warmup: int = 5, clock: Clock = time.perf_counter) -> float:
    """The median time of one call on the fewest inputs that the network takes, in milliseconds: the network alone."""
    return Latency.of(measure_seconds(network_call(session), runs=runs, warmup=warmup, clock=clock)).median_ms


def beside_seconds(session: Session, *, callers: int, batch: int | None, runs: int, warmup: int, clock: Clock = time.perf_counter) -> tuple[list[float], float]:
    """Several callers at once, each with a thread of its own, share `runs` calls of the network.

    Returns:
        Seconds of each call, in the order in which they ended; and from the first call's beginning to the last one's end.
    """
    calls: list[tuple[float, float]] = []
    errors: list[BaseException] = []
    feeds = _feeds(session, batch or 1)
    run = session.run_beside if session.streams > 1 else session.run
    for _ in range(warmup):
        run(feeds)
    left = iter(range(runs))
    lock = threading.Lock()
    gate = threading.Barrier(callers + 1)

    def work() -> None:
        gate.wait()
        try:
            while True:
                with lock:
                    if next(left, None) is None:
                        return
                start = clock()
                run(feeds)
                calls.append((start, clock()))
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    # By the callers' own clocks: this thread may wake up long after they began.
    return [end - start for start, end in calls], max(end for _, end in calls) - min(start for start, _ in calls)


def _takes_boxes(task: Task) -> bool:
    return isinstance(task, PoseDetector) or (isinstance(task, Network) and task.is_top_down)


def noise_image() -> NDArray[np.uint8]:
    """(480, 640, 3) uint8: what is measured on when there is no image."""
    return np.random.default_rng(0).integers(0, 256, (*_NOISE_HW, 3), dtype=np.uint8)


def _feeds(session: Session, batch: int) -> dict[str, NDArray[np.generic]]:
    """So many inputs, or the only number that the network takes, of random numbers: zeros are faster where denormals or sparse shortcuts matter.

    Whole numbers may be indices, and are zeros.
    """
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {}
    for spec in session.inputs:
        first = spec.shape[0]
        sides = (first if isinstance(first, int) else batch, *(dim if isinstance(dim, int) else 1 for dim in spec.shape[1:]))
        is_whole = np.issubdtype(np.dtype(spec.dtype), np.integer)
        feeds[spec.name] = np.zeros(sides, dtype=spec.dtype) if is_whole else rng.standard_normal(sides).astype(spec.dtype)
    return feeds


def _stages(task: Task, watch: Stopwatch, files: Sequence[Path], options: ProfileOptions, boxes: int, report: Report) -> dict[str, list[float]]:
    image = noise_image()
    samples: dict[str, list[float]] = {"load image": []} if files else {}
    for i in range(options.warmup + options.runs):
        loading = 0.0
        if files:
            start = time.perf_counter()
            image = read_image(files[i % len(files)])
            loading = time.perf_counter() - start
        stages = split_call(call_of(task, image, boxes=boxes), watch)
        if i >= options.warmup:
            if files:
                samples["load image"].append(loading)
            for stage, seconds in stages.items():
                samples.setdefault(stage, []).append(seconds)
        report(i + 1, options.warmup + options.runs)
    return samples


def _of_row(row: Row) -> list[Doubt]:
    where = f"network, batch {row.batch}, {row.threads} threads, {row.streams} callers"
    # Few calls are said of the stages already, and callers at once are not alike.
    kinds = {"tail"} if row.streams > 1 else {"tail", "drift", "two modes"}
    return [replace(doubt, what=f"{where}: {doubt.what}") for doubt in doubts(row.samples) if doubt.kind in kinds]


def _network(session: Session, options: ProfileOptions, threads: int | None, report: Report) -> tuple[list[Row], dict[int, str]]:
    rows: list[Row] = []
    left_out: dict[int, str] = {}
    total = len(options.batches) + len(options.streams)
    for done, batch in enumerate(options.batches):
        try:
            call = network_call(session, batch=batch)
            call()
        except ModelcrateError as error:
            left_out[batch] = str(error)
            continue
        except MemoryError as error:
            left_out[batch] = f"expected memory for it, found none: {error}"
            continue
        seconds = measure_seconds(call, runs=options.runs, warmup=options.warmup)
        rows.append(Row(batch=batch, threads=threads or usable_cores(), streams=1, latency=Latency.of(seconds, inputs=batch), samples=seconds))
        report(done + 1, total)
    if not rows:
        raise ConfigError(next(iter(left_out.values())), hint="--batch with a number that it takes")
    for done, callers in enumerate(options.streams, start=len(options.batches)):
        seconds, spent = beside_seconds(session, callers=callers, batch=rows[0].batch, runs=options.runs, warmup=options.warmup)
        latency = replace(Latency.of(seconds), per_second=rows[0].batch * len(seconds) / spent)
        rows.append(Row(batch=rows[0].batch, threads=threads or usable_cores(), streams=callers, latency=latency, samples=seconds))
        report(done + 1, total)
    return rows, left_out


def _cold(subject: Subject, image: Path | None, options: ProfileOptions, boxes: int) -> Cold:
    """The first result of a fresh process. Its clock is the system's monotonic one, which all processes share."""
    wanted = {
        "text": subject.text,
        "checkpoints": subject.checkpoints,
        "module": subject.module,
        "image": str(image) if image else None,
        "boxes": boxes,
        "device": options.device,
        "device_id": options.device_id,
        "threads": options.threads[0],
        "cuda_binding": options.cuda_binding,
    }
    command = [sys.executable, "-c", "from modelcrate_runtime.profiler import answer_cold; answer_cold()", json.dumps(wanted), repr(time.monotonic())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COLD_TIMEOUT_S)  # noqa: S603  # this very Python
    except (subprocess.TimeoutExpired, OSError) as error:
        raise InputError(f"{subject.name}: expected a first result in a fresh process, found: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InputError(f"{subject.name}: expected a first result in a fresh process, found: {said[0]}")
    return Cold(**json.loads(done.stdout.splitlines()[-1]))


def answer_cold(arguments: Sequence[str] | None = None) -> None:
    """The fresh process: opens, calls once, and prints a `Cold` as JSON."""
    from modelcrate_runtime.subjects import find_subject, import_framework, know_checkpoints

    text, started = (arguments or sys.argv[1:])[:2]
    wanted: dict[str, Any] = json.loads(text)
    if wanted["checkpoints"]:
        module, _, name = wanted["checkpoints"].partition(":")
        know_checkpoints(getattr(importlib.import_module(module), name))
    image = read_image(Path(wanted["image"])) if wanted["image"] else noise_image()
    begun = float(started)
    import_framework(wanted["module"])
    imported, imported_bytes = time.monotonic(), resident_bytes()
    options = SessionOptions(device=wanted["device"], device_id=wanted["device_id"], threads=wanted["threads"], cuda_binding=wanted["cuda_binding"])
    with find_subject(wanted["text"]).open(options) as task:
        opened, opened_bytes = time.monotonic(), resident_bytes()
        call_of(task, image, boxes=wanted["boxes"])()
        end = time.monotonic()
    record = {
        "import_s": imported - begun,
        "open_s": opened - imported,
        "first_s": end - opened,
        "total_s": end - begun,
        "imported_bytes": imported_bytes,
        "opened_bytes": opened_bytes,
        "peak_bytes": peak_resident_bytes(),
    }
    sys.stdout.write(json.dumps(record) + "\n")


def _median_of(found: Iterable[Cold]) -> Cold:
    """The process of median time to its first result: figures of one process belong together."""
    ordered = sorted(found, key=lambda one: one.total_s)
    return ordered[len(ordered) // 2]
