"""Pruned checkpoints, where every layer has a width of its own, become the networks that they are.

GroupFisher (Liu et al., 2021; MMRazor) removes single channels, all those together that are added to each other. A network without a channel
computes what the full network computes with that channel at 0: the full network, masked, is the reference here for the pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ArchitectureError, ConfigError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import load_config
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.models.blueprints import classifier_shapes, heatmap_shapes, random_weights, rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.zoo import get_model
from modelcrate_runtime import PoseDetector

Weights: TypeAlias = dict[str, Tensor]
Part: TypeAlias = tuple[str, int, int]
"""Where a tensor meets the channels of a group: key, axis, index of the first one."""
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
TOLERANCE = 1e-6
"""Relative, in float64, where a sum without its zeros is the same sum: what differs is one factor in RTMPose's reference, a float32 in its file."""


# ------------------------------------------------------------------------------------------- which channels go together


@dataclass(kw_only=True)
class Group:
    """Channels that are kept or removed together, in all the tensors that make or read them.

    Attributes:
        name: the first module that makes them, as MMRazor names it.
        width: how many there are in the full network.
        made: entries that make them: at 0 in a masked network, but for variances.
        read: entries that meet them: gone from a pruned network, untouched in a masked one.
    """

    name: str
    width: int
    made: list[Part] = field(default_factory=list)
    read: list[Part] = field(default_factory=list)


class Wiring:
    """The groups of a network, found by following its layers from one to the next."""

    def __init__(self, table: Mapping[str, tuple[int, ...]]) -> None:
        self.table = table
        self.groups: list[Group] = []

    def group(self, name: str, width: int) -> Group:
        self.groups.append(Group(name=name, width=width))
        return self.groups[-1]

    def reads(self, key: str, axis: int, *inputs: Group) -> None:
        """A tensor that meets the concatenation of some groups."""
        start = 0
        for group in inputs:
            group.read.append((key, axis, start))
            start += group.width
        assert start == self.table[key][axis], key

    def conv(self, prefix: str, *inputs: Group, joins: Group | None = None) -> Group:
        """A ConvModule on a concatenation; `joins` is the group that its output is added to, or whose weights it shares."""
        if inputs:
            self.reads(f"{prefix}.conv.weight", 1, *inputs)
        group = joins or self.group(prefix, self.table[f"{prefix}.conv.weight"][0])
        group.made += [(f"{prefix}.conv.weight", 0, 0), *((f"{prefix}.bn.{name}", 0, 0) for name in BATCH_NORM)]
        return group

    def conv3(self, prefix: str, source: Group, *, joins: Group | None = None) -> Group:
        """Where RTMDet-nano has a depthwise convolution, which makes of each channel one, and a pointwise one."""
        if f"{prefix}.conv.weight" in self.table:
            return self.conv(prefix, source, joins=joins)
        self.conv(f"{prefix}.depthwise_conv", joins=source)
        return self.conv(f"{prefix}.pointwise_conv", source, joins=joins)

    def csp(self, prefix: str, *inputs: Group, identity: bool = False) -> Group:
        inner, short = self.conv(f"{prefix}.main_conv", *inputs), self.conv(f"{prefix}.short_conv", *inputs)
        number = 0
        while any(key.startswith(f"{prefix}.blocks.{number}.") for key in self.table):
            block = f"{prefix}.blocks.{number}"
            inner = self.conv3(f"{block}.conv2", self.conv3(f"{block}.conv1", inner), joins=inner if identity else None)
            number += 1
        if f"{prefix}.attention.fc.weight" in self.table:
            for key, axis in ((f"{prefix}.attention.fc.weight", 0), (f"{prefix}.attention.fc.weight", 1), (f"{prefix}.attention.fc.bias", 0)):
                self.reads(key, axis, inner, short)
        return self.conv(f"{prefix}.final_conv", inner, short)

    def backbone(self) -> list[Group]:
        """The feature maps at strides 8, 16 and 32."""
        last = self.conv("backbone.stem.0")
        for i in (1, 2):
            last = self.conv(f"backbone.stem.{i}", last)
        features = []
        for number in range(1, 5):
            stage = f"backbone.stage{number}"
            last = self.conv3(f"{stage}.0", last)
            if number == 4:
                pooled = self.conv(f"{stage}.1.conv1", last)
                last = self.conv(f"{stage}.1.conv2", pooled, pooled, pooled, pooled)
            last = self.csp(f"{stage}.{2 if number == 4 else 1}", last, identity=number != 4)
            features.append(last)
        return features[1:]


def wire_rtmpose(net: Wiring) -> None:
    net.reads("head.final_layer.weight", 1, net.backbone()[-1])
    # MMRazor leaves the attention alone; its inner widths stand in the shapes all the same.
    expanded, shared = net.table["head.gau.o.weight"][1], net.table["head.gau.gamma"][1]
    values, keys = net.group("head.gau.e", expanded), net.group("head.gau.s", shared)
    values.made += [("head.gau.uv.weight", 0, 0), ("head.gau.uv.weight", 0, expanded)]
    values.read += [("head.gau.o.weight", 1, 0)]
    keys.made += [("head.gau.uv.weight", 0, 2 * expanded), ("head.gau.gamma", 1, 0), ("head.gau.beta", 1, 0)]


def wire_heatmap(net: Wiring) -> None:
    last = net.backbone()[-1]
    for i in (0, 3, 6):
        deconv, norm = f"head.deconv_layers.{i}", f"head.deconv_layers.{i + 1}"
        net.reads(f"{deconv}.weight", 0, last)  # a transposed convolution has its inputs first
        last = net.group(deconv, net.table[f"{deconv}.weight"][1])
        last.made += [(f"{deconv}.weight", 1, 0), *((f"{norm}.{name}", 0, 0) for name in BATCH_NORM)]
    net.reads("head.final_layer.weight", 1, last)


def wire_classifier(net: Wiring) -> None:
    net.reads("head.fc.weight", 1, net.backbone()[-1])


def wire_rtmdet(net: Wiring) -> None:
    c3, c4, coarse = net.backbone()
    tops = []
    for i, fine in enumerate((c4, c3)):
        tops.append(net.conv(f"neck.reduce_layers.{i}", coarse))
        coarse = net.csp(f"neck.top_down_blocks.{i}", tops[-1], fine)
    outs = [coarse]
    for i, top in enumerate(reversed(tops)):
        outs.append(net.csp(f"neck.bottom_up_blocks.{i}", net.conv3(f"neck.downsamples.{i}", outs[-1]), top))

    def per_level(prefix: str, suffix: str, sources: list[Group]) -> list[Group]:
        """Levels that share their convolutions have one width, separable ones a width each."""
        is_shared = "bbox_head.cls_convs.0.0.conv.weight" in net.table
        made: list[Group] = []
        for level, source in enumerate(sources):
            made.append(net.conv3(f"{prefix}.{level}{suffix}", source, joins=made[0] if is_shared and made else None))
        return made

    features = per_level("neck.out_convs", "", outs)
    for stack, predictor in (("cls_convs", "rtm_cls"), ("reg_convs", "rtm_reg")):
        last = features
        for i in (0, 1):
            last = per_level(f"bbox_head.{stack}", f".{i}", last)
        for level, group in enumerate(last):
            net.reads(f"bbox_head.{predictor}.{level}.weight", 1, group)


# --------------------------------------------------------------------------------------------- choosing, cutting, masking

Kept: TypeAlias = dict[str, Tensor]
"""Group -> numbers of the channels that stay, in order."""


def choose(groups: list[Group], *, seed: int) -> Kept:
    """Channels at random, for each group another number of them as long as there are numbers."""
    rng = np.random.default_rng(seed)
    widths: dict[str, int] = {}
    for group in sorted(groups, key=lambda group: group.width):  # the narrow ones have the smallest choice
        fewer = set(range(group.width // 4 + 1, group.width))
        widths[group.name] = int(rng.choice(sorted(fewer - set(widths.values()) or fewer)))
    return choose_widths(groups, widths, seed=seed)


def choose_widths(groups: list[Group], widths: Mapping[str, int], *, seed: int) -> Kept:
    rng = np.random.default_rng(seed)
    return {group.name: torch.from_numpy(np.sort(rng.permutation(group.width)[: widths.get(group.name, group.width)])) for group in groups}


def removed(group: Group, kept: Kept) -> Tensor:
    stays = torch.zeros(group.width, dtype=torch.bool)
    stays[kept[group.name]] = True
    return torch.nonzero(~stays).flatten()


def prune(weights: Weights, groups: list[Group], kept: Kept) -> Weights:
    """The checkpoint without the channels."""
    stays = {(key, axis): torch.ones(size, dtype=torch.bool) for key, value in weights.items() for axis, size in enumerate(value.shape)}
    for group in groups:
        for key, axis, start in group.made + group.read:
            stays[key, axis][start + removed(group, kept)] = False
    pruned = dict(weights)
    for (key, axis), mask in stays.items():
        pruned[key] = pruned[key].index_select(axis, torch.nonzero(mask).flatten())
    return pruned


def mask(weights: Weights, groups: list[Group], kept: Kept) -> Weights:
    """The full checkpoint with nothing in the channels: no weight, no bias, no mean, a variance of 1; SiLU, ReLU and pooling keep the 0."""
    masked = {key: value.clone() for key, value in weights.items()}
    for group in groups:
        for key, axis, start in group.made:
            masked[key].index_fill_(axis, start + removed(group, kept), 1 if key.endswith("running_var") else 0)
        if group.name == "head.gau.s":  # queries times keys are divided by the root of their width
            for key in ("head.gau.gamma", "head.gau.beta"):
                masked[key] *= (group.width / len(kept[group.name])) ** 0.25
    return masked


# ------------------------------------------------------------------------------------------------------------ the families


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network to prune.

    Attributes:
        shapes: its full shape table.
        wire: finds its groups.
        input_hw: the input to compare on, (height, width).
        name: what a model of it is called, around the channels of the last stage.
        cfg: the config in its checkpoint.
    """

    shapes: Callable[[], dict[str, tuple[int, ...]]]
    wire: Callable[[Wiring], None]
    input_hw: tuple[int, int]
    name: str
    cfg: str = ""

    def weights_and_groups(self, seed: int) -> tuple[Weights, list[Group]]:
        table = self.shapes()
        net = Wiring(table)
        self.wire(net)
        return random_weights(table, seed=seed), net.groups


SMALL_IMAGES = "test_pipeline = [dict(type='Resize', scale=(128, 128))]"
FAMILIES = {
    "rtmpose-s": Family(
        shapes=partial(rtmpose_shapes, widen=0.5, deepen=0.33, keypoints=17, input_hw=(256, 192)),
        wire=wire_rtmpose, input_hw=(256, 192), name="rtmpose-c{}",
    ),
    "heatmap-t": Family(
        shapes=partial(heatmap_shapes, widen=0.375, deepen=0.167, keypoints=17, channels=96),
        wire=wire_heatmap, input_hw=(64, 96), name="cspnext-c{}_udp",
    ),
    "classifier-t": Family(
        shapes=partial(classifier_shapes, widen=0.375, deepen=0.167, classes=10),
        wire=wire_classifier, input_hw=(96, 96), name="cspnext-c{}",
    ),
    "rtmdet-tiny": Family(
        shapes=partial(rtmdet_shapes, widen=0.375, deepen=0.167, classes=3, separable=False),
        wire=wire_rtmdet, input_hw=(128, 128), name="rtmdet-c{}", cfg=SMALL_IMAGES,
    ),
    "rtmdet-nano": Family(
        shapes=partial(rtmdet_shapes, widen=0.25, deepen=0.33, classes=2, separable=True),
        wire=wire_rtmdet, input_hw=(128, 128), name="rtmdet-c{}", cfg=SMALL_IMAGES,
    ),
    "little-pose": Family(
        shapes=partial(rtmpose_shapes, widen=0.125, deepen=0.167, keypoints=3, input_hw=(64, 64), hidden=16, s=24),
        wire=wire_rtmpose, input_hw=(64, 64), name="rtmpose-c{}",
    ),
    "little-detector": Family(
        shapes=partial(rtmdet_shapes, widen=0.125, deepen=0.167, classes=2, separable=False),
        wire=wire_rtmdet, input_hw=(64, 64), name="rtmdet-c{}", cfg="test_pipeline = [dict(type='Resize', scale=(64, 64))]",
    ),
}  # fmt: skip


def saved(path: Path, weights: Weights, *, cfg: str = "") -> Path:
    content: dict[str, Any] = {"state_dict": weights}
    torch.save(content | ({"meta": {"cfg": cfg}} if cfg else {}), path)
    return path


def network(path: Path, weights: Weights, *, cfg: str = "") -> nn.Module:
    """The module that a checkpoint is read as."""
    return read_architecture(read_checkpoint(saved(path, weights, cfg=cfg))).module


def answers(module: nn.Module, input_hw: tuple[int, int]) -> list[Tensor]:
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, *input_hw)))
    with torch.inference_mode():
        return list(module.double()(sample))


def worst_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative L-inf of any output."""
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True))


def one_line(error: ArchitectureError) -> str:
    assert "\n" not in str(error)
    return str(error)


# ------------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["rtmpose-s", "heatmap-t", "classifier-t", "rtmdet-tiny", "rtmdet-nano"])
def test_a_pruned_network_computes_what_the_masked_network_computes(family: str, seed: int, tmp_path: Path) -> None:
    full = FAMILIES[family]
    weights, groups = full.weights_and_groups(seed)
    kept = choose(groups, seed=seed)
    pruned_weights = prune(weights, groups, kept)
    pruned, masked, whole = (
        network(tmp_path / name, state, cfg=full.cfg)
        for name, state in (("pruned.pth", pruned_weights), ("masked.pth", mask(weights, groups, kept)), ("whole.pth", weights))
    )
    expected = answers(masked, full.input_hw)
    assert worst_difference(answers(pruned, full.input_hw), expected) <= TOLERANCE
    assert worst_difference(answers(whole, full.input_hw), expected) > 1e-2, "the channels that were removed did nothing"


@pytest.mark.parametrize("family", ["rtmpose-s", "heatmap-t", "classifier-t", "rtmdet-tiny", "rtmdet-nano"])
def test_every_layer_has_the_width_that_its_checkpoint_has(family: str, tmp_path: Path) -> None:
    full = FAMILIES[family]
    weights, groups = full.weights_and_groups(7)
    kept = choose(groups, seed=7)
    pruned_weights = prune(weights, groups, kept)
    model = read_architecture(read_checkpoint(saved(tmp_path / "pruned.pth", pruned_weights, cfg=full.cfg)))
    found = {name: module.out_channels for name, module in model.module.named_modules() if isinstance(module, nn.Conv2d)}
    widths = {group.name: found[f"{group.name}.conv"] for group in groups if f"{group.name}.conv" in found}
    assert len(widths) > 20
    assert widths == {name: len(kept[name]) for name in widths}
    assert len(set(widths.values())) == len(widths), "two layers have one width"
    state = model.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in pruned_weights.items())
    assert model.name == full.name.format(widths["backbone.stage4.2.final_conv"])
    before, after = (sum(value.numel() for value in some.values()) for some in (weights, state))
    assert after < 0.7 * before


def test_a_network_may_be_pruned_to_one_channel_everywhere(tmp_path: Path) -> None:
    """Then a convolution's shape is that of a depthwise one, and sums would broadcast."""
    full = FAMILIES["little-pose"]
    weights, groups = full.weights_and_groups(1)
    kept = choose_widths(groups, {group.name: 1 for group in groups}, seed=1)
    pruned = network(tmp_path / "pruned.pth", prune(weights, groups, kept))
    masked = network(tmp_path / "masked.pth", mask(weights, groups, kept))
    assert worst_difference(answers(pruned, full.input_hw), answers(masked, full.input_hw)) <= TOLERANCE


@pytest.mark.parametrize("key", ["backbone.stage2.1.final_conv.conv.weight", "backbone.stage3.1.attention.fc.weight", "backbone.stage4.1.conv2.conv.weight"])
def test_the_comparison_notices_a_concatenation_in_another_order(key: str, tmp_path: Path) -> None:
    full = FAMILIES["rtmpose-s"]
    weights, groups = full.weights_and_groups(2)
    kept = choose(groups, seed=2)
    pruned = prune(weights, groups, kept)
    expected = answers(network(tmp_path / "masked.pth", mask(weights, groups, kept)), full.input_hw)
    assert worst_difference(answers(network(tmp_path / "pruned.pth", pruned), full.input_hw), expected) <= TOLERANCE
    turned = network(tmp_path / "turned.pth", pruned | {key: pruned[key].roll(pruned[key].shape[1] // 2, dims=1)})
    assert worst_difference(answers(turned, full.input_hw), expected) > 1e-3


PUBLISHED = {  # module -> channels that GroupFisher left of RTMPose-s: MMPose 1.x, `projects/rtmpose/rtmpose/pruning`, on COCO and on AIC and COCO
    "stem.0": (8, 8), "stem.1": (10, 9), "stem.2": (11, 9),
    "stage1.0": (32, 32), "stage1.1.short_conv": (32, 30), "stage1.1.main_conv": (23, 29), "stage1.1.blocks.0.conv1": (25, 24),
    "stage1.1.final_conv": (25, 27),
    "stage2.0": (71, 62), "stage2.1.short_conv": (61, 63), "stage2.1.main_conv": (62, 64), "stage2.1.blocks.0.conv1": (57, 56),
    "stage2.1.blocks.1.conv1": (59, 62), "stage2.1.final_conv": (69, 65),
    "stage3.0": (177, 167), "stage3.1.short_conv": (122, 127), "stage3.1.main_conv": (123, 128), "stage3.1.blocks.0.conv1": (125, 124),
    "stage3.1.blocks.1.conv1": (123, 123), "stage3.1.final_conv": (171, 172),
    "stage4.0": (351, 337), "stage4.1.conv1": (256, 256), "stage4.1.conv2": (367, 379), "stage4.2.short_conv": (183, 188),
    "stage4.2.main_conv": (216, 227), "stage4.2.blocks.0.conv1": (238, 238), "stage4.2.blocks.0.conv2.pointwise_conv": (195, 195),
    "stage4.2.final_conv": (187, 163),
}  # fmt: skip
PUBLISHED_CFG = """
codec = dict(type='SimCCLabel', input_size=(192, 256), sigma=(4.9, 5.66), simcc_split_ratio=2.0, normalize=False, use_dark=False)
architecture = dict(
    _scope_='mmpose', type='TopdownPoseEstimator',
    data_preprocessor=dict(type='PoseDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(_scope_='mmdet', type='CSPNeXt', arch='P5', widen_factor=0.5, deepen_factor=0.33),
    head=dict(type='RTMCCHead', in_channels=512, out_channels=17, input_size=(192, 256), decoder=codec))
model = dict(_scope_='mmrazor', type='GroupFisherSubModel', algorithm=dict(_scope_='mmrazor', type='GroupFisherAlgorithm', architecture=architecture))
"""
"""What MMRazor writes into a fine-tuned checkpoint, shortened: the pruned estimator is one level deeper than MMPose's own."""


def published(which: int) -> Weights:
    """Random weights in the widths of a published pruned checkpoint."""
    weights, groups = FAMILIES["rtmpose-s"].weights_and_groups(4)
    widths = {f"backbone.{name}": channels[which] for name, channels in PUBLISHED.items()}
    assert widths.keys() == {group.name for group in groups if group.name.startswith("backbone.")}, "MMRazor groups channels in another way"
    return prune(weights, groups, choose_widths(groups, widths, seed=4))


@pytest.mark.parametrize(("which", "name", "millions"), [(0, "rtmpose-c187", 3.42), (1, "rtmpose-c163", 3.43)])
def test_published_pruned_widths_make_networks_of_the_published_size(which: int, name: str, millions: float, tmp_path: Path) -> None:
    model = read_architecture(read_checkpoint(saved(tmp_path / "pruned.pth", published(which), cfg=PUBLISHED_CFG)))
    assert (model.name, model.task, model.input_hw) == (name, "PoseDetector", (256, 192))
    parameters = sum(value.numel() for value in model.module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.005)
    if which == 1:
        assert get_model("rtmpose-s_aic-coco-pruned-256x192").parameters_m == millions


def test_a_pruned_checkpoint_becomes_a_verified_bundle(tmp_path: Path) -> None:
    path = saved(tmp_path / "pruned.pth", published(0), cfg=PUBLISHED_CFG)
    (conversion,) = convert(path, [load_config("onnxruntime")], ConvertOptions(out=tmp_path / "crates"))
    assert conversion.error is None, conversion.error
    assert conversion.status == "built"
    assert conversion.parity is not None
    assert conversion.parity.passed
    assert conversion.place.name == "rtmpose-c187_onnxruntime"
    bundle = Bundle.open(conversion.place)
    bundle.verify()
    assert bundle.manifest is not None
    assert [spec.shape for spec in bundle.manifest.outputs] == [("batch", 17, 384), ("batch", 17, 512)]
    with PoseDetector(conversion.place) as estimator:
        assert estimator(np.full((64, 48, 3), 99, dtype=np.uint8), [0, 0, 48, 64]).shape == (1, 17, 3)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("little-pose", ("backbone.", "head.")),
        ("little-detector", ("neck.top_down_blocks.0.", "neck.downsamples.0.", "neck.out_convs.1.", "bbox_head.cls_convs.2.", "bbox_head.rtm_reg.0.")),
    ],
)
def test_one_tensor_that_is_cut_in_another_way_is_refused(family: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    """Every tensor and every axis in its turn lose one channel more than the rest."""
    full = FAMILIES[family]
    weights, groups = full.weights_and_groups(3)
    checkpoint = read_checkpoint(saved(tmp_path / "pruned.pth", prune(weights, groups, choose(groups, seed=3)), cfg=full.cfg))
    read_architecture(checkpoint)
    accepted = []
    for key, value in checkpoint.state_dict.items():
        for axis in range(min(value.dim(), 2)):
            if key.startswith(parts) and value.shape[axis] > 1:
                cut = value.narrow(axis, 0, value.shape[axis] - 1)
                try:
                    read_architecture(replace(checkpoint, state_dict=checkpoint.state_dict | {key: cut}))
                except ArchitectureError as error:
                    assert str(checkpoint.path) in one_line(error)
                else:
                    accepted.append((key, axis))
    assert not accepted


def test_a_pruned_detector_that_exponentiates_still_does(tmp_path: Path) -> None:
    """RTMDet-m is told from s by its depth: pruning has changed its widths."""
    weights = {key: torch.zeros(shape) for key, shape in rtmdet_shapes(widen=0.125, deepen=0.67, classes=1, separable=False).items()}
    model = read_architecture(read_checkpoint(saved(tmp_path / "m.pth", weights, cfg=SMALL_IMAGES)))
    assert model.module.bbox_head.exp_on_reg is True
    assert model.name == "rtmdet-c128"


def test_what_mmrazor_says_of_the_network_is_read(tmp_path: Path) -> None:
    model = read_architecture(read_checkpoint(saved(tmp_path / "pruned.pth", published(1), cfg=PUBLISHED_CFG.replace("123.675", "100.0"))))
    assert model.normalization.mean == (100.0, 116.28, 103.53)
    assert model.facts["mean"] == "the checkpoint's config"
    with pytest.raises(ConfigError, match="use_dark"):
        read_architecture(read_checkpoint(saved(tmp_path / "dark.pth", published(1), cfg=PUBLISHED_CFG.replace("use_dark=False", "use_dark=True"))))


@pytest.mark.parametrize(
    ("key", "axis", "left"),
    [
        ("backbone.stage1.1.main_conv.conv.weight", 0, 1),
        ("backbone.stage1.1.blocks.0.conv2.pointwise_conv.conv.weight", 0, 1),
        ("backbone.stage1.1.attention.fc.weight", 0, 1),
        ("head.gau.uv.weight", 1, 0),
        ("head.mlp.1.weight", 0, 0),
    ],
)
def test_what_would_broadcast_or_vanish_is_refused(key: str, axis: int, left: int, tmp_path: Path) -> None:
    full = FAMILIES["little-pose"]
    weights, _ = full.weights_and_groups(6)
    weights[key] = weights[key].narrow(axis, 0, left)
    layer = key.removesuffix("conv.weight")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if f"{layer}bn.{name}" in weights:
            weights[f"{layer}bn.{name}"] = weights[f"{layer}bn.{name}"][:left]
    if "fc" in key:
        weights["backbone.stage1.1.attention.fc.bias"] = weights["backbone.stage1.1.attention.fc.bias"][:left]
    with pytest.raises(ArchitectureError) as caught:
        read_architecture(read_checkpoint(saved(tmp_path / "pruned.pth", weights, cfg=full.cfg)))
    one_line(caught.value)


def test_a_width_of_another_size_in_the_last_stage_is_not_that_size(tmp_path: Path) -> None:
    weights, groups = FAMILIES["rtmpose-s"].weights_and_groups(8)
    widths = {group.name: group.width - (0 if group.name.startswith("backbone.stage4") else 1) for group in groups}
    model = read_architecture(read_checkpoint(saved(tmp_path / "pruned.pth", prune(weights, groups, choose_widths(groups, widths, seed=8)))))
    assert model.name == "rtmpose-c512"


def test_full_weights_beside_masks_are_not_taken_for_a_pruned_network(tmp_path: Path) -> None:
    """What MMRazor saves while it prunes: nothing is cut yet, and without the masks the network would be another one."""
    weights, groups = FAMILIES["little-pose"].weights_and_groups(5)
    state = {f"architecture.{key}": value for key, value in weights.items()}
    state |= {f"mutator.units.{i}.mutable_channel.mask": torch.ones(group.width) for i, group in enumerate(groups)}
    with pytest.raises(ArchitectureError, match=r"found tensors under .*architecture\.") as caught:
        read_architecture(read_checkpoint(saved(tmp_path / "flops_0.51.pth", state)))
    one_line(caught.value)
