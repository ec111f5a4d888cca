"""What goes into the JSON of a bundle, from the records that the stages returned."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any, Final

from modelcrate_bundle.schema import (
    AnchorGenerator,
    CenterCrop,
    Collect,
    DefaultFormatBundle,
    DeployInfo,
    DeployModel,
    DetailInfo,
    HeatmapDecodeParams,
    ImageToTensor,
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
)
from modelcrate_converter.architecture import ClassifierFacts, DetectorFacts, PoseFacts
from modelcrate_converter.models.rtmdet import STRIDES

if TYPE_CHECKING:
    from modelcrate_converter.architecture import ExportableModel
    from modelcrate_converter.builders import BackendArtifact
    from modelcrate_converter.config import DeployConfig

FORMAT_VERSION: Final = "1.3.1"
"""The MMDeploy release whose format is written; its SDK wants the key and ignores the value."""
TOOLS: Final = ("modelcrate", "torch", "onnx", "onnxsim", "onnxruntime", "numpy", "opencv-python-headless")


def tool_versions() -> dict[str, str]:
    """Distribution -> version, of those that are installed and have a say in the result."""
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_pipeline(model: ExportableModel, *, has_nms: bool) -> Pipeline:
    """pipeline.json.

    Args:
        model: what is being converted.
        has_nms: whether the artefact suppresses detections itself.
    """
    facts = model.postprocess
    height, width = model.input_hw
    normalize = Normalize(mean=list(model.normalization.mean), std=list(model.normalization.std), to_rgb=model.normalization.to_rgb)
    transforms: list[Transform]
    if isinstance(facts, DetectorFacts):
        module = "mmdet"
        fill = {"img": [facts.pad_value] * 3}
        transforms = [
            LoadImageFromFile(), Resize(size=(width, height), keep_ratio=True), Pad(size=(width, height), pad_val=fill), normalize, Pad(size_divisor=1),
            DefaultFormatBundle(), Collect(meta_keys=["ori_shape", "img_shape", "pad_shape", "scale_factor", "img_norm_cfg"]),
        ]  # fmt: skip
        nms: dict[str, Any] = {"type": "nms", "iou_threshold": facts.iou_threshold}
        params: Params
        if has_nms:
            component = "ResizeBBox"
            params = ResizeBBoxParams(
                score_thr=facts.score_thr, min_bbox_size=facts.min_bbox_size, nms=nms, nms_pre=facts.nms_pre, max_per_img=facts.max_per_img
            )
        else:
            component = "RTMDetSepBNHead"
            params = RawHeadParams(
                score_thr=facts.score_thr, min_bbox_size=facts.min_bbox_size, nms=nms, nms_pre=facts.nms_pre, max_per_img=facts.max_per_img,
                anchor_generator=AnchorGenerator(offset=0.0, strides=list(STRIDES)),
            )  # fmt: skip
    elif isinstance(facts, ClassifierFacts):
        module, component = "mmcls", "LinearClsHead"
        transforms = [
            LoadImageFromFile(), Resize(size=(facts.resize_edge, -1), keep_ratio=True), CenterCrop(crop_size=(height, width)), normalize, ImageToTensor(),
            Collect(meta_keys=["filename", "ori_filename", "ori_shape", "img_shape", "flip", "flip_direction", "img_norm_cfg"]),
        ]  # fmt: skip
        params = LinearClsHeadParams(topk=facts.topk)
    else:
        module = "mmpose"
        transforms = [
            LoadImageFromFile(), TopDownGetBboxCenterScale(padding=facts.padding, image_size=(width, height)),
            TopDownAffine(image_size=(width, height), use_udp=True if facts.use_udp else None), normalize, ImageToTensor(),
            Collect(meta_keys=["img_shape", "pad_shape", "ori_shape", "img_norm_cfg", "scale_factor", "bbox_score", "center", "scale"]),
        ]  # fmt: skip
        if isinstance(facts, PoseFacts):
            component = "SimCCLabelDecode"
            params = SimCCLabelDecodeParams(input_size=(width, height), sigma=list(facts.sigma), simcc_split_ratio=facts.split_ratio)
        else:
            component = "TopdownHeatmapSimpleHeadDecode"
            params = HeatmapDecodeParams(
                codec="UDPHeatmap" if facts.is_udp_codec else "MSRAHeatmap", input_size=(width, height), heatmap_size=facts.heatmap_wh, sigma=facts.sigma,
                use_udp=facts.is_udp_codec, unbiased=facts.unbiased, blur_kernel_size=facts.blur_kernel_size,
            )  # fmt: skip
    # MMDeploy's classifier sees the scores alone, and ends the process when it is given more.
    seen = ["infer_output"] if module == "mmcls" else ["prep_output", "infer_output"]
    return Pipeline(
        input=["img"],
        output=["post_output"],
        preprocess=TransformTask(input=["img"], output=["prep_output"], transforms=transforms),
        net=NetTask(name=model.sdk_name, is_batched=True, input=["prep_output"], output=["infer_output"], input_map={"img": model.input.name}),
        postprocess=PostprocessTask(module=module, component=component, params=params, output=["post_output"], input=seen),
    )


def describe_deploy(model: ExportableModel, artifact: BackendArtifact, config: DeployConfig) -> DeployInfo:
    """deploy.json. `batch_size` above 1 is what makes MMDeploy's SDK batch at all."""
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
                batch_size=config.batch.opt,
                dynamic_shape=artifact.inputs[0].is_batch_dynamic,
            )
        ],
    )


def describe_detail(model: ExportableModel, artifact: BackendArtifact, *, opset: int) -> DetailInfo:
    """detail.json, in MMDeploy's words, without paths of the machine."""
    task, codebase = {"Detector": ("ObjectDetection", "mmdet"), "PoseDetector": ("PoseDetection", "mmpose"), "Classifier": ("Classification", "mmpretrain")}[
        model.task
    ]
    dynamic = {spec.name: {"0": "batch"} for spec in (*artifact.inputs, *artifact.outputs)}
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
