"""What a server answers, to a handshake and to a request, as values or as errors of the wire."""

from typing import Any

from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

from env_client.wire import ErrorCode, InvalidInput, PolicySpec, RemoteError, unpack

__all__ = ["raise_if_final", "read_answer", "read_metadata", "reason", "with_chunk"]


def read_metadata(frame: str | memoryview, url: str) -> tuple[dict[str, Any], PolicySpec | None]:
    """The first frame of `url`: its metadata, and its policy, which plain and idle servers do not name.

    Raises `RemoteError` when the server says instead that its policy cannot be loaded.
    """
    if isinstance(frame, str):
        code, separator, message = frame.partition(": ")
        if separator and code in ErrorCode.__members__:
            raise RemoteError(code, message)
        raise RemoteError(ErrorCode.NOT_READY, f"the server at {url} answered: {frame}")
    metadata, _ = unpack(frame)
    if not isinstance(metadata, dict):
        raise InvalidInput(f"the first frame of {url} is not a map; a policy's metadata was expected")
    plain = metadata.get("policy")
    return metadata, None if plain is None else PolicySpec.from_wire(plain)


def read_answer(answer: str | memoryview, url: str) -> dict[str, Any]:
    """The map in an answer of `url`. Raises `RemoteError` for an error, `InvalidInput` for anything else."""
    if isinstance(answer, str):
        code, separator, message = answer.partition(": ")
        if separator and code in ErrorCode.__members__:
            raise RemoteError(code, message)
        raise RemoteError(ErrorCode.INTERNAL, answer)
    reply, _ = unpack(answer)
    if not isinstance(reply, dict):
        raise InvalidInput(f"{url} answered with {type(reply).__name__}; a map was expected")
    if reply.get("op") == "error":
        raise RemoteError(
            str(reply.get("code")), str(reply.get("message")), retry_after_ms=reply.get("retry_after_ms")
        )
    return reply


def raise_if_final(error: Exception, url: str) -> None:
    """Raise what `url` answered to the handshake, if waiting makes it no better."""
    if isinstance(error, InvalidURI):
        raise InvalidInput(
            f"{url} is not a WebSocket address: give a host and a port, or ws://HOST:PORT"
        ) from error
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        body = bytes(error.response.body or b"").decode("utf-8", "replace").strip()
        if status in (401, 403):
            raise RemoteError(
                ErrorCode.UNAUTHENTICATED,
                f"the server at {url} refused the key (HTTP {status}): {body or 'give its --api_key'}",
            ) from error
        if status == 404:
            raise RemoteError(
                ErrorCode.INVALID_INPUT, f"the server at {url}: {body or 'HTTP 404'}"
            ) from error


def reason(error: BaseException) -> str:
    """Why there is no connection, in a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, InvalidStatus):
        body = bytes(error.response.body or b"").decode("utf-8", "replace").strip()
        return f"HTTP {error.response.status_code}" + (f": {body:.200}" if body else "")
    if isinstance(error, InvalidHandshake):
        return f"no WebSocket answer: {error}"
    return str(error) or type(error).__name__


def with_chunk(reply: dict[str, Any]) -> dict[str, Any]:
    """Plain servers send `actions` or `action`; callers may read either."""
    chunk = reply.get("actions", reply.get("action"))
    return reply | {"actions": chunk, "action": chunk}
