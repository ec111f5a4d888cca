"""The script behind the demo models: its losses mean what they say, and it trains, stops and goes on."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_runtime.skeletons import COCO_17

SCRIPT = Path(__file__).parents[2] / "scripts/train_people.py"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_simcc_loss_is_least_at_the_truth(script: SimpleNamespace) -> None:
    points = torch.tensor([[[40.0, 100.0], [120.5, 30.25]]])
    bins = [torch.arange(size * 2, dtype=torch.float32) for size in (192, 256)]

    def loss(shift: float, *, weights: list[float]) -> float:
        # The label itself is the logit whose softmax at this temperature is the target.
        logits = [torch.exp(-((b - (points[:, :, a, None] + shift) * 2) ** 2) / (2 * script.SIGMA[a] ** 2)) for a, b in enumerate(bins)]
        return float(script.simcc_loss(tuple(logits), points, torch.tensor([weights])))

    assert loss(0, weights=[1, 1]) == pytest.approx(0, abs=1e-4)
    assert loss(2, weights=[1, 1]) < loss(5, weights=[1, 1])
    assert loss(5, weights=[0, 0]) == 0


def test_generalised_iou(script: SimpleNamespace) -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
    np.testing.assert_allclose(script.giou(a, b), [1, 1 / 3, 0 - 100 / 300], atol=1e-6)


def test_cells_are_assigned_to_the_box_that_they_see_best(script: SimpleNamespace) -> None:
    points, strides = script.cells(torch.device("cpu"))
    assert len(points) == 40 * 40 + 20 * 20 + 10 * 10
    truth = torch.tensor([[40.0, 40, 120, 200], [200, 60, 280, 300]])
    boxes = torch.stack([points[:, 0] - 30, points[:, 1] - 60, points[:, 0] + 30, points[:, 1] + 60], dim=1)
    index, quality = script.assign(torch.zeros(len(points)), boxes, truth, points, strides)
    chosen = index >= 0
    assert 2 <= int(chosen.sum()) <= 26
    for i in (0, 1):
        inside = points[index == i]
        assert len(inside) > 0
        assert ((inside > truth[i, :2]) & (inside < truth[i, 2:])).all()
    assert (quality[chosen] > 0.3).all()
    assert not quality[~chosen].any()
    nothing, _ = script.assign(torch.zeros(len(points)), boxes, torch.zeros(0, 4), points, strides)
    assert (nothing == -1).all()


def test_learning_rate_warms_up_holds_and_falls(script: SimpleNamespace) -> None:
    rates = [script.learning_rate(step, 3000, 1.0) for step in range(3000)]
    assert rates[0] < 0.01
    assert rates[299] == rates[999] == 1.0
    assert all(a >= b for a, b in zip(rates[999:], rates[1000:], strict=False))
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_crops_hold_the_keypoints_where_the_labels_say(script: SimpleNamespace) -> None:
    crops, points, weights = next(script.pose_batches(3, 8))
    assert crops.shape == (8, 3, 256, 192)
    assert crops.dtype == torch.uint8
    assert points.shape == (8, 17, 2)
    inside = (points >= 0).all(dim=2) & (points[..., 0] <= 191) & (points[..., 1] <= 255)
    assert inside[weights > 0].all()
    assert 0.6 < float(weights.mean()) <= 1


def test_images_and_boxes_of_the_detector_fit(script: SimpleNamespace) -> None:
    images, boxes = next(script.det_batches(3, 6))
    assert images.shape == (6, 3, 320, 320)
    for of_image in boxes:
        assert of_image.shape[1:] == (4,)
        assert ((of_image[:, 2:] > of_image[:, :2]) & (of_image >= 0).reshape(-1, 2, 2).all(dim=2)).all()
        assert (of_image <= 320).all()


@pytest.mark.parametrize("task", ["det", "pose"])
def test_it_trains_stops_and_goes_on(task: str, tmp_path: Path) -> None:
    out = tmp_path / f"{task}.pth"

    def run(*more: str) -> str:
        command = [sys.executable, str(SCRIPT), task, "-o", str(out), "--batch", "2", "--threads", "1", *more]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    assert f"wrote {out}" in run("--steps", "2")
    first = read_checkpoint(out)
    run("--steps", "4", "--resume")
    second = read_checkpoint(out)
    assert json.loads(second.meta["modelcrate"])["steps"] == 4
    assert any(not torch.equal(first.state_dict[key], value) for key, value in second.state_dict.items() if value.is_floating_point())
    model = read_architecture(second)
    assert not [fact for fact, source in model.facts.items() if source.startswith("default: ") and fact not in {"keypoint names"}]
    if task == "det":
        assert (model.input_hw, model.class_names) == ((320, 320), ["person"])
    else:
        assert (model.input_hw, model.keypoints) == ((256, 192), COCO_17)
        assert math.prod(model.input_hw) == 256 * 192
