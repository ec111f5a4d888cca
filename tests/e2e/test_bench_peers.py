"""The benchmark against the peers: it tells results that are the same from others, and runs where the peers are."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/bench_peers.py"
SIZE_WH = (640, 480)


@pytest.fixture(scope="module")
def rules() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/peer_agreement.py")))


def found(*, shift_px: float = 0.0, box_px: float = 0.0, count: int = 4, score: float = 0.9) -> list[tuple[np.ndarray, np.ndarray]]:
    """One picture with boxes beside each other, and 17 keypoints in each."""
    corners = np.array([(10 + 150 * i, 20) for i in range(count)], dtype=float).reshape(-1, 2)
    boxes = np.concatenate([corners + box_px, corners + (100, 200), np.full((count, 1), score)], axis=1)
    keypoints = corners[:, None] + np.linspace((10, 10), (90, 190), 17) + shift_px
    return [(boxes, keypoints)]


def complaints(rules: SimpleNamespace, peer: str, theirs: list) -> str:
    rule = rules.RULES[peer]
    return "; ".join(rules.complaints(rule, rules.difference(found(), theirs, rule=rule, thr=0.5, size_wh=SIZE_WH)))


@pytest.mark.parametrize("peer", ["mmdeploy_runtime", "rtmlib"])
def test_results_that_are_not_the_same_are_named(rules: SimpleNamespace, peer: str) -> None:
    assert complaints(rules, peer, found()) == ""
    assert "a box is 0.100 px off" in complaints(rules, peer, found(box_px=0.1))
    assert "1 boxes have no partner" in complaints(rules, peer, found(count=3))
    assert "0.0% of the keypoints" in complaints(rules, peer, found(shift_px=2.0))
    assert "no boxes to compare" in complaints(rules, peer, [(np.zeros((0, 5)), np.zeros((0, 17, 2)))])


def test_a_bin_is_half_a_pixel_of_the_crop(rules: SimpleNamespace) -> None:
    """100 x 200 grows to 150 x 200, and by a quarter: 187.5 pixels on 192 of the network."""
    one = rules.bin_px(np.array([0, 0, 100, 200]))
    assert one == pytest.approx(187.5 / 384)
    assert complaints(rules, "rtmlib", found(shift_px=one)) == ""
    assert complaints(rules, "rtmlib", found(shift_px=1.1 * one))
    assert complaints(rules, "mmdeploy_runtime", found(shift_px=one))


def test_a_score_at_the_threshold_may_go_either_way(rules: SimpleNamespace) -> None:
    rule = rules.RULES["mmdeploy_runtime"]
    figures = rules.difference(found(score=0.50005), found(count=3, score=0.50005), rule=rule, thr=0.5, size_wh=SIZE_WH)
    assert figures["alone"] == 0
    assert figures["boxes"] == 3


def test_boxes_over_the_edge_are_cut_and_their_poses_left_out(rules: SimpleNamespace) -> None:
    (boxes, keypoints), (over, moved) = found()[0], found()[0]
    boxes[0, 0], over[0, 0] = 0.0, -7.0
    moved[0] += 5
    over, moved = np.concatenate([[[10, 500, 90, 600, np.nan]], over]), np.concatenate([moved[:1], moved])  # below the picture, in the padding
    figures = rules.difference([(boxes, keypoints)], [(over, moved)], rule=rules.RULES["rtmlib"], thr=0.5, size_wh=SIZE_WH)
    assert figures["alone"] == 0
    assert figures["worst_box_px"] == 0.0
    assert figures["keypoints"] == 3 * 17
    assert figures["worst_px"] == 0.0


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=280, check=False)


def test_a_row_that_random_weights_cannot_have() -> None:
    done = bench("--models", "rtmpose-m", "--rows", "tracker")
    assert done.returncode == 1
    assert done.stderr.strip() == "bench_peers: --rows: expected some of detector, pose-1, pose-4, pose-8, found tracker"


@pytest.mark.skipif(
    not all((ROOT / place / ".installed").is_file() for place in (".venv-sdk", ".venv-peers")),
    reason="needs mmdeploy_runtime and rtmlib: scripts/setup-peers (Python 3.11, x86-64 Linux)",
)
@pytest.mark.xdist_group("sdk")
def test_two_rounds(tmp_path: Path) -> None:
    small = ("--rounds", "2", "--calls", "2", "--frames", "4", "--rows", "detector,pose-4,top-down,tracker", "--fast", "openvino")
    done = bench(*small, "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "peers.json").read_text(), parse_constant=pytest.fail)
    assert report["schema"] == "modelcrate.peers/1"
    names = ["modelcrate", "modelcrate, geometry sdk", "mmdeploy_runtime", "rtmlib", "modelcrate, openvino"]
    assert list(report["contenders"]) == names
    assert report["contenders"]["mmdeploy_runtime"]["versions"]["mmdeploy-runtime"] == "1.3.1"
    assert report["contenders"]["rtmlib"]["versions"]["rtmlib"] == "0.0.16"
    assert report["host"]["cores"] >= 1
    assert [row["row"] for row in report["rows"]] == ["detector", "pose-4", "top-down", "tracker"]
    for row in report["rows"]:
        assert list(row["contenders"]) == names
        assert set(row["same"]) == {"mmdeploy_runtime", "rtmlib"}
        assert set(row["apart"]) == (set() if row["row"] == "tracker" else {"modelcrate, openvino"})
        for one in row["contenders"].values():
            assert len(one["samples"]) == one["latency"]["count"] == (2 if row["row"] == "tracker" else 4)
            assert all(seconds > 0 for seconds in one["samples"])
            assert all(ratio["low"] <= ratio["high"] for ratio in one["times"].values())
        assert row["contenders"]["rtmlib"]["times"]["rtmlib"]["times"] == 1.0
    assert set(report["rows"][-1]["figures"]) == set(names)
    for name in names:
        assert name in done.stdout
