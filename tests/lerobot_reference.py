"""A checkpoint in LeRobot's hands alone: what ours is compared with, written with LeRobot's public functions."""

import numpy as np
import torch


class Reference:
    """A checkpoint in LeRobot's hands alone."""

    def __init__(self, folder, **changes):
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        self.config = PreTrainedConfig.from_pretrained(folder)
        for key, value in changes.items():
            setattr(self.config, key, value)
        policy_class = get_policy_class(self.config.type)
        self.policy = policy_class.from_pretrained(folder, config=self.config, strict=True)
        self.pre, self.post = make_pre_post_processors(
            self.config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": "cpu"}},
        )

    def features(self, obs):
        from lerobot.policies.utils import prepare_observation_for_inference

        frame = {f"observation.images.{name}": image.copy() for name, image in obs["images"].items()}
        frame["observation.state"] = np.concatenate(list(obs["states"].values()))
        return self.pre(prepare_observation_for_inference(frame, torch.device("cpu"), task=obs["task"]))

    def chunk(self, *observations, seed=None):
        """The chunk for consecutive observations, oldest first; all noise from torch's own seeded generator."""
        frames = [self.features(obs) for obs in observations]
        if self.config.type == "act":
            return self.post(self.policy.predict_action_chunk(frames[-1]))[0].numpy()
        keys = [*self.config.image_features, "observation.state"]
        batch = {key: torch.stack([frame[key] for frame in frames], dim=1) for key in keys}
        torch.manual_seed(seed)
        noise = torch.randn(1, self.config.horizon, 6)
        return self.post(self.policy.predict_action_chunk(batch, noise=noise))[0].numpy()
