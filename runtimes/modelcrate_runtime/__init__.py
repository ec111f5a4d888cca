"""Thin runtimes for deployment bundles: numpy, OpenCV and whichever backend the bundle names; never torch, never onnx."""

from modelcrate_runtime.results import Classification, Detections, Poses
from modelcrate_runtime.sessions import SessionOptions, open_session
from modelcrate_runtime.tasks import Classifier, Detector, PoseDetector

__all__ = ["Classification", "Classifier", "Detections", "Detector", "PoseDetector", "Poses", "SessionOptions", "open_session"]
