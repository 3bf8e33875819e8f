"""What can go wrong on the wire, as one small hierarchy.

WireError                    anything below; carries a code that travels in an error reply
├── InvalidInput             what came cannot be read or does not fit; the connection stays open
└── RemoteError              the other side answered with an error
"""

import reprlib
from enum import StrEnum
from typing import Any

__all__ = ["ErrorCode", "InvalidInput", "RemoteError", "WireError", "shown"]


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


class _Shown(reprlib.Repr):
    """Only so much of a value is looked at: a sentence about 30 MB must not cost a hundred."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value if len(value) <= self.maxother else value[: self.maxother])

    def repr_str(self, value: str, level: int) -> str:
        return repr(value if len(value) <= self.maxother else value[: self.maxother])


_REPR = _Shown()
_REPR.maxother, _REPR.maxlist, _REPR.maxdict, _REPR.maxlevel = 120, 20, 8, 4


def shown(value: Any, length: int = 60) -> str:
    """The beginning of a value's `repr`, for a sentence, whatever the value weighs."""
    return f"{_REPR.repr(value):.{length}}"
