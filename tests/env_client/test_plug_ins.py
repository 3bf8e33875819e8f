"""Robots of other packages: found by their entry points, and never in the way of the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROBOT = """
from dataclasses import dataclass
from env_client.envs.env import EnvError
from env_client.envs.plug_ins import PlugInConfig

@dataclass(frozen=True)
class RobotConfig(PlugInConfig):
    \"\"\"A robot.\"\"\"

    # Where the robot listens.
    address: str = "here"

    def make_env(self, *, task, dry_run):
        raise EnvError(f"asked for {self.address}, dry run {dry_run}")

class NoDataclass(PlugInConfig):
    address: str = "here"
"""


# The same robot, which can be read, and has a camera of its own.
WITH_CAMERA = (
    ROBOT.replace('raise EnvError(f"asked for {self.address}, dry run {dry_run}")', "return Robot()")
    + """
import time
import numpy as np
from env_client.envs.env import EnvSpec, Observation
from env_client.wire import StateSpec

class Robot:
    spec = EnvSpec(
        "walker", ("hip.pos",), "rad", np.array([-1.0]), np.array([1.0]), np.ones(1), np.zeros(1, bool),
        np.arange(1), (StateSpec("leg", 1),), ("eye",),
    )

    def connect(self):
        pass

    close = connect

    def get_observation(self):
        image = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
        leg = np.array([0.25], np.float32)
        return Observation({"eye": image}, {"leg": leg}, capture_time=time.monotonic(), image_age={"eye": 0.01})
"""
)


def install(folder: Path, module: str, *points: str) -> dict[str, str]:
    """Put a distribution with one module and these entry points into `folder`; the environment that finds it."""
    folder.mkdir(exist_ok=True)
    (folder / "robot_for_tests.py").write_text(module)
    info = folder / "robot_for_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robot-for-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[env_client.envs]", *points]) + "\n")
    return {"PYTHONPATH": str(folder)}


def check_robot(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "env_client.check_robot", *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


def test_a_plug_in_is_a_type_with_flags_of_its_own(tmp_path: Path):
    """Its fields are flags with help, and its env is made from them."""
    env = install(tmp_path, ROBOT, "walker = robot_for_tests:RobotConfig")
    shown = check_robot(env, "--env.type", "walker", "--help")
    assert shown.returncode == 0
    assert "--env.address" in shown.stdout
    assert "Where the robot listens." in shown.stdout
    made = check_robot(env, "--env.type", "walker", "--env.address", "there")
    assert (made.returncode, made.stderr) == (2, "check_robot: asked for there, dry run True\n")


@pytest.mark.parametrize(
    ("module", "point", "reason"),
    [
        ("import a_driver_that_is_not_there", "broken = robot_for_tests:RobotConfig", "ModuleNotFoundError"),
        (ROBOT, "broken = robot_for_tests:EnvError", "derived from PlugInConfig was expected"),
        (ROBOT, "broken = robot_for_tests:NoDataclass", "NoDataclass is no dataclass"),
        (ROBOT, "so101 = robot_for_tests:RobotConfig", "already registered as so101"),
    ],
)
def test_a_plug_in_that_cannot_be_used_costs_only_itself(
    tmp_path: Path, module: str, point: str, reason: str
):
    """It is named with the reason; the other robots, one of the same name included, work as before."""
    env = install(tmp_path, module, point)
    done = check_robot(env, "--env.type", "so101", "--help")
    name = point.partition(" ")[0]
    assert f"check_robot: the robot '{name}' of a plug-in (robot_for_tests:" in done.stderr
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 0
    assert "--env.robot.port" in done.stdout
    assert "--env.address" not in done.stdout


def test_a_type_that_nobody_brings_is_answered_with_those_that_are_there(tmp_path: Path):
    """Plug-ins stand among the robots that the sentence lists."""
    env = install(tmp_path, ROBOT, "walker = robot_for_tests:RobotConfig")
    done = check_robot(env, "--env.type", "wlaker")
    assert done.returncode == 2
    assert "walker" in done.stderr
    assert "so101" in done.stderr


def test_a_robot_that_reads_its_cameras_by_itself_is_checked(tmp_path: Path):
    """Its joints and pictures are shown; how often a picture comes, only the robot knows."""
    env = install(tmp_path / "plug_in", WITH_CAMERA, "walker = robot_for_tests:RobotConfig")
    done = check_robot(env, "--env.type", "walker", "--time-s", "0.1", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hip.pos  0.25" in done.stdout
    assert "32x24" in done.stdout
    assert (tmp_path / "out" / "eye.png").stat().st_size > 100
