"""The report as a person opens it: in a browser, on a laptop and on a phone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from env_client.record.evaluation import EvaluationRecord
from env_client.record.files import RunFolder
from env_client.record.report import main, read_run
from env_client.sidecar.config import RecordConfig
from env_client.sidecar.types import Mark
from playwright.sync_api import Page, sync_playwright
from record_parts import begin, play, run_info, ticks

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def record(folder: Path, name: str, **info: object) -> Path:
    """Two judged episodes and a torn one."""
    run = EvaluationRecord(RecordConfig(plots=False), RunFolder(folder))
    run.begin_run(run_info(run_id=name, **info))
    play(run, 0, 20)
    run.mark(Mark(0, True, "neat <b>& quick</b>"))
    play(run, 1, 15)
    run.mark(Mark(1, False))
    begin(run, 2)
    for tick in ticks(2, 12):
        run.tick(tick)
    run.close()
    return folder / name


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("records")
    return record(folder, "first"), record(folder, "second", config={"execution": "sync", "port": 8000})


@pytest.fixture(scope="module")
def page(records: tuple[Path, Path]):
    """A page of a headless browser."""
    if not CHROMIUM.exists():
        pytest.skip("no chromium here")
    with sync_playwright() as play_wright:
        browser = play_wright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        yield page
        browser.close()


@pytest.mark.parametrize(("width", "runs"), [(1280, 2), (390, 2), (390, 1)])
def test_the_page_fits_and_its_videos_play(
    page: Page, records: tuple[Path, Path], tmp_path: Path, width: int, runs: int
) -> None:
    """Nothing sticks out, every picture is drawn, every video is playable, all of it inside one file."""
    output = tmp_path / "alone" / "report.html"
    output.parent.mkdir()
    main([*map(str, records[:runs]), "--output", str(output)])
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(output.as_uri())
    assert page.locator("video").count() == 6 * runs
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(video => video.readyState >= 1)"
    )
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.duration > 0.3)")
    page.wait_for_function(
        "() => [...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    side_by_side = page.evaluate(
        "new Set([...document.querySelectorAll('section.card h3')].slice(0, 2).map(h => h.offsetTop)).size === 1"
    )
    assert side_by_side == (width == 1280)


def test_what_it_says(page: Page, records: tuple[Path, Path], tmp_path: Path) -> None:
    """Rate and interval, each episode with its judgement and note as they were typed, what is torn, what differs."""
    output = tmp_path / "report.html"
    main([*map(str, records), "--output", str(output), "--videos", "none"])
    page.goto(output.as_uri())
    text = page.inner_text("body")
    assert "50 %" in text
    assert "95 % interval 9 to 91 %" in text
    assert "neat <b>& quick</b>" in text
    assert "Episode 2 is torn" in text
    # What the two were told differently, each in its own column.
    assert page.locator("dl.facts dd", has_text=re.compile("^sync$")).count() == 1
    assert page.locator("dl.facts dd", has_text=re.compile("^8000$")).count() == 1
    assert page.locator("video").count() == 0
    assert page.locator(".tag.good").count() == 4


def test_large_videos_stay_beside_the_page(records: tuple[Path, Path]) -> None:
    """Their address is relative, so that the folder can be sent as it is."""
    run = read_run(records[0], records[0], "link")
    assert run.episodes[0].videos["front"] == "videos/episode_000000_front.mp4"


def test_a_folder_that_is_no_record_is_one_sentence(tmp_path: Path) -> None:
    """What came and what was expected, with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "env_client.record.report", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"report: {tmp_path} holds no summary.json")
    assert done.stderr.count("\n") == 1


EVIL = "<script>alert(1)</script>"


def test_a_record_of_somebody_else_s_runs_nothing(tmp_path: Path) -> None:
    """Whatever text it holds is shown as text; what is no number where one belongs is refused."""
    folder = record(tmp_path, "run", robot=EVIL, prompt=EVIL, config={EVIL: EVIL}, policy={EVIL: EVIL})
    summary = json.loads((folder / "summary.json").read_text())
    for entry in summary["episodes"]:
        entry |= {"outcome": EVIL, "note": EVIL, "judged_by": EVIL}
    (folder / "summary.json").write_text(json.dumps(summary))
    main([str(folder), "--videos", "none"])
    assert "<script" not in (folder / "report.html").read_text()
    summary["episodes"][0]["episode"] = EVIL
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit) as caught:
        main([str(folder), "--videos", "none"])
    assert caught.value.code == 2
