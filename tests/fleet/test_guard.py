"""A replica's server ends with the process that started it."""

import subprocess
import sys
from pathlib import Path

from numpy_policy import write_checkpoint
from serving_parts import CAMERAS


def test_the_server_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Which it sees by the end of its stdin, whatever ended the parent; episodes are not waited for then."""
    checkpoint = write_checkpoint(tmp_path / "quick", cameras=CAMERAS)
    flags = ("--policy.path", checkpoint, "--host", "127.0.0.1", "--port", "0", "--drain-s", "600")
    server = subprocess.Popen(
        [sys.executable, "-m", "grasp_cube.fleet.guard", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        assert any(line.startswith("Waiting for client connections") for line in server.stdout)
        assert server.poll() is None
        server.stdin.close()
        assert server.stdout.read().endswith("Stopped.\n")
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
