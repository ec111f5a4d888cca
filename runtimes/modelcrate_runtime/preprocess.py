"""From an image to the network's input, driven by the transforms of pipeline.json alone (spec section 2).

A `Preprocessor` is compiled once per bundle: what cannot be run is refused when the bundle is opened, not at the first image. The transforms
up to Normalize work on uint8 pixels; the normalised planes go straight into the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import cv2
import numpy as np

from modelcrate_bundle.errors import InputError, UnsupportedBundleError
from modelcrate_bundle.schema import (
    CenterCrop,
    Collect,
    DefaultFormatBundle,
    ImageToTensor,
    LetterResize,
    LoadImageFromFile,
    Normalize,
    Pad,
    Pipeline,
    Resize,
    TopDownAffine,
    TopDownGetBboxCenterScale,
    Transform,
)
from modelcrate_runtime.cores import usable_cores, workers
from modelcrate_runtime.geometry import Crop, Cut, Geometry, Image, StraightWarps, as_boxes, plan_exact, plan_sdk
from modelcrate_runtime.resampling import KERNELS, Kernel, resize_pillow

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

Tensor: TypeAlias = "NDArray[np.float32]"

_INTERPOLATION: Final = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
_BORDER: Final = {"constant": cv2.BORDER_CONSTANT, "edge": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101, "symmetric": cv2.BORDER_REFLECT}
_MAX_SIDE_PX: Final = 32766
"""OpenCV addresses pixels with 16 bits when it samples them."""
_KNOWN: Final = (
    LoadImageFromFile, Resize, LetterResize, Pad, Normalize, CenterCrop, ImageToTensor, DefaultFormatBundle, Collect, TopDownGetBboxCenterScale, TopDownAffine,
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class ImageMeta:
    """What postprocessing must know of one network input.

    Attributes:
        image_hw: size of the caller's image, (height, width) in pixels.
        resized_hw: size after resizing, before padding (LetterResize: after padding, as the SDK has it).
        scale_xyxy: (4,) network pixels per image pixel, for left, top, right, bottom.
        pad_left_top: network pixels of padding before the image; negative where a part of it was cut off.
        border_xy: network pixels of `logical_or_val` padding before the image.
    """

    image_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    scale_xyxy: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    pad_left_top: tuple[float, float] = (0.0, 0.0)
    border_xy: tuple[int, int] = (0, 0)

    @property
    def as_crop(self) -> Crop:
        """How the network's pixels lie in the image."""
        scale, before = self.scale_xyxy[:2], [pad + border for pad, border in zip(self.pad_left_top, self.border_xy, strict=True)]
        return Crop(step_xy=(1 / scale[0], 1 / scale[1]), origin_xy=(-before[0] / scale[0], -before[1] / scale[1]))


def check_image(image: Any, *, color: bool = True) -> Image:
    """The caller's image as (H, W, 3) uint8 BGR, or (H, W, 1) where the network wants grey.

    Args:
        image: (H, W) or (H, W, 1) grey, (H, W, 3) BGR or (H, W, 4) BGRA, uint8; alpha is dropped.
        color: whether three channels are wanted.

    Raises:
        InputError: not an array, another dtype or shape, or no pixels.
    """
    if not isinstance(image, np.ndarray):
        raise InputError(f"image: expected a numpy array, found {type(image).__name__}", hint="read it with cv2.imread, and check that the file is there")
    if image.dtype != np.uint8:
        raise InputError(
            f"image: expected uint8 pixels, found {image.dtype}", hint="scale to 0..255 first; for 16-bit images: (image // 256).astype(numpy.uint8)"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if max(image.shape, default=0) > _MAX_SIDE_PX:
        raise InputError(f"image: expected at most {_MAX_SIDE_PX} pixels a side, found shape {image.shape}", hint="cut it into tiles first")
    if image.ndim != 3 or image.shape[2] not in {1, 3, 4} or 0 in image.shape:
        raise InputError(f"image: expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), found {image.shape}")
    channels = image.shape[2]
    pixels: Image = image
    if color and channels != 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR if channels == 1 else cv2.COLOR_BGRA2BGR)  # type: ignore[assignment]  # OpenCV's stubs lose the dtype
    elif not color and channels != 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY if channels == 3 else cv2.COLOR_BGRA2GRAY)[:, :, None]  # type: ignore[assignment]
    return pixels


class Preprocessor:
    """The compiled transforms of one bundle.

    Attributes:
        is_top_down: whether an input is a crop around a box rather than the image.
    """

    def __init__(self, pipeline: Pipeline, *, geometry: Geometry, where: str, resampling: str | None = None) -> None:
        """Compile.

        Args:
            pipeline: the bundle's pipeline.json.
            geometry: the convention to follow; see `modelcrate_runtime.geometry`.
            where: the bundle's name, for messages.
            resampling: the manifest's; "pillow-bilinear" or "pillow-bicubic" is what exact geometry then resizes with.

        Raises:
            UnsupportedBundleError: a transform that there is no code for, or a combination of them that makes no sense.
        """
        if resampling is not None and resampling not in KERNELS:
            raise UnsupportedBundleError(f"{where}: resampling: expected {' or '.join(KERNELS)} or none, found {resampling!r}")
        self._geometry: Geometry = geometry
        self._pillow: Kernel | None = KERNELS.get(resampling or "") if geometry == "exact" else None
        self._where = where
        self._load = LoadImageFromFile()
        self._normalize = pipeline.transform(Normalize)
        self._box_step = pipeline.transform(TopDownGetBboxCenterScale)
        self._before: list[Transform] = []
        self._after: list[Pad] = []
        is_normalized = False
        for i, transform in enumerate(pipeline.preprocess.transforms):
            self._place(transform, index=i, is_normalized=is_normalized)
            is_normalized |= isinstance(transform, Normalize)
        self._affine = next((t for t in self._before if isinstance(t, TopDownAffine)), None)
        self.is_top_down = self._affine is not None
        if self.is_top_down and len(self._before) > 1:
            others = ", ".join(t.type for t in self._before if not isinstance(t, TopDownAffine)) or "a second TopDownAffine"
            raise UnsupportedBundleError(f"{where}: transforms: expected TopDownAffine alone before Normalize, found {others} beside it")
        if self._affine is not None and self._box_step is None:
            self._box_step = TopDownGetBboxCenterScale(image_size=self._affine.image_size)
        channels = 3 if self._load.color_type.startswith("color") else 1
        mean = self._normalize.mean if self._normalize else [0.0] * channels
        std = self._normalize.std if self._normalize else [1.0] * channels
        if len(mean) != channels or len(std) != channels or 0.0 in std:
            raise UnsupportedBundleError(f"{where}: Normalize: expected {channels} means and non-zero standard deviations, found {mean} and {std}")
        # As the SDK: float32 throughout, times the reciprocal.
        levels = np.arange(256, dtype=np.float32)
        self._tables = [(levels - np.float32(m)) * (np.float32(1) / np.float32(s)) for m, s in zip(mean, std, strict=True)]
        self._swap = bool(self._normalize and self._normalize.to_rgb and channels == 3)
        self._channels = channels
        pad = next((t for t in self._before if isinstance(t, Pad) and t.size is not None and not t.pad_to_square), None)
        self._room_wh = _pair(pad.size) if pad is not None and pad.size is not None else None

    def _place(self, transform: Transform, *, index: int, is_normalized: bool) -> None:
        """Sort one transform into load, before Normalize, after it."""
        at = f"{self._where}: transforms[{index}]"
        if not isinstance(transform, _KNOWN):
            name = getattr(transform, "name", transform.type)
            raise UnsupportedBundleError(f"{at}: expected one of {', '.join(t.type for t in _KNOWN)}, found {name}")
        if isinstance(transform, LoadImageFromFile):
            self._load = transform
        elif isinstance(transform, Pad) and is_normalized:
            if transform.padding_mode != "constant" or (transform.logical_or_val > 0 and _is_open(transform)):
                raise UnsupportedBundleError(f"{at}: Pad after Normalize: expected a constant at the right and the bottom, found another kind")
            self._after.append(transform)
        elif isinstance(transform, Normalize) and is_normalized:
            raise UnsupportedBundleError(f"{at}: expected one Normalize, found a second")
        elif isinstance(transform, (Resize, LetterResize, Pad, CenterCrop, TopDownAffine)):
            if is_normalized:
                raise UnsupportedBundleError(f"{at}: {transform.type} after Normalize is not supported")
            self._before.append(transform)
        if isinstance(transform, Resize) and transform.interpolation not in _INTERPOLATION:
            raise UnsupportedBundleError(f"{at}: interpolation: expected one of {', '.join(_INTERPOLATION)}, found {transform.interpolation!r}")
        if isinstance(transform, Pad) and transform.padding_mode not in _BORDER:
            raise UnsupportedBundleError(f"{at}: padding_mode: expected one of {', '.join(_BORDER)}, found {transform.padding_mode!r}")

    def prepare(self, image: NDArray[np.uint8]) -> Image:
        """Check the caller's image and bring its channels to the order that LoadImageFromFile asks for: (H, W, C) uint8."""
        color = self._channels == 3
        checked = check_image(image, color=color)
        if color and self._load.channel_order != "bgr":
            return cv2.cvtColor(checked, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]
        return checked

    def image(self, image: NDArray[np.uint8]) -> tuple[Tensor, ImageMeta]:
        """One whole image.

        Args:
            image: as `check_image` takes it.

        Returns:
            (1, C, h, w) float32 and its meta.
        """
        pixels = self.prepare(image)
        height, width = pixels.shape[:2]
        meta = ImageMeta(image_hw=(height, width), resized_hw=(height, width))
        for transform in self._before:
            pixels = self._apply(transform, pixels, meta)
        tensor = np.empty((1, self._channels, *pixels.shape[:2]), dtype=np.float32)
        self._fill(pixels, tensor[0])
        for pad in self._after:
            tensor = _pad_planes(tensor, pad)
        return tensor, meta

    def plan_crops(self, image: NDArray[np.uint8], boxes: ArrayLike | None) -> PlannedCrops:
        """Decide where the crops of an image lie, one for each box, without cutting them.

        Args:
            image: as `check_image` takes it.
            boxes: (4,) or (N, 4) left, top, right, bottom in image pixels; None for the whole image.

        Returns:
            The N crops, to be rendered in parts and by any thread.
        """
        affine, box_step = self._affine, self._box_step
        assert affine is not None  # only top-down bundles have boxes,
        assert box_step is not None  # and the constructor saw to it
        pixels = self.prepare(image)
        image_hw = (pixels.shape[0], pixels.shape[1])
        array = as_boxes(boxes, image_hw=image_hw, least_side=-1.0 if self._geometry == "sdk" else 0.0)
        size_wh, padding = affine.image_size, box_step.padding
        if self._geometry == "exact":
            rows, crops = [], []
            for box in array.tolist():
                row, crop = plan_exact(box, size_wh=size_wh, padding=padding, use_udp=bool(affine.use_udp))
                rows.append(row)
                crops.append(crop)
            return PlannedCrops(pixels=pixels, cuts=StraightWarps.of(rows, size_wh=size_wh), crops=crops, size_wh=size_wh, fill=self._fill)
        plans = [plan_sdk(None if boxes is None else box, image_hw=image_hw, size_wh=size_wh, padding=padding) for box in array]
        return PlannedCrops(pixels=pixels, cuts=[cut for cut, _ in plans], crops=[crop for _, crop in plans], size_wh=size_wh, fill=self._fill)

    def crops(self, image: NDArray[np.uint8], boxes: ArrayLike | None) -> tuple[Tensor, list[Crop]]:
        """One crop for each box of an image.

        Args:
            image: as `check_image` takes it.
            boxes: (4,) or (N, 4) left, top, right, bottom in image pixels; None for the whole image.

        Returns:
            (N, C, h, w) float32 and the N maps back.
        """
        planned = self.plan_crops(image, boxes)
        return planned.render(range(len(planned.crops))), planned.crops

    def _fill(self, pixels: Image, planes: NDArray[np.float32]) -> None:
        """Normalize (h, w, C) uint8 pixels into (C, h, w) float32 planes of a batch: a table of 256 values per channel gives the same bits."""
        if self._channels == 1:
            cv2.LUT(pixels, self._tables[0], planes[0])
            return
        separate = np.empty(planes.shape, dtype=np.uint8)
        cv2.split(pixels, list(separate[::-1]) if self._swap else list(separate))
        for source, table, target in zip(separate, self._tables, planes, strict=True):
            cv2.LUT(source, table, target)

    def _apply(self, transform: Transform, pixels: Image, meta: ImageMeta) -> Image:
        if isinstance(transform, Resize):
            return _resize(pixels, transform, meta, geometry=self._geometry, room_wh=self._room_wh, pillow=self._pillow)
        if isinstance(transform, LetterResize):
            return _letter_resize(pixels, transform, meta)
        if isinstance(transform, Pad):
            return _pad(pixels, transform, meta)
        if isinstance(transform, CenterCrop):
            return _center_crop(pixels, transform, meta, geometry=self._geometry)
        raise UnsupportedBundleError(f"{self._where}: {transform.type} needs a box; this task gives whole images")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlannedCrops:
    """The crops of one image: where they lie is decided, the pixels are not yet cut.

    Attributes:
        pixels: (H, W, C) uint8, the image in the channel order of the bundle.
        cuts: what to cut for each crop.
        crops: (N) the maps back.
        size_wh: network input (width, height) in pixels.
        fill: normalises a (height, width, C) uint8 crop into (C, height, width) float32 planes.
    """

    pixels: Image
    cuts: StraightWarps | list[Cut]
    crops: list[Crop]
    size_wh: tuple[int, int]
    fill: Callable[[Image, NDArray[np.float32]], None]

    def render(self, part: range) -> Tensor:
        """Crops number `part`, cut and normalised: (n, C, height, width) float32. Several crops keep several cores busy."""
        if len(part) < 2:
            return self.render_here(part)  # to wake a second thread takes as long as half of a crop
        tensor = self._empty(part)
        # OpenCV works on one crop with one thread.
        share = max(1, -(-len(part) // usable_cores()))
        shares = [range(start, min(start + share, len(part))) for start in range(0, len(part), share)]
        pending = [workers().submit(self._render_into, tensor, part, share) for share in shares[1:]]
        self._render_into(tensor, part, shares[0])
        for future in pending:
            future.result()
        return tensor

    def render_here(self, part: range) -> Tensor:
        """`render` by the calling thread alone, for callers that are one thread of many."""
        tensor = self._empty(part)
        self._render_into(tensor, part, range(len(part)))
        return tensor

    def _empty(self, part: range) -> Tensor:
        width, height = self.size_wh
        return np.empty((len(part), self.pixels.shape[2], height, width), dtype=np.float32)

    def _render_into(self, tensor: Tensor, part: range, share: range) -> None:
        for i in share:
            index = part[i]
            patch = self.cuts.apply(self.pixels, index) if isinstance(self.cuts, StraightWarps) else self.cuts[index].apply(self.pixels)
            self.fill(patch, tensor[i])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resize(pixels: Image, transform: Resize, meta: ImageMeta, *, geometry: Geometry, room_wh: tuple[int, int] | None, pillow: Kernel | None) -> Image:
    """Spec 2.2. The SDK keeps the ratio in float32, MMCV in double: they differ for a few odd sizes.

    Both match long side to long side, so that a portrait image leaves a landscape target; where a Pad to a fixed size follows, which would
    then fail, exact geometry fits the image into `room_wh` instead. For square targets it is all the same.
    """
    height, width = pixels.shape[:2]
    target_w, target_h = _pair(transform.size)
    if target_h == -1:
        short = target_w
        target_w, target_h = (short, short * height // width) if width < height else (short * width // height, short)
    if transform.keep_ratio:
        long_edge, short_edge = max(target_w, target_h), min(target_w, target_h)
        ratio = min(long_edge / max(height, width), short_edge / min(height, width))
        if geometry == "sdk":
            single = np.float32(ratio)
            new_w, new_h = int(float(np.float32(width) * single) + 0.5), int(float(np.float32(height) * single) + 0.5)
        else:
            if room_wh is not None and (width * ratio > room_wh[0] + 0.5 or height * ratio > room_wh[1] + 0.5):
                ratio = min(room_wh[0] / width, room_wh[1] / height)
            new_w, new_h = int(width * ratio + 0.5), int(height * ratio + 0.5)
    else:
        new_w, new_h = target_w, target_h
    new_w, new_h = max(new_w, 1), max(new_h, 1)  # a sliver of an image still has a pixel
    if pillow is not None:
        pixels = resize_pillow(pixels, (new_w, new_h), kernel=pillow)
    elif (new_h, new_w) != (height, width):
        pixels = cv2.resize(pixels, (new_w, new_h), interpolation=_INTERPOLATION[transform.interpolation]).reshape(new_h, new_w, -1)  # type: ignore[assignment]
    meta.resized_hw = (new_h, new_w)
    scale_x, scale_y = new_w / width, new_h / height
    meta.scale_xyxy = (scale_x, scale_y, scale_x, scale_y)
    return pixels


def _letter_resize(pixels: Image, transform: LetterResize, meta: ImageMeta) -> Image:
    """Spec 2.4."""
    height, width = pixels.shape[:2]
    target_h, target_w = _pair(transform.scale)
    ratio = np.float32(min(target_h / height, target_w / width))
    if not transform.allow_scale_up:
        ratio = min(ratio, np.float32(1))
    ratio_w = ratio_h = float(ratio)
    new_h, new_w = int(float(np.float32(height) * ratio) + 0.5), int(float(np.float32(width) * ratio) + 0.5)
    pad_h, pad_w = target_h - new_h, target_w - new_w
    if transform.use_mini_pad:
        pad_h, pad_w = pad_h % 32, pad_w % 32
    elif transform.stretch_only:
        pad_h = pad_w = 0
        new_h, new_w = target_h, target_w
        ratio_h, ratio_w = target_h / height, target_w / width
    pixels = cv2.resize(pixels, (new_w, new_h), interpolation=cv2.INTER_LINEAR).reshape(new_h, new_w, -1)  # type: ignore[assignment]
    top, left = pad_h // 2, pad_w // 2
    meta.scale_xyxy = tuple(old * new for old, new in zip(meta.scale_xyxy, (ratio_w, ratio_h, ratio_w, ratio_h), strict=True))  # type: ignore[assignment]
    meta.pad_left_top = (float(left), float(top))
    meta.resized_hw = (new_h + pad_h, new_w + pad_w)
    return _bordered(pixels, top, pad_h - top, left, pad_w - left, mode="constant", fill=transform.fill)


def _pad(pixels: Image, transform: Pad, meta: ImageMeta) -> Image:
    """Spec 2.3: to a square, to a size, to a multiple, or around."""
    height, width = pixels.shape[:2]
    if transform.logical_or_val > 0 and _is_open(transform):
        target_h = (height | transform.logical_or_val) + transform.add_pix_val
        target_w = (width | transform.logical_or_val) + transform.add_pix_val
        top, left = target_h // 2 - height // 2, target_w // 2 - width // 2
        meta.border_xy = (left, top)
        return _bordered(pixels, top, target_h - height - top, left, target_w - width - left, mode=transform.padding_mode, fill=transform.fill)
    bottom, right = _missing(transform, height, width)
    return _bordered(pixels, 0, bottom, 0, right, mode=transform.padding_mode, fill=transform.fill)


def _is_open(transform: Pad) -> bool:
    """Whether none of the options that come before `logical_or_val` is set."""
    return not (transform.pad_to_square or transform.size or (transform.size_divisor or 1) != 1)


def _missing(transform: Pad, height: int, width: int) -> tuple[int, int]:
    """Rows and columns that a Pad adds at the bottom and the right."""
    target_h, target_w = height, width
    if transform.pad_to_square:
        target_h = target_w = max(height, width)
    elif transform.size is not None:
        target_w, target_h = _pair(transform.size)
        if transform.orientation_agnostic:
            long_edge, short_edge = max(target_w, target_h), min(target_w, target_h)
            target_h, target_w = (short_edge, long_edge) if height < width else (long_edge, short_edge)
    elif (transform.size_divisor or 1) != 1:
        divisor = int(transform.size_divisor or 1)
        target_h, target_w = -(-height // divisor) * divisor, -(-width // divisor) * divisor
    if target_h < height or target_w < width:
        raise InputError(
            f"image: expected at most {target_w}x{target_h} pixels before padding, found {width}x{height}",
            hint="the bundle's Pad is smaller than its Resize: convert it again",
        )
    return target_h - height, target_w - width


def _bordered(pixels: Image, top: int, bottom: int, left: int, right: int, *, mode: str, fill: float) -> Image:
    if not (top or bottom or left or right):
        return pixels
    shape = (pixels.shape[0] + top + bottom, pixels.shape[1] + left + right, pixels.shape[2])
    value = (fill,) * 4
    return cv2.copyMakeBorder(pixels, top, bottom, left, right, _BORDER[mode], value=value).reshape(shape)  # type: ignore[return-value, unused-ignore]  # OpenCV's stubs lose the dtype


def _pad_planes(tensor: Tensor, transform: Pad) -> Tensor:
    """A Pad after Normalize: its value is in normalised units."""
    bottom, right = _missing(transform, tensor.shape[2], tensor.shape[3])
    if not (bottom or right):
        return tensor
    return np.pad(tensor, ((0, 0), (0, 0), (0, bottom), (0, right)), constant_values=transform.fill)


def _center_crop(pixels: Image, transform: CenterCrop, meta: ImageMeta, *, geometry: Geometry) -> Image:
    """Spec 2.6; halves round away from zero in the SDK, and to even numbers in MMPretrain."""
    height, width = pixels.shape[:2]
    crop_h, crop_w = _pair(transform.crop_size)
    if geometry == "exact":
        top, left = max(0, round((height - crop_h) / 2)), max(0, round((width - crop_w) / 2))
    else:
        top, left = max(0, int((height - crop_h) / 2 + 0.5)), max(0, int((width - crop_w) / 2 + 0.5))
    if geometry == "exact":  # the SDK forgets what it cut off
        meta.pad_left_top = (meta.pad_left_top[0] - left, meta.pad_left_top[1] - top)
    return pixels[top : top + crop_h, left : left + crop_w]
