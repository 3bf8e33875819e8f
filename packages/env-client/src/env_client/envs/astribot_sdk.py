"""The vendor's SDK behind one thread: found, imported and constructed so that it can neither block nor mute us.

Life cycle: `SdkThread(make)` starts its thread; `open` constructs the SDK's object in it; `call` runs a function of
that object there and waits for it, with a limit; `close` ends the thread. The SDK is thus used by one thread only,
also where an executor sends set-points between two calls (`cycle`).

Error policy: everything becomes an `EnvError` with what came and what to do: a missing or broken SDK, a robot that
does not answer, control rights that are elsewhere, a call that returned None or took too long. After a call that took
too long every further one fails at once until it has returned.
"""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError

__all__ = ["Obedience", "SdkThread", "answered", "construct", "import_sdk", "need_rights"]

# Where the class lies, in the order in which it is looked for.
MODULES = (
    "core.astribot_api.astribot_client",
    "astribot_sdk.core.astribot_api.astribot_client",
    "core.sdk_client.astribot_client",
)
ROBOT_TYPE = "S1"
# The robot does not take its commands when its desired position is this far (rad) from what was sent, and has not
# moved by more than `STILL` for `DEAF_S` seconds.
DEAF, STILL, DEAF_S = 0.05, 1e-4, 0.5


def import_sdk(sdk_path: str | None) -> Any:
    """The SDK's class `Astribot`. Raises `EnvError`.

    Importing the SDK points the process's output at nothing; it is pointed back.
    """
    os.environ.setdefault("ROBOT_TYPE", ROBOT_TYPE)
    if sdk_path is not None:
        folder = Path(sdk_path).expanduser()
        if not folder.is_dir():
            raise EnvError(
                f"--env.astribot.sdk-path is {sdk_path}, which is no folder; the vendor's SDK was expected"
            )
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    try:
        return _find_class()
    finally:
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)


def _find_class() -> Any:
    for name in MODULES:
        try:
            return import_module(name).Astribot
        except ModuleNotFoundError as error:
            # Another module that is missing is the SDK's own need, and says what to install.
            if error.name is None or not name.startswith(error.name):
                raise EnvError(f"the Astribot SDK cannot be imported: {error}") from error
        except Exception as error:  # a vendor's package raises anything
            raise EnvError(
                f"the Astribot SDK cannot be imported ({type(error).__name__}: {error})"
            ) from error
    raise EnvError(
        f"the Astribot SDK was not found (looked for {', '.join(MODULES)}): name its folder with --env.astribot.sdk-path, "
        "or run on the stand-in with --env.astribot.virtual"
    )


def construct(make: Callable[..., Any], *, freq: float, high_control_rights: bool) -> Any:
    """The SDK's object, without a keyboard: where it would ask for the control rights, that is an `EnvError`."""
    keyboard, sys.stdin = sys.stdin, io.StringIO()
    try:
        return make(freq=freq, high_control_rights=high_control_rights)
    except EOFError as error:
        raise EnvError(
            "another program has the control rights of the robot: end it, or take them with "
            "--env.astribot.high-control-rights (its motion stops at once)"
        ) from error
    except Exception as error:  # a vendor's class raises anything
        raise EnvError(
            f"the robot was not found ({type(error).__name__}: {error}): is it switched on, is this machine in its "
            "network?"
        ) from error
    finally:
        sys.stdin = keyboard


def answered(value: Any, what: str) -> Any:
    """`value`. Raises `EnvError` when the SDK returned None, as it does without rights and while stopped."""
    if value is None:
        raise EnvError(f"{what} returned None: the robot is stopped, or its control rights are elsewhere")
    return value


def need_rights(sdk: Any) -> None:
    """Raises `EnvError` unless this program has the control rights."""
    if not answered(sdk.get_control_rights_status(), "get_control_rights_status"):
        raise EnvError(
            "another program has taken the control rights of the robot; this one waits until it has them again"
        )


class Obedience:
    """Whether the robot takes its commands. `set_joints_position` returns None in every case, so it is seen from the
    robot's own desired position: that of a robot which was stopped stays where it is."""

    def __init__(self) -> None:
        self._desired: np.ndarray | None = None
        self._still_since = 0.0

    def check(self, desired: np.ndarray, sent: np.ndarray | None, joints: np.ndarray) -> None:
        """Raises `EnvError` when the desired position stays away from what was sent. All (size,) vectors of the robot:
        `sent` None when nothing was, `joints` True where something is commanded."""
        now = time.monotonic()
        if sent is None or self._desired is None or np.abs(desired - self._desired).max() > STILL:
            self._desired, self._still_since = desired, now
            return
        off = float(np.abs(desired - sent)[joints].max(initial=0.0))
        if off > DEAF and now - self._still_since > DEAF_S:
            raise EnvError(
                f"the robot takes no commands (its goal stays {off:.2f} rad away from what it is sent): somebody "
                "stopped it. The next run starts it again"
            )


class SdkThread:
    """One thread that owns the SDK's object. `call` may come from any thread."""

    def __init__(self, cycle_hz: float = 0.0) -> None:
        """`cycle` is called `cycle_hz` times a second between calls, if that is above 0."""
        self._period = 1.0 / cycle_hz if cycle_hz > 0 else None
        # Called with the SDK's object; after an exception it is dropped, and `call` raises it once.
        self.cycle: Callable[[Any], None] | None = None
        self._sdk: Any = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None] = queue.SimpleQueue()
        # Since when the thread is inside the SDK (monotonic seconds); None while it is not.
        self._busy_since: float | None = None
        self._cycle_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="astribot-sdk", daemon=True)
        self._thread.start()

    def open(self, make: Callable[[], Any], timeout_s: float) -> None:
        """Construct the SDK's object. Raises `EnvError`."""

        def job(_: Any) -> None:
            self._sdk = make()

        self.call(job, timeout_s, "the SDK")

    def call(self, act: Callable[[Any], Any], timeout_s: float, what: str = "the robot") -> Any:
        """What `act(sdk)` returns, run in the thread. Raises `EnvError`."""
        started, since = time.monotonic(), self._busy_since
        if since is not None and started - since > timeout_s:
            raise EnvError(f"{what} does not answer since {started - since:.1f} s")
        if self._cycle_error is not None:
            error, self._cycle_error = self._cycle_error, None
            raise (
                error if isinstance(error, EnvError) else EnvError(f"sending set-points failed: {error!r}")
            ) from error
        future: Future[Any] = Future()
        self._jobs.put((future, act))
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            # A command that did not begin in time must not be carried out later.
            future.cancel()
            raise EnvError(f"{what} did not answer within {timeout_s:g} s") from None
        except (EnvError, CancelledError):
            raise
        except Exception as error:  # the SDK raises anything
            raise EnvError(f"{what} failed ({type(error).__name__}: {error})") from error

    def close(self) -> None:
        """End the thread after its job; it is a daemon, so a stuck one does not keep the process."""
        self.cycle = None
        self._jobs.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                job = self._jobs.get(
                    timeout=None if self._period is None else max(0.0, due - time.monotonic())
                )
            except queue.Empty:
                self._busy_since = time.monotonic()
                self._turn()
                self._busy_since = None
                # A late cycle is not followed by a bunch of others.
                due = max(due + (self._period or 0.0), time.monotonic())
                continue
            if job is None:
                return
            future, act = job
            if not future.set_running_or_notify_cancel():
                continue
            self._busy_since = time.monotonic()
            try:
                result, failure = act(self._sdk), None
            except Exception as error:
                result, failure = None, error
            # Before the caller goes on: what it calls next must not find this job still running.
            self._busy_since = None
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _turn(self) -> None:
        cycle = self.cycle
        if cycle is None:
            return
        try:
            cycle(self._sdk)
        except Exception as error:
            self.cycle, self._cycle_error = None, error
