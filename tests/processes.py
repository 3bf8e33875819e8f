"""Real processes for tests: start a command, wait for what it prints, end it whatever happens."""

import ast
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Running:
    """A child process whose output is collected, so that its pipe never fills."""

    def __init__(self, command: Sequence[str | Path], *, env: dict[str, str] | None = None, cwd: Path = ROOT):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
        )
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    @property
    def output(self) -> str:
        with self._grown:
            return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 120.0) -> re.Match[str]:
        """The first match of `pattern` in the output; an assertion error with the output when there is none."""
        deadline = time.monotonic() + timeout_s
        with self._grown:
            while True:
                found = re.search(pattern, "\n".join(self.lines))
                if found:
                    return found
                left = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if left <= 0 or ended:
                    raise AssertionError(f"no {pattern!r} in:\n" + "\n".join(self.lines))
                self._grown.wait(min(left, 0.2))

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def running(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Iterator[Running]:
    """A command that is killed when the block is left."""
    child = Running(command, env=env, cwd=cwd)
    try:
        yield child
    finally:
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait(10)


@contextmanager
def policy_server(checkpoint: Path | str, *arguments: str) -> Iterator[tuple[Running, int]]:
    """`serve_policy` on a free loopback port, ready; with the port."""
    command = (sys.executable, "-m", "grasp_cube.serve_policy", "--policy.path", checkpoint)
    with running(*command, "--host", "127.0.0.1", "--port", "0", *arguments) as server:
        found = server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)")
        yield server, int(found[1])


def help_of(command: str, *heavy: str) -> tuple[str, list[str]]:
    """What `grasp_cube.COMMAND --help` prints, and which of the modules `heavy` it imported for that."""
    code = (
        f"import sys; from grasp_cube import {command}\n"
        f"try: {command}.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said, _, imported = done.stdout.rstrip().rpartition("\n")
    return said, ast.literal_eval(imported)
