"""Data sets with COCO annotations: read strictly for gates, and sifted for tests, where what is broken is named and left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COCO: Final = "images, annotations and categories, as COCO has them"
_OTHER_KEYPOINTS: Final = "evaluate on data of the same set of keypoints"
WHOLE_BODY: Final[Mapping[str, int]] = {"body": 17, "foot": 6, "face": 68, "lefthand": 21, "righthand": 21}
"""The parts of COCO-WholeBody's 133 keypoints, in order, and how many each has."""
_PART_FIELDS: Final = ("foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
"""Where its annotations keep the parts beside the body."""


class Image(msgspec.Struct):
    """An image of COCO's annotations; its size is in pixels, if they say it."""

    id: int
    file_name: str
    width: float | None = None
    height: float | None = None


class Category(msgspec.Struct):
    """A category of COCO's annotations."""

    id: int
    name: str = ""


class Annotation(msgspec.Struct):
    """An object of COCO's annotations: `bbox` is left, top, width, height in pixels; `keypoints` K times x, y, visibility."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    num_keypoints: int = 0
    keypoints: list[float] = msgspec.field(default_factory=list)


class _Content(msgspec.Struct):
    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


class _BoxRow(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """What was left out of a test.

    Attributes:
        what: an image, an annotation, or a row of a file of boxes or labels.
        id: its id; of rows, and of what has none, how many before it there are and one.
        reason: what is wrong with it.
    """

    what: Literal["image", "annotation", "row"]
    id: int | str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} {self.id}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Boxes:
    """The boxes in one image that get a pose.

    Attributes:
        boxes_xyxy: (N, 4) float32 left, top, right, bottom in image pixels.
        scores: (N,) float32.
        categories: (N) ids of the data's categories.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    categories: list[int]

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[float], float, int]]) -> Boxes:
        """From rows of a box, its score and its category."""
        return cls(
            boxes_xyxy=np.array([box for box, _, _ in rows], dtype=np.float32).reshape(-1, 4),
            scores=np.array([score for _, score, _ in rows], dtype=np.float32),
            categories=[category for _, _, category in rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Images with COCO annotations.

    Attributes:
        annotations: the file.
        raw: its content, as the evaluation reads it.
        content: the part of it that is read here. Boxes end at the last pixel of the image where its size is known, as in MMPose's data sets; in `raw` they
            are whole.
        folder: what the images' names are relative to.
    """

    annotations: Path
    raw: dict[str, Any]
    content: _Content
    folder: Path

    @classmethod
    def read(cls, annotations: Path, folder: Path | None = None, *, limit: int | None = None) -> Dataset:
        """Read annotations.

        Args:
            annotations: a COCO JSON file.
            folder: of the images; None for the file's own.
            limit: only so many images, the first ones.

        Raises:
            InputError: no such file, or not such JSON; the message has the JSON path.
        """
        return cls.of(read_coco(annotations), annotations=annotations, folder=folder or annotations.parent, limit=limit)

    @classmethod
    def of(cls, raw: dict[str, Any], *, annotations: Path, folder: Path, limit: int | None = None) -> Dataset:
        """From what such a file has in it.

        Raises:
            InputError: not COCO's structure, or no annotations.
        """
        try:
            content = msgspec.convert(raw, _Content)
        except msgspec.ValidationError as error:
            raise InputError(f"{annotations}: expected COCO annotations, found: {error}", hint=_COCO) from error
        if limit is not None:
            content.images = content.images[:limit]
        known = {image.id: image for image in content.images}
        content.annotations = [one for one in content.annotations if one.image_id in known]
        for one in content.annotations:
            one.bbox = _cut_off(one.bbox, known[one.image_id])
        if not content.annotations:
            raise InputError(f"{annotations}: expected annotated images, found {len(content.images)} images without any annotation")
        return cls(annotations=annotations, raw=raw, content=content, folder=folder)

    def category_ids(self, class_names: Sequence[str]) -> list[int]:
        """Label -> category: by name, or in order where there are as many and no name is known.

        Raises:
            ConfigError: classes that are not the data's.
        """
        by_name = {category.name: category.id for category in self.content.categories}
        if all(name in by_name for name in class_names) and class_names:
            return [by_name[name] for name in class_names]
        if not set(class_names) & by_name.keys() and len(class_names) in {0, len(by_name)}:
            return [category.id for category in self.content.categories]
        missing = next(name for name in class_names if name not in by_name)
        raise ConfigError(
            f"{self.annotations}: categories: expected the model's classes, found none called {missing!r}", hint="evaluate on data of the same classes"
        )

    def names(self, ids: Sequence[int]) -> dict[int, str]:
        """Id -> name of the file of these images."""
        names = {image.id: image.file_name for image in self.content.images}
        return {image_id: names[image_id] for image_id in ids}

    def require_keypoints(self, count: int) -> None:
        """Refuse data of another set of keypoints.

        Args:
            count: what a model has.

        Raises:
            ConfigError: the objects have another number of them, or none.
        """
        _require_counts({len(one.keypoints) // 3 for one in self.content.annotations if one.keypoints}, count, at_all=False, annotations=self.annotations)

    @property
    def keypoint_categories(self) -> list[int]:
        """Ids of the categories whose objects have keypoints, in order."""
        return sorted({one.category_id for one in self.content.annotations if one.keypoints})

    def pose_categories(self, class_names: Sequence[str]) -> dict[int, int]:
        """Label of a detector -> category whose objects have keypoints: by name, or the first label where neither side leaves a choice.

        Raises:
            ConfigError: the detector has no class of that name.
        """
        wanted = self.keypoint_categories
        names = {category.name: category.id for category in self.content.categories if category.id in wanted}
        by_name = {label: names[name] for label, name in enumerate(class_names) if name in names}
        if by_name:
            return by_name
        if len(class_names) <= 1 and len(wanted) == 1:
            return {0: wanted[0]}
        raise ConfigError(
            f"{self.annotations}: categories: expected one that the detector knows, found {', '.join(names)}", hint="give boxes of these with --det-results"
        )

    def instances(self) -> dict[int, list[Annotation]]:
        """Image id -> its objects that get a pose in their true boxes: with visible keypoints and an area, crowds aside."""
        found: dict[int, list[Annotation]] = {}
        for one in self.content.annotations:
            if not one.iscrowd and any(one.keypoints[2::3]) and one.bbox[2] > 0 and one.bbox[3] > 0:
                found.setdefault(one.image_id, []).append(one)
        return found


def read_coco(annotations: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: no such file, or not such JSON.
    """
    raw: dict[str, Any] = _read_json(annotations, dict[str, Any], "COCO annotations", _COCO)
    return raw


def problem_of(value: Any, kind: Any) -> str | None:
    """What keeps a value from being such a struct."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def _read_json(path: Path, kind: Any, expected: str, hint: str) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InputError(f"{path}: expected {expected}, found: {error.strerror}", hint="check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected {expected}, found: {error}", hint=hint) from error


# ------------------------------------------------------------------------------------------------------------------- sifting


def sift(raw: dict[str, Any], *, annotations: Path, folder: Path, limit: int | None = None, keypoints: int | None = None) -> tuple[Dataset, list[Skipped]]:
    """What can be used of annotations, and what cannot.

    The parts of COCO-WholeBody become one list of 133 keypoints.

    Args:
        raw: what `read_coco` gives.
        annotations: the file, for messages.
        folder: of the images.
        limit: only so many images, the first ones.
        keypoints: how many the objects should have; None leaves keypoints out.

    Returns:
        The rest as a data set, and what was left out of it.

    Raises:
        InputError: not COCO's structure, or nothing that can be used.
        ConfigError: all objects have another number of keypoints, or none have any.
    """
    skipped: list[Skipped] = []
    images = _sift_images(_list_of(raw, "images", annotations), skipped)
    categories = [one for one in _list_of(raw, "categories", annotations) if problem_of(one, Category) is None]
    known = {category["id"] for category in categories}
    chosen = set(list(images)[:limit])
    kept: list[dict[str, Any]] = []
    counts: set[int] = set()
    taken: set[int] = set()
    for number, one in enumerate(_list_of(raw, "annotations", annotations), start=1):
        if isinstance(one, dict) and one.get("image_id") in images.keys() - chosen:
            continue
        whole = _with_keypoints(one, keypoints) if isinstance(one, dict) else one
        reason = problem_of(whole, Annotation) or _unusable(whole, images, known, taken)
        if reason is None and keypoints is not None and whole.get("keypoints"):
            counts.add(len(whole["keypoints"]) // 3)
            reason = _bad_keypoints(whole, keypoints, msgspec.convert(images[whole["image_id"]], Image))
        if reason is not None:
            skipped.append(Skipped(what="annotation", id=_name(one, number), reason=reason))
            continue
        taken.add(whole["id"])
        kept.append(whole)
    if keypoints is not None:
        _require_counts(counts, keypoints, at_all=True, annotations=annotations)
    if skipped and not kept:
        raise InputError(f"{annotations}: expected annotations that can be used, found none of {len(skipped)}: {skipped[0]}", hint=_COCO)
    clean = raw | {"images": list(images.values()), "annotations": kept, "categories": categories}
    return Dataset.of(clean, annotations=annotations, folder=folder, limit=limit), skipped


def _list_of(raw: dict[str, Any], key: str, annotations: Path) -> list[Any]:
    value = raw.get(key)
    if not isinstance(value, list):
        raise InputError(f"{annotations}: expected COCO annotations, found {'no' if value is None else 'something else as'} {key}", hint=_COCO)
    return value


def _sift_images(raw: list[Any], skipped: list[Skipped]) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(raw, start=1):
        reason = problem_of(one, Image) or ("id: expected another for each image, found it twice" if one["id"] in images else None)
        if reason is None:
            images[one["id"]] = one
        else:
            skipped.append(Skipped(what="image", id=_name(one, number), reason=reason))
    return images


def _name(one: Any, number: int) -> int | str:
    found = one.get("id") if isinstance(one, dict) else None
    return found if isinstance(found, (int, str)) else f"number {number}"


def _with_keypoints(one: dict[str, Any], keypoints: int | None) -> dict[str, Any]:
    """The annotation with the keypoints that count: none of them, or COCO-WholeBody's in one list."""
    if keypoints is None:
        return {key: value for key, value in one.items() if key not in {"keypoints", "num_keypoints"}}
    if keypoints != sum(WHOLE_BODY.values()) or not any(part in one for part in _PART_FIELDS):
        return one
    parts = [one.get("keypoints"), *(one.get(part) for part in _PART_FIELDS)]
    lists = [part if isinstance(part, list) else [] for part in parts]
    return one | {"keypoints": [value for part in lists for value in part]}


def _unusable(one: dict[str, Any], images: Mapping[int, Any], categories: set[int], taken: set[int]) -> str | None:
    if one["image_id"] not in images:
        return f"image_id: expected the id of an image, found {one['image_id']}"
    if one["category_id"] not in categories:
        return f"category_id: expected the id of a category, found {one['category_id']}"
    if one["id"] in taken:
        return "id: expected another for each annotation, found it twice"
    if not all(math.isfinite(number) for number in one["bbox"]) or min(one["bbox"][2:]) < 0:
        return f"bbox: expected left, top, width and height, found {one['bbox']}"
    area = one.get("area", 0)
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        return f"area: expected a number, found {area!r}"
    return None


def _bad_keypoints(one: dict[str, Any], keypoints: int, image: Image) -> str | None:
    if len(one["keypoints"]) != 3 * keypoints:
        return f"keypoints: expected {3 * keypoints} numbers, found {len(one['keypoints'])}"
    if not all(math.isfinite(number) for number in one["keypoints"]):
        return "keypoints: expected finite numbers, found others"
    if one.get("iscrowd") or not any(one["keypoints"][2::3]):
        return None
    return None if min(_cut_off(one["bbox"], image)[2:]) > 0 else f"bbox: expected an area within the image, found {one['bbox']}"


def _cut_off(bbox: Sequence[float], image: Image) -> tuple[float, float, float, float]:
    """What of a box lies before the last pixel of the image: `BaseCocoStyleDataset.parse_data_info`."""
    left, top, width, height = bbox
    if not image.width or not image.height:
        return left, top, width, height
    (x, right), (y, bottom) = (
        (min(max(first, 0.0), limit - 1), min(max(first + side, 0.0), limit - 1))
        for first, side, limit in ((left, width, image.width), (top, height, image.height))
    )
    return x, y, right - x, bottom - y


def _require_counts(counts: set[int], expected: int, *, at_all: bool, annotations: Path) -> None:
    if expected in counts if at_all else counts == {expected}:
        return
    found = " and ".join(str(count) for count in sorted(counts)) or "none"
    raise ConfigError(f"{annotations}: keypoints: expected {expected} for each object, as the model has, found {found}", hint=_OTHER_KEYPOINTS)


# --------------------------------------------------------------------------------------------------------------------- boxes


def read_boxes(path: Path, dataset: Dataset, *, least_score: float = 0.0) -> tuple[dict[int, Boxes], list[Skipped]]:
    """Detections from a file in COCO's format of results, as MMPose's `bbox_file`: all of the categories that have keypoints, none suppressed.

    Args:
        path: a JSON list of `image_id`, `category_id`, `bbox` (left, top, width, height) and `score`.
        dataset: whose images they are.
        least_score: boxes that score less are left out, MMPose's `bbox_score_thr`.

    Returns:
        Image id -> its boxes, for images that have some; and the rows that cannot be used.

    Raises:
        InputError: no such file, or no box in it for these images.
    """
    rows = _read_json(path, list[Any], "a list of detections", "COCO's format of results: image_id, category_id, bbox and score")
    skipped: list[Skipped] = []
    known = {image["id"] for image in dataset.raw["images"]}
    chosen, wanted = {image.id for image in dataset.content.images}, set(dataset.keypoint_categories)
    found: dict[int, list[tuple[list[float], float, int]]] = {}
    for number, one in enumerate(rows, start=1):
        reason = problem_of(one, _BoxRow)
        if reason is None and one["image_id"] not in known:
            reason = f"image_id: expected the id of an image, found {one['image_id']}"
        if reason is None and (not all(math.isfinite(value) for value in (*one["bbox"], one["score"])) or min(one["bbox"][2:]) <= 0):
            reason = f"bbox: expected left, top, width and height above 0, found {one['bbox']}"
        if reason is not None:
            skipped.append(Skipped(what="row", id=number, reason=reason))
        elif one["image_id"] in chosen and one["category_id"] in wanted and one["score"] >= least_score:
            left, top, width, height = one["bbox"]
            found.setdefault(one["image_id"], []).append(([left, top, left + width, top + height], one["score"], one["category_id"]))
    if not found:
        raise InputError(
            f"{path}: expected boxes in the images of {dataset.annotations}, found none that can be used of {len(rows)}",
            hint="their category has to be one of those that have keypoints",
        )
    return {image_id: Boxes.of(of_image) for image_id, of_image in found.items()}, skipped
