"""The inference log: every step of every episode, with the pictures, one folder for a run.

    session_<date>_<time>/metadata.json         the run, and its episodes with how they ended
                          inference_log.jsonl   one line for each step
                          images/frame_000000/<camera>.jpg

Life cycle: a consumer of the sidecar. A line is written after its pictures, so that what a line names is there. An
episode whose entry in `metadata.json` has no `ended` was torn. Error policy: see `Runner`; a full disk ends the log.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from env_client.record.files import JsonLines, make_run_folder, plain, write_json
from env_client.record.steps import RECORDED, rounded, step
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData

__all__ = ["FORMAT", "InferenceLog"]

FORMAT = "grasp-cube inference log 1"


class InferenceLog:
    """Writes one run."""

    def __init__(self, parent: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder: Path | None = None
        self._parent, self._say = parent, say
        self._lines: JsonLines | None = None
        self._metadata: dict[str, Any] = {}
        self._episodes: list[dict[str, Any]] = []
        self._running = False
        self._frame = 0

    def begin_run(self, run: RunInfo) -> None:
        self.folder = make_run_folder(self._parent, f"session_{run.run_id}")
        self._say(f"Inference log: {self.folder}")
        self._metadata = {"format": FORMAT} | plain(run)
        self._write_metadata()
        self._lines = JsonLines(self.folder / "inference_log.jsonl")

    def begin_episode(self, start: EpisodeStart) -> None:
        self._episodes.append(plain(start) | {"ended": None, "success": None, "note": ""})
        self._write_metadata()
        self._running = True

    def tick(self, tick: TickData) -> None:
        if not self._running or tick.phase not in RECORDED or self._lines is None or self.folder is None:
            return
        frame = self._frame
        self._frame += 1
        images = {}
        if tick.images:
            folder = self.folder / "images" / f"frame_{frame:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            for camera in tick.images:
                path = folder / f"{camera}.jpg"
                path.write_bytes(tick.jpeg(camera))
                images[camera] = str(path.relative_to(self.folder))
        line = {"frame": frame} | step(tick)
        line |= {
            "prompt": tick.prompt,
            "state": rounded(tick.state),
            "stages": {name: rounded(target) for name, target in tick.stages.items()},
            "images": images,
            "image_age": {name: round(age, 4) for name, age in tick.image_age.items()},
            "capture_time": tick.capture_time,
        }
        if tick.chunk is not None:
            # `capture_time` says which line's observation it answers.
            line["chunk"] = {
                "chunk_id": tick.chunk_id,
                "capture_time": tick.chunk_capture_time,
                "actions": rounded(tick.chunk),
            }
        self._lines.write(line)

    def end_episode(self, end: EpisodeEnd) -> None:
        self._running = False
        self._episodes[-1] |= {
            "ended": end.result.get("outcome"),
            "success": end.result.get("success"),
            "frames": self._frame,
        }
        self._write_metadata()

    def mark(self, mark: Mark) -> None:
        for entry in reversed(self._episodes):
            if entry["episode"] == mark.episode:
                entry |= {"success": mark.success, "note": mark.note}
                self._write_metadata()
                return

    def state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._running:
            self._episodes[-1]["ended"] = "torn: the run broke off"
            self._write_metadata()

    def _write_metadata(self) -> None:
        assert self.folder is not None
        write_json(self.folder / "metadata.json", self._metadata | {"episodes": self._episodes})
