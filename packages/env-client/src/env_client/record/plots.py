"""Pictures of an episode: what was recorded and what was predicted, one row for each joint.

matplotlib (extra `viz`) is imported inside the function: it takes half a second and only ends a run.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["plot_actions"]

RECORDED, PREDICTED, BOUNDARY = "#3b3b3b", "#d1495b", "#c9d3dc"
# Inches.
WIDTH, ROW_HEIGHT, HEAD_HEIGHT = 12.0, 1.45, 0.9


def plot_actions(
    path: Path,
    recorded: np.ndarray,
    predicted: np.ndarray,
    *,
    boundaries: Sequence[int],
    names: Sequence[str],
    fps: float,
    unit: str,
    title: str,
) -> None:
    """Write a PNG. `recorded`, `predicted`: (T, A) in `unit`, NaN where there is no prediction; `boundaries`: the
    ticks at which a chunk begins; `fps` in Hz. Raises `ImportError` when matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = recorded.shape[1]
    height = HEAD_HEIGHT + ROW_HEIGHT * rows
    figure, axes = pyplot.subplots(rows, 1, sharex=True, figsize=(WIDTH, height), squeeze=False)
    seconds = np.arange(len(recorded)) / fps
    starts = list(boundaries) or [0]
    for row, axis in enumerate(axes[:, 0]):
        for tick in boundaries:
            axis.axvline(tick / fps, color=BOUNDARY, linewidth=1.0, zorder=0)
        axis.plot(seconds, recorded[:, row], color=RECORDED, linewidth=1.8)
        # Chunk by chunk: the jump between two chunks is no motion that anybody predicted.
        for start, stop in zip(starts, [*starts[1:], len(recorded)], strict=True):
            # A chunk of one action is a point, and a line of one point is invisible.
            marker = "." if stop - start == 1 else None
            axis.plot(
                seconds[start:stop],
                predicted[start:stop, row],
                color=PREDICTED,
                linewidth=1.4,
                marker=marker,
                ms=3,
            )
        errors = np.abs(predicted[:, row] - recorded[:, row])
        errors = errors[np.isfinite(errors)]
        note = f"mean abs. error {errors.mean():.2f}" if errors.size else "no prediction"
        axis.set_title(names[row].removesuffix(".pos"), loc="left", fontsize=10, fontweight="bold", pad=3)
        axis.set_title(note, loc="right", fontsize=9, color="#555555", pad=3)
        axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.005, y=0.12)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("seconds", fontsize=9)
    handles = [
        pyplot.Line2D([], [], color=RECORDED, linewidth=1.8, label="recorded"),
        pyplot.Line2D([], [], color=PREDICTED, linewidth=1.2, label="predicted for that tick"),
        pyplot.Line2D([], [], color=BOUNDARY, linewidth=1.0, label="a new chunk begins"),
    ]
    figure.text(0.01, 1 - 0.15 / height, f"{title} ({unit})", ha="left", va="top", fontsize=12)
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=3,
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0.995, 1 - 0.08 / height),
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / height), h_pad=0.6)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
