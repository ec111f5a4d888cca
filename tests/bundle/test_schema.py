"""MMDeploy's JSON: read leniently, written strictly, nothing lost, and a message that says where."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelcrate_bundle.errors import BundleError, BundleFormatError
from modelcrate_bundle.manifest import read_manifest
from modelcrate_bundle.schema import (
    Collect,
    DeepposeRegressionParams,
    DetailInfo,
    LoadImageFromFile,
    Normalize,
    Pad,
    RawHeadParams,
    Resize,
    ResizeBBoxParams,
    SimCCLabelDecodeParams,
    TopDownAffine,
    TopDownGetBboxCenterScale,
    UnknownParams,
    UnknownTransform,
    decode_json,
    encode_json,
    read_deploy,
    read_pipeline,
    read_record,
    write_deploy,
    write_pipeline,
    write_record,
)

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"

DEPLOY: dict[str, Any] = {
    "version": "1.0.0rc1",
    "task": "Detector",
    "models": [
        {
            "name": "rtmdet",
            "net": "end2end.onnx",
            "weights": "",
            "backend": "onnxruntime",
            "precision": "FP32",
            "batch_size": 1,
            "dynamic_shape": True,
        }
    ],
    "customs": [],
}

DETECTOR: dict[str, Any] = {
    "pipeline": {
        "input": ["img"],
        "output": ["post_output"],
        "tasks": [
            {
                "type": "Task",
                "module": "Transform",
                "name": "Preprocess",
                "input": ["img"],
                "output": ["prep_output"],
                "transforms": [
                    {"type": "LoadImageFromFile", "file_client_args": {"backend": "disk"}},
                    {"type": "Resize", "keep_ratio": True, "size": [320, 320]},
                    {"type": "Pad", "size": [320, 320], "pad_val": {"img": [114, 114, 114]}},
                    {"type": "Normalize", "to_rgb": False, "mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395]},
                    {"type": "Pad", "size_divisor": 1},
                    {"type": "DefaultFormatBundle"},
                    {"type": "Collect", "meta_keys": ["ori_shape", "img_shape", "pad_shape", "scale_factor"], "keys": ["img"]},
                ],
            },
            {
                "name": "rtmdet",
                "type": "Task",
                "module": "Net",
                "is_batched": True,
                "input": ["prep_output"],
                "output": ["infer_output"],
                "input_map": {"img": "input"},
                "output_map": {},
            },
            {
                "type": "Task",
                "module": "mmdet",
                "name": "postprocess",
                "component": "ResizeBBox",
                "params": {"score_thr": 0.05, "min_bbox_size": 0, "nms": {"type": "nms", "iou_threshold": 0.6}, "max_per_img": 100},
                "output": ["post_output"],
                "input": ["prep_output", "infer_output"],
            },
        ],
    }
}

POSE: dict[str, Any] = {
    "pipeline": {
        "input": ["img"],
        "output": ["post_output"],
        "tasks": [
            {
                "type": "Task",
                "module": "Transform",
                "name": "Preprocess",
                "input": ["img"],
                "output": ["prep_output"],
                "transforms": [
                    {"type": "LoadImageFromFile"},
                    {"type": "TopDownGetBboxCenterScale", "padding": 1.25, "image_size": [192, 256]},
                    {"type": "TopDownAffine", "image_size": [192, 256]},
                    {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True},
                    {"type": "ImageToTensor", "keys": ["img"]},
                    {"type": "Collect", "keys": ["img"], "meta_keys": ["img_shape", "ori_shape", "center", "scale"]},
                ],
            },
            {
                "name": "topdownposeestimator",
                "type": "Task",
                "module": "Net",
                "is_batched": True,
                "input": ["prep_output"],
                "output": ["infer_output"],
                "input_map": {"img": "input"},
                "output_map": {},
            },
            {
                "type": "Task",
                "module": "mmpose",
                "name": "postprocess",
                "component": "SimCCLabelDecode",
                "params": {
                    "flip_test": False,
                    "type": "SimCCLabel",
                    "input_size": [288, 384],
                    "sigma": [6.0, 6.93],
                    "simcc_split_ratio": 2.0,
                    "export_postprocess": True,
                },
                "output": ["post_output"],
                "input": ["prep_output", "infer_output"],
            },
        ],
    }
}

MANIFEST: dict[str, Any] = {
    "schema_version": "1.0",
    "id": "a_b",
    "model": "a",
    "task": "PoseDetector",
    "target": "b",
    "backend": "onnxruntime",
    "precision": "fp32",
    "geometry": "sdk",
    "inputs": [{"name": "input", "dtype": "float32", "shape": ["batch", 3, 256, 192]}],
    "outputs": [],
    "shape_ranges": {"input": {"min": [1, 3, 256, 192], "opt": [1, 3, 256, 192], "max": [8, 3, 256, 192]}},
    "class_names": ["person"],
    "keypoints": {"names": ["nose", "ear"], "skeleton": [[0, 1]], "sigmas": [0.026, 0.025], "colors": [[1, 2, 3], [4, 5, 6]]},
    "files": [{"path": "end2end.onnx", "role": "net", "bytes": 1, "sha256": "00"}],
    "parity": {"verified": True, "outputs": [{"name": "x", "max_abs": 0.1, "relative_linf": 0.1, "gate": 1, "passed": True}]},
    "provenance": {"checkpoint": "a.pth", "checkpoint_sha256": "11", "facts": {"padding": "config"}},
    "timing": {"created": "now", "stages": [{"name": "export", "seconds": 1}]},
    "content_sha256": "22",
}


def detector() -> dict[str, Any]:
    return copy.deepcopy(DETECTOR)


def pose() -> dict[str, Any]:
    return copy.deepcopy(POSE)


def deploy() -> dict[str, Any]:
    return copy.deepcopy(DEPLOY)


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON tree but the top."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from nodes(value, (*path, key))


def as_json(written: dict[str, Any]) -> Any:
    """What stands in the file."""
    return json.loads(encode_json(written))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# ------------------------------------------------------------------------------------------------- what MMDeploy's exporter writes


def test_detector_pipeline_reads_to_its_values() -> None:
    pipeline = read_pipeline(detector())
    pad = pipeline.transform(Pad)
    assert pad is not None
    assert (pad.size, pad.fill) == ((320, 320), 114.0)
    assert pipeline.transform(Resize) == Resize(size=(320, 320), keep_ratio=True)
    assert pipeline.transform(Normalize) == Normalize(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=False)
    assert pipeline.preprocess.transforms[4] == Pad(size_divisor=1)
    assert pipeline.preprocess.transforms[6] == Collect(keys=["img"], meta_keys=["ori_shape", "img_shape", "pad_shape", "scale_factor"])
    assert (pipeline.input, pipeline.output) == (["img"], ["post_output"])
    assert (pipeline.net.name, pipeline.net.is_batched, pipeline.net.input_map) == ("rtmdet", True, {"img": "input"})
    assert pipeline.postprocess.module == "mmdet"
    assert pipeline.postprocess.input == ["prep_output", "infer_output"]
    assert pipeline.postprocess.params == ResizeBBoxParams(score_thr=0.05, nms={"type": "nms", "iou_threshold": 0.6}, max_per_img=100)


def test_pose_pipeline_reads_to_its_values() -> None:
    pipeline = read_pipeline(pose())
    assert pipeline.transform(TopDownGetBboxCenterScale) == TopDownGetBboxCenterScale(image_size=(192, 256), padding=1.25)
    assert pipeline.transform(TopDownAffine) == TopDownAffine(image_size=(192, 256))
    assert pipeline.transform(Resize) is None
    assert pipeline.postprocess.params == SimCCLabelDecodeParams(
        codec="SimCCLabel", input_size=(288, 384), sigma=[6.0, 6.93], simcc_split_ratio=2.0, export_postprocess=True
    )


def test_deploy_reads_to_its_values() -> None:
    info = read_deploy(deploy())
    model = info.models[0]
    assert (info.version, info.task, info.customs) == ("1.0.0rc1", "Detector", [])
    assert (model.name, model.net, model.weights, model.backend) == ("rtmdet", "end2end.onnx", "", "onnxruntime")
    assert (model.precision, model.batch_size, model.dynamic_shape) == ("FP32", 1, True)


def test_raw_heads_read_their_anchors_and_their_defaults() -> None:
    raw = detector()
    raw["pipeline"]["tasks"][2] |= {"component": "RTMDetSepBNHead", "params": {"anchor_generator": {"type": "Points", "offset": 0.5, "strides": [4, 8]}}}
    params = read_pipeline(raw).postprocess.params
    assert isinstance(params, RawHeadParams)
    assert (params.anchor_generator.offset, params.anchor_generator.strides, params.anchor_generator.extra) == (0.5, [4, 8], {"type": "Points"})
    assert (params.score_thr, params.iou_threshold) == (0.02, 0.45)


@pytest.mark.parametrize("name", ["mmdeploy-rtmdet-nano", "mmdeploy-rtmpose-t"])
def test_bundles_of_the_real_exporter_lose_nothing(name: str) -> None:
    folder = FIXTURES / "bundles" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}: the real exporter's files are not part of the repository")
    raw_deploy, raw_pipeline, raw_detail = (json.loads((folder / f"{file}.json").read_bytes()) for file in ("deploy", "pipeline", "detail"))
    assert as_json(write_deploy(read_deploy(raw_deploy))) == raw_deploy
    assert as_json(write_pipeline(read_pipeline(raw_pipeline))) == raw_pipeline
    assert as_json(write_record(read_record(DetailInfo, raw_detail, where="detail.json"))) == raw_detail


# ------------------------------------------------------------------------------------------------------------------------ leniency


@pytest.mark.parametrize(("text", "value"), [("false", False), ("False", False), ("true", True), ("True", True)])
def test_booleans_written_as_strings(text: str, value: bool) -> None:
    raw = detector()
    raw["pipeline"]["tasks"][0]["transforms"][3]["to_rgb"] = text
    raw["pipeline"]["tasks"][1]["is_batched"] = text
    outer = deploy()
    outer["models"][0]["dynamic_shape"] = text
    pipeline = read_pipeline(raw)
    normalize = pipeline.transform(Normalize)
    assert normalize is not None
    assert (normalize.to_rgb, pipeline.net.is_batched, read_deploy(outer).models[0].dynamic_shape) == (value, value, value)


def test_flattened_pipeline_is_the_same_pipeline() -> None:
    assert read_pipeline({"type": "Pipeline"} | detector()["pipeline"]) == read_pipeline(detector())


def test_edges_may_be_single_names() -> None:
    raw = detector()
    inner = raw["pipeline"]
    inner |= {"input": "img", "output": "post_output"}
    inner["tasks"][0] |= {"input": "img", "output": "prep_output"}
    inner["tasks"][1] |= {"input": "prep_output", "output": "infer_output"}
    inner["tasks"][2] |= {"output": "post_output"}
    assert read_pipeline(raw) == read_pipeline(detector())


def test_what_the_sdk_does_not_need_may_be_missing() -> None:
    raw = detector()
    for task, keys in ((0, ["name"]), (1, ["is_batched", "input_map", "output_map"]), (2, ["name", "params"])):
        for key in keys:
            del raw["pipeline"]["tasks"][task][key]
    pipeline = read_pipeline(raw)
    assert (pipeline.preprocess.name, pipeline.postprocess.name) == ("Preprocess", "postprocess")
    assert (pipeline.net.is_batched, pipeline.net.input_map, pipeline.net.output_map) == (False, {}, {})
    assert pipeline.postprocess.params == ResizeBBoxParams(score_thr=0.0, min_bbox_size=0.0)


def test_deploy_without_task_and_customs_and_with_null_weights() -> None:
    raw = deploy()
    del raw["task"], raw["customs"]
    raw["models"][0]["weights"] = None
    info = read_deploy(raw)
    assert (info.task, info.customs, info.models[0].weights) == (None, [], "")


def test_deploy_model_with_only_what_a_runtime_needs() -> None:
    model = read_deploy({"version": "0.14.0", "models": [{"name": "a", "net": "a.onnx", "backend": "onnxruntime"}]}).models[0]
    assert (model.weights, model.precision, model.batch_size, model.dynamic_shape) == ("", "FP32", 1, False)


def test_simcc_of_a_release_candidate_has_no_export_postprocess() -> None:
    raw = pose()
    raw["pipeline"]["tasks"][2]["params"] = {"type": "SimCCLabel", "input_size": [192, 256], "sigma": 2, "simcc_split_ratio": 2}
    assert read_pipeline(raw).postprocess.params == SimCCLabelDecodeParams(input_size=(192, 256), sigma=2.0, simcc_split_ratio=2.0, export_postprocess=False)


def test_stray_transform_keys_are_kept() -> None:
    raw = pose()
    raw["pipeline"]["tasks"][0]["transforms"][0] |= {"_scope_": "mmpose", "backend_args": None}
    raw["pipeline"]["tasks"][0]["transforms"][2]["use_udp"] = True
    pipeline = read_pipeline(raw)
    assert pipeline.preprocess.transforms[0] == LoadImageFromFile(extra={"_scope_": "mmpose", "backend_args": None})
    assert pipeline.transform(TopDownAffine) == TopDownAffine(image_size=(192, 256), use_udp=True)


@pytest.mark.parametrize(
    ("pad_val", "fill"), [(114, 114.0), (0.5, 0.5), ([7, 8, 9], 7.0), ({"img": [114, 0, 0]}, 114.0), ({"img": 3}, 3.0), ({"seg": 255}, 0.0), ([], 0.0)]
)
def test_padding_value_in_all_its_forms(pad_val: Any, fill: float) -> None:
    raw = detector()
    raw["pipeline"]["tasks"][0]["transforms"][2]["pad_val"] = pad_val
    pad = read_pipeline(raw).transform(Pad)
    assert pad is not None
    assert pad.fill == fill


@pytest.mark.parametrize("pad_val", [{"img": "grey"}, {"img": [[1], [2], [3]]}])
def test_padding_value_that_is_no_number_is_a_bundle_error(pad_val: Any) -> None:
    raw = detector()
    raw["pipeline"]["tasks"][0]["transforms"][2]["pad_val"] = pad_val
    with pytest.raises(BundleError, match="pad_val"):
        _ = read_pipeline(raw).preprocess.transforms[2].fill  # type: ignore[attr-defined]


@pytest.mark.parametrize("threshold", ["high", [0.5]])
def test_iou_threshold_that_is_no_number_is_a_bundle_error(threshold: Any) -> None:
    raw = detector()
    raw["pipeline"]["tasks"][2] |= {"component": "BaseDenseHead", "params": {"nms": {"iou_threshold": threshold}}}
    with pytest.raises(BundleError, match="iou_threshold"):
        _ = read_pipeline(raw).postprocess.params.iou_threshold  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------------ nothing is lost


def test_unknown_keys_survive_at_every_level() -> None:
    raw = detector()
    stray = {"a": [1, {"b": None}], "c": "d"}
    inner = raw["pipeline"]
    for level in (raw, inner, *inner["tasks"], *inner["tasks"][0]["transforms"], inner["tasks"][2]["params"]):
        level["stray"] = stray
        level["extra"] = "a key that is called like our field"
    written = as_json(write_pipeline(read_pipeline(raw)))
    assert written == raw
    assert as_json(write_pipeline(read_pipeline(written))) == written

    outer = deploy()
    for level in (outer, outer["models"][0]):
        level["stray"] = stray
        level["extra"] = 1
    assert as_json(write_deploy(read_deploy(outer))) == outer


def test_unknown_keys_of_a_flattened_pipeline_survive() -> None:
    written = write_pipeline(read_pipeline({"type": "Pipeline", "stray": 1} | detector()["pipeline"]))
    assert read_pipeline(written).extra["inner"] == {"stray": 1}
    assert written["pipeline"]["stray"] == 1


@pytest.mark.parametrize("key", ["codec", "name", "extra"])
def test_unknown_keys_of_params_survive_whatever_they_are_called(key: str) -> None:
    raw = pose()
    raw["pipeline"]["tasks"][2]["params"][key] = "theirs"
    written = write_pipeline(read_pipeline(raw))["pipeline"]["tasks"][2]["params"]
    assert (written[key], written["type"]) == ("theirs", "SimCCLabel")


def test_unknown_transforms_and_components_survive() -> None:
    raw = detector()
    foreign = {"type": "TenCrop", "name": "a", "size": [1, None]}
    raw["pipeline"]["tasks"][0]["transforms"][1] = foreign
    raw["pipeline"]["tasks"][2] |= {"component": "YOLOV3Head", "params": {"anchors": [[1, 2]], "type": "x"}}
    pipeline = read_pipeline(raw)
    assert pipeline.preprocess.transforms[1] == UnknownTransform(name="TenCrop", extra={"name": "a", "size": [1, None]})
    assert pipeline.postprocess.component == "YOLOV3Head"
    assert pipeline.postprocess.params == UnknownParams(extra={"anchors": [[1, 2]], "type": "x"})
    assert as_json(write_pipeline(pipeline)) == raw


def test_regression_heads_keep_their_params() -> None:
    raw = pose()
    raw["pipeline"]["tasks"][2] |= {"component": "DeepposeRegressionHeadDecode", "params": {"type": "RegressionLabel", "input_size": [192, 256]}}
    pipeline = read_pipeline(raw)
    assert isinstance(pipeline.postprocess.params, DeepposeRegressionParams)
    assert as_json(write_pipeline(pipeline)) == raw


# ------------------------------------------------------------------------------------------------------------------------- writing


def test_written_pipeline_has_the_exporters_keys_in_its_order() -> None:
    pipeline = read_pipeline(detector())
    pipeline.preprocess.transforms = [LoadImageFromFile(), Resize(size=320), Pad(size_divisor=1)]
    tasks = write_pipeline(pipeline)["pipeline"]["tasks"]
    assert list(tasks[1]) == ["name", "type", "module", "is_batched", "input", "output", "input_map", "output_map"]
    assert list(tasks[2]) == ["type", "module", "name", "component", "params", "output", "input"]
    assert tasks[0]["transforms"] == [{"type": "LoadImageFromFile"}, {"type": "Resize", "size": 320, "keep_ratio": False}, {"type": "Pad", "size_divisor": 1}]


def test_written_deploy_has_all_seven_keys_the_sdk_insists_on() -> None:
    info = read_deploy({"version": "1.3.1", "models": [{"name": "a", "net": "a.onnx", "backend": "onnxruntime", "weights": None}]})
    model = write_deploy(info)["models"][0]
    assert model == {
        "name": "a", "net": "a.onnx", "weights": "", "backend": "onnxruntime", "precision": "FP32", "batch_size": 1, "dynamic_shape": False,
    }  # fmt: skip


def test_null_is_never_written() -> None:
    raw = pose()
    raw["pipeline"]["tasks"][0]["transforms"][2]["use_udp"] = None
    raw["pipeline"]["tasks"][0]["transforms"].append({"type": "Pad", "size": None, "size_divisor": None})
    raw["pipeline"]["tasks"][2]["params"]["sigma"] = None
    outer = deploy() | {"task": None}
    outer["models"][0]["weights"] = None
    data = encode_json(write_pipeline(read_pipeline(raw))) + encode_json(write_deploy(read_deploy(outer)))
    assert b"null" not in data
    assert b"use_udp" not in data


def test_same_values_give_the_same_bytes() -> None:
    first = encode_json(write_pipeline(read_pipeline(detector())))
    assert first == encode_json(write_pipeline(read_pipeline(json.loads(first))))
    assert first.startswith(b'{\n    "pipeline": {\n        "input": [\n')
    assert first.endswith(b"}\n")


# -------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("models", 0, "batch_size"), "x", "deploy.json: $.models[0].batch_size: expected int, found str"),
        (("models", 0, "net"), 5, "deploy.json: $.models[0].net: expected str, found int"),
        (("models", 0), [1], "deploy.json: $.models[0]: expected an object, found [1]"),
        (("models",), {}, "deploy.json: $.models: expected an array, found {}"),
        (("models",), None, "deploy.json: $.models: expected an array, found nothing"),
        (("models",), [], "deploy.json: $.models: expected at least one network, found none"),
        (("version",), 1, "deploy.json: $.version: expected str, found int"),
    ],
)
def test_wrong_deploy_json_is_refused_with_its_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    raw = deploy()
    at(raw, path[:-1])[path[-1]] = value
    with pytest.raises(BundleFormatError) as caught:
        read_deploy(raw)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((0, "transforms", 3, "mean", 1), "x", "transforms[3].mean[1]: expected float, found str"),
        ((0, "transforms", 1, "size"), [1, 2, 3], "transforms[1].size: "),
        ((0, "transforms", 1), "Resize", "transforms[1]: expected an object, found 'Resize'"),
        ((0, "transforms", 1, "type"), None, "transforms[1].type: expected the name of a transform, found nothing"),
        ((0, "transforms"), {}, "tasks[0].transforms: expected an array, found {}"),
        ((0, "input"), [], "tasks[0].input: expected a name or an array of names, found []"),
        ((1, "input_map", "img"), 3, "tasks[1].input_map[...]: expected str, found int"),
        ((1, "is_batched"), "perhaps", "tasks[1].is_batched: expected bool, found str"),
        ((1, "type"), "Thing", "tasks[1].type: expected 'Task', found 'Thing'"),
        ((2, "params"), [], "tasks[2].params: expected an object, found []"),
        ((2, "params", "score_thr"), {}, "tasks[2].params.score_thr: expected float, found object"),
        ((2,), 7, "tasks[2]: expected an object, found 7"),
    ],
)
def test_wrong_pipeline_json_is_refused_with_its_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    raw = detector()
    at(raw["pipeline"]["tasks"], path[:-1])[path[-1]] = value
    with pytest.raises(BundleFormatError) as caught:
        read_pipeline(raw, where="a/pipeline.json")
    assert str(caught.value).startswith("a/pipeline.json: $.pipeline.tasks[")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, "transforms", 1, "size"), "$.pipeline.tasks[0].transforms[1]: expected the key 'size', found none"),
        ((0, "transforms"), "$.pipeline.tasks[0].transforms: expected an array, found nothing"),
        ((1, "name"), "$.pipeline.tasks[1]: expected the key 'name', found none"),
        ((1, "input"), "$.pipeline.tasks[1].input: expected a name or an array of names, found nothing"),
        ((2, "component"), "$.pipeline.tasks[2]: expected the key 'component', found none"),
        ((2, "type"), "$.pipeline.tasks[2].type: expected 'Task', found nothing"),
    ],
)
def test_missing_key_is_refused_with_its_place(path: tuple[Any, ...], message: str) -> None:
    raw = detector()
    del at(raw["pipeline"]["tasks"], path[:-1])[path[-1]]
    with pytest.raises(BundleFormatError) as caught:
        read_pipeline(raw)
    assert str(caught.value) == f"pipeline.json: {message}"


def test_flattened_pipeline_is_refused_with_its_own_paths() -> None:
    raw = {"type": "Pipeline"} | detector()["pipeline"]
    del raw["tasks"][1]["name"]
    with pytest.raises(BundleFormatError, match=r"pipeline\.json: \$\.tasks\[1\]: expected the key 'name'"):
        read_pipeline(raw)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 2], [0, 0, 1], [1, 2], [0, 1, 1, 2], []])
def test_other_than_three_tasks_are_refused(order: list[int]) -> None:
    raw = detector()
    raw["pipeline"]["tasks"] = [raw["pipeline"]["tasks"][i] for i in order]
    with pytest.raises(BundleFormatError, match=r"\$\.pipeline\.tasks: expected one Transform, one Net and one postprocessing task, found \[") as caught:
        read_pipeline(raw)
    assert "hand-written" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"{", b"{]", b"{} {}", b"\x00\xff", b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(BundleFormatError, match=r"^here/deploy\.json: expected JSON, found something else: .") as caught:
        decode_json(data, where="here/deploy.json")
    assert caught.value.hint == "export the bundle again"


@pytest.mark.parametrize(("data", "shown"), [(b"[1]", r"\[1\]"), (b'"x"', "'x'"), (b"3", "3"), (b"null", "nothing")])
def test_json_that_is_no_object_is_refused(data: bytes, shown: str) -> None:
    with pytest.raises(BundleFormatError, match=rf"^f: \$: expected an object, found {shown}$"):
        decode_json(data, where="f")


def test_nesting_at_any_depth_gives_the_same_kind_of_error() -> None:
    for depth in range(900, 1010, 2):
        for data in (b"[" * depth + b"]" * depth, b'{"version": "1", "models": ' + b"[" * depth + b"]" * depth + b"}"):
            with pytest.raises(BundleFormatError):
                read_deploy(decode_json(data, where="f"), where="f")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(BundleFormatError) as caught:
        read_deploy({"version": "1", "models": "x" * 10_000})
    assert len(str(caught.value)) < 200


# ---------------------------------------------------------------------------------------------------------------- whatever is given

json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["false", "Task", "Net", "Pad", "0", "-1"]),
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["type", "models", "tasks", "pipeline", "input", "img"]), inside, max_size=4)
    ),
    max_leaves=12,
)
json_object = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["version", "models", "task", "pipeline", "tasks", "type", "input", "output", "schema_version", "files"]),
    json_value,
    max_size=6,
)
READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "deploy": lambda data: write_deploy(read_deploy(decode_json(data, where="f"))),
    "pipeline": lambda data: write_pipeline(read_pipeline(decode_json(data, where="f"))),
    "manifest": lambda data: write_record(read_manifest(data)),
}


def read_and_write_again(kind: str, raw: Any) -> None:
    """Reading gives a BundleError or a value that is written, read and written again to the same bytes."""
    read = READERS[kind]
    try:
        written = read(json.dumps(raw).encode())
    except BundleError:
        return
    data = encode_json(written)
    assert encode_json(read(data)) == data


@settings(max_examples=50, deadline=None)
@given(kind=st.sampled_from(sorted(READERS)), raw=json_object)
def test_any_object_is_read_or_refused(kind: str, raw: dict[str, Any]) -> None:
    read_and_write_again(kind, raw)


def test_the_documents_that_are_damaged_below_are_good() -> None:
    for kind, document in (("deploy", DEPLOY), ("pipeline", DETECTOR), ("pipeline", POSE), ("manifest", MANIFEST)):
        assert READERS[kind](json.dumps(document).encode())


HUGE = 10**400
EVERY_NODE = [
    (kind, document, path)
    for kind, document in (("deploy", DEPLOY), ("pipeline", DETECTOR), ("pipeline", POSE), ("manifest", MANIFEST))
    for path in nodes(document)
]


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from(EVERY_NODE), value=json_value)
def test_any_value_at_any_place_is_read_or_refused(place: tuple[str, Any, tuple[Any, ...]], value: Any) -> None:
    kind, document, path = place
    raw = copy.deepcopy(document)
    at(raw, path[:-1])[path[-1]] = value
    read_and_write_again(kind, raw)


@pytest.mark.parametrize("value", [HUGE, -(2**70), None, ""], ids=["huge", "negative", "null", "text"])
def test_awkward_values_at_every_place_are_read_or_refused(value: Any) -> None:
    for kind, document, path in EVERY_NODE:
        raw = copy.deepcopy(document)
        at(raw, path[:-1])[path[-1]] = value
        read_and_write_again(kind, raw)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=40))
@example(data=b'{"a": "\\ud800"}')
@example(data=b"\xef\xbb\xbf{}")
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        value = decode_json(data, where="f")
    except BundleFormatError as error:
        assert str(error).startswith("f: ")
    else:
        assert value == json.loads(data)
