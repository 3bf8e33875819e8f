"""`serve_policy` as the child of a replica: it ends when its parent does, whatever ended that one.

Life cycle: `python -m grasp_cube.fleet.guard FLAGS…`; stdin is a pipe whose other end only the parent has. The end of
the file means that the parent is gone: then the server has `LAST_S` to answer what was begun, and is cut.
"""

import os
import signal
import sys
import threading

from grasp_cube.serve_policy import main as serve_policy

__all__ = ["main"]

LAST_S = 10.0


def main() -> None:
    """The command."""
    threading.Thread(target=_watch, name="parent", daemon=True).start()
    serve_policy(sys.argv[1:])


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    # The second of two signals does not wait for episodes (`serve_policy --drain-s`).
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    threading.Event().wait(LAST_S)
    os._exit(1)


if __name__ == "__main__":
    main()
