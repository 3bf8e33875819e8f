"""The evaluation record: what happened in each episode and how it was judged, one folder for a run.

    <date_time>/summary.json      the run, its episodes, the success rate; replaced as a whole after each episode
                metrics.jsonl     one line for each tick
                videos/episode_000000_<camera>.mp4
                episode_000000_actions.png

Life cycle: a consumer of the sidecar; everything is on disk while it happens. An episode whose entry has no `outcome` was
torn: its lines and videos are there up to that moment. Plots are drawn by a process of their own, so that nothing here waits
for them. Error policy: see `Runner`; a dataset that cannot be written is said once and left alone.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError
from env_client.record.dataset_writer import DatasetWriter, EpisodeRows
from env_client.record.files import JsonLines, RunFolder, plain, write_json
from env_client.record.statistics import wilson
from env_client.record.steps import RECORDED, measured, rounded, step
from env_client.record.video import EpisodeVideos
from env_client.sidecar.config import RecordConfig
from env_client.sidecar.types import EpisodeEnd, EpisodeStart, Mark, RunInfo, TickData

__all__ = ["FORMAT", "EvaluationRecord", "success_rate"]

FORMAT = "grasp-cube evaluation record 1"
# Plots that take longer at the end are given up, seconds; `report` draws what is missing.
_PLOT_S = 40.0


def success_rate(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the episodes that somebody or something judged; the interval is `wilson`'s."""
    judged = [entry["success"] for entry in episodes if entry["success"] is not None]
    return {
        "judged": len(judged),
        "successes": sum(judged),
        "rate": sum(judged) / len(judged) if judged else None,
        "interval_95": wilson(sum(judged), len(judged)),
        "method": "Wilson score interval (Wilson 1927)",
    }


class EvaluationRecord:
    """Writes one run."""

    def __init__(
        self, config: RecordConfig, folder: RunFolder, say: Callable[[str], None] = lambda line: None
    ) -> None:
        if config.videos and find_spec("av") is None:
            say("No videos and no dataset: PyAV is not installed (pip install 'env-client[record]').")
            config = replace(config, videos=False, dataset_path=None)
        # What takes a second to import is imported before anything moves.
        if config.videos:
            importlib.import_module("av")
        if config.dataset_path is not None:
            importlib.import_module("pyarrow.parquet")
        self.folder: Path | None = None
        self._config, self._run_folder, self._say = config, folder, say
        self._run: RunInfo | None = None
        self._lines: JsonLines | None = None
        self._episodes: list[dict[str, Any]] = []
        self._finished = False
        # The running episode, and the one that ended last; of either of them the rest.
        self._entry: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None
        self._videos: EpisodeVideos | None = None
        self._states, self._actions = array("f"), array("f")
        self._last_sent: np.ndarray | None = None
        self._dataset: DatasetWriter | None = None
        self._dataset_failed = config.dataset_path is None
        # Whether the episode that ended last is in it.
        self._in_dataset = False
        # Episodes without a plot yet, and the process that draws: never more than one, however short episodes are.
        self._undrawn: list[int] = []
        self._drawing: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------------------------------- the consumer

    def begin_run(self, run: RunInfo) -> None:
        self._run = run
        self.folder = self._run_folder.make(run.run_id)
        self._say(f"Evaluation record: {self.folder}")
        (self.folder / "videos").mkdir()
        self._write_summary()
        self._lines = JsonLines(self.folder / "metrics.jsonl")

    def begin_episode(self, start: EpisodeStart) -> None:
        assert self._run is not None
        assert self.folder is not None
        self._entry = plain(start) | {
            "outcome": None,
            "success": None,
            "judged_by": None,
            "note": "",
            "ticks": 0,
            "frames": 0,
            "ticks_without_pictures": 0,
            "ticks_lost": 0,
        }
        self._episodes.append(self._entry)
        self._ended, self._in_dataset = None, False
        self._states, self._actions, self._last_sent = array("f"), array("f"), None
        if self._config.videos:
            key_frames = 10 if self._config.dataset_path is None else 2
            self._videos = EpisodeVideos(
                self.folder / "videos",
                start.episode,
                self._run.cameras,
                self._run.fps,
                key_frames=key_frames,
            )
        self._write_summary()

    def tick(self, tick: TickData) -> None:
        entry, run = self._entry, self._run
        if entry is None or tick.phase not in RECORDED or self._lines is None or run is None:
            return
        frame = None if self._videos is None else self._videos.add(tick)
        entry["prompt"] = entry["prompt"] or tick.prompt
        entry["ticks"] += 1
        entry["ticks_lost"] += tick.lost
        entry["frames"] += frame is not None
        entry["ticks_without_pictures"] += self._videos is not None and bool(run.cameras) and frame is None
        pose = measured(run, tick)
        self._lines.write(step(tick) | {"measured": rounded(pose), "frame": frame})
        if tick.sent is not None:
            self._last_sent = tick.sent
        if frame is not None and not self._dataset_failed:
            self._keep_row(tick, pose)

    def end_episode(self, end: EpisodeEnd) -> None:
        entry = self._entry
        if entry is None:
            return
        self._entry = None
        self._ended = entry
        said = {name: entry[name] for name in ("success", "judged_by") if entry["judged_by"] == "person"}
        known = end.result.get("success")
        entry |= plain(end.result) | {"judged_by": None if known is None else "env"} | said
        if self._videos is not None:
            self._videos.close()
            self._put_into_dataset(self._videos)
        self._write_summary()
        self._undrawn.append(end.episode)
        self._draw()

    def mark(self, mark: Mark) -> None:
        for judged in reversed(self._episodes):
            if judged["episode"] == mark.episode:
                judged |= {"success": mark.success, "note": mark.note, "judged_by": "person"}
                if self._videos is not None and judged is self._ended:
                    self._put_into_dataset(self._videos)
                self._write_summary()
                return

    def state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        if self._entry is not None:
            self._entry["outcome"] = "torn: the run broke off"
            self._entry = None
        if self._videos is not None:
            self._videos.close()
        if self._lines is not None:
            self._lines.close()
        self._finished = True
        if self.folder is not None:
            self._write_summary()
        self._finish_drawing()
        self._draw()
        self._finish_drawing()

    # ----------------------------------------------------------------------------------------- the parts

    def _write_summary(self) -> None:
        assert self.folder is not None
        summary = {
            "format": FORMAT,
            "state": "finished" if self._finished else "running",
            "success": success_rate(self._episodes),
            "episodes": self._episodes,
            "run": self._run,
        }
        write_json(self.folder / "summary.json", summary)

    def _draw(self) -> None:
        """Draw what waits, unless something is being drawn; then the next episode's end comes back to it."""
        busy = self._drawing is not None and self._drawing.poll() is None
        if busy or not self._undrawn or not self._config.plots or self.folder is None:
            return
        command = [sys.executable, "-m", "env_client.record.episode_plot", str(self.folder)]
        self._drawing = subprocess.Popen([*command, *map(str, self._undrawn)], stdin=subprocess.DEVNULL)
        self._undrawn = []

    def _finish_drawing(self) -> None:
        if self._drawing is None:
            return
        try:
            self._drawing.wait(_PLOT_S)
        except subprocess.TimeoutExpired:
            self._drawing.kill()
            self._drawing.wait()

    def _keep_row(self, tick: TickData, pose: np.ndarray | None) -> None:
        """The numbers that belong to a video's frame: what was commanded, and where nothing was, the pose."""
        assert self._run is not None
        action = self._last_sent if self._last_sent is not None else pose
        if action is None:
            action = np.zeros(len(self._run.action_names), np.float32)
        self._actions.extend(np.asarray(action, np.float32).tolist())
        if tick.state is not None:
            self._states.extend(tick.state.tolist())

    def _put_into_dataset(self, videos: EpisodeVideos) -> None:
        """Bring the dataset in line with how the episode that ended last was judged."""
        entry = self._ended
        if self._dataset_failed or entry is None:
            return
        if not videos.frames:
            self._say(
                f"Episode {entry['episode']} is not in the dataset: it holds no tick with all pictures."
            )
            return
        left_out = self._config.skip_failed and entry["success"] is False
        try:
            if self._in_dataset and self._dataset is not None:
                if left_out:
                    self._dataset.remove_last()
                else:
                    self._dataset.judge(entry["success"], entry["note"])
            elif not left_out:
                self._add_to_dataset(entry, videos)
            self._in_dataset = not left_out
        except (EnvError, OSError) as error:
            self._dataset_failed = True
            self._say(f"Episode {entry['episode']} is not in the dataset, nor are those after it: {error}")

    def _add_to_dataset(self, entry: dict[str, Any], videos: EpisodeVideos) -> None:
        assert self._run is not None
        assert self._config.dataset_path is not None
        rows = EpisodeRows(
            states=np.array(self._states, np.float32).reshape(-1, sum(self._run.states.values())),
            actions=np.array(self._actions, np.float32).reshape(-1, len(self._run.action_names)),
            prompt=entry["prompt"],
        )
        if self._dataset is None:
            self._dataset = DatasetWriter(self._config.dataset_path, self._run, videos.sizes)
            self._say(f"Dataset: {self._dataset.root} ({self._dataset.episodes} episodes so far)")
        self._dataset.add(rows, videos, success=entry["success"], note=entry["note"])
