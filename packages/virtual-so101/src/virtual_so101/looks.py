"""Domain randomisation of what the cameras see: light, tints, and cameras that sit a little off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from virtual_so101.scene import Layout, look_at

__all__ = ["Looks"]


@dataclass(frozen=True)
class Looks:
    """The nominal look of a compiled scene, from which every reset starts again."""

    layout: Layout
    geom_rgba: np.ndarray
    cam_pos: np.ndarray
    cam_quat: np.ndarray

    @classmethod
    def of(cls, model: mujoco.MjModel, layout: Layout) -> Looks:
        """Remember the look that a model was compiled with."""
        return cls(layout, model.geom_rgba.copy(), model.cam_pos.copy(), model.cam_quat.copy())

    def apply(self, model: mujoco.MjModel, rng: np.random.Generator | None) -> None:
        """Set the look of one episode in the model; without a generator the nominal one."""
        model.geom_rgba[:] = self.geom_rgba
        model.cam_pos[:] = self.cam_pos
        model.cam_quat[:] = self.cam_quat
        headlight = model.vis.headlight
        headlight.ambient[:], headlight.diffuse[:], headlight.specular[:] = 0.34, 0.30, 0.0
        model.light_diffuse[0], model.light_specular[0] = 0.45, 0.12
        model.light_dir[0] = _unit(np.array([-0.3, -0.35, -1.0]))
        if rng is None:
            return
        headlight.ambient[:] = rng.uniform(0.29, 0.39)
        warmth = rng.uniform(-0.03, 0.03)
        model.light_diffuse[0] = rng.uniform(0.37, 0.53) + np.array([warmth, 0.0, -warmth])
        model.light_dir[0] = _unit(np.array([rng.uniform(-0.6, 0.1), rng.uniform(-0.6, 0.6), -1.0]))
        tinted = [
            "table",
            *(mat.name for mat in self.layout.mats),
            *(cube.name for cube in self.layout.cubes),
        ]
        for name in tinted:
            rgb = model.geom(name).rgba[:3]
            model.geom(name).rgba[:3] = np.clip(
                rgb * rng.uniform(0.88, 1.12) + rng.uniform(-0.03, 0.03, 3), 0, 1
            )
        eye = np.array(self.layout.front_eye) + rng.uniform(-0.01, 0.01, 3)
        target = np.array(self.layout.front_target) + rng.uniform(-0.008, 0.008, 3)
        front = model.camera("front").id
        model.cam_pos[front], model.cam_quat[front] = eye, look_at(eye, target)
        for camera in range(model.ncam):
            if camera != front:
                model.cam_pos[camera] += rng.uniform(-0.0015, 0.0015, 3)
                _turn(model.cam_quat[camera], rng.uniform(-0.015, 0.015, 3))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _turn(quat: np.ndarray, rotation: np.ndarray) -> None:
    """Turn a quaternion in place by a rotation vector (rad) in its own frame."""
    angle = math.sqrt(float(rotation @ rotation))
    mujoco.mju_quatIntegrate(quat, _unit(rotation), angle)
