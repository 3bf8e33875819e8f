"""Keys in the terminal that steer a run: the space bar stops, as it does in the page.

Life cycle: made before the motors are on, `close` gives the terminal back as it was. A run without a terminal, or in
the background, has no keys. A process that is killed cannot give its terminal back: its parent does
(`kept_terminal`). Errors of the terminal end the keys, never the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator

__all__ = ["HELP", "Keys", "kept_terminal"]

HELP = (
    "Keys: space stops · Enter starts · h holds, r resumes · y success, n failure · x resets · q ends the run"
)
_NAMES = {
    " ": "stop",
    "\n": "start",
    "\r": "start",
    "h": "hold",
    "r": "resume",
    "y": "success",
    "n": "failure",
    "x": "reset",
    "q": "quit",
}


class Keys:
    """`command` gets {"name": …} for each key, in a thread of its own. `there`: whether keys are read at all."""

    def __init__(self, command: Callable[[dict[str, str]], None]) -> None:
        self._command = command
        self._before: list[object] | None = None
        self._closed = False
        try:
            self._fd = sys.stdin.fileno()
            # A job in the background must not touch the terminal of the shell.
            self.there = os.isatty(self._fd) and os.tcgetpgrp(self._fd) == os.getpgrp()
            if not self.there:
                return
            # Sent to the background later, reading fails instead of stopping the process that drives a robot.
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        except (OSError, ValueError, termios.error):
            self.there = False
            return
        threading.Thread(target=self._read, name="keys", daemon=True).start()

    def close(self) -> None:
        """Give the terminal back. Safe to call twice."""
        self._closed = True
        if self._before is not None:
            with contextlib.suppress(OSError, termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._before)  # type: ignore[arg-type]
            self._before = None

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                typed = os.read(self._fd, 64)
                if not typed:
                    return
                for key in typed.decode(errors="ignore"):
                    name = _NAMES.get(key)
                    if name is not None and not self._closed:
                        self._command({"name": name})


@contextlib.contextmanager
def kept_terminal() -> Iterator[None]:
    """Whatever a child process does to the terminal is undone at the end, also when it was killed."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (OSError, ValueError, termios.error):
        yield
        return
    try:
        yield
    finally:
        # From the background this would stop us.
        old = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
        signal.signal(signal.SIGTTOU, old)
