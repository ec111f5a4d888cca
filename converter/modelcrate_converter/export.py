"""PyTorch, or an ONNX file of somebody else, to the canonical ONNX graph: opset 17, IR <= 9, float32 in and out, one file, named axes, dynamic batch, raw head, no custom operators."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from modelcrate_bundle.errors import ExportError
from modelcrate_bundle.tensors import TensorSpec
from modelcrate_converter.exportable import OnnxNetwork

if TYPE_CHECKING:
    import onnx

    from modelcrate_converter.config import OnnxOptions
    from modelcrate_converter.exportable import ExportableModel

MAX_IR_VERSION: Final = 9
"""The newest that the ONNX Runtime inside MMDeploy's SDK 1.3.1 reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxModel:
    """An ONNX file of ours.

    Attributes:
        path: the file.
        sha256: its hash.
        opset: version of the default operator set.
        inputs: the graph's inputs.
        outputs: the graph's outputs.
        op_counts: operator -> how often it stands in the graph.
    """

    path: Path
    sha256: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    op_counts: Mapping[str, int]

    @property
    def node_count(self) -> int:
        """Operators in the graph."""
        return sum(self.op_counts.values())


def export_onnx(model: ExportableModel, options: OnnxOptions, *, workdir: Path) -> OnnxModel:
    """Export the raw network.

    Args:
        model: the network and its specs.
        options: exporter and opset. "dynamo" cannot write opset 17: it writes 18 at least.
        workdir: where `canonical.onnx` goes.

    Raises:
        ExportError: the exporter failed, or its graph has a custom operator.
    """
    import onnx

    metadata = {"checkpoint": model.checkpoint[1], "model": model.name}
    if isinstance(model.module, OnnxNetwork):
        return save_onnx(_given(model.module), workdir / "canonical.onnx", inputs=(model.input,), outputs=model.outputs, metadata=metadata)
    # Two samples: with one, both exporters may take the batch for a constant.
    sample = torch.zeros(model.fixed_batch or 2, *(dim for dim in model.input.shape[1:] if isinstance(dim, int)))
    path = workdir / "exported.onnx"
    names = [spec.name for spec in model.outputs]
    is_dynamic = model.fixed_batch is None
    dynamic = {name: {0: "batch"} for name in [model.input.name, *names]} if is_dynamic else None
    try:
        with _silenced():
            if options.exporter == "dynamo":
                torch.onnx.export(
                    model.module, (sample,), str(path), input_names=[model.input.name], output_names=names, opset_version=max(options.opset, 18), dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if is_dynamic else None, external_data=False, verbose=False,
                )  # fmt: skip
            else:
                network: Any = model.module
                if any(isinstance(part, torch.jit.ScriptModule) for part in network.modules()):
                    # The exporter's own tracer refuses TorchScript inside a module; this one takes it.
                    network = torch.jit.trace(network, (sample,), check_trace=False)  # type: ignore[no-untyped-call]
                torch.onnx.export(
                    network, (sample,), str(path), input_names=[model.input.name], output_names=names, opset_version=options.opset, dynamo=False,
                    dynamic_axes=dynamic, do_constant_folding=True,
                )  # fmt: skip
        proto = onnx.load(path)
    except Exception as error:  # the exporters raise whatever they like
        raise ExportError(
            f"{model.name}: expected torch.onnx to export the network, found: {' '.join(str(error).split())[:300]}",
            hint=f"try the other exporter: --exporter {'torchscript' if options.exporter == 'dynamo' else 'dynamo'}",
        ) from error
    return save_onnx(proto, workdir / "canonical.onnx", inputs=(model.input,), outputs=model.outputs, metadata=metadata)


def _given(network: OnnxNetwork) -> onnx.ModelProto:
    """A graph as somebody else wrote it, with the outputs that are wanted and no weights among its inputs, where old files list them."""
    import onnx

    proto = onnx.load(network.path)
    proto.ir_version = max(proto.ir_version, 4)  # before it, weights had to be inputs
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    outputs = {value.name: value for value in proto.graph.output}
    del proto.graph.input[:], proto.graph.output[:]
    proto.graph.input.extend(inputs)
    proto.graph.output.extend(outputs[name] for name in network.outputs)
    return proto


def save_onnx(proto: onnx.ModelProto, path: Path, *, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], metadata: Mapping[str, str]) -> OnnxModel:
    """Normalise a graph and write it as one file: stated shapes, our metadata and nothing of the machine it was made on.

    Args:
        proto: the graph; it is changed.
        path: where to write it.
        inputs: what its inputs must be.
        outputs: what its outputs must be.
        metadata: goes into `metadata_props`, sorted.

    Raises:
        ExportError: custom operators, or inputs and outputs with other names.
    """
    import onnx

    foreign = sorted({f"{node.domain}::{node.op_type}" for node in all_nodes(proto.graph) if node.domain not in {"", "ai.onnx"}})
    if foreign or proto.functions:
        raise ExportError(
            f"{path.name}: expected standard ONNX operators, found {', '.join(foreign) or 'local functions'}",
            hint="no artefact of modelcrate has custom operators: export the network again without them",
        )
    for values, specs in ((proto.graph.input, inputs), (proto.graph.output, outputs)):
        found = [value.name for value in values]
        if found != [spec.name for spec in specs]:
            raise ExportError(f"{path.name}: expected the tensors {[spec.name for spec in specs]}, found {found}")
        del values[:]
        values.extend(onnx.helper.make_tensor_value_info(spec.name, _element_type(spec.dtype), spec.shape) for spec in specs)
    for node in all_nodes(proto.graph):
        node.ClearField("doc_string")
        node.ClearField("metadata_props")  # the dynamo exporter writes stack traces with paths here
    del proto.graph.value_info[:]  # intermediate shapes with the exporter's symbols; every reader infers its own
    proto.graph.name = metadata.get("model", "modelcrate")
    proto.doc_string = ""
    proto.ir_version = min(proto.ir_version, MAX_IR_VERSION)
    proto.producer_name, proto.producer_version = "modelcrate", ""
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(data)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"})
    counts = dict(sorted(Counter(node.op_type for node in proto.graph.node).items()))
    return OnnxModel(path=path, sha256=hashlib.sha256(data).hexdigest(), opset=opset, inputs=inputs, outputs=outputs, op_counts=counts)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the branches and loops in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def _element_type(dtype: str) -> int:
    import numpy as np
    import onnx

    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The exporters announce their deprecation, their progress and the graph that they fail on, on every channel there is, C++'s among them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device, not a path
        os.dup2(nowhere.fileno(), 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        logger.setLevel(level)
