"""`verify` and `bisect`: a bundle against its checkpoint on any machine, and the first tensor that is wrong."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import BundleFormatError, ConfigError, UnsupportedBundleError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.cli import app
from modelcrate_converter.config import OnnxOptions, load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.export import export_onnx
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.ncnn_network import read_network, write_network
from modelcrate_converter.parity import ParityImage, procedural_images
from modelcrate_converter.simplify import simplify
from modelcrate_converter.verification import bisect_bundle, read_reference, verify_bundle
from modelcrate_runtime.sessions import BACKENDS

TARGETS = ["onnxruntime", "onnxruntime-fp16", "onnxruntime-int8", "openvino", "ncnn"]


@functools.cache
def images() -> list[ParityImage]:
    return procedural_images()[:1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    pose = rtmpose_shapes(widen=0.125, deepen=0.167, keypoints=5, input_hw=(96, 64), hidden=32, s=16)
    detector = rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=False)
    torch.save({"state_dict": random_weights(pose, seed=3)}, folder / "pose.pth")
    torch.save({"state_dict": random_weights(detector, seed=3), "meta": {"cfg": "test_pipeline = [dict(type='Resize', scale=(96, 96))]"}}, folder / "detector.pth")
    return {"pose": folder / "pose.pth", "detector": folder / "detector.pth"}


@pytest.fixture(scope="module")
def bundle(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    out = tmp_path_factory.mktemp("crates")

    @functools.cache
    def of(what: str, target: str) -> Path:
        config = load_config(target)
        config = msgspec.structs.replace(config, int8=msgspec.structs.replace(config.int8, scenes=2))
        if not BACKENDS[config.backend].is_installed:
            pytest.skip(f"needs {config.backend}: {BACKENDS[config.backend].install_command}")
        (conversion,) = convert(checkpoints[what], [config], ConvertOptions(out=out, verify=False))
        assert conversion.error is None, conversion.error
        return conversion.place

    return of


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ["pose", "detector"])
def test_a_bundle_is_what_its_checkpoint_is(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], what: str, target: str) -> None:
    opened = Bundle.open(bundle(what, target))
    record = verify_bundle(opened, read_reference(opened, checkpoints[what]), images())
    assert record.verified
    assert record.pixels
    if target in {"onnxruntime", "openvino", "ncnn"}:
        assert record.passed


def test_another_checkpoint_is_refused_by_its_hash(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="expected the file that the bundle was made from") as caught:
        read_reference(Bundle.open(bundle("pose", "onnxruntime")), checkpoints["detector"])
    assert "pose.pth" in caught.value.hint


def test_a_bundle_without_a_manifest_has_nothing_to_be_compared_with(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundle("pose", "onnxruntime"), tmp_path / "bare")
    (tmp_path / "bare/manifest.json").unlink()
    with pytest.raises(BundleFormatError, match=r"without manifest\.json"):
        read_reference(Bundle.open(tmp_path / "bare"), checkpoints["pose"])


def spoiled(place: Path, target: Path, *, layer: str) -> Path:
    """A copy of an ONNX bundle in which one weight of a convolution is another; its hashes are not checked by who opens it only."""
    shutil.copytree(place, target)
    proto = onnx.load(target / "end2end.onnx")
    (node,) = [node for node in proto.graph.node if node.op_type in {"Conv", "ConvTranspose"} and layer in node.name]
    (weights,) = [tensor for tensor in proto.graph.initializer if tensor.name == node.input[1]]
    values = onnx.numpy_helper.to_array(weights).copy()
    values[0, 0, values.shape[2] // 2, values.shape[3] // 2] += 0.5 * np.abs(values).max()
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(proto, target / "end2end.onnx")
    return target


@pytest.mark.parametrize("layer", ["stem.1/conv", "stage3.0/conv", "final_layer"])
def test_the_first_tensor_that_is_wrong_is_the_layer_that_was_spoiled(
    bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path, layer: str
) -> None:
    """Also where the artefact has another operator for it than the canonical graph, whose words these are."""
    opened = Bundle.open(spoiled(bundle("pose", "onnxruntime"), tmp_path / "spoiled", layer=layer))
    found = bisect_bundle(opened, read_reference(opened, checkpoints["pose"]), images())
    first = next(item for item in found if item.relative_linf > 1e-4)
    assert layer in first.tensor
    assert first.operator == "Conv"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_sound_bundle_has_no_wrong_tensor(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], target: str) -> None:
    opened = Bundle.open(bundle("pose", target))
    found = bisect_bundle(opened, read_reference(opened, checkpoints["pose"]), images())
    assert len(found) > 80
    assert max(item.relative_linf for item in found) < 1e-4
    assert found[-1].tensor in {"simcc_x", "simcc_y"}


def test_half_tensors_are_compared_too(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path]) -> None:
    opened = Bundle.open(bundle("pose", "onnxruntime-fp16"))
    found = bisect_bundle(opened, read_reference(opened, checkpoints["pose"]), images())
    assert len(found) > 80
    assert 1e-5 < max(item.relative_linf for item in found) < 0.05


# ------------------------------------------------------------------------------------------------------------------------ ncnn


def reference_graph(checkpoint: Path, workdir: Path) -> onnx.GraphProto:
    """The graph that bundles of a checkpoint are compared with."""
    model = read_architecture(read_checkpoint(checkpoint))
    return onnx.load(simplify(export_onnx(model, OnnxOptions(), workdir=workdir), workdir=workdir, metadata={}).path).graph


def wide_convolutions(graph: onnx.GraphProto) -> list[tuple[str, bytes]]:
    """Result and weights of the convolutions that look at more than one pixel, in the graph's order."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [(node.output[0], values[node.input[1]]) for node in graph.node if node.op_type == "Conv" and node.input[1] in values]
    return [(name, weights.tobytes()) for name, weights in found if weights.shape[2] > 1]


def behind(graph: onnx.GraphProto, tensor: str) -> set[str]:
    """A tensor, and all that is made of it."""
    found = {tensor}
    for node in graph.node:
        if found & set(node.input):
            found |= set(node.output)
    return found


@pytest.mark.parametrize("what", ["pose", "detector"])
def test_a_sound_ncnn_bundle_has_no_wrong_tensor(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], what: str, tmp_path: Path) -> None:
    """What goes into each layer that has weights is among them, and so is every output."""
    opened = Bundle.open(bundle(what, "ncnn"))
    found = bisect_bundle(opened, read_reference(opened, checkpoints[what]), images())
    graph = reference_graph(checkpoints[what], tmp_path)
    shown = {item.tensor for item in found}
    assert {value.name for value in graph.output} <= shown
    read = {node.input[0] for node in graph.node if node.op_type == "Conv"} - {graph.input[0].name}
    assert len(read) > 25
    assert read <= shown, read - shown
    order = [name for node in graph.node for name in node.output]
    assert [item.tensor for item in found] == sorted(shown, key=order.index)
    assert max(item.relative_linf for item in found) < 1e-3


@pytest.mark.parametrize("what", ["pose", "detector"])
def test_int8_of_ncnn_has_a_first_wrong_tensor(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], what: str) -> None:
    opened = Bundle.open(bundle(what, "ncnn-int8"))
    found = bisect_bundle(opened, read_reference(opened, checkpoints[what]), images())
    assert len(found) > 25
    assert found[0].relative_linf > 1e-3, "the first convolution is the first that is quantised"
    assert max(item.relative_linf for item in found) < 1, "it is the same network all the same"


def test_half_weights_of_ncnn_are_known_by_their_values(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path]) -> None:
    opened = Bundle.open(bundle("detector", "ncnn-fp16"))
    found = bisect_bundle(opened, read_reference(opened, checkpoints["detector"]), images())
    assert len(found) > 25
    assert 1e-5 < max(item.relative_linf for item in found) < 0.05


@pytest.mark.parametrize(("what", "share"), [("pose", 0.0), ("pose", 0.3), ("pose", 0.7), ("detector", 0.0), ("detector", 0.5)])
def test_the_first_wrong_tensor_of_ncnn_is_behind_the_weights_that_were_damaged(
    bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path, what: str, share: float
) -> None:
    """One percent more of one convolution's weights, a part of the way through the network."""
    shutil.copytree(bundle(what, "ncnn"), tmp_path / "damaged")
    graph = reference_graph(checkpoints[what], tmp_path)
    convolutions = wide_convolutions(graph)
    result, weights = convolutions[int(share * len(convolutions))]
    net, content = tmp_path / "damaged/end2end.param", tmp_path / "damaged/end2end.bin"
    layers = read_network(net.read_text(), content.read_bytes(), where="net")
    (layer,) = [layer for layer in layers if layer.weights and layer.weights[0][0].tobytes() == weights]
    layer.weights[0] = ((layer.weights[0][0] * 1.01).astype(np.float32), True)
    content.write_bytes(write_network(layers)[1])
    opened = Bundle.open(tmp_path / "damaged")
    found = bisect_bundle(opened, read_reference(opened, checkpoints[what]), images())
    first = next(i for i, item in enumerate(found) if item.relative_linf > 1e-3)
    spoiled = behind(graph, result)
    assert found[first].tensor in spoiled
    assert not {item.tensor for item in found[:first]} & spoiled
    assert max((item.relative_linf for item in found[:first]), default=0.0) < 1e-4


def test_a_backend_that_does_not_show_its_inner_tensors_is_said(
    bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bundle("pose", "onnxruntime"), tmp_path / "other")
    deploy = tmp_path / "other/deploy.json"
    deploy.write_text(deploy.read_text().replace('"backend": "onnxruntime"', '"backend": "tensorrt"'))
    opened = Bundle.open(tmp_path / "other")
    with pytest.raises(UnsupportedBundleError, match="bisect: expected a bundle for onnxruntime, openvino or ncnn, which .* found tensorrt"):
        bisect_bundle(opened, read_reference(opened, checkpoints["pose"]), images())


def test_the_commands(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    place, checkpoint = str(bundle("pose", "onnxruntime")), str(checkpoints["pose"])
    shown = CliRunner().invoke(app, ["verify", place, "-r", checkpoint])
    assert shown.exit_code == 0
    assert "parity with PyTorch" in shown.output
    as_json = CliRunner().invoke(app, ["verify", place, "-r", checkpoint, "--json"])
    assert json.loads(as_json.stdout)["verified"] is True
    found = CliRunner().invoke(app, ["bisect", place, "-r", checkpoint])
    assert "are within 0.001 of PyTorch" in found.output
    quantised = CliRunner().invoke(app, ["bisect", str(bundle("pose", "ncnn-int8")), "-r", checkpoint])
    assert quantised.exit_code == 0
    assert "tensor 1 of " in quantised.output
    assert "is the first beyond 0.001" in quantised.output
    found = CliRunner().invoke(app, ["bisect", place, "-r", checkpoint, "--tolerance", "0", "--json"])
    assert json.loads(found.stdout)["tolerance"] == 0.0
    wrong = spoiled(Path(place), tmp_path / "spoiled", layer="stem.1/conv")
    changed = CliRunner().invoke(app, ["verify", str(wrong), "-r", checkpoint])
    assert changed.exit_code == 12
    assert "Traceback" not in changed.output


def test_a_bundle_outside_its_gates_is_an_error_with_the_next_step(bundle: Callable[[str, str], Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text('backend = "onnxruntime"\nprecision = "fp32"\n[gates]\nrelative_linf = 1e-12\n')
    result = CliRunner().invoke(app, ["verify", str(bundle("pose", "onnxruntime")), "-r", str(checkpoints["pose"]), "-t", str(strict)])
    assert result.exit_code == 9
    assert "modelcrate bisect" in result.output


def test_int8_is_calibrated_on_the_images_that_are_given(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for i, level in enumerate((20, 230)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"photos/{i}.png"), np.full((60, 80, 3), level, dtype=np.uint8))
    command = ["convert", str(checkpoints["pose"]), "-t", "onnxruntime-int8", "--no-verify", "-o", str(tmp_path / "crates")]
    found = []
    for more in ([], ["--calibration", str(tmp_path / "photos")], ["--calibration", str(tmp_path / "photos/0.png")]):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        assert "up to date" not in result.output
        (place,) = (tmp_path / "crates").iterdir()
        found.append(json.loads((place / "calibration.json").read_text()))
    assert [of["inputs"] for of in found] == [64, 6, 3]  # two crops of each of 32 scenes; all of an image, and two parts
    assert found[0]["ranges"]["input"] != found[1]["ranges"]["input"] != found[2]["ranges"]["input"]
    missing = CliRunner().invoke(app, [*command, "--calibration", str(tmp_path / "gone")])
    assert missing.exit_code == 10
