"""Control and sidecar as real processes: killed, hung, out of disk. What is on disk is whole, and nobody waits."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import psutil
import pytest
from env_client.envs.dataset_files import LeRobotFiles
from env_client.record.report import read_run
from env_client.replay import Pace
from env_client.sidecar.config import LogConfig, RecordConfig, SidecarConfig
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark
from processes import ROOT, Running, running
from record_parts import CAMERAS, PROMPT, lines_of, only, records, result, run_info, summary_of
from recording_control import EPISODES, STEPS

START_S = 200.0
HANGS = "shows the run hangs; the robot goes on"


def wait_until(happened: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s:g} s"
        time.sleep(0.02)


def frames_of(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def control(tmp_path: Path) -> Iterator[tuple[Running, int]]:
    """A control process in the middle of its third episode, and its sidecar's process id."""
    env = {"PYTHONPATH": str(ROOT / "tests")}
    with running(sys.executable, ROOT / "tests/recording_control.py", tmp_path, env=env) as child:
        sidecar = int(child.wait_for(r"sidecar (\d+)", START_S)[1])
        try:
            child.wait_for(rf"episode {EPISODES} tick 60", START_S)
            yield child, sidecar
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sidecar, signal.SIGKILL)


def check_finished_episodes(folder: Path) -> None:
    """Everything of the episodes that ended is there, and the frames say which ticks they show."""
    record = only(folder / "records")
    lines = lines_of(record / "metrics.jsonl")
    entries = summary_of(record)["episodes"]
    for episode in range(EPISODES):
        mine = [line for line in lines if line["episode"] == episode]
        assert [line["frame"] for line in mine] == list(range(STEPS))
        assert entries[episode]["outcome"] == "time"
        for camera in CAMERAS:
            assert frames_of(record / f"videos/episode_{episode:06d}_{camera}.mp4") == STEPS
        assert LeRobotFiles(folder / "dataset").episode(episode).length == STEPS
    log = only(folder / "logs")
    for line in lines_of(log / "inference_log.jsonl"):
        assert all((log / path).read_bytes()[-2:] == b"\xff\xd9" for path in line["images"].values())


def test_a_killed_control_process_leaves_finished_files(control: tuple[Running, int], tmp_path: Path) -> None:
    """The sidecar notices, finishes every file, says of the torn episode that it is torn, and ends."""
    child, sidecar = control
    process = psutil.Process(sidecar)
    child.process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(START_S)
    check_finished_episodes(tmp_path)
    record = only(tmp_path / "records")
    torn = summary_of(record)["episodes"][EPISODES]
    assert torn["outcome"] == "torn: the run broke off"
    assert frames_of(record / f"videos/episode_{EPISODES:06d}_front.mp4") == torn["frames"] > 10


@pytest.mark.parametrize("both", [False, True], ids=["the sidecar", "both"])
def test_a_killed_sidecar_leaves_good_files(control: tuple[Running, int], tmp_path: Path, both: bool) -> None:
    """The robot's process goes on and says it once; what was written until then can be used."""
    child, sidecar = control
    os.kill(sidecar, signal.SIGKILL)
    if both:
        child.process.kill()
    else:
        ticks = child.output.count("tick")
        child.wait_for("ended; the robot goes on without records")
        wait_until(lambda: child.output.count("tick") > ticks + 3, "ticks after it")
        assert child.output.count("ended; the robot goes on") == 1
        assert child.process.poll() is None
    check_finished_episodes(tmp_path)
    record = only(tmp_path / "records")
    assert summary_of(record)["episodes"][EPISODES]["outcome"] is None
    torn = read_run(record, record, "link").episodes[EPISODES]
    assert torn.entry["outcome"] == "torn: the run broke off"
    assert torn.actions is not None
    assert frames_of(record / f"videos/episode_{EPISODES:06d}_front.mp4") > 10
    assert LeRobotFiles(tmp_path / "dataset").info["total_episodes"] == EPISODES


# ------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def said() -> list[str]:
    return []


def open_feed(config: SidecarConfig, said: list[str]) -> SidecarFeed:
    feed = SidecarFeed(config, say=said.append)
    feed.begin_run(run_info(started=time.time()))
    assert feed.wait_ready(START_S)
    return feed


def stream(feed: SidecarFeed, episode: int, until: Callable[[int], bool], limit: int = 3000) -> int:
    """Push ticks at 60 Hz until something happened; how many."""
    feed.begin_episode(EpisodeStart(episode, time.time(), None, PROMPT))
    pace, count = Pace(60.0), 0
    for record in records(episode, limit):
        if until(count):
            break
        pace.wait()
        feed.push(record)
        count += 1
    feed.end_episode(EpisodeEnd(episode, result(episode, count)))
    return count


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path, said: list[str]) -> None:
    """A real one of 1 MB: the log says why it stopped, its lines stay good, and the record is complete."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk, and not everywhere")
    try:
        config = SidecarConfig(
            log=LogConfig(dir=disk), record=RecordConfig(dir=tmp_path / "records", plots=False, rrd=False)
        )
        feed = open_feed(config, said)
        count = stream(feed, 0, lambda count: any("stopped" in line for line in said))
        stream(feed, 1, lambda count: count == 10)
        assert feed.close(START_S)
        assert [line for line in said if "stopped" in line] == [
            "The inference log stopped (No space left on device); everything else goes on."
        ]
        assert 5 < len(lines_of(only(disk) / "inference_log.jsonl")) <= count
        entries = summary_of(only(tmp_path / "records"))["episodes"]
        assert [entry["outcome"] for entry in entries] == ["time", "time"]
        assert entries[1]["ticks"] + entries[1]["ticks_lost"] == 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_that_may_not_grow_ends_its_writer(tmp_path: Path, said: list[str]) -> None:
    """The same through a limit on the sidecar's files, which needs no rights."""
    feed = open_feed(SidecarConfig(log=LogConfig(dir=tmp_path), record=RecordConfig(enable=False)), said)
    resource.prlimit(feed.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    stream(feed, 0, lambda count: any("stopped" in line for line in said))
    assert feed.close(START_S)
    assert [line for line in said if "stopped" in line] == [
        "The inference log stopped (File too large); everything else goes on."
    ]
    folder = only(tmp_path)
    assert (folder / "inference_log.jsonl").stat().st_size <= 60_000
    assert len(lines_of(folder / "inference_log.jsonl")) > 20


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, said: list[str]) -> None:
    """A mistyped folder costs the log, not the run; a mark and its episode still get their record."""
    (tmp_path / "file").write_text("no folder")
    config = SidecarConfig(
        log=LogConfig(dir=tmp_path / "file"),
        record=RecordConfig(dir=tmp_path / "records", plots=False, rrd=False, videos=False),
    )
    feed = open_feed(config, said)
    stream(feed, 0, lambda count: count == 5)
    feed.mark(Mark(0, True, "fine"))
    assert feed.close(START_S)
    assert "The inference log stopped (File exists); everything else goes on." in said
    (entry,) = summary_of(only(tmp_path / "records"))["episodes"]
    assert (entry["success"], entry["note"]) == (True, "fine")


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, said: list[str]) -> None:
    """Thousands of ticks with log, videos and rollout.rrd: the second half adds next to nothing to the first."""
    config = SidecarConfig(log=LogConfig(dir=tmp_path), record=RecordConfig(dir=tmp_path, plots=False))
    feed = open_feed(config, said)
    sidecar, held = psutil.Process(feed.pid), list[float]()

    def look(count: int) -> bool:
        if count in (1400, 2800):
            held.append(sidecar.memory_info().rss / 1e6)
        return count == 2800

    stream(feed, 0, look)
    assert feed.close(START_S)
    # Libraries keep some MB; 1,400 ticks of pictures that were not let go would be 100 MB.
    assert held[1] - held[0] < 40


@pytest.mark.slow
def test_a_sidecar_that_hangs_holds_up_nobody(tmp_path: Path, said: list[str]) -> None:
    """Pushing goes on at once, ticks are counted as lost, and when it is back the record goes on."""
    config = SidecarConfig(
        log=LogConfig(enable=False), record=RecordConfig(dir=tmp_path, plots=False, rrd=False, videos=False)
    )
    feed = open_feed(config, said)
    os.kill(feed.pid, signal.SIGSTOP)
    try:
        before = stream(feed, 0, lambda count: any(HANGS in line for line in said))
    finally:
        os.kill(feed.pid, signal.SIGCONT)
    wait_until(lambda: any("is back" in line for line in said), "its return")
    after = stream(feed, 1, lambda count: count == 30)
    assert feed.close(START_S)
    lines = lines_of(only(tmp_path) / "metrics.jsonl")
    assert len(lines) + feed.lost == before + after
    assert feed.lost > 0
    assert sum(line.get("lost_ticks", 0) for line in lines) == feed.lost
    assert sum(HANGS in line for line in said) == 1
