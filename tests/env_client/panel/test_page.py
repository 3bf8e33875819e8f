"""The page in Chromium, against a whole run: policy server, `run_env_client`, and a virtual SO-101 with its servos' own log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from needs_browser import needs_browser
from page_parts import begin, changed_goals, frames, phase, press, wait
from robot_fixtures import Client, Robot, robot_process, server_process

pytestmark = needs_browser


@dataclass
class Run:
    """One run that all tests of this file steer."""

    robot: Robot
    client: Client
    url: str
    records: Path
    # Added to the seconds of the servos' log, gives this process's monotonic clock.
    offset: float

    def changes(self) -> list[float]:
        """When goals changed lately, in the seconds of this process's monotonic clock."""
        return [goal["wall"] + self.offset for goal in changed_goals(self.robot.control.servo_log(last=200))]

    def moves(self) -> bool:
        return any(at > time.monotonic() - 1.0 for at in self.changes())

    def said(self) -> str:
        return self.client.output


def clock_offset(robot: Robot) -> float:
    """Between the log's clock and ours: the tightest of some events whose moment is known from both sides."""
    found = []
    for _ in range(10):
        before = time.monotonic()
        robot.control.fault("clear")
        after = time.monotonic()
        logged = [event for event in robot.control.servo_log(last=50) if event["kind"] == "fault"][-1]
        found.append((after - before, (before + after) / 2 - logged["wall"]))
    return min(found)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    with ExitStack() as stack:
        server = stack.enter_context(server_process(folder / "policy", horizon=30))
        robot = stack.enter_context(robot_process(folder))
        flags = ["--task", "lift", "--port", str(server.port), "--hang-timeout-s", "30", "--panel.port", "0"]
        flags += ["--num-episodes", "100", "--episode-time-s", "1000"]
        flags += ["--log.dir", str(folder / "log"), "--record.dir", str(folder / "records")]
        client = Client([*robot.flags, *flags])
        stack.callback(client.close)
        wait(lambda: "Panel: http" in client.output, lambda: client.output)
        url = client.output.split("Panel: ")[1].split()[0]
        yield Run(robot, client, url, folder / "records", clock_offset(robot))


@pytest.fixture
def open_page(browser: Any, run: Run) -> Iterator[Callable[..., Any]]:
    """Open the run's page; the 3D view, which software draws here, is left out unless it is wanted."""
    with ExitStack() as stack:

        def open_one(scene: bool = False, **options: Any) -> Any:
            assert run.client.process.poll() is None, run.client.output
            context = browser.new_context(viewport={"width": 1366, "height": 768}, **options)
            stack.callback(context.close)
            if not scene:
                context.route("**/scene/**", lambda route: route.abort())
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.goto(run.url, wait_until="domcontentloaded")
            return page

        yield open_one


def running(page: Any, run: Run) -> None:
    """Until an episode runs and the arm moves."""
    begin(page)
    wait(run.moves, run.said)


def test_the_tiles_move_and_the_line_tells(run: Run, open_page: Callable[..., Any]) -> None:
    """Both cameras' pictures follow each other, and the status line knows the run."""
    page = open_page()
    running(page, run)
    before = {camera: frames(page, camera) for camera in ("front", "wrist")}
    picture = "() => document.querySelector('[data-camera=front] canvas').toDataURL()"
    first = page.evaluate(picture)
    wait(lambda: all(frames(page, camera) >= before[camera] + 10 for camera in before))
    assert page.evaluate(picture) != first
    assert "numpy_test" in page.inner_text("#server")
    assert float(page.inner_text("#rate").split()[0]) > 5
    assert page.inner_text("#connection") == "connected"
    assert "of 100" in page.inner_text("#episode")
    wait(lambda: "ms" in page.inner_text("#roundtrip"))
    assert page.locator("#plots canvas").count() == 6


@pytest.mark.parametrize("how", ["click", "space"])
def test_after_a_stop_the_servos_are_told_nothing_new(
    run: Run, open_page: Callable[..., Any], how: str
) -> None:
    """In the servos' own log: the arm moves up to the press, and once the page says that it stands no goal changes."""
    page = open_page()
    for _ in range(3):
        running(page, run)
        pressed = press(page, how).at
        phase(page, "judging")
        stands = time.monotonic()
        # Half a second are fifteen ticks.
        time.sleep(0.5)
        changes = run.changes()
        assert any(pressed - 1.0 < at < pressed for at in changes)
        assert max(changes) < stands
        print(f"{how}: last new goal {max(changes) - pressed:+.3f} s after the press")


def test_typing_a_note_stops_nothing(run: Run, open_page: Callable[..., Any]) -> None:
    """The space bar belongs to whoever types; elsewhere it stops, also on a button that has the focus."""
    page = open_page()
    running(page, run)
    page.click("#note")
    page.keyboard.type("a b c")
    assert page.input_value("#note") == "a b c"
    assert page.evaluate("document.body.dataset.phase") == "running"
    page.keyboard.press("Escape")
    page.focus("#hold")
    page.keyboard.press("Space")
    phase(page, "judging")


@pytest.mark.slow
def test_two_browsers_see_and_steer_the_same(run: Run, open_page: Callable[..., Any]) -> None:
    """Hold in one and Resume in the other; the note and the judgement of one are seen in both."""
    one, other = open_page(), open_page()
    running(one, run)
    one.click("#hold")
    phase(other, "paused")
    wait(lambda: not run.moves())
    other.click("#hold")
    phase(one, "running")
    wait(run.moves)
    assert one.inner_text("#episode") == other.inner_text("#episode")
    other.fill("#note", "grasped too high")
    other.click("#failure")
    for page in (one, other):
        phase(page, "judging")
        page.wait_for_selector("#failure[aria-pressed=true]")
        assert page.get_attribute("#success", "aria-pressed") == "false"


def test_reset_begins_the_next_episode(run: Run, open_page: Callable[..., Any]) -> None:
    """At once, and only once: the episode after it is not reset by the same click."""
    page = open_page()
    running(page, run)
    number = int(page.inner_text("#episode").split()[0])
    page.click("#start")
    page.wait_for_function(
        f"() => document.getElementById('episode').textContent.startsWith('{number + 1} ')"
    )
    running(page, run)
    frames_then = frames(page, "front")
    wait(lambda: frames(page, "front") > frames_then + 30)
    assert page.inner_text("#episode").startswith(f"{number + 1} ")
    assert page.evaluate("document.body.dataset.phase") == "running"


@pytest.mark.slow
def test_the_prompt_waits_for_the_end_of_the_episode(run: Run, open_page: Callable[..., Any]) -> None:
    """This policy reads none: locked while an episode runs, editable between two, kept for the next one."""
    page = open_page()
    running(page, run)
    page.wait_for_selector("#prompt:disabled")
    page.click("#stop")
    phase(page, "judging")
    page.fill("#prompt", "lift the blue cube")
    page.click("#setprompt")
    page.wait_for_function("() => document.getElementById('prompt').value === 'lift the blue cube'")
    other = open_page()
    other.wait_for_function("() => document.getElementById('prompt').value === 'lift the blue cube'")


@pytest.mark.slow
def test_judgements_reach_the_record(run: Run, open_page: Callable[..., Any]) -> None:
    """Success and Failure with their notes, for the episodes that they were given for; then the run ends from the page."""
    page = open_page()
    page.on("dialog", lambda dialog: dialog.accept())
    judged = {}
    for name, note in (("success", "clean"), ("failure", "slipped")):
        running(page, run)
        page.click("#stop")
        phase(page, "judging")
        page.fill("#note", note)
        page.click(f"#{name}")
        page.wait_for_selector(f"#{name}[aria-pressed=true]")
        judged[int(page.inner_text("#episode").split()[0]) - 1] = (name == "success", note)
    page.click("#quit")
    assert run.client.wait(60) == 0, run.client.output
    phase(page, "lost")
    assert "waits for it" in page.inner_text("#notice")
    summary = json.loads(next(run.records.glob("*/summary.json")).read_text())
    found = {
        entry["episode"]: (entry["success"], entry["note"])
        for entry in summary["episodes"]
        if entry["episode"] in judged
    }
    assert found == judged
