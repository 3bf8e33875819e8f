"""What the bus was told, when: a bounded list in memory and, if a path is given, a JSON-lines file.

One line per event, times in seconds; `time` is simulated time since the reset, `wall` counts from the log's
start on the monotonic clock:

    {"kind": "goal", "time": 1.234, "wall": 1.240, "arm": 0, "goal": {"shoulder_pan": 2047, ...}}
    {"kind": "torque", "time": .., "wall": .., "arm": 0, "torque": {"gripper": false}}
    {"kind": "fault", "time": .., "wall": .., "fault": "dead:3"}
    {"kind": "reset", "time": .., "wall": .., "seed": 7}

Goals are ticks as received, before the servo cuts them to its limits. `goals_of` turns such events into
arrays; a test proves from them what was, and what was not, commanded.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from virtual_so101.calibration import JOINTS

__all__ = ["Commands", "ServoLog", "goals_of", "read_servo_log"]

_KEPT_EVENTS = 100_000


class Commands(NamedTuple):
    """All goals that one joint was given: (n,) arrays of seconds (wall and simulated) and of ticks."""

    wall: np.ndarray
    time: np.ndarray
    ticks: np.ndarray


class ServoLog:
    """Thread-safe; the oldest events leave memory first, the file keeps all of them.

    `clock` gives simulated seconds. Raises `OSError` where `path` cannot be written.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._start = time.monotonic()
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")

    def add(self, kind: str, **fields: Any) -> None:
        """Append one event, stamped now."""
        stamp = {"time": round(self._clock(), 6), "wall": round(time.monotonic() - self._start, 6)}
        event = {"kind": kind, **stamp, **fields}
        with self._lock:
            self._events.append(event)
            if self._file is not None:
                self._file.write(json.dumps(event) + "\n")
                self._file.flush()

    def listeners(self, arm: int) -> dict[str, Callable[[dict[int, Any]], None]]:
        """The arguments with which a `ServoChain` reports to this log."""
        return {
            "on_goal": lambda goals: self.goal(arm, goals),
            "on_torque": lambda torque: self.torque(arm, torque),
        }

    def goal(self, arm: int, goals: dict[int, int]) -> None:
        """Append the goals of one packet: joint index -> ticks."""
        self.add("goal", arm=arm, goal={JOINTS[i]: ticks for i, ticks in goals.items()})

    def torque(self, arm: int, torque: dict[int, bool]) -> None:
        """Append what one packet switched: joint index -> torque on."""
        self.add("torque", arm=arm, torque={JOINTS[i]: on for i, on in torque.items()})

    def events(self, last: int | None = None) -> list[dict[str, Any]]:
        """The events in memory, oldest first; `last` keeps the newest so many."""
        with self._lock:
            events = list(self._events)
        return events if last is None else events[max(0, len(events) - last) :]

    def close(self) -> None:
        """Close the file; later events stay in memory only."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def goals_of(events: Iterable[dict[str, Any]]) -> dict[tuple[int, str], Commands]:
    """The goals in `events` by (arm, joint name)."""
    rows: dict[tuple[int, str], list[tuple[float, float, int]]] = {}
    for event in events:
        if event["kind"] == "goal":
            for joint, ticks in event["goal"].items():
                rows.setdefault((event["arm"], joint), []).append((event["wall"], event["time"], ticks))
    commands = {}
    for key, values in rows.items():
        wall, simulated, ticks = zip(*values, strict=True)
        commands[key] = Commands(np.array(wall), np.array(simulated), np.array(ticks))
    return commands


def read_servo_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log file, without a last line that is only half written while the robot still runs."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
