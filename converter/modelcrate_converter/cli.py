"""The whole command line: a device's commands and `convert`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelcrate_bundle.errors import ConfigError, MissingBackendError, ModelcrateError
from modelcrate_bundle.schema import write_record
from modelcrate_converter.console import Progress, print_conversion, print_failure, print_parity, print_summary
from modelcrate_converter.locate import locate, open_checkpoint
from modelcrate_runtime import accuracy_cli, profile_cli, report_cli, track_cli  # noqa: F401  # their commands
from modelcrate_runtime.cli import JSON_OPTION, app, backend_rows, consoles, exit_on_error, print_backends, raise_if_interrupted
from modelcrate_runtime.subjects import know_checkpoints

if TYPE_CHECKING:
    from modelcrate_bundle.bundle import Bundle
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.convert import Conversion, ConvertOptions
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_converter.parity import ParityImage
    from modelcrate_runtime.accuracy import Dataset

know_checkpoints(open_checkpoint)


@app.command()
def convert(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint files (.pth, .safetensors), URLs, names of published models (modelcrate zoo list), or demo-det and demo-pose, which come along. "
            "With --spec: an .onnx, TorchScript or .pt2 file.",
            metavar="[CHECKPOINT]...",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Deploy target, the path of a deploy config, or all: what this machine can build. May be repeated."),
    ] = None,
    deploy_config: Annotated[
        list[Path] | None, typer.Option(help="MMDeploy's deploy config (.py), instead of -t. Parsed, never executed. May be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder that gets one folder for each bundle.")] = Path("crates"),
    model_config: Annotated[
        Path | None, typer.Option(help="MMPose or MMDetection config, for what the checkpoint does not say. Parsed, never executed.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="TOML file that says what a model of your own takes and gives.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="package.module:function that makes a torch.nn.Module; needs --spec. It is your code, and is run.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint with the weights of --model: a file or a URL.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: its architecture and size.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to compare on; the first is drawn into the bundle. May be repeated. Default: procedural images.")
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Image or folder of images to calibrate INT8 on. May be repeated. Default: procedural scenes.")
    ] = None,
    val_annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations to measure the AP of PyTorch and of each target on. INT8 is then judged by the drop of its AP.")
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of their images; default: the annotations' own.")] = None,
    val_limit: Annotated[int | None, typer.Option(min=1, help="Only so many of their images.")] = None,
    exporter: Annotated[Literal["torchscript", "dynamo"] | None, typer.Option(help="ONNX exporter; default: the deploy config's.")] = None,
    nms: Annotated[
        Literal["graph", "runtime"] | None, typer.Option(help="Detectors: suppress in the graph or in the runtime; default: the deploy config's.")
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU to build for and to compare on, for TensorRT.", metavar="cuda:N")] = "cuda:0",
    cuda_binding: Annotated[
        Literal["cuda-python", "pycuda"] | None, typer.Option(help="What TensorRT's memory and streams go through; default: what is installed.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write nothing. For TensorRT without a GPU: parse the typed graph, say what is supported, compare it in ONNX Runtime."),
    ] = False,
    simplify: Annotated[bool, typer.Option(help="Run onnxsim.")] = True,
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch before writing. --no-verify is recorded in the manifest.")] = True,
    force: Annotated[bool, typer.Option(help="Build even what is up to date.")] = False,
    offline: Annotated[bool, typer.Option(help="Take URLs from the cache only.")] = False,
    sha256: Annotated[str | None, typer.Option(help="Expected hash of a downloaded checkpoint, or its first digits.")] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Convert checkpoints to verified bundles, one for each target."""
    with exit_on_error():
        from modelcrate_converter.builders import check_can_build
        from modelcrate_converter.config import load_config, target_names
        from modelcrate_converter.mmdeploy_config import read_mmdeploy_config

        configs = [load_config(t) for t in dict.fromkeys(_named_targets(target or [], verify=verify and not dry_run))] + [
            read_mmdeploy_config(path) for path in deploy_config or []
        ]
        gpu = _gpu(device)
        configs = [_adjusted(c, exporter=exporter, nms=nms, simplify=simplify, device_id=gpu, cuda_binding=cuda_binding) for c in configs]
        if not configs:
            raise typer.BadParameter(f"expected at least one of {', '.join(target_names())}, found none", param_hint="'--target' / '-t'")
        for config in configs:
            check_can_build(config.backend, config.precision, verify=verify and not dry_run, device_id=gpu)
        from modelcrate_converter.convert import ConvertOptions
        from modelcrate_runtime.images import image_files

        if val_annotations is None and (val_images is not None or val_limit is not None):
            raise ConfigError("--val-images, --val-limit: expected --val-annotations beside them, found none", hint="--val-annotations COCO.json")
        if val_annotations is not None and not verify:
            raise ConfigError("--val-annotations: expected to compare with PyTorch, found --no-verify", hint="leave one of them out")
        given = _given_networks(checkpoints or [], model=model, weights=weights, spec=spec)
        options = ConvertOptions(
            calibration=tuple(file for path in calibration or [] for file in image_files(path)),
            out=out,
            model_config=model_config,
            name=name,
            images=tuple(image or ()),
            verify=verify,
            force=force,
            sha256=sha256,
            spec=spec,
            builder=model,
            dry_run=dry_run,
            validation=_validation(val_annotations, val_images, limit=val_limit),
        )
        if (name or sha256) and len(given) > 1:
            raise ConfigError(f"{'--name' if name else '--sha256'}: expected one checkpoint, found {len(given)}", hint="convert them one by one")
        conversions, failures = _convert_all(given, configs, options, offline=offline, sha256=sha256, as_json=as_json)
        if as_json:
            failed = [_failed_json(checkpoint, error) for checkpoint, error in failures]
            _write_json([_as_json(c, conversion) for c, conversion in conversions] + failed)
        elif len(conversions) > 1:
            print_summary(consoles()[0], [conversion for _, conversion in conversions])
        errors = [conversion.error for _, conversion in conversions if conversion.error] + [error for _, error in failures]
        if len(errors) > 1:
            consoles()[1].print(f"{len(errors)} of {len(conversions) + len(failures)} failed; the first:", style="red")
        if errors:
            raise errors[0]


@app.command()
def backends(as_json: Annotated[bool, JSON_OPTION] = False) -> None:
    """Show which backends are installed, what they can do here, and how to install what is missing."""
    with exit_on_error():
        from modelcrate_converter.builders import BUILDERS, check_can_build

        can_build: dict[str, tuple[bool, str]] = {}
        for name in BUILDERS:
            try:
                check_can_build(name)
            except MissingBackendError as error:
                can_build[name] = (False, error.hint)
            else:
                can_build[name] = (True, "")
        print_backends(backend_rows(can_build=can_build), as_json=as_json)


@app.command()
def people(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    count: Annotated[int, typer.Option(help="Pictures.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed draws the same people.")] = 0,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: 320x320; for a video 640x360.")] = None,
    crowd: Annotated[str, typer.Option("--people", help="Least and most people in a picture; for a video the most.", metavar="MIN-MAX")] = "1-6",
    frames: Annotated[int, typer.Option(help="Write a video of so many frames, in which people walk and cross, instead of pictures.")] = 0,
) -> None:
    """Draw people with exact COCO annotations: data for calibration, accuracy and trackers, without a download."""
    with exit_on_error():
        from rich.progress import Progress

        from modelcrate_converter.people.dataset import ANNOTATIONS_NAME, write_dataset, write_video

        width, height = _numbers(size or ("640x360" if frames else "320x320"), "x", "--size", "WIDTHxHEIGHT like 320x320")
        least, most = _numbers(crowd, "-", "--people", "MIN-MAX like 1-6")
        with Progress(console=consoles()[1], transient=True) as progress:
            bar = progress.add_task("people", total=frames or count)

            def report(done: int) -> None:
                raise_if_interrupted()
                progress.update(bar, completed=done)

            if frames:
                write_video(out, frames=frames, seed=seed, size_hw=(height, width), people=most, report=report)
            else:
                write_dataset(out, count=count, seed=seed, size_hw=(height, width), people=(least, most), report=report)
        what = f"people.mp4, {frames} frames" if frames else f"{count} picture{'s' if count != 1 else ''}"
        consoles()[0].print(f"wrote {out}: {what} and {ANNOTATIONS_NAME}", soft_wrap=True)


# What `verify` and `bisect` take alike.
_BundlePath = Annotated[Path, typer.Argument(help="A bundle's folder or a zip of it.")]
_Reference = Annotated[str, typer.Option("--reference", "-r", help="What it was made from: checkpoint, URL, name of a published model, demo-det or demo-pose.")]
_ModelConfig = Annotated[Path | None, typer.Option(help="MMPose or MMDetection config, if it was converted with one.")]
_Spec = Annotated[Path | None, typer.Option(help="Spec of a model of your own.")]
_Model = Annotated[str | None, typer.Option("--model", help="package.module:function of a model of your own.")]
_Images = Annotated[list[Path] | None, typer.Option("--image", help="Image to look at. May be repeated. Default: procedural images.")]
_Offline = Annotated[bool, typer.Option(help="Take URLs from the cache only.")]


@app.command()
def verify(
    bundle: _BundlePath,
    reference: _Reference,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Whose gates; default: the bundle's own target.")] = None,
    model_config: _ModelConfig = None,
    spec: _Spec = None,
    model: _Model = None,
    image: _Images = None,
    offline: _Offline = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Compare a bundle with PyTorch again, on this machine: hashes first, then the outputs and the pixels."""
    with exit_on_error():
        from modelcrate_bundle.errors import ParityError
        from modelcrate_converter.config import load_config
        from modelcrate_converter.parity import failed_gates
        from modelcrate_converter.verification import verify_bundle

        opened, original, images = _with_reference(bundle, reference, model_config=model_config, spec=spec, model=model, image=image, offline=offline)
        record = verify_bundle(opened, original, images, load_config(target) if target else None)
        if as_json:
            _write_json(write_record(record))
        else:
            print_parity(consoles()[0], opened.name, record)
        if not record.passed:
            raise ParityError(
                f"{opened.name}: expected every figure inside its gate, found {'; '.join(failed_gates(record))}",
                hint=f"modelcrate bisect {bundle} -r {reference}",
            )


@app.command()
def bisect(
    bundle: _BundlePath,
    reference: _Reference,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative L-inf of a tensor that is right.")] = 1e-3,
    model_config: _ModelConfig = None,
    spec: _Spec = None,
    model: _Model = None,
    image: _Images = None,
    offline: _Offline = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Find the first tensor inside a bundle's network that is not what PyTorch's float32 graph has."""
    with exit_on_error():
        from modelcrate_converter.verification import bisect_bundle

        opened, original, images = _with_reference(bundle, reference, model_config=model_config, spec=spec, model=model, image=image, offline=offline)
        found = bisect_bundle(opened, original, images)
        first = next((i for i, item in enumerate(found) if not item.relative_linf <= tolerance), None)
        if as_json:
            _write_json({"first": found[first].tensor if first is not None else None, "tolerance": tolerance, "tensors": found})
            return
        out = consoles()[0]
        if first is None:
            worst = max((item.relative_linf for item in found), default=0.0)
            out.print(f"{opened.name}: all {len(found)} tensors are within {tolerance:g} of PyTorch; the worst is at {worst:.2e}", soft_wrap=True)
            return
        from rich.table import Table

        out.print(f"{opened.name}: tensor {first + 1} of {len(found)} is the first beyond {tolerance:g}", style="italic", soft_wrap=True)
        table = Table("tensor", "made by", "relative L-inf")
        for item in found[max(first - 3, 0) : first + 4]:
            table.add_row(item.tensor, item.operator, f"{item.relative_linf:.2e}", style="bold red" if item is found[first] else "")
        out.print(table)


@app.command()
def rebuild(
    bundle: _BundlePath,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="What it was made from, to compare the new engine with: as for verify.", metavar="CHECKPOINT")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new bundle; default: the bundle's own, which is replaced.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="How to build; default: the bundle's own target.")] = None,
    device: Annotated[str, typer.Option(help="The GPU to build for and to compare on.", metavar="cuda:N")] = "cuda:0",
    cuda_binding: Annotated[Literal["cuda-python", "pycuda"] | None, typer.Option(help="Default: what is installed.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with the reference. --no-verify is recorded in the manifest.")] = True,
    model_config: _ModelConfig = None,
    spec: _Spec = None,
    model: _Model = None,
    image: _Images = None,
    offline: _Offline = False,
) -> None:
    """Build a TensorRT bundle again for this machine's GPU, from the graph that it carries."""
    with exit_on_error():
        from modelcrate_bundle.bundle import Bundle
        from modelcrate_converter.builders import check_can_build
        from modelcrate_converter.rebuild import rebuild as rebuild_bundle
        from modelcrate_converter.verification import config_of

        if verify and reference is None:
            raise ConfigError(
                "--reference: expected what the bundle was made from, found none", hint="-r CHECKPOINT; or --no-verify, which writes what nobody compared"
            )
        if out is None and not bundle.is_dir():
            raise ConfigError(f"{bundle}: expected a folder to put the new bundle in place of, found another thing", hint="-o FOLDER")
        opened = Bundle.open(bundle)
        original: ExportableModel | None = None
        images: list[ParityImage] = []
        opened.verify()
        config = _adjusted(config_of(opened, target), exporter=None, nms=None, simplify=True, device_id=_gpu(device), cuda_binding=cuda_binding)
        check_can_build(config.backend, config.precision, verify=verify, device_id=config.tensorrt.device_id)
        if verify and reference is not None:
            opened, original, images = _with_reference(bundle, reference, model_config=model_config, spec=spec, model=model, image=image, offline=offline)
        with Progress(consoles()[1]) as progress:
            made = rebuild_bundle(opened, config, out=out or bundle, reference=original, images=images, report=progress.show)
        if made.manifest is not None and made.manifest.parity.verified:
            print_parity(consoles()[0], made.name, made.manifest.parity)
        consoles()[0].print(f"wrote {made.root}", soft_wrap=True)


def _with_reference(
    bundle: Path, reference: str, *, model_config: Path | None, spec: Path | None, model: str | None, image: list[Path] | None, offline: bool
) -> tuple[Bundle, ExportableModel, list[ParityImage]]:
    """An opened bundle with its hashes checked, what it was made from, and the images to run on."""
    from modelcrate_bundle.bundle import Bundle
    from modelcrate_converter.convert import ConvertOptions
    from modelcrate_converter.parity import given_image, procedural_images
    from modelcrate_converter.verification import read_reference
    from modelcrate_runtime.images import read_image

    opened = Bundle.open(bundle)
    opened.verify()
    with Progress(consoles()[1]) as progress:
        path, _ = locate(reference, ConvertOptions(out=Path(), spec=spec), offline=offline, sha256=None, report=progress.show)
    assert path is not None  # only an empty text has no file
    original = read_reference(opened, path, model_config=model_config, spec=spec, builder=model)
    return opened, original, [given_image(file, read_image(file)) for file in image or []] or procedural_images()


zoo_app = typer.Typer(
    no_args_is_help=True, help="Published models by name.", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(zoo_app, name="zoo")


@zoo_app.command("list")
def zoo_list(
    words: Annotated[list[str] | None, typer.Argument(help="Only models whose names have all of these.", metavar="[WORD]...")] = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """List the published models that can be converted by name."""
    with exit_on_error():
        from modelcrate_converter.zoo import zoo_models

        chosen = [m for m in zoo_models().values() if all(any(w.lower() in name for name in (m.name, *m.aliases)) for w in words or [])]
        if as_json:
            _write_json(chosen)
            return
        from rich.table import Table

        table = Table()
        table.add_column("name", no_wrap=True)
        table.add_column("also")
        for heading in ("input", "parameters", "multiply-adds"):
            table.add_column(heading, justify="right")
        table.add_column("published")
        for model in chosen:
            size = "x".join(str(v) for v in model.input_hw)
            numbers = [f"{v:g} {unit}" if v is not None else "" for v, unit in ((model.parameters_m, "M"), (model.flops_g, "G"))]
            metric = next((f"{name.replace('_', ' ', 1)} {value:g}" for name, value in model.metrics.items()), "")
            table.add_row(model.name, ", ".join(model.aliases), size, *numbers, metric)
        consoles()[0].print(table)
        if not chosen:
            raise ConfigError(f"zoo list: expected words that a name has, found {' '.join(words or [])!r}", hint="modelcrate zoo list shows all")


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="Name or alias.")], as_json: Annotated[bool, JSON_OPTION] = False) -> None:
    """Show everything that is known of a published model."""
    with exit_on_error():
        from modelcrate_converter.zoo import get_model

        model = get_model(name)
        if as_json:
            _write_json(model)
            return
        import msgspec

        for key, value in msgspec.to_builtins(model).items():
            if isinstance(value, dict):
                value = ", ".join(f"{metric} {figure:g}" for metric, figure in value.items())  # noqa: PLW2901
            text = ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
            if value not in (None, "", [], ()):
                consoles()[0].print(f"{key:<14} {text}", soft_wrap=True)


@zoo_app.command("fetch")
def zoo_fetch(
    names: Annotated[list[str], typer.Argument(help="Names or aliases.")],
    offline: Annotated[bool, typer.Option(help="Only look into the cache.")] = False,
) -> None:
    """Download checkpoints into the cache, checked by their hashes; print their paths."""
    with exit_on_error():
        from modelcrate_converter.download import default_cache_dir
        from modelcrate_converter.zoo import fetch_model, get_model

        models = [get_model(name) for name in names]
        for model in models:
            with Progress(consoles()[1]) as progress:
                path = fetch_model(model, cache_dir=default_cache_dir(), offline=offline, report=progress.show)
            consoles()[0].print(str(path), soft_wrap=True)


def _write_json(value: Any) -> None:
    """Indented JSON on standard output; msgspec writes NaN as null, since JSON has no word for it."""
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n")


def _validation(annotations: Path | None, images: Path | None, *, limit: int | None) -> Dataset | None:
    """The validation set, read and with its evaluator at hand before anything is built."""
    if annotations is None:
        return None
    from modelcrate_runtime.accuracy import Dataset, check_evaluator

    check_evaluator()
    return Dataset.read(annotations, images, limit=limit)


def _numbers(text: str, separator: str, option: str, expected: str) -> tuple[int, int]:
    first, _, second = text.partition(separator)
    if not (first.isdecimal() and second.isdecimal()):
        raise ConfigError(f"{option}: expected {expected}, found {text!r}")
    return int(first), int(second)


def main() -> None:
    """The console script."""
    app()


def _gpu(device: str) -> int:
    """The number in "cuda:0"."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"--device: expected cuda or cuda:N, found {device!r}", hint="bundles for other backends are compared on the CPU")
    return int(number or "0")


def _adjusted(
    config: DeployConfig, *, exporter: str | None, nms: str | None, simplify: bool, device_id: int = 0, cuda_binding: str | None = None
) -> DeployConfig:
    """A deploy config with what the command line says otherwise."""
    import msgspec

    onnx_changes: dict[str, Any] = ({"exporter": exporter} if exporter else {}) | ({} if simplify else {"simplify": False})
    config = msgspec.structs.replace(config, onnx=msgspec.structs.replace(config.onnx, **onnx_changes))
    engine: dict[str, Any] = ({"device_id": device_id} if device_id else {}) | ({"cuda_binding": cuda_binding} if cuda_binding else {})
    config = msgspec.structs.replace(config, tensorrt=msgspec.structs.replace(config.tensorrt, **engine))
    return msgspec.structs.replace(config, nms=msgspec.structs.replace(config.nms, where=nms)) if nms else config


def _named_targets(targets: list[str], *, verify: bool) -> list[str]:
    """With "all" as every target whose frameworks are installed; what is left out is said."""
    if "all" not in targets:
        return targets
    from modelcrate_converter.builders import check_can_build
    from modelcrate_converter.config import load_config, target_names

    found = [target for target in targets if target != "all"]
    for name in target_names():
        config = load_config(name)
        try:
            check_can_build(config.backend, config.precision, verify=verify)
        except MissingBackendError as error:
            consoles()[1].print(f"{name}: left out: {error} ({error.hint})", style="dim", soft_wrap=True)
        else:
            found.append(name)
    return found


def _given_networks(checkpoints: list[str], *, model: str | None, weights: str | None, spec: Path | None) -> list[str]:
    """What is to be converted, one text each; empty for a network that `--model` makes with its weights.

    Raises:
        ConfigError: options that do not go together.
        typer.BadParameter: nothing at all.
    """
    if model is None and weights is not None:
        raise ConfigError("--weights: expected --model beside it, found none", hint="--model my_package.my_module:build makes the network of the weights")
    if model is not None and spec is None:
        raise ConfigError("--model: expected --spec beside it, found none", hint="--spec my_model.toml: converter/README.md has one for each task")
    if model is not None and checkpoints:
        raise ConfigError(f"--model: expected its weights with --weights, found {checkpoints[0]}", hint=f"--weights {checkpoints[0]}")
    if model is not None:
        return [weights or ""]
    if not checkpoints:
        raise typer.BadParameter("expected a checkpoint to convert, found none", param_hint="'CHECKPOINT...'")
    if spec is not None and len(checkpoints) > 1:
        raise ConfigError(f"--spec: expected one model, found {len(checkpoints)}", hint="convert them one by one")
    return checkpoints


def _convert_all(
    checkpoints: list[str], configs: list[DeployConfig], options: ConvertOptions, *, offline: bool, sha256: str | None, as_json: bool
) -> tuple[list[tuple[str, Conversion]], list[tuple[str, ModelcrateError]]]:
    """Every checkpoint for every target; one that fails does not stop the others."""
    from modelcrate_converter.convert import convert as convert_one

    out, errors = consoles()
    conversions: list[tuple[str, Conversion]] = []
    failures: list[tuple[str, ModelcrateError]] = []
    owners: dict[str, str] = {}
    for text in checkpoints:
        progress = Progress(errors)
        try:
            with progress:
                path, chosen = locate(text, options, offline=offline, sha256=sha256, report=progress.show)
                errors.print(path.name if path is not None else str(options.builder), style="bold")
                made = convert_one(path, configs, chosen, progress.show, taken=owners)
        except ModelcrateError as error:
            failures.append((text or str(options.builder), error))
            if len(checkpoints) > 1:
                print_failure(errors, error)
            continue
        for conversion in made:
            owners.setdefault(conversion.id, text)
            conversions.append((text or str(options.builder), conversion))
            if not as_json:
                print_conversion(out, conversion)
            if conversion.error is not None and len(checkpoints) * len(configs) > 1:
                print_failure(errors, conversion.error)
    return conversions, failures


def _as_json(checkpoint: str, conversion: Conversion) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "id": conversion.id,
        "target": conversion.target,
        "place": str(conversion.place),
        "status": conversion.status,
        "seconds": {name: round(value, 3) for name, value in conversion.seconds.items()},
        "operators": [{"name": name, "before": before, "after": after} for name, before, after in conversion.op_changes],
        "parity": write_record(conversion.parity) if conversion.parity else None,
        "support": _plain(conversion.support),
        "files": [write_record(entry) for entry in conversion.bundle.manifest.files] if conversion.bundle and conversion.bundle.manifest else [],
        "error": str(conversion.error) if conversion.error else None,
        "hint": conversion.error.hint if conversion.error else "",
        "exit_code": conversion.error.exit_code if conversion.error else 0,
    }


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def _failed_json(checkpoint: str, error: ModelcrateError) -> dict[str, Any]:
    """A checkpoint that failed before any of its targets: the same keys, as far as they are known."""
    return {"checkpoint": checkpoint, "id": None, "target": None, "status": "failed", "error": str(error), "hint": error.hint, "exit_code": error.exit_code}
