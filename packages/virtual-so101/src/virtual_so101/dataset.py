"""`make_virtual_dataset`: the expert's episodes as a LeRobot v3.0 dataset.

Each frame holds what the real chain would see at that tick: the cameras' pictures, the joint positions in whole
encoder ticks and LeRobot's normalised unit, and the goal in the same unit; the goal that the servos get is the
one that the driver would send for that action. Runs in lock step, as fast as the machine can.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from env_client.websocket_client_policy import ConnectionLost, WebsocketClientPolicy
from env_client.wire import RemoteError

from virtual_so101.calibration import JOINTS
from virtual_so101.expert import TICK, Misses, expert, follow
from virtual_so101.gl import PACKAGES, gl_backend
from virtual_so101.kinematics import UnreachableError
from virtual_so101.learner import Learner, served, until_it_fails
from virtual_so101.recorder import Frame, Recorder, RecordingError
from virtual_so101.rendering import RenderingUnavailableError
from virtual_so101.scene import HEIGHT, WIDTH
from virtual_so101.tasks import TASKS, Task, get_task
from virtual_so101.world import World

__all__ = ["joint_names", "main", "record", "record_episode"]

_FPS = 30
# Evaluations take their seeds from 1000 on: training data stay far away from them.
_FIRST_SEED = 100_000
# Correlation time of the disturbance, seconds.
_NOISE_TIME = 0.4
# A stretch between two misses that is shorter, in ticks, is not worth an episode.
_SHORT = 10
# How long a learner's server may be away at the start, seconds.
_CONNECT_S = 60.0
# More failures than this in a row are no bad luck.
_MAX_FAILURES = 25


def joint_names(arms: int) -> list[str]:
    """Names of the values of a state or an action, as LeRobot's robots name them; left arm first."""
    prefixes = ("",) if arms == 1 else ("left_", "right_")
    return [f"{prefix}{joint}.pos" for prefix in prefixes for joint in JOINTS]


def record_episode(
    world: World,
    *,
    size: tuple[int, int] | None = None,
    resize: str = "stretch",
    noise: float = 0.0,
    missed: bool = False,
) -> list[list[Frame]]:
    """Let the expert solve the world's current episode: the frames of what it gives to record, nothing when it fails.

    That is one episode, or with `missed` one for each stretch between two grasps that missed.

    Args:
        size: (height, width) of the pictures; None keeps 480x640.
        resize: how they get there, "stretch", "pad" or "crop": the client's own rule.
        noise: standard deviation (rad) of a slow disturbance of the arms' goals that is not in the recorded action:
            the pictures then show the arm beside the path and the actions lead back to it (Laskey et al., 2017).
        missed: before each grasp comes one that misses the cube, whose own frames are left out: what is learnt is to
            try again, not to miss.
    """
    misses = Misses(np.random.default_rng([world.seed, 2])) if missed else None
    episodes: list[list[Frame]] = [[]]
    disturbance = _disturbance(world, noise)
    try:
        for goals in expert(world, misses):
            pairs = list(enumerate(world.calibrations))
            action = np.concatenate([c.to_normalized(goals[6 * arm : 6 * arm + 6]) for arm, c in pairs])
            action = action.astype(np.float32)
            if misses is not None and misses.under_way:
                if episodes[-1]:
                    episodes.append([])
            else:
                images = {camera: _picture(world, camera, size, resize) for camera in world.camera_names}
                state = np.concatenate([c.to_normalized(world.positions(arm)) for arm, c in pairs])
                episodes[-1].append(Frame(images, state.astype(np.float32), action))
            sent = [c.from_normalized(action[6 * arm : 6 * arm + 6]) + next(disturbance) for arm, c in pairs]
            follow(world, np.concatenate(sent))
    except UnreachableError:
        return []
    return [frames for frames in episodes if len(frames) > _SHORT] if world.success() else []


def record(recorder: Recorder, world: World, episodes: int, learner: Learner | None = None) -> Iterator[int]:
    """Record until the dataset holds so many episodes; yields after each try how many it gave.

    With a `learner` the expert begins where that one has failed; an episode that the learner solves gives nothing.
    """
    settings = recorder.provenance.settings
    size = tuple(settings["image_size"])
    failures = 0
    while recorder.episodes < episodes:
        seed = recorder.provenance.next_seed
        world.reset(seed)
        found: list[list[Frame]] = []
        solved = learner is not None and not until_it_fails(world, learner.work(world))
        if not solved:
            found = record_episode(
                world,
                size=None if size == (HEIGHT, WIDTH) else size,
                resize=settings["resize"],
                noise=settings["noise"],
                missed=settings.get("missed_grasp", False),
            )
        if not found:
            recorder.drop(seed)
            failures += not solved
            if failures > _MAX_FAILURES:
                raise RecordingError(f"The expert failed {failures} times in a row, last with seed {seed}.")
        else:
            failures = 0
            found = found[: episodes - recorder.episodes]
            for frames in found:
                recorder.add(seed, _consumed(frames))
        yield len(found)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; 0 when the dataset is complete."""
    args = _parser().parse_args(argv)
    if gl_backend() is None:
        print(PACKAGES, file=sys.stderr)
        return 2
    try:
        return _run(args)
    except (RecordingError, RenderingUnavailableError, ValueError, ConnectionLost, RemoteError) as error:
        print(f"make_virtual_dataset: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    task = get_task(args.task, args.arms)
    size = args.image_size
    settings = {
        "task": task.name,
        "prompt": task.prompt,
        "arms": task.arms,
        "robot_type": "so101_follower" if task.arms == 1 else "bi_so101_follower",
        "fps": _FPS,
        "image_size": list(size),
        "resize": "none" if size == (HEIGHT, WIDTH) else args.resize,
        "noise": args.noise,
        "randomize": not args.no_randomize,
        "first_seed": args.seed,
        "crf": args.crf,
        "gop": args.gop,
    }
    if args.missed_grasp:
        # Only where it is asked for, as below: recordings of before have no such setting and can be continued.
        settings["missed_grasp"] = True
    if args.shrink != 1:
        settings["shrink"] = args.shrink
    with ExitStack() as stack:
        learner = None
        if args.learner is not None:
            policy = stack.enter_context(WebsocketClientPolicy(args.learner, connect_timeout_s=_CONNECT_S))
            learner = served(policy)
            settings["learner"] = learner.name
        return _record_all(args, task, settings, learner)


def _record_all(
    args: argparse.Namespace, task: Task, settings: dict[str, Any], learner: Learner | None
) -> int:
    size = args.image_size
    recorder = Recorder(
        args.root,
        settings,
        names=joint_names(task.arms),
        cameras=task.camera_names,
        size=size,
        crf=args.crf,
        gop=args.gop,
    )
    if recorder.episodes:
        print(f"{args.root} holds {recorder.episodes} episodes already; going on to {args.episodes}.")
    world = World(args.task, args.arms, seed=args.seed, randomize=not args.no_randomize, shrink=args.shrink)
    try:
        from tqdm import tqdm

        with tqdm(total=args.episodes, initial=recorder.episodes, unit="episode", desc=args.task) as bar:
            for kept in record(recorder, world, args.episodes, learner):
                bar.update(kept)
                bar.set_postfix(
                    seed=recorder.provenance.next_seed - 1, dropped=len(recorder.provenance.dropped)
                )
    except KeyboardInterrupt:
        recorder.checkpoint()
        print(f"\nStopped after {recorder.episodes} episodes; the same command goes on from there.")
        return 130
    finally:
        world.close()
    recorder.finish()
    dropped = recorder.provenance.dropped
    print(f"{args.root}: {recorder.episodes} episodes, {len(dropped)} seeds dropped {dropped or ''}".rstrip())
    return 0


def _consumed(frames: list[Frame]) -> Iterator[Frame]:
    """The frames in order, each forgotten once it is handed out."""
    frames.reverse()
    while frames:
        yield frames.pop()


def _disturbance(world: World, deviation: float) -> Iterator[np.ndarray]:
    """(6,) rad for one arm after the other: filtered noise of the given deviation, nothing on the jaw."""
    rng = np.random.default_rng([world.seed, 1])
    keep = np.exp(-TICK / _NOISE_TIME)
    values = np.zeros((world.n_arms, 6))
    while True:
        for arm in range(world.n_arms):
            values[arm] = keep * values[arm] + np.sqrt(1.0 - keep**2) * deviation * rng.standard_normal(6)
            values[arm, 5] = 0.0
            yield values[arm]


def _picture(world: World, camera: str, size: tuple[int, int] | None, resize: str) -> np.ndarray:
    image = world.render(camera)
    if size is None:
        return image
    from env_client.wire.images import resize_image

    return resize_image(image, *size, resize)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_virtual_dataset", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=sorted(TASKS), default="lift", help="what the expert does")
    parser.add_argument(
        "--arms", type=int, choices=(1, 2), help="arms at the table; the task's own number if not given"
    )
    parser.add_argument("--episodes", type=int, default=50, help="episodes that the dataset holds in the end")
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of the dataset; a partial one is continued"
    )
    parser.add_argument(
        "--seed", type=int, default=_FIRST_SEED, help="seed of the first episode; the next ones follow"
    )
    parser.add_argument(
        "--image-size",
        type=_size,
        default=(HEIGHT, WIDTH),
        metavar="HxW",
        help="size of the pictures, 480x640",
    )
    parser.add_argument(
        "--shrink",
        type=int,
        choices=(1, 2),
        default=1,
        help="2 draws at 240x320, in half the time, for pictures that are to be smaller still",
    )
    parser.add_argument(
        "--resize",
        choices=("stretch", "pad", "crop"),
        default="stretch",
        help="how pictures get to another size",
    )
    parser.add_argument("--no-randomize", action="store_true", help="keep light, tints and cameras the same")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="RAD",
        help="slow disturbance of the goals, not recorded; try 0.01",
    )
    parser.add_argument(
        "--missed-grasp",
        action="store_true",
        help="each grasp comes after one that missed, which is left out: what follows is an episode of its own",
    )
    parser.add_argument(
        "--learner",
        metavar="URL",
        help="a served policy (serve_policy), ws://127.0.0.1:8000: it works until it fails, and what the expert does from "
        "there is recorded; an episode that it solves is not",
    )
    parser.add_argument("--crf", type=int, default=23, help="H.264 quality, 0 (best) to 51")
    parser.add_argument(
        "--gop", type=int, default=2, help="frames from one key frame to the next; 2 reads fastest"
    )
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(int(match[1]), int(match[2])) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write height x width, for example 96x128")
    if int(match[1]) % 2 or int(match[2]) % 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} has an odd edge, which H.264 cannot hold; use even numbers"
        )
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
