"""Pictures of an episode: what was recorded and what was predicted, one row for each joint.

matplotlib (extra `viz`) is imported inside the function: it takes half a second and only ends a run.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot_actions", "plot_rollout", "plot_timing"]

RECORDED, PREDICTED, BOUNDARY = "#3b3b3b", "#d1495b", "#c9d3dc"
SENT, HELD = "#1f77b4", "#fbeed0"
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
    labels: tuple[str, str] = ("recorded", "predicted for that tick"),
) -> None:
    """Write a PNG. `recorded`, `predicted`: (T, A) in `unit`, NaN where there is no prediction; `boundaries`: the
    ticks at which a chunk begins; `fps` in Hz; `labels` name the two. Raises `ImportError` when matplotlib is not installed."""
    pyplot = _pyplot()
    figure, axes = _rows(names)
    seconds = np.arange(len(recorded)) / fps
    starts = list(boundaries) or [0]
    for row, axis in enumerate(axes):
        _mark_boundaries(axis, [tick / fps for tick in boundaries])
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
        axis.set_title(note, loc="right", fontsize=9, color="#555555", pad=3)
    handles = [
        pyplot.Line2D([], [], color=RECORDED, linewidth=1.8, label=labels[0]),
        pyplot.Line2D([], [], color=PREDICTED, linewidth=1.2, label=labels[1]),
        pyplot.Line2D([], [], color=BOUNDARY, linewidth=1.0, label="a new chunk begins"),
    ]
    _finish(figure, path, f"{title} ({unit})", handles)


def plot_rollout(
    path: Path,
    *,
    seconds: np.ndarray,
    measured: np.ndarray,
    requested: np.ndarray,
    sent: np.ndarray,
    boundaries: Sequence[int],
    held: np.ndarray,
    names: Sequence[str],
    title: str,
) -> None:
    """Write a PNG of an episode of T ticks: what was measured, what the policy asked for and what was sent, (T, A) each
    with NaN where there is nothing. `seconds`: (T,); `boundaries`: indices of ticks that begin a chunk; `held`:
    (T,) bool. Raises `ImportError` when matplotlib is not installed."""
    pyplot = _pyplot()
    figure, axes = _rows(names)
    for row, axis in enumerate(axes):
        _mark_boundaries(axis, seconds[list(boundaries)])
        _shade(axis, seconds, held)
        axis.plot(seconds, measured[:, row], color=RECORDED, linewidth=1.8)
        axis.plot(seconds, requested[:, row], color=PREDICTED, linewidth=1.2)
        axis.plot(seconds, sent[:, row], color=SENT, linewidth=1.0)
    handles = [
        pyplot.Line2D([], [], color=RECORDED, linewidth=1.8, label="measured"),
        pyplot.Line2D([], [], color=PREDICTED, linewidth=1.2, label="the policy's"),
        pyplot.Line2D([], [], color=SENT, linewidth=1.0, label="sent"),
        pyplot.Line2D([], [], color=BOUNDARY, linewidth=1.0, label="a new chunk"),
        pyplot.Rectangle((0, 0), 1, 1, color=HELD, label="held"),
    ]
    _finish(figure, path, title, handles)


def plot_timing(
    *, seconds: np.ndarray, parts_ms: dict[str, np.ndarray], round_trips_ms: np.ndarray, starved: np.ndarray
) -> bytes:
    """A PNG of an episode of T ticks, (T,) each: how late ticks began and what took how long, and the round trips of
    the chunks that arrived (NaN where none did). Raises `ImportError` when matplotlib is not installed."""
    figure, (loop, trips) = _rows(["a tick of the loop, ms", "round trip of a chunk, ms"])
    for (name, values), color in zip(parts_ms.items(), (PREDICTED, SENT, "#7a9e4e", "#8c6bb1"), strict=True):
        loop.plot(seconds, values, color=color, linewidth=0.9, label=name)
    _shade(loop, seconds, starved, label="starved")
    trips.plot(seconds, round_trips_ms, linestyle="none", marker="o", markersize=4, color=SENT)
    trips.set_ylim(bottom=0)
    file = BytesIO()
    _finish(figure, file, "", list(loop.get_legend_handles_labels()[0]))
    return file.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _rows(names: Sequence[str]) -> tuple[Any, Any]:
    """A figure with one axis below the other, one for each name."""
    size = (WIDTH, HEAD_HEIGHT + ROW_HEIGHT * len(names))
    figure, axes = _pyplot().subplots(len(names), 1, sharex=True, figsize=size, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_title(name.removesuffix(".pos"), loc="left", fontsize=10, fontweight="bold", pad=3)
        axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.005, y=0.12)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("seconds", fontsize=9)
    return figure, axes[:, 0]


def _mark_boundaries(axis: Any, seconds: Iterable[float]) -> None:
    for second in seconds:
        axis.axvline(second, color=BOUNDARY, linewidth=1.0, zorder=0)


def _shade(axis: Any, seconds: np.ndarray, where: np.ndarray, label: str | None = None) -> None:
    """Behind the curves, over the axis' whole height, the ticks at which `where` holds."""
    axis.fill_between(
        seconds,
        0,
        1,
        where=where,
        step="post",
        color=HELD,
        linewidth=0,
        transform=axis.get_xaxis_transform(),
        zorder=-1,
        label=label,
    )


def _finish(figure: Any, path: Path | BytesIO, title: str, handles: list[Any]) -> None:
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.15 / height, title, ha="left", va="top", fontsize=12)
    figure.legend(
        handles=handles,
        loc="upper right",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0.995, 1 - 0.08 / height),
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / height), h_pad=0.6)
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)
