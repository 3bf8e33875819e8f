"""A disk that is full where the commands' own output goes: the robot is driven and left in order, the server serves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_world import wait_for_port
from numpy_policy import Options, expected_chunk, write_checkpoint
from robot_fixtures import robot_process, server_process
from serving_parts import CAMERAS, client, make_observation

# Every write to it fails like one to a full disk.
FULL = Path("/dev/full")


def test_a_server_whose_output_has_no_room_serves(tmp_path: Path) -> None:
    """It loads, serves, refuses and ends in order."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = write_checkpoint(tmp_path, cameras=CAMERAS, behaviour="raise", behaviour_prompt="bad")
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1", "--port", str(port)]
    with FULL.open("w") as full:
        server = subprocess.Popen([*command, "--policy.path", str(folder)], stdout=full, stderr=full)
    try:
        wait_for_port(port, 120)
        with client(port) as policy:
            for seed in range(3):
                with contextlib.suppress(Exception):
                    policy.infer(make_observation(seed), prompt="bad")
                obs = make_observation(seed)
                expected = expected_chunk(Options(cameras=CAMERAS), obs)
                assert np.array_equal(policy.infer(obs)["actions"], expected)
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_client_whose_output_has_no_room_drives_and_leaves_in_order(tmp_path: Path) -> None:
    """Torque off as asked, although nobody could be told."""
    with robot_process(tmp_path) as robot, server_process(tmp_path / "policy", horizon=20) as server:
        flags = [*robot.flags, "--task", "lift", "--port", str(server.port), "--no-panel", "--no-record"]
        flags += ["--log.dir", str(tmp_path / "log"), "--on-exit", "relax", "--hang-timeout-s", "5"]
        with FULL.open("w") as full:
            run = subprocess.Popen(
                [sys.executable, "-m", "env_client.run_env_client", *flags],
                stdout=full,
                stderr=full,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 180
            while len(robot.events()) < 60:
                assert run.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            run.send_signal(signal.SIGTERM)
            assert run.wait(60) == 143
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        assert robot.torque()
        assert not any(robot.torque().values())
