"""A leader arm as an action source: the robot follows what a person does with it, through the same safety filter.

    LeaderArms(config, unit).connect(), then ControlLoop(env, LeaderSource(arms), safety, fps).run_episode(...)

A thread of its own reads the leaders, so that a leader that is unplugged holds the robot instead of its loop.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from env_client.client_config import LeaderConfig
from env_client.control import Origin, SourceStats
from env_client.envs.env import EnvError, Observation
from env_client.envs.so101_arm import JOINTS
from env_client.envs.so101_bus import let_go, lives_on

__all__ = ["LeaderArms", "LeaderSource"]

logger = logging.getLogger(__name__)

# How often the leaders are read, Hz.
_RATE = 60.0
# Older readings move nothing, seconds.
_FRESH = 0.2


class LeaderArms:
    """One leader or two (left first), through LeRobot's SO101Leader. `connect`, `read`, `close`."""

    def __init__(self, config: LeaderConfig, *, use_degrees: bool) -> None:
        self._config = config
        self._use_degrees = use_degrees
        self._arms: list[Any] = []

    def connect(self) -> None:
        """Open the arms, limp, their calibration checked. Raises `EnvError`."""
        from lerobot.teleoperators.so_leader import SO101Leader, SO101LeaderConfig

        lives_on()
        folder = self._config.calibration_dir
        names = (
            [self._config.id] if self._config.port else [f"{self._config.id}_{s}" for s in ("left", "right")]
        )
        for name, port in zip(names, self._config.ports, strict=True):
            if not Path(port).exists():
                raise EnvError(f"the port {port} of the leader arm {name} does not exist; is it plugged in?")
            arm = SO101Leader(
                SO101LeaderConfig(
                    port=port,
                    id=name,
                    calibration_dir=Path(folder) if folder else None,
                    use_degrees=self._use_degrees,
                )
            )
            if not arm.calibration:
                raise EnvError(
                    f"the leader arm {name} has no calibration file {arm.calibration_fpath}; run lerobot-calibrate "
                    "--teleop.type so101_leader, or give --leader.id and --leader.calibration-dir"
                )
            try:
                arm.bus.connect()
                calibrated = bool(arm.is_calibrated)
                if calibrated:
                    arm.configure()
            except Exception as error:
                let_go(arm)
                raise EnvError(
                    f"the leader arm {name} cannot be reached: {' '.join(str(error).split())}"
                ) from error
            if not calibrated:
                let_go(arm)
                raise EnvError(
                    f"the calibration in the leader arm {name} is not that of {arm.calibration_fpath}"
                )
            self._arms.append(arm)

    def read(self) -> np.ndarray:
        """(6,) or (12,) positions in the robot's unit. Raises what the driver raises."""
        values: list[float] = []
        for arm in self._arms:
            seen = arm.get_action()
            values += [seen[f"{joint}.pos"] for joint in JOINTS]
        return np.array(values, np.float32)

    def close(self) -> None:
        for arm in self._arms:
            let_go(arm)
        self._arms = []


class LeaderSource:
    """An `ActionSource`: the newest pose of the leaders, or None while there is no fresh one."""

    def __init__(self, arms: LeaderArms) -> None:
        self.prompt: str | None = None
        self._arms = arms
        self._stats = SourceStats()
        self._newest: tuple[float, np.ndarray] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)
        self._thread.start()

    @property
    def origin(self) -> Origin | None:
        return None

    @property
    def stats(self) -> SourceStats:
        return self._stats

    def next_action(self, observation: Observation, tick: int) -> np.ndarray | None:
        newest = self._newest
        if newest is None or time.monotonic() - newest[0] > _FRESH:
            self._stats.starved += 1
            return None
        self._stats.consumed += 1
        return newest[1]

    def reset(self, episode: int) -> None:
        self._newest = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        said = False
        while not self._closed.wait(1 / _RATE):
            try:
                self._newest = (time.monotonic(), self._arms.read())
                said = False
            except Exception as error:  # the driver raises anything; the robot holds meanwhile
                if not said:
                    logger.warning("the leader arm cannot be read (%s): the robot holds its pose", error)
                said = True
                time.sleep(0.2)
