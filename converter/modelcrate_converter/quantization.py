"""INT8 from one calibration: ranges of the tensors around convolutions, kept in a file, and emitted as a graph with QuantizeLinear and DequantizeLinear.

Every backend reads that graph; what differs is the type of the activations and whether a convolution's result is quantised too. Weights are int8, per
channel and symmetric. The last convolutions and everything behind them (RTMPose's head, RTMDet's predictors) stay in float32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.export import OnnxModel, save_onnx
from modelcrate_converter.observe import normalized, observe

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from modelcrate_converter.config import Int8Options

_BINS: Final = 2048
_STEPS: Final = 80
"""Clipping thresholds that the search for the least error tries, from the whole range down to a fifth of it."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What one calibration found: `calibration.json`.

    Attributes:
        method: how a range was chosen from the values: minmax, percentile or mse.
        percentile: share of the values that a range keeps, in percent, for "percentile".
        inputs: how many network inputs were looked at.
        ranges: tensor -> least and greatest value that are kept apart.
    """

    method: str
    percentile: float
    inputs: int
    ranges: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How far the outputs move when one convolution alone is quantised: the largest relative L-inf of any output."""

    layer: str
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedConvolution:
    """A convolution of the graph that is to compute in INT8.

    Attributes:
        weights: (out, in / groups, h, w) float32, already on the levels of INT8.
        scale: what one level of its input is worth.
    """

    weights: NDArray[np.float32]
    scale: float


def quantizable(model: OnnxModel) -> list[str]:
    """The convolutions that may be quantised: all but the last ones, behind which no other follows; in the graph's order."""
    import onnx

    proto = normalized(onnx.load(model.path))
    leads_to_conv: set[str] = set()
    chosen = []
    for node in reversed(proto.graph.node):
        is_followed = any(name in leads_to_conv for name in node.output)
        if is_followed and node.op_type == "Conv":
            chosen.append(node.name)
        if is_followed or node.op_type in {"Conv", "ConvTranspose"}:
            leads_to_conv |= set(node.input)
    return chosen[::-1]


def calibrate(model: OnnxModel, make_inputs: Callable[[], Iterable[NDArray[np.float32]]], options: Int8Options, *, workdir: Path) -> Calibration:
    """Find the range of every tensor that a quantised convolution reads or makes.

    Args:
        model: the canonical graph.
        make_inputs: gives the network inputs (n, C, H, W), the same ones each time: they are run twice, for the ends and for the distribution between them.
        options: the method.
        workdir: for a copy of the graph, while it is needed.

    Raises:
        ExportError: no inputs, no convolution that may be quantised, or a tensor that is not finite in float32.
    """
    import onnx

    layers = set(quantizable(model))
    if not layers:
        raise ExportError(f"{model.path.name}: expected convolutions to quantise, found none but the last", hint="use a float target")
    proto = normalized(onnx.load(model.path))
    names = {name for node in proto.graph.node if node.name in layers for name in (node.input[0], *node.output)}
    ends: dict[str, tuple[float, float]] = {}
    count = 0
    for values in observe(model, make_inputs(), workdir=workdir, names=names):
        count += 1
        for name, value in values.items():
            least, greatest = float(value.min()), float(value.max())
            if not (math.isfinite(least) and math.isfinite(greatest)):
                raise ExportError(f"{model.path.name}: {name}: expected finite values in float32, found others", hint="is the checkpoint sound?")
            low, high = ends.get(name, (0.0, 0.0))  # zero is always among the levels: padding is made of it
            ends[name] = (min(low, least), max(high, greatest))
    if options.method != "minmax":
        spread = {name for name, (low, high) in ends.items() if low < high}
        counts = {name: np.zeros(_BINS, dtype=np.int64) for name in spread}
        for values in observe(model, make_inputs(), workdir=workdir, names=spread):
            for name, value in values.items():
                counts[name] += np.histogram(value, bins=_BINS, range=ends[name])[0]
        choose = _percentile if options.method == "percentile" else _least_error
        ends |= {name: choose(counts[name], ends[name], options.percentile) for name in spread}
    ranges = {name: (float(f"{low:.7g}"), float(f"{high:.7g}")) for name, (low, high) in sorted(ends.items())}
    return Calibration(method=options.method, percentile=options.percentile, inputs=count, ranges=ranges)


def _percentile(counts: NDArray[np.int64], ends: tuple[float, float], percentile: float) -> tuple[float, float]:
    """The range that keeps so many percent of the values, half of the rest cut off at each end that has any."""
    cut = (100 - percentile) / 200 * counts.sum()
    edges = np.linspace(*ends, _BINS + 1)
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    low = edges[int(np.searchsorted(below, cut, side="right"))]
    high = edges[_BINS - int(np.searchsorted(above, cut, side="right"))]
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_error(counts: NDArray[np.int64], ends: tuple[float, float], _: float) -> tuple[float, float]:
    """The range, of those that shrink towards zero from both ends alike, whose rounding and clipping have the least mean square."""
    edges = np.linspace(*ends, _BINS + 1)
    centers = (edges[1:] + edges[:-1]) / 2
    best, least = ends, np.inf
    for share in np.linspace(1.0, 0.2, _STEPS):
        low, high = min(ends[0] * share, 0.0), max(ends[1] * share, 0.0)
        step = (high - low) / 255 or 1.0
        clipped = np.clip(centers, low, high)
        rounding = step**2 / 12
        error = float((counts * ((centers - clipped) ** 2 + rounding)).sum())
        if error < least:
            best, least = (low, high), error
    return best


def emit_int8(
    model: OnnxModel, calibration: Calibration, options: Int8Options, *, workdir: Path, leave_out: Collection[str] = (), only: str | None = None
) -> OnnxModel:
    """Write the graph with QuantizeLinear and DequantizeLinear around its convolutions.

    Args:
        model: the canonical graph that was calibrated.
        calibration: its ranges.
        options: type of the activations, and whether results are quantised.
        workdir: where `quantized.onnx` goes.
        leave_out: convolutions that stay in float32.
        only: quantise this convolution alone.

    Raises:
        ExportError: no convolution remains, or ONNX Runtime's quantiser fails.
    """
    import onnx

    layers = [name for name in quantizable(model) if name not in leave_out] if only is None else [only]
    if not layers:  # for ONNX Runtime no names are all
        raise ExportError(f"{model.path.name}: expected convolutions to quantise, found all of them left out")
    proto = normalized(onnx.load(model.path))
    named, cache, path = workdir / "named.onnx", workdir / "ranges.json", workdir / "quantized.onnx"
    onnx.save(proto, named)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises on the root logger to preprocess the model
    try:
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.calibrate import save_tensors_data

        data: dict[str, Any] = {
            name: ort.calibrate.TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in calibration.ranges.items()
        }
        save_tensors_data(ort.calibrate.TensorsData(ort.CalibrationMethod.MinMax, data), cache)
        kind = {"uint8": ort.QuantType.QUInt8, "int8": ort.QuantType.QInt8}[options.activations]
        ort.quantize_static(
            str(named), str(path), None, quant_format=ort.QuantFormat.QDQ, op_types_to_quantize=["Conv"], activation_type=kind,
            per_channel=model.opset >= 13,  # before it DequantizeLinear has one scale
            weight_type=ort.QuantType.QInt8, nodes_to_quantize=layers, calibration_cache_path=str(cache),
            extra_options={
                "ActivationSymmetric": options.activations == "int8",
                "QuantizeBias": options.activations != "int8",  # TensorRT and ncnn add it in float
                "OpTypesToExcludeOutputQuantization": [] if options.quantize_results else ["Conv"],
            },
        )  # fmt: skip
        quantized = onnx.load(path)
    except Exception as error:  # it raises whatever it likes
        raise ExportError(f"{model.path.name}: expected ONNX Runtime's quantiser to write a graph, found: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.root.setLevel(level)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(quantized, path, inputs=model.inputs, outputs=model.outputs, metadata=metadata)


def dequantized(model: OnnxModel, *, workdir: Path) -> tuple[OnnxModel, list[QuantizedConvolution]]:
    """Take an emitted graph apart, for a backend that has its own form of INT8: the float32 graph, and what it is to quantise.

    Args:
        model: as `emit_int8` writes it, with signed activations.
        workdir: where `dequantized.onnx` goes.

    Returns:
        The graph without QuantizeLinear and DequantizeLinear, its weights on the levels that they had; and its convolutions that had them on both sides.
    """
    import onnx

    proto = normalized(onnx.load(model.path))
    graph = proto.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales: dict[str, float] = {}  # tensor behind a pair -> its scale
    levelled: set[str] = set()  # weights that were on levels
    same: dict[str, str] = {}  # tensor behind a pair, or behind one half of it -> what went in
    kept = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = _floats(node, constants)
            levelled.add(node.output[0])
        elif node.op_type == "DequantizeLinear":
            same[node.output[0]] = same[node.input[0]]
            scales[node.output[0]] = float(constants[node.input[1]])
        else:
            kept.append(node)
    convolutions = [
        QuantizedConvolution(weights=constants[node.input[1]], scale=scales[node.input[0]])
        for node in kept
        if node.op_type == "Conv" and node.input[0] in scales and node.input[1] in levelled  # others only read what one of these reads too
    ]
    makers = {name: node for node in kept for name in node.output}
    behind_pairs = [value.name for value in graph.output if value.name in same]
    kept += [onnx.helper.make_node("Identity", [same[name]], [name], name=f"{name}_same") for name in behind_pairs]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items() if name in used and name not in makers)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    return save_onnx(proto, workdir / "dequantized.onnx", inputs=model.inputs, outputs=model.outputs, metadata=metadata), convolutions


def _floats(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """What a DequantizeLinear makes of a constant."""
    levels, scale = constants[node.input[0]], constants[node.input[1]]
    zero = constants[node.input[2]] if len(node.input) > 2 else np.zeros((), dtype=levels.dtype)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if i == axis % max(levels.ndim, 1) else 1 for i in range(levels.ndim)] if scale.ndim else []
    values: NDArray[np.float32] = (levels.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    return values


def sensitivities(model: OnnxModel, calibration: Calibration, options: Int8Options, inputs: list[NDArray[np.float32]], *, workdir: Path) -> list[Sensitivity]:
    """Quantise one convolution after the other, alone, and see how far the outputs move.

    Args:
        model: the canonical graph.
        calibration: its ranges.
        options: as for `emit_int8`.
        inputs: what to run on.
        workdir: for the graphs.

    Returns:
        The convolutions, worst first.
    """
    layers = quantizable(model)
    expected = _outputs(model, inputs)
    found = []
    for layer in layers:
        ours = _outputs(emit_int8(model, calibration, options, workdir=workdir, only=layer), inputs)
        error = max(float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-12)) for a, b in zip(ours, expected, strict=True))
        found.append(Sensitivity(layer=layer, error=error))
    return sorted(found, key=lambda item: -item.error)


def _outputs(model: OnnxModel, inputs: list[NDArray[np.float32]]) -> list[NDArray[Any]]:
    from modelcrate_runtime.sessions import SessionOptions, open_artefact

    session = open_artefact("onnxruntime", {"net": model.path}, SessionOptions(), where=model.path.name)
    try:
        runs = [session.run({model.inputs[0].name: tensor}) for tensor in inputs]
    finally:
        session.close()
    return [np.concatenate([run[spec.name] for run in runs]) for spec in model.outputs]
