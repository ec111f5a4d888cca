"""CSPNeXt as a classifier: upstream's network, Pillow's resize, a bundle that says what it needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelcrate_bundle.errors import ConfigError, TaskMismatchError, UnsupportedBundleError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.cli import app
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.describe import describe_pipeline
from modelcrate_converter.exportable import ClassifierFacts, ImageFit
from modelcrate_converter.models.blueprints import classifier_shapes, random_weights
from modelcrate_converter.models.classifier import ImageClassifier
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime import Classifier, Detector
from modelcrate_runtime.draw import draw_classes
from modelcrate_runtime.images import read_image, write_image
from modelcrate_runtime.postprocess import ClassDecoder
from modelcrate_runtime.preprocess import Preprocessor
from modelcrate_runtime.resampling import resize_pillow
from oracle_weights import MORE, oracle_input, oracle_outputs, oracle_shapes, oracle_weights

NAMES = [f"cspnext-{size}_in1k-224" for size in "tsml"]
CLASSES = tuple(f"thing {i}" for i in range(7))


def checkpoint(folder: Path, *, cfg: str = "", classes: int = 7) -> Path:
    path = folder / "classifier.pth"
    weights = random_weights(classifier_shapes(widen=0.125, deepen=0.167, classes=classes), seed=1)
    torch.save({"state_dict": weights, "meta": {"cfg": cfg, "dataset_meta": {"classes": CLASSES}}}, path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    write_image(folder / "scene.png", procedural_scenes(1)[0][1])
    options = ConvertOptions(out=folder / "crates", images=(folder / "scene.png",))
    (conversion,) = convert(checkpoint(folder), [load_config("onnxruntime")], options)
    assert conversion.error is None, conversion.error
    assert conversion.parity is not None
    assert conversion.parity.passed
    return conversion.place


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_what_mmpretrain_computes(name: str) -> None:
    if not (MORE / f"{name}.npz").is_file():
        pytest.skip("needs ../shared/oracle: more reference outputs")
    module = ImageClassifier(oracle_shapes(name)).eval()
    module.load_state_dict(oracle_weights(oracle_shapes(name)))
    tensor = torch.from_numpy(oracle_input(name))
    with torch.inference_mode():
        logits, (probabilities,) = module.logits(tensor).numpy(), module(tensor)
    expected = oracle_outputs(name)["logits"]
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 1e-4
    np.testing.assert_allclose(probabilities.sum(dim=1), 1, atol=1e-5)


def test_facts_come_from_the_config(tmp_path: Path) -> None:
    cfg = """
model = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=7, topk=(1, 5)))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='ResizeEdge', scale=100, edge='short'), dict(type='CenterCrop', crop_size=96), dict(type='PackInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
    model = read_architecture(read_checkpoint(checkpoint(tmp_path, cfg=cfg)))
    assert (model.task, model.input_hw, model.class_names) == ("Classifier", (96, 96), list(CLASSES))
    assert model.postprocess == ClassifierFacts(fit=ImageFit(mode="shorter-edge", edge=100), topk=5)


def test_without_a_config_they_are_named_defaults(tmp_path: Path) -> None:
    model = read_architecture(read_checkpoint(checkpoint(tmp_path)))
    assert (model.name, model.input_hw) == ("cspnext-c128", (224, 224))
    assert model.postprocess == ClassifierFacts(fit=ImageFit(mode="shorter-edge", edge=236, resampling="pillow-bicubic"), topk=5)
    assert model.facts["resampling"] == "default: pillow-bicubic"


def test_another_resize_is_refused(tmp_path: Path) -> None:
    cfg = "test_pipeline = [dict(type='ResizeEdge', scale=100, backend='pillow', interpolation='lanczos'), dict(type='PackInputs')]"
    with pytest.raises(ConfigError, match="resampling: .*expected Pillow's bicubic or OpenCV's bilinear resize"):
        read_architecture(read_checkpoint(checkpoint(tmp_path, cfg=cfg)))


# ---------------------------------------------------------------------------------------------------------------------- resizing

# SHA-256 of PIL.Image.fromarray(image).resize((width, height), BILINEAR or BICUBIC), made with Pillow 13.0.0 and numpy 2.4 for
# image = numpy.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=uint8), drawn in this order from one generator.
PILLOW = [
    ((375, 500), (314, 236), {"bicubic": "e4d47396c978f4d3a04468367d0bef2bab5376c4370249a4d2550106d50a2759", "bilinear": "1844d5004edaf9166c49420bd4b2d86dbfe67aaf8130ae7f6dbc66e35840cfc7"}),
    ((120, 90), (236, 314), {"bicubic": "c33eb7cb270a6300dfe92392f374fff7dd3c7a37246acc83d9dfa203a9293ee5", "bilinear": "0df105e538236ae4320a6801da6076b3dfe37eb40d031798a3f206f1c02d7b99"}),
]


def test_resize_is_pillows_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    for (height, width), size_wh, digests in PILLOW:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for kernel, digest in digests.items():
            assert hashlib.sha256(resize_pillow(image, size_wh, kernel=kernel).tobytes()).hexdigest() == digest, kernel


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_resize_keeps_what_is_flat_and_what_has_its_size(kernel: str) -> None:
    flat = np.full((50, 80, 3), (0, 130, 255), dtype=np.uint8)
    assert (resize_pillow(flat, (33, 120), kernel=kernel) == (0, 130, 255)).all()
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_pillow(image, (30, 20), kernel=kernel), image)


def test_geometries_resize_and_crop_as_their_owners_do(tmp_path: Path) -> None:
    pipeline = describe_pipeline(read_architecture(read_checkpoint(checkpoint(tmp_path))), has_nms=False)
    image = procedural_scenes(1)[0][1]
    exact, _ = Preprocessor(pipeline, geometry="exact", where="test", resampling="pillow-bicubic").image(image)
    bilinear, _ = Preprocessor(pipeline, geometry="sdk", where="test", resampling="pillow-bicubic").image(image)
    assert exact.shape == bilinear.shape == (1, 3, 224, 224)
    resized = resize_pillow(image, (314, 236), kernel="bicubic")  # 480x640: the shorter edge becomes 236
    left = (resized[6:230, 45:269, 2].astype(np.float32) - np.float32(123.675)) * (np.float32(1) / np.float32(58.395))
    np.testing.assert_array_equal(exact[0, 0], left)
    assert 0.005 < np.abs(exact - bilinear).mean() < 1
    with pytest.raises(UnsupportedBundleError, match="resampling"):
        Preprocessor(pipeline, geometry="exact", where="test", resampling="lanczos")


# ------------------------------------------------------------------------------------------------------------------- as a bundle


def test_classifier_answers_as_mmdeploys_does(bundle: Path) -> None:
    images = [image for _, image, _ in procedural_scenes(3)]
    with Classifier(bundle) as classifier:
        assert classifier.class_names == list(CLASSES)
        answer = classifier(images[0])
        assert len(answer) == 5
        assert all(isinstance(label, int) and isinstance(score, float) for label, score in answer)
        assert [score for _, score in answer] == sorted((score for _, score in answer), reverse=True)
        assert 0 < sum(score for _, score in answer) <= 1.00001
        batch = classifier.batch(images)
        for image, of_image in zip(images, batch, strict=True):
            alone = classifier(image)
            assert [label for label, _ in alone] == [label for label, _ in of_image]
            np.testing.assert_allclose([score for _, score in alone], [score for _, score in of_image], atol=1e-5)
        assert classifier.batch([]) == []
        assert len(classifier(images[0][:, :, 0])) == 5  # grey


def test_bundle_says_how_it_resizes_and_shows_what_it_finds(bundle: Path) -> None:
    with Classifier(bundle) as classifier:
        assert classifier.bundle.manifest is not None
        assert classifier.bundle.manifest.resampling == "pillow-bicubic"
        assert classifier.geometry == "exact"
    for name in ("output_pytorch.jpg", "output_onnxruntime.jpg"):
        assert (bundle / name).is_file()
    text = (bundle / "README.md").read_text()
    assert "An image classifier" in text
    assert "Classifier(" in text
    assert "thing 0, thing 1" in text


def test_other_tasks_refuse_it(bundle: Path) -> None:
    with pytest.raises(TaskMismatchError, match="found a classifier"):
        Detector(bundle)


def test_equal_scores_come_in_the_order_of_their_labels(bundle: Path) -> None:
    with Classifier(bundle) as classifier:
        decoder = ClassDecoder(classifier.bundle.pipeline, where="test")
    (result,) = decoder.decode({"output": np.array([[0.1, 0.3, 0.1, 0.3, 0.1, 0.05, 0.05]], dtype=np.float32)})
    assert result.labels.tolist() == [1, 3, 0, 2, 4]


def test_classes_are_drawn(bundle: Path) -> None:
    image = procedural_scenes(1)[0][1]
    with Classifier(bundle) as classifier:
        drawn = draw_classes(image, classifier.classify(image), class_names=classifier.class_names)
    changed = (drawn != image).any(axis=2)
    assert changed[:140, :300].mean() > 0.1
    assert not changed[200:].any()
    assert not changed[:, 320:].any()


def test_command_line_runs_it_alone(bundle: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "photo.png", procedural_scenes(1)[0][1])
    runner = CliRunner()
    shown = runner.invoke(app, ["run", str(bundle), str(tmp_path / "photo.png"), "--save", str(tmp_path / "out.png")])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("thing ") == 5
    assert (read_image(tmp_path / "out.png") != read_image(tmp_path / "photo.png")).any()
    assert len(json.loads(runner.invoke(app, ["run", str(bundle), str(tmp_path / "photo.png"), "--json"]).stdout)) == 5
    boxed = runner.invoke(app, ["run", str(bundle), str(tmp_path / "photo.png"), "--box", "1,2,30,40"])
    assert boxed.exit_code == ConfigError.exit_code
    two = runner.invoke(app, ["run", str(bundle), str(demo_pose_bundle), str(tmp_path / "photo.png")])
    assert two.exit_code == TaskMismatchError.exit_code
    assert "expected a classifier alone" in two.stderr
