"""What `--env.type astribot` can be told. Light: neither the SDK nor a camera library is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from env_client.envs.config import EnvConfig
from env_client.envs.robots import LiveEnvConfig

__all__ = ["AstribotConfig", "AstribotSdkConfig", "CameraSource"]

CameraSource = Literal["sdk", "images-dict", "ros1", "ros2", "rosbridge"]


@dataclass(frozen=True)
class AstribotSdkConfig:
    """The vendor's SDK, or the stand-in for it."""

    # Folder of the vendor's SDK; default: it is on the Python path already.
    sdk_path: str | None = None
    # Run on a virtual robot that is started with the client (package virtual-astribot, not the vendor's).
    virtual: bool = False
    # HOST:PORT of a virtual robot that runs already; default: one is started.
    virtual_address: str | None = None
    # File that gets every command that the virtual robot was given, one JSON object a line.
    virtual_log: str | None = None
    # Take the control rights from whoever has them. Their motion stops at once.
    high_control_rights: bool = False
    # How long the SDK may take to find the robot, in seconds.
    connect_timeout_s: float = 10.0
    # How long one call of the SDK may take, in seconds.
    call_timeout_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "call_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a number of seconds above 0 was expected")
        if self.virtual and self.sdk_path:
            raise ValueError(
                "--env.astribot.sdk-path names a real robot's SDK and --env.astribot.virtual a virtual one"
            )


@EnvConfig.register_subclass("astribot")
@dataclass(frozen=True)
class AstribotConfig(LiveEnvConfig):
    """An Astribot S1."""

    astribot: AstribotSdkConfig = field(default_factory=AstribotSdkConfig)
    # The order of the action values: an embodiment (astribot_s1_16, astribot_s1_22, astribot_s1_25, or a file); default: what the server says, else by their number.
    layout: str | None = None
    # What a server that does not name its state reads: an embodiment like --env.layout; default: the same values as an action.
    state_layout: str | None = None
    # Read the cameras.
    enable_camera: bool = True
    # Where pictures come from: the SDK's callbacks, its get_images_dict, ROS 1 or ROS 2 topics, or rosbridge.
    camera_source: CameraSource = "sdk"
    # Names of the cameras (head, left_wrist, right_wrist, torso); default: those that the policy looks through.
    cameras: tuple[str, ...] = ()
    # HOST:PORT of the rosbridge server.
    rosbridge: str = "127.0.0.1:9090"
    # Let the policy drive the chassis, relative to its pose at the start of the episode.
    execute_chassis: bool = False
    # Let the policy move the head.
    head: bool = True
    # Let the policy move the torso.
    torso: bool = True
    # How the robot goes to a set-point: at once (direct), or smoothed by the SDK (filter).
    control_way: Literal["direct", "filter"] = "filter"
    # Send interpolated set-points at so many Hz between two actions, at most 250; 0: only the actions.
    executor_hz: float = 0.0
    # How long a set-point takes to its action, in seconds: longer is smoother and later.
    executor_blend_s: float = 0.12

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.executor_hz <= 250:
            raise ValueError(f"--env.executor-hz is {self.executor_hz:g}; 0 to 250 Hz was expected")
        if not self.executor_blend_s > 0:
            raise ValueError(
                f"--env.executor-blend-s is {self.executor_blend_s:g}; above 0 seconds was expected"
            )
