"""The flags of `run_env_client`: tasks, prompts, aliases, help, and what is refused at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from env_client.cli import CliError, parse
from env_client.client_config import ALIASES, ClientConfig, find_task, with_env_type
from env_client.envs.env import EnvError
from env_client.envs.make import read_robot_file
from env_client.envs.robots import BiSO101Config, LeRobotConfig, SO101Config, VirtualConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def config(*flags: str) -> ClientConfig:
    return parse(ClientConfig, with_env_type(flags), prog="run_env_client", aliases=ALIASES)


def test_a_task_brings_its_robot_and_prompt() -> None:
    """`--task sort` alone is a two-armed run with the task's prompt."""
    assert isinstance(config("--task", "lift").env, SO101Config)
    assert isinstance(config("--task", "sort").env, BiSO101Config)
    assert isinstance(config("--task=sort", "--env.type", "virtual").env, VirtualConfig)
    assert find_task("lift").prompt == "lift up the red cube"
    assert find_task("lift").cameras == ("front", "wrist")
    assert find_task("pick up the spoon").prompt == "pick up the spoon"
    assert find_task(None).prompt == ""
    with pytest.raises(CliError, match=r"tasks/lfit.* was not found"):
        find_task("lfit")


def test_flags_as_people_type_them() -> None:
    """Dashes and underscores, the first documents' spellings, and LeRobot's names below --env.robot."""
    made = config(
        "--env.type", "bi_so101", "--env.robot.left_arm_config.port", "/dev/l", "--env.robot.id", "pair",
        "--server", "10.0.0.2:8001", "--control-freq", "20", "--dry-run", "--max-velocity", "0.5", "--smooth", "3",
        "--binarize-gripper", "--hold", "wrist_roll", "--on-exit", "rest-pose", "--execution", "sync",
    )  # fmt: skip
    assert isinstance(made.env, BiSO101Config)
    assert made.env.robot.left_arm_config.port == "/dev/l"
    assert made.env.robot.id == "pair"
    assert (made.host, made.port, made.fps) == ("10.0.0.2", 8001, 20)
    assert made.loop.dry_run
    assert (made.safety.max_velocity, made.safety.smooth, made.safety.binarize_gripper) == (0.5, 3, True)
    assert made.safety.hold == ("wrist_roll",)
    assert (made.on_exit, made.execution) == ("rest-pose", "sync")


def test_any_lerobot_robot() -> None:
    """`lerobot` takes LeRobot's robot type and its fields."""
    env = config(
        "--env.type", "lerobot", "--env.robot.type", "koch_follower", "--env.robot.port", "/dev/x"
    ).env
    assert isinstance(env, LeRobotConfig)
    assert env.robot == {"type": "koch_follower", "port": "/dev/x"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--on-exit", "drop"], "drop"),
        (["--max-velocity", "0"], "max_velocity is 0"),
        (["--num-episodes", "0"], "at least 1"),
        (["--hang-timeout-s", "0"], "above 0"),
        (["--fps", "0"], "above 0 Hz"),
        (["--leader.left-port", "/dev/x"], "both"),
        (["--env.robot.prot", "/dev/x"], "did you mean --env.robot.port"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and what is wrong."""
    with pytest.raises(SystemExit) as ended:
        config(*flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["so101", "bi_so101", "lerobot"])
def test_robot_files(kind: str) -> None:
    """The shipped files can be read and their poses have the robot's size."""
    file = read_robot_file(SO101Config(), kind)
    sizes = {"so101": 6, "bi_so101": 12}
    if kind in sizes:
        assert file.ready_pose is not None
        assert len(file.ready_pose) == sizes[kind]
        assert file.rest_pose is not None
        assert len(file.rest_pose) == sizes[kind]
    else:
        assert file.joints


def test_a_wrong_robot_file_is_a_sentence(tmp_path: Path) -> None:
    """Unknown keys and missing files name the file and the flag."""
    path = tmp_path / "robot.yaml"
    path.write_text("pose: [1]")
    with pytest.raises(EnvError, match=r"robot.yaml cannot be used"):
        read_robot_file(SO101Config(robot_config_path=str(path)), "so101")
    with pytest.raises(EnvError, match=r"--env.robot-config-path names another one"):
        read_robot_file(SO101Config(robot_config_path=str(tmp_path / "no.yaml")), "so101")


def test_nothing_heavy_is_imported() -> None:
    """Neither command loads torch or LeRobot before it must."""
    code = (
        "import sys, env_client.run_env_client, env_client.check_robot, env_client.rollout, env_client.envs.so101;"
        "print([m for m in ('torch', 'lerobot', 'cv2', 'serial') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
