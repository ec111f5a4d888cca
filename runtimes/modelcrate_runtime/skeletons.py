"""Keypoint metadata of data sets, for bundles that do not say what their keypoints are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from modelcrate_bundle.errors import ConfigError
from modelcrate_bundle.manifest import KeypointInfo

_Rgb: TypeAlias = tuple[int, int, int]
_BLUE: Final[_Rgb] = (51, 153, 255)
_GREEN: Final[_Rgb] = (0, 255, 0)
_ORANGE: Final[_Rgb] = (255, 128, 0)

_COLORS: Final[list[_Rgb]] = [_BLUE, _BLUE, _BLUE, _BLUE, _BLUE, *((_GREEN, _ORANGE) * 6)]
_LINK_COLORS: Final[list[_Rgb]] = [_GREEN, _GREEN, _ORANGE, _ORANGE, *((_BLUE,) * 4), *((_GREEN, _ORANGE) * 2), *((_BLUE,) * 7)]

COCO_17: Final = KeypointInfo(
    names=[
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow",
        "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    ],
    skeleton=[
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ],
    flip_pairs=[(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)],
    sigmas=[0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089],
    colors=_COLORS,
    link_colors=_LINK_COLORS,
)  # fmt: skip
"""COCO body: names, links, colours and OKS sigmas as MMPose's `configs/_base_/datasets/coco.py` and pycocotools have them."""


_BY_COUNT: Final[Mapping[int, str]] = {21: "hand", 26: "halpe26", 106: "lapa", 133: "coco-wholebody"}
"""Keypoints -> the published data set that has so many. AP-10K has 17 like COCO and must be named."""
DATA_SETS: Final = ("coco", "halpe26", "coco-wholebody", "ap10k", "lapa", "hand")
"""The sets of the published models: body, body with feet, whole body, animal, face, hand."""


def keypoint_info(count: int) -> KeypointInfo:
    """What is known of K keypoints from their number alone: the published set that has so many, else numbered points without links."""
    name = "coco" if count == len(COCO_17.names) else _BY_COUNT.get(count)
    return published_keypoints(name) if name else KeypointInfo(names=[f"keypoint_{i}" for i in range(count)])


def published_keypoints(data_set: str) -> KeypointInfo:
    """The keypoints of one of `DATA_SETS`."""
    return COCO_17 if data_set == "coco" else _published()[data_set]


@functools.cache
def _published() -> dict[str, KeypointInfo]:
    """`keypoint_sets.json`: MMPose's `configs/_base_/datasets`, names, links, swaps, sigmas and colours as they stand there."""
    return msgspec.json.decode((Path(__file__).parent / "keypoint_sets.json").read_bytes(), type=dict[str, KeypointInfo])


_ALIASES: Final[Mapping[str, str]] = {"coco-wholebody-hand": "hand", "coco_wholebody": "coco-wholebody", "coco_wholebody_hand": "hand"}
"""MMDeploy's names of sets -> ours."""


def read_skeleton(text: str) -> KeypointInfo:
    """What `--skeleton` names: one of `DATA_SETS`, MMDeploy's names of them, or a text file in MMDeploy's form.

    Such a file has numbers alone: how many links, and two indices for each; how many colours, and blue, green and red of each; how many colours of links,
    and an index for each; the same of keypoints.

    Raises:
        ConfigError: no such name, and no such file.
    """
    name = _ALIASES.get(text, text)
    if name in DATA_SETS:
        return published_keypoints(name)
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"--skeleton: expected one of {', '.join(DATA_SETS)} or a file, found {text!r}", hint="leave it out: bundles know their own")
    try:
        numbers = iter([int(word) for word in path.read_text(encoding="utf-8").split()])
        rows = [[tuple(next(numbers) for _ in range(width)) for _ in range(next(numbers))] for width in (2, 3, 1, 1)]
        links, palette, of_links, of_points = rows
        for what, indices, count in (("keypoint", links, len(of_points)), ("colour", of_links + of_points, len(palette))):
            wrong = next((i for row in indices for i in row if not 0 <= i < count), None)
            if wrong is not None:
                raise ValueError(f"{what} {wrong} of {count}")  # noqa: TRY301  # said below
        rgb = [color[::-1] for color in palette]
        return KeypointInfo(
            names=[f"keypoint_{i}" for i in range(len(of_points))],
            skeleton=[(a, b) for a, b in links],
            colors=[rgb[i] for (i,) in of_points],  # type: ignore[misc]  # of three numbers each
            link_colors=[rgb[i] for (i,) in of_links],  # type: ignore[misc]
        )
    except (StopIteration, RuntimeError) as error:
        raise ConfigError(f"{path}: expected a skeleton file of MMDeploy, found: too few numbers", hint="--skeleton coco") from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: expected a skeleton file of MMDeploy, found: {error}", hint="--skeleton coco") from error


def require_count(skeleton: KeypointInfo, count: int) -> KeypointInfo:
    """The skeleton, if it has as many keypoints as a network.

    Raises:
        ConfigError: it has not.
    """
    if len(skeleton.names) != count:
        raise ConfigError(f"--skeleton: expected {count} keypoints, as the network has, found {len(skeleton.names)}", hint="leave it out")
    return skeleton
