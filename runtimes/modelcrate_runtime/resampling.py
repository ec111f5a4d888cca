"""Pillow's bilinear and bicubic resize, to the bit: image classifiers are trained on them, and OpenCV's neither look at all pixels nor round alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Image: TypeAlias = "NDArray[np.uint8]"
Kernel: TypeAlias = Literal["bilinear", "bicubic"]
KERNELS: Final[Mapping[str, Kernel]] = {"pillow-bilinear": "bilinear", "pillow-bicubic": "bicubic"}
"""What a manifest's `resampling` may be -> the kernel."""

_A: Final = -0.5
"""Pillow's parameter of the cubic convolution (Keys 1981)."""
_BITS: Final = 22
"""Pillow's weights are integers with so many fractional bits."""


def resize_pillow(image: Image, size_wh: tuple[int, int], *, kernel: Kernel) -> Image:
    """`PIL.Image.resize(size, BILINEAR or BICUBIC)`: first along the rows, then along the columns, rounded to levels in between.

    Source: Pillow's `Resample.c`. Its sums of integers stay below 2 ** 53, so that products of doubles give the same.

    Args:
        image: (H, W, C) uint8.
        size_wh: (width, height) of the result in pixels.
        kernel: which of the two.

    Returns:
        (height, width, C) uint8.
    """
    width, height = size_wh
    if width != image.shape[1]:
        weights = _weights(image.shape[1], width, kernel)
        image = _levels(np.tensordot(weights, image.astype(np.float64), axes=(1, 1)).transpose(1, 0, 2))
    if height != image.shape[0]:
        weights = _weights(image.shape[0], height, kernel)
        image = _levels(np.tensordot(weights, image.astype(np.float64), axes=(1, 0)))
    return np.ascontiguousarray(image)


def _levels(sums: NDArray[np.float64]) -> Image:
    """Half up to whole levels, and into their range."""
    levels: Image = np.clip(np.floor(sums * 2.0**-_BITS + 0.5), 0, 255).astype(np.uint8)
    return levels


@functools.lru_cache(maxsize=32)
def _weights(size: int, target: int, kernel: Kernel) -> NDArray[np.float64]:
    """(target, size) whole numbers: what each pixel of the source adds to each of the result, in units of 2 ** -22."""
    scale = size / target
    stretch = max(scale, 1.0)
    reach, weight = (2.0, _cubic) if kernel == "bicubic" else (1.0, _triangle)
    support = reach * stretch
    weights = np.zeros((target, size))
    for i in range(target):
        center = (i + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        last = min(size, int(center + support + 0.5))
        row = [weight((k - center + 0.5) / stretch) for k in range(first, last)]
        total = sum(row)
        for k, value in enumerate(row, start=first):
            share = value / total if total else value
            weights[i, k] = math.trunc(share * 2**_BITS + (0.5 if share >= 0 else -0.5))
    return weights


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return ((_A + 2) * x - (_A + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * _A if x < 2 else 0.0
