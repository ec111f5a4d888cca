"""A bundle against its checkpoint, on any machine: the same comparison as when it was built; and, when it fails, the first tensor that is wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from modelcrate_bundle.errors import BundleFormatError, ConfigError, UnsupportedBundleError
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import DeployConfig, OnnxOptions, load_config, target_names
from modelcrate_converter.export import OnnxModel, export_onnx
from modelcrate_converter.ncnn_network import float_weights, read_network
from modelcrate_converter.observe import normalized, observe
from modelcrate_converter.onnxruntime_graph import lying_tensors
from modelcrate_converter.own_model import read_own_model
from modelcrate_converter.parity import ParityImage, check_parity, network_inputs
from modelcrate_converter.simplify import simplify
from modelcrate_runtime.sessions import open_artefact
from modelcrate_runtime.sessions.ncnn_session import NcnnSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_bundle.bundle import Bundle
    from modelcrate_bundle.manifest import Manifest, ParityRecord
    from modelcrate_converter.exportable import ExportableModel

Tensors: TypeAlias = dict[str, "NDArray[Any]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """One tensor in the graph's order, and how far the bundle's is from PyTorch's graph in float32: max |ours - theirs| / max |theirs|."""

    tensor: str
    operator: str
    relative_linf: float


def read_reference(
    bundle: Bundle, checkpoint: Path, *, model_config: Path | None = None, spec: Path | None = None, builder: str | None = None
) -> ExportableModel:
    """The model that a bundle was made from.

    Args:
        bundle: ours: it has a manifest.
        checkpoint: its checkpoint, or the file that it was made from.
        model_config: as when it was converted.
        spec: of a model of one's own.
        builder: what makes its module.

    Raises:
        BundleFormatError: a bundle without a manifest.
        ConfigError: another checkpoint than the bundle's.
    """
    manifest = _manifest(bundle)
    if spec is not None:
        model = read_own_model(spec, path=checkpoint, builder=builder, name=manifest.model)
    else:
        model = read_architecture(read_checkpoint(checkpoint), model_config=model_config, name=manifest.model)
    if model.checkpoint[1] != manifest.provenance.checkpoint_sha256:
        raise ConfigError(
            f"{checkpoint}: expected the file that the bundle was made from (SHA-256 {manifest.provenance.checkpoint_sha256[:16]}), found {model.checkpoint[1][:16]}",
            hint=f"it was {manifest.provenance.checkpoint}",
        )
    return model


def verify_bundle(bundle: Bundle, model: ExportableModel, images: Sequence[ParityImage], config: DeployConfig | None = None) -> ParityRecord:
    """Compare a bundle with the model that it was made from. A detector that suppresses in its graph is compared in boxes alone.

    Args:
        bundle: the bundle.
        model: see `read_reference`.
        images: what to compare on.
        config: has the gates; None takes those of the bundle's target.
    """
    return check_parity(model, artifact_of(bundle), images, (config or config_of(bundle)).gates)


def artifact_of(bundle: Bundle, *, device_id: int = 0) -> BackendArtifact:
    """A bundle's network as its builder made it; with the GPU to run it on, where it needs one."""
    manifest = _manifest(bundle)
    entry = bundle.model
    files = {"net": bundle.path_of(entry.net)} | ({"weights": bundle.path_of(entry.weights)} if entry.weights else {})
    if manifest.engine is not None:
        files["source"] = bundle.path_of(manifest.engine.onnx)
    return BackendArtifact(
        backend=entry.backend,
        files=files,
        precision=manifest.precision,
        inputs=tuple(manifest.inputs),
        outputs=tuple(manifest.outputs),
        has_nms=bundle.pipeline.postprocess.component == "ResizeBBox",
        engine=manifest.engine,
        device_id=device_id,
    )


def bisect_bundle(bundle: Bundle, model: ExportableModel, images: Sequence[ParityImage]) -> list[Divergence]:
    """Compare the inner tensors of a bundle with those of the float32 graph of its checkpoint, on the first input of the images.

    Args:
        bundle: for a backend that shows its inner tensors.
        model: see `read_reference`.
        images: what to run on.

    Returns:
        The tensors that both have, in the graph's order.

    Raises:
        UnsupportedBundleError: another backend.
    """
    tensor = next(iter(network_inputs(model, images)))
    with tempfile.TemporaryDirectory(prefix="modelcrate-") as folder:
        workdir = Path(folder)
        (workdir / "reference").mkdir()
        graph = _reference_graph(model, workdir / "reference")
        (theirs,) = observe(graph, [tensor], workdir=workdir)
        artifact = artifact_of(bundle)
        if artifact.backend == "onnxruntime":
            ours = _onnxruntime_tensors(artifact, graph, tensor, theirs, workdir=workdir)
        elif artifact.backend == "openvino":
            ours = _openvino_tensors(artifact, tensor, theirs)
        elif artifact.backend == "ncnn":
            ours = _ncnn_tensors(artifact, graph, tensor, theirs)
        else:
            raise UnsupportedBundleError(
                f"{bundle.root}: bisect: expected a bundle for onnxruntime, openvino or ncnn, which show their inner tensors, found {artifact.backend}",
                hint="modelcrate verify compares its outputs",
            )
        operators = _makers(graph)
    order = [name for name in operators if name in theirs and name in ours and theirs[name].shape == ours[name].shape]
    return [Divergence(tensor=name, operator=operators[name], relative_linf=_distance(ours[name], theirs[name])) for name in order]


def _reference_graph(model: ExportableModel, workdir: Path) -> OnnxModel:
    return simplify(export_onnx(model, OnnxOptions(), workdir=workdir), workdir=workdir, metadata={})


def _onnxruntime_tensors(artifact: BackendArtifact, graph: OnnxModel, tensor: NDArray[np.float32], theirs: Tensors, *, workdir: Path) -> Tensors:
    import onnx

    own = OnnxModel(path=artifact.files["net"], sha256="", opset=graph.opset, inputs=artifact.inputs, outputs=artifact.outputs, op_counts={})
    (values,) = observe(own, [tensor], workdir=workdir)
    is_laid_down = any(node.op_type == "Transpose" and node.input[0] == own.inputs[0].name for node in onnx.load(own.path).graph.node)
    lying = lying_tensors(normalized(onnx.load(graph.path))) if is_laid_down else set()
    standing = {spec.name for spec in (*own.inputs, *own.outputs)}
    return {name: values[name].swapaxes(2, 3) if name in lying - standing else values[name] for name in theirs if name in values}


def _openvino_tensors(artifact: BackendArtifact, tensor: NDArray[np.float32], theirs: Tensors) -> Tensors:
    import openvino as ov

    core: Any = ov.Core()
    network = core.read_model(str(artifact.files["net"]), str(artifact.files["weights"]))
    known = {name for operation in network.get_ordered_ops() for port in operation.outputs() for name in port.get_names()}
    shown = [name for name in theirs if name in known]
    have = {name for port in network.outputs for name in port.get_names()}
    network.add_outputs([name for name in shown if name not in have])
    hint = {"bf16": "bf16"}.get(artifact.precision, "f32")
    request = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
    results = request.infer([tensor])
    return {name: np.array(value) for port, value in results.items() for name in port.get_names() if name in shown}


def _ncnn_tensors(artifact: BackendArtifact, graph: OnnxModel, tensor: NDArray[np.float32], theirs: Tensors) -> Tensors:
    """What goes into each layer with weights, and the outputs: pnnx renames everything else, but a layer is known by its weights."""
    import onnx

    proto = normalized(onnx.load(graph.path))  # weights may be Constant nodes
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in proto.graph.initializer}
    waiting = [
        (np.sort(constants[name], axis=None), node.input[0])
        for node in proto.graph.node
        if node.op_type in {"Conv", "Gemm", "MatMul"}
        for name in node.input[1:2]
        if name in constants
    ]
    text, content = (artifact.files[role] for role in ("net", "weights"))
    layers = read_network(text.read_text(encoding="utf-8"), content.read_bytes(), where=str(text))
    layers = [layer for layer in layers if layer.weights and layer.bottoms]
    session = open_artefact("ncnn", artifact.files, artifact.options(), where=str(text))
    assert isinstance(session, NcnnSession)
    try:
        feeds = {artifact.inputs[0].name: tensor}
        blobs = session.blobs(feeds, [layer.bottoms[0] for layer in layers])
        found: Tensors = {name: value for name, value in session.run(feeds).items() if name in theirs}
    finally:
        session.close()
    for layer in layers:
        blob, weights = blobs[layer.bottoms[0]], np.sort(float_weights(layer), axis=None)
        for i, (reference, name) in enumerate(waiting):
            # Convolutions that share their weights are told apart by the size of what they read.
            if reference.size == weights.size and name in theirs and theirs[name].size == blob.size and _distance(weights, reference) < 0.02:
                found[name] = blob.reshape(theirs[name].shape)
                del waiting[i]
                break
    return found


def _makers(graph: OnnxModel) -> dict[str, str]:
    """Tensor -> the operator that makes it, in the graph's order."""
    import onnx

    return {name: node.op_type for node in onnx.load(graph.path).graph.node for name in node.output}


def _distance(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    difference = float(np.abs(ours.astype(np.float64) - theirs).max())
    largest = float(np.abs(theirs).max())
    return difference / largest if largest else difference


def _manifest(bundle: Bundle) -> Manifest:
    if bundle.manifest is None:
        raise BundleFormatError(f"{bundle.root}: expected a bundle of modelcrate, found one without manifest.json", hint="convert its checkpoint again")
    return bundle.manifest


def config_of(bundle: Bundle, target: str | None = None) -> DeployConfig:
    """The deploy config that a bundle was built with, or another one.

    Args:
        bundle: ours: it has a manifest.
        target: the name or the path of another one.

    Raises:
        ConfigError: the bundle's own is not known here.
    """
    manifest = _manifest(bundle)
    if target is not None:
        return load_config(target)
    if manifest.target in target_names():
        return load_config(manifest.target)
    raise ConfigError(
        f"{bundle.root}: target: expected one of {', '.join(target_names())}, found {manifest.target!r}, whose gates are not known here",
        hint="give its deploy config with -t",
    )
