"""Runs the real mmdeploy_runtime, or our runtime, inside `.venv-sdk`: the SDK needs numpy < 2 and can crash its process, and with the same ONNX
Runtime in both the numbers must be the same, not nearly the same.

Usage: runner.py sdk|ours JOBS.json RESULTS.npz
A job: {"task": "Detector" | "PoseDetector" | "Classifier", "bundle": folder, "image": file.npy, "boxes": [[l, t, r, b], ...] | null}.
Results: `<i>_boxes` (N, 5) and `<i>_labels` (N,) for detectors, `<i>_poses` (N, K, 3) for pose estimators, `<i>_classes` (N, 2) with label
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


def _load_sdk(cls, bundle):
    return cls(bundle, "cpu", 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
