"""What the machine is and what it did: of this machine what must be true of any, and of counters that are written here exact figures."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from modelcrate_runtime.cores import usable_cores
from modelcrate_runtime.host import Reading, energy_between, load_between, read_host, take_reading
from modelcrate_runtime.measurement import Load

PATHS = os.pathsep.join(str(Path(__file__).parents[2] / part) for part in ("sdk_bundle", "runtimes"))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: Linux")
MIB = 2**20
START = Reading(at_s=1000.0, busy_s=50.0, stolen_s=5.0, own_s=10.0, throttled=7, frequency_mhz=3000.0, energy_j=100.0)
NOTHING_SAID = Reading(at_s=1000.0, busy_s=None, stolen_s=None, own_s=10.0, throttled=None, frequency_mhz=None, energy_j=None)


def after(**more: float) -> Reading:
    """10 seconds later, with each counter that is named so much further."""
    return replace(START, **{name: getattr(START, name) + value for name, value in ({"at_s": 10.0} | more).items()})


# --------------------------------------------------------------------------------------------------------------------------- host


def test_this_machine_is_described_as_it_is() -> None:
    host = read_host()
    assert host.cpu
    assert host.cores == usable_cores() >= 1
    assert host.python == platform.python_version()
    assert host.system == platform.platform()
    assert host.libraries["numpy"] == version("numpy")
    assert host.libraries["modelcrate"] == version("modelcrate")
    assert "torchvision" not in host.libraries
    assert all(host.libraries.values())
    assert host.frequency_mhz is None or 50 < host.frequency_mhz < 20_000


@LINUX
def test_what_linux_says_of_the_machine() -> None:
    host = read_host()
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    if "model name" in text:
        assert f": {host.cpu}\n" in text
    words = set(text.split())
    assert set(host.features) <= words
    assert ("avx2" in host.features) == ("avx2" in words)
    assert host.memory_bytes is not None
    assert 64 * MIB < host.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if platform.machine() == "x86_64":
        assert host.is_virtual is ("hypervisor" in words)


# ----------------------------------------------------------------------------------------------------------------------- readings


def test_counters_only_grow_and_own_work_is_counted() -> None:
    before = take_reading()
    while take_reading().own_s < before.own_s + 0.05:
        np.linalg.qr(np.ones((64, 64)))
    later = take_reading()
    assert later.at_s > before.at_s
    assert later.own_s >= before.own_s + 0.05
    for name in ("busy_s", "stolen_s", "throttled"):
        old, new = getattr(before, name), getattr(later, name)
        assert (old is None) == (new is None)
        assert old is None or new >= old
    load = load_between(before, later)
    assert load.others is None or 0 <= load.others <= 1.5
    assert load.stolen is None or 0 <= load.stolen <= 1.5


def test_the_load_is_what_others_did_by_what_the_cores_could_have_done() -> None:
    later = after(busy_s=13.05, own_s=5.0, stolen_s=2.0, throttled=3, frequency_mhz=-1500.0)
    assert load_between(START, later, cores=4) == Load(others=pytest.approx(8 / 40), stolen=pytest.approx(2 / 40), throttled=3, frequency=pytest.approx(0.5))
    assert load_between(START, later, cores=8).others == pytest.approx(8 / 80)


def test_the_cores_are_those_of_the_machine() -> None:
    later = after(busy_s=1.05, own_s=0.0)
    assert load_between(START, later) == load_between(START, later, cores=os.cpu_count())


@pytest.mark.parametrize("busy", [0.0, 1.0, 5.0, 5.04])
def test_what_this_process_did_itself_is_no_load(busy: float) -> None:
    """5 of its own: the system's ticks are coarser than the process's time, and nobody has worked for less than nothing."""
    assert load_between(START, after(busy_s=busy, own_s=5.0), cores=1).others == 0


def test_what_a_system_does_not_say_is_not_guessed() -> None:
    assert load_between(NOTHING_SAID, NOTHING_SAID, cores=4) == Load()
    assert load_between(START, replace(NOTHING_SAID, at_s=1010.0)) == Load()
    assert load_between(NOTHING_SAID, after(busy_s=10.0)) == Load()
    only_busy = replace(NOTHING_SAID, busy_s=50.0)
    assert load_between(only_busy, replace(only_busy, at_s=1010.0, busy_s=60.05), cores=1) == Load(others=pytest.approx(1.0))


def test_two_readings_at_once_divide_by_nothing() -> None:
    load = load_between(START, START)
    assert (load.others, load.stolen, load.throttled, load.frequency) == (0, 0, 0, 1)


def test_a_host_that_gives_stolen_time_back_has_stolen_nothing() -> None:
    """Live migration does that."""
    assert load_between(START, after(stolen_s=-1.0), cores=1).stolen == 0


def test_energy_is_the_difference_or_nothing() -> None:
    assert energy_between(START, after(energy_j=2.5)) == pytest.approx(2.5)
    assert energy_between(START, START) == 0
    assert energy_between(START, replace(START, energy_j=3.0)) is None, "the counter began again"
    assert energy_between(START, NOTHING_SAID) is None
    assert energy_between(NOTHING_SAID, START) is None


BUSY = """
import sys, time
while time.process_time() < float(sys.argv[1]):
    pass
print("done", flush=True)
sys.stdin.read()
"""


@LINUX
def test_what_another_process_works_is_seen() -> None:
    """It is still there at the second reading: a child that was waited for counts as this process's own."""
    before = take_reading()
    with subprocess.Popen([sys.executable, "-c", BUSY, "0.8"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"done\n"
        later = take_reading()
        other.communicate()
    load = load_between(before, later, cores=1)
    if load.others is None or later.busy_s == before.busy_s:
        pytest.skip("this system counts nothing in /proc/stat")
    assert load.others * (later.at_s - before.at_s) > 0.5


# ------------------------------------------------------------------------------------------------------------------------- memory


HELD = """
import numpy as np
from modelcrate_runtime.host import peak_resident_bytes, resident_bytes
before = resident_bytes()
held = np.ones(64 * 2**20, dtype=np.uint8)
full, peak = resident_bytes(), peak_resident_bytes()
del held
print(before, full, resident_bytes(), peak, peak_resident_bytes())
"""


@LINUX
def test_memory_is_of_now_and_the_peak_of_ever() -> None:
    """In a process of its own: one that has done other things has memory to spare."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env=environment)
    before, full, later, peak, last = map(int, done.stdout.split())
    assert full - before > 60 * MIB
    assert full - later > 60 * MIB
    # The kernel adds pages up per core, and only now and then.
    assert peak > full - 8 * MIB
    assert last >= peak - 8 * MIB


CHILD = "from modelcrate_runtime.host import peak_resident_bytes; print(peak_resident_bytes())"
PARENT = f"""
import subprocess, sys
held = b"x" * (300 * 2**20)
from modelcrate_runtime.host import peak_resident_bytes
print(peak_resident_bytes(), flush=True)
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
print(len(held))
"""


@LINUX
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    """getrusage's is: it goes on over fork and exec."""
    done = subprocess.run([sys.executable, "-c", PARENT], env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120, check=True)
    parent, child, _ = map(int, done.stdout.split())
    assert parent > 300 * MIB
    assert 5 * MIB < child < 200 * MIB
