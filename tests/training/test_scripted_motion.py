"""The scripted arm: where it goes, and that the cube comes with it."""

import numpy as np
import pytest

from grasp_cube.training.scripted_motion import Cube, arm_points, gripper_pose, plan_lift, reach
from grasp_cube.training.scripted_scene import Looks, draw_scene, front_camera, wrist_camera


def test_the_zero_pose_is_the_one_of_the_real_arm() -> None:
    """At mid range the tip is where SO-101 descriptions have it, 39 cm ahead and 23 cm up."""
    np.testing.assert_allclose(arm_points(np.zeros(6))[-1], [0.391, 0.0, 0.227], atol=0.005)


@pytest.mark.parametrize("point", [(0.20, 0.0, 0.015), (0.27, -0.08, 0.015), (0.24, 0.09, 0.1)])
def test_reach_puts_the_tip_on_the_point(point: tuple[float, float, float]) -> None:
    """The inverse kinematics agrees with the forward kinematics, in place and in direction."""
    pose = gripper_pose(reach(*point, pitch=1.2, roll=0.1, gripper=50.0))
    np.testing.assert_allclose(pose.tip, point, atol=1e-6)
    assert np.arcsin(-pose.rotation[2, 0]) == pytest.approx(1.2)


def test_a_point_out_of_reach_is_refused() -> None:
    """A point a metre away is named in the error."""
    with pytest.raises(ValueError, match=r"\(1\.000, 0\.000, 0\.000\) m is out of the arm's reach"):
        reach(1.0, 0.0, 0.0, pitch=1.2, roll=0.0, gripper=50.0)


@pytest.mark.parametrize("seed", range(8))
def test_an_episode_lifts_the_cube_within_the_joints_ranges(seed: int) -> None:
    """Wherever the cube lies, it ends in the air, and the state trails the action by a few ticks."""
    rng = np.random.default_rng(seed)
    cube = Cube(rng.uniform(0.20, 0.28), rng.uniform(-0.09, 0.09), rng.uniform(-0.45, 0.45))
    episode = plan_lift(cube, rng)
    assert episode.lifted
    assert 150 <= len(episode.actions) <= 180
    assert np.abs(episode.actions[:, :5]).max() <= 100
    assert np.abs(np.diff(episode.actions, axis=0)).max() < 6
    lag = np.abs(episode.actions[1:, :5] - episode.states[1:, :5])
    assert 0.1 < lag.mean() < 3


def test_the_cameras_show_the_cube() -> None:
    """Both pictures have red pixels once the gripper is above the cube."""
    rng = np.random.default_rng(0)
    episode = plan_lift(Cube(0.24, 0.02, 0.1), rng)
    state, cube = episode.states[60], episode.cubes[60]
    for camera in (front_camera(120, 160), wrist_camera(gripper_pose(state), 120, 160)):
        image = draw_scene(camera, state, cube, Looks()).astype(int)
        assert image.shape == (120, 160, 3)
        red = (image[:, :, 0] > 120) & (image[:, :, 1:].max(axis=2) < 60)
        assert red.sum() > 20
