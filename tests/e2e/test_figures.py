"""The tables of README.md are drawn from what was measured; nothing in them is typed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modelcrate_runtime.average_precision import BOX_FIGURES, KEYPOINT_FIGURES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """scripts/figures.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("figures_of_the_page", ROOT / "scripts/figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(table: str) -> list[list[str]]:
    """Rows of a table of Markdown, header first; each has as many cells."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert rows[1] == ["---", *["---:"] * (len(rows[0]) - 1)]
    return [rows[0], *rows[2:]]


# ------------------------------------------------------------------------------------------------------------------------ the page


def test_tables_of_the_page_are_those_that_were_measured() -> None:
    assert (ROOT / "scripts/figures.json").is_file(), "scripts/figures.json is not there: .venv/bin/python scripts/figures.py measure, and write"
    done = subprocess.run([sys.executable, ROOT / "scripts/figures.py", "write", "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_mark_has_its_figure_and_every_figure_its_mark(figures: ModuleType) -> None:
    begun = re.findall(r"<!-- figures: (.*?) -->", README)
    assert sorted(begun) == sorted(figures.FIGURES)
    assert re.findall(r"<!-- (figures|end)\b", README) == ["figures", "end"] * len(begun), "each mark is closed before the next one"


def test_commands_under_the_tables_are_commands_that_there_are(figures: ModuleType) -> None:
    """`modelcrate` as test_pages.py has it; scripts by their files."""
    import typer.main

    from modelcrate_converter.cli import app

    assert len({figure.command for figure in figures.FIGURES.values()}) == len(figures.FIGURES)
    for figure in figures.FIGURES.values():
        words = figure.command.split()
        if words[0] == "modelcrate":
            command: Any = typer.main.get_command(app)
            with command.commands[words[1]].make_context(words[1], words[2:]) as context:
                assert context.params
            continue
        assert all((ROOT / word).is_file() for word in words if word.startswith("scripts/"))
        script = next(word for word in words if word.endswith(".py"))
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in [*words, "--json"] if word.startswith("--"))


def test_tables_are_put_between_the_marks_and_nowhere_else(figures: ModuleType) -> None:
    page = "before\n\n<!-- figures: runtime -->\nold | table\n<!-- end -->\n\nbetween\n\n<!-- figures: compare-det -->\n<!-- end -->\nafter\n"
    store = {"runtime": RUNTIME, "compare-det": COMPARED}
    drawn = figures.drawn_into(page, store)
    assert "old | table" not in drawn
    parts = re.split(r"<!-- figures: [\w-]+ -->\n.*?\n\n`(.*?)`\n<!-- end -->", drawn, flags=re.DOTALL)
    assert parts[::2] == ["before\n\n", "\n\nbetween\n\n", "\nafter\n"]
    assert parts[1::2] == [figures.FIGURES[name].command for name in ("runtime", "compare-det")]
    assert figures.drawn_into(drawn, store) == drawn, "again is the same"


@pytest.mark.parametrize("name", ["nothing-like-it", "targets"])
def test_a_mark_without_figures_is_named(figures: ModuleType, name: str) -> None:
    with pytest.raises(SystemExit, match=rf"README\.md: figures: expected one of runtime, found {name}"):
        figures.drawn_into(f"<!-- figures: {name} -->\n<!-- end -->", {"runtime": RUNTIME})


@pytest.mark.parametrize("action", [["write"], ["write", "--check"]], ids=" ".join)
def test_without_a_file_of_figures_it_is_one_line(figures: ModuleType, action: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("<!-- figures: runtime -->\n<!-- end -->", encoding="utf-8")
    monkeypatch.setattr(figures, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(figures, "STORE", tmp_path / "figures.json")
    monkeypatch.setattr(sys, "argv", ["figures.py", *action])
    with pytest.raises(SystemExit, match=r"figures\.json.*figures\.py measure"):
        figures.main()


def test_check_says_whether_and_write_writes(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    page = tmp_path / "README.md"
    page.write_text("# Page\n<!-- figures: runtime -->\n<!-- end -->\n", encoding="utf-8")
    (tmp_path / "figures.json").write_text(json.dumps({"runtime": RUNTIME}), encoding="utf-8")
    monkeypatch.setattr(figures, "PAGE", page)
    monkeypatch.setattr(figures, "STORE", tmp_path / "figures.json")

    def code_of(*action: str) -> object:
        monkeypatch.setattr(sys, "argv", ["figures.py", *action])
        with pytest.raises(SystemExit) as caught:
            figures.main()
        return caught.value.code

    before = page.read_bytes()
    assert "its figures are not those of figures.json" in str(code_of("write", "--check"))
    assert page.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["figures.py", "write"])
    figures.main()
    assert "| cold | 0.50 s | <= 0.7 s |" in page.read_text(encoding="utf-8")
    assert code_of("write", "--check") == 0
    assert code_of("measure", "nothing-like-it") == 2


# ---------------------------------------------------------------------------------------------------------------------- the tables

RUNTIME = {"rows": [{"what": "cold", "seconds": [0.5], "shown": "0.50 s", "bar": "<= 0.7 s"}, {"what": "share", "share": 0.04, "shown": "4 %", "bar": "<= 5 %"}]}
RATIO = {"times": 3.0041, "low": 2.955, "high": 3.0561, "confidence": 0.95, "rounds": 50}
COMPARED = {
    "what": "image to result",
    "rows": [
        {"name": "demo-det_pytorch", "latency": {"median_ms": 9.128, "p99_ms": 12.0}, "ratio": RATIO | {"times": 1.0, "low": 1.0, "high": 1.0}},
        {"name": "demo-det_onnxruntime", "latency": {"median_ms": 3.041, "p99_ms": 4.449}, "ratio": RATIO},
    ],
}


def accuracy(metric: str, names: Any, *values: float) -> dict[str, Any]:
    """What `modelcrate test --json` says of a reference and a bundle, all of whose figures are these."""
    subjects = [
        {"name": name, "figures": {metric: dict.fromkeys(names, value)}, "drops": {metric: {key: 100 * (values[0] - value) for key in names}}}
        for name, value in zip(("demo_pytorch", "demo_onnxruntime-int8"), values, strict=True)
    ]
    return {"reference": "demo_pytorch", "metrics": [metric], "subjects": subjects}


@pytest.mark.parametrize(("name", "metric", "keys"), [("accuracy-det", "bbox", BOX_FIGURES), ("accuracy-pose", "keypoints", KEYPOINT_FIGURES)])
def test_accuracy_is_in_percent_and_its_loss_in_points(figures: ModuleType, name: str, metric: str, keys: Any) -> None:
    """Of detectors too, whose recall has another name: AR of a hundred boxes."""
    header, *rows = cells(figures.FIGURES[name].draw(accuracy(metric, keys, 0.8125, 0.8)))
    assert header[0] == ""
    assert header[1:4] == ["AP", "AP50", "AP75"]
    assert header[4].startswith("AR")
    assert header[-1] == "AP lost"
    assert rows == [["`demo_pytorch`", *["81.25"] * 4, ""], ["`demo_onnxruntime-int8`", *["80.00"] * 4, "+1.25"]]


@pytest.mark.parametrize("name", ["compare-det", "compare-pose"])
def test_comparisons_have_their_intervals(figures: ModuleType, name: str) -> None:
    header, *rows = cells(figures.FIGURES[name].draw(COMPARED))
    assert header == ["image to result", "median, ms", "p99, ms", "times as fast (95 %)"]
    assert rows == [["`demo-det_pytorch`", "9.13", "12.00", "1"], ["`demo-det_onnxruntime`", "3.04", "4.45", "3.00 (2.96 to 3.06)"]]


def test_the_runtime_against_its_aims(figures: ModuleType) -> None:
    header, *rows = cells(figures.FIGURES["runtime"].draw(RUNTIME))
    assert header == ["what", "figure", "aim"]
    assert rows == [["cold", "0.50 s", "<= 0.7 s"], ["share", "4 %", "<= 5 %"]]


def test_targets_by_onnx_runtime(figures: ModuleType) -> None:
    header, *rows = cells(figures.FIGURES["targets"].draw({"one": {"onnxruntime": 20.0, "openvino-int8": 5.0}, "boxes": {"onnxruntime": 160.0, "openvino-int8": 32.0}}))
    assert len(header) == 5
    assert rows == [["`onnxruntime`", "20.00", "1.00", "160.0", "1.00"], ["`openvino-int8`", "5.00", "4.00", "32.0", "5.00"]]


def test_peers_are_what_others_are_compared_with(figures: ModuleType) -> None:
    times = {"mmdeploy_runtime": {"times": 1.3, "low": 1.25, "high": 1.35}, "rtmlib": {"times": 2.0, "low": 1.9, "high": 2.1}}
    one = {"latency": {"median_ms": 4.0}, "times": times}
    rows = [{"what": "detector", "contenders": {"modelcrate": one, "modelcrate openvino-int8": one, "mmdeploy_runtime": one, "rtmlib": one}}]
    header, *drawn = cells(figures.FIGURES["peers"].draw({"rows": rows}))
    assert header == ["what", "", "median, ms", "times mmdeploy_runtime", "times rtmlib"]
    assert drawn == [["detector", name, "4.00", "1.30 (1.25 to 1.35)", "2.00 (1.90 to 2.10)"] for name in ("modelcrate", "modelcrate openvino-int8")]


def test_trackers_beside_each_other(figures: ModuleType) -> None:
    row = {"per_second": 30.0, "idf1": 0.81234, "switches": 3, "false": 0.0123, "recall": 0.95, "error_px": 1.234, "jitter_px": 0.5, "lag": 0.25}
    found = {"modelcrate": row | {"per_second": 60.0}, "mmdeploy_runtime": row, "rtmlib": row | {"per_second": 20.0}}
    header, *rows = cells(figures.FIGURES["tracker"].draw(found))
    assert (len(header), header[:4], header[-2:]) == (11, ["tracker", "frames/s", "over mmdeploy", "over rtmlib"], ["jitter px", "lag frames"])
    quality = ["0.812", "3", "0.012", "0.950", "1.23"]
    assert rows == [
        ["modelcrate", "60.0", "2.00", "3.00", *quality, "0.50", "0.25"],
        ["mmdeploy_runtime", "30.0", "1.00", "1.50", *quality, "0.50", "0.25"],
        ["rtmlib", "20.0", "0.67", "1.00", *quality, "", ""],
    ]


def test_what_is_kept_has_no_samples(figures: ModuleType) -> None:
    raw = {"samples": [1], "rows": [{"samples": {"call": [1]}, "name": "a", "doubts": [], "rounds_s": [1], "deeper": {"samples": 1, "x": [1, {"samples": 2}]}}]}
    assert figures.without_samples(raw) == {"rows": [{"name": "a", "deeper": {"x": [1, {}]}}]}
