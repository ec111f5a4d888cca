"""Converts every network of the zoo with random weights, by file and without a config: what the published checkpoints need beside a download.

usage: .venv/bin/python scripts/convert_zoo.py [-t TARGET] [--dry-run] [-o FOLDER] [WORD...]

Prints a table with the seconds and the parity of each. Models that differ only in what they were trained on are one network, converted once. Exits with 1
if one of them fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.describe import describe_pipeline
from modelcrate_converter.exportable import DetectorFacts
from modelcrate_converter.models.blueprints import random_weights
from modelcrate_converter.people import procedural_scenes
from modelcrate_converter.zoo import ZooModel, zoo_models
from modelcrate_runtime.preprocess import Preprocessor
from zoo_table import shapes_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only models whose names have all of these")
    parser.add_argument("-t", "--target", action="append")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; for TensorRT without a GPU")
    parser.add_argument("-o", "--out", type=Path, help="keep the bundles")
    options = parser.parse_args()
    configs = [load_config(name) for name in options.target or ["onnxruntime"]]
    table = Table("model", "target", "seconds", "worst output (relative L-inf)", "worst shift (px)", "verdict")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model in networks(options.words):
            path = Path(folder) / "random.pth"
            torch.save({"state_dict": calm(random_weights(shapes_of(model), seed=0), path), "meta": {"cfg": config_text(model)}}, path)
            start = time.perf_counter()
            made = convert(path, configs, ConvertOptions(out=options.out or Path(folder), name=model.name, keypoints=model.keypoints, dry_run=options.dry_run))
            for conversion in made:
                failed += conversion.error is not None
                row = cells(conversion, time.perf_counter() - start)
                table.add_row(model.name, conversion.target, *row)
                print(model.name, conversion.target, *row, file=sys.stderr, flush=True)
    Console(width=150).print(table)
    return 1 if failed else 0


def networks(words: list[str]) -> Iterator[ZooModel]:
    seen = set()
    for model in zoo_models().values():
        if all(word in model.name for word in words):
            network = (tuple(shapes_of(model).items()), model.input_hw)
            if network not in seen:
                seen.add(network)
                yield model


def calm(weights: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """A detector's predictions as trained ones are: small boxes that do not compete, a few of them above the threshold. Else noise decides between thousands."""
    if "bbox_head.rtm_reg.0.weight" not in weights:
        return weights
    for level in range(3):
        weights[f"bbox_head.rtm_reg.{level}.weight"] *= 0.02
        weights[f"bbox_head.rtm_reg.{level}.bias"] *= 0.0 if "backbone.stage2.1.blocks.3.conv1.conv.weight" in weights else 0.5  # exponentiated, or not
    torch.save(weights, path)
    model = read_architecture(read_checkpoint(path))
    assert isinstance(model.postprocess, DetectorFacts)
    threshold = math.log(model.postprocess.score_thr / (1 - model.postprocess.score_thr))
    _, image, _ = procedural_scenes(1)[0]
    tensor, _ = Preprocessor(describe_pipeline(model, has_nms=False), geometry="exact", where=model.name).image(image)
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(tensor))[:3]
    for level, values in enumerate(logits):
        weights[f"bbox_head.rtm_cls.{level}.bias"] += threshold - float(values.flatten().topk(8).values[-1])
    return weights


def config_text(model: ZooModel) -> str:
    """Of heatmap models the input size, which only a config says: the published checkpoints have theirs inside."""
    height, width = model.input_hw
    is_heatmap = model.task == "PoseDetector" and not model.name.startswith("rtmpose")
    return f"model = dict(head=dict(decoder=dict(type='UDPHeatmap', input_size=({width}, {height}))))" if is_heatmap else ""


def cells(conversion: Conversion, seconds: float) -> list[str]:
    record = conversion.parity
    outputs = max((output.relative_linf for output in record.outputs), default=0.0) if record else float("nan")
    shifts = [figure.worst for figure in record.pixels if figure.name.endswith("_px")] if record else []
    return [f"{seconds:.1f}", f"{outputs:.1e}", f"{max(shifts):.2g}" if shifts else "", str(conversion.error or "ok")]


if __name__ == "__main__":
    sys.exit(main())
