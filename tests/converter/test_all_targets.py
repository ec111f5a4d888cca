"""`-t all`: every target that this machine can build, one table at the end; the deploy configs behind it; and the time of one call."""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, MissingBackendError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.builders import check_can_build
from modelcrate_converter.cli import app
from modelcrate_converter.config import CONFIG_FOLDER, Gates, load_config, target_names
from modelcrate_converter.models.blueprints import random_weights, rtmpose_shapes
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime import PoseDetector
from modelcrate_runtime.profiler import latency_ms
from modelcrate_runtime.sessions import SessionOptions, open_session


def can_build(target: str) -> bool:
    try:
        config = load_config(target)
        check_can_build(config.backend, config.precision)
    except MissingBackendError:
        return False
    return True


HERE = [target for target in target_names() if can_build(target)]
NAMES = {f"rtmpose-c64_{target}": target for target in HERE}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint, the folder that `-t all` filled from it, and what that said."""

    checkpoint: Path
    out: Path
    result: Result

    def again(self, *arguments: object) -> Result:
        return convert(self.checkpoint, "-o", self.out, *arguments)


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """A wide terminal; and one thread for ncnn, whose threads wait in loops for cores that other processes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.delenv("MODELCRATE_TRACEBACK", raising=False)
        patch.setattr("modelcrate_runtime.sessions.ncnn_session.usable_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("all")
    weights = random_weights(rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8), seed=2)
    for key in ("head.cls_x.weight", "head.cls_y.weight"):
        weights[key] /= weights[key].abs().max()  # scores that count; and of weights below 6e-5 pnnx makes zeros for float16
    torch.save({"state_dict": weights}, folder / "tiny.pth")
    return Made(checkpoint=folder / "tiny.pth", out=folder / "out", result=convert(folder / "tiny.pth", "-t", "all", "-o", folder / "out"))


def rows(text: str) -> list[list[str]]:
    """The cells of the last table; lines that go on the one above are joined to it."""
    lines = text[text.rindex("┏") :].splitlines()
    found: list[list[str]] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")]
        if line.startswith("│") and not cells[0]:
            found[-1] = [" ".join((old, new)).strip() for old, new in zip(found[-1], cells, strict=True)]
        elif line.startswith(("│", "┃")):
            found.append(cells)
    return found


def entries(result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


# ------------------------------------------------------------------------------------------------------------------- all of them


def test_all_builds_every_target_that_can_be_built_here(made: Made) -> None:
    assert made.result.exit_code == 0, made.result.output
    assert {path.name for path in made.out.iterdir()} == set(NAMES)
    assert {"onnxruntime", "onnxruntime-fp16", "onnxruntime-int8"} <= set(HERE)
    left_out = [line.partition(":")[0] for line in made.result.stderr.splitlines() if ": left out: " in line]
    assert left_out == [target for target in target_names() if target not in HERE]
    assert made.result.stderr.count("done export ONNX") == 1, "one graph is enough for all"


def test_the_summary_has_a_line_for_each(made: Made) -> None:
    heading, *lines = rows(made.result.stdout)
    assert heading == ["bundle", "MiB", "L-inf", "shift: worst, mean", "ms", "verdict"]
    assert [line[0] for line in lines] == list(NAMES)
    for name, size, distance, shift, milliseconds, verdict in lines:
        manifest = Bundle.open(made.out / name).manifest
        assert manifest is not None
        assert size == f"{sum(entry.bytes for entry in manifest.files if entry.role in ('net', 'weights')) / 2**20:.1f}"
        assert distance == f"{max(output.relative_linf for output in manifest.parity.outputs):.1e}"
        figure = manifest.parity.pixels[0]
        assert (figure.name, figure.count > 0, shift) == ("keypoint_shift_px", True, f"{figure.worst:.2g}, {figure.mean:.2g} px")
        assert 0 < float(milliseconds) < 10_000
        assert verdict == "built"


@pytest.mark.parametrize("target", HERE)
def test_every_bundle_is_whole_and_runs(made: Made, target: str) -> None:
    config = load_config(target)
    place = made.out / f"rtmpose-c64_{target}"
    bundle = Bundle.open(place)
    bundle.verify()
    manifest = bundle.manifest
    assert manifest is not None
    assert (manifest.target, manifest.backend, manifest.precision) == (target, config.backend, config.precision)
    assert (bundle.model.backend, bundle.model.precision) == (config.backend, config.precision.upper())
    assert manifest.parity.passed
    assert {figure.gate for figure in manifest.parity.outputs} == {config.gates.relative_linf}
    _, image, box = procedural_scenes(1)[0]
    with PoseDetector(place) as ours, PoseDetector(made.out / "rtmpose-c64_onnxruntime") as reference:
        found, expected = (one.estimate(image, box[None]) for one in (ours, reference))
    assert found.keypoints_xy.shape == (1, 3, 2)
    assert np.linalg.norm(found.keypoints_xy - expected.keypoints_xy, axis=2).max() <= max(config.gates.keypoint_px, 0.01)


def test_what_is_up_to_date_is_not_built_again(made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.out.glob("*/*")}
    result = made.again("-t", "all")
    assert result.exit_code == 0, result.output
    assert [line.partition(": ")[0] for line in result.stdout.splitlines() if ": up to date" in line] == [str(made.out / name) for name in NAMES]
    assert [(line[0], line[-1]) for line in rows(result.stdout)[1:]] == [(name, "current") for name in NAMES]
    assert all(float(line[4]) > 0 for line in rows(result.stdout)[1:])
    assert "done build" not in result.stderr
    assert {path: path.stat().st_mtime_ns for path in made.out.glob("*/*")} == before


@pytest.mark.parametrize("named", [["all"], ["all", "onnxruntime"], ["onnxruntime", "all", "all"]], ids=" ".join)
def test_json_has_each_once_and_no_table(made: Made, named: list[str]) -> None:
    result = made.again(*(word for target in named for word in ("-t", target)), "--json")
    assert result.exit_code == 0, result.output
    found = entries(result)
    assert [entry["target"] for entry in found] == list(dict.fromkeys([target for target in named if target != "all"] + HERE))
    for entry in found:
        assert (entry["id"], entry["status"], entry["error"]) == (f"rtmpose-c64_{entry['target']}", "current", None)
        assert entry["parity"]["verified"] is True
        assert entry["files"]
    assert not set("┃│┏") & set(result.stdout)


def test_one_target_has_no_summary(made: Made) -> None:
    result = made.again("-t", "onnxruntime")
    assert result.exit_code == 0
    assert "up to date" in result.stdout
    assert "verdict" not in result.stdout


def test_one_that_fails_is_in_the_summary_and_does_not_stop_the_others(made: Made, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text('backend = "onnxruntime"\nprecision = "fp32"\n[gates]\nrelative_linf = 1e-12\n')
    result = made.again("-t", tmp_path / "strict.toml", "-t", "all")
    assert result.exit_code == 9
    lines = rows(result.stdout)[1:]
    assert [line[0] for line in lines] == ["rtmpose-c64_strict", *NAMES]
    name, size, distance, _, milliseconds, verdict = lines[0]
    assert (size, milliseconds) == ("", "")
    assert float(distance) > 1e-12
    assert verdict == "failed"
    assert "  failed: rtmpose-c64_strict: expected every figure inside its gate, found simcc_x" in result.stderr
    assert {line[-1] for line in lines[1:]} == {"current"}
    assert not (made.out / name).exists()


# ------------------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(("module", "backend", "extras"), [("ncnn", "ncnn", "ncnn,pnnx"), ("pnnx", "ncnn", "ncnn,pnnx"), ("openvino", "openvino", "openvino")])
def test_what_is_not_installed_is_left_out_with_its_command(made: Made, module: str, backend: str, extras: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = made.again("-t", "all", "--json")
    assert result.exit_code == 0, result.output
    assert [entry["target"] for entry in entries(result)] == [target for target in HERE if load_config(target).backend != backend]
    for target in target_names():
        if load_config(target).backend == backend:
            more = ",onnxruntime" if load_config(target).precision == "int8" else ""  # which makes the typed graph
            assert f"{target}: left out: building for {backend} needs {module}, not installed (pip install 'modelcrate[convert,{extras}{more}]')\n" in result.stderr


def test_a_target_that_is_named_is_not_left_out_in_silence(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pnnx", None)
    result = made.again("-t", "all", "-t", "ncnn")
    assert result.exit_code == MissingBackendError.exit_code
    assert "error: building for ncnn needs pnnx, not installed" in result.stderr


def test_where_nothing_can_be_built_the_commands_are_all_there_is(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    result = made.again("-t", "all")
    assert result.exit_code not in (0, 1)
    lines = [line for line in result.stderr.splitlines() if ": left out: building for " in line]
    assert [line.partition(":")[0] for line in lines] == target_names()
    assert all("needs onnxsim" in line and "(pip install 'modelcrate[convert," in line for line in lines)
    assert "Traceback" not in result.output
    assert result.stdout == ""


# ---------------------------------------------------------------------------------------------------------- the deploy configs


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_a_deploy_config_is_called_what_it_is_and_says_what_there_is(path: Path, tmp_path: Path) -> None:
    config = load_config(path.stem)
    assert config == load_config(str(path))
    assert path.stem == config.backend.replace("_", "-") + ("" if config.precision == "fp32" else f"-{config.precision}")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    raw = tomllib.loads(text)
    for section, table in raw.items():
        for key, value in table.items() if isinstance(table, dict) else ():
            assert getattr(getattr(config, section), key) == value, (section, key)
    # Gates: each is a field, is explained where it is set, and what is not set has no other value than the code's.
    lines = [line for line in text[text.index("[gates]") :].splitlines()[1:] if line]
    explained = {line.partition(" = ")[0]: line.partition(" # ")[2].strip() for line in lines}
    assert set(explained) == set(raw["gates"]) <= set(Gates.__struct_fields__)
    assert all(len(words) > 5 for words in explained.values()), explained
    assert all(getattr(config.gates, name) == getattr(Gates(), name) for name in set(Gates.__struct_fields__) - set(explained))
    # Every other value that a comment offers is one.
    offers = re.findall(r'^((\w+) = [^#\n]+)#([^\n]*"[^\n]*)$', text, re.MULTILINE)
    assert offers
    for setting, key, comment in offers:
        for value in re.findall(r'"(\w+)"', comment):
            other = tmp_path / path.name
            other.write_text(text.replace(setting, f'{key} = "{value}"  '), encoding="utf-8")
            assert load_config(str(other)) != config, (key, value)
        other.write_text(text.replace(setting, f'{key} = "no such thing"  '), encoding="utf-8")
        with pytest.raises(ConfigError, match=key):
            load_config(str(other))


def test_precisions_of_a_backend_differ_in_what_they_allow(made: Made) -> None:
    """Half precision is allowed more than float32, INT8 more than half; in what is exact, nothing more."""
    for target in target_names():
        config = load_config(target)
        precision, backend = config.precision, config.backend.replace("_", "-")
        gates, exact = config.gates, load_config(backend).gates
        if precision != "fp32":
            assert gates.relative_linf > exact.relative_linf
            assert gates.keypoint_mean_px is not None
            assert gates.box_mean_px is not None
        if precision == "int8":
            assert gates.relative_linf > load_config(f"{backend}-fp16").gates.relative_linf
        assert gates.label_flips == 0


# -------------------------------------------------------------------------------------------------------------------- the time


class Clockwork:
    """A session whose calls take as long as they are told; time stands still between them."""

    def __init__(self, seconds: list[float]) -> None:
        self.inputs = (
            TensorSpec(name="image", dtype="float32", shape=("batch", 3, 4, 5)),
            TensorSpec(name="ids", dtype="int64", shape=(2, "length")),
        )
        self.outputs = ()
        self.fed: list[Mapping[str, np.ndarray]] = []
        self.now = 100.0
        self._seconds = seconds

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.now += self._seconds[len(self.fed)]
        self.fed.append(feeds)
        return {}


def test_latency_is_the_median_of_the_calls_after_the_first_ones() -> None:
    session = Clockwork([9.0, 8.0, 0.001, 0.004, 0.5, 0.002, 0.003])
    measured: Callable[..., float] = latency_ms
    assert measured(session, runs=5, warmup=2, clock=lambda: session.now) == pytest.approx(3.0)
    assert len(session.fed) == 7
    for feeds in session.fed:
        assert {name: (value.shape, str(value.dtype)) for name, value in feeds.items()} == {"image": ((1, 3, 4, 5), "float32"), "ids": ((2, 1), "int64")}
        assert feeds["image"].std() > 0.5, "zeros are faster than what networks get"
        assert not feeds["ids"].any(), "whole numbers may be indices"


def test_latency_makes_35_calls_by_default() -> None:
    session = Clockwork([0.0] * 35)
    measured: Callable[..., float] = latency_ms
    assert measured(session) >= 0
    assert len(session.fed) == 35


@pytest.mark.parametrize("target", HERE)
def test_latency_of_a_bundle_is_a_positive_number(made: Made, target: str) -> None:
    session = open_session(Bundle.open(made.out / f"rtmpose-c64_{target}"), SessionOptions(threads=1))
    try:
        measured = latency_ms(session, runs=3, warmup=1)
    finally:
        session.close()
    assert math.isfinite(measured)
    assert measured > 0
