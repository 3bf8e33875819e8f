"""The actions that are still to be executed, and how a new chunk joins them. Arithmetic only.

A chunk that was asked for at one tick arrives some ticks later. Its first rows are then in the past: as many as
actions were really executed since (counted, not computed from the clock, because a loop that held its pose
meanwhile has consumed nothing). The rest overlaps the old plan, and the two disagree: real logs show jumps of
0.21 rad in one frame at such a seam where 0.11 was the largest step inside a chunk.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

__all__ = ["Chunk", "LatencyEstimate", "Plan", "largest_step"]

# How many chunks say how fast this policy moves.
RECENT_CHUNKS = 10


@dataclass(frozen=True)
class Chunk:
    """One answer of the server."""

    # (T, A) float32 in robot units; row 0 belongs to the tick of its observation.
    actions: np.ndarray
    seq: int
    episode: int
    # How many actions the source had handed out when the observation was captured.
    consumed_at_capture: int
    # The observation's capture time, in the loop's seconds.
    capture_time: float
    # From the request to the answer, in seconds.
    latency_s: float


def largest_step(actions: np.ndarray) -> np.ndarray:
    """(A,) largest change from one row of (T, A) actions to the next; zeros for a single row."""
    if len(actions) < 2:
        return np.zeros(actions.shape[1])
    return np.abs(np.diff(actions.astype(np.float64), axis=0)).max(axis=0)


class LatencyEstimate:
    """A robust upper estimate of the delay: the largest of the newest `window` measurements but one.

    A single slow answer (a reconnect, a stall of the network) says nothing of the next one; two do. An estimate that is too
    large only makes requests earlier, with a reserve that is not needed; one that is too small costs a tick
    without an action.
    """

    def __init__(self, window: int = 10):
        self._recent: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    @property
    def upper_s(self) -> float | None:
        """Seconds; None before the first measurement."""
        if not self._recent:
            return None
        # With few measurements none can be told to be the odd one.
        return sorted(self._recent)[-1 if len(self._recent) < 5 else -2]

    def ticks(self, fps: float) -> int | None:
        """Control ticks from a request until its answer can be used, rounded up; None before a measurement."""
        return None if self.upper_s is None else math.ceil(self.upper_s * fps - 1e-6)


class Plan:
    """A queue of actions that new chunks are merged into."""

    def __init__(self, action_dim: int, quiet_step: float | np.ndarray = 0.0):
        """`quiet_step`: a step, (A,) or one for all, so small in robot units that a seam may always use it to close
        a gap. It also is the measure by which joints of different units (rad, percent) are compared."""
        self._quiet_step = np.broadcast_to(np.asarray(quiet_step, np.float64), (action_dim,))
        self._empty: np.ndarray = np.zeros((0, action_dim))
        self.clear()

    def clear(self) -> None:
        """Nothing is planned, and nothing is continued."""
        self._rows: np.ndarray = self._empty
        self._received: np.ndarray = self._empty
        self._at = 0
        # The last row handed out: the seam must continue from it.
        self._last: np.ndarray | None = None
        # (A,) each: the largest steps inside the newest chunks.
        self._steps: deque[np.ndarray] = deque(maxlen=RECENT_CHUNKS)

    @property
    def remaining(self) -> int:
        return len(self._rows) - self._at

    @property
    def inner_step(self) -> np.ndarray:
        """(A,) largest step inside the newest chunks of this episode; zeros before the first."""
        return np.max(self._steps, axis=0) if self._steps else np.zeros(self._empty.shape[1])

    @property
    def received(self) -> np.ndarray:
        """(remaining, A) float32 what is still to be executed, as it came from the server (not blended)."""
        return self._received[self._at :].astype(np.float32)

    def pop(self) -> np.ndarray | None:
        """The next action (A,) float32; None when the plan is used up."""
        if self._at >= len(self._rows):
            return None
        self._last = self._rows[self._at]
        self._at += 1
        return self._last.astype(np.float32)

    def _learn(self, actions: np.ndarray) -> None:
        # A single row says nothing of how fast the policy moves.
        if len(actions) > 1:
            self._steps.append(largest_step(actions))

    def _comparable(self, steps: np.ndarray) -> np.ndarray:
        """(A,) for each joint the step that is as large as the largest of `steps`, and at least the quiet one."""
        quiet = self._quiet_step
        if not quiet.all():
            return np.maximum(quiet, steps.max())
        return quiet * max(1.0, float((steps / quiet).max()))

    def replace(self, actions: np.ndarray) -> None:
        """Continue with (T, A) `actions` as they are."""
        self._received = self._rows = actions.astype(np.float64)
        self._at = 0
        self._learn(actions)

    def merge(self, actions: np.ndarray, consumed: int, blend: int) -> bool:
        """Continue with (T, A) `actions`, of which the first `consumed` lie in the past. False if all do.

        Over the first `blend` rows of the overlap the old plan fades out linearly. Then no step, from the last
        action handed out on, may exceed the largest step inside the newest chunks (per joint): a plan may lag
        behind its chunk for a while, but it does not jump. A joint that hardly moves inside its chunks could then
        never close a gap: it may do so evenly over the rest of the plan, in steps no larger than those of the
        joint that moves most, or than the quiet step.
        """
        fresh = actions[consumed:].astype(np.float64)
        if not len(fresh):
            return False
        old = self._rows[self._at :]
        self._learn(actions)
        limit = self.inner_step
        rows = fresh.copy()
        overlap = min(len(old), len(fresh), blend)
        if overlap:
            weight = (np.arange(1, overlap + 1) / (overlap + 1))[:, None]
            rows[:overlap] = (1 - weight) * old[:overlap] + weight * fresh[:overlap]
        if self._last is not None and self._steps:
            even = np.abs(fresh[0] - self._last) / len(fresh)
            limit = np.maximum(limit, np.minimum(even, self._comparable(limit)))
            _limit_steps(rows, self._last, limit, certain=overlap)
        self._rows, self._received, self._at = rows, fresh, 0
        return True


def _limit_steps(rows: np.ndarray, start: np.ndarray, limit: np.ndarray, certain: int) -> None:
    """Change `rows` in place so that no step from `start` on exceeds `limit`; past row `certain` a row that
    needs no change ends the work, since the rows after it are a chunk's own."""
    last: np.ndarray = start
    for index, row in enumerate(rows):
        step = row - last
        clipped = np.clip(step, -limit, limit)
        if index > certain and np.array_equal(step, clipped):
            return
        rows[index] = last = last + clipped
