"""Times of calls: how they are taken, what is said of them, and whether they are to be believed.

A clock is an argument everywhere, so that all of it is tested on known distributions and no test waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call: TypeAlias = Callable[[], Any]
Clock: TypeAlias = Callable[[], float]
Report: TypeAlias = Callable[[int, int], None]
"""Called with the number of calls that are done, and of all."""
_RESAMPLES: Final = 2000
"""Resamples of a bootstrap: the ends of a 95 % interval of so many move by less than the interval's own noise."""
_ENOUGH_FOR_P99: Final = 100
_CHANGE: Final = 0.05
"""Differences below this share of the median are not worth a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Statistics of the times of single calls, in milliseconds.

    Attributes:
        count: calls.
        mean_ms: arithmetic mean.
        median_ms: 50th percentile.
        min_ms: fastest.
        max_ms: slowest.
        p90_ms: 90th percentile; percentiles are interpolated linearly (Hyndman and Fan's definition 7, NumPy's default).
        p95_ms: 95th.
        p99_ms: 99th.
        std_ms: standard deviation of the sample; 0 for one call.
        per_second: inputs per second at the mean.
    """

    count: int
    mean_ms: float
    median_ms: float
    min_ms: float
    max_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    std_ms: float
    per_second: float

    @classmethod
    def of(cls, seconds: Sequence[float], *, inputs: int = 1) -> Latency:
        """From samples.

        Args:
            seconds: the time of each call; at least one.
            inputs: how many inputs a call has.
        """
        values = 1e3 * np.asarray(seconds, dtype=np.float64)
        mean = float(values.mean())
        median, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
        return cls(
            count=len(values),
            mean_ms=mean,
            median_ms=median,
            min_ms=float(values.min()),
            max_ms=float(values.max()),
            p90_ms=p90,
            p95_ms=p95,
            p99_ms=p99,
            std_ms=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            per_second=1e3 * inputs / mean if mean > 0 else float("inf"),
        )


def measure_seconds(call: Call, *, runs: int, warmup: int, clock: Clock = time.perf_counter, report: Report | None = None) -> list[float]:
    """The time of each of `runs` calls, after `warmup` that do not count."""
    return take_turns({"": call}, rounds=runs, warmup=warmup, clock=clock, report=report)[""]


def take_turns(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 0,
    each: int = 1,
    settle_s: float = 0.0,
    clock: Clock = time.perf_counter,
    report: Report | None = None,
) -> dict[str, list[float]]:
    """Time several calls by turns, so that whatever else the machine does hits all of them alike.

    Who begins changes from round to round: a call's time depends on what ran just before it. Threads of some frameworks go on spinning for some milliseconds
    after a call, and caches are another's; so a turn may begin with calls that do not count.

    Args:
        calls: name -> what to time.
        rounds: turns of each that count.
        warmup: rounds before them.
        each: timed calls in a turn.
        settle_s: calls of so much time before them, at least one if it is not 0, do not count.
        clock: seconds.
        report: gets the number of rounds that are done, and of all.

    Returns:
        Name -> seconds of its `rounds * each` calls; the same position is the same round for all.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            taken = _turn(calls[name], each, settle_s, clock)
            if i >= warmup:
                seconds[name] += taken
        if report:
            report(i + 1, warmup + rounds)
    return seconds


def _turn(call: Call, each: int, settle_s: float, clock: Clock) -> list[float]:
    until = clock() + settle_s
    while settle_s:
        call()
        if clock() >= until:
            break
    taken = []
    for _ in range(each):
        start = clock()
        call()
        taken.append(clock() - start)
    return taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How many times as fast one thing is as another, with its confidence interval.

    Attributes:
        times: the base's median time by the other's: above 1 the other is faster.
        low: lower end of the interval.
        high: upper end.
        confidence: of the interval.
        rounds: pairs of calls.
    """

    times: float
    low: float
    high: float
    confidence: float
    rounds: int

    @classmethod
    def of(cls, base: Sequence[float], other: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Ratio:
        """From calls that took turns.

        The interval is a percentile bootstrap over rounds: both times of a round are drawn together, since what slows one down slows down the other, and in
        blocks of neighbouring rounds (n ** 1/3, Kunsch 1989), since a slow moment lasts for more than one of them. The same samples give the same interval.

        Args:
            base: seconds, round by round.
            other: seconds of the same rounds.
            confidence: how often such an interval has the true ratio in it.
            seed: of the resampling.

        Raises:
            ValueError: not as many of the one as of the other, or none.
        """
        ours, theirs = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
        if len(ours) != len(theirs) or not len(ours):
            raise ValueError(f"expected as many times of both, found {len(ours)} and {len(theirs)}")
        picked = _blocks(len(ours), seed)
        ratios = np.median(ours[picked], axis=1) / np.median(theirs[picked], axis=1)
        low, high = np.quantile(ratios, ((1 - confidence) / 2, (1 + confidence) / 2))
        return cls(times=float(np.median(ours) / np.median(theirs)), low=float(low), high=float(high), confidence=confidence, rounds=len(ours))

    @property
    def verdict(self) -> str:
        """One of "faster", "slower", and "the same" where the interval has 1 in it: no difference is shown."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "the same"


def _blocks(count: int, seed: int) -> NDArray[np.intp]:
    """(_RESAMPLES, count) indices: resamples made of blocks of neighbours, around the end to the beginning."""
    length = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, -(-count // length)))
    indices: NDArray[np.intp] = (starts[:, :, None] + np.arange(length)).reshape(_RESAMPLES, -1)[:, :count] % count
    return indices


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the machine did beside the calls while they were timed; None where the system does not say.

    Attributes:
        others: share of all cores that other processes used.
        stolen: share that a virtual machine's host gave to others.
        throttled: how often a core was slowed down for its heat.
        frequency: cores' mean frequency at the end by that at the beginning.
    """

    others: float | None = None
    stolen: float | None = None
    throttled: int | None = None
    frequency: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """Why a measurement is not to be believed as it is, and what to do about it."""

    kind: str
    what: str
    do: str


def doubts(seconds: Sequence[float], load: Load | None = None) -> list[Doubt]:
    """Look for what makes figures depend on when they were taken.

    Args:
        seconds: the calls, in the order in which they were made.
        load: what else the machine did.
    """
    values = np.asarray(seconds, dtype=np.float64)
    found = [check for check in (_few(values), _drift(values), _two_modes(values), _spread(values), _tail(values)) if check is not None]
    return found + _of_load(load or Load())


def _few(values: NDArray[np.float64]) -> Doubt | None:
    if len(values) >= _ENOUGH_FOR_P99:
        return None
    return Doubt(kind="few", what=f"{len(values)} calls: the 99th percentile is the slowest of them, or nearly", do=f"--runs {2 * _ENOUGH_FOR_P99}")


def _drift(values: NDArray[np.float64]) -> Doubt | None:
    """Later calls slower, or faster, than earlier ones: the last third by the first, where ranks of time and order agree by more than chance (3.5 sigma)."""
    third = len(values) // 3
    if third < 5:
        return None
    change = float(np.median(values[-third:]) / np.median(values[:third])) - 1
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    agreement = float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
    if abs(change) <= _CHANGE or abs(agreement) <= max(0.3, 3.5 / math.sqrt(len(values) - 1)):
        return None
    how = "slower" if change > 0 else "faster"
    do = "let the machine cool down, or give it a fixed frequency" if change > 0 else "more --warmup"
    return Doubt(kind="drift", what=f"the last calls were {abs(change):.0%} {how} than the first", do=do)


def _two_modes(values: NDArray[np.float64]) -> Doubt | None:
    """Calls of two kinds: the best division of the log times in two (Otsu 1979), if the halves are far apart for their width.

    For a normal distribution the distance is 1.9 of the joint width, for a uniform one 2.4; two modes begin where nothing lies between them.
    """
    if len(values) < 20:
        return None
    logs = np.sort(np.log(np.maximum(values, 1e-12)))
    counts = np.arange(1, len(logs))
    sums = np.cumsum(logs)
    below, above = sums[:-1] / counts, (sums[-1] - sums[:-1]) / (len(logs) - counts)
    cut = int(np.argmax(counts * (len(logs) - counts) * (above - below) ** 2)) + 1
    fast, slow = logs[:cut], logs[cut:]
    distance, width = float(slow.mean() - fast.mean()), math.hypot(float(fast.std()), float(slow.std()))
    share = min(len(fast), len(slow)) / len(logs)
    if share < 0.1 or distance <= max(3.0 * width, math.log1p(_CHANGE)):
        return None
    what = f"two kinds of calls: {len(fast) / len(logs):.0%} near {1e3 * math.exp(fast.mean()):.2f} ms, the others near {1e3 * math.exp(slow.mean()):.2f} ms"
    return Doubt(kind="two modes", what=what, do="pin the process to cores of one kind (taskset), or give --threads; say both figures")


def _spread(values: NDArray[np.float64]) -> Doubt | None:
    low, median, high = np.percentile(values, (25, 50, 75))
    if len(values) < 5 or high - low <= 0.1 * median:
        return None
    return Doubt(kind="spread", what=f"the middle half of the calls differs by {(high - low) / median:.0%}", do="more --runs, fewer other programs")


def _tail(values: NDArray[np.float64]) -> Doubt | None:
    mean, median = float(values.mean()), float(np.median(values))
    if len(values) < 5 or mean <= 1.25 * median:
        return None
    what = f"some calls took far longer than most: {1e3 * mean:.2f} ms in the mean, {1e3 * median:.2f} in the median"
    return Doubt(kind="tail", what=what, do="fewer --threads than cores where other programs run; look at the slowest calls before a mean is quoted")


def _of_load(load: Load) -> list[Doubt]:
    found = []
    if load.others is not None and load.others > 0.05:
        found.append(Doubt(kind="load", what=f"other programs used {load.others:.0%} of the cores", do="stop them, or measure with compare, which takes turns"))
    if load.stolen is not None and load.stolen > 0.02:
        found.append(
            Doubt(kind="stolen", what=f"the host of this virtual machine took {load.stolen:.0%} of its cores", do="measure with compare, or elsewhere")
        )
    if load.throttled:
        found.append(
            Doubt(kind="throttled", what=f"cores were slowed down for their heat {load.throttled} times", do="cool it, or lower its frequency for good")
        )
    if load.frequency is not None and abs(load.frequency - 1) > 0.1:
        found.append(
            Doubt(
                kind="frequency",
                what=f"the cores ended at {load.frequency:.0%} of the frequency they began with",
                do="a fixed frequency: cpupower frequency-set -g performance",
            )
        )
    return found
