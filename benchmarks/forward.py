"""The forward pass: `--policy.optimize auto` in turn with LeRobot's eager path, from an observation to actions.

    python benchmarks/forward.py [--quick] [--json FILE]

Both sides run in this process, in float32 or what `auto` chooses, on as many threads as torch takes; LeRobot's Diffusion in one
thread where that is quicker. Answers are compared
first (`largest difference`, in robot units of a range of 200). Diffusion runs DDIM with ten steps on both sides: with two
frames that nobody has seen, with requests at every tick (the frame before is known), and with the same frames once more.
Checkpoints other than the shipped ones are made here with random weights. `--quick` measures the small ACT and Diffusion only;
the full form those of LeRobot's default size as well, tiny Pi policies, and batches.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ratios import Curve, Part, Ratio, main, paired, timed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

__all__ = ["run"]

SEED = 1
DDIM = {"noise_scheduler_type": "DDIM", "num_inference_steps": 10}
SMALL, MIDDLE, FULL = (72, 96), (240, 320), (480, 640)
ACT_DEFAULT = {
    "chunk_size": 100,
    "n_action_steps": 100,
    "dim_model": 512,
    "n_heads": 8,
    "dim_feedforward": 3200,
    "n_encoder_layers": 4,
    "use_vae": True,
}
DIFFUSION: dict[str, Any] = {
    "horizon": 64,
    "n_action_steps": 32,
    "kernel_size": 5,
    "n_groups": 8,
    "diffusion_step_embed_dim": 128,
    "spatial_softmax_num_keypoints": 32,
    "num_train_timesteps": 100,
    **DDIM,
}
DIFFUSION_SMALL = DIFFUSION | {
    "horizon": 24,
    "n_action_steps": 16,
    "kernel_size": 3,
    "diffusion_step_embed_dim": 64,
    "down_dims": (32, 64, 128),
}
DIFFUSION_DEFAULT = DIFFUSION | {
    "down_dims": (512, 1024, 2048),
    "use_separate_rgb_encoder_per_camera": True,
}
BATCHES = (1, 2, 4, 8)


def new_frames(size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Observations of which no two have an equal image; making one costs a copy of its images."""
    from small_checkpoints import observation

    base = observation(0, size=size)
    for number in itertools.count():
        images = {name: image.copy() for name, image in base["images"].items()}
        for image in images.values():
            image[0, :4, 0] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
        yield base | {"images": images}


def compared(
    name: str,
    what: str,
    ours: Callable[[], np.ndarray],
    peer: Callable[[], np.ndarray],
    rounds: int,
    warm_up: int = 2,
) -> Ratio:
    difference = float(np.abs(ours() - peer()).max())
    facts = {"largest difference": difference}
    return paired(f"forward.{name}", what, ours, peer, rounds=rounds, warm_up=warm_up, facts=facts)


def act(name: str, what: str, folder: Path, size: tuple[int, int], rounds: int, **options: Any) -> Ratio:
    from lerobot_reference import Reference
    from small_checkpoints import observation

    from grasp_cube.policies.load import load_policy

    policy, reference = load_policy(folder, device="cpu", **options), Reference(folder)
    obs = observation(1, size=size)
    return compared(name, what, lambda: policy.get_actions(obs), lambda: reference.chunk(obs), rounds)


def diffusion(name: str, what: str, folder: Path, size: tuple[int, int], rounds: int) -> list[Ratio]:
    from lerobot_reference import Reference

    from grasp_cube.policies.fast_layers import one_thread
    from grasp_cube.policies.load import load_policy

    policy, reference = load_policy(folder, device="cpu", noise_seed=SEED), Reference(folder)
    frames = new_frames(size)
    first = next(frames), next(frames)
    # A narrow U-Net's layers are too small for two threads: LeRobot gets the number that suits it better.
    alone = best_alone(lambda: reference.chunk(*first, seed=SEED))
    asked: dict[str, Any] = {}

    def both(kind: str, tick: Callable[[], tuple[Any, Any]]) -> Ratio:
        """`tick` gives (before, now); the peer sees what ours saw."""

        def ours() -> np.ndarray:
            asked["ticks"] = before, now = tick()
            return policy.get_actions(now, history=(before,))

        def peer() -> np.ndarray:
            with one_thread(alone):
                return reference.chunk(*asked["ticks"], seed=SEED)

        return compared(f"{name}_{kind}", f"{what}, {kind.replace('_', ' ')}", ours, peer, rounds)

    def every_tick() -> tuple[Any, Any]:
        return asked["ticks"][1], next(frames)

    return [
        both("new_frames", lambda: (next(frames), next(frames))),
        both("every_tick", every_tick),
        both("same_frames", lambda: asked["ticks"]),
    ]


def best_alone(call: Callable[[], object]) -> bool:
    """Whether `call` is quicker in one thread than in torch's own number of them."""
    from grasp_cube.policies.fast_layers import one_thread

    times: dict[bool, list[float]] = {True: [], False: []}
    for alone in (False, True) * 4:
        with one_thread(alone):
            times[alone].append(timed(call))
    return min(times[True]) < min(times[False])


def pi(kind: str, folder: Path, rounds: int) -> Ratio:
    from pi_reference import PiReference, pi_observation

    from grasp_cube.policies.load import load_policy
    from grasp_cube.tiny_checkpoint import make_tiny_checkpoint

    make_tiny_checkpoint(folder, kind)
    policy, reference = load_policy(folder, device="cpu", noise_seed=SEED), PiReference(folder)
    obs = pi_observation(1)
    return compared(
        f"{kind}_tiny",
        f"{kind}, 0.4 million parameters, 10 steps",
        lambda: policy.get_actions(obs),
        lambda: reference.chunk(obs, SEED),
        rounds,
    )


def batches(folders: dict[str, Path], rounds: int) -> Curve:
    """Milliseconds for each request of a batch, ours and LeRobot's arithmetic in turn; every frame is new."""
    from grasp_cube.policies.load import load_policy
    from grasp_cube.policies.policy import PolicyRequest

    frames, series = new_frames(SMALL), {}
    for kind, folder in folders.items():
        options = {"device": "cpu", "noise_seed": SEED}
        if kind == "diffusion":
            options |= {"noise_scheduler": "DDIM", "num_inference_steps": 10}
        policies = {way: load_policy(folder, optimize=way, **options) for way in ("auto", "none")}
        times: dict[str, list[list[float]]] = {way: [[] for _ in BATCHES] for way in policies}
        for _ in range(rounds + 1):
            for place, size in enumerate(BATCHES):
                requests = [PolicyRequest(next(frames), history=(next(frames),)) for _ in range(size)]
                for way, policy in policies.items():
                    times[way][place].append(timed(policy.get_actions_batch, requests) / size)
        for way, found in times.items():
            # The first round is the warm-up.
            series[f"{kind}, {way}"] = [float(np.median(each[1:])) for each in found]
    return Curve(
        "forward.batch",
        "a batch of requests, lift_act and a Diffusion policy of its size",
        "requests in the batch",
        "ms for each",
        list(map(float, BATCHES)),
        series,
    )


def run(quick: bool) -> Part:
    from small_checkpoints import save_act, save_diffusion

    part = Part("forward")
    rounds, few = (20, 0) if quick else (30, 5)
    lift, lift_diffusion = (ROOT / "checkpoints" / name for name in ("lift_act", "lift_diffusion"))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        part.ratios.append(act("lift_act", "lift_act, two images of 72x96", lift, SMALL, rounds))
        part.ratios += diffusion(
            "lift_diffusion", "lift_diffusion, two images of 72x96", lift_diffusion, SMALL, rounds
        )
        if not quick:
            small = save_diffusion(folder / "small", size=SMALL, **DIFFUSION_SMALL)
            what = "Diffusion with group norms, 12 million parameters, 72x96"
            part.ratios += diffusion("diffusion_small", what, small, SMALL, rounds)
            part.ratios += [pi(kind, folder / kind, rounds) for kind in ("pi0", "pi05")]
            full = save_act(folder / "act", size=FULL, **ACT_DEFAULT)
            what = "ACT of LeRobot's default size, two images of 480x640"
            part.ratios.append(act("act_default", what, full, FULL, few))
            part.ratios.append(
                act(
                    "act_default_float32", f"{what}, --policy.dtype float32", full, FULL, few, dtype="float32"
                )
            )
            large = save_diffusion(folder / "large", size=MIDDLE, **DIFFUSION_DEFAULT)
            what = "Diffusion of LeRobot's default size, 278 million parameters, 240x320"
            part.ratios += diffusion("diffusion_default", what, large, MIDDLE, few)
            part.curves.append(batches({"act": lift, "diffusion": lift_diffusion}, 5))
    part.skipped.append("the same on a GPU: none was at hand")
    for curve in part.curves:
        for name, values in curve.series.items():
            part.tables[f"ms for each request of a batch: {name}"] = dict(
                zip(map(str, BATCHES), values, strict=True)
            )
    return part


if __name__ == "__main__":
    main(run, __doc__)
