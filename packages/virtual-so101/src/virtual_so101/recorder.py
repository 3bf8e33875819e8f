"""Writes episodes as a LeRobot v3.0 dataset that survives being killed.

LeRobot's writer leaves files without footers until it is finalised, so a recording that is killed would be lost
as a whole. Every `CHECKPOINT` episodes this recorder finalises, notes which files are complete, keeps a copy
of `meta/`, and goes on in new files; on the next start whatever came after the last note is dropped.

The note is `virtual_so101.json` in the dataset's root: it stays, and says with which seeds it was recorded.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CHECKPOINT", "Frame", "Provenance", "Recorder", "RecordingError"]

# Episodes between two points from which a killed recording can go on.
CHECKPOINT = 10
# Frames: longer than any task's episode.
_QUEUE = 4096
_NOTE = "virtual_so101.json"
# Copies of `meta/`, named by the number of episodes that they describe.
_META_COPY = ".meta_{}"


class RecordingError(RuntimeError):
    """The dataset cannot be written as asked; the message says why and what to do."""


@dataclass
class Provenance:
    """How a dataset was recorded, and how far; `settings` must be the same when it is continued."""

    settings: dict[str, Any]
    # Seeds of the episodes, in order, and those of episodes at which the expert failed.
    seeds: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def next_seed(self) -> int:
        """The first seed that has not been tried."""
        return max([self.settings["first_seed"] - 1, *self.seeds, *self.dropped]) + 1


@dataclass(frozen=True)
class Frame:
    """One tick: what the robot saw, and what it was told then."""

    # Camera -> (H, W, 3) uint8 RGB.
    images: dict[str, np.ndarray]
    # (6,) or (12,) float32, LeRobot's normalised unit.
    state: np.ndarray
    action: np.ndarray


class Recorder:
    """A dataset being written, or continued, under `root`.

    Args:
        root: folder of the dataset; made if it does not exist.
        settings: what identifies the recording; a continued one must have the same.
        names: of the joints in state and action, for example `shoulder_pan.pos`.
        cameras: names, in order; all of one size `(height, width)`.
        crf, gop: H.264 quality (lower is better) and frames from one key frame to the next.
    """

    def __init__(
        self,
        root: Path,
        settings: dict[str, Any],
        *,
        names: Sequence[str],
        cameras: Sequence[str],
        size: tuple[int, int],
        crf: int,
        gop: int,
    ) -> None:
        self.root = root
        self._repo_id = f"local/{root.name}"
        self._task = settings["prompt"]
        vector = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        picture = {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        self._features: dict[str, Any] = {"action": dict(vector), "observation.state": dict(vector)}
        self._features |= {f"observation.images.{camera}": dict(picture) for camera in cameras}
        self._fps, self._robot_type = settings["fps"], settings["robot_type"]
        self._crf, self._gop = crf, gop
        self._dataset: Any = None
        self.provenance = self._restore(settings)

    @property
    def episodes(self) -> int:
        """Episodes written so far."""
        return len(self.provenance.seeds)

    def add(self, seed: int, frames: Iterable[Frame]) -> None:
        """Write one episode; an iterator that lets go of its frames keeps memory at one copy of the pictures."""
        dataset = self._open()
        for frame in frames:
            values = {"action": frame.action, "observation.state": frame.state, "task": self._task}
            values |= {f"observation.images.{name}": image for name, image in frame.images.items()}
            dataset.add_frame(values)
        dataset.save_episode()
        self.provenance.seeds.append(seed)
        if self.episodes % CHECKPOINT == 0:
            self.checkpoint()

    def drop(self, seed: int) -> None:
        """Note that the expert failed on a seed."""
        self.provenance.dropped.append(seed)

    def checkpoint(self) -> None:
        """Complete all files, so that the dataset can be read, and continued even after a kill.

        Raises:
            RecordingError: when a video does not hold all frames.
        """
        if self._dataset is None:
            return
        self._dataset.finalize()
        self._dataset = None
        self._check_videos()
        self.provenance.files = sorted(str(path.relative_to(self.root)) for path in self._files())
        # First the copy, then the note that refers to it, then away with the older copy: a kill between two of these
        # leaves a note and the copy that belongs to it.
        copy = self._meta_copy(self.episodes)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.root / "meta", copy)
        self._write_note(self.provenance)
        self._forget_copies(but=copy)

    def finish(self) -> None:
        """Complete the dataset; the copy of `meta/` goes."""
        self.checkpoint()
        self._forget_copies()

    # Files

    def _open(self) -> Any:
        if self._dataset is None:
            try:
                from lerobot.configs.video import RGBEncoderConfig
                from lerobot.datasets.lerobot_dataset import LeRobotDataset
            except ImportError as error:
                raise RecordingError(
                    f"Recording needs LeRobot with its dataset extra, which cannot be imported: {error}. "
                    "Install lerobot[dataset] beside virtual-so101."
                ) from error
            # Frames wait in a queue for the encoder's thread. LeRobot drops those that find it full, so that it must hold
            # a whole episode of any length.
            common: dict[str, Any] = {
                "root": self.root,
                "rgb_encoder": RGBEncoderConfig(vcodec="h264", crf=self._crf, g=self._gop),
                "streaming_encoding": True,
                "encoder_queue_maxsize": _QUEUE,
            }
            if self.episodes:
                self._dataset = LeRobotDataset.resume(self._repo_id, **common)
            else:
                self._dataset = LeRobotDataset.create(
                    self._repo_id, self._fps, self._features, robot_type=self._robot_type, **common
                )
                self._write_note(Provenance(self.provenance.settings))
            # Last: opening a dataset switches the progress bars of its parts on again.
            _quiet()
        return self._dataset

    def _meta_copy(self, episodes: int) -> Path:
        return self.root / _META_COPY.format(episodes)

    def _forget_copies(self, but: Path | None = None) -> None:
        for copy in self.root.glob(_META_COPY.format("*")):
            if copy != but:
                shutil.rmtree(copy)

    def _write_note(self, provenance: Provenance) -> None:
        # Renamed into place: the note is always whole.
        note = self.root / (_NOTE + ".new")
        note.write_text(json.dumps(asdict(provenance), indent=1) + "\n")
        note.replace(self.root / _NOTE)

    def _files(self) -> list[Path]:
        return [
            path for part in ("data", "videos") for path in (self.root / part).rglob("*") if path.is_file()
        ]

    def _restore(self, settings: dict[str, Any]) -> Provenance:
        """The recording under the root as its last checkpoint left it, or a new one."""
        note = self.root / _NOTE
        if not note.exists():
            if self.root.exists() and any(self.root.iterdir()):
                raise RecordingError(
                    f"{self.root} holds something that this command did not record; choose another --root."
                )
            if self.root.exists():
                # LeRobot makes the folder itself and refuses one that exists.
                self.root.rmdir()
            return Provenance(settings)
        kept = Provenance(**json.loads(note.read_text()))
        if kept.settings != settings:
            differing = [key for key in settings if kept.settings.get(key) != settings[key]]
            raise RecordingError(
                f"{self.root} was recorded with other settings ({', '.join(differing) or 'unknown ones'}): "
                "give the same ones to continue it, or choose another --root."
            )
        if not kept.seeds:
            # Killed before its first checkpoint: nothing in it is whole.
            shutil.rmtree(self.root)
            return kept
        copy = self._meta_copy(len(kept.seeds))
        if copy.is_dir():
            shutil.rmtree(self.root / "meta", ignore_errors=True)
            shutil.copytree(copy, self.root / "meta")
        else:
            # A finished recording has no copy, as its `meta/` is whole: from here on it can be torn again.
            shutil.copytree(self.root / "meta", copy)
        self._forget_copies(but=copy)
        for path in self._files():
            if str(path.relative_to(self.root)) not in kept.files:
                path.unlink()
        for leftover in [*self.root.glob("tmp*"), self.root / "images"]:
            shutil.rmtree(leftover, ignore_errors=True)
        return kept

    def _check_videos(self) -> None:
        """LeRobot's encoder drops frames that it has no room for, and only logs it: count them."""
        import av

        expected = json.loads((self.root / "meta" / "info.json").read_text())["total_frames"]
        for folder in (self.root / "videos").iterdir():
            found = 0
            for path in folder.rglob("*.mp4"):
                with av.open(str(path)) as container:
                    found += container.streams.video[0].frames
            if found != expected:
                raise RecordingError(
                    f"The videos of {folder.name} hold {found} frames instead of {expected}. Run the command "
                    "again: it goes on from the last checkpoint."
                )


def _quiet() -> None:
    """Keep encoder statistics and other libraries' progress bars from drowning our own."""
    import logging

    logging.getLogger("lerobot").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        import av.logging

        # The level of the library itself: LeRobot takes PyAV's own log handler away after each episode.
        av.logging.set_libav_level(av.logging.ERROR)
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
