"""Parameters and multiply-adds of every model of the zoo, counted on our networks, beside what their pages say: writes converter/zoo.md.

usage: .venv/bin/python scripts/zoo_table.py [-o FILE] [--check]

No checkpoint is needed: the networks are built from the blueprints of their sizes, on torch's meta device. Exits with 1 if a figure is further from the
published one than it may be and no note explains it; with --check also if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelcrate_converter.models.blueprints import DETECTOR_SIZES, POSE_SIZES, classifier_shapes, heatmap_shapes, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.models.classifier import ImageClassifier, LinearClsHead
from modelcrate_converter.models.heatmap import HeatmapPose
from modelcrate_converter.models.rtmdet import RTMDet
from modelcrate_converter.models.rtmpose import RTMPose
from modelcrate_converter.zoo import ZooModel, zoo_models
from modelcrate_runtime.skeletons import published_keypoints

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "converter/zoo.md"
COMMAND: Final = ".venv/bin/python scripts/zoo_table.py"
TOLERANCE: Final = 0.02
"""Of the multiply-adds. Parameters must be the page's in two decimals."""
SIZES: Final = {**DETECTOR_SIZES, **POSE_SIZES}

Architecture: TypeAlias = Literal["RTMDet", "RTMPose", "heatmaps", "classifier"]
FAMILIES: Final[Mapping[str, tuple[Architecture, tuple[str, ...]]]] = {
    "RTMDet": ("RTMDet", ("",)),
    "RTMPose, body": ("RTMPose", ("coco",)),
    "RTMPose, body with feet": ("RTMPose", ("halpe26",)),
    "RTMPose, whole body": ("RTMPose", ("coco-wholebody",)),
    "RTMPose, animal, face and hand": ("RTMPose", ("ap10k", "lapa", "hand")),
    "CSPNeXt with heatmaps (UDP), body": ("heatmaps", ("coco",)),
    "CSPNeXt, ImageNet": ("classifier", ("",)),
}
"""Title of a table -> the architecture and the sets of keypoints that are in it."""

INTRO: Final = """\
# The zoo, counted

Every model of `modelcrate zoo list`, beside what its page says of it. The networks are those that `convert` fills from a checkpoint. Here they are built
from the [blueprints](modelcrate_converter/models/blueprints.py) of their sizes, so that no checkpoint is needed. Made by:

```sh
{command}            # writes this page
{command} --check    # compares it, as a test does
```

- **parameters**: millions of learned values. What the levels of RTMDet's head share counts once; BatchNorm's running statistics do not count.
- **multiply-adds**: thousand millions, of convolutions and matrix products, for one image of the input size (height x width): half of what
  `torch.utils.flop_counter` counts.
- **like mmengine**: the same, and what mmengine's counter adds: two for each value that BatchNorm scales, one for each that is averaged or made by upsampling.
- **published**: from the pages of MMPose (RTMPose, DWPose) and MMDetection (RTMDet), which call multiply-adds FLOPs. `-` is where they have none.
- **difference**: ours, in two decimals, less the published parameters; our multiply-adds (without BatchNorm) against the published ones.

Parameters must be the published ones in two decimals, multiply-adds within {tolerance:.0f} % of them. What is further away is marked **outside**, or has
the number of a note that explains it. Ours are mostly a little lower, because the pages count like mmengine: {equal} of the {published} published
multiply-adds are that column, rounded or cut to as many decimals. The others differ from it by {rest:.1f} % at most; nothing says how they were counted."""


class Explained(NamedTuple):
    """Why a published figure is further away than it may be. The row is in order only as long as the explanation is right.

    Attributes:
        note: for the page.
        published: from the exact figure to the one that the page then has.
    """

    note: str
    published: Callable[[float], float]


class Counted(NamedTuple):
    """What a network has.

    Attributes:
        parameters_m: millions that are learned; shared ones count once.
        multiply_adds_g: thousand millions, of convolutions and matrix products.
        like_mmengine_g: the same and what mmengine adds.
    """

    parameters_m: float
    multiply_adds_g: float
    like_mmengine_g: float


class Row(NamedTuple):
    """A model, what was counted, the figures out of bounds that no note explains, the notes."""

    model: ZooModel
    counted: Counted
    outside: tuple[str, ...]
    notes: tuple[str, ...]


def cut(value: float, decimals: int) -> float:
    return math.floor(value * 10.0**decimals) / 10.0**decimals


_ROUNDED_TWICE: Final = Explained(
    "The network has 6.0246 M parameters. mmengine prints 6.025, and the page rounds that once more.", lambda value: round(round(value, 3) + 1e-9, 2)
)
EXPLAINED_PARAMETERS: Final[Mapping[str, Explained]] = {
    "rtmdet-tiny_coco-640": Explained("MMDetection's page cuts after one decimal here; 4.896 would round to 4.9.", lambda value: cut(value, 1)),
    "rtmdet-l_coco-640": Explained("MMDetection's page has one decimal here; 52.316 rounds to it.", lambda value: round(value, 1)),
    "cspnext-t_udp-aic-coco-256x192": _ROUNDED_TWICE,
    "cspnext-t_udp-body8-256x192": _ROUNDED_TWICE,
}
EXPLAINED_MULTIPLY_ADDS: Final[Mapping[str, Explained]] = {
    "rtmpose-t_ucoco-256x192": Explained(
        "DWPose's page has one decimal here: 0.548 rounded, or 0.552 (like mmengine) cut. The larger sizes have the same head, and their figures agree.",
        lambda value: round(value, 1),
    ),
}
PRUNED: Final[Mapping[str, Mapping[str, int]]] = {
    "rtmpose-s_aic-coco-pruned-256x192": {
        "stem.0": 8, "stem.1": 9, "stem.2": 9,
        "stage1.0": 32, "stage1.1.short_conv": 30, "stage1.1.main_conv": 29, "stage1.1.blocks.0.conv1": 24, "stage1.1.final_conv": 27,
        "stage2.0": 62, "stage2.1.short_conv": 63, "stage2.1.main_conv": 64, "stage2.1.blocks.0.conv1": 56, "stage2.1.blocks.1.conv1": 62,
        "stage2.1.final_conv": 65,
        "stage3.0": 167, "stage3.1.short_conv": 127, "stage3.1.main_conv": 128, "stage3.1.blocks.0.conv1": 124, "stage3.1.blocks.1.conv1": 123,
        "stage3.1.final_conv": 172,
        "stage4.0": 337, "stage4.1.conv1": 256, "stage4.1.conv2": 379, "stage4.2.short_conv": 188, "stage4.2.main_conv": 227, "stage4.2.blocks.0.conv1": 238,
        "stage4.2.blocks.0.conv2.pointwise_conv": 195, "stage4.2.final_conv": 163,
    },
}  # fmt: skip
"""Channels that GroupFisher left, of MMPose 1.3 `projects/rtmpose/rtmpose/pruning/group_fisher_deploy_rtmpose-s_8xb256-420e_aic-coco-256x192.py`."""
_PRUNED_NOTE: Final = "Counted on a network of the widths in MMPose's pruning config; `convert` takes them from the checkpoint."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing: compare with the file")
    options = parser.parse_args(arguments)
    rows = [judge(model) for model in zoo_models().values()]
    text = page(rows)
    failures = [f"{row.model.name}: {what}" for row in rows for what in row.outside]
    if not options.check:
        options.out.write_text(text, encoding="utf-8")
    elif not options.out.is_file() or options.out.read_text(encoding="utf-8") != text:
        failures.append(f"{options.out}: expected what the networks have, found another text: {COMMAND} writes it anew")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


# ----------------------------------------------------------------------------------------------------------------- networks


def architecture_of(model: ZooModel) -> Architecture:
    if model.task == "Detector":
        return "RTMDet"
    if model.task == "Classifier":
        return "classifier"
    return "RTMPose" if model.name.startswith("rtmpose-") else "heatmaps"


def count(model: ZooModel) -> Counted:
    if model.name in PRUNED:
        return _counted(functools.partial(RTMPose, _pruned_shapes(PRUNED[model.name])), model.input_hw)
    return _count(*_network(model))


def shapes_of(model: ZooModel) -> dict[str, tuple[int, ...]]:
    """The state dict of a model's network."""
    return _pruned_shapes(PRUNED[model.name]) if model.name in PRUNED else _shapes(*_network(model))


def _network(model: ZooModel) -> tuple[Architecture, str, int, tuple[int, int]]:
    """Architecture, size, outputs and input size: what a network is, whatever it was trained on."""
    size = model.name.partition("_")[0].partition("-")[2]
    architecture = architecture_of(model)
    if architecture == "RTMDet":
        outputs = 80 if "_coco-" in model.name else 1
    else:
        outputs = 1000 if architecture == "classifier" else len(published_keypoints(model.keypoints).names)
    return architecture, size, outputs, model.input_hw


def _shapes(architecture: Architecture, size: str, outputs: int, input_hw: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    widen, deepen = SIZES[size]
    if architecture == "RTMDet":
        return rtmdet_shapes(widen=widen, deepen=deepen, classes=outputs, separable=size == "nano")
    if architecture == "RTMPose":
        return rtmpose_shapes(widen=widen, deepen=deepen, keypoints=outputs, input_hw=input_hw)
    if architecture == "heatmaps":
        return heatmap_shapes(widen=widen, deepen=deepen, keypoints=outputs)
    return classifier_shapes(widen=widen, deepen=deepen, classes=outputs)


def build(architecture: Architecture, size: str, outputs: int, input_hw: tuple[int, int]) -> nn.Module:
    table = _shapes(architecture, size, outputs, input_hw)
    if architecture == "RTMDet":
        # Whether distances are exponentiated adds no multiplication.
        return RTMDet(table, share_conv=size != "nano", exp_on_reg=False)
    return {"RTMPose": RTMPose, "heatmaps": HeatmapPose, "classifier": ImageClassifier}[architecture](table)


@functools.cache
def _count(architecture: Architecture, size: str, outputs: int, input_hw: tuple[int, int]) -> Counted:
    """Models that differ only in what they were trained on are one network, counted once."""
    return _counted(functools.partial(build, architecture, size, outputs, input_hw), input_hw)


def _counted(make: Callable[[], nn.Module], input_hw: tuple[int, int]) -> Counted:
    with torch.device("meta"):
        network = make().eval()
    added = _count_additions(network)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, *input_hw, device="meta"))
    # torch counts a multiplication and its addition as two.
    multiply_adds = counter.get_total_flops() // 2
    return Counted(sum(weight.numel() for weight in network.parameters()) / 1e6, multiply_adds / 1e9, (multiply_adds + sum(added)) / 1e9)


def _pruned_shapes(widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """RTMPose-s with another width in every layer of the backbone."""
    table = rtmpose_shapes(widen=0.5, deepen=0.33, keypoints=17, input_hw=(256, 192))

    def narrowed(layer: str, channels: int, out: int) -> int:
        """Give a convolution and its BatchNorm their widths; returns how many channels come out."""
        prefix = f"backbone.{layer}"
        kernel = table[f"{prefix}.conv.weight"][2:]
        table[f"{prefix}.conv.weight"] = (out, channels, *kernel)
        table.update({f"{prefix}.bn.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")})
        return out

    x = 3
    for layer in ("stem.0", "stem.1", "stem.2"):
        x = narrowed(layer, x, widths[layer])
    for stage in (1, 2, 3, 4):
        x = narrowed(f"stage{stage}.0", x, widths[f"stage{stage}.0"])
        if stage == 4:
            x = narrowed("stage4.1.conv1", x, widths["stage4.1.conv1"])
            x = narrowed("stage4.1.conv2", 4 * x, widths["stage4.1.conv2"])  # the input beside its three poolings
        block = f"stage{stage}.{2 if stage == 4 else 1}"
        main, short = (narrowed(f"{block}.{name}", x, widths[f"{block}.{name}"]) for name in ("main_conv", "short_conv"))
        for inner in (name.removesuffix(".conv1") for name in widths if name.startswith(f"{block}.blocks.") and name.endswith(".conv1")):
            middle = narrowed(f"{inner}.conv1", main, widths[f"{inner}.conv1"])
            narrowed(f"{inner}.conv2.depthwise_conv", 1, middle)
            main = narrowed(f"{inner}.conv2.pointwise_conv", middle, widths.get(f"{inner}.conv2.pointwise_conv", main))
        table[f"backbone.{block}.attention.fc.weight"] = (main + short, main + short, 1, 1)
        table[f"backbone.{block}.attention.fc.bias"] = (main + short,)
        x = narrowed(f"{block}.final_conv", main + short, widths[f"{block}.final_conv"])
    table["head.final_layer.weight"] = (17, x, 7, 7)
    return table


def _count_additions(network: nn.Module) -> list[int]:
    """A list that the next run fills with what mmengine 0.10 `analysis/flop_count.py` counts and torch does not."""
    added: list[int] = []

    def scaled(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
        added.append(2 * inputs[0].numel())

    def averaged(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
        added.append(inputs[0].numel())

    def upsampled(_: nn.Module, __: object, output: Tensor) -> None:
        added.append(output.numel())

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(scaled)
        elif isinstance(module, nn.AdaptiveAvgPool2d | LinearClsHead):  # the classifier's head begins with a mean
            module.register_forward_hook(averaged)
        elif isinstance(module, nn.Upsample):
            module.register_forward_hook(upsampled)
    return added


# ----------------------------------------------------------------------------------------------------------------- the page


def judge(model: ZooModel) -> Row:
    counted = count(model)
    outside: list[str] = []
    notes = [_PRUNED_NOTE] if model.name in PRUNED else []
    for what, ours, published, is_near, explanations in (
        ("M parameters", counted.parameters_m, model.parameters_m, _is_same_in_two_decimals, EXPLAINED_PARAMETERS),
        ("G multiply-adds", counted.multiply_adds_g, model.flops_g, _is_within_tolerance, EXPLAINED_MULTIPLY_ADDS),
    ):
        if published is None or is_near(ours, published):
            continue
        explained = explanations.get(model.name)
        if explained is not None and math.isclose(explained.published(ours), published):
            notes.append(explained.note)
        else:
            outside.append(f"expected {published} {what}, found {ours:.3f}")
    return Row(model, counted, tuple(outside), tuple(notes))


def _is_same_in_two_decimals(ours: float, published: float) -> bool:
    return f"{ours:.2f}" == f"{published:.2f}"


def _is_within_tolerance(ours: float, published: float) -> bool:
    return abs(ours / published - 1) <= TOLERANCE


def page(rows: Sequence[Row]) -> str:
    families = {
        title: [row for row in rows if architecture_of(row.model) == architecture and row.model.keypoints in keypoints]
        for title, (architecture, keypoints) in FAMILIES.items()
    }
    notes = list(dict.fromkeys(note for members in families.values() for row in members for note in row.notes))
    pairs = [(row.counted.like_mmengine_g, row.model.flops_g) for row in rows if row.model.flops_g is not None]
    rest = [abs(ours / published - 1) for ours, published in pairs if not _has_digits_of(ours, published)]
    intro = INTRO.format(command=COMMAND, tolerance=100 * TOLERANCE, equal=len(pairs) - len(rest), published=len(pairs), rest=100 * max(rest, default=0.0))
    tables = [f"## {title}\n\n{_table(members, notes)}" for title, members in families.items()]
    numbered = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
    return "\n\n".join([intro, *tables, f"## Notes\n\n{numbered}"]) + "\n"


def _has_digits_of(ours: float, published: float) -> bool:
    decimals = len(repr(published).partition(".")[2])
    return any(math.isclose(published, candidate) for candidate in (round(ours, decimals), cut(ours, decimals)))


def _table(rows: Iterable[Row], notes: Sequence[str]) -> str:
    head = ["model", "input", "parameters (M)", "published", "difference", "multiply-adds (G)", "like mmengine", "published", "difference"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *(_cells(row, notes) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, notes: Sequence[str]) -> list[str]:
    model, counted = row.model, row.counted
    name = " or ".join(f"`{name}`" for name in (model.name, *model.aliases))
    marks = [f"({notes.index(note) + 1})" for note in row.notes] + ["**outside**"] * bool(row.outside)
    parameters, multiply_adds, like_mmengine = (f"{value:.3f}" for value in counted)
    more_parameters = round(counted.parameters_m, 2) - model.parameters_m if model.parameters_m else None
    more_multiply_adds = 100 * (counted.multiply_adds_g / model.flops_g - 1) if model.flops_g else None
    return [
        " ".join([name, *marks]), "x".join(str(side) for side in model.input_hw),
        parameters, _published(model.parameters_m), _signed(more_parameters, ".2f"),
        multiply_adds, like_mmengine, _published(model.flops_g), _signed(more_multiply_adds, ".1f", " %"),
    ]  # fmt: skip


def _published(value: float | None) -> str:
    return "-" if value is None else str(value)


def _signed(difference: float | None, form: str, unit: str = "") -> str:
    """With a sign, unless it is nothing in these decimals."""
    if difference is None:
        return "-"
    is_nothing = float(format(difference, form)) == 0
    return format(0, form) + unit if is_nothing else format(difference, f"+{form}") + unit


if __name__ == "__main__":
    sys.exit(main())
