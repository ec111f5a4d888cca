"""The main job on checkpoints made here: RANDOM weights, so that the numbers show agreement with PyTorch and nothing else.

usage: scripts/demo [FOLDER]   (default: demo)
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import torch

from modelcrate_converter.models.blueprints import DETECTOR_SIZES, POSE_SIZES, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.scenes import procedural_scenes
from modelcrate_runtime.images import write_image


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    widen, deepen = POSE_SIZES["t"]
    pose = rtmpose_shapes(widen=widen, deepen=deepen, keypoints=17, input_hw=(256, 192))
    widen, deepen = DETECTOR_SIZES["nano"]
    detector = rtmdet_shapes(widen=widen, deepen=deepen, classes=1, separable=True)
    for name, shapes in (("RANDOM_rtmpose_t.pth", pose), ("RANDOM_rtmdet_nano.pth", detector)):
        torch.save({"state_dict": random_weights(shapes, seed=0)}, folder / name)
    _, image, box = procedural_scenes(1)[0]
    write_image(folder / "scene.png", image)
    print(f"made {folder}/RANDOM_rtmpose_t.pth and {folder}/RANDOM_rtmdet_nano.pth: random weights, nothing is learned in them")
    crates = folder / "crates"
    checkpoints = [str(folder / "RANDOM_rtmpose_t.pth"), str(folder / "RANDOM_rtmdet_nano.pth")]
    show(["modelcrate", "convert", *checkpoints, "-t", "onnxruntime", "-o", str(crates), "--image", str(folder / "scene.png")])
    corners = ",".join(f"{v:.0f}" for v in box)
    show(["modelcrate", "run", str(crates / "rtmpose-t_onnxruntime"), str(folder / "scene.png"), "--box", corners, "--save", str(folder / "pose.png")])
    show(["modelcrate", "inspect", str(crates / "rtmdet-nano_onnxruntime")])
    print("\nThe weights are random, so the keypoints mean nothing; the parity tables mean what they say. With a real checkpoint:")
    print("  .venv/bin/modelcrate convert YOUR.pth -t onnxruntime -o crates/ --image YOUR.jpg")
    print("  .venv/bin/modelcrate run crates/<name>_onnxruntime YOUR.jpg --save out.png")


def show(command: list[str]) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo"))
