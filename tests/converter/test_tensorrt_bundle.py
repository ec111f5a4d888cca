"""TensorRT's bundles from checkpoint to answer, on a stand-in GPU: built, compared, run, refused elsewhere, built again there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import Result
from typer.testing import CliRunner

import stand_ins
from modelcrate_bundle.bundle import Bundle, sha256_of
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, MissingBackendError, ParityError, UnsupportedBundleError
from modelcrate_bundle.manifest import EngineRecord, Manifest
from modelcrate_converter.builders.tensorrt_builder import build_engine
from modelcrate_converter.cli import app
from modelcrate_converter.config import DeployConfig, NmsOptions, load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS, HELD_OUT_SEED
from modelcrate_converter.people import draw_scene, procedural_scenes
from modelcrate_converter.progress import Advanced, Event, ignore
from modelcrate_converter.rebuild import rebuild
from modelcrate_runtime import Detector, PoseDetector
from modelcrate_runtime.sessions import SessionOptions, open_session
from modelcrate_runtime.sessions.tensorrt_session import this_platform
from stand_ins import Gpu, machine_with_gpu

trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'modelcrate[tensorrt-rtx]'")

pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")  # in the stand-in they are TensorRT's
VERSION = "11.4.0.106"
LOOSE = "[gates]\nrelative_linf = 1.0\nkeypoint_px = 500.0\nscore = 1.0\nbox_px = 500.0\nclass_logits_linf = 9.0\ndistances_linf = 9.0\nlabel_flips = 1000\n"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, a cache in it, and a wide terminal."""
    path = tmp_path_factory.mktemp("tensorrt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELCRATE_CACHE", str(path / "cache"))
        patch.setenv("COLUMNS", "200")
        patch.delenv("MODELCRATE_TRACEBACK", raising=False)
        yield path


def machine(**options: Any) -> AbstractContextManager[Gpu]:
    return machine_with_gpu(has_parser=True, **options)


def other() -> AbstractContextManager[Gpu]:
    """A machine with another kind of GPU."""
    return machine(gpu=Gpu(name="Other GPU", capability=(8, 6), cuda=12080))


def built(model: str, config: DeployConfig, out: Path, **options: Any) -> Bundle:
    (conversion,) = convert(DEMO_MODELS[model], [config], ConvertOptions(out=out, name=model, **options))
    assert conversion.error is None, conversion.error
    assert conversion.status == "built"
    assert conversion.bundle is not None
    return conversion.bundle


@pytest.fixture(scope="module")
def crate_of(folder: Path) -> Callable[[str, str], Bundle]:
    """A demo model for a target, built once. INT8 is calibrated on a few scenes. Do not change its files: copy it."""
    made: dict[tuple[str, str], Bundle] = {}

    def of(model: str, target: str) -> Bundle:
        if (model, target) not in made:
            config = load_config(target)
            if config.precision == "int8":
                config = msgspec.structs.replace(config, int8=msgspec.structs.replace(config.int8, scenes=3))
            with machine():
                made[model, target] = built(model, config, folder / "crates")
        return made[model, target]

    return of


@pytest.fixture
def pose(crate_of: Callable[[str, str], Bundle], tmp_path: Path) -> Path:
    """A copy of the float32 pose estimator."""
    return Path(shutil.copytree(crate_of("demo-pose", "tensorrt").root, tmp_path / "demo-pose_tensorrt"))


def manifest_of(place: Path | Bundle) -> Manifest:
    bundle = place if isinstance(place, Bundle) else Bundle.open(place)
    bundle.verify()
    assert bundle.manifest is not None
    return bundle.manifest


def record_of(place: Path | Bundle) -> EngineRecord:
    record = manifest_of(place).engine
    assert record is not None
    return record


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert error


# -------------------------------------------------------------------------------------------------------------------- end to end

CASES = [(model, target) for model in ("demo-pose", "demo-det") for target in ("tensorrt", "tensorrt-fp16", "tensorrt-int8")]


@pytest.mark.parametrize(("model", "target"), CASES)
def test_a_bundle_is_built_compared_and_whole(model: str, target: str, crate_of: Callable[[str, str], Bundle]) -> None:
    bundle = crate_of(model, target)
    manifest = manifest_of(bundle)
    assert (manifest.parity.verified, manifest.parity.passed) == (True, True)
    assert manifest.parity.samples >= 3
    record = record_of(bundle)
    assert (record.library, record.version, record.platform) == ("tensorrt", VERSION, this_platform())
    assert (record.gpu, record.compute_capability, record.cuda) == ("Stand-in GPU", "9.0", 13000)
    assert (record.flags, record.is_inspected, record.is_stripped, record.version_compatible) == ([], True, False, False)
    assert record.layers[{"fp32": "float32", "fp16": "float16", "int8": "int8"}[manifest.precision]] > 30
    roles = {entry.path: entry.role for entry in manifest.files}
    assert (roles["end2end.engine"], roles["end2end.onnx"]) == ("net", "source")
    assert ("calibration.json" in roles) == (manifest.precision == "int8")
    assert record.onnx_sha256 == sha256_of(bundle.path_of(record.onnx))
    onnx.checker.check_model(str(bundle.path_of(record.onnx)))
    assert "Compared with eager PyTorch" in bundle.path_of("README.md").read_text()


def test_its_files_are_named_as_mmdeploy_names_them(crate_of: Callable[[str, str], Bundle]) -> None:
    deploy = json.loads(crate_of("demo-pose", "tensorrt-fp16").path_of("deploy.json").read_text())
    (model,) = deploy["models"]
    assert (model["net"], model["weights"], model["backend"], model["precision"]) == ("end2end.engine", "", "tensorrt", "FP16")
    assert model["dynamic_shape"] is True


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp16", "tensorrt-int8"])
def test_poses_are_those_of_onnxruntime(target: str, crate_of: Callable[[str, str], Bundle], demo_pose_bundle: Path) -> None:
    gates = load_config(target).gates
    with machine() as gpu:
        with PoseDetector(crate_of("demo-pose", target)) as ours, PoseDetector(demo_pose_bundle) as reference:
            for _, image, box in procedural_scenes(3):
                for _ in range(2):  # the second time as a graph
                    found, expected = (one.estimate(image, box[None]) for one in (ours, reference))
                    counts = expected.scores > gates.keypoint_score
                    shift = np.linalg.norm(found.keypoints_xy - expected.keypoints_xy, axis=2)[counts]
                    assert shift.max() <= gates.keypoint_px
                    assert shift.mean() <= (gates.keypoint_mean_px or gates.keypoint_px)
        assert gpu.launches > 0
        assert gpu.streams == {}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp16"])
def test_detections_are_those_of_onnxruntime(target: str, crate_of: Callable[[str, str], Bundle], demo_detector_bundle: Path) -> None:
    gates = load_config(target).gates
    with machine(), Detector(crate_of("demo-det", target)) as ours, Detector(demo_detector_bundle) as reference:
        for index in range(3):
            image = draw_scene(HELD_OUT_SEED, index).image
            found, expected = (one.detect(image) for one in (ours, reference))
            sure = expected.scores > max(gates.box_score, 0.5)
            assert sure.any()
            assert np.abs(found.boxes_xyxy[: sure.sum()] - expected.boxes_xyxy[sure]).max() <= gates.box_px
            assert np.abs(found.scores[: sure.sum()] - expected.scores[sure]).max() <= gates.score


def test_it_is_verified_again_where_it_was_built(crate_of: Callable[[str, str], Bundle]) -> None:
    bundle = crate_of("demo-pose", "tensorrt-fp16")
    with machine():
        result = invoke("verify", bundle.root, "-r", "demo-pose")
    assert result.exit_code == 0, result.output
    assert "simcc_x" in result.stdout


def test_engines_that_a_gpu_built_are_remembered_for_it(crate_of: Callable[[str, str], Bundle], folder: Path) -> None:
    crate_of("demo-pose", "tensorrt")
    assert [path.name for path in (folder / "cache").rglob("*") if path.is_file()] == [f"tensorrt-{VERSION}-stand-in-gpu.timing"]


def built_again(bundle: Bundle, place: Path) -> EngineRecord:
    inputs = tuple(manifest_of(bundle).inputs)
    with machine():
        return build_engine(bundle.path_of("end2end.onnx"), inputs, load_config("tensorrt"), place=place, where="net", report=ignore)


def test_a_damaged_timing_cache_is_made_again(crate_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = crate_of("demo-pose", "tensorrt")
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "tensorrt" / f"tensorrt-{VERSION}-stand-in-gpu.timing"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    assert built_again(bundle, tmp_path / "end2end.engine").is_inspected
    assert path.read_bytes() != b"cut off"


def test_a_cache_that_cannot_be_written_is_no_error(crate_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = crate_of("demo-pose", "tensorrt")
    (tmp_path / "file").write_text("in its place")
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path / "file"))
    assert built_again(bundle, tmp_path / "end2end.engine").is_inspected


@pytest.mark.filterwarnings("error")
def test_tensorrt_for_rtx_has_no_timing_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deprecates the calls, which do nothing."""
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path / "cache"))
    with machine(name="tensorrt_rtx", version="1.7.1.116", gpu=Gpu(name="RTX 4090", capability=(8, 9))):
        manifest = manifest_of(built("demo-pose", load_config("tensorrt-rtx"), tmp_path / "out"))
    assert (manifest.backend, manifest.parity.passed) == ("tensorrt_rtx", True)
    assert not (tmp_path / "cache").exists()


def test_tensorrt_for_rtx_is_not_built_for_a_gpu_that_it_does_not_run_on(tmp_path: Path) -> None:
    """As on an H100; without the comparison it is built as on a machine without a GPU, for those that it does run on."""
    with machine(name="tensorrt_rtx", version="1.7.1.116", gpu=Gpu(name="H100", capability=(9, 0))):
        with pytest.raises(MissingBackendError, match=r"building for tensorrt_rtx: expected a GPU that TensorRT for RTX runs on .* found 9\.0 \(H100\)") as caught:
            convert(DEMO_MODELS["demo-pose"], [load_config("tensorrt-rtx")], ConvertOptions(out=tmp_path))
        assert "-t tensorrt-fp16" in caught.value.hint
        assert "--no-verify" in caught.value.hint
        (conversion,) = convert(DEMO_MODELS["demo-pose"], [load_config("tensorrt-rtx")], ConvertOptions(out=tmp_path, verify=False))
        assert conversion.error is None
        record = manifest_of(Bundle.open(conversion.place)).engine
        assert record is not None
        assert (record.gpu, record.is_inspected) == ("", False)
        with pytest.raises(UnsupportedBundleError, match="runs on"):
            PoseDetector(conversion.place)


# ------------------------------------------------------------------------------------------------------------------------ options


def with_options(**options: Any) -> DeployConfig:
    config = load_config("tensorrt")
    return msgspec.structs.replace(config, tensorrt=msgspec.structs.replace(config.tensorrt, **options))


def test_flags_are_set_recorded_and_tensorfloat_is_cleared(crate_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    bundle = crate_of("demo-pose", "tensorrt")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"tf32": True}, ["TF32"]),
        ({"version_compatible": True, "refit": True}, ["VERSION_COMPATIBLE", "REFIT"]),
    ]
    with machine() as gpu:
        for options, flags in cases:
            config, inputs = with_options(**options), tuple(manifest_of(bundle).inputs)
            record = build_engine(bundle.path_of("end2end.onnx"), inputs, config, place=tmp_path / "end2end.engine", where="net", report=ignore)
            assert record.flags == flags
            assert gpu.built[-1] & {"TF32", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "FP16", "INT8", "BF16"} == set(flags)
            assert record.version_compatible == ("VERSION_COMPATIBLE" in flags)
            assert gpu.profiles[-1] == {"input": ((1, 3, 256, 192), (8, 3, 256, 192), (32, 3, 256, 192))}


def test_an_engine_without_weights_is_filled_in_whenever_it_is_loaded(tmp_path: Path) -> None:
    with machine():
        bundle = built("demo-pose", with_options(strip_weights=True), tmp_path)
        record = record_of(bundle)
        assert (record.is_stripped, record.flags) == (True, ["STRIP_PLAN"])
        session = open_session(bundle, SessionOptions())
        assert np.isfinite(session.run({"input": np.zeros((1, 3, 256, 192), dtype=np.float32)})["simcc_x"]).all()
        session.close()


def test_the_binding_that_was_asked_for_is_used_for_everything(tmp_path: Path) -> None:
    with machine(binding="both") as gpu:
        runtime: Any = sys.modules["cuda.bindings.runtime"]
        runtime.cudaSetDevice = lambda index: (stand_ins.Status.cudaErrorInvalidValue,)  # the other one does not work
        result = invoke("convert", "demo-pose", "-t", "tensorrt", "--cuda-binding", "pycuda", "-o", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert gpu.captures == 0


def test_a_gpu_that_is_not_there_is_said_before_anything_is_done(tmp_path: Path) -> None:
    for target in ("tensorrt", "tensorrt-rtx"):
        with machine(gpu=Gpu(count=2)):
            result = invoke("convert", "demo-pose", "-t", target, "--device", "cuda:5", "-o", tmp_path / "out")
            assert_one_error(result, MissingBackendError.exit_code, "expected one of the 2 GPUs here, found 5")
    assert "export ONNX" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_not_replaced_by_none(tmp_path: Path) -> None:
    with machine():
        result = invoke("convert", "demo-pose", "-t", "tensorrt", "--device", "cuda:5", "--no-verify", "-o", tmp_path / "out")
        assert_one_error(result, MissingBackendError.exit_code, "expected one of the 1 GPUs here, found 5")
    assert not list(tmp_path.glob("out/*"))


def test_without_a_binding_nothing_is_begun(tmp_path: Path) -> None:
    with machine(binding=""):
        result = invoke("convert", "demo-pose", "-t", "tensorrt", "-o", tmp_path / "out")
    assert_one_error(result, MissingBackendError.exit_code, "running on a GPU needs cuda-python or pycuda", "pip install cuda-bindings")
    assert "export ONNX" not in result.stderr


def test_mmdeploys_deploy_config_builds_the_target(tmp_path: Path) -> None:
    path = tmp_path / "pose-detection_simcc_tensorrt-fp16_dynamic-256x192.py"
    path.write_text(
        """
onnx_config = dict(type='onnx', export_params=True, opset_version=11, save_file='end2end.onnx', input_shape=[192, 256])
codebase_config = dict(type='mmpose', task='PoseDetection')
backend_config = dict(
    type='tensorrt',
    common_config=dict(fp16_mode=True, max_workspace_size=1 << 30),
    model_inputs=[dict(input_shapes=dict(input=dict(min_shape=[1, 3, 256, 192], opt_shape=[2, 3, 256, 192], max_shape=[4, 3, 256, 192])))])
"""
    )
    with machine():
        result = invoke("convert", "demo-pose", "--deploy-config", path, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest = manifest_of(tmp_path / "out" / "demo-pose_tensorrt-fp16")
    assert (manifest.backend, manifest.precision) == ("tensorrt", "fp16")
    limits = manifest.shape_ranges["input"]
    assert (limits.min[0], limits.opt[0], limits.max[0]) == (1, 2, 4)


def test_suppression_in_the_graph_is_parsed_for_tensorrt(tmp_path: Path) -> None:
    """The builder of the stand-in is TensorRT for RTX's, which parses INMSLayer and cannot build it."""
    config = msgspec.structs.replace(load_config("tensorrt"), nms=NmsOptions(where="graph"))
    with machine():
        (conversion,) = convert(DEMO_MODELS["demo-det"], [config], ConvertOptions(out=tmp_path / "out", name="demo-det", dry_run=True))
    assert conversion.error is None, conversion.error
    assert conversion.support is not None
    assert conversion.support.unsupported == ()
    assert conversion.parity is not None
    assert conversion.parity.passed
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------- elsewhere


def test_another_gpu_is_refused_with_what_to_run(pose: Path) -> None:
    with other() as gpu:
        for open_it in (lambda: PoseDetector(pose), lambda: open_session(Bundle.open(pose), SessionOptions())):
            with pytest.raises(UnsupportedBundleError, match=r"compute capability: expected 9\.0 \(Stand-in GPU\), found 8\.6 \(Other GPU\)") as caught:
                open_it()
            assert caught.value.hint == f"modelcrate rebuild {pose}"
        assert (gpu.memory, gpu.streams) == ({}, {})
        for command in (("verify", pose, "-r", "demo-pose"), ("profile", pose)):
            assert_one_error(invoke(*command), 13, "the engine was built for something else", f"modelcrate rebuild {pose}")


def test_another_version_is_refused(pose: Path) -> None:
    with machine(version="11.4.0.107"):
        assert_one_error(invoke("verify", pose, "-r", "demo-pose"), 13, f"tensorrt: expected version {VERSION}, found 11.4.0.107")


def test_an_engine_for_another_gpu_is_not_up_to_date(pose: Path) -> None:
    with machine():
        again = invoke("convert", "demo-pose", "-t", "tensorrt", "-o", pose.parent, "--json")
        assert json.loads(again.stdout)[0]["status"] == "current"
    with other():
        result = invoke("convert", "demo-pose", "-t", "tensorrt", "-o", pose.parent, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)[0]["status"] == "built"
    assert record_of(pose).gpu == "Other GPU"


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-int8"])
def test_it_is_built_again_there_and_compared(target: str, crate_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    place = Path(shutil.copytree(crate_of("demo-pose", target).root, tmp_path / f"demo-pose_{target}"))
    before, files = manifest_of(place), contents(place)
    with other():
        result = invoke("rebuild", place, "-r", "demo-pose")
        assert result.exit_code == 0, result.output
        assert "simcc_x" in result.stdout
        with PoseDetector(place) as estimator:
            _, image, box = procedural_scenes(1)[0]
            found = estimator.estimate(image, box[None])
    assert np.isfinite(found.keypoints_xy).all()
    after = manifest_of(place)
    assert (after.parity.verified, after.parity.passed) == (True, True)
    record = record_of(place)
    assert (record.gpu, record.compute_capability, record.cuda) == ("Other GPU", "8.6", 12080)
    assert (record.onnx, record.onnx_sha256) == ("end2end.onnx", before.engine.onnx_sha256 if before.engine else "")
    assert (after.id, after.target, after.inputs, after.outputs, after.shape_ranges) == (
        before.id,
        before.target,
        before.inputs,
        before.outputs,
        before.shape_ranges,
    )
    assert after.provenance.checkpoint_sha256 == before.provenance.checkpoint_sha256
    assert {name: data for name, data in contents(place).items() if name not in {"manifest.json", "README.md"}} == {
        name: data for name, data in files.items() if name not in {"manifest.json", "README.md"}
    }, "the stand-in's engine is the graph, which is the same"


def test_it_is_built_again_without_comparing_and_says_so_everywhere(pose: Path) -> None:
    with other():
        result = invoke("rebuild", pose, "--no-verify")
        assert result.exit_code == 0, result.output
    assert record_of(pose).gpu == "Other GPU"
    assert manifest_of(pose).parity.verified is False
    readme = (pose / "README.md").read_text()
    assert "Not verified" in readme
    assert "Compared with" not in readme


def test_it_goes_elsewhere_if_asked(pose: Path, tmp_path: Path) -> None:
    files = contents(pose)
    with other():
        result = invoke("rebuild", pose, "--no-verify", "-o", tmp_path / "new")
        assert result.exit_code == 0, result.output
    assert contents(pose) == files
    assert record_of(tmp_path / "new").gpu == "Other GPU"


def test_neither_a_reference_nor_no_verify_is_an_error(pose: Path) -> None:
    files = contents(pose)
    with other():
        assert_one_error(invoke("rebuild", pose), ConfigError.exit_code, "--reference: expected what the bundle was made from", "--no-verify")
        assert_one_error(invoke("rebuild", pose, "-r", "demo-det"), ConfigError.exit_code, "expected the file that the bundle was made from")
    assert contents(pose) == files


def test_outside_the_gates_the_old_bundle_stays(pose: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text('backend = "tensorrt"\nprecision = "fp32"\n[nms]\nwhere = "runtime"\n[gates]\nrelative_linf = 0.0\n')
    files = contents(pose)
    with other():
        result = invoke("rebuild", pose, "-r", "demo-pose", "-t", tmp_path / "strict.toml")
    assert_one_error(result, ParityError.exit_code, "expected every figure inside its gate", "the bundle is as it was")
    assert contents(pose) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-pose_tensorrt", "strict.toml"]


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_graph_that_was_changed_is_refused(pose: Path, is_listed: bool) -> None:
    (pose / "end2end.onnx").write_bytes((pose / "end2end.onnx").read_bytes() + b"\0")
    with other() as gpu:
        if is_listed:  # by the hashes of all files
            assert_one_error(invoke("rebuild", pose, "--no-verify"), BundleIntegrityError.exit_code, "end2end.onnx")
        else:  # by the engine's own
            with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: expected the graph that the engine was built from"):
                rebuild(Bundle.open(pose), load_config("tensorrt"), out=pose, reference=None)
        assert gpu.built == []


def test_a_zip_needs_a_place_to_go(pose: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "crate"), "zip", pose))
    data = archive.read_bytes()
    with other():
        assert_one_error(invoke("rebuild", archive, "--no-verify"), ConfigError.exit_code, "expected a folder to put the new bundle in place of", "-o FOLDER")
        result = invoke("rebuild", archive, "--no-verify", "-o", tmp_path / "new")
        assert result.exit_code == 0, result.output
    assert archive.read_bytes() == data
    assert record_of(tmp_path / "new").gpu == "Other GPU"


def test_an_interruption_leaves_the_old_bundle(pose: Path) -> None:
    files = contents(pose)

    def report(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    with other() as gpu, pytest.raises(KeyboardInterrupt):
        rebuild(Bundle.open(pose), load_config("tensorrt"), out=pose, reference=None, report=report)
    assert contents(pose) == files
    assert sorted(path.name for path in pose.parent.iterdir()) == [pose.name]
    assert gpu.streams == {}


def test_what_has_no_engine_cannot_be_built_again(demo_pose_bundle: Path, tmp_path: Path) -> None:
    with other(), pytest.raises(UnsupportedBundleError, match="expected a TensorRT bundle of modelcrate, found another"):
        rebuild(Bundle.open(demo_pose_bundle), load_config("tensorrt"), out=tmp_path / "new", reference=None, report=ignore)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx", "tensorrt-fp16"])
def test_a_target_that_the_bundle_is_not_for_is_refused(target: str, pose: Path) -> None:
    files = contents(pose)
    with other():
        result = invoke("rebuild", pose, "--no-verify", "-t", target)
    assert_one_error(result, ConfigError.exit_code, "tensorrt", target.partition("-")[0])
    assert contents(pose) == files


def test_the_batch_range_is_the_bundles_whatever_the_target_says(pose: Path, tmp_path: Path) -> None:
    """What the manifest promises is what the engine is built for: a deploy config of MMDeploy had a say in it, and is not at hand."""
    (tmp_path / "narrow.toml").write_text('backend = "tensorrt"\nprecision = "fp32"\n[batch]\nmin = 2\nopt = 2\nmax = 3\n' + LOOSE)
    with other() as gpu:
        result = invoke("rebuild", pose, "--no-verify", "-t", tmp_path / "narrow.toml")
        assert result.exit_code == 0, result.output
        (profile,) = gpu.profiles
    limits = manifest_of(pose).shape_ranges["input"]
    assert profile["input"] == (limits.min, limits.opt, limits.max)
