"""A virtual SO-101 for the client's tests: the servo bus of `virtual_so101` on a world without physics.

The world is fast (no MuJoCo, no GPU), the bus and LeRobot's driver are the real ones. `make_twin` runs it in
this process; `kinematic_robot.py` beside this file is the same as a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from env_client.envs.robots import BiSO101Config, BiSO101RobotConfig, SO101Config, SO101RobotConfig
from env_client.envs.so101 import SO101Env, make_so101
from env_client.envs.so101_arm import ArmConfig
from robot_fixtures import *  # noqa: F403
from virtual_so101.calibration import arm_ids
from virtual_so101.twin import Twin

sys.path.insert(0, str(Path(__file__).parent))
from kinematic_robot import KinematicWorld


@pytest.fixture
def make_twin(tmp_path: Path) -> Iterator[Callable[..., Twin]]:
    """Start a virtual robot; its calibration files lie in `tmp_path/calibration`, its cameras in cameras.json."""
    twins: list[Twin] = []

    def make(arms: int = 1, **options: Any) -> Twin:
        options.setdefault("camera_port", None)
        twin = Twin(KinematicWorld(arms), [tmp_path / f"port{arm}" for arm in range(arms)], **options)
        for chain, name in zip(twin.chains, arm_ids("virtual", arms), strict=True):
            chain.calibration.save(tmp_path / "calibration" / f"{name}.json")
        twin.start()
        twins.append(twin)
        if twin.cameras is not None:
            (tmp_path / "cameras.json").write_text(json.dumps(twin.cameras.config))
        return twin

    yield make
    for twin in twins:
        twin.close()


@pytest.fixture
def make_env(tmp_path: Path) -> Iterator[Callable[..., SO101Env]]:
    """An env for the twin with the same number of arms; not connected yet."""
    envs: list[SO101Env] = []

    def make(arms: int = 1, *, dry_run: bool = False, cameras: bool = False, **options: Any) -> SO101Env:
        common = {
            "calibration_dir": str(tmp_path / "calibration"),
            "id": options.pop("id", "virtual"),
        }
        if cameras:
            options["camera_config_path"] = str(tmp_path / "cameras.json")
        config: SO101Config | BiSO101Config
        if arms == 1:
            port = options.pop("port", str(tmp_path / "port0"))
            config = SO101Config(robot=SO101RobotConfig(port=port, **common), **options)
        else:
            sides = [ArmConfig(port=str(tmp_path / f"port{arm}")) for arm in range(2)]
            config = BiSO101Config(robot=BiSO101RobotConfig(*sides, **common), **options)
        envs.append(make_so101(config, dry_run=dry_run))
        return envs[-1]

    yield make
    for env in envs:
        env.close()
