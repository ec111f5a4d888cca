"""The JSON files of a bundle as typed structs: read leniently, written strictly, unknown keys kept.

`deploy.json`, `pipeline.json` and `detail.json` are MMDeploy 1.x's; `sdk_bundle/README.md` is the normative description of what is read and written.
`manifest.json`, which is ours alone, stands in `manifest.py`.

Every struct has an `extra` dict with the keys that the schema does not know, so that reading and writing a foreign bundle loses nothing.
Optional fields that are None are left out when writing: MMDeploy's SDK crashes on most nulls.
"""

from __future__ import annotations

import math
import re
import typing
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, cast

import msgspec

from modelcrate_bundle.errors import BundleFormatError

JsonObject: TypeAlias = dict[str, Any]
Size: TypeAlias = int | tuple[int, int]
"""One number for a square, or a pair whose order each user of it states."""


class Record(msgspec.Struct, kw_only=True):
    """A JSON object with known fields; the rest is in `extra`."""

    extra: JsonObject = msgspec.field(default_factory=dict)


R = TypeVar("R", bound=Record)


# ---------------------------------------------------------------------------------------------------------------- transforms


def _number(value: object, *, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BundleFormatError(f"{key}: expected a number, found {_shown(value)}")
    return float(value)


def _fill_value(value: Any) -> float:
    """The first channel of a number, an array or {"img": either}."""
    if isinstance(value, dict):
        value = value.get("img", 0)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else 0
    return _number(value, key="pad_val")


class Transform(Record, kw_only=True):
    """One entry of the preprocessing list; `type` is its JSON tag. Numerics: `modelcrate_runtime.preprocess`."""

    type: ClassVar[str] = ""
    written: ClassVar[frozenset[str]] = frozenset()
    """Optional fields that are written even at their default, since readers disagree on it."""


class LoadImageFromFile(Transform, kw_only=True):
    """Bring the caller's pixels to `channel_order` (BGR or RGB) or to grey."""

    type: ClassVar[str] = "LoadImageFromFile"
    color_type: str = "color"
    channel_order: str = "bgr"
    to_float32: bool = False


class Resize(Transform, kw_only=True):
    """`size` is (width, height), or (short edge, -1); `keep_ratio` fits inside it."""

    type: ClassVar[str] = "Resize"
    written: ClassVar[frozenset[str]] = frozenset({"keep_ratio"})
    size: Size
    keep_ratio: bool = False
    interpolation: str = "bilinear"


class LetterResize(Transform, kw_only=True):
    """MMYOLO's letterbox. `scale` is (height, width): the opposite order of `Resize.size`."""

    type: ClassVar[str] = "LetterResize"
    scale: Size
    pad_val: float | int | dict[str, Any] = 0
    use_mini_pad: bool = False
    stretch_only: bool = False
    allow_scale_up: bool = True

    @property
    def fill(self) -> float:
        """The value in the padding, in image levels."""
        return _fill_value(self.pad_val)


class Pad(Transform, kw_only=True):
    """Pad right and bottom to `size` (width, height), a multiple of `size_divisor` or a square; `logical_or_val` pads around."""

    type: ClassVar[str] = "Pad"
    size: Size | None = None
    size_divisor: int | None = None
    pad_to_square: bool = False
    logical_or_val: int = 0
    add_pix_val: int = 0
    orientation_agnostic: bool = False
    pad_val: float | int | list[float | int] | dict[str, Any] = 0
    padding_mode: str = "constant"

    @property
    def fill(self) -> float:
        """The value in the padding, in image levels: of all that may be given, the SDK uses the first channel's alone."""
        return _fill_value(self.pad_val)


class Normalize(Transform, kw_only=True):
    """(pixel - mean) / std, per output channel, in image levels; `to_rgb` swaps the channels before."""

    type: ClassVar[str] = "Normalize"
    written: ClassVar[frozenset[str]] = frozenset({"to_rgb"})
    mean: list[float]
    std: list[float]
    to_rgb: bool = True
    to_float: bool = True


class CenterCrop(Transform, kw_only=True):
    """`crop_size` is (height, width)."""

    type: ClassVar[str] = "CenterCrop"
    crop_size: Size


class ImageToTensor(Transform, kw_only=True):
    """HWC to CHW."""

    type: ClassVar[str] = "ImageToTensor"
    written: ClassVar[frozenset[str]] = frozenset({"keys"})
    keys: list[str] = msgspec.field(default_factory=lambda: ["img"])


class DefaultFormatBundle(Transform, kw_only=True):
    """Cast to float32, HWC to CHW."""

    type: ClassVar[str] = "DefaultFormatBundle"
    img_to_float: bool = True


class Collect(Transform, kw_only=True):
    """What goes on to the network (`keys`) and to the postprocessing (`meta_keys`)."""

    type: ClassVar[str] = "Collect"
    written: ClassVar[frozenset[str]] = frozenset({"keys", "meta_keys"})
    keys: list[str] = msgspec.field(default_factory=lambda: ["img"])
    meta_keys: list[str] = msgspec.field(default_factory=list)


class TopDownGetBboxCenterScale(Transform, kw_only=True):
    """A box becomes centre and scale: `padding` grows it, `image_size` (width, height) gives the aspect ratio."""

    type: ClassVar[str] = "TopDownGetBboxCenterScale"
    written: ClassVar[frozenset[str]] = frozenset({"padding"})
    image_size: tuple[int, int]
    padding: float = 1.25


class TopDownAffine(Transform, kw_only=True):
    """Crop centre and scale to `image_size` (width, height). `use_udp` is honoured in exact geometry; MMDeploy's SDK ignores it."""

    type: ClassVar[str] = "TopDownAffine"
    image_size: tuple[int, int]
    use_udp: bool | None = None


class UnknownTransform(Transform, kw_only=True):
    """A transform that this library has no code for; kept so that it can be named and written back."""

    type: ClassVar[str] = ""
    name: str


TRANSFORMS: dict[str, type[Transform]] = {
    cls.type: cls
    for cls in (
        LoadImageFromFile, Resize, LetterResize, Pad, Normalize, CenterCrop, ImageToTensor, DefaultFormatBundle, Collect, TopDownGetBboxCenterScale, TopDownAffine,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ postprocessing


class Params(Record, kw_only=True):
    """Parameters of a postprocessing component."""


class ResizeBBoxParams(Params, kw_only=True):
    """Detections that the network has already suppressed. `conf_thr` wins over `score_thr` where both stand."""

    score_thr: float = 0.0
    conf_thr: float | None = None
    min_bbox_size: float = 0.0
    nms: JsonObject | None = None
    nms_pre: int | None = None
    max_per_img: int | None = None


class AnchorGenerator(Record, kw_only=True):
    """Where the cells of a level lie: (offset + index) * stride, in network-input pixels."""

    offset: float = 0.0
    strides: list[int] = msgspec.field(default_factory=lambda: [8, 16, 32])


class RawHeadParams(Params, kw_only=True):
    """Detections that the host decodes and suppresses; `max_per_img` is read by us and ignored by MMDeploy's SDK."""

    score_thr: float = 0.02
    min_bbox_size: float = 0.0
    nms: JsonObject = msgspec.field(default_factory=dict)
    anchor_generator: AnchorGenerator = msgspec.field(default_factory=AnchorGenerator)
    nms_pre: int | None = None
    max_per_img: int | None = None

    @property
    def iou_threshold(self) -> float:
        """IoU above which the box with the lower score goes; the SDK's default is 0.45."""
        return _number(self.nms.get("iou_threshold", 0.45), key="nms.iou_threshold")


class SimCCLabelDecodeParams(Params, kw_only=True):
    """SimCC heads. `input_size` is (width, height) of the network input in pixels."""

    flip_test: bool = False
    codec: str = msgspec.field(default="SimCCLabel", name="type")
    input_size: tuple[int, int] = (192, 256)
    sigma: list[float] | float | None = None
    simcc_split_ratio: float = 2.0
    normalize: bool = False
    use_dark: bool = False
    export_postprocess: bool = False


class DeepposeRegressionParams(Params, kw_only=True):
    """Regression heads: coordinates as fractions of the network input."""


class HeatmapDecodeParams(Params, kw_only=True):
    """Heatmap heads. `blur_kernel_size`, `unbiased` and what follows them are the codec's: exact geometry reads them, the SDK does not.

    `post_process` is default, unbiased, megvii or null; `use_udp` puts the outer cells on the edges of the crop; sizes are (width, height).
    """

    post_process: str = "default"
    modulate_kernel: int = 11
    use_udp: bool = False
    target_type: str = "GaussianHeatmap"
    flip_test: bool = False
    blur_kernel_size: int | None = None
    unbiased: bool = False
    codec: str | None = msgspec.field(default=None, name="type")
    input_size: tuple[int, int] | None = None
    heatmap_size: tuple[int, int] | None = None
    sigma: list[float] | float | None = None


class LinearClsHeadParams(Params, kw_only=True):
    """Classifiers: the `topk` best of the scores, which go through a softmax first if `softmax` says so."""

    topk: int = 1
    softmax: bool = False


class UnknownParams(Params, kw_only=True):
    """Parameters of a component that this library has no code for."""


COMPONENTS: dict[str, type[Params]] = {
    "ResizeBBox": ResizeBBoxParams,
    "RTMDetSepBNHead": RawHeadParams,
    "BaseDenseHead": RawHeadParams,
    "SimCCLabelDecode": SimCCLabelDecodeParams,
    "DeepposeRegressionHeadDecode": DeepposeRegressionParams,
    "TopdownHeatmapBaseHeadDecode": HeatmapDecodeParams,
    "TopdownHeatmapSimpleHeadDecode": HeatmapDecodeParams,
    "TopdownHeatmapMultiStageHeadDecode": HeatmapDecodeParams,
    "TopdownHeatmapMSMUHeadDecode": HeatmapDecodeParams,
    "ViPNASHeatmapSimpleHeadDecode": HeatmapDecodeParams,
    "LinearClsHead": LinearClsHeadParams,
    "ConformerHead": LinearClsHeadParams,
}


# ------------------------------------------------------------------------------------------------------------------- pipeline


class TransformTask(Record, kw_only=True):
    """The preprocessing step."""

    name: str = "Preprocess"
    input: list[str]
    output: list[str]
    transforms: list[Transform]


class NetTask(Record, kw_only=True):
    """The network. `input_map`: preprocessing field -> network input; `output_map`: name that postprocessing sees -> network output."""

    name: str
    is_batched: bool = False
    input: list[str]
    output: list[str]
    input_map: dict[str, str] = msgspec.field(default_factory=dict)
    output_map: dict[str, str] = msgspec.field(default_factory=dict)


class PostprocessTask(Record, kw_only=True):
    """The decoding step of a codebase: `module` is mmdet, mmpose or mmcls."""

    module: str
    name: str = "postprocess"
    component: str
    params: Params
    output: list[str]
    input: list[str]


class Pipeline(Record, kw_only=True):
    """Preprocess, network, postprocess: the only shape that MMDeploy's exporter writes for these tasks."""

    input: list[str]
    output: list[str]
    preprocess: TransformTask
    net: NetTask
    postprocess: PostprocessTask

    def transform(self, kind: type[R]) -> R | None:
        """The first transform of a type, or None."""
        return next((t for t in self.preprocess.transforms if isinstance(t, kind)), None)


class DeployModel(Record, kw_only=True):
    """One network of deploy.json. All seven keys must be there for MMDeploy's SDK; we read with defaults."""

    name: str
    net: str
    weights: str = ""
    backend: str
    precision: str = "FP32"
    batch_size: int = 1
    dynamic_shape: bool = False


class DeployInfo(Record, kw_only=True):
    """deploy.json."""

    version: str
    task: str | None = None
    models: list[DeployModel]
    customs: list[Any] = msgspec.field(default_factory=list)


class DetailInfo(Record, kw_only=True):
    """detail.json: provenance that no runtime reads."""

    version: str = ""
    codebase: JsonObject = msgspec.field(default_factory=dict)
    codebase_config: JsonObject = msgspec.field(default_factory=dict)
    onnx_config: JsonObject = msgspec.field(default_factory=dict)
    backend_config: JsonObject = msgspec.field(default_factory=dict)
    calib_config: JsonObject = msgspec.field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------------- reading


def decode_json(data: bytes, *, where: str) -> JsonObject:
    """Parse a JSON file whose top level must be an object.

    Raises:
        BundleFormatError: not JSON, nested too deeply, or another type on top; `where` names the file.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleFormatError(f"{where}: expected JSON, found something else: {error}", hint="export the bundle again") from error
    return _object(raw, where=where, at="$")


def read_record(cls: type[R], raw: object, *, where: str, at: str = "$") -> R:
    """Convert one JSON object to its struct; unknown keys go to `extra`, "true" and "false" are booleans too.

    Raises:
        BundleFormatError: a key is missing or has the wrong type; the message has the file, the JSON path, expected and found.
    """
    rest = dict(_object(raw, where=where, at=at))
    values: JsonObject = {}
    for field in msgspec.structs.fields(cls):
        if field.name == "extra":
            continue
        if field.encode_name in rest:
            values[field.name] = _read_value(field.type, rest.pop(field.encode_name), where=where, at=f"{at}.{field.encode_name}")
        elif field.required:
            raise BundleFormatError(f"{where}: {at}: expected the key {field.encode_name!r}, found none")
    return cls(**values, extra=rest)


def _read_value(kind: Any, value: Any, *, where: str, at: str) -> Any:
    """A field's value; structs inside it, in lists and in objects too, are read by `read_record`, so that they keep their unknown keys."""
    if isinstance(value, Record) or (isinstance(value, list) and value and isinstance(value[0], Record)):
        return value  # a part that the caller has read already
    arguments = typing.get_args(kind)
    record = next((t for t in (kind, *arguments) if isinstance(t, type) and issubclass(t, Record)), None)
    if record is None or value is None:
        try:
            return msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError as error:
            raise _format_error(str(error), where=where, at=at) from error
    if typing.get_origin(kind) is list:
        return [read_record(record, item, where=where, at=f"{at}[{i}]") for i, item in enumerate(_list(value, where=where, at=at))]
    if typing.get_origin(kind) is dict:
        return {key: read_record(record, item, where=where, at=f"{at}.{key}") for key, item in _object(value, where=where, at=at).items()}
    return read_record(record, value, where=where, at=at)


def read_deploy(raw: JsonObject, *, where: str = "deploy.json") -> DeployInfo:
    """deploy.json as MMDeploy 0.x to 1.3 and we write it."""
    models = [
        # MMDeploy's SDK wants a string here; files in the wild have null too.
        model | {"weights": ""} if isinstance(model, dict) and model.get("weights", "") is None else model
        for model in _list(raw.get("models"), where=where, at="$.models")
    ]
    if not models:
        raise BundleFormatError(f"{where}: $.models: expected at least one network, found none")
    return read_record(DeployInfo, raw | {"models": models}, where=where)


def read_pipeline(raw: JsonObject, *, where: str = "pipeline.json") -> Pipeline:
    """pipeline.json, wrapped in {"pipeline": ...} or flattened with "type": "Pipeline".

    Raises:
        BundleFormatError: see `read_record`; or the tasks are not one Transform, one Net and one postprocessing step.
    """
    outer: JsonObject = {}
    at = "$"
    if "pipeline" in raw:
        at = "$.pipeline"
        outer = {key: value for key, value in raw.items() if key != "pipeline"}
        raw = _object(raw["pipeline"], where=where, at=at)
    rest = {key: value for key, value in raw.items() if key not in {"tasks", "type", "input", "output"}}
    found: dict[str, Record] = {}
    modules: list[str] = []
    for i, entry in enumerate(_list(raw.get("tasks"), where=where, at=f"{at}.tasks")):
        place = f"{at}.tasks[{i}]"
        task = _object(entry, where=where, at=place)
        if task.get("type") != "Task":
            raise BundleFormatError(f"{where}: {place}.type: expected 'Task', found {_shown(task.get('type'))}")
        module = task.get("module")
        modules.append(str(module))
        role = {"Transform": "preprocess", "Net": "net"}.get(str(module), "postprocess")
        if role in found:
            break
        found[role] = _read_task(task, where=where, at=place)
    if len(modules) != 3 or len(found) != 3:
        raise BundleFormatError(
            f"{where}: {at}.tasks: expected one Transform, one Net and one postprocessing task, found {modules}",
            hint="this library runs the pipelines that MMDeploy's exporter writes, not hand-written graphs",
        )
    return Pipeline(
        input=_names(raw.get("input"), where=where, at=f"{at}.input"),
        output=_names(raw.get("output"), where=where, at=f"{at}.output"),
        preprocess=cast("TransformTask", found["preprocess"]),
        net=cast("NetTask", found["net"]),
        postprocess=cast("PostprocessTask", found["postprocess"]),
        extra={"outer": outer, "inner": rest} if outer or rest else {},
    )


def _read_task(task: JsonObject, *, where: str, at: str) -> Record:
    fields = {key: value for key, value in task.items() if key not in {"type", "module"}}
    fields["input"] = _names(task.get("input"), where=where, at=f"{at}.input")
    fields["output"] = _names(task.get("output"), where=where, at=f"{at}.output")
    if task.get("module") == "Transform":
        entries = _list(task.get("transforms"), where=where, at=f"{at}.transforms")
        fields["transforms"] = [_read_transform(entry, where=where, at=f"{at}.transforms[{i}]") for i, entry in enumerate(entries)]
        return read_record(TransformTask, fields, where=where, at=at)
    if task.get("module") == "Net":
        return read_record(NetTask, fields, where=where, at=at)
    component = task.get("component")
    fields["params"] = read_record(COMPONENTS.get(str(component), UnknownParams), task.get("params", {}), where=where, at=f"{at}.params")
    fields["module"] = task.get("module")
    return read_record(PostprocessTask, fields, where=where, at=at)


def _read_transform(entry: object, *, where: str, at: str) -> Transform:
    fields = dict(_object(entry, where=where, at=at))
    name = fields.pop("type", None)
    if not isinstance(name, str):
        raise BundleFormatError(f"{where}: {at}.type: expected the name of a transform, found {_shown(name)}")
    cls = TRANSFORMS.get(name)
    if cls is None:
        return UnknownTransform(name=name, extra=fields)
    return read_record(cls, fields, where=where, at=at)


def _object(raw: object, *, where: str, at: str) -> JsonObject:
    if not isinstance(raw, dict):
        raise BundleFormatError(f"{where}: {at}: expected an object, found {_shown(raw)}")
    return raw


def _list(raw: object, *, where: str, at: str) -> list[Any]:
    if not isinstance(raw, list):
        raise BundleFormatError(f"{where}: {at}: expected an array, found {_shown(raw)}")
    return raw


def _names(raw: object, *, where: str, at: str) -> list[str]:
    names = [raw] if isinstance(raw, str) else raw
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BundleFormatError(f"{where}: {at}: expected a name or an array of names, found {_shown(raw)}")
    return names


def _shown(value: object) -> str:
    """A value as a message shows it: short, and "nothing" for a missing key."""
    if value is None:
        return "nothing"
    try:
        text = repr(value)
    except RecursionError:
        return "an object" if isinstance(value, dict) else "an array"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _format_error(message: str, *, where: str, at: str) -> BundleFormatError:
    """Msgspec's message, with the path made absolute and the words turned to ours."""
    body, _, path = message.partition(" - at `$")
    wrong_type = re.fullmatch(r"Expected `(.+)`, got `(.+)`", body)
    missing = re.fullmatch(r"Object missing required field `(.+)`", body)
    if wrong_type:
        body = f"expected {wrong_type[1]}, found {wrong_type[2]}"
    elif missing:
        body = f"expected the key {missing[1]!r}, found none"
    return BundleFormatError(f"{where}: {at}{path.rstrip('`')}: {body}")


# -------------------------------------------------------------------------------------------------------------------- writing


def encode_json(raw: JsonObject) -> bytes:
    """JSON as MMDeploy indents it, keys in the given order, a newline at the end: the same object gives the same bytes.

    Raises:
        BundleFormatError: a number that JSON cannot say (NaN, infinity).
    """
    _check_finite(raw, at="$")
    return msgspec.json.format(msgspec.json.encode(raw), indent=4) + b"\n"


def _check_finite(value: Any, *, at: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleFormatError(f"{at}: expected a finite number, found {value}: nothing was written")
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(item, at=f"{at}.{key}" if isinstance(value, dict) else f"{at}[{key}]")


def write_record(record: Record) -> JsonObject:
    """A struct as plain data: fields in their order, None left out, then the unknown keys that were read."""
    raw: JsonObject = {}
    for field in msgspec.structs.fields(type(record)):
        value = getattr(record, field.name)
        if field.name != "extra" and value is not None:
            raw[field.encode_name] = _plain(value)
    return raw | record.extra


def write_deploy(info: DeployInfo) -> JsonObject:
    """deploy.json, with all the keys that MMDeploy's SDK insists on."""
    return write_record(info)


def write_pipeline(pipeline: Pipeline) -> JsonObject:
    """pipeline.json in the wrapped form, keys in MMDeploy's order."""
    preprocess, net, postprocess = pipeline.preprocess, pipeline.net, pipeline.postprocess
    steps: list[JsonObject] = [
        {"type": "Task", "module": "Transform"} | write_record(preprocess) | {"transforms": [_write_transform(t) for t in preprocess.transforms]},
        {"name": net.name, "type": "Task", "module": "Net"} | write_record(net),
        {"type": "Task"} | write_record(postprocess),
    ]
    inner = {"input": pipeline.input, "output": pipeline.output, "tasks": steps} | pipeline.extra.get("inner", {})
    outer: JsonObject = pipeline.extra.get("outer", {})
    return {"pipeline": inner} | outer


def _write_transform(transform: Transform) -> JsonObject:
    if isinstance(transform, UnknownTransform):
        return {"type": transform.name} | transform.extra
    at_default = {
        f.encode_name
        for f in msgspec.structs.fields(type(transform))
        if not f.required and f.name not in transform.written and getattr(transform, f.name) == f.default
    }
    return {"type": transform.type} | {key: value for key, value in write_record(transform).items() if key not in at_default}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return write_record(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


Task: TypeAlias = Literal["Detector", "PoseDetector", "Classifier"]
"""MMDeploy's names of the tasks, as deploy.json writes them."""
