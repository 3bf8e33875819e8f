"""An SO-101 without hardware and without physics: the real servo bus and control socket on first-order servos.

`kinematic_robot.py FOLDER [ARMS]` runs it as a process: ports, calibration, cameras.json and servos.jsonl lie in
FOLDER; the line that it prints names the control port.
"""

from __future__ import annotations

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

    def __init__(self, arms: int = 1) -> None:
        self.n_arms = arms
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
        image = np.zeros((480, 640, 3), np.uint8)
        # A red picture in front, green ones at the wrists: swapped channels or cameras would show.
        image[:, :, 0 if camera == "front" else 1] = 120
        for row, q in enumerate(np.concatenate(self._q)):
            column = int(np.clip((q + 3.0) / 6.0 * 600, 0, 599))
            image[row * 40 : row * 40 + 40, column : column + 40] = 255
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


def main(folder: Path, arms: int = 1) -> None:
    links = [folder / f"port{arm}" for arm in range(arms)]
    twin = Twin(
        KinematicWorld(arms), links, camera_port=0, log_path=folder / "servos.jsonl", bus_process=True
    )
    for chain, name in zip(twin.chains, arm_ids("virtual", arms), strict=True):
        chain.calibration.save(folder / "calibration" / f"{name}.json")
    ended = threading.Event()
    server = PoseServer(stop=ended.set)
    twin.start()
    server.start(twin)
    assert twin.cameras is not None
    (folder / "cameras.json").write_text(json.dumps(twin.cameras.config))
    print(json.dumps({"control_port": server.port}), flush=True)
    # Ends with the test: its end of the pipe closes then.
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    ended.wait()
    server.close()
    twin.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
