"""The panel's door and its live data, over real sockets: who may pass, and who gets what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from env_client.panel.config import PanelConfig, PanelError, open_panel, url_of

Make = Callable[..., Any]


def status(url: str, **headers: str) -> tuple[int, str]:
    """The answer to a GET, redirects not followed."""

    async def get() -> tuple[int, str]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, headers=headers, allow_redirects=False) as answer,
        ):
            return answer.status, await answer.text()

    return asyncio.run(get())


def socket_status(url: str, **headers: str) -> int:
    """101 when a WebSocket was opened, otherwise the refusal's status."""

    async def connect() -> int:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.ws_connect(url, headers=headers):
                    return 101
            except aiohttp.WSServerHandshakeError as error:
                return error.status

    return asyncio.run(connect())


@pytest.mark.parametrize("path", ["/", "/live", "/scene/"])
@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Host", "evil.example"),
        ("Host", "localhost.evil.example:9000"),
        ("Origin", "http://evil.example"),
        ("Origin", "null"),
    ],
)
def test_another_sites_page_is_refused(make_panel: Make, path: str, header: str, value: str) -> None:
    """By its name for this machine (DNS rebinding) and by its origin, the page and both WebSockets."""
    panel = make_panel()
    assert status(panel.base + path, **{header: value})[0] == 403
    assert socket_status(panel.base + path, **{header: value}) == 403


def test_headers_that_nobody_sends_raise_nothing(make_panel: Make) -> None:
    """What is no address, and bytes that are not UTF-8, are refused like others."""
    panel = make_panel(host="0.0.0.0")
    ours = f"127.0.0.1:{panel.config.port}"
    for lines, code in (
        (b"Host: [", 403),
        (b"Host: \xff\xfe", 403),
        (b"Host: %b\r\nOrigin: http://[" % ours.encode(), 403),
        (b"Host: %b\r\nCookie: panel_%d=\xff\xfe" % (ours.encode(), panel.config.port), 401),
    ):
        with socket.create_connection(("127.0.0.1", panel.config.port), 10) as sock:
            sock.sendall(b"GET /live HTTP/1.1\r\n" + lines + b"\r\n\r\n")
            answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 %d " % code), (lines, answer)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "192.168.1.20"])
def test_the_machines_own_names_pass(make_panel: Make, host: str) -> None:
    """Also through a tunnel, which has another port."""
    panel = make_panel()
    ours = {"Host": f"{host}:9123", "Origin": f"http://{host}:9123"}
    code, page = status(panel.base, **ours)
    assert code == 200
    assert "panel.js" in page
    assert socket_status(panel.base + "/live", **ours) == 101


def test_beyond_loopback_a_token_is_needed(make_panel: Make) -> None:
    """It comes in the URL that the run prints, and is a cookie from then on; a wrong one opens nothing."""
    panel = make_panel(host="0.0.0.0")
    token = panel.config.token
    assert token is not None
    assert len(token) > 20
    assert f"?token={token}" in panel.said[0]
    for path in ("/", "/panel.js", "/scene/", "/?token=wrong"):
        assert status(panel.base + path)[0] == 401
    assert socket_status(panel.base + "/live") == 401
    assert socket_status(panel.base + "/live", Cookie=f"panel_{panel.config.port}=wrong") == 401

    async def visit() -> tuple[str, str, int]:
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(cookie_jar=jar) as session:
            async with session.get(f"{panel.base}/?token={token}") as answer:
                seen = str(answer.url), await answer.text()
            async with session.ws_connect(panel.base + "/live") as live:
                await live.receive(timeout=5)
                return *seen, 101

    url, page, code = asyncio.run(visit())
    assert "token" not in url
    assert "panel.js" in page
    assert code == 101


def test_a_token_on_loopback_is_asked_for() -> None:
    """Whoever gives one wants it; a short one is no token."""
    config, listening = open_panel(PanelConfig(port=0, token="a-long-secret"), lambda line: None)
    assert listening is not None
    listening.close()
    assert url_of(config) == f"http://localhost:{config.port}/?token=a-long-secret"
    with pytest.raises(ValueError, match="shorter than 8"):
        PanelConfig(token="short")


def test_a_port_that_is_taken() -> None:
    """Is an error that names it, never another port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PanelError, match=f"127.0.0.1:{port}.*--panel.port"):
            open_panel(PanelConfig(port=port), lambda line: None)


@pytest.mark.parametrize("command", ["run_env_client", "run_fake_env_client"])
def test_a_run_whose_port_is_taken_does_not_start(command: str, tmp_path: Path) -> None:
    """One sentence and exit code 2, before a server or a robot is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--panel.port", str(other.getsockname()[1])]
        if command == "run_fake_env_client":
            flags += ["--env.dataset-path", "datasets/lift"]
        done = subprocess.run(
            [sys.executable, "-m", f"env_client.{command}", *flags],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{command}: the panel cannot listen on 127.0.0.1:")
    assert len(done.stderr.strip().splitlines()) == 1


async def receive_update(live: aiohttp.ClientWebSocketResponse) -> tuple[dict[str, Any], list[bytes]]:
    update = await live.receive_json(timeout=5)
    return update, [await live.receive_bytes(timeout=5) for _ in update["images"]]


def test_a_browser_gets_what_is_newest(make_panel: Make) -> None:
    """One that answers late misses pictures, never rows of its curves; one that never answers gets two updates."""
    panel = make_panel()
    panel.begin()

    async def watch() -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(panel.base + "/live") as slow,
            session.ws_connect(panel.base + "/live") as asleep,
        ):
            first, _ = await receive_update(slow)
            await receive_update(asleep)
            assert first["run"]["names"][0] == "shoulder_pan"
            # Written in this thread: by then the browser is counted as one that watches.
            for number in range(100):
                await asyncio.to_thread(panel.tick, number)
            rows, pictures = [], []
            while len(rows) < 100:
                update, images = await receive_update(slow)
                rows += update.get("rows", [])
                pictures += images
                await slow.send_json({"drawn": 1})
            assert [row[1][0] for row in rows] == list(range(100))
            assert 1 <= len(pictures) < 100
            await receive_update(asleep)
            with pytest.raises(asyncio.TimeoutError):
                await asleep.receive(timeout=0.3)

    asyncio.run(watch())


def test_a_browser_that_comes_late_finds_the_curves(make_panel: Make) -> None:
    """Up to 600 ticks of them, the newest."""
    panel = make_panel()
    panel.begin()
    for number in range(700):
        panel.tick(number)

    async def watch() -> list[Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(panel.base + "/live") as live,
        ):
            update, _ = await receive_update(live)
            return update["rows"]

    rows = asyncio.run(watch())
    assert [row[1][0] for row in rows] == list(range(100, 700))


def test_without_a_browser_nothing_is_encoded(make_panel: Make) -> None:
    """No JPEG and no 3D view."""
    panel = make_panel()
    panel.begin()
    assert not any(panel.tick(number)._jpegs for number in range(20))
    assert panel.panel._scene is None


def test_what_a_browser_sends_harms_nobody(make_panel: Make) -> None:
    """Commands are passed on cut down to what is expected; everything else is thrown away."""
    panel = make_panel()

    async def send(*messages: str, limit_s: float = 5.0) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(panel.base + "/live") as live:
            for message in messages:
                await live.send_str(message)
            end = time.monotonic() + limit_s
            while not panel.commands and time.monotonic() < end:
                await asyncio.sleep(0.01)

    nonsense = [
        "",
        "{",
        "[]",
        "1",
        '{"drawn":1}',
        '{"name":7}',
        '{"name":"rm"}',
        '{"name":"__class__"}',
        "[" * 16000,
    ]
    odd = {"name": "success", "note": 7, "episode": "x", "prompt": None, "more": [1]}
    asyncio.run(send(*nonsense, json.dumps(odd)))
    assert panel.commands == [{"name": "success"}]
    panel.commands.clear()
    # A message too long for any command ends its own connection, and no other.
    with contextlib.suppress(ConnectionError):
        asyncio.run(send('{"name":"stop","note":"' + "x" * 100_000 + '"}', limit_s=0.2))
    assert panel.commands == []
    asyncio.run(send('{"name":"failure","note":"dropped","episode":3}'))
    assert panel.commands == [{"name": "failure", "note": "dropped", "episode": 3}]


@pytest.mark.slow
def test_the_3d_view_behind_the_door(make_panel: Make) -> None:
    """viser's page and its WebSocket come through; a robot that the URDF does not know has none, and is told why."""
    panel = make_panel()
    panel.begin()
    code, page = status(panel.base + "/scene/")
    assert code == 200
    assert "viser" in page.lower()
    assert socket_status(panel.base + "/scene/", Origin="http://evil.example") == 403

    async def connect() -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(panel.base + "/scene/", protocols=["viser-v1.1.1"]) as view,
        ):
            assert view.protocol == "viser-v1.1.1"
            return await view.receive_bytes(timeout=5)

    assert len(asyncio.run(connect())) > 1000
    other = make_panel()
    other.begin(names=("wheel_left", "wheel_right"))
    code, text = status(other.base + "/scene/")
    assert code == 404
    assert "--panel.urdf" in text
