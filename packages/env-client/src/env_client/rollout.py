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
from env_client.control import ControlLoop, EpisodeResult, SafetyFilter, make_source
from env_client.control.heartbeat import Heartbeat
from env_client.control.network import encode_observation
from env_client.envs.env import EnvError, EnvSpec
from env_client.envs.make import LiveEnv, RobotFile, make_env, read_robot_file
from env_client.fit import doubts, misfits
from env_client.policy_server import SamePolicy, describe, plain_spec
from env_client.run_status import StatusThread
from env_client.summary import format_episode, write_results
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import InvalidInput, PolicySpec, WireError

__all__ = ["Rollout", "main"]

# How long one attempt to reach a server that went away may take, seconds; the source keeps trying.
_RECONNECT = 5.0
# How long switching the motors on may take, seconds; then no more signs of life are given for it.
_PATIENCE = 10.0


class _Stopped(Exception):
    """SIGTERM before the motors were on."""


def main() -> None:
    """Read the config from the file descriptor in argv[1]; argv[2] is the heartbeat's."""
    with os.fdopen(int(sys.argv[1]), "rb") as stream:
        config: ClientConfig = pickle.load(stream)
    code = Rollout(config, Heartbeat(int(sys.argv[2]))).run()
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
        sys.stdout.flush()
    # Not sys.exit: a camera's or a driver's thread may sit in a call that nobody can interrupt.
    os._exit(code)


class Rollout:
    """One run. `run` returns the exit code."""

    def __init__(self, config: ClientConfig, heartbeat: Heartbeat) -> None:
        self.config = config
        self.heartbeat = heartbeat
        self.console = Console()
        self.stop = threading.Event()
        self.results: list[EpisodeResult] = []
        self._between = threading.Event()
        self._starting = True
        self._engaged = False
        self._clean = True
        self._client: WebsocketClientPolicy | None = None
        self._env: LiveEnv | None = None
        self._closing: list[Any] = []

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handler = ConsoleHandler(self.console)
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("env_client").setLevel(logging.INFO)
        # Its lines about single packets would fill the terminal; what matters is said by the env.
        logging.getLogger("lerobot").setLevel(logging.ERROR)
        code = 0
        try:
            self._start()
            code = self._episodes()
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
        self._stop()
        if self._starting:
            raise _Stopped

    def _stop(self) -> None:
        self.stop.set()
        self._between.set()

    def _beat(self, _now: float = 0.0) -> None:
        self.heartbeat.beat()
        if self.heartbeat.lost and not self.stop.is_set():
            self.console.say("The supervisor is gone; stopping.")
            self._stop()

    # ---------------------------------------------------------------------------------------- the start

    def _start(self) -> None:
        config = self.config
        task = find_task(config.task)
        self._prompt = config.prompt or task.prompt
        client = self._client = WebsocketClientPolicy(
            config.host,
            config.port,
            config.api_key or os.environ.get("GRASP_CUBE_API_KEY"),
            connect_timeout_s=config.connect_timeout_s or None,
            timeout_s=config.timeout_s,
            on_status=self.console.say,
            image_codec=config.image_codec,
        )
        client.connect_timeout_s = _RECONNECT
        self.console.say(f"Connected! {describe(client)}")
        env = self._env = make_env(config.env, task=self._prompt, dry_run=config.loop.dry_run)
        env.connect()
        self._file = read_robot_file(config.env, env.spec.type)
        self._policy = self._fit(client, env, task)
        self.fps = config.fps or self._policy.fps or 30.0
        safety = replace(config.safety, hold=_joint_names(config.safety.hold, env.spec))
        self.safety = SafetyFilter(env.spec, safety, self.fps)
        checked = SamePolicy(client)
        self.source = make_source(config.execution, checked, self._policy, self.fps, config.chunks)
        self.source.prompt = self._prompt or None
        self.loop = ControlLoop(
            env, self.source, self.safety, self.fps, config=config.loop, heartbeat=self._beat
        )
        self._poses = _poses(env, self._file, config)
        self._leader = self._make_leader(env)
        self._engage(env)

    def _fit(self, client: WebsocketClientPolicy, env: LiveEnv, task: Task) -> PolicySpec:
        """The policy's spec, when policy, robot and task belong together. Raises `EnvError` otherwise."""
        spec, name = env.spec, f"the robot ({env.spec.type})"
        policy = client.spec or plain_spec(spec, self.config.policy_unit)
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
            encode_observation(env.get_observation(), policy)
        except InvalidInput as error:
            raise EnvError(f"{error}. Nothing was moved.") from error
        return policy

    def _engage(self, env: LiveEnv) -> None:
        if hasattr(env, "on_wait"):
            env.on_wait = self._beat
        self._starting = False
        if self.stop.is_set():
            raise _Stopped
        if self.config.loop.dry_run:
            self.console.say("Dry run: the motors are left alone.")
            return
        self.heartbeat.arm(env.stop_plan(self.config.on_exit, self._poses["rest"], self.config.rest_velocity))
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

    # -------------------------------------------------------------------------------------- the episodes

    def _episodes(self) -> int:
        config, code = self.config, 0
        status = StatusThread(self.loop, self.source, self.console, config, give_up=self._give_up)
        try:
            for number in range(config.num_episodes):
                self._wake()
                if self._leader is not None:
                    status.phase("teleoperation")
                    self._teleoperate(number)
                ready = self._poses["ready"]
                if config.move_to_ready and ready is not None and not self.stop.is_set():
                    status.phase("to the ready pose")
                    move = self.loop.move_to(ready, stop=self.stop)
                    if not move.reached and not self.stop.is_set():
                        raise EnvError(f"the ready pose was not reached ({move.outcome})")
                if self.stop.is_set():
                    break
                status.episode(number + 1)
                result = self.loop.run_episode(
                    episode=number,
                    time_s=config.episode_time_s,
                    max_steps=config.max_steps or None,
                    stop=self.stop,
                    seed=self._seed(number),
                )
                status.phase("")
                self.results.append(result)
                self.console.say(format_episode(result, number + 1, config.num_episodes))
                if result.outcome == "env lost":
                    raise EnvError("the robot did not come back; see the messages above")
        finally:
            status.close()
        if status.gave_up:
            code = 1
        return code

    def _wake(self) -> None:
        """Motors that lost their power in the last episode get it back before anything is asked of them."""
        if self._engaged and self._env is not None:
            with contextlib.suppress(EnvError):  # the loop waits for the robot, and says why
                self._patiently(self._env.engage)

    def _patiently(self, act: Callable[[], None]) -> None:
        """Do what may take longer than the supervisor waits for a sign of life: setting up two arms' servos."""
        failure: list[Exception] = []

        def run() -> None:
            try:
                act()
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

    def _seed(self, number: int) -> int | None:
        seed = getattr(self.config.env, "seed", None)
        return None if seed is None else int(seed) + number

    def _give_up(self, reason: str) -> None:
        self.console.say(f"run_env_client: {reason}")
        self._stop()

    def _teleoperate(self, number: int) -> None:
        """The leader moves the robot until Enter is pressed, or for `--leader.time-s`."""
        assert self._leader is not None
        limit = self.config.leader.time_s
        self._between.clear()
        if self.stop.is_set():
            return
        if limit:
            self.console.say(f"The leader arm moves the robot for {limit:g} s.")
        else:
            self.console.say(f"The leader arm moves the robot; Enter starts episode {number + 1}.")
            threading.Thread(target=self._await_enter, name="enter", daemon=True).start()
        self._leader.run_episode(episode=number, time_s=limit or None, stop=self._between, reset_env=False)

    def _await_enter(self) -> None:
        sys.stdin.readline()
        self._between.set()

    # ------------------------------------------------------------------------------------------- the end

    def _finish(self, code: int) -> int:
        self._starting = False
        if self._engaged:
            try:
                self.console.say(self._leave())
                self.heartbeat.disarm()
            except Exception as error:  # the supervisor sees that we never let go, and does it
                self.console.say(f"run_env_client: the robot could not be left in order ({error})")
                code = code or 1
        if self.config.summary_path is not None:
            self._write_summary()
        closing = [*self._closing, getattr(self, "source", None), self._client, self._env]
        for part in closing:
            try:
                if part is not None:
                    part.close()
            except Exception as error:
                self.console.say(f"closing {type(part).__name__}: {error}")
        self.console.close()
        return code

    def _write_summary(self) -> None:
        assert self.config.summary_path is not None
        try:
            write_results(self.config.summary_path, self.results, fps=getattr(self, "fps", None))
        except OSError as error:
            self.console.say(f"the summary {self.config.summary_path} cannot be written: {error}")

    def _leave(self) -> str:
        """Bring the robot into the state of `--on-exit`; what was reached. Raises `EnvError`."""
        env, how = self._env, self.config.on_exit
        assert env is not None
        if not self._clean:
            env.hold()
        rest = self._poses["rest"]
        if how == "rest-pose" and rest is not None:
            self.console.say("Going to the rest pose …")
            move = self.loop.move_to(rest, velocity=self.config.rest_velocity)
            if not move.reached:
                env.hold()
                return f"The rest pose was not reached ({move.outcome}); the robot holds where it is."
            env.relax()
            return "The robot lies in its rest pose, torque off."
        if how == "relax":
            env.relax()
            return "Torque off."
        # Proof that the robot can be reached and really holds what it was told last.
        env.get_observation()
        return "The robot holds its pose, torque on."


def _joint_names(names: tuple[str, ...], spec: EnvSpec) -> tuple[str, ...]:
    """`wrist_roll` is `wrist_roll.pos` in LeRobot's naming."""
    return tuple(f"{name}.pos" if f"{name}.pos" in spec.action_names else name for name in names)


def _poses(env: LiveEnv, file: RobotFile, config: ClientConfig) -> dict[str, np.ndarray | None]:
    poses = {
        name: None if values is None else env.pose(values, file.unit)
        for name, values in (("ready", file.ready_pose), ("rest", file.rest_pose))
    }
    for flag, wanted, name in (
        ("--move-to-ready", config.move_to_ready, "ready"),
        ("--on-exit rest-pose", config.on_exit == "rest-pose", "rest"),
    ):
        if wanted and poses[name] is None:
            raise EnvError(f"{flag} needs a {name}_pose in the robot file (--env.robot-config-path)")
    return poses


if __name__ == "__main__":
    main()
