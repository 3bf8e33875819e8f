"""The keys that steer a run, in a terminal of their own (a pseudo-terminal)."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest
from env_client.keys import Keys

# Says what it is told, until it is told to end; the terminal's own settings are in a child's hands.
CHILD = """
import sys, threading
from env_client.keys import Keys, kept_terminal
ended = threading.Event()
def told(command):
    print("told", command["name"], flush=True)
    if command["name"] == "quit":
        ended.set()
with kept_terminal():
    keys = Keys(told)
    print("ready", keys.there, flush=True)
    if ended.wait(60) and sys.argv[1] == "closes":
        keys.close()
"""


def read_until(terminal: int, text: str, limit_s: float = 60.0) -> str:
    """What the terminal shows, up to `text`."""
    seen, end = "", time.monotonic() + limit_s
    while text not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 4096).decode()
    return seen


@pytest.mark.parametrize("how", ["closes", "forgets"])
def test_keys_are_commands_and_the_terminal_comes_back(how: str) -> None:
    """Each key at once, without Enter; echo and lines are as before at the end, also when nobody closed the keys."""
    terminal, theirs = pty.openpty()
    # Not pty.fork: a fork of a test process with the threads of gRPC or torch in it may never reach its exec.
    child = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", CHILD, how], stdin=theirs, stdout=theirs, stderr=theirs
    )
    try:
        read_until(terminal, "ready True")
        assert not termios.tcgetattr(terminal)[3] & termios.ECHO
        shown = ""
        for key, name in ((" ", "stop"), ("\r", "start"), ("h", "hold"), ("z y", "success"), ("q", "quit")):
            os.write(terminal, key.encode())
            shown += read_until(terminal, f"told {name}")
        # "z" is no key, the space before "y" is one.
        assert shown.count("told") == 6
        end = time.monotonic() + 60
        while not termios.tcgetattr(terminal)[3] & termios.ECHO:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.close(terminal)
        # Open until here: what a terminal shows last may be lost when its other end closes.
        os.close(theirs)
        child.wait(60)


def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe is read by nobody: what comes there is no command."""
    read, write = os.pipe()
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        told: list[dict[str, str]] = []
        keys = Keys(told.append)
        os.write(write, b" q")
        os.close(write)
        assert not keys.there
        keys.close()
        assert stdin.read() == " q"
    assert told == []
