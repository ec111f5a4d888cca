"""A small bundle of a detector, as values and as a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcrate_bundle import Bundle, BundleWriter, Manifest, TensorSpec
from modelcrate_bundle.manifest import OutputParity, ParityRecord, Provenance, Stage, Timing
from modelcrate_bundle.schema import (
    Collect,
    DeployInfo,
    DeployModel,
    DetailInfo,
    LoadImageFromFile,
    NetTask,
    Normalize,
    Pipeline,
    PostprocessTask,
    ResizeBBoxParams,
    TransformTask,
)

NET_BYTES = b"not really an ONNX file, but the bundle does not look inside" * 4


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    def make(**changes: Any) -> Manifest:
        facts: dict[str, Any] = {
            "id": "rtmdet-nano_onnxruntime-fp32",
            "model": "rtmdet-nano",
            "task": "Detector",
            "target": "onnxruntime-fp32",
            "backend": "onnxruntime",
            "precision": "fp32",
            "geometry": "exact",
            "inputs": [TensorSpec(name="input", dtype="float32", shape=("batch", 3, 320, 320))],
            "outputs": [TensorSpec(name="dets", dtype="float32", shape=("batch", 100, 5))],
            "class_names": ["person"],
            "files": [],
            "parity": ParityRecord(
                verified=True,
                images=["a.jpg"],
                samples=1,
                outputs=[OutputParity(name="dets", max_abs=0.25, relative_linf=0.001, gate=0.01, passed=True)],
            ),
            "provenance": Provenance(checkpoint="nano.pth", checkpoint_sha256="ab" * 32, tools={"torch": "2.13.0"}),
            "timing": Timing(created="2026-01-02T03:04:05Z", stages=[Stage(name="export", seconds=1.5)]),
        }
        return Manifest(**(facts | changes))

    return make


@pytest.fixture
def deploy() -> DeployInfo:
    return DeployInfo(
        version="1.3.1",
        task="Detector",
        models=[DeployModel(name="rtmdet", net="end2end.onnx", backend="onnxruntime", dynamic_shape=True)],
    )


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(
        input=["img"],
        output=["post_output"],
        preprocess=TransformTask(
            input=["img"],
            output=["prep_output"],
            transforms=[
                LoadImageFromFile(),
                Normalize(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=False),
                Collect(meta_keys=["ori_shape", "img_shape", "scale_factor"]),
            ],
        ),
        net=NetTask(name="rtmdet", is_batched=True, input=["prep_output"], output=["infer_output"], input_map={"img": "input"}),
        postprocess=PostprocessTask(
            module="mmdet",
            component="ResizeBBox",
            params=ResizeBBoxParams(score_thr=0.05),
            output=["post_output"],
            input=["prep_output", "infer_output"],
        ),
    )


@pytest.fixture
def write_bundle(make_manifest: Callable[..., Manifest], deploy: DeployInfo, pipeline: Pipeline) -> Callable[..., Bundle]:
    """Write the bundle to a place with the public writer; keywords go to the manifest."""

    def write(place: Path, *, net: bytes = NET_BYTES, **changes: Any) -> Bundle:
        with BundleWriter(place) as writer:
            writer.add("end2end.onnx", role="net", content=net)
            return writer.commit(deploy=deploy, pipeline=pipeline, detail=DetailInfo(version="1.3.1"), manifest=make_manifest(**changes))

    return write
