"""The clock: one thread that reads the robot, asks for an action, filters it and sends it, at a steady rate.

    tick:  deadline -> env.get_observation -> source.next_action -> safety.apply -> env.apply_action -> record

Life cycle: one `ControlLoop` per robot; `move_to`, `run_episode` and `move_to` again, any number of times, always
from the same thread (all calls to the env come from there). `pause`, `resume` and the stop event may come from
any thread and act within one tick.

Error policy: an `EnvError` means that the robot cannot be reached. The loop keeps its clock, sends nothing, and
asks the env again at each tick: the env itself rebuilds its driver. When it comes back, the next command is limited against
the measured pose and all chunks are asked for again. Any other exception of the env is a defect: the loop ends
and raises it, and whoever runs it applies the exit rule. A defect of the source is survived: the robot holds.
"""

import gc
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from env_client.control.clock import Clock, MonotonicClock, Pacer, Tick, Timing
from env_client.control.motion import MinimumJerk
from env_client.control.records import EpisodeResult, MoveResult, Observer, Tap, TickRecord
from env_client.control.safety import SafetyFilter, Verdict
from env_client.control.source import ActionSource, Origin
from env_client.envs.env import Env, EnvError, Observation

__all__ = ["ControlLoop", "LoopConfig", "measured_pose"]

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
    # Do everything but command the motors.
    dry_run: bool = False
    # Speed of move_to in rad/s, and in the same proportion for grippers; the limits of the safety filter hold anyway.
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


def measured_pose(env_spec, observation: Observation) -> np.ndarray:
    """(A,) the measured value of each action value, in the robot's unit."""
    state = np.concatenate([np.ravel(observation.states[part.name]) for part in env_spec.states])
    return state[env_spec.state_index]


class ControlLoop:
    """One robot at a steady rate."""

    def __init__(
        self,
        env: Env,
        source: ActionSource,
        safety: SafetyFilter,
        fps: float,
        *,
        config: LoopConfig | None = None,
        clock: Clock | None = None,
        heartbeat: Callable[[float], None] | None = None,
    ):
        """`heartbeat` is called in each tick with the loop's time, in the loop's own thread, so that it stops when
        the loop hangs: it must do no more than store a number. It is dropped after its first exception."""
        self.env, self.source, self.safety = env, source, safety
        self.fps, self.period = fps, 1.0 / fps
        self.config = config or LoopConfig()
        self.clock = clock or MonotonicClock()
        self._heartbeat = heartbeat
        self._taps: list[Tap] = []
        self._paused = threading.Event()
        self._episode = -1
        # Why no action may be asked for at the moment: the robot is away, its observation is old, a pause.
        self._interrupted: str | None = None
        self._down_since: float | None = None
        self._timing = Timing(self.period)
        self._counts: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------- from outside

    def subscribe(self, size: int = 4) -> Tap:
        """A tap that gets every tick's record, for a thread that pulls from it."""
        tap = Tap(size)
        self._taps.append(tap)
        return tap

    def attach(self, function: Callable[[TickRecord], None], size: int = 4) -> Observer:
        """Call `function` with the records, in a thread of its own; what it is too slow for is dropped."""
        observer = Observer(function, size)
        self._taps.append(observer.tap)
        return observer

    def pause(self) -> None:
        """Hold the pose from the next tick on; the clock goes on."""
        self._paused.set()

    def resume(self) -> None:
        """Go on, with chunks for what the robot sees then."""
        self._paused.clear()

    @property
    def paused(self) -> bool:
        return self._paused.is_set()

    @property
    def timing(self) -> Timing:
        """How steady the running or last episode or move was."""
        return self._timing

    # --------------------------------------------------------------------------------------------- an episode

    def run_episode(
        self,
        *,
        episode: int | None = None,
        max_steps: int | None = None,
        time_s: float | None = None,
        stop: threading.Event | None = None,
        seed: int | None = None,
        reset_env: bool = True,
    ) -> EpisodeResult:
        """Run until `max_steps` commands of the policy were sent, `time_s` seconds are over, the env is done, or
        `stop` is set (within one tick). The robot then holds its last command; nothing else is sent.

        `episode` counts up by itself when it is not given. Raises what the env raises beside `EnvError`.
        """
        stop = stop or threading.Event()
        self._episode = self._episode + 1 if episode is None else episode
        begun = self._begin(stop, (lambda: self.env.reset(seed)) if reset_env else self.env.get_observation)
        if isinstance(begun, str):
            return self._result(begun, 0, 0.0, Counter(), Counter(), (0, 0))
        self.safety.begin_episode(begun, self._episode)
        self.source.reset(self._episode)
        refused, interventions = Counter(self.safety.counters), Counter(self.safety.interventions)
        before = (self.source.stats.waiting, self.source.stats.starved)
        steps, started, outcome = 0, self.clock.now(), "stopped"
        with _steady():
            for tick in self._ticks():
                if stop.is_set():
                    break
                if time_s is not None and tick.started - started >= time_s - 1e-9:
                    outcome = "time"
                    break
                steps += self._run_tick(tick)
                if self._lost():
                    outcome = "env lost"
                    break
                if self.env.done:
                    outcome = "done"
                    break
                if max_steps is not None and steps >= max_steps:
                    outcome = "steps"
                    break
        return self._result(outcome, steps, self.clock.now() - started, refused, interventions, before)

    def _run_tick(self, tick: Tick) -> bool:
        """One tick of an episode; True when a new action was commanded."""
        observation, pose, error = self._read()
        read = self.clock.now()
        if observation is None or pose is None:
            self._emit(
                TickRecord(
                    self._episode,
                    tick.index,
                    "run",
                    tick.started,
                    tick.started - tick.deadline,
                    None,
                    None,
                    None,
                    read_s=read - tick.started,
                    error=error,
                )
            )
            self._finish(tick)
            return False
        problem = "paused" if self._paused.is_set() else self._too_old(observation)
        if problem is None and self._interrupted is not None:
            # What was planned belongs to the moment before the interruption.
            self.source.reset(self._episode)
            self._interrupted = None
        action: np.ndarray | None = None
        origin: Origin | None = None
        if problem is None:
            action, origin = self._ask(observation, tick.index)
        else:
            self._interrupt(problem)
        verdict = self._filter(action, origin, pose, observation)
        thought = self.clock.now()
        sent, error = self._send(verdict)
        done = self.clock.now()
        self._emit(
            TickRecord(
                self._episode, tick.index, "paused" if problem == "paused" else "run", tick.started,
                tick.started - tick.deadline, observation, action, sent,
                refused=verdict.refused or problem, held=verdict.held, origin=origin,
                read_s=read - tick.started, think_s=thought - read, send_s=done - thought, error=error,
            )
        )  # fmt: skip
        self._finish(tick)
        return sent is not None and not verdict.held

    def _ask(self, observation: Observation, tick: int) -> tuple[np.ndarray | None, Origin | None]:
        try:
            action = self.source.next_action(observation, tick)
            return action, self.source.origin
        except Exception:
            self._counts["source errors"] += 1
            if self._counts["source errors"] == 1:
                logger.exception(
                    "the action source failed: the robot holds its pose; further failures are counted"
                )
            return None, None

    def _filter(
        self, action: np.ndarray | None, origin: Origin | None, pose: np.ndarray, observation: Observation
    ) -> Verdict:
        now = self.clock.now()
        interval = None if self._timing.last_sent is None else now - self._timing.last_sent
        if origin is None:
            return self.safety.apply(action, measured=pose, dt_s=interval)
        return self.safety.apply(
            action,
            measured=pose,
            boundary=origin.boundary,
            dt_s=interval,
            inner_step=origin.inner_step,
            age_s=observation.capture_time - origin.capture_time,
            episode=origin.episode,
        )

    # ------------------------------------------------------------------------------------------------- a move

    def move_to(
        self,
        pose: np.ndarray,
        *,
        stop: threading.Event | None = None,
        velocity: float | None = None,
        timeout_s: float = 60.0,
    ) -> MoveResult:
        """Go to the (A,) `pose` on a minimum-jerk path, no joint faster than `velocity` rad/s (grippers in the same
        proportion) and never faster than the safety filter allows. A pose outside the limits is cut to them.

        After a lost robot came back, the path begins anew from where it stands. Raises `ValueError` for a pose
        that is not (A,) finite numbers.
        """
        stop = stop or threading.Event()
        goal = np.asarray(pose, np.float64)
        if goal.shape != (self.env.spec.action_dim,) or not np.isfinite(goal).all():
            raise ValueError(f"a pose {pose!r:.120}; {self.env.spec.action_dim} finite numbers were expected")
        goal = np.clip(goal, self.safety.lower, self.safety.upper)
        share = min(1.0, (velocity or self.config.move_velocity) / self.safety.config.max_velocity)
        started = self.clock.now()
        begun = self._begin(stop, self.env.get_observation)
        if isinstance(begun, str):
            return MoveResult(False, None, begun, self.clock.now() - started)
        self.safety.begin_episode(begun)
        path, path_start = MinimumJerk(begun, goal, self.safety.speed * share), None
        off: np.ndarray | None = None
        outcome = "not there"
        for tick in self._ticks():
            if stop.is_set():
                outcome = "stopped"
                break
            observation, measured, error = self._read()
            if observation is None or measured is None:
                path_start = None
                self._finish(tick)
                if self._lost():
                    outcome = "env lost"
                    break
                continue
            if path_start is None:
                # Also after the robot was away: from where it stands now.
                path, path_start = MinimumJerk(measured, goal, self.safety.speed * share), tick.deadline
            elapsed = tick.deadline - path_start
            target = path.at(elapsed + self.period)
            interval = None if self._timing.last_sent is None else self.clock.now() - self._timing.last_sent
            verdict = self.safety.apply(target, measured=measured, dt_s=interval, direct=True)
            sent, error = self._send(verdict)
            self._emit(
                TickRecord(
                    self._episode, tick.index, "move", tick.started, tick.started - tick.deadline, observation,
                    target, sent, refused=verdict.refused, held=verdict.held, error=error,
                )
            )  # fmt: skip
            self._finish(tick)
            off = measured - goal
            if elapsed >= path.duration_s and self._arrived(off, verdict.action, goal):
                outcome = "reached"
                break
            over = elapsed - path.duration_s - self.config.move_settle_s
            if over > 0 and (_close(verdict.action, goal) or over > timeout_s):
                break
            if tick.started - started > timeout_s:
                break
        return MoveResult(outcome == "reached", off, outcome, self.clock.now() - started)

    def _arrived(self, off: np.ndarray, command: np.ndarray, goal: np.ndarray) -> bool:
        """Whether the joints are near enough; a gripper may be stopped by what it holds."""
        if self.config.dry_run:
            return True
        spec = self.env.spec
        near = np.abs(off) <= self.config.move_tolerance * np.abs(spec.unit_per_rad)
        return bool((near | spec.gripper).all()) and _close(command, goal)

    # ------------------------------------------------------------------------------------------------ a robot

    def _begin(self, stop: threading.Event, read: Callable[[], Observation]) -> np.ndarray | str:
        """The measured pose, as soon as the robot answers; else why it never came."""
        self._timing = Timing(self.period)
        self._counts = Counter()
        self._interrupted, self._down_since = None, None
        pacer = Pacer(self.clock, self.period)
        while not stop.is_set():
            pose, error = None, "the robot's state holds values that are not finite"
            try:
                pose = measured_pose(self.env.spec, read())
            except EnvError as caught:
                error = str(caught)
            self._beat()
            if pose is not None and np.isfinite(pose).all():
                self._back()
                return pose
            self._away(error)
            if self._lost():
                return "env lost"
            pacer.wait()
        return "stopped"

    def _read(self) -> tuple[Observation | None, np.ndarray | None, str | None]:
        """The observation and the measured pose, or why there is none."""
        try:
            observation = self.env.get_observation()
        except EnvError as caught:
            self._away(str(caught))
            return None, None, str(caught)
        pose = measured_pose(self.env.spec, observation)
        if not np.isfinite(pose).all():
            error = "the robot's state holds values that are not finite"
            self._away(error)
            return None, None, error
        if self._down_since is not None:
            self._back()
            self.safety.rebase(pose)
        return observation, pose, None

    def _send(self, verdict: Verdict) -> tuple[np.ndarray | None, str | None]:
        """What was sent, or None and why not."""
        error = None
        if not self.config.dry_run:
            try:
                self.env.apply_action(verdict.action)
            except EnvError as caught:
                error = str(caught)
                self._away(error)
        if error is not None:
            return None, error
        self._timing.sent(self.clock.now())
        return verdict.action, None

    def _away(self, error: str) -> None:
        """The robot cannot be reached: counted, and said once."""
        self._counts["env errors"] += 1
        self._timing.interrupted()
        if self._down_since is None:
            self._down_since = self.clock.now()
            self._interrupt("robot away")
            logger.warning("the robot cannot be reached: %s; nothing is sent until it comes back", error)

    def _back(self) -> None:
        if self._down_since is not None:
            logger.info("the robot is back after %.1f s", self.clock.now() - self._down_since)
            self._down_since = None

    def _lost(self) -> bool:
        patience = self.config.env_patience_s
        return self._down_since is not None and 0 < patience < self.clock.now() - self._down_since

    def _too_old(self, observation: Observation) -> str | None:
        """Why an observation must not be acted on."""
        for name, age in observation.image_age.items():
            if not age <= self.config.max_image_age_s:
                self._counts["old observations"] += 1
                return f"camera {name} is frozen"
        if not observation.state_age <= self.config.max_state_age_s:
            self._counts["old observations"] += 1
            return "the joint readings are old"
        return None

    def _interrupt(self, reason: str) -> None:
        if reason != self._interrupted and reason not in ("paused", "robot away"):
            logger.warning("%s: the robot holds its pose", reason)
        self._interrupted = reason

    # ---------------------------------------------------------------------------------------------- the clock

    def _ticks(self) -> Iterator[Tick]:
        pacer = Pacer(self.clock, self.period)
        while True:
            tick = pacer.wait()
            self._timing.ticked(tick)
            self._beat()
            yield tick

    def _finish(self, tick: Tick) -> None:
        self._timing.finished(tick, self.clock.now())

    def _beat(self) -> None:
        if self._heartbeat is None:
            return
        try:
            self._heartbeat(self.clock.now())
        except Exception:
            logger.exception("the heartbeat failed and is not called again")
            self._heartbeat = None

    def _emit(self, record: TickRecord) -> None:
        for tap in self._taps:
            tap.push(record)

    def _result(
        self,
        outcome: str,
        steps: int,
        duration_s: float,
        refused: Counter[str],
        interventions: Counter[str],
        before: tuple[int, int],
    ) -> EpisodeResult:
        success, error = None, None
        try:
            success = self.env.success()
        except EnvError as caught:
            error = str(caught)
        stats = self.source.stats
        counters = Counter(self.safety.counters)
        counters.subtract(refused)
        changed = Counter(self.safety.interventions)
        changed.subtract(interventions)
        return EpisodeResult(
            episode=self._episode,
            outcome=outcome,
            steps=steps,
            duration_s=duration_s,
            success=success,
            waiting=stats.waiting - before[0],
            starved=stats.starved - before[1],
            refused={name: count for name, count in counters.items() if count and name != "starved"},
            interventions={name: count for name, count in changed.items() if count},
            env_errors=self._counts["env errors"],
            old_observations=self._counts["old observations"],
            timing=self._timing.summary(),
            jitter_histogram=self._timing.histogram(),
            source=stats.snapshot(),
            error=error,
        )


def _close(command: np.ndarray, goal: np.ndarray) -> bool:
    return bool(np.allclose(command, goal, rtol=1e-5, atol=1e-5))


@contextmanager
def _steady() -> Iterator[None]:
    """Keep the interpreter from stealing the loop's time.

    A full garbage collection walks every object: with a robot driver's libraries imported that takes longer than
    a tick. What exists now is set aside, so that later collections only walk what is new. And a thread that
    computes in Python gives the interpreter up only every 5 ms by default: 1 ms bounds what it costs a tick.
    """
    interval = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(min(interval, 1e-3))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
