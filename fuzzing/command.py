"""The command: fuzz a target in batches until so many executions are done, and keep count of them.

Life cycle: each batch is a process of its own (`worker.py`), because libFuzzer ends its process; the corpus lies in
outputs/fuzzing/TARGET and is used again with --resume, which also counts what earlier runs did. What a batch did is
a line in results.jsonl at once, so that nothing is lost when the command is stopped.
Error policy: a finding ends the command with exit code 1; its input is in outputs/fuzzing/TARGET-found.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzzing.targets import TARGETS

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.jsonl")
WORK = ROOT / "outputs" / "fuzzing"
# What a batch may take beyond its time for start and end, in seconds.
GRACE_S = 120


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, "all"], help="what is fuzzed; default: only the table")
    parser.add_argument(
        "--executions", type=int, default=100_000, help="so many; with --resume earlier ones count"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the corpus of earlier runs")
    parser.add_argument("--batch-s", type=int, default=300, help="longest batch, in seconds")
    parser.add_argument(
        "--total-s", type=int, help="end a target after so many seconds, whatever was reached"
    )
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer; 0: another one each time")
    options = parser.parse_args(argv)
    names = list(TARGETS) if options.target == "all" else [options.target] if options.target else []
    failed = [name for name in names if not _fuzz(name, options)]
    print(table())
    sys.exit(1 if failed else 0)


def table() -> str:
    """What results.jsonl holds, summed up for each target."""
    lines = [f"{'target':10} {'executions':>12} {'CPU min':>10} {'peak MB':>8} {'corpus':>7} {'found':>6}"]
    for name in TARGETS:
        rows = [row for row in _results() if row["target"] == name]
        if rows:
            minutes, peak = sum(row["cpu_s"] for row in rows) / 60, max(row["peak_mb"] for row in rows)
            lines.append(
                f"{name:10} {sum(row['executions'] for row in rows):12,} {minutes:10.1f} {peak:8.0f} "
                f"{rows[-1]['corpus']:7} {sum(row['found'] for row in rows):6}"
            )
    return "\n".join(lines)


def _results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def _fuzz(name: str, options: argparse.Namespace) -> bool:
    """Whether nothing was found."""
    end = None if options.total_s is None else time.monotonic() + options.total_s
    done = sum(row["executions"] for row in _results() if row["target"] == name) if options.resume else 0
    corpus, found = WORK / name, WORK / f"{name}-found"
    if not options.resume:
        shutil.rmtree(corpus, ignore_errors=True)
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    while done < options.executions:
        left = options.batch_s if end is None else min(options.batch_s, int(end - time.monotonic()))
        if left <= 0:
            break
        row = _batch(name, corpus, found, options.executions - done, left, options.seed)
        done += row["executions"]
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {done:,} executions, {row['executions'] / row['wall_s']:,.0f} a second", flush=True)
        if row["found"]:
            print(f"{name}: found something, see {found} and the output above", flush=True)
            return False
    return True


def _batch(name: str, corpus: Path, found: Path, runs: int, seconds: int, seed: int) -> dict[str, Any]:
    before = set(found.iterdir())
    started, usage = time.monotonic(), os.times()
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "fuzzing.worker",
            name,
            str(corpus),
            f"-artifact_prefix={found}/",
            f"-runs={runs}",
            f"-max_total_time={seconds}",
            f"-seed={seed}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + GRACE_S,
    )
    after = os.times()
    said = child.stdout + child.stderr
    executions = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    last = re.findall(r"^#(\d+)", said, re.MULTILINE)
    peak = re.search(r"stat::peak_rss_mb:\s*(\d+)", said)
    new = set(found.iterdir()) - before
    if child.returncode or new:
        print(said[-6000:], flush=True)
    return {
        "target": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "executions": int(executions[1]) if executions else int(last[-1]) if last else 0,
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(
            after.children_user + after.children_system - usage.children_user - usage.children_system, 1
        ),
        "peak_mb": int(peak[1]) if peak else 0,
        "corpus": sum(1 for _ in corpus.iterdir()),
        "found": len(new) or int(child.returncode != 0),
    }
