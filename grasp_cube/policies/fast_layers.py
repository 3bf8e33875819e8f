"""Convolutions and ResNets as ACT and Diffusion use them, without the work that only training needs.

A batch norm whose statistics no longer change is a scale and a shift, so it is folded into the convolution before it.
On an x86 processor bias, ReLU and the residual's addition are done by oneDNN while the convolution's result is in the
cache, and its weights lie from the start in the order in which the kernel reads them; by itself torch brings them into
that order in every call, which costs more than the convolution where the weights are many and the inputs few.
These are the operators that torch's own compiler puts in place (`torch.ops.mkldnn`); here no compiler is needed.

Life cycle: built once from LeRobot's modules, used by the device's thread.
Error policy: `Unsupported` for a network that is built otherwise.
"""

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["Convolution", "Linear", "ResNet", "Unsupported", "difference", "has_packed_kernels", "one_thread"]


class Unsupported(Exception):
    """A network that these layers do not cover: it is run by LeRobot."""


def has_packed_kernels(device: torch.device) -> bool:
    """Whether oneDNN's fused convolutions are there and known to be quicker."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (
        device.type == "cpu"
        and x86
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Where it is wanted, torch computes in the calling thread alone: for products so small that sharing them out takes longer."""
    if not wanted:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def difference(ours: Tensor, expected: Tensor) -> float:
    """The largest difference; against the largest value where that is above 1. NaN where either is not finite."""
    return float((ours - expected).abs().max() / expected.abs().max().clamp_min(1))


class Convolution:
    """A 2D convolution, maybe with the norm behind it, a residual and a ReLU: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, layer: Any, norm: Any = None, *, dtype: torch.dtype = torch.float32):
        """`norm` is torch's or torchvision's batch norm, or a group norm. Raises `Unsupported`."""
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer.padding_mode != "zeros":
            raise Unsupported(f"a convolution that is {layer}")
        weight, bias = layer.weight.double(), layer.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
        self._norm = None
        if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            statistics = (norm.running_mean.double(), norm.running_var.double(), norm.eps)
            weight, bias = fuse_conv_bn_weights(
                weight, bias, *statistics, norm.weight.double(), norm.bias.double()
            )
        elif isinstance(norm, nn.GroupNorm):
            self._norm = (norm.num_groups, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
        elif norm is not None:
            raise Unsupported(f"the norm {norm}")
        self._weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self._bias = bias.detach().to(dtype)
        self._place = (list(layer.padding), list(layer.stride), list(layer.dilation))
        self._packs = has_packed_kernels(layer.weight.device)
        self._packed = False

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """`relu` of the sum of convolution and `residual`."""
        if not self._packs or self._norm is not None:
            return self._plainly(x, residual, relu)
        if not self._packed:
            # The kernel that a batch of one chooses serves larger batches as well.
            shape = [1, *x.shape[1:]]
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(self._weight, *self._place, 1, shape)
            self._packed = True
        after = "relu" if relu else "none"
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self._weight, self._bias, *self._place, 1, after, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x,
            residual,
            self._weight,
            self._bias,
            *self._place,
            1,
            "add",
            1.0,
            after if relu else None,
            [],
            "",
        )

    def _plainly(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        padding, stride, dilation = self._place
        x = functional.conv2d(x, self._weight, self._bias, stride, padding, dilation)
        if self._norm is not None:
            x = functional.group_norm(x, *self._norm)
        if residual is not None:
            x += residual
        return x.relu_() if relu else x


class Linear:
    """x W^T + b in a type of its own: (..., n) -> (..., m)."""

    def __init__(self, weight: Tensor, bias: Tensor, *, dtype: torch.dtype = torch.float32):
        self._weight, self._bias = weight.detach().to(dtype), bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self._weight.dtype), self._weight, self._bias)


class ResNet:
    """torchvision's ResNet without its head: (B, 3, H, W) -> (B, C, h, w), channels last."""

    def __init__(self, backbone: Any, *, dtype: torch.dtype = torch.float32):
        """`backbone`'s children are those of a torchvision ResNet up to `layer4`. Raises `Unsupported`."""
        self._dtype = dtype
        try:
            stem, norm, _, self._pool, *stages = backbone.children()
            self._stem = Convolution(stem, norm, dtype=dtype)
            self._blocks = [self._block(block) for stage in stages for block in stage]
        except (ValueError, AttributeError, TypeError) as error:
            raise Unsupported(f"a backbone that is no ResNet ({error})") from error
        if len(stages) != 4:
            raise Unsupported(f"a ResNet of {len(stages)} stages")

    def _block(self, block: Any) -> tuple[list[Convolution], Convolution | None]:
        names = ("1", "2", "3") if hasattr(block, "conv3") else ("1", "2")
        layers = [
            Convolution(getattr(block, f"conv{name}"), getattr(block, f"bn{name}"), dtype=self._dtype)
            for name in names
        ]
        shortcut = None if block.downsample is None else Convolution(*block.downsample, dtype=self._dtype)
        return layers, shortcut

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self._dtype).contiguous(memory_format=torch.channels_last)
        x = self._pool(self._stem(x, relu=True))
        for (*layers, last), shortcut in self._blocks:
            residual = x if shortcut is None else shortcut(x)
            for layer in layers:
                x = layer(x, relu=True)
            x = last(x, residual, relu=True)
        return x
