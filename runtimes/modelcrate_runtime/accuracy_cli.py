"""`modelcrate test`: the accuracy of bundles on annotated images, beside that of the checkpoint, in one table."""

from __future__ import annotations

import math
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelcrate_bundle.errors import ConfigError, OutputError
from modelcrate_runtime.cli import CUDA_BINDING, DEVICE, DEVICE_ID, JSON_OPTION, THREADS, app, consoles, exit_on_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from modelcrate_runtime.accuracy import Report
    from modelcrate_runtime.class_labels import Labelled
    from modelcrate_runtime.coco_data import Boxes, Dataset, Skipped
    from modelcrate_runtime.sessions import SessionOptions
    from modelcrate_runtime.subjects import Subject
    from modelcrate_runtime.trials import Score, TaskFacts, Trial

_NAMED = 5
"""How many of what was skipped are named below the table."""
_SMALL = frozenset({"APS", "APM", "APL", "AR1", "AR10", "AR50", "AR75", "ARS", "ARM", "ARL"})
"""What a narrow table does without."""


@app.command("test")
def compare_accuracy(
    subjects: Annotated[
        list[str],
        typer.Argument(help="Bundles (folders or zips), checkpoints, names of published models, demo-det, demo-pose; all of one task.", metavar="SUBJECT..."),
    ],
    annotations: Annotated[Path, typer.Option(help="COCO annotations. For classifiers also a text file: an image and its class, or its index, in each line.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images; default: the annotations' own.")] = None,
    det: Annotated[str | None, typer.Option(help="Detector, bundle or checkpoint, whose boxes pose estimators get. Default: the true boxes.")] = None,
    det_results: Annotated[Path | None, typer.Option(help="File of boxes for pose estimators, in COCO's format of results, like MMPose's bbox_file.")] = None,
    det_score: Annotated[float, typer.Option(min=0, help="What a box of --det or --det-results has to score at least. None is suppressed.")] = 0.0,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="bbox, keypoints, pck, auc, epe, nme or topk; may be repeated. Default: AP; PCK, AUC and EPE of hands; NME of faces; top-1 and top-5 of classes."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The subject that the others are compared with. Default: the first checkpoint, else the first.")] = None,
    flip_test: Annotated[
        bool, typer.Option("--flip-test", help="Pose estimators: average with what the mirrored image gives, as MMPose's configs do.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images, the first ones.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one call.")] = 8,
    save_results: Annotated[Path | None, typer.Option(help="Folder that gets the results of each subject in COCO's format.")] = None,
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    cuda_binding: CUDA_BINDING = None,
    threads: THREADS = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Measure accuracy on annotated images: COCO's AP and AR, PCK, AUC, EPE, NME, top-k; several targets and their checkpoint in one table."""
    with exit_on_error():
        from modelcrate_runtime.average_precision import check_evaluator
        from modelcrate_runtime.sessions import SessionOptions
        from modelcrate_runtime.subjects import find_subjects
        from modelcrate_runtime.trials import Trial, choose_metrics, facts_of, read_annotations, require_alike

        has_boxes = det is not None or det_results is not None
        if det is not None and det_results is not None:
            raise ConfigError("--det, --det-results: expected one of them, found both")
        if det_score and not has_boxes:
            raise ConfigError("--det-score: expected --det or --det-results beside it, found neither")
        options = SessionOptions(device=device, device_id=device_id, threads=threads, cuda_binding=cuda_binding)
        found = find_subjects(subjects)
        to_compare = _reference(found, subjects, reference)
        facts = require_alike(found, [facts_of(subject, options) for subject in found])
        if facts.task != "pose estimator" and (has_boxes or flip_test):
            option = "--flip-test" if flip_test else "--det, --det-results"
            raise ConfigError(f"{option}: expected pose estimators, found a {facts.task}", hint=f"leave {option} out")
        metrics = choose_metrics(facts, metric or (), has_true_boxes=not has_boxes)
        if {"bbox", "keypoints"} & set(metrics):
            check_evaluator()
        places = _places(save_results, found, facts)
        data, skipped = read_annotations(annotations, images or annotations.parent, facts, limit)
        boxes, more = _boxes(det, det_results, data, options, batch=batch, least_score=det_score)
        skipped += more
        scores = _measure(found, places, facts, Trial(metrics=metrics, data=data, boxes=boxes, batch=batch), options, skipped, flip=flip_test)
        settings = {
            "annotations": str(annotations),
            "images": str(data.folder),
            "boxes": det or (str(det_results) if det_results else None) or ("truth" if facts.task == "pose estimator" else None),
            "flip_test": flip_test,
            "batch": batch,
            "metrics": list(metrics),
        }
        if as_json:
            _print_json(settings, found, scores, to_compare, facts, skipped, places)
        else:
            _print_table(settings, found, scores, to_compare, facts, skipped)


def _measure(
    subjects: Sequence[Subject],
    places: Sequence[Path | None],
    facts: TaskFacts,
    trial: Trial,
    options: SessionOptions,
    skipped: list[Skipped],
    *,
    flip: bool,
) -> list[Score]:
    """One after another; the results of each are written before the next begins."""
    from modelcrate_runtime.coco_data import Skipped
    from modelcrate_runtime.flip_test import flip_test
    from modelcrate_runtime.trials import measure

    scores: list[Score] = []
    for subject, place in zip(subjects, places, strict=True):
        with subject.open(options, wrap=flip_test(subject) if flip else None) as task, _bar(subject.name) as report:
            score = measure(task, facts, trial, report)
        if place is not None:
            _save(place, score, facts)
        scores.append(score)
        known = {one.id for one in skipped if one.what == "image"}
        skipped += [Skipped(what="image", id=key, reason=text) for key, text in score.result.skipped.items() if key not in known]
    return scores


def _reference(subjects: Sequence[Subject], texts: Sequence[str], wanted: str | None) -> Subject:
    """Which of them the others are compared with."""
    if wanted is None:
        return next((subject for subject in subjects if subject.bundle is None), subjects[0])
    for subject, text in zip(subjects, texts, strict=True):
        if wanted in {subject.name, text}:
            return subject
    raise ConfigError(f"--reference: expected one of {', '.join(subject.name for subject in subjects)}, found {wanted}")


def _places(folder: Path | None, subjects: Sequence[Subject], facts: TaskFacts) -> list[Path | None]:
    """Where the results of each subject go. Said before the first network runs."""
    if folder is None:
        return [None] * len(subjects)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--save-results {folder}: expected a folder, found a file", hint="--save-results results/")
    if (folder / "deploy.json").is_file():
        raise OutputError(f"--save-results {folder}: expected a place for results, found a bundle", hint="--save-results results/")
    kind = {"detector": "bbox", "pose estimator": "keypoints"}.get(facts.task, "classes")
    return [folder / f"{re.sub(r'[^A-Za-z0-9_.()-]+', '-', subject.name)}.{kind}.json" for subject in subjects]


def _boxes(
    det: str | None, det_results: Path | None, data: Dataset | Labelled, options: SessionOptions, *, batch: int, least_score: float
) -> tuple[dict[int, Boxes] | None, list[Skipped]]:
    """The boxes for pose estimators, if they are not the true ones."""
    from modelcrate_bundle.errors import TaskMismatchError
    from modelcrate_runtime.accuracy import detect_boxes
    from modelcrate_runtime.coco_data import Dataset, read_boxes
    from modelcrate_runtime.subjects import find_subject
    from modelcrate_runtime.tasks import Detector

    if not isinstance(data, Dataset) or (det is None and det_results is None):
        return None, []
    if det is None:
        assert det_results is not None
        return read_boxes(det_results, data, least_score=least_score)
    subject = find_subject(det)
    with subject.open(options) as task, _bar(f"boxes of {subject.name}") as report:
        if not isinstance(task, Detector):
            raise TaskMismatchError(f"--det {det}: expected a detector, found a {type(task).__name__}")
        return detect_boxes(task, data, report, batch=batch, least_score=least_score), []


def _save(place: Path, score: Score, facts: TaskFacts) -> None:
    import msgspec

    from modelcrate_runtime.coco_data import WHOLE_BODY
    from modelcrate_runtime.images import write_bytes
    from modelcrate_runtime.trials import whole_body_rows

    is_whole_body = facts.keypoint_count == sum(WHOLE_BODY.values())
    rows = whole_body_rows(score.result.rows) if is_whole_body else score.result.rows
    write_bytes(place, msgspec.json.encode(rows), option="--save-results")
    consoles()[1].print(f"wrote {place}", style="dim", soft_wrap=True)


@contextmanager
def _bar(what: str) -> Iterator[Report]:
    """A bar with images per second."""
    from modelcrate_runtime.count_bar import CountBar

    started = time.monotonic()
    with CountBar(what, "image") as bar:
        yield lambda done, total: bar.show(done, f"{done / max(time.monotonic() - started, 1e-9):.1f} images/s", total=total)


# ------------------------------------------------------------------------------------------------------------------- results


def _print_json(
    settings: dict[str, Any],
    subjects: Sequence[Subject],
    scores: Sequence[Score],
    to_compare: Subject,
    facts: TaskFacts,
    skipped: Sequence[Skipped],
    places: Sequence[Path | None],
) -> None:
    import msgspec

    from modelcrate_runtime.trials import drops, norms_of

    best = scores[list(subjects).index(to_compare)]
    rows = [
        {
            "name": subject.name,
            "backend": subject.backend,
            "precision": subject.precision,
            "size_bytes": subject.size_bytes,
            "images": score.result.images,
            "objects": score.objects,
            "seconds": score.result.seconds,
            "images_per_second": score.images_per_s,
            "figures": score.figures,
            "drops": drops(score.figures, best.figures),
            "results": str(place) if place is not None else None,
        }
        for subject, score, place in zip(subjects, scores, places, strict=True)
    ]
    left_out = [{"what": one.what, "id": one.id, "reason": one.reason} for one in skipped]
    content = {**settings, "norms": norms_of(settings["metrics"], facts), "reference": to_compare.name, "subjects": rows, "skipped": left_out}
    # It writes NaN as null, since JSON has no word for it.
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n")


def _print_table(
    settings: dict[str, Any], subjects: Sequence[Subject], scores: Sequence[Score], to_compare: Subject, facts: TaskFacts, skipped: Sequence[Skipped]
) -> None:
    from modelcrate_runtime.trials import MAIN_FIGURES, norms_of

    out = consoles()[0]
    best = scores[list(subjects).index(to_compare)]
    where = {None: "", "truth": " in true boxes"}.get(settings["boxes"], f" in boxes of {settings['boxes']}")
    flip = ", flip test" if settings["flip_test"] else ""
    out.print(f"{settings['annotations']}: {best.result.images} images, {best.objects} results{where}{flip}", style="italic", soft_wrap=True)
    columns = _columns(best)
    table = _table(subjects, scores, to_compare, columns)
    fewer = [column for column in columns if column[2] not in _SMALL]
    if len(fewer) < len(columns) and out.measure(table, options=out.options.update(max_width=1000)).maximum > out.width:
        out.print(_table(subjects, scores, to_compare, fewer))
        out.print("a wider terminal, and --json, have more figures", style="dim", soft_wrap=True)
    else:
        out.print(table)
    for metric, words in norms_of(settings["metrics"], facts).items():
        if metric != "epe":
            out.print(f"{MAIN_FIGURES[metric]}: {words}", style="dim", soft_wrap=True)
    if skipped:
        kinds = {what: sum(one.what == what for one in skipped) for what in ("image", "annotation", "row")}
        counted = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in kinds.items() if count)
        out.print(f"skipped: {counted}", style="yellow")
        for one in skipped[:_NAMED]:
            out.print(f"  {one}", style="yellow", soft_wrap=True)
        if len(skipped) > _NAMED:
            out.print(f"  and {len(skipped) - _NAMED} more: --json names all", style="yellow")


def _table(subjects: Sequence[Subject], scores: Sequence[Score], to_compare: Subject, columns: Sequence[tuple[str, str, str]]) -> Table:
    from rich.table import Table

    from modelcrate_runtime.trials import drops

    best = scores[list(subjects).index(to_compare)]
    table = Table("subject", *(heading for heading, _, _ in columns), *(f"{name} drop" for name in _main_figures(best).values()), "images/s")
    table.columns[0].overflow = "fold"  # names that differ at their ends must not be cut off there
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for subject, score in zip(subjects, scores, strict=True):
        behind = drops(score.figures, best.figures)
        cells = [_figure(name, score.figures[metric][name]) for _, metric, name in columns]
        lost = ["reference" if subject is to_compare else _drop(name, behind[metric][name]) for metric, name in _main_figures(best).items()]
        table.add_row(subject.name, *cells, *lost, f"{score.images_per_s:.1f}")
    return table


def _main_figures(score: Score) -> dict[str, str]:
    """Metric -> its main figure, of those that were measured."""
    from modelcrate_runtime.trials import MAIN_FIGURES

    return {metric: MAIN_FIGURES[metric] for metric in score.figures if metric in MAIN_FIGURES}


def _columns(score: Score) -> list[tuple[str, str, str]]:
    """Heading, metric and figure of each column; a part of the whole body has its AP alone."""
    columns = []
    for metric, figures in score.figures.items():
        part = metric.partition("_")[2].replace("hand", " hand")
        for name in ["AP"] if part else figures:
            unit = {"EPE": " px"}.get(name, "")
            columns.append((f"{part} {name}{unit}".strip(), metric, name))
    return columns


def _figure(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return {"EPE": f"{value:.2f}", "NME": f"{value:.4f}"}.get(name, f"{100 * value:.2f}")


def _drop(name: str, value: float) -> str:
    """Without the sign of a zero."""
    if math.isnan(value):
        return "-"
    digits = 4 if name == "NME" else 2
    return f"{round(value, digits) + 0.0:.{digits}f}"
