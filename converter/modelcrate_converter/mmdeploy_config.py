"""MMDeploy's deploy configs as ours: parsed, never executed.

What such a file decides here: the backend and its precision, the batch range, the candidates that enter suppression, TensorRT's workspace; and what the model must be, which
is checked. The rest has no counterpart: thresholds come from the model in MMDeploy too, and the opset is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from modelcrate_bundle.errors import ConfigError
from modelcrate_converter.config import Batch, DeployConfig, ModelNeeds, load_config, target_names
from modelcrate_converter.facts import at, is_number
from modelcrate_converter.mmconfig import read_config_file

_TASKS: Final = {"ObjectDetection": "Detector", "PoseDetection": "PoseDetector", "Classification": "Classifier"}


def read_mmdeploy_config(path: Path) -> DeployConfig:
    """Read a deploy config of MMDeploy with the bases that lie beside it.

    Args:
        path: a `.py` file like `configs/mmpose/pose-detection_simcc_onnxruntime_dynamic.py`.

    Returns:
        Our target of the same backend and precision, with the file's batch range and what it asks of the model.

    Raises:
        ConfigError: no deploy config, one whose bases are missing, or one of a backend, a precision or a task that there is nothing for.
    """
    config = read_config_file(path)
    values = config.values
    backend = at(values, "backend_config.type")
    if not isinstance(backend, str):
        missing = f", and its bases {', '.join(config.missing_bases)} are not there" if config.missing_bases else ""
        hint = "keep the file in MMDeploy's configs folder, beside its _base_" if missing else "it is one of MMDeploy's configs, not a model's"
        raise ConfigError(f"{path}: expected a deploy config of MMDeploy with backend_config.type, found none{missing}", hint=hint)
    name = backend + _precision(values)
    if name not in target_names():
        raise ConfigError(f"{path}: expected the deploy config of one of {', '.join(target_names())}, found {name}", hint="choose one of them with -t")
    ours = load_config(name)
    # "ncnn_end2end" has ncnn's DetectionOutput behind it there; here the host suppresses.
    if at(values, "codebase_config.model_type") not in (None, "end2end", "ncnn_end2end") or at(values, "partition_config") is not None:
        raise ConfigError(f"{path}: expected a network in one piece (model_type 'end2end'), found a partition of one", hint=f"-t {name}")
    pre_top_k = at(values, "codebase_config.post_processing.pre_top_k")
    nms = msgspec.structs.replace(ours.nms, pre_top_k=int(pre_top_k)) if is_number(pre_top_k) and pre_top_k >= 1 else ours.nms
    workspace = at(values, "backend_config.common_config.max_workspace_size")
    engine = msgspec.structs.replace(ours.tensorrt, workspace_mib=int(workspace) >> 20) if is_number(workspace) and workspace > 0 else ours.tensorrt
    return msgspec.structs.replace(ours, batch=_batch(values, ours.batch, path=path), nms=nms, tensorrt=engine, needs=_needs(values, path=path))


def _precision(values: Mapping[str, Any]) -> str:
    """The ending of the target's name: "" for float32."""
    stated = str(at(values, "backend_config.precision") or "").lower()
    common = at(values, "backend_config.common_config")
    common = common if isinstance(common, Mapping) else {}
    for precision in ("int8", "fp16"):
        if stated == precision or common.get(f"{precision}_mode") is True:
            return f"-{precision}"
    return ""


def _shapes(values: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
    """min, opt and max shape of the first input, where the config has them."""
    inputs = at(values, "backend_config.model_inputs")
    shapes = inputs[0].get("input_shapes") if isinstance(inputs, list) and inputs and isinstance(inputs[0], Mapping) else None
    first = next(iter(shapes.values()), None) if isinstance(shapes, Mapping) else None
    rows = [first.get(key) for key in ("min_shape", "opt_shape", "max_shape")] if isinstance(first, Mapping) else []
    good = [tuple(int(v) for v in row) for row in rows if isinstance(row, (list, tuple)) and len(row) == 4 and all(is_number(v) and v >= 1 for v in row)]
    return good if len(good) == 3 else []  # type: ignore[return-value]  # of length 4, as was asked


def _batch(values: Mapping[str, Any], ours: Batch, *, path: Path) -> Batch:
    """TensorRT's shape range says it; else a dynamic first axis means ours, and a fixed one a batch of 1 at best."""
    shapes = _shapes(values)
    if shapes:
        least, best, most = (shape[0] for shape in shapes)
        if not least <= best <= most:
            raise ConfigError(f"{path}: model_inputs: expected min <= opt <= max in the batch, found {least}, {best}, {most}")
        return Batch(min=least, opt=best, max=most)
    axes = at(values, "onnx_config.dynamic_axes")
    is_dynamic = isinstance(axes, Mapping) and any(isinstance(of_tensor, (Mapping, list)) and 0 in of_tensor for of_tensor in axes.values())
    return ours if is_dynamic else Batch(min=1, opt=1, max=1)


def _needs(values: Mapping[str, Any], *, path: Path) -> ModelNeeds:
    """What the config says of the model."""
    task = at(values, "codebase_config.task")
    if task is not None and not (isinstance(task, str) and task in _TASKS):
        raise ConfigError(f"{path}: codebase_config.task: expected one of {', '.join(_TASKS)}, found {task!r}")
    stated = at(values, "onnx_config.input_shape")
    size = (int(stated[1]), int(stated[0])) if isinstance(stated, (list, tuple)) and len(stated) == 2 and all(is_number(v) for v in stated) else None
    shapes = _shapes(values)
    least, most = ((shapes[0][2:], shapes[2][2:]) if shapes else (size, size)) if size is None or shapes else (size, size)
    return ModelNeeds(source=path.name, task=_TASKS[task] if task else None, least_hw=least, most_hw=most)
