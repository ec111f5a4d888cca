"""OpenVINO: computes in the precision that was asked for, converts nothing silently, keeps no file open that may change, and reports to nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modelcrate_bundle import Bundle
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, MissingBackendError, ModelcrateError, OutputError, UnsupportedBundleError
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.sessions import Session, SessionOptions, open_artefact, open_session

ov = pytest.importorskip("openvino", reason="needs openvino: pip install 'modelcrate[openvino]'")

SIZE = 48
PATHS = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("sdk_bundle", "runtimes"))
CI = {"CI", "TF_BUILD", "JENKINS_URL"}
"""With one of them OpenVINO keeps quiet by itself; users have none of them."""
X = np.random.default_rng(0).standard_normal((5, SIZE)).astype(np.float32)


def weights(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((SIZE, SIZE)) * np.sqrt(2 / SIZE)).astype(np.float32) for _ in range(3)]


def expected(x: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """The network in float64."""
    y = x.astype(np.float64)
    for weight in weights(seed):
        y = np.maximum(y @ weight, 0)
    return y


def relative(found: np.ndarray, seed: int = 0, *, x: np.ndarray = X) -> float:
    exact = expected(x, seed=seed)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@pytest.fixture
def ir_of(tmp_path: Path) -> Callable[..., Path]:
    """Write an IR of three layers from `x` (batch, 48) to `y`, both float32; returns its .xml."""

    def make(seed: int = 0, *, shape: object = (-1, SIZE), name: str = "net") -> Path:
        from openvino import opset13 as ops

        x = y = ops.parameter(ov.PartialShape(shape), np.float32, name="x")
        x.output(0).set_names({"x"})
        for weight in weights(seed):
            y = ops.relu(ops.matmul(y, ops.constant(weight), transpose_a=False, transpose_b=False))
        y.output(0).set_names({"y"})
        path = tmp_path / name / "end2end.xml"
        path.parent.mkdir(exist_ok=True)
        ov.save_model(ov.Model([ops.result(y)], [x], "toy"), str(path), compress_to_fp16=False)
        return path

    return make


@pytest.fixture
def ir(ir_of: Callable[..., Path]) -> Path:
    return ir_of()


def opened(path: Path, **options: object) -> Session:
    return open_artefact("openvino", {"net": path, "weights": path.with_suffix(".bin")}, SessionOptions(**options), where="bundle")


def run(code: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    """Run code in a new interpreter; returns what it prints."""
    env = {key: value for key, value in os.environ.items() if key not in CI} | {"PYTHONPATH": PATHS} | (environment or {})
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------------- precision


def test_f32_is_f32_where_openvino_would_choose_otherwise(ir: Path) -> None:
    session = opened(ir)
    assert session.precision == "f32"
    assert relative(session.run({"x": X})["y"]) < 1e-6
    core = ov.Core()
    left_alone = core.compile_model(core.read_model(str(ir)), "CPU")
    chosen = left_alone.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen == "f32":
        pytest.skip("OpenVINO chooses f32 by itself on this CPU")
    assert relative(left_alone({"x": X})["y"]) > 1e-4


@pytest.mark.parametrize(("precision", "computed"), [("fp32", "f32"), ("fp16", "f32"), ("int8", "f32"), (None, "f32")])
def test_the_floating_point_operators_of_every_precision_but_bf16_compute_in_f32(ir: Path, precision: str | None, computed: str) -> None:
    session = opened(ir, precision=precision)
    assert session.precision == computed
    assert relative(session.run({"x": X})["y"]) < 1e-6
    assert relative(session.run_beside({"x": X})["y"]) < 1e-6


def test_bf16_is_bf16_or_an_error(ir: Path) -> None:
    """In both networks, the wide one and the one of `run_beside`."""
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(MissingBackendError, match=r"end2end\.xml: expected to compute in bf16, found that CPU computes in f32 here"):
            opened(ir, precision="bf16")
        pytest.skip("this CPU has no bfloat16: it is refused, and there is nothing to compute with")
    session = opened(ir, precision="bf16", threads=2)
    assert session.precision == "bf16"
    for call in (session.run, session.run_beside):
        assert 1e-4 < relative(call({"x": X})["y"]) < 5e-2


def test_unknown_precision_is_unsupported(ir: Path) -> None:
    with pytest.raises(UnsupportedBundleError, match="precision: expected one of fp32, bf16, fp16, int8, found 'fp64'"):
        opened(ir, precision="fp64")


@pytest.mark.parametrize(("stated", "asked", "computed"), [("FP32", None, "f32"), ("BF16", None, "bf16"), ("BF16", "fp32", "f32")])
def test_a_bundle_without_manifest_states_its_precision_in_deploy_json(
    pose_bundle: Path, ir: Path, tmp_path: Path, stated: str, asked: str | None, computed: str
) -> None:
    if computed == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in (pose_bundle / "pipeline.json", pose_bundle / "detail.json", ir, ir.with_suffix(".bin")):
        shutil.copy(path, folder)
    deploy = json.loads((pose_bundle / "deploy.json").read_text())
    deploy["models"][0] |= {"backend": "openvino", "net": "end2end.xml", "weights": "end2end.bin", "precision": stated}
    (folder / "deploy.json").write_text(json.dumps(deploy))
    session = open_session(Bundle.open(folder), SessionOptions(precision=asked))
    assert session.precision == computed


# ------------------------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_a_device_that_is_not_there_is_never_replaced(ir: Path, device: str) -> None:
    if any(name.startswith(device.upper()) for name in ov.Core().available_devices):
        pytest.skip(f"OpenVINO has a {device} here")
    with pytest.raises(MissingBackendError, match=f"expected the device {device.upper()}, found .*CPU") as caught:
        opened(ir, device=device)
    assert caught.value.hint


@pytest.mark.parametrize("device", ["cuda", "CPU", "AUTO"])
def test_unknown_device_is_an_error_with_the_known_ones(ir: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: expected one of cpu, gpu, npu for OpenVINO, found '{device}'"):
        opened(ir, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ("CPUExecutionProvider",)}, "providers: expected none for OpenVINO"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"streams": 0}, "streams: expected at least 1, found 0"),
        ({"threads": -2}, "threads: expected at least 1, found -2"),
    ],
)
def test_options_that_mean_nothing_are_errors(ir: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(ir, **options)


def test_threads_default_to_the_cores_that_the_process_may_use(ir: Path) -> None:
    assert opened(ir).threads == usable_cores()
    assert opened(ir, threads=3).threads == 3


# ------------------------------------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize("content", [b"", b"not a network", b"<net/>", b"\xff\xfe\x00" * 50, b'<?xml version="1.0"?>\n<net name="x" version="11"><layers>'])
def test_broken_xml_is_an_integrity_error_with_its_path(ir: Path, content: bytes) -> None:
    ir.write_bytes(content)
    refused(ir)


def test_truncated_xml_is_an_integrity_error(ir: Path) -> None:
    ir.write_bytes(ir.read_bytes()[: ir.stat().st_size // 2])
    refused(ir)


def test_unknown_operator_is_named(ir: Path) -> None:
    ir.write_text(ir.read_text().replace('type="MatMul"', 'type="MatMuddle"'))
    assert "MatMuddle" in refused(ir)


def test_missing_xml_is_an_integrity_error(ir: Path) -> None:
    ir.unlink()
    refused(ir)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9999])
def test_truncated_weights_are_an_integrity_error(ir: Path, share: float) -> None:
    path = ir.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(ir)


@pytest.mark.parametrize("is_named", [True, False])
def test_missing_weights_are_an_integrity_error(ir: Path, is_named: bool) -> None:
    ir.with_suffix(".bin").unlink()
    if is_named:
        assert "end2end.bin" in refused(ir)
    else:
        with pytest.raises(BundleIntegrityError, match=r"end2end\.xml"):
            open_artefact("openvino", {"net": ir}, SessionOptions(), where="bundle")


def refused(ir: Path) -> str:
    """Opening is refused in one line that has the file; returns it."""
    with pytest.raises(BundleIntegrityError, match=r"end2end\.xml: expected an OpenVINO IR, found: \S") as caught:
        opened(ir)
    assert str(ir) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "copy the bundle again" in caught.value.hint
    return str(caught.value)


def test_a_network_of_any_rank_is_unsupported(tmp_path: Path) -> None:
    from openvino import opset13 as ops

    x = ops.parameter([-1, SIZE], np.float32, name="x")
    pattern = ops.parameter([-1], np.int64, name="pattern")
    y = ops.reshape(x, pattern, special_zero=False)
    for node, name in ((x, "x"), (pattern, "pattern"), (y, "y")):
        node.output(0).set_names({name})
    ov.save_model(ov.Model([ops.result(y)], [x, pattern], "any"), str(tmp_path / "any.xml"))
    with pytest.raises(UnsupportedBundleError, match=r"any\.xml: .*(dynamic rank|y: expected a fixed number of axes, found any)"):
        opened(tmp_path / "any.xml")


# ------------------------------------------------------------------------------------------------------------------------ feeds


@pytest.mark.parametrize(
    ("feeds", "found"),
    [
        ({"image": X}, r"image float32\[5, 48\]"),
        ({"x": X[:, :-1]}, r"x float32\[5, 47\]"),
        ({"x": X[:, :, None]}, r"x float32\[5, 48, 1\]"),
        ({"x": X[0]}, r"x float32\[48\]"),
        ({"x": np.float32(1)[...]}, r"x float32\[\]"),
        ({"x": X.astype(np.float64)}, r"x float64\[5, 48\]"),
        ({"x": X.astype(np.float16)}, r"x float16\[5, 48\]"),
        ({"x": X.astype(np.int32)}, r"x int32\[5, 48\]"),
        ({"x": X.astype(">f4")}, r"x >f4\[5, 48\]"),
        ({"x": X, "extra": X}, r"x float32\[5, 48\], extra float32\[5, 48\]"),
        ({}, "nothing"),
    ],
)
def test_wrong_feed_is_an_input_error_with_expected_and_found(ir: Path, feeds: dict[str, np.ndarray], found: str) -> None:
    session = opened(ir, threads=2)
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match=rf"openvino: expected x float32\['batch', 48\], found ({found})$"):
            call(feeds)
        assert relative(call({"x": X})["y"]) < 1e-6


@pytest.mark.parametrize("call", ["run", "run_beside"])
def test_outputs_are_the_callers(ir: Path, call: str) -> None:
    """They neither change when the session runs again, nor change what it answers when they are written to."""
    session = opened(ir, threads=2)
    first = getattr(session, call)({"x": X})["y"]
    kept = first.copy()
    other = getattr(session, call)({"x": -X})["y"]
    np.testing.assert_array_equal(first, kept)
    assert relative(other, x=-X) < 1e-6
    first[:] = np.nan
    np.testing.assert_array_equal(getattr(session, call)({"x": X})["y"], kept)
    session.close()
    assert relative(other, x=-X) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(("threads", "streams", "number"), [(1, None, 1), (2, None, 2), (4, 2, 2), (2, 8, 2), (2, 1, 1)])
def test_streams_share_the_threads(ir: Path, threads: int, streams: int | None, number: int) -> None:
    session = opened(ir, threads=threads, streams=streams)
    assert (session.threads, session.streams) == (threads, number)
    assert relative(session.run_beside({"x": X})["y"]) < 1e-6


def test_a_fixed_batch_does_not_split(ir_of: Callable[..., Path]) -> None:
    session = opened(ir_of(shape=(5, SIZE)), threads=2)
    assert session.streams == 1
    assert session.inputs[0].shape == (5, SIZE)
    assert relative(session.run_beside({"x": X})["y"]) < 1e-6
    with pytest.raises(InputError, match=r"expected x float32\[5, 48\], found x float32\[4, 48\]"):
        session.run({"x": X[:4]})


def test_calls_beside_each_other_answer_as_one_call_does(ir: Path) -> None:
    """From more threads than there are streams, with other batches, and with `run` among them."""
    session = opened(ir, threads=2)
    batches = [np.random.default_rng(i).standard_normal((1 + i % 3, SIZE)).astype(np.float32) for i in range(6)]
    alone = [session.run({"x": batch})["y"] for batch in batches]
    barrier = threading.Barrier(6)

    def work(i: int) -> list[np.ndarray]:
        barrier.wait()
        call = session.run if i == 5 else session.run_beside
        return [call({"x": batches[(i + k) % 6]})["y"] for k in range(30)]

    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(work, range(6))):
            for k, value in enumerate(found):
                np.testing.assert_allclose(value, alone[(i + k) % 6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_closed_session_says_so(ir: Path, threads: int) -> None:
    session = opened(ir, threads=threads)
    session.run_beside({"x": X})
    session.close()
    session.close()
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match="openvino: expected an open session, found a closed one"):
            call({"x": X})


def test_files_that_change_under_an_open_session_change_nothing(ir_of: Callable[..., Path]) -> None:
    """A mapped file would be another network at the next compilation, or the end of the process: hence a process of its own."""
    code = """
import sys
from pathlib import Path
import numpy as np
from modelcrate_runtime.sessions import SessionOptions, open_artefact
path, other = Path(sys.argv[1]), Path(sys.argv[2])
x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
kept = path.read_bytes()
for content in (other.read_bytes(), b""):
    path.write_bytes(kept)
    session = open_artefact("openvino", {"net": path.with_suffix(".xml"), "weights": path}, SessionOptions(threads=2), where="bundle")
    before = session.run({"x": x})["y"]
    path.write_bytes(content)
    assert np.abs(session.run({"x": x})["y"] - before).max() < 1e-5, "run"
    assert np.abs(session.run_beside({"x": x})["y"] - before).max() < 1e-5, "run_beside"
print("same")
"""
    paths = [ir_of(seed, name=f"net{seed}").with_suffix(".bin") for seed in (0, 1)]
    assert run(code, *paths) == "same"


# ------------------------------------------------------------------------------------------------------------------------ cache


def test_compiled_networks_are_kept_and_found_again(ir: Path, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "cache"
    opened(ir, cache_dir=cache).close()
    kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert kept
    session = opened(ir, cache_dir=cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == kept
    assert session.precision == "f32"
    assert relative(session.run({"x": X})["y"]) < 1e-6


def test_without_a_cache_nothing_is_kept(ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    opened(ir).run({"x": X})
    assert sorted(tmp_path.rglob("*")) == before


def test_the_cache_keeps_precisions_apart(ir: Path, tmp_path: Path) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    for precision, low, high in (("fp32", -1, 1e-6), ("bf16", 1e-4, 5e-2), ("fp32", -1, 1e-6)):
        session = opened(ir, cache_dir=tmp_path / "cache", precision=precision)
        assert low < relative(session.run({"x": X})["y"]) < high


def test_the_cache_never_answers_for_other_weights(ir_of: Callable[..., Path], tmp_path: Path) -> None:
    """Converted again into its place, within the resolution of the file's time."""
    ir = ir_of(0)
    opened(ir, cache_dir=tmp_path / "cache").close()
    times = [(path, path.stat()) for path in (ir, ir.with_suffix(".bin"))]
    ir_of(1)
    for path, status in times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    session = opened(ir, cache_dir=tmp_path / "cache")
    assert relative(session.run({"x": X})["y"], seed=1) < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_damaged_cache_is_made_again(ir: Path, tmp_path: Path, share: float) -> None:
    cache = tmp_path / "cache"
    opened(ir, cache_dir=cache).close()
    (blob,) = cache.iterdir()
    blob.write_bytes(blob.read_bytes()[: int(blob.stat().st_size * share)])
    assert relative(opened(ir, cache_dir=cache).run({"x": X})["y"]) < 1e-6


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_is_an_output_error(ir: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in its place")
    with pytest.raises(OutputError, match=r"file.*: expected a folder for compiled networks, found: ") as caught:
        opened(ir, cache_dir=tmp_path / "file" / below)
    assert isinstance(caught.value, ModelcrateError)
    assert (tmp_path / "file").read_text() == "in its place"


# ---------------------------------------------------------------------------------------------------------------------- silence


TRAP = """
import socket, sys
log = open(sys.argv[1], "a", buffering=1)  # also from processes that are forked

def trapped(name):
    def call(*arguments, **options):
        log.write(f"{name} {arguments}\\n")
        raise OSError("there is no network here")
    return call

socket.socket.connect = trapped("connect")
socket.getaddrinfo = trapped("getaddrinfo")
"""


def test_the_trap_catches_a_report_from_a_forked_process(tmp_path: Path) -> None:
    code = f"""{TRAP}
import multiprocessing, urllib.request

def report():
    try:
        urllib.request.urlopen("https://example.invalid/")
    except OSError:
        pass

process = multiprocessing.get_context("fork").Process(target=report)
process.start()
process.join()
"""
    run(code, tmp_path / "log")
    assert "example.invalid" in (tmp_path / "log").read_text()


def test_nothing_is_reported_and_nobody_is_remembered(ir: Path, tmp_path: Path) -> None:
    """OpenVINO reports its import, with an identifier that it keeps in the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"""{TRAP}
from pathlib import Path
import numpy as np
from modelcrate_runtime.sessions import SessionOptions, open_artefact
net = Path(sys.argv[2])
session = open_artefact("openvino", {{"net": net, "weights": net.with_suffix(".bin")}}, SessionOptions(threads=2), where="bundle")
x = np.zeros((2, 48), dtype=np.float32)
session.run({{"x": x}})
session.run_beside({{"x": x}})
session.close()
assert "openvino" in sys.modules
print([name for name, module in sys.modules.items() if module is not None and name.partition(".")[0] in {{"openvino_telemetry", "nncf", "torch", "onnx"}}])
"""
    assert run(code, tmp_path / "log", ir, environment={"HOME": str(home), "USERPROFILE": str(home)}) == "[]"
    assert (tmp_path / "log").read_text() == ""
    assert list(home.iterdir()) == []
