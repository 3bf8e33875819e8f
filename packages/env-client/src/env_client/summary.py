"""An episode's result as a table for people and as plain values for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from env_client.control import EpisodeResult

__all__ = ["format_episode", "holds", "plain_result", "write_results"]


def holds(result: EpisodeResult) -> dict[str, int]:
    """Ticks in which the robot held its pose, by reason; without those that never happened."""
    counted = {
        "no chunk yet": result.waiting,
        "starved": result.starved,
        **result.refused,
        "old picture or joints": result.old_observations,
        "robot away": result.env_errors,
    }
    return {reason: count for reason, count in counted.items() if count}


def format_episode(result: EpisodeResult, number: int, of: int) -> str:
    """The table at the end of an episode."""
    timing, source = result.timing, result.source
    rate = timing.get("ticks", 0) / result.duration_s if result.duration_s > 0 else 0.0
    success = {True: "yes", False: "no", None: "unknown"}[result.success]
    dropped = source.get("dropped") or {}
    errors = source.get("errors") or {}
    rows = [
        ("ended by", result.outcome),
        ("success", success),
        ("steps", f"{result.steps} in {result.duration_s:.1f} s"),
        (
            "rate",
            f"{rate:.2f} Hz ({timing.get('skipped', 0):g} ticks skipped, {timing.get('overruns', 0):g} overrun)",
        ),
        (
            "jitter",
            "p50 {jitter_p50_ms:.2f}, p99 {jitter_p99_ms:.2f}, max {jitter_max_ms:.2f} ms".format(**timing),
        ),
        ("starved", f"{result.starved} ticks"),
        ("held", _counts(holds(result)) or "never"),
        ("limited", _counts(result.interventions) or "never"),
        (
            "chunks",
            f"{source.get('chunks', 0)} of {source.get('horizon', 0)} actions, latency "
            f"{source.get('latency_s', 0.0) * 1e3:.0f} ms, up to {source.get('latency_upper_s', 0.0) * 1e3:.0f} ms",
        ),
        ("chunks dropped", _counts(dropped) or "none"),
        ("requests failed", _counts(errors) or "none"),
    ]
    if result.error:
        rows.append(("error", result.error))
    width = max(len(name) for name, _ in rows)
    lines = [f"Episode {number} of {of}"]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)


def plain_result(result: EpisodeResult) -> dict[str, Any]:
    """Its fields, and `holds` by reason."""
    return asdict(result) | {"holds": holds(result)}


def write_results(path: Path, results: list[EpisodeResult], **extra: Any) -> None:
    """All results as JSON, with `holds` by reason."""
    episodes = [plain_result(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(extra | {"episodes": episodes}, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
