"""Accuracy on COCO data: what is read, what is refused, that the truth scores 1, and that what cannot be read is left out of both sides."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tracker_bundles
from modelcrate_bundle.errors import ConfigError, InputError, MissingBackendError
from modelcrate_converter.people.dataset import write_dataset
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.accuracy import FIGURES, Accuracy, Dataset, check_evaluator, coco_figures, detect_boxes, evaluate_boxes, evaluate_keypoints
from modelcrate_runtime.images import write_image

IMAGES = 6
has_evaluator = pytest.mark.skipif(importlib.util.find_spec("faster_coco_eval") is None, reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The annotations of a few drawn scenes. Do not change the folder: copy it."""
    folder = tmp_path_factory.mktemp("data") / "people"
    write_dataset(folder, count=IMAGES, seed=78, size_hw=(192, 192), people=(1, 3))
    return folder / "annotations.json"


@pytest.fixture
def data(people: Path, tmp_path: Path) -> Path:
    """A copy of them, which may be changed."""
    shutil.copytree(people.parent, tmp_path / "data")
    return tmp_path / "data/annotations.json"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


# --------------------------------------------------------------------------------------------------------------------- reading


def test_annotations_are_read_with_the_folder_of_their_images(people: Path, tmp_path: Path) -> None:
    dataset = Dataset.read(people)
    raw = json.loads(people.read_bytes())
    assert dataset.raw == raw
    assert (dataset.annotations, dataset.folder) == (people, people.parent)
    assert [image.id for image in dataset.content.images] == [image["id"] for image in raw["images"]]
    assert len(dataset.content.annotations) == len(raw["annotations"])
    assert Dataset.read(people, tmp_path).folder == tmp_path


@pytest.mark.parametrize("limit", [1, 2, IMAGES, 100])
def test_a_limit_takes_the_first_images_and_what_is_in_them(people: Path, limit: int) -> None:
    dataset = Dataset.read(people, limit=limit)
    ids = [image["id"] for image in json.loads(people.read_bytes())["images"]][:limit]
    assert [image.id for image in dataset.content.images] == ids
    assert {one.image_id for one in dataset.content.annotations} == set(ids)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: expected COCO annotations, found: No such file") as caught:
        Dataset.read(tmp_path / "gone.json")
    assert caught.value.hint
    with pytest.raises(InputError, match="expected COCO annotations, found: Is a directory"):
        Dataset.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no JSON", b"{", b"[]", b"\xff\xfe{}", b'{"images": [], "annotations": "\xff"}', b"null"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: expected COCO annotations, found: ") as caught:
        Dataset.read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_json_of_another_form_is_refused_with_its_place(data: Path) -> None:
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda raw: raw.pop("images"), "missing required field `images`"),
        (lambda raw: raw.pop("categories"), "missing required field `categories`"),
        (lambda raw: raw["images"][1].update(id="two"), r"at `\$\.images\[[\d.]+\]\.id`"),
        (lambda raw: raw["images"][0].pop("file_name"), r"missing required field `file_name` - at `\$\.images\[[\d.]+\]`"),
        (lambda raw: raw["annotations"][2].update(bbox=[1, 2, 3]), r"at `\$\.annotations\[[\d.]+\]\.bbox`"),
        (lambda raw: raw["annotations"][2].update(keypoints="all"), r"at `\$\.annotations\[[\d.]+\]\.keypoints`"),
    ]
    before = data.read_bytes()
    for change, message in cases:
        data.write_bytes(before)
        with pytest.raises(InputError, match=message):
            Dataset.read(changed(data, change))


def test_images_without_annotations_are_nothing_to_measure_on(data: Path) -> None:
    with pytest.raises(InputError, match=f"expected annotated images, found {IMAGES} images without any annotation"):
        Dataset.read(changed(data, lambda raw: raw.update(annotations=[])))
    shutil.copy(data, data.with_name("other.json"))
    with pytest.raises(InputError, match="expected annotated images, found 0 images"):
        Dataset.read(changed(data, lambda raw: raw.update(images=[])))


def named(data: Path, *names: str) -> Dataset:
    """With categories of these names, numbered from 10 on."""
    return Dataset.read(changed(data, lambda raw: raw.update(categories=[{"id": 10 + i, "name": name} for i, name in enumerate(names)])))


def test_labels_are_categories_by_name(data: Path) -> None:
    dataset = named(data, "cat", "dog", "person")
    assert dataset.category_ids(["person"]) == [12]
    assert dataset.category_ids(["dog", "cat"]) == [11, 10]
    assert dataset.category_ids(["person", "cat", "dog"]) == [12, 10, 11]


def test_labels_are_categories_in_order_where_no_name_is_known(data: Path) -> None:
    dataset = named(data, "cat", "dog")
    assert dataset.category_ids(["a", "b"]) == [10, 11]
    assert dataset.category_ids([]) == [10, 11]


@pytest.mark.parametrize("names", [["cat", "horse"], ["horse"], ["a", "b", "c"], ["cat", "dog", "horse"]])
def test_classes_that_are_not_the_datas_are_refused_by_name(data: Path, names: list[str]) -> None:
    missing = next(name for name in names if name not in {"cat", "dog"})
    with pytest.raises(ConfigError, match=rf"annotations\.json: categories: expected the model's classes, found none called '{missing}'") as caught:
        named(data, "cat", "dog").category_ids(names)
    assert caught.value.hint


def test_without_its_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, people: Path, demo_detector_bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingBackendError, match="needs faster-coco-eval, not installed") as caught:
        check_evaluator()
    assert caught.value.hint == "pip install 'modelcrate[eval]'"
    with Detector(demo_detector_bundle, threads=1) as detector, pytest.raises(MissingBackendError):
        evaluate_boxes(detector, Dataset.read(people))


# ------------------------------------------------------------------------------------------------------------------- the truth


def truth(raw: dict[str, Any], kind: str, *, noise: float = 0.0, keep: float = 1.0) -> Accuracy:
    """Results that are the truth, or near it: those that count, each with another score."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for one in raw["annotations"]:
        if one["iscrowd"] or (kind == "keypoints" and not one["num_keypoints"]) or rng.random() > keep:
            continue
        row: dict[str, Any] = {"image_id": one["image_id"], "category_id": one["category_id"], "score": float(rng.uniform(0.1, 1))}
        if kind == "bbox":
            row["bbox"] = (np.array(one["bbox"]) + noise * rng.standard_normal(4)).tolist()
        else:
            points = np.array(one["keypoints"], dtype=float).reshape(-1, 3)
            row["keypoints"] = (points + noise * rng.standard_normal(points.shape) * [1, 1, 0]).ravel().tolist()
        rows.append(row)
    return Accuracy(kind=kind, rows=rows)  # type: ignore[arg-type]


@has_evaluator
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_the_truth_scores_one(people: Path, kind: str) -> None:
    dataset = Dataset.read(people)
    before = copy.deepcopy(dataset.raw)
    found = coco_figures(dataset, truth(dataset.raw, kind))
    assert list(found) == list(FIGURES)
    assert list(found.values()) == pytest.approx([1.0] * 4)
    assert dataset.raw == before


@has_evaluator
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_less_than_the_truth_scores_less(people: Path, kind: str) -> None:
    dataset = Dataset.read(people)
    near, missing = (coco_figures(dataset, truth(dataset.raw, kind, **options)) for options in ({"noise": 2.5}, {"keep": 0.5}))
    assert 0.05 < near["AP"] < 0.95
    assert near["AP"] < near["AP50"]
    assert 0.1 < missing["AR"] < 0.9
    assert coco_figures(dataset, Accuracy(kind=kind)) == dict.fromkeys(FIGURES, 0.0)  # type: ignore[arg-type]


@has_evaluator
def test_the_sigmas_decide_how_near_is_near(people: Path) -> None:
    dataset = Dataset.read(people)
    result = truth(dataset.raw, "keypoints", noise=2.5)
    loose, strict = (coco_figures(dataset, result, sigmas=[sigma] * 17)["AP"] for sigma in (1.0, 0.01))
    assert loose == pytest.approx(1)
    assert strict < 0.2


def overlap(one: list[float], other: list[float]) -> float:
    (left, top, width, height), (x, y, w, h) = one, other
    both = max(0.0, min(left + width, x + w) - max(left, x)) * max(0.0, min(top + height, y + h) - max(top, y))
    return both / (width * height + w * h - both)


def average_precision(raw: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """COCO's AP of boxes of one class without crowds, as its paper has it: ten thresholds, 101 recalls."""
    figures = []
    for threshold in np.arange(0.5, 0.96, 0.05):
        taken: set[int] = set()
        hits = []
        for row in sorted(rows, key=lambda row: -row["score"]):
            free = [one for one in raw["annotations"] if one["image_id"] == row["image_id"] and one["id"] not in taken]
            best = max(free, key=lambda one: overlap(one["bbox"], row["bbox"]), default=None)
            hits.append(best is not None and overlap(best["bbox"], row["bbox"]) >= threshold)
            if hits[-1]:
                taken.add(best["id"])
        right = np.cumsum(hits)
        precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
        at = np.searchsorted(right / len(raw["annotations"]), np.linspace(0, 1, 101))
        figures.append(np.append(precision, 0)[at].mean())
    return float(np.mean(figures))


@has_evaluator
@pytest.mark.parametrize(("noise", "keep"), [(0.0, 0.6), (2.0, 1.0), (4.0, 0.8)])
def test_ap_is_what_another_implementation_has(data: Path, noise: float, keep: float) -> None:
    dataset = Dataset.read(changed(data, lambda raw: [one.update(iscrowd=0) for one in raw["annotations"]]))
    result = truth(dataset.raw, "bbox", noise=noise, keep=keep)
    assert coco_figures(dataset, result)["AP"] == pytest.approx(average_precision(dataset.raw, result.rows), abs=1e-6)


@has_evaluator
@pytest.mark.parametrize("missing", ["area", "num_keypoints", "iscrowd", "track_id"])
def test_annotations_need_not_say_what_follows_from_the_rest(data: Path, missing: str) -> None:
    dataset = Dataset.read(changed(data, lambda raw: [one.pop(missing) for one in raw["annotations"] if not one["iscrowd"]]))
    before = copy.deepcopy(dataset.raw)
    for kind in ("bbox", "keypoints"):
        result = truth({"annotations": [{"iscrowd": 0, "num_keypoints": 1} | one for one in dataset.raw["annotations"]]}, kind)
        assert coco_figures(dataset, result)["AP"] == pytest.approx(1.0)
    assert dataset.raw == before


@has_evaluator
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
@pytest.mark.parametrize("change", [{"iscrowd": 1}, {"category_id": 99}], ids=["crowds", "another class"])
def test_where_there_is_nothing_to_find_there_is_no_ap(data: Path, kind: str, change: dict[str, int]) -> None:
    """Two figures for nothing would be equal, and a gate would pass."""
    rows = truth(json.loads(data.read_bytes()), kind)
    dataset = Dataset.read(changed(data, lambda raw: [one.update(change) for one in raw["annotations"]]))
    if kind == "keypoints" and "category_id" in change:
        dataset = Dataset.read(changed(data, lambda raw: [one.update(iscrowd=1) for one in raw["annotations"]]))
    with pytest.raises(InputError, match="expected objects to find in the images, found none"):
        coco_figures(dataset, rows)


# ------------------------------------------------------------------------------------------------------------------- the tasks


@has_evaluator
def test_boxes_of_a_trained_detector(people: Path, demo_detector_bundle: Path) -> None:
    dataset = Dataset.read(people)
    told: list[tuple[int, int]] = []
    with Detector(demo_detector_bundle, threads=1) as detector:
        result = evaluate_boxes(detector, dataset, lambda done, of: told.append((done, of)))
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        assert len(detector.detect(image)) >= 0, "it is still open"
    assert told == [(i + 1, IMAGES) for i in range(IMAGES)]
    assert (result.kind, result.images, result.skipped) == ("bbox", IMAGES, {})
    assert 0.6 < result.figures["AP"] <= result.figures["AP50"] <= 1
    assert {row["category_id"] for row in result.rows} == {1}
    assert min(row["score"] for row in result.rows) < 0.3, "all that it gives count"
    assert coco_figures(dataset, result) == result.figures


@has_evaluator
def test_keypoints_in_true_boxes_and_in_given_ones(people: Path, demo_pose_bundle: Path) -> None:
    dataset = Dataset.read(people)
    counted = [one for one in dataset.raw["annotations"] if not one["iscrowd"] and one["num_keypoints"]]
    boxes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for image in dataset.content.images:
        corners = ((x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in counted if one["image_id"] == image.id))
        own = [[min(max(corner, 0), 191) for corner in box] for box in corners]  # up to the last pixel, as MMPose's data sets have true boxes
        boxes[image.id] = np.array(own, dtype=np.float32).reshape(-1, 4), np.ones(len(own), dtype=np.float32)
    with PoseDetector(demo_pose_bundle, threads=1) as estimator:
        result = evaluate_keypoints(estimator, dataset)
        given = evaluate_keypoints(estimator, dataset, boxes=boxes)
        half = evaluate_keypoints(estimator, dataset, boxes={key: (value, scores / 2) for key, (value, scores) in boxes.items()})
        few = evaluate_keypoints(estimator, dataset, boxes={dataset.content.images[0].id: boxes[dataset.content.images[0].id]})
    assert (result.kind, result.images, len(result.rows)) == ("keypoints", IMAGES, len(counted))
    assert 0.5 < result.figures["AP"] <= 1
    assert given.figures == result.figures == half.figures
    assert [row["score"] for row in half.rows] == pytest.approx([row["score"] / 2 for row in result.rows])
    assert all(len(row["keypoints"]) == 51 for row in result.rows)
    assert few.images == IMAGES, "an image without a box is one in which nobody was found"
    assert few.figures["AR"] < 0.6 * result.figures["AR"]


def spoil(data: Path) -> list[int]:
    """A JPEG that is broken, and a file that is not there; returns the ids of their images."""
    images = json.loads(data.read_bytes())["images"]
    (data.parent / images[1]["file_name"]).write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (data.parent / images[3]["file_name"]).unlink()
    return [images[1]["id"], images[3]["id"]]


@has_evaluator
def test_images_that_cannot_be_read_are_named_and_left_out(data: Path, demo_detector_bundle: Path, demo_pose_bundle: Path) -> None:
    """The figures are those of a data set without them."""
    lost = spoil(data)
    dataset = Dataset.read(data)
    without = copy.deepcopy(dataset.raw)
    without["images"] = [image for image in without["images"] if image["id"] not in lost]
    without["annotations"] = [one for one in without["annotations"] if one["image_id"] not in lost]
    data.with_name("without.json").write_text(json.dumps(without))
    rest = Dataset.read(data.with_name("without.json"))
    told: list[tuple[int, int]] = []
    with Detector(demo_detector_bundle, threads=1) as detector, PoseDetector(demo_pose_bundle, threads=1) as estimator:
        pairs = [
            (evaluate_boxes(detector, dataset, lambda done, of: told.append((done, of))), evaluate_boxes(detector, rest)),
            (evaluate_keypoints(estimator, dataset), evaluate_keypoints(estimator, rest)),
        ]
    assert told[-1] == (IMAGES, IMAGES)
    for ours, theirs in pairs:
        assert sorted(ours.skipped) == lost
        for image in dataset.content.images:
            assert image.id not in ours.skipped or Path(image.file_name).name in ours.skipped[image.id]
        assert ours.images == theirs.images == IMAGES - 2
        assert ours.figures == theirs.figures
        assert ours.rows == theirs.rows


@has_evaluator
def test_images_none_of_which_can_be_read_are_an_error(people: Path, tmp_path: Path, demo_detector_bundle: Path, demo_pose_bundle: Path) -> None:
    dataset = Dataset.read(people, tmp_path / "elsewhere")
    with Detector(demo_detector_bundle, threads=1) as detector, PoseDetector(demo_pose_bundle, threads=1) as estimator:
        for evaluate in (lambda: evaluate_boxes(detector, dataset), lambda: evaluate_keypoints(estimator, dataset)):
            with pytest.raises(InputError, match=r"expected images in .*elsewhere, found none that can be read: .*000000\.jpg") as caught:
                evaluate()
            assert caught.value.hint == "say where the images are"


@has_evaluator
def test_another_number_of_keypoints_is_refused(data: Path, demo_pose_bundle: Path) -> None:
    def halve(raw: dict[str, Any]) -> None:
        for one in raw["annotations"]:
            one["keypoints"] = one["keypoints"][: 3 * 5]

    def remove(raw: dict[str, Any]) -> None:
        for one in raw["annotations"]:
            one["keypoints"] = []

    with PoseDetector(demo_pose_bundle, threads=1) as estimator:
        for change, found in ((halve, "5"), (remove, "none")):
            with pytest.raises(ConfigError, match=f"keypoints: expected 17 for each object, as the model has, found {found}"):
                evaluate_keypoints(estimator, Dataset.read(changed(data, change)))


@has_evaluator
def test_other_classes_are_refused(data: Path, demo_detector_bundle: Path) -> None:
    dataset = Dataset.read(changed(data, lambda raw: raw.update(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])))
    with Detector(demo_detector_bundle, threads=1) as detector, pytest.raises(ConfigError, match="found none called 'person'"):
        evaluate_boxes(detector, dataset)


@has_evaluator
def test_a_detector_that_names_no_classes_may_not_have_more_than_the_data(people: Path, detector_bundle: Path, tmp_path: Path) -> None:
    """Bundles of MMDeploy have no names: labels beyond the categories would be anything."""
    shutil.copytree(detector_bundle, tmp_path / "nameless")
    (tmp_path / "nameless/manifest.json").unlink()
    with Detector(tmp_path / "nameless", threads=1) as detector:
        assert detector.class_names == []
        with pytest.raises(ConfigError, match=r"categories: expected one for each class of the model, found 1 and the label 1"):
            evaluate_boxes(detector, Dataset.read(people))


def test_only_boxes_of_what_has_keypoints_get_a_pose(tmp_path: Path) -> None:
    """By the name of the class; the scores are those that the detector read from the picture."""
    detector = tracker_bundles.write_detector(tmp_path / "det")
    person, dog, faint = (10, 20, 50, 60, 0.5, 0), (5, 5, 40, 40, 0.75, 1), (30, 30, 60, 60, 0.25, 0)
    write_image(tmp_path / "1.png", tracker_bundles.blank((120, 90), [person, dog, faint]))
    write_image(tmp_path / "2.png", tracker_bundles.blank((120, 90), [dog]))
    raw = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 6, "bbox": [10, 20, 40, 40], "keypoints": [20, 30, 2]}],
        "categories": [{"id": 5, "name": "other"}, {"id": 6, "name": "person"}],
    }
    dataset = Dataset.of(raw, annotations=tmp_path / "a.json", folder=tmp_path)
    with Detector(detector, threads=1) as opened:
        boxes = detect_boxes(opened, dataset, least_score=0.25)
        strict = detect_boxes(opened, dataset, least_score=0.3, batch=2)
    assert {key: one.scores.tolist() for key, one in boxes.items()} == {1: [0.5, 0.25], 2: []}
    np.testing.assert_array_equal(boxes[1].boxes_xyxy, [person[:4], faint[:4]])
    assert boxes[1].categories == [6, 6]
    assert {key: one.scores.tolist() for key, one in strict.items()} == {1: [0.5], 2: []}
