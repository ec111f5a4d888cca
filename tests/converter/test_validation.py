"""AP on a validation set as a gate: it alone decides of INT8, beside the other figures of everything else; PyTorch is measured once."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, InputError, ParityError
from modelcrate_bundle.manifest import AccuracyParity, OutputParity, ParityRecord, PixelParity
from modelcrate_converter.cli import app
from modelcrate_converter.config import DeployConfig, load_config
from modelcrate_converter.convert import Conversion, ConvertOptions, convert
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.models.blueprints import classifier_shapes, random_weights, rtmpose_shapes
from modelcrate_converter.parity import failed_gates, parity_rows
from modelcrate_converter.people.dataset import write_dataset
from modelcrate_converter.progress import Advanced, Event, Noted, StageFinished, StageStarted
from modelcrate_runtime import PoseDetector
from modelcrate_runtime.accuracy import Dataset, evaluate_keypoints

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")

IMAGES = 5
POSE, DETECTOR = DEMO_MODELS["demo-pose"], DEMO_MODELS["demo-det"]
RUINED = {"method": "percentile", "percentile": 51.0, "search": False}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of a few drawn scenes. Do not change the folder: copy it."""
    folder = tmp_path_factory.mktemp("data") / "people"
    write_dataset(folder, count=IMAGES, seed=78, size_hw=(192, 192), people=(1, 3))
    return folder / "annotations.json"


def config(target: str, *, int8: dict[str, Any] | None = None, **gates: float | None) -> DeployConfig:
    """A target with other gates, calibrated on two scenes."""
    loaded = load_config(target)
    gates = {name: float(value) if value is not None else None for name, value in gates.items()}  # as a file's are
    options = msgspec.structs.replace(loaded.int8, **({"scenes": 2} | (int8 or {})))
    return msgspec.structs.replace(loaded, int8=options, gates=msgspec.structs.replace(loaded.gates, **gates))


def converted(out: Path, data: Path, *configs: DeployConfig, checkpoint: Path = POSE, events: list[Event] | None = None, **options: Any) -> list[Conversion]:
    report = events.append if events is not None else lambda event: None
    given = ConvertOptions(out=out, name="demo", validation=Dataset.read(data), **options)
    return convert(checkpoint, list(configs), given, report)


def stages(events: list[Event], words: str) -> list[str]:
    return [event.name for event in events if isinstance(event, StageStarted) and words in event.name]


def is_empty(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------- who decides


def test_int8_is_decided_by_its_ap_alone(people: Path, tmp_path: Path) -> None:
    """Gates that nothing passes are told, and nothing is searched."""
    events: list[Event] = []
    strict = config("onnxruntime-int8", relative_linf=0, keypoint_px=0, keypoint_mean_px=0, score=0, ap_drop=50)
    (conversion,) = converted(tmp_path, people, strict, events=events)
    assert conversion.error is None, conversion.error
    assert stages(events, "search") == []
    record = conversion.parity
    assert record is not None
    assert record.decided_by == "accuracy"
    assert record.passed
    assert not any(figure.passed for figure in record.outputs)
    assert failed_gates(record) == []
    rows = {row["what"]: row["ok"] for row in parity_rows(record)}
    assert rows.pop(f"AP of keypoints ({IMAGES} images)") == "ok"
    assert "beyond" in rows.values()
    assert "FAIL" not in rows.values()
    bundle = Bundle.open(conversion.place)
    bundle.verify()
    assert bundle.manifest is not None
    assert bundle.manifest.parity == record
    readme = (conversion.place / "README.md").read_text()
    assert f"AP of keypoints ({IMAGES} images)" in readme
    assert "FAIL" not in readme


def test_int8_that_was_ruined_fails_by_its_ap_and_leaves_no_bundle(people: Path, tmp_path: Path) -> None:
    wide = {"relative_linf": 1e9, "keypoint_px": 1e9, "keypoint_mean_px": 1e9, "score": 1e9}
    (conversion,) = converted(tmp_path / "out", people, config("onnxruntime-int8", int8=RUINED, ap_drop=0, **wide))
    assert isinstance(conversion.error, ParityError)
    assert conversion.status == "failed"
    record = conversion.parity
    assert record is not None
    assert all(figure.passed for figure in (*record.outputs, *record.pixels))
    (figure,) = record.accuracy
    assert figure.drop > 5
    assert failed_gates(record) == [f"keypoints_ap drops by {figure.drop:.2f} points > 0"]
    assert f"keypoints_ap drops by {figure.drop:.2f} points > 0: no bundle was written" in str(conversion.error)
    assert parity_rows(record)[-1]["ok"] == "FAIL"
    assert is_empty(tmp_path / "out")


def test_int8_without_a_gate_for_ap_is_decided_by_the_other_figures(people: Path, tmp_path: Path) -> None:
    (conversion,) = converted(tmp_path / "out", people, config("onnxruntime-int8", int8={"search": False}, ap_drop=None, relative_linf=0))
    assert isinstance(conversion.error, ParityError)
    assert "simcc" in str(conversion.error)
    record = conversion.parity
    assert record is not None
    assert (record.decided_by, record.accuracy[0].gate, record.accuracy[0].passed) == ("parity", None, True)
    assert parity_rows(record)[-1]["gate"] == ""


def test_float32_needs_both(people: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    sound, strict = converted(tmp_path, people, config("onnxruntime"), msgspec.structs.replace(config("onnxruntime", relative_linf=0), target="strict"), events=events)
    assert sound.status == "built", sound.error
    assert sound.parity is not None
    assert sound.parity.decided_by == "parity"
    (figure,) = sound.parity.accuracy
    assert (figure.name, figure.data, figure.images, figure.gate) == ("keypoints_ap", "annotations.json", IMAGES, 0.05)
    assert abs(figure.drop) <= 0.05
    assert isinstance(strict.error, ParityError)
    assert "simcc" in str(strict.error)
    assert strict.parity is not None
    assert strict.parity.accuracy == sound.parity.accuracy
    assert [path.name for path in tmp_path.iterdir()] == ["demo_onnxruntime"]


def record(*, decided_by: Any = "parity", output: bool = True, pixel: bool = True, reference: float = 0.5, value: float = 0.5, gate: float | None = 1.0) -> ParityRecord:
    return ParityRecord(
        verified=True,
        decided_by=decided_by,
        outputs=[OutputParity(name="out", max_abs=1.0, relative_linf=0.5, gate=0.1 if not output else 1.0, passed=output)],
        pixels=[PixelParity(name="keypoint_shift_px", worst=3.0, mean=1.0, count=2, undecided=0, gate=1.0 if not pixel else 5.0, passed=pixel)],
        accuracy=[AccuracyParity(name="bbox_ap", data="val.json", images=7, reference=reference, value=value, gate=gate)],
    )


@pytest.mark.parametrize(
    ("made", "failed"),
    [
        (record(), []),
        (record(value=0.6), []),
        (record(value=0.495), []),
        (record(value=0.485), ["bbox_ap drops by 1.50 points > 1"]),
        (record(value=0.0, gate=None), []),
        (record(value=float("nan")), ["bbox_ap drops by nan points > 1"]),
        (record(output=False), ["out 0.5 > 0.1"]),
        (record(output=False, pixel=False, value=0.4), ["out 0.5 > 0.1", "keypoint_shift_px 3 > 1", "bbox_ap drops by 10.00 points > 1"]),
        (record(decided_by="accuracy", output=False, pixel=False), []),
        (record(decided_by="accuracy", value=0.4), ["bbox_ap drops by 10.00 points > 1"]),
        (record(decided_by="accuracy", output=False, pixel=False, value=0.4, gate=10.5), []),
    ],
)
def test_a_record_passes_where_no_gate_that_decides_failed(made: ParityRecord, failed: list[str]) -> None:
    assert failed_gates(made) == failed
    assert made.passed == (not failed)
    verdicts = [row["ok"] for row in parity_rows(made)]
    assert ("FAIL" in verdicts) == bool(failed)
    beyond = made.decided_by == "accuracy" and not made.outputs[0].passed
    assert ("beyond" in verdicts) == beyond


def test_the_row_of_an_accuracy_has_both_figures() -> None:
    assert parity_rows(record(value=0.4925))[-1] == {"what": "AP of bbox (7 images)", "figure": "49.25, PyTorch 50.00", "gate": "drop 1", "ok": "ok"}


# -------------------------------------------------------------------------------------------------------------- what is measured


def test_pytorch_is_measured_once_for_all_targets(people: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    configs = [config("onnxruntime"), config("onnxruntime-fp16", ap_drop=50), config("onnxruntime-int8", ap_drop=50)]
    made = converted(tmp_path, people, *configs, events=events)
    assert [conversion.error for conversion in made] == [None] * 3
    assert stages(events, "AP of ") == ["AP of PyTorch", "AP of onnxruntime", "AP of onnxruntime-fp16", "AP of onnxruntime-int8"]
    told = [(event.done, event.total) for event in events if isinstance(event, Advanced) and event.name == "AP of PyTorch"]
    assert told == [(i + 1, IMAGES) for i in range(IMAGES)]
    records = [conversion.parity for conversion in made if conversion.parity is not None]
    assert [record.decided_by for record in records] == ["parity", "parity", "accuracy"]
    assert len({record.accuracy[0].reference for record in records}) == 1
    # And it is the AP that users will measure.
    with PoseDetector(made[2].place, threads=1) as estimator:
        assert evaluate_keypoints(estimator, Dataset.read(people)).figures["AP"] == pytest.approx(records[2].accuracy[0].value, abs=1e-6)


def test_the_manifest_has_the_record_and_keeps_it(people: Path, tmp_path: Path) -> None:
    (conversion,) = converted(tmp_path, people, config("onnxruntime"), checkpoint=DETECTOR)
    assert conversion.error is None, conversion.error
    bundle = Bundle.open(conversion.place)
    bundle.verify()
    assert bundle.manifest is not None
    assert bundle.manifest.parity == conversion.parity
    raw = json.loads((conversion.place / "manifest.json").read_bytes())["parity"]
    assert raw["decided_by"] == "parity"
    (figure,) = raw["accuracy"]
    assert figure == {"name": "bbox_ap", "data": "annotations.json", "images": IMAGES} | {key: figure[key] for key in ("reference", "value")} | {"gate": 0.05}
    assert 0.5 < figure["reference"] <= 1


def test_a_bundle_of_other_data_is_not_up_to_date(people: Path, tmp_path: Path) -> None:
    shutil.copytree(people.parent, tmp_path / "data")
    other = tmp_path / "data/annotations.json"
    made = [converted(tmp_path / "out", people, config("onnxruntime"))[0].status for _ in range(2)]
    assert made == ["built", "current"]
    assert converted(tmp_path / "out", other, config("onnxruntime"))[0].status == "current", "the same data elsewhere"
    raw = json.loads(other.read_bytes())
    raw["annotations"] = raw["annotations"][1:]
    other.write_text(json.dumps(raw))
    assert converted(tmp_path / "out", other, config("onnxruntime"))[0].status == "built"
    (plain,) = convert(POSE, [config("onnxruntime")], ConvertOptions(out=tmp_path / "out", name="demo"))
    assert plain.status == "built"
    assert plain.parity is not None
    assert plain.parity.accuracy == []


def test_images_that_cannot_be_read_are_said_once_and_counted(people: Path, tmp_path: Path) -> None:
    shutil.copytree(people.parent, tmp_path / "data")
    (tmp_path / "data/images/000001.jpg").write_bytes(b"no picture")
    events: list[Event] = []
    (conversion,) = converted(tmp_path / "out", tmp_path / "data/annotations.json", config("onnxruntime"), events=events)
    assert conversion.parity is not None
    assert conversion.parity.accuracy[0].images == IMAGES - 1
    assert len([event for event in events if isinstance(event, Noted) and event.level == "warning" and "000001.jpg" in event.text]) == 1
    details = [event.detail for event in events if isinstance(event, StageFinished) and event.name.startswith("AP of")]
    assert all(detail.endswith(f"on {IMAGES - 1} images, 1 skipped") for detail in details)
    shutil.rmtree(tmp_path / "data/images")
    (conversion,) = converted(tmp_path / "none", tmp_path / "data/annotations.json", config("onnxruntime"))
    assert isinstance(conversion.error, InputError)
    assert is_empty(tmp_path / "none")


def test_a_classifier_has_no_ap(people: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": random_weights(classifier_shapes(widen=0.0625, deepen=0.167, classes=3), seed=1)}, tmp_path / "classifier.pth")
    (conversion,) = converted(tmp_path / "out", people, config("onnxruntime"), checkpoint=tmp_path / "classifier.pth")
    assert isinstance(conversion.error, ConfigError)
    assert "expected a detector or a pose estimator to measure AP of, found a Classifier" in str(conversion.error)
    assert is_empty(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ the command line


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)
    (tmp_path / "quick-int8.toml").write_text('backend = "onnxruntime"\nprecision = "int8"\n[int8]\nscenes = 2\n[gates]\nrelative_linf = 0\nap_drop = 50\n')
    return lambda *more: CliRunner().invoke(app, ["convert", "-o", str(tmp_path / "out"), *map(str, more)])


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in words), error
    assert "Traceback" not in result.output


def test_the_command_line_measures(invoke: Invoke, people: Path, tmp_path: Path) -> None:
    """Images of another folder, some of them only; the summary has a column for it."""
    shutil.copytree(people.parent / "images", tmp_path / "photos/images")
    shutil.copy(people, tmp_path / "val.json")
    targets = ["-t", "onnxruntime", "-t", tmp_path / "quick-int8.toml"]
    options = ["--val-annotations", tmp_path / "val.json", "--val-images", tmp_path / "photos", "--val-limit", 3]
    done = invoke("demo-pose", *targets, *options)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("done AP of PyTorch") == 1
    assert "AP of keypoints (3 images)" in done.stdout
    assert "beyond" in done.stdout
    heading, *lines = [line for line in done.stdout[done.stdout.rindex("┏") :].splitlines() if line.startswith(("┃", "│"))]
    at = [cell.strip() for cell in heading.strip("┃").split("┃")].index("AP")
    shown = [float(line.strip("│").split("│")[at]) for line in lines]
    found = json.loads(invoke("demo-pose", *targets, *options, "--json").stdout)
    assert [entry["status"] for entry in found] == ["current", "current"]
    assert [round(100 * entry["parity"]["accuracy"][0]["value"], 1) for entry in found] == shown
    assert [entry["parity"]["accuracy"][0]["data"] for entry in found] == ["val.json", "val.json"]


@pytest.mark.parametrize("options", [["--val-limit", "3"], ["--val-images", "."], ["--val-images", ".", "--val-limit", "3"]])
def test_what_belongs_to_annotations_is_refused_without_them(invoke: Invoke, tmp_path: Path, options: list[str]) -> None:
    result = invoke("demo-pose", "-t", "onnxruntime", *options)
    assert_refused(result, 4, "--val-limit: expected --val-annotations beside them, found none")
    assert is_empty(tmp_path / "out")


def test_annotations_that_cannot_be_used_are_one_line(invoke: Invoke, people: Path, tmp_path: Path) -> None:
    assert_refused(invoke("demo-pose", "-t", "onnxruntime", "--val-annotations", tmp_path / "gone.json"), 10, "gone.json")
    (tmp_path / "wrong.json").write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    assert_refused(invoke("demo-pose", "-t", "onnxruntime", "--val-annotations", tmp_path / "wrong.json"), 10, "wrong.json", "$.images[", "file_name")
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, tmp_path / "three.pth")
    assert_refused(invoke(tmp_path / "three.pth", "-t", "onnxruntime", "--val-annotations", people), 4, "expected 3 for each object", "found 17")
    assert invoke("demo-pose", "-t", "onnxruntime", "--val-annotations", people, "--val-limit", "0").exit_code == 2
    assert is_empty(tmp_path / "out")


def test_without_its_library_it_is_said_before_any_work(invoke: Invoke, people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    result = invoke("demo-pose", "-t", "onnxruntime", "--val-annotations", people)
    assert_refused(result, 5, "needs faster-coco-eval, not installed")
    assert "done" not in result.stderr
