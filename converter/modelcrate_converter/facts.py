"""What the shapes of the weights cannot say, and who says it: the checkpoint's own config, a config given by the user, a named default.

A value that makes no sense is an error that names the source; two sources that disagree are an error that names both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeGuard

from modelcrate_bundle.errors import ConfigError
from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_converter.checkpoint import Checkpoint
from modelcrate_converter.mmconfig import ModelConfig, read_config_file, read_config_text
from modelcrate_converter.mmconfig_values import Unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a fact must be: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any, count: int, least: float) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(is_number(v) and v > least for v in value)


FRACTION: Final = Expected(words="a number from 0 to 1", test=lambda v: is_number(v) and 0 <= v <= 1)
POSITIVE: Final = Expected(words="a positive number", test=lambda v: is_number(v) and v > 0)
NOT_NEGATIVE: Final = Expected(words="a number of at least 0", test=lambda v: is_number(v) and v >= 0)
COUNT: Final = Expected(words="a whole number of at least 1", test=lambda v: is_number(v) and v >= 1 and v == int(v))
LEVEL: Final = Expected(words="an image level from 0 to 255", test=lambda v: is_number(v) and 0 <= v <= 255)
FLAG: Final = Expected(words="true or false", test=lambda v: isinstance(v, bool))
CHANNELS: Final = Expected(words="three numbers", test=lambda v: _is_numbers(v, 3, -math.inf))
DEVIATIONS: Final = Expected(words="three positive numbers", test=lambda v: _is_numbers(v, 3, 0))
PAIR: Final = Expected(words="two positive numbers", test=lambda v: _is_numbers(v, 2, 0))
HEATMAP_CODEC: Final = Expected(words="UDPHeatmap or MSRAHeatmap", test=lambda v: v in {"UDPHeatmap", "MSRAHeatmap"})
RESAMPLING: Final = Expected(words="Pillow's bicubic or OpenCV's bilinear resize", test=lambda v: v in {"pillow-bicubic", "opencv-bilinear"})
NAME: Final = Expected(words="a name", test=lambda v: isinstance(v, str))
NAMES: Final = Expected(words="names", test=lambda v: isinstance(v, tuple))


@dataclass(kw_only=True, slots=True)
class Sources:
    """Everyone who may know a fact, best first, and what was taken from whom.

    Attributes:
        configs: (who, top-level values).
        dataset_meta: the checkpoint's.
        taken: fact -> who said it, or "default: value".
    """

    configs: list[tuple[str, Mapping[str, Any]]]
    dataset_meta: Mapping[str, Any]
    taken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model_config: Path | None) -> Sources:
        """Collect the sources; an embedded config that cannot be read is noted and ignored, a given one is an error."""
        configs: list[tuple[str, Mapping[str, Any]]] = []
        text = checkpoint.meta.get("cfg")
        taken = {}
        if isinstance(text, str):
            try:
                configs.append(("the checkpoint's config", _unwrapped(read_config_text(text, source=f"{checkpoint.path}: embedded config").values)))
            except ConfigError as error:
                taken["embedded config"] = f"not readable, ignored: {error}"
        if model_config is not None:
            given: ModelConfig = read_config_file(model_config)
            if given.missing_bases:
                taken["--model-config"] = f"bases that are not there: {', '.join(given.missing_bases)}"
            configs.append((f"--model-config {model_config.name}", _unwrapped(given.values)))
        meta = checkpoint.meta.get("dataset_meta")
        return cls(configs=configs, dataset_meta=meta if isinstance(meta, Mapping) else {}, taken=taken)

    def fact(self, name: str, read: Callable[[Mapping[str, Any]], Any], expected: Expected, *, default: Any, extra: tuple[tuple[str, Any], ...] = ()) -> Any:
        """One fact.

        Args:
            name: what it is called in messages and in the manifest.
            read: takes it from a config, or gives None.
            expected: what it must be.
            default: what published configs have.
            extra: further sources as (who, value or None), better than the configs.

        Raises:
            ConfigError: two sources disagree, or a value is not what it must be.
        """
        readings = [*extra, *((who, read(config)) for who, config in self.configs)]
        known = [(who, value) for who, value in readings if value is not None]
        for who, value in known:
            if not expected.test(value):
                raise ConfigError(f"{name}: {who}: expected {expected.words}, found {shown(value)}", hint="give a config that this checkpoint can be run with")
        for who, value in known[1:]:
            if not _agree(value, known[0][1]):
                raise ConfigError(
                    f"{name}: {known[0][0]} says {shown(known[0][1])}, {who} says {shown(value)}: expected them to agree",
                    hint="give the config that this checkpoint was trained with",
                )
        if known:
            self.taken[name] = known[0][0]
            return known[0][1]
        self.taken[name] = f"default: {shown(default)}"
        return default

    def must_match(self, name: str, read: Callable[[Mapping[str, Any]], Any], *, weights: Any) -> None:
        """Refuse a config that contradicts what the tensors say.

        Raises:
            ConfigError: naming the source and both values.
        """
        for who, config in self.configs:
            value = read(config)
            if value is not None and not _agree(value, weights):
                raise ConfigError(
                    f"{name}: the weights say {shown(weights)}, {who} says {shown(value)}: expected them to agree",
                    hint="give the config that this checkpoint was trained with",
                )


def _unwrapped(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the network's own dict as its `model`: MMRazor has it one level deeper to deploy it, and two to fine-tune it."""
    for path in ("model.algorithm.architecture", "model.architecture"):
        network = at(config, path)
        if isinstance(network, Mapping):
            return {**config, "model": network}
    return config


def _agree(a: Any, b: Any) -> bool:
    """Equality, but for the last digits of numbers: configs compute them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_agree(x, y) for x, y in zip(a, b, strict=True))
    if is_number(a) and is_number(b):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def at(config: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path; None where the path ends early or at something that was not plain data. Of a list, the last item."""
    value: Any = config
    for part in path.split("."):
        if isinstance(value, list):
            value = value[-1] if value else None
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return None if isinstance(value, Unknown) else value


def numbers(value: Any) -> Any:
    """A list or tuple of numbers as a tuple of floats; anything else as it is, for `Expected` to refuse."""
    if isinstance(value, (list, tuple)) and value and all(is_number(v) for v in value):
        return tuple(float(v) for v in value)
    return value


def option(step: Mapping[str, Any], key: str, default: Any) -> Any:
    """A transform's option; None when the config computes it in a way that we do not follow."""
    value = step.get(key, default)
    return None if isinstance(value, Unknown) else value


def transform(config: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """A transform of the test pipeline, whatever the scope prefix of its type."""
    for path in ("test_dataloader.dataset.pipeline", "val_dataloader.dataset.pipeline", "test_pipeline", "val_pipeline"):
        pipeline = at(config, path)
        for step in pipeline if isinstance(pipeline, (list, tuple)) else ():
            if isinstance(step, Mapping) and str(step.get("type", "")).rpartition(".")[2] == kind:
                return step
    return None


def shown(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        items = [shown(v) for v in value[:6]] + (["..."] if len(value) > 6 else [])
        return f"({', '.join(items)})"
    return str(value)


def keypoints_of(meta: Mapping[str, Any], *, count: int) -> KeypointInfo | None:
    """MMPose's dataset_meta as ours; None when it is not there or of another number of keypoints.

    A list with an entry that makes no sense is left out as a whole; a link to a keypoint that is not there goes with its colour.
    """
    by_id = meta.get("keypoint_id2name")
    if not isinstance(by_id, Mapping) or len(by_id) != count:
        return None
    names = [str(by_id.get(i, by_id.get(str(i), f"keypoint_{i}"))) for i in range(count)]
    links, link_colors = _links(meta.get("skeleton_links"), meta.get("skeleton_link_colors"), count=count)
    colors = _rows(meta.get("keypoint_colors"), 3, 256)
    sigmas = meta.get("sigmas")
    has_sigmas = isinstance(sigmas, list) and len(sigmas) == count and all(is_number(s) and s > 0 for s in sigmas)
    return KeypointInfo(
        names=names,
        skeleton=links,
        flip_pairs=sorted({(min(a, b), max(a, b)) for a, b in _rows(meta.get("flip_pairs"), 2, count)}),
        sigmas=[round(float(s), 6) for s in sigmas] if has_sigmas and isinstance(sigmas, list) else [],
        colors=[(r, g, b) for r, g, b in colors] if len(colors) == count else [],
        link_colors=link_colors,
    )


def _links(value: Any, colors: Any, *, count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    rows, shades = _rows(value, 2, 2**31), _rows(colors, 3, 256)
    kept = [i for i, row in enumerate(rows) if max(row) < count]
    return [(rows[i][0], rows[i][1]) for i in kept], [(shades[i][0], shades[i][1], shades[i][2]) for i in kept] if len(shades) == len(rows) else []


def _rows(value: Any, width: int, limit: int) -> list[list[int]]:
    """Rows of so many whole numbers from 0 below the limit; empty if any row is something else."""
    rows = value if isinstance(value, list) else []
    good = all(isinstance(row, (list, tuple)) and len(row) == width and all(is_number(v) and v == int(v) and 0 <= v < limit for v in row) for row in rows)
    return [[int(v) for v in row] for row in rows] if good else []
