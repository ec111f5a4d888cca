"""Detector and PoseDetector as a user calls them: MMDeploy's calls and returns, batches, threads, and bundles of every kind."""

import gc
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from modelcrate_bundle import Bundle
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, TaskMismatchError
from modelcrate_converter.people import procedural_scenes
from modelcrate_runtime import Detections, Detector, PoseDetector, Poses
from modelcrate_runtime.tasks import BESIDE_BATCH, plan_calls

K = 17
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Between a batch and its single calls: kernels of other sizes round otherwise."""


@pytest.fixture(scope="module")
def pose(pose_bundle: Path) -> Iterator[PoseDetector]:
    with PoseDetector(pose_bundle, "cpu", 0) as detector:
        yield detector


@pytest.fixture(scope="module")
def detector(detector_bundle: Path) -> Iterator[Detector]:
    with Detector(detector_bundle, "cpu", 0) as opened:
        yield opened


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Of different sizes and shapes: landscape, portrait, square, small."""
    return [image for hw in ((240, 320), (400, 300), (128, 128), (60, 90)) for _, image, _ in procedural_scenes(1, size_hw=hw)]


def many_boxes(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    corners = rng.uniform(-60, 400, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(5, 250, (count, 2))], axis=1).astype(np.float32)


def copy_without_manifest(bundle: Path, place: Path) -> Path:
    """As MMDeploy would have written it."""
    shutil.copytree(bundle, place)
    (place / "manifest.json").unlink()
    return place


class Recording:
    """The session of a task, and the batch sizes that it was run with."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.sizes: list[int] = []
        self.sizes_beside: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes.append(len(next(iter(feeds.values()))))
        return self.session.run(feeds)

    def run_beside(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sizes_beside.append(len(next(iter(feeds.values()))))
        return self.session.run_beside(feeds)


# ------------------------------------------------------------------------------------------- MMDeploy's calls and their returns


def test_detector_returns_mmdeploys_tuple(detector: Detector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    result = detector(image)
    assert isinstance(result, tuple)
    boxes, labels, masks = result
    assert len(boxes) > 5
    assert (boxes.dtype, boxes.shape[1]) == (np.float32, 5)
    assert (labels.dtype, labels.shape) == (np.int32, (len(boxes),))
    assert isinstance(masks, list)
    assert [(mask.dtype, mask.shape) for mask in masks] == [(np.float64, (0,))] * len(boxes)
    assert (np.diff(boxes[:, 4]) <= 0).all()  # best first
    assert (boxes[:, 4] > 0.05).all()
    assert (boxes[:, :4] >= 0).all()
    assert (boxes[:, :4] <= [640, 480, 640, 480]).all()
    assert set(labels.tolist()) <= {0, 1}
    assert len(detector.class_names) == 2


def test_detect_is_the_call_with_names(detector: Detector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    boxes, labels, _ = detector(image)
    found = detector.detect(image)
    assert isinstance(found, Detections)
    np.testing.assert_array_equal(np.column_stack([found.boxes_xyxy, found.scores]), boxes)
    np.testing.assert_array_equal(found.labels, labels)


def test_pose_call_forms(pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, box = scene
    whole = [0, 0, image.shape[1], image.shape[0]]
    one = pose(image, box)
    assert (one.dtype, one.shape) == (np.float32, (1, K, 3))
    for form in (box.tolist(), tuple(box.tolist()), box[None], [box], box.astype(np.float64)):
        np.testing.assert_array_equal(pose(image, form), one)
    np.testing.assert_array_equal(pose(image, bboxes=box), one)
    np.testing.assert_array_equal(pose(image, box=box), one)
    assert pose(image).shape == (1, K, 3)
    np.testing.assert_array_equal(pose(image), pose(image, None))
    np.testing.assert_allclose(pose(image), pose(image, whole), **CLOSE)
    assert pose(image, [box, whole]).shape == (2, K, 3)


def test_integer_boxes_are_boxes(pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = scene
    as_floats = pose(image, [100.0, 50.0, 300.0, 400.0])
    for form in ([100, 50, 300, 400], np.array([100, 50, 300, 400]), np.array([[100, 50, 300, 400]], dtype=np.uint16)):
        np.testing.assert_array_equal(pose(image, form), as_floats)


@pytest.mark.parametrize("nobody", [[], np.zeros((0, 4)), ()])
def test_zero_boxes_give_zero_poses(pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray], nobody: Any) -> None:
    image, box = scene
    result = pose(image, nobody)
    assert (result.shape, result.dtype) == ((0, K, 3), np.float32)
    first, second = pose.batch([image, image], [nobody, box])
    assert first.shape == (0, K, 3)
    np.testing.assert_allclose(second, pose(image, box), **CLOSE)


def test_estimate_is_the_call_with_names(pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, box = scene
    poses = pose.estimate(image, box)
    assert isinstance(poses, Poses)
    assert len(poses) == 1
    np.testing.assert_array_equal(np.dstack([poses.keypoints_xy, poses.scores]), pose(image, box))


@pytest.mark.parametrize("positional", [("cpu", 0), ("cpu",), ()])
def test_device_arguments_are_positional(pose_bundle: Path, detector_bundle: Path, positional: tuple[Any, ...]) -> None:
    with PoseDetector(str(pose_bundle), *positional) as opened_pose, Detector(str(detector_bundle), *positional) as opened_detector:
        assert opened_pose.session.providers[0] == opened_detector.session.providers[0] == "CPUExecutionProvider"


def test_keywords_are_mmdeploys(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    with PoseDetector(model_path=str(pose_bundle), device_name="cpu", device_id=0, warmup=2) as opened:
        assert opened(img=scene[0]).shape == (1, K, 3)


MMPOSE_RTMPOSE_PAGE = """
import cv2
import numpy as np
{import_line}

img = cv2.imread(image_path)
# create a detector
detector = PoseDetector(model_path=model_path, device_name='cpu', device_id=0)
if bbox is None:
    result = detector(img)
else:
    # converter (x, y, w, h) -> (left, top, right, bottom)
    bbox = np.array(bbox, dtype=int)
    bbox[2:] += bbox[:2]
    result = detector(img, bbox)
_, point_num, _ = result.shape
points = result[:, :, :2].reshape(point_num, 2)
for [x, y] in points.astype(int):
    cv2.circle(img, (x, y), 1, (0, 255, 0), 2)
cv2.imwrite(output_path, img)
"""


@pytest.mark.parametrize("bbox", [None, [200, 100, 180, 300]])
def test_mmposes_example_runs_with_its_import_changed(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path, bbox: list[int] | None) -> None:
    cv2.imwrite(str(tmp_path / "in.png"), scene[0])
    names: dict[str, Any] = {"image_path": str(tmp_path / "in.png"), "model_path": str(pose_bundle), "bbox": bbox, "output_path": str(tmp_path / "out.png")}
    exec(MMPOSE_RTMPOSE_PAGE.format(import_line="from modelcrate_runtime import PoseDetector"), names)
    assert names["points"].shape == (K, 2)
    drawn = cv2.imread(str(tmp_path / "out.png"))
    assert (drawn != scene[0]).any()
    names["detector"].close()


# ---------------------------------------------------------------------------------------------------------------------- batches


def test_detector_batch_is_its_single_calls(detector: Detector, images: list[np.ndarray]) -> None:
    batch = detector.batch([*images, images[0]])
    assert len(batch) == 5
    for image, (boxes, labels, masks) in zip([*images, images[0]], batch, strict=True):
        expected_boxes, expected_labels, _ = detector(image)
        assert len(expected_boxes) > 0
        np.testing.assert_allclose(boxes, expected_boxes, **CLOSE)
        np.testing.assert_array_equal(labels, expected_labels)
        assert len(masks) == len(boxes)


def test_images_of_one_input_shape_share_a_call(detector_bundle: Path, images: list[np.ndarray]) -> None:
    with Detector(detector_bundle, streams=1) as opened:
        recording = Recording(opened.session)
        opened.session = recording
        assert len(opened.batch(images)) == 4
        assert recording.sizes == [4]


def test_pose_batch_is_its_single_calls(pose: PoseDetector, images: list[np.ndarray]) -> None:
    boxes = [many_boxes(3), None, [], [10, 10, 50, 100]]
    batch = pose.batch(images, boxes)
    assert [result.shape[0] for result in batch] == [3, 1, 0, 1]
    for image, of_image, result in zip(images, boxes, batch, strict=True):
        np.testing.assert_allclose(result, pose(image, of_image), **CLOSE)


def test_pose_batch_without_boxes_is_of_whole_images(pose: PoseDetector, images: list[np.ndarray]) -> None:
    for image, result in zip(images, pose.batch(images), strict=True):
        assert result.shape == (1, K, 3)
        np.testing.assert_allclose(result, pose(image), **CLOSE)


def test_batches_of_nothing_are_nothing(pose: PoseDetector, detector: Detector) -> None:
    assert pose.batch([]) == []
    assert pose.batch([], []) == []
    assert detector.batch([]) == []


def test_pose_batch_needs_boxes_for_every_image(pose: PoseDetector, images: list[np.ndarray]) -> None:
    with pytest.raises(ValueError):
        pose.batch(images, [[1, 2, 30, 40]])


@pytest.mark.parametrize("count", [2, 5, 32, 33, 70])
def test_many_boxes_are_as_many_single_boxes(pose_bundle: Path, pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray], count: int) -> None:
    """More boxes than the bundle's largest batch run in several calls, none of them larger."""
    image, _ = scene
    boxes = many_boxes(count)
    with PoseDetector(pose_bundle, streams=1) as opened:
        assert opened.max_batch == opened.bundle.manifest.shape_ranges["input"].max[0] == 32
        recording = Recording(opened.session)
        opened.session = recording
        together = opened(image, boxes)
        assert sum(recording.sizes) == count
        assert max(recording.sizes) <= 32
        assert len(recording.sizes) == -(-count // 32)
        assert not recording.sizes_beside
    assert together.shape == (count, K, 3)
    chosen = range(count) if count < 10 else [0, 1, 30, 31, count - 2, count - 1]
    for i in chosen:
        np.testing.assert_allclose(together[i], pose(image, boxes[i])[0], **CLOSE)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 33, 70])
@pytest.mark.parametrize("streams", [1, 2, 3, 16])
def test_planned_calls_cover_every_input_once(count: int, streams: int) -> None:
    lanes, rest = plan_calls(count, max_batch=32, streams=streams)
    assert [i for part in (*(part for lane in lanes for part in lane), *rest) for i in part] == list(range(count))
    assert len({sum(map(len, lane)) for lane in lanes}) <= 1  # nobody waits for a longer lane
    assert len(lanes) == (streams if count >= streams > 1 else 0)
    assert all(0 < len(part) <= BESIDE_BATCH for lane in lanes for part in lane)
    assert sum(map(len, rest)) == (count if streams == 1 else count % streams)
    assert all(0 < len(part) <= 32 for part in rest)


def test_calls_never_exceed_the_artefacts_batch() -> None:
    lanes, rest = plan_calls(9, max_batch=1, streams=2)
    assert [len(part) for lane in lanes for part in lane] == [1] * 8
    assert [len(part) for part in rest] == [1]


@pytest.mark.parametrize("count", [2, 5, 19])
def test_side_by_side_is_one_by_one(pose_bundle: Path, pose: PoseDetector, images: list[np.ndarray], count: int) -> None:
    """Also where the calls do not end where the images do."""
    boxes = [many_boxes(count), many_boxes(1), [], many_boxes(2)]
    with PoseDetector(pose_bundle, threads=2) as opened:
        assert opened.session.streams == 2
        recording = Recording(opened.session)
        opened.session = recording
        together = opened.batch(images, boxes)
        assert sum(recording.sizes_beside) == (count + 3) // 2 * 2
        assert sum(recording.sizes) == (count + 3) % 2
    for image, of_image, result in zip(images, boxes, together, strict=True):
        assert result.shape == (len(of_image), K, 3)
        for box, points in zip(of_image, result, strict=True):
            np.testing.assert_allclose(points, pose(image, box)[0], **CLOSE)


def test_detectors_run_side_by_side_too(detector_bundle: Path, detector: Detector, images: list[np.ndarray]) -> None:
    with Detector(detector_bundle, threads=2) as opened:
        recording = Recording(opened.session)
        opened.session = recording
        batch = opened.batch([*images, images[0]])
        assert (sum(recording.sizes_beside), recording.sizes) == (4, [1])
    for image, (boxes, labels, _) in zip([*images, images[0]], batch, strict=True):
        expected_boxes, expected_labels, _ = detector(image)
        np.testing.assert_allclose(boxes, expected_boxes, **CLOSE)
        np.testing.assert_array_equal(labels, expected_labels)


def test_an_error_in_one_of_several_calls_is_raised(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    with PoseDetector(pose_bundle, threads=2) as opened:
        recording = Recording(opened.session)
        opened.session = recording
        calls = []

        def failing(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls.append(1)
            raise InputError("no")

        recording.run_beside = failing
        with pytest.raises(InputError, match="no"):
            opened(scene[0], many_boxes(4))
        assert len(calls) == 2  # the other call was waited for


@pytest.fixture(scope="module")
def fixed_batch_bundle(pose_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pose bundle with a graph that takes four crops, no more and no fewer."""
    place = tmp_path_factory.mktemp("fixed") / "bundle"
    shutil.copytree(pose_bundle, place)
    model = onnx.load(place / "end2end.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, place / "end2end.onnx")
    return place


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_fixed_batch_is_filled_up_and_cut(fixed_batch_bundle: Path, pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray], count: int) -> None:
    image, _ = scene
    boxes = many_boxes(count)
    with PoseDetector(fixed_batch_bundle, verify=False) as opened:
        assert opened.max_batch == 4
        with pytest.raises(InputError):  # the graph does insist
            opened.session.run({"input": np.zeros((1, 3, 256, 192), dtype=np.float32)})
        recording = Recording(opened.session)
        opened.session = recording
        result = opened(image, boxes)
        assert recording.sizes == [4] * -(-count // 4)
        assert opened(image, []).shape == (0, K, 3)
    assert result.shape == (count, K, 3)
    np.testing.assert_allclose(result, pose(image, boxes), **CLOSE)


def test_changed_graph_is_not_opened_unless_asked(fixed_batch_bundle: Path) -> None:
    with pytest.raises(BundleIntegrityError, match="end2end.onnx"):
        PoseDetector(fixed_batch_bundle)


# -------------------------------------------------------------------------------------------------------------- unusual inputs


@pytest.mark.parametrize("geometry", ["exact", "sdk"])
def test_box_outside_the_image_gives_numbers(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], geometry: str) -> None:
    image, box = scene
    outside = [[-900, -900, -700, -600], [5000, 10, 5100, 200], [640, 480, 640, 480]]
    with PoseDetector(pose_bundle, geometry=geometry) as opened:
        result = opened(image, [box, *outside])
        assert result.shape == (4, K, 3)
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result[0], opened(image, box)[0], **CLOSE)
        for (left, top, right, bottom), points in zip(outside[:2], result[1:3], strict=True):
            # Keypoints lie in the crop, which is the padded box, at most a bin outside it.
            reach = 1.25 * max(right - left, bottom - top) + 4
            assert (np.abs(points[:, :2] - [(left + right) / 2, (top + bottom) / 2]) <= reach).all()


@pytest.mark.parametrize("form", ["grey", "grey with a channel", "alpha", "view", "one pixel"])
def test_every_form_of_image_runs(pose: PoseDetector, detector: Detector, scene: tuple[np.ndarray, np.ndarray], form: str) -> None:
    image = scene[0]
    source, same = {
        "grey": (image[:, :, 0], np.repeat(image[:, :, :1], 3, axis=2)),
        "grey with a channel": (image[:, :, :1], np.repeat(image[:, :, :1], 3, axis=2)),
        "alpha": (np.dstack([image, image[:, :, 0]]), image),
        "view": (image[::-1, ::-2], np.ascontiguousarray(image[::-1, ::-2])),
        "one pixel": (image[:1, :1, 0], np.repeat(image[:1, :1, :1], 3, axis=2)),
    }[form]
    before = source.copy()
    np.testing.assert_array_equal(pose(source), pose(same))
    np.testing.assert_array_equal(detector(source)[0], detector(same)[0])
    np.testing.assert_array_equal(source, before)


@pytest.mark.parametrize("image", [None, np.zeros((4, 4, 3), dtype=np.uint16), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), dtype=np.uint8), [[1, 2], [3, 4]]])
def test_what_is_no_image_is_refused(pose: PoseDetector, detector: Detector, image: Any) -> None:
    for call in (lambda: pose(image), lambda: detector(image), lambda: pose.batch([image]), lambda: detector.batch([image])):
        with pytest.raises(InputError, match="^image: expected"):
            call()


def test_boxes_as_xywh_are_refused_when_they_show(pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(InputError, match="left <= right") as caught:
        pose(scene[0], [400, 300, 100, 120])
    assert "(x, y, width, height)" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------- tasks and geometry


def test_bundle_of_another_task_is_refused_both_ways(pose_bundle: Path, detector_bundle: Path) -> None:
    with pytest.raises(TaskMismatchError, match="expected a detector for Detector, found a pose estimator") as caught:
        Detector(pose_bundle)
    assert "PoseDetector" in caught.value.hint
    with pytest.raises(TaskMismatchError, match="expected a pose estimator for PoseDetector, found a detector") as caught:
        PoseDetector(detector_bundle)
    assert "Detector" in caught.value.hint


def test_geometry_comes_from_the_manifest_and_can_be_chosen(
    pose_bundle: Path, detector_bundle: Path, tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]
) -> None:
    image, box = scene
    foreign = copy_without_manifest(pose_bundle, tmp_path / "foreign")
    with (
        PoseDetector(pose_bundle) as ours,
        PoseDetector(pose_bundle, geometry="sdk") as ours_as_sdk,
        PoseDetector(foreign) as theirs,
        PoseDetector(foreign, geometry="exact") as theirs_as_exact,
    ):
        assert [opened.geometry for opened in (ours, ours_as_sdk, theirs, theirs_as_exact)] == ["exact", "sdk", "sdk", "exact"]
        np.testing.assert_array_equal(ours(image, box), theirs_as_exact(image, box))
        np.testing.assert_array_equal(ours_as_sdk(image, box), theirs(image, box))
        assert (ours(image, box) != theirs(image, box)).any()
    with Detector(detector_bundle) as exact, Detector(copy_without_manifest(detector_bundle, tmp_path / "detector")) as sdk:
        assert (exact.geometry, sdk.geometry) == ("exact", "sdk")
        # Some box of a random detector reaches over the right edge.
        assert exact(image)[0][:, 2].max() == 640
        assert sdk(image)[0][:, 2].max() == 639
        assert sdk.class_names == []


@pytest.mark.parametrize("geometry", ["SDK", "udp", ""])
def test_unknown_geometry_is_refused(pose_bundle: Path, geometry: str) -> None:
    with pytest.raises(ConfigError, match="geometry: expected 'exact' or 'sdk', found"):
        PoseDetector(pose_bundle, geometry=geometry)


def test_opened_bundle_and_zip_are_as_good_as_a_folder(
    opened_pose: Bundle, pose: PoseDetector, pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    image, box = scene
    archive = Path(shutil.make_archive(str(tmp_path / "pose"), "zip", pose_bundle))
    for source in (opened_pose, archive, str(archive)):
        with PoseDetector(source) as opened:
            np.testing.assert_array_equal(opened(image, box), pose(image, box))


def test_closing_a_zipped_bundle_leaves_nothing_behind(pose_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files in the temporary folder nor a ResourceWarning."""
    archive = Path(shutil.make_archive(str(tmp_path / "pose"), "zip", pose_bundle))
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(unpacked))
    with PoseDetector(archive) as opened:
        assert list(unpacked.iterdir())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del opened
        gc.collect()
    assert list(unpacked.iterdir()) == []
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("with_size", [True, False], ids=["K in the graph", "K symbolic"])
def test_number_of_keypoints_is_known_without_a_manifest(pose_bundle: Path, tmp_path: Path, scene: tuple[np.ndarray, np.ndarray], with_size: bool) -> None:
    foreign = copy_without_manifest(pose_bundle, tmp_path / "foreign")
    if not with_size:
        model = onnx.load(foreign / "end2end.onnx")
        for value in model.graph.output:
            value.type.tensor_type.shape.dim[1].dim_param = "K"
        onnx.save(model, foreign / "end2end.onnx")
    with PoseDetector(foreign) as opened:
        assert opened.keypoint_count == K
        assert opened(scene[0], []).shape == (0, K, 3)


def test_output_map_gives_the_outputs_their_names(pose_bundle: Path, pose: PoseDetector, scene: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    foreign = copy_without_manifest(pose_bundle, tmp_path / "foreign")
    model = onnx.load(foreign / "end2end.onnx")
    renamed = {"simcc_x": "a", "simcc_y": "b", "input": "pixels"}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed[value.name]
    onnx.save(model, foreign / "end2end.onnx")
    text = (foreign / "pipeline.json").read_text()
    text = text.replace('"output_map": {}', '"output_map": {"simcc_x": "a", "simcc_y": "b"}').replace('"img": "input"', '"img": "pixels"')
    (foreign / "pipeline.json").write_text(text)
    with PoseDetector(foreign, geometry="exact") as opened:
        np.testing.assert_allclose(opened(*scene), pose(*scene), **CLOSE)


# ------------------------------------------------------------------------------------------------------------ threads and leaks


def test_one_detector_serves_four_threads(pose: PoseDetector, detector: Detector, images: list[np.ndarray]) -> None:
    boxes = many_boxes(3)
    alone_pose, alone_boxes = [pose(image, boxes) for image in images], [detector(image)[0] for image in images]
    barrier = threading.Barrier(4)

    def work(worker: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        barrier.wait(timeout=30)
        order = [(worker + i) % len(images) for i in range(3 * len(images))]
        return [(i, pose(images[i], boxes), detector(images[i])[0]) for i in order]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            for i, of_pose, of_detector in results:
                np.testing.assert_allclose(of_pose, alone_pose[i], **CLOSE)
                np.testing.assert_allclose(of_detector, alone_boxes[i], **CLOSE)


def native_threads() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Threads:")).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc: Linux")
def test_opening_and_closing_leaves_no_threads(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    image, box = scene

    def use() -> None:
        with PoseDetector(pose_bundle, threads=3) as opened:
            opened(image, [box, box])

    for _ in range(3):  # what libraries start once and keep
        use()
    python, native = threading.active_count(), native_threads()
    for _ in range(50):
        use()
    assert threading.active_count() <= python
    assert native_threads() <= native + 2


def test_leaving_the_block_closes(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    with PoseDetector(pose_bundle) as opened:
        opened(scene[0])
    opened.close()  # twice does no harm
    with pytest.raises(Exception):
        opened(scene[0])


# ------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("geometry", ["exact", "sdk"])
def test_published_detector_finds_its_person(shared: Path, geometry: str) -> None:
    """MMDetection and MMDeploy's SDK both find this person here (`shared/fixtures/README.md`); they print two and four digits."""
    image = cv2.imread(str(shared / "fixtures/images/000000000785.jpg"))
    with Detector(shared / "fixtures/bundles/mmdeploy-rtmdet-nano", "cpu", 0, geometry=geometry) as opened:
        boxes, labels, _ = opened(image)
    np.testing.assert_allclose(boxes[0], [279.91, 41.59, 499.72, 383.95, 0.8592], atol=0.02)
    assert abs(boxes[0, 4] - 0.8592) < 2e-4
    assert labels[0] == 0


def test_published_bundles_default_to_the_sdks_geometry(shared: Path) -> None:
    with Detector(shared / "fixtures/bundles/mmdeploy-rtmdet-nano") as detector, PoseDetector(shared / "fixtures/bundles/mmdeploy-rtmpose-t") as pose:
        assert detector.geometry == pose.geometry == "sdk"
        assert pose(np.zeros((8, 8, 3), dtype=np.uint8), []).shape == (0, K, 3)
