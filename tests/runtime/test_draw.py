"""Pictures of results: where ink lands, where it does not, and that the caller's image stays as it was."""

import numpy as np
import pytest

from modelcrate_bundle.manifest import KeypointInfo
from modelcrate_runtime import Detections, Poses
from modelcrate_runtime.draw import draw_detections, draw_poses
from modelcrate_runtime.skeletons import COCO_17, DATA_SETS, keypoint_info, published_keypoints

INK = 40
"""Levels that a thin line may lose to anti-aliasing."""
RED, GREEN = (255, 0, 0), (0, 255, 128)
TWO = KeypointInfo(names=["a", "b"], skeleton=[(0, 1)], colors=[RED, RED], link_colors=[GREEN])


def black(height: int = 240, width: int = 320) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    array = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(boxes_xyxy=array[:, :4], scores=array[:, 4], labels=array[:, 5].astype(np.int32))


def poses(points: list[list[float]], scores: list[float]) -> Poses:
    return Poses(keypoints_xy=np.array([points], dtype=np.float32), scores=np.array([scores], dtype=np.float32))


def test_box_is_drawn_on_its_edges_and_nowhere_else() -> None:
    image = black()
    canvas = draw_detections(image, detections((40, 60, 200, 180, 0.9, 0)))
    assert canvas.shape == image.shape
    assert canvas.dtype == np.uint8
    for y, x in ((120, 40), (120, 200), (180, 120), (60, 190)):
        assert canvas[y, x].any(), (y, x)
    assert not canvas[90:170, 60:190].any()  # inside
    assert not canvas[200:].any()  # below
    assert not image.any()  # the caller's image


def test_boxes_below_the_threshold_are_not_drawn() -> None:
    assert not draw_detections(black(), detections((40, 60, 200, 180, 0.29, 0)), score_thr=0.3).any()
    assert draw_detections(black(), detections((40, 60, 200, 180, 0.31, 0)), score_thr=0.3).any()


def test_neighbouring_labels_have_other_colours() -> None:
    colors = {tuple(draw_detections(black(), detections((40, 60, 200, 180, 0.9, label)))[120, 40].tolist()) for label in range(6)}
    assert len(colors) == 6


def test_caption_changes_with_the_class_name_and_needs_none() -> None:
    result = detections((40, 60, 200, 180, 0.9, 1))
    named, other, unnamed = (draw_detections(black(), result, class_names=names) for names in (["x", "person"], ["x", "dog"], ["x"]))
    assert (named != other).any()
    np.testing.assert_array_equal(unnamed, draw_detections(black(), result))


@pytest.mark.parametrize("box", [(-50, -50, -10, -10), (0, 0, 319, 5), (300, 230, 500, 400), (-1e6, -1e6, 1e6, 1e6), (310, 0, 320, 240)])
def test_boxes_anywhere_can_be_drawn(box: tuple[float, ...]) -> None:
    assert draw_detections(black(), detections((*box, 0.9, 3))).shape == (240, 320, 3)


def test_link_and_points_have_their_colours_in_bgr() -> None:
    canvas = draw_poses(black(), poses([[60, 120], [260, 120]], [0.9, 0.9]), keypoints=TWO)
    np.testing.assert_allclose(canvas[120, 160], GREEN[::-1], atol=INK)
    np.testing.assert_allclose(canvas[120, 60], RED[::-1], atol=INK)
    assert not canvas[:100].any()


def test_weak_points_and_their_links_are_left_out() -> None:
    canvas = draw_poses(black(), poses([[60, 120], [260, 120]], [0.9, 0.1]), keypoints=TWO, score_thr=0.3)
    assert canvas[120, 60].any()
    assert not canvas[120, 100:].any()


def test_input_of_draw_poses_is_not_changed_and_no_pose_is_no_ink() -> None:
    image = black()
    draw_poses(image, poses([[60, 120], [260, 120]], [0.9, 0.9]), keypoints=TWO)
    assert not image.any()
    nobody = Poses(keypoints_xy=np.zeros((0, 2, 2), dtype=np.float32), scores=np.zeros((0, 2), dtype=np.float32))
    assert not draw_poses(image, nobody, keypoints=TWO).any()


@pytest.mark.parametrize("far", [-1e9, 1e9, float("inf")])
def test_points_far_outside_do_not_overflow(far: float) -> None:
    canvas = draw_poses(black(), poses([[160, 120], [far, 120]], [0.9, 0.9]), keypoints=TWO)
    inward, away = (canvas[120, 300], canvas[120, 20]) if far > 0 else (canvas[120, 20], canvas[120, 300])
    np.testing.assert_allclose(inward, GREEN[::-1], atol=INK)  # the link leaves the image towards the point
    assert not away.any()


def test_missing_colours_and_links_are_made_up() -> None:
    bare = KeypointInfo(names=["a", "b"], skeleton=[(0, 1), (1, 5)])
    canvas = draw_poses(black(), poses([[60, 120], [260, 120]], [0.9, 0.9]), keypoints=bare)
    assert canvas[120, 160].any()
    assert canvas[120, 60].any()


@pytest.mark.parametrize("shape", [(240, 320), (240, 320, 1), (240, 320, 4)])
def test_grey_and_alpha_become_colour(shape: tuple[int, ...]) -> None:
    canvas = draw_poses(np.zeros(shape, dtype=np.uint8), poses([[60, 120], [260, 120]], [0.9, 0.9]), keypoints=TWO)
    assert canvas.shape == (240, 320, 3)
    np.testing.assert_allclose(canvas[120, 160], GREEN[::-1], atol=INK)


def test_lines_grow_with_the_image() -> None:
    small = draw_poses(black(240, 320), poses([[40, 120], [280, 120]], [0.9, 0.9]), keypoints=TWO)
    large = draw_poses(black(960, 1280), poses([[160, 480], [1120, 480]], [0.9, 0.9]), keypoints=TWO)
    assert (large[:, 640, 1] > 128).sum() >= 3 * (small[:, 160, 1] > 128).sum() > 0


def test_coco_metadata_hangs_together() -> None:
    assert keypoint_info(17) is COCO_17
    count = len(COCO_17.names)
    assert count == len(set(COCO_17.names)) == len(COCO_17.sigmas) == len(COCO_17.colors) == 17
    assert len(COCO_17.skeleton) == len(COCO_17.link_colors) == 19
    assert all(0 <= a < count and 0 <= b < count for a, b in COCO_17.skeleton)
    for a, b in COCO_17.flip_pairs:
        assert COCO_17.names[a].replace("left", "right") == COCO_17.names[b]
        assert COCO_17.sigmas[a] == COCO_17.sigmas[b]
    assert published_keypoints("coco") is COCO_17
    assert keypoint_info(3).names == ["keypoint_0", "keypoint_1", "keypoint_2"]
    assert keypoint_info(3).skeleton == []


@pytest.mark.parametrize(("data_set", "count"), [("halpe26", 26), ("coco-wholebody", 133), ("ap10k", 17), ("lapa", 106), ("hand", 21), ("coco", 17)])
def test_published_sets_hold_together(data_set: str, count: int) -> None:
    info = published_keypoints(data_set)
    assert len(info.names) == len(set(info.names)) == count == len(info.colors)
    assert len(info.skeleton) == len(info.link_colors)
    assert all(0 <= a < count and 0 <= b < count and a != b for a, b in (*info.skeleton, *info.flip_pairs))
    swapped = [index for pair in info.flip_pairs for index in pair]
    assert len(swapped) == len(set(swapped))
    assert len(info.sigmas) == (0 if data_set == "lapa" else count)  # LaPa is scored by NME, without them
    if info.sigmas:
        # The whole body's feet were measured side by side and differ: 0.068 and 0.092.
        assert all(abs(info.sigmas[a] - info.sigmas[b]) < 0.03 for a, b in info.flip_pairs)
    if data_set != "ap10k":
        assert keypoint_info(count) is info
    assert data_set in DATA_SETS


def test_twenty_six_and_more_keypoints_are_drawn() -> None:
    """MMDeploy draws 17 and 133 only."""
    for data_set, count in (("halpe26", 26), ("hand", 21), ("ap10k", 17), ("coco-wholebody", 133)):
        rng = np.random.default_rng(0)
        poses = Poses(keypoints_xy=rng.uniform(20, 780, (1, count, 2)).astype(np.float32), scores=np.ones((1, count), dtype=np.float32))
        info = published_keypoints(data_set)
        canvas = draw_poses(np.zeros((800, 800, 3), dtype=np.uint8), poses, keypoints=info)
        drawn = {tuple(int(v) for v in color[::-1]) for color in canvas.reshape(-1, 3)}
        colors = set(map(tuple, info.link_colors))
        assert len(colors & drawn) > len(colors) / 2  # the others lie under keypoints
