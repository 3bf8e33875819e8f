"""Small checkpoints in openpi's two layouts, written from the published shapes and names.

from openpi_checkpoints import jax_parameters, save_params      # a conftest puts tests/ on the path

Nothing that writes here calls our own reading of these layouts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# By name: what a YAML file for --policy.config_name says of the checkpoints that `save_openpi` writes.
SETTINGS = {
    "pi0": "{model: tiny_pi0, embodiment: aloha, asset_id: trossen, horizon: 8, delta: [6, -1, 6, -1]}",
    "pi05": "{model: tiny_pi05, embodiment: libero, asset_id: me/cubes, horizon: 8, delta: []}",
    # As pi05_libero: the state is not in the prompt.
    "silent": "{model: tiny_pi05, embodiment: libero, asset_id: me/cubes, horizon: 8, delta: [], state_in_prompt: false}",
}


def jax_shapes(
    kind: str,
    *,
    layers: int = 2,
    heads: int = 2,
    kv: int = 1,
    width: int = 8,
    expert_width: int = 8,
    size: int = 4,
    feed: int = 12,
    expert_feed: int | None = None,
    vision_layers: int = 2,
    vision_heads: int = 2,
    vision_width: int = 8,
    vision_feed: int = 12,
    patch: int = 2,
    patches: int = 4,
    vocabulary: int = 32,
    model_dim: int = 32,
) -> dict[str, tuple[int, ...]]:
    """{path: shape} of one Pi0 or Pi0.5 as openpi's JAX model keeps it, layers stacked in front."""
    shapes: dict[str, tuple[int, ...]] = {}
    img, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    n, w, per_head = vision_layers, vision_width, vision_width // vision_heads
    shapes[f"{img}/embedding/kernel"], shapes[f"{img}/embedding/bias"] = (patch, patch, 3, w), (w,)
    shapes[f"{img}/pos_embedding"] = (1, patches, w)
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes[f"{block}/{norm}/scale"] = shapes[f"{block}/{norm}/bias"] = (n, w)
    shapes[f"{block}/MlpBlock_0/Dense_0/kernel"] = (n, w, vision_feed)
    shapes[f"{block}/MlpBlock_0/Dense_0/bias"] = (n, vision_feed)
    shapes[f"{block}/MlpBlock_0/Dense_1/kernel"] = (n, vision_feed, w)
    shapes[f"{block}/MlpBlock_0/Dense_1/bias"] = (n, w)
    for name in ("query", "key", "value"):
        shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/kernel"] = (n, w, vision_heads, per_head)
        shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/bias"] = (n, vision_heads, per_head)
    shapes[f"{block}/MultiHeadDotProductAttention_0/out/kernel"] = (n, vision_heads, per_head, w)
    shapes[f"{block}/MultiHeadDotProductAttention_0/out/bias"] = (n, w)
    shapes[f"{img}/Transformer/encoder_norm/scale"] = shapes[f"{img}/Transformer/encoder_norm/bias"] = (w,)
    shapes[f"{img}/head/kernel"], shapes[f"{img}/head/bias"] = (w, width), (width,)
    llm = "PaliGemma/llm"
    shapes[f"{llm}/embedder/input_embedding"] = (vocabulary, width)
    for suffix, wide in (("", width), ("_1", expert_width)):
        shapes[f"{llm}/layers/attn/q_einsum{suffix}/w"] = (layers, heads, wide, size)
        shapes[f"{llm}/layers/attn/kv_einsum{suffix}/w"] = (layers, 2, kv, wide, size)
        shapes[f"{llm}/layers/attn/attn_vec_einsum{suffix}/w"] = (layers, heads, size, wide)
        inner = feed if not suffix else expert_feed or feed
        shapes[f"{llm}/layers/mlp{suffix}/gating_einsum"] = (layers, 2, wide, inner)
        shapes[f"{llm}/layers/mlp{suffix}/linear"] = (layers, inner, wide)
        for norm, stack in (
            (f"layers/pre_attention_norm{suffix}", (layers,)),
            (f"layers/pre_ffw_norm{suffix}", (layers,)),
            (f"final_norm{suffix}", ()),
        ):
            if kind == "pi05" and suffix:
                shapes[f"{llm}/{norm}/Dense_0/kernel"] = (*stack, wide, 3 * wide)
                shapes[f"{llm}/{norm}/Dense_0/bias"] = (*stack, 3 * wide)
            else:
                shapes[f"{llm}/{norm}/scale"] = (*stack, wide)
    e = expert_width
    linear = {"action_in_proj": (model_dim, e), "action_out_proj": (e, model_dim)}
    if kind == "pi05":
        linear |= {"time_mlp_in": (e, e), "time_mlp_out": (e, e)}
    else:
        linear |= {
            "state_proj": (model_dim, e),
            "action_time_mlp_in": (2 * e, e),
            "action_time_mlp_out": (e, e),
        }
    for name, shape in linear.items():
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = shape, shape[1:]
    return shapes


# openpi's gemma_2b, gemma_300m and So400m/14.
FULL_SIZE = {"layers": 18, "heads": 8, "width": 2048, "size": 256, "feed": 16384, "vocabulary": 257152}
FULL_SIZE |= {"expert_width": 1024, "expert_feed": 4096}
FULL_SIZE |= {"vision_layers": 27, "vision_heads": 16, "vision_width": 1152, "vision_feed": 4304}
FULL_SIZE |= {"patch": 14, "patches": 256}


@dataclass(frozen=True)
class Leaf:
    """An array's description, as orbax gives it."""

    shape: tuple[int, ...]
    dtype: Any = "float32"


def jax_parameters(kind: str, *, seed: int = 1, **sizes: int) -> dict[str, np.ndarray]:
    """{path: random float32 array} of the shapes that `jax_shapes` gives."""
    random = np.random.default_rng(seed)
    shapes = jax_shapes(kind, **sizes)
    return {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def save_params(folder: Path, params: dict[str, np.ndarray], *, trained: bool = False) -> Path:
    """A `params` directory as orbax writes it; a training run puts a `value` under each leaf."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for path, array in params.items():
        *above, last = [*path.split("/"), "value"] if trained else path.split("/")
        below = tree
        for part in above:
            below = below.setdefault(part, {})
        below[last] = array
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), {"params": tree})
    return folder


# Heads of the small models' language towers and of their vision tower.
HEADS, VISION_HEADS = 8, 4


def save_openpi(
    folder: Path,
    kind: str,
    *,
    layout: str = "torch",
    asset_id: str = "trossen",
    dim: int = 14,
    state_dim: int | None = None,
    trained: bool = False,
    seed: int = 5,
) -> Path:
    """A small checkpoint of random weights as openpi leaves it: weights in the `layout` torch or jax, statistics, and
    the tokenizer, which openpi keeps elsewhere. Equal seeds give equal weights in both layouts."""
    from safetensors.torch import save_model

    from grasp_cube.tiny_checkpoint import make_tiny_tokenizer

    folder.mkdir(parents=True)
    model = tiny_model(kind, seed)
    if layout == "torch":
        # openpi's own way, which leaves out one of two names that share their memory.
        save_model(model, str(folder / "model.safetensors"))
    else:
        state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
        save_params(folder / "params", to_jax(state, kind), trained=trained)
    random = np.random.default_rng(seed)
    groups = {}
    for name, size in (("state", state_dim or dim), ("actions", dim)):
        low, high = random.uniform(-2, -1, size), random.uniform(1, 2, size)
        groups[name] = {"mean": (low + high) / 2, "std": (high - low) / 4, "q01": low, "q99": high}
    stats = {"norm_stats": {n: {k: v.tolist() for k, v in group.items()} for n, group in groups.items()}}
    (folder / "assets" / asset_id).mkdir(parents=True)
    (folder / "assets" / asset_id / "norm_stats.json").write_text(json.dumps(stats))
    make_tiny_tokenizer(folder / "tokenizer")
    return folder


def tiny_model(kind: str, seed: int) -> Any:
    """LeRobot's port of openpi's PI0Pytorch with small towers; its tensor names are openpi's."""
    import torch

    from grasp_cube.policies.pi_tiny import TINY_POLICIES, TinyPI0Config, TinyPI05Config

    config = (TinyPI05Config if kind == "pi05" else TinyPI0Config)(device="cpu")
    model = TINY_POLICIES[type(config)](config).model
    # One tensor under two names, as in openpi's model; its files hold it once.
    pair = model.paligemma_with_expert.paligemma
    pair.lm_head.weight = pair.model.language_model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def to_jax(state: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The PyTorch layout's tensors as openpi's JAX model keeps them: the inverse of its converter."""
    paligemma = "paligemma_with_expert.paligemma.model"
    vision = f"{paligemma}.vision_tower.vision_model"

    def stack(pattern: str, change: Any = lambda x: x) -> np.ndarray:
        layers = []
        while pattern.format(len(layers)) in state:
            layers.append(change(state[pattern.format(len(layers))]))
        return np.stack(layers)

    def into_heads(heads: int) -> Any:
        return lambda x: x.T.reshape(x.shape[1], heads, -1)

    img, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    here = f"{vision}.encoder.layers.{{}}"
    params = {
        f"{img}/embedding/kernel": state[f"{vision}.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        f"{img}/embedding/bias": state[f"{vision}.embeddings.patch_embedding.bias"],
        f"{img}/pos_embedding": state[f"{vision}.embeddings.position_embedding.weight"][None],
        f"{img}/Transformer/encoder_norm/scale": state[f"{vision}.post_layernorm.weight"],
        f"{img}/Transformer/encoder_norm/bias": state[f"{vision}.post_layernorm.bias"],
        f"{img}/head/kernel": state[f"{paligemma}.multi_modal_projector.linear.weight"].T,
        f"{img}/head/bias": state[f"{paligemma}.multi_modal_projector.linear.bias"],
        "PaliGemma/llm/embedder/input_embedding": state[f"{paligemma}.language_model.embed_tokens.weight"],
    }
    for jax, name in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        params[f"{block}/{jax}/scale"] = stack(f"{here}.{name}.weight")
        params[f"{block}/{jax}/bias"] = stack(f"{here}.{name}.bias")
    for jax, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        params[f"{block}/MlpBlock_0/{jax}/kernel"] = stack(f"{here}.mlp.{name}.weight", np.transpose)
        params[f"{block}/MlpBlock_0/{jax}/bias"] = stack(f"{here}.mlp.{name}.bias")
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for jax, name in (("query", "q"), ("key", "k"), ("value", "v")):
        params[f"{attention}/{jax}/kernel"] = stack(
            f"{here}.self_attn.{name}_proj.weight", into_heads(VISION_HEADS)
        )
        params[f"{attention}/{jax}/bias"] = stack(
            f"{here}.self_attn.{name}_proj.bias", lambda x: x.reshape(VISION_HEADS, -1)
        )
    params[f"{attention}/out/kernel"] = stack(
        f"{here}.self_attn.out_proj.weight", lambda x: x.T.reshape(VISION_HEADS, -1, x.shape[0])
    )
    params[f"{attention}/out/bias"] = stack(f"{here}.self_attn.out_proj.bias")
    llm = "PaliGemma/llm"
    for suffix, model in (
        ("", f"{paligemma}.language_model"),
        ("_1", "paligemma_with_expert.gemma_expert.model"),
    ):
        here = f"{model}.layers.{{}}"
        params[f"{llm}/layers/attn/q_einsum{suffix}/w"] = stack(
            f"{here}.self_attn.q_proj.weight", lambda x: x.reshape(HEADS, -1, x.shape[1]).transpose(0, 2, 1)
        )
        params[f"{llm}/layers/attn/kv_einsum{suffix}/w"] = np.stack(
            [stack(f"{here}.self_attn.{name}_proj.weight", lambda x: x.T[None]) for name in "kv"], axis=1
        )
        params[f"{llm}/layers/attn/attn_vec_einsum{suffix}/w"] = stack(
            f"{here}.self_attn.o_proj.weight", lambda x: x.T.reshape(HEADS, -1, x.shape[0])
        )
        params[f"{llm}/layers/mlp{suffix}/gating_einsum"] = np.stack(
            [stack(f"{here}.mlp.{name}_proj.weight", np.transpose) for name in ("gate", "up")], axis=1
        )
        params[f"{llm}/layers/mlp{suffix}/linear"] = stack(f"{here}.mlp.down_proj.weight", np.transpose)
        for jax, name in (
            ("pre_attention_norm", "input_layernorm"),
            ("pre_ffw_norm", "post_attention_layernorm"),
        ):
            norm = f"{llm}/layers/{jax}{suffix}"
            if kind == "pi05" and suffix:
                params[f"{norm}/Dense_0/kernel"] = stack(f"{here}.{name}.dense.weight", np.transpose)
                params[f"{norm}/Dense_0/bias"] = stack(f"{here}.{name}.dense.bias")
            else:
                params[f"{norm}/scale"] = stack(f"{here}.{name}.weight")
        if kind == "pi05" and suffix:
            params[f"{llm}/final_norm{suffix}/Dense_0/kernel"] = state[f"{model}.norm.dense.weight"].T
            params[f"{llm}/final_norm{suffix}/Dense_0/bias"] = state[f"{model}.norm.dense.bias"]
        else:
            params[f"{llm}/final_norm{suffix}/scale"] = state[f"{model}.norm.weight"]
    for name, value in state.items():
        if name.count(".") == 1:
            head, part = name.split(".")
            params[f"{head}/{'kernel' if part == 'weight' else 'bias'}"] = value.T
    return {name: np.ascontiguousarray(value) for name, value in params.items()}


def load_openpi(made: Path, name: str, settings: str, **options: Any) -> Any:
    """The policy of `made`/`name` by the settings `made`/`settings`.yaml, with LeRobot's arithmetic and equal noise for all."""
    from grasp_cube.policies.load import load_policy

    flags = {"type": "openpi", "config_name": str(made / f"{settings}.yaml"), "device": "cpu"}
    return load_policy(made / name, **(flags | {"noise_seed": 3, "optimize": "none"} | options))
