"""A Pi0 or Pi0.5 checkpoint in LeRobot's hands alone: what ours is compared with."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from processes import running

# What a server that imports LeRobot may take until it is ready, in seconds, on a machine with other work to do.
PATIENCE_S = 900.0


@contextlib.contextmanager
def pi_server(*arguments: object) -> Iterator[int]:
    """The port of `serve_policy` with these flags, on one thread of the CPU, as the references here compute."""
    command = [sys.executable, "-m", "grasp_cube.serve_policy", "--host", "127.0.0.1", "--port", "0"]
    with running(*command, "--device", "cpu", *map(str, arguments), env={"OMP_NUM_THREADS": "1"}) as server:
        found = server.wait_for(r"Waiting for client connections at ws://127\.0\.0\.1:(\d+)", PATIENCE_S)
        yield int(found[1])


class PiReference:
    """LeRobot's policy and processors of a tiny checkpoint."""

    def __init__(self, folder, *, dtype: str = "float32"):
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.policies.pretrained import PreTrainedPolicy
        from lerobot.policies.rtc import RTCConfig

        from grasp_cube.policies import pi_tiny

        self.config = PreTrainedConfig.from_pretrained(folder)
        self.config.dtype = dtype
        self.config.rtc_config = RTCConfig()
        # PI0Policy's own from_pretrained hides every error; the one of its base class raises.
        self.policy = PreTrainedPolicy.from_pretrained.__func__(
            pi_tiny.TINY_POLICIES[type(self.config)], folder, config=self.config, strict=True
        )
        self.pre, self.post = make_pre_post_processors(
            self.config,
            pretrained_path=str(folder),
            preprocessor_overrides={
                "device_processor": {"device": "cpu"},
                "tokenizer_processor": {"tokenizer_name": str(folder / "tokenizer")},
            },
        )

    def batch(self, obs: dict[str, Any]) -> dict[str, Any]:
        from lerobot.policies.utils import prepare_observation_for_inference

        frame = {f"observation.images.{name}": image.copy() for name, image in obs["images"].items()}
        frame["observation.state"] = np.concatenate(list(obs["states"].values()))
        return self.pre(prepare_observation_for_inference(frame, torch.device("cpu"), task=obs["task"]))

    def noise(self, seed: int) -> torch.Tensor:
        shape = (1, self.config.chunk_size, self.config.max_action_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def chunk(self, obs: dict[str, Any], seed: int, **rtc: Any) -> np.ndarray:
        """The chunk (rows, action_dim) for one observation; `rtc` as LeRobot's `predict_action_chunk` takes it."""
        with torch.no_grad():
            chunk = self.policy.predict_action_chunk(self.batch(obs), noise=self.noise(seed), **rtc)
            return self.post(chunk)[0].numpy()

    def in_model_space(self, obs: dict[str, Any], actions: np.ndarray) -> torch.Tensor:
        """Actions in robot units as LeRobot's own helper for leftovers brings them into the model's space."""
        from lerobot.policies.rtc.relative import reanchor_relative_rtc_prefix
        from lerobot.processor import NormalizerProcessorStep, RelativeActionsProcessorStep

        (normalize,) = [step for step in self.pre.steps if isinstance(step, NormalizerProcessorStep)]
        (relative,) = [step for step in self.pre.steps if isinstance(step, RelativeActionsProcessorStep)]
        prev = torch.from_numpy(actions.copy())[None]
        if not relative.enabled:
            return normalize._normalize_action(prev, inverse=False)
        state = torch.from_numpy(np.concatenate(list(obs["states"].values())))
        return reanchor_relative_rtc_prefix(prev, state, relative, normalize, "cpu")


def pi_observation(
    seed: int,
    prompt: str = "lift up the red cube",
    cameras: tuple[str, ...] = ("front", "wrist"),
    dim: int = 6,
) -> dict[str, Any]:
    """An SO-101 observation with random content, in the size of the tiny checkpoints."""
    random = np.random.default_rng(seed)
    images = {name: random.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in cameras}
    state = random.uniform(-50, 50, dim).astype(np.float32)
    return {"images": images, "states": {"arm": state}, "task": prompt}
