"""Opening a bundle that may come from a stranger, and writing one that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import lzma
import os
import shutil
import stat
import struct
import tempfile
import uuid
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

from modelcrate_bundle.errors import BundleError, BundleFormatError, BundleIntegrityError, OutputError
from modelcrate_bundle.manifest import FileEntry, Manifest, hash_of_facts, read_manifest, write_manifest
from modelcrate_bundle.schema import (
    DeployInfo,
    DeployModel,
    DetailInfo,
    JsonObject,
    Pipeline,
    decode_json,
    encode_json,
    read_deploy,
    read_pipeline,
    read_record,
    write_deploy,
    write_pipeline,
    write_record,
)

MAX_JSON_BYTES: Final = 16 * 2**20
"""Larger JSON files are refused before they are read: the largest real one is a few hundred kilobytes."""
MAX_ARTEFACT_BYTES: Final = 16 * 2**30
_CHUNK_BYTES: Final = 2**20
_CONVERT_HINT: Final = "write one with: modelcrate convert CHECKPOINT -t onnxruntime -o crates/"
_ZIP_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, ValueError, struct.error, OSError)
_LIVE: Final[set[str]] = set()
"""Temporary folders of this process's writers: another one with this process's number was left by a dead one that had it."""


@dataclass(kw_only=True, slots=True)
class Bundle:
    """A bundle that was opened: its JSON is read and checked, its artefacts are named and inside it.

    Attributes:
        root: the folder or zip file that was opened.
        deploy: deploy.json.
        pipeline: pipeline.json.
        detail: detail.json, or None where there is none (no runtime needs it).
        manifest: manifest.json, or None for bundles that MMDeploy wrote.
    """

    root: Path
    deploy: DeployInfo
    pipeline: Pipeline
    detail: DetailInfo | None
    manifest: Manifest | None
    _source: _Source = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle's folder or a zip of it.

        The artefacts are not read here; `verify` compares them with the manifest.

        Args:
            path: the folder or zip file.

        Raises:
            BundleError: nothing there, or neither a folder nor a zip.
            BundleFormatError: deploy.json or pipeline.json is missing, too large or not what the format says.
            BundleIntegrityError: a file that the JSON names is missing, is a link or lies outside the bundle.
            UnsupportedBundleError: a manifest of another major version.
        """
        root = Path(path)
        try:
            source = _open_source(root)
        except OSError as error:
            raise BundleError(f"{str(root)[:200]}: expected a bundle's folder, found nothing there: {error.strerror}", hint=_CONVERT_HINT) from error
        deploy = read_deploy(decode_json(source.read_json("deploy.json"), where=f"{root}/deploy.json"), where=f"{root}/deploy.json")
        pipeline = read_pipeline(decode_json(source.read_json("pipeline.json"), where=f"{root}/pipeline.json"), where=f"{root}/pipeline.json")
        detail = None
        if source.has("detail.json"):
            where = f"{root}/detail.json"
            detail = read_record(DetailInfo, decode_json(source.read_json("detail.json"), where=where), where=where)
        manifest = None
        if source.has("manifest.json"):
            manifest = read_manifest(source.read_json("manifest.json"), where=f"{root}/manifest.json")
        bundle = cls(root=root, deploy=deploy, pipeline=pipeline, detail=detail, manifest=manifest, _source=source)
        names = [model.name for model in deploy.models]
        if pipeline.net.name not in names:
            raise BundleFormatError(f"{root}/pipeline.json: the Net task is called {pipeline.net.name!r}, but deploy.json has {names}")
        for i, model in enumerate(deploy.models):
            for key, name in (("net", model.net), ("weights", model.weights)):
                if name or key == "net":
                    source.check(name or "", where=f"{root}/deploy.json: $.models[{i}].{key}")
        return bundle

    @classmethod
    def of_files(cls, *, deploy: DeployInfo, pipeline: Pipeline, files: Mapping[str, Path], manifest: Manifest | None = None) -> Bundle:
        """A bundle whose artefacts are not in its folder yet: a builder's output, to be run before it is packaged.

        Args:
            deploy: names the files by their base names.
            pipeline: what to do around the network.
            files: role -> file; all of one folder.
            manifest: what the bundle will say of itself; it lists no files yet.
        """
        folder = files["net"].parent
        return cls(root=folder, deploy=deploy, pipeline=pipeline, detail=None, manifest=manifest, _source=_Source(folder))

    @property
    def model(self) -> DeployModel:
        """The deploy.json entry of the network that the pipeline runs."""
        return next(model for model in self.deploy.models if model.name == self.pipeline.net.name)

    @property
    def name(self) -> str:
        """The bundle's id, or the name of its folder."""
        return self.manifest.id if self.manifest else self.root.stem

    def path_of(self, name: str) -> Path:
        """A file of the bundle on disk; from a zip it is unpacked to a temporary folder first.

        Raises:
            BundleIntegrityError: the file is missing, is a link or lies outside the bundle.
        """
        return self._source.path_of(name, where=str(self.root))

    def verify(self) -> None:
        """Compare every file with the size and SHA-256 that manifest.json has for it; without a manifest there is nothing to compare.

        Raises:
            BundleIntegrityError: a file differs or is missing, or the manifest itself was edited.
        """
        manifest = self.manifest
        if manifest is None:
            return
        written = hash_of_facts(decode_json(self._source.read_json("manifest.json"), where=f"{self.root}/manifest.json"))
        if manifest.content_sha256 not in {written, manifest.facts_hash}:
            raise BundleIntegrityError(
                f"{self.root}/manifest.json: expected content_sha256 {manifest.content_sha256[:16]}, found {written[:16]}: it was edited",
                hint="convert again, or copy the bundle again from where it was built",
            )
        for entry in manifest.files:
            path = self._source.path_of(entry.path, where=f"{self.root}/manifest.json")
            size = path.stat().st_size
            found = f"{size} bytes" if size != entry.bytes else sha256_of(path)[:16]
            expected = f"{entry.bytes} bytes" if size != entry.bytes else entry.sha256[:16]
            if found != expected:
                raise BundleIntegrityError(
                    f"{self.root}/{entry.path}: expected {expected}, found {found}: the file was changed after the build",
                    hint="copy the bundle again from where it was built, or convert again",
                )


# -------------------------------------------------------------------------------------------------------------------- sources


class _Source:
    """The files of a bundle's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, name: str) -> bool:
        return (self._root / name).is_file()

    def read_json(self, name: str) -> bytes:
        path = self._root / name
        if not path.is_file():
            found = sorted(p.name for p in self._root.iterdir())[:8]
            raise BundleFormatError(f"{self._root}: expected {name}, found {found}", hint="give the folder that holds deploy.json and pipeline.json")
        path = self.path_of(name, where=str(self._root))
        _check_json_size(path.stat().st_size, where=str(path))
        return path.read_bytes()

    def check(self, name: str, *, where: str) -> None:
        self.path_of(name, where=where)

    def path_of(self, name: str, *, where: str) -> Path:
        inner = _inner_path(name, where=where)
        path = folder = self._root
        try:
            for part in inner.parts:
                folder = folder / part
                if folder.is_symlink():
                    raise BundleIntegrityError(f"{where}: {name}: expected a file of the bundle, found a link", hint="copy the real files into the bundle")
            path = self._root / inner
            status = path.stat()
        except OSError as error:
            raise BundleIntegrityError(f"{where}: expected the file {name[:200]!r} in the bundle, found none", hint="copy the whole bundle folder") from error
        if not stat.S_ISREG(status.st_mode):
            raise BundleIntegrityError(f"{where}: {name}: expected a regular file, found something else")
        return path


class _ZipSource(_Source):
    """The files of a zipped bundle, keyed by base name as MMDeploy's reader does, unpacked one by one when they are needed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(root.read_bytes()) if root.stat().st_size <= _CHUNK_BYTES else root)
        except _ZIP_DAMAGE as error:
            raise BundleError(f"{root}: expected a bundle's folder or a zip of it, found a file that is neither: {error}") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            other = self._members.setdefault(PurePosixPath(info.filename).name, info)
            if other is not info and not info.is_dir():
                raise BundleFormatError(f"{root}: expected every file name once, found {other.filename} and {info.filename}", hint="zip one bundle at a time")
        self._members = {name: info for name, info in self._members.items() if not info.is_dir()}
        self._unpacked: Path | None = None

    def has(self, name: str) -> bool:
        return name in self._members

    def read_json(self, name: str) -> bytes:
        info = self._member(name, where=str(self._root), kind=BundleFormatError)
        _check_json_size(info.file_size, where=f"{self._root}/{name}")
        return self._read(info)

    def check(self, name: str, *, where: str) -> None:
        self._member(_inner_path(name, where=where).name, where=where)

    def path_of(self, name: str, *, where: str) -> Path:
        info = self._member(_inner_path(name, where=where).name, where=where)
        if info.file_size > MAX_ARTEFACT_BYTES:
            raise BundleIntegrityError(f"{where}: {name}: expected at most {MAX_ARTEFACT_BYTES} bytes, found {info.file_size}")
        try:
            if self._unpacked is None:
                self._unpacked = Path(tempfile.mkdtemp(prefix="modelcrate-"))
                weakref.finalize(self, shutil.rmtree, self._unpacked, ignore_errors=True)
            target = self._unpacked / _inner_path(name, where=where).name
            if not target.exists():
                partial = self._unpacked / f".{uuid.uuid4().hex}.partial"  # whole or not at all: a damaged member leaves no file to find
                with _readable(self._zip, info, where=where) as packed, partial.open("wb") as out:
                    shutil.copyfileobj(packed, out, _CHUNK_BYTES)
                partial.rename(target)
        except OSError as error:
            raise BundleError(
                f"{where}: {name[:200]}: expected to unpack it to a temporary folder, found: {error.strerror or error}", hint="unzip the bundle yourself"
            ) from error
        return target

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        with _readable(self._zip, info, where=str(self._root)) as packed:
            return packed.read(MAX_JSON_BYTES + 1)

    def _member(self, name: str, *, where: str, kind: type[BundleError] = BundleIntegrityError) -> zipfile.ZipInfo:
        info = self._members.get(name)
        if info is None:
            raise kind(f"{where}: expected {name!r} in the zip, found {sorted(self._members)[:8]}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BundleIntegrityError(f"{where}: {name}: expected a file, found a link in the zip")
        return info


@contextlib.contextmanager
def _readable(archive: zipfile.ZipFile, info: zipfile.ZipInfo, *, where: str) -> Iterator[io.BufferedIOBase]:
    """Open a zip member; what the zip module raises for damaged or encrypted ones becomes one error."""
    try:
        with archive.open(info) as packed:
            yield packed  # type: ignore[misc]  # typeshed calls it IO[bytes]
    except _ZIP_DAMAGE as error:
        raise BundleIntegrityError(f"{where}: {info.filename}: the zip is damaged or encrypted: {error}", hint="copy the bundle again") from error


def _open_source(root: Path) -> _Source:
    if root.is_dir():
        return _Source(root)
    if root.is_file():
        return _ZipSource(root)
    raise BundleError(f"{root}: expected a bundle's folder, found nothing there", hint=_CONVERT_HINT)


def _inner_path(name: str, *, where: str) -> PurePosixPath:
    """A name from JSON as a path that cannot leave the bundle, on any operating system."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise BundleIntegrityError(
            f"{where}: expected a relative path inside the bundle, found {name!r}", hint="do not use this bundle: it reaches for files outside itself"
        )
    return path


def _check_json_size(size: int, *, where: str) -> None:
    if size > MAX_JSON_BYTES:
        raise BundleFormatError(f"{where}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {size}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------------- writing


class BundleWriter:
    """Writes a bundle into a temporary folder beside its place and moves it there with one rename.

    Use as a context manager; leaving the block without `commit` removes the temporary folder. A bundle that stood in the place before stays
    readable until the rename; a kill at any moment leaves the old bundle, the new one or none, and never a mixture. Folders that a killed
    process left behind are removed by the next writer of the same place.

    Attributes:
        place: where the bundle will stand.
        workdir: the temporary folder; builders may write into it directly.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.workdir = place.parent / f".{place.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        self._roles: dict[str, str] = {}

    def __enter__(self) -> Self:
        with _writing(self.place):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.place)
            _check_replaceable(self.place)
            self.workdir.mkdir()
            _LIVE.add(self.workdir.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.workdir, ignore_errors=True)
        _LIVE.discard(self.workdir.name)

    def add(self, name: str, *, role: str, content: bytes | Path | None = None) -> Path:
        """Put a file into the bundle.

        Args:
            name: its name in the bundle.
            role: net, weights, readme, picture ...
            content: its bytes, a file to copy, or None when a builder wrote it into `workdir` already.

        Raises:
            OutputError: it cannot be written.
        """
        target = self.workdir / _inner_path(name, where=str(self.place))
        with _writing(self.place):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            elif content is not None:
                target.write_bytes(content)
            elif not target.is_file():
                raise OutputError(f"{self.place}: expected {name} in the temporary folder, found none: nothing was written")
        self._roles[name] = role
        return target

    def file_entries(self) -> list[FileEntry]:
        """Size and hash of every file that was added, by name."""
        return [
            FileEntry(path=name, role=role, bytes=(self.workdir / name).stat().st_size, sha256=sha256_of(self.workdir / name))
            for name, role in sorted(self._roles.items())
        ]

    def commit(self, *, deploy: DeployInfo, pipeline: Pipeline, detail: DetailInfo, manifest: Manifest) -> Bundle:
        """Write the JSON files, last of all, and move the folder to its place.

        Args:
            deploy: deploy.json.
            pipeline: pipeline.json.
            detail: detail.json.
            manifest: manifest.json; its `files` are filled in here.

        Raises:
            OutputError: a file cannot be written, or the place cannot be taken.
        """
        documents: Mapping[str, JsonObject] = {"deploy": write_deploy(deploy), "pipeline": write_pipeline(pipeline), "detail": write_record(detail)}
        for role, document in documents.items():
            self.add(f"{role}.json", role=role, content=encode_json(document))
        manifest.files = self.file_entries()
        with _writing(self.place):
            (self.workdir / "manifest.json").write_bytes(write_manifest(manifest))
        Bundle.open(self.workdir).verify()  # what cannot be opened never takes the place of what can
        with _writing(self.place):
            for path in self.workdir.rglob("*"):
                _flush_to_disk(path)
            _check_replaceable(self.place)
            _move_into_place(self.workdir, self.place)
        return Bundle.open(self.place)


def _move_into_place(workdir: Path, place: Path) -> None:
    """One rename. An old bundle steps aside first: its own rename, so that the place never holds files of two builds."""
    if not place.exists():
        workdir.rename(place)
        return
    aside = workdir.with_suffix(".replaced")
    place.rename(aside)
    try:
        workdir.rename(place)
    except BaseException:  # Ctrl-C included
        aside.rename(place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """Remove what killed writers of this place left; an old bundle that had stepped aside for a new one that never came goes back."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.*"):
        owner = path.name[len(place.name) + 2 :].partition("-")[0]
        if path.suffix not in {".partial", ".replaced"} or not owner.isdigit() or path.with_suffix(".partial").name in _LIVE or _is_running(int(owner)):
            continue
        if path.suffix == ".replaced" and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _check_replaceable(place: Path) -> None:
    if place.is_symlink() or (place.exists() and not (place / "deploy.json").is_file()):
        raise OutputError(f"{place}: expected a bundle or nothing, found something else there", hint="choose another output folder with -o")


def _is_running(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush_to_disk(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one error that names the place."""
    try:
        yield
    except OSError as error:
        hint = "free some space and run again" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "choose another output folder with -o"
        raise OutputError(f"{place}: expected to write there, found: {error.strerror or error}", hint=hint) from error
