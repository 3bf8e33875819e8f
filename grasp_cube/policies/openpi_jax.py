"""openpi's JAX parameters under the names of its PyTorch layout, one tensor at a time.

openpi stacks the layers of a tower in one array and writes attention as einsum weights with an axis for the heads; the
PyTorch layout has one matrix for each layer and projection. Adapters of a LoRA run are merged into the weights.
Life cycle: `open_params` reads the directory's metadata only; a tensor is made when it is asked for, and only the
array that it comes from is held, so that four billion parameters pass through in the memory of the largest array.
Error policy: `PolicyError`; a parameter that is missing, or that nothing reads, ends it before any value is read.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grasp_cube.policies.policy import PolicyError

__all__ = ["JaxTensors", "open_params"]

Array = np.ndarray

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert.model"
HEADS = ("action_in_proj", "action_out_proj")
HEADS_OF = {
    "pi0": (*HEADS, "state_proj", "action_time_mlp_in", "action_time_mlp_out"),
    "pi05": (*HEADS, "time_mlp_in", "time_mlp_out"),
}

# The PyTorch layout has a head for words above the action expert as well. Nothing reads it, and JAX has none.
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def _same(x: Array) -> Array:
    return x


def _transposed(x: Array) -> Array:
    return x.T


def _flat(x: Array) -> Array:
    return x.reshape(-1)


def _into_heads(x: Array) -> Array:
    """A vision projection (width, heads, size) -> (heads * size, width)."""
    return x.reshape(x.shape[0], -1).T


def _out_of_heads(x: Array) -> Array:
    """(heads, size, width) -> (width, heads * size)."""
    return x.reshape(-1, x.shape[-1]).T


def _per_head(x: Array) -> Array:
    """(heads, width, size) -> (heads * size, width)."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def _patches(x: Array) -> Array:
    """A convolution (height, width, in, out) -> (out, in, height, width)."""
    return x.transpose(3, 2, 0, 1)


def _rows(x: Array) -> Array:
    """(1, positions, width) -> (positions, width)."""
    return x.reshape(-1, x.shape[-1])


# Of one vision layer: openpi's name -> (PyTorch's name, how).
VISION_LAYER: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "LayerNorm_0/scale": ("layer_norm1.weight", _same),
    "LayerNorm_0/bias": ("layer_norm1.bias", _same),
    "LayerNorm_1/scale": ("layer_norm2.weight", _same),
    "LayerNorm_1/bias": ("layer_norm2.bias", _same),
    "MlpBlock_0/Dense_0/kernel": ("mlp.fc1.weight", _transposed),
    "MlpBlock_0/Dense_0/bias": ("mlp.fc1.bias", _same),
    "MlpBlock_0/Dense_1/kernel": ("mlp.fc2.weight", _transposed),
    "MlpBlock_0/Dense_1/bias": ("mlp.fc2.bias", _same),
    **{
        f"MultiHeadDotProductAttention_0/{jax}/{part}": (f"self_attn.{torch}_proj.{kind}", how)
        for jax, torch in (("query", "q"), ("key", "k"), ("value", "v"))
        for part, kind, how in (("kernel", "weight", _into_heads), ("bias", "bias", _flat))
    },
    "MultiHeadDotProductAttention_0/out/kernel": ("self_attn.out_proj.weight", _out_of_heads),
    "MultiHeadDotProductAttention_0/out/bias": ("self_attn.out_proj.bias", _same),
}

# Of one layer of a language model, where # is "" or "_1" for the action expert.
GEMMA_LAYER: dict[str, tuple[tuple[str, Callable[[Array], Array]], ...]] = {
    "attn/q_einsum#/w": (("self_attn.q_proj.weight", _per_head),),
    "attn/kv_einsum#/w": (
        ("self_attn.k_proj.weight", lambda x: _per_head(x[0])),
        ("self_attn.v_proj.weight", lambda x: _per_head(x[1])),
    ),
    "attn/attn_vec_einsum#/w": (("self_attn.o_proj.weight", _out_of_heads),),
    "mlp#/gating_einsum": (
        ("mlp.gate_proj.weight", lambda x: x[0].T),
        ("mlp.up_proj.weight", lambda x: x[1].T),
    ),
    "mlp#/linear": (("mlp.down_proj.weight", _transposed),),
}
GEMMA_NORMS = {
    "pre_attention_norm#": "input_layernorm",
    "pre_ffw_norm#": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Part:
    """Where one PyTorch tensor comes from."""

    source: str
    # Index of the layer in the stacked array; None: the array is not stacked.
    layer: int | None
    make: Callable[[Array], Array]


class JaxTensors:
    """openpi's parameters as a `TensorSource`, in their own precision.

    Asking in the order of `keys` reads each array once.
    """

    def __init__(self, leaves: Mapping[str, Any], read: Callable[[str], Array], where: str):
        """`leaves` describes the parameters, with shape and dtype, by their path (`PaliGemma/llm/...`); `read` fetches
        one. Raises `PolicyError`."""
        self._read = read
        self._held: tuple[str, tuple[Array, ...]] | None = None
        self._leaves = leaves
        self.kind = "pi05" if "time_mlp_in/kernel" in leaves else "pi0"
        self._parts = _parts({name: tuple(leaf.shape) for name, leaf in leaves.items()}, self.kind, where)

    def keys(self) -> Iterable[str]:
        return [*self._parts, UNUSED_HEAD]

    def get(self, name: str) -> Any:
        import torch

        if name == UNUSED_HEAD:
            return torch.zeros(self.shape(name), dtype=getattr(torch, self.dtype(name)))
        part = self._parts[name]
        arrays = self._arrays(part.source)
        if part.layer is not None:
            arrays = tuple(array[part.layer] for array in arrays)
        array = np.array(part.make(_merged(part.source, *arrays)), order="C")
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def shape(self, name: str) -> tuple[int, ...]:
        if name == UNUSED_HEAD:
            return self.shape(f"{LANGUAGE}.embed_tokens.weight")[0], self.shape("action_in_proj.weight")[0]
        part = self._parts[name]
        shape = tuple(self._leaves[part.source].shape)
        # One zero seen everywhere: what reshapes it copies at most one layer.
        return part.make(np.broadcast_to(np.int8(0), shape if part.layer is None else shape[1:])).shape

    def dtype(self, name: str) -> str:
        source = "PaliGemma/llm/embedder/input_embedding" if name == UNUSED_HEAD else self._parts[name].source
        return np.dtype(self._leaves[source].dtype).name

    def _arrays(self, source: str) -> tuple[Array, ...]:
        """A parameter, and the two factors of its adapter where it has one."""
        if self._held is None or self._held[0] != source:
            self._held = None
            names = [source, *(name for name in _adapters(source) if name in self._leaves)]
            self._held = (source, tuple(self._read(name) for name in names))
        return self._held[1]


def open_params(folder: Path) -> JaxTensors:
    """The parameters in `folder`, a checkpoint's `params` directory. Raises `PolicyError`."""
    # Reading needs no accelerator, and JAX would take most of its memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise PolicyError(
            f"{folder} holds JAX parameters, and reading them needs orbax-checkpoint: `pip install 'grasp-cube[jax]'`; "
            f"openpi itself, where it is installed, serves them as well ({error})"
        ) from error
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        leaves = _leaves(tree["params"])
    except Exception as error:
        raise PolicyError(
            f"{folder} is no parameter directory that openpi saved ({' '.join(str(error).split()):.200}): copy the "
            "whole checkpoint again"
        ) from error
    paths = _without_value(leaves)

    def read(name: str) -> Array:
        path = paths[name]
        item: Any = leaves[path]
        args: Any = ocp.ArrayRestoreArgs(restore_type=np.ndarray)
        for key in reversed(("params", *path)):
            item, args = {key: item}, {key: args}
        restore = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
        try:
            found: Any = checkpointer.restore(folder.absolute(), args=restore)
        except Exception as error:
            raise PolicyError(
                f"the parameter {name} in {folder} cannot be read ({' '.join(str(error).split()):.200}): copy the whole "
                "checkpoint again"
            ) from error
        for key in ("params", *path):
            found = found[key]
        return np.asarray(found)

    return JaxTensors({name: leaves[path] for name, path in paths.items()}, read, str(folder))


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {
        key: leaf for name, below in tree.items() for key, leaf in _leaves(below, (*path, str(name))).items()
    }


def _without_value(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, tuple[str, ...]]:
    """{path without the `value` that training appends to each: path as stored}"""
    appended = all(path[-1] == "value" for path in leaves)
    return {"/".join(path[:-1] if appended else path): path for path in leaves}


def _adapters(source: str) -> tuple[str, str]:
    """The names of a weight's adapters: beside `w` for an einsum, after the name for a feed-forward weight."""
    stem = source.removesuffix("/w") + "/" if source.endswith("/w") else source + "_"
    return f"{stem}lora_a", f"{stem}lora_b"


def _merged(source: str, weight: Array, a: Array | None = None, b: Array | None = None) -> Array:
    """One layer's weight with its adapter's product added, in the weight's precision.

    openpi's two published variants have alpha equal to the rank, so their scale is 1; its feed-forward layers apply no
    scale at all. The output projection is special: openpi's einsum sums the heads away between the two factors, so
    every head gets its own first factor times the sum of all second ones.
    """
    if a is None or b is None:
        return weight
    a, b = a.astype(np.float32), b.astype(np.float32)
    if "attn_vec_einsum" in source:
        b = b.sum(axis=0)
    return (weight.astype(np.float32) + a @ b).astype(weight.dtype)


def _parts(shapes: Mapping[str, tuple[int, ...]], kind: str, where: str) -> dict[str, Part]:
    """{PyTorch name: its source}, in the sources' order. Raises `PolicyError` for a missing or an unread parameter."""
    parts: dict[str, Part] = {}
    missing: list[str] = []
    read: set[str] = set()

    def take(source: str, *targets: tuple[str, Callable[[Array], Array]], stacked: str = "") -> None:
        """`stacked` is the PyTorch name of the list of layers that the array holds."""
        if source not in shapes:
            missing.append(source)
            return
        read.add(source)
        if not stacked:
            parts.update({name: Part(source, None, make) for name, make in targets})
            return
        read.update(name for name in _adapters(source) if name in shapes)
        for layer in range(shapes[source][0]):
            for name, make in targets:
                parts[f"{stacked}.{layer}.{name}"] = Part(source, layer, make)

    img, llm = "PaliGemma/img", "PaliGemma/llm"
    take(f"{img}/embedding/kernel", (f"{VISION}.embeddings.patch_embedding.weight", _patches))
    take(f"{img}/embedding/bias", (f"{VISION}.embeddings.patch_embedding.bias", _same))
    take(f"{img}/pos_embedding", (f"{VISION}.embeddings.position_embedding.weight", _rows))
    for jax, target in VISION_LAYER.items():
        take(f"{img}/Transformer/encoderblock/{jax}", target, stacked=f"{VISION}.encoder.layers")
    take(f"{img}/Transformer/encoder_norm/scale", (f"{VISION}.post_layernorm.weight", _same))
    take(f"{img}/Transformer/encoder_norm/bias", (f"{VISION}.post_layernorm.bias", _same))
    take(f"{img}/head/kernel", (f"{PROJECTOR}.weight", _transposed))
    take(f"{img}/head/bias", (f"{PROJECTOR}.bias", _same))
    take(f"{llm}/embedder/input_embedding", (f"{LANGUAGE}.embed_tokens.weight", _same))
    for suffix, model in (("", LANGUAGE), ("_1", EXPERT)):
        for jax, targets in GEMMA_LAYER.items():
            take(f"{llm}/layers/{jax.replace('#', suffix)}", *targets, stacked=f"{model}.layers")
        adaptive = kind == "pi05" and suffix == "_1"
        for jax, norm in GEMMA_NORMS.items():
            source = f"{llm}/layers/{jax.replace('#', suffix)}"
            for jax_leaf, leaf, make in _norm(adaptive):
                take(f"{source}/{jax_leaf}", (f"{norm}.{leaf}", make), stacked=f"{model}.layers")
        for jax_leaf, leaf, make in _norm(adaptive):
            take(f"{llm}/final_norm{suffix}/{jax_leaf}", (f"{model}.norm.{leaf}", make))
    for head in HEADS_OF[kind]:
        take(f"{head}/kernel", (f"{head}.weight", _transposed))
        take(f"{head}/bias", (f"{head}.bias", _same))
    unread = sorted(set(shapes) - read)
    if missing or unread:
        said = [
            f"{len(names)} {word} ({names[0]})"
            for names, word in ((missing, "missing"), (unread, "that nothing reads"))
            if names
        ]
        raise PolicyError(
            f"the parameters in {where} are not those of openpi's Pi0 or Pi0.5: {', '.join(said)}"
        )
    return parts


def _norm(adaptive: bool) -> tuple[tuple[str, str, Callable[[Array], Array]], ...]:
    """The leaves of a norm; the adaptive one of Pi0.5's expert is modulated by the denoising time."""
    if adaptive:
        return (("Dense_0/kernel", "dense.weight", _transposed), ("Dense_0/bias", "dense.bias", _same))
    return (("scale", "weight", _same),)
