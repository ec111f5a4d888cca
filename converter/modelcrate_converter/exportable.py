"""What is converted, wherever it comes from: a network with everything that a bundle must say of it.

`architecture` makes one from a checkpoint of a family that is known here, `own_model` from anybody's network and a spec.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from modelcrate_bundle.errors import ArchitectureError, BundleError, ExportError
from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_runtime.sessions import Session, SessionOptions, open_artefact


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """(pixel - mean) / std per channel in image levels, after a swap to RGB if `to_rgb`; mean and std are in the order after the swap."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFit:
    """How a whole image becomes the network's input size.

    Attributes:
        mode: "stretch" gives up the ratio of the sides; "letterbox" keeps it and fills the right and the bottom, "letterbox-center" fills around;
            "shorter-edge" keeps it and cuts the middle out.
        edge: what the shorter edge becomes in pixels before the cut; 0 for the other modes.
        pad_value: image level beside a letterboxed image.
        interpolation: OpenCV's: nearest, bilinear, bicubic, area, lanczos.
        resampling: "pillow-bilinear" or "pillow-bicubic" where upstream resizes with Pillow; None for OpenCV.
    """

    mode: Literal["stretch", "letterbox", "letterbox-center", "shorter-edge"]
    edge: int = 0
    pad_value: int = 0
    interpolation: str = "bilinear"
    resampling: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorFacts:
    """How RTMDet's outputs become boxes.

    Attributes:
        pad_value: image level beside the letterboxed image.
        score_thr: scores at or below it are dropped.
        iou_threshold: boxes of one class that overlap more are dropped.
        max_per_img: boxes that are kept.
        nms_pre: candidates per level that MMDetection keeps (recorded; no runtime needs it).
        min_bbox_size: image pixels.
    """

    pad_value: int
    score_thr: float
    iou_threshold: float
    max_per_img: int
    nms_pre: int
    min_bbox_size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PoseFacts:
    """How a box becomes a crop, and SimCC vectors keypoints.

    Attributes:
        padding: factor on both sides of the box.
        use_udp: whether the crop follows UDP.
        split_ratio: SimCC bins per network pixel.
        sigma: label width in bins, (x, y); recorded.
    """

    padding: float
    use_udp: bool
    split_ratio: float
    sigma: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapFacts:
    """How a box becomes a crop, and heatmaps keypoints.

    Attributes:
        padding: factor on both sides of the box.
        use_udp: whether the crop follows UDP.
        is_udp_codec: whether the outer cells of a heatmap lie on the edges of the crop, and the UDP variant of DARK refines.
        unbiased: whether a codec that is not UDP refines with DARK.
        blur_kernel_size: side of that refinement's blur, in cells.
        sigma: of the Gaussians that were learned, in cells; recorded.
        heatmap_wh: (width, height) in cells.
    """

    padding: float
    use_udp: bool
    is_udp_codec: bool
    unbiased: bool
    blur_kernel_size: int
    sigma: float
    heatmap_wh: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierFacts:
    """How an image becomes the input of a classifier, and how many classes are answered.

    Attributes:
        fit: how the image becomes the input size.
        topk: classes in an answer.
        softmax: whether the network's scores go through a softmax first.
    """

    fit: ImageFit
    topk: int
    softmax: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxesFacts:
    """A detector whose own graph ends in boxes: `dets` (N, n, 5), left, top, right, bottom in network pixels and score, and `labels` (N, n).

    Attributes:
        fit: how the image becomes the input size.
        score_thr: scores at or below it are dropped.
    """

    fit: ImageFit
    score_thr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionFacts:
    """Keypoints (N, K, 2) as fractions of the network's input.

    Attributes:
        padding: factor on both sides of the box.
        use_udp: whether the crop follows UDP.
    """

    padding: float
    use_udp: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RawFacts:
    """Tensors that the caller decodes.

    Attributes:
        fit: how a whole image becomes the input size; None for crops.
        padding: factor on both sides of the box of a crop.
        use_udp: whether the crop follows UDP.
    """

    fit: ImageFit | None
    padding: float = 1.0
    use_udp: bool = False


class OnnxNetwork(nn.Module):
    """An ONNX file as it was given, with the face of a module: ONNX Runtime runs it as it stands, without optimising it.

    Attributes:
        path: the file.
        outputs: names of the outputs that are wanted, in this order.
    """

    def __init__(self, path: Path, *, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.path = path
        self.outputs = outputs

    @functools.cached_property
    def _session(self) -> Session:
        try:
            return open_artefact("onnxruntime", {"net": self.path}, SessionOptions(optimize=False), where=str(self.path))
        except BundleError as error:  # it is not in a bundle yet
            raise ExportError(str(error), hint="it must have standard operators only, of an opset that the installed ONNX Runtime knows") from error

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, C, H, W) float32 -> the outputs."""
        session = self._session
        values = session.run({session.inputs[0].name: x.numpy()})
        return tuple(torch.from_numpy(values[name]) for name in self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportableModel:
    """A network in eval mode with everything that a bundle must say of it.

    Attributes:
        name: "rtmpose-t", "rtmdet-nano" ... or what the user calls it.
        task: MMDeploy's name of the task; "Network" for tensors that the caller decodes, which MMDeploy does not have.
        sdk_name: the network's name in MMDeploy's JSON.
        module: float32, eval mode, on the CPU; gives a tuple of tensors.
        reference: what the artefact is compared with: "PyTorch", or the file that was given.
        input: (batch, C, H, W) float32; C is 3, or 1 for grey.
        outputs: in the module's order; the batch axis is dynamic if the input's is.
        normalization: how pixels become input values.
        postprocess: the task's facts.
        class_names: label -> name; empty for pose models.
        keypoints: what the keypoints are; None where there are none.
        facts: what the shapes cannot say -> where it was taken from.
        checkpoint: file name and SHA-256.
        is_code: whether somebody's code made it, so that the hash of the weights does not say all.
    """

    name: str
    task: Literal["Detector", "PoseDetector", "Classifier", "Network"]
    sdk_name: str
    module: nn.Module
    reference: str = "PyTorch"
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    normalization: Normalization
    postprocess: DetectorFacts | PoseFacts | HeatmapFacts | ClassifierFacts | BoxesFacts | RegressionFacts | RawFacts
    class_names: list[str]
    keypoints: KeypointInfo | None
    facts: dict[str, str]
    checkpoint: tuple[str, str]
    is_code: bool = False

    @property
    def input_hw(self) -> tuple[int, int]:
        """Network input (height, width) in pixels."""
        height, width = self.input.shape[2:]
        assert isinstance(height, int)
        assert isinstance(width, int)
        return height, width

    @property
    def fixed_batch(self) -> int | None:
        """Inputs that every call must have; None where any number will do."""
        first = self.input.shape[0]
        return first if isinstance(first, int) else None

    @property
    def is_top_down(self) -> bool:
        """Whether an input is a crop around a box."""
        return self.task == "PoseDetector" or (isinstance(self.postprocess, RawFacts) and self.postprocess.fit is None)

    @property
    def resampling(self) -> str | None:
        """How exact geometry resizes, where pipeline.json cannot say it."""
        fit = getattr(self.postprocess, "fit", None)
        return fit.resampling if isinstance(fit, ImageFit) else None

    @property
    def parameter_count(self) -> int:
        """Weights of the network."""
        if isinstance(self.module, OnnxNetwork):
            import onnx

            proto = onnx.load(self.module.path, load_external_data=False)
            return sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)
        return sum(parameter.numel() for parameter in self.module.parameters())


def load_weights(module: nn.Module, state: Mapping[str, torch.Tensor], *, path: Path) -> nn.Module:
    """Load all weights, and put the network into eval mode.

    Args:
        module: the network.
        state: key -> tensor.
        path: where they come from, for messages.

    Raises:
        ArchitectureError: keys or shapes that differ, in one sentence.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    missing = sorted(key for key in expected.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    surplus = sorted(state.keys() - expected.keys())
    if missing or surplus:
        what = [f"{len(keys)} {word} ({', '.join(keys[:3])})" for word, keys in (("missing", missing), ("not of this network", surplus)) if keys]
        raise ArchitectureError(
            f"{path}: expected the tensors of {type(module).__name__}, found {' and '.join(what)}", hint="is the checkpoint whole, and of the stated family?"
        )
    try:
        module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # shapes that differ
        text = " ".join(str(error).split())[:300]
        raise ArchitectureError(
            f"{path}: expected tensors that fit together, found: {text}", hint="is the checkpoint whole, and of the stated family?"
        ) from error
    return module.eval()
