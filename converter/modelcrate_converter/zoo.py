"""The published models by name: where they are, what their hash begins with, and what their pages say of them (`zoo.toml`)."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from modelcrate_bundle.errors import ConfigError, DownloadError
from modelcrate_converter.download import download
from modelcrate_converter.progress import Noted, Report, ignore


class ZooModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One published checkpoint.

    Attributes:
        name: `<architecture>-<size>_<data>-<input>`.
        aliases: shorter names.
        task: MMDeploy's name of it.
        input_hw: network input (height, width) in pixels.
        keypoints: the set that its keypoints are of, one of `modelcrate_runtime.skeletons.DATA_SETS`; empty where there are none.
        parameters_m: millions, as its page has it.
        flops_g: multiply-adds in thousand millions, as its page has it.
        metrics: name -> figure, as its page has it.
        sha256: what the file's hash begins with; empty where the file's name does not say.
        urls: the same file in several places, best first.
    """

    name: str
    aliases: tuple[str, ...] = ()
    task: Literal["Detector", "PoseDetector", "Classifier"]
    input_hw: tuple[int, int]
    keypoints: str = ""
    parameters_m: float | None = None
    flops_g: float | None = None
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    sha256: str = ""
    urls: tuple[str, ...]


class _Zoo(msgspec.Struct):
    model: list[ZooModel]


@functools.cache
def zoo_models() -> Mapping[str, ZooModel]:
    """Name -> model, in the order of `zoo.toml`."""
    rows = msgspec.toml.decode((Path(__file__).parent / "zoo.toml").read_bytes(), type=_Zoo).model
    return {model.name: model for model in rows}


def find_model(name: str) -> ZooModel | None:
    """The model of a name or alias, in any case; None when there is none."""
    lowered = name.lower()
    by_alias = {alias: model for model in zoo_models().values() for alias in model.aliases}
    return zoo_models().get(lowered) or by_alias.get(lowered)


def get_model(name: str) -> ZooModel:
    """The model of a name or alias.

    Raises:
        ConfigError: there is none; the nearest names are offered.
    """
    model = find_model(name)
    if model is None:
        near = nearest_names(name)
        raise ConfigError(
            f"{name}: expected the name of a published model, found none",
            hint=f"did you mean {' or '.join(near)}?" if near else "modelcrate zoo list shows them",
        )
    return model


def nearest_names(name: str) -> list[str]:
    """Up to three names and aliases that look like this one."""
    known = [*zoo_models(), *(alias for model in zoo_models().values() for alias in model.aliases)]
    return difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)


def fetch_model(model: ZooModel, *, cache_dir: Path, offline: bool = False, report: Report = ignore) -> Path:
    """The checkpoint of a model, from the cache or from the first of its places that has it.

    Args:
        model: which.
        cache_dir: see `modelcrate_converter.download`.
        offline: never touch the network.
        report: gets the progress.

    Raises:
        DownloadError: no place has it; the message names them all.
    """
    errors: list[DownloadError] = []
    for url in model.urls:
        try:
            return download(url, cache_dir=cache_dir, sha256=model.sha256 or None, offline=offline, report=report)
        except DownloadError as error:
            errors.append(error)
            if url != model.urls[-1]:
                report(Noted(text=f"{error}: trying the next place", level="warning"))
    raise DownloadError(
        f"{model.name}: expected one of {len(model.urls)} places to have the checkpoint, found: {'; '.join(str(error) for error in errors)}",
        hint="get the file from anywhere, and give its path: modelcrate convert FILE.pth",
    )
