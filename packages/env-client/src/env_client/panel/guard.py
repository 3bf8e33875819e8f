"""Who may pass the panel's door: three checks, each against one kind of attack.

Host     a name that an attacker's web site points at this machine (DNS rebinding) is no name of ours
Origin   a page of another site may not connect, and may not show ours in a frame
token    beyond loopback, whoever has no token has no business here; compared in constant time

The token comes once in the URL and is then a cookie of this browser (HttpOnly, SameSite=Lax: a link in a chat
opens the page, another site's page does not carry the cookie along).
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from env_client.own_host import is_own_host
from env_client.panel.config import PanelConfig

__all__ = ["Guard"]

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Frame-Options": "SAMEORIGIN",
}


class Guard:
    """An aiohttp middleware: `web.Application(middlewares=[guard.middleware])`."""

    def __init__(self, config: PanelConfig) -> None:
        self._token = config.token
        self._cookie = f"panel_{config.port}"
        self._names = frozenset({config.host.lower(), socket.getfqdn().lower()})

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            status, text = refusal
            return web.Response(status=status, text=text + "\n", headers=_HEADERS)
        if "token" in request.query and request.method == "GET" and request.path == "/":
            # Out of the address bar, so that the token is not shown around.
            answer: web.StreamResponse = web.Response(status=303, headers={"Location": "/"})
            answer.set_cookie(
                self._cookie, request.query["token"], httponly=True, samesite="Lax", max_age=30 * 86400
            )
        else:
            answer = await handler(request)
        if not answer.prepared:
            answer.headers.update(_HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        host = request.headers.get("Host", "")
        if not is_own_host(host, self._names):
            return 403, f"The panel does not answer to the name {host!r:.100}: open it by its address."
        origin = request.headers.get("Origin")
        if origin is not None and not _same(origin, host):
            return 403, "A page of another site may not use the panel."
        if self._token is not None and not self._has_token(request):
            return 401, "A token is needed: open the URL that the run printed."
        return None

    def _has_token(self, request: web.Request) -> bool:
        assert self._token is not None
        given = request.query.get("token") or request.cookies.get(self._cookie) or ""
        # What a header holds need not be UTF-8.
        return hmac.compare_digest(given.encode(errors="surrogateescape"), self._token.encode())


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
