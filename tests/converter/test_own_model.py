"""Anybody's network and a spec: a module, TorchScript, an exported program or an ONNX file becomes a bundle with the same numbers, or one line says why not."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle, sha256_of
from modelcrate_bundle.errors import ArchitectureError, CheckpointError, ConfigError, ExportError, ModelcrateError, ParityError
from modelcrate_bundle.schema import Resize
from modelcrate_converter.cli import app
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_runtime import Classifier, Detector, Network, PoseDetector
from modelcrate_runtime.resampling import resize_pillow

Image = np.ndarray
HEIGHT, WIDTH = 12, 16
MEAN, STD = np.array([123.5, 116.25, 103.0], dtype=np.float32), np.array([58.5, 57.0, 57.5], dtype=np.float32)
INPUT = f"""[input]
size_hw = [{HEIGHT}, {WIDTH}]
mean = {MEAN.tolist()}
std = {STD.tolist()}
"""
PLAIN = f"[input]\nsize_hw = [{HEIGHT}, {WIDTH}]\n"
STRETCH = '[resize]\nmode = "stretch"\n'
CLASSIFIER = 'task = "Classifier"\n'
NETWORK = 'task = "Network"\n'

NETS = '''
import os
import sys

import torch
from torch import nn


class Tiny(nn.Module):
    """(N, C, H, W) -> (N, classes)."""

    def __init__(self, channels: int = 3, classes: int = 4, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(channels + classes)
        self.conv = nn.Conv2d(channels, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5 * 3, classes)
        self.pool = nn.AvgPool2d((2, 8))
        self.gain = gain

    def features(self, x):
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.gain * self.head(self.drop(self.pool(self.features(x)).flatten(1)))


class Named(Tiny):
    def forward(self, x):
        maps = self.features(x)
        return {"maps": maps, "scores": self.head(self.pool(maps).flatten(1))}


class Pixels(nn.Module):
    def forward(self, x):
        return x


class OneAtATime(Tiny):
    """As somebody writes who never had a batch."""

    def forward(self, x):
        return self.head(self.pool(self.features(x)).reshape(1, 15))


class Inner(nn.Module):
    """Its weights begin with `model.` by right."""

    def __init__(self):
        super().__init__()
        self.model = Tiny()

    def forward(self, x):
        return self.model(x)


class Outer(Inner):
    """And these with `model.model.`."""

    def __init__(self):
        super().__init__()
        self.model = Inner()


class Boxes(nn.Module):
    """Three boxes of fixed places in network pixels; the third is below any threshold."""

    def forward(self, x):
        level = x.mean(dim=(1, 2, 3))[:, None]
        rows = torch.tensor([[2.0, 4.0, 10.0, 8.0, 0.9], [0.0, 0.0, 16.0, 12.0, 0.5], [1.0, 1.0, 5.0, 5.0, 0.1]])
        scale = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
        return rows[None] - 0.001 * torch.tanh(level)[:, :, None] * scale, torch.tensor([[1, 0, 1]]).expand(x.shape[0], 3)


class Found(nn.Module):
    """The brighter the image, the more is in it: nothing in noise around zero."""

    def forward(self, x):
        rows = torch.tensor([[2.0, 4.0, 10.0, 8.0, 0.9], [0.0, 0.0, 16.0, 12.0, 0.5], [1.0, 1.0, 5.0, 5.0, 0.6]])
        kept = torch.nonzero(x.mean() > torch.tensor([50.0, 80.0, 120.0])).flatten()
        return rows[kept][None], kept[None]


class Following(nn.Module):
    """A box that follows the brightest pixel: how the image was resized is seen in it."""

    def forward(self, x):
        right = 1 + x.amax(dim=(1, 2, 3)) / 20
        one = torch.ones_like(right)
        return torch.stack([0 * one, 0 * one, right, 8 * one, 0.5 * one], dim=1)[:, None], (0 * one[:, None]).long()


class Simcc(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.x, self.y = nn.Linear(3 * 12 * 16, 2 * 32), nn.Linear(3 * 12 * 16, 2 * 24)

    def forward(self, x):
        flat = x.flatten(1)
        return self.x(flat).reshape(-1, 2, 32), self.y(flat).reshape(-1, 2, 24)


class Bins(Simcc):
    def forward(self, x):
        return super().forward(x)[0]


class Heatmaps(nn.Module):
    """Two bells whose height, and not whose place, depends on the image."""

    def __init__(self, size=(12, 16), stride=1):
        super().__init__()
        y, x = torch.meshgrid(torch.arange(size[0] // stride), torch.arange(size[1] // stride), indexing="ij")
        bells = [torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 4.5) for a, b in ((6.3, 5.0), (8.0, 6.4))]
        self.register_buffer("bells", torch.stack(bells))

    def forward(self, x):
        return self.bells[None] * (2 + torch.tanh(x.mean(dim=(1, 2, 3))))[:, None, None, None]


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 12 * 16, 6)

    def forward(self, x):
        return torch.sigmoid(self.head(x.flatten(1))).reshape(-1, 3, 2)


class InPlace(Tiny):
    """The input is the network's own to change, in PyTorch."""

    def forward(self, x):
        x -= 100.0
        return super().forward(x)


class Rows(Tiny):
    """As many rows as the image asks for."""

    def forward(self, x):
        return torch.nonzero(self.features(x)[0, 0] > 0)[None].float()


class Exporting(Tiny):
    def forward(self, x):
        return super().forward(x) * (2.0 if torch.onnx.is_in_onnx_export() else 1.0)


class Tracing(Tiny):
    def forward(self, x):
        return super().forward(x) + (1.0 if torch.jit.is_tracing() else 0.0)


class Counting(Tiny):
    """A number of Python's becomes a constant of the graph."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Branching(Tiny):
    """So does a branch that was taken once."""

    def forward(self, x):
        y = super().forward(x)
        return y if bool(x.abs().sum() == 0) else -y


class Text(Tiny):
    def forward(self, x):
        return "a cat"


class Brains(Tiny):
    def forward(self, x):
        return super().forward(x).bfloat16()


class Broken(Tiny):
    def forward(self, x):
        raise RuntimeError("no\\nforward")


made = Tiny(classes=6)
number = 5


def build(classes: int = 4, gain: float = 1.0):
    return Tiny(classes=classes, gain=gain)


def failing():
    raise RuntimeError("out of\\nluck")


def nothing():
    return None


def leaving():
    sys.exit(0)


def moving():
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere")
    return Tiny()
'''

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder to work in, with a module of networks that is found from it alone."""

    folder: Path
    module: str
    nets: ModuleType

    @property
    def out(self) -> Path:
        return self.folder / "crates"

    def spec(self, text: str, name: str = "spec.toml") -> Path:
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def weights(self, network: torch.nn.Module, *, prefix: str = "", name: str = "w.pth") -> Path:
        torch.save({"state_dict": {prefix + key: value for key, value in network.state_dict().items()}}, self.folder / name)
        return self.folder / name

    def convert(self, text: str, what: str | None = None, file: Path | None = None, **options: Any) -> Conversion:
        builder = f"{self.module}:{what}" if what else None
        options = {"out": self.out, "spec": self.spec(text), "builder": builder} | options
        (conversion,) = convert(file, [load_config("onnxruntime")], ConvertOptions(**options))
        if conversion.error is not None:
            raise conversion.error
        return conversion

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, ["convert", *(str(a) for a in arguments), "-t", "onnxruntime", "-o", str(self.out)])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    module = f"own_nets_{next(_numbers)}"
    folder = tmp_path / "work"
    folder.mkdir()
    file = folder / f"{module}.py"
    file.write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)
    own = importlib.util.spec_from_file_location(f"{module}_by_hand", file)
    assert own is not None
    assert own.loader is not None
    nets = importlib.util.module_from_spec(own)
    own.loader.exec_module(nets)
    before = list(sys.path)
    yield Place(folder=folder, module=module, nets=nets)
    for name in [name for name in sys.modules if name.startswith(module)]:
        del sys.modules[name]
    after, sys.path[:] = list(sys.path), before
    assert after == before


def images(count: int, *, size_hw: tuple[int, int] = (HEIGHT, WIDTH), seed: int = 0) -> list[Image]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *size_hw, 3), dtype=np.uint8))


def by_hand(image: Image, *, mean: np.ndarray = MEAN, std: np.ndarray = STD, color: str = "rgb") -> torch.Tensor:
    """(1, C, H, W): what the network gets of an image that has its size."""
    pixels = {"rgb": lambda: image[:, :, ::-1], "bgr": lambda: image, "gray": lambda: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[:, :, None]}[color]()
    return torch.from_numpy(np.ascontiguousarray(((pixels.astype(np.float64) - mean) / std).transpose(2, 0, 1)[None]).astype(np.float32))


def answers(network: torch.nn.Module, given: list[torch.Tensor]) -> Any:
    with torch.inference_mode():
        return [network.eval()(tensor.clone()) for tensor in given]


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.shape(found) == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def refused(result: Result, code: int, *words: str) -> None:
    """One line `error: ...` with these words, hints at most after it, no traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    assert "Warning" not in result.stderr
    for word in words:
        assert word in errors[0], errors[0]
    after = result.stderr.splitlines()[result.stderr.splitlines().index(errors[0]) + 1 :]
    assert len(after) <= 1
    assert all(line.startswith(" hint: ") for line in after), after


def nothing_left(place: Place) -> None:
    assert not place.out.exists() or list(place.out.iterdir()) == []
    assert list(place.folder.parent.iterdir()) == [place.folder]


# ------------------------------------------------------------------------------------------------------------------ where from


def scripted(network: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network.eval()).save(str(path))
    return path


def traced(network: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network.eval(), torch.zeros(2, 3, HEIGHT, WIDTH)).save(str(path))
    return path


def exported(network: torch.nn.Module, path: Path, *, batch: int | None = None) -> Path:
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network.eval(), (torch.zeros(batch or 2, 3, HEIGHT, WIDTH),), dynamic_shapes=shapes), path)
    return path


KERNEL = np.random.default_rng(5).normal(size=(4, 3, 3, 3)).astype(np.float32)
BIAS = np.array([0.5, -1, 0, 2], dtype=np.float32)


def foreign(
    path: Path, *, shape: tuple[int | str, ...], out: tuple[int | str | None, ...], ir: int = 8, opset: int = 13, weights_are_inputs: bool = False, **more: Any
) -> Path:
    """`scores` = mean over the image of the relu of a convolution, as another tool would write it; `more` changes parts of the graph."""
    inputs = [helper.make_tensor_value_info("pixels", more.get("dtype", TensorProto.FLOAT), shape)]
    if weights_are_inputs:
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in (("kernel", KERNEL), ("bias", BIAS))]
    nodes = more.get("nodes") or [
        helper.make_node("Conv", ["pixels", "kernel", "bias"], ["/conv/maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["/conv/maps"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
        helper.make_node("Sigmoid", ["scores"], ["chances"]),
    ]
    outputs = more.get("outputs") or [helper.make_tensor_value_info("scores", TensorProto.FLOAT, out)]
    if more.get("several"):
        outputs = [helper.make_tensor_value_info("maps", TensorProto.FLOAT, None), *outputs, helper.make_tensor_value_info("chances", TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(value, name) for name, value in ({"kernel": KERNEL, "bias": BIAS} | more.get("weights", {})).items()]
    graph = helper.make_graph(nodes, "theirs", [*inputs, *more.get("more_inputs", [])], outputs, weights)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in more.get("domains", []))]
    model = helper.make_model(graph, producer_name="another-tool", ir_version=ir, opset_imports=opsets)
    path.write_bytes(model.SerializeToString())
    return path


def foreign_by_hand(tensor: torch.Tensor) -> np.ndarray:
    maps = functional.conv2d(tensor, torch.from_numpy(KERNEL), torch.from_numpy(BIAS), padding=1)
    return torch.relu(maps).mean(dim=(2, 3)).numpy()


@pytest.mark.parametrize(("what", "classes"), [("Tiny", 4), ("build", 4), ("made", 6)], ids=["a class", "a function", "a module"])
def test_a_network_by_the_name_of_what_makes_it(place: Place, what: str, classes: int) -> None:
    conversion = place.convert(CLASSIFIER + INPUT + STRETCH, what)
    assert conversion.place == place.out / f"{'tiny' if what == 'Tiny' else place.module}_onnxruntime"
    given = images(3)
    expected = answers(place.nets.Tiny(classes=classes), [by_hand(image) for image in given])
    with Classifier(conversion.place) as classifier:
        for image, (scores,) in zip(given, expected, strict=True):
            result = classifier.classify(image)
            assert result.labels.tolist() == np.argsort(-scores.numpy()).tolist()[:5]
            close(result.scores, -np.sort(-scores.numpy())[:5])


def test_the_command_line_takes_a_module_its_weights_and_a_spec(place: Place) -> None:
    torch.manual_seed(99)
    trained = place.nets.Tiny(classes=3)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    trained.norm.running_mean.fill_(0.25)
    weights = place.weights(trained)
    spec = place.spec('task = "Classifier"\nname = "my-net"\nclass_names = ["cat", "dog", "owl"]\n[args]\nclasses = 3\n' + INPUT)
    result = place.run("--model", f"{place.module}:build", "--weights", weights, "--spec", spec)
    assert result.exit_code == 0, result.output
    assert "done load model" in result.stderr
    assert "parity with PyTorch" in result.stdout
    (image,) = images(1)
    with Classifier(place.out / "my-net_onnxruntime") as classifier:
        assert classifier.class_names == ["cat", "dog", "owl"]
        (scores,) = answers(trained, [by_hand(image)])[0].numpy()
        close([score for _, score in sorted(classifier(image))], scores)
    manifest = Bundle.open(place.out / "my-net_onnxruntime").manifest
    assert manifest is not None
    assert (manifest.provenance.checkpoint, manifest.provenance.checkpoint_sha256) == ("w.pth", sha256_of(weights))


SOURCES: dict[str, tuple[str, str, Callable[[torch.nn.Module, Path], Path]]] = {
    "scripted": ("net.pt", "Tiny", scripted),
    "traced": ("net.ts", "Tiny", traced),
    "scripted, a mapping": ("net.pt", "Named", scripted),
    "exported": ("net.pt2", "Tiny", exported),
    "exported, a mapping": ("net.pt2", "Named", exported),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_that_is_a_network(place: Place, source: str) -> None:
    name, what, save = SOURCES[source]
    network = getattr(place.nets, what)()
    file = save(network, place.folder / name)
    given = images(5)
    result = place.run(file, "--spec", place.spec(NETWORK + INPUT + STRETCH))
    assert result.exit_code == 0, result.output
    with Network(place.out / "net_onnxruntime") as bundle:
        found = bundle.batch(given)
        names = ["maps", "scores"] if what == "Named" else ["output"]
        assert [spec.name for spec in bundle.session.outputs] == names
        assert bundle.session.inputs[0].is_batch_dynamic
        for tensors, expected in zip(found, answers(network, [by_hand(image) for image in given]), strict=True):
            for output in names:
                close(tensors[output], expected[output] if what == "Named" else expected)
    manifest = Bundle.open(place.out / "net_onnxruntime").manifest
    assert manifest is not None
    assert (manifest.parity.reference, manifest.parity.passed) == ("PyTorch", True)
    assert (manifest.provenance.checkpoint, manifest.provenance.checkpoint_sha256) == (name, sha256_of(file))
    assert manifest.provenance.facts["network"] == name


def test_outputs_name_what_a_module_answers(place: Place) -> None:
    conversion = place.convert('task = "Network"\noutputs = ["a", "b"]\n' + INPUT + STRETCH, "Named")
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert [(spec.name, spec.shape) for spec in conversion.bundle.manifest.outputs] == [("a", ("batch", 5, 6, 8)), ("b", ("batch", 4))]


FOREIGN: dict[str, dict[str, Any]] = {
    "fixed batch": {"shape": (1, 3, HEIGHT, WIDTH), "out": (1, 4)},
    "batch of -1": {"shape": (-1, 3, HEIGHT, WIDTH), "out": (-1, 4)},
    "named batch": {"shape": ("N", 3, HEIGHT, WIDTH), "out": ("N", 4)},
    "weights among the inputs": {"shape": ("N", 3, HEIGHT, WIDTH), "out": ("N", 4), "ir": 3, "opset": 9, "weights_are_inputs": True},
    "weights among the inputs, fixed batch": {"shape": (1, 3, HEIGHT, WIDTH), "out": (1, 4), "ir": 7, "weights_are_inputs": True},
    "any size": {"shape": ("N", 3, "height", "width"), "out": ("N", 4)},
    "nothing said": {"shape": ("a", "b", "c", "d"), "out": None},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_onnx_file_of_another_tool(place: Place, case: str) -> None:
    file = foreign(place.folder / "Their Net.onnx", **FOREIGN[case])
    result = place.run(file, "--spec", place.spec(NETWORK + INPUT + STRETCH))
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(place.out / "their-net_onnxruntime")
    is_fixed = FOREIGN[case]["shape"][0] == 1
    first = 1 if is_fixed else "batch"
    assert bundle.manifest is not None
    assert [(spec.name, spec.dtype, spec.shape) for spec in bundle.manifest.inputs] == [("pixels", "float32", (first, 3, HEIGHT, WIDTH))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in bundle.manifest.outputs] == [("scores", "float32", (first, 4))]
    assert (bundle.manifest.parity.reference, bundle.manifest.parity.passed) == ("Their Net.onnx", True)
    assert (bundle.manifest.provenance.checkpoint, bundle.manifest.provenance.checkpoint_sha256) == ("Their Net.onnx", sha256_of(file))
    proto = onnx.load(bundle.root / "end2end.onnx")
    onnx.checker.check_model(proto)
    assert [value.name for value in proto.graph.input] == ["pixels"]
    given = images(3)
    with Network(bundle) as network:
        for image, tensors in zip(given, network.batch(given), strict=True):
            close(tensors["scores"], foreign_by_hand(by_hand(image)))


def test_one_of_several_outputs_is_kept(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4), several=True)
    conversion = place.convert('task = "Classifier"\noutputs = ["chances"]\n' + INPUT, file=file)
    assert conversion.bundle is not None
    proto = onnx.load(conversion.place / "end2end.onnx")
    assert [value.name for value in proto.graph.output] == ["chances"]
    (image,) = images(1)
    with Classifier(conversion.place) as classifier:
        close([score for _, score in sorted(classifier(image))], 1 / (1 + np.exp(-foreign_by_hand(by_hand(image))[0].astype(np.float64))))


def test_outputs_come_in_the_order_of_the_spec(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4), several=True)
    conversion = place.convert('task = "Network"\noutputs = ["scores", "maps"]\n' + INPUT + STRETCH, file=file)
    with Network(conversion.place) as network:
        assert [spec.name for spec in network.session.outputs] == ["scores", "maps"]
        assert network(images(1)[0])["maps"].shape == (1, 4, HEIGHT, WIDTH)


def test_size_stands_in_the_file_where_the_file_fixes_it(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=(1, 3, HEIGHT, WIDTH), out=(1, 4))
    conversion = place.convert(NETWORK + STRETCH, file=file)
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert conversion.bundle.manifest.inputs[0].shape == (1, 3, HEIGHT, WIDTH)


def test_external_weights_become_part_of_the_bundle(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4))
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="net.weights", size_threshold=0)
    conversion = place.convert(NETWORK + INPUT + STRETCH, file=file)
    values = np.fromfile(place.folder / "net.weights", dtype=np.float32)
    (2 * values).tofile(place.folder / "net.weights")
    (image,) = images(1)
    with Network(conversion.place) as network:
        close(network(image)["scores"], foreign_by_hand(by_hand(image)))
    again = place.convert(NETWORK + INPUT + STRETCH, file=file)
    assert again.status == "built", "the file of the graph is the same, its weights are not"
    with Network(again.place) as network:
        close(network(image)["scores"], 2 * foreign_by_hand(by_hand(image)))


@pytest.mark.parametrize("location", ["gone.weights", "../secret.weights", "/etc/hostname"])
def test_external_weights_that_are_gone_or_elsewhere_are_one_line(place: Place, location: str) -> None:
    (place.folder / "deeper").mkdir()
    (place.folder / "secret.weights").write_bytes(KERNEL.tobytes() + BIAS.tobytes())
    file = foreign(place.folder / "deeper" / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4))
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    file.write_bytes(model.SerializeToString())
    refused(place.run(file, "--spec", place.spec(NETWORK + INPUT + STRETCH)), ExportError.exit_code, "net.onnx")
    nothing_left(place)


# --------------------------------------------------------------------------------------------------------------- fixed batches


@pytest.mark.parametrize(("source", "batch"), [("module", 1), ("exported", 1), ("onnx", 1), ("module", 3)])
def test_a_fixed_batch_takes_its_number_in_every_call(place: Place, source: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = place.nets.OneAtATime() if batch == 1 else place.nets.Tiny()
    fixed = NETWORK + INPUT + f"batch = {batch}\n" + STRETCH
    if source == "module":
        conversion = place.convert(fixed, type(network).__name__)
    elif source == "exported":
        conversion = place.convert(fixed, file=exported(network, place.folder / "net.pt2", batch=1))
    else:
        conversion = place.convert(NETWORK + INPUT + STRETCH, file=foreign(place.folder / "net.onnx", shape=(1, 3, HEIGHT, WIDTH), out=(1, 4)))
    assert conversion.bundle is not None
    manifest = conversion.bundle.manifest
    assert manifest is not None
    assert [spec.shape[0] for spec in (*manifest.inputs, *manifest.outputs)] == [batch, batch]
    (limits,) = manifest.shape_ranges.values()
    assert {limits.min, limits.opt, limits.max} == {(batch, 3, HEIGHT, WIDTH)}
    given = images(4)
    tensors = [by_hand(image) for image in given]
    expected = [foreign_by_hand(tensor) for tensor in tensors] if source == "onnx" else answers(network, tensors)
    shapes: list[int] = []
    with Network(conversion.place) as opened:
        assert opened.max_batch == batch
        run = opened.session.run
        monkeypatch.setattr(opened.session, "run", lambda feeds: shapes.append(len(next(iter(feeds.values())))) or run(feeds))
        for found, wanted in zip(opened.batch(given), expected, strict=True):
            close(next(iter(found.outputs.values())), wanted)
    assert shapes == [batch] * -(-len(given) // batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_crops_share_fixed_batches_and_none_of_the_filling_is_seen(place: Place, batch: int) -> None:
    crop = "[crop]\npadding = 1.0\n"
    fixed = place.convert(NETWORK + INPUT + f"batch = {batch}\n" + crop, "Named", name="fixed")
    free = place.convert(NETWORK + INPUT + crop, "Named", name="free")
    given = images(2, size_hw=(40, 60))
    boxes = [[[0, 0, 16, 12], [8, 4, 40, 28]], [[3, 3, 35, 27], [0, 0, 60, 40], [20, 10, 50, 30]]]
    with Network(fixed.place) as one, Network(free.place) as other:
        for found, expected in zip(one.batch(given, boxes), other.batch(given, boxes), strict=True):
            for name in ("maps", "scores"):
                close(found[name], expected[name])


def test_a_network_of_one_input_that_is_said_to_take_any_number_gets_the_hint(place: Place) -> None:
    with pytest.raises(ExportError, match=r"input of shape \[2, 3, 12, 16\]") as caught:
        place.convert(NETWORK + INPUT + STRETCH, "OneAtATime")
    assert "batch = 1" in caught.value.hint
    nothing_left(place)


def test_rows_that_follow_the_image_differ_from_image_to_image(place: Place) -> None:
    conversion = place.convert(NETWORK + INPUT + "batch = 1\n" + STRETCH, "Rows")
    given = images(3)
    expected = answers(place.nets.Rows(), [by_hand(image) for image in given])
    assert len({len(rows[0]) for rows in expected}) > 1
    with Network(conversion.place) as network:
        for found, rows in zip(network.batch(given), expected, strict=True):
            close(found["output"], rows)


# ------------------------------------------------------------------------------------------------------- the way to the network


def test_levels_of_1_say_the_same_as_levels_of_255(place: Place) -> None:
    (image,) = images(1)
    of_255 = place.convert(NETWORK + PLAIN + "mean = [123.675, 116.28, 103.53]\nstd = [58.395, 57.12, 57.375]\n" + STRETCH, "Pixels", name="a")
    of_1 = place.convert(NETWORK + PLAIN + "levels = 1\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n" + STRETCH, "Pixels", name="b")
    assert (of_255.place / "pipeline.json").read_text() == (of_1.place / "pipeline.json").read_text()
    with Network(of_1.place) as network:
        expected = by_hand(image, mean=np.array([123.675, 116.28, 103.53]), std=np.array([58.395, 57.12, 57.375]))
        close(network(image)["output"], expected)


@pytest.mark.parametrize(("levels", "white"), [(255, 255.0), (1, 1.0)])
def test_without_mean_and_std_the_levels_are_the_networks_input(place: Place, levels: int, white: float) -> None:
    conversion = place.convert(NETWORK + PLAIN + f"levels = {levels}\n" + STRETCH, "Pixels")
    with Network(conversion.place) as network:
        values = network(np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8))["output"]
    np.testing.assert_allclose(values, white, rtol=1e-6)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_mean_and_std_are_in_the_order_of_the_channels(place: Place, color: str) -> None:
    conversion = place.convert(NETWORK + INPUT + f'color = "{color}"\n' + STRETCH, "Pixels")
    (image,) = images(1)
    with Network(conversion.place) as network:
        close(network(image)["output"], by_hand(image, color=color))


@pytest.mark.parametrize("way", ["resize", "crop"])
def test_a_grey_network(place: Place, way: str) -> None:
    spec = NETWORK + PLAIN + 'color = "gray"\nmean = [100.0]\nstd = [50.0]\n[args]\nchannels = 1\n' + ("[crop]\npadding = 1.0\n" if way == "crop" else STRETCH)
    conversion = place.convert(spec, "Tiny")
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert conversion.bundle.manifest.inputs[0].shape == ("batch", 1, HEIGHT, WIDTH)
    given = images(3)
    network = place.nets.Tiny(channels=1)
    with Network(conversion.place) as opened:
        found = opened.batch(given)
        alone = opened(cv2.cvtColor(given[0], cv2.COLOR_BGR2GRAY))
    tensors = [by_hand(image, mean=np.array([100.0]), std=np.array([50.0]), color="gray") for image in given]
    for one, expected in zip([*found, alone], answers(network, [*tensors, tensors[0]]), strict=True):
        close(one["output"], expected)


CV2 = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


@pytest.mark.parametrize("interpolation", [*CV2, "pillow-bilinear", "pillow-bicubic"])
def test_interpolation_is_what_the_spec_says(place: Place, interpolation: str) -> None:
    conversion = place.convert(NETWORK + PLAIN + f'[resize]\ninterpolation = "{interpolation}"\n', "Pixels")
    (image,) = images(1, size_hw=(31, 43))
    pillow = interpolation.removeprefix("pillow-") if interpolation not in CV2 else None
    resized = resize_pillow(image, (WIDTH, HEIGHT), kernel=pillow) if pillow else cv2.resize(image, (WIDTH, HEIGHT), interpolation=CV2[interpolation])
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert conversion.bundle.manifest.resampling == (interpolation if pillow else None)
    resize = conversion.bundle.pipeline.transform(Resize)
    assert resize is not None
    assert resize.interpolation == (pillow or interpolation)
    with Network(conversion.place) as network:
        np.testing.assert_array_equal(network(image)["output"], resized[:, :, ::-1].transpose(2, 0, 1)[None])


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A resize, an image of a size that it halves, and the part of the input (left, top, right, bottom) that the part of the image (the same) becomes."""

    toml: str
    size_hw: tuple[int, int]
    inside: tuple[int, int, int, int]
    of_image: tuple[int, int, int, int]
    filled: int = 0

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        left, top, right, bottom = self.inside
        return (right - left, bottom - top), (self.of_image[2] - self.of_image[0], self.of_image[3] - self.of_image[1])


FITS = {
    "stretch": Fit(toml='mode = "stretch"', size_hw=(24, 64), inside=(0, 0, 16, 12), of_image=(0, 0, 64, 24)),
    "letterbox, wide": Fit(toml='mode = "letterbox"\npad_value = 114', size_hw=(20, 32), inside=(0, 0, 16, 10), of_image=(0, 0, 32, 20), filled=114),
    "letterbox, tall": Fit(toml='mode = "letterbox"', size_hw=(24, 20), inside=(0, 0, 10, 12), of_image=(0, 0, 20, 24)),
    "letterbox-center, wide": Fit(
        toml='mode = "letterbox-center"\npad_value = 114', size_hw=(20, 32), inside=(0, 1, 16, 11), of_image=(0, 0, 32, 20), filled=114
    ),
    "letterbox-center, tall": Fit(toml='mode = "letterbox-center"', size_hw=(24, 20), inside=(3, 0, 13, 12), of_image=(0, 0, 20, 24)),
    "shorter-edge, wide": Fit(toml='mode = "shorter-edge"\nedge = 16', size_hw=(32, 44), inside=(0, 0, 16, 12), of_image=(6, 4, 38, 28)),
    "shorter-edge, tall": Fit(toml='mode = "shorter-edge"\nedge = 16', size_hw=(60, 32), inside=(0, 0, 16, 12), of_image=(0, 18, 32, 42)),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS.keys())
def test_a_whole_image_fits_as_the_spec_says_and_points_find_their_way_back(place: Place, fit: Fit) -> None:
    conversion = place.convert(NETWORK + INPUT + f"[resize]\n{fit.toml}\n", "Pixels")
    assert conversion.bundle is not None
    (image,) = images(1, size_hw=fit.size_hw)
    left, top, right, bottom = fit.of_image
    (new_w, new_h), _ = fit.sizes
    resized = np.full((HEIGHT, WIDTH, 3), fit.filled, dtype=np.uint8)
    resized[fit.inside[1] : fit.inside[3], fit.inside[0] : fit.inside[2]] = cv2.resize(image[top:bottom, left:right], (new_w, new_h))
    with Network(conversion.place) as network:
        tensors = network(image)
        close(tensors["output"], by_hand(resized))
        # Edges of the part that was seen; halving makes them exact.
        corners = np.array([[fit.inside[:2], fit.inside[2:]]], dtype=np.float32)
        np.testing.assert_allclose(tensors.to_image(corners)[0].ravel(), fit.of_image, atol=1e-4)
        # A white block in the image lies between the network pixels that show it.
        block = np.zeros_like(image)
        block[top + 4 : top + 8, left + 8 : left + 16] = 255
        seen = network(block)
    white = np.argwhere(seen["output"][0].max(axis=0) > (254 - 103) / 57.5)
    edges = np.array([[white.min(axis=0)[::-1], white.max(axis=0)[::-1] + 1]], dtype=np.float32)
    np.testing.assert_allclose(seen.to_image(edges)[0].ravel(), (left + 8, top + 4, left + 16, top + 8), atol=1e-4)


def test_a_network_of_crops(place: Place) -> None:
    conversion = place.convert(NETWORK + INPUT + "[crop]\npadding = 1.0\n", "Named")
    given = images(2) + images(1, size_hw=(40, 60), seed=1)
    boxes = [None, [[0, 0, WIDTH, HEIGHT]], [[8, 4, 40, 28], [5, 3, 5 + WIDTH, 3 + HEIGHT]]]
    crops = [given[0], given[1], given[2][4:28:2, 8:40:2], given[2][3 : 3 + HEIGHT, 5 : 5 + WIDTH]]
    expected = answers(place.nets.Named(), [by_hand(crop) for crop in crops])
    with Network(conversion.place) as network:
        assert network.is_top_down
        found = network.batch(given, boxes)
        assert [len(tensors) for tensors in found] == [1, 1, 2]
        for name in ("maps", "scores"):
            close(np.concatenate([tensors[name] for tensors in found]), np.concatenate([one[name].numpy() for one in expected]))
        assert [len(tensors) for tensors in network.batch(given[:2], [[], []])] == [0, 0]
        corners = np.tile(np.array([[0, 0], [WIDTH, HEIGHT]], dtype=np.float32), (2, 1, 1))
        np.testing.assert_allclose(found[2].to_image(corners).reshape(2, 4), boxes[2], atol=1e-4)


def test_a_pixel_of_a_crop_is_the_pixel_of_the_image_that_it_shows(place: Place) -> None:
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    image[10 + 2 * 3, 20 + 2 * 5] = 255
    for name, crop, box in (
        ("mmpose", "padding = 1.0", [20, 10, 52, 34]),  # 32x24 for 16x12: pixel i at 2 * i
        ("padded", "padding = 1.25", [23.2, 12.4, 48.8, 31.6]),  # 25.6x19.2, padded to the same
        ("udp", "padding = 1.0\nudp = true", [20, 10, 50, 32]),  # 30x22 for 15x11 distances; the side that is too short grows around the middle
    ):
        conversion = place.convert(NETWORK + PLAIN + f"[crop]\n{crop}\n", "Pixels", name=name)
        with Network(conversion.place) as network:
            tensors = network(image, box)
        y, x = np.unravel_index(tensors["output"][0, 0].argmax(), (HEIGHT, WIDTH))
        assert (x, y) == (5, 3), name
        (((found_x, found_y),),) = tensors.to_image(np.array([[[x, y]]], dtype=np.float32))
        np.testing.assert_allclose((found_x, found_y), (30, 16), atol=1e-4 if name != "udp" else 0.2, err_msg=name)


def test_whole_images_take_no_boxes(place: Place) -> None:
    conversion = place.convert(NETWORK + PLAIN + STRETCH, "Pixels")
    with Network(conversion.place) as network:
        assert not network.is_top_down
        assert network.batch([]) == []
        with pytest.raises(ModelcrateError, match="expected no boxes"):
            network(images(1)[0], [0, 0, 4, 4])


# --------------------------------------------------------------------------------------------------------------- tasks and heads


def test_softmax_and_topk_of_a_classifier(place: Place) -> None:
    conversion = place.convert('task = "Classifier"\nsoftmax = true\ntopk = 3\n[args]\nclasses = 9\ngain = 4.0\n' + INPUT, "build")
    (image,) = images(1)
    scores = answers(place.nets.Tiny(classes=9, gain=4.0), [by_hand(image)])[0].softmax(dim=1)[0].numpy()
    with Classifier(conversion.place) as classifier:
        result = classifier.classify(image)
        assert classifier.class_names == [f"class_{i}" for i in range(9)]
    assert result.labels.tolist() == np.argsort(-scores).tolist()[:3]
    close(result.scores, -np.sort(-scores)[:3])


def test_class_names_of_a_file_beside_the_spec(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4))
    labels = place.folder / "labels.txt"
    labels.write_text("ape\nbee\n\ncow\nélan\n", encoding="utf-8")
    (place.folder / "below").mkdir()
    monkeypatch.chdir(place.folder / "below")
    spec = 'task = "Classifier"\nclass_names_file = "labels.txt"\n' + INPUT
    conversion = place.convert(spec, file=file)
    with Classifier(conversion.place) as classifier:
        assert classifier.class_names == ["ape", "bee", "cow", "élan"]
    assert place.convert(spec, file=file).status == "current"
    labels.write_text("ape\nbee\ncow\ndoe\n", encoding="utf-8")
    place.convert(spec, file=file)
    with Classifier(conversion.place) as classifier:
        assert classifier.class_names == ["ape", "bee", "cow", "doe"]


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS.keys())
def test_a_detector_maps_its_boxes_back(place: Place, fit: Fit) -> None:
    spec = 'task = "Detector"\noutputs = ["dets", "labels"]\nscore_thr = 0.3\nclass_names = ["a", "b"]\n' + INPUT + f"[resize]\n{fit.toml}\n"
    conversion = place.convert(spec, "Boxes")
    image = np.zeros((*fit.size_hw, 3), dtype=np.uint8)
    (new_w, new_h), (width, height) = fit.sizes
    step, origin = np.array([width / new_w, height / new_h] * 2), np.array([*fit.inside[:2]] * 2)
    boxes = (np.array([[2, 4, 10, 8], [0, 0, 16, 12]]) - origin) * step + np.array([*fit.of_image[:2]] * 2)
    with Detector(conversion.place) as detector:
        found = detector.detect(image)
        assert detector.class_names == ["a", "b"]
        several = detector.detect_batch([image, image[:, ::-1]])
    assert found.labels.tolist() == [1, 0]
    np.testing.assert_allclose(found.boxes_xyxy, np.clip(boxes, 0, [*fit.size_hw[::-1]] * 2), atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.9, 0.5], atol=0.0011)
    for one in several:
        np.testing.assert_allclose(one.boxes_xyxy, found.boxes_xyxy, atol=1e-4)


def test_a_detectors_numbers_are_the_modules(place: Place) -> None:
    file = traced(place.nets.Boxes(), place.folder / "net.pt")
    conversion = place.convert('task = "Detector"\noutputs = ["dets", "labels"]\n' + INPUT, file=file)
    given = images(2)
    with Detector(conversion.place) as detector:
        for found, (dets, labels) in zip(detector.detect_batch(given), answers(place.nets.Boxes(), [by_hand(image) for image in given]), strict=True):
            close(np.concatenate([found.boxes_xyxy, found.scores[:, None]], axis=1), dets[0].numpy())
            assert found.labels.tolist() == labels[0].tolist()
    assert conversion.parity is not None
    assert {figure.name: figure.count > 0 for figure in conversion.parity.pixels} == {"box_shift_px": True, "score_shift": True, "label_flips": True}


def finder(path: Path) -> Path:
    """`Found` as another tool would write it, which says that it does not know how many there will be."""
    rows = np.array([[2, 4, 10, 8, 0.9], [0, 0, 16, 12, 0.5], [1, 1, 5, 5, 0.6]], dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["level"], keepdims=0),
        helper.make_node("Greater", ["level", "least"], ["kept"]),
        helper.make_node("NonZero", ["kept"], ["labels"]),
        helper.make_node("Squeeze", ["labels"], ["index"], axes=[0]),
        helper.make_node("Gather", ["rows", "index"], ["boxes"]),
        helper.make_node("Unsqueeze", ["boxes"], ["dets"], axes=[0]),
    ]
    info = helper.make_tensor_value_info
    outputs = [info("dets", TensorProto.FLOAT, (1, "found", 5)), info("labels", TensorProto.INT64, (1, "found"))]
    weights = {"rows": rows, "least": np.array([50, 80, 120], dtype=np.float32)}
    return foreign(path, shape=(1, 3, HEIGHT, WIDTH), out=None, nodes=nodes, outputs=outputs, weights=weights, opset=11)


@pytest.mark.parametrize("source", ["module", "onnx"])
def test_a_detector_that_finds_nothing_in_noise_finds_what_is_in_images(place: Place, source: str) -> None:
    spec = 'task = "Detector"\noutputs = ["dets", "labels"]\n' + PLAIN + "batch = 1\n"
    conversion = place.convert(spec, "Found") if source == "module" else place.convert(spec, file=finder(place.folder / "net.onnx"))
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert not [dim for spec in conversion.bundle.manifest.outputs for dim in spec.shape[1:2] if isinstance(dim, int)], "how many, only the image says"
    given = [np.full((HEIGHT, WIDTH, 3), level, dtype=np.uint8) for level in (0, 60, 100, 200)]
    with Detector(conversion.place) as detector:
        assert [found.labels.tolist() for found in detector.detect_batch(given)] == [[], [0], [0, 1], [0, 1, 2]]
        np.testing.assert_allclose(detector.detect(given[3]).boxes_xyxy[2], [1, 1, 5, 5])


def test_pictures_show_what_the_bundle_will_find(place: Place) -> None:
    cv2.imwrite(str(place.folder / "noise.png"), images(1, size_hw=(120, 160))[0])
    conversion = place.convert(
        'task = "Detector"\noutputs = ["dets", "labels"]\n' + PLAIN + '[resize]\ninterpolation = "pillow-bicubic"\n',
        "Following", images=(place.folder / "noise.png",),
    )  # fmt: skip
    theirs, ours = (cv2.imread(str(conversion.place / f"output_{name}.jpg")) for name in ("pytorch", "onnxruntime"))
    np.testing.assert_array_equal(theirs, ours)


def pose_spec(more: str, crop: str = "padding = 1.0", size_hw: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    return f'task = "PoseDetector"\n{more}\n' + INPUT.replace(f"[{HEIGHT}, {WIDTH}]", str(list(size_hw))) + f"[crop]\n{crop}\n"


def test_simcc(place: Place) -> None:
    spec = pose_spec('head = "simcc"\noutputs = ["simcc_x", "simcc_y"]\n[keypoints]\nnames = ["left", "right"]\nskeleton = [[0, 1]]\nflip_pairs = [[0, 1]]')
    conversion = place.convert(spec, "Simcc")
    given = images(3)
    with PoseDetector(conversion.place) as pose:
        found = pose.estimate_batch(given, [None] * 3)
    for poses, (x, y) in zip(found, answers(place.nets.Simcc(), [by_hand(image) for image in given]), strict=True):
        expected = torch.stack([x.argmax(dim=2), y.argmax(dim=2)], dim=2).numpy() / 2
        scores = torch.minimum(x.amax(dim=2), y.amax(dim=2)).numpy()
        assert (scores > 0).all()
        close(poses.keypoints_xy, expected)
        close(poses.scores, scores)
    assert conversion.bundle is not None
    manifest = conversion.bundle.manifest
    assert manifest is not None
    assert manifest.keypoints is not None
    assert (manifest.keypoints.names, manifest.keypoints.skeleton, manifest.keypoints.flip_pairs) == (["left", "right"], [(0, 1)], [(0, 1)])


def test_simcc_of_another_ratio_is_refused(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"split_ratio: 3 asks for \[48, 36\] bins, the network has \[32, 24\]"):
        place.convert(pose_spec('head = "simcc"\nsplit_ratio = 3.0\noutputs = ["simcc_x", "simcc_y"]'), "Simcc")


@pytest.mark.parametrize(("codec", "unbiased"), [("msra", False), ("msra", True), ("udp", False)])
def test_heatmaps(place: Place, codec: str, unbiased: bool) -> None:
    """Of a bell every refinement finds the middle, the quarter shift to a quarter of a cell."""
    side, stride = 48, 4
    more = f'head = "heatmap"\ncodec = "{codec}"\nunbiased = {str(unbiased).lower()}\nblur_kernel_size = 3\n[args]\nsize = [{side}, {side}]\nstride = {stride}'
    crop = "padding = 1.0\nudp = true" if codec == "udp" else "padding = 1.0"
    conversion = place.convert(pose_spec(more, crop, (side, side)), "Heatmaps")
    given = images(2, size_hw=(side, side))
    box = [0, 0, side - 1, side - 1] if codec == "udp" else [0, 0, side, side]
    middles = np.array([[6.3, 5.0], [8.0, 6.4]])
    cells = 11 / 47 if codec == "udp" else 12 / 48
    with PoseDetector(conversion.place) as pose:
        for image in given:
            poses = pose.estimate(image, box)
            (maps,) = answers(place.nets.Heatmaps((side, side), stride), [by_hand(image)])
            close(poses.scores, maps.amax(dim=(2, 3)).numpy())
            expected = np.array([[6.25, 5.0], [8.0, 6.25]]) if codec == "msra" and not unbiased else middles
            on_grid = poses.keypoints_xy[0] * cells
            if codec == "msra" and not unbiased:
                np.testing.assert_allclose(on_grid[[0, 1], [0, 1]], expected[[0, 1], [0, 1]], atol=1e-4)
                assert (np.abs(on_grid - expected) <= 0.2501).all()  # an even bell has no larger neighbour but by rounding
            else:
                np.testing.assert_allclose(on_grid, expected, atol=0.03)


def test_regression(place: Place) -> None:
    conversion = place.convert(pose_spec('head = "regression"'), "Regression")
    (image,) = images(1)
    (fractions,) = answers(place.nets.Regression(), [by_hand(image)])
    with PoseDetector(conversion.place) as pose:
        found = pose.estimate(image)
    close(found.keypoints_xy, fractions.numpy() * np.array([WIDTH, HEIGHT], dtype=np.float32))
    assert (found.scores == 1).all()
    assert conversion.bundle is not None
    assert conversion.bundle.manifest is not None
    assert conversion.bundle.manifest.keypoints is not None
    assert conversion.bundle.manifest.keypoints.names == ["keypoint_0", "keypoint_1", "keypoint_2"]


# ---------------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("what", "prefix"),
    [
        ("Tiny", "module."), ("Tiny", "model."), ("Tiny", "module.model."), ("Tiny", "model._orig_mod."),
        ("Inner", ""), ("Inner", "module."), ("Inner", "model."), ("Outer", ""), ("Outer", "module."),
    ],
)  # fmt: skip
def test_prefixes_of_wrappers_are_none_of_the_networks(place: Place, what: str, prefix: str) -> None:
    torch.manual_seed(3)
    trained = getattr(place.nets, what)()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    conversion = place.convert(NETWORK + INPUT + STRETCH, what, place.weights(trained, prefix=prefix), verify=False)
    (image,) = images(1)
    with Network(conversion.place) as network:
        close(network(image)["output"], answers(trained, [by_hand(image)])[0])


def test_other_weights_give_another_bundle_and_the_same_ones_are_built_again(place: Place) -> None:
    spec = NETWORK + INPUT + STRETCH
    first = place.convert(spec, "Tiny", place.weights(place.nets.Tiny()))
    again = place.convert(spec, "Tiny", place.weights(place.nets.Tiny()))
    assert (first.status, again.status) == ("built", "built"), "nobody knows whether code still makes the same network"
    assert place.convert(spec, "Tiny").status == "built"


def test_a_file_that_is_a_network_is_built_once(place: Place) -> None:
    spec = NETWORK + INPUT + STRETCH
    for file in (foreign(place.folder / "a.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4)), exported(place.nets.Tiny(), place.folder / "b.pt2")):
        assert [place.convert(spec, file=file).status for _ in range(2)] == ["built", "current"]
        assert place.convert(spec.replace("123.5", "120.5"), file=file).status == "built", "another spec"
        assert place.convert(spec.replace("123.5", "120.5"), file=file, force=True).status == "built"


def misfit(place: Place) -> Path:
    return place.weights(place.nets.Tiny(classes=7))


def surplus(place: Place) -> Path:
    weights = place.nets.Tiny().state_dict() | {"tail.weight": torch.ones(3)}
    torch.save(weights, place.folder / "w.pth")
    return place.folder / "w.pth"


def missing(place: Place) -> Path:
    weights = {key: value for key, value in place.nets.Tiny().state_dict().items() if key != "head.bias"}
    torch.save(weights, place.folder / "w.pth")
    return place.folder / "w.pth"


def infinite(place: Place) -> Path:
    weights = place.nets.Tiny().state_dict()
    weights["head.bias"][0] = float("inf")
    torch.save(weights, place.folder / "w.pth")
    return place.folder / "w.pth"


def gone(place: Place) -> Path:
    return place.folder / "w.pth"


def of_text(place: Place) -> Path:
    (place.folder / "w.pth").write_text("<html>404</html>")
    return place.folder / "w.pth"


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (misfit, ArchitectureError.exit_code, ("head.weight",)),
        (surplus, ArchitectureError.exit_code, ("tail.weight",)),
        (missing, ArchitectureError.exit_code, ("head.bias",)),
        (infinite, CheckpointError.exit_code, ("head.bias",)),
        (gone, CheckpointError.exit_code, ("found none",)),
        (of_text, CheckpointError.exit_code, ()),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_weights_that_do_not_fit_are_one_line(place: Place, make: Callable[[Place], Path], code: int, words: tuple[str, ...]) -> None:
    refused(place.run("--model", f"{place.module}:Tiny", "--weights", make(place), "--spec", place.spec(NETWORK + INPUT + STRETCH)), code, "w.pth", *words)
    nothing_left(place)


# --------------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("{}:Tiny.mro", 4, ("torch.nn.Module", "list")),
        ("no_such_module:Tiny", 4, ("no_such_module",)),
        ("{}:NoSuchNet", 4, ("NoSuchNet",)),
        ("{}:failing", 4, ("RuntimeError", "out of luck")),
        ("{}:nothing", 4, ("torch.nn.Module", "NoneType")),
        ("{}:number", 4, ("TypeError",)),
        ("{}:leaving", 4, ("SystemExit",)),
        ("{}", 4, ("package.module:function",)),
        (":Tiny", 4, ("package.module:function",)),
        ("{}:", 4, ("package.module:function",)),
        ("..{}:Tiny", 4, ()),
        ("{}:Text", 8, ("expected the network to answer tensors, found str",)),
        ("{}:Broken", 8, ("RuntimeError", "no forward")),
        ("{}:Brains", 8, ("output", "bfloat16")),
    ],
)
def test_a_builder_that_makes_no_network_is_one_line(place: Place, what: str, code: int, words: tuple[str, ...]) -> None:
    refused(place.run("--model", what.format(place.module), "--spec", place.spec(NETWORK + INPUT + STRETCH)), code, *words)
    nothing_left(place)


def test_a_builder_may_go_elsewhere(place: Place) -> None:
    out = place.out.absolute()
    assert place.convert(NETWORK + INPUT + STRETCH, "moving", out=out).status == "built"


def test_a_module_that_does_not_import_is_one_line(place: Place) -> None:
    (place.folder / f"{place.module}_broken.py").write_text("def build(:\n")
    refused(place.run("--model", f"{place.module}_broken:build", "--spec", place.spec(NETWORK + INPUT + STRETCH)), 4, "SyntaxError")
    (place.folder / f"{place.module}_script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--wrong'])\n")
    refused(place.run("--model", f"{place.module}_script:build", "--spec", place.spec(NETWORK + INPUT + STRETCH)), 4, "SystemExit")
    nothing_left(place)


def test_arguments_that_the_builder_does_not_take_are_one_line(place: Place) -> None:
    spec = place.spec(NETWORK + INPUT + STRETCH + "[args]\ncolour = 3\n")
    refused(place.run("--model", f"{place.module}:Tiny", "--spec", spec), 4, "colour")
    nothing_left(place)


def test_options_that_do_not_go_together_are_one_line(place: Place) -> None:
    spec, weights = place.spec(NETWORK + INPUT + STRETCH), place.weights(place.nets.Tiny())
    model = f"{place.module}:Tiny"
    refused(place.run("--model", model), 4, "--model", "--spec")
    refused(place.run("--weights", weights, "--spec", spec), 4, "--weights", "--model")
    refused(place.run("--weights", weights, weights, "--spec", spec), 4, "--weights", "--model")
    refused(place.run("--model", model, weights, "--spec", spec), 4, "--weights", "w.pth")
    refused(place.run(weights, "--spec", spec), 4, "w.pth", "found a checkpoint")
    refused(place.run(weights, weights, "--spec", spec), 4, "--spec", "found 2")
    assert place.run("--spec", spec).exit_code == 2
    refused(place.run("--model", model, "--spec", place.folder / "gone.toml"), 4, "gone.toml", "No such file")
    refused(place.run("--model", model, "--spec", place.folder), 4, "directory")
    refused(place.run(place.folder, "--spec", spec), 6, "found a folder")
    refused(place.run(place.folder / "gone.onnx", "--spec", spec), 6, "gone.onnx", "found none")
    nothing_left(place)


def test_a_network_in_a_file_wants_a_spec(place: Place) -> None:
    tiny = place.nets.Tiny()
    foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4))
    for file, kind in (
        (place.folder / "net.onnx", "onnx"),
        (scripted(tiny, place.folder / "net.pt"), "torchscript"),
        (exported(tiny, place.folder / "net.pt2"), "exported program"),
    ):
        refused(place.run(file), 4, file.name, "--spec", kind)
    nothing_left(place)


def test_another_hash_is_one_line(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=("N", 3, HEIGHT, WIDTH), out=("N", 4))
    spec = place.spec(NETWORK + INPUT + STRETCH)
    refused(place.run(file, "--spec", spec, "--sha256", "0123abcd"), 6, "net.onnx", "0123abcd", sha256_of(file))
    assert place.run(file, "--spec", spec, "--sha256", sha256_of(file)[:9].upper()).exit_code == 0


WRONG_SPECS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "no TOML": ("Tiny", "task = Network", ("line 1",)),
    "nothing": ("Tiny", "", ("task",)),
    "no such task": ("Tiny", 'task = "Segmenter"\n' + PLAIN, ("Segmenter", "$.task")),
    "a key that nobody knows": ("Tiny", NETWORK + "colour = 3\n" + PLAIN + STRETCH, ("colour",)),
    "a key that nobody knows, deeper": ("Tiny", NETWORK + PLAIN + 'colour = "rgb"\n' + STRETCH, ("colour", "$.input")),
    "a key of another task": ("Tiny", NETWORK + "softmax = true\n" + PLAIN + STRETCH, ("softmax",)),
    "another type": ("Tiny", CLASSIFIER + 'topk = "5"\n' + PLAIN, ("topk", "str")),
    "another type of a size": ("Tiny", NETWORK + "[input]\nsize_hw = [12.5, 16]\n" + STRETCH, ("size_hw", "float")),
    "one side": ("Tiny", NETWORK + "[input]\nsize_hw = 12\n" + STRETCH, ("size_hw",)),
    "no side at all": ("Tiny", NETWORK + "[input]\nsize_hw = [0, 16]\n" + STRETCH, ("size_hw",)),
    "no size": ("Tiny", NETWORK + "[input]\n" + STRETCH, ("size_hw", "found none")),
    "no such colour": ("Tiny", NETWORK + PLAIN + 'color = "yuv"\n' + STRETCH, ("yuv", "color")),
    "no such levels": ("Tiny", NETWORK + PLAIN + "levels = 127\n" + STRETCH, ("127", "levels")),
    "a batch of none": ("Tiny", NETWORK + PLAIN + "batch = 0\n" + STRETCH, ("batch",)),
    "std in fractions": ("Tiny", NETWORK + PLAIN + "std = [0.229, 0.224, 0.225]\n" + STRETCH, ("std", "0.229")),
    "std of zero": ("Tiny", NETWORK + PLAIN + "std = [0.0, 1.0, 1.0]\n" + STRETCH, ("std", "positive")),
    "std of one channel": ("Tiny", NETWORK + PLAIN + "std = [50.0]\n" + STRETCH, ("std", "3 numbers")),
    "a mean that is none": ("Tiny", NETWORK + PLAIN + "mean = [nan, 1.0, 1.0]\n" + STRETCH, ("mean",)),
    "a size that the network does not take": ("Tiny", NETWORK + "[input]\nsize_hw = [5, 5]\n" + STRETCH, ("[2, 3, 5, 5]",)),
    "grey for a network of colours": ("Tiny", NETWORK + PLAIN + 'color = "gray"\n' + STRETCH, ("[2, 1, 12, 16]",)),
    "a name too many": ("Tiny", NETWORK + 'outputs = ["a", "b"]\n' + PLAIN + STRETCH, ("outputs", "each of 1", "found 2")),
    "a name too few": ("Named", NETWORK + 'outputs = ["a"]\n' + PLAIN + STRETCH, ("outputs", "each of 2", "found 1")),
    "one name for two": ("Named", NETWORK + 'outputs = ["a", "a"]\n' + PLAIN + STRETCH, ("outputs", "a, a")),
    "the input's name": ("Tiny", NETWORK + 'outputs = ["input"]\n' + PLAIN + STRETCH, ("outputs", "the input's")),
    "a classifier of two outputs": ("Named", CLASSIFIER + PLAIN, ("outputs", "scores with 2 axes", "maps")),
    "a classifier of maps": ("Pixels", CLASSIFIER + PLAIN, ("outputs", "scores with 2 axes")),
    "names too few": ("Tiny", CLASSIFIER + 'class_names = ["a", "b"]\n' + PLAIN, ("class_names", "expected 4 names, found 2")),
    "no file of names": ("Tiny", CLASSIFIER + 'class_names_file = "gone.txt"\n' + PLAIN, ("class_names_file", "gone.txt")),
    "a detector of unnamed outputs": ("Boxes", 'task = "Detector"\n' + PLAIN, ("outputs", "dets with 3 axes and labels with 2 axes")),
    "a detector that is none": ("Tiny", 'task = "Detector"\n' + PLAIN, ("outputs", "dets")),
    "a threshold above 1": ("Boxes", 'task = "Detector"\nscore_thr = 1.5\n' + PLAIN, ("score_thr",)),
    "no head": ("Simcc", 'task = "PoseDetector"\n' + PLAIN, ("head",)),
    "no such head": ("Simcc", 'task = "PoseDetector"\nhead = "magic"\n' + PLAIN, ("magic", "head")),
    "a simcc head of unnamed outputs": ("Simcc", 'task = "PoseDetector"\nhead = "simcc"\n' + PLAIN, ("outputs", "simcc_x with 3 axes")),
    "a heatmap head of two outputs": ("Simcc", 'task = "PoseDetector"\nhead = "heatmap"\n' + PLAIN, ("outputs", "heatmaps with 4 axes")),
    "an even blur": ("Heatmaps", 'task = "PoseDetector"\nhead = "heatmap"\nblur_kernel_size = 4\n' + PLAIN, ("blur_kernel_size", "odd")),
    "a regression head of maps": ("Pixels", 'task = "PoseDetector"\nhead = "regression"\n' + PLAIN, ("outputs", "keypoints with 3 axes")),
    "a regression head of one number": ("Bins", 'task = "PoseDetector"\nhead = "regression"\n' + PLAIN, ("outputs", "(N, K, 2)")),
    "no such set": ("Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nset = "cats"\n' + PLAIN, ("keypoints.set", "cats", "coco")),
    "a set of another number": ("Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nset = "coco"\n' + PLAIN, ("expected 3 names", "17")),
    "names of too few keypoints": ("Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nnames = ["a"]\n' + PLAIN, ("expected 3 names", "1")),
    "sigmas too few": (
        "Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nnames = ["a", "b", "c"]\nsigmas = [0.1]\n' + PLAIN, ("sigmas", "and 1")
    ),
    "a link to nowhere": (
        "Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nnames = ["a", "b", "c"]\nskeleton = [[0, 3]]\n' + PLAIN, ("0 to 2", "found 3")
    ),
    "a pair of less than nothing": (
        "Regression", 'task = "PoseDetector"\nhead = "regression"\n[keypoints]\nnames = ["a", "b", "c"]\nflip_pairs = [[-1, 2]]\n' + PLAIN,
        ("0 to 2", "found -1"),
    ),
    "neither resize nor crop": ("Tiny", NETWORK + PLAIN, ("resize and crop", "found none")),
    "both resize and crop": ("Tiny", NETWORK + PLAIN + STRETCH + "[crop]\n", ("resize and crop", "found both")),
    "padding of nothing": ("Tiny", NETWORK + PLAIN + "[crop]\npadding = 0.0\n", ("padding",)),
    "no such resize": ("Tiny", NETWORK + PLAIN + '[resize]\nmode = "squeeze"\n', ("squeeze", "mode")),
    "an edge of a stretch": ("Tiny", NETWORK + PLAIN + "[resize]\nedge = 20\n", ("edge", "shorter-edge", "20")),
    "no edge": ("Tiny", NETWORK + PLAIN + '[resize]\nmode = "shorter-edge"\n', ("edge", "None")),
    "an edge that is too short": ("Tiny", NETWORK + PLAIN + '[resize]\nmode = "shorter-edge"\nedge = 15\n', ("edge", "at least 16")),
    "a level that is none": ("Tiny", NETWORK + PLAIN + '[resize]\nmode = "letterbox"\npad_value = 256\n', ("pad_value",)),
    "another interpolation around": (
        "Tiny", NETWORK + PLAIN + '[resize]\nmode = "letterbox-center"\ninterpolation = "area"\n', ("interpolation", "letterbox-center", "area")
    ),
    "a name that leads out": ("Tiny", NETWORK + 'name = "../../up"\n' + PLAIN + STRETCH, ("../../up",)),
    "a name that leads further in": ("Tiny", NETWORK + 'name = "a/b"\n' + PLAIN + STRETCH, ("a/b",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_a_wrong_spec_is_one_line_and_no_bundle(place: Place, case: str) -> None:
    what, text, words = WRONG_SPECS[case]
    code = ExportError.exit_code if "[2, " in words[0] else ConfigError.exit_code
    refused(place.run("--model", f"{place.module}:{what}", "--spec", place.spec(text)), code, *words)
    nothing_left(place)


WRONG_FOR_ONNX: dict[str, tuple[dict[str, Any], str, int, tuple[str, ...]]] = {
    "any size and none said": ({"shape": ("N", 3, "h", "w"), "out": ("N", 4)}, NETWORK + STRETCH, 4, ("size_hw", "net.onnx")),
    "another size": ({"shape": (1, 3, 20, 16), "out": (1, 4)}, NETWORK + PLAIN + STRETCH, 4, ("size_hw", "[20, 16]", "[12, 16]")),
    "another colour": ({"shape": (1, 3, 12, 16), "out": (1, 4)}, NETWORK + PLAIN + 'color = "gray"\n' + STRETCH, 4, ("color", "3 channels", "gray")),
    "no such output": ({"shape": (1, 3, 12, 16), "out": (1, 4)}, NETWORK + 'outputs = ["boxes"]\n' + PLAIN + STRETCH, 4, ("outputs", "scores", "boxes")),
    "bytes for an input": (
        {"shape": (1, 3, 12, 16), "out": (1, 4), "dtype": TensorProto.UINT8}, NETWORK + PLAIN + STRETCH, 4, ("pixels", "float32", "uint8")
    ),
    "a type that there is not": ({"shape": (1, 3, 12, 16), "out": (1, 4), "dtype": 99}, NETWORK + PLAIN + STRETCH, 4, ("pixels", "float32")),
    "rows for an input": ({"shape": (1, 3), "out": (1, 4)}, NETWORK + PLAIN + STRETCH, 4, ("pixels", "2 axes")),
    "two inputs": (
        {"shape": (1, 3, 12, 16), "out": (1, 4), "more_inputs": [helper.make_tensor_value_info("im_shape", TensorProto.FLOAT, (1, 2))]},
        NETWORK + PLAIN + STRETCH, 4, ("one input", "pixels, im_shape"),
    ),
    "an operator of somebody's own": (
        {"shape": (1, 3, 12, 16), "out": (1, 3, 12, 16), "nodes": [helper.make_node("Mine", ["pixels"], ["scores"], domain="my.ops")], "domains": ["my.ops"]},
        NETWORK + PLAIN + STRETCH, 8, ("my.ops:Mine",),
    ),
    "an operator of ONNX Runtime's own": (
        {
            "shape": (1, 3, 12, 16), "out": (1, 3, 12, 16), "domains": ["com.microsoft"],
            "nodes": [helper.make_node("FastGelu", ["pixels"], ["scores"], domain="com.microsoft")],
        },
        NETWORK + PLAIN + STRETCH, 8, ("com.microsoft::FastGelu",),
    ),
    "an operator of nobody": (
        {"shape": (1, 3, 12, 16), "out": (1, 3, 12, 16), "nodes": [helper.make_node("NoSuchOp", ["pixels"], ["scores"])]},
        NETWORK + PLAIN + STRETCH, 8, ("net.onnx", "NoSuchOp"),
    ),
    "another batch than it says": (
        {
            "shape": ("N", 3, 12, 16), "out": (1, 1728),
            "nodes": [
                helper.make_node("Constant", [], ["to"], value=numpy_helper.from_array(np.array([1, 576], dtype=np.int64), "to")),
                helper.make_node("Reshape", ["pixels", "to"], ["scores"]),
            ],
        },
        NETWORK + PLAIN + STRETCH, 8, ("net.onnx", "[2, 3, 12, 16]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FOR_ONNX)
def test_an_onnx_file_that_does_not_fit_is_one_line(place: Place, case: str) -> None:
    graph, text, code, words = WRONG_FOR_ONNX[case]
    refused(place.run(foreign(place.folder / "net.onnx", **graph), "--spec", place.spec(text)), code, *words)
    nothing_left(place)


def test_an_operator_of_somebodys_own_does_not_hide_in_a_branch(place: Place) -> None:
    info = helper.make_tensor_value_info
    then = helper.make_graph([helper.make_node("FastGelu", ["pixels"], ["a"], domain="com.microsoft")], "then", [], [info("a", TensorProto.FLOAT, None)])
    other = helper.make_graph([helper.make_node("Identity", ["pixels"], ["b"])], "other", [], [info("b", TensorProto.FLOAT, None)])
    nodes = [
        helper.make_node("ReduceSum", ["pixels"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["decided"], to=TensorProto.BOOL),
        helper.make_node("If", ["decided"], ["scores"], then_branch=then, else_branch=other),
    ]
    file = foreign(place.folder / "net.onnx", shape=(1, 3, HEIGHT, WIDTH), out=None, nodes=nodes, domains=["com.microsoft"])
    refused(place.run(file, "--spec", place.spec(NETWORK + INPUT + STRETCH)), 8, "com.microsoft::FastGelu")
    nothing_left(place)


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["net.onnx", "net.pt", "net.pt2", "net.pth"])
def test_half_a_file_is_one_line(place: Place, kind: str, share: float) -> None:
    tiny = place.nets.Tiny()
    make = {
        "net.onnx": lambda path: foreign(path, shape=("N", 3, HEIGHT, WIDTH), out=("N", 4)),
        "net.pt": lambda path: scripted(tiny, path),
        "net.pt2": lambda path: exported(tiny, path),
        "net.pth": lambda path: place.weights(tiny, name=path.name),
    }
    data = make[kind](place.folder / kind).read_bytes()
    (place.folder / kind).write_bytes(data[: int(len(data) * share)])
    spec = place.spec(NETWORK + INPUT + STRETCH)
    arguments = [place.folder / kind] if kind != "net.pth" else ["--model", f"{place.module}:Tiny", "--weights", place.folder / kind]
    result = place.run(*arguments, "--spec", spec)
    refused(result, result.exit_code, kind)
    assert result.exit_code in {ConfigError.exit_code, CheckpointError.exit_code}
    nothing_left(place)


@pytest.mark.parametrize("garbage", [b"\x00\xff" * 300, b"<html>404</html>", bytes(range(256)) * 8], ids=["bytes", "page", "ramp"])
def test_garbage_that_is_called_onnx_is_one_line(place: Place, garbage: bytes) -> None:
    (place.folder / "net.onnx").write_bytes(garbage)
    refused(place.run(place.folder / "net.onnx", "--spec", place.spec(NETWORK + INPUT + STRETCH)), CheckpointError.exit_code, "net.onnx")
    nothing_left(place)


# ----------------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("what", ["Exporting", "Tracing", "Counting", "Branching"])
def test_a_network_that_is_another_one_when_it_is_exported_gives_no_bundle(place: Place, what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = place.run("--model", f"{place.module}:{what}", "--spec", place.spec(NETWORK + INPUT + STRETCH))
    refused(result, ParityError.exit_code, "output", "no bundle was written")
    assert "FAIL" in result.stdout
    nothing_left(place)


@pytest.mark.parametrize("task", [CLASSIFIER, NETWORK])
def test_a_network_that_changes_its_input_is_compared_on_what_it_was_given(place: Place, task: str) -> None:
    conversion = place.convert(task + INPUT + (STRETCH if task == NETWORK else ""), "InPlace")
    assert conversion.parity is not None
    assert conversion.parity.passed
    (image,) = images(1)
    with Network(conversion.place) if task == NETWORK else Classifier(conversion.place) as opened:
        found = opened(image)["output"][0] if task == NETWORK else [score for _, score in sorted(opened(image))]
    close(found, answers(place.nets.InPlace(), [by_hand(image)])[0][0])


def test_parity_failed_leaves_the_bundle_that_was_there(place: Place) -> None:
    spec = NETWORK + INPUT + STRETCH
    first = place.convert(spec, "Tiny", name="net")
    before = {path.name: path.read_bytes() for path in first.place.iterdir()}
    with pytest.raises(ParityError):
        place.convert(spec, "Exporting", name="net")
    assert {path.name: path.read_bytes() for path in first.place.iterdir()} == before


# --------------------------------------------------------------------------------------------------------------------- manifest


def test_a_bundle_says_what_it_was_made_from_and_by_whom_it_is_described(place: Place) -> None:
    file = foreign(place.folder / "net.onnx", shape=(1, 3, HEIGHT, WIDTH), out=(1, 4))
    cv2.imwrite(str(place.folder / "photo.png"), images(1, size_hw=(60, 80))[0])
    of_file = place.convert('task = "Classifier"\nname = "from-file"\n' + INPUT, file=file, images=(place.folder / "photo.png",))
    of_code = place.convert('task = "Classifier"\n' + INPUT, "Tiny", images=(place.folder / "photo.png",))
    for conversion, reference, origin, picture in (
        (of_file, "net.onnx", "net.onnx", "output_given.jpg"),
        (of_code, "PyTorch", f"{place.module}:Tiny", "output_pytorch.jpg"),
    ):
        bundle = Bundle.open(conversion.place)
        bundle.verify()
        manifest = bundle.manifest
        assert manifest is not None
        assert (manifest.task, manifest.geometry, manifest.precision) == ("Classifier", "exact", "fp32")
        assert (manifest.parity.verified, manifest.parity.passed, manifest.parity.reference) == (True, True, reference)
        assert manifest.parity.images == ["photo.png"]
        assert manifest.provenance.facts == {"everything that the network does not say": "the spec spec.toml", "network": origin}
        assert len(manifest.provenance.checkpoint_sha256) == 64
        assert {entry.path for entry in manifest.files if entry.role == "picture"} == {picture, "output_onnxruntime.jpg"}
        text = (conversion.place / "README.md").read_text(encoding="utf-8")
        for word in (f"## Parity with {reference}", origin, "spec.toml", picture):
            assert word in text, word
        for name in ("deploy.json", "detail.json", "manifest.json", "pipeline.json"):
            assert str(place.folder) not in (conversion.place / name).read_text(encoding="utf-8")
    assert (of_file.place.name, of_code.place.name) == ("from-file_onnxruntime", "tiny_onnxruntime")


def test_the_command_lines_name_wins_over_the_specs(place: Place) -> None:
    spec = place.spec('task = "Network"\nname = "theirs"\n' + INPUT + STRETCH)
    result = place.run("--model", f"{place.module}:Tiny", "--spec", spec, "--name", "ours", "--json", "--no-verify")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    assert (entry["id"], entry["status"]) == ("ours_onnxruntime", "built")
    assert "NOT VERIFIED" not in result.stdout
    manifest = Bundle.open(place.out / "ours_onnxruntime").manifest
    assert manifest is not None
    assert (manifest.model, manifest.parity.verified) == ("ours", False)


def test_the_dynamo_exporter_makes_the_same_numbers(place: Place) -> None:
    result = place.run("--model", f"{place.module}:Named", "--spec", place.spec(NETWORK + INPUT + STRETCH), "--exporter", "dynamo")
    assert result.exit_code == 0, result.output
    (image,) = images(1)
    (expected,) = answers(place.nets.Named(), [by_hand(image)])
    with Network(place.out / "named_onnxruntime") as network:
        found = network(image)
    for name in ("maps", "scores"):
        close(found[name], expected[name])
