"""The picture of an evaluation: success of each seed, how fast, and how long the server took."""

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_SOLVED, _FAILED = "#2a7f62", "#c0392b"


def draw(summaries: dict[str, dict[str, Any]], title: str, fps: float, file: Path) -> None:
    """One row for each way in which the policy was run; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(summaries), 3, figsize=(13, 0.9 + 2.9 * len(summaries)), squeeze=False, width_ratios=[1, 2.2, 1.6]
    )
    for row, (name, summary) in zip(axes, summaries.items(), strict=True):
        _rate(row[0], name, summary)
        _seeds(row[1], summary, fps)
        _round_trips(row[2], summary)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _rate(axis: Any, name: str, summary: dict[str, Any]) -> None:
    low, high = summary["interval"]
    rate = summary["rate"]
    axis.bar([0], [rate * 100], color=_SOLVED, width=0.5)
    axis.errorbar(
        [0],
        [rate * 100],
        [[100 * max(0.0, rate - low)], [100 * max(0.0, high - rate)]],
        color="black",
        capsize=8,
    )
    axis.set_xlim(-0.6, 0.6)
    axis.set_ylim(0, 105)
    axis.set_xticks([])
    axis.set_ylabel("success, %")
    axis.set_title(f"{name}: {summary['successes']} of {summary['episodes']}", fontsize=10)


def _seeds(axis: Any, summary: dict[str, Any], fps: float) -> None:
    episodes = summary["per_episode"]
    colors = [_SOLVED if episode["success"] else _FAILED for episode in episodes]
    axis.bar(
        [episode["seed"] for episode in episodes],
        [episode["steps"] / fps for episode in episodes],
        color=colors,
    )
    axis.set_xlabel("seed (red: not solved)")
    axis.set_ylabel("seconds until success")


def _round_trips(axis: Any, summary: dict[str, Any]) -> None:
    trips = [trip for episode in summary["per_episode"] for trip in episode["round_trips"]]
    if not trips:
        axis.axis("off")
        return
    axis.hist(trips, bins=40, color="#4472a8")
    axis.set_xlabel("round trip, ms")
    axis.set_ylabel("requests")
