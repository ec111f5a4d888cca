"""The pages of a report: what stands in them, that they need nothing else, and that no name breaks them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from made_reports import HOST, full_report, made_entry, made_group, made_parity, made_profile, made_report, made_score
from modelcrate_bundle.errors import MissingBackendError
from modelcrate_runtime.reporting import Entry, Report

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'modelcrate[report]'")
pytest.importorskip("jinja2", reason="needs jinja2: pip install 'modelcrate[report]'")

from modelcrate_runtime import report_pages
from modelcrate_runtime.report_pages import html_page, markdown_page, require_report

NASTY = ['<b>"&|', "<script>alert('1')</script>", "tail--> <!-- ]]>", "$x$ $\\frac{$", "_hidden", "日本 ⚙", "new\nline", "a|b|c", "%s {0} {{ host }}", "`code`", "\\"]


class Page(HTMLParser):
    """What a page consists of. Its tags have to be closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.classes: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._of: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.tags.append((tag, own))
        if tag in self.VOID:
            return
        self._open.append(tag)
        self._of.append(own.get("class", ""))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._of.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open[-2:]):
            self.tables[-1][-1][-1] += data
        if self._of and self._of[-1]:
            self.classes.setdefault(self._of[-1], []).append(data)


def drawings(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)\.</b>", page)


def texts_of(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("text")]


def split_row(line: str) -> list[str]:
    """Cells of a row of Markdown."""
    assert line.startswith("|") and line.endswith("|"), line
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown_tables(page: str) -> list[list[list[str]]]:
    """Each with its header first; the line under it is checked and left out."""
    tables: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        header, rule, *rows = (split_row(line) for line in block.splitlines())
        assert all(re.fullmatch(r"---:?", cell) for cell in rule), rule
        for row in (rule, *rows):
            assert len(row) == len(header), (header, row)
        tables.append([header, *rows])
    return tables


def check_page(report: Report) -> Page:
    """What holds for every page; and the page."""
    text = html_page(report)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}
    ids = [own["id"] for _, own in page.tags if "id" in own]
    assert len(ids) == len(set(ids))
    assert all(own.get(key, "#").startswith("#") for _, own in page.tags for key in ("src", "href", "xlink:href", "action", "srcset", "poster"))
    assert not [own for _, own in page.tags if any(key.startswith("on") for key in own)]
    assert "@import" not in text
    aims = [own[key][1:] for _, own in page.tags for key in ("href", "xlink:href") if key in own]
    for svg in drawings(text):
        ET.fromstring(svg)
        aims += re.findall(r"url\(#([^)]*)\)", re.sub(r"<text.*?</text>", "", svg, flags=re.DOTALL))
    assert all("url(#" in found for found in re.findall(r"url\(.", text))
    assert set(aims) <= set(ids), set(aims) - set(ids)
    assert not re.search(r"#0a0[bc]", text, flags=re.IGNORECASE)
    markdown_tables(markdown_page(report))
    return page


# ------------------------------------------------------------------------------------------------------------------ the whole page


def test_a_page_needs_nothing_else() -> None:
    report = full_report()
    text = check_page(report).raw
    assert set(re.findall(r"\w+://[^\"' <)]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert text.startswith("<!doctype html>\n<html lang=")
    assert "<title>crates: modelcrate report</title>" in text
    assert '<meta charset="utf-8">' in text
    assert "://" not in markdown_page(report)


def test_what_stands_on_a_page() -> None:
    page = check_page(full_report())
    assert page.tables[0][0] == ["bundle", "precision", "AP", "EPE", "worst shift", "median, ms", "p99, ms", "times as fast", "first result, s", "peak memory", "size"]
    assert page.tables[0][1:] == [
        ["pose_pytorch", "fp32", "81.00", "4.0000", "", "9.00", "9.88", "1", "0.37", "192.0 MiB", "2.0 MiB"],
        ["pose_onnxruntime", "fp32", "80.00 (-1.00)", "4.5000 (+0.5000)", "0.013 px", "3.00", "3.29", "3.00 (3.00 to 3.00)", "0.37", "192.0 MiB", "2.0 MiB"],
        ["pose_onnxruntime-int8", "int8", "", "", "0.9 px", "1.50", "1.65", "6.00 (6.00 to 6.00)", "0.37", "192.0 MiB", "2.0 MiB"],
        ["pose_tensorrt", "fp32", "", "", "", "", "", "", "", "", "2.0 MiB"],
    ]
    assert markdown_tables(markdown_page(full_report()))[0] == page.tables[0], "the same in both"
    assert "pose_tensorrt was not run here: needs a GPU" in page.text
    assert "Not a bundle that can be used: crates/broken.zip: expected a zip" in page.text
    assert "30 calls; --runs 200 (pose_onnxruntime)" in page.text
    assert "A Processor, 2 cores" in page.text
    assert titles(page.raw) == ["Accuracy and latency", "Where the time goes", "How calls differ", "Batches", "Where the time goes", "How calls differ"]
    network = next(table for table in page.tables if table[0][:2] == ["bundle", "batch"])
    assert [row[:2] for row in network[1:]] == [
        ["pose_pytorch", "1"], ["pose_pytorch", "2"], ["pose_pytorch", "4"], ["pose_onnxruntime", "1"], ["pose_onnxruntime", "2"], ["pose_onnxruntime-int8", "1"],
    ]  # fmt: skip


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html_page(full_report()) == html_page(full_report())
    assert markdown_page(full_report()) == markdown_page(full_report())


def test_drawing_changes_no_settings_of_matplotlib_and_opens_no_window() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    html_page(full_report())
    assert dict(mpl.rcParams) == before
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        assert pyplot.get_fignums() == []


def test_every_colour_is_one_of_the_page() -> None:
    """So that a drawing is right in light and in dark."""
    text = html_page(full_report())
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL))
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= light
    assert {"--series-0", "--series-1", "--series-2", "--series-3", "--ink", "--faint", "--grid"} <= used
    for svg in drawings(text):
        assert "var(--" in svg
        assert not re.findall(r"(?:fill|stroke|color)\s*[:=]\s*\"?(?:#\w+|rgb|black|white)", svg)


def test_both_pages_have_no_holes() -> None:
    for text in (html_page(full_report()), markdown_page(full_report())):
        assert not [word for word in ("Undefined", "None", "{{", "{%", "\n\n\n") if word in text]
    assert not [line for line in markdown_page(full_report()).splitlines() if line != line.strip()]


# --------------------------------------------------------------------------------------------------------------------------- names


def nasty_report(name: str) -> Report:
    entries = [
        made_entry(f"{name} 1", 9.0, precision=name, scores=[made_score(0.5)], profile=made_profile(f"{name} 1", 9.0, batches=(1, 2))),
        made_entry(f"{name} 2", 3.0, scores=[made_score(0.4)], profile=made_profile(f"{name} 2", 3.0, batches=(1, 2))),
        made_entry(f"{name} 3", profile=None, trouble=f"why: {name}"),
    ]
    return made_report(made_group(entries, model=name), folder=name, command=f"modelcrate {name}", unreadable=[f"bad: {name}"], host=HOST)


@pytest.mark.parametrize("name", NASTY[:7])
def test_a_name_is_text_wherever_it_stands(name: str) -> None:
    report = nasty_report(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = check_page(report)
    flat = " ".join(page.text.split())
    same = " ".join(name.split())
    for text in (f"{same} 1", f"{same} 3 was not run here: why: {same}", f"bad: {same}", f"modelcrate {same}"):
        assert text in flat
    assert [" ".join(row[0].split()) for row in page.tables[0][1:]] == [f"{same} {i}" for i in (1, 2, 3)]
    drawn = [" ".join(text.split()) for svg in drawings(page.raw) for text in texts_of(svg)]
    assert "\n" in name or sum(f"{same} 2" in text for text in drawn) == 4, "at its point, its bar, its histogram, its line"


@pytest.mark.parametrize("name", NASTY)
def test_a_name_breaks_no_table_of_markdown(name: str) -> None:
    text = markdown_page(nasty_report(name))
    tables = markdown_tables(text)
    assert [len(table) for table in tables] == [4, 4, 8]
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 3, "headings: the folder, the model, the machine"
    assert not re.search(r"<[a-zA-Z!/]", re.sub(r": `.*`$", "", text, flags=re.MULTILINE)), "Markdown takes tags as they are, but in code"


@pytest.mark.filterwarnings("error")
def test_long_names_are_drawn() -> None:
    names = [f"rtmpose-m_coco-wholebody-384x288-{'x' * 40}_onnxruntime-int8-{i}" for i in range(4)]
    entries = [made_entry(name, 2.0 + i, profile=made_profile(name, 2.0 + i, batches=(1, 8)), scores=[made_score(0.5 + 0.01 * i)]) for i, name in enumerate(names)]
    check_page(made_report(made_group(entries)))


# --------------------------------------------------------------------------------------------------------------- what may be missing


def table_of(report: Report) -> tuple[list[dict[str, str]], str]:
    """Rows by heading of the table of all bundles, the same in both pages; and the HTML."""
    page = check_page(report)
    assert markdown_tables(markdown_page(report))[0] == page.tables[0]
    header, *rows = page.tables[0]
    return [dict(zip(header, row, strict=True)) for row in rows], page.raw


def test_nothing_could_be_run() -> None:
    report = made_report(made_group([made_entry("a", profile=None, trouble="why"), made_entry("b", profile=None, parity=None, trouble="why not")]))
    rows, html = table_of(report)
    assert [[row[key] for key in ("median, ms", "p99, ms", "times as fast", "first result, s", "peak memory")] for row in rows] == [[""] * 5] * 2
    assert drawings(html) == []
    for text in (html, markdown_page(report)):
        assert "a was not run here: why" in text
        assert "in turns" not in text


def test_what_could_not_be_run_may_come_first() -> None:
    """Then the comparison's base is another one."""
    entries = [made_entry("a", profile=None, trouble="why"), made_entry("b", 4.0), made_entry("c", 2.0, scores=[made_score(0.5)])]
    rows, html = table_of(made_report(made_group(entries)))
    assert [row["times as fast"] for row in rows] == ["", "1", "2.00 (2.00 to 2.00)"]
    assert rows[2]["AP"] == "50.00", "no difference from what has no score"
    assert "against b," in html


def test_without_scores_the_page_says_how_to_get_them() -> None:
    report = made_report(made_group([made_entry("a"), made_entry("b")]))
    rows, html = table_of(report)
    assert "No accuracy was measured" in html
    assert "Accuracy and latency" not in html
    assert len(rows[0]) == 9


def test_without_parity_there_is_no_table_of_it() -> None:
    report = made_report(made_group([made_entry("a", parity=None)]))
    rows, html = table_of(report)
    assert rows[0]["worst shift"] == ""
    assert "arity" not in html.partition("<body>")[2]
    assert "arity" not in markdown_page(report)


def test_a_report_of_no_models() -> None:
    assert "The machine" in check_page(made_report()).text


@pytest.mark.parametrize("count", [1, 2, 12])
def test_any_number_of_entries(count: int) -> None:
    names = [f"pose_target-{i:02}" for i in range(count)]
    entries = [made_entry(name, 1.5 + i, profile=made_profile(name, 1.5 + i, batches=(1, 2)), scores=[made_score(0.8 - 0.01 * i)]) for i, name in enumerate(names)]
    report = made_report(made_group(entries))
    rows, html = table_of(report)
    assert [row["bundle"] for row in rows] == names
    accuracy, stages, calls, batches = drawings(html)
    assert [text for text in texts_of(accuracy) if text.startswith("target")] == [name.removeprefix("pose_") for name in names]
    for svg in (stages, calls, batches):
        assert sorted(text for text in texts_of(svg) if text in names) == names
    assert "ms, median (log scale)" in texts_of(accuracy) if count > 1 else "ms, median" in texts_of(accuracy)


def test_no_two_lines_look_alike() -> None:
    """There are more targets than colours."""
    names = [f"pose_target-{i:02}" for i in range(20)]
    entries = [made_entry(name, 2.0, profile=made_profile(name, 1.5 + i, batches=(1, 2))) for i, name in enumerate(names)]
    svg = drawings(html_page(made_report(made_group(entries))))[-1]
    styles = [style for style in re.findall(r'<path [^>]*style="([^"]*)"', svg) if "fill: none" in style and "--series" in style]
    looks = {(re.search("--series-[0-9]+", style)[0], *re.findall("stroke-dasharray: [^;]*", style)) for style in styles}  # type: ignore[index]
    assert len(looks) == len(names)


def test_entries_that_are_alike_in_all_figures() -> None:
    """No axis without a width."""
    names = ["a", "b"]
    still = {"stages": {"infer": made_profile("a", 1.0).call}, "samples": {"call": [0.001] * 5}}
    entries = [made_entry(name, profile=made_profile(name, 1.0, **still), scores=[made_score(0.0)]) for name in names]
    check_page(made_report(made_group(entries)))


def test_few_calls_and_one_that_took_far_longer() -> None:
    of = {"a": [0.002], "b": [0.002, 0.003], "c": [0.002] * 300 + [2.0]}
    page = check_page(made_report(*(made_group([made_entry(name, profile=made_profile(name, 2.0, samples={"call": samples}))]) for name, samples in of.items())))
    assert [text for svg in drawings(page.raw) for text in texts_of(svg) if "median" in text] == ["ms; median 2.00", "ms; median 2.50", "ms; median 2.00, 1 beyond"]


def test_machines_that_say_little_of_themselves() -> None:
    from dataclasses import replace

    host = replace(HOST, governor=None, frequency_mhz=None, memory_bytes=None, is_virtual=None, features=[], libraries={}, gpu="A GPU")
    page = check_page(made_report(made_group([made_entry("a")]), host=host))
    facts = {row[0]: row[1] for row in page.tables[-1]}
    assert facts["frequency"] == "governor not said, MHz not said"
    assert facts["memory"] == facts["instructions"] == "not said"
    assert facts["GPU"] == "A GPU"
    assert facts["versions"] == "Python 3.11.9"


# -------------------------------------------------------------------------------------------------------------------------- scores


def points_of(svg: str) -> dict[str, tuple[float, float]]:
    """Label -> where its point is, from the left and from above."""
    root = ET.fromstring(svg)
    labels = [text for text in texts_of(svg) if text in {"pytorch", "fast", "slow"}]
    by_line: list[tuple[float, float]] = []
    for marker in root.iter("use"):
        if "series" in marker.get("style", ""):
            by_line.append((float(marker.get("x", "nan")), float(marker.get("y", "nan"))))
    assert len(by_line) == len(labels), (by_line, labels)
    return dict(zip(sorted(labels, key=["pytorch", "slow", "fast"].index), by_line, strict=True))


@pytest.mark.parametrize("is_better_up", [True, False])
def test_up_and_to_the_left_is_better(is_better_up: bool) -> None:
    """Of errors, where less is better, too."""
    values = {"pytorch": (9.0, 0.9), "slow": (6.0, 0.8), "fast": (1.0, 0.4)}
    entries = [
        made_entry(f"pose_{name}", ms, scores=[made_score(value if is_better_up else 1 - value, metric="AP" if is_better_up else "NME", is_better_up=is_better_up)])
        for name, (ms, value) in values.items()
    ]
    svg = drawings(html_page(made_report(made_group(entries))))[0]
    found = points_of(svg)
    assert found["fast"][0] < found["slow"][0] < found["pytorch"][0]
    assert found["pytorch"][1] < found["slow"][1] < found["fast"][1], "y counts from above"
    assert ("NME (less is better)" in texts_of(svg)) is not is_better_up


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("others", [[], [0.5]])
def test_a_score_that_there_is_nothing_for(value: float | None, others: list[float]) -> None:
    for place in range(len(others) + 1):
        values = [*others[:place], value, *others[place:]]
        report = made_report(made_group([made_entry(f"pose_{i}", 1.0 + i, scores=[made_score(one)]) for i, one in enumerate(values)]))
        rows, html = table_of(report)
        assert rows[place]["AP"] == ""
        assert all("nan" not in cell for row in rows for cell in row.values())
        assert ("Accuracy and latency" in titles(html)) is bool(others)


def test_entries_with_scores_of_several_metrics() -> None:
    first = made_entry("a", scores=[made_score(0.5, metric="PCK"), made_score(3.0, metric="EPE", is_better_up=False)])
    second = made_entry("b", 3.0, scores=[made_score(2.0, metric="EPE", is_better_up=False)])
    rows, _ = table_of(made_report(made_group([first, second])))
    assert [(row["PCK"], row["EPE"]) for row in rows] == [("50.00", "3.0000"), ("", "2.0000 (-1.0000)")]


def test_what_was_run_but_has_no_accuracy_is_not_said_not_to_have_run() -> None:
    report = made_report(made_group([made_entry("a", trouble="accuracy: expected a pose estimator's keypoints")]))
    for text in (html_page(report), markdown_page(report)):
        assert "expected a pose estimator" in text
        assert "was not run here" not in text


# -------------------------------------------------------------------------------------------------------------------------- parity


def parity_cells(entry: Entry) -> tuple[dict[str, str], dict[str, str], str]:
    """What was compared -> its cell, in HTML and in Markdown; and the HTML."""
    report = made_report(made_group([entry]))
    page = check_page(report)
    table = page.tables[1]
    assert table[0] == ["", entry.name]
    markdown = markdown_tables(markdown_page(report))[1]
    return {row[0]: row[1] for row in table[1:]}, {row[0]: row[1] for row in markdown[1:]}, page.raw


def test_parity_is_figures_and_their_limits() -> None:
    html, markdown, text = parity_cells(made_entry("a"))
    assert html == markdown == {
        "simcc_x, relative L-inf": "2.5e-05 ≤ 0.001",
        "keypoint shift, px": "0.013 (mean 0.001) ≤ 0.5",
        "keypoints ap on people.json, points lost": "+1.00 ≤ 2",
    }
    assert text.count('class="ok"') == 3
    assert 'class="outside"' not in text


def test_what_is_outside_its_limit_is_marked() -> None:
    _, markdown, text = parity_cells(made_entry("a", parity=made_parity(worst=0.9)))
    assert markdown["keypoint shift, px"] == "**OUTSIDE** 0.9 (mean 0.001) ≤ 0.5"
    assert '<span class="outside">0.9 (mean 0.001)</span>' in text
    assert text.count('class="outside"') == 1


def test_a_bundle_that_was_not_compared_is_marked() -> None:
    html, markdown, text = parity_cells(made_entry("a", parity=made_parity(verified=False)))
    assert '<span class="outside">not compared</span>' in text
    assert "not compared" in html["all"]
    assert "not compared" in markdown["all"]
    assert table_of(made_report(made_group([made_entry("a", parity=made_parity(verified=False))])))[0][0]["worst shift"] == ""


def test_bundles_of_other_outputs_have_holes_in_the_table_of_parity() -> None:
    entries = [made_entry("a"), made_entry("b", parity=made_parity(verified=False)), made_entry("c", parity=None)]
    page = check_page(made_report(made_group(entries)))
    assert page.tables[1][0] == ["", "a", "b"]
    assert [row[1:] for row in page.tables[1][1:]] == [["2.5e-05 ≤ 0.001", ""], ["0.013 (mean 0.001) ≤ 0.5", ""], ["+1.00 ≤ 2", ""], ["", "not compared"]]


# -------------------------------------------------------------------------------------------------------------------- what is needed


@pytest.mark.parametrize(("gone", "words"), [(("matplotlib",), "matplotlib"), (("jinja2",), "jinja2"), (("matplotlib", "jinja2"), "matplotlib and jinja2")])
def test_what_is_not_installed_is_named_with_the_extra(gone: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    require_report()
    monkeypatch.setattr(report_pages.importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    with pytest.raises(MissingBackendError, match=f"a report needs {words}, not installed") as caught:
        require_report()
    assert caught.value.hint == "pip install 'modelcrate[report]'"


# ------------------------------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs a browser: chromium")
    return found


def screenshot(chromium: str, page: Path, folder: Path, *more: str) -> tuple[np.ndarray, str]:
    """The picture of a page, and what the browser logged."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"]
    what = [f"--screenshot={folder / 'page.png'}", "--window-size=1200,3000", "--hide-scrollbars", page.as_uri()]
    done = subprocess.run([chromium, "--headless", "--no-sandbox", *quiet, *log, *more, *what], cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    image = cv2.imread(str(folder / "page.png"))
    assert image is not None
    return image, done.stderr


def test_a_browser_draws_the_page_in_light_and_in_dark(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html_page(full_report()), encoding="utf-8")
    means = []
    for name, more in (("light", ["--blink-settings=preferredColorScheme=1"]), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        (tmp_path / name).mkdir()
        image, log = screenshot(chromium, page, tmp_path / name, *more)
        assert image.shape == (3000, 1200, 3)
        assert not [line for line in log.splitlines() if "CONSOLE" in line], log
        paper = np.median(image.reshape(-1, 3), axis=0)
        assert 0.02 < (np.abs(image - paper).max(axis=2) > 24).mean() < 0.6, "text and drawings on paper"
        means.append(float(image.mean()))
        # Bars of the first series of the page are there in the colour that this scheme has for it.
        color = {"light": (0x2F, 0x6B, 0xD0), "dark": (0x6E, 0xA3, 0xFF)}[name]
        assert (np.abs(image.astype(int) - color[::-1]).max(axis=2) <= 2).sum() > 2000
    assert means[0] > 200
    assert means[1] < 90
