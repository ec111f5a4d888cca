"""Deploy configs: what comes along loads, what is wrong is refused with the file and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelcrate_bundle.errors import ConfigError
from modelcrate_converter.builders import BUILDERS, check_can_build
from modelcrate_converter.config import CONFIG_FOLDER, Batch, DeployConfig, Gates, NmsOptions, OnnxOptions, load_config, target_names

MINIMAL = 'backend = "onnxruntime"\nprecision = "fp32"\n'


def written(folder: Path, text: str, *, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("target", target_names())
def test_every_target_loads_under_its_name_and_has_a_builder(target: str) -> None:
    config = load_config(target)
    assert config.target == target
    assert config.backend in BUILDERS


def test_targets_are_the_files_at_the_top_of_the_repository() -> None:
    assert Path(__file__).parents[2] / "deploy_configs" == CONFIG_FOLDER
    assert target_names() == sorted(path.stem for path in CONFIG_FOLDER.glob("*.toml"))
    assert "onnxruntime" in target_names()


def test_the_onnxruntime_target_writes_the_defaults_out() -> None:
    """The file is where people look defaults up: it must not drift from the code."""
    expected = DeployConfig(target="onnxruntime", backend="onnxruntime", precision="fp32", gates=Gates(ap_drop=0.05))
    assert load_config("onnxruntime") == expected, "a gate for AP is what targets have and code alone does not"


@pytest.mark.parametrize("typo", ["onnxruntim", "onxruntime", "ONNXRuntime", "onnx-runtime", "ort"])
def test_an_unknown_target_gets_the_nearest_name(typo: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(typo)
    assert repr(typo) in str(caught.value)
    assert "onnxruntime" in str(caught.value)
    assert "did you mean" in caught.value.hint
    assert "onnxruntime" in caught.value.hint


def test_the_empty_target_is_unknown() -> None:
    with pytest.raises(ConfigError, match="found ''"):
        load_config("")


def test_ones_own_file_is_a_target_named_by_the_file(tmp_path: Path) -> None:
    text = MINIMAL + "[batch]\nmin = 2\nopt = 4\nmax = 6\n[onnx]\nexporter = 'dynamo'\nopset = 18\nsimplify = false\n"
    text += "[nms]\nwhere = 'runtime'\npre_top_k = 10\n[gates]\nkeypoint_px = 0.5\n"
    config = load_config(str(written(tmp_path, text)))
    assert config == DeployConfig(
        target="mine", backend="onnxruntime", precision="fp32", batch=Batch(min=2, opt=4, max=6), onnx=OnnxOptions(exporter="dynamo", opset=18, simplify=False),
        nms=NmsOptions(where="runtime", pre_top_k=10), gates=Gates(keypoint_px=0.5),
    )  # fmt: skip


def test_a_relative_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.toml").target == "mine"
    assert load_config("./mine.toml").target == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "colour = 1\n", ("colour",)),
        (MINIMAL + "[batch]\nminimum = 1\n", ("minimum", "batch")),
        (MINIMAL + "[gates]\nkeypoint = 1\n", ("keypoint", "gates")),
        (MINIMAL + "[batch]\nmin = 'one'\n", ("int", "batch.min")),
        (MINIMAL + "[batch]\nmin = 1.5\n", ("int", "batch.min")),
        (MINIMAL + "[onnx]\nsimplify = 1\n", ("bool", "onnx.simplify")),
        (MINIMAL + "[onnx]\nexporter = 'tensorflow'\n", ("onnx.exporter",)),
        (MINIMAL + "[nms]\nwhere = 'nowhere'\n", ("nms.where",)),
        (MINIMAL + "batch = 3\n", ("batch",)),
        ('backend = "onnxruntime"\nprecision = "fp64"\n', ("precision", "fp64")),
        ('backend = "onnxruntime"\n', ("precision",)),
        ('precision = "fp32"\n', ("backend",)),
        ("", ("backend",)),
        ("backend = \n", ("line 1",)),
        (MINIMAL + "[batch]\nmin = 5\nopt = 8\nmax = 4\n", ("min <= opt <= max", "5, 8, 4")),
        (MINIMAL + "[batch]\nmin = 9\n", ("min <= opt <= max", "9, 8, 32")),
        (MINIMAL + "[batch]\nopt = 64\n", ("min <= opt <= max", "1, 64, 32")),
        (MINIMAL + "[batch]\nmin = 0\n", ("1 <= min", "0, 8, 32")),
    ],
    ids=lambda value: value.removeprefix(MINIMAL).replace("\n", " ") if isinstance(value, str) else "",
)
def test_a_config_that_is_wrong_is_refused_with_its_file_and_place(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[nms]\npre_top_k = 0\n",
        "[nms]\npre_top_k = -5\n",
        "[onnx]\nopset = 3\n",
        "[onnx]\nopset = 99\n",
        "[gates]\nkeypoint_px = -1.0\n",
        "[gates]\nrelative_linf = nan\n",
        "[gates]\nlabel_flips = -1\n",
    ],
    ids=lambda value: value.replace("\n", " "),
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path: Path, text: str) -> None:
    """They would fail after minutes, or pass where nothing can fail."""
    path = written(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        load_config(str(tmp_path / "gone.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml"):
        load_config(str(tmp_path / "folder.toml"))
    (tmp_path / "latin.toml").write_bytes(b"backend = '\xe9'\n")
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load_config(str(tmp_path / "latin.toml"))


def test_a_backend_without_a_builder_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    config = load_config(str(written(tmp_path, 'backend = "abacus"\nprecision = "fp32"\n')))
    with pytest.raises(ConfigError, match="expected one of .*onnxruntime.*found 'abacus'"):
        check_can_build(config.backend)
