"""`demo`: the main job on what the repository ships, in one command.

Starts `serve_policy` on the shipped checkpoint and `run_fake_env_client` on the shipped dataset, as two processes
over a real socket, as two people would; the table and the plots are the client's. Ends by itself; with `--keep`
the server stays and the episodes are replayed until Ctrl-C.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from env_client.cli import fail, parse

from grasp_cube.server_process import ServerFailed, environment, serving

__all__ = ["DemoConfig", "main"]

PROG = "demo"
DESCRIPTION = (
    "Serve the shipped checkpoint, replay the shipped episodes against it, and show how well it follows."
)


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
    arguments = ["--policy.task", config.task]
    if config.device:
        arguments += ["--policy.device", config.device]
    try:
        with serving(arguments, lambda line: print(f"[server] {line}", flush=True), port=config.port) as port:
            code = _replay(config, dataset, port)
            while config.keep and code == 0:
                print("Replaying again (--keep); Ctrl-C ends it.", flush=True)
                code = _replay(config, dataset, port)
    except KeyboardInterrupt:
        code = 130
    except ServerFailed as failed:
        # The server has said why.
        code = failed.code
    sys.exit(code)


def _replay(config: DemoConfig, dataset: Path, port: int) -> int:
    command = [sys.executable, "-m", "env_client.run_fake_env_client", "--env.dataset-path", str(dataset)]
    command += [
        "--port",
        str(port),
        "--output-dir",
        str(config.output_dir),
        "--no-panel",
        "--no-enable-logging",
    ]
    if config.fast:
        command.append("--fast")
    client = subprocess.Popen(command, env=environment())
    try:
        return client.wait()
    except KeyboardInterrupt:
        # The terminal sent it to the client as well, which still writes its table.
        client.wait()
        raise


if __name__ == "__main__":
    main()
