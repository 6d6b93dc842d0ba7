"""Oja's rule: the Hebbian delta, less what keeps each output's weights from growing.

Equation (Oja, *A simplified neuron model as a principal component analyzer*, 1982, eq. 3), z the
layer's pre-activation output, summed over batch and positions::

    delta[o] = dW(a, z)[o] - sum(z[o]^2) * W[o]

The delta is zero where W[o] is the first principal component of the inputs, at length 1; with a
bias, or where z is a residual sum, the fixed point is another one. It is applied by
`fxlocal.ops.hebbian.normalised_add_`.

A z that a residual sum made larger than the layer's own output is summed to that size first, over
channels and positions, in both terms. Near the fixed point the delta is a small difference of large
terms, so that both are float32 (float64 where an activation is), whatever the activations.
Cost: the Hebbian delta's one product, in float32, and one pass over z.
"""

from typing import Any

import torch
from torch import Tensor

from .hebbian import CONV, LINEAR, conv_delta, linear_delta, own_output

__all__ = ["conv_oja_delta", "linear_oja_delta"]

_library: Any = torch.library.Library("fxlocal", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"conv_oja_delta{CONV}")
_library.define(f"linear_oja_delta{LINEAR}")


def conv_oja_delta(pre: Tensor, post: Tensor, weight: Tensor, *sliding: Any) -> Tensor:
    """Return Oja's delta of a convolution; arguments as of `fxlocal.ops.hebbian.conv_delta`."""
    pre, post = _wide(pre), _wide(post)
    post = own_output(pre, post, weight, sliding)
    product = conv_delta(pre, post, weight, *sliding)
    *_, transposed, groups = sliding
    num_spatial = weight.dim() - 2
    energy_O = _energy(post.transpose(-1 - num_spatial, -1))
    if not transposed:
        return _decayed(product, energy_O.view(-1, *[1] * (num_spatial + 1)), weight)
    # The weight is (I, O / groups, *kernel); its first dimension runs through the groups in order.
    energy_GO = energy_O.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return _decayed(product, energy_GO.view(*energy_GO.shape, *[1] * num_spatial), weight)


def linear_oja_delta(pre: Tensor, post: Tensor, weight: Tensor) -> Tensor:
    """Return Oja's delta of a linear layer; arguments as of `fxlocal.ops.hebbian.linear_delta`."""
    pre, post = _wide(pre), _wide(post)
    post = post.sum_to_size(*pre.shape[:-1], weight.shape[0])
    return _decayed(linear_delta(pre, post, weight), _energy(post)[:, None], weight)


def _wide(activity: Tensor) -> Tensor:
    return activity.detach().to(torch.promote_types(activity.dtype, torch.float32))


def _energy(post: Tensor) -> Tensor:
    """Return the sum of squares of each channel, the last dimension."""
    return post.square().reshape(-1, post.shape[-1]).sum(0)


def _decayed(product: Tensor, energy: Tensor, weight: Tensor) -> Tensor:
    return product.to(energy.dtype) - energy * weight.detach().to(energy.dtype)


for _name in __all__:
    _library.impl(_name, globals()[_name], "CompositeImplicitAutograd")
