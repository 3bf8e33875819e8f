"""What the loop tells others: one record per tick, one result per episode, and the taps they flow through.

A tap can neither stall nor crash the loop: pushing appends to a bounded queue that throws away its oldest entry,
and an observer's code runs in a thread of its own, where its errors are counted and logged once.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from env_client.control.source import Origin
from env_client.envs.env import Observation

__all__ = ["EpisodeResult", "MoveResult", "Observer", "RecordSink", "Tap", "TickRecord"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TickRecord:
    """What happened in one tick. The arrays are the loop's own: read them, never write."""

    episode: int
    # Number of the tick's deadline since the episode began; a gap means skipped deadlines.
    tick: int
    # run | move | paused | idle (between episodes: nothing is commanded)
    phase: str
    # When the tick started, in the loop's seconds, and how late that was.
    time: float
    late_s: float
    # None when the robot could not be read.
    observation: Observation | None
    # (A,) what the source asked for, None when it had nothing; and what was sent, None when nothing was.
    requested: np.ndarray | None = None
    sent: np.ndarray | None = None
    # (A,) the target after each step of the safety filter, see `Verdict.stages`; empty when held.
    stages: dict[str, np.ndarray] = field(default_factory=dict)
    # Why the tick held its pose although it had or should have had an action; None when it did not.
    refused: str | None = None
    held: bool = False
    origin: Origin | None = None
    # Seconds spent reading the robot, asking the source and the safety filter, and commanding the robot.
    read_s: float = 0.0
    think_s: float = 0.0
    send_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode went."""

    episode: int
    # stopped | steps | time | done | env lost
    outcome: str
    # Ticks with a command of the policy, and seconds, from the first tick to the last.
    steps: int
    duration_s: float
    # What the env says; None where it cannot know.
    success: bool | None
    # Ticks without an action before the first chunk, and after it.
    waiting: int
    starved: int
    # Refused actions by reason, and ticks in which a safety step changed the target, by step.
    refused: dict[str, int]
    interventions: dict[str, int]
    # Ticks that the robot could not be read or commanded in, and ticks held because an observation was too old.
    env_errors: int
    old_observations: int
    # Exceptions of the action source itself, which are defects.
    source_errors: int
    # See `Timing.summary` and `Timing.histogram`.
    timing: dict[str, float]
    jitter_histogram: dict[str, int]
    # See `SourceStats.snapshot`.
    source: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class MoveResult:
    """How a move to a pose ended."""

    reached: bool
    # (A,) measured minus wanted, in the robot's unit; None when the robot could not be read.
    error: np.ndarray | None
    # reached | stopped | not there | env lost
    outcome: str
    duration_s: float


class RecordSink(Protocol):
    """Whoever is told of every tick, in the loop's own thread: `push` must do no more than store the record."""

    def push(self, record: TickRecord) -> None: ...


class Tap:
    """A bounded queue of records, the newest win. One thread pushes, one pulls; neither waits for the other."""

    def __init__(self, size: int = 4):
        self._records: deque[TickRecord] = deque(maxlen=size)
        self._arrived = threading.Event()
        self.pushed = 0
        self.pulled = 0

    @property
    def dropped(self) -> int:
        """Records that were thrown away because nobody pulled them in time."""
        return max(0, self.pushed - self.pulled - len(self._records))

    def push(self, record: TickRecord) -> None:
        self._records.append(record)
        self.pushed += 1
        self._arrived.set()

    def pull(self, timeout_s: float | None = 0.0) -> TickRecord | None:
        """The oldest record that is still here; waits up to `timeout_s` for one, None when none came."""
        if not self._records and not self._arrived.wait(timeout_s):
            return None
        self._arrived.clear()
        try:
            record = self._records.popleft()
        except IndexError:
            return None
        if self._records:
            self._arrived.set()
        self.pulled += 1
        return record


class Observer:
    """Calls a function for each record, in a daemon thread of its own.

    It shares the interpreter with the loop: encoding and drawing belong into another process, to which the
    function only hands the record on.
    """

    def __init__(self, function: Callable[[TickRecord], None], size: int = 4):
        self.tap = Tap(size)
        self.errors = 0
        self._function = function
        self._closed = threading.Event()
        name = getattr(function, "__name__", type(function).__name__)
        self._name = name
        self._thread = threading.Thread(target=self._run, name=f"observer-{name}", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Hand over what is left and end."""
        self._closed.set()
        self.tap._arrived.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            record = self.tap.pull(timeout_s=0.2)
            if record is None:
                if self._closed.is_set():
                    return
                continue
            try:
                self._function(record)
            except Exception:
                self.errors += 1
                if self.errors == 1:
                    logger.exception(
                        "the observer %s failed; it is called again, further errors are counted", self._name
                    )
