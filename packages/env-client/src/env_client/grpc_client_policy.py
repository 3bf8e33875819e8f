"""A policy on an older gRPC server (`OpenPiInferenceService`), with the face of `WebsocketClientPolicy`.

Life cycle: the constructor waits for the server, with a visible message; `infer` is lock step; a lost connection
raises `ConnectionLost` once and is opened again by the next call. With the first request of an episode the server is
told to forget the one before (`Reset`). A request that failed is a failed request, never the end of an episode.

What this wire lacks: a history, a prefix for real-time chunking, and on servers that are not ours the description of
the policy (`spec` is None then). The state travels as one vector: the parts of `obs["states"]` in their order.
One thread at a time may call it, but for `close`.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from env_client.image_sender import CodecChoice
from env_client.websocket_client_policy import CONFIGURE_S, MESSAGE_EVERY_S, RETRY_S, ConnectionLost
from env_client.wire import (
    EncodedImage,
    ErrorCode,
    InvalidInput,
    PolicySpec,
    Progress,
    RemoteError,
    RtcPrefix,
    encode_image,
)
from env_client.wire.images import ImageCodec

__all__ = ["SCHEME", "GrpcClientPolicy"]

SCHEME = "grpc://"
SERVICE = "openpi.OpenPiInferenceService"
# The largest message in either direction, in bytes.
MAX_MESSAGE = 100 * 1024 * 1024
# How long a question about the server's state may take, in seconds.
STATUS_S = 10.0


class GrpcClientPolicy:
    """A remote policy at `host` (a name, an address, or `grpc://HOST`) and `port`.

    The arguments are those of `WebsocketClientPolicy`. `use_chunk=False` asks for one action at a time (`Predict`).
    Raises `ConnectionLost` when no server answers in time, `RemoteError` when it refuses.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 50052,
        api_key: str | None = None,
        *,
        connect_timeout_s: float | None = None,
        timeout_s: float = 30.0,
        first_timeout_s: float = 180.0,
        on_status: Callable[[str], None] | None = None,
        image_codec: CodecChoice = "raw",
        jpeg_quality: int = 90,
        use_chunk: bool = True,
    ):
        try:
            import grpc

            from env_client.openpi_grpc import openpi_inference_pb2 as messages
        except ImportError as error:
            raise InvalidInput(
                f"a gRPC server needs grpcio ({error}): install env-client with the extra astribot"
            ) from error
        self._grpc, self._messages = grpc, messages
        self.url = f"{SCHEME}{host.removeprefix(SCHEME)}:{port}"
        self.connect_timeout_s, self.timeout_s, self.first_timeout_s = (
            connect_timeout_s,
            timeout_s,
            first_timeout_s,
        )
        # These servers say nothing about their time, which a choice would have to be told from the link's.
        self.image_codec: ImageCodec = "raw" if image_codec == "auto" else image_codec
        self.jpeg_quality, self.use_chunk = jpeg_quality, use_chunk
        # What the server told of its policy; `spec` is None where it does not describe it.
        self.metadata: dict[str, Any] = {}
        self.spec: PolicySpec | None = None
        # (horizon, action_dim) as far as the server knows them, else 0.
        self.dimensions: tuple[int, int] = (0, 0)
        self._ready = False
        self._call_metadata = [("authorization", f"Api-Key {api_key}")] if api_key else []
        self._say = on_status or (lambda sentence: print(sentence, flush=True))
        self._channel: Any = None
        self._calls: dict[str, Any] = {}
        self._answered = False
        self._episode: int | None = None
        self._seq = 0
        self._closing = threading.Event()
        self.connect()

    # ------------------------------------------------------------------------------------- connection

    @property
    def connected(self) -> bool:
        return self._channel is not None

    @property
    def idle(self) -> bool:
        """Whether the server serves no policy yet and waits for `configure`."""
        return not self._ready

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells policies apart."""
        return self.spec, self.metadata.get("model_name"), self.dimensions

    @property
    def image_codecs(self) -> tuple[str, ...]:
        """How images may be compressed: the message names the encoding of each."""
        return ("jpeg", "png")

    def connect(self) -> None:
        """Wait for the server and ask for its state. Does nothing when connected."""
        if self._channel is not None:
            return
        started = time.monotonic()
        announced: float | None = None
        while True:
            if self._closing.is_set():
                raise ConnectionLost(f"the client of {self.url} was closed")
            try:
                self._open()
            except ConnectionLost as error:
                now = time.monotonic()
                if self.connect_timeout_s is not None and now - started >= self.connect_timeout_s:
                    raise ConnectionLost(
                        f"no policy server answered at {self.url} within {self.connect_timeout_s:g} s: is it running, is "
                        "the address right, is the port open in the firewall?"
                    ) from error
                if announced is None or now - announced >= MESSAGE_EVERY_S:
                    self._say(f"Waiting for a policy server at {self.url} … ({now - started:.0f} s)")
                    announced = now
                self._closing.wait(RETRY_S)
            else:
                if announced is not None:
                    self._say(f"The policy server at {self.url} is there.")
                return

    def _open(self) -> None:
        pb2 = self._messages
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            # A server knows its peers by their connection; channels of one process would share one.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._channel = self._grpc.insecure_channel(self.url.removeprefix(SCHEME), options)
        kinds = {
            "Configure": (pb2.PolicyConfig, pb2.ServiceStatus),
            "Predict": (pb2.Observation, pb2.Action),
            "PredictChunk": (pb2.Observation, pb2.ActionChunk),
            "GetStatus": (pb2.Empty, pb2.ServiceStatus),
            "Reset": (pb2.Empty, pb2.ServiceStatus),
        }
        self._calls = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}", request.SerializeToString, reply.FromString)
            for name, (request, reply) in kinds.items()
        }
        self._answered, self._episode = False, None
        self._adopt(self._call("GetStatus", pb2.Empty(), STATUS_S))

    def _adopt(self, status: Any) -> None:
        try:
            told = json.loads(status.metadata_json or "{}")
        except ValueError:
            told = {}
        self.metadata = (told if isinstance(told, dict) else {}) | {"model_name": status.model_name}
        described = self.metadata.get("policy")
        self.spec = PolicySpec.from_wire(described) if isinstance(described, dict) else None
        self.dimensions = (status.action_horizon, status.action_dim)
        self._ready = status.is_ready

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Close the connection. May be called twice, and from another thread to end a waiting call."""
        self._closing.set()
        self._drop()

    # --------------------------------------------------------------------------------------- requests

    def infer(
        self,
        obs: dict[str, Any],
        *,
        history: Sequence[dict[str, Any]] | None = None,
        prompt: str | None = None,
        episode: int | None = None,
        seq: int | None = None,
        rtc: RtcPrefix | None = None,
        capture_time: float | None = None,
        deadline_ms: float | None = None,
    ) -> dict[str, Any]:
        """The reply for one observation; `reply["actions"]` is the chunk, (horizon, action_dim) float32.

        `history`, `rtc` and `deadline_ms` have no place on this wire. Raises `RemoteError` when the server answers
        with an error, `ConnectionLost` when it is gone or late.
        """
        self.connect()
        pb2 = self._messages
        self._seq = self._seq + 1 if seq is None else seq
        if episode != self._episode:
            self._call("Reset", pb2.Empty(), STATUS_S)
            self._episode = episode
        message = pb2.Observation(
            state=_flat(obs).tolist(),
            images=[self._image(name, image) for name, image in (obs.get("images") or {}).items()],
            prompt=prompt or obs.get("prompt") or obs.get("task") or "",
            timestamp=time.time(),
            episode_id=episode or 0,
            frame_index=self._seq,
        )
        limit = self.timeout_s if self._answered else max(self.first_timeout_s, self.timeout_s)
        started = time.monotonic()
        reply = self._call("PredictChunk" if self.use_chunk else "Predict", message, limit)
        if reply.status != pb2.OK:
            raise self._refusal(reply)
        rows = [list(step.values) for step in reply.actions] if self.use_chunk else [list(reply.values)]
        if len({len(row) for row in rows}) != 1:
            raise RemoteError(
                ErrorCode.INTERNAL,
                f"{self.url} answered with rows of {sorted({len(r) for r in rows})} values",
            )
        self._answered = True
        chunk = np.array(rows, np.float32)
        timing = {"infer_ms": (time.monotonic() - started) * 1e3}
        return {
            "actions": chunk, "action": chunk, "seq": self._seq, "episode": episode, "capture_time": capture_time,
            "server_timing": timing,
        }  # fmt: skip

    def reset(self) -> None:
        """Tell the server that an episode begins."""
        self.connect()
        self._call("Reset", self._messages.Empty(), STATUS_S)

    def configure(
        self,
        *,
        path: str | None = None,
        type: str | None = None,
        config_name: str | None = None,
        prompt: str | None = None,
        device: str | None = None,
        name: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        timeout_s: float | None = None,
    ) -> PolicySpec | None:
        """Have the server load a policy; its spec, or None where the server does not describe it.

        Raises `RemoteError` with the server's reason.
        """
        self.connect()
        request = self._messages.PolicyConfig(
            config_name=config_name or "",
            checkpoint_dir=path or "",
            default_prompt=prompt or "",
            device=device or "",
        )
        self._say(f"{self.url} loads {path or config_name} …")
        status = self._call("Configure", request, timeout_s or CONFIGURE_S)
        self._adopt(status)
        if not status.is_ready:
            raise RemoteError(ErrorCode.MODEL_NOT_LOADED, status.message or "the server gave no reason")
        return self.spec

    def _image(self, name: str, image: np.ndarray | EncodedImage) -> Any:
        if isinstance(image, np.ndarray):
            image = encode_image(image, self.image_codec, self.jpeg_quality)
        data = bytes(image.data) if isinstance(image, EncodedImage) else image.tobytes()
        encoding = image.codec if isinstance(image, EncodedImage) else "rgb8"
        height, width = image.shape[:2]
        return self._messages.ImageData(
            camera_name=name, data=data, width=width, height=height, encoding=encoding
        )

    def _call(self, name: str, message: Any, limit_s: float) -> Any:
        codes = self._grpc.StatusCode
        try:
            return self._calls[name](message, timeout=limit_s, metadata=self._call_metadata)
        except (self._grpc.RpcError, ValueError) as error:
            code = error.code() if isinstance(error, self._grpc.RpcError) else codes.UNAVAILABLE
            said = error.details() if isinstance(error, self._grpc.RpcError) else str(error)
            if code in (codes.UNAUTHENTICATED, codes.PERMISSION_DENIED):
                raise RemoteError(ErrorCode.UNAUTHENTICATED, f"{self.url} refused the key: {said}") from error
            if code is codes.INVALID_ARGUMENT:
                raise RemoteError(ErrorCode.INVALID_INPUT, str(said)) from error
            if code is codes.RESOURCE_EXHAUSTED:
                raise RemoteError(ErrorCode.OVERLOADED, str(said)) from error
            self._drop()
            if code is codes.DEADLINE_EXCEEDED:
                raise ConnectionLost(f"{self.url} gave no answer within {limit_s:g} s") from error
            raise ConnectionLost(f"the connection to {self.url} was lost ({said})") from error

    def _refusal(self, reply: Any) -> RemoteError:
        pb2 = self._messages
        codes = {
            pb2.INVALID_INPUT: ErrorCode.INVALID_INPUT,
            pb2.NOT_READY: ErrorCode.NOT_READY,
            pb2.MODEL_NOT_LOADED: ErrorCode.MODEL_NOT_LOADED,
        }
        name = (
            pb2.StatusCode.Name(reply.status)
            if reply.status in pb2.StatusCode.values()
            else str(reply.status)
        )
        return RemoteError(
            codes.get(reply.status, ErrorCode.INTERNAL), f"{name}: {reply.error_message or 'no reason given'}"
        )


def _flat(obs: dict[str, Any]) -> np.ndarray:
    """(n,) float32: the parts of the state in their order."""
    states = obs.get("states")
    if isinstance(states, dict):
        parts = [np.ravel(np.asarray(part, np.float32)) for part in states.values()]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return np.ravel(np.asarray(obs.get("state", ()) if states is None else states, np.float32))
