"""How long a network, or the whole way from an image to a result, takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelcrate_bundle.errors import ConfigError

if TYPE_CHECKING:
    from modelcrate_runtime.sessions import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Statistics of the times of single calls, in milliseconds; `per_second` is inputs per second at the mean."""

    mean_ms: float
    median_ms: float
    min_ms: float
    max_ms: float
    p90_ms: float
    std_ms: float
    per_second: float

    @classmethod
    def of(cls, seconds: Sequence[float], *, inputs: int = 1) -> Latency:
        """From samples.

        Args:
            seconds: the time of each call; at least one.
            inputs: how many inputs a call has.
        """
        values = sorted(1e3 * value for value in seconds)
        mean = statistics.fmean(values)
        return cls(
            mean_ms=mean,
            median_ms=statistics.median(values),
            min_ms=values[0],
            max_ms=values[-1],
            p90_ms=values[min(int(0.9 * len(values)), len(values) - 1)],
            std_ms=statistics.pstdev(values),
            per_second=1e3 * inputs / mean if mean > 0 else float("inf"),
        )


def measure_seconds(call: Callable[[], Any], *, runs: int, warmup: int) -> list[float]:
    """The time of each of `runs` calls, after `warmup` that do not count."""
    seconds = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        call()
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def network_call(session: Session, *, batch: int | None = None) -> Callable[[], Any]:
    """One call of the network alone, on zeros.

    Args:
        session: the network.
        batch: inputs in the call; None for 1, or the only number that it takes.

    Raises:
        ConfigError: a batch that the network does not take.
    """
    feeds = {}
    for spec in session.inputs:
        first = spec.shape[0]
        if isinstance(first, int) and batch not in {None, first}:
            raise ConfigError(f"batch: expected {first}, the only one that the network takes, found {batch}")
        sides = (first if isinstance(first, int) else batch or 1, *(dim if isinstance(dim, int) else 1 for dim in spec.shape[1:]))
        feeds[spec.name] = np.zeros(sides, dtype=spec.dtype)
    return lambda: session.run(feeds)


def latency_ms(session: Session, *, runs: int = 30, warmup: int = 5) -> float:
    """The median time of one call on the fewest inputs that the network takes, in milliseconds: the network alone."""
    return Latency.of(measure_seconds(network_call(session), runs=runs, warmup=warmup)).median_ms
