"""The figures of README.md: measured into scripts/figures.json, and drawn from there between the page's marks.

usage: .venv/bin/python scripts/figures.py measure [NAME]...     runs the commands and keeps what they say; all of them take a quarter of an hour
       .venv/bin/python scripts/figures.py write [--check]       puts the tables into README.md; --check only says whether they are there

A table's command stands under it. Nothing in a table is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
STORE = ROOT / "scripts/figures.json"
BIN = Path(sys.executable).parent
Found: TypeAlias = dict[str, Any]

ACCURACY = "modelcrate test demo-{0} crates/demo-{0}_* --annotations people/annotations.json"
COMPARED = "modelcrate compare demo-{0} crates/demo-{0}_* people/images"
BEFORE = "modelcrate convert demo-det demo-pose -t all -o crates/\nmodelcrate people --count 200 -o people/"


class Figure(NamedTuple):
    """One table.

    Attributes:
        command: what a reader runs; the JSON of the same command is what is kept.
        measure: runs it in a folder with `crates` and `people`, and gives what is kept.
        draw: the table, from that.
    """

    command: str
    measure: Callable[[Path], Found]
    draw: Callable[[Found], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("names", nargs="*", choices=[*FIGURES, []], metavar="NAME")
    writing = actions.add_parser("write")
    writing.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.action == "measure":
        measure(options.names or list(FIGURES))
        return
    if not STORE.is_file():
        raise SystemExit(f"{STORE}: expected figures, found nothing there: scripts/figures.py measure")
    page = PAGE.read_text(encoding="utf-8")
    drawn = drawn_into(page, json.loads(STORE.read_text(encoding="utf-8")))
    if options.check:
        raise SystemExit(f"{PAGE.name}: its figures are not those of {STORE.name}: scripts/figures.py write" if drawn != page else 0)
    PAGE.write_text(drawn, encoding="utf-8")


def measure(names: list[str]) -> None:
    store = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if any(FIGURES[one].command.startswith("modelcrate") for one in names):
            for line in BEFORE.splitlines():
                run(line.split(), folder)
        for one in names:
            print(f"{one}: {FIGURES[one].command}", flush=True)
            store[one] = without_samples(FIGURES[one].measure(folder))
            STORE.write_text(json.dumps({key: store[key] for key in FIGURES if key in store}, indent=1) + "\n", encoding="utf-8")


def run(words: list[str], folder: Path) -> str:
    """A command in a folder, its wild cards replaced; what it prints."""
    program = [str(BIN / words[0])] if words[0] == "modelcrate" else [sys.executable, str(ROOT / words[1])]
    rest = words[1:] if words[0] == "modelcrate" else words[2:]
    arguments: list[str] = []
    for word in rest:
        arguments += sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]
    done = subprocess.run([*program, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def drawn_into(page: str, store: Mapping[str, Found]) -> str:
    """The page with the table of each mark in its place."""

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in FIGURES or name not in store:
            raise SystemExit(f"{PAGE.name}: figures: expected one of {', '.join(store)}, found {name}")
        figure = FIGURES[name]
        return f"<!-- figures: {name} -->\n{figure.draw(store[name])}\n\n`{figure.command}`\n<!-- end -->"

    return re.sub(r"<!-- figures: ([\w-]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def table_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------------------------------ tables


def of_command(name: str) -> Callable[[Path], Found]:
    """Runs a `modelcrate` command with --json."""
    return lambda folder: json.loads(run([*FIGURES[name].command.split(), "--json"], folder))


def of_script(name: str) -> Callable[[Path], Found]:
    """Runs a script with --json FILE."""

    def measure(folder: Path) -> Found:
        place = folder / "figures.json"
        words = FIGURES[name].command.rpartition("&& ")[2].split()
        run([*words, "--json", str(place)], folder)
        found = json.loads(place.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {"rows": found}

    return measure


def without_samples(found: Any) -> Any:
    """Raw samples are for whoever measures; the page keeps what is said of them."""
    if isinstance(found, dict):
        return {key: without_samples(value) for key, value in found.items() if key not in {"samples", "rounds_s", "doubts", "system"}}
    if isinstance(found, list):
        return [without_samples(value) for value in found]
    return None if isinstance(found, float) and math.isnan(found) else found  # JSON has no word for it


def accuracy_table(found: Found) -> str:
    """AP and what a target loses of the checkpoint's, in points."""
    (metric,) = (key for key in found["subjects"][0]["figures"] if key in {"bbox", "keypoints"})
    names = ("AP", "AP50", "AP75", "AR100" if metric == "bbox" else "AR")
    rows = []
    for subject in found["subjects"]:
        values = [f"{100 * subject['figures'][metric][name]:.2f}" for name in names]
        lost = "" if subject["name"] == found["reference"] else f"{subject['drops'][metric]['AP']:+.2f}"
        rows.append([f"`{subject['name']}`", *values, lost])
    return table_of(["", *names, "AP lost"], rows)


def compared_table(found: Found) -> str:
    rows = []
    for i, row in enumerate(found["rows"]):
        of = row["ratio"]
        times = f"{of['times']:.2f} ({of['low']:.2f} to {of['high']:.2f})" if i else "1"
        rows.append([f"`{row['name']}`", f"{row['latency']['median_ms']:.2f}", f"{row['latency']['p99_ms']:.2f}", times])
    return table_of([f"{found['what']}", "median, ms", "p99, ms", "times as fast (95 %)"], rows)


def runtime_table(found: Found) -> str:
    return table_of(["what", "figure", "aim"], [[row["what"], row["shown"], row["bar"]] for row in found["rows"]])


def targets_table(found: Found) -> str:
    one, boxes = found["one"], found["boxes"]
    rows = [
        [f"`{name}`", f"{one[name]:.2f}", f"{one['onnxruntime'] / one[name]:.2f}", f"{boxes[name]:.1f}", f"{boxes['onnxruntime'] / boxes[name]:.2f}"]
        for name in one
    ]
    return table_of(["target", "ms, one input", "times ONNX Runtime fp32", "ms, 8 boxes", "times"], rows)


def tracker_table(found: Found) -> str:
    rows = []
    for name, row in found.items():
        over = [f"{row['per_second'] / found[peer]['per_second']:.2f}" for peer in ("mmdeploy_runtime", "rtmlib")]
        smooth = ["", ""] if name == "rtmlib" else [f"{row['jitter_px']:.2f}", f"{row['lag']:.2f}"]  # it has no track for three frames
        quality = [f"{row['idf1']:.3f}", str(row["switches"]), f"{row['false']:.3f}", f"{row['recall']:.3f}", f"{row['error_px']:.2f}"]
        rows.append([name, f"{row['per_second']:.1f}", *over, *quality, *smooth])
    header = ["tracker", "frames/s", "over mmdeploy", "over rtmlib", "IDF1", "switches", "false/frame", "recall", "error px", "jitter px", "lag frames"]
    return table_of(header, rows)


def peers_table(found: Found) -> str:
    """Ours and the fastest target's, as times of each peer's."""
    peers = ("mmdeploy_runtime", "rtmlib")
    rows = []
    for row in found["rows"]:
        for name, of in row["contenders"].items():
            if name in peers:
                continue
            times = [f"{of['times'][peer]['times']:.2f} ({of['times'][peer]['low']:.2f} to {of['times'][peer]['high']:.2f})" for peer in peers]
            rows.append([row["what"], name, f"{of['latency']['median_ms']:.2f}", *times])
    return table_of(["what", "", "median, ms", *(f"times {peer}" for peer in peers)], rows)


FIGURES: Mapping[str, Figure] = {
    "accuracy-det": Figure(ACCURACY.format("det"), of_command("accuracy-det"), accuracy_table),
    "accuracy-pose": Figure(ACCURACY.format("pose"), of_command("accuracy-pose"), accuracy_table),
    "compare-det": Figure(COMPARED.format("det"), of_command("compare-det"), compared_table),
    "compare-pose": Figure(COMPARED.format("pose"), of_command("compare-pose"), compared_table),
    "targets": Figure(".venv/bin/python scripts/bench_targets.py --rounds 30", of_script("targets"), targets_table),
    "runtime": Figure("scripts/setup-sdk && .venv/bin/python scripts/bench_runtime.py --rounds 30", of_script("runtime"), runtime_table),
    "peers": Figure("scripts/setup-peers && .venv/bin/python scripts/bench_peers.py --rounds 8 --frames 40", of_script("peers"), peers_table),
    "tracker": Figure("scripts/setup-peers && .venv/bin/python scripts/bench_tracker.py --rounds 2", of_script("tracker"), tracker_table),
    "tracker-m": Figure(
        "scripts/setup-peers && .venv/bin/python scripts/bench_tracker.py --pose-size m --frames 120 --rounds 2", of_script("tracker-m"), tracker_table
    ),
}


if __name__ == "__main__":
    main()
