"""The flip test averages with the mirror image as MMPose does, on any session, in as few calls as it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.demo import DEMO_MODELS
from modelcrate_converter.models.blueprints import classifier_shapes, heatmap_shapes, random_weights, rtmpose_shapes
from modelcrate_converter.people import draw_scene
from modelcrate_converter.reference import subject_of
from modelcrate_runtime import PoseDetector
from modelcrate_runtime.flip_test import FlipSession, flip_test
from modelcrate_runtime.skeletons import COCO_17
from modelcrate_runtime.subjects import Subject, of_bundle

K, W, H = 5, 12, 8
SWAPS = np.array([0, 2, 1, 4, 3])


class Rows:
    """A session whose network is a function of each input alone, the same bits in any batch; it notes its calls."""

    inputs = (TensorSpec(name="input", dtype="float32", shape=("batch", 1, H, W)),)
    outputs = (TensorSpec(name="x", dtype="float32", shape=("batch", K, W)), TensorSpec(name="y", dtype="float32", shape=("batch", K, H)))
    streams = 3

    def __init__(self, seed: int = 0) -> None:
        self.weights = np.random.default_rng(seed).integers(-8, 9, (K, H)).astype(np.float32)
        self.calls: list[tuple[str, int]] = []
        self.is_closed = False

    def run(self, feeds: Mapping[str, np.ndarray], how: str = "run") -> dict[str, np.ndarray]:
        image = feeds["input"][:, 0]
        self.calls.append((how, len(image)))
        # Not symmetric: the columns and the rows have weights of their own.
        columns = np.arange(1, W + 1, dtype=np.float32)
        x = np.stack([(one * self.weights[k][:, None]).sum(axis=0) * columns for one in image for k in range(K)]).reshape(len(image), K, W)
        y = np.stack([(one * columns).sum(axis=1) * self.weights[k] for one in image for k in range(K)]).reshape(len(image), K, H)
        return {"x": x, "y": y, "map": x[..., None, :] * y[..., :, None]}

    def run_beside(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.run(feeds, "beside")

    def close(self) -> None:
        self.is_closed = True


def flipped(session: Rows, *, max_batch: int = 8, map_axis: Any = "mirrored") -> FlipSession:
    return FlipSession(session, image="input", swaps=SWAPS, axes={"x": "mirrored", "y": "kept", "map": map_axis}, max_batch=max_batch)  # type: ignore[arg-type]


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, (count, 1, H, W)).astype(np.float32)


def mirror(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a network says of a mirrored picture, if it said this of the picture."""
    return {name: value[:, SWAPS] if name == "y" else value[:, SWAPS][..., ::-1] for name, value in outputs.items()}


def test_outputs_are_averaged_after_their_way_back() -> None:
    session = Rows()
    picture = images(1, 3)
    plain, turned = session.run({"input": picture}), session.run({"input": picture[..., ::-1]})
    found = flipped(session).run({"input": picture})
    for name, value in mirror(turned).items():
        np.testing.assert_array_equal(found[name], (plain[name] + value) / 2)
        assert found[name].dtype == np.float32


def test_maps_are_moved_as_mmpose_moves_them() -> None:
    """`flip_heatmaps(..., shift_heatmap=True)`: `heatmaps[..., 1:] = heatmaps[..., :-1]`, whose first column stays."""
    session = Rows()
    picture = images(2, 2)
    plain, turned = (torch.from_numpy(session.run({"input": one})["map"].copy()) for one in (picture, picture[..., ::-1]))
    back = turned.flip(-1)[:, SWAPS.tolist()]
    back[..., 1:] = back[..., :-1].clone()
    found = flipped(session, map_axis="shifted").run({"input": picture})["map"]
    np.testing.assert_array_equal(found, ((plain + back) * 0.5).numpy())


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_a_mirrored_picture_gives_the_mirrored_answer(seed: int, count: int, max_batch: int) -> None:
    """To the last bit, whatever the network."""
    session = flipped(Rows(seed), max_batch=max_batch)
    picture = images(seed, count)
    straight, turned = session.run({"input": picture}), session.run({"input": np.ascontiguousarray(picture[..., ::-1])})
    for name, value in mirror(straight).items():
        np.testing.assert_array_equal(turned[name], value)


@pytest.mark.parametrize(("count", "max_batch", "calls"), [(2, 8, [4]), (4, 8, [8]), (5, 8, [5, 5]), (1, 1, [1, 1]), (3, 5, [3, 3])])
def test_both_go_into_one_call_where_they_fit(count: int, max_batch: int, calls: list[int]) -> None:
    session = Rows()
    flipped(session, max_batch=max_batch).run({"input": images(3, count)})
    assert session.calls == [("run", size) for size in calls]


def test_it_is_a_session_like_the_one_in_it() -> None:
    session = Rows()
    outer = flipped(session)
    assert (outer.inputs, outer.outputs, outer.streams) == (Rows.inputs, Rows.outputs, 3)
    picture = images(4, 2)
    beside, straight = outer.run_beside({"input": picture}), outer.run({"input": picture})
    assert session.calls == [("beside", 4), ("run", 4)]
    for name, value in straight.items():
        np.testing.assert_array_equal(beside[name], value)
    outer.close()
    assert session.is_closed


# ------------------------------------------------------------------------------------------------------------ real networks


def checkpoint(folder: Path, shapes: Mapping[str, Any], **meta: Any) -> Subject:
    path = folder / "net.pth"
    torch.save({"state_dict": random_weights(shapes, seed=3), "meta": meta}, path)
    return subject_of(read_architecture(read_checkpoint(path)), path)


def coco_swaps() -> list[int]:
    swaps = list(range(17))
    for one, other in COCO_17.flip_pairs:
        swaps[one], swaps[other] = other, one
    return swaps


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_simcc_of_a_real_network(kind: str, demo_pose_bundle: Path) -> None:
    """Checkpoints and bundles alike, whole batches alike."""
    demo = DEMO_MODELS["demo-pose"]
    subject = of_bundle(Bundle.open(demo_pose_bundle)) if kind == "bundle" else subject_of(read_architecture(read_checkpoint(demo)), demo)
    rng = np.random.default_rng(5)
    with subject.open() as plain, subject.open(wrap=flip_test(subject)) as both:
        spec = plain.session.inputs[0]
        picture = rng.standard_normal((3, *(int(dim) for dim in spec.shape[1:]))).astype(np.float32)
        one, other = plain.session.run({spec.name: picture}), plain.session.run({spec.name: np.ascontiguousarray(picture[..., ::-1])})
        found = both.session.run({spec.name: picture})
    x = (one["simcc_x"] + other["simcc_x"][:, coco_swaps()][..., ::-1]) / 2
    y = (one["simcc_y"] + other["simcc_y"][:, coco_swaps()]) / 2
    np.testing.assert_allclose(found["simcc_x"], x, atol=1e-5)
    np.testing.assert_allclose(found["simcc_y"], y, atol=1e-5)


UDP = "model = dict(head=dict(type='HeatmapHead', decoder=dict(type='UDPHeatmap', input_size=(192, 256), heatmap_size=(48, 64), sigma=2)))"
MSRA = UDP.replace("UDPHeatmap", "MSRAHeatmap")


@pytest.mark.parametrize(("cfg", "is_moved"), [(UDP, False), (MSRA, True)], ids=["UDP", "MSRA"])
def test_heatmaps_are_moved_unless_they_are_udps(tmp_path: Path, cfg: str, is_moved: bool) -> None:
    subject = checkpoint(tmp_path, heatmap_shapes(widen=0.125, deepen=0.167, keypoints=17, channels=16), cfg=cfg)
    picture = np.random.default_rng(6).standard_normal((2, 3, 256, 192)).astype(np.float32)
    with subject.open() as plain, subject.open(wrap=flip_test(subject)) as both:
        name, output = plain.session.inputs[0].name, plain.session.outputs[0].name
        one, other = (plain.session.run({name: value})[output] for value in (picture, np.ascontiguousarray(picture[..., ::-1])))
        found = both.session.run({name: picture})[output]
    back = other[:, coco_swaps()][..., ::-1].copy()
    if is_moved:
        back[..., 1:] = back[..., :-1].copy()
    np.testing.assert_allclose(found, (one + back) / 2, atol=1e-5)


def test_a_mirrored_photo_has_the_mirrored_pose(demo_pose_bundle: Path) -> None:
    """Nearly: SimCC's bins lie half a pixel off the middle, which MMPose accepts. Without the flip test the two differ more."""
    subject = of_bundle(Bundle.open(demo_pose_bundle))
    apart = {}
    for name, wrap in (("plain", None), ("flip", flip_test(subject))):
        shifts = []
        with subject.open(wrap=wrap) as task:
            assert isinstance(task, PoseDetector)
            for index in range(12):
                scene = draw_scene(41, index, size_hw=(256, 256), people=(1, 2))
                width = scene.image.shape[1]
                for person in scene.people:
                    left, top, right, bottom = person.box_xyxy
                    straight = task.estimate(scene.image, [left, top, right, bottom])
                    turned = task.estimate(np.ascontiguousarray(scene.image[:, ::-1]), [width - right, top, width - left, bottom])
                    back = turned.keypoints_xy[0][coco_swaps()]
                    back[:, 0] = width - 1 - back[:, 0]
                    seen = straight.scores[0] > 0.3
                    shifts += np.abs(back - straight.keypoints_xy[0]).max(axis=1)[seen].tolist()
        apart[name] = np.percentile(shifts, 90)
    assert apart["flip"] < 1.5
    assert apart["flip"] < 0.8 * apart["plain"]


def test_what_cannot_be_mirrored_is_refused(tmp_path: Path, demo_detector_bundle: Path) -> None:
    detector = of_bundle(Bundle.open(demo_detector_bundle))
    classifier = checkpoint(tmp_path, classifier_shapes(widen=0.0625, deepen=0.167, classes=3))
    for subject, kind in ((detector, "Detector"), (classifier, "Classifier")):
        with pytest.raises(ConfigError, match=f"flip test: expected a pose estimator, found a {kind}"):
            subject.open(wrap=flip_test(subject))
    numbered = checkpoint(tmp_path, rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=8))
    with pytest.raises(ConfigError, match="expected to know which keypoints change places in a mirrored image, found numbered ones"):
        numbered.open(wrap=flip_test(numbered))


def test_hands_change_no_places(tmp_path: Path) -> None:
    """A mirrored left hand is a right hand, with the same 21 keypoints."""
    subject = checkpoint(tmp_path, rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=21, input_hw=(64, 64), hidden=16, s=8))
    picture = np.random.default_rng(6).standard_normal((1, 3, 64, 64)).astype(np.float32)
    with subject.open() as plain, subject.open(wrap=flip_test(subject)) as both:
        name = plain.session.inputs[0].name
        one, other = (plain.session.run({name: value})["simcc_y"] for value in (picture, np.ascontiguousarray(picture[..., ::-1])))
        np.testing.assert_allclose(both.session.run({name: picture})["simcc_y"], (one + other) / 2, atol=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_sessions_are_closed_with_their_tasks_and_on_errors(fixed: bool, demo_detector_bundle: Path) -> None:
    subject = of_bundle(Bundle.open(demo_detector_bundle))
    opened: list[Rows] = []

    def open_network(options: object) -> Any:
        opened.append(Rows())
        return opened[-1]

    def wrap(session: Any) -> Any:
        raise ConfigError("no")

    broken = replace(subject, open_network=open_network)
    with pytest.raises(ConfigError):
        broken.open(wrap=wrap if fixed else flip_test(broken))
    assert [session.is_closed for session in opened] == [True]


