"""Sockets only: accept, authenticate, decode, hand over, reply, close.

Life cycle: `PolicyServer(service)`, then `async with server.serving(sock)` until the caller leaves. Each connection
gets the metadata frame first and then answers in the dialect in which it asks.
Error policy: what a client sends wrongly is answered by name and the connection stays open; only a broken
WebSocket, a frame beyond `MAX_FRAME` or one that takes too long closes it. A traceback goes to the log, never to a
client.
"""

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from env_client.wire import (
    Configure,
    ErrorCode,
    Infer,
    InferReply,
    InvalidInput,
    Progress,
    Request,
    Reset,
    SetPrompt,
    Status,
    WireError,
    error_reply,
    pack,
    read_request,
    unpack,
)

from grasp_cube.policies.policy import Policy, PolicyRequest
from grasp_cube.serving.draining import Draining
from grasp_cube.serving.limits import RateLimit
from grasp_cube.serving.listener import Listener, listening
from grasp_cube.serving.pages import answer_http, is_local
from grasp_cube.serving.served import metadata_of
from grasp_cube.serving.service import PolicyService
from grasp_cube.serving.session import Session
from grasp_cube.serving.websocket import Connection, ConnectionClosed

__all__ = ["PolicyServer"]

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


class PolicyServer:
    """Serves the policies of a service to any number of clients."""

    def __init__(self, service: PolicyService):
        self.service = service
        self.sessions: set[Session] = set()
        # How its clients are sent elsewhere before it ends.
        self.draining = Draining()
        self._limits = service.limits.wire
        service.session_counts.append(lambda: len(self.sessions))

    @contextlib.asynccontextmanager
    async def serving(
        self, sock: socket.socket, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Listener]:
        """Listen on a bound socket until the block is left; then tell the clients (1001) and close."""
        # What a loaded model consists of stays: to look through it again and again would hold up requests.
        gc.freeze()
        limits = self.service.limits
        async with listening(
            sock,
            self._connection,
            lambda connection, request: answer_http(self.service, self.sessions, connection, request),
            max_bytes=max(MAX_FRAME, self._limits.max_bytes),
            max_connections=limits.max_connections,
            message_s=limits.message_s,
            tls=tls,
        ) as listener:
            yield listener

    # ----------------------------------------------------------------------------------- connections

    async def _connection(self, connection: Connection) -> None:
        asked = connection.request
        assert asked is not None
        session = Session(
            _peer(connection), RateLimit(self.service.limits.max_rate), is_local(connection, asked)
        )
        self.sessions.add(session)
        self.draining.join(session, connection)
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        try:
            if not await self._greet(connection, session, unquote(asked.path.partition("?")[0])):
                return
            logger.debug("connected", extra={"session": session.number, "peer": session.peer})
            async for frame in connection:
                session.requests += 1
                request = await self._read(connection, session, frame)
                if request is None or not self.draining.takes(session, request):
                    continue
                answer = self._answer(connection, session, request)
                if isinstance(request, Configure) or (isinstance(request, Infer) and not request.bare):
                    # Several may be in flight, so that a newer observation can replace a waiting one, and so that the
                    # policy that is there serves on while another one is loaded.
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
            logger.exception("the connection failed", extra={"session": session.number})
        finally:
            for task in tasks:
                task.cancel()
            self.sessions.discard(session)
            self.draining.leave(session)
            if session.served is not None:
                self.service.policies.release(session.served)
            logger.info(
                "%.0f s, %d requests, %d chunks, %d errors",
                time.monotonic() - session.opened,
                session.requests,
                session.chunks,
                session.errors,
                extra=_fields(session),
            )

    async def _greet(self, connection: Connection, session: Session, path: str) -> bool:
        """The first frame; False when there is no policy to greet with where there should be one."""
        policies = self.service.policies
        try:
            session.slot = policies.slot(path)
            session.served = await policies.greeted(session.slot)
        except WireError as error:
            session.errors += 1
            self.service.metrics.failed(error.code)
            # Existing clients wait for a map here, and raise a text.
            await connection.send(f"{error.code}: {error.message}")
            connection.close(1011, "the policy could not be loaded")
            return False
        served = session.served
        await connection.send(pack(metadata_of(None, {}, None)) if served is None else served.greeting)
        return True

    async def _read(
        self, connection: Connection, session: Session, frame: str | memoryview
    ) -> Request | None:
        """The request in a frame; None when it could not be read, which the client has been told."""
        message: Any = None
        try:
            if isinstance(frame, str):
                raise InvalidInput(f"a text frame of {len(frame)} characters; binary msgpack frames are read")
            session.rate.take()
            message, dialect = unpack(frame, self._limits)
            session.dialect = dialect or session.dialect
            request = read_request(message)
            session.bare = getattr(request, "bare", False)
            self.service.metrics.received(_OPERATIONS[type(request)])
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
                    reply = {"op": "status", "seq": request.seq} | self._status(session)
                case Configure():
                    reply = await self._configure(connection, session, request)
            await connection.send(pack(reply, session.dialect))
        except WireError as error:
            bare = isinstance(request, Infer) and request.bare
            await self._refuse(connection, session, error, request.seq, bare=bare)
        except ConnectionClosed:
            pass
        except Exception:
            logger.exception("answering failed", extra={"session": session.number, "seq": request.seq})
            failed = WireError(ErrorCode.INTERNAL, "the server failed to answer; its log says why")
            await self._refuse(connection, session, failed, request.seq, bare=session.bare)
        finally:
            self.draining.answered(session)

    async def _refuse(
        self, connection: Connection, session: Session, error: WireError, seq: int | None, *, bare: bool
    ) -> None:
        session.errors += 1
        self.service.metrics.failed(error.code)
        logger.debug(error.message, extra={"session": session.number, "seq": seq, "code": error.code})
        # Clients that exist raise a text frame as an error, and would take a map for a chunk.
        reply = f"{error.code}: {error.message}" if bare else pack(error_reply(error, seq))
        with contextlib.suppress(ConnectionClosed):
            await connection.send(reply)

    async def _infer(self, session: Session, request: Infer) -> dict[str, Any]:
        served = session.served
        if served is None:
            raise WireError(ErrorCode.MODEL_NOT_LOADED, self._why_nothing(session))

        async def read(_: Policy) -> PolicyRequest:
            obs, *history = await self.service.images.decoded((request.obs, *request.history))
            prompt = request.prompt or _own_prompt(obs) or session.prompt
            return PolicyRequest(obs, tuple(history), prompt, request.rtc)

        result, total_ms = await self.service.answer(
            served,
            read,
            client=session,
            replaceable=not request.bare and request.seq is not None,
            deadline_ms=request.deadline_ms,
        )
        if session.served is not served:
            # What comes after the answer to `configure` is of the new policy.
            raise WireError(ErrorCode.SUPERSEDED, "another policy was configured in the meantime")
        timing = {"queue_ms": result.queue_ms, "infer_ms": result.infer_ms, "batch_size": result.batch_size}
        if session.prev_total_ms is not None:
            timing["prev_total_ms"] = session.prev_total_ms
        session.prev_total_ms = total_ms
        session.chunks += 1
        logger.debug("chunk", extra={"session": session.number, "seq": request.seq})
        return InferReply(
            actions=result.actions,
            chunk_id=session.chunks,
            server_timing=timing,
            seq=request.seq,
            episode=request.episode,
            capture_time=request.capture_time,
        ).to_wire(bare=request.bare)

    def _why_nothing(self, session: Session) -> str:
        if self.service.policies.at(session.slot) is not None:
            # It was told of none when it connected; to serve it by this one now would be a surprise.
            return "a policy was loaded since this connection began: connect again to be served by it"
        return "no policy is loaded: configure one, or start the server with --policy.path"

    async def _configure(
        self, connection: Connection, session: Session, request: Configure
    ) -> dict[str, Any]:
        """Load what the client wishes, telling how far it is, and serve this session by it."""
        if request.path is not None:
            self.service.may_configure(local=session.local)
        if session.configuring:
            raise WireError(
                ErrorCode.NOT_READY, "the policy that was configured before is still being loaded"
            )
        told: asyncio.Queue[Progress | None] = asyncio.Queue()
        telling = asyncio.create_task(_tell(connection, session, request.seq, told))
        session.configuring = True
        try:
            slot, served = await self.service.policies.configure(request, session.slot, told.put_nowait)
        finally:
            session.configuring = False
            # What is still to be told comes before the answer.
            told.put_nowait(None)
            await telling
        before = session.served
        session.slot, session.served = slot, served
        self.service.policies.bind(served)
        if before is not None:
            self.service.policies.release(before)
        logger.info("configured", extra=_fields(session))
        return {
            "op": "configure",
            "seq": request.seq,
            "policy": served.metadata["policy"],
            "metadata": served.metadata,
        }

    def _status(self, session: Session) -> dict[str, Any]:
        """What the `status` op tells: the server's state and this session's."""
        served = session.served
        return self.service.status() | {
            "policy": None if served is None else served.metadata["policy"],
            "session": session.number,
            "prompt": session.prompt,
            "configuring": session.configuring,
        }


async def _tell(
    connection: Connection, session: Session, seq: int | None, told: asyncio.Queue[Progress | None]
) -> None:
    """Send what is told until None comes."""
    with contextlib.suppress(ConnectionClosed):
        while (progress := await told.get()) is not None:
            await connection.send(pack(replace(progress, seq=seq).to_wire(), session.dialect))


def _fields(session: Session) -> dict[str, Any]:
    return {
        "session": session.number,
        "peer": session.peer,
        "policy": None if session.served is None else session.served.name,
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
