"""`make_virtual_dataset`: what is recorded, and that a recording survives being stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from needs_gl import needs_gl
from virtual_so101 import dataset
from virtual_so101.calibration import ArmCalibration
from virtual_so101.dataset import joint_names, main, record_episode
from virtual_so101.expert import TICK
from virtual_so101.recorder import Recorder
from virtual_so101.twin import Twin
from virtual_so101.world import World

BLANK = np.zeros((96, 128, 3), np.uint8)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record without drawing."""
    monkeypatch.setattr(dataset, "_picture", lambda *_: BLANK)


def command(root: Path, episodes: int, *more: str) -> list[str]:
    """The command line of a small recording."""
    return ["--root", str(root), "--episodes", str(episodes), "--image-size", "96x128", "--seed", "40", *more]


def test_joint_names() -> None:
    """As LeRobot's robots name them."""
    assert joint_names(1)[0] == "shoulder_pan.pos"
    assert joint_names(2)[5:7] == ["left_gripper.pos", "right_shoulder_pan.pos"]


def test_values_are_what_the_driver_would_see(no_pictures: None) -> None:
    """States and actions are normalised encoder ticks, and replaying the actions repeats the episode."""
    world = World("lift", seed=3)
    (frames,) = record_episode(world)
    end = world.data.qpos.copy()
    calibration = ArmCalibration.of_limits(world.joint_lower, world.joint_upper)
    assert 90 <= len(frames) <= 240
    for frame in frames:
        assert frame.state.shape == frame.action.shape == (6,)
        assert frame.action.dtype == np.float32
        assert np.all(np.abs(frame.action) <= 100.0)
    span = calibration.range_max - calibration.range_min
    ticks = (np.array([f.state for f in frames])[:, :5] + 100.0) / 200.0 * span[:5]
    np.testing.assert_allclose(ticks, np.rint(ticks), atol=1e-3)

    world.reset(3)
    for frame in frames:
        world.set_goal(0, calibration.from_normalized(frame.action))
        world.step(TICK)
    assert np.array_equal(world.data.qpos, end)
    assert world.success()


def test_a_disturbance_moves_the_arm_and_not_the_recorded_path(no_pictures: None) -> None:
    """Actions stay the expert's; states show the arm beside the path; the seed fixes the disturbance."""
    world = World("lift", seed=3)
    (clean,) = record_episode(world)
    world.reset(3)
    (noisy,) = record_episode(world, noise=0.01)
    world.reset(3)
    (again,) = record_episode(world, noise=0.01)
    np.testing.assert_allclose(noisy[20].action, clean[20].action, atol=1e-5)
    assert not np.array_equal(noisy[20].state, clean[20].state)
    assert all(np.array_equal(a.state, b.state) for a, b in zip(noisy, again, strict=True))


def test_an_episode_after_a_missed_grasp_begins_with_empty_jaws(no_pictures: None) -> None:
    """The miss is not recorded: the first frame shows the arm away from its start, the cube on the table, jaws shut."""
    world = World("lift", seed=300000)
    missed = 0
    for seed in range(300000, 300012):
        world.reset(seed)
        (frames,) = record_episode(world, missed=True)
        world.reset(seed)
        (clean,) = record_episode(world)
        assert frames[0].state[5] < clean[0].state[5] - 20.0
        assert np.abs(frames[0].state[:5] - clean[0].state[:5]).max() > 3.0
        if len(frames) < len(clean):
            continue  # the grasp that was to miss caught the cube: on from there
        missed += 1
        # The jaws are open again before the second grasp shuts them.
        jaw = [frame.action[5] for frame in frames]
        assert max(jaw) == pytest.approx(clean[0].action[5], abs=0.1)
    assert missed >= 3


def test_two_arms_miss_each_of_their_cubes(no_pictures: None) -> None:
    """What lies between two misses is an episode: each goes on where the arms are, and all together sort the cubes."""
    world = World("sort", seed=300001)
    episodes = record_episode(world, missed=True)
    assert world.success()
    assert len(episodes) == 4
    starts = np.array([frames[0].state for frames in episodes])
    # Left, right, left, right: the arm that missed is away from where it starts, with shut jaws.
    for number, state in enumerate(starts):
        assert state[5 if number % 2 == 0 else 11] < starts[0][11] - 20.0
    assert len({frames[0].action.shape for frames in episodes}) == 1


@needs_gl
def test_a_smaller_drawing_shows_the_same() -> None:
    """Once it is made as small as a policy sees it, it differs by less than a video's own loss."""
    whole, half = World("sort", seed=3), World("sort", seed=3, shrink=2)
    assert half.render("front").shape == (240, 320, 3)
    for camera in whole.camera_names:
        pictures = [
            dataset._picture(world, camera, (96, 128), "stretch").astype(float) for world in (whole, half)
        ]
        assert np.abs(pictures[0] - pictures[1]).mean() < 1.0
    for world in (whole, half):
        world.close()


def test_an_expert_that_fails_is_not_recorded(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed episode gives no frames."""
    world = World("lift", seed=3)
    monkeypatch.setattr(dataset, "expert", lambda *_: iter([np.array(world.task.start_poses[0])] * 5))
    assert record_episode(world) == []


def test_the_driver_sees_and_does_what_was_recorded(
    tmp_path: Path, no_pictures: None, make_follower, connect
) -> None:
    """Recorded actions sent by LeRobot's driver over the bus lift the cube, and it reads the recorded states."""
    pytest.importorskip("lerobot")
    world = World("lift", seed=3)
    (frames,) = record_episode(world)
    twin = Twin(world, [tmp_path / "port"], camera_port=None, bus_process=True, realtime=False)
    try:
        twin.chains[0].calibration.save(tmp_path / "calibration" / "virtual.json")
        twin.start()
        follower = make_follower(twin)
        connect(follower)
        twin.reset(3)
        sent = twin.chains[0].goal_packets
        for tick, frame in enumerate(frames, start=1):
            observation = follower.get_observation()
            np.testing.assert_allclose([observation[name] for name in joint_names(1)], frame.state, atol=1e-4)
            follower.send_action(dict(zip(joint_names(1), map(float, frame.action), strict=True)))
            twin.step(1 / 30, goals=[sent + tick])
        assert twin.success()
    finally:
        twin.close()


@needs_gl
def test_a_recording_is_resumed_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs make one LeRobot v3 dataset whose pictures are those of the world; other settings are refused."""
    pytest.importorskip("lerobot")
    root = tmp_path / "lift"
    assert main(command(root, 1)) == 0
    assert main(command(root, 2)) == 0
    info = json.loads((root / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["fps"]) == ("v3.0", 2, 30)
    assert info["robot_type"] == "so101_follower"
    assert info["features"]["action"]["names"] == joint_names(1)
    assert info["features"]["observation.images.wrist"]["shape"] == [96, 128, 3]
    assert json.loads((root / "virtual_so101.json").read_text())["seeds"] == [40, 41]
    assert not list(root.glob(".meta*"))

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    read = LeRobotDataset("local/lift", root=root, video_backend="pyav")
    assert read.num_frames == info["total_frames"]
    item = read[0]
    assert item["task"] == "lift up the red cube"
    world = World("lift", seed=40)
    picture = dataset._picture(world, "front", (96, 128), "stretch") / 255.0
    world.close()
    # Mean over all pixels: H.264 keeps colour at half the resolution.
    difference = np.abs(item["observation.images.front"].numpy().transpose(1, 2, 0) - picture).mean()
    assert difference < 0.02

    capsys.readouterr()
    assert main(command(root, 3, "--noise", "0.01")) == 1
    assert "other settings (noise)" in capsys.readouterr().err


def test_what_came_after_the_last_checkpoint_is_dropped(tmp_path: Path) -> None:
    """A killed recording goes on from files that are whole."""
    root, settings = tmp_path / "lift", {"prompt": "p", "fps": 30, "robot_type": "r", "first_seed": 5}
    whole, torn = root / "data" / "file-000.parquet", root / "data" / "file-001.parquet"
    (root / ".meta_2").mkdir(parents=True)
    (root / ".meta_2" / "info.json").write_text("whole")
    (root / ".meta_12").mkdir()
    (root / "meta").mkdir()
    (root / "meta" / "info.json").write_text("torn")
    (root / "data").mkdir()
    whole.touch()
    torn.touch()
    note = {"settings": settings, "seeds": [5, 7], "dropped": [6], "files": ["data/file-000.parquet"]}
    (root / "virtual_so101.json").write_text(json.dumps(note))
    recorder = Recorder(root, settings, names=["a"], cameras=["front"], size=(96, 128), crf=23, gop=2)
    assert recorder.episodes == 2
    assert recorder.provenance.next_seed == 8
    assert whole.exists()
    assert not torn.exists()
    assert (root / "meta" / "info.json").read_text() == "whole"
    assert not (root / ".meta_12").exists()


def test_a_recording_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    """Nothing in it is whole; its note says that it is ours to remove."""
    root, settings = tmp_path / "lift", {"prompt": "p", "fps": 30, "robot_type": "r", "first_seed": 5}
    (root / "data").mkdir(parents=True)
    (root / "virtual_so101.json").write_text(json.dumps({"settings": settings}))
    recorder = Recorder(root, settings, names=["a"], cameras=["front"], size=(96, 128), crf=23, gop=2)
    assert recorder.episodes == 0
    assert not root.exists()


@needs_gl
def test_a_folder_with_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that this command did not write is overwritten."""
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(command(tmp_path, 1)) == 1
    assert "choose another --root" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("size", ["96", "96x", "95x128", "0x10"])
def test_a_size_that_cannot_be_is_refused(size: str, tmp_path: Path) -> None:
    """Both edges are even numbers."""
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path), "--image-size", size])
