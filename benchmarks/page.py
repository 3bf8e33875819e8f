"""The suite's page of plots: the ratios against their bounds, and each curve."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from ratios import Curve, Part, Ratio

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["draw"]

COLUMNS = 3
# Characters of a note's line.
NOTE_WIDTH = 62


def draw(parts: Sequence[Part], bounds: dict[str, float], file: Path) -> None:
    """One picture of everything."""
    ratios = [ratio for part in parts for ratio in part.ratios]
    curves = [curve for part in parts for curve in part.curves]
    rows = math.ceil(len(curves) / COLUMNS)
    tall = 1.2 + 0.34 * len(ratios)
    figure = plt.figure(figsize=(16, tall + 4.4 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[tall] + [4.4] * rows)
    if ratios:
        bars(figure.add_subplot(grid[0, :]), ratios, bounds)
    for number, curve in enumerate(curves):
        lines(figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS]), curve)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def bars(axes: Axes, ratios: Sequence[Ratio], bounds: dict[str, float]) -> None:
    """Each ratio with the middle 80 % of its pairs, and its bound."""
    for row, ratio in enumerate(ratios):
        low, high = np.percentile(ratio.pairs, (10, 90))
        axes.barh(row, ratio.ratio, height=0.55, color="#4c78a8")
        axes.plot([low, high], [row, row], color="#1f3550", linewidth=1.5)
        if ratio.name in bounds:
            axes.plot([bounds[ratio.name]] * 2, [row - 0.4, row + 0.4], color="#e45756", linewidth=2.5)
        axes.text(0.01, row, f"{ratio.ratio:.2f}", va="center", color="white", fontsize=8)
    axes.axvline(1.0, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(ratios)), [ratio.name for ratio in ratios], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.6, *(min(ratio.ratio, 3.0) * 1.1 for ratio in ratios)))
    axes.set_title("ours / peer (median of pairs, line: middle 80 % of them, red: bound)", fontsize=11)


def lines(axes: Axes, curve: Curve) -> None:
    for label, values in curve.series.items():
        axes.plot(curve.at, values, marker="o", markersize=3.5, label=label)
    if curve.log_x:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    # Under the axis and wrapped by hand: a free text would take its room from the axes.
    axes.set_xlabel(f"{curve.x}\n{textwrap.fill(curve.note, NOTE_WIDTH)}", fontsize=9)
    axes.set_ylabel(curve.y, fontsize=9)
    axes.set_title(curve.what, fontsize=10)
    axes.legend(fontsize=8)
