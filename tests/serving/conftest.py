"""The server under test: the real command with the NumPy policy, on loopback."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from numpy_policy import write_checkpoint
from processes import policy_server
from serving_parts import CAMERAS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Answers at once."""
    return write_checkpoint(tmp_path_factory.mktemp("numpy") / "quick", cameras=CAMERAS)


@pytest.fixture(scope="session")
def slow_checkpoint(tmp_path_factory) -> Path:
    """Takes a second and a half for each batch."""
    return write_checkpoint(tmp_path_factory.mktemp("numpy") / "slow", cameras=CAMERAS, delay_s=1.5)


@pytest.fixture(scope="module")
def port(checkpoint) -> Iterator[int]:
    """A server that answers at once, shared by a module's tests."""
    with policy_server(checkpoint) as (_, number):
        yield number


@pytest.fixture(scope="module")
def slow_port(slow_checkpoint) -> Iterator[int]:
    """A server whose policy takes its time, shared by a module's tests."""
    with policy_server(slow_checkpoint, "--max-queue", "4", "--batch-size", "1") as (_, number):
        yield number


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
