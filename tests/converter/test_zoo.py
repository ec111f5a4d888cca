"""The published models: what the table says of them is so, and names lead to files."""

import functools
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modelcrate_bundle.errors import ConfigError, DownloadError
from modelcrate_converter import download as download_module
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.cli import app
from modelcrate_converter.download import expected_sha256_prefix
from modelcrate_converter.models.blueprints import DETECTOR_SIZES, POSE_SIZES, classifier_shapes, heatmap_shapes, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.zoo import ZooModel, fetch_model, find_model, get_model, zoo_models
from modelcrate_runtime.skeletons import DATA_SETS, published_keypoints

NAMES = list(zoo_models())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A folder with one small checkpoint, served over HTTP."""
    (tmp_path / "served").mkdir()
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=17, input_hw=(96, 64), hidden=32, s=16)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, tmp_path / "served/net.pth")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


# -------------------------------------------------------------------------------------------------------------------- the table


def test_names_and_aliases_are_unique_and_lead_home() -> None:
    every = [name for model in zoo_models().values() for name in (model.name, *model.aliases)]
    assert len(every) == len(set(every)) >= 85
    for model in zoo_models().values():
        for name in (model.name, *model.aliases, model.name.upper()):
            assert find_model(name) is model


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_sound(name: str) -> None:
    model = zoo_models()[name]
    assert re.fullmatch(r"(rtmpose|rtmdet|cspnext)-[a-z]+_[a-z0-9-]+-\d+(x\d+)?", name)
    assert model.urls
    for url in model.urls:
        assert url.startswith("https://download.openmmlab.com/")
        assert expected_sha256_prefix(url) == (model.sha256 or None)
    assert all(side % 32 == 0 for side in model.input_hw)
    assert name.endswith("x".join(str(v) for v in dict.fromkeys(model.input_hw)) if model.task != "PoseDetector" else f"{model.input_hw[0]}x{model.input_hw[1]}")
    assert (model.keypoints in DATA_SETS) == (model.task == "PoseDetector")
    assert model.metrics


def parameters(shapes: dict[str, tuple[int, ...]]) -> float:
    """Millions; what BatchNorm counts is none."""
    learned = {key: shape for key, shape in shapes.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    shared = {key for key in learned if re.fullmatch(r"bbox_head\.(cls|reg)_convs\.[12]\.\d\.conv\.weight", key)}
    return sum(math.prod(shape) for key, shape in learned.items() if key not in shared) / 1e6


@pytest.mark.parametrize("name", [name for name in NAMES if zoo_models()[name].parameters_m is not None and "pruned" not in name])
def test_the_networks_have_as_many_parameters_as_the_pages_say(name: str) -> None:
    model = zoo_models()[name]
    architecture, size = re.match(r"(\w+)-([a-z]+)_", name).groups()
    if architecture == "rtmdet":
        widen, deepen = DETECTOR_SIZES[size]
        found = parameters(rtmdet_shapes(widen=widen, deepen=deepen, classes=80 if "_coco-" in name else 1, separable=size == "nano"))
        tolerance = 0.1 if "_coco-" in name else 0.005  # MMDetection's page cuts after a digit or two: 4.8 for 4.896
    elif "_in1k-" in name:
        widen, deepen = POSE_SIZES[size] if size != "x" else DETECTOR_SIZES["x"]
        found, tolerance = parameters(classifier_shapes(widen=widen, deepen=deepen, classes=1000)), 0.0055
    else:
        widen, deepen = POSE_SIZES[size] if size != "x" else DETECTOR_SIZES["x"]
        keypoints = len(published_keypoints(model.keypoints).names)
        make = rtmpose_shapes if architecture == "rtmpose" else heatmap_shapes
        extra = {"input_hw": model.input_hw} if architecture == "rtmpose" else {}
        found = parameters(make(widen=widen, deepen=deepen, keypoints=keypoints, **extra))
        tolerance = 0.0055
    assert found == pytest.approx(model.parameters_m, abs=tolerance)


# ------------------------------------------------------------------------------------------------------------------- by the name


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ConfigError, match="rtmpose-q: expected the name of a published model") as caught:
        get_model("rtmpose-q")
    assert "rtmpose-" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        get_model("resnet")
    assert "zoo list" in caught.value.hint


def test_the_first_place_that_has_the_file_is_taken(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "BACKOFF_S", ())
    model = ZooModel(name="net", task="PoseDetector", input_hw=(96, 64), urls=(f"{served}/gone/net.pth", f"{served}/net.pth"))
    notes: list[object] = []
    path = fetch_model(model, cache_dir=tmp_path / "cache", report=notes.append)
    assert path.read_bytes() == (tmp_path / "served/net.pth").read_bytes()
    assert any("trying the next place" in str(note) for note in notes)
    assert fetch_model(model, cache_dir=tmp_path / "cache", offline=True) == path


def test_a_dead_host_is_one_sentence_with_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "BACKOFF_S", ())
    model = ZooModel(name="net", task="Detector", input_hw=(64, 64), urls=("http://127.0.0.1:9/a.pth", "http://127.0.0.1:9/b.pth"))
    with pytest.raises(DownloadError, match=r"net: expected one of 2 places.*127\.0\.0\.1:9/a\.pth.*127\.0\.0\.1:9/b\.pth") as caught:
        fetch_model(model, cache_dir=tmp_path)
    assert "give its path" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_refused(served: str, tmp_path: Path) -> None:
    model = ZooModel(name="net", task="PoseDetector", input_hw=(96, 64), sha256="0" * 8, urls=(f"{served}/net.pth",))
    with pytest.raises(DownloadError, match="00000000"):
        fetch_model(model, cache_dir=tmp_path)


def test_what_the_zoo_knows_of_keypoints_counts_where_the_checkpoint_is_silent(tmp_path: Path) -> None:
    shapes = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=17, input_hw=(96, 64), hidden=32, s=16)
    torch.save({"state_dict": random_weights(shapes, seed=1)}, tmp_path / "a.pth")
    torch.save({"state_dict": random_weights(shapes, seed=1), "meta": {"dataset_meta": {"dataset_name": "coco"}}}, tmp_path / "b.pth")
    animal = read_architecture(read_checkpoint(tmp_path / "a.pth"), keypoints="ap10k")
    assert animal.keypoints is published_keypoints("ap10k")
    assert animal.facts["keypoint names"] == "the zoo: ap10k"
    assert read_architecture(read_checkpoint(tmp_path / "b.pth"), keypoints="ap10k").keypoints is published_keypoints("coco")


# -------------------------------------------------------------------------------------------------------------- the command line


def test_list_show_and_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path))
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["zoo", "list", "wholebody", "--json"]).stdout)
    assert [row["name"] for row in listed] == [name for name in NAMES if "wholebody" in name]
    table = runner.invoke(app, ["zoo", "list", "rtmpose-m", "halpe"])
    assert "rtmpose-m_halpe26-256x192" in table.stdout
    assert "rtmdet" not in table.stdout
    shown = runner.invoke(app, ["zoo", "show", "rtmpose-m"])
    assert "AP_coco 74.9" in shown.stdout
    assert json.loads(runner.invoke(app, ["zoo", "show", "rtmpose-m", "--json"]).stdout)["sha256"] == "e48f03d0"
    assert runner.invoke(app, ["zoo", "list", "resnet"]).exit_code == ConfigError.exit_code
    assert runner.invoke(app, ["zoo", "show", "resnet"]).exit_code == ConfigError.exit_code
    offline = runner.invoke(app, ["zoo", "fetch", "rtmpose-m", "--offline"])
    assert offline.exit_code == DownloadError.exit_code
    assert "--offline is set" in offline.stderr


def test_convert_takes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCRATE_CACHE", str(tmp_path))
    runner = CliRunner()
    missing = runner.invoke(app, ["convert", "rtmpse-m", "-t", "onnxruntime"])
    assert missing.exit_code == ConfigError.exit_code
    assert "did you mean rtmpose-m" in missing.stderr
    offline = runner.invoke(app, ["convert", "rtmpose-m", "-t", "onnxruntime", "--offline"])
    assert offline.exit_code == DownloadError.exit_code
    assert "rtmpose-m_body8-256x192: expected one of 1 places" in offline.stderr
    assert "convert FILE.pth" in offline.stderr
