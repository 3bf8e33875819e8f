"""An SO-101 without hardware and without physics: the real servo bus and control socket on first-order servos.

`kinematic_robot.py FOLDER` runs it as a process: ports, calibration, cameras.json and the servos' log lie in FOLDER; the
line that it prints names the control port.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from virtual_so101.calibration import ArmCalibration, arm_ids
from virtual_so101.control import ControlServer
from virtual_so101.twin import Twin

LOWER = np.array([-1.91986, -1.74533, -1.69, -1.65806, -2.74385, -0.174533])
UPPER = np.array([1.91986, 1.74533, 1.69, 1.65806, 2.84121, 1.74533])
CAMERAS = {1: ("front", "wrist"), 2: ("front", "left_wrist", "right_wrist")}
# rad/s: no-load speed of the servo; seconds: how fast it closes in on its goal.
SPEED = 4.7
LAG = 0.03


class KinematicWorld:
    """What `Twin` drives: servos that follow their goals, and pictures that show the joints as bars."""

    timestep = 0.002

    def __init__(self, arms: int = 1, size: tuple[int, int] = (480, 640), *, noise: bool = False) -> None:
        self.n_arms = arms
        self.size = size
        # No two pictures are the same, as with a real camera: small ones show no small motion otherwise.
        self._noise = np.random.default_rng(0) if noise else None
        self.camera_names = CAMERAS[arms]
        self.joint_lower, self.joint_upper = LOWER, UPPER
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        self.seed = seed
        self.time = 0.0
        self._q = [(LOWER + UPPER) / 2.0 for _ in range(self.n_arms)]
        self._v = [np.zeros(6) for _ in range(self.n_arms)]
        self._goal = [q.copy() for q in self._q]
        self._on = [np.ones(6, bool) for _ in range(self.n_arms)]

    def set_goal(self, arm: int, positions: np.ndarray) -> None:
        self._goal[arm] = np.clip(positions, LOWER, UPPER)

    def set_torque(self, arm: int, enabled: np.ndarray) -> None:
        self._on[arm] = np.array(enabled)

    def positions(self, arm: int) -> np.ndarray:
        return self._q[arm].copy()

    def velocities(self, arm: int) -> np.ndarray:
        return self._v[arm].copy()

    def loads(self, arm: int) -> np.ndarray:
        return np.clip((self._goal[arm] - self._q[arm]) * self._on[arm], -1.0, 1.0)

    def step(self, dt: float) -> None:
        for _ in range(round(dt / self.timestep)):
            for arm in range(self.n_arms):
                wanted = (self._goal[arm] - self._q[arm]) / LAG
                self._v[arm] = np.clip(wanted, -SPEED, SPEED) * self._on[arm]
                self._q[arm] = self._q[arm] + self._v[arm] * self.timestep
            self.time += self.timestep

    def render(self, camera: str) -> np.ndarray:
        height, width = self.size
        image = np.zeros((height, width, 3), np.uint8)
        bar = height // 12
        # A red picture in front, green ones at the wrists: swapped channels or cameras would show.
        image[:, :, 0 if camera == "front" else 1] = 120
        for row, q in enumerate(np.concatenate(self._q)):
            column = int(np.clip((q + 3.0) / 6.0, 0, 1) * (width - bar - 1))
            image[row * bar : row * bar + bar, column : column + bar] = 255
        if self._noise is not None:
            image[-8:] = self._noise.integers(0, 256, (8, width, 3), np.uint8)
        return image

    def success(self) -> bool:
        return bool(self._q[0][0] > 1.0)

    def close(self) -> None:
        pass


# What `record_stop` was called with.
STOPS: list[dict[str, Any]] = []


def record_stop(**arguments: Any) -> str:
    """A stop function for a supervisor under test."""
    STOPS.append(arguments)
    return "recorded"


class PoseServer(ControlServer):
    """The control socket with one op more: where the joints really are."""

    def _op_pose(self, arm: int = 0) -> dict[str, Any]:
        return {"ticks": calibration(arm).to_ticks(self._twin.world.positions(arm)).tolist()}


def calibration(arm: int = 0) -> ArmCalibration:
    """The calibration of an arm of `KinematicWorld`."""
    return ArmCalibration.of_limits(LOWER, UPPER, arm)


def until(condition: Callable[[], Any], limit: float = 5.0, every: float = 0.02) -> bool:
    """Whether `condition` becomes true within `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return bool(condition())


def main(
    folder: Path,
    arms: int = 1,
    log: str = "servos.jsonl",
    camera_port: int = 0,
    size: tuple[int, int] = (480, 640),
    *,
    noise: bool = False,
) -> None:
    links = [folder / f"port{arm}" for arm in range(arms)]
    world = KinematicWorld(arms, size, noise=noise)
    twin = Twin(world, links, camera_port=camera_port, log_path=folder / log, bus_process=True)
    for chain, name in zip(twin.chains, arm_ids("virtual", arms), strict=True):
        chain.calibration.save(folder / "calibration" / f"{name}.json")
    ended = threading.Event()
    server = PoseServer(stop=ended.set)
    twin.start()
    server.start(twin)
    assert twin.cameras is not None
    sizes = {"height": size[0], "width": size[1]}
    cameras = {name: camera | sizes for name, camera in twin.cameras.config.items()}
    (folder / "cameras.json").write_text(json.dumps(cameras))
    print(json.dumps({"control_port": server.port}), flush=True)
    # Ends with the test: its end of the pipe closes then.
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    ended.wait()
    server.close()
    twin.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", type=int, default=1)
    parser.add_argument("--log", default="servos.jsonl")
    parser.add_argument("--camera-port", type=int, default=0, help="the first camera's; 0: any")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="rows and columns of a picture")
    parser.add_argument("--noise", action="store_true", help="no two pictures are the same")
    options = parser.parse_args()
    size = tuple(options.size)
    main(options.folder, options.arms, options.log, options.camera_port, size, noise=options.noise)
