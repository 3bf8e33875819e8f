"""What `--policy.optimize auto` does for ACT and Diffusion, decided when the policy is loaded.

The fast form of a policy is built from LeRobot's and answers a probe beside it; one that cannot be built, that fails, or
that answers otherwise is not used, and a line says so. The choice depends on checkpoint, flags and processor, never on
a measured time: the same server gives the same answers each time it starts.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from grasp_cube.policies.fast_layers import Unsupported

__all__ = ["TOLERANCES", "accelerate", "choose_dtype"]

logger = logging.getLogger(__name__)

# The largest difference from LeRobot's own answer that is accepted, in normalised values (1 is a joint's standard
# deviation, or half its range), for the probe at loading as in the tests.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# On a GPU torch's float32 convolutions are TF32, in LeRobot's form as in ours.
GPU_TOLERANCE = 2e-2
# Images of fewer pixels, all those of a request together, take a few milliseconds in float32.
BFLOAT16_FROM_PIXELS = 25_000


def choose_dtype(wanted: str | None, device: torch.device, pixels: int) -> torch.dtype:
    """The type in which images are encoded: what was asked for, else bfloat16 where the processor computes in it.

    A processor without such instructions emulates them, slower than float32. `pixels` are those of all images of a request.
    """
    if wanted is not None:
        return getattr(torch, wanted)
    capable = False
    if device.type == "cpu" and pixels >= BFLOAT16_FROM_PIXELS:
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        capable = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if capable else torch.float32


def accelerate(
    kind: str,
    model: Any,
    device: torch.device,
    wanted: str | None,
    images: Sequence[tuple[int, int]],
    ticks: int,
    report: Callable[[str], None],
) -> Any:
    """A `FastAct` or `FastDiffusion` that answers as LeRobot's `model`, or None where LeRobot's is to be used.

    `wanted` is `--policy.dtype`, `images` the (height, width) of each camera, `ticks` how many of each it looks at.
    """
    if device.type == "mps" or wanted == "float16" or (kind == "diffusion" and wanted == "bfloat16"):
        return None
    dtype = choose_dtype(wanted, device, ticks * sum(height * width for height, width in images))
    for candidate in dict.fromkeys([dtype, torch.float32] if wanted is None else [dtype]):
        try:
            with torch.no_grad():
                fast, found = _build(kind, model, candidate)
        except Unsupported as why:
            report(f"speed: LeRobot's own form, because the checkpoint has {why}")
            return None
        except Exception:
            logger.exception("the fast form of this policy fails here: LeRobot's is used, which is slower")
            return None
        tolerance = TOLERANCES[candidate] if device.type == "cpu" else GPU_TOLERANCE
        # Not `>`: what is not finite is not accepted either.
        if not found <= tolerance:
            logger.warning(
                "the fast form of this policy in %s is %.2g from LeRobot's, more than %.2g: it is not used",
                candidate,
                found,
                tolerance,
            )
            continue
        name = str(candidate).removeprefix("torch.")
        fast.release()
        report(f"speed: {name}, {found:.1g} from LeRobot's answer to a probe (--policy.optimize auto)")
        return fast
    return None


def _build(kind: str, model: Any, dtype: torch.dtype) -> tuple[Any, float]:
    """(the fast form, its largest difference from LeRobot's)"""
    if kind == "diffusion":
        from grasp_cube.policies.diffusion_fast import FastDiffusion

        diffusion = FastDiffusion(model, dtype)
        features, predictions = diffusion.differences()
        # The denoising is float32 whatever the encoders compute in.
        if dtype == torch.bfloat16 and not predictions <= TOLERANCES[torch.float32]:
            return diffusion, float("inf")
        return diffusion, max(features, predictions)
    from grasp_cube.policies.act_fast import FastAct

    act = FastAct(model, dtype)
    return act, act.difference()
