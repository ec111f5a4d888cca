"""RTMPose: CSPNeXt and the RTMCC head, from a normalised crop to SimCC vectors."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelcrate_converter.models.cspnext import CSPNeXt
from modelcrate_converter.models.layers import Shapes, ShapeTable

OUTPUT_NAMES: Final = ("simcc_x", "simcc_y")


class ScaleNorm(nn.Module):
    """x / max(||x|| * d^-0.5, eps) * g over the last axis.

    Source: Nguyen and Salazar, "Transformers without Tears" (2019), as MMPose 1.3 `scale_norm.py` has it.
    """

    def __init__(self, shapes: Shapes, *, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.eps = 1e-5
        self.g = nn.Parameter(torch.ones(shapes.expect("g", (1,))))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        normalized: Tensor = x / norm.clamp(min=self.eps) * self.g
        return normalized


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, shapes: Shapes, *, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shapes.expect("scale", (dim,))))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return x * self.scale


class GatedAttentionUnit(nn.Module):
    """Self-attention with a squared-ReLU kernel and a gate (Hua et al., "Transformer Quality in Linear Time", 2022; MMPose `RTMCCBlock`)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        out, expanded = shapes["o.weight"]
        doubled, width = shapes["uv.weight"]
        self.s = doubled - 2 * expanded
        self.e = expanded
        self.gamma = nn.Parameter(torch.ones(shapes.expect("gamma", (2, self.s))))
        self.beta = nn.Parameter(torch.zeros(shapes.expect("beta", (2, self.s))))
        self.uv = nn.Linear(width, doubled, bias=False)
        self.o = nn.Linear(expanded, out, bias=False)
        self.ln = ScaleNorm(shapes / "ln", dim=width)
        shapes.expect("o.weight", (width, expanded))  # upstream has a shortcut only around equal widths, and RTMPose always has it
        self.res_scale = Scale(shapes / "res_scale", dim=width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, d) tokens -> (N, K, d')."""
        u, v, base = torch.split(F.silu(self.uv(self.ln(x))), [self.e, self.e, self.s], dim=2)
        q, k = torch.unbind(base.unsqueeze(2) * self.gamma[None, None] + self.beta, dim=2)
        kernel = F.relu(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(self.s)).square()
        return self.o(u * torch.bmm(kernel, v)) + self.res_scale(x)  # type: ignore[no-any-return]


class RTMCCHead(nn.Module):
    """A large-kernel convolution to one map per keypoint, one token per keypoint, a GAU over the tokens, two classifiers.

    Source: Jiang et al., "RTMPose: Real-Time Multi-Person Pose Estimation based on MMPose" (2023); MMPose 1.3 `rtmcc_head.py`.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        keypoints, channels, kernel, _ = shapes["final_layer.weight"]
        hidden, flattened = shapes["mlp.1.weight"]
        self.final_layer = nn.Conv2d(channels, keypoints, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(ScaleNorm(shapes / "mlp" / 0, dim=flattened), nn.Linear(flattened, hidden, bias=False))
        self.gau = GatedAttentionUnit(shapes / "gau")
        self.cls_x = nn.Linear(hidden, shapes["cls_x.weight"][0], bias=False)
        self.cls_y = nn.Linear(hidden, shapes["cls_y.weight"][0], bias=False)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H/32, W/32) -> (N, K, W * ratio) and (N, K, H * ratio) logits."""
        tokens = self.gau(self.mlp(torch.flatten(self.final_layer(feature), 2)))
        return self.cls_x(tokens), self.cls_y(tokens)


class RTMPose(nn.Module):
    """The pose estimator, from a normalised crop to SimCC logits.

    Attributes:
        num_keypoints: K.
    """

    def __init__(self, table: ShapeTable) -> None:
        """Build from a checkpoint's shapes: state-dict key -> shape."""
        super().__init__()
        shapes = Shapes(table)
        self.backbone = CSPNeXt(shapes / "backbone")
        self.head = RTMCCHead(shapes / "head")
        self.num_keypoints = shapes["head.final_layer.weight"][0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the SimCC vectors.

        Args:
            x: (N, 3, H, W) normalised RGB crop, of the size that the checkpoint was trained for.

        Returns:
            simcc_x (N, K, W * ratio) and simcc_y (N, K, H * ratio).
        """
        return self.head(self.backbone(x)[-1])  # type: ignore[no-any-return]
