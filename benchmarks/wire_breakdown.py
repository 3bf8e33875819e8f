"""Where a round trip's time goes: each step alone, then the sockets alone, then all of it with an empty policy.

    uv run python benchmarks/wire_breakdown.py [--rounds 300]

Medians in microseconds. The steps are measured warm, one after the other; in a real round trip their caches are
colder, and sending overlaps with receiving, so that the sum is not the whole.
"""

import argparse
import asyncio
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np
from env_client.websocket import Connection
from env_client.wire import Infer, InferReply, pack, pack_parts, read_request, unpack
from env_client.wire.frames import BINARY, CHUNK, FrameReader, masked_chunks
from wire import CASES, measure, observation

from grasp_cube.serving.websocket import listening

MAX_BYTES = 128 * 1024 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    for case in CASES[:2]:
        name, height, width, _ = case
        row = measure(case, rounds)
        print(f"\n{name}")
        for step, micros in steps(observation(height, width), rounds).items():
            print(f"  {step:44}{micros:9.0f}")
        print(f"  {'round trip through server and client':44}{float(row['ours_p50']) * 1e3:9.0f}")
        print(f"  {'  of a plain openpi-style server and client':44}{float(row['peer_p50']) * 1e3:9.0f}")


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
        "client: gather and mask": timed(mask, rounds),
        "server: place and unmask, with a copy as recv's": timed(read, rounds),
        "server: unpack and read the request": timed(lambda: read_request(unpack(payload)[0]), rounds),
        "server: pack the reply": timed(lambda: pack(reply), rounds),
        "client: unpack the reply": timed(lambda: unpack(answer), rounds),
        "sockets alone, there and back": sockets(parts, len(answer), rounds),
    }


def sockets(parts: list[bytes | memoryview], answer: int, rounds: int) -> float:
    """A round trip of masked parts to another process that answers `answer` bytes and looks at nothing."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    context = multiprocessing.get_context("fork")
    server = context.Process(target=lambda: asyncio.run(_answer_all(sock, bytes(answer))), daemon=True)
    server.start()
    try:
        client = None
        while client is None:
            try:
                client = Connection.open(f"ws://127.0.0.1:{sock.getsockname()[1]}")
            except ConnectionRefusedError:
                time.sleep(0.01)

        def there_and_back() -> None:
            client.send(parts, 30)
            client.recv(30)

        result = timed(there_and_back, rounds)
        client.close()
        return result
    finally:
        server.kill()
        server.join()
        sock.close()


async def _answer_all(sock: socket.socket, answer: bytes) -> None:
    async def handle(connection) -> None:
        async for _ in connection:
            await connection.send(answer)

    async with listening(sock, handle, lambda connection, request: None, max_bytes=MAX_BYTES):
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
