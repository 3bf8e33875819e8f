"""The S1's joints as its SDK tells them: parts in the SDK's order, limits, speeds, and where it stands at first."""

from dataclasses import dataclass

__all__ = ["CAMERAS", "FREQ", "PARTS", "Camera", "Part"]

# The rate of the robot's own control loop, in Hz.
FREQ = 250.0

_ARM = (-3.10, -1.53, -3.10, -0.06, -2.56, -0.76, -1.53), (3.10, 0.46, 3.10, 2.61, 2.56, 0.76, 1.53)
_ARM_SPEED = (8.4, 8.4, 8.4, 15.0, 20.0, 16.8, 16.8)


@dataclass(frozen=True)
class Part:
    """One group of joints: rad and rad/s; a gripper 0 (open) to 100 (closed); the chassis m and rad."""

    name: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    speed: tuple[float, ...]
    home: tuple[float, ...]

    @property
    def dof(self) -> int:
        return len(self.lower)


# Somewhere between hanging arms and the ready pose, the chassis away from its frame's origin.
PARTS = (
    Part(
        "astribot_chassis", (-100.0, -100.0, -100.0), (100.0, 100.0, 100.0), (1.0, 1.0, 1.0), (2.0, -1.0, 0.5)
    ),
    Part(
        "astribot_torso",
        (-0.04, -2.30, -0.40, -1.20),
        (1.30, 0.06, 2.30, 1.20),
        (1.8, 1.8, 1.8, 1.8),
        (0.5, -1.0, 0.5, 0.0),
    ),
    Part("astribot_arm_left", *_ARM, _ARM_SPEED, (0.1, 0.0, -1.3, 1.5, -0.3, 0.1, 0.1)),
    Part("astribot_gripper_left", (0.0,), (100.0,), (1000.0,), (10.0,)),
    Part("astribot_arm_right", *_ARM, _ARM_SPEED, (-0.1, 0.0, 1.3, 1.5, 0.3, 0.1, -0.1)),
    Part("astribot_gripper_right", (0.0,), (100.0,), (1000.0,), (10.0,)),
    Part("astribot_head", (-1.57, -1.22), (1.57, 1.22), (4.0, 4.0), (0.0, 0.6)),
)


@dataclass(frozen=True)
class Camera:
    """One colour stream."""

    name: str
    height: int
    width: int

    @property
    def topic(self) -> str:
        return f"/astribot_camera/{self.name}/color_compress/compressed"


CAMERAS = (
    Camera("head_rgbd", 720, 1280),
    Camera("left_wrist_rgbd", 360, 640),
    Camera("right_wrist_rgbd", 360, 640),
    Camera("torso_rgbd", 720, 1280),
)
