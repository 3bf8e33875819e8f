"""A small run for those who record: a robot of six joints with two cameras, seen tick by tick."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from env_client.control import Chunk, Origin, TickRecord
from env_client.envs.env import Observation
from env_client.record.files import read_json, read_lines
from env_client.sidecar.types import (
    Consumer,
    EpisodeEnd,
    EpisodeStart,
    Image,
    RunInfo,
    TickData,
    TickOrigin,
)

JOINTS = tuple(
    f"{name}.pos"
    for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
)
CAMERAS = ("front", "wrist")
FPS = 30.0
SIZE = (96, 128)
PROMPT = "lift up the red cube"
HORIZON = 10


def run_info(**changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "run_id": "2026-11-21_13-45-00",
        "started": 1000.0,
        "config": {"execution": "async", "safety": {"max_velocity": 1.5}},
        "robot": "so101",
        "action_names": JOINTS,
        "unit": "normalized",
        "lower": np.full(6, -100.0),
        "upper": np.full(6, 100.0),
        "state_index": np.arange(6),
        "unit_per_rad": np.full(6, 58.0),
        "states": {"arm": 6},
        "cameras": CAMERAS,
        "fps": FPS,
        "policy": {"type": "act", "horizon": HORIZON},
        "server": "127.0.0.1:8000",
        "prompt": PROMPT,
        "execution": "async",
    }
    return RunInfo(**(values | changes))


def picture(number: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """(height, width, 3) uint8: a smooth one that says its number by its brightness."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 100 // height, columns * 100 // width, np.full_like(rows, 40)], axis=2)
    return (image + number % 100).astype(np.uint8)


def actions(episode: int, count: int) -> np.ndarray:
    """(count, 6) float32: another motion in each episode and joint."""
    ticks = np.arange(count)[:, None]
    return (30 * np.sin(ticks / 15 + np.arange(6)) + episode).astype(np.float32)


def ticks(
    episode: int, count: int, *, images: bool = True, without: Iterable[int] = (), **changes: Any
) -> Iterator[TickData]:
    """`without`: ticks whose pictures were dropped on the way."""
    wanted, missing = actions(episode, count + HORIZON), set(without)
    for number in range(count):
        begun = number % HORIZON == 0
        seen: dict[str, Image] = {}
        if images and number not in missing:
            seen = {"front": picture(number), "wrist": picture(number + 30)}
        moment = 1000.0 + 100 * episode + number / FPS
        values: dict[str, Any] = {
            "images": seen,
            "dropped": 0 if seen or not images else len(CAMERAS),
            "state": wanted[number] - 0.5,
            "capture_time": moment - 1000,
            "requested": wanted[number],
            "sent": wanted[number],
            "stages": {"requested": wanted[number], "velocity": wanted[number]},
            "prompt": PROMPT,
            "origin": TickOrigin(100 * episode + number // HORIZON, number % HORIZON, begun),
        }
        if begun:
            values |= {
                "chunk": wanted[number : number + HORIZON],
                "chunk_id": 100 * episode + number // HORIZON,
                "chunk_capture_time": moment - 1000,
                "round_trip_s": 0.05,
            }
        yield TickData(episode, number, "run", moment - 1000, moment, 0.001, **(values | changes))


def begin(consumer: Consumer, episode: int) -> None:
    consumer.begin_episode(EpisodeStart(episode, 1000.0 + 100 * episode, seed=episode, prompt=PROMPT))


def end(consumer: Consumer, episode: int, steps: int, success: bool | None = None) -> None:
    consumer.end_episode(EpisodeEnd(episode, result(episode, steps, success)))


def result(episode: int, steps: int, success: bool | None = None) -> dict[str, Any]:
    return {
        "episode": episode,
        "outcome": "time",
        "success": success,
        "steps": steps,
        "duration_s": steps / FPS,
        "starved": 0,
        "timing": {"jitter_p99_ms": 1.25},
        "holds": {"no chunk yet": 3},
    }


def play(consumer: Consumer, episode: int, count: int, success: bool | None = None, **options: Any) -> None:
    """One whole episode."""
    begin(consumer, episode)
    for tick in ticks(episode, count, **options):
        consumer.tick(tick)
    end(consumer, episode, count, success)


def records(episode: int, count: int, size: tuple[int, int] = SIZE) -> Iterator[TickRecord]:
    """The same as a control loop tells it."""
    wanted = actions(episode, count + HORIZON)
    shown = [picture(number, *size) for number in range(0, 100, 10)]
    for number in range(count):
        first = number - number % HORIZON
        now = time.monotonic()
        chunk = Chunk(wanted[first : first + HORIZON], first // HORIZON + 1, episode, first, now, 0.05)
        origin = Origin(episode, chunk.seq, now, number == first, np.ones(6), chunk, number - first)
        seen = Observation(
            {"front": shown[number % 10], "wrist": shown[(number + 3) % 10]},
            {"arm": wanted[number] - 0.5},
            PROMPT,
            now,
        )
        yield TickRecord(
            episode,
            number,
            "run",
            now,
            0.0,
            seen,
            requested=wanted[number],
            sent=wanted[number],
            stages={"requested": wanted[number]},
            origin=origin,
        )


def only(folder: Path) -> Path:
    """The one entry of a folder."""
    (entry,) = folder.iterdir()
    return entry


def summary_of(record: Path) -> dict[str, Any]:
    return read_json(record / "summary.json")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return list(read_lines(path))
