"""The clock: one thread that reads the robot, asks for an action, filters it and sends it, at a steady rate.

    tick:  deadline -> env.get_observation -> source.next_action -> (steady moment) -> safety.apply -> env.apply_action -> record

Life cycle: one `ControlLoop` per robot; `move_to`, `run_episode` and `move_to` again, any number of times, always
from the same thread (all calls to the env come from there). `pause`, `resume` and the stop event may come from
any thread and act within one tick.

Error policy: an `EnvError` means that the robot cannot be reached. The loop keeps its clock, sends nothing, and
asks the env again at each tick. When it comes back, the next command is limited against the measured pose and
all chunks are asked for again (`link.py`). Any other exception of the env is a defect: it ends the loop and is
raised, and whoever runs the loop applies the exit rule. A defect of the source is survived: the robot holds.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from env_client.control.clock import Clock, MonotonicClock, Pacer, SendPhase, Tick, Timing, steady_interpreter
from env_client.control.link import LoopConfig, RobotLink
from env_client.control.motion import MinimumJerk
from env_client.control.records import EpisodeResult, MoveResult, Observer, RecordSink, Tap, TickRecord
from env_client.control.safety import SafetyFilter, Verdict
from env_client.control.source import ActionSource, Origin
from env_client.envs.env import Env, EnvError, Observation

__all__ = ["ControlLoop"]

logger = logging.getLogger(__name__)

# Speed of a gripper in a move: 200 % of its travel per second where joints make 1.5 rad/s.
_GRIPPER_SHARE = 200.0 / 1.5
# At the end of a move: the largest addition to a goal in rad, and the share of the error that each tick adds.
_MORE, _SHARE = 0.15, 0.1


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
        heartbeat: Callable[[], object] | None = None,
    ):
        """`heartbeat` is called in each tick of an episode or a move, in the loop's own thread, so that it stops
        when the loop hangs. It must do no more than store or write a byte; after an exception it is dropped."""
        self.env, self.source, self.safety = env, source, safety
        self.fps, self.period = fps, 1.0 / fps
        self.config = config or LoopConfig()
        self.clock = clock or MonotonicClock()
        self._heartbeat = heartbeat
        self._taps: list[RecordSink] = []
        self._paused = threading.Event()
        self._episode = -1
        self._link = self._new_link()
        self._phase = SendPhase(self.period)
        # Why the source is not asked at the moment; None while it is.
        self._interrupted: str | None = None
        self._source_errors = 0

    def subscribe(self, size: int = 4) -> Tap:
        """A tap that gets every tick's record, for a thread that pulls from it."""
        tap = Tap(size)
        self._taps.append(tap)
        return tap

    def publish_to(self, sink: RecordSink) -> None:
        """Push every tick's record there, in the loop's own thread."""
        self._taps.append(sink)

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
        """How steady the running or last episode or move is."""
        return self._link.timing

    # --------------------------------------------------------------------------------------------- an episode

    @steady_interpreter()
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
        self._link, self._interrupted, self._source_errors = self._new_link(), None, 0
        tally = _Tally(self)
        read = (lambda: self.env.reset(seed)) if reset_env else self.env.get_observation
        pose = self._link.wait(read, stop, self._beat)
        if isinstance(pose, str):
            return tally.result(pose, 0, 0.0)
        self.safety.begin_episode(pose, self._episode)
        self.source.reset(self._episode)
        steps, outcome = 0, "stopped"
        started = self.clock.now()
        for tick in self._ticks():
            if stop.is_set():
                break
            if time_s is not None and tick.started - started >= time_s - 1e-9:
                outcome = "time"
                break
            steps += self._run_tick(tick, stop)
            self._link.timing.finished(tick, self.clock.now())
            if self._link.lost:
                outcome = "env lost"
                break
            if self.env.done:
                outcome = "done"
                break
            if max_steps is not None and steps >= max_steps:
                outcome = "steps"
                break
        return tally.result(outcome, steps, self.clock.now() - started)

    def _run_tick(self, tick: Tick, stop: threading.Event) -> bool:
        """One tick of an episode; True when a new action was commanded."""
        observation, pose, error = self._link.read()
        read = self.clock.now()
        if observation is None:
            self._emit(tick, "run", None, read_s=read - tick.started, error=error)
            return False
        problem = self._problem(observation)
        action, origin = (None, None) if problem else self._ask(observation, tick.index)
        asked = self.clock.now()
        self._phase.wait(self.clock, tick)
        if stop.is_set():
            return False
        woke = self.clock.now()
        verdict = self._filter(action, origin, pose, observation)
        thought = self.clock.now()
        sent, error = self._link.send(verdict)
        self._emit(
            tick,
            "paused" if problem == "paused" else "run",
            observation,
            requested=action,
            sent=sent,
            stages=verdict.stages,
            refused=verdict.refused or problem,
            held=verdict.held,
            origin=origin,
            read_s=read - tick.started,
            think_s=asked - read + thought - woke,
            send_s=self.clock.now() - thought,
            error=error,
        )
        return sent is not None and not verdict.held

    def _problem(self, observation: Observation) -> str | None:
        """Why the source must not be asked now. After any such time its chunks are asked for again."""
        problem = "paused" if self._paused.is_set() else self._link.too_old(observation)
        if problem is not None:
            if problem not in (self._interrupted, "paused"):
                logger.warning("%s: the robot holds its pose", problem)
        elif self._interrupted is not None or self._link.came_back:
            self._link.came_back = False
            self.source.reset(self._episode)
        self._interrupted = problem
        return problem

    def _ask(self, observation: Observation, tick: int) -> tuple[np.ndarray | None, Origin | None]:
        try:
            return self.source.next_action(observation, tick), self.source.origin
        except Exception:
            self._source_errors += 1
            if self._source_errors == 1:
                logger.exception("the action source failed: the robot holds; further failures are counted")
            return None, None

    def _filter(
        self,
        action: np.ndarray | None,
        origin: Origin | None,
        pose: np.ndarray | None,
        observation: Observation,
    ) -> Verdict:
        since = self._link.since_last_command_s
        if origin is None:
            return self.safety.apply(action, measured=pose, dt_s=since)
        return self.safety.apply(
            action,
            measured=pose,
            boundary=origin.boundary,
            dt_s=since,
            inner_step=origin.inner_step,
            late_s=observation.capture_time - origin.due,
            episode=origin.episode,
        )

    def watch(self, until: threading.Event) -> None:
        """Read the robot at the loop's rate until `until` is set, for those who look on between episodes. Commands
        nothing: the robot holds what it was told last. An `EnvError` is passed over."""
        self._link = self._new_link()
        for tick in self._ticks():
            if until.is_set():
                return
            observation, _, error = self._link.read()
            self._emit(tick, "idle", observation, read_s=self.clock.now() - tick.started, error=error)

    # ------------------------------------------------------------------------------------------------- a move

    @steady_interpreter()
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
        self._link = self._new_link()
        started = self.clock.now()
        begun = self._link.wait(self.env.get_observation, stop, self._beat)
        if isinstance(begun, str):
            return MoveResult(False, None, begun, self.clock.now() - started)
        self.safety.begin_episode(begun)
        goal = np.where(self.safety.held, begun, goal)
        speed = np.where(self.env.spec.gripper, _GRIPPER_SHARE, 1.0) * (velocity or self.config.move_velocity)
        scale = np.abs(self.env.spec.unit_per_rad)
        speed = np.minimum(speed * scale, self.safety.speed)
        # Added to the goal where gravity and friction keep a joint short of it.
        more = np.zeros_like(goal)
        path, path_start = MinimumJerk(begun, goal, speed), None
        off, outcome = None, "not there"
        for tick in self._ticks():
            if stop.is_set():
                outcome = "stopped"
                break
            if self._link.lost:
                outcome = "env lost"
                break
            if tick.started - started > timeout_s:
                break
            observation, measured, error = self._link.read()
            if observation is None or measured is None:
                self._emit(tick, "move", None, error=error)
                continue
            if path_start is None or self._link.came_back:
                self._link.came_back = False
                path, path_start = MinimumJerk(measured, goal, speed), tick.deadline
            elapsed = tick.deadline - path_start
            target = path.at(elapsed + self.period) + more
            if stop.is_set():
                outcome = "stopped"
                break
            verdict = self.safety.apply(
                target, measured=measured, dt_s=self._link.since_last_command_s, direct=True
            )
            sent, error = self._link.send(verdict)
            self._emit(
                tick, "move", observation, requested=target, sent=sent, refused=verdict.refused, error=error
            )
            self._link.timing.finished(tick, self.clock.now())
            off = measured - goal
            if elapsed >= path.duration_s and np.allclose(
                verdict.action, self._cut(target), rtol=1e-5, atol=1e-5
            ):
                if self._near(off):
                    outcome = "reached"
                    break
                most = np.where(self.safety.held | self.env.spec.gripper, 0.0, _MORE * scale)
                more = np.clip(more - _SHARE * off, -most, most)
                if elapsed >= path.duration_s + self.config.move_settle_s:
                    break
        return MoveResult(outcome == "reached", off, outcome, self.clock.now() - started)

    def _cut(self, target: np.ndarray) -> np.ndarray:
        return np.clip(target, self.safety.lower, self.safety.upper)

    def _near(self, off: np.ndarray) -> bool:
        """Whether the joints have arrived."""
        return self.config.dry_run or not self._short(off).any()

    def _short(self, off: np.ndarray) -> np.ndarray:
        """(A,) bool: the joints that have not arrived; a gripper may be stopped by what it holds."""
        spec = self.env.spec
        return (np.abs(off) > self.config.move_tolerance * np.abs(spec.unit_per_rad)) & ~spec.gripper

    def said(self, move: MoveResult) -> str:
        """How a move ended, with the joints that stopped short of the pose."""
        if move.outcome != "not there" or move.error is None:
            return move.outcome
        spec = self.env.spec
        short = [
            f"{spec.action_names[index]} stopped {abs(move.error[index]):.1f} ({spec.unit}) short of it"
            for index in np.flatnonzero(self._short(move.error))
        ]
        return (
            f"{'; '.join(short) or 'no time was left'}. Look what blocks the arm, and start from a free pose"
        )

    # ---------------------------------------------------------------------------------------------- the clock

    def _new_link(self) -> RobotLink:
        return RobotLink(self.env, self.safety, self.clock, self.config, Timing(self.period))

    def _ticks(self) -> Iterator[Tick]:
        pacer = Pacer(self.clock, self.period)
        while True:
            tick = pacer.wait()
            self._link.timing.ticked(tick)
            self._beat()
            yield tick

    def _beat(self) -> None:
        if self._heartbeat is None:
            return
        try:
            self._heartbeat()
        except Exception:
            logger.exception("the heartbeat failed and is not called again")
            self._heartbeat = None

    def _emit(self, tick: Tick, phase: str, observation: Observation | None, **values: object) -> None:
        if not self._taps:
            return
        late = tick.started - tick.deadline
        record = TickRecord(self._episode, tick.index, phase, tick.started, late, observation, **values)  # type: ignore[arg-type]
        for tap in self._taps:
            tap.push(record)


class _Tally:
    """What an episode adds to counters that live longer than it."""

    def __init__(self, loop: ControlLoop):
        self._loop = loop
        self._refused = Counter(loop.safety.counters)
        self._changed = Counter(loop.safety.interventions)
        self._waiting, self._starved = loop.source.stats.waiting, loop.source.stats.starved

    def result(self, outcome: str, steps: int, duration_s: float) -> EpisodeResult:
        loop, stats = self._loop, self._loop.source.stats
        success, error = None, None
        try:
            success = loop.env.success()
        except EnvError as caught:
            error = str(caught)
        refused = Counter(loop.safety.counters) - self._refused
        refused.pop("starved", None)
        link = loop._link
        return EpisodeResult(
            episode=loop._episode,
            outcome=outcome,
            steps=steps,
            duration_s=duration_s,
            success=success,
            waiting=stats.waiting - self._waiting,
            starved=stats.starved - self._starved,
            refused=dict(refused),
            interventions=dict(Counter(loop.safety.interventions) - self._changed),
            env_errors=link.counts["env errors"],
            old_observations=link.counts["old observations"],
            source_errors=loop._source_errors,
            timing=link.timing.summary(),
            jitter_histogram=link.timing.histogram(),
            source=stats.snapshot(),
            error=error,
        )
