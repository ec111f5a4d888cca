"""A bundle is opened without trusting it, and written whole or not at all."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modelcrate_bundle
from modelcrate_bundle import Bundle, BundleWriter, Manifest
from modelcrate_bundle.bundle import MAX_JSON_BYTES
from modelcrate_bundle.errors import BundleError, BundleFormatError, BundleIntegrityError, ModelcrateError, OutputError, UnsupportedBundleError
from modelcrate_bundle.manifest import FileEntry, Stage, Timing
from modelcrate_bundle.schema import DeployInfo, DetailInfo, Pipeline

WriteBundle = Callable[..., Bundle]

posix_only = pytest.mark.skipif(os.name != "posix", reason="FIFOs, signals and resource limits are POSIX")

_recorders: list[list[str]] = []


def _record(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _recorders and isinstance(args[0], str):
        _recorders[-1].append(args[0])


sys.addaudithook(_record)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that Python opens during the test."""
    _recorders.append([])
    yield _recorders[-1]
    _recorders.pop()


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        pytest.fail(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))


def point_net_at(place: Path, name: str, key: str = "net") -> None:
    edit_json(place / "deploy.json", lambda raw: raw["models"][0].update({key: name}))


@pytest.fixture
def place(tmp_path: Path, write_bundle: WriteBundle) -> Path:
    """A good bundle, alone in its folder."""
    path = tmp_path / "crates" / "rtmdet-nano_onnxruntime-fp32"
    write_bundle(path)
    return path


# ------------------------------------------------------------------------------------------------------------------- a good bundle


def test_written_bundle_opens_and_verifies(tmp_path: Path, write_bundle: WriteBundle, deploy: DeployInfo, pipeline: Pipeline) -> None:
    written = write_bundle(tmp_path / "a" / "b", net=b"network")
    written.verify()
    bundle = Bundle.open(str(tmp_path / "a" / "b"))
    bundle.verify()
    assert (bundle.deploy, bundle.pipeline, bundle.detail) == (deploy, pipeline, DetailInfo(version="1.3.1"))
    assert bundle.path_of(bundle.model.net).read_bytes() == b"network"
    assert bundle.name == "rtmdet-nano_onnxruntime-fp32"
    assert bundle.manifest is not None
    assert [(entry.path, entry.role) for entry in bundle.manifest.files] == [
        ("deploy.json", "deploy"), ("detail.json", "detail"), ("end2end.onnx", "net"), ("pipeline.json", "pipeline"),
    ]  # fmt: skip
    assert sorted(p.name for p in bundle.root.iterdir()) == ["deploy.json", "detail.json", "end2end.onnx", "manifest.json", "pipeline.json"]


def test_bundle_of_mmdeploy_needs_no_manifest_and_no_detail(place: Path) -> None:
    (place / "manifest.json").unlink()
    (place / "detail.json").unlink()
    bundle = Bundle.open(place)
    bundle.verify()
    assert (bundle.manifest, bundle.detail, bundle.name) == (None, None, place.stem)


def test_model_is_the_one_the_pipeline_runs(place: Path) -> None:
    edit_json(place / "deploy.json", lambda raw: raw["models"].insert(0, raw["models"][0] | {"name": "other", "backend": "ncnn"}))
    bundle = Bundle.open(place)
    assert (bundle.model.name, bundle.model.backend) == ("rtmdet", "onnxruntime")


# ------------------------------------------------------------------------------------------------------------- a bundle that changed


@pytest.mark.parametrize(("name", "old", "new"), [("end2end.onnx", b"o", b"0"), ("detail.json", b"1.3.1", b"1.3.2"), ("pipeline.json", b"0.05", b"0.06")])
def test_changed_byte_is_found(name: str, old: bytes, new: bytes, place: Path) -> None:
    data = (place / name).read_bytes()
    (place / name).write_bytes(data.replace(old, new, 1))
    assert (place / name).stat().st_size == len(data)
    with pytest.raises(BundleIntegrityError, match=rf"{name}: expected [0-9a-f]{{16}}, found [0-9a-f]{{16}}: the file was changed"):
        Bundle.open(place).verify()


def test_changed_size_is_found(place: Path) -> None:
    (place / "end2end.onnx").write_bytes(b"!" * 237)
    with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: expected 240 bytes, found 237 bytes: the file was changed"):
        Bundle.open(place).verify()


def test_file_removed_before_opening_is_found(place: Path) -> None:
    (place / "end2end.onnx").unlink()
    with pytest.raises(BundleIntegrityError, match=r"deploy\.json: \$\.models\[0\]\.net: expected the file 'end2end\.onnx' in the bundle, found none"):
        Bundle.open(place)


def test_file_removed_after_opening_is_found(place: Path) -> None:
    bundle = Bundle.open(place)
    (place / "detail.json").unlink()
    with pytest.raises(BundleIntegrityError, match=r"manifest\.json: expected the file 'detail\.json' in the bundle, found none"):
        bundle.verify()
    with pytest.raises(BundleIntegrityError, match=r"'detail\.json'"):
        bundle.path_of("detail.json")


def test_missing_weights_are_found(place: Path) -> None:
    point_net_at(place, "end2end.bin", key="weights")
    with pytest.raises(BundleIntegrityError, match=r"\$\.models\[0\]\.weights: expected the file 'end2end\.bin'"):
        Bundle.open(place)


def test_edited_manifest_is_found_even_if_its_files_match(place: Path) -> None:
    edit_json(place / "manifest.json", lambda raw: raw.update(precision="int8"))
    with pytest.raises(BundleIntegrityError, match=r"manifest\.json: expected content_sha256 [0-9a-f]{16}, found [0-9a-f]{16}: it was edited") as caught:
        Bundle.open(place).verify()
    assert caught.value.exit_code == 12


def test_manifest_of_another_major_version_is_refused(place: Path) -> None:
    edit_json(place / "manifest.json", lambda raw: raw.update(schema_version="2.0"))
    with pytest.raises(UnsupportedBundleError, match=r"manifest\.json: \$\.schema_version: expected 1\.x, found 2\.0"):
        Bundle.open(place)


def test_names_that_differ_are_refused(place: Path) -> None:
    edit_json(place / "deploy.json", lambda raw: raw["models"][0].update(name="yolo"))
    with pytest.raises(BundleFormatError, match=r"the Net task is called 'rtmdet', but deploy\.json has \['yolo'\]"):
        Bundle.open(place)


# ------------------------------------------------------------------------------------------------------------------ a hostile bundle

OUTSIDE = [
    "../../outside.onnx", "../outside.onnx", "sub/../../outside.onnx", "/etc/passwd", "//etc/passwd", "sub\\end2end.onnx", "..\\outside.onnx",
    "C:outside.onnx", "C:\\outside.onnx", "\\\\server\\share\\x", "end2end.onnx\0.txt", "\0", "..",
]  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_path_that_leaves_the_bundle_is_refused_unread(name: str, zipped: bool, place: Path, opened: list[str]) -> None:
    for outside in (place.parent / "outside.onnx", place.parent.parent / "outside.onnx"):
        outside.write_bytes(b"secret")
    point_net_at(place, name)
    root = Path(shutil.make_archive(str(place), "zip", place)) if zipped else place
    opened.clear()
    with pytest.raises(BundleIntegrityError, match=r"deploy\.json: \$\.models\[0\]\.net: expected a relative path inside the bundle, found '") as caught:
        Bundle.open(root)
    touched = [path for path in opened if str(place.parent.parent) in path or "passwd" in path]
    assert touched  # the recorder works: the JSON was opened
    assert all(Path(path).resolve().is_relative_to(place) or Path(path) == root for path in touched)
    assert "do not use this bundle" in caught.value.hint


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", ""])
def test_path_of_and_the_manifest_stay_inside_too(name: str, place: Path, write_bundle: WriteBundle, make_manifest: Callable[..., Manifest]) -> None:
    bundle = Bundle.open(place)
    with pytest.raises(BundleIntegrityError, match="expected a relative path inside the bundle"):
        bundle.path_of(name)
    manifest = make_manifest(files=[FileEntry(path=name, role="net", bytes=1, sha256="00")])
    manifest.content_sha256 = manifest.facts_hash
    with pytest.raises(BundleIntegrityError, match=r"manifest\.json: expected a relative path inside the bundle"):
        dataclasses.replace(bundle, manifest=manifest).verify()


def test_weights_may_not_leave_the_bundle_either(place: Path) -> None:
    point_net_at(place, "../x.bin", key="weights")
    with pytest.raises(BundleIntegrityError, match=r"\$\.models\[0\]\.weights: expected a relative path inside the bundle, found '\.\./x\.bin'"):
        Bundle.open(place)


@pytest.mark.parametrize("name", ["", ".", "a" * 300, "end2end.onnx/x", "x" * 5000 + "/y"], ids=["empty", "dot", "long", "below-a-file", "very-long"])
def test_net_that_names_no_file_is_refused(name: str, place: Path) -> None:
    point_net_at(place, name)
    with pytest.raises(BundleIntegrityError, match=r"\$\.models\[0\]\.net"):
        Bundle.open(place)


@pytest.mark.parametrize("name", ["end2end.onnx", "deploy.json", "pipeline.json", "manifest.json"])
def test_link_in_place_of_a_file_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    shutil.copyfile(place / name, tmp_path / "real")
    (place / name).unlink()
    (place / name).symlink_to(tmp_path / "real")
    with pytest.raises(BundleIntegrityError, match=rf"{name}: expected a file of the bundle, found a link"):
        Bundle.open(place)


def test_link_in_place_of_a_folder_on_the_way_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "net.onnx").write_bytes(b"secret")
    (place / "sub").symlink_to(tmp_path / "elsewhere")
    point_net_at(place, "sub/net.onnx")
    with pytest.raises(BundleIntegrityError, match=r"sub/net\.onnx: expected a file of the bundle, found a link"):
        Bundle.open(place)


def test_real_folder_on_the_way_is_fine(place: Path) -> None:
    (place / "sub").mkdir()
    (place / "end2end.onnx").rename(place / "sub" / "net.onnx")
    point_net_at(place, "sub/net.onnx")
    assert Bundle.open(place).path_of("sub/net.onnx") == place / "sub" / "net.onnx"


@posix_only
@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize("name", ["end2end.onnx", "deploy.json", "detail.json"])
def test_something_else_in_place_of_a_file_does_not_hang(name: str, make: Callable[[Path], None], place: Path) -> None:
    (place / name).unlink()
    make(place / name)
    kind = BundleFormatError if name == "deploy.json" else BundleIntegrityError
    with within(5), pytest.raises(kind, match=name.replace(".", r"\.")):
        Bundle.open(place).verify()


@pytest.mark.parametrize("name", ["deploy.json", "pipeline.json", "detail.json", "manifest.json"])
def test_enormous_json_is_refused_unread(name: str, place: Path, opened: list[str]) -> None:
    Bundle.open(place)
    assert str(place / name) in opened
    os.truncate(place / name, 2 * 2**30)
    opened.clear()
    with pytest.raises(BundleFormatError, match=rf"{name}: expected at most {MAX_JSON_BYTES} bytes of JSON, found 2147483648"):
        Bundle.open(place)
    assert str(place / name) not in opened


def test_deeply_nested_json_is_refused(place: Path) -> None:
    (place / "pipeline.json").write_bytes(b"[" * 100_000)
    with pytest.raises(BundleFormatError, match=r"pipeline\.json: expected JSON, found something else: maximum recursion depth"):
        Bundle.open(place)


# -------------------------------------------------------------------------------------------------------------------- not a bundle


@pytest.mark.parametrize("name", ["deploy.json", "pipeline.json"])
def test_folder_without_json_says_what_is_there(name: str, place: Path) -> None:
    (place / name).unlink()
    with pytest.raises(BundleFormatError, match=rf"expected {name}, found \['") as caught:
        Bundle.open(place)
    assert "end2end.onnx" in str(caught.value)
    assert "give the folder" in caught.value.hint


@pytest.mark.parametrize("name", ["nowhere", "nowhere/deeper/", "a" * 300, "a\0b"], ids=["missing", "deeper", "long", "nul"])
def test_path_that_does_not_exist_says_so(name: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(BundleError, match="expected a bundle's folder, found nothing there") as caught:
        Bundle.open(path)
    assert "modelcrate convert" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x00" * 5000, b"PK\x05\x06" + b"\xff" * 18])
def test_file_that_is_neither_folder_nor_zip(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx: expected a bundle's folder or a zip of it"):
        Bundle.open(tmp_path / "model.onnx")


# ------------------------------------------------------------------------------------------------------------------------------ zip


@dataclasses.dataclass
class Header:
    """Where the fields of a zip member's two headers lie (PKWARE APPNOTE 4.3.7 and 4.3.12)."""

    local: int
    central: int


LOCAL_FLAGS, CENTRAL_FLAGS, CENTRAL_SIZE, LOCAL_METHOD, CENTRAL_METHOD = 6, 8, 24, 8, 10


def zip_of(folder: Path, *, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
    return path


def headers_of(path: Path, name: str) -> Header:
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(name).header_offset
        start = archive.start_dir
    while data[start + 46 : start + 46 + len(name)] != name.encode():
        start = data.index(b"PK\x01\x02", start + 4)
    return Header(local, start)


def patch(path: Path, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("top", ["", "rtmdet/", "a/b/c/", "../../", "/"])
def test_zip_is_read_by_base_name_whatever_folder_is_in_it(top: str, place: Path) -> None:
    bundle = Bundle.open(zip_of(place, top=top))
    bundle.verify()
    path = bundle.path_of("end2end.onnx")
    assert path.read_bytes() == (place / "end2end.onnx").read_bytes()
    assert path.name == "end2end.onnx"
    assert sorted(p.name for p in place.parent.iterdir()) == [place.name, f"{place.stem}.zip"]
    assert bundle.pipeline == Bundle.open(place).pipeline


def test_zip_of_some_megabytes_is_read_like_a_small_one(tmp_path: Path, write_bundle: WriteBundle) -> None:
    net = os.urandom(3 * 2**20)
    write_bundle(tmp_path / "large", net=net)
    bundle = Bundle.open(zip_of(tmp_path / "large", method=zipfile.ZIP_STORED))
    bundle.verify()
    assert bundle.path_of("end2end.onnx").read_bytes() == net


def test_temporary_folder_of_a_zip_lives_and_goes_with_its_bundle(place: Path) -> None:
    """Python warns about temporary folders that nobody removes; a user with -W error must not see that."""
    bundle = Bundle.open(zip_of(place))
    path = bundle.path_of("end2end.onnx")
    gc.collect()
    assert path.is_file()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del bundle
        gc.collect()
    assert not path.parent.exists()
    assert [str(w.message) for w in caught] == []


def test_bytes_changed_in_a_zip_are_found(place: Path) -> None:
    (place / "end2end.onnx").write_bytes((place / "end2end.onnx").read_bytes()[::-1])
    with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: expected [0-9a-f]{16}, found"):
        Bundle.open(zip_of(place)).verify()


def test_zip_without_a_file_says_what_is_there(place: Path) -> None:
    (place / "pipeline.json").unlink()
    with pytest.raises(BundleFormatError, match=r"expected 'pipeline\.json' in the zip, found \['deploy\.json', 'detail\.json'"):
        Bundle.open(zip_of(place))


def test_zip_without_its_artefact(place: Path) -> None:
    (place / "end2end.onnx").unlink()
    with pytest.raises(BundleIntegrityError, match=r"deploy\.json: \$\.models\[0\]\.net: expected 'end2end\.onnx' in the zip"):
        Bundle.open(zip_of(place))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["stored", "deflated", "bzip2", "lzma"])
def test_damaged_artefact_in_a_zip_is_never_handed_out(method: int, place: Path) -> None:
    archive = zip_of(place, method=method)
    patch(archive, headers_of(archive, "end2end.onnx").local + 30 + len("end2end.onnx") + 8, b"\xff" * 12)
    bundle = Bundle.open(archive)
    for _ in range(2):  # the first attempt must not leave something behind that the second one takes for the file
        with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: the zip is damaged or encrypted"):
            bundle.path_of("end2end.onnx")


@pytest.mark.parametrize("method", [1, 9, 12, 14, 99])
def test_other_compression_than_declared_is_refused(method: int, place: Path) -> None:
    archive = zip_of(place)
    header = headers_of(archive, "pipeline.json")
    patch(archive, header.local + LOCAL_METHOD, struct.pack("<H", method))
    patch(archive, header.central + CENTRAL_METHOD, struct.pack("<H", method))
    with pytest.raises(BundleIntegrityError, match=r"pipeline\.json: the zip is damaged or encrypted"):
        Bundle.open(archive)


def test_encrypted_zip_is_refused(place: Path) -> None:
    archive = zip_of(place)
    header = headers_of(archive, "deploy.json")
    patch(archive, header.local + LOCAL_FLAGS, b"\x01\x00")
    patch(archive, header.central + CENTRAL_FLAGS, b"\x01\x00")
    with pytest.raises(BundleIntegrityError, match=r"deploy\.json: the zip is damaged or encrypted: .*encrypted"):
        Bundle.open(archive)


@pytest.mark.parametrize("name", ["deploy.json", "end2end.onnx"])
def test_link_in_a_zip_is_refused(name: str, place: Path) -> None:
    path = place.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in place.iterdir():
            info = zipfile.ZipInfo(file.name)
            info.external_attr = ((stat.S_IFLNK if file.name == name else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, b"/etc/passwd" if file.name == name else file.read_bytes())
    with pytest.raises(BundleIntegrityError, match=rf"{name}: expected a file, found a link in the zip"):
        Bundle.open(path)


def test_json_that_declares_an_enormous_size_in_a_zip_is_refused(place: Path) -> None:
    archive = zip_of(place)
    patch(archive, headers_of(archive, "pipeline.json").central + CENTRAL_SIZE, struct.pack("<I", 2**31))
    with pytest.raises(BundleFormatError, match=rf"pipeline\.json: expected at most {MAX_JSON_BYTES} bytes of JSON, found 2147483648"):
        Bundle.open(archive)


def test_artefact_whose_name_no_disk_takes_is_refused(place: Path) -> None:
    name = "a" * 300
    point_net_at(place, name)
    archive = zip_of(place)
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(name, b"x")
    with pytest.raises(BundleError):
        Bundle.open(archive).path_of(name)


def test_zip_cut_anywhere_is_refused(place: Path) -> None:
    archive = zip_of(place)
    data = archive.read_bytes()
    for length in range(0, len(data), 199):
        archive.write_bytes(data[:length])
        with pytest.raises(BundleError):
            Bundle.open(archive)


def test_zip_with_any_byte_changed_opens_or_is_refused(place: Path) -> None:
    (place / "manifest.json").unlink()
    archive = zip_of(place)
    data = archive.read_bytes()
    other: dict[str, int] = {}
    for offset in range(0, len(data), 4):
        archive.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            Bundle.open(archive)
        except BundleError:
            continue
        except Exception as error:  # noqa: BLE001  # the finding is which ones
            other.setdefault(f"{type(error).__module__}.{type(error).__name__}: {error}", offset)
    assert other == {}


# --------------------------------------------------------------------------------------------------------------------- the writer


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.add("end2end.onnx", role="net", content=b"x")
        assert writer.workdir.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_inside_leaves_the_old_bundle(error: type[BaseException], place: Path) -> None:
    before = contents(place.parent)
    with pytest.raises(error), BundleWriter(place) as writer:
        writer.add("end2end.onnx", role="net", content=b"new")
        raise error
    assert contents(place.parent) == before


def test_new_bundle_takes_the_place_of_the_old_one_whole(place: Path, write_bundle: WriteBundle) -> None:
    (place / "left-over-of-the-old-one.txt").write_bytes(b"")
    write_bundle(place, net=b"new").verify()
    assert sorted(p.name for p in place.iterdir()) == ["deploy.json", "detail.json", "end2end.onnx", "manifest.json", "pipeline.json"]
    assert (place / "end2end.onnx").read_bytes() == b"new"
    assert list(place.parent.iterdir()) == [place]


def test_old_bundle_is_there_until_commit(place: Path) -> None:
    before = contents(place)
    with BundleWriter(place) as writer:
        writer.add("end2end.onnx", role="net", content=b"new")
        assert contents(place) == before


def test_files_come_from_bytes_from_a_path_or_from_the_workdir(
    tmp_path: Path, deploy: DeployInfo, pipeline: Pipeline, make_manifest: Callable[..., Manifest]
) -> None:
    (tmp_path / "source").write_bytes(b"copied")
    with BundleWriter(tmp_path / "out" / "bundle") as writer:
        writer.add("end2end.onnx", role="net", content=tmp_path / "source")
        writer.add("README.md", role="readme", content=b"text")
        (writer.workdir / "built.bin").write_bytes(b"built")
        assert writer.add("built.bin", role="weights") == writer.workdir / "built.bin"
        bundle = writer.commit(deploy=deploy, pipeline=pipeline, detail=DetailInfo(), manifest=make_manifest())
    bundle.verify()
    assert [bundle.path_of(name).read_bytes() for name in ("end2end.onnx", "README.md", "built.bin")] == [b"copied", b"text", b"built"]
    assert bundle.manifest is not None
    assert {"net", "readme", "weights"} < {entry.role for entry in bundle.manifest.files}


def test_same_inputs_give_the_same_bytes_but_for_the_timing(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(tmp_path / "a")
    write_bundle(tmp_path / "b", timing=Timing(created="2031-01-01T00:00:00Z", stages=[Stage(name="export", seconds=7.25)]))
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, two)]
    assert one == two
    assert manifests[0].pop("timing") != manifests[1].pop("timing")
    assert json.dumps(manifests[0]) == json.dumps(manifests[1])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a\\b", "C:x", ""])
def test_writer_puts_nothing_outside_its_workdir(name: str, tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer, pytest.raises(ModelcrateError, match="expected a relative path inside the bundle"):
        writer.add(name, role="net", content=b"x")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_place_do_not_disturb_each_other(place: Path, write_bundle: WriteBundle) -> None:
    with BundleWriter(place) as slow:
        slow.add("end2end.onnx", role="net", content=b"slow")
        write_bundle(place, net=b"fast")
        assert (slow.workdir / "end2end.onnx").read_bytes() == b"slow"
    assert (place / "end2end.onnx").read_bytes() == b"fast"
    assert list(place.parent.iterdir()) == [place]


def test_leftover_of_a_process_that_had_our_number_is_removed(place: Path) -> None:
    """In a container every run may be process 1: the number alone does not say that the folder is in use."""
    with BundleWriter(place) as killed:
        pass
    killed.workdir.mkdir()  # as if it had not got to clean up
    with BundleWriter(place):
        pass
    assert list(place.parent.iterdir()) == [place]


def make_file(path: Path) -> None:
    path.write_bytes(b"mine")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_bytes(b"mine")


def make_link(path: Path) -> None:
    (path.parent / "real").mkdir()
    (path.parent / "real" / "deploy.json").write_bytes(b"{}")
    path.symlink_to(path.parent / "real")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [make_file, make_folder, make_link, make_dangling_link])
def test_something_else_in_the_place_is_not_touched(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "bundle")
    before, names = contents(tmp_path), sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="bundle: expected a bundle or nothing, found something else there") as caught, BundleWriter(tmp_path / "bundle"):
        pass
    assert (contents(tmp_path), sorted(tmp_path.iterdir())) == (before, names)
    assert "-o" in caught.value.hint


def test_something_that_came_to_the_place_during_the_build_is_not_touched(
    tmp_path: Path, deploy: DeployInfo, pipeline: Pipeline, make_manifest: Callable[..., Manifest]
) -> None:
    with contextlib.suppress(OutputError), BundleWriter(tmp_path / "bundle") as writer:
        writer.add("end2end.onnx", role="net", content=b"x")
        make_folder(tmp_path / "bundle")
        writer.commit(deploy=deploy, pipeline=pipeline, detail=DetailInfo(), manifest=make_manifest())
    assert contents(tmp_path) == {"bundle/notes.txt": b"mine"}


@pytest.mark.parametrize("added", [False, True], ids=["never-added", "added-but-never-written"])
def test_bundle_without_its_artefact_is_not_written(
    added: bool, place: Path, deploy: DeployInfo, pipeline: Pipeline, make_manifest: Callable[..., Manifest]
) -> None:
    before = contents(place.parent)
    with pytest.raises(ModelcrateError, match=r"end2end\.onnx"), BundleWriter(place) as writer:
        if added:
            writer.add("end2end.onnx", role="net")
        writer.commit(deploy=deploy, pipeline=pipeline, detail=DetailInfo(), manifest=make_manifest())
    assert contents(place.parent) == before


@pytest.mark.skipif(os.name != "posix", reason="permissions of folders are POSIX")
def test_parent_that_cannot_hold_a_folder(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    if os.geteuid() == 0:  # root may write anywhere, but not below a file
        parent.write_bytes(b"")
    else:
        parent.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="bundle: expected to write there, found: ") as caught, BundleWriter(parent / "bundle"):
        pass
    assert caught.value.exit_code == 15
    assert sorted(tmp_path.rglob("*")) == [parent]


def test_source_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OutputError), BundleWriter(tmp_path / "bundle") as writer:
        writer.add("end2end.onnx", role="net", content=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_old_bundle_goes_back_when_the_second_rename_fails(place: Path, write_bundle: WriteBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(place.parent)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_bundle(place, net=b"new")
    assert "free some space" in caught.value.hint
    assert contents(place.parent) == before


# --------------------------------------------------------------------------------------------------- processes that are killed or full

REWRITE = """
import os, resource, signal, sys, time
from pathlib import Path
from modelcrate_bundle import Bundle, BundleWriter
from modelcrate_bundle.errors import OutputError

place, rename, renames = Path(sys.argv[1]), Path.rename, []
old = Bundle.open(place)

def rewrite(net=b"new", inside=lambda: None):
    with BundleWriter(place) as writer:
        writer.add("end2end.onnx", role="net", content=net)
        inside()
        writer.commit(deploy=old.deploy, pipeline=old.pipeline, detail=old.detail, manifest=old.manifest)

def after_first_rename(action):
    def counted(self, target):
        if renames:
            action()
        renames.append(self)
        return rename(self, target)
    Path.rename = counted
"""


def start(script: str, place: Path) -> "subprocess.Popen[str]":
    """Run a process that opens the old bundle of a place and has `rewrite` to write a new one."""
    environment = os.environ | {"PYTHONPATH": str(Path(modelcrate_bundle.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", REWRITE + textwrap.dedent(script), str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@posix_only
@pytest.mark.parametrize("name", ["rtmdet", "rtmdet[1].v2"])
def test_process_killed_while_writing_leaves_the_old_bundle(name: str, place: Path) -> None:
    place = place.rename(place.with_name(name))
    before = contents(place)
    with start('rewrite(inside=lambda: (print("ready", flush=True), time.sleep(60)))', place) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with BundleWriter(place):  # a writer that is still running keeps its folder
            pass
        assert len(list(place.parent.iterdir())) == 2
        process.kill()
    assert contents(place) == before
    assert len(list(place.parent.iterdir())) == 2
    with BundleWriter(place) as writer:
        assert sorted(place.parent.iterdir()) == sorted([place, writer.workdir])
    assert list(place.parent.iterdir()) == [place]
    Bundle.open(place).verify()


@posix_only
@pytest.mark.parametrize("action", ["os.kill(os.getpid(), signal.SIGKILL)", "signal.raise_signal(signal.SIGINT)"], ids=["kill", "ctrl-c"])
def test_process_stopped_between_the_renames_loses_no_bundle(action: str, place: Path) -> None:
    before = contents(place)
    with start(f"after_first_rename(lambda: {action}); rewrite()", place) as process:
        process.communicate(timeout=30)
    assert process.returncode != 0
    if place.exists():
        assert contents(place) == before
    with BundleWriter(place):  # the next writer, which gives up
        assert contents(place) == before
    assert list(place.parent.iterdir()) == [place]
    Bundle.open(place).verify()


@posix_only
def test_process_killed_after_the_renames_leaves_the_new_bundle(place: Path) -> None:
    script = """
    import shutil
    shutil.rmtree = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    rewrite()
    """
    with start(script, place) as process:
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert len(list(place.parent.iterdir())) == 2
    with BundleWriter(place):
        pass
    assert (place / "end2end.onnx").read_bytes() == b"new"
    assert list(place.parent.iterdir()) == [place]
    Bundle.open(place).verify()


@posix_only
@pytest.mark.parametrize(("limit", "net"), [(100_000, 200_000), (1500, 10)], ids=["artefact", "json"])
def test_full_disk_leaves_the_old_bundle(limit: int, net: int, place: Path) -> None:
    before = contents(place.parent)
    assert len(before[f"{place.name}/pipeline.json"]) > 1500
    script = f"""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        rewrite(b"x" * {net})
    except OutputError as error:
        print(error)
    """
    with start(script, place) as process:
        out, err = process.communicate(timeout=30)
    assert err == ""
    assert out == f"{place}: expected to write there, found: File too large\n"
    assert contents(place.parent) == before


def test_zip_of_two_bundles_is_refused_with_both_names(place: Path, tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle(place)
    archive = tmp_path / "two.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for folder in ("one", "two"):
            for path in place.iterdir():
                stream.write(path, f"{folder}/{path.name}")
    with pytest.raises(BundleFormatError, match=r"every file name once, found one/.* and two/"):
        Bundle.open(archive)
