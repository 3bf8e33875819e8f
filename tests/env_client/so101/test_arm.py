"""One and two arms over the real driver: units, limits, calibration, and the traps of the bus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from env_client.envs.env import EnvError
from env_client.envs.make import make_env as make_robot
from env_client.envs.robots import SO101Config, SO101RobotConfig
from env_client.envs.so101 import SO101Env
from env_client.envs.so101_arm import SO101Arm
from env_client.wire import PolicySpec
from kinematic_robot import calibration, until
from test_lerobot import config as lerobot_config
from virtual_so101.servo_log import goals_of
from virtual_so101.twin import Twin

Make = Callable[..., Any]


def arm_at(twin: Twin, arm: int = 0) -> np.ndarray:
    """Where the joints really are, in the normalised unit."""
    return calibration(arm).to_normalized(twin.world.positions(arm))


def go(env: SO101Env, target: np.ndarray, seconds: float = 0.4) -> None:
    """Command the same pose at 30 Hz."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        env.apply_action(target)
        time.sleep(1 / 30)


def test_normalized_round_trip(make_twin: Make, make_env: Make) -> None:
    """What is commanded in the normalised unit is where the arm goes and what is measured there."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    target = np.array([30, -20, 10, 5, -40, 70], np.float32)
    go(env, target)
    observation = env.get_observation()
    assert set(observation.states) == {"arm"}
    assert observation.states["arm"].dtype == np.float32
    np.testing.assert_allclose(observation.states["arm"], target, atol=0.5)
    np.testing.assert_allclose(arm_at(twin), target, atol=0.5)


def test_spec_comes_from_the_calibration(make_twin: Make, make_env: Make) -> None:
    """Limits are the calibrated range; one radian is as many units as the calibration says."""
    make_twin()
    env = make_env()
    env.connect()
    env.engage()
    spec = env.spec
    joints = calibration().joints
    assert spec.unit == "normalized"
    assert spec.action_names[0] == "shoulder_pan.pos"
    np.testing.assert_array_equal(spec.lower, [-100] * 5 + [0])
    np.testing.assert_array_equal(spec.upper, [100] * 6)
    expected = [4096 / (2 * np.pi) * 200 / (j.range_max - j.range_min) for j in joints[:5]]
    np.testing.assert_allclose(spec.unit_per_rad[:5], expected)
    assert spec.unit_per_rad[5] == 1.0
    np.testing.assert_array_equal(spec.gripper, [False] * 5 + [True])


def test_degrees(make_twin: Make, make_env: Make) -> None:
    """In degrees the arm's unit, limits and scale are LeRobot's degrees."""
    twin, env = make_twin(), make_env(use_degrees=True)
    env.connect()
    env.engage()
    assert env.spec.unit == "degrees"
    joint = calibration().joints[0]
    assert env.spec.upper[0] == pytest.approx((joint.range_max - joint.range_min) / 2 * 360 / 4095)
    assert env.spec.unit_per_rad[0] == pytest.approx(57.3, abs=0.05)
    go(env, np.array([45, 0, 0, 0, 0, 50], np.float32))
    assert twin.world.positions(0)[0] == pytest.approx(np.pi / 4, abs=0.01)
    assert env.get_observation().states["arm"][0] == pytest.approx(45, abs=0.5)
    pose = env.pose([10, -20, 30, 40, 50, 60], "normalized")
    assert pose[0] == pytest.approx(10 / 100 * env.spec.upper[0], rel=1e-3)
    assert pose[5] == 60


def test_the_arm_takes_the_policys_unit(make_twin: Make, tmp_path: Path) -> None:
    """The same numbers from a policy in degrees and from one in normalized move the servo to where each means."""
    twin = make_twin()
    (tmp_path / "none.json").write_text("{}")
    robot = SO101RobotConfig(
        port=str(tmp_path / "port0"), id="virtual", calibration_dir=str(tmp_path / "calibration")
    )
    for unit, use_degrees in (("degrees", False), ("normalized", True)):
        made = SO101Config(
            robot=robot, camera_config_path=str(tmp_path / "none.json"), use_degrees=use_degrees
        )
        env = make_robot(made, policy=PolicySpec("test", 6, 10, unit=unit))
        env.connect()
        env.engage()
        assert env.spec.unit == unit
        go(env, np.array([45, 0, 0, 0, 0, 50], np.float32))
        reached = twin.world.positions(0)[0]
        expected = np.pi / 4 if unit == "degrees" else 45 / env.spec.unit_per_rad[0]
        assert reached == pytest.approx(expected, abs=0.01)
        env.close()


def test_two_arms_left_first(make_twin: Make, make_env: Make) -> None:
    """Twelve values, the left arm's first; each arm on its own bus."""
    twin, env = make_twin(2), make_env(2)
    env.connect()
    env.engage()
    assert env.spec.action_dim == 12
    assert env.spec.action_names[0] == "left_shoulder_pan.pos"
    assert env.spec.action_names[6] == "right_shoulder_pan.pos"
    target = np.array([20] * 5 + [80] + [-30] * 5 + [20], np.float32)
    go(env, target)
    np.testing.assert_allclose(arm_at(twin, 0), target[:6], atol=0.5)
    np.testing.assert_allclose(arm_at(twin, 1), target[6:], atol=0.5)
    observation = env.get_observation()
    np.testing.assert_allclose(observation.states["left_arm"], target[:6], atol=0.5)
    np.testing.assert_allclose(observation.states["right_arm"], target[6:], atol=0.5)


def test_missing_calibration_is_a_sentence(make_twin: Make, make_env: Make) -> None:
    """Without a calibration file nothing is commanded and nobody is asked for the Enter key."""
    twin = make_twin()
    with pytest.raises(EnvError, match=r"has no calibration file .*nobody.json; calibrate it with LeRobot"):
        make_env(id="nobody").connect()
    assert not goals_of(twin.log.events())


def test_mismatched_calibration_is_refused(make_twin: Make, make_env: Make, tmp_path: Path) -> None:
    """Another arm's calibration is refused before the motors are switched on."""
    twin = make_twin()
    path = tmp_path / "calibration" / "virtual.json"
    content = json.loads(path.read_text())
    content["elbow_flex"]["homing_offset"] += 100
    path.write_text(json.dumps(content))
    with pytest.raises(EnvError, match=r"is not that of .*virtual.json: is this the right arm"):
        make_env().connect()
    assert not [event for event in twin.log.events() if event["kind"] in ("goal", "torque")]


def test_no_port_is_a_sentence(make_twin: Make, make_env: Make, tmp_path: Path) -> None:
    """A port that is not there is named, with what to do."""
    make_twin()
    with pytest.raises(
        EnvError, match=r"the port .*nowhere of the arm does not exist; is the arm plugged in"
    ):
        make_env(port=str(tmp_path / "nowhere")).connect()


def test_dry_run_leaves_the_motors_alone(make_twin: Make, make_env: Make) -> None:
    """In a dry run neither torque nor goals are written, while everything is read."""
    twin = make_twin()
    env = make_env(dry_run=True)
    env.connect()
    env.engage()
    env.get_observation()
    env.apply_action(np.zeros(6, np.float32))
    env.hold()
    env.close()
    time.sleep(0.05)
    assert not [event for event in twin.log.events() if event["kind"] in ("goal", "torque")]


def test_a_wrong_command_raises(make_twin: Make, make_env: Make) -> None:
    """NaN and a wrong number of values never reach the driver, whoever sends them."""
    twin = make_twin()
    env = make_env()
    env.connect()
    env.engage()
    before = len(goals_of(twin.log.events()))
    for wrong in (np.full(6, np.nan), np.zeros(12), np.array([0, 0, np.inf, 0, 0, 0])):
        with pytest.raises(EnvError, match="6 finite numbers were expected"):
            env.apply_action(wrong)
    assert len(goals_of(twin.log.events())) == before


def test_stalled_bus_leaves_no_stale_observation(make_twin: Make, make_env: Make) -> None:
    """After a stall of 80 ms every observation is of now: none is one cycle old."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    worst = 0.0
    for tick in range(40):
        pan = -60.0 + 3 * tick
        env.apply_action(np.array([pan, 0, 0, 0, 0, 50], np.float32))
        time.sleep(0.033)
        if tick == 10:
            # Longer than the driver's patience of 50 ms: it asks again, and both answers come.
            twin.buses[0].stall(0.080)
        before = arm_at(twin)[0]
        try:
            measured = env.get_observation().states["arm"][0]
        except EnvError:
            continue
        after = arm_at(twin)[0]
        # A reading of one cycle ago would be 3 units behind.
        worst = max(worst, min(before, after) - measured)
    assert worst < 1.5
    assert env.arms[0].flushed >= 1


def test_long_stall_recovers(make_twin: Make, make_env: Make) -> None:
    """A stall longer than all retries is an error or a wait, and afterwards readings are of now."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    twin.buses[0].stall(0.25)
    errors = 0
    for _ in range(10):
        try:
            env.get_observation()
        except EnvError:
            errors += 1
        time.sleep(0.03)
    assert errors >= 1
    go(env, np.array([40, 0, 0, 0, 0, 50], np.float32), 0.3)
    assert env.get_observation().states["arm"][0] == pytest.approx(40, abs=1)


def test_unplug_and_replug(make_twin: Make, make_env: Make) -> None:
    """A pulled plug is an error at once, costs no time afterwards, and ends when the plug is back."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    target = np.array([25, 0, 0, 0, 0, 50], np.float32)
    go(env, target)
    twin.buses[0].unplug()
    with pytest.raises(EnvError, match=r"lost"):
        env.get_observation()
    started = time.monotonic()
    for _ in range(20):
        with pytest.raises(EnvError):
            env.get_observation()
        with pytest.raises(EnvError):
            env.apply_action(target)
    # Forty that waited for the driver's timeouts would take ten times as long.
    assert time.monotonic() - started < 4
    # The servos keep their goal meanwhile.
    np.testing.assert_allclose(arm_at(twin), target, atol=0.5)
    twin.buses[0].replug()
    assert until(lambda: works(env))
    go(env, -target)
    assert arm_at(twin)[0] == pytest.approx(-25, abs=1)
    assert env.arms[0].recovered == 1


def works(env: SO101Env) -> bool:
    try:
        env.get_observation()
    except EnvError:
        return False
    return True


def test_dead_servo_is_named_and_does_not_stall(make_twin: Make, make_env: Make) -> None:
    """A servo without power: three slow reads at most, then quick errors that name it; alive, it goes on."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    twin.chains[0].set_dead(2)
    slow = reads = 0
    end = time.monotonic() + 2.6
    while time.monotonic() < end:
        started = time.monotonic()
        with pytest.raises(EnvError) as raised:
            env.get_observation()
        reads += 1
        slow += time.monotonic() - started > 0.08
        time.sleep(0.02)
    # A slow one takes 100 ms, so 20 of them would be all; a busy machine may stop a quick one for as long.
    assert slow <= 3 or slow < reads / 4
    assert "elbow_flex (id 3)" in str(raised.value)
    twin.chains[0].set_dead(2, False)
    assert until(lambda: env.arms[0].recovered == 1)
    env.reset()


def test_power_is_not_switched_on_within_an_episode(make_twin: Make, make_env: Make) -> None:
    """After the supply was off the arm stays limp until the next episode begins."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.reset()
    twin.buses[0].unplug()
    with pytest.raises(EnvError):
        env.get_observation()
    twin.chains[0].power_cycle()
    twin.buses[0].replug()
    assert until(lambda: env.arms[0].recovered == 1)
    with pytest.raises(EnvError, match="the power was off"):
        env.apply_action(np.zeros(6, np.float32))
    with pytest.raises(EnvError, match="the power was off"):
        env.get_observation()
    assert not any(servo.get("torque_enable") for servo in twin.chains[0].servos)
    env.reset()
    env.apply_action(np.zeros(6, np.float32))
    assert all(servo.get("torque_enable") for servo in twin.chains[0].servos)


def test_hold_does_not_creep(make_twin: Make, make_env: Make) -> None:
    """Holding again and again keeps the pose of the first call."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    go(env, np.array([10, 0, 0, 0, 0, 50], np.float32))
    for _ in range(5):
        env.hold()
    time.sleep(0.05)
    ticks = goals_of(twin.log.events())[(0, "shoulder_pan")].ticks
    assert len(set(ticks[-5:])) == 1


def test_close_keeps_torque_and_relax_drops_it(make_twin: Make, make_env: Make) -> None:
    """Closing the port must not drop the arm; `relax` does."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.engage()
    env.close()
    assert all(servo.get("torque_enable") for servo in twin.chains[0].servos)
    other = make_env()
    other.connect()
    other.engage()
    other.relax()
    assert not any(servo.get("torque_enable") for servo in twin.chains[0].servos)


def test_connecting_switches_nothing_on(make_twin: Make, make_env: Make) -> None:
    """After `connect` everything can be read, and no motor was touched; commands are refused."""
    twin, env = make_twin(), make_env()
    env.connect()
    env.get_observation()
    with pytest.raises(EnvError, match="call engage"):
        env.apply_action(np.zeros(6, np.float32))
    assert not [event for event in twin.log.events() if event["kind"] in ("goal", "torque")]


@pytest.mark.parametrize("second", [0, 1])
def test_torque_that_seems_to_be_off_is_asked_for_twice(second: int) -> None:
    """A late reply of a bus that has just come back may have answered the first time; what is off stays off."""
    answers = [{"elbow_flex": 1, "gripper": 0}, {"elbow_flex": 1, "gripper": second}]
    flushed: list[bool] = []
    bus = SimpleNamespace(
        sync_read=lambda name, num_retry: answers.pop(0),
        port_handler=SimpleNamespace(ser=SimpleNamespace(reset_input_buffer=lambda: flushed.append(True))),
    )
    said = SO101Arm._without_torque(cast(SO101Arm, None), SimpleNamespace(bus=bus))
    assert flushed == [True]
    assert not answers
    assert said.startswith("gripper came back without torque") if second == 0 else said == ""


@pytest.mark.parametrize(
    ("kind", "arms", "degrees"), [("so101", 1, False), ("so101", 2, True), ("lerobot", 1, False)]
)
def test_a_joint_outside_its_range_stands_and_then_moves_inwards_slowly(
    make_twin: Make, make_env: Make, tmp_path: Path, kind: str, arms: int, degrees: bool
) -> None:
    """The servos' log: the first goal is where the joint stands, 18 degrees outside; then 0.3 rad/s at most."""
    twin = make_twin(arms)
    name, pan = ("virtual", "virtual_right")[arms - 1], twin.chains[-1].servos[0]
    path = tmp_path / "calibration" / f"{name}.json"
    content = json.loads(path.read_text())
    start = pan.position
    low = start + 200
    content["shoulder_pan"]["range_min"] = low
    path.write_text(json.dumps(content))
    pan.put("torque_enable", 0)
    time.sleep(0.1)
    pan.put("min_limit", low)
    if kind == "lerobot":
        env = make_robot(lerobot_config(tmp_path))
    else:
        env = make_env(arms, use_degrees=degrees)
    env.connect()
    env.engage()
    time.sleep(0.3)
    assert abs(pan.position - start) <= 2
    goals = goals_of(twin.log.events())[(arms - 1, "shoulder_pan")]
    assert abs(goals.ticks - start).max() <= 2
    target = (env.spec.lower + env.spec.upper) / 2
    target[6 * (arms - 1)] = env.spec.lower[6 * (arms - 1)]
    assert until(lambda: (env.apply_action(target), time.sleep(0.03), pan.position >= low - 2)[-1])
    goals = goals_of(twin.log.events())[(arms - 1, "shoulder_pan")]
    assert np.abs(np.diff(goals.ticks)).max() <= 195 * 0.05 + 1
    assert until(lambda: pan.get("min_limit") == low)
    env.close()
