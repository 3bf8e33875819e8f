"""From a config to an env that is not connected yet, and the files that belong to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from env_client.cli import CliError, find_config_file
from env_client.control.heartbeat import StopPlan
from env_client.control.safety import SafetyConfig
from env_client.envs.astribot_config import AstribotConfig
from env_client.envs.config import EnvConfig
from env_client.envs.env import Env, EnvError
from env_client.envs.plug_ins import PlugInConfig
from env_client.envs.robots import BiSO101Config, LeRobotConfig, LiveEnvConfig, SO101Config, VirtualConfig
from env_client.text_files import load_yaml
from env_client.wire.spec import PolicySpec

__all__ = ["LiveEnv", "OwnSafety", "RobotFile", "Stoppable", "make_env", "read_robot_file"]


@dataclass(frozen=True)
class RobotFile:
    """What a robot's YAML file says."""

    # Of the poses, and of everything below for `lerobot`.
    unit: str
    # (action_dim,) where an episode starts, and where the robot can be left without torque; of an Astribot by part.
    ready_pose: list[float] | dict[str, list[float]] | None = None
    rest_pose: list[float] | dict[str, list[float]] | None = None
    # Only for `lerobot`: the name of the state's part, and
    # {LeRobot's name of an action value: {lower, upper, unit_per_rad, gripper}}.
    part: str = "arm"
    joints: dict[str, dict[str, Any]] | None = None


class LiveEnv(Env, Protocol):
    """What robots with motors have beyond `Env`."""

    def connect(self) -> None:
        """Open everything; nothing is switched on."""
        ...

    def engage(self) -> None:
        """Switch the motors on where the robot stands."""
        ...

    def relax(self) -> None:
        """Switch the motors off."""
        ...

    def pose(self, values: Any, unit: str) -> np.ndarray:
        """A pose of the robot file in the env's own unit, (action_dim,)."""
        ...

    def stop_plan(self, on_exit: str, rest_pose: np.ndarray | None, speed_rad_s: float) -> StopPlan:
        """How another process stops this robot."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A robot that is left by stopping it: it stands, and takes no more commands."""

    def stop(self) -> str:
        """What was reached, as a sentence. Raises `EnvError`."""
        ...


@runtime_checkable
class OwnSafety(Protocol):
    """A robot that knows more of its safety filter's settings than the user says."""

    def safety(self, config: SafetyConfig) -> SafetyConfig: ...


def make_env(
    config: EnvConfig,
    *,
    task: str = "",
    dry_run: bool = False,
    policy: PolicySpec | None = None,
    action_dim: int | None = None,
) -> LiveEnv:
    """The env for a config; `task` is the prompt that its observations carry. Raises `EnvError`.

    A robot that can be driven in several layouts or units takes those of `policy`, or the layout of `action_dim` values.
    """
    if isinstance(config, AstribotConfig):
        from env_client.envs.astribot_make import make_astribot

        astribot = make_astribot(config, task=task, dry_run=dry_run)
        astribot.suit(policy, action_dim)
        return cast(LiveEnv, astribot)
    if policy is not None and isinstance(config, SO101Config | BiSO101Config | VirtualConfig):
        # LeRobot's driver reads both units: the arm takes the policy's, so that they cannot differ.
        config = replace(config, use_degrees=policy.unit == "degrees")
    if isinstance(config, VirtualConfig):
        from env_client.envs.virtual import attach

        return cast(LiveEnv, attach(config, task=task, dry_run=dry_run))
    if isinstance(config, SO101Config | BiSO101Config):
        from env_client.envs.so101 import make_so101

        kind = "so101" if isinstance(config, SO101Config) else "bi_so101"
        return cast(LiveEnv, make_so101(_with_cameras(config, kind), task=task, dry_run=dry_run))
    if isinstance(config, LeRobotConfig):
        from env_client.envs.lerobot import make_lerobot

        if config.robot_config_path is None:
            raise EnvError(
                "--env.type lerobot needs --env.robot-config-path: a file with this robot's unit and limits, which "
                "LeRobot does not say (configs/robots/lerobot.yaml is an example)"
            )
        file = read_robot_file(config, "lerobot")
        unit = policy.unit if policy is not None else file.unit
        return cast(LiveEnv, make_lerobot(config, file, unit, task=task, dry_run=dry_run))
    if isinstance(config, PlugInConfig):
        return config.make_env(task=task, dry_run=dry_run)
    raise EnvError(f"run_env_client drives robots; {type(config).__name__} is none (see run_fake_env_client)")


def _with_cameras[T: LiveEnvConfig](config: T, kind: str) -> T:
    path = config.camera_config_path or f"cameras/{kind}.json"
    return replace(config, camera_config_path=str(_find(path, "--env.camera-config-path")))


def read_robot_file(config: EnvConfig, kind: str) -> RobotFile:
    """The robot file of `config`, or the default one of `kind`. Raises `EnvError` with what is wrong in it."""
    if isinstance(config, AstribotConfig):
        from env_client.envs.astribot_make import find_hardware

        hardware = find_hardware(config)
        return RobotFile("rad", ready_pose=hardware.ready_pose, rest_pose=hardware.rest_pose)
    given = config.robot_config_path if isinstance(config, LiveEnvConfig) else None
    path = _find(given or f"robots/{kind}.yaml", "--env.robot-config-path")
    try:
        return RobotFile(**load_yaml(path))
    except (OSError, ValueError, TypeError) as error:
        raise EnvError(
            f"the robot file {path} cannot be used ({' '.join(str(error).split())}); unit, ready_pose, rest_pose, "
            "part and joints were expected"
        ) from error


def _find(path: str, flag: str) -> Path:
    try:
        return find_config_file(path)
    except CliError as error:
        raise EnvError(f"{error}; {flag} names another one") from error
