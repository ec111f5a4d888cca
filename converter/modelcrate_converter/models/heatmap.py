"""Heatmap pose estimators: CSPNeXt, three transposed convolutions and one map per keypoint."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from modelcrate_converter.models.cspnext import CSPNeXt
from modelcrate_converter.models.layers import Shapes, ShapeTable

OUTPUT_NAMES: Final = ("output",)


class HeatmapHead(nn.Module):
    """Transposed convolutions that each double the size, with BatchNorm and ReLU, then one 1x1 convolution.

    Source: Xiao et al., "Simple Baselines for Human Pose Estimation and Tracking" (2018); MMPose 1.3 `heatmap_head.py`.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        deconv = shapes / "deconv_layers"
        while str(len(layers)) in deconv:
            channels, out, kernel, _ = (deconv / len(layers))["weight"]
            # The padding that doubles the size: upstream's for kernels of 2, 3 and 4.
            padding = {4: 1, 3: 1, 2: 0}.get(kernel, (kernel - 1) // 2)
            layers += [
                nn.ConvTranspose2d(channels, out, kernel, stride=2, padding=padding, output_padding=1 if kernel == 3 else 0, bias=False),
                nn.BatchNorm2d((deconv / (len(layers) + 1)).expect("weight", (out,))[0]),
                nn.ReLU(inplace=True),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        keypoints, channels, kernel, _ = shapes["final_layer.weight"]
        self.final_layer = nn.Conv2d(channels, keypoints, kernel, padding=kernel // 2)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, K, 8 h, 8 w) with three transposed convolutions."""
        return self.final_layer(self.deconv_layers(feature))  # type: ignore[no-any-return]


class HeatmapPose(nn.Module):
    """The pose estimator, from a normalised crop to heatmaps.

    Attributes:
        upscaling: heatmap cells per cell of the last feature map, along each axis.
    """

    def __init__(self, table: ShapeTable) -> None:
        """Build from a checkpoint's shapes: state-dict key -> shape."""
        super().__init__()
        shapes = Shapes(table)
        self.backbone = CSPNeXt(shapes / "backbone")
        self.head = HeatmapHead(shapes / "head")
        self.upscaling = int(2 ** (len(self.head.deconv_layers) // 3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Compute the heatmaps.

        Args:
            x: (N, 3, H, W) normalised RGB crop.

        Returns:
            (N, K, H / 4, W / 4) with three transposed convolutions, as a tuple of one.
        """
        return (self.head(self.backbone(x)[-1]),)
