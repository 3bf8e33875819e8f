"""What the control process tells its supervisor, over one pipe: that it lives, and how to stop its robot.

One JSON value per line: `1` is a beat; `{"arm": {...}}` says that a robot is held from now on and how it is
stopped without this process; `{"disarm": true}` says that it was let go in order; `{"note": "..."}` is a line
for the user. Beats come from the one thread that talks to the robot, so that a hang of that thread, and of
nothing else, is missed beats. Writing never blocks: a full pipe drops beats, and a supervisor that is gone
is seen as `lost`.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Heartbeat", "StopPlan"]

# Beats closer together than this (seconds) say nothing new.
_SPACING = 0.02


@dataclass(frozen=True)
class StopPlan:
    """How a robot is stopped by a process that never spoke to it before."""

    # `module:function`; it takes `arguments` and returns a sentence. The module must be light to import.
    function: str
    # Plain values.
    arguments: dict[str, Any] = field(default_factory=dict)


class Heartbeat:
    """The control process's end. With `fd` None (no supervisor) everything here does nothing."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last = 0.0
        # The supervisor is gone: nobody would stop the robot, so the control process must, now.
        self.lost = False
        if fd is not None:
            os.set_blocking(fd, False)

    def on_loss(self, act: Callable[[], object]) -> None:
        """Call `act` in a thread of its own when the supervisor is gone, also while nothing beats."""
        if self._fd is None:
            return
        # A pipe that nobody reads any more is an error, which every poll reports.
        poll = select.poll()
        poll.register(self._fd, 0)

        def watch() -> None:
            poll.poll()
            self.lost = True
            act()

        threading.Thread(target=watch, name="supervisor", daemon=True).start()

    def beat(self) -> None:
        """The thread that talks to the robot is alive."""
        now = time.monotonic()
        if now - self._last >= _SPACING:
            self._last = now
            self._write(b"1\n")

    def arm(self, plan: StopPlan) -> None:
        """A robot is held from now on; beats are expected until `disarm`."""
        self._send({"arm": asdict(plan)})

    def disarm(self) -> None:
        """The robot was let go in the state that the user asked for."""
        self._send({"disarm": True})

    def note(self, text: str) -> None:
        """One line for the user."""
        self._send({"note": text})

    def _send(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            return
        for _ in range(50 if len(line) > 2 else 1):
            try:
                os.write(self._fd, line)
                return
            except BlockingIOError:
                time.sleep(0.001 if len(line) > 2 else 0.0)
            except OSError:
                self.lost = True
                return
