"""Our PoseTracker in mode "sdk" and the real one of mmdeploy_runtime 1.3.1 on the same ONNX Runtime: the same ids in every frame, coordinates within 1e-3 px.

They are equal to the last bit today, on both versions of NumPy. They have to be nearly so: boxes are rounded to whole pixels before they are cut out, and
where a last digit decides about half a pixel, another crop may have its peaks elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import tracker_bundles
from modelcrate_converter.people.dataset import walk
from modelcrate_runtime import PoseTracker
from tracker_bundles import SIGMAS, SIZE_WH, blank, paint, params_of, sequence, write_detections

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sdk/bin/python"
PIXELS = 1e-3

pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason="needs the real mmdeploy_runtime: scripts/setup-sdk (Python 3.11, x86-64 Linux)"),
    pytest.mark.xdist_group("sdk"),
]

REAL_PARAMS: list[dict[str, Any]] = [
    {},
    {"det_interval": 5, "track_kpt_thr": 0.3},
    {
        "det_interval": 3, "det_thr": 0.3, "track_kpt_thr": 0.2, "keypoint_sigmas": SIGMAS, "track_max_missing": 3, "smooth_params": [0.5, 1.0, 1.0],
    },
]  # fmt: skip


@dataclass
class Job:
    """One video to track."""

    detector: Path
    estimator: Path
    frames: list[np.ndarray]
    params: dict[str, Any] = field(default_factory=dict)
    detects: list[int] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        self.detects = self.detects or [-1] * len(self.frames)


Tracked = dict[str, np.ndarray]


def run(who: str, jobs: list[Job], folder: Path) -> list[Tracked]:
    described: list[dict[str, Any]] = []
    files: dict[int, str] = {}
    for job in jobs:
        key = id(job.frames)  # several jobs may have one video
        if key not in files:
            files[key] = str(folder / f"frames{len(files)}.npz")
            np.savez(files[key], **{str(t): frame for t, frame in enumerate(job.frames)})
        described.append(
            {
                "task": "PoseTracker", "detector": str(job.detector), "estimator": str(job.estimator), "frames": files[key], "detects": job.detects,
                "params": job.params,
            }
        )  # fmt: skip
    results = execute(who, described, folder)
    return [{name: results[f"{i}_{name}"] for name in ("counts", "ids", "keypoints", "tracked")} for i in range(len(jobs))]


def execute(who: str, described: list[dict[str, Any]], folder: Path) -> Mapping[str, np.ndarray]:
    """Run all jobs in one process of the SDK's environment."""
    (folder / "jobs.json").write_text(json.dumps(described))
    environment = os.environ | {"SPDLOG_LEVEL": "off", "PYTHONPATH": f"{ROOT / 'sdk_bundle'}:{ROOT / 'runtimes'}"}
    command = [str(PYTHON), str(Path(__file__).with_name("runner.py")), who, str(folder / "jobs.json"), str(folder / f"{who}.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, f"{who} ended with {done.returncode}: {done.stderr[-2000:]}"
    return np.load(folder / f"{who}.npz")


def run_here(job: Job) -> Tracked:
    """With this environment's NumPy, which promotes numbers by other rules."""
    with PoseTracker(job.detector, job.estimator, mode="sdk") as tracker:
        state = tracker.create_state(**job.params)
        found = [tracker(state, frame, detect) for frame, detect in zip(job.frames, job.detects, strict=True)]
    keypoints = [poses for poses, _, _ in found if len(poses)]
    return {
        "counts": np.array([len(ids) for _, _, ids in found]), "ids": np.concatenate([ids for _, _, ids in found]),
        "keypoints": np.concatenate(keypoints) if keypoints else np.zeros((0, 0, 3)), "tracked": np.concatenate([boxes for _, boxes, _ in found]),
    }  # fmt: skip


def check(job: Job, ours: Tracked, theirs: Tracked) -> None:
    """The first frame that differs is where to look, so it is named."""
    shared = min(len(ours["ids"]), len(theirs["ids"]))
    other = np.flatnonzero(ours["counts"] != theirs["counts"]).tolist()
    frame_of = np.repeat(np.arange(len(theirs["counts"])), theirs["counts"])[:shared]
    other += frame_of[ours["ids"][:shared] != theirs["ids"][:shared]].tolist()
    assert not other, f"{job.name}: the ids differ from frame {min(other)} on"
    assert ours["keypoints"].shape == theirs["keypoints"].shape, job.name
    if not shared:
        return
    worst = np.abs(ours["keypoints"][..., :2] - theirs["keypoints"][..., :2]).max(axis=(1, 2))
    worst = np.maximum(worst, np.abs(ours["tracked"] - theirs["tracked"]).max(axis=1))
    far = np.flatnonzero(~(worst <= PIXELS))  # NaN is far
    assert not far.size, f"{job.name}: {worst[far[0]]} px in frame {frame_of[far[0]]}, {len(far)} of {len(worst)} poses differ"
    np.testing.assert_allclose(ours["keypoints"][..., 2], theirs["keypoints"][..., 2], atol=1e-4, rtol=1e-4, err_msg=job.name)


def check_all(jobs: list[Job], folder: Path, *, here: bool = False) -> list[Tracked]:
    theirs = run("sdk", jobs, folder)
    for job, ours, reference in zip(jobs, run("ours", jobs, folder), theirs, strict=True):
        check(job, ours, reference)
    if here:
        for job, reference in zip(jobs, theirs, strict=True):
            check(job, run_here(job), reference)
    return theirs


# ------------------------------------------------------------------------------------------------------------ trained networks


def test_arm_wrestling(shared: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    """MMDeploy's detector and a real video: occlusion, motion blur, people who come and go."""
    video = cv2.VideoCapture(str(shared / "fixtures/video/arm_wrestling.mp4"))
    frames = [read[1] for _ in range(60) if (read := video.read())[0]]
    assert len(frames) == 60
    detector = shared / "fixtures/bundles/mmdeploy-rtmdet-nano"
    # The estimator is sure of little in a picture of people without legs: with the default threshold nobody is tracked.
    several = [*REAL_PARAMS, {"track_kpt_thr": 0.1, "det_interval": 2}]
    jobs = [Job(detector, demo_pose_bundle, frames, params, name=f"arm wrestling with {params}") for params in several]
    found = check_all(jobs, tmp_path)
    assert len(found[2]["ids"]) > 20
    assert len(found[3]["ids"]) > 200


@pytest.fixture(scope="module")
def walkers() -> list[np.ndarray]:
    """Five drawn people who walk to and fro, 640x360."""
    return [scene.image for scene in walk(3, frames=150, size_hw=(360, 640), people=5)]


MORE_PARAMS: dict[str, Any] = {
    "pose_max_num_bboxes": 2, "pose_min_bbox_size": 40.0, "det_min_bbox_size": 60.0, "pose_bbox_scale": 1.1, "pose_nms_thr": 0.3, "track_iou_thr": 0.2,
}  # fmt: skip


def test_walkers(walkers: list[np.ndarray], demo_detector_bundle: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    """With whom there are more of than there may be, and with the detector forced and suppressed at random."""
    rng = np.random.default_rng(5)
    at_random = rng.choice([-1, 0, 1], len(walkers)).tolist()
    jobs = [Job(demo_detector_bundle, demo_pose_bundle, walkers[:60], params, name=f"walkers with {params}") for params in REAL_PARAMS]
    jobs.append(Job(demo_detector_bundle, demo_pose_bundle, walkers, MORE_PARAMS | {"track_kpt_thr": 0.3}, at_random, "two of the walkers"))
    for found in check_all(jobs, tmp_path):
        assert len(found["ids"]) > 150
        assert len(set(found["ids"].tolist())) > 4


def test_frame_size_that_changes(walkers: list[np.ndarray], demo_detector_bundle: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    """The SDK keeps the first size for its boxes; what is cut out of the frame is cut out of the one that there is."""
    smaller = [frame if t < 25 else np.ascontiguousarray(frame[20:300, 80:500]) for t, frame in enumerate(walkers[:50])]
    larger = [np.ascontiguousarray(frame[20:300, 80:500]) if t < 25 else frame for t, frame in enumerate(walkers[:50])]
    params = {"track_kpt_thr": 0.3, "det_interval": 2}
    jobs = [Job(demo_detector_bundle, demo_pose_bundle, frames, params, name=name) for name, frames in (("smaller", smaller), ("larger", larger))]
    for found in check_all(jobs, tmp_path):
        assert found["counts"][25:].sum() > 20


def test_nothing_to_see(walkers: list[np.ndarray], demo_detector_bundle: Path, demo_pose_bundle: Path, tmp_path: Path) -> None:
    """Black frames: none at all but those, and in between, for longer and for shorter than a track is kept."""
    black = np.zeros_like(walkers[0])
    gaps = [black if t in range(10, 16) or t in range(25, 45) else frame for t, frame in enumerate(walkers[:60])]
    params = {"track_kpt_thr": 0.3}
    jobs = [Job(demo_detector_bundle, demo_pose_bundle, frames, params, name=name) for name, frames in (("black", [black] * 10), ("gaps", gaps))]
    nobody, some = check_all(jobs, tmp_path)
    assert not len(nobody["ids"])
    assert nobody["tracked"].shape == (0, 4)
    assert not some["counts"][30:45].any()
    assert some["counts"][50:].any()


# --------------------------------------------------------------------------------------------------------- synthetic sequences


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A detector that reads its answer from the frame, and an estimator that judges parts of its crop by their brightness."""
    folder = tmp_path_factory.mktemp("tiny")
    return tracker_bundles.write_detector(folder / "detector"), tracker_bundles.write_estimator(folder / "estimator")


def synthetic_job(tiny: tuple[Path, Path], seed: int, *, frames: int) -> Job:
    params, detector = params_of(seed)
    rng = np.random.default_rng((seed, 43))
    detects = rng.choice([-1, 0, 1], frames, p=[0.6, 0.2, 0.2]).tolist() if detector == "random" else []
    return Job(*tiny, sequence(seed, frames=frames), params, detects, f"sequence {seed} with {params}")


def test_synthetic_sequences(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    jobs = [synthetic_job(tiny, seed, frames=120) for seed in range(24)]
    found = check_all(jobs, tmp_path, here=True)
    # They are about something: people are seen, tracks end and begin, and many are seen at once.
    assert sum(len(of_one["ids"]) for of_one in found) > 2000
    assert sum(len(set(of_one["ids"].tolist())) for of_one in found) > 150
    assert sum(len(of_one["ids"]) > 100 for of_one in found) >= 18


def test_long_sequence(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The SDK's gate grows for as long as a track lives."""
    job = Job(*tiny, sequence(10, frames=1000), {"track_kpt_thr": 0.2, "std_weight_position": 0.15}, name="long sequence")
    (found,) = check_all([job], tmp_path)
    lives = np.unique(found["ids"], return_counts=True)[1]
    assert lives.max() > 80


def test_boxes_thinner_than_a_pixel(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The SDK rounds their sides to zero pixels, and looks at as much around them as the estimator's aspect ratio asks for."""
    rng = np.random.default_rng(8)
    cells = rng.uniform(130, 255, (4, 3, 3))
    frames = []
    for t in range(30):
        x, y = 40 + t, 50 + 0.7 * t
        frame = blank(SIZE_WH, level=60)
        paint(frame, (x - 30, y - 40, x + 30, y + 40), cells)
        thin = [(x, y - 30, x + 0.3, y + 30), (x - 30, y, x + 30, y + 0.4), (x + 0.4, y + 2, x + 0.8, y + 40)]
        write_detections(frame, [(*thin[t % 3], 0.9, 0)])
        frames.append(frame)
    (found,) = check_all([Job(*tiny, frames, {"track_kpt_thr": 0.3}, name="thin boxes")], tmp_path, here=True)
    assert len(found["ids"]) > 25


def test_tracks_without_a_size(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """A box around one keypoint has no area: the SDK's filters divide by nothing, and its distances are zero."""
    params = {"pose_min_keypoints": 1, "track_iou_thr": 0.1}
    jobs = [Job(*tiny, sequence(seed, frames=60), params | {"track_kpt_thr": 0.3 + 0.05 * seed}, name=f"no size {seed}") for seed in range(6, 14)]
    found = check_all(jobs, tmp_path, here=True)
    boxes = np.concatenate([of_one["tracked"] for of_one in found])
    assert (boxes[:, 2] - boxes[:, 0] == 0).sum() > 10


# ---------------------------------------------------------------------------------------------------------------- whole pixels


@pytest.mark.parametrize("network", ["demo", "tiny"])
def test_boxes_of_whole_pixels_are_cut_out_alike(network: str, tiny: tuple[Path, Path], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With such sides a padded box ends half-way between two pixels, or would without float32's rounding: the tracker has no others."""
    rng = np.random.default_rng(12)
    bundle = tiny[1] if network == "tiny" else request.getfixturevalue("demo_pose_bundle")
    (scene,) = walk(4, frames=1, size_hw=(360, 640))
    corners, sides = rng.integers((-20, -20), (560, 300), (150, 2)), rng.choice([132, 129, 172, 176, 244, 86, 43], (150, 2))
    boxes = np.concatenate([corners, corners + sides - 1], axis=1).astype(float)
    np.save(tmp_path / "image.npy", scene.image)
    job = {"task": "PoseDetector", "bundle": str(bundle), "image": str(tmp_path / "image.npy"), "boxes": boxes.tolist()}
    theirs, ours = execute("sdk", [job], tmp_path)["0_poses"], execute("ours", [job], tmp_path)["0_poses"]
    assert theirs.shape == (150, 17, 3)
    np.testing.assert_allclose(ours[..., :2], theirs[..., :2], atol=PIXELS, rtol=0)
    np.testing.assert_allclose(ours[..., 2], theirs[..., 2], atol=1e-4, rtol=1e-4)
