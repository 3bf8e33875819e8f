"""Clients that misbehave, each until it is told to stop: for tests and benchmarks."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from env_client.wire import pack
from env_client.wire.frames import BINARY, frame_header
from serving_parts import UPGRADE, client, make_observation

__all__ = ["WAYS", "frame", "idle_connections", "misbehaving", "raw_client"]

IDLE = 500


def raw_client(port: int, *, buffer: int | None = None) -> socket.socket:
    """A socket after the WebSocket handshake."""
    sock = socket.socket()
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", port))
    lines = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        *(f"{key}: {value}" for key, value in UPGRADE.items()),
    ]
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096)
    assert b" 101 " in head
    return sock


def frame(message: object) -> bytes:
    payload = pack(message)
    return frame_header(BINARY, len(payload), b"\0\0\0\0") + payload


def killed_in_a_frame(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """Half an observation, then gone: by an end, and by a reset."""
    half = frame(make_observation())[:3000]
    begun.set()
    while not stop.is_set():
        for linger in (False, True):
            with raw_client(port) as sock:
                sock.sendall(half)
                if linger:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stop.wait(0.02)


def ask_without_end(
    sock: socket.socket,
    stop: threading.Event,
    pause_s: float,
    then: Callable[[socket.socket], None] = lambda sock: None,
) -> None:
    """A hundred requests a call, and a pause where the server takes no more; `then` follows each call."""
    asked, rest = frame({"op": "status"}) * 100, b""
    sock.setblocking(False)
    while not stop.is_set():
        rest = rest or asked
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            stop.wait(pause_s)
        then(sock)


def never_reads(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """Asks and asks, and takes no answer; it comes again when it is cut."""
    while not stop.is_set():
        with raw_client(port, buffer=4096) as sock, contextlib.suppress(ConnectionError):
            begun.set()
            ask_without_end(sock, stop, 0.02)


def one_byte_a_second(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """In the handshake, and in a frame that announces 30 MB; it comes again when it is cut."""
    while not stop.is_set():
        with (
            socket.create_connection(("127.0.0.1", port)) as shaking,
            raw_client(port) as sending,
            contextlib.suppress(ConnectionError),
        ):
            sending.sendall(frame_header(BINARY, 30_000_000, b"\0\0\0\0"))
            begun.set()
            while not stop.wait(1):
                shaking.send(b"G")
                sending.send(b"\0")


def killed_process(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """A client process that is killed with SIGKILL while it sends.

    Each is forked from one that has imported everything: to start an interpreter takes a core for a third of a second, which
    on a small machine is what the others would wait for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serving_parts"])
    while not stop.is_set():
        sending = context.Event()
        child = context.Process(target=_ask_for_ever, args=(port, sending), daemon=True)
        child.start()
        sending.wait(30)
        child.kill()
        child.join()
        begun.set()
        stop.wait(0.1)


def _ask_for_ever(port: int, sending: Event) -> None:
    policy, obs = client(port), make_observation()
    sending.set()
    while True:
        policy.infer(obs)


def never_waits(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """Asks as fast as it can, and takes every answer."""

    def take(sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while sock.recv(1 << 20):
                pass

    with raw_client(port) as sock:
        begun.set()
        ask_without_end(sock, stop, 0.005, take)


def idle_connections(port: int, begun: threading.Event, stop: threading.Event) -> None:
    """Five hundred that were greeted and ask nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(raw_client(port))
        begun.set()
        stop.wait()


@contextlib.contextmanager
def misbehaving(port: int, way: Callable[[int, threading.Event, threading.Event], None]) -> Iterator[int]:
    """A process in which one of `WAYS` goes on while the block runs, with its id; the measured ones need their own
    interpreter."""
    with subprocess.Popen(
        [sys.executable, __file__, way.__name__, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.stdin.close()
            assert child.wait(60) == 0


WAYS = (killed_in_a_frame, never_reads, never_waits, one_byte_a_second, killed_process, idle_connections)

if __name__ == "__main__":
    begun, stop = threading.Event(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        doing = {way.__name__: way for way in WAYS}[sys.argv[1]]
        running = pool.submit(doing, int(sys.argv[2]), begun, stop)
        begun.wait(60)
        print("started", flush=True)
        sys.stdin.read()
        stop.set()
        running.result(30)
