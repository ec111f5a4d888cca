"""Figures of the ONNX Runtime path, against MMDeploy's SDK on the same weights where there is one, all in one run.

usage: .venv/bin/python scripts/bench_runtime.py [--rounds 30] [--json FILE]

Weights are random: speed does not depend on them. Peers take turns in blocks of ten calls, each in its own process; the ratio is that of the medians.
MMDeploy's SDK gets the graph as MMDeploy exports it, and once more the one that modelcrate wrote for ONNX Runtime, which makes the SDK faster too.
Needs `.venv-sdk` (scripts/setup-sdk) for the comparison and says so where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from modelcrate_converter.config import CONFIG_FOLDER
from modelcrate_converter.models.blueprints import POSE_SIZES, random_weights, rtmpose_shapes
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime import PoseDetector
from modelcrate_runtime.geometry import Geometry

ROOT = Path(__file__).parents[1]
SDK_PYTHON = ROOT / ".venv-sdk/bin/python"
BIN = Path(sys.executable).parent

# The peer's process: loads a bundle, then answers each line on its standard input with the seconds of one call.
SDK_SERVER = """
import json, sys, time
import mmdeploy_runtime, numpy as np
bundle, image, boxes = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
pose = mmdeploy_runtime.PoseDetector(bundle, "cpu", 0)
result = pose(image, boxes)
np.save(sys.argv[4], result)
for line in sys.stdin:
    started = time.perf_counter()
    pose(image, boxes)
    print("TIME", time.perf_counter() - started, flush=True)
"""

COLD_START = """
import time; started = time.perf_counter()
import sys, numpy as np
image = np.load(sys.argv[2])
loaded = time.perf_counter()
from modelcrate_runtime import PoseDetector
PoseDetector(sys.argv[1])(image, [100, 50, 300, 400])
print(time.perf_counter() - loaded)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each peer")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.rounds)
    table = Table("what", "figure", "bar", title=f"{os.cpu_count()} cores, {options.rounds} rounds, medians")
    for row in figures:
        table.add_row(row["what"], row["shown"], row["bar"])
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, rounds: int) -> list[dict[str, object]]:
    figures: list[dict[str, object]] = []
    _, image, _ = procedural_scenes(1)[0]
    np.save(folder / "image.npy", image)
    rng = np.random.default_rng(0)
    corners = rng.uniform((0, 0), (380, 240), (8, 2))
    boxes = np.concatenate([corners, corners + rng.uniform((80, 120), (240, 230), (8, 2))], axis=1).astype(np.float32)
    for size in ("t", "m"):
        widen, deepen = POSE_SIZES[size]
        torch.save(
            {"state_dict": random_weights(rtmpose_shapes(widen=widen, deepen=deepen, keypoints=17, input_hw=(256, 192)), seed=0)}, folder / f"{size}.pth"
        )
        started = time.perf_counter()
        convert(folder / f"{size}.pth", "onnxruntime", folder)
        seconds = time.perf_counter() - started
        plain = folder / "plain/onnxruntime.toml"
        plain.parent.mkdir(exist_ok=True)
        text = (CONFIG_FOLDER / "onnxruntime.toml").read_text()
        for name in ("transpose_wide_kernels", "lay_portraits_down"):
            text = text.replace(f"{name} = true", f"{name} = false")
        plain.write_text(text)
        convert(folder / f"{size}.pth", plain, plain.parent)
        if size == "m":
            figures.append({"what": "convert RTMPose-m, parity included", "seconds": seconds, "shown": f"{seconds:.1f} s", "bar": "<= 15 s"})
    cold = [
        float(
            subprocess.run(
                [sys.executable, "-c", COLD_START, folder / "rtmpose-t_onnxruntime", folder / "image.npy"], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(5)
    ]
    figures.append({"what": "import, open, first result, RTMPose-t", "seconds": cold, "shown": f"{median(cold):.2f} s", "bar": "<= 0.7 s"})
    figures += [overhead(folder, image, boxes[:1], rounds * 5, geometry=geometry) for geometry in ("exact", "sdk")]
    for size in ("t", "m"):
        figures += against_sdk(folder, size, image, boxes, rounds)
    return figures


def convert(checkpoint: Path, target: str | Path, output: Path) -> None:
    subprocess.run([BIN / "modelcrate", "convert", checkpoint, "-t", target, "-o", output], check=True, capture_output=True)


def overhead(folder: Path, image: np.ndarray, box: np.ndarray, rounds: int, *, geometry: Geometry) -> dict[str, object]:
    """What PoseDetector(img, box) does outside session.run, as a share of the call."""
    with PoseDetector(folder / "rtmpose-m_onnxruntime", geometry=geometry, warmup=3) as pose:
        inside: list[float] = []
        run = pose.session.run

        def timed_run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            started = time.perf_counter()
            outputs = run(feeds)
            inside.append(time.perf_counter() - started)
            return outputs

        pose.session.run = timed_run  # type: ignore[method-assign]  # the measurement itself
        calls = []
        for _ in range(rounds):
            started = time.perf_counter()
            pose(image, box)
            calls.append(time.perf_counter() - started)
    shares = [(call - run_s) / call for call, run_s in zip(calls, inside, strict=True)]
    shown = f"{100 * median(shares):.1f} % of {1e3 * median(calls):.1f} ms"
    return {"what": f"PoseDetector outside session.run, RTMPose-m, one box, {geometry} geometry", "share": median(shares), "shown": shown, "bar": "<= 5 %"}


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ask(server: subprocess.Popen[str]) -> float:
    """The seconds of one call in the peer's process."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("go\n")
    server.stdin.flush()
    return float(next(line for line in server.stdout if line.startswith("TIME")).split()[1])


def serve(bundle: Path, folder: Path, boxes: np.ndarray) -> subprocess.Popen[str]:
    """The peer's process on a bundle; its result is in `sdk.npy` once it has answered."""
    arguments = [SDK_PYTHON, "-c", SDK_SERVER, bundle, folder / "image.npy", json.dumps(boxes.tolist()), folder / "sdk.npy"]
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"SPDLOG_LEVEL": "off"}
    )


def against_sdk(folder: Path, size: str, image: np.ndarray, boxes: np.ndarray, rounds: int) -> list[dict[str, object]]:
    """Eight boxes: ours, a bare batched session.run, and MMDeploy's SDK, in turns."""
    bundle = folder / f"rtmpose-{size}_onnxruntime"
    name = f"8 boxes, RTMPose-{size}"
    servers = {}
    if SDK_PYTHON.is_file():
        servers = {"mmdeploy_runtime": serve(folder / "plain" / bundle.name, folder, boxes), "mmdeploy_runtime on our graph": serve(bundle, folder, boxes)}
    times: dict[str, list[float]] = {key: [] for key in ("ours", "session.run", *servers)}

    def block(what: str, call: Callable[[], float]) -> None:
        """Consecutive calls, as in a stream of frames; the first two, in which threads wake up, do not count."""
        time.sleep(0.2)  # until the threads of whoever ran before have stopped to spin
        times[what] += [call() for _ in range(12)][2:]

    bare = onnxruntime.InferenceSession(bundle / "end2end.onnx", providers=["CPUExecutionProvider"])  # as anyone would open it
    with PoseDetector(bundle, warmup=1) as pose:
        tensor = np.zeros((len(boxes), 3, 256, 192), dtype=np.float32)
        for _ in range(max(1, rounds // 10)):
            for key, server in servers.items():
                block(key, lambda server=server: ask(server))
            block("ours", lambda: timed(lambda: pose(image, boxes)))
            block("session.run", lambda: timed(lambda: bare.run(None, {"input": tensor})))
    if servers:
        with PoseDetector(bundle, geometry="sdk") as pose:
            difference = np.abs(pose(image, boxes) - np.load(folder / "sdk.npy")).max()
        assert difference < 1e-3, f"not the same results: {difference}"
    for server in servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait(10)
    middle = {key: median(values) for key, values in times.items()}
    extra = 100 * (middle["ours"] / middle["session.run"] - 1)
    rows: list[dict[str, object]] = [
        {
            "what": f"{name}: ours over bare batched session.run",
            "times": times,
            "shown": f"{1e3 * middle['ours']:.1f} ms over {1e3 * middle['session.run']:.1f} ms: {extra:+.1f} %",
            "bar": "<= +5 %",
        }
    ]
    for key in servers:
        ratio = middle[key] / middle["ours"]
        rows.append({"what": f"{name}: {key} over ours", "ratio": ratio, "shown": f"{1e3 * middle[key]:.1f} ms: {ratio:.2f} times", "bar": ">= 1.3"})
    if not servers:
        rows.append({"what": f"{name}: mmdeploy_runtime", "shown": "not here: run scripts/setup-sdk", "bar": ">= 1.3"})
    return rows


if __name__ == "__main__":
    main()
