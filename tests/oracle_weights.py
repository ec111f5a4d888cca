"""Weights that anyone can rebuild from a state dict's keys and shapes, and what upstream's networks compute with them.

The rule is that of the folder the reference outputs come from: MMPose 1.3.2 and MMDetection 3.3.0, float32 on a CPU.
`tests/data/oracle` holds `<name>.npz` (outputs) and `<name>.keys.txt.gz` (key, shape, in file order) for the models that are always tested.
"""

from __future__ import annotations

import ast
import gzip
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

ORACLE = Path(__file__).parent / "data" / "oracle"
MORE = Path(__file__).parents[2] / "shared" / "oracle"
"""Further models, beside the checkout; may not be there."""
_SHARED_CONV = re.compile(r"bbox_head\.(cls|reg)_convs\.\d+\.(\d+)\.conv\.weight")


def oracle_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The state dict of a model, key -> shape, in file order."""
    packed = ORACLE / f"{name}.keys.txt.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else (MORE / f"{name}.keys.txt").read_text()
    rows = (line.split("\t") for line in text.splitlines() if line)
    return {key: tuple(ast.literal_eval(shape)) for key, shape in rows}


def oracle_outputs(name: str) -> dict[str, np.ndarray]:
    """What upstream computes: simcc_x, simcc_y | cls_0..2, bbox_0..2."""
    path = ORACLE / f"{name}.npz"
    with np.load(path if path.is_file() else MORE / f"{name}.npz") as stored:
        return dict(stored)


def oracle_input(name: str) -> np.ndarray:
    """The input behind `oracle_outputs`, (1, 3, H, W) float32; the size stands at the end of the name."""
    height, _, width = name.rpartition("-")[2].partition("x")
    return np.random.default_rng(0).standard_normal((1, 3, int(height), int(width or height))).astype(np.float32)


def oracle_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights by the rule. A detector whose levels share their convolutions keeps, for all of them, the value of the last key."""
    weights = {key: torch.from_numpy(_weight(key, shape)) for key, shape in shapes.items()}
    last: dict[str, str] = {}
    for key in weights:
        if found := _SHARED_CONV.fullmatch(key):
            last[f"{found[1]} {found[2]}"] = key
    for key in weights:
        if found := _SHARED_CONV.fullmatch(key):
            weights[key] = weights[last[f"{found[1]} {found[2]}"]]
    return weights


def _weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) <= 1:
        value = rng.uniform(0.5, 1.5, shape) if key.endswith(("weight", ".g", "gamma", "scale")) else 0.1 * rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    if key.endswith("conv2.pointwise_conv.bn.weight"):
        value = value * 0.3
    if "rtm_reg" in key or "rtm_cls" in key:
        value = value * 0.1
    return np.asarray(value, dtype=np.float32)
