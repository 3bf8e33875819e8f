"""Who may call the gRPC gateway, and what is not let in."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

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

    def __init__(self, key: str):
        self._key = key.encode()

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
        first = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
        scheme, _, key = first.partition(" ")
        # Compared in constant time, and always compared, so that the time says nothing about the key.
        equal = hmac.compare_digest(key.strip().encode(), self._key)
        if equal and scheme.lower() in ("api-key", "bearer"):
            return await continuation(details)
        return self._refuse_stream if details.method.endswith("/StreamPredict") else self._refuse


def is_local(peer: str) -> bool:
    """Whether a peer's name is a loopback address."""
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
