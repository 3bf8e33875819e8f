"""Figures of records: how certain a success rate is, and what a LeRobot dataset says of its values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["ImageStats", "merge_stats", "vector_stats", "wilson"]

# Two-sided 95 %.
_Z = 1.959964
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
# Every so many pixels are counted in each direction.
_STRIDE = 4


def wilson(successes: int, trials: int) -> tuple[float, float] | None:
    """The 95 % interval of a rate, within 0 and 1; None without trials.

    Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927),
    which stays honest for the few trials that a robot gets: 10 of 10 is 0.72 to 1, not 1 to 1.
    """
    if trials == 0:
        return None
    rate, square = successes / trials, _Z * _Z
    middle = (rate + square / (2 * trials)) / (1 + square / trials)
    half = _Z / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    return max(0.0, round(middle - half, 9)), min(1.0, round(middle + half, 9))


def vector_stats(values: np.ndarray) -> dict[str, Any]:
    """Of (T, n) values, each over T: min, max, mean, std, count and quantiles, as lists of n."""
    values = np.asarray(values, np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    stats |= {name: np.quantile(values, share, axis=0) for name, share in _QUANTILES.items()}
    return {name: value.tolist() for name, value in stats.items()} | {"count": [len(values)]}


class ImageStats:
    """The same of pictures, per colour, in 0..1 and in LeRobot's shape (3, 1, 1); exact for the pixels looked at."""

    def __init__(self) -> None:
        # (3, 256) how often each value came.
        self._counts: np.ndarray = np.zeros((3, 256), np.int64)

    def add(self, image: np.ndarray) -> None:
        """An (H, W, 3) uint8 picture."""
        pixels = image[::_STRIDE, ::_STRIDE].reshape(-1, 3)
        for colour in range(3):
            self._counts[colour] += np.bincount(pixels[:, colour], minlength=256)

    def result(self) -> dict[str, Any]:
        """Raises `ValueError` when nothing was counted."""
        counts, values = self._counts, np.arange(256) / 255.0
        total = int(counts[0].sum())
        if total == 0:
            raise ValueError("no picture was counted")
        mean = counts @ values / total
        deviation = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0.0))
        there = [np.flatnonzero(row) for row in counts]
        stats = {
            "min": [values[index[0]] for index in there],
            "max": [values[index[-1]] for index in there],
            "mean": mean,
            "std": deviation,
        }
        for name, share in _QUANTILES.items():
            stats[name] = [values[np.searchsorted(np.cumsum(row), share * total)] for row in counts]
        return {name: [[[float(v)]] for v in value] for name, value in stats.items()} | {"count": [total]}


def merge_stats(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several episodes together. Mean and deviation are exact (Chan et al. 1983); quantiles are the mean of
    the parts' own, weighted by their counts, as LeRobot does it."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    shares = counts / counts.sum()

    def weighted(rows: list[np.ndarray]) -> np.ndarray:
        return np.tensordot(shares, np.array(rows, np.float64), axes=1)

    columns = {name: [np.asarray(part[name], np.float64) for part in parts] for name in parts[0]}
    mean = weighted(columns["mean"])
    spread = [std**2 + (own - mean) ** 2 for std, own in zip(columns["std"], columns["mean"], strict=True)]
    stats = {
        "min": np.min(columns["min"], axis=0),
        "max": np.max(columns["max"], axis=0),
        "mean": mean,
        "std": np.sqrt(weighted(spread)),
    }
    stats |= {name: weighted(columns[name]) for name in _QUANTILES}
    return {name: value.tolist() for name, value in stats.items()} | {"count": [int(counts.sum())]}
