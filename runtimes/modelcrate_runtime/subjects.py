"""What is measured: bundles and, where the converter is at hand, checkpoints, which run in PyTorch; all behind one face."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from modelcrate_bundle.bundle import Bundle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelcrate_runtime.sessions import Session, SessionOptions
    from modelcrate_runtime.tasks import Classifier, Detector, Network, PoseDetector

Task: TypeAlias = "Detector | PoseDetector | Classifier | Network"
Wrap: TypeAlias = "Callable[[Session], Session]"
"""What stands between a task and its network: a stopwatch, a flip test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Something that can be opened as a task, again and again and in several ways.

    Attributes:
        name: "<model>_<target>", the bundle's folder; "<model>_pytorch" for a checkpoint.
        backend: as deploy.json has it, or "pytorch".
        precision: what its network computes in: fp32, fp16, bf16, int8, mixed.
        size_bytes: of the files that a device needs.
        bundle: the bundle, None for a checkpoint.
        text: what another process finds it by.
        module: the framework that it runs in, see `import_framework`.
        checkpoints: "module:function" that finds it, see `know_checkpoints`; empty for bundles.
        open_network: loads the network.
        open_around: the task around a network that is loaded.
    """

    name: str
    backend: str
    precision: str
    size_bytes: int
    bundle: Bundle | None
    open_network: Callable[[SessionOptions], Session]
    open_around: Callable[[Session], Task]
    text: str
    module: str = ""
    checkpoints: str = ""

    def open(self, options: SessionOptions | None = None, *, wrap: Wrap | None = None) -> Task:
        """Load it.

        Args:
            options: device, threads, streams.
            wrap: what to put between the task and its network.

        Raises:
            BundleError: a bundle that cannot be run.
            MissingBackendError: the framework is not installed or lacks the device.
        """
        from modelcrate_runtime.sessions import SessionOptions

        session = self.open_network(options or SessionOptions())
        try:
            return self.open_around(wrap(session) if wrap else session)
        except BaseException:
            session.close()
            raise


def import_framework(module: str) -> None:
    """Import it now, so that opening a network does not: a framework takes longer to import than most networks to load. One that is missing says so later."""
    with contextlib.suppress(ImportError):
        if module:
            importlib.import_module(module)


def of_bundle(bundle: Bundle) -> Subject:
    """A bundle; its hashes are compared when it is opened.

    Raises:
        BundleError: see `Bundle.verify`.
    """
    from modelcrate_runtime.sessions import BACKENDS, open_session
    from modelcrate_runtime.tasks import open_task

    bundle.verify()
    names = [bundle.model.net, *([bundle.model.weights] if bundle.model.weights else [])]
    return Subject(
        name=bundle.name,
        backend=bundle.model.backend,
        precision=bundle.manifest.precision if bundle.manifest else bundle.model.precision.lower(),
        size_bytes=sum(bundle.path_of(name).stat().st_size for name in names),
        bundle=bundle,
        open_network=lambda options: open_session(bundle, options),
        open_around=lambda session: open_task(bundle, session=session),
        text=str(bundle.root),
        module=BACKENDS[bundle.model.backend].module if bundle.model.backend in BACKENDS else "",
    )


_CHECKPOINTS: Final[list[Callable[[str], Subject]]] = []


def know_checkpoints(of_checkpoint: Callable[[str], Subject]) -> None:
    """Let `find_subject` take checkpoints too. The converter calls it: nothing here can open them.

    Args:
        of_checkpoint: makes a subject of a path, a URL or a name; raises ModelcrateError for all else.
    """
    _CHECKPOINTS[:] = [of_checkpoint]


def find_subject(text: str) -> Subject:
    """The bundle, a folder or a zip of it, or the checkpoint that the user wrote.

    Raises:
        ModelcrateError: it is neither, or cannot be read.
    """
    path = Path(text)
    if not _CHECKPOINTS or path.is_dir() or (path.is_file() and _is_zipped_bundle(path)):
        return of_bundle(Bundle.open(path))
    find = _CHECKPOINTS[0]
    return replace(find(text), text=text, checkpoints=f"{find.__module__}:{find.__qualname__}")


def _is_zipped_bundle(path: Path) -> bool:
    """A checkpoint of torch is a zip as well."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "deploy.json" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return path.suffix == ".zip"


def find_subjects(texts: Iterable[str]) -> list[Subject]:
    """Several; see `find_subject`. Those of one name get numbers."""
    return with_numbers(find_subject(text) for text in texts)


def with_numbers(subjects: Iterable[Subject]) -> list[Subject]:
    """The same, those of one name numbered from the second on."""
    found: list[Subject] = []
    for subject in subjects:
        taken = {one.name for one in found}
        names = itertools.chain([subject.name], (f"{subject.name} ({number})" for number in itertools.count(2)))
        found.append(replace(subject, name=next(name for name in names if name not in taken)))
    return found
