"""LeRobot's Pi0 or Pi0.5, filled strictly from named tensors.

The model is constructed without memory (on torch's meta device), every name and shape is compared, and only then are
the tensors read, each into its final type and place: nothing is ever held twice but the tensor at hand.
Error policy: `PolicyError`; a missing, extra, misshapen or non-finite tensor ends it before the model exists.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from grasp_cube.policies.lerobot_files import COMPUTED, count_differences
from grasp_cube.policies.pi_tensors import TensorSource
from grasp_cube.policies.policy import PolicyError

__all__ = [
    "EMBEDDING",
    "HEAD",
    "PI_DTYPES",
    "build_pi",
    "check_names",
    "empty_pi",
    "policy_class",
    "vocabulary_size",
]

PI_DTYPES = ("float32", "bfloat16")

_PALIGEMMA = "model.paligemma_with_expert.paligemma"
EMBEDDING = f"{_PALIGEMMA}.model.language_model.embed_tokens.weight"
HEAD = f"{_PALIGEMMA}.lm_head.weight"
# PaliGemma's parts as transformers before 4.52 called them, and since.
_RENAMED = (
    (".paligemma.language_model.lm_head.", ".paligemma.lm_head."),
    (".paligemma.language_model.model.", ".paligemma.model.language_model."),
    (".paligemma.vision_tower.", ".paligemma.model.vision_tower."),
    (".paligemma.multi_modal_projector.", ".paligemma.model.multi_modal_projector."),
)
# Every checkpoint holds the heads that predict words, and a policy never predicts any: they are checked, not read.
_UNUSED = (HEAD, "model.paligemma_with_expert.gemma_expert.lm_head.weight")


def policy_class(config: Any) -> Any:
    """LeRobot's class for one of its configs."""
    from grasp_cube.policies.pi_tiny import TINY_POLICIES

    if type(config) in TINY_POLICIES:
        return TINY_POLICIES[type(config)]
    from lerobot.policies.pi0 import PI0Config, PI0Policy
    from lerobot.policies.pi05 import PI05Config, PI05Policy

    classes = {PI0Config: PI0Policy, PI05Config: PI05Policy}
    if type(config) not in classes:
        raise PolicyError(f"{type(config).__name__} is no config of Pi0 or Pi0.5")
    return classes[type(config)]


def empty_pi(config: Any, *, dtype: str | None = None) -> Any:
    """The policy of a LeRobot config without memory: names, shapes and types of its weights, but no values.

    `dtype` (float32, bfloat16) replaces the config's. In bfloat16 LeRobot keeps the vision tower and the norms in
    float32; so does this. Raises `PolicyError` when LeRobot cannot build it.
    """
    import torch

    wanted = dtype or config.dtype
    if wanted not in PI_DTYPES:
        raise PolicyError(f"--policy.dtype is {wanted!r}; Pi0 and Pi0.5 run in {' or '.join(PI_DTYPES)}")
    config = copy.deepcopy(config)
    config.dtype = wanted
    config.device = "meta"
    # A compiled model has other tensor names; and what is served is never trained.
    config.compile_model = config.gradient_checkpointing = False
    try:
        with torch.device("meta"):
            return policy_class(config)(config)
    except PolicyError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PolicyError(
            f"LeRobot cannot build the policy that its config describes ({type(error).__name__}: {reason:.300}): was it "
            "saved by a newer LeRobot, or edited by hand?"
        ) from error


def current_name(name: str) -> str:
    """The name of a stored tensor in LeRobot's model of today."""
    plain = name.replace("._orig_mod", "")
    plain = plain if plain.startswith("model.") else f"model.{plain}"
    for before, now in _RENAMED:
        plain = plain.replace(before, now)
    return plain


def check_names(expected: Mapping[str, Any], tensors: TensorSource, where: str) -> dict[str, str]:
    """{name in the model: name in `tensors`}, when every tensor has its place and every place its tensor.

    `expected` is the empty model's state_dict. Names without the leading `model.` are those of checkpoints that were
    converted from openpi. The word embedding and the head above it are one tensor in some files; either name will do.
    Raises `PolicyError` before any value is read.
    """
    found: dict[str, str] = {}
    extra = []
    for name in tensors.keys():  # noqa: SIM118
        plain = current_name(name)
        if plain in expected and plain not in found:
            found[plain] = name
        elif not name.endswith(COMPUTED):
            extra.append(name)
    for one, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if one in expected and one not in found and other in found:
            found[one] = found[other]
    missing = [name for name in expected if name not in found]
    if missing or extra:
        raise PolicyError(
            f"the tensors in {where} are not those of the policy in its config: {count_differences(missing, extra)}; copy both from "
            "the same checkpoint"
        )
    for name, stored in found.items():
        if tensors.shape(stored) != tuple(expected[name].shape):
            raise PolicyError(
                f"the tensor {stored} in {where} has shape {list(tensors.shape(stored))}, but the config makes it "
                f"{list(expected[name].shape)}: copy both from the same checkpoint"
            )
        if not tensors.dtype(stored).startswith(("float", "bfloat")):
            raise PolicyError(
                f"the tensor {stored} in {where} is {tensors.dtype(stored)}; floating-point weights were expected"
            )
    return found


def build_pi(
    config: Any,
    tensors: TensorSource,
    *,
    device: Any,
    dtype: str | None = None,
    where: str = "the checkpoint",
    report: Callable[[str], None] = lambda line: None,
) -> Any:
    """LeRobot's PI0Policy or PI05Policy of `config` on `device`, in evaluation mode, holding the values of `tensors`.

    `dtype` as in `empty_pi`; `where` names the tensors' origin in errors. The heads that predict words are left out of
    memory. Raises `PolicyError`.
    """
    import torch

    device = torch.device(device)
    policy = empty_pi(config, dtype=dtype)
    expected = policy.state_dict()
    names = check_names(expected, tensors, where)
    values: dict[str, Any] = {}
    # The largest first: what is held twice, while it changes its type, is held while the rest is not there yet.
    for name in sorted(expected, key=lambda name: -expected[name].numel()):
        if name in _UNUSED:
            continue
        value = tensors.get(names[name])
        low, high = value.aminmax() if value.numel() else (torch.zeros(()),) * 2
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise PolicyError(
                f"the tensor {names[name]} in {where} holds values that are not finite: its training diverged"
            )
        values[name] = value.to(device=device, dtype=expected[name].dtype)
        del value
    policy.load_state_dict(values, strict=False, assign=True)
    pair = policy.model.paligemma_with_expert
    pair.paligemma.lm_head = pair.gemma_expert.lm_head = None
    _fill_buffers(policy, device)
    policy.config.device = str(device)
    policy.eval().requires_grad_(False)
    policy.reset()
    count = sum(p.numel() for p in policy.parameters())
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    kinds = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()}))
    report(f"weights: {count / 1e6:.1f} million parameters, strictly loaded, {size / 1e9:.2f} GB in {kinds}")
    return policy


def _fill_buffers(policy: Any, device: Any) -> None:
    """What a module computes for itself when it is constructed, and no checkpoint holds.

    The type is the empty model's: LeRobot in bfloat16 rounds the rotary frequencies as well.
    """
    import torch

    for module_name, module in policy.named_modules():
        # A module may share one with another; each has its own here.
        for name, empty in list(module._buffers.items()):
            if empty is None or not empty.is_meta:
                continue
            if name in ("inv_freq", "original_inv_freq"):
                value = getattr(type(module)(module.config), name)
            elif name == "embed_scale":
                value = torch.tensor(module.scalar_embed_scale)
            elif name == "position_ids":
                value = torch.arange(module.num_positions).expand((1, -1))
            else:
                raise PolicyError(
                    f"this version of transformers computes {module_name}.{name}, which is unknown here: install the "
                    "versions in uv.lock"
                )
            module._buffers[name] = value.to(device=device, dtype=empty.dtype)


def vocabulary_size(policy: Any) -> int:
    """How many token ids the policy knows."""
    return int(policy.model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight.shape[0])
