"""Rollouts as a LeRobot v3.0 dataset, without LeRobot: pyarrow for the numbers, the record's own videos for the pictures.

Each episode has files of its own (LeRobot reads any number of them), so that adding one touches no other, and one that
turns out to have failed can be taken away again. The pictures are not encoded anew: packets are copied.

Life cycle: `add` after an episode, `judge` when somebody says how it went. Files are written beside their places and
moved there one right after the other, the totals in `meta/info.json` last; what a killed process left behind beyond
those totals is removed by the next writer. Error policy: `EnvError` in a sentence for a folder that cannot be
continued, `OSError` for a disk that is full.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.env import EnvError
from env_client.record.files import read_json, write_json
from env_client.record.statistics import merge_stats, vector_stats
from env_client.record.video import EpisodeVideos
from env_client.sidecar.types import RunInfo

__all__ = ["DatasetWriter", "EpisodeRows"]

_FILES_IN_A_CHUNK = 1000
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODE = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_PART = ".part"
# LeRobot reads the tasks as a pandas frame whose index is the prompt.
_TASKS_FRAME = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {
            "name": "task",
            "field_name": "task",
            "pandas_type": "unicode",
            "numpy_type": "object",
            "metadata": None,
        },
    ],
    "pandas_version": "2.2.0",
}


@dataclass(frozen=True)
class EpisodeRows:
    """The numbers of an episode's T video frames."""

    # (T, n) and (T, A) float32
    states: np.ndarray
    actions: np.ndarray
    prompt: str


class DatasetWriter:
    """One dataset folder, for one kind of robot. `episodes` counts those that are in it."""

    def __init__(self, root: Path, run: RunInfo, sizes: dict[str, tuple[int, int]]) -> None:
        """`sizes`: {camera: (height, width)}. Raises `EnvError` when the folder holds something else."""
        self.root = root
        self._run = run
        self._keys = {camera: f"observation.images.{camera}" for camera in sizes}
        self._info = _info(run, sizes)
        self._tasks: list[str] = []
        # {episode: its statistics}, in order.
        self._stats: dict[int, dict[str, Any]] = {}
        self._frames: list[int] = []
        self._last: tuple[int, dict[str, Any]] | None = None
        if (root / "meta" / "info.json").exists():
            self._continue()
        elif root.exists() and any(root.iterdir()):
            raise EnvError(f"{root} holds files and is no LeRobot dataset: name a new --record.dataset-path")

    @property
    def episodes(self) -> int:
        return len(self._frames)

    def check_writable(self) -> None:
        """Raise `EnvError` when the folder cannot be written to."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise EnvError(
                f"the dataset folder {self.root} cannot be written ({error.strerror or error}): name another "
                "--record.dataset-path"
            ) from error

    def add(self, rows: EpisodeRows, videos: EpisodeVideos, *, success: bool | None, note: str = "") -> int:
        """The index of the new episode, which must have frames."""
        length = min(len(rows.actions), videos.frames)
        index, begin = self.episodes, sum(self._frames)
        if rows.prompt not in self._tasks:
            self._tasks.append(rows.prompt)
        stats = {"action": vector_stats(rows.actions[:length])}
        if "observation.state" in self._info["features"]:
            stats["observation.state"] = vector_stats(rows.states[:length])
        for camera, key in self._keys.items():
            stats[key] = videos.stats[camera].result()
            _copy_packets(videos.paths[camera], self._part(_VIDEO, index, key), self._run.fps)
        row = {
            "episode_index": index,
            "tasks": [rows.prompt],
            "length": length,
            "success": success,
            "note": note,
            "dataset_from_index": begin,
            "dataset_to_index": begin + length,
        }
        self._write_numbers(index, rows, length, row)
        self._write_episode(row, stats)
        for key in self._keys.values():
            _into_place(self._part(_VIDEO, index, key))
        _into_place(self._part(_DATA, index))
        _into_place(self._part(_EPISODE, index))
        self._frames.append(length)
        self._stats[index] = stats
        self._write_totals()
        self._last = (index, {"rows": rows, "length": length, "row": row, "stats": stats})
        return index

    def judge(self, success: bool | None, note: str) -> None:
        """What the episode that was added last came to."""
        if self._last is None:
            return
        index, kept = self._last
        kept["row"] |= {"success": success, "note": note}
        self._write_numbers(index, kept["rows"], kept["length"], kept["row"])
        self._write_episode(kept["row"], kept["stats"])
        _into_place(self._part(_DATA, index))
        _into_place(self._part(_EPISODE, index))

    def remove_last(self) -> None:
        """Take away the episode that was added last."""
        if self._last is None:
            return
        index, _ = self._last
        self._last = None
        self._frames.pop()
        del self._stats[index]
        for path in self._files_of(index):
            path.unlink(missing_ok=True)
        self._write_totals()

    # ------------------------------------------------------------------------------------------ files

    def _path(self, template: str, index: int, key: str = "") -> Path:
        chunk, file = divmod(index, _FILES_IN_A_CHUNK)
        return self.root / template.format(video_key=key, chunk_index=chunk, file_index=file)

    def _part(self, template: str, index: int, key: str = "") -> Path:
        path = self._path(template, index, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(path.name + _PART)

    def _files_of(self, index: int) -> list[Path]:
        videos = [self._path(_VIDEO, index, key) for key in self._keys.values()]
        return [self._path(_EPISODE, index), self._path(_DATA, index), *videos]

    def _write_numbers(self, index: int, rows: EpisodeRows, length: int, row: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        number = np.arange(length)
        columns = {"action": _vectors(rows.actions[:length])}
        if "observation.state" in self._info["features"]:
            columns["observation.state"] = _vectors(rows.states[:length])
        task = self._tasks.index(rows.prompt)
        columns |= {
            # As gymnasium has it: whether the task is solved after this tick.
            "next.success": pa.array((number == length - 1) & (row["success"] is True)),
            "timestamp": pa.array((number / self._run.fps).astype(np.float32)),
            "frame_index": pa.array(number),
            "episode_index": pa.array(np.full(length, index)),
            "index": pa.array(row["dataset_from_index"] + number),
            "task_index": pa.array(np.full(length, task)),
        }
        pyarrow.parquet.write_table(pa.table(columns), self._part(_DATA, index))

    def _write_episode(self, row: dict[str, Any], stats: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        chunk, file = divmod(row["episode_index"], _FILES_IN_A_CHUNK)
        columns = {name: pa.array([value]) for name, value in row.items() if name not in ("success", "note")}
        columns |= {"success": pa.array([row["success"]], pa.bool_()), "note": pa.array([row["note"]])}
        places = ["data", "meta/episodes", *(f"videos/{key}" for key in self._keys.values())]
        for place in places:
            columns[f"{place}/chunk_index"] = pa.array([chunk])
            columns[f"{place}/file_index"] = pa.array([file])
        for key in self._keys.values():
            columns[f"videos/{key}/from_timestamp"] = pa.array([0.0])
            columns[f"videos/{key}/to_timestamp"] = pa.array([row["length"] / self._run.fps])
        for feature, values in stats.items():
            for name, value in values.items():
                columns[f"stats/{feature}/{name}"] = pa.array([value])
        pyarrow.parquet.write_table(pa.table(columns), self._part(_EPISODE, row["episode_index"]))

    def _write_totals(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        meta = self.root / "meta"
        tasks = pa.table({"task_index": pa.array(range(len(self._tasks)), pa.int64()), "task": self._tasks})
        tasks = tasks.replace_schema_metadata({"pandas": json.dumps(_TASKS_FRAME)})
        pyarrow.parquet.write_table(tasks, meta / "tasks.parquet.part")
        _into_place(meta / "tasks.parquet.part")
        everything = list(self._stats.values())
        if everything:
            features = {name: merge_stats([stats[name] for stats in everything]) for name in everything[0]}
            write_json(meta / "stats.json", features)
        self._info |= {
            "total_episodes": self.episodes,
            "total_frames": sum(self._frames),
            "total_tasks": len(self._tasks),
            "splits": {"train": f"0:{self.episodes}"},
        }
        write_json(meta / "info.json", self._info)

    # ------------------------------------------------------------------------------- an earlier run's

    def _continue(self) -> None:
        import pyarrow.parquet

        path = self.root / "meta" / "info.json"
        try:
            there = read_json(path)
        except (OSError, ValueError) as error:
            raise EnvError(f"{path} cannot be read ({error}): name a new --record.dataset-path") from error
        if not isinstance(there, dict):
            raise EnvError(f"{path} holds no map: name a new --record.dataset-path")
        for name in ("features", "fps", "robot_type", "data_path"):
            if there.get(name) != self._info[name]:
                raise EnvError(
                    f"the dataset {self.root} has other {name} ({there.get(name)!r:.200}) than this run "
                    f"({self._info[name]!r:.200}): name a new --record.dataset-path"
                )
        for index in range(int(there["total_episodes"])):
            episode = self._path(_EPISODE, index)
            try:
                row = pyarrow.parquet.read_table(episode).to_pylist()[0]
            except (OSError, ValueError, IndexError) as error:
                raise EnvError(
                    f"{episode} cannot be read ({error}): name a new --record.dataset-path"
                ) from error
            self._frames.append(int(row["length"]))
            self._stats[index] = _stats_in(row)
        try:
            tasks = pyarrow.parquet.read_table(self.root / "meta" / "tasks.parquet").to_pylist()
        except (OSError, ValueError) as error:
            raise EnvError(
                f"{self.root / 'meta' / 'tasks.parquet'} cannot be read ({error}): name a new --record.dataset-path"
            ) from error
        self._tasks = [row["task"] for row in sorted(tasks, key=lambda row: row["task_index"])]
        # What a process that was killed left behind.
        for path in self._files_of(self.episodes):
            path.unlink(missing_ok=True)
        for path in self.root.rglob(f"*{_PART}"):
            path.unlink()


def _info(run: RunInfo, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What `meta/info.json` says, without the totals."""
    state_names = [f"{part}.{place}" for part, size in run.states.items() for place in range(size)]
    for place, index in enumerate(run.state_index.tolist()):
        state_names[index] = run.action_names[place]
    features: dict[str, Any] = {"action": _feature("float32", len(run.action_names), run.action_names)}
    if state_names:
        features["observation.state"] = _feature("float32", len(state_names), state_names)
    rate = int(run.fps) if float(run.fps).is_integer() else run.fps
    for camera, (height, width) in sizes.items():
        features[f"observation.images.{camera}"] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.fps": rate,
                "video.channels": 3,
                "has_audio": False,
                "is_depth_map": False,
            },
        }
    features["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        kind = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": kind, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "fps": rate,
        "features": features,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": _FILES_IN_A_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": _DATA,
        "video_path": _VIDEO,
        "robot_type": run.robot,
        "splits": {},
    }


def _feature(kind: str, size: int, names: Sequence[str]) -> dict[str, Any]:
    return {"dtype": kind, "shape": [size], "names": list(names)}


def _stats_in(row: dict[str, Any]) -> dict[str, Any]:
    stats: dict[str, Any] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            _, feature, name = column.split("/")
            stats.setdefault(feature, {})[name] = value
    return stats


def _vectors(values: np.ndarray) -> Any:
    """(T, n) as a column of fixed-size lists, as LeRobot writes them; a single value stands by itself."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _copy_packets(source: Path, target: Path, fps: float) -> None:
    """The same pictures, one right after the other at `fps`."""
    import av

    step = 1 / Fraction(fps).limit_denominator(1000)
    with av.open(str(source)) as read, av.open(str(target), "w", format="mp4") as write:
        pictures = read.streams.video[0]
        stream = write.add_stream_from_template(pictures)
        number = 0
        for packet in read.demux(pictures):
            if packet.dts is None:
                continue
            packet.stream, packet.time_base = stream, step
            packet.pts = packet.dts = number
            packet.duration = 1
            number += 1
            write.mux(packet)


def _into_place(part: Path) -> None:
    os.replace(part, part.with_name(part.name.removesuffix(_PART)))
