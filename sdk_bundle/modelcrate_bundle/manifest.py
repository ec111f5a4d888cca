"""manifest.json: everything about a bundle that MMDeploy's JSON cannot say, in one place.

Same inputs give the same bytes, but for `timing`: `content_sha256` is the hash of the file without that field and without itself.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Literal

import msgspec

from modelcrate_bundle.errors import BundleFormatError, UnsupportedBundleError
from modelcrate_bundle.schema import Record, decode_json, encode_json, read_record, write_record
from modelcrate_bundle.tensors import ShapeRange, TensorSpec

SCHEMA_VERSION: Final = "1.0"
"""Another major version is refused; a newer minor one is read, its unknown keys kept."""


class FileEntry(Record, kw_only=True):
    """One file of the bundle. `path` is relative with forward slashes; `role`: net, weights, source, calibration, deploy, pipeline, detail, readme, picture."""

    path: str
    role: str
    bytes: int
    sha256: str


class KeypointInfo(Record, kw_only=True):
    """What the K keypoints are.

    Attributes:
        names: (K) in network order.
        skeleton: links as index pairs.
        flip_pairs: pairs that change places in a mirrored image.
        sigmas: (K) OKS constants (COCO: falloff = 2 * sigma), or empty when unknown.
        colors: (K) RGB.
        link_colors: one RGB per link.
    """

    names: list[str]
    skeleton: list[tuple[int, int]] = msgspec.field(default_factory=list)
    flip_pairs: list[tuple[int, int]] = msgspec.field(default_factory=list)
    sigmas: list[float] = msgspec.field(default_factory=list)
    colors: list[tuple[int, int, int]] = msgspec.field(default_factory=list)
    link_colors: list[tuple[int, int, int]] = msgspec.field(default_factory=list)


class OutputParity(Record, kw_only=True):
    """One output against PyTorch: `relative_linf` = max |ours - theirs| / max |theirs|; `gate` is its limit."""

    name: str
    max_abs: float
    relative_linf: float
    gate: float
    passed: bool


class PixelParity(Record, kw_only=True):
    """One figure in the unit of the task.

    Attributes:
        name: keypoint_shift_px, box_shift_px, score_shift (of keypoints: relative to the largest score where that exceeds 1) or label_flips.
        worst: the largest value; shifts are in pixels of the image, or of the network's input where those are larger.
        mean: the mean over `count` things.
        count: how many keypoints or boxes were compared.
        undecided: how many were left out because PyTorch itself is within the gate of answering otherwise.
        gate: the limit for `worst`.
        mean_gate: the limit for `mean`, where there is one.
    """

    name: str
    worst: float
    mean: float
    count: int
    undecided: int
    gate: float
    mean_gate: float | None = None
    passed: bool


class AccuracyParity(Record, kw_only=True):
    """One figure of accuracy on a validation set, of the artefact and of the reference.

    Attributes:
        name: bbox_ap or keypoints_ap (in true boxes): COCO's AP from 0 to 1.
        data: file name of the annotations, without folders.
        images: how many images.
        reference: the reference's figure.
        value: the artefact's.
        gate: the limit for the drop, in points: hundredths of AP; None where it does not decide.
    """

    name: str
    data: str
    images: int
    reference: float
    value: float
    gate: float | None = None

    @property
    def drop(self) -> float:
        """How much lower the artefact's is, in points."""
        return 100 * (self.reference - self.value)

    @property
    def passed(self) -> bool:
        """Whether the drop is inside its gate."""
        return self.gate is None or self.drop <= self.gate


class ParityRecord(Record, kw_only=True):
    """The comparison that the bundle passed, or that it was not made.

    Attributes:
        verified: whether it was made.
        decided_by: "parity": every figure has to be inside its gate; "accuracy": of INT8 that was measured on a validation set, the drop of its AP alone.
        reference: with what: "PyTorch", eager and in float32, or the ONNX file that the bundle was made from.
    """

    verified: bool
    decided_by: Literal["parity", "accuracy"] = "parity"
    reference: str = "PyTorch"
    images: list[str] = msgspec.field(default_factory=list)
    samples: int = 0
    outputs: list[OutputParity] = msgspec.field(default_factory=list)
    pixels: list[PixelParity] = msgspec.field(default_factory=list)
    accuracy: list[AccuracyParity] = msgspec.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every figure that decides is inside its gate."""
        if not (self.verified and all(p.passed for p in self.accuracy)):
            return False
        return self.decided_by == "accuracy" or (all(p.passed for p in self.outputs) and all(p.passed for p in self.pixels))


class EngineRecord(Record, kw_only=True):
    """What an engine was built for and how: a wrong one is refused before it is loaded, and built again from the graph beside it.

    Attributes:
        library: tensorrt or tensorrt_rtx.
        version: of the library that built it.
        platform: operating system and processor: "linux-x86_64".
        gpu: name of the GPU; empty for an engine that was built without one, for every GPU that the library compiles for when it loads.
        compute_capability: of that GPU: "9.0"; empty likewise.
        cuda: newest CUDA that its driver ran, as 1000 * major + 10 * minor; 0 without one.
        hardware_compatibility: none, ampere+ or same_compute_capability.
        version_compatible: whether newer versions of the library run it too.
        is_stripped: whether its weights are left out, and filled in from the graph when it is loaded.
        flags: of the build, by their names: numbers change between versions.
        onnx: the graph that it was built from, a file of the bundle.
        onnx_sha256: its hash.
        layers: type -> how many layers of the engine, or of the network where no GPU could load the engine, give it.
        is_inspected: whether `layers` is of the engine.
    """

    library: str
    version: str
    platform: str
    gpu: str = ""
    compute_capability: str = ""
    cuda: int = 0
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    is_stripped: bool = False
    flags: list[str] = msgspec.field(default_factory=list)
    onnx: str = ""
    onnx_sha256: str = ""
    layers: dict[str, int] = msgspec.field(default_factory=dict)
    is_inspected: bool = False


class Provenance(Record, kw_only=True):
    """Where the bundle comes from.

    Attributes:
        checkpoint: file name, without folders.
        checkpoint_sha256: its hash.
        facts: what the shapes of the weights cannot say -> where it was taken from.
        tools: library -> version.
        build_key: hash of everything that decides the result; equal keys mean that building again changes nothing.
    """

    checkpoint: str
    checkpoint_sha256: str
    facts: dict[str, str] = msgspec.field(default_factory=dict)
    tools: dict[str, str] = msgspec.field(default_factory=dict)
    build_key: str = ""


class Stage(Record, kw_only=True):
    """One stage of the build and the seconds that it took."""

    name: str
    seconds: float


class Timing(Record, kw_only=True):
    """What differs between two builds of the same thing."""

    created: str = ""
    stages: list[Stage] = msgspec.field(default_factory=list)


class Manifest(Record, kw_only=True):
    """manifest.json.

    Attributes:
        id: `<model>_<target>`, the name of the bundle's folder.
        task: Detector, PoseDetector or Classifier; Network for tensors that the caller decodes.
        precision: what the artefact really computes in: fp32, fp16, bf16, int8.
        geometry: "exact" (upstream's crop and its exact inverse) or "sdk" (MMDeploy's integer crop).
        shape_ranges: input name -> shapes that it may have.
        class_names: label -> name.
        engine: what a TensorRT engine was built for.
        resampling: how exact geometry resizes: "pillow-bilinear", "pillow-bicubic", or None for what pipeline.json says.
    """

    schema_version: str = SCHEMA_VERSION
    id: str
    model: str
    task: str
    target: str
    backend: str
    precision: str
    geometry: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    shape_ranges: dict[str, ShapeRange] = msgspec.field(default_factory=dict)
    class_names: list[str] = msgspec.field(default_factory=list)
    resampling: str | None = None
    keypoints: KeypointInfo | None = None
    engine: EngineRecord | None = None
    files: list[FileEntry]
    parity: ParityRecord
    provenance: Provenance
    timing: Timing = msgspec.field(default_factory=Timing)
    content_sha256: str = ""

    @property
    def facts_hash(self) -> str:
        """SHA-256 of everything but `timing` and `content_sha256`."""
        return hash_of_facts(write_record(self))


def hash_of_facts(raw: dict[str, Any]) -> str:
    """SHA-256 of everything but `timing` and `content_sha256` in a manifest as it was written, whatever fields there have come to be since."""
    facts = {key: value for key, value in raw.items() if key not in {"timing", "content_sha256"}}
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def write_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with `content_sha256` filled in."""
    raw = write_record(manifest)
    raw["content_sha256"] = manifest.facts_hash
    return encode_json(raw)


def read_manifest(data: bytes, *, where: str = "manifest.json") -> Manifest:
    """Read manifest.json.

    Raises:
        BundleFormatError: not JSON or not this schema.
        UnsupportedBundleError: written by a modelcrate with another major schema version.
    """
    raw = decode_json(data, where=where)
    version = raw.get("schema_version")
    if not isinstance(version, str):
        raise BundleFormatError(f"{where}: $.schema_version: expected a string like {SCHEMA_VERSION!r}, found {version!r}")
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise UnsupportedBundleError(
            f"{where}: $.schema_version: expected {SCHEMA_VERSION.partition('.')[0]}.x, found {version}",
            hint="use the modelcrate that wrote the bundle, or convert again",
        )
    manifest = read_record(Manifest, raw, where=where)
    if manifest.geometry not in {"exact", "sdk"}:
        raise BundleFormatError(f"{where}: $.geometry: expected 'exact' or 'sdk', found {manifest.geometry!r}")
    return manifest
