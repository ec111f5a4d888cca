"""What can be used of COCO's files is used; what cannot is named, and is not fatal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.coco_data import Dataset, Skipped, read_boxes, read_coco, sift

K = 2


def content() -> dict[str, Any]:
    points = [10, 20, 2, 30, 40, 1]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in (1, 2, 3)],
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 1, "bbox": [5, 6, 50, 40], "area": 900, "iscrowd": 0, "keypoints": points, "num_keypoints": 2}
            for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 4, "name": "dog"}],
    }


def sifted(raw: dict[str, Any], **options: Any) -> tuple[Dataset, list[Skipped]]:
    return sift(raw, annotations=Path("a.json"), folder=Path("images"), **({"keypoints": K} | options))


def test_what_is_whole_is_kept_as_it_is() -> None:
    raw = content()
    before = copy.deepcopy(raw)
    dataset, skipped = sifted(raw)
    assert skipped == []
    assert dataset.raw == before == raw
    assert list(dataset.instances()) == [1, 2, 3]


Change = Callable[[dict[str, Any]], object]
BROKEN: list[tuple[Change, int | str, str]] = [
    (lambda one: one.pop("bbox"), 12, "missing required field `bbox`"),
    (lambda one: one.update(bbox=[1, 2, 3]), 12, "bbox"),
    (lambda one: one.update(bbox=None), 12, "bbox"),
    (lambda one: one.update(bbox=[1, 2, -3, 4]), 12, "bbox: expected left, top, width and height, found [1, 2, -3, 4]"),
    (lambda one: one.update(bbox=[1, 2, float("inf"), 4]), 12, "bbox: expected"),
    (lambda one: one.update(bbox=[1, 2, 0, 4]), 12, "bbox: expected an area within the image"),
    (lambda one: one.update(bbox=[200, 2, 10, 4]), 12, "bbox: expected an area within the image"),
    (lambda one: one.update(keypoints=[1, 2, 2]), 12, "keypoints: expected 6 numbers, found 3"),
    (lambda one: one.update(keypoints=[1, 2, 2, 3, 4]), 12, "keypoints: expected 6 numbers, found 5"),
    (lambda one: one.update(keypoints="all"), 12, "keypoints"),
    (lambda one: one.update(keypoints=[1, 2, 2, float("nan"), 4, 2]), 12, "keypoints: expected finite numbers"),
    (lambda one: one.update(image_id=99), 12, "image_id: expected the id of an image, found 99"),
    (lambda one: one.pop("image_id"), 12, "image_id"),
    (lambda one: one.update(category_id=99), 12, "category_id: expected the id of a category, found 99"),
    (lambda one: one.update(area="large"), 12, "area: expected a number, found 'large'"),
    (lambda one: one.update(id=11), 11, "id: expected another for each annotation"),
    (lambda one: one.update(id="twelve"), "twelve", "id"),
    (lambda one: one.pop("id"), "number 2", "id"),
]


@pytest.mark.parametrize(("change", "name", "reason"), BROKEN)
def test_an_annotation_that_is_broken_is_named_and_the_others_are_kept(change: Change, name: int | str, reason: str) -> None:
    raw = content()
    change(raw["annotations"][1])
    dataset, skipped = sifted(raw)
    (one,) = skipped
    assert (one.what, one.id) == ("annotation", name)
    assert reason in one.reason
    assert str(one).startswith(f"annotation {name}: ")
    assert [kept["id"] for kept in dataset.raw["annotations"]] == [11, 13] == [kept.id for kept in dataset.content.annotations]


def test_what_is_no_annotation_or_no_image_at_all_is_named() -> None:
    raw = content()
    raw["annotations"][0] = "annotation"
    raw["images"][2] = {"id": 3}
    raw["images"].append({"id": 1, "file_name": "again.jpg"})
    dataset, skipped = sifted(raw)
    assert [(one.what, one.id) for one in skipped] == [("image", 3), ("image", 1), ("annotation", "number 1"), ("annotation", 13)]
    assert [image.id for image in dataset.content.images] == [1, 2]
    assert [one.id for one in dataset.content.annotations] == [12]


def test_boxes_alone_need_no_keypoints() -> None:
    raw = content()
    raw["annotations"][0]["keypoints"] = "none"
    raw["annotations"][1]["keypoints"] = [1, 2, 2]
    del raw["annotations"][2]["keypoints"]
    dataset, skipped = sifted(raw, keypoints=None)
    assert skipped == []
    assert len(dataset.content.annotations) == 3


def test_crowds_and_objects_without_keypoints_stay_in_the_truth() -> None:
    raw = content()
    raw["annotations"][0] |= {"iscrowd": 1, "bbox": [200, 0, 10, 10]}
    del raw["annotations"][1]["keypoints"]
    raw["annotations"][2]["keypoints"] = [0] * 6
    raw["annotations"].append({"id": 20, "image_id": 3, "category_id": 1, "bbox": [0, 0, 10, 10], "keypoints": [1, 1, 1, 0, 0, 0]})
    dataset, skipped = sifted(raw)
    assert skipped == []
    assert len(dataset.content.annotations) == 4
    assert {image_id: [one.id for one in of_image] for image_id, of_image in dataset.instances().items()} == {3: [20]}


def test_true_boxes_end_at_the_last_pixel_and_the_truth_does_not() -> None:
    """MMPose's `parse_data_info`; where the size of the image is not known there is nothing to end at."""
    raw = content()
    raw["annotations"][0]["bbox"] = [-5, 10, 200, 200]
    del raw["images"][1]["width"]
    raw["annotations"][1]["bbox"] = [-5, 10, 200, 200]
    dataset, _ = sifted(raw)
    assert [one.bbox for one in dataset.content.annotations] == [(0, 10, 99, 69), (-5, 10, 200, 200), (5, 6, 50, 40)]
    assert dataset.raw["annotations"][0]["bbox"] == [-5, 10, 200, 200]
    strict = Dataset.of(raw, annotations=Path("a.json"), folder=Path())
    assert [one.bbox for one in strict.content.annotations] == [one.bbox for one in dataset.content.annotations]


def test_a_limit_takes_the_first_images_and_says_nothing_of_the_others() -> None:
    raw = content()
    raw["annotations"][2]["bbox"] = None
    dataset, skipped = sifted(raw, limit=2)
    assert skipped == []
    assert [one.id for one in dataset.content.annotations] == [11, 12]


@pytest.mark.parametrize(("count", "found"), [(17, "2"), (3, "2")])
def test_data_of_another_set_of_keypoints_is_refused_as_a_whole(count: int, found: str) -> None:
    with pytest.raises(ConfigError, match=f"keypoints: expected {count} for each object, as the model has, found {found}"):
        sifted(content(), keypoints=count)


def test_data_without_keypoints_is_refused_for_poses() -> None:
    raw = content()
    for one in raw["annotations"]:
        del one["keypoints"]
    with pytest.raises(ConfigError, match="expected 2 for each object, as the model has, found none"):
        sifted(raw)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, "all"])
def test_what_is_not_cocos_structure_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"expected COCO annotations, found .* {key}") as caught:
        sifted(content() | {key: value})
    assert caught.value.hint


def test_where_nothing_can_be_used_the_first_reason_is_said() -> None:
    raw = content()
    for one in raw["annotations"]:
        one["category_id"] = 99
    with pytest.raises(InputError, match="expected annotations that can be used, found none of 3: annotation 11: category_id: expected the id of a category"):
        sifted(raw, keypoints=None)


def test_parts_of_the_whole_body_become_one_list() -> None:
    raw = content()
    parts = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
    for one in raw["annotations"]:
        one.update({name: [float(number) for number in range(3 * count)] for name, count in parts.items()})
    raw["annotations"][1]["face_kpts"] = raw["annotations"][1]["face_kpts"][3:]
    del raw["annotations"][2]["lefthand_kpts"]
    dataset, skipped = sifted(raw, keypoints=133)
    assert [(one.id, one.reason) for one in skipped] == [
        (12, "keypoints: expected 399 numbers, found 396"),
        (13, "keypoints: expected 399 numbers, found 336"),
    ]
    (one,) = dataset.content.annotations
    assert one.keypoints == [value for name in parts for value in raw["annotations"][0][name]]
    with pytest.raises(ConfigError, match="expected 133 for each object, as the model has, found 2"):
        sifted(content(), keypoints=133)


# ----------------------------------------------------------------------------------------------------------------------- boxes


def boxes_file(folder: Path, rows: Any) -> Path:
    (folder / "boxes.json").write_text(json.dumps(rows))
    return folder / "boxes.json"


def box(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5} | changes


def test_boxes_are_those_of_the_data(tmp_path: Path) -> None:
    dataset, _ = sifted(content(), limit=2)
    rows = [box(), box(score=0.1), box(image_id=2), box(image_id=3), box(category_id=4), box(image_id=2, score=0.0)]
    boxes, skipped = read_boxes(boxes_file(tmp_path, rows), dataset)
    assert skipped == [], "boxes of an image beyond the limit, or of another category, are no fault"
    assert {key: one.scores.tolist() for key, one in boxes.items()} == {1: [0.5, pytest.approx(0.1)], 2: [0.5, 0.0]}
    np.testing.assert_array_equal(boxes[1].boxes_xyxy[0], [1, 2, 31, 42])
    assert boxes[1].categories == [1, 1]
    fewer, _ = read_boxes(boxes_file(tmp_path, rows), dataset, least_score=0.5)
    assert {key: len(one.scores) for key, one in fewer.items()} == {1: 1, 2: 1}


def test_rows_that_are_no_boxes_are_named(tmp_path: Path) -> None:
    rows = [box(), box(image_id=9), box(bbox=[1, 2, 0, 4]), box(score="high"), {"image_id": 1}, "box", box(bbox=[1, 2, 3])]
    boxes, skipped = read_boxes(boxes_file(tmp_path, rows), sifted(content())[0])
    assert list(boxes) == [1]
    assert [(one.what, one.id) for one in skipped] == [("row", number) for number in range(2, 8)]
    assert "image_id: expected the id of an image, found 9" in skipped[0].reason


@pytest.mark.parametrize("rows", [[], {}, [box(category_id=4)], [box(image_id=9)], "boxes"])
def test_a_file_without_boxes_is_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(InputError, match=r"boxes\.json: expected (boxes in the images of|a list of detections)") as caught:
        read_boxes(boxes_file(tmp_path, rows), sifted(content())[0])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["cat", "person"], {1: 1}), (["person"], {0: 1}), (["human"], {0: 1}), ([], {0: 1})],
)
def test_a_detectors_labels_are_categories_that_have_keypoints(names: list[str], expected: dict[int, int]) -> None:
    assert sifted(content())[0].pose_categories(names) == expected


def test_a_detector_of_other_things_is_refused() -> None:
    with pytest.raises(ConfigError, match="categories: expected one that the detector knows, found person"):
        sifted(content())[0].pose_categories(["cat", "dog"])


def test_animals_have_a_category_each() -> None:
    raw = content()
    raw["annotations"][1]["category_id"] = 4
    dataset, _ = sifted(raw)
    assert dataset.pose_categories(["dog", "cow", "person"]) == {0: 4, 2: 1}
    assert dataset.keypoint_categories == [1, 4]


def test_reading_says_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"a\.json: expected COCO annotations, found: Expected `object`, got `array`"):
        read_coco(tmp_path / "a.json")
