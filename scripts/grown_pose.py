"""The demo's pose estimator in the size of RTMPose-m: the same results from a network that costs what the published one does.

Function-preserving growth (Net2Net, Chen et al. 2016): the trained channels stay, those beside them are zero, and so are the blocks behind them, which pass
on what they get. A dense kernel multiplies zeros as slowly as anything else. So trackers can be timed on a video that means something, at a size that people use.
The blocks of the last stage have no shortcut that would pass anything on: there the smaller network's one block stays alone, 3 % fewer multiply-adds than RTMPose-m.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modelcrate_converter.models.blueprints import POSE_SIZES, rtmpose_shapes


def grown(weights: Mapping[str, Tensor], size: str) -> dict[str, Tensor]:
    """The weights of an RTMPose in a larger size.

    Args:
        weights: of a smaller one for 17 keypoints at 256x192, with the same head.
        size: t, s, m or l.

    Raises:
        ValueError: it is no smaller one.
    """
    widen, deepen = POSE_SIZES[size]
    found = {}
    for key, shape in rtmpose_shapes(widen=widen, deepen=deepen, keypoints=17, input_hw=(256, 192)).items():
        if key.startswith("backbone.stage4.2.blocks.") and key not in weights:
            continue
        source = weights.get(key)
        target = torch.ones(shape) if key.endswith(("bn.weight", "running_var")) else torch.zeros(shape)
        if source is not None:
            if source.dim() != len(shape) or any(ours > theirs for ours, theirs in zip(source.shape, shape, strict=True)):
                raise ValueError(f"{key}: expected at most {shape}, found {tuple(source.shape)}")
            target[tuple(_places(key, axis, source.shape[axis], shape[axis], len(shape)) for axis in range(len(shape)))] = source.float()
        found[key] = target.to(source.dtype) if source is not None else target
        if key.endswith("num_batches_tracked"):
            found[key] = torch.zeros(shape, dtype=torch.int64)
    return found


def _places(key: str, axis: int, ours: int, theirs: int, axes: int) -> Tensor:
    """Where the channels of an axis go. What is concatenated keeps its parts: two behind a CSP's branches, four behind the pyramid of poolings."""
    parts = 1
    if ".attention.fc." in key or (".final_conv.conv." in key and axis == 1):
        parts = 2
    elif ".stage4.1.conv2.conv." in key and axis == 1:
        parts = 4
    if axis > 1:
        parts = 1
    each, room = ours // parts, theirs // parts
    places = torch.cat([torch.arange(each) + part * room for part in range(parts)])
    return places.reshape([-1 if i == axis else 1 for i in range(axes)])


def write_grown(checkpoint: Path, size: str, place: Path) -> Path:
    """A checkpoint in a larger size, with all that the other one says of itself."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    torch.save(content | {"state_dict": grown(content["state_dict"], size)}, place)
    return place
