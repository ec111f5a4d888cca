"""manifest.json: the same facts give the same bytes, and another version is told apart from a damaged file."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcrate_bundle import Bundle, Manifest, ShapeRange, TensorSpec
from modelcrate_bundle.errors import BundleFormatError, BundleIntegrityError, ModelcrateError, UnsupportedBundleError
from modelcrate_bundle.manifest import (
    AccuracyParity,
    FileEntry,
    KeypointInfo,
    OutputParity,
    ParityRecord,
    PixelParity,
    Provenance,
    Stage,
    Timing,
    read_manifest,
    write_manifest,
)
from modelcrate_bundle.schema import encode_json

MakeManifest = Callable[..., Manifest]

GOLDEN = b"""{
    "schema_version": "1.0",
    "id": "rtmdet-nano_onnxruntime-fp32",
    "model": "rtmdet-nano",
    "task": "Detector",
    "target": "onnxruntime-fp32",
    "backend": "onnxruntime",
    "precision": "fp32",
    "geometry": "exact",
    "inputs": [
        {
            "name": "input",
            "dtype": "float32",
            "shape": [
                "batch",
                3,
                320,
                320
            ]
        }
    ],
    "outputs": [
        {
            "name": "dets",
            "dtype": "float32",
            "shape": [
                "batch",
                100,
                5
            ]
        }
    ],
    "shape_ranges": {},
    "class_names": [
        "person"
    ],
    "files": [],
    "parity": {
        "verified": true,
        "decided_by": "parity",
        "reference": "PyTorch",
        "images": [
            "a.jpg"
        ],
        "samples": 1,
        "outputs": [
            {
                "name": "dets",
                "max_abs": 0.25,
                "relative_linf": 0.001,
                "gate": 0.01,
                "passed": true
            }
        ],
        "pixels": [],
        "accuracy": []
    },
    "provenance": {
        "checkpoint": "nano.pth",
        "checkpoint_sha256": "abababababababababababababababababababababababababababababababab",
        "facts": {},
        "tools": {
            "torch": "2.13.0"
        },
        "build_key": ""
    },
    "timing": {
        "created": "2026-01-02T03:04:05Z",
        "stages": [
            {
                "name": "export",
                "seconds": 1.5
            }
        ]
    },
    "content_sha256": "eb51afb7793025f3071fd89dafeeff52564fcd7df9ba05259120dc087cd2807a"
}
"""


def as_object(manifest: Manifest) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(write_manifest(manifest))
    return raw


def with_its_hash(raw: dict[str, Any]) -> bytes:
    """A manifest as a writer of any minor version would seal it: the hash is over everything but `timing` and itself."""
    facts = {key: value for key, value in raw.items() if key not in {"timing", "content_sha256"}}
    packed = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return encode_json(raw | {"content_sha256": hashlib.sha256(packed.encode()).hexdigest()})


def test_written_manifest_reads_to_the_same_value(make_manifest: MakeManifest) -> None:
    manifest = make_manifest(
        task="PoseDetector",
        shape_ranges={"input": ShapeRange(min=(1, 3, 256, 192), opt=(4, 3, 256, 192), max=(8, 3, 256, 192))},
        keypoints=KeypointInfo(
            names=["nose", "eye"], skeleton=[(0, 1)], flip_pairs=[(0, 1)], sigmas=[0.026, 0.025], colors=[(1, 2, 3), (4, 5, 6)], link_colors=[(7, 8, 9)]
        ),
        files=[FileEntry(path="end2end.onnx", role="net", bytes=3, sha256="cd" * 32)],
        parity=ParityRecord(
            verified=True,
            decided_by="accuracy",
            pixels=[PixelParity(name="keypoint_shift_px", worst=0.5, mean=0.1, count=34, undecided=1, gate=1.0, passed=True)],
            accuracy=[
                AccuracyParity(name="keypoints_ap", data="val.json", images=500, reference=0.75, value=0.746, gate=1.0),
                AccuracyParity(name="bbox_ap", data="val.json", images=500, reference=0.5, value=0.6),
            ],
        ),
    )
    read = read_manifest(write_manifest(manifest))
    assert read.content_sha256 == manifest.facts_hash == read.facts_hash
    manifest.content_sha256 = manifest.facts_hash
    assert read == manifest
    assert write_manifest(read) == write_manifest(manifest)


def test_manifest_bytes_are_these(make_manifest: MakeManifest) -> None:
    assert write_manifest(make_manifest()) == GOLDEN
    assert with_its_hash(json.loads(GOLDEN)) == GOLDEN


def test_another_run_of_the_same_build_differs_only_in_timing(make_manifest: MakeManifest) -> None:
    first = make_manifest()
    second = make_manifest(timing=Timing(created="2031-01-01T00:00:00Z", stages=[Stage(name="export", seconds=99.0)]))
    assert first.facts_hash == second.facts_hash
    one, two = as_object(first), as_object(second)
    assert one.pop("timing") != two.pop("timing")
    assert encode_json(one) == encode_json(two)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp16"},
        {"class_names": ["person", "dog"]},
        {"inputs": [TensorSpec(name="input", dtype="float16", shape=("batch", 3, 320, 320))]},
        {"files": [FileEntry(path="end2end.onnx", role="net", bytes=3, sha256="cd" * 32)]},
        {"provenance": Provenance(checkpoint="other.pth", checkpoint_sha256="ab" * 32)},
        {"extra": {"note": "x"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_fact_changes_the_hash(change: dict[str, Any], make_manifest: MakeManifest) -> None:
    assert make_manifest(**change).facts_hash != make_manifest().facts_hash


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "2"])
def test_other_major_version_is_refused_before_anything_else_is_read(version: str) -> None:
    with pytest.raises(UnsupportedBundleError, match=rf"^m: \$\.schema_version: expected 1\.x, found {version}$") as caught:
        read_manifest(json.dumps({"schema_version": version}).encode(), where="m")
    assert "convert again" in caught.value.hint
    assert caught.value.exit_code == 13


@pytest.mark.parametrize("version", [None, 1, 1.0, {}])
def test_version_that_is_no_string_is_refused(version: Any, make_manifest: MakeManifest) -> None:
    with pytest.raises(BundleFormatError, match=r"^manifest\.json: \$\.schema_version: expected a string like '1\.0', found"):
        read_manifest(json.dumps(as_object(make_manifest()) | {"schema_version": version}).encode())


def test_newer_minor_version_keeps_what_this_one_does_not_know(make_manifest: MakeManifest) -> None:
    raw = as_object(make_manifest()) | {"schema_version": "1.7", "licence": {"spdx": "Apache-2.0", "by": None}}
    manifest = read_manifest(with_its_hash(raw))
    assert manifest.schema_version == "1.7"
    assert manifest.extra == {"licence": {"spdx": "Apache-2.0", "by": None}}
    assert json.loads(write_manifest(manifest))["licence"] == {"spdx": "Apache-2.0", "by": None}
    assert manifest.content_sha256 == manifest.facts_hash


@pytest.mark.parametrize("part", [("provenance",), ("inputs", 0), ("timing",), ("parity", "outputs", 0)], ids=lambda part: ".".join(map(str, part)))
def test_newer_minor_version_keeps_keys_inside_its_parts(part: tuple[Any, ...], make_manifest: MakeManifest) -> None:
    raw = copy.deepcopy(as_object(make_manifest()) | {"schema_version": "1.7"})
    inner = raw
    for key in part:
        inner = inner[key]
    inner["new_in_1_7"] = True
    sealed = with_its_hash(raw)
    assert write_manifest(read_manifest(sealed)) == sealed


def test_bundle_of_a_newer_minor_version_is_not_called_edited(make_manifest: MakeManifest, write_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    write_bundle(place).verify()
    raw = json.loads((place / "manifest.json").read_bytes()) | {"schema_version": "1.7"}
    raw["provenance"]["git_commit"] = "0123456"
    (place / "manifest.json").write_bytes(with_its_hash(raw))
    Bundle.open(place).verify()


@pytest.mark.parametrize("geometry", ["", "Exact", "udp", "exact "])
def test_geometry_is_exact_or_sdk(geometry: str, make_manifest: MakeManifest) -> None:
    with pytest.raises(BundleFormatError, match=r"^m: \$\.geometry: expected 'exact' or 'sdk', found '"):
        read_manifest(write_manifest(make_manifest(geometry=geometry)), where="m")
    assert read_manifest(write_manifest(make_manifest(geometry="sdk"))).geometry == "sdk"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("files", [{"path": "a", "role": "net", "bytes": "many", "sha256": ""}], "m: $.files[0].bytes: expected int, found str"),
        ("provenance", {"checkpoint": "a"}, "m: $.provenance: expected the key 'checkpoint_sha256', found none"),
        ("inputs", [{"name": "a", "dtype": "b", "shape": [1.5]}], "m: $.inputs[0].shape[0]: expected int | str, found float"),
        ("id", None, "m: $.id: expected str, found null"),
    ],
)
def test_wrong_manifest_is_refused_with_its_place(key: str, value: Any, message: str, make_manifest: MakeManifest) -> None:
    with pytest.raises(BundleFormatError) as caught:
        read_manifest(json.dumps(as_object(make_manifest()) | {key: value}).encode(), where="m")
    assert str(caught.value) == message


def test_missing_keypoints_are_not_written_as_null(make_manifest: MakeManifest) -> None:
    assert b"null" not in write_manifest(make_manifest())
    assert b"keypoints" not in write_manifest(make_manifest())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figure_that_is_not_finite_is_never_written_as_null(value: float, make_manifest: MakeManifest) -> None:
    """JSON has no NaN; a null in its place would make a bundle that its own writer cannot read."""
    parity = ParityRecord(verified=False, outputs=[OutputParity(name="dets", max_abs=value, relative_linf=value, gate=0.01, passed=False)])
    try:
        data = write_manifest(make_manifest(parity=parity))
    except (ValueError, ModelcrateError):
        return
    assert read_manifest(data).parity.outputs[0].passed is False


@pytest.mark.parametrize(
    ("verified", "output", "pixel", "passed"), [(True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)]
)
def test_parity_passed_only_if_everything_did(verified: bool, output: bool, pixel: bool, passed: bool) -> None:
    record = ParityRecord(
        verified=verified,
        outputs=[OutputParity(name="a", max_abs=0.0, relative_linf=0.0, gate=1.0, passed=output)],
        pixels=[PixelParity(name="b", worst=0.0, mean=0.0, count=1, undecided=0, gate=1.0, passed=pixel)],
    )
    assert record.passed is passed


@pytest.mark.parametrize(
    ("decided_by", "figures", "drop", "passed"),
    [
        ("parity", True, 0.5, True), ("parity", False, 0.5, False), ("parity", True, 1.5, False), ("accuracy", False, 0.5, True),
        ("accuracy", True, 1.5, False), ("accuracy", False, -20.0, True),
    ],
)  # fmt: skip
def test_accuracy_decides_beside_the_other_figures_or_alone(decided_by: Any, figures: bool, drop: float, passed: bool) -> None:
    measured = AccuracyParity(name="bbox_ap", data="val.json", images=9, reference=0.5, value=0.5 - drop / 100, gate=1.0)
    assert measured.drop == pytest.approx(drop)
    record = ParityRecord(
        verified=True,
        decided_by=decided_by,
        outputs=[OutputParity(name="a", max_abs=0.0, relative_linf=0.0, gate=1.0, passed=figures)],
        accuracy=[measured],
    )
    assert record.passed is passed
    record.verified = False
    assert record.passed is False
    assert AccuracyParity(name="bbox_ap", data="val.json", images=9, reference=1.0, value=0.0).passed, "without a gate it is only told"


@pytest.mark.parametrize("word", ["", "Parity", "both", None, 1])
def test_a_record_that_is_decided_otherwise_is_refused(word: Any, make_manifest: MakeManifest) -> None:
    raw = as_object(make_manifest())
    raw["parity"]["decided_by"] = word
    with pytest.raises(BundleFormatError, match=r"m: \$\.parity\.decided_by: "):
        read_manifest(json.dumps(raw).encode(), where="m")


def test_a_bundle_from_before_there_was_accuracy_is_not_called_edited(make_manifest: MakeManifest, write_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """Of the same schema version; the hash is over what was written."""
    place = tmp_path / "bundle"
    write_bundle(place).verify()
    raw = json.loads((place / "manifest.json").read_bytes())
    del raw["parity"]["decided_by"], raw["parity"]["accuracy"]
    (place / "manifest.json").write_bytes(with_its_hash(raw))
    bundle = Bundle.open(place)
    bundle.verify()
    assert bundle.manifest is not None
    assert (bundle.manifest.parity.decided_by, bundle.manifest.parity.accuracy) == ("parity", [])
    raw["parity"]["samples"] += 1
    (place / "manifest.json").write_bytes(json.dumps(raw).encode())
    with pytest.raises(BundleIntegrityError, match="it was edited"):
        Bundle.open(place).verify()


@pytest.mark.parametrize(("shape", "dynamic"), [(("batch", 3), True), ((1, "height"), False), ((), False)])
def test_batch_is_dynamic_when_its_axis_has_a_name(shape: tuple[int | str, ...], dynamic: bool) -> None:
    assert TensorSpec(name="input", dtype="float32", shape=shape).is_batch_dynamic is dynamic
