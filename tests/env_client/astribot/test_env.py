"""The env and the control loop on the stand-in, with the faults that the present stack of such robots has."""

from __future__ import annotations

import time

import numpy as np
import pytest
from astribot_parts import (
    CAMERAS,
    FPS,
    MakeEnv,
    MakeRun,
    MakeServer,
    Robot,
    assert_within_limits,
    spec_of,
    state_of,
)
from env_client.control import LoopConfig, SafetyConfig
from env_client.envs.astribot_layout import Hardware
from env_client.envs.env import EnvError
from env_client.wire import EncodedImage

PATIENCE_S = 15.0
ARMS = ("astribot_arm_left", "astribot_arm_right")
STEP = 1.5 / FPS


def wait_until(condition: object, what: str = "it") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.01)


def steps(goals: np.ndarray) -> float:
    """The largest step between two commands."""
    return float(np.abs(np.diff(goals, axis=0)).max(initial=0.0))


def assert_slow(robot: Robot) -> None:
    """No joint of the left arm was commanded faster than 1.5 rad/s, but for a new start from where it stood."""
    entries = [entry for entry in robot.commands if "astribot_arm_left" in entry["goal"]]
    times = np.array([entry["t"] for entry in entries])
    goals = np.array([entry["goal"]["astribot_arm_left"] for entry in entries])
    for run in np.split(np.arange(len(times)), np.flatnonzero(np.diff(times) > 0.1) + 1):
        # Over windows of 50 ms: the moment at which a command is logged may be some milliseconds late.
        for start in run:
            inside = run[(times[run] >= times[start]) & (times[run] <= times[start] + 0.05)]
            assert np.ptp(goals[inside], axis=0).max() <= 1.5 * (0.05 + 1 / FPS + 0.02)


def still(obs: dict) -> np.ndarray:
    """A chunk that keeps the pose."""
    return np.tile(state_of(obs), (30, 1))


def nudge(obs: dict, distance: float = 0.6) -> np.ndarray:
    """A chunk that moves the first joint of the left arm, towards its middle."""
    direction = -1 if state_of(obs)[0] > 0 else 1
    return still(obs) + direction * np.linspace(0, distance, 30)[:, None] * np.eye(22)[0]


@pytest.mark.parametrize("layout", [16, 22, 25])
def test_each_layout_reads_and_moves_what_it_names(layout: int, make_env: MakeEnv, robot: Robot) -> None:
    """State and action in the same order; nothing but the layout's parts is commanded, the chassis never."""
    env = make_env(spec_of(layout), enable_camera=False)
    spec = env.spec
    obs = env.reset()
    state = np.concatenate([obs.states[part.name] for part in spec.states])[spec.state_index]
    assert state.shape == (layout,)
    np.testing.assert_array_equal(state, state_of({"states": dict(list(obs.states.items()))})[:layout])
    env.apply_action((state + 0.01).astype(np.float32))
    sent = robot.commands[-1]["goal"]
    expected = {*ARMS, "astribot_gripper_left", "astribot_gripper_right"}
    if layout > 16:
        expected |= {"astribot_head", "astribot_torso"}
    assert set(sent) == expected
    np.testing.assert_allclose(sent["astribot_arm_left"], state[:7] + 0.01, atol=1e-6)
    assert robot.commands[-1]["way"] == "filter"


def test_head_and_torso_can_be_left_out(make_env: MakeEnv, robot: Robot) -> None:
    """--no-head, --no-torso: held in the safety filter, and not sent at all."""
    env = make_env(spec_of(22), enable_camera=False, head=False, torso=False, control_way="direct")
    assert env.safety(SafetyConfig()).hold == ("head", "torso")
    env.reset()
    env.apply_action(np.zeros(22, np.float32) + 0.1)
    assert set(robot.commands[-1]["goal"]) == {*ARMS, "astribot_gripper_left", "astribot_gripper_right"}
    assert robot.commands[-1]["way"] == "direct"


def test_the_chassis_stands_unless_it_may_move(make_env: MakeEnv, robot: Robot) -> None:
    """Then it moves relative to where it stood at the start, not in the SDK's frame."""
    env = make_env(spec_of(25), enable_camera=False)
    assert env.safety(SafetyConfig()).hold == ("chassis",)
    env = make_env(spec_of(25), enable_camera=False, execute_chassis=True, high_control_rights=True)
    obs = env.reset()
    np.testing.assert_allclose(obs.states["chassis"], 0, atol=1e-6)
    start = np.array(robot.control.position()["astribot_chassis"])
    action = state_of({"states": dict(obs.states)}).astype(np.float32)
    action[-3:] = 0.1, 0.0, 0.2
    env.apply_action(action)
    x, y, theta = robot.commands[-1]["goal"]["astribot_chassis"]
    assert np.hypot(x - start[0], y - start[1]) == pytest.approx(0.1, abs=1e-5)
    np.testing.assert_allclose(np.arctan2(y - start[1], x - start[0]), start[2], atol=1e-4)
    assert theta - start[2] == pytest.approx(0.2, abs=1e-5)
    limit = env.spec.speed
    assert limit is not None
    assert limit[-3:].tolist() == [0.2, 0.2, 0.3]


def test_the_robots_own_speed_is_a_limit_too(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer
) -> None:
    """Whatever --max-velocity says, a torso joint goes no faster than 1.8 rad/s."""
    env = make_env(spec_of(22), enable_camera=False)
    server = make_server(spec_of(22, cameras=()), still)
    run = make_run(env, server.port, max_velocity=50.0)
    names = env.spec.action_names
    assert run.safety.speed[names.index("torso.1")] == pytest.approx(1.8)
    assert run.safety.speed[names.index("head.pan")] == pytest.approx(4.0)


def test_recorded_grippers_and_a_first_action_far_away(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """Grippers of -12 to 164 are cut to 0 to 100; a first action 1 rad away is approached one step at a time."""
    rows: list[np.ndarray] = []

    def answer(obs: dict) -> np.ndarray:
        # A fixed target, a radian away from where the robot first stood.
        rows.append(state_of(obs))
        chunk = np.tile(rows[0], (30, 1))
        chunk[:, [0, 3]] += (1.0, -1.0)
        chunk[:, 14] = np.linspace(-12, 164, 30)
        chunk[:, 15] = np.linspace(164, -12, 30)
        return chunk

    env = make_env(spec_of(22), control_way="direct")
    run = make_run(env, make_server(spec_of(22), answer).port)
    start = env.get_observation().states["arm_left"].copy()
    robot.mark()
    result = run.episode(max_steps=60)
    assert result.outcome == "steps"
    arm = robot.goals("astribot_arm_left")
    assert np.abs(arm[0] - start).max() <= STEP + 1e-4
    assert steps(arm) <= STEP + 1e-4
    assert arm[-1, 0] - start[0] > 0.3
    for side in ("left", "right"):
        gripper = robot.goals(f"astribot_gripper_{side}")
        assert gripper.min() >= 0
        assert gripper.max() <= 100
        assert np.ptp(gripper) > 50
    assert_within_limits(robot)
    assert "astribot_chassis" not in {name for entry in robot.commands for name in entry["goal"]}


def test_a_gripper_is_sent_open_or_closed_only(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """--binarize-gripper closes at 60 and opens at 40, in the SDK's direction; between the two it stays."""
    values = [30, 50, 61, 50, 45, 41, 39, 50, 59, 50]
    # Each for as long as the gripper needs from one end to the other.
    ticks = 5

    def answer(obs: dict) -> np.ndarray:
        chunk = np.tile(state_of(obs), (ticks * len(values), 1))
        chunk[:, 14] = np.repeat(values, ticks)
        return chunk

    env = make_env(spec_of(22), enable_camera=False, control_way="direct")
    server = make_server(spec_of(22, cameras=()), answer)
    run = make_run(env, server.port, execution="sync", binarize_gripper=True, gripper_max_velocity=1e5)
    run.episode(max_steps=ticks * len(values))
    sent = robot.goals("astribot_gripper_left")[-ticks * len(values) :, 0]
    assert sent[ticks - 1 :: ticks].tolist() == [0, 0, 100, 100, 100, 100, 0, 0, 0, 0]


def test_a_missing_camera_at_the_start_is_named(make_env: MakeEnv, robot: Robot, monkeypatch) -> None:
    """Nothing moves without it."""
    monkeypatch.setattr("env_client.envs.astribot_cameras.FIRST_S", 0.5)
    robot.control.drop_cameras(["left_wrist_rgbd"])
    with pytest.raises(EnvError, match="no picture from left_wrist within"):
        make_env(spec_of(22))
    assert not robot.commands


def test_a_camera_that_goes_silent_holds_the_robot(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """Old pictures: the last command is held; when they come again, the same episode goes on."""

    env = make_env(spec_of(22), control_way="direct")
    run = make_run(env, make_server(spec_of(22), nudge).port)
    thread = run.in_background(time_s=PATIENCE_S)
    moved = lambda: sum(not record.held for record in list(run.records))  # noqa: E731
    wait_until(lambda: moved() > 20)
    robot.control.drop_cameras(["head_rgbd"])
    wait_until(lambda: run.records[-1].refused == "camera head is frozen")
    frozen_at = len(robot.goals("astribot_arm_left"))
    wait_until(lambda: len(robot.goals("astribot_arm_left")) > frozen_at + 10)
    held = robot.goals("astribot_arm_left")[frozen_at:]
    assert steps(held) == 0
    robot.control.drop_cameras()
    before = moved()
    wait_until(lambda: moved() > before + 10)
    run.stop.set()
    thread.join(PATIENCE_S)
    assert run.result.outcome == "stopped"
    assert run.result.old_observations > 5


@pytest.mark.parametrize(
    ("fault", "executor_hz"),
    [
        ("rights", 0.0),
        ("none", 0.0),
        ("stall", 250.0),
        pytest.param("stall", 0.0, marks=pytest.mark.slow),
        pytest.param("rights", 250.0, marks=pytest.mark.slow),
        pytest.param("none", 250.0, marks=pytest.mark.slow),
    ],
)
def test_a_robot_that_is_away_and_comes_back(
    fault: str,
    executor_hz: float,
    make_env: MakeEnv,
    make_run: MakeRun,
    make_server: MakeServer,
    robot: Robot,
) -> None:
    """Rights lost, calls that return None, calls that hang: nothing is sent; then it goes on from where it stands."""

    env = make_env(spec_of(22), enable_camera=False, executor_hz=executor_hz, call_timeout_s=0.3)
    run = make_run(env, make_server(spec_of(22, cameras=()), nudge).port)
    thread = run.in_background(time_s=PATIENCE_S)
    wait_until(lambda: sum(not record.held for record in list(run.records)) > 20)
    sentence = {
        "rights": "another program has taken the control rights",
        "none": "reading the joints returned None",
        "stall": "did not answer within",
    }[fault]
    if fault == "rights":
        robot.control.take_rights()
    elif fault == "none":
        robot.control.silence(["position"])
    else:
        robot.control.stall(1.0)
    wait_until(lambda: any(sentence in (record.error or "") for record in list(run.records)))
    away = len(robot.commands)
    wait_until(lambda: sum(record.error is not None for record in list(run.records)) > 5)
    if fault != "stall":
        assert len(robot.commands) == away
    if fault == "rights":
        robot.control.give_back()
    robot.control.heal()
    seen = len(run.records)
    wait_until(
        lambda: sum(not record.held and record.error is None for record in list(run.records)[seen:]) > 20
    )
    run.stop.set()
    thread.join(PATIENCE_S)
    assert run.result.outcome == "stopped"
    assert run.result.env_errors > 0
    assert_slow(robot)
    assert_within_limits(robot)


def test_a_robot_that_somebody_stops_is_noticed(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """The SDK refuses commands in silence; here that is an error, and this run does not start it again."""

    env = make_env(spec_of(22), enable_camera=False)
    run = make_run(env, make_server(spec_of(22, cameras=()), nudge).port)
    run.loop.config = LoopConfig(env_patience_s=1.0)
    thread = run.in_background(time_s=PATIENCE_S)
    wait_until(lambda: sum(not record.held for record in list(run.records)) > 10)
    robot.control.stop()
    thread.join(PATIENCE_S)
    assert run.result.outcome == "env lost"
    assert any("somebody stopped it" in (record.error or "") for record in run.records)
    env.engage()
    assert robot.control.state()["stopped"]


def test_the_server_is_gone_for_five_seconds(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """The rest of the plan, then the last command; the same episode goes on when the server is there again."""
    spec = spec_of(22, cameras=())

    server = make_server(spec, nudge)
    env = make_env(spec, enable_camera=False, control_way="direct")
    run = make_run(env, server.port)
    thread = run.in_background(time_s=PATIENCE_S)
    wait_until(lambda: run.source.stats.consumed > 20)
    port = server.port
    server.close()
    for connection in list(server.connections):
        connection.close()
    gone = time.monotonic()
    wait_until(lambda: run.source.stats.starved > 10)
    # Five seconds without a server, as the robot's ticks count them.
    wait_until(lambda: time.monotonic() - gone > 5.0)
    held_from = len(robot.goals("astribot_arm_left"))
    wait_until(lambda: len(robot.goals("astribot_arm_left")) > held_from + 5)
    assert steps(robot.goals("astribot_arm_left")[held_from:]) == 0
    make_server(spec, nudge, port)
    consumed = run.source.stats.consumed
    wait_until(lambda: run.source.stats.consumed > consumed + 30)
    run.stop.set()
    thread.join(PATIENCE_S)
    assert run.result.outcome == "stopped"
    assert run.result.env_errors == 0
    assert steps(robot.goals("astribot_arm_left")) <= STEP + 1e-4


def test_the_executor_sends_between_the_actions(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer, robot: Robot
) -> None:
    """More set-points than actions, each no further from the one before than its time allows."""

    env = make_env(spec_of(22), enable_camera=False, executor_hz=250.0)
    run = make_run(env, make_server(spec_of(22, cameras=()), nudge).port)
    run.episode(max_steps=60)
    env.stop()
    entries = [entry for entry in robot.commands if "astribot_arm_left" in entry["goal"]]
    assert len(entries) > 1.5 * run.result.steps
    assert {entry["way"] for entry in entries} == {"direct"}
    assert_slow(robot)
    assert robot.log[-1]["kind"] == "stop_robot"


def test_the_ready_pose_is_the_files(make_env: MakeEnv, hardware: Hardware) -> None:
    """In the policy's order and unit; the chassis stays."""
    spec = spec_of(25, unit="rad_gripper_100_0")
    env = make_env(spec, enable_camera=False)
    assert hardware.ready_pose is not None
    pose = env.pose(hardware.ready_pose, "rad")
    np.testing.assert_allclose(pose[:7], hardware.ready_pose["arm_left"], atol=1e-6)
    assert pose[14:16].tolist() == [100.0, 100.0]
    np.testing.assert_allclose(pose[22:], 0, atol=1e-6)
    config = env.safety(SafetyConfig())
    assert (config.gripper_open_at, config.gripper_close_at) == (60.0, 40.0)


def test_pictures_go_to_the_server_as_the_camera_compressed_them(
    make_env: MakeEnv, make_run: MakeRun, make_server: MakeServer
) -> None:
    """Three streams of JPEG bytes that nobody on the robot decodes; the server sees their true size."""
    server = make_server(spec_of(22), still)
    env = make_env(spec_of(22))
    obs = env.get_observation()
    assert all(isinstance(image, EncodedImage) for image in obs.images.values())
    run = make_run(env, server.port)
    run.episode(max_steps=20)
    images = server.observations[-1]["images"]
    assert set(images) == set(CAMERAS)
    assert {name: image.shape[:2] for name, image in images.items()} == {
        "head": (720, 1280), "left_wrist": (360, 640), "right_wrist": (360, 640),
    }  # fmt: skip
    assert all(bytes(image.data[:2]) == b"\xff\xd8" for image in images.values())


def test_units_that_do_not_fit_are_refused_before_anything_moves(make_env: MakeEnv) -> None:
    """A policy in another unit, or of another size, meets the same check as on every robot."""
    from env_client.fit import misfits

    env = make_env(spec_of(22, unit="normalized"), enable_camera=False)
    assert any(
        "normalized" in sentence
        for sentence in misfits(env.spec, spec_of(22, unit="normalized", cameras=()), "it")
    )
    assert not misfits(env.spec, spec_of(22, cameras=()), "it")
    env = make_env(enable_camera=False, high_control_rights=True)
    assert any("16 values" in sentence for sentence in misfits(env.spec, spec_of(16, cameras=()), "it"))
