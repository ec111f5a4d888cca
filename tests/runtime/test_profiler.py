"""Latency: statistics of known samples, a clock that is ours, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, TaskMismatchError
from modelcrate_runtime import profiler
from modelcrate_runtime.cli import app
from modelcrate_runtime.profiler import Latency, latency_ms, measure_seconds, network_call
from modelcrate_runtime.tasks import Detector, PoseDetector, open_task


def test_statistics_of_known_samples() -> None:
    of = Latency.of([0.001 * value for value in (4, 1, 3, 2, 10)], inputs=2)
    assert (of.mean_ms, of.median_ms, of.min_ms, of.max_ms) == pytest.approx((4, 3, 1, 10))
    assert of.p90_ms == pytest.approx(10)
    assert of.std_ms == pytest.approx(np.std([4, 1, 3, 2, 10]))
    assert of.per_second == pytest.approx(500)
    uniform = Latency.of(np.linspace(0.001, 0.101, 1001).tolist())
    assert uniform.p90_ms == pytest.approx(91, abs=0.2)
    assert uniform.median_ms == pytest.approx(51, abs=0.1)


def test_only_the_calls_after_the_warmup_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls: list[float] = []

    def call() -> None:
        calls.append(now[0])
        now[0] += 100.0 if len(calls) <= 3 else 0.5

    monkeypatch.setattr(profiler.time, "perf_counter", lambda: now[0])
    assert measure_seconds(call, runs=4, warmup=3) == [0.5] * 4
    assert len(calls) == 7
    assert all(b > a for a, b in pairwise(calls))


def test_the_network_alone_takes_a_batch(demo_pose_bundle: Path) -> None:
    with PoseDetector(demo_pose_bundle) as estimator:
        assert network_call(estimator.session, batch=3)()["simcc_x"].shape[0] == 3
        assert latency_ms(estimator.session, runs=3, warmup=1) > 0


def test_a_fixed_batch_is_the_only_one(demo_pose_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PoseDetector(demo_pose_bundle) as estimator:
        fixed = type("Fixed", (), {"inputs": [type("Spec", (), {"shape": (1, 3, 8, 8), "dtype": "float32", "name": "input"})]})
        with pytest.raises(ConfigError, match="expected 1, the only one"):
            network_call(fixed, batch=2)
        assert estimator.max_batch > 1


def test_a_bundle_is_opened_in_the_class_of_its_task(demo_pose_bundle: Path, demo_detector_bundle: Path) -> None:
    for place, kind in ((demo_pose_bundle, PoseDetector), (demo_detector_bundle, Detector)):
        with open_task(Bundle.open(place), threads=1) as task:
            assert type(task) is kind
    foreign = Bundle.open(demo_pose_bundle)
    foreign.pipeline.postprocess.module = "mmocr"
    with pytest.raises(TaskMismatchError, match="found a bundle of mmocr"):
        open_task(foreign)


def test_the_command(demo_detector_bundle: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((48, 64, 3), dtype=np.uint8))
    command = ["profile", str(demo_detector_bundle), "--warmup", "1", "--runs", "3", "--threads", "1"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "per second" in shown.output
    assert "image to result" not in shown.output
    result = json.loads(CliRunner().invoke(app, [*command, "--batch", "2", str(tmp_path / "photo.png"), "--json"]).stdout)
    assert result["settings"] | {"bundle": ""} == {"bundle": "", "device": "cpu", "threads": 1, "batch": 2, "warmup": 1, "runs": 3}
    for of in result["results"].values():
        assert 0 < of["min_ms"] <= of["median_ms"] <= of["p90_ms"] <= of["max_ms"]
    assert set(result["results"]) == {"network", "image to result"}
    wrong = CliRunner().invoke(app, [*command, str(tmp_path / "gone.png")])
    assert wrong.exit_code == 10
