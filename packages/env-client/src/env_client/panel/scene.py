"""The arm in 3D: where it is, where the policy wants it to go, and the pose at the end of the newest chunk.

viser draws, in a thread of its own and on a loopback port of its own. It holds nothing that steers the robot. Each
browser gets the newest pose; viser keeps one value for each thing in the scene.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings

import numpy as np

from env_client.panel.robot import RobotModel, load_urdf

__all__ = ["Scene"]

# The arm is drawn this often at most, seconds.
_EVERY = 1 / 20
_GHOST = (0.18, 0.45, 0.95, 0.28)
_NEAR, _FAR = np.array([20, 90, 230]), np.array([170, 205, 255])


class Scene:
    """One robot. `draw` and `draw_chunk` may be called at the loop's rate from one thread; `close` ends viser."""

    def __init__(self, model: RobotModel) -> None:
        import viser
        from viser.extras import ViserUrdf

        self.model = model
        self._drawn = 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            self._server = viser.ViserServer("127.0.0.1", 0, verbose=False)
        server = self._server
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            server.gui.configure_theme(show_logo=False, show_share_button=False)
        server.gui.main_panel.minimize()
        server.scene.set_up_direction("+z")
        server.scene.add_grid(
            "/table", 1.6, 1.6, cell_size=0.05, section_size=0.2, cell_color=(225, 225, 230)
        )
        # From the side for one arm, from the front for two, with the work in the middle.
        side = -0.38 if len(model.arms) == 1 else 0.0
        server.initial_camera.position = (0.5 if side else 0.8, side, 0.34)
        server.initial_camera.look_at = (0.14, 0.0, 0.12)
        self._robots, self._ghosts = [], []
        for arm in model.arms:
            base = server.scene.add_frame(f"/{arm.name}", show_axes=False, position=arm.base)
            self._robots.append(ViserUrdf(server, load_urdf(model.path), root_node_name=base.name))
            ghost = server.scene.add_frame(f"/wanted/{arm.name}", show_axes=False, position=arm.base)
            self._ghosts.append(
                ViserUrdf(
                    server, load_urdf(model.path), root_node_name=ghost.name, mesh_color_override=_GHOST
                )
            )
        self.draw_chunk(None)

    @property
    def port(self) -> int:
        return self._server.get_port()

    @property
    def watched(self) -> bool:
        return bool(self._server.get_clients())

    def draw(self, measured: np.ndarray) -> None:
        """The arm at (A,) measured values."""
        now = time.monotonic()
        if now - self._drawn < _EVERY or not self.watched:
            return
        self._drawn = now
        with self._server.atomic():
            for arm, robot in zip(self.model.arms, self._robots, strict=True):
                robot.update_cfg(self.model.angles(arm, measured))

    def draw_chunk(self, chunk: np.ndarray | None) -> None:
        """The way and the last pose of an (H, A) chunk; None removes them."""
        if chunk is not None and not self.watched:
            return
        with self._server.atomic():
            for arm, ghost in zip(self.model.arms, self._ghosts, strict=True):
                ghost.show_visual = chunk is not None
                name = f"/way/{arm.name}"
                if chunk is None or len(chunk) < 2:
                    self._server.scene.remove_by_name(name)
                    continue
                ghost.update_cfg(self.model.angles(arm, chunk[-1]))
                points = self.model.path_of(arm, chunk)
                fade = np.linspace(0.0, 1.0, len(points) - 1)[:, None, None]
                colors = np.broadcast_to(_NEAR + fade * (_FAR - _NEAR), (len(points) - 1, 2, 3))
                self._server.scene.add_line_segments(
                    name,
                    np.stack([points[:-1], points[1:]], axis=1),
                    colors.astype(np.uint8),
                    thickness=0.006,
                )

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.stop()
