"""PyTorch behind the runtime's face: a session like any other, and tasks that find what the comparison with PyTorch finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modelcrate_bundle.errors import InputError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import build
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import OnnxOptions, load_config
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.export import export_onnx
from modelcrate_converter.exportable import ExportableModel
from modelcrate_converter.models.blueprints import classifier_shapes, random_weights
from modelcrate_converter.own_model import read_own_model
from modelcrate_converter.parity import network_inputs, procedural_images, reference_result, run_reference
from modelcrate_converter.people import draw_scene
from modelcrate_converter.reference import TorchSession, open_reference, open_unpacked
from modelcrate_runtime import Classifier, Detector, PoseDetector
from modelcrate_runtime.results import Classification, Detections, Poses

IMAGES = [image.image for image in procedural_images()[:2]] + [draw_scene(77, size_hw=(240, 320), people=(2, 4)).image]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportableModel]:
    path = tmp_path_factory.mktemp("models") / "classifier.pth"
    torch.save({"state_dict": random_weights(classifier_shapes(widen=0.0625, deepen=0.167, classes=6), seed=1)}, path)
    paths = {"pose": DEMO_MODELS["demo-pose"], "detector": DEMO_MODELS["demo-det"], "classifier": path}
    return {name: read_architecture(read_checkpoint(path)) for name, path in paths.items()}


@pytest.fixture
def pose(models: dict[str, ExportableModel]) -> ExportableModel:
    return models["pose"]


def sample(model: ExportableModel, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, *model.input_hw)).astype(np.float32)


def test_it_has_the_networks_own_inputs_and_outputs(models: dict[str, ExportableModel]) -> None:
    for model in models.values():
        session = TorchSession(model)
        assert session.inputs == (model.input,)
        assert session.outputs == tuple(model.outputs)
        assert session.streams == 1
        found = session.run({model.input.name: sample(model)})
        assert list(found) == [spec.name for spec in model.outputs]
        for spec in model.outputs:
            assert found[spec.name].dtype == np.dtype(spec.dtype)
            assert len(found[spec.name]) == 2


def test_it_computes_what_the_comparison_takes_for_right(models: dict[str, ExportableModel]) -> None:
    for model in models.values():
        (tensor, *_) = network_inputs(model, procedural_images()[:1])
        session = TorchSession(model)
        expected = run_reference(model, tensor)
        for call in (session.run, session.run_beside):
            found = call({model.input.name: tensor})
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)


def test_a_closed_session_says_so(pose: ExportableModel) -> None:
    session = TorchSession(pose)
    session.close()
    session.close()
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match="PyTorch: expected an open session, found a closed one"):
            call({pose.input.name: sample(pose)})
    assert TorchSession(pose).run({pose.input.name: sample(pose)}), "the model itself is not closed"


@pytest.mark.parametrize("names", [["image"], [], ["input", "more"]])
def test_inputs_of_another_name_are_refused(pose: ExportableModel, names: list[str]) -> None:
    with pytest.raises(InputError, match=f"PyTorch: expected the input input, found {', '.join(names)}"):
        TorchSession(pose).run({name: sample(pose) for name in names})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_input_is_not_changed_and_the_outputs_are_the_callers(tmp_path: Path) -> None:
    """Though the network changes what it is given."""

    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    (tmp_path / "spec.toml").write_text('task = "Network"\n[input]\nsize_hw = [4, 4]\n[resize]\nmode = "stretch"\n')
    torch.jit.trace(Greedy(), torch.zeros(1, 3, 4, 4)).save(tmp_path / "greedy.pt")
    model = read_own_model(tmp_path / "spec.toml", path=tmp_path / "greedy.pt", builder=None, name="greedy", sha256=None)
    session = TorchSession(model)
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)
    kept = x.copy()
    (first,) = session.run({model.input.name: x}).values()
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(first, 2 * kept)
    first[:] = 0
    x.flags.writeable = False
    (second,) = session.run({model.input.name: x}).values()
    np.testing.assert_array_equal(second, 2 * kept)


def test_the_checkpoint_finds_what_the_comparison_with_it_finds(models: dict[str, ExportableModel]) -> None:
    for name, kind in (("detector", Detector), ("pose", PoseDetector), ("classifier", Classifier)):
        with open_reference(models[name]) as task:
            assert isinstance(task, kind)
            for image in IMAGES:
                expected = reference_result(models[name], image)
                if isinstance(task, Detector):
                    assert isinstance(expected, Detections)
                    found = task.detect(image)
                    assert len(found) > 0
                    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
                    np.testing.assert_array_equal(found.labels, expected.labels)
                    np.testing.assert_array_equal(found.scores, expected.scores)
                elif isinstance(task, PoseDetector):
                    assert isinstance(expected, Poses)
                    poses = task.estimate(image)
                    np.testing.assert_array_equal(poses.keypoints_xy, expected.keypoints_xy)
                    np.testing.assert_array_equal(poses.scores, expected.scores)
                elif isinstance(task, Classifier):
                    assert isinstance(expected, Classification)
                    np.testing.assert_array_equal(task.classify(image).scores, expected.scores)


def test_the_checkpoint_finds_what_its_bundle_finds(demo_detector_bundle: Path, models: dict[str, ExportableModel]) -> None:
    """In exact geometry, and with the names of the classes."""
    with open_reference(models["detector"]) as reference, Detector(demo_detector_bundle, threads=1) as detector:
        assert isinstance(reference, Detector)
        assert reference.class_names == detector.class_names == ["person"]
        ours, theirs = reference.detect(IMAGES[2]), detector.detect(IMAGES[2])
        ours, theirs = ours[ours.scores > 0.1], theirs[theirs.scores > 0.1]
        np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=0.05)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)


def test_the_checkpoint_takes_many_boxes_and_batches(pose: ExportableModel) -> None:
    box = np.array([20, 10, 180, 230], dtype=np.float32)
    boxes = np.stack([box + i for i in range(5)])
    with open_reference(pose) as task:
        assert isinstance(task, PoseDetector)
        assert task.keypoint_count == 17
        together = task.estimate(IMAGES[2], boxes)
        alone = [task.estimate(IMAGES[2], boxes[i : i + 1]) for i in range(5)]
        assert [len(poses.keypoints_xy) for poses in task.estimate_batch(IMAGES, [boxes, boxes[:1], boxes[:0]])] == [5, 1, 0]
    np.testing.assert_allclose(together.keypoints_xy, np.concatenate([poses.keypoints_xy for poses in alone]), atol=0.05)
    with pytest.raises(InputError, match="closed"):
        task.estimate(IMAGES[2], boxes)


def test_what_a_builder_made_is_opened_before_it_is_a_bundle(pose: ExportableModel, tmp_path: Path) -> None:
    artifact = build(pose, export_onnx(pose, OnnxOptions(), workdir=tmp_path), load_config("onnxruntime"), workdir=tmp_path)
    with open_unpacked(pose, artifact) as ours, open_reference(pose) as reference:
        assert isinstance(ours, PoseDetector)
        assert isinstance(reference, PoseDetector)
        found, expected = (task.estimate(IMAGES[0]) for task in (ours, reference))
    np.testing.assert_allclose(found.keypoints_xy, expected.keypoints_xy, atol=0.5)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
