"""What a client's inference log says of its motion."""

import json
from pathlib import Path
from typing import Any

import pytest

from grasp_cube.evaluation.inference_log import read_motion


def line(tick: int, sent: list[float] | None, *, boundary: bool = False, **more: Any) -> str:
    return json.dumps({"episode": 3, "tick": tick, "sent": sent, "boundary": boundary} | more) + "\n"


def test_steps_are_told_apart_by_where_the_chunk_began(tmp_path: Path) -> None:
    """In rad, by each joint's own scale; a gripper, a gap and a held tick do not count."""
    session = tmp_path / "session_2026-11-21_10-00-00"
    session.mkdir()
    names = ["pan.pos", "lift.pos", "gripper.pos"]
    metadata = {"action_names": names, "unit_per_rad": [100.0, 50.0, 1.0]}
    (session / "metadata.json").write_text(json.dumps(metadata))
    (session / "inference_log.jsonl").write_text(
        line(0, [0, 0, 0], boundary=True, round_trip_ms=40.0)
        + line(1, [1, 2, 90])  # 0.01 and 0.04 rad
        + line(2, [4, 2, 0], boundary=True, round_trip_ms=50.0)  # 0.03 rad
        + line(4, [99, 99, 0])  # a tick was skipped
        + line(5, None)
        + line(6, [0, 0, 0])
        + line(7, [0, 1, 0])  # 0.02 rad
    )
    assert read_motion(tmp_path) == {
        3: {
            "boundary_step": pytest.approx(0.03),
            "inner_step": pytest.approx(0.04),
            "round_trips": (40.0, 50.0),
        }
    }


def test_no_log_tells_nothing(tmp_path: Path) -> None:
    """As after a run with logging switched off."""
    assert read_motion(tmp_path) == {}
