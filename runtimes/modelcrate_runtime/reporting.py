"""All bundles of a folder measured on this machine: what goes into a report, before it is a page."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, InputError, ModelcrateError, TaskMismatchError
from modelcrate_bundle.manifest import ParityRecord
from modelcrate_runtime.comparison import Comparison, compare
from modelcrate_runtime.host import Host, read_host
from modelcrate_runtime.profiler import Profile, ProfileOptions, profile
from modelcrate_runtime.subjects import Subject, find_subject, of_bundle, with_numbers
from modelcrate_runtime.trials import IN_PIXELS_OR_SIZES, MAIN_FIGURES, Trial, choose_metrics, facts_of, read_annotations
from modelcrate_runtime.trials import measure as measure_trial

if TYPE_CHECKING:
    from modelcrate_runtime.class_labels import Labelled
    from modelcrate_runtime.coco_data import Dataset
    from modelcrate_runtime.sessions import SessionOptions

SCHEMA: Final = "modelcrate.report/1"
Tell = Callable[[str, int, int], None]
"""Gets what is being measured, and how far that is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Accuracy of one subject.

    Attributes:
        metric: the figure's name: "AP", "top-1", "NME".
        value: the figure; None where the data has nothing for it.
        is_better_up: whether more is better.
        images: how many it was measured on.
        data: file name of the annotations.
    """

    metric: str
    value: float | None
    is_better_up: bool
    images: int
    data: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One subject of a report.

    Attributes:
        name: the subject's.
        backend: as deploy.json has it, or pytorch.
        precision: what its network computes in.
        size_bytes: of the files that a device needs.
        parity: the comparison that the bundle passed when it was built; None for checkpoints and foreign bundles.
        profile: what it costs; None where it could not be run here.
        scores: its accuracy.
        trouble: why it could not be run here.
    """

    name: str
    backend: str
    precision: str
    size_bytes: int
    parity: ParityRecord | None = None
    profile: Profile | None = None
    scores: list[Score] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The subjects of one model: they answer the same question.

    Attributes:
        model: its name.
        task: Detector, PoseDetector, Classifier or Network.
        entries: its subjects; a checkpoint first, then by name.
        comparison: their calls in turns; None where fewer than two could be run.
    """

    model: str
    task: str
    entries: list[Entry]
    comparison: Comparison | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All of it.

    Attributes:
        folder: name of the folder.
        command: what made it.
        at: when, in UTC, ISO 8601.
        host: the machine.
        groups: by model.
        unreadable: what looks like a bundle and is none, with the reason.
        schema: of this record.
    """

    folder: str
    command: str
    at: str
    host: Host
    groups: list[Group]
    unreadable: list[str] = field(default_factory=list)
    schema: str = SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """What to measure of each.

    Attributes:
        profile: see there.
        boxes: crops in one call of a pose estimator.
        score: measures the accuracy of a subject; None measures none.
        compare_runs: timed calls of each in turns.
    """

    profile: ProfileOptions
    boxes: int = 1
    score: Callable[[Subject, SessionOptions], list[Score]] | None = None
    compare_runs: int = 200


def find_bundles(folder: Path) -> tuple[list[Bundle], list[str]]:
    """The bundles directly in a folder, or the one that it is; and what is broken.

    Raises:
        InputError: no such folder, or no bundle in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of bundles, found {'a file' if folder.exists() else 'nothing'}", hint="modelcrate convert writes one")
    here = [folder] if (folder / "deploy.json").is_file() else sorted(folder.iterdir())
    places = [path for path in here if (path / "deploy.json").is_file() or path.suffix == ".zip"]
    found: list[Bundle] = []
    broken: list[str] = []
    for place in places:
        try:
            bundle = Bundle.open(place)
            bundle.verify()
        except ModelcrateError as error:
            broken.append(str(error))
        else:
            found.append(bundle)
    if not found:
        why = f"only broken ones: {broken[0]}" if broken else "none"
        raise InputError(f"{folder}: expected bundles, found {why}", hint="modelcrate convert writes them")
    return found, broken


def measure_report(
    folder: Path, references: Sequence[str], images: Sequence[Path], options: ReportOptions, *, command: str, tell: Tell | None = None
) -> Report:
    """Measure every bundle of a folder, and the checkpoints beside them.

    Args:
        folder: of the bundles.
        references: checkpoints, or whatever else stands beside the bundles; each joins the group of its model.
        images: files that the stages go through; none for a picture of noise.
        options: what to measure.
        command: what the user wrote, for the report.
        tell: gets the progress.

    Raises:
        InputError: no bundle, or an image that cannot be read.
        ConfigError: a reference of a model that no bundle is of.
    """
    tell = tell or (lambda _what, _done, _total: None)
    bundles, unreadable = find_bundles(folder)
    models: dict[str, list[Subject]] = {}
    for bundle in bundles:
        subject = of_bundle(bundle)
        models.setdefault(_model_of(subject), []).append(subject)
    for text in references:
        subject = find_subject(text)
        model = _model_of(subject)
        if model not in models:
            raise ConfigError(f"{text}: expected a checkpoint of one of the models here ({', '.join(models)}), found {model}", hint="leave it out")
        models[model].insert(0, subject)
    models = {model: with_numbers(subjects) for model, subjects in models.items()}
    total = sum(len(subjects) for subjects in models.values())
    groups, done = [], 0
    for model, subjects in models.items():
        entries = []
        for subject in subjects:
            tell(subject.name, done, total)
            entries.append(_entry(subject, images, options))
            done += 1
        groups.append(_group(model, subjects, entries, images, options))
    tell("", total, total)
    return Report(
        folder=folder.resolve().name,
        command=command,
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        host=read_host(),
        groups=groups,
        unreadable=unreadable,
    )


def _model_of(subject: Subject) -> str:
    if subject.bundle is None:
        return subject.name.removesuffix("_pytorch")
    return subject.bundle.manifest.model if subject.bundle.manifest else subject.bundle.name


def _entry(subject: Subject, images: Sequence[Path], options: ReportOptions) -> Entry:
    manifest = subject.bundle.manifest if subject.bundle else None
    entry = Entry(
        name=subject.name,
        backend=subject.backend,
        precision=subject.precision,
        size_bytes=subject.size_bytes,
        parity=manifest.parity if manifest else None,
    )
    # What cannot be run here, such as TensorRT without a GPU, is worth a line and not the end of the report.
    try:
        entry = replace(entry, profile=profile(subject, images, options.profile, boxes=options.boxes))
    except InputError:
        raise  # an image: nothing of this one bundle
    except ModelcrateError as error:
        return replace(entry, trouble=_said(error))
    try:
        scores = options.score(subject, options.profile.session(options.profile.threads[0])) if options.score else []
    except ModelcrateError as error:
        return replace(entry, trouble=f"accuracy: {_said(error)}")
    return replace(entry, scores=scores)


def _said(error: ModelcrateError) -> str:
    return f"{error}{f' ({error.hint})' if error.hint else ''}"


def score_on(annotations: Path, images: Path | None, *, limit: int | None = None) -> Callable[[Subject, SessionOptions], list[Score]]:
    """Measures the accuracy of a subject on annotated images: the main figure of each metric that is right for it, see `trials`.

    Args:
        annotations: COCO's, or labels of a classifier.
        images: their folder; None for the annotations' own.
        limit: only so many images, the first ones.
    """
    read: dict[tuple[str, int | None], Dataset | Labelled] = {}

    def score(subject: Subject, options: SessionOptions) -> list[Score]:
        facts = facts_of(subject, options)
        kind = (facts.task, facts.keypoint_count)
        if kind not in read:
            read[kind], _ = read_annotations(annotations, images or annotations.parent, facts, limit)
        trial = Trial(metrics=choose_metrics(facts, (), has_true_boxes=True), data=read[kind], batch=8)
        with subject.open(options) as task:
            found = measure_trial(task, facts, trial)
        return [
            Score(
                metric=MAIN_FIGURES[metric],
                value=None if math.isnan(figures[MAIN_FIGURES[metric]]) else figures[MAIN_FIGURES[metric]],
                is_better_up=MAIN_FIGURES[metric] not in IN_PIXELS_OR_SIZES,
                images=found.result.images,
                data=annotations.name,
            )
            for metric, figures in found.figures.items()
            if metric in MAIN_FIGURES
        ]

    return score


def _group(model: str, subjects: Sequence[Subject], entries: list[Entry], images: Sequence[Path], options: ReportOptions) -> Group:
    runnable = [subject for subject, entry in zip(subjects, entries, strict=True) if entry.profile is not None]
    task = next((entry.profile.task for entry in entries if entry.profile is not None), "")
    if not task:
        bundle = next(subject.bundle for subject in subjects if subject.bundle is not None)
        task = bundle.manifest.task if bundle.manifest else bundle.deploy.task or ""
    comparison = None
    if len(runnable) > 1:
        settings = options.profile.session(options.profile.threads[0])
        # Whoever converts can give models of two tasks one name.
        with contextlib.suppress(TaskMismatchError):
            comparison = compare(runnable, images, settings, boxes=options.boxes, runs=options.compare_runs)
    return Group(model=model, task=task, entries=entries, comparison=comparison)


def write_json(report: Report) -> bytes:
    """As JSON, all samples with it."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def read_report(path: Path) -> Report:
    """A report that was measured before.

    Raises:
        InputError: no such file, or another one.
    """
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise InputError(f"{path}: expected a report, found: {error.strerror}", hint="check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected the JSON of a report, found: {error}", hint="modelcrate report writes one beside its page") from error
    if report.schema != SCHEMA:
        raise InputError(f"{path}: expected the JSON of a report, found: schema {report.schema[:80]!r} instead of {SCHEMA!r}", hint="measure again")
    return report
