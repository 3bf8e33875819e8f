"""`python -m env_client.record.episode_plot RECORD EPISODE...`: the plots of recorded episodes.

A process of its own: drawing computes for a second, and whoever records has none to give. A plot that cannot be drawn is one
line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from env_client.record.files import read_json, read_lines

__all__ = ["draw_episode", "draw_timing", "plot_name"]


def plot_name(episode: int) -> str:
    return f"episode_{episode:06d}_actions.png"


def draw_episode(record: Path, episode: int) -> Path | None:
    """Write the plot; its path, or None for an episode without ticks. Raises `OSError`, `ValueError` and `ImportError`."""
    from env_client.record.plots import plot_rollout

    run = read_json(record / "summary.json")["run"]
    ticks = [line for line in read_lines(record / "metrics.jsonl") if line["episode"] == episode]
    if not ticks:
        return None
    path = record / plot_name(episode)
    plot_rollout(
        path,
        seconds=np.array([tick["time"] for tick in ticks]) - ticks[0]["time"],
        measured=_matrix(ticks, "measured", len(run["action_names"])),
        requested=_matrix(ticks, "requested", len(run["action_names"])),
        sent=_matrix(ticks, "sent", len(run["action_names"])),
        boundaries=[index for index, tick in enumerate(ticks) if tick["boundary"]],
        held=np.array([tick["held"] for tick in ticks], bool),
        names=run["action_names"],
        title=f"{record.name}, episode {episode} ({run['unit']})",
    )
    return path


def draw_timing(ticks: list[dict[str, Any]]) -> bytes | None:
    """A PNG of an episode's lines in metrics.jsonl: how the loop and the server kept time; None without lines."""
    from env_client.record.plots import plot_timing

    if not ticks:
        return None
    seconds = np.array([tick["time"] for tick in ticks]) - ticks[0]["time"]
    parts = {
        name: np.array([tick[f"{name}_ms"] for tick in ticks]) for name in ("late", "read", "think", "send")
    }
    trips = [tick.get("round_trip_ms") for tick in ticks]
    return plot_timing(
        seconds=seconds,
        parts_ms=parts,
        round_trips_ms=np.array([np.nan if trip is None else trip for trip in trips]),
        starved=np.array([tick["starved"] for tick in ticks], bool),
    )


def _matrix(ticks: list[dict[str, Any]], name: str, size: int) -> np.ndarray:
    """(T, size), NaN where there is nothing."""
    gap = [np.nan] * size
    return np.array([gap if tick.get(name) is None else tick[name] for tick in ticks], np.float64)


def main() -> None:
    record = Path(sys.argv[1])
    for episode in map(int, sys.argv[2:]):
        try:
            draw_episode(record, episode)
        except ImportError:
            print("No plots: matplotlib is not installed (pip install 'env-client[viz]')", file=sys.stderr)
            return
        except (OSError, ValueError, KeyError) as error:
            print(f"The plot of episode {episode} in {record} cannot be drawn: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
