"""Diffusion at speed: LeRobot's weights and noise scheduler, with everything computed once that does not change.

A frame is encoded once: the features of the last few hundred frames are kept by what the pixels are, so a frame that
comes again (as history of the next request, in `ensemble` mode, from another client) costs a hash. In the U-Net the
condition's part of every layer is computed once for a chunk and the time's part once for the process; LeRobot computes
both in each denoising step. Wide U-Nets hold their weights in the order in which oneDNN reads them.

Equal to LeRobot's arithmetic up to the order of summation, the encoder in bfloat16 up to that type's rounding. What is
kept decides nothing but speed: equal pixels have equal features, whoever sent them.
Diffusion Policy as in Chi et al. 2023, its conditioning by FiLM as in Perez et al. 2018.
Life cycle and error policy: as `fast_layers`.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from grasp_cube.policies.fast_layers import (
    Convolution,
    ResNet,
    Unsupported,
    difference,
    has_packed_kernels,
    one_thread,
)
from grasp_cube.policies.unet_rows import RowsUNet

__all__ = ["FastDiffusion", "FeatureCache"]

# Frames whose features are kept: a history and two cameras of each of many clients, in well under a megabyte.
KEPT_FRAMES = 512
# From so many values in one convolution on, bringing them into the kernel's order costs more than a small one's overhead.
PACKED_FROM = 2**18


class FeatureCache:
    """The last features by (camera, pixels); the one that was used longest ago goes first."""

    def __init__(self, size: int = KEPT_FRAMES):
        self._size = size
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        # How many frames were looked up, and how many of them had to be encoded.
        self.asked = self.encoded = 0

    @staticmethod
    def key(camera: str, pixels: np.ndarray) -> bytes:
        """128 bits that stand for these pixels from this camera."""
        # A cryptographic hash: no client can make a frame that is taken for another client's.
        digest = hashlib.blake2b(camera.encode() + str(pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()

    def get(self, key: bytes) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, features: Tensor) -> None:
        self._kept[key] = features
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


class FastDiffusion:
    """LeRobot's DiffusionPolicy from normalised ticks to a chunk. Belongs to the device's thread."""

    def __init__(self, policy: Any, dtype: torch.dtype):
        """`dtype` is that of the image encoders; the denoising stays float32. Raises `Unsupported`."""
        core, config = policy.diffusion, policy.config
        if not config.image_features or config.env_state_feature:
            raise Unsupported("a Diffusion policy without images or with a state of the environment")
        self._core, self._config = core, config
        self._cameras = list(config.image_features)
        shared = not config.use_separate_rgb_encoder_per_camera
        encoders = [core.rgb_encoder] if shared else core.rgb_encoder
        looks = [_Encoder(encoder, dtype) for encoder in encoders]
        self._encoders = dict(
            zip(self._cameras, looks * len(self._cameras) if shared else looks, strict=True)
        )
        self.features = FeatureCache()
        core.noise_scheduler.set_timesteps(core.num_inference_steps)
        self._times = core.noise_scheduler.timesteps
        self._step = _step(core.noise_scheduler)
        self._denoise = _UNet(core.unet, [int(time) for time in self._times])

    def __call__(
        self, ticks: Sequence[dict[str, Tensor]], keys: Sequence[dict[str, list[bytes]]], noise: Tensor | None
    ) -> Tensor:
        """(B, n_action_steps, action_dim), normalised.

        `ticks` are the normalised features {name: (B, …)} of each observed tick, oldest first; `keys` holds what
        `FeatureCache.key` says of each tick's images, {camera feature: B of them}; `noise` (B, horizon, action_dim).
        """
        seen = self._look(ticks, keys)
        parts = [
            torch.cat([tick["observation.state"], *(views[camera] for camera in self._cameras)], dim=-1)
            for tick, views in zip(ticks, seen, strict=True)
        ]
        return self._sample(torch.cat(parts, dim=-1), noise)

    def _look(
        self, ticks: Sequence[dict[str, Tensor]], keys: Sequence[dict[str, list[bytes]]]
    ) -> list[dict[str, Tensor]]:
        """{camera feature: (B, n)} of each tick; every different frame passes through its encoder once."""
        found: dict[bytes, Tensor] = {}
        for camera in self._cameras:
            new: dict[bytes, Tensor] = {}
            for tick, names in zip(ticks, keys, strict=True):
                for key, image in zip(names[camera], tick[camera], strict=True):
                    self.features.asked += 1
                    known = self.features.get(key)
                    if known is not None:
                        found[key] = known
                    else:
                        new.setdefault(key, image)
            if new:
                self.features.encoded += len(new)
                features = self._encoders[camera](torch.stack(list(new.values())))
                for key, one in zip(new, features, strict=True):
                    # A copy, because a row of a batch would keep the whole batch.
                    found[key] = one.clone()
                    self.features.put(key, found[key])
        return [
            {camera: torch.stack([found[key] for key in names[camera]]) for camera in self._cameras}
            for names in keys
        ]

    def _sample(self, condition: Tensor, noise: Tensor | None) -> Tensor:
        config = self._config
        if noise is None:
            shape = (len(condition), config.horizon, config.action_feature.shape[0])
            noise = torch.randn(shape, dtype=condition.dtype, device=condition.device)
        x = noise
        with one_thread(self._denoise.narrow):
            for films, time in zip(self._denoise.films(condition), self._times, strict=True):
                x = self._step(self._denoise(x, films), time, x)
        start = config.n_obs_steps - 1
        return x[:, start : start + config.n_action_steps]

    def differences(self) -> tuple[float, float]:
        """How far encoders and U-Net are from LeRobot's, each against its largest value: (features, predictions)."""
        core, config = self._core, self._config
        device = next(core.parameters()).device
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device)

        features = [0.0]
        plain = core.rgb_encoder if isinstance(core.rgb_encoder, nn.ModuleList) else [core.rgb_encoder]
        image = normal(1, *next(iter(config.image_features.values())).shape)
        for encoder, ours in zip(plain, dict.fromkeys(self._encoders.values()), strict=True):
            features.append(difference(ours(image), encoder(image)))
        noise = normal(1, config.horizon, config.action_feature.shape[0])
        condition = normal(1, self._denoise.condition_size)
        predictions = []
        # The first and the last time of the schedule.
        for step in (0, -1):
            time = torch.full((1,), int(self._times[step]), dtype=torch.long, device=device)
            ours = self._denoise(noise, self._denoise.films(condition)[step])
            predictions.append(difference(ours, core.unet(noise, time, global_cond=condition)))
        return max(features), max(predictions)

    def release(self) -> None:
        """Let go of LeRobot's copy of the weights that lie packed here."""
        for module in list(self._core.modules()):
            if hasattr(module, "backbone"):
                del module.backbone
        for layer in self._core.unet.modules() if self._denoise.packed else ():
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                layer.weight = None


def _step(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(prediction, time, x) -> x at the next time, as the scheduler's own step says.

    DDIM without noise (Song et al. 2021, equation 12) has its coefficients computed once; the scheduler does it in each
    step, with tensors of one value, which costs more than the step.
    """
    config = scheduler.config
    plain = type(scheduler).__name__ == "DDIMScheduler" and config.prediction_type == "epsilon"
    if not plain or config.thresholding:
        return lambda predicted, time, x: scheduler.step(predicted, time, x).prev_sample
    stride = config.num_train_timesteps // scheduler.num_inference_steps
    limit = config.clip_sample_range if config.clip_sample else float("inf")
    steps = {}
    for time in map(int, scheduler.timesteps):
        now = float(scheduler.alphas_cumprod[time])
        before = scheduler.alphas_cumprod[time - stride] if time >= stride else scheduler.final_alpha_cumprod
        steps[time] = now**0.5, (1 - now) ** 0.5, float(before) ** 0.5, (1 - float(before)) ** 0.5

    def step(predicted: Tensor, time: Tensor, x: Tensor) -> Tensor:
        signal, noise, signal_before, noise_before = steps[int(time)]
        clean = torch.sub(x, predicted, alpha=noise).div_(signal).clamp_(-limit, limit)
        return clean.mul_(signal_before).add_(predicted, alpha=noise_before)

    return step


class _Encoder:
    """LeRobot's DiffusionRgbEncoder: (B, 3, H, W) -> (B, n) float32."""

    def __init__(self, encoder: Any, dtype: torch.dtype):
        self._own = encoder
        self._look = ResNet(encoder.backbone, dtype=dtype)

    def __call__(self, images: Tensor) -> Tensor:
        own = self._own
        if own.resize is not None:
            images = own.resize(images)
        if own.do_crop:
            images = own.center_crop(images)
        points = own.pool(self._look(images).float().contiguous())
        return own.relu(own.out(points.flatten(1)))


class _UNet:
    """LeRobot's DiffusionConditionalUnet1d at the times of one schedule."""

    def __init__(self, unet: Any, times: Sequence[int]):
        blocks = [block for one, two, _ in unet.down_modules for block in (one, two)]
        blocks += [*unet.mid_modules, *(b for one, two, _ in unet.up_modules for b in (one, two))]
        widest = max(conv.weight.numel() for conv in unet.modules() if isinstance(conv, nn.Conv1d))
        device = next(unet.parameters()).device
        self.packed = widest >= PACKED_FROM and has_packed_kernels(device)
        self.narrow = device.type == "cpu" and not self.packed
        self._layers = RowsUNet(unet) if self.narrow else _ConvolvedUNet(unet, self.packed)
        linears = [block.cond_encoder[1] for block in blocks]
        self._sizes = [len(linear.weight) for linear in linears]
        weights = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        with torch.no_grad():
            embedded = unet.diffusion_step_encoder(torch.tensor(times, device=device))
            split = embedded.shape[1]
            # Of each denoising step; a layer of all blocks at once, (steps, 1, all).
            self._at_time = functional.linear(functional.mish(embedded), weights[:, :split], bias)[:, None]
            self._of_condition = weights[:, split:].contiguous()
        self.condition_size = self._of_condition.shape[1]

    def films(self, condition: Tensor) -> Tensor:
        """(steps, B, all blocks' scales and shifts) for a condition (B, n)."""
        return self._at_time + functional.linear(functional.mish(condition), self._of_condition)

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        """(B, horizon, action_dim) -> the model's output of this shape, at the step whose row of `films` is given."""
        return self._layers(x, film[..., None, None].split(self._sizes, dim=1))


class _ConvolvedUNet:
    """The U-Net's layers as convolutions: over images of height 1 in oneDNN's order (`flat`), or as they are."""

    def __init__(self, unet: Any, flat: bool):
        self._flat = flat
        self._down = [self._level(level) for level in unet.down_modules]
        self._middle = [_Block(block, flat) for block in unet.mid_modules]
        self._up = [self._level(level) for level in unet.up_modules]
        block, last = unet.final_conv
        self._final, self._last = _Normed(block.block, flat), _convolution(last, flat)

    def _level(self, layers: Any) -> tuple[Any, Any, Any]:
        one, two, last = layers
        return _Block(one, self._flat), _Block(two, self._flat), _rescale(last, self._flat)

    def __call__(self, x: Tensor, films: Sequence[Tensor]) -> Tensor:
        """As `RowsUNet`."""
        scales = iter(films if self._flat else [film[..., 0] for film in films])
        x = x.transpose(1, 2)
        x = x[:, :, None] if self._flat else x.contiguous()
        skipped = []
        for one, two, rescale in self._down:
            x = two(one(x, next(scales)), next(scales))
            skipped.append(x)
            x = rescale(x)
        for block in self._middle:
            x = block(x, next(scales))
        for one, two, rescale in self._up:
            x = torch.cat([x, skipped.pop()], dim=1)
            x = rescale(two(one(x, next(scales)), next(scales)))
        x = self._last(self._final(x))
        return (x[:, :, 0] if self._flat else x).transpose(1, 2).contiguous()


class _Normed:
    """Convolution, group norm, Mish."""

    def __init__(self, layers: Any, flat: bool):
        convolution, norm, _ = layers
        self._convolve = _convolution(convolution, flat)
        self._norm = (norm.num_groups, norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.mish(functional.group_norm(self._convolve(x), *self._norm), inplace=True)


class _Block:
    """LeRobot's DiffusionConditionalResidualBlock1d with its condition known."""

    def __init__(self, block: Any, flat: bool):
        self._scaled, self._channels = block.use_film_scale_modulation, block.out_channels
        self._first, self._second = (_Normed(part.block, flat) for part in (block.conv1, block.conv2))
        plain = isinstance(block.residual_conv, nn.Identity)
        self._residual = None if plain else _convolution(block.residual_conv, flat)

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        out = self._first(x)
        if self._scaled:
            scale, bias = film.split(self._channels, dim=1)
            out = torch.addcmul(bias, scale, out)
        else:
            out = out + film
        return self._second(out).add_(x if self._residual is None else self._residual(x))


def _rescale(layer: Any, flat: bool) -> Any:
    """What stands at the end of a level: a convolution down or up, or nothing."""
    if isinstance(layer, nn.ConvTranspose1d) and flat:
        return _Upsampling(layer)
    return _convolution(layer, flat) if isinstance(layer, nn.Conv1d) else layer


def _convolution(layer: Any, flat: bool) -> Any:
    """A 1D convolution as a 2D one over images of height 1, with packed weights; or as it is."""
    if not flat:
        return layer
    image = nn.utils.skip_init(
        nn.Conv2d,
        layer.in_channels,
        layer.out_channels,
        (1, *layer.kernel_size),
        (1, *layer.stride),
        (0, *layer.padding),
        (1, *layer.dilation),
    )
    image.weight, image.bias = nn.Parameter(layer.weight[:, :, None], requires_grad=False), layer.bias
    return Convolution(image)


class _Upsampling:
    """A transposed 1D convolution over images of height 1, with packed weights."""

    def __init__(self, layer: Any):
        self._weight, self._bias = layer.weight[:, :, None].contiguous(), layer.bias
        self._place = (
            [0, *layer.padding],
            [0, *layer.output_padding],
            [1, *layer.stride],
            [1, *layer.dilation],
        )
        self._packed = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            self._weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                self._weight, *self._place, 1, [1, *x.shape[1:]]
            )
            self._packed = True
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self._weight, self._bias, *self._place, 1, "none", [], ""
        )
