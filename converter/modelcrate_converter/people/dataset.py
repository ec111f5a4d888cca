"""Data sets of procedural people on disk: COCO annotations beside JPEG pictures, and video with identities."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import cv2
import msgspec
import numpy as np

from modelcrate_bundle.errors import ConfigError, OutputError
from modelcrate_converter.people.body import INDEX, walking_pose
from modelcrate_converter.people.drawing import Look
from modelcrate_converter.people.scenes import DATA_VERSION, MAX_PEOPLE, Figure, Person, Scene, draw_background, draw_scene, finish
from modelcrate_runtime.images import encode_jpeg
from modelcrate_runtime.skeletons import COCO_17

ANNOTATIONS_NAME: Final = "annotations.json"
VIDEO_NAME: Final = "people.mp4"
FRAMES_PER_S: Final = 25.0

Report: TypeAlias = Callable[[int], None]
"""Called with the number of pictures that are done."""


def write_dataset(
    folder: Path, *, count: int, seed: int, size_hw: tuple[int, int] = (320, 320), people: tuple[int, int] = (1, 6), report: Report | None = None
) -> None:
    """Write `folder/images/*.jpg` and `folder/annotations.json` in COCO's keypoint format. The folder appears whole or not at all.

    Args:
        folder: must not exist yet, or be empty.
        count: pictures.
        seed: the same seed writes the same data.
        size_hw: (height, width) of the pictures in pixels.
        people: least and most people in a picture.
        report: called after each picture.

    Raises:
        ConfigError: numbers that make no sense.
        OutputError: the folder is not empty or cannot be written.
    """
    _check(count=count, size_hw=size_hw, people=people)
    with _appearing(folder) as partial:
        (partial / "images").mkdir()
        scenes = []
        for index in range(count):
            scene = draw_scene(seed, index, size_hw=size_hw, people=people)
            name = f"images/{index:06d}.jpg"
            (partial / name).write_bytes(encode_jpeg(scene.image))
            scenes.append((name, scene.people))
            if report:
                report(index + 1)
        _write_annotations(partial, scenes, size_hw=size_hw, info={"description": "procedural people", "version": DATA_VERSION, "seed": seed})


def write_video(folder: Path, *, frames: int, seed: int, size_hw: tuple[int, int] = (360, 640), people: int = 5, report: Report | None = None) -> None:
    """Write `folder/people.mp4`, people who walk and cross before each other, and `folder/annotations.json`, COCO with a `track_id` for each person.

    Args:
        folder: must not exist yet, or be empty.
        frames: how many, at 25 a second.
        seed: the same seed writes the same video.
        size_hw: (height, width) in pixels; both even.
        people: walkers.
        report: called after each frame.

    Raises:
        ConfigError: numbers that make no sense.
        OutputError: the folder is not empty or cannot be written, or this OpenCV cannot write MP4.
    """
    _check(count=frames, size_hw=size_hw, people=(1, people))
    if size_hw[0] % 2 or size_hw[1] % 2:
        raise ConfigError(f"size of a video: expected even numbers, found {size_hw[1]}x{size_hw[0]}")
    with _appearing(folder) as partial:
        height, width = size_hw
        writer = cv2.VideoWriter(str(partial / VIDEO_NAME), cv2.VideoWriter.fourcc(*"mp4v"), FRAMES_PER_S, (width, height))
        if not writer.isOpened():
            raise OutputError(f"{folder / VIDEO_NAME}: this OpenCV cannot write MP4", hint="pip install opencv-python-headless")
        scenes = []
        try:
            for index, scene in enumerate(walk(seed, frames=frames, size_hw=size_hw, people=people)):
                writer.write(scene.image)
                scenes.append((f"{VIDEO_NAME}#{index}", scene.people))
                if report:
                    report(index + 1)
        finally:
            writer.release()
        info = {"description": "procedural people walking", "version": DATA_VERSION, "seed": seed, "frames_per_s": FRAMES_PER_S, "video": VIDEO_NAME}
        _write_annotations(partial, scenes, size_hw=size_hw, info=info)


# ----------------------------------------------------------------------------------------------------------------------- walks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walker:
    """Someone who walks to and fro across the picture.

    Attributes:
        look: the person's.
        height_px: standing height.
        feet_y: where the feet are, in pixels from the top.
        start: along the way, as a share of it.
        speed: pixels in a frame.
        phase: of the first stride, in radians.
        turn: how far the way leads towards the viewer, in radians.
    """

    look: Look
    height_px: float
    feet_y: float
    start: float
    speed: float
    phase: float
    turn: float

    def at(self, frame: int, *, width: int) -> Figure:
        """The walker in one frame; the way goes a little beyond both edges, and back."""
        reach = width * 1.25
        travelled = (self.start * reach + self.speed * frame) % (2 * reach)
        is_back = travelled > reach
        x = (2 * reach - travelled if is_back else travelled) - width * 0.125
        stride = self.height_px * 0.8
        phase = self.phase + 2 * math.pi * self.speed * frame / stride
        # To the right is to the walker's front: a quarter turn, less what leads towards the viewer.
        yaw = (math.pi / 2 - self.turn) * (-1 if is_back else 1)
        pose = walking_pose(phase, yaw=yaw)
        figure = Figure.placed(self.look, pose, center_xy=(x, self.feet_y - self.height_px / 2), height_px=self.height_px)
        joints = figure.joints.copy()
        # The hips move evenly and the lower foot is on the ground, whatever the limbs do.
        joints[:, 0] += x - joints[INDEX["pelvis"], 0]
        joints[:, 1] += self.feet_y - joints[:, 1].max()
        return replace(figure, joints=joints)


def walk(seed: int, *, frames: int, size_hw: tuple[int, int] = (360, 640), people: int = 5) -> Iterator[Scene]:
    """The frames of a video, one by one; the same for the same arguments. `Person.identity` says who is who."""
    rng = np.random.default_rng((seed, 11))
    height, width = size_hw
    background = draw_background(rng, size_hw)
    walkers = []
    for _ in range(people):
        near = float(rng.random())
        height_px = height * (0.42 + 0.36 * near)
        walkers.append(
            _Walker(
                look=Look.sample(rng), height_px=height_px, feet_y=height * (0.72 + 0.24 * near), start=float(rng.uniform(0, 2)),
                speed=height_px * float(rng.uniform(0.014, 0.03)), phase=float(rng.uniform(0, 2 * math.pi)), turn=float(rng.uniform(0.1, 0.8)),
            )
        )  # fmt: skip
    order = sorted(range(people), key=lambda i: walkers[i].feet_y)
    angle = float(rng.uniform(-math.pi, 0))
    light = np.array((math.cos(angle), math.sin(angle)))
    for frame in range(frames):
        figures = [replace(walkers[i].at(frame, width=width), identity=i) for i in order]
        # The same camera in every frame.
        yield finish(np.random.default_rng((seed, 12)), background.copy(), figures, light=light, occluders=False, frame=frame)


# ------------------------------------------------------------------------------------------------------------------------ COCO


def coco_annotations(scenes: Sequence[tuple[str, Sequence[Person]]], *, size_hw: tuple[int, int], info: dict[str, Any]) -> dict[str, Any]:
    """Annotations in COCO's keypoint format; people of whom hardly anything is seen are `iscrowd`, which evaluations leave out.

    Args:
        scenes: file name and people of each picture.
        size_hw: (height, width) of the pictures in pixels.
        info: about the data set.
    """
    height, width = size_hw
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, people) in enumerate(scenes, start=1):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for person in people:
            left, top, right, bottom = (float(v) for v in person.box_xyxy)
            # Tenths of a thousandth of a pixel are enough, and keep the file small.
            keypoints = [value for x, y, v in person.keypoints.tolist() for value in (round(x, 3), round(y, 3), int(v))]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": [left, top, right - left, bottom - top], "area": person.area,
                    "iscrowd": int(person.is_hard), "keypoints": keypoints, "num_keypoints": int((person.keypoints[:, 2] > 0).sum()),
                    "track_id": person.identity, "pose": person.pose,
                }
            )  # fmt: skip
    skeleton = [[a + 1, b + 1] for a, b in COCO_17.skeleton]
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": COCO_17.names, "skeleton": skeleton}
    return {"info": info, "images": images, "annotations": annotations, "categories": [category]}


def _write_annotations(folder: Path, scenes: Sequence[tuple[str, Sequence[Person]]], *, size_hw: tuple[int, int], info: dict[str, Any]) -> None:
    (folder / ANNOTATIONS_NAME).write_bytes(msgspec.json.encode(coco_annotations(scenes, size_hw=size_hw, info=info)))


def _check(*, count: int, size_hw: tuple[int, int], people: tuple[int, int]) -> None:
    if count < 1:
        raise ConfigError(f"--count, --frames: expected at least 1, found {count}")
    if not all(64 <= side <= 4096 for side in size_hw):
        raise ConfigError(f"--size: expected sides of 64 to 4096 pixels, found {size_hw[1]}x{size_hw[0]}")
    if not 0 <= people[0] <= people[1] <= MAX_PEOPLE:
        raise ConfigError(f"--people: expected a range within 0 to {MAX_PEOPLE}, found {people[0]} to {people[1]}")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes its name when the block ends well, and is gone when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: expected an empty place, found something there", hint="choose another place with -o, or remove it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
        except OSError as error:
            raise OutputError(f"{folder}: expected to write there, found: {error.strerror or error}", hint="choose another place with -o") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
