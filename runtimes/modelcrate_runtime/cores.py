"""How many cores there are to use, and the threads that use them."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def usable_cores() -> int:
    """Cores that this process may use, at least 1: an affinity mask counts, which ONNX Runtime ignores by default."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


@functools.cache
def workers() -> ThreadPoolExecutor:
    """Threads for the crops and the side-by-side network calls of all tasks in the process; they wait without cost.

    What is submitted must never wait for something else that is submitted here.
    """
    return ThreadPoolExecutor(max_workers=usable_cores(), thread_name_prefix="modelcrate")
