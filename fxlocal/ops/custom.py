"""A user's own rule as a function of the same arguments as the built-in deltas."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hebbian import conv_delta, linear_delta

__all__ = ["bind_delta", "sample_activity"]


def bind_delta(rule: Callable[..., Tensor], geometry: tuple[Any, ...] | None) -> Any:
    """Return ``delta(pre, post, weight)``, which calls ``rule(weight, pre, post)``.

    A rule that takes ``product`` gets the layer's own product of an input and an output.

    Args:
        rule: the user's function.
        geometry: the last five arguments of `fxlocal.ops.hebbian.conv_delta`; None for a linear
            layer.
    """
    takes_product = "product" in inspect.signature(rule).parameters

    def delta(pre: Tensor, post: Tensor, weight: Tensor) -> Tensor:
        def product(pre: Tensor, post: Tensor) -> Tensor:
            if geometry is None:
                return linear_delta(pre, post, weight)
            return conv_delta(pre, post, weight, *geometry)

        pre, post, weight = pre.detach(), post.detach(), weight.detach()
        return (
            rule(weight, pre, post, product=product) if takes_product else rule(weight, pre, post)
        )

    # As torch.fx names it in the code and in the printed graph.
    delta.__name__ = getattr(rule, "__name__", type(rule).__name__)
    delta.__module__ = getattr(rule, "__module__", type(rule).__module__)
    return delta


def sample_activity(weight: Tensor, geometry: tuple[Any, ...] | None) -> tuple[Tensor, Tensor]:
    """Return a small random input of a layer, always the same, and the output that it leads to."""
    generator = torch.Generator().manual_seed(0)
    weight = weight.detach()
    if geometry is None:
        pre = torch.randn(2, weight.shape[1], generator=generator).to(weight)
        return pre, F.linear(pre, weight)
    stride, padding, dilation, transposed, groups = geometry
    sides = zip(weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = [max(d * (k - 1) + 1 + s - 2 * p, 2) for k, s, p, d in sides]
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    pre = torch.randn(2, channels, *spatial, generator=generator).to(weight)
    none = [0] * len(spatial)
    post: Tensor = torch.ops.aten.convolution(
        pre, weight, None, stride, padding, dilation, transposed, none, groups
    )
    return pre, post
