"""`modelcrate track`: MMDeploy's `pose_tracker` program, with its options under their own names, and what it lacks."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelcrate_bundle.errors import ConfigError, OutputError
from modelcrate_runtime.cli import DEVICE, DEVICE_ID, JSON_OPTION, THREADS, app, consoles, exit_on_error

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from modelcrate_runtime.tracker import TrackedPoses
    from modelcrate_runtime.video import Progress

    Image = NDArray[np.uint8]


def _both(name: str, text: str, **more: Any) -> Any:
    """An option in kebab case and, as MMDeploy has it, in snake case."""
    return typer.Option(f"--{name.replace('_', '-')}", *([f"--{name}"] if "_" in name else []), help=text, **more)


@app.command()
def track(
    source: Annotated[
        str, typer.Argument(help="A video, a URL, a folder or pattern of pictures, the number of a camera, or - for raw frames.", metavar="INPUT")
    ],
    det: Annotated[Path, typer.Option(help="Bundle of the detector.")],
    pose: Annotated[Path, typer.Option(help="Bundle of the pose estimator.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A video, pictures like out_%04d.jpg, or a folder. Default: nothing is drawn.")] = None,
    save_json: Annotated[Path | None, _both("save_json", "Write the tracks, one line for each frame, as they are found.")] = None,
    mode: Annotated[Literal["fixed", "sdk"], typer.Option(help="sdk: as MMDeploy's SDK tracks, frame for frame, faults included.")] = "fixed",
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    threads: THREADS = None,
    output_size: Annotated[int, _both("output_size", "Long edge of what is drawn, in pixels; 0 keeps the frames'.", min=0)] = 0,
    flip: Annotated[int, typer.Option(min=0, max=1, help="1 mirrors the frames first.")] = 0,
    show: Annotated[int, typer.Option(help="Show the frames in a window and wait so many milliseconds after each; -1 shows none.")] = -1,
    skeleton: Annotated[str | None, typer.Option(help="Links and colours: a set's name, or a file of MMDeploy's form. Default: the bundle's own.")] = None,
    background: Annotated[Literal["default", "black"], typer.Option(help="What is drawn on.")] = "default",
    boxes: Annotated[bool, typer.Option(help="Draw boxes and the tracks' numbers.")] = True,
    frame_rate: Annotated[float | None, _both("frame_rate", "Frames per second. Default: the video's own, else 30.", min=0.1)] = None,
    input_size: Annotated[str | None, _both("input_size", "Size of raw frames on standard input.", metavar="WIDTHxHEIGHT")] = None,
    stall: Annotated[float, typer.Option(min=0.1, help="Seconds that a camera or stream may give no frame.")] = 10.0,
    det_interval: Annotated[int, _both("det_interval", "Run the detector in every so many-th frame.")] = 1,
    det_label: Annotated[int, _both("det_label", "The class that is tracked.")] = 0,
    det_thr: Annotated[float, _both("det_thr", "What a detection has to score more than.")] = 0.5,
    det_min_bbox_size: Annotated[float, _both("det_min_bbox_size", "Least size of a detection: the square root of its area in pixels.")] = -1,
    det_nms_thr: Annotated[float, _both("det_nms_thr", "Boxes whose IoU reaches it are one.")] = 0.7,
    pose_max_num_bboxes: Annotated[int, _both("pose_max_num_bboxes", "Most poses in a frame; negative for any number.")] = -1,
    pose_kpt_thr: Annotated[float, _both("pose_kpt_thr", "What a keypoint has to score to count and to be drawn.")] = 0.5,
    pose_min_keypoints: Annotated[int, _both("pose_min_keypoints", "How many keypoints have to count; negative for half of them.")] = -1,
    pose_bbox_scale: Annotated[float, _both("pose_bbox_scale", "How much larger than its keypoints a track's box is.")] = 1.25,
    pose_min_bbox_size: Annotated[float, _both("pose_min_bbox_size", "A track's box is used if its size is greater.")] = -1,
    pose_nms_thr: Annotated[float, _both("pose_nms_thr", "Poses that are as much alike are one.")] = 0.5,
    track_iou_thr: Annotated[float, _both("track_iou_thr", "Boxes whose IoU reaches it may be one track.")] = 0.4,
    track_max_missing: Annotated[int, _both("track_max_missing", "Frames that a track is kept without being seen.")] = 10,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Track the people in a video: keypoints and identities, drawn or as JSON."""
    with exit_on_error():
        from modelcrate_runtime.count_bar import CountBar
        from modelcrate_runtime.draw import draw_tracks
        from modelcrate_runtime.skeletons import read_skeleton, require_count
        from modelcrate_runtime.tracker import PoseTracker
        from modelcrate_runtime.video import JsonLines, fitted, open_sink, open_source, track_video

        for option, place in (("--output", output), ("--save-json", save_json)):
            if place is not None:
                _check_place(option, place, source)
        own_skeleton = read_skeleton(skeleton) if skeleton is not None else None
        frames = open_source(source, frame_rate=frame_rate, size_wh=_size(input_size) if input_size else None)
        window = _window(show) if show >= 0 else None
        with PoseTracker(det, pose, device, device_id, mode=mode, threads=threads) as tracker:
            keypoints = tracker.estimator.keypoints if own_skeleton is None else require_count(own_skeleton, tracker.estimator.keypoint_count)
            state = tracker.create_state(
                det_interval=det_interval, det_label=det_label, det_thr=det_thr, det_min_bbox_size=det_min_bbox_size, det_nms_thr=det_nms_thr,
                pose_max_num_bboxes=pose_max_num_bboxes, pose_kpt_thr=pose_kpt_thr, pose_min_keypoints=pose_min_keypoints, pose_bbox_scale=pose_bbox_scale,
                pose_min_bbox_size=pose_min_bbox_size, pose_nms_thr=pose_nms_thr, track_iou_thr=track_iou_thr, track_max_missing=track_max_missing,
                frame_rate=frames.frame_rate,
            )  # fmt: skip

            def draw(image: Image, tracked: TrackedPoses) -> Image:
                canvas = image if background == "default" else image * 0
                picture = draw_tracks(canvas, tracked, keypoints=keypoints, score_thr=pose_kpt_thr, with_boxes=boxes)
                if not output_size:
                    return picture
                scale = output_size / max(picture.shape[:2])
                return fitted(picture, (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))))

            sink = open_sink(output, frame_rate=frames.frame_rate) if output is not None else None
            lines = JsonLines(save_json) if save_json is not None else None
            try:
                with CountBar("frames", "frame", frames.count) as bar:
                    done = track_video(
                        tracker,
                        state,
                        frames,
                        prepare=_mirrored if flip else None,
                        draw=draw,
                        sink=sink,
                        lines=lines,
                        show=window,
                        report=lambda at: bar.show(at.frames, f"{at.per_second:.1f} FPS, {at.ids} tracks"),
                        stall_s=stall,
                    )
            finally:
                if lines is not None:
                    lines.close()
        for problem in frames.problems:
            consoles()[1].print(problem, style="yellow", soft_wrap=True)
        _print(done, as_json=as_json)
        for path in (output, save_json):
            if path is not None:
                consoles()[1].print(f"wrote {path}", style="dim", soft_wrap=True)


def _check_place(option: str, place: Path, source: str) -> None:
    """Results must not be written over the frames, or between them, where the next run would take them for frames."""
    from modelcrate_runtime.images import IMAGE_SUFFIXES
    from modelcrate_runtime.video import numbered_name

    origin, suffix = Path(source), place.suffix.lower()
    folder = place.parent if suffix in IMAGE_SUFFIXES else place
    is_taken = place.resolve() == origin.resolve() or (origin.is_dir() and folder.resolve() == origin.resolve())
    if not origin.exists() and folder.resolve() == origin.parent.resolve():  # a pattern of pictures
        is_taken = is_taken or fnmatch.fnmatch(re.sub(r"%\d*d", "000000", numbered_name(place)), origin.name)
    if is_taken and source != "-":
        raise OutputError(f"{option} {place}: expected another place than the frames', found {source}", hint=f"{option} results/")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--input-size: expected WIDTHxHEIGHT like 640x480, found {text!r}")
    return int(width), int(height)


def _mirrored(image: Image) -> Image:
    import numpy as np

    return np.ascontiguousarray(image[:, ::-1])


def _window(delay_ms: int) -> Callable[[Image], bool]:
    """What shows a frame; Escape or q ends the run."""
    import cv2

    lacking = ConfigError(
        "--show: expected an OpenCV with windows and a display, found none", hint="pip install opencv-python, or leave --show out and use --output"
    )
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise lacking  # Qt would end the process
    try:
        cv2.namedWindow("modelcrate", cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise lacking from error

    def show(image: Image) -> bool:
        cv2.imshow("modelcrate", image)
        return cv2.waitKey(max(delay_ms, 1)) & 0xFF not in {27, ord("q")}

    return show


def _print(done: Progress, *, as_json: bool) -> None:
    """What was tracked, and where the time went."""
    if as_json:
        import json
        from dataclasses import asdict

        sys.stdout.write(json.dumps(asdict(done) | {"per_second": done.per_second}, indent=1) + "\n")
        return
    from rich.table import Table

    out = consoles()[0]
    out.print(f"{done.frames} frames, {done.ids} tracks, {done.targets / max(done.frames, 1):.1f} in a frame, {done.per_second:.1f} frames per second")
    table = Table("stage", "ms in a frame")
    table.columns[1].justify = "right"
    for stage, seconds in done.stages.items():
        table.add_row(stage, f"{1e3 * seconds / max(done.frames, 1):.2f}")
    table.add_row("all, overlapped", f"{1e3 * done.seconds / max(done.frames, 1):.2f}", style="bold")
    out.print(table)
