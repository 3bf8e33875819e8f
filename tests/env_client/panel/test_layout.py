"""The page on a laptop and on a phone, fed by hand: what must be reachable is, and the 3D view draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from needs_browser import needs_browser

pytestmark = needs_browser

Make = Callable[..., Any]
SIZES = {"laptop": (1366, 768), "phone": (390, 844)}
STATE = {
    "phase": "running", "episode": 0, "episodes": 3, "attended": False, "prompt": "lift", "prompt_editable": True,
    "last_episode": None, "last_outcome": "", "mark": None,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_stop_is_always_in_reach(make_panel: Make, browser: Any, size: str) -> None:
    """Wherever the page is scrolled to on a phone; nothing is wider than the screen; a touch is enough."""
    panel = make_panel()
    panel.begin()
    panel.panel.state(STATE)
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone")
    context.route("**/scene/**", lambda route: route.abort())
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(panel.base, wait_until="domcontentloaded")
    page.wait_for_function("() => document.body.dataset.phase === 'running'")
    for number in range(60):
        panel.tick(number)
    page.wait_for_function("() => Number(document.getElementById('step').textContent) === 59")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("stop", "start", "hold", "success", "failure", "note", "prompt", "quit"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["height"] >= 40, f"{name} is too small for a finger"
    if size == "phone":
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
    box = page.locator("#stop").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= height
    if size == "phone":
        page.tap("#stop")
    else:
        page.click("#stop")
    page.wait_for_function("() => document.getElementById('stop').classList.contains('sent')")
    panel.panel.state(STATE | {"phase": "judging", "episode": 1, "last_episode": 0})
    page.wait_for_function("() => document.body.dataset.phase === 'judging'")
    assert [command["name"] for command in panel.commands] == ["stop"]
    assert problems == []
    context.close()


@pytest.mark.slow
def test_the_arm_in_3d(make_panel: Make, browser: Any) -> None:
    """viser draws it behind the door, and it moves with the joints; the space bar stops also from within."""
    panel = make_panel()
    panel.begin()
    panel.panel.state(STATE)
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.set_default_timeout(120_000)
    page.goto(panel.base, wait_until="domcontentloaded")
    page.frame_locator("#view iframe").locator("canvas").first.wait_for()

    def picture_at(value: float) -> np.ndarray:
        """(H, W, 3) what the view shows once the arm has been there for some ticks."""
        import cv2

        for _ in range(40):
            panel.tick(int(value))
            page.wait_for_timeout(50)
        data = page.locator("#view").screenshot()
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    first, second = picture_at(0), picture_at(50)
    assert first.std() > 5
    assert (np.abs(first.astype(int) - second).max(axis=2) > 40).sum() > 200
    page.frame_locator("#view iframe").locator("canvas").first.click(force=True)
    page.keyboard.press("Space")
    page.wait_for_function("() => document.getElementById('stop').classList.contains('sent')")
    page.close()
