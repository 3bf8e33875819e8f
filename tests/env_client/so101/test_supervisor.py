"""The supervisor with small children in place of the control process, and the arm stopped without a driver."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from env_client.control.heartbeat import Heartbeat, StopPlan
from env_client.control.supervisor import Supervisor
from env_client.envs.feetech_stop import stop
from kinematic_robot import STOPS, calibration, until
from virtual_so101.twin import Twin

Make = Callable[..., Any]

CHILD = """
import os, signal, sys, time
from env_client.control.heartbeat import Heartbeat, StopPlan
heart = Heartbeat(int(sys.argv[1]))
def beat(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        heart.beat()
        time.sleep(0.01)
heart.arm(StopPlan("kinematic_robot:record_stop", {"on_exit": "hold"}))
"""


@pytest.fixture(autouse=True)
def _no_stops() -> Iterator[None]:
    STOPS.clear()
    yield
    STOPS.clear()


def run(code: str, **options: Any) -> tuple[int, list[str]]:
    """The exit code and what was said."""
    said: list[str] = []
    supervisor = Supervisor(
        [sys.executable, "-c", CHILD + code], log=said.append, **{"hang_timeout_s": 1.0, **options}
    )
    return supervisor.run(), said


def later(seconds: float, *numbers: int) -> None:
    """Send this process signals, half a second apart."""

    def send() -> None:
        for number in numbers:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_a_child_that_lets_go_in_order() -> None:
    """Its exit code is the supervisor's, and nobody else touches the robot."""
    assert run("beat(0.2); heart.disarm(); sys.exit(3)") == (3, [])
    assert not STOPS


def test_a_crash_is_caught() -> None:
    """Exit without having let go: the plan is carried out."""
    code, said = run("beat(0.1); os.abort()")
    assert code == 1
    assert STOPS == [{"on_exit": "hold"}]
    assert "ended (signal SIGABRT) without letting the robot go" in said[0]
    assert "the supervisor stopped the robot: recorded" in said[0]


@pytest.mark.parametrize("hang", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_hang_is_caught(hang: str) -> None:
    """No beat: the child is killed and the plan carried out, soon after the timeout."""
    started = time.monotonic()
    code, said = run(f"beat(0.3); {hang}")
    assert code == 1
    assert len(STOPS) == 1
    assert "gave no sign of life for 1." in said[0]
    assert time.monotonic() - started < 10


def test_one_signal_is_one_clean_stop() -> None:
    """SIGTERM is forwarded once; the child's order is waited for."""
    later(1.5, signal.SIGTERM)
    code, said = run(
        "signal.signal(signal.SIGTERM, lambda *_: (beat(0.3), heart.disarm(), os._exit(0))); beat(60)"
    )
    assert (code, said) == (143, [])
    assert not STOPS


def test_ctrl_c_becomes_sigterm_for_the_child() -> None:
    """SIGINT of the terminal reaches the child as SIGTERM only."""
    later(1.5, signal.SIGINT)
    code, said = run(
        "signal.signal(signal.SIGTERM, lambda *_: (heart.disarm(), os._exit(0)));"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN; beat(60)"
    )
    assert (code, said) == (130, [])


def test_a_second_signal_does_not_wait() -> None:
    """A child that takes its time is killed at the second signal, and the plan carried out."""
    later(1.5, signal.SIGTERM, signal.SIGTERM)
    code, said = run("signal.signal(signal.SIGTERM, signal.SIG_IGN); beat(60)")
    assert code == 1 or code == 143
    assert len(STOPS) == 1
    assert "a second signal came" in said[0]


def test_a_clean_stop_that_never_ends() -> None:
    """Longer than the stop timeout: the supervisor does it."""
    later(1.5, signal.SIGTERM)
    _, said = run("signal.signal(signal.SIGTERM, signal.SIG_IGN); beat(60)", stop_timeout_s=0.5)
    assert len(STOPS) == 1
    assert "did not stop within 0.5 s" in said[0]


def test_timeouts_are_above_zero() -> None:
    """Zero would switch the watch off."""
    with pytest.raises(ValueError, match="must be above zero"):
        Supervisor(["true"], hang_timeout_s=0)


def test_a_lost_supervisor_is_seen() -> None:
    """When the reading end is gone, the control process knows."""
    read, write = os.pipe()
    heart = Heartbeat(write)
    heart.beat()
    assert not heart.lost
    os.close(read)
    time.sleep(0.05)
    heart.beat()
    assert heart.lost
    os.close(write)


def test_a_lost_supervisor_is_told_without_a_beat() -> None:
    """Who waits for a server does not beat, and still learns that nobody watches any more."""
    read, write = os.pipe()
    heart, told = Heartbeat(write), threading.Event()
    heart.on_loss(told.set)
    assert not told.wait(0.1)
    os.close(read)
    assert told.wait(20)
    assert heart.lost
    os.close(write)


def test_without_a_supervisor_it_does_nothing() -> None:
    """A heartbeat without a pipe is silent."""
    heart = Heartbeat(None)
    heart.on_loss(lambda: pytest.fail("there is none to be lost"))
    heart.arm(StopPlan("nothing:at_all"))
    heart.beat()
    assert not heart.lost


def arm_of(twin: Twin, **changed: Any) -> dict[str, Any]:
    joints = calibration().joints
    return {
        "port": str(twin.buses[0].link),
        "ids": [j.id for j in joints],
        "lower": [j.range_min for j in joints],
        "upper": [j.range_max for j in joints],
        "rest": [j.range_min + 300 for j in joints],
    } | changed


def test_hold_and_relax_on_the_bus(make_twin: Make) -> None:
    """Torque on at the measured pose; torque off."""
    twin = make_twin()
    assert "holds its pose, torque on" in stop([arm_of(twin)], "hold")
    goals = [servo.get("goal_position") for servo in twin.chains[0].servos]
    np.testing.assert_allclose(goals, calibration().to_ticks(twin.world.positions(0)), atol=2)
    assert all(servo.get("torque_enable") for servo in twin.chains[0].servos)
    assert stop([arm_of(twin)], "relax").endswith("torque off")
    assert not any(servo.get("torque_enable") for servo in twin.chains[0].servos)


def test_rest_pose_on_the_bus(make_twin: Make) -> None:
    """Slowly to the rest pose, then torque off; the log shows the speed."""
    twin = make_twin()
    assert "in its rest pose, torque off" in stop([arm_of(twin)], "rest-pose", ticks_per_s=800)
    rest = [j.range_min + 300 for j in calibration().joints]
    np.testing.assert_allclose(calibration().to_ticks(twin.world.positions(0)), rest, atol=25)
    goals = [event for event in twin.log.events() if event["kind"] == "goal"]
    pan = np.array([event["goal"]["shoulder_pan"] for event in goals])
    assert np.abs(np.diff(pan)).max() <= 800 * 0.02 + 1


def test_stopping_says_what_it_could_not_reach(make_twin: Make) -> None:
    """A missing port and a dead servo are told; other arms are stopped all the same."""
    twin = make_twin()
    result = stop([arm_of(twin, port="/nowhere"), arm_of(twin)], "relax", port_wait_s=0.1)
    assert "/nowhere: NOT REACHED (the port does not exist)" in result
    assert result.endswith("torque off")
    twin.chains[0].set_dead(2)
    assert "NOT COMPLETE (servo 3 on" in stop([arm_of(twin)], "hold")


def test_stopping_waits_for_a_port_that_comes_back(make_twin: Make) -> None:
    """An arm that is being plugged in again is reached."""
    twin = make_twin()
    twin.buses[0].unplug()
    threading.Timer(0.3, twin.buses[0].replug).start()
    assert "torque on" in stop([arm_of(twin)], "hold")
    assert until(lambda: all(servo.get("torque_enable") for servo in twin.chains[0].servos))
