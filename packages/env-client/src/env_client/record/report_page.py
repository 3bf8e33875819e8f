"""The report's HTML: from what `report.py` has read to one page. Every text of a record is escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from env_client.record.report import EpisodePage, RunPage

__all__ = ["page"]

# Columns of the table of episodes: (title, what stands there as HTML).
_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("success", lambda e: _verdict(e)),
    ("ended by", lambda e: escape(str(e.get("outcome") or ""))),
    ("duration", lambda e: _number(e.get("duration_s"), "{:.1f} s")),
    ("steps", lambda e: _number(e.get("steps"), "{:d}")),
    ("starved", lambda e: _number(e.get("starved"), "{:d}")),
    ("jitter p99", lambda e: _number((e.get("timing") or {}).get("jitter_p99_ms"), "{:.1f} ms")),
    ("pictures left out", lambda e: _number(e.get("ticks_without_pictures"), "{:d}")),
]


def page(runs: list[RunPage]) -> str:
    """The whole page, for one run or for several side by side."""
    title = " and ".join(run.name for run in runs)
    style = (files("env_client.record") / "report.css").read_text(encoding="utf-8")
    parts = [
        f"<h1>{'Evaluation' if len(runs) == 1 else 'Two evaluations, side by side'}</h1>",
        f'<p class="sub">{escape(title)}</p>',
        f'<div class="runs">{"".join(_overview(run) for run in runs)}</div>',
        "<h2>Episodes</h2>",
        f'<div class="runs">{"".join(_table(run, index) for index, run in enumerate(runs))}</div>',
    ]
    for numbers in _pairs(runs):
        cells = "".join(
            _episode(run, found, index, len(runs) > 1) for index, (run, found) in enumerate(numbers)
        )
        parts.append(f'<div class="runs episode">{cells}</div>')
    parts += [
        "<h2>Settings</h2>",
        f'<div class="runs">{"".join(_settings(run, runs) for run in runs)}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _pairs(runs: list[RunPage]) -> Iterable[list[tuple[RunPage, EpisodePage | None]]]:
    """The episodes of the same number of each run."""
    numbered = [{found.entry["episode"]: found for found in run.episodes} for run in runs]
    for number in sorted(set().union(*numbered)):
        yield [(run, found.get(number)) for run, found in zip(runs, numbered, strict=True)]


def _overview(run: RunPage) -> str:
    success, info = run.success, run.summary["run"]
    policy = info.get("policy") or {}
    ended = [found.entry for found in run.episodes]
    seconds = sum(entry.get("duration_s") or 0.0 for entry in ended)
    facts = {
        "task": info.get("prompt") or "–",
        "policy": policy.get("type", "a plain server"),
        "server": info.get("server"),
        "robot": f"{info.get('robot')}, {len(info.get('action_names', []))} values, {info.get('unit')}",
        "execution": f"{info.get('execution')}, {_number(info.get('fps'), '{:g} Hz')}",
        "began": datetime.fromtimestamp(info["started"]).strftime("%Y-%m-%d %H:%M:%S"),
        "recorded": f"{len(ended)} episodes, {seconds:.0f} s",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    warnings = "".join(f'<div class="warn">{escape(text)}</div>' for text in run.warnings)
    return (
        f'<section class="card"><h3>{escape(run.name)}</h3>{_rate(success)}{warnings}'
        f'<dl class="facts">{rows}</dl></section>'
    )


def _rate(success: dict[str, Any]) -> str:
    if not success["judged"]:
        return '<div class="rate">– <small>no episode was judged</small></div>'
    low, high = success["interval_95"]
    rate = success["rate"]
    return (
        f'<div class="rate">{100 * rate:.0f} % <small>{success["successes"]} of {success["judged"]} judged '
        "episodes</small></div>"
        f'<div class="bar"><i style="left:{100 * low:.1f}%;right:{100 - 100 * high:.1f}%"></i>'
        f'<b style="left:{100 * rate:.1f}%"></b></div>'
        f'<div class="soft">95 % interval {100 * low:.0f} to {100 * high:.0f} % (Wilson 1927)</div>'
    )


def _table(run: RunPage, index: int) -> str:
    noted = any(found.entry.get("note") for found in run.episodes)
    titles = [title for title, _ in _COLUMNS] + ["note"] * noted
    head = "".join(f"<th>{title}</th>" for title in ["episode", *titles])
    rows = []
    for found in run.episodes:
        entry = found.entry
        cells = [f'<a href="#e{index}-{entry["episode"]}">{entry["episode"]}</a>']
        cells += [show(entry) for _, show in _COLUMNS]
        note = f'<td class="wide">{escape(entry.get("note") or "")}</td>' if noted else ""
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + note + "</tr>")
    body = "".join(rows) or f'<tr><td colspan="{len(titles) + 1}">none</td></tr>'
    return f'<section class="card"><div class="scroll"><table><tr>{head}</tr>{body}</table></div></section>'


def _episode(run: RunPage, found: EpisodePage | None, index: int, named: bool) -> str:
    if found is None:
        return '<section class="card soft">no such episode in this run</section>'
    entry = found.entry
    name = f'<span class="soft">{escape(run.name)}</span>' if named else ""
    note = f"<span>{escape(entry['note'])}</span>" if entry.get("note") else ""
    videos = "".join(
        f'<figure><video src="{escape(address)}" controls muted loop playsinline preload="metadata"></video>'
        f"<figcaption>{escape(camera)}</figcaption></figure>"
        for camera, address in found.videos.items()
    )
    plots = "".join(
        f'<details{opened}><summary>{title}</summary><div class="plot"><img src="{address}" alt="{title}"></div></details>'
        for title, address, opened in (
            ("Joints: measured, sent, the policy's", found.actions, " open"),
            ("Timing: the loop and the server", found.timing, ""),
        )
        if address is not None
    )
    facts = {
        "ended by": entry.get("outcome"),
        "prompt": entry.get("prompt"),
        "seed": entry.get("seed"),
        "held": _counts(entry.get("holds")),
        "limited": _counts(entry.get("interventions")),
        "error": entry.get("error"),
    }
    rows = "".join(
        f"<dt>{escape(title)}</dt><dd>{escape(str(value))}</dd>"
        for title, value in facts.items()
        if value not in (None, "")
    )
    return (
        f'<section class="card" id="e{index}-{entry["episode"]}"><div class="head"><h3>Episode {entry["episode"]}</h3>'
        f'{_verdict(entry)}{note}{name}</div><div class="videos">{videos}</div>{plots}<dl class="facts">{rows}</dl></section>'
    )


def _settings(run: RunPage, runs: list[RunPage]) -> str:
    info = run.summary["run"]
    flat = _flat(info["config"])
    others = [_flat(other.summary["run"]["config"]) for other in runs if other is not run]
    differing = {
        name: value for name, value in flat.items() if any(other.get(name) != value for other in others)
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in differing.items()
    )
    different = (
        f'<p class="soft">what differs</p><dl class="facts">{rows or "<dd>nothing</dd>"}</dl>'
        if others
        else ""
    )
    return (
        f'<section class="card"><h3>{escape(run.name)}</h3>{different}'
        f"<details><summary>The command's settings</summary><pre>{_json(info['config'])}</pre></details>"
        f"<details><summary>The policy</summary><pre>{_json(info.get('policy'))}</pre></details></section>"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _json(value: Any) -> str:
    return escape(json.dumps(value, indent=2, ensure_ascii=False))


def _verdict(entry: dict[str, Any]) -> str:
    text, kind = {True: ("success", "good"), False: ("failure", "bad"), None: ("not judged", "open")}[
        entry["success"]
    ]
    by = {"person": "a person", "env": "the env"}.get(entry.get("judged_by") or "")
    return f'<span class="tag {kind}"{f" title={chr(34)}says {by}{chr(34)}" if by else ""}>{text}</span>'


def _number(value: Any, form: str) -> str:
    return "–" if not isinstance(value, int | float) else form.format(value)


def _counts(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{name} {count}" for name, count in (counts or {}).items())
