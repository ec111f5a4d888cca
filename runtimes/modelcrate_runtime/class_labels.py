"""Images with classes, for the accuracy of classifiers: from COCO annotations, or from a text file with a line for each image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.accuracy import read_batches
from modelcrate_runtime.average_precision import Accuracy
from modelcrate_runtime.coco_data import Category, Image, Skipped, problem_of, read_coco

if TYPE_CHECKING:
    from modelcrate_runtime.accuracy import Report
    from modelcrate_runtime.tasks import Classifier

TOP: Final = (1, 5)
"""Among how many of the best classes the right one is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Images and their classes.

    Attributes:
        annotations: the file.
        folder: what the images' names are relative to.
        names: image id -> name of the file.
        labels: image id -> index into the model's classes.
    """

    annotations: Path
    folder: Path
    names: dict[int, str]
    labels: dict[int, int]


def read_labels(path: Path, folder: Path, *, class_names: Sequence[str], limit: int | None = None) -> tuple[Labelled, list[Skipped]]:
    """Read what the images show.

    Args:
        path: COCO annotations, where the category of an image's first annotation is its class; or a text file of lines with the name of an image and its
            class, by name or by index, separated by spaces.
        folder: of the images.
        class_names: the model's; empty where they are not known.
        limit: only so many images, the first ones.

    Returns:
        The images whose class is known, and what cannot be used.

    Raises:
        InputError: no such file, or no image with a class in it.
        ConfigError: categories that are not the model's classes.
    """
    skipped: list[Skipped] = []
    try:
        with path.open("rb") as stream:
            is_json = stream.read(64).lstrip().startswith((b"{", b"["))
    except OSError as error:
        raise InputError(f"{path}: expected COCO annotations or lines of files and labels, found: {error.strerror}", hint="check the path") from error
    rows = _of_coco(read_coco(path), path, class_names, skipped) if is_json else _of_text(path, class_names, skipped)
    chosen = rows[:limit]
    if not chosen:
        reason = f"none of {len(skipped)}: {skipped[0]}" if skipped else "none"
        raise InputError(f"{path}: expected images with a class, found {reason}", hint="COCO annotations, or lines like: images/1.jpg 0")
    names = {image_id: name for image_id, name, _ in chosen}
    return Labelled(annotations=path, folder=folder, names=names, labels={image_id: label for image_id, _, label in chosen}), skipped


def _of_coco(raw: dict[str, Any], path: Path, class_names: Sequence[str], skipped: list[Skipped]) -> list[tuple[int, str, int]]:
    if not all(isinstance(raw.get(key), list) for key in ("images", "annotations", "categories")):
        raise InputError(f"{path}: expected images, annotations and categories, as COCO has them, found {', '.join(raw) or 'nothing'}")
    labels = _labels_of([one for one in raw["categories"] if problem_of(one, Category) is None], path, class_names)
    first: dict[Any, Any] = {}
    for one in raw["annotations"]:
        if isinstance(one, dict) and isinstance(one.get("image_id"), int):
            first.setdefault(one["image_id"], one.get("category_id"))
    rows: dict[int, tuple[int, str, int]] = {}
    for number, image in enumerate(raw["images"], start=1):
        reason = problem_of(image, Image)
        if reason is None and image["id"] in rows:
            reason = "id: expected another for each image, found it twice"
        category = first.get(image["id"]) if reason is None else None
        if reason is None and not (isinstance(category, int) and category in labels):
            reason = "expected an annotation with the class, found " + ("none" if category is None else f"the category {category}, which the model lacks")
        if reason is not None:
            found = image.get("id") if isinstance(image, dict) else None
            skipped.append(Skipped(what="image", id=found if isinstance(found, (int, str)) else f"number {number}", reason=reason))
        else:
            rows[image["id"]] = (image["id"], image["file_name"], labels[first[image["id"]]])
    return list(rows.values())


def _labels_of(categories: Sequence[Mapping[str, Any]], path: Path, class_names: Sequence[str]) -> dict[int, int]:
    """Category -> label: by name, those that the model has; in order where there are as many and no name is known."""
    labels = {name: label for label, name in enumerate(class_names)}
    by_name = {one["id"]: labels[one["name"]] for one in categories if one.get("name") in labels}
    if by_name:
        return by_name
    if len(class_names) in {0, len(categories)}:
        return {one["id"]: label for label, one in enumerate(categories)}
    raise ConfigError(
        f"{path}: categories: expected some of the model's {len(class_names)} classes, found {', '.join(str(one.get('name', '')) for one in categories[:5])}",
        hint="evaluate on data of the same classes",
    )


def _of_text(path: Path, class_names: Sequence[str], skipped: list[Skipped]) -> list[tuple[int, str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected COCO annotations or lines of files and labels, found: {error.reason}") from error
    labels = {name: label for label, name in enumerate(class_names)}
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, label = _split(line.strip(), labels)
        if label is None or (class_names and not 0 <= label < len(class_names)) or label < 0:
            of = f" below {len(class_names)}" if class_names else ""
            skipped.append(Skipped(what="row", id=number, reason=f"expected a file and a class or an index{of}, found {line.strip()[:80]!r}"))
        else:
            rows.append((number, name, label))
    return rows


def _split(line: str, labels: Mapping[str, int]) -> tuple[str, int | None]:
    """File and label of a line; both may have spaces in them, and the longest name of a class counts."""
    words = line.split()
    for count in range(len(words) - 1, 0, -1):
        name = " ".join(words[-count:])
        if name in labels:
            return line.rsplit(maxsplit=count)[0], labels[name]
    if len(words) > 1 and words[-1].isdecimal():
        return line.rsplit(maxsplit=1)[0], int(words[-1])
    return line, None


def find_classes(classifier: Classifier, data: Labelled, report: Report | None = None, *, batch: int = 1) -> Accuracy:
    """The best classes of each image, as rows of its id, its file's name, labels and scores.

    Args:
        classifier: an opened classifier.
        data: the images.
        report: gets the progress.
        batch: images in one call.

    Raises:
        InputError: no image could be read.
    """
    result = Accuracy(kind="classes")
    for part in read_batches(data.names, data.folder, result, report, batch=batch, where=data.annotations):
        found = classifier.classify_batch([image for _, image in part])
        for (image_id, _), best in zip(part, found, strict=True):
            result.rows.append({"image_id": image_id, "file_name": data.names[image_id], "labels": best.labels.tolist(), "scores": best.scores.tolist()})
    return result


def top_k(result: Accuracy, data: Labelled, *, class_count: int | None = None) -> dict[str, float]:
    """The shares of images whose class is among the 1 and the 5 best, from 0 to 1.

    Args:
        result: what was found, one row or more.
        data: the truth.
        class_count: how many classes there are, if it is known.

    Returns:
        "top-1" and "top-5"; NaN where the bundle gives fewer classes of an image than that and not all.
    """
    given = min(len(row["labels"]) for row in result.rows)
    is_all = class_count is not None and given >= class_count
    figures = {}
    for count in TOP:
        hits = [data.labels[row["image_id"]] in row["labels"][:count] for row in result.rows]
        figures[f"top-{count}"] = sum(hits) / len(hits) if given >= count or is_all else math.nan
    return figures
