"""Runs the real mmdeploy_runtime; started in its own environment, since it needs numpy < 2 and can crash the process.

Usage: sdk_runner.py JOBS.json RESULTS.npz
A job: {"task": "Detector" | "PoseDetector", "bundle": folder, "image": file.npy, "boxes": [[l, t, r, b], ...] | null}.
Results: `<i>_boxes` (N, 5) and `<i>_labels` (N,) for detectors, `<i>_poses` (N, K, 3) for pose estimators.
"""

import json
import sys

import mmdeploy_runtime
import numpy as np


def main(jobs_path: str, results_path: str) -> None:
    with open(jobs_path) as stream:
        jobs = json.load(stream)
    results = {}
    loaded = {}
    for i, job in enumerate(jobs):
        key = (job["task"], job["bundle"])
        if key not in loaded:
            loaded[key] = getattr(mmdeploy_runtime, job["task"])(job["bundle"], "cpu", 0)
        image = np.load(job["image"])
        if job["task"] == "Detector":
            boxes, labels, _ = loaded[key](image)
            results[f"{i}_boxes"], results[f"{i}_labels"] = boxes, labels
        elif job["boxes"] is None:
            results[f"{i}_poses"] = loaded[key](image)
        else:
            results[f"{i}_poses"] = loaded[key](image, job["boxes"])
    np.savez(results_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
