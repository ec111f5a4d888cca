"""PyTorch's network behind the runtime's own face: everything that runs a bundle runs its checkpoint too, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch

from modelcrate_bundle.bundle import Bundle
from modelcrate_bundle.errors import ConfigError, InputError, MissingBackendError
from modelcrate_bundle.manifest import Manifest, ParityRecord, Provenance
from modelcrate_converter.builders import BackendArtifact
from modelcrate_converter.config import DeployConfig
from modelcrate_converter.describe import describe_deploy, describe_pipeline
from modelcrate_converter.exportable import BoxesFacts
from modelcrate_runtime.accuracy import Accuracy, Dataset, evaluate_boxes, evaluate_keypoints
from modelcrate_runtime.sessions import LayerTime
from modelcrate_runtime.subjects import Subject
from modelcrate_runtime.tasks import Classifier, Detector, Network, PoseDetector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_converter.exportable import ExportableModel
    from modelcrate_runtime.sessions import Session

Task: TypeAlias = Detector | PoseDetector | Classifier | Network

_TASKS: Final[Mapping[str, type[Task]]] = {"Detector": Detector, "PoseDetector": PoseDetector, "Classifier": Classifier, "Network": Network}


class TorchSession:
    """A checkpoint's network in eager PyTorch, float32, as a `Session`.

    Attributes:
        inputs: the network's input.
        outputs: its outputs.
        streams: always 1.
    """

    def __init__(self, model: ExportableModel, *, device: str = "", threads: int | None = None) -> None:
        """Take the network.

        Args:
            model: what a checkpoint is.
            device: "cpu", "cuda" or "cuda:N" to run on; empty is the CPU.
            threads: inside one operator, of this whole process; None leaves it as it is.

        Raises:
            MissingBackendError: a PyTorch without CUDA, or without a GPU.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MissingBackendError(f"PyTorch: expected to run on {device}, found no GPU that this PyTorch can use", hint="--device cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or "cpu")
        self._model: ExportableModel | None = model
        model.module.to(self._device)
        self.inputs: tuple[TensorSpec, ...] = (model.input,)
        self.outputs: tuple[TensorSpec, ...] = tuple(model.outputs)
        self.streams = 1

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run once. (N, C, H, W) float32 in; output name -> array out.

        Raises:
            InputError: the session is closed, or an input has another name.
        """
        if self._model is None:
            raise InputError("PyTorch: expected an open session, found a closed one")
        name = self.inputs[0].name
        if feeds.keys() != {name}:
            raise InputError(f"PyTorch: expected the input {name}, found {', '.join(feeds)}")
        with torch.inference_mode():
            values = self._model.module(torch.from_numpy(np.array(feeds[name])).to(self._device))  # a copy: a network may change its input
        found: dict[str, NDArray[Any]] = {spec.name: value.cpu().numpy() for spec, value in zip(self.outputs, values, strict=True)}
        return found

    run_beside = run

    def layer_times(self, feeds: Mapping[str, NDArray[np.generic]], *, runs: int) -> list[LayerTime]:
        """See `TimesLayers`: the modules that have none inside, by clocks before and after each. What happens between modules is nobody's."""
        if self._model is None:
            raise InputError("PyTorch: expected an open session, found a closed one")
        seconds: dict[str, list[float]] = {}
        kinds: dict[str, str] = {}
        started: list[float] = []

        def before(*_: Any) -> None:
            self._wait()
            started.append(time.perf_counter())

        def after(name: str) -> Callable[..., None]:
            def stop(*_: Any) -> None:
                self._wait()
                seconds.setdefault(name, []).append(time.perf_counter() - started.pop())

            return stop

        leaves = [(name, module) for name, module in self._model.module.named_modules() if not any(module.children())]
        hooks = []
        for name, module in leaves:
            kinds[name] = type(module).__name__
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
        try:
            self.run(feeds)
            calls = {name: len(those) for name, those in seconds.items()}  # a module that is used several times is one layer: its calls are added up
            seconds.clear()
            for _ in range(runs):
                self.run(feeds)
        finally:
            for hook in hooks:
                hook.remove()
        summed = {name: np.array(those).reshape(runs, calls[name]).sum(axis=1) for name, those in seconds.items()}
        return [LayerTime(name=name, kind=kinds[name], seconds=float(np.median(those))) for name, those in summed.items()]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Let the network go."""
        self._model = None


def open_unpacked(model: ExportableModel, artifact: BackendArtifact, session: Session | None = None) -> Task:
    """What users of a bundle will get, through the same classes, before it is one.

    Args:
        model: what is being converted.
        artifact: what a builder made of it.
        session: the network, already loaded; None loads the artefact.
    """
    deploy = describe_deploy(model, artifact, DeployConfig(target="", backend=artifact.backend, precision="fp32"))
    pipeline = describe_pipeline(model, has_nms=artifact.has_nms, is_batched=artifact.inputs[0].is_batch_dynamic)
    manifest = Manifest(
        id=model.name,
        model=model.name,
        task=model.task,
        target="",
        backend=artifact.backend,
        precision=artifact.precision,
        geometry="exact",
        inputs=list(artifact.inputs),
        outputs=list(artifact.outputs),
        class_names=model.class_names,
        resampling=model.resampling,
        keypoints=model.keypoints,
        files=[],
        parity=ParityRecord(verified=False),
        provenance=Provenance(checkpoint=model.checkpoint[0], checkpoint_sha256=model.checkpoint[1]),
    )
    bundle = Bundle.of_files(deploy=deploy, pipeline=pipeline, files=artifact.files, manifest=manifest)
    return _TASKS[model.task](bundle, verify=False, session=session)


def open_reference(model: ExportableModel) -> Task:
    """The checkpoint itself as a task: PyTorch's network between the runtime's preprocessing and its decoders, in exact geometry."""
    return open_around(model, TorchSession(model))


def open_around(model: ExportableModel, session: Session) -> Task:
    """The task of a checkpoint around its network, or what stands for it."""
    artifact = BackendArtifact(
        backend="pytorch",
        files={"net": Path(model.checkpoint[0] or model.name)},
        precision="fp32",
        inputs=(model.input,),
        outputs=tuple(model.outputs),
        has_nms=isinstance(model.postprocess, BoxesFacts),
    )
    return open_unpacked(model, artifact, session)


def subject_of(model: ExportableModel, file: Path) -> Subject:
    """A checkpoint as something to measure beside its bundles.

    Args:
        model: what it is.
        file: where its weights are, for their size.
    """
    return Subject(
        name=f"{model.name}_pytorch",
        backend="pytorch",
        precision="fp32",
        size_bytes=file.stat().st_size,
        bundle=None,
        open_network=lambda options: TorchSession(
            model, device=f"cuda:{options.device_id}" if options.device == "cuda" else options.device, threads=options.threads
        ),
        open_around=lambda session: open_around(model, session),
        text=str(file),
    )


def measure_accuracy(task: Task, dataset: Dataset, report: Callable[[int, int], None] | None = None) -> Accuracy:
    """AP of boxes, or of keypoints in true boxes.

    Raises:
        ConfigError: a task that AP says nothing of, or data of other classes or keypoints.
    """
    if isinstance(task, Detector):
        return evaluate_boxes(task, dataset, report)
    if isinstance(task, PoseDetector):
        return evaluate_keypoints(task, dataset, report)
    raise ConfigError(f"{dataset.annotations}: expected a detector or a pose estimator to measure AP of, found a {type(task).__name__}")
