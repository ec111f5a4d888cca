"""The command line of a device: run, inspect, backends. `modelcrate_converter.cli` adds what a build machine can do.

Only here is anything printed, and only `exit_on_error` turns an error into an exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, InputError, MissingBackendError, ModelcrateError, OutputError, TaskMismatchError
from modelcrate_bundle.schema import write_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from modelcrate_runtime.tasks import Network
    from modelcrate_runtime.top_down import Instance

app = typer.Typer(
    name="modelcrate", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
INTERRUPTED: Final = 130
_interrupts: Final[list[int]] = []
# What commands have in common.
DEVICE = Annotated[str, typer.Option(help="cpu or cuda; default: cuda for TensorRT, cpu for all others.")]
DEVICE_ID = Annotated[int, typer.Option("--device-id", "--device_id", min=0, help="Which of them.")]
CUDA_BINDING = Annotated[str | None, typer.Option(help="TensorRT: cuda-python or pycuda; default: what is installed.")]
THREADS = Annotated[int | None, typer.Option(min=1, help="Threads inside one operator; default: one per usable core.")]
JSON_OPTION = typer.Option("--json", help="Print JSON instead of tables.")


def consoles() -> tuple[Console, Console]:
    """Where results go and where errors and progress go. Names from files and bundles are printed as they are: markup is off."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to `exit_on_error`, which knows that a reader who has seen enough is no failure."""
            raise BrokenPipeError

    return PlainConsole(highlight=False, markup=False, emoji=False), PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error in one line with its hint, and exit with its code. MODELCRATE_TRACEBACK=1 shows where it came from."""

    def stop(_number: int, _frame: object) -> None:
        _interrupts.append(_number)
        raise KeyboardInterrupt

    # A service manager's SIGTERM cleans up like Ctrl-C does.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    _interrupts.clear()
    try:
        yield
        raise_if_interrupted()
    except ModelcrateError as error:
        if os.environ.get("MODELCRATE_TRACEBACK"):
            raise
        _, errors = consoles()
        errors.print(f"error: {error}", style="bold red", soft_wrap=True)
        if error.hint:
            errors.print(f" hint: {error.hint}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        _, errors = consoles()
        errors.print("interrupted: no half-written bundle or picture was left behind", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        # What no module expected: a full disk behind standard output, a path that the system cannot take.
        _, errors = consoles()
        errors.print(
            f"error: {error.filename or 'output'}: expected to read or write it, found: {error.strerror or error}"[:400], style="bold red", soft_wrap=True
        )
        raise typer.Exit(OutputError.exit_code) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """Interrupt now if a signal came earlier: one that comes while a C++ library calls back into Python is caught there and forgotten."""
    if _interrupts:
        raise KeyboardInterrupt


@app.command()
def run(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="One or two bundles (detector, pose estimator, or both for top-down), then images or folders of images.", metavar="BUNDLE... IMAGE..."
        ),
    ],
    save: Annotated[
        Path | None, typer.Option("--save", "--output", help="Draw the results: a picture for one image, a folder for several. Raw tensors: .npz files.")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            help="A box for the pose estimator or a network of crops: left,top,right,bottom in pixels. May be repeated. Without one: the whole image."
        ),
    ] = None,
    det_thr: Annotated[float, typer.Option("--det-thr", "--det_thr", min=0, max=1, help="Least score of a detection.")] = 0.3,
    det_label: Annotated[int, typer.Option("--det-label", "--det_label", min=0, help="Top-down: class of the detections that get a pose.")] = 0,
    det_min_bbox_size: Annotated[
        float, typer.Option("--det-min-bbox-size", "--det_min_bbox_size", help="Least size of a detection: the square root of its area in pixels.")
    ] = -1.0,
    kpt_thr: Annotated[float, typer.Option("--kpt-thr", "--pose-thr", "--pose_thr", help="Least score of a keypoint that is drawn.")] = 0.3,
    skeleton: Annotated[str | None, typer.Option(help="Links and colours: a set's name, or a file of MMDeploy's form. Default: the bundle's own.")] = None,
    geometry: Annotated[Literal["exact", "sdk"] | None, typer.Option(help="Crop and box convention; default: the bundle's own.")] = None,
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    cuda_binding: CUDA_BINDING = None,
    threads: THREADS = None,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Run bundles on images; print a table or COCO-style JSON, draw pictures."""
    with exit_on_error():
        from modelcrate_runtime.images import IMAGE_SUFFIXES, image_files, write_image
        from modelcrate_runtime.skeletons import read_skeleton
        from modelcrate_runtime.tasks import Network
        from modelcrate_runtime.top_down import Runner

        bundles, paths = _split_inputs(inputs)
        files = [file for path in paths for file in image_files(path)]
        boxes = [_parse_box(text) for text in box or []] or None
        out, errors = consoles()
        collected: list[dict[str, Any]] = []
        unusable: list[InputError] = []
        plain = [file.name for file in files]
        names = {file: file.name if plain.count(file.name) == 1 else str(file) for file in files}
        if any(bundle.pipeline.postprocess.module == "modelcrate" for bundle in bundles):
            if len(bundles) > 1:
                raise TaskMismatchError("expected a network of raw tensors alone, found another bundle beside it", hint="run them one by one")
            with Network(bundles[0], device, device_id, geometry=geometry, threads=threads, cuda_binding=cuda_binding) as network:
                _run_network(network, files, names, boxes, save=save, as_json=as_json)
            return
        targets = _places(save, files, suffixes=tuple(sorted(IMAGE_SUFFIXES)), default=".png")
        with Runner.open(
            bundles, geometry=geometry, device=device, device_id=device_id, threads=threads, cuda_binding=cuda_binding, det_thr=det_thr, det_label=det_label
        ) as runner:
            runner.det_min_bbox_size = det_min_bbox_size
            if skeleton is not None:
                runner.choose_skeleton(read_skeleton(skeleton))
            for index, image in _images(files, unusable):
                instances = runner.run(image, boxes)
                if as_json:
                    collected += [instance.coco(names[files[index]]) for instance in instances]
                else:
                    _print_instances(out, files[index], instances, runner)
                if targets:
                    write_image(targets[index], runner.draw(image, instances, kpt_thr=kpt_thr))
                    errors.print(f"wrote {targets[index]}", style="dim")
        if as_json:
            sys.stdout.write(json.dumps(collected, indent=1) + "\n")
        _raise_unusable(unusable, files)


def _images(files: list[Path], unusable: list[InputError]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The images that can be read, with their numbers; of several, one that cannot is said and put into `unusable`."""
    from modelcrate_runtime.images import read_image

    for index, file in enumerate(files):
        try:
            image = read_image(file)
        except InputError as error:
            if len(files) == 1:
                raise
            unusable.append(error)  # the others are not to suffer for it
            consoles()[1].print(f"skipped: {error}", style="yellow", soft_wrap=True)
            continue
        yield index, image


def _raise_unusable(unusable: list[InputError], files: list[Path]) -> None:
    if unusable:
        raise InputError(f"expected {len(files)} images, found {len(unusable)} that cannot be used: the results are of the others", hint="see the lines above")


def _run_network(network: Network, files: list[Path], names: dict[Path, str], boxes: list[list[float]] | None, *, save: Path | None, as_json: bool) -> None:
    """What can be said of tensors whose meaning only the caller knows: shapes and ranges; and the tensors themselves as .npz files."""
    from rich.table import Table

    from modelcrate_runtime.images import write_arrays

    out, errors = consoles()
    collected: list[dict[str, Any]] = []
    unusable: list[InputError] = []
    targets = _places(save, files, suffixes=(".npz",), default=".npz")
    for index, image in _images(files, unusable):
        tensors = network(image, boxes)
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "dtype": str(value.dtype),
                "shape": list(value.shape),
                **{what: float(getattr(value, what)()) if value.size else None for what in ("min", "mean", "max")},
            }
            for name, value in tensors.outputs.items()
        ]
        if as_json:
            collected.append({"file_name": names[files[index]], "outputs": rows})
        else:
            out.print(str(files[index]), style="italic", soft_wrap=True)
            table = Table("output", "dtype", "shape")
            for what in ("least", "mean", "greatest"):
                table.add_column(what, justify="right")
            for row in rows:
                figures = ["" if row[what] is None else f"{row[what]:.6g}" for what in ("min", "mean", "max")]
                table.add_row(row["name"], row["dtype"], " x ".join(map(str, row["shape"])), *figures)
            out.print(table)
        if targets:
            write_arrays(targets[index], tensors.outputs)
            errors.print(f"wrote {targets[index]}", style="dim")
    if as_json:
        import msgspec

        # It writes NaN and infinity as null, since JSON has no word for them.
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(collected), indent=1).decode() + "\n")
    _raise_unusable(unusable, files)


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder or a zip of it.")],
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Show what a bundle is, and check its files against its hashes."""
    with exit_on_error():
        opened = Bundle.open(bundle)
        opened.verify()
        if as_json:
            import msgspec

            raw = {
                "root": os.fsencode(opened.root).decode("utf-8", "replace"),
                "deploy": write_record(opened.deploy),
                "manifest": write_record(opened.manifest) if opened.manifest else None,
            }
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(raw), indent=1).decode() + "\n")
            return
        _print_bundle(opened)


def backend_rows(*, can_build: dict[str, tuple[bool, str]]) -> list[dict[str, Any]]:
    """One row per backend.

    Args:
        can_build: backend -> whether it can be built for here, and the command that would make it so.
    """
    from modelcrate_runtime.sessions import BACKENDS
    from modelcrate_runtime.sessions.cuda_device import find_gpu, require_binding

    rows = []
    for name, backend in BACKENDS.items():
        version, details = None, ""
        if backend.is_installed:
            module = importlib.import_module(backend.module)
            version = str(getattr(module, "__version__", "unknown"))
            details = ", ".join(module.get_available_providers()) if name == "onnxruntime" else ""
        lacks = ""
        if backend.is_installed and backend.device == "cuda":
            try:
                details = find_gpu().name
                require_binding()
            except MissingBackendError as error:
                lacks = f"{error} ({error.hint})"
        builds, build_hint = can_build.get(name, (False, f"pip install 'modelcrate[convert,{backend.extra}]'"))
        hints = ([] if backend.is_installed else [backend.install_command]) + ([] if builds else [build_hint])
        rows.append(
            {
                "backend": name,
                "version": version,
                "can_build": builds,
                "can_run": version is not None and not lacks,
                "details": details,
                "install": lacks or (hints[-1] if hints else ""),
            }
        )
    return rows


def print_backends(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """The table of backends."""
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    from rich.table import Table

    out, _ = consoles()
    table = Table()
    for heading in ("backend", "version", "can build", "can run", "providers or GPU"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["backend"], row["version"] or "not installed", _yes(row["can_build"]), _yes(row["can_run"]), row["details"])
    out.print(table)
    for row in rows:
        if row["install"]:
            what = "run" if not row["can_run"] else "build for"
            out.print(f"to {what} {row['backend']}: {row['install']}", soft_wrap=True)


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _split_inputs(inputs: list[str]) -> tuple[list[Bundle], list[Path]]:
    """Bundles first, then images: whatever has a deploy.json, or is a zip, is a bundle."""
    bundles: list[Bundle] = []
    paths: list[Path] = []
    for text in inputs:
        path = Path(text)
        is_bundle = (path / "deploy.json").is_file() or (path.is_file() and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)))
        if is_bundle and paths:
            raise ConfigError(f"expected bundles before images, found {text} after {paths[0]}", hint="modelcrate run BUNDLE... IMAGE...")
        if is_bundle or (not bundles and not paths and not path.is_file()):
            bundles.append(Bundle.open(path))
        else:
            paths.append(path)
    if not bundles:
        raise ConfigError(f"expected a bundle first, found {inputs[0]}", hint="modelcrate run crates/rtmdet-nano_onnxruntime image.jpg")
    if len(bundles) > 2:
        raise ConfigError(f"expected one or two bundles, found {len(bundles)}")
    if not paths:
        raise InputError("expected at least one image after the bundles, found none", hint="modelcrate run crates/rtmdet-nano_onnxruntime image.jpg")
    return bundles, paths


def _places(save: Path | None, files: list[Path], *, suffixes: tuple[str, ...], default: str) -> list[Path]:
    """Where the result of each image goes: `save` itself for one image, else a file in it; a number where two would have the same name.

    Raises:
        OutputError: a place that makes no sense, or that an input has. Said before the first network runs.
    """
    if save is None:
        return []
    is_file = save.suffix.lower() in suffixes and not save.is_dir()
    if is_file and len(files) > 1:
        raise OutputError(f"--save {save}: expected a folder for {len(files)} images, found the name of a file", hint="--save results/")
    if not is_file and len(files) == 1 and save.suffix and not save.is_dir():
        raise OutputError(f"--save {save}: expected one of {', '.join(suffixes)} or a folder, found {save.suffix!r}", hint=f"name the file like out{default}")
    if (save / "deploy.json").is_file() or str(save) == ".":
        raise OutputError(
            f"--save {save}: expected a place for results, found {'a bundle' if str(save) != '.' else 'the current folder'}", hint="--save results/"
        )
    places: list[Path] = []
    for file in files:
        place, number = save if is_file else save / f"{file.stem}{default}", 1
        while place in places:
            number += 1
            place = save / f"{file.stem}-{number}{default}"
        places.append(place)
    inputs = {file.resolve() for file in files}
    taken = next((place for place in places if place.resolve() in inputs), None)
    if taken is not None:
        raise OutputError(f"--save {save}: expected another place than the images', found that {taken} is one of them", hint="--save results/")
    return places


def _parse_box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.replace(" ", "").split(",")]
    except ValueError as error:
        raise InputError(f"--box: expected left,top,right,bottom, found {text!r}") from error
    if len(numbers) != 4:
        raise InputError(f"--box: expected four numbers, found {len(numbers)}", hint="--box 10,20,200,300")
    return numbers


def _print_instances(out: Console, file: Path, instances: list[Instance], runner: Any) -> None:
    from rich.table import Table

    if not instances:
        out.print(f"{file}: nothing above the threshold")
        return
    has_keypoints = any(instance.keypoints is not None for instance in instances)
    out.print(str(file), style="italic", soft_wrap=True)
    table = Table()
    for heading in ["", "class", "box (left, top, right, bottom)", "score"] + (["keypoints", "mean keypoint score"] if has_keypoints else []):
        table.add_column(heading, no_wrap=heading.startswith("box"))
    for i, instance in enumerate(instances):
        corners = ", ".join(f"{v:.2f}" for v in instance.box_xyxy)
        row = [str(i), instance.class_name, f"({corners})", "" if instance.score is None else f"{instance.score:.3f}"]
        if has_keypoints and instance.keypoints is not None:
            row += [str(len(instance.keypoints)), f"{instance.keypoints[:, 2].mean():.3f}"]
        table.add_row(*row)
    out.print(table)
    if has_keypoints and len(instances) == 1 and instances[0].keypoints is not None:
        points = Table("keypoint", "x", "y", "score")
        for name, (x, y, score) in zip(runner.keypoint_names, instances[0].keypoints, strict=False):
            points.add_row(name, f"{x:.2f}", f"{y:.2f}", f"{score:.3f}")
        out.print(points)


def _print_bundle(bundle: Bundle) -> None:
    from rich.table import Table

    out, _ = consoles()
    manifest = bundle.manifest
    out.print(str(bundle.root), style="italic", soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("task", str(bundle.deploy.task))
    table.add_row("backend", bundle.model.backend)
    table.add_row("component", f"{bundle.pipeline.postprocess.module}.{bundle.pipeline.postprocess.component}")
    if manifest is None:
        table.add_row("manifest", "none: written by MMDeploy; nothing to check it against")
        out.print(table)
        return
    table.add_row("precision", manifest.precision)
    table.add_row("geometry", manifest.geometry)
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            table.add_row(kind, f"{spec.name} {spec.dtype} {' x '.join(map(str, spec.shape))}")
    table.add_row("checkpoint", f"{manifest.provenance.checkpoint} {manifest.provenance.checkpoint_sha256[:16]}")
    table.add_row("parity", "passed" if manifest.parity.passed else "not verified")
    for entry in manifest.files:
        table.add_row(entry.role, f"{entry.path} {entry.bytes} bytes, SHA-256 {entry.sha256[:16]}: unchanged")
    out.print(table)
