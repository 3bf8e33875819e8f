"""Each fault as the driver sees it on real hardware."""

from __future__ import annotations

import termios
import time

import numpy as np
import pytest
from virtual_so101.faults import FAULT_KINDS, Fault, FaultError

pytest.importorskip("lerobot")


@pytest.fixture
def connected(make_twin, make_follower, connect):
    """A twin and a follower that is connected to it."""
    twin = make_twin()
    follower = make_follower(twin)
    connect(follower)
    return twin, follower


def fault(twin, text):
    twin.apply(Fault.parse(text))


def test_few_lost_packets_are_recovered(connected):
    """1 % of lost packets costs retries, not errors."""
    twin, follower = connected
    fault(twin, "lost:0.01")
    start = time.monotonic()
    errors = 0
    for _ in range(100):
        try:
            follower.get_observation()
        except ConnectionError:
            errors += 1
    assert errors <= 1
    assert time.monotonic() - start < 30


def test_many_lost_packets_become_connection_errors(connected):
    """A line that loses everything: ConnectionError, and it works again afterwards."""
    twin, follower = connected
    fault(twin, "lost:1")
    with pytest.raises(ConnectionError, match="no status packet"):
        follower.get_observation()
    fault(twin, "lost:0")
    follower.get_observation()


def test_late_replies_leave_reads_behind(connected):
    """After one stall each read returns an earlier cycle's pose, without an error; a flush cures it."""
    twin, follower = connected
    scale = 100 / twin.world.joint_upper[0]

    def shown_after_moving_to(value):
        """What the driver reads (rad) once the arm stands at `value` (rad)."""
        target = np.zeros(6)
        target[0] = value
        twin.move_by_hand(0, twin.chains[0].calibration.middle + target)
        time.sleep(0.4)
        return follower.get_observation()["shoulder_pan.pos"] / scale

    assert shown_after_moving_to(0.2) == pytest.approx(0.2, abs=0.02)
    fault(twin, "late:80")
    follower.get_observation()
    # One cycle behind; on a machine that adds a stall of its own, more: never the present pose.
    assert shown_after_moving_to(0.4) < 0.25
    assert shown_after_moving_to(0.6) < 0.45
    # Not at once: the answer to the last question is still on its way.
    time.sleep(0.2)
    follower.bus.port_handler.ser.reset_input_buffer()
    assert shown_after_moving_to(0.8) == pytest.approx(0.8, abs=0.02)


def test_a_dead_servo_is_silent_and_limp(connected, pose):
    """One servo without power: reads fail rather than hang, its joint does not move."""
    twin, follower = connected
    fault(twin, "dead:3")
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no status packet"):
        follower.get_observation()
    assert time.monotonic() - start < 20
    before = twin.world.positions(0)
    follower.send_action(pose(20.0))
    time.sleep(0.5)
    moved = np.abs(twin.world.positions(0) - before)
    assert moved[2] < 1e-3
    assert np.all(moved[[0, 1, 3]] > 0.1)
    fault(twin, "alive:3")
    follower.get_observation()
    # It has lost its torque switch with its power.
    assert follower.bus.read("Torque_Enable", "elbow_flex") == 0


def test_a_dead_servo_is_named_on_connect(make_twin, make_follower):
    """The driver's own check lists the id that is missing."""
    twin = make_twin()
    fault(twin, "dead:5")
    with pytest.raises(RuntimeError, match=r"Missing motor IDs:\s+- 5"):
        make_follower(twin).connect(calibrate=False)


def test_unplugging_breaks_the_driver_for_good(connected, make_follower, pose, connect):
    """termios.error, then a port in use for ever; a new object connects when the plug is back."""
    twin, follower = connected
    link = twin.buses[0].link
    fault(twin, "unplug")
    assert not link.is_symlink()
    with pytest.raises(termios.error):
        follower.get_observation()
    with pytest.raises(ConnectionError, match="Port is in use"):
        follower.send_action(pose(0.0))
    with pytest.raises(Exception):  # noqa: B017 - which one depends on the driver's state
        follower.disconnect()
    assert follower.is_connected
    fresh = make_follower(twin)
    with pytest.raises(ConnectionError):
        fresh.connect(calibrate=False)
    fault(twin, "replug")
    again = make_follower(twin)
    connect(again)
    again.get_observation()


def test_overload_drops_torque_and_sets_the_error_bit(connected, pose):
    """The loop goes on without an error, the joint does not follow, and a register access says why."""
    twin, follower = connected
    fault(twin, "overload:1")
    before = twin.world.positions(0)
    follower.send_action(pose(30.0))
    time.sleep(0.5)
    follower.get_observation()
    assert abs(twin.world.positions(0)[0] - before[0]) < 1e-3
    with pytest.raises(RuntimeError, match="Overload"):
        follower.bus.read("Present_Temperature", "shoulder_pan")
    # Switching torque off ends it, though the reply to that write still carries the bit.
    with pytest.raises(RuntimeError, match="Overload"):
        follower.bus.write("Torque_Enable", "shoulder_pan", 0)
    follower.bus.enable_torque("shoulder_pan")
    follower.send_action(pose(30.0))
    time.sleep(0.5)
    assert abs(twin.world.positions(0)[0] - before[0]) > 0.1


def test_a_power_cycle_forgets_what_was_not_saved(connected):
    """With the lock on, an EEPROM write holds until the supply goes off; with the lock off it stays."""
    twin, follower = connected
    bus = follower.bus
    bus.write("P_Coefficient", "gripper", 21)
    bus.disable_torque("elbow_flex")
    bus.write("P_Coefficient", "elbow_flex", 22)
    assert bus.read("P_Coefficient", "gripper") == 21
    fault(twin, "power_cycle")
    assert bus.read("P_Coefficient", "gripper") == 16
    assert bus.read("P_Coefficient", "elbow_flex") == 22
    assert bus.read("Torque_Enable", "gripper") == 0


def test_clear_ends_everything(connected):
    """One word brings the robot back."""
    twin, follower = connected
    for text in ("lost:0.5", "dead:2", "overload:4", "wire:1"):
        fault(twin, text)
    fault(twin, "clear")
    follower.get_observation()
    assert set(follower.bus.broadcast_ping()) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("lost:0.05", Fault("lost", "0.05")),
        ("right.dead:3@2.5", Fault("dead", "3", arm=1, after=2.5)),
        ("unplug@10", Fault("unplug", after=10.0)),
        ("freeze:left_wrist", Fault("freeze", "left_wrist")),
        ("wire:1,6", Fault("wire", "1,6")),
    ],
)
def test_faults_are_read_as_written(text, parsed):
    """The text form gives kind, value, arm and time."""
    assert Fault.parse(text) == parsed
    assert Fault.parse(str(parsed)).kind == parsed.kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "boom",
        "lost",
        "lost:2",
        "lost:nan",
        "late:-1",
        "dead",
        "dead:x",
        "unplug:3",
        "top.dead:3",
        "late:5@x",
        "wire:7",
    ],
)
def test_wrong_faults_are_refused_with_a_sentence(text):
    """Each refusal says what was expected."""
    with pytest.raises(FaultError, match=r"expected|needs|known|takes"):
        Fault.parse(text)


def test_every_kind_is_documented():
    """The module's text, which --help shows, names each kind."""
    from virtual_so101 import faults

    assert all(kind in (faults.__doc__ or "") for kind in FAULT_KINDS)


def test_a_fault_that_does_not_fit_this_robot_is_refused(make_twin):
    """No right arm, no cameras, no such servo."""
    twin = make_twin()
    for text in ("right.unplug", "freeze:front", "dead:9"):
        with pytest.raises(FaultError):
            fault(twin, text)
