"""A panel of its own, fed by hand from this process, and browsers for whole runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from env_client.panel.commands import receive_commands
from env_client.panel.config import PanelConfig, open_panel
from env_client.panel.panel import Panel
from env_client.sidecar.types import RunInfo, TickData
from needs_browser import ARGUMENTS, CHROMIUM

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


class OpenPanel:
    """A panel that listens, and what came out of it."""

    def __init__(self, **config: Any) -> None:
        self.commands: list[Any] = []
        self.said: list[str] = []
        self.config, listening = open_panel(PanelConfig(port=0, **config), self.said.append)
        assert listening is not None
        ours, pages = socket.socketpair()
        self.panel = Panel(self.config, listening, pages)
        threading.Thread(target=receive_commands, args=(ours, self.commands.append), daemon=True).start()
        self.base = f"http://127.0.0.1:{self.config.port}"

    def begin(self, names: tuple[str, ...] = JOINTS) -> None:
        count = len(names)
        self.panel.begin_run(
            RunInfo(
                run_id="run", started=time.time(), config={}, robot="so101",
                action_names=tuple(f"{name}.pos" for name in names), unit="normalized",
                lower=np.full(count, -100.0), upper=np.full(count, 100.0), unit_per_rad=np.full(count, 57.0), state_index=np.arange(count),
                states={"arm": count}, cameras=("front",), fps=30.0, policy=None, server="127.0.0.1:8000",
                prompt="lift", execution="async",
            )
        )  # fmt: skip

    def tick(self, number: int) -> TickData:
        """A tick with a picture that shows its number, given to the panel."""
        image = np.full((480, 640, 3), number % 250, np.uint8)
        tick = TickData(
            episode=0, tick=number, phase="run", time=number / 30.0, unix=0.0, late_s=0.0, images={"front": image},
            state=np.full(6, number, np.float32), sent=np.full(6, number, np.float32),
        )  # fmt: skip
        self.panel.tick(tick)
        return tick


@pytest.fixture
def make_panel() -> Iterator[Callable[..., OpenPanel]]:
    panels: list[OpenPanel] = []

    def make(**config: Any) -> OpenPanel:
        panels.append(OpenPanel(**config))
        return panels[-1]

    yield make
    for opened in panels:
        opened.panel.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()
