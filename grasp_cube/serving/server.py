"""Sockets only: accept, authenticate, decode, hand over, reply, close.

Life cycle: `PolicyServer(policy, scheduler, config)`, then `async with server.serving(sock)` until the caller
leaves. Each connection gets the metadata frame first and then answers in the dialect in which it asks.
Error policy: what a client sends wrongly is answered by name and the connection stays open; only a broken
WebSocket or a frame beyond `MAX_FRAME` closes it. A traceback goes to the log, never to a client.
"""

import asyncio
import contextlib
import gc
import hmac
import http
import logging
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from env_client.wire import (
    DEFAULT_LIMITS,
    IMAGE_CODECS,
    PROTOCOL,
    Configure,
    EncodedImage,
    ErrorCode,
    Infer,
    InferReply,
    InvalidInput,
    Limits,
    Request,
    Reset,
    SetPrompt,
    Status,
    WireError,
    decode_image,
    error_reply,
    pack,
    read_request,
    unpack,
)
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from grasp_cube.policies.policy import Policy, PolicyRequest
from grasp_cube.serving.metrics import ServerMetrics
from grasp_cube.serving.scheduler import Scheduler
from grasp_cube.serving.session import Session
from grasp_cube.serving.websocket import Connection, ConnectionClosed, Listener, listening

__all__ = ["PolicyServer", "ServerConfig"]

logger = logging.getLogger(__name__)

# A frame up to this size is read and then refused by name if it is beyond the limits; a larger one closes the
# connection (1009) before it is read, because refusing politely costs memory. In bytes.
MAX_FRAME = 128 * 1024 * 1024
# Requests of one connection that are being answered at the same time.
MAX_IN_FLIGHT = 16
# What each request is counted as.
_OPERATIONS = {
    Infer: "infer",
    Reset: "reset",
    SetPrompt: "set_prompt",
    Status: "status",
    Configure: "configure",
}


@dataclass
class ServerConfig:
    """What the sockets need to know."""

    # Clients must send it as `Authorization: Api-Key KEY` (or Bearer); None lets everybody in.
    api_key: str | None = None
    limits: Limits = DEFAULT_LIMITS
    # Threads that decompress images.
    decode_threads: int = 2


class PolicyServer:
    """Serves one policy to any number of clients."""

    def __init__(self, policy: Policy, scheduler: Scheduler, config: ServerConfig | None = None):
        self.policy = policy
        self.scheduler = scheduler
        self.config = config or ServerConfig()
        self.sessions: set[Session] = set()
        self._decoders = ThreadPoolExecutor(self.config.decode_threads, thread_name_prefix="decode")
        self._metadata = pack(self.metadata())
        self.metrics = ServerMetrics(queue=lambda: scheduler.waiting, sessions=lambda: len(self.sessions))

    def metadata(self) -> dict[str, Any]:
        """The first frame of each connection: the checkpoint's own metadata under ours."""
        return dict(self.policy.metadata) | {
            "protocol": PROTOCOL,
            "policy": self.policy.spec.to_wire(),
            "image_codecs": list(IMAGE_CODECS),
        }

    @contextlib.asynccontextmanager
    async def serving(self, sock: socket.socket) -> AsyncIterator[Listener]:
        """Listen on a bound socket until the block is left; then tell the clients (1001) and close."""
        # What a loaded model consists of stays: to look through it again and again would hold up requests.
        gc.freeze()
        try:
            async with listening(sock, self._connection, self._http, max_bytes=MAX_FRAME) as listener:
                yield listener
        finally:
            self._decoders.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------ HTTP

    def _http(self, connection: Connection, request: HttpRequest) -> Response | None:
        """Plain HTTP questions are answered here; None goes on to the WebSocket handshake."""
        path = request.path.partition("?")[0]
        if path in ("/healthz", "/readyz"):
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.render().decode())
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return connection.respond(
                http.HTTPStatus.UPGRADE_REQUIRED,
                "This is a policy server: connect by WebSocket. GET /healthz says whether it is alive.\n",
            )
        if not self._authorized(request):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "a valid key was expected in 'Authorization: Api-Key KEY'\n"
            )
        return None

    def _authorized(self, request: HttpRequest) -> bool:
        if self.config.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        # Compared in constant time, and always compared, so that the time says nothing about the key.
        equal = hmac.compare_digest(key.strip().encode(), self.config.api_key.encode())
        return equal and scheme.lower() in ("api-key", "bearer")

    # ----------------------------------------------------------------------------------- connections

    async def _connection(self, connection: Connection) -> None:
        session = Session(_peer(connection))
        self.sessions.add(session)
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        logger.info("session %d: %s connected", session.number, session.peer)
        try:
            await connection.send(self._metadata)
            async for frame in connection:
                session.requests += 1
                request = await self._read(connection, session, frame)
                if request is None:
                    continue
                answer = self._answer(connection, session, request)
                if isinstance(request, Infer) and not request.bare:
                    # Several may be in flight, so that a newer observation can replace a waiting one.
                    while len(tasks) >= MAX_IN_FLIGHT:
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    # Begun at once: a raw observation is in the scheduler's queue before the loop turns again.
                    task = asyncio.Task(answer, loop=loop, eager_start=True)
                    if not task.done():
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                else:
                    await answer
        except ConnectionClosed:
            pass
        except Exception:
            logger.exception("session %d: the connection failed", session.number)
        finally:
            for task in tasks:
                task.cancel()
            self.sessions.discard(session)
            logger.info(
                "session %d: %s left after %.0f s, %d requests, %d errors",
                session.number,
                session.peer,
                time.monotonic() - session.opened,
                session.requests,
                session.errors,
            )

    async def _read(
        self, connection: Connection, session: Session, frame: str | memoryview
    ) -> Request | None:
        """The request in a frame; None when it could not be read, which the client has been told."""
        message: Any = None
        try:
            if isinstance(frame, str):
                raise InvalidInput(f"a text frame of {len(frame)} characters; binary msgpack frames are read")
            message, dialect = unpack(frame, self.config.limits)
            session.dialect = dialect or session.dialect
            request = read_request(message)
            session.bare = getattr(request, "bare", False)
            self.metrics.received(_OPERATIONS[type(request)])
            return request
        except WireError as error:
            seq = None
            if isinstance(message, dict) and "op" in message:
                session.bare = False
                seq = message.get("seq") if isinstance(message.get("seq"), int) else None
            await self._refuse(connection, session, error, seq, bare=session.bare)
            return None

    async def _answer(self, connection: Connection, session: Session, request: Request) -> None:
        """Answer one request, whatever happens inside."""
        try:
            match request:
                case Infer():
                    reply = await self._infer(session, request)
                case Reset():
                    session.reset()
                    reply = {"reset": True} if request.seq is None else {"reset": True, "seq": request.seq}
                case SetPrompt():
                    session.prompt = request.prompt
                    reply = {"op": "set_prompt", "seq": request.seq, "prompt": request.prompt}
                case Status():
                    reply = {"op": "status", "seq": request.seq} | self.status()
                case Configure():
                    raise WireError(
                        ErrorCode.INVALID_INPUT,
                        "this server was started for one checkpoint and cannot be configured: restart it with "
                        "--policy.path",
                    )
            await connection.send(pack(reply, session.dialect))
        except WireError as error:
            bare = isinstance(request, Infer) and request.bare
            await self._refuse(connection, session, error, request.seq, bare=bare)
        except ConnectionClosed:
            pass
        except Exception:
            logger.exception("session %d, seq %s: answering failed", session.number, request.seq)
            failed = WireError(ErrorCode.INTERNAL, "the server failed to answer; its log says why")
            await self._refuse(connection, session, failed, request.seq, bare=session.bare)

    async def _refuse(
        self, connection: Connection, session: Session, error: WireError, seq: int | None, *, bare: bool
    ) -> None:
        session.errors += 1
        self.metrics.failed(error.code)
        logger.debug("session %d, seq %s: %s: %s", session.number, seq, error.code, error.message)
        # Clients that exist raise a text frame as an error, and would take a map for a chunk.
        reply = f"{error.code}: {error.message}" if bare else pack(error_reply(error, seq))
        with contextlib.suppress(ConnectionClosed):
            await connection.send(reply)

    async def _infer(self, session: Session, request: Infer) -> dict[str, Any]:
        started = time.perf_counter()
        obs, history = await self._decoded(request)
        prompt = request.prompt or _own_prompt(obs) or session.prompt
        asked = PolicyRequest(obs, history, prompt, request.rtc)
        group = self.policy.check(asked)
        result = await self.scheduler.submit(
            self.policy,
            asked,
            group,
            client=session,
            replaceable=not request.bare and request.seq is not None,
        )
        timing = {"queue_ms": result.queue_ms, "infer_ms": result.infer_ms, "batch_size": result.batch_size}
        if session.prev_total_ms is not None:
            timing["prev_total_ms"] = session.prev_total_ms
        session.prev_total_ms = (time.perf_counter() - started) * 1e3
        self.metrics.answered(
            queue_ms=result.queue_ms,
            infer_ms=result.infer_ms,
            total_ms=session.prev_total_ms,
            batch_size=result.batch_size,
        )
        session.chunks += 1
        return InferReply(
            actions=result.actions,
            chunk_id=session.chunks,
            server_timing=timing,
            seq=request.seq,
            episode=request.episode,
            capture_time=request.capture_time,
        ).to_wire(bare=request.bare)

    async def _decoded(self, request: Infer) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        """The observation and its history with every compressed image decoded, off the event loop."""
        observations = (request.obs, *request.history)
        encoded: list[EncodedImage] = []
        for item in observations:
            _collect_images(item, encoded)
        if encoded:
            # Each by itself, so that two cameras are decoded by two threads.
            decode = asyncio.get_running_loop().run_in_executor
            arrays = await asyncio.gather(*(decode(self._decoders, decode_image, image) for image in encoded))
            decoded = dict(zip(map(id, encoded), arrays, strict=True))
            observations = tuple(_with_images(item, decoded) for item in observations)
        return observations[0], observations[1:]

    def status(self) -> dict[str, Any]:
        """What the `status` op tells."""
        return {
            "ready": True,
            "policy": self.policy.spec.to_wire(),
            "sessions": len(self.sessions),
            "queue": self.scheduler.waiting,
            "running": self.scheduler.running,
        }


def _peer(connection: Connection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _own_prompt(obs: dict[str, Any]) -> str | None:
    """The prompt inside an observation; `prompt` wins over `task`."""
    for key in ("prompt", "task"):
        value = obs.get(key)
        if isinstance(value, str) and value:
            return value
    return None


def _collect_images(value: Any, found: list[EncodedImage]) -> None:
    """Every image that is still compressed. Runs on the event loop for each observation, so it is plain."""
    if isinstance(value, EncodedImage):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect_images(item, found)


def _with_images(value: Any, decoded: dict[int, np.ndarray]) -> Any:
    if isinstance(value, dict):
        return {key: _with_images(item, decoded) for key, item in value.items()}
    return decoded[id(value)] if isinstance(value, EncodedImage) else value
