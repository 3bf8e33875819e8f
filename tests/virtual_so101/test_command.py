"""The command as a child process: real physics, real pictures, LeRobot's driver on the files that it wrote."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs_gl import needs_gl
from virtual_so101.calibration import JOINTS
from virtual_so101.control import ControlClient
from virtual_so101.servo_log import goals_of, read_servo_log

COMMAND = [sys.executable, "-m", "virtual_so101.cli"]
# Seconds; generous, as the cores are shared.
START_LIMIT, END_LIMIT = 90.0, 30.0


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], dict]:
    """Start the command with ports of its own; the process and what it says about itself."""
    command = [*COMMAND, "--port-link", str(folder / "port"), "--state-dir", str(folder / "state")]
    command += ["--control-port", "0", "--camera-port", "0", "--exit-with-parent", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ready = folder / "state" / "robot.json"
    end = time.monotonic() + START_LIMIT
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"the command did not start:\n{process.communicate()[0]}")
        time.sleep(0.05)
    return process, json.loads(ready.read_text())


def end(process: subprocess.Popen[str]) -> str:
    """Send SIGTERM and wait; what it printed."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=END_LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A running virtual robot for the tests of this module: its description and its folder."""
    folder = tmp_path_factory.mktemp("robot")
    process, info = start(folder, "--servo-log", str(folder / "servo.jsonl"))
    yield info, folder
    end(process)


@pytest.fixture(scope="module")
def follower(robot, connect):
    """LeRobot's follower with both cameras, built from the written files alone."""
    pytest.importorskip("lerobot")
    from lerobot.cameras.zmq import ZMQCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    info, _ = robot
    cameras = json.loads(Path(info["camera_config_path"]).read_text())
    config = SO101FollowerConfig(
        port=info["ports"][0],
        id=info["robot_id"],
        calibration_dir=Path(info["calibration_dir"]),
        use_degrees=False,
        cameras={
            name: ZMQCameraConfig(**{key: value for key, value in fields.items() if key != "type"})
            for name, fields in cameras.items()
        },
    )
    robot = SO101Follower(config)
    connect(robot)
    yield robot
    robot.disconnect()


@needs_gl
def test_a_loop_with_cameras_follows_commands(robot, follower):
    """The arm goes where it is told, and both cameras show it."""
    info, folder = robot
    assert follower.is_calibrated
    with ControlClient(info["control_port"]) as control:
        control.reset(seed=5)
    before = follower.get_observation()
    assert before["front"].shape == before["wrist"].shape == (480, 640, 3)
    start_pose = {f"{name}.pos": before[f"{name}.pos"] for name in JOINTS}
    deadline = time.monotonic()
    ticks = 60
    for tick in range(1, ticks + 1):
        action = dict(start_pose)
        action["shoulder_pan.pos"] += 40.0 * min(1.0, tick / 30)
        follower.send_action(action)
        observation = follower.get_observation()
        deadline += 1 / 30
        time.sleep(max(0.0, deadline - time.monotonic()))
    assert observation["shoulder_pan.pos"] == pytest.approx(action["shoulder_pan.pos"], abs=3.0)
    time.sleep(0.3)
    after = follower.get_observation()
    for camera in ("front", "wrist"):
        assert np.abs(after[camera].astype(int) - before[camera]).mean() > 1.0, camera
    pan = goals_of(read_servo_log(folder / "servo.jsonl"))[0, "shoulder_pan"].ticks
    assert len(pan) >= ticks
    assert pan.min() >= info["range_min_ticks"][0]
    assert pan.max() <= info["range_max_ticks"][0]


@needs_gl
def test_the_control_socket_resets_and_steps(robot, follower):
    """Pause, a seeded reset, steps in lock step, resume; the same seed gives the same picture."""
    info, _ = robot
    with ControlClient(info["control_port"]) as control:
        assert control.info()["prompt"] == "lift up the red cube"
        control.pause()
        pictures = []
        for _ in range(2):
            control.reset(seed=11)
            control.step(1 / 30)
            pictures.append(control.render())
        assert pictures[0] == pictures[1]
        control.reset(seed=12)
        assert control.render() != pictures[0]
        assert control.step(0.5)["success"] is False
        before = control.status()["time"]
        time.sleep(0.2)
        assert control.status()["time"] == before
        control.resume()
        time.sleep(0.5)
        assert control.status()["time"] > before


def fresh(read):
    """What `read` gives twice in a row while time stands still: a reply that a busy machine delayed leaves the driver one
    cycle behind."""
    seen = [read(), read()]
    while seen[-1] != seen[-2]:
        assert len(seen) < 20, seen
        seen.append(read())
    return seen[-1]


def positions(follower):
    return follower.bus.sync_read("Present_Position", num_retry=5)


@needs_gl
def test_an_episode_repeats_in_lock_step(robot, follower):
    """The same seed and the same commands through the bus: the same joints and the same pictures."""
    info, _ = robot
    runs = []
    with ControlClient(info["control_port"]) as control:
        control.pause()
        for _ in range(2):
            control.reset(seed=21)
            sent = control.status()["buses"][0]["goal_packets"]
            action = {f"{name}.pos": value for name, value in fresh(lambda: positions(follower)).items()}
            trace = []
            for tick in range(1, 16):
                action["shoulder_pan.pos"] += 2.0
                action["elbow_flex.pos"] -= 1.0
                follower.send_action(action)
                control.step(1 / 30, goals=[sent + tick], pictures=False)
                trace.append(fresh(lambda: positions(follower)))
            runs.append((trace, control.render()))
        control.resume()
    assert runs[0] == runs[1]
    assert runs[0][0][-1]["shoulder_pan"] - runs[0][0][0]["shoulder_pan"] > 15.0


@needs_gl
def test_a_camera_goes_blind_on_demand(robot, follower):
    """A fault through the control socket reaches the driver, and clear ends it."""
    info, _ = robot
    with ControlClient(info["control_port"]) as control:
        control.fault("blind:wrist")
        time.sleep(1.5)
        with pytest.raises(TimeoutError, match="too old"):
            follower.get_observation()
        control.fault("clear")
        time.sleep(0.5)
        follower.get_observation()


def test_it_ends_cleanly_without_cameras_and_with_two_arms(tmp_path):
    """SIGTERM: status 0, links and robot.json gone; the output names the command line to use."""
    process, info = start(tmp_path, "--task", "sort", "--no-cameras", "--fault", "lost:0.01")
    assert [Path(port).is_symlink() for port in info["ports"]] == [True, True]
    assert {p.name for p in (tmp_path / "state" / "calibration").iterdir()} == {
        "virtual_left.json",
        "virtual_right.json",
    }
    output = end(process)
    assert process.returncode == 0, output
    assert "--env.type bi_so101" in output
    assert f"--env.robot.calibration_dir {info['calibration_dir']}" in output
    assert not any(os.path.lexists(port) for port in info["ports"])
    assert not (tmp_path / "state" / "robot.json").exists()


def test_a_killed_robot_leaves_no_port_behind(tmp_path):
    """SIGKILL: the bus process notices and takes the link away."""
    process, info = start(tmp_path, "--no-cameras")
    process.kill()
    process.communicate(timeout=END_LIMIT)
    limit = time.monotonic() + END_LIMIT
    while os.path.lexists(info["ports"][0]) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not os.path.lexists(info["ports"][0])


def refuse(tmp_path: Path, *flags: str, **environment: str) -> str:
    """Run the command, which must not start; its error."""
    done = subprocess.run(
        [*COMMAND, "--port-link", str(tmp_path / "port"), "--state-dir", str(tmp_path / "state"), *flags],
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_occupied_path_is_refused(tmp_path):
    """A file where the port should be stays untouched."""
    (tmp_path / "port").write_text("mine")
    error = refuse(tmp_path, "--no-cameras", "--control-port", "0")
    assert "--port-link" in error
    assert (tmp_path / "port").read_text() == "mine"


def test_a_busy_control_port_is_refused(tmp_path):
    """One line that names the port and the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refuse(tmp_path, "--no-cameras", "--control-port", str(port))
    assert str(port) in error
    assert "--control-port" in error


def test_missing_opengl_names_the_packages(tmp_path):
    """Where nothing can draw, the error says what to install."""
    error = refuse(tmp_path, "--control-port", "0", "--camera-port", "0", MUJOCO_GL="off")
    for package in ("libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libosmesa6"):
        assert package in error


def test_an_unknown_fault_is_refused(tmp_path):
    """The known ones are listed."""
    assert "lost" in refuse(tmp_path, "--fault", "boom")


def test_help_is_quick():
    """--help imports nothing heavy."""
    code = (
        "import sys, virtual_so101.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('mujoco', 'numpy', 'lerobot', 'torch', 'zmq', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--servo-log" in done.stdout
