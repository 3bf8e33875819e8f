"""`run_env_client` as it is: supervisor, control process, policy server and robot, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from env_client.wire import pack, unpack
from fault_evidence import violations
from kinematic_robot import calibration, until
from websockets.sync.server import serve

Make = Callable[..., Any]

# rad/s that these runs allow.
SPEED = 1.0


def assert_safe(robot: Any, speed: float = SPEED) -> None:
    """The servo log proves it: every goal within the calibrated range, and no joint commanded faster than allowed."""
    assert robot.goals(), "nothing was commanded at all"
    assert violations(robot.folder / "servos.jsonl", speed) == []


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def commanded(robot: Any) -> int:
    return len(robot.goals().get((0, "shoulder_pan"), ((), (), ()))[2])


def moves(robot: Any) -> bool:
    """Whether the arm follows the policy: its goals change."""
    goals = robot.goals().get((0, "shoulder_lift"))
    return goals is not None and len(goals.ticks) > 30 and len(set(goals.ticks[-20:])) > 3


def still(robot: Any, seconds: float = 0.5) -> bool:
    before = robot_pose(robot)
    time.sleep(seconds)
    return bool(np.allclose(before, robot_pose(robot), atol=3))


def robot_pose(robot: Any, arm: int = 0) -> np.ndarray:
    """(6,) measured ticks."""
    return np.array(robot.control.call("pose", arm=arm)["ticks"])


def test_a_dataset_that_cannot_be_continued_is_refused_before_the_motors(
    start_robot: Make, start_server: Make, start_client: Make, tmp_path: Path
) -> None:
    """A folder with other files: one sentence, exit code 2, and the servos were told nothing."""
    robot, server = start_robot(), start_server(horizon=30)
    (tmp_path / "notes.txt").write_text("no dataset")
    client = start_client(
        robot, server, "--record.dataset-path", str(tmp_path), "--record.dir", str(tmp_path / "records"),
        "--no-enable-logging",
    )  # fmt: skip
    assert client.wait() == 2, client.output
    assert "holds files and is no LeRobot dataset: name a new --record.dataset-path" in client.output
    assert not [event for event in robot.events() if event["kind"] in ("torque", "goal")]


def test_episodes_from_ready_to_rest(
    start_robot: Make, start_server: Make, start_client: Make, tmp_path: Path
) -> None:
    """Two episodes at 30 Hz, each from the ready pose, a table and a JSON summary; limp only in the rest pose."""
    robot, server = start_robot(), start_server(horizon=30, delay_s=0.1)
    client = start_client(
        robot, server, "--episode-time-s", "1.6", "--num-episodes", "2", "--move-to-ready", "--on-exit", "rest-pose",
        "--rest-velocity", "1.5", "--max-velocity-per-frame", "0.2", "--summary-path", str(tmp_path / "summary.json"),
    )  # fmt: skip
    assert client.wait() == 0, client.output
    assert "Connected! ws://127.0.0.1" in client.output
    assert "Episode 1 of 2" in client.output
    assert "Episode 2 of 2" in client.output
    episodes = json.loads((tmp_path / "summary.json").read_text())["episodes"]
    assert [episode["outcome"] for episode in episodes] == ["time", "time"]
    assert all(episode["steps"] > 30 and episode["starved"] == 0 for episode in episodes)
    assert "The robot lies in its rest pose, torque off." in client.output
    assert not any(robot.torque().values())
    pose = calibration().to_normalized(calibration().from_ticks(robot_pose(robot)))
    np.testing.assert_allclose(pose, [0, -98, 96, 74, 0, 10], atol=4)
    assert_safe(robot, 1.5)


@pytest.mark.slow
def test_a_rest_pose_that_is_not_reached_is_no_success(
    start_robot: Make, start_server: Make, start_client: Make
) -> None:
    """No joint comes as close as is asked for: tried twice, then each is named, the torque stays on, exit code 1."""
    robot, server = start_robot(), start_server(horizon=30)
    client = start_client(
        robot, server, "--episode-time-s", "1", "--on-exit", "rest-pose", "--rest-velocity", "1.5",
        "--loop.move-tolerance", "1e-9",
    )  # fmt: skip
    assert client.wait() == 1, client.output
    assert "Once more, by way of the ready pose" in client.output
    assert "The rest pose was not reached: " in client.output
    assert "wrist_flex.pos stopped" in client.output
    assert "The robot holds, torque on." in client.output
    assert all(robot.torque().values())
    assert_safe(robot, 1.5)


@pytest.mark.slow
def test_two_arms(start_robot: Make, start_server: Make, start_client: Make) -> None:
    """Twelve values on two buses."""
    cameras = [{"name": n, "height": 240, "width": 320, "resize": "stretch"} for n in ("front", "left_wrist")]
    states = [{"name": "left_arm", "size": 6}, {"name": "right_arm", "size": 6}]
    robot, server = start_robot(2), start_server(action_dim=12, cameras=cameras, states=states, horizon=30)
    client = start_client(robot, server, "--episode-time-s", "2", "--max-velocity", str(SPEED))
    assert client.wait() == 0, client.output
    goals = robot.goals()
    assert {arm for arm, _ in goals} == {0, 1}
    assert_safe(robot)


@pytest.mark.parametrize(
    ("options", "flags", "sentence"),
    [
        ({"unit": "rad"}, [], "the policy works in the unit rad, the robot (so101) in normalized"),
        slow({}, ["--policy-unit", "degrees"], "the server says that its policy works in normalized"),
        slow({"action_dim": 12}, [], "the policy gives actions of 12 values, the robot (so101) has 6"),
        slow(
            {"cameras": [{"name": "side", "height": 480, "width": 640, "resize": "none"}]},
            [],
            "the policy looks through side, which the robot (so101) lacks; it has front, wrist",
        ),
        slow(
            {"cameras": [{"name": "front", "height": 96, "width": 96, "resize": "none"}]},
            [],
            "its resize rule is 'none'",
        ),
        slow({"states": [{"name": "left_arm", "size": 6}]}, [], "the policy reads the state left_arm"),
    ],
)
def test_what_does_not_fit_is_refused(
    start_robot: Make,
    start_server: Make,
    start_client: Make,
    options: dict[str, Any],
    flags: list[str],
    sentence: str,
) -> None:
    """Unit, dimensions, cameras, sizes and states are compared before a motor is switched on or commanded."""
    robot, server = start_robot(), start_server(**options)
    client = start_client(robot, server, *flags)
    assert client.wait() == 2, client.output
    assert sentence in client.output
    assert "Nothing was moved." in client.output
    assert not robot.goals()
    assert not robot.torque()


@pytest.mark.slow
def test_missing_calibration_is_refused(start_robot: Make, start_server: Make, start_client: Make) -> None:
    """An unknown id ends with a sentence, not with a question on the terminal."""
    robot, server = start_robot(), start_server()
    client = start_client(robot, server, "--env.robot.id", "stranger")
    assert client.wait() == 2
    assert "has no calibration file" in client.output
    assert not robot.torque()


@pytest.mark.slow
def test_dry_run(start_robot: Make, start_server: Make, start_client: Make) -> None:
    """Everything but the motors."""
    robot, server = start_robot(), start_server(horizon=30)
    client = start_client(robot, server, "--dry-run", "--episode-time-s", "2")
    assert client.wait() == 0, client.output
    assert "Dry run: the motors are left alone." in client.output
    assert "Episode 1 of 1" in client.output
    assert not robot.goals()
    assert not robot.torque()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_in_the_exit_state(
    start_robot: Make, start_server: Make, start_client: Make, number: signal.Signals
) -> None:
    """In the middle of a motion: one clean stop, torque off as asked."""
    robot, server = start_robot(), start_server(horizon=30)
    client = start_client(robot, server, "--on-exit", "relax")
    assert until(lambda: moves(robot), 120), client.output
    client.process.send_signal(number)
    assert client.wait(10) == 128 + number, client.output
    assert client.output.count("Torque off.") == 1
    assert "Episode 1 of 1" in client.output
    assert not any(robot.torque().values())
    assert_safe(robot, 1.5)


@pytest.mark.parametrize(
    ("how", "on_exit"),
    [
        ("stop", "hold"),
        pytest.param("kill", "hold", marks=pytest.mark.slow),
        pytest.param("stop", "relax", marks=pytest.mark.slow),
        pytest.param("kill", "rest-pose", marks=pytest.mark.slow),
    ],
)
def test_the_supervisor_stops_the_robot(
    start_robot: Make, start_server: Make, start_client: Make, how: str, on_exit: str
) -> None:
    """A control process that is killed or hangs in the middle of a motion: the supervisor takes the bus over."""
    robot, server = start_robot(), start_server(horizon=30)
    client = start_client(robot, server, "--on-exit", on_exit, hang=1.5)
    assert until(lambda: moves(robot), 120), client.output
    os.kill(client.control_pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    assert client.wait(25) == 1, client.output
    assert "the supervisor stopped the robot" in client.output
    expected = {
        "hold": "holds its pose, torque on",
        "relax": "torque off",
        "rest-pose": "in its rest pose, torque off",
    }[on_exit]
    assert expected in client.output
    on = robot.torque()
    assert all(on.values()) if on_exit == "hold" else not any(on.values())
    if on_exit == "hold":
        assert still(robot)
    assert_safe(robot, 1.5)


@pytest.mark.slow
def test_server_restarts_in_the_middle_of_an_episode(
    start_robot: Make, start_server: Make, start_client: Make
) -> None:
    """The robot holds while the server is gone and goes on when it is back, in the same episode."""
    robot, server = start_robot(), start_server(horizon=20)
    client = start_client(robot, server, "--episode-time-s", "60")
    assert until(lambda: moves(robot), 120), client.output
    server.kill()
    assert until(lambda: not moves(robot), 10)
    assert still(robot)
    count = commanded(robot)
    server.restart()
    assert until(lambda: moves(robot), 20), client.output
    assert commanded(robot) > count
    client.process.send_signal(signal.SIGTERM)
    assert client.wait(10) == 143, client.output
    assert client.output.count("Episode 1 of 1") == 1
    assert_safe(robot, 1.5)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run(
    start_robot: Make, start_server: Make, start_client: Make
) -> None:
    """With patience set, a lost server ends in the exit state."""
    robot, server = start_robot(), start_server(horizon=20)
    client = start_client(robot, server, "--server-patience-s", "2", "--on-exit", "relax")
    assert until(lambda: moves(robot), 120), client.output
    server.kill()
    assert client.wait(20) == 1, client.output
    assert "no chunk came for 2 s; the run ends" in client.output
    assert not any(robot.torque().values())


@pytest.mark.parametrize("behaviour", ["nan", slow("wrong_dim")])
def test_a_faulty_policy_moves_nothing_and_ctrl_c_ends_it(
    start_robot: Make, start_server: Make, start_client: Make, behaviour: str
) -> None:
    """NaN and a wrong dimension never reach a motor; Ctrl-C in the terminal reaches the whole group, and there is
    one clean stop."""
    robot, server = start_robot(), start_server(horizon=20, behaviour=behaviour)
    client = start_client(robot, server, "--on-exit", "relax")
    before = robot_pose(robot)
    assert until(lambda: commanded(robot) > 40, 120), client.output
    np.testing.assert_allclose(robot_pose(robot), before, atol=3)
    os.killpg(client.process.pid, signal.SIGINT)
    assert client.wait(10) == 130, client.output
    assert client.output.count("Torque off.") == 1
    assert "no chunk yet" in client.output
    assert not any(robot.torque().values())
    for commands in robot.goals().values():
        assert np.ptp(commands.ticks) <= 3


def test_faults_hold_and_go_on_and_a_crash_is_caught(
    start_robot: Make, start_server: Make, start_client: Make
) -> None:
    """Each fault of bus, servo, camera and server holds the arm; when it is over the same episode goes on; killed
    at the end, the control process leaves a limp arm to the supervisor, as asked. The log proves limits and speed."""
    robot, server = start_robot(), start_server(horizon=20)
    client = start_client(
        robot, server, "--env.frozen-camera-s", "0.5", "--max-velocity", str(SPEED), "--on-exit", "relax"
    )
    assert until(lambda: moves(robot), 120), client.output

    def goes_on() -> None:
        count = commanded(robot)
        assert until(lambda: commanded(robot) > count + 25 and moves(robot), 20), client.output

    robot.control.fault("late:80")
    goes_on()
    for fault, cure, said in (
        ("unplug", "replug", "the robot cannot be reached"),
        ("freeze:front", "clear", "camera front is frozen"),
        ("blind:wrist", "clear", "camera wrist is frozen"),
    ):
        robot.control.fault(fault)
        assert until(lambda said=said: said in client.output, 10), f"{fault}: {client.output}"
        assert still(robot, 0.3), fault
        robot.control.fault(cure)
        goes_on()
    server.kill()
    assert until(lambda: not moves(robot), 10)
    assert still(robot, 0.3)
    server.restart()
    goes_on()
    robot.control.fault("dead:3")
    assert until(lambda: "elbow_flex (id 3)" in client.output, 10), client.output
    # Its power comes back, its torque does not: somebody may have pulled it on purpose.
    robot.control.fault("alive:3")
    assert until(lambda: "the power was off" in client.output, 10), client.output
    count = commanded(robot)
    time.sleep(0.5)
    assert commanded(robot) == count
    os.kill(client.control_pid, signal.SIGKILL)
    assert client.wait(10) == 1, client.output
    assert "signal SIGKILL) without letting the robot go; the supervisor stopped the robot" in client.output
    assert not any(robot.torque().values())
    assert_safe(robot)


@pytest.mark.slow
def test_no_server_is_waited_for_and_ctrl_c_ends_it(start_robot: Make, start_client: Make) -> None:
    """Without a server nothing of the robot is touched, and a signal ends the wait."""
    robot = start_robot()
    client = start_client(robot, None, "--port", "9")
    assert until(lambda: "Waiting for a policy server" in client.output, 20)
    client.process.send_signal(signal.SIGINT)
    assert client.wait(10) == 130
    assert "Stopped before the robot was touched." in client.output
    assert not robot.torque()


@pytest.mark.slow
def test_without_its_supervisor_nobody_waits_for_a_server(start_robot: Make, start_client: Make) -> None:
    """Killed before there is a server: control ends as well, and the robot was never touched."""
    robot = start_robot()
    client = start_client(robot, None, "--port", "9")
    assert until(lambda: "Waiting for a policy server" in client.output, 120), client.output
    control = psutil.Process(client.control_pid)
    os.kill(client.process.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        control.wait(60)
    assert until(lambda: "Stopped before the robot was touched." in client.output, 5), client.output
    assert not robot.torque()


@pytest.mark.slow
def test_without_its_supervisor_the_control_process_stops(
    start_robot: Make, start_server: Make, start_client: Make
) -> None:
    """When the supervisor is killed, nobody would catch a hang: the run ends in the exit state."""
    robot, server = start_robot(), start_server(horizon=30)
    client = start_client(robot, server, "--on-exit", "relax")
    assert until(lambda: moves(robot), 120), client.output
    os.kill(client.process.pid, signal.SIGKILL)
    assert until(lambda: not any(robot.torque().values()), 10), client.output
    assert until(lambda: "The supervisor is gone; stopping." in client.output, 5)
    assert_safe(robot, 1.5)


@pytest.mark.slow
def test_a_plain_openpi_server(start_robot: Make, start_client: Make) -> None:
    """It says neither unit nor size: the unit must be declared, then it is executed under the same limits."""
    robot = start_robot()

    def answer(connection: Any) -> None:
        connection.send(pack({}))
        for frame in connection:
            request, _ = unpack(frame)
            state = request["states"]["arm"]
            connection.send(pack({"actions": np.linspace(state, state + 10, 20, dtype=np.float32)}))

    with serve(answer, "127.0.0.1", 0, max_size=None, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.socket.getsockname()[1])
        refused = start_client(robot, None, "--port", port)
        assert refused.wait() == 2
        assert "declare it with --policy-unit normalized" in refused.output
        assert not robot.torque()
        client = start_client(
            robot, None, "--port", port, "--policy-unit", "normalized", "--episode-time-s", "2"
        )
        assert client.wait() == 0, client.output
        assert commanded(robot) > 30
        server.shutdown()
    assert_safe(robot, 1.5)
