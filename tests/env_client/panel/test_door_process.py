"""The page's own process: a Stop passes by whoever records, and the process is gone when the run is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from env_client.panel.commands import receive_commands
from env_client.panel.config import PanelConfig, open_panel
from env_client.sidecar.config import LogConfig, RecordConfig, SidecarConfig
from env_client.sidecar.feed import SidecarFeed


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def start(tmp_path: Path, commands: list[Any]) -> tuple[SidecarFeed, int]:
    """A sidecar with a log and a page; with the page's port."""
    panel, listening = open_panel(PanelConfig(port=0), lambda line: None)
    assert listening is not None
    config = SidecarConfig(
        log=LogConfig(dir=tmp_path),
        record=RecordConfig(enable=False),
        panel=panel,
        panel_fd=listening.fileno(),
    )
    with listening:
        feed = SidecarFeed(config, say=lambda line: None, on_command=commands.append)
    assert feed.wait_ready(60)
    return feed, panel.port


def test_a_stop_does_not_wait_for_those_who_record(tmp_path: Path) -> None:
    """Their process is frozen, as one is that gets no core: what the page sends arrives nevertheless."""
    commands: list[Any] = []
    feed, port = start(tmp_path, commands)

    async def send() -> None:
        url = f"http://127.0.0.1:{port}/live"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as live:
            await live.receive(timeout=60)
            os.kill(feed.pid, signal.SIGSTOP)
            await live.send_json({"name": "stop"})
            await asyncio.to_thread(until, lambda: commands)

    try:
        asyncio.run(send())
        assert commands == [{"name": "stop"}]
    finally:
        os.kill(feed.pid, signal.SIGCONT)
        assert feed.close(60)
    assert port_is_free(port)


def test_the_page_ends_with_those_who_record(tmp_path: Path) -> None:
    """Killed without a word, they leave no process behind that holds the page's port."""
    feed, port = start(tmp_path, [])
    assert not port_is_free(port)
    os.kill(feed.pid, signal.SIGKILL)
    until(lambda: port_is_free(port))
    until(lambda: feed.gone)
    assert not feed.close(60)


def test_what_is_no_command_is_passed_over() -> None:
    """The control process reads lines of any kind, hands on commands cut down to their fields, and ends with the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(
            b'\n{\n[]\n"stop"\n{"name": "rm"}\n{"name": ["stop"]}\n\xff\n{"name": "stop", "more": 1}\n{"name": "st'
        )
    commands: list[Any] = []
    with ours:
        receive_commands(ours, commands.append)
    assert commands == [{"name": "stop"}]
