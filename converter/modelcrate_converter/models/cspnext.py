"""The CSPNeXt backbone and the CSPNeXt-PAFPN neck, in upstream's state-dict names."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from modelcrate_converter.models.layers import ConvModule, CSPLayer, Shapes, SPPBottleneck, conv_module

STRIDE: Final = 32
"""Input pixels per cell of the last feature map."""


class CSPNeXt(nn.Module):
    """Backbone, arch P5: a stem and four stages that each halve the size.

    Source: MMDetection 3.3 `mmdet/models/backbones/cspnext.py`.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        stem = (shapes / "stem").require(indices=3)
        self.stem = nn.Sequential(*(ConvModule(stem / i, stride=2 if i == 0 else 1) for i in stem.indices()))
        for number in range(1, 5):
            stage = shapes / f"stage{number}"
            has_pooling = "conv1" in stage / 1
            layers: list[nn.Module] = [conv_module(stage / 0, stride=2)]
            if has_pooling:
                layers.append(SPPBottleneck(stage / 1))
            # Upstream adds the identity in all stages but the one that pools.
            layers.append(CSPLayer(stage / len(layers), add_identity=not has_pooling, attention=True))
            self.add_module(f"stage{number}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the feature maps at strides 8, 16 and 32.

        Args:
            x: (N, 3, H, W) normalised image; H and W multiples of 32.

        Returns:
            (N, C3, H/8, W/8), (N, C4, H/16, W/16), (N, C5, H/32, W/32).
        """
        x = self.get_submodule("stage1")(self.stem(x))
        c3 = self.get_submodule("stage2")(x)
        c4 = self.get_submodule("stage3")(c3)
        return c3, c4, self.get_submodule("stage4")(c4)


class CSPNeXtPAFPN(nn.Module):
    """Path-aggregation neck: once from coarse to fine, once back.

    Source: MMDetection 3.3 `mmdet/models/necks/cspnext_pafpn.py`.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        parts = {name: shapes / name for name in ("reduce_layers", "top_down_blocks", "downsamples", "bottom_up_blocks", "out_convs")}
        for name, part in parts.items():
            part.require(indices=3 if name == "out_convs" else 2)
        self.reduce_layers = nn.ModuleList(ConvModule(parts["reduce_layers"] / i) for i in parts["reduce_layers"].indices())
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top_down_blocks = nn.ModuleList(
            CSPLayer(parts["top_down_blocks"] / i, add_identity=False, attention=False) for i in parts["top_down_blocks"].indices()
        )
        self.downsamples = nn.ModuleList(conv_module(parts["downsamples"] / i, stride=2) for i in parts["downsamples"].indices())
        self.bottom_up_blocks = nn.ModuleList(
            CSPLayer(parts["bottom_up_blocks"] / i, add_identity=False, attention=False) for i in parts["bottom_up_blocks"].indices()
        )
        self.out_convs = nn.ModuleList(conv_module(parts["out_convs"] / i) for i in parts["out_convs"].indices())

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Three maps in, finest first, three maps of equal width out, in the same order and of the same sizes."""
        coarse = features[-1]
        tops: list[Tensor] = []  # coarsest first
        for reduce, block, fine in zip(self.reduce_layers, self.top_down_blocks, reversed(features[:-1]), strict=True):
            reduced = reduce(coarse)
            tops.append(reduced)
            coarse = block(torch.cat((self.upsample(reduced), fine), dim=1))
        outs = [coarse]
        for downsample, block, top in zip(self.downsamples, self.bottom_up_blocks, reversed(tops), strict=True):
            outs.append(block(torch.cat((downsample(outs[-1]), top), dim=1)))
        return tuple(conv(out) for conv, out in zip(self.out_convs, outs, strict=True))
