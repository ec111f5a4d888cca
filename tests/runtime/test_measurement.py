"""Times of calls on a clock that is ours, and what is said of samples whose distribution is known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcrate_runtime.measurement import Doubt, Latency, Load, Ratio, doubts, measure_seconds, take_turns

Samples = st.lists(st.floats(1e-6, 10, allow_nan=False), min_size=1, max_size=60)
FIGURES = ("mean_ms", "median_ms", "min_ms", "max_ms", "p90_ms", "p95_ms", "p99_ms", "std_ms")


class Machine:
    """A clock that only calls move on.

    Attributes:
        now: seconds.
        log: what was called, in order.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes these times one after another, and the last one from then on."""
        left = list(seconds)

        def work() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


# --------------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_samples_that_can_be_reckoned_by_hand() -> None:
    of = Latency.of([0.001 * value for value in (4, 1, 3, 2, 10)], inputs=2)
    assert (of.count, of.mean_ms, of.median_ms, of.min_ms, of.max_ms) == pytest.approx((5, 4, 3, 1, 10))
    assert of.std_ms == pytest.approx(math.sqrt((0 + 9 + 1 + 4 + 36) / 4)), "of a sample: n - 1"
    # Definition 7: between ranks 4 and 5 at 0.9 * 4 = 3.6, 3.8, 3.96.
    assert (of.p90_ms, of.p95_ms, of.p99_ms) == pytest.approx((4 + 0.6 * 6, 4 + 0.8 * 6, 4 + 0.96 * 6))
    assert of.per_second == pytest.approx(500)


def test_one_call_has_no_spread() -> None:
    of = Latency.of([0.002])
    assert [getattr(of, name) for name in FIGURES] == pytest.approx([2] * 7 + [0])
    assert (of.count, of.per_second) == (1, pytest.approx(500))


def test_no_time_at_all_is_no_division_by_zero() -> None:
    assert Latency.of([0.0, 0.0]).per_second == math.inf


@pytest.mark.parametrize(
    ("draw", "quantile", "std"),
    [
        (lambda u: u, lambda q: q, math.sqrt(1 / 12)),
        (lambda u: -np.log1p(-u), lambda q: -math.log1p(-q), 1.0),
        (lambda u: (1 - u) ** (-1 / 4), lambda q: (1 - q) ** (-1 / 4), math.sqrt(4 / (9 * 2))),
    ],
    ids=["uniform", "exponential", "Pareto 4"],
)
def test_percentiles_and_spread_of_known_distributions(draw: Callable[..., np.ndarray], quantile: Callable[[float], float], std: float) -> None:
    """A grid of equally likely values in place of random ones: no luck is needed."""
    values = draw((np.arange(200_000) + 0.5) / 200_000)
    of = Latency.of(np.random.default_rng(0).permutation(values))
    for q, found in ((0.5, of.median_ms), (0.9, of.p90_ms), (0.95, of.p95_ms), (0.99, of.p99_ms)):
        assert found == pytest.approx(1e3 * quantile(q), rel=1e-3)
    assert of.std_ms == pytest.approx(1e3 * std, rel=1e-2)


@given(Samples)
def test_figures_are_numpys_and_in_order(seconds: list[float]) -> None:
    of = Latency.of(seconds)
    expected = [np.percentile(1e3 * np.array(seconds), q) for q in (50, 90, 95, 99)]
    assert [of.median_ms, of.p90_ms, of.p95_ms, of.p99_ms] == pytest.approx(expected)
    ordered = [of.min_ms, of.median_ms, of.p90_ms, of.p95_ms, of.p99_ms, of.max_ms]
    assert all(b >= a * (1 - 1e-12) for a, b in zip(ordered, ordered[1:], strict=False))
    assert of.min_ms * (1 - 1e-12) <= of.mean_ms <= of.max_ms * (1 + 1e-12)
    assert 0 <= of.std_ms <= (of.max_ms - of.min_ms + 1e-9)
    assert of.count == len(seconds)


@given(Samples, st.floats(1e-3, 1e3), st.randoms())
def test_figures_scale_with_the_samples_and_do_not_know_their_order(seconds: list[float], factor: float, chance: object) -> None:
    of = Latency.of(seconds)
    mixed = [factor * value for value in seconds]
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    scaled = Latency.of(mixed)
    for name in FIGURES:
        assert getattr(scaled, name) == pytest.approx(factor * getattr(of, name), rel=1e-6, abs=1e-9 * factor)
    assert scaled.per_second == pytest.approx(of.per_second / factor)


# -------------------------------------------------------------------------------------------------------------------------- turns


def test_only_the_calls_after_the_warmup_count() -> None:
    machine = Machine()
    found = measure_seconds(machine.call("a", 100, 100, 100, 0.5, 0.25), runs=4, warmup=3, clock=machine.clock)
    assert found == [0.5, 0.25, 0.25, 0.25]
    assert len(machine.log) == 7


def test_who_begins_changes_from_round_to_round() -> None:
    machine = Machine()
    calls = {name: machine.call(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    found = take_turns(calls, rounds=4, warmup=1, clock=machine.clock)
    assert "".join(machine.log) == "abc" + "bca" + "cab" + "abc" + "bca"
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}
    assert list(found) == ["a", "b", "c"]


def test_what_happens_between_turns_is_nobodys() -> None:
    """The clock goes on while it is reported."""
    machine = Machine()

    def report(done: int, total: int) -> None:
        machine.now += 1000

    assert take_turns({"a": machine.call("a", 1.0), "b": machine.call("b", 2.0)}, rounds=2, clock=machine.clock, report=report) == {"a": [1, 1], "b": [2, 2]}


def test_several_timed_calls_in_a_turn_are_each_timed() -> None:
    machine = Machine()
    found = take_turns({"a": machine.call("a", 1, 2, 3, 4, 5, 6), "b": machine.call("b", 8.0)}, rounds=2, each=3, clock=machine.clock)
    assert found == {"a": [1, 2, 3, 4, 5, 6], "b": [8.0] * 6}
    assert "".join(machine.log) == "aaabbb" + "bbbaaa"


@pytest.mark.parametrize(("settle_s", "uncounted"), [(0.0, 0), (0.001, 1), (1.0, 1), (1.5, 2), (2.0, 2), (2.5, 3)])
def test_calls_that_settle_the_machine_do_not_count(settle_s: float, uncounted: int) -> None:
    """Of a second each: they end as soon as the time is over, and there is one however short the time is."""
    machine = Machine()
    found = take_turns({"a": machine.call("a", 1.0), "b": machine.call("b", 4.0)}, rounds=2, each=2, settle_s=settle_s, clock=machine.clock)
    assert found == {"a": [1.0] * 4, "b": [4.0] * 4}
    assert machine.log.count("a") == 2 * (uncounted + 2)
    assert machine.log.count("b") == 2 * (min(uncounted, 1) + 2)


def test_the_first_call_of_a_turn_is_the_slow_one_that_settling_takes_away() -> None:
    machine = Machine()
    last = [""]

    def call(name: str) -> Callable[[], None]:
        def work() -> None:
            machine.now += 1.0 if last[0] == name else 5.0  # caches are another's
            last[0] = name

        return work

    calls = {name: call(name) for name in "ab"}
    assert max(take_turns(calls, rounds=3, each=2, clock=machine.clock)["a"]) == 5
    assert take_turns(calls, rounds=3, each=2, settle_s=0.1, clock=machine.clock) == {"a": [1.0] * 6, "b": [1.0] * 6}


def test_several_calls_of_one_name_are_gone_through_in_step_with_those_of_the_others() -> None:
    """Calls that do not count are more of what is fast; they do not decide which calls do."""
    machine = Machine()
    calls = {name: [machine.call(f"{name}{i}", seconds) for i in range(3)] for name, seconds in (("a", 1.0), ("b", 4.0))}
    found = take_turns(calls, rounds=2, warmup=1, each=2, settle_s=3.5, clock=machine.clock)
    assert found == {"a": [1.0] * 4, "b": [4.0] * 4}
    timed = []
    for name, length in (("a", 6), ("b", 3), ("b", 3), ("a", 6), ("a", 6), ("b", 3)):
        turn, machine.log = machine.log[:length], machine.log[length:]
        assert {call[0] for call in turn} == {name}
        timed.append(" ".join(turn[-2:]))
    assert timed == ["a0 a1", "b0 b1", "b2 b0", "a2 a0", "a1 a2", "b1 b2"]
    assert machine.log == []


def test_rounds_are_reported_with_the_warmup_and_can_be_interrupted() -> None:
    machine = Machine()
    told: list[tuple[int, int]] = []
    take_turns({"a": machine.call("a", 1.0)}, rounds=3, warmup=2, clock=machine.clock, report=lambda *done: told.append(done))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": machine.call("a", 1.0)}, rounds=3, clock=machine.clock, report=interrupt)


def test_an_error_of_a_call_is_the_callers() -> None:
    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measure_seconds(broken, runs=1, warmup=0)


# -------------------------------------------------------------------------------------------------------------------------- ratio


def slow_moments(rng: np.random.Generator, count: int, rho: float) -> np.ndarray:
    """(count,) an autoregressive process of variance 1."""
    noise = rng.standard_normal(count)
    for i in range(1, count):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return noise


def noisy_pair(seed: int, *, times: float, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Calls that took turns on a busy machine: slow moments hit both, and each call has noise and seldom an outlier of its own."""
    rng = np.random.default_rng(seed)
    shared = 0.05 * slow_moments(rng, count, 0.8)
    own = 0.03 * rng.standard_normal((2, count)) + rng.exponential(1, (2, count)) * (rng.random((2, count)) < 0.03)
    return np.exp(shared + own[0]), np.exp(shared + own[1]) / times


def test_the_interval_has_the_true_ratio_in_it_as_often_as_it_says() -> None:
    hits = dict.fromkeys((0.5, 0.95), 0)
    for seed in range(80):
        base, other = noisy_pair(seed, times=1.1, count=80)
        for confidence in hits:
            of = Ratio.of(base, other, confidence=confidence)
            hits[confidence] += of.low <= 1.1 <= of.high
    assert hits[0.95] >= 0.9 * 80
    assert 0.4 * 80 <= hits[0.5] <= 0.8 * 80, "as wide as it says, and not wider"


def test_what_is_the_same_is_seldom_called_another() -> None:
    verdicts = [Ratio.of(*noisy_pair(seed, times=1.0, count=80)).verdict for seed in range(60)]
    assert verdicts.count("the same") >= 54


def test_a_difference_of_five_per_cent_is_found_in_noise_of_six() -> None:
    for times, verdict in ((1.05, "faster"), (1 / 1.05, "slower")):
        verdicts = [Ratio.of(*noisy_pair(seed, times=times, count=200)).verdict for seed in range(20)]
        assert verdicts.count(verdict) >= 18


def turns(seed: int, *, times: float, each: int = 10, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """What `take_turns` gives for several calls in a turn: whole turns are slow or fast, each for itself (where threads lie, what ran just before)."""
    rng = np.random.default_rng(seed)
    values = np.exp(0.03 * np.repeat(rng.standard_normal((2, rounds)), each, axis=1) + 0.01 * rng.standard_normal((2, rounds * each)))
    return values[0], values[1] / times


def test_calls_of_one_turn_are_not_taken_for_independent_ones() -> None:
    hits = 0
    for seed in range(80):
        of = Ratio.of(*turns(seed, times=1.1), each=10)
        hits += of.low <= 1.1 <= of.high
    assert hits >= 0.9 * 80


def test_the_same_samples_give_the_same_interval_and_another_seed_another() -> None:
    base, other = noisy_pair(1, times=1.2)
    assert Ratio.of(base, other) == Ratio.of(base.tolist(), other.tolist())
    again = Ratio.of(base, other, seed=1)
    assert again.times == Ratio.of(base, other).times
    assert (again.low, again.high) != (Ratio.of(base, other).low, Ratio.of(base, other).high)


def test_the_unit_of_time_does_not_matter() -> None:
    base, other = noisy_pair(2, times=1.2)
    one, thousand = Ratio.of(base, other), Ratio.of(1e3 * base, 1e3 * other)
    assert (thousand.times, thousand.low, thousand.high) == pytest.approx((one.times, one.low, one.high))
    faster = Ratio.of(2 * base, other)
    assert (faster.times, faster.low, faster.high) == pytest.approx((2 * one.times, 2 * one.low, 2 * one.high))


def test_a_thing_is_as_fast_as_itself() -> None:
    base, _ = noisy_pair(3, times=1)
    of = Ratio.of(base, base)
    assert (of.times, of.low, of.high, of.verdict, of.rounds, of.confidence) == (1, 1, 1, "the same", 120, 0.95)


def test_times_is_the_ratio_of_the_medians_and_lies_in_the_interval() -> None:
    base, other = noisy_pair(4, times=1.3)
    of = Ratio.of(base, other, confidence=0.9)
    assert of.times == pytest.approx(np.median(base) / np.median(other))
    wide = Ratio.of(base, other, confidence=0.99)
    assert wide.low < of.low < of.times < of.high < wide.high


def test_one_round_has_an_interval_without_width() -> None:
    of = Ratio.of([2.0], [1.0])
    assert (of.times, of.low, of.high, of.verdict, of.rounds) == (2, 2, 2, "faster", 1)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.01, 1.2, "faster"), (0.5, 0.99, "slower"), (0.99, 1.01, "the same"), (1.0, 1.2, "the same"), (0.9, 1.0, "the same")]
)
def test_a_verdict_needs_one_to_be_outside(low: float, high: float, verdict: str) -> None:
    assert replace(Ratio.of([1.0], [1.0]), low=low, high=high).verdict == verdict


@pytest.mark.parametrize(("ours", "theirs"), [([1.0, 2.0], [1.0]), ([], []), ([], [1.0])])
def test_samples_that_are_no_pairs_are_an_error(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=rf"expected as many times of both, found {len(ours)} and {len(theirs)}"):
        Ratio.of(ours, theirs)


# ------------------------------------------------------------------------------------------------------------------------- doubts

PLAIN = {
    "normal": lambda rng, count: rng.normal(1, 0.01, count),
    "wide normal": lambda rng, count: rng.normal(1, 0.1, count),
    "uniform": lambda rng, count: rng.uniform(1, 1.5, count),
    "exponential": lambda rng, count: rng.exponential(1, count),
    "never faster than 1": lambda rng, count: 1 + rng.exponential(0.1, count),
    "lognormal": lambda rng, count: rng.lognormal(0, 0.2, count),
    "wide lognormal": lambda rng, count: rng.lognormal(0, 1, count),
}


def found(seconds: np.ndarray, load: Load | None = None) -> dict[str, Doubt]:
    """Doubts by kind, each of them once and with something to do."""
    those = doubts(1e-3 * np.asarray(seconds), load)
    assert all(one.what and one.do for one in those)
    assert len({one.kind for one in those}) == len(those)
    return {one.kind: one for one in those}


@pytest.mark.parametrize("count", [5, 15, 20, 30, 50, 100, 300])
@pytest.mark.parametrize("name", PLAIN)
def test_calls_of_one_kind_that_do_not_change_are_seldom_doubted(name: str, count: int) -> None:
    wrong = {"drift": 0, "two modes": 0}
    for seed in range(200):
        for kind in found(PLAIN[name](np.random.default_rng([seed, count]), count)).keys() & wrong.keys():
            wrong[kind] += 1
    assert wrong["drift"] <= 2
    assert wrong["two modes"] <= 8


def test_a_quiet_machine_raises_no_doubt_at_all() -> None:
    quiet = Load(others=0.01, stolen=0.0, throttled=0, frequency=1.02)
    assert found(np.random.default_rng(0).normal(1, 0.01, 200), quiet) == {}
    assert found(np.full(200, 2.0), quiet) == {}
    assert found(np.full(200, 2.0), Load()) == {}, "what the system does not say is no doubt"


@pytest.mark.parametrize(("count", "is_few"), [(1, True), (30, True), (99, True), (100, False), (200, False)])
def test_few_calls_have_no_99th_percentile(count: int, is_few: bool) -> None:
    those = found(np.full(count, 1.0))
    assert ("few" in those) == is_few
    if is_few:
        assert f"{count} calls" in those["few"].what
        assert those["few"].do == "--runs 200"
        assert set(those) == {"few"}


@pytest.mark.parametrize("count", [30, 60, 200, 2000])
@pytest.mark.parametrize(("end", "words", "do"), [(1.3, "30% slower", "cool"), (0.7, "30% faster", "--warmup")])
def test_a_machine_that_gets_hot_or_warms_up_is_seen(count: int, end: float, words: str, do: str) -> None:
    rng = np.random.default_rng(count)
    values = np.repeat([1.0, (1 + end) / 2, end], count // 3) * rng.normal(1, 0.001, count // 3 * 3)
    drift = found(values)["drift"]
    assert words in drift.what
    assert do in drift.do


def test_a_steady_drift_is_seen_through_noise_and_a_small_one_is_not_worth_a_word() -> None:
    rng = np.random.default_rng(0)
    assert "drift" in found(np.linspace(1, 1.4, 200) * rng.lognormal(0, 0.1, 200))
    assert "drift" not in found(np.linspace(1, 1.04, 200))
    assert "drift" not in found(np.linspace(1, 2, 14)), "too few to say"


def test_a_clock_of_coarse_ticks_makes_no_drift() -> None:
    """Calls of one or of two ticks by chance: equal times have equal ranks."""
    drifts = sum("drift" in found(np.random.default_rng(seed).choice([1.0, 2.0], 200)) for seed in range(50))
    assert drifts == 0
    assert "drift" in found(np.repeat([1.0, 2.0], 100))


@pytest.mark.parametrize("count", [60, 200, 1000])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_two_kinds_of_calls_are_seen_however_they_are_mixed(share: float, count: int) -> None:
    rng = np.random.default_rng(count)
    slow = rng.permutation(count) < round(share * count)
    values = np.where(slow, 2.0, 1.0) * rng.lognormal(0, 0.05, count)
    doubt = found(values)["two modes"]
    share_fast, fast, others = (float(word) for word in re.findall(r"[\d.]+", doubt.what))
    assert share_fast == pytest.approx(100 * (1 - share), abs=0.51)
    assert (fast, others) == pytest.approx((1, 2), rel=0.05)
    assert "taskset" in doubt.do


def test_a_few_outliers_and_modes_that_hardly_differ_are_no_two_kinds() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1, 0.01, 200)
    values[::40] = 5.0
    assert "two modes" not in found(values)
    assert "two modes" not in found(np.where(rng.random(200) < 0.5, 1.0, 1.03) * rng.normal(1, 0.001, 200)), "3 %: not worth a word"
    assert "two modes" in found(np.where(rng.random(200) < 0.5, 1.0, 1.08) * rng.normal(1, 0.001, 200))


@pytest.mark.parametrize(("sigma", "is_wide"), [(0.05, False), (0.1, True), (0.3, True)])
def test_a_wide_middle_half_is_seen(sigma: float, is_wide: bool) -> None:
    """Of a normal distribution it is 1.349 sigma wide."""
    grid = np.array([math.sqrt(2) * float(x) for x in _normal_grid(400)])
    those = found(1 + sigma * np.random.default_rng(0).permutation(grid))
    assert ("spread" in those) == is_wide
    if is_wide:
        assert f"{1.349 * sigma:.0%}" in those["spread"].what
        assert "--runs" in those["spread"].do


@pytest.mark.parametrize(
    ("values", "has_tail"),
    [
        ([1.0] * 190 + [10.0] * 10, True),
        ([1.0] * 190 + [5.0] * 10, False),
        ([1.0] * 9 + [100.0], True),
        ([1.0] * 4, False),
        ([1.0, 1.0, 1.0, 100.0], False),
        ([10.0] * 190 + [0.1] * 10, False),
        (np.linspace(1, 3, 200), False),
        (-np.log1p(-(np.arange(200) + 0.5) / 200), True),
    ],
    ids=["5 % at ten times", "5 % at five times", "one of ten", "four alike", "four", "fast ones", "uniform", "exponential"],
)
def test_a_mean_that_few_slow_calls_make_is_doubted(values: list[float], has_tail: bool) -> None:
    """A quarter more than the median: 5 % of calls at ten times the others make it 1.45, at five times 1.2."""
    those = found(np.random.default_rng(0).permutation(values))
    assert ("tail" in those) == has_tail
    if has_tail:
        assert f"{np.mean(values):.2f} ms in the mean, {np.median(values):.2f} in the median" in those["tail"].what


def _normal_grid(count: int) -> np.ndarray:
    """(count,) inverse of the error function at equally likely points."""
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]) / math.sqrt(2)


@pytest.mark.parametrize(
    ("load", "kind", "words"),
    [
        (Load(others=0.31), "load", ("31%", "compare")),
        (Load(stolen=0.12), "stolen", ("12%", "compare")),
        (Load(throttled=3), "throttled", ("3 times", "cool")),
        (Load(frequency=0.6), "frequency", ("60%", "cpupower")),
        (Load(frequency=1.5), "frequency", ("150%", "cpupower")),
    ],
    ids=str,
)
def test_what_else_the_machine_did_is_doubted_with_its_figure(load: Load, kind: str, words: tuple[str, str]) -> None:
    steady = np.random.default_rng(0).normal(1, 0.01, 200)
    those = found(steady, load)
    assert set(those) == {kind}
    assert words[0] in those[kind].what
    assert words[1] in those[kind].do


@pytest.mark.parametrize("load", [Load(others=0.04), Load(stolen=0.01), Load(throttled=0), Load(frequency=0.95), Load(frequency=1.05)], ids=str)
def test_what_hardly_matters_is_not_doubted(load: Load) -> None:
    assert found(np.random.default_rng(0).normal(1, 0.01, 200), load) == {}


def test_all_that_is_wrong_is_said() -> None:
    rng = np.random.default_rng(0)
    values = np.where(np.arange(60) < 30, 1.0, 2.0) * rng.lognormal(0, 0.02, 60)
    those = found(values, Load(others=0.5, stolen=0.5, throttled=1, frequency=0.5))
    assert list(those) == ["few", "drift", "two modes", "spread", "load", "stolen", "throttled", "frequency"]
