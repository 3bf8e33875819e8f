"""A dataset as training wants it: small frames on disk as plain arrays, joints in memory, batches by index.

LeRobot's reader decodes a video frame at full size for every sample of every epoch. Here each frame is decoded
once, made small by the resize that robots use (`env_client.wire.resize_image`), and kept as a memory-mapped
array, so that an epoch costs no decoding and training sees the pixels that a policy will be served.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from env_client.wire.images import Resize, resize_image
from tqdm import tqdm

__all__ = ["Frames", "before_grasps", "load_frames"]

_ACTION, _STATE = "action", "observation.state"
# The one decoder that needs no FFmpeg of the system: LeRobot's default looks for one and warns at length.
_DECODER = "pyav"
# The way to a grasp, seconds, and what belongs to it of the time after the gripper is half shut.
_BEFORE, _AFTER = 2.0, 0.2


@dataclass(frozen=True)
class Frames:
    """All frames of a dataset in the order of its episodes.

    `images` maps a feature's name to (N, h, w, 3) uint8; `states` and `actions` are (N, n) float32; episode i
    covers the frames `starts[i]` to `ends[i] - 1`; `meta` is LeRobot's `LeRobotDatasetMetadata`.
    """

    meta: Any
    images: dict[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def batch(
        self,
        indices: Sequence[int],
        observed: Sequence[int] | None,
        acted: Sequence[int],
        features: dict[str, np.ndarray] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The batch that LeRobot's policies train on, before their preprocessor.

        `observed` and `acted` are the policy's offsets in ticks: with `observed` None an observation has no
        time axis. Beyond an episode's ends its first and last frames repeat, marked in `action_is_pad`. With
        `features`, {name: (N, ...)}, these stand in place of the images.
        """
        at = np.asarray(indices)
        episode = np.searchsorted(self.ends, at, side="right")
        first, last = self.starts[episode][:, None], self.ends[episode][:, None] - 1
        action_at = at[:, None] + np.asarray(acted)
        seen_at = np.clip(at[:, None] + np.asarray(observed or [0]), first, last)
        if observed is None:
            seen_at = seen_at[:, 0]
        batch = {
            _STATE: torch.from_numpy(self.states[seen_at]),
            _ACTION: torch.from_numpy(self.actions[np.clip(action_at, first, last)]),
            "action_is_pad": torch.from_numpy((action_at < first) | (action_at > last)),
        }
        if features is not None:
            # Copied: a batch is small, and what is mapped from a file is read-only.
            return batch | {name: torch.from_numpy(maps[seen_at].copy()) for name, maps in features.items()}
        for name, images in self.images.items():
            pixels = torch.from_numpy(images[seen_at])
            batch[name] = pixels.movedim(-1, -3).to(torch.float32) / 255.0
        return batch


def load_frames(root: Path, cache: Path, height: int, width: int, resize: Resize) -> Frames:
    """The frames of the LeRobot v3.0 dataset at `root`; small images are made once and kept in `cache`.

    Raises `ValueError` when the folder is no such dataset or has no camera.
    """
    from lerobot.datasets import LeRobotDataset

    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"{root} is no LeRobot dataset: it has no meta/info.json")
    dataset = LeRobotDataset(f"local/{root.name}", root=root, video_backend=_DECODER)
    meta = dataset.meta
    if not meta.camera_keys:
        raise ValueError(f"the dataset at {root} has no camera; ACT and Diffusion need at least one")
    joints = dataset.hf_dataset.with_format("numpy").select_columns([_STATE, _ACTION])[:]
    shape = (dataset.num_frames, height, width, 3)
    wanted = {
        "dataset": str(root.resolve()),
        "written": (root / "meta" / "info.json").stat().st_mtime_ns,
        "shape": list(shape),
        "resize": resize,
        "cameras": list(meta.camera_keys),
    }
    index = cache / "frames.json"
    if not index.is_file() or json.loads(index.read_text()) != wanted:
        cache.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        for camera in meta.camera_keys:
            _fill(dataset, camera, cache / f"{camera}.npy", shape, resize)
        index.write_text(json.dumps(wanted))
    return Frames(
        meta=meta,
        images={camera: np.load(cache / f"{camera}.npy", mmap_mode="r") for camera in meta.camera_keys},
        states=np.asarray(joints[_STATE], np.float32),
        actions=np.asarray(joints[_ACTION], np.float32),
        starts=np.asarray(meta.episodes["dataset_from_index"]),
        ends=np.asarray(meta.episodes["dataset_to_index"]),
    )


def before_grasps(frames: Frames) -> list[tuple[int, int]]:
    """The stretches of frames, (first, last + 1), in which an arm comes to where its gripper shuts; they may overlap.

    A gripper is the joint that is named so, and shut below the middle of what its actions are in the whole dataset.
    """
    before, after = round(_BEFORE * frames.meta.fps), round(_AFTER * frames.meta.fps)
    found = []
    for number, name in enumerate(frames.meta.features[_ACTION]["names"] or ()):
        if "gripper" not in name:
            continue
        jaw = frames.actions[:, number]
        shut = jaw < (jaw.min() + jaw.max()) / 2.0
        for at in np.flatnonzero(shut[1:] & ~shut[:-1]) + 1:
            episode = int(np.searchsorted(frames.ends, at, side="right"))
            first, last = int(frames.starts[episode]), int(frames.ends[episode])
            if at > first:
                found.append((max(first, int(at) - before), min(last, int(at) + after)))
    return sorted(found)


def _fill(dataset: Any, camera: str, file: Path, shape: tuple[int, ...], resize: Resize) -> None:
    small = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    images = tqdm(_decoded(dataset, camera), total=shape[0], desc=f"{camera} made small", disable=None)
    for number, image in enumerate(images):
        small[number] = resize_image(image, shape[1], shape[2], resize)
    small.flush()


def _decoded(dataset: Any, camera: str) -> Iterator[np.ndarray]:
    """Every (H, W, 3) uint8 image of one camera, in order."""
    meta = dataset.meta
    if camera not in meta.video_keys:
        for row in dataset.hf_dataset.select_columns([camera]):
            yield _channels_last((row[camera] * 255.0).round().to(torch.uint8))
        return
    for number, episode in enumerate(meta.episodes):
        path = dataset.root / meta.get_video_file_path(number, camera)
        start = float(episode[f"videos/{camera}/from_timestamp"])
        yield from _video(path, start, int(episode["length"]), meta.fps)


def _video(path: Path, start: float, length: int, fps: float) -> Iterator[np.ndarray]:
    """`length` images of a video file from `start` seconds on, decoded in one go.

    LeRobot's own reader looks up each time stamp apart, at ten times the cost.
    """
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(round(start / stream.time_base), stream=stream)
        count = 0
        for frame in container.decode(stream):
            # The nearest key frame lies before the episode.
            if frame.time is None or frame.time < start - 0.5 / fps:
                continue
            if count == length:
                return
            count += 1
            yield frame.to_ndarray(format="rgb24")
        if count < length:
            raise ValueError(f"{path} ends {length - count} frames before the episode at {start:.2f} s does")


def _channels_last(image: torch.Tensor) -> np.ndarray:
    return cast(np.ndarray, np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
