"""A proxy between a client and a server that is a bad network: cut, silent, slow, lossy; or one that repeats messages.

    with FaultProxy(server_port) as proxy: ... proxy.port ... proxy.begin("delay") ... proxy.end()

Bytes of a TCP connection are not lost or doubled by any network, so `loss` is what loss becomes above TCP: segments that
come after a retransmission timeout, everything behind them waiting. Whole WebSocket messages may be repeated by a broken
middlebox: `RepeatingProxy` does that.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

__all__ = ["FaultProxy", "RepeatingProxy"]

# Seconds: what a slow network adds, TCP's first retransmission timeouts, and how often a segment is lost.
_DELAY, _TIMEOUTS, _LOSS = (0.05, 0.25), (0.2, 0.4), 0.2


class FaultProxy:
    """A TCP proxy on a free loopback port. `begin` and `end` act on all its connections."""

    def __init__(self, upstream: int, seed: int = 0) -> None:
        self._upstream = upstream
        self._random = random.Random(seed)
        self._fault = ""
        self._calm = threading.Event()
        self._calm.set()
        self._sockets: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._reset_all()

    def begin(self, fault: str) -> None:
        """cut (reset, and nobody gets through) | silence (nothing arrives, nothing ends) | delay | loss"""
        self._fault = fault
        if fault in ("cut", "silence"):
            self._calm.clear()
        if fault == "cut":
            self._reset_all()

    def end(self) -> None:
        """The network is good again; what was under way in silence arrives."""
        self._fault = ""
        self._calm.set()

    def _reset_all(self) -> None:
        for sock in tuple(self._sockets):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # A thread that reads it would keep it open.
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            if self._fault == "cut":
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self._upstream))
        except OSError:
            client.close()
            return
        ends = (client, server)
        self._sockets.update(ends)
        pumps = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in (ends, ends[::-1])]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        self._sockets.difference_update(ends)
        for sock in ends:
            sock.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self._fault == "silence":
                    self._calm.wait()
                elif self._fault == "delay":
                    time.sleep(self._random.uniform(*_DELAY))
                elif self._fault == "loss" and self._random.random() < _LOSS:
                    time.sleep(self._random.uniform(*_TIMEOUTS))
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class RepeatingProxy:
    """A WebSocket proxy that, between `begin` and `end`, hands every message on twice, in both directions."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._times = 1
        # Messages that were handed on twice.
        self.repeated = 0
        self._server = serve(self._handle, "127.0.0.1", 0, max_size=None, compression=None)
        self.port: int = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> RepeatingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def begin(self, fault: str) -> None:
        """`fault` is duplicate."""
        self._times = 2

    def end(self) -> None:
        """Each message goes on once."""
        self._times = 1

    def _handle(self, client: ServerConnection) -> None:
        address = f"ws://127.0.0.1:{self._upstream}"
        with (
            contextlib.suppress(OSError, ConnectionClosed),
            connect(address, max_size=None, compression=None) as server,
        ):
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join(5)

    def _pump(self, source: Any, target: Any) -> None:
        with contextlib.suppress(OSError, ConnectionClosed):
            for message in source:
                self.repeated += self._times - 1
                for _ in range(self._times):
                    target.send(message)
        source.close()
        target.close()
