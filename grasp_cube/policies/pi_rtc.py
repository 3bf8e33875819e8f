"""Real-time chunking on the server's side: a new chunk goes on where the last one will have arrived.

Notation of Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies": H rows in a chunk, d rows that
will have been executed before the answer arrives, mask_end = H - s the first row that nothing binds to the last chunk.
LeRobot's flow runs from noise at time 1 to actions at time 0, x(t) = t * noise + (1 - t) * actions.

guided   LeRobot's guidance: the velocity is pulled towards the last chunk, with weight 1 on the first d rows, falling
         to 0 at mask_end. Equal to LeRobot's `RTCProcessor`.
prefix   the same, and the velocity of the first d rows is (x - prev) / t: the straight line that ends in `prev` itself.
         At each step these rows hold t * noise + (1 - t) * prev, and the other rows are denoised beside them.

Error policy: `InvalidInput` that names the feasible range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from env_client.wire import InvalidInput, PolicySpec, RtcPrefix

__all__ = ["Guide", "RtcMode", "check_rtc", "prefix_processor", "prefix_rows", "prefix_weights", "steer"]

RtcMode = Literal["guided", "prefix"]


@dataclass(frozen=True)
class Guide:
    """What a batch of chunks follows."""

    # (B, rows, action_dim), in the model's own space.
    prev: Any
    # d
    delay: int
    # H - s
    mask_end: int


def check_rtc(rtc: RtcPrefix, spec: PolicySpec) -> tuple[int, int]:
    """(delay, mask_end) of a request, by which batches are grouped. Raises `InvalidInput`."""
    horizon, rows = spec.horizon, len(rtc.prev)
    if rtc.prev.ndim != 2 or rtc.prev.shape[1] != spec.action_dim or not rows:
        raise InvalidInput(
            f"rtc.prev has shape {list(rtc.prev.shape)}; (n, {spec.action_dim}) was expected: the actions not yet executed, "
            "in the robot's unit"
        )
    if not np.isfinite(rtc.prev).all():
        raise InvalidInput("rtc.prev holds values that are not finite")
    most = min(horizon // 2, rows)
    if not 0 <= rtc.delay <= most:
        why = "half of the chunk" if most < rows else "the rows in prev"
        raise InvalidInput(
            f"rtc.delay is {rtc.delay}, which is not feasible: 0 to {most} was expected for chunks of {horizon} actions "
            f"({why}, so that enough of a chunk is left when it arrives); ask earlier, or without rtc"
        )
    if not rtc.delay <= rtc.mask_end <= horizon:
        raise InvalidInput(
            f"rtc.mask_end is {rtc.mask_end}; {rtc.delay} (the delay) to {horizon} (the chunk) was expected"
        )
    # Nothing binds where there is no row to be bound to.
    return rtc.delay, min(rtc.mask_end, rows)


def prefix_rows(prefixes: Sequence[RtcPrefix], rows: int) -> np.ndarray:
    """(B, rows, action_dim) float32: each `prev` cut, or carried on by its last row (which no weight reaches)."""
    return np.stack([p.prev[np.minimum(np.arange(rows), len(p.prev) - 1)] for p in prefixes])


def prefix_weights(processor: Any, guide: Guide, rows: int) -> Any:
    """(rows,) how strongly each row is pulled: 1 up to the delay, falling to 0 at the mask's end."""
    return processor.get_prefix_weights(guide.delay, min(guide.mask_end, guide.prev.shape[1]), rows)


def steer(velocity: Any, x: Any, time: float, prev: Any, weights: Any, most: float, hard: Any = None) -> Any:
    """The velocity (B, rows, D) at `time` that leads to `prev` where `weights` (rows, 1) say so.

    v - min(most, (1 - tau) / tau * (tau^2 + (1 - tau)^2) / (1 - tau)^2) * weights * (prev - (x - time * v)) with
    tau = 1 - time: Black et al. 2025, equation 2, with LeRobot's signs and its unit Jacobian. Rows where `hard` (rows, 1)
    is true get (x - prev) / time instead.
    """
    tau = 1.0 - time
    gain = most if tau <= 0 else min(most, (tau**2 + time**2) / (tau * time))
    steered = velocity - gain * weights * (prev - (x - time * velocity))
    return steered if hard is None else (x - prev).div(time).where(hard, steered)


def prefix_processor(config: Any) -> Any:
    """LeRobot's `RTCProcessor` with the first `inference_delay` rows bound to the last chunk exactly."""
    from lerobot.policies.rtc import RTCProcessor

    class HardPrefix(RTCProcessor):
        def denoise_step(
            self,
            x_t: Any,
            prev_chunk_left_over: Any,
            inference_delay: Any,
            time: Any,
            original_denoise_step_partial: Any,
            execution_horizon: Any = None,
        ) -> Any:
            velocity = super().denoise_step(
                x_t,
                prev_chunk_left_over,
                inference_delay,
                time,
                original_denoise_step_partial,
                execution_horizon,
            )
            if prev_chunk_left_over is None:
                return velocity
            # Not into LeRobot's own tensor: a step of this kind is cheap beside the model's.
            velocity = velocity.clone()
            bound = x_t[:, :inference_delay]
            target = bound.new_zeros(bound.shape)
            target[..., : prev_chunk_left_over.shape[2]] = prev_chunk_left_over[:, :inference_delay]
            velocity[:, :inference_delay] = (bound - target) / time
            return velocity

    return HardPrefix(config)
