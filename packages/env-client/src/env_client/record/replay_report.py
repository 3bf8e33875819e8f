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
    later = asker.round_trips[1:] or asker.round_trips
    return {
        "mean_absolute_error": _mean(together),
        "mean_absolute_error_per_joint": _per_joint(together, names, np.mean),
        "largest_error_per_joint": _per_joint(together, names, np.max),
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
    """The summary as people read it."""
    mean, largest = summary["mean_absolute_error_per_joint"], summary["largest_error_per_joint"]
    width = max([len(name) for name in mean] + [len("in all")])
    lines = [f"{'':{width}}  mean abs. error   largest   ({unit})"]
    for name, value in mean.items():
        lines.append(f"{name:{width}}  {_number(value):>15}   {_number(largest[name]):>7}")
    top = max((value for value in largest.values() if value is not None), default=None)
    lines.append(f"{'in all':{width}}  {_number(summary['mean_absolute_error']):>15}   {_number(top):>7}")
    trip, infer, first = summary["round_trip_ms"], summary["server_infer_ms"], summary["first_inference_ms"]
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
