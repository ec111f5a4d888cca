"""The demo's pose estimator grown to the size of a published one gives what it gave."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.models.blueprints import random_weights, rtmpose_shapes

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts/grown_pose.py"))


@pytest.mark.parametrize("size", ["t", "s", "m"])
def test_growing_changes_no_result(size: str, tmp_path: Path) -> None:
    small = read_architecture(read_checkpoint(DEMO_MODELS["demo-pose"]))
    large = read_architecture(read_checkpoint(SCRIPT["write_grown"](DEMO_MODELS["demo-pose"], size, tmp_path / "grown.pth")))
    assert sum(p.numel() for p in large.module.parameters()) > 1.3 * sum(p.numel() for p in small.module.parameters())
    assert large.keypoints == small.keypoints
    crops = torch.randn((2, 3, 256, 192), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for ours, theirs in zip(large.module(crops), small.module(crops), strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_a_network_does_not_grow_smaller() -> None:
    weights = random_weights(rtmpose_shapes(widen=0.5, deepen=0.33, keypoints=17, input_hw=(256, 192)), seed=0)
    with pytest.raises(ValueError, match="expected at most"):
        SCRIPT["grown"](weights, "t")
