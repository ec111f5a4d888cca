"""Procedural images for parity checks when the user gives none: a textured background with a shaded figure in it.

Parity asks whether two runtimes compute the same, not whether they are right; what matters is that crops have gradients, edges and texture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Image: TypeAlias = "NDArray[np.uint8]"

_LIMBS = (((0, -62), (0, 25)), ((-16, -50), (-42, -15)), ((-42, -15), (-36, 22)), ((16, -50), (44, -20)), ((44, -20), (52, 14)),
          ((-10, 25), (-16, 72)), ((-16, 72), (-18, 118)), ((10, 25), (20, 70)), ((20, 70), (18, 118)))  # fmt: skip


def procedural_scenes(count: int = 3, *, size_hw: tuple[int, int] = (480, 640)) -> list[tuple[str, Image, NDArray[np.float32]]]:
    """Draw scenes, always the same ones.

    Args:
        count: how many.
        size_hw: (height, width) in pixels.

    Returns:
        For each scene its name, the (H, W, 3) BGR uint8 image and one (4,) box around the figure, left, top, right, bottom in pixels.
    """
    return [(f"procedural-{seed}", *_scene(np.random.default_rng(seed), size_hw)) for seed in range(count)]


def _scene(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[Image, NDArray[np.float32]]:
    height, width = size_hw
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    for octave in (4, 16, 64):
        noise = rng.uniform(0, 1, (height // (256 // octave) + 2, width // (256 // octave) + 2, 3)).astype(np.float32)
        canvas += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * (160.0 / octave**0.5)
    for _ in range(6):
        corner = rng.integers(0, (width, height))
        cv2.rectangle(
            canvas, tuple(int(v) for v in corner), tuple(int(v) for v in corner + rng.integers(20, 160, 2)), tuple(rng.uniform(30, 220, 3).tolist()), -1
        )
    scale = float(rng.uniform(0.9, 1.4)) * height / 480
    center = np.array([rng.uniform(0.35, 0.65) * width, rng.uniform(0.45, 0.55) * height])
    skin, cloth = rng.uniform((70, 110, 160), (140, 170, 230)), rng.uniform(20, 200, 3)
    for start, end in _LIMBS:
        a, b = (center + np.array(point) * scale for point in (start, end))
        color = cloth if start[1] >= 25 or end == (0, 25) else skin
        width_px = max(1, int((34 if end == (0, 25) else 15) * scale))
        for shade, share in ((0.6, 1.0), (1.0, 0.7), (1.2, 0.3)):
            cv2.line(canvas, _pixel(a), _pixel(b), tuple((color * shade).tolist()), max(1, int(width_px * share)), cv2.LINE_AA)
    head = center + np.array((0, -86)) * scale
    cv2.circle(canvas, _pixel(head), int(17 * scale), tuple(skin.tolist()), -1, cv2.LINE_AA)
    cv2.ellipse(
        canvas, _pixel(head - np.array((0, 6 * scale))), (int(17 * scale), int(13 * scale)), 0, 180, 360, tuple((cloth * 0.3).tolist()), -1, cv2.LINE_AA
    )
    for side in (-6, 6):
        cv2.circle(canvas, _pixel(head + np.array((side * scale, 0))), max(1, int(2 * scale)), (20, 20, 20), -1, cv2.LINE_AA)
    noisy = canvas + rng.normal(0, 4, canvas.shape)
    box = np.array([center[0] - 60 * scale, center[1] - 106 * scale, center[0] + 62 * scale, center[1] + 126 * scale], dtype=np.float32)
    return np.clip(noisy, 0, 255).astype(np.uint8), box


def _pixel(point: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))
