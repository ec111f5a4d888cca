"""What only a real GPU can show: engines run on it, their results are PyTorch's in pixels, batches and graphs change nothing, and what is for elsewhere is built again.

`pytest -m gpu` on a machine with an NVIDIA GPU, TensorRT or TensorRT for RTX, and a binding of CUDA. Everything skips elsewhere, saying what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import MissingBackendError, UnsupportedBundleError
from modelcrate_bundle.manifest import Manifest, write_manifest
from modelcrate_converter.builders import check_can_build
from modelcrate_converter.cli import app
from modelcrate_converter.config import load_config, target_names
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS, HELD_OUT_SEED
from modelcrate_converter.people import draw_scene, procedural_scenes
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.sessions import BACKENDS, SessionOptions, open_session
from modelcrate_runtime.sessions.cuda_device import BINDINGS, find_gpu, require_binding
from modelcrate_runtime.sessions.tensorrt_session import TensorRTSession

pytestmark = pytest.mark.gpu
TARGETS = [target for target in target_names() if BACKENDS[load_config(target).backend].device == "cuda"]
MODELS = ["demo-pose", "demo-det"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Skip where there is no GPU, and leave the user's cache alone."""
    try:
        find_gpu()
    except MissingBackendError as error:
        pytest.skip(f"{error} ({error.hint})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELCRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def crate_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """A demo model for a target, built and compared on this GPU, once."""
    made: dict[tuple[str, str], Bundle] = {}

    def of(model: str, target: str) -> Bundle:
        config = load_config(target)
        try:
            check_can_build(config.backend, config.precision)
        except MissingBackendError as error:
            pytest.skip(f"{error} ({error.hint})")
        if (model, target) not in made:
            (conversion,) = convert(DEMO_MODELS[model], [config], ConvertOptions(out=tmp_path_factory.mktemp("crates"), name=model))
            assert conversion.error is None, conversion.error
            assert conversion.bundle is not None
            made[model, target] = conversion.bundle
        return made[model, target]

    return of


def manifest_of(bundle: Bundle) -> Manifest:
    assert bundle.manifest is not None
    return bundle.manifest


def sample(bundle: Bundle, count: int) -> np.ndarray:
    """Network inputs like those of images."""
    _, *fixed = manifest_of(bundle).inputs[0].shape
    return np.random.default_rng(count).standard_normal((count, *(int(dim) for dim in fixed))).astype(np.float32)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_is_pytorch_in_pixels(model: str, target: str, crate_of: Callable[[str, str], Bundle]) -> None:
    manifest = manifest_of(crate_of(model, target))
    assert (manifest.parity.verified, manifest.parity.passed) == (True, True)
    assert manifest.parity.pixels
    record = manifest.engine
    assert record is not None
    gpu = find_gpu()
    assert (record.gpu, record.compute_capability) == (gpu.name, ".".join(map(str, gpu.compute_capability)))
    assert record.is_inspected
    assert record.layers.get({"fp32": "float32", "fp16": "float16", "int8": "int8"}[manifest.precision], 0) > 0
    assert "TF32" not in record.flags


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_every_batch_is_its_inputs_one_by_one(model: str, target: str, crate_of: Callable[[str, str], Bundle]) -> None:
    bundle = crate_of(model, target)
    tolerance = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.1}[manifest_of(bundle).precision]
    session = open_session(bundle, SessionOptions())
    inputs = sample(bundle, 32)
    alone = [session.run({"input": inputs[i : i + 1]}) for i in range(32)]
    for count in range(1, 33):
        for name, value in session.run({"input": inputs[:count]}).items():
            reference = np.concatenate([one[name] for one in alone[:count]])
            assert value.shape == reference.shape
            assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max(), (count, name)
    session.close()


@pytest.mark.parametrize("binding", list(BINDINGS))
@pytest.mark.parametrize("target", TARGETS)
def test_running_again_changes_nothing(target: str, binding: str, crate_of: Callable[[str, str], Bundle]) -> None:
    """The second time the launches come from a CUDA graph, where the binding has graphs; and without graphs the results are the same."""
    bundle = crate_of("demo-pose", target)
    try:
        require_binding(binding)
    except MissingBackendError as error:
        pytest.skip(f"{error} ({error.hint})")
    found = {}
    for graphs in (True, False):
        session = open_session(bundle, SessionOptions(cuda_binding=binding, cuda_graphs=graphs))
        assert isinstance(session, TensorRTSession)
        assert session.binding == binding
        for turn in range(3):
            for count in (3, 1, 32, 3, 7, 2, 9):
                for name, value in session.run({"input": sample(bundle, count)}).items():
                    np.testing.assert_array_equal(value, found.setdefault((graphs, count, name), value), err_msg=f"{graphs} {turn} {count} {name}")
        session.close()
    for (graphs, count, name), value in found.items():
        reference = found[False, count, name]
        assert np.abs(value - reference).max() <= 1e-3 * np.abs(reference).max(), (graphs, count, name)


@pytest.mark.parametrize("target", TARGETS)
def test_people_are_found_as_onnxruntime_finds_them(
    target: str, crate_of: Callable[[str, str], Bundle], demo_pose_bundle: Path, demo_detector_bundle: Path
) -> None:
    gates = load_config(target).gates
    with PoseDetector(crate_of("demo-pose", target)) as ours, PoseDetector(demo_pose_bundle) as reference:
        for _, image, box in procedural_scenes(3):
            found, expected = (one.estimate(image, box[None]) for one in (ours, reference))
            counts = expected.scores > gates.keypoint_score
            assert np.linalg.norm(found.keypoints_xy - expected.keypoints_xy, axis=2)[counts].max() <= gates.keypoint_px
    with Detector(crate_of("demo-det", target)) as ours, Detector(demo_detector_bundle) as reference:
        image = draw_scene(HELD_OUT_SEED, 0).image
        found, expected = (one.detect(image) for one in (ours, reference))
        sure = int((expected.scores > 0.5).sum())
        assert np.abs(found.boxes_xyxy[:sure] - expected.boxes_xyxy[:sure]).max() <= gates.box_px


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_for_elsewhere_is_refused_and_built_again(target: str, crate_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    place = Path(shutil.copytree(crate_of("demo-pose", target).root, tmp_path / f"demo-pose_{target}"))
    manifest = manifest_of(Bundle.open(place))
    assert manifest.engine is not None
    version = manifest.engine.version
    (place / "manifest.json").write_bytes(write_manifest(msgspec.structs.replace(manifest, engine=msgspec.structs.replace(manifest.engine, version="9.0.0.1"))))
    with pytest.raises(UnsupportedBundleError, match="the engine was built for something else") as caught:
        PoseDetector(place)
    assert "modelcrate rebuild" in caught.value.hint
    result = CliRunner().invoke(app, ["rebuild", str(place), "-r", "demo-pose"])
    assert result.exit_code == 0, result.output
    again = manifest_of(Bundle.open(place))
    assert again.engine is not None
    assert again.engine.version == version
    assert (again.parity.verified, again.parity.passed) == (True, True)
    with PoseDetector(place) as estimator:
        _, image, box = procedural_scenes(1)[0]
        assert np.isfinite(estimator.estimate(image, box[None]).keypoints_xy).all()


def test_what_is_no_engine_is_refused(crate_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    for target in TARGETS:
        if BACKENDS[load_config(target).backend].is_installed:
            place = Path(shutil.copytree(crate_of("demo-pose", target).root, tmp_path / target))
            (place / "end2end.engine").write_bytes(b"junk" * 100)
            with pytest.raises(UnsupportedBundleError, match="found one that it refuses"):
                open_session(Bundle.open(place), SessionOptions())


def test_opening_and_closing_leaves_no_memory_on_the_gpu(crate_of: Callable[[str, str], Bundle]) -> None:
    import ctypes

    target = next((target for target in TARGETS if BACKENDS[load_config(target).backend].is_installed), TARGETS[0])
    bundle = crate_of("demo-pose", target)

    def once() -> int:
        session = open_session(bundle, SessionOptions())
        for _ in range(2):
            session.run({"input": sample(bundle, 4)})
        session.close()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        assert ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        return free.value

    for _ in range(3):
        before = once()
    for _ in range(50):
        after = once()
    assert before - after < 64 * 2**20
