"""A working day: four robots on one server for eight simulated hours, with resets, swaps and reconnects; nothing may grow.

    uv run python benchmarks/soak.py [--hours 8] [--robots 4] [--plot FILE.png] [--json FILE]

Real: the server process, one process for each robot with its control loop, action source, safety filter and network thread,
the sockets between them, and every one of the day's ticks (108,000 an hour and robot), requests, chunks, episodes (one a
minute, each with a reset), reconnects (every five episodes, half of them without a goodbye) and swaps (every five minutes
another client changes to a second policy; the memory budget has room for one, so the first is loaded again right after).
Simulated: the control loops' clock. A tick does not wait 33 ms for its turn and an answer counts as 100 ms old, whatever
it took, so the day takes minutes and the server sees about thirty times the load. What depends on hours of wall time alone
(a log rotation, a DHCP lease, a warm motor) is not in it. The arm follows its commands, without physics, and no records are
written (`recording.py` looks at the recorder's memory).

Each robot tells its memory, files, threads and round trips every five simulated minutes; the server's are read at the same
moments. At the end the medians of the second and the last fifth are compared, and the exit code is 1 where one grew. Eight
hours take about six minutes on two idle cores.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from control import FPS, SPEC, Arm
from env_client.control import ControlLoop, SafetyConfig, SafetyFilter, make_source
from env_client.control.network import ChunkRequest, NetworkThread, Outcome
from env_client.control.simulated import SimulatedClock
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from tqdm import tqdm
from wire import HERE

sys.path.insert(0, str(HERE.parent / "tests"))
from processes import policy_server
from serving_parts import CAMERAS, add_weights

RESULTS = HERE / "results"
# Seconds of simulated time: an episode, a sample (and a swap), the age of an answer.
EPISODE_S, SAMPLE_S, LATENCY_S = 60.0, 300.0, 0.1
# Episodes between two reconnects.
RECONNECT = 5
# What each policy holds in memory, and the budget that has room for one of them, MB.
HOLD_MB, BUDGET_GB = 20, 0.03
# What may be more in the last fifth than in the second: MB, files, threads (of pools that fill when work meets); and the
# factor of the round trips, which other work on the machine changes as well.
GROWTH = {"rss_mb": 24.0, "files": 2, "threads": 3}
SLOWER = 1.5


class PromptAnswers:
    """A `Requester`: a real `NetworkThread`, whose answer is waited for while simulated time stands still."""

    def __init__(self, inner: NetworkThread, clock: SimulatedClock):
        self._inner, self._clock = inner, clock
        self._held: tuple[float, Outcome] | None = None
        # Round trips since somebody looked, ms; requests that failed.
        self.round_trips: list[float] = []
        self.requests = self.failed = 0

    def submit(self, request: ChunkRequest, *, replace: bool = False) -> bool:
        if self._held is not None and not replace and self._held[1].request.generation == request.generation:
            return False
        assert self._inner.submit(request, replace=True)
        began = time.perf_counter()
        while not (outcomes := self._inner.poll()):
            assert time.perf_counter() - began < 120, "no answer came for two minutes"
            time.sleep(1e-4)
        (outcome,) = outcomes
        self.requests += 1
        self.failed += outcome.error is not None
        self.round_trips.append(outcome.latency_s * 1e3)
        self._held = self._clock.now() + LATENCY_S, _aged(outcome)
        return True

    def poll(self) -> list[Outcome]:
        # Half a microsecond: tick times are sums of rounded periods.
        if self._held is None or self._clock.now() < self._held[0] - 5e-7:
            return []
        outcome, self._held = self._held[1], None
        return [outcome]

    def discard(self) -> None:
        self._held = None

    def close(self) -> None:
        self._inner.close()


def _aged(outcome: Outcome) -> Outcome:
    return replace(outcome, latency_s=LATENCY_S)


def robot(number: int, port: int, hours: float) -> None:
    """One robot's process: a line of JSON every `SAMPLE_S`."""
    logging.getLogger("env_client").setLevel(logging.CRITICAL)
    url = f"ws://127.0.0.1:{port}/a"
    client = WebsocketClientPolicy(url, on_status=lambda sentence: None)
    clock, spec = SimulatedClock(), client.spec
    assert spec is not None
    random = np.random.default_rng(number)
    pictures = {c.name: random.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras}
    arm = Arm(clock.now, pictures)
    filmed = replace(SPEC, cameras=tuple(pictures))
    answers = PromptAnswers(NetworkThread(client, spec), clock)
    source = make_source("async", None, spec, FPS, requester=answers)
    loop = ControlLoop(arm, source, SafetyFilter(filmed, SafetyConfig(), FPS), FPS, clock=clock)
    process, sampled, swaps, starved, ticks = psutil.Process(), 0.0, 0, 0, 0
    for episode in range(round(hours * 3600 / EPISODE_S)):
        client.reset()
        result = loop.run_episode(episode=episode, time_s=EPISODE_S)
        starved += result.starved
        ticks += int(result.timing["ticks"])
        if episode % RECONNECT == RECONNECT - 1:
            if episode // RECONNECT % 2:
                # As a cable would: no goodbye, and the client finds out by itself.
                client._connection._sock.shutdown(2)
            else:
                client._drop()
        if clock.now() - sampled >= SAMPLE_S:
            sampled = clock.now()
            if number == 0:
                swap(url)
                swaps += 1
            trips, answers.round_trips = answers.round_trips, []
            line = of_process(process) | {
                "robot": number, "hours": clock.now() / 3600, "ticks": ticks, "requests": answers.requests,
                "failed": answers.failed, "starved": starved, "swaps": swaps, "episodes": episode + 1,
                "p50_ms": float(np.percentile(trips, 50)), "p99_ms": float(np.percentile(trips, 99)),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    source.close()
    client.close()


def swap(url: str) -> None:
    """Another client changes to the other policy, which takes the memory; whoever asks the first one next has it back."""
    with WebsocketClientPolicy(url, on_status=lambda sentence: None) as other:
        spec = other.configure(name="b", on_progress=lambda progress: None)
        images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in spec.cameras}
        other.infer({"images": images, "states": {"arm": np.zeros(6, np.float32)}})


def of_process(process: psutil.Process) -> dict[str, float]:
    return {
        "rss_mb": process.memory_info().rss / 1e6,
        "files": len(os.listdir(f"/proc/{process.pid}/fd")),
        "threads": process.num_threads(),
    }


def soak(hours: float, robots: int) -> tuple[list[dict[str, Any]], float]:
    """Every sample of every process (the server's are those with `robot` None), and what all of them computed, in seconds."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in ("a", "b"):
            checkpoint = write_checkpoint(
                Path(folder) / name, cameras=CAMERAS, unit="rad", horizon=50, amplitude=0.2, hold_mb=HOLD_MB
            )
            # The budget counts the files of the weights.
            add_weights(checkpoint, HOLD_MB)
        server, port = stack.enter_context(
            policy_server(
                f"a={folder}/a", "--policy.path", f"b={folder}/b", "--memory-budget-gb", str(BUDGET_GB)
            )
        )
        process, lock = psutil.Process(server.process.pid), threading.Lock()
        bar = stack.enter_context(tqdm(total=round(hours * robots * 60), unit="robot minute"))

        def follow(child: subprocess.Popen[str]) -> None:
            assert child.stdout is not None
            for text in child.stdout:
                line = json.loads(text)
                with lock:
                    samples.append(line)
                    if line["robot"] == 0:
                        samples.append(of_process(process) | {"robot": None, "hours": line["hours"]})
                    bar.update(round(SAMPLE_S / 60))

        children, threads = [], []
        for number in range(robots):
            command = [
                sys.executable,
                __file__,
                "--robot",
                str(number),
                "--port",
                str(port),
                "--hours",
                str(hours),
            ]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(child.kill)
            children.append(child)
            threads.append(threading.Thread(target=follow, args=(child,)))
            threads[-1].start()
        for child, thread in zip(children, threads, strict=True):
            assert child.wait() == 0
            thread.join()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return samples, sum(process.cpu_times()[:2]) + used.ru_utime + used.ru_stime


def growth(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each process held in the second and in the last fifth of the day, and all robots' round trips: medians."""
    hours = max(sample["hours"] for sample in samples)

    def rows(who: str, names: Sequence[str], mine: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        parts = [[s for s in mine if a < s["hours"] / hours <= b] for a, b in ((0.2, 0.4), (0.8, 1.0))]
        for name in names:
            early, late = (float(np.median([sample[name] for sample in part])) for part in parts)
            flat = late <= early * SLOWER if name not in GROWTH else late - early <= GROWTH[name]
            yield {"who": who, "figure": name, "early": early, "late": late, "flat": flat}

    found = []
    for who in sorted(
        {sample["robot"] for sample in samples}, key=lambda number: -1 if number is None else number
    ):
        found += rows(_named(who), tuple(GROWTH), [sample for sample in samples if sample["robot"] == who])
    trips = [sample for sample in samples if sample["robot"] is not None]
    return [*found, *rows("all robots", ("p50_ms", "p99_ms"), trips)]


def _named(robot: int | None) -> str:
    return "server" if robot is None else f"robot {robot}"


def draw(samples: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("rss_mb", "memory, MB"),
        ("files", "open files"),
        ("threads", "threads"),
        ("p50_ms", "round trip p50, ms"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, constrained_layout=True)
    figure.suptitle(title, fontsize=10)
    numbers = sorted({sample["robot"] for sample in samples if sample["robot"] is not None})
    for axis, (name, label) in zip(axes.flat, panels, strict=True):
        for who in (None, *numbers):
            mine = sorted((s["hours"], s[name]) for s in samples if s["robot"] == who and name in s)
            if mine:
                number, width = (0, 1.6) if who is None else (who + 1, 0.9)
                axis.plot(*zip(*mine, strict=True), f"C{number}", label=_named(who), linewidth=width)
        axis.set_title(label, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[1]:
        axis.set_xlabel("simulated hours", fontsize=8)
    axes[0][0].legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def report(samples: list[dict[str, Any]], seconds: float, computed_s: float) -> bool:
    """Print what the day was and what grew; whether nothing did."""
    last = {sample["robot"]: sample for sample in samples if sample["robot"] is not None}.values()
    total = {
        name: sum(sample[name] for sample in last)
        for name in ("ticks", "requests", "failed", "starved", "swaps", "episodes")
    }
    hours = max(sample["hours"] for sample in last)
    print(
        f"\n{hours:.1f} simulated hours with {len(last)} robots in {seconds / 60:.1f} min ({hours * 3600 / seconds:.0f} times "
        f"as fast as a clock; {computed_s / 60:.1f} min of computing on {os.cpu_count()} cores): {total['ticks']} ticks, {total['requests']} requests, {total['episodes']} "
        f"episodes, {total['episodes'] // RECONNECT} reconnects, {total['swaps']} swaps; {total['failed']} requests failed, "
        f"{total['starved']} ticks starved"
    )
    print("\n| process | figure | second fifth | last fifth | |")
    print("|---|---|---|---|---|")
    rows = growth(samples)
    for row in rows:
        how = "flat" if row["flat"] else "**grew**"
        print(f"| {row['who']} | {row['figure']} | {row['early']:.2f} | {row['late']:.2f} | {how} |")
    return all(row["flat"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=8.0, help="simulated hours")
    parser.add_argument("--robots", type=int, default=4, help="robots, each a process")
    parser.add_argument("--plot", type=Path, default=RESULTS / "soak.png", help="where the curves are drawn")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    parser.add_argument("--robot", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.robot is not None:
        robot(options.robot, options.port, options.hours)
        return
    began = time.monotonic()
    samples, computed_s = soak(options.hours, options.robots)
    seconds = time.monotonic() - began
    flat = report(samples, seconds, computed_s)
    draw(
        samples,
        options.plot,
        f"{options.hours:g} simulated hours, {options.robots} robots, resets, reconnects and swaps",
    )
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": seconds, "computed_s": computed_s, "samples": samples}) + "\n"
        )
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
