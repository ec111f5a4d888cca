"""The page that counts the zoo: it is what the networks have, it has every model, and a figure that is off does not pass."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from modelcrate_converter.zoo import get_model, zoo_models

pytestmark = pytest.mark.xdist_group("zoo_table")  # one process counts, once

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "converter/zoo.md").read_text(encoding="utf-8")

MMENGINE = {
    "rtmpose-t_body8-256x192": (3.337, 0.359), "rtmpose-s_body8-256x192": (5.473, 0.682), "rtmpose-m_body8-256x192": (13.588, 1.929),
    "rtmpose-l_body8-256x192": (27.660, 4.160), "rtmpose-m_body8-384x288": (13.718, 4.326), "rtmpose-l_body8-384x288": (27.790, 9.346),
    "rtmpose-m_wholebody-256x192": (17.953, 2.227), "rtmpose-l_wholebody-256x192": (33.481, 4.528), "rtmpose-l_wholebody-384x288": (33.611, 10.078),
    "rtmpose-m_ap10k-256x256": (13.624, 2.568), "rtmpose-m_hand5-256x256": (13.775, 2.581), "rtmpose-m_face6-256x256": (16.974, 2.852),
    "rtmpose-m_halpe26-256x192": (13.926, 1.951), "cspnext-t_udp-body8-256x192": (6.025, 1.429), "cspnext-s_udp-body8-256x192": (8.579, 1.773),
    "cspnext-m_udp-body8-256x192": (17.528, 3.059), "cspnext-l_udp-body8-256x192": (32.436, 5.331), "cspnext-m_udp-body8-384x288": (17.528, 6.883),
    "cspnext-l_udp-body8-384x288": (32.436, 11.993), "rtmdet-nano_person-320": (0.994, 0.320), "rtmdet-m_person-640": (24.663, 39.078),
    "cspnext-t_in1k-224": (2.734, 0.339), "cspnext-s_in1k-224": (4.891, 0.664), "cspnext-m_in1k-224": (13.048, 1.927), "cspnext-l_in1k-224": (27.164, 4.194),
}  # fmt: skip
"""Parameters (M) and multiply-adds (G) that mmengine's `get_model_complexity_info` counted on those of MMPose 1.3, MMDetection 3.3 and MMPretrain 1.2."""


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    """The script; what it has counted once it does not count again."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/zoo_table.py")))


def test_the_page_is_what_the_script_writes(script: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().err
    # Another page is found, and written anew. In the same test, so that no second process has to count everything.
    path = tmp_path / "zoo.md"
    assert script.main(["--check", "-o", str(path)]) == 1
    path.write_text(PAGE.replace("13.588", "13.589"), encoding="utf-8")
    assert script.main(["--check", "-o", str(path)]) == 1
    assert "scripts/zoo_table.py writes it anew" in capsys.readouterr().err
    assert script.main(["-o", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == PAGE


def test_every_model_has_one_row() -> None:
    rows = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| `")]
    for model in zoo_models().values():
        (row,) = [row for row in rows if f"`{model.name}`" in row]
        assert all(f"`{alias}`" in row for alias in model.aliases)
    assert len(rows) == len(zoo_models())


def test_nothing_on_the_page_is_out_of_bounds() -> None:
    assert "**outside** |" not in PAGE


@pytest.mark.parametrize("name", MMENGINE)
def test_the_networks_are_upstreams_in_mmengines_count(script: SimpleNamespace, name: str) -> None:
    counted = script.count(get_model(name))
    assert (round(counted.parameters_m, 3), round(counted.like_mmengine_g, 3)) == pytest.approx(MMENGINE[name], abs=1.01e-3)


@pytest.mark.parametrize(
    ("figure", "factor", "is_outside"),
    [("parameters_m", 1.0, False), ("parameters_m", 1.001, True), ("flops_g", 1.01, False), ("flops_g", 1.04, True), ("flops_g", 0.96, True)],
)
def test_a_published_figure_that_is_not_ours_is_marked(script: SimpleNamespace, figure: str, factor: float, is_outside: bool) -> None:
    model = get_model("rtmpose-m")
    row = script.judge(msgspec.structs.replace(model, **{figure: getattr(model, figure) * factor}))
    assert bool(row.outside) is is_outside
    assert ("**outside** |" in script.page([row])) is is_outside


def test_explanations_are_needed_and_hold_only_for_their_figures(script: SimpleNamespace) -> None:
    for figure, explanations in (("parameters_m", script.EXPLAINED_PARAMETERS), ("flops_g", script.EXPLAINED_MULTIPLY_ADDS)):
        for name, explained in explanations.items():
            model = zoo_models()[name]
            assert explained.note in script.judge(model).notes
            assert script.judge(msgspec.structs.replace(model, **{figure: getattr(model, figure) * 1.3})).outside


def test_the_pruned_model_is_counted_in_the_widths_that_pruning_left(script: SimpleNamespace) -> None:
    row = script.judge(get_model("rtmpose-s-aic-coco-pruned"))
    assert not row.outside
    assert round(row.counted.parameters_m, 2) == 3.43
    assert "pruning config" in row.notes[0]
