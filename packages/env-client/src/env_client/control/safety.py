"""What may reach a motor: one filter with one fixed order, the last thing before the driver.

The order, each step once and always in this sequence:

    1. finite numbers, and as many as the robot has joints     refused: hold
    2. not stale: this episode's, and not too late             refused: hold
    3. part selection: what is disabled keeps its pose
    4. gripper binarisation with hysteresis (optional)
    5. smoothing over the last N targets (optional)
    6. step clamp while the arm catches up with a new chunk
    7. joint limits
    8. velocity limit, against the last command sent

Life cycle: `begin_episode` with the measured pose, then `apply` once for every command. Error policy: a wrong
configuration is a `ValueError` at construction; a wrong action never raises, it is refused: the last command
is sent again, a counter grows, and one log line says why.
"""

import logging
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from env_client.envs.env import EnvSpec

__all__ = ["SafetyConfig", "SafetyFilter", "Verdict"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SafetyConfig:
    """What may reach a motor. Speeds are limits of the command, per joint."""

    # Fastest a joint may be commanded, in rad/s.
    max_velocity: float = 1.5
    # Fastest a gripper may be commanded, in % of its travel per second. An unloaded STS3215 manages about 245 at
    # 12 V; 200 closes the hand in half a second, as people do in recordings, and stays below what it can follow.
    gripper_max_velocity: float = 200.0
    # The older flag: rad per frame instead of rad/s; 0 leaves it to max_velocity.
    max_velocity_per_frame: float = 0.0
    # Send the gripper only fully open or fully closed.
    binarize_gripper: bool = False
    # Beyond this the gripper opens, in the robot's own unit (SO-101: 0 closed, 100 open).
    gripper_open_at: float = 60.0
    # Beyond this the gripper closes, in the robot's own unit. Between the two it stays as it is.
    gripper_close_at: float = 40.0
    # What "open" is commanded as, in the robot's own unit; the robot's limit when not given.
    gripper_open_value: float | None = None
    # What "closed" is commanded as, in the robot's own unit; the robot's limit when not given.
    gripper_closed_value: float | None = None
    # Average the targets of this many ticks; 0 and 1 leave them as they are. Adds (N-1)/2 ticks of lag.
    smooth: int = 0
    # Speed in rad/s at which a joint may close the gap to a new chunk; steps as large as those inside the chunk
    # are allowed too. 0 leaves the gap to the velocity limit.
    boundary_velocity: float = 0.3
    # Names of parts (arm, left_arm, head) or joints (wrist_roll) that keep the pose they have.
    hold: tuple[str, ...] = ()
    # How much later than it was meant for an action may be executed, in s; 0 does not look. Generous, because a
    # model that takes half a minute, with the arm standing still meanwhile, is slow but right.
    max_late_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_velocity", "gripper_max_velocity"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"{name} is {value}; a speed above 0 was expected. To keep the arm still, use --dry-run or hold"
                )
        for name in ("max_velocity_per_frame", "boundary_velocity", "max_late_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}; 0 or a number above it was expected")
        if self.smooth < 0:
            raise ValueError(f"smooth is {self.smooth}; 0 or a number of ticks was expected")
        gap = self.gripper_open_at - self.gripper_close_at
        if self.binarize_gripper and (not math.isfinite(gap) or gap == 0):
            raise ValueError(
                f"gripper_open_at is {self.gripper_open_at} and gripper_close_at {self.gripper_close_at}; two "
                "thresholds with a gap between them were expected, or the gripper would chatter"
            )


@dataclass(frozen=True)
class Verdict:
    """What is to be sent, and why."""

    # (A,) float32 in the robot's unit: always safe to send.
    action: np.ndarray
    # Why the action was refused; None when it was used, or when there was none.
    refused: str | None = None
    # True when the last command is repeated (refused, or no action came).
    held: bool = False
    # The target after each step that looked at it, (A,) float64, by the step's name; empty when held.
    stages: dict[str, np.ndarray] = field(default_factory=dict)


class SafetyFilter:
    """The fixed order of the module's docstring, for one robot. Not thread-safe: it belongs to the loop's thread.

    `counters` counts ticks by reason: "starved", "not finite", "wrong dimension", "stale".
    `interventions` counts ticks in which a step changed the target: "gripper", "smooth", "boundary", "limits",
    "velocity".
    """

    def __init__(self, spec: EnvSpec, config: SafetyConfig, fps: float):
        """Raises `ValueError` when the spec's arrays do not fit each other, or a name to hold is unknown."""
        if not math.isfinite(fps) or fps <= 0:
            raise ValueError(f"the control rate is {fps} Hz; a rate above 0 was expected")
        self.spec, self.config, self.period = spec, config, 1.0 / fps
        self.counters: Counter[str] = Counter()
        self.interventions: Counter[str] = Counter()
        size = spec.action_dim
        self._gripper = _vector(spec.gripper, size, "gripper").astype(bool)
        scale = np.abs(_vector(spec.unit_per_rad, size, "unit_per_rad"))
        if not np.isfinite(scale).all() or (scale == 0).any():
            raise ValueError(f"the robot's unit_per_rad is {scale}; finite numbers above 0 were expected")
        lower, upper = _vector(spec.lower, size, "lower"), _vector(spec.upper, size, "upper")
        if np.isnan(lower).any() or np.isnan(upper).any() or (lower > upper).any():
            raise ValueError(f"the robot's limits are {lower} to {upper}; lower <= upper was expected")
        # Commands are float32: the limits are rounded inwards, so that no rounding leaves them.
        self.lower, self.upper = _round_up(lower), _round_down(upper)
        # The fastest that a joint may be commanded, rad/s.
        self.joint_speed = (
            config.max_velocity_per_frame * fps if config.max_velocity_per_frame > 0 else config.max_velocity
        )
        # (A,) largest speed of each command, in the robot's unit per second.
        self.speed = np.where(self._gripper, config.gripper_max_velocity, self.joint_speed) * scale
        own = np.full(size, np.inf) if spec.speed is None else _vector(spec.speed, size, "speed")
        if not (own > 0).all():
            raise ValueError(f"the robot's own speed limits are {own}; numbers above 0 were expected")
        self.speed = np.minimum(self.speed, own)
        self._boundary_speed = np.where(self._gripper, self.speed, config.boundary_velocity * scale)
        # (A,) True where the config holds the joint.
        self.held = self._find_held(config.hold)
        self._closes_high = config.gripper_close_at > config.gripper_open_at
        ends = (self.lower, self.upper) if self._closes_high else (self.upper, self.lower)
        self._open_value = _or(config.gripper_open_value, ends[0])
        self._closed_value = _or(config.gripper_closed_value, ends[1])
        self._window: deque[np.ndarray] = deque(maxlen=max(1, config.smooth))
        self._last: np.ndarray | None = None
        self._episode: int | None = None
        # Until the first command after a `rebase`: the pose it is limited against, and the command before it.
        self._measured: np.ndarray | None = None
        # The command before the last one, and the lowest and highest goals that servos may hold: see `unsent`.
        self._sent_before: np.ndarray | None = None
        self._low: np.ndarray = np.zeros(size)
        self._high: np.ndarray = np.zeros(size)
        self._before: np.ndarray | None = None
        self._closed: np.ndarray = np.zeros(size, bool)
        self._catching: np.ndarray = np.zeros(size, bool)
        self._said: str | None = None

    @property
    def last(self) -> np.ndarray | None:
        """(A,) the last command sent, or the measured pose before the first one; None before an episode."""
        return None if self._last is None else self._last.copy()

    def begin_episode(self, measured: np.ndarray, episode: int | None = None) -> None:
        """Start from the measured (A,) pose. Actions of another episode are stale from here on.

        Raises `ValueError` when the pose is not (A,) finite numbers: nothing may be commanded from there.
        """
        self.rebase(measured)
        self._episode = episode

    def rebase(self, measured: np.ndarray) -> None:
        """Limit the next command against this pose, as at the start and after a lost robot.

        The next command lies within one step of the measured pose. Inside of that it stays as near as it can to the
        last command, which the servos may still be holding: gravity makes the two differ by a little, and the goal
        need not jump by it. Raises `ValueError` when the pose is not (A,) finite numbers.
        """
        pose = _numbers(measured, self.spec.action_dim)
        if isinstance(pose, str):
            raise ValueError(f"the measured pose is refused ({pose}): {measured!r:.120}")
        self._before = self._last
        self._start_from(pose)
        self._said = None

    def unsent(self) -> None:
        """The command of the last `apply` failed on its way: it may have reached all motors, some, or none.

        The next one is then limited against everything that a servo may hold as its goal by now.
        """
        if self._last is None or self._sent_before is None:
            return
        self._low = np.minimum(self._low, self._last)
        self._high = np.maximum(self._high, self._last)
        self._last, self._sent_before = self._sent_before, None

    def apply(
        self,
        action: Any,
        *,
        measured: np.ndarray | None = None,
        boundary: bool = False,
        dt_s: float | None = None,
        inner_step: np.ndarray | None = None,
        late_s: float | None = None,
        episode: int | None = None,
        direct: bool = False,
    ) -> Verdict:
        """What to send for this tick.

        `action`: (A,) in the robot's unit, or None when there is none. `measured`: (A,) pose of this tick; it is the
        base of the first command. `boundary`: the first action of a new chunk. `dt_s`: time since the last
        command; never more than one nominal period counts, because the servo executes the step in the period
        *after* it, however long the one before it was. Less than a period counts as what it is.
        `inner_step`: (A,) largest step inside the chunk. `late_s`: how much later than meant this is.
        `episode`: the action's. `direct`: a path of our own (ready, rest): no binarisation and no smoothing.

        Raises `RuntimeError` when no episode was begun.
        """
        if self._last is None:
            raise RuntimeError("the safety filter has no pose yet: begin_episode(measured) comes first")
        if self._measured is not None and measured is not None:
            pose = _numbers(measured, self.spec.action_dim)
            if isinstance(pose, str):
                return self._hold(f"measured pose {pose}")
            self._start_from(pose)
        if action is None:
            return self._hold(None)
        target = self._admit(action, late_s, episode)
        if isinstance(target, str):
            return self._hold(target)
        dt = self.period if dt_s is None else dt_s
        dt = min(self.period, dt) if dt > 0 else 0.0
        stages = {"requested": target.copy()}
        target = np.where(self.held, self._last, target)
        stages["parts"] = target
        if self.config.binarize_gripper and not direct:
            target = self._stage(stages, "gripper", target, self._binarize(target))
        if self.config.smooth > 1 and not direct:
            self._window.append(target)
            target = self._stage(stages, "smooth", target, np.mean(self._window, axis=0))
        target = self._stage(stages, "boundary", target, self._catch_up(target, boundary, inner_step, dt))
        target = self._stage(stages, "limits", target, np.clip(target, self.lower, self.upper))
        # A held joint that stands outside its limits stays where it is: hold means hold.
        target = np.where(self.held, self._last, target)
        reach = self.speed * dt
        target = self._stage(stages, "velocity", target, self._limit_speed(target, reach))
        command = _round_towards(target, self._last if self._measured is None else self._measured, reach)
        self._sent_before, self._last = self._last, command.astype(np.float64)
        self._low = self._high = self._last
        self._measured, self._said = None, None
        return Verdict(command, stages=stages)

    # ------------------------------------------------------------------------------------------- the steps

    def _admit(self, action: Any, late_s: float | None, episode: int | None) -> np.ndarray | str:
        """The target as (A,) float64, or why it is refused (steps 1 and 2)."""
        target = _numbers(action, self.spec.action_dim)
        if isinstance(target, str):
            return target
        if episode is not None and self._episode is not None and episode != self._episode:
            return "stale"
        # `not <=` also refuses what is not a number.
        if late_s is not None and self.config.max_late_s > 0 and not late_s <= self.config.max_late_s:
            return "stale"
        return target

    def _binarize(self, target: np.ndarray) -> np.ndarray:
        """Step 4: fully open or fully closed; between the thresholds the gripper keeps its side."""
        sign = 1.0 if self._closes_high else -1.0
        closes = sign * target >= sign * self.config.gripper_close_at
        opens = sign * target <= sign * self.config.gripper_open_at
        self._closed = np.where(closes, True, np.where(opens, False, self._closed))
        ends = np.where(self._closed, self._closed_value, self._open_value)
        return np.where(self._gripper & ~self.held, ends, target)

    def _catch_up(
        self, target: np.ndarray, boundary: bool, inner_step: np.ndarray | None, dt: float
    ) -> np.ndarray:
        """Step 6: from a boundary on, and until a joint has caught up, its steps are clamped."""
        if self.config.boundary_velocity == 0:
            return target
        assert self._last is not None
        allowed = self._boundary_speed * dt
        if inner_step is not None:
            allowed = np.fmax(allowed, np.abs(inner_step))
        # Clamping only the boundary tick would move the jump to the tick after it.
        gap = np.abs(target - self._last)
        self._catching = (self._catching | boundary) & (gap > allowed)
        step = np.clip(target - self._last, -allowed, allowed)
        return np.where(self._catching, self._last + step, target)

    def _limit_speed(self, target: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """Step 8: at most `reach` from the last command, and from whatever else counts as one."""
        assert self._last is not None
        limited = self._last + np.clip(target - self._last, -reach, reach)
        if self._measured is not None:
            return np.clip(limited, self._measured - reach, self._measured + reach)
        # Goals that servos may have: one after a command that arrived, more after commands that may not have.
        floor, ceiling = self._high - reach, self._low + reach
        return np.where(
            floor <= ceiling, np.clip(limited, floor, np.maximum(floor, ceiling)), (floor + ceiling) / 2
        )

    # ------------------------------------------------------------------------------------------- the rest

    def _stage(self, stages: dict, name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        stages[name] = after
        if not np.array_equal(before, after):
            self.interventions[name] += 1
        return after

    def _hold(self, reason: str | None) -> Verdict:
        """The last command again."""
        assert self._last is not None
        # A held command is a command too: from now on it is the one to be limited against.
        self._measured = None
        self._sent_before = self._last
        self.counters[reason or "starved"] += 1
        if reason is not None and reason != self._said:
            self._said = reason
            logger.warning(
                "an action was refused (%s): the robot holds its pose until a good one comes", reason
            )
        # After a pause, smoothing starts from where the arm stands and not from what it was about to do.
        self._window.extend([self._last] * (self._window.maxlen or 1))
        return Verdict(self._last.astype(np.float32), refused=reason, held=True)

    def _start_from(self, pose: np.ndarray) -> None:
        step = self.speed * self.period
        # Rounded like a command, because it is one when the first tick holds.
        start = pose if self._before is None else np.clip(self._before, pose - step, pose + step)
        self._last = _round_towards(start, pose, step).astype(np.float64)
        self._measured = pose
        self._low = self._high = self._last
        self._sent_before = None
        middle = (self.config.gripper_open_at + self.config.gripper_close_at) / 2
        self._closed = (pose > middle) if self._closes_high else (pose < middle)
        self._window.clear()
        self._window.extend([pose] * (self._window.maxlen or 1))
        self._catching = np.zeros(self.spec.action_dim, bool)

    def _find_held(self, names: tuple[str, ...]) -> np.ndarray:
        held = np.zeros(self.spec.action_dim, bool)
        parts: dict[str, list[int]] = {}
        edges = np.cumsum([0] + [part.size for part in self.spec.states])
        for action, index in enumerate(_vector(self.spec.state_index, self.spec.action_dim, "state_index")):
            part = int(np.searchsorted(edges, index, side="right")) - 1
            if 0 <= part < len(self.spec.states):
                parts.setdefault(self.spec.states[part].name, []).append(action)
        joints = {name: [index] for index, name in enumerate(self.spec.action_names)}
        for name in names:
            if name not in parts and name not in joints:
                raise ValueError(
                    f"{name!r} is to be held, but this robot has no such part or joint; it has the parts "
                    f"{', '.join(parts) or 'none'} and the joints {', '.join(joints)}"
                )
            held[parts.get(name) or joints[name]] = True
        return held


def _numbers(value: Any, size: int) -> np.ndarray | str:
    """`value` as (size,) float64, or why it is none. What float32 cannot hold is not finite either."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return "not finite"
    if array.shape != (size,):
        return "wrong dimension"
    if not np.isfinite(array).all():
        return "not finite"
    return array.astype(np.float64)


def _vector(value: Any, size: int, name: str) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (size,):
        raise ValueError(
            f"the robot's {name} has shape {array.shape}; ({size},) was expected, one per action value"
        )
    return array


def _or(value: float | None, default: np.ndarray) -> np.ndarray:
    return default if value is None else np.full_like(default, value)


def _round_up(values: np.ndarray) -> np.ndarray:
    """The smallest float32 not below each value, as float64."""
    near = values.astype(np.float32)
    return np.where(near < values, np.nextafter(near, np.float32(np.inf)), near).astype(np.float64)


def _round_down(values: np.ndarray) -> np.ndarray:
    return -_round_up(-values)


def _round_towards(target: np.ndarray, base: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """`target` as float32, no further than `reach` from `base` in spite of the rounding."""
    command = target.astype(np.float32)
    beyond = np.abs(command.astype(np.float64) - base) > reach
    return np.where(beyond, np.nextafter(command, base.astype(np.float32)), command)
