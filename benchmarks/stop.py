"""From a click on Stop, in Chromium, to the last new goal that the virtual servos were given.

    uv run python benchmarks/stop.py [--presses 20] [--json FILE]

Everything is a real process: `serve_policy`, `run_env_client --env.type virtual` (LeRobot's driver over the servo bus, physics,
two rendered cameras, the page with its records) and a headless browser that presses Stop by click and by space bar in turn. The
moment of a press is the browser's own event time, that of a goal is in the servos' log. At 30 Hz a press waits up to 33 ms for
its tick; below 0 the last goal had left before the press.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy_policy import write_checkpoint
from tqdm import tqdm
from wire import HERE, start_ours

sys.path.insert(0, str(HERE.parent / "tests"))
from page_parts import begin, changed_goals, phase, press

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# What the issue of the page asks for, ms.
ALLOWED_MS = 50.0


class Goals:
    """The servos' log as it grows: moments of this process's monotonic clock at which a goal changed."""

    def __init__(self, path: Path):
        self._path = path
        self._found: list[dict[str, Any]] = []
        # The log's clock may only have started later than the smallest difference seen: a line is read after it was written.
        self._offset = float("inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def changes(self, since: float) -> list[float]:
        moments = [goal["wall"] + self._offset for goal in changed_goals(self._found[-300:])]
        return [at for at in moments if at >= since]

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._path.exists() and not self._over.wait(0.05):
            pass
        with self._path.open() as lines:
            rest = ""
            while not self._over.wait(0.001):
                rest += lines.read()
                *whole, rest = rest.split("\n")
                for event in map(json.loads, whole):
                    self._offset = min(self._offset, time.monotonic() - event["wall"])
                    self._found.append(event)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presses", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, robot(Path(name)) as (url, goals), opened(url) as page:
        pairs = [
            stop(page, goals, "space" if press % 2 else "click")
            for press in tqdm(range(options.presses), desc="presses", unit="press")
        ]
    delays, heard = np.array(pairs).T
    figures = {
        "p50_ms": float(np.percentile(delays, 50)),
        "p95_ms": float(np.percentile(delays, 95)),
        "max_ms": float(delays.max()),
        "heard_p50_ms": float(np.percentile(heard, 50)),
        "heard_max_ms": float(heard.max()),
        "within": int((delays <= ALLOWED_MS).sum()),
        "presses": len(delays),
    }
    print(f"\n{os.cpu_count()} cores, the arm's last new goal after a press on Stop, ms")
    print(f"p50 {figures['p50_ms']:.1f}   p95 {figures['p95_ms']:.1f}   largest {figures['max_ms']:.1f}")
    print(
        f"of this in the browser, before the page heard of it: p50 {figures['heard_p50_ms']:.1f}   ", end=""
    )
    print(f"largest {figures['heard_max_ms']:.1f}")
    print(f"{figures['within']} of {figures['presses']} within {ALLOWED_MS:g} ms")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


@contextmanager
def robot(folder: Path) -> Iterator[tuple[str, Goals]]:
    """(the page's address, the servos' goals) of a whole run."""
    server, port = start_ours(write_checkpoint(folder / "policy", horizon=50))
    command = [sys.executable, "-m", "env_client.run_env_client", "--task", "lift", "--env.type", "virtual"]
    command += [
        "--port",
        str(port),
        "--num-episodes",
        "1000",
        "--episode-time-s",
        "1000",
        "--image-codec",
        "jpeg",
    ]
    command += [
        "--panel.port",
        "0",
        "--log-dir",
        str(folder / "log"),
        "--record.dir",
        str(folder / "records"),
    ]
    command += ["--env.servo-log", str(folder / "servo.jsonl")]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    goals = Goals(folder / "servo.jsonl")
    assert client.stdout is not None
    try:
        said = ""
        for line in client.stdout:
            said += line
            if "Panel: http" in line:
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended without a page:\n{said}")
        rest: list[str] = []
        threading.Thread(target=rest.extend, args=(client.stdout,), daemon=True).start()
        try:
            yield line.split("Panel: ")[1].split()[0], goals
        except Exception as error:
            raise RuntimeError(f"{' '.join(command)} said:\n{said}{''.join(rest)}") from error
    finally:
        client.terminate()
        client.wait(30)
        goals.close()
        server.kill()


@contextmanager
def opened(url: str) -> Iterator[Any]:
    """The page, without the 3D view: software would draw that on the cores that are measured."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(60_000)
        page.route("**/scene/**", lambda route: route.abort())
        page.goto(url, wait_until="domcontentloaded")
        yield page
        browser.close()


def stop(page: Any, goals: Goals, how: str) -> tuple[float, float]:
    """Start an episode, press Stop while the arm moves; milliseconds to the last new goal, and until the page heard of it."""
    begin(page)
    end = time.monotonic() + 60
    while len(goals.changes(time.monotonic() - 0.5)) < 5:
        if time.monotonic() > end:
            raise RuntimeError("the arm does not move")
        time.sleep(0.02)
    pressed = press(page, how)
    phase(page, "judging")
    time.sleep(0.5)
    return (max(goals.changes(pressed.at - 1.0)) - pressed.at) * 1e3, pressed.heard_ms


if __name__ == "__main__":
    main()
