"""What a person asks for, on its way from the page's process to the one that owns the robot: one JSON line each.

It is a way of its own, past the process that records: nothing there may hold up a Stop. Whoever reads believes nothing; `Steering`
checks every command again. JSON and no pickle, since the page's process talks to browsers.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from env_client.sidecar.types import Command

__all__ = ["plain_command", "receive_commands", "send_command"]

_NAMES = frozenset(get_args(get_type_hints(Command)["name"]))
_FIELDS = {"note": str, "prompt": str, "episode": int}
# Longer than any command that a page may send, bytes.
_LONGEST = 1 << 20


def plain_command(message: Mapping[str, Any]) -> Command | None:
    """A browser's message cut down to what is expected; None when it is no command."""
    name = message.get("name")
    if not isinstance(name, str) or name not in _NAMES:
        return None
    told = {key: message[key] for key, kind in _FIELDS.items() if isinstance(message.get(key), kind)}
    return Command(name=name, **told)  # type: ignore[typeddict-item]


def send_command(sock: socket.socket, command: Command) -> None:
    """Never waits (`sock` is non-blocking): what the control process does not take, because it hangs or is gone, is lost."""
    with contextlib.suppress(OSError):
        sock.send(json.dumps(command).encode() + b"\n")


def receive_commands(sock: socket.socket, on_command: Callable[[Command], object]) -> None:
    """Hand on every command until the other end is closed. What is no command is passed over."""
    with contextlib.suppress(OSError), sock.makefile("rb") as lines:
        while line := lines.readline(_LONGEST):
            try:
                message = json.loads(line)
            except ValueError:
                continue
            command = plain_command(message) if isinstance(message, dict) else None
            if command is not None:
                on_command(command)
