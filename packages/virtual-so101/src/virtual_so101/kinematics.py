"""Where the gripper is for given joint angles, and the joint angles that bring it somewhere.

An SO-101 has five joints before the jaw, so its gripper can be put at a point (3), with its jaws opening in a
wanted direction (1) and tilted by a wanted angle within the vertical plane of the arm (1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from virtual_so101.calibration import JOINTS

__all__ = ["ArmKinematics", "GraspPose", "UnreachableError"]

# Metres that a radian of wrong orientation weighs as much as, in the least-squares step.
_ROTATION_WEIGHT = 0.1
_DAMPING, _MAX_STEP, _MAX_ITERATIONS = 1e-6, 0.3, 80
# What counts as reached: metres, rad.
_POSITION_TOLERANCE, _ROTATION_TOLERANCE = 5e-4, 0.02


class UnreachableError(ValueError):
    """No joint angles within the limits bring the gripper to the pose; the message says which pose."""


@dataclass(frozen=True)
class GraspPose:
    """A pose of the gripper in the world: the point between its jaws and how it is turned."""

    # Metres.
    point: np.ndarray
    # Direction in which the moving jaw opens, as an angle around the vertical, rad.
    yaw: float
    # How far the fingers lean outwards from straight down, rad.
    tilt: float = 0.0


class ArmKinematics:
    """One arm of a compiled scene; works on its own copy of the state and never on the world's."""

    def __init__(self, model: mujoco.MjModel, prefix: str) -> None:
        self._model, self._data = model, mujoco.MjData(model)
        joints = [model.joint(prefix + name).id for name in JOINTS[:5]]
        self._qpos, self._dof = model.jnt_qposadr[joints], model.jnt_dofadr[joints]
        self._lower, self._upper = model.jnt_range[joints].T.copy()
        self._gripper = model.body(prefix + "gripper").id
        self._base = model.body(prefix + "base").id
        mujoco.mj_kinematics(model, self._data)
        # The pan joint turns clockwise seen from above: heading = yaw of the base - pan.
        x_axis = self._data.xmat[self._base].reshape(3, 3)[:, 0]
        self._base_yaw = math.atan2(x_axis[1], x_axis[0])
        # Where the pan axis stands, metres.
        self.pan_axis = self._data.xanchor[joints[0]][:2].copy()

    def forward(self, angles: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World position (3,) of a point fixed in the gripper at `offset` (metres), and the gripper's (3, 3)."""
        self._data.qpos[self._qpos] = angles[:5]
        mujoco.mj_kinematics(self._model, self._data)
        rotation = self._data.xmat[self._gripper].reshape(3, 3).copy()
        return self._data.xpos[self._gripper] + rotation @ offset, rotation

    def solve(self, pose: GraspPose, offset: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Joint angles (5,) rad that put the gripper's point `offset` at the pose, near `start`.

        Damped least squares (Wampler, 1986) on the position and the orientation error.

        Raises:
            UnreachableError: when the pose is out of reach or beyond a joint limit.
        """
        angles = np.array(start[:5], dtype=float)
        jacobian_p, jacobian_r = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        for _ in range(_MAX_ITERATIONS):
            position, rotation = self.forward(angles, offset)
            wanted = self._orientation(pose, heading=self._base_yaw - angles[0])
            turn = 0.5 * np.cross(rotation.T, wanted.T).sum(axis=0)
            missing = pose.point - position
            if np.linalg.norm(missing) < 1e-5 and np.linalg.norm(turn) < 1e-4:
                break
            mujoco.mj_comPos(self._model, self._data)
            mujoco.mj_jac(self._model, self._data, jacobian_p, jacobian_r, position, self._gripper)
            jacobian = np.vstack([jacobian_p, _ROTATION_WEIGHT * jacobian_r])[:, self._dof]
            error = np.concatenate([missing, _ROTATION_WEIGHT * turn])
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING * np.eye(6), error)
            angles = np.clip(angles + np.clip(step, -_MAX_STEP, _MAX_STEP), self._lower, self._upper)
        if np.linalg.norm(missing) > _POSITION_TOLERANCE or np.linalg.norm(turn) > _ROTATION_TOLERANCE:
            raise UnreachableError(
                f"The arm cannot bring its gripper to {np.round(pose.point, 3)} m with yaw {pose.yaw:.2f} and tilt "
                f"{pose.tilt:.2f} rad: {1000 * np.linalg.norm(missing):.1f} mm and {np.linalg.norm(turn):.3f} rad off."
            )
        return angles

    @staticmethod
    def _orientation(pose: GraspPose, heading: float) -> np.ndarray:
        """(3, 3) gripper frame: fingers along -z, moving jaw towards +x."""
        lean = math.sin(pose.tilt)
        up = np.array([-lean * math.cos(heading), -lean * math.sin(heading), math.cos(pose.tilt)])
        opening = np.array([math.cos(pose.yaw), math.sin(pose.yaw), 0.0])
        opening -= up * (up @ opening)
        opening /= np.linalg.norm(opening)
        return np.stack([opening, np.cross(up, opening), up], axis=1)
