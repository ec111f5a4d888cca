"""Every way modelcrate can fail, and the exit code of each.

    ModelcrateError                 3   anything below; never raised itself
    ├── ConfigError                 4   unknown target, bad option or deploy config
    ├── MissingBackendError         5   a framework that is not installed, or lacks what was asked for
    ├── CheckpointError             6   unreadable, truncated or hostile checkpoint; weights that are not finite
    │   └── ArchitectureError       7   readable, but not a network that modelcrate knows
    ├── ExportError                 8   the exporter, the simplifier or a backend's converter failed
    ├── ParityError                 9   the artefact does not compute what PyTorch computes
    ├── InputError                 10   an image, a box or points that cannot be used
    ├── BundleError                11   a bundle that cannot be opened
    │   ├── BundleFormatError      11   its JSON is not what the format says
    │   ├── BundleIntegrityError   12   a file that was changed, is missing, or leaves the bundle
    │   └── UnsupportedBundleError 13   well formed, but asks for something this runtime does not have
    ├── TaskMismatchError          14   a pose bundle where a detector is expected, or the like
    ├── OutputError                15   the result cannot be written
    └── DownloadError              16   a URL that cannot be fetched, or not what its hash says

A message says where, what, what was expected and what was found; `hint` is one command or one edit. Only the command line prints or exits.
"""

from __future__ import annotations

from typing import ClassVar


class ModelcrateError(Exception):
    """Base of all errors that a user can cause or cure.

    Attributes:
        hint: one thing to do about it, or an empty string.
        exit_code: what the command line exits with.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(ModelcrateError):
    """An option, a target name or a deploy config that cannot be used."""

    exit_code = 4


class MissingBackendError(ModelcrateError):
    """A framework is not installed, or the installed one lacks what was asked for."""

    exit_code = 5


class CheckpointError(ModelcrateError):
    """A checkpoint that cannot be read safely, or whose weights are not finite."""

    exit_code = 6


class ArchitectureError(CheckpointError):
    """A readable checkpoint of a network that modelcrate does not know."""

    exit_code = 7


class ExportError(ModelcrateError):
    """The ONNX exporter, the simplifier or a backend's converter failed."""

    exit_code = 8


class ParityError(ModelcrateError):
    """The built artefact does not compute what PyTorch computes."""

    exit_code = 9


class InputError(ModelcrateError, ValueError):
    """The caller's image, box or points cannot be used."""

    exit_code = 10


class BundleError(ModelcrateError):
    """A bundle that cannot be opened."""

    exit_code = 11


class BundleFormatError(BundleError):
    """A bundle's JSON is not what the format says; the message has the file, the JSON path, expected and found."""


class BundleIntegrityError(BundleError):
    """A file of the bundle was changed, is missing, or lies outside the bundle."""

    exit_code = 12


class UnsupportedBundleError(BundleError):
    """A well-formed bundle that asks for something this runtime does not have."""

    exit_code = 13


class TaskMismatchError(ModelcrateError):
    """A bundle of another task than the one that was asked for."""

    exit_code = 14


class OutputError(ModelcrateError):
    """A result cannot be written: no permission, no space, or something else is in its place."""

    exit_code = 15


class DownloadError(ModelcrateError):
    """A URL that cannot be fetched, or whose content is not what its hash says."""

    exit_code = 16
