"""Ours against `mmdeploy_runtime` and rtmlib on the same ONNX files, all taking turns: a detector, 1, 4 and 8 poses, both together, a tracker on a video.

usage: scripts/setup-peers && .venv/bin/python scripts/bench_peers.py [--rounds 20] [--models demo|rtmpose-m] [--rows detector,pose-8] [--json FILE]

The results are compared first: where a peer's are not ours, nothing is timed. The SDK's conventions are ours in `geometry="sdk"`, which is timed as well;
rtmlib's are those of our default. The fastest target that passes its gates takes part too; how far it is from float32 is said, but it need not be the same.

The weights are the demo models', or with `--models rtmpose-m` random ones for RTMPose-m and RTMDet-nano: speed does not depend on them, and detector and poses
are all that is asked of them.

Each contender is a process of its own on the same cores, those that this process may use (`taskset`), and times its own calls. Ours take one thread for each
of these cores. rtmlib and the SDK cannot be told: they leave the number to their ONNX Runtime, which takes one for each physical core among them. A turn is ten
calls in a row, after 20 ms of calls that do not count: until then threads of whoever ran before may still spin. For the tracker it is the whole video once,
from opening the file to the last result. Ratios are those of the medians, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench_tracker import ANSWER, ROOT, ask, environment, frames_of, read_tracks, runner, write_tracks
from peer_agreement import OURS, OURS_SDK, POSE_WH, RTMLIB, RULES, SDK, Array, Found, bin_px, complaints, difference, of_keypoints

if TYPE_CHECKING:
    from modelcrate_runtime.geometry import Geometry
    from tracker_figures import Frame

# This file runs in the SDK's environment too, which has neither torch nor rich: what needs them is imported where it is needed.

SCHEMA: Final = "modelcrate.peers/1"
FP32: Final = "onnxruntime"
ROWS: Final[Mapping[str, str]] = {
    "detector": "the detector on a picture of 640x480",
    "pose-1": "the pose of 1 box",
    "pose-4": "the poses of 4 boxes",
    "pose-8": "the poses of 8 boxes",
    "top-down": "the detector, and the poses of all that it finds",
    "tracker": "the tracker on a video of 640x360, decoding included",
}
TRAINED: Final = frozenset({"top-down", "tracker"})
"""Rows that random weights cannot have: there are no people for them."""
DETECTOR_HW: Final = (320, 320)
SCENES: Final = 8
SETTLE_S: Final = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each that count")
    parser.add_argument("--calls", type=int, default=10, help="timed calls in a turn; of the tracker one video")
    parser.add_argument("--models", choices=("demo", "rtmpose-m"), default="demo")
    parser.add_argument("--rows", help=f"only these of {', '.join(ROWS)}")
    parser.add_argument("--frames", type=int, default=60, help="of the video")
    parser.add_argument("--fast", default="openvino-int8", help="the fastest target that passes its gates; 'none' for none")
    parser.add_argument("--json", type=Path, help="write all samples there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    options.rows = chosen_rows(options.rows, options.models)
    if min(options.rounds, options.calls) < 1 or options.frames < 2:
        raise SystemExit("bench_peers: expected at least one round, one call and two frames")
    absent = [name for name, place in ((SDK, ".venv-sdk"), (RTMLIB, ".venv-peers")) if not (ROOT / place / ".installed").is_file()]
    if absent:
        raise SystemExit(f"bench_peers: {' and '.join(absent)} not here: scripts/setup-peers makes the environments (x86-64 Linux with Python 3.11)")
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = bench(options, Path(folder))
    except KeyboardInterrupt:
        print("bench_peers: interrupted", file=sys.stderr)
        sys.exit(130)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def chosen_rows(text: str | None, models: str) -> list[str]:
    possible = [row for row in ROWS if models == "demo" or row not in TRAINED]
    rows = text.split(",") if text else possible
    if set(rows) - set(possible):
        raise SystemExit(f"bench_peers: --rows: expected some of {', '.join(possible)}, found {text}")
    return [row for row in possible if row in rows]


# ------------------------------------------------------------------------------------------------------------------ the benchmark


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from modelcrate_converter.people.dataset import write_video
    from modelcrate_runtime.host import load_between, read_host, take_reading
    from modelcrate_runtime.measurement import doubts

    say(f"converting the models of {options.models}")
    left_out = convert_models(options, folder)
    draw_inputs(folder / "inputs.npz", options.models)
    if "tracker" in options.rows:
        write_video(folder / "video", frames=options.frames, seed=11)
    before = take_reading()
    with workers(options, folder, left_out) as contenders:
        say("comparing results")
        compared = {row: compare(row, contenders, folder, options) for row in options.rows}
        rows = [timed(row, contenders, options) | compared[row] for row in options.rows]
        about = {name: json.loads(worker.ask("about")) for name, worker in contenders.items()}
    load = load_between(before, take_reading())  # behind the workers' end: only then what they did counts as ours
    return {
        "schema": SCHEMA,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "models": options.models,
        "rounds": options.rounds,
        "calls": options.calls,
        "settle_s": SETTLE_S,
        "networks": {model: sha256(folder / f"{model}_{FP32}/end2end.onnx") for model in ("det", "pose")},
        "left_out": left_out,
        "threads": "ours: one for each core that the process may use; peers: their ONNX Runtime's choice. contenders' os_threads are all that a process has",
        "contenders": about,
        "rows": rows,
        "host": asdict(read_host()),
        "load": asdict(load),
        "doubts": [asdict(doubt) for doubt in doubts([1.0] * 100, load)],
    }


def say(text: str) -> None:
    print(f"bench_peers: {text}", file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def convert_models(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Write `det_<target>` and `pose_<target>`; returns the fast target with its error if it could not be built."""
    from modelcrate_converter.config import load_config
    from modelcrate_converter.convert import ConvertOptions, convert
    from modelcrate_converter.demo import DEMO_MODELS

    configs = [load_config(target) for target in (FP32, options.fast) if target != "none"]
    is_trained = options.models == "demo"
    checkpoints = (DEMO_MODELS["demo-det"], DEMO_MODELS["demo-pose"]) if is_trained else random_checkpoints(folder)
    left_out = {}
    for name, path in zip(("det", "pose"), checkpoints, strict=True):
        # Gates are about what weights have learned: of random ones nothing is asked.
        for made in convert(path, configs, ConvertOptions(out=folder, name=name, verify=is_trained)):
            if made.error and made.target == FP32:
                raise SystemExit(f"bench_peers: {made.error}")
            if made.error:
                left_out[made.target] = str(made.error)
                say(f"{made.target} is left out: {made.error}")
    return left_out


def random_checkpoints(folder: Path) -> list[Path]:
    import torch

    from convert_zoo import calm
    from modelcrate_converter.models.blueprints import random_weights
    from modelcrate_converter.zoo import get_model
    from zoo_table import shapes_of

    paths = []
    for name in ("rtmdet-nano_person-320", "rtmpose-m"):
        paths.append(folder / f"{name}.pth")
        torch.save({"state_dict": calm(random_weights(shapes_of(get_model(name)), seed=0), paths[-1])}, paths[-1])
    return paths


def draw_inputs(path: Path, models: str) -> None:
    """Pictures and eight boxes in each; the first picture is the one for the figures, the others are compared as well."""
    from modelcrate_converter.demo import DEMO_SEED
    from modelcrate_converter.people import draw_scene, procedural_scenes
    from modelcrate_converter.people.scenes import MAX_PEOPLE
    from modelcrate_runtime.profiler import spread_boxes

    pictures: dict[str, Array] = {}
    smaller = np.array([3, 3, -3, -3])
    if models == "demo":
        for i in range(SCENES):
            scene = draw_scene(DEMO_SEED, i, size_hw=(480, 640), people=(MAX_PEOPLE, MAX_PEOPLE))
            boxes = np.stack([person.box_xyxy for person in scene.people])
            pictures |= {f"image{i}": scene.image, f"boxes{i}": np.concatenate([boxes, boxes + smaller, boxes + 2 * smaller])[:8].astype(np.float32)}
    else:
        for i, (_, image, _) in enumerate(procedural_scenes(SCENES)):  # on the first of them the random detector is sure to find something
            pictures |= {f"image{i}": image, f"boxes{i}": spread_boxes(image.shape[:2], 8)}
    np.savez(path, **pictures)


class Worker:
    """A contender's process, and the requests that it answers."""

    def __init__(self, name: str, python: str, job: Mapping[str, Any], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("w") as stderr:
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends them.
            self._process = subprocess.Popen(
                [python, __file__, "--worker", json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=environment(), start_new_session=True,
            )  # fmt: skip

    def ask(self, request: str) -> str:
        try:
            return ask(self._process, self.name, request)
        except SystemExit as end:
            said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise SystemExit(f"bench_peers: {request}: {end}{': ' if said else ''}{''.join(said)}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def workers(options: argparse.Namespace, folder: Path, left_out: Mapping[str, str]) -> Iterator[dict[str, Worker]]:
    here, there = sys.executable, str(ROOT / ".venv-sdk/bin/python")
    kinds = {OURS: (here, "fixed", FP32), OURS_SDK: (here, "sdk", FP32), SDK: (there, SDK, FP32), RTMLIB: (here, RTMLIB, FP32)}
    if options.fast != "none" and options.fast not in left_out:
        kinds[f"{OURS}, {options.fast}"] = (here, "fixed", options.fast)
    with contextlib.ExitStack() as stack:
        found: dict[str, Worker] = {}
        for name, (python, kind, target) in kinds.items():
            job = {
                "kind": kind, "det": str(folder / f"det_{target}"), "pose": str(folder / f"pose_{target}"), "inputs": str(folder / "inputs.npz"),
                "video": str(folder / "video/people.mp4"), "interval": 1, "det_thr": threshold(options.models),
            }  # fmt: skip
            found[name] = stack.enter_context(contextlib.closing(Worker(name, python, job, folder / f"{len(found)}.log")))
        yield found


def threshold(models: str) -> float:
    """Score that counts as a find; random weights are made to score a little more than 0.05, see `convert_zoo.calm`."""
    return 0.5 if models == "demo" else 0.0502


class Clock:
    """Seconds that calls took by the workers' own clocks: what it costs to ask them is nobody's."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def call(self, worker: Worker, row: str) -> Callable[[], None]:
        def call() -> None:
            self.seconds += float(worker.ask(f"time {row}"))

        return call


def timed(row: str, contenders: Mapping[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    from modelcrate_runtime.measurement import Latency, Ratio, doubts, take_turns

    say(f"{row}: {options.rounds} rounds")
    clock = Clock()
    calls = {name: clock.call(worker, row) for name, worker in contenders.items()}
    each, settle_s = (1, 0.0) if row == "tracker" else (options.calls, SETTLE_S)  # a video is long enough to settle in
    samples = take_turns(calls, rounds=options.rounds, warmup=1, each=each, settle_s=settle_s, clock=clock)
    inputs = options.frames if row == "tracker" else 1
    return {
        "row": row,
        "what": ROWS[row],
        "inputs": inputs,
        "contenders": {
            name: {
                "latency": asdict(Latency.of(seconds, inputs=inputs)),
                "times": {peer: asdict(Ratio.of(samples[peer], seconds, each=each)) for peer in RULES},
                "doubts": [asdict(doubt) for doubt in doubts(seconds)],
                "samples": seconds,
            }
            for name, seconds in samples.items()
        },
    }


# ---------------------------------------------------------------------------------------------------------------- whether they agree


def compare(row: str, contenders: Mapping[str, Worker], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What all of them find.

    Raises:
        SystemExit: a peer's results are not ours.
    """
    if row == "tracker":
        return compare_tracks(contenders, folder, options)
    found = {name: kept(worker, row, folder) for name, worker in contenders.items()}
    thr = threshold(options.models)
    same = {peer: judged(row, peer, difference(found[rule.ours], found[peer], rule=rule, thr=thr, size_wh=(640, 480))) for peer, rule in RULES.items()}
    others = [name for name in found if name not in {OURS, OURS_SDK, *RULES}]
    # Of random weights a lower precision finds other things: there it says nothing.
    apart = {name: difference(found[OURS], found[name], rule=RULES[RTMLIB], thr=thr, size_wh=(640, 480)) for name in others if options.models == "demo"}
    return {"same": same, "apart": apart}


def kept(worker: Worker, row: str, folder: Path) -> list[Found]:
    path = folder / "kept.npz"
    worker.ask(f"keep {row} {path}")
    with np.load(path) as arrays:
        return [(arrays[f"boxes{i}"], arrays[f"keypoints{i}"]) for i in range(len(arrays.files) // 2)]


def judged(row: str, peer: str, found: dict[str, Any]) -> dict[str, Any]:
    wrong = complaints(RULES[peer], found)
    if wrong:
        raise SystemExit(f"bench_peers: {row}: {peer} does not give the results of {RULES[peer].ours}: {'; '.join(wrong)}. Nothing was timed.")
    return {"of": RULES[peer].ours, **found}


def compare_tracks(contenders: Mapping[str, Worker], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The SDK's tracker is ours in mode "sdk". rtmlib's is another: its poses have to be those of the frame, its tracks are its own."""
    from tracker_figures import figures, read_truth

    tracks = {}
    for name, worker in contenders.items():
        worker.ask(f"keep tracker {folder / 'kept.npz'}")
        tracks[name] = read_tracks(folder / "kept.npz")
    same = {
        SDK: judged("tracker", SDK, between_tracks(tracks[OURS_SDK], tracks[SDK])),
        RTMLIB: judged("tracker", RTMLIB, among_poses(tracks[RTMLIB], contenders, folder, options)),
    }
    truth = read_truth(folder / "video/annotations.json")
    of_all = {name: asdict(figures(truth, found)) for name, found in tracks.items()}
    # JSON has no NaN, which stands for what too few matches cannot say.
    known = {name: {key: None if math.isnan(value) else value for key, value in one.items()} for name, one in of_all.items()}
    return {"same": same, "apart": {}, "figures": known}


def between_tracks(ours: Sequence[Frame], theirs: Sequence[Frame]) -> dict[str, Any]:
    agreeing = [(one, other) for one, other in zip(ours, theirs, strict=True) if one.ids == other.ids]
    shifts = [np.abs(one.keypoints - other.keypoints).max(axis=2).ravel() for one, other in agreeing]
    return {"frames": len(ours), "frames_apart": len(ours) - len(agreeing), **of_keypoints(shifts, [], RULES[SDK])}


def among_poses(theirs: Sequence[Frame], contenders: Mapping[str, Worker], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each pose of rtmlib's tracks beside the nearest of our poses in the boxes of its detector, which have to be those of ours."""
    from modelcrate_runtime import PoseDetector

    rule, thr = RULES[RTMLIB], threshold(options.models)
    found = {name: kept(contenders[name], "frames", folder) for name in (OURS, RTMLIB)}
    of_boxes = difference(found[OURS], found[RTMLIB], rule=rule, thr=thr, size_wh=(640, 360))
    shifts, units = [], []
    with PoseDetector(folder / f"pose_{FP32}") as estimator:
        for frame, image, (boxes, _) in zip(theirs, frames_of(str(folder / "video/people.mp4")), found[RTMLIB], strict=True):
            rows = boxes[:, :4] if len(boxes) else np.array([[0, 0, image.shape[1], image.shape[0]]])  # where it finds nobody, it takes the whole picture
            # Its tracker gives the frame to both networks as it is, and the pose estimator takes its blue for red.
            poses = estimator(np.ascontiguousarray(image[:, :, ::-1]), rows)[:, :, :2]
            for pose in frame.keypoints:
                distances = np.abs(poses - pose).max(axis=2)
                nearest = int(np.median(distances, axis=1).argmin())
                shifts.append(distances[nearest])
                units.append(np.full(len(pose), bin_px(rows[nearest])))
    return {**of_boxes, **of_keypoints(shifts, units, rule)}


# ------------------------------------------------------------------------------------------------------------------- what is printed


def show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=160)
    host = report["host"]
    console.print(f"{host['cpu']}, {host['cores']} cores; {report['models']} weights, {report['rounds']} rounds; times as fast, with 95 % intervals")
    for row in report["rows"]:
        per = f"{row['inputs']} frames once, ms a frame" if row["inputs"] > 1 else "ms a call"
        table = Table(
            "", "median ms", "p99 ms", *(f"times {peer}" for peer in RULES), "results", title=f"{row['row']}: {row['what']}; {per}", title_justify="left"
        )
        for name, one in row["contenders"].items():
            latency = one["latency"]
            ratios = ["" if peer == name else f"{r['times']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for peer, r in one["times"].items()]
            table.add_row(name, *(f"{latency[key] / row['inputs']:.2f}" for key in ("median_ms", "p99_ms")), *ratios, results_of(row, name))
        console.print(table)
    for name, about in report["contenders"].items():
        console.print(f"{name}: {', '.join(f'{key} {value}' for key, value in about['versions'].items())}; {about['os_threads']} threads in the process")
    for target, error in report["left_out"].items():
        console.print(f"{target} is left out: {error}")
    for doubt in report["doubts"]:
        console.print(f"doubt: {doubt['what']}")


def results_of(row: Mapping[str, Any], name: str) -> str:
    said = []
    found = row["same"].get(name) or row["apart"].get(name)
    if name in row["same"]:
        said.append(f"those of {found['of']}" if row["row"] != "tracker" or name == SDK else "poses of the frames")
    if found and row["row"] in {"detector", "top-down"}:
        lone = f", {found['alone']} without a partner" if found["alone"] else ""
        said.append(f"{found['boxes']} boxes within {found['worst_box_px']:.2g} px (IoU {found['least_iou']:.3f}){lone}")
    if found and "share" in found:
        said.append(f"{found['share']:.1%} of {found['keypoints']} keypoints within {found['within']:g} {found['unit']}, mean {found['mean_px']:.2g} px")
    if "figures" in row:
        error_px = row["figures"][name]["error_px"]
        said.append(f"IDF1 {row['figures'][name]['idf1']:.3f}" + (f", error {error_px:.2f} px" if error_px is not None else ""))
    return "; ".join(said)


# --------------------------------------------------------------------------------------------------------------------- in the workers


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's calls.

    Attributes:
        detect: picture -> whatever it returns.
        boxes: that -> (N, 4 or 5) boxes of people that count, with scores where it says them.
        estimate: picture and (N, 4) boxes -> whatever it returns.
        keypoints: that -> (N, K, 2).
        prepare: what `estimate` has to get instead of a BGR picture; made once, outside of the timing.
    """

    detect: Callable[[Array], Any]
    boxes: Callable[[Any], Array]
    estimate: Callable[[Array, Array], Any]
    keypoints: Callable[[Any], Array]
    prepare: Callable[[Array], Array]


def work(job: dict[str, Any]) -> None:
    """Answer requests: the seconds of one call, what is found in all pictures into a file, what this process is."""
    peer = {SDK: open_mmdeploy, RTMLIB: open_rtmlib}.get(job["kind"], open_ours)(job)
    with np.load(job["inputs"]) as arrays:
        inputs = [(arrays[f"image{i}"], arrays[f"boxes{i}"]) for i in range(len(arrays.files) // 2)]
    track: Callable[[], Any] | None = None
    calls: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request, *words = line.split()
        row = words[0] if words else ""
        if row == "tracker" and track is None:
            track = calls[row] = runner(job)
        elif row and row != "frames" and row not in calls:
            calls[row] = call_of(peer, row, *inputs[0])
        if request == "time":
            call = calls[row]
            start = time.perf_counter()
            call()
            answer = repr(time.perf_counter() - start)
        elif request == "keep":
            answer = "kept"
            if track is not None and row == "tracker":
                write_tracks(Path(words[1]), track())
            else:
                keep(peer, row, ((image, None) for image in frames_of(job["video"])) if row == "frames" else inputs, Path(words[1]))
        else:
            answer = json.dumps(about_me())
        print(f"{ANSWER}{answer}", flush=True)


def call_of(peer: Peer, row: str, image: Array, boxes: Array | None) -> Callable[[], Any]:
    """What is timed: from a picture to what the library returns."""
    if row in {"detector", "frames"}:
        return lambda: peer.detect(image)
    prepared = peer.prepare(image)
    if row == "top-down":

        def find_all() -> tuple[Array, Any]:
            people = peer.boxes(peer.detect(image))
            return people, peer.estimate(prepared, people[:, :4])

        return find_all
    assert boxes is not None
    wanted = np.ascontiguousarray(boxes[: int(row.removeprefix("pose-"))])
    return lambda: peer.estimate(prepared, wanted)


def keep(peer: Peer, row: str, inputs: Any, path: Path) -> None:
    arrays: dict[str, Array] = {}
    for i, (image, boxes) in enumerate(inputs):
        result = call_of(peer, row, image, boxes)()
        keypoints = np.zeros((0, 0, 2))
        if row in {"detector", "frames"}:
            found = peer.boxes(result)
        elif row == "top-down":
            found, poses = result
            keypoints = peer.keypoints(poses)
        else:
            keypoints = peer.keypoints(result)
            found = boxes[: len(keypoints)]
        scores = found[:, 4:5] if found.shape[1] > 4 else np.full((len(found), 1), np.nan)
        arrays |= {f"boxes{i}": np.concatenate([found[:, :4], scores], axis=1).astype(np.float64), f"keypoints{i}": keypoints.astype(np.float64)}
    np.savez(path, **arrays)


def open_ours(job: Mapping[str, Any]) -> Peer:
    from modelcrate_runtime import Detector, PoseDetector

    geometry: Geometry = "sdk" if job["kind"] == "sdk" else "exact"
    return of_mmdeploys_kind(Detector(job["det"], geometry=geometry), PoseDetector(job["pose"], geometry=geometry), job["det_thr"])


def open_mmdeploy(job: Mapping[str, Any]) -> Peer:
    from mmdeploy_runtime import Detector, PoseDetector

    return of_mmdeploys_kind(Detector(job["det"], "cpu", 0), PoseDetector(job["pose"], "cpu", 0), job["det_thr"])


def of_mmdeploys_kind(detector: Any, estimator: Any, thr: float) -> Peer:
    """Ours and the SDK's: the same code, as its demos have it."""

    def people(result: Any) -> Array:
        boxes, labels, _ = result
        return np.asarray(boxes[(labels == 0) & (boxes[:, 4] >= thr)])

    return Peer(detect=detector, boxes=people, estimate=estimator, keypoints=lambda poses: np.asarray(poses[:, :, :2]), prepare=lambda image: image)


def open_rtmlib(job: Mapping[str, Any]) -> Peer:
    from rtmlib import RTMDet, RTMPose

    detector = RTMDet(f"{job['det']}/end2end.onnx", DETECTOR_HW, score_thr=job["det_thr"], backend="onnxruntime", device="cpu")
    estimator = RTMPose(f"{job['pose']}/end2end.onnx", POSE_WH, backend="onnxruntime", device="cpu")
    # RTMPose learns from RGB. rtmlib has its means in that order and leaves the picture's channels as they are: it gets them as the network wants them.
    return Peer(
        detect=detector,
        boxes=np.asarray,
        estimate=lambda image, boxes: estimator(image, bboxes=boxes),
        keypoints=lambda result: np.asarray(result[0]),
        prepare=lambda image: np.ascontiguousarray(image[:, :, ::-1]),
    )


def about_me() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in ("modelcrate", "mmdeploy-runtime", "rtmlib", "onnxruntime", "openvino", "numpy", "opencv-python-headless"):
        is_used = {"modelcrate": "modelcrate_runtime", "mmdeploy-runtime": "mmdeploy_runtime", "opencv-python-headless": "cv2"}.get(name, name) in sys.modules
        # The SDK has an ONNX Runtime of its own, the version that setup-sdk installs beside it.
        if is_used or (name == "onnxruntime" and SDK in sys.modules):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"versions": versions, "os_threads": int(next(line for line in status.splitlines() if line.startswith("Threads:")).split()[1])}


if __name__ == "__main__":
    main()
