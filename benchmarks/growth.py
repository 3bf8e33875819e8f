"""What a round trip costs as things grow: images, cameras, horizons, clients, idle sessions, hours.

    uv run python benchmarks/growth.py [--quick] [--json FILE]

An empty policy behind our server, and the plain openpi-style server beside it where it has such a thing. Medians in ms; each
point of ours and of the peer's is measured in turn. An hour of a robot is 3,600 requests: one a second, as `async` asks with
chunks of 50 actions at 30 Hz and some margin; they are sent here as fast as they are answered.
"""

import concurrent.futures
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from openpi_client.websocket_client_policy import WebsocketClientPolicy as OpenpiClient
from ratios import Curve, Part, main, timed
from tqdm import tqdm
from wire import HERE, cameras_of, start, start_ours

HEIGHTS = (60, 120, 240, 480, 720, 1080)
CAMERAS = (1, 2, 3, 4, 6, 8)
HORIZONS = (8, 16, 50, 100, 300, 1000)
CLIENTS = (1, 2, 4, 8, 16)
SESSIONS = (1, 10, 100, 300, 1000)
HOURS = 8
REQUESTS_PER_HOUR = 3600


def run(quick: bool) -> Part:
    rounds = 20 if quick else 100
    steps: list[Callable[[int], Curve]] = [sizes, cameras, horizons, clients, sessions, hours]
    return Part("growth", curves=[step(rounds) for step in tqdm(steps, desc="growth", leave=False)])


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def observed(images: dict[str, np.ndarray]) -> dict[str, Any]:
    return {"images": images, "states": {"arm": np.zeros(6, np.float32)}, "task": "lift up the red cube"}


@contextlib.contextmanager
def both(obs: dict[str, Any], horizon: int = 16) -> Iterator[tuple[int, int, int]]:
    """The ports of our server and of the plain one, and the process of ours."""
    with tempfile.TemporaryDirectory() as folder:
        kept = write_checkpoint(
            Path(folder) / "empty", cameras=cameras_of(obs), behaviour="constant", horizon=horizon
        )
        ours, our_port = start_ours(kept)
        peer, peer_port = start(str(HERE / "plain_server.py"), "--port", "0", "--horizon", str(horizon))
        try:
            yield our_port, peer_port, ours.pid
        finally:
            for process in (ours, peer):
                process.kill()
                process.wait()


def medians(ports: Sequence[int], obs: dict[str, Any], rounds: int) -> tuple[float, float]:
    """Of our client at our server and of openpi's at the plain one, asked in turn."""
    with WebsocketClientPolicy("127.0.0.1", ports[0]) as mine:
        plain = OpenpiClient("127.0.0.1", ports[1])
        pairs = [(timed(mine.infer, obs), timed(plain.infer, obs)) for _ in range(rounds + 5)][5:]
        plain._ws.close()
    ours, peer = np.median(pairs, axis=0)
    return float(ours), float(peer)


def compared(points: Sequence[tuple[dict[str, Any], int]], rounds: int) -> dict[str, list[float]]:
    """One point for each observation and horizon."""
    series: dict[str, list[float]] = {"ours": [], "plain": []}
    for obs, horizon in points:
        with both(obs, horizon) as ports:
            ours, peer = medians(ports, obs, rounds)
        series["ours"].append(ours)
        series["plain"].append(peer)
    return series


def sizes(rounds: int) -> Curve:
    points = [(observed({name: picture(h, h * 4 // 3) for name in ("front", "wrist")}), 16) for h in HEIGHTS]
    megabytes = [2 * h * (h * 4 // 3) * 3 / 1e6 for h in HEIGHTS]
    note = "A constant of some 0.5 ms, then the kernel's two copies; both bend where a message outgrows the 4 MB socket buffers."
    return Curve(
        "growth.image_size",
        "Image size (2 raw images)",
        "MB",
        "round trip, ms",
        megabytes,
        compared(points, rounds),
        note,
    )


def cameras(rounds: int) -> Curve:
    points = [(observed({f"camera_{n}": picture(224, 224) for n in range(count)}), 16) for count in CAMERAS]
    note = "Straight: a camera is bytes, and a part of the message that is not copied."
    return Curve(
        "growth.cameras",
        "Cameras (raw 224x224)",
        "cameras",
        "round trip, ms",
        list(map(float, CAMERAS)),
        compared(points, rounds),
        note,
    )


def horizons(rounds: int) -> Curve:
    obs = observed({"front": picture(64, 64)})
    note = "Flat until the reply leaves one packet of loopback (64 kB)."
    points = [(obs, horizon) for horizon in HORIZONS]
    return Curve(
        "growth.horizon",
        "Horizon (6 joints)",
        "actions",
        "round trip, ms",
        list(map(float, HORIZONS)),
        compared(points, rounds),
        note,
        log_x=True,
    )


def clients(rounds: int) -> Curve:
    """All of them ask without a pause."""
    obs = observed({"front": picture(224, 224), "wrist": picture(224, 224)})
    series: dict[str, list[float]] = {"ours": [], "plain": []}
    with both(obs) as (our_port, peer_port, _):
        for count in CLIENTS:
            for label, client, port in (
                ("ours", WebsocketClientPolicy, our_port),
                ("plain", OpenpiClient, peer_port),
            ):
                series[label].append(crowd(client, port, count, obs, max(10, rounds // 2)))
    note = "Straight from the number of clients that fills the cores: they wait in line, and share them with the server."
    return Curve(
        "growth.clients",
        "Clients without pause (2 x 224x224)",
        "clients",
        "round trip, ms",
        list(map(float, CLIENTS)),
        series,
        note,
    )


def crowd(client: Callable[..., Any], port: int, count: int, obs: dict[str, Any], rounds: int) -> float:
    begin = threading.Barrier(count)

    def ask(_: int) -> list[float]:
        policy = client("127.0.0.1", port)
        policy.infer(obs)
        begin.wait()
        times = [timed(policy.infer, obs) for _ in range(rounds)]
        (policy.close if isinstance(policy, WebsocketClientPolicy) else policy._ws.close)()
        return times

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return float(np.median([time for times in pool.map(ask, range(count)) for time in times]))


def sessions(rounds: int) -> Curve:
    """Clients that are connected and silent, and one that asks."""
    obs = observed({"front": picture(64, 64)})
    series: dict[str, list[float]] = {"ours": [], "plain": []}
    # Held until the servers are gone.
    silent: list[Any] = []
    with both(obs) as ports:
        for count in SESSIONS:
            while len(silent) < 2 * (count - 1):
                silent += [WebsocketClientPolicy("127.0.0.1", ports[0]), OpenpiClient("127.0.0.1", ports[1])]
            ours, peer = medians(ports, obs, rounds)
            series["ours"].append(ours)
            series["plain"].append(peer)
    note = "Flat: a silent connection costs memory (a few kB), no time."
    return Curve(
        "growth.sessions",
        "Connected clients, one asks",
        "clients",
        "round trip, ms",
        list(map(float, SESSIONS)),
        series,
        note,
        log_x=True,
    )


def hours(rounds: int) -> Curve:
    obs = observed({"front": picture(64, 64)})
    asked = REQUESTS_PER_HOUR if rounds >= 100 else REQUESTS_PER_HOUR // 20
    series: dict[str, list[float]] = {"round trip, ms": [], "memory, MB / 100": []}
    with both(obs) as (port, _, pid), WebsocketClientPolicy("127.0.0.1", port) as client:
        server = psutil.Process(pid)
        for _ in range(HOURS):
            series["round trip, ms"].append(
                float(np.median([timed(client.infer, obs) for _ in range(asked)]))
            )
            series["memory, MB / 100"].append(server.memory_info().rss / 1e8)
    note = "Flat: what a request leaves behind is a counter."
    at = [(hour + 1) * asked / REQUESTS_PER_HOUR for hour in range(HOURS)]
    return Curve("growth.hours", "Hours of one robot's requests", "hours", "ms, MB / 100", at, series, note)


if __name__ == "__main__":
    started = time.monotonic()
    main(run, __doc__)
    print(f"{time.monotonic() - started:.0f} s")
