"""ncnn through pnnx, in a process of its own: neither its exit code nor its file is believed before the network has run.

INT8 is written here: see `modelcrate_converter.ncnn_network`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelcrate_bundle.errors import BundleError, ConfigError, ExportError, MissingBackendError
from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.exportable import BoxesFacts, DetectorFacts
from modelcrate_converter.ncnn_network import quantize_convolutions, read_network, write_network
from modelcrate_converter.quantization import QuantizedConvolution, dequantized
from modelcrate_runtime.sessions import SessionOptions, open_artefact

if TYPE_CHECKING:
    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.export import OnnxModel
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.progress import Report

OLDEST_PNNX: Final = 20240410
"""The first that reads ONNX files."""
_TIMEOUT_S: Final = 600
_FOREIGN: Final = ("torch.", "pnnx.", "aten::", "prim::", "F.", "nn.", "Tensor.")
_NOT_NCNN: Final = frozenset({"NonMaxSuppression", "Range", "Expand", "ConstantOfShape", "Shape", "Where", "ScatterND", "GatherND", "TopK"})
"""Layers that pnnx writes when it has no translation, and then reports success."""


_TRIAL: Final = """
import sys
from pathlib import Path
from modelcrate_bundle.errors import ModelcrateError
from modelcrate_runtime.sessions import SessionOptions, open_artefact
files = {"net": Path(sys.argv[1]), "weights": Path(sys.argv[2])}
try:
    open_artefact("ncnn", files, SessionOptions(precision=sys.argv[3]), where="trial run").close()
except ModelcrateError as error:
    sys.exit(str(error))
"""


def build(model: ExportableModel, source: OnnxModel, config: DeployConfig, *, workdir: Path, report: Report) -> BackendArtifact:
    """Write `end2end.param` and `end2end.bin`, MMDeploy's names of them, with the inputs and outputs named as in the graph.

    Args:
        model: what is being converted.
        source: the canonical graph; for `int8` a graph with QuantizeLinear and DequantizeLinear, which are taken out of it again: ncnn has its own form.
        config: the target: fp16 stores the weights in float16.
        workdir: where the files go.
        report: gets nothing.

    Raises:
        ConfigError: suppression in the graph, or unsigned INT8, neither of which ncnn has.
        MissingBackendError: a pnnx that cannot read ONNX.
        ExportError: pnnx fails, or what it writes is no ncnn network, or does not run.
    """
    del report  # pnnx says nothing that could be counted
    if isinstance(model.postprocess, BoxesFacts):
        raise ConfigError(f"{config.target}: expected a network that ncnn has the layers of, found one that suppresses boxes itself", hint="another target")
    if isinstance(model.postprocess, DetectorFacts) and config.nms.where == "graph":
        raise ConfigError(f"{config.target}: nms.where: expected runtime for ncnn, which has no NonMaxSuppression, found graph", hint="--nms runtime")
    if config.precision == "int8" and config.int8.activations != "int8":
        raise ConfigError(f"{config.target}: int8.activations: expected int8 for ncnn, whose INT8 is signed, found {config.int8.activations}")
    convolutions: list[QuantizedConvolution] = []
    if config.precision == "int8":
        source, convolutions = dequantized(source, workdir=workdir)
    shape = ",".join(str(dim) for dim in (1, *source.inputs[0].shape[1:]))
    written = {f"pnnx{kind}": workdir / f"pnnx.{kind}" for kind in ("param", "bin", "py", "onnx")} | {"ncnnpy": workdir / "pnnx.ncnn.py"}
    written |= {"ncnnparam": workdir / "pnnx.ncnn.param", "ncnnbin": workdir / "end2end.bin"}
    command = [str(check_pnnx()), str(source.path), f"inputshape=[{shape}]", f"fp16={int(config.precision == 'fp16')}"]
    command += [f"{key}={path}" for key, path in written.items()]
    log = _run(command, what="pnnx", model=model, workdir=workdir)
    files = {"net": workdir / "end2end.param", "weights": workdir / "end2end.bin"}
    if not written["ncnnparam"].is_file() or not files["weights"].is_file():
        raise ExportError(f"{model.name}: expected pnnx to write a network, found none: {log[-300:]}")
    text = written["ncnnparam"].read_text(encoding="utf-8", errors="replace")
    lint(text, where=model.name)
    try:
        text = named(text, inputs=source.inputs, outputs=source.outputs)
    except (ValueError, IndexError) as error:
        raise ExportError(f"{model.name}: expected pnnx to write a .param, found: {text[:100]!r}") from error
    if convolutions:
        layers = read_network(text, files["weights"].read_bytes(), where=model.name)
        if not quantize_convolutions(layers, convolutions):
            raise ExportError(f"{model.name}: expected pnnx to keep the weights of its convolutions, found none of them", hint="use ncnn or ncnn-fp16")
        text, content = write_network(layers)
        files["weights"].write_bytes(content)
    files["net"].write_text(text, encoding="utf-8")
    options = SessionOptions(precision=config.precision)
    # A network that is wrong may end the process that runs it: first in another one.
    _run([sys.executable, "-P", "-c", _TRIAL, str(files["net"]), str(files["weights"]), config.precision], what="ncnn", model=model, workdir=workdir)
    try:
        session = open_artefact("ncnn", files, options, where=model.name)
    except BundleError as error:
        raise ExportError(f"{model.name}: expected a network that ncnn runs, found: {error}") from error
    inputs, outputs = session.inputs, session.outputs
    session.close()
    if {spec.name for spec in outputs} != {spec.name for spec in source.outputs}:
        raise ExportError(f"{model.name}: expected the outputs {[s.name for s in source.outputs]}, found {[s.name for s in outputs]}")
    return BackendArtifact(backend="ncnn", files=files, precision=config.precision, inputs=inputs, outputs=outputs, has_nms=False)


def check_pnnx() -> Path:
    """The program in the installed package.

    Raises:
        MissingBackendError: it is not there, or cannot read ONNX.
    """
    found = importlib.util.find_spec("pnnx")
    folder = next(iter(found.submodule_search_locations or ()), "") if found else ""
    program = Path(folder) / ("pnnx.exe" if sys.platform == "win32" else "pnnx")
    if not folder or not program.is_file():
        raise MissingBackendError("building for ncnn needs pnnx, not installed", hint="pip install 'modelcrate[convert,ncnn,pnnx]'")
    version = importlib.metadata.version("pnnx")
    if not version.isdecimal() or int(version) < OLDEST_PNNX:
        raise MissingBackendError(f"pnnx: expected version {OLDEST_PNNX} or newer, which reads ONNX, found {version}", hint="pip install --upgrade pnnx")
    return program


def lint(text: str, *, where: str) -> None:
    """Refuse what pnnx writes when it has no translation, or loses a part of one.

    Args:
        text: a `.param`.
        where: for the message.

    Raises:
        ExportError: layers that ncnn does not have, or a reduction over no axes.
    """
    wrong = []
    for line in text.splitlines()[2:]:
        words = line.split()
        if not words:
            continue
        kind, options = words[0], dict(word.split("=", 1) for word in words if "=" in word)
        if kind.startswith(_FOREIGN) or kind in _NOT_NCNN:
            wrong.append(kind)
        elif (kind == "Reduction" and options.get("1", "1") == "0" and options.get("-23303", "0").startswith("0")) or (
            kind == "Reduction" and "-23303" in options and options["-23303"].startswith("0")
        ):
            wrong.append("Reduction without axes")
    if wrong:
        raise ExportError(
            f"{where}: expected ncnn layers, found {', '.join(sorted(set(wrong)))}, for which pnnx has no translation",
            hint="export with opset 17 at most (--exporter torchscript): pnnx loses the axes of ReduceL2 from opset 18 on",
        )


def named(text: str, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> str:
    """A `.param` whose blobs in0, in1 ... and out0, out1 ... have the graph's names, and whose Input layers say their sizes.

    Args:
        text: as pnnx writes it.
        inputs: (1 or a name, C, H, W), in the graph's order.
        outputs: in the graph's order.
    """
    names = {f"in{i}": spec.name for i, spec in enumerate(inputs)} | {f"out{i}": spec.name for i, spec in enumerate(outputs)}
    spaced = [name for name in names.values() if name.split() != [name]]
    if spaced:
        raise ExportError(f"expected names of tensors without spaces, which separate words in a .param, found {spaced[0]!r}", hint="name it otherwise")
    # pnnx numbers the blobs between them: a graph's own 1 or 2 must not be one of those.
    names |= {name: f"{name}_" for name in names.values() if name not in names}
    shapes = {spec.name: spec.shape for spec in inputs}
    lines = text.splitlines()
    for i, line in enumerate(lines[2:], start=2):
        words = line.split()
        if len(words) < 4:
            continue
        count = int(words[2]) + int(words[3])
        blobs = [names.get(blob, blob) for blob in words[4 : 4 + count]]
        options = words[4 + count :]
        if words[0] == "Input" and blobs[0] in shapes:
            _, channels, height, width = shapes[blobs[0]]
            words[1] = blobs[0]
            options = [f"0={width}", f"1={height}", f"2={channels}"]
        lines[i] = " ".join([f"{words[0]:<24} {words[1]:<24} {words[2]} {words[3]}", *blobs, *options])
    return "\n".join(lines) + "\n"


def _run(command: list[str], *, what: str, model: ExportableModel, workdir: Path) -> str:
    """A program that may hang, crash or lie; what it says, if it ends in time and with 0."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(  # noqa: S603  # our own interpreter, and the program of an installed package
            command, cwd=workdir, env=environment, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{model.name}: expected {what} to end within {_TIMEOUT_S} s, found it still running") from error
    except OSError as error:
        raise ExportError(f"{model.name}: expected to start {what}, found: {error.strerror or error}", hint=f"install it again: {command[0]}") from error
    text = " ".join((done.stderr + done.stdout).split())
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        raise ExportError(
            f"{model.name}: expected {what} to end by itself, found that it crashed ({name}): {text[-300:]}", hint="another version of it may not"
        )
    if done.returncode != 0:
        raise ExportError(f"{model.name}: expected {what} to succeed, found exit code {done.returncode}: {text[-300:]}")
    return text
