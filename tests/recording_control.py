"""A control process without a robot: it hands ticks to a sidecar until it is killed. `recording_control.py FOLDER [STEPS]`

It says the sidecar's process id, each episode that ends, and every tenth tick; the last episode has no end. Every ten ticks
it lets the files catch up, so that nothing is left out on a busy machine and every frame can be accounted for.
"""

import sys
import time
from pathlib import Path

from env_client.replay import Pace
from env_client.sidecar.config import LogConfig, RecordConfig, SidecarConfig
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import EpisodeEnd, EpisodeStart
from record_parts import PROMPT, records, result, run_info

# Ticks of each episode but the last, and how many of those there are.
STEPS, EPISODES = 40, 2
ENDLESS = 100_000


def main() -> None:
    folder = Path(sys.argv[1])
    config = SidecarConfig(
        log=LogConfig(dir=folder / "logs"),
        record=RecordConfig(dir=folder / "records", plots=False, dataset_path=folder / "dataset"),
    )
    feed = SidecarFeed(config, say=lambda line: print(line, flush=True))
    print(f"sidecar {feed.pid}", flush=True)
    feed.begin_run(run_info(started=time.time()))
    assert feed.wait_ready(200)
    for episode in range(EPISODES):
        play(feed, folder, episode, STEPS)
        feed.end_episode(EpisodeEnd(episode, result(episode, STEPS)))
        print(f"ended {episode}", flush=True)
    play(feed, folder, EPISODES, ENDLESS)


def play(feed: SidecarFeed, folder: Path, episode: int, count: int) -> None:
    feed.begin_episode(EpisodeStart(episode, time.time(), None, PROMPT))
    pace = Pace(30.0)
    for record in records(episode, count):
        pace.wait()
        feed.push(record)
        if record.tick % 10 == 9:
            print(f"episode {episode} tick {record.tick + 1}", flush=True)
            catch_up(feed, folder, STEPS * episode + record.tick + 1)


def catch_up(feed: SidecarFeed, folder: Path, pushed: int) -> None:
    """Until log and record hold that many lines, or nobody writes them any more."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not feed.gone:
        files = [*folder.glob("logs/*/inference_log.jsonl"), *folder.glob("records/*/metrics.jsonl")]
        if len(files) == 2 and all(file.read_bytes().count(b"\n") >= pushed for file in files):
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main()
