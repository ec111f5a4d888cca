"""Boxes with scores and skeletons on an image."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import cv2
import numpy as np

from modelcrate_runtime.preprocess import check_image
from modelcrate_runtime.results import Poses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from modelcrate_bundle.manifest import KeypointInfo
    from modelcrate_runtime.results import Classification, Detections
    from modelcrate_runtime.tracker import TrackedPoses


def draw_detections(image: NDArray[np.uint8], detections: Detections, *, class_names: Sequence[str] = (), score_thr: float = 0.3) -> NDArray[np.uint8]:
    """Draw boxes with class and score.

    Args:
        image: (H, W, 3) BGR uint8; it is not changed.
        detections: in pixels of this image.
        class_names: label -> name; numbers stand for missing names.
        score_thr: boxes below it are not drawn.

    Returns:
        (H, W, 3) BGR uint8.
    """
    canvas = check_image(image).copy()
    unit = _unit(canvas)
    for box, score, label in zip(detections.boxes_xyxy, detections.scores, detections.labels, strict=True):
        if score < score_thr:
            continue
        color = _label_color(int(label))
        left, top, right, bottom = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (left, top), (right, bottom), color, unit, cv2.LINE_AA)
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        _caption(canvas, f"{name} {score:.2f}", (left, top), color)
    return canvas


def draw_classes(image: NDArray[np.uint8], classification: Classification, *, class_names: Sequence[str] = ()) -> NDArray[np.uint8]:
    """Write the likeliest classes with their scores into the left top corner.

    Args:
        image: (H, W, 3) BGR uint8; it is not changed.
        classification: of this image.
        class_names: label -> name; numbers stand for missing names.

    Returns:
        (H, W, 3) BGR uint8.
    """
    canvas = check_image(image).copy()
    line = max(14, round(float(max(canvas.shape[:2])) / 40))
    for i, (label, score) in enumerate(zip(classification.labels.tolist(), classification.scores.tolist(), strict=True)):
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        # Its lower edge: the caption stands above the corner that it is given.
        _caption(canvas, f"{name} {score:.3f}", (2, (i + 1) * (line + 6) + 8), _label_color(label))
    return canvas


def draw_poses(image: NDArray[np.uint8], poses: Poses, *, keypoints: KeypointInfo, score_thr: float = 0.3) -> NDArray[np.uint8]:
    """Draw skeletons and keypoints.

    Args:
        image: (H, W, 3) BGR uint8; it is not changed.
        poses: in pixels of this image.
        keypoints: links and colours.
        score_thr: keypoints below it, and links to them, are not drawn.

    Returns:
        (H, W, 3) BGR uint8.
    """
    canvas = check_image(image).copy()
    unit = _unit(canvas)
    count = len(keypoints.names)
    colors = keypoints.colors if len(keypoints.colors) == count else [(51, 153, 255)] * count
    link_colors = keypoints.link_colors if len(keypoints.link_colors) == len(keypoints.skeleton) else [(255, 255, 255)] * len(keypoints.skeleton)
    limit = 8 * max(canvas.shape[:2])  # OpenCV overflows far outside the image
    for points, scores in zip(np.clip(poses.keypoints_xy, -limit, limit), poses.scores, strict=True):
        spots = [(round(float(x)), round(float(y))) for x, y in points]
        for (a, b), rgb in zip(keypoints.skeleton, link_colors, strict=True):
            if max(a, b) < len(spots) and min(scores[a], scores[b]) >= score_thr:
                cv2.line(canvas, spots[a], spots[b], rgb[::-1], unit, cv2.LINE_AA)
        for spot, score, rgb in zip(spots, scores, colors, strict=False):
            if score >= score_thr:
                cv2.circle(canvas, spot, unit + 1, rgb[::-1], -1, cv2.LINE_AA)
                cv2.circle(canvas, spot, unit + 1, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def draw_tracks(
    image: NDArray[np.uint8], tracked: TrackedPoses, *, keypoints: KeypointInfo, score_thr: float = 0.5, with_boxes: bool = True
) -> NDArray[np.uint8]:
    """Draw skeletons, and around them boxes with the tracks' numbers, each track in a colour of its own.

    Args:
        image: (H, W, 3) BGR uint8; it is not changed.
        tracked: in pixels of this image.
        keypoints: links and colours.
        score_thr: keypoints below it, and links to them, are not drawn.
        with_boxes: whether boxes and numbers are drawn.

    Returns:
        (H, W, 3) BGR uint8.
    """
    canvas = draw_poses(image, Poses(keypoints_xy=tracked.keypoints_xy, scores=tracked.scores), keypoints=keypoints, score_thr=score_thr)
    if with_boxes:
        unit = max(1, _unit(canvas) // 2)
        for box, track in zip(tracked.boxes_xyxy, tracked.track_ids.tolist(), strict=True):
            color = _label_color(track)
            left, top, right, bottom = (round(float(v)) for v in box)
            cv2.rectangle(canvas, (left, top), (right, bottom), color, unit, cv2.LINE_AA)
            _caption(canvas, str(track), (left, top), color)
    return canvas


def _unit(image: NDArray[np.uint8]) -> int:
    """Line width in pixels that looks alike on small and large images."""
    return max(1, round(float(max(image.shape[:2])) / 320))


def _label_color(label: int) -> tuple[int, int, int]:
    """A BGR colour per label; neighbours differ (the golden angle around the colour circle)."""
    red, green, blue = colorsys.hsv_to_rgb((0.33 + 0.618034 * label) % 1.0, 0.85, 0.95)
    return round(blue * 255), round(green * 255), round(red * 255)


def _caption(canvas: NDArray[np.uint8], text: str, corner: tuple[int, int], color: tuple[int, int, int]) -> None:
    """Text on a patch of its colour, above the corner where there is room, else below it."""
    scale = max(0.4, max(canvas.shape[:2]) / 1280)
    thickness = max(1, round(scale * 1.5))
    (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    x = min(max(0, corner[0]), max(0, canvas.shape[1] - width))
    y = corner[1] - baseline - 2 if corner[1] - height - baseline - 2 >= 0 else corner[1] + height + 2
    cv2.rectangle(canvas, (x, y - height - 2), (x + width, y + baseline), color, -1)
    ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
    cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thickness, cv2.LINE_AA)
