"""ncnn: one sample per call, in float32 arithmetic; whatever it cannot do is said before it does something else."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, InputError, UnsupportedBundleError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.sessions import Session, SessionOptions, open_artefact

ncnn = pytest.importorskip("ncnn", reason="needs ncnn: pip install 'modelcrate[ncnn]'")

PATHS = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("sdk_bundle", "runtimes"))
INPUT = "Input image 0 1 image 0=8 1=4 2=3"
CONVOLUTION = "Convolution conv 1 1 image mid 0=5 1=1 5=1 6=15"
BRANCHES = ["Split split 1 2 mid mid_0 mid_1", "ReLU relu 1 1 mid_0 positive", "UnaryOp neg 1 1 mid_1 negative 0=1"]
NET = [INPUT, CONVOLUTION, *BRANCHES]
"""(1, 3, 4, 8) `image` to a 1x1 convolution of five channels: its positive part and its negative, both (1, 5, 4, 8)."""
WEIGHT, BIAS = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32), np.random.default_rng(2).standard_normal(5).astype(np.float32)
X = np.random.default_rng(0).standard_normal((1, 3, 4, 8)).astype(np.float32)


def expected(x: np.ndarray) -> dict[str, np.ndarray]:
    mid = np.einsum("oc,nchw->nohw", WEIGHT.astype(np.float64), x) + BIAS[:, None, None]
    return {"positive": np.maximum(mid, 0), "negative": -mid}


def assert_right(found: dict[str, np.ndarray], x: np.ndarray = X, *, within: float = 1e-5) -> None:
    assert set(found) == {"positive", "negative"}
    for name, value in expected(x).items():
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=0, atol=within)


def param(*layers: str, counts: str | None = None) -> str:
    blobs = {blob for layer in layers for blob in layer.split()[4 : 4 + int(layer.split()[2]) + int(layer.split()[3])]} if counts is None else set()
    return "\n".join(["7767517", counts or f"{len(layers)} {len(blobs)}", *layers]) + "\n"


@pytest.fixture
def net_of(tmp_path: Path) -> Callable[..., Path]:
    """Write a network; returns its .param."""

    def make(text: str, *, weights: bytes = b"") -> Path:
        path = tmp_path / "end2end.param"
        path.write_text(text)
        path.with_suffix(".bin").write_bytes(weights)
        return path

    return make


@pytest.fixture
def net(net_of: Callable[..., Path]) -> Path:
    return net_of(param(*NET), weights=struct.pack("<I", 0) + WEIGHT.tobytes() + BIAS.tobytes())  # 0 before weights says float32


def opened(path: Path, **options: object) -> Session:
    return open_artefact("ncnn", {"net": path, "weights": path.with_suffix(".bin")}, SessionOptions(**options), where="bundle")


def run(code: str, *arguments: object) -> str:
    """Run code in a new interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout} {done.stderr}"
    return done.stdout.strip()


def test_it_computes_the_network_with_a_batch_axis_of_one(net: Path) -> None:
    session = opened(net)
    assert session.inputs == (TensorSpec(name="image", dtype="float32", shape=(1, 3, 4, 8)),)
    assert {spec.name: (spec.dtype, spec.shape) for spec in session.outputs} == {name: ("float32", (1, 5, 4, 8)) for name in ("positive", "negative")}
    assert_right(session.run({"image": X}))


def test_several_inputs_go_where_their_names_say(net_of: Callable[..., Path]) -> None:
    session = opened(net_of(param("Input b 0 1 b 0=8 1=4 2=3", "Input a 0 1 a 0=8 1=4 2=3", "BinaryOp sub 2 1 a b y 0=1")))
    assert [spec.name for spec in session.inputs] == ["b", "a"]
    np.testing.assert_allclose(session.run({"a": X, "b": 3 * X})["y"], -2 * X, rtol=1e-6)
    with pytest.raises(InputError, match=r"expected b float32\[1, 3, 4, 8\], a float32\[1, 3, 4, 8\], found a float32\[1, 3, 4, 8\]$"):
        session.run({"a": X})


# ------------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", [None, "fp32", "int8"])
def test_floating_point_layers_compute_in_float32(net: Path, precision: str | None) -> None:
    assert_right(opened(net, precision=precision).run({"image": X}), within=2e-6)


def test_fp16_is_what_weights_are_kept_in_and_not_what_is_computed_in(net_of: Callable[..., Path]) -> None:
    """A sum that float16 does not hold: 32 times 30 000."""
    if not (ncnn.cpu_support_x86_avx2() or ncnn.cpu_support_arm_asimdhp()):
        pytest.skip("ncnn keeps float32 on this CPU")
    weight = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    weight[0] = 300
    text = param(INPUT, "InnerProduct fc 1 1 image y 0=5 1=0 2=480")
    x = np.concatenate([X[:, :2], np.full_like(X[:, 2:], 100)], axis=1)
    exact = weight.astype(np.float64) @ x.ravel()
    differences = {}
    for precision in ("fp32", "fp16"):
        found = opened(net_of(text, weights=struct.pack("<I", 0) + weight.tobytes()), precision=precision).run({"image": x})["y"].ravel()
        assert found[0] > 65504
        differences[precision] = float(np.abs(found[1:] - exact[1:]).max() / np.abs(exact[1:]).max())
    assert differences["fp32"] < 1e-6
    assert 1e-5 < differences["fp16"] < 1e-2


@pytest.mark.parametrize("precision", ["bf16", "fp64", "FP32"])
def test_a_precision_that_ncnn_is_not_right_in_is_unsupported(net: Path, precision: str) -> None:
    with pytest.raises(UnsupportedBundleError, match=rf"end2end\.param: precision: expected one of fp32, fp16, int8, found '{precision}'"):
        opened(net, precision=precision)


# ----------------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("device", ["gpu", "cuda", "vulkan", "CPU"])
def test_there_is_one_device(net: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: expected cpu for ncnn, found '{device}'"):
        opened(net, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": ("CPUExecutionProvider",)}, "providers: expected none for ncnn"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"streams": 0}, "streams: expected at least 1, found 0"),
    ],
)
def test_options_that_mean_nothing_are_errors(net: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(net, **options)


def test_threads_are_what_was_asked_for_and_streams_one(net: Path) -> None:
    assert opened(net).threads == usable_cores()
    for threads in (1, 3):
        session = opened(net, threads=threads, streams=4)
        assert (session.threads, session.streams) == (threads, 1)
        assert_right(session.run_beside({"image": X}))


# ----------------------------------------------------------------------------------------------------------------- broken files


def refused(path: Path, message: str, error: type[Exception] = BundleIntegrityError) -> None:
    """Opening is refused in one line that has the file, what is wrong and what to do."""
    with pytest.raises(error, match=message) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"garbage\n" * 20, b"\xff\xfe\x00" * 50, b"7767518" + param(*NET).encode()[7:], b"\n" + param(*NET).encode()])
def test_a_file_without_the_magic_number_is_no_param(net: Path, content: bytes) -> None:
    net.write_bytes(content)
    refused(net, r"end2end\.param: expected an ncnn \.param file")


def test_a_missing_param_is_an_integrity_error(net: Path) -> None:
    net.unlink()
    refused(net, r"end2end\.param: expected an ncnn \.param file, found: .*No such file")


@pytest.mark.parametrize(
    "text",
    [
        "7767517\n",
        "7767517\nwhat is this\n",
        param(*NET)[: len(param(*NET)) * 2 // 3],
        param(*NET, counts="-1 -1"),
        param(*NET, counts="999 999"),
        param(INPUT, CONVOLUTION.replace("Convolution", "Convoluted"), *BRANCHES),
        param(INPUT, "pnnx.Expression conv 1 1 image mid", *BRANCHES),
    ],
    ids=["magic alone", "garbage behind it", "truncated", "negative counts", "too few layers", "unknown layer", "pnnx's own layer"],
)
def test_a_network_that_ncnn_does_not_load_is_an_integrity_error(net: Path, text: str) -> None:
    net.write_text(text)
    refused(net, rf"end2end\.param: expected a network that ncnn {ncnn.__version__} loads, found one that it refuses")


@pytest.mark.parametrize("sizes", ["", "0=8 1=4", "0=8 1=4 2=0", "0=-8 1=4 2=3", "0=8.0 1=4 2=3"])
def test_an_input_without_sizes_is_unsupported_and_named(net: Path, sizes: str) -> None:
    """MMDeploy writes none."""
    net.write_text(param(f"Input image 0 1 image {sizes}", *NET[1:]))
    refused(net, r"Input image: expected its width, height and channels \(0=, 1=, 2=\), found \[", UnsupportedBundleError)


@pytest.mark.parametrize("line", ["Input image x y image 0=8", "Input image 5 9 image", "Input image", "Input image 0 1 image width=8 1=4 2=3"])
def test_a_broken_line_of_an_input_is_an_integrity_error(net: Path, line: str) -> None:
    net.write_text(param(line, *NET[1:], counts="5 7"))
    refused(net, f"expected the line of a layer, found '{line}'")


@pytest.mark.parametrize(
    "layer",
    ["Crop crop 1 1 mid positive 0=100 1=100 3=5 4=5", "Reshape reshape 1 1 mid positive 0=-1 1=-1", "ReLU relu 1 1 nowhere positive"],
    ids=["outside", "of no size", "of nothing"],
)
def test_a_network_that_loads_and_does_not_run_is_an_integrity_error(net: Path, layer: str) -> None:
    net.write_text(param(INPUT, CONVOLUTION, layer, counts="3 5"))
    refused(net, r"end2end\.param: expected a network that runs, found: ")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_weights_are_an_integrity_error(net: Path, share: float) -> None:
    path = net.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(net, r"end2end\.param: expected a network that ncnn .* loads")


def test_missing_weights_are_an_integrity_error(net: Path) -> None:
    net.with_suffix(".bin").unlink()
    refused(net, r"end2end\.param: expected a network that ncnn .* loads")
    with pytest.raises(BundleIntegrityError, match=r"end2end\.param: expected a network that ncnn .* loads"):
        open_artefact("ncnn", {"net": net}, SessionOptions(), where="bundle")


# ------------------------------------------------------------------------------------------------------------------------ feeds


@pytest.mark.parametrize(
    ("feeds", "found"),
    [
        ({"input": X}, r"input float32\[1, 3, 4, 8\]"),
        ({"image": np.concatenate([X, X])}, r"image float32\[2, 3, 4, 8\]"),
        ({"image": X[:0]}, r"image float32\[0, 3, 4, 8\]"),
        ({"image": X[0]}, r"image float32\[3, 4, 8\]"),
        ({"image": X[:, :2]}, r"image float32\[1, 2, 4, 8\]"),
        ({"image": X.transpose(0, 1, 3, 2)}, r"image float32\[1, 3, 8, 4\]"),
        ({"image": X.astype(np.float64)}, r"image float64\[1, 3, 4, 8\]"),
        ({"image": X.astype(np.float16)}, r"image float16\[1, 3, 4, 8\]"),
        ({"image": X.astype(np.uint8)}, r"image uint8\[1, 3, 4, 8\]"),
        ({"image": X, "extra": X}, r"image float32\[1, 3, 4, 8\], extra float32\[1, 3, 4, 8\]"),
        ({}, "nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_wrong_feed_is_an_input_error_with_expected_and_found(net: Path, feeds: dict[str, np.ndarray], found: str) -> None:
    session = opened(net)
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match=rf"ncnn: expected image float32\[1, 3, 4, 8\], found {found}$") as caught:
            call(feeds)
        assert caught.value.hint == "ncnn takes one sample at a time"
        assert_right(call({"image": X}))


def test_outputs_are_the_callers(net: Path) -> None:
    """They neither change when the session runs again, nor change what it answers when they are written to; nor is ncnn's memory needed for them."""
    session = opened(net)
    first = session.run({"image": X})
    other = session.run({"image": -X})
    assert_right(first)
    for value in first.values():
        value[:] = np.nan
    assert_right(session.run({"image": X}))
    session.close()
    assert_right(other, -X)


def test_a_first_layer_that_works_in_place_neither_crashes_nor_writes_to_the_callers_array(tmp_path: Path) -> None:
    """It has crashed, hence a process of its own."""
    code = """
import sys
from pathlib import Path
import numpy as np
from modelcrate_runtime.sessions import SessionOptions, open_artefact
x = np.linspace(-2, 2, 96, dtype=np.float32).reshape(1, 3, 4, 8)
kept = x.copy()
net = Path(sys.argv[1])
net.with_suffix(".bin").write_bytes(b"")
for line, function in {
    "ReLU first 1 1 image y": lambda x: np.maximum(x, 0),
    "BinaryOp first 1 1 image y 0=2 1=1 2=0.5": lambda x: x * 0.5,
    "UnaryOp first 1 1 image y 0=0": np.abs,
    "Noop first 1 1 image y": lambda x: x,
}.items():
    print(line, flush=True)
    net.write_text(f"7767517\\n2 2\\nInput image 0 1 image 0=8 1=4 2=3\\n{line}\\n")
    session = open_artefact("ncnn", {"net": net, "weights": net.with_suffix(".bin")}, SessionOptions(), where="bundle")
    given = x.copy()
    found = session.run({"image": given})["y"]
    np.testing.assert_array_equal(given, kept)
    given[:] = 7
    np.testing.assert_allclose(found, function(kept), rtol=1e-6)
    session.close()
print("right")
"""
    assert run(code, tmp_path / "first.param").endswith("right")


def test_calls_from_several_threads_do_not_mix(net: Path) -> None:
    session = opened(net, threads=1)
    inputs = [np.random.default_rng(i).standard_normal(X.shape).astype(np.float32) for i in range(6)]
    alone = [session.run({"image": x}) for x in inputs]
    barrier = threading.Barrier(6)

    def work(i: int) -> list[dict[str, np.ndarray]]:
        barrier.wait()
        call = (session.run, session.run_beside)[i % 2]
        return [call({"image": inputs[(i + k) % 6]}) for k in range(40)]

    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(work, range(6))):
            for k, values in enumerate(found):
                for name in ("positive", "negative"):
                    np.testing.assert_array_equal(values[name], alone[(i + k) % 6][name])


def test_a_closed_session_says_so(net: Path) -> None:
    session = opened(net)
    session.close()
    session.close()
    for call in (session.run, session.run_beside):
        with pytest.raises(InputError, match="ncnn: expected an open session, found a closed one"):
            call({"image": X})


def test_files_that_change_under_an_open_session_change_nothing(net: Path) -> None:
    session = opened(net)
    net.with_suffix(".bin").write_bytes(b"")
    net.write_text("")
    assert_right(session.run({"image": X}))


def test_nothing_is_reported(net: Path, tmp_path: Path) -> None:
    code = """
import socket, sys
from pathlib import Path
log = Path(sys.argv[1])

def trapped(*arguments, **options):
    log.touch()
    raise OSError("there is no network here")

socket.socket.connect = socket.getaddrinfo = trapped
import numpy as np
from modelcrate_runtime.sessions import SessionOptions, open_artefact
net = Path(sys.argv[2])
session = open_artefact("ncnn", {"net": net, "weights": net.with_suffix(".bin")}, SessionOptions(), where="bundle")
session.run({"image": np.zeros((1, 3, 4, 8), dtype=np.float32)})
session.close()
print("caught" if log.exists() else "silent")
try:
    socket.create_connection(("localhost", 9))
except OSError:
    print("caught" if log.exists() else "silent")
"""
    assert run(code, tmp_path / "log", net).split() == ["silent", "caught"]
