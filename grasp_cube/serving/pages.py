"""What plain HTTP requests at the policy server's port are answered with, and who is let on to the WebSocket.

/healthz and /readyz are for everybody; /metrics and /status need the key, where there is one, beyond this machine.
"""

import http
import json
import time
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import unquote

from env_client.wire import InvalidInput
from websockets.http11 import Request, Response

from grasp_cube.serving.access import is_loopback
from grasp_cube.serving.metrics import CONTENT_TYPE
from grasp_cube.serving.service import PolicyService
from grasp_cube.serving.session import Session
from grasp_cube.serving.websocket import Connection

__all__ = ["PROBES", "answer_http", "is_local", "metrics_page", "no_key", "probe", "status_page"]

# For everybody.
PROBES = ("/healthz", "/readyz")


def answer_http(
    service: PolicyService, sessions: Collection[Session], connection: Connection, request: Request
) -> Response | None:
    """The answer; None lets the request go on to the WebSocket handshake."""
    path = request.path.partition("?")[0]
    if path in PROBES:
        return probe(connection, path, service.not_ready)
    allowed = service.access.lets_in(request.headers.get_all("Authorization"))
    if path in ("/metrics", "/status") and (allowed or is_local(connection, request)):
        return _page(service, sessions, connection, path)
    if not allowed:
        return no_key(connection)
    if [value.lower() for value in request.headers.get_all("Upgrade")] != ["websocket"]:
        return connection.respond(
            http.HTTPStatus.UPGRADE_REQUIRED,
            "This is a policy server: connect by WebSocket. GET /healthz says whether it is alive.\n",
        )
    host = ", ".join(request.headers.get_all("Host"))
    if not service.access.lets_page(request.headers.get_all("Origin"), host):
        return connection.respond(
            http.HTTPStatus.FORBIDDEN,
            "a page of another site may not connect: give the server an --api-key, or name the site with --allow-origin\n",
        )
    try:
        service.policies.slot(unquote(path))
    except InvalidInput as error:
        return connection.respond(http.HTTPStatus.NOT_FOUND, f"{error.message}\n")
    if service.closing:
        return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{service.not_ready()}\n")
    full = service.refuse_full(len(sessions))
    if full is not None:
        return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{full}\n")
    return None


def is_local(connection: Connection, request: Request) -> bool:
    """Whether who sent this request sits on the server's own machine."""
    address = connection.remote_address
    headers = {name.lower(): value for name, value in request.headers.raw_items()}
    return is_loopback(address[0] if isinstance(address, tuple) else None, headers)


def _page(
    service: PolicyService, sessions: Collection[Session], connection: Connection, path: str
) -> Response:
    if path == "/metrics":
        return metrics_page(connection, service.metrics.render())
    clients = [_shown(session) for session in sessions]
    return status_page(connection, service.status() | {"clients": clients})


def probe(connection: Connection, path: str, not_ready: Callable[[], str | None]) -> Response:
    """The answer to one of `PROBES`. `not_ready` says why robots should not be sent here, None when they should."""
    why = not_ready() if path == "/readyz" else None
    status = http.HTTPStatus.OK if why is None else http.HTTPStatus.SERVICE_UNAVAILABLE
    return connection.respond(status, f"{why or 'OK'}\n")


def no_key(connection: Connection) -> Response:
    """The answer to who has none, or a wrong one."""
    return connection.respond(
        http.HTTPStatus.UNAUTHORIZED, "a valid key was expected in 'Authorization: Api-Key KEY'\n"
    )


def metrics_page(connection: Connection, metrics: bytes) -> Response:
    """/metrics, in Prometheus' text format."""
    return _typed(connection, metrics.decode(), CONTENT_TYPE)


def status_page(connection: Connection, status: dict[str, Any]) -> Response:
    """/status, from plain values."""
    return _typed(connection, json.dumps(status, indent=2) + "\n", "application/json")


def _typed(connection: Connection, text: str, kind: str) -> Response:
    response = connection.respond(http.HTTPStatus.OK, text)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = kind
    return response


def _shown(session: Session) -> dict[str, Any]:
    return {
        "session": session.number,
        "peer": session.peer,
        "policy": None if session.served is None else session.served.name,
        "seconds": round(time.monotonic() - session.opened, 1),
        "requests": session.requests,
        "chunks": session.chunks,
        "errors": session.errors,
    }
