"""Crops and their maps back: the inverse, the bits, and what callers may pass as boxes."""

import hashlib
import platform
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcrate_bundle.errors import InputError
from modelcrate_runtime import geometry
from modelcrate_runtime.geometry import Crop, StraightWarps, as_boxes, crop_exact, crop_sdk, to_image, warp_affine

SIZE_WH = (192, 256)
IMAGE_W, IMAGE_H = 63, 50
LEVELS_PER_PIXEL = 4
EXACT_ATOL = 0.5 / LEVELS_PER_PIXEL + 1 / 64 + 0.005
"""Rounding to a level, OpenCV 4's positions in steps of 1/32 pixel, and what adding them up loses."""
SDK_ATOL = 1.0 / LEVELS_PER_PIXEL + 0.005
"""`cv2.resize` on bytes truncates between its two passes: it is off by up to a level."""

corner = st.floats(-40, 80, width=32)
side = st.floats(0.5, 80, width=32)


def position_image() -> np.ndarray:
    """Channel 0 holds the pixel's x, channel 1 its y, in quarters; channel 2 says that there is an image at all."""
    image = np.full((IMAGE_H, IMAGE_W, 3), 255, dtype=np.uint8)
    image[..., 0] = np.arange(IMAGE_W)[None, :] * LEVELS_PER_PIXEL
    image[..., 1] = np.arange(IMAGE_H)[:, None] * LEVELS_PER_PIXEL
    return image


def mapped_grid(crop: Crop, size_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Image x (h, w) and y (h, w) of every network pixel, by the public inverse."""
    width, height = size_wh
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    points = to_image(np.stack([x.ravel(), y.ravel()], axis=1)[None], [crop])[0]
    return points[:, 0].reshape(height, width), points[:, 1].reshape(height, width)


# ------------------------------------------------------------------------------------------------------------ the map back


@pytest.mark.parametrize("use_udp", [False, True], ids=["plain", "udp"])
@given(left=corner, top=corner, width=side, height=side, padding=st.sampled_from([1.0, 1.25, 1.5]))
@settings(max_examples=40, deadline=None)
def test_exact_crop_was_sampled_where_the_map_says(use_udp: bool, left: float, top: float, width: float, height: float, padding: float) -> None:
    box = np.array([left, top, left + width, top + height], dtype=np.float32)
    patch, crop = crop_exact(position_image(), box, size_wh=SIZE_WH, padding=padding, use_udp=use_udp)
    x, y = mapped_grid(crop, SIZE_WH)
    inside = (x > 0.1) & (x < IMAGE_W - 1.1) & (y > 0.1) & (y < IMAGE_H - 1.1)
    outside = (x < -1.1) | (x > IMAGE_W + 0.1) | (y < -1.1) | (y > IMAGE_H + 0.1)
    np.testing.assert_allclose(patch[..., 0][inside] / LEVELS_PER_PIXEL, x[inside], atol=EXACT_ATOL)
    np.testing.assert_allclose(patch[..., 1][inside] / LEVELS_PER_PIXEL, y[inside], atol=EXACT_ATOL)
    assert (patch[inside][:, 2] == 255).all()
    assert not patch[outside].any()


@given(left=corner, top=corner, width=side, height=side)
@settings(max_examples=60, deadline=None)
def test_sdk_crop_was_sampled_where_the_map_says_even_when_clipped(left: float, top: float, width: float, height: float) -> None:
    box = np.array([left, top, left + width, top + height], dtype=np.float32)
    patch, crop = crop_sdk(position_image(), box, size_wh=SIZE_WH, padding=1.25)
    filled = patch[..., 2] == 255
    assert not patch[~filled].any()
    if not filled.any():
        return
    for channel, mapped in enumerate(mapped_grid(crop, SIZE_WH)):
        sampled = patch[..., channel][filled] / LEVELS_PER_PIXEL
        # Resizing repeats the outermost pixels of the rectangle: the map goes on there, the levels do not.
        np.testing.assert_allclose(sampled, np.clip(mapped[filled], sampled.min(), sampled.max()), atol=SDK_ATOL)


@pytest.mark.parametrize("box", [[15, 10, 38.7, 41.7], [-9.2, 5, 20, 32.5], [30, 22, 70, 60], [-10, -10, 75, 62]])
def test_neither_geometry_is_biased(box: list[float]) -> None:
    """One sample hides a fraction of a pixel in its rounding; the mean over a crop does not."""
    array = np.array(box, dtype=np.float32)
    for patch, crop in (
        crop_exact(position_image(), array, size_wh=SIZE_WH, padding=1.25, use_udp=False),
        crop_exact(position_image(), array, size_wh=SIZE_WH, padding=1.25, use_udp=True),
        crop_sdk(position_image(), array, size_wh=SIZE_WH, padding=1.25),
    ):
        x, y = mapped_grid(crop, SIZE_WH)
        inside = (x > 1) & (x < IMAGE_W - 2) & (y > 1) & (y < IMAGE_H - 2) & (patch[..., 2] == 255)
        assert inside.sum() > 3000
        for channel, mapped in enumerate((x, y)):
            assert abs((patch[..., channel][inside] / LEVELS_PER_PIXEL - mapped[inside]).mean()) < 0.07


def test_udp_differs_from_plain_by_the_unit_of_length() -> None:
    """Without UDP a crop is W pixels long, with UDP W - 1; both begin at the padded box's left top corner."""
    box = np.array([50, 30, 146, 158], dtype=np.float32)
    _, plain = crop_exact(position_image(), box, size_wh=SIZE_WH, padding=1.25, use_udp=False)
    _, udp = crop_exact(position_image(), box, size_wh=SIZE_WH, padding=1.25, use_udp=True)
    np.testing.assert_allclose(plain.origin_xy, (98 - 60, 94 - 80), atol=1e-4)
    np.testing.assert_allclose(udp.origin_xy, plain.origin_xy, atol=1e-6)
    np.testing.assert_allclose(plain.step_xy, (120 / 192, 160 / 256), atol=1e-7)
    np.testing.assert_allclose(udp.step_xy, (120 / 191, 160 / 255), atol=1e-7)


@given(left=corner, top=corner, width=side, height=side, padding=st.sampled_from([1.0, 1.2, 1.25, 1.5]))
@settings(max_examples=200, deadline=None)
def test_exact_crop_is_computed_in_float32_as_mmpose_does(left: float, top: float, width: float, height: float, padding: float) -> None:
    """MMPose's bbox_xyxy2cs and _fix_aspect_ratio, on float32 arrays; equal to the bit."""
    box = np.array([left, top, left + width, top + height], dtype=np.float32)
    center = (box[:2] + box[2:]) * np.float32(0.5)
    w, h = np.maximum(box[2:] - box[:2], np.float32(1)) * np.float32(padding)
    aspect = np.float32(SIZE_WH[0] / SIZE_WH[1])
    w, h = (w, w / aspect) if w > h * aspect else (h * aspect, h)
    assert w.dtype == h.dtype == np.float32
    _, crop = crop_exact(position_image(), box, size_wh=SIZE_WH, padding=padding, use_udp=False)
    assert crop.step_xy == (float(w) / SIZE_WH[0], float(h) / SIZE_WH[1])
    assert crop.origin_xy == (float(center[0]) - 0.5 * float(w), float(center[1]) - 0.5 * float(h))


def test_to_image_uses_each_crop_for_its_own_points() -> None:
    crops = [Crop(step_xy=(2.0, 3.0), origin_xy=(10.0, -20.0)), Crop(step_xy=(0.5, 0.25), origin_xy=(0.0, 1.0))]
    points = np.array([[[0, 0], [1, 1]], [[0, 0], [4, 8]]], dtype=np.float32)
    mapped = to_image(points, crops)
    assert mapped.dtype == np.float32
    np.testing.assert_array_equal(mapped, [[[10, -20], [12, -17]], [[0, 1], [2, 3]]])


@pytest.mark.parametrize("box", [[1e4, 1e4, 1e4 + 50, 1e4 + 80], [-900, 10, -700, 90], [63.0, 0, 63.0, 50], [30, 30, 30, 30]])
@pytest.mark.parametrize("name", ["exact", "udp", "sdk"])
def test_box_outside_or_without_area_gives_a_finite_map(box: list[float], name: str) -> None:
    array = np.array(box, dtype=np.float32)
    if name == "sdk":
        patch, crop = crop_sdk(position_image(), array, size_wh=SIZE_WH, padding=1.25)
    else:
        patch, crop = crop_exact(position_image(), array, size_wh=SIZE_WH, padding=1.25, use_udp=name == "udp")
    assert patch.shape == (256, 192, 3)
    assert np.isfinite([*crop.step_xy, *crop.origin_xy]).all()
    assert min(crop.step_xy) > 0
    center = to_image(np.array([[[96, 128]]], dtype=np.float32), [crop])[0, 0]
    np.testing.assert_allclose(center, [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], atol=2.0)


# ------------------------------------------------------------------------------------------------------------- OpenCV 4's warp

# SHA-256 of cv2.warpAffine(image, matrix, (96, 128), flags=cv2.INTER_LINEAR).tobytes(), made with opencv-python 4.10.0 and numpy 1.26.4
# for image = numpy.random.default_rng(20240607).integers(0, 256, (120, 160, 3), dtype=numpy.uint8) and the float64 matrix.
OPENCV_4 = {
    "identity": ([[1, 0, 0], [0, 1, 0]], "7674ff8ac8f92dd17c103ee6804f27d588176b43fefddba3b790f3a57c1874ad"),
    "integer shift": ([[1, 0, 7], [0, 1, -5]], "47c64661df85c81dfbd29b51b927f879811c2ebd8af561ec748bb3da67a776a4"),
    "fractional shift": ([[1, 0, 0.3], [0, 1, -0.71]], "130b84efff75be2d7c223dfb597b1af08832b4ad3c223d1c4d81d2c2dfc809ff"),
    "enlarged": ([[2.37, 0, -40.2], [0, 1.91, -33.7]], "2055e42d41990492c958a7a76ea853bf3233c22ceb2c89c4f13d2861b174fab9"),
    "reduced": ([[0.41, 0, 3.3], [0, 0.57, 5.9]], "87a9c62eea8bf2e1c95eec81b39fa0bf1736195f0d5574e9f6dea82af7cd01b8"),
    "mirrored": ([[-1.3, 0, 120.7], [0, 1.3, -4.1]], "3b34b06f430790a51da7566312892a50a86128d1c3fe271a671768457b480801"),
    "rotated": (
        [[1.0530990742684472, -0.5753106463250436, 40.5], [0.5753106463250436, 1.0530990742684472, -30.25]],
        "d57310ace940d6d97a12bdfaa7c951c859d0a4bf3937c64f79bb4f8062042dfc",
    ),
    "sheared": ([[1, 0.25, -8.5], [0, 1, 3.125]], "ed60c624883ef6b01ee6819f7f4c52c1ac6db34625551a26a3a79a8e816f8e58"),
    "far outside": ([[1, 0, 5000.5], [0, 1, -7000.25]], "1c0273095382988333e2f2b5ae487cea460737ed9be65cbad9c5de537f95bf75"),
    "very far outside": ([[0.001, 0, 100000.0], [0, 0.001, -100000.0]], "1c0273095382988333e2f2b5ae487cea460737ed9be65cbad9c5de537f95bf75"),
    "much enlarged": ([[300.5, 0, -20000.0], [0, 300.5, -15000.0]], "d228e64b29fe5666e2ffac8dbf64096e5616325f2f8136c0bcec22672c241c35"),
    "degenerate": ([[0, 0, 10], [0, 0, 20]], "92b401a2947867f652c8ea49e52a4f15bf6834769da40430dd5662a32a8dc631"),
    "one axis lost": ([[1.5, 0, 2], [0, 0, 3]], "92b401a2947867f652c8ea49e52a4f15bf6834769da40430dd5662a32a8dc631"),
}


@pytest.fixture(params=["its own", "computed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How straight warps are done: by OpenCV's own, where that is OpenCV 4's, and as on OpenCV 5."""
    if request.param == "computed":
        monkeypatch.setattr(geometry, "_has_opencv_4s_warp", lambda: False)
    return request.param


def test_opencv_4_is_asked_itself_and_opencv_5_is_not() -> None:
    """It is found out by trying: a build for another processor may have other bits."""
    warps = StraightWarps.of([(1.1, 2.2, 1.1, 3.3)], size_wh=SIZE_WH)
    is_asked = warps.matrices is not None
    if platform.machine() == "x86_64":
        assert is_asked == cv2.__version__.startswith("4.")
    assert not (is_asked and cv2.__version__.startswith("5."))


@pytest.mark.parametrize("sides", [(0.9, 1.1), (0.2, 0.3), (1.7, 1.7), (4.1, 3.9)])
def test_both_ways_give_the_same_bits(sides: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    warps = [(sides[0] * rng.uniform(0.9, 1.1), rng.uniform(-80, 300), sides[1], rng.uniform(-80, 200)) for _ in range(12)]
    asked = StraightWarps.of(warps, size_wh=SIZE_WH)
    monkeypatch.setattr(geometry, "_has_opencv_4s_warp", lambda: False)
    computed = StraightWarps.of(warps, size_wh=SIZE_WH)
    assert computed.positions is not None
    for i in range(len(warps)):
        np.testing.assert_array_equal(asked.apply(image, i), computed.apply(image, i))


@pytest.mark.parametrize("far", [40_000.0, 1e6, -1e8, 9.9e8])
def test_a_crop_far_from_the_image_is_black(far: float) -> None:
    """There OpenCV's own positions leave int32 and may come back into the image."""
    box = np.array([far, far, far + 500, far + 700], dtype=np.float32)
    patch, _ = crop_exact(noise(300, 400), box, size_wh=SIZE_WH, padding=1.25, use_udp=False)
    assert not patch.any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", OPENCV_4)
def test_warp_has_the_bits_of_opencv_4(name: str) -> None:
    matrix, digest = OPENCV_4[name]
    image = np.random.default_rng(20240607).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    warped = warp_affine(image, np.array(matrix, dtype=np.float64), size_wh=(96, 128))
    assert (warped.shape, warped.dtype) == ((128, 96, 3), np.uint8)
    assert hashlib.sha256(np.ascontiguousarray(warped).tobytes()).hexdigest() == digest


@pytest.mark.usefixtures("way")
def test_warp_keeps_one_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    matrix = np.array([[1.3, 0, -4.0], [0, 1.3, 2.5]])
    warped = warp_affine(np.ascontiguousarray(image[:, :, 1:2]), matrix, size_wh=(30, 20))
    assert warped.shape == (20, 30, 1)
    np.testing.assert_array_equal(warped[..., 0], warp_affine(image, matrix, size_wh=(30, 20))[..., 1])


@pytest.mark.usefixtures("way")
def test_exact_crop_is_upstreams_crop_bit_for_bit(shared: Path) -> None:
    upstream = np.load(shared / "fixtures/checkpoints/rtmpose_t_random.npz")
    image = cv2.imread(str(shared / "fixtures/images/000000000785.jpg"))
    patch, crop = crop_exact(image, upstream["bbox"][0], size_wh=SIZE_WH, padding=1.25, use_udp=False)
    np.testing.assert_array_equal(patch.transpose(2, 0, 1), upstream["crop_uint8"])
    np.testing.assert_allclose(np.multiply(crop.step_xy, SIZE_WH), upstream["input_scale"], atol=1e-4)
    np.testing.assert_allclose(np.add(crop.origin_xy, np.multiply(crop.step_xy, (96, 128))), upstream["input_center"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the SDK's integer crop


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


SDK_BY_HAND = {
    # 96x128 with the extra pixel, padded to 120x160 around (148, 114): all inside, times 1.6.
    "inside": ((300, 400), [100, 50, 195, 177], (88, 34, 120, 160), (0, 0, 192, 256)),
    # 48x64 -> 60x80 around (24, 132): six columns are left of the image; times 3.2: 19.2 and 172.8.
    "left of the image": ((300, 400), [0, 100, 47, 163], (0, 92, 54, 80), (19, 0, 173, 256)),
    # 75x100 -> 93.75x125 around (46.375, 150): it begins at -0.5 and 87.5, and halves go away from zero; times 2.048: 2.048 and 190.464.
    "half a pixel": ((300, 400), [8.875, 100, 82.875, 199], (0, 88, 93, 125), (2, 0, 190, 256)),
    # 96x40 grows to 96x128; 120x160 around (148, 70) sticks out ten rows at the top: 16 and 240.
    "wide box at the top": ((300, 400), [100, 50, 195, 89], (88, 0, 120, 150), (0, 16, 192, 240)),
    # 20x64 grows to 48x64; 60x80 around (390, 280) is cut at the right (40 columns: 128) and at the bottom (60 rows: 192).
    "tall box in the corner": ((300, 400), [380, 248, 399, 311], (360, 240, 40, 60), (0, 0, 128, 192)),
    # No box is no extra pixel: 192x256 -> 240x320 around the middle; times 0.8: 19.2, 25.6, 153.6, 204.8.
    "whole image": ((256, 192), None, (0, 0, 192, 256), (19, 26, 154, 205)),
}


@pytest.mark.parametrize("name", SDK_BY_HAND)
def test_sdk_crop_by_hand(name: str) -> None:
    (height, width), box, (sx, sy, sw, sh), (tx, ty, tw, th) = SDK_BY_HAND[name]
    image = noise(height, width)
    patch, crop = crop_sdk(image, None if box is None else np.array(box, dtype=np.float32), size_wh=SIZE_WH, padding=1.25)
    expected = np.zeros((256, 192, 3), dtype=np.uint8)
    expected[ty : ty + th, tx : tx + tw] = cv2.resize(image[sy : sy + sh, sx : sx + sw], (tw, th), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(patch, expected)
    # Spec 2.9: network pixel i lies at (i - dst.x + 0.5) / fx - 0.5 + src.x.
    np.testing.assert_allclose(crop.step_xy, (sw / tw, sh / th), rtol=1e-6)
    np.testing.assert_allclose(crop.origin_xy, ((0.5 - tx) * sw / tw - 0.5 + sx, (0.5 - ty) * sh / th - 0.5 + sy), atol=2e-4)


def test_sdk_crop_outside_the_image_is_black() -> None:
    patch, _ = crop_sdk(noise(300, 400), np.array([500, 400, 600, 500], dtype=np.float32), size_wh=SIZE_WH, padding=1.25)
    assert not patch.any()


# ----------------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "boxes", [[1, 2, 3, 4], (1, 2, 3, 4), np.array([1, 2, 3, 4]), [[1, 2, 3, 4]], np.array([[1.0, 2, 3, 4]]), np.array([1, 2, 3, 4], dtype=np.uint16)]
)
def test_one_box_in_any_form(boxes: object) -> None:
    array = as_boxes(boxes, image_hw=(10, 20))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1, 2, 3, 4]])


def test_no_boxes_and_no_argument_differ() -> None:
    assert as_boxes([], image_hw=(10, 20)).shape == (0, 4)
    assert as_boxes(np.zeros((0, 4)), image_hw=(10, 20)).shape == (0, 4)
    np.testing.assert_array_equal(as_boxes(None, image_hw=(10, 20)), [[0, 0, 20, 10]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", range(4))
def test_box_that_is_not_finite_is_refused_by_its_index(bad: float, position: int) -> None:
    box = [1.0, 2.0, 30.0, 40.0]
    box[position] = bad
    with pytest.raises(InputError, match="box 1: expected finite numbers"):
        as_boxes([[1, 2, 3, 4], box], image_hw=(10, 20))


@pytest.mark.parametrize("box", [[30, 2, 3, 4], [1, 20, 3, 4]])
def test_inverted_box_is_refused_with_the_way_out(box: list[float]) -> None:
    with pytest.raises(InputError, match="left <= right and top <= bottom") as caught:
        as_boxes(box, image_hw=(10, 20))
    assert "convert (x, y, width, height)" in caught.value.hint


def test_a_box_without_area_is_a_box() -> None:
    np.testing.assert_array_equal(as_boxes([5, 6, 5, 6], image_hw=(10, 20)), [[5, 6, 5, 6]])


@pytest.mark.parametrize(
    ("boxes", "found"),
    [([1, 2, 3], r"\(3,\)"), ([[1, 2, 3, 4, 5]], r"\(1, 5\)"), (np.ones((2, 1, 4)), r"\(2, 1, 4\)"), (7.0, r"\(\)"), (np.ones((4, 2)), r"\(4, 2\)")],
)
def test_boxes_of_another_shape_are_refused(boxes: object, found: str) -> None:
    with pytest.raises(InputError, match=rf"expected shape \(4,\) or \(N, 4\), found {found}"):
        as_boxes(boxes, image_hw=(10, 20))


@pytest.mark.parametrize("boxes", ["1,2,3,4", ["left", "top", "right", "bottom"], [[1, 2, 3, 4], [1, 2]], {"box": [1, 2, 3, 4]}, [None, 1, 2, 3]])
def test_boxes_that_are_no_numbers_are_refused(boxes: object) -> None:
    with pytest.raises(InputError, match="box"):
        as_boxes(boxes, image_hw=(10, 20))
