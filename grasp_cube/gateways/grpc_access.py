"""Who may call the gRPC gateway, and what is not let in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from grasp_cube.serving.access import Access, is_loopback

__all__ = ["KeyCheck", "Unreadable", "is_local", "reader"]


@dataclass(frozen=True)
class Unreadable:
    """Stands for bytes that are not the message that was expected."""

    size: int
    expected: str

    async def refuse(self, context: Any) -> None:
        """End the call."""
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"{self.size} bytes that are no openpi.{self.expected}"
        )


def reader(message: Any) -> Callable[[bytes], Any]:
    """Bytes -> a `message`, or `Unreadable`: by itself gRPC tells the peer about the exception, and logs each."""

    def read(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except DecodeError:
            return Unreadable(len(data), message.DESCRIPTOR.name)

    return read


class KeyCheck(grpc.aio.ServerInterceptor):
    """Lets calls through that carry the key."""

    def __init__(self, access: Access):
        self._access = access

        async def refuse(_: Any, context: Any) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "a valid key was expected in 'authorization: Api-Key KEY'"
            )

        async def refuse_stream(messages: Any, context: Any) -> None:
            await refuse(messages, context)

        self._refuse = grpc.unary_unary_rpc_method_handler(refuse)
        self._refuse_stream = grpc.stream_stream_rpc_method_handler(refuse_stream)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        given = [value for name, value in details.invocation_metadata or () if name == "authorization"]
        if self._access.lets_in([value for value in given if isinstance(value, str)]):
            return await continuation(details)
        return self._refuse_stream if details.method.endswith("/StreamPredict") else self._refuse


def is_local(peer: str, metadata: Iterable[tuple[str, Any]] = ()) -> bool:
    """Whether the caller with this name, and this metadata, sits on the server's own machine."""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return True
    address = unquote(rest).rpartition(":")[0].strip("[]")
    return is_loopback(address, {name: str(value) for name, value in metadata})
