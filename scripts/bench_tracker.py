"""Trackers on one video with one set of weights, taking turns: frames per second, and how well they do where identities and joints are known.

usage: scripts/setup-peers && .venv/bin/python scripts/bench_tracker.py [--frames 300] [--rounds 3] [--det-interval 1] [--pose-size m] [--fast openvino-int8] [--json FILE]

Ours, MMDeploy's (`mmdeploy_runtime` 1.3.1) and rtmlib's tracker, each in a process of its own, decode a drawn video and track it. The weights are the demo
models'. Every round each of them has its turn; the speed is that of the median round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracker_figures import Frame

ROOT = Path(__file__).resolve().parents[1]
ANSWER = "answer: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--det-interval", type=int, default=1)
    parser.add_argument("--pose-size", choices=("s", "m"), help="the pose estimator grown to this size of RTMPose, its results the same: see grown_pose.py")
    parser.add_argument("--fast", default="openvino-int8", help="the fastest target that passed its gates")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(options, Path(folder))
    show(results, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    from modelcrate_converter.config import load_config
    from modelcrate_converter.convert import ConvertOptions, convert
    from modelcrate_converter.demo import DEMO_MODELS
    from modelcrate_converter.people.dataset import write_video
    from tracker_figures import figures, read_truth

    write_video(folder / "video", frames=options.frames, seed=options.seed)
    models = dict(DEMO_MODELS)
    if options.pose_size:
        from grown_pose import write_grown

        models["demo-pose"] = write_grown(models["demo-pose"], options.pose_size, folder / "grown.pth")
    for name, path in models.items():
        for made in convert(path, [load_config("onnxruntime"), load_config(options.fast)], ConvertOptions(out=folder, name=name)):
            if made.error:
                raise made.error
    truth = read_truth(folder / "video/annotations.json")
    video = str(folder / "video/people.mp4")
    sdk, ours = str(ROOT / ".venv-sdk/bin/python"), sys.executable
    contenders = {
        "mmdeploy_runtime": (sdk, "mmdeploy_runtime", "onnxruntime"),
        "rtmlib": (ours, "rtmlib", "onnxruntime"),
        "modelcrate, mode sdk": (ours, "sdk", "onnxruntime"),
        "modelcrate": (ours, "fixed", "onnxruntime"),
        f"modelcrate, {options.fast}": (ours, "fixed", options.fast),
    }
    workers = {}
    for name, (python, kind, target) in contenders.items():
        job = {
            "kind": kind, "video": video, "det": str(folder / f"demo-det_{target}"), "pose": str(folder / f"demo-pose_{target}"),
            "interval": options.det_interval, "out": str(folder / f"{len(workers)}.npz"),
        }  # fmt: skip
        command = [python, __file__, "--worker", json.dumps(job)]
        workers[name] = (subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()), job["out"])
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(options.rounds + 1):
        for name, (process, _) in workers.items():
            elapsed = float(ask(process, name, "run"))
            if turn:  # the first one warms up
                seconds[name].append(elapsed)
    results = {}
    for name, (process, out) in workers.items():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(timeout=60)
        per_second = options.frames / statistics.median(seconds[name])
        results[name] = {"per_second": per_second, "rounds": seconds[name], **asdict(figures(truth, read_tracks(Path(out))))}
    return results


def environment() -> dict[str, str]:
    """Of the workers: our packages and rtmlib, and silence from the SDK."""
    path = os.pathsep.join(str(ROOT / part) for part in ("sdk_bundle", "runtimes", ".venv-peers"))
    return os.environ | {"SPDLOG_LEVEL": "off", "PYTHONPATH": path}


def ask(process: subprocess.Popen[str], name: str, request: str) -> str:
    """What a worker answers; its frameworks write to the same stream, so its answers are marked."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{request}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).strip()
    except BrokenPipeError:
        pass
    raise SystemExit(f"{name} ended with {process.wait()}")


def read_tracks(path: Path) -> list[Frame]:
    """What `write_tracks` wrote."""
    import numpy as np

    from tracker_figures import Frame

    with np.load(path) as found:
        ends = np.cumsum(found["counts"])
        return [
            Frame(ids=found["ids"][end - count : end].tolist(), keypoints=found["keypoints"][end - count : end])
            for end, count in zip(ends, found["counts"], strict=True)
        ]


def show(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    size = f", poses at the size of RTMPose-{options.pose_size}" if options.pose_size else ""
    title = f"{options.frames} frames of 640x360, detector every {options.det_interval}{size}, {os.cpu_count()} cores"
    table = Table(
        "tracker", "frames/s", "over mmdeploy", "over rtmlib", "IDF1", "switches", "false/frame", "recall", "error px", "jitter px", "lag frames", title=title
    )
    for name, row in results.items():
        ratios = [f"{row['per_second'] / results[peer]['per_second']:.2f}" for peer in ("mmdeploy_runtime", "rtmlib")]
        figures = [
            f"{row['idf1']:.3f}",
            str(row["switches"]),
            f"{row['false']:.3f}",
            f"{row['recall']:.3f}",
            f"{row['error_px']:.2f}",
            f"{row['jitter_px']:.2f}",
            f"{row['lag']:.2f}",
        ]
        table.add_row(name, f"{row['per_second']:.1f}", *ratios, *figures)
    Console(width=160).print(table)


# ------------------------------------------------------------------------------------------------------------- in the workers


def work(job: dict[str, Any]) -> None:
    """Track the video as often as a line comes; say the seconds each time, and keep what was found."""
    run = runner(job)
    for _ in sys.stdin:
        start = time.perf_counter()
        found = run()
        print(f"{ANSWER}{time.perf_counter() - start}", flush=True)
        write_tracks(Path(job["out"]), found)


def runner(job: dict[str, Any]) -> Any:
    """What tracks the job's video from its first frame to its last, and returns for each frame the poses and their tracks' ids."""
    return {"mmdeploy_runtime": run_mmdeploy, "rtmlib": run_rtmlib}.get(job["kind"], run_ours)(job)


def write_tracks(path: Path, found: Sequence[tuple[Any, Any]]) -> None:
    """Write the poses and ids of each frame; see `read_tracks`."""
    import numpy as np

    keypoints = [poses for poses, _ in found if len(poses)]
    np.savez(
        path, counts=np.array([len(ids) for _, ids in found]), ids=np.concatenate([np.asarray(ids, dtype=int) for _, ids in found]),
        keypoints=np.concatenate(keypoints)[..., :2] if keypoints else np.zeros((0, 17, 2)),
    )  # fmt: skip


def frames_of(video: str) -> Any:
    import cv2

    capture = cv2.VideoCapture(video)
    while True:
        done, image = capture.read()
        if not done:
            return
        yield image


def run_mmdeploy(job: dict[str, Any]) -> Any:
    from mmdeploy_runtime import PoseTracker

    tracker = PoseTracker(job["det"], job["pose"], "cpu", 0)

    def run() -> list[Any]:
        state = tracker.create_state(det_interval=job["interval"])
        return [(poses, ids) for poses, _, ids in (tracker(state, frame) for frame in frames_of(job["video"]))]

    return run


def run_rtmlib(job: dict[str, Any]) -> Any:
    import functools

    import numpy as np
    from rtmlib import Custom, PoseTracker

    solution = functools.partial(
        Custom, det_class="RTMDet", det=f"{job['det']}/end2end.onnx", det_input_size=(320, 320), pose_class="RTMPose",
        pose=f"{job['pose']}/end2end.onnx", pose_input_size=(192, 256),
    )  # fmt: skip

    def run() -> list[Any]:
        found = []
        for frame in frames_of(job["video"]):
            poses, _ = tracker(frame)
            ids = list(tracker.track_ids_last_frame)[: len(poses)]
            found.append((np.asarray(poses)[: len(ids)] if len(ids) else np.zeros((0, 17, 2)), ids))
        tracker.reset()
        return found

    tracker = PoseTracker(solution, det_frequency=job["interval"], tracking=True, backend="onnxruntime", device="cpu")
    tracker.det_model.score_thr = job.get("det_thr", tracker.det_model.score_thr)
    return run


def run_ours(job: dict[str, Any]) -> Any:
    from modelcrate_runtime.tracker import PoseTracker, TrackedPoses
    from modelcrate_runtime.video import open_source, track_video

    tracker = PoseTracker(job["det"], job["pose"], mode=job["kind"])
    update = tracker.track
    found: list[Any] = []

    def keep(state: Any, frame: Any, **more: Any) -> TrackedPoses:
        tracked = update(state, frame, **more)
        found.append((tracked.keypoints_xy, tracked.track_ids))
        return tracked

    tracker.track = keep  # type: ignore[method-assign]  # to have the results as well

    def run() -> list[Any]:
        found.clear()
        source = open_source(job["video"])
        track_video(tracker, tracker.create_state(det_interval=job["interval"], frame_rate=source.frame_rate), source)
        return list(found)

    return run


if __name__ == "__main__":
    main()
