"""`virtual_astribot`: the stand-in's robot as a process, until it is interrupted."""

import argparse
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from virtual_astribot.robot import Robot
from virtual_astribot.server import RobotServer

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="virtual_astribot", description="A stand-in for an Astribot S1. It is not the vendor's."
    )
    parser.add_argument("--port", type=int, default=5600, help="TCP port on this machine; 0: a free one")
    parser.add_argument("--log", type=Path, help="file that gets every command, one JSON object a line")
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="end when the process that started it ends"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = RobotServer(Robot(options.log), options.port)
    server.start()
    print(
        f"A virtual Astribot S1 (not the vendor's) listens: VIRTUAL_ASTRIBOT=127.0.0.1:{server.port}",
        flush=True,
    )
    parent = os.getppid()
    while not stop.wait(0.2):
        if options.exit_with_parent and os.getppid() != parent:
            break
    server.close()


if __name__ == "__main__":
    main()
