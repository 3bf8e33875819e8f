"""The messages of the protocol as dataclasses: what a client may ask and what a server answers.

A request is read by `read_request`, which never raises anything but `InvalidInput`. A map without `op` is a
bare observation, as openpi's and the SO-101 clients send it; `{"reset": True}` is their reset.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from env_client.wire.errors import InvalidInput, WireError, shown

__all__ = [
    "PROTOCOL",
    "Configure",
    "Infer",
    "InferReply",
    "Progress",
    "Request",
    "Reset",
    "RtcPrefix",
    "SetPrompt",
    "Status",
    "error_reply",
    "read_request",
]

# Named in the metadata; the number grows when an old client could misread a new server.
PROTOCOL = "grasp-cube/1"

# More ticks of history than any policy looks at.
MAX_HISTORY = 32
# Actions that a real-time-chunking request may carry.
MAX_PREFIX = 1000
# Characters of a text that names something.
MAX_TEXT = 4096
# What a configure may say.
CONFIGURE_FIELDS = ("path", "type", "config_name", "prompt", "device", "name")


@dataclass(frozen=True)
class RtcPrefix:
    """The rest of the last chunk, for real-time chunking."""

    # (n, action_dim) float32 in robot units: the actions not yet executed from the capture tick on.
    prev: np.ndarray
    # Actions that will be executed before the reply arrives.
    delay: int
    # First index that the mask leaves free (H - s of the paper).
    mask_end: int


@dataclass(frozen=True)
class Infer:
    """A request for a chunk of actions. It carries all that the answer depends on."""

    # The observation of the current tick.
    obs: dict[str, Any]
    # Observations of the ticks before it, oldest first.
    history: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    rtc: RtcPrefix | None = None
    seq: int | None = None
    episode: int | None = None
    # The client's own clock, echoed and never interpreted.
    capture_time: Any = None
    # After so many ms in the server's queue the answer is of no use any more; None leaves it to the server.
    deadline_ms: float | None = None
    # An observation without envelope, answered without one; the session's memory serves it.
    bare: bool = False

    def to_wire(self) -> dict[str, Any]:
        if self.bare:
            return self.obs
        message: dict[str, Any] = {"op": "infer", "seq": self.seq, "episode": self.episode, "obs": self.obs}
        if self.history:
            message["history"] = list(self.history)
        if self.prompt is not None:
            message["prompt"] = self.prompt
        if self.rtc is not None:
            message["rtc"] = {"prev": self.rtc.prev, "delay": self.rtc.delay, "mask_end": self.rtc.mask_end}
        if self.capture_time is not None:
            message["capture_time"] = self.capture_time
        if self.deadline_ms is not None:
            message["deadline_ms"] = self.deadline_ms
        return message


@dataclass(frozen=True)
class Reset:
    """Forget everything of this session. Answered by `{"reset": True}`."""

    seq: int | None = None
    bare: bool = False


@dataclass(frozen=True)
class SetPrompt:
    """The prompt of this session for requests that name none."""

    prompt: str
    seq: int | None = None


@dataclass(frozen=True)
class Status:
    """A question after the server's state."""

    seq: int | None = None


@dataclass(frozen=True)
class Configure:
    """Load this policy and serve this connection by it, if the operator allows it.

    Answered by any number of `Progress`, then by {op: "configure", seq, policy, metadata} or an error.
    """

    # Folder of the checkpoint on the server: absolute, or below the server's root.
    path: str | None = None
    # Policy family, where the checkpoint does not say it.
    type: str | None = None
    # A training configuration's name, for checkpoints that need one.
    config_name: str | None = None
    # Used by requests that name no prompt.
    prompt: str | None = None
    # cpu, cuda, cuda:N or mps; None leaves it to the server.
    device: str | None = None
    # Under which name the policy is served; without a path, the name of a policy that the server has.
    name: str | None = None
    seq: int | None = None

    def to_wire(self) -> dict[str, Any]:
        given = {key: value for key in CONFIGURE_FIELDS if (value := getattr(self, key)) is not None}
        return {"op": "configure", "seq": self.seq} | given


@dataclass(frozen=True)
class Progress:
    """How far a load is that `Configure` asked for."""

    # queued | checking | loading | warming_up | ready
    stage: str
    # A sentence for people.
    text: str
    # 0..1, where it is known.
    fraction: float | None = None
    seq: int | None = None

    def to_wire(self) -> dict[str, Any]:
        message = {"op": "progress", "seq": self.seq, "stage": self.stage, "text": self.text}
        return message if self.fraction is None else message | {"fraction": self.fraction}

    @classmethod
    def from_wire(cls, message: dict[str, Any]) -> "Progress":
        fraction = message.get("fraction")
        return cls(
            str(message.get("stage")),
            str(message.get("text")),
            float(fraction) if isinstance(fraction, int | float) else None,
            message.get("seq"),
        )


Request = Infer | Reset | SetPrompt | Status | Configure


@dataclass(frozen=True)
class InferReply:
    """The answer to `Infer`."""

    # (horizon, action_dim) float32 in robot units.
    actions: np.ndarray
    chunk_id: int
    server_timing: dict[str, float]
    seq: int | None = None
    episode: int | None = None
    capture_time: Any = None

    def to_wire(self, *, bare: bool) -> dict[str, Any]:
        """`action` and `actions` are the same array: SO-101 clients read the first, openpi clients the second."""
        reply: dict[str, Any] = {
            "actions": self.actions,
            "action": self.actions,
            "server_timing": self.server_timing,
        }
        if bare:
            return reply | {"policy_timing": {"infer_ms": self.server_timing.get("infer_ms", 0.0)}}
        return reply | {
            "op": "infer",
            "seq": self.seq,
            "episode": self.episode,
            "chunk_id": self.chunk_id,
            "capture_time": self.capture_time,
        }


def error_reply(error: WireError, seq: int | None = None) -> dict[str, Any]:
    """The error map that an enveloped request is answered with."""
    reply: dict[str, Any] = {"op": "error", "seq": seq, "code": error.code, "message": error.message}
    if error.retry_after_ms is not None:
        reply["retry_after_ms"] = error.retry_after_ms
    return reply


def read_request(message: Any) -> Request:
    """The request in a decoded frame. Raises `InvalidInput`, with the offending part named."""
    if not isinstance(message, dict):
        raise InvalidInput(f"a frame that holds {_kind(message)}; a map was expected")
    if "op" not in message:
        if message.get("reset") is True and len(message) == 1:
            return Reset(bare=True)
        return Infer(obs=_observation(message, "the observation"), bare=True)
    op, seq = message["op"], _integer(message, "seq")
    match op:
        case "infer":
            return _read_infer(message, seq)
        case "reset":
            return Reset(seq=seq)
        case "set_prompt":
            prompt = _string(message, "prompt")
            if prompt is None:
                raise InvalidInput("set_prompt came without a prompt; a string was expected")
            return SetPrompt(prompt, seq=seq)
        case "status":
            return Status(seq=seq)
        case "configure":
            return _read_configure(message, seq)
    raise InvalidInput(f"the op {shown(op)}; one of infer, reset, set_prompt, status, configure was expected")


def _read_infer(message: dict, seq: int | None) -> Infer:
    history = message.get("history") or []
    if not isinstance(history, list) or len(history) > MAX_HISTORY:
        raise InvalidInput(
            f"history is {_kind(history)}; a list of at most {MAX_HISTORY} observations was expected"
        )
    return Infer(
        obs=_observation(message.get("obs"), "obs"),
        history=tuple(_observation(item, f"history[{index}]") for index, item in enumerate(history)),
        prompt=_string(message, "prompt"),
        rtc=_read_rtc(message.get("rtc")),
        seq=seq,
        episode=_integer(message, "episode"),
        capture_time=_echo(message.get("capture_time")),
        deadline_ms=_duration(message, "deadline_ms"),
    )


def _read_configure(message: dict, seq: int | None) -> Configure:
    unknown = sorted(str(key) for key in message if key not in (*CONFIGURE_FIELDS, "op", "seq"))
    if unknown:
        raise InvalidInput(
            f"configure came with {', '.join(unknown)[:200]}; {', '.join(CONFIGURE_FIELDS)} were expected"
        )
    texts = {key: _string(message, key) for key in CONFIGURE_FIELDS}
    for key, text in texts.items():
        if text is not None and (len(text) > MAX_TEXT or "\0" in text):
            raise InvalidInput(f"{key} is {len(text)} characters; a text of at most {MAX_TEXT} was expected")
    # An empty text is how some clients leave a field out.
    return Configure(**{key: text or None for key, text in texts.items()}, seq=seq)


def _read_rtc(value: Any) -> RtcPrefix | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidInput(f"rtc is {_kind(value)}; a map with prev, delay and mask_end was expected")
    prev = value.get("prev")
    if not isinstance(prev, np.ndarray) or prev.ndim != 2 or prev.dtype.kind != "f" or len(prev) > MAX_PREFIX:
        raise InvalidInput(
            f"rtc.prev is {_kind(prev)}; an (n, action_dim) float array of at most {MAX_PREFIX} rows was expected"
        )
    if not np.isfinite(prev).all():
        raise InvalidInput("rtc.prev holds values that are not finite")
    delay, mask_end = _integer(value, "delay"), _integer(value, "mask_end")
    if delay is None or mask_end is None or delay < 0 or mask_end < 0:
        raise InvalidInput(
            f"rtc has delay {delay} and mask_end {mask_end}; two numbers of steps were expected"
        )
    return RtcPrefix(prev.astype(np.float32, copy=False), delay, mask_end)


def _observation(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidInput(f"{where} is {_kind(value)}; a map with string keys was expected")
    if not value:
        raise InvalidInput(f"{where} is empty; images and states were expected")
    return value


def _integer(message: dict, key: str) -> int | None:
    value = message.get(key)
    if isinstance(value, np.integer):
        value = int(value)
    if value is None or (type(value) is int and abs(value) < 2**53):
        return value
    raise InvalidInput(f"{key} is {_kind(value)}; a whole number was expected")


def _string(message: dict, key: str) -> str | None:
    value = message.get(key)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, str):
        return value
    raise InvalidInput(f"{key} is {_kind(value)}; a string was expected")


def _duration(message: dict, key: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    if isinstance(value, int | float | np.number) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    raise InvalidInput(f"{key} is {_kind(value)}; a number of milliseconds above 0 was expected")


def _echo(value: Any) -> Any:
    """What is echoed must be small, or a request could double its weight."""
    if (
        value is None
        or isinstance(value, int | float | np.number)
        or (isinstance(value, str) and len(value) <= 100)
    ):
        return value
    raise InvalidInput(f"capture_time is {_kind(value)}; a number or a short string was expected")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, dict):
        return f"a map with the keys {shown(sorted(map(str, itertools.islice(value, 20))), 80)}"
    return f"{shown(value)} ({type(value).__name__})"
