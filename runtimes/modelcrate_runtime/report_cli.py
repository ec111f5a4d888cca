"""The command `modelcrate report`: all bundles of a folder on one page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from modelcrate_bundle.errors import ConfigError, InputError
from modelcrate_runtime.cli import CUDA_BINDING, DEVICE, DEVICE_ID, THREADS, app, consoles, exit_on_error
from modelcrate_runtime.profile_cli import numbers, progress


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Argument(help="Folder of bundles.")] = None,
    images: Annotated[list[Path] | None, typer.Argument(help="Images, or folders of them, to time on. Default: a picture of noise.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; Markdown and JSON of the same name are written beside it.")] = Path("report.html"),
    reference: Annotated[list[str] | None, typer.Option("--reference", "-r", help="A checkpoint to show beside its bundles. May be repeated.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each kind.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each kind that do not count.")] = 20,
    batch: Annotated[str, typer.Option(help="Inputs in one call of the network; several with commas.")] = "1",
    boxes: Annotated[int, typer.Option(min=1, help="Crops in one call of a pose estimator.")] = 1,
    annotations: Annotated[Path | None, typer.Option(help="COCO annotations, or labels of a classifier, to measure accuracy on.")] = None,
    annotated: Annotated[Path | None, typer.Option("--annotated", help="Folder of their images; default: the annotations' own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many annotated images, the first ones.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Draw the page again from the JSON of a report; nothing is measured.")] = None,
    device: DEVICE = "",
    device_id: DEVICE_ID = 0,
    cuda_binding: CUDA_BINDING = None,
    threads: THREADS = None,
) -> None:
    """Measure all bundles of a folder, and write one page: accuracy and latency, stages, calls, parity, sizes, the machine. It opens offline."""
    with exit_on_error():
        from modelcrate_runtime.images import image_files, write_bytes
        from modelcrate_runtime.profiler import ProfileOptions
        from modelcrate_runtime.report_pages import html_page, markdown_page, require_report
        from modelcrate_runtime.reporting import ReportOptions, measure_report, read_report, score_on, write_json

        require_report()
        if (folder is None) == (source is None):
            raise ConfigError("expected a folder of bundles or --from, found " + ("both" if folder else "neither"), hint="modelcrate report crates/")
        if out.suffix not in {".html", ".htm"}:
            raise ConfigError(f"{out}: expected a name that ends with .html, found {out.suffix or 'no suffix'!r}", hint="-o report.html")
        if source is not None:
            given = [name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
            useless = next((name for name in given if name not in {"source", "out"}), None)
            if useless is not None:
                option = f"--{useless.replace('_', '-')}"
                raise ConfigError(f"--from: expected nothing beside it but --out, since nothing is measured, found {option}", hint=f"leave {option} out")
            found = read_report(source)
        else:
            assert folder is not None
            # Of one bundle, data that does not suit it is a line; what is not there suits none.
            for option, place in (("--annotations", annotations), ("--annotated", annotated)):
                if place is not None and not place.exists():
                    raise InputError(f"{place}: expected what {option} is about, found nothing there", hint="check the path")
            options = ReportOptions(
                profile=ProfileOptions(
                    warmup=warmup,
                    runs=runs,
                    batches=numbers("--batch", batch) or (1,),
                    threads=(threads,),
                    cold=3,
                    device=device,
                    device_id=device_id,
                    cuda_binding=cuda_binding,
                ),
                boxes=boxes,
                compare_runs=runs,
                score=score_on(annotations, annotated, limit=limit) if annotations is not None else None,
            )
            files = [file for path in images or [] for file in image_files(path)]
            with progress("report") as tell:
                command = shlex.join(["modelcrate", *sys.argv[1:]])
                found = measure_report(folder, reference or [], files, options, command=command, tell=tell)
        pages = {out: html_page(found).encode(), out.with_suffix(".md"): markdown_page(found).encode(), out.with_suffix(".json"): write_json(found)}
        # What is drawn from stays as it is, however it was spelled.
        places = [path for path in pages if source is None or not (path.exists() and path.samefile(source))]
        for path in places:
            write_bytes(path, pages[path], option="--out")
        consoles()[0].print(f"wrote {', '.join(str(path) for path in places)}", soft_wrap=True)
