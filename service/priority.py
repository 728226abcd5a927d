"""How much of a machine is used, and who goes first: the loop that answers requests, before the threads that work for it."""

import math
import os
import threading
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

GIVES_WAY = 19
"""How nice threads and processes are that decode, measure, classify and write."""


def give_way() -> None:
    """Let the calling thread, and those that it will begin, go after the loop; a loop that waits looks dead from outside."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), GIVES_WAY)


def cpu_count(threads: int, cgroup: Path = CGROUP) -> int:
    """Threads to use: those asked for, or the cores that this process may run on, as far as its container's quota goes."""
    return threads or max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that a container may use: cgroup v2's ``cpu.max``, or version 1's files; infinite without."""
    first = cgroup / "cpu"
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((first / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
    except OSError:
        return math.inf
    return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
