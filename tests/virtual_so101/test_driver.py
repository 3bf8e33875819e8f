"""LeRobot's unmodified classes on the virtual servo bus."""

from __future__ import annotations

import builtins
import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from virtual_so101.calibration import JOINTS
from virtual_so101.servo_log import goals_of, read_servo_log

pytest.importorskip("lerobot")


def settle(follower, action, seconds=3.0, tolerance=1.0):
    """Send `action` at 30 Hz until it is reached; the last observation."""
    end = time.monotonic() + seconds
    while True:
        follower.send_action(action)
        observation = follower.get_observation()
        if all(abs(observation[k] - v) < tolerance for k, v in action.items()) or time.monotonic() > end:
            return observation
        time.sleep(1 / 30)


def test_follower_connects_and_is_calibrated(make_twin, make_follower, connect):
    """The file that the twin writes matches its servos, so connect needs no questions."""
    follower = make_follower(make_twin())
    connect(follower)
    assert follower.is_calibrated
    assert all(follower.bus.read("Torque_Enable", name) == 1 for name in JOINTS)
    assert follower.bus.ping("gripper") == 777


def test_a_loop_reads_what_was_commanded(make_twin, make_follower, pose, connect):
    """At 30 Hz each joint follows its goal, in normalised units."""
    follower = make_follower(make_twin())
    connect(follower)
    for value, gripper in ((40.0, 90.0), (-60.0, 10.0), (0.0, 50.0)):
        observation = settle(follower, pose(value, gripper))
        for key, wanted in pose(value, gripper).items():
            assert observation[key] == pytest.approx(wanted, abs=1.0), key


def test_degrees_are_the_joint_angles(make_twin, make_follower, connect):
    """With use_degrees a commanded 30° is 30° from the middle of the joint's range in the world."""
    twin = make_twin()
    follower = make_follower(twin, use_degrees=True)
    connect(follower)
    settle(follower, {"shoulder_pan.pos": 30.0, "elbow_flex.pos": -45.0}, tolerance=0.2)
    angles = np.rad2deg(twin.world.positions(0))
    assert angles[0] == pytest.approx(30.0, abs=0.5)
    assert angles[2] == pytest.approx(-45.0, abs=0.5)


def test_the_arm_keeps_its_pose_on_connect_and_falls_limp_on_disconnect(
    make_twin, make_follower, pose, connect
):
    """Enabling torque makes the present pose the goal; disconnect drops torque as the driver asks."""
    twin = make_twin()
    follower = make_follower(twin)
    connect(follower)
    settle(follower, pose(30.0))
    before = twin.world.positions(0)
    follower.disconnect()
    assert not any(twin.status()["buses"][0]["torque"])
    connect(follower)
    time.sleep(0.1)
    assert np.allclose(twin.world.positions(0), before, atol=0.01)


def test_registers_of_the_motor_are_readable(make_twin, make_follower, pose, connect):
    """Load, velocity, temperature, voltage and current answer in the servo's units."""
    follower = make_follower(make_twin())
    connect(follower)
    follower.send_action(pose(80.0))
    time.sleep(0.1)
    bus = follower.bus
    assert bus.read("Present_Velocity", "shoulder_pan") > 100
    assert 0 < bus.read("Present_Load", "shoulder_pan") <= 1000
    assert bus.read("Moving", "shoulder_pan") == 1
    follower.send_action(pose(-80.0))
    time.sleep(0.1)
    assert bus.read("Present_Velocity", "shoulder_pan") < -100
    assert bus.read("Present_Load", "shoulder_pan") < 0
    assert 100 < bus.read("Present_Voltage", "gripper") < 130
    assert 20 < bus.read("Present_Temperature", "gripper") < 60
    assert bus.read("Goal_Position", "gripper") == pytest.approx(50.0, abs=0.5)


def test_two_arms(make_twin, tmp_path, connect):
    """BiSOFollower drives two buses; the arms do not mix."""
    from lerobot.robots.bi_so_follower import BiSOFollower, BiSOFollowerConfig
    from lerobot.robots.so_follower import SOFollowerConfig

    twin = make_twin(arms=2)
    left, right = (SOFollowerConfig(port=str(bus.link), use_degrees=False) for bus in twin.buses)
    robot = BiSOFollower(
        BiSOFollowerConfig(
            id="virtual",
            calibration_dir=tmp_path / "calibration",
            left_arm_config=left,
            right_arm_config=right,
        )
    )
    connect(robot)
    try:
        assert robot.is_calibrated
        action = {f"left_{j}.pos": 20.0 for j in JOINTS} | {f"right_{j}.pos": 35.0 for j in JOINTS}
        observation = settle(robot, action)
        for key, wanted in action.items():
            assert observation[key] == pytest.approx(wanted, abs=1.0), key
    finally:
        robot.disconnect()


def test_leader_reads_an_arm_moved_by_hand(make_twin, tmp_path, connect):
    """SO101Leader switches torque off and reads where a hand puts the arm."""
    from lerobot.teleoperators.so_leader import SO101Leader, SO101LeaderConfig

    twin = make_twin()
    leader = SO101Leader(
        SO101LeaderConfig(
            port=str(twin.buses[0].link),
            id="virtual",
            calibration_dir=tmp_path / "calibration",
            use_degrees=True,
        )
    )
    connect(leader)
    try:
        middle = twin.chains[0].calibration.middle
        twin.move_by_hand(0, middle + np.array([0.5, -0.4, 0.3, 0.0, 0.0, 0.2]))
        time.sleep(0.5)
        action = leader.get_action()
        assert action["shoulder_pan.pos"] == pytest.approx(np.rad2deg(0.5), abs=0.5)
        assert action["shoulder_lift.pos"] == pytest.approx(np.rad2deg(-0.4), abs=0.5)
        assert not any(twin.status()["buses"][0]["torque"])
    finally:
        leader.disconnect()


def test_calibration_procedure(make_twin, make_follower, pose, tmp_path, monkeypatch, connect):
    """LeRobot's own calibration finds the joint ranges of an arm that a hand sweeps, and the result works."""
    twin = make_twin()
    follower = make_follower(twin, id="fresh")
    connect(follower)
    with pytest.raises(RuntimeError, match="calibration"):
        follower.get_observation()
    lower, upper = twin.world.joint_lower, twin.world.joint_upper
    middle = (lower + upper) / 2.0
    twin.move_by_hand(0, middle)
    time.sleep(0.3)
    answers: list[str] = []
    # The recording ends when a line can be read from standard input: a pipe that a thread writes to.
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)

        def sweep():
            # Not before the driver has read the middle: it does so right after the question.
            time.sleep(0.3)
            for target in (lower, upper, middle):
                twin.move_by_hand(0, target)
                time.sleep(1.2)
            os.write(write_end, b"\n")

        hand = threading.Thread(target=sweep)
        monkeypatch.setattr(builtins, "input", lambda prompt="": answers.append(prompt) or hand.start() or "")
        follower.calibrate()
        hand.join()
    os.close(write_end)
    twin.move_by_hand(0, None)
    assert len(answers) == 1
    saved = json.loads((tmp_path / "calibration" / "fresh.json").read_text())
    expected = twin.chains[0].calibration
    for name, joint in zip(JOINTS, expected.joints, strict=True):
        if name != "wrist_roll":
            assert saved[name]["range_min"] == pytest.approx(joint.range_min, abs=3), name
            assert saved[name]["range_max"] == pytest.approx(joint.range_max, abs=3), name
        assert saved[name]["homing_offset"] == pytest.approx(joint.homing_offset, abs=2), name
    assert follower.is_calibrated
    follower.configure()
    assert settle(follower, pose(25.0))["elbow_flex.pos"] == pytest.approx(25.0, abs=1.0)


def test_motor_set_up(make_twin, make_follower, monkeypatch):
    """`setup_motors` finds one factory-new servo after the other and gives them ids 6 to 1."""
    import serial

    twin = make_twin()
    chain = twin.chains[0]

    def set_up() -> Any:
        chain.as_from_factory()
        # One servo arrives at another baud rate, 500 kbit/s: write 1 to its register 6.
        chain.wire({2})
        with serial.Serial(str(twin.buses[0].link), 1_000_000, timeout=2.0) as port:
            port.write(bytes((0xFF, 0xFF, 1, 4, 3, 6, 1, 0xF0)))
            assert port.read(6) == bytes((0xFF, 0xFF, 1, 2, 0, 0xFC))
        follower = make_follower(twin)
        order = iter(reversed(range(6)))
        monkeypatch.setattr(builtins, "input", lambda prompt="": chain.wire({next(order)}) or "")
        follower.setup_motors()
        return follower

    # LeRobot asks each baud rate once and takes an answer that is later than 50 ms, as on a busy machine, for none.
    for attempt in range(5):
        try:
            follower = set_up()
            break
        except RuntimeError:
            if attempt == 4:
                raise
    chain.wire(None)
    assert any(set(follower.bus.broadcast_ping()) == {1, 2, 3, 4, 5, 6} for _ in range(5))
    # Saved, not only set.
    chain.power_cycle()
    assert any(set(follower.bus.broadcast_ping()) == {1, 2, 3, 4, 5, 6} for _ in range(5))
    assert [chain.joint_of_id(servo_id) for servo_id in range(1, 7)] == [0, 1, 2, 3, 4, 5]


def test_pace_slows_a_transaction_to_the_wire(make_twin, make_follower, connect):
    """With pacing each answered transaction takes at least the adapter's latency and its bits."""
    follower = make_follower(make_twin(pace=True))
    connect(follower)
    start = time.monotonic()
    for _ in range(20):
        follower.bus.sync_read("Present_Position")
    assert (time.monotonic() - start) / 20 > 0.001


def test_the_log_proves_what_was_commanded(make_twin, make_follower, pose, tmp_path, connect):
    """Every goal of every joint is in the file, in ticks, within limits that a test can check."""
    path = tmp_path / "servo.jsonl"
    twin = make_twin(log_path=path)
    follower = make_follower(twin)
    connect(follower)
    for value in np.linspace(0.0, 30.0, 31):
        follower.send_action(pose(float(value)))
    follower.get_observation()
    commands = goals_of(read_servo_log(path))
    assert set(commands) == {(0, name) for name in JOINTS}
    joint = twin.chains[0].calibration.joints[0]
    pan = commands[0, "shoulder_pan"]
    assert len(pan.ticks) == 31
    assert np.all((pan.ticks >= joint.range_min) & (pan.ticks <= joint.range_max))
    assert np.all(np.diff(pan.ticks) >= 0)
    assert np.all(np.diff(pan.wall) >= 0)
    assert goals_of(twin.log.events())[0, "gripper"].ticks.tolist() == commands[0, "gripper"].ticks.tolist()
