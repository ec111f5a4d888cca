"""From a checkpoint to a network that can be exported: the architecture is read off the tensors, the rest from the sources that know it.

Shapes say widths, depths, classes, keypoints, and the input size of SimCC heads. What they cannot say comes from the config inside the
checkpoint, from a config given by the user, or from a named default; two sources that disagree are an error that names both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from modelcrate_bundle.errors import ArchitectureError, ConfigError
from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter import defaults
from modelcrate_converter.checkpoint import Checkpoint
from modelcrate_converter.exportable import (
    ClassifierFacts,
    DetectorFacts,
    ExportableModel,
    HeatmapFacts,
    ImageFit,
    Normalization,
    PoseFacts,
    load_weights,
)
from modelcrate_converter.facts import (
    CHANNELS,
    COUNT,
    DEVIATIONS,
    FLAG,
    FRACTION,
    HEATMAP_CODEC,
    LEVEL,
    NAME,
    NAMES,
    NOT_NEGATIVE,
    PAIR,
    POSITIVE,
    RESAMPLING,
    Expected,
    Sources,
    at,
    keypoints_of,
    numbers,
    option,
    transform,
)  # fmt: skip
from modelcrate_converter.models import classifier, heatmap, rtmdet, rtmpose
from modelcrate_converter.models.cspnext import STRIDE
from modelcrate_converter.models.layers import Shapes
from modelcrate_runtime.skeletons import DATA_SETS, keypoint_info, published_keypoints

_SIZES: Final = {256: "nano", 384: "t", 512: "s", 768: "m", 1024: "l", 1280: "x"}
"""Channels of the last stage -> the published size."""
_TEST_CFG: Final[Mapping[str, Expected]] = {
    "score_thr": FRACTION,
    "iou_threshold": FRACTION,
    "max_per_img": COUNT,
    "nms_pre": COUNT,
    "min_bbox_size": NOT_NEGATIVE,
}
_DATA_SETS: Final[Mapping[str, str]] = {
    "coco": "coco", "CocoDataset": "coco", "halpe26": "halpe26", "Halpe26Dataset": "halpe26", "coco_wholebody": "coco-wholebody",
    "CocoWholeBodyDataset": "coco-wholebody", "ap10k": "ap10k", "AP10KDataset": "ap10k", "lapa": "lapa", "LapaDataset": "lapa",
    "coco_wholebody_hand": "hand", "CocoWholeBodyHandDataset": "hand", **{name: name for name in DATA_SETS},
}  # fmt: skip
"""What MMPose calls a data set, in a checkpoint and in a config -> our name of its keypoints."""
_IGNORED_PREFIXES: Final = ("data_preprocessor.",)


def read_architecture(checkpoint: Checkpoint, *, model_config: Path | None = None, name: str | None = None, keypoints: str = "") -> ExportableModel:
    """Build the network of a checkpoint and collect what is known about it.

    Args:
        checkpoint: what `read_checkpoint` returned.
        model_config: an MMPose or MMDetection config file, for what the checkpoint does not say.
        name: what to call the model; None names it by architecture and width.
        keypoints: the published set of keypoints that the zoo knows it to have, for a checkpoint that does not say.

    Raises:
        ArchitectureError: not a network that modelcrate knows, or its tensors do not fit together.
        ConfigError: two sources disagree, or the config is of another model.
    """
    sources = Sources.of(checkpoint, model_config)
    if keypoints:
        sources.configs.append(("the zoo", {"test_dataloader": {"dataset": {"type": keypoints}}}))
    state = {key: value for key, value in checkpoint.state_dict.items() if not key.startswith(_IGNORED_PREFIXES)}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        raise ArchitectureError(f"{checkpoint.path}: {empty[0]}: expected weights, found shape {shapes[empty[0]]}", hint="is the checkpoint whole?")
    if "head.cls_x.weight" in shapes and "head.gau.uv.weight" in shapes:
        build = _rtmpose
    elif "head.final_layer.weight" in shapes and "backbone.stem.0.conv.weight" in shapes and "head.cls_x.weight" not in shapes:
        build = _heatmap_pose
    elif "head.fc.weight" in shapes and "backbone.stem.0.conv.weight" in shapes:
        build = _classifier
    elif "bbox_head.rtm_cls.0.weight" in shapes and "neck.reduce_layers.0.conv.weight" in shapes:
        build = _rtmdet
    else:
        families = sorted({".".join(key.split(".")[:2]) for key in shapes})
        raise ArchitectureError(
            f"{checkpoint.path}: expected RTMPose (head.cls_x, head.gau), CSPNeXt with heatmaps (head.final_layer) or a classifier "
            f"(head.fc), or RTMDet (bbox_head.rtm_cls, neck), found tensors under {', '.join(families[:6])}",
            hint="modelcrate converts RTMPose, CSPNeXt and RTMDet checkpoints of MMPose and MMDetection",
        )
    try:
        return _try_out(build(checkpoint, state, shapes, sources, name), path=checkpoint.path)
    except ArchitectureError as error:
        # The networks do not know the file that their shapes come from.
        raise ArchitectureError(str(error).replace("checkpoint:", f"{checkpoint.path}:", 1), hint=error.hint) from error
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ArchitectureError(
            f"{checkpoint.path}: expected tensors that fit together, found: {text[:300]}", hint="is the checkpoint whole, and of the stated family?"
        ) from error


def _normalization(sources: Sources, *, mean: tuple[float, ...], std: tuple[float, ...], to_rgb: bool, weights: Mapping[str, torch.Tensor]) -> Normalization:
    def stored(key: str) -> tuple[tuple[str, Any], ...]:
        tensor = weights.get(f"data_preprocessor.{key}")
        return () if tensor is None else (("the checkpoint's data_preprocessor", tuple(round(v, 4) for v in tensor.flatten().tolist())),)

    def swap(config: Mapping[str, Any]) -> bool | None:
        preprocessor = at(config, "model.data_preprocessor")
        return option(preprocessor, "bgr_to_rgb", default=False) if isinstance(preprocessor, Mapping) else None

    return Normalization(
        mean=sources.fact("mean", lambda config: numbers(at(config, "model.data_preprocessor.mean")), CHANNELS, default=mean, extra=stored("mean")),
        std=sources.fact("std", lambda config: numbers(at(config, "model.data_preprocessor.std")), DEVIATIONS, default=std, extra=stored("std")),
        to_rgb=sources.fact("bgr_to_rgb", swap, FLAG, default=to_rgb),
    )


def _try_out(model: ExportableModel, *, path: Path) -> ExportableModel:
    """Run the network once on zeros: layers that do not fit are found here, and not by an exporter that blames itself."""
    with torch.inference_mode():
        values = model.module(torch.zeros(1, 3, *model.input_hw))
    found = [tuple(value.shape[1:]) for value in values]
    expected = [spec.shape[1:] for spec in model.outputs]
    if found != expected:
        raise ArchitectureError(f"{path}: expected outputs of shapes {expected}, found {found}", hint="is the checkpoint whole, and of the stated family?")
    return model


# ----------------------------------------------------------------------------------------------------------------- the families


def _rtmpose(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], sources: Sources, name: str | None
) -> ExportableModel:
    tensors = Shapes(shapes)
    bins_x, bins_y = tensors["head.cls_x.weight"][0], tensors["head.cls_y.weight"][0]
    cells = tensors["head.mlp.1.weight"][1]
    keypoints = tensors["head.final_layer.weight"][0]
    width, height, ratio = _simcc_size(bins_x, bins_y, cells, path=checkpoint.path)
    sources.must_match("input size (width, height)", lambda config: numbers(at(config, "model.head.decoder.input_size")), weights=(float(width), float(height)))
    sources.must_match("SimCC split ratio", lambda config: at(config, "model.head.decoder.simcc_split_ratio"), weights=ratio)
    sources.must_match("keypoints", lambda config: at(config, "model.head.out_channels"), weights=keypoints)
    default_sigma = (defaults.simcc_sigma(width), defaults.simcc_sigma(height))

    facts = PoseFacts(
        padding=_box_padding(sources),
        use_udp=sources.fact("use_udp", _crop_is_udp, FLAG, default=False),
        split_ratio=ratio,
        sigma=sources.fact("sigma", lambda config: numbers(at(config, "model.head.decoder.sigma")), PAIR, default=default_sigma),
    )
    if sources.fact("use_dark", lambda config: at(config, "model.head.decoder.use_dark"), FLAG, default=False):
        raise ConfigError(
            "use_dark: expected false, found true: keypoints are decoded as plain SimCC maxima", hint="RTMPose's published configs have use_dark=False"
        )
    normalization = _normalization(sources, mean=defaults.POSE_MEAN, std=defaults.POSE_STD, to_rgb=True, weights=checkpoint.state_dict)
    return ExportableModel(
        name=name or f"rtmpose-{_size_name(shapes)}",
        task="PoseDetector",
        sdk_name="topdownposeestimator",
        module=load_weights(rtmpose.RTMPose(shapes), state, path=checkpoint.path),
        input=TensorSpec(name="input", dtype="float32", shape=("batch", 3, height, width)),
        outputs=(
            TensorSpec(name="simcc_x", dtype="float32", shape=("batch", keypoints, bins_x)),
            TensorSpec(name="simcc_y", dtype="float32", shape=("batch", keypoints, bins_y)),
        ),
        normalization=normalization,
        postprocess=facts,
        class_names=[],
        keypoints=_keypoint_names(sources, count=keypoints),
        facts=sources.taken,
        checkpoint=(checkpoint.path.name, checkpoint.sha256),
    )


def _crop_is_udp(config: Mapping[str, Any]) -> bool | None:
    affine = transform(config, "TopdownAffine")
    return option(affine, "use_udp", default=False) if affine is not None else None


def _box_padding(sources: Sources) -> float:
    def padding(config: Mapping[str, Any]) -> float | None:
        step = transform(config, "GetBBoxCenterScale")
        return option(step, "padding", default=defaults.BOX_PADDING) if step is not None else None

    return float(sources.fact("box padding", padding, POSITIVE, default=defaults.BOX_PADDING))


def _keypoint_names(sources: Sources, *, count: int) -> KeypointInfo:
    """The checkpoint's own names, or those of the data set that it or a config names, or those of the published set with so many keypoints."""
    from_meta = keypoints_of(sources.dataset_meta, count=count)
    if from_meta is not None:
        sources.taken["keypoint names"] = "the checkpoint's dataset_meta"
        return from_meta
    named = [("the checkpoint's dataset_meta", sources.dataset_meta.get("dataset_name"))]
    named += [(who, at(config, "test_dataloader.dataset.type")) for who, config in sources.configs]
    for who, name in named:
        data_set = _DATA_SETS.get(str(name))
        if data_set is not None and len(published_keypoints(data_set).names) == count:
            sources.taken["keypoint names"] = f"{who}: {data_set}"
            return published_keypoints(data_set)
    info = keypoint_info(count)
    sources.taken["keypoint names"] = f"default: {'COCO body' if count == 17 else 'numbers' if not info.colors else f'the published set of {count}'}"
    return info


def _heatmap_pose(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], sources: Sources, name: str | None
) -> ExportableModel:
    keypoints = Shapes(shapes)["head.final_layer.weight"][0]
    sources.must_match("keypoints", lambda config: at(config, "model.head.out_channels"), weights=keypoints)

    def codec(key: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda config: at(config, f"model.head.decoder.{key}")

    size = sources.fact("input size (width, height)", lambda config: numbers(codec("input_size")(config)), PAIR, default=defaults.HEATMAP_INPUT_WH)
    width, height = (int(v) for v in size)
    if width % STRIDE or height % STRIDE:
        raise ConfigError(f"input size: expected multiples of {STRIDE}, found {width}x{height}")
    module = heatmap.HeatmapPose(shapes)
    cells_wh = (width // STRIDE * module.upscaling, height // STRIDE * module.upscaling)
    sources.must_match("heatmap size (width, height)", lambda config: numbers(codec("heatmap_size")(config)), weights=tuple(float(v) for v in cells_wh))
    kind = sources.fact("codec", codec("type"), HEATMAP_CODEC, default="UDPHeatmap")
    is_udp = kind == "UDPHeatmap"
    if sources.fact("heatmap type", codec("heatmap_type"), NAME, default="gaussian") != "gaussian":
        raise ConfigError("heatmap_type: expected gaussian, found another: only maps with one Gaussian for each keypoint are decoded")
    facts = HeatmapFacts(
        padding=_box_padding(sources),
        use_udp=sources.fact("use_udp", _crop_is_udp, FLAG, default=is_udp),
        is_udp_codec=is_udp,
        unbiased=bool(sources.fact("unbiased", codec("unbiased"), FLAG, default=False)),
        blur_kernel_size=int(sources.fact("blur_kernel_size", codec("blur_kernel_size"), COUNT, default=defaults.BLUR_KERNEL_SIZE)),
        sigma=float(sources.fact("sigma", codec("sigma"), POSITIVE, default=defaults.HEATMAP_SIGMA)),
        heatmap_wh=cells_wh,
    )
    return ExportableModel(
        name=name or f"cspnext-{_size_name(shapes)}_{'udp' if is_udp else 'heatmap'}",
        task="PoseDetector",
        sdk_name="topdownposeestimator",
        module=load_weights(module, state, path=checkpoint.path),
        input=TensorSpec(name="input", dtype="float32", shape=("batch", 3, height, width)),
        outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", keypoints, cells_wh[1], cells_wh[0])),),
        normalization=_normalization(sources, mean=defaults.POSE_MEAN, std=defaults.POSE_STD, to_rgb=True, weights=checkpoint.state_dict),
        postprocess=facts,
        class_names=[],
        keypoints=_keypoint_names(sources, count=keypoints),
        facts=sources.taken,
        checkpoint=(checkpoint.path.name, checkpoint.sha256),
    )


def _classifier(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], sources: Sources, name: str | None
) -> ExportableModel:
    classes = Shapes(shapes)["head.fc.weight"][0]
    sources.must_match("classes", lambda config: at(config, "model.head.num_classes"), weights=classes)

    def crop(config: Mapping[str, Any]) -> tuple[float, ...] | None:
        step = transform(config, "CenterCrop")
        size = step.get("crop_size") if step is not None else None
        return (float(size), float(size)) if isinstance(size, (int, float)) else numbers(size)

    def edge(config: Mapping[str, Any]) -> Any:
        step = transform(config, "ResizeEdge")
        return step.get("scale") if step is not None else None

    def resampling(config: Mapping[str, Any]) -> str | None:
        step = transform(config, "ResizeEdge")
        if step is None:
            return None
        chosen = (option(step, "backend", default="cv2"), option(step, "interpolation", default="bilinear"))
        return {("pillow", "bicubic"): "pillow-bicubic", ("cv2", "bilinear"): "opencv-bilinear"}.get(chosen, "-".join(str(v) for v in chosen))

    height, width = (int(v) for v in sources.fact("input size (height, width)", crop, PAIR, default=defaults.CLASSIFIER_CROP_HW))
    how = sources.fact("resampling", resampling, RESAMPLING, default="pillow-bicubic")
    facts = ClassifierFacts(
        fit=ImageFit(
            mode="shorter-edge",
            edge=int(sources.fact("shorter edge", edge, COUNT, default=defaults.CLASSIFIER_EDGE)),
            resampling=None if how == "opencv-bilinear" else how,
        ),
        topk=min(defaults.CLASSIFIER_TOPK, classes),
    )
    return ExportableModel(
        name=name or f"cspnext-{_size_name(shapes)}",
        task="Classifier",
        sdk_name="imageclassifier",
        module=load_weights(classifier.ImageClassifier(shapes), state, path=checkpoint.path),
        input=TensorSpec(name="input", dtype="float32", shape=("batch", 3, height, width)),
        outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", classes)),),
        normalization=_normalization(sources, mean=defaults.POSE_MEAN, std=defaults.POSE_STD, to_rgb=True, weights=checkpoint.state_dict),
        postprocess=facts,
        class_names=_class_names(sources, default=defaults.classifier_class_names(classes)),
        keypoints=None,
        facts=sources.taken,
        checkpoint=(checkpoint.path.name, checkpoint.sha256),
    )


def _simcc_size(bins_x: int, bins_y: int, cells: int, *, path: Path) -> tuple[int, int, float]:
    """The one input size, a multiple of the stride, over which both axes have the same number of bins per pixel: width, height, ratio."""
    for columns in range(1, cells + 1):
        width, height = columns * STRIDE, cells // columns * STRIDE
        if cells % columns == 0 and math.isclose(bins_x / width, bins_y / height, rel_tol=1e-6):
            return width, height, bins_x / width
    raise ArchitectureError(f"{path}: expected SimCC axes of one input size, found {bins_x} and {bins_y} bins over {cells} cells of {STRIDE}x{STRIDE} pixels")


def _rtmdet(
    checkpoint: Checkpoint, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], sources: Sources, name: str | None
) -> ExportableModel:
    classes = shapes["bbox_head.rtm_cls.0.weight"][0]
    is_separable = "bbox_head.cls_convs.0.0.depthwise_conv.conv.weight" in shapes
    share_conv = not is_separable and all(torch.equal(state[f"bbox_head.{stack}.{level}.0.conv.weight"], state[f"bbox_head.{stack}.0.0.conv.weight"])
                                          for stack in ("cls_convs", "reg_convs") for level in (1, 2))  # fmt: skip
    # Upstream's configs exponentiate from m (4 blocks in the second stage) up; tiny, s and nano do not. Pruning changes widths, never depths.
    exp_default = not is_separable and "backbone.stage2.1.blocks.3.conv1.conv.weight" in shapes
    exp_on_reg = sources.fact("exp_on_reg", lambda config: at(config, "model.bbox_head.exp_on_reg"), FLAG, default=exp_default)
    sources.must_match("classes", lambda config: at(config, "model.bbox_head.num_classes"), weights=classes)
    strides = numbers(rtmdet.STRIDES)
    sources.must_match("strides", lambda config: numbers(at(config, "model.bbox_head.anchor_generator.strides")), weights=strides)
    size = 320 if is_separable else 640

    def input_wh(config: Mapping[str, Any]) -> tuple[float, ...] | None:
        step = transform(config, "Pad") or transform(config, "Resize")
        return numbers(step.get("size", step.get("scale"))) if step is not None else None

    def pad_value(config: Mapping[str, Any]) -> int | None:
        step = transform(config, "Pad")
        value = step.get("pad_val") if step is not None else None
        value = value.get("img") if isinstance(value, Mapping) else value
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return int(value) if isinstance(value, (int, float)) else None

    width, height = (int(v) for v in sources.fact("input size (width, height)", input_wh, PAIR, default=(float(size), float(size))))
    if width % STRIDE or height % STRIDE:
        raise ConfigError(f"input size: expected multiples of {STRIDE}, found {width}x{height}")
    published = defaults.COCO_TEST_CFG if classes == 80 else defaults.PERSON_TEST_CFG

    def test_cfg(key: str) -> Any:
        path = "model.test_cfg.nms.iou_threshold" if key == "iou_threshold" else f"model.test_cfg.{key}"
        return sources.fact(key, lambda config: at(config, path), _TEST_CFG[key], default=published[key])

    facts = DetectorFacts(
        pad_value=sources.fact("pad value", pad_value, LEVEL, default=defaults.DETECTOR_PAD_VALUE), **{key: test_cfg(key) for key in published}
    )
    normalization = _normalization(sources, mean=defaults.DETECTOR_MEAN, std=defaults.DETECTOR_STD, to_rgb=False, weights=checkpoint.state_dict)
    module = load_weights(rtmdet.RTMDet(shapes, share_conv=share_conv, exp_on_reg=bool(exp_on_reg)), state, path=checkpoint.path)
    maps = [(height // stride, width // stride) for stride in rtmdet.STRIDES]
    outputs = [TensorSpec(name=f"cls_{i}", dtype="float32", shape=("batch", classes, *hw)) for i, hw in enumerate(maps)]
    outputs += [TensorSpec(name=f"dist_{i}", dtype="float32", shape=("batch", 4, *hw)) for i, hw in enumerate(maps)]
    return ExportableModel(
        name=name or f"rtmdet-{_size_name(shapes).replace('t', 'tiny')}",
        task="Detector",
        sdk_name="rtmdet",
        module=module,
        input=TensorSpec(name="input", dtype="float32", shape=("batch", 3, height, width)),
        outputs=tuple(outputs),
        normalization=normalization,
        postprocess=facts,
        class_names=_class_names(sources, default=defaults.detector_class_names(classes)),
        keypoints=None,
        facts=sources.taken,
        checkpoint=(checkpoint.path.name, checkpoint.sha256),
    )


def _size_name(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The published size of these stages, or the channels of the last one: a pruned network may have as many there as another size."""
    channels = shapes["backbone.stage4.2.final_conv.conv.weight"][0]
    is_regular = all(shapes[f"backbone.stage{i}.1.final_conv.conv.weight"][0] << (4 - i) == channels for i in (1, 2, 3))
    return _SIZES[channels] if is_regular and channels in _SIZES else f"c{channels}"


def _class_names(sources: Sources, *, default: list[str]) -> list[str]:
    def names(value: Any) -> tuple[str, ...] | None:
        value = [value] if isinstance(value, str) else value
        # mmdet writes CLASSES of the data set even where the model has fewer; only a fitting list can be meant.
        return tuple(str(v) for v in value) if isinstance(value, (list, tuple)) and len(value) == len(default) else None

    def from_config(config: Mapping[str, Any]) -> tuple[str, ...] | None:
        return names(at(config, "test_dataloader.dataset.metainfo.classes")) or names(at(config, "metainfo.classes"))

    meta = names(sources.dataset_meta.get("classes", sources.dataset_meta.get("CLASSES")))
    return list(sources.fact("class names", from_config, NAMES, default=tuple(default), extra=(("the checkpoint's dataset_meta", meta),)))
