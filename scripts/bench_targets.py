"""Time of one network call per target, all taking turns: what each precision of each backend costs on this machine, as ratios to ONNX Runtime in float32.

usage: .venv/bin/python scripts/bench_targets.py [--model rtmpose-m] [--rounds 100] [--boxes 8] [--threads N] [--json FILE]

The networks have random weights: speed does not depend on them. One input per call, and so many crops of one image through PoseDetector.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from convert_zoo import calm
from modelcrate_bundle.bundle import Bundle
from modelcrate_converter.builders import can_build
from modelcrate_converter.config import load_config, target_names
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.models.blueprints import random_weights
from modelcrate_converter.people import procedural_scenes
from modelcrate_converter.zoo import get_model
from modelcrate_runtime import PoseDetector, SessionOptions, open_session
from zoo_table import shapes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rtmpose-m")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = get_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save({"state_dict": calm(random_weights(shapes_of(model), seed=0), path)}, path)
        configs = [config for config in map(load_config, target_names()) if can_build(config.backend, config.precision)]
        made = convert(path, configs, ConvertOptions(out=Path(folder), name=model.name, verify=False))
        bundles = {conversion.target: Bundle.open(conversion.place) for conversion in made if conversion.error is None}
        single = medians({target: one_call(bundle, options.threads) for target, bundle in bundles.items()}, options.rounds)
        several: dict[str, float] = {}
        if model.task == "PoseDetector":
            several = medians({target: boxes_call(bundle, options.boxes, options.threads) for target, bundle in bundles.items()}, max(options.rounds // 4, 5))
    title = f"{model.name}, {options.rounds} rounds; times as fast as ONNX Runtime in float32"
    table = Table("target", "ms, one input", "times", f"ms, {options.boxes} boxes", "times", title=title)
    for target, value in single.items():
        row = [f"{value:.2f}", f"{single['onnxruntime'] / value:.2f}"]
        row += [f"{several[target]:.1f}", f"{several['onnxruntime'] / several[target]:.2f}"] if several else ["", ""]
        table.add_row(target, *row)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"one": single, "boxes": several}, indent=1) + "\n")


def one_call(bundle: Bundle, threads: int | None) -> Callable[[], object]:
    session = open_session(bundle, SessionOptions(threads=threads))
    spec = session.inputs[0]
    shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
    feeds = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    return lambda: session.run(feeds)


def boxes_call(bundle: Bundle, boxes: int, threads: int | None) -> Callable[[], object]:
    estimator = PoseDetector(bundle, threads=threads)
    _, image, box = procedural_scenes(1)[0]
    rows = np.repeat(box[None], boxes, axis=0) + np.arange(boxes, dtype=np.float32)[:, None]
    return lambda: estimator.estimate(image, rows)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds: every round each of them has its turn, so that what else the machine does hits all alike. ncnn has its rounds before the others: its
    threads go on spinning after a call, at the expense of the next one."""
    alone = {name: call for name, call in calls.items() if name.startswith("ncnn")}
    return _taking_turns(alone, rounds) | _taking_turns({name: call for name, call in calls.items() if name not in alone}, rounds)


def _taking_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= 5:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
