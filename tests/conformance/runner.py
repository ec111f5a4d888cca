"""Runs the real mmdeploy_runtime, or our runtime, inside `.venv-sdk`: the SDK needs numpy < 2 and can crash its process, and with the same ONNX
Runtime in both the numbers must be the same, not nearly the same.

Usage: runner.py sdk|ours JOBS.json RESULTS.npz
A job: {"task": "Detector" | "PoseDetector" | "Classifier", "bundle": folder, "image": file.npy, "boxes": [[l, t, r, b], ...] | null}.
A job of a tracker: {"task": "PoseTracker", "detector": folder, "estimator": folder, "frames": file.npz with 0, 1, ..., "detects": [-1, ...], "params": {...}}.
Results: `<i>_counts` (T,), `<i>_ids`, `<i>_keypoints` and `<i>_tracked` (the boxes) of all frames one after another for trackers; `<i>_boxes` (N, 5) and `<i>_labels` (N,) for detectors, `<i>_poses` (N, K, 3) for pose estimators, `<i>_classes` (N, 2) with label
and score for classifiers.
"""

import functools
import json
import sys

import numpy as np


def main(who: str, jobs_path: str, results_path: str) -> None:
    with open(jobs_path) as stream:
        jobs = json.load(stream)
    if who == "sdk":
        import mmdeploy_runtime

        load = {name: functools.partial(_load_sdk, getattr(mmdeploy_runtime, name)) for name in ("Detector", "PoseDetector", "Classifier")}
    else:
        import modelcrate_runtime

        load = {name: functools.partial(getattr(modelcrate_runtime, name), geometry="sdk") for name in ("Detector", "PoseDetector", "Classifier")}
    results = {}
    loaded = {}
    for i, job in enumerate(jobs):
        if job["task"] == "PoseTracker":
            results |= {f"{i}_{name}": value for name, value in _track(who, job).items()}
            continue
        key = (job["task"], job["bundle"])
        if key not in loaded:
            loaded[key] = load[job["task"]](job["bundle"])
        image = np.load(job["image"])
        if job["task"] == "Detector":
            results[f"{i}_boxes"], results[f"{i}_labels"], _ = loaded[key](image)
        elif job["task"] == "Classifier":
            results[f"{i}_classes"] = np.array(loaded[key](image))
        elif job["boxes"] is None:
            results[f"{i}_poses"] = loaded[key](image)
        else:
            results[f"{i}_poses"] = loaded[key](image, job["boxes"])
    np.savez(results_path, **results)


def _track(who, job):
    if who == "sdk":
        from mmdeploy_runtime import PoseTracker

        tracker = PoseTracker(job["detector"], job["estimator"], "cpu", 0)
    else:
        from modelcrate_runtime import PoseTracker

        tracker = PoseTracker(job["detector"], job["estimator"], mode="sdk")
    state = tracker.create_state(**job["params"])
    frames = np.load(job["frames"])
    found = [tracker(state, frames[str(t)], detect) for t, detect in enumerate(job["detects"])]
    keypoints = [poses for poses, _, _ in found if len(poses)]
    return {
        "counts": np.array([len(ids) for _, _, ids in found]),
        "ids": np.concatenate([ids for _, _, ids in found]),
        "keypoints": np.concatenate(keypoints) if keypoints else np.zeros((0, 0, 3)),
        "tracked": np.concatenate([boxes for _, boxes, _ in found]),
    }


def _load_sdk(cls, bundle):
    return cls(bundle, "cpu", 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
