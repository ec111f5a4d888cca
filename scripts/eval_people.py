"""Accuracy of a detector and a pose estimator on procedural people that neither was trained on: COCO's AP, through bundles and runtime.

usage: .venv/bin/python scripts/eval_people.py [DET.pth POSE.pth] [--count 500] [--target onnxruntime] [--json FILE] [--write]

Without files the demo models. Boxes and keypoints are scored by faster-coco-eval as pycocotools would; keypoints once with true boxes and once with the
detector's. --write puts the figures into the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS, HELD_OUT_SEED
from modelcrate_converter.people import DATA_VERSION, Scene, draw_scene
from modelcrate_converter.people.dataset import coco_annotations
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.accuracy import Accuracy, Dataset, box_rows, coco_figures, pose_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="DET.pth POSE.pth")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="put the figures into the checkpoints")
    options = parser.parse_args()
    paths = options.checkpoints or list(DEMO_MODELS.values())
    if len(paths) != 2:
        parser.error("expected a detector and a pose estimator")
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for path, name in zip(paths, DEMO_MODELS, strict=True):
            (conversion,) = convert(path, [load_config(options.target)], ConvertOptions(out=Path(folder), name=name))
            if conversion.error:
                raise conversion.error
            bundles.append(conversion.place)
        figures = measure(bundles[0], bundles[1], count=options.count, seed=options.seed)
    table = Table("what", "AP", "AP50", "AP75", "AR", title=f"{options.count} held-out scenes (seed {options.seed}, {DATA_VERSION}), {options.target}")
    for what, of in figures.items():
        table.add_row(what, *(f"{of[name]:.3f}" for name in ("AP", "AP50", "AP75", "AR")))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.write:
        stamp(paths[0], {"boxes": figures["boxes"]}, options)
        stamp(paths[1], {key: value for key, value in figures.items() if key != "boxes"}, options)


def measure(detector_bundle: Path, pose_bundle: Path, *, count: int, seed: int) -> dict[str, dict[str, float]]:
    """COCO figures of both models: boxes, keypoints with true boxes, keypoints with the detector's boxes (those scoring 0.05 and more, as MMPose has it)."""
    scenes: list[Scene] = [draw_scene(seed, index) for index in track(range(count), description="draw", transient=True)]
    names = [(f"{i:06d}", scene.people) for i, scene in enumerate(scenes)]
    truth = Dataset.of(coco_annotations(names, size_hw=(320, 320), info={}), annotations=Path("procedural"), folder=Path())
    boxes, given, found = Accuracy(kind="bbox"), Accuracy(kind="keypoints"), Accuracy(kind="keypoints")
    with Detector(detector_bundle) as detector, PoseDetector(pose_bundle) as estimator:
        manifest = estimator.bundle.manifest
        sigmas = manifest.keypoints.sigmas if manifest and manifest.keypoints else []
        for image_id, scene in enumerate(track(scenes, description="run", transient=True), start=1):
            detections = detector.detect(scene.image)
            boxes.rows += box_rows(image_id, detections, [1])
            true_boxes = np.array([person.box_xyxy for person in scene.people], dtype=np.float32).reshape(-1, 4)
            given.rows += pose_rows(image_id, 1, estimator.estimate(scene.image, true_boxes), np.ones(len(true_boxes)))
            found.rows += pose_rows(image_id, 1, estimator.estimate(scene.image, detections.boxes_xyxy), detections.scores)
    return {
        "boxes": coco_figures(truth, boxes),
        "keypoints, true boxes": coco_figures(truth, given, sigmas),
        "keypoints, detected boxes": coco_figures(truth, found, sigmas),
    }


def stamp(path: Path, figures: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    content = torch.load(path, weights_only=True)
    made = json.loads(content["meta"]["modelcrate"])
    rounded = {what: {name: round(value, 4) for name, value in of.items()} for what, of in figures.items()}
    made["metrics"] = {"data": DATA_VERSION, "seed": options.seed, "scenes": options.count, **rounded}
    content["meta"]["modelcrate"] = json.dumps(made)
    torch.save(content, path, _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
