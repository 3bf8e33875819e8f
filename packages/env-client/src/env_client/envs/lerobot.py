"""Any robot that LeRobot knows, as an `Env`: its own driver class, its config from the command line.

LeRobot says what a robot's action values are called, but neither their limits nor how they relate to radians.
Both stand in the robot's YAML file (`configs/robots/lerobot.yaml` is an example); without them nothing is
commanded. What `so101.py` adds for the SO-101's bus (late replies, lost lines) is not done here: a driver that
fails is reported at every tick, and the robot keeps its last command.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from env_client.control.heartbeat import StopPlan
from env_client.envs.cameras import CameraRig, read_camera_file
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.envs.make import RobotFile
from env_client.envs.robots import LeRobotConfig
from env_client.envs.so101_bus import calibrated, let_go, lives_on, stand, ticks, torque_off
from env_client.wire.spec import StateSpec

__all__ = ["LeRobotEnv", "make_lerobot", "stop"]

# How often a connection is tried.
_ATTEMPTS = 3


def make_lerobot(
    config: LeRobotConfig, file: RobotFile, unit: str, *, task: str = "", dry_run: bool = False
) -> LeRobotEnv:
    """The env that a config and a robot file describe, not yet connected."""
    cameras = CameraRig(
        read_camera_file(Path(config.camera_config_path)) if config.camera_config_path else {},
        frozen_after_s=config.frozen_camera_s,
    )
    return LeRobotEnv(dict(config.robot), file, cameras, unit, task=task, dry_run=dry_run)


class LeRobotEnv:
    """Life cycle as `SO101Env`: `connect`, the `Env` protocol, `close`."""

    def __init__(
        self,
        fields: dict[str, Any],
        file: RobotFile,
        cameras: CameraRig,
        unit: str,
        *,
        task: str = "",
        dry_run: bool = False,
    ) -> None:
        if not file.joints:
            raise EnvError(
                "the robot file says nothing about joints: --env.type lerobot needs lower, upper and unit_per_rad "
                "of each action value (see configs/robots/lerobot.yaml)"
            )
        self.cameras = cameras
        self.task = task
        self._fields = fields
        self._file = file
        self._dry_run = dry_run
        self._robot: Any = None
        self._engaged = False
        self._held: np.ndarray | None = None
        self._spec = _spec(file, file.joints, cameras.names)
        # The policy's unit; a driver that reads in one unit only keeps that of its robot file.
        self._unit = unit if {unit, file.unit} <= {"normalized", "degrees"} else file.unit
        # (action_dim,) how many of the unit are one of the robot file's.
        self._scale: np.ndarray = np.ones(len(file.joints))

    @property
    def spec(self) -> EnvSpec:
        return self._spec

    @property
    def done(self) -> bool:
        return False

    def connect(self) -> None:
        """Open cameras and robot. A driver switches its motors on in its `configure`, which waits for `engage`."""
        self.cameras.connect()
        robot = self._make()
        missing = set(self._spec.action_names) ^ set(robot.action_features)
        if missing:
            raise EnvError(
                f"the robot's action values are {', '.join(robot.action_features)}; the robot file describes "
                f"{', '.join(self._spec.action_names)}"
            )
        self._take_unit(robot)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                robot.connect(calibrate=False)
                in_order = all(
                    calibrated(part) if _is_feetech(part) else part.is_calibrated for part in _parts(robot)
                )
                break
            except Exception as error:
                # One packet that went missing is no missing robot; LeRobot's drivers ask once.
                if attempt == _ATTEMPTS or not isinstance(error, ConnectionError):
                    _let_go(robot)
                    raise EnvError(f"{robot} cannot be reached: {' '.join(str(error).split())}") from error
                _let_go(robot)
                robot = self._make()
        self._robot = robot
        if not in_order:
            self.close()
            raise EnvError(f"{robot} is not calibrated, or not as its file says; run lerobot-calibrate")

    def _make(self) -> Any:
        return _robot(self._fields, self._unit if self._unit in ("normalized", "degrees") else None)

    def _take_unit(self, robot: Any) -> None:
        """Limits and scales of the robot file in the unit that the driver really reads in. Raises `EnvError`."""
        if self._unit == self._file.unit:
            return
        per_file: list[float] = []
        for name, gripper in zip(self._spec.action_names, self._spec.gripper, strict=True):
            joint = name.removesuffix(".pos")
            bus: Any = getattr(robot, "bus", None)
            if joint.startswith(("left_", "right_")):
                side, _, joint = joint.partition("_")
                bus = getattr(getattr(robot, f"{side}_arm", None), "bus", None)
            motor = getattr(bus, "motors", {}).get(joint)
            found = getattr(bus, "calibration", {}).get(joint)
            mode = "degrees" if motor is None else motor.norm_mode.value
            if gripper:
                per_file.append(1.0)
            elif found is None or motor is None or (mode == "degrees") != (self._unit == "degrees"):
                raise EnvError(
                    f"the driver of {robot} cannot read {name} in {self._unit}, the policy's unit (calibration: "
                    f"{'none' if found is None else 'there'}): calibrate it, or serve a policy in {self._file.unit}"
                )
            else:
                steps = bus.model_resolution_table[motor.model] - 1
                degrees = (found.range_max - found.range_min) * 180.0 / steps / 100.0
                per_file.append(degrees if self._unit == "degrees" else 1.0 / degrees)
        self._scale = np.array(per_file)
        spec = self._spec
        self._spec = replace(
            spec,
            unit=self._unit,
            lower=(spec.lower * self._scale).astype(np.float32),
            upper=(spec.upper * self._scale).astype(np.float32),
            unit_per_rad=spec.unit_per_rad * self._scale,
        )

    def engage(self) -> None:
        """Switch the motors on where the robot stands; once."""
        if self._engaged or self._dry_run:
            return
        for part in _parts(self._robot):
            configure = functools.partial(type(part).configure, part)
            switch = functools.partial(stand, part, configure) if _is_feetech(part) else configure
            self._do("switch on", switch)
        self._engaged = True

    def without_torque(self) -> list[str] | None:
        """The joints whose motors are off, as they say it; None where the driver cannot be asked."""
        buses = [part for part in _parts(self._robot) if hasattr(part, "bus")]
        try:
            return [name for part in buses for name in torque_off(part)] if buses else None
        except Exception:  # a bus without that register
            return None

    def ticks(self) -> dict[str, tuple[int, int, int]]:
        """Each joint's position, smallest and largest calibrated position, in ticks; empty where unknown."""
        try:
            parts = [part for part in _parts(self._robot) if hasattr(part, "bus")]
            return {name: at for part in parts for name, at in ticks(part).items()}
        except Exception:  # a bus without them
            return {}

    def reset(self, seed: int | None = None) -> Observation:
        self.engage()
        self._held = None
        return self.get_observation()

    def get_observation(self) -> Observation:
        started = time.monotonic()
        seen = self._do("read", lambda: self._robot.get_observation())
        state = np.array([seen[name] for name in self._spec.action_names], np.float32)
        frames = self.cameras.frames()
        return Observation(
            images=frames.images,
            states={self._file.part: state},
            task=self.task,
            capture_time=time.monotonic(),
            image_age=frames.ages,
            state_age=time.monotonic() - started,
        )

    def apply_action(self, action: np.ndarray) -> None:
        action = np.asarray(action, np.float32)
        if action.shape != (self._spec.action_dim,) or not np.all(np.isfinite(action)):
            raise EnvError(
                f"the robot was commanded {action!r:.120}; {self._spec.action_dim} finite numbers expected"
            )
        self._held = None
        self._send(action)

    def hold(self) -> None:
        if self._held is None:
            seen = self._do("read", lambda: self._robot.get_observation())
            self._held = np.array([seen[name] for name in self._spec.action_names], np.float32)
        self._send(self._held)

    def success(self) -> bool | None:
        return None

    def relax(self) -> None:
        """Switch the torque off; a driver without a bus is disconnected, where most switch it off."""
        if self._robot is None or self._dry_run:
            return
        buses = [part.bus for part in _parts(self._robot) if hasattr(part, "bus")]
        for relax in [bus.disable_torque for bus in buses] or [self._robot.disconnect]:
            self._do("relax", relax)
        self._engaged = False

    def close(self) -> None:
        self.cameras.close()
        # LeRobot's disconnect would drop most arms.
        if self._robot is not None:
            _let_go(self._robot)
        self._robot = None

    def pose(self, values: Any, unit: str) -> np.ndarray:
        """A pose from the robot file, (action_dim,)."""
        pose = np.asarray(values, np.float32)
        if pose.shape != (self._spec.action_dim,) or unit != self._file.unit:
            raise EnvError(
                f"a pose of {pose.size} values in {unit}; {self._spec.action_dim} in {self._file.unit} expected"
            )
        return (pose * self._scale).astype(np.float32)

    def stop_plan(self, on_exit: str, rest_pose: np.ndarray | None, speed_rad_s: float) -> StopPlan:
        return StopPlan("env_client.envs.lerobot:stop", {"fields": self._fields, "on_exit": on_exit})

    def _send(self, action: np.ndarray) -> None:
        if not self._dry_run:
            if not self._engaged:
                raise EnvError("the robot's motors are off; call engage (or reset) first")
            named = {name: float(value) for name, value in zip(self._spec.action_names, action, strict=True)}
            self._do("command", lambda: self._robot.send_action(named))

    def _do(self, what: str, act: Any) -> Any:
        if self._robot is None:
            raise EnvError("the robot is not connected")
        try:
            return act()
        except Exception as error:  # drivers raise anything
            raise EnvError(
                f"the driver failed to {what} the robot: {' '.join(str(error).split())}"
            ) from error


def stop(fields: dict[str, Any], on_exit: str) -> str:
    """For the supervisor: what LeRobot offers without knowing the robot."""
    if on_exit != "relax":
        return "its motors keep their last command; for another state use the robot's own switch"
    robot = _robot(fields)
    robot.connect(calibrate=False)
    buses = [part.bus for part in _parts(robot) if hasattr(part, "bus")]
    for relax in [bus.disable_torque for bus in buses] or [robot.disconnect]:
        relax()
    return "torque off" if buses else "disconnected by LeRobot's driver"


def _robot(fields: dict[str, Any], unit: str | None = None) -> Any:
    """LeRobot's driver object; with a `unit`, one that reads in it where it can read in two."""
    try:
        import draccus
        import lerobot.robots
        from lerobot.robots import RobotConfig, make_robot_from_config
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise EnvError(
            f"--env.type lerobot needs LeRobot ({error}); install env-client with the extra so101"
        ) from error
    kind = fields.get("type")
    if not kind:
        raise EnvError("--env.robot.type is needed: LeRobot's name of the robot, such as koch_follower")
    register_third_party_plugins()
    _register(str(kind), RobotConfig, lerobot.robots.__path__)
    lives_on()
    try:
        config = draccus.decode(RobotConfig, dict(fields))
        for part in (config, *vars(config).values()):
            if unit is not None and hasattr(part, "use_degrees"):
                part.use_degrees = unit == "degrees"
        robot = make_robot_from_config(config)
    except Exception as error:
        raise EnvError(f"LeRobot cannot make the robot {fields}: {' '.join(str(error).split())}") from error
    for part in _parts(robot):
        # Called by `connect`, it would switch torque off and on.
        part.configure = lambda: None
    return robot


def _parts(robot: Any) -> list[Any]:
    """The robot and those that it is made of, as a pair of arms is."""
    if robot is None:
        return []
    from lerobot.robots import Robot

    inner = [value for value in vars(robot).values() if isinstance(value, Robot)]
    return [robot, *(part for value in inner for part in _parts(value))]


def _is_feetech(part: Any) -> bool:
    return type(getattr(part, "bus", None)).__name__ == "FeetechMotorsBus"


def _let_go(robot: Any) -> None:
    """Close the ports; torque and goals stay as they are."""
    for part in _parts(robot):
        if hasattr(getattr(part, "bus", None), "port_handler"):
            let_go(part)
        for camera in getattr(part, "cameras", {}).values():
            with contextlib.suppress(Exception):  # it was not open
                camera.disconnect()


def _register(kind: str, registry: Any, path: Any) -> None:
    """Import LeRobot's robots until one has registered this type: several share a module of another name."""
    names = sorted((module.name for module in pkgutil.iter_modules(path)), key=lambda name: name != kind)
    for name in names:
        if kind in registry.get_known_choices():
            return
        with contextlib.suppress(ImportError):  # a robot whose own libraries are not installed
            importlib.import_module(f"lerobot.robots.{name}")


def _spec(file: RobotFile, joints: dict[str, dict[str, Any]], cameras: tuple[str, ...]) -> EnvSpec:
    try:
        return EnvSpec(
            type="lerobot",
            action_names=tuple(joints),
            unit=file.unit,
            lower=np.array([float(j["lower"]) for j in joints.values()], np.float32),
            upper=np.array([float(j["upper"]) for j in joints.values()], np.float32),
            unit_per_rad=np.array([float(j["unit_per_rad"]) for j in joints.values()]),
            gripper=np.array([bool(j.get("gripper", False)) for j in joints.values()]),
            state_index=np.arange(len(joints)),
            states=(StateSpec(file.part, len(joints)),),
            cameras=cameras,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EnvError(f"a joint of the robot file lacks lower, upper or unit_per_rad ({error!r})") from error
