"""AP and AR are pycocotools' own to a millionth; of the whole body they are of its parts."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelcrate_bundle.errors import InputError
from modelcrate_runtime.average_precision import BOX_FIGURES, FIGURES, KEYPOINT_FIGURES, Accuracy, average_precision, coco_figures, whole_body_precision
from modelcrate_runtime.coco_data import WHOLE_BODY, Dataset, sift
from modelcrate_runtime.skeletons import published_keypoints
from modelcrate_runtime.trials import whole_body_rows

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
has_pycocotools = pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="needs pycocotools, to compare with: pip install pycocotools")

SIZE = 400
SIGMAS = published_keypoints("coco-wholebody").sigmas


def truth(seed: int, *, keypoints: int = 17, images: int = 12, categories: int = 2) -> dict[str, Any]:
    """Objects of all sizes, crowds among them, some without visible keypoints, some images without any."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            width, height = np.exp(rng.uniform(2.3, 5.5, 2))
            left, top = rng.uniform(0, SIZE - 20, 2)
            visible = rng.integers(0, 3, keypoints) * (rng.random() > 0.1)
            xy = np.stack([left + width * rng.random(keypoints), top + height * rng.random(keypoints)], axis=1)
            points = [value for (x, y), v in zip((xy * (visible > 0)[:, None]).tolist(), visible.tolist(), strict=True) for value in (x, y, v)]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.integers(1, categories + 1)), "bbox": [float(v) for v in (left, top, width, height)],
                "area": float(width * height * rng.uniform(0.4, 0.9)), "iscrowd": int(rng.random() < 0.1), "keypoints": points,
                "num_keypoints": int((visible > 0).sum()),
            })  # fmt: skip
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": SIZE, "height": SIZE} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, categories + 1)],
    }


def found(raw: dict[str, Any], kind: str, seed: int, *, noise: float) -> list[dict[str, Any]]:
    """Most objects, some twice, some that are not there; a few scores are equal."""
    rng = np.random.default_rng(seed)
    rows = []
    for one in raw["annotations"]:
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            scale = noise * math.sqrt(one["bbox"][2] * one["bbox"][3])
            row: dict[str, Any] = {"image_id": one["image_id"], "category_id": one["category_id"], "score": round(float(rng.random()), 2)}
            if rng.random() < 0.1:
                row["image_id"] = int(rng.integers(1, len(raw["images"]) + 1))
            if kind == "bbox":
                row["bbox"] = np.maximum(np.array(one["bbox"]) + scale * rng.standard_normal(4), 1).tolist()
            else:
                triples = np.array(one["keypoints"]).reshape(-1, 3)
                triples[:, :2] += scale * rng.standard_normal((len(triples), 2)) * rng.choice([0.2, 1, 3])
                triples[:, 2] = rng.random(len(triples))
                row["keypoints"] = triples.ravel().tolist()
            rows.append(row)
    return rows


def data_set(raw: dict[str, Any]) -> Dataset:
    return Dataset.of(raw, annotations=Path("truth.json"), folder=Path())


def pycocotools(raw: dict[str, Any], rows: list[dict[str, Any]], kind: str, *, sigmas: list[float] | None = None, images: list[int] | None = None) -> list[float]:
    """Its figures, in its own order."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        data = COCO()
        data.dataset = copy.deepcopy(raw)
        data.createIndex()
        evaluation = COCOeval(data, data.loadRes(copy.deepcopy(rows)), kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        if images is not None:
            evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def as_cocos(figures: dict[str, float]) -> list[float]:
    return [-1.0 if math.isnan(value) else value for value in figures.values()]


@has_pycocotools
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
@pytest.mark.parametrize(("seed", "noise"), [(1, 0.01), (2, 0.03), (3, 0.06), (4, 0.2)])
def test_figures_are_pycocotools(kind: Any, seed: int, noise: float) -> None:
    raw = truth(seed)
    rows = found(raw, kind, seed + 100, noise=noise)
    figures = average_precision(data_set(raw), Accuracy(kind=kind, rows=rows))
    assert list(figures) == list(BOX_FIGURES if kind == "bbox" else KEYPOINT_FIGURES)
    expected = pycocotools(raw, rows, kind)
    assert as_cocos(figures) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected[0] < 0.99, "otherwise it says nothing"


@has_pycocotools
@pytest.mark.parametrize(("name", "count"), [("ap10k", 17), ("hand", 21), ("halpe26", 26)])
def test_keypoints_have_the_sigmas_of_their_own_set(name: str, count: int) -> None:
    sigmas = published_keypoints(name).sigmas
    raw = truth(7, keypoints=count, categories=3)
    rows = found(raw, "keypoints", 8, noise=0.05)
    figures = average_precision(data_set(raw), Accuracy(kind="keypoints", rows=rows), sigmas)
    assert as_cocos(figures) == pytest.approx(pycocotools(raw, rows, "keypoints", sigmas=sigmas), abs=1e-6)


@has_pycocotools
@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_images_that_were_not_read_are_left_out(kind: Any) -> None:
    raw = truth(5)
    rows = found(raw, kind, 6, noise=0.03)
    skipped = {2: "gone", 5: "broken"}
    left = [image["id"] for image in raw["images"] if image["id"] not in skipped]
    figures = average_precision(data_set(raw), Accuracy(kind=kind, rows=rows, skipped=skipped))
    assert as_cocos(figures) == pytest.approx(pycocotools(raw, rows, kind, images=left), abs=1e-6)
    assert figures != average_precision(data_set(raw), Accuracy(kind=kind, rows=rows))


def test_what_there_is_none_of_has_no_figure() -> None:
    raw = truth(9)
    raw["annotations"] = [one | {"area": 50.0, "iscrowd": 0} for one in raw["annotations"]]
    figures = average_precision(data_set(raw), Accuracy(kind="bbox", rows=found(raw, "bbox", 1, noise=0.01)))
    assert {name for name, value in figures.items() if math.isnan(value)} == {"APM", "APL", "ARM", "ARL"}
    assert figures["APS"] >= figures["AP"] > 0


def test_figures_of_gates_are_four_of_all() -> None:
    raw = truth(3)
    for kind, recall in (("bbox", "AR100"), ("keypoints", "AR")):
        result = Accuracy(kind=kind, rows=found(raw, kind, 4, noise=0.05))  # type: ignore[arg-type]
        every, few = average_precision(data_set(raw), result), coco_figures(data_set(raw), result)
        assert list(few) == list(FIGURES)
        assert few == {"AP": every["AP"], "AP50": every["AP50"], "AP75": every["AP75"], "AR": every[recall]}


def test_neither_side_is_changed() -> None:
    raw = truth(2)
    for kind in ("bbox", "keypoints"):
        result = Accuracy(kind=kind, rows=found(raw, kind, 4, noise=0.05))  # type: ignore[arg-type]
        before = copy.deepcopy((raw, result.rows))
        average_precision(data_set(raw), result)
        assert (raw, result.rows) == before


# ------------------------------------------------------------------------------------------------------------------ whole body

PARTS = {name: (sum(list(WHOLE_BODY.values())[:i]), count) for i, (name, count) in enumerate(WHOLE_BODY.items())}


def whole_body(seed: int = 4, *, without: str = "") -> tuple[Dataset, dict[str, Any]]:
    """Annotations as COCO-WholeBody has them, read."""
    raw = truth(seed, keypoints=133, categories=1)
    for one in raw["annotations"]:
        one["iscrowd"] = 0
        triples = np.array(one["keypoints"]).reshape(-1, 3)
        for part, (start, count) in PARTS.items():
            own = triples[start : start + count]
            if part == without:
                own = own * 0
            one["keypoints" if part == "body" else f"{part}_kpts"] = own.ravel().tolist()
            one[f"{part}_valid"] = bool(own.any())
    return sift(raw, annotations=Path("whole.json"), folder=Path(), keypoints=133)[0], raw


def poses(dataset: Dataset, *, moved: str = "", by: float = 0.0) -> list[dict[str, Any]]:
    """The truth, with one part moved by a share of the object's size."""
    rows = []
    for one in dataset.raw["annotations"]:
        triples = np.array(one["keypoints"]).reshape(-1, 3)
        if not triples[:, 2].any():
            continue
        if moved:
            start, count = PARTS[moved]
            triples[start : start + count, 0] += by * math.sqrt(one["area"])
        triples[:, 2] = 0.9
        rows.append({"image_id": one["image_id"], "category_id": 1, "keypoints": triples.ravel().tolist(), "score": 0.5 + one["id"] / 1000})
    return rows


def test_the_whole_truth_scores_one_in_every_part() -> None:
    dataset, _ = whole_body()
    figures = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=poses(dataset)), SIGMAS)
    assert list(figures) == ["keypoints", *(f"keypoints_{part}" for part in WHOLE_BODY)]
    for of_part in figures.values():
        assert list(of_part.values()) == pytest.approx([1.0] * 10)


@pytest.mark.parametrize("part", list(WHOLE_BODY))
def test_a_part_that_was_missed_costs_that_part_and_the_whole(part: str) -> None:
    dataset, _ = whole_body()
    figures = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=poses(dataset, moved=part, by=3.0)), SIGMAS)
    missed = {name for name, of_part in figures.items() if of_part["AP"] < 0.999}
    assert missed == {"keypoints", f"keypoints_{part}"}
    assert figures[f"keypoints_{part}"]["AP"] < 0.1


def test_a_part_that_nobody_shows_has_no_figure() -> None:
    dataset, _ = whole_body(without="lefthand")
    figures = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=poses(dataset)), SIGMAS)
    assert all(math.isnan(value) for value in figures["keypoints_lefthand"].values())
    assert figures["keypoints_righthand"]["AP"] == figures["keypoints"]["AP"] == pytest.approx(1)


@has_pycocotools
def test_parts_are_what_pycocotools_says_of_each_alone() -> None:
    dataset, _ = whole_body()
    rows = found(dataset.raw, "keypoints", 3, noise=0.02)
    figures = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=rows), SIGMAS)
    whole = {"whole": (0, 133)} | PARTS
    for name, (start, count) in whole.items():
        own = slice(3 * start, 3 * (start + count))
        alone = copy.deepcopy(dataset.raw)
        for one in alone["annotations"]:
            one["keypoints"] = one["keypoints"][own]
            one["num_keypoints"] = sum(v > 0 for v in one["keypoints"][2::3])
        # What was found is as large as its body, whatever the part: so xtcocotools has it.
        bodies = [np.array(row["keypoints"]).reshape(-1, 3)[:17, :2] for row in rows]
        extents = [[*body.min(axis=0).tolist(), *np.ptp(body, axis=0).tolist()] for body in bodies]
        cut = [row | {"keypoints": row["keypoints"][own], "bbox": extent} for row, extent in zip(rows, extents, strict=True)]
        expected = pycocotools(alone, cut, "keypoints", sigmas=SIGMAS[start : start + count])
        assert as_cocos(figures["keypoints" if name == "whole" else f"keypoints_{name}"]) == pytest.approx(expected, abs=1e-6), name


def test_a_part_that_was_found_with_no_score_was_not_found() -> None:
    """xtcocotools leaves it out; as a wrong one it would cost precision."""
    dataset, _ = whole_body()
    rows = poses(dataset)
    for row in rows[::2]:
        triples = np.array(row["keypoints"]).reshape(-1, 3)
        start, count = PARTS["foot"]
        triples[start : start + count] = 0
        row["keypoints"] = triples.ravel().tolist()
    figures = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=rows), SIGMAS)["keypoints_foot"]
    alone = whole_body_precision(dataset, Accuracy(kind="keypoints", rows=rows[1::2]), SIGMAS)["keypoints_foot"]
    assert figures == pytest.approx(alone)
    assert 0.3 < figures["AR"] < 0.7


def test_results_of_the_whole_body_are_written_by_parts() -> None:
    dataset, raw = whole_body()
    rows = poses(dataset)
    divided = whole_body_rows(rows)
    assert set(divided[0]) == {"image_id", "category_id", "score", "keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts"}
    seen = [one for one, joined in zip(raw["annotations"], dataset.raw["annotations"], strict=True) if any(joined["keypoints"][2::3])]
    for one, row, whole in zip(seen, divided, rows, strict=True):
        assert [len(row["keypoints" if part == "body" else f"{part}_kpts"]) // 3 for part in WHOLE_BODY] == list(WHOLE_BODY.values())
        assert row["keypoints"][0::3] == one["keypoints"][0::3]
        assert row["righthand_kpts"][1::3] == one["righthand_kpts"][1::3]
        assert row["keypoints"] + row["foot_kpts"] + row["face_kpts"] + row["lefthand_kpts"] + row["righthand_kpts"] == whole["keypoints"]


def test_where_there_is_nothing_to_find_there_is_no_figure_of_the_whole_body() -> None:
    dataset, _ = whole_body()
    rows = poses(dataset)
    for one in dataset.raw["annotations"]:
        one["iscrowd"] = 1
    with pytest.raises(InputError, match="expected objects to find in the images, found none"):
        whole_body_precision(dataset, Accuracy(kind="keypoints", rows=rows), SIGMAS)
