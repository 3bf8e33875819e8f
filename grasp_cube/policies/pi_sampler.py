"""The denoising of Pi0 and Pi0.5: a preprocessed batch and noise -> a chunk.

`--policy.optimize none` is LeRobot's own arithmetic, through `predict_action_chunk`; `auto` is `pi_fast`.
"""

from typing import Any, Protocol

from grasp_cube.policies.pi_rtc import Guide, RtcMode, prefix_processor

__all__ = ["Sampler", "make_sampler"]


class Sampler(Protocol):
    # True while the policy warms up: what is seen for the first time may take its time.
    recording: bool

    def __call__(self, batch: dict[str, Any], noise: Any, guide: Guide | None) -> Any:
        """`noise` (B, rows, D) -> (B, rows, action_dim), normalised."""
        ...


def make_sampler(model: Any, rtc: RtcMode, *, optimize: bool) -> Sampler:
    """`model` is LeRobot's policy; a checkpoint's own `rtc_config` sets the guidance, else LeRobot's defaults do."""
    from lerobot.policies.rtc import RTCConfig

    # Without a last chunk the processor changes nothing.
    config = model.config.rtc_config or RTCConfig()
    config.enabled = True
    model.config.rtc_config = config
    model.init_rtc_processor()
    if optimize:
        from grasp_cube.policies.pi_fast import FastSampler

        return FastSampler(model, rtc)
    if rtc == "prefix":
        model.rtc_processor = model.model.rtc_processor = prefix_processor(config)
    return _LeRobotSampler(model)


class _LeRobotSampler:
    def __init__(self, model: Any):
        self.recording = False
        self._model = model

    def __call__(self, batch: dict[str, Any], noise: Any, guide: Guide | None) -> Any:
        if guide is None:
            return self._model.predict_action_chunk(batch, noise=noise)
        return self._model.predict_action_chunk(
            batch,
            noise=noise,
            prev_chunk_left_over=guide.prev,
            inference_delay=guide.delay,
            execution_horizon=guide.mask_end,
        )
