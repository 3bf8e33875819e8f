"""The stand-in behaves as is publicly known of the SDK: what it refuses, what it returns, and how it moves."""

from __future__ import annotations

import inspect
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from virtual_astribot import Astribot
from virtual_astribot.body import CAMERAS, PARTS
from virtual_astribot.control import Control
from virtual_astribot.robot import Robot
from virtual_astribot.server import RobotServer

LEFT, TORSO, GRIPPER = "astribot_arm_left", "astribot_torso", "astribot_gripper_left"
HOME = {part.name: list(part.home) for part in PARTS}
PATIENCE_S = 20.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


@pytest.fixture
def server(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RobotServer]:
    found = RobotServer(Robot(log))
    found.start()
    monkeypatch.setenv("VIRTUAL_ASTRIBOT", f"127.0.0.1:{found.port}")
    monkeypatch.setenv("ROBOT_TYPE", "S1")
    yield found
    found.close()


@pytest.fixture
def sdk(server: RobotServer) -> Astribot:
    return Astribot()


@pytest.fixture
def control(server: RobotServer) -> Iterator[Control]:
    found = Control(server.port)
    yield found
    found.close()


def entries(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signatures_are_the_sdks() -> None:
    """Names, order and defaults, on which callers count."""
    expected = {
        "__init__": "freq=250.0, ip=None, interface=None, high_control_rights=False, node_name='use_astribot'",
        "set_joints_position": "names, position, control_way='filter', use_wbc=False, add_default_torso=True",
        "move_joints_position": "names, commands, duration=5.0, use_wbc=False, add_default_torso=True",
        "move_joints_waypoints": "names, waypoints, time_list, use_wbc=False, joy_controller=False, add_default_torso=True",
        "set_filter_parameters": "filter_scale, gripper_filter_scale",
        "register_image_callback": "camera_name, image_type, callback, need_decode",
    }
    for name, text in expected.items():
        parameters = list(inspect.signature(getattr(Astribot, name)).parameters.values())[1:]
        plain = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert ", ".join(plain) == text


def test_parts_dofs_and_limits(sdk: Astribot) -> None:
    assert sdk.get_dof() == [3, 4, 7, 1, 7, 1, 2]
    lower, upper = sdk.get_joints_position_limit([LEFT, GRIPPER])
    assert lower == [[-3.10, -1.53, -3.10, -0.06, -2.56, -0.76, -1.53], [0.0]]
    assert upper[1] == [100.0]
    assert sdk.get_joints_velocity_limit([TORSO]) == [[1.8] * 4]
    assert sdk.get_current_joints_position([LEFT]) == [HOME[LEFT]]


def test_joints_follow_their_goal_no_faster_than_they_can(sdk: Astribot) -> None:
    """ "direct" jumps the desired position, "filter" eases it; the joint itself needs its time in both."""
    goal = [[1.2, -2.0, 1.5, 0.0]]
    before, begun = np.array(sdk.get_current_joints_position([TORSO])), time.monotonic()
    sdk.set_joints_position([TORSO], goal, control_way="direct")
    # At the robot's next step, 4 ms later.
    wait_until(lambda: sdk.get_desired_joints_position([TORSO]) == goal)
    while True:
        now = np.array(sdk.get_current_joints_position([TORSO]))
        assert np.abs(now - before).max() <= 1.8 * (time.monotonic() - begun + 0.004) + 1e-9
        if np.abs(now - goal).max() < 1e-3:
            break
        assert time.monotonic() - begun < PATIENCE_S
        time.sleep(0.01)
    sdk.set_joints_position([TORSO], [[0.5, -1.0, 0.5, 0.0]], control_way="filter")
    assert np.abs(np.array(sdk.get_desired_joints_position([TORSO])) - goal).max() < 0.9
    wait_until(lambda: abs(sdk.get_desired_joints_position([TORSO])[0][0] - 0.5) < 1e-3)


def test_the_torso_trap(sdk: Astribot, log: Path) -> None:
    """Arms alone command the torso too, unless one says no."""
    sdk.set_joints_position([LEFT], [HOME[LEFT]])
    assert set(entries(log)[-1]["goal"]) == {LEFT, TORSO}
    sdk.set_joints_position([LEFT], [HOME[LEFT]], add_default_torso=False)
    assert set(entries(log)[-1]["goal"]) == {LEFT}


@pytest.mark.parametrize(
    ("names", "values", "way"),
    [
        (["astribot_tail"], [[0.0]], "direct"),
        ([LEFT], [[0.0] * 6], "direct"),
        ([LEFT, GRIPPER], [[0.0] * 7], "direct"),
        ([LEFT], [HOME[LEFT]], "gently"),
    ],
)
def test_wrong_arguments_raise(sdk: Astribot, names: list[str], values: list, way: str) -> None:
    with pytest.raises(ValueError, match=r"part|joints|positions|control_way"):
        sdk.set_joints_position(names, values, control_way=way, add_default_torso=False)


@pytest.mark.parametrize("value", [101.0, -1.0, float("nan")])
def test_what_leaves_the_limits_is_refused(sdk: Astribot, log: Path, value: float) -> None:
    """Logged, None, and nothing moves."""
    assert sdk.set_joints_position([GRIPPER], [[value]], add_default_torso=False) is None
    assert entries(log)[-1]["refused"] == f"{GRIPPER} outside its limits"
    assert sdk.get_desired_joints_position([GRIPPER]) == [HOME[GRIPPER]]


def test_without_rights_calls_log_and_return_none(sdk: Astribot, control: Control, log: Path) -> None:
    assert sdk.get_control_rights_status() is True
    control.take_rights()
    assert sdk.get_control_rights_status() is False
    assert sdk.set_joints_position([LEFT], [HOME[LEFT]]) is None
    assert sdk.move_joints_position([LEFT], [HOME[LEFT]], 0.1) is None
    assert sdk.stop_robot() is None
    assert {entry["refused"] for entry in entries(log)[-3:]} == {"no control rights"}
    control.give_back()
    assert sdk.get_control_rights_status() is True


def test_the_second_client_is_asked_on_the_keyboard(sdk: Astribot, monkeypatch: pytest.MonkeyPatch) -> None:
    """It blocks on input(); without a keyboard it fails, with a yes it takes over, with high rights it does not ask."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(EOFError):
        Astribot()
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    with pytest.raises(RuntimeError, match="no control rights"):
        Astribot()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    second = Astribot()
    assert second.get_control_rights_status()
    assert not sdk.get_control_rights_status()
    third = Astribot(high_control_rights=True)
    assert third.get_control_rights_status()


def test_stop_holds_and_restart_goes_on(sdk: Astribot, log: Path) -> None:
    sdk.set_joints_position([TORSO], [[1.2, -2.0, 1.5, 0.0]], control_way="direct")
    assert sdk.stop_robot() is not None
    stands = sdk.get_current_joints_position([TORSO])
    sdk.set_joints_position([TORSO], [HOME[TORSO]])
    assert entries(log)[-1]["refused"] == "the robot is stopped"
    assert sdk.get_current_joints_position([TORSO]) == stands
    assert sdk.restart_robot() is not None
    sdk.set_joints_position([TORSO], [HOME[TORSO]])
    assert "refused" not in entries(log)[-1]


def test_moves_block_until_they_are_there(sdk: Astribot) -> None:
    """Duration, waypoints with absolute times, home, grippers."""
    begun = time.monotonic()
    assert sdk.move_joints_waypoints(
        [LEFT], [[[0.2] + HOME[LEFT][1:]], [[0.3] + HOME[LEFT][1:]]], [0.1, 0.2], add_default_torso=False
    )
    assert time.monotonic() - begun >= 0.2
    wait_until(lambda: sdk.get_desired_joints_position([LEFT])[0][0] == pytest.approx(0.3))
    assert sdk.move_joints_position([LEFT], [HOME[LEFT]], 0.1, add_default_torso=False)
    assert sdk.close_effector([GRIPPER], 0.1)
    wait_until(lambda: sdk.get_desired_joints_position([GRIPPER]) == [[100.0]])
    assert sdk.open_effector(duration=0.1)
    wait_until(lambda: sdk.get_desired_joints_position([GRIPPER]) == [[0.0]])
    assert sdk.move_to_home(0.1)
    with pytest.raises(ValueError, match="Invalid effector"):
        sdk.open_effector([LEFT])


def test_a_robot_that_is_not_there_or_not_named(monkeypatch: pytest.MonkeyPatch, server: RobotServer) -> None:
    monkeypatch.delenv("ROBOT_TYPE")
    with pytest.raises(ValueError, match="ROBOT_TYPE=S1"):
        Astribot()
    monkeypatch.setenv("ROBOT_TYPE", "S1")
    monkeypatch.setenv("VIRTUAL_ASTRIBOT", "127.0.0.1:1")
    with pytest.raises(RuntimeError, match="No simulation or real robot"):
        Astribot()


def test_cameras_send_jpegs_that_move(sdk: Astribot, control: Control) -> None:
    """By callback, decoded (BGR) or not; only once they are switched on; and a dropped one is silent."""
    frames: list[tuple] = []
    head = CAMERAS[0]
    assert sdk.register_image_callback(
        head.name, "color", lambda *given: frames.append(given), need_decode=True
    )
    assert not sdk.register_image_callback("ceiling", "color", print, need_decode=True)
    assert sdk.activate_camera()
    wait_until(lambda: len(frames) >= 3)
    topic, message, width, height, array = frames[0]
    assert (topic, width, height) == (head.topic, 1280, 720)
    assert array.shape == (720, 1280, 3)
    # BGR: the red square is on the left.
    assert array[20, 20].tolist()[2] > 150 > array[20, 20].tolist()[0]
    decoded = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded, array)
    assert frames[0][1].data != frames[2][1].data
    wait_until(lambda: head.name in sdk.get_images_dict()[0])
    control.drop_cameras([head.name])
    wait_until(lambda: _silent(frames))


def _silent(frames: list) -> bool:
    before = len(frames)
    time.sleep(0.2)
    return len(frames) == before


def test_a_stalled_robot_answers_later(sdk: Astribot, control: Control) -> None:
    begun = time.monotonic()
    control.stall(0.3)
    assert sdk.get_control_rights_status() is True
    assert time.monotonic() - begun >= 0.3
    control.silence(["position"])
    assert sdk.get_current_joints_position() is None
    control.heal()
    assert sdk.get_current_joints_position() is not None


def test_an_object_that_is_dropped_takes_its_threads_along(server: RobotServer) -> None:
    """Nothing decodes pictures for somebody who has gone, while the robot goes on sending them."""
    found = [Astribot()]
    found[0].activate_camera()
    wait_until(lambda: found[0].get_images_dict()[0])
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("sdk-")]
    assert threads
    found.clear()
    wait_until(lambda: not any(thread.is_alive() for thread in threads))
