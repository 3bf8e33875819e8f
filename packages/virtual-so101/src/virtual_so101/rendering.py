"""Off-screen drawing of a MuJoCo scene at 640x480, cheap enough for two cameras on less than one core."""

from __future__ import annotations

import contextlib
import weakref

import mujoco
import numpy as np

from virtual_so101.gl import PACKAGES, gl_backend
from virtual_so101.scene import HEIGHT, WIDTH

__all__ = ["RenderingUnavailableError", "SceneRenderer"]


class RenderingUnavailableError(RuntimeError):
    """This machine has no OpenGL that draws without a display; the message names the packages."""


class SceneRenderer:
    """Draws the cameras of one model, at 480x640 divided by `shrink`. Belongs to the thread that draws first."""

    def __init__(self, model: mujoco.MjModel, *, shrink: int = 1) -> None:
        self._model = model
        self._size = HEIGHT // shrink, WIDTH // shrink
        self._renderer: mujoco.Renderer | None = None
        self._closer: weakref.finalize | None = None
        self._copy: mujoco.MjData | None = None

    def _open(self) -> tuple[mujoco.Renderer, mujoco.MjData]:
        if self._renderer is None or self._copy is None:
            backend = gl_backend()
            if backend is None:
                raise RenderingUnavailableError(PACKAGES)
            try:
                self._renderer = mujoco.Renderer(self._model, *self._size)
            except Exception as error:
                # Each backend fails in its own way (ImportError, AttributeError, RuntimeError, its own EGLError).
                raise RenderingUnavailableError(f"{PACKAGES} MuJoCo said about {backend}: {error}") from error
            # Runs at the latest before the interpreter goes, when the OpenGL modules still exist.
            self._closer = weakref.finalize(self, _close, self._renderer)
            self._copy = mujoco.MjData(self._model)
        return self._renderer, self._copy

    def render(
        self, data: mujoco.MjData, camera: str, lock: contextlib.AbstractContextManager[object]
    ) -> np.ndarray:
        """Draw one camera of the state in `data`, which is read under `lock`: (H, W, 3) uint8 RGB."""
        renderer, copy = self._open()
        with lock:
            copy.qpos[:] = data.qpos
            mujoco.mj_kinematics(self._model, copy)
            mujoco.mj_comPos(self._model, copy)
            mujoco.mj_camlight(self._model, copy)
            renderer.update_scene(copy, camera=camera)
        # Shadows and reflections would draw the scene once more each: three times the processor time.
        flags = renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        flags[mujoco.mjtRndFlag.mjRND_HAZE] = 0
        return renderer.render()

    def close(self) -> None:
        """Free the OpenGL context; call it from the thread that draws."""
        self._renderer = None
        if self._closer is not None:
            self._closer()


def _close(renderer: mujoco.Renderer) -> None:
    # A context that another thread still holds cannot be freed from here; it goes with the process.
    with contextlib.suppress(Exception):
        renderer.close()
