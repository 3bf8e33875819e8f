"""Cameras through LeRobot's own classes: names, ages, a frozen and a silent camera, wrong files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from env_client.envs.cameras import CameraRig, read_camera_file
from env_client.envs.env import EnvError
from kinematic_robot import until

Make = Callable[..., Any]


def test_images_ages_and_colours(make_twin: Make, make_env: Make) -> None:
    """Each camera's newest picture, RGB, with an age below two frames or so."""
    make_twin(camera_port=0)
    env = make_env(cameras=True)
    env.connect()
    observation = env.get_observation()
    assert set(observation.images) == {"front", "wrist"}
    assert observation.images["front"].shape == (480, 640, 3)
    assert observation.images["front"].dtype == np.uint8
    # The stand-in world paints the front picture red, the wrist's green.
    assert observation.images["front"][400, 320].argmax() == 0
    assert observation.images["wrist"][400, 320].argmax() == 1
    assert all(0 <= age < 0.2 for age in observation.image_age.values())


def test_a_frozen_camera_grows_old_while_the_arm_moves(make_twin: Make, make_env: Make) -> None:
    """The same picture again and again is as old as its last change, but only once the arm has moved."""
    twin = make_twin(camera_port=0)
    env = make_env(cameras=True, frozen_camera_s=0.3)
    env.connect()
    env.engage()
    twin.cameras.freeze("front")
    assert not until(lambda: env.get_observation().image_age["front"] > 0.3, 0.8)
    for pan in range(0, 30, 3):
        env.apply_action(np.array([pan, 0, 0, 0, 0, 50], np.float32))
        assert until(lambda: env.get_observation().image_age["wrist"] < 0.2)
    assert until(lambda: env.get_observation().image_age["front"] > 0.3)
    # The wrist's camera may be late on a busy machine; it is not frozen.
    assert until(lambda: env.cameras.frames().frozen == ("front",))
    twin.cameras.clear()
    assert until(lambda: env.get_observation().image_age["front"] < 0.2)


def test_a_silent_camera_grows_old_and_comes_back(make_twin: Make, make_env: Make) -> None:
    """No frames: the last one's age grows and reading never waits; it recovers by itself."""
    twin = make_twin(camera_port=0)
    env = make_env(cameras=True)
    env.connect()
    twin.cameras.blind("wrist")
    assert until(lambda: env.get_observation().image_age["wrist"] > 0.5)
    assert env.get_observation().image_age["front"] < 0.2
    twin.cameras.clear()
    assert until(lambda: env.get_observation().image_age["wrist"] < 0.2)


def test_a_camera_that_is_not_there_is_a_sentence() -> None:
    """A wrong device, a wrong type and a wrong field are errors that name the camera."""
    with pytest.raises(EnvError, match=r"camera top is of type 'film'; one of .*opencv.* was expected"):
        CameraRig({"top": {"type": "film"}}).connect()
    with pytest.raises(EnvError, match=r"camera top \(opencv\) is not set up correctly"):
        CameraRig({"top": {"type": "opencv", "index": 3}}).connect()
    rig = CameraRig({"top": {"type": "opencv", "index_or_path": "/dev/video_not_there"}})
    with pytest.raises(EnvError, match=r"camera top \(opencv\) delivers no picture"):
        rig.connect()
    rig.close()


def test_camera_files(tmp_path: Path) -> None:
    """The file is a map of maps with a type; realsense is LeRobot's intelrealsense."""
    path = tmp_path / "cameras.json"
    path.write_text(json.dumps({"front": {"type": "realsense", "serial_number_or_name": "1"}}))
    assert read_camera_file(path)["front"]["type"] == "realsense"
    path.write_text('{"front": "/dev/video0"}')
    with pytest.raises(EnvError, match="was expected"):
        read_camera_file(path)
    with pytest.raises(EnvError, match="cannot be read"):
        read_camera_file(tmp_path / "nothing.json")
