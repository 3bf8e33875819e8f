"""`serve_policy` as a child process, for commands that need a server for a while."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["ServerFailed", "environment", "serving"]

# Loading takes seconds on a laptop and may take minutes on a cold disk, in seconds.
START_LIMIT_S = 600.0
# How long a server that was asked to end may take, in seconds.
END_LIMIT_S = 10.0


class ServerFailed(RuntimeError):
    """The server ended before it was ready. `code` is its exit code; it has said why."""

    def __init__(self, code: int):
        super().__init__(f"the server did not start (exit code {code})")
        self.code = code


@contextmanager
def serving(arguments: Sequence[str], say: Callable[[str], None], *, port: int = 0) -> Iterator[int]:
    """A policy server on loopback while the block runs; yields its port. `say` gets each line that it prints.

    `arguments` are further ones of `serve_policy`; port 0 takes a free one. Raises `ServerFailed`.
    """
    command = [
        sys.executable,
        "-m",
        "grasp_cube.serve_policy",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *arguments,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    ports: list[int] = []
    settled = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            found = re.search(r"Waiting for client connections at ws://\S+:(\d+)", line)
            if found:
                ports.append(int(found[1]))
                settled.set()
        settled.set()

    threading.Thread(target=read, name="server-output", daemon=True).start()
    try:
        settled.wait(START_LIMIT_S)
        if not ports:
            raise ServerFailed(_end(process) or 1)
        yield ports[0]
    finally:
        _end(process)


def environment() -> dict[str, str]:
    """For children whose lines are shown as they come."""
    return os.environ | {"PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
