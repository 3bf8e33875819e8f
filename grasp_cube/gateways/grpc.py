"""`OpenPiInferenceService`: the gRPC stack that Astribot robots run today, in front of our scheduler and policies.

Life cycle: `GrpcGateway(service)`, `await start()`, `await stop()`, all on the event loop that runs the scheduler's
requests.

One request: bytes -> `Observation` (gRPC) -> `grpc_observation.read_observation` in the image pool -> the service, as
for every client -> a chunk -> the action or the chunk. What a peer's requests share is in `grpc_session`.

A peer keeps the policy that its first call found. Where another client has another one loaded in its place, the peer
is told (MODEL_NOT_LOADED) and goes on with the new one after Reset or Configure: its robot never follows two policies
in one episode.

Error policy: what is wrong with an observation comes back in the answer's `status` and `error_message`, and the
connection, or the stream, goes on. What has no such answer uses gRPC's own codes: a command that cannot be obeyed
or bytes that are no message INVALID_ARGUMENT, a wrong key UNAUTHENTICATED.
A Configure that fails says so in `ServiceStatus`, and from there on its peer gets MODEL_NOT_LOADED: it must not move
a robot by a policy that it did not ask for. Others keep the policy that is loaded. A traceback goes to the log.

Without a history on this wire, a policy that looks at several ticks gets the current one repeated.
"""

import asyncio
import importlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from env_client.openpi_grpc import openpi_inference_pb2 as pb2
from env_client.wire import Configure, ErrorCode, InvalidInput, WireError

from grasp_cube.gateways.grpc_access import KeyCheck, Unreadable, is_local, reader
from grasp_cube.gateways.grpc_observation import read_observation
from grasp_cube.gateways.grpc_session import PeerSession, Sessions, obey
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest
from grasp_cube.serving.served import ServedPolicy
from grasp_cube.serving.service import PolicyService

__all__ = ["MAX_MESSAGE", "GrpcGateway"]

logger = logging.getLogger(__name__)

# The largest message in either direction, in bytes; gRPC refuses a larger one before it is read.
MAX_MESSAGE = 100 * 1024 * 1024
# How long running calls may go on at shutdown, in seconds.
GRACE_S = 1.0
# The robots' clients ping each 10 s, also through a Configure of minutes; gRPC's default hangs up on them.
PING_INTERVAL_MS = 5000

SERVICE = "openpi.OpenPiInferenceService"
# Of our codes the statuses that say the same; every other one is ERROR.
STATUS = {
    ErrorCode.INVALID_INPUT: pb2.INVALID_INPUT,
    ErrorCode.NOT_READY: pb2.NOT_READY,
    ErrorCode.MODEL_NOT_LOADED: pb2.MODEL_NOT_LOADED,
}

# A grpc.aio.ServicerContext, which mypy cannot see.
Context = Any


class GrpcGateway:
    """Serves `OpenPiInferenceService` on a port of its own.

    `workers` calls run at the same time, streams included; more are answered RESOURCE_EXHAUSTED. Where the service
    has a key each call must carry it, as `authorization: Api-Key KEY` (or Bearer) in its metadata. `tls` is
    (private key, certificate chain), both PEM.
    """

    def __init__(
        self,
        service: PolicyService,
        *,
        workers: int = 10,
        host: str = "127.0.0.1",
        port: int = 50052,
        tls: tuple[bytes, bytes] | None = None,
    ):
        self.service = service
        self.workers = workers
        self.host = host
        # The port that was taken, after `start`; 0 asks for a free one.
        self.port = port
        self.tls = tls
        limits = service.limits
        # More than can be in use at a time, so that there is always one to forget.
        self.sessions = Sessions(max(limits.max_sessions, 2 * workers), max_rate=limits.max_rate)
        service.session_counts.append(self.sessions.active)
        self._stopping = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises `PolicyError` when the port cannot be taken."""
        # Else the first image of the first robot would pay for it.
        await self.service.images.run(lambda: importlib.import_module("cv2"))
        self._server = grpc.aio.server(
            interceptors=[KeyCheck(self.service.access)],
            maximum_concurrent_rpcs=self.workers,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS),
                # Two servers would share the port, and a robot would meet either.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, self._methods()),)
        )
        address = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        try:
            if self.tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials([self.tls])
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise PolicyError(
                f"{address} cannot be listened on for gRPC: is another server running (ss -tlnp | grep "
                f"{self.port})? Take another --grpc.port"
            ) from error
        await self._server.start()
        logger.info("gRPC: %s on %s:%d", SERVICE, self.host, self.port)

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """End: no new calls, open streams are told (UNAVAILABLE), running calls get `grace_s` seconds."""
        self._stopping.set()
        if self._server is not None:
            await self._server.stop(grace_s)

    def _methods(self) -> dict[str, grpc.RpcMethodHandler]:
        def unary(call: Any, request: Any, reply: Any) -> grpc.RpcMethodHandler:
            async def readable(message: Any, context: Context) -> Any:
                if isinstance(message, Unreadable):
                    await message.refuse(context)
                return await call(message, context)

            return grpc.unary_unary_rpc_method_handler(readable, reader(request), reply.SerializeToString)

        return {
            "Configure": unary(self._configure, pb2.PolicyConfig, pb2.ServiceStatus),
            "Predict": unary(self._predict, pb2.Observation, pb2.Action),
            "PredictChunk": unary(self._predict_chunk, pb2.Observation, pb2.ActionChunk),
            "StreamPredict": grpc.stream_stream_rpc_method_handler(
                self._stream_predict, reader(pb2.Observation), pb2.Action.SerializeToString
            ),
            "Control": unary(self._control, pb2.ControlCommand, pb2.ServiceStatus),
            "GetStatus": unary(self._get_status, pb2.Empty, pb2.ServiceStatus),
            "Reset": unary(self._reset, pb2.Empty, pb2.ServiceStatus),
        }

    # --------------------------------------------------------------------------------------- actions

    async def _predict(self, message: pb2.Observation, context: Context) -> pb2.Action:
        with self.sessions.use(context.peer()) as session:
            return await self._action(session, message)

    async def _stream_predict(
        self, messages: AsyncIterator[pb2.Observation], context: Context
    ) -> AsyncIterator[pb2.Action]:
        stopping = asyncio.ensure_future(self._stopping.wait())
        waits: list[asyncio.Future[Any]] = [stopping]
        observations = aiter(messages)
        try:
            with self.sessions.use(context.peer()) as session:
                while True:
                    read = asyncio.ensure_future(anext(observations, None))
                    waits[1:] = [read]
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    if not read.done():
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
                    message = read.result()
                    if message is None:
                        return
                    if isinstance(message, Unreadable):
                        await message.refuse(context)
                    yield await self._action(session, message)
        finally:
            # Also when the client leaves in the middle.
            for wait in waits:
                wait.cancel()

    async def _action(self, session: PeerSession, message: pb2.Observation) -> pb2.Action:
        try:
            async with session.lock:
                self._count(session)
                served = self._served(session)
                self._begin(session, message)
                prompt = message.prompt or session.prompt
                action = session.next_action(served, prompt, message.frame_index)
                if action is None:
                    chunk = await self._infer(session, served, message, prompt)
                    action = chunk[0]
                    session.keep(served, prompt, chunk[1:])
                number = session.gave(message.frame_index)
            return pb2.Action(values=action.tolist(), status=pb2.OK, server_frame_index=number)
        except Exception as error:
            status, sentence = self._told(error, session)
            return pb2.Action(status=status, error_message=sentence, server_frame_index=session.frames)

    async def _predict_chunk(self, message: pb2.Observation, context: Context) -> pb2.ActionChunk:
        with self.sessions.use(context.peer()) as session:
            try:
                async with session.lock:
                    self._count(session)
                    served = self._served(session)
                    self._begin(session, message)
                    # The robot follows this chunk now; the rest of another one would throw it back.
                    session.drop_chunk()
                    prompt = message.prompt or session.prompt
                    chunk = await self._infer(session, served, message, prompt)
                    number = session.gave(message.frame_index)
                return pb2.ActionChunk(
                    actions=[pb2.ActionStep(values=action) for action in chunk.tolist()],
                    chunk_size=chunk.shape[0],
                    action_dim=chunk.shape[1],
                    status=pb2.OK,
                    server_frame_index=number,
                )
            except Exception as error:
                status, sentence = self._told(error, session)
                return pb2.ActionChunk(
                    status=status, error_message=sentence, server_frame_index=session.frames
                )

    def _count(self, session: PeerSession) -> None:
        self.service.metrics.received("grpc")
        session.rate.take()

    def _served(self, session: PeerSession) -> ServedPolicy:
        """The policy that serves this peer. Raises `WireError` when there is none."""
        policies = self.service.policies
        if session.configuring:
            raise WireError(
                ErrorCode.NOT_READY, "the policy that Configure asked for is being loaded: ask again"
            )
        if session.refusal is not None:
            raise WireError(ErrorCode.MODEL_NOT_LOADED, session.refusal)
        current = policies.at(policies.default if session.slot is None else session.slot)
        session.served = session.served or current
        if session.served is None:
            if policies.loading:
                raise WireError(ErrorCode.NOT_READY, "a policy is being loaded: ask again")
            raise WireError(
                ErrorCode.MODEL_NOT_LOADED,
                "no policy is loaded: call Configure, or start the server with one",
            )
        if session.served.retired:
            raise WireError(
                ErrorCode.MODEL_NOT_LOADED,
                f"another client had {current.name if current else 'another policy'} loaded in place of "
                f"{session.served.name}: call Reset to go on with it, or Configure",
            )
        return session.served

    def _begin(self, session: PeerSession, message: pb2.Observation) -> None:
        if message.episode_id != session.episode:
            session.begin_episode(message.episode_id)

    async def _infer(
        self, session: PeerSession, served: ServedPolicy, message: pb2.Observation, prompt: str | None
    ) -> np.ndarray:
        """(horizon, action_dim) float32 for one observation. Raises `WireError`."""

        async def read(policy: Policy) -> PolicyRequest:
            [obs] = await self.service.images.run(lambda: read_observation(message, policy.spec))
            return PolicyRequest(obs, prompt=prompt)

        result, _ = await self.service.answer(served, read, client=session)
        if session.served is not served:
            raise WireError(ErrorCode.SUPERSEDED, "another policy was configured in the meantime")
        return result.actions

    # ------------------------------------------------------------------------------------- the others

    async def _configure(self, message: pb2.PolicyConfig, context: Context) -> pb2.ServiceStatus:
        with self.sessions.use(context.peer()) as session:
            session.configuring += 1
            try:
                said = await self._load(session, message, context)
            except Exception as error:
                status, sentence = self._told(error, session)
                session.refusal = f"the policy that this connection asked for was not loaded: {sentence}"
                said = f"{pb2.StatusCode.Name(status)}: {sentence}"
            else:
                session.refusal = None
                session.prompt = message.default_prompt or None
            finally:
                session.configuring -= 1
                session.begin_episode()
            return self._status(session, said)

    async def _load(self, session: PeerSession, message: pb2.PolicyConfig, context: Context) -> str:
        """Serve this peer by the policy that it names; without a checkpoint, `config_name` is a policy's name."""
        policies = self.service.policies
        slot = policies.default if session.slot is None else session.slot
        current = policies.at(slot)
        if not message.checkpoint_dir and not message.config_name and current is not None:
            # A prompt alone.
            session.slot, session.served = slot, current
            return f"serving {current.name}"
        if message.checkpoint_dir:
            local = is_local(context.peer(), context.invocation_metadata() or ())
            self.service.may_configure(local=local)
            wish = Configure(
                path=message.checkpoint_dir,
                config_name=message.config_name or None,
                device=message.device or None,
            )
        else:
            wish = Configure(name=message.config_name or None)
        session.slot, session.served = await policies.configure(wish, slot, lambda progress: None)
        return f"serving {session.served.name}"

    async def _control(self, message: pb2.ControlCommand, context: Context) -> pb2.ServiceStatus:
        with self.sessions.use(context.peer()) as session:
            # In order with the peer's other calls: the answer says that what follows is the new episode.
            async with session.lock:
                try:
                    said = obey(session, message)
                except InvalidInput as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            return self._status(session, said)

    async def _get_status(self, message: pb2.Empty, context: Context) -> pb2.ServiceStatus:
        with self.sessions.use(context.peer()) as session:
            return self._status(session)

    async def _reset(self, message: pb2.Empty, context: Context) -> pb2.ServiceStatus:
        return await self._control(pb2.ControlCommand(type=pb2.CMD_RESET), context)

    def _status(self, session: PeerSession, said: str | None = None) -> pb2.ServiceStatus:
        try:
            served: ServedPolicy | None = self._served(session)
            why = "ready"
        except WireError as error:
            served, why = None, error.message
        status = pb2.ServiceStatus(
            # One that left the memory comes back with the next observation.
            is_ready=served is not None,
            current_episode=session.episode,
            current_frame=session.frames,
            message=said or why,
            current_prompt=session.prompt or "",
        )
        if served is not None:
            status.model_name = served.name
        if served is not None and served.metadata:
            policy = served.metadata["policy"]
            status.action_horizon = policy["horizon"]
            status.action_dim = policy["action_dim"]
            status.current_prompt = session.prompt or policy["default_prompt"] or ""
            status.metadata_json = json.dumps(served.metadata, default=str)
        return status

    def _told(self, error: Exception, session: PeerSession) -> tuple[pb2.StatusCode, str]:
        """What a peer is told about a failure. Only what was written for clients leaves the server."""
        if isinstance(error, PolicyError):
            error = WireError(ErrorCode.MODEL_NOT_LOADED, str(error))
        if not isinstance(error, WireError):
            logger.error("answering failed", exc_info=error, extra={"peer": session.peer})
            error = WireError(ErrorCode.INTERNAL, "the server failed to answer; its log says why")
        self.service.metrics.failed(error.code)
        logger.debug(error.message, extra={"peer": session.peer, "code": error.code})
        status = STATUS.get(ErrorCode(error.code), pb2.ERROR) if error.code in ErrorCode else pb2.ERROR
        return status, error.message if status != pb2.ERROR else f"{error.code}: {error.message}"
