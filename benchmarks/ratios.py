"""Ratios of paired measurements, their noise, and the bounds that they must keep.

The contract between the suite (`suite.py`) and a part of it, a module here with

    def run(quick: bool) -> Part

`run` measures in turn (ours, peer, ours, peer …), in one process or many, and returns what it found. `python
benchmarks/<part>.py [--quick] [--json FILE]` (`main` below) does the same for one part alone. In a file a part is

    {"name": "wire", "ratios": [{"name": "wire.loopback_raw_480x640", "what": "…", "unit": "ms", "ours": [..], "peer": [..],
     "ratio": 0.5, "noise": 0.02, "facts": {..}}], "curves": [{"name", "what", "x", "y", "at": [..],
     "series": {"label": [..]}, "note"}]}

A ratio is below 1 where ours is better. `bounds.json` holds a bound for each name; a bound is never a time. A name that
`bounds.json` does not know is shown and not judged. Error policy: what cannot be measured here (no permission for a
network namespace, no GPU) is a line in `Part.skipped` and no failure.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BOUNDS", "Curve", "Part", "Ratio", "main", "paired", "table", "timed", "worse"]

BOUNDS = Path(__file__).parent / "bounds.json"
# Consecutive pairs are judged in so many blocks: what else the machine did during one of them is the noise.
BLOCKS = 8


@dataclass(frozen=True)
class Ratio:
    """Ours against a peer, pair by pair."""

    # "part.what_is_compared", the key in bounds.json.
    name: str
    # One line for a person.
    what: str
    # Of `ours` and `peer`, such as "ms".
    unit: str
    # The same number of figures each; the two at one place were measured one right after the other.
    ours: list[float]
    peer: list[float]
    # What belongs to it: image error, bytes, largest difference of the outputs, …; plain values.
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ours or len(self.ours) != len(self.peer):
            raise ValueError(
                f"{self.name}: {len(self.ours)} and {len(self.peer)} figures; pairs were expected"
            )

    @property
    def pairs(self) -> np.ndarray:
        return np.asarray(self.ours, float) / np.asarray(self.peer, float)

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return float(np.median(self.pairs))

    @property
    def noise(self) -> float:
        """How far the median of any block of consecutive pairs lies from `ratio`."""
        blocks = np.array_split(self.pairs, min(BLOCKS, len(self.ours)))
        return float(max(abs(np.median(block) - self.ratio) for block in blocks))

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "noise": self.noise}


@dataclass(frozen=True)
class Curve:
    """What something costs against its size."""

    name: str
    what: str
    # The axes, with units.
    x: str
    y: str
    at: list[float]
    # One line in the plot for each, as long as `at`.
    series: dict[str, list[float]]
    # Why it bends where it bends.
    note: str = ""
    log_x: bool = False


@dataclass
class Part:
    """What one benchmark found."""

    name: str
    ratios: list[Ratio] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    # What could not be measured here, and why.
    skipped: list[str] = field(default_factory=list)
    # Tables that are no ratios: {"where the time goes": {"step": microseconds}}.
    tables: dict[str, dict[str, float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": [ratio.plain() for ratio in self.ratios]}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> "Part":
        """Of what `plain` gave, with or without its derived figures."""
        ratios = [
            Ratio(r["name"], r["what"], r["unit"], r["ours"], r["peer"], r.get("facts", {}))
            for r in value.get("ratios", ())
        ]
        curves = [Curve(**curve) for curve in value.get("curves", ())]
        return cls(value["name"], ratios, curves, value.get("skipped", []), value.get("tables", {}))


def timed(call: Callable[..., object], *arguments: object) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e3


def paired(
    name: str,
    what: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    rounds: int,
    warm_up: int = 5,
    facts: dict[str, Any] | None = None,
) -> Ratio:
    """Both calls in turn; who is first changes from pair to pair, so that neither always finds the other's cache."""
    for _ in range(warm_up):
        ours()
        peer()
    mine, theirs = [], []
    for number in range(rounds):
        for call, times in ((ours, mine), (peer, theirs))[:: 1 if number % 2 == 0 else -1]:
            times.append(timed(call))
    return Ratio(name, what, "ms", mine, theirs, facts or {})


def worse(ratios: Sequence[Ratio], bounds: dict[str, float]) -> list[str]:
    """A sentence for each ratio that is above its bound by more than the noise of this run."""
    return [
        f"{r.name}: {r.ratio:.2f} of the peer (± {r.noise:.2f}), at most {bounds[r.name]:.2f} was expected ({r.what})"
        for r in ratios
        if r.name in bounds and r.ratio > bounds[r.name] + r.noise
    ]


def table(ratios: Sequence[Ratio], bounds: dict[str, float]) -> str:
    """For the terminal: medians, spread, the ratio and its bound."""
    width = max((len(r.name) for r in ratios), default=4) + 2
    lines = [
        f"{'':{width}}{'ours':>10}{'p10–p90':>17}{'peer':>10}{'p10–p90':>17}{'ratio':>8}{'noise':>8}{'bound':>7}"
    ]
    for r in ratios:
        line = f"{r.name:{width}}"
        for values in (r.ours, r.peer):
            low, middle, high = np.percentile(values, (10, 50, 90))
            line += f"{_short(middle):>10}{f'{_short(low)}–{_short(high)}':>17}"
        bound = f"{bounds[r.name]:.2f}" if r.name in bounds else ""
        lines.append(f"{line}{r.ratio:8.2f}{r.noise:8.2f}{bound:>7}  {r.unit}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def main(run: Callable[[bool], Part], description: str | None) -> None:
    """One part as a command of its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; noisier")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    part = run(options.quick)
    show(part, json.loads(BOUNDS.read_text()))
    if options.json:
        options.json.write_text(json.dumps(part.plain(), indent=1) + "\n")


def show(part: Part, bounds: dict[str, float]) -> None:
    """Everything that a part found, on the terminal."""
    if part.ratios:
        print(f"\n{table(part.ratios, bounds)}")
    for ratio in part.ratios:
        for name, value in ratio.facts.items():
            print(
                f"  {ratio.name}: {name} {value:.4g}"
                if isinstance(value, float)
                else f"  {ratio.name}: {name} {value}"
            )
    for title, rows in part.tables.items():
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name:60}{value:10.3g}")
    for curve in part.curves:
        print(f"\n{curve.what}: {curve.y} by {curve.x}")
        for label, values in {curve.x: curve.at, **curve.series}.items():
            print(f"  {label:16}" + "".join(f"{_short(value):>9}" for value in values))
    for line in part.skipped:
        print(f"! not measured: {line}")
