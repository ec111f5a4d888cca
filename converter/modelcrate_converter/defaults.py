"""What published configs say of facts that neither the weights nor a given config tell. Each use of one is stated in the output."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

POSE_MEAN: Final = (123.675, 116.28, 103.53)
POSE_STD: Final = (58.395, 57.12, 57.375)
"""RGB, image levels: ImageNet's, as all RTMPose configs have them."""
DETECTOR_MEAN: Final = (103.53, 116.28, 123.675)
DETECTOR_STD: Final = (57.375, 57.12, 58.395)
"""BGR: RTMDet does not swap the channels."""
DETECTOR_PAD_VALUE: Final = 114
BOX_PADDING: Final = 1.25
"""MMPose's GetBBoxCenterScale."""
CLASSIFIER_CROP_HW: Final = (224.0, 224.0)
CLASSIFIER_EDGE: Final = 236
CLASSIFIER_TOPK: Final = 5
"""MMPretrain's CSPNeXt configs: the shorter edge to 236 with Pillow's bicubic, the middle 224x224, the five best of 1000."""
HEATMAP_INPUT_WH: Final = (192.0, 256.0)
HEATMAP_SIGMA: Final = 2.0
BLUR_KERNEL_SIZE: Final = 11
"""MMPose's UDPHeatmap and MSRAHeatmap codecs, as the CSPNeXt configs have them."""
PERSON_TEST_CFG: Final = {"score_thr": 0.05, "iou_threshold": 0.6, "max_per_img": 100, "nms_pre": 1000, "min_bbox_size": 0}
"""The one-class RTMDet configs of MMPose's RTMPose project."""
COCO_TEST_CFG: Final = {"score_thr": 0.001, "iou_threshold": 0.65, "max_per_img": 300, "nms_pre": 30000, "min_bbox_size": 0}
"""The 80-class RTMDet configs of MMDetection."""

COCO_CLASSES: Final = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant", "stop sign",
    "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop",
    "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def detector_class_names(count: int) -> list[str]:
    """COCO's names for 80 classes, else numbered ones."""
    return list(COCO_CLASSES) if count == len(COCO_CLASSES) else numbered_classes(count)


def classifier_class_names(count: int) -> list[str]:
    """ImageNet's names for 1000 classes, in the order of ILSVRC 2012's sorted WordNet ids; else numbered ones."""
    return (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines() if count == 1000 else numbered_classes(count)


def numbered_classes(count: int) -> list[str]:
    """class_0, class_1 ..."""
    return [f"class_{i}" for i in range(count)]


def simcc_sigma(size: int) -> float:
    """Label width in SimCC bins for an axis of `size` pixels: the published (4.9, 5.66), (6.0, 6.93) are the square root of an eighth."""
    return round(math.sqrt(size / 8), 2)
