"""What `--env.type` chooses between, and the flags of each robot. Light: no driver is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from env_client.envs.config import EnvConfig
from env_client.envs.so101_arm import ArmConfig

__all__ = [
    "BiSO101Config",
    "BiSO101RobotConfig",
    "LeRobotConfig",
    "LiveEnvConfig",
    "SO101Config",
    "SO101RobotConfig",
    "VirtualConfig",
]


@dataclass(frozen=True)
class LiveEnvConfig(EnvConfig):
    """What all robots with motors and cameras have in common."""

    # JSON file that names the cameras, {name: {"type": "opencv"|"realsense"|"zmq", …LeRobot's fields}}; default: configs/cameras/ROBOT.json.
    camera_config_path: str | None = None
    # YAML file with the ready pose and the rest pose; default: configs/robots/ROBOT.yaml.
    robot_config_path: str | None = None
    # A picture that stays the same for so long (seconds) while the arm moves is refused; 0 switches this off.
    frozen_camera_s: float = 1.0

    def __post_init__(self) -> None:
        if self.frozen_camera_s < 0:
            raise ValueError(f"frozen_camera_s is {self.frozen_camera_s:g}; 0 or more seconds were expected")


@dataclass(frozen=True)
class SO101RobotConfig(ArmConfig):
    """LeRobot's config of one SO-101 follower."""

    # The name under which the arm was calibrated: its file is ID.json.
    id: str = "so101"
    # Folder of the calibration file; default: LeRobot's own.
    calibration_dir: str | None = None


@dataclass(frozen=True)
class BiSO101RobotConfig:
    """LeRobot's config of two SO-101 followers."""

    left_arm_config: ArmConfig = field(default_factory=ArmConfig)
    right_arm_config: ArmConfig = field(default_factory=lambda: ArmConfig(port="/dev/ttyACM1"))
    # The name under which the arms were calibrated: their files are ID_left.json and ID_right.json.
    id: str = "bi_so101"
    # Folder of the calibration files; default: LeRobot's own.
    calibration_dir: str | None = None


@EnvConfig.register_subclass("so101")
@dataclass(frozen=True)
class SO101Config(LiveEnvConfig):
    """One SO-101 arm."""

    robot: SO101RobotConfig = field(default_factory=SO101RobotConfig)
    # The arm's joints in degrees instead of -100..100; a policy that is connected decides it.
    use_degrees: bool = False


@EnvConfig.register_subclass("bi_so101")
@dataclass(frozen=True)
class BiSO101Config(LiveEnvConfig):
    """Two SO-101 arms, left first."""

    robot: BiSO101RobotConfig = field(default_factory=BiSO101RobotConfig)
    # The arms' joints in degrees instead of -100..100; a policy that is connected decides it.
    use_degrees: bool = False


@EnvConfig.register_subclass("virtual")
@dataclass(frozen=True)
class VirtualConfig(LiveEnvConfig):
    """A virtual SO-101 that is started with the client: physics, servo bus and cameras, no hardware."""

    # Number of arms, 1 or 2; default: what the task has.
    arms: int | None = None
    # What the virtual world shows: lift, sort or stack; default: --task.
    scene: str | None = None
    # Seed of the first episode; the ones after it count on. Default: the virtual robot's own.
    seed: int | None = None
    # Control port of a virtual robot that runs already; default: one is started.
    control_port: int | None = None
    # End an episode as soon as the task is solved.
    end_on_success: bool = False
    # File that gets everything that the virtual servos were told.
    servo_log: str | None = None
    # The joints in degrees instead of -100..100; a policy that is connected decides it.
    use_degrees: bool = False


@EnvConfig.register_subclass("lerobot")
@dataclass(frozen=True)
class LeRobotConfig(LiveEnvConfig):
    """Any robot that LeRobot knows. Its limits and scales stand in --env.robot-config-path."""

    # LeRobot's robot type and the fields of its config, such as --env.robot.type koch_follower --env.robot.port PORT.
    robot: dict[str, Any] = field(default_factory=dict)
