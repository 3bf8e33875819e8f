"""The panel's HTTP: the page, the live data, and the way to viser, which stays on a loopback port behind it.

    /            the page             /live      WebSocket: updates out, commands in
    /panel.css   /panel.js            /scene/    viser's page and its WebSocket

Everything passes the guard first. viser itself takes any page's connection and has no password; what it serves is
a picture of the arm, nothing that steers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import WSMsgType, web

from env_client.panel.config import PanelConfig
from env_client.panel.guard import Guard
from env_client.panel.live import Live

__all__ = ["make_app"]

_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/panel.css": "panel.css", "/panel.js": "panel.js"}
_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)


def make_app(
    config: PanelConfig, live: Live, scene_port: Callable[[], Awaitable[int | str]]
) -> web.Application:
    """The application; `scene_port` gives viser's port, or why there is no 3D view."""
    app = web.Application(middlewares=[Guard(config).middleware])
    for path in _FILES:
        app.router.add_get(path, _file)
    app.router.add_get("/live", live.serve)
    app.router.add_get("/scene/{path:.*}", _Scene(scene_port).handle)
    return app


async def _file(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(_PAGE / _FILES[request.path], headers={"Content-Security-Policy": _POLICY})


class _Scene:
    """Hands requests and WebSocket messages through to viser and back."""

    def __init__(self, port: Callable[[], Awaitable[int | str]]) -> None:
        self._port = port

    async def handle(self, request: web.Request) -> web.StreamResponse:
        port = await self._port()
        if isinstance(port, str):
            return web.Response(status=404, text=f"There is no 3D view: {port}.\n")
        base = f"http://127.0.0.1:{port}/"
        try:
            async with aiohttp.ClientSession(auto_decompress=False) as session:
                if request.headers.get("Upgrade", "").lower() == "websocket":
                    return await self._socket(base, request, session)
                return await self._fetch(base, request, session)
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=f"the 3D view is not there: {error}\n")

    async def _fetch(self, base: str, request: web.Request, session: aiohttp.ClientSession) -> web.Response:
        wanted = {"Accept-Encoding": request.headers.get("Accept-Encoding", "")}
        async with session.get(base + request.match_info["path"], headers=wanted) as answer:
            kept = {
                name: answer.headers[name]
                for name in ("Content-Type", "Content-Encoding")
                if name in answer.headers
            }
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    async def _socket(
        self, base: str, request: web.Request, session: aiohttp.ClientSession
    ) -> web.WebSocketResponse:
        # viser's version travels as the subprotocol.
        protocols = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p]
        async with session.ws_connect(base, protocols=protocols, max_msg_size=0) as inner:
            outer = web.WebSocketResponse(
                protocols=[inner.protocol] if inner.protocol else [], max_msg_size=0
            )
            await outer.prepare(request)
            ways = [asyncio.create_task(_pass_on(outer, inner)), asyncio.create_task(_pass_on(inner, outer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                with contextlib.suppress(ConnectionError):
                    await outer.close()
            return outer


async def _pass_on(
    source: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
    target: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
) -> None:
    # `send_*` waits while the target cannot take more, so nothing piles up here for a browser that sleeps.
    async for message in source:
        if message.type is WSMsgType.BINARY:
            await target.send_bytes(message.data)
        elif message.type is WSMsgType.TEXT:
            await target.send_str(message.data)
