"""The pages beside the README: their commands are commands that there are, their specs are read, their programs run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import typer.main

from modelcrate_converter.cli import app
from modelcrate_converter.model_spec import read_spec
from modelcrate_converter.zoo import find_model

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in ROOT.glob("*/*.md") if path.parent.name in {"converter", "runtimes", "sdk_bundle"}) + [ROOT / "README.md"]
CONVERTER = (ROOT / "converter/README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every line of a page's code that begins with `modelcrate`."""
    return [shlex.split(line, comments=True)[1:] for block in blocks(page.read_text(encoding="utf-8"), "sh") for line in block.splitlines() if line.startswith("modelcrate ")]


def mentions(page: Path) -> list[list[str]]:
    """Every piece of its prose and tables that does."""
    return [shlex.split(piece)[1:] for piece in re.findall(r"`(modelcrate [^`]+)`", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_are_commands_that_there_are(page: Path) -> None:
    """Parsed as they would be run, and not run: names, options, and how many arguments they take."""
    for arguments in commands(page) + mentions(page):
        command: Any = typer.main.get_command(app)
        rest = list(arguments)
        while hasattr(command, "commands"):
            assert rest[0] in command.commands, arguments
            command = command.commands[rest.pop(0)]
        # Prose may leave out what a command needs.
        with command.make_context("modelcrate", rest, resilient_parsing=arguments not in commands(page)) as context:
            assert context.params is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        assert path or anchor in headings, target


def test_names_of_the_zoo_are_in_the_zoo() -> None:
    page = ROOT / "converter/from-mmdeploy.md"
    named = [words[1] for words in commands(page) if words[0] == "convert" and not words[1].endswith(".pth")]
    assert len(named) >= 2
    assert all(find_model(name) is not None for name in named)


def test_every_spec_is_read(tmp_path: Path) -> None:
    specs = blocks(CONVERTER, "toml")
    assert {tomllib.loads(text)["task"] for text in specs} == {"Network", "Classifier", "PoseDetector", "Detector"}
    for text in specs:
        (tmp_path / "spec.toml").write_text(text, encoding="utf-8")
        assert type(read_spec(tmp_path / "spec.toml")).__name__ == tomllib.loads(text)["task"] + "Spec"


def test_a_model_of_ones_own_as_the_page_has_it(tmp_path: Path) -> None:
    module, program = blocks(CONVERTER, "python")
    (tmp_path / "my_regressor.py").write_text(module, encoding="utf-8")
    (tmp_path / "my_regressor.toml").write_text(blocks(CONVERTER, "toml")[0], encoding="utf-8")
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8))
    namespace: dict[str, object] = {"__name__": "my_regressor"}
    exec(compile(module, "my_regressor.py", "exec"), namespace)  # the page's own text
    torch.manual_seed(0)
    torch.save(namespace["build"]().state_dict(), tmp_path / "weights.pth")  # type: ignore[operator]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    lines = [line for block in blocks(CONVERTER, "sh") for line in block.splitlines() if "my_regressor" in line]
    assert len(lines) == 2
    for line in [*lines, f"{shlex.quote(sys.executable)} program.py"]:
        done = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "tensors.npz") as tensors:
        assert {name: value.shape for name, value in tensors.items()} == {"corners": (1, 4, 2), "scores": (1, 4)}
