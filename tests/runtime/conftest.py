"""Fixtures for the tests of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """PyTorch's threads are the process's: leave them as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of noise, (60, 80, 3), as a file."""
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return path
