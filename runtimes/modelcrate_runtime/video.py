"""Moving pictures: where frames come from, where they go, and a pipeline in which reading, tracking and drawing overlap.

Three threads with bounded queues between them: one decodes, the caller's tracks, one draws and encodes. Nothing grows with the length of a video.
"""

from __future__ import annotations

import glob
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

import cv2
import numpy as np

from modelcrate_bundle.errors import ConfigError, InputError, OutputError
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.images import IMAGE_SUFFIXES, image_files, read_image, write_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_runtime.results import Detections
    from modelcrate_runtime.tracker import PoseTracker, TrackedPoses, TrackerState

    Image = NDArray[np.uint8]

DEFAULT_RATE: Final = 30.0
"""Frames per second where nobody says."""
_CODECS: Final = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
"""Suffix -> codec that OpenCV's wheels can write. In .mpg and .wmv the rate and the number of frames would come out as others."""
_QUEUE: Final = 8
_RETRIES: Final = 30
"""Frames in a row that a decoder may fail to give before the file is taken to end there."""


class Source(Protocol):
    """Frames, one after another.

    Attributes:
        name: for messages.
        frame_rate: frames per second.
        count: how many there should be; None when nobody knows.
        is_live: whether it may stop giving frames without being at its end.
        problems: what was wrong with it, in words.
    """

    name: str
    frame_rate: float
    count: int | None
    is_live: bool
    problems: list[str]

    def __iter__(self) -> Iterator[Image]:
        """(H, W, 3) BGR uint8, of any sizes."""
        ...

    def close(self) -> None:
        """Let go of file or device."""
        ...


def open_source(text: str, *, frame_rate: float | None = None, size_wh: tuple[int, int] | None = None, stream: IO[bytes] | None = None) -> Source:
    """Open where frames come from.

    Args:
        text: a video file, a URL of one, a picture, a folder or a pattern of pictures (`frames/*.jpg`), the number of a camera, or "-" for raw frames on
            standard input.
        frame_rate: frames per second; None takes the video's own, or 30.
        size_wh: (width, height) of raw frames: 3 bytes for each pixel, blue, green, red, row by row.
        stream: instead of standard input.

    Raises:
        InputError: nothing there, or nothing that can be read as video.
        ConfigError: raw frames without a size.
    """
    if text == "-":
        if size_wh is None:
            raise ConfigError("-: expected the size of the raw frames, found none", hint="--input-size 640x480")
        # Without its buffer: a thread that waits with the buffer's lock makes the interpreter abort at exit.
        unbuffered: IO[bytes] = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        return _RawFrames(unbuffered if stream is None else stream, size_wh, frame_rate or DEFAULT_RATE)
    if text.isdecimal() and len(text) <= 2 and not Path(text).exists():
        return _Capture(int(text), f"camera {text}", frame_rate, is_live=True)
    if "://" in text:
        return _Capture(text, text, frame_rate, is_live=True)
    path = Path(text)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return _Pictures(image_files(path) if path.exists() or not glob.has_magic(text) else _globbed(text), text, frame_rate or DEFAULT_RATE)
    if glob.has_magic(text) and not path.exists():
        return _Pictures(_globbed(text), text, frame_rate or DEFAULT_RATE)
    if not path.is_file():
        raise InputError(f"{text}: expected a video, pictures, or the number of a camera, found nothing there", hint="check the path")
    return _Capture(text, text, frame_rate, is_live=False)


def _globbed(pattern: str) -> list[Path]:
    names = sorted(glob.glob(pattern))  # noqa: PTH207  # an absolute pattern is no pattern for Path.glob
    files = [Path(name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"{pattern}: expected pictures ({', '.join(sorted(IMAGE_SUFFIXES))}), found none that match", hint="check the pattern")
    return files


class _Capture:
    """A file, a URL or a camera, through OpenCV."""

    def __init__(self, target: str | int, name: str, frame_rate: float | None, *, is_live: bool) -> None:
        self.name, self.is_live = name, is_live
        self.problems: list[str] = []
        self._capture = cv2.VideoCapture(target)
        if not self._capture.isOpened():
            what = "a camera" if isinstance(target, int) else "a video that OpenCV can read"
            raise InputError(f"{name}: expected {what}, found none", hint="is it whole? ffmpeg -i shows what is in a file")
        own = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.frame_rate = frame_rate or (own if 0.1 <= own <= 1000 else DEFAULT_RATE)
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if not is_live and count > 0 else None

    def __iter__(self) -> Iterator[Image]:
        given = broken = failures = 0
        while failures <= _RETRIES:
            done, image = self._capture.read()
            if not done:
                at_end = self.count is None or given + broken + failures >= self.count
                if at_end and not self.is_live:
                    break
                failures += 1
                if self.is_live:
                    time.sleep(0.05)
                continue
            broken, failures = broken + failures, 0
            given += 1
            yield image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)  # type: ignore[misc]  # uint8
        if broken:
            self.problems.append(f"{self.name}: {broken} frames could not be decoded and were skipped")
        if self.count is not None and given + broken < self.count - 1:
            self.problems.append(f"{self.name}: expected {self.count} frames, found {given + broken}: it is cut off")
        if not given:
            raise InputError(f"{self.name}: expected frames, found none that can be decoded", hint="is it whole?")

    def close(self) -> None:
        self._capture.release()


class _Pictures:
    """Pictures as frames; one that cannot be read is skipped."""

    is_live = False

    def __init__(self, files: list[Path], name: str, frame_rate: float) -> None:
        self.name, self.frame_rate = name, frame_rate
        self.count: int | None = len(files)
        self.problems: list[str] = []
        self._files = files

    def __iter__(self) -> Iterator[Image]:
        given = 0
        for file in self._files:
            try:
                image = read_image(file)
            except InputError as error:
                self.problems.append(f"skipped: {error}")
                continue
            given += 1
            yield image
        if not given:
            raise InputError(f"{self.name}: expected pictures, found none that can be read: {self.problems[0]}")

    def close(self) -> None:
        pass


class _RawFrames:
    """Raw frames from a pipe, as `ffmpeg -f rawvideo -pix_fmt bgr24 -` writes them."""

    is_live = True

    def __init__(self, stream: IO[bytes], size_wh: tuple[int, int], frame_rate: float) -> None:
        self.name, self.frame_rate = "standard input", frame_rate
        self.count: int | None = None
        self.problems: list[str] = []
        self._stream, self._size_wh = stream, size_wh

    def __iter__(self) -> Iterator[Image]:
        width, height = self._size_wh
        size, given = 3 * width * height, 0
        while True:
            parts, missing = [], size
            while missing and (part := self._stream.read(missing)):
                parts.append(part)
                missing -= len(part)
            if missing:
                break
            given += 1
            yield np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(height, width, 3).copy()
        if missing < size:
            self.problems.append(f"{self.name}: the last frame has {size - missing} of {size} bytes and was left out: is it {width}x{height}?")
        if not given:
            raise InputError(f"{self.name}: expected frames of {size} bytes ({width}x{height}), found {size - missing}")

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------------------ sinks


class Sink(Protocol):
    """Where drawn frames go."""

    def write(self, image: Image) -> None:
        """One frame."""
        ...

    def close(self) -> None:
        """All frames are written; what is there is whole."""
        ...


def open_sink(path: Path, *, frame_rate: float) -> Sink:
    """Open where drawn frames go.

    Args:
        path: a video (`out.mp4`), numbered pictures (`out_%04d.jpg`), or a folder for pictures.
        frame_rate: of the video.

    Raises:
        OutputError: a suffix that is neither, or a place that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in _CODECS and suffix not in IMAGE_SUFFIXES:
        raise OutputError(f"{path}: expected a video, pictures like out_%04d.jpg, or a folder, found {suffix!r}", hint=f"one of {', '.join(sorted(_CODECS))}")
    try:
        (path.parent if suffix else path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: expected to write there, found: {error.strerror}", hint="choose another place with --output") from error
    if suffix in _CODECS:
        return _Video(path, frame_rate)
    if suffix in IMAGE_SUFFIXES:
        name = numbered_name(path)
        pattern = str(path.with_name(name)) if path.parent == Path() else str(path.parent).replace("%", "%%") + os.sep + name
        try:
            _ = pattern % 0
        except (TypeError, ValueError) as error:
            raise OutputError(f"{path}: expected one number in the name, like out_%04d.jpg, found another pattern") from error
        return _NumberedPictures(pattern)
    return _NumberedPictures(str(path).replace("%", "%%") + os.sep + numbered_name(path))


def numbered_name(path: Path) -> str:
    """The name of each picture in a folder, or of those that a picture's path stands for, with the place of its number: "out_%06d.png"."""
    if not path.suffix:
        return "%06d.jpg"
    return path.name if "%" in path.name else f"{path.stem}_%06d{path.suffix}"


class _Video:
    """A video that appears when it is whole. Frames of another size than the first are fitted into it."""

    def __init__(self, path: Path, frame_rate: float) -> None:
        self._path, self._rate = path, frame_rate
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size_wh = (0, 0)
        self._count = 0

    def write(self, image: Image) -> None:
        if self._writer is None:
            self._size_wh = (image.shape[1], image.shape[0])
            codec = cv2.VideoWriter.fourcc(*_CODECS[self._path.suffix.lower()])
            self._writer = cv2.VideoWriter(str(self._partial), codec, self._rate, self._size_wh)
            if not self._writer.isOpened():
                self._writer = None  # nothing to close
                self._partial.unlink(missing_ok=True)
                raise OutputError(f"{self._path}: expected a video that this OpenCV can write, found that it cannot", hint="try out.mp4 or out.avi")
        self._writer.write(fitted(image, self._size_wh))
        self._count += 1

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            check = cv2.VideoCapture(str(self._partial))
            written = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
            check.release()
            if written < max(self._count - 1, 1):  # OpenCV says nothing of a full disk
                raise OutputError(f"{self._path}: expected a video of {self._count} frames, found {written} written: is the disk full?")
            self._partial.replace(self._path)
        except OSError as error:
            raise OutputError(f"{self._path}: expected to write there, found: {error.strerror}") from error
        finally:
            self._partial.unlink(missing_ok=True)


class _NumberedPictures:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._count = 0

    def write(self, image: Image) -> None:
        write_image(Path(self._pattern % self._count), image)
        self._count += 1

    def close(self) -> None:
        pass


def fitted(image: Image, size_wh: tuple[int, int]) -> Image:
    """An image in a frame of another size, its sides' ratio kept and black beside it."""
    width, height = size_wh
    if (image.shape[1], image.shape[0]) == size_wh:
        return image
    scale = min(width / image.shape[1], height / image.shape[0])
    inner = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(image, inner, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return canvas


class JsonLines:
    """One line for each frame, flushed: whatever happens, at most one frame is lost.

    A line has `frame`, `time_s`, and `annotations` as COCO's results have them, with `track_id`.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: expected to write there, found: {error.strerror}", hint="choose another place with --save-json") from error
        self._path = path

    def write(self, frame: int, time_s: float, tracked: TrackedPoses) -> None:
        """Add a frame."""
        rows = []
        for box, points, scores, track in zip(tracked.boxes_xyxy, tracked.keypoints_xy, tracked.scores, tracked.track_ids, strict=True):
            left, top, right, bottom = (round(float(value), 3) for value in box)
            flat = [round(float(value), 3) for value in np.concatenate([points, scores[:, None]], axis=1).ravel()]
            rows.append({
                "image_id": frame + 1, "category_id": 1, "track_id": int(track), "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)],
                "keypoints": flat, "score": round(float(scores.mean()), 4) if len(scores) else 0.0,
            })  # fmt: skip
        try:
            self._stream.write(json.dumps({"frame": frame, "time_s": round(time_s, 4), "annotations": rows}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: expected to write there, found: {error.strerror}", hint="is the disk full?") from error

    def close(self) -> None:
        """All frames are written."""
        self._stream.close()


# --------------------------------------------------------------------------------------------------------------------- pipeline


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a run has done so far; the same object from frame to frame.

    Attributes:
        frames: how many were tracked.
        total: how many there should be, if that is known.
        seconds: since the first frame was asked for.
        targets: how many tracks were seen, over all frames.
        ids: how many different tracks there were.
        stages: decode, detect, pose, track, draw and encode -> seconds. Decoding and detecting, the others, and drawing run beside each other.
    """

    frames: int = 0
    total: int | None = None
    seconds: float = 0.0
    targets: int = 0
    ids: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0


Draw = Callable[["Image", "TrackedPoses"], "Image"]
_END: Final = object()


class _Lane:
    """A thread with a bounded queue before or behind it, which ends when it is told to, whatever it waits for."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Any] = queue.Queue(_QUEUE)
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.seconds: dict[str, float] = {}

    def put(self, item: Any) -> bool:
        """Whether there was room before the end."""
        while not self.stop.is_set():
            try:
                self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def get(self, *, limit_s: float | None = None) -> Any:
        """The next item; raises `queue.Empty` after the limit, and what ended the other side."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while True:
            try:
                return self.queue.get(timeout=0.1)
            except queue.Empty:
                if self.stop.is_set():
                    return _END
                if deadline is not None and time.monotonic() > deadline:
                    raise


def track_video(
    tracker: PoseTracker,
    state: TrackerState,
    source: Source,
    *,
    prepare: Callable[[Image], Image] | None = None,
    draw: Draw | None = None,
    sink: Sink | None = None,
    lines: JsonLines | None = None,
    show: Callable[[Image], bool] | None = None,
    report: Callable[[Progress], None] | None = None,
    stall_s: float = 10.0,
    ahead: bool | None = None,
) -> Progress:
    """Track a video from its first frame to its last.

    Args:
        tracker: the networks.
        state: of this video.
        source: the frames.
        prepare: what is done with a frame first, like mirroring it.
        draw: makes the picture for `sink` and `show`; in its own thread.
        sink: gets the drawn frames; it is closed in any case, so that what was written is whole.
        lines: gets the results.
        show: shows a drawn frame, in the caller's thread; False ends the run.
        report: called after each frame, in the caller's thread.
        stall_s: how long a live source may give no frame.
        ahead: whether the detector looks at the next frames while the poses of this one are estimated, which changes no result. None is yes where the networks
            run on a GPU or there are more than two cores: with ONNX Runtime 18 % more frames per second on 4 cores, 14 % on 8 and on 2 some 5 % fewer.

    Returns:
        What was done.

    Raises:
        InputError: no frames, or a live source that stalls; what was done until then is written.
        OutputError: what cannot be written.
    """
    reader, writer = _Lane(), _Lane()
    progress = Progress(total=source.count)
    if ahead is None:
        ahead = usable_cores() > 2 or tracker.is_on_gpu
    detect = tracker.detect_ahead if ahead else None
    threads = [threading.Thread(target=_read, args=(source, prepare, detect, state, reader), name="decode", daemon=True)]
    if sink is not None and draw is not None:
        threads.append(threading.Thread(target=_write, args=(sink, draw, writer), name="encode", daemon=True))
    before = dict(tracker.seconds)
    started = time.perf_counter()
    last = -1
    for thread in threads:
        thread.start()
    try:
        while True:
            try:
                item = reader.get(limit_s=stall_s if source.is_live else None)
            except queue.Empty:
                raise InputError(
                    f"{source.name}: expected a frame within {stall_s:g} s, found none: the stream stalls", hint="--stall says how long to wait"
                ) from None
            if item is _END:
                if reader.error is not None:
                    raise reader.error
                break
            image, found = item
            tracked = tracker.track(state, image, found=found)
            if lines is not None:
                lines.write(progress.frames, progress.frames / source.frame_rate, tracked)
            if sink is not None and draw is not None and not writer.put((image, tracked)):
                break
            progress.frames += 1
            progress.targets += len(tracked)
            last = max(last, *tracked.track_ids.tolist(), -1)
            progress.ids = last + 1
            progress.seconds = time.perf_counter() - started
            if report is not None:
                report(progress)
            if show is not None and draw is not None and not show(draw(image, tracked)):
                break
        writer.put(_END)
        if len(threads) > 1:
            threads[1].join()
        if writer.error is not None:
            raise writer.error
    finally:
        reader.stop.set()
        writer.put(_END)
        for thread in threads[1:]:
            thread.join(timeout=30)
        writer.stop.set()
        threads[0].join(timeout=2)  # a camera's driver may never come back
        if not threads[0].is_alive():  # OpenCV crashes where a capture is released in the middle of a read
            source.close()
    progress.seconds = time.perf_counter() - started
    progress.stages = {"decode": reader.seconds.get("decode", 0.0)}
    progress.stages |= {name: tracker.seconds[name] - before.get(name, 0.0) for name in tracker.seconds}
    progress.stages |= writer.seconds
    return progress


def _read(source: Source, prepare: Callable[[Image], Image] | None, detect: Callable[[Image], Detections] | None, state: TrackerState, lane: _Lane) -> None:
    """Frames, and what the detector finds in them ahead of their turn: it needs nothing of what is tracked."""
    spent = 0.0
    first = state.frames
    try:
        start = time.perf_counter()
        for i, frame in enumerate(source):
            image = prepare(frame) if prepare is not None else frame
            spent += time.perf_counter() - start
            lane.seconds["decode"] = spent
            found = detect(image) if detect is not None and state.wants_detection(frame=first + i) else None
            if not lane.put((image, found)):
                return
            start = time.perf_counter()
    except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
        lane.error = error
    lane.put(_END)


def _write(sink: Sink, draw: Draw, lane: _Lane) -> None:
    drawn = encoded = 0.0
    try:
        try:
            while (item := lane.get()) is not _END:
                start = time.perf_counter()
                picture = draw(*item)
                middle = time.perf_counter()
                sink.write(picture)
                drawn, encoded = drawn + middle - start, encoded + time.perf_counter() - middle
                lane.seconds = {"draw": drawn, "encode": encoded}
        finally:
            sink.close()
    except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
        lane.error = error
        lane.stop.set()
