"""Rollouts as a LeRobot dataset: our reader and LeRobot's find in it what was recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from env_client.cli import CliError, parse
from env_client.client_config import ALIASES, ClientConfig
from env_client.envs.dataset import DatasetEnv, DatasetEnvConfig
from env_client.envs.dataset_files import LeRobotFiles
from env_client.record.evaluation import EvaluationRecord
from env_client.record.files import RunFolder
from env_client.sidecar.config import RecordConfig
from env_client.sidecar.types import Mark, RunInfo
from pyarrow import parquet
from record_parts import CAMERAS, JOINTS, PROMPT, actions, begin, picture, play, run_info, ticks


class Recorded:
    """A run whose episodes go into `root`."""

    def __init__(self, folder: Path, root: Path, run: RunInfo | None = None, skip_failed: bool = False):
        config = RecordConfig(dir=folder, plots=False, rrd=False, dataset_path=root, skip_failed=skip_failed)
        self.said: list[str] = []
        self.record = EvaluationRecord(config, RunFolder(folder), self.said.append)
        self.record.begin_run(run or run_info())


def column(root: Path, index: int, name: str) -> list:
    table = parquet.read_table(root / f"data/chunk-000/file-{index:03d}.parquet")
    return table[name].to_pylist()


def episode_row(root: Path, index: int) -> dict:
    return parquet.read_table(root / f"meta/episodes/chunk-000/file-{index:03d}.parquet").to_pylist()[0]


def test_our_reader_finds_what_was_recorded(tmp_path: Path) -> None:
    """Actions, states, prompt and pictures of each tick that had all its pictures."""
    root = tmp_path / "rollouts"
    run = Recorded(tmp_path / "records", root)
    play(run.record, 0, 25)
    play(run.record, 1, 18, without=(4, 5))
    run.record.close()
    files = LeRobotFiles(root)
    assert (files.action_names, files.state_names, files.fps) == (JOINTS, JOINTS, 30.0)
    kept = [tick for tick in range(18) if tick not in (4, 5)]
    rows = files.read_episode(1)
    np.testing.assert_allclose(rows.actions, actions(1, 18)[kept], atol=1e-5)
    np.testing.assert_allclose(rows.states, actions(1, 18)[kept] - 0.5, atol=1e-5)
    assert set(rows.tasks) == {PROMPT}
    for tick, images in zip(kept, files.images(1, rows.timestamps), strict=True):
        assert np.abs(images["front"].astype(int) - picture(tick)).mean() < 3
        assert np.abs(images["wrist"].astype(int) - picture(tick + 30)).mean() < 3
    env = DatasetEnv(DatasetEnvConfig(dataset_path=root))
    assert env.reset().images["front"].shape == (96, 128, 3)
    env.close()


def test_success_is_a_field(tmp_path: Path) -> None:
    """On the last tick as gymnasium has it, and with the note in the episode's row; judged after the end as well."""
    root = tmp_path / "rollouts"
    run = Recorded(tmp_path / "records", root)
    play(run.record, 0, 6, success=True)
    play(run.record, 1, 6)
    run.record.mark(Mark(1, True))
    run.record.mark(Mark(1, False, "slipped"))
    play(run.record, 2, 6)
    run.record.mark(Mark(2, True, "neat"))
    run.record.close()
    assert column(root, 0, "next.success") == [False] * 5 + [True]
    assert column(root, 1, "next.success") == [False] * 6
    assert [(row["success"], row["note"]) for row in (episode_row(root, i) for i in range(3))] == [
        (True, ""),
        (False, "slipped"),
        (True, "neat"),
    ]
    assert column(root, 2, "index") == list(range(12, 18))


def test_failed_episodes_can_be_left_out(tmp_path: Path) -> None:
    """By the env's word, by a person's afterwards, and back in when that person changes their mind."""
    root = tmp_path / "rollouts"
    run = Recorded(tmp_path / "records", root, skip_failed=True)
    play(run.record, 0, 5, success=False)
    play(run.record, 1, 6)
    run.record.mark(Mark(1, False))
    assert json.loads((root / "meta/info.json").read_text())["total_episodes"] == 0
    run.record.mark(Mark(1, True))
    play(run.record, 2, 7)
    run.record.mark(Mark(2, False))
    play(run.record, 3, 8)
    run.record.close()
    files = LeRobotFiles(root)
    assert [files.episode(index).length for index in files.episodes] == [6, 8]
    assert files.info["total_frames"] == 14
    np.testing.assert_allclose(files.read_episode(1).actions, actions(3, 8), atol=1e-5)


def test_a_second_run_goes_on_with_the_dataset(tmp_path: Path) -> None:
    """What a killed run left half-done is removed, statistics and totals are those of all episodes together."""
    root = tmp_path / "rollouts"
    for number in range(2):
        run = Recorded(tmp_path / f"records{number}", root)
        play(run.record, 0, 10 + number)
        if number == 0:
            begin(run.record, 1)
            for tick in ticks(1, 4):
                run.record.tick(tick)
            (root / "data/chunk-000/file-001.parquet").write_bytes(b"half")
            (root / "data/chunk-000/file-002.parquet.part").write_bytes(b"half")
        run.record.close()
    files = LeRobotFiles(root)
    assert [files.episode(index).length for index in files.episodes] == [10, 11]
    assert not list(root.rglob("*.part"))
    stats = json.loads((root / "meta/stats.json").read_text())
    both = np.concatenate([actions(0, 10), actions(0, 11)])
    np.testing.assert_allclose(stats["action"]["mean"], both.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["action"]["std"], both.std(0), rtol=1e-5)
    assert stats["action"]["count"] == [21]


def test_another_robots_dataset_is_left_alone(tmp_path: Path) -> None:
    """Other features are one sentence that names both, and the record goes on."""
    root = tmp_path / "rollouts"
    play(Recorded(tmp_path / "one", root).record, 0, 5)
    before = (root / "meta/info.json").read_bytes()
    run = Recorded(tmp_path / "two", root, run_info(robot="bi_so101"))
    play(run.record, 0, 5)
    play(run.record, 1, 5)
    run.record.close()
    assert (root / "meta/info.json").read_bytes() == before
    assert [line for line in run.said if "robot_type" in line and "'so101'" in line and "'bi_so101'" in line]
    assert sum("not in the dataset" in line for line in run.said) == 1


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    """Nothing is written among somebody's files."""
    root = tmp_path / "somebody"
    root.mkdir()
    (root / "thesis.tex").write_text("important")
    run = Recorded(tmp_path / "records", root)
    play(run.record, 0, 5)
    run.record.close()
    assert [entry.name for entry in root.iterdir()] == ["thesis.tex"]
    assert any("no LeRobot dataset" in line for line in run.said)


def test_an_episode_without_pictures_is_said(tmp_path: Path) -> None:
    """It is counted out, and the next one is recorded."""
    root = tmp_path / "rollouts"
    run = Recorded(tmp_path / "records", root)
    play(run.record, 0, 5, without=range(5))
    play(run.record, 1, 5)
    run.record.close()
    assert any("Episode 0 is not in the dataset: it holds no tick with all pictures" in s for s in run.said)
    assert LeRobotFiles(root).info["total_episodes"] == 1


def test_a_dataset_needs_the_videos() -> None:
    """Flags that contradict each other are one sentence."""
    with pytest.raises(SystemExit):
        parse(ClientConfig, ["--record.dataset-path", "x", "--no-record"], prog="t", aliases=ALIASES)
    with pytest.raises((CliError, ValueError), match="leave both on"):
        RecordConfig(dataset_path=Path("x"), videos=False)


@pytest.mark.slow
def test_lerobots_own_reader_trains_on_it(tmp_path: Path) -> None:
    """LeRobotDataset reads every frame with history and future, and makes batches, statistics and all."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader

    root = tmp_path / "rollouts"
    run = Recorded(tmp_path / "records", root)
    play(run.record, 0, 25, success=True)
    play(run.record, 1, 18)
    run.record.close()
    window = {"action": [k / 30 for k in range(8)], "observation.images.front": [-1 / 30, 0.0]}
    data = LeRobotDataset("local/rollouts", root=root, delta_timestamps=window)
    assert (len(data), data.num_episodes, data.fps) == (43, 2, 30)
    assert list(data.meta.tasks.index) == [PROMPT]
    for index, (episode, tick) in {0: (0, 0), 24: (0, 24), 25: (1, 0), 40: (1, 15)}.items():
        item = data[index]
        shown = item["observation.images.front"][1].permute(1, 2, 0).numpy() * 255
        assert np.abs(shown - picture(tick)).mean() < 3
        np.testing.assert_allclose(item["action"][0], actions(episode, 25)[tick], atol=1e-4)
        assert bool(item["next.success"]) == (index == 24)
        assert item["task"] == PROMPT
    batch = next(iter(DataLoader(data, batch_size=8, shuffle=True)))
    assert batch["action"].shape == (8, 8, 6)
    assert data.meta.stats["observation.images.wrist"]["mean"].shape == (3, 1, 1)
    assert [data.meta.episodes[i]["success"] for i in range(2)] == [True, None]
    assert set(CAMERAS) == {key.rpartition(".")[2] for key in data.meta.camera_keys}
