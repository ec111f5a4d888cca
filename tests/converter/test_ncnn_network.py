"""An ncnn network as data: what pnnx writes comes back to the byte, what is broken is one error, and convolutions in INT8 are what ncnn computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelcrate_bundle.errors import ExportError
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.ncnn_network import LEVELS, Layer, float_weights, quantize_convolutions, read_network, write_network
from modelcrate_converter.quantization import QuantizedConvolution
from modelcrate_runtime.sessions import BACKENDS, SessionOptions, open_artefact

Network = tuple[str, bytes]
RNG = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def param(*layers: str) -> str:
    blobs = {blob for layer in layers for blob in layer.split()[4 : 4 + int(layer.split()[2]) + int(layer.split()[3])]}
    return "\n".join(["7767517", f"{len(layers)} {len(blobs)}", *layers]) + "\n"


def tagged(values: np.ndarray, tag: int = 0) -> bytes:
    data = values.tobytes()
    return tag.to_bytes(4, "little") + data + bytes(-len(data) % 4)


# ------------------------------------------------------------------------------------------------------------- what pnnx writes


def of_many_layers(path: Path) -> Path:
    """An ONNX file whose layers have weights of many kinds in ncnn: grouped and transposed convolutions, norms, slopes, products and constants."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        helper.make_node("PRelu", ["c0", "slope"], ["p0"]),
        helper.make_node("Conv", ["p0", "w1", "b1"], ["c1"], pads=[1] * 4, group=2),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], pads=[1] * 4, group=6),
        helper.make_node("ConvTranspose", ["c2", "w3", "b3"], ["c3"], strides=[2, 2]),
        helper.make_node("InstanceNormalization", ["c3", "gain", "shift"], ["n0"]),
        helper.make_node("Add", ["n0", "constant"], ["a0"]),
        helper.make_node("GlobalAveragePool", ["a0"], ["g0"]),
        helper.make_node("Flatten", ["g0"], ["f0"]),
        helper.make_node("Gemm", ["f0", "w4", "b4"], ["y"], transB=1),
    ]
    weights = {
        "w0": floats(6, 3, 3, 3), "b0": floats(6), "slope": floats(6, 1, 1), "w1": floats(6, 3, 3, 3), "b1": floats(6), "w2": floats(6, 1, 3, 3),
        "w3": floats(6, 5, 2, 2), "b3": floats(5), "gain": floats(5), "shift": floats(5), "constant": floats(1, 5, 16, 16), "w4": floats(7, 5), "b4": floats(7),
    }  # fmt: skip
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 8, 8]), helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 7])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(value, name) for name, value in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Network]:
    """A pose estimator and a network of many layers in float32 and float16, and a detector, as bundles have them."""
    pytest.importorskip("ncnn", reason=f"needs ncnn: {BACKENDS['ncnn'].install_command}")
    pytest.importorskip("pnnx", reason="needs pnnx: pip install 'modelcrate[pnnx]'")
    folder = tmp_path_factory.mktemp("networks")
    shapes = {
        "pose": rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8),
        "detector": rtmdet_shapes(widen=0.0625, deepen=0.167, classes=2, separable=False),
    }
    (folder / "many.toml").write_text('task = "Network"\n[resize]\nmode = "stretch"\n')
    files = {"many": of_many_layers(folder / "many.onnx")}
    for name, table in shapes.items():
        files[name] = folder / f"{name}.pth"
        torch.save({"state_dict": random_weights(table, seed=1), "meta": {"cfg": "test_pipeline = [dict(type='Resize', scale=(96, 64))]"}}, files[name])
    made: dict[str, Network] = {}
    for name, path in files.items():
        options = ConvertOptions(out=folder / "out", name=name, verify=False, spec=folder / "many.toml" if name == "many" else None)
        for conversion in convert(path, [load_config(target) for target in ("ncnn", "ncnn-fp16")[: 1 if name == "detector" else 2]], options):
            assert conversion.error is None, conversion.error
            made[conversion.id] = ((conversion.place / "end2end.param").read_text(), (conversion.place / "end2end.bin").read_bytes())
    return made


def paddings(layers: list[Layer]) -> set[int]:
    """Where no value is: behind an odd number of float16, up to a multiple of four bytes; pnnx writes there what was in its memory."""
    found: set[int] = set()
    at = 0
    for array, is_tagged in (of_layer for layer in layers for of_layer in layer.weights):
        at += 4 * is_tagged + array.nbytes
        found |= set(range(at, at + -array.nbytes % 4))
        at += -array.nbytes % 4
    return found


def test_what_pnnx_writes_comes_back_to_the_byte(networks: dict[str, Network]) -> None:
    assert len(networks) == 5
    for name, (text, content) in networks.items():
        layers = read_network(text, content, where=name)
        assert sum(array.nbytes for layer in layers for array, _ in layer.weights) > 0.95 * len(content)
        between = paddings(layers)
        assert bool(between) <= name.endswith("-fp16")
        expected = bytes(0 if at in between else value for at, value in enumerate(content)) if between else content
        assert write_network(layers) == (text, expected), name


def test_many_kinds_of_layers_are_among_them(networks: dict[str, Network]) -> None:
    kinds = {layer.kind for name, (text, content) in networks.items() for layer in read_network(text, content, where=name) if layer.weights}
    assert {"Convolution", "ConvolutionDepthWise", "Gemm", "MemoryData"} <= kinds
    assert kinds & {"Deconvolution", "DeconvolutionDepthWise"}
    assert kinds & {"PReLU", "InstanceNorm", "InnerProduct"}


def test_float16_is_float32_rounded(networks: dict[str, Network]) -> None:
    full, half = (read_network(*networks[f"pose_{target}"], where="pose") for target in ("ncnn", "ncnn-fp16"))
    compared = 0
    for ours, theirs in zip(half, full, strict=True):
        if ours.kind.startswith("Convolution"):
            assert ours.weights[0][0].dtype == np.float16
            np.testing.assert_allclose(float_weights(ours), float_weights(theirs), rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 10


# --------------------------------------------------------------------------------------------------------------------- broken


INPUT = "Input image 0 1 image 0=8 1=4 2=3"
SMALL = param(
    INPUT,
    "Convolution conv 1 1 image a 0=5 1=1 5=1 6=15",
    "ConvolutionDepthWise wise 1 1 a b 0=5 1=3 4=1 6=45 7=5",
    "PReLU prelu 1 1 b c 0=5",
    "MemoryData memory 0 1 m 0=8 1=4 2=5",
    "BinaryOp add 2 1 c m d 0=0",
    "Flatten flat 1 1 d e",
    "Gemm gemm 1 1 e y 4=0 5=1 6=1 7=1 8=2 9=160 10=4",
)
CONTENT = (
    tagged(floats(15)) + floats(5).tobytes() + tagged(floats(45), 0) + floats(5).tobytes() + floats(160).tobytes() + tagged(floats(320)) + tagged(floats(2))
)


def is_read_or_refused(text: str, content: bytes) -> bool:
    """Whether a network is read; whatever is wrong with it is one error in one line."""
    try:
        layers = read_network(text, content, where="net")
    except ExportError as error:
        assert str(error).startswith("net: expected ")
        assert "\n" not in str(error)
        return False
    assert all(array.size >= 0 for layer in layers for array, _ in layer.weights)
    return True


def test_the_small_network_is_one() -> None:
    layers = read_network(SMALL, CONTENT, where="net")
    assert [[array.size for array, _ in layer.weights] for layer in layers if layer.weights] == [[15, 5], [45], [5], [160], [320, 2]]
    assert write_network(layers)[1] == CONTENT


@given(cut=st.integers(0, len(CONTENT) - 1))
def test_weights_that_end_early_are_refused(cut: int) -> None:
    assert not is_read_or_refused(SMALL, CONTENT[:cut])


@given(more=st.binary(min_size=1, max_size=64))
def test_weights_that_go_on_are_refused(more: bytes) -> None:
    assert not is_read_or_refused(SMALL, CONTENT + more)


@given(cut=st.integers(0, len(SMALL)))
def test_a_text_that_ends_early_is_read_or_refused(cut: int) -> None:
    is_read_or_refused(SMALL[:cut], CONTENT)


@settings(max_examples=300)
@given(
    at=st.integers(0, len(SMALL)),
    length=st.integers(0, 12),
    put=st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            ["-1", "-233", "99999999999999999999999", "4611686018427387904", "=", "6=-1", "0=0", "\n", " ", "\n\n", "1e9", "nan", "LSTM", "Embed", "\0"]
        ),
    ),
)
def test_a_text_that_was_changed_is_read_or_refused(at: int, length: int, put: str) -> None:
    is_read_or_refused(SMALL[:at] + put + SMALL[at + length :], CONTENT)


@given(words=st.lists(st.sampled_from([*SMALL.split(), "\n", "-5", "18446744073709551616"]), max_size=40))
def test_words_in_any_order_are_read_or_refused(words: list[str]) -> None:
    is_read_or_refused("7767517\n1 1\n" + " ".join(words), CONTENT)


@given(at=st.integers(0, len(CONTENT) - 4), put=st.binary(min_size=4, max_size=4))
def test_weights_that_were_changed_are_read_or_refused(at: int, put: bytes) -> None:
    is_read_or_refused(SMALL, CONTENT[:at] + put + CONTENT[at + 4 :])


@pytest.mark.parametrize(
    "line",
    [
        "Input", "Input image", "Convolution c 1", "Convolution c x y a b", "Convolution c 1 1 image a 0=5 6=", "Convolution c 1 1 image a 0=5 6=1.5",
        "Convolution c 1 1 image a 0=5 6=-1", "Convolution c 1 1 image a 0=5 6=-233", "Convolution c 1 1 image a 0=5 6=99999999999999999999999",
        "Convolution c 1 1 image a 0=5 6=4611686018427387904", "MemoryData m 0 1 m 0=9999999999 1=9999999999 21=0", "Convolution c -3 1 image a 0=5 6=1",
        "Convolution c 7 9 image", "Gemm g 1 1 image a 6=1 10=9", "Convolution c 1 1 image a word",
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_refused(line: str) -> None:
    assert not is_read_or_refused(f"7767517\n2 2\n{INPUT}\n{line}\n", bytes(8))


@pytest.mark.parametrize("text", ["", "\n", "7767517", "7767518\n0 0\n", "\x00\xff\n1 1\n"])
def test_a_text_without_the_magic_number_is_refused(text: str) -> None:
    assert not is_read_or_refused(text, b"")


def test_weights_of_a_kind_that_is_not_known_are_refused() -> None:
    text = param(INPUT, "Convolution conv 1 1 image a 0=5 1=1 6=15")
    for tag in (0x0002C056, 1, 0xFFFFFFFF):
        with pytest.raises(ExportError, match=rf"^net: expected an ncnn network, found: weights with the tag {tag:#x}$"):
            read_network(text, tagged(floats(15), tag), where="net")


@pytest.mark.parametrize(
    "kind",
    [
        "LSTM", "GRU", "RNN", "Embed", "MultiHeadAttention", "DeformableConv2D", "Convolution1D", "Convolution3D", "Deconvolution1D", "ConvolutionDepthWise1D",
        "Normalize", "Bias", "Quantize", "Dequantize", "Requantize", "RMSNorm",
    ],
)  # fmt: skip
def test_layers_whose_weights_are_not_known_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ExportError, match=f"^net: expected layers whose weights are known, found {kind}$") as caught:
        read_network(param(INPUT, f"{kind} layer 1 1 image y 0=4 6=8"), floats(8).tobytes(), where="net")
    assert caught.value.hint == "use ncnn or ncnn-fp16"


def test_a_layer_without_weights_may_be_of_any_kind() -> None:
    layers = read_network(param(INPUT, "ReLU relu 1 1 image a", "NewInNcnn new 1 1 a y 0=3 -23303=2,1,2"), b"", where="net")
    assert [layer.weights for layer in layers] == [[], [], []]
    assert layers[2].parameters == {0: "3", -23303: "2,1,2"}


# ----------------------------------------------------------------------------------------------------------------------- INT8


def convolution(weights: np.ndarray, *, bias: np.ndarray | None = None, group: int = 1, bottom: str = "image", top: str = "y", name: str = "conv") -> Layer:
    """A layer of (out, in / group, h, w) weights, padded so that sizes stay."""
    out, _, side, _ = weights.shape
    parameters = {0: str(out), 1: str(side), 4: str(side // 2), 5: str(int(bias is not None)), 6: str(weights.size)}
    kind = "Convolution" if group == 1 else "ConvolutionDepthWise"
    arrays = [(weights.ravel(), True)] + ([(bias, False)] if bias is not None else [])
    return Layer(kind=kind, name=name, bottoms=[bottom], tops=[top], parameters=parameters | ({7: str(group)} if group > 1 else {}), weights=arrays)


def quantized(weights: np.ndarray, scale: float) -> QuantizedConvolution:
    return QuantizedConvolution(weights=weights, scale=scale)


def scales_of(layer: Layer) -> tuple[np.ndarray, float]:
    """What levels of the weights and of the input are multiplied with to get levels."""
    (of_rows, _), (of_input, _) = layer.weights[-2:]
    assert of_input.shape == (1,)
    return of_rows, float(of_input[0])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("group", [1, 6])
def test_weights_are_within_half_a_level_of_what_they_were(group: int, has_bias: bool) -> None:
    weights = floats(6, 1 if group > 1 else 4, 3, 3) * np.array([1e-3, 1, 50, 1, 1, 1], dtype=np.float32)[:, None, None, None]
    bias = floats(6) if has_bias else None
    layer = convolution(weights, bias=bias, group=group)
    assert quantize_convolutions([layer], [quantized(weights, 0.02)]) == 1
    assert layer.parameters[8] == "1"
    levels, is_tagged = layer.weights[0]
    assert (levels.dtype, is_tagged, levels.size) == (np.int8, True, weights.size)
    of_rows, of_input = scales_of(layer)
    assert of_input == pytest.approx(1 / 0.02)
    largest = np.abs(weights).max(axis=(1, 2, 3))
    np.testing.assert_allclose(of_rows, LEVELS / largest, rtol=1e-6)
    assert np.abs(levels.reshape(6, -1).astype(int)).max(axis=1).tolist() == [LEVELS] * 6
    steps = (largest / LEVELS)[:, None, None, None]
    assert (np.abs(float_weights(layer).reshape(weights.shape) - weights) <= 0.5001 * steps).all()
    if bias is not None:
        np.testing.assert_array_equal(layer.weights[1][0], bias)
    (again,) = read_network(*write_network([layer]), where="net")
    assert again.parameters == layer.parameters
    for (ours, ours_tagged), (theirs, theirs_tagged) in zip(again.weights, layer.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours.dtype, ours_tagged) == (theirs.dtype, theirs_tagged)


def test_weights_that_are_on_levels_stay_what_they_are() -> None:
    """What `dequantized` gives: rounding them again is no loss."""
    levels = RNG.integers(-126, 127, (4, 3, 3, 3))
    levels[:, 0, 0, 0] = 127
    weights = (levels * np.array([0.01, 0.3, 2e-5, 7], dtype=np.float32)[:, None, None, None]).astype(np.float32)
    layer = convolution(weights)
    quantize_convolutions([layer], [quantized(weights, 1.0)])
    np.testing.assert_array_equal(layer.weights[0][0].reshape(levels.shape), levels)


def test_a_channel_of_zeros_stays_zero() -> None:
    weights = floats(3, 2, 3, 3)
    weights[1] = 0
    layer = convolution(weights, bias=floats(3))
    assert quantize_convolutions([layer], [quantized(weights, 0.1)]) == 1
    assert all(np.isfinite(array).all() for array, _ in layer.weights)
    assert not float_weights(layer).reshape(weights.shape)[1].any()
    assert (scales_of(layer)[0] > 0).all()


def test_shared_weights_take_the_coarsest_scale() -> None:
    """Their layers cannot be told apart: a scale that is too fine would clip."""
    shared, own = floats(4, 3, 1, 1), floats(4, 3, 1, 1)
    layers = [convolution(shared, name="a"), convolution(own, name="b"), convolution(shared, name="c")]
    for order in (1, -1):
        copies = [convolution(layer.weights[0][0].reshape(4, 3, 1, 1), name=layer.name) for layer in layers]
        scales = [quantized(shared, 0.5), quantized(own, 0.125), quantized(shared, 0.25)][::order]
        assert quantize_convolutions(copies, scales) == 3
        assert [scales_of(layer)[1] for layer in copies] == [2, 8, 2]


def test_only_what_is_asked_for_is_quantised_and_counted_once() -> None:
    chosen, other = floats(4, 3, 3, 3), floats(4, 3, 3, 3)
    layers = [
        Layer(kind="Input", name="image", bottoms=[], tops=["image"], parameters={}),
        convolution(chosen, name="a"),
        convolution(other, name="b"),
        Layer(kind="InnerProduct", name="fc", bottoms=["y"], tops=["z"], parameters={0: "4", 2: "108"}, weights=[(chosen.ravel(), True)]),
    ]
    assert quantize_convolutions(layers, [quantized(chosen, 0.1), quantized(floats(4, 3, 3, 3), 0.1)]) == 1
    assert [layer.number(8) for layer in layers] == [0, 1, 0, 0]
    np.testing.assert_array_equal(layers[2].weights[0][0], other.ravel())
    np.testing.assert_array_equal(layers[3].weights[0][0], chosen.ravel())
    assert quantize_convolutions(layers, [quantized(chosen, 0.1)]) == 0, "what is in INT8 stays as it is"
    assert quantize_convolutions([], [quantized(chosen, 0.1)]) == 0
    assert quantize_convolutions([convolution(other)], []) == 0


@pytest.mark.parametrize(("group", "is_quantised"), [(1, True), (2, False), (3, False), (6, True)])
def test_grouped_convolutions_stay_in_float_unless_they_are_depthwise(group: int, is_quantised: bool) -> None:
    weights = floats(6, 6 // group, 3, 3)
    layer = convolution(weights, group=group)
    before = dict(layer.parameters), list(layer.weights)
    assert quantize_convolutions([layer], [quantized(weights, 0.1)]) == int(is_quantised)
    assert ((layer.parameters, layer.weights) == before) != is_quantised


def test_weights_in_float16_are_not_taken_for_others() -> None:
    layer = convolution(floats(4, 3, 1, 1).astype(np.float16))
    assert quantize_convolutions([layer], [quantized(layer.weights[0][0].astype(np.float32).reshape(4, 3, 1, 1), 0.1)]) == 0


def test_float_weights_are_flat_float32_whatever_they_are_kept_in() -> None:
    weights = floats(4, 3, 3, 3)
    for kept in (weights, weights.astype(np.float16)):
        found = float_weights(convolution(kept))
        assert (found.dtype, found.shape) == (np.float32, (weights.size,))
        np.testing.assert_allclose(found, weights.ravel(), rtol=1e-3, atol=1e-6)


def integers(x: np.ndarray, layer: Layer, shape: tuple[int, ...], group: int) -> np.ndarray:
    """What a convolution in INT8 is: whole numbers times whole numbers, and only then their values."""
    of_rows, of_input = scales_of(layer)
    levels = np.clip(np.rint(x * of_input), -LEVELS, LEVELS)
    weights = layer.weights[0][0].reshape(shape).astype(np.float64)
    sums = torch.nn.functional.conv2d(torch.from_numpy(levels).double(), torch.from_numpy(weights), padding=shape[2] // 2, groups=group).numpy()
    bias = layer.weights[1][0] if layer.number(5) else np.zeros(shape[0])
    values: np.ndarray = sums / (of_rows.astype(np.float64) * of_input)[:, None, None] + bias[:, None, None]
    return values


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("side", [1, 3])
def test_ncnn_computes_in_whole_numbers(group: int, side: int, net: Callable[[list[Layer]], dict[str, Path]]) -> None:
    pytest.importorskip("ncnn", reason=f"needs ncnn: {BACKENDS['ncnn'].install_command}")
    rng = np.random.default_rng(9)
    weights = rng.standard_normal((16, 16 // group, side, side)).astype(np.float32)
    x = rng.standard_normal((1, 16, 9, 10)).astype(np.float32)
    layer = convolution(weights, bias=rng.standard_normal(16).astype(np.float32), group=group)
    assert quantize_convolutions([layer], [quantized(weights, 2 / LEVELS)]) == 1  # inputs beyond 2 are clipped
    given_layer = Layer(kind="Input", name="image", bottoms=[], tops=["image"], parameters={0: "10", 1: "9", 2: "16"})
    session = open_artefact("ncnn", net([given_layer, layer]), SessionOptions(precision="int8", threads=1), where="net")
    found = session.run({"image": x})["y"]
    session.close()
    expected = integers(x, layer, weights.shape, group)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4 * np.abs(expected).max())


@pytest.fixture
def net(tmp_path: Path) -> Callable[[list[Layer]], dict[str, Path]]:
    def save(layers: list[Layer]) -> dict[str, Path]:
        files = {"net": tmp_path / "end2end.param", "weights": tmp_path / "end2end.bin"}
        text, content = write_network(layers)
        files["net"].write_text(text)
        files["weights"].write_bytes(content)
        return files

    return save
