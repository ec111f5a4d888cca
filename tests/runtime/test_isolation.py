"""A device has no torch and no onnx, perhaps not even a backend: what must import and run there does. Each test is its own process."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import modelcrate_bundle
import modelcrate_runtime

ROOT = Path(__file__).parents[2]
BUILD_ONLY = ("torch", "onnx", "onnxsim", "onnxscript", "jinja2", "safetensors", "modelcrate_converter")

BLOCKER = """
import sys, warnings
warnings.simplefilter("error")

class Hidden:
    # The finders that there were; for the blocked names they find nothing, as where nothing is installed.
    def __init__(self, names, finders):
        self.names, self.finders = set(names), finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

def block(*names):
    assert not set(names) & set(sys.modules), "imported before it could be blocked"
    sys.meta_path[:] = [Hidden(names, list(sys.meta_path))]
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} is not blocked")
"""


def modules_of(package: object) -> list[str]:
    """Every module of a package, by name."""
    return [package.__name__, *(info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]


def run(code: str, *arguments: object, blocked: tuple[str, ...]) -> str:
    """Run code in a new interpreter that cannot import the blocked modules; returns what it prints."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("sdk_bundle", "runtimes"))
    script = f"{BLOCKER}\nblock(*{blocked!r})\n{code}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


IMPORT_ALL = """
import importlib
for name in sys.argv[1].split(","):
    importlib.import_module(name)
print("imported")
"""


def test_there_are_modules_to_import() -> None:
    assert {"modelcrate_runtime.cli", "modelcrate_runtime.top_down", "modelcrate_runtime.sessions.onnxruntime_session"} <= set(modules_of(modelcrate_runtime))


def test_the_blocker_blocks() -> None:
    with pytest.raises(AssertionError, match="No module named 'onnx'"):
        run("import onnx", blocked=("onnx",))


@pytest.mark.parametrize("more", [(), ("onnxruntime",)], ids=["with a backend", "without a backend"])
def test_every_module_of_the_runtime_imports_on_a_device(more: tuple[str, ...]) -> None:
    assert run(IMPORT_ALL, ",".join(modules_of(modelcrate_runtime)), blocked=(*BUILD_ONLY, *more)) == "imported"


def test_the_bundle_package_needs_no_arrays() -> None:
    blocked = (*BUILD_ONLY, "onnxruntime", "numpy", "cv2", "typer", "rich", "modelcrate_runtime")
    assert run(IMPORT_ALL, ",".join(modules_of(modelcrate_bundle)), blocked=blocked) == "imported"


def test_a_bundle_is_opened_and_verified_without_arrays(detector_bundle: Path) -> None:
    code = "from modelcrate_bundle import Bundle; b = Bundle.open(sys.argv[1]); b.verify(); print(b.deploy.task)"
    assert run(code, detector_bundle, blocked=(*BUILD_ONLY, "onnxruntime", "numpy", "cv2", "typer", "rich", "modelcrate_runtime")) == "Detector"


def test_importing_the_runtime_loads_no_backend() -> None:
    code = """
import modelcrate_runtime.cli, modelcrate_runtime.tasks
print([name for name in sys.modules if name.partition(".")[0] in {"onnxruntime", "torch", "onnx"}])
"""
    assert run(code, blocked=("jinja2",)) == "[]"


def test_detector_runs_on_a_device(detector_bundle: Path, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", scene[0])
    code = """
import numpy as np
from modelcrate_runtime import Detector
with Detector(sys.argv[1], "cpu", 0) as detector:
    boxes, labels, masks = detector(np.load(sys.argv[2]))
np.save(sys.argv[3], boxes)
print([name for name in sys.modules if name.partition(".")[0] in {"torch", "onnx"}])
"""
    assert run(code, detector_bundle, tmp_path / "image.npy", tmp_path / "boxes.npy", blocked=BUILD_ONLY) == "[]"
    with modelcrate_runtime.Detector(detector_bundle) as detector:
        np.testing.assert_allclose(np.load(tmp_path / "boxes.npy"), detector(scene[0])[0], rtol=1e-4, atol=1e-4)


def test_top_down_and_the_command_line_run_on_a_device(detector_bundle: Path, pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    modelcrate_runtime_images = (
        "from modelcrate_runtime.images import write_image; import numpy as np; from pathlib import Path; write_image(Path(sys.argv[2]), np.load(sys.argv[1]))"
    )
    np.save(tmp_path / "image.npy", scene[0])
    run(modelcrate_runtime_images, tmp_path / "image.npy", tmp_path / "image.png", blocked=BUILD_ONLY)
    code = "from modelcrate_runtime.cli import app; app(sys.argv[1:], standalone_mode=False)"
    arguments = ("run", detector_bundle, pose_bundle, tmp_path / "image.png", "--det-thr", 0.1, "--det-label", 1, "--json", "--save", tmp_path / "out.png")
    assert '"keypoints"' in run(code, *arguments, blocked=BUILD_ONLY)
    assert (tmp_path / "out.png").is_file()


def test_without_a_backend_opening_says_how_to_install_one(detector_bundle: Path) -> None:
    code = """
from modelcrate_runtime import Detector
from modelcrate_bundle.errors import MissingBackendError
try:
    Detector(sys.argv[1])
except MissingBackendError as error:
    print(error.hint, "|", error)
"""
    hint, _, message = run(code, detector_bundle, blocked=(*BUILD_ONLY, "onnxruntime")).partition(" | ")
    assert hint == "pip install 'modelcrate[onnxruntime]'"
    assert "needs onnxruntime, which is not installed" in message


def test_without_a_backend_the_command_line_says_so_in_one_line(detector_bundle: Path, tmp_path: Path) -> None:
    code = """
from modelcrate_runtime.cli import app
try:
    app(sys.argv[1:])
except SystemExit as stop:
    print(stop.code)
"""
    (tmp_path / "a.png").write_bytes(b"x")
    assert run(code, "run", detector_bundle, tmp_path / "a.png", blocked=(*BUILD_ONLY, "onnxruntime")) == "5"


def test_backends_are_listed_without_one() -> None:
    converter = Path(__file__).parents[2] / "converter"  # its command line is installed on a device too, and must load there
    code = f"sys.path.append({str(converter)!r}); from modelcrate_converter.cli import app; app(['backends', '--json'], standalone_mode=False)"
    frameworks = [name for name in BUILD_ONLY if name != "modelcrate_converter"]
    listed = run(code, blocked=(*frameworks, "onnxruntime"))
    assert '"can_run": false' in listed
    assert "pip install 'modelcrate[" in listed
