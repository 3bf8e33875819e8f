"""A leader arm moves the follower between episodes, through the same loop and the same limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_client.client_config import LeaderConfig
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter
from env_client.envs.env import EnvError
from env_client.teleop import LeaderArms, LeaderSource
from kinematic_robot import calibration, until
from virtual_so101.servo_log import goals_of

Make = Callable[..., Any]


def test_the_follower_follows_the_leader(make_twin: Make, make_env: Make, tmp_path: Path) -> None:
    """What a hand does with the leader is what the follower does, no faster than allowed; a leader that is
    unplugged holds it."""
    twin = make_twin(2)
    env = make_env(port=str(tmp_path / "port0"), id="virtual_left")
    env.connect()
    env.engage()
    leaders = LeaderArms(
        LeaderConfig(
            port=str(tmp_path / "port1"), id="virtual_right", calibration_dir=str(tmp_path / "calibration")
        ),
        use_degrees=False,
    )
    leaders.connect()
    source = LeaderSource(leaders)
    stop = threading.Event()
    loop = ControlLoop(env, source, SafetyFilter(env.spec, SafetyConfig(max_velocity=1.0), 30.0), 30.0)
    thread = threading.Thread(target=lambda: loop.run_episode(stop=stop, reset_env=False), daemon=True)
    thread.start()
    try:
        wanted = np.array([0.4, -0.3, 0.2, 0.1, 0.5, 0.9])
        twin.move_by_hand(1, wanted)
        follows = calibration(0)
        assert until(lambda: np.allclose(twin.world.positions(0), wanted, atol=0.03), 8)
        twin.buses[1].unplug()
        time.sleep(0.4)
        count = source.stats.starved
        assert until(lambda: source.stats.starved > count)
        assert np.allclose(twin.world.positions(0), wanted, atol=0.03)
    finally:
        stop.set()
        thread.join(5)
        source.close()
        leaders.close()
    commands = goals_of(twin.log.events())[(0, "shoulder_pan")]
    assert commands.ticks.max() <= follows.joints[0].range_max
    # 1 rad/s is 652 ticks/s, 22 a tick.
    assert np.abs(np.diff(commands.ticks)).max() <= 24


def test_a_leader_that_is_not_ready_is_a_sentence(make_twin: Make, tmp_path: Path) -> None:
    """No port and no calibration are said before anything moves."""
    make_twin()
    with pytest.raises(EnvError, match="does not exist; is it plugged in"):
        LeaderArms(LeaderConfig(port=str(tmp_path / "nothing")), use_degrees=False).connect()
    config = LeaderConfig(port=str(tmp_path / "port0"), calibration_dir=str(tmp_path / "calibration"))
    with pytest.raises(EnvError, match="has no calibration file"):
        LeaderArms(config, use_degrees=False).connect()


def test_leader_flags() -> None:
    """One port, or two."""
    assert LeaderConfig(left_port="a", right_port="b").ports == ("a", "b")
    assert LeaderConfig().ports == ()
    with pytest.raises(ValueError, match="both"):
        LeaderConfig(left_port="a")
    with pytest.raises(ValueError, match="for one arm"):
        LeaderConfig(port="a", left_port="b", right_port="c")
