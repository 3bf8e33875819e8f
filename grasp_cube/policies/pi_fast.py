"""Pi0 and Pi0.5 at speed: LeRobot's weights and layers, with everything computed once that does not change.

What LeRobot repeats in each of the (usually ten) denoising steps is done once for a chunk or once for the process: the
copy of the prefix's keys and values, masks, positions and rotations, the embedding of the time and all that Pi0.5's
norms make of it (about half of the weights that a step would read). What no token may look at is left out: the images
of missing cameras, and on a CPU the padding behind the longest prompt. On a GPU the whole forward, vision to actions,
is recorded as one CUDA graph while the policy warms up, because at batch 1 launching the kernels takes longer than they
do.

Equal to LeRobot's arithmetic up to the order of summation. Pi0 and Pi0.5 as in Black et al. 2024 ("pi0") and Physical
Intelligence 2025 ("pi0.5"); the flow runs from noise at time 1 to actions at time 0.
Error policy: a graph that cannot be recorded, or that answers otherwise than the plain path, is reported in the log and
not used.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from grasp_cube.policies.pi_rtc import Guide, RtcMode, prefix_weights, steer

__all__ = ["FastSampler"]

logger = logging.getLogger(__name__)

# What a masked key's score is lowered by; within the range of bfloat16.
MASKED = -2.3819763e38
# How far a recorded graph may be from the plain path, in normalised actions.
GRAPH_TOLERANCE = 2e-2


class _Prefix:
    """Keys and values of images and prompt, as the layers of the expert look them up. Never changed."""

    def __init__(self, cache: Any):
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        own_keys, own_values = self._layers[layer]
        return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)


class FastSampler:
    """Called like `pi_sampler.Sampler`. Belongs to the device's thread."""

    def __init__(self, policy: Any, rtc: RtcMode):
        self._policy, self._hard = policy, rtc == "prefix"
        self._core = policy.model
        self._pair = self._core.paligemma_with_expert
        self._language = self._pair.paligemma.model.language_model
        self._expert = self._pair.gemma_expert.model
        for tower in (self._language, self._expert):
            tower.config._attn_implementation = "sdpa"
        config = policy.config
        self._dims, self._rows = config.output_features["action"].shape[0], config.chunk_size
        self._most = float(policy.rtc_processor.rtc_config.max_guidance_weight)
        self._dtype = self._language.layers[0].self_attn.q_proj.weight.dtype
        steps = config.num_inference_steps
        self._times = [1.0 - step / steps for step in range(steps)]
        with torch.no_grad():
            self._embedded = [self._time_embedding(time) for time in self._times]
            self._modulations = [self._norms_at(embedded) for embedded in self._embedded]
        self._graphs: dict[Any, _Graph] = {}
        # Whether shapes that are seen for the first time are recorded: while the policy warms up.
        self.recording = False

    def __call__(self, batch: dict[str, Any], noise: Any, guide: Guide | None) -> Any:
        inputs = self._inputs(batch, noise, guide)
        key = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        if self.recording and noise.device.type == "cuda" and key not in self._graphs:
            self._record(key, inputs)
        graph = self._graphs.get(key)
        actions = self._forward(**inputs) if graph is None else graph(inputs)
        return actions[..., : self._dims]

    def _inputs(self, batch: dict[str, Any], noise: Any, guide: Guide | None) -> dict[str, Any]:
        """Tensors on the device, of shapes that only depend on the batch's size, its cameras and whether it is guided."""
        from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

        images, _ = self._policy._preprocess_images(batch)
        present = sum(name in batch for name in self._policy.config.image_features)
        tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        if noise.device.type == "cpu":
            longest = max(1, int(mask.sum(dim=1).max()))
            tokens, mask = tokens[:, :longest], mask[:, :longest]
        inputs = {"pixels": torch.cat(images[:present]), "tokens": tokens, "mask": mask, "noise": noise}
        if hasattr(self._core, "state_proj"):
            inputs["state"] = self._policy.prepare_state(batch).to(torch.float32)
        if guide is not None:
            weights = prefix_weights(self._policy.rtc_processor, guide, self._rows)
            prev = noise.new_zeros(noise.shape)
            rows = min(guide.prev.shape[1], self._rows)
            prev[:, :rows, : guide.prev.shape[2]] = guide.prev[:, :rows]
            bound = torch.arange(self._rows) < (guide.delay if self._hard else 0)
            inputs |= {
                "prev": prev,
                "weights": weights[:, None].to(noise),
                "hard": bound[:, None].to(noise.device),
            }
        return inputs

    def _forward(
        self,
        pixels: Any,
        tokens: Any,
        mask: Any,
        noise: Any,
        state: Any = None,
        prev: Any = None,
        weights: Any = None,
        hard: Any = None,
    ) -> Any:
        """`pixels` (cameras * B, 3, H, W), camera by camera; the result (B, rows, D) is normalised and padded."""
        prefix, seen = self._look(pixels, tokens, mask)
        before = None if state is None else self._core.state_proj(state)[:, None]
        count = self._rows + (before is not None)
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(count, device=noise.device)
        rotations = self._expert.rotary_emb(noise.to(self._dtype), positions)
        bias = functional.pad(_bias(seen, self._dtype), (0, count)).expand(-1, 1, count, -1)
        if before is not None:
            # The state looks at no action.
            bias = bias.clone()
            bias[:, :, 0, seen.shape[1] + 1 :] = MASKED
        x = noise
        for time, embedded, norms in zip(self._times, self._embedded, self._modulations, strict=True):
            hidden = self._enter(x, embedded, before)
            velocity = self._through_expert(hidden, prefix, bias, rotations, norms)
            if prev is not None:
                velocity = steer(velocity, x, time, prev, weights, self._most, hard)
            x = x - velocity / len(self._times)
        return x

    def _look(self, pixels: Any, tokens: Any, mask: Any) -> tuple[_Prefix, Any]:
        """(keys and values of images and prompt, (B, tokens) which of them are there)."""
        size = len(tokens)
        seen = self._pair.embed_image(pixels)
        seen = seen.unflatten(0, (-1, size)).transpose(0, 1).flatten(1, 2)
        words = self._pair.embed_language_tokens(tokens)
        embedded = torch.cat([seen, words], dim=1)
        there = torch.cat([mask.new_ones(size, seen.shape[1]), mask], dim=1)
        output = self._language(
            inputs_embeds=embedded,
            attention_mask=_bias(there, self._dtype).expand(-1, 1, embedded.shape[1], -1),
            position_ids=there.cumsum(dim=1) - 1,
            use_cache=True,
        )
        return _Prefix(output.past_key_values), there

    def _enter(self, x: Any, embedded: Any, before: Any) -> Any:
        """(B, tokens, width): the noisy actions as the expert reads them; in Pi0 the state stands before them."""
        actions = self._core.action_in_proj(x)
        if before is None:
            return actions.to(self._dtype)
        mixed = torch.cat([actions, embedded.expand_as(actions)], dim=2)
        mixed = self._core.action_time_mlp_out(functional.silu(self._core.action_time_mlp_in(mixed)))
        return torch.cat([before, mixed], dim=1).to(self._dtype)

    def _through_expert(
        self, hidden: Any, prefix: _Prefix, bias: Any, rotations: Any, norms: list[Any]
    ) -> Any:
        """The velocity (B, rows, D)."""
        for index, layer in enumerate(self._expert.layers):
            normed, gate = _norm(layer.input_layernorm, hidden, norms[2 * index])
            attended, _ = layer.self_attn(
                hidden_states=normed,
                position_embeddings=rotations,
                attention_mask=bias,
                past_key_values=prefix,
            )
            hidden = hidden + (attended if gate is None else attended * gate)
            normed, gate = _norm(layer.post_attention_layernorm, hidden, norms[2 * index + 1])
            output = layer.mlp(normed)
            hidden = hidden + (output if gate is None else output * gate)
        hidden, _ = _norm(self._expert.norm, hidden, norms[-1])
        return self._core.action_out_proj(hidden[:, -self._rows :].to(torch.float32))

    def _time_embedding(self, time: float) -> Any:
        """What a step's time becomes: the condition of Pi0.5's norms, or what Pi0 puts beside each action."""
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        weight, config = self._core.action_in_proj.weight, self._policy.config
        embedded = create_sinusoidal_pos_embedding(
            torch.tensor([time], dtype=torch.float32, device=weight.device),
            weight.shape[0],
            min_period=config.min_period,
            max_period=config.max_period,
            device=weight.device,
        ).to(torch.float32)
        if hasattr(self._core, "state_proj"):
            return embedded[:, None]
        return functional.silu(self._core.time_mlp_out(functional.silu(self._core.time_mlp_in(embedded))))

    def _norms_at(self, embedded: Any) -> list[Any]:
        """(1 + scale, shift, gate) of each of the expert's norms at one time; None for Pi0's plain norms."""
        norms = [
            norm
            for layer in self._expert.layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        result: list[Any] = []
        for norm in [*norms, self._expert.norm]:
            if norm.dense is None:
                result.append(None)
                continue
            scale, shift, gate = norm.dense(embedded)[:, None].chunk(3, dim=-1)
            result.append((1 + scale.float(), shift.float(), gate.to(self._dtype)))
        return result

    def _record(self, key: Any, inputs: dict[str, Any]) -> None:
        """Record the graph of these shapes, and keep it when it answers like the plain path."""
        try:
            graph = _Graph(self._forward, inputs)
            difference = float((graph(inputs) - self._forward(**inputs)).abs().max())
        except Exception:
            logger.exception(
                "this GPU cannot record the policy as a CUDA graph: it goes on without, which is slower"
            )
            torch.cuda.synchronize()
            return
        if difference > GRAPH_TOLERANCE:
            logger.error(
                "the recorded CUDA graph differs by %.3g: the policy goes on without, which is slower",
                difference,
            )
            return
        self._graphs[key] = graph


class _Graph:
    """One CUDA graph of a function of tensors, for one set of shapes."""

    def __init__(self, function: Callable[..., Any], inputs: dict[str, Any]):
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The libraries choose their kernels and take their memory before the recording.
            for _ in range(3):
                function(**self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(**self._inputs)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return self._output.clone()


def _bias(there: Any, dtype: Any) -> Any:
    """(B, 1, 1, tokens): what is added to the scores of keys, so that nobody looks at what is not there."""
    return torch.zeros(there.shape, dtype=dtype, device=there.device).masked_fill(~there, MASKED)[
        :, None, None
    ]


def _norm(norm: Any, hidden: Any, modulation: Any) -> tuple[Any, Any]:
    """LeRobot's PiGemmaRMSNorm, with the modulation known already."""
    if modulation is None:
        return norm(hidden)
    scale, shift, gate = modulation
    return (norm._norm(hidden) * scale + shift).to(hidden.dtype), gate
