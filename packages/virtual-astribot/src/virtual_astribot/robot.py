"""The robot: joints that follow commands, control rights, a stop, a log of everything that it was told.

Life cycle: one `Robot` for a process; every method may be called from any thread and takes the robot's lock.
Time goes on in steps of 1/250 s whenever somebody looks: a goal, the desired position that follows it (at once for
"direct", smoothed for "filter"), and the position that follows that with a lag, never faster than its limit.

Error policy: as the SDK's. A wrong part, a wrong number of values or a wrong word is a ValueError; a command without
rights, while stopped, or outside the limits is refused: it is logged, and nothing moves.
"""

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from virtual_astribot.body import FREQ, PARTS

__all__ = ["Robot"]

logger = logging.getLogger(__name__)

_STEP = 1.0 / FREQ
# Time constant of the joints behind their desired position, in seconds.
_LAG_S = 0.03
# Idle for longer than this, everything has arrived, in seconds.
_SETTLED_S = 5.0
# float32 values of a client may exceed a limit by their rounding.
_ROUNDING = 1e-4

_SLICES: dict[str, slice] = {}
for _part in PARTS:
    _begin = sum(_SLICES[name].stop - _SLICES[name].start for name in _SLICES)
    _SLICES[_part.name] = slice(_begin, _begin + _part.dof)
_LOWER = np.concatenate([part.lower for part in PARTS])
_UPPER = np.concatenate([part.upper for part in PARTS])
_SPEED = np.concatenate([part.speed for part in PARTS])


class Robot:
    """One S1. `log` gets one JSON object a line: {"t": monotonic seconds, "client", "kind", …}."""

    def __init__(self, log: Path | None = None) -> None:
        self._lock = threading.RLock()
        self._log: TextIO | None = None if log is None else log.open("w", encoding="utf-8")
        self._position = np.concatenate([part.home for part in PARTS]).astype(np.float64)
        self._desired = self._position.copy()
        self._goal = self._position.copy()
        self._at = time.monotonic()
        # What part of the way to its goal a desired position goes in one step; 1 for "direct".
        self._share = np.ones_like(self._goal)
        self._filter = np.full_like(self._goal, 0.1)
        self.holder: int | None = None
        self.stopped = False
        # Switches: names of calls that return None, cameras that are silent, and until when nothing is answered.
        self.silent_calls: set[str] = set()
        self.silent_cameras: set[str] = set()
        self.stalled_until = 0.0

    # ----------------------------------------------------------------------------------- control rights

    def claim(self, client: int, high: bool) -> bool:
        """Whether `client` has the rights now; `high` takes them from whoever has them."""
        with self._lock:
            if self.holder is None or high:
                self.holder = client
                self._write(client, "rights")
            return self.holder == client

    def release(self, client: int) -> None:
        """A client is gone."""
        with self._lock:
            if self.holder == client:
                self.holder = None
                self._write(client, "released")

    # ---------------------------------------------------------------------------------------- reading

    def read(self, what: str, names: Sequence[str]) -> list[list[float]]:
        """`position`, `desired`, or `velocity_limit` of the parts."""
        with self._lock:
            self._advance()
            vector = {"position": self._position, "desired": self._desired, "velocity_limit": _SPEED}[what]
            return [vector[_slice(name)].tolist() for name in names]

    def limits(self, names: Sequence[str]) -> list[list[list[float]]]:
        return [[limit[_slice(name)].tolist() for name in names] for limit in (_LOWER, _UPPER)]

    # --------------------------------------------------------------------------------------- commanding

    def command(
        self,
        client: int,
        kind: str,
        names: Sequence[str],
        values: Sequence[Sequence[float]],
        way: str = "direct",
    ) -> bool:
        """Set the goal of these parts; False when it was refused."""
        if way not in ("direct", "filter"):
            raise ValueError(f"control_way is {way!r}; 'filter' or 'direct' was expected")
        if len(names) != len(values):
            raise ValueError(f"{len(names)} names and {len(values)} positions")
        goals = {}
        for name, part in zip(names, values, strict=True):
            where, goal = _slice(name), np.asarray(part, np.float64)
            if goal.shape != (where.stop - where.start,):
                raise ValueError(f"{name} has {where.stop - where.start} joints; {goal.shape} came")
            goals[name] = goal
        with self._lock:
            reason = self._refusal(client)
            for name, goal in goals.items():
                where = _slice(name)
                inside = (goal >= _LOWER[where] - _ROUNDING) & (goal <= _UPPER[where] + _ROUNDING)
                if not inside.all():
                    reason = reason or f"{name} outside its limits"
            plain = {name: goal.tolist() for name, goal in goals.items()}
            if reason is not None:
                self._refuse(client, kind, reason, plain)
                return False
            self._advance()
            for name, goal in goals.items():
                self._goal[_slice(name)] = goal
                self._share[_slice(name)] = 1.0 if way == "direct" else self._filter[_slice(name)]
            self._write(client, kind, goal=plain, way=way)
            return True

    def move(
        self,
        client: int,
        names: Sequence[str],
        waypoints: Sequence[Sequence[Sequence[float]]],
        times: Sequence[float],
    ) -> str | None:
        """Go through waypoints[k][part][dof] at `times` (s from now), and wait for it; None when refused."""
        start = self.read("desired", names)
        begun = time.monotonic()
        points = [start, *waypoints]
        marks = [0.0, *times]
        for before, after, begin, end in zip(points, points[1:], marks, marks[1:], strict=False):
            while True:
                x = min(1.0, (time.monotonic() - begun - begin) / max(end - begin, _STEP))
                s = x**3 * (10 + x * (6 * x - 15))
                goal = [
                    [a + s * (b - a) for a, b in zip(low, high, strict=True)]
                    for low, high in zip(before, after, strict=True)
                ]
                if not self.command(client, "move", names, goal):
                    return None
                if x >= 1.0:
                    break
                time.sleep(_STEP)
        return "succeed"

    def stop(self, client: int) -> str | None:
        """Hold where it is; refuse commands until `restart`."""
        with self._lock:
            if self.holder != client:
                self._refuse(client, "stop_robot", "no control rights", {})
                return None
            self._advance()
            self._goal = self._desired = self._position.copy()
            self._share[:] = 1.0
            self.stopped = True
            self._write(client, "stop_robot")
            return "stopped"

    def restart(self, client: int) -> str | None:
        with self._lock:
            if self.holder != client:
                self._refuse(client, "restart_robot", "no control rights", {})
                return None
            self.stopped = False
            self._write(client, "restart_robot")
            return "restarted"

    def set_filter(self, client: int, scale: float, gripper_scale: float) -> None:
        with self._lock:
            if self._refusal(client) is None and 0 < scale <= 1 and 0 < gripper_scale <= 1:
                for name, where in _SLICES.items():
                    self._filter[where] = gripper_scale if "gripper" in name else scale

    # -------------------------------------------------------------------------------------- the inside

    def _refusal(self, client: int) -> str | None:
        if self.holder != client:
            return "no control rights"
        return "the robot is stopped" if self.stopped else None

    def _advance(self) -> None:
        now = time.monotonic()
        if now - self._at > _SETTLED_S:
            self._desired, self._position, self._at = self._goal.copy(), self._goal.copy(), now
        while self._at + _STEP <= now:
            self._at += _STEP
            self._desired = self._desired + self._share * (self._goal - self._desired)
            step = (self._desired - self._position) * (_STEP / _LAG_S)
            self._position = self._position + np.clip(step, -_SPEED * _STEP, _SPEED * _STEP)

    def _refuse(self, client: int, kind: str, reason: str, goal: dict[str, Any]) -> None:
        logger.error("%s refused: %s", kind, reason)
        self._write(client, kind, refused=reason, goal=goal)

    def _write(self, client: int, kind: str, **more: Any) -> None:
        if self._log is not None:
            entry = {"t": time.monotonic(), "client": client, "kind": kind, **more}
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()


def _slice(name: str) -> slice:
    if name not in _SLICES:
        raise ValueError(f"{name!r} is no part of this robot; it has {', '.join(_SLICES)}")
    return _SLICES[name]
