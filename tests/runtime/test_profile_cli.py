"""`modelcrate profile` and `modelcrate compare`: what they print, what they write, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from command_line import refused
from made_reports import copied_bundle
from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_converter.cli import app
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_runtime.comparison import Compared, Comparison
from modelcrate_runtime.host import read_host
from modelcrate_runtime.measurement import Doubt, Latency, Load, Ratio
from modelcrate_runtime.profile_cli import print_comparison, print_profile, split_inputs
from modelcrate_runtime.profiler import Cold, Profile, Row
from modelcrate_runtime.sessions import BACKENDS, LayerTime

QUICK = ("--warmup", 0, "--runs", 2, "--threads", 1, "--cold", 0)
QUICK_TURNS = ("--warmup", 0, "--runs", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, torch_threads: None) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("MODELCRATE_TRACEBACK", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ncnn_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample at a time, and a session that copies."""
    if not BACKENDS["ncnn"].is_installed:
        pytest.skip("needs ncnn: pip install 'modelcrate[ncnn]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelcrate_runtime.sessions.ncnn_session.usable_cores", lambda: 1)  # its threads wait in loops for cores that other tests have
        (made,) = convert(DEMO_MODELS["demo-pose"], [load_config("ncnn")], ConvertOptions(out=tmp_path_factory.mktemp("crates"), name="demo-pose"))
    if made.error is not None:
        raise made.error
    return made.place


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = cli(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def profiles_of(text: str | bytes) -> list[Profile]:
    return msgspec.json.decode(text, type=dict[str, list[Profile]])["profiles"]


def comparison_of(text: str | bytes) -> Comparison:
    return msgspec.json.decode(text, type=Comparison)


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of the table of this title, heading first. Figures stand in the first line of a row; what goes on in the next one is joined to it."""
    lines = text[text.index(title) :].splitlines()[1:]
    table: list[list[str]] = []
    for line in lines[: next(i for i, line in enumerate(lines) if line.startswith("└"))]:
        parts = [part.strip() for part in re.split("[┃│]", line)[1:-1]]
        if line.startswith("┃") and table or line.startswith("│") and not any(parts[2:]):
            table[-1] = [" ".join(filter(None, pair)) for pair in zip(table[-1], parts, strict=True)]
        elif line[:1] in "┃│":
            table.append(parts)
    return table


# ------------------------------------------------------------------------------------------------------------------------ profile


def test_a_profile_is_tables_of_what_it_costs(demo_pose_bundle: Path, photo: Path) -> None:
    result = done("profile", demo_pose_bundle, photo, *QUICK, "--batch", "1,2", "--boxes", 2)
    out = result.stdout
    assert out.startswith("demo-pose_onnxruntime\n")
    for words in ("onnxruntime, fp32", "cpu, 1", "0, 2", "7.4 MiB", f"Python {read_host().python}"):
        assert words in out
    settings = "".join(part.strip() for line in out[: out.index("one call")].splitlines() for part in line.split("│")[2:3])
    assert str(photo) in settings, "the name of a file is at the end of its path"
    heading, *rows = cells(out, "one call")
    assert heading == ["ms", "load image", "preprocess", "infer", "postprocess", "image to result"]
    assert [row[0] for row in rows] == ["mean", "median", "min", "max", "p90", "p95", "p99", "std", "share", "per second"]
    assert all(float(cell) >= 0 for row in rows[:8] for cell in row[1:])
    shares = [float(cell.rstrip("%")) for cell in rows[8][2:]]
    assert rows[8][1] == "", "loading is no part of the call"
    assert sum(shares[:3]) == pytest.approx(shares[3], abs=0.2) == pytest.approx(100)
    assert [row[:3] for row in cells(out, "the network alone, ms")[1:]] == [["1", "1", "1"], ["2", "1", "1"]]
    assert "unsure: 2 calls" in out
    assert "first result" not in out
    assert "layers" not in out
    assert "all of them" not in out
    assert result.stderr == ""


def test_what_was_asked_for_is_shown(demo_pose_bundle: Path) -> None:
    out = done("profile", demo_pose_bundle, *QUICK[:-2], "--cold", 1, "--layers", 3, "--streams", "1,2").stdout
    assert "noise 640x480" in out
    assert re.search(r"first result of a fresh process: \d+\.\d\d s \(imports \d+\.\d\d, load \d+\.\d\d, first call \d+\.\d\d\)", out)
    title = re.search(r"the slowest 3 of (\d+) layers; all together [\d.]+ ms", out)
    assert title is not None
    assert int(title[1]) > 100
    rows = cells(out, "the slowest 3 of")[1:]
    assert len(rows) == 3
    times = [float(row[2]) for row in rows]
    assert times == sorted(times, reverse=True)
    assert all(row[1] == "Conv" or row[1] for row in rows)
    assert [row[:3] for row in cells(out, "the network alone, ms")[1:]] == [["1", "1", "1"], ["1", "1", "1"], ["1", "1", "2"]]


def test_several_subjects_end_in_one_table(demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    """Bundles of any task and a checkpoint, each with its own figures."""
    out = done("profile", demo_pose_bundle, demo_detector_bundle, "demo-pose", *QUICK).stdout
    heading, *rows = cells(out, "all of them")
    assert heading == ["medians, ms", "call", "before", "infer", "behind", "first, s", "MiB"]
    assert [row[0] for row in rows] == ["demo-pose_onnxruntime", "demo-det_onnxruntime", "demo-pose_pytorch"]
    for row in rows:
        whole, before, infer, behind = (float(cell) for cell in row[1:5])
        assert 0 < before + infer + behind < 3 * whole, "medians need not add up"
        assert row[5] == ""


def test_the_same_bundle_twice_has_numbers(demo_pose_bundle: Path, tmp_path: Path) -> None:
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", demo_pose_bundle)
    result = done("profile", demo_pose_bundle, zipped, *QUICK, "--json")
    assert [one.name for one in profiles_of(result.stdout)] == ["demo-pose_onnxruntime", "demo-pose_onnxruntime (2)"]
    compared = done("compare", demo_pose_bundle, zipped, demo_pose_bundle, *QUICK_TURNS, "--json")
    assert [row.name for row in comparison_of(compared.stdout).rows] == [f"demo-pose_onnxruntime{number}" for number in ("", " (2)", " (3)")]


def test_json_has_all_figures_and_nothing_else_is_on_stdout(demo_pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "deeper" / "profile.json"
    command = ("profile", demo_pose_bundle, photo, *QUICK, "--batch", "1,2", "--streams", "2", "--layers", 1, "--json", "--save", saved)
    result = done(*command)
    assert saved.read_bytes() == result.stdout.encode()
    assert "".join(result.stderr.split()) == f"wrote{saved}"
    raw = json.loads(result.stdout)
    assert set(raw) == {"profiles"}
    assert raw["profiles"][0]["schema"] == "modelcrate.profile/1"
    (found,) = profiles_of(result.stdout)
    assert [(row.batch, row.threads, row.streams, len(row.samples)) for row in found.network] == [(1, 1, 1, 2), (2, 1, 1, 2), (1, 1, 2, 2)]
    assert {stage: len(seconds) for stage, seconds in found.samples.items()} == dict.fromkeys(("load image", "preprocess", "infer", "postprocess", "call"), 2)
    assert found.images == [str(photo)]
    assert len(found.layers) > 100, "all of them, not those that a table would show"


def test_saving_leaves_the_tables(demo_pose_bundle: Path, tmp_path: Path) -> None:
    result = done("profile", demo_pose_bundle, *QUICK, "--save", tmp_path / "profile.json")
    assert "one call" in result.stdout
    assert profiles_of((tmp_path / "profile.json").read_bytes())[0].call.count == 2


def test_options_with_commas_have_a_row_each(demo_pose_bundle: Path) -> None:
    command = ("profile", demo_pose_bundle, "--warmup", 0, "--num-iter", 2, "--cold", 0, "--json", "--threads", "1, 2", "--batch", "1,,3,", "--streams", "2")
    (found,) = profiles_of(done(*command).stdout)
    expected = [(1, 1, 1), (3, 1, 1), (1, 1, 2), (1, 2, 1), (3, 2, 1), (1, 2, 2)]
    assert [(row.batch, row.threads, row.streams) for row in found.network] == expected
    assert found.threads == 1, "the first is what all else is measured with"


def test_a_batch_that_is_not_taken_is_named_under_the_table(ncnn_bundle: Path) -> None:
    out = done("profile", ncnn_bundle, *QUICK, "--batch", "1,2").stdout
    assert "batch 2 left out: batch: expected 1, the only one that the network takes, found 2\n" in out
    refused(cli("profile", ncnn_bundle, *QUICK, "--batch", "2"), 4, "expected 1, the only one that the network takes, found 2")


def test_progress_is_drawn_on_a_terminal_and_only_on_stderr(demo_pose_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = done("profile", demo_pose_bundle, *QUICK, "--json")
    assert profiles_of(result.stdout)
    assert "demo-pose_onnxruntime network" in result.stderr
    result = done("compare", demo_pose_bundle, demo_pose_bundle, *QUICK_TURNS, "--json")
    assert comparison_of(result.stdout).rows
    assert "turns" in result.stderr


# ------------------------------------------------------------------------------------------------------------------------- tables


def latency(milliseconds: float, *, count: int = 200) -> Latency:
    return replace(Latency.of(1e-3 * milliseconds * np.linspace(0.5, 1.5, count)), count=count)


def made(milliseconds: float, *, layers: list[LayerTime] | None = None, **changes: Any) -> Profile:
    """A profile with all that there can be, of calls that take so long."""
    parts = {"load image": 0.9, "preprocess": 0.1, "infer": 0.8, "postprocess": 0.1, "copy": 0.05}
    stages = {stage: latency(part * milliseconds) for stage, part in parts.items()}
    rows = [
        Row(batch=batch, threads=threads, streams=streams, latency=latency(batch * milliseconds), samples=[])
        for batch, threads, streams in ((1, 1, 1), (32, 128, 64))
    ]
    base = Profile(
        name="rtmpose-m_ncnn", task="PoseDetector", backend="ncnn", precision="fp32", size_bytes=123_456_789, device="cpu", threads=128, warmup=50, images=["a.png"] * 2,
        boxes=1, open_s=0.1, stages=stages, call=latency(milliseconds), network=rows, load=Load(), host=read_host(), at="2026-01-01T00:00:00Z",
        layers=layers or [], samples={},
    )  # fmt: skip
    return replace(base, **changes)


def assert_figures(texts: list[str], values: list[float]) -> None:
    """Whole numbers, not the beginnings of them."""
    for text, value in zip(texts, values, strict=True):
        assert re.fullmatch(r"\d+(\.\d+)?", text), texts
        assert float(text) == pytest.approx(value, rel=6e-4, abs=0.06)


@pytest.mark.parametrize("milliseconds", [0.012345, 1.2345, 123.45, 4321.9, 98765.4], ids=str)
def test_at_80_columns_no_figure_is_cut(milliseconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = made(milliseconds)
    print_profile(found, layers=0)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    _, *rows = cells(out, "one call")
    columns = [*found.stages.values(), found.call]
    names = {"mean": "mean_ms", "median": "median_ms", "min": "min_ms", "max": "max_ms", "p90": "p90_ms", "p95": "p95_ms", "p99": "p99_ms", "std": "std_ms"}
    for row in rows[:8]:
        assert_figures(row[1:], [getattr(of, names[row[0]]) for of in columns])
    assert_figures(rows[9][1:], [of.per_second for of in columns])
    for row, one in zip(cells(out, "the network alone, ms")[1:], found.network, strict=True):
        of = one.latency
        assert row[:3] == [str(one.batch), str(one.threads), str(one.streams)]
        assert_figures(row[3:], [of.median_ms, of.p99_ms, of.std_ms, of.median_ms / one.batch, of.per_second])


def test_at_80_columns_the_stages_have_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    """With images and a session that copies there are seven columns."""
    print_profile(made(12.345), layers=0)
    heading, *_ = cells(capsys.readouterr().out, "one call")
    assert heading == ["ms", "load image", "preprocess", "infer", "postprocess", "(copy)", "image to result"]


def test_at_80_columns_a_layer_can_be_told_from_its_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    """Names begin alike and differ at their ends."""
    names = [f"/backbone/stage{i}/stage{i}.2/blocks/blocks.0/conv2/pointwise_conv/conv/Conv/WithoutBiases" for i in range(3)]
    layers = [LayerTime(name=name, kind="Convolution (brgconv_avx512_f32)", seconds=1.2345 / (i + 1)) for i, name in enumerate(names)]
    print_profile(made(12.345, layers=layers), layers=2)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "…" not in out[out.index("the slowest 2 of 3 layers") :]
    packed = "".join(part for row in cells(out, "the slowest 2 of 3 layers")[1:] for part in row[0].split())
    assert packed == "".join(names[:2])
    assert "1234.5000" in out
    assert "54.5%" in out


def test_a_backend_that_says_nothing_of_its_layers_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_profile(made(1.0), layers=5)
    assert "ncnn does not say what its layers take" in capsys.readouterr().out


def test_what_is_known_of_memory_and_energy_is_said_and_what_is_not_too(capsys: pytest.CaptureFixture[str]) -> None:
    cold = Cold(import_s=0.25, open_s=0.5, first_s=0.125, total_s=0.875, imported_bytes=50 * 2**20, opened_bytes=None, peak_bytes=2**30)
    print_profile(made(1.0, cold=cold, joules=0.0125), layers=0)
    out = capsys.readouterr().out
    assert "first result of a fresh process: 0.88 s (imports 0.25, load 0.50, first call 0.12)" in out
    assert "50.0 MiB imported, not said loaded, 1024.0 MiB at the most" in out
    assert "energy of the processor: 12.5 mJ a call" in out


def test_doubts_are_shown_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_profile(made(1.0, doubts=[Doubt(kind="load", what="others were there " * 8, do="send them away")]), layers=0)
    assert f"unsure: {'others were there ' * 8}; send them away\n" in capsys.readouterr().out


@pytest.mark.parametrize("milliseconds", [0.012345, 98765.4], ids=str)
def test_at_80_columns_a_comparison_is_whole(milliseconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["rtmpose-m_coco-wholebody-384x288_onnxruntime-int8", "rtmpose-m_tensorrt_with_a_name_that_does_not_end (2)"]
    ratios = [Ratio(times=1, low=1, high=1, confidence=0.95, rounds=200), Ratio(times=123.456, low=122.111, high=124.222, confidence=0.95, rounds=200)]
    rows = [
        Compared(name=name, latency=latency(milliseconds), ratio=ratio, doubts=[Doubt(kind="few", what="why", do="what to do")], samples=[])
        for name, ratio in zip(names, ratios, strict=True)
    ]
    print_comparison(Comparison(what="image to result", rows=rows, host=read_host(), at="2026-01-01T00:00:00Z"))
    out = capsys.readouterr().out
    tables = out[: out.index("└")]
    assert max(len(line) for line in tables.splitlines()) <= 80
    assert "…" not in out
    heading, first, second = cells(out, "200 calls of each, in turns")
    assert heading == ["image to result", "median, ms", "p99", "times", "95%", ""]
    for row in (first, second):
        assert_figures(row[1:3], [rows[0].latency.median_ms, rows[0].latency.p99_ms])
    assert first[3:] == ["1", "", ""]
    assert second[3:] == ["123.456", "122.111..124.222", "faster"]
    for name in names:
        assert f"unsure: {name}: why; what to do\n" in out


# ------------------------------------------------------------------------------------------------------------------------ compare


def test_a_comparison_says_how_many_times_as_fast_the_others_are(demo_pose_bundle: Path, photo: Path) -> None:
    """PyTorch beside ONNX Runtime, the first being the measure of the others."""
    result = done("compare", demo_pose_bundle, "demo-pose", photo, "--warmup", 0, "--runs", 20, "--threads", 1, "--confidence", 0.9)
    heading, first, second = cells(result.stdout, "20 calls of each, in turns")
    assert heading == ["image to result", "median, ms", "p99", "times", "90%", ""]
    assert first[0] == "demo-pose_onnxruntime"
    assert first[3:] == ["1", "", ""]
    assert second[0] == "demo-pose_pytorch"
    low, high = (float(word) for word in second[4].split(".."))
    assert low <= float(second[3]) <= high
    assert second[5] in {"faster", "slower", "the same"}
    assert "unsure: demo-pose_onnxruntime: 20 calls" in result.stdout


def test_a_comparison_as_json(demo_pose_bundle: Path, ncnn_bundle: Path, tmp_path: Path) -> None:
    command = ("compare", demo_pose_bundle, ncnn_bundle, "--warmup", 1, "--runs", 15, "--threads", 1, "--json", "--save", tmp_path / "comparison.json")
    result = done(*command)
    assert (tmp_path / "comparison.json").read_bytes() == result.stdout.encode()
    found = comparison_of(result.stdout)
    assert json.loads(result.stdout)["schema"] == found.schema == "modelcrate.comparison/1"
    assert found.what == "image to result"
    assert [row.name for row in found.rows] == [Bundle.open(place).name for place in (demo_pose_bundle, ncnn_bundle)]
    base = found.rows[0].samples
    for row in found.rows:
        assert len(row.samples) == row.latency.count == row.ratio.rounds == 20, "turns of ten"
        assert all(one > 0 for one in row.samples)
        assert row.ratio.times == pytest.approx(np.median(base) / np.median(row.samples))
    assert (found.rows[0].ratio.low, found.rows[0].ratio.high, found.rows[0].ratio.verdict) == (1, 1, "the same")


def test_the_network_alone_can_be_compared(demo_pose_bundle: Path, demo_detector_bundle: Path, ncnn_bundle: Path) -> None:
    result = done("compare", demo_pose_bundle, demo_pose_bundle, *QUICK_TURNS, "--what", "network", "--batch", 2, "--json")
    found = comparison_of(result.stdout)
    assert found.what == "the network alone, batch 2"
    assert found.rows[0].latency.per_second == pytest.approx(2e3 / found.rows[0].latency.mean_ms)
    refused(cli("compare", demo_pose_bundle, ncnn_bundle, *QUICK_TURNS, "--what", "network", "--batch", 2), 4, "expected 1, the only one")


def test_subjects_of_several_tasks_are_no_comparison(demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    for others in ((demo_detector_bundle,), (demo_pose_bundle, demo_detector_bundle)):
        result = cli("compare", demo_pose_bundle, *others, *QUICK_TURNS)
        refused(result, 14, "expected subjects of one task, found PoseDetector and Detector", "the same question")


def test_one_subject_is_no_comparison(demo_pose_bundle: Path, photo: Path) -> None:
    for rest in ((), (photo,)):
        refused(cli("compare", demo_pose_bundle, *rest, *QUICK_TURNS), 4, "expected two subjects or more to compare, found 1", "modelcrate profile")


# ----------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("option", ["--batch", "--streams", "--threads"])
@pytest.mark.parametrize("text", ["0", "-1", "two", "1,0", "1.5", "1;2", "1 2"])
def test_numbers_that_are_none_are_refused_with_the_option(pose_bundle: Path, option: str, text: str) -> None:
    refused(cli("profile", pose_bundle, *QUICK, f"{option}={text}"), 4, f"{option}: expected whole numbers from 1 on", repr(text), f"{option} 1,2,4")


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "--runs", 0), ("profile", "--warmup", -1), ("profile", "--boxes", 0), ("profile", "--layers", -1), ("profile", "--cold", -1),
        ("profile", "--device-id", -1), ("compare", "--runs", 0), ("compare", "--confidence", 0.2), ("compare", "--confidence", 1), ("compare", "--what", "half"),
        ("compare", "--batch", 0), ("compare", "--threads", 0),
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_usage_errors(pose_bundle: Path, arguments: tuple[str, str, object]) -> None:
    command, option, value = arguments
    result = cli(command, pose_bundle, pose_bundle, option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_subjects_come_first_and_images_behind_them(command: str, pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(photo, tmp_path / "images")
    for first in (photo, tmp_path / "images"):
        refused(cli(command, first, pose_bundle, pose_bundle), 4, str(first), "expected a bundle or a checkpoint first, found images", "BUNDLE IMAGE")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_bundle_behind_an_image_is_not_passed_over(pose_bundle: Path, photo: Path, tmp_path: Path, form: str) -> None:
    """Not even one that has a picture in it, as bundles have that were converted with --image."""
    shutil.copytree(pose_bundle, tmp_path / "second")
    shutil.copy(photo, tmp_path / "second" / "example.png")
    second = tmp_path / "second"
    if form == "zip":
        second = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", second))
    with pytest.raises((ConfigError, InputError), match=f"{second}: expected"):
        split_inputs([str(pose_bundle), str(photo), str(second)])


def test_images_of_a_folder_are_all_taken(pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.PNG", "c.txt"):
        shutil.copy(photo, tmp_path / "images" / name)
    texts, images = split_inputs([str(pose_bundle), "demo-pose", str(photo), str(tmp_path / "images")])
    assert texts == [str(pose_bundle), "demo-pose"]
    assert images == [photo, tmp_path / "images" / "a.PNG", tmp_path / "images" / "b.png"]
    assert split_inputs([str(pose_bundle)]) == ([str(pose_bundle)], [])


@pytest.mark.parametrize("command", ["profile", "compare"])
@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("nothing-like-it", 4, "expected a checkpoint file or the name of a published model"),
        ("gone.pth", 4, "expected a bundle or a checkpoint, found neither"),
        ("text.pth", 6, "expected a checkpoint"),
        ("text.zip", 11, "expected"),
        ("empty", 4, "found images"),
        ("half", 11, "expected"),
    ],
)
def test_what_is_no_subject_is_one_line(
    command: str, text: str, code: int, words: str, pose_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.pth", "text.zip"):
        (tmp_path / name).write_text("some text\nin two lines")
    for name in ("empty", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "half" / "deploy.json").write_text("{}")
    refused(cli(command, text, pose_bundle), code, text, words)


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_an_image_that_cannot_be_read_is_one_line(command: str, pose_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name, words in (("gone.png", "found nothing there"), ("bad.png", "OpenCV cannot decode")):
        refused(cli(command, pose_bundle, pose_bundle, tmp_path / name), 10, name, words)


def test_what_is_measured_is_kept_whatever_becomes_of_the_next(demo_pose_bundle: Path, tmp_path: Path) -> None:
    """Minutes of measuring are not lost with the last subject: here one of a backend that we have not."""
    other = copied_bundle(demo_pose_bundle, tmp_path / "other", backend="snpe")
    for arguments in (("--save", tmp_path / "kept.json"), ("--json",)):
        result = cli("profile", demo_pose_bundle, other, *QUICK, *arguments)
        assert result.exit_code == 13
        assert "snpe" in result.stderr
        text = result.stdout if arguments == ("--json",) else (tmp_path / "kept.json").read_bytes()
        assert [one.name for one in profiles_of(text)] == ["demo-pose_onnxruntime"]


def test_of_many_images_only_those_that_are_timed_are_read(demo_pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        shutil.copy(photo, images / f"{i}.png")
    (images / "8.png").write_bytes(b"no picture")
    found = profiles_of(done("profile", demo_pose_bundle, images, "--json", "--warmup", 2, "--runs", 4, "--cold", 0).stdout)
    assert [Path(name).name for name in found[0].images] == [f"{i}.png" for i in range(6)]
    compared = comparison_of(done("compare", demo_pose_bundle, demo_pose_bundle, images, "--json", "--warmup", 0, "--runs", 3).stdout)
    assert compared.images == 3


def test_images_that_do_not_fit_are_said(demo_pose_bundle: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        shutil.copy(photo, tmp_path / "images" / f"{i}.png")
    arguments = ("compare", demo_pose_bundle, demo_pose_bundle, tmp_path / "images", *QUICK_TURNS[:-2], "--runs", 4)
    assert "no more fit" not in done(*arguments).stdout
    monkeypatch.setattr("modelcrate_runtime.images._HELD_BYTES", 1)
    assert "on the first 1 of 4 images: no more fit into a gibibyte of memory" in done(*arguments).stdout


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_a_device_that_is_not_there_is_one_line_with_its_own_code_and_hint(command: str, pose_bundle: Path) -> None:
    """With the default number of fresh processes too."""
    refused(cli(command, pose_bundle, pose_bundle, "--device", "cuda", "--runs", 1), 5, "CUDAExecutionProvider", "onnxruntime-gpu")
    refused(cli(command, pose_bundle, pose_bundle, "--device", "toaster", "--runs", 1), 4, "device: expected one of", "'toaster'")


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_a_place_that_cannot_be_written_is_one_line(command: str, pose_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    quick = QUICK if command == "profile" else QUICK_TURNS
    result = cli(command, pose_bundle, pose_bundle, *quick, "--save", tmp_path / "file" / "deeper.json")
    assert result.exit_code == 15
    assert result.stderr.startswith(f"error: {tmp_path}/file/deeper.json: expected to write there")


@pytest.mark.parametrize("command", ["profile", "compare"])
def test_ctrl_c_ends_it(command: str, pose_bundle: Path, tmp_path: Path) -> None:
    """In the midst of a measurement of more than a day, in a process of its own: a signal that comes too early would end the tests."""
    arguments = [command, str(pose_bundle), str(pose_bundle), "--runs", "100000000", *(("--cold", "0") if command == "profile" else ())]
    program = "from modelcrate_converter.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments, "--save", str(tmp_path / "out.json")], stderr=subprocess.PIPE, text=True)
    place = Path(f"/proc/{process.pid}")
    if not place.exists():
        process.kill()
        process.communicate()
        pytest.skip("needs /proc, to see that it measures")

    def worked_s() -> float:
        fields = (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    while process.poll() is None and "onnxruntime" not in (place / "maps").read_text(encoding="utf-8", errors="replace"):
        time.sleep(0.05)
    loaded = worked_s()
    while process.poll() is None and worked_s() < loaded + 1.0:  # the framework's import and loading take a tenth of that: by now it measures
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not (tmp_path / "out.json").exists()


def test_help_says_what_the_options_are() -> None:
    for command, words in (("profile", ("--batch", "--streams", "--cold", "--layers", "--save")), ("compare", ("--confidence", "--what", "--save"))):
        out = done(command, "--help").stdout
        assert all(word in out for word in words)
