"""Networks whose tensors the caller decodes: on the command line, and beside the other tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from modelcrate_bundle.errors import ConfigError, InputError, OutputError, TaskMismatchError
from modelcrate_converter.cli import app
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_runtime import Classifier, Detector, Network, PoseDetector
from modelcrate_runtime.images import write_image

Result = Any
"""What `CliRunner.invoke` returns; typer does not say whose class it is."""
HEIGHT, WIDTH = 12, 16
KERNEL = np.random.default_rng(3).normal(size=(4, 3, 3, 3)).astype(np.float32)


def made(folder: Path, name: str, way: str, *, outputs: tuple[str, ...] = ("maps", "best", "levels")) -> Path:
    """A bundle of a network with maps (N, 4, 12, 16), the best of them (N, 12, 16) int64, and 1 / the mean level (N, 3)."""
    maps, best, levels = outputs
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], [maps], pads=[1, 1, 1, 1]),
        helper.make_node("ArgMax", [maps], [best], axis=1, keepdims=0),
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Reciprocal", ["mean"], [levels]),
    ]
    shapes = [(TensorProto.FLOAT, ("N", 4, HEIGHT, WIDTH)), (TensorProto.INT64, ("N", HEIGHT, WIDTH)), (TensorProto.FLOAT, ("N", 3))]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("N", 3, HEIGHT, WIDTH))],
        [helper.make_tensor_value_info(output, *shape) for output, shape in zip(outputs, shapes, strict=True)], [numpy_helper.from_array(KERNEL, "kernel")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)]), folder / f"{name}.onnx")
    (folder / f"{name}.toml").write_text(f'task = "Network"\n{way}\n', encoding="utf-8")
    options = ConvertOptions(out=folder, spec=folder / f"{name}.toml")
    (conversion,) = convert(folder / f"{name}.onnx", [load_config("onnxruntime")], options)
    assert conversion.error is None, conversion.error
    return conversion.place


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("network"), "whole", "[resize]")


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("network"), "crops", "[crop]\npadding = 1.0")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three images of three sizes."""
    rng = np.random.default_rng(0)
    paths = []
    for name, size_hw in (("a.png", (HEIGHT, WIDTH)), ("b.png", (40, 30)), ("c.png", (25, 70))):
        write_image(tmp_path / "photos" / name, rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8))
        paths.append(tmp_path / "photos" / name)
    return paths


def image_of(path: Path) -> np.ndarray:
    import cv2

    return cv2.imread(str(path))


def refused(result: Result, code: int, *words: str) -> None:
    """One line `error: ...`, at most one ` hint: ...` after it, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: "), result.stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith(" hint: "))
    for word in words:
        assert word in result.stderr, result.stderr


def strictly(text: str) -> Any:
    """JSON as every reader takes it: without Python's NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def assert_described(row: dict[str, Any], name: str, value: np.ndarray) -> None:
    assert set(row) == {"name", "dtype", "shape", "min", "mean", "max"}
    assert (row["name"], row["dtype"], row["shape"]) == (name, str(value.dtype), list(value.shape))
    np.testing.assert_allclose([row["min"], row["mean"], row["max"]], [value.min(), value.mean(), value.max()], rtol=1e-6)


def test_the_table_has_name_type_shape_and_range(cli: Callable[..., Result], whole: Path, photos: list[Path]) -> None:
    result = cli("run", whole, *photos[:2])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith(".png")] == [str(path) for path in photos[:2]]
    with Network(whole) as network:
        outputs = network(image_of(photos[0])).outputs
    for name, value in outputs.items():
        row = next(line for line in lines if f" {name} " in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[:3] == [name, str(value.dtype), " x ".join(str(side) for side in value.shape)]
        np.testing.assert_allclose([float(cell) for cell in cells[3:]], [value.min(), value.mean(), value.max()], rtol=1e-5)


def test_json_has_a_row_for_each_image_and_output(cli: Callable[..., Result], whole: Path, photos: list[Path]) -> None:
    result = cli("run", whole, photos[0].parent, "--json")
    assert result.exit_code == 0, result.output
    rows = strictly(result.stdout)
    assert [row["file_name"] for row in rows] == ["a.png", "b.png", "c.png"]
    with Network(whole) as network:
        for row, path in zip(rows, photos, strict=True):
            outputs = network(image_of(path)).outputs
            assert [entry["name"] for entry in row["outputs"]] == ["maps", "best", "levels"]
            for entry in row["outputs"]:
                assert_described(entry, entry["name"], outputs[entry["name"]])


def test_json_of_numbers_that_json_has_no_word_for_is_json(cli: Callable[..., Result], whole: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "black.png", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    result = cli("run", whole, tmp_path / "black.png", "--json")
    assert result.exit_code == 0, result.output
    (row,) = strictly(result.stdout)
    levels = row["outputs"][2]
    assert (levels["name"], levels["max"]) == ("levels", None)
    assert "inf" in cli("run", whole, tmp_path / "black.png").stdout


def assert_saved(path: Path, outputs: dict[str, np.ndarray]) -> None:
    with np.load(path) as saved:
        assert sorted(saved) == sorted(outputs)
        for name, value in outputs.items():
            assert saved[name].dtype == value.dtype
            np.testing.assert_allclose(saved[name], value, rtol=1e-6)


def test_save_writes_the_tensors(cli: Callable[..., Result], whole: Path, photos: list[Path], tmp_path: Path) -> None:
    alone = cli("run", whole, photos[1], "--save", tmp_path / "out.npz")
    assert alone.exit_code == 0, alone.output
    assert f"wrote {tmp_path / 'out.npz'}" in alone.stderr
    several = cli("run", whole, *photos, "--save", tmp_path / "results", "--json")
    assert several.exit_code == 0, several.output
    assert len(strictly(several.stdout)) == 3
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.npz", "b.npz", "c.npz"]
    with Network(whole) as network:
        assert_saved(tmp_path / "out.npz", dict(network(image_of(photos[1])).outputs))
        for path in photos:
            assert_saved(tmp_path / "results" / f"{path.stem}.npz", dict(network(image_of(path)).outputs))


def test_save_of_one_image_into_a_folder_and_of_two_of_one_name(cli: Callable[..., Result], whole: Path, photos: list[Path], tmp_path: Path) -> None:
    assert cli("run", whole, photos[0], "--save", tmp_path / "results").exit_code == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.npz"]
    write_image(tmp_path / "more" / "a.png", np.full((20, 20, 3), 200, dtype=np.uint8))
    result = cli("run", whole, photos[0], tmp_path / "more" / "a.png", "--save", tmp_path / "both", "--json")
    assert result.exit_code == 0, result.output
    assert [row["file_name"] for row in strictly(result.stdout)] == [str(photos[0]), str(tmp_path / "more" / "a.png")]
    with Network(whole) as network:
        assert_saved(tmp_path / "both" / "a.npz", dict(network(image_of(photos[0])).outputs))
        assert_saved(tmp_path / "both" / "a-2.npz", dict(network(image_of(tmp_path / "more" / "a.png")).outputs))


def test_outputs_may_have_any_name(cli: Callable[..., Result], photos: list[Path], tmp_path: Path) -> None:
    names = ("file", "/head/best_output.1", "allow_pickle")
    bundle = made(tmp_path, "odd", "[resize]", outputs=names)
    result = cli("run", bundle, photos[0], "--save", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with Network(bundle) as network:
        assert_saved(tmp_path / "out.npz", dict(network(image_of(photos[0])).outputs))


@pytest.mark.parametrize("save", ["out.npz", "out.png", "out.jpg"])
def test_a_place_that_makes_no_sense_is_one_line(cli: Callable[..., Result], whole: Path, photos: list[Path], tmp_path: Path, save: str) -> None:
    given = photos if save == "out.npz" else photos[:1]
    refused(cli("run", whole, *given, "--save", tmp_path / save), OutputError.exit_code, save, ".npz" if save != "out.npz" else "3 images")
    assert not (tmp_path / save).exists()


def test_one_image_that_cannot_be_read_does_not_spoil_the_others(cli: Callable[..., Result], whole: Path, photos: list[Path], tmp_path: Path) -> None:
    photos[1].write_bytes(b"no image")
    result = cli("run", whole, *photos, "--json", "--save", tmp_path / "results")
    assert result.exit_code == InputError.exit_code
    assert [row["file_name"] for row in strictly(result.stdout)] == ["a.png", "c.png"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.npz", "c.npz"]
    assert f"skipped: {photos[1]}" in result.stderr
    assert "expected 3 images, found 1" in result.stderr
    refused(cli("run", whole, photos[1]), InputError.exit_code, "b.png")


def test_boxes_are_crops(cli: Callable[..., Result], crops: Path, photos: list[Path], tmp_path: Path) -> None:
    result = cli("run", crops, photos[2], "--box", "2,3,18,15", "--box", "0, 0, 70, 25", "--json", "--save", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    (row,) = strictly(result.stdout)
    image = image_of(photos[2])
    with Network(crops) as network:
        outputs = dict(network(image, [[2, 3, 18, 15], [0, 0, 70, 25]]).outputs)
        everything = network(image)["maps"]
    assert {name: len(value) for name, value in outputs.items()} == {"maps": 2, "best": 2, "levels": 2}
    for entry in row["outputs"]:
        assert_described(entry, entry["name"], outputs[entry["name"]])
    assert_saved(tmp_path / "out.npz", outputs)
    (unboxed,) = strictly(cli("run", crops, photos[2], "--json").stdout)
    assert_described(unboxed["outputs"][0], "maps", everything)
    np.testing.assert_allclose(everything[0], outputs["maps"][1], rtol=1e-5, atol=1e-3)


def test_a_box_for_a_network_of_whole_images_is_one_line(cli: Callable[..., Result], whole: Path, photos: list[Path]) -> None:
    refused(cli("run", whole, photos[0], "--box", "0,0,4,4"), InputError.exit_code, "expected no boxes")
    refused(cli("run", whole, photos[0], "--box", "0,0,4"), InputError.exit_code, "--box")


@pytest.mark.parametrize("order", [0, 1], ids=["network first", "network second"])
def test_two_bundles_are_one_line(cli: Callable[..., Result], whole: Path, pose_bundle: Path, photos: list[Path], order: int) -> None:
    bundles = (whole, pose_bundle) if order == 0 else (pose_bundle, whole)
    refused(cli("run", *bundles, photos[0]), TaskMismatchError.exit_code, "expected a network of raw tensors alone")
    refused(cli("run", whole, whole, photos[0]), TaskMismatchError.exit_code, "expected a network of raw tensors alone")


def test_the_command_line_takes_device_and_geometry(cli: Callable[..., Result], whole: Path, photos: list[Path]) -> None:
    assert strictly(cli("run", whole, photos[0], "--geometry", "sdk", "--threads", 1, "--json").stdout)[0]["file_name"] == "a.png"
    refused(cli("run", whole, photos[0], "--device", "abacus"), ConfigError.exit_code, "abacus")


@pytest.mark.parametrize("task", [Detector, PoseDetector, Classifier])
def test_other_tasks_refuse_it(whole: Path, task: type) -> None:
    with pytest.raises(TaskMismatchError, match="found a network of raw tensors") as caught:
        task(whole)
    assert "Network" in caught.value.hint


def test_it_refuses_other_tasks(pose_bundle: Path, detector_bundle: Path) -> None:
    with pytest.raises(TaskMismatchError, match="expected a network of raw tensors for Network, found a pose estimator"):
        Network(pose_bundle)
    with pytest.raises(TaskMismatchError, match="found a detector"):
        Network(detector_bundle)


def test_images_of_several_sizes_are_run_together_and_answered_one_by_one(whole: Path, crops: Path, photos: list[Path]) -> None:
    images = [image_of(path) for path in photos] * 3
    for bundle in (whole, crops):
        with Network(bundle, warmup=1) as network:
            together = network.batch(images)
            assert len(together) == 9
            for image, tensors in zip(images, together, strict=True):
                alone = network(image)
                assert len(tensors) == len(alone) == 1
                for name in ("maps", "best", "levels"):
                    np.testing.assert_allclose(tensors[name], alone[name], rtol=1e-4, atol=1e-3)


def test_inspect_says_what_it_is(cli: Callable[..., Result], whole: Path) -> None:
    result = cli("inspect", whole)
    assert result.exit_code == 0, result.output
    for word in ("Network", "maps float32 batch x 4 x 12 x 16", "best int64 batch x 12 x 16", "whole.onnx"):
        assert word in result.stdout, result.stdout
