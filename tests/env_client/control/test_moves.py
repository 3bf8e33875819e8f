"""Moves to a pose: smooth, limited, and over when they are stopped."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from env_client.control import SafetyConfig
from loop_rig import TICK, Rig, away


def test_a_move_arrives_smoothly_and_within_its_speed() -> None:
    """Every joint at most at the given speed, at rest at both ends."""
    rig = Rig()
    goal = np.array([70.0, -50.0, 90.0])
    result = rig.loop.move_to(goal)
    assert result.reached
    assert result.outcome == "reached"
    assert result.error is not None
    np.testing.assert_allclose(rig.sent[-1], goal, rtol=1e-5)
    steps = np.diff(rig.sent, axis=0)
    assert np.abs(steps).max(axis=0)[0] <= 0.75 * TICK * 54 * (1 + 1e-4)
    assert np.abs(steps[[0, -1]]).max() < 0.1
    assert np.abs(np.diff(steps, axis=0)).max() < 0.2


def test_a_move_never_exceeds_the_filters_limits() -> None:
    """A pose outside is cut to the limits, and a wish for more speed than allowed is not granted."""
    rig = Rig()
    assert rig.loop.move_to(np.array([500.0, -500.0, 50.0]), velocity=100.0).reached
    np.testing.assert_allclose(rig.sent[-1], [100, -100, 50])
    rig.check_speed()


@pytest.mark.parametrize(
    ("flags", "goal"),
    [
        ({"max_velocity_per_frame": 0.2}, [80.0, -80.0, 0.0]),
        ({"max_velocity": 0.1}, [0.0, 0.0, 95.0]),
        ({"gripper_max_velocity": 1000.0}, [0.0, 0.0, 95.0]),
    ],
)
def test_no_other_limit_makes_a_move_faster(flags: dict[str, float], goal: list[float]) -> None:
    """Joints at most 0.75 rad/s, the gripper in the same proportion (100 %/s), whatever the filter allows."""
    rig = Rig(safety=SafetyConfig(**flags))
    assert rig.loop.move_to(np.array(goal)).reached
    fastest = np.abs(np.diff(rig.sent, axis=0)).max(axis=0) / TICK / np.abs(rig.arm.spec.unit_per_rad)
    assert (fastest <= np.where(rig.arm.spec.gripper, 100.0, 0.75) * (1 + 1e-3)).all()


def test_a_move_leaves_held_joints_alone() -> None:
    """Part selection holds for our own paths too."""
    rig = Rig(safety=SafetyConfig(hold=("joint_1.pos",)))
    assert rig.loop.move_to(np.array([50.0, 50.0, 50.0])).reached
    np.testing.assert_allclose(rig.sent[-1], [50, 0, 50], rtol=1e-5)


def test_a_move_stops_and_gives_up_and_says_so() -> None:
    """On stop, on an arm that does not come along, and on a robot that is away."""
    rig, stop = Rig(), threading.Event()
    rig.arm.on_send = lambda count: stop.set() if count == 10 else None
    assert rig.loop.move_to(np.full(3, 50.0), stop=stop).outcome == "stopped"
    blocked = Rig()
    blocked.arm.on_read = lambda count: {"states": {"arm": np.zeros(3, np.float32)}}
    result = blocked.loop.move_to(np.array([50.0, 0.0, 50.0]))
    assert result.outcome == "not there"
    assert result.error is not None
    np.testing.assert_allclose(result.error, [-50, 0, -50])
    assert "joint_0.pos stopped 50.0 (" in blocked.loop.said(result)
    gone = Rig(env_patience_s=1.0)
    gone.arm.on_read = away(10, 10**9)
    assert gone.loop.move_to(np.full(3, 50.0)).outcome == "env lost"
    with pytest.raises(ValueError, match="3 finite numbers"):
        rig.loop.move_to(np.zeros(4))


def test_a_move_goes_on_from_where_a_lost_robot_came_back() -> None:
    """The path begins anew from the measured pose."""
    rig = Rig()
    lost = away(20, 60)

    def on_read(count: int) -> None:
        lost(count)
        if count == 60:
            rig.arm.pose = np.array([-30.0, 0.0, 0.0], np.float32)

    rig.arm.on_read = on_read
    assert rig.loop.move_to(np.array([60.0, 0.0, 0.0])).reached
    gap = int(np.argmax(np.diff(rig.times)))
    assert abs(rig.sent[gap + 1][0] + 30) <= rig.safety.speed[0] * TICK * (1 + 1e-6)
    np.testing.assert_allclose(rig.sent[-1], [60, 0, 0], atol=1e-3)
