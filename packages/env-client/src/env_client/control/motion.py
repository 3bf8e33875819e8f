"""Smooth paths between two poses, for the ready pose and the rest pose."""

import numpy as np

__all__ = ["MinimumJerk"]

# The largest speed of a minimum-jerk path is this many times its mean speed.
PEAK_TO_MEAN = 15 / 8


class MinimumJerk:
    """The straight path in joint space whose third derivative is smallest: s(x) = 10 x^3 - 15 x^4 + 6 x^5 with
    x = t / T (Flash and Hogan 1985). It starts and ends with zero speed and acceleration; all joints arrive at
    the same time, the slowest at its largest allowed speed."""

    def __init__(self, start: np.ndarray, goal: np.ndarray, speed: np.ndarray):
        """`start`, `goal`: (A,); `speed`: (A,) largest speed of each, per second, above 0."""
        self.start = np.asarray(start, np.float64)
        self.goal = np.asarray(goal, np.float64)
        distance = np.abs(self.goal - self.start)
        # Seconds; 0 when start and goal are the same.
        self.duration_s = float((PEAK_TO_MEAN * distance / np.asarray(speed, np.float64)).max(initial=0.0))

    def at(self, time_s: float) -> np.ndarray:
        """(A,) where the path is `time_s` seconds after its start; the goal from its end on."""
        if time_s >= self.duration_s:
            return self.goal
        x = max(0.0, time_s) / self.duration_s
        return self.start + (self.goal - self.start) * (x**3 * (10 + x * (6 * x - 15)))
