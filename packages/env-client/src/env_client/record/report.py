"""`report DIR [DIR2]`: one HTML page of an evaluation record, or of two side by side, to send to a colleague.

Everything is inside the page: plots, figures, and the videos while they are small (`--videos` decides). A record whose run
broke off is shown as far as it goes. Exit codes: 0; 2 with one sentence.
"""

from __future__ import annotations

import argparse
import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_client.cli import fail
from env_client.record.episode_plot import draw_episode, draw_timing, plot_name
from env_client.record.evaluation import FORMAT, success_rate
from env_client.record.files import as_written, read_json, read_lines
from env_client.record.video import video_name
from env_client.text_files import is_file_name

__all__ = ["EpisodePage", "RunPage", "main", "read_run"]

PROG = "report"
# Videos of more than this in all are linked, not embedded.
_EMBEDDED_MB = 60


@dataclass(frozen=True)
class EpisodePage:
    """What the page shows of an episode."""

    # Its entry in summary.json.
    entry: dict[str, Any]
    # {camera: address}, of the videos that there are.
    videos: dict[str, str]
    # Addresses of the plots.
    actions: str | None
    timing: str | None


@dataclass(frozen=True)
class RunPage:
    """What the page shows of a run."""

    name: str
    summary: dict[str, Any]
    episodes: list[EpisodePage]
    # What the reader should know before trusting the figures.
    warnings: list[str]

    @property
    def success(self) -> dict[str, Any]:
        return success_rate([page.entry for page in self.episodes])


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="One HTML page of an evaluation record, or of two."
    )
    parser.add_argument("record", type=Path, help="folder of a record (outputs/eval_records/DATE_TIME)")
    parser.add_argument("other", type=Path, nargs="?", help="a second one, shown beside the first")
    parser.add_argument("--output", type=Path, help="the page; default: report.html in the first folder")
    parser.add_argument(
        "--videos",
        choices=("auto", "embed", "link", "none"),
        default="auto",
        help=f"inside the page, beside it, or not at all; auto embeds up to {_EMBEDDED_MB} MB (default)",
    )
    options = parser.parse_args(argv)
    records = [record for record in (options.record, options.other) if record is not None]
    output: Path = options.output or options.record / "report.html"
    try:
        how = _videos_how(records, options.videos)
        from env_client.record.report_page import page

        with as_written(options.record):
            runs = [read_run(record, output.parent, how) for record in records]
            output.write_text(page(runs), encoding="utf-8")
    except ImportError as error:
        fail(PROG, f"the page needs matplotlib: pip install 'env-client[viz]' ({error})")
    except (OSError, ValueError) as error:
        fail(PROG, str(error))
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB, videos: {how})")


def read_run(record: Path, beside: Path, videos: str) -> RunPage:
    """A record as it stands on disk; plots that are missing are drawn. `videos`: embed, link (relative to `beside`) or
    none. Raises `OSError` and `ValueError` with a sentence where this is no record."""
    path = record / "summary.json"
    if not path.is_file():
        raise ValueError(
            f"{record} holds no summary.json: a folder that run_env_client wrote was expected (outputs/eval_records/…)"
        )
    summary = read_json(path)
    if summary.get("format") != FORMAT:
        raise ValueError(f"{path} is of the format {summary.get('format')!r}; {FORMAT!r} was expected")
    lines = list(read_lines(record / "metrics.jsonl")) if (record / "metrics.jsonl").is_file() else []
    warnings, pages = [], []
    for entry in summary["episodes"]:
        # It becomes part of the page and of files' names.
        number = entry["episode"] = int(entry["episode"])
        ticks = [line for line in lines if line["episode"] == number]
        if entry["outcome"] is None:
            # Nobody was left to write the end: what the lines say is all there is.
            entry |= {"outcome": "torn: the run broke off", "ticks": len(ticks)}
            entry["frames"] = sum(line.get("frame") is not None for line in ticks)
        if str(entry["outcome"]).startswith("torn"):
            warnings.append(f"Episode {number} is torn: it is shown as far as it was recorded.")
        pages.append(
            EpisodePage(
                entry=entry,
                videos=_videos(record, number, summary["run"]["cameras"], beside, videos),
                actions=_picture(_actions(record, number)),
                timing=_picture(draw_timing(ticks)),
            )
        )
    if summary["state"] != "finished":
        warnings.append("The run did not end in order, or is still going on.")
    return RunPage(record.resolve().name, summary, pages, warnings)


def _actions(record: Path, episode: int) -> bytes | None:
    path = record / plot_name(episode)
    if not path.is_file() and draw_episode(record, episode) is None:
        return None
    return path.read_bytes()


def _picture(png: bytes | None) -> str | None:
    return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _videos_how(records: list[Path], wanted: str) -> str:
    if wanted != "auto":
        return wanted
    size = sum(path.stat().st_size for record in records for path in (record / "videos").glob("*.mp4"))
    return "embed" if size <= _EMBEDDED_MB * 1e6 else "link"


def _videos(record: Path, episode: int, cameras: list[str], beside: Path, how: str) -> dict[str, str]:
    paths = {
        camera: record / "videos" / video_name(episode, camera) for camera in cameras if is_file_name(camera)
    }
    there = {camera: path for camera, path in paths.items() if path.is_file() and path.stat().st_size}
    if how == "none":
        return {}
    if how == "link":
        return {camera: Path(os.path.relpath(path, beside)).as_posix() for camera, path in there.items()}
    return {
        camera: f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
        for camera, path in there.items()
    }


if __name__ == "__main__":
    main()
