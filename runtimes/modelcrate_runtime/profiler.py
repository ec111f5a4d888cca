"""How long a network takes on this machine."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from modelcrate_runtime.sessions import Session


def latency_ms(session: Session, *, runs: int = 30, warmup: int = 5) -> float:
    """The median time of one call on one input of zeros, in milliseconds: the network alone, without pre- and postprocessing."""
    feeds = {spec.name: np.zeros([dim if isinstance(dim, int) else 1 for dim in spec.shape], dtype=spec.dtype) for spec in session.inputs}
    seconds = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        session.run(feeds)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)
