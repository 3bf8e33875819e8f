"""ACT at speed: LeRobot's weights, without what an answer does not depend on.

The images of all cameras pass through the ResNet as one batch. Computed once for the process are the positions of the
tokens, the latent (ACT infers with zeros; the variational encoder belongs to training), and in the decoder everything
up to the first look at the observation, because its queries start from zeros and not from data. LeRobot's attention also
computes weights that it throws away; this one does not.

Equal to LeRobot's arithmetic up to the order of summation, in bfloat16 up to that type's rounding: weights and the inputs
of convolutions and matrices are bfloat16 then, sums, norms, softmax and the stream between the layers stay float32.
ACT as in Zhao et al. 2023.
Life cycle and error policy: as `fast_layers`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grasp_cube.policies.fast_layers import Convolution, Linear, ResNet, Unsupported, difference

__all__ = ["FastAct"]


class FastAct:
    """{feature: normalised (B, …)} -> (B, chunk_size, action_dim) normalised float32."""

    def __init__(self, policy: Any, dtype: torch.dtype):
        """`policy` is LeRobot's ACTPolicy, on its device and not trained any more. Raises `Unsupported`."""
        core, config = policy.model, policy.config
        if not config.image_features or config.env_state_feature:
            raise Unsupported("an ACT without images or with a state of the environment")
        self._core, self._cameras = core, list(config.image_features)
        self._look = ResNet(core.backbone, dtype=dtype)
        self._project = Convolution(core.encoder_img_feat_input_proj, dtype=dtype)
        self._encoder = [_EncoderLayer(layer, dtype) for layer in core.encoder.layers]
        self._decoder = [_DecoderLayer(layer, dtype) for layer in core.decoder.layers]
        first, asked = core.decoder.layers[0], core.decoder_pos_embed.weight[None]
        with torch.no_grad():
            self._latent = core.encoder_latent_input_proj(asked.new_zeros(1, 1, config.latent_dim))
            self._asked = asked
            self._start = _look_at_itself(first, torch.zeros_like(asked), asked)
        self._places: dict[tuple[torch.Size, ...], Tensor] = {}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        tokens, places = self._tokens(batch)
        for encode in self._encoder:
            tokens = encode(tokens, places)
        tokens = self._core.encoder.norm(tokens)
        keys = tokens + places
        first, *others = self._decoder
        x = first.look(self._start.expand(len(tokens), -1, -1), self._asked, keys, tokens)
        for layer in others:
            x = layer.look(_look_at_itself(layer.own, x, self._asked), self._asked, keys, tokens)
        return self._core.action_head(self._core.decoder.norm(x))

    def difference(self) -> float:
        """How far a chunk is from LeRobot's, normalised, for noise instead of an observation."""
        random = torch.Generator().manual_seed(0)
        wanted = self._core.config.input_features.items()
        probe = {
            name: torch.randn((1, *feature.shape), generator=random).to(self._asked.device)
            for name, feature in wanted
        }
        listed = {"observation.images": [probe[camera] for camera in self._cameras]}
        # Without a state of its own, LeRobot's ACT still asks the robot's for its device.
        probe.setdefault("observation.state", self._asked.new_zeros(1, 1))
        return difference(self(probe), self._core(probe | listed)[0])

    def release(self) -> None:
        """Let go of what only training needs, and of LeRobot's copy of the weights that lie packed here."""
        for name in ("vae_encoder", "backbone"):
            if hasattr(self._core, name):
                delattr(self._core, name)

    def _tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """((B, tokens, width), their places (1, tokens, width)): latent, state, then the views camera by camera."""
        maps = self._maps([batch[camera] for camera in self._cameras])
        views = torch.cat([view.flatten(2).transpose(1, 2) for view in maps], dim=1)
        tokens = [self._latent.expand(len(views), -1, -1)]
        if self._core.config.robot_state_feature:
            tokens.append(self._core.encoder_robot_state_input_proj(batch["observation.state"])[:, None])
        shapes = tuple(view.shape[1:] for view in maps)
        if shapes not in self._places:
            embed = self._core.encoder_cam_feat_pos_embed
            places = [embed(view[:1].contiguous()).flatten(2).transpose(1, 2) for view in maps]
            ahead = self._core.encoder_1d_feature_pos_embed.weight[None]
            self._places[shapes] = torch.cat([ahead, *places], dim=1)
        return torch.cat([*tokens, views], dim=1), self._places[shapes]

    def _maps(self, images: list[Tensor]) -> list[Tensor]:
        """The feature map (B, width, h, w) of each camera; images of one size pass together."""
        maps: dict[int, Tensor] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            own = [i for i, image in enumerate(images) if image.shape == shape]
            found = self._project(self._look(torch.cat([images[i] for i in own]))).float()
            maps |= zip(own, found.chunk(len(own)), strict=True)
        return [maps[i] for i in range(len(images))]


class _Attention:
    """Multi-head attention of torch's own module, with inputs (B, tokens, width)."""

    def __init__(self, module: Any, dtype: torch.dtype):
        width = module.embed_dim
        self._heads, self._dtype = module.num_heads, dtype
        weights, biases = module.in_proj_weight.split(width), module.in_proj_bias.split(width)
        self._query, self._key, self._value = (
            Linear(weight, bias, dtype=dtype) for weight, bias in zip(weights, biases, strict=True)
        )
        self._out = Linear(module.out_proj.weight, module.out_proj.bias, dtype=dtype)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (
            layer(x).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for layer, x in ((self._query, query), (self._key, key), (self._value, value))
        )
        return self._out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)).float()


class _FeedForward:
    def __init__(self, layer: Any, dtype: torch.dtype):
        self._wide = Linear(layer.linear1.weight, layer.linear1.bias, dtype=dtype)
        self._back = Linear(layer.linear2.weight, layer.linear2.bias, dtype=dtype)
        self._activation = layer.activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._back(self._activation(self._wide(x))).float()


class _EncoderLayer:
    def __init__(self, layer: Any, dtype: torch.dtype):
        self._own = layer
        self._attend = _Attention(layer.self_attn, dtype)
        self._feed = _FeedForward(layer, dtype)

    def __call__(self, x: Tensor, places: Tensor) -> Tensor:
        own = self._own
        if own.pre_norm:
            normed = own.norm1(x)
            x = x + self._attend(normed + places, normed + places, normed)
            return x + self._feed(own.norm2(x))
        x = own.norm1(x + self._attend(x + places, x + places, x))
        return own.norm2(x + self._feed(x))


class _DecoderLayer:
    def __init__(self, layer: Any, dtype: torch.dtype):
        self.own = layer
        self._attend = _Attention(layer.multihead_attn, dtype)
        self._feed = _FeedForward(layer, dtype)

    def look(self, x: Tensor, asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The layer from its look at the observation on; `x` has seen itself already."""
        own = self.own
        if own.pre_norm:
            x = x + self._attend(own.norm2(x) + asked, keys, values)
            return x + self._feed(own.norm3(x))
        x = own.norm2(x + self._attend(x + asked, keys, values))
        return own.norm3(x + self._feed(x))


def _look_at_itself(layer: Any, x: Tensor, asked: Tensor) -> Tensor:
    """The first part of LeRobot's decoder layer, for queries (B, chunk_size, width) at the places `asked`."""
    normed = layer.norm1(x) if layer.pre_norm else x
    query = (normed + asked).transpose(0, 1)
    attended = layer.self_attn(query, query, value=normed.transpose(0, 1), need_weights=False)[0]
    x = x + attended.transpose(0, 1)
    return x if layer.pre_norm else layer.norm1(x)
