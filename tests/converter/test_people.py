"""Procedural people: what is drawn is what the annotations say."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from modelcrate_bundle.errors import ConfigError, OutputError
from modelcrate_converter.cli import app
from modelcrate_converter.people import Person, Scene, draw_scene, procedural_scenes
from modelcrate_converter.people.body import INDEX, Build, Limb, Pose, joints_in_view, sample_pose, walking_pose
from modelcrate_converter.people.dataset import coco_annotations, walk, write_dataset, write_video
from modelcrate_converter.people.drawing import Look
from modelcrate_converter.people.scenes import Figure, finish
from modelcrate_runtime.skeletons import COCO_17

NAMES = {name: i for i, name in enumerate(COCO_17.names)}
STRAIGHT = (Limb(), Limb())
UP = np.array((0.0, -1.0))


def figure(pose: Pose, *, center: tuple[float, float] = (160, 160), height: float = 220, seed: int = 0) -> Figure:
    return Figure.placed(Look.sample(np.random.default_rng(seed)), pose, center_xy=center, height_px=height)


def photographed(*figures: Figure, occluders: bool = False) -> Scene:
    return finish(np.random.default_rng(0), np.full((320, 320, 3), 90, dtype=np.uint8), list(figures), light=UP, occluders=occluders)


def place(person: Person, name: str) -> np.ndarray:
    return person.keypoints[NAMES[name], :2]


def visibility(person: Person, name: str) -> int:
    return int(person.keypoints[NAMES[name], 2])


# ----------------------------------------------------------------------------------------------------------------------- bodies


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_bones_keep_their_lengths_in_every_pose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    build = Build.sample(rng)
    points = joints_in_view(build, sample_pose(rng))
    assert np.isfinite(points).all()
    for side in ("left", "right"):
        for a, b, length in (
            ("shoulder", "elbow", build.upper_arm),
            ("elbow", "wrist", build.forearm),
            ("hip", "knee", build.thigh),
            ("knee", "ankle", build.shank),
        ):
            found = np.linalg.norm(points[INDEX[f"{side}_{a}"]] - points[INDEX[f"{side}_{b}"]])
            assert found == pytest.approx(length, abs=1e-9)
    assert np.linalg.norm(points[INDEX["neck"]] - points[INDEX["pelvis"]]) == pytest.approx(build.torso, abs=1e-9)


@given(flexion=st.floats(-1.5, 3.0), abduction=st.floats(0, 1.5), bend=st.floats(0, 2.5), twist=st.floats(-1.5, 1.5), is_arm=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_joint_bends_by_its_angle(flexion: float, abduction: float, bend: float, twist: float, is_arm: bool) -> None:
    limb = Limb(flexion=flexion, abduction=abduction, bend=bend, twist=twist)
    pose = Pose(name="test", arms=(limb, limb) if is_arm else STRAIGHT, legs=STRAIGHT if is_arm else (limb, limb), yaw=0.7, roll=-0.3)
    points = joints_in_view(Build.sample(np.random.default_rng(0)), pose)
    chain = ("shoulder", "elbow", "wrist") if is_arm else ("hip", "knee", "ankle")
    for side in ("left", "right"):
        first, middle, last = (points[INDEX[f"{side}_{name}"]] for name in chain)
        upper, lower = middle - first, last - middle
        cosine = upper @ lower / np.linalg.norm(upper) / np.linalg.norm(lower)
        assert math.acos(max(-1.0, min(1.0, cosine))) == pytest.approx(bend, abs=1e-5)


def test_elbows_bend_to_the_front_and_knees_to_the_back() -> None:
    """Seen from the left, the front is at the left of the image: the person looks there."""
    pose = Pose(name="test", arms=(Limb(bend=1.2), Limb(bend=1.2)), legs=(Limb(bend=1.2), Limb(bend=1.2)), yaw=-math.pi / 2, elevation=0.0)
    points = joints_in_view(Build.sample(np.random.default_rng(0)), pose)
    assert points[INDEX["nose"], 0] < points[INDEX["head"], 0]
    assert points[INDEX["left_wrist"], 0] < points[INDEX["left_elbow"], 0] - 0.05
    assert points[INDEX["left_ankle"], 0] > points[INDEX["left_knee"], 0] + 0.05


@pytest.mark.parametrize("side", [1, -1])
def test_a_walk_leads_to_where_the_walker_looks(side: int) -> None:
    """The foot that is on the ground goes to the back, the lifted one to the front."""
    build = Build.sample(np.random.default_rng(0))
    for step in range(24):
        now, then = (joints_in_view(build, walking_pose(2 * math.pi * (step + part) / 24, yaw=side * math.pi / 2)) for part in (0.0, 0.5))
        lower = max(("left_ankle", "right_ankle"), key=lambda name: now[INDEX[name], 1])
        if abs(now[INDEX["left_ankle"], 1] - now[INDEX["right_ankle"], 1]) > 0.09:  # one is lifted for certain
            assert (then[INDEX[lower], 0] - now[INDEX[lower], 0]) * side < 0
    assert (now[INDEX["nose"], 0] - now[INDEX["head"], 0]) * side > 0


# ----------------------------------------------------------------------------------------------------------------------- truth


def test_left_and_right_are_the_persons_own() -> None:
    front = photographed(figure(Pose(name="stand", arms=STRAIGHT, legs=STRAIGHT, yaw=0.0))).people[0]
    back = photographed(figure(Pose(name="stand", arms=STRAIGHT, legs=STRAIGHT, yaw=math.pi))).people[0]
    for part in ("shoulder", "hip", "ear", "eye"):
        assert place(front, f"left_{part}")[0] > place(front, f"right_{part}")[0]
        assert place(back, f"left_{part}")[0] < place(back, f"right_{part}")[0]
    assert [visibility(front, name) for name in ("nose", "left_eye", "right_eye")] == [2, 2, 2]
    assert [visibility(back, name) for name in ("nose", "left_eye", "right_eye")] == [1, 1, 1]


def test_the_far_side_of_a_body_is_hidden() -> None:
    arms = (Limb(flexion=0.0), Limb(flexion=0.0))
    person = photographed(figure(Pose(name="stand", arms=arms, legs=STRAIGHT, yaw=math.pi / 2, elevation=0.0))).people[0]
    assert visibility(person, "right_shoulder") == 2
    assert visibility(person, "left_shoulder") == visibility(person, "left_ear") == 1
    mirrored = photographed(figure(Pose(name="stand", arms=arms, legs=STRAIGHT, yaw=-math.pi / 2, elevation=0.0))).people[0]
    assert visibility(mirrored, "left_shoulder") == 2
    assert visibility(mirrored, "right_shoulder") == visibility(mirrored, "right_ear") == 1


def test_who_stands_in_front_hides_who_stands_behind() -> None:
    pose = Pose(name="stand", arms=STRAIGHT, legs=STRAIGHT)
    alone = photographed(figure(pose, seed=1)).people[0]
    behind, ahead = photographed(figure(pose, seed=1), figure(pose, center=(165, 165), height=240, seed=2)).people
    assert alone.share_seen == 1.0
    assert behind.share_seen < 0.6 < ahead.share_seen == 1.0
    assert behind.area == pytest.approx(behind.share_seen * alone.area, abs=1)
    assert visibility(alone, "left_hip") == 2
    assert visibility(behind, "left_hip") == 1
    np.testing.assert_array_equal(behind.keypoints[:, :2], alone.keypoints[:, :2])


def test_what_is_outside_the_image_is_not_labelled() -> None:
    (person,) = photographed(figure(Pose(name="stand", arms=STRAIGHT, legs=STRAIGHT), center=(160, 320))).people
    assert visibility(person, "left_ankle") == 0
    np.testing.assert_array_equal(place(person, "left_ankle"), (0, 0))
    assert visibility(person, "nose") == 2
    assert person.box_xyxy[3] == 320


def test_nobody_is_nobody() -> None:
    assert photographed().people == []
    assert photographed(figure(Pose(name="stand", arms=STRAIGHT, legs=STRAIGHT), center=(-900, 160))).people == []


@pytest.mark.parametrize("index", range(40))
def test_annotations_hold_together(index: int) -> None:
    scene = draw_scene(3, index)
    height, width = scene.image.shape[:2]
    for person in scene.people:
        left, top, right, bottom = person.box_xyxy
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0 < person.area <= (right - left) * (bottom - top)
        assert 0 < person.share_seen <= 1
        for x, y, v in person.keypoints:
            assert v in (0, 1, 2)
            if v == 0:
                assert (x, y) == (0, 0)
            else:
                assert -0.5 <= x < width
                assert -0.5 <= y < height
            if v == 2:  # what is seen lies in what is seen
                assert left - 0.5 <= x <= right - 0.5
                assert top - 0.5 <= y <= bottom - 0.5


def test_a_seen_keypoint_lies_on_paint() -> None:
    """Painted twice, on black and on white: where the two pictures agree, nothing of the background shows through."""
    pictures = []
    for level in (0, 255):
        rng = np.random.default_rng(4)
        people = [figure(sample_pose(rng), center=(60 + 90 * i, 160), height=180, seed=i) for i in range(3)]
        pictures.append(finish(np.random.default_rng(1), np.full((320, 320, 3), level, dtype=np.uint8), people, light=UP, occluders=False))
    black, white = pictures
    same = np.abs(black.image.astype(int) - white.image).max(axis=2) < 60
    checked = 0
    for person in black.people:
        for x, y, v in person.keypoints:
            if v == 2:
                assert same[round(float(y)), round(float(x))]
                checked += 1
    assert checked > 20


# ----------------------------------------------------------------------------------------------------------------------- scenes


def test_the_same_seed_draws_the_same() -> None:
    one, again, other, next_one = draw_scene(5, 2), draw_scene(5, 2), draw_scene(6, 2), draw_scene(5, 3)
    np.testing.assert_array_equal(one.image, again.image)
    for a, b in zip(one.people, again.people, strict=True):
        np.testing.assert_array_equal(a.keypoints, b.keypoints)
    assert (one.image != other.image).mean() > 0.5
    assert (one.image != next_one.image).mean() > 0.5


@pytest.mark.parametrize("size_hw", [(64, 64), (240, 320), (333, 517), (800, 600)])
def test_scenes_of_any_size(size_hw: tuple[int, int]) -> None:
    scene = draw_scene(1, 0, size_hw=size_hw, people=(3, 3))
    assert scene.image.shape == (*size_hw, 3)
    assert scene.image.dtype == np.uint8


def test_every_kind_of_pose_and_group_appears() -> None:
    people = [draw_scene(9, index).people for index in range(150)]
    assert {person.pose for scene in people for person in scene} == {"stand", "walk", "run", "reach", "sit", "crouch", "jump", "lie"}
    assert {len(scene) for scene in people} >= {1, 2, 3, 4, 5}
    seen = np.concatenate([person.keypoints[:, 2] for scene in people for person in scene])
    assert 0.5 < (seen == 2).mean() < 0.9
    assert (seen == 1).mean() > 0.1
    assert (seen == 0).mean() > 0.01


def test_procedural_scenes_have_somebody_to_see() -> None:
    scenes = procedural_scenes(5, size_hw=(200, 300))
    assert [name for name, _, _ in scenes] == [f"procedural-{i}" for i in range(5)]
    for _, image, box in scenes:
        assert image.shape == (200, 300, 3)
        assert (box[2:] - box[:2] > 15).all()


# ---------------------------------------------------------------------------------------------------------------------- on disk


def test_data_set_is_cocos(tmp_path: Path) -> None:
    coco = pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    done: list[int] = []
    write_dataset(tmp_path / "set", count=4, seed=1, report=done.append)
    assert done == [1, 2, 3, 4]
    read = coco.COCO(str(tmp_path / "set/annotations.json"))
    assert len(read.getImgIds()) == 4
    for index, image in enumerate(read.loadImgs(read.getImgIds())):
        picture = cv2.imread(str(tmp_path / "set" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        scene = draw_scene(1, index)
        assert np.abs(picture.astype(int) - scene.image).mean() < 12  # JPEG halves the resolution of colours, and the grain is coloured
        annotations = read.loadAnns(read.getAnnIds(image["id"]))
        assert len(annotations) == len(scene.people)
        for annotation, person in zip(annotations, scene.people, strict=True):
            np.testing.assert_allclose(np.reshape(annotation["keypoints"], (17, 3)), person.keypoints, atol=6e-4)
            x, y, w, h = annotation["bbox"]
            np.testing.assert_array_equal([x, y, x + w, y + h], person.box_xyxy)
            assert annotation["num_keypoints"] == (person.keypoints[:, 2] > 0).sum()
    assert read.loadCats([1])[0]["keypoints"] == COCO_17.names


def test_perfect_results_score_one() -> None:
    """The annotations are what evaluations take them for: the truth itself has an AP of 1."""
    coco = pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval: pip install 'modelcrate[eval]'")
    truth = coco_annotations([(str(i), draw_scene(2, i).people) for i in range(12)], size_hw=(320, 320), info={})
    for kind in ("bbox", "keypoints"):
        dataset = coco.COCO(truth)
        results = [{key: a[key] for key in ("image_id", "category_id", "bbox" if kind == "bbox" else "keypoints")} | {"score": 0.9} for a in truth["annotations"]]
        evaluation = coco.COCOeval_faster(dataset, dataset.loadRes(results), kind, print_function=lambda *_: None)
        evaluation.run()
        assert evaluation.stats[0] == pytest.approx(1.0)


def test_video_has_its_frames_and_identities(tmp_path: Path) -> None:
    write_video(tmp_path / "video", frames=12, seed=3, size_hw=(180, 320), people=3)
    truth = json.loads((tmp_path / "video/annotations.json").read_text())
    capture = cv2.VideoCapture(str(tmp_path / "video/people.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == truth["info"]["frames_per_s"] == 25
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == len(truth["images"]) == 12
    for frame, scene in zip(frames, walk(3, frames=12, size_hw=(180, 320), people=3), strict=True):
        assert np.abs(frame.astype(int) - scene.image).mean() < 12  # MPEG-4
    assert {a["track_id"] for a in truth["annotations"]} <= {0, 1, 2}


def test_walkers_move_smoothly_and_cross() -> None:
    """Hips move by one walker's own number of pixels from frame to frame, and people pass in front of each other."""
    tracks: dict[int, list[tuple[int, float]]] = {}
    crossings = 0
    for frame, scene in enumerate(walk(0, frames=120)):
        crossings += any(person.share_seen < 0.7 for person in scene.people)
        for person in scene.people:
            hips = person.keypoints[[NAMES["left_hip"], NAMES["right_hip"]]]
            if (hips[:, 2] > 0).all():
                tracks.setdefault(person.identity, []).append((frame, float(hips[:, 0].mean())))
    assert len(tracks) >= 4
    assert crossings >= 10
    for track in tracks.values():
        steps = np.array([b[1] - a[1] for a, b in zip(track, track[1:], strict=False) if b[0] == a[0] + 1])
        assert (np.abs(steps) < 12).all()
        assert (np.abs(np.abs(steps) - np.median(np.abs(steps))) < 1.5).mean() > 0.9


@pytest.mark.parametrize("is_video", [False, True])
def test_an_interruption_leaves_nothing(tmp_path: Path, is_video: bool) -> None:
    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if is_video:
            write_video(tmp_path / "new", frames=5, seed=0, size_hw=(64, 96), people=1, report=stop)
        else:
            write_dataset(tmp_path / "new", count=5, seed=0, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="expected an empty place"):
        write_dataset(tmp_path, count=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "arguments", [{"count": 0}, {"count": 1, "size_hw": (63, 320)}, {"count": 1, "size_hw": (320, 9999)}, {"count": 1, "people": (3, 2)}, {"count": 1, "people": (1, 8)}]
)
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        write_dataset(tmp_path / "new", seed=0, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    pictures = CliRunner().invoke(app, ["people", "--count", "3", "--seed", "4", "-o", str(tmp_path / "set"), "--size", "160x120", "--people", "2-2"])
    assert (pictures.exit_code, pictures.stdout) == (0, f"wrote {tmp_path / 'set'}: 3 pictures and annotations.json\n")
    assert cv2.imread(str(tmp_path / "set/images/000002.jpg")).shape == (120, 160, 3)
    video = CliRunner().invoke(app, ["people", "--frames", "3", "-o", str(tmp_path / "video"), "--size", "160x120"])
    assert video.exit_code == 0
    assert (tmp_path / "video/people.mp4").stat().st_size > 1000
    for bad in (["--size", "big"], ["--people", "many"], ["--count", "0"]):
        assert CliRunner().invoke(app, ["people", "-o", str(tmp_path / "bad"), *bad]).exit_code == ConfigError.exit_code
    assert not (tmp_path / "bad").exists()
