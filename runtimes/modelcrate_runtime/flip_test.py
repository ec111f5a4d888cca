"""The flip test: a network sees each crop mirrored too, and what it says of both is averaged (MMPose `mmpose.models.utils.tta`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from modelcrate_bundle.errors import ConfigError
from modelcrate_bundle.schema import HeatmapDecodeParams, SimCCLabelDecodeParams
from modelcrate_runtime.tasks import PoseDetector

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from modelcrate_bundle.manifest import KeypointInfo
    from modelcrate_bundle.tensors import TensorSpec
    from modelcrate_runtime.sessions import Session
    from modelcrate_runtime.subjects import Subject, Wrap

Outputs: TypeAlias = "dict[str, NDArray[np.generic]]"
Axis: TypeAlias = Literal["mirrored", "kept", "shifted"]
"""What becomes of the last axis of an output: turned round; left (SimCC's y); turned round and moved by one cell to the right."""

_POSE_ONLY: Final = "leave --flip-test out"


class FlipSession:
    """A session that runs the mirrored input beside the input.

    Attributes:
        inputs: the network's.
        outputs: the network's.
        streams: the network's.
    """

    def __init__(self, session: Session, *, image: str, swaps: NDArray[np.intp], axes: Mapping[str, Axis], max_batch: int) -> None:
        """Wrap a session, which is closed with this one.

        Args:
            session: runs the network.
            image: name of the input, (N, C, H, W).
            swaps: (K) for each keypoint the one that has its place in a mirrored image.
            axes: output name -> what becomes of its last axis; outputs are (N, K, ...).
            max_batch: inputs that one call may take; both go into one where they fit.
        """
        self._session = session
        self._image = image
        self._swaps = swaps
        self._axes = axes
        self._max_batch = max_batch
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs

    @property
    def streams(self) -> int:
        """As the session has it."""
        return self._session.streams

    def run(self, feeds: Mapping[str, NDArray[np.generic]]) -> Outputs:
        """Run on the input and its mirror image; the averages have the shapes of the network's outputs, float32."""
        return self._both(feeds, self._session.run)

    def run_beside(self, feeds: Mapping[str, NDArray[np.generic]]) -> Outputs:
        """`run` with a share of the threads."""
        return self._both(feeds, self._session.run_beside)

    def close(self) -> None:
        """Free the network."""
        self._session.close()

    def _both(self, feeds: Mapping[str, NDArray[np.generic]], run: Callable[[Mapping[str, NDArray[np.generic]]], Outputs]) -> Outputs:
        image = feeds[self._image]
        mirrored = np.ascontiguousarray(image[..., ::-1])
        count = len(image)
        if 2 * count <= self._max_batch:
            outputs = run({**feeds, self._image: np.concatenate([image, mirrored])})
            plain, turned = ({name: value[part] for name, value in outputs.items()} for part in (slice(count), slice(count, None)))
        else:
            plain, turned = run(feeds), run({**feeds, self._image: mirrored})
        return {name: self._average(name, value, turned[name]) for name, value in plain.items()}

    def _average(self, name: str, plain: NDArray[Any], turned: NDArray[Any]) -> NDArray[np.generic]:
        back = turned[:, self._swaps].astype(np.float32)
        axis = self._axes[name]
        if axis != "kept":
            back = back[..., ::-1]
        if axis == "shifted":
            back = np.concatenate([back[..., :1], back[..., :-1]], axis=-1)
        average: NDArray[np.generic] = (plain.astype(np.float32) + back) * np.float32(0.5)
        return average


def flip_test(subject: Subject) -> Wrap:
    """What `Subject.open` is to wrap the network of a pose estimator in.

    SimCC vectors are turned round along x. Heatmaps too; those that are not UDP's are then moved by one cell to the right, as MMPose's configs have it with
    `shift_heatmap`: their cell i is pixel 4 i of the input, whose mirror image 4 (w - 1 - i) + 3 is nearer to the cell after the one that turning round gives.

    Args:
        subject: whose network it is.

    Returns:
        The wrap; it raises ConfigError for another task, for outputs that cannot be averaged, and where it is not known which keypoints change places.
    """

    def wrap(session: Session) -> Session:
        task = subject.open_around(session)  # to learn what the network says; it is not run
        if not isinstance(task, PoseDetector):
            raise ConfigError(f"{subject.name}: flip test: expected a pose estimator, found a {type(task).__name__}", hint=_POSE_ONLY)
        return FlipSession(
            session,
            image=task.bundle.pipeline.net.input_map.get("img", session.inputs[0].name),
            swaps=_swaps(task.keypoints, where=subject.name),
            axes=_axes(task, session, where=subject.name),
            max_batch=task.max_batch,
        )

    return wrap


def _swaps(keypoints: KeypointInfo, *, where: str) -> NDArray[np.intp]:
    if not keypoints.flip_pairs and keypoints.names[0] == "keypoint_0":
        raise ConfigError(f"{where}: flip test: expected to know which keypoints change places in a mirrored image, found numbered ones", hint=_POSE_ONLY)
    swaps = np.arange(len(keypoints.names))
    for one, other in keypoints.flip_pairs:
        swaps[[one, other]] = other, one
    return swaps


def _axes(task: PoseDetector, session: Session, *, where: str) -> dict[str, Axis]:
    params = task.bundle.pipeline.postprocess.params
    if isinstance(params, HeatmapDecodeParams):
        return {spec.name: "mirrored" if params.use_udp else "shifted" for spec in session.outputs}
    if isinstance(params, SimCCLabelDecodeParams) and not params.export_postprocess:
        names = task.bundle.pipeline.net.output_map
        return {names.get("simcc_x", "simcc_x"): "mirrored", names.get("simcc_y", "simcc_y"): "kept"}
    raise ConfigError(f"{where}: flip test: expected SimCC vectors or heatmaps, found {task.bundle.pipeline.postprocess.component} of points", hint=_POSE_ONLY)
