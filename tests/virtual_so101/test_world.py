"""The physics, the servos and the cameras of `virtual_so101.world`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from needs_gl import needs_gl
from virtual_so101.meshes import model_path, simplified_mesh
from virtual_so101.world import MAX_SPEED, World

TICK = 1.0 / 30.0


@pytest.fixture(scope="module")
def world() -> World:
    """A lift world; each test resets it."""
    return World("lift", seed=0)


@pytest.fixture(scope="module")
def two_arms() -> World:
    """A sort world; each test resets it."""
    return World("sort", seed=0)


def test_cameras_and_arms_follow_the_task(world: World, two_arms: World) -> None:
    """One arm has one wrist camera, two have two."""
    assert (world.n_arms, world.camera_names) == (1, ("front", "wrist"))
    assert (two_arms.n_arms, two_arms.camera_names) == (2, ("front", "left_wrist", "right_wrist"))


def test_limits_are_symmetric_about_mid_range(world: World) -> None:
    """Zero is the middle of each joint's range."""
    np.testing.assert_allclose(world.joint_lower, -world.joint_upper)
    np.testing.assert_allclose(
        world.joint_upper[[0, 1, 2, 3, 5]], [1.91986, 1.74533, 1.69, 1.65806, 0.95993], atol=1e-4
    )


def test_the_arm_holds_its_start_pose(world: World) -> None:
    """Gravity moves no joint by more than half a degree while torque is on."""
    world.reset(0)
    world.step(2.0)
    np.testing.assert_allclose(world.positions(0), world.task.start_poses[0], atol=np.deg2rad(0.5))
    assert np.abs(world.loads(0)).max() <= 1.0
    assert world.loads(0)[2] != 0.0


def test_a_servo_lags_and_keeps_its_speed_limit(world: World) -> None:
    """A far goal is approached at no more than the servo's free speed, a small one with a lag of 40 to 150 ms."""
    world.reset(0)
    start = world.positions(0)
    world.set_goal(0, start + [1.8, 0, 0, 0, 0, 0])
    fastest = 0.0
    for _ in range(60):
        world.step(0.01)
        fastest = max(fastest, float(np.abs(world.velocities(0)).max()))
    assert 3.0 < fastest < 1.05 * MAX_SPEED
    world.step(1.0)
    assert world.positions(0)[0] == pytest.approx(start[0] + 1.8, abs=0.01)

    world.reset(0)
    start = world.positions(0)
    world.set_goal(0, start + [0.1, 0, 0, 0, 0, 0])
    time = 0.0
    while world.positions(0)[0] < start[0] + 0.063:
        world.step(0.005)
        time += 0.005
    assert 0.04 < time < 0.15


def test_goals_are_cut_to_the_joint_limits(world: World) -> None:
    """A goal beyond the range leads to the end of the range."""
    world.reset(0)
    world.set_goal(0, [9.0, *world.positions(0)[1:]])
    world.step(2.0)
    assert world.positions(0)[0] == pytest.approx(world.joint_upper[0], abs=0.01)


@pytest.mark.parametrize("goal", [[0.0] * 5, [np.nan] + [0.0] * 5, [0.0] * 7])
def test_a_goal_that_is_no_pose_is_refused(world: World, goal: list[float]) -> None:
    """NaN and wrong lengths never reach a servo."""
    with pytest.raises(ValueError, match="six finite angles"):
        world.set_goal(0, goal)


def test_an_arm_that_does_not_exist_is_refused(world: World) -> None:
    """One arm is number 0."""
    with pytest.raises(IndexError, match="no arm 1"):
        world.positions(1)


def test_without_torque_the_arm_sinks_and_with_it_stays(world: World) -> None:
    """A limp arm falls; switched on again it holds where it is, and does not jump back."""
    world.reset(0)
    before = world.positions(0)
    world.set_torque(0, np.zeros(6, dtype=bool))
    world.step(1.0)
    sunk = world.positions(0)
    assert np.abs(sunk - before).max() > 0.1
    world.set_torque(0, np.ones(6, dtype=bool))
    world.step(0.5)
    np.testing.assert_allclose(world.positions(0), sunk, atol=0.15)


def test_time_is_counted_in_whole_steps(world: World) -> None:
    """What a call does not use is owed to the next: thirty ticks are one second."""
    world.reset(0)
    for _ in range(30):
        world.step(TICK)
    assert world.time == pytest.approx(1.0, abs=1e-9)
    for _ in range(10):
        world.step(world.timestep / 10.0)
    assert world.time == pytest.approx(1.0 + world.timestep, abs=1e-9)


def _trace(seed: int) -> np.ndarray:
    world = World("sort", seed=1)
    world.reset(seed)
    rng = np.random.default_rng(0)
    states = []
    for _ in range(45):
        for arm in range(2):
            world.set_goal(arm, world.positions(arm) + rng.uniform(-0.1, 0.1, 6))
        world.step(TICK)
        states.append(world.data.qpos.copy())
    return np.array(states)


def test_the_same_seed_and_commands_give_the_same_bits() -> None:
    """Lock step is deterministic, across worlds and whatever they did before."""
    assert np.array_equal(_trace(5), _trace(5))
    assert not np.array_equal(_trace(5), _trace(6))


def test_a_reset_without_a_seed_takes_the_next_one(world: World) -> None:
    """So that an episode can be repeated by number."""
    world.reset(7)
    world.reset()
    assert world.seed == 8
    cube = world.cube_position("red_cube")
    world.reset(8)
    assert np.array_equal(world.cube_position("red_cube"), cube)


def test_looks_are_random_and_places_do_not_depend_on_them() -> None:
    """Domain randomisation changes what is seen, never where a cube lies; switched off, all look the same."""
    plain, varied = World("lift", seed=3, randomize=False), World("lift", seed=3)
    assert np.array_equal(plain.cube_position("red_cube"), varied.cube_position("red_cube"))
    nominal = plain.model.geom_rgba.copy()
    assert not np.array_equal(varied.model.geom_rgba, nominal)
    assert not np.array_equal(varied.model.cam_pos, plain.model.cam_pos)
    plain.reset(9)
    assert np.array_equal(plain.model.geom_rgba, nominal)
    first = varied.model.cam_quat.copy()
    varied.reset(4)
    assert not np.array_equal(varied.model.cam_quat, first)
    varied.reset(3)
    assert np.array_equal(varied.model.cam_quat, first)


def test_the_meshes_are_light() -> None:
    """A part keeps its extent and loses nine tenths of its triangles."""
    part = model_path().parent / "assets" / "wrist_roll_follower_so101_v1.stl"
    vertices, faces = simplified_mesh(part, 0.003)
    fine, all_faces = simplified_mesh(part, 0.0001)
    assert len(faces) < 0.12 * len(all_faces)
    np.testing.assert_allclose(np.ptp(vertices, axis=0), np.ptp(fine, axis=0), atol=0.003)
    assert faces.max() == len(vertices) - 1


@needs_gl
def test_every_camera_gives_a_picture_with_the_cube(world: World) -> None:
    """480x640 RGB, not blank; the front camera sees the red cube."""
    world.reset(0)
    for camera in world.camera_names:
        image = world.render(camera)
        assert image.shape == (480, 640, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5.0
    pixels = world.render("front").astype(int)
    red = (pixels[..., 0] > 110) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)
    assert 300 < red.sum() < 6000


@needs_gl
def test_the_same_seed_gives_the_same_picture(world: World) -> None:
    """A camera's picture is a function of seed and time."""
    world.reset(11)
    first = world.render("wrist")
    world.reset(12)
    assert not np.array_equal(world.render("wrist"), first)
    world.reset(11)
    assert np.array_equal(world.render("wrist"), first)


@needs_gl
def test_each_wrist_camera_belongs_to_its_arm(two_arms: World) -> None:
    """Moving the left arm changes what its camera sees, and not what the right one sees."""
    two_arms.reset(0)
    before = {camera: two_arms.render(camera) for camera in two_arms.camera_names}
    two_arms.set_goal(0, two_arms.positions(0) + [0.0, 0.0, 0.0, -0.2, 0.3, 0.0])
    two_arms.step(0.5)
    assert not np.array_equal(two_arms.render("left_wrist"), before["left_wrist"])
    assert np.abs(two_arms.render("right_wrist").astype(int) - before["right_wrist"]).mean() < 0.5


@needs_gl
def test_drawing_in_one_thread_while_another_steps() -> None:
    """Cameras and physics share the state without harm."""
    world = World("lift", seed=0)
    pictures: list[np.ndarray] = []

    def draw() -> None:
        pictures.extend(world.render(camera) for _ in range(5) for camera in world.camera_names)
        world.close()

    thread = threading.Thread(target=draw)
    thread.start()
    while thread.is_alive():
        world.step(TICK)
    thread.join()
    assert len(pictures) == 10
    assert world.time > 0.0


def test_an_unknown_camera_is_refused(world: World) -> None:
    """The message names the cameras that there are."""
    with pytest.raises(ValueError, match="front, wrist"):
        world.render("left_wrist")
