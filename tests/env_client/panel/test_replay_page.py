"""The page of a replay, and a page that outlives its run."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from needs_browser import needs_browser
from processes import Running, running
from robot_fixtures import server_process

pytestmark = needs_browser


@pytest.mark.slow
def test_a_page_survives_the_end_of_its_run(browser: Any, tmp_path: Path) -> None:
    """Opened before the first run, it shows that one, says when it is gone, and shows the next, never loaded anew."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    context = browser.new_context()
    context.route("**/scene/**", lambda route: route.abort())
    page = context.new_page()
    page.set_default_timeout(120_000)

    with ExitStack() as stack:
        server = stack.enter_context(server_process(tmp_path / "policy", horizon=16))

        def replay(name: str) -> Running:
            command = (
                sys.executable,
                "-m",
                "env_client.run_fake_env_client",
                "--env.dataset-path",
                "datasets/lift",
            )
            flags = (
                "--port",
                str(server.port),
                "--panel.port",
                port,
                "--attended",
                "--no-plots",
                "--no-enable-logging",
            )
            run = stack.enter_context(running(*command, *flags, "--output-dir", tmp_path / name))
            run.wait_for("Panel: http")
            return run

        def watch() -> None:
            """The run waits for Start; then its pictures move."""
            page.wait_for_function("() => document.body.dataset.phase === 'waiting'")
            page.click("#start")
            page.wait_for_function(
                "() => Number(document.querySelector('[data-camera=front] canvas').dataset.frames || 0) > 5"
            )
            page.wait_for_function("() => document.body.dataset.phase === 'running'")

        first = replay("first")
        page.goto(f"http://localhost:{port}", wait_until="domcontentloaded")
        page.evaluate("window.same = true")
        watch()
        page.click("#hold")
        page.wait_for_function("() => document.body.dataset.phase === 'paused'")
        page.click("#stop")
        page.wait_for_function("() => document.body.dataset.phase === 'judging'")
        first.end(signal.SIGKILL)
        page.wait_for_function("() => document.body.dataset.phase === 'lost'")
        page.wait_for_function("() => document.getElementById('notice').textContent.includes('waits for it')")
        second = replay("second")
        watch()
        assert page.evaluate("window.same")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#quit")
        assert second.process.wait(60) == 0, second.output
    context.close()
