"""From an `AstribotConfig` to its env, and the virtual robot as a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from env_client.cli import CliError, find_config_file
from env_client.envs import astribot_cameras as cameras
from env_client.envs.astribot import AstribotEnv
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.astribot_layout import Hardware, read_hardware
from env_client.envs.cameras import CameraRig, read_camera_file
from env_client.envs.env import EnvError

__all__ = ["VirtualAstribot", "find_hardware", "make_astribot"]

# Where the stand-in's client looks for its robot.
ADDRESS = "VIRTUAL_ASTRIBOT"
# How long the virtual robot may take to start and to end, in seconds.
START_S, END_S = 60.0, 5.0


def make_astribot(config: AstribotConfig, *, task: str = "", dry_run: bool = False) -> AstribotEnv:
    """The env, not yet connected. Raises `EnvError`."""
    sdk_path = config.astribot.sdk_path
    if config.astribot.virtual:
        sdk_path = str(_stand_in())
        if config.astribot.virtual_address is not None:
            os.environ[ADDRESS] = config.astribot.virtual_address
    rig = None
    if config.camera_config_path and config.enable_camera:
        rig = CameraRig(
            read_camera_file(Path(config.camera_config_path)), frozen_after_s=config.frozen_camera_s
        )
    return AstribotEnv(
        config,
        find_hardware(config),
        sdk_path=sdk_path,
        make_source=lambda call: _source(config, call),
        rig=rig,
        task=task,
        dry_run=dry_run,
    )


def find_hardware(config: AstribotConfig) -> Hardware:
    """The robot file of `config`. Raises `EnvError`."""
    try:
        return read_hardware(find_config_file(config.robot_config_path or "robots/astribot_s1.yaml"))
    except CliError as error:
        raise EnvError(f"{error}; --env.robot-config-path names another one") from error


def _source(config: AstribotConfig, call: Callable[..., Any]) -> cameras.Source:
    match config.camera_source:
        case "sdk":
            return cameras.SdkCallbacks(call)
        case "images-dict":
            return cameras.ImagesDict(call)
        case "ros1":
            return cameras.RosTopics1()
        case "ros2":
            return cameras.RosTopics2()
        case "rosbridge":
            return cameras.Rosbridge(config.rosbridge)


def _stand_in() -> Path:
    """The folder that takes the place of the vendor's."""
    spec = find_spec("virtual_astribot")
    if spec is None or spec.origin is None:
        raise EnvError(
            "--env.astribot.virtual needs the package virtual-astribot; install it beside env-client"
        )
    return Path(spec.origin).parent / "vendor"


class VirtualAstribot:
    """The stand-in's robot as a child of the process that outlives the control process. `config` says where it is."""

    def __init__(self, config: AstribotConfig) -> None:
        """Start it and wait until it listens. Raises `EnvError` with what it said when it does not."""
        _stand_in()
        command = [sys.executable, "-m", "virtual_astribot.cli", "--port", "0", "--exit-with-parent"]
        if config.astribot.virtual_log is not None:
            command += ["--log", str(Path(config.astribot.virtual_log).absolute())]
        # A group of its own: Ctrl-C in the terminal must reach the client only, which needs the robot to stop.
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.lines: list[str] = []
        self._listens = threading.Event()
        threading.Thread(target=self._read, name="virtual-astribot", daemon=True).start()
        if not self._listens.wait(START_S) or self._child.poll() is not None:
            self.close()
            raise EnvError(
                f"the virtual robot did not start: {' '.join(self.lines[-3:]) or 'it said nothing'}"
            )
        self.address = self.lines[-1].rpartition("=")[2]
        self.config = replace(config, astribot=replace(config.astribot, virtual_address=self.address))

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            # What it refuses is said by the client; the last line before it listens is its address.
            if not self._listens.is_set():
                self.lines.append(line.rstrip())
            if f"{ADDRESS}=" in line:
                self._listens.set()
        self._listens.set()

    def close(self) -> None:
        """End the child. Safe to call twice."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(END_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
