"""`--env.type virtual`: the `virtual_so101` command as a child process, and from there on exactly so101 or bi_so101.

The process that starts the robot (`VirtualRobot`) is the supervisor's, so that the robot outlives a control
process that crashes, as a real one does. The control process attaches to it (`attach`): ports, calibration
and cameras are what the child says; only reset, success and the seed go through its control socket.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from env_client.envs.env import EnvError, Observation
from env_client.envs.robots import (
    BiSO101Config,
    BiSO101RobotConfig,
    SO101Config,
    SO101RobotConfig,
    VirtualConfig,
)
from env_client.envs.so101 import SO101Env, make_so101
from env_client.envs.so101_arm import ArmConfig

__all__ = ["SCENES", "VirtualEnv", "VirtualRobot", "attach"]

SCENES = ("lift", "sort", "stack")
# Loading the physics and rendering the first picture takes some seconds on two cores.
_START_LIMIT = 90.0
# How long the child may take to end, seconds.
_END_LIMIT = 5.0
# How long a reset waits for pictures of the new scene, seconds.
_PICTURES = 2.0
# How often success is asked after, seconds.
_WATCH = 0.1


class VirtualRobot:
    """The running child. `config` names its control port; `close` ends it."""

    def __init__(self, config: VirtualConfig, *, scene: str) -> None:
        """Start the child and wait until it is ready. Raises `EnvError` with what it said when it is not."""
        if find_spec("virtual_so101") is None:
            raise EnvError("--env.type virtual needs the package virtual-so101; install it beside env-client")
        self._folder = Path(tempfile.mkdtemp(prefix="virtual_so101-"))
        command = [sys.executable, "-m", "virtual_so101.cli", "--task", scene, "--exit-with-parent"]
        command += ["--state-dir", str(self._folder), "--port-link", str(self._folder / "port")]
        command += ["--camera-port", "0", "--control-port", "0", "--seed", str(config.seed or 0)]
        if config.arms is not None:
            command += ["--arms", str(config.arms)]
        if config.servo_log is not None:
            command += ["--servo-log", str(Path(config.servo_log).absolute())]
        self._said = (self._folder / "output.txt").open("w")
        # A group of its own: Ctrl-C in the terminal must reach the client only, which needs the robot to stop.
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            info = self._wait()
        except BaseException:
            self.close()
            raise
        self.config = replace(config, control_port=int(info["control_port"]))

    def _wait(self) -> dict[str, Any]:
        described = self._folder / "robot.json"
        end = time.monotonic() + _START_LIMIT
        while not described.exists():
            if self._child.poll() is not None or time.monotonic() > end:
                said = (self._folder / "output.txt").read_text().strip().splitlines()[-3:]
                raise EnvError(f"the virtual robot did not start: {' '.join(said) or 'it said nothing'}")
            time.sleep(0.05)
        content: dict[str, Any] = json.loads(described.read_text())
        return content

    def close(self) -> None:
        """End the child and remove its files. Safe to call twice."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(_END_LIMIT)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def attach(config: VirtualConfig, *, task: str = "", dry_run: bool = False) -> VirtualEnv:
    """The env for the virtual robot at `config.control_port`, not yet connected."""
    from virtual_so101.control import ControlClient, ControlError

    if config.control_port is None:
        raise EnvError("the virtual robot's control port is not known; start it first (VirtualRobot)")
    try:
        control = ControlClient(config.control_port)
        info = control.info()
    except ControlError as error:
        raise EnvError(str(error)) from error
    common: dict[str, Any] = {"id": info["robot_id"], "calibration_dir": info["calibration_dir"]}
    shared: dict[str, Any] = {
        "camera_config_path": config.camera_config_path or info["camera_config_path"],
        "robot_config_path": config.robot_config_path,
        "frozen_camera_s": config.frozen_camera_s,
        "use_degrees": config.use_degrees,
    }
    real: SO101Config | BiSO101Config
    if info["env_type"] == "so101":
        real = SO101Config(robot=SO101RobotConfig(port=info["ports"][0], **common), **shared)
    else:
        left, right = (ArmConfig(port=port) for port in info["ports"])
        real = BiSO101Config(robot=BiSO101RobotConfig(left, right, **common), **shared)
    env = make_so101(real, task=task, dry_run=dry_run)
    watch = _SuccessWatch(ControlClient(config.control_port)) if config.end_on_success else None
    return VirtualEnv(env, control, watch)


class VirtualEnv(SO101Env):
    """A real `SO101Env` on virtual hardware that can also be reset and asked for success."""

    def __init__(self, env: SO101Env, control: Any, watch: _SuccessWatch | None = None) -> None:
        """With a `watch`, `done` is True once the task is solved."""
        super().__init__(env.arms, env.cameras, env.parts, use_degrees=env.use_degrees, task=env.task)
        self._control = control
        self._watch = watch
        # Called again and again while `reset` waits: whoever watches the control thread knows that it lives.
        self.on_wait: Callable[[], None] = lambda: None

    def reset(self, seed: int | None = None) -> Observation:
        """Cubes, colours and light of `seed` (None: the next ones), the arm in its start pose."""
        # Drawing a new scene takes longer than the supervisor waits for a sign of life.
        failure: list[Exception] = []
        asking = threading.Thread(target=self._reset_world, args=(seed, failure), daemon=True)
        asking.start()
        while asking.is_alive():
            self.on_wait()
            asking.join(0.05)
        if failure:
            raise EnvError(str(failure[0])) from failure[0]
        self._await_pictures(time.monotonic())
        if self._watch is not None:
            self._watch.begin()
        return super().reset(seed)

    def _reset_world(self, seed: int | None, failure: list[Exception]) -> None:
        try:
            self._control.reset(seed)
        except Exception as error:  # told in the control thread
            failure.append(error)

    def _await_pictures(self, since: float) -> None:
        """Until every camera shows the new scene: one frame may have been under way."""
        end = since + _PICTURES
        while self.cameras.names and time.monotonic() < end:
            time.sleep(0.02)
            self.on_wait()
            try:
                ages = self.cameras.frames().ages
            except EnvError:
                continue
            if all(time.monotonic() - age > since + 0.1 for age in ages.values()):
                return

    @property
    def done(self) -> bool:
        return self._watch is not None and self._watch.solved

    def success(self) -> bool | None:
        from virtual_so101.control import ControlError

        try:
            return bool(self._control.success())
        except ControlError:
            return None

    def close(self) -> None:
        super().close()
        if self._watch is not None:
            self._watch.close()
        self._control.close()


class _SuccessWatch:
    """Asks after success in a thread of its own, over a connection of its own: the control loop waits for nobody."""

    def __init__(self, control: Any) -> None:
        self.solved = False
        self._episode = 0
        self._control = control
        self._watching = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="success", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """An episode begins, unsolved."""
        self._episode += 1
        self.solved = False
        self._watching.set()

    def close(self) -> None:
        self._closed.set()
        self._watching.set()
        self._thread.join(1.0)
        self._control.close()

    def _run(self) -> None:
        from virtual_so101.control import ControlError

        while not self._closed.wait(_WATCH):
            self._watching.wait()
            episode = self._episode
            with contextlib.suppress(ControlError):  # a robot that is gone is the env's to tell
                # An answer that was under way while the next episode began is about the one before.
                if not self._closed.is_set() and self._control.success() and episode == self._episode:
                    self._watching.clear()
                    self.solved = True
