"""What a network is stands in its tensors; the rest comes from a source that is named, and two sources must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modelcrate_bundle.errors import ArchitectureError, ConfigError, ModelcrateError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.exportable import DetectorFacts, ExportableModel, Normalization, PoseFacts
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes

Save = Callable[..., Path]
IN_CHECKPOINT = "the checkpoint's config"

POSE_CFG = """
codec = dict(type='SimCCLabel', input_size=(64, 96), sigma=(2.5, 3.5), simcc_split_ratio=2.0, use_dark=False)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(type='PoseDataPreprocessor', mean=[1.5, 2.5, 3.5], std=[4.5, 5.5, 6.5], bgr_to_rgb=False),
    head=dict(type='RTMCCHead', out_channels=3, input_size=(64, 96), decoder=codec))
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='mmpose.GetBBoxCenterScale', padding=1.5),
    dict(type='TopdownAffine', input_size=(64, 96), use_udp=True),
    dict(type='PackPoseInputs')]
test_dataloader = dict(dataset=dict(pipeline=val_pipeline))
"""
DETECTOR_CFG = """
model = dict(
    type='RTMDet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[1.5, 2.5, 3.5], std=[4.5, 5.5, 6.5], bgr_to_rgb=True),
    bbox_head=dict(type='RTMDetSepBNHead', num_classes=2, exp_on_reg=True, anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32])),
    test_cfg=dict(nms_pre=77, min_bbox_size=3, score_thr=0.25, nms=dict(type='nms', iou_threshold=0.35), max_per_img=11))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='Pad', size=(96, 64), pad_val=dict(img=(17, 17, 17))),
    dict(type='PackDetInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, metainfo=dict(classes=('cat', 'dog'))))
"""


def pose_weights(**changes: Any) -> dict[str, torch.Tensor]:
    sizes: dict[str, Any] = {"widen": 0.0625, "deepen": 0.167, "keypoints": 3, "input_hw": (96, 64), "hidden": 16, "s": 8}
    return random_weights(rtmpose_shapes(**(sizes | changes)), seed=1)


def detector_weights(**changes: Any) -> dict[str, torch.Tensor]:
    sizes: dict[str, Any] = {"widen": 0.125, "deepen": 0.167, "classes": 2, "separable": True}
    return random_weights(rtmdet_shapes(**(sizes | changes)), seed=2)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ExportableModel]:
    """Weights and metadata, saved and read back: the way every checkpoint takes."""

    def through_a_file(
        weights: Mapping[str, torch.Tensor], *, cfg: str | None = None, dataset_meta: Mapping[str, Any] | None = None, **options: Any
    ) -> ExportableModel:
        meta: dict[str, Any] = ({"cfg": cfg} if cfg is not None else {}) | ({"dataset_meta": dataset_meta} if dataset_meta is not None else {})
        path = tmp_path / "model.pth"
        torch.save({"state_dict": dict(weights), "meta": meta}, path)
        return read_architecture(read_checkpoint(path), **options)

    return through_a_file


Read = Callable[..., ExportableModel]


# ----------------------------------------------------------------------------------------------------------- off the tensors


@pytest.mark.parametrize("input_hw", [(256, 192), (192, 256), (384, 288), (256, 256), (64, 320), (32, 32)])
@pytest.mark.parametrize(("keypoints", "split_ratio"), [(1, 2), (17, 2), (21, 3), (133, 1)])
def test_input_size_ratio_and_keypoints_are_in_the_shapes(read: Read, input_hw: tuple[int, int], keypoints: int, split_ratio: int) -> None:
    model = read(pose_weights(input_hw=input_hw, keypoints=keypoints, split_ratio=split_ratio))
    height, width = input_hw
    assert model.input_hw == input_hw
    assert model.input.shape == ("batch", 3, height, width)
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.outputs] == [
        ("simcc_x", "float32", ("batch", keypoints, width * split_ratio)),
        ("simcc_y", "float32", ("batch", keypoints, height * split_ratio)),
    ]
    assert isinstance(model.postprocess, PoseFacts)
    assert model.postprocess.split_ratio == split_ratio
    assert model.keypoints is not None
    assert len(model.keypoints.names) == keypoints


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_classes_are_in_the_shapes(read: Read, classes: int) -> None:
    model = read(detector_weights(classes=classes))
    assert model.task == "Detector"
    assert len(set(model.class_names)) == classes
    assert [spec.shape for spec in model.outputs] == [("batch", c, side, side) for c in (classes, 4) for side in (40, 20, 10)]
    assert [spec.name for spec in model.outputs] == ["cls_0", "cls_1", "cls_2", "dist_0", "dist_1", "dist_2"]


def test_eighty_classes_are_cocos_and_others_are_numbered(read: Read) -> None:
    names = read(detector_weights(classes=80)).class_names
    assert (names[0], names[17], names[79]) == ("person", "horse", "toothbrush")
    assert read(detector_weights(classes=2)).class_names == ["class_0", "class_1"]


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (lambda: pose_weights(widen=0.375), "rtmpose-t"),
        (lambda: pose_weights(widen=0.5), "rtmpose-s"),
        (lambda: pose_weights(widen=0.75), "rtmpose-m"),
        (lambda: pose_weights(widen=0.0625), "rtmpose-c64"),
        (lambda: detector_weights(widen=0.25), "rtmdet-nano"),
        (lambda: detector_weights(widen=0.375, separable=False), "rtmdet-tiny"),
        (lambda: detector_weights(widen=0.5, separable=False), "rtmdet-s"),
        (lambda: detector_weights(widen=0.125), "rtmdet-c128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_are_named_by_family_and_width(read: Read, weights: Callable[[], dict[str, torch.Tensor]], name: str) -> None:
    assert read(weights()).name == name


def test_a_given_name_wins(read: Read) -> None:
    assert read(pose_weights(), name="my-pose").name == "my-pose"


def test_the_module_is_ready_to_run_and_deaf_to_the_seed(read: Read) -> None:
    weights = pose_weights()
    model = read(weights)
    assert not any(module.training for module in model.module.modules())
    state = model.module.state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[key], weights[key]) for key in weights)


# -------------------------------------------------------------------------------------------------------------------- sources


def test_defaults_are_those_of_the_published_pose_configs_and_are_stated(read: Read) -> None:
    model = read(pose_weights(input_hw=(256, 192)))
    assert model.postprocess == PoseFacts(padding=1.25, use_udp=False, split_ratio=2.0, sigma=(4.9, 5.66))
    assert model.normalization == Normalization(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), to_rgb=True)
    assert model.facts["box padding"] == "default: 1.25"
    assert model.facts["mean"] == "default: (123.675, 116.28, 103.53)"
    assert all(source.startswith("default: ") for source in model.facts.values()), model.facts
    assert read(pose_weights(input_hw=(384, 288))).postprocess.sigma == (6.0, 6.93)


def test_defaults_are_those_of_the_published_detector_configs_and_are_stated(read: Read) -> None:
    model = read(detector_weights())
    assert model.postprocess == DetectorFacts(pad_value=114, score_thr=0.05, iou_threshold=0.6, max_per_img=100, nms_pre=1000, min_bbox_size=0)
    assert model.normalization == Normalization(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), to_rgb=False)
    assert model.input_hw == (320, 320)
    assert all(source.startswith("default: ") for source in model.facts.values()), model.facts
    assert read(detector_weights(separable=False)).input_hw == (640, 640)
    assert read(detector_weights(classes=80)).postprocess == DetectorFacts(
        pad_value=114, score_thr=0.001, iou_threshold=0.65, max_per_img=300, nms_pre=30000, min_bbox_size=0
    )


def test_the_embedded_config_of_a_pose_model_is_believed(read: Read) -> None:
    model = read(pose_weights(), cfg=POSE_CFG)
    assert model.postprocess == PoseFacts(padding=1.5, use_udp=True, split_ratio=2.0, sigma=(2.5, 3.5))
    assert model.normalization == Normalization(mean=(1.5, 2.5, 3.5), std=(4.5, 5.5, 6.5), to_rgb=False)
    assert {name: model.facts[name] for name in ("box padding", "use_udp", "sigma", "mean", "std", "bgr_to_rgb")} == dict.fromkeys(
        ("box padding", "use_udp", "sigma", "mean", "std", "bgr_to_rgb"), IN_CHECKPOINT
    )


def test_the_embedded_config_of_a_detector_is_believed(read: Read) -> None:
    model = read(detector_weights(), cfg=DETECTOR_CFG)
    assert model.postprocess == DetectorFacts(pad_value=17, score_thr=0.25, iou_threshold=0.35, max_per_img=11, nms_pre=77, min_bbox_size=3)
    assert model.normalization == Normalization(mean=(1.5, 2.5, 3.5), std=(4.5, 5.5, 6.5), to_rgb=True)
    assert model.input_hw == (64, 96)
    assert model.module.bbox_head.exp_on_reg is True
    assert model.class_names == ["cat", "dog"]
    assert set(model.facts.values()) == {IN_CHECKPOINT}


def test_a_given_config_fills_in_what_the_checkpoint_does_not_say(read: Read, tmp_path: Path) -> None:
    given = tmp_path / "mine.py"
    given.write_text(POSE_CFG)
    model = read(pose_weights(), model_config=given)
    assert isinstance(model.postprocess, PoseFacts)
    assert model.postprocess.padding == 1.5
    assert model.facts["box padding"] == "--model-config mine.py"
    assert read(pose_weights(), cfg=POSE_CFG, model_config=given).facts["box padding"] == IN_CHECKPOINT


def test_bases_that_are_not_there_are_recorded(read: Read, tmp_path: Path) -> None:
    given = tmp_path / "child.py"
    given.write_text("_base_ = ['../_base_/gone.py']\n" + POSE_CFG)
    assert "gone.py" in read(pose_weights(), model_config=given).facts["--model-config"]


def test_a_list_of_transforms_gives_its_last_pipeline(read: Read) -> None:
    model = read(
        pose_weights(),
        cfg=POSE_CFG.replace("test_dataloader = dict(dataset=dict(pipeline=val_pipeline))", "test_dataloader = [dict(dataset=dict(pipeline=val_pipeline))]"),
    )
    assert isinstance(model.postprocess, PoseFacts)
    assert model.postprocess.use_udp is True


def test_an_embedded_config_that_is_no_python_is_ignored_and_recorded(read: Read) -> None:
    model = read(pose_weights(), cfg="model = dict(")
    assert model.facts["embedded config"].startswith("not readable, ignored")
    assert model.facts["box padding"] == "default: 1.25"


@pytest.mark.parametrize(
    ("weights", "cfg", "change", "values"),
    [
        (pose_weights, POSE_CFG, ("padding=1.5", "padding=1.75"), ("1.5", "1.75")),
        (pose_weights, POSE_CFG, ("use_udp=True", "use_udp=False"), ("True", "False")),
        (pose_weights, POSE_CFG, ("sigma=(2.5, 3.5)", "sigma=(2.5, 9.5)"), ("(2.5, 3.5)", "(2.5, 9.5)")),
        (pose_weights, POSE_CFG, ("mean=[1.5,", "mean=[7.5,"), ("1.5", "7.5")),
        (detector_weights, DETECTOR_CFG, ("score_thr=0.25", "score_thr=0.125"), ("0.25", "0.125")),
        (detector_weights, DETECTOR_CFG, ("iou_threshold=0.35", "iou_threshold=0.5"), ("0.35", "0.5")),
        (detector_weights, DETECTOR_CFG, ("(17, 17, 17)", "(18, 18, 18)"), ("17", "18")),
        (detector_weights, DETECTOR_CFG, ("size=(96, 64)", "size=(96, 96)"), ("(96, 64)", "(96, 96)")),
        (detector_weights, DETECTOR_CFG, ("exp_on_reg=True", "exp_on_reg=False"), ("True", "False")),
        (detector_weights, DETECTOR_CFG, ("'cat', 'dog'", "'cat', 'cow'"), ("dog", "cow")),
    ],
    ids=["padding", "udp", "sigma", "mean", "score_thr", "iou", "pad", "size", "exp", "classes"],
)
def test_two_configs_that_disagree_are_both_named_with_their_values(
    read: Read, tmp_path: Path, weights: Callable[[], dict[str, torch.Tensor]], cfg: str, change: tuple[str, str], values: tuple[str, str]
) -> None:
    assert change[0] in cfg
    given = tmp_path / "other.py"
    given.write_text(cfg.replace(*change))
    with pytest.raises(ConfigError) as caught:
        read(weights(), cfg=cfg, model_config=given)
    message = str(caught.value)
    assert IN_CHECKPOINT in message
    assert "--model-config other.py" in message
    assert all(value in message for value in values), message
    assert "\n" not in message
    assert caught.value.hint


def test_class_names_of_dataset_meta_and_config_must_agree(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"dataset_meta.*cat, cow.*config.*cat, dog"):
        read(detector_weights(), cfg=DETECTOR_CFG, dataset_meta={"classes": ("cat", "cow")})


@pytest.mark.parametrize(
    ("weights", "cfg", "change", "words"),
    [
        (pose_weights, POSE_CFG, ("out_channels=3", "out_channels=17"), ("keypoints", "3", "17")),
        (pose_weights, POSE_CFG, ("simcc_split_ratio=2.0", "simcc_split_ratio=3.0"), ("split ratio", "2", "3")),
        (pose_weights, POSE_CFG, ("input_size=(64, 96), sigma", "input_size=(96, 64), sigma"), ("input size", "(64, 96)", "(96, 64)")),
        (detector_weights, DETECTOR_CFG, ("num_classes=2", "num_classes=80"), ("classes", "2", "80")),
        (detector_weights, DETECTOR_CFG, ("[8, 16, 32]", "[4, 8, 16]"), ("strides", "(8, 16, 32)", "(4, 8, 16)")),
    ],
    ids=["keypoints", "ratio", "input size", "classes", "strides"],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    read: Read, tmp_path: Path, weights: Callable[[], dict[str, torch.Tensor]], cfg: str, change: tuple[str, str], words: tuple[str, ...]
) -> None:
    assert change[0] in cfg
    wrong = cfg.replace(*change)
    given = tmp_path / "wrong.py"
    given.write_text(wrong)
    for who, options in ((IN_CHECKPOINT, {"cfg": wrong}), ("--model-config wrong.py", {"model_config": given})):
        with pytest.raises(ConfigError) as caught:
            read(weights(), **options)
        assert all(word in str(caught.value) for word in ("the weights", who, *words)), str(caught.value)


def test_a_detector_input_that_is_no_multiple_of_32_is_refused(read: Read) -> None:
    with pytest.raises(ConfigError, match="multiples of 32, found 100x64"):
        read(detector_weights(), cfg=DETECTOR_CFG.replace("(96, 64)", "(100, 64)"))


def test_dark_decoding_is_refused(read: Read) -> None:
    with pytest.raises(ConfigError, match="use_dark: expected false, found true") as caught:
        read(pose_weights(), cfg=POSE_CFG.replace("use_dark=False", "use_dark=True"))
    assert caught.value.hint


def test_the_checkpoints_own_mean_is_a_source(read: Read) -> None:
    buffers = {
        "data_preprocessor.mean": torch.tensor([1.5, 2.5, 3.5]).reshape(3, 1, 1),
        "data_preprocessor.std": torch.tensor([4.5, 5.5, 6.5]).reshape(3, 1, 1),
    }
    model = read(pose_weights() | buffers)
    assert model.normalization.mean == (1.5, 2.5, 3.5)
    assert model.facts["mean"] == "the checkpoint's data_preprocessor"
    with pytest.raises(ConfigError, match="data_preprocessor says .*1.5.* says .*9.5"):
        read(pose_weights() | buffers, cfg=POSE_CFG.replace("mean=[1.5,", "mean=[9.5,"))


def test_a_mean_that_differs_in_the_last_float_digit_is_the_same_mean(read: Read) -> None:
    """Configs write ImageNet's numbers as products, and a tensor holds them in float32: neither is a disagreement."""
    buffers = {
        "data_preprocessor.mean": torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1),
        "data_preprocessor.std": torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1),
    }
    cfg = POSE_CFG.replace("[1.5, 2.5, 3.5]", "[0.485 * 255, 0.456 * 255, 0.406 * 255]").replace("[4.5, 5.5, 6.5]", "[0.229 * 255, 0.224 * 255, 0.225 * 255]")
    assert read(pose_weights() | buffers, cfg=cfg).normalization.std == pytest.approx((58.395, 57.12, 57.375), abs=1e-3)


@pytest.mark.parametrize("key", ["CLASSES", "classes"])
def test_class_names_of_dataset_meta_are_taken_when_they_fit(read: Read, key: str) -> None:
    model = read(detector_weights(), dataset_meta={key: ("left hand", "right hand")})
    assert model.class_names == ["left hand", "right hand"]
    assert model.facts["class names"] == "the checkpoint's dataset_meta"


@pytest.mark.parametrize("classes", [("person",), tuple(f"c{i}" for i in range(80)), (), "person", 7])
def test_class_names_of_another_length_are_ignored(read: Read, classes: object) -> None:
    model = read(detector_weights(), dataset_meta={"CLASSES": classes})
    assert model.class_names == ["class_0", "class_1"]
    assert model.facts["class names"].startswith("default: ")


def test_one_class_may_be_a_plain_string(read: Read) -> None:
    assert read(detector_weights(classes=1), dataset_meta={"CLASSES": "hand"}).class_names == ["hand"]


KEYPOINT_META: dict[str, Any] = {
    "keypoint_id2name": {0: "nose", 1: "left", 2: "right"},
    "skeleton_links": [[0, 1], [0, 2]],
    "flip_pairs": [[2, 1], [1, 2]],
    "sigmas": [0.026, 0.5, 0.25],
    "keypoint_colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    "skeleton_link_colors": [[10, 11, 12], [13, 14, 15]],
}


def test_keypoint_metadata_is_taken_from_dataset_meta(read: Read) -> None:
    model = read(pose_weights(), dataset_meta=KEYPOINT_META)
    keypoints = model.keypoints
    assert keypoints is not None
    assert keypoints.names == ["nose", "left", "right"]
    assert keypoints.skeleton == [(0, 1), (0, 2)]
    assert keypoints.flip_pairs == [(1, 2)]
    assert keypoints.sigmas == pytest.approx([0.026, 0.5, 0.25], abs=1e-6)
    assert keypoints.colors == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert keypoints.link_colors == [(10, 11, 12), (13, 14, 15)]
    assert model.facts["keypoint names"] == "the checkpoint's dataset_meta"


def test_keypoint_metadata_of_another_skeleton_is_ignored(read: Read) -> None:
    model = read(pose_weights(keypoints=4), dataset_meta=KEYPOINT_META)
    assert model.keypoints is not None
    assert "nose" not in model.keypoints.names
    assert len(model.keypoints.names) == 4
    assert model.facts["keypoint names"] == "default: numbers"
    body = read(pose_weights(keypoints=17)).keypoints
    assert body is not None
    assert (body.names[0], body.names[16]) == ("nose", "right_ankle")


def test_links_to_keypoints_that_do_not_exist_are_dropped_with_their_colours(read: Read) -> None:
    keypoints = read(pose_weights(), dataset_meta=KEYPOINT_META | {"skeleton_links": [[0, 9], [0, 2]]}).keypoints
    assert keypoints is not None
    assert keypoints.skeleton == [(0, 2)]
    assert keypoints.link_colors == [(13, 14, 15)]


@pytest.mark.parametrize(
    "change",
    [
        {"skeleton_links": [[None, 1]]},
        {"skeleton_links": [["nose", "left"]]},
        {"flip_pairs": 3},
        {"keypoint_colors": [["red", "green", "blue"]]},
        {"keypoint_colors": [[None, 0, 0]]},
        {"sigmas": ["a", "b", "c"]},
        {"sigmas": [None, None, None]},
        {"sigmas": [float("nan")] * 3},
        {"keypoint_id2name": {"a": 1, "b": 2, "c": 3}},
    ],
    ids=str,
)
def test_damaged_keypoint_metadata_is_no_crash(read: Read, change: dict[str, Any]) -> None:
    """A checkpoint's metadata comes from strangers: it is dropped, or refused with an error of ours."""
    try:
        model = read(pose_weights(), dataset_meta=KEYPOINT_META | change)
    except ModelcrateError:
        return
    assert model.keypoints is not None
    assert len(model.keypoints.names) == 3
    assert all(sigma > 0 for sigma in model.keypoints.sigmas)


@pytest.mark.parametrize(
    ("weights", "cfg", "change"),
    [
        (pose_weights, POSE_CFG, ("padding=1.5", "padding=compute()")),
        (pose_weights, POSE_CFG, ("padding=1.5", "padding=None")),
        (pose_weights, POSE_CFG, ("padding=1.5", "padding='wide'")),
        (pose_weights, POSE_CFG, ("mean=[1.5, 2.5, 3.5]", "mean=[1.5, 2.5]")),
        (pose_weights, POSE_CFG, ("std=[4.5, 5.5, 6.5]", "std=[0.0, 5.5, 6.5]")),
        (pose_weights, POSE_CFG, ("sigma=(2.5, 3.5)", "sigma=(2.5, 3.5, 4.5)")),
        (pose_weights, POSE_CFG, ("use_udp=True", "use_udp=compute()")),
        (detector_weights, DETECTOR_CFG, ("score_thr=0.25", "score_thr='high'")),
        (detector_weights, DETECTOR_CFG, ("score_thr=0.25", "score_thr=compute()")),
        (detector_weights, DETECTOR_CFG, ("iou_threshold=0.35", "iou_threshold=[0.35]")),
        (detector_weights, DETECTOR_CFG, ("max_per_img=11", "max_per_img=0")),
        (detector_weights, DETECTOR_CFG, ("max_per_img=11", "max_per_img=-1")),
        (detector_weights, DETECTOR_CFG, ("size=(96, 64)", "size=(96,)")),
        (detector_weights, DETECTOR_CFG, ("size=(96, 64)", "size=(0, 0)")),
        (detector_weights, DETECTOR_CFG, ("size=(96, 64)", "size=(-96, 64)")),
        (detector_weights, DETECTOR_CFG, ("(17, 17, 17)", "(compute(), 17, 17)")),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_config_facts_are_usable_numbers_or_an_error_of_ours(
    read: Read, weights: Callable[[], dict[str, torch.Tensor]], cfg: str, change: tuple[str, str]
) -> None:
    assert change[0] in cfg
    try:
        model = read(weights(), cfg=cfg.replace(*change))
    except ModelcrateError:
        return
    facts = model.postprocess
    assert len(model.normalization.mean) == len(model.normalization.std) == 3
    assert all(std > 0 for std in model.normalization.std)
    assert min(model.input_hw) >= 32
    if isinstance(facts, PoseFacts):
        assert isinstance(facts.padding, float)
        assert facts.padding > 0
        assert isinstance(facts.use_udp, bool)
        assert len(facts.sigma) == 2
    else:
        assert isinstance(facts.score_thr, float)
        assert isinstance(facts.iou_threshold, float)
        assert isinstance(facts.max_per_img, int)
        assert facts.max_per_img > 0
        assert 0 <= facts.pad_value <= 255


# -------------------------------------------------------------------------------------------------------------------- refusals


def one_line(error: ModelcrateError) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_another_network_is_refused_with_what_was_found(read: Read) -> None:
    resnet = {
        "conv1.weight": torch.ones(8, 3, 7, 7),
        "layer1.0.conv1.weight": torch.ones(8, 8, 3, 3),
        "fc.weight": torch.ones(10, 8),
        "fc.bias": torch.ones(10),
    }
    with pytest.raises(ArchitectureError, match="expected RTMPose .* or RTMDet .*, found tensors under .*layer1.0") as caught:
        read(resnet)
    one_line(caught.value)


KEYS_WITHOUT_WHICH_NOTHING_RUNS = [
    *(f"backbone.stem.{i}.conv.weight" for i in range(3)),
    *(f"backbone.stem.1.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    *(f"backbone.stage{i}.0.conv.weight" for i in range(1, 5)),
    "backbone.stage4.1.conv1.conv.weight", "backbone.stage4.1.conv2.bn.running_var",
    *(f"backbone.stage2.1.{name}.conv.weight" for name in ("main_conv", "short_conv", "final_conv")),
    "backbone.stage3.1.blocks.0.conv1.conv.weight", "backbone.stage3.1.blocks.0.conv2.depthwise_conv.conv.weight",
    "backbone.stage3.1.blocks.0.conv2.pointwise_conv.bn.bias", "backbone.stage1.1.attention.fc.weight", "backbone.stage1.1.attention.fc.bias",
]  # fmt: skip
POSE_HEAD = [key for key in rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(96, 64)) if key.startswith("head.")]
DETECTOR_HEAD = [
    "neck.reduce_layers.1.conv.weight", "neck.top_down_blocks.0.main_conv.conv.weight", "neck.downsamples.1.pointwise_conv.conv.weight",
    "neck.bottom_up_blocks.1.final_conv.bn.weight", "neck.out_convs.0.depthwise_conv.conv.weight", "bbox_head.cls_convs.0.0.pointwise_conv.conv.weight",
    "bbox_head.reg_convs.2.1.depthwise_conv.bn.bias", "bbox_head.rtm_cls.0.weight", "bbox_head.rtm_cls.1.bias", "bbox_head.rtm_reg.2.weight",
]  # fmt: skip


@pytest.mark.parametrize("key", [*KEYS_WITHOUT_WHICH_NOTHING_RUNS, *POSE_HEAD])
def test_a_pose_checkpoint_that_lacks_a_tensor_is_refused(read: Read, key: str) -> None:
    weights = pose_weights()
    del weights[key]
    with pytest.raises(ArchitectureError) as caught:
        read(weights)
    one_line(caught.value)


@pytest.mark.parametrize("key", DETECTOR_HEAD)
def test_a_detector_checkpoint_that_lacks_a_tensor_is_refused(read: Read, key: str) -> None:
    weights = detector_weights()
    del weights[key]
    with pytest.raises(ArchitectureError) as caught:
        read(weights)
    one_line(caught.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "bbox_head.rtm_cls.2.",
        "bbox_head.rtm_reg.1.",
        "bbox_head.cls_convs.2.",
        "neck.out_convs.2.",
        "neck.reduce_layers.1.",
        "neck.downsamples.1.",
        "backbone.stage4.1.",
        "backbone.stage3.1.attention.",
    ],
)
def test_a_detector_checkpoint_that_lacks_a_whole_part_is_refused(read: Read, prefix: str) -> None:
    weights = {key: value for key, value in detector_weights().items() if not key.startswith(prefix)}
    with pytest.raises(ArchitectureError) as caught:
        read(weights)
    one_line(caught.value)


@pytest.mark.parametrize("weights", [pose_weights, detector_weights], ids=["pose", "detector"])
def test_a_tensor_that_does_not_belong_is_refused_by_name(read: Read, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ArchitectureError, match=r"not of this network .*head\.extra\.weight") as caught:
        read(weights() | {"head.extra.weight": torch.ones(2, 2)})
    one_line(caught.value)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("backbone.stem.0.conv.weight", (2, 3)),
        ("backbone.stem.0.bn.bias", (5,)),
        ("backbone.stem.0.bn.weight", (5,)),
        ("backbone.stem.1.conv.weight", (2, 7, 3, 3)),
        ("backbone.stage1.0.conv.weight", (8, 9, 3, 3)),
        ("backbone.stage2.1.final_conv.conv.weight", (16, 17, 1, 1)),
        ("backbone.stage3.1.attention.fc.bias", (1,)),
        ("head.final_layer.bias", (4,)),
        ("head.final_layer.weight", (3, 65, 7, 7)),
        ("head.mlp.1.weight", (16, 7)),
        ("head.mlp.0.g", (2,)),
        ("head.cls_x.weight", (128, 17)),
        ("head.cls_y.weight", (191, 16)),
        ("head.gau.gamma", (2, 9)),
        ("head.gau.o.weight", (16, 33)),
        ("head.gau.ln.g", (3,)),
        ("head.gau.res_scale.scale", (15,)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(read: Read, key: str, shape: tuple[int, ...]) -> None:
    weights = pose_weights()
    assert tuple(weights[key].shape) != shape
    with pytest.raises(ArchitectureError) as caught:
        read(weights | {key: torch.ones(shape)})
    one_line(caught.value)


def test_simcc_axes_that_fit_no_input_are_refused(read: Read) -> None:
    weights = pose_weights()
    weights["head.cls_x.weight"] = torch.ones(100, 16)
    with pytest.raises(ArchitectureError, match="found 100 and 192 bins over 6 cells"):
        read(weights)


# ----------------------------------------------------------------------------------------------------------------- real files


def test_a_real_detector_says_everything_itself(shared: Path) -> None:
    model = read_architecture(read_checkpoint(shared / "fixtures" / "checkpoints" / "rtmdet_nano_person.pth"))
    assert (model.name, model.input_hw, model.class_names) == ("rtmdet-nano", (320, 320), ["person"])
    assert model.normalization == Normalization(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), to_rgb=False)
    assert model.postprocess == DetectorFacts(pad_value=114, score_thr=0.05, iou_threshold=0.6, max_per_img=100, nms_pre=1000, min_bbox_size=0)
    assert not any(source.startswith("default: ") for source in model.facts.values()), model.facts


def test_a_real_training_file_says_everything_itself(shared: Path) -> None:
    model = read_architecture(read_checkpoint(shared / "fixtures" / "checkpoints" / "rtmdet_nano_person_train.pth"))
    assert (model.name, model.input_hw, model.class_names) == ("rtmdet-nano", (320, 320), ["person"])
    assert not any(source.startswith("default: ") for source in model.facts.values()), model.facts


def test_a_real_pose_file_says_everything_itself(shared: Path) -> None:
    model = read_architecture(read_checkpoint(shared / "fixtures" / "checkpoints" / "rtmpose_t_random.pth"))
    assert (model.name, model.input_hw) == ("rtmpose-t", (256, 192))
    assert model.postprocess == PoseFacts(padding=1.25, use_udp=False, split_ratio=2.0, sigma=(4.9, 5.66))
    assert model.normalization == Normalization(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), to_rgb=True)
    keypoints = model.keypoints
    assert keypoints is not None
    assert keypoints.names[5] == "left_shoulder"
    assert (15, 13) in keypoints.skeleton
    assert keypoints.flip_pairs == [(i, i + 1) for i in range(1, 17, 2)]
    assert keypoints.sigmas[0] == pytest.approx(0.026, abs=1e-6)
    assert len(keypoints.link_colors) == len(keypoints.skeleton) == 19
    assert not any(source.startswith("default: ") for source in model.facts.values()), model.facts
