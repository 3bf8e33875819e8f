"""The server's lines on the terminal, and its log: lines for people, or JSON objects for machines, with session and seq as fields of their own."""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

from env_client.one_line import one_line

__all__ = ["FIELDS", "LogFormat", "set_up", "tell"]

LogFormat = Literal["text", "json"]
# What a line may carry beside its message (`logger.info(..., extra={"session": 3})`).
FIELDS = ("session", "seq", "peer", "policy", "code")


def tell(line: str) -> None:
    """Print a line. Where that is not possible (a full disk, a terminal that was closed) nobody is told, and robots are served."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


def set_up(format: LogFormat = "text", *, verbose: bool = False) -> None:
    """Log to stderr. `verbose` adds a line for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if format == "json" else _Text("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("grasp_cube").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Connections are worth a line each; the library's own lines about them are not.
    logging.getLogger("websockets").setLevel(logging.ERROR)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    for name in FIELDS:
        value = getattr(record, name, None)
        if value is not None:
            yield name, value


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _fields(record))
        return one_line(line)

    def formatException(self, ei: Any) -> str:
        # Indented, so that no line of it looks like one of the log's own, whatever a client wrote into it.
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(ei).splitlines())


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{record.msecs:03.0f}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
