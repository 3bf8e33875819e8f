"""`run_env_client --env.type astribot` as its users start it: every process is a real one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astribot_parts import CAMERAS, FPS, MakeEnv, MakeRun, Robot, assert_within_limits, spec_of
from env_client.envs.astribot_make import ADDRESS
from env_client.wire import CameraSpec, PolicySpec
from numpy_policy import write_checkpoint
from processes import policy_server, running
from robot_fixtures import make_client, start_server

__all__ = ["make_client", "start_server"]

Make = Callable[..., Any]
PATIENCE_S = 90.0


def wave(spec: PolicySpec, **options: Any) -> dict[str, Any]:
    """The NumPy policy's options for this spec: a gentle wave around the present state."""
    plain = spec.to_wire()
    fields = ("action_dim", "action_names", "unit", "cameras", "states")
    return {name: plain[name] for name in fields} | {"horizon": 50, "amplitude": 0.05} | options


@pytest.fixture
def start_client(make_client: Make, robot: Robot) -> Make:
    def start(port: int, *flags: str) -> Any:
        common = [
            "--env.type",
            "astribot",
            "--env.astribot.virtual",
            "--env.astribot.virtual-address",
            robot.address,
        ]
        # A busy machine is no robot that hangs.
        patient = ["--env.astribot.call-timeout-s", "2", "--hang-timeout-s", "5"]
        return make_client(
            [*common, *patient, "--server", f"127.0.0.1:{port}", "--prompt", "tidy up", *flags]
        )

    return start


def wait_until(condition: Callable[[], object], client: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, client.output
        assert client.process.poll() is None, client.output
        time.sleep(0.05)


def test_from_the_ready_pose_to_a_stopped_robot(
    start_client: Make, start_server: Make, robot: Robot, hardware: Any, tmp_path: Path
) -> None:
    """Flags as the robot's users know them; the ready pose first, and stop_robot at the end."""
    server = start_server(**wave(spec_of(22)))
    chassis = robot.control.position()["astribot_chassis"]
    client = start_client(
        server.port, "--max-frames", "30", "--control-freq", "30", "--episode", "7", "--smooth", "3", "--binarize-gripper",
        "--no-torso", "--control-way", "direct", "--max-velocity", "1.2", "--summary-path", str(tmp_path / "summary.json"),
    )  # fmt: skip
    assert client.wait(PATIENCE_S) == 0, client.output
    episode = json.loads((tmp_path / "summary.json").read_text())["episodes"][0]
    assert (episode["episode"], episode["outcome"], episode["steps"]) == (7, "steps", 30)
    assert "The robot was stopped and stands." in client.output
    kinds = [entry["kind"] for entry in robot.log]
    assert kinds[-2:] == ["stop_robot", "released"]
    assert kinds.index("restart_robot") < kinds.index("set_joints_position")
    # The way to the ready pose ended there; the torso was not moved at all.
    arm, ready = robot.goals("astribot_arm_left"), np.array(hardware.ready_pose["arm_left"])
    assert np.abs(arm - ready).max(axis=1).min() < 1e-3
    assert not len(robot.goals("astribot_torso"))
    assert set(robot.goals("astribot_gripper_left")[-10:].ravel()) <= {0.0, 100.0}
    assert robot.control.position()["astribot_chassis"] == chassis
    assert_within_limits(robot)


@pytest.mark.parametrize("how", ["killed", pytest.param("asked", marks=pytest.mark.slow)])
def test_every_way_out_stops_the_robot(
    how: str, start_client: Make, start_server: Make, robot: Robot
) -> None:
    """SIGKILL for the control process: another process takes the rights and stops; SIGINT: it does so itself."""
    server = start_server(**wave(spec_of(16, cameras=())))
    client = start_client(server.port, "--no-move-to-ready", "--no-enable-camera")
    wait_until(lambda: len(robot.commands) > 20, client)
    driver = robot.commands[-1]["client"]
    os.kill(
        client.control_pid if how == "killed" else client.process.pid,
        signal.SIGKILL if how == "killed" else signal.SIGINT,
    )
    code = client.wait(PATIENCE_S)
    assert code == (1 if how == "killed" else 130), client.output
    stop = next(entry for entry in robot.log if entry["kind"] == "stop_robot")
    assert "refused" not in stop
    assert (stop["client"] == driver) == (how == "asked")
    assert robot.control.state()["stopped"]
    assert ("the supervisor stopped the robot: the robot was stopped and stands" in client.output) == (
        how == "killed"
    )


SLOW_SDK = """
import time
from virtual_astribot.client import Astribot as _Quick
class Astribot(_Quick):
    def stop_robot(self):
        time.sleep(3)
        return super().stop_robot()
"""


def test_a_stop_that_takes_long_is_not_killed(
    make_client: Make, start_server: Make, robot: Robot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stop_robot` returns after three seconds, the supervisor for 1.5 s of silence: the control process itself stops it."""
    folder = tmp_path / "core" / "astribot_api"
    folder.mkdir(parents=True)
    (folder / "astribot_client.py").write_text(SLOW_SDK)
    monkeypatch.setenv(ADDRESS, robot.address)
    client = make_client(
        ["--env.type", "astribot", "--env.astribot.sdk-path", str(tmp_path), "--env.astribot.call-timeout-s", "2",
         "--hang-timeout-s", "1.5", "--server", f"127.0.0.1:{start_server(**wave(spec_of(16, cameras=()))).port}",
         "--max-frames", "5", "--no-move-to-ready", "--no-enable-camera", "--prompt", "x"]
    )  # fmt: skip
    assert client.wait(PATIENCE_S) == 0, client.output
    assert "The robot was stopped and stands." in client.output
    assert "the supervisor stopped the robot" not in client.output
    assert len([entry for entry in robot.log if entry["kind"] == "stop_robot"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "flags", "sentence"),
    [
        (spec_of(22, cameras=()), ["--on-exit", "relax"], "cannot be relaxed by its SDK"),
        (
            spec_of(22, cameras=()),
            ["--env.layout", "astribot_s1_16"],
            "actions of 22 values, the robot (astribot) has 16",
        ),
        (
            spec_of(22, cameras=(), unit="degrees"),
            [],
            "works in the unit degrees, the robot (astribot) in rad",
        ),
        (spec_of(22, cameras=(CameraSpec("ceiling", 96, 96),)), [], "looks through ceiling"),
    ],
)
def test_what_does_not_fit_moves_nothing(
    spec: PolicySpec, flags: list[str], sentence: str, start_client: Make, start_server: Make, robot: Robot
) -> None:
    client = start_client(start_server(**wave(spec)).port, *flags)
    assert client.wait(PATIENCE_S) == 2, client.output
    assert sentence in client.output
    assert not robot.commands


@pytest.mark.slow
def test_the_client_names_the_model(start_client: Make, robot: Robot, tmp_path: Path) -> None:
    """`--config NAME --checkpoint DIR` on an idle server of ours."""
    write_checkpoint(tmp_path / "wave", **wave(spec_of(16, cameras=())))
    command = (sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1", "--port", "0")
    with running(*command, "--policy.root", str(tmp_path)) as server:
        port = int(server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)")[1])
        client = start_client(
            port, "--checkpoint", "wave", "--device", "cpu", "--max-frames", "5", "--no-move-to-ready"
        )
        assert client.wait(PATIENCE_S) == 0, client.output
        assert "numpy_test: 50 actions of 16 values" in client.output


@pytest.mark.slow
def test_a_virtual_robot_is_started_and_ended_with_the_client(make_client: Make, start_server: Make) -> None:
    """`--env.virtual` alone; it says that it is not the vendor's."""
    server = start_server(**wave(spec_of(16, cameras=())))
    client = make_client(
        ["--env.type", "astribot", "--env.virtual", "--port", str(server.port), "--max-frames", "3", "--no-move-to-ready",
         "--no-enable-camera", "--env.astribot.call-timeout-s", "2", "--hang-timeout-s", "5"]
    )  # fmt: skip
    assert client.wait(PATIENCE_S) == 0, client.output
    assert "a stand-in, not the vendor's" in client.output
    assert "The robot was stopped and stands." in client.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_300_frames_with_a_tiny_pi05(
    make_env: MakeEnv, make_run: MakeRun, robot: Robot, hardware: Any, tmp_path: Path
) -> None:
    """22 actions at 30 Hz from three JPEG cameras: nothing starves, nothing leaves a limit, the chassis stands, and no
    seam between chunks is larger than the motion inside them."""
    from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

    names = spec_of(22).action_names
    ready = np.concatenate(
        [hardware.ready_pose[part] for part in dict.fromkeys(n.split(".")[0] for n in names)]
    )
    is_gripper = np.array(["gripper" in name for name in names])
    # A real policy's actions lie around the poses that it was trained on; grippers as recorded, beyond their range.
    low = np.where(is_gripper, -12, ready - 0.3)
    high = np.where(is_gripper, 164, ready + 0.3)
    checkpoint = make_tiny_checkpoint(
        tmp_path / "tiny",
        "pi05",
        cameras=CAMERAS,
        action_dim=22,
        low=low.tolist(),
        high=high.tolist(),
        num_inference_steps=5,
    )
    arguments = ("--device", "cpu", "--policy.embodiment", "astribot_s1_22")
    with policy_server(checkpoint, *arguments) as (_, port):
        policy = spec_of(22)
        env = make_env(policy, control_way="direct", call_timeout_s=0.5)
        run = make_run(env, port)
        assert run.loop.move_to(env.pose(hardware.ready_pose, "rad")).outcome in ("reached", "not there")
        chassis = robot.control.position()["astribot_chassis"]
        robot.mark()
        run.records.clear()
        result = run.episode(max_steps=300)
    assert result.outcome == "steps"
    assert result.starved == 0, result
    assert_within_limits(robot)
    assert robot.control.position()["astribot_chassis"] == chassis
    assert "astribot_chassis" not in {name for entry in robot.commands for name in entry["goal"]}
    deadline = time.monotonic() + 10
    while len(run.records) < 300 and time.monotonic() < deadline:
        time.sleep(0.05)
    records = [record for record in run.records if record.sent is not None and record.origin is not None]
    seam, inside = [], []
    for before, after in itertools.pairwise(records):
        step = np.abs(after.sent - before.sent)
        assert (step <= env.spec.unit_per_rad * np.where(is_gripper, 200, 1.5) / FPS + 1e-4).all()
        (seam if before.origin.seq != after.origin.seq else inside).append(step[~is_gripper].max())
    assert len(seam) >= 5
    assert max(seam) <= max(inside) + 1e-4
