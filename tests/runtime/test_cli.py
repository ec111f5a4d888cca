"""The command line as a user meets it: tables, JSON, pictures, and one line with an exit code when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from modelcrate_converter.cli import app
from modelcrate_runtime import Detector, PoseDetector

Result = Any
"""What `CliRunner.invoke` returns; typer does not say whose class it is."""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line; wide, so that tables do not wrap."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def photo(tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]) -> Path:
    """The scene as a file; PNG keeps its pixels."""
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), scene[0])
    return path


@pytest.fixture
def box_text(scene: tuple[np.ndarray, np.ndarray]) -> str:
    return ",".join(str(float(v)) for v in scene[1])


def refused(result: Result, code: int, *words: str) -> None:
    """One line `error: ...`, at most one ` hint: ...` after it, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith(" hint: "))
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def rows_of(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def xyxy(row: dict[str, Any]) -> list[float]:
    left, top, width, height = row["bbox"]
    return [left, top, left + width, top + height]


# ------------------------------------------------------------------------------------------------------------------------- run


def test_detections_as_coco_json(cli: Callable[..., Result], detector_bundle: Path, photo: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    rows = rows_of(cli("run", detector_bundle, photo, "--det-thr", 0.1, "--json"))
    with Detector(detector_bundle) as detector:
        boxes, labels, _ = detector(scene[0])
        names = detector.class_names
    strong = boxes[:, 4] >= 0.1
    assert len(rows) == strong.sum() > 5
    assert all(set(row) == {"file_name", "category_id", "category", "bbox", "score"} for row in rows)
    assert {row["file_name"] for row in rows} == {"photo.png"}
    assert [row["category_id"] for row in rows] == (labels[strong] + 1).tolist()
    assert [row["category"] for row in rows] == [names[label] for label in labels[strong]]
    np.testing.assert_allclose([xyxy(row) for row in rows], boxes[strong, :4], atol=2e-3)  # printed to a thousandth
    np.testing.assert_allclose([row["score"] for row in rows], boxes[strong, 4], atol=1e-6)


def test_poses_as_coco_json(cli: Callable[..., Result], pose_bundle: Path, photo: Path, box_text: str, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, box = scene
    first, second = rows_of(cli("run", pose_bundle, photo, "--box", box_text, "--box", "10, 20, 200.5, 300", "--json"))
    with PoseDetector(pose_bundle) as pose:
        expected = pose(image, [box, [10, 20, 200.5, 300]])
    for row, points in ((first, expected[0]), (second, expected[1])):
        assert set(row) == {"file_name", "category_id", "category", "bbox", "score", "keypoints"}
        assert (row["category_id"], row["category"]) == (1, "person")
        np.testing.assert_allclose(np.reshape(row["keypoints"], (17, 3)), points, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(row["score"], points[:, 2].mean(), rtol=1e-5)
    np.testing.assert_allclose(xyxy(first), box, atol=2e-3)
    np.testing.assert_allclose(second["bbox"], [10, 20, 190.5, 280], atol=2e-3)


def test_pose_without_a_box_is_of_the_whole_image(cli: Callable[..., Result], pose_bundle: Path, photo: Path) -> None:
    (row,) = rows_of(cli("run", pose_bundle, photo, "--json"))
    assert row["bbox"] == [0, 0, 640, 480]
    assert len(row["keypoints"]) == 51


@pytest.mark.parametrize("order", [0, 1], ids=["detector first", "pose first"])
def test_top_down_in_both_orders(
    cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path, scene: tuple[np.ndarray, np.ndarray], order: int
) -> None:
    image, _ = scene
    bundles = (detector_bundle, pose_bundle) if order == 0 else (pose_bundle, detector_bundle)
    with Detector(detector_bundle) as detector, PoseDetector(pose_bundle) as pose:
        boxes, labels, _ = detector(image)
        label = int(labels[0])
        chosen = boxes[(boxes[:, 4] >= 0.12) & (labels == label)]
        expected = pose(image, chosen[:, :4])
    rows = rows_of(cli("run", *bundles, photo, "--det-thr", 0.12, "--det-label", label, "--json"))
    assert len(rows) == len(chosen) > 1
    assert {row["category_id"] for row in rows} == {label + 1}
    np.testing.assert_allclose([row["score"] for row in rows], chosen[:, 4], atol=1e-6)
    np.testing.assert_allclose([np.reshape(row["keypoints"], (17, 3)) for row in rows], expected, rtol=1e-4, atol=1e-3)


def test_label_that_nothing_has_gives_an_empty_list(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    nameless = tmp_path / "nameless"
    shutil.copytree(detector_bundle, nameless)
    (nameless / "manifest.json").unlink()
    assert rows_of(cli("run", nameless, pose_bundle, photo, "--det-thr", 0.05, "--det-label", 77, "--json")) == []


def test_label_that_the_detector_does_not_have_is_refused(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path) -> None:
    refused = cli("run", detector_bundle, pose_bundle, photo, "--det-label", 77)
    assert refused.exit_code == 4
    assert "from 0 to 1, found 77" in refused.stderr


def test_one_broken_image_does_not_cost_the_others(cli: Callable[..., Result], detector_bundle: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        shutil.copy(photo, folder / name)
    (folder / "b.png").write_bytes(b"not an image")
    (folder / "._a.png").write_bytes(b"what macOS leaves")
    done = cli("run", detector_bundle, folder, "--det-thr", 0, "--json")
    assert done.exit_code == 10
    assert {row["file_name"] for row in json.loads(done.stdout)} == {"a.png", "c.png"}
    assert "b.png" in done.stderr
    assert "found 1 that cannot be used" in done.stderr


@pytest.mark.parametrize("save", ["same", "same/a.png", "bundle", "", "."])
def test_save_never_takes_the_place_of_an_input(cli: Callable[..., Result], detector_bundle: Path, photo: Path, tmp_path: Path, save: str) -> None:
    folder = tmp_path / "same"
    folder.mkdir()
    shutil.copy(photo, folder / "a.png")
    shutil.copytree(detector_bundle, tmp_path / "bundle")
    before = (folder / "a.png").read_bytes()
    refused = cli("run", tmp_path / "bundle", folder / "a.png", "--save", tmp_path / save if save not in {"", "."} else save)
    assert refused.exit_code == 15
    assert (folder / "a.png").read_bytes() == before


def test_bundle_after_an_image_is_refused(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path) -> None:
    refused = cli("run", pose_bundle, photo, detector_bundle)
    assert refused.exit_code == 4
    assert "bundles before images" in refused.stderr


def test_class_name_that_looks_like_markup_is_printed_as_it_is(cli: Callable[..., Result], detector_bundle: Path, photo: Path, tmp_path: Path) -> None:
    from modelcrate_bundle.manifest import read_manifest, write_manifest

    hostile = tmp_path / "hostile"
    shutil.copytree(detector_bundle, hostile)
    manifest = read_manifest((hostile / "manifest.json").read_bytes())
    manifest.class_names = ["[/b] person", "[red]x"]
    (hostile / "manifest.json").write_bytes(write_manifest(manifest))
    shown = cli("run", hostile, photo, "--det-thr", 0.05)
    assert shown.exit_code == 0
    assert "[/b]" in shown.stdout


def test_threshold_of_detections(cli: Callable[..., Result], detector_bundle: Path, photo: Path) -> None:
    counts = [len(rows_of(cli("run", detector_bundle, photo, "--det-thr", thr, "--json"))) for thr in (0, 0.12, 0.3, 1)]
    assert counts[0] > counts[1] > counts[2] == counts[3] == 0
    plain = cli("run", detector_bundle, photo)
    assert plain.exit_code == 0
    assert plain.stdout.replace("\n", " ").strip().endswith("nothing above the threshold")


def test_table_of_detections(cli: Callable[..., Result], detector_bundle: Path, photo: Path) -> None:
    result = cli("run", detector_bundle, photo, "--det-thr", 0.1)
    (first, *_) = rows_of(cli("run", detector_bundle, photo, "--det-thr", 0.1, "--json"))
    assert result.exit_code == 0
    assert result.stdout.replace("\n", "").startswith(str(photo))  # a long path is wrapped
    assert first["category"] in result.stdout
    assert ", ".join(f"{v:.2f}" for v in xyxy(first)) in result.stdout
    assert f"{first['score']:.3f}" in result.stdout


def test_table_of_one_pose_names_its_keypoints(cli: Callable[..., Result], pose_bundle: Path, photo: Path, box_text: str) -> None:
    result = cli("run", pose_bundle, photo, "--box", box_text)
    (row,) = rows_of(cli("run", pose_bundle, photo, "--box", box_text, "--json"))
    assert result.exit_code == 0
    for name in ("nose", "left_ankle", "right_wrist"):
        assert name in result.stdout
    nose = next(line for line in result.stdout.splitlines() if "nose" in line)
    for value in row["keypoints"][:2]:
        assert f"{value:.2f}" in nose


def test_geometry_can_be_chosen(cli: Callable[..., Result], pose_bundle: Path, photo: Path, box_text: str) -> None:
    usual, exact, sdk = (
        rows_of(cli("run", pose_bundle, photo, "--box", box_text, "--json", *more))[0] for more in ((), ("--geometry", "exact"), ("--geometry", "sdk"))
    )
    assert usual == exact
    assert sdk["keypoints"] != exact["keypoints"]


def test_zip_is_a_bundle_too(cli: Callable[..., Result], pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "pose"), "zip", pose_bundle)
    assert rows_of(cli("run", archive, photo, "--json")) == rows_of(cli("run", pose_bundle, photo, "--json"))


# ------------------------------------------------------------------------------------------------------------------------ save


def test_save_one_picture(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.png"
    result = cli("run", detector_bundle, pose_bundle, photo, "--det-thr", 0.1, "--det-label", 1, "--save", target)
    assert result.exit_code == 0, result.output
    assert f"wrote {target}" in result.stderr.replace("\n", "")
    drawn, original = cv2.imread(str(target)), cv2.imread(str(photo))
    assert drawn.shape == original.shape
    assert 0.001 < (drawn != original).any(axis=2).mean() < 0.9


def test_save_a_folder_of_pictures(cli: Callable[..., Result], pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("b.png", "a.png", "c.png"):
        shutil.copy(photo, folder / name)
    result = cli("run", pose_bundle, folder, "--save", tmp_path / "out", "--json")
    assert [row["file_name"] for row in rows_of(result)] == ["a.png", "b.png", "c.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]


def test_save_keeps_every_picture_of_several_images(cli: Callable[..., Result], pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    """Two images that differ in their suffix or their folder alone are still two pictures, or an error."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    shutil.copy(photo, tmp_path / "one" / "frame.png")
    cv2.imwrite(str(tmp_path / "two" / "frame.png"), cv2.imread(str(photo))[::-1])
    result = cli("run", pose_bundle, tmp_path / "one" / "frame.png", tmp_path / "two" / "frame.png", "--save", tmp_path / "out")
    assert result.exit_code != 0 or len(list((tmp_path / "out").iterdir())) == 2


def test_keypoint_threshold_is_of_the_picture(cli: Callable[..., Result], pose_bundle: Path, photo: Path, box_text: str, tmp_path: Path) -> None:
    for name, thr in (("all.png", 0), ("none.png", 1e9)):
        assert cli("run", pose_bundle, photo, "--box", box_text, "--kpt-thr", thr, "--save", tmp_path / name).exit_code == 0
    original = cv2.imread(str(photo))
    assert (cv2.imread(str(tmp_path / "all.png")) != original).any()
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "none.png")), original)


def test_save_that_cannot_be_written(cli: Callable[..., Result], pose_bundle: Path, photo: Path) -> None:
    result = cli("run", pose_bundle, photo, "--save", photo / "inside-a-file.png", "--json")
    refused(result, 15, "expected to write there", "--save")


# ---------------------------------------------------------------------------------------------------------------------- errors


def test_missing_bundle(cli: Callable[..., Result], photo: Path, tmp_path: Path) -> None:
    refused(cli("run", tmp_path / "no-bundle", photo), 11, "no-bundle", "found nothing there")


def test_file_that_is_no_bundle(cli: Callable[..., Result], photo: Path, tmp_path: Path) -> None:
    refused(cli("run", photo, photo), 4, "expected a bundle first")
    (tmp_path / "fake.zip").write_bytes(b"not a zip")
    refused(cli("run", tmp_path / "fake.zip", photo), 11, "fake.zip")


def test_folder_that_is_no_bundle(cli: Callable[..., Result], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(cli("run", tmp_path / "empty", photo), 11, "deploy.json")


def test_bundle_without_images(cli: Callable[..., Result], pose_bundle: Path, tmp_path: Path) -> None:
    refused(cli("run", pose_bundle), 10, "expected at least one image")
    (tmp_path / "empty").mkdir()
    refused(cli("run", pose_bundle, tmp_path / "empty"), 10, "found none in the folder")
    refused(cli("run", pose_bundle, tmp_path / "no.jpg"), 10, "no.jpg", "found nothing there")


def test_unreadable_image(cli: Callable[..., Result], pose_bundle: Path, tmp_path: Path) -> None:
    for name, content in (("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        refused(cli("run", pose_bundle, tmp_path / name), 10, name, "expected an image")


def test_two_bundles_of_one_task(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path) -> None:
    refused(cli("run", detector_bundle, detector_bundle, photo), 14, "found two bundles of Detector")
    refused(cli("run", pose_bundle, pose_bundle, photo), 14, "found two bundles of PoseDetector")


def test_three_bundles(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path) -> None:
    refused(cli("run", detector_bundle, pose_bundle, detector_bundle, photo), 4, "expected one or two bundles, found 3")


def test_box_with_a_detector(cli: Callable[..., Result], detector_bundle: Path, pose_bundle: Path, photo: Path) -> None:
    refused(cli("run", detector_bundle, photo, "--box", "1,2,30,40"), 4, "--box")
    refused(cli("run", detector_bundle, pose_bundle, photo, "--box", "1,2,30,40"), 4, "--box")


@pytest.mark.parametrize(
    ("box", "word"), [("1,2,3", "four numbers"), ("a,b,c,d", "left,top,right,bottom"), ("", "--box"), ("30,2,3,40", "left <= right"), ("nan,1,2,3", "finite")]
)
def test_box_that_is_none(cli: Callable[..., Result], pose_bundle: Path, photo: Path, box: str, word: str) -> None:
    refused(cli("run", pose_bundle, photo, "--box", box), 10, word)


def test_unknown_device(cli: Callable[..., Result], pose_bundle: Path, photo: Path) -> None:
    refused(cli("run", pose_bundle, photo, "--device", "tpu"), 4, "expected one of cpu, cuda, found 'tpu'")


def test_changed_bundle_does_not_run(cli: Callable[..., Result], pose_bundle: Path, photo: Path, tmp_path: Path) -> None:
    refused(cli("run", changed(pose_bundle, tmp_path), photo), 12, "end2end.onnx", "changed after the build")


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "--no-such-option"], ["no-such-command"], ["run", "a", "b", "--threads", "0"], ["run", "a", "b", "--geometry", "udp"]]
)
def test_usage_errors_exit_with_two(cli: Callable[..., Result], arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_traceback_on_request(cli: Callable[..., Result], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCRATE_TRACEBACK", "1")
    result = cli("run", tmp_path / "no-bundle", photo)
    assert type(result.exception).__name__ == "BundleError"


# ------------------------------------------------------------------------------------------------------------ inspect, backends


def changed(bundle: Path, tmp_path: Path) -> Path:
    """A copy with one bit of the network flipped."""
    place = tmp_path / "changed"
    shutil.copytree(bundle, place)
    data = bytearray((place / "end2end.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "end2end.onnx").write_bytes(data)
    return place


def test_inspect_shows_what_a_bundle_is(cli: Callable[..., Result], pose_bundle: Path) -> None:
    result = cli("inspect", pose_bundle)
    assert result.exit_code == 0, result.output
    for word in (
        "PoseDetector",
        "onnxruntime",
        "mmpose.SimCCLabelDecode",
        "fp32",
        "exact",
        "input float32 batch x 3 x 256 x 192",
        "simcc_y",
        "passed",
        "end2end.onnx",
        "unchanged",
    ):
        assert word in result.stdout


def test_inspect_as_json(cli: Callable[..., Result], detector_bundle: Path) -> None:
    result = cli("inspect", detector_bundle, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts) == {"root", "deploy", "manifest"}
    assert facts["root"] == str(detector_bundle)
    assert facts["deploy"]["models"][0]["backend"] == "onnxruntime"
    assert facts["manifest"] == json.loads((detector_bundle / "manifest.json").read_text())


def test_inspect_finds_a_changed_byte(cli: Callable[..., Result], pose_bundle: Path, tmp_path: Path) -> None:
    for more in ((), ("--json",)):
        refused(cli("inspect", changed(pose_bundle, tmp_path), *more), 12, "end2end.onnx", "changed after the build")
        shutil.rmtree(tmp_path / "changed")


def test_inspect_of_a_bundle_without_manifest(cli: Callable[..., Result], pose_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(pose_bundle, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    result = cli("inspect", tmp_path / "foreign")
    assert result.exit_code == 0
    assert "none: written by MMDeploy" in result.stdout
    assert json.loads(cli("inspect", tmp_path / "foreign", "--json").stdout)["manifest"] is None


def test_inspect_of_nothing(cli: Callable[..., Result], tmp_path: Path) -> None:
    refused(cli("inspect", tmp_path / "no"), 11, "found nothing there")


def test_backends(cli: Callable[..., Result]) -> None:
    import onnxruntime

    rows = rows_of(cli("backends", "--json"))
    assert all(set(row) == {"backend", "version", "can_build", "can_run", "details", "install"} for row in rows)
    row = next(row for row in rows if row["backend"] == "onnxruntime")
    assert (row["version"], row["can_run"], row["can_build"], row["install"]) == (onnxruntime.__version__, True, True, "")
    assert "CPUExecutionProvider" in row["details"]
    table = cli("backends")
    assert table.exit_code == 0
    for word in ("onnxruntime", onnxruntime.__version__, "CPUExecutionProvider"):
        assert word in table.stdout


# ------------------------------------------------------------------------------------------------------------- a real process


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The console script's function in a process of its own."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("sdk_bundle", "runtimes", "converter"))
    command = [sys.executable, "-c", "from modelcrate_converter.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths, "NO_COLOR": "1"}, capture_output=True, text=True, timeout=120, check=False)


def test_a_real_process_prints_json_alone_on_stdout(pose_bundle: Path, photo: Path, box_text: str, cli: Callable[..., Result]) -> None:
    result = shell("run", pose_bundle, photo, "--box", box_text, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout) == rows_of(cli("run", pose_bundle, photo, "--box", box_text, "--json"))


def test_a_real_process_exits_with_the_errors_code(tmp_path: Path, photo: Path) -> None:
    result = shell("run", tmp_path / "no-bundle", photo)
    assert result.returncode == 11
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
