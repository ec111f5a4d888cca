"""The main job on the two models that come along, which were trained on drawn people alone: from checkpoints to verified bundles, and to a picture.

usage: scripts/demo [FOLDER]   (default: demo)
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from modelcrate_converter.builders import can_build
from modelcrate_converter.config import load_config, target_names
from modelcrate_converter.demo import DEMO_SEED
from modelcrate_converter.people import Scene, draw_scene
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.images import write_image

CALLS = 40


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scene = draw_scene(DEMO_SEED, size_hw=(480, 640), people=(4, 6))
    write_image(folder / "scene.png", scene.image)
    print(f"drew {folder}/scene.png: {len(scene.people)} people whom neither model has seen")
    targets = [name for name in target_names() if load_config(name).precision == "fp32" and can_build(load_config(name).backend)]
    crates = folder / "crates"
    options = [word for target in targets for word in ("-t", target)]
    show(["modelcrate", "convert", "demo-det", "demo-pose", *options, "-o", str(crates), "--image", str(folder / "scene.png")])
    for target in targets:
        bundles = [str(crates / f"{name}_{target}") for name in ("demo-det", "demo-pose")]
        show(["modelcrate", "run", *bundles, str(folder / "scene.png"), "--save", str(folder / f"people_{target}.png")])
    profile(crates, targets, scene)
    print(f"\nLook at {folder}/people_{targets[0]}.png. Next, with your own RTMPose or RTMDet checkpoint:")
    print("  .venv/bin/modelcrate convert YOUR.pth -t onnxruntime -o crates/ --image YOUR.jpg")
    print("  .venv/bin/modelcrate run crates/<name>_onnxruntime YOUR.jpg --save out.png")


def profile(crates: Path, targets: list[str], scene: Scene) -> None:
    """What each step costs on this machine."""
    boxes = np.stack([person.box_xyxy for person in scene.people])
    table = Table("target", "what", "median", "p90", "per second", title=f"\n{CALLS} calls each, preparation and decoding included")
    for target in targets:
        with Detector(crates / f"demo-det_{target}", warmup=3) as detector, PoseDetector(crates / f"demo-pose_{target}", warmup=3) as estimator:
            steps: list[tuple[str, Callable[[], object]]] = [
                ("find people (demo-det)", lambda d=detector: d.detect(scene.image)),  # type: ignore[misc]
                ("one pose (demo-pose)", lambda e=estimator: e.estimate(scene.image, boxes[:1])),  # type: ignore[misc]
                (f"{len(boxes)} poses at once", lambda e=estimator: e.estimate(scene.image, boxes)),  # type: ignore[misc]
            ]
            for what, call in steps:
                seconds = sorted(timed(call) for _ in range(CALLS))
                middle, slow = seconds[CALLS // 2], seconds[CALLS * 9 // 10]
                table.add_row(target, what, f"{1e3 * middle:.2f} ms", f"{1e3 * slow:.2f} ms", f"{1 / middle:.0f}")
    Console().print(table)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(command: list[str]) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo"))
