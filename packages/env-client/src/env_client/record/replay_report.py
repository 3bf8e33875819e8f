"""What a replay came to: the table on the screen and `summary.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from env_client.replay import ChunkAsker, EpisodeRecord

__all__ = ["format_table", "summarise", "write_summary"]


def summarise(records: Sequence[EpisodeRecord], asker: ChunkAsker, names: Sequence[str]) -> dict[str, Any]:
    """Plain values. Errors are in the dataset's unit, times in ms; the first round trip is counted apart, for a
    server may compile or warm up during it."""
    errors = [record.errors for record in records]
    together = np.concatenate(errors) if errors else np.zeros((0, len(names)), np.float32)
    still = [record.errors_of_standing_still for record in records]
    standing = np.concatenate(still) if still else np.zeros((0, len(names)), np.float32)
    if not np.isfinite(standing).all():
        standing = standing[:0]
    later = asker.round_trips[1:] or asker.round_trips
    return {
        "mean_absolute_error": _mean(together),
        "mean_absolute_error_per_joint": _per_joint(together, names, np.mean),
        "largest_error_per_joint": _per_joint(together, names, np.max),
        # What an arm that keeps the pose in which each chunk was asked for would come to.
        "standing_still": _mean(standing),
        "standing_still_per_joint": _per_joint(standing, names, np.mean),
        "round_trip_ms": _percentiles([1e3 * seconds for seconds in later]),
        "first_inference_ms": 1e3 * asker.round_trips[0] if asker.round_trips else None,
        "server_infer_ms": _percentiles(asker.infer_ms[1:] or asker.infer_ms),
        "ticks": len(together),
        "chunks": len(asker.round_trips),
        "reconnects": asker.reconnects,
        "episodes": [
            {
                "episode": record.episode,
                "ticks": record.ticks,
                "complete": record.complete,
                "chunks": len(record.boundaries),
                "chunk_starts": record.boundaries,
                "mean_absolute_error": _mean(record.errors),
                "mean_absolute_error_per_joint": _per_joint(record.errors, names, np.mean),
            }
            for record in records
        ],
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def format_table(summary: dict[str, Any], unit: str) -> str:
    """The summary as people read it. "standing still" is the mean error of an arm that keeps the pose in which each
    chunk was asked for: a policy that has learned something is well below it."""
    mean, largest = summary["mean_absolute_error_per_joint"], summary["largest_error_per_joint"]
    still = summary["standing_still_per_joint"]
    top = max((value for value in largest.values() if value is not None), default=None)
    rows = [(name, mean[name], largest[name], still[name]) for name in mean]
    rows.append(("in all", summary["mean_absolute_error"], top, summary["standing_still"]))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'':{width}}  mean abs. error   largest   standing still   ({unit})"]
    lines += [
        f"{name:{width}}  {_number(error):>15}   {_number(worst):>7}   {_number(idle):>14}"
        for name, error, worst, idle in rows
    ]
    trip, infer, first = summary["round_trip_ms"], summary["server_infer_ms"], summary["first_inference_ms"]
    if summary["standing_still"] is not None:
        lines.append("(standing still: an arm that keeps the pose in which each chunk was asked for)")
    lines += [
        "",
        f"round trip       p50 {_ms(trip['p50'])}   p99 {_ms(trip['p99'])}   ({summary['chunks']} chunks)",
        f"server infer     p50 {_ms(infer['p50'])}   p99 {_ms(infer['p99'])}",
        f"first inference      {_ms(first)}",
    ]
    if summary["reconnects"]:
        lines.append(f"reconnected          {summary['reconnects']:>8}")
    return "\n".join(lines)


def _mean(errors: np.ndarray) -> float | None:
    return float(errors.mean()) if errors.size else None


def _per_joint(errors: np.ndarray, names: Sequence[str], reduce: Any) -> dict[str, float | None]:
    if not errors.size:
        return dict.fromkeys(names)
    return {name: float(value) for name, value in zip(names, reduce(errors, axis=0), strict=True)}


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ms(value: float | None) -> str:
    return f"{'-':>8}   " if value is None else f"{value:8.1f} ms"
