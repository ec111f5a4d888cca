"""What the tasks return: arrays with their shapes, dtypes and frames stated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelcrate_runtime.geometry import Crop, Points, to_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Detections:
    """The objects in one image, best first.

    Attributes:
        boxes_xyxy: (N, 4) float32 left, top, right, bottom in image pixels.
        scores: (N,) float32 in 0..1.
        labels: (N,) int32 indices into the bundle's class names.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Detections:
        """The detections that a mask, an index array or a slice selects."""
        return Detections(boxes_xyxy=self.boxes_xyxy[index], scores=self.scores[index], labels=self.labels[index])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Classification:
    """The likeliest classes of one image, best first.

    Attributes:
        labels: (N,) int32 indices into the bundle's class names.
        scores: (N,) float32 probabilities.
    """

    labels: NDArray[np.int32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Poses:
    """The keypoints of the N boxes of one image, in the order of the boxes.

    Attributes:
        keypoints_xy: (N, K, 2) float32 in image pixels; a point may lie outside the image.
        scores: (N, K) float32. For SimCC heads an unnormalised maximum, usually 0..1 and sometimes above.
    """

    keypoints_xy: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tensors:
    """What a network says of the N inputs from one image, to be decoded by the caller.

    Attributes:
        outputs: output name -> (N, ...) array.
        crops: (N) how network pixels lie in the image; a whole image is one crop.
    """

    outputs: Mapping[str, NDArray[np.generic]]
    crops: list[Crop]

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """An output by its name."""
        return self.outputs[name]

    def to_image(self, points_xy: Points) -> Points:
        """Map points from the network's input to the image.

        Args:
            points_xy: (N, K, 2) float32 in network pixels. In crops, (0, 0) is the centre of the first pixel; in whole images its outer corner, as for boxes.

        Returns:
            (N, K, 2) float32 in image pixels, counted from the same point of a pixel.
        """
        return to_image(points_xy, self.crops)
