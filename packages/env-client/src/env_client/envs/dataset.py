"""A recorded LeRobot dataset in place of a robot: it ignores actions and replays what was seen.

Life cycle: each `reset` begins the next of the chosen episodes (after the last, the first again); each
`apply_action` or `hold` moves one tick on, for time belongs to whoever drives the env; `done` turns True
behind the last tick. A thread decodes a few ticks ahead, so that reading an observation costs no decoding.
Error policy: `EnvError` in a sentence, also for what goes wrong in the thread.
"""

import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from env_client.envs.config import EnvConfig
from env_client.envs.dataset_files import EpisodeRows, LeRobotFiles
from env_client.envs.env import EnvError, EnvSpec, Observation
from env_client.wire.spec import StateSpec
from env_client.wire.unit import beyond_normalized

__all__ = ["DatasetEnv", "DatasetEnvConfig"]

# Ticks that are decoded ahead: 8 ticks of three 480x640 cameras are 22 MB.
BUFFERED_TICKS = 8
# A tick that takes longer to decode is an error, in seconds.
DECODE_TIMEOUT_S = 30.0
# One radian in each unit, about: an SO-101 joint moves 200 normalized units over 3.4 rad.
UNIT_PER_RAD = {"rad": 1.0, "degrees": 180.0 / np.pi, "normalized": 200.0 / 3.4}


@EnvConfig.register_subclass("dataset")
@dataclass(frozen=True)
class DatasetEnvConfig(EnvConfig):
    """What is replayed."""

    # Folder of a LeRobot v3.0 dataset.
    dataset_path: Path = Path("datasets/lift")
    # Episodes to replay, in this order, such as 0,3; all when none is named.
    episodes: tuple[int, ...] = ()
    # Unit of states and actions: normalized, degrees or rad; default: what the statistics show, else the policy's.
    unit: str | None = None
    # Names of cameras in the dataset that the policy calls otherwise, such as top=front.
    cameras: dict[str, str] = field(default_factory=dict)
    # Parts of the state and their sizes, such as arm=6; by default they follow from the names of the joints.
    states: dict[str, int] = field(default_factory=dict)


class DatasetEnv:
    """An `Env` that replays episodes. Raises `EnvError` when the dataset cannot be read."""

    def __init__(self, config: DatasetEnvConfig):
        self._config = config
        self.files = LeRobotFiles(config.dataset_path)
        # The indices of the episodes that are replayed, in order.
        self.episodes = config.episodes or tuple(self.files.episodes)
        for index in self.episodes:
            self.files.episode(index)
        unknown = [name for name in config.cameras if name not in self.files.cameras]
        if unknown:
            raise EnvError(
                f"--env.cameras names {', '.join(unknown)}; {config.dataset_path} has {', '.join(self.files.cameras)}"
            )
        self._renamed = {name: config.cameras.get(name, name) for name in self.files.cameras}
        # What the flag says, or the dataset's statistics show; None: nothing tells.
        self.known_unit = config.unit or _shown_unit(self.files)
        self.spec = _spec(self.files, config, self.known_unit or "normalized", tuple(self._renamed.values()))
        self._turn = -1
        self._tick = 0
        self._rows: EpisodeRows | None = None
        self._decoder: _Decoder | None = None
        self._images: dict[str, np.ndarray] = {}

    def take_unit(self, unit: str) -> None:
        """Take a policy's unit where nothing tells the dataset's own."""
        if self.known_unit is None:
            self.spec = _spec(self.files, self._config, unit, self.spec.cameras)

    @property
    def camera_sizes(self) -> dict[str, tuple[int, int]]:
        """{camera: (height, width)} in pixels."""
        return {self._renamed[name]: size for name, size in self.files.camera_sizes.items()}

    @property
    def episode(self) -> int:
        """Index in the dataset of the episode that is replayed now."""
        return self.episodes[self._turn % len(self.episodes)]

    @property
    def tick(self) -> int:
        """Ticks since the episode's beginning."""
        return self._tick

    @property
    def length(self) -> int:
        """Ticks of the episode that is replayed now."""
        return len(self._recorded().actions)

    @property
    def done(self) -> bool:
        return self._rows is not None and self._tick >= len(self._rows.actions)

    def reset(self, seed: int | None = None) -> Observation:
        """Begin the next episode; a seed picks one of them instead."""
        self._turn = self._turn + 1 if seed is None else seed % len(self.episodes)
        self._stop()
        self._tick = 0
        self._rows = self.files.read_episode(self.episode)
        if self.files.cameras:
            self._decoder = _Decoder(self.files.images(self.episode, self._rows.timestamps))
            self._images = self._decoder.next()
        return self.get_observation()

    def get_observation(self) -> Observation:
        """What was recorded at this tick; behind the last one, the last."""
        rows = self._recorded()
        tick = min(self._tick, len(rows.actions) - 1)
        states, start = {}, 0
        for part in self.spec.states:
            states[part.name] = rows.states[tick, start : start + part.size]
            start += part.size
        return Observation(
            images={self._renamed[name]: image for name, image in self._images.items()},
            states=states,
            task=rows.tasks[tick],
            capture_time=time.monotonic(),
            image_age=dict.fromkeys(self.spec.cameras, 0.0),
        )

    @property
    def recorded_actions(self) -> np.ndarray:
        """(length, action_dim) float32: what was commanded in the whole episode."""
        return self._recorded().actions

    def recorded_action(self) -> np.ndarray:
        """(action_dim,) float32: what was commanded at this tick of the recording."""
        rows = self._recorded()
        return rows.actions[min(self._tick, len(rows.actions) - 1)]

    def apply_action(self, action: np.ndarray) -> None:
        """Move one tick on; the action changes nothing."""
        rows = self._recorded()
        if self._tick < len(rows.actions):
            self._tick += 1
        if self._decoder is not None and self._tick < len(rows.actions):
            self._images = self._decoder.next()

    def hold(self) -> None:
        """Move one tick on: a recording does not wait."""
        self.apply_action(self.recorded_action())

    def success(self) -> bool | None:
        return None

    def close(self) -> None:
        self._stop()

    def _recorded(self) -> EpisodeRows:
        if self._rows is None:
            raise EnvError("no episode was begun: call reset() first")
        return self._rows

    def _stop(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


class _Decoder:
    """A thread that keeps a few ticks of images ready."""

    def __init__(self, ticks: Iterator[dict[str, np.ndarray]]):
        self._ready: queue.Queue[dict[str, np.ndarray] | Exception] = queue.Queue(BUFFERED_TICKS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ticks,), name="dataset-decoder", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, np.ndarray]:
        try:
            item = self._ready.get(timeout=DECODE_TIMEOUT_S)
        except queue.Empty:
            raise EnvError(
                f"the dataset's images could not be decoded within {DECODE_TIMEOUT_S:g} s"
            ) from None
        if isinstance(item, EnvError):
            raise item
        if isinstance(item, Exception):
            raise EnvError(f"the dataset's images cannot be decoded: {item!r}") from item
        return item

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=DECODE_TIMEOUT_S)

    def _run(self, ticks: Iterator[dict[str, np.ndarray]]) -> None:
        try:
            for images in ticks:
                if not self._put(images):
                    return
        except Exception as error:  # handed to the thread that reads
            self._put(error)

    def _put(self, item: dict[str, np.ndarray] | Exception) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _shown_unit(files: LeRobotFiles) -> str | None:
    try:
        stats = json.loads((files.root / "meta" / "stats.json").read_text(encoding="utf-8"))
        beyond = beyond_normalized(files.action_names, stats)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # a dataset without usable statistics is replayed all the same
    # Only an arm whose joints carry LeRobot's names is recorded in one of the two units.
    return "degrees" if beyond and beyond[0].endswith(".pos") else None


def _spec(files: LeRobotFiles, config: DatasetEnvConfig, unit: str, cameras: tuple[str, ...]) -> EnvSpec:
    names = files.action_names
    gripper = np.array(["gripper" in name for name in names])
    bounded = unit == "normalized"
    lower = np.where(gripper, 0.0, -100.0) if bounded else np.full(len(names), -np.inf)
    upper = np.full(len(names), 100.0 if bounded else np.inf)
    places = {name: index for index, name in enumerate(files.state_names)}
    last = max(len(files.state_names) - 1, 0)
    return EnvSpec(
        type="dataset",
        action_names=names,
        unit=unit,
        lower=lower,
        upper=upper,
        unit_per_rad=np.where(gripper, 1.0, UNIT_PER_RAD.get(unit, 1.0)),
        gripper=gripper,
        state_index=np.array(
            [places.get(name, min(index, last)) for index, name in enumerate(names)], np.int64
        ),
        states=_parts(files, config.states),
        cameras=cameras,
        fps=files.fps,
    )


def _parts(files: LeRobotFiles, declared: dict[str, int]) -> tuple[StateSpec, ...]:
    """How the recorded state is split: one arm, two arms, or one part named state."""
    names, size = files.state_names, len(files.state_names)
    if declared:
        if sum(declared.values()) != size:
            raise EnvError(
                f"--env.states adds up to {sum(declared.values())} values; {files.root} records {size}"
            )
        return tuple(StateSpec(name, count) for name, count in declared.items())
    if size == 6:
        return (StateSpec("arm", 6),)
    left, right = names[: size // 2], names[size // 2 :]
    if size == 12 and all(n.startswith("left_") for n in left) and all(n.startswith("right_") for n in right):
        return (StateSpec("left_arm", 6), StateSpec("right_arm", 6))
    return (StateSpec("state", size),) if size else ()
