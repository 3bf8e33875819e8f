"""A robot as the 3D view needs it: action values -> joint angles of its URDF -> where the fingertips are.

A gripper's percent are spread over the URDF's own range; every other value is converted as the safety filter does it, by
the robot's own scale around the joint's middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Arm", "RobotModel", "load_urdf"]

SO101 = Path(__file__).parent / "so101.urdf"
# Metres between the bases of two arms, which no URDF of one arm can know.
_APART = 0.4
_SIDES = ("left_", "right_")


def load_urdf(path: Path) -> Any:
    """The `yourdfpy.URDF` in a file. Raises `ValueError` with a sentence when it is none."""
    import yourdfpy

    try:
        return yourdfpy.URDF.load(str(path), load_meshes=True, build_scene_graph=True)
    except Exception as error:  # lxml's, trimesh's and yourdfpy's own
        raise ValueError(
            f"the URDF {path} cannot be used: {type(error).__name__}: {str(error)[:200]}"
        ) from error


@dataclass(frozen=True)
class Arm:
    """One copy of the URDF: its name in the scene, where it stands, and which action values move which joints."""

    name: str
    # (3,) metres
    base: np.ndarray
    # {index into the URDF's actuated joints: index into the action}
    values: dict[int, int]


class RobotModel:
    """The arms of a robot. Raises `ValueError` where the URDF names no joint of the action."""

    def __init__(
        self,
        action_names: Sequence[str],
        unit: str,
        unit_per_rad: np.ndarray,
        path: Path | None = None,
    ) -> None:
        """`unit_per_rad`: (A,) as in `EnvSpec`."""
        self.path = path or SO101
        self._urdf = load_urdf(self.path)
        self._joints = list(self._urdf.actuated_joint_names)
        limits = [joint.limit for joint in self._urdf.actuated_joints]
        self._lower = np.array([-np.pi if limit is None else limit.lower for limit in limits])
        self._upper = np.array([np.pi if limit is None else limit.upper for limit in limits])
        self._percent = unit != "rad"
        self._unit_per_rad = unit_per_rad
        self._base_link = self._urdf.base_link
        self._tip = "tcp" if "tcp" in self._urdf.link_map else list(self._urdf.link_map)[-1]
        self.arms = self._find_arms([name.removesuffix(".pos") for name in action_names])

    def _find_arms(self, names: list[str]) -> tuple[Arm, ...]:
        arms = []
        for side, prefix in enumerate(_SIDES):
            values = self._matches(names, prefix)
            if values:
                base = np.array([0.0, _APART * (0.5 - side), 0.0])
                arms.append(Arm(prefix.rstrip("_"), base, values))
        whole = self._matches(names, "")
        if not arms and whole:
            arms.append(Arm("arm", np.zeros(3), whole))
        if not arms:
            raise ValueError(
                f"none of the joints of {self.path.name} ({', '.join(self._joints[:8])}) is a value of the action "
                f"({', '.join(names[:8])}): give the robot's own --panel.urdf"
            )
        return tuple(arms)

    def _matches(self, names: list[str], prefix: str) -> dict[int, int]:
        return {
            joint: names.index(prefix + name)
            for joint, name in enumerate(self._joints)
            if prefix + name in names
        }

    def angles(self, arm: Arm, values: np.ndarray) -> np.ndarray:
        """(joints,) rad for (A,) action values in the robot's unit; values that are not finite become zero."""
        angles = np.zeros(len(self._joints))
        for joint, index in arm.values.items():
            value = float(np.nan_to_num(values[index]))
            if self._percent and "gripper" in self._joints[joint]:
                angles[joint] = self._lower[joint] + value / 100.0 * (self._upper[joint] - self._lower[joint])
            else:
                angles[joint] = value / self._unit_per_rad[index]
        return angles

    def path_of(self, arm: Arm, chunk: np.ndarray) -> np.ndarray:
        """(H, 3) metres: where the fingertips would be at each of (H, A) actions."""
        points = np.empty((len(chunk), 3))
        for row, values in enumerate(chunk):
            self._urdf.update_cfg(self.angles(arm, values))
            points[row] = self._urdf.get_transform(self._tip, self._base_link)[:3, 3]
        return points + arm.base
