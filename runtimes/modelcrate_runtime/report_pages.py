"""A report as one HTML page that needs nothing else, and as Markdown.

Plots are drawn once, in colours that stand for variables of the page: one drawing is right in light and in dark.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelcrate_bundle.errors import MissingBackendError

if TYPE_CHECKING:
    from modelcrate_runtime.reporting import Entry, Group, Report, Score

_INK, _FAINT, _GRID = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES: Final = tuple(f"#0a0c{i:02x}" for i in range(8))
_DASHES: Final = ("-", "--", ":", "-.")
_VARIABLES: Final = {_INK: "--ink", _FAINT: "--faint", _GRID: "--grid", **{color: f"--series-{i}" for i, color in enumerate(_SERIES)}}
"""Colours that nobody would choose -> the page's variables that are put in their place."""
_STAGE_SERIES: Final = {"load image": 3, "preprocess": 1, "infer": 0, "postprocess": 2}
_WIDTH_IN: Final = 8.4
_MIB: Final = 2**20


def require_report() -> None:
    """Refuse early what would fail late.

    Raises:
        MissingBackendError: matplotlib or jinja2 is not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingBackendError(f"a report needs {' and '.join(missing)}, not installed", hint="pip install 'modelcrate[report]'")


def html_page(report: Report) -> str:
    """One page, with its style and its plots inside; it loads nothing and runs no script."""
    groups = [{"group": group, "rows": _rows(group), "plots": _plots(group, i)} for i, group in enumerate(report.groups)]
    page: str = _template("report.html.j2", is_html=True).render(report=report, groups=groups, parity=_parity, doubts=_doubts, facts=_facts(report))
    return page


def markdown_page(report: Report) -> str:
    """The tables alone."""
    groups = [{"group": group, "rows": _rows(group)} for group in report.groups]
    page: str = _template("report.md.j2", is_html=False).render(report=report, groups=groups, parity=_parity, doubts=_doubts, facts=_facts(report))
    return page


def _template(name: str, *, is_html: bool) -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    # What is a page gets its text escaped: names come from bundles, and Markdown takes tags as they are.
    environment = jinja2.Environment(loader=loader, autoescape=is_html, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # noqa: S701  # see _line
    environment.filters["line"] = _line
    environment.filters["cell"] = lambda text: _line(text).replace("|", "\\|")
    return environment.get_template(name)


def _line(text: object) -> str:
    """Text in one line of Markdown."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def _rows(group: Group) -> list[dict[str, Any]]:
    """One row for each subject, as text."""
    of_turns = {row.name: row for row in group.comparison.rows} if group.comparison else {}
    base = next(iter(of_turns), None)
    best = {score.metric: score for entry in group.entries[:1] for score in entry.scores}
    rows = []
    for entry in group.entries:
        turns = of_turns.get(entry.name)
        latency = turns.latency if turns else entry.profile.call if entry.profile else None
        times = ""
        if turns and entry.name != base:
            times = f"{turns.ratio.times:.2f} ({turns.ratio.low:.2f} to {turns.ratio.high:.2f})"
        elif turns:
            times = "1"
        scores = {score.metric: _score(score, best.get(score.metric), is_base=entry is group.entries[0]) for score in entry.scores}
        cold = entry.profile.cold if entry.profile else None
        rows.append(
            {
                "name": entry.name,
                "precision": entry.precision,
                "size": _mib(entry.size_bytes),
                "median": f"{latency.median_ms:.2f}" if latency else "",
                "p99": f"{latency.p99_ms:.2f}" if latency else "",
                "times": times,
                "first": f"{cold.total_s:.2f}" if cold else "",
                "peak": _mib(cold.peak_bytes) if cold and cold.peak_bytes else "",
                "pixels": _worst(entry),
                "scores": scores,
                "trouble": entry.trouble,
            }
        )
    return rows


def _score(score: Score, base: Score | None, *, is_base: bool) -> str:
    """Shares in percent and points, errors in their own unit."""
    value, of_base = _value(score), _value(base)
    if value is None:
        return ""
    scale, digits = (100, 2) if score.is_better_up else (1, 4)
    text = f"{scale * value:.{digits}f}"
    if is_base or of_base is None:
        return text
    return f"{text} ({scale * (value - of_base):+.{digits}f})"


def _value(score: Score | None) -> float | None:
    """None where there was nothing to measure."""
    return score.value if score is not None and score.value is not None and math.isfinite(score.value) else None


def _worst(entry: Entry) -> str:
    if entry.parity is None or not entry.parity.verified:
        return ""
    shifts = [one for one in entry.parity.pixels if one.name.endswith("_px")]
    return f"{shifts[0].worst:.2g} px" if shifts else ""


def _parity(group: Group) -> dict[str, dict[str, dict[str, str]]]:
    """What was compared -> bundle -> its figure, its gate and its verdict, as text."""
    table: dict[str, dict[str, dict[str, str]]] = {}
    for entry in group.entries:
        if entry.parity is None:
            continue
        if not entry.parity.verified:
            table.setdefault("all", {})[entry.name] = {"figure": "not compared", "gate": "", "ok": "outside"}
        for output in entry.parity.outputs:
            table.setdefault(f"{output.name}, relative L-inf", {})[entry.name] = _gated(f"{output.relative_linf:.1e}", f"{output.gate:g}", passed=output.passed)
        for pixel in entry.parity.pixels:
            of_worst = _gated(f"{pixel.worst:.2g} (mean {pixel.mean:.2g})", f"{pixel.gate:g}", passed=pixel.passed)
            table.setdefault(f"{pixel.name.removesuffix('_px').replace('_', ' ')}{', px' if pixel.name.endswith('_px') else ''}", {})[entry.name] = of_worst
        for one in entry.parity.accuracy:
            of_drop = _gated(f"{one.drop:+.2f}", "" if one.gate is None else f"{one.gate:g}", passed=one.passed)
            table.setdefault(f"{one.name.replace('_', ' ')} on {one.data}, points lost", {})[entry.name] = of_drop
    return table


def _gated(figure: str, gate: str, *, passed: bool) -> dict[str, str]:
    return {"figure": figure, "gate": gate, "ok": "ok" if passed else "outside"}


def _doubts(group: Group) -> dict[str, list[str]]:
    """What is unsure, and what to do -> of which of them."""
    found: dict[str, list[str]] = {}
    for entry in group.entries:
        for doubt in entry.profile.doubts if entry.profile else ():
            found.setdefault(f"{doubt.what}; {doubt.do}", []).append(entry.name)
    return found


def _facts(report: Report) -> list[tuple[str, str]]:
    host = report.host
    return [
        ("processor", f"{host.cpu}, {host.cores} cores" + (", virtual machine" if host.is_virtual else "")),
        ("instructions", ", ".join(host.features) or "not said"),
        ("frequency", f"{host.governor or 'governor not said'}, {f'{host.frequency_mhz:.0f} MHz' if host.frequency_mhz else 'MHz not said'}"),
        ("memory", _mib(host.memory_bytes) if host.memory_bytes else "not said"),
        ("GPU", host.gpu or "none"),
        ("system", host.system),
        ("versions", ", ".join([*(f"{name} {version}" for name, version in host.libraries.items()), f"Python {host.python}"])),
    ]


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / _MIB:.1f} MiB"


# ------------------------------------------------------------------------------------------------------------------------- plots


def _plots(group: Group, number: int) -> list[dict[str, str]]:
    """Title, what it shows in a sentence, and SVG."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False, "svg.fonttype": "none", "font.family": "sans-serif"}):  # a name with dollars is no formula
        return _plots_of(group, number)


def _plots_of(group: Group, number: int) -> list[dict[str, str]]:
    plots = []
    if any(_value(score) is not None for entry in group.entries for score in entry.scores):
        text = "Up and to the left is better. The time is the median of calls in turns, image to result."
        plots.append({"title": "Accuracy and latency", "text": text, "svg": _accuracy_plot(group, f"accuracy-{number}")})
    measured = [entry for entry in group.entries if entry.profile is not None]
    if measured:
        plots.append({"title": "Where the time goes", "text": "Medians of one call, by stage.", "svg": _stage_plot(measured, f"stages-{number}")})
        text = "Each call of image to result; the line is the median. Two hills, or a long tail, are worth a look before a figure is quoted."
        plots.append({"title": "How calls differ", "text": text, "svg": _histograms(measured, f"calls-{number}")})
    if any(len({row.batch for row in entry.profile.network}) > 1 for entry in measured if entry.profile):
        plots.append({"title": "Batches", "text": "The network alone: inputs per second by inputs in a call.", "svg": _batch_plot(measured, f"batch-{number}")})
    return plots


def _figure(height_in: float) -> Any:
    """A figure without any global state of matplotlib's."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")


def _styled(axes: Any, *, grid: str) -> None:
    axes.set_facecolor("none")
    axes.grid(visible=True, axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=_FAINT, length=0, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_FAINT)
        label.set_fontsize(9)


def _accuracy_plot(group: Group, name: str) -> str:
    metric = next(score for entry in group.entries for score in entry.scores if _value(score) is not None)
    of_turns = {row.name: row.latency.median_ms for row in group.comparison.rows} if group.comparison else {}
    figure = _figure(3.6)
    axes = figure.add_subplot()
    _styled(axes, grid="both")
    points = []
    for entry in group.entries:
        value = next((_value(score) for score in entry.scores if score.metric == metric.metric), None)
        latency = of_turns.get(entry.name) or (entry.profile.call.median_ms if entry.profile else None)
        if value is not None and latency is not None:
            points.append((latency, (100 if metric.is_better_up else 1) * value, entry))
    for latency, value, entry in points:
        axes.plot([latency], [value], "o", color=_SERIES[0 if entry.backend != "pytorch" else 2], markersize=7)
    _label_points(axes, [(latency, value, _short(entry.name, group.model)) for latency, value, entry in points])
    axes.set_xlabel("ms, median (log scale)" if len(points) > 1 else "ms, median")
    axes.set_ylabel(f"{metric.metric}{'' if metric.is_better_up else ' (less is better)'}")
    if len(points) > 1:
        _log_axis(axes, [latency for latency, _, _ in points])
    low, high = min(value for _, value, _ in points), max(value for _, value, _ in points)
    margin = max(0.15 * (high - low), 0.002 * abs(high), 1e-6)  # of points that are all alike too
    axes.set_ylim((low - margin, high + 2 * margin) if metric.is_better_up else (high + margin, low - 2 * margin))
    return _svg(figure, name)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with numbers that people use: 1, 2, 5, 10."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    low, high = min(values) / 1.25, max(values) * 1.6
    ticks = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 3, 5) if low <= step * 10.0**power <= high]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside points; one above the other where points are close, so that no two overlap."""
    for rank, (x, y, text) in enumerate(sorted(points)):
        offset = (8, 5 if rank % 2 == 0 else -12)
        axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=_INK, fontsize=8.5)


def _stage_plot(entries: Sequence[Entry], name: str) -> str:
    figure = _figure(0.9 + 0.36 * len(entries))
    axes = figure.add_subplot()
    _styled(axes, grid="x")
    left = np.zeros(len(entries))
    for stage, series in _STAGE_SERIES.items():
        values = np.array([entry.profile.stages[stage].median_ms if entry.profile and stage in entry.profile.stages else 0.0 for entry in entries])
        if values.any():
            axes.barh(range(len(entries)), values, left=left, height=0.62, color=_SERIES[series], label=stage)
            left += values
    for i, total in enumerate(left):
        axes.annotate(f"{total:.2f}", (total, i), xytext=(5, 0), textcoords="offset points", va="center", color=_FAINT, fontsize=8.5)
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.set_xlim(0, 1.1 * float(left.max()))
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, name)


def _histograms(entries: Sequence[Entry], name: str) -> str:
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure = _figure(1.7 * rows + 0.2)
    for i, entry in enumerate(entries):
        assert entry.profile is not None
        axes = figure.add_subplot(rows, columns, i + 1)
        _styled(axes, grid="x")
        values = 1e3 * np.asarray(entry.profile.samples["call"])
        shown = values[values <= np.percentile(values, 99) * 1.02]
        axes.hist(shown, bins=min(40, max(8, len(shown) // 6)), color=_SERIES[0])
        axes.axvline(float(np.median(values)), color=_SERIES[1], linewidth=1.5)
        axes.set_yticks([])
        left_out = len(values) - len(shown)
        beyond = f", {left_out} beyond" if left_out else ""
        axes.set_title(entry.name, fontsize=8.5, color=_INK, loc="left")
        axes.set_xlabel(f"ms; median {np.median(values):.2f}{beyond}")
    return _svg(figure, name)


def _batch_plot(entries: Sequence[Entry], name: str) -> str:
    figure = _figure(3.2)
    axes = figure.add_subplot()
    _styled(axes, grid="both")
    ticks: set[int] = set()
    lines: list[Any] = []
    for i, entry in enumerate(entries):
        assert entry.profile is not None
        first = entry.profile.network[0].threads
        rows = [row for row in entry.profile.network if row.streams == 1 and row.threads == first]
        ticks |= {row.batch for row in rows}
        turn, color = divmod(i, len(_SERIES))  # colours come again with other dashes and marks
        style = {"color": _SERIES[color], "linestyle": _DASHES[turn % len(_DASHES)], "marker": "os^D"[turn % 4], "linewidth": 1.5}
        lines += axes.plot([row.batch for row in rows], [row.latency.per_second for row in rows], **style)
    axes.set_xticks(sorted(ticks))
    axes.set_xlabel("inputs in a call")
    axes.set_ylabel("inputs per second")
    axes.set_ylim(bottom=0)
    # Labels of the lines themselves are left out where they begin with "_".
    axes.legend(lines, [entry.name for entry in entries], frameon=False, fontsize=8.5, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, name)


def _short(name: str, model: str) -> str:
    return name.removeprefix(f"{model}_")


def _svg(figure: Any, name: str) -> str:
    """Inline SVG, the same bytes for the same figure, its colours the page's variables, its ids nobody else's."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # only for their widths: the browser has its own fonts
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)([\w-]+)', rf"\g<1>{name}-\g<2>", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img">', svg, count=1)
