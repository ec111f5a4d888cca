"""Thin runtimes for deployment bundles: numpy, OpenCV and whichever backend the bundle names; never torch, never onnx."""

from modelcrate_runtime.results import Classification, Detections, Poses, Tensors
from modelcrate_runtime.sessions import SessionOptions, open_session
from modelcrate_runtime.tasks import Classifier, Detector, Network, PoseDetector
from modelcrate_runtime.tracker import PoseTracker, TrackedPoses

__all__ = [
    "Classification",
    "Classifier",
    "Detections",
    "Detector",
    "Network",
    "PoseDetector",
    "PoseTracker",
    "Poses",
    "SessionOptions",
    "Tensors",
    "TrackedPoses",
    "open_session",
]
