"""Deploy configs in MMDeploy's words and folders: what they decide, what they ask of the model, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError
from modelcrate_converter.cli import app
from modelcrate_converter.config import Batch, ModelNeeds, load_config, target_names
from modelcrate_converter.mmdeploy_config import read_mmdeploy_config

TREE = {
    "_base_/onnx_config.py": (
        "onnx_config = dict(\n    type='onnx', export_params=True, keep_initializers_as_inputs=False, opset_version=11, save_file='end2end.onnx',\n"
        "    input_names=['input'], output_names=['output'], input_shape=None, optimize=True)\n"
    ),
    "_base_/backends/onnxruntime.py": "backend_config = dict(type='onnxruntime')\n",
    "_base_/backends/onnxruntime-fp16.py": "backend_config = dict(type='onnxruntime', precision='fp16', common_config=dict(min_positive_val=1e-7))\n",
    "_base_/backends/snpe.py": "backend_config = dict(type='snpe')\n",
    "_base_/backends/shaped.py": "_base_ = ['./onnxruntime.py']\nbackend_config = dict(common_config=dict(max_workspace_size=0))\n",
    "mmdet/_base_/base_static.py": (
        "_base_ = ['../../_base_/onnx_config.py']\n"
        "onnx_config = dict(output_names=['dets', 'labels'], input_shape=None)\n"
        "codebase_config = dict(\n    type='mmdet', task='ObjectDetection', model_type='end2end',\n"
        "    post_processing=dict(score_threshold=0.05, confidence_threshold=0.005, iou_threshold=0.5, max_output_boxes_per_class=200, pre_top_k=1234,\n"
        "        keep_top_k=100, background_label_id=-1))\n"
    ),
    "mmdet/_base_/base_dynamic.py": (
        "_base_ = ['./base_static.py']\n"
        "onnx_config = dict(dynamic_axes={'input': {0: 'batch', 2: 'height', 3: 'width'}, 'dets': {0: 'batch', 1: 'num_dets'},\n"
        "    'labels': {0: 'batch', 1: 'num_dets'}})\n"
    ),
    "mmdet/detection/detection_onnxruntime_static.py": "_base_ = ['../_base_/base_static.py', '../../_base_/backends/onnxruntime.py']\n",
    "mmdet/detection/detection_onnxruntime_dynamic.py": "_base_ = ['../_base_/base_dynamic.py', '../../_base_/backends/onnxruntime.py']\n",
    "mmdet/detection/detection_onnxruntime-fp16_dynamic.py": "_base_ = ['../_base_/base_dynamic.py', '../../_base_/backends/onnxruntime-fp16.py']\n",
    "mmdet/detection/detection_snpe_static.py": "_base_ = ['../_base_/base_static.py', '../../_base_/backends/snpe.py']\n",
    "mmdet/detection/detection_shaped_dynamic-320x320-1344x1344.py": (
        "_base_ = ['../_base_/base_dynamic.py', '../../_base_/backends/shaped.py']\n"
        "backend_config = dict(model_inputs=[dict(input_shapes=dict(input=dict(\n"
        "    min_shape=[2, 3, 320, 320], opt_shape=[4, 3, 800, 1344], max_shape=[6, 3, 1344, 1344])))])\n"
    ),
    "mmdet/detection/single-stage_partition_onnxruntime_dynamic.py": (
        "_base_ = ['./detection_onnxruntime_dynamic.py']\n"
        "partition_config = dict(type='single_stage', apply_marks=True,\n"
        "    partition_cfg=[dict(save_file='yolov3.onnx', start=['detector_forward:input'], end=['yolo_head:input'])])\n"
    ),
    "mmdet/detection/two-in-one_onnxruntime_static.py": "_base_ = ['./detection_onnxruntime_static.py']\ncodebase_config = dict(model_type='partition_single_stage')\n",
    "mmpose/pose-detection_static.py": (
        "_base_ = ['../_base_/onnx_config.py']\nonnx_config = dict(input_shape=None)\ncodebase_config = dict(type='mmpose', task='PoseDetection')\n"
    ),
    "mmpose/pose-detection_simcc_onnxruntime_dynamic.py": (
        "_base_ = ['./pose-detection_static.py', '../_base_/backends/onnxruntime.py']\n"
        "onnx_config = dict(\n    input_shape=[192, 256], output_names=['simcc_x', 'simcc_y'],\n"
        "    dynamic_axes={'input': {0: 'batch'}, 'simcc_x': {0: 'batch'}, 'simcc_y': {0: 'batch'}})\n"
    ),
    "mmpose/pose-detection_onnxruntime_static.py": "_base_ = ['./pose-detection_static.py', '../_base_/backends/onnxruntime.py']\n",
    "mmpose/pose-detection_simcc_shaped_dynamic-256x192.py": (
        "_base_ = ['./pose-detection_simcc_onnxruntime_dynamic.py']\n"
        "backend_config = dict(type='onnxruntime', model_inputs=[dict(input_shapes=dict(input=dict(\n"
        "    min_shape=[1, 3, 256, 192], opt_shape=[3, 3, 256, 192], max_shape=[7, 3, 256, 192])))])\n"
    ),
    "mmpretrain/classification_onnxruntime_dynamic.py": (
        "_base_ = ['../_base_/onnx_config.py', '../_base_/backends/onnxruntime.py']\n"
        "codebase_config = dict(type='mmpretrain', task='Classification')\n"
        "onnx_config = dict(dynamic_axes={'input': {0: 'batch', 2: 'height', 3: 'width'}, 'output': {0: 'batch'}}, input_shape=None)\n"
    ),
}
"""MMDeploy's `configs`, as far as they are needed here, in its structure."""

DETECTION, POSE = "mmdet/detection", "mmpose"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "configs"


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MODELCRATE_TRACEBACK", raising=False)
    return lambda *arguments: CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)])


def written(folder: Path, text: str, *, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def assert_one_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in errors[0], errors[0]


# -------------------------------------------------------------------------------------------------------------- what they decide


def test_a_dynamic_config_is_our_target_with_what_it_asks_of_the_model(configs: Path) -> None:
    config = read_mmdeploy_config(configs / POSE / "pose-detection_simcc_onnxruntime_dynamic.py")
    ours = load_config("onnxruntime")
    needs = ModelNeeds(source="pose-detection_simcc_onnxruntime_dynamic.py", task="PoseDetector", least_hw=(256, 192), most_hw=(256, 192))
    assert config.needs == needs
    assert type(config)(**{name: getattr(config, name) for name in config.__struct_fields__ if name != "needs"}) == ours


def test_a_static_config_is_a_batch_of_one(configs: Path) -> None:
    config = read_mmdeploy_config(configs / POSE / "pose-detection_onnxruntime_static.py")
    assert config.batch == Batch(min=1, opt=1, max=1)
    assert config.needs == ModelNeeds(source="pose-detection_onnxruntime_static.py", task="PoseDetector")
    assert read_mmdeploy_config(configs / DETECTION / "detection_onnxruntime_static.py").batch == Batch(min=1, opt=1, max=1)


def test_suppression_takes_as_many_candidates_as_the_config_says(configs: Path) -> None:
    ours = load_config("onnxruntime").nms
    for name in ("detection_onnxruntime_static.py", "detection_onnxruntime_dynamic.py"):
        nms = read_mmdeploy_config(configs / DETECTION / name).nms
        assert (nms.pre_top_k, nms.where) == (1234, ours.where)
    assert read_mmdeploy_config(configs / POSE / "pose-detection_onnxruntime_static.py").nms == ours


def test_a_range_of_shapes_is_the_batch_and_the_sizes_that_fit(configs: Path) -> None:
    config = read_mmdeploy_config(configs / DETECTION / "detection_shaped_dynamic-320x320-1344x1344.py")
    assert config.batch == Batch(min=2, opt=4, max=6)
    assert config.needs is not None
    assert (config.needs.task, config.needs.least_hw, config.needs.most_hw) == ("Detector", (320, 320), (1344, 1344))


@pytest.mark.parametrize(("shapes", "found"), [((3, 2, 4), "3, 2, 4"), ((1, 5, 4), "1, 5, 4"), ((9, 9, 1), "9, 9, 1")])
def test_a_range_that_goes_backwards_is_refused(configs: Path, shapes: tuple[int, int, int], found: str) -> None:
    least, best, most = ([count, 3, 64, 64] for count in shapes)
    path = written(
        configs / POSE,
        "_base_ = ['./pose-detection_onnxruntime_static.py']\n"
        f"backend_config = dict(model_inputs=[dict(input_shapes=dict(input=dict(min_shape={least}, opt_shape={best}, max_shape={most})))])\n",
    )
    with pytest.raises(ConfigError, match=f"model_inputs: expected min <= opt <= max in the batch, found {found}"):
        read_mmdeploy_config(path)


def test_axes_that_are_dynamic_beside_the_batch_do_not_make_a_batch(configs: Path) -> None:
    path = written(configs / POSE, "_base_ = ['./pose-detection_onnxruntime_static.py']\nonnx_config = dict(dynamic_axes={'input': {2: 'h', 3: 'w'}})\n")
    assert read_mmdeploy_config(path).batch == Batch(min=1, opt=1, max=1)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mmpretrain/classification_onnxruntime_dynamic.py", "Classifier"),
        ("mmdet/detection/detection_onnxruntime_dynamic.py", "Detector"),
        ("mmpose/pose-detection_onnxruntime_static.py", "PoseDetector"),
    ],
)
def test_the_task_is_asked_of_the_model(configs: Path, name: str, task: str) -> None:
    config = read_mmdeploy_config(configs / name)
    assert config.needs is not None
    assert (config.needs.task, config.needs.least_hw) == (task, None)


def test_one_file_with_everything_needs_no_bases(tmp_path: Path) -> None:
    config = read_mmdeploy_config(written(tmp_path, "backend_config = dict(type='onnxruntime')\nonnx_config = dict(input_shape=(100, 50))\n"))
    assert config.needs == ModelNeeds(source="mine.py", task=None, least_hw=(50, 100), most_hw=(50, 100))


# ------------------------------------------------------------------------------------------------------ what they ask of the model


def test_another_task_is_refused_with_both() -> None:
    needs = ModelNeeds(source="deploy.py", task="Detector")
    with pytest.raises(ConfigError, match=r"deploy\.py: expected the model of a Detector, found rtmpose-m, a PoseDetector"):
        needs.check(name="rtmpose-m", task="PoseDetector", input_hw=(256, 192))
    needs.check(name="rtmdet-m", task="Detector", input_hw=(640, 640))


@pytest.mark.parametrize(
    ("least", "most", "input_hw", "words"),
    [
        ((256, 192), (256, 192), (192, 256), "192x256, found net with 256x192"),
        ((256, 192), (256, 192), (384, 288), "192x256, found net with 288x384"),
        ((320, 400), (640, 800), (640, 801), "400x320 to 800x640, found net with 801x640"),
        ((320, 400), (640, 800), (319, 400), "400x320 to 800x640, found net with 400x319"),
    ],
)
def test_another_size_is_refused_with_both(least: tuple[int, int], most: tuple[int, int], input_hw: tuple[int, int], words: str) -> None:
    needs = ModelNeeds(source="deploy.py", least_hw=least, most_hw=most)
    with pytest.raises(ConfigError, match=r"deploy\.py: expected an input \(width x height\) of " + words):
        needs.check(name="net", task="Detector", input_hw=input_hw)
    for size in (least, most):
        needs.check(name="net", task="Detector", input_hw=size)


def test_who_asks_nothing_takes_any_model() -> None:
    ModelNeeds(source="deploy.py").check(name="net", task="Classifier", input_hw=(1, 1))
    assert load_config("onnxruntime").needs is None


# ------------------------------------------------------------------------------------------------------------------ what is refused


def test_a_backend_that_is_no_target_is_refused_with_those_that_are(configs: Path) -> None:
    with pytest.raises(ConfigError, match=f"detection_snpe_static.py: expected the deploy config of one of {', '.join(target_names())}, found snpe"):
        read_mmdeploy_config(configs / DETECTION / "detection_snpe_static.py")


def test_a_precision_that_is_no_target_is_refused(configs: Path) -> None:
    path = written(configs / DETECTION, "_base_ = ['./detection_onnxruntime_dynamic.py']\nbackend_config = dict(type='pplnn', precision='INT8')\n")
    with pytest.raises(ConfigError, match=r"mine\.py: .*found pplnn-int8"):
        read_mmdeploy_config(path)


def test_ncnns_int8_is_ours(configs: Path) -> None:
    """MMDeploy's own ncnn-int8 configs say so; suppression stays with the host."""
    path = written(configs / DETECTION, "_base_ = ['./detection_onnxruntime_dynamic.py']\nbackend_config = dict(type='ncnn', precision='INT8')\n")
    config = read_mmdeploy_config(path)
    assert (config.target, config.precision, config.nms.where, config.int8.activations) == ("ncnn-int8", "int8", "runtime", "int8")


def test_tensorrts_workspace_and_shapes_are_read(tmp_path: Path) -> None:
    text = """
onnx_config = dict(type="onnx", dynamic_axes={"input": {0: "batch"}})
codebase_config = dict(type="mmpose", task="PoseDetection")
backend_config = dict(
    type="tensorrt",
    common_config=dict(fp16_mode=True, max_workspace_size=1 << 30),
    model_inputs=[dict(input_shapes=dict(input=dict(min_shape=[1, 3, 256, 192], opt_shape=[2, 3, 256, 192], max_shape=[4, 3, 256, 192])))],
)
"""
    config = read_mmdeploy_config(written(tmp_path, text))
    assert (config.target, config.tensorrt.workspace_mib) == ("tensorrt-fp16", 1024)
    assert (config.batch.min, config.batch.opt, config.batch.max) == (1, 2, 4)


@pytest.mark.parametrize(("mode", "precision"), [("int8_mode", "int8"), ("fp16_mode", "fp16")])
def test_tensorrts_way_to_say_a_precision_is_read(configs: Path, mode: str, precision: str) -> None:
    text = f"_base_ = ['./detection_onnxruntime_dynamic.py']\nbackend_config = dict(type='onnxruntime', common_config=dict({mode}=True))\n"
    config = read_mmdeploy_config(written(configs / DETECTION, text))
    assert (config.target, config.precision) == (f"onnxruntime-{precision}", precision)


@pytest.mark.parametrize("kind", ["../onnxruntime", "/etc/passwd", "onnxruntime.toml", ""])
def test_a_backend_is_a_name_and_no_path(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.py: expected the deploy config of one of"):
        read_mmdeploy_config(written(tmp_path, f"backend_config = dict(type={kind!r})\n"))


def test_bases_that_are_not_there_are_named(configs: Path, tmp_path: Path) -> None:
    text = (configs / POSE / "pose-detection_simcc_onnxruntime_dynamic.py").read_text()
    with pytest.raises(ConfigError, match=r"found none, and its bases .*\.\./_base_/backends/onnxruntime\.py.* are not there") as caught:
        read_mmdeploy_config(written(tmp_path, text))
    assert "beside its _base_" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(type='TopdownPoseEstimator', backbone=dict(type='CSPNeXt'))\ntest_cfg = dict()\n",
        "",
        "backend_config = 3\n",
        "backend_config = dict(type=['onnxruntime'])\n",
        "backend_config = dict(type=unknown())\n",
    ],
    ids=["a model's config", "nothing", "a number", "a list", "what nobody can say"],
)
def test_what_is_no_deploy_config_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.py: expected a deploy config of MMDeploy with backend_config\.type, found none") as caught:
        read_mmdeploy_config(written(tmp_path, text))
    assert "not a model's" in caught.value.hint


def test_partitions_are_refused(configs: Path) -> None:
    for name in ("single-stage_partition_onnxruntime_dynamic.py", "two-in-one_onnxruntime_static.py"):
        with pytest.raises(ConfigError, match=f"{name}: expected a network in one piece"):
            read_mmdeploy_config(configs / DETECTION / name)


@pytest.mark.parametrize(
    "text", ["codebase_config = dict(task='TextDetection')", "codebase_config = dict(task=['PoseDetection'])", "codebase_config = dict(task=dict(a=1))"]
)
def test_a_task_that_there_is_nothing_for_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.py: codebase_config\.task: expected one of ObjectDetection, PoseDetection, Classification"):
        read_mmdeploy_config(written(tmp_path, "backend_config = dict(type='onnxruntime')\n" + text))


def test_a_model_type_that_is_no_name_is_refused(tmp_path: Path) -> None:
    text = "backend_config = dict(type='onnxruntime')\ncodebase_config = dict(task='PoseDetection', model_type=['end2end'])\n"
    with pytest.raises(ConfigError, match="expected a network in one piece"):
        read_mmdeploy_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "word"), [(b"backend_config = dict(", "mine.py"), (b"\x00\xff\xfe", "UTF-8"), (None, "no such file")], ids=["half a line", "bytes", "no file"]
)
def test_a_file_that_is_no_python_is_refused(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        read_mmdeploy_config(path)


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.system('touch {touched}')\n",
        "backend_config['type'] = __import__('os').system('touch {touched}') or 'onnxruntime'\n",
        "codebase_config = dict(task=open({touched!r}, 'w').write('x') or 'PoseDetection')\n",
        "from pathlib import Path\nPath({touched!r}).touch()\n",
        "_base_ = [__import__('pathlib').Path({touched!r}).touch() or 'a.py']\n",
        "exec(\"open({touched!r}, 'w')\")\n",
    ],
    ids=["a command", "in a value", "a file", "a path", "in the bases", "a text"],
)
def test_code_in_a_config_is_never_run(tmp_path: Path, code: str) -> None:
    touched = tmp_path / "touched"
    path = written(tmp_path, "backend_config = dict(type='onnxruntime')\n" + code.format(touched=str(touched)))
    try:
        config = read_mmdeploy_config(path)
    except ConfigError:
        config = None
    assert not touched.exists()
    assert config is None or config.target == "onnxruntime"


# ------------------------------------------------------------------------------------------------------------------ as a command


def test_the_command_line_builds_what_the_config_says(invoke: Callable[..., Result], configs: Path, tmp_path: Path) -> None:
    path = configs / POSE / "pose-detection_simcc_shaped_dynamic-256x192.py"
    result = invoke("demo-pose", "--deploy-config", path, "-o", tmp_path / "out", "--no-simplify")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "out" / "demo-pose_onnxruntime")
    bundle.verify()
    assert bundle.manifest is not None
    limits = bundle.manifest.shape_ranges["input"]
    assert (limits.min, limits.opt, limits.max) == ((1, 3, 256, 192), (3, 3, 256, 192), (7, 3, 256, 192))
    assert (bundle.manifest.target, bundle.manifest.parity.passed, bundle.model.batch_size) == ("onnxruntime", True, 3)


def test_a_config_of_another_task_or_size_is_one_line(invoke: Callable[..., Result], configs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = "detection_onnxruntime_dynamic.py"
    assert_one_error(invoke("demo-pose", "--deploy-config", configs / DETECTION / name, "-o", out), 4, name, "a Detector", "demo-pose, a PoseDetector")
    small = written(configs / POSE, "_base_ = ['./pose-detection_simcc_onnxruntime_dynamic.py']\nonnx_config = dict(input_shape=[288, 384])\n")
    assert_one_error(invoke("demo-pose", "--deploy-config", small, "-o", out), 4, "mine.py", "288x384", "192x256")
    assert not out.exists() or not list(out.iterdir())


def test_without_any_target_the_targets_are_listed(invoke: Callable[..., Result]) -> None:
    result = invoke("demo-pose")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for target in target_names():
        assert target in result.stderr


def test_one_target_named_twice_is_one_line(invoke: Callable[..., Result], configs: Path, tmp_path: Path) -> None:
    path = configs / POSE / "pose-detection_onnxruntime_static.py"
    assert_one_error(invoke("demo-pose", "-t", "onnxruntime", "--deploy-config", path, "-o", tmp_path / "out"), 4, "'onnxruntime' twice")


def test_a_config_that_is_wrong_is_one_line(invoke: Callable[..., Result], configs: Path, tmp_path: Path) -> None:
    for path, word in ((configs / DETECTION / "detection_snpe_static.py", "snpe"), (tmp_path / "gone.py", "no such file")):
        assert_one_error(invoke("demo-pose", "--deploy-config", path, "-o", tmp_path / "out"), 4, path.name, word)
    assert not (tmp_path / "out").exists()


def test_ncnns_own_name_of_a_whole_network_is_read(tmp_path: Path) -> None:
    path = tmp_path / "single-stage_ncnn_static-320x320.py"
    path.write_text(
        "codebase_config = dict(type='mmdet', task='ObjectDetection', model_type='ncnn_end2end', post_processing=dict(pre_top_k=5000))\n"
        "onnx_config = dict(input_shape=[320, 320], output_names=['detection_output'])\n"
        "backend_config = dict(type='ncnn', precision='FP32', use_vulkan=False)\n"
    )
    config = read_mmdeploy_config(path)
    assert (config.target, config.nms.where, config.batch.max) == ("ncnn", "runtime", 1)
    assert config.needs is not None
    assert (config.needs.task, config.needs.least_hw) == ("Detector", (320, 320))
