"""The control process: it owns the robot. `run_env_client` starts it as its child; it is no command of its own.

    server -> robot (read only) -> do they fit? -> motors on -> [leader] -> [ready pose] -> episode … -> exit state

Life cycle: until the motors are switched on, SIGTERM and every error end the process at once: nothing has moved.
From then on the supervisor knows how to stop the robot (`Heartbeat.arm`), SIGTERM ends the running episode within
one tick, and the process leaves the robot in the state that `--on-exit` names before it says so (`disarm`). What it
could not do, the supervisor does. Only this process's main thread talks to the robot.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from env_client.client_config import ClientConfig, Task, find_task
from env_client.console import Console, ConsoleHandler
from env_client.control import ControlLoop, SafetyFilter, make_source
from env_client.control.heartbeat import Heartbeat
from env_client.control.network import encode_observation
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.config import EnvConfig
from env_client.envs.env import EnvError, EnvSpec
from env_client.envs.make import LiveEnv, OwnSafety, RobotFile, Stoppable, make_env, read_robot_file
from env_client.envs.robots import BiSO101Config, SO101Config, VirtualConfig
from env_client.episodes import Episodes
from env_client.fit import doubts, misfits
from env_client.keys import Keys
from env_client.policy_server import (
    PolicyClient,
    SamePolicy,
    connect,
    describe,
    plain_spec,
    require_policy,
    settled_unit,
)
from env_client.sidecar.config import SidecarConfig
from env_client.sidecar.describe import describe_run
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import Mark, RunInfo
from env_client.steering import Steering
from env_client.summary import write_results
from env_client.websocket_client_policy import ConnectionLost
from env_client.wire import InvalidInput, PolicySpec, WireError, decode_image

__all__ = ["Rollout", "main"]

# How long one attempt to reach a server that went away may take, seconds; the source keeps trying.
_RECONNECT = 5.0
# How long one order to the robot may take outside the loop (motors on, stop, relax), seconds; then no more signs of
# life are given for it.
_PATIENCE = 10.0


class _Stopped(Exception):
    """SIGTERM before the motors were on."""


def main() -> None:
    """Read the config from the file descriptor in argv[1]; argv[2] is the panel's listening socket (-1: none),
    argv[3] the heartbeat's pipe."""
    with os.fdopen(int(sys.argv[1]), "rb") as stream:
        config: ClientConfig = pickle.load(stream)  # written by our parent process  # nosec B301
    code = Rollout(config, Heartbeat(int(sys.argv[3])), panel_fd=int(sys.argv[2])).run()
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
        sys.stdout.flush()
    # Not sys.exit: a camera's or a driver's thread may sit in a call that nobody can interrupt.
    os._exit(code)


class Rollout:
    """One run. `run` returns the exit code."""

    def __init__(self, config: ClientConfig, heartbeat: Heartbeat, *, panel_fd: int = -1) -> None:
        self.config = config
        self.panel_fd = panel_fd
        self.heartbeat = heartbeat
        self.console = Console()
        self.steering = Steering(
            self,
            episodes=config.num_episodes,
            attended=config.attended,
            publish=lambda state: self.feed.state(state) if self.feed is not None else None,
            on_mark=self._mark,
            say=self.console.say,
        )
        # Whoever records and shows the run; None where nobody does.
        self.feed: SidecarFeed | None = None
        self._starting = True
        self._engaged = False
        self._clean = True
        self._client: PolicyClient | None = None
        self._env: LiveEnv | None = None
        self._closing: list[Any] = []

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Who waits for a server does not beat, and would wait for ever without a supervisor.
        self.heartbeat.on_loss(self._stop_waiting)
        handler = ConsoleHandler(self.console)
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("env_client").setLevel(logging.INFO)
        # Its lines about single packets would fill the terminal; what matters is said by the env.
        logging.getLogger("lerobot").setLevel(logging.ERROR)
        code = 0
        try:
            self._open_feed()
            self._start()
            code = self._episodes.run()
        except _Stopped:
            self.console.say("Stopped before the robot was touched.")
        except (EnvError, ConnectionLost, WireError, ValueError) as error:
            self.console.say(f"run_env_client: {error}")
            code, self._clean = (1 if self._engaged else 2), False
        except Exception:
            self.console.say(traceback.format_exc().rstrip())
            code, self._clean = 1, False
        return self._finish(code)

    def _on_sigterm(self, _number: int, _frame: Any) -> None:
        self.steering.end()
        if self._starting:
            raise _Stopped

    def _stop_waiting(self) -> None:
        if self._starting:
            os.kill(os.getpid(), signal.SIGTERM)

    def _beat(self, _now: float = 0.0) -> None:
        self.heartbeat.beat()
        if self.heartbeat.lost and not self.steering.ended:
            self.console.say("The supervisor is gone; stopping.")
            self.steering.end()

    # --------------------------------------------------------------------------- who records and shows the run

    def _open_feed(self) -> None:
        panel = self.panel_fd if self.panel_fd >= 0 else None
        config = SidecarConfig(
            log=self.config.log,
            record=self.config.record,
            rerun=self.config.rerun,
            panel=self.config.panel if panel is not None else None,
            panel_fd=panel,
        )
        if config.wanted:
            self.feed = SidecarFeed(config, say=self.console.say, on_command=self.steering.command)
            self.feed.state(self.steering.state())
        if panel is not None:
            os.close(panel)

    def _follow(self, env: LiveEnv) -> None:
        if self.feed is None:
            return
        self.loop.publish_to(self.feed)
        self.feed.follow(self.source)
        run = describe_run(
            self.config,
            env.spec,
            self._policy,
            fps=self.fps,
            server=f"{self.config.host}:{self.config.port}",
            prompt=self._prompt,
            execution=self.config.execution,
        )
        if self.config.record.dataset_path is not None:
            self._check_dataset(env, run)
        self.feed.begin_run(run)
        if not self.feed.wait_ready():
            self.console.say("What records and shows the run did not start in time; the run goes on.")

    def _check_dataset(self, env: LiveEnv, run: RunInfo) -> None:
        """Raise `EnvError` when no episode of this run could be added to the dataset, before anything moves."""
        from env_client.record.dataset_writer import DatasetWriter

        assert self.config.record.dataset_path is not None
        images = {name: decode_image(image) for name, image in env.get_observation().images.items()}
        sizes = {name: (image.shape[0], image.shape[1]) for name, image in images.items()}
        try:
            DatasetWriter(self.config.record.dataset_path, run, sizes).check_writable()
        except ImportError as error:
            raise EnvError(f"--record.dataset-path needs the extra record ({error})") from error

    def _mark(self, episode: int, success: bool, note: str) -> None:
        if self.feed is not None:
            self.feed.mark(Mark(self.config.first_episode + episode, success, note))

    # ------------------------------------------------------------------------- what steering does to the run

    def pause(self) -> None:
        self.loop.pause()

    def resume(self) -> None:
        self.loop.resume()

    def set_prompt(self, prompt: str) -> None:
        """From the next request on; an empty one leaves it to the policy."""
        self.source.prompt = prompt or None

    # ---------------------------------------------------------------------------------------- the start

    def _start(self) -> None:
        config = self.config
        task = find_task(config.task)
        self._prompt = config.prompt or task.prompt
        client = self._client = connect(config, self._prompt, self.console.say)
        client.connect_timeout_s = _RECONNECT
        require_policy(client)
        self.console.say(f"Connected! {describe(client)}")
        spec = client.spec and settled_unit(
            client.spec, config.policy_unit, real=_is_real(config.env), say=self.console.say
        )
        env = self._env = make_env(
            _in_unit(config.env, config.policy_unit),
            task=self._prompt,
            dry_run=config.loop.dry_run,
            policy=spec,
            action_dim=getattr(client, "dimensions", (0, 0))[1] or None,
        )
        env.connect()
        self._file = read_robot_file(config.env, env.spec.type)
        self._policy = self._fit(client, spec, env, task)
        self.fps = config.fps or self._policy.fps or 30.0
        safety = replace(config.safety, hold=_joint_names(config.safety.hold, env.spec))
        if isinstance(env, OwnSafety):
            safety = env.safety(safety)
        self.safety = SafetyFilter(env.spec, safety, self.fps)
        checked = SamePolicy(client, self.console.say)
        how, options = config.chunking
        self.source = make_source(how, checked, self._policy, self.fps, options)
        self.source.prompt = self._prompt or None
        self.loop = ControlLoop(
            env, self.source, self.safety, self.fps, config=config.loop, heartbeat=self._beat
        )
        self._poses = _poses(env, self._file, config)
        self._keys = Keys(self.steering.command)
        # Last of all: on the way to the rest pose the space bar stops as well.
        self._closing.append(self._keys)
        self._episodes = Episodes(
            config,
            self.loop,
            self.source,
            self.steering,
            self.console,
            self._keys,
            leader=self._make_leader(env),
            ready=self._poses["ready"] if config.goes_to_ready else None,
            wake=self._wake,
            feed=self.feed,
        )
        self.steering.describe(self._prompt, live_prompt=self._policy.wants_prompt)
        self._follow(env)
        self._engage(env)

    def _fit(self, client: PolicyClient, known: PolicySpec | None, env: LiveEnv, task: Task) -> PolicySpec:
        """The policy's spec, when policy, robot and task belong together. Raises `EnvError` otherwise."""
        spec, name = env.spec, f"the robot ({env.spec.type})"
        policy = known or plain_spec(spec, self.config.policy_unit, client, getattr(env, "plain_states", ()))
        found = misfits(spec, policy, name)
        if task.action_dim is not None and task.action_dim != policy.action_dim:
            found.append(
                f"the task {task.name} takes actions of {task.action_dim} values, the policy gives {policy.action_dim}"
            )
        if policy.wants_prompt and not (self._prompt or policy.default_prompt):
            found.append("the policy reads a prompt and none was given: add --task or --prompt")
        if found:
            raise EnvError("; ".join(found) + ". Nothing was moved.")
        for sentence in doubts(spec, policy, name):
            self.console.say(f"Note: {sentence}.")
        try:
            encode_observation(env.get_observation(), policy, client.image_codecs)
        except InvalidInput as error:
            raise EnvError(f"{error}. Nothing was moved.") from error
        return policy

    def _engage(self, env: LiveEnv) -> None:
        if hasattr(env, "on_wait"):
            env.on_wait = self._beat
        self._starting = False
        if self.steering.ended:
            raise _Stopped
        if self.config.loop.dry_run:
            self.console.say("Dry run: the motors are left alone.")
            return
        self.heartbeat.arm(env.stop_plan(self.config.on_exit, self._poses["rest"], self._rest_velocity))
        self._engaged = True
        self._patiently(env.engage)

    def _make_leader(self, env: LiveEnv) -> ControlLoop | None:
        if not self.config.leader.ports:
            return None
        from env_client.teleop import LeaderArms, LeaderSource

        if len(self.config.leader.ports) * 6 != env.spec.action_dim:
            raise EnvError(
                f"{len(self.config.leader.ports)} leader arm(s) cannot lead a robot of {env.spec.action_dim} values"
            )
        arms = LeaderArms(self.config.leader, use_degrees=env.spec.unit == "degrees")
        self._closing.append(arms)
        arms.connect()
        source = LeaderSource(arms)
        self._closing.insert(0, source)
        return ControlLoop(env, source, self.safety, self.fps, config=self.config.loop, heartbeat=self._beat)

    def _wake(self) -> None:
        """Motors that lost their power in the last episode get it back before anything is asked of them."""
        if self._engaged and self._env is not None:
            with contextlib.suppress(EnvError):  # the loop waits for the robot, and says why
                self._patiently(self._env.engage)

    @property
    def _rest_velocity(self) -> float:
        return min(self.config.rest_velocity, self.safety.joint_speed)

    def _patiently[T](self, act: Callable[[], T]) -> T:
        """Do what may take longer than the supervisor waits for a sign of life, such as setting up two arms' servos."""
        failure: list[Exception] = []
        result: list[T] = []

        def run() -> None:
            try:
                result.append(act())
            except Exception as error:  # told in the control thread
                failure.append(error)

        thread = threading.Thread(target=run, name="patiently", daemon=True)
        end = time.monotonic() + _PATIENCE
        thread.start()
        while thread.is_alive() and time.monotonic() < end:
            self._beat()
            thread.join(0.05)
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    # ------------------------------------------------------------------------------------------- the end

    def _finish(self, code: int) -> int:
        self._starting = False
        if self._engaged:
            try:
                sentence, in_order = self._leave()
                self.console.say(sentence)
                self.heartbeat.disarm()
                code = code or int(not in_order)
            except Exception as error:  # the supervisor sees that we never let go, and does it
                self.console.say(f"run_env_client: the robot could not be left in order ({error})")
                code = code or 1
        if self.config.summary_path is not None:
            self._write_summary()
        for part in (*self._closing, getattr(self, "source", None), self._client, self._env):
            try:
                if part is not None:
                    part.close()
            except Exception as error:
                self.console.say(f"closing {type(part).__name__}: {error}")
        if self.feed is not None:
            self.feed.close()
        self.console.close()
        return code

    def _write_summary(self) -> None:
        assert self.config.summary_path is not None
        try:
            results = self._episodes.results if hasattr(self, "_episodes") else []
            write_results(self.config.summary_path, results, fps=getattr(self, "fps", None))
        except OSError as error:
            self.console.say(f"the summary {self.config.summary_path} cannot be written: {error}")

    def _leave(self) -> tuple[str, bool]:
        """Bring the robot into the state of `--on-exit`: what was reached, and whether it is that state. Raises `EnvError`."""
        env, how = self._env, self.config.on_exit
        assert env is not None
        if not self._clean and not isinstance(env, Stoppable):
            self._patiently(env.hold)
        rest, ready = self._poses["rest"], self._poses["ready"]
        way, reached = "", True
        if how == "rest-pose" and rest is not None:
            self.console.say("Going to the rest pose …")
            stop = self.steering.leave()
            move = self.loop.move_to(rest, stop=stop, velocity=self._rest_velocity)
            if move.outcome == "not there" and ready is not None:
                # From where it lay, something is in its way; the ready pose is above the table.
                self.console.say(f"{self.loop.said(move)}. Once more, by way of the ready pose …")
                self.loop.move_to(ready, stop=stop, velocity=self._rest_velocity)
                move = self.loop.move_to(rest, stop=stop, velocity=self._rest_velocity)
            way, reached = self.loop.said(move), move.reached
        if isinstance(env, Stoppable):
            return (f"The way to the rest pose: {way}. " if way else "") + self._patiently(env.stop), reached
        if how == "relax" or (way and reached):
            self._patiently(env.relax)
            sentence, on = self._torque(env)
            return (
                f"The robot lies in its rest pose, {sentence}." if way else f"{sentence.capitalize()}."
            ), not on
        if not reached:
            self._patiently(env.hold)
            return f"The rest pose was not reached: {way}. The robot holds, {self._torque(env)[0]}.", False
        # Proof that the robot can be reached.
        self._patiently(env.get_observation)
        sentence, on = self._torque(env)
        return f"The robot holds its pose, {sentence}.", on is not False

    def _torque(self, env: LiveEnv) -> tuple[str, bool | None]:
        """What the robot says of its torque, and whether it has any; None where it cannot be read. Raises `EnvError` when it is mixed."""
        off = self._patiently(getattr(env, "without_torque", lambda: None))
        if off is None:
            return "its torque cannot be read", None
        if 0 < len(off) < env.spec.action_dim:
            raise EnvError(
                f"{', '.join(off)} without torque, the others with it: look at their power and cables"
            )
        return ("torque off", False) if off else ("torque on", True)


def _is_real(config: EnvConfig) -> bool:
    """Whether motors move that can do harm."""
    return not isinstance(config, VirtualConfig) and not (
        isinstance(config, AstribotConfig) and config.astribot.virtual
    )


def _in_unit(config: EnvConfig, unit: str | None) -> EnvConfig:
    """For a server that does not describe its policy: the arm in the unit that --policy-unit says."""
    if unit is not None and isinstance(config, SO101Config | BiSO101Config | VirtualConfig):
        return replace(config, use_degrees=unit == "degrees")
    return config


def _joint_names(names: tuple[str, ...], spec: EnvSpec) -> tuple[str, ...]:
    """`wrist_roll` is `wrist_roll.pos` in LeRobot's naming."""
    return tuple(f"{name}.pos" if f"{name}.pos" in spec.action_names else name for name in names)


def _poses(env: LiveEnv, file: RobotFile, config: ClientConfig) -> dict[str, np.ndarray | None]:
    poses = {
        name: None if values is None else env.pose(values, file.unit)
        for name, values in (("ready", file.ready_pose), ("rest", file.rest_pose))
    }
    for flag, wanted, name in (
        ("--move-to-ready", config.goes_to_ready, "ready"),
        ("--on-exit rest-pose", config.on_exit == "rest-pose", "rest"),
    ):
        if wanted and poses[name] is None:
            raise EnvError(f"{flag} needs a {name}_pose in the robot file (--env.robot-config-path)")
    return poses


if __name__ == "__main__":
    main()
