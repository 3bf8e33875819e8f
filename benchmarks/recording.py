"""What recording and showing costs the control loop: everything on against everything off, in turn.

    uv run python benchmarks/recording.py [--quick] [--rounds 6] [--seconds 20] [--browsers 3] [--json FILE]

The loop runs at 30 Hz with two 640x480 cameras that give a new picture in each tick; chunks come from a real server
process over a WebSocket. Rounds with everything off and with inference log, videos, `.rrd`, dataset and the page with its
browsers (a process that takes and acknowledges every update, as a page does) alternate, so that what the machine does to
one it does to the other. Jitter is how far the intervals between commands are from the period.

The second table is about memory: simulated ticks with small pictures as fast as a sidecar takes them, and what it
holds at each quarter (an hour at 30 Hz is 108,000 ticks).
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from clients import used_cores
from control import FPS, SPEC, Arm
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, TickRecord, make_source
from env_client.control.clock import MonotonicClock
from env_client.envs.env import Observation
from env_client.panel.config import PanelConfig, open_panel
from env_client.record.files import read_json
from env_client.replay import Pace
from env_client.sidecar.config import LogConfig, RecordConfig, SidecarConfig
from env_client.sidecar.describe import describe_run
from env_client.sidecar.feed import SidecarFeed
from env_client.sidecar.types import EpisodeEnd, EpisodeStart
from env_client.summary import plain_result
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from ratios import Part, Ratio
from tqdm import tqdm
from wire import observation, start_ours

FILMED = replace(SPEC, cameras=("front", "wrist"))
# How far p99 of the jitter may grow, ms.
ALLOWED_MS = 3.0
_BROWSER = """
import asyncio, sys, websockets
async def browse(port):
    async with websockets.connect(f"ws://127.0.0.1:{port}/live", max_size=None, compression=None) as page:
        async for message in page:
            if isinstance(message, str):
                await page.send('{"drawn": 1}')
async def main():
    await asyncio.gather(*(browse(sys.argv[1]) for _ in range(int(sys.argv[2]))))
asyncio.run(main())
"""


class FilmedArm(Arm):
    """The arm of the control benchmark, with other pictures in each tick."""

    def __init__(self, pictures: list[dict[str, np.ndarray]]):
        super().__init__(time.monotonic)
        self._pictures = itertools.cycle(pictures)

    def get_observation(self) -> Observation:
        self._images = next(self._pictures)
        return super().get_observation()


class Pushed:
    """How long the loop's own thread is with the feed in each tick."""

    def __init__(self, feed: SidecarFeed):
        self.seconds: list[float] = []
        self._feed = feed

    def push(self, record: TickRecord) -> None:
        began = time.perf_counter()
        self._feed.push(record)
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of 6 s, 3,000 simulated ticks")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of off and on")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each of the two")
    parser.add_argument("--browsers", type=int, default=3)
    parser.add_argument("--ticks", type=int, default=108_000, help="simulated ticks of the memory table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.ticks = 1, 6.0, 3000
    figures = {
        "jitter": jitter(options.rounds, options.seconds, options.browsers),
        "memory": memory(options.ticks),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(quick: bool) -> Part:
    """For the suite: what a recorded tick costs the loop, beside writing its two pictures uncompressed."""
    rounds, seconds = (1, 6.0) if quick else (3, 12.0)
    rows = jitter(rounds, seconds, 3)
    raw = [written(moving_pictures(480, 640, 15)) for _ in range(rounds)]
    middle = {
        key: float(np.median([each[key] for each in rows["on"]])) for key in ("sidecar_cpu", "control_cpu")
    }
    ratio = Ratio(
        "recording.in_the_loop",
        "a recorded and shown tick's time in the control loop, beside writing its pictures raw to the disk",
        "ms",
        [each["push_ms"] for each in rows["on"]],
        raw,
        {
            "cores that the sidecar keeps busy": middle["sidecar_cpu"],
            "cores of the control process": middle["control_cpu"],
            "cores of the control process with everything off": float(
                np.median([each["control_cpu"] for each in rows["off"]])
            ),
            "growth of the loop's p99 jitter, ms": rows["p99_growth_ms"],
            "GB an hour, were the pictures raw": 2 * 480 * 640 * 3 * FPS * 3600 / 1e9,
        },
    )
    return Part("recording", [ratio])


def written(pictures: list[dict[str, np.ndarray]]) -> float:
    """Milliseconds of a tick whose pictures are written as they are, by the thread that has them."""
    times = []
    with tempfile.TemporaryDirectory() as name:
        for number, images in enumerate(pictures * 4):
            began = time.perf_counter()
            with open(Path(name) / f"{number:06d}.raw", "wb") as file:
                for image in images.values():
                    file.write(image.data)
            times.append((time.perf_counter() - began) * 1e3)
    return float(np.mean(times))


def jitter(rounds: int, seconds: float, browsers: int) -> dict[str, Any]:
    """The first table."""
    pictures = moving_pictures(480, 640, 15)
    rows: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as port:
        for turn in tqdm(range(2 * rounds), desc=f"{seconds:g} s each", unit="run"):
            mode = ("off", "on")[turn % 2]
            rows[mode].append(drive(mode, Path(name) / str(turn), port, pictures, seconds, browsers))
    print(
        f"\n{os.cpu_count()} cores, {rounds} x {seconds:g} s each, 30 Hz, 2 x 640x480, {browsers} browsers, ms"
    )
    print(
        f"{'':6}{'jitter p50':>11}{'p99':>8}{'max':>8}{'skipped':>9}{'in the loop':>13}{'control cpu':>13}{'sidecar cpu':>13}"
        f"{'frames':>8}{'left out':>10}{'ticks lost':>12}"
    )
    middle = {}
    for mode, runs in rows.items():
        row = middle[mode] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        print(
            f"{mode:6}{row['jitter_p50_ms']:11.2f}{row['jitter_p99_ms']:8.2f}{row['jitter_max_ms']:8.2f}{row['skipped']:9.0f}"
            f"{row['push_ms']:13.4f}{row['control_cpu']:13.2f}{row['sidecar_cpu']:13.2f}{row['frames']:8.0f}"
            f"{row['left_out']:10.0f}{row['lost']:12.0f}"
        )
    pairs = zip(rows["off"], rows["on"], strict=True)
    growth = float(np.median([on["jitter_p99_ms"] - off["jitter_p99_ms"] for off, on in pairs]))
    print(f"p99 grows by {growth:.2f} ms in the median pair ({ALLOWED_MS:g} ms are allowed)")
    return rows | {"p99_growth_ms": growth}


def drive(
    mode: str, folder: Path, port: int, pictures: list[dict[str, np.ndarray]], seconds: float, browsers: int
) -> dict[str, Any]:
    """One run."""
    client = WebsocketClientPolicy("127.0.0.1", port, on_status=lambda sentence: None)
    assert client.spec is not None
    source = make_source("async", client, client.spec, FPS)
    arm = FilmedArm(pictures)
    loop = ControlLoop(arm, source, SafetyFilter(SPEC, SafetyConfig(), FPS), FPS, clock=MonotonicClock())
    result: dict[str, Any] = {"push_ms": 0.0, "sidecar_cpu": 0.0, "frames": 0, "left_out": 0, "lost": 0}
    if mode == "off":
        cpu, outcome = timed_episode(loop, seconds)
    else:
        with recorded(folder, client, browsers) as feed:
            pushed = Pushed(feed)
            loop.publish_to(pushed)
            feed.follow(source)
            feed.begin_episode(EpisodeStart(0, time.time()))
            # With the process that serves the page.
            with used_cores(feed.pid) as used:
                cpu, outcome = timed_episode(loop, seconds)
            result["sidecar_cpu"] = used[0]
            feed.end_episode(EpisodeEnd(0, plain_result(outcome)))
        (record,) = (folder / "records").iterdir()
        (entry,) = read_json(record / "summary.json")["episodes"]
        result |= {"push_ms": 1e3 * float(np.mean(pushed.seconds)), "frames": entry["frames"]}
        result |= {"left_out": entry["ticks_without_pictures"], "lost": entry["ticks_lost"]}
    client.close()
    source.close()
    return result | outcome.timing | {"control_cpu": cpu}


def timed_episode(loop: ControlLoop, seconds: float) -> tuple[float, Any]:
    cpu = time.process_time()
    outcome = loop.run_episode(time_s=seconds)
    return (time.process_time() - cpu) / seconds, outcome


@contextmanager
def recorded(folder: Path, client: WebsocketClientPolicy, browsers: int) -> Iterator[SidecarFeed]:
    """A sidecar with everything on, and its browsers."""
    panel, listening = open_panel(PanelConfig(port=0), lambda line: None)
    assert listening is not None
    config = SidecarConfig(
        log=LogConfig(dir=folder / "logs"),
        record=RecordConfig(dir=folder / "records", dataset_path=folder / "dataset"),
        panel=panel,
        panel_fd=listening.fileno(),
    )
    feed = SidecarFeed(config, say=lambda line: None)
    listening.close()
    viewers = subprocess.Popen([sys.executable, "-c", _BROWSER, str(panel.port), str(browsers)])
    try:
        feed.begin_run(
            describe_run(
                panel,
                FILMED,
                client.spec,
                fps=FPS,
                server="127.0.0.1",
                prompt="benchmark",
                execution="async",
            )
        )
        if not feed.wait_ready(60.0):
            raise RuntimeError("the sidecar did not start within 60 s")
        yield feed
    finally:
        viewers.kill()
        viewers.wait()
        feed.close(60.0)


def moving_pictures(height: int, width: int, count: int) -> list[dict[str, np.ndarray]]:
    """A scene with structure and noise that moves to the side."""
    still = observation(height, width)["images"]
    return [
        {name: np.roll(image, 7 * step, axis=1) for name, image in still.items()} for step in range(count)
    ]


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """A server with a policy that takes 100 ms; its port."""
    cameras = tuple({"name": n, "height": 480, "width": 640, "resize": "none"} for n in ("front", "wrist"))
    checkpoint = write_checkpoint(folder / "wave", horizon=100, delay_s=0.1, cameras=cameras, unit="rad")
    process, port = start_ours(checkpoint)
    try:
        yield port
    finally:
        process.kill()


def memory(ticks: int) -> list[dict[str, Any]]:
    """The second table."""
    pictures = moving_pictures(120, 160, 15)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SidecarConfig(
            log=LogConfig(dir=folder / "logs"),
            record=RecordConfig(dir=folder / "records", plots=False),
        )
        feed = SidecarFeed(config, say=lambda line: None)
        feed.begin_run(
            describe_run(
                config, FILMED, None, fps=FPS, server="none", prompt="benchmark", execution="simulated"
            )
        )
        feed.wait_ready(60.0)
        feed.begin_episode(EpisodeStart(0, time.time()))
        sidecar, pace = psutil.Process(feed.pid), Pace(200.0)
        zeros = np.zeros(6, np.float32)
        for tick in tqdm(range(ticks), desc="simulated ticks", unit="tick"):
            seen = Observation(pictures[tick % len(pictures)], {"arm": zeros}, "", time.monotonic())
            pace.wait()
            feed.push(
                TickRecord(0, tick, "run", seen.capture_time, 0.0, seen, zeros, zeros, {"requested": zeros})
            )
            if tick % max(1, ticks // 4) == ticks // 8:
                rows.append({"tick": tick, "mb": sidecar.memory_info().rss / 1e6, "lost": feed.lost})
        feed.close(60.0)
    print(f"\nMemory of the sidecar over {ticks} ticks (log, videos, .rrd)")
    for row in rows:
        print(f"  tick {row['tick']:7d}   {row['mb']:6.0f} MB   {row['lost']} ticks lost")
    return rows


if __name__ == "__main__":
    main()
