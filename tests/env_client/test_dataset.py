"""Replaying LeRobot datasets: what is read equals what LeRobot reads, and what is broken is said in a sentence."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from env_client.envs.dataset import BUFFERED_TICKS, DatasetEnv, DatasetEnvConfig
from env_client.envs.env import Env, EnvError
from env_client.wire import StateSpec


@pytest.fixture
def copy(datasets: Path, tmp_path: Path):
    """A copy of a dataset that a test may break."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(datasets / name, tmp_path / name))

    return make


def replay(env: DatasetEnv) -> list:
    """[(observation, recorded action)] of the next episode."""
    observation, ticks = env.reset(), []
    while not env.done:
        ticks.append((observation, env.recorded_action()))
        env.apply_action(np.zeros(env.spec.action_dim, np.float32))
        observation = env.get_observation()
    return ticks


@pytest.mark.parametrize("name", ["video", "images", "two_arms", "many_files"])
def test_equals_what_lerobot_reads(datasets, name):
    """Every tick of every episode has LeRobot's numbers, prompt and pixels."""
    expected = np.load(datasets / f"{name}.npz")
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / name))
    assert isinstance(env, Env)
    index = 0
    for episode in env.episodes:
        ticks = replay(env)
        assert env.episode == episode
        assert len(ticks) == np.sum(expected["episode_index"] == episode)
        for observation, action in ticks:
            state = np.concatenate([observation.states[part.name] for part in env.spec.states])
            np.testing.assert_array_equal(state, expected["observation.state"][index])
            np.testing.assert_array_equal(action, expected["action"][index])
            assert observation.task == f"task {episode % 2}"
            assert set(observation.images) == set(env.spec.cameras)
            for camera, image in observation.images.items():
                assert image.dtype == np.uint8
                np.testing.assert_array_equal(image, expected[camera][index])
            index += 1
    assert index == len(expected["action"])
    env.close()


def test_spec_of_one_arm(datasets):
    """Six values are the part `arm`; limits, units and grippers follow from names and unit."""
    spec = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video")).spec
    assert (spec.type, spec.action_dim, spec.unit, spec.fps) == ("dataset", 6, "normalized", 30.0)
    assert spec.states == (StateSpec("arm", 6),)
    assert spec.cameras == ("front", "wrist")
    sizes = DatasetEnv(
        DatasetEnvConfig(dataset_path=datasets / "video", cameras={"front": "top"})
    ).camera_sizes
    assert sizes == {"top": (96, 128), "wrist": (96, 128)}
    assert spec.action_names[0] == "shoulder_pan.pos"
    assert spec.gripper.tolist() == [False] * 5 + [True]
    assert (spec.lower.tolist(), spec.upper.tolist()) == ([-100.0] * 5 + [0.0], [100.0] * 6)
    assert spec.state_index.tolist() == list(range(6))


def test_spec_of_two_arms(datasets):
    """Twelve values with left_ and right_ are two parts, left first."""
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "two_arms"))
    assert env.spec.states == (StateSpec("left_arm", 6), StateSpec("right_arm", 6))
    observation = env.reset()
    assert {name: part.shape for name, part in observation.states.items()} == {
        "left_arm": (6,),
        "right_arm": (6,),
    }
    assert observation.states["left_arm"].dtype == np.float32
    env.close()


def test_declared_parts_and_camera_names(datasets):
    """Parts of the state and names of cameras may be declared; what cannot fit is refused."""
    config = DatasetEnvConfig(
        dataset_path=datasets / "video",
        states={"body": 5, "hand": 1},
        cameras={"front": "top"},
        unit="degrees",
    )
    env = DatasetEnv(config)
    assert env.spec.states == (StateSpec("body", 5), StateSpec("hand", 1))
    assert env.spec.cameras == ("top", "wrist")
    assert np.isinf(env.spec.upper).all()
    assert set(env.reset().images) == {"top", "wrist"}
    env.close()
    with pytest.raises(EnvError, match=r"adds up to 5 values; .* records 6"):
        DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", states={"arm": 5}))
    with pytest.raises(EnvError, match=r"names side; .* has front, wrist"):
        DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", cameras={"side": "top"}))


def test_episodes_in_the_order_asked_for(datasets):
    """reset() goes through the chosen episodes and begins again; a seed picks one."""
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", episodes=(2, 0)))
    seen = []
    for _ in range(3):
        env.reset()
        seen.append((env.episode, env.length))
    assert seen == [(2, 30), (0, 24), (2, 30)]
    env.reset(seed=1)
    assert env.episode == 0
    env.close()


def test_time_belongs_to_the_caller(datasets):
    """Observing changes nothing, holding moves on, and behind the end the last observation stays."""
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", episodes=(1,)))
    first = env.reset()
    np.testing.assert_array_equal(env.get_observation().states["arm"], first.states["arm"])
    for _ in range(17):
        assert not env.done
        env.hold()
    assert env.done
    last = env.get_observation()
    env.apply_action(np.zeros(6, np.float32))
    np.testing.assert_array_equal(env.get_observation().images["front"], last.images["front"])
    assert env.success() is None
    env.close()


def test_before_reset():
    """Reading before the first reset is an error in words, not an attribute error."""
    env = DatasetEnv.__new__(DatasetEnv)
    env._rows = None
    with pytest.raises(EnvError, match="reset"):
        env.recorded_action()


def test_decoder_thread_is_bounded_and_ends(datasets):
    """A few ticks are decoded ahead, and the thread ends with its episode."""
    env = DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video"))
    before = threading.active_count()
    for _ in range(3):
        env.reset()
    assert threading.active_count() == before + 1
    assert env._decoder is not None
    assert env._decoder._ready.maxsize == BUFFERED_TICKS
    env.close()
    env.close()
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------------ broken datasets


def opening(path: Path) -> str:
    def replay_all() -> None:
        env = DatasetEnv(DatasetEnvConfig(dataset_path=path))
        for _ in env.episodes:
            replay(env)

    with pytest.raises(EnvError) as caught:
        replay_all()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_not_there(tmp_path, datasets):
    """A wrong folder is named, and the datasets inside it are offered."""
    assert "does not exist" in opening(tmp_path / "nothing")
    message = opening(datasets)
    assert "no meta/info.json" in message
    assert "many_files" in message


def test_episode_that_is_not_there(datasets):
    """The episodes that there are come with the refusal."""
    with pytest.raises(EnvError, match=r"episode 9 .* it has 3: 0 to 2"):
        DatasetEnv(DatasetEnvConfig(dataset_path=datasets / "video", episodes=(0, 9)))


def test_version_2_1_names_the_converter(copy):
    """A v2.1 look-alike (its own layout of files) is refused with the command that converts it."""
    root = copy("video")
    shutil.rmtree(root / "meta" / "episodes")
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["a"], "length": 24}\n')
    info = json.loads((root / "meta" / "info.json").read_text())
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    message = opening(root)
    assert "v2.1" in message
    assert "python -m lerobot.scripts.convert_dataset_v21_to_v30" in message
    assert f"--root={root}" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("{}", "codebase_version"), ('{"codebase_version": "v4.0"}', "v3.0 is read"),
     ('{"codebase_version": "v3.0"}', "lacks fps, features, data_path"),
     ('{"codebase_version": "v3.0", "fps": 30, "data_path": "", "features": {}}', "no feature named action")],
)  # fmt: skip
def test_broken_info(tmp_path, text, words):
    """A damaged or foreign info.json is one sentence."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text(text)
    assert words in opening(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "damage", "words"),
    [
        ("video", "videos/observation.images.front/chunk-000/file-000.mp4", "unlink", "is missing"),
        ("video", "videos/observation.images.front/chunk-000/file-000.mp4", "cut", "cut off or damaged"),
        ("video", "videos/observation.images.wrist/chunk-000/file-000.mp4", "lfs", "git lfs pull"),
        ("video", "data/chunk-000/file-000.parquet", "unlink", "is missing"),
        ("video", "data/chunk-000/file-000.parquet", "cut", "cut off or damaged"),
        ("video", "meta/episodes/chunk-000/file-000.parquet", "unlink", "not finished"),
        ("video", "meta/episodes/chunk-000/file-000.parquet", "cut", "cut off or damaged"),
        ("video", "meta/tasks.parquet", "cut", "cut off or damaged"),
        ("images", "data/chunk-000/file-000.parquet", "cut", "cut off or damaged"),
        (
            "many_files",
            "videos/observation.images.front/chunk-000/file-003.mp4",
            "swap",
            "the video is cut off",
        ),
        (
            "many_files",
            "data/chunk-000/file-002.parquet",
            "swap",
            "holds 0 rows of episode 2, 14 were expected",
        ),
    ],
)
def test_broken_files(copy, name, file, damage, words):
    """A missing, cut off, swapped or never fetched file is named in one sentence."""
    root = copy(name)
    path = root / file
    if damage == "unlink":
        path.unlink()
    elif damage == "cut":
        cut(path)
    elif damage == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif file.startswith("videos"):
        shutil.copy(path.with_name("file-000.mp4"), path)  # 10 ticks where 9 are expected, then the reverse
        shutil.copy(
            root / "videos/observation.images.front/chunk-000/file-000.mp4", path.with_name("file-001.mp4")
        )
    else:
        shutil.copy(path.with_name("file-000.parquet"), path)
    message = opening(root)
    assert words in message
    assert root.name in message
