"""`modelcrate test` as its users meet it: bundles and checkpoints in one table, what is broken named, results that other tools read."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_converter.cli import app
from modelcrate_converter.models.blueprints import classifier_shapes, random_weights, rtmpose_shapes
from modelcrate_converter.people.dataset import write_dataset
from modelcrate_runtime import Classifier, Detector, PoseDetector
from modelcrate_runtime.accuracy import Dataset, evaluate_boxes, evaluate_keypoints
from modelcrate_runtime.average_precision import BOX_FIGURES, KEYPOINT_FIGURES
from modelcrate_runtime.coco_data import WHOLE_BODY
from modelcrate_runtime.images import read_image
from modelcrate_runtime.keypoint_metrics import EYES
from modelcrate_runtime.subjects import find_subject

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")

IMAGES = 10
SIZE = (192, 192)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The annotations of a few drawn scenes. Do not change the folder: copy it."""
    folder = tmp_path_factory.mktemp("data") / "people"
    write_dataset(folder, count=IMAGES, seed=79, size_hw=SIZE, people=(1, 3))
    return folder / "annotations.json"


@pytest.fixture
def data(people: Path, tmp_path: Path) -> Path:
    """A copy of them, which may be changed."""
    shutil.copytree(people.parent, tmp_path / "data")
    return tmp_path / "data/annotations.json"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["test", "--threads", "1", *(str(argument) for argument in arguments)])

    return invoke


@pytest.fixture
def measured(run: Run) -> Callable[..., dict[str, Any]]:
    """What --json prints."""

    def invoke(*arguments: object) -> dict[str, Any]:
        done = run(*arguments, "--json")
        assert done.exit_code == 0, done.output
        content: dict[str, Any] = json.loads(done.stdout)
        return content

    return invoke


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def cells(output: str) -> list[dict[str, str]]:
    """The rows of the table by their headings."""
    lines = [line for line in output.splitlines() if line.startswith(("┃", "│"))]
    heading, *rows = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rows]


def assert_refused(done: Any, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error
    assert "Traceback" not in done.output


# ------------------------------------------------------------------------------------------------------- one table for all


@pytest.mark.parametrize("task", ["det", "pose"])
def test_a_bundle_is_as_good_as_its_checkpoint(task: str, people: Path, measured: Callable[..., dict[str, Any]], demo_detector_bundle: Path, demo_pose_bundle: Path) -> None:
    bundle, metric = {"det": (demo_detector_bundle, "bbox"), "pose": (demo_pose_bundle, "keypoints")}[task]
    content = measured(bundle, f"demo-{task}", "--annotations", people)
    ours, theirs = content["subjects"]
    assert content["reference"] == theirs["name"] == f"demo-{task}_pytorch", "a checkpoint is the reference wherever it stands"
    assert ours["name"] == f"demo-{task}_onnxruntime"
    assert (ours["backend"], theirs["backend"]) == ("onnxruntime", "pytorch")
    assert 0.5 < theirs["figures"][metric]["AP"] < 1
    for name, value in ours["figures"][metric].items():
        other = theirs["figures"][metric][name]
        assert value is other is None or abs(value - other) < 1e-3, name
        assert ours["drops"][metric][name] == (None if value is None else pytest.approx(100 * (other - value)))
    assert all(drop in {0, None} for drop in theirs["drops"][metric].values())
    # And it is the AP of the Python functions.
    with Detector(bundle, threads=1) if task == "det" else PoseDetector(bundle, threads=1) as opened:
        dataset = Dataset.read(people)
        result = evaluate_boxes(opened, dataset) if isinstance(opened, Detector) else evaluate_keypoints(opened, dataset)
    assert ours["figures"][metric]["AP"] == pytest.approx(result.figures["AP"], abs=1e-3)


def test_what_json_says(people: Path, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path) -> None:
    content = measured(demo_pose_bundle, "--annotations", people)
    assert {key: content[key] for key in content if key not in {"subjects", "norms"}} == {
        "annotations": str(people), "images": str(people.parent), "boxes": "truth", "flip_test": False, "batch": 8, "metrics": ["keypoints"],
        "reference": "demo-pose_onnxruntime", "skipped": [],
    }  # fmt: skip
    (subject,) = content["subjects"]
    assert list(subject) == [
        "name", "backend", "precision", "size_bytes", "images", "objects", "seconds", "images_per_second", "figures", "drops", "results",
    ]  # fmt: skip
    raw = json.loads(people.read_bytes())
    assert (subject["images"], subject["objects"]) == (IMAGES, sum(not one["iscrowd"] and one["num_keypoints"] > 0 for one in raw["annotations"]))
    assert subject["images_per_second"] == pytest.approx(IMAGES / subject["seconds"])
    assert list(subject["figures"]["keypoints"]) == list(KEYPOINT_FIGURES)
    assert subject["size_bytes"] == (demo_pose_bundle / "end2end.onnx").stat().st_size
    assert subject["figures"]["keypoints"]["APL"] is None or 0 <= subject["figures"]["keypoints"]["APL"] <= 1


def test_the_table_says_the_same(people: Path, run: Run, measured: Callable[..., dict[str, Any]], demo_detector_bundle: Path) -> None:
    arguments = ["demo-det", demo_detector_bundle, demo_detector_bundle, "--annotations", people]
    done = run(*arguments)
    rows = cells(done.stdout)
    assert list(rows[0]) == ["subject", *BOX_FIGURES, "AP drop", "images/s"]
    assert [row["subject"] for row in rows] == ["demo-det_pytorch", "demo-det_onnxruntime", "demo-det_onnxruntime (2)"]
    for row, subject in zip(rows, measured(*arguments)["subjects"], strict=True):
        for name, value in subject["figures"]["bbox"].items():
            assert row[name] == ("-" if value is None else f"{100 * value:.2f}")
    assert rows[0]["AP drop"] == "reference"
    assert [float(row["AP drop"]) for row in rows[1:]] == [pytest.approx(0, abs=0.1)] * 2
    assert f"{IMAGES} images" in done.stdout
    assert "skipped" not in done.output


def test_a_narrow_table_has_fewer_figures_and_whole_names(people: Path, run: Run, demo_detector_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(demo_detector_bundle, demo_detector_bundle, "--annotations", people, "--limit", 2)
    rows = cells(done.stdout)
    assert list(rows[0]) == ["subject", "AP", "AP50", "AP75", "AR100", "AP drop", "images/s"]
    assert "".join(row["subject"] for row in rows) == "demo-det_onnxruntimedemo-det_onnxruntime (2)"
    assert "--json, have more figures" in done.stdout


def test_another_reference(people: Path, measured: Callable[..., dict[str, Any]], run: Run, demo_pose_bundle: Path) -> None:
    for name in ("demo-pose_onnxruntime", str(demo_pose_bundle)):
        assert measured("demo-pose", demo_pose_bundle, "--annotations", people, "--limit", 2, "--reference", name)["reference"] == "demo-pose_onnxruntime"
    assert_refused(run("demo-pose", "--annotations", people, "--reference", "x"), 4, "--reference: expected one of demo-pose_pytorch, found x")


def test_batches_and_limits_change_no_figures(people: Path, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    for bundle in (demo_pose_bundle, demo_detector_bundle):
        figures = [measured(bundle, "--annotations", people, "--batch", size)["subjects"][0]["figures"] for size in (1, 3, IMAGES, 50)]
        for other in figures[1:]:
            for metric, of in figures[0].items():
                assert other[metric] == pytest.approx(of, abs=1e-3, nan_ok=True) or all(value is None or abs(value - other[metric][key]) < 1e-3 for key, value in of.items())
    some = measured(demo_pose_bundle, "--annotations", people, "--limit", 3)["subjects"][0]
    assert some["images"] == 3
    cut = changed_copy(people, lambda raw: raw.update(images=raw["images"][:3], annotations=[one for one in raw["annotations"] if one["image_id"] <= raw["images"][2]["id"]]))
    assert measured(demo_pose_bundle, "--annotations", cut, "--images", people.parent)["subjects"][0]["figures"] == some["figures"]


def changed_copy(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = path.with_name("other.json")
    shutil.copy(path, copy)
    return changed(copy, change)


# -------------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_results_are_files_that_cocos_tools_read(
    kind: str, people: Path, tmp_path: Path, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path, demo_detector_bundle: Path
) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    bundle = demo_detector_bundle if kind == "bbox" else demo_pose_bundle
    (subject,) = measured(bundle, "--annotations", people, "--save-results", tmp_path / "out")["subjects"]
    place = tmp_path / f"out/{Bundle.open(bundle).name}.{kind}.json"
    assert [str(path) for path in (tmp_path / "out").iterdir()] == [str(place)] == [subject["results"]]
    assert len(json.loads(place.read_bytes())) == subject["objects"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(people))
        evaluation = COCOeval_faster(truth, truth.loadRes(str(place)), kind, print_function=lambda *_: None)
        evaluation.run()
    for name, value in zip(subject["figures"][kind].values(), evaluation.stats, strict=False):
        assert (-1 if name is None else name) == pytest.approx(value, abs=1e-9)


def test_an_interruption_leaves_whole_results_or_none(people: Path, tmp_path: Path, demo_detector_bundle: Path) -> None:
    """The first subject's are written when the second is interrupted."""
    raw = json.loads(people.read_bytes())
    raw["images"] = [raw["images"][0] | {"id": i} for i in range(1, 401)]
    raw["annotations"] = [raw["annotations"][0] | {"image_id": 1}]
    (tmp_path / "many.json").write_text(json.dumps(raw))
    few = ["--annotations", str(tmp_path / "many.json"), "--images", str(people.parent), "--save-results", str(tmp_path / "out"), "--threads", "1"]
    command = [sys.executable, "-c", "from modelcrate_converter.cli import main; main()", "test", str(demo_detector_bundle), str(demo_detector_bundle), *few]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").is_dir() or not list((tmp_path / "out").glob("*.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    (whole,) = (tmp_path / "out").iterdir()
    assert len({row["image_id"] for row in json.loads(whole.read_bytes())}) == 400


@pytest.mark.parametrize("what", ["file", "bundle"])
def test_results_have_a_place_of_their_own(what: str, people: Path, tmp_path: Path, run: Run, pose_bundle: Path) -> None:
    place = pose_bundle if what == "bundle" else tmp_path / "file"
    (tmp_path / "file").write_text("")
    assert_refused(run(pose_bundle, "--annotations", people, "--save-results", place), 15, "--save-results", f"found a {what}")


# ----------------------------------------------------------------------------------------------------------- what is broken


def test_what_is_broken_is_counted_and_named(data: Path, run: Run, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path) -> None:
    raw = json.loads(data.read_bytes())
    first, second = (image["id"] for image in raw["images"][:2])
    (data.parent / raw["images"][0]["file_name"]).write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (data.parent / raw["images"][1]["file_name"]).unlink()

    def spoil(raw: dict[str, Any]) -> None:
        rest = [one for one in raw["annotations"] if one["image_id"] not in {first, second}]
        del rest[0]["bbox"]
        rest[1]["keypoints"] = rest[1]["keypoints"][:30]
        rest[2]["image_id"] = 12345
        rest[3]["bbox"] = [1, 2, -3, 4]
        raw["images"].append({"id": "x"})

    changed(data, spoil)
    content = measured("demo-pose", demo_pose_bundle, "--annotations", data)
    skipped = {(one["what"], one["id"]): one["reason"] for one in content["skipped"]}
    assert len(content["skipped"]) == len(skipped) == 7, "each once, whatever the number of subjects"
    assert [what for what, _ in skipped].count("annotation") == 4
    assert "000000.jpg: expected an image" in skipped["image", first]
    assert "000001.jpg: expected an image, found: No such file" in skipped["image", second]
    names = {key for what, key in skipped if what == "annotation"}
    left = {one["image_id"] for one in raw["annotations"] if not one["iscrowd"] and one["id"] not in names} - {first, second}
    assert {subject["images"] for subject in content["subjects"]} == {len(left)}
    assert all(subject["figures"]["keypoints"]["AP"] > 0.5 for subject in content["subjects"])
    done = run(demo_pose_bundle, "--annotations", data)
    assert done.exit_code == 0
    assert "skipped: 3 images, 4 annotations" in done.stdout
    named = done.stdout[done.stdout.index("skipped:") :].splitlines()
    assert len([line for line in named if line.startswith(("  image ", "  annotation "))]) == 5
    assert "  and 2 more: --json names all" in named


def test_the_rest_is_measured_as_if_nothing_else_were_there(data: Path, measured: Callable[..., dict[str, Any]], demo_detector_bundle: Path) -> None:
    raw = json.loads(data.read_bytes())
    lost, bad = raw["images"][1]["id"], raw["annotations"][0]["id"]
    without = dict(raw, images=[one for one in raw["images"] if one["id"] != lost], annotations=[one for one in raw["annotations"] if one["id"] != bad and one["image_id"] != lost])
    (data.parent / "without.json").write_text(json.dumps(without))
    (data.parent / raw["images"][1]["file_name"]).unlink()
    changed(data, lambda raw: raw["annotations"][0].update(bbox="gone"))
    spoilt, clean = (measured(demo_detector_bundle, "--annotations", path)["subjects"][0] for path in (data, data.parent / "without.json"))
    for key in ("figures", "images", "objects"):
        assert spoilt[key] == clean[key]


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", '{"images": []}', '{"images": [], "annotations": [], "categories": []}'])
def test_a_file_that_is_no_coco_is_one_line(content: str, tmp_path: Path, run: Run, pose_bundle: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    done = run(pose_bundle, "--annotations", tmp_path / "a.json")
    assert done.exit_code in {4, 10}
    assert_refused(done, done.exit_code, "a.json: ")


def test_images_none_of_which_can_be_read(people: Path, tmp_path: Path, run: Run, pose_bundle: Path) -> None:
    assert_refused(run(pose_bundle, "--annotations", people, "--images", tmp_path), 10, "found none that can be read", "000000.jpg")


# ------------------------------------------------------------------------------------------------------- boxes of a detector


def test_boxes_of_a_detector_and_of_its_results_are_the_same(people: Path, tmp_path: Path, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    measured(demo_detector_bundle, "--annotations", people, "--save-results", tmp_path)
    (boxes,) = tmp_path.glob("*.bbox.json")
    live = measured(demo_pose_bundle, "--annotations", people, "--det", demo_detector_bundle)
    filed = measured(demo_pose_bundle, "--annotations", people, "--det-results", boxes)
    torch_too = measured(demo_pose_bundle, "--annotations", people, "--det", "demo-det")
    true = measured(demo_pose_bundle, "--annotations", people)
    assert (live["boxes"], filed["boxes"], torch_too["boxes"]) == (str(demo_detector_bundle), str(boxes), "demo-det")
    assert live["subjects"][0]["objects"] == filed["subjects"][0]["objects"] > true["subjects"][0]["objects"]
    for name, value in live["subjects"][0]["figures"]["keypoints"].items():
        for other in (filed, torch_too):
            assert other["subjects"][0]["figures"]["keypoints"][name] == pytest.approx(value, abs=1e-3)
    good = measured(demo_pose_bundle, "--annotations", people, "--det", demo_detector_bundle, "--det-score", 0.3)["subjects"][0]
    rows = json.loads(boxes.read_bytes())
    assert good["objects"] == sum(row["score"] >= 0.3 for row in rows) < live["subjects"][0]["objects"]


def test_rows_that_are_no_boxes_are_named(people: Path, tmp_path: Path, run: Run, demo_pose_bundle: Path) -> None:
    raw = json.loads(people.read_bytes())
    rows: list[Any] = [{"image_id": one["image_id"], "category_id": 1, "bbox": one["bbox"], "score": 1.0} for one in raw["annotations"]]
    (tmp_path / "boxes.json").write_text(json.dumps([*rows, {"image_id": 1}, "row"]))
    done = run(demo_pose_bundle, "--annotations", people, "--det-results", tmp_path / "boxes.json")
    assert done.exit_code == 0
    assert "skipped: 2 rows" in done.stdout


def test_the_flip_test_is_better(people: Path, measured: Callable[..., dict[str, Any]], run: Run, demo_pose_bundle: Path) -> None:
    arguments = ("demo-pose", demo_pose_bundle, "--annotations", people)
    plain, flipped = measured(*arguments), measured(*arguments, "--flip-test")
    assert flipped["flip_test"]
    for before, after in zip(plain["subjects"], flipped["subjects"], strict=True):
        assert after["figures"]["keypoints"]["AP"] > before["figures"]["keypoints"]["AP"] - 0.005
        assert after["figures"] != before["figures"]
    ours, theirs = (subject["figures"]["keypoints"]["AP"] for subject in flipped["subjects"])
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert "flip test" in run(demo_pose_bundle, "--annotations", people, "--flip-test", "--limit", 2).stdout


# ------------------------------------------------------------------------------------------------- hands, faces, whole bodies


def estimator(folder: Path, keypoints: int) -> Path:
    """A random RTMPose."""
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=keypoints, input_hw=(64, 64), hidden=16, s=8)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, folder / f"pose{keypoints}.pth")
    return folder / f"pose{keypoints}.pth"


def redrawn(data: Path, keypoints: int) -> Path:
    """Its people with other keypoints, some of them invisible."""
    rng = np.random.default_rng(keypoints)

    def redraw(raw: dict[str, Any]) -> None:
        for one in raw["annotations"]:
            left, top, width, height = one["bbox"]
            points = np.stack([left + width * rng.random(keypoints), top + height * rng.random(keypoints), rng.integers(0, 3, keypoints)], axis=1)
            one |= {"keypoints": points.round(2).ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}

    return changed(data, redraw)


@pytest.mark.parametrize(("keypoints", "metrics"), [(21, ["pck", "auc", "epe"]), (106, ["nme"])])
def test_hands_and_faces_have_their_own_figures(keypoints: int, metrics: list[str], data: Path, tmp_path: Path, run: Run, measured: Callable[..., dict[str, Any]]) -> None:
    """Written out one keypoint after another, from the results that were saved."""
    checkpoint, annotations = estimator(tmp_path, keypoints), redrawn(data, keypoints)
    content = measured(checkpoint, "--annotations", annotations, "--save-results", tmp_path / "out")
    assert content["metrics"] == metrics
    (subject,) = content["subjects"]
    raw = json.loads(annotations.read_bytes())
    truth = [one for one in raw["annotations"] if not one["iscrowd"]]
    rows = json.loads(Path(subject["results"]).read_bytes())
    assert [row["image_id"] for row in rows] == [one["image_id"] for one in truth]
    errors, shares, within = [], [], []
    for one, row in zip(truth, rows, strict=True):
        a, b = np.array(one["keypoints"]).reshape(-1, 3), np.array(row["keypoints"]).reshape(-1, 3)
        left, top, width, height = one["bbox"]
        box = max(min(left + width, SIZE[1] - 1) - max(left, 0), min(top + height, SIZE[0] - 1) - max(top, 0))
        eyes = math.dist(a[66, :2], a[79, :2]) if keypoints in EYES else 1.0
        far = np.where(a[:, 2] > 0, np.hypot(*(a - b)[:, :2].T), np.nan)
        errors += far[a[:, 2] > 0].tolist()
        shares += (far / eyes)[a[:, 2] > 0].tolist()
        within.append(np.where(np.isnan(far), np.nan, far / box < 0.2))
    if keypoints == 21:
        assert subject["figures"]["epe"]["EPE"] == pytest.approx(np.mean(errors), rel=1e-4)
        assert subject["figures"]["pck"]["PCK"] == pytest.approx(np.nanmean(np.nanmean(within, axis=0)))
        assert 0 < subject["figures"]["auc"]["AUC"] < 0.95
    else:
        assert subject["figures"]["nme"]["NME"] == pytest.approx(np.mean(shares), rel=1e-4)
        assert content["norms"] == {"nme": "of the distance of keypoints 66 and 79"}
    heading = cells(run(checkpoint, "--annotations", annotations).stdout)[0]
    names = {"pck": "PCK", "auc": "AUC", "epe": "EPE px", "nme": "NME"}
    assert [name for name in heading if not name.endswith("drop")][1:-1] == [names[metric] for metric in metrics]


def test_drops_of_errors_are_in_their_own_unit(data: Path, tmp_path: Path, measured: Callable[..., dict[str, Any]], demo_pose_bundle: Path) -> None:
    """A random network falls behind a trained one in every figure."""
    worse = estimator(tmp_path, 17)
    metrics = [word for metric in ("nme", "keypoints", "pck", "auc", "epe") for word in ("--metric", metric)]
    content = measured(demo_pose_bundle, worse, "--annotations", data, *metrics, "--reference", demo_pose_bundle)
    assert content["metrics"] == ["keypoints", "pck", "auc", "epe", "nme"]
    good, bad = (subject["figures"] for subject in content["subjects"])
    drops = content["subjects"][1]["drops"]
    assert drops["pck"]["PCK"] == pytest.approx(100 * (good["pck"]["PCK"] - bad["pck"]["PCK"]))
    assert drops["pck"]["PCK"] > 10
    assert drops["keypoints"]["AP"] == pytest.approx(100 * (good["keypoints"]["AP"] - bad["keypoints"]["AP"]))
    assert drops["keypoints"]["AP"] > 10
    assert drops["epe"]["EPE"] == pytest.approx(bad["epe"]["EPE"] - good["epe"]["EPE"])
    assert drops["nme"]["NME"] == pytest.approx(bad["nme"]["NME"] - good["nme"]["NME"])
    assert drops["epe"]["EPE"] > 1
    assert 0 < drops["nme"]["NME"] < 2


def test_a_whole_body_is_measured_by_parts(data: Path, tmp_path: Path, run: Run, measured: Callable[..., dict[str, Any]]) -> None:
    checkpoint, annotations = estimator(tmp_path, 133), redrawn(data, 133)
    names = ["keypoints", *(f"{part}_kpts" for part in list(WHOLE_BODY)[1:])]

    def divide(raw: dict[str, Any]) -> None:
        for one in raw["annotations"]:
            rest = one["keypoints"]
            for name, count in zip(names, WHOLE_BODY.values(), strict=True):
                one[name], rest = rest[: 3 * count], rest[3 * count :]

    changed(annotations, divide)
    (subject,) = measured(checkpoint, "--annotations", annotations, "--save-results", tmp_path / "out")["subjects"]
    assert list(subject["figures"]) == ["keypoints", *(f"keypoints_{part}" for part in WHOLE_BODY)]
    rows = json.loads(Path(subject["results"]).read_bytes())
    assert [len(rows[0][name]) for name in names] == [3 * count for count in WHOLE_BODY.values()]
    (row,) = cells(run(checkpoint, "--annotations", annotations).stdout)
    assert list(row) == ["subject", *KEYPOINT_FIGURES, "body AP", "foot AP", "face AP", "left hand AP", "right hand AP", "AP drop", "images/s"]


# ----------------------------------------------------------------------------------------------------------------- classifiers


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    path = tmp_path / "classifier.pth"
    meta = {"dataset_meta": {"classes": ("cat", "dog", "old horse", "cow", "hen", "pig", "fox")}}
    torch.save({"state_dict": random_weights(classifier_shapes(widen=0.0625, deepen=0.167, classes=7), seed=1), "meta": meta}, path)
    return path


def ranking(checkpoint: Path, files: list[Path]) -> dict[str, list[int]]:
    with find_subject(str(checkpoint)).open() as task:
        assert isinstance(task, Classifier)
        return {file.name: task.classify(read_image(file)).labels.tolist() for file in files}


@pytest.mark.parametrize("form", ["text", "COCO"])
def test_classifiers_are_measured_by_their_best(form: str, classifier: Path, people: Path, tmp_path: Path, run: Run, measured: Callable[..., dict[str, Any]]) -> None:
    files = sorted((people.parent / "images").iterdir())
    best = ranking(classifier, files)
    names = find_names(classifier)
    labels: Mapping[str, int] = {file.name: best[file.name][0] if i % 3 else best[file.name][-1] for i, file in enumerate(files)}
    path = tmp_path / "val"
    if form == "text":
        path.write_text("".join(f"{name} {names[label] if label % 2 else label}\n" for name, label in labels.items()) + "nothing\n")
    else:
        categories = [{"id": 50 + i, "name": name} for i, name in enumerate(reversed(names))]
        ids = {one["name"]: one["id"] for one in categories}
        images = [{"id": i, "file_name": name} for i, name in enumerate([*labels, "unlabelled.jpg"])]
        annotations = [{"image_id": i, "category_id": ids[names[label]]} for i, label in enumerate(labels.values())]
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    content = measured(classifier, "--annotations", path, "--images", files[0].parent, "--save-results", tmp_path / "out")
    (subject,) = content["subjects"]
    assert content["boxes"] is None
    assert subject["figures"]["topk"] == {
        f"top-{count}": pytest.approx(sum(labels[name] in order[:count] for name, order in best.items()) / IMAGES) for count in (1, 5)
    }
    assert 0 < subject["figures"]["topk"]["top-1"] < 1
    assert len(content["skipped"]) == 1
    rows = json.loads(Path(subject["results"]).read_bytes())
    assert subject["results"].endswith(".classes.json")
    assert {row["file_name"]: row["labels"] for row in rows} == best
    assert list(cells(run(classifier, "--annotations", path, "--images", files[0].parent).stdout)[0]) == ["subject", "top-1", "top-5", "top-1 drop", "images/s"]


def find_names(checkpoint: Path) -> list[str]:
    with find_subject(str(checkpoint)).open() as task:
        assert isinstance(task, Classifier)
        return task.class_names


# --------------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_measured_together_is_refused(people: Path, run: Run, tmp_path: Path, pose_bundle: Path, detector_bundle: Path) -> None:
    given = ("--annotations", people)
    assert_refused(run(pose_bundle, detector_bundle, *given), 14, "expected a pose estimator of 17 keypoints like", "found a detector")
    assert_refused(run(pose_bundle, estimator(tmp_path, 21), *given), 14, "expected a pose estimator of 17 keypoints", "of 21 keypoints")
    assert_refused(run(tmp_path / "gone.pth", *given), 4, "gone.pth: expected a bundle or a checkpoint, found neither")
    assert_refused(run(pose_bundle, "--annotations", tmp_path / "gone.json"), 10, "gone.json: expected COCO annotations, found: No such file")


def test_metrics_that_say_nothing_are_refused(people: Path, run: Run, tmp_path: Path, pose_bundle: Path, demo_detector_bundle: Path) -> None:
    given = ("--annotations", people)
    assert_refused(run(pose_bundle, *given, "--metric", "bbox"), 4, "--metric bbox: expected one of keypoints, pck, auc, epe, nme for a pose estimator")
    assert_refused(run(demo_detector_bundle, *given, "--metric", "pck"), 4, "--metric pck: expected one of bbox for a detector")
    assert_refused(run(pose_bundle, *given, "--metric", "mota"), 4, "--metric mota: expected one of keypoints")
    for metric in ("pck", "auc", "epe", "nme"):
        done = run(pose_bundle, *given, "--metric", metric, "--det", demo_detector_bundle)
        assert_refused(done, 4, f"--metric {metric}: expected true boxes, where each object has one pose, found boxes of a detector")
    assert_refused(run(estimator(tmp_path, 106), *given, "--metric", "keypoints"), 4, "expected keypoints whose sigmas are known, found 106 without")
    assert_refused(run(estimator(tmp_path, 21), *given, "--det-results", people), 4, "--metric pck: expected true boxes")


def test_options_of_pose_estimators_are_theirs(people: Path, run: Run, tmp_path: Path, pose_bundle: Path, detector_bundle: Path) -> None:
    given = ("--annotations", people)
    assert_refused(run(detector_bundle, *given, "--flip-test"), 4, "--flip-test: expected pose estimators, found a detector")
    assert_refused(run(detector_bundle, *given, "--det", detector_bundle), 4, "--det, --det-results: expected pose estimators, found a detector")
    assert_refused(run(pose_bundle, *given, "--det", detector_bundle, "--det-results", people), 4, "expected one of them, found both")
    assert_refused(run(pose_bundle, *given, "--det", pose_bundle), 14, "expected a detector, found a PoseDetector")
    assert_refused(run(pose_bundle, *given, "--det-score", 0.5), 4, "--det-score: expected --det or --det-results beside it")
    assert_refused(run(pose_bundle, *given, "--det-results", tmp_path / "gone.json"), 10, "gone.json: expected a list of detections")
    assert run(pose_bundle, *given, "--limit", 0).exit_code == 2
    assert run(pose_bundle, *given, "--batch", 0).exit_code == 2
    assert run(pose_bundle).exit_code == 2


def test_without_its_library_it_is_said_before_any_work(people: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, demo_pose_bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    done = run(demo_pose_bundle, "--annotations", tmp_path / "gone.json")
    assert_refused(done, 5, "needs faster-coco-eval, not installed")
    assert "pip install 'modelcrate[eval]'" in done.stderr
    done = run(demo_pose_bundle, "--annotations", people, "--metric", "pck")
    assert done.exit_code == 0, "what does not need it works without"
