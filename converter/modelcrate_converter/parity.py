"""Does the artefact compute what PyTorch computes? On real crops, through the real runtime, and in pixels.

The reference is eager PyTorch in float32, or the ONNX file that was given, on the inputs that the runtime's own preprocessing makes, decoded by
the runtime's own decoder: what differs is the network alone. A figure outside its gate means that no bundle is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from modelcrate_bundle.errors import BundleError, ExportError, InputError, UnsupportedBundleError
from modelcrate_bundle.manifest import OutputParity, ParityRecord, PixelParity
from modelcrate_converter.describe import describe_pipeline
from modelcrate_converter.exportable import BoxesFacts, DetectorFacts, HeatmapFacts, RegressionFacts
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime.postprocess import BoxDecoder, ClassDecoder, KeypointDecoder
from modelcrate_runtime.preprocess import ImageMeta, Preprocessor
from modelcrate_runtime.sessions import Session, open_artefact

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_converter.builders import BackendArtifact
    from modelcrate_converter.config import Gates
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_runtime.geometry import Crop
    from modelcrate_runtime.results import Classification, Detections, Poses

Array: TypeAlias = "NDArray[Any]"
Outputs: TypeAlias = dict[str, "NDArray[Any]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityImage:
    """An image to compare on.

    Attributes:
        name: for the report: a file name without its folder, or "procedural-0".
        image: (H, W, 3) BGR uint8.
        boxes_xyxy: (N, 4) float32 crops for pose models, in image pixels.
    """

    name: str
    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]


def procedural_images() -> list[ParityImage]:
    """The images that are used when none are given: two crops each, the figure's and a loose one."""
    return [_with_loose_box(name, image, box) for name, image, box in procedural_scenes()]


def given_image(path: Path, image: NDArray[np.uint8]) -> ParityImage:
    """A user's image, with three crops: all of it, as MMDeploy does, and two parts."""
    height, width = image.shape[:2]
    if min(height, width) < 2:
        raise InputError(f"{path}: expected an image of at least 2x2 pixels to compare on, found {width}x{height}")
    boxes = np.array([[0, 0, 1, 1], [0.1, 0.2, 0.55, 0.95], [0.4, 0.05, 0.9, 0.8]], dtype=np.float32)
    return ParityImage(name=path.name, image=image, boxes_xyxy=boxes * np.array([width, height, width, height], dtype=np.float32))


def _with_loose_box(name: str, image: NDArray[np.uint8], box: NDArray[np.float32]) -> ParityImage:
    size = np.array([box[2] - box[0], box[3] - box[1]] * 2, dtype=np.float32)
    loose = box + np.array([-0.3, -0.1, 0.1, 0.4], dtype=np.float32) * size
    return ParityImage(name=name, image=image, boxes_xyxy=np.stack([box, loose]).astype(np.float32))


def check_parity(model: ExportableModel, artifact: BackendArtifact, images: Sequence[ParityImage], gates: Gates) -> ParityRecord:
    """Compare an artefact with eager PyTorch.

    Args:
        model: the reference.
        artifact: what a builder made; it is run through the session that users will run it with.
        images: what to compare on.
        gates: the limits.

    Raises:
        ExportError: the framework cannot load the artefact.
        UnsupportedBundleError: an engine for another GPU or version.
    """
    try:
        session = open_artefact(artifact.backend, artifact.files, artifact.options(), where=f"{model.name} for {artifact.backend}")
    except BundleError as error:  # it is not in a bundle yet
        if artifact.engine is not None and isinstance(error, UnsupportedBundleError):  # an engine is loaded when it is built: this is one from elsewhere
            raise
        raise ExportError(
            f"{model.name}: expected an artefact that {artifact.backend} loads, found: {str(error).rpartition('found: ')[2]}",
            hint="run again with --no-simplify",
        ) from error
    try:
        with np.errstate(all="ignore"):  # a network that overflows is said by its figures
            if model.task == "PoseDetector":
                record = _check_pose(model, session, images, gates)
            elif model.task == "Classifier":
                record = _check_classifier(model, session, images, gates)
            elif model.task == "Detector":
                record = _check_detector(model, artifact, session, images, gates)
            else:
                record = _check_tensors(model, session, images, gates)
        record.reference = model.reference
        return record
    finally:
        session.close()


def network_inputs(model: ExportableModel, images: Iterable[ParityImage]) -> Iterator[NDArray[np.float32]]:
    """What the network sees of some images, one input after another, repeated where a fixed batch needs more: (n, C, H, W) float32."""
    count = model.fixed_batch or 1
    preprocessor = _preprocessor(model)
    for image in images:
        tensor = preprocessor.crops(image.image, image.boxes_xyxy)[0] if model.is_top_down else preprocessor.image(image.image)[0]
        for row in tensor:
            yield np.repeat(row[None], count, axis=0)


def calibration_inputs(model: ExportableModel, scenes: int) -> Iterator[NDArray[np.float32]]:
    """What the network sees of so many procedural scenes, the same ones each time: (n, C, H, W) float32, the figure's crop for pose models."""
    yield from network_inputs(model, (_with_loose_box(name, image, box) for name, image, box in procedural_scenes(scenes)))


def run_reference(model: ExportableModel, tensor: NDArray[np.float32]) -> Outputs:
    """The network in eager PyTorch, float32 on the CPU, or the ONNX file that was given: output name -> array."""

    def run(part: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode():
            values = model.module(torch.from_numpy(part.copy()))  # a network may change its input
        return {spec.name: value.numpy() for spec, value in zip(model.outputs, values, strict=True)}

    return _in_parts(model.fixed_batch, run, tensor)


def _run_artifact(model: ExportableModel, session: Session, tensor: NDArray[np.float32]) -> Outputs:
    """The artefact on the same: output name -> array."""
    first = session.inputs[0].shape[0]
    return _in_parts(first if isinstance(first, int) else None, lambda part: session.run({model.input.name: part}), tensor)


def _in_parts(size: int | None, run: Callable[[NDArray[np.float32]], Outputs], tensor: NDArray[np.float32]) -> Outputs:
    """One call, or as many as a fixed batch needs; the last one is filled up with zeros, whose rows are dropped."""
    if size is None or size == len(tensor):
        return run(tensor)
    filled = np.concatenate([tensor, np.zeros((-len(tensor) % size, *tensor.shape[1:]), dtype=tensor.dtype)])
    parts = [run(filled[start : start + size]) for start in range(0, len(filled), size)]
    return {name: np.concatenate([part[name] for part in parts])[: len(tensor)] for name in parts[0]}


def _output(name: str, ours: Array, theirs: Array, gate: float) -> OutputParity:
    same_shape = ours.shape == theirs.shape
    difference = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0)) if same_shape else float("inf")
    largest = float(np.abs(theirs).max(initial=0.0))
    relative = difference / largest if largest else difference
    return OutputParity(name=name, max_abs=difference, relative_linf=relative, gate=gate, passed=bool(relative <= gate))  # NaN does not pass


def _pixels(name: str, values: Array, gate: float, *, mean_gate: float | None = None, undecided: int = 0, per: int = 1) -> PixelParity:
    """One figure, of `per` values for each thing. Nothing compared is nothing shown: it does not pass."""
    worst, mean = (float(values.max()), float(values.mean())) if values.size else (0.0, 0.0)
    passed = bool(worst <= gate) and (mean_gate is None or bool(mean <= mean_gate)) and values.size + undecided > 0
    return PixelParity(name=name, worst=worst, mean=mean, count=values.size // per, undecided=undecided, gate=gate, mean_gate=mean_gate, passed=passed)


# ----------------------------------------------------------------------------------------------------------------------- pose


def _check_pose(model: ExportableModel, session: Session, images: Sequence[ParityImage], gates: Gates) -> ParityRecord:
    decoder = KeypointDecoder(describe_pipeline(model, has_nms=False), geometry="exact", where=model.name)
    batch, crops = _crops(model, images)
    theirs = run_reference(model, batch)
    ours = _run_artifact(model, session, batch)
    outputs = [_output(name, ours[name], theirs[name], gates.relative_linf) for name in theirs]
    input_hw = model.input_hw
    our_poses, their_poses = (decoder.decode(values, crops, input_hw=input_hw) for values in (ours, theirs))
    shifts = np.linalg.norm(our_poses.keypoints_xy - their_poses.keypoints_xy, axis=2) / _coarseness(crops)
    decided = np.ones(shifts.shape, dtype=bool)
    if not isinstance(model.postprocess, RegressionFacts):
        # Near peaks are as good as PyTorch's own and count; a far one that PyTorch scores nearly alike is nobody's mistake.
        decided = _decided_maxima(ours, theirs, margin=gates.peak_margin) | (shifts <= gates.keypoint_px)
    decided &= their_poses.scores >= gates.keypoint_score
    if isinstance(model.postprocess, HeatmapFacts):
        decided &= _steady(decoder, theirs, crops, their_poses, gates, input_hw=input_hw)
    # SimCC and heatmap scores are unnormalised logits: their shift is taken relative to the largest where that exceeds 1.
    scores = np.abs(our_poses.scores - their_poses.scores) / max(1.0, float(np.abs(their_poses.scores).max(initial=0.0)))
    pixels = [
        _pixels("keypoint_shift_px", shifts[decided], gates.keypoint_px, mean_gate=gates.keypoint_mean_px, undecided=int((~decided).sum())),
        _pixels("score_shift", scores, gates.score),
    ]
    return ParityRecord(verified=True, images=[image.name for image in images], samples=len(batch), outputs=outputs, pixels=pixels)


def _crops(model: ExportableModel, images: Sequence[ParityImage]) -> tuple[NDArray[np.float32], list[Crop]]:
    """The crops of all images, as the runtime cuts them: (N, C, H, W) float32 and the N maps back."""
    preprocessor = _preprocessor(model)
    tensors, crops = zip(*(preprocessor.crops(image.image, image.boxes_xyxy) for image in images), strict=True)
    return np.concatenate(tensors), [crop for of_image in crops for crop in of_image]


def _coarseness(crops: Sequence[Crop]) -> NDArray[np.float64]:
    """(N, 1) image pixels per network pixel, at least 1: what a crop larger than the input cannot see is no shift."""
    return np.array([max(1.0, *crop.step_xy) for crop in crops])[:, None]


def _preprocessor(model: ExportableModel) -> Preprocessor:
    return Preprocessor(describe_pipeline(model, has_nms=False), geometry="exact", where=model.name, resampling=model.resampling)


def _decided_maxima(ours: Outputs, theirs: Outputs, *, margin: float) -> NDArray[np.bool_]:
    """(N, K) whether PyTorch's own maximum is clear: where the bin that we chose is within the margin of it there, either answer is right."""
    decided: NDArray[np.bool_] | None = None
    for name, output in theirs.items():
        reference = output.reshape(*output.shape[:2], -1)  # a heatmap is one long row of cells
        bins, best = ours[name].reshape(reference.shape).argmax(axis=2), reference.max(axis=2)
        chosen = np.take_along_axis(reference, bins[:, :, None], axis=2)[:, :, 0]
        tie = (bins != reference.argmax(axis=2)) & (best - chosen <= margin * np.abs(reference).max())
        decided = ~tie if decided is None else decided & ~tie
    assert decided is not None
    return decided


def _steady(decoder: KeypointDecoder, theirs: Outputs, crops: list[Crop], poses: Poses, gates: Gates, *, input_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """(N, K) whether PyTorch's own keypoint stays when its heatmap moves within the gate: the refinement of a flat peak goes anywhere."""
    rng = np.random.default_rng(0)
    moved = {name: value + (gates.relative_linf * np.abs(value).max() * rng.uniform(-1, 1, value.shape)).astype(np.float32) for name, value in theirs.items()}
    shifts = np.linalg.norm(decoder.decode(moved, crops, input_hw=input_hw).keypoints_xy - poses.keypoints_xy, axis=2) / _coarseness(crops)
    steady: NDArray[np.bool_] = shifts <= gates.keypoint_px
    return steady


# ------------------------------------------------------------------------------------------------------------------- detector


def _check_detector(model: ExportableModel, artifact: BackendArtifact, session: Session, images: Sequence[ParityImage], gates: Gates) -> ParityRecord:
    assert isinstance(model.postprocess, (DetectorFacts, BoxesFacts))
    pipeline = describe_pipeline(model, has_nms=artifact.has_nms)
    preprocessor = _preprocessor(model)
    prepared = [preprocessor.image(image.image) for image in images]
    batch = np.concatenate([tensor for tensor, _ in prepared])
    metas: list[ImageMeta] = [meta for _, meta in prepared]
    if isinstance(model.postprocess, BoxesFacts):
        return _check_boxes(model, model.postprocess, session, images, batch, metas, gates)
    theirs = run_reference(model, batch)
    ours = _run_artifact(model, session, batch)
    raw = {} if artifact.has_nms else ours
    if artifact.raw and artifact.has_nms:
        raw_session = open_artefact(artifact.backend, artifact.raw, artifact.options(), where=f"{model.name}: its raw head")
        raw = _run_artifact(model, raw_session, batch)
        raw_session.close()
    outputs = [
        _output(name, raw[name], theirs[name], gates.class_logits_linf if name.startswith("cls_") else gates.distances_linf) for name in theirs if name in raw
    ]
    decoder = BoxDecoder(pipeline, geometry="exact", where=model.name)
    reference_decoder = BoxDecoder(describe_pipeline(model, has_nms=False), geometry="exact", where=model.name)
    facts = model.postprocess
    pixels = _box_figures(decoder.decode(ours, metas), reference_decoder.decode(theirs, metas), metas, gates, score_thr=facts.score_thr, most=facts.max_per_img)
    return ParityRecord(verified=True, images=[image.name for image in images], samples=len(batch), outputs=outputs, pixels=pixels)


def _check_boxes(
    model: ExportableModel, facts: BoxesFacts, session: Session, images: Sequence[ParityImage], batch: Array, metas: list[ImageMeta], gates: Gates
) -> ParityRecord:
    """A graph that ends in boxes gives another number of rows for other images: one image at a time, and boxes alone are compared, not tensors."""
    decoder = BoxDecoder(describe_pipeline(model, has_nms=True), geometry="exact", where=model.name)
    ours: list[Detections] = []
    theirs: list[Detections] = []
    for row, meta in zip(batch, metas, strict=True):
        mine, reference = _run_artifact(model, session, row[None]), run_reference(model, row[None])
        for name, value in reference.items():
            if mine[name].ndim != value.ndim:
                raise ExportError(f"{model.name}: expected {name} with {value.ndim} axes, found {list(mine[name].shape)}", hint="run again with --no-simplify")
        ours += decoder.decode(mine, [meta])
        theirs += decoder.decode(reference, [meta])
    pixels = _box_figures(ours, theirs, metas, gates, score_thr=facts.score_thr, most=None)
    return ParityRecord(verified=True, images=[image.name for image in images], samples=len(batch), pixels=pixels)


def _box_figures(
    ours: list[Detections], theirs: list[Detections], metas: Sequence[ImageMeta], gates: Gates, *, score_thr: float, most: int | None
) -> list[PixelParity]:
    scales = _coarseness([meta.as_crop for meta in metas]).ravel()
    pairs = [_match(a, b, gates, scale=scale, score_thr=score_thr, most=most) for a, b, scale in zip(ours, theirs, scales, strict=True)]
    undecided = sum(pair.undecided for pair in pairs)
    return [
        _pixels("box_shift_px", np.concatenate([pair.shifts_px for pair in pairs]), gates.box_px, mean_gate=gates.box_mean_px, undecided=undecided, per=4),
        _pixels("score_shift", np.concatenate([pair.score_shifts for pair in pairs]), gates.score, undecided=undecided),
        _pixels("label_flips", np.array([float(pair.flips) for pair in pairs]), float(gates.label_flips)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matched:
    """The boxes of one image: (N, 4) how far each side lies from PyTorch's, (N) scores, and those that have no partner."""

    shifts_px: NDArray[np.float64]
    score_shifts: NDArray[np.float64]
    flips: int
    undecided: int


def _match(ours: Detections, theirs: Detections, gates: Gates, *, scale: float, score_thr: float, most: int | None) -> _Matched:
    """Pair the boxes of one image, of all pairs with one label the nearest first: a box that one side lacks leaves the others to their own.

    A box that only one side has counts as a flip, unless its score is within the gate of the threshold, or of the last box where the list was cut. Boxes
    below `gates.box_score` do not count at all.
    """
    sides = np.abs(theirs.boxes_xyxy[:, None].astype(np.float64) - ours.boxes_xyxy[None])  # (T, O, 4)
    far = sides.max(axis=2, initial=0.0)
    spans = (theirs.boxes_xyxy[:, 2:] - theirs.boxes_xyxy[:, :2]).max(axis=1, initial=0.0)
    can_be_one = (theirs.labels[:, None] == ours.labels[None]) & (far <= 0.25 * spans[:, None])
    rows, columns = np.nonzero(can_be_one)
    lone, free = set(range(len(theirs))), set(range(len(ours)))
    shifts, score_shifts = [], []
    for i in np.argsort(far[rows, columns], kind="stable"):
        row, column = int(rows[i]), int(columns[i])
        if row not in lone or column not in free:
            continue
        lone.remove(row)
        free.remove(column)
        if theirs.scores[row] >= gates.box_score:
            shifts.append(sides[row, column] / scale)
            score_shifts.append(abs(float(ours.scores[column]) - float(theirs.scores[row])))
    lone_scores = [float(theirs.scores[i]) for i in lone] + [float(ours.scores[i]) for i in free]
    lone_scores = [score for score in lone_scores if score >= gates.box_score]
    is_cut = most is not None and max(len(ours), len(theirs)) >= most
    edges = [max(score_thr, gates.box_score)] + ([float(theirs.scores[-1])] if is_cut and len(theirs) else [])
    undecided = sum(any(abs(score - edge) <= gates.score for edge in edges) for score in lone_scores)
    return _Matched(
        shifts_px=np.array(shifts, dtype=np.float64).reshape(-1, 4),
        score_shifts=np.array(score_shifts, dtype=np.float64),
        flips=len(lone_scores) - undecided,
        undecided=undecided,
    )


# ----------------------------------------------------------------------------------------------------------------- classifier


def _check_classifier(model: ExportableModel, session: Session, images: Sequence[ParityImage], gates: Gates) -> ParityRecord:
    preprocessor = _preprocessor(model)
    batch = np.concatenate([preprocessor.image(image.image)[0] for image in images])
    theirs = run_reference(model, batch)
    ours = _run_artifact(model, session, batch)
    outputs = [_output(name, ours[name], theirs[name], gates.relative_linf) for name in theirs]
    (name,) = theirs
    chosen = ours[name].argmax(axis=1)
    rows = np.arange(len(batch))
    # Where PyTorch gives our class the score of its own, within the gate, either answer is right.
    lost = theirs[name].max(axis=1) - theirs[name][rows, chosen]
    flips = (chosen != theirs[name].argmax(axis=1)) & (lost > gates.score)
    undecided = int(((chosen != theirs[name].argmax(axis=1)) & ~flips).sum())
    pixels = [
        _pixels("score_shift", np.abs(ours[name] - theirs[name]), gates.score),
        _pixels("label_flips", flips.astype(np.float64), float(gates.label_flips), undecided=undecided),
    ]
    return ParityRecord(verified=True, images=[image.name for image in images], samples=len(batch), outputs=outputs, pixels=pixels)


# -------------------------------------------------------------------------------------------------------------------- tensors


def _check_tensors(model: ExportableModel, session: Session, images: Sequence[ParityImage], gates: Gates) -> ParityRecord:
    """What the tensors mean is the caller's business: they are compared as they are; one by one where inputs may have different numbers of rows."""
    preprocessor = _preprocessor(model)
    batch = _crops(model, images)[0] if model.is_top_down else np.concatenate([preprocessor.image(image.image)[0] for image in images])
    parts = [batch] if model.fixed_batch is None else [row[None] for row in batch]
    pairs = [(_run_artifact(model, session, part), run_reference(model, part)) for part in parts]
    of_each = [[_output(spec.name, ours[spec.name], theirs[spec.name], gates.relative_linf) for ours, theirs in pairs] for spec in model.outputs]
    outputs = [max(figures, key=lambda figure: (not figure.passed, figure.relative_linf)) for figures in of_each]
    return ParityRecord(verified=True, images=[image.name for image in images], samples=len(batch), outputs=outputs)


# ------------------------------------------------------------------------------------------------------------------- pictures


def reference_result(model: ExportableModel, image: NDArray[np.uint8]) -> Detections | Poses | Classification:
    """What PyTorch finds in one image, for the picture beside the artefact's: pose models take the whole image as one box, as MMDeploy does."""
    pipeline = describe_pipeline(model, has_nms=isinstance(model.postprocess, BoxesFacts))
    preprocessor = _preprocessor(model)
    if model.task == "Classifier":
        tensor, _ = preprocessor.image(image)
        return ClassDecoder(pipeline, where=model.name).decode(run_reference(model, tensor))[0]
    if model.task == "PoseDetector":
        tensor, crops = preprocessor.crops(image, None)
        decoder = KeypointDecoder(pipeline, geometry="exact", where=model.name)
        return decoder.decode(run_reference(model, tensor), crops, input_hw=model.input_hw)
    tensor, meta = preprocessor.image(image)
    return BoxDecoder(pipeline, geometry="exact", where=model.name).decode(run_reference(model, tensor), [meta])[0]


def failed_gates(record: ParityRecord) -> list[str]:
    """The figures outside their gates that decide, in words."""
    dropped = [f"{p.name} drops by {p.drop:.2f} points > {p.gate:g}" for p in record.accuracy if not p.passed]
    if record.decided_by == "accuracy":
        return dropped
    wrong = [f"{p.name} {p.relative_linf:.2g} > {p.gate:g}" for p in record.outputs if not p.passed]
    return wrong + [_failed(p) for p in record.pixels if not p.passed] + dropped


def _failed(figure: PixelParity) -> str:
    if not figure.count:
        return f"{figure.name}: nothing to compare"
    is_worst = not figure.worst <= figure.gate
    return f"{figure.name} {figure.worst:.3g} > {figure.gate:g}" if is_worst else f"{figure.name} {figure.mean:.3g} on the mean > {figure.mean_gate:g}"


def parity_rows(record: ParityRecord) -> list[Mapping[str, str]]:
    """The record as rows of a table: what, figure, gate, verdict."""
    beyond = "FAIL" if record.decided_by == "parity" else "beyond"
    rows: list[Mapping[str, str]] = [
        {"what": f"{p.name} (relative L-inf)", "figure": f"{p.relative_linf:.2e}", "gate": f"{p.gate:g}", "ok": "ok" if p.passed else beyond}
        for p in record.outputs
    ]
    for figure in record.pixels:
        count = f"{figure.count}" + (f", {figure.undecided} undecided" if figure.undecided else "")
        what = f"{figure.name.removesuffix('_px').replace('_', ' ')} ({count})"
        rows.append({"what": what, "figure": _figure(figure), "gate": _gate(figure), "ok": "ok" if figure.passed else beyond})
    for accuracy in record.accuracy:
        what = f"AP of {accuracy.name.removesuffix('_ap')} ({accuracy.images} images)"
        shown = f"{100 * accuracy.value:.2f}, {record.reference} {100 * accuracy.reference:.2f}"
        gate = f"drop {accuracy.gate:g}" if accuracy.gate is not None else ""
        rows.append({"what": what, "figure": shown, "gate": gate, "ok": "ok" if accuracy.passed else "FAIL"})
    return rows


def _figure(parity: PixelParity) -> str:
    unit = " px" if parity.name.endswith("_px") else ""
    return f"worst {parity.worst:.3g}{unit}, mean {parity.mean:.2g}{unit}"


def _gate(parity: PixelParity) -> str:
    return f"{parity.gate:g}" + (f", mean {parity.mean_gate:g}" if parity.mean_gate is not None else "")
