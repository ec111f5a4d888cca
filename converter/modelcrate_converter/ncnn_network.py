"""An ncnn network as data: its `.param` and the weights of its layers in the `.bin`; and its convolutions in INT8.

ncnn's own quantisers are programs in C++ that no package brings. What they write is simple: a convolution in INT8 has the parameter 8, its weights under
another tag, and behind its bias one scale for each output channel and one for its input. Source: ncnn's wiki, "param and model file structure" and
"quantized int8 inference"; `src/modelbin.cpp` and `load_model` of each layer for the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.quantization import QuantizedConvolution
from modelcrate_runtime.sessions.ncnn_session import MAGIC

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOAT16, _INT8 = 0x01306B47, 0x000D4B38
"""Tags before weights that are not float32; float32's is 0."""
_INT8_SCALES: Final = 8
"""The parameter of a convolution that says that scales follow."""
_CONVOLUTIONS: Final = ("Convolution", "ConvolutionDepthWise")
LEVELS: Final = 127
"""INT8 is symmetric here: from -127 to 127."""


@dataclass(kw_only=True, slots=True)
class Layer:
    """One line of a `.param`, and what belongs to it in the `.bin`.

    Attributes:
        kind: of the layer: Convolution, Gemm, ...
        name: its name.
        bottoms: blobs that it reads.
        tops: blobs that it makes.
        parameters: number -> text.
        weights: arrays in the file's order: float32, float16 or int8; those that the file has with a tag come with True.
    """

    kind: str
    name: str
    bottoms: list[str]
    tops: list[str]
    parameters: dict[int, str]
    weights: list[tuple[NDArray[Any], bool]] = field(default_factory=list)

    def number(self, key: int, default: int = 0) -> int:
        """A parameter that is a whole number."""
        return int(self.parameters.get(key, default))


def float_weights(layer: Layer) -> NDArray[np.float32]:
    """The weights of a layer, flat; those in INT8 times the value of their levels."""
    weights = layer.weights[0][0]
    if weights.dtype == np.int8:
        scales = layer.weights[2 if layer.number(5) else 1][0]
        weights = (weights.reshape(len(scales), -1) / scales[:, None]).ravel()
    values: NDArray[np.float32] = weights.astype(np.float32)
    return values


def _sizes(layer: Layer) -> list[tuple[int, bool]]:
    """How many values each array of a layer has in the `.bin`, and whether a tag stands before them.

    Raises:
        KeyError: a kind of layer that may have weights of which nothing is known here.
    """
    of = layer.number
    kind = layer.kind
    if kind in {*_CONVOLUTIONS, "Deconvolution", "DeconvolutionDepthWise"}:
        scales: list[tuple[int, bool]] = []
        if of(_INT8_SCALES):
            per_channel = of(7, 1) if kind == "ConvolutionDepthWise" else of(0)
            scales = [(per_channel, False), (1, False)] + ([(1, False)] if of(_INT8_SCALES) > 100 else [])
        return [(of(6), True)] + ([(of(0), False)] if of(5) else []) + scales
    if kind == "InnerProduct":
        return [(of(2), True)] + ([(of(0), False)] if of(1) else [])
    if kind == "Gemm":
        a, b = of(7) * of(9), of(8) * of(9)
        c = {-1: 0, 0: 1, 1: of(7), 2: of(7), 3: of(7) * of(8), 4: of(8)}[of(10)]
        return [(size, True) for size, is_constant in ((a, of(4)), (b, of(5)), (c, of(6))) if is_constant and size]
    if kind == "MemoryData":
        return [(math.prod(of(key) or 1 for key in (0, 1, 11, 2)), of(21, 1) == 0)]
    if kind == "BatchNorm":
        return [(of(0), False)] * 4
    if kind == "PReLU":
        return [(of(0), False)]
    if kind == "Scale":
        return ([(of(0), False)] if of(0) != -233 else []) + ([(of(0), False)] if of(1) else [])
    if kind in {"LayerNorm", "GroupNorm", "InstanceNorm"}:
        count, is_affine = (of(0), of(2, 1)) if kind != "GroupNorm" else (of(1), of(3, 1))
        return [(count, False)] * 2 if is_affine else []
    if kind in {
        "Bias",
        "Embed",
        "GRU",
        "LSTM",
        "MultiHeadAttention",
        "Normalize",
        "Quantize",
        "Dequantize",
        "Requantize",
        "RMSNorm",
        "RNN",
        "DeformableConv2D",
    }:
        raise KeyError(kind)
    if kind.startswith(("Convolution", "Deconvolution")):
        raise KeyError(kind)
    return []


def read_network(text: str, content: bytes, *, where: str) -> list[Layer]:
    """Take a network apart.

    Args:
        text: the `.param`.
        content: the `.bin`.
        where: for messages.

    Raises:
        ExportError: no such files, layers whose weights are not known here, or a `.bin` of another length than they have.
    """
    try:
        layers = _parse(text)
        at = 0
        for layer in layers:
            for size, is_tagged in _sizes(layer):
                array, at = _read_array(content, at, size, is_tagged=is_tagged)
                layer.weights.append((array, is_tagged))
    except KeyError as error:
        raise ExportError(f"{where}: expected layers whose weights are known, found {error.args[0]}", hint="use ncnn or ncnn-fp16") from error
    except (ValueError, IndexError, OverflowError) as error:
        raise ExportError(f"{where}: expected an ncnn network, found: {error}") from error
    if at != len(content):
        raise ExportError(f"{where}: expected a .bin of {at} bytes, as its layers have, found {len(content)}")
    return layers


def _parse(text: str) -> list[Layer]:
    first, _, *lines = text.splitlines()
    if first.strip() != MAGIC:
        raise ValueError(first[:40])
    layers = []
    for words in filter(None, (line.split() for line in lines)):
        reads, makes = int(words[2]), int(words[3])
        if min(reads, makes, len(words) - 4 - reads - makes) < 0:
            raise ValueError(" ".join(words)[:100])
        options = dict(word.split("=", 1) for word in words[4 + reads + makes :])
        layer = Layer(
            kind=words[0], name=words[1], bottoms=words[4 : 4 + reads], tops=words[4 + reads : 4 + reads + makes],
            parameters={int(key): value for key, value in options.items()},
        )  # fmt: skip
        layers.append(layer)
    return layers


def _read_array(content: bytes, at: int, size: int, *, is_tagged: bool) -> tuple[NDArray[Any], int]:
    if size < 0:  # for numpy it is all that there is
        raise ValueError(f"weights of {size} values")
    dtype: Any = np.float32
    if is_tagged:
        tag = int.from_bytes(content[at : at + 4], "little")
        kinds: Mapping[int, Any] = {0: np.float32, _FLOAT16: np.float16, _INT8: np.int8}
        if tag not in kinds:
            raise ValueError(f"weights with the tag {tag:#x}")
        dtype, at = kinds[tag], at + 4
    array = np.frombuffer(content, dtype=dtype, count=size, offset=at)
    return array, at + -(-array.nbytes // 4) * 4


def write_network(layers: Sequence[Layer]) -> tuple[str, bytes]:
    """The `.param` and the `.bin` of layers."""
    blobs = len({blob for layer in layers for blob in layer.tops})
    lines = [MAGIC, f"{len(layers)} {blobs}"]
    content = bytearray()
    for layer in layers:
        words = [f"{layer.kind:<24} {layer.name:<24} {len(layer.bottoms)} {len(layer.tops)}", *layer.bottoms, *layer.tops]
        lines.append(" ".join([*words, *(f"{key}={value}" for key, value in layer.parameters.items())]))
        for array, is_tagged in layer.weights:
            if is_tagged:
                tag = {np.dtype(np.float16): _FLOAT16, np.dtype(np.int8): _INT8}.get(array.dtype, 0)
                content += tag.to_bytes(4, "little")
            data = array.tobytes()
            content += data + bytes(-len(data) % 4)
    return "\n".join(lines) + "\n", bytes(content)


def quantize_convolutions(layers: Iterable[Layer], convolutions: Sequence[QuantizedConvolution]) -> int:
    """Give the convolutions that have these weights INT8 ones, in place: a converter renames layers, but not their numbers.

    Convolutions that share their weights are given the coarsest input scale of them.

    Args:
        layers: of a network in float32.
        convolutions: what is to be quantised.

    Returns:
        How many layers compute in INT8 now.
    """
    scales: dict[bytes, float] = {}
    for convolution in convolutions:
        key = convolution.weights.tobytes()
        scales[key] = max(convolution.scale, scales.get(key, 0.0))
    count = 0
    for layer in layers:
        if layer.kind not in _CONVOLUTIONS or layer.number(_INT8_SCALES):
            continue
        weights = layer.weights[0][0]
        scale = scales.get(weights.tobytes())
        channels = layer.number(0)
        if scale is None or (layer.kind == "ConvolutionDepthWise" and layer.number(7, 1) != channels):
            continue
        rows = weights.reshape(channels, -1)
        largest = np.abs(rows).max(axis=1)
        of_rows = (LEVELS / np.where(largest > 0, largest, 1.0)).astype(np.float32)
        levels = np.clip(np.rint(rows * of_rows[:, None]), -LEVELS, LEVELS).astype(np.int8)
        layer.parameters[_INT8_SCALES] = "1"
        layer.weights = [
            (levels.ravel(), True),
            *layer.weights[1:],
            (of_rows, False),
            (np.array([1 / scale], dtype=np.float32), False),
        ]
        count += 1
    return count
