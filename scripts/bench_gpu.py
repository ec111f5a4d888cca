"""Time of one network call on a GPU, from an array on the host to arrays on the host: TensorRT's targets beside the same network in PyTorch, all taking turns.

usage: python scripts/bench_gpu.py [--model rtmpose-m] [--batches 1,8,32] [--rounds 100] [--compile] [--json FILE]

PyTorch runs eager, as a CUDA graph, and with --compile also through torch.compile in the mode "reduce-overhead", which makes graphs as well; in float32
without TF32, and in half. Its inputs and outputs pass through pinned memory, as ours do. The weights are random: speed does not depend on them. Before a
contender is timed, its outputs are compared with eager float32's; what is further away than its precision allows is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from convert_zoo import calm
from modelcrate_bundle.bundle import Bundle
from modelcrate_converter.architecture import read_architecture
from modelcrate_converter.builders import can_build
from modelcrate_converter.checkpoint import read_checkpoint
from modelcrate_converter.config import load_config, target_names
from modelcrate_converter.convert import ConvertOptions, convert
from modelcrate_converter.models.blueprints import random_weights
from modelcrate_converter.zoo import get_model
from modelcrate_runtime import SessionOptions, open_session
from modelcrate_runtime.sessions import BACKENDS
from zoo_table import shapes_of

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Call: TypeAlias = Callable[[Array], dict[str, Array]]
Network: TypeAlias = Callable[[torch.Tensor], Iterable[torch.Tensor]]
FURTHEST: Mapping[str, float] = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.5}
"""Largest difference from eager float32, relative to the largest output."""


class Contender(NamedTuple):
    """One way to run the network, in a precision."""

    precision: str
    call: Call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rtmpose-m")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU and a PyTorch with CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batches = [int(one) for one in options.batches.split(",")]
    model = get_model(options.model)
    medians: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save({"state_dict": calm(random_weights(shapes_of(model), seed=0), path)}, path)
        bundles = build(path, model.name)
        for batch in batches:
            values = np.random.default_rng(batch).standard_normal((batch, 3, *model.input_hw)).astype(np.float32)
            with contextlib.ExitStack() as stack:
                calls = of_torch(path, values.shape, is_compiled=options.compile) | of_ours(bundles, stack)
                for name, value in take_turns(agreeing(calls, values), values, options.rounds).items():
                    medians.setdefault(name, {})[batch] = value
    title = f"{options.model}, {torch.cuda.get_device_name()}, {options.rounds} rounds, medians"
    table = Table("", *(f"batch {batch}, ms" for batch in batches), *(f"times eager fp32, {batch}" for batch in batches), title=title)
    for name, row in medians.items():
        first = medians["torch eager fp32"]
        table.add_row(name, *(f"{row[b]:.3f}" if b in row else "" for b in batches), *(f"{first[b] / row[b]:.2f}" if b in row else "" for b in batches))
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ms": medians}, indent=1) + "\n")


def build(checkpoint: Path, name: str) -> dict[str, Bundle]:
    """The checkpoint for each of TensorRT's targets that this machine can build."""
    configs = [
        config for config in map(load_config, target_names()) if BACKENDS[config.backend].device == "cuda" and can_build(config.backend, config.precision)
    ]
    bundles = {}
    for conversion in convert(checkpoint, configs, ConvertOptions(out=checkpoint.parent, name=name, verify=False)):
        if conversion.error is None:
            bundles[conversion.target] = Bundle.open(conversion.place)
        else:
            print(f"{conversion.target}: left out: {conversion.error}")
    return bundles


def of_torch(checkpoint: Path, shape: tuple[int, ...], *, is_compiled: bool) -> dict[str, Contender]:
    calls = {}
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        subject = read_architecture(read_checkpoint(checkpoint))
        names = [spec.name for spec in subject.outputs]
        module = subject.module.to("cuda", dtype).eval()
        held = torch.zeros(shape, device="cuda", dtype=dtype)
        calls[f"torch eager {precision}"] = Contender(precision, from_host(module, held, names))
        calls[f"torch graph {precision}"] = Contender(precision, from_host(recorded(module, held), held, names))
        if is_compiled:
            calls[f"torch compile {precision}"] = Contender(precision, from_host(torch.compile(module, mode="reduce-overhead", dynamic=False), held, names))
    return calls


def recorded(module: torch.nn.Module, held: torch.Tensor) -> Network:
    """The network on `held` as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):
            module(held)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            outputs = tuple(module(held))
    torch.cuda.synchronize()

    def launch(_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        graph.replay()
        return outputs

    return launch


def from_host(network: Network, held: torch.Tensor, names: list[str]) -> Call:
    """The network between arrays on the host, through pinned memory and one tensor on the GPU, `held`."""
    pinned = torch.empty(held.shape, dtype=torch.float32, pin_memory=True)

    def call(values: Array) -> dict[str, Array]:
        pinned.numpy()[...] = values
        with torch.inference_mode():
            held.copy_(pinned.to("cuda", non_blocking=True))
            found = [value.float().cpu().numpy() for value in network(held)]
        return dict(zip(names, found, strict=True))

    return call


def of_ours(bundles: Mapping[str, Bundle], stack: contextlib.ExitStack) -> dict[str, Contender]:
    calls = {}
    for target, bundle in bundles.items():
        for graphs in (True, False):
            start = time.perf_counter()
            session = stack.enter_context(contextlib.closing(open_session(bundle, SessionOptions(cuda_graphs=graphs))))
            name = target if graphs else f"{target}, no graph"
            print(f"{name}: opened in {time.perf_counter() - start:.2f} s")
            assert bundle.manifest is not None
            calls[name] = Contender(bundle.manifest.precision, lambda values, session=session: session.run({session.inputs[0].name: values}))
    return calls


def agreeing(calls: Mapping[str, Contender], values: Array) -> dict[str, Call]:
    """Those whose outputs are eager float32's within their precision, after a first call that is timed by itself."""
    reference = calls["torch eager fp32"].call(values)
    kept = {}
    for name, contender in calls.items():
        start = time.perf_counter()
        found = contender.call(values)
        first = time.perf_counter() - start
        furthest = max(float(np.abs(found[key] - value).max() / np.abs(value).max()) for key, value in reference.items())
        print(f"{name}, batch {len(values)}: first call {first:.2f} s, {furthest:.1e} from eager float32")
        if furthest <= FURTHEST[contender.precision]:
            kept[name] = contender.call
        else:
            print(f"{name}: left out: expected at most {FURTHEST[contender.precision]}")
    return kept


def take_turns(calls: Mapping[str, Call], values: Array, rounds: int, *, warmup: int = 10) -> dict[str, float]:
    """Median milliseconds of each; in every round each has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call(values)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(those) for name, those in seconds.items()}


if __name__ == "__main__":
    main()
