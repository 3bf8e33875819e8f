"""What a run tells its user: lines, and one live line that is written over.

A thread of its own writes, so that a terminal that is stopped (Ctrl-S) or slow never stops a robot's loop.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from typing import TextIO

__all__ = ["Console", "ConsoleHandler"]

# A log file gets the live line this often only, seconds.
_LOGGED_EVERY = 10.0


class Console:
    """Life cycle: made at the start, `close` at the end writes what is left (for a second at most)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._terminal = self._stream.isatty()
        self._lines: deque[str] = deque(maxlen=1000)
        self._status = ""
        self._shown = ""
        self._logged = time.monotonic()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """One line, or several. Never waits."""
        self._lines.append(text)
        self._wake.set()

    def status(self, text: str) -> None:
        """The live line from now on; empty: none."""
        self._status = text
        self._wake.set()

    def close(self) -> None:
        """Write what is left and end. Safe to call twice."""
        self._closed = True
        self._wake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            while not self._closed or self._lines:
                self._wake.wait(0.5)
                self._wake.clear()
                self._write()
        except (OSError, ValueError):
            return  # the terminal is gone: there is nobody to tell

    def _write(self) -> None:
        clear = "\r\x1b[K" if self._terminal and self._shown else ""
        while self._lines:
            self._stream.write(clear + self._lines.popleft() + "\n")
            clear, self._shown = "", ""
        if self._terminal:
            if self._status != self._shown:
                self._stream.write("\r\x1b[K" + self._status)
                self._shown = self._status
        elif self._status and time.monotonic() - self._logged > _LOGGED_EVERY:
            self._logged = time.monotonic()
            self._stream.write(self._status + "\n")
        if self._closed and self._shown:
            self._stream.write("\n")
            self._shown = ""
        self._stream.flush()


class ConsoleHandler(logging.Handler):
    """Log records as lines of a console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))
