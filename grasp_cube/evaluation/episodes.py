"""What one episode of an evaluation showed, and what all of them say together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from env_client.record.statistics import wilson

__all__ = ["Episode", "format_table", "summarize"]


@dataclass(frozen=True)
class Episode:
    """One episode. Figures that a way of running does not have are None."""

    seed: int
    success: bool
    # Ticks that the robot was driven, until success or the end.
    steps: int
    # Ticks of an episode under way without an action to send.
    starved: int | None = None
    # Largest change of a commanded joint from one tick to the next, in rad: at the first action of a new chunk, and
    # inside chunks.
    boundary_step: float | None = None
    inner_step: float | None = None
    # Round trips of the episode's requests, in ms.
    round_trips: tuple[float, ...] = ()


def summarize(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Plain values: rate, interval, and medians and extremes of what was measured."""
    solved = [episode for episode in episodes if episode.success]
    trips = np.array([trip for episode in episodes for trip in episode.round_trips])
    return {
        "episodes": len(episodes),
        "successes": len(solved),
        "rate": len(solved) / len(episodes),
        # Of 95 %.
        "interval": wilson(len(solved), len(episodes)),
        "steps_to_success": _spread([episode.steps for episode in solved]),
        "starved": _total([episode.starved for episode in episodes]),
        "boundary_step_rad": _largest([episode.boundary_step for episode in episodes]),
        "inner_step_rad": _largest([episode.inner_step for episode in episodes]),
        "round_trip_ms": _spread(trips),
        "failed_seeds": [episode.seed for episode in episodes if not episode.success],
        "per_episode": [asdict(episode) for episode in episodes],
    }


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The table for people, one column for each way in which the policy was run."""
    rows = {
        "success": lambda s: f"{s['successes']} of {s['episodes']}",
        "rate, 95 % interval": lambda s: (
            f"{s['rate']:.0%} ({s['interval'][0]:.0%} to {s['interval'][1]:.0%})"
        ),
        "steps to success, p50 (p90)": lambda s: _pair(s["steps_to_success"], "p50", "p90", "{:.0f}"),
        "starved ticks": lambda s: "-" if s["starved"] is None else str(s["starved"]),
        "largest step at a boundary": lambda s: _number(s["boundary_step_rad"], "{:.3f} rad"),
        "largest step inside chunks": lambda s: _number(s["inner_step_rad"], "{:.3f} rad"),
        "round trip, p50 (p99)": lambda s: _pair(s["round_trip_ms"], "p50", "p99", "{:.0f} ms"),
        "failed seeds": lambda s: ", ".join(map(str, s["failed_seeds"])) or "none",
    }
    table = [["", *summaries], *([name, *map(show, summaries.values())] for name, show in rows.items())]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(np.max(values))}


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _pair(spread: dict[str, float] | None, first: str, second: str, form: str) -> str:
    return "-" if spread is None else f"{form.format(spread[first])} ({form.format(spread[second])})"
