"""The door's process: `python -m env_client.panel.process UPDATES LISTENING COMMANDS`, three sockets; started by `Panel` only.

    sidecar --ticks, JPEGs--> [door: HTTP, WebSocket] <--> browsers
                                      `--commands--> control

It has nothing to do but to pass bytes on, and that is the point: what a person presses must not wait for those who record.
These run at a lower priority, so that control keeps its cores; one of them that held the interpreter's lock of a common process
while others had the cores was seen to keep a Stop waiting for 1.8 s. Here no thread computes, and the only one goes first
when it wakes.

Life cycle: it ends when the sidecar says so or is gone. Error policy: nothing that a browser sends ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import pickle
import signal
import socket
import struct
import sys
from typing import Any

from aiohttp import web

from env_client.control.slices import short_slices
from env_client.panel.commands import plain_command, send_command
from env_client.panel.door import make_app
from env_client.panel.live import Live

__all__ = ["Door", "main"]

# How `multiprocessing.Connection`, the other end, frames a message.
_LENGTH = struct.Struct("!i")
# How long the 3D view may take to start, seconds.
_SCENE = 120.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    updates, listening, commands = (socket.socket(fileno=int(number)) for number in sys.argv[1:4])
    short_slices()
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        asyncio.run(Door(listening, commands).run(updates))


class Door:
    """The web server, fed by the sidecar."""

    def __init__(self, listening: socket.socket, commands: socket.socket) -> None:
        self._listening, self._commands = listening, commands
        commands.setblocking(False)
        self._live = Live(self._command, lambda watched: self._tell("watched", watched))
        self._scene_port: asyncio.Future[int | str] | None = None

    async def run(self, updates: socket.socket) -> None:
        """Until the sidecar closes. Raises `IncompleteReadError` or `ConnectionError` when it is gone."""
        reader, self._writer = await asyncio.open_connection(sock=updates)
        _, config = await _next(reader)
        app = make_app(config, self._live, self._find_scene)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, self._listening, shutdown_timeout=1.0).start()
            # Later collections walk only what is new: no pause between a press and its command.
            gc.freeze()
            self._tell("ready", None)
            await self._follow(reader)
        finally:
            await self._live.close()
            await runner.cleanup()

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        while True:
            event, value = await _next(reader)
            if event == "put":
                self._live.put(*value)
            elif event == "tick":
                self._live.put_tick(*value)
            elif event == "forget":
                self._live.forget()
            elif event == "scene" and self._scene_port is not None:
                if not self._scene_port.done():
                    self._scene_port.set_result(value)
            elif event == "close":
                return

    async def _find_scene(self) -> int | str:
        """viser's port, which the sidecar opens for the first browser that asks, or why there is no 3D view."""
        asked = self._scene_port
        if asked is None or (asked.done() and isinstance(asked.result(), str)):
            asked = self._scene_port = asyncio.get_running_loop().create_future()
            self._tell("scene", None)
        try:
            return await asyncio.wait_for(asyncio.shield(asked), _SCENE)
        except TimeoutError:
            return "it did not start in time"

    def _command(self, message: dict[str, Any]) -> None:
        command = plain_command(message)
        if command is not None:
            send_command(self._commands, command)

    def _tell(self, event: str, value: Any) -> None:
        data = json.dumps((event, value)).encode()
        self._writer.write(_LENGTH.pack(len(data)) + data)


async def _next(reader: asyncio.StreamReader) -> tuple[str, Any]:
    """(event, value) from our parent process, through a socket that nobody else has."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    event, value = pickle.loads(await reader.readexactly(length))  # nosec B301
    return event, value


if __name__ == "__main__":
    main()
