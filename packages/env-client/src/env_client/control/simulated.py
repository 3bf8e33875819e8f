"""Simulated time: a clock that only goes on when someone sleeps, and a server whose answers take as long as told.

With them hours of control run in seconds and give the same numbers on every machine: benchmarks and tests use
the real loop, sources and safety filter, and only these two are not what a robot runs.
"""

from collections.abc import Callable
from typing import Any

from env_client.control.network import ChunkRequest, Outcome

__all__ = ["SimulatedClock", "SimulatedServer"]


class SimulatedClock:
    """A `Clock` that stands still while code runs."""

    def __init__(self, start: float = 0.0):
        self._now = start

    def now(self) -> float:
        return self._now

    def sleep_until(self, deadline: float) -> None:
        self._now = max(self._now, deadline)

    def advance(self, seconds: float) -> None:
        """Time that passes while something works."""
        self._now += seconds


class SimulatedServer:
    """A `Requester` with one request in flight, answered `latency_s(request)` seconds after it was taken.

    `answer(request)` gives the reply's map, or raises nothing: it may return an `Outcome` of its own instead.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        answer: Callable[[ChunkRequest], dict[str, Any] | Outcome],
        latency_s: Callable[[ChunkRequest], float] | float = 0.0,
    ):
        self._clock, self._answer = clock, answer
        self._latency = latency_s if callable(latency_s) else lambda request: latency_s
        self._waiting: ChunkRequest | None = None
        self._current: tuple[ChunkRequest, float, float] | None = None
        self._outcomes: list[Outcome] = []
        self.taken: list[ChunkRequest] = []
        self.closed = False

    def submit(self, request: ChunkRequest, *, replace: bool = False) -> bool:
        self._work()
        if self._current is not None and self._current[0].generation == request.generation and not replace:
            return False
        self._waiting = request
        self._work()
        return True

    def poll(self) -> list[Outcome]:
        self._work()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def discard(self) -> None:
        self._waiting = None
        self._outcomes = []

    def close(self) -> None:
        self.closed = True

    def _work(self) -> None:
        """What the network thread would have done until now."""
        now = self._clock.now()
        # Half a microsecond: tick times are sums of rounded periods.
        if self._current is not None and now >= self._current[2] - 5e-7:
            request, taken, ready = self._current
            self._current = None
            reply = self._answer(request)
            if not isinstance(reply, Outcome):
                reply = Outcome(request, reply, latency_s=ready - taken)
            self._outcomes.append(reply)
        if self._current is None and self._waiting is not None:
            request, self._waiting = self._waiting, None
            self.taken.append(request)
            self._current = (request, now, now + self._latency(request))
