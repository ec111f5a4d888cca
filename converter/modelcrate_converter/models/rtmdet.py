"""RTMDet: CSPNeXt, PAFPN and the separate-BatchNorm head, down to its raw outputs."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from modelcrate_converter.models.cspnext import CSPNeXt, CSPNeXtPAFPN
from modelcrate_converter.models.layers import Shapes, ShapeTable, conv_module

STRIDES: Final = (8, 16, 32)
"""Input pixels per cell, per level."""
OUTPUT_NAMES: Final = ("cls_0", "cls_1", "cls_2", "dist_0", "dist_1", "dist_2")
"""Class maps sort before distance maps: MMDeploy's host-side head takes its tensors in lexicographic order."""


class RTMDetSepBNHead(nn.Module):
    """Two stacks of convolutions per level. All models but nano share the weights of the convolutions, not of the BatchNorms, between the levels.

    Source: MMDetection 3.3 `mmdet/models/dense_heads/rtmdet_head.py`.
    """

    def __init__(self, shapes: Shapes, *, share_conv: bool, exp_on_reg: bool) -> None:
        super().__init__()
        self.cls_convs = _stacks(shapes / "cls_convs", share_conv=share_conv)
        self.reg_convs = _stacks(shapes / "reg_convs", share_conv=share_conv)
        self.rtm_cls = _predictors(shapes / "rtm_cls")
        self.rtm_reg = _predictors(shapes / "rtm_reg")
        self.exp_on_reg = exp_on_reg

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Per level (N, C, h, w) class logits, then per level (N, 4, h, w) distances left, top, right, bottom in input pixels."""
        logits, distances = [], []
        for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
            logits.append(self.rtm_cls[level](self.cls_convs[level](feature)))
            raw = self.rtm_reg[level](self.reg_convs[level](feature))
            distances.append((raw.exp() if self.exp_on_reg else raw) * stride)
        return (*logits, *distances)


class RTMDet(nn.Module):
    """The detector, from a normalised image to raw class logits and distances.

    Attributes:
        num_classes: C.
    """

    def __init__(self, table: ShapeTable, *, share_conv: bool, exp_on_reg: bool) -> None:
        """Build from a checkpoint's shapes.

        Args:
            table: state-dict key -> shape.
            share_conv: whether the levels of the head share their convolutions.
            exp_on_reg: whether distances are exponentiated.
        """
        super().__init__()
        shapes = Shapes(table)
        self.backbone = CSPNeXt(shapes / "backbone")
        self.neck = CSPNeXtPAFPN(shapes / "neck")
        self.bbox_head = RTMDetSepBNHead(shapes / "bbox_head", share_conv=share_conv, exp_on_reg=exp_on_reg)
        self.num_classes = shapes["bbox_head.rtm_cls.0.weight"][0]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the raw head.

        Args:
            x: (N, 3, H, W) normalised BGR image; H and W multiples of 32.

        Returns:
            Six tensors, named by `OUTPUT_NAMES`.
        """
        return self.bbox_head(self.neck(self.backbone(x)))  # type: ignore[no-any-return]


def _stacks(shapes: Shapes, *, share_conv: bool) -> nn.ModuleList:
    depth = len(list((shapes / 0).indices()))
    levels = [
        [conv_module(shapes / level / i) for i in (shapes / level).require(indices=depth).indices()] for level in shapes.require(indices=len(STRIDES)).indices()
    ]
    if share_conv:
        for modules in levels[1:]:
            for module, first in zip(modules, levels[0], strict=True):
                module.conv = first.conv  # pyright: ignore[reportAttributeAccessIssue]  # both are ConvModules: separable heads do not share
    return nn.ModuleList(nn.Sequential(*modules) for modules in levels)


def _predictors(shapes: Shapes) -> nn.ModuleList:
    convs = []
    for level in shapes.require(indices=len(STRIDES)).indices():
        out, channels, kernel, _ = (shapes / level)["weight"]
        convs.append(nn.Conv2d(channels, out, kernel, padding=kernel // 2))
    return nn.ModuleList(convs)
