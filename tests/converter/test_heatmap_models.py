"""CSPNeXt with heatmaps: upstream's networks, upstream's decoding, a bundle that says what it needs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from modelcrate_bundle.errors import ConfigError, UnsupportedBundleError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.exportable import HeatmapFacts
from modelcrate_converter.models.heatmap import HeatmapPose
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime import PoseDetector
from oracle_weights import MORE, oracle_input, oracle_outputs, oracle_shapes, oracle_weights

ORACLES = {  # name -> (height, width)
    "cspnext-t_udp-256x192": (256, 192),
    "cspnext-s_udp-256x192": (256, 192),
    "cspnext-m_udp-256x192": (256, 192),
    "cspnext-l_udp-256x192": (256, 192),
    "cspnext-m_udp-384x288": (384, 288),
    "cspnext-l_udp-384x288": (384, 288),
}


def tiny_shapes(*, keypoints: int = 17, deconvs: int = 3) -> dict[str, tuple[int, ...]]:
    """A CSPNeXt of an eighth of the width under a small heatmap head."""
    from modelcrate_converter.models.blueprints import heatmap_shapes

    return heatmap_shapes(widen=0.125, deepen=0.167, keypoints=keypoints, channels=16, deconvs=deconvs)


def tiny_checkpoint(folder: Path, *, cfg: str = "", **shapes: int) -> Path:
    from modelcrate_converter.models.blueprints import random_weights

    path = folder / "heatmap.pth"
    torch.save({"state_dict": random_weights(tiny_shapes(**shapes), seed=1), "meta": {"cfg": cfg}}, path)
    return path


@pytest.mark.parametrize("name", ORACLES)
def test_heatmaps_are_what_mmpose_computes(name: str, tmp_path: Path) -> None:
    if not (MORE / f"{name}.npz").is_file():
        pytest.skip("needs ../shared/oracle: more reference outputs")
    module = HeatmapPose(oracle_shapes(name)).eval()
    module.load_state_dict(oracle_weights(oracle_shapes(name)))
    with torch.inference_mode():
        (found,) = module(torch.from_numpy(oracle_input(name)))
    expected = oracle_outputs(name)["heatmap"]
    height, width = ORACLES[name]
    assert found.shape == expected.shape == (1, 17, height // 4, width // 4)
    assert np.abs(found.numpy() - expected).max() / np.abs(expected).max() <= 1e-4


def test_facts_come_from_the_config(tmp_path: Path) -> None:
    cfg = """
codec = dict(type='UDPHeatmap', input_size=(96, 128), heatmap_size=(24, 32), sigma=1.5, blur_kernel_size=7)
model = dict(head=dict(type='HeatmapHead', out_channels=17, decoder=codec))
val_pipeline = [dict(type='LoadImage'), dict(type='GetBBoxCenterScale', padding=1.1), dict(type='TopdownAffine', input_size=(96, 128), use_udp=True)]
test_dataloader = dict(dataset=dict(pipeline=val_pipeline))
"""
    model = read_architecture(read_checkpoint(tiny_checkpoint(tmp_path, cfg=cfg)))
    assert model.input_hw == (128, 96)
    assert model.outputs[0].shape == ("batch", 17, 32, 24)
    assert model.postprocess == HeatmapFacts(
        padding=1.1, use_udp=True, is_udp_codec=True, unbiased=False, blur_kernel_size=7, sigma=1.5, heatmap_wh=(24, 32)
    )


def test_without_a_config_they_are_named_defaults(tmp_path: Path) -> None:
    model = read_architecture(read_checkpoint(tiny_checkpoint(tmp_path)))
    assert (model.name, model.input_hw) == ("cspnext-c128_udp", (256, 192))
    assert model.facts["codec"] == "default: UDPHeatmap"
    assert model.facts["input size (width, height)"].startswith("default")


@pytest.mark.parametrize(
    ("decoder", "error"),
    [
        ("type='UDPHeatmap', input_size=(192, 256), heatmap_size=(96, 128)", "heatmap size"),
        ("type='MegviiHeatmap'", "codec: .*expected UDPHeatmap or MSRAHeatmap"),
        ("type='UDPHeatmap', heatmap_type='combined'", "heatmap_type: expected gaussian"),
        ("type='UDPHeatmap', input_size=(190, 256)", "multiples of 32"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, decoder: str, error: str) -> None:
    cfg = f"model = dict(head=dict(type='HeatmapHead', decoder=dict({decoder})))"
    with pytest.raises(ConfigError, match=error):
        read_architecture(read_checkpoint(tiny_checkpoint(tmp_path, cfg=cfg)))


# --------------------------------------------------------------------------------------------------------------------- decoding


def gaussians(centers: np.ndarray, *, size_hw: tuple[int, int], sigma: float = 2.0) -> np.ndarray:
    """(N, K, h, w) float32 maps with one Gaussian each."""
    y, x = np.mgrid[0 : size_hw[0], 0 : size_hw[1]]
    distance = (x - centers[..., 0, None, None]) ** 2 + (y - centers[..., 1, None, None]) ** 2
    return np.exp(-distance / (2 * sigma**2)).astype(np.float32)


def mmpose_udp(maps: np.ndarray, *, kernel: int = 11) -> np.ndarray:
    """MMPose 1.3's UDPHeatmap for one person, in heatmap cells, written out keypoint by keypoint from its formulas."""
    points = []
    for one in maps:
        row, column = np.unravel_index(one.argmax(), one.shape)
        border = (kernel - 1) // 2
        smooth = cv2.GaussianBlur(np.pad(one, border), (kernel, kernel), 0)[border:-border, border:-border]
        smooth = smooth * (one.max() / smooth.max())
        log = np.pad(np.log(np.clip(smooth, 1e-3, 50.0)), 1, mode="edge").astype(np.float64)
        r, c = row + 1, column + 1
        gradient = np.array([log[r, c + 1] - log[r, c - 1], log[r + 1, c] - log[r - 1, c]]) / 2
        xx, yy = log[r, c + 1] - 2 * log[r, c] + log[r, c - 1], log[r + 1, c] - 2 * log[r, c] + log[r - 1, c]
        xy = (log[r + 1, c + 1] - log[r, c + 1] - log[r + 1, c] + 2 * log[r, c] - log[r, c - 1] - log[r - 1, c] + log[r - 1, c - 1]) / 2
        hessian = np.array([[xx, xy], [xy, yy]]) + np.finfo(np.float32).eps * np.eye(2)
        points.append(np.array([column, row]) - np.linalg.solve(hessian, gradient))
    return np.array(points)


def test_exact_decoding_is_mmposes_and_finds_fractions_of_a_cell() -> None:
    from modelcrate_runtime import heatmaps

    rng = np.random.default_rng(0)
    centers = rng.uniform((4, 4), (43, 59), (3, 17, 2))
    maps = gaussians(centers, size_hw=(64, 48)) + rng.uniform(0, 0.002, (3, 17, 64, 48)).astype(np.float32)
    cells, scores = heatmaps.peaks(maps)
    found = heatmaps.dark_udp(maps, cells, kernel=11)
    np.testing.assert_allclose(found, np.stack([mmpose_udp(one) for one in maps]), atol=2e-3)
    assert np.abs(found - centers).max() < 0.1
    assert np.abs(cells - centers).max() > 0.4
    np.testing.assert_array_equal(scores, maps.max(axis=(2, 3)))
    plain = heatmaps.dark(maps, cells, kernel=11)
    assert np.abs(plain - centers).max() < 0.1
    assert np.abs(heatmaps.quarter_shifted(maps, cells, low_y=0) - centers).max() < 0.3


def test_maps_at_the_edge_and_empty_maps_decode() -> None:
    from modelcrate_runtime import heatmaps

    centers = np.array([[[0.0, 0.0], [47.0, 63.0], [0.0, 63.0], [47.0, 0.0]]])
    maps = np.concatenate([gaussians(centers, size_hw=(64, 48)), np.full((1, 1, 64, 48), -1, dtype=np.float32)], axis=1)
    cells, scores = heatmaps.peaks(maps)
    for points in (
        heatmaps.dark_udp(maps, cells, kernel=11),
        heatmaps.dark_udp_sdk(maps, cells, kernel=11)[:, [0, 2, 4]],
        heatmaps.dark(maps, cells, kernel=11),
        heatmaps.quarter_shifted(maps, cells, low_y=1),
    ):
        assert np.isfinite(points).all()
    np.testing.assert_array_equal(heatmaps.dark_udp(maps, cells, kernel=11)[0, 4], (-1, -1))
    assert scores[0, 4] == -1


def test_a_keypoint_comes_back_to_where_it_was_drawn(tmp_path: Path) -> None:
    """Crop, draw a Gaussian where UDP puts the point, decode: the point in the image, through everything that is between."""
    from modelcrate_converter.describe import describe_pipeline
    from modelcrate_runtime.postprocess import KeypointDecoder
    from modelcrate_runtime.preprocess import Preprocessor

    model = read_architecture(read_checkpoint(tiny_checkpoint(tmp_path)))
    pipeline = describe_pipeline(model, has_nms=False)
    _, image, box = procedural_scenes(1)[0]
    _, crops = Preprocessor(pipeline, geometry="exact", where="test").crops(image, box)
    (crop,) = crops
    rng = np.random.default_rng(1)
    network = rng.uniform((12, 12), (180, 243), (17, 2))  # pixels of the network's input
    truth = network * np.array(crop.step_xy) + np.array(crop.origin_xy)
    maps = gaussians(network[None] * (np.array((47, 63)) / np.array((191, 255))), size_hw=(64, 48))
    poses = KeypointDecoder(pipeline, geometry="exact", where="test").decode({"output": maps}, crops, input_hw=(256, 192))
    assert np.abs(poses.keypoints_xy[0] - truth).max() < 0.1 * 4 * max(crop.step_xy)


@pytest.mark.parametrize(("params", "error"), [({"target_type": "CombinedTarget"}, "target_type"), ({"modulate_kernel": 10}, "modulate_kernel")])
def test_what_cannot_be_decoded_is_refused(tmp_path: Path, params: dict, error: str) -> None:
    import msgspec

    from modelcrate_converter.describe import describe_pipeline
    from modelcrate_runtime.postprocess import KeypointDecoder

    pipeline = describe_pipeline(read_architecture(read_checkpoint(tiny_checkpoint(tmp_path))), has_nms=False)
    post = pipeline.postprocess
    changed = msgspec.structs.replace(pipeline, postprocess=msgspec.structs.replace(post, params=msgspec.structs.replace(post.params, **params)))
    with pytest.raises(UnsupportedBundleError, match=error):
        KeypointDecoder(changed, geometry="sdk", where="test")


def test_outputs_that_are_no_heatmaps_are_refused(tmp_path: Path) -> None:
    from modelcrate_converter.describe import describe_pipeline
    from modelcrate_runtime.postprocess import KeypointDecoder

    pipeline = describe_pipeline(read_architecture(read_checkpoint(tiny_checkpoint(tmp_path))), has_nms=False)
    decoder = KeypointDecoder(pipeline, geometry="exact", where="test")
    maps = np.zeros((1, 17, 64, 48), dtype=np.float32)
    with pytest.raises(UnsupportedBundleError, match="test: expected one output, found a, b"):
        decoder.decode({"a": maps, "b": maps}, [], input_hw=(256, 192))
    with pytest.raises(UnsupportedBundleError, match=r"expected heatmaps \(N, K, h, w\), found an output of shape \[1, 17, 2\]"):
        decoder.decode({"output": maps[..., 0, :2]}, [], input_hw=(256, 192))


def test_a_bundle_passes_parity_and_runs(tmp_path: Path) -> None:
    (conversion,) = convert(tiny_checkpoint(tmp_path), [load_config("onnxruntime")], ConvertOptions(out=tmp_path / "crates"))
    assert conversion.error is None, conversion.error
    assert conversion.parity is not None
    assert conversion.parity.passed
    assert [figure.name for figure in conversion.parity.outputs] == ["output"]
    _, image, box = procedural_scenes(1)[0]
    boxes = [box, [10, 20, 200, 300], [300, 100, 500, 470]]
    for geometry in ("exact", "sdk"):
        with PoseDetector(conversion.place, geometry=geometry) as estimator:
            together = estimator(image, boxes)
            assert together.shape == (3, 17, 3)
            assert np.isfinite(together).all()
            for i, one in enumerate(boxes):
                np.testing.assert_allclose(estimator(image, one)[0], together[i], atol=2e-3)
