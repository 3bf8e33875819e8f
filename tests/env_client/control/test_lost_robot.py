"""The loop when its robot goes away, comes back, answers late or takes no command."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from control_doubles import counting_chunk, reply
from env_client.envs.env import EnvError
from loop_rig import TICK, Rig, away


def test_a_robot_that_goes_away_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent meanwhile; then the measured pose and new chunks count; one line each way."""
    rig = Rig(lambda request: reply(np.full((50, 3), 90.0), request))
    lost = away(40, 100)

    def on_read(count: int) -> None:
        lost(count)
        if count == 100:
            # Unplugged, the arm has sunk.
            rig.arm.pose = np.array([-40.0, -40.0, 10.0], np.float32)

    rig.arm.on_read = on_read
    with caplog.at_level(logging.WARNING):
        result = rig.loop.run_episode(time_s=5)
    assert result.env_errors == 60
    assert result.outcome == "time"
    gap = int(np.argmax(np.diff(rig.times)))
    assert np.diff(rig.times)[gap] == pytest.approx(61 * TICK)
    assert (np.abs(rig.sent[gap + 1] - [-40, -40, 10]) <= rig.safety.speed * TICK * (1 + 1e-6)).all()
    assert len({request.generation for request in rig.server.taken}) == 2
    assert [record.message.split()[2] for record in caplog.records] == ["cannot", "is"]
    # The rate is what it was.
    np.testing.assert_allclose(np.diff(rig.times)[gap + 1 :], TICK)


def test_a_hiccup_keeps_the_plan() -> None:
    """One lost packet: the servos kept their goal, so the same chunk goes on from the same command."""
    rig = Rig(counting_chunk)
    rig.arm.on_read = away(40, 42)
    result = rig.loop.run_episode(time_s=3)
    assert result.env_errors == 2
    assert result.starved == 0
    assert len({request.generation for request in rig.server.taken}) == 1
    rig.check_speed()


def test_a_command_that_fails_is_counted() -> None:
    """The bus may fail when writing as well."""
    rig = Rig()

    def on_send(count: int) -> None:
        if rig.arm.reads == 50:
            raise EnvError("port is in use")

    rig.arm.on_send = on_send
    result = rig.loop.run_episode(time_s=3)
    assert result.env_errors == 1
    assert result.outcome == "time"


@pytest.mark.parametrize("arrives", [True, False])
def test_commands_that_fail_do_not_add_up(arrives: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Ten failed writes, of which nobody knows whether they arrived: the arm never gets more than one step."""
    rig = Rig(lambda request: reply(np.full((50, 3), 90.0), request))

    def fail(count: int) -> None:
        if 30 <= rig.arm.reads < 36:
            raise EnvError("port is in use")

    rig.arm.on_send, rig.arm.after_send = (
        (lambda count: None, fail) if arrives else (fail, lambda count: None)
    )
    with caplog.at_level(logging.WARNING):
        result = rig.loop.run_episode(time_s=3)
    assert result.env_errors == 6
    assert len(caplog.records) == 2
    rig.check_speed()


def test_a_robot_that_can_be_read_but_not_commanded_is_lost_in_the_end() -> None:
    """Readings alone do not make it back."""
    rig = Rig(env_patience_s=1.0)

    def fail(count: int) -> None:
        raise EnvError("port is in use")

    rig.arm.on_send = fail
    assert rig.loop.run_episode(time_s=10).outcome == "env lost"
    assert len({request.generation for request in rig.server.taken}) <= 2


def test_a_robot_that_stays_away_ends_the_episode() -> None:
    """After the patience that was configured, not before."""
    rig = Rig(env_patience_s=2.0)
    rig.arm.on_read = away(40, 10**9)
    result = rig.loop.run_episode(time_s=60)
    assert result.outcome == "env lost"
    assert result.duration_s == pytest.approx(40 * TICK + 2.0, abs=0.1)


def test_an_episode_waits_for_a_robot_that_is_not_ready() -> None:
    """reset is tried at every tick until the patience is over; stop ends the waiting."""
    rig = Rig(env_patience_s=2.0)
    rig.arm.on_read = away(1, 20)
    assert rig.loop.run_episode(max_steps=5).outcome == "steps"
    rig.arm.on_read = away(1, 10**9)
    assert rig.loop.run_episode(max_steps=5).outcome == "env lost"
    stop = threading.Event()
    stop.set()
    assert rig.loop.run_episode(stop=stop).outcome == "stopped"


def test_a_state_that_is_not_finite_is_no_observation() -> None:
    """Treated as a robot that cannot be read."""
    rig = Rig()
    rig.arm.on_read = lambda count: (
        {"states": {"arm": np.full(3, np.nan, np.float32)}} if 20 <= count < 30 else None
    )
    assert rig.loop.run_episode(time_s=2).env_errors == 10


def test_a_defect_of_the_env_is_raised() -> None:
    """Anything but EnvError ends the loop: whoever runs it applies the exit rule."""
    rig = Rig()

    def broken(count: int) -> None:
        if count == 30:
            raise RuntimeError("a bug")

    rig.arm.on_read = broken
    with pytest.raises(RuntimeError, match="a bug"):
        rig.loop.run_episode(time_s=5)
