"""The machine that something was measured on: what it is, and what it did meanwhile. What a system does not say is None, never a guess."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.measurement import Load

_DISTRIBUTIONS: Final = (
    "modelcrate", "numpy", "opencv-python-headless", "opencv-python", "onnxruntime", "onnxruntime-gpu", "openvino", "ncnn", "tensorrt", "tensorrt-rtx-cu12",
    "cuda-bindings", "pycuda", "torch",
)  # fmt: skip

_FEATURES: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "sve", "i8mm", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One machine.

    Attributes:
        cpu: the processor's name.
        cores: that this process may use.
        features: instruction sets that decide how fast networks are.
        governor: of the frequency, of the first core.
        frequency_mhz: greatest, of the first core.
        memory_bytes: of the machine, or of the container if that has less.
        is_virtual: whether it is a virtual machine.
        system: operating system and kernel.
        python: version.
        gpu: the first one's name, empty for none.
        libraries: distribution -> version of those that are installed.
    """

    cpu: str
    cores: int
    features: list[str]
    governor: str | None
    frequency_mhz: float | None
    memory_bytes: int | None
    is_virtual: bool | None
    system: str
    python: str
    gpu: str
    libraries: dict[str, str]


def read_host() -> Host:
    """This machine."""
    info = _cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    first = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    frequency = _number(first / "cpuinfo_max_freq")
    return Host(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        features=[name for name in _FEATURES if name in flags],
        governor=_text(first / "scaling_governor"),
        frequency_mhz=frequency / 1e3 if frequency is not None else None,
        memory_bytes=_memory_bytes(),
        is_virtual="hypervisor" in flags if flags else None,
        system=platform.platform(),
        python=platform.python_version(),
        gpu=_gpu_name(),
        libraries=_libraries(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Counters of one moment. All but `at_s` are None where the system has none.

    Attributes:
        at_s: when.
        busy_s: time that all cores have worked, by whomever.
        stolen_s: time that a virtual machine's host took.
        own_s: time that this process has used.
        throttled: events of heat.
        frequency_mhz: mean of the cores.
        energy_j: used by the processor's packages.
    """

    at_s: float
    busy_s: float | None
    stolen_s: float | None
    own_s: float
    throttled: int | None
    frequency_mhz: float | None
    energy_j: float | None


def take_reading() -> Reading:
    """The counters now."""
    busy = stolen = None
    text = _text(Path("/proc/stat"))
    if text is not None:
        ticks = [int(word) for word in text.splitlines()[0].split()[1:]]
        per_second = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, soft, *rest = ticks
        busy = (user + nice + system + irq + soft) / per_second
        stolen = rest[0] / per_second if rest else None
    times = os.times()
    cores = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*"))
    throttles = [_number(core / "thermal_throttle/core_throttle_count") for core in cores]
    frequencies = [value for value in (_number(core / "cpufreq/scaling_cur_freq") for core in cores) if value is not None]
    known = [value for value in throttles if value is not None]
    return Reading(
        at_s=time.perf_counter(),
        busy_s=busy,
        stolen_s=stolen,
        own_s=times.user + times.system + times.children_user + times.children_system,
        throttled=int(sum(known)) if known else None,
        frequency_mhz=sum(frequencies) / len(frequencies) / 1e3 if frequencies else None,
        energy_j=_energy_j(),
    )


def load_between(before: Reading, after: Reading, *, cores: int | None = None) -> Load:
    """What the machine did besides this process between two readings.

    Args:
        before: the first one.
        after: the second.
        cores: of the machine; None for this one's.
    """
    core_seconds = max((after.at_s - before.at_s) * (cores or os.cpu_count() or 1), 1e-9)
    others = stolen = throttled = frequency = None
    if before.busy_s is not None and after.busy_s is not None:
        # The system counts in hundredths of a second: what is less than some of them is nothing.
        foreign = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
        others = max(foreign - 0.05, 0.0) / core_seconds
    if before.stolen_s is not None and after.stolen_s is not None:
        stolen = max(after.stolen_s - before.stolen_s, 0.0) / core_seconds
    if before.throttled is not None and after.throttled is not None:
        throttled = after.throttled - before.throttled
    if before.frequency_mhz and after.frequency_mhz:
        frequency = after.frequency_mhz / before.frequency_mhz
    return Load(others=others, stolen=stolen, throttled=throttled, frequency=frequency)


def energy_between(before: Reading, after: Reading) -> float | None:
    """Joules that the processor used, this process's and all others'; None where the kernel does not say, or its counter began again."""
    if before.energy_j is None or after.energy_j is None or after.energy_j < before.energy_j:
        return None
    return after.energy_j - before.energy_j


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now."""
    text = _text(Path("/proc/self/statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else None


def peak_resident_bytes() -> int | None:
    """The most that this process ever had in RAM. Not getrusage's: that begins with what the process had that started this one."""
    for line in (_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_info() -> dict[str, str]:
    """The first processor in /proc/cpuinfo."""
    lines = (_text(Path("/proc/cpuinfo")) or "").split("\n\n", 1)[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memory_bytes() -> int | None:
    lines = (_text(Path("/proc/meminfo")) or "").splitlines()
    of_machine = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), None)
    of_container = _number(Path("/sys/fs/cgroup/memory.max"))
    if of_machine is None or of_container is None:
        return of_machine
    return min(of_machine, int(of_container))


def _energy_j() -> float | None:
    """Intel's and AMD's counters of whole packages; most systems let root alone read them."""
    values = [_number(path / "energy_uj") for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:*")) if path.name.count(":") == 1]
    known = [value for value in values if value is not None]
    return sum(known) / 1e6 if known and len(known) == len(values) else None


def _gpu_name() -> str:
    from modelcrate_bundle.errors import MissingBackendError
    from modelcrate_runtime.sessions.cuda_device import find_gpu

    try:
        return find_gpu().name
    except MissingBackendError:
        return ""


def _libraries() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return float(text) if text else None
    except ValueError:  # "max"
        return None
