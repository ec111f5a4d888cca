from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcrate_bundle.errors import ConfigError
from modelcrate_converter.mmconfig import ModelConfig, read_config_file, read_config_text
from modelcrate_converter.mmconfig_values import Unknown


def values_of(text: str) -> dict[str, Any]:
    return read_config_text(text, source="cfg").values


def value_of(expression: str) -> Any:
    return values_of(f"x = {expression}")["x"]


def read_files(folder: Path, files: dict[str, str], name: str = "child.py") -> ModelConfig:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return read_config_file(folder / name)


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda part: (
        st.lists(part, max_size=4) | st.lists(part, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=5), part, max_size=4)
    ),
    max_leaves=20,
)


@given(value=plain_data)
@settings(max_examples=60, deadline=None)
def test_a_literal_is_read_as_python_means_it(value: Any) -> None:
    assert value_of(repr(value)) == value


EXPRESSIONS = [
    "dict(a=1, **dict(b=(2, 3)))",
    "dict({'a': 1}, b=2)",
    "dict([('a', 1)])",
    "{**{'a': 1}, 'b': [*[1, 2], 3]}",
    "list((1, 2)) + [3] * 2",
    "tuple(range(2, 8, 3)) + (1, )",
    "[i * 2 for i in range(6) if i % 2 if i > 1]",
    "{k: v for k, v in dict(a=1, b=2).items()}",
    "[(a, b) for a in 'xy' for b in [1, 2]]",
    "sum(w for w in [0.5, 1.5]) / max(2, 4) - min([1, 2])",
    "(1 << 8) - 2 ** 10 // 3 % 7",
    "int(64 * 0.375), float('1e-3'), str(3), abs(-2), round(2.567, 1), len('abc'), bool([])",
    "f'{1}-{2.5:.2f}-{\"a\"!r:>5}'",
    "1 < 2 <= 2 and not 3 == 4",
    "0 or 'b' and None",
    "'yes' if 2 in (1, 2) else 'no'",
    "[1, 2, 3, 4][1:-1], 'abc'[::-1], dict(a=[5])['a'][0]",
    "'a' 'b' + 'c'",
    "float('inf')",
    "'A,b'.lower().split(',')",
    "{'a': 1}.get('z', 7)",
    "-1, +2, ~3, not None",
    "None is None",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_computed_as_python_computes_it(expression: str) -> None:
    assert value_of(expression) == eval(expression)  # the oracle: these are our own strings


def test_a_set_becomes_a_list_in_written_order() -> None:
    assert value_of("{3, 1, 3, 2}") == [3, 1, 2]
    assert value_of("{n % 2 for n in range(9)}") == [0, 1]


def test_statements_build_on_earlier_names() -> None:
    values = values_of(
        "codec = dict(type='SimCCLabel', input_size=(192, 256))\n"
        "model = dict(head=dict(in_featuremap_size=tuple([s // 32 for s in codec['input_size']]), decoder=codec))\n"
        "size, (ratio, *_) = 4, (1, 2, 3)\n"
        "a, b = c = 1, 2\n"
        "model['test_cfg'] = dict(flip_test=True)\n"
        "model.head.out_channels = 17\n"
        "model.head.update(dict(loss=dict(beta=10.)), input_size=codec['input_size'])\n"
        "pipeline = []\n"
        "alias = pipeline\n"
        "pipeline.append(dict(type='LoadImage'))\n"
        "pipeline.extend([dict(type='Pack')])\n"
        "pipeline += [dict(type='End')]\n"
        "size += 2\n"
        "removed = model.pop('test_cfg')\n"
        "lr: float = 4e-3\n"
    )
    assert values["model"]["head"] == {
        "in_featuremap_size": (6, 8),
        "decoder": {"type": "SimCCLabel", "input_size": (192, 256)},
        "out_channels": 17,
        "loss": {"beta": 10.0},
        "input_size": (192, 256),
    }
    assert "test_cfg" not in values["model"]
    assert values["removed"] == {"flip_test": True}
    assert [step["type"] for step in values["alias"]] == ["LoadImage", "Pack", "End"]
    assert (values["a"], values["b"], values["c"], values["size"], values["lr"]) == (1, 2, (1, 2), 6, 4e-3)
    assert isinstance(values["ratio"], Unknown)


def test_simple_branches_and_loops_run() -> None:
    values = values_of(
        "n = 3\nif n > 2:\n  stages = []\n  for i in range(n):\n    stages.append(i)\nelse:\n  stages = None\n"
        "for k, v in dict(a=1).items():\n  last = k + str(v)\nelse:\n  done = True\n"
    )
    assert (values["stages"], values["last"], values["done"]) == ([0, 1, 2], "a1", True)


@pytest.mark.parametrize(
    "statement",
    [
        "if cuda():\n  x = 2\nelse:\n  x = 3",
        "while True:\n  x = 2",
        "for i in [1, 2]:\n  x = i\n  break",
        "for x in devices():\n  pass",
        "try:\n  x = load()\nexcept Exception:\n  x = 3",
        "with open('f') as x:\n  pass",
        "x += unknown()",
        "x, y = pair()",
        "del x",
    ],
)
def test_a_statement_that_cannot_be_followed_makes_its_names_unknown(statement: str) -> None:
    values = values_of(f"x = 1\n{statement}\nafter = 5\n")
    assert isinstance(values["x"], Unknown)
    assert values["after"] == 5


@pytest.mark.parametrize(
    "change", ["x.sort()", "x.insert(f(), 1)", "x.extend(f())", "x[f()] = 1", "x[0:1] = [7]", "x.append(*f())", "x.n = 1"]
)
def test_a_change_that_cannot_be_followed_makes_the_variable_unknown(change: str) -> None:
    assert isinstance(values_of(f"x = [2, 1]\n{change}\n")["x"], Unknown)


@pytest.mark.parametrize("look", ["y = x.index(f())", "f(3)", "y = len(x)", "'a'.foo()", "dict.fromkeys(x)", "os.remove('f')"])
def test_a_look_at_a_variable_leaves_it_known(look: str) -> None:
    values = values_of(f"import os\nx = [2, 1]\n{look}\nz = dict(a=1)\n")
    assert (values["x"], values["z"]) == ([2, 1], {"a": 1})
    assert "os" not in values


@pytest.mark.parametrize(
    "expression",
    ["lambda: 1", "build(3)", "not_there", "1 / 0", "[1][3]", "{}['a']", "b'bytes'", "2j", "...", "'%99999999d' % 1", "'a' - 1"]
    + [
        "int('x')",
        "[*f()]",
        "dict(**f())",
        "f'{f()}'",
        "sorted([2, 1])",
        "-(y := 3)",
        "{f(): 1}",
        "os.environ['HOME']",
        "math.pi * 2",
        "[][f():]",
    ],
)
def test_an_expression_that_is_not_data_is_unknown_in_its_place(expression: str) -> None:
    values = values_of(f"import os, math\n\nmodel = dict(a=1, b=[{expression}, 2])\n")
    unknown = values["model"]["b"][0]
    assert unknown == Unknown(expression, 3, "cfg")
    assert values == {"model": {"a": 1, "b": [unknown, 2]}}


def test_unknown_spreads_to_what_is_computed_from_it_and_keeps_its_origin() -> None:
    values = values_of("a = f()\nb = a\nc = a + 1\nd = [1] if a else [2]\na.b = 1\ne = a == a\ng = [a] == [a]\nh = {'k': 1}.get(a, 2)\n")
    assert values["b"] is values["a"]
    assert values["a"] == Unknown("f()", 1, "cfg")
    assert all(isinstance(values[name], Unknown) for name in "cdegh")


def test_the_text_of_an_unknown_is_right_beside_letters_of_several_bytes() -> None:
    unknown = value_of("['äöü', 'ß' @ 2]")[1]
    assert unknown.text == "'ß' @ 2"


def test_imported_names_are_strings_where_they_stand_for_a_class() -> None:
    values = values_of(
        "import torch.nn as nn\nimport math\nfrom mmdet.models import RTMDet\nfrom torch.optim import AdamW as Optimizer\n"
        "try:\n  from a import B\nexcept ImportError:\n  from b import B\n"
        "model = dict(type=RTMDet, act=dict(type=nn.SiLU), pi=math.pi)\n"
        "optimizer = dict(type=Optimizer)\nb = B\njoined = RTMDet + 'Head'\nRTMDet = 3\n"
    )
    assert values["model"]["type"] == "RTMDet"
    assert values["model"]["act"] == {"type": "SiLU"}
    assert isinstance(values["model"]["pi"], Unknown)
    assert values["optimizer"] == {"type": "AdamW"}
    assert values["b"] == "B"
    assert isinstance(values["joined"], Unknown)
    assert values["RTMDet"] == 3
    assert "nn" not in values
    assert "Optimizer" not in values


def test_a_redefined_function_is_not_the_builtin() -> None:
    values = values_of("def max(a):\n  return 0\nx = max([1, 2])\nfrom numpy import sum\ny = sum([1])\nlen = 4\nz = len\n")
    assert isinstance(values["x"], Unknown)
    assert isinstance(values["y"], Unknown)
    assert values["z"] == 4
    assert "max" not in values


def test_comprehension_variables_stay_inside() -> None:
    assert values_of("i = 7\nx = [i for i in range(3)]\n") == {"i": 7, "x": [0, 1, 2]}


def test_a_chain_of_bases_merges_as_mmengine_does(tmp_path: Path) -> None:
    config = read_files(
        tmp_path,
        {
            "_base_/default_runtime.py": (
                "default_scope = 'mmpose'\ndefault_hooks = dict(timer=dict(type='IterTimerHook'), logger=dict(interval=50))\n"
            ),
            "_base_/coco.py": "dataset_info = dict(name='coco', joints=17)\n",
            "rtmpose/m.py": (
                "_base_ = ['../_base_/default_runtime.py', '../_base_/coco.py']\n"
                "model = dict(type='TopdownPoseEstimator', backbone=dict(type='CSPNeXt', deepen_factor=0.67, out_indices=(4, )),"
                " neck=dict(type='FPN', num_outs=4), head=dict(type='RTMCCHead', loss=dict(type='KLDiscretLoss', beta=10.)))\n"
                "train_pipeline = [dict(type='LoadImage'), dict(type='Flip', prob=0.5), 3]\n"
            ),
            "rtmpose/t.py": (
                "_base_ = './m.py'\n"
                "model = dict(backbone=dict(deepen_factor=0.167),"
                " neck=dict(_delete_=True, type='PAFPN', inner=dict(_delete_=True, a=1)),"
                " head=dict(loss=None))\n"
                "train_pipeline = {'1': dict(prob=0.9), 2: 4}\n"
                "default_hooks = dict(logger=dict(interval=10))\n"
                "scope = _base_.default_scope + '!'\n"
                "new = dict(_delete_=True, a=1)\n"
            ),
        },
        "rtmpose/t.py",
    )
    assert config.missing_bases == ()
    assert config.source == str(tmp_path / "rtmpose/t.py")
    assert config.values == {
        "default_scope": "mmpose",
        "default_hooks": {"timer": {"type": "IterTimerHook"}, "logger": {"interval": 10}},
        "dataset_info": {"name": "coco", "joints": 17},
        "model": {
            "type": "TopdownPoseEstimator",
            "backbone": {"type": "CSPNeXt", "deepen_factor": 0.167, "out_indices": (4,)},
            "neck": {"type": "PAFPN", "inner": {"a": 1}},
            "head": {"type": "RTMCCHead", "loss": None},
        },
        "train_pipeline": [{"type": "LoadImage"}, {"type": "Flip", "prob": 0.9}, 4],
        "scope": "mmpose!",
        "new": {"a": 1},
    }


def test_lists_replace_and_later_bases_win(tmp_path: Path) -> None:
    config = read_files(
        tmp_path,
        {
            "a.py": "x = dict(p=1, q=[1, 2])\n",
            "b.py": "x = dict(q=[3])\n",
            "child.py": "_base_ = ['a.py', 'b.py']\ny = [1]\ny2 = {5: dict()}\n",
        },
    )
    assert config.values == {"x": {"p": 1, "q": [3]}, "y": [1], "y2": {5: {}}}


def test_a_child_that_changes_part_of_an_unknown_leaves_it_unknown(tmp_path: Path) -> None:
    config = read_files(tmp_path, {"a.py": "model = build()\n", "child.py": "_base_ = 'a.py'\nmodel = dict(head=dict(k=1))\n"})
    assert config.values == {"model": Unknown("build()", 1, str(tmp_path / "a.py"))}


def test_where_mmengine_refuses_to_merge_the_child_stands_alone(tmp_path: Path) -> None:
    files = {"a.py": "x = [1, 2]\ny = 'text'\n", "child.py": "_base_ = 'a.py'\nx = {2: 5}\ny = dict(a=1)\n"}
    assert read_files(tmp_path, files).values == {"x": {2: 5}, "y": {"a": 1}}


def test_updating_an_unknown_part_of_a_base_leaves_it_unknown(tmp_path: Path) -> None:
    files = {"a.py": "model = dict(head=build(), k=1)\n", "child.py": "_base_ = 'a.py'\n_base_.model.update(head=dict(a=1), k=2)\n"}
    model = read_files(tmp_path, files).values["model"]
    assert isinstance(model["head"], Unknown)
    assert model["k"] == 2


def test_base_values_can_be_named_and_changed(tmp_path: Path) -> None:
    config = read_files(
        tmp_path,
        {
            "a.py": "model = dict(depth=50, sizes=[1, 2], inner=dict(a=1, b=2))\nhooks = [1]\n",
            "child.py": (
                "_base_ = './a.py'\nbare = {{_base_.model.depth}}\nquoted = '{{ _base_.model.sizes }}'\n"
                "inside = 'r{{_base_.model.depth}}_x'\nf = f'{ {{_base_.model.depth}} }d{{_base_.model.depth}}'\n"
                "missing = {{_base_.model.nothing}}\nattribute = _base_.model.sizes[1]\n"
                "gone = _base_.nothing.at_all\ntext = 'x{{_base_.model}}'\n_base_.model.inner.update(dict(b=3))\n_base_.hooks.append(2)\n"
                "_base_.model.depth = 18\n"
            ),
        },
    )
    values = config.values
    assert (values["bare"], values["quoted"], values["inside"], values["f"], values["attribute"]) == (50, [1, 2], "r50_x", "50d50", 2)
    assert values["missing"].text == "{{ _base_.model.nothing }}"
    assert isinstance(values["gone"], Unknown)
    assert isinstance(values["text"], Unknown)
    assert values["model"] == {"depth": 18, "sizes": [1, 2], "inner": {"a": 1, "b": 3}}
    assert values["hooks"] == [1, 2]
    assert "_base_" not in values


def test_a_change_of_a_base_that_cannot_be_followed_spoils_that_name_only(tmp_path: Path) -> None:
    files = {"a.py": "x = [2, 1]\ny = 1\n", "child.py": "_base_ = 'a.py'\n_base_.x.sort()\n"}
    values = read_files(tmp_path, files).values
    assert isinstance(values["x"], Unknown)
    assert values["y"] == 1


def test_predefined_variables_are_parts_of_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "it's"  # a quote that would end the string if the path became source text
    text = "d = '{{ fileDirname }}/w'\nb = '{{fileBasename}}'\nn = './out/{{ fileBasenameNoExtension }}'\ne = '{{ fileExtname }}'\n"
    assert read_files(folder, {"rtm.v1.py": text}, "rtm.v1.py").values == {
        "d": f"{folder.as_posix()}/w",
        "b": "rtm.v1.py",
        "n": "./out/rtm.v1",
        "e": ".py",
    }
    assert isinstance(values_of("d = '{{ fileDirname }}'")["d"], Unknown)


def test_environment_variables_are_their_defaults_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TEST_LR", "9")
    values = values_of(
        "lr = {{$MC_TEST_LR:0.1}}\nroot = '{{ $MC_TEST_LR:data/coco }}/x'\nn = {{'$MC_TEST_LR:3'}}\ne = '{{$MC_TEST_LR:}}'\n"
    )
    assert values == {"lr": 0.1, "root": "data/coco/x", "n": 3, "e": ""}


def test_bases_elsewhere_are_named_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    entries = ["mmdet::rtmdet/x.py", "https://example.com/x.py", "./not_there.py", "a.json", "folder.py", "n" * 5000 + ".py", "nul\0.py"]
    config = read_files(tmp_path, {"a.json": "{}", "child.py": f"_base_ = {[*entries, './not_there.py']!r}\nx = 1\n"})
    assert config.missing_bases == tuple(entries)
    assert config.values == {"x": 1}


def test_bases_that_are_computed_or_belong_to_a_text_are_missing() -> None:
    config = read_config_text("_base_ = ['./a.py', find(), 3]\nx = 1\ny = _base_.model\n", source="meta")
    assert config.missing_bases == ("./a.py", "find()", "int")
    assert config.values == {"x": 1, "y": Unknown("_base_.model", 3, "meta")}


def test_read_base_brings_names_into_scope_without_merging(tmp_path: Path) -> None:
    config = read_files(
        tmp_path,
        {
            "_base_/runtime.py": "default_scope = 'mmdet'\n_private = 1\n__hidden__ = 2\n",
            "det/s.py": (
                "from mmengine.config import read_base\nfrom mmdet.models import RTMDet\n"
                "with read_base():\n    from .._base_.runtime import *\n"
                "model = dict(type=RTMDet, backbone=dict(type='CSPNeXt', deepen_factor=0.33, out=(1, 2)), neck=dict(a=1))\n"
                "train_dataloader = dict(batch_size=32)\nstage = dict(a=1)\n"
            ),
            "det/tiny.py": (
                "from mmengine.config import read_base\nwith read_base():\n    from .s import *\n"
                "    from .s import stage as renamed, nothing\n"
                "model.update(dict(backbone=dict(deepen_factor=0.167), neck=dict(a=2)))\n"
                "model.neck.extra = dict(b=dict(c=1))\nmodel.update(dict(neck=dict(extra=dict(b=dict(d=2)))))\n"
                "train_dataloader = dict(num_workers=4)\nother = dict(type=RTMDet)\n"
                "own = dict(a=dict(b=1))\nown.update(dict(a=dict(c=2)))\nrenamed.merge(dict(_delete_=True, z=1))\n"
            ),
        },
        "det/tiny.py",
    )
    assert config.missing_bases == ()
    assert config.values.pop("nothing").line == 4
    assert config.values == {
        "default_scope": "mmdet",
        "_private": 1,
        "model": {
            "type": "RTMDet",
            "backbone": {"type": "CSPNeXt", "deepen_factor": 0.167, "out": (1, 2)},
            "neck": {"a": 2, "extra": {"b": {"c": 1, "d": 2}}},
        },
        "train_dataloader": {"num_workers": 4},  # assigned anew: replaced
        "stage": {"a": 1},
        "renamed": {"z": 1},
        "other": {"type": "RTMDet"},
        "own": {"a": {"c": 2}},  # a plain dict's update is not recursive
    }


def test_read_base_of_another_package_is_missing_and_its_names_are_unknown(tmp_path: Path) -> None:
    text = (
        "with read_base():\n    from mmpose.configs._base_.default_runtime import *\n    from .nowhere import schedule\n"
        "    from . import package\n"
        "max_epochs = 420\ntrain_cfg.update(max_epochs=max_epochs, val_interval=10)\n"
    )
    config = read_files(tmp_path, {"child.py": text, "mmpose/configs/_base_/default_runtime.py": "train_cfg = 1\n"})
    assert config.missing_bases == ("mmpose.configs._base_.default_runtime", ".nowhere", ".")
    assert config.values["max_epochs"] == 420
    assert isinstance(config.values["train_cfg"], Unknown)
    assert isinstance(config.values["schedule"], Unknown)


def test_a_cycle_of_bases_is_refused_with_its_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cycle: .*child\.py -> .*a\.py -> .*child\.py") as caught:
        read_files(tmp_path, {"child.py": "_base_ = 'a.py'\n", "a.py": "_base_ = './child.py'\n"})
    assert "_base_" in caught.value.hint


def test_one_base_on_two_ways_is_no_cycle(tmp_path: Path) -> None:
    files = {"r.py": "x = 1\n", "a.py": "_base_ = 'r.py'\n", "b.py": "_base_ = 'r.py'\n", "child.py": "_base_ = ['a.py', 'b.py']\n"}
    assert read_files(tmp_path, files).values == {"x": 1}


def test_bases_that_multiply_are_refused(tmp_path: Path) -> None:
    files = {f"b{n}.py": f"_base_ = ['b{n + 1}.py', 'b{n + 1}.py']\n" for n in range(30)}
    with pytest.raises(ConfigError, match="at most 64 config files"):
        read_files(tmp_path, files, "b0.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nmodel = dict(a=1\ny = 2\n", r"cfg, line 2: expected Python .*never closed"),
        ("PK\x03\x04 is a zip", "cfg, line 1"),
        ("x = '\0'", "null byte"),
        ("x = '\ud800'", "cfg, line 1"),
        ("x = " + "[" * 5000 + "]" * 5000, "cfg, line 1.*nested"),
        ("x = " + "-" * 200_000 + "1", "cfg, line 1.*"),
        ("x = " + "+".join("1" * 100_000), "cfg, line 1"),
        ("#" * (4 << 20) + "\n", "at most 4194304 bytes"),
    ],
)
def test_a_text_that_cannot_be_parsed_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_config_text(text, source="cfg")
    assert caught.value.hint


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"x = '\xe4'\n")
    with pytest.raises(ConfigError, match="expected UTF-8 text, found byte 0xe4 at offset 5"):
        read_config_file(tmp_path / "latin.py")
    with pytest.raises(ConfigError, match="no such file"):
        read_config_file(tmp_path / "not_there.py")
    with pytest.raises(ConfigError, match="something else"):
        read_config_file(tmp_path)
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(ConfigError, match="something else"):
        read_config_file(tmp_path / "pipe.py")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    with pytest.raises(ConfigError, match=r"loop\.py"):
        read_config_file(tmp_path / "loop.py")
    with pytest.raises(ConfigError, match=r"base\.py, line 2"):
        read_files(tmp_path, {"base.py": "x = 1\ny = = 2\n", "child.py": "_base_ = 'base.py'\n"})


def test_byte_order_mark_line_ends_and_odd_escapes_are_taken(tmp_path: Path) -> None:
    (tmp_path / "w.py").write_bytes(b"\xef\xbb\xbfx = r'a'\r\ny = '\\d'\r\nz = f()\r\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = read_config_file(tmp_path / "w.py").values
    assert values == {"x": "a", "y": "\\d", "z": Unknown("f()", 3, str(tmp_path / "w.py"))}


PAYLOADS = [
    "import os\nos.system('touch CANARY')",
    "x = __import__('os').system('touch CANARY')",
    "def f(a=__import__('os').system('touch CANARY')):\n  pass",
    "x = open('CANARY', 'w')\nx.close()",
    "exec(\"open('CANARY', 'w').close()\")",
    "x = [eval(\"open('CANARY', 'w').close()\") for _ in range(1)]",
    "class A:\n  import pathlib\n  pathlib.Path('CANARY').touch()",
    "from pathlib import Path\nx = f\"{Path('CANARY').touch()}\"",
    "from pathlib import Path\nmodel = dict(type=Path)\nmodel['type']('CANARY').touch()",
    "import pathlib\n@(lambda f: pathlib.Path('CANARY').touch())\ndef f(): pass",
    "c = [s for s in ().__class__.__base__.__subclasses__() if s.__name__ == 'Quitter']\nopen('CANARY', 'w').close()",
    "from pathlib import Path\nx = max([1], key=lambda v: Path('CANARY').touch() or 0)",
    "import subprocess\nif subprocess.run(['touch', 'CANARY']):\n  y = 1",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_is_executed(payload: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = payload.replace("CANARY", str(canary)) + "\nafter = 1\n"
    assert read_config_text(text, source="cfg").values["after"] == 1
    assert read_files(tmp_path, {"base.py": text, "child.py": "_base_ = 'base.py'\n"}).values["after"] == 1
    assert not canary.exists()
    exec(text, {})  # our own text: it shows that the payload would have worked
    assert canary.exists()


BOMBS = [
    "9**9**9",
    "2**64",
    "10**400",
    "'a' * 10**12",
    "10**12 * [0]",
    "[0] * 10**6 * 10**6",
    "1 << 10**9",
    "round(1, -10**9)",
    "range(10**9)",
]
BOMBS += [
    "f'{1:>999999999}'",
    "f'{1:.999999999}'",
    "f'{1:{9**9}}'",
    "0x" + "f" * 100_000,
    "list(range(100001))",
    "int('9' * 5000)",
    "-(2**64)",
]
BOMBS += ["sum([[1]] * 9, [])", "2.0 ** 10**9", "[1 " + "for x in [0] " * 500 + "]", "not " * 150 + "0", "1" + "+1" * 300]


@pytest.mark.parametrize("expression", BOMBS)
def test_a_computation_without_bounds_is_unknown(expression: str) -> None:
    values = values_of(f"x = {expression}\nafter = 1\n")
    assert isinstance(values["x"], Unknown)
    assert len(values["x"].text) <= 200
    assert values["after"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "x = [1]\n" + "x = x + x\n" * 60,
        "x = [1]\n" + "x += x\n" * 60,
        "x = [1]\n" + "x.extend(x)\n" * 60,
        "x = 'a'\n" + "x = x + x\n" * 60,
        "x = 'a'\n" + "x = f'{x}{x}'\n" * 60,
        "x = [1]\n" + "x = [x, x]\n" * 60,
        "x = (1,)\n" + "x = (x, x)\n" * 60 + "y = {x: 1}\nz = x == x\nv = str(x)\nw = x in [x]\n",
        "x = dict(a=1)\n" + "x = {'a': x, 'b': x}\n" * 60,
        "x = 2\n" + "x = x * x\n" * 60,
        "x = []\nx.append(x)\ny = x == x\n",
        "x = {}\nx['x'] = x\nx.update(x)\nx.merge(x)\n",
        "x = 1\nfor i in range(1000):\n  x = [x]\n",
        "x = 0\nif x:\n  pass\n" + "elif x:\n  pass\n" * 150 + "else:\n  x = 1\n",
    ],
)
def test_growth_is_bounded(text: str) -> None:
    values = values_of(text + "after = 1\n")
    assert isinstance(values["x"], Unknown)
    assert values["after"] == 1
    assert all(isinstance(values[name], Unknown) for name in values.keys() & {"y", "z", "v", "w"})


@pytest.mark.parametrize(
    "text",
    [
        "x = 0\nfor i in range(100000):\n  for j in range(100000):\n    x += 1\n",
        "x = [1 for i in range(100000) for j in range(100000)]",
        "\n".join(f"x{n} = [0] * 1000000" for n in range(3000)),
        "x = [0] * 1000000\nfor i in range(100000):\n  x.insert(0, 1)\n",
        "_base_.x = 'b' * 1000000\n" + "\n".join("a = '{{ _base_.x }}'  '{{ _base_.x }}'" for n in range(1000)),
    ],
)
def test_work_without_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="takes more"):
        read_config_text(text, source="cfg")


def test_a_cycle_made_through_the_bases_is_cut(tmp_path: Path) -> None:
    child = "_base_ = 'a.py'\n_base_.x.me = _base_\nz = _base_.x\n"
    values = read_files(tmp_path, {"a.py": "x = dict(k=1)\ny = 2\n", "child.py": child}).values
    assert values["y"] == 2
    assert isinstance(values["x"], Unknown)
    assert isinstance(values["z"], Unknown)


# What mmengine dumps into a checkpoint's meta: yapf's layout, scopes, no bases.
DUMPED = """\
codec = dict(
    input_size=(
        192,
        256,
    ),
    sigma=(
        4.9,
        5.66,
    ),
    simcc_split_ratio=2.0,
    type='SimCCLabel')
load_from = None
model = dict(
    backbone=dict(
        _scope_='mmdet',
        init_cfg=dict(
            checkpoint=
            'https://download.openmmlab.com/mmpose/v1/x.pth',
            type='Pretrained'),
        out_indices=(4, ),
        type='CSPNeXt'),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[
            123.675,
            116.28,
            103.53,
        ], type='PoseDataPreprocessor'))
param_scheduler = [
    dict(
        begin=0, by_epoch=False, end=1000, start_factor=1e-05,
        type='LinearLR'),
]
"""


def test_a_dumped_config_is_read_as_python_would_run_it() -> None:
    expected: dict[str, Any] = {}
    exec(DUMPED, {}, expected)
    config = read_config_text(DUMPED, source="rtmpose.pth: meta")
    assert config == ModelConfig(values=expected, source="rtmpose.pth: meta", missing_bases=())


def test_a_float_that_is_not_finite_is_data() -> None:
    assert math.isnan(value_of("float('nan')"))
    assert value_of("1e999") == math.inf
