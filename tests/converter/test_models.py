"""The networks are upstream's: under the same weights they compute what MMPose and MMDetection compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modelcrate_bundle.errors import ArchitectureError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.exportable import ExportableModel
from modelcrate_converter.models.blueprints import DETECTOR_SIZES, POSE_SIZES, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.models.layers import Shapes
from modelcrate_converter.models.rtmdet import RTMDet
from modelcrate_converter.models.rtmpose import RTMPose
from oracle_weights import MORE, oracle_input, oracle_outputs, oracle_shapes, oracle_weights

POSE = {  # name -> size, keypoints, (height, width)
    "rtmpose-t_coco-256x192": ("t", 17, (256, 192)),
    "rtmpose-s_coco-256x192": ("s", 17, (256, 192)),
    "rtmpose-m_coco-256x192": ("m", 17, (256, 192)),
    "rtmpose-l_coco-256x192": ("l", 17, (256, 192)),
    "rtmpose-m_coco-384x288": ("m", 17, (384, 288)),
    "rtmpose-l_coco-384x288": ("l", 17, (384, 288)),
    "rtmpose-m_halpe26-256x192": ("m", 26, (256, 192)),
}
MORE_POSE = {
    "rtmpose-m_ap10k-256x256": ("m", 17, (256, 256)),
    "rtmpose-m_hand-256x256": ("m", 21, (256, 256)),
    "rtmpose-m_lapa-256x256": ("m", 106, (256, 256)),
    "rtmpose-m_wholebody-256x192": ("m", 133, (256, 192)),
    "rtmpose-l_wholebody-384x288": ("l", 133, (384, 288)),
}
DETECTORS = {  # name -> size, side
    "rtmdet-nano_person-320": ("nano", 320),
    "rtmdet-nano_hand-320": ("nano", 320),
    "rtmdet-m_person-640": ("m", 640),
}


def relative_linf(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


def through_a_file(name: str, folder: Path) -> ExportableModel:
    path = folder / f"{name}.pth"
    torch.save({"state_dict": oracle_weights(oracle_shapes(name))}, path)
    model = read_architecture(read_checkpoint(path))
    path.unlink()
    return model


def outputs(model: ExportableModel, tensor: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        values = model.module(torch.from_numpy(tensor))
    return {spec.name: value.numpy() for spec, value in zip(model.outputs, values, strict=True)}


def needs_more(name: str) -> None:
    if not (MORE / f"{name}.npz").is_file():
        pytest.skip("needs ../shared/oracle: more reference outputs")


@pytest.mark.parametrize("name", [*POSE, *MORE_POSE])
def test_rtmpose_computes_what_mmpose_computes(name: str, tmp_path: Path) -> None:
    if name in MORE_POSE:
        needs_more(name)
    size, keypoints, input_hw = (POSE | MORE_POSE)[name]
    model = through_a_file(name, tmp_path)
    assert (model.name, model.task, model.input_hw) == (f"rtmpose-{size}", "PoseDetector", input_hw)
    expected = oracle_outputs(name)
    found = outputs(model, oracle_input(name))
    assert found["simcc_x"].shape == (1, keypoints, 2 * input_hw[1])
    assert found["simcc_y"].shape == (1, keypoints, 2 * input_hw[0])
    for output in ("simcc_x", "simcc_y"):
        assert relative_linf(found[output], expected[output]) <= 1e-4, output


@pytest.mark.parametrize("name", DETECTORS)
def test_rtmdet_computes_what_mmdetection_computes(name: str, tmp_path: Path) -> None:
    size, side = DETECTORS[name]
    model = through_a_file(name, tmp_path)
    assert (model.name, model.task, model.input_hw) == (f"rtmdet-{size}", "Detector", (side, side))
    expected = oracle_outputs(name)
    found = outputs(model, oracle_input(name))
    for level in range(3):
        assert relative_linf(found[f"cls_{level}"], expected[f"cls_{level}"]) <= 1e-3, f"cls_{level}"
        assert relative_linf(found[f"dist_{level}"], expected[f"bbox_{level}"]) <= 1e-4, f"dist_{level}"


def test_the_reference_tells_networks_apart(tmp_path: Path) -> None:
    """The comparison above would notice one weight of 3 million that is off by a tenth."""
    name = "rtmpose-t_coco-256x192"
    model = through_a_file(name, tmp_path)
    with torch.no_grad():
        model.module.get_parameter("backbone.stem.1.conv.weight")[0, 0, 1, 1] += 0.1
    found = outputs(model, oracle_input(name))
    assert relative_linf(found["simcc_x"], oracle_outputs(name)["simcc_x"]) > 1e-4


@pytest.mark.parametrize("name", [*POSE, *MORE_POSE])
def test_pose_blueprints_are_the_published_state_dicts(name: str) -> None:
    if name in MORE_POSE:
        needs_more(name)
    size, keypoints, input_hw = (POSE | MORE_POSE)[name]
    widen, deepen = POSE_SIZES[size]
    assert rtmpose_shapes(widen=widen, deepen=deepen, keypoints=keypoints, input_hw=input_hw) == oracle_shapes(name)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_blueprints_are_the_published_state_dicts(name: str) -> None:
    size, _ = DETECTORS[name]
    widen, deepen = DETECTOR_SIZES[size]
    assert rtmdet_shapes(widen=widen, deepen=deepen, classes=1, separable=size == "nano") == oracle_shapes(name)


def test_random_weights_follow_their_seed() -> None:
    table = rtmpose_shapes(widen=0.125, deepen=0.167, keypoints=3, input_hw=(64, 64))
    first, again, other = (random_weights(table, seed=seed) for seed in (5, 5, 6))
    assert {key: tuple(value.shape) for key, value in first.items()} == table
    assert all(torch.equal(first[key], again[key]) for key in table)
    assert not torch.equal(first["head.cls_x.weight"], other["head.cls_x.weight"])


def pruned_pose_shapes(rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    """An RTMPose with a width of its own for every group of channels that must agree."""
    table = rtmpose_shapes(widen=0.25, deepen=0.33, keypoints=5, input_hw=(96, 64), hidden=24, s=12)
    width = {prefix: int(rng.integers(4, 20)) for prefix in ("backbone.stem.0", "backbone.stem.1", "backbone.stem.2")}
    before = 3
    for prefix in sorted(width):
        _resize(table, prefix, out=width[prefix], channels=before)
        before = width[prefix]
    for stage in range(1, 5):
        at = f"backbone.stage{stage}"
        out, inner, short, final, pooled = (int(v) for v in rng.integers(4, 24, 5))
        _resize(table, f"{at}.0", out=out, channels=before)
        csp = f"{at}.1"
        if stage == 4:
            csp = f"{at}.2"
            _resize(table, f"{at}.1.conv1", out=pooled, channels=out)
            _resize(table, f"{at}.1.conv2", out=out, channels=4 * pooled)
        _resize(table, f"{csp}.main_conv", out=inner, channels=out)
        _resize(table, f"{csp}.short_conv", out=short, channels=out)
        _resize(table, f"{csp}.final_conv", out=final, channels=inner + short)
        for i in range(10):
            if f"{csp}.blocks.{i}.conv1.conv.weight" in table:
                middle = int(rng.integers(4, 20))
                _resize(table, f"{csp}.blocks.{i}.conv1", out=middle, channels=inner)
                _resize(table, f"{csp}.blocks.{i}.conv2.depthwise_conv", out=middle, channels=1)
                _resize(table, f"{csp}.blocks.{i}.conv2.pointwise_conv", out=inner, channels=middle)
        table[f"{csp}.attention.fc.weight"] = (inner + short, inner + short, 1, 1)
        table[f"{csp}.attention.fc.bias"] = (inner + short,)
        before = final
    table["head.final_layer.weight"] = (5, before, 7, 7)
    return table


def _resize(table: dict[str, tuple[int, ...]], prefix: str, *, out: int, channels: int) -> None:
    kernel = table[f"{prefix}.conv.weight"][2]
    table[f"{prefix}.conv.weight"] = (out, channels, kernel, kernel)
    table |= {f"{prefix}.bn.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize("seed", range(4))
def test_pruned_networks_load_with_the_widths_that_they_have(seed: int, tmp_path: Path) -> None:
    table = pruned_pose_shapes(np.random.default_rng(seed))
    weights = random_weights(table, seed=seed)
    path = tmp_path / "pruned.pth"
    torch.save({"state_dict": weights}, path)
    model = read_architecture(read_checkpoint(path))
    assert {key: tuple(value.shape) for key, value in model.module.state_dict().items()} == table
    assert all(torch.equal(value, weights[key]) for key, value in model.module.state_dict().items())
    found = outputs(model, np.ones((2, 3, 96, 64), dtype=np.float32))
    assert found["simcc_x"].shape == (2, 5, 128)
    assert np.isfinite(found["simcc_x"]).all()


def test_levels_share_their_convolutions_only_where_the_checkpoint_does(tmp_path: Path) -> None:
    table = rtmdet_shapes(widen=0.125, deepen=0.167, classes=2, separable=False)
    weights = random_weights(table, seed=3)
    shared, apart = tmp_path / "shared.pth", tmp_path / "apart.pth"
    torch.save({"state_dict": weights}, shared)
    own = weights["bbox_head.cls_convs.2.0.conv.weight"] * 2
    torch.save({"state_dict": weights | {"bbox_head.cls_convs.2.0.conv.weight": own}}, apart)
    sample = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    one, two = (outputs(read_architecture(read_checkpoint(path)), sample) for path in (shared, apart))
    for level in (0, 1):
        np.testing.assert_allclose(two[f"cls_{level}"], one[f"cls_{level}"], rtol=0, atol=1e-6)
    assert np.abs(two["cls_2"] - one["cls_2"]).max() > 1e-2


def test_exponentiated_distances_are_positive_and_in_input_pixels() -> None:
    table = rtmdet_shapes(widen=0.125, deepen=0.167, classes=1, separable=True)
    weights = random_weights(table, seed=4)
    plain, exponentiated = (RTMDet(table, share_conv=False, exp_on_reg=exp).eval() for exp in (False, True))
    for module in (plain, exponentiated):
        module.load_state_dict(weights)
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        raw, exp = plain(sample), exponentiated(sample)
    for level, stride in enumerate((8, 16, 32)):
        np.testing.assert_allclose(exp[3 + level].numpy(), np.exp(raw[3 + level].numpy() / stride) * stride, rtol=1e-5)
        np.testing.assert_array_equal(exp[level].numpy(), raw[level].numpy())


def test_a_network_that_is_asked_for_a_tensor_it_lacks_names_it() -> None:
    with pytest.raises(ArchitectureError, match=r"head\.final_layer\.weight"):
        Shapes({"head.final_layer.bias": (3,)})["head.final_layer.weight"]
    table = rtmpose_shapes(widen=0.125, deepen=0.167, keypoints=3, input_hw=(64, 64))
    del table["head.gau.uv.weight"]
    with pytest.raises(ArchitectureError, match=r"head\.gau\.uv\.weight"):
        RTMPose(table)
