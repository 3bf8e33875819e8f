"""What the bus tests share: a kinematic stand-in for the physics, and a virtual robot on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_so101.calibration import JOINTS, arm_ids
from virtual_so101.twin import Twin

LIMITS_LOWER = np.array([-1.91986, -1.74533, -1.69, -1.65806, -2.74385, -0.174533])
LIMITS_UPPER = np.array([1.91986, 1.74533, 1.69, 1.65806, 2.84121, 1.74533])
# rad/s: no-load speed of the servo; seconds: how fast it closes in on its goal.
SPEED_CAP = 4.7
TIME_CONSTANT = 0.03
CAMERAS = {1: ("front", "wrist"), 2: ("front", "left_wrist", "right_wrist")}


class KinematicWorld:
    """First-order servos with a speed cap, no masses, and pictures that show the first joint as a bright bar."""

    def __init__(self, arms: int = 1) -> None:
        self.n_arms = arms
        self.camera_names = CAMERAS[arms]
        self.joint_lower, self.joint_upper = LIMITS_LOWER, LIMITS_UPPER
        self.timestep = 0.002
        self.time = 0.0
        self.seed: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._q = [(LIMITS_LOWER + LIMITS_UPPER) / 2.0 for _ in range(self.n_arms)]
        self._v = [np.zeros(6) for _ in range(self.n_arms)]
        self._goal = [q.copy() for q in self._q]
        self._torque = [np.ones(6, dtype=bool) for _ in range(self.n_arms)]

    def reset(self, seed: int | None = None) -> None:
        self.seed = seed
        self.time = 0.0
        self._reset()

    def set_goal(self, arm: int, positions: np.ndarray) -> None:
        self._goal[arm] = np.clip(positions, LIMITS_LOWER, LIMITS_UPPER)

    def set_torque(self, arm: int, enabled: np.ndarray) -> None:
        self._torque[arm] = np.array(enabled)

    def positions(self, arm: int) -> np.ndarray:
        return self._q[arm].copy()

    def velocities(self, arm: int) -> np.ndarray:
        return self._v[arm].copy()

    def loads(self, arm: int) -> np.ndarray:
        return np.clip((self._goal[arm] - self._q[arm]) * self._torque[arm], -1.0, 1.0)

    def step(self, dt: float) -> None:
        for _ in range(round(dt / self.timestep)):
            for arm in range(self.n_arms):
                wanted = (self._goal[arm] - self._q[arm]) / TIME_CONSTANT
                self._v[arm] = np.clip(wanted, -SPEED_CAP, SPEED_CAP) * self._torque[arm]
                self._q[arm] = self._q[arm] + self._v[arm] * self.timestep
            self.time += self.timestep

    def render(self, camera: str) -> np.ndarray:
        image = np.zeros((480, 640, 3), dtype=np.uint8)
        # Red picture for the front camera, green for the others, so that swapped channels or cameras show.
        image[:, :, 0 if camera == "front" else 1] = 200
        column = int(np.clip((self._q[0][0] + 2.0) / 4.0 * 600, 0, 599))
        image[:, column : column + 40] = 255
        return image

    def success(self) -> bool:
        return bool(self._q[0][0] > 1.0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def new_world() -> type[KinematicWorld]:
    """The stand-in world's class, for tests that make a twin of their own."""
    return KinematicWorld


@pytest.fixture
def make_twin(tmp_path: Path) -> Iterator[Callable[..., Twin]]:
    """Start a virtual robot on the stand-in world; calibration files lie in `tmp_path/calibration`."""
    twins: list[Twin] = []

    def make(arms: int = 1, **options: Any) -> Twin:
        links = [tmp_path / f"port{arm}" for arm in range(arms)]
        options.setdefault("camera_port", None)
        # As the command does: the driver gives up on an answer after 50 ms, and in one process with it the
        # servos would wait for its interpreter.
        options.setdefault("bus_process", True)
        twin = Twin(KinematicWorld(arms), links, **options)
        for chain, name in zip(twin.chains, arm_ids("virtual", arms), strict=True):
            chain.calibration.save(tmp_path / "calibration" / f"{name}.json")
        twin.start()
        twins.append(twin)
        return twin

    yield make
    for twin in twins:
        twin.close()


@pytest.fixture
def make_follower(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """LeRobot's unmodified `SO101Follower` for a twin's arm; not connected yet."""
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    followers: list[Any] = []

    def make(twin: Twin, **options: Any) -> Any:
        options.setdefault("id", "virtual")
        options.setdefault("use_degrees", False)
        config = SO101FollowerConfig(
            port=str(twin.buses[0].link), calibration_dir=tmp_path / "calibration", **options
        )
        followers.append(SO101Follower(config))
        return followers[-1]

    yield make
    for follower in followers:
        # A follower whose port was pulled cannot disconnect; its file handle is all that is left to close.
        try:
            follower.disconnect()
        except Exception:
            if follower.bus.port_handler.ser is not None:
                follower.bus.port_handler.ser.close()
            follower.bus.port_handler.is_open = False


@pytest.fixture(scope="session")
def connect() -> Callable[[Any], None]:
    """Connect a driver, which itself asks each servo only once: on shared cores an answer may come too late."""

    def make(driver: Any) -> None:
        for tries_left in range(9, -1, -1):
            try:
                driver.connect(calibrate=False)
                return
            except (ConnectionError, RuntimeError):
                if not tries_left:
                    raise
                time.sleep(0.3)
                bus = getattr(driver, "bus", None)
                for arm in [bus] if bus is not None else [driver.left_arm.bus, driver.right_arm.bus]:
                    if arm.port_handler.is_open:
                        arm.port_handler.closePort()
                    arm.port_handler.is_using = False
                for camera in driver.cameras.values() if hasattr(driver, "cameras") else ():
                    if camera.is_connected:
                        camera.disconnect()

    return make


@pytest.fixture
def pose() -> Callable[..., dict[str, float]]:
    """An action for the driver: the same normalised value for each body joint, 50 for the gripper."""

    def make(value: float, gripper: float = 50.0) -> dict[str, float]:
        return {f"{name}.pos": gripper if name == "gripper" else value for name in JOINTS}

    return make
