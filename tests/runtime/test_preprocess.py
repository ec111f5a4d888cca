"""Every transform against a plain re-statement of `mmdeploy-sdk-spec.md` section 2, and every image that a caller may hand over."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcrate_bundle.errors import InputError, UnsupportedBundleError
from modelcrate_bundle.schema import Pipeline, read_pipeline
from modelcrate_runtime.preprocess import ImageMeta, Preprocessor, check_image

LOAD = {"type": "LoadImageFromFile"}
FORMAT = {"type": "DefaultFormatBundle"}
CROP = [{"type": "TopDownGetBboxCenterScale", "image_size": [192, 256]}, {"type": "TopDownAffine", "image_size": [192, 256]}]
INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA, "lanczos": cv2.INTER_LANCZOS4}
BORDER = {"constant": cv2.BORDER_CONSTANT, "edge": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101, "symmetric": cv2.BORDER_REFLECT}


def pipeline_of(*transforms: dict[str, Any]) -> Pipeline:
    """A detector's pipeline with these transforms."""
    tasks = [
        {"type": "Task", "module": "Transform", "input": "img", "output": "prep", "transforms": list(transforms)},
        {"type": "Task", "module": "Net", "name": "net", "input": "prep", "output": "infer", "input_map": {"img": "input"}},
        {"type": "Task", "module": "mmdet", "component": "ResizeBBox", "params": {}, "input": ["prep", "infer"], "output": "post"},
    ]
    return read_pipeline({"pipeline": {"input": "img", "output": "post", "tasks": tasks}})


def compiled(*transforms: dict[str, Any], geometry: str = "sdk") -> Preprocessor:
    return Preprocessor(pipeline_of(*transforms), geometry=geometry, where="bundle")


def run(image: np.ndarray, *transforms: dict[str, Any], geometry: str = "sdk") -> tuple[np.ndarray, ImageMeta]:
    """The result as (h, w, C) pixels: without Normalize the network gets the levels themselves."""
    tensor, meta = compiled(LOAD, *transforms, FORMAT, geometry=geometry).image(image)
    assert tensor.dtype == np.float32
    assert tensor.shape[0] == 1
    return tensor[0].transpose(1, 2, 0), meta


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------- Resize


def resized_wh(width: int, height: int, size: int | list[int], *, keep_ratio: bool, single: bool) -> tuple[int, int]:
    """Spec 2.2, in plain Python; `single` is the SDK's float32 ratio."""
    target_w, target_h = (size, size) if isinstance(size, int) else size
    if target_h == -1:
        short = target_w
        target_w, target_h = (short, short * height // width) if width < height else (short * width // height, short)
    if not keep_ratio:
        return target_w, target_h
    ratio = min(max(target_w, target_h) / max(height, width), min(target_w, target_h) / min(height, width))
    if not single:
        return int(width * ratio + 0.5), int(height * ratio + 0.5)
    ratio32 = np.float32(ratio)
    return tuple(math.trunc(float(np.float32(side) * ratio32) + 0.5) for side in (width, height))  # type: ignore[return-value]


@pytest.mark.parametrize("geometry", ["exact", "sdk"])
@pytest.mark.parametrize("size", [64, [96, 64], [64, 96], [48, -1]])
@pytest.mark.parametrize("keep_ratio", [False, True])
@pytest.mark.parametrize("hw", [(50, 120), (120, 50), (77, 77), (30, 20), (96, 64), (64, 96)])
def test_resize(hw: tuple[int, int], keep_ratio: bool, size: int | list[int], geometry: str) -> None:
    image = noise(*hw)
    height, width = hw
    expected_wh = resized_wh(width, height, size, keep_ratio=keep_ratio, single=geometry == "sdk")
    pixels, meta = run(image, {"type": "Resize", "size": size, "keep_ratio": keep_ratio}, geometry=geometry)
    np.testing.assert_array_equal(pixels, cv2.resize(image, expected_wh, interpolation=cv2.INTER_LINEAR))
    assert meta.image_hw == hw
    assert meta.resized_hw == expected_wh[::-1]
    scale_x, scale_y = expected_wh[0] / width, expected_wh[1] / height
    np.testing.assert_allclose(meta.scale_xyxy, (scale_x, scale_y, scale_x, scale_y), rtol=1e-12)


def test_resize_stretches_where_keep_ratio_is_not_given() -> None:
    pixels, _ = run(noise(50, 100), {"type": "Resize", "size": [64, 64]})
    assert pixels.shape == (64, 64, 3)


def test_resize_ratio_is_float32_in_sdk_and_double_in_exact_geometry() -> None:
    """575 * 320 / 2944 is 62.5: the float32 ratio falls below the half, the double one does not."""
    image = noise(575, 2944)
    rows = {}
    for geometry in ("exact", "sdk"):
        pixels, meta = run(image, {"type": "Resize", "size": [320, 320], "keep_ratio": True}, geometry=geometry)
        assert pixels.shape[:2] == meta.resized_hw == resized_wh(2944, 575, [320, 320], keep_ratio=True, single=geometry == "sdk")[::-1]
        assert meta.resized_hw[1] == 320
        rows[geometry] = meta.resized_hw[0]
    assert sorted(rows.values()) == [62, 63]


@pytest.mark.parametrize("name", INTERPOLATION)
def test_resize_interpolation(name: str) -> None:
    image = noise(90, 70)
    pixels, _ = run(image, {"type": "Resize", "size": [40, 60], "interpolation": name})
    np.testing.assert_array_equal(pixels, cv2.resize(image, (40, 60), interpolation=INTERPOLATION[name]))


def test_resize_to_its_own_size_changes_nothing() -> None:
    image = noise(60, 40)
    for name in INTERPOLATION:
        np.testing.assert_array_equal(run(image, {"type": "Resize", "size": [40, 60], "interpolation": name})[0], image)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_letterbox_of_any_image_fills_the_input(width: int, height: int) -> None:
    image = np.full((height, width, 3), 200, dtype=np.uint8)
    transforms = ({"type": "Resize", "size": [64, 64], "keep_ratio": True}, {"type": "Pad", "size": [64, 64], "pad_val": 114})
    for geometry in ("exact", "sdk"):
        pixels, meta = run(image, *transforms, geometry=geometry)
        new_h, new_w = meta.resized_hw
        assert pixels.shape == (64, 64, 3)
        assert max(new_h, new_w) == 64
        assert min(new_h, new_w) >= 1
        expected = np.full((64, 64, 3), 114)
        expected[:new_h, :new_w] = 200
        np.testing.assert_array_equal(pixels, expected)


# ------------------------------------------------------------------------------------------------------------------------- Pad


@pytest.mark.parametrize(
    ("pad", "hw", "padded_hw"),
    [
        ({"size": [80, 60]}, (50, 70), (60, 80)),  # width, height
        ({"size": 90}, (50, 70), (90, 90)),
        ({"size": [80, 60], "orientation_agnostic": True}, (70, 50), (80, 60)),
        ({"size": [60, 80], "orientation_agnostic": True}, (50, 70), (60, 80)),
        ({"size_divisor": 32}, (50, 70), (64, 96)),
        ({"size_divisor": 32}, (64, 96), (64, 96)),
        ({"size_divisor": 1}, (50, 70), (50, 70)),
        ({"pad_to_square": True}, (50, 70), (70, 70)),
        ({"pad_to_square": True, "size": [200, 200], "size_divisor": 32}, (70, 50), (70, 70)),  # the square wins
        ({"size": [80, 60], "size_divisor": 32, "logical_or_val": 127}, (50, 70), (60, 80)),  # then the size
        ({"size_divisor": 32, "logical_or_val": 127}, (50, 70), (64, 96)),  # then the divisor
        ({}, (50, 70), (50, 70)),
    ],
)
def test_pad_adds_to_the_right_and_the_bottom(pad: dict[str, Any], hw: tuple[int, int], padded_hw: tuple[int, int]) -> None:
    image = noise(*hw)
    pixels, meta = run(image, {"type": "Pad", "pad_val": 9} | pad)
    expected = np.full((*padded_hw, 3), 9)
    expected[: hw[0], : hw[1]] = image
    np.testing.assert_array_equal(pixels, expected)
    assert meta.resized_hw == hw  # a Pad never touches what unscaling needs
    assert meta.scale_xyxy == (1, 1, 1, 1)
    assert meta.pad_left_top == (0, 0)


@pytest.mark.parametrize(
    ("value", "level"), [(114, 114), (7.0, 7), ({"img": [114, 3, 5]}, 114), ({"img": 20}, 20), ([30, 1, 2], 30), ({"seg": 255}, 0), ({"img": []}, 0)]
)
def test_pad_value_is_the_first_channels(value: object, level: int) -> None:
    pixels, _ = run(noise(10, 10), {"type": "Pad", "size": [16, 16], "pad_val": value})
    assert (pixels[10:] == level).all()
    assert (pixels[:, 10:] == level).all()


@pytest.mark.parametrize("mode", BORDER)
def test_pad_modes(mode: str) -> None:
    image = noise(20, 30)
    pixels, _ = run(image, {"type": "Pad", "size": [40, 36], "padding_mode": mode, "pad_val": 3})
    np.testing.assert_array_equal(pixels, cv2.copyMakeBorder(image, 0, 16, 0, 10, BORDER[mode], value=(3, 3, 3)))


@pytest.mark.parametrize(("hw", "add"), [((50, 70), 0), ((51, 71), 0), ((127, 128), 0), ((50, 71), 5)])
def test_logical_or_pads_around(hw: tuple[int, int], add: int) -> None:
    image = noise(*hw)
    pixels, meta = run(image, {"type": "Pad", "logical_or_val": 127, "add_pix_val": add, "pad_val": 5})
    height, width = hw
    padded_h, padded_w = (height | 127) + add, (width | 127) + add
    top, left = padded_h // 2 - height // 2, padded_w // 2 - width // 2
    expected = np.full((padded_h, padded_w, 3), 5)
    expected[top : top + height, left : left + width] = image
    np.testing.assert_array_equal(pixels, expected)
    assert meta.border_xy == (left, top)


def test_pad_that_is_too_small_is_refused_with_both_sizes() -> None:
    with pytest.raises(InputError, match="expected at most 64x48 pixels before padding, found 70x50"):
        run(noise(50, 70), {"type": "Pad", "size": [64, 48]})


def test_pad_after_normalize_is_in_normalised_units() -> None:
    image = noise(50, 70)
    tensor, _ = compiled(
        LOAD, {"type": "Normalize", "mean": [10, 20, 30], "std": [2, 3, 4], "to_rgb": False}, {"type": "Pad", "size_divisor": 32, "pad_val": 0.5}, FORMAT
    ).image(image)
    assert tensor.shape == (1, 3, 64, 96)
    assert (tensor[0, :, 50:] == 0.5).all()
    assert (tensor[0, :, :, 70:] == 0.5).all()
    np.testing.assert_allclose(tensor[0, :, :50, :70].transpose(1, 2, 0), (image - np.array([10.0, 20, 30])) / [2, 3, 4], rtol=1e-6)


@pytest.mark.parametrize(
    "pad", [{"size_divisor": 32, "padding_mode": "edge"}, {"size_divisor": 32, "padding_mode": "reflect"}, {"logical_or_val": 127, "pad_val": 0.5}]
)
def test_pad_after_normalize_is_right_or_refused(pad: dict[str, Any]) -> None:
    """A Pad is the same Pad wherever it stands; what cannot be run is refused, not left out."""
    image = noise(50, 70)
    normalize = {"type": "Normalize", "mean": [0, 0, 0], "std": [1, 1, 1], "to_rgb": False}
    try:
        preprocessor = compiled(LOAD, normalize, {"type": "Pad"} | pad, FORMAT)
    except UnsupportedBundleError:
        return
    tensor, meta = preprocessor.image(image)
    before, before_meta = compiled(LOAD, {"type": "Pad"} | pad | {"pad_val": 0}, normalize, FORMAT).image(image)
    assert tensor.shape == before.shape
    assert meta.border_xy == before_meta.border_xy
    inside = before != 0
    np.testing.assert_allclose(tensor[inside], before[inside], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- LetterResize


def rha(value: float) -> int:
    """Half away from zero."""
    return math.floor(abs(value) + 0.5) * (1 if value >= 0 else -1)


@pytest.mark.parametrize(
    "options", [{}, {"allow_scale_up": False}, {"use_mini_pad": True}, {"stretch_only": True}, {"pad_val": {"img": 114}}, {"pad_val": 114}]
)
@pytest.mark.parametrize("hw", [(50, 120), (120, 50), (40, 60), (300, 200), (96, 160)])
def test_letter_resize(hw: tuple[int, int], options: dict[str, Any]) -> None:
    image = noise(*hw)
    height, width = hw
    target_h, target_w = 96, 160  # scale is height, width
    ratio = np.float32(min(target_h / height, target_w / width))
    if options.get("allow_scale_up") is False:
        ratio = min(ratio, np.float32(1))
    new_h, new_w = rha(float(np.float32(height) * ratio)), rha(float(np.float32(width) * ratio))
    pad_h, pad_w = target_h - new_h, target_w - new_w
    scale = (float(ratio), float(ratio))
    if options.get("use_mini_pad"):
        pad_h, pad_w = pad_h % 32, pad_w % 32
    elif options.get("stretch_only"):
        new_h, new_w, pad_h, pad_w = target_h, target_w, 0, 0
        scale = (target_w / width, target_h / height)
    level = 114 if "pad_val" in options else 0
    top, left = pad_h // 2, pad_w // 2
    expected = np.full((new_h + pad_h, new_w + pad_w, 3), level)
    expected[top : top + new_h, left : left + new_w] = cv2.resize(image, (new_w, new_h))
    pixels, meta = run(image, {"type": "LetterResize", "scale": [target_h, target_w]} | options)
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_allclose(meta.scale_xyxy, scale * 2, rtol=1e-6)
    assert meta.pad_left_top == (left, top)
    assert meta.resized_hw == (new_h + pad_h, new_w + pad_w)


def test_letter_resize_multiplies_into_the_scale_before_it() -> None:
    _, meta = run(noise(100, 200), {"type": "Resize", "size": [100, 50]}, {"type": "LetterResize", "scale": [100, 200]})
    np.testing.assert_allclose(meta.scale_xyxy, (1, 1, 1, 1), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- Normalize

MEAN, STD = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]


@pytest.mark.parametrize("to_rgb", [False, True, None], ids=["bgr", "rgb", "default"])
def test_normalize_has_the_bits_of_the_sdk(to_rgb: bool | None) -> None:
    """(x - mean) * (1 / std) in float32; mean and std are of the output channels; to_rgb defaults to true."""
    image = noise(40, 50)
    image[0, :, :] = np.arange(50)[:, None] * 5
    transform = {"type": "Normalize", "mean": MEAN, "std": STD} | ({} if to_rgb is None else {"to_rgb": to_rgb})
    pixels, _ = run(image, transform)
    source = image if to_rgb is False else image[:, :, ::-1]
    expected = (source.astype(np.float32) - np.array(MEAN, dtype=np.float32)) * (np.float32(1) / np.array(STD, dtype=np.float32))
    np.testing.assert_array_equal(pixels, expected)


def test_every_level_of_every_channel_is_normalised() -> None:
    image = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=2)
    pixels, _ = run(image, {"type": "Normalize", "mean": MEAN, "std": STD, "to_rgb": False})
    np.testing.assert_allclose(pixels, (image - np.array(MEAN)) / STD, atol=1e-6)


def test_two_normalizes_are_composed_or_refused() -> None:
    image = noise(8, 8)
    first = {"type": "Normalize", "mean": [10, 10, 10], "std": [2, 2, 2], "to_rgb": False}
    second = {"type": "Normalize", "mean": [1, 1, 1], "std": [4, 4, 4], "to_rgb": False}
    try:
        pixels, _ = run(image, first, second)
    except UnsupportedBundleError:
        return
    np.testing.assert_allclose(pixels, ((image - 10.0) / 2 - 1) / 4, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 0, 1]), ([1, 2, 3, 4], [1, 1, 1, 1])])
def test_normalize_that_cannot_be_run_is_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(UnsupportedBundleError, match="Normalize: expected 3 means and non-zero standard deviations"):
        compiled(LOAD, {"type": "Normalize", "mean": mean, "std": std}, FORMAT)


# ------------------------------------------------------------------------------------------------------- channels and the rest


def test_channel_order_rgb_and_to_rgb_swap_twice() -> None:
    image = noise(20, 30)
    load = {"type": "LoadImageFromFile", "channel_order": "rgb"}
    normalize = {"type": "Normalize", "mean": [0, 0, 0], "std": [1, 1, 1]}
    once = compiled(load, normalize | {"to_rgb": False}, FORMAT).image(image)[0][0].transpose(1, 2, 0)
    twice = compiled(load, normalize | {"to_rgb": True}, FORMAT).image(image)[0][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(once, image[:, :, ::-1])
    np.testing.assert_array_equal(twice, image)


def test_grey_network_gets_one_channel() -> None:
    image = noise(20, 30)
    load = {"type": "LoadImageFromFile", "color_type": "grayscale"}
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    preprocessor = compiled(load, {"type": "Normalize", "mean": [10], "std": [2], "to_rgb": False}, FORMAT)
    for source in (image, grey, grey[:, :, None], np.dstack([image, noise(20, 30, 1)])):
        tensor, _ = preprocessor.image(source)
        assert tensor.shape == (1, 1, 20, 30)
        np.testing.assert_allclose(tensor[0, 0], (grey - 10.0) / 2, atol=1e-5)


def test_grey_network_resizes_and_pads() -> None:
    image = noise(20, 30)
    load = {"type": "LoadImageFromFile", "color_type": "grayscale"}
    tensor, _ = compiled(load, {"type": "Resize", "size": [40, 40], "keep_ratio": True}, {"type": "Pad", "size": [40, 40], "pad_val": 9}, FORMAT).image(image)
    expected = np.full((40, 40), 9)
    expected[:27] = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (40, 27))
    np.testing.assert_array_equal(tensor[0, 0], expected)


@pytest.mark.parametrize(
    ("hw", "crop", "window"),
    [
        ((101, 101), 64, (19, 83, 19, 83)),  # 18.5 goes away from zero
        ((100, 120), [40, 60], (30, 70, 30, 90)),  # height, width
        ((50, 120), [64, 64], (0, 50, 28, 92)),  # smaller than the crop: no padding
        ((64, 64), 64, (0, 64, 0, 64)),
        ((63, 65), 64, (0, 63, 1, 65)),  # 0.5 goes to 1 and the right edge cuts
    ],
)
def test_center_crop(hw: tuple[int, int], crop: int | list[int], window: tuple[int, int, int, int]) -> None:
    image = noise(*hw)
    pixels, _ = run(image, {"type": "CenterCrop", "crop_size": crop})
    top, bottom, left, right = window
    np.testing.assert_array_equal(pixels, image[top:bottom, left:right])


def test_both_ways_of_formatting_give_the_same_tensor() -> None:
    image = noise(20, 30)
    normalize = {"type": "Normalize", "mean": MEAN, "std": STD}
    collect = {"type": "Collect", "keys": ["img"], "meta_keys": []}
    bundled, _ = compiled(LOAD, normalize, FORMAT, collect).image(image)
    as_tensor, _ = compiled(LOAD, normalize, {"type": "ImageToTensor", "keys": ["img"]}, collect).image(image)
    assert bundled.flags.c_contiguous
    np.testing.assert_array_equal(bundled, as_tensor)


@pytest.mark.parametrize("geometry", ["exact", "sdk"])
def test_a_detectors_whole_chain(geometry: str, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    tensor, meta = compiled(
        LOAD,
        {"type": "Resize", "size": [320, 320], "keep_ratio": True},
        {"type": "Pad", "size": [320, 320], "pad_val": {"img": [114, 114, 114]}},
        {"type": "Normalize", "mean": MEAN, "std": STD, "to_rgb": False},
        {"type": "Pad", "size_divisor": 1},
        FORMAT,
        geometry=geometry,
    ).image(image)
    canvas = np.full((320, 320, 3), 114, dtype=np.uint8)
    canvas[:240] = cv2.resize(image, (320, 240))
    np.testing.assert_allclose(tensor[0].transpose(1, 2, 0), (canvas - np.array(MEAN)) / STD, atol=1e-6)
    assert meta.scale_xyxy == (0.5, 0.5, 0.5, 0.5)


# ------------------------------------------------------------------------------------------------------- what is not supported


@pytest.mark.parametrize("name", ["Lift", "ResizeEdge", "YOLOv5KeepRatioResize", "BottomupResize"])
def test_unknown_transform_is_refused_by_name_and_place(name: str) -> None:
    with pytest.raises(UnsupportedBundleError, match=rf"bundle: transforms\[1\]: expected one of .*Resize.*, found {name}$"):
        compiled(LOAD, {"type": name, "size": 3}, FORMAT)


def test_unknown_interpolation_and_padding_mode_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedBundleError, match=r"transforms\[1\]: interpolation: expected one of nearest, bilinear.*, found 'box'"):
        compiled(LOAD, {"type": "Resize", "size": 3, "interpolation": "box"})
    with pytest.raises(UnsupportedBundleError, match=r"transforms\[1\]: padding_mode: expected one of constant.*, found 'wrap'"):
        compiled(LOAD, {"type": "Pad", "size": 3, "padding_mode": "wrap"})


@pytest.mark.parametrize("transform", [{"type": "Resize", "size": 8}, {"type": "LetterResize", "scale": 8}, {"type": "CenterCrop", "crop_size": 8}, CROP[1]])
def test_transforms_of_pixels_after_normalize_are_refused(transform: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedBundleError, match=f"{transform['type']} after Normalize"):
        compiled(LOAD, {"type": "Normalize", "mean": MEAN, "std": STD}, transform)


@pytest.mark.parametrize("extra", [{"type": "Resize", "size": [64, 64]}, {"type": "Pad", "size": [900, 900]}, {"type": "CenterCrop", "crop_size": 20}])
def test_a_transform_that_a_top_down_crop_would_leave_out_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedBundleError, match=extra["type"]):
        compiled(LOAD, extra, *CROP, {"type": "Normalize", "mean": MEAN, "std": STD}, FORMAT)


# -------------------------------------------------------------------------------------------------------------- callers' images


def test_grey_and_alpha_become_the_colour_image_that_they_are() -> None:
    grey = noise(20, 30, 1)
    replicated = np.repeat(grey, 3, axis=2)
    np.testing.assert_array_equal(check_image(grey), replicated)
    np.testing.assert_array_equal(check_image(grey[:, :, 0]), replicated)
    color = noise(20, 30)
    np.testing.assert_array_equal(check_image(np.dstack([color, noise(20, 30, 1)])), color)
    np.testing.assert_array_equal(check_image(color), color)


def test_one_pixel_is_an_image() -> None:
    transforms = ({"type": "Resize", "size": [16, 16], "keep_ratio": True}, {"type": "Pad", "size": [16, 16], "pad_val": 1})
    for image in (np.full((1, 1, 3), 77, dtype=np.uint8), np.full((1, 1), 77, dtype=np.uint8)):
        pixels, _ = run(image, *transforms)
        assert pixels.shape == (16, 16, 3)
        assert (pixels == 77).all()
        tensor, crops = compiled(LOAD, *CROP, FORMAT).crops(image, None)
        assert tensor.shape == (1, 3, 256, 192)
        assert np.isfinite([*crops[0].step_xy, *crops[0].origin_xy]).all()


def test_sixteen_bits_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="expected uint8 pixels, found uint16") as caught:
        check_image(np.zeros((4, 4, 3), dtype=np.uint16))
    assert "image // 256" in caught.value.hint


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int8", "bool"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=f"expected uint8 pixels, found {dtype}"):
        check_image(np.zeros((4, 4, 3), dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0), (4, 4, 0), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3), (4,), ()])
def test_other_shapes_and_empty_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"image: expected shape \(H, W\)"):
        check_image(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("image", [None, [[1, 2], [3, 4]], "image.jpg", b"bytes", 3])
def test_what_is_no_array_is_refused_with_the_way_out(image: object) -> None:
    with pytest.raises(InputError, match=f"expected a numpy array, found {type(image).__name__}") as caught:
        check_image(image)
    assert "cv2.imread" in caught.value.hint


VIEWS = {
    "upside down": lambda image: image[::-1],
    "mirrored": lambda image: image[:, ::-1],
    "channels reversed": lambda image: image[:, :, ::-1],
    "every second pixel": lambda image: image[::2, ::2],
    "a window": lambda image: image[7:-5, 3:-9],
    "transposed": lambda image: image.transpose(1, 0, 2),
    "Fortran order": np.asfortranarray,
    "one channel of three": lambda image: image[:, :, 1],
    "one channel of three, kept": lambda image: image[:, :, 1:2],
    "three channels of four": lambda image: np.dstack([image, image[:, :, :1]])[:, :, :3],
    "four channels reversed": lambda image: np.dstack([image, image[:, :, :1]])[:, :, ::-1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_give_what_their_copies_give(name: str) -> None:
    view = VIEWS[name](noise(90, 70))
    copy = np.array(view, order="C", copy=True)
    before = copy.copy()
    boxes = [[10, 5, 40, 45], [-20, -10, 15, 30]]
    normalize = {"type": "Normalize", "mean": MEAN, "std": STD}
    chains = [
        (LOAD, normalize, FORMAT),
        (LOAD, {"type": "Resize", "size": [50, 50]}, {"type": "Pad", "size": [64, 64]}, normalize, FORMAT),
        (LOAD, {"type": "Pad", "size": [128, 128]}, normalize, FORMAT),
        (LOAD, {"type": "CenterCrop", "crop_size": 16}, normalize, FORMAT),
        ({"type": "LoadImageFromFile", "channel_order": "rgb"}, normalize, FORMAT),
        ({"type": "LoadImageFromFile", "color_type": "grayscale"}, {"type": "Resize", "size": [50, 50]}, FORMAT),
    ]
    for chain in chains:
        np.testing.assert_array_equal(compiled(*chain).image(view)[0], compiled(*chain).image(copy)[0])
    for geometry in ("exact", "sdk"):
        preprocessor = compiled(LOAD, *CROP, normalize, FORMAT, geometry=geometry)
        np.testing.assert_array_equal(preprocessor.crops(view, boxes)[0], preprocessor.crops(copy, boxes)[0])
    np.testing.assert_array_equal(view, before)  # nor is the caller's image changed


def test_read_only_image_is_enough() -> None:
    image = noise(30, 40)
    image.setflags(write=False)
    pixels, _ = run(image, {"type": "Resize", "size": [20, 20]})
    np.testing.assert_array_equal(pixels, cv2.resize(noise(30, 40), (20, 20)))


# ------------------------------------------------------------------------------------------------------------------------ crops


def test_normalised_crop_is_upstreams(shared: Path) -> None:
    upstream = np.load(shared / "fixtures/checkpoints/rtmpose_t_random.npz")
    image = cv2.imread(str(shared / "fixtures/images/000000000785.jpg"))
    normalize = {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
    tensor, crops = compiled(LOAD, *CROP, normalize, FORMAT, geometry="exact").crops(image, upstream["bbox"])
    np.testing.assert_allclose(tensor, upstream["crop_normalised"], atol=1e-6)
    assert len(crops) == 1


def test_crops_of_several_boxes_are_those_of_each() -> None:
    image = noise(200, 300)
    boxes = [[10, 20, 60, 120], [-30, -40, 100, 90], [150, 50, 290, 190], [400, 400, 500, 500]]
    for geometry in ("exact", "sdk"):
        preprocessor = compiled(LOAD, *CROP, {"type": "Normalize", "mean": MEAN, "std": STD}, FORMAT, geometry=geometry)
        tensor, crops = preprocessor.crops(image, boxes)
        assert tensor.shape == (4, 3, 256, 192)
        for row, crop, box in zip(tensor, crops, boxes, strict=True):
            single, (single_crop,) = preprocessor.crops(image, box)
            np.testing.assert_array_equal(row, single[0])
            assert crop == single_crop


def test_padding_and_udp_come_from_the_bundle() -> None:
    image = noise(200, 300)
    box = [100, 50, 148, 114]
    _, (tight,) = compiled(LOAD, {"type": "TopDownGetBboxCenterScale", "image_size": [192, 256], "padding": 1.0}, CROP[1], FORMAT, geometry="exact").crops(
        image, box
    )
    _, (usual,) = compiled(LOAD, *CROP, FORMAT, geometry="exact").crops(image, box)
    _, (udp,) = compiled(LOAD, CROP[0], CROP[1] | {"use_udp": True}, FORMAT, geometry="exact").crops(image, box)
    np.testing.assert_allclose(tight.step_xy, (48 / 192, 64 / 256), rtol=1e-6)
    np.testing.assert_allclose(usual.step_xy, (60 / 192, 80 / 256), rtol=1e-6)
    np.testing.assert_allclose(udp.step_xy, (60 / 191, 80 / 255), rtol=1e-6)


def test_sdk_geometry_ignores_udp_as_the_sdk_does() -> None:
    image, box = noise(200, 300), [100, 50, 147, 113]
    plain, plain_crops = compiled(LOAD, *CROP, FORMAT).crops(image, box)
    udp, udp_crops = compiled(LOAD, CROP[0], CROP[1] | {"use_udp": True}, FORMAT).crops(image, box)
    np.testing.assert_array_equal(plain, udp)
    assert plain_crops == udp_crops


def test_no_boxes_give_no_crops() -> None:
    tensor, crops = compiled(LOAD, *CROP, FORMAT).crops(noise(20, 30), [])
    assert tensor.shape == (0, 3, 256, 192)
    assert crops == []


def test_top_down_is_known_before_the_first_image() -> None:
    assert compiled(LOAD, *CROP, FORMAT).is_top_down
    assert compiled(LOAD, CROP[1], FORMAT).is_top_down  # the SDK computes centre and scale itself where they are missing
    assert not compiled(LOAD, {"type": "Resize", "size": 8}, FORMAT).is_top_down
