"""What a network's inputs and outputs look like, without any array library."""

from __future__ import annotations

from typing import TypeAlias

from modelcrate_bundle.schema import Record

Dim: TypeAlias = int | str
"""A fixed size, or the name of a dynamic one ("batch")."""


class TensorSpec(Record, kw_only=True):
    """Name, element type and shape of one input or output.

    Attributes:
        name: the tensor's name in the artefact.
        dtype: numpy's name of the element type ("float32", "int64").
        shape: one entry per axis; a string names a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def is_batch_dynamic(self) -> bool:
        """Whether the first axis takes any size."""
        return bool(self.shape) and isinstance(self.shape[0], str)


class ShapeRange(Record, kw_only=True):
    """The shapes that an input may have: axis by axis min <= opt <= max; `opt` is what the artefact was tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
