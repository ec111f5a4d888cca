"""What the user wrote for a checkpoint: a path, a URL, or the name of a model of the zoo or of the demo."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelcrate_bundle.errors import ConfigError

if TYPE_CHECKING:
    from modelcrate_converter.convert import ConvertOptions
    from modelcrate_converter.progress import Event
    from modelcrate_runtime.subjects import Subject


def locate(text: str, options: ConvertOptions, *, offline: bool, sha256: str | None, report: Callable[[Event], None]) -> tuple[Path | None, ConvertOptions]:
    """The file behind what the user wrote, if any, and the options with what its name says. A file wins over a name.

    Raises:
        ConfigError: neither a file nor a name.
        DownloadError: it cannot be fetched.
    """
    from modelcrate_converter.demo import DEMO_MODELS
    from modelcrate_converter.download import default_cache_dir, download
    from modelcrate_converter.zoo import fetch_model, find_model, nearest_names

    if not text:
        return None, options
    if "://" in text:
        return download(text, cache_dir=default_cache_dir(), sha256=sha256, offline=offline, report=report), options
    path = Path(text)
    if path.exists() or path.suffix or options.spec is not None:
        return path, options
    if text in DEMO_MODELS:
        return DEMO_MODELS[text], replace(options, name=options.name or text)
    model = find_model(text)
    if model is None:
        near = [*difflib.get_close_matches(text.lower(), DEMO_MODELS, n=1), *nearest_names(text)]
        raise ConfigError(
            f"{text}: expected a checkpoint file or the name of a published model, found neither",
            hint=f"did you mean {' or '.join(near)}?" if near else "check the path; modelcrate zoo list shows the names",
        )
    file = fetch_model(model, cache_dir=default_cache_dir(), offline=offline, report=report)
    return file, replace(options, name=options.name or model.name, keypoints=model.keypoints)


def open_checkpoint(text: str) -> Subject:
    """A checkpoint for the commands that measure bundles.

    Raises:
        ModelcrateError: there is none, or it cannot be read.
    """
    from modelcrate_converter.architecture import read_architecture
    from modelcrate_converter.checkpoint import read_checkpoint
    from modelcrate_converter.console import Progress
    from modelcrate_converter.convert import ConvertOptions
    from modelcrate_converter.reference import subject_of
    from modelcrate_runtime.cli import consoles

    with Progress(consoles()[1]) as progress:
        path, options = locate(text, ConvertOptions(out=Path()), offline=False, sha256=None, report=progress.show)
    if path is None or not path.is_file():
        raise ConfigError(f"{text or '(empty)'}: expected a bundle or a checkpoint, found neither", hint="check the path; modelcrate zoo list shows the names")
    return subject_of(read_architecture(read_checkpoint(path), name=options.name, keypoints=options.keypoints), path)
