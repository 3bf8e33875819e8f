"""How the commanded joints moved and how long requests took, from a client's inference log."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_motion"]


def read_motion(logs: Path) -> dict[int, dict[str, Any]]:
    """By episode, the fields of `Episode` that the newest log under `logs` tells; empty without one.

    Steps are those of one tick, over all joints but grippers, in rad.
    """
    sessions = sorted(logs.glob("session_*"))
    if not sessions:
        return {}
    run = json.loads((sessions[-1] / "metadata.json").read_text())
    scale = np.asarray(run["unit_per_rad"], np.float64)
    body = np.array(["gripper" not in name for name in run["action_names"]])
    episodes: dict[int, list[dict[str, Any]]] = {}
    with (sessions[-1] / "inference_log.jsonl").open() as lines:
        for line in lines:
            entry = json.loads(line)
            episodes.setdefault(entry["episode"], []).append(entry)
    return {episode: _motion(entries, scale, body) for episode, entries in episodes.items()}


def _motion(entries: list[dict[str, Any]], scale: np.ndarray, body: np.ndarray) -> dict[str, Any]:
    steps: dict[bool, float] = {}
    for before, now in pairwise(entries):
        # A tick that is missing, or held, says nothing of a step.
        if now["tick"] != before["tick"] + 1 or before["sent"] is None or now["sent"] is None:
            continue
        change = np.abs(np.subtract(now["sent"], before["sent"]) / scale)[body].max()
        steps[now["boundary"]] = max(steps.get(now["boundary"], 0.0), float(change))
    return {
        "boundary_step": steps.get(True),
        "inner_step": steps.get(False),
        "round_trips": tuple(entry["round_trip_ms"] for entry in entries if "round_trip_ms" in entry),
    }
