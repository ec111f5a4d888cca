"""Sessions: what was asked for runs, or an error says what is missing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from modelcrate_bundle import Bundle
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, MissingBackendError, UnsupportedBundleError
from modelcrate_runtime import PoseDetector, SessionOptions, open_session
from modelcrate_runtime.sessions import BACKENDS, open_artefact

CPU = SessionOptions()


@pytest.fixture
def foreign(pose_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the pose bundle without manifest, to be changed."""
    shutil.copytree(pose_bundle, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    return tmp_path / "foreign"


@pytest.fixture
def graph_of(tmp_path: Path) -> Callable[..., Path]:
    """Write a graph of one node from `x` (batch, 2) float32 to `y`."""

    def make(op: str = "Relu", *, domain: str = "", ir_version: int = 8, opset: int = 17) -> Path:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "g", values[:1], values[1:])
        opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
        path = tmp_path / "net.onnx"
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString())
        return path

    return make


def opened(path: Path, options: SessionOptions = CPU):
    return open_artefact("onnxruntime", {"net": path}, options, where="bundle")


def test_specs_are_the_graphs(pose_bundle: Path) -> None:
    session = open_session(Bundle.open(pose_bundle), CPU)
    (image,) = session.inputs
    assert (image.name, image.dtype, image.shape[1:]) == ("input", "float32", (3, 256, 192))
    assert image.is_batch_dynamic
    assert [(spec.name, spec.dtype, spec.shape[1:]) for spec in session.outputs] == [("simcc_x", "float32", (17, 384)), ("simcc_y", "float32", (17, 512))]
    outputs = session.run({"input": np.zeros((3, 3, 256, 192), dtype=np.float32)})
    assert {name: value.shape for name, value in outputs.items()} == {"simcc_x": (3, 17, 384), "simcc_y": (3, 17, 512)}


def test_run_computes_the_graph(graph_of: Callable[..., Path]) -> None:
    session = opened(graph_of())
    (y,) = session.run({"x": np.array([[-1, 2]], dtype=np.float32)}).values()
    np.testing.assert_array_equal(y, [[0, 2]])


@pytest.mark.parametrize(
    "names", [("NoSuchExecutionProvider",), ("NoSuchExecutionProvider", "CPUExecutionProvider"), ("CPUExecutionProvider", "NoSuchExecutionProvider")]
)
def test_missing_provider_is_an_error_with_the_names(pose_bundle: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(MissingBackendError, match="expected the provider NoSuchExecutionProvider, found .*CPUExecutionProvider") as caught:
        PoseDetector(pose_bundle, providers=names)
    assert onnxruntime.__version__ in str(caught.value)
    assert caught.value.hint


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_cuda_is_never_replaced_by_the_cpu(pose_bundle: Path) -> None:
    with pytest.raises(MissingBackendError, match="CUDAExecutionProvider") as caught:
        PoseDetector(pose_bundle, "cuda", 0)
    assert "onnxruntime-gpu" in caught.value.hint


@pytest.mark.parametrize("device", ["tpu", "CPU", "cuda:0"])
def test_unknown_device_is_an_error_with_the_known_ones(pose_bundle: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: expected one of cpu, cuda, found '{device}'"):
        PoseDetector(pose_bundle, device)


def test_providers_are_used_exactly(pose_bundle: Path) -> None:
    with PoseDetector(pose_bundle, providers=["CPUExecutionProvider"]) as pose:
        assert pose.session.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08" + b"\xff" * 100])
def test_broken_file_is_an_integrity_error_with_its_path(foreign: Path, content: bytes) -> None:
    (foreign / "end2end.onnx").write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx: expected an ONNX graph, found") as caught:
        PoseDetector(foreign)
    assert "copy the bundle again" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_truncated_file_is_an_integrity_error(foreign: Path) -> None:
    data = (foreign / "end2end.onnx").read_bytes()
    (foreign / "end2end.onnx").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BundleIntegrityError, match=r"end2end\.onnx"):
        PoseDetector(foreign)


def test_changed_file_is_found_by_its_hash_before_it_is_loaded(pose_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(pose_bundle, tmp_path / "changed")
    path = tmp_path / "changed" / "end2end.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match="the file was changed after the build"):
        PoseDetector(tmp_path / "changed")


@pytest.mark.parametrize(("op", "domain"), [("TRTBatchedNMS", "mmdeploy"), ("NMSRotated", "mmdeploy"), ("NoSuchOp", "")])
def test_custom_operators_are_unsupported_and_named(graph_of: Callable[..., Path], op: str, domain: str) -> None:
    with pytest.raises(UnsupportedBundleError, match=f"net.onnx: expected operators that ONNX Runtime has, found: .*{op}") as caught:
        opened(graph_of(op, domain=domain))
    assert "modelcrate" in caught.value.hint


def test_custom_operators_in_a_bundle_are_unsupported(foreign: Path) -> None:
    model = onnx.load(foreign / "end2end.onnx")
    model.graph.node[0].op_type, model.graph.node[0].domain = "MMCVModulatedDeformConv2d", "mmdeploy"
    model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    onnx.save(model, foreign / "end2end.onnx")
    with pytest.raises(UnsupportedBundleError, match="MMCVModulatedDeformConv2d"):
        PoseDetector(foreign)


def test_ir_version_of_the_future_is_unsupported(graph_of: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedBundleError, match="IR version"):
        opened(graph_of(ir_version=99))


def test_opset_of_the_future_is_unsupported(graph_of: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedBundleError, match="opset"):
        opened(graph_of(opset=999))


@pytest.mark.parametrize(
    ("feeds", "found"),
    [
        ({"image": np.zeros((1, 2), dtype=np.float32)}, r"image float32\[1, 2\]"),
        ({"x": np.zeros((1, 3), dtype=np.float32)}, r"x float32\[1, 3\]"),
        ({"x": np.zeros((1, 2, 1), dtype=np.float32)}, r"x float32\[1, 2, 1\]"),
        ({"x": np.zeros((1, 2))}, r"x float64\[1, 2\]"),
        ({"x": np.zeros((1, 2), dtype=np.float32), "extra": np.zeros(1)}, r"x float32\[1, 2\], extra float64\[1\]"),
        ({}, ""),
    ],
)
def test_wrong_feed_is_an_input_error_with_expected_and_found(graph_of: Callable[..., Path], feeds: dict[str, np.ndarray], found: str) -> None:
    with pytest.raises(InputError, match=rf"expected x float32\['batch', 2\], found {found}"):
        opened(graph_of()).run(feeds)


@pytest.mark.parametrize("backend", ["snpe", "rknn", "ONNXRUNTIME"])
def test_backend_without_a_session_is_unsupported_and_named(foreign: Path, backend: str) -> None:
    path = foreign / "deploy.json"
    path.write_text(path.read_text().replace('"onnxruntime"', f'"{backend}"'))
    with pytest.raises(UnsupportedBundleError, match=f"backend: expected one of .*onnxruntime.*, found '{backend}'") as caught:
        PoseDetector(foreign)
    assert "modelcrate convert" in caught.value.hint


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_are_what_was_asked_for(pose_bundle: Path, scene: tuple[np.ndarray, np.ndarray], threads: int) -> None:
    with PoseDetector(pose_bundle, threads=threads) as pose, PoseDetector(pose_bundle) as usual:
        assert pose.session.threads == threads
        np.testing.assert_allclose(pose(*scene), usual(*scene), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity: Linux")
def test_threads_default_to_the_cores_that_the_process_may_use(graph_of: Callable[..., Path]) -> None:
    path = graph_of()
    cores = os.sched_getaffinity(0)
    assert opened(path).threads == len(cores)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert opened(path).threads == 1
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(("threads", "streams", "expected"), [(1, None, 1), (2, None, 2), (4, 2, 2), (2, 8, 2), (2, 1, 1)])
def test_streams_share_the_threads(graph_of: Callable[..., Path], threads: int, streams: int | None, expected: int) -> None:
    session = opened(graph_of(), SessionOptions(threads=threads, streams=streams))
    assert session.streams == expected
    x = np.array([[-1, 2], [3, -4]], dtype=np.float32)
    np.testing.assert_array_equal(session.run_beside({"x": x})["y"], session.run({"x": x})["y"])
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run_beside({"x": x})


@pytest.mark.parametrize("option", ["threads", "streams"])
def test_no_threads_and_no_streams_are_errors(graph_of: Callable[..., Path], option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: expected at least 1, found 0"):
        opened(graph_of(), SessionOptions(**{option: 0}))


def test_the_second_network_is_never_another_file(graph_of: Callable[..., Path]) -> None:
    """A bundle that is rebuilt while it is in use must not answer with two networks."""
    path = graph_of()
    session = opened(path, SessionOptions(threads=2))
    graph_of("Neg")
    with pytest.raises(BundleIntegrityError, match=r"net\.onnx: expected the file that was loaded, found another one"):
        session.run_beside({"x": np.ones((1, 2), dtype=np.float32)})
    np.testing.assert_array_equal(session.run({"x": np.ones((1, 2), dtype=np.float32)})["y"], [[1, 1]])


def test_table_of_backends_says_how_to_install() -> None:
    backend = BACKENDS["onnxruntime"]
    assert backend.is_installed
    assert backend.install_command == "pip install 'modelcrate[onnxruntime]'"
