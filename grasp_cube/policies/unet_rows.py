"""Diffusion's U-Net on a CPU as products of matrices: time along the rows, channels along the columns.

torch takes a narrow 1D convolution through its slow path, as an image that is unfolded element by element. With time along
the rows a convolution of `k` taps is one product, since `k` rows after each other are the input of one output row:
a view, for which nothing is moved. Inputs lie in memory of their own with zeros around them, which is made once for each batch
size and kept, so that a step allocates nothing but what its norms return.

Life cycle: built once from LeRobot's modules, used by the device's thread. Weights are copies.
Error policy: `Unsupported` for a network that is built otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grasp_cube.policies.fast_layers import Unsupported

__all__ = ["RowsUNet"]

# Batch sizes whose memory is kept; a server's batches have few sizes.
KEPT_SIZES = 8


class _Rows:
    """(B, T, C) with `pad` rows of zeros before and after each of the B; one more row lies between two of the outputs."""

    def __init__(self, like: Tensor, batch: int, time: int, channels: int, pad: int):
        self.time, self.channels, self._pad = time, channels, pad
        self._whole = like.new_zeros(batch, time + 2 * pad, channels)
        self.inside = self._whole[:, pad : pad + time]
        self.image = _as_image(self.inside)
        self._windows: dict[tuple[int, int], Tensor] = {}

    def windows(self, taps: int, stride: int) -> Tensor:
        """(n, taps * C), one row for each output of all B; those that reach from one into the next are of no use."""
        if (taps, stride) not in self._windows:
            batch, length, channels = self._whole.shape
            count = ((batch - 1) * length + self.time - 1) // stride + 1
            first = (self._pad - taps // 2) * channels
            self._windows[taps, stride] = self._whole.as_strided(
                (count, taps * channels), (stride * channels, 1), first
            )
        return self._windows[taps, stride]


class _Product:
    """A convolution's output, before anything is done with it: memory, and the useful part of it."""

    def __init__(self, source: _Rows, batch: int, stride: int, rows: Tensor, channels: int):
        time = (source.time + stride - 1) // stride
        self.rows = rows.new_empty(len(rows), channels)
        # From one of the batch to the next, in outputs.
        step = (len(rows) - time) // (batch - 1) if batch > 1 else time
        self.useful = self.rows.as_strided((batch, time, channels), (step * channels, channels, 1))
        self.image = _as_image(self.useful)


def _as_image(rows: Tensor) -> Tensor:
    """(B, T, C) as (B, C, 1, T), channels last: the form in which a group norm takes it without moving it."""
    return rows.transpose(1, 2).unsqueeze(2)


class _Memory:
    """What a step on one batch size writes to, in the order in which it is asked for."""

    def __init__(self, like: Tensor, batch: int, pad: int):
        self.batch = batch
        self._like, self._pad = like, pad
        self._kept: list[Any] = []
        self._next = 0

    def begin(self) -> None:
        self._next = 0

    def rows(self, time: int, channels: int) -> _Rows:
        return self._take(lambda: _Rows(self._like, self.batch, time, channels, self._pad))

    def product(self, source: _Rows, stride: int, windows: Tensor, channels: int) -> _Product:
        return self._take(lambda: _Product(source, self.batch, stride, windows, channels))

    def _take(self, make: Callable[[], Any]) -> Any:
        if self._next == len(self._kept):
            # Written to in and out of inference mode, which only ordinary tensors allow.
            with torch.inference_mode(False):
                self._kept.append(make())
        self._next += 1
        return self._kept[self._next - 1]


class _Convolution:
    """A 1D convolution that keeps the length, or divides it by its stride."""

    def __init__(self, layer: Any):
        (self.taps,), (self.stride,) = layer.kernel_size, layer.stride
        usual = layer.padding == (self.taps // 2,) and layer.dilation == (1,) and layer.groups == 1
        if not usual or self.taps % 2 == 0 or layer.padding_mode != "zeros":
            raise Unsupported(f"a convolution that is {layer}")
        # (taps * in, out): the rows of a window follow each other.
        self._weight = layer.weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous()
        self._bias, self._channels = layer.bias.detach(), layer.out_channels

    def __call__(self, x: _Rows, memory: _Memory) -> _Product:
        windows = x.windows(self.taps, self.stride)
        out = memory.product(x, self.stride, windows, self._channels)
        torch.addmm(self._bias, windows, self._weight, out=out.rows)
        return out


class _Upsampling:
    """LeRobot's transposed convolution of four taps, which doubles the length: both outputs of a row in one product."""

    def __init__(self, layer: Any):
        form = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation)
        if form != ((4,), (2,), (1,), (0,), (1,)) or layer.groups != 1:
            raise Unsupported(f"a transposed convolution that is {layer}")
        taps = layer.weight.detach().permute(2, 0, 1)
        nothing = torch.zeros_like(taps[0])
        # Output 2t is row t by tap 1 and row t-1 by tap 3, output 2t+1 is row t by tap 2 and row t+1 by tap 0.
        even, odd = torch.cat([taps[3], taps[1], nothing]), torch.cat([nothing, taps[2], taps[0]])
        self._weight = torch.cat([even, odd], dim=1).contiguous()
        self._bias, self._channels = layer.bias.detach().repeat(2), layer.out_channels

    def __call__(self, x: _Rows, memory: _Memory) -> _Rows:
        windows = x.windows(3, 1)
        out = memory.product(x, 1, windows, 2 * self._channels)
        torch.addmm(self._bias, windows, self._weight, out=out.rows)
        wide = memory.rows(2 * x.time, self._channels)
        wide.inside.copy_(out.useful.reshape(wide.inside.shape))
        return wide


class _Normed:
    """Convolution, group norm, Mish; (B, C, 1, T)."""

    def __init__(self, layers: Any):
        convolution, norm, _ = layers
        self._convolve = _Convolution(convolution)
        self._groups, self._eps = norm.num_groups, norm.eps
        self._weight, self._bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, x: _Rows, memory: _Memory) -> Tensor:
        out = self._convolve(x, memory).image
        return torch.ops.aten.mish_(torch.group_norm(out, self._groups, self._weight, self._bias, self._eps))


class _Block:
    """LeRobot's DiffusionConditionalResidualBlock1d with its condition known."""

    def __init__(self, block: Any):
        self._scaled, self.channels = block.use_film_scale_modulation, block.out_channels
        self._first, self._second = (_Normed(part.block) for part in (block.conv1, block.conv2))
        plain = isinstance(block.residual_conv, nn.Identity)
        self._residual = None if plain else _Convolution(block.residual_conv)

    def __call__(self, x: _Rows, film: Tensor, memory: _Memory) -> _Rows:
        """`film` is (B, n, 1, 1)."""
        out = self._first(x, memory)
        between = memory.rows(x.time, self.channels)
        if self._scaled:
            torch.addcmul(film[:, self.channels :], film[:, : self.channels], out, out=between.image)
        else:
            torch.add(out, film, out=between.image)
        out = self._second(between, memory)
        beside = x.image if self._residual is None else self._residual(x, memory).image
        end = memory.rows(x.time, self.channels)
        torch.add(out, beside, out=end.image)
        return end


class RowsUNet:
    """LeRobot's DiffusionConditionalUnet1d without its condition's and time's layers."""

    def __init__(self, unet: Any):
        """Raises `Unsupported`."""
        self._down = [(_Block(one), _Block(two), _rescale(last)) for one, two, last in unet.down_modules]
        self._middle = [_Block(block) for block in unet.mid_modules]
        self._up = [(_Block(one), _Block(two), _rescale(last)) for one, two, last in unet.up_modules]
        block, last = unet.final_conv
        self._final, self._last = _Normed(block.block), _Convolution(last)
        taps = [layer.kernel_size[0] for layer in unet.modules() if isinstance(layer, nn.Conv1d)]
        # At least one row, which the transposed convolution looks at.
        self._pad = max(1, max(taps) // 2)
        self._like = next(unet.parameters()).detach()
        self._memories: dict[int, _Memory] = {}

    def __call__(self, x: Tensor, films: Sequence[Tensor]) -> Tensor:
        """(B, horizon, action_dim) -> the model's output of this shape; `films` of each block in order, (B, n, 1, 1)."""
        memory = self._memory(len(x))
        memory.begin()
        scales = iter(films)
        rows = memory.rows(*x.shape[1:])
        rows.inside.copy_(x)
        skipped = []
        for one, two, rescale in self._down:
            rows = two(one(rows, next(scales), memory), next(scales), memory)
            skipped.append(rows)
            if rescale is not None:
                out = rescale(rows, memory).useful
                rows = memory.rows(*out.shape[1:])
                rows.inside.copy_(out)
        for block in self._middle:
            rows = block(rows, next(scales), memory)
        for one, two, rescale in self._up:
            beside = skipped.pop()
            both = memory.rows(rows.time, rows.channels + beside.channels)
            both.inside[..., : rows.channels].copy_(rows.inside)
            both.inside[..., rows.channels :].copy_(beside.inside)
            rows = two(one(both, next(scales), memory), next(scales), memory)
            if rescale is not None:
                rows = rescale(rows, memory)
        last = memory.rows(rows.time, rows.channels)
        last.image.copy_(self._final(rows, memory))
        # A copy: the memory is written again in the next step.
        return self._last(last, memory).useful.clone()

    def _memory(self, batch: int) -> _Memory:
        found = self._memories.get(batch)
        if found is None:
            while len(self._memories) >= KEPT_SIZES:
                self._memories.pop(next(iter(self._memories)))
            found = self._memories[batch] = _Memory(self._like, batch, self._pad)
        return found


def _rescale(layer: Any) -> Any:
    """What stands at the end of a level: a convolution down or up, or nothing."""
    if isinstance(layer, nn.ConvTranspose1d):
        return _Upsampling(layer)
    return _Convolution(layer) if isinstance(layer, nn.Conv1d) else None
