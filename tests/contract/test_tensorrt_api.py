"""Every name of TensorRT that we touch exists in the real bindings of 10.16 and 11.4, and in TensorRT for RTX; and none that 11 took away."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    ROOT / "converter/modelcrate_converter/builders/tensorrt_builder.py",
    ROOT / "runtimes/modelcrate_runtime/sessions/tensorrt_session.py",
)
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "settings": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "loaded": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "filler": "OnnxParserRefitter",
    "cache": "ITimingCache",
}
"""How our code calls TensorRT's objects -> their class."""
CHAINS = {
    ("_engine",): "ICudaEngine",
    ("_context",): "IExecutionContext",
}
CALLS = {
    "create_engine_inspector": "EngineInspector",
    "get_timing_cache": "ITimingCache",
    "get_layer": "ILayer",
    "get_output": "ITensor",
}
"""What a call gives -> its class."""
OVERRIDDEN = {
    "Logger": ("ILogger", {"log"}),
    "Profiler": ("IProfiler", {"report_layer_time"}),
    "Monitor": ("IProgressMonitor", {"phase_start", "step_complete", "phase_finish"}),
}
DUMP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
print(json.dumps({name: sorted(dir(getattr(module, name))) for name in dir(module)}))
"""


def bindings(name: str) -> dict[str, list[str]]:
    """Name of a module's attribute -> its own attributes."""
    environment, module = dict(os.environ), "tensorrt_bindings"
    if name == "rtx":
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("needs TensorRT for RTX: pip install 'modelcrate[tensorrt-rtx]'")
        module = "tensorrt_rtx"
    else:
        place = ROOT / ".venv-tensorrt" / name
        if not place.is_dir():
            pytest.skip("needs the bindings of TensorRT: scripts/setup-tensorrt makes them on x86-64 Linux")
        environment |= {"PYTHONPATH": str(place), "LD_LIBRARY_PATH": str(place)}
    done = subprocess.run([sys.executable, "-c", DUMP, module], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def touched() -> set[tuple[str, str]]:
    """(class or enum, attribute) of everything that our code reads, calls or sets on TensorRT's objects; ("", name) of the module itself."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "trt":
                found.add(("", node.attr))
            elif isinstance(owner, ast.Name) and owner.id in OBJECTS:
                found.add((OBJECTS[owner.id], node.attr))
            elif isinstance(owner, ast.Attribute) and owner.attr == "_trt":
                found.add(("", node.attr))
            elif isinstance(owner, ast.Attribute) and (owner.attr,) in CHAINS:
                found.add((CHAINS[(owner.attr,)], node.attr))
            elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
                found.add((owner.attr, node.attr))
            elif isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute) and owner.func.attr in CALLS:
                found.add((CALLS[owner.func.attr], node.attr))
    return found


def literal_enum_members() -> set[tuple[str, str]]:
    """Members that are asked for by name, with getattr."""
    flags = {"TF32", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN"}
    levels = {"NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"}
    return {("BuilderFlag", flag) for flag in flags} | {("HardwareCompatibilityLevel", level) for level in levels}


def test_the_scan_sees_what_is_there() -> None:
    """A scan that finds nothing would pass everything."""
    found = touched()
    assert {("", "Builder"), ("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3"), ("ILayer", "get_output")} <= found
    assert len(found) > 45


@pytest.mark.parametrize("version", ["10", "11", "rtx"])
def test_every_name_that_we_touch_exists(version: str) -> None:
    have = bindings(version)
    missing = sorted(
        f"{owner}.{name}" if owner else name
        for owner, name in touched() | literal_enum_members()
        if (name not in have if not owner else name not in have.get(owner, []))
    )
    assert missing == []


@pytest.mark.parametrize("version", ["10", "11", "rtx"])
def test_what_we_override_is_called_so(version: str) -> None:
    have = bindings(version)
    for base, names in OVERRIDDEN.values():
        assert names <= set(have[base])


def test_no_name_that_tensorrt_11_took_away_is_touched() -> None:
    gone = set(bindings("10")["IBuilderConfig"]) - set(bindings("11")["IBuilderConfig"])
    assert "int8_calibrator" in gone  # else the two are the same file
    assert not {name for owner, name in touched() if owner == "IBuilderConfig"} & gone
