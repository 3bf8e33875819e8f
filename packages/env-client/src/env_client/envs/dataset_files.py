"""Reads LeRobot v3.0 datasets from disk with pyarrow and PyAV: no torch, no LeRobot, no network.

    meta/info.json                  fps, features, path templates
    meta/tasks.parquet              the prompts
    meta/episodes/*/*.parquet       where each episode lies: data file, video file and its start in that video
    data/*/*.parquet                one row per tick (and encoded images where the dataset holds no videos)
    videos/<feature>/*/*.mp4        several episodes one after the other in each file

Life cycle: opening reads the metadata only; `read_episode` reads one episode's numbers, `images` decodes its
frames one by one. Error policy: whatever is missing, cut off or of another version is an `EnvError` in a
sentence that names the file.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from env_client.envs.dataset_tables import open_parquet, read_table, video_frames
from env_client.envs.env import EnvError
from env_client.text_files import is_file_name
from env_client.wire import EncodedImage, InvalidInput, decode_image, shown
from env_client.wire.images import image_size

__all__ = ["EpisodeFiles", "EpisodeRows", "LeRobotFiles"]

CONVERTER = "lerobot.scripts.convert_dataset_v21_to_v30"
# Images that are read from a parquet file at once.
ROWS_AT_ONCE = 8
# More values than any robot has; a few bytes could declare billions.
MAX_VALUES = 10_000
# A place in a path template of info.json: {chunk_index:03d}.
_PLACE = re.compile(r"\{(\w+)(?::0(\d)d)?\}")


@dataclass(frozen=True)
class EpisodeFiles:
    """Where one episode lies."""

    index: int
    # Ticks.
    length: int
    data_file: Path
    # {video feature: (file, seconds from the beginning of the file to the episode's first frame)}
    videos: dict[str, tuple[Path, float]]


@dataclass(frozen=True)
class EpisodeRows:
    """The numbers of one episode of T ticks."""

    # (T, state_dim) float32; state_dim is 0 when nothing was recorded.
    states: np.ndarray
    # (T, action_dim) float32
    actions: np.ndarray
    # (T,) float64 seconds since the episode's beginning.
    timestamps: np.ndarray
    # (T,) the prompt at each tick.
    tasks: tuple[str, ...]


class LeRobotFiles:
    """One dataset folder. Raises `EnvError` when it cannot be replayed."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        with _told(self.root):
            self._open()

    def _open(self) -> None:
        self.info = self._read_info()
        self.fps = float(self.info["fps"])
        if not 0 < self.fps < 1e6:
            raise EnvError(f"{self.root} was recorded at {self.fps} Hz; a rate above 0 was expected")
        self.robot_type = str(self.info.get("robot_type") or "")
        features = self.info["features"]
        if "action" not in features:
            raise EnvError(
                f"{self.root} holds no feature named action: there is nothing to compare a policy with"
            )
        self.action_names = _names(features["action"], "action")
        self.state_names = _names(features.get("observation.state"), "state")
        # {camera name: feature}, in the dataset's order; depth maps are left out.
        self.cameras = {_camera_name(key): key for key, feature in features.items() if _is_camera(feature)}
        for name in self.cameras:
            # Logs and videos of a replay are named after them.
            if not is_file_name(name):
                raise EnvError(
                    f"{self.root} has a camera named {shown(name)}; a name without slashes was expected"
                )
        # {camera name: (height, width)} in pixels.
        self.camera_sizes = {name: _size(features[key]) for name, key in self.cameras.items()}
        self._tasks = self._read_tasks()
        # {episode index: where it lies}
        self.episodes = self._read_episodes()

    # ---------------------------------------------------------------------------------- metadata

    def _read_info(self) -> dict[str, Any]:
        path = self.root / "meta" / "info.json"
        if not self.root.is_dir():
            raise EnvError(
                f"the dataset folder {self.root} does not exist (seen from {Path.cwd()}): check --env.dataset-path, "
                "run from the project's root, or give the absolute path"
            )
        if not path.is_file():
            raise EnvError(
                f"{self.root} is not a LeRobot dataset: it holds no meta/info.json{_datasets_below(self.root)}"
            )
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            version = str(info["codebase_version"])
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
            raise EnvError(
                f"{path} cannot be read ({error!r}); LeRobot's JSON with a codebase_version was expected"
            ) from error
        if version.startswith(("v1", "v2")):
            root = self.root.resolve()
            raise EnvError(
                f"{self.root} is a LeRobot {version} dataset, v3.0 is read here; convert it with LeRobot 0.6.1: "
                f"python -m {CONVERTER} --repo-id={root.parent.name}/{root.name} --root={root} --push-to-hub=false"
            )
        if not version.startswith("v3."):
            raise EnvError(f"{self.root} is a LeRobot {version} dataset; v3.0 is read here")
        missing = [key for key in ("fps", "features", "data_path") if key not in info]
        if missing:
            raise EnvError(
                f"{path} lacks {', '.join(missing)}: the recording was not written by LeRobot 3.0's writer"
            )
        return info

    def _read_tasks(self) -> dict[int, str]:
        path = self.root / "meta" / "tasks.parquet"
        if not path.is_file():
            return {}
        rows = read_table(path).to_pylist()
        # The text is the index of a pandas frame, whose column name differs between versions.
        return {
            int(row["task_index"]): next((str(v) for k, v in row.items() if k != "task_index"), "")
            for row in rows
        }

    def _read_episodes(self) -> dict[int, EpisodeFiles]:
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise EnvError(
                f"{self.root} holds no meta/episodes/*/*.parquet: the recording was not finished (finalize() of "
                "LeRobot's writer), or the copy is incomplete"
            )
        videos = [key for key in self.cameras.values() if self.info["features"][key]["dtype"] == "video"]
        episodes: dict[int, EpisodeFiles] = {}
        for path in paths:
            columns = [
                name for name in open_parquet(path).schema_arrow.names if not name.startswith("stats/")
            ]
            for row in read_table(path, columns).to_pylist():
                try:
                    episode = self._episode(row, videos)
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise EnvError(
                        f"{path} describes an episode without {error}: it is not LeRobot v3.0"
                    ) from error
                episodes[episode.index] = episode
        if not episodes:
            raise EnvError(f"{self.root} holds no episode")
        return dict(sorted(episodes.items()))

    def _episode(self, row: dict[str, Any], videos: list[str]) -> EpisodeFiles:
        data = _filled(
            self.info["data_path"], chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        lies = {}
        for key in videos:
            video = _filled(
                self.info["video_path"],
                video_key=key,
                chunk_index=row[f"videos/{key}/chunk_index"],
                file_index=row[f"videos/{key}/file_index"],
            )
            lies[key] = (self._inside(video), float(row[f"videos/{key}/from_timestamp"]))
        return EpisodeFiles(int(row["episode_index"]), int(row["length"]), self._inside(data), lies)

    def _inside(self, path: str) -> Path:
        """A file of the dataset. Links are followed, since caches are made of them. Raises `EnvError`."""
        relative = Path(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise EnvError(
                f"{self.root} names the file {path!r:.200}; one inside the dataset's folder was expected"
            )
        return self.root / relative

    def episode(self, index: int) -> EpisodeFiles:
        """Raises `EnvError` with the episodes that there are."""
        if index not in self.episodes:
            first, last = min(self.episodes), max(self.episodes)
            raise EnvError(
                f"episode {index} is not in {self.root}; it has {len(self.episodes)}: {first} to {last}"
            )
        return self.episodes[index]

    # --------------------------------------------------------------------------------------- rows

    def read_episode(self, index: int) -> EpisodeRows:
        """The numbers of one episode."""
        episode = self.episode(index)
        with _told(episode.data_file):
            return self._rows(episode)

    def _rows(self, episode: EpisodeFiles) -> EpisodeRows:
        index = episode.index
        wanted = ["action", "timestamp", "task_index", "frame_index"]
        if self.state_names:
            wanted.append("observation.state")
        table = read_table(episode.data_file, wanted, [("episode_index", "=", index)])
        if table.num_rows != episode.length:
            raise EnvError(
                f"{episode.data_file} holds {table.num_rows} rows of episode {index}, {episode.length} were expected: "
                "the file is from another recording or incomplete"
            )
        order = np.argsort(table["frame_index"].to_numpy(), kind="stable")
        actions = _matrix(table, "action", len(self.action_names), episode.data_file)[order]
        states: np.ndarray = np.zeros((episode.length, 0), np.float32)
        if self.state_names:
            states = _matrix(table, "observation.state", len(self.state_names), episode.data_file)[order]
        tasks = tuple(self._tasks.get(int(task), "") for task in table["task_index"].to_numpy()[order])
        return EpisodeRows(states, actions, table["timestamp"].to_numpy().astype(np.float64)[order], tasks)

    # ------------------------------------------------------------------------------------- images

    def images(self, index: int, timestamps: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """{camera: (H, W, 3) uint8 RGB} for each tick of an episode, decoded as they are asked for."""
        with _told(self.root):
            yield from self._pictures(self.episode(index), timestamps)

    def _pictures(self, episode: EpisodeFiles, timestamps: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        streams: dict[str, Iterator[np.ndarray]] = {}
        stored = {name: key for name, key in self.cameras.items() if key not in episode.videos}
        for name, key in self.cameras.items():
            if key in episode.videos:
                path, start = episode.videos[key]
                streams[name] = video_frames(path, start + timestamps, 0.5 / self.fps)
        rows = self._stored_images(episode, stored) if stored else None
        for tick in range(episode.length):
            images = {name: next(stream) for name, stream in streams.items()}
            if rows is not None:
                images |= next(rows, {})
            if len(images) != len(self.cameras):
                raise EnvError(f"{episode.data_file} ends before tick {tick} of episode {episode.index}")
            yield {name: images[name] for name in self.cameras}

    def _stored_images(
        self, episode: EpisodeFiles, stored: dict[str, str]
    ) -> Iterator[dict[str, np.ndarray]]:
        file = open_parquet(episode.data_file)
        column = file.schema_arrow.names.index("episode_index")
        groups = []
        for group in range(file.metadata.num_row_groups):
            statistics = (
                file.metadata.row_group(group).column(_leaf_column(file, "episode_index", column)).statistics
            )
            if (
                statistics is None
                or not statistics.has_min_max
                or statistics.min <= episode.index <= statistics.max
            ):
                groups.append(group)
        columns = ["episode_index", *stored.values()]
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                if row["episode_index"] == episode.index:
                    yield {name: self._decode_stored(row[key], key) for name, key in stored.items()}

    def _decode_stored(self, value: dict[str, Any], key: str) -> np.ndarray:
        data = value.get("bytes")
        if data is None:
            path = self._inside(str(value.get("path")))
            if not path.is_file():
                raise EnvError(f"the image file {path} of {key} is missing")
            data = path.read_bytes()
        codec = "png" if data.startswith(b"\x89PNG") else "jpeg"
        try:
            return decode_image(EncodedImage(codec, data, (*(image_size(codec, data) or (0, 0)), 3)))
        except InvalidInput as error:
            raise EnvError(f"an image of {key} in {self.root} is damaged: {error.message}") from error


# ------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever is at odds with the format, in files that anybody may have written, is an `EnvError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EnvError(f"{path} is not as LeRobot v3.0 writes it ({reason:.200})") from error


def _filled(template: str, **values: Any) -> str:
    """A path template with its places filled. Not `str.format`, which can be told to read attributes and to fill disks."""
    return _PLACE.sub(lambda place: str(values[place[1]]).zfill(int(place[2] or 0)), template)


def _matrix(table: Any, column: str, width: int, path: Path) -> np.ndarray:
    values = np.asarray(table[column].combine_chunks().to_pylist(), np.float32).reshape(table.num_rows, -1)
    if values.shape[1] != width:
        raise EnvError(f"{column} in {path} has {values.shape[1]} values a tick; info.json names {width}")
    return values


def _leaf_column(file: Any, name: str, fallback: int) -> int:
    """Row group statistics count leaves: a struct column before this one shifts it."""
    for index in range(file.metadata.num_columns):
        if file.metadata.schema.column(index).path == name:
            return index
    return fallback


def _names(feature: dict[str, Any] | None, what: str) -> tuple[str, ...]:
    """The names of a vector feature; LeRobot writes a list, or a map that holds one list, or nothing."""
    if feature is None:
        return ()
    size, names = math.prod(feature.get("shape", (0,))), feature.get("names")
    if size > MAX_VALUES:
        raise EnvError(f"the feature {what} has {size} values; at most {MAX_VALUES} are read")
    if isinstance(names, dict):
        names = next((value for value in names.values() if isinstance(value, list)), None)
    if not isinstance(names, list) or len(names) != size:
        names = [f"{what}_{index}" for index in range(size)]
    return tuple(map(str, names))


def _is_camera(feature: dict[str, Any]) -> bool:
    info = feature.get("info") or {}
    return feature.get("dtype") in ("video", "image") and not info.get(
        "is_depth_map", info.get("video.is_depth_map")
    )


def _size(feature: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of an image feature; LeRobot's shape is (H, W, C), older recordings have (C, H, W)."""
    shape = [int(length) for length in feature["shape"]]
    return (shape[1], shape[2]) if shape[0] in (1, 3) else (shape[0], shape[1])


def _camera_name(key: str) -> str:
    return key.removeprefix("observation.").removeprefix("images.")


def _datasets_below(root: Path) -> str:
    below = sorted(path.parent.parent.name for path in root.glob("*/meta/info.json"))
    return f"; there are datasets inside it: {', '.join(below[:5])}" if below else ""
