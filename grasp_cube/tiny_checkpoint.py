"""`make_tiny_checkpoint --type pi05 OUT`: a Pi0 or Pi0.5 with random weights that loads and answers in a moment.

It is a whole LeRobot checkpoint (config, weights, both processors with statistics, its own tokenizer) of 0.4 million
parameters, served by the same code as the full size. It knows nothing: its actions are smooth nonsense within the range
that is asked for. For tests, and for trying a robot's connection before the real checkpoint has arrived.
Error policy: one sentence on stderr and exit code 2.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_client.cli import fail, parse

from grasp_cube.policies.policy import PolicyError

__all__ = ["TinyConfig", "main", "make_tiny_checkpoint", "make_tiny_tokenizer"]

PROG = "make_tiny_checkpoint"
DESCRIPTION = """Write a small Pi0 or Pi0.5 checkpoint with random weights:
    make_tiny_checkpoint --type pi05 OUT --cameras front,wrist --action-dim 6"""
TYPES = ("pi0", "pi05")
# See `_calm`.
PULL, SHARE, CONSTANT = 4.0, 3.0, 20.0

# What the tokenizer learns its merges from; bytes that are not in it remain bytes.
_SENTENCES = (
    "lift up the red cube",
    "sort the cubes by color",
    "stack the red cube on the green cube",
    "pick up the object and put it into the box",
    "Task: lift up the red cube, State: 0 12 127 128 200 255;\nAction: ",
)


@dataclass(frozen=True)
class TinyConfig:
    """What `make_tiny_checkpoint` writes."""

    # Folder of the new checkpoint; it must not exist yet.
    out: Path
    # pi0 or pi05.
    type: str = "pi05"
    # The cameras that the policy looks at.
    cameras: tuple[str, ...] = ("front", "wrist")
    # Values in one action.
    action_dim: int = 6
    # Values in the state; default: as many as in an action.
    state_dim: int | None = None
    # Actions in one chunk.
    chunk_size: int = 50
    # States and actions lie between minus this and this, in the robot's unit.
    span: float = 60.0
    # Equal seeds give equal checkpoints.
    seed: int = 0


def make_tiny_checkpoint(
    out: Path | str,
    type: str = "pi05",
    *,
    cameras: Sequence[str] = ("front", "wrist"),
    action_dim: int = 6,
    state_dim: int | None = None,
    chunk_size: int = 50,
    low: Any = -60.0,
    high: Any = 60.0,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """The folder of the new checkpoint.

    `low` and `high` are the range of states and actions in the robot's unit: numbers, or one for each value of an action
    (and of the state, where it has as many). `changes` go into LeRobot's config (dtype, num_inference_steps,
    use_relative_actions, image_resolution, …). Raises `PolicyError`.
    """
    out = Path(out)
    state_dim = action_dim if state_dim is None else state_dim
    if type not in TYPES:
        raise PolicyError(f"--type is {type!r}; {' or '.join(TYPES)} was expected")
    if out.exists():
        raise PolicyError(f"{out} exists already: remove it, or name another folder")
    if not cameras or min(action_dim, state_dim, chunk_size) < 1:
        raise PolicyError(
            "at least one camera, one action value, one state value and one action in a chunk were expected"
        )
    import torch

    from grasp_cube.policies.lerobot_checkpoint import stay_offline

    stay_offline()
    from lerobot.configs import FeatureType, PolicyFeature

    from grasp_cube.policies.pi_processors import pi_processors
    from grasp_cube.policies.pi_tiny import TINY_POLICIES, TinyPI0Config, TinyPI05Config

    width = max(32, action_dim, state_dim)
    size = changes.get("image_resolution", (224, 224))
    config = (TinyPI05Config if type == "pi05" else TinyPI0Config)(
        **{
            "device": "cpu",
            "chunk_size": chunk_size,
            "n_action_steps": chunk_size,
            "max_action_dim": width,
            "max_state_dim": width,
            "input_features": {
                **{
                    f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *size))
                    for name in cameras
                },
                "observation.state": PolicyFeature(FeatureType.STATE, (state_dim,)),
            },
            "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
            "push_to_hub": False,
        }
        | changes
    )
    generator = torch.Generator().manual_seed(seed)
    policy = TINY_POLICIES[config.__class__](config)
    for parameter in policy.parameters():
        # As large as this, prompt, state and images all leave their mark on the actions.
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    _calm(policy.model, width)
    make_tiny_tokenizer(out / "tokenizer")
    policy.save_pretrained(out)
    stats = {"observation.state": _stats(low, high, state_dim), "action": _stats(low, high, action_dim)}
    for processor in pi_processors(config, stats, str(out / "tokenizer"), state_in_prompt=type == "pi05"):
        processor.save_pretrained(out)
    return out


def _calm(model: Any, dims: int) -> None:
    """Let the flow run from noise to what the layers say, instead of anywhere: velocity = PULL * (x - target).

    The hidden state carries x in its first `dims` channels and a constant in the others, which is large, so that the
    last norm divides by nearly a constant; what the layers add to the first channels moves the target.
    """
    import torch

    hidden = model.action_in_proj.out_features
    if dims > hidden - 16:
        raise PolicyError(f"a tiny policy has room for {hidden - 16} action and state values, not {dims}")
    eye = torch.eye(hidden)
    constant = torch.zeros(hidden)
    constant[dims:] = CONSTANT
    model.action_in_proj.weight.data = eye[:, :dims] * SHARE
    model.action_in_proj.bias.data = constant.clone()
    if hasattr(model, "action_time_mlp_in"):
        # Pi0 mixes the time in behind a bend; far from it, silu(x) is x.
        far = 6.0
        model.action_time_mlp_in.weight.data[:, :hidden] = eye
        model.action_time_mlp_in.weight.data[:, hidden:] *= 0.1
        model.action_time_mlp_in.bias.data = torch.full((hidden,), far)
        model.action_time_mlp_out.weight.data = eye.clone()
        model.action_time_mlp_out.bias.data = torch.full((hidden,), -far)
    norm = (CONSTANT**2 * (hidden - dims) / hidden) ** 0.5
    model.action_out_proj.weight.data = eye[:dims] * (PULL * norm / SHARE)
    model.action_out_proj.bias.data.zero_()


def make_tiny_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer with a few merges, in the form that transformers loads; every text has ids in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from grasp_cube.policies.pi_tiny import VOCABULARY

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # As PaliGemma's: a mark at the beginning, none at the end.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",  # a token of text  # nosec B106
    )
    fast.save_pretrained(str(folder))
    return folder


def _stats(low: Any, high: Any, size: int) -> dict[str, Any]:
    """The statistics of values that lie evenly between `low` and `high`."""
    import torch

    low, high = (torch.as_tensor(bound, dtype=torch.float32).expand(size).clone() for bound in (low, high))
    return {
        "min": low,
        "max": high,
        "mean": (low + high) / 2,
        "std": (high - low) / 4,
        "q01": low,
        "q99": high,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(TinyConfig, _with_out(arguments), prog=PROG, description=DESCRIPTION)
    try:
        out = make_tiny_checkpoint(
            config.out.expanduser(),
            config.type,
            cameras=config.cameras,
            action_dim=config.action_dim,
            state_dim=config.state_dim,
            chunk_size=config.chunk_size,
            low=-config.span,
            high=config.span,
            seed=config.seed,
        )
    except (PolicyError, OSError) as error:
        fail(PROG, str(error))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(
        f"✓ {out}: tiny {config.type}, {size / 1e6:.1f} MB; serve it with: serve_policy --policy.path {out}"
    )


def _with_out(arguments: list[str]) -> list[str]:
    """The folder may stand without its flag, as in `--type pi05 OUT`: every flag here takes one value."""
    result, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            result += ["--out", word]
            continue
        result.append(word)
        if word.startswith("--") and "=" not in word and word != "--help" and rest:
            result.append(rest.pop(0))
    return result


if __name__ == "__main__":
    main()
