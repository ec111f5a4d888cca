"""The models that come along: small, made of drawn data alone, and right about people whom they have not seen."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.demo import DEMO_MODELS, DEMO_SEED, HELD_OUT_SEED
from modelcrate_converter.people import DATA_VERSION, Scene, draw_scene
from modelcrate_runtime import Detector, PoseDetector

ROOT = Path(__file__).parents[2]
SCENES = 80


@pytest.fixture(scope="module")
def measured(demo_detector_bundle: Path, demo_pose_bundle: Path) -> dict[str, dict[str, float]]:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    measure: Callable[..., dict[str, dict[str, float]]] = runpy.run_path(str(ROOT / "scripts/eval_people.py"))["measure"]
    return measure(demo_detector_bundle, demo_pose_bundle, count=SCENES, seed=HELD_OUT_SEED)


def made(name: str) -> dict:
    return json.loads(read_checkpoint(DEMO_MODELS[name]).meta["modelcrate"])


@pytest.mark.parametrize(
    ("model", "what"), [("demo-det", "boxes"), ("demo-pose", "keypoints, true boxes"), ("demo-pose", "keypoints, detected boxes")], ids=["boxes", "true", "found"]
)
def test_they_are_as_accurate_as_they_say(measured: dict[str, dict[str, float]], model: str, what: str) -> None:
    """The figure in the file is of 500 scenes; fewer are enough to see that it is true."""
    assert measured[what]["AP"] == pytest.approx(made(model)["metrics"][what]["AP"], abs=0.04)


def test_they_say_how_they_were_made() -> None:
    for name in DEMO_MODELS:
        facts = made(name)
        assert facts["data"] == facts["metrics"]["data"] == DATA_VERSION
        assert facts["seed"] != HELD_OUT_SEED == facts["metrics"]["seed"]
        assert facts["steps"] >= 1000
        assert "Apache-2.0" in facts["license"]
        assert read_checkpoint(DEMO_MODELS[name]).skipped == ()


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODELS.values()) <= 12_000_000


def group() -> Scene:
    return draw_scene(DEMO_SEED, size_hw=(480, 640), people=(4, 6))


def test_everyone_is_found_where_they_are(demo_detector_bundle: Path) -> None:
    scene = group()
    with Detector(demo_detector_bundle) as detector:
        found = detector.detect(scene.image)
    found = found[found.scores > 0.4]
    assert detector.class_names == ["person"]
    assert len(found) == len(scene.people) >= 4
    for person in scene.people:
        if person.share_seen > 0.7:
            assert np.abs(found.boxes_xyxy - person.box_xyxy).max(axis=1).min() < 0.15 * (person.box_xyxy[3] - person.box_xyxy[1])


def test_keypoints_are_where_they_are(demo_pose_bundle: Path) -> None:
    """Half of what is seen within 3 % of the box's diagonal, and no worse when the geometry is the SDK's than its pixel of error."""
    errors: dict[str, list[float]] = {"exact": [], "sdk": []}
    for geometry, found in errors.items():
        with PoseDetector(demo_pose_bundle, geometry=geometry) as estimator:
            for index in range(20):
                scene = draw_scene(HELD_OUT_SEED, index)
                boxes = np.array([person.box_xyxy for person in scene.people]).reshape(-1, 4)
                for person, points in zip(scene.people, estimator(scene.image, boxes), strict=True):
                    seen = person.keypoints[:, 2] == 2
                    size = float(np.hypot(*(person.box_xyxy[2:] - person.box_xyxy[:2])))
                    found += (np.linalg.norm(points[seen, :2] - person.keypoints[seen, :2], axis=1) / size).tolist()
    assert len(errors["exact"]) > 300
    assert np.median(errors["exact"]) < 0.03
    assert np.median(errors["exact"]) <= np.median(errors["sdk"]) + 0.001


def test_left_and_right_are_not_confused(demo_pose_bundle: Path) -> None:
    """Of those whose shoulders are both seen and well apart, nearly all have them on the right sides."""
    right = total = 0
    with PoseDetector(demo_pose_bundle) as estimator:
        for index in range(40):
            scene = draw_scene(HELD_OUT_SEED, index)
            for person in scene.people:
                left_shoulder, right_shoulder = person.keypoints[5], person.keypoints[6]
                apart = left_shoulder[0] - right_shoulder[0]
                if left_shoulder[2] == right_shoulder[2] == 2 and abs(apart) > 12:
                    points = estimator(scene.image, person.box_xyxy)[0]
                    right += (points[5, 0] - points[6, 0]) * apart > 0
                    total += 1
    assert total > 30
    assert right / total > 0.9
