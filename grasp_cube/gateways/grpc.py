"""`OpenPiInferenceService`: the gRPC stack that Astribot robots run today, in front of our scheduler and policy.

Life cycle: `GrpcGateway(...)`, `await start()`, `await stop()`, all on the event loop that runs the scheduler's
requests. The policy is asked for with each request, so that it may be swapped at any time.

One request: bytes -> `Observation` (gRPC) -> `grpc_observation.read_observation` and `policy.check` in the pool ->
`scheduler.submit` -> a chunk -> the action or the chunk. What a peer's requests share is in `grpc_session`.

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
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from env_client.wire import ErrorCode, InvalidInput, WireError

from grasp_cube.gateways import openpi_inference_pb2 as pb2
from grasp_cube.gateways.grpc_access import KeyCheck, Unreadable, is_local, reader
from grasp_cube.gateways.grpc_observation import read_observation
from grasp_cube.gateways.grpc_session import MAX_SESSIONS, PeerSession, Sessions
from grasp_cube.policies.policy import Policy, PolicyError, PolicyRequest
from grasp_cube.serving.scheduler import Scheduler

__all__ = ["MAX_MESSAGE", "GrpcGateway"]

logger = logging.getLogger(__name__)

# The largest message in either direction, in bytes; gRPC refuses a larger one before it is read.
MAX_MESSAGE = 100 * 1024 * 1024
# Threads that decompress images.
DECODE_THREADS = 2
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

Configure = Callable[[dict[str, str]], Awaitable[str | None]]
# A grpc.aio.ServicerContext, which mypy cannot see.
Context = Any


class GrpcGateway:
    """Serves `OpenPiInferenceService` on a port of its own.

    `policy_source()` is the policy that serves, or None; `loading()` says whether one is on its way. `configure`
    gets the filled fields of a PolicyConfig (config_name, checkpoint_dir, default_prompt, device), returns when
    the policy serves, with a sentence about it or None, and raises `WireError` or `PolicyError` with the reason
    when it does not; without `configure` the server refuses. `workers` calls run at the same time, streams
    included; more are answered RESOURCE_EXHAUSTED. With an `api_key` each call must carry it, as
    `authorization: Api-Key KEY` (or Bearer) in its metadata; without one, only peers on this machine may configure,
    unless `remote_configure`. `tls` is (private key, certificate chain), both PEM.
    """

    def __init__(
        self,
        policy_source: Callable[[], Policy | None],
        scheduler: Scheduler,
        *,
        configure: Configure | None = None,
        workers: int = 10,
        host: str = "127.0.0.1",
        port: int = 50052,
        loading: Callable[[], bool] = lambda: False,
        api_key: str | None = None,
        remote_configure: bool = False,
        tls: tuple[bytes, bytes] | None = None,
    ):
        self.policy_source = policy_source
        self.scheduler = scheduler
        self.configure = configure
        self.workers = workers
        self.host = host
        # The port that was taken, after `start`; 0 asks for a free one.
        self.port = port
        self.loading = loading
        self.api_key = api_key
        self.remote_configure = remote_configure
        self.tls = tls
        # More than can be in use at a time, so that there is always one to forget.
        self.sessions = Sessions(max(MAX_SESSIONS, 2 * workers))
        self._stopping = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._decoders = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="grpc-decode")
        self._loads: set[asyncio.Future[Any]] = set()

    async def start(self) -> None:
        """Listen. Raises `PolicyError` when the port cannot be taken."""
        # Else the first image of the first robot would pay for it.
        await asyncio.get_running_loop().run_in_executor(self._decoders, importlib.import_module, "cv2")
        self._server = grpc.aio.server(
            interceptors=[KeyCheck(self.api_key)] if self.api_key is not None else [],
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
        self._decoders.shutdown(wait=False, cancel_futures=True)

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
                policy = self._policy(session)
                self._begin(session, message)
                prompt = message.prompt or session.prompt
                action = session.next_action(policy, prompt, message.frame_index)
                if action is None:
                    chunk = await self._infer(session, policy, message, prompt)
                    action = chunk[0]
                    session.keep(policy, prompt, chunk[1:])
                number = session.gave(message.frame_index)
            return pb2.Action(values=action.tolist(), status=pb2.OK, server_frame_index=number)
        except Exception as error:
            status, sentence = _told(error, session)
            return pb2.Action(status=status, error_message=sentence, server_frame_index=session.frames)

    async def _predict_chunk(self, message: pb2.Observation, context: Context) -> pb2.ActionChunk:
        with self.sessions.use(context.peer()) as session:
            try:
                async with session.lock:
                    policy = self._policy(session)
                    self._begin(session, message)
                    # The robot follows this chunk now; the rest of another one would throw it back.
                    session.drop_chunk()
                    prompt = message.prompt or session.prompt
                    chunk = await self._infer(session, policy, message, prompt)
                    number = session.gave(message.frame_index)
                return pb2.ActionChunk(
                    actions=[pb2.ActionStep(values=action) for action in chunk.tolist()],
                    chunk_size=chunk.shape[0],
                    action_dim=chunk.shape[1],
                    status=pb2.OK,
                    server_frame_index=number,
                )
            except Exception as error:
                status, sentence = _told(error, session)
                return pb2.ActionChunk(
                    status=status, error_message=sentence, server_frame_index=session.frames
                )

    def _policy(self, session: PeerSession) -> Policy:
        """The policy that serves this peer. Raises `WireError` when there is none."""
        if session.configuring:
            raise WireError(
                ErrorCode.NOT_READY, "the policy that Configure asked for is being loaded: ask again"
            )
        if session.refusal is not None:
            raise WireError(ErrorCode.MODEL_NOT_LOADED, session.refusal)
        policy = self.policy_source()
        if policy is not None:
            return policy
        if self.loading():
            raise WireError(ErrorCode.NOT_READY, "a policy is being loaded: ask again")
        raise WireError(
            ErrorCode.MODEL_NOT_LOADED, "no policy is loaded: call Configure, or start the server with one"
        )

    def _begin(self, session: PeerSession, message: pb2.Observation) -> None:
        if message.episode_id != session.episode:
            session.begin_episode(message.episode_id)

    async def _infer(
        self, session: PeerSession, policy: Policy, message: pb2.Observation, prompt: str | None
    ) -> np.ndarray:
        """(horizon, action_dim) float32 for one observation. Raises `WireError`."""

        def prepare() -> tuple[PolicyRequest, Any]:
            request = PolicyRequest(read_observation(message, policy.spec), prompt=prompt)
            return request, policy.check(request)

        request, group = await asyncio.get_running_loop().run_in_executor(self._decoders, prepare)
        result = await self.scheduler.submit(policy, request, group, client=session, replaceable=False)
        return result.actions

    # ------------------------------------------------------------------------------------- the others

    async def _configure(self, message: pb2.PolicyConfig, context: Context) -> pb2.ServiceStatus:
        with self.sessions.use(context.peer()) as session:
            session.configuring += 1
            try:
                said = await self._load(message, context)
            except Exception as error:
                status, sentence = _told(error, session)
                session.refusal = f"the policy that this connection asked for was not loaded: {sentence}"
                said = f"{pb2.StatusCode.Name(status)}: {sentence}"
            else:
                session.refusal = None
                session.prompt = message.default_prompt or None
            finally:
                session.configuring -= 1
                session.begin_episode()
            return self._status(session, said)

    async def _load(self, message: pb2.PolicyConfig, context: Context) -> str:
        if self.configure is None:
            raise WireError(
                ErrorCode.INVALID_INPUT,
                "this server was started for one checkpoint and cannot be configured: leave the configuration out "
                "of the client, or restart the server without a checkpoint",
            )
        if self.api_key is None and not self.remote_configure and not is_local(context.peer()):
            raise WireError(
                ErrorCode.UNAUTHENTICATED,
                "without a key only clients on the server's own machine may configure it: give the server an API key",
            )
        options = {field.name: value for field, value in message.ListFields()}
        # A client that gives up must not leave half a policy: the load goes on, and the next Configure finds it.
        load = asyncio.ensure_future(self.configure(options))
        self._loads.add(load)
        load.add_done_callback(self._loaded)
        return await asyncio.shield(load) or f"loaded {options.get('checkpoint_dir', 'a policy')}"

    def _loaded(self, load: asyncio.Future[Any]) -> None:
        self._loads.discard(load)
        if not load.cancelled() and load.exception() is not None:
            logger.warning("gRPC: Configure failed: %s", load.exception())

    async def _control(self, message: pb2.ControlCommand, context: Context) -> pb2.ServiceStatus:
        with self.sessions.use(context.peer()) as session:
            # In order with the peer's other calls: the answer says that what follows is the new episode.
            async with session.lock:
                try:
                    said = _obey(session, message)
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
            policy: Policy | None = self._policy(session)
            why = "ready"
        except WireError as error:
            policy, why = None, error.message
        status = pb2.ServiceStatus(
            is_ready=policy is not None,
            current_episode=session.episode,
            current_frame=session.frames,
            message=said or why,
            current_prompt=session.prompt or "",
        )
        if policy is not None:
            metadata = dict(policy.metadata)
            status.model_name = str(metadata.get("name") or policy.spec.type)
            status.action_horizon = policy.spec.horizon
            status.action_dim = policy.spec.action_dim
            status.current_prompt = session.prompt or policy.spec.default_prompt or ""
            status.metadata_json = json.dumps(metadata | {"policy": policy.spec.to_wire()}, default=str)
        return status


def _obey(session: PeerSession, command: pb2.ControlCommand) -> str:
    """Carry a command out; what is said about it. Raises `InvalidInput`."""
    match command.type:
        case pb2.CMD_RESET:
            session.begin_episode()
            return "reset"
        case pb2.CMD_SET_EPISODE:
            text = command.params.get("episode", "")
            try:
                episode = int(text)
                if not -(2**31) <= episode < 2**31:
                    raise ValueError
            except ValueError:
                raise InvalidInput(
                    f"CMD_SET_EPISODE with episode={text!r:.40}; a 32-bit integer was expected"
                ) from None
            session.begin_episode(episode)
            return f"episode {episode}"
        case pb2.CMD_SET_PROMPT:
            if "prompt" not in command.params:
                raise InvalidInput("CMD_SET_PROMPT without the parameter 'prompt'")
            session.prompt = command.params["prompt"] or None
            return f"prompt {session.prompt!r}" if session.prompt else "the policy's default prompt"
        case other:
            raise InvalidInput(
                f"the command {other}; CMD_RESET, CMD_SET_EPISODE or CMD_SET_PROMPT was expected"
            )


def _told(error: Exception, session: PeerSession) -> tuple[pb2.StatusCode, str]:
    """What a peer is told about a failure. Only what was written for clients leaves the server."""
    if isinstance(error, WireError):
        status = STATUS.get(ErrorCode(error.code), pb2.ERROR) if error.code in ErrorCode else pb2.ERROR
        return status, error.message if status != pb2.ERROR else f"{error.code}: {error.message}"
    if isinstance(error, PolicyError):
        return pb2.MODEL_NOT_LOADED, str(error)
    logger.error("gRPC, %s: answering failed", session.peer, exc_info=error)
    return pb2.ERROR, "the server failed to answer; its log says why"
