"""What is measured: bundles and checkpoints behind one face, found by what the user wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modelcrate_converter.cli  # noqa: F401  # from then on checkpoints are subjects too
from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import BundleError, BundleIntegrityError, CheckpointError, ConfigError, InputError, ModelcrateError
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_runtime.profiler import Stopwatch, noise_image
from modelcrate_runtime.sessions import SessionOptions
from modelcrate_runtime.subjects import find_subject, find_subjects, of_bundle
from modelcrate_runtime.tasks import Classifier, Detector, PoseDetector

PATHS = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("sdk_bundle", "runtimes", "converter"))
ONE_THREAD = SessionOptions(threads=1)
pytestmark = pytest.mark.usefixtures("torch_threads")


@pytest.fixture
def zipped(pose_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", pose_bundle))


def test_a_bundle_is_a_subject_in_a_folder_and_in_a_zip(pose_bundle: Path, zipped: Path) -> None:
    for place in (pose_bundle, zipped):
        subject = find_subject(str(place))
        bundle = Bundle.open(place)
        assert (subject.name, subject.backend, subject.precision, subject.checkpoints) == (bundle.name, "onnxruntime", "fp32", "")
        assert subject.text == str(place)
        assert subject.size_bytes == (pose_bundle / "end2end.onnx").stat().st_size
        with subject.open(ONE_THREAD) as task:
            assert isinstance(task, PoseDetector)
            assert task(noise_image()).shape == (1, 17, 3)


@pytest.mark.parametrize(("name", "architecture", "kind"), [("demo-pose", "rtmpose-nano", PoseDetector), ("demo-det", "rtmdet-nano", Detector)])
def test_a_checkpoint_is_a_subject_by_name_and_by_path(name: str, architecture: str, kind: type) -> None:
    for text, called in ((name, name), (str(DEMO_MODELS[name]), architecture)):
        subject = find_subject(text)
        assert (subject.name, subject.backend, subject.precision, subject.text) == (f"{called}_pytorch", "pytorch", "fp32", text)
        assert subject.bundle is None
        assert subject.size_bytes == DEMO_MODELS[name].stat().st_size
        with subject.open(ONE_THREAD) as task:
            assert type(task) is kind


def test_a_checkpoint_answers_as_its_bundle_does(demo_pose_bundle: Path) -> None:
    answers = []
    for text in ("demo-pose", str(demo_pose_bundle)):
        with find_subject(text).open(ONE_THREAD) as task:
            answers.append(task(noise_image()))
    assert answers[0] == pytest.approx(answers[1], abs=0.1)


def test_a_subject_is_opened_again_and_again(pose_bundle: Path) -> None:
    for text in (str(pose_bundle), "demo-pose"):
        subject = find_subject(text)
        with subject.open(ONE_THREAD) as first:
            before = first(noise_image())
        with subject.open(ONE_THREAD) as second:
            assert (second(noise_image()) == before).all()


def test_what_stands_between_task_and_network_is_asked_and_closed(pose_bundle: Path) -> None:
    watches: list[Stopwatch] = []
    with find_subject(str(pose_bundle)).open(ONE_THREAD, wrap=lambda session: watches.append(Stopwatch(session)) or watches[-1]) as task:
        assert task.session is watches[0]
        task(noise_image())
    assert len(watches[0].runs) == 1
    with pytest.raises(InputError, match="expected an open session, found a closed one"):
        watches[0].run({})


@pytest.mark.parametrize("broken", ["wrap", "task"])
def test_the_network_is_closed_if_the_task_cannot_be_made(pose_bundle: Path, broken: str) -> None:
    opened: list[Any] = []
    subject = find_subject(str(pose_bundle))

    def refuse(session: Any) -> Any:
        raise KeyboardInterrupt

    tracked = replace(subject, open_network=lambda options: opened.append(subject.open_network(options)) or opened[-1])
    if broken == "task":
        tracked = replace(tracked, open_around=refuse)
    with pytest.raises(KeyboardInterrupt):
        tracked.open(ONE_THREAD, wrap=refuse if broken == "wrap" else None)
    with pytest.raises(InputError, match="expected an open session, found a closed one"):
        opened[0].run({})


def test_a_changed_bundle_is_refused(pose_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(pose_bundle, tmp_path / "changed")
    with (tmp_path / "changed" / "end2end.onnx").open("ab") as stream:
        stream.write(b"\0")
    for find in (lambda: find_subject(str(tmp_path / "changed")), lambda: of_bundle(Bundle.open(tmp_path / "changed"))):
        with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: expected .* found"):
            find()


def _empty_folder(place: Path) -> Path:
    place.mkdir()
    return place


def _file(content: bytes, suffix: str = "") -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        place = place.with_suffix(suffix)
        place.write_bytes(content)
        return place

    return make


def _other_zip(place: Path) -> Path:
    with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
        archive.writestr("notes.txt", "no bundle")
    return place.with_suffix(".zip")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_empty_folder, BundleError),
        (_file(b""), CheckpointError),
        (_file(b"text", ".pth"), CheckpointError),
        (_file(b"\x08\0\0\0\0\0\0\0{}      ", ".safetensors"), CheckpointError),
        (_file(b"PK\x03\x04 not really", ".zip"), BundleError),
        (_other_zip, ModelcrateError),
        (lambda place: place.with_suffix(".pth"), ConfigError),
        (lambda place: place / "deeper" / "gone.zip", ConfigError),
    ],
    ids=["empty folder", "empty file", "text", "empty safetensors", "broken zip", "zip of something else", "no such checkpoint", "no such zip"],
)
def test_what_is_neither_is_an_error_with_its_place(make: Callable[[Path], Path], kind: type[ModelcrateError], tmp_path: Path) -> None:
    place = make(tmp_path / "it")
    with pytest.raises(kind) as caught:
        find_subject(str(place))
    assert "it" in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "hint"), [("demo-poze", "did you mean demo-pose"), ("nothing-like-it", "zoo list")])
def test_an_unknown_name_is_an_error_with_what_to_do(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="expected a checkpoint file or the name of a published model, found neither") as caught:
        find_subject(text)
    assert hint in caught.value.hint


@pytest.mark.parametrize("texts", [["a", "a", "a"], ["a (2)", "a", "a"], ["a", "a", "a (2)"], ["a (2)", "a", "a (2)", "a"], ["a", "a b", "a"]], ids=str)
def test_subjects_of_one_name_get_numbers_and_all_names_differ(pose_bundle: Path, tmp_path: Path, texts: list[str]) -> None:
    """Without a manifest a bundle is called as its folder is, and a downloaded one is often "a (2)"."""
    places = []
    for i, text in enumerate(texts):
        places.append(tmp_path / str(i) / text)
        shutil.copytree(pose_bundle, places[-1])
        (places[-1] / "manifest.json").unlink()
    subjects = find_subjects(map(str, places))
    names = [subject.name for subject in subjects]
    assert names[0] == texts[0]
    assert len(set(names)) == len(texts), names
    assert all(name.startswith(text) for name, text in zip(names, texts, strict=True))
    assert [subject.text for subject in subjects] == list(map(str, places))
    if texts == ["a", "a", "a"]:
        assert names == ["a", "a (2)", "a (3)"]


ALONE = """
import sys
from modelcrate_bundle.errors import ModelcrateError
from modelcrate_runtime.subjects import find_subject
for text in sys.argv[1:]:
    try:
        print(find_subject(text).name)
    except ModelcrateError as error:
        print(type(error).__name__, str(error).count(chr(10)), "modelcrate_converter" in sys.modules, "torch" in sys.modules)
"""


def test_a_device_without_the_converter_finds_bundles_and_nothing_else(pose_bundle: Path, zipped: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(pose_bundle), str(zipped), "demo-pose", str(DEMO_MODELS["demo-pose"])],
        env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    name = Bundle.open(pose_bundle).name
    first, second, *others = done.stdout.splitlines()
    assert (first, second) == (name, name)
    assert [line.split()[1:] for line in others] == [["0", "False", "False"]] * 2
    assert all("BundleError" in line or "BundleFormatError" in line for line in others)


def test_a_classifier_is_a_subject_too(tmp_path: Path) -> None:
    from modelcrate_converter.models.blueprints import classifier_shapes, random_weights

    torch.save({"state_dict": random_weights(classifier_shapes(widen=0.0625, deepen=0.167, classes=6), seed=1)}, tmp_path / "classes.pth")
    with find_subject(str(tmp_path / "classes.pth")).open(ONE_THREAD) as task:
        assert isinstance(task, Classifier)
        assert len(task(noise_image())) > 0
