"""What the browsers get: pictures, rows of curves, status; each browser the newest that it can take.

A browser says when it has drawn an update, and gets the next one only then (two may be under way). Between two updates
there is nothing queued for it: pictures are the newest ones, and rows are those since its last update, out of
one history that all share. So a closed laptop lid, or a phone on a bad link, costs a few bytes and holds up nobody.

Everything here runs in the event loop of the door's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

__all__ = ["Live"]

# Rows that a browser which opens now finds in its curves: 20 s at 30 Hz.
HISTORY = 600
# Updates that a browser may owe an answer for.
_UNDER_WAY = 2
# A browser that does not answer a ping for so long is gone, seconds.
_HEARTBEAT = 15.0
_SENDING = 5.0


class Live:
    """The state that all browsers share, and the connections to them."""

    def __init__(
        self,
        command: Callable[[dict[str, Any]], None],
        watched: Callable[[bool], None] = lambda watched: None,
    ) -> None:
        """`command` gets what a browser sends; `watched` is told whether any browser is open, when that changes."""
        self._command, self._watched = command, watched
        # Parts that are sent whole when they change: {"run": …, "state": …, "status": …, "chunk": …}.
        self._parts: dict[str, tuple[int, Any]] = {}
        self._images: dict[str, tuple[int, bytes]] = {}
        self._rows: deque[list[Any]] = deque(maxlen=HISTORY)
        # Numbers of the newest change of anything, and of the row after the newest.
        self._changes = 0
        self._row_count = 0
        self._browsers: set[_Browser] = set()

    def put(self, name: str, value: Any) -> None:
        """A part's new value (plain values)."""
        self._changes += 1
        self._parts[name] = (self._changes, value)
        self._wake()

    def put_tick(self, row: list[Any], status: dict[str, Any], images: dict[str, bytes]) -> None:
        """A tick: its row of the curves, the status line, and JPEGs of cameras with a new picture."""
        self._rows.append(row)
        self._row_count += 1
        self._changes += 1
        self._parts["status"] = (self._changes, status)
        for camera, jpeg in images.items():
            self._images[camera] = (self._changes, jpeg)
        self._wake()

    def forget(self) -> None:
        """A new run begins."""
        self._parts.clear()
        self._images.clear()
        self._rows.clear()

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """One browser, from its connection to its end."""
        socket = web.WebSocketResponse(heartbeat=_HEARTBEAT, max_msg_size=16384)
        await socket.prepare(request)
        browser = _Browser(self, socket)
        self._browsers.add(browser)
        if len(self._browsers) == 1:
            self._watched(True)
        sender = asyncio.create_task(browser.send_updates())
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self._receive(browser, message.data)
        finally:
            self._browsers.discard(browser)
            if not self._browsers:
                self._watched(False)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sender
        return socket

    async def close(self) -> None:
        for browser in list(self._browsers):
            with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
                await asyncio.wait_for(browser.socket.close(code=WSCloseCode.GOING_AWAY), 1.0)

    def _receive(self, browser: _Browser, text: str) -> None:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        if "drawn" in message:
            browser.drew()
        elif isinstance(message.get("name"), str):
            self._command(message)

    def _wake(self) -> None:
        for browser in self._browsers:
            browser.changed.set()

    def news(self, since: int, row: int) -> tuple[dict[str, Any], list[bytes], int, int]:
        """What changed after change `since` and row number `row`: the update, its pictures, and both numbers now."""
        update: dict[str, Any] = {name: value for name, (at, value) in self._parts.items() if at > since}
        missing = min(self._row_count - row, len(self._rows))
        if missing > 0:
            update["rows"] = list(self._rows)[-missing:]
        fresh = {camera: jpeg for camera, (at, jpeg) in self._images.items() if at > since}
        update["images"] = list(fresh)
        return update, list(fresh.values()), self._changes, self._row_count


class _Browser:
    """One open page."""

    def __init__(self, live: Live, socket: web.WebSocketResponse) -> None:
        self.socket = socket
        self.changed = asyncio.Event()
        self.changed.set()
        self._live = live
        self._free = asyncio.Semaphore(_UNDER_WAY)
        self._owed = 0
        self._since = self._row = 0

    def drew(self) -> None:
        if self._owed > 0:
            self._owed -= 1
            self._free.release()

    async def send_updates(self) -> None:
        with contextlib.suppress(ConnectionError):
            while not self.socket.closed:
                await self._free.acquire()
                await self.changed.wait()
                self.changed.clear()
                update, images, self._since, self._row = self._live.news(self._since, self._row)
                self._owed += 1
                await self.socket.send_str(json.dumps(update, separators=(",", ":")))
                for jpeg in images:
                    await self.socket.send_bytes(jpeg)
