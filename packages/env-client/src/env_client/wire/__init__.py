"""The one definition of the wire, imported by both sides. Needs NumPy and msgpack only."""

from env_client.wire.codec import (
    DEFAULT_LIMITS,
    Dialect,
    EncodedImage,
    Frame,
    LaterImage,
    Limits,
    pack,
    pack_frame,
    pack_parts,
)
from env_client.wire.decoder import unpack
from env_client.wire.errors import ErrorCode, InvalidInput, RemoteError, WireError, shown
from env_client.wire.images import IMAGE_CODECS, decode_image, encode_image, resize_image
from env_client.wire.messages import (
    PROTOCOL,
    Configure,
    Infer,
    InferReply,
    Progress,
    Request,
    Reset,
    RtcPrefix,
    SetPrompt,
    Status,
    error_reply,
    read_request,
)
from env_client.wire.spec import CameraSpec, PolicySpec, StateSpec

__all__ = [
    "DEFAULT_LIMITS",
    "IMAGE_CODECS",
    "PROTOCOL",
    "CameraSpec",
    "Configure",
    "Dialect",
    "EncodedImage",
    "ErrorCode",
    "Frame",
    "Infer",
    "InferReply",
    "InvalidInput",
    "LaterImage",
    "Limits",
    "PolicySpec",
    "Progress",
    "RemoteError",
    "Request",
    "Reset",
    "RtcPrefix",
    "SetPrompt",
    "StateSpec",
    "Status",
    "WireError",
    "decode_image",
    "encode_image",
    "error_reply",
    "pack",
    "pack_frame",
    "pack_parts",
    "read_request",
    "resize_image",
    "shown",
    "unpack",
]
