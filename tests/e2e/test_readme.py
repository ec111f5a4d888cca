"""The commands of the documents do what the documents show."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from modelcrate_converter.people import procedural_scenes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path) -> str:
    """A command line of a document, in its folder; standard error before standard output, as a terminal without a pipe in it shows them."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stderr}"
    return done.stderr + done.stdout


def shape_of(line: str) -> str:
    """A line without what differs between machines: numbers, hashes, and the width of a table."""
    line = re.sub(r"\b[0-9a-f]{16}\b", "#", line)
    line = re.sub(r"\d[\d.e+-]*", "#", line)
    return re.sub(r"[\s━─]+", " ", line).strip()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photos that the README's commands name: drawn ones."""
    folder = tmp_path_factory.mktemp("workdir")
    (folder / "photos").mkdir()
    for name, image, _ in procedural_scenes(2):
        cv2.imwrite(str(folder / "photos" / f"{name}.png"), image)
    cv2.imwrite(str(folder / "photo.jpg"), procedural_scenes(1)[0][1])
    shutil.copy(folder / "photo.jpg", folder / "image.jpg")
    return folder


@pytest.fixture(scope="module")
def converted(workdir: Path) -> Path:
    """The workdir after the README's list of commands has run in it."""
    commands = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("modelcrate ")]
    assert len(commands) >= 4
    for command in commands:
        run(command, workdir)
    return workdir


def check_session(session: str, folder: Path) -> None:
    """Every line that the document shows is printed, but for numbers; it may leave lines out."""
    parts = re.split(r"^\$ (.*)\n", session, flags=re.MULTILINE)[1:]
    assert len(parts) >= 4
    for command, shown in zip(parts[::2], parts[1::2], strict=True):
        expected = {shape_of(line) for line in shown.splitlines() if line.strip()}
        found = {shape_of(line) for line in run(command, folder).splitlines()}
        assert expected <= found, expected - found


def test_shown_session_is_what_happens(tmp_path: Path) -> None:
    session, _ = blocks(README, "console")
    check_session(session, tmp_path)
    drawn, scene = cv2.imread(str(tmp_path / "out.png")), cv2.imread(str(tmp_path / "people/images/000000.jpg"))
    assert drawn.shape == scene.shape
    assert 0.005 < (np.abs(drawn.astype(int) - scene).max(axis=2) > 40).mean() < 0.3


def test_shown_session_with_a_real_checkpoint_is_what_happens(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "fixtures/checkpoints/rtmdet_nano_person.pth", tmp_path)
    shutil.copy(shared / "fixtures/images/000000000785.jpg", tmp_path)
    _, session = blocks(README, "console")
    check_session(session, tmp_path)
    assert "(279.91, 41.59, 499.7" in session
    assert cv2.imread(str(tmp_path / "out.png")).shape == (425, 640, 3)


def test_listed_commands_run(converted: Path) -> None:
    for name in ("demo-det_onnxruntime", "demo-pose_onnxruntime"):
        assert (converted / "crates" / name / "output_pytorch.jpg").is_file()
        assert (converted / "crates" / name / "output_onnxruntime.jpg").is_file()
    assert len(list((converted / "drawn").glob("*.png"))) == 2
    assert len(list((converted / "people/images").glob("*.jpg"))) == 8


@pytest.mark.parametrize("number", [0, 1], ids=["pictures", "video"])
def test_applications_of_the_runtimes_page_run(converted: Path, number: int) -> None:
    programs = blocks((ROOT / "runtimes/README.md").read_text(encoding="utf-8"), "python")
    assert len(programs) == 2
    shutil.copy(converted / "video/people.mp4", converted / "video.mp4")
    (converted / "application.py").write_text(programs[number], encoding="utf-8")
    shown = run(f"{shlex.quote(sys.executable)} application.py", converted)
    if number:
        assert len(re.findall(r"^\d+ \[", shown, flags=re.MULTILINE)) > 50  # people in 50 frames


def test_tracked_video_is_there(converted: Path) -> None:
    capture = cv2.VideoCapture(str(converted / "tracked.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (50, 25)
    assert len((converted / "tracks.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize("name", ["demo-det_onnxruntime", "demo-pose_onnxruntime"])
def test_program_in_the_bundles_own_readme_runs(converted: Path, name: str) -> None:
    program = blocks((converted / "crates" / name / "README.md").read_text(encoding="utf-8"), "python")[0]
    shutil.copy(converted / "image.jpg", converted / "crates" / "image.jpg")
    (converted / "crates/program.py").write_text(program, encoding="utf-8")
    assert run(f"{shlex.quote(sys.executable)} program.py", converted / "crates").count("[") > 1


def test_mentioned_paths_and_targets_exist() -> None:
    for path in re.findall(r"\]\((?!http)([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^\| `(\w+)` \| fp32", README, flags=re.MULTILINE):
        assert (ROOT / f"deploy_configs/{name}.toml").is_file()


def test_demo_draws_what_it_says(tmp_path: Path) -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("needs the environment that scripts/setup makes: the demo would install it now")
    shown = run(f"{ROOT / 'scripts/demo'} {tmp_path / 'demo'}", ROOT)
    assert "FAIL" not in shown
    assert "one pose (demo-pose)" in shown
    assert "Next, with your own" in shown
    drawn, scene = (cv2.imread(str(tmp_path / "demo" / name)) for name in ("people_onnxruntime.png", "scene.png"))
    assert drawn.shape == scene.shape
    # Boxes and skeletons of several people.
    assert (np.abs(drawn.astype(int) - scene).max(axis=2) > 40).mean() > 0.01
    assert len(re.findall(r"│\s+person\s+│", shown)) >= 4
