"""`make_scripted_dataset`: LeRobot v3.0 episodes of a scripted arm that lifts a cube, with drawn cameras.

It needs no robot and no simulator: the joints follow a plan, the pictures are boxes. An episode is a function of
`--seed` and its number alone, so the same command makes the same dataset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from env_client.cli import fail, parse

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ScriptedDatasetConfig", "main", "make_scripted_dataset"]

_PROG = "make_scripted_dataset"
_ROBOT = "so101_follower"


@dataclass(frozen=True)
class ScriptedDatasetConfig:
    """What is made, and where."""

    # Folder of the new dataset; it must not exist yet.
    root: str
    # Number of episodes, each 5 to 6 seconds long.
    episodes: int = 3
    # Seed of the cube's places, the colours and the pace.
    seed: int = 0
    # Prompt that is recorded with every frame.
    task: str = "lift up the red cube"
    # Size of the camera images, height x width.
    image_size: str = "480x640"

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}; at least 1 was expected")
        _ = self.height_width

    @property
    def height_width(self) -> tuple[int, int]:
        """`image_size` as two numbers."""
        height, cross, width = self.image_size.partition("x")
        if not cross or not height.isdigit() or not width.isdigit() or int(height) % 2 or int(width) % 2:
            raise ValueError(
                f"--image-size is {self.image_size!r}; HEIGHTxWIDTH in even pixels was expected, such as 480x640"
            )
        return int(height), int(width)


def make_scripted_dataset(config: ScriptedDatasetConfig) -> Path:
    """Writes the dataset and returns its folder. Raises `FileExistsError` when the folder is there already."""
    root = Path(config.root)
    if root.exists():
        raise FileExistsError(f"{root} exists already; remove it or name another --root")
    import av
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset
    from tqdm import tqdm

    import datasets
    from grasp_cube.training.scripted_motion import FPS

    # Otherwise FFmpeg's statistics of every video and one more bar for every episode break ours.
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()
    height, width = config.height_width
    dataset = LeRobotDataset.create(
        repo_id=f"local/{root.name}",
        fps=FPS,
        features=_features(height, width),
        root=root,
        robot_type=_ROBOT,
        video_backend="pyav",
        # Every player and every decoder reads H.264; two seconds between key frames keep the files small.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", g=60, crf=23, preset="medium"),
        streaming_encoding=True,
        encoder_queue_maxsize=200,
    )
    try:
        for number in tqdm(range(config.episodes), desc=str(root), unit="episode", disable=None):
            for frame in _frames(config.seed, number, height, width):
                dataset.add_frame({**frame, "task": config.task})
            dataset.save_episode()
    finally:
        dataset.finalize()
    return root


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config = parse(
        ScriptedDatasetConfig,
        argv,
        prog=_PROG,
        description="Records a scripted lift with drawn cameras as a LeRobot v3.0 dataset.",
    )
    try:
        root = make_scripted_dataset(config)
    except OSError as error:
        fail(_PROG, str(error))
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    print(f"{root}: {config.episodes} episodes, {size / 1e6:.1f} MB")


def _features(height: int, width: int) -> dict[str, dict[str, Any]]:
    from grasp_cube.training.scripted_motion import JOINTS

    joints = {"dtype": "float32", "shape": (len(JOINTS),), "names": [f"{joint}.pos" for joint in JOINTS]}
    camera = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    return {
        "action": joints,
        "observation.state": joints,
        "observation.images.front": camera,
        "observation.images.wrist": camera,
    }


def _frames(seed: int, number: int, height: int, width: int) -> "Iterator[dict[str, np.ndarray]]":
    """The frames of one episode."""
    import numpy as np

    from grasp_cube.training.scripted_motion import Cube, gripper_pose, plan_lift
    from grasp_cube.training.scripted_scene import Looks, draw_scene, front_camera, wrist_camera

    rng = np.random.default_rng([seed, number])
    cube = Cube(rng.uniform(0.20, 0.28), rng.uniform(-0.09, 0.09), rng.uniform(-0.45, 0.45))
    episode = plan_lift(cube, rng)
    looks = Looks.random(rng)
    front = front_camera(height, width)
    for action, state, pose in zip(episode.actions, episode.states, episode.cubes, strict=True):
        wrist = wrist_camera(gripper_pose(state), height, width)
        yield {
            "action": action,
            "observation.state": state,
            "observation.images.front": draw_scene(front, state, pose, looks),
            "observation.images.wrist": draw_scene(wrist, state, pose, looks),
        }


if __name__ == "__main__":
    main()
