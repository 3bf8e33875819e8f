"""A tick as one line of JSON: what the inference log and the evaluation record have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from env_client.sidecar.types import RunInfo, TickData

__all__ = ["RECORDED", "measured", "rounded", "step"]

# Phases of a tick that belong to an episode.
RECORDED = ("run", "paused")


def measured(run: RunInfo, tick: TickData) -> np.ndarray | None:
    """(A,) the measured value of each action value; None where the robot could not be read."""
    return None if tick.state is None or not len(run.state_index) else tick.state[run.state_index]


def step(tick: TickData) -> dict[str, Any]:
    """What every line holds. Arrays are rounded to 1e-5, a hundredth of a servo's step."""
    origin = tick.origin
    line: dict[str, Any] = {
        "episode": tick.episode,
        "tick": tick.tick,
        "phase": tick.phase,
        "time": round(tick.unix, 4),
        "late_ms": _ms(tick.late_s),
        "read_ms": _ms(tick.read_s),
        "think_ms": _ms(tick.think_s),
        "send_ms": _ms(tick.send_s),
        "requested": rounded(tick.requested),
        "sent": rounded(tick.sent),
        "held": tick.held,
        # No action came from the policy, and nothing was wrong with one.
        "starved": tick.requested is None and tick.refused is None and tick.phase == "run",
        "refused": tick.refused,
        "chunk_id": None if origin is None else origin.chunk_id,
        "chunk_index": None if origin is None else origin.index,
        "boundary": origin is not None and origin.boundary,
    }
    if tick.round_trip_s is not None:
        line["round_trip_ms"] = _ms(tick.round_trip_s)
    for name, value in (("lost_ticks", tick.lost), ("dropped_images", tick.dropped), ("error", tick.error)):
        if value:
            line[name] = value
    return line


def rounded(array: np.ndarray | None) -> list[Any] | None:
    return None if array is None else np.round(np.asarray(array, np.float64), 5).tolist()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
