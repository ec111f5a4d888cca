"""`modelcrate track` as a user of MMDeploy's `pose_tracker` meets it, and the options that `modelcrate run` has from its other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import tracker_bundles
from command_line import refused
from modelcrate_converter.cli import app
from modelcrate_runtime import PoseTracker, TrackedPoses
from modelcrate_runtime.video import open_source
from tracker_bundles import blank

ROOT = Path(__file__).parents[2]
WH = (160, 120)
FRAMES = 40
PERSON = (40, 30, 90, 100, 0.9, 0)
OTHER = (100, 20, 150, 80, 0.9, 1)
Result = Any
Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tracker_bundles.write_detector(folder / "det"), tracker_bundles.write_estimator(folder / "pose")


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return tracker_bundles.sequence(11, frames=FRAMES)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)

    def run(*arguments: object, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture
def track(cli: Cli, tiny: tuple[Path, Path], frames: list[np.ndarray], tmp_path: Path) -> Callable[..., list[list[dict[str, Any]]]]:
    """Track the frames; each one's annotations."""

    def run(*options: object, of: list[np.ndarray] = frames) -> list[list[dict[str, Any]]]:
        out = tmp_path / "tracks.jsonl"
        arguments = ("track", "-", "--det", tiny[0], "--pose", tiny[1], "--input-size", "160x120", "--threads", 1, "--save-json", out, *options)
        result = cli(*arguments, stdin=b"".join(frame.tobytes() for frame in of))
        assert result.exit_code == 0, result.output
        return [json.loads(line)["annotations"] for line in out.read_text().splitlines()]

    return run


def expected(tiny: tuple[Path, Path], frames: list[np.ndarray], mode: Any = "fixed", **params: Any) -> list[TrackedPoses]:
    with PoseTracker(*tiny, mode=mode, threads=1) as tracker:
        state = tracker.create_state(**{"pose_min_bbox_size": -1.0} | params)
        return [tracker.track(state, frame) for frame in frames]


def assert_same(found: list[list[dict[str, Any]]], wanted: list[TrackedPoses]) -> None:
    assert [[row["track_id"] for row in rows] for rows in found] == [tracked.track_ids.tolist() for tracked in wanted]
    for rows, tracked in zip(found, wanted, strict=True):
        for row, points, scores in zip(rows, tracked.keypoints_xy, tracked.scores, strict=True):
            np.testing.assert_allclose(np.reshape(row["keypoints"], (-1, 3)), np.column_stack([points, scores]), atol=1.1e-3)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames_of(path: Path) -> list[np.ndarray]:
    source = open_source(str(path))
    images = list(source)
    source.close()
    return images


# --------------------------------------------------------------------------------------------------------------------- options


def test_defaults(track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    found = track()
    assert len(found) == FRAMES
    assert sum(map(len, found)) > FRAMES / 3
    assert_same(found, expected(tiny, frames))


@pytest.mark.parametrize("spelling", ["snake", "kebab"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("det_interval", 5), ("det_label", 1), ("det_thr", 0.8), ("det_min_bbox_size", 55), ("det_nms_thr", 0.1), ("pose_max_num_bboxes", 1),
        ("pose_kpt_thr", 0.9), ("pose_min_keypoints", 16), ("pose_bbox_scale", 1.6), ("pose_min_bbox_size", 60), ("pose_nms_thr", 0.05),
        ("track_iou_thr", 0.95), ("track_max_missing", 0),
    ],
)  # fmt: skip
def test_option_of_pose_tracker_reaches_the_tracker(
    name: str, value: float, spelling: str, track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]
) -> None:
    found = track(f"--{name if spelling == 'snake' else name.replace('_', '-')}", value)
    wanted = expected(tiny, frames, **{name: value})
    assert_same(found, wanted)
    default = expected(tiny, frames)
    assert any(
        one.track_ids.tolist() != other.track_ids.tolist() or not np.array_equal(one.keypoints_xy, other.keypoints_xy)
        for one, other in zip(wanted, default, strict=True)
    )


def test_negative_values_may_be_given(track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    found = track("--det_min_bbox_size", -1, "--pose_max_num_bboxes", -1, "--pose_min_keypoints", -1, "--pose_min_bbox_size", -1, "--show", -1)
    assert_same(found, expected(tiny, frames))


def test_mode_sdk(track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    assert_same(track("--mode", "sdk"), expected(tiny, frames, mode="sdk"))


@pytest.mark.parametrize("option", ["--frame_rate", "--frame-rate"])
def test_frame_rate_reaches_the_tracker(option: str, track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    assert_same(track(option, 5), expected(tiny, frames, frame_rate=5.0))


def test_flip(track: Callable[..., Any], tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    mirrored = [frame[:, ::-1].copy() for frame in frames]
    assert_same(track("--flip", 1, of=mirrored), expected(tiny, frames))


@pytest.mark.parametrize("option", ["--save-json", "--save_json"])
@pytest.mark.parametrize("size", ["--input-size", "--input_size"])
def test_json_in_both_spellings(option: str, size: str, cli: Cli, tiny: tuple[Path, Path], frames: list[np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "new" / "tracks.jsonl"
    result = cli("track", "-", "--det", tiny[0], "--pose", tiny[1], size, "160x120", option, out, stdin=frames[0].tobytes())
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 1
    assert f"wrote {out}" in result.stderr


# --------------------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def folder(frames: list[np.ndarray], tmp_path: Path) -> Path:
    place = tmp_path / "frames"
    place.mkdir()
    for i, frame in enumerate(frames[:6]):
        cv2.imwrite(str(place / f"{i:06d}.png"), frame)
    return place


def test_summary_as_json(cli: Cli, tiny: tuple[Path, Path], folder: Path) -> None:
    result = cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert (done["frames"], done["total"]) == (6, 6)
    assert done["ids"] > 0
    assert set(done["stages"]) >= {"decode", "detect", "pose", "track"}
    assert done["per_second"] > 0


def test_summary_as_text(cli: Cli, tiny: tuple[Path, Path], folder: Path) -> None:
    result = cli("track", folder, "--det", tiny[0], "--pose", tiny[1])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("6 frames, ")
    for stage in ("decode", "detect", "pose", "track", "all, overlapped"):
        assert stage in result.stdout


def test_video_in_video_out(cli: Cli, tiny: tuple[Path, Path], frames: list[np.ndarray], tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, WH)
    for frame in frames:
        writer.write(frame)
    writer.release()
    result = cli("track", tmp_path / "in.avi", "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.output
    out = open_source(str(tmp_path / "out.mp4"))
    out.close()
    assert (out.frame_rate, out.count) == (12.5, FRAMES)
    assert names_in(tmp_path) == ["in.avi", "out.mp4"]


@pytest.mark.parametrize("option", ["--output_size", "--output-size"])
@pytest.mark.parametrize(("size", "shape"), [(0, (120, 160)), (80, (60, 80)), (320, (240, 320))])
def test_output_size(option: str, size: int, shape: tuple[int, int], cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    result = cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out_%d.png", option, size)
    assert result.exit_code == 0, result.output
    assert {cv2.imread(str(tmp_path / f"out_{i}.png")).shape[:2] for i in range(6)} == {shape}


def test_output_size_of_a_very_flat_frame(cli: Cli, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "flat.png"), np.full((2, 400, 3), 9, dtype=np.uint8))
    result = cli("track", tmp_path / "flat.png", "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out_%d.png", "--output-size", 40)
    assert result.exit_code == 0, (result.output, result.exception)
    assert cv2.imread(str(tmp_path / "out_0.png")).shape == (1, 40, 3)


def test_black_background(cli: Cli, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    for i, people in enumerate(([PERSON], [])):
        cv2.imwrite(str(tmp_path / f"in_{i}.png"), blank(WH, people, level=200 if people else 0))
    arguments = ("track", tmp_path / "in_*.png", "--det", tiny[0], "--pose", tiny[1])
    for name, *options in (("black", "--background", "black"), ("default", "--no-boxes"), ("plain", "--background", "black", "--no-boxes")):
        result = cli(*arguments, "-o", tmp_path / f"{name}_%d.png", *options)
        assert result.exit_code == 0, result.output
    black, nobody, plain = (cv2.imread(str(tmp_path / name)) for name in ("black_0.png", "black_1.png", "plain_0.png"))
    assert not nobody.any()
    assert black.any()
    assert 0 < np.count_nonzero(plain.any(axis=2)) < np.count_nonzero(black.any(axis=2))
    default = cv2.imread(str(tmp_path / "default_0.png"))
    outside = cv2.dilate(plain.max(axis=2), np.ones((5, 5), dtype=np.uint8)) == 0
    assert outside.mean() > 0.5
    assert (default[1:][outside[1:]] == 200).all()  # what was detected is written into the first row


SKELETON = "1\n0 1\n1\n10 20 250\n1\n0\n17\n" + "0 " * 17


def test_skeletons(cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "skeleton.txt").write_text(SKELETON)
    drawn = {}
    for name in ("coco", tmp_path / "skeleton.txt", None):
        options = ("--skeleton", name) if name else ()
        result = cli(
            "track", folder, "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out_%d.png", "--background", "black", "--no-boxes", *options,
            "--pose_kpt_thr", 0.1, "--pose_min_keypoints", 1,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        drawn[str(name)] = np.concatenate([cv2.imread(str(tmp_path / f"out_{i}.png")) for i in range(6)])
    coco, own, default = drawn.values()
    assert (own == (10, 20, 250)).all(axis=2).any()
    assert not (coco == (10, 20, 250)).all(axis=2).any()
    assert np.count_nonzero(coco.any(axis=2)) > np.count_nonzero(default.any(axis=2))  # the bundle has no links


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "too few numbers"), ("1 0", "too few numbers"), (SKELETON[:-4], "too few numbers"), ("text", "invalid literal"), ("\0\1", "invalid literal"),
        (SKELETON.replace("0 1", "0 17"), "17"), (SKELETON.replace("0 1", "0 -1"), "-1"), (SKELETON[:-2] + "5", "5"), (SKELETON[:-2] + "-1", "-1"),
    ],
)  # fmt: skip
def test_wrong_skeleton_file(content: str, found: str, cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "skeleton.txt"
    path.write_text(content)
    refused(cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "--skeleton", path), 4, f"{path}: expected a skeleton file of MMDeploy, found: ", found)


def test_wrong_skeletons(cli: Cli, tiny: tuple[Path, Path], folder: Path) -> None:
    arguments = ("track", folder, "--det", tiny[0], "--pose", tiny[1], "--skeleton")
    refused(cli(*arguments, "cocoa"), 4, "coco, ", "found 'cocoa'")
    refused(cli(*arguments, "coco-wholebody"), 4, "expected 17 keypoints", "found 133")
    refused(cli(*arguments, "coco_wholebody_hand"), 4, "found 21")


# -------------------------------------------------------------------------------------------------------------------- refusals


def test_window_without_windows(cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    refused(cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "--show", 0, "-o", tmp_path / "out.mp4"), 4, "--show: expected an OpenCV with windows")
    assert names_in(tmp_path) == ["frames"]


def test_missing_input(cli: Cli, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    refused(cli("track", tmp_path / "none.mp4", "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out.mp4"), 10, "none.mp4", "found nothing there")
    (tmp_path / "text.mp4").write_text("text")
    refused(cli("track", tmp_path / "text.mp4", "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / "out.mp4"), 10, "text.mp4")
    assert names_in(tmp_path) == ["text.mp4"]


def test_wrong_bundles(cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    det, pose = tiny
    for pair in ((pose, det), (det, det), (pose, pose)):
        refused(cli("track", folder, "--det", pair[0], "--pose", pair[1], "-o", tmp_path / "out" / "out.mp4"), 14)
    refused(cli("track", folder, "--det", tmp_path / "none", "--pose", pose), 11, "none")
    assert names_in(tmp_path) == ["frames"]


@pytest.mark.parametrize("size", [None, "160", "160x", "x120", "0x120", "160x120x3", "-1x5", "1.5x3"])
def test_raw_frames_need_a_size(size: str | None, cli: Cli, tiny: tuple[Path, Path]) -> None:
    options = () if size is None else ("--input-size", size)
    refused(cli("track", "-", "--det", tiny[0], "--pose", tiny[1], *options, stdin=b"\0" * 57600), 4, "size")


def test_no_raw_frames(cli: Cli, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("track", "-", "--det", tiny[0], "--pose", tiny[1], "--input-size", "160x120", "-o", tmp_path / "out.mp4")
    refused(cli(*arguments, stdin=b"\0" * 5), 10, "standard input: expected frames of 57600 bytes", "found 5")
    assert names_in(tmp_path) == []


def test_raw_frames_that_are_cut_off(cli: Cli, tiny: tuple[Path, Path], frames: list[np.ndarray]) -> None:
    content = frames[0].tobytes() * 2 + b"\0" * 7
    result = cli("track", "-", "--det", tiny[0], "--pose", tiny[1], "--input-size", "160x120", "--json", stdin=content)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == 2
    assert "the last frame has 7 of 57600 bytes" in result.stderr


@pytest.mark.parametrize(("name", "word"), [("out.gif", "'.gif'"), ("%d_%d.png", "one number"), ("frames/000000.png/out.mp4", "expected to write there")])
def test_wrong_outputs(name: str, word: str, cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    refused(cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / name), 15, word)
    assert names_in(tmp_path) == ["frames"]


def test_broken_picture_is_said(cli: Cli, tiny: tuple[Path, Path], folder: Path) -> None:
    (folder / "000002.png").write_bytes(b"none")
    result = cli("track", folder, "--det", tiny[0], "--pose", tiny[1], "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["frames"] == 5
    assert "000002.png" in result.stderr


@pytest.mark.parametrize("option", ["-o", "--save-json"])
def test_video_is_not_overwritten_by_its_results(option: str, cli: Cli, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    video = tmp_path / "in.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, WH)
    for _ in range(3):
        writer.write(blank(WH, [PERSON], level=200))
    writer.release()
    before = video.read_bytes()
    refused(cli("track", video, "--det", tiny[0], "--pose", tiny[1], option, tmp_path / "." / "in.avi"), 15, "in.avi", "expected another place")
    assert video.read_bytes() == before
    assert names_in(tmp_path) == ["in.avi"]


@pytest.mark.parametrize(("source", "output"), [("frames", "frames"), ("frames", "frames/%06d.png"), ("frames/*.png", "frames/%06d.png")])
def test_pictures_are_not_overwritten_by_their_results(source: str, output: str, cli: Cli, tiny: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(cli("track", tmp_path / source, "--det", tiny[0], "--pose", tiny[1], "-o", tmp_path / output), 15, "expected another place")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_stream_that_stalls_ends_the_program(tiny: tuple[Path, Path], frames: list[np.ndarray], tmp_path: Path) -> None:
    """With its own exit code, though a thread still waits for the pipe."""
    code = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from modelcrate_converter.cli import app; app()"
    paths = ":".join(str(ROOT / name) for name in ("sdk_bundle", "runtimes", "converter"))
    arguments = ["track", "-", "--det", tiny[0], "--pose", tiny[1], "--input-size", "160x120", "--stall", "0.5", "-o", tmp_path / "out.avi"]
    command = [sys.executable, "-c", code, paths, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(frames[0].tobytes())
        process.stdin.flush()
        said = process.stderr.read().decode()
        assert process.wait(30) == 10, said
    assert "the stream stalls" in said
    assert "Fatal" not in said
    assert len(frames_of(tmp_path / "out.avi")) == 1


# ------------------------------------------------------------------------------------------------------------------------- run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A large person, a small one, and something else."""
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), blank(WH, [PERSON, (5, 60, 15, 80, 0.6, 0), OTHER], level=200))
    return path


def boxes_of(result: Result) -> list[list[float]]:
    assert result.exit_code == 0, result.output
    return [row["bbox"] for row in json.loads(result.stdout)]


LARGE, SMALL, ELSE = [40, 30, 50, 70], [5, 60, 10, 20], [100, 20, 50, 60]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), [LARGE, SMALL, ELSE]), (("--det_thr", 0.7), [LARGE, ELSE]), (("--det-thr", 0.7), [LARGE, ELSE]),
        (("--det_min_bbox_size", 20), [LARGE, ELSE]), (("--det-min-bbox-size", 57), [LARGE]), (("--det_min_bbox_size", -1), [LARGE, SMALL, ELSE]),
        (("--det_min_bbox_size", 0), [LARGE, SMALL, ELSE]),
    ],
)  # fmt: skip
def test_run_of_a_detector(options: tuple[object, ...], wanted: list[list[float]], cli: Cli, tiny: tuple[Path, Path], photo: Path) -> None:
    found = boxes_of(cli("run", tiny[0], photo, "--json", "--det-thr", 0.2, *options))
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("option", ["--det_label", "--det-label"])
def test_run_of_both(option: str, cli: Cli, tiny: tuple[Path, Path], photo: Path) -> None:
    assert sorted(boxes_of(cli("run", *tiny, photo, "--json"))) == sorted([LARGE, SMALL])
    assert boxes_of(cli("run", *tiny, photo, "--json", option, 1)) == [ELSE]
    assert boxes_of(cli("run", *tiny, photo, "--json", "--det_min_bbox_size", 20)) == [LARGE]


def test_run_draws(cli: Cli, tiny: tuple[Path, Path], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "skeleton.txt").write_text(SKELETON)
    drawn = []
    for options in ((), ("--pose_thr", 2), ("--pose-thr", 2), ("--kpt-thr", 2), ("--skeleton", "coco"), ("--skeleton", tmp_path / "skeleton.txt")):
        result = cli("run", *tiny, photo, "--output", tmp_path / "out.png", *options)
        assert result.exit_code == 0, result.output
        drawn.append(cv2.imread(str(tmp_path / "out.png")))
    default, *without, coco, own = drawn
    for other in without:
        np.testing.assert_array_equal(other, without[0])
    for one, other in ((default, without[0]), (default, coco), (coco, own)):
        assert (one != other).any()
    assert (own == (10, 20, 250)).all(axis=2).any()


def test_run_with_a_wrong_skeleton(cli: Cli, tiny: tuple[Path, Path], photo: Path) -> None:
    refused(cli("run", *tiny, photo, "--skeleton", "hand"), 4, "expected 17 keypoints", "found 21")
    refused(cli("run", tiny[0], photo, "--skeleton", "coco"), 4, "expected 0 keypoints")
    refused(cli("run", *tiny, photo, "--skeleton", "nobody"), 4, "found 'nobody'")


def test_help_names_both_spellings(cli: Cli) -> None:
    result = cli("track", "--help")
    assert result.exit_code == 0
    for name in ("--det-interval", "--det_interval", "--save_json", "--background"):
        assert name in result.stdout
