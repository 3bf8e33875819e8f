"""The server's memory over many requests, connections and swaps of its policy: is it flat?

    uv run python benchmarks/memory.py [--quick] [--checkpoint checkpoints/lift_act]

Each row is a twentieth of the way. A swap loads the checkpoint again (with another default prompt), beside the one that
serves, which leaves the memory afterwards. Bytes are the process's resident set; on a GPU its memory is shown as well.
"""

import argparse
import http.client
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from clients import observations_for
from env_client.websocket_client_policy import WebsocketClientPolicy
from tqdm import tqdm
from wire import start

ROWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/lift_act"))
    parser.add_argument("--device", help="cpu, cuda; default: the best that is there")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=2_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument(
        "--quick", action="store_true", help="a hundredth of the requests and connections, 5 swaps"
    )
    options = parser.parse_args()
    if options.quick:
        options.requests, options.connections, options.swaps = 200, 20, 5
    checkpoint = options.checkpoint.resolve()
    flags = ("--device", options.device) if options.device else ()
    server, port = start(
        "-m",
        "grasp_cube.serve_policy",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--policy.root",
        str(checkpoint.parent),
        *flags,
    )
    try:
        policy = WebsocketClientPolicy("127.0.0.1", port, on_status=lambda sentence: None)
        policy.configure(path=str(checkpoint))
        observations = observations_for(port)

        def ask(number: int) -> None:
            policy.infer(observations[number % len(observations)])

        def connect(number: int) -> None:
            with WebsocketClientPolicy("127.0.0.1", port) as other:
                other.infer(observations[number % len(observations)])

        def swap(number: int) -> None:
            policy.configure(path=str(checkpoint), prompt=f"prompt {number % 2}")
            policy.infer(observations[0])

        for name, act, count in (
            ("requests", ask, options.requests),
            ("connections", connect, options.connections),
            ("swaps", swap, options.swaps),
        ):
            show(name, curve(server.pid, port, name, act, count))
    finally:
        server.kill()


def curve(pid: int, port: int, name: str, act: Callable[[int], None], count: int) -> list[tuple[float, ...]]:
    """(count, resident MB, device MB, open files, threads) along the way."""
    process, rows = psutil.Process(pid), []
    marks = {round(count * row / ROWS) for row in range(1, ROWS + 1)}
    for number in tqdm(range(1, count + 1), desc=name):
        act(number)
        if number in marks:
            resident = process.memory_info().rss / 1e6
            files = len(os.listdir(f"/proc/{pid}/fd"))
            rows.append((number, resident, device_mb(port), files, process.num_threads()))
    return rows


def device_mb(port: int) -> float:
    """What /metrics says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r"^grasp_cube_device_memory_bytes (\S+)", page, re.MULTILINE)
    return float(found[1]) / 1e6 if found else float("nan")


def show(name: str, rows: list[tuple[float, ...]]) -> None:
    resident = np.array([row[1] for row in rows])
    print(f"\n{name:>12}{'resident MB':>14}{'device MB':>12}{'files':>8}{'threads':>9}")
    top = resident.max()
    for number, mb, device, files, threads in rows:
        bar = "█" * round(40 * mb / top)
        print(f"{number:12}{mb:14.1f}{device:12.1f}{files:8}{threads:9}  {bar}")
    # The first quarter fills caches.
    begin, end = np.median(resident[len(rows) // 4 : len(rows) // 2]), np.median(resident[-len(rows) // 4 :])
    print(f"{name}: {end - begin:+.1f} MB from the second quarter to the last one", flush=True)


if __name__ == "__main__":
    main()
