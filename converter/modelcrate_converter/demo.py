"""The two models that come with modelcrate: small, trained on procedural people alone, for demos, tests and calibration without a download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent / "demo_models"
DEMO_MODELS: Final[Mapping[str, Path]] = {name: _FOLDER / f"{name}.pth" for name in ("demo-det", "demo-pose")}
"""Name, as `modelcrate convert` takes it -> checkpoint in the format of OpenMMLab's."""
HELD_OUT_SEED: Final = 77
"""Seed of the scenes that accuracy is measured on; the models were trained on scenes of other seeds."""
DEMO_SEED: Final = 111
"""Seed of the scene that is shown; of no training run either."""
