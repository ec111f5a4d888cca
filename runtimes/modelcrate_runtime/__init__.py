"""Thin runtimes for deployment bundles: numpy, OpenCV and whichever backend the bundle names; never torch, never onnx."""

from modelcrate_runtime.results import Classification, Detections, Poses, Tensors
from modelcrate_runtime.sessions import SessionOptions, open_session
from modelcrate_runtime.tasks import Classifier, Detector, Network, PoseDetector

__all__ = ["Classification", "Classifier", "Detections", "Detector", "Network", "PoseDetector", "Poses", "SessionOptions", "Tensors", "open_session"]
