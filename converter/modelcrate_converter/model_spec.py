"""The spec of a model that is none of ours: one TOML file per model, read once into frozen structs.

It says the task, the network's input, the way from an image to it, and names. `converter/README.md` has an example for each task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from modelcrate_bundle.errors import ConfigError
from modelcrate_converter import defaults

Positive = Annotated[int, msgspec.Meta(ge=1)]
Level = Annotated[int, msgspec.Meta(ge=0, le=255)]


class InputSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network's input.

    Attributes:
        name: what to call it; an `.onnx` has its own.
        size_hw: (height, width) in pixels; may be left out where the file fixes it.
        color: the order of the channels.
        mean: per channel, in levels.
        std: per channel, in levels.
        levels: what white is in `mean` and `std`: 255, or 1 where they are of pixels from 0 to 1.
        batch: any number of inputs in a call, or exactly so many.
    """

    name: str = "input"
    size_hw: tuple[Positive, Positive] | None = None
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    levels: Literal[1, 255] = 255
    batch: Literal["dynamic"] | Positive = "dynamic"


class ResizeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a whole image becomes the input's size; see `exportable.ImageFit`."""

    mode: Literal["stretch", "letterbox", "letterbox-center", "shorter-edge"] = "stretch"
    edge: Positive | None = None
    pad_value: Level = 0
    interpolation: Literal["nearest", "bilinear", "bicubic", "area", "lanczos", "pillow-bilinear", "pillow-bicubic"] = "bilinear"


class CropSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a box becomes a crop: `padding` is a factor on its sides, `udp` the convention of the affine map."""

    padding: Annotated[float, msgspec.Meta(gt=0)] = defaults.BOX_PADDING
    udp: bool = False


class KeypointSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the keypoints are: the name of a published set, or names with what is known of them, as in `manifest.KeypointInfo`."""

    set: str | None = None
    names: list[str] = msgspec.field(default_factory=list)
    skeleton: list[tuple[int, int]] = msgspec.field(default_factory=list)
    flip_pairs: list[tuple[int, int]] = msgspec.field(default_factory=list)
    sigmas: list[float] = msgspec.field(default_factory=list)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="task"):
    """What all tasks have.

    Attributes:
        name: the model's name; the command line's wins.
        outputs: names of the outputs in the module's order; of an `.onnx`, which of its outputs to keep. Without it: the file's own, or `output_0` ...
        args: keyword arguments of the function that makes the module.
        input: the network's input.
    """

    name: str | None = None
    outputs: tuple[str, ...] = ()
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    input: InputSpec = InputSpec()


class ClassifierSpec(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="Classifier"):
    """One output (N, C). `softmax` where the network gives logits."""

    resize: ResizeSpec = ResizeSpec()
    class_names: tuple[str, ...] | None = None
    class_names_file: str | None = None
    topk: Positive = 5
    softmax: bool = False


class DetectorSpec(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="Detector"):
    """Two outputs: `dets` (N, n, 5), left, top, right, bottom in network pixels and score, suppressed already; and `labels` (N, n)."""

    resize: ResizeSpec = ResizeSpec()
    class_names: tuple[str, ...] | None = None
    class_names_file: str | None = None
    score_thr: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05


class PoseDetectorSpec(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="PoseDetector"):
    """Keypoints in crops around boxes.

    Attributes:
        head: "simcc": `simcc_x` (N, K, W * ratio) and `simcc_y` (N, K, H * ratio); "heatmap": one output (N, K, h, w); "regression": one output (N, K, 2) of
            fractions of the input.
        split_ratio: SimCC bins per network pixel.
        codec: of heatmaps: "udp" where the outer cells lie on the edges of the crop, else "msra".
        unbiased: whether msra heatmaps are refined with DARK.
        blur_kernel_size: side of that refinement's blur, in cells.
        crop: how a box becomes a crop.
        keypoints: what they are.
    """

    head: Literal["simcc", "heatmap", "regression"]
    split_ratio: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    codec: Literal["udp", "msra"] = "udp"
    unbiased: bool = False
    blur_kernel_size: Positive = defaults.BLUR_KERNEL_SIZE
    crop: CropSpec = CropSpec()
    keypoints: KeypointSpec = KeypointSpec()


class NetworkSpec(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="Network"):
    """Tensors that the caller decodes: of whole images, or of crops where there is a `crop` table."""

    resize: ResizeSpec | None = None
    crop: CropSpec | None = None


Spec: TypeAlias = ClassifierSpec | DetectorSpec | PoseDetectorSpec | NetworkSpec


def read_spec(path: Path) -> Spec:
    """Read a spec.

    Raises:
        ConfigError: not there, not TOML, or not a spec; the message has the key, expected and found.
    """
    try:
        spec: Spec = msgspec.toml.decode(path.read_bytes(), type=Spec)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError, msgspec.ValidationError) as error:
        hint = "converter/README.md has one for each task" if not isinstance(error, OSError) else "check the path"
        raise ConfigError(f"{path}: expected a spec of a model, found: {getattr(error, 'strerror', None) or error}", hint=hint) from error
    return spec
