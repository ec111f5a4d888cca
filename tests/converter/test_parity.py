"""The comparison with PyTorch passes what is right, and fails with the figure that is wrong."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modelcrate_bundle.errors import InputError
from modelcrate_bundle.manifest import OutputParity, ParityRecord, PixelParity
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import BackendArtifact, build
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import DeployConfig, Gates, NmsOptions, OnnxOptions
from modelcrate_converter.export import OnnxModel, export_onnx
from modelcrate_converter.exportable import ExportableModel
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.parity import ParityImage, check_parity, failed_gates, given_image, parity_rows, procedural_images, reference_result
from modelcrate_runtime.results import Detections, Poses

CFG = "test_pipeline = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]\nmodel = dict(bbox_head=dict(exp_on_reg=True))"


@functools.cache
def drawn_once() -> list[ParityImage]:
    return procedural_images()


@dataclasses.dataclass(frozen=True)
class Built:
    """A model, its canonical graph and an artefact; and the comparison, of the artefact or of a changed copy."""

    model: ExportableModel
    canonical: OnnxModel
    artifact: BackendArtifact
    folder: Path

    def check(self, *, gates: Gates | None = None, images: list[ParityImage] | None = None) -> ParityRecord:
        return check_parity(self.model, self.artifact, images or drawn_once(), gates or Gates())

    def changed(self, change: Callable[[onnx.ModelProto], None], *, canonical: bool = False) -> Built:
        """With a copy of the artefact's file, or of the canonical graph's, that `change` was applied to."""
        path = self.folder / ("canonical.onnx" if canonical else "end2end.onnx")
        proto = onnx.load(self.canonical.path if canonical else self.artifact.files["net"])
        change(proto)
        onnx.save(proto, path)
        if canonical:
            return dataclasses.replace(self, artifact=dataclasses.replace(self.artifact, raw={"net": path}))
        return dataclasses.replace(self, artifact=dataclasses.replace(self.artifact, files={"net": path}))


def build_all(weights: dict[str, torch.Tensor], folder: Path, *, cfg: str = "", nms: str = "graph") -> Built:
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": weights, "meta": {"cfg": cfg}}, folder / "model.pth")
    model = read_architecture(read_checkpoint(folder / "model.pth"))
    canonical = export_onnx(model, OnnxOptions(), workdir=folder)
    config = DeployConfig(target="made-up", backend="onnxruntime", precision="fp32", nms=NmsOptions(where=nms))
    return Built(model, canonical, build(model, canonical, config, workdir=folder), folder)


def pose_weights() -> dict[str, torch.Tensor]:
    weights = random_weights(rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=5, input_hw=(96, 64), hidden=32, s=16), seed=1)
    for axis in "xy":  # scores of a few units, as trained networks have them
        weights[f"head.cls_{axis}.weight"] *= 0.01
    return weights


def detector_weights() -> dict[str, torch.Tensor]:
    weights = random_weights(rtmdet_shapes(widen=0.0625, deepen=0.167, classes=3, separable=False), seed=2)
    for level in range(3):  # boxes of some tens of pixels after the exponential
        weights[f"bbox_head.rtm_reg.{level}.weight"] *= 0.1
        weights[f"bbox_head.rtm_reg.{level}.bias"] *= 0.5
    return weights


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    folder = tmp_path_factory.mktemp("parity")
    return {
        "pose": build_all(pose_weights(), folder / "pose"),
        "graph": build_all(detector_weights(), folder / "graph", cfg=CFG),
        "runtime": build_all(detector_weights(), folder / "runtime", cfg=CFG, nms="runtime"),
    }


@pytest.fixture
def pose(sources: dict[str, Built], tmp_path: Path) -> Built:
    return dataclasses.replace(sources["pose"], folder=tmp_path)


@pytest.fixture(params=["graph", "runtime"])
def detector(request: pytest.FixtureRequest, sources: dict[str, Built], tmp_path: Path) -> Built:
    return dataclasses.replace(sources[request.param], folder=tmp_path)


@pytest.fixture
def nms_detector(sources: dict[str, Built], tmp_path: Path) -> Built:
    return dataclasses.replace(sources["graph"], folder=tmp_path)


def feeding(proto: onnx.ModelProto, output: str) -> onnx.TensorProto:
    """The nearest constant before a graph's output that holds weights."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    waiting = [output]
    while waiting:
        node = producers[waiting.pop(0)]
        for name in node.input:
            if name in constants and onnx.numpy_helper.to_array(constants[name]).ndim >= 2:
                return constants[name]
        waiting += [name for name in node.input if name in producers]
    raise AssertionError(f"no weights before {output}")


def set_values(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(onnx.numpy_helper.to_array(tensor).dtype), tensor.name))


def scaled(output: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = feeding(proto, output)
        set_values(tensor, onnx.numpy_helper.to_array(tensor) * factor)

    return change


def by_name(record: ParityRecord) -> dict[str, OutputParity | PixelParity]:
    return {figure.name: figure for figure in (*record.outputs, *record.pixels)}


# ----------------------------------------------------------------------------------------------------------------------- sound


def test_a_sound_pose_artefact_passes_on_every_keypoint(pose: Built) -> None:
    record = pose.check()
    assert record.verified
    assert record.passed, failed_gates(record)
    assert record.images == ["procedural-0", "procedural-1", "procedural-2"]
    assert record.samples == 6
    assert [(figure.name, figure.gate) for figure in record.outputs] == [("simcc_x", 1e-4), ("simcc_y", 1e-4)]
    assert all(figure.relative_linf <= 1e-4 for figure in record.outputs)
    assert [(figure.name, figure.gate) for figure in record.pixels] == [("keypoint_shift_px", 0.05), ("score_shift", 1e-3)]
    shift, score = record.pixels
    assert shift.count + shift.undecided == score.count == 6 * 5
    assert shift.count > 0
    assert shift.worst <= 0.05
    assert failed_gates(record) == []


def test_a_sound_detector_artefact_passes_on_boxes_that_exist(detector: Built) -> None:
    record = detector.check()
    assert record.passed, failed_gates(record)
    assert record.samples == 3
    assert [figure.name for figure in record.outputs] == ["cls_0", "cls_1", "cls_2", "dist_0", "dist_1", "dist_2"]
    assert [figure.gate for figure in record.outputs] == [1e-3] * 3 + [1e-4] * 3
    figures = by_name(record)
    assert figures["box_shift_px"].count == figures["score_shift"].count > 20
    assert figures["label_flips"].worst == 0
    assert figures["label_flips"].gate == 0


def test_figures_are_measured_against_pytorch(pose: Built) -> None:
    """The record's own numbers, from another computation of them."""
    record = pose.changed(scaled("simcc_x", 1.01)).check()
    x, y = record.outputs
    assert x.relative_linf == pytest.approx(0.01, rel=1e-3)
    assert x.max_abs > 0
    assert y.relative_linf <= 1e-5


# ---------------------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("output", ["simcc_x", "simcc_y"])
def test_pose_weights_off_by_a_hundredth_fail_by_name(pose: Built, output: str) -> None:
    record = pose.changed(scaled(output, 1.01)).check()
    assert not record.passed
    assert [figure.name for figure in record.outputs if not figure.passed] == [output]
    assert failed_gates(record)[0].startswith(f"{output} 0.01 > 0.0001")


@pytest.mark.parametrize(("output", "figure"), [("cls_0", "score_shift"), ("dist_1", "box_shift_px")])
def test_detector_weights_off_by_a_hundredth_fail_by_name(detector: Built, output: str, figure: str) -> None:
    changed = detector.changed(scaled(output, 1.01))
    if detector.artifact.has_nms:  # raw outputs are compared on the graph that the artefact was derived from
        changed = changed.changed(scaled(output, 1.01), canonical=True)
    record = changed.check()
    assert not record.passed
    assert [entry.name for entry in record.outputs if not entry.passed] == [output]
    assert any(text.startswith(f"{output} ") for text in failed_gates(record))
    assert by_name(record)[figure].worst > by_name(detector.check())[figure].worst


@pytest.mark.parametrize("output", ["cls_0", "dist_1"])
def test_a_suppressing_artefact_is_compared_itself_and_not_only_the_graph_behind_it(nms_detector: Built, output: str) -> None:
    record = nms_detector.changed(scaled(output, 1.3)).check()
    assert all(figure.passed for figure in record.outputs)
    assert any(not figure.passed for figure in record.pixels)
    assert not record.passed


@pytest.mark.parametrize(("threshold", "changed"), [(0.6, 0.4), (0.6, 0.8), (0.05, 0.12)])
def test_another_threshold_in_the_graph_is_a_flip(nms_detector: Built, threshold: float, changed: float) -> None:
    def change(proto: onnx.ModelProto) -> None:
        (found,) = [
            tensor for tensor in proto.graph.initializer if tuple(tensor.dims) == (1,) and abs(float(onnx.numpy_helper.to_array(tensor)[0]) - threshold) < 1e-6
        ]
        set_values(found, np.array([changed]))

    record = nms_detector.changed(change).check()
    assert by_name(record)["label_flips"].worst > 0
    assert not record.passed
    assert any(text.startswith("label_flips") for text in failed_gates(record))


def test_swapped_labels_are_flips(nms_detector: Built) -> None:
    def change(proto: onnx.ModelProto) -> None:
        (node,) = [node for node in proto.graph.node if node.output[0] == "labels"]
        node.output[0] = "straight"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2, dtype=np.int64), "two"))
        proto.graph.node.append(onnx.helper.make_node("Sub", ["two", "straight"], ["labels"]))

    record = nms_detector.changed(change).check()
    assert by_name(record)["label_flips"].worst > 0
    assert not record.passed


def test_nan_fails_a_pose_artefact(pose: Built) -> None:
    record = pose.changed(scaled("simcc_x", float("nan"))).check()
    assert not record.passed
    assert any(text.startswith("simcc_x nan") for text in failed_gates(record))


@pytest.mark.parametrize("output", ["cls_1", "dist_0"])
def test_nan_fails_a_detector_artefact(detector: Built, output: str) -> None:
    record = detector.changed(scaled(output, float("nan"))).check()
    assert not record.passed
    assert failed_gates(record)


def test_nan_on_both_sides_fails_too(pose: Built) -> None:
    """A network whose activations overflow agrees with itself and is still no use to anyone."""
    with torch.no_grad():
        broken = read_architecture(read_checkpoint(_saved(pose_weights(), pose.folder)))
        broken.module.get_parameter("head.cls_x.weight").fill_(float("nan"))
    record = dataclasses.replace(pose.changed(scaled("simcc_x", float("nan"))), model=broken).check()
    assert not record.passed


def _saved(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "again.pth"
    torch.save({"state_dict": weights}, path)
    return path


def test_a_detector_that_finds_nothing_anywhere_is_not_called_verified(sources: dict[str, Built], tmp_path: Path) -> None:
    """Without one box its suppression was compared with nothing: a graph that never answers would pass."""
    weights = detector_weights()
    for level in range(3):
        weights[f"bbox_head.rtm_cls.{level}.bias"] -= 20
    silent = build_all(weights, tmp_path / "silent", cfg=CFG)

    def deaf(proto: onnx.ModelProto) -> None:
        (found,) = [
            tensor for tensor in proto.graph.initializer if tuple(tensor.dims) == (1,) and abs(float(onnx.numpy_helper.to_array(tensor)[0]) - 0.05) < 1e-6
        ]
        set_values(found, np.array([2.0]))

    assert by_name(silent.check())["box_shift_px"].count == 0
    broken = silent.changed(deaf).check()
    assert not broken.passed or broken.verified is False


# ------------------------------------------------------------------------------------------------------------------- undecided


def tied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every other bin of x repeats the one before it, so that each maximum is a tie of two neighbours."""
    weight = weights["head.cls_x.weight"]
    weight[1::2] = weight[0::2]
    return weights


@pytest.fixture(scope="module")
def tied_pose(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_all(tied(pose_weights()), tmp_path_factory.mktemp("tied") / "pose")


def second_bins_times(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = feeding(proto, "simcc_x")
        values = onnx.numpy_helper.to_array(tensor).copy()
        bins = values.shape.index(128)
        np.moveaxis(values, bins, 0)[1::2] *= factor
        set_values(tensor, values)

    return change


def test_maxima_that_nearly_tie_in_pytorch_are_undecided_and_counted(pose: Built, tmp_path: Path) -> None:
    """PyTorch prefers the first of two bins by 2e-6, the artefact the second by as much: neither is wrong."""
    weights = tied(pose_weights())
    weights["head.cls_x.weight"][1::2] *= 1 - 2e-6
    near = dataclasses.replace(build_all(weights, tmp_path / "near"), folder=tmp_path)
    record = near.changed(second_bins_times(1 + 4e-6)).check()
    shift = by_name(record)["keypoint_shift_px"]
    assert shift.undecided > 0
    assert shift.count + shift.undecided == 30
    assert shift.worst <= 0.05
    assert record.passed, failed_gates(record)
    assert "undecided" in next(row["what"] for row in parity_rows(record) if row["what"].startswith("keypoint"))


def test_maxima_that_tie_exactly_in_pytorch_are_undecided_and_counted(tied_pose: Built, tmp_path: Path) -> None:
    """PyTorch's two best bins are equal to the last bit; that the artefact takes the other one is no shift."""
    record = dataclasses.replace(tied_pose, folder=tmp_path).changed(second_bins_times(1 + 1e-5)).check()
    shift = by_name(record)["keypoint_shift_px"]
    assert record.outputs[0].passed
    assert shift.undecided > 0
    assert record.passed, failed_gates(record)


def test_a_tie_is_no_licence_to_answer_something_else(tied_pose: Built, tmp_path: Path) -> None:
    """The same ties; but the artefact prefers bins that are a tenth worse."""
    record = dataclasses.replace(tied_pose, folder=tmp_path).changed(second_bins_times(0.5)).check()
    assert not record.passed


# ---------------------------------------------------------------------------------------------------------------- gates, inputs


def test_gates_decide_and_are_recorded(pose: Built) -> None:
    changed = pose.changed(scaled("simcc_x", 1.01))
    loose = changed.check(gates=Gates(relative_linf=0.1, keypoint_px=100, score=100))
    assert loose.passed, failed_gates(loose)
    assert [figure.gate for figure in (*loose.outputs, *loose.pixels)] == [0.1, 0.1, 100, 100]
    tight = pose.check(gates=Gates(relative_linf=0.0))
    assert not tight.passed


def test_rows_tell_every_figure_with_its_gate_and_verdict(detector: Built) -> None:
    record = detector.check()
    rows = parity_rows(record)
    assert len(rows) == len(record.outputs) + len(record.pixels)
    assert {row["ok"] for row in rows} == {"ok"}
    assert [row["gate"] for row in rows[:6]] == ["0.001"] * 3 + ["0.0001"] * 3
    broken = dataclasses.replace(detector, model=detector.model).check(gates=Gates(distances_linf=0.0))
    assert "FAIL" in {row["ok"] for row in parity_rows(broken)}


def test_an_image_of_the_user_is_compared_whole_and_in_parts(pose: Built, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image = given_image(Path("folder") / "photo.jpg", scene[0])
    assert image.name == "photo.jpg"
    np.testing.assert_allclose(image.boxes_xyxy[0], [0, 0, 640, 480])
    record = pose.check(images=[image])
    assert record.passed, failed_gates(record)
    assert (record.images, record.samples) == (["photo.jpg"], 3)


def test_an_image_too_small_to_compare_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"dot\.png: expected an image of at least 2x2 pixels .* found 1x1"):
        given_image(Path("dot.png"), np.zeros((1, 1, 3), dtype=np.uint8))


def test_images_of_any_shape_are_compared(pose: Built, nms_detector: Built) -> None:
    rng = np.random.default_rng(0)
    images = [given_image(Path(f"{h}x{w}.png"), rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((2, 2), (3, 900), (700, 5), (96, 128))]
    for built, of_shape in ((pose, images), (nms_detector, [image for image in images if image.image.shape[1] > image.image.shape[0]])):
        record = built.check(images=of_shape)
        assert record.passed, failed_gates(record)


def test_a_portrait_image_goes_into_a_landscape_detector(nms_detector: Built) -> None:
    """The network's input is 128 wide and 96 high; whoever converts it may have photos in the other format."""
    image = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    record = nms_detector.check(images=[given_image(Path("portrait.png"), image)])
    assert record.passed, failed_gates(record)


def test_procedural_images_are_always_the_same() -> None:
    for one, again in zip(procedural_images(), procedural_images(), strict=True):
        assert one.name == again.name
        assert one.image.dtype == np.uint8
        assert one.image.shape == (480, 640, 3)
        np.testing.assert_array_equal(one.image, again.image)
        np.testing.assert_array_equal(one.boxes_xyxy, again.boxes_xyxy)
        assert one.boxes_xyxy.shape == (2, 4)
        assert one.image.std() > 20, "an image without texture would compare nothing"


def test_the_session_is_closed_and_the_file_free_afterwards(pose: Built) -> None:
    copied = pose.changed(lambda proto: None)
    copied.check()
    shutil.rmtree(pose.folder)
    assert not pose.folder.exists()


def test_reference_results_are_typed_and_in_image_pixels(pose: Built, detector: Built, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    poses, detections = reference_result(pose.model, image), reference_result(detector.model, image)
    assert isinstance(poses, Poses)
    assert poses.keypoints_xy.shape == (1, 5, 2)
    assert isinstance(detections, Detections)
    assert len(detections) > 0
    assert (detections.boxes_xyxy >= 0).all()
    assert (detections.boxes_xyxy <= [640, 480, 640, 480]).all()
