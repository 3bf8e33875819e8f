"""What the control loop knows of a robot. Time belongs to the loop, not to the env."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from env_client.wire.codec import EncodedImage
from env_client.wire.spec import StateSpec

__all__ = ["Env", "EnvError", "EnvSpec", "Observation"]


class EnvError(RuntimeError):
    """The robot cannot be read or commanded now; the message says what came and what to do."""


@dataclass(frozen=True)
class EnvSpec:
    """What a robot is: its action, units and limits."""

    # so101 | bi_so101 | astribot | dataset | a LeRobot robot type.
    type: str
    # One name for each value of an action, in order.
    action_names: tuple[str, ...]
    # Unit of states and actions: normalized (-100..100, gripper 0..100), degrees, rad, ...
    unit: str
    # (action_dim,) smallest and largest value that may be commanded, in that unit.
    lower: np.ndarray
    upper: np.ndarray
    # (action_dim,) how many of that unit make one radian at the joint; for a gripper one percent of its
    # travel. The velocity limit, given in rad/s (gripper %/s), is converted with it.
    unit_per_rad: np.ndarray
    # (action_dim,) bool: True where the value is a gripper.
    gripper: np.ndarray
    # (action_dim,) index into the concatenated state of the measured value of each action value.
    state_index: np.ndarray
    # The parts of the state, in the order in which they are concatenated.
    states: tuple[StateSpec, ...]
    # Names of the cameras.
    cameras: tuple[str, ...]
    # The rate at which the robot is meant to be driven, in Hz.
    fps: float = 30.0
    # (action_dim,) the fastest that each value may change, in that unit per second, whatever the user allows; None: the
    # robot sets no limit of its own.
    speed: np.ndarray | None = None

    @property
    def action_dim(self) -> int:
        return len(self.action_names)


@dataclass(frozen=True)
class Observation:
    """What the robot saw at one tick."""

    # {name: (H, W, 3) uint8 RGB}, or as compressed as the camera sent it
    images: Mapping[str, np.ndarray | EncodedImage]
    # {part: (n,) float32 in the env's unit}
    states: dict[str, np.ndarray]
    task: str = ""
    # time.monotonic() when the joints were read, in seconds.
    capture_time: float = 0.0
    # Age of each camera frame at capture_time, in seconds.
    image_age: dict[str, float] = field(default_factory=dict)
    # Age of the joints at capture_time, in seconds.
    state_age: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """The observation as it travels."""
        return {"images": self.images, "states": self.states, "task": self.task}


@runtime_checkable
class Env(Protocol):
    """A robot, or what stands in for one. All methods are called from one thread, the loop's."""

    @property
    def spec(self) -> EnvSpec: ...

    @property
    def done(self) -> bool:
        """True when an episode ended by itself (a replayed one ran out)."""
        ...

    def reset(self, seed: int | None = None) -> Observation:
        """Begin an episode. Raises `EnvError` when the robot is not ready."""
        ...

    def get_observation(self) -> Observation:
        """The newest observation; never blocks longer than one tick. Raises `EnvError`."""
        ...

    def apply_action(self, action: np.ndarray) -> None:
        """Command (action_dim,) float32 in the env's unit, already limited. Raises `EnvError`."""
        ...

    def hold(self) -> None:
        """Command the pose that is measured now."""
        ...

    def success(self) -> bool | None:
        """Whether the task is solved; None where the env cannot know."""
        ...

    def close(self) -> None:
        """Let go of the robot. May be called twice."""
        ...
