"""Anybody's network and a spec of it: an `nn.Module`, a TorchScript file, a `torch.export` program or an ONNX file becomes an `ExportableModel`.

The spec is a TOML file: task, input, the way from an image to it, names. Of an `.onnx`, shapes and names come from the file itself. An ONNX file is
data; a module, TorchScript and `.pt2` are programs, which run because the user names them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from modelcrate_bundle.bundle import sha256_of
from modelcrate_bundle.errors import CheckpointError, ConfigError, ExportError
from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_bundle.tensors import Dim, TensorSpec
from modelcrate_converter import defaults
from modelcrate_converter.checkpoint import PREFIXES, read_checkpoint
from modelcrate_converter.exportable import (
    BoxesFacts,
    ClassifierFacts,
    ExportableModel,
    HeatmapFacts,
    ImageFit,
    Normalization,
    OnnxNetwork,
    PoseFacts,
    RawFacts,
    RegressionFacts,
    load_weights,
)
from modelcrate_converter.model_spec import (
    ClassifierSpec,
    CropSpec,
    DetectorSpec,
    InputSpec,
    KeypointSpec,
    PoseDetectorSpec,
    ResizeSpec,
    Spec,
    read_spec,
)  # fmt: skip
from modelcrate_runtime.resampling import KERNELS
from modelcrate_runtime.skeletons import DATA_SETS, keypoint_info, published_keypoints

FileKind = Literal["checkpoint", "onnx", "torchscript", "exported program"]
_COLORS: Final = 3
_DTYPES: Final = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What numpy, ONNX and ONNX Runtime all have."""


def file_kind(path: Path) -> FileKind:
    """What a file is, by what is in it: TorchScript and exported programs are zip files like checkpoints. A file that cannot be read is a checkpoint."""
    if path.suffix.lower() == ".onnx":
        return "onnx"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "checkpoint"
    if any(name.endswith(("/models/model.json", "serialized_exported_program.json")) for name in names):
        return "exported program"
    return "torchscript" if any(name.partition("/")[2].startswith("code/") for name in names) else "checkpoint"


def read_own_model(spec_path: Path, *, path: Path | None, builder: str | None, name: str | None = None, sha256: str | None = None) -> ExportableModel:
    """Collect what a bundle must say of a model that is none of ours.

    Args:
        spec_path: the TOML file.
        path: an ONNX, TorchScript or exported program file; with `builder` a checkpoint of its weights, or None where it brings them along.
        builder: "package.module:attribute", a module, its class or a function that makes one; looked for in the current folder too.
        name: what to call the model; None takes the spec's, or the file's.
        sha256: what the file's hash must begin with.

    Raises:
        ConfigError: the spec does not fit the network.
        ArchitectureError: the weights do not.
        CheckpointError: a file that is not there or not what it seems.
        ExportError: the network fails on an input of the stated size.
    """
    spec = read_spec(spec_path)
    if path is not None and not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}", hint="check the path")
    digest = sha256_of(path) if path is not None else ""
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise CheckpointError(f"{path}: expected SHA-256 {sha256}, found {digest}", hint="it is another file, or a damaged one")
    kind = file_kind(path) if path is not None else "checkpoint"
    if builder is None and kind == "checkpoint":
        raise ConfigError(
            f"{path}: expected an ONNX, TorchScript or torch.export file beside --spec, found a checkpoint",
            hint="--model package.module:function makes its network",
        )
    if builder is not None:
        module, origin = _built(builder, spec.args, path), builder
    elif kind == "onnx":
        assert path is not None
        return _from_onnx(spec, path, digest, where=spec_path, name=name)
    else:
        assert path is not None
        module, origin = _loaded(path, kind), path.name
    flat = _Flat(module)
    size_hw = _size_of(spec, spec_path)
    channels = 1 if spec.input.color == "gray" else _COLORS
    batch: Dim = "batch" if spec.input.batch == "dynamic" else spec.input.batch
    given = TensorSpec(name=spec.input.name, dtype="float32", shape=(batch, channels, *size_hw))
    outputs = _tried(flat, given, names=spec.outputs, where=spec_path)
    return _exportable(
        spec, where=spec_path, module=flat, given=given, outputs=outputs, name=name or spec.name or _plain_name(_name_of(builder) if builder else origin),
        reference="PyTorch", checkpoint=(path.name if path is not None else builder or "", digest or _weights_hash(module)), is_code=builder is not None, origin=origin,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- the network


class _Flat(nn.Module):
    """A network in eval mode for good, whose answer (a tensor, a sequence or a mapping of them) becomes a tuple.

    Attributes:
        names: keys of the last answer, where it was a mapping; else none.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False  # exporters put back the mode that they find
        self.names: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> _Flat:  # noqa: FBT001, FBT002, ARG002  # torch's signature
        """Stay in eval mode: exporters set the mode, and an exported program refuses even to be told."""
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, C, H, W) -> the outputs."""
        answer = self.network(x)
        if isinstance(answer, Mapping):
            self.names = tuple(str(key) for key in answer)
            answer = tuple(answer.values())
        return tuple(_tensors(answer))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    raise ExportError(
        f"expected the network to answer tensors, found {type(value).__name__}", hint="give a module that answers a tensor, a tuple or a mapping of tensors"
    )


def _built(builder: str, args: Mapping[str, Any], weights: Path | None) -> nn.Module:
    """What `package.module:attribute` makes, with the weights of a checkpoint."""
    module_name, _, attribute = builder.partition(":")
    if not (module_name and attribute):
        raise ConfigError(f"--model: expected package.module:function, found {builder!r}", hint="--model my_package.my_module:build")
    here = str(Path.cwd())  # somebody's code may go elsewhere
    sys.path.insert(0, here)
    try:
        made: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            made = getattr(made, part)
        if not isinstance(made, nn.Module):
            made = made(**args)
    except (Exception, SystemExit) as error:  # somebody's code raises whatever it likes, and a script ends the process
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--model {builder}: expected it to make a network, found {type(error).__name__}: {text}",
            hint="it is imported from the current folder or from what is installed, and called with the spec's args",
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--model {builder}: expected a torch.nn.Module, found {type(made).__name__}")
    if weights is not None:
        checkpoint = read_checkpoint(weights)
        state, expected = checkpoint.state_dict, made.state_dict().keys()
        # What `read_checkpoint` took for a wrapper's may be the network's own.
        own = ("", *PREFIXES, *(first + second for first in PREFIXES for second in PREFIXES))
        prefix = next((prefix for prefix in own if not {prefix + key for key in state}.isdisjoint(expected)), "")
        state = {prefix + key: value for key, value in state.items()}
        load_weights(made, state, path=weights)
    return made.float().cpu().eval()


def _loaded(path: Path, kind: FileKind) -> nn.Module:
    """A TorchScript or `torch.export` file on the CPU."""
    try:
        if kind == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have .pt2
                script: nn.Module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            return script
        return torch.export.load(str(path)).module()
    except Exception as error:  # a C++ library behind a binding, and a deserializer
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: expected a {kind} that torch {torch.__version__} loads, found: {text}", hint="save it again with this torch") from error


def _weights_hash(module: nn.Module) -> str:
    """SHA-256 of all weights, for a network that comes without a file."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _tried(module: nn.Module, given: TensorSpec, *, names: Sequence[str], where: Path) -> tuple[TensorSpec, ...]:
    """Run the network on noise, twice with other batches where it takes any, and say what its outputs are."""
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None
    generator = np.random.default_rng(0)
    found: list[list[torch.Tensor]] = []
    for batch in (2, 3) if fixed is None else (fixed, fixed):
        shape = (batch, *(dim for dim in given.shape[1:] if isinstance(dim, int)))
        try:
            with torch.inference_mode():
                found.append(list(module(torch.from_numpy(generator.normal(size=shape).astype(np.float32)))))
        except ExportError:
            raise
        except Exception as error:  # somebody's code raises whatever it likes
            text = " ".join(str(error).split())[-300:]
            hint = "batch = 1 under [input] is for networks that take one input at a time" if fixed is None else "check size_hw and color under [input]"
            raise ExportError(
                f"{where}: expected the network to take an input of shape {list(shape)}, found {type(error).__name__}: {text}", hint=hint
            ) from error
    first, second = found
    own = getattr(module, "names", ())
    chosen = tuple(names) or (own if len(own) == len(first) else tuple(f"output_{i}" for i in range(len(first))) if len(first) > 1 else ("output",))
    if len(chosen) != len(first):
        raise ConfigError(f"{where}: outputs: expected a name for each of {len(first)} outputs, found {len(chosen)}")
    if len({*chosen, given.name}) != len(chosen) + 1:
        raise ConfigError(f"{where}: outputs: expected names that differ from each other and from the input's, found {', '.join(chosen)}")
    specs = []
    for name, a, b in zip(chosen, first, second, strict=True):
        is_batched = a.ndim > 0 and (a.shape[0], b.shape[0]) == ((2, 3) if fixed is None else (fixed, fixed))
        if not is_batched or a.ndim != b.ndim:
            raise ExportError(
                f"{where}: output {name}: expected the batch as the first axis, found shape {list(a.shape)} for a batch of {fixed or 2}",
                hint="batch = 1 under [input] is for networks that take one input at a time",
            )
        if str(a.dtype).removeprefix("torch.") not in _DTYPES:
            raise ExportError(f"{where}: output {name}: expected one of {', '.join(_DTYPES)}, found {a.dtype}", hint="end the network with .float()")
        sides: list[Dim] = [m if m == n else f"{name}_{i}" for i, (m, n) in enumerate(zip(a.shape[1:], b.shape[1:], strict=True), start=1)]
        specs.append(TensorSpec(name=name, dtype=str(a.dtype).removeprefix("torch."), shape=(given.shape[0], *sides)))
    return tuple(specs)


def _from_onnx(spec: Spec, path: Path, digest: str, *, where: Path, name: str | None) -> ExportableModel:
    """An ONNX file: names and shapes are its own, as far as it says them."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors, and the file system's
        raise CheckpointError(f"{path}: expected an ONNX file, found: {' '.join(str(error).split())[:200]}", hint="is the file whole?") from error
    weights = {tensor.name for tensor in graph.initializer}
    beside = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ConfigError(
            f"{path}: expected one input, found {', '.join(value.name for value in inputs) or 'none'}", hint="a bundle's network takes one image tensor"
        )
    kind = inputs[0].type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]  # some tools write -1 for any
    if kind.elem_type != onnx.TensorProto.FLOAT or len(dims) != 4:
        found = {number: word.lower() for word, number in onnx.TensorProto.DataType.items()}.get(kind.elem_type, f"type {kind.elem_type}")
        raise ConfigError(
            f"{path}: input {inputs[0].name}: expected float32 of shape (N, C, H, W), found {found} with {len(dims)} axes", hint="bundles have float32 inputs"
        )
    channels = 1 if spec.input.color == "gray" else _COLORS
    if dims[1] not in {None, channels}:
        raise ConfigError(f"{where}: color: expected one for {dims[1]} channels, found {spec.input.color!r}", hint='rgb and bgr have 3 channels, "gray" has 1')
    stated = spec.input.size_hw or (dims[2] and dims[3] and (dims[2], dims[3]))
    if not stated:
        raise ConfigError(f"{where}: size_hw: expected (height, width), since {path.name} takes any, found none", hint="size_hw = [224, 224] under [input]")
    if any(own not in {None, size} for own, size in zip(dims[2:], stated, strict=True)):
        raise ConfigError(f"{where}: size_hw: {path.name} takes {dims[2:]}, found {list(stated)}: expected them to agree")
    batch: Dim = dims[0] or ("batch" if spec.input.batch == "dynamic" else spec.input.batch)
    known = [value.name for value in graph.output]
    unknown = [output for output in spec.outputs if output not in known]
    if unknown:
        raise ConfigError(f"{where}: outputs: expected some of {', '.join(known)}, found {', '.join(unknown)}")
    module = OnnxNetwork(path, outputs=spec.outputs or tuple(known))
    given = TensorSpec(name=inputs[0].name, dtype="float32", shape=(batch, channels, *stated))
    return _exportable(
        spec, where=where, module=module, given=given, outputs=_tried(module, given, names=module.outputs, where=path), name=name or spec.name or _plain_name(path.name),
        reference=path.name, checkpoint=(path.name, digest), is_code=False, origin=path.name,
        more_facts={f"weights in {name}": f"SHA-256 {sha256_of(path.parent / name)}" for name in sorted(beside)},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- the spec


def _exportable(
    spec: Spec, *, where: Path, module: nn.Module, given: TensorSpec, outputs: tuple[TensorSpec, ...], name: str, reference: str, checkpoint: tuple[str, str],
    is_code: bool, origin: str, more_facts: Mapping[str, str] = MappingProxyType({}),
) -> ExportableModel:  # fmt: skip
    """Everything together, checked against each other."""
    classes: list[str] = []
    keypoints: KeypointInfo | None = None
    facts: ClassifierFacts | BoxesFacts | PoseFacts | HeatmapFacts | RegressionFacts | RawFacts
    size_hw = (int(given.shape[2]), int(given.shape[3]))
    if isinstance(spec, ClassifierSpec):
        (scores,) = _expected(outputs, {"scores": 2}, where=where)
        classes = _classes(spec, count=scores.shape[1], where=where)
        facts = ClassifierFacts(fit=_fit(spec.resize, size_hw, where=where), topk=min(spec.topk, len(classes)), softmax=spec.softmax)
    elif isinstance(spec, DetectorSpec):
        _expected(outputs, {"dets": 3, "labels": 2}, where=where, named=True)
        # How many boxes there are only the image says, and noise may have as many each time, or none.
        outputs = tuple(msgspec.structs.replace(output, shape=(output.shape[0], "boxes", *output.shape[2:])) for output in outputs)
        classes = _classes(spec, count=None, where=where)
        facts = BoxesFacts(fit=_fit(spec.resize, size_hw, where=where), score_thr=spec.score_thr)
    elif isinstance(spec, PoseDetectorSpec):
        facts, count = _pose(spec, outputs, size_hw=size_hw, where=where)
        keypoints = _keypoints(spec.keypoints, count=count, where=where)
    else:
        if (spec.resize is None) == (spec.crop is None):
            raise ConfigError(
                f"{where}: expected one of the tables resize and crop, found {'none' if spec.crop is None else 'both'}",
                hint="[resize] takes whole images, [crop] takes boxes",
            )
        crop = spec.crop or CropSpec()
        facts = RawFacts(fit=_fit(spec.resize, size_hw, where=where) if spec.resize else None, padding=crop.padding, use_udp=crop.udp)
    names = {"Classifier": "imageclassifier", "Detector": "detector", "PoseDetector": "topdownposeestimator", "Network": "network"}
    task: Any = type(spec).__struct_config__.tag
    return ExportableModel(
        name=name, task=task, sdk_name=names[task], module=module, reference=reference, input=given, outputs=outputs,
        normalization=_normalization(spec.input, where=where), postprocess=facts, class_names=classes, keypoints=keypoints,
        facts={"everything that the network does not say": f"the spec {where.name}", "network": origin, **more_facts}, checkpoint=checkpoint, is_code=is_code,
    )  # fmt: skip


def _size_of(spec: Spec, where: Path) -> tuple[int, int]:
    if spec.input.size_hw is None:
        raise ConfigError(f"{where}: size_hw: expected (height, width) of the network's input, found none", hint="size_hw = [224, 224] under [input]")
    return spec.input.size_hw


def _normalization(given: InputSpec, *, where: Path) -> Normalization:
    channels = 1 if given.color == "gray" else _COLORS
    mean, std = given.mean or (0.0,) * channels, given.std or (1.0,) * channels
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(math.isfinite(v) for v in values):
            raise ConfigError(f"{where}: {key}: expected {channels} numbers for {given.color}, found {list(values)}")
    if min(std) <= 0:
        raise ConfigError(f"{where}: std: expected positive numbers, found {list(std)}")
    if given.levels == 255 and max(std) < 1:
        raise ConfigError(
            f"{where}: std: expected image levels from 0 to 255, found {list(std)}", hint="levels = 1 says that mean and std are of pixels from 0 to 1"
        )
    scale = 255 / given.levels
    return Normalization(mean=tuple(round(v * scale, 6) for v in mean), std=tuple(round(v * scale, 6) for v in std), to_rgb=given.color == "rgb")


def _fit(resize: ResizeSpec, size_hw: tuple[int, int], *, where: Path) -> ImageFit:
    edge = resize.edge or 0
    if (resize.mode == "shorter-edge") != bool(edge):
        raise ConfigError(
            f'{where}: edge: expected with mode = "shorter-edge", and only there, found {resize.edge}', hint='edge = 256 beside mode = "shorter-edge"'
        )
    if edge and edge < max(size_hw):
        raise ConfigError(f"{where}: edge: expected at least {max(size_hw)}, the input's longer side, found {edge}")
    if resize.mode == "letterbox-center" and resize.interpolation != "bilinear":
        raise ConfigError(f"{where}: interpolation: expected bilinear for letterbox-center, found {resize.interpolation}")
    return ImageFit(
        mode=resize.mode,
        edge=edge,
        pad_value=resize.pad_value,
        interpolation=KERNELS.get(resize.interpolation, resize.interpolation),
        resampling=resize.interpolation if resize.interpolation in KERNELS else None,
    )


def _expected(outputs: tuple[TensorSpec, ...], wanted: Mapping[str, int], *, where: Path, named: bool = False) -> tuple[TensorSpec, ...]:
    """The outputs, if they are as many as the task has, of so many axes each, and named so where the runtimes go by names."""
    found = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in outputs)
    fits = len(outputs) == len(wanted) and all(len(spec.shape) == axes for spec, axes in zip(outputs, wanted.values(), strict=True))
    if not fits or (named and [spec.name for spec in outputs] != list(wanted)):
        words = " and ".join(f"{name} with {axes} axes" for name, axes in wanted.items())
        raise ConfigError(
            f"{where}: outputs: expected {words}, found {found}",
            hint='task = "Network" gives any tensors to the caller' + ('; outputs = ["' + '", "'.join(wanted) + '"] names them' if named else ""),
        )
    return outputs


def _pose(
    spec: PoseDetectorSpec, outputs: tuple[TensorSpec, ...], *, size_hw: tuple[int, int], where: Path
) -> tuple[PoseFacts | HeatmapFacts | RegressionFacts, Dim]:
    crop = spec.crop
    if spec.head == "simcc":
        x, y = _expected(outputs, {"simcc_x": 3, "simcc_y": 3}, where=where, named=True)
        bins = [round(side * spec.split_ratio) for side in (size_hw[1], size_hw[0])]
        if [x.shape[2], y.shape[2]] != bins:
            raise ConfigError(
                f"{where}: split_ratio: {spec.split_ratio:g} asks for {bins} bins, the network has {[x.shape[2], y.shape[2]]}: expected them to agree"
            )
        sigma = (defaults.simcc_sigma(size_hw[1]), defaults.simcc_sigma(size_hw[0]))
        return PoseFacts(padding=crop.padding, use_udp=crop.udp, split_ratio=spec.split_ratio, sigma=sigma), x.shape[1]
    if spec.head == "heatmap":
        (maps,) = _expected(outputs, {"heatmaps": 4}, where=where)
        height, width = maps.shape[2:]
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ConfigError(f"{where}: outputs: expected heatmaps of one size, found {list(maps.shape)}")
        if spec.blur_kernel_size % 2 == 0:
            raise ConfigError(f"{where}: blur_kernel_size: expected an odd number, found {spec.blur_kernel_size}")
        is_udp = spec.codec == "udp"
        return HeatmapFacts(
            padding=crop.padding, use_udp=crop.udp, is_udp_codec=is_udp, unbiased=spec.unbiased, blur_kernel_size=spec.blur_kernel_size,
            sigma=defaults.HEATMAP_SIGMA, heatmap_wh=(width, height),
        ), maps.shape[1]  # fmt: skip
    (points,) = _expected(outputs, {"keypoints": 3}, where=where)
    if points.shape[2] != 2:
        raise ConfigError(
            f"{where}: outputs: expected (N, K, 2) for a regression head, found {list(points.shape)}", hint='task = "Network" gives any tensors to the caller'
        )
    return RegressionFacts(padding=crop.padding, use_udp=crop.udp), points.shape[1]


def _keypoints(given: KeypointSpec, *, count: Dim, where: Path) -> KeypointInfo:
    if not isinstance(count, int):
        raise ConfigError(f"{where}: outputs: expected a fixed number of keypoints, found {count}")
    if given.set is not None:
        if given.set not in DATA_SETS:
            raise ConfigError(f"{where}: keypoints.set: expected one of {', '.join(DATA_SETS)}, found {given.set!r}")
        info = published_keypoints(given.set)
    elif given.names:
        info = KeypointInfo(names=given.names, skeleton=given.skeleton, flip_pairs=given.flip_pairs, sigmas=given.sigmas)
    else:
        info = keypoint_info(count)
    if len(info.names) != count or len(info.sigmas) not in {0, count}:
        raise ConfigError(f"{where}: keypoints: expected {count} names and as many sigmas or none, found {len(info.names)} and {len(info.sigmas)}")
    ends = [end for pair in (*info.skeleton, *info.flip_pairs) for end in pair]
    if not all(0 <= end < count for end in ends):
        raise ConfigError(
            f"{where}: keypoints: expected indices from 0 to {count - 1} in skeleton and flip_pairs, found {next(end for end in ends if not 0 <= end < count)}"
        )
    return info


def _classes(spec: ClassifierSpec | DetectorSpec, *, count: Dim | None, where: Path) -> list[str]:
    names = list(spec.class_names or ())
    if spec.class_names_file is not None:
        file = where.parent / spec.class_names_file
        try:
            names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where}: class_names_file: expected a text file with a name per line, found: {error}", hint="its path is relative to the spec"
            ) from error
    if count is None:
        return names
    if not isinstance(count, int):
        raise ConfigError(f"{where}: outputs: expected a fixed number of classes, found {count}")
    if names and len(names) != count:
        raise ConfigError(f"{where}: class_names: expected {count} names, found {len(names)}")
    return names or defaults.numbered_classes(count)


def _name_of(builder: str) -> str:
    """The class that makes it, or the module that the function stands in."""
    module, _, attribute = builder.partition(":")
    return attribute if attribute[:1].isupper() else module.rpartition(".")[2]


def _plain_name(text: str) -> str:
    """A file's or a function's name as a model's: letters, digits, dots and dashes."""
    stem = text.removesuffix(".onnx").removesuffix(".pt2").removesuffix(".pt").removesuffix(".ts")
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem).strip("._-")
    return plain.lower() or "model"
