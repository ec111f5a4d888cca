"""The one orchestrator: checkpoint in, verified bundles out."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from modelcrate_bundle.bundle import Bundle, BundleWriter, sha256_of
from modelcrate_bundle.errors import ConfigError, InputError, ModelcrateError, OutputError, ParityError
from modelcrate_bundle.manifest import AccuracyParity, Manifest, ParityRecord, Provenance, Stage, Timing
from modelcrate_bundle.tensors import ShapeRange
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import BUILDERS, BackendArtifact, build, check_can_build
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import DeployConfig
from modelcrate_converter.describe import describe_deploy, describe_detail, describe_pipeline, tool_versions
from modelcrate_converter.export import OnnxModel, export_onnx
from modelcrate_converter.exportable import ExportableModel, OnnxNetwork
from modelcrate_converter.own_model import file_kind, read_own_model
from modelcrate_converter.parity import (
    ParityImage,
    calibration_inputs,
    check_parity,
    failed_gates,
    given_image,
    network_inputs,
    parity_rows,
    procedural_images,
    reference_result,
)  # fmt: skip
from modelcrate_converter.precision import apply_plan, measure_ranges, plan_half, prescale_norms
from modelcrate_converter.progress import Advanced, Noted, Report, StageClock, ignore
from modelcrate_converter.quantization import Calibration, calibrate, emit_int8, sensitivities
from modelcrate_converter.reference import Task, measure_accuracy, open_reference, open_unpacked
from modelcrate_converter.simplify import op_table, simplify
from modelcrate_runtime.accuracy import Accuracy, Dataset
from modelcrate_runtime.draw import draw_classes, draw_detections, draw_poses
from modelcrate_runtime.images import encode_jpeg, read_image
from modelcrate_runtime.results import Classification, Detections
from modelcrate_runtime.tasks import Classifier, Detector, PoseDetector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelcrate_converter.builders.tensorrt_builder import Support


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What the user chose.

    Attributes:
        out: folder that gets one folder for each bundle.
        model_config: an MMPose or MMDetection config, for what the checkpoint does not say.
        name: the model's name; None takes the architecture's.
        images: images to compare on, and to draw the first of; empty takes procedural ones.
        verify: whether to compare with PyTorch. False is recorded in the manifest.
        force: build even what is up to date.
        sha256: what the checkpoint's hash must begin with, or None.
        keypoints: the published set that the keypoints are of, where the checkpoint does not say; empty when it is not known.
        spec: what a model that is none of ours takes and gives: a TOML file; None for checkpoints of the families that are known here.
        builder: "package.module:attribute", which makes that model; None where the file itself is one.
        calibration: images to calibrate INT8 on; empty takes procedural ones.
        validation: COCO data to measure the AP of PyTorch and of each target on; None measures none.
        dry_run: go as far as is possible without writing anything, for TensorRT without a GPU: parse the typed graph, and compare it in ONNX Runtime.
    """

    out: Path
    model_config: Path | None = None
    name: str | None = None
    images: tuple[Path, ...] = ()
    verify: bool = True
    force: bool = False
    sha256: str | None = None
    keypoints: str = ""
    spec: Path | None = None
    builder: str | None = None
    calibration: tuple[Path, ...] = ()
    validation: Dataset | None = None
    dry_run: bool = False


@dataclass(kw_only=True, slots=True)
class Conversion:
    """What became of one checkpoint for one target.

    Attributes:
        id: `<model>_<target>`.
        target: the target's name.
        place: where the bundle is, or would have been.
        status: built, current (up to date, nothing done), dry run or failed.
        bundle: the bundle, unless it failed.
        parity: the comparison, also when it failed.
        op_changes: (operator, before, after) of the simplification.
        support: what TensorRT makes of the graph, of a dry run.
        seconds: stage -> seconds.
        error: why it failed.
    """

    id: str
    target: str
    place: Path
    status: str
    bundle: Bundle | None = None
    parity: ParityRecord | None = None
    op_changes: list[tuple[str, int, int]] = field(default_factory=list)
    support: Support | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: ModelcrateError | None = None


@dataclass(kw_only=True, slots=True)
class _Subject:
    """One checkpoint, and what its targets have in common: it is made once, by the first that needs it."""

    model: ExportableModel
    options: ConvertOptions
    images: list[ParityImage]
    exported: dict[bytes, tuple[OnnxModel, OnnxModel]] = field(default_factory=dict)
    calibrations: dict[bytes, Calibration] = field(default_factory=dict)
    reference_accuracy: Accuracy | None = None


def convert(
    checkpoint_path: Path | None, configs: Sequence[DeployConfig], options: ConvertOptions, report: Report = ignore, *, taken: Mapping[str, str] | None = None
) -> list[Conversion]:
    """Convert one checkpoint for one or more targets.

    The canonical graph is exported once for all targets that ask for it in the same way. A target that fails does not stop the others.

    Args:
        checkpoint_path: a local file; None for a model of `options.builder` that brings its weights along.
        configs: the targets.
        options: where to, and how.
        report: gets the progress.
        taken: bundle id -> checkpoint, of what the same command has made already.

    Raises:
        ModelcrateError: what concerns all targets: the checkpoint, the images, the output folder.
    """
    _check_names([config.target for config in configs], options.name)
    for config in configs:
        check_can_build(config.backend, config.precision, verify=options.verify and not options.dry_run, device_id=config.tensorrt.device_id)
    clock = StageClock(report=report)
    with clock.stage("load checkpoint" if options.spec is None else "load model") as detail:
        model, skipped = _load_model(checkpoint_path, options)
        images = _load_images(options.images)
        _check_names([], model.name)
        detail.append(f"{model.name}, {model.parameter_count / 1e6:.2f} M parameters")
    if skipped:
        report(Noted(text=f"the checkpoint asks for {', '.join(skipped)}: skipped, not imported"))
    guessed = [f"{name} = {source.removeprefix('default: ')}" for name, source in model.facts.items() if source.startswith("default: ")]
    if guessed:
        report(Noted(text=f"taken from defaults, since neither the checkpoint nor a config says: {'; '.join(guessed)}", level="warning"))
    for config in configs:
        if config.needs is not None:
            config.needs.check(name=model.name, task=model.task, input_hw=model.input_hw)
        bundle_id = f"{model.name}_{config.target}"
        if taken and bundle_id in taken:
            raise ConfigError(
                f"{bundle_id}: expected one checkpoint for it, found {taken[bundle_id]} and {checkpoint_path or model.checkpoint[0]}",
                hint="convert them one by one with --name",
            )
    keys = {config.target: _build_key(model, config, options, images) for config in configs}
    results: dict[str, Conversion] = {}
    for config in configs:
        place = options.out / f"{model.name}_{config.target}"
        # Of code nobody knows whether it still makes the same network.
        bundle = None if options.force or options.dry_run or model.is_code else _current(place, keys[config.target], config)
        if bundle is not None:
            results[config.target] = Conversion(
                id=place.name, target=config.target, place=place, status="current", bundle=bundle, parity=bundle.manifest.parity if bundle.manifest else None
            )
    with contextlib.ExitStack() as stack:
        # Every writer is opened before the work begins: an output folder that cannot be written is said at once.
        waiting = [
            (config, stack.enter_context(BundleWriter(options.out / f"{model.name}_{config.target}"))) for config in configs if config.target not in results
        ]
        workdir = Path(stack.enter_context(_work_folder()))
        subject = _Subject(model=model, options=options, images=images)
        for config, writer in waiting:
            conversion = Conversion(id=writer.place.name, target=config.target, place=writer.place, status="failed")
            own = replace(clock, seconds=dict(clock.seconds))
            try:
                before, canonical = _canonical(subject, config, workdir, own)
                conversion.op_changes = op_table(before, canonical)
                _build_bundle(subject, config, keys[config.target], canonical, writer, own, conversion)
            except ModelcrateError as error:
                conversion.error = error
            conversion.seconds = own.seconds
            results[config.target] = conversion
    return [results[config.target] for config in configs]


def _load_model(path: Path | None, options: ConvertOptions) -> tuple[ExportableModel, list[str]]:
    """The model, and what its checkpoint asks for that was not imported."""
    if options.spec is not None:
        return read_own_model(options.spec, path=path, builder=options.builder, name=options.name, sha256=options.sha256), []
    assert path is not None  # only a builder can do without a file, and it comes with a spec
    kind = file_kind(path)
    if kind != "checkpoint":
        raise ConfigError(
            f"{path}: expected --spec for a file of the kind {kind}, found none", hint="--spec my_model.toml: converter/README.md has one for each task"
        )
    checkpoint = read_checkpoint(path)
    checkpoint.require_sha256(options.sha256)
    return read_architecture(checkpoint, model_config=options.model_config, name=options.name, keypoints=options.keypoints), list(checkpoint.skipped)


def _canonical(subject: _Subject, config: DeployConfig, workdir: Path, clock: StageClock) -> tuple[OnnxModel, OnnxModel]:
    """The raw graph before and after simplification, made once for each set of options."""
    model = subject.model
    key = msgspec.json.encode(config.onnx)
    if key not in subject.exported:
        folder = workdir / hashlib.sha256(key).hexdigest()[:8]
        folder.mkdir()
        with clock.stage("read ONNX" if isinstance(model.module, OnnxNetwork) else "export ONNX") as detail:
            before = export_onnx(model, config.onnx, workdir=folder)
            detail.append(f"opset {before.opset}, {before.node_count} operators")
        if isinstance(model.module, OnnxNetwork):
            if before.opset > config.onnx.opset:
                clock.report(Noted(text=f"the file has opset {before.opset}; MMDeploy's SDK reads up to {config.onnx.opset}", level="warning"))
        elif before.opset != config.onnx.opset:
            clock.report(Noted(text=f"the {config.onnx.exporter} exporter cannot write opset {config.onnx.opset}: it wrote {before.opset}", level="warning"))
        after = before
        if config.onnx.simplify:
            with clock.stage("simplify") as detail:
                after = simplify(before, workdir=folder, metadata={"checkpoint": model.checkpoint[1], "model": model.name})
                detail.append(f"{before.node_count} -> {after.node_count} operators")
        subject.exported[key] = (before, after)
    return subject.exported[key]


def _build_bundle(
    subject: _Subject, config: DeployConfig, build_key: str, canonical: OnnxModel, writer: BundleWriter, clock: StageClock, conversion: Conversion
) -> None:
    """One target: give the graph its types, build, compare, describe, commit."""
    model, options = subject.model, subject.options
    with _work_folder() as folder:
        if config.fp16.scale_norm == "prescaled":
            canonical = prescale_norms(canonical, workdir=Path(folder))
        typed, calibration = _typed(subject, config, canonical, Path(folder), clock)
        if options.dry_run and BUILDERS[config.backend].needs_gpu:
            typed, conversion.support = _rehearsed(subject, config, typed, Path(folder), clock)
            config = msgspec.structs.replace(
                config, target=f"{config.target} for ONNX Runtime", backend="onnxruntime", nms=msgspec.structs.replace(config.nms, where="runtime")
            )
        artifact, record = _built_and_compared(subject, config, typed, Path(folder), clock)
        if calibration is not None and config.int8.search and options.verify and not record.passed:
            artifact, record = _searched(subject, config, canonical, calibration, Path(folder), clock)
        conversion.parity = record
        if options.verify and not record.passed:
            raise ParityError(
                f"{conversion.id}: expected every figure inside its gate, found {'; '.join(failed_gates(record))}: no bundle was written",
                hint="the table shows all figures; gates stand in the deploy config"
                if all(p.count + p.undecided for p in record.pixels)
                else "no object was found in the images: give one that has some, with --image PHOTO",
            )
        if options.dry_run:
            conversion.status = "dry run"
            return
        with clock.stage("write bundle") as detail:
            for role, path in artifact.files.items():
                writer.add(path.name, role=role, content=path)
            if calibration is not None:
                writer.add("calibration.json", role="calibration", content=msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")
            manifest = _describe_manifest(model, artifact, config, record, build_key, clock, target_id=conversion.id)
            pictures = _add_pictures(subject, artifact, writer)
            writer.add("README.md", role="readme", content=render_readme(manifest, pictures))
            conversion.bundle = writer.commit(
                deploy=describe_deploy(model, artifact, config),
                pipeline=describe_pipeline(model, has_nms=artifact.has_nms, is_batched=artifact.inputs[0].is_batch_dynamic),
                detail=describe_detail(model, artifact, opset=canonical.opset),
                manifest=manifest,
            )
            detail.append(str(conversion.place))
    conversion.status = "built"


def _rehearsed(subject: _Subject, config: DeployConfig, typed: OnnxModel, workdir: Path, clock: StageClock) -> tuple[OnnxModel, Support]:
    """TensorRT's dry run: what it makes of the typed graph; and an engine, thrown away, where the library builds one without a GPU."""
    from modelcrate_converter.builders.tensorrt_builder import ENGINE_NAME, build_engine, examine

    with clock.stage(f"parse for {config.target}") as detail:
        source, _, support = examine(subject.model, typed, config, workdir=workdir)
        detail.append(f"{support.operators} operators, all supported; layers: {', '.join(f'{count} {name}' for name, count in support.layers.items())}")
    if config.backend == "tensorrt_rtx":
        with clock.stage(f"build {config.target}") as detail:
            engine = workdir / ENGINE_NAME
            build_engine(source.path, source.inputs, config, place=engine, where=subject.model.name, report=clock.report)
            detail.append(f"{ENGINE_NAME} {engine.stat().st_size / 2**20:.1f} MiB")
    clock.report(Noted(text="the figures below are of the same typed graph in ONNX Runtime on the CPU: nothing was run on a GPU", level="warning"))
    return typed, support


def _built_and_compared(subject: _Subject, config: DeployConfig, typed: OnnxModel, workdir: Path, clock: StageClock) -> tuple[BackendArtifact, ParityRecord]:
    model = subject.model
    with clock.stage(f"build {config.target}") as detail:
        artifact = build(model, typed, config, workdir=workdir, report=clock.report)
        detail.append(", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in artifact.files.values()))
    if not subject.options.verify:
        return artifact, ParityRecord(verified=False)
    with clock.stage("check parity") as detail:
        record = check_parity(model, artifact, subject.images, config.gates)
        detail.append(f"{record.samples} inputs from {len(record.images)} images")
    if subject.options.validation is not None:
        record.accuracy = [_measured(subject, artifact, config, subject.options.validation, clock)]
        record.decided_by = "accuracy" if config.precision == "int8" and config.gates.ap_drop is not None else "parity"
    return artifact, record


def _measured(subject: _Subject, artifact: BackendArtifact, config: DeployConfig, data: Dataset, clock: StageClock) -> AccuracyParity:
    """AP of PyTorch, measured by the first target that asks, and of the artefact, through the same classes on the same images."""

    def measure(what: str, opened: Task) -> Accuracy:
        def report(done: int, total: int) -> None:
            clock.report(Advanced(name=f"AP of {what}", done=done, total=total, unit="items"))

        with clock.stage(f"AP of {what}") as detail, opened as task:
            accuracy = measure_accuracy(task, data, report)
            detail.append(f"{accuracy.figures['AP']:.4f} on {accuracy.images} images" + (f", {len(accuracy.skipped)} skipped" if accuracy.skipped else ""))
        return accuracy

    if subject.reference_accuracy is None:
        subject.reference_accuracy = measure(subject.model.reference, open_reference(subject.model))
        for skipped in subject.reference_accuracy.skipped.values():
            clock.report(Noted(text=skipped, level="warning"))
    if not subject.reference_accuracy.figures["AP"] > 0:
        raise InputError(
            f"{data.annotations}: expected objects that {subject.model.reference} finds, found an AP of 0: no drop can be seen", hint="give other data"
        )
    reference, ours = subject.reference_accuracy, measure(config.target, open_unpacked(subject.model, artifact))
    return AccuracyParity(
        name=f"{ours.kind}_ap", data=data.annotations.name, images=ours.images,
        reference=reference.figures["AP"], value=ours.figures["AP"], gate=config.gates.ap_drop,
    )  # fmt: skip


def _searched(
    subject: _Subject, config: DeployConfig, canonical: OnnxModel, calibration: Calibration, workdir: Path, clock: StageClock
) -> tuple[BackendArtifact, ParityRecord]:
    """INT8 outside its gates: leave the convolutions that move the outputs most in float32, twice as many each time, until the rest is inside."""
    with clock.stage("search sensitive layers") as detail:
        inputs = list(network_inputs(subject.model, subject.images))[:4]
        ranked = sensitivities(canonical, calibration, config.int8, inputs, workdir=workdir)
        detail.append(f"{ranked[0].layer} moves the outputs by {ranked[0].error:.2g}, {ranked[-1].layer} by {ranked[-1].error:.1g}")
    left_out = min(1, len(ranked) - 1)  # what says INT8 has a layer in INT8
    while True:
        names = [item.layer for item in ranked[:left_out]]
        typed = emit_int8(canonical, calibration, config.int8, workdir=workdir, leave_out=names)
        artifact, record = _built_and_compared(subject, config, typed, workdir, clock)
        if record.passed:
            clock.report(Noted(text=f"{left_out} of {len(ranked)} convolutions stay in float32: {', '.join(names[:6])}{' ...' if left_out > 6 else ''}"))
        if record.passed or not 0 < 2 * left_out < len(ranked):
            return artifact, record
        left_out *= 2


def _typed(subject: _Subject, config: DeployConfig, canonical: OnnxModel, workdir: Path, clock: StageClock) -> tuple[OnnxModel, Calibration | None]:
    """The graph in the target's precision, where that is a matter of the graph; and the calibration that it came from."""
    model = subject.model
    if config.precision not in BUILDERS[config.backend].typed:
        return canonical, None
    if config.precision == "int8":
        # Ranges are a matter of the graph and of the method; what a backend makes of them is its own.
        key = msgspec.json.encode([config.onnx, config.fp16.scale_norm, config.int8.method, config.int8.percentile, config.int8.scenes])
        if key not in subject.calibrations:
            with clock.stage("calibrate") as detail:
                calibration = calibrate(canonical, lambda: _calibration_inputs(subject, config), config.int8, workdir=workdir)
                detail.append(f"{len(calibration.ranges)} ranges from {calibration.inputs} inputs, {calibration.method}")
            subject.calibrations[key] = calibration
        return emit_int8(canonical, subject.calibrations[key], config.int8, workdir=workdir), subject.calibrations[key]
    with clock.stage("plan precision") as detail:
        ranges = measure_ranges(canonical, network_inputs(model, subject.images), workdir=workdir)
        plan = plan_half(canonical, ranges, headroom=config.fp16.headroom)
        detail.append(plan.summary)
        return apply_plan(canonical, plan, workdir=workdir), None


def _calibration_inputs(subject: _Subject, config: DeployConfig) -> Iterator[NDArray[np.float32]]:
    """What INT8 is calibrated on, one input after another: the images that were given for it, or procedural scenes."""
    if not subject.options.calibration:
        return calibration_inputs(subject.model, config.int8.scenes)
    return network_inputs(subject.model, (given_image(path, read_image(path)) for path in subject.options.calibration))


def _describe_manifest(
    model: ExportableModel, artifact: BackendArtifact, config: DeployConfig, record: ParityRecord, build_key: str, clock: StageClock, *, target_id: str
) -> Manifest:
    first, *fixed = artifact.inputs[0].shape
    least, best, most = (first if isinstance(first, int) else number for number in (config.batch.min, config.batch.opt, config.batch.max))
    sides = tuple(dim for dim in fixed if isinstance(dim, int))
    limits = ShapeRange(min=(least, *sides), opt=(best, *sides), max=(most, *sides))
    return Manifest(
        id=target_id,
        model=model.name,
        task=model.task,
        target=config.target,
        backend=artifact.backend,
        precision=artifact.precision,
        geometry="exact",
        inputs=list(artifact.inputs),
        outputs=list(artifact.outputs),
        shape_ranges={model.input.name: limits},
        class_names=model.class_names,
        resampling=model.resampling,
        keypoints=model.keypoints,
        engine=artifact.engine,
        files=[],
        parity=record,
        provenance=Provenance(
            checkpoint=model.checkpoint[0], checkpoint_sha256=model.checkpoint[1], facts=model.facts, tools=tool_versions(), build_key=build_key
        ),
        timing=Timing(
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            stages=[Stage(name=name, seconds=round(seconds, 3)) for name, seconds in clock.seconds.items()],
        ),
    )


def render_readme(manifest: Manifest, pictures: list[str]) -> bytes:
    """The bundle's README.md."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  # Markdown, not HTML
    )
    return environment.get_template("README.md.j2").render(manifest=manifest, parity_rows=parity_rows(manifest.parity), pictures=pictures).encode()


def _add_pictures(subject: _Subject, artifact: BackendArtifact, writer: BundleWriter) -> list[str]:
    """PyTorch's result and the artefact's on the first given image, as MMDeploy's `deploy.py` draws them; none for procedural images."""
    model = subject.model
    if not subject.options.images or model.task == "Network":  # only the caller knows what tensors mean
        return []
    image = subject.images[0].image
    pictures = {
        f"output_{'given' if isinstance(model.module, OnnxNetwork) else 'pytorch'}.jpg": _drawn(model, reference_result(model, image), image),
        f"output_{artifact.backend}.jpg": _drawn(model, _artifact_result(model, artifact, image), image),
    }
    for name, picture in pictures.items():
        writer.add(name, role="picture", content=encode_jpeg(picture))
    return list(pictures)


def _artifact_result(model: ExportableModel, artifact: BackendArtifact, image: NDArray[np.uint8]) -> object:
    """What users of the bundle will get."""
    with open_unpacked(model, artifact) as task:
        if isinstance(task, Detector):
            return task.detect(image)
        if isinstance(task, Classifier):
            return task.classify(image)
        assert isinstance(task, PoseDetector)
        return task.estimate(image)


def _drawn(model: ExportableModel, result: object, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(result, Detections):
        return draw_detections(image, result, class_names=model.class_names)
    if isinstance(result, Classification):
        return draw_classes(image, result, class_names=model.class_names)
    assert model.keypoints is not None
    return draw_poses(image, result, keypoints=model.keypoints)  # type: ignore[arg-type]  # the other kind of result


def _load_images(paths: Sequence[Path]) -> list[ParityImage]:
    return [given_image(path, read_image(path)) for path in paths] or procedural_images()


def _build_key(model: ExportableModel, config: DeployConfig, options: ConvertOptions, images: Sequence[ParityImage]) -> str:
    """Hash of everything that decides the result."""
    parts = {
        "checkpoint": model.checkpoint[1],
        "facts": model.facts,
        "model_config": sha256_of(options.model_config) if options.model_config else "",
        "name": model.name,
        "class_names": model.class_names,
        "config": msgspec.to_builtins(config),
        "spec": sha256_of(options.spec) if options.spec else "",
        "images": [[image.name, hashlib.sha256(image.image.tobytes()).hexdigest()] for image in images],
        "drawn": bool(options.images),
        "calibration": [sha256_of(path) for path in options.calibration] if config.precision == "int8" else [],
        "validation": [sha256_of(options.validation.annotations), len(options.validation.content.images)] if options.validation else [],
        "verify": options.verify,
        "tools": tool_versions(),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _check_names(targets: Sequence[str], name: str | None) -> None:
    """Refuse names that would lead out of the output folder, and two targets that would write the same one."""
    for what, text in (*(("target", target) for target in targets), *((("name", name),) if name is not None else ())):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", text):
            raise ConfigError(f"{what}: expected letters, digits, dots, dashes and underscores, found {text!r}", hint="it becomes the name of a folder")
    double = next((target for target in targets if targets.count(target) > 1), None)
    if double is not None:
        raise ConfigError(
            f"target: expected different names, found {double!r} twice", hint="rename one of the deploy configs: the file's name is the target's name"
        )


def _current(place: Path, build_key: str, config: DeployConfig) -> Bundle | None:
    """The bundle in its place, if the same build made it, none of its files has changed since, and an engine was built for what is here."""
    if not (place / "manifest.json").is_file():
        return None
    try:
        bundle = Bundle.open(place)
        bundle.verify()
        if bundle.manifest is not None and bundle.manifest.engine is not None:
            from modelcrate_converter.builders.tensorrt_builder import fits

            if not fits(bundle.manifest.engine, config):
                return None
    except ModelcrateError:
        return None
    return bundle if bundle.manifest and bundle.manifest.provenance.build_key == build_key else None


@contextlib.contextmanager
def _work_folder() -> Iterator[str]:
    """A temporary folder; a full or missing one is said as what it is."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="modelcrate-")
    except OSError as error:
        raise OutputError(f"temporary folder: expected to write there, found: {error}", hint="set TMPDIR to a folder with space") from error
    with folder as path:
        try:
            yield path
        except OSError as error:
            raise OutputError(
                f"{path}: expected to write there, found: {error.strerror or error}", hint="free some space, or set TMPDIR to a folder that has it"
            ) from error
