"""A thread and a bounded queue for each consumer, so that a slow one holds up nobody.

Under pressure pictures go first, then whole ticks; both are counted in the ticks that do arrive. Episodes, marks and
states are never dropped. Error policy: an exception ends the consumer that raised it, with one line to the user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from env_client.sidecar.types import Consumer, TickData

__all__ = ["Runner", "be_modest"]

logger = logging.getLogger(__name__)

# Ticks that may wait with their pictures (two cameras: 55 MB), and ticks that may wait at all.
_WITH_IMAGES, _TICKS = 30, 900
_NICE = 10


class Runner:
    """Runs one consumer. `latest`: only the newest waiting tick keeps its pictures (for whoever shows them)."""

    def __init__(
        self, name: str, consumer: Consumer, say: Callable[[str], None], *, latest: bool = False
    ) -> None:
        self.name = name
        self._consumer, self._say = consumer, say
        self._with_images = 1 if latest else _WITH_IMAGES
        self._latest = latest
        self._queue: deque[tuple[str, Any]] = deque()
        self._ticks = 0
        self._lost = 0
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"consumer-{name}", daemon=True)
        self._thread.start()

    def put(self, event: str, value: Any) -> None:
        """Hand over an event (the name of the consumer's method). Never waits."""
        with self._wake:
            if isinstance(value, TickData):
                if self._ticks >= _TICKS:
                    self._lost += 1 + value.lost
                    return
                value = self._with_room(value)
                self._ticks += 1
            self._queue.append((event, value))
            self._wake.notify()

    def _with_room(self, tick: TickData) -> TickData:
        if self._lost:
            tick, self._lost = replace(tick, lost=tick.lost + self._lost), 0
        if self._ticks < self._with_images:
            return tick
        if self._latest:
            for index, (event, value) in enumerate(self._queue):
                if isinstance(value, TickData) and value.images:
                    self._queue[index] = (event, _without_images(value))
            return tick
        return _without_images(tick)

    def close(self) -> None:
        """After this nothing more comes."""
        self.put("close", None)

    def join(self, timeout_s: float) -> bool:
        """Whether everything that was put has been done."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        be_modest()
        while True:
            with self._wake:
                while not self._queue:
                    self._wake.wait()
                event, value = self._queue.popleft()
                self._ticks -= isinstance(value, TickData)
            try:
                if event == "close":
                    self._consumer.close()
                    return
                getattr(self._consumer, event)(value)
            except Exception as error:
                self._end(event, error)
                return

    def _end(self, event: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        self._say(f"{self.name} stopped ({reason}); everything else goes on.")
        if not isinstance(error, OSError):
            logger.error("%s failed", self.name, exc_info=error)
        if event != "close":
            try:
                self._consumer.close()
            except Exception as second:
                logger.error("%s could not be closed: %r", self.name, second)
        with self._wake:
            self._queue.clear()
            self._ticks = 0
        # From here on everything is thrown away.
        self.put = lambda event, value: None  # type: ignore[method-assign]


def be_modest() -> None:
    """From now on this thread, and those that it starts, leave the cores to others where these want them (Linux)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _without_images(tick: TickData) -> TickData:
    return replace(tick, images={}, dropped=tick.dropped + len(tick.images))
