"""Where a round trip's time goes: each step alone, then the sockets alone, then all of it with an empty policy.

    uv run python benchmarks/wire_breakdown.py [--rounds 300]

Medians in microseconds. The steps are measured warm, one after the other; in a real round trip their caches are
colder, and sending overlaps with receiving, so that the sum is not the whole.
"""

import argparse
import asyncio
import contextlib
import mmap
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from env_client import websocket
from env_client.websocket import SOCKET_BUFFER, Connection
from env_client.wire import Infer, InferReply, pack, pack_parts, read_request, unpack
from env_client.wire.frames import BINARY, CHUNK, FrameReader, masked_chunks
from websockets.client import ClientProtocol
from websockets.uri import parse_uri
from wire import CASES, measure, observation

from grasp_cube.serving.listener import listening

MAX_BYTES = 128 * 1024 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    for case in CASES[:2]:
        name, height, width, _ = case
        ratio = measure(case, rounds)
        print(f"\n{name}")
        for step, micros in steps(observation(height, width), rounds).items():
            print(f"  {step:44}{micros:9.0f}")
        print(f"  {'round trip through server and client':44}{statistics.median(ratio.ours) * 1e3:9.0f}")
        print(
            f"  {'  of a plain openpi-style server and client':44}{statistics.median(ratio.peer) * 1e3:9.0f}"
        )


def steps(obs: dict, rounds: int) -> dict[str, float]:
    """Microseconds of each step."""
    request = Infer(obs=obs, seq=1)
    parts = pack_parts(request.to_wire())
    payload = b"".join(parts)
    scratch = np.empty(CHUNK + 16, np.uint8)
    frame = b"".join(bytes(piece) for piece in masked_chunks(BINARY, parts, b"\1\2\3\4", scratch))
    timing = {"queue_ms": 0.1, "infer_ms": 0.1, "batch_size": 1.0, "prev_total_ms": 1.0}
    reply = InferReply(np.zeros((16, 6), np.float32), 1, timing, seq=1).to_wire(bare=False)
    answer = pack(reply)
    reader = FrameReader(from_client=True, max_bytes=MAX_BYTES)

    def mask() -> None:
        for _ in masked_chunks(BINARY, parts, b"\1\2\3\4", scratch):
            pass

    def read() -> None:
        at = 0
        while at < len(frame):
            room = reader.buffer()
            count = min(len(room), len(frame) - at)
            room[:count] = frame[at : at + count]
            reader.advance(count)
            at += count

    return {
        "client: pack without copying": timed(lambda: pack_parts(request.to_wire()), rounds),
        "  (pack with copies, as it was)": timed(lambda: pack(request.to_wire()), rounds),
        "  (gather and mask, for a server elsewhere)": timed(mask, rounds),
        "  (place and unmask, with a copy as recv's)": timed(read, rounds),
        "server: unpack and read the request": timed(lambda: read_request(unpack(payload)[0]), rounds),
        "server: pack the reply": timed(lambda: pack(reply), rounds),
        "client: unpack the reply": timed(lambda: unpack(answer), rounds),
    } | sockets(parts, len(answer), rounds)


def sockets(parts: list[bytes | memoryview], answer: int, rounds: int) -> dict[str, float]:
    """Round trips to another process that answers `answer` bytes and looks at nothing, by each way, in turn."""
    folder = tempfile.mkdtemp()
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    unix.bind(f"{folder}/socket")
    context = multiprocessing.get_context("fork")
    server = context.Process(target=lambda: asyncio.run(_answer_all((tcp, unix), bytes(answer))), daemon=True)
    server.start()
    size = sum(map(len, parts))
    shared = memoryview(mmap.mmap(-1, size))

    def shake(sock: socket.socket) -> Connection:
        connection = Connection(sock)
        connection._shake_hands(ClientProtocol(parse_uri("ws://localhost")), {}, time.monotonic() + 30)
        return connection

    def connected(family: int, address: Any, buffer: int | None) -> Connection:
        deadline = time.monotonic() + 30
        while True:
            sock = socket.socket(family)
            if buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            try:
                sock.connect(address)
            except (ConnectionRefusedError, FileNotFoundError):
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            return shake(sock)

    def ask(client: Connection) -> None:
        client.send(parts, 30)
        client.recv(30)

    def copied(client: Connection) -> None:
        """As if the data went through shared memory: a copy, and a small message."""
        at = 0
        for part in parts:
            shared[at : at + len(part)] = part
            at += len(part)
        client.send(b"look", 30)
        client.recv(30)

    try:
        stays_here = websocket._stays_here
        ways: dict[str, tuple[Connection, Callable[[Connection], None]]] = {}
        for label, family, address, buffer, masked in (
            ("sockets alone: TCP", socket.AF_INET, tcp.getsockname(), SOCKET_BUFFER, False),
            (
                "  (TCP, masked, as to a server elsewhere)",
                socket.AF_INET,
                tcp.getsockname(),
                SOCKET_BUFFER,
                True,
            ),
            ("  (TCP, the system's own buffer sizes)", socket.AF_INET, tcp.getsockname(), None, False),
            ("  (a Unix socket)", socket.AF_UNIX, unix.getsockname(), SOCKET_BUFFER, False),
        ):
            websocket._stays_here = lambda sock, masked=masked: not masked
            ways[label] = connected(family, address, buffer), ask
        ways["  (shared memory: a copy and a small message)"] = (
            connected(socket.AF_INET, tcp.getsockname(), None),
            copied,
        )
        websocket._stays_here = stays_here
        times: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(rounds):
            for label, (client, call) in ways.items():
                started = time.perf_counter()
                call(client)
                times[label].append((time.perf_counter() - started) * 1e6)
        for client, _ in ways.values():
            client.close()
        return {label: statistics.median(each) for label, each in times.items()}
    finally:
        server.kill()
        server.join()
        shutil.rmtree(folder)


async def _answer_all(socks: tuple[socket.socket, ...], answer: bytes) -> None:
    async def handle(connection) -> None:
        async for _ in connection:
            await connection.send(answer)

    async with contextlib.AsyncExitStack() as stack:
        for sock in socks:
            await stack.enter_async_context(
                listening(sock, handle, lambda connection, request: None, max_bytes=MAX_BYTES)
            )
        await asyncio.Event().wait()


def timed(call: Callable[[], object], rounds: int) -> float:
    """The median, in microseconds, after a tenth of the rounds to warm up."""
    times = []
    for number in range(rounds + rounds // 10):
        started = time.perf_counter()
        call()
        if number >= rounds // 10:
            times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores")
    main()
