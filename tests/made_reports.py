"""Reports of measurements that nobody made, every part of which can be chosen; and bundles that say of themselves what they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelcrate_bundle.bundle import sha256_of
from modelcrate_bundle.manifest import AccuracyParity, OutputParity, ParityRecord, PixelParity, read_manifest, write_manifest
from modelcrate_runtime.comparison import Compared, Comparison
from modelcrate_runtime.host import Host
from modelcrate_runtime.measurement import Doubt, Latency, Load, Ratio
from modelcrate_runtime.profiler import Cold, Profile, Row
from modelcrate_runtime.reporting import Entry, Group, Report, Score

HOST = Host(
    cpu="A Processor", cores=2, features=["avx2"], governor="performance", frequency_mhz=3000.0, memory_bytes=2**33, is_virtual=True, system="Linux", python="3.11.9",
    gpu="", libraries={"modelcrate": "0.0.0", "numpy": "2.0"},
)  # fmt: skip
AT = "2026-01-02T03:04:05Z"


def seconds(milliseconds: float, *, count: int = 30) -> list[float]:
    """Times around a median, the same for the same arguments."""
    return [float(value) for value in 1e-3 * milliseconds * np.linspace(0.9, 1.1, count)]


def made_profile(name: str, milliseconds: float, *, batches: Sequence[int] = (1,), **changes: Any) -> Profile:
    parts = {"load image": 0.9, "preprocess": 0.1, "infer": 0.8, "postprocess": 0.1}
    samples = {stage: seconds(part * milliseconds) for stage, part in parts.items()} | {"call": seconds(milliseconds)}
    rows = [Row(batch=batch, threads=1, streams=1, latency=Latency.of(seconds(batch * milliseconds), inputs=batch), samples=[]) for batch in batches]
    base = Profile(
        name=name, task="PoseDetector", backend="onnxruntime", precision="fp32", size_bytes=2**20, device="cpu", threads=1, warmup=0, images=["noise 640x480"],
        boxes=1, open_s=0.1, stages={stage: Latency.of(samples[stage]) for stage in parts}, call=Latency.of(samples["call"]), network=rows, load=Load(), host=HOST, at=AT,
        samples=samples,
        cold=Cold(import_s=0.2, open_s=0.1, first_s=0.05, total_s=0.37, imported_bytes=2**25, opened_bytes=2**26, peak_bytes=3 * 2**26),
    )  # fmt: skip
    return replace(base, **changes)


def made_parity(*, worst: float = 0.013, verified: bool = True) -> ParityRecord:
    """Its gate of the shift is 0.5 pixels."""
    if not verified:
        return ParityRecord(verified=False)
    return ParityRecord(
        verified=True,
        images=["a.png"],
        samples=8,
        outputs=[OutputParity(name="simcc_x", max_abs=1e-4, relative_linf=2.5e-5, gate=1e-3, passed=True)],
        pixels=[PixelParity(name="keypoint_shift_px", worst=worst, mean=0.001, count=100, undecided=0, gate=0.5, passed=worst <= 0.5)],
        accuracy=[AccuracyParity(name="keypoints_ap", data="people.json", images=10, reference=0.8, value=0.79, gate=2.0)],
    )


def made_score(value: float | None, *, metric: str = "AP", is_better_up: bool = True) -> Score:
    return Score(metric=metric, value=value, is_better_up=is_better_up, images=10, data="annotations.json")


def made_entry(name: str, milliseconds: float = 2.0, *, scores: Sequence[Score] = (), **changes: Any) -> Entry:
    """With a profile and parity, unless they are changed."""
    base = Entry(
        name=name, backend="onnxruntime", precision="fp32", size_bytes=2**21, parity=made_parity(), profile=made_profile(name, milliseconds), scores=list(scores)
    )
    return replace(base, **changes)


def made_group(entries: Sequence[Entry], *, model: str = "pose", task: str = "PoseDetector") -> Group:
    """Compared, where two or more were profiled."""
    of = {entry.name: entry.profile.samples["call"] for entry in entries if entry.profile}
    rows = [Compared(name=name, latency=Latency.of(own), ratio=Ratio.of(next(iter(of.values())), own), doubts=[], samples=own) for name, own in of.items()]
    comparison = Comparison(what="image to result", rows=rows, host=HOST, at=AT) if len(rows) > 1 else None
    return Group(model=model, task=task, entries=list(entries), comparison=comparison)


def made_report(*groups: Group, **changes: Any) -> Report:
    return replace(Report(folder="crates", command="modelcrate report crates", at=AT, host=HOST, groups=list(groups)), **changes)


def full_report() -> Report:
    """Two models, checkpoints, scores of both kinds, batches, doubts, what could not be run, what was not compared, what is broken."""
    pose = made_group(
        [
            made_entry(
                "pose_pytorch", 9.0, backend="pytorch", parity=None, scores=[made_score(0.81), made_score(4.0, metric="EPE", is_better_up=False)],
                profile=made_profile("pose_pytorch", 9.0, batches=(1, 2, 4)),
            ),
            made_entry(
                "pose_onnxruntime", 3.0, scores=[made_score(0.8), made_score(4.5, metric="EPE", is_better_up=False)],
                profile=made_profile("pose_onnxruntime", 3.0, batches=(1, 2), doubts=[Doubt(kind="few", what="30 calls", do="--runs 200")]),
            ),
            made_entry("pose_onnxruntime-int8", 1.5, precision="int8", parity=made_parity(worst=0.9), scores=[made_score(None)]),
            made_entry("pose_tensorrt", backend="tensorrt", parity=made_parity(verified=False), profile=None, trouble="needs a GPU"),
        ]
    )  # fmt: skip
    det = made_group([made_entry("det_ncnn", 5.0, backend="ncnn", parity=None, profile=made_profile("det_ncnn", 5.0, cold=None, boxes=0))], model="det", task="Detector")
    return made_report(pose, det, unreadable=["crates/broken.zip: expected a zip"])


def copied_bundle(bundle: Path, place: Path, *, backend: str = "", **changes: Any) -> Path:
    """A copy of a bundle with another manifest, and with another backend in deploy.json too: sealed again, as if it had been built so."""
    shutil.copytree(bundle, place)
    manifest = read_manifest((place / "manifest.json").read_bytes())
    for name, value in changes.items():
        setattr(manifest, name, value)
    if backend:
        manifest.backend = backend
        deploy = json.loads((place / "deploy.json").read_bytes())
        for model in deploy["models"]:
            model["backend"] = backend
        (place / "deploy.json").write_text(json.dumps(deploy), encoding="utf-8")
        for entry in manifest.files:
            if entry.path == "deploy.json":
                entry.bytes, entry.sha256 = (place / "deploy.json").stat().st_size, sha256_of(place / "deploy.json")
    (place / "manifest.json").write_bytes(write_manifest(manifest))
    return place
