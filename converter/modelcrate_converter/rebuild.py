"""A TensorRT bundle that was built elsewhere, built again for the GPU of this machine from the graph that it carries."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from modelcrate_bundle.bundle import Bundle, BundleWriter, sha256_of
from modelcrate_bundle.errors import BundleIntegrityError, ConfigError, ParityError, UnsupportedBundleError
from modelcrate_bundle.manifest import EngineRecord, Manifest, ParityRecord, Stage, Timing
from modelcrate_converter.builders.tensorrt_builder import ENGINE_NAME, build_engine
from modelcrate_converter.convert import render_readme
from modelcrate_converter.describe import tool_versions
from modelcrate_converter.parity import ParityImage, check_parity, failed_gates
from modelcrate_converter.progress import Report, StageClock, ignore
from modelcrate_converter.verification import artifact_of

if TYPE_CHECKING:
    from modelcrate_converter.config import DeployConfig
    from modelcrate_converter.exportable import ExportableModel

_REWRITTEN = frozenset({"net", "deploy", "pipeline", "detail", "readme"})
"""Roles of files that the writer makes, or that are built again."""


def rebuild(
    bundle: Bundle, config: DeployConfig, *, out: Path, reference: ExportableModel | None, images: Sequence[ParityImage] = (), report: Report = ignore
) -> Bundle:
    """Build a bundle's engine again, and write the bundle anew; everything but the engine stays as it is.

    Args:
        bundle: with the graph that its engine was built from.
        config: its target.
        out: where the new bundle goes; its own folder is replaced when the new one is whole.
        reference: the model that it was made from, to compare with; None compares nothing, and the manifest says so.
        images: what to compare on.
        report: gets the progress.

    Raises:
        UnsupportedBundleError: a bundle without such a graph.
        ConfigError: a target of another backend or precision than the bundle's.
        BundleIntegrityError: the graph is not the one that the manifest has the hash of.
        ParityError: the new engine is outside the gates of its target; the old bundle stays.
    """
    manifest = bundle.manifest
    if manifest is None or manifest.engine is None or bundle.detail is None:
        raise UnsupportedBundleError(f"{bundle.root}: expected a TensorRT bundle of modelcrate, found another", hint="convert its checkpoint again")
    if (config.backend, config.precision) != (manifest.backend, manifest.precision):
        raise ConfigError(
            f"{bundle.root}: target: expected one of {manifest.backend} in {manifest.precision}, found {config.target}, of {config.backend} in {config.precision}",
            hint="convert its checkpoint for another target",
        )
    config = _with_batch(config, manifest)
    graph = bundle.path_of(manifest.engine.onnx)
    if sha256_of(graph) != manifest.engine.onnx_sha256:
        raise BundleIntegrityError(f"{graph}: expected the graph that the engine was built from, found another", hint="copy the bundle again")
    clock = StageClock(report=report)
    with tempfile.TemporaryDirectory(prefix="modelcrate-") as folder, BundleWriter(out) as writer:
        engine = Path(folder) / ENGINE_NAME
        with clock.stage(f"build {config.target}") as detail:
            record = build_engine(graph, tuple(manifest.inputs), config, place=engine, where=manifest.model, report=report)
            detail.append(f"{engine.name} {engine.stat().st_size / 2**20:.1f} MiB")
        parity = ParityRecord(verified=False)
        if reference is not None:
            artifact = replace(
                artifact_of(bundle),
                files={"net": engine, "source": graph},
                engine=record,
                device_id=config.tensorrt.device_id,
                cuda_binding=config.tensorrt.cuda_binding,
            )
            with clock.stage("check parity"):
                parity = check_parity(reference, artifact, images, config.gates)
            if not parity.passed:
                raise ParityError(f"{bundle.name}: expected every figure inside its gate, found {'; '.join(failed_gates(parity))}: the bundle is as it was")
        writer.add(ENGINE_NAME, role="net", content=engine)
        for entry in manifest.files:
            if entry.role not in _REWRITTEN:
                writer.add(entry.path, role=entry.role, content=bundle.path_of(entry.path))
        renewed = _renewed(manifest, record, parity, clock)
        writer.add("README.md", role="readme", content=render_readme(renewed, [entry.path for entry in manifest.files if entry.role == "picture"]))
        return writer.commit(deploy=bundle.deploy, pipeline=bundle.pipeline, detail=bundle.detail, manifest=renewed)


def _with_batch(config: DeployConfig, manifest: Manifest) -> DeployConfig:
    """With the batch range that the manifest promises: a config of MMDeploy, which is not at hand, may have had a say in it."""
    limits = next((manifest.shape_ranges[spec.name] for spec in manifest.inputs if spec.name in manifest.shape_ranges), None)
    if limits is None:
        return config
    batch = msgspec.structs.replace(config.batch, min=limits.min[0], opt=limits.opt[0], max=limits.max[0])
    return msgspec.structs.replace(config, batch=batch)


def _renewed(manifest: Manifest, record: EngineRecord, parity: ParityRecord, clock: StageClock) -> Manifest:
    provenance = msgspec.structs.replace(manifest.provenance, tools=tool_versions(), build_key="")
    timing = Timing(
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), stages=[Stage(name=name, seconds=round(s, 3)) for name, s in clock.seconds.items()]
    )
    return msgspec.structs.replace(manifest, engine=record, parity=parity, provenance=provenance, timing=timing, files=[], content_sha256="")
