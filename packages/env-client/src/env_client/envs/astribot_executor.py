"""Set-points between two actions: the robot's own loop runs at 250 Hz, the policy's at 30.

Each new target is approached on a straight line that takes `blend_s` from where the set-point is then. With targets
that move no faster than v (the safety filter sees to that) the set-point is never more than v * blend_s behind, so
it moves no faster than v either, and it is never outside the range of the targets. Nothing is extrapolated: without
a new target the set-point ends at the last one.

Used by one thread at a time; pure arithmetic.
"""

import numpy as np

__all__ = ["SetPoints"]


class SetPoints:
    """Where the robot is sent between two actions. One thread aims, another may ask `at` meanwhile."""

    def __init__(self, blend_s: float) -> None:
        self._blend_s = blend_s
        # (from, to, since): replaced as a whole, so that no reader sees half of a new line.
        self._line: tuple[np.ndarray, np.ndarray, float] | None = None

    def begin(self, pose: np.ndarray, now: float) -> None:
        """Start from a pose (A,), unless there is a set-point already."""
        if self._line is None:
            self._line = np.array(pose), np.array(pose), now

    def clear(self) -> None:
        """Forget everything; `begin` comes next."""
        self._line = None

    def aim(self, target: np.ndarray, now: float) -> None:
        """Go to `target` (A,) from where the set-point is `now` (s). Raises `RuntimeError` before `begin`."""
        start = self.at(now)
        if start is None:
            raise RuntimeError("no set-point yet: begin comes first")
        self._line = start, np.array(target), now

    def at(self, now: float) -> np.ndarray | None:
        """(A,) the set-point at `now` (s); None when there is none."""
        line = self._line
        if line is None:
            return None
        start, target, since = line
        share = min(1.0, max(0.0, (now - since) / self._blend_s))
        return start + share * (target - start) if share < 1.0 else target
