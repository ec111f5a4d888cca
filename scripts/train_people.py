"""Trains the two demo models on procedural people: a detector (RTMDet) and a pose estimator (RTMPose), from nothing, on a CPU.

usage: .venv/bin/python scripts/train_people.py {det,pose} -o FILE.pth [--steps N] [--batch N] [--threads N] [--seed N] [--device cpu] [--resume]

Prints a line every 100 steps, and writes FILE.state every 1000 steps, from which --resume goes on. The file has upstream's state-dict layout and carries
its config, class and keypoint names, and how it was made. The same seed, steps and threads give the same data; float sums may differ between machines.

Losses: RTMPose's KL divergence on SimCC vectors (Jiang et al. 2023) with, in the first half, the same coarse question asked of the last feature map, which
makes tokens mean their keypoints early; RTMDet's quality focal loss and GIoU with dynamic soft label assignment (Lyu et al. 2022).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelcrate_converter.models.blueprints import rtmdet_shapes, rtmpose_shapes
from modelcrate_converter.models.rtmdet import STRIDES, RTMDet
from modelcrate_converter.models.rtmpose import RTMPose
from modelcrate_converter.people import DATA_VERSION, Scene, draw_scene
from modelcrate_runtime.skeletons import COCO_17

POSE_HW = (256, 192)
DET_SIDE = 320
SPLIT = 2
SIGMA = (4.9, 5.66)
BETA = 10.0
PADDING = 1.25
POSE_MEAN, POSE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
DET_MEAN, DET_STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # BGR


# ------------------------------------------------------------------------------------------------------------------------ data


def pose_batches(seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Crops (N, 3, H, W) uint8 RGB, keypoints (N, 17, 2) in input pixels, weights (N, 17) of what is in the crop."""
    rng = np.random.default_rng((seed, 1))
    index = 0
    crops, points, weights = [], [], []
    while True:
        scene = draw_scene(seed, index, size_hw=[(320, 320), (360, 480), (448, 336)][index % 3])
        index += 1
        for person in scene.people:
            if person.is_hard:
                continue
            crop, matrix = _jittered_crop(rng, scene.image, person.box_xyxy)
            moved = person.keypoints[:, :2] @ matrix[:, :2].T + matrix[:, 2]
            inside = (moved >= 0).all(axis=1) & (moved[:, 0] <= POSE_HW[1] - 1) & (moved[:, 1] <= POSE_HW[0] - 1)
            crops.append(torch.from_numpy(np.ascontiguousarray(crop[:, :, ::-1]).transpose(2, 0, 1)))
            points.append(torch.from_numpy(moved.astype(np.float32)))
            weights.append(torch.from_numpy(((person.keypoints[:, 2] > 0) & inside).astype(np.float32)))
        if len(crops) >= batch:
            yield torch.stack(crops[:batch]), torch.stack(points[:batch]), torch.stack(weights[:batch])
            crops, points, weights = crops[batch:], points[batch:], weights[batch:]


def _jittered_crop(rng: np.random.Generator, image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MMPose's top-down crop of a box that is a little off in place, size and angle, as a detector's is."""
    height, width = POSE_HW
    side = box[2:] - box[:2]
    center = (box[:2] + box[2:]) / 2 + rng.uniform(-0.06, 0.06, 2) * side
    w, h = side * PADDING
    w, h = (w, w * height / width) if w * height > h * width else (h * width / height, h)
    scale = width / w / math.exp(rng.uniform(-0.22, 0.25))
    angle = float(rng.normal(0, 12)) if rng.random() < 0.5 else 0.0
    cosine, sine = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    matrix = np.array(((cosine, -sine, 0), (sine, cosine, 0)))
    matrix[:, 2] = np.array((width / 2, height / 2)) - matrix[:, :2] @ center
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR), matrix


def det_batches(seed: int, batch: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Images (N, 3, 320, 320) uint8 BGR, and for each its boxes (n, 4)."""
    rng = np.random.default_rng((seed, 2))
    index = 0
    while True:
        images, boxes = [], []
        for _ in range(batch):
            image, found = _padded(rng, draw_scene(seed, index, size_hw=_shape(rng), people=(0, 6) if index % 12 == 0 else (1, 6)))
            index += 1
            images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
            boxes.append(torch.from_numpy(found))
        yield torch.stack(images), boxes


def _shape(rng: np.random.Generator) -> tuple[int, int]:
    """Square images mostly, else what is left of a 320 px square when a wide or tall one is fitted into it."""
    if rng.random() < 0.6:
        return DET_SIDE, DET_SIDE
    short = int(rng.integers(160, DET_SIDE))
    return (short, DET_SIDE) if rng.random() < 0.6 else (DET_SIDE, short)


def _padded(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    image = scene.image
    boxes = np.array([person.box_xyxy for person in scene.people if not person.is_hard], dtype=np.float32).reshape(-1, 4)
    if rng.random() < 0.5:
        image = image[:, ::-1]
        boxes = np.stack([image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0], boxes[:, 3]], axis=1)
    canvas = np.full((DET_SIDE, DET_SIDE, 3), 114, dtype=np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas, np.ascontiguousarray(boxes)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    values = (images.float() - torch.tensor(mean, device=images.device)[None, :, None, None]) / torch.tensor(std, device=images.device)[None, :, None, None]
    return values.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------- losses


def simcc_loss(outputs: tuple[Tensor, Tensor], points: Tensor, weights: Tensor) -> Tensor:
    """MMPose's KLDiscretLoss with beta 10 and softmax over Gaussian labels, summed over both axes."""
    total = torch.zeros((), device=points.device)
    for axis, (logits, sigma) in enumerate(zip(outputs, SIGMA, strict=True)):
        bins = torch.arange(logits.shape[2], device=logits.device, dtype=torch.float32)
        target = F.softmax(torch.exp(-((bins - points[:, :, axis, None] * SPLIT) ** 2) / (2 * sigma**2)) * BETA, dim=2)
        divergence = F.kl_div(F.log_softmax(logits.float() * BETA, dim=2), target, reduction="none").mean(dim=2)
        total = total + (divergence * weights).sum() / weights.sum().clamp(min=1) * logits.shape[2]
    return total


def coarse_loss(maps: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Cross entropy of each keypoint's map (N, 17, h, w) with the cell that the keypoint lies in, softened to its neighbours."""
    height, width = maps.shape[2:]
    x = torch.arange(width, device=maps.device) + 0.5
    y = torch.arange(height, device=maps.device) + 0.5
    place = points / 32
    near = -((x[None, None, None] - place[:, :, None, None, 0]) ** 2 + (y[None, None, :, None] - place[:, :, None, None, 1]) ** 2) / (2 * 0.45**2)
    target = F.softmax(near.flatten(2), dim=2)
    loss = -(target * F.log_softmax(maps.float().flatten(2), dim=2)).sum(dim=2)
    return (loss * weights).sum() / weights.sum().clamp(min=1)


def cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """(A, 2) points and (A,) strides of all cells, in the order of the flattened levels. The point of a cell is its left top corner (offset 0)."""
    points, strides = [], []
    for stride in STRIDES:
        count = DET_SIDE // stride
        line = torch.arange(count, device=device, dtype=torch.float32) * stride
        y, x = torch.meshgrid(line, line, indexing="ij")
        points.append(torch.stack([x.flatten(), y.flatten()], dim=1))
        strides.append(torch.full((count * count,), float(stride), device=device))
    return torch.cat(points), torch.cat(strides)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) IoU of boxes xyxy."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(dim=2)
    areas = [(v[:, 2:] - v[:, :2]).clamp(min=0).prod(dim=1) for v in (a, b)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp(min=1e-6)


def assign(logits: Tensor, boxes: Tensor, truth: Tensor, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic soft label assignment of one image (RTMDet, section 3.3; MMDetection `DynamicSoftLabelAssigner`, top 13).

    Returns:
        (A,) index into `truth`, -1 for background; (A,) IoU with it.
    """
    index = torch.full((len(points),), -1, dtype=torch.long, device=points.device)
    quality = torch.zeros(len(points), device=points.device)
    if not len(truth):
        return index, quality
    inside = torch.cat([points[:, None] - truth[None, :, :2], truth[None, :, 2:] - points[:, None]], dim=2).amin(dim=2) > 0
    rows = torch.nonzero(inside.any(dim=1)).flatten()
    if not len(rows):
        return index, quality
    iou = pairwise_iou(boxes[rows], truth)
    center = (truth[:, :2] + truth[:, 2:]) / 2
    distance = torch.linalg.vector_norm(points[rows, None] - center[None], dim=2) / strides[rows, None]
    score = logits[rows, None].sigmoid()
    cost = F.binary_cross_entropy_with_logits(logits[rows, None].expand_as(iou), iou, reduction="none") * (iou - score).abs() ** 2
    cost = cost - 3 * torch.log(iou + 1e-7) + torch.pow(10, distance - 3)
    cost = torch.where(inside[rows], cost, 1e8)
    taken = torch.zeros_like(iou, dtype=torch.bool)
    counts = torch.topk(iou, min(13, len(rows)), dim=0).values.sum(dim=0).int().clamp(min=1)
    for i in range(len(truth)):
        taken[torch.topk(cost[:, i], int(counts[i]), largest=False).indices, i] = True
    taken &= inside[rows]
    several = taken.sum(dim=1) > 1
    if several.any():
        best = cost[several].argmin(dim=1)
        taken[several] = F.one_hot(best, len(truth)).bool()
    positive = taken.any(dim=1)
    which = taken[positive].int().argmax(dim=1)
    index[rows[positive]] = which
    quality[rows[positive]] = iou[positive].gather(1, which[:, None])[:, 0]
    return index, quality


def giou(a: Tensor, b: Tensor) -> Tensor:
    """(n,) generalised IoU of pairs of boxes (Rezatofighi et al. 2019)."""
    common = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    union = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(dim=1) + (b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) - common
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    return common / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def det_loss(outputs: tuple[Tensor, ...], truth: list[Tensor], points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """Quality focal loss (beta 2) on all cells and twice the GIoU loss on the assigned ones, both over the sum of the assigned qualities."""
    logits = torch.cat([v.float().flatten(2) for v in outputs[:3]], dim=2)[:, 0]
    distances = torch.cat([v.float().flatten(2) for v in outputs[3:]], dim=2).transpose(1, 2)
    boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=2)
    with torch.no_grad():
        pairs = [assign(logits[i], boxes[i], truth[i], points, strides) for i in range(len(truth))]
    target = torch.stack([quality for _, quality in pairs])
    total = target.sum().clamp(min=1)
    focal = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * (target - logits.sigmoid()).abs() ** 2).sum() / total
    box = torch.zeros((), device=points.device)
    for i, (index, quality) in enumerate(pairs):
        rows = index >= 0
        if rows.any():
            box = box + ((1 - giou(boxes[i][rows], truth[i][index[rows]])) * quality[rows]).sum()
    return focal, 2 * box / total


# -------------------------------------------------------------------------------------------------------------------- training


def initialise(module: nn.Module, seed: int) -> None:
    """Kaiming for convolutions, truncated normal for linear layers, RTMDet's prior of one in a hundred."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out" if layer.groups == 1 else "fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
    for name, parameter in module.named_parameters():
        if name.endswith(("gau.gamma", "gau.beta")):
            nn.init.normal_(parameter, std=0.02) if name.endswith("gamma") else nn.init.zeros_(parameter)
        if "rtm_cls" in name:
            nn.init.constant_(parameter, -math.log(99)) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)
        if "rtm_reg" in name:
            # Distances are strides times this: boxes start three cells wide to each side, with a gradient wherever the overlap begins.
            nn.init.constant_(parameter, 3.0) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)
        if name.endswith("final_layer.weight"):
            nn.init.normal_(parameter, std=0.01)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 300 steps, flat for a third, then a cosine to a fiftieth."""
    if step < 300:
        return peak * (step + 1) / 300
    start = steps // 3
    if step < start:
        return peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("det", "pose"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=None, help="default: 32 crops, 16 images")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    train(options)


def train(options: argparse.Namespace) -> None:
    is_pose = options.task == "pose"
    device = torch.device(options.device)
    if is_pose:
        model: nn.Module = RTMPose(rtmpose_shapes(widen=0.25, deepen=0.167, keypoints=17, input_hw=POSE_HW))
    else:
        model = RTMDet(rtmdet_shapes(widen=0.25, deepen=0.33, classes=1, separable=True), share_conv=False, exp_on_reg=False)
    initialise(model, options.seed)
    for layer in model.modules():
        if isinstance(layer, nn.SiLU):
            layer.inplace = False  # autograd needs what it read
    model = model.train().to(device, memory_format=torch.channels_last)
    batch = options.batch or (32 if is_pose else 16)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=1e-3)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state_path = options.out.with_suffix(".state")
    first = 0
    if options.resume and state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, first = state["average"], state["step"]

    def save(done: int) -> None:
        torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": done}, state_path)
        write(options, average, done, batch)

    features: list[Tensor] = []
    if is_pose:
        model.head.final_layer.register_forward_hook(lambda _module, _inputs, output: features.append(output))  # type: ignore[union-attr]
    points, strides = cells(device)
    # A run that goes on draws other scenes than the run before it.
    data: Any = (pose_batches if is_pose else det_batches)(options.seed + first, batch)
    peak = 2e-3 if is_pose else 1.5e-3
    started, seen = time.monotonic(), {"loss": 0.0, "first": 0.0, "second": 0.0}
    for step in range(first, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options.steps, peak)
        features.clear()
        if is_pose:
            crops, keypoints, weights = (v.to(device) for v in next(data))
            with torch.autocast(device.type, torch.bfloat16):
                outputs = model(normalised(crops, POSE_MEAN, POSE_STD))
            one, two = simcc_loss(outputs, keypoints, weights), coarse_loss(features[0], keypoints, weights)
            loss = one + max(0.0, 1 - 2 * step / options.steps) * 0.5 * two
        else:
            images, truth = next(data)
            with torch.autocast(device.type, torch.bfloat16):
                outputs = model(normalised(images.to(device), DET_MEAN, DET_STD))
            one, two = det_loss(outputs, [boxes.to(device) for boxes in truth], points, strides)
            loss = one + two
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad()
        decay = min(0.9995, (step + 1) / (step + 100))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
                else:
                    average[key].copy_(value)
        for key, value in (("loss", loss), ("first", one), ("second", two)):
            seen[key] += float(value.detach()) / 100
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - started) / (step + 1 - first)
            print(
                f"step {step + 1:6d} of {options.steps}  loss {seen['loss']:.4f} ({seen['first']:.4f}, {seen['second']:.4f})  {seconds:.3f} s a step, "
                f"{seconds * (options.steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
            seen = dict.fromkeys(seen, 0.0)
        if (step + 1) % 1000 == 0 and step + 1 < options.steps:
            save(step + 1)
    save(max(first, options.steps))
    print(f"wrote {options.out} after {(time.monotonic() - started) / 60:.0f} minutes")


# ------------------------------------------------------------------------------------------------------------------------ file

POSE_CONFIG = f"""
codec = dict(type='SimCCLabel', input_size={POSE_HW[::-1]}, sigma={SIGMA}, simcc_split_ratio={float(SPLIT)}, normalize=False, use_dark=False)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(type='PoseDataPreprocessor', mean={list(POSE_MEAN)}, std={list(POSE_STD)}, bgr_to_rgb=True),
    head=dict(type='RTMCCHead', decoder=codec),
    test_cfg=dict(flip_test=False))
val_pipeline = [
    dict(type='LoadImage'), dict(type='GetBBoxCenterScale'), dict(type='TopdownAffine', input_size=codec['input_size']), dict(type='PackPoseInputs')]
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=val_pipeline))
"""
POSE_META = {
    "dataset_name": "coco",
    "num_keypoints": len(COCO_17.names),
    "keypoint_id2name": dict(enumerate(COCO_17.names)),
    "skeleton_links": COCO_17.skeleton,
    "flip_pairs": COCO_17.flip_pairs,
    "sigmas": COCO_17.sigmas,
    "keypoint_colors": COCO_17.colors,
    "skeleton_link_colors": COCO_17.link_colors,
}
DET_CONFIG = f"""
model = dict(
    type='RTMDet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean={list(DET_MEAN)}, std={list(DET_STD)}, bgr_to_rgb=False),
    bbox_head=dict(type='RTMDetSepBNHead', num_classes=1, exp_on_reg=False, share_conv=False,
                   anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides={list(STRIDES)})),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100))
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=({DET_SIDE}, {DET_SIDE}), keep_ratio=True),
    dict(type='Pad', size=({DET_SIDE}, {DET_SIDE}), pad_val=dict(img=(114, 114, 114))), dict(type='PackDetInputs')]
"""


def write(options: argparse.Namespace, state: dict[str, Tensor], step: int, batch: int) -> None:
    """The averaged weights, as upstream's files have them."""
    is_pose = options.task == "pose"
    made = {"data": DATA_VERSION, "seed": options.seed, "steps": step, "batch": batch, "license": "Apache-2.0; drawn data only, no photographs"}
    meta = {
        "cfg": POSE_CONFIG if is_pose else DET_CONFIG,
        "dataset_meta": POSE_META if is_pose else {"classes": ("person",)},
        "modelcrate": json.dumps(made),
    }
    temporary = options.out.with_suffix(".partial")
    # OpenMMLab's files are of torch's older format too; beside a zip of as many small tensors it is also the smaller one.
    content = {"meta": meta, "state_dict": {key: value.detach().cpu().contiguous() for key, value in state.items()}}
    torch.save(content, temporary, _use_new_zipfile_serialization=False)
    temporary.replace(options.out)


if __name__ == "__main__":
    main()
