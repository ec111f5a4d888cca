"""All bundles of a folder measured: what is found, what is said of it, and what is left of a report when one of them cannot be run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch

import modelcrate_converter.cli  # noqa: F401  # checkpoints are known from here on
from made_reports import copied_bundle, full_report, made_entry, made_group, made_report, made_score
from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import CheckpointError, ConfigError, InputError, ModelcrateError
from modelcrate_converter.people.dataset import write_dataset
from modelcrate_runtime.host import read_host
from modelcrate_runtime.profiler import ProfileOptions
from modelcrate_runtime.reporting import Report, ReportOptions, find_bundles, measure_report, read_report, score_on, write_json
from modelcrate_runtime.sessions import SessionOptions
from modelcrate_runtime.subjects import find_subject

QUICK = ReportOptions(profile=ProfileOptions(warmup=0, runs=3, cold=0, threads=(1,)), compare_runs=2)
COMMAND = "modelcrate report crates"
pytestmark = pytest.mark.usefixtures("torch_threads")


@pytest.fixture
def crates(tmp_path: Path, demo_pose_bundle: Path, demo_detector_bundle: Path) -> Path:
    """A folder of both demo bundles."""
    folder = tmp_path / "crates"
    for bundle in (demo_pose_bundle, demo_detector_bundle):
        shutil.copytree(bundle, folder / bundle.name)
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The annotations of a few drawn scenes."""
    folder = tmp_path_factory.mktemp("data") / "people"
    write_dataset(folder, count=4, seed=79, size_hw=(192, 192), people=(1, 2))
    return folder / "annotations.json"


def measured(folder: Path, *references: str, images: tuple[Path, ...] = (), **changes: Any) -> Report:
    return measure_report(folder, references, images, replace(QUICK, **changes), command=COMMAND)


# ------------------------------------------------------------------------------------------------------------------------- finding


def zipped(bundle: Path, place: Path) -> Path:
    return Path(shutil.make_archive(str(place), "zip", bundle))


def test_bundles_of_a_folder_are_found_by_name(pose_bundle: Path, detector_bundle: Path, tmp_path: Path) -> None:
    for name, bundle in (("b", pose_bundle), ("a", detector_bundle)):
        shutil.copytree(bundle, tmp_path / name)
    zipped(pose_bundle, tmp_path / "c")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures/deeper").mkdir(parents=True)
    shutil.copytree(pose_bundle, tmp_path / "pictures/deeper/bundle")
    found, broken = find_bundles(tmp_path)
    assert [bundle.root.name for bundle in found] == ["a", "b", "c.zip"]
    assert broken == []


def test_a_bundle_is_a_folder_of_one(pose_bundle: Path) -> None:
    (found,), broken = find_bundles(pose_bundle)
    assert (found.root, broken) == (pose_bundle, [])


def test_what_is_broken_is_named_and_no_end_of_the_others(pose_bundle: Path, tmp_path: Path) -> None:
    for name in ("changed", "cut", "good", "older"):
        shutil.copytree(pose_bundle, tmp_path / name)
    with (tmp_path / "changed/end2end.onnx").open("ab") as file:
        file.write(b"x")
    (tmp_path / "cut/deploy.json").write_text("{", encoding="utf-8")
    manifest = json.loads((tmp_path / "older/manifest.json").read_bytes())
    (tmp_path / "older/manifest.json").write_text(json.dumps(manifest | {"schema_version": "9.0"}), encoding="utf-8")
    (tmp_path / "text.zip").write_bytes(b"no zip")
    found, broken = find_bundles(tmp_path)
    assert [bundle.root.name for bundle in found] == ["good"]
    assert len(broken) == 4
    for name, line in zip(("changed/end2end.onnx", "cut/deploy.json", "older/manifest.json", "text.zip"), broken, strict=True):
        assert line.startswith(f"{tmp_path / name}: ")


def test_a_folder_without_bundles_is_refused(pose_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: expected bundles, found none"):
        find_bundles(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/deploy.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=rf"expected bundles, found only broken ones: {tmp_path}/cut/deploy\.json: "):
        find_bundles(tmp_path)
    with pytest.raises(InputError, match="gone: expected a folder of bundles, found nothing"):
        find_bundles(tmp_path / "gone")
    with pytest.raises(InputError, match="expected a folder of bundles, found a file"):
        find_bundles(pose_bundle / "deploy.json")
    with pytest.raises(InputError, match="expected a folder of bundles, found a file"):
        find_bundles(zipped(pose_bundle, tmp_path / "zipped"))


# ----------------------------------------------------------------------------------------------------------------------- measuring


def test_bundles_and_a_checkpoint_in_groups_by_model(crates: Path, demo_pose_bundle: Path) -> None:
    other = Bundle.open(demo_pose_bundle).manifest
    assert other is not None
    copied_bundle(demo_pose_bundle, crates / "z", backend="snpe", id="demo-pose_snpe", target="snpe")
    (crates / "text.zip").write_bytes(b"no zip")
    told: list[tuple[str, int, int]] = []
    report = measure_report(crates, ["demo-pose"], [], QUICK, command=COMMAND, tell=lambda *of: told.append(of))
    assert (report.folder, report.command, report.schema) == ("crates", COMMAND, "modelcrate.report/1")
    assert report.host == read_host()
    assert [line.partition(": ")[0] for line in report.unreadable] == [str(crates / "text.zip")]
    assert told == [
        ("demo-det_onnxruntime", 0, 4), ("demo-pose_pytorch", 1, 4), ("demo-pose_onnxruntime", 2, 4), ("demo-pose_snpe", 3, 4), ("", 4, 4)
    ]  # fmt: skip
    det, pose = report.groups
    assert (det.model, det.task, det.comparison) == ("demo-det", "Detector", None)
    assert (pose.model, pose.task) == ("demo-pose", "PoseDetector")
    assert [(entry.name, entry.backend, entry.precision) for entry in pose.entries] == [
        ("demo-pose_pytorch", "pytorch", "fp32"), ("demo-pose_onnxruntime", "onnxruntime", "fp32"), ("demo-pose_snpe", "snpe", "fp32")
    ]  # fmt: skip
    checkpoint, bundle, strange = pose.entries
    assert checkpoint.parity is None
    assert bundle.parity == strange.parity == other.parity, "what it passed when it was built holds wherever it is read"
    assert bundle.size_bytes == strange.size_bytes == (demo_pose_bundle / "end2end.onnx").stat().st_size
    for entry in (checkpoint, bundle):
        assert entry.profile is not None
        assert (entry.profile.name, entry.profile.call.count, entry.profile.threads, entry.trouble, entry.scores) == (entry.name, 3, 1, "", [])
    assert strange.profile is None
    assert "expected one of" in strange.trouble
    assert "'snpe'" in strange.trouble
    assert strange.trouble.endswith("modelcrate convert)"), "the hint too"
    assert pose.comparison is not None
    assert [row.name for row in pose.comparison.rows] == ["demo-pose_pytorch", "demo-pose_onnxruntime"], "turns of those that run"
    assert [row.latency.count for row in pose.comparison.rows] == [2, 2]
    # And back from its JSON, every sample with it.
    place = crates / "report.json"
    place.write_bytes(write_json(report))
    assert read_report(place) == report


def test_nothing_that_runs_is_a_report_too(tmp_path: Path, demo_pose_bundle: Path) -> None:
    copied_bundle(demo_pose_bundle, tmp_path / "crates/a", backend="snpe")
    (group,) = measured(tmp_path / "crates").groups
    assert (group.task, group.comparison, group.entries[0].profile) == ("PoseDetector", None, None)


def test_a_bundle_of_mmdeploy_has_no_parity(tmp_path: Path, detector_bundle: Path) -> None:
    shutil.copytree(detector_bundle, tmp_path / "crates/theirs")
    (tmp_path / "crates/theirs/manifest.json").unlink()
    (group,) = measured(tmp_path / "crates").groups
    (entry,) = group.entries
    assert (group.model, group.task, entry.name, entry.parity, entry.trouble) == ("theirs", "Detector", "theirs", None, "")
    assert entry.profile is not None


def test_pictures_are_what_the_stages_go_through(tmp_path: Path, demo_pose_bundle: Path) -> None:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    (group,) = measured(demo_pose_bundle, images=(tmp_path / "a.png", tmp_path / "b.png"), boxes=2).groups
    profile = group.entries[0].profile
    assert profile is not None
    assert profile.images == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert profile.boxes == 2
    assert list(profile.samples) == ["load image", "preprocess", "infer", "postprocess", "call"]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "gone.png"):
        with pytest.raises(InputError, match=name):
            measured(demo_pose_bundle, images=(tmp_path / name,))


def test_a_reference_of_another_model_is_refused(tmp_path: Path, demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"demo-det: expected a checkpoint of one of the models here \(demo-pose\), found demo-det"):
        measured(demo_pose_bundle, "demo-det")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="junk"):
        measured(demo_pose_bundle, str(tmp_path / "junk.pth"))


def test_a_bundle_of_another_folder_stands_beside_those_of_its_model(tmp_path: Path, demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    other = copied_bundle(demo_pose_bundle, tmp_path / "other/demo-pose_old", id="demo-pose_old", target="old")
    (group,) = measured(demo_pose_bundle, str(other)).groups
    assert [entry.name for entry in group.entries] == ["demo-pose_old", "demo-pose_onnxruntime"]
    assert group.comparison is not None
    with pytest.raises(ConfigError, match="found demo-det"):
        measured(demo_pose_bundle, str(demo_detector_bundle))


def test_bundles_of_one_name_have_numbers(tmp_path: Path, pose_bundle: Path) -> None:
    """A bundle and its zip: each has its own row in every table."""
    crates = tmp_path / "crates"
    shutil.copytree(pose_bundle, crates / pose_bundle.name)
    zipped(pose_bundle, crates / pose_bundle.name)
    (group,) = measured(crates).groups
    names = [pose_bundle.name, f"{pose_bundle.name} (2)"]
    assert [entry.name for entry in group.entries] == names
    assert group.comparison is not None
    assert [row.name for row in group.comparison.rows] == names


def test_two_tasks_under_one_name_are_no_end_of_the_report(tmp_path: Path, demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    """`convert --name x` gives any model any name: what cannot be compared is not compared, and all else is kept."""
    for name, bundle in (("x_a", demo_detector_bundle), ("x_b", demo_pose_bundle)):
        copied_bundle(bundle, tmp_path / "crates" / name, id=name, model="x")
    report = measured(tmp_path / "crates")
    entries = [entry for group in report.groups for entry in group.entries]
    assert sorted(entry.name for entry in entries) == ["x_a", "x_b"]
    assert all(entry.profile is not None for entry in entries)
    assert all(group.comparison is None for group in report.groups)


# -------------------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_modelcrate_test(people: Path, crates: Path, demo_pose_bundle: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    from modelcrate_runtime import Detector, PoseDetector
    from modelcrate_runtime.accuracy import Dataset, evaluate_boxes, evaluate_keypoints

    det, pose = measured(crates, score=score_on(people, None)).groups
    dataset = Dataset.read(people)
    with Detector(crates / det.entries[0].name, threads=1) as detector, PoseDetector(crates / pose.entries[0].name, threads=1) as estimator:
        expected = [evaluate_boxes(detector, dataset).figures["AP"], evaluate_keypoints(estimator, dataset).figures["AP"]]
    for group, value in zip((det, pose), expected, strict=True):
        (entry,) = group.entries
        (score,) = entry.scores
        assert (score.metric, score.is_better_up, score.images, score.data) == ("AP", True, 4, "annotations.json")
        assert score.value == pytest.approx(value, abs=1e-3)
        assert 0.3 < value <= 1
        assert entry.trouble == ""
        assert entry.profile is not None


def scored(bundle: Path, annotations: Path, images: Path | None = None, **options: Any) -> list[Any]:
    return score_on(annotations, images, **options)(find_subject(str(bundle)), SessionOptions(threads=1))


def test_only_so_many_images_of_another_folder(people: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    shutil.copy(people, tmp_path / "truth.json")
    (score,) = scored(demo_pose_bundle, tmp_path / "truth.json", people.parent, limit=2)
    assert (score.images, score.data) == (2, "truth.json")
    with pytest.raises(ModelcrateError):
        scored(demo_pose_bundle, tmp_path / "truth.json")


def test_figures_of_errors_are_better_the_less_they_are(people: Path, tmp_path: Path, bundle_of: Callable[..., Path]) -> None:
    """21 keypoints, whose sigmas nobody knows: PCK, AUC and EPE."""
    from modelcrate_converter.models.blueprints import random_weights, rtmpose_shapes

    hand = tmp_path / "hand_random.pth"
    torch.save({"state_dict": random_weights(rtmpose_shapes(widen=0.125, deepen=0.167, keypoints=21, input_hw=(256, 256)), seed=3)}, hand)
    raw = json.loads(people.read_bytes())
    for category in raw["categories"]:
        category["keypoints"] = [f"p{i}" for i in range(21)]
    for one in raw["annotations"]:
        one["keypoints"] = [*one["keypoints"][:51], *[0] * 12]
    (tmp_path / "hands.json").write_text(json.dumps(raw), encoding="utf-8")
    scores = scored(bundle_of(hand), tmp_path / "hands.json", people.parent)
    assert [(score.metric, score.is_better_up, score.images) for score in scores] == [("PCK", True, 4), ("AUC", True, 4), ("EPE", False, 4)]
    assert all(score.value is not None and math.isfinite(score.value) for score in scores)


def test_data_of_another_task_leaves_the_profile(people: Path, crates: Path, tmp_path: Path) -> None:
    """Boxes without keypoints are data for the detector alone."""
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    raw = json.loads(people.read_bytes())
    for one in raw["annotations"]:
        for key in ("keypoints", "num_keypoints"):
            one.pop(key, None)
    (tmp_path / "boxes.json").write_text(json.dumps(raw), encoding="utf-8")
    det, pose = measured(crates, score=score_on(tmp_path / "boxes.json", people.parent)).groups
    assert [score.metric for score in det.entries[0].scores] == ["AP"]
    (entry,) = pose.entries
    assert entry.profile is not None
    assert entry.scores == []
    assert entry.trouble.startswith("accuracy: ")
    assert "boxes.json" in entry.trouble


# ---------------------------------------------------------------------------------------------------------------------------- JSON


def test_a_report_comes_back_from_its_json(tmp_path: Path) -> None:
    report = full_report()
    place = tmp_path / "report.json"
    place.write_bytes(write_json(report))
    assert read_report(place) == report
    assert write_json(read_report(place)) == write_json(report)
    raw = json.loads(place.read_bytes())
    assert raw["schema"] == "modelcrate.report/1"
    assert place.read_bytes().endswith(b"}\n")
    assert raw["groups"][0]["entries"][0]["profile"]["samples"]["call"] == report.groups[0].entries[0].profile.samples["call"]  # type: ignore[union-attr]


def test_a_score_that_is_no_number_comes_back_as_none(tmp_path: Path) -> None:
    report = made_report(made_group([made_entry("a", scores=[made_score(float("nan"))])]))
    (tmp_path / "report.json").write_bytes(write_json(report))
    assert read_report(tmp_path / "report.json").groups[0].entries[0].scores[0].value is None


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    raw = json.loads(write_json(full_report()))
    raw["more"] = raw["groups"][0]["more"] = {"a": [1]}
    (tmp_path / "report.json").write_text(json.dumps(raw), encoding="utf-8")
    assert read_report(tmp_path / "report.json") == full_report()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"text", b"\xff\xfe", b'{"profiles": []}', b"[" * 100_000, b'{"x": ' + b"[" * 100_000,
        msgspec.json.encode(replace(made_report(), schema="modelcrate.report/2")), msgspec.json.encode(full_report())[:-100],
        msgspec.json.encode(full_report()).replace(b'"groups":', b'"grope":'), msgspec.json.encode(full_report()).replace(b'"cores":2', b'"cores":"two"'),
    ],
    ids=lambda data: repr(data[:12]) + str(len(data)),
)  # fmt: skip
def test_what_is_no_report_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(data)
    with pytest.raises(InputError, match=r"report\.json: expected the JSON of a report, found: ") as caught:
        read_report(tmp_path / "report.json")
    assert len(str(caught.value)) < 500


def test_a_report_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for place, words in ((tmp_path / "gone.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"{place}: expected a report, found: {words}"):
            read_report(place)
