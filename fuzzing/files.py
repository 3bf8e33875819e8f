"""Targets that are files: a whole folder in which one file holds the fuzzer's bytes.

The first byte of an input says which file, the rest is its content; every other file is as it should be.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from env_client.cli import CliError
from env_client.cli.configs import read_config_file
from env_client.client_config import find_task
from env_client.envs.astribot_layout import layout_names, read_hardware
from env_client.envs.cameras import read_camera_file
from env_client.envs.dataset_files import LeRobotFiles
from env_client.envs.env import EnvError
from env_client.envs.make import read_robot_file
from env_client.envs.robots import SO101Config
from env_client.record.replay_log import LoggedRun
from env_client.wire import InvalidInput, encode_image
from safetensors.numpy import save

from grasp_cube.policies.config import PolicyConfig
from grasp_cube.policies.embodiment import choose_embodiment, load_embodiment
from grasp_cube.policies.lerobot_files import PROMPT_STEPS, read_checkpoint
from grasp_cube.policies.openpi_config import load_openpi_config
from grasp_cube.policies.openpi_norm import find_norm_stats
from grasp_cube.policies.pi_tensors import SafetensorsFile
from grasp_cube.policies.policy import PolicyError
from grasp_cube.policies.task import load_task
from grasp_cube.policies.tokenizer import tokenizer_name

__all__ = ["checkpoint", "dataset", "log", "seeds_of", "settings"]

ROOT = Path(__file__).resolve().parents[1]
MEMORY = Path("/dev/shm")
IMAGES = {"observation.image": (9, 9)}


class _Folder:
    """A folder of good files, of which one at a time is replaced."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.names = list(files)
        # It goes with the process; a batch ends without the interpreter's own end.
        self._made = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.root = Path(self._made.name)
        self._replaced: str | None = None
        for name in files:
            self._write(name, files[name])

    def _write(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def replace(self, data: bytes) -> str | None:
        """Which file holds the bytes now."""
        if not data or data[0] >= len(self.names):
            return None
        name = self.names[data[0]]
        if self._replaced not in (None, name):
            self._write(str(self._replaced), self.files[str(self._replaced)])
        self._replaced = name
        self._write(name, data[1:])
        return name

    def seeds(self) -> list[bytes]:
        return [bytes([number]) + content for number, content in enumerate(self.files.values())]


_made: dict[str, _Folder] = {}


def _folder(name: str) -> _Folder:
    if name not in _made:
        _made[name] = _Folder(_FILES[name]())
    return _made[name]


def seeds_of(name: str) -> list[bytes]:
    return _folder(name).seeds()


# ---------------------------------------------------------------------------------------- checkpoints


def _checkpoint_files() -> dict[str, bytes]:
    """lift_act without its weights, and what openpi lays beside a checkpoint."""
    source = ROOT / "checkpoints" / "lift_act"
    kept = {
        file.name: file.read_bytes()
        for file in sorted(source.iterdir())
        if file.suffix in (".json", ".yaml") or "processor" in file.name
    }
    stats = {name: {key: [0.5] * 6 for key in ("mean", "std", "q01", "q99")} for name in ("state", "actions")}
    tensors = {"action_in_proj.weight": np.zeros((4, 8), np.float32), "bias": np.zeros(3, np.float32)}
    return kept | {
        "model.safetensors": save(tensors),
        "assets/lift/norm_stats.json": json.dumps({"norm_stats": stats}).encode(),
    }


def checkpoint(data: bytes) -> None:
    """Everything that is read of a LeRobot or openpi checkpoint before its weights."""
    folder = _folder("checkpoint")
    name = folder.replace(data)
    if name is None:
        return
    root = folder.root
    readers: tuple[Callable[[], Any], ...] = (lambda: read_checkpoint(root),)
    match name:
        case "embodiment.yaml":
            readers = (lambda: choose_embodiment(PolicyConfig(), root, None, 6, 6).camera_specs(IMAGES),)
        case "assets/lift/norm_stats.json":
            readers = (lambda: find_norm_stats(root, None)[1].for_lerobot("QUANTILES", 6, 6),)
        case "model.safetensors":
            readers = (*readers, lambda: _shapes(SafetensorsFile(root / name)))
        case "policy_preprocessor.json":
            readers = (
                *readers,
                lambda: read_checkpoint(root, PROMPT_STEPS),
                lambda: tokenizer_name(root / name),
            )
    for read in readers:
        with contextlib.suppress(PolicyError):
            read()


def _shapes(tensors: SafetensorsFile) -> None:
    for name in tensors.keys():  # noqa: SIM118 (no mapping)
        tensors.shape(name)
        tensors.dtype(name)


# ------------------------------------------------------------------------------------------- settings


def _settings_files() -> dict[str, bytes]:
    configs = ROOT / "configs"
    return {
        "task.yaml": (configs / "tasks" / "lift.yaml").read_bytes(),
        "embodiment.yaml": (configs / "embodiments" / "so101.yaml").read_bytes(),
        "openpi.yaml": b"model: pi05\nembodiment: droid\nhorizon: 10\ndelta: [6, -1]\nprompt: lift\n",
        "cameras.json": (configs / "cameras" / "so101.json").read_bytes(),
        "robot.yaml": (configs / "robots" / "so101.yaml").read_bytes(),
        "astribot.yaml": (configs / "robots" / "astribot_s1.yaml").read_bytes(),
        "layout.yaml": (configs / "embodiments" / "astribot_s1_16.yaml").read_bytes(),
        "options.yaml": b"fps: 30\nenv:\n  type: so101\n  robot-config-path: x.yaml\nepisodes: [0, 3]\n",
    }


def settings(data: bytes) -> None:
    """What a person writes, each file by its own reader."""
    folder = _folder("settings")
    name = folder.replace(data)
    if name is None:
        return
    file = folder.root / name
    readers: dict[str, tuple[Callable[[], Any], ...]] = {
        "task.yaml": (lambda: load_task(str(file)), lambda: find_task(str(file))),
        "embodiment.yaml": (lambda: load_embodiment(str(file)),),
        "openpi.yaml": (lambda: load_openpi_config(str(file)),),
        "cameras.json": (lambda: read_camera_file(file),),
        "robot.yaml": (lambda: read_robot_file(SO101Config(robot_config_path=str(file)), "so101"),),
        "astribot.yaml": (lambda: read_hardware(file),),
        "layout.yaml": (lambda: layout_names(str(file)),),
        "options.yaml": (lambda: read_config_file(file),),
    }
    for read in readers[name]:
        with contextlib.suppress(PolicyError, EnvError, CliError):
            read()


# ------------------------------------------------------------------------------------------- datasets


def _dataset_files() -> dict[str, bytes]:
    """Two episodes of three ticks with their pictures in the table, as LeRobot writes them."""
    vector = {"dtype": "float32", "shape": [2], "names": ["a.pos", "b.pos"]}
    image = {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so101_follower",
        "fps": 30,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {"action": vector, "observation.state": vector, "observation.images.front": image},
    }
    picture = {"bytes": bytes(encode_image(np.full((8, 8, 3), 90, np.uint8), "png").data), "path": None}  # type: ignore[union-attr]
    ticks = [
        {
            "action": [0.0, 1.0],
            "observation.state": [0.5, 1.5],
            "observation.images.front": picture,
            "timestamp": tick / 30,
            "frame_index": tick,
            "episode_index": episode,
            "task_index": 0,
        }
        for episode in range(2)
        for tick in range(3)
    ]
    episodes = [
        {"episode_index": episode, "length": 3, "data/chunk_index": 0, "data/file_index": 0}
        for episode in range(2)
    ]
    return {
        "meta/info.json": json.dumps(info).encode(),
        "meta/tasks.parquet": _parquet([{"task_index": 0, "task": "lift"}]),
        "meta/episodes/chunk-000/file-000.parquet": _parquet(episodes),
        "data/chunk-000/file-000.parquet": _parquet(ticks),
    }


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression="none")
    return sink.getvalue().to_pybytes()


def dataset(data: bytes) -> None:
    """A dataset that is replayed: its metadata, numbers and pictures."""
    folder = _folder("dataset")
    if folder.replace(data) is None:
        return
    with contextlib.suppress(EnvError):
        files = LeRobotFiles(folder.root)
        for index in list(files.episodes)[:2]:
            rows = files.read_episode(index)
            for _, _ in zip(files.images(index, rows.timestamps), range(5), strict=False):
                pass


# ------------------------------------------------------------------------------------------------ logs


def _log_files() -> dict[str, bytes]:
    """An inference log of two steps, the first of which was answered."""
    metadata = {
        "format": "grasp-cube inference log 1",
        "cameras": ["front"],
        "states": {"arm": 2},
        "action_names": ["a.pos", "b.pos"],
        "unit": "normalized",
        "fps": 30.0,
        "episodes": [{"episode": 0, "ended": "success"}, {"episode": 1, "ended": None}],
    }
    picture = "images/frame_000000/front.jpg"
    lines = [
        {
            "episode": 0,
            "tick": tick,
            "frame": tick,
            "capture_time": tick / 30,
            "prompt": "lift",
            "state": [0.0, 1.0],
            "images": {"front": picture},
            "chunk": {"chunk_id": 1, "capture_time": tick / 30, "actions": [[0.0, 1.0]]},
        }
        for tick in range(2)
    ]
    return {
        "metadata.json": json.dumps(metadata).encode(),
        "inference_log.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        picture: bytes(encode_image(np.full((8, 8, 3), 90, np.uint8), "jpeg").data),  # type: ignore[union-attr]
    }


def log(data: bytes) -> None:
    """A log that is replayed against a server."""
    folder = _folder("log")
    if folder.replace(data) is None:
        return
    with contextlib.suppress(ValueError, OSError, InvalidInput):
        run = LoggedRun(folder.root)
        assert all(isinstance(episode, int) for episode in run.torn)
        for index, chunk in run.chunks():
            assert np.array(chunk["actions"], np.float32).size >= 0
            with contextlib.suppress(InvalidInput):
                run.observation(index)
                run.history(index, 2)


_FILES: dict[str, Callable[[], dict[str, bytes]]] = {
    "checkpoint": _checkpoint_files,
    "settings": _settings_files,
    "dataset": _dataset_files,
    "log": _log_files,
}
