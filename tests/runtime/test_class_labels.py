"""Images and their classes, from COCO annotations or from lines of text; top-1 and top-5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.average_precision import Accuracy
from modelcrate_runtime.class_labels import Labelled, read_labels, top_k

NAMES = ("cat", "dog", "golden retriever", "retriever")


def read(path: Path, names: tuple[str, ...] = NAMES, limit: int | None = None) -> tuple[dict[str, int], list[tuple[str, Any]]]:
    labelled, skipped = read_labels(path, path.parent, class_names=names, limit=limit)
    return {labelled.names[key]: label for key, label in labelled.labels.items()}, [(one.what, one.id) for one in skipped]


def text(folder: Path, content: str) -> Path:
    (folder / "val.txt").write_text(content)
    return folder / "val.txt"


def test_lines_have_a_file_and_a_class_or_an_index(tmp_path: Path) -> None:
    lines = "a.jpg 1\nb.jpg dog\n\n  my photo.jpg\tgolden retriever  \nc d.jpg retriever\ne.jpg 0\n"
    assert read(text(tmp_path, lines)) == ({"a.jpg": 1, "b.jpg": 1, "my photo.jpg": 2, "c d.jpg": 3, "e.jpg": 0}, [])
    assert read(text(tmp_path, lines), limit=2)[0] == {"a.jpg": 1, "b.jpg": 1}


def test_lines_that_say_nothing_are_named(tmp_path: Path) -> None:
    lines = "a.jpg 1\nb.jpg\nc.jpg horse\nd.jpg 4\ne.jpg -1\n0\n"
    assert read(text(tmp_path, lines)) == ({"a.jpg": 1}, [("row", number) for number in (2, 3, 4, 5, 6)])


def test_an_index_may_be_any_where_no_classes_are_known(tmp_path: Path) -> None:
    assert read(text(tmp_path, "a.jpg 1\nb.jpg 999\nc.jpg dog\n"), names=()) == ({"a.jpg": 1, "b.jpg": 999}, [("row", 3)])


def coco(folder: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, 6)],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 3}, {"image_id": 2, "category_id": 7}, {"image_id": 3, "category_id": 5}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 5, "name": "horse"}],
    }
    (folder / "val.json").write_text(json.dumps(content | changes))
    return folder / "val.json"


def test_an_images_first_category_is_its_class(tmp_path: Path) -> None:
    assert read(coco(tmp_path)) == ({"1.jpg": 0, "2.jpg": 1}, [("image", 3), ("image", 4), ("image", 5)])
    _, skipped = read_labels(coco(tmp_path), tmp_path, class_names=NAMES)
    assert [one.reason for one in skipped[:2]] == [
        "expected an annotation with the class, found the category 5, which the model lacks",
        "expected an annotation with the class, found none",
    ]


def test_categories_are_classes_in_order_where_no_name_is_known(tmp_path: Path) -> None:
    for names in ((), ("a", "b", "c")):
        assert read(coco(tmp_path), names=names)[0] == {"1.jpg": 1, "2.jpg": 0, "3.jpg": 2}
    with pytest.raises(ConfigError, match="expected some of the model's 2 classes, found dog, cat, horse"):
        read(coco(tmp_path), names=("a", "b"))


def test_files_without_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: expected COCO annotations or lines of files and labels, found: No such file"):
        read(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"val\.txt: expected images with a class, found none of 1: row 1: expected a file"):
        read(text(tmp_path, "a.jpg\n"))
    with pytest.raises(InputError, match=r"val\.txt: expected images with a class, found none$"):
        read(text(tmp_path, "\n"))
    with pytest.raises(InputError, match=r"val\.json: expected images, annotations and categories"):
        read(coco(tmp_path, images=None))
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match=r"picture\.txt: expected COCO annotations or lines of files and labels"):
        read(tmp_path / "picture.txt")


def ranked(*labels: list[int]) -> tuple[Accuracy, Labelled]:
    """Images whose right class is always 3."""
    rows = [{"image_id": i, "labels": of_image, "scores": []} for i, of_image in enumerate(labels)]
    data = Labelled(annotations=Path(), folder=Path(), names={}, labels=dict.fromkeys(range(len(labels)), 3))
    return Accuracy(kind="classes", rows=rows), data


def test_top_k_counts_the_images_whose_class_is_among_the_best() -> None:
    assert top_k(*ranked([3, 1, 2, 4, 5], [1, 2, 3, 4, 5], [6, 1, 2, 4, 3], [1, 2, 4, 5, 6])) == {"top-1": 0.25, "top-5": 0.75}
    assert top_k(*ranked([1, 2, 4, 5, 6, 3])) == {"top-1": 0, "top-5": 0}


def test_top_5_of_fewer_is_known_only_where_they_are_all() -> None:
    figures = top_k(*ranked([3, 1], [1, 3]), class_count=10)
    assert figures["top-1"] == 0.5
    assert math.isnan(figures["top-5"])
    assert math.isnan(top_k(*ranked([3, 1]))["top-5"])
    assert top_k(*ranked([1, 3], [3, 1]), class_count=2) == {"top-1": 0.5, "top-5": 1.0}
