"""The live line of a run, and the patience with a server that sends nothing. A thread beside the control loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from env_client.client_config import ClientConfig
from env_client.console import Console
from env_client.control import ActionSource, ControlLoop

__all__ = ["StatusThread"]

# How often the line is written, seconds.
_EVERY = 0.5


class StatusThread:
    """Reads counters of the loop and of the source; writes none of them. `close` ends it."""

    def __init__(
        self,
        loop: ControlLoop,
        source: ActionSource,
        console: Console,
        config: ClientConfig,
        *,
        give_up: Callable[[str], None],
    ) -> None:
        self.gave_up = False
        self._loop, self._source, self._console, self._config = loop, source, console, config
        self._give_up = give_up
        self._phase = ""
        self._number = 0
        self._began = time.monotonic()
        self._chunks = -1
        self._last_chunk = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def episode(self, number: int) -> None:
        """An episode begins."""
        self._number, self._phase = number, ""
        self._began = self._last_chunk = time.monotonic()

    def phase(self, text: str) -> None:
        """What happens between episodes; empty: nothing is shown."""
        self._number, self._phase = 0, text
        self._console.status(text)

    def close(self) -> None:
        self._closed.set()
        self._thread.join(1.0)
        self._console.status("")

    def _run(self) -> None:
        ticks, at = 0, time.monotonic()
        while not self._closed.wait(_EVERY):
            now = time.monotonic()
            done = self._loop.timing.ticks
            rate = max(0, done - ticks) / (now - at)
            ticks, at = done, now
            if self._number:
                self._console.status(self._line(now, rate))
                self._watch_server(now)

    def _line(self, now: float, rate: float) -> str:
        stats = self._source.stats
        parts = [
            f"episode {self._number}/{self._config.num_episodes}",
            f"{now - self._began:5.1f} s",
            f"{rate:4.1f} Hz",
            f"chunks {stats.chunks}",
            f"latency {stats.latency_s * 1e3:.0f} ms",
            f"starved {stats.starved}",
        ]
        if stats.infeasible:
            parts.append(f"horizon {stats.horizon} too short for {stats.delay_ticks} ticks of delay")
        silent = now - self._last_chunk
        if silent > 2.0:
            parts.append(f"no chunk for {silent:.0f} s, holding")
        if self._loop.paused:
            parts.append("paused")
        return " · ".join(parts)

    def _watch_server(self, now: float) -> None:
        chunks, patience = self._source.stats.chunks, self._config.server_patience_s
        if chunks != self._chunks:
            self._chunks, self._last_chunk = chunks, now
        elif 0 < patience < now - self._last_chunk and not self.gave_up:
            self.gave_up = True
            self._give_up(f"no chunk came for {patience:g} s; the run ends")
