"""Writes small LeRobot datasets with LeRobot's own writer, and what LeRobot's own reader gives for them.

A script of its own, because importing LeRobot takes ten seconds: `make_datasets.py FOLDER`. Beside each dataset
`NAME` it leaves `NAME.npz`: state, action, episode index, and each camera's frames as LeRobot decodes them.
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
SIZE = (96, 128)


def features(names: list[str], cameras: list[str], kind: str) -> dict:
    vector = {"dtype": "float32", "shape": (len(names),), "names": [name + ".pos" for name in names]}
    images = {
        f"observation.images.{camera}": {
            "dtype": kind,
            "shape": (*SIZE, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in cameras
    }
    return {"observation.state": vector, "action": vector, **images}


def frame(names: list[str], cameras: list[str], episode: int, tick: int) -> dict:
    """A slow motion; a bright square whose place says the tick, so that a frame off by one is seen."""
    phase = 0.1 * tick + episode
    action = np.array([40 * np.sin(phase + joint) for joint in range(len(names))], np.float32)
    made = {"action": action, "observation.state": (action - 2.0).astype(np.float32)}
    for index, camera in enumerate(cameras):
        image = np.full((*SIZE, 3), (30 + 20 * episode, 60, 40 + 60 * index), np.uint8)
        left = (3 * tick) % (SIZE[1] - 24)
        image[20:44, left : left + 24] = (230, 200, 60)
        made[f"observation.images.{camera}"] = image
    return made


def make(
    folder: Path, name: str, *, names: list[str], cameras: list[str], lengths: list[int], **options
) -> None:
    root = folder / name
    kind = options.pop("kind", "video")
    dataset = LeRobotDataset.create(
        f"test/{name}",
        30,
        features(names, cameras, kind),
        root=root,
        robot_type="so101_follower",
        rgb_encoder=RGBEncoderConfig(vcodec=options.pop("vcodec", "h264")),
        **options,
    )
    for episode, length in enumerate(lengths):
        for tick in range(length):
            dataset.add_frame(frame(names, cameras, episode, tick) | {"task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    reread = LeRobotDataset(f"test/{name}", root=root, return_uint8=True)
    items = [reread[index] for index in range(len(reread))]
    columns = {
        key: np.stack([np.asarray(item[key]) for item in items])
        for key in ("observation.state", "action", "episode_index")
    }
    for camera in cameras:
        pixels = np.stack([np.asarray(item[f"observation.images.{camera}"]) for item in items]).transpose(
            0, 2, 3, 1
        )
        if pixels.dtype != np.uint8:
            pixels = np.round(pixels * 255).astype(np.uint8)
        columns[camera] = pixels
    np.savez(folder / f"{name}.npz", **columns)


def main() -> None:
    folder = Path(sys.argv[1])
    two = ["front", "wrist"]
    make(folder, "video", names=JOINTS, cameras=two, lengths=[24, 17, 30])
    make(folder, "images", names=JOINTS, cameras=two, lengths=[12, 9], kind="image")
    both = [f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS]
    make(folder, "two_arms", names=both, cameras=["front", "left_wrist", "right_wrist"], lengths=[12])
    make(
        folder,
        "many_files",
        names=JOINTS,
        cameras=["front"],
        lengths=[10, 12, 14, 9],
        vcodec="libsvtav1",
        video_files_size_in_mb=0.001,
        data_files_size_in_mb=0.001,
    )


if __name__ == "__main__":
    main()
