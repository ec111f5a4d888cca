"""Shape tables of published and made-up sizes, for networks that no checkpoint describes yet: training from scratch, demos, tests.

The other direction, from a checkpoint to its network, needs none of this: a checkpoint is its own shape table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from modelcrate_converter.models.cspnext import STRIDE
from modelcrate_converter.models.layers import ShapeTable

POSE_SIZES: Final[Mapping[str, tuple[float, float]]] = {"t": (0.375, 0.167), "s": (0.5, 0.33), "m": (0.75, 0.67), "l": (1.0, 1.0)}
"""RTMPose size -> (widen, deepen)."""
DETECTOR_SIZES: Final[Mapping[str, tuple[float, float]]] = {
    "nano": (0.25, 0.33),
    "tiny": (0.375, 0.167),
    "s": (0.5, 0.33),
    "m": (0.75, 0.67),
    "l": (1.0, 1.0),
    "x": (1.25, 1.33),
}
"""RTMDet size -> (widen, deepen). Nano separates its 3x3 convolutions."""
_STAGES: Final = ((64, 128, 3), (128, 256, 6), (256, 512, 6), (512, 1024, 3))
"""Arch P5: channels in, channels out, blocks."""


def rtmpose_shapes(
    *, widen: float, deepen: float, keypoints: int, input_hw: tuple[int, int], split_ratio: int = 2, hidden: int = 256, s: int = 128
) -> dict[str, tuple[int, ...]]:
    """The state dict of an RTMPose.

    Args:
        widen: factor on all widths of the backbone.
        deepen: factor on the number of blocks.
        keypoints: K.
        input_hw: (height, width) in pixels, multiples of 32.
        split_ratio: SimCC bins per pixel.
        hidden: width of a keypoint's token.
        s: width of the attention's queries and keys.
    """
    table = _backbone(widen, deepen, separable=False)
    height, width = input_hw
    expanded = 2 * hidden
    table |= {
        "head.final_layer.weight": (keypoints, int(1024 * widen), 7, 7),
        "head.final_layer.bias": (keypoints,),
        "head.mlp.0.g": (1,),
        "head.mlp.1.weight": (hidden, (height // STRIDE) * (width // STRIDE)),
        "head.gau.gamma": (2, s),
        "head.gau.beta": (2, s),
        "head.gau.o.weight": (hidden, expanded),
        "head.gau.uv.weight": (2 * expanded + s, hidden),
        "head.gau.ln.g": (1,),
        "head.gau.res_scale.scale": (hidden,),
        "head.cls_x.weight": (width * split_ratio, hidden),
        "head.cls_y.weight": (height * split_ratio, hidden),
    }
    return table


def heatmap_shapes(*, widen: float, deepen: float, keypoints: int, channels: int = 256, deconvs: int = 3) -> dict[str, tuple[int, ...]]:
    """The state dict of a CSPNeXt with heatmaps.

    Args:
        widen: factor on all widths of the backbone.
        deepen: factor on the number of blocks.
        keypoints: K.
        channels: width of the transposed convolutions.
        deconvs: how many of them; each doubles the heatmap.
    """
    table = _backbone(widen, deepen, separable=False)
    for i in range(deconvs):
        table |= {f"head.deconv_layers.{3 * i}.weight": (channels if i else int(1024 * widen), channels, 4, 4)}
        table |= {f"head.deconv_layers.{3 * i + 1}.{name}": (channels,) for name in ("weight", "bias", "running_mean", "running_var")}
        table |= {f"head.deconv_layers.{3 * i + 1}.num_batches_tracked": ()}
    return table | {"head.final_layer.weight": (keypoints, channels if deconvs else int(1024 * widen), 1, 1), "head.final_layer.bias": (keypoints,)}


def classifier_shapes(*, widen: float, deepen: float, classes: int) -> dict[str, tuple[int, ...]]:
    """The state dict of a CSPNeXt classifier.

    Args:
        widen: factor on all widths.
        deepen: factor on the number of blocks.
        classes: C.
    """
    return _backbone(widen, deepen, separable=False) | {"head.fc.weight": (classes, int(1024 * widen)), "head.fc.bias": (classes,)}


def rtmdet_shapes(*, widen: float, deepen: float, classes: int, separable: bool) -> dict[str, tuple[int, ...]]:
    """The state dict of an RTMDet.

    Args:
        widen: factor on all widths.
        deepen: factor on the number of blocks.
        classes: C.
        separable: whether 3x3 convolutions are depthwise-separable, as in nano.
    """
    table = _backbone(widen, deepen, separable=separable)
    c3, c4, c5 = (int(c * widen) for c in (256, 512, 1024))
    blocks = max(round(3 * deepen), 1)
    table |= _conv("neck.reduce_layers.0", c4, c5, 1) | _conv("neck.reduce_layers.1", c3, c4, 1)
    table |= _csp("neck.top_down_blocks.0", c4, 2 * c4, blocks, separable=separable, attention=False)
    table |= _csp("neck.top_down_blocks.1", c3, 2 * c3, blocks, separable=separable, attention=False)
    table |= _conv3("neck.downsamples.0", c3, c3, separable=separable) | _conv3("neck.downsamples.1", c4, c4, separable=separable)
    table |= _csp("neck.bottom_up_blocks.0", c4, 2 * c3, blocks, separable=separable, attention=False)
    table |= _csp("neck.bottom_up_blocks.1", c5, 2 * c4, blocks, separable=separable, attention=False)
    for level, channels in enumerate((c3, c4, c5)):
        table |= _conv3(f"neck.out_convs.{level}", c3, channels, separable=separable)
        for stack in ("cls_convs", "reg_convs"):
            for i in range(2):
                table |= _conv3(f"bbox_head.{stack}.{level}.{i}", c3, c3, separable=separable)
        for name, out in (("rtm_cls", classes), ("rtm_reg", 4)):
            table |= {f"bbox_head.{name}.{level}.weight": (out, c3, 1, 1), f"bbox_head.{name}.{level}.bias": (out,)}
    return table


def random_weights(table: ShapeTable, *, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations in range, for networks that are run but not trained: the same seed gives the same weights.

    Convolutions and linear layers are normal with variance 2 / fan-in, BatchNorm near the identity; RTMDet's predictors start near a score of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for key, shape in table.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.zeros(shape, dtype=torch.int64)
        elif key.endswith(("running_var", ".g", "gamma", "scale")) or (key.endswith("weight") and len(shape) == 1):
            weights[key] = 0.5 + torch.rand(shape, generator=generator)
        elif len(shape) <= 1 or key.endswith("beta"):
            weights[key] = 0.1 * torch.randn(shape, generator=generator)
        else:
            weights[key] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        if "rtm_cls" in key and key.endswith("bias"):
            weights[key] -= 2.2
        if "rtm_reg" in key and key.endswith("bias"):
            weights[key] += 2.0
        if "conv2.pointwise_conv.bn.weight" in key:
            weights[key] *= 0.3
        if key in {"head.cls_x.weight", "head.cls_y.weight"}:
            weights[key] *= 0.0003  # the squared attention kernel of random weights is large
    for key in list(weights):  # the levels of a head that is not separable share their convolutions
        if key.startswith(("bbox_head.cls_convs.", "bbox_head.reg_convs.")) and key.endswith(".conv.weight") and "wise" not in key:
            stack, _, rest = key.removeprefix("bbox_head.").split(".", 2)
            weights[key] = weights[f"bbox_head.{stack}.0.{rest}"]
    return weights


def _backbone(widen: float, deepen: float, *, separable: bool) -> dict[str, tuple[int, ...]]:
    stem = int(64 * widen // 2)
    table = _conv("backbone.stem.0", stem, 3, 3) | _conv("backbone.stem.1", stem, stem, 3) | _conv("backbone.stem.2", int(64 * widen), stem, 3)
    for number, (fan_in, fan_out, blocks) in enumerate(_STAGES, start=1):
        channels, out = int(fan_in * widen), int(fan_out * widen)
        prefix = f"backbone.stage{number}"
        table |= _conv3(f"{prefix}.0", out, channels, separable=separable)
        is_last = number == len(_STAGES)
        if is_last:
            table |= _conv(f"{prefix}.1.conv1", out // 2, out, 1) | _conv(f"{prefix}.1.conv2", out, out // 2 * 4, 1)
        table |= _csp(f"{prefix}.{2 if is_last else 1}", out, out, max(round(blocks * deepen), 1), separable=separable, attention=True)
    return table


def _conv(prefix: str, out: int, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {f"{prefix}.conv.weight": (out, channels, kernel, kernel)}
    table |= {f"{prefix}.bn.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")}
    return table | {f"{prefix}.bn.num_batches_tracked": ()}


def _separable(prefix: str, out: int, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return _conv(f"{prefix}.depthwise_conv", channels, 1, kernel) | _conv(f"{prefix}.pointwise_conv", out, channels, 1)


def _conv3(prefix: str, out: int, channels: int, *, separable: bool) -> dict[str, tuple[int, ...]]:
    return _separable(prefix, out, channels, 3) if separable else _conv(prefix, out, channels, 3)


def _csp(prefix: str, out: int, channels: int, blocks: int, *, separable: bool, attention: bool) -> dict[str, tuple[int, ...]]:
    half = out // 2
    table = _conv(f"{prefix}.main_conv", half, channels, 1) | _conv(f"{prefix}.short_conv", half, channels, 1) | _conv(f"{prefix}.final_conv", out, 2 * half, 1)
    for i in range(blocks):
        table |= _conv3(f"{prefix}.blocks.{i}.conv1", half, half, separable=separable) | _separable(f"{prefix}.blocks.{i}.conv2", half, half, 5)
    if attention:
        table |= {f"{prefix}.attention.fc.weight": (2 * half, 2 * half, 1, 1), f"{prefix}.attention.fc.bias": (2 * half,)}
    return table
