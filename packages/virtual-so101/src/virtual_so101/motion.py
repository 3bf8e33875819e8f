"""The motion profile of a servo's firmware: from the goal that the bus set to the set point of the motor.

It runs on the physics' side of the bus, tick by tick in simulated time, so that lock step repeats exactly.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["ACCELERATION", "ON", "TARGET", "TOP_SPEED", "Motion"]

# Rows of an arm command, (4, 6): target in rad, motor on (0 or 1), speed limit in rad/s and acceleration in
# rad/s²; a limit of 0 leaves it to the motor.
TARGET, ON, TOP_SPEED, ACCELERATION = range(4)


class Motion:
    """Set points of one arm's six servos. Not thread-safe: the physics owns it."""

    def __init__(self) -> None:
        self._setpoint = np.zeros(6)
        self._speed = np.zeros(6)

    def advance(self, dt: float, command: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Set points (6,) rad and motor switches (6,) bool for the next `dt` seconds.

        `positions` (6,) rad is where the joints are: a servo that is off follows it.
        """
        on = command[ON] > 0.0
        goals = np.where(on, command[TARGET], positions)
        shaped = on & ((command[TOP_SPEED] > 0.0) | (command[ACCELERATION] > 0.0))
        for i in np.flatnonzero(shaped):
            goals[i] = self._shape(int(i), dt, goals[i], command[TOP_SPEED, i], command[ACCELERATION, i])
        self._speed[~shaped] = 0.0
        self._setpoint[:] = goals
        return goals, on

    def _shape(self, i: int, dt: float, target: float, top: float, rate: float) -> float:
        rest = target - self._setpoint[i]
        top = top or math.inf
        if rate > 0.0:
            # The fastest speed from which it can still stop in the distance that is left.
            wanted = math.copysign(min(top, math.sqrt(2.0 * rate * abs(rest))), rest)
            self._speed[i] += min(max(wanted - self._speed[i], -rate * dt), rate * dt)
        else:
            self._speed[i] = math.copysign(top, rest)
        move = float(self._speed[i]) * dt
        arrives = abs(move) >= abs(rest) and move * rest >= 0.0
        return float(target if arrives else self._setpoint[i] + move)
