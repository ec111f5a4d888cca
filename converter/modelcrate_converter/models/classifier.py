"""Image classifiers: CSPNeXt, the mean of its last feature map, one linear layer, softmax."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from modelcrate_converter.models.cspnext import CSPNeXt
from modelcrate_converter.models.layers import Shapes, ShapeTable

OUTPUT_NAMES: Final = ("output",)


class LinearClsHead(nn.Module):
    """Source: MMPretrain 1.2 `linear_head.py`, behind its `GlobalAveragePooling` neck, which has no weights."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        classes, channels = shapes["fc.weight"]
        self.fc = nn.Linear(channels, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, classes) logits."""
        return self.fc(feature.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class ImageClassifier(nn.Module):
    """The classifier, from a normalised image to probabilities.

    Attributes:
        num_classes: C.
    """

    def __init__(self, table: ShapeTable) -> None:
        """Build from a checkpoint's shapes: state-dict key -> shape."""
        super().__init__()
        shapes = Shapes(table)
        self.backbone = CSPNeXt(shapes / "backbone")
        self.head = LinearClsHead(shapes / "head")
        self.num_classes = shapes["head.fc.weight"][0]

    def logits(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) normalised RGB image -> (N, classes) logits."""
        return self.head(self.backbone(x)[-1])  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W) normalised RGB image -> (N, classes) probabilities, as a tuple of one: MMDeploy's SDK expects them behind the softmax."""
        return (F.softmax(self.logits(x), dim=1),)
