"""From a checkpoint to bundles: what is in them, when they are made again, and what remains when something goes wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from modelcrate_bundle.bundle import Bundle, sha256_of
from modelcrate_bundle.errors import ConfigError, InputError, ModelcrateError, OutputError, ParityError
from modelcrate_converter.config import DeployConfig, OnnxOptions, load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.progress import Event, Noted, StageFinished, StageStarted
from modelcrate_runtime import Detector, PoseDetector

POSE_ID, DETECTOR_ID = "rtmpose-c128_onnxruntime", "rtmdet-nano_onnxruntime"
TINY_ID = "rtmpose-c64_quick"
STAGES = ["load checkpoint", "export ONNX", "simplify", "build onnxruntime", "check parity", "write bundle"]
JSON_FILES = ["deploy.json", "detail.json", "manifest.json", "pipeline.json"]


@pytest.fixture
def config() -> DeployConfig:
    return load_config("onnxruntime")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pose estimator that converts in half a second."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, path)
    return path


@pytest.fixture
def quick() -> DeployConfig:
    """Without simplification: for tests of what stands around the graph."""
    return DeployConfig(target="quick", backend="onnxruntime", precision="fp32", onnx=OnnxOptions(simplify=False))


@pytest.fixture
def strict(quick: DeployConfig) -> DeployConfig:
    """A gate that no other computation than PyTorch's own can pass."""
    return msgspec.structs.replace(quick, gates=msgspec.structs.replace(quick.gates, relative_linf=1e-12))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DeployConfig(target="quick", backend="onnxruntime", precision="fp32", onnx=OnnxOptions(simplify=False))
    return one(convert(tiny_checkpoint, [config], ConvertOptions(out=tmp_path_factory.mktemp("tiny-crates")))).place


@pytest.fixture
def place(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, where `convert` into `tmp_path` would put it."""
    place = tmp_path / TINY_ID
    shutil.copytree(tiny_bundle, place)
    return place


def one(made: list[Conversion]) -> Conversion:
    (conversion,) = made
    return conversion


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.iterdir())}


def without_timing(files: dict[str, bytes]) -> dict[str, object]:
    manifest = json.loads(files["manifest.json"])
    assert manifest.pop("timing")["created"]
    return files | {"manifest.json": manifest}


# -------------------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize(("fixture", "name", "task"), [("pose_bundle", POSE_ID, "PoseDetector"), ("detector_bundle", DETECTOR_ID, "Detector")])
def test_a_bundle_holds_its_artefact_its_json_and_a_readme(request: pytest.FixtureRequest, fixture: str, name: str, task: str) -> None:
    place: Path = request.getfixturevalue(fixture)
    assert place.name == name
    assert sorted(path.name for path in place.iterdir()) == sorted(["README.md", "end2end.onnx", *JSON_FILES])
    bundle = Bundle.open(place)
    bundle.verify()
    manifest = bundle.manifest
    assert manifest is not None
    assert (manifest.id, manifest.task, manifest.target, manifest.backend) == (name, task, "onnxruntime", "onnxruntime")
    assert (bundle.deploy.task, bundle.model.backend, bundle.model.net, bundle.model.precision) == (task, "onnxruntime", "end2end.onnx", "FP32")
    assert {entry.path: entry.role for entry in manifest.files} == {
        "README.md": "readme", "deploy.json": "deploy", "detail.json": "detail", "pipeline.json": "pipeline", "end2end.onnx": "net"
    }  # fmt: skip
    for entry in manifest.files:
        assert (entry.bytes, entry.sha256) == ((place / entry.path).stat().st_size, sha256_of(place / entry.path))


def test_manifest_of_a_pose_bundle(pose_bundle: Path, pose_checkpoint: Path) -> None:
    manifest = Bundle.open(pose_bundle).manifest
    assert manifest is not None
    assert (manifest.precision, manifest.geometry, manifest.class_names) == ("fp32", "exact", [])
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.inputs] == [("input", "float32", ("batch", 3, 256, 192))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.outputs] == [
        ("simcc_x", "float32", ("batch", 17, 384)),
        ("simcc_y", "float32", ("batch", 17, 512)),
    ]
    limits = manifest.shape_ranges["input"]
    assert (limits.min, limits.opt, limits.max) == ((1, 3, 256, 192), (8, 3, 256, 192), (32, 3, 256, 192))
    assert manifest.keypoints is not None
    assert manifest.keypoints.names[0] == "nose"
    assert len(manifest.keypoints.sigmas) == 17
    assert manifest.parity.passed
    assert {figure.name for figure in manifest.parity.outputs} == {"simcc_x", "simcc_y"}
    provenance = manifest.provenance
    assert (provenance.checkpoint, provenance.checkpoint_sha256) == (pose_checkpoint.name, sha256_of(pose_checkpoint))
    assert provenance.facts["box padding"] == "default: 1.25"
    assert {"modelcrate", "torch", "onnx", "onnxsim", "onnxruntime"} <= set(provenance.tools)
    assert len(provenance.build_key) == 64
    assert [stage.name for stage in manifest.timing.stages] == STAGES[:-1], "the last stage is writing this very file"
    assert all(stage.seconds >= 0 for stage in manifest.timing.stages)


def test_manifest_of_a_detector_bundle(detector_bundle: Path) -> None:
    manifest = Bundle.open(detector_bundle).manifest
    assert manifest is not None
    assert (manifest.geometry, manifest.class_names, manifest.keypoints) == ("exact", ["class_0", "class_1"], None)
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.outputs] == [("dets", "float32", ("batch", 100, 5)), ("labels", "int64", ("batch", 100))]
    assert manifest.parity.passed
    assert {figure.name: figure.count > 0 for figure in manifest.parity.pixels} == {"box_shift_px": True, "score_shift": True, "label_flips": True}


def test_json_names_no_path_of_this_machine(pose_bundle: Path, detector_bundle: Path, pose_checkpoint: Path) -> None:
    for bundle in (pose_bundle, detector_bundle):
        for name in (*JSON_FILES, "README.md"):
            text = (bundle / name).read_text()
            for leak in (str(pose_checkpoint.parent), tempfile.gettempdir() + "/", str(Path(__file__).parents[2]), str(Path.home()) + "/", "/usr/"):
                assert leak not in text, f"{name} has {leak}"
    assert json.loads((pose_bundle / "detail.json").read_text())["codebase"]["pth"] == pose_checkpoint.name


def test_the_readme_has_parity_facts_and_snippets(pose_bundle: Path, detector_bundle: Path) -> None:
    for bundle, words in (
        (pose_bundle, ("PoseDetector(", "simcc_x", "keypoint shift", "nose")),
        (detector_bundle, ("Detector(", "dets", "box shift", "class_0, class_1")),
    ):
        text = (bundle / "README.md").read_text()
        assert text.startswith(f"# {bundle.name}\n")
        for word in (*words, "## Parity with PyTorch", "from modelcrate_runtime import", "from mmdeploy_runtime import", "default: ", "```python", "```cpp"):
            assert word in text, word
        assert "{{" not in text
        assert "{%" not in text
        assert "FAIL" not in text
        assert text.count("```") % 2 == 0
        manifest = Bundle.open(bundle).manifest
        assert manifest is not None
        assert manifest.provenance.checkpoint_sha256 in text


def test_the_readmes_python_snippet_runs(
    pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = (pose_bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    cv2.imwrite(str(tmp_path / "image.jpg"), scene[0])
    shutil.copytree(pose_bundle, tmp_path / pose_bundle.name)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "[[[" in capsys.readouterr().out


def test_pictures_show_both_answers_in_the_images_size(
    tiny_checkpoint: Path, quick: DeployConfig, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), scene[0][:300, :400])
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path / "out", images=(photo,))))
    assert conversion.error is None
    for name in ("output_pytorch.jpg", "output_onnxruntime.jpg"):
        picture = cv2.imread(str(conversion.place / name))
        assert picture.shape == (300, 400, 3)
        assert np.abs(picture.astype(int) - scene[0][:300, :400]).max() > 60, "nothing was drawn"
    assert conversion.bundle is not None
    manifest = conversion.bundle.manifest
    assert manifest is not None
    assert [entry.path for entry in manifest.files if entry.role == "picture"] == ["output_onnxruntime.jpg", "output_pytorch.jpg"]
    assert (manifest.parity.images, manifest.parity.samples) == (["photo.png"], 3)
    assert "`output_pytorch.jpg`, `output_onnxruntime.jpg`" in (conversion.place / "README.md").read_text()


def test_no_verify_is_recorded(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path, verify=False)))
    assert conversion.status == "built"
    manifest = Bundle.open(conversion.place).manifest
    assert manifest is not None
    assert manifest.parity.verified is False
    assert manifest.parity.passed is False
    assert "**Not verified.**" in (conversion.place / "README.md").read_text()
    assert "check parity" not in conversion.seconds


def test_a_name_of_the_users_is_the_bundles(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path, name="my-pose", verify=False)))
    assert conversion.place == tmp_path / "my-pose_quick"
    bundle = Bundle.open(conversion.place)
    assert bundle.manifest is not None
    assert (bundle.manifest.id, bundle.manifest.model) == ("my-pose_quick", "my-pose")


@pytest.mark.parametrize("name", ["../up", "a/b", "/absolute", "..", "", "a\\b"])
def test_a_name_is_no_path(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path, name: str) -> None:
    out = tmp_path / "deep" / "out"
    try:
        convert(tiny_checkpoint, [quick], ConvertOptions(out=out, name=name, verify=False))
    except ModelcrateError:
        pass
    strays = [path for path in tmp_path.rglob("deploy.json") if path.parent.parent != out]
    assert not strays, strays


def test_unsimplified_graphs_answer_as_simplified_ones(
    tiny_checkpoint: Path, tiny_bundle: Path, quick: DeployConfig, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    conversion = one(convert(tiny_checkpoint, [msgspec.structs.replace(quick, onnx=OnnxOptions())], ConvertOptions(out=tmp_path)))
    assert conversion.error is None
    assert any(before != after for _, before, after in conversion.op_changes)
    image, box = scene
    with PoseDetector(conversion.place) as simplified, PoseDetector(tiny_bundle) as plain:
        np.testing.assert_allclose(simplified.estimate(image, box).keypoints_xy, plain.estimate(image, box).keypoints_xy, rtol=0, atol=0.05)


def test_suppression_in_the_runtime_finds_what_suppression_in_the_graph_finds(
    bundle_of: Callable[..., Path], detector_checkpoint: Path, detector_bundle: Path, scene: tuple[np.ndarray, np.ndarray]
) -> None:
    raw = bundle_of(detector_checkpoint, nms="runtime")
    bundle = Bundle.open(raw)
    assert bundle.manifest is not None
    assert [spec.name for spec in bundle.manifest.outputs] == ["cls_0", "cls_1", "cls_2", "dist_0", "dist_1", "dist_2"]
    assert bundle.pipeline.postprocess.component == "RTMDetSepBNHead"
    image = scene[0]
    with Detector(raw) as in_runtime, Detector(detector_bundle) as in_graph:
        for picture in (image, image[:, ::-1].copy(), image[100:300, 50:600].copy()):
            ours, theirs = in_runtime.detect(picture), in_graph.detect(picture)
            assert len(ours) == len(theirs) > 10
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, rtol=0, atol=0.05)
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- same inputs, same bytes


def test_the_same_checkpoint_gives_the_same_bytes_but_for_the_clock(tiny_checkpoint: Path, tiny_bundle: Path, quick: DeployConfig, tmp_path: Path) -> None:
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path)))
    assert conversion.status == "built"
    assert without_timing(contents(conversion.place)) == without_timing(contents(tiny_bundle))


def test_another_process_writes_the_same_artefact_and_leaves_no_trace(pose_checkpoint: Path, pose_bundle: Path, tmp_path: Path) -> None:
    """Nothing may hang on the order of a set; and no library may write an identifier into the user's folders, to report with later."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    done = command(
        pose_checkpoint, tmp_path / "out", "--no-verify", environment={"PYTHONHASHSEED": "12345", "HOME": str(home), "TMPDIR": str(temporary)}, cwd=tmp_path
    )
    _, errors = done.communicate(timeout=100)
    assert done.returncode == 0, errors
    found, expected = contents(tmp_path / "out" / POSE_ID), contents(pose_bundle)
    for name in ("end2end.onnx", "deploy.json", "pipeline.json", "detail.json"):
        assert found[name] == expected[name], name
    assert [str(path.relative_to(tmp_path)) for folder in (home, temporary) for path in folder.rglob("*")] == []


def test_what_is_up_to_date_is_not_touched(tiny_checkpoint: Path, quick: DeployConfig, place: Path) -> None:
    before = stamps(place)
    events: list[Event] = []
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=place.parent), events.append))
    assert conversion.status == "current"
    assert conversion.bundle is not None
    assert stamps(place) == before
    assert [event.name for event in events if isinstance(event, StageStarted)] == ["load checkpoint"]
    assert sorted(path.name for path in place.parent.iterdir()) == [TINY_ID]


def flip_a_byte(place: Path) -> None:
    data = bytearray((place / "end2end.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "end2end.onnx").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        lambda place: (place / "pipeline.json").unlink(),
        lambda place: (place / "README.md").write_text(""),
        lambda place: (place / "manifest.json").write_text("{"),
    ],
    ids=["byte", "missing", "readme", "manifest"],
)
def test_a_damaged_bundle_is_built_again(tiny_checkpoint: Path, quick: DeployConfig, place: Path, tiny_bundle: Path, damage: Callable[[Path], object]) -> None:
    damage(place)
    conversion = one(convert(tiny_checkpoint, [quick], ConvertOptions(out=place.parent, verify=False)))
    assert conversion.status == "built"
    assert contents(place)["end2end.onnx"] == contents(tiny_bundle)["end2end.onnx"]
    Bundle.open(place).verify()


def test_force_builds_again(tiny_checkpoint: Path, quick: DeployConfig, place: Path) -> None:
    before = stamps(place)
    assert one(convert(tiny_checkpoint, [quick], ConvertOptions(out=place.parent, force=True))).status == "built"
    assert stamps(place)[TINY_ID] != before[TINY_ID]
    assert sorted(path.name for path in place.parent.iterdir()) == [TINY_ID]


@pytest.mark.parametrize("change", ["config", "options", "checkpoint"])
def test_another_option_builds_again(tiny_checkpoint: Path, quick: DeployConfig, place: Path, change: str) -> None:
    options = ConvertOptions(out=place.parent, verify=change != "options")
    if change == "config":
        quick = msgspec.structs.replace(quick, batch=msgspec.structs.replace(quick.batch, max=64))
    path = tiny_checkpoint
    if change == "checkpoint":
        path = place.parent / "other.pth"
        weights = torch.load(tiny_checkpoint, weights_only=True)["state_dict"]
        weights["head.cls_x.weight"] = weights["head.cls_x.weight"] * 0.5
        torch.save({"state_dict": weights}, path)
    old = contents(place)
    conversion = one(convert(path, [quick], options))
    assert conversion.error is None
    assert conversion.status == "built"
    assert contents(place)["manifest.json"] != old["manifest.json"]
    assert one(convert(path, [quick], options)).status == "current"


# -------------------------------------------------------------------------------------------------------------------- progress


def test_stages_are_reported_in_order_and_one_at_a_time(pose_checkpoint: Path, config: DeployConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    conversion = one(convert(pose_checkpoint, [config], ConvertOptions(out=tmp_path), events.append))
    stages = [event for event in events if isinstance(event, (StageStarted, StageFinished))]
    assert [(type(event), event.name) for event in stages] == [(kind, name) for name in STAGES for kind in (StageStarted, StageFinished)]
    assert list(conversion.seconds) == STAGES
    assert all(event.seconds > 0 and event.detail for event in stages if isinstance(event, StageFinished))
    (noted,) = [event for event in events if isinstance(event, Noted)]
    assert noted.level == "warning"
    assert "box padding = 1.25" in noted.text
    assert events.index(noted) == 2


def test_a_stage_that_fails_is_started_and_not_finished(tiny_checkpoint: Path, strict: DeployConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    conversion = one(convert(tiny_checkpoint, [strict], ConvertOptions(out=tmp_path), events.append))
    assert conversion.status == "failed"
    assert isinstance(conversion.error, ParityError)
    assert "write bundle" not in [event.name for event in events if isinstance(event, StageStarted)]


# -------------------------------------------------------------------------------------------------------------------- failures


def test_outside_the_gates_there_is_no_bundle_and_nothing_is_left(tiny_checkpoint: Path, strict: DeployConfig, tmp_path: Path) -> None:
    conversion = one(convert(tiny_checkpoint, [strict], ConvertOptions(out=tmp_path / "out")))
    assert isinstance(conversion.error, ParityError)
    assert conversion.error.exit_code == 9
    assert "simcc_x" in str(conversion.error)
    assert "1e-12" in str(conversion.error)
    assert conversion.parity is not None
    assert not conversion.parity.passed
    assert conversion.bundle is None
    assert list((tmp_path / "out").iterdir()) == []


def test_outside_the_gates_the_old_bundle_stays(tiny_checkpoint: Path, strict: DeployConfig, place: Path) -> None:
    before = contents(place)
    assert isinstance(one(convert(tiny_checkpoint, [strict], ConvertOptions(out=place.parent))).error, ParityError)
    assert contents(place) == before
    assert sorted(path.name for path in place.parent.iterdir()) == [TINY_ID]


def test_one_target_that_fails_does_not_stop_the_others_and_the_graph_is_exported_once(
    tiny_checkpoint: Path, quick: DeployConfig, strict: DeployConfig, tmp_path: Path
) -> None:
    strict = msgspec.structs.replace(strict, target="strict")
    events: list[Event] = []
    failed, built = convert(tiny_checkpoint, [strict, quick], ConvertOptions(out=tmp_path), events.append)
    assert (failed.target, failed.status) == ("strict", "failed")
    assert (built.target, built.status) == ("quick", "built")
    assert sorted(path.name for path in tmp_path.iterdir()) == [TINY_ID]
    assert [event.name for event in events if isinstance(event, StageFinished)].count("export ONNX") == 1


def test_one_id_for_two_checkpoints_is_refused_by_both_names(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{TINY_ID}: expected one checkpoint for it, found first\.pth and .*{tiny_checkpoint.name}") as caught:
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path), taken={TINY_ID: "first.pth"})
    assert "--name" in caught.value.hint


def started(events: list[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, StageStarted)]


def test_a_file_in_the_bundles_place_is_said_before_the_work_begins(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    (tmp_path / TINY_ID).write_text("precious")
    events: list[Event] = []
    with pytest.raises(OutputError, match=TINY_ID) as caught:
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path), events.append)
    assert caught.value.exit_code == 15
    assert caught.value.hint
    assert started(events) == ["load checkpoint"]
    assert (tmp_path / TINY_ID).read_text() == "precious"


def test_a_folder_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    (tmp_path / TINY_ID).mkdir()
    (tmp_path / TINY_ID / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="expected a bundle or nothing"):
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path, force=True))
    assert (tmp_path / TINY_ID / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [TINY_ID]


def test_a_file_where_the_output_folder_should_be_is_said_before_the_work_begins(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    events: list[Event] = []
    with pytest.raises(OutputError, match="out"):
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path / "out"), events.append)
    assert started(events) == ["load checkpoint"]


def test_a_missing_temporary_folder_is_said_as_what_it_is(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match="temporary folder") as caught:
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path / "out"))
    assert "TMPDIR" in caught.value.hint
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def full_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Callable[[Event], None]]]:
    """A report under which files stop growing at 8 KiB as soon as a stage begins: what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def report_for(stage: str) -> Callable[[Event], None]:
        def report(event: Event) -> None:
            if isinstance(event, StageStarted) and event.name == stage:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, hard))

        return report

    yield report_for
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by POSIX's setrlimit")
@pytest.mark.parametrize("stage", ["export ONNX", "simplify", "build quick", "write bundle"])
def test_a_full_disk_is_an_error_of_ours_and_leaves_the_old_bundle(
    tiny_checkpoint: Path, quick: DeployConfig, place: Path, full_from: Callable[[str], Callable[[Event], None]], stage: str
) -> None:
    before = contents(place)
    with_simplify = msgspec.structs.replace(quick, onnx=OnnxOptions())
    soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        conversion = one(convert(tiny_checkpoint, [with_simplify], ConvertOptions(out=place.parent, verify=False), full_from(stage)))
        error = conversion.error
    except ModelcrateError as raised:
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert error is not None
    assert "\n" not in str(error)
    assert contents(place) == before
    assert sorted(path.name for path in place.parent.iterdir()) == [TINY_ID, "tmp"]
    assert list((place.parent / "tmp").iterdir()) == []


def test_images_that_cannot_be_used_are_said_first(tiny_checkpoint: Path, quick: DeployConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg"):
        convert(tiny_checkpoint, [quick], ConvertOptions(out=tmp_path / "out", images=(tmp_path / "gone.jpg",)))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ interrupts


QUIETING = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME"}
"""With one of them ONNX Runtime keeps quiet by itself; users have none of them."""


def command(checkpoint: Path, out: Path, *options: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, with SIGINT as a terminal has it."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from modelcrate_converter.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "convert", str(checkpoint), "-t", "onnxruntime", "-o", str(out), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env={key: value for key, value in os.environ.items() if key not in QUIETING} | (environment or {}),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize(("number", "stages_before"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_an_interrupted_build_leaves_the_old_bundle_and_nothing_else(
    pose_checkpoint: Path, pose_bundle: Path, tmp_path: Path, number: signal.Signals, stages_before: int
) -> None:
    place = tmp_path / POSE_ID
    shutil.copytree(pose_bundle, place)
    before = contents(place)
    temporary = place.parent / "tmp"
    temporary.mkdir()
    process = command(pose_checkpoint, place.parent, "--force", environment={"TMPDIR": str(temporary)})
    assert process.stderr is not None
    lines: list[str] = []
    while sum(line.lstrip().startswith("done") for line in lines) < stages_before:
        line = process.stderr.readline()
        assert line, f"ended before it could be interrupted: {lines}"
        lines.append(line)
    time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert contents(place) == before
    assert sorted(path.name for path in place.parent.iterdir()) == [POSE_ID, "tmp"]
    assert not [path for path in temporary.iterdir() if path.name.startswith("modelcrate")]


def test_a_detector_of_many_classes_and_few_rows_converts(config: DeployConfig, tmp_path: Path) -> None:
    """Shared convolutions, exponentiated distances, pre-selection of candidates, cut lists, a square input of its own size."""
    weights = random_weights(rtmdet_shapes(widen=0.0625, deepen=0.167, classes=7, separable=False), seed=5)
    for level in range(3):
        weights[f"bbox_head.rtm_reg.{level}.weight"] *= 0.1
    cfg = "test_pipeline = [dict(type='Resize', scale=(128, 128))]\nmodel = dict(bbox_head=dict(exp_on_reg=True), test_cfg=dict(max_per_img=9))"
    torch.save({"state_dict": weights, "meta": {"cfg": cfg, "dataset_meta": {"CLASSES": tuple("abcdefg")}}}, tmp_path / "many.pth")
    config = msgspec.structs.replace(config, nms=msgspec.structs.replace(config.nms, pre_top_k=100))
    conversion = one(convert(tmp_path / "many.pth", [config], ConvertOptions(out=tmp_path / "out")))
    assert conversion.error is None
    bundle = Bundle.open(conversion.place)
    assert bundle.manifest is not None
    assert bundle.manifest.class_names == list("abcdefg")
    assert bundle.manifest.outputs[0].shape == ("batch", 9, 5)
