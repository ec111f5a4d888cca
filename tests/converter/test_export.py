"""The canonical graph and the one with suppression: standard ONNX that computes what PyTorch and the runtime's own decoder compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from modelcrate_bundle.errors import ExportError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import OnnxOptions
from modelcrate_converter.export import OnnxModel, export_onnx, save_onnx
from modelcrate_converter.exportable import DetectorFacts, ExportableModel
from modelcrate_converter.models.blueprints import random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.simplify import op_table, simplify
from modelcrate_converter.suppression import attach_nms, points
from modelcrate_runtime.postprocess import decode_raw_head, suppress

METADATA = {"checkpoint": "ab" * 32, "model": "made-up"}
FACTS = DetectorFacts(pad_value=114, score_thr=0.3, iou_threshold=0.5, max_per_img=20, nms_pre=1000, min_bbox_size=0)


def run(model: OnnxModel, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From the bytes alone: whatever lay beside the file is not there."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model.path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def eager(model: ExportableModel, tensor: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        values = model.module(torch.from_numpy(tensor))
    return {spec.name: value.numpy() for spec, value in zip(model.outputs, values, strict=True)}


def relative_linf(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


def sample(model: ExportableModel, count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, 3, *model.input_hw)).astype(np.float32)


def saved_model(folder: Path, weights: dict[str, torch.Tensor], *, cfg: str = "") -> ExportableModel:
    path = folder / "model.pth"
    torch.save({"state_dict": weights, "meta": {"cfg": cfg} if cfg else {}}, path)
    return read_architecture(read_checkpoint(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportableModel]:
    """Small networks: a pose estimator, a detector with shared convolutions and exponentiated distances, one with separable ones."""
    pose = rtmpose_shapes(widen=0.0625, deepen=0.167, keypoints=5, input_hw=(96, 64), hidden=32, s=16)
    shared = rtmdet_shapes(widen=0.0625, deepen=0.167, classes=3, separable=False)
    separable = rtmdet_shapes(widen=0.0625, deepen=0.167, classes=1, separable=True)
    pipeline = "test_pipeline = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]\n"
    return {
        "pose": saved_model(tmp_path_factory.mktemp("pose"), random_weights(pose, seed=1)),
        "shared": saved_model(
            tmp_path_factory.mktemp("shared"), random_weights(shared, seed=2), cfg=pipeline + "model = dict(bbox_head=dict(exp_on_reg=True))"
        ),
        "separable": saved_model(tmp_path_factory.mktemp("separable"), random_weights(separable, seed=3), cfg=pipeline),
    }


@pytest.fixture(scope="module")
def graphs(models: dict[str, ExportableModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxModel]:
    return {name: export_onnx(model, OnnxOptions(), workdir=tmp_path_factory.mktemp(f"graph-{name}")) for name, model in models.items()}


@pytest.fixture(scope="module")
def dynamo_graph(models: dict[str, ExportableModel], tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(models["pose"], OnnxOptions(exporter="dynamo"), workdir=tmp_path_factory.mktemp("dynamo"))


NAMES = ("pose", "shared", "separable")


def assert_canonical(graph: OnnxModel, *, opset: int) -> onnx.ModelProto:
    proto = onnx.load(graph.path, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}] == [("", opset)]
    assert graph.opset == opset
    assert proto.ir_version <= 9
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions
    assert not any(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    assert dict(graph.op_counts) == {op: sum(node.op_type == op for node in proto.graph.node) for op in {node.op_type for node in proto.graph.node}}
    assert graph.node_count == len(proto.graph.node)
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    return proto


def value_specs(values: Any) -> list[tuple[str, int, list[int | str]]]:
    return [(v.name, v.type.tensor_type.elem_type, [dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim]) for v in values]


# -------------------------------------------------------------------------------------------------------------- the raw graph


@pytest.mark.parametrize("name", NAMES)
def test_canonical_graph_is_standard_float32_with_a_dynamic_batch(name: str, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel]) -> None:
    proto = assert_canonical(graphs[name], opset=17)
    model = models[name]
    height, width = model.input_hw
    assert value_specs(proto.graph.input) == [("input", onnx.TensorProto.FLOAT, ["batch", 3, height, width])]
    if name == "pose":
        expected: list[tuple[str, list[int | str]]] = [("simcc_x", ["batch", 5, 128]), ("simcc_y", ["batch", 5, 192])]
    else:
        classes = 3 if name == "shared" else 1
        expected = [(f"{kind}_{i}", ["batch", channels, 96 >> (3 + i), 128 >> (3 + i)]) for kind, channels in (("cls", classes), ("dist", 4)) for i in range(3)]
    assert value_specs(proto.graph.output) == [(key, onnx.TensorProto.FLOAT, shape) for key, shape in expected]


@pytest.mark.parametrize("name", NAMES)
def test_canonical_graph_computes_what_pytorch_computes(name: str, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel]) -> None:
    tensor = sample(models[name], 3)
    ours, theirs = run(graphs[name], {"input": tensor}), eager(models[name], tensor)
    assert list(ours) == list(theirs)
    for output in theirs:
        assert relative_linf(ours[output], theirs[output]) <= 1e-4, output


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_images_one_by_one(name: str, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel]) -> None:
    tensor = sample(models[name], 5)
    together = run(graphs[name], {"input": tensor})
    single = [run(graphs[name], {"input": tensor[i : i + 1]}) for i in range(5)]
    for output in together:
        assert relative_linf(together[output], np.concatenate([one[output] for one in single])) <= 1e-5, output


@pytest.mark.parametrize("name", ["pose", "shared"])
def test_two_exports_are_the_same_bytes(name: str, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel], tmp_path: Path) -> None:
    again = export_onnx(models[name], OnnxOptions(), workdir=tmp_path)
    assert again.sha256 == graphs[name].sha256
    assert again.path.read_bytes() == graphs[name].path.read_bytes()


def test_the_graph_carries_its_checkpoint_and_no_path_of_this_machine(
    models: dict[str, ExportableModel], graphs: dict[str, OnnxModel], dynamo_graph: OnnxModel
) -> None:
    for graph in (graphs["pose"], dynamo_graph):
        proto = onnx.load(graph.path)
        assert {entry.key: entry.value for entry in proto.metadata_props} == {"checkpoint": models["pose"].checkpoint[1], "model": models["pose"].name}
        data = graph.path.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in data
        assert b"site-packages" not in data


def test_dynamo_and_torchscript_compute_the_same(models: dict[str, ExportableModel], graphs: dict[str, OnnxModel], dynamo_graph: OnnxModel) -> None:
    """The dynamo exporter cannot write opset 17; everything else holds for its graph too."""
    proto = assert_canonical(dynamo_graph, opset=18)
    assert value_specs(proto.graph.input) == value_specs(onnx.load(graphs["pose"].path).graph.input)
    assert value_specs(proto.graph.output) == value_specs(onnx.load(graphs["pose"].path).graph.output)
    for count in (1, 3):
        tensor = sample(models["pose"], count)
        theirs = eager(models["pose"], tensor)
        one, other = run(dynamo_graph, {"input": tensor}), run(graphs["pose"], {"input": tensor})
        for output in theirs:
            assert relative_linf(one[output], other[output]) <= 1e-4, output
            assert relative_linf(one[output], theirs[output]) <= 1e-4, output


def test_dynamo_graph_simplifies_to_the_same_numbers(models: dict[str, ExportableModel], dynamo_graph: OnnxModel, tmp_path: Path) -> None:
    after = simplify(dynamo_graph, workdir=tmp_path, metadata=METADATA)
    assert_canonical(after, opset=18)
    tensor = sample(models["pose"], 2)
    before, simplified = run(dynamo_graph, {"input": tensor}), run(after, {"input": tensor})
    for output in before:
        assert relative_linf(simplified[output], before[output]) <= 1e-6, output


class _Refuses(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("two lines\nof complaint")


def test_an_exporter_that_fails_is_one_line_with_a_way_out(models: dict[str, ExportableModel], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="two lines of complaint") as caught:
        export_onnx(dataclasses.replace(models["pose"], module=_Refuses()), OnnxOptions(), workdir=tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def made_graph(nodes: list[onnx.NodeProto], *, domains: tuple[str, ...] = ("",)) -> onnx.ModelProto:
    values = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")}
    graph = onnx.helper.make_graph(nodes, "made", [values["x"]], [values["y"]])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(domain, 17) for domain in domains])


X, Y = (TensorSpec(name=name, dtype="float32", shape=("batch", 2)) for name in "xy")


def test_custom_operators_are_refused_by_name(tmp_path: Path) -> None:
    proto = made_graph([onnx.helper.make_node("Magic", ["x"], ["y"], domain="mmdeploy")], domains=("", "mmdeploy"))
    with pytest.raises(ExportError, match="found mmdeploy::Magic"):
        save_onnx(proto, tmp_path / "custom.onnx", inputs=(X,), outputs=(Y,), metadata=METADATA)
    assert not (tmp_path / "custom.onnx").exists()


def test_other_tensors_than_stated_are_refused(tmp_path: Path) -> None:
    proto = made_graph([onnx.helper.make_node("Relu", ["x"], ["y"])])
    z = TensorSpec(name="z", dtype="float32", shape=("batch", 2))
    with pytest.raises(ExportError, match=r"expected the tensors \['z'\], found \['y'\]"):
        save_onnx(proto, tmp_path / "other.onnx", inputs=(X,), outputs=(z,), metadata=METADATA)


def test_saved_graphs_read_everywhere_and_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = (made_graph([onnx.helper.make_node("Relu", ["x"], ["y"], doc_string=text)]) for text in ("here", "there"))
    second.ir_version, second.producer_name, second.doc_string = 11, "someone", "on a machine"
    saved = [save_onnx(proto, tmp_path / f"{i}.onnx", inputs=(X,), outputs=(Y,), metadata=METADATA) for i, proto in enumerate((first, second))]
    assert onnx.load(saved[1].path).ir_version == 9
    assert saved[1].path.read_bytes().count(b"someone") == 0
    first.ir_version = 9
    assert save_onnx(first, tmp_path / "2.onnx", inputs=(X,), outputs=(Y,), metadata=METADATA).sha256 == saved[1].sha256


# ------------------------------------------------------------------------------------------------------------- simplification


@pytest.mark.parametrize("name", NAMES)
def test_simplification_changes_no_number(name: str, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel], tmp_path: Path) -> None:
    after = simplify(graphs[name], workdir=tmp_path, metadata=METADATA)
    proto = assert_canonical(after, opset=17)
    assert value_specs(proto.graph.output) == value_specs(onnx.load(graphs[name].path).graph.output)
    tensor = sample(models[name], 3)
    before, simplified = run(graphs[name], {"input": tensor}), run(after, {"input": tensor})
    for output in before:
        assert relative_linf(simplified[output], before[output]) <= 1e-6, output
    again = simplify(graphs[name], workdir=tmp_path, metadata=METADATA)
    assert again.sha256 == after.sha256


def test_the_table_of_operators_tells_what_changed_first(graphs: dict[str, OnnxModel], tmp_path: Path) -> None:
    before = graphs["pose"]
    after = simplify(before, workdir=tmp_path, metadata=METADATA)
    rows = op_table(before, after)
    assert {name: count for name, count, _ in rows if count} == dict(before.op_counts)
    assert {name: count for name, _, count in rows if count} == dict(after.op_counts)
    changed = [row[1] != row[2] for row in rows]
    assert any(changed), "onnxsim found nothing to do: choose another graph for this test"
    assert changed == sorted(changed, reverse=True)
    assert after.node_count < before.node_count
    same = op_table(before, before)
    assert [row[0] for row in same] == sorted(before.op_counts)


def test_a_file_that_onnxsim_cannot_read_is_an_error_with_a_way_out(graphs: dict[str, OnnxModel], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"broken\.onnx") as caught:
        simplify(dataclasses.replace(graphs["pose"], path=broken), workdir=tmp_path, metadata=METADATA)
    assert "--no-simplify" in caught.value.hint


# ----------------------------------------------------------------------------------------------------------------- suppression


def expected_rows(raw: dict[str, np.ndarray], facts: DetectorFacts, *, pre_top_k: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the graph must say, in numpy: decode, threshold, suppression per class, best first, padded."""
    boxes, scores = decode_raw_head([raw[f"cls_{i}"] for i in range(3)], [raw[f"dist_{i}"] for i in range(3)], strides=(8, 16, 32), offset=0.0)
    dets, labels = np.zeros((len(boxes), rows, 5), dtype=np.float32), np.full((len(boxes), rows), -1, dtype=np.int64)
    for i in range(len(boxes)):
        candidates = np.sort(np.argsort(-scores[i].max(axis=1), kind="stable")[:pre_top_k])
        box, score = boxes[i][candidates], scores[i][candidates]
        row, label = np.nonzero(score > facts.score_thr)
        keep = suppress(box[row], score[row, label], iou_threshold=facts.iou_threshold, classes=label)[:rows]
        dets[i, : len(keep), :4], dets[i, : len(keep), 4], labels[i, : len(keep)] = box[row[keep]], score[row[keep], label[keep]], label[keep]
    return dets, labels


def counted(labels: np.ndarray) -> list[int]:
    return [int((row >= 0).sum()) for row in labels]


class Bench:
    """A stand-in for a canonical graph whose raw head is fed by hand."""

    def __init__(self, folder: Path, *, classes: int, input_hw: tuple[int, int] = (64, 96)) -> None:
        self.folder, self.classes, self.input_hw = folder, classes, input_hw
        height, width = input_hw
        self.maps = {
            f"{kind}_{i}": (channels, height // stride, width // stride)
            for kind, channels in (("cls", classes), ("dist", 4))
            for i, stride in enumerate((8, 16, 32))
        }
        outputs = [TensorSpec(name=name, dtype="float32", shape=("batch", *shape)) for name, shape in self.maps.items()]
        inputs = [TensorSpec(name="input", dtype="float32", shape=("batch", 3, height, width))]
        inputs += [TensorSpec(name=f"fed_{spec.name}", dtype=spec.dtype, shape=spec.shape) for spec in outputs]
        nodes = [onnx.helper.make_node("Identity", [f"fed_{name}"], [name]) for name in self.maps]
        infos = [[onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, spec.shape) for spec in specs] for specs in (inputs, outputs)]
        proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "bench", *infos), opset_imports=[onnx.helper.make_opsetid("", 17)])
        self.canonical = save_onnx(proto, folder / "bench.onnx", inputs=tuple(inputs), outputs=tuple(outputs), metadata=METADATA)

    def graph(self, facts: DetectorFacts, *, pre_top_k: int = 5000) -> OnnxModel:
        return attach_nms(self.canonical, facts, pre_top_k=pre_top_k, workdir=self.folder, metadata=METADATA)

    def raw(self, seed: int, *, count: int, bias: float = 0.0) -> dict[str, np.ndarray]:
        """Logits around `bias`, and boxes of 10 to 60 pixels a side, so that many overlap."""
        rng = np.random.default_rng(seed)
        return {
            name: (rng.normal(bias, 1.5, (count, *shape)) if name.startswith("cls") else rng.uniform(5, 30, (count, *shape))).astype(np.float32)
            for name, shape in self.maps.items()
        }

    def run(self, graph: OnnxModel, raw: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        count = len(raw["cls_0"])
        found = run(graph, {"input": np.zeros((count, 3, *self.input_hw), dtype=np.float32)} | {f"fed_{name}": value for name, value in raw.items()})
        return found["dets"], found["labels"]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda **options: Bench(tmp_path, **options)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pre_top_k", [5000, 30, 7])
def test_suppression_in_the_graph_is_the_runtimes_own(bench: Callable[..., Bench], classes: int, seed: int, pre_top_k: int) -> None:
    """Raw maps of 126 cells in the graph and in numpy; thresholds that leave some images short and cut others."""
    at = bench(classes=classes)
    facts = dataclasses.replace(FACTS, score_thr=(0.3, 0.9)[seed % 2], iou_threshold=(0.5, 0.2, 0.9)[seed % 3], max_per_img=(20, 200)[seed % 2])
    graph = at.graph(facts, pre_top_k=pre_top_k)
    rows = min(facts.max_per_img, classes * min(pre_top_k, 126))
    raw = at.raw(seed, count=3, bias=-1.0)
    dets, labels = at.run(graph, raw)
    expected_dets, expected_labels = expected_rows(raw, facts, pre_top_k=pre_top_k, rows=rows)
    assert dets.shape == (3, rows, 5)
    assert sum(counted(expected_labels)) > 0
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(dets, expected_dets, rtol=0, atol=1e-4)


def test_suppression_really_suppresses_and_only_within_a_class(bench: Callable[..., Bench]) -> None:
    """Two cells with nearly the same box: one class keeps the better one, two classes keep both."""
    at = bench(classes=2)
    raw = {name: np.full((2, *shape), -9.0 if name.startswith("cls") else 10.0, dtype=np.float32) for name, shape in at.maps.items()}
    for image, second_label in ((0, 0), (1, 1)):
        raw["cls_0"][image, 0, 3, 3] = 3.0
        raw["cls_0"][image, second_label, 3, 4] = 2.0
        raw["dist_0"][image, :, 3, 3] = (20, 20, 20, 20)
        raw["dist_0"][image, :, 3, 4] = (28, 20, 12, 20)  # 8 pixels further right: the same box
    dets, labels = at.run(at.graph(FACTS), raw)
    assert counted(labels) == [1, 2]
    np.testing.assert_array_equal(labels[1, :2], [0, 1])
    np.testing.assert_allclose(dets[0, 0], [4, 4, 44, 44, 1 / (1 + np.exp(-3.0))], rtol=0, atol=1e-4)
    np.testing.assert_allclose(dets[1, 1], [4, 4, 44, 44, 1 / (1 + np.exp(-2.0))], rtol=0, atol=1e-4)


def test_images_of_a_batch_do_not_mix(bench: Callable[..., Bench]) -> None:
    at = bench(classes=3)
    graph = at.graph(FACTS, pre_top_k=40)
    raw = at.raw(3, count=4, bias=-1.0)
    dets, labels = at.run(graph, raw)
    assert len({counts for counts in map(tuple, labels)}) == 4, "four images that answer alike would prove nothing"
    order = [2, 0, 3, 1]
    permuted_dets, permuted_labels = at.run(graph, {name: value[order] for name, value in raw.items()})
    np.testing.assert_array_equal(permuted_dets, dets[order])
    np.testing.assert_array_equal(permuted_labels, labels[order])
    for i in range(4):
        one_dets, one_labels = at.run(graph, {name: value[i : i + 1] for name, value in raw.items()})
        np.testing.assert_allclose(one_dets[0], dets[i], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one_labels[0], labels[i])


def test_rows_beyond_the_detections_are_empty(bench: Callable[..., Bench]) -> None:
    """One image with nothing, one with a few, one that is cut: the same number of rows."""
    at = bench(classes=2)
    raw = at.raw(1, count=3, bias=-1.0)
    for name in ("cls_0", "cls_1", "cls_2"):
        raw[name][0] = -20
        raw[name][1] = -20
        raw[name][2] += 4
    raw["cls_1"][1, 1, 0, :2] = 5
    raw["dist_1"][1] = 4
    dets, labels = at.run(at.graph(FACTS), raw)
    assert counted(labels) == [0, 2, 20]
    empty = labels == -1
    np.testing.assert_array_equal(dets[empty], 0)
    assert (dets[~empty][:, 4] > FACTS.score_thr).all()
    assert (np.diff(dets[:, :, 4], axis=1) <= 0).all(), "best first"


def test_boxes_are_not_clipped(bench: Callable[..., Bench]) -> None:
    at = bench(classes=1)
    raw = {name: np.full((1, *shape), -9.0 if name.startswith("cls") else 10.0, dtype=np.float32) for name, shape in at.maps.items()}
    raw["cls_2"][0, 0, 0, 0] = 3.0
    raw["dist_2"][0, :, 0, 0] = (100, 50, 300, 400)
    dets, _ = at.run(at.graph(FACTS), raw)
    np.testing.assert_allclose(dets[0, 0, :4], [-100, -50, 300, 400], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_boxes_that_are_inside_out_get_the_runtimes_answer(bench: Callable[..., Bench], seed: int) -> None:
    """Without exponentiation a network may answer negative distances; what the user gets must not depend on who suppresses."""
    at = bench(classes=1)
    raw = at.raw(seed, count=1, bias=-1.0)
    for name in ("dist_0", "dist_1", "dist_2"):
        raw[name] -= 17.5
    graph = at.graph(dataclasses.replace(FACTS, max_per_img=126))
    dets, labels = at.run(graph, raw)
    expected_dets, _ = expected_rows(raw, FACTS, pre_top_k=5000, rows=126)

    def proper(rows: np.ndarray) -> np.ndarray:
        return rows[(rows[:, 4] > 0) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])]

    assert len(proper(expected_dets[0])) > 0
    np.testing.assert_allclose(proper(dets[0]), proper(expected_dets[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "classes"), [("shared", 3), ("separable", 1)])
def test_a_real_head_with_suppression_is_its_raw_graph_decoded(
    name: str, classes: int, models: dict[str, ExportableModel], graphs: dict[str, OnnxModel], tmp_path: Path
) -> None:
    facts = models[name].postprocess
    assert isinstance(facts, DetectorFacts)
    graph = attach_nms(graphs[name], facts, pre_top_k=5000, workdir=tmp_path, metadata=METADATA)
    proto = assert_canonical(graph, opset=17)
    rows = min(100, classes * 252)
    assert value_specs(proto.graph.input) == [("input", onnx.TensorProto.FLOAT, ["batch", 3, 96, 128])]
    assert value_specs(proto.graph.output) == [("dets", onnx.TensorProto.FLOAT, ["batch", rows, 5]), ("labels", onnx.TensorProto.INT64, ["batch", rows])]
    tensor = sample(models[name], 3)
    found = run(graph, {"input": tensor})
    dets, labels = expected_rows(run(graphs[name], {"input": tensor}), facts, pre_top_k=5000, rows=rows)
    assert min(counted(labels)) > 0
    np.testing.assert_allclose(found["dets"][:, :, 4], dets[:, :, 4], rtol=0, atol=1e-4)
    for image in range(3):
        # Scores that are equal to float32's last digit may change places; the rows are the same.
        ours, theirs = (np.concatenate([d[image], label[image, :, None]], axis=1) for d, label in ((found["dets"], found["labels"]), (dets, labels)))
        distance = np.abs(ours[:, None] - theirs[None]).max(axis=2)
        real = labels[image] >= 0
        assert (distance[real].min(axis=1) <= 1e-4).all()
        assert len(set(distance[real].argmin(axis=1))) == real.sum()
        np.testing.assert_array_equal(ours[~real], theirs[~real])


def test_the_same_graph_gets_the_same_suppression(graphs: dict[str, OnnxModel], tmp_path: Path) -> None:
    first, second = (attach_nms(graphs["shared"], FACTS, pre_top_k=5000, workdir=tmp_path, metadata=METADATA).sha256 for _ in range(2))
    assert first == second
    assert attach_nms(graphs["shared"], FACTS, pre_top_k=50, workdir=tmp_path, metadata=METADATA).sha256 != first


def test_points_are_the_cells_corners_level_by_level() -> None:
    found = points((64, 96))
    assert found.shape == (8 * 12 + 4 * 6 + 2 * 3, 4)
    np.testing.assert_array_equal(found[:2], [[0, 0, 0, 0], [8, 0, 8, 0]])
    np.testing.assert_array_equal(found[12], [0, 8, 0, 8])
    np.testing.assert_array_equal(found[96 + 6], [0, 16, 0, 16])
    np.testing.assert_array_equal(found[-1], [64, 32, 64, 32])
