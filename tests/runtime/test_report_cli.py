"""`modelcrate report`: what it writes, what it draws again, and what it refuses without leaving anything behind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

import command_line
from made_reports import copied_bundle, full_report
from modelcrate_converter.cli import app
from modelcrate_converter.people.dataset import write_dataset
from modelcrate_runtime.reporting import read_report, write_json

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'modelcrate[report]'")
pytest.importorskip("jinja2", reason="needs jinja2: pip install 'modelcrate[report]'")

from modelcrate_runtime.report_pages import html_page, markdown_page

QUICK = ("--warmup", 0, "--runs", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_threads: None) -> None:
    """A folder of its own."""
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("MODELCRATE_TRACEBACK", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The JSON of a report that was measured before."""
    path = tmp_path / "measured.json"
    path.write_bytes(write_json(full_report()))
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *(str(argument) for argument in arguments)])


def done(*arguments: object) -> Result:
    result = cli(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def files() -> list[str]:
    """What is in the working folder, hidden files too."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def refused(result: Result, code: int, *words: str) -> None:
    """As all commands refuse, and no file is there."""
    command_line.refused(result, code, *words)
    assert files() == []


def test_a_folder_of_bundles_becomes_three_files(
    demo_pose_bundle: Path, demo_detector_bundle: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    write_dataset(tmp_path / "people", count=2, seed=79, size_hw=(192, 192), people=(1, 2))
    crates = tmp_path / "crates"
    for bundle in (demo_pose_bundle, demo_detector_bundle):
        shutil.copytree(bundle, crates / bundle.name)
    copied_bundle(demo_pose_bundle, crates / "strange", backend="snpe", id="demo-pose_snpe")
    (crates / "text.zip").write_bytes(b"no zip")
    command = [crates, photo, "--annotations", tmp_path / "people/annotations.json", "--batch", "1,2", "--boxes", 2, *QUICK]
    monkeypatch.setattr(sys, "argv", ["modelcrate", "report", *(str(word) for word in command), "a b"])
    result = done(*command, "-o", "deeper/page.html")
    assert files() == ["deeper/page.html", "deeper/page.json", "deeper/page.md"]
    assert result.stdout == "wrote deeper/page.html, deeper/page.md, deeper/page.json\n"
    assert result.stderr == ""
    report = read_report(Path("deeper/page.json"))
    assert report.command == f"modelcrate report {' '.join(str(word) for word in command)} 'a b'"
    det, pose = report.groups
    assert [entry.name for entry in det.entries] == ["demo-det_onnxruntime"]
    assert [entry.name for entry in pose.entries] == ["demo-pose_onnxruntime", "demo-pose_snpe"]
    for entry in (*det.entries, *pose.entries[:1]):
        assert [(score.metric, score.images) for score in entry.scores] == [("AP", 2)]
        assert entry.profile is not None
        assert entry.profile.call.count == 2
        assert entry.profile.images == [str(photo)]
        assert entry.profile.cold is not None, "a fresh process each"
        assert [row.batch for row in entry.profile.network] == [1, 2]
    assert "'snpe'" in pose.entries[1].trouble
    assert Path("deeper/page.html").read_bytes() == html_page(report).encode()
    assert Path("deeper/page.md").read_bytes() == markdown_page(report).encode()
    page = Path("deeper/page.html").read_text(encoding="utf-8")
    assert "demo-pose_snpe was not run here" in page
    assert "Not a bundle that can be used" in page


def test_a_page_is_drawn_again_without_measuring(source: Path) -> None:
    before = source.read_bytes()
    result = done("--from", source)
    assert result.stdout == "wrote report.html, report.md, report.json\n"
    assert files() == ["report.html", "report.json", "report.md"]
    assert Path("report.html").read_text(encoding="utf-8") == html_page(full_report())
    assert Path("report.md").read_text(encoding="utf-8") == markdown_page(full_report())
    assert Path("report.json").read_bytes() == source.read_bytes() == before


@pytest.mark.parametrize("way", ["same", "absolute", "around", "link"])
def test_the_source_of_a_page_is_not_written_over(source: Path, way: str) -> None:
    """However it is spelled: it may have what this version does not know."""
    place = Path("report.json")
    shutil.copy(source, place)
    data = place.read_bytes().replace(b"{", b'{"later": 1,', 1)
    place.write_bytes(data)
    Path("deeper").mkdir()
    Path("deeper/link.json").symlink_to(place.resolve())
    given = {"same": place, "absolute": place.resolve(), "around": Path("deeper/../report.json"), "link": Path("deeper/link.json")}[way]
    result = done("--from", given, "-o", "report.html")
    assert place.read_bytes() == data
    assert result.stdout == "wrote report.html, report.md\n"
    assert Path("report.html").read_text(encoding="utf-8") == html_page(full_report())


def test_a_page_may_be_called_htm(source: Path) -> None:
    done("--from", source, "--out", "x.htm")
    assert files() == ["x.htm", "x.json", "x.md"]


def test_what_there_was_stays_where_nothing_can_be_measured(tmp_path: Path) -> None:
    for name in ("report.html", "report.md", "report.json"):
        Path(name).write_text(name, encoding="utf-8")
    assert cli(tmp_path / "gone").exit_code == 10
    assert files() == ["report.html", "report.json", "report.md"]
    assert [Path(name).read_text(encoding="utf-8") for name in files()] == files()


# ----------------------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_or_a_source_and_not_both(source: Path, pose_bundle: Path) -> None:
    refused(cli(), 4, "expected a folder of bundles or --from, found neither", "modelcrate report crates/")
    refused(cli(pose_bundle, "--from", source), 4, "expected a folder of bundles or --from, found both")


@pytest.mark.parametrize(
    "option",
    [("--runs", 5), ("--warmup", 0), ("--batch", "1,2"), ("--boxes", 2), ("--limit", 3), ("--threads", 1), ("--device", "cpu"), ("--annotations", "x.json"), ("-r", "x")],
    ids=lambda option: option[0],
)
def test_a_source_is_drawn_and_not_measured(source: Path, option: tuple[str, object]) -> None:
    """An option that would change nothing is not passed over in silence."""
    name = {"-r": "--reference"}.get(option[0], option[0])
    refused(cli("--from", source, *option), 4, f"--from: expected nothing beside it but --out, since nothing is measured, found {name}", f"leave {name} out")
    assert files() == []


@pytest.mark.parametrize(("name", "words"), [("x.txt", "found '.txt'"), ("x", "found 'no suffix'"), ("x.json", "found '.json'"), ("x.md", "found '.md'")])
def test_a_page_is_called_html(name: str, words: str, pose_bundle: Path) -> None:
    refused(cli(pose_bundle, *QUICK, "-o", name), 4, f"{name}: expected a name that ends with .html", words)


def test_folders_without_bundles_are_refused(tmp_path: Path, pose_bundle: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(cli(tmp_path / "gone"), 10, "gone: expected a folder of bundles, found nothing", "modelcrate convert")
    refused(cli(tmp_path / "empty"), 10, "empty: expected bundles, found none")
    refused(cli(pose_bundle / "deploy.json"), 10, "expected a folder of bundles, found a file")


def test_images_that_cannot_be_read_are_refused(pose_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name, words in (("gone.png", "found nothing there"), ("bad.png", "OpenCV cannot decode")):
        refused(cli(pose_bundle, tmp_path / name, *QUICK), 10, name, words)


def test_a_reference_of_another_model_is_refused(pose_bundle: Path) -> None:
    refused(cli(pose_bundle, *QUICK, "-r", "demo-det"), 4, "demo-det: expected a checkpoint of one of the models here")


@pytest.mark.parametrize("text", ["0", "two", "1;2"])
def test_batches_that_are_none_are_refused(pose_bundle: Path, text: str) -> None:
    refused(cli(pose_bundle, *QUICK, "--batch", text), 4, "--batch: expected whole numbers from 1 on", repr(text))


@pytest.mark.parametrize("arguments", [("--runs", 0), ("--warmup", -1), ("--boxes", 0), ("--limit", 0), ("--threads", 0)], ids=str)
def test_options_out_of_range_are_usage_errors(pose_bundle: Path, arguments: tuple[str, int]) -> None:
    result = cli(pose_bundle, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert files() == []


@pytest.mark.parametrize("option", ["--annotations", "--annotated"])
def test_annotations_that_are_not_there_are_refused_before_anything_is_measured(pose_bundle: Path, tmp_path: Path, option: str) -> None:
    """Not a report of minutes without what it was made for."""
    (tmp_path / "truth.json").write_text('{"images": [], "annotations": [], "categories": []}', encoding="utf-8")
    given = {"--annotations": tmp_path / "gone.json"} if option == "--annotations" else {"--annotations": tmp_path / "truth.json", option: tmp_path / "gone"}
    refused(cli(pose_bundle, *QUICK, *(word for pair in given.items() for word in pair)), 10, "gone")


def test_a_source_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("text", encoding="utf-8")
    (tmp_path / "other.json").write_bytes(msgspec.json.encode({"profiles": []}))
    for name, words in (("gone.json", "No such file"), ("text.json", "expected the JSON of a report"), ("other.json", "expected the JSON of a report")):
        refused(cli("--from", tmp_path / name), 10, name, words)


def test_a_place_that_cannot_be_written_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("--from", source, "-o", tmp_path / "file/page.html")
    assert result.exit_code == 15
    assert result.stderr.startswith(f"error: {tmp_path}/file/page.html: expected to write there")
    assert " hint: choose another place with --out" in result.stderr
    assert "Traceback" not in result.output


def test_what_is_not_installed_is_said_before_anything_is_measured(pose_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelcrate_runtime import report_pages

    find = report_pages.importlib.util.find_spec
    monkeypatch.setattr(report_pages.importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    refused(cli(pose_bundle), 5, "a report needs matplotlib, not installed", "pip install 'modelcrate[report]'")


def test_help_says_what_the_options_are() -> None:
    out = done("--help").stdout
    assert all(word in out for word in ("--reference", "--annotations", "--from", "--out", "--boxes"))
