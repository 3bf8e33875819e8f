"""What a run left behind, read from the servos' own log, the records and the process table: a list of sentences, empty when all is well."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from env_client.record.files import read_json, read_lines
from env_client.record.report import read_run
from virtual_so101.calibration import JOINTS
from virtual_so101.servo_log import goals_of, read_servo_log

sys.path.insert(0, str(Path(__file__).parent / "env_client" / "so101"))
from kinematic_robot import calibration

__all__ = ["Records", "ServoTail", "marked", "read_records", "violations"]

_TICKS_PER_RAD = 4096 / (2 * np.pi)
# Goals of this many seconds are looked at together: single packets may come close behind each other when a process was
# not scheduled. Ticks of tolerance: rounding, at both ends of each window.
_WINDOW, _ROUNDING = 0.3, 4
_FPS = 30.0
# The second of ticks that a killed process may take along.
_SECOND = 31


class ServoTail:
    """Follows a servo log that is being written."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.goals = 0
        # Of the goals, those that differ from the one before.
        self.changes = 0
        self.torque: dict[str, bool] = {}
        self.last: dict[str, int] = {}

    def read(self) -> ServoTail:
        """Take in what was written since the last call."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                event = json.loads(line)
                if event["kind"] == "goal":
                    self.goals += 1
                    self.changes += any(self.last.get(joint) != goal for joint, goal in event["goal"].items())
                    self.last |= event["goal"]
                elif event["kind"] == "torque":
                    self.torque |= event["torque"]
        return self


def violations(log: Path, speed: float, gripper: float = 2.0) -> list[str]:
    """Goals outside the calibrated range or faster than `speed` (rad/s) and `gripper` (ranges a second)."""
    found = []
    for (arm, joint), commands in goals_of(read_servo_log(log)).items():
        own = calibration(arm).joints[JOINTS.index(joint)]
        if commands.ticks.min() < own.range_min or commands.ticks.max() > own.range_max:
            found.append(f"{log.name} {joint}: a goal outside {own.range_min} to {own.range_max}")
        per_s = speed * _TICKS_PER_RAD
        if joint == "gripper":
            per_s = gripper * (own.range_max - own.range_min)
        allowed = per_s * (_WINDOW + 1 / _FPS) + _ROUNDING
        ends = np.searchsorted(commands.wall, commands.wall + _WINDOW, side="right")
        moved = [np.ptp(commands.ticks[at:end]) for at, end in enumerate(ends)]
        if max(moved) > allowed:
            at = commands.wall[int(np.argmax(moved))]
            found.append(
                f"{log.name} {joint}: {max(moved)} ticks in {_WINDOW} s (allowed {allowed:.0f}) at {at:.2f} s"
            )
    return found


class Records:
    """What inference log and evaluation record of a run hold."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        # Lines of the log, those with a command, and ticks that the lines count as lost.
        self.lines = self.sent = self.lost = 0
        self.frames = 0
        # What each episode's entry says.
        self.outcomes: list[str | None] = []


def read_records(folder: Path, commanded: int, *, since: str) -> Records:
    """Read everything back; `commanded` goals of the episode came to the servos until `since` happened."""
    records = Records()
    logs = sorted(folder.glob("logs/*/inference_log.jsonl"))
    if not logs:
        if commanded > _SECOND:
            records.problems.append(f"{commanded} commands and no inference log")
        return records
    lines = _lines(logs[0], records)
    records.lines = len(lines)
    records.sent = sum(line["sent"] is not None for line in lines)
    records.lost = sum(line.get("lost_ticks", 0) for line in lines)
    missing = commanded - records.sent - records.lost
    if missing > _SECOND:
        records.problems.append(
            f"{missing} of {commanded} commands before {since} are neither in the log nor counted as lost"
        )
    for line in lines:
        for path in line["images"].values():
            if (logs[0].parent / path).read_bytes()[-2:] != b"\xff\xd9":
                records.problems.append(f"{path} is torn although its line is there")
    entries = read_json(logs[0].parent / "metadata.json")["episodes"]
    records.outcomes = [entry["ended"] for entry in entries]
    for record in folder.glob("records/*"):
        metrics = _lines(record / "metrics.jsonl", records)
        shown = read_run(record, record, "link")
        if any(episode.entry["outcome"] is None for episode in shown.episodes):
            records.problems.append(
                f"{record.name}: an episode says neither how it ended nor that it is torn"
            )
        for number, _ in enumerate(shown.episodes):
            frames = sum(line.get("frame") is not None and line["episode"] == number for line in metrics)
            video = record / f"videos/episode_{number:06d}_front.mp4"
            held = _frames(video) if frames > _SECOND or video.exists() else 0
            records.frames += held
            if frames - held > _SECOND:
                records.problems.append(f"{video.name} holds {held} of {frames} frames")
    return records


def _lines(path: Path, records: Records) -> list[dict[str, Any]]:
    try:
        return list(read_lines(path))
    except (OSError, ValueError) as error:
        records.problems.append(str(error))
        return []


def _frames(video: Path) -> int:
    """Frames that can be decoded; a file of which nothing was written yet holds none."""
    import av

    if not video.exists() or video.stat().st_size < 1024:
        return 0
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def marked(name: str, value: str) -> list[psutil.Process]:
    """The processes whose environment says NAME=VALUE: everything that a run has started, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
