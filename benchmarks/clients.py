"""Many clients at one server: throughput, waiting times and fairness, beside a server that answers one at a time.

    uv run python benchmarks/clients.py [--quick] [--part many|bad] [--checkpoint checkpoints/lift_act] [--json FILE]

Both servers run the same model with the same threads and are asked in turn, A B A B …, by the same clients in lock
step; the ratio is taken round by round. /healthz is asked all the while. "share" is the requests of the client that got
the fewest, over an equal share. "cores" is what the server process used while one client asked: where that is all of
them, no batch can make more of the machine.

Then four clients of a policy that takes 2 ms are measured with and without clients that misbehave, in turn as well: the
baseline is the same four clients alone, on the same server, seconds later. "cores" says who computes meanwhile: the server
with and without the others, and the others themselves. What these take of a small machine is taken from everybody and is
not the server's doing; so they are made to need little: one process for all of a kind, the killed ones forked from one that
has imported everything.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from wire import HERE, start

sys.path.insert(0, str(HERE.parent / "tests"))
from bad_clients import WAYS, misbehaving
from serving_parts import CAMERAS, make_observation

COUNTS = (1, 2, 4, 8, 16)
# The first requests of a round find cold caches.
SETTLE_S = 0.5
HEALTH_EVERY_S = 0.01
GOOD_CLIENTS = 4


@dataclass
class Load:
    """What a number of clients saw."""

    # Milliseconds of each request.
    times: list[float] = field(default_factory=list)
    # Requests of each client in a second.
    rates: list[float] = field(default_factory=list)
    # The same of /healthz.
    health: list[float] = field(default_factory=list)

    def add(self, other: "Load") -> None:
        self.times += other.times
        self.rates += other.rates
        self.health += other.health

    def time(self, percent: float) -> float:
        return float(np.percentile(self.times, percent))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="checkpoints/lift_act")
    parser.add_argument("--device", help="cpu, cuda; default: the best that is there")
    parser.add_argument("--rounds", type=int, default=5, help="of each pair")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each half of a round")
    parser.add_argument("--quick", action="store_true", help="one short round of 1 and 8 clients")
    parser.add_argument("--part", choices=("many", "bad"), help="only one of the two tables")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    counts: tuple[int, ...] = COUNTS
    if options.quick:
        counts, options.rounds, options.seconds = (1, 8), 1, 3.0
    # As under serve_policy; the peer must not be slower for it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    figures: dict[str, list[dict]] = {}
    if options.part != "bad":
        figures["many"] = many(options.checkpoint, options.device, counts, options.rounds, options.seconds)
    if options.part != "many":
        figures["bad"] = bad(options.rounds, min(options.seconds, 5.0))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def many(
    checkpoint: str, device: str | None, counts: tuple[int, ...], rounds: int, seconds: float
) -> list[dict]:
    """The first table."""
    flags = ("--device", device) if device else ()
    ours, our_port = start(
        "-m",
        "grasp_cube.serve_policy",
        "--policy.path",
        checkpoint,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *flags,
    )
    peer, peer_port = start(str(HERE / "plain_server.py"), "--port", "0", "--checkpoint", checkpoint)
    rows = []
    try:
        observations = observations_for(our_port)
        busy = {
            name: cores(process.pid, port, observations)
            for name, process, port in (("ours", ours, our_port), ("one at a time", peer, peer_port))
        }
        print(
            f"\n{checkpoint}, {os.cpu_count()} cores, {rounds} rounds of {seconds:g} s; cores used while one client asks: "
            + ", ".join(f"{name} {value:.2f}" for name, value in busy.items())
        )
        print(
            f"{'clients':>8}{'ours /s':>10}{'p50':>8}{'p99':>8}{'share':>7}{'health p99':>12}"
            f"{'peer /s':>10}{'p50':>8}{'p99':>8}{'share':>7}{'health p99':>12}{'ratio':>8}"
        )
        for count in counts:
            mine, theirs, ratios = Load(), Load(), []
            for _ in range(rounds):
                a = load(our_port, count, seconds, observations)
                b = load(peer_port, count, seconds, observations)
                ratios.append(sum(a.rates) / sum(b.rates))
                mine.add(a)
                theirs.add(b)
            row: dict[str, Any] = {"clients": count, "ratio": float(np.median(ratios)), "cores": busy}
            line = f"{count:8}"
            for name, result in (("ours", mine), ("peer", theirs)):
                shares = np.reshape(result.rates, (rounds, count))
                share = float((shares.mean(0).min()) / shares.mean())
                row[name] = {
                    "per_s": sum(result.rates) / rounds,
                    "p50": result.time(50),
                    "p99": result.time(99),
                    "share": share,
                    "health_p99": float(np.percentile(result.health, 99)),
                }
                line += "".join(
                    f"{row[name][key]:{width}.{digits}f}"
                    for key, width, digits in (
                        ("per_s", 10, 1),
                        ("p50", 8, 1),
                        ("p99", 8, 1),
                        ("share", 7, 2),
                        ("health_p99", 12, 1),
                    )
                )
            print(f"{line}{row['ratio']:8.2f}", flush=True)
            rows.append(row)
    finally:
        ours.kill()
        peer.kill()
    return rows


def bad(rounds: int, seconds: float) -> list[dict]:
    """The second table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "empty", cameras=CAMERAS, delay_s=0.002)
        server, port = start(
            "-m",
            "grasp_cube.serve_policy",
            "--policy.path",
            str(checkpoint),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        )
        try:
            observations = [make_observation(seed) for seed in range(8)]
            load(port, GOOD_CLIENTS, 1.0, observations)
            print(f"\n{GOOD_CLIENTS} clients of a policy that takes 2 ms, beside others, ms")
            print(
                f"{'the others':20}{'p50 with':>10}{'without':>10}{'p99 with':>10}{'without':>10}{'p99 ratio':>11}"
                f"{'of each pair':>14}{'cores with':>13}{'without':>10}{'theirs':>10}"
            )
            for way in WAYS:
                beside, alone, pairs = Load(), Load(), []
                used: list[tuple[float, float, float]] = []
                for _ in range(max(rounds, 2)):
                    with (
                        misbehaving(port, way) as pid,
                        used_cores(server.pid) as ours,
                        used_cores(pid) as theirs,
                    ):
                        a = load(port, GOOD_CLIENTS, seconds / 2, observations)
                    with used_cores(server.pid) as rested:
                        b = load(port, GOOD_CLIENTS, seconds / 2, observations)
                    pairs.append(a.time(99) / b.time(99))
                    used.append((ours[0], rested[0], theirs[0]))
                    beside.add(a)
                    alone.add(b)
                row = {"way": way.__name__, "ratio": beside.time(99) / alone.time(99), "pairs": pairs}
                row |= {"p50": [beside.time(50), alone.time(50)], "p99": [beside.time(99), alone.time(99)]}
                row["cores"] = np.mean(used, axis=0).tolist()
                times = "".join(f"{value:10.2f}" for value in (*row["p50"], *row["p99"]))
                print(
                    f"{way.__name__:20}{times}{row['ratio']:11.2f}{min(pairs):8.2f}-{max(pairs):.2f} "
                    + "{:12.2f}{:10.2f}{:10.2f}".format(*row["cores"]),
                    flush=True,
                )
                rows.append(row)
        finally:
            server.kill()
    return rows


def observations_for(port: int) -> list[dict]:
    """A few random observations of the sizes that the server's policy takes."""
    with WebsocketClientPolicy("127.0.0.1", port) as policy:
        spec = policy.spec
    assert spec is not None
    rng = np.random.default_rng(0)
    return [
        {
            "images": {c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras},
            "states": {part.name: rng.uniform(-50, 50, part.size).astype(np.float32) for part in spec.states},
            "task": "lift up the red cube",
        }
        for _ in range(8)
    ]


def load(port: int, count: int, seconds: float, observations: list[dict]) -> Load:
    """`count` clients in lock step for so long."""
    begin = threading.Barrier(count + 1)

    def drive(number: int) -> tuple[list[float], float]:
        with WebsocketClientPolicy("127.0.0.1", port, on_status=lambda sentence: None) as policy:
            policy.infer(observations[0])
            begin.wait()
            started = time.perf_counter()
            while time.perf_counter() - started < SETTLE_S:
                policy.infer(observations[number % len(observations)])
            started = now = time.perf_counter()
            times: list[float] = []
            while now - started < seconds:
                policy.infer(observations[(number + len(times)) % len(observations)])
                now, before = time.perf_counter(), now
                times.append((now - before) * 1e3)
            return times, len(times) / (now - started)

    result = Load()
    with concurrent.futures.ThreadPoolExecutor(count) as pool, asking_health(port, result.health):
        running = [pool.submit(drive, number) for number in range(count)]
        begin.wait()
        for each in running:
            times, rate = each.result()
            result.times += times
            result.rates.append(rate)
    return result


@contextlib.contextmanager
def asking_health(port: int, times: list[float]) -> Iterator[None]:
    """Milliseconds of /healthz while the block runs."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(HEALTH_EVERY_S):
            times.append(timed(get_health, port))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def get_health(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    connection.close()


def timed(call: Callable, *arguments: object) -> float:
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e3


def cores(pid: int, port: int, observations: list[dict]) -> float:
    """Cores that a server process keeps busy while one client asks."""
    with used_cores(pid) as used:
        load(port, 1, 2.0, observations)
    return used[0]


@contextlib.contextmanager
def used_cores(pid: int) -> Iterator[list[float]]:
    """Cores that a process and its children, those that have ended as well, kept busy while the block ran: one value,
    when it has ended."""
    used: list[float] = []
    before, started = cpu_s(pid), time.perf_counter()
    yield used
    used.append((cpu_s(pid) - before) / (time.perf_counter() - started))


def cpu_s(pid: int) -> float:
    """Seconds that a process and its children have computed."""
    process, total = psutil.Process(pid), 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])
    return total


if __name__ == "__main__":
    main()
