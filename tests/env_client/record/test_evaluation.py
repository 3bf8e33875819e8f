"""The evaluation record as files: figures, videos, judgements, plots."""

import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from env_client.record.episode_plot import draw_episode
from env_client.record.evaluation import EvaluationRecord
from env_client.record.files import RunFolder
from env_client.record.video import EpisodeVideos
from env_client.sidecar.config import RecordConfig
from env_client.sidecar.types import Mark
from env_client.wire import encode_image
from record_parts import (
    CAMERAS,
    FPS,
    actions,
    begin,
    end,
    lines_of,
    only,
    picture,
    play,
    run_info,
    summary_of,
    ticks,
)


def evaluation(folder: Path, said: list[str] | None = None, **config: object) -> EvaluationRecord:
    options = RecordConfig(**({"dir": folder, "plots": False} | config))  # type: ignore[arg-type]
    record = EvaluationRecord(options, RunFolder(folder), (said if said is not None else []).append)
    record.begin_run(run_info())
    return record


def frames_of(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_camera_is_filmed_tick_by_tick(tmp_path: Path) -> None:
    """Frame k of each camera's video is the picture of the line that says frame k."""
    record = evaluation(tmp_path)
    play(record, 0, 40, without=(5, 6))
    record.close()
    folder = only(tmp_path)
    lines = lines_of(folder / "metrics.jsonl")
    assert len(lines) == 40
    numbered = {line["frame"]: line["tick"] for line in lines if line["frame"] is not None}
    assert list(numbered) == list(range(38))
    for camera, shift in zip(CAMERAS, (0, 30), strict=True):
        frames = frames_of(folder / f"videos/episode_000000_{camera}.mp4")
        assert len(frames) == 38
        for frame, tick in numbered.items():
            assert np.abs(frames[frame].astype(int) - picture(tick + shift)).mean() < 3
    (entry,) = summary_of(folder)["episodes"]
    assert (entry["frames"], entry["ticks_without_pictures"], entry["ticks"]) == (38, 2, 40)
    np.testing.assert_allclose([line["measured"] for line in lines], actions(0, 40) - 0.5, atol=1e-5)


def test_a_videos_time_is_the_loops(tmp_path: Path) -> None:
    """Pictures that were left out leave a gap in time and shorten nothing."""
    record = evaluation(tmp_path)
    play(record, 0, 30, without=range(10, 20))
    record.close()
    with av.open(str(only(tmp_path) / "videos/episode_000000_front.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    expected = [tick / FPS for tick in range(30) if not 10 <= tick < 20]
    np.testing.assert_allclose(times, expected, atol=1e-3)


def test_judgements_and_their_rate(tmp_path: Path) -> None:
    """A person's word stands above the env's, the last one counts, and what nobody judged counts for nothing."""
    record = evaluation(tmp_path, videos=False)
    for episode, known in enumerate((None, True, False, None)):
        play(record, episode, 3, success=known)
    record.mark(Mark(0, True, "well done"))
    record.mark(Mark(1, True))
    record.mark(Mark(1, False, "only touched it"))
    summary = summary_of(only(tmp_path))
    told = [(e["success"], e["judged_by"], e["note"]) for e in summary["episodes"]]
    assert told == [
        (True, "person", "well done"),
        (False, "person", "only touched it"),
        (False, "env", ""),
        (None, None, ""),
    ]
    success = summary["success"]
    assert (success["judged"], success["successes"], summary["state"]) == (3, 1, "running")
    assert success["interval_95"] == pytest.approx([0.0615, 0.7923], abs=1e-4)
    record.close()
    assert summary_of(only(tmp_path))["state"] == "finished"


def test_a_judgement_during_the_episode_survives_its_end(tmp_path: Path) -> None:
    """Success is pressed while the arm still moves, and the env says nothing."""
    record = evaluation(tmp_path, videos=False)
    begin(record, 0)
    record.mark(Mark(0, True, "in time"))
    end(record, 0, 0)
    record.close()
    (entry,) = summary_of(only(tmp_path))["episodes"]
    assert (entry["success"], entry["judged_by"], entry["note"]) == (True, "person", "in time")


def test_between_episodes_nothing_is_recorded(tmp_path: Path) -> None:
    """Ticks of a move, of a leader arm and of an idle loop belong to no episode; those on hold do."""
    record = evaluation(tmp_path, videos=False)
    for tick in ticks(0, 2):
        record.tick(tick)
    begin(record, 0)
    for tick, phase in zip(ticks(0, 4), ("move", "run", "paused", "idle"), strict=True):
        record.tick(replace(tick, phase=phase))
    end(record, 0, 1)
    for tick in ticks(0, 2):
        record.tick(tick)
    record.close()
    assert [line["phase"] for line in lines_of(only(tmp_path) / "metrics.jsonl")] == ["run", "paused"]


def test_odd_and_compressed_pictures_are_filmed_and_a_new_size_is_left_out(tmp_path: Path) -> None:
    """Colour needs even sizes; a camera may give JPEGs; one that changes its size does not end the record."""
    videos = EpisodeVideos(tmp_path, 0, ("front",), FPS)
    tick = next(ticks(0, 1))
    videos.add(replace(tick, images={"front": encode_image(picture(1, 97, 129), "jpeg")}))
    videos.add(replace(tick, tick=1, images={"front": picture(2, 97, 129)}))
    assert videos.add(replace(tick, tick=2, images={"front": picture(2, 50, 60)})) is None
    videos.close()
    videos.close()
    assert [frame.shape for frame in frames_of(videos.paths["front"])] == [(96, 128, 3)] * 2
    assert videos.missing == 1


def test_a_video_that_was_torn_opens(tmp_path: Path) -> None:
    """What a killed process leaves of a video plays up to the last third of a second."""
    videos = EpisodeVideos(tmp_path, 0, CAMERAS, FPS)
    for tick in ticks(0, 65):
        videos.add(tick)
    torn = shutil.copy(videos.paths["front"], tmp_path / "torn.mp4")
    videos.close()
    assert 55 <= len(frames_of(Path(torn))) < 65
    assert len(frames_of(videos.paths["front"])) == 65


def test_a_plot_is_drawn_from_the_files(tmp_path: Path) -> None:
    """In a process of its own after an episode, and of a torn one as well."""
    record = evaluation(tmp_path, plots=True, videos=False)
    play(record, 0, 20)
    begin(record, 1)
    for tick in ticks(1, 5):
        record.tick(tick)
    record.close()
    folder = only(tmp_path)
    assert (folder / "episode_000000_actions.png").stat().st_size > 10_000
    drawn = draw_episode(folder, 1)
    assert drawn is not None
    assert drawn.stat().st_size > 10_000
    assert draw_episode(folder, 7) is None
    torn = summary_of(folder)["episodes"][1]
    assert torn["outcome"] == "torn: the run broke off"
