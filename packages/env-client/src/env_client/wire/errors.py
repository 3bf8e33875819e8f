"""What can go wrong on the wire, as one small hierarchy.

WireError                    anything below; carries a code that travels in an error reply
├── InvalidInput             what came cannot be read or does not fit; the connection stays open
└── RemoteError              the other side answered with an error
"""

from enum import StrEnum

__all__ = ["ErrorCode", "InvalidInput", "RemoteError", "WireError"]


class ErrorCode(StrEnum):
    """The codes that an error reply carries."""

    INVALID_INPUT = "INVALID_INPUT"
    NOT_READY = "NOT_READY"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    OVERLOADED = "OVERLOADED"
    SUPERSEDED = "SUPERSEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    INTERNAL = "INTERNAL"


class WireError(Exception):
    """An error with a code. `message` is a sentence: what came, what was expected, what to do."""

    def __init__(self, code: ErrorCode | str, message: str, *, retry_after_ms: int | None = None):
        super().__init__(message)
        self.code = str(code)
        self.message = message
        self.retry_after_ms = retry_after_ms


class InvalidInput(WireError):
    """The bytes, the structure or the values do not fit what is expected."""

    def __init__(self, message: str):
        super().__init__(ErrorCode.INVALID_INPUT, message)


class RemoteError(WireError):
    """The peer answered with an error; `code` and `message` are the peer's."""
