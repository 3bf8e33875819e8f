"""The S1's joints as data: the robot file, the layouts of policies, and the way between both.

The robot's pose is one vector in the SDK's order and unit: chassis 3, torso 4, left arm 7, left gripper 1, right arm
7, right gripper 1, head 2; rad, grippers 0 (open) to 100 (closed), the chassis in m and rad.

A layout is a sequence of joint names (`arm_left.1`, `gripper_left.pos`, `head.pan`, …), in any order and number, and
a unit that says what a gripper value means. What a layout does not name is held.

Error policy: a file that cannot be used, an unknown joint, or a wrong number of values is an `EnvError` that says
what came and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_client.cli import CliError, find_config_file
from env_client.envs.env import EnvError, EnvSpec
from env_client.text_files import load_yaml
from env_client.wire.spec import StateSpec

__all__ = [
    "CHASSIS",
    "CameraNames",
    "ChassisFrame",
    "Hardware",
    "Layout",
    "Part",
    "layout_names",
    "make_spec",
    "read_hardware",
]

CHASSIS = "chassis"


@dataclass(frozen=True)
class Part:
    """One group of joints: our name, the SDK's, its joints, and where it lies in the robot's vector."""

    name: str
    sdk: str
    joints: tuple[str, ...]
    where: slice

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{joint}" for joint in self.joints)

    @property
    def is_gripper(self) -> bool:
        return self.name.startswith("gripper")


@dataclass(frozen=True)
class CameraNames:
    """What a camera is called elsewhere, and the size of its pictures."""

    sdk: str
    older: str
    topic: str
    height: int
    width: int


@dataclass(frozen=True)
class Hardware:
    """The robot file."""

    parts: tuple[Part, ...]
    # Names of parts in the order of the SDK's waypoints.
    waypoint: tuple[str, ...]
    # (open, closed) of the SDK, and of each unit.
    gripper: tuple[float, float]
    units: dict[str, tuple[float, float]]
    # (3,) how far the chassis may be sent from its start (m, m, rad), and how fast (per second).
    chassis_reach: tuple[float, float, float]
    chassis_speed: tuple[float, float, float]
    # {part: values in the SDK's unit}
    ready_pose: dict[str, list[float]] | None
    rest_pose: dict[str, list[float]] | None
    cameras: dict[str, CameraNames]

    @property
    def size(self) -> int:
        return self.parts[-1].where.stop

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    @property
    def is_gripper(self) -> np.ndarray:
        """(size,) bool."""
        return np.array([part.is_gripper for part in self.parts for _ in part.joints])

    def part(self, name: str) -> Part:
        found = next((part for part in self.parts if part.name == name), None)
        if found is None:
            raise EnvError(
                f"{name!r} is no part of this robot; it has {', '.join(p.name for p in self.parts)}"
            )
        return found

    def to_waypoint(self, vector: np.ndarray, chassis: bool = False) -> list[list[float]]:
        """The robot's vector as one of the SDK's waypoints: a list for each part, in the SDK's waypoint order."""
        names = [name for name in self.waypoint if chassis or name != CHASSIS]
        return [_sized(vector, self.size)[self.part(name).where].tolist() for name in names]

    def from_waypoint(self, waypoint: Sequence[Sequence[float]], pose: np.ndarray) -> np.ndarray:
        """The way back; what the waypoint lacks (the chassis) is taken from `pose`."""
        vector = np.array(_sized(pose, self.size))
        for name, values in zip(self.waypoint, waypoint, strict=False):
            part = self.part(name)
            if len(values) != len(part.joints):
                raise EnvError(f"{len(values)} values for {name}; {len(part.joints)} were expected")
            vector[part.where] = values
        return vector


class Layout:
    """The values of one policy, in its order and unit."""

    def __init__(self, hardware: Hardware, names: Sequence[str], unit: str = "rad") -> None:
        """Raises `EnvError` for a joint or a unit that the robot file does not know, or a joint that comes twice."""
        self.hardware, self.names, self.unit = hardware, tuple(names), unit
        if unit not in hardware.units:
            raise EnvError(f"the unit {unit!r}; the robot file knows {', '.join(hardware.units)}")
        known = {name: index for index, name in enumerate(hardware.joint_names)}
        strangers = [name for name in names if name not in known]
        if strangers:
            raise EnvError(
                f"the layout names {', '.join(strangers[:4])}, which this robot lacks; it has {', '.join(known)}"
            )
        if len(set(names)) != len(names):
            raise EnvError("the layout names a joint twice")
        # (A,) where each value lies in the robot's vector.
        self.index = np.array([known[name] for name in names], int)
        self.is_gripper = hardware.is_gripper[self.index]
        self._open, self._closed = hardware.units[unit]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def gripper_percent(self) -> float:
        """How much of this unit one percent of a gripper's travel is."""
        return abs(self._closed - self._open) / 100.0

    def to_robot(self, values: Any, pose: np.ndarray) -> np.ndarray:
        """The (A,) values as the robot's vector; joints that the layout does not name are those of `pose`.

        Grippers are cut to the SDK's range.
        """
        values = _sized(values, len(self), f"an action ({', '.join(self.parts)})")
        vector = np.array(_sized(pose, self.hardware.size))
        vector[self.index] = np.where(self.is_gripper, self._gripper_to_sdk(values), values)
        return vector

    def from_robot(self, vector: np.ndarray) -> np.ndarray:
        """The (A,) values of the robot's vector."""
        return self.convert(_sized(vector, self.hardware.size), self.index)

    def convert(self, vector: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The values of the robot's vector at `index`, in this unit."""
        values = vector[index]
        low, high = self.hardware.gripper
        share = (values - low) / (high - low)
        return np.where(
            self.hardware.is_gripper[index], self._open + share * (self._closed - self._open), values
        )

    def state_parts(self) -> dict[str, np.ndarray]:
        """{part: where its values lie in the robot's vector}: all parts, the layout's own first and in its order,
        their joints in the layout's order too."""
        result: dict[str, np.ndarray] = {}
        for name in [*self.parts, *(part.name for part in self.hardware.parts)]:
            if name not in result:
                where = self.hardware.part(name).where
                inside = range(where.start, where.stop)
                mine = [int(i) for i in self.index if i in inside]
                result[name] = np.array(mine + [i for i in inside if i not in mine], int)
        return result

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have a joint in the layout, in its order."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.names))

    def _gripper_to_sdk(self, values: np.ndarray) -> np.ndarray:
        low, high = self.hardware.gripper
        share = (values - self._open) / (self._closed - self._open)
        return np.clip(low + share * (high - low), min(low, high), max(low, high))


def _sized(values: Any, size: int, what: str = "the robot's pose") -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape != (size,):
        came = f"{array.size} values" if array.ndim == 1 else f"shape {array.shape}"
        raise EnvError(f"{what} has {size} values; {came} came")
    return array


class ChassisFrame:
    """The robot's vector with the chassis seen from where it stood: a policy never saw the frame in which the SDK
    measures it (x, y, theta from where the robot was switched on)."""

    def __init__(self, where: slice, start: np.ndarray) -> None:
        """`where` the chassis lies in the vector; `start`: the robot's vector at the start."""
        self.start = start
        self._where = where
        self._x, self._y, self._theta = start[where]
        self._cos, self._sin = math.cos(self._theta), math.sin(self._theta)

    def relative(self, vector: np.ndarray) -> np.ndarray:
        """The vector with its chassis in this frame, the angle in (-pi, pi]."""
        x, y, theta = vector[self._where]
        dx, dy, turn = x - self._x, y - self._y, theta - self._theta
        result = vector.copy()
        result[self._where] = (
            self._cos * dx + self._sin * dy,
            self._cos * dy - self._sin * dx,
            math.atan2(math.sin(turn), math.cos(turn)),
        )
        return result

    def absolute(self, vector: np.ndarray) -> np.ndarray:
        """The way back."""
        dx, dy, turn = vector[self._where]
        result = vector.copy()
        result[self._where] = (
            self._x + self._cos * dx - self._sin * dy,
            self._y + self._sin * dx + self._cos * dy,
            self._theta + turn,
        )
        return result


def make_spec(
    layout: Layout, limits: tuple[np.ndarray, np.ndarray, np.ndarray], cameras: tuple[str, ...]
) -> EnvSpec:
    """What the control loop knows of an S1 with this layout.

    `limits`: lowest and highest position and largest speed of the robot's vector, as the SDK tells them; for the
    chassis those of the robot file count. For every value that is no gripper one of its units counts as a radian:
    of the chassis that is a metre.
    """
    hardware = layout.hardware
    lower, upper, speed = (limit.copy() for limit in limits)
    chassis = hardware.part(CHASSIS).where
    reach = np.array(hardware.chassis_reach)
    lower[chassis], upper[chassis], speed[chassis] = -reach, reach, hardware.chassis_speed
    ends = [layout.from_robot(limit) for limit in (lower, upper)]
    scale = np.where(layout.is_gripper, layout.gripper_percent, 1.0)
    parts = layout.state_parts()
    positions = np.concatenate(list(parts.values()))
    return EnvSpec(
        type="astribot",
        action_names=layout.names,
        unit=layout.unit,
        lower=np.minimum(*ends),
        upper=np.maximum(*ends),
        unit_per_rad=scale,
        gripper=layout.is_gripper,
        state_index=np.array([int(np.flatnonzero(positions == index)[0]) for index in layout.index]),
        states=tuple(StateSpec(name, len(index)) for name, index in parts.items()),
        cameras=cameras,
        speed=speed[layout.index] * scale,
    )


# -------------------------------------------------------------------------------------------------- files


def layout_names(layout: str) -> tuple[str, ...]:
    """The action names of an embodiment file. Raises `EnvError`."""
    name = f"embodiments/{layout}" if Path(layout).suffix == "" else layout
    try:
        file = find_config_file(name)
        names = load_yaml(file)["action_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("action_names is no list of names")
        return tuple(names)
    except CliError as error:
        raise EnvError(f"{error}; --env.layout names another one") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EnvError(
            f"the layout {layout} cannot be used ({error!r}); a list action_names was expected"
        ) from error


def read_hardware(path: Path) -> Hardware:
    """The robot file. Raises `EnvError` with what is wrong in it."""
    try:
        return _hardware(load_yaml(path))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise EnvError(
            f"the robot file {path} cannot be used ({' '.join(repr(error).split())}); parts, waypoint, gripper, units, "
            "chassis, ready_pose, rest_pose and cameras were expected, as in configs/robots/astribot_s1.yaml"
        ) from error


def _hardware(content: dict[str, Any]) -> Hardware:
    parts, begin = [], 0
    for name, fields in content["parts"].items():
        joints = tuple(str(joint) for joint in fields["joints"])
        parts.append(Part(str(name), str(fields["sdk"]), joints, slice(begin, begin + len(joints))))
        begin += len(joints)
    poses = {name: content.get(name) for name in ("ready_pose", "rest_pose")}
    sizes = {part.name: len(part.joints) for part in parts}
    for pose in (pose for pose in poses.values() if pose is not None):
        for name, values in pose.items():
            if sizes.get(name) != len(values):
                raise ValueError(
                    f"a pose has {len(values)} values for {name}; {sizes.get(name)} were expected"
                )
    if set(content["waypoint"]) != set(sizes):
        raise ValueError(f"waypoint names {content['waypoint']}; each of {list(sizes)} was expected once")
    units = {name: (float(unit["open"]), float(unit["closed"])) for name, unit in content["units"].items()}
    if any(opened == closed for opened, closed in units.values()):
        raise ValueError("an open gripper and a closed one have the same value")
    return Hardware(
        parts=tuple(parts),
        waypoint=tuple(content["waypoint"]),
        gripper=(float(content["gripper"]["open"]), float(content["gripper"]["closed"])),
        units=units,
        chassis_reach=_three(content["chassis"]["reach"]),
        chassis_speed=_three(content["chassis"]["speed"]),
        ready_pose=poses["ready_pose"],
        rest_pose=poses["rest_pose"],
        cameras={name: CameraNames(**fields) for name, fields in content["cameras"].items()},
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, theta = (float(value) for value in values)
    if min(x, y, theta) <= 0:
        raise ValueError(f"{list(values)} for the chassis; three numbers above 0 were expected")
    return x, y, theta
