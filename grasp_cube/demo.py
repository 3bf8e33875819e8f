"""`demo`: the main job on what the repository ships, in one command.

Starts `serve_policy` on the shipped checkpoint and `run_fake_env_client` on the shipped dataset, as two processes
over a real socket, as two people would; the table and the plots are the client's. Ends by itself; with `--keep`
the server stays and the episodes are replayed until Ctrl-C.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from env_client.cli import fail, parse

__all__ = ["DemoConfig", "main"]

PROG = "demo"
DESCRIPTION = (
    "Serve the shipped checkpoint, replay the shipped episodes against it, and show how well it follows."
)

# Loading takes seconds on a laptop and may take minutes on a cold disk, in seconds.
START_LIMIT_S = 600.0


@dataclass
class DemoConfig:
    """What the demo can be told."""

    # Task whose checkpoint and dataset are used (a yaml in configs/tasks, a folder in datasets).
    task: str = "lift"
    # cpu, cuda or mps; default: the best that is there.
    device: str | None = None
    # Port of the server; 0 takes a free one.
    port: int = 0
    # As fast as the server answers, instead of at the recording's own rate.
    fast: bool = False
    # Leave both running: the episodes are replayed again and again until Ctrl-C.
    keep: bool = False
    # Folder for plots and summary.
    output_dir: Path = Path("outputs/demo")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    config = parse(DemoConfig, argv, prog=PROG, description=DESCRIPTION)
    dataset = Path("datasets") / config.task
    if not dataset.is_dir():
        fail(PROG, f"there is no dataset at {dataset.absolute()}: run this in the project's root")
    server = _start_server(config)
    try:
        code = _replay(config, dataset, _port(server))
        while config.keep and code == 0:
            print("Replaying again (--keep); Ctrl-C ends it.", flush=True)
            code = _replay(config, dataset, _port(server))
    except KeyboardInterrupt:
        code = 130
    finally:
        _end(server)
    sys.exit(code)


class _Server:
    """The server's process; its lines are passed on to the terminal as they come."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        self.port: int | None = None
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"[server] {line}", end="", flush=True)
            found = re.search(r"Waiting for client connections at ws://\S+:(\d+)", line)
            if found:
                self.port = int(found[1])
                self.ready.set()
        self.ready.set()


def _start_server(config: DemoConfig) -> _Server:
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--policy.task", config.task]
    command += ["--host", "127.0.0.1", "--port", str(config.port)]
    if config.device:
        command += ["--policy.device", config.device]
    return _Server(command)


def _port(server: _Server) -> int:
    """The port of the ready server; ends the demo when it cannot start."""
    server.ready.wait(START_LIMIT_S)
    if server.port is None or server.process.poll() is not None:
        _end(server)
        # The server has said why.
        raise SystemExit(server.process.returncode or 1)
    return server.port


def _replay(config: DemoConfig, dataset: Path, port: int) -> int:
    command = [sys.executable, "-m", "env_client.run_fake_env_client", "--env.dataset-path", str(dataset)]
    command += ["--port", str(port), "--output-dir", str(config.output_dir)]
    if config.fast:
        command.append("--fast")
    client = subprocess.Popen(command, env=_environment())
    try:
        return client.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the client as well, which still writes its table.
        client.wait()
        raise


def _end(server: _Server) -> None:
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(10)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    main()
