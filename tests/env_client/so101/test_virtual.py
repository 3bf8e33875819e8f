"""`--env.type virtual` with the real twin (physics and rendering)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from env_client.envs.robots import VirtualConfig
from env_client.envs.virtual import VirtualRobot, attach
from kinematic_robot import until
from needs_gl import needs_gl
from virtual_so101.servo_log import goals_of, read_servo_log

Make = Callable[..., Any]

pytestmark = needs_gl


@pytest.mark.slow
def test_run_on_a_virtual_robot(start_server: Make, make_client: Make, tmp_path: Path) -> None:
    """The whole run: the twin starts with the client, is reset with a seed, and ends with it."""
    server, log, summary = start_server(horizon=30), tmp_path / "log.jsonl", tmp_path / "summary.json"
    client = make_client(
        ["--task", "lift", "--env.type", "virtual", "--env.seed", "5", "--env.servo-log", str(log)]
        + ["--port", str(server.port), "--episode-time-s", "3", "--hang-timeout-s", "5"]
        + ["--summary-path", str(summary)]
    )
    assert client.wait(120) == 0, client.output
    episode = json.loads(summary.read_text())["episodes"][0]
    assert episode["success"] is False
    assert episode["steps"] > 30
    events = read_servo_log(log)
    assert [event["seed"] for event in events if event["kind"] == "reset"][-1] == 5
    assert goals_of(events)


@pytest.mark.slow
def test_a_killed_client_takes_its_virtual_robot_with_it(start_server: Make, make_client: Make) -> None:
    """No virtual robot survives the command that started it."""
    server = start_server(horizon=30)
    client = make_client(["--task", "lift", "--env.type", "virtual", "--port", str(server.port)])
    assert until(lambda: "Connected!" in client.output, 90), client.output
    children = Path(f"/proc/{client.process.pid}/task/{client.process.pid}/children").read_text().split()
    client.process.send_signal(signal.SIGKILL)
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 20)


def test_attach_and_reset() -> None:
    """An env on a running twin: seeded reset that gives signs of life, success, a picture of the scene."""
    robot = VirtualRobot(VirtualConfig(seed=1), scene="lift")
    try:
        env = attach(robot.config)
        env.connect()
        waited: list[int] = []
        env.on_wait = lambda: waited.append(1)
        observation = env.reset(7)
        assert waited
        assert observation.images["front"].shape == (480, 640, 3)
        assert observation.images["front"].std() > 5
        assert env.success() is False
        assert env.spec.type == "so101"
        env.close()
    finally:
        robot.close()
