"""`--env.type lerobot`: any robot of LeRobot's, here the SO-101 under its own name."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_client.envs.env import EnvError
from env_client.envs.make import make_env
from env_client.envs.robots import LeRobotConfig
from env_client.wire import PolicySpec
from kinematic_robot import calibration, until

Make = Callable[..., Any]

FILE = """
unit: normalized
part: arm
joints:
  shoulder_pan.pos: {lower: -100, upper: 100, unit_per_rad: 52}
  shoulder_lift.pos: {lower: -100, upper: 100, unit_per_rad: 57}
  elbow_flex.pos: {lower: -100, upper: 100, unit_per_rad: 59}
  wrist_flex.pos: {lower: -100, upper: 100, unit_per_rad: 60}
  wrist_roll.pos: {lower: -100, upper: 100, unit_per_rad: 36}
  gripper.pos: {lower: 0, upper: 100, unit_per_rad: 1, gripper: true}
"""


def config(folder: Path, text: str = FILE, **fields: Any) -> LeRobotConfig:
    (folder / "robot.yaml").write_text(text)
    robot = {
        "type": "so101_follower",
        "port": str(folder / "port0"),
        "id": "virtual",
        "calibration_dir": str(folder / "calibration"),
        "use_degrees": False,
        "disable_torque_on_disconnect": True,
    }
    return LeRobotConfig(robot=robot | fields, robot_config_path=str(folder / "robot.yaml"))


def test_a_robot_of_lerobots(make_twin: Make, tmp_path: Path) -> None:
    """Read, command, hold, relax: in the order of the robot file's joints."""
    twin = make_twin()
    env = make_env(config(tmp_path), task="lift")
    env.connect()
    env.engage()
    assert env.spec.action_names[0] == "shoulder_pan.pos"
    assert env.spec.gripper.tolist() == [False] * 5 + [True]
    target = np.array([20, -10, 5, 0, 30, 80], np.float32)
    assert until(
        lambda: (
            (env.apply_action(target), time.sleep(0.03))
            and np.allclose(calibration().to_normalized(twin.world.positions(0)), target, atol=1)
        )
    )
    observation = env.reset()
    assert observation.task == "lift"
    np.testing.assert_allclose(observation.states["arm"], target, atol=1)
    env.hold()
    with pytest.raises(EnvError, match="6 finite numbers"):
        env.apply_action(np.full(6, np.nan))
    env.relax()
    assert not any(servo.get("torque_enable") for servo in twin.chains[0].servos)
    env.close()


def test_what_is_missing_is_said(make_twin: Make, tmp_path: Path) -> None:
    """Limits, names, type and calibration."""
    make_twin()
    with pytest.raises(EnvError, match=r"needs --env.robot-config-path"):
        make_env(LeRobotConfig(robot={"type": "so101_follower"}))
    with pytest.raises(EnvError, match="says nothing about joints"):
        make_env(config(tmp_path, "unit: normalized"))
    with pytest.raises(EnvError, match="the robot's action values are"):
        make_env(config(tmp_path, FILE.replace("elbow_flex", "elbow"))).connect()
    with pytest.raises(EnvError, match="LeRobot cannot make the robot"):
        make_env(config(tmp_path, type="no_such_robot")).connect()
    with pytest.raises(EnvError, match="is not calibrated"):
        make_env(config(tmp_path, id="nobody")).connect()


def test_nothing_but_relax_drops_the_torque(make_twin: Make, tmp_path: Path) -> None:
    """Neither checking, connecting, closing nor the end of every reference: the servos' log has no torque off."""
    twin = make_twin()
    servos = twin.chains[0].servos

    def torque_events() -> list[dict[str, Any]]:
        return [event for event in twin.log.events() if event["kind"] == "torque"]

    check = make_env(config(tmp_path), dry_run=True)
    check.connect()
    check.engage()
    check.close()
    del check
    gc.collect()
    assert not torque_events()
    env = make_env(config(tmp_path))
    env.connect()
    assert not torque_events()
    with pytest.raises(EnvError, match="call engage"):
        env.apply_action(np.zeros(6, np.float32))
    env.engage()
    switched = torque_events()
    assert env.without_torque() == []
    assert len(env.ticks()) == 6
    env.close()
    del env
    gc.collect()
    check = make_env(config(tmp_path), dry_run=True)
    check.connect()
    check.close()
    del check
    gc.collect()
    assert torque_events() == switched
    assert all(servo.get("torque_enable") for servo in servos)


def test_the_policys_unit(make_twin: Make, tmp_path: Path) -> None:
    """A policy in degrees drives the same driver in degrees: the joint stands where the degrees say."""
    twin = make_twin()
    policy = PolicySpec("test", 6, 10, unit="degrees", unit_source="declared")
    env = make_env(config(tmp_path), policy=policy)
    env.connect()
    env.engage()
    assert env.spec.unit == "degrees"
    joint = calibration().joints[0]
    assert env.spec.upper[0] == pytest.approx((joint.range_max - joint.range_min) / 2 * 360 / 4095)
    np.testing.assert_allclose(env.spec.unit_per_rad[:5], 57.3, rtol=0.06)
    target = np.array([45, -10, 5, 0, 30, 80], np.float32)
    assert until(
        lambda: (
            env.apply_action(target) is None
            and (time.sleep(0.03) or abs(twin.world.positions(0)[0] - np.pi / 4) < 0.01)
        )
    )
    np.testing.assert_allclose(
        env.pose([10, 0, 0, 0, 0, 60], "normalized")[[0, 5]], [env.spec.upper[0] / 10, 60]
    )
    env.close()
