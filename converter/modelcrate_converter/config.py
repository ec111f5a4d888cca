"""Deploy configs: one flat TOML per target, read once into frozen structs."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from modelcrate_bundle.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1)]
Gate = Annotated[float, msgspec.Meta(ge=0)]


class Batch(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Inputs in one network call."""

    min: int = 1
    opt: int = 8
    max: int = 32


class OnnxOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the canonical graph is made."""

    exporter: Literal["torchscript", "dynamo"] = "torchscript"
    opset: Annotated[int, msgspec.Meta(ge=14, le=20)] = 17  # below 14 HardSwish and its like are missing, above 20 the exporter has nothing
    simplify: bool = True


class NmsOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Where detections are suppressed."""

    where: Literal["graph", "runtime"] = "graph"
    pre_top_k: Positive = 5000


class PrecisionOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What stays in float32 when the rest is float16; see `modelcrate_converter.precision`.

    Attributes:
        headroom: how many times larger a tensor may be on other images than on those that were measured.
        scale_norm: "island" keeps ScaleNorm in float32; "prescaled" rewrites it, exactly, so that nothing in it overflows, for any precision.
    """

    headroom: Annotated[float, msgspec.Meta(ge=1)] = 16.0
    scale_norm: Literal["island", "prescaled"] = "island"


class Int8Options(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How INT8 is calibrated and emitted; see `modelcrate_converter.quantization`.

    Attributes:
        method: how a tensor's range is chosen: its ends, the ends of so many percent, or the least mean square error.
        percentile: for "percentile".
        scenes: procedural scenes to calibrate on, where no images are given for it.
        activations: unsigned and asymmetric, or signed and symmetric.
        quantize_results: whether a convolution's result is quantised too, or only what it reads.
        search: when the gates fail, leave out the convolutions that matter most, as few as it takes.
    """

    method: Literal["minmax", "percentile", "mse"] = "percentile"
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.99
    scenes: Positive = 32
    activations: Literal["uint8", "int8"] = "uint8"
    quantize_results: bool = True
    search: bool = True


class TensorRTOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How an engine is built; see `modelcrate_converter.builders.tensorrt_builder`.

    Attributes:
        workspace_mib: device memory that the build may use; 0 for all.
        optimization_level: from 0 to 5: how long the build looks for faster kernels.
        tf32: whether float32 may compute in TensorFloat-32, which has ten bits of mantissa.
        hardware_compatibility: "ampere+" and "same_compute_capability" run on more GPUs, slower.
        version_compatible: run on newer versions of TensorRT too, slower.
        refit: weights can be changed in the engine.
        strip_weights: leave the weights out, and fill them in from the graph beside the engine when it is loaded.
        device_id: the GPU to build and compare on.
        cuda_binding: "cuda-python" or "pycuda"; empty takes what is installed.
    """

    workspace_mib: Annotated[int, msgspec.Meta(ge=0)] = 0
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    tf32: bool = False
    hardware_compatibility: Literal["none", "ampere+", "same_compute_capability"] = "none"
    version_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False
    device_id: Annotated[int, msgspec.Meta(ge=0)] = 0
    cuda_binding: Literal["", "cuda-python", "pycuda"] = ""


class OnnxRuntimeOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the graph is made to suit ONNX Runtime; see `modelcrate_converter.onnxruntime_graph`.

    Attributes:
        transpose_wide_kernels: whether convolutions with wide kernels over small maps are written as transposed ones.
        lay_portraits_down: whether a network whose input is higher than wide computes on maps that lie on their side.
    """

    transpose_wide_kernels: bool = True
    lay_portraits_down: bool = True


class Gates(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The limits of parity with PyTorch; units in `deploy_configs/onnxruntime.toml`."""

    relative_linf: Gate = 1e-4
    class_logits_linf: Gate = 1e-3
    distances_linf: Gate = 1e-4
    peak_margin: Gate = 1e-4
    keypoint_px: Gate = 0.05
    keypoint_mean_px: Gate | None = None
    keypoint_score: Gate = 0.0
    box_px: Gate = 0.05
    box_mean_px: Gate | None = None
    box_score: Gate = 0.0
    score: Gate = 1e-3
    label_flips: Annotated[int, msgspec.Meta(ge=0)] = 0
    ap_drop: Gate | None = 0.05


class ModelNeeds(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a deploy config of MMDeploy asks of the model; our own ask nothing.

    Attributes:
        source: who asks.
        task: MMDeploy SDK's name of the task; None for any.
        least_hw: smallest input (height, width) in pixels; None for any.
        most_hw: largest.
    """

    source: str
    task: str | None = None
    least_hw: tuple[int, int] | None = None
    most_hw: tuple[int, int] | None = None

    def check(self, *, name: str, task: str, input_hw: tuple[int, int]) -> None:
        """Refuse another model.

        Raises:
            ConfigError: naming the config and both values.
        """
        if self.task is not None and task != self.task:
            raise ConfigError(f"{self.source}: expected the model of a {self.task}, found {name}, a {task}", hint="give the deploy config of its task")
        if self.least_hw is not None and self.most_hw is not None:
            sizes = [f"{width}x{height}" for height, width in (self.least_hw, self.most_hw, input_hw)]
            if not all(low <= side <= high for low, side, high in zip(self.least_hw, input_hw, self.most_hw, strict=True)):
                wanted = sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}"
                raise ConfigError(
                    f"{self.source}: expected an input (width x height) of {wanted}, found {name} with {sizes[2]}", hint="the size is the model's"
                )


class DeployConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One target.

    Attributes:
        target: the name of the config file without its suffix.
        backend: which builder and which session.
        precision: what the artefact computes in.
        fp16: what stays in float32.
        int8: how it is calibrated and emitted.
        onnxruntime: how the graph is made to suit it.
        tensorrt: how an engine is built.
        needs: what the model must be.
    """

    target: str
    backend: str
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    batch: Batch = Batch()
    onnx: OnnxOptions = OnnxOptions()
    nms: NmsOptions = NmsOptions()
    fp16: PrecisionOptions = PrecisionOptions()
    int8: Int8Options = Int8Options()
    onnxruntime: OnnxRuntimeOptions = OnnxRuntimeOptions()
    tensorrt: TensorRTOptions = TensorRTOptions()
    gates: Gates = Gates()
    needs: ModelNeeds | None = None


def _config_folder() -> Path:
    """Beside this file in a wheel; at the root of the repository in a checkout."""
    packaged = Path(__file__).parent / "deploy_configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "deploy_configs"


CONFIG_FOLDER: Final = _config_folder()


def target_names() -> list[str]:
    """The targets that come with modelcrate."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.toml"))


def load_config(target: str) -> DeployConfig:
    """Load a deploy config.

    Args:
        target: the name of a target, or the path of a TOML file.

    Raises:
        ConfigError: an unknown target, or a file that is not a deploy config.
    """
    if len(target) > 255:
        raise ConfigError(f"target: expected a name or a path, found {len(target)} characters")
    path = CONFIG_FOLDER / f"{target}.toml"
    if target.endswith(".toml") or "/" in target or "\\" in target:
        path = Path(target)
    elif not path.is_file():
        names = target_names()
        near = difflib.get_close_matches(target, names, n=3, cutoff=0.4) or names
        raise ConfigError(f"target: expected one of {', '.join(names)}, found {target!r}", hint=f"did you mean {' or '.join(near)}?")
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        config = msgspec.convert({"target": path.stem} | raw, DeployConfig)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: expected a deploy config, found: {error}", hint=f"compare it with {CONFIG_FOLDER / 'onnxruntime.toml'}") from error
    if not 1 <= config.batch.min <= config.batch.opt <= config.batch.max:
        raise ConfigError(f"{path}: batch: expected 1 <= min <= opt <= max, found {config.batch.min}, {config.batch.opt}, {config.batch.max}")
    return config
