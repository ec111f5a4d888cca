"""Moving pictures: sources and sinks with all that can be wrong with files, and the pipeline between them with all that can go wrong on the way."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import tracker_bundles
from modelcrate_bundle.errors import ConfigError, InputError, OutputError
from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_runtime import PoseTracker, TrackedPoses
from modelcrate_runtime.draw import draw_tracks
from modelcrate_runtime.video import JsonLines, Progress, fitted, open_sink, open_source, track_video
from tracker_bundles import blank

WH = (160, 120)
PERSON = (40, 30, 90, 100, 0.9, 0)
KEYPOINTS = KeypointInfo(names=[f"point {k}" for k in range(tracker_bundles.K)])


class Frames:
    """A source of frames that are already there; what `after` does comes after the last of them."""

    frame_rate = 10.0

    def __init__(self, frames: Iterable[np.ndarray], *, after: Callable[[], None] | None = None, is_live: bool = False, count: int | None = None) -> None:
        self.name, self.is_live, self.count = "frames", is_live, count
        self.problems: list[str] = []
        self.given = 0
        self.is_reading = self.was_closed = self.was_closed_while_reading = False
        self._frames, self._after = frames, after

    def __iter__(self) -> Iterator[np.ndarray]:
        self.is_reading = True
        try:
            for frame in self._frames:
                self.given += 1
                yield frame
            if self._after is not None:
                self._after()
        finally:
            self.is_reading = False

    def close(self) -> None:
        self.was_closed, self.was_closed_while_reading = True, self.is_reading


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self, seen: Callable[[int], None] | None = None) -> None:
        self.images: list[np.ndarray] = []
        self.is_closed = False
        self._seen = seen

    def write(self, image: np.ndarray) -> None:
        self.images.append(image)
        if self._seen is not None:
            self._seen(len(self.images))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoseTracker]:
    folder = tmp_path_factory.mktemp("tiny")
    with PoseTracker(tracker_bundles.write_detector(folder / "det"), tracker_bundles.write_estimator(folder / "pose", spread=0.64), threads=1) as tracker:
        yield tracker


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert lanes() == []


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in {"decode", "encode"}]


def draw(image: np.ndarray, tracked: TrackedPoses) -> np.ndarray:
    return draw_tracks(image, tracked, keypoints=KEYPOINTS)


def fail(error: BaseException) -> Any:
    raise error


def scenes(count: int, wh: tuple[int, int] = WH) -> list[np.ndarray]:
    """Smooth pictures, each a little brighter than the one before: what a codec keeps well."""
    slope = np.linspace(0, 60, wh[0], dtype=np.float32)[None, :, None].repeat(wh[1], axis=0).repeat(3, axis=2)
    return [(slope + 5 + 4 * i).clip(0, 255).astype(np.uint8) for i in range(count)]


def noise(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), WH) for _ in range(count)]


def people(count: int) -> list[np.ndarray]:
    return [blank(WH, [(40 + i, 30, 90 + i, 100, 0.9, 0)], level=200) for i in range(count)]


def written(path: Path, frames: Iterable[np.ndarray], *, rate: float = 10.0) -> Path:
    sink = open_sink(path, frame_rate=rate)
    for frame in frames:
        sink.write(frame)
    sink.close()
    return path


def frames_of(path: Path | str, **options: Any) -> list[np.ndarray]:
    source = open_source(str(path), **options)
    try:
        return list(source)
    finally:
        source.close()


def level(image: np.ndarray) -> float:
    return float(image.mean())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov", ".m4v", ".webm", ".MP4"])
@pytest.mark.parametrize("rate", [12.5, 29.97])
def test_video_file_has_its_rate_count_and_frames(suffix: str, rate: float, tmp_path: Path) -> None:
    path = written(tmp_path / f"video{suffix}", scenes(12), rate=rate)
    source = open_source(str(path))
    assert source.frame_rate == pytest.approx(rate, rel=1e-3)
    assert (source.count, source.is_live, source.name) == (12, False, str(path))
    images = list(source)
    source.close()
    assert {(image.shape, image.dtype) for image in images} == {((WH[1], WH[0], 3), np.dtype(np.uint8))}
    np.testing.assert_allclose([level(image) for image in images], [level(image) for image in scenes(12)], atol=6)
    assert source.problems == []
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("rate", [0.5, 1000])
def test_unusual_rates_are_kept(rate: float, tmp_path: Path) -> None:
    source = open_source(str(written(tmp_path / "video.avi", scenes(4), rate=rate)))
    source.close()
    assert source.frame_rate == pytest.approx(rate, rel=1e-3)


def test_callers_rate_goes_before_the_videos_own(tmp_path: Path) -> None:
    source = open_source(str(written(tmp_path / "video.mp4", scenes(3), rate=25)), frame_rate=7)
    source.close()
    assert source.frame_rate == 7


def pictures(folder: Path, count: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(scenes(count)):
        cv2.imwrite(str(folder / f"frame_{i}.png"), image)
    return folder


@pytest.mark.parametrize("form", ["folder", "pattern"])
def test_pictures_come_by_name(form: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "frames")
    (folder / "frame_0.txt").write_text("no picture")
    source = open_source(str(folder if form == "folder" else folder / "frame_*"), frame_rate=5)
    assert (source.count, source.frame_rate, source.is_live) == (4, 5, False)
    for image, expected in zip(source, scenes(4), strict=True):
        np.testing.assert_array_equal(image, expected)
    assert source.problems == []


def test_pictures_without_a_rate_have_the_default(tmp_path: Path) -> None:
    assert open_source(str(pictures(tmp_path / "frames"))).frame_rate == 30


def test_pattern_in_a_folder_whose_name_looks_like_one(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "take[1]")
    assert len(frames_of(folder)) == 4
    assert len(frames_of(folder / "frame_1.png")) == 1


def test_one_picture(tmp_path: Path) -> None:
    (image,) = frames_of(pictures(tmp_path / "frames") / "frame_2.png")
    np.testing.assert_array_equal(image, scenes(4)[2])


def test_grey_pictures_are_colour_frames(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), scenes(1)[0][:, :, 0])
    (image,) = frames_of(tmp_path / "grey.png")
    np.testing.assert_array_equal(image, scenes(1)[0])


def test_pictures_of_changing_size_stay_as_they_are(tmp_path: Path) -> None:
    for name, wh in (("a", (64, 48)), ("b", (32, 80)), ("c", (64, 48))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), scenes(1, wh)[0])
    assert [image.shape[:2] for image in frames_of(tmp_path)] == [(48, 64), (80, 32), (48, 64)]


@pytest.mark.parametrize("content", [b"", b"not a picture", "half"])
def test_broken_picture_is_skipped_and_said(content: bytes | str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "frames")
    broken = folder / "frame_1.png"
    broken.write_bytes(broken.read_bytes()[:20] if content == "half" else content)  # type: ignore[arg-type]
    source = open_source(str(folder))
    assert [round(level(image)) for image in source] == [round(level(scenes(4)[i])) for i in (0, 2, 3)]
    (problem,) = source.problems
    assert "skipped" in problem
    assert "frame_1.png" in problem


def test_nothing_but_broken_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"found none that can be read.*a\.png"):
        frames_of(tmp_path)


@pytest.mark.parametrize("name", ["missing.mp4", "missing.png", "missing", "missing/", "missing*.png", "missing_[0-9].mp4", "123", ""])
def test_missing_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match="expected"):
        open_source(name)


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="found none in the folder"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["text.mp4", "clip_001.mp4", "text.avi", "text", "text.jsonl"])
@pytest.mark.parametrize("content", ["", "this is a text and no video\n" * 40], ids=["empty", "text"])
def test_text_is_no_video(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"expected a video that OpenCV can read, found none") as caught:
        open_source(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_truncated_mp4_is_refused(share: float, tmp_path: Path) -> None:
    path = written(tmp_path / "video.mp4", noise(40))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=r"video\.mp4: expected a video that OpenCV can read"):
        open_source(str(path))


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_truncated_video_gives_what_is_there_and_says_so(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"video{suffix}", noise(40))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    source = open_source(str(path))
    given = list(source)
    source.close()
    assert 20 <= len(given) <= 26
    for image, expected in zip(given[:20], noise(20), strict=True):
        assert np.abs(image.astype(float) - expected).mean() < 20
    assert len(source.problems) == 1
    assert f"expected 40 frames, found {len(given)}: it is cut off" in source.problems[0]


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
@pytest.mark.parametrize("length", [200, 12000])
def test_corrupt_bytes_in_the_middle_do_not_end_a_video(suffix: str, length: int, tmp_path: Path) -> None:
    path = written(tmp_path / f"video{suffix}", noise(40))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + length] = b"\xff" * length
    path.write_bytes(content)
    source = open_source(str(path))
    given = list(source)
    source.close()
    assert 32 <= len(given) <= 40
    if length == 12000:
        assert source.problems
    # The last frame of all is the last one given: nothing after the damage is lost. mp4v needs the frames before it, MJPG does not.
    if suffix == ".avi":
        assert np.abs(given[-1].astype(float) - noise(40)[-1]).mean() < 15


@pytest.mark.parametrize("rest", [0, 1, 3 * 160 * 120 - 1])
def test_raw_frames(rest: int) -> None:
    frames = noise(3)
    content = b"".join(frame.tobytes() for frame in frames) + b"\x01" * rest
    source = open_source("-", size_wh=WH, frame_rate=12, stream=io.BytesIO(content))
    assert (source.is_live, source.count, source.frame_rate) == (True, None, 12)
    given = list(source)
    for image, expected in zip(given, frames, strict=True):
        np.testing.assert_array_equal(image, expected)
        assert image.flags.writeable
    assert len(source.problems) == (rest > 0)
    if rest:
        assert f"{rest} of {3 * 160 * 120} bytes" in source.problems[0]


def test_raw_frames_come_in_pieces() -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as stream:
            for frame in noise(3):
                content = frame.tobytes()
                for start in range(0, len(content), 7001):
                    stream.write(content[start : start + 7001])

    thread = threading.Thread(target=write)
    thread.start()
    with open(reading, "rb", buffering=0) as stream:
        given = list(open_source("-", size_wh=WH, stream=stream))
    thread.join()
    for image, expected in zip(given, noise(3), strict=True):
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_no_whole_raw_frame_is_an_error(content: bytes) -> None:
    with pytest.raises(InputError, match=rf"expected frames of 57600 bytes \(160x120\), found {len(content)}"):
        frames_of("-", size_wh=WH, stream=io.BytesIO(content))


def test_raw_frames_need_a_size() -> None:
    with pytest.raises(ConfigError, match="expected the size of the raw frames"):
        open_source("-", stream=io.BytesIO(b""))


# ----------------------------------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize("suffix", [".mpg", ".mpeg", ".wmv"])
def test_containers_that_change_the_rate_are_refused(suffix: str, tmp_path: Path) -> None:
    """Written with OpenCV, 12.5 frames per second come back as 25, and the count is another."""
    with pytest.raises(OutputError, match="expected a video"):
        written(tmp_path / f"out{suffix}", scenes(8), rate=12.5)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("count", [1, 2, 30])
def test_video_appears_when_it_is_whole(count: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.mp4"
    sink = open_sink(path, frame_rate=10)
    for frame in scenes(count):
        sink.write(frame)
        assert not path.exists()
    sink.close()
    sink.close()
    assert names_in(path.parent) == ["out.mp4"]
    assert len(frames_of(path)) == count


def test_video_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "out.avi"
    path.write_text("older")
    assert len(frames_of(written(path, scenes(3)))) == 3


def test_no_frame_no_file(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("older")
    open_sink(tmp_path / "out.mp4", frame_rate=10).close()
    assert (tmp_path / "out.mp4").read_text() == "older"
    assert names_in(tmp_path) == ["out.mp4"]


def test_frames_of_another_size_are_fitted(tmp_path: Path) -> None:
    white = [np.full((h, w, 3), 255, dtype=np.uint8) for w, h in ((160, 120), (80, 60), (320, 120), (60, 120), (1, 1))]
    images = frames_of(written(tmp_path / "out.avi", white))
    assert {image.shape for image in images} == {(120, 160, 3)}
    np.testing.assert_allclose([level(image) / 255 for image in images], [1, 1, 0.5, 0.375, 0.75], atol=0.02)  # 1x1 becomes 120x120


def test_fitted_keeps_ratio_and_middle() -> None:
    image = np.full((10, 40, 3), 200, dtype=np.uint8)
    result = fitted(image, (20, 20))
    assert result.shape == (20, 20, 3)
    rows = np.flatnonzero(result.any(axis=(1, 2)))
    assert (rows[0], rows[-1]) == (7, 11)
    assert fitted(image, (40, 10)) is image


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out.png", ["out_000000.png", "out_000001.png"]), ("out_%03d.png", ["out_000.png", "out_001.png"]), ("%d.jpg", ["0.jpg", "1.jpg"]),
        ("folder", ["000000.jpg", "000001.jpg"]),
    ],
)  # fmt: skip
def test_pictures_are_numbered(name: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    written(path, [*scenes(1), *scenes(1, (40, 30))])
    folder = path if name == "folder" else path.parent
    assert names_in(folder) == expected
    assert [cv2.imread(str(folder / name)).shape[:2] for name in expected] == [(120, 160), (30, 40)]


def test_percent_in_a_folders_name(tmp_path: Path) -> None:
    written(tmp_path / "50% of it", scenes(1))
    assert names_in(tmp_path / "50% of it") == ["000000.jpg"]


def test_percent_in_the_folder_of_a_pattern(tmp_path: Path) -> None:
    written(tmp_path / "50% done" / "a_%02d.png", scenes(1))
    assert names_in(tmp_path / "50% done") == ["a_00.png"]


def test_percent_in_the_folder_of_one_name(tmp_path: Path) -> None:
    written(tmp_path / "50% done" / "a.png", scenes(1))
    assert names_in(tmp_path / "50% done") == ["a_000000.png"]


@pytest.mark.parametrize("name", ["%d_%d.png", "%s%s.jpg", "50%.png", "%q.png"])
def test_wrong_pattern_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected one number in the name"):
        open_sink(tmp_path / name, frame_rate=10)


@pytest.mark.parametrize("name", ["out.gif", "out.txt", "out.mp5", "results.v2"])
def test_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(f"found '{Path(name).suffix}'")):
        open_sink(tmp_path / name, frame_rate=10)
    assert names_in(tmp_path) == []


def test_place_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="expected to write there"):
        open_sink(tmp_path / "file" / "out.mp4", frame_rate=10)


def test_folder_in_the_videos_place(tmp_path: Path) -> None:
    (tmp_path / "out.mp4" / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="expected to write there"):
        written(tmp_path / "out.mp4", scenes(3))
    assert names_in(tmp_path) == ["out.mp4"]


# ------------------------------------------------------------------------------------------------------------------ JSON lines


def test_json_lines_are_there_before_the_next_frame(tracker: PoseTracker, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tracks.jsonl"
    lines = JsonLines(path)
    rows: list[dict[str, Any]] = []

    def report(progress: Progress) -> None:
        content = path.read_text()
        assert content.endswith("\n")
        rows[:] = [json.loads(line) for line in content.splitlines()]
        assert len(rows) == progress.frames

    frames = [*people(5), blank(WH)]
    track_video(tracker, tracker.create_state(frame_rate=10), Frames(frames), lines=lines, report=report)
    lines.close()
    assert [row["frame"] for row in rows] == list(range(6))
    np.testing.assert_allclose([row["time_s"] for row in rows], np.arange(6) / 10, atol=1e-3)
    assert [len(row["annotations"]) for row in rows] == [1, 1, 1, 1, 1, 0]
    state = tracker.create_state(frame_rate=10)
    for row, frame in zip(rows, frames, strict=True):
        tracked = tracker.track(state, frame)
        for annotation, box, points, scores, track in zip(
            row["annotations"], tracked.boxes_xyxy, tracked.keypoints_xy, tracked.scores, tracked.track_ids, strict=True
        ):
            assert (annotation["track_id"], annotation["image_id"], annotation["category_id"]) == (track, row["frame"] + 1, 1)
            np.testing.assert_allclose(annotation["bbox"], [*box[:2], *(box[2:] - box[:2])], atol=2e-3)
            np.testing.assert_allclose(np.reshape(annotation["keypoints"], (-1, 3)), np.column_stack([points, scores]), atol=1e-3)
            assert annotation["score"] == pytest.approx(scores.mean(), abs=1e-3)


def test_json_lines_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected to write there"):
        JsonLines(tmp_path)


# -------------------------------------------------------------------------------------------------------------------- pipeline


def test_results_are_those_of_the_tracker_frame_by_frame(tracker: PoseTracker, tmp_path: Path) -> None:
    frames = tracker_bundles.sequence(7, frames=50)
    sink, drawn = Kept(), []
    tracks: list[TrackedPoses] = []

    def keep(image: np.ndarray, tracked: TrackedPoses) -> np.ndarray:
        tracks.append(tracked)
        return draw(image, tracked)

    source = Frames(frames, count=50)
    done = track_video(tracker, tracker.create_state(), source, draw=keep, sink=sink)
    state = tracker.create_state()
    expected = [tracker.track(state, frame) for frame in frames]
    for ours, theirs, frame in zip(tracks, expected, frames, strict=True):
        for field in ("keypoints_xy", "scores", "boxes_xyxy", "track_ids"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
        drawn.append(draw(frame, theirs))
    for image, picture in zip(sink.images, drawn, strict=True):
        np.testing.assert_array_equal(image, picture)
    assert sink.is_closed
    assert source.was_closed
    assert (done.frames, done.total) == (50, 50)
    assert done.targets == sum(len(tracked) for tracked in expected) > 50
    assert done.ids == 1 + max(int(track) for tracked in expected for track in tracked.track_ids)
    assert set(done.stages) == {"decode", "detect", "pose", "track", "draw", "encode"}
    assert done.seconds > 0
    assert done.per_second == pytest.approx(50 / done.seconds)


@pytest.mark.parametrize("interval", [1, 3, 0])
def test_detecting_ahead_changes_no_result(interval: int, tracker: PoseTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a video is gone on with in the middle of an interval; and where it is asked for, the detector runs in the reader's thread alone."""
    frames = tracker_bundles.sequence(7, frames=40)
    found: dict[bool, list[TrackedPoses]] = {}
    where: dict[bool, set[str]] = {}
    detect_batch = tracker.detector.detect_batch
    for ahead in (False, True):
        state = tracker.create_state(det_interval=interval)
        for frame in frames[:4]:
            tracker.track(state, frame, detect=1)
        tracks, names = found.setdefault(ahead, []), where.setdefault(ahead, set())

        def noted(*images: Any, names: set[str] = names, **more: Any) -> Any:
            names.add(threading.current_thread().name)
            return detect_batch(*images, **more)

        def keep(image: np.ndarray, tracked: TrackedPoses, tracks: list[TrackedPoses] = tracks) -> np.ndarray:
            tracks.append(tracked)
            return image

        with monkeypatch.context() as patch:
            patch.setattr(tracker.detector, "detect_batch", noted)
            track_video(tracker, state, Frames(frames[4:]), draw=keep, sink=Kept(), ahead=ahead)
    assert len(found[True]) == len(found[False]) == 36
    assert sum(map(len, found[False])) > (20 if interval else 0)
    for ours, theirs in zip(found[True], found[False], strict=True):
        for field in ("keypoints_xy", "scores", "boxes_xyxy", "track_ids"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
    assert where[True] == ({"decode"} if interval else set())
    assert "decode" not in where[False]
    assert bool(where[False]) == bool(interval)


def test_an_error_while_detecting_ahead(tracker: PoseTracker, tmp_path: Path) -> None:
    """It comes when the frames before it are tracked and written, with the frame that is no image."""
    frames = [*people(5), np.zeros((4, 4, 7), dtype=np.uint8)]
    with pytest.raises(InputError, match="expected shape"):
        track_video(tracker, tracker.create_state(), Frames(frames), draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10), ahead=True)
    assert len(frames_of(tmp_path / "out.mp4")) == 5


def test_prepare_comes_first(tracker: PoseTracker) -> None:
    sink = Kept()
    track_video(tracker, tracker.create_state(), Frames(noise(3)), prepare=lambda image: image[::-1].copy(), draw=lambda image, _: image, sink=sink)
    for image, frame in zip(sink.images, noise(3), strict=True):
        np.testing.assert_array_equal(image, frame[::-1])


def test_video_has_the_sources_frames_and_rate(tracker: PoseTracker, tmp_path: Path) -> None:
    source = open_source(str(written(tmp_path / "in.avi", scenes(25), rate=12.5)))
    sink = open_sink(tmp_path / "out.mp4", frame_rate=source.frame_rate)
    assert track_video(tracker, tracker.create_state(), source, draw=draw, sink=sink).frames == 25
    result = open_source(str(tmp_path / "out.mp4"))
    result.close()
    assert (result.count, result.frame_rate) == (25, 12.5)
    assert names_in(tmp_path) == ["in.avi", "out.mp4"]


def test_frames_of_changing_size(tracker: PoseTracker, tmp_path: Path) -> None:
    frames = [blank(wh, [PERSON], level=200) for wh in (WH, (320, 240), (120, 200), WH)]
    done = track_video(tracker, tracker.create_state(), Frames(frames), draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert done.frames == 4
    assert {image.shape for image in frames_of(tmp_path / "out.mp4")} == {(120, 160, 3)}


def test_nothing_is_left_when_a_run_fails_at_once(tracker: PoseTracker, tmp_path: Path) -> None:
    source = Frames([], after=lambda: fail(InputError("no frames")))
    with pytest.raises(InputError, match="no frames"):
        track_video(tracker, tracker.create_state(), source, draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert names_in(tmp_path) == []
    assert source.was_closed


@pytest.mark.parametrize("error", [InputError("broken"), ValueError("broken"), MemoryError("broken")], ids=lambda error: type(error).__name__)
def test_error_of_the_reader(error: Exception, tracker: PoseTracker, tmp_path: Path) -> None:
    source = Frames(people(12), after=lambda: fail(error))
    with pytest.raises(type(error), match="broken"):
        track_video(tracker, tracker.create_state(), source, draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert len(frames_of(tmp_path / "out.mp4")) == 12
    assert names_in(tmp_path) == ["out.mp4"]


def test_error_of_the_tracker(tracker: PoseTracker, tmp_path: Path) -> None:
    frames = [*people(6), np.zeros((4, 4, 7), dtype=np.uint8), *people(60)]
    with pytest.raises(InputError):
        track_video(tracker, tracker.create_state(), Frames(frames), draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert len(frames_of(tmp_path / "out.mp4")) == 6
    assert names_in(tmp_path) == ["out.mp4"]


def test_error_of_prepare(tracker: PoseTracker, tmp_path: Path) -> None:
    seen: list[int] = []

    def prepare(image: np.ndarray) -> np.ndarray:
        seen.append(1)
        return image if len(seen) < 5 else fail(RuntimeError("prepare"))

    with pytest.raises(RuntimeError, match="prepare"):
        track_video(tracker, tracker.create_state(), Frames(people(60)), prepare=prepare, draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert len(frames_of(tmp_path / "out.mp4")) == 4


def test_error_of_draw(tracker: PoseTracker, tmp_path: Path) -> None:
    seen: list[int] = []

    def failing(image: np.ndarray, tracked: TrackedPoses) -> np.ndarray:
        seen.append(1)
        return draw(image, tracked) if len(seen) < 5 else fail(RuntimeError("draw"))

    with pytest.raises(RuntimeError, match="draw"):
        track_video(tracker, tracker.create_state(), Frames(people(60)), draw=failing, sink=open_sink(tmp_path / "out.mp4", frame_rate=10))
    assert len(frames_of(tmp_path / "out.mp4")) == 4
    assert names_in(tmp_path) == ["out.mp4"]


def test_error_of_the_sink(tracker: PoseTracker) -> None:
    sink = Kept(lambda count: fail(OutputError("disk full")) if count == 5 else None)
    source = Frames(people(200))
    with pytest.raises(OutputError, match="disk full"):
        track_video(tracker, tracker.create_state(), source, draw=draw, sink=sink)
    assert sink.is_closed
    assert source.given < 200


def test_error_of_the_sink_goes_before_a_later_one_of_the_reader(tracker: PoseTracker) -> None:
    """The reader is ahead: what it meets there has not been asked for."""
    met = threading.Event()

    def after() -> None:
        met.set()
        fail(InputError("later"))

    def write(count: int) -> None:
        assert met.wait(10)
        fail(OutputError("disk full"))

    def report(progress: Progress) -> None:
        if progress.frames == 1:
            assert met.wait(10)
            deadline = time.monotonic() + 10
            while any(thread.name == "encode" for thread in lanes()) and time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises(OutputError, match="disk full"):
        track_video(tracker, tracker.create_state(), Frames(people(4), after=after), draw=draw, sink=Kept(write), report=report)


def test_video_that_cannot_be_written_is_said_as_that(tracker: PoseTracker, tmp_path: Path) -> None:
    frames = [np.zeros((120, 160, 3), dtype=np.uint8)] * 3
    sink = open_sink(tmp_path / "out.mp4", frame_rate=10)
    with pytest.raises(OutputError, match="this OpenCV can write"):  # no codec of mp4 has frames of one pixel
        track_video(tracker, tracker.create_state(), Frames(frames), draw=lambda image, _: image[:1, :1].copy(), sink=sink)
    assert names_in(tmp_path) == []


def test_error_of_show(tracker: PoseTracker, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="window"):
        track_video(
            tracker, tracker.create_state(), Frames(people(60)), draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10),
            show=lambda image: fail(RuntimeError("window")),
        )  # fmt: skip
    assert len(frames_of(tmp_path / "out.mp4")) == 1


def test_interrupt_leaves_a_whole_video_of_what_was_done(tracker: PoseTracker, tmp_path: Path) -> None:
    def report(progress: Progress) -> None:
        if progress.frames == 9:
            raise KeyboardInterrupt

    lines = JsonLines(tmp_path / "tracks.jsonl")
    with pytest.raises(KeyboardInterrupt):
        track_video(
            tracker, tracker.create_state(), Frames(people(200)), draw=draw, sink=open_sink(tmp_path / "out.mp4", frame_rate=10), lines=lines, report=report
        )
    lines.close()
    assert len(frames_of(tmp_path / "out.mp4")) == 9
    assert len((tmp_path / "tracks.jsonl").read_text().splitlines()) == 9
    assert names_in(tmp_path) == ["out.mp4", "tracks.jsonl"]


def test_live_source_that_stalls(tracker: PoseTracker, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as stream:
        source = open_source("-", size_wh=WH, stream=stream)
        with open(writing, "wb", buffering=0) as pipe:
            filling = threading.Thread(target=lambda: [pipe.write(frame.tobytes()) for frame in people(2)])  # a pipe holds less than two frames
            filling.start()
            with pytest.raises(InputError, match=r"expected a frame within 0\.3 s, found none: the stream stalls"):
                track_video(tracker, tracker.create_state(), source, draw=draw, sink=open_sink(tmp_path / "out.avi", frame_rate=10), stall_s=0.3)
            filling.join()
        for thread in lanes():  # the pipe's end lets it go
            thread.join(10)
    assert names_in(tmp_path) == ["out.avi"]
    assert len(frames_of(tmp_path / "out.avi")) == 2


def test_device_is_not_let_go_of_while_it_is_read(tracker: PoseTracker) -> None:
    """OpenCV crashes where a capture is released in the middle of a read."""
    go_on = threading.Event()
    source = Frames(people(1), after=lambda: go_on.wait(20) or None, is_live=True)  # type: ignore[arg-type, func-returns-value]
    try:
        with pytest.raises(InputError, match="stalls"):
            track_video(tracker, tracker.create_state(), source, stall_s=0.2)
    finally:
        go_on.set()
        for thread in lanes():
            thread.join(10)
    assert not source.was_closed_while_reading


def test_files_may_take_their_time(tracker: PoseTracker) -> None:
    """Only what is live can stall."""
    source = Frames(people(2), after=lambda: time.sleep(0.4))
    assert track_video(tracker, tracker.create_state(), source, stall_s=0.1).frames == 2


def test_slow_sink_holds_the_reader_back(tracker: PoseTracker) -> None:
    source = Frames(blank(WH) for _ in range(120))
    ahead: list[int] = []

    def seen(count: int) -> None:
        time.sleep(0.005)
        ahead.append(source.given - count)

    sink = Kept(seen)
    assert track_video(tracker, tracker.create_state(), source, draw=lambda image, _: image[:1, :1].copy(), sink=sink).frames == 120
    assert len(sink.images) == 120
    assert max(ahead) <= 2 * 8 + 4


def test_slow_tracker_holds_the_reader_back(tracker: PoseTracker) -> None:
    source = Frames(blank(WH) for _ in range(60))
    ahead: list[int] = []

    def report(progress: Progress) -> None:
        time.sleep(0.005)
        ahead.append(source.given - progress.frames)

    track_video(tracker, tracker.create_state(), source, report=report)
    assert max(ahead) <= 8 + 2


def test_long_video_takes_no_more_memory_and_threads(tracker: PoseTracker) -> None:
    resident: dict[int, int] = {}
    threads: set[int] = set()

    def report(progress: Progress) -> None:
        threads.add(threading.active_count())
        if progress.frames in {600, 10_000}:
            gc.collect()
            resident[progress.frames] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    class Nowhere(Kept):
        def write(self, image: np.ndarray) -> None:
            pass

    frame = blank(WH, [PERSON], level=200)
    source = Frames(frame.copy() for _ in range(10_000))
    done = track_video(tracker, tracker.create_state(), source, draw=lambda image, _: image, sink=Nowhere(), report=report)
    assert done.frames == 10_000
    assert resident[10_000] - resident[600] < 25_000_000  # all frames would be 460 million
    assert max(threads) - min(threads) <= 1  # the reader ends before the last frame is tracked


def test_show_ends_a_run(tracker: PoseTracker, tmp_path: Path) -> None:
    shown: list[np.ndarray] = []

    def show(image: np.ndarray) -> bool:
        shown.append(image)
        return len(shown) < 7

    frames = people(300)
    source = Frames(frames)
    done = track_video(tracker, tracker.create_state(), source, draw=draw, sink=open_sink(tmp_path / "out.avi", frame_rate=10), show=show)
    assert done.frames == len(shown) == 7
    assert len(frames_of(tmp_path / "out.avi")) == 7
    assert source.given < 300
    np.testing.assert_array_equal(shown[0], draw(frames[0], tracker.track(tracker.create_state(), frames[0])))


def test_end_by_the_user_is_no_error_of_the_reader(tracker: PoseTracker) -> None:
    met = threading.Event()

    def after() -> None:
        met.set()
        fail(InputError("later"))

    def show(_: np.ndarray) -> bool:
        assert met.wait(10)
        for thread in lanes():
            thread.join(10)
        return False

    assert track_video(tracker, tracker.create_state(), Frames(people(4), after=after), draw=draw, show=show).frames == 1


def test_one_state_goes_on_in_the_next_video(tracker: PoseTracker) -> None:
    state = tracker.create_state()
    first = track_video(tracker, state, Frames(people(3)))
    second = track_video(tracker, state, Frames(people(3)))
    assert (first.frames, second.frames, state.frames) == (3, 3, 6)
