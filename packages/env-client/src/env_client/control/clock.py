"""Time for the control loop: absolute deadlines on the monotonic clock, and what became of them.

A loop that sleeps "one period" after each tick drifts by the tick's own duration. Here tick k has the deadline
`start + k * period`, whatever came before it. A tick that comes late is not followed by a bunch of others:
deadlines that have passed are skipped, and two ticks never start closer than `period - grace`.
"""

import gc
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from env_client.control.slices import short_slices

__all__ = ["Clock", "MonotonicClock", "Pacer", "SendPhase", "Tick", "Timing", "steady_interpreter"]

# Upper edges of the jitter histogram, in ms.
HISTOGRAM_MS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


class Clock(Protocol):
    """Where a loop's time comes from; tests and benchmarks bring a simulated one."""

    def now(self) -> float:
        """Seconds, never going back."""
        ...

    def sleep_until(self, deadline: float) -> None:
        """Return at `deadline`, or at once when it has passed."""
        ...


class MonotonicClock:
    """The machine's clock.

    CPython's `time.sleep` already is an absolute `clock_nanosleep`; measured on two idle cores it wakes 0.14 ms late
    (p99 0.18 ms). A spin in Python would reach 0.001 ms, but it holds the interpreter lock while it spins, and
    the thread that is made to wait is the one that fetches the next chunk. 0.2 ms of 33 are not worth that.
    """

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, deadline: float) -> None:
        wait = deadline - time.monotonic()
        if wait > 0:
            time.sleep(wait)


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of the clock."""

    # Number of the deadline; skipped deadlines leave a gap.
    index: int
    # When it should have started, and when it did, in the clock's seconds.
    deadline: float
    started: float
    # Deadlines skipped just before this one.
    skipped: int


class Pacer:
    """Hands out ticks, each at its deadline."""

    def __init__(self, clock: Clock, period: float, grace: float = 0.25):
        """`grace`: part of a period by which a deadline may have passed and still be used."""
        self.clock, self.period = clock, period
        self._grace = grace * period
        self._start = clock.now()
        self._next = 0
        self._earliest = self._start

    def wait(self) -> Tick:
        """Sleep until the next deadline that can still be met."""
        now = self.clock.now()
        # Both "not in the past" and "not right behind the last tick", each with the grace.
        earliest = max(now - self._grace, self._earliest)
        index = self._next
        if self._start + index * self.period < earliest:
            index = int(np.ceil((earliest - self._start) / self.period - 1e-9))
        deadline = self._start + index * self.period
        self.clock.sleep_until(deadline)
        started = self.clock.now()
        tick = Tick(index, deadline, started, skipped=index - self._next)
        self._next = index + 1
        self._earliest = started + self.period - self._grace
        return tick


class SendPhase:
    """When in its tick a command leaves: at the same moment in each.

    Reading a robot takes 1 ms in one tick and 5 in the next. Commands that leave as soon as they are known hand this
    unevenness on to the motors. So each waits until `offset_s` after its deadline, which is how late the slower of the
    last ticks were ready: it jumps up to a slower one and sinks back in about `settle_s`. It never is more than
    the part `most` of a period; a robot that takes longer to read is commanded at once.
    """

    def __init__(self, period: float, most: float = 0.25, settle_s: float = 10.0):
        self.offset_s = 0.0
        self._most, self._sink = most * period, period / settle_s

    def wait(self, clock: Clock, tick: Tick) -> None:
        """The command is ready; return when it may leave."""
        ready = clock.now() - tick.deadline
        if ready >= self.offset_s:
            self.offset_s = min(ready, self._most)
        else:
            clock.sleep_until(tick.deadline + self.offset_s)
            self.offset_s += (ready - self.offset_s) * self._sink


class Timing:
    """How steady a loop was. Bounded: it remembers the newest two hours at 30 Hz."""

    def __init__(self, period: float):
        self.period = period
        self.ticks = 0
        self.skipped = 0
        self.overruns = 0
        self._late: deque[float] = deque(maxlen=216_000)
        self._jitter: deque[float] = deque(maxlen=216_000)
        # When the last command left, in the loop's seconds; None at the start and after an interruption.
        self.last_sent: float | None = None

    def ticked(self, tick: Tick) -> None:
        self.ticks += 1
        self.skipped += tick.skipped
        self._late.append(tick.started - tick.deadline)

    def finished(self, tick: Tick, now: float) -> None:
        """The tick's work is done; it is an overrun when the next deadline has passed by then."""
        self.overruns += now > tick.deadline + self.period

    def sent(self, now: float) -> float | None:
        """A command left at `now`; returns the time since the one before it, None for the first."""
        interval = None if self.last_sent is None else now - self.last_sent
        self.last_sent = now
        if interval is not None:
            self._jitter.append(abs(interval - self.period))
        return interval

    def interrupted(self) -> None:
        """Commands stopped for a reason of their own; the gap is not jitter."""
        self.last_sent = None

    def summary(self) -> dict[str, float]:
        """Counts, and milliseconds: how late ticks woke, how far intervals between commands were off."""
        result: dict[str, float] = {
            "ticks": self.ticks,
            "skipped": self.skipped,
            "overruns": self.overruns,
        }
        for name, values in (("late", self._late), ("jitter", self._jitter)):
            for label, percentile in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100)):
                value = float(np.percentile(values, percentile)) * 1e3 if values else 0.0
                result[f"{name}_{label}_ms"] = round(value, 3)
        return result

    def histogram(self) -> dict[str, int]:
        """Number of intervals between commands by how far they were off, e.g. {"<= 0.2 ms": 2990, ...}."""
        edges = np.array((0.0, *HISTOGRAM_MS, np.inf)) / 1e3
        counts, _ = np.histogram(np.fromiter(self._jitter, float), edges)
        labels = [f"<= {edge:g} ms" for edge in HISTOGRAM_MS] + [f"> {HISTOGRAM_MS[-1]:g} ms"]
        return dict(zip(labels, map(int, counts), strict=True))


@contextmanager
def steady_interpreter() -> Iterator[None]:
    """Keep the interpreter, and the machine's other work, from stealing the loop's time.

    A full garbage collection walks every object: with LeRobot's SO-101 driver imported it takes 350 ms here, ten
    ticks. What exists now is set aside, so that later collections walk only what is new (0.004 ms). And a thread
    that computes in Python gives the interpreter up only every 5 ms by default; with 1 ms a tick beside such a
    thread wakes 3 ms late instead of 18 (median, on a machine with more work than cores). The thread itself asks the
    kernel to go first when it wakes (`slices.py`).
    """
    interval = sys.getswitchinterval()
    gc.freeze()
    sys.setswitchinterval(min(interval, 1e-3))
    short_slices()
    try:
        yield
    finally:
        short_slices(False)
        sys.setswitchinterval(interval)
        gc.unfreeze()
