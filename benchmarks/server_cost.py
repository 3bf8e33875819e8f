"""What a server itself costs: from the last received byte of a request to the first sent byte of its answer.

    uv run python benchmarks/server_cost.py [--quick] [--json FILE]

Eight clients with two raw 480x640 images ask ten times a second each, as robots do, one process of ours and one of a plain
openpi-style server in turn. Both run an empty policy, whose time is not taken off, and both stamp the same two moments:
when the event loop hands the last bytes of a request to the protocol, and right before the answer's first system call.
"""

import asyncio.selector_events
import concurrent.futures
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from env_client.websocket_client_policy import WebsocketClientPolicy
from numpy_policy import write_checkpoint
from openpi_client.websocket_client_policy import WebsocketClientPolicy as OpenpiClient
from ratios import Part, Ratio, main
from wire import HERE, cameras_of, observation, start

CLIENTS = 8
RATE_HZ = 10.0
ROOM = 200_000


def run(quick: bool) -> Part:
    """One block of each server after the other, again and again."""
    blocks, seconds = (4, 1.5) if quick else (8, 5.0)
    obs = observation(480, 640)
    costs: dict[str, list[np.ndarray]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "empty", cameras=cameras_of(obs), behaviour="constant")
        servers = {}
        try:
            for who, more in (
                ("ours", ["--policy.path", str(checkpoint), "--host", "127.0.0.1"]),
                ("peer", []),
            ):
                stamps = np.memmap(folder / who, np.float64, "w+", shape=ROOM)
                process, port = start(__file__, "--serve", who, str(folder / who), "--port", "0", *more)
                servers[who] = process, port, stamps
            for block in range(2 * blocks):
                who = ("ours", "peer")[block % 2]
                _, port, stamps = servers[who]
                begin = int(stamps[0])
                ask_all(WebsocketClientPolicy if who == "ours" else OpenpiClient, port, obs, seconds)
                costs[who].append(np.array(stamps[begin + 1 : int(stamps[0]) + 1]) * 1e3)
        finally:
            for process, _, _ in servers.values():
                process.kill()
    mine, theirs = costs["ours"], costs["peer"]
    ratios = [
        Ratio(
            f"server_cost.p{percent}_8_clients",
            f"p{percent} from the last byte received to the first byte sent, 8 clients, 2 raw 480x640 images",
            "ms",
            [float(np.percentile(block, percent)) for block in mine],
            [float(np.percentile(block, percent)) for block in theirs],
            {"ms of all requests": float(np.percentile(np.concatenate(mine), percent))},
        )
        for percent in (50, 99)
    ]
    return Part("server_cost", ratios)


def ask_all(client: Callable[..., Any], port: int, obs: dict, seconds: float) -> None:
    """`CLIENTS` that ask at `RATE_HZ`, spread evenly, for so long."""

    def ask(number: int) -> None:
        policy = client("127.0.0.1", port)
        policy.infer(obs)
        begin.wait()
        due = time.monotonic() + number / CLIENTS / RATE_HZ
        end = due + seconds
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            policy.infer(obs)
            due += 1 / RATE_HZ
        close = getattr(policy, "close", None) or policy._ws.close
        close()

    begin = threading.Barrier(CLIENTS)
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(ask, number) for number in range(CLIENTS)]:
            done.result()


def serve(who: str, file: str, arguments: list[str]) -> None:
    """A server whose requests are stamped into `file`: their number, then the seconds of each."""
    stamps = np.memmap(file, np.float64, "r+", shape=ROOM)
    received: dict[int, float] = {}

    def stamped(protocol: type, method: str) -> None:
        plain = getattr(protocol, method)

        def receive(self: Any, data: Any) -> None:
            received[id(self)] = time.perf_counter()
            plain(self, data)

        setattr(protocol, method, receive)

    transport = asyncio.selector_events._SelectorSocketTransport
    write = transport.write

    def send(self: Any, data: Any) -> None:
        came = received.pop(id(self.get_protocol()), None)
        if came is not None and stamps[0] < ROOM - 1:
            stamps[int(stamps[0]) + 1] = time.perf_counter() - came
            stamps[0] += 1
        write(self, data)

    transport.write = send  # type: ignore[method-assign]
    if who == "ours":
        from grasp_cube.serve_policy import main as serve_policy
        from grasp_cube.serving.websocket import Connection

        stamped(Connection, "buffer_updated")
        serve_policy(arguments)
    else:
        from websockets.asyncio.server import ServerConnection

        stamped(ServerConnection, "data_received")
        sys.argv = ["plain_server.py", *arguments]
        runpy.run_path(str(HERE / "plain_server.py"), run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(run, __doc__)
