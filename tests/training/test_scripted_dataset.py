"""make_scripted_dataset: what it writes is a LeRobot v3.0 dataset."""

import json
from pathlib import Path

import numpy as np
import pytest

from grasp_cube.training.scripted_dataset import ScriptedDatasetConfig, main
from grasp_cube.training.scripted_motion import JOINTS


def test_lerobot_reads_the_dataset(scripted: Path) -> None:
    """Names, rate, robot, prompt and both cameras come back through LeRobot's reader."""
    from lerobot.datasets import LeRobotDataset

    info = json.loads((scripted / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["features"]["observation.images.front"]["info"]["video.codec"] == "h264"
    dataset = LeRobotDataset("local/lift", root=scripted, video_backend="pyav")
    assert dataset.num_episodes == 2
    assert dataset.fps == 30
    assert dataset.meta.robot_type == "so101_follower"
    item = dataset[100]
    assert item["task"] == "lift up the red cube"
    assert item["observation.images.wrist"].shape == (3, 48, 64)
    assert dataset.meta.features["action"]["names"] == [f"{joint}.pos" for joint in JOINTS]
    assert item["action"].shape == item["observation.state"].shape == (6,)


def test_the_small_frames_are_those_of_lerobots_reader(scripted: Path, tmp_path: Path) -> None:
    """The frames for training are decoded apart from LeRobot: same pixels, same ticks, in both episodes."""
    from lerobot.datasets import LeRobotDataset

    from grasp_cube.training.frames import load_frames

    frames = load_frames(scripted, tmp_path / "frames", 48, 64, "stretch")
    dataset = LeRobotDataset("local/lift", root=scripted, video_backend="pyav")
    for index in (0, 77, int(frames.starts[1]) - 1, int(frames.starts[1]), len(dataset) - 1):
        item = dataset[index]
        for camera, images in frames.images.items():
            expected = (item[camera].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            np.testing.assert_array_equal(images[index], expected)
        np.testing.assert_array_equal(frames.actions[index], item["action"].numpy())


def test_a_batch_stays_inside_its_episode(scripted: Path, tmp_path: Path) -> None:
    """Ticks beyond the ends repeat the first and the last one, and are marked as padding."""
    from grasp_cube.training.frames import load_frames

    frames = load_frames(scripted, tmp_path / "frames", 48, 64, "stretch")
    start, end = int(frames.starts[1]), int(frames.ends[1])
    batch = frames.batch([start, end - 1], [-1, 0], [-1, 0, 1])
    assert batch["observation.images.front"].shape == (2, 2, 3, 48, 64)
    assert batch["action_is_pad"].tolist() == [[True, False, False], [False, False, True]]
    np.testing.assert_array_equal(batch["observation.state"][0, 0], frames.states[start])
    np.testing.assert_array_equal(batch["action"][1, 2], frames.actions[end - 1])


def test_an_existing_folder_is_left_alone(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says so and ends with 2."""
    with pytest.raises(SystemExit, match="2"):
        main(["--root", str(scripted)])
    assert "exists already" in capsys.readouterr().err


def test_a_wrong_image_size_is_named() -> None:
    """Video needs even sizes."""
    with pytest.raises(ValueError, match="--image-size is '47x64'"):
        ScriptedDatasetConfig("x", image_size="47x64")
