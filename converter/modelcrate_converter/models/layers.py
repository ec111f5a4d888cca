"""The building blocks of CSPNeXt networks, built from the shapes of their weights.

Every module is constructed from a `Shapes` view of a state dict's key -> shape table, so that whatever widths a checkpoint has (scaled, pruned)
are the widths of the module: nothing is configured twice. Attribute names are upstream's, so that `load_state_dict` is strict.

Source: MMDetection 3.3 `CSPNeXt`, `CSPLayer`, `SPPBottleneck`, `ChannelAttention`; Lyu et al., "RTMDet: An Empirical Study of Designing
Real-Time Object Detectors" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from modelcrate_bundle.errors import ArchitectureError

ShapeTable: TypeAlias = Mapping[str, tuple[int, ...]]
"""State-dict key -> tensor shape."""

BATCH_NORM_EPS: Final = 1e-5
"""All RTMPose and RTMDet configs override the class default of 1e-3 with a BatchNorm that has this."""


class Shapes:
    """The part of a shape table under one prefix."""

    def __init__(self, table: ShapeTable, prefix: str = "") -> None:
        self._table = table
        self._prefix = prefix

    def require(self, *, indices: int) -> Shapes:
        """The same view, after a look that it has just the parts 0 to `indices` - 1.

        Raises:
            ArchitectureError: it has others.
        """
        found = sorted({key.removeprefix(self._prefix).partition(".")[0] for key in self._table if key.startswith(self._prefix)})
        if found != [str(i) for i in range(indices)]:
            raise ArchitectureError(
                f"checkpoint: {self._prefix[:-1]}: expected {indices} parts, found {', '.join(found) or 'none'}", hint="is the checkpoint whole?"
            )
        return self

    def expect(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor that can only have one.

        Raises:
            ArchitectureError: it has another.
        """
        if self[key] != shape:
            raise ArchitectureError(f"checkpoint: {self._prefix}{key}: expected shape {shape}, found {self[key]}", hint="is the checkpoint whole?")
        return shape

    def __truediv__(self, name: str | int) -> Shapes:
        """The part under `name`."""
        return Shapes(self._table, f"{self._prefix}{name}.")

    def __getitem__(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ArchitectureError: it is not in the checkpoint.
        """
        full = self._prefix + key
        if full not in self._table:
            raise ArchitectureError(f"checkpoint: expected the tensor {full}, found none", hint="is this a checkpoint of RTMPose or RTMDet?")
        return self._table[full]

    def __contains__(self, name: str) -> bool:
        """Whether a tensor, or any tensor under that name, exists."""
        full = self._prefix + name
        return full in self._table or any(key.startswith(full + ".") for key in self._table)

    def indices(self) -> Iterator[int]:
        """The consecutive numbers 0, 1, ... under this prefix."""
        i = 0
        while str(i) in self:
            yield i
            i += 1


class ConvModule(nn.Module):
    """Conv2d without bias, BatchNorm2d, SiLU. The kernel is padded to keep the size."""

    def __init__(self, shapes: Shapes, *, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        out, per_group, kernel, _ = shapes["conv.weight"]
        self.conv = nn.Conv2d(out if depthwise else per_group, out, kernel, stride, kernel // 2, groups=out if depthwise else 1, bias=False)
        self.bn = nn.BatchNorm2d(shapes["bn.weight"][0], eps=BATCH_NORM_EPS)
        self.activate = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        return self.activate(self.bn(self.conv(x)))  # type: ignore[no-any-return]


class DepthwiseSeparableConvModule(nn.Module):
    """A depthwise ConvModule, then a pointwise one."""

    def __init__(self, shapes: Shapes, *, stride: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(shapes / "depthwise_conv", stride=stride, depthwise=True)
        self.pointwise_conv = ConvModule(shapes / "pointwise_conv")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        return self.pointwise_conv(self.depthwise_conv(x))  # type: ignore[no-any-return]


def conv_module(shapes: Shapes, *, stride: int = 1) -> ConvModule | DepthwiseSeparableConvModule:
    """Whichever of the two the checkpoint has here (RTMDet-nano separates its 3x3 convolutions)."""
    if "depthwise_conv" in shapes:
        return DepthwiseSeparableConvModule(shapes, stride=stride)
    return ConvModule(shapes, stride=stride)


class CSPNeXtBlock(nn.Module):
    """3x3 convolution, 5x5 depthwise-separable convolution, and the identity where `add_identity` says so."""

    def __init__(self, shapes: Shapes, *, add_identity: bool) -> None:
        super().__init__()
        self.conv1 = conv_module(shapes / "conv1")
        self.conv2 = DepthwiseSeparableConvModule(shapes / "conv2")
        self.add_identity = add_identity

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out = self.conv2(self.conv1(x))
        return out + x if self.add_identity else out  # type: ignore[no-any-return]


class ChannelAttention(nn.Module):
    """A gate per channel from the mean of each channel."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        out, channels, _, _ = shapes["fc.weight"]
        shapes.expect("fc.weight", (channels, channels, 1, 1))  # one gate would broadcast
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(channels, out, 1)
        self.act = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * self.act(self.fc(self.global_avgpool(x)))  # type: ignore[no-any-return]


class CSPLayer(nn.Module):
    """Cross-stage-partial layer: blocks on one half of the channels, the other half goes around them."""

    def __init__(self, shapes: Shapes, *, add_identity: bool, attention: bool) -> None:
        super().__init__()
        self.main_conv = ConvModule(shapes / "main_conv")
        self.short_conv = ConvModule(shapes / "short_conv")
        self.final_conv = ConvModule(shapes / "final_conv")
        blocks = shapes / "blocks"
        for i in blocks.indices() if add_identity else ():  # one channel would broadcast
            blocks.expect(f"{i}.conv2.pointwise_conv.bn.weight", shapes["main_conv.bn.weight"])
        self.blocks = nn.Sequential(*(CSPNeXtBlock(blocks / i, add_identity=add_identity) for i in blocks.indices()))
        self.attention = ChannelAttention(shapes / "attention") if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        joined = torch.cat((self.blocks(self.main_conv(x)), self.short_conv(x)), dim=1)
        if self.attention is not None:
            joined = self.attention(joined)
        return self.final_conv(joined)  # type: ignore[no-any-return]


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling: the input beside its maxima over 5x5, 9x9 and 13x13.

    The maxima over 5x5 of maxima over 5x5 are those over 9x9, to the bit, at a third of the comparisons.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv1 = ConvModule(shapes / "conv1")
        self.pooling = nn.MaxPool2d(5, stride=1, padding=2)
        self.conv2 = ConvModule(shapes / "conv2")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W)."""
        maxima = [self.conv1(x)]
        for _ in range(3):
            maxima.append(self.pooling(maxima[-1]))
        return self.conv2(torch.cat(maxima, dim=1))  # type: ignore[no-any-return]
