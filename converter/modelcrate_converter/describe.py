"""What goes into the JSON of a bundle, from the records that the stages returned."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any, Final

from modelcrate_bundle.schema import (
    AnchorGenerator,
    CenterCrop,
    Collect,
    DeepposeRegressionParams,
    DefaultFormatBundle,
    DeployInfo,
    DeployModel,
    DetailInfo,
    HeatmapDecodeParams,
    ImageToTensor,
    LetterResize,
    LinearClsHeadParams,
    LoadImageFromFile,
    NetTask,
    Normalize,
    Pad,
    Params,
    Pipeline,
    PostprocessTask,
    RawHeadParams,
    Resize,
    ResizeBBoxParams,
    SimCCLabelDecodeParams,
    TopDownAffine,
    TopDownGetBboxCenterScale,
    Transform,
    TransformTask,
    UnknownParams,
)
from modelcrate_converter.exportable import BoxesFacts, ClassifierFacts, DetectorFacts, HeatmapFacts, ImageFit, PoseFacts, RawFacts, RegressionFacts
from modelcrate_converter.models.rtmdet import STRIDES

if TYPE_CHECKING:
    from modelcrate_converter.builders import BackendArtifact
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.exportable import ExportableModel

FORMAT_VERSION: Final = "1.3.1"
"""The MMDeploy release whose format is written; its SDK wants the key and ignores the value."""
_BOX_META: Final = ["ori_shape", "img_shape", "pad_shape", "scale_factor", "img_norm_cfg"]
_IMAGE_META: Final = ["filename", "ori_filename", "ori_shape", "img_shape", "flip", "flip_direction", "img_norm_cfg"]
TOOLS: Final = (
    "modelcrate",
    "torch",
    "onnx",
    "onnxsim",
    "onnxruntime",
    "openvino",
    "ncnn",
    "pnnx",
    "tensorrt",
    "tensorrt_rtx_cu12",
    "numpy",
    "opencv-python-headless",
)


_CODEBASES: Final = {
    "Detector": ("ObjectDetection", "mmdet"),
    "PoseDetector": ("PoseDetection", "mmpose"),
    "Classifier": ("Classification", "mmpretrain"),
    "Network": ("Network", "modelcrate"),
}


def tool_versions() -> dict[str, str]:
    """Distribution -> version, of those that are installed and have a say in the result."""
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_pipeline(model: ExportableModel, *, has_nms: bool, is_batched: bool = True) -> Pipeline:
    """pipeline.json.

    Args:
        model: what is being converted.
        has_nms: whether the artefact suppresses detections itself.
        is_batched: whether it takes any number of inputs at once.
    """
    facts = model.postprocess
    if isinstance(facts, DetectorFacts):
        module, (component, params) = "mmdet", _suppression(facts, has_nms=has_nms)
    elif isinstance(facts, BoxesFacts):
        module, component, params = "mmdet", "ResizeBBox", ResizeBBoxParams(score_thr=facts.score_thr)
    elif isinstance(facts, ClassifierFacts):
        module, component, params = "mmcls", "LinearClsHead", LinearClsHeadParams(topk=facts.topk, softmax=facts.softmax)
    elif isinstance(facts, RawFacts):
        module, component, params = "modelcrate", "RawTensors", UnknownParams()
    else:
        module, (component, params) = "mmpose", _keypoint_decoding(facts, size_wh=(model.input_hw[1], model.input_hw[0]))
    # MMDeploy's classifier sees the scores alone, and ends the process when it is given more.
    seen = ["infer_output"] if module == "mmcls" else ["prep_output", "infer_output"]
    return Pipeline(
        input=["img"],
        output=["post_output"],
        preprocess=TransformTask(input=["img"], output=["prep_output"], transforms=_transforms(model)),
        net=NetTask(name=model.sdk_name, is_batched=is_batched, input=["prep_output"], output=["infer_output"], input_map={"img": model.input.name}),
        postprocess=PostprocessTask(module=module, component=component, params=params, output=["post_output"], input=seen),
    )


def _transforms(model: ExportableModel) -> list[Transform]:
    """The way from an image to the network's input."""
    facts = model.postprocess
    size_wh = (model.input_hw[1], model.input_hw[0])
    normalize = Normalize(mean=list(model.normalization.mean), std=list(model.normalization.std), to_rgb=model.normalization.to_rgb)
    load = LoadImageFromFile() if model.input.shape[1] == 3 else LoadImageFromFile(color_type="grayscale")
    if isinstance(facts, DetectorFacts):
        fill = {"img": [facts.pad_value] * 3}
        return [
            load, Resize(size=size_wh, keep_ratio=True), Pad(size=size_wh, pad_val=fill), normalize, Pad(size_divisor=1),
            DefaultFormatBundle(), Collect(meta_keys=_BOX_META),
        ]  # fmt: skip
    if isinstance(facts, BoxesFacts):
        return [load, *_fitted(facts.fit, size_wh), normalize, ImageToTensor(), Collect(meta_keys=_BOX_META)]
    if isinstance(facts, ClassifierFacts) or (isinstance(facts, RawFacts) and facts.fit is not None):
        assert facts.fit is not None
        return [load, *_fitted(facts.fit, size_wh), normalize, ImageToTensor(), Collect(meta_keys=_IMAGE_META)]
    return [
        load, TopDownGetBboxCenterScale(padding=facts.padding, image_size=size_wh),
        TopDownAffine(image_size=size_wh, use_udp=True if facts.use_udp else None), normalize, ImageToTensor(),
        Collect(meta_keys=["img_shape", "pad_shape", "ori_shape", "img_norm_cfg", "scale_factor", "bbox_score", "center", "scale"]),
    ]  # fmt: skip


def _fitted(fit: ImageFit, size_wh: tuple[int, int]) -> list[Transform]:
    """The transforms that bring an image to the input's size."""
    width, height = size_wh
    if fit.mode == "shorter-edge":
        return [Resize(size=(fit.edge, -1), keep_ratio=True, interpolation=fit.interpolation), CenterCrop(crop_size=(height, width))]
    if fit.mode == "letterbox":
        return [Resize(size=size_wh, keep_ratio=True, interpolation=fit.interpolation), Pad(size=size_wh, pad_val={"img": [fit.pad_value] * 3})]
    if fit.mode == "letterbox-center":
        return [LetterResize(scale=(height, width), pad_val=fit.pad_value)]
    return [Resize(size=size_wh, keep_ratio=False, interpolation=fit.interpolation)]


def _suppression(facts: DetectorFacts, *, has_nms: bool) -> tuple[str, Params]:
    nms: dict[str, Any] = {"type": "nms", "iou_threshold": facts.iou_threshold}
    if has_nms:
        return "ResizeBBox", ResizeBBoxParams(
            score_thr=facts.score_thr, min_bbox_size=facts.min_bbox_size, nms=nms, nms_pre=facts.nms_pre, max_per_img=facts.max_per_img
        )
    return "RTMDetSepBNHead", RawHeadParams(
        score_thr=facts.score_thr, min_bbox_size=facts.min_bbox_size, nms=nms, nms_pre=facts.nms_pre, max_per_img=facts.max_per_img,
        anchor_generator=AnchorGenerator(offset=0.0, strides=list(STRIDES)),
    )  # fmt: skip


def _keypoint_decoding(facts: PoseFacts | HeatmapFacts | RegressionFacts, *, size_wh: tuple[int, int]) -> tuple[str, Params]:
    if isinstance(facts, RegressionFacts):
        return "DeepposeRegressionHeadDecode", DeepposeRegressionParams()
    if isinstance(facts, PoseFacts):
        return "SimCCLabelDecode", SimCCLabelDecodeParams(input_size=size_wh, sigma=list(facts.sigma), simcc_split_ratio=facts.split_ratio)
    return "TopdownHeatmapSimpleHeadDecode", HeatmapDecodeParams(
        codec="UDPHeatmap" if facts.is_udp_codec else "MSRAHeatmap", input_size=size_wh, heatmap_size=facts.heatmap_wh, sigma=facts.sigma,
        use_udp=facts.is_udp_codec, unbiased=facts.unbiased, blur_kernel_size=facts.blur_kernel_size,
    )  # fmt: skip


def describe_deploy(model: ExportableModel, artifact: BackendArtifact, config: DeployConfig) -> DeployInfo:
    """deploy.json. `batch_size` above 1 is what makes MMDeploy's SDK batch at all."""
    first = artifact.inputs[0].shape[0]
    return DeployInfo(
        version=FORMAT_VERSION,
        task=model.task,
        models=[
            DeployModel(
                name=model.sdk_name,
                net=artifact.files["net"].name,
                weights=artifact.files["weights"].name if "weights" in artifact.files else "",
                backend=artifact.backend,
                precision=artifact.precision.upper(),
                batch_size=config.batch.opt if isinstance(first, str) else first,
                dynamic_shape=artifact.inputs[0].is_batch_dynamic,
            )
        ],
    )


def describe_detail(model: ExportableModel, artifact: BackendArtifact, *, opset: int) -> DetailInfo:
    """detail.json, in MMDeploy's words, without paths of the machine."""
    task, codebase = _CODEBASES[model.task]
    dynamic = {spec.name: {"0": "batch"} for spec in (*artifact.inputs, *artifact.outputs) if spec.is_batch_dynamic}
    return DetailInfo(
        version=FORMAT_VERSION,
        codebase={
            "task": task,
            "codebase": codebase,
            "version": "",
            "pth": model.checkpoint[0],
            "config": "",
        },
        codebase_config={"type": codebase, "task": task},
        onnx_config={
            "type": "onnx",
            "export_params": True,
            "opset_version": opset,
            "save_file": "end2end.onnx",
            "input_names": [spec.name for spec in artifact.inputs],
            "output_names": [spec.name for spec in artifact.outputs],
            "input_shape": [model.input_hw[1], model.input_hw[0]],
            "dynamic_axes": dynamic,
        },
        backend_config={"type": artifact.backend},
    )
