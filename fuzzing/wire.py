"""Targets of the wire: messages, frames, images."""

import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from env_client.answers import read_answer, read_metadata
from env_client.wire import (
    CameraSpec,
    Configure,
    Dialect,
    EncodedImage,
    Infer,
    InvalidInput,
    Limits,
    PolicySpec,
    Progress,
    RemoteError,
    StateSpec,
    WireError,
    decode_image,
    encode_image,
    error_reply,
    pack,
    read_request,
    unpack,
)
from env_client.wire.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Control,
    FrameError,
    FrameReader,
    close_payload,
    frame_header,
    read_close,
)
from env_client.wire.images import MAX_IMAGE_PIXELS, image_size

from grasp_cube.policies.embodiment import load_embodiment
from grasp_cube.policies.observation import ObservationReader
from grasp_cube.policies.policy import PolicyRequest

__all__ = ["frames", "image", "message", "refusal", "seeds_of"]

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "wire" / "recorded"
# What a refusal may weigh: a sentence, whatever it refuses.
MAX_SENTENCE = 2_000
# Roomier than the product's, because what came in one dialect may be written longer in the other.
ROOMY = Limits(max_depth=20, max_nodes=60_000)
CAMERAS = tuple(CameraSpec(name, 24, 32) for name in ("front", "wrist"))
STATES = (StateSpec("arm", 6),)
READERS = (
    ObservationReader(CAMERAS, STATES, n_obs_steps=2),
    ObservationReader(
        (CameraSpec("cam_high", 24, 32, "pad"),),
        (StateSpec("state", 14),),
        embodiment=load_embodiment("aloha"),
    ),
)
# Larger images than this are left to the target `image`: decoding them says nothing about messages.
MAX_PIXELS = 100_000


def refusal(error: WireError) -> None:
    """What a client is told fits into a frame of its own, whatever it sent."""
    assert len(error.message) < MAX_SENTENCE, f"a sentence of {len(error.message)} characters"
    pack(error_reply(error))


def message(data: bytes) -> None:
    """One frame, read as a request by a server and as an answer by a client."""
    _read_as_client(data)
    try:
        value, dialect = unpack(data)
    except InvalidInput as error:
        refusal(error)
        return
    _same_as_msgpack(data, value, dialect)
    packed = pack(value, dialect or Dialect.OPENPI)
    again, _ = unpack(packed, ROOMY)
    assert pack(again, dialect or Dialect.OPENPI) == packed, "what was read is not what is written"
    try:
        request = read_request(value)
    except InvalidInput as error:
        refusal(error)
        return
    if isinstance(request, Infer | Configure):
        assert type(read_request(unpack(pack(request.to_wire()), ROOMY)[0])) is type(request)
    if isinstance(request, Infer):
        _observe(request)


def _same_as_msgpack(data: bytes, value: Any, dialect: Dialect | None) -> None:
    """A frame without arrays and images is what the msgpack package reads from it."""
    if dialect is None and b"__image__" not in data:
        theirs = msgpack.unpackb(data, strict_map_key=False)
        assert repr(value) == repr(theirs), "msgpack reads something else"


def _read_as_client(data: bytes) -> None:
    """Whatever a server says."""
    view = memoryview(data)
    for read in (read_answer, read_metadata):
        try:
            said = read(view, "ws://server")
        except WireError as error:
            # The sentences of a remote error are the server's.
            if not isinstance(error, RemoteError):
                refusal(error)
        else:
            if isinstance(said, dict) and said.get("op") == "progress":
                Progress.from_wire(said).to_wire()


def _observe(request: Infer) -> None:
    """As the server does it: decode the images, then look at what the policy takes."""
    try:
        obs, *history = (_decoded(item) for item in (request.obs, *request.history))
    except InvalidInput as error:
        refusal(error)
        return
    for reader in READERS:
        asked = PolicyRequest(obs, tuple(history), request.prompt, request.rtc)
        try:
            reader.check(asked)
            for frame in reader.frames(asked):
                assert np.isfinite(frame.state).all()
                assert all(image.shape == (24, 32, 3) for image in frame.images.values())
        except InvalidInput as error:
            refusal(error)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, EncodedImage):
        if value.shape[0] * value.shape[1] > MAX_PIXELS:
            raise InvalidInput("left to the other target")
        return decode_image(value)
    return value


def frames(data: bytes) -> None:
    """The same bytes in one piece and in small ones give the same events, or the same close code."""
    if len(data) < 2:
        return
    step, from_client, body = 1 + data[0] % 64, bool(data[1] & 1), data[2:]
    whole, pieces = (_events(body, from_client, size) for size in (len(body) or 1, step))
    assert whole == pieces, f"{whole!r:.200} in one piece, {pieces!r:.200} by {step} bytes"


def _events(data: bytes, from_client: bool, step: int) -> list[Any]:
    reader = FrameReader(from_client=from_client, max_bytes=100_000)
    events: list[Any] = []
    at = 0
    try:
        while at < len(data):
            room = reader.buffer()
            assert len(room), "no room for more"
            count = min(len(room), len(data) - at, step)
            room[:count] = data[at : at + count]
            at += count
            for event in reader.advance(count):
                if isinstance(event, Control) and event.opcode == CLOSE:
                    read_close(event.payload)
                events.append(bytes(event) if isinstance(event, memoryview) else event)
    except FrameError as error:
        # How much was handed out before depends on where the pieces end.
        events = [{1002: "breach", 1007: "no UTF-8", 1009: "too large"}[error.code]]
    return events


def image(data: bytes) -> None:
    """A JPEG or PNG, declared as its header says, and once as something else."""
    for codec in ("jpeg", "png"):
        size = image_size(codec, data)
        height, width = size or (24, 32)
        if size and height * width > MAX_IMAGE_PIXELS // 64 and height * width <= MAX_IMAGE_PIXELS:
            # A megapixel of noise takes a while; the product decodes at most sixteen of them.
            continue
        try:
            decoded = decode_image(EncodedImage(codec, data, (height, width, 3)))
            assert decoded.shape == (height, width, 3)
            assert decoded.dtype == np.uint8
        except InvalidInput as error:
            refusal(error)


def seeds_of(name: str) -> list[bytes]:
    """Real frames of every kind and both dialects, as they were recorded."""
    recorded = [file.read_bytes() for file in sorted(RECORDED.rglob("*.msgpack"))]
    if name == "message":
        spec = PolicySpec("act", 6, 16, cameras=CAMERAS, states=STATES)
        return [*recorded, pack({"policy": spec.to_wire()}), pack([None, True, 2**63, -1, 1.5, "x", b"y"])]
    if name == "frames":
        return _frame_seeds(recorded)
    grey = np.full((8, 16, 3), 90, np.uint8)
    return [bytes(encode_image(grey, codec).data) for codec in ("jpeg", "png")]  # type: ignore[union-attr]


def _frame_seeds(recorded: list[bytes]) -> list[bytes]:
    key = b"\1\2\3\4"

    def frame(opcode: int, payload: bytes, masked: bool, final: bool = True) -> bytes:
        header = frame_header(opcode, len(payload), key if masked else None, final=final)
        return header + (bytes(b ^ key[i % 4] for i, b in enumerate(payload)) if masked else payload)

    seeds = []
    for masked in (True, False):
        talk = [
            frame(TEXT, "é".encode(), masked),
            frame(TEXT, b"a", masked, final=False)
            + frame(PING, b"p", masked)
            + frame(CONTINUATION, b"b", masked),
            frame(PONG, b"", masked),
            frame(CLOSE, close_payload(1000, "bye"), masked),
            frame(CLOSE, struct.pack(">H", 4000), masked),
            *(frame(BINARY, data, masked) for data in recorded[::7]),
        ]
        seeds += [bytes((7, masked)) + data for data in (*talk, b"".join(talk[:4]))]
    return seeds
