"""The command line: one line for every mistake, its own exit code, and JSON for programs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_converter.cli import app
from modelcrate_converter.models.blueprints import random_weights, rtmpose_shapes

ID = "rtmpose-c64_quick"
Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.pth"
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "quick.toml"
    path.write_text('backend = "onnxruntime"\nprecision = "fp32"\n[onnx]\nsimplify = false\n')
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "crates"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in a folder of its own, with a cache of its own, on a terminal that is wide enough for its tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    assert "Warning" not in result.stderr
    for word in words:
        assert word in errors[0], errors[0]
    after = lines[lines.index(errors[0]) + 1 :]
    assert all(line.startswith(" hint: ") for line in after), after


def no_bundle(out: Path) -> None:
    assert not out.exists() or list(out.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------------- mistakes


def truncated(folder: Path, checkpoint: Path) -> Path:
    path = folder / "half.pth"
    data = checkpoint.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def empty(folder: Path, checkpoint: Path) -> Path:
    path = folder / "empty.pth"
    path.write_bytes(b"")
    return path


def resnet(folder: Path, checkpoint: Path) -> Path:
    path = folder / "resnet.pth"
    torch.save({"state_dict": {"conv1.weight": torch.ones(8, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(8, 8, 3, 3), "fc.weight": torch.ones(10, 8)}}, path)
    return path


def with_nan(folder: Path, checkpoint: Path) -> Path:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights["head.cls_x.weight"][0, 0] = math.nan
    path = folder / "nan.pth"
    torch.save({"state_dict": weights}, path)
    return path


def missing(folder: Path, checkpoint: Path) -> Path:
    return folder / "gone.pth"


def a_folder(folder: Path, checkpoint: Path) -> Path:
    (folder / "folder.pth").mkdir()
    return folder / "folder.pth"


def text_file(folder: Path, checkpoint: Path) -> Path:
    path = folder / "page.pth"
    path.write_text("<html>404</html>")
    return path


def without_a_head(folder: Path, checkpoint: Path) -> Path:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    del weights["head.mlp.1.weight"]
    path = folder / "headless.pth"
    torch.save({"state_dict": weights}, path)
    return path


def of_misfits(folder: Path, checkpoint: Path) -> Path:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights["backbone.stage1.0.conv.weight"] = torch.ones(8, 9, 3, 3)
    path = folder / "misfit.pth"
    torch.save({"state_dict": weights}, path)
    return path


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (truncated, 6, ("half.pth",)),
        (empty, 6, ("empty.pth", "empty file")),
        (resnet, 7, ("resnet.pth", "RTMPose", "layer1.0")),
        (with_nan, 6, ("nan.pth", "head.cls_x.weight")),
        (missing, 6, ("gone.pth",)),
        (a_folder, 6, ("folder.pth", "folder")),
        (text_file, 6, ("page.pth",)),
        (without_a_head, 7, ("headless.pth", "head.mlp.1.weight")),
        (of_misfits, 7, ("misfit.pth",)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_checkpoint_is_one_line_and_no_bundle(
    invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path, make: Callable[[Path, Path], Path], code: int, words: tuple[str, ...]
) -> None:
    assert_one_error(invoke("convert", make(tmp_path, checkpoint), "-t", target, "-o", out), code, *words)
    no_bundle(out)


def test_an_unknown_target_gets_the_nearest_name(invoke: Invoke, checkpoint: Path, out: Path) -> None:
    result = invoke("convert", checkpoint, "-t", "onxruntime", "-o", out)
    assert_one_error(result, 4, "'onxruntime'")
    assert " hint: did you mean onnxruntime" in result.stderr
    no_bundle(out)


@pytest.mark.parametrize("text", ["model = dict(", "model = dict(head=dict(out_channels=99))", "\x00\xff"])
def test_a_bad_model_config_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "model.py").write_text(text, encoding="latin-1")
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out, "--model-config", tmp_path / "model.py"), 4, "model.py")
    no_bundle(out)


def test_a_missing_model_config_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out, "--model-config", tmp_path / "gone.py"), 4, "gone.py")


def test_a_deploy_config_that_is_wrong_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    target.write_text('backend = "onnxruntime"\nprecision = "fp32"\ncolour = 3\n')
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out), 4, "quick.toml", "colour")


@pytest.mark.parametrize(("content", "word"), [(b"no image", "decode"), (b"", "empty"), (None, "photo.png")])
def test_an_image_that_cannot_be_read_is_one_line(
    invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path, content: bytes | None, word: str
) -> None:
    photo = tmp_path / "photo.png"
    if content is not None:
        photo.write_bytes(content)
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out, "--image", photo), 10, "photo.png", word)
    no_bundle(out)


def test_an_image_of_one_pixel_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "dot.png"), np.zeros((1, 1, 3), dtype=np.uint8))
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out, "--image", tmp_path / "dot.png"), 10, "dot.png", "1x1")
    no_bundle(out)


def test_a_url_that_is_not_cached_is_one_line_when_offline(invoke: Invoke, target: Path, out: Path) -> None:
    assert_one_error(
        invoke("convert", "https://example.invalid/model-0123abcd.pth", "-t", target, "-o", out, "--offline"), 16, "example.invalid/model-0123abcd.pth"
    )
    no_bundle(out)


def test_one_name_for_two_checkpoints_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    assert_one_error(invoke("convert", checkpoint, checkpoint, "-t", target, "-o", out, "--name", "both"), 4, "--name", "found 2")


def test_an_output_folder_that_is_a_file_is_one_line(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    out.write_text("precious")
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out), 15, "crates")
    assert out.read_text() == "precious"


def test_a_gate_that_does_not_hold_is_one_line_beside_the_table(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    target.write_text(target.read_text() + "[gates]\nrelative_linf = 1e-12\n")
    result = invoke("convert", checkpoint, "-t", target, "-o", out)
    assert_one_error(result, 9, ID, "simcc_x", "1e-12", "no bundle was written")
    assert "FAIL" in result.stdout
    assert "keypoint shift" in result.stdout
    no_bundle(out)


@pytest.mark.parametrize("arguments", [(), ("convert",), ("convert", "x.pth"), ("convert", "x.pth", "-t", "onnxruntime", "--exporter", "magic")])
def test_wrong_usage_exits_with_2(invoke: Invoke, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_traceback_is_there_for_who_asks(invoke: Invoke, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCRATE_TRACEBACK", "1")
    result = invoke("convert", tmp_path / "gone.pth", "-t", target)
    assert "gone.pth" in str(result.exception)
    assert result.exit_code != 0


# -------------------------------------------------------------------------------------------------------------------- success


def test_a_conversion_tells_its_stages_its_parity_and_its_files(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    result = invoke("convert", checkpoint, "-t", target, "-o", out)
    assert result.exit_code == 0, result.output
    for stage in ("load checkpoint", "export ONNX", "build quick", "check parity", "write bundle"):
        assert f"done {stage}" in result.stderr
    assert "taken from defaults" in result.stderr
    assert "parity with PyTorch" in result.stdout
    assert "end2end.onnx" in result.stdout
    assert "FAIL" not in result.stdout
    Bundle.open(out / ID).verify()
    again = invoke("convert", checkpoint, "-t", target, "-o", out)
    assert again.exit_code == 0
    assert "up to date" in again.stdout
    assert "--force" in again.stdout


def test_without_verification_it_says_so_loudly(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    result = invoke("convert", checkpoint, "-t", target, "-o", out, "--no-verify")
    assert result.exit_code == 0, result.output
    assert "NOT VERIFIED" in result.stdout
    manifest = Bundle.open(out / ID).manifest
    assert manifest is not None
    assert manifest.parity.verified is False


def strictly(text: str) -> Any:
    """JSON as every reader takes it: without Python's NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_parity_and_files(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    result = invoke("convert", checkpoint, "-t", target, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    (entry,) = strictly(result.stdout)
    assert (entry["id"], entry["target"], entry["status"], entry["error"]) == (ID, "quick", "built", None)
    assert entry["checkpoint"] == str(checkpoint)
    assert Path(entry["place"]) == out / ID
    assert entry["parity"]["verified"] is True
    assert [figure["name"] for figure in entry["parity"]["outputs"]] == ["simcc_x", "simcc_y"]
    assert all(figure["passed"] for figure in entry["parity"]["outputs"] + entry["parity"]["pixels"])
    assert {file["path"]: file["role"] for file in entry["files"]}["end2end.onnx"] == "net"
    assert {key for file in entry["files"] for key in file} == {"path", "role", "bytes", "sha256"}
    assert all(seconds >= 0 for seconds in entry["seconds"].values())
    assert {row["name"] for row in entry["operators"]} >= {"Conv"}


def test_json_of_what_is_up_to_date_has_parity_and_files_too(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    assert invoke("convert", checkpoint, "-t", target, "-o", out).exit_code == 0
    (entry,) = strictly(invoke("convert", checkpoint, "-t", target, "-o", out, "--json").stdout)
    assert entry["status"] == "current"
    assert len(entry["files"]) == 5
    assert entry["parity"]["verified"] is True


def test_json_of_a_failure_is_json(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    target.write_text(target.read_text() + "[gates]\nrelative_linf = 1e-12\n")
    result = invoke("convert", checkpoint, "gone.pth", "-t", target, "-o", out, "--json")
    assert_one_error(result, 9, "simcc_x")
    failed, missing_entry = strictly(result.stdout)
    assert (failed["status"], failed["files"]) == ("failed", [])
    assert failed["parity"]["outputs"][0]["passed"] is False
    assert "simcc_x" in failed["error"]
    assert missing_entry["checkpoint"] == "gone.pth"
    assert missing_entry["exit_code"] == 6


def test_json_of_a_network_that_overflows_is_json(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    """Finite weights, infinite outputs: a parity failure with one line on stderr, and no NaN in the JSON."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    for key in ("head.mlp.1.weight", "head.cls_x.weight"):
        weights[key] *= 1e30
    torch.save({"state_dict": weights}, tmp_path / "huge.pth")
    result = invoke("convert", tmp_path / "huge.pth", "-t", target, "-o", out, "--json")
    assert_one_error(result, 9, "simcc_x")
    (entry,) = strictly(result.stdout)
    assert entry["status"] == "failed"
    no_bundle(out)


def test_several_checkpoints_one_of_which_fails(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    empty(tmp_path, checkpoint)
    result = invoke("convert", tmp_path / "empty.pth", checkpoint, "-t", target, "-o", out)
    assert_one_error(result, 6, "empty.pth")
    assert [path.name for path in out.iterdir()] == [ID]
    Bundle.open(out / ID).verify()


def test_two_checkpoints_with_one_id_are_both_named(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    result = invoke("convert", checkpoint, other, "-t", target, "-o", out)
    assert_one_error(result, 4, str(checkpoint), str(other), ID)
    assert [path.name for path in out.iterdir()] == [ID]


def test_two_files_of_one_target_name_do_not_share_a_bundle(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    """quick.toml and other/quick.toml: one would silently be overwritten by the other."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "quick.toml").write_text(target.read_text() + "[batch]\nmax = 64\n")
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-t", tmp_path / "other" / "quick.toml", "-o", out, "--no-verify"), 4, "quick")


def test_options_of_the_command_line_win_over_the_config(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    target.write_text(target.read_text().replace("simplify = false", "simplify = true"))
    result = invoke("convert", checkpoint, "-t", target, "-o", out, "--no-simplify", "--no-verify", "--name", "mine", "--json")
    (entry,) = strictly(result.stdout)
    assert entry["id"] == "mine_quick"
    assert "simplify" not in entry["seconds"]


def test_brackets_in_names_are_not_markup(invoke: Invoke, checkpoint: Path, target: Path, out: Path, tmp_path: Path) -> None:
    odd = tmp_path / "[red]model.pth"
    odd.write_bytes(checkpoint.read_bytes())
    result = invoke("convert", odd, "-t", target, "-o", out / "[bold]", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "[red]model.pth" in result.stderr
    assert "[bold]" in result.stdout.replace("\n", "")


def test_backends_tells_what_can_be_built(invoke: Invoke) -> None:
    result = invoke("backends", "--json")
    assert result.exit_code == 0
    rows = {row["backend"]: row for row in strictly(result.stdout)}
    assert rows["onnxruntime"]["can_build"] is True
    assert rows["onnxruntime"]["can_run"] is True
    assert "CPUExecutionProvider" in rows["onnxruntime"]["details"]


def test_help_lists_the_commands_once(invoke: Invoke) -> None:
    text = invoke("--help").stdout
    for command in ("convert", "run", "inspect", "backends"):
        assert len(re.findall(rf"^\W*{command} ", text, re.MULTILINE)) == 1, text


def test_sha256_is_checked_for_local_files_too(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert_one_error(invoke("convert", checkpoint, "-t", target, "-o", out, "--sha256", "deadbeef00"), 6, "deadbeef00", digest)
    assert not (out / ID).exists()
    assert invoke("convert", checkpoint, "-t", target, "-o", out, "--sha256", digest[:10].upper()).exit_code == 0
    assert_one_error(invoke("convert", checkpoint, checkpoint, "-t", target, "-o", out, "--sha256", digest), 4, "--sha256")


def test_dynamo_says_the_opset_that_it_wrote(invoke: Invoke, checkpoint: Path, target: Path, out: Path) -> None:
    done = invoke("convert", checkpoint, "-t", target, "-o", out, "--exporter", "dynamo")
    assert done.exit_code == 0, done.output
    assert "cannot write opset 17: it wrote 18" in done.stderr
    detail = json.loads((out / ID / "detail.json").read_text())
    assert detail["onnx_config"]["opset_version"] == 18
