"""The loop's hold on the robot: reading, commanding, and what happens while it cannot be reached.

Error policy: an `EnvError` means that the robot cannot be read or commanded now. It is counted, said once, and
nothing is sent until the env, which rebuilds its driver by itself, answers again. Then the next command is
limited against the measured pose. Only a hiccup (shorter than `brief_outage_s`) is passed over: the servos kept
their goal meanwhile, and throwing the plan away would turn one lost packet into a stop of a whole latency.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from env_client.control.clock import Clock, Pacer, Timing
from env_client.control.safety import SafetyFilter, Verdict
from env_client.envs.env import Env, EnvError, EnvSpec, Observation

__all__ = ["LoopConfig", "RobotLink", "measured_pose"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """What the loop tolerates."""

    # Oldest camera frame in s that an action may be computed from; older ones count as a frozen camera.
    max_image_age_s: float = 0.5
    # Oldest joint reading in s that an action may be computed from.
    max_state_age_s: float = 0.2
    # How long to wait in s for a robot that cannot be reached before the episode is given up; 0 = for ever.
    env_patience_s: float = 60.0
    # A robot that was away for less than this, in s, goes on as if nothing had been.
    brief_outage_s: float = 0.25
    # Do everything but command the motors.
    dry_run: bool = False
    # Speed of move_to in rad/s, and in the same proportion for grippers; the safety filter's limits hold anyway.
    move_velocity: float = 0.75
    # A move has arrived when each joint is this close, in rad (gravity makes a position-controlled arm sag).
    move_tolerance: float = 0.1
    # How long a move waits in s at its end for the arm to arrive.
    move_settle_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_image_age_s", "max_state_age_s", "move_velocity", "move_tolerance"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} is {value}; a number above 0 was expected")
        for name in ("env_patience_s", "brief_outage_s", "move_settle_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}; 0 or a number above it was expected")


def measured_pose(env_spec: EnvSpec, observation: Observation) -> np.ndarray:
    """(A,) the measured value of each action value, in the robot's unit."""
    state = np.concatenate([np.ravel(observation.states[part.name]) for part in env_spec.states])
    return state[env_spec.state_index]


class RobotLink:
    """An env seen through one run of ticks (an episode or a move). Belongs to the loop's thread.

    `counts` holds "env errors" (ticks that failed) and "old observations".
    """

    def __init__(self, env: Env, safety: SafetyFilter, clock: Clock, config: LoopConfig, timing: Timing):
        self.env, self.safety, self.clock, self.config, self.timing = env, safety, clock, config, timing
        self.counts: Counter[str] = Counter()
        # True when the robot was away for long: what was planned belongs to the time before.
        self.came_back = False
        self._down_since: float | None = None
        self._rebased = False
        # When a command last left, or may have left although the driver says that it failed.
        self._tried: float | None = None

    def wait(
        self, read: Callable[[], Observation], stop: threading.Event, each_tick: Callable[[], None]
    ) -> np.ndarray | str:
        """The measured (A,) pose as soon as the robot answers; "stopped" or "env lost" when it never did."""
        pacer = Pacer(self.clock, self.timing.period)
        while not stop.is_set():
            each_tick()
            _, pose, _ = self._try(read)
            if pose is not None:
                self._note_back()
                return pose
            if self.lost:
                return "env lost"
            pacer.wait()
        return "stopped"

    def read(self) -> tuple[Observation | None, np.ndarray | None, str | None]:
        """The observation and the measured (A,) pose, or None twice and why."""
        observation, pose, error = self._try(self.env.get_observation)
        if pose is not None and self._away_s > self.config.brief_outage_s:
            self.safety.rebase(pose)
            self.came_back |= not self._rebased
            self._rebased = True
        return observation, pose, error

    def send(self, verdict: Verdict) -> tuple[np.ndarray | None, str | None]:
        """What was sent, or None and why not."""
        if not self.config.dry_run:
            try:
                self.env.apply_action(verdict.action)
            except EnvError as caught:
                self._tried = self.clock.now()
                self.safety.unsent()
                self._note_away(str(caught))
                return None, str(caught)
        self._tried = self.clock.now()
        self.timing.sent(self._tried)
        # Only a robot that can be read and commanded is back.
        self._note_back()
        return verdict.action, None

    @property
    def since_last_command_s(self) -> float | None:
        """None before the first command."""
        return None if self._tried is None else self.clock.now() - self._tried

    @property
    def lost(self) -> bool:
        """True when the robot has been away for longer than one may wait for it."""
        patience = self.config.env_patience_s
        return 0 < patience < self._away_s

    def too_old(self, observation: Observation) -> str | None:
        """Why an observation must not be acted on; None when it is fresh."""
        reason = None
        # `not <=` also refuses an age that is not a number.
        if not observation.state_age <= self.config.max_state_age_s:
            reason = "the joint readings are old"
        for name, age in observation.image_age.items():
            if not age <= self.config.max_image_age_s:
                reason = f"camera {name} is frozen"
        self.counts["old observations"] += reason is not None
        return reason

    def _try(
        self, read: Callable[[], Observation]
    ) -> tuple[Observation | None, np.ndarray | None, str | None]:
        try:
            observation = read()
        except EnvError as caught:
            self._note_away(str(caught))
            return None, None, str(caught)
        pose = measured_pose(self.env.spec, observation)
        if not np.isfinite(pose).all():
            error = "the robot's state holds values that are not finite"
            self._note_away(error)
            return None, None, error
        return observation, pose, None

    def _note_away(self, error: str) -> None:
        self.counts["env errors"] += 1
        self.timing.interrupted()
        if self._down_since is None:
            self._down_since = self.clock.now()
            logger.warning("the robot cannot be reached: %s; nothing is sent until it comes back", error)

    @property
    def _away_s(self) -> float:
        return 0.0 if self._down_since is None else self.clock.now() - self._down_since

    def _note_back(self) -> None:
        if self._down_since is not None:
            logger.warning("the robot is back after %.2f s", self._away_s)
            self._down_since, self._rebased = None, False
