"""The bundle format: typed JSON, a manifest with hashes, a reader for what strangers wrote and a writer that leaves nothing half done."""

from modelcrate_bundle.bundle import Bundle, BundleWriter
from modelcrate_bundle.errors import ModelcrateError
from modelcrate_bundle.manifest import Manifest
from modelcrate_bundle.tensors import ShapeRange, TensorSpec

__all__ = ["Bundle", "BundleWriter", "Manifest", "ModelcrateError", "ShapeRange", "TensorSpec"]
