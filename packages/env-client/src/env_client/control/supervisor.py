"""The parent of the control process: it watches the heartbeat and stops the robot when nobody else can.

Life cycle: `Supervisor(command).run()` starts the command with the heartbeat's file descriptor as its last
argument, and returns its exit code. Once the child has told how its robot is stopped (`StopPlan`), three
things end in that plan being carried out by this process, after the child is certainly dead (SIGKILL, reaped):

- no beat for `hang_timeout_s`: the thread that talks to the robot hangs (or the process is stopped);
- the child ended without having let the robot go: it crashed or was killed;
- a clean stop was asked for and took longer than `stop_timeout_s`.

Signals: SIGINT, SIGTERM and SIGHUP become exactly one SIGTERM for the child, which stops in order. A second
signal does not wait: the child is killed and the plan carried out. The child is started with SIGINT ignored,
as a terminal's Ctrl-C reaches the whole process group.

Nothing heavy is imported here; the plan's module is imported as soon as it is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from env_client.control.heartbeat import StopPlan

__all__ = ["Supervisor"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The loop wakes up this often, seconds: a hang is noticed so much later than its timeout.
_WAKE = 0.05


def _print(text: str) -> None:
    # A terminal that was closed must not keep anybody from stopping a robot.
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class Supervisor:
    """Runs one control process. `log` gets one sentence for each thing that went wrong."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        hang_timeout_s: float = 0.5,
        stop_timeout_s: float = 20.0,
        pass_fds: Sequence[int] = (),
        started: Callable[[], object] = lambda: None,
        log: Callable[[str], None] = _print,
    ) -> None:
        if hang_timeout_s <= 0 or stop_timeout_s <= 0:
            raise ValueError(
                f"the hang timeout is {hang_timeout_s:g} s and the stop timeout {stop_timeout_s:g} s; both must "
                "be above zero, otherwise nobody stops a robot whose control process hangs"
            )
        self._command = list(command)
        self._hang_timeout = hang_timeout_s
        self._stop_timeout = stop_timeout_s
        self._pass_fds = tuple(pass_fds)
        # Called once the child has what was handed to it.
        self._started = started
        self._log = log
        self._plan: StopPlan | None = None
        self._stop_function: Callable[..., str] | None = None
        self._last_beat = 0.0
        self._pending = b""
        self._signals: list[int] = []

    def run(self) -> int:
        """Start the child, watch it to its end; its exit code, or 128 + the signal that ended the run."""
        read, write = os.pipe()
        wake_read, wake_write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        old_handlers = {s: signal.signal(s, self._on_signal) for s in _STOP_SIGNALS}
        old_wake = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        try:
            child = self._start(write)
            os.close(write)
            self._started()
            code = self._watch(child, read, wake_read)
        finally:
            signal.set_wakeup_fd(old_wake)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            for fd in (read, wake_read, wake_write):
                os.close(fd)
        return 128 + self._signals[0] if self._signals else code

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signals.append(number)

    def _start(self, write: int) -> subprocess.Popen[bytes]:
        # Ignored signals stay ignored over exec: Ctrl-C is ours to translate.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return subprocess.Popen([*self._command, str(write)], pass_fds=(write, *self._pass_fds))
        finally:
            signal.signal(signal.SIGINT, handler)

    def _watch(self, child: subprocess.Popen[bytes], read: int, wake_read: int) -> int:
        stop_by = float("inf")
        forwarded = False
        while True:
            select.select([read, wake_read], [], [], _WAKE)
            self._drain(read)
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 64)
            now = time.monotonic()
            code = child.poll()
            if code is not None:
                self._drain(read)
                if self._plan is not None:
                    self._carry_out(
                        f"the control process ended ({_ending(code)}) without letting the robot go"
                    )
                    return code if code > 0 else 1
                return code if code >= 0 else 128 - code
            if self._signals and not forwarded:
                forwarded = True
                stop_by = now + self._stop_timeout
                child.terminate()
            reason = self._reason_to_kill(now, stop_by)
            if reason:
                _kill(child)
                self._drain(read)
                self._carry_out(reason)
                return 1

    def _reason_to_kill(self, now: float, stop_by: float) -> str:
        if len(self._signals) > 1:
            return "a second signal came, the control process was killed"
        if now > stop_by:
            return f"the control process did not stop within {self._stop_timeout:g} s and was killed"
        silence = now - self._last_beat
        if self._plan is not None and silence > self._hang_timeout:
            return f"the control process gave no sign of life for {silence:.2f} s and was killed"
        return ""

    def _drain(self, read: int) -> None:
        """Take what the pipe holds; beats that waited there while this process slept still count."""
        data = bytearray()
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(read, 65536):
                data += chunk
        if not data:
            return
        self._last_beat = time.monotonic()
        *lines, self._pending = (self._pending + bytes(data)).split(b"\n")
        for line in lines:
            if line != b"1":
                self._receive(json.loads(line))

    def _receive(self, message: dict[str, Any]) -> None:
        if "arm" in message:
            self._plan = StopPlan(**message["arm"])
            module, _, name = self._plan.function.partition(":")
            self._stop_function = getattr(import_module(module), name)
        elif "disarm" in message:
            self._plan = None
        elif "note" in message:
            self._log(str(message["note"]))

    def _carry_out(self, reason: str) -> None:
        if self._plan is None or self._stop_function is None:
            self._log(f"{reason}; no robot was held")
            return
        try:
            result = self._stop_function(**self._plan.arguments)
        except Exception as error:  # the last line of defence reports, whatever happens
            result = f"STOPPING IT FAILED ({type(error).__name__}: {error}): cut the robot's power"
        self._plan = None
        self._log(f"{reason}; the supervisor stopped the robot: {result}")


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    child.wait()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
