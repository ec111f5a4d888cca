"""Fixtures for all tests: checkpoints that are made here, bundles converted from them, and the optional folder of real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from modelcrate_bundle.bundle import Bundle
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.people import procedural_scenes

SHARED = Path(__file__).parents[2] / "shared"
"""Real checkpoints, bundles and photos beside the checkout; the project builds and passes its tests without them."""

torch.set_num_threads(1)  # the tests run in as many processes as there are cores: threads of both would spin against each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it skip where it is not."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip("needs ../shared/fixtures: real checkpoints, bundles and photos")
    return SHARED


@pytest.fixture(scope="session")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """A procedural image (480, 640, 3) BGR uint8 and the (4,) box of the figure in it."""
    _, image, box = procedural_scenes(1)[0]
    return image, box


@pytest.fixture(scope="session")
def pose_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RTMPose of an eighth of the width: 17 keypoints, 256x192; no metadata."""
    path = tmp_path_factory.mktemp("checkpoints") / "pose_random.pth"
    shapes = rtmpose_shapes(widen=0.125, deepen=0.167, keypoints=17, input_hw=(256, 192))
    torch.save({"state_dict": random_weights(shapes, seed=1)}, path)
    return path


@pytest.fixture(scope="session")
def detector_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RTMDet-nano with two classes; no metadata."""
    path = tmp_path_factory.mktemp("checkpoints") / "detector_random.pth"
    shapes = rtmdet_shapes(widen=0.25, deepen=0.33, classes=2, separable=True)
    torch.save({"state_dict": random_weights(shapes, seed=2)}, path)
    return path


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Convert a checkpoint for ONNX Runtime, once for each checkpoint and option; returns the bundle's folder."""
    made: dict[tuple[Path, str], Path] = {}

    def make(checkpoint: Path, *, nms: str = "graph", name: str | None = None) -> Path:
        key = (checkpoint, nms)
        if key not in made:
            config = load_config("onnxruntime")
            config = type(config)(target=config.target, backend=config.backend, precision=config.precision, gates=config.gates, nms=type(config.nms)(where=nms))
            (conversion,) = convert(checkpoint, [config], ConvertOptions(out=tmp_path_factory.mktemp("crates"), name=name))
            if conversion.error is not None:
                raise conversion.error
            made[key] = conversion.place
        return made[key]

    return make


@pytest.fixture(scope="session")
def pose_bundle(bundle_of: Callable[..., Path], pose_checkpoint: Path) -> Path:
    """The random pose estimator as an ONNX Runtime bundle. Do not change its files: copy it."""
    return bundle_of(pose_checkpoint)


@pytest.fixture(scope="session")
def detector_bundle(bundle_of: Callable[..., Path], detector_checkpoint: Path) -> Path:
    """The random detector as an ONNX Runtime bundle with NMS in the graph. Do not change its files: copy it."""
    return bundle_of(detector_checkpoint)


@pytest.fixture(scope="session")
def demo_pose_bundle(bundle_of: Callable[..., Path]) -> Path:
    """The trained pose estimator, for tests whose numbers should mean something. Do not change its files: copy it."""
    return bundle_of(DEMO_MODELS["demo-pose"], name="demo-pose")


@pytest.fixture(scope="session")
def demo_detector_bundle(bundle_of: Callable[..., Path]) -> Path:
    """The trained detector with NMS in the graph. Do not change its files: copy it."""
    return bundle_of(DEMO_MODELS["demo-det"], name="demo-det")


@pytest.fixture
def opened_pose(pose_bundle: Path) -> Bundle:
    """The pose bundle, opened."""
    return Bundle.open(pose_bundle)
