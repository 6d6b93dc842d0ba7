"""The weight gradient of each output channel's k largest errors: selection, then accumulation.

Equation (gradient approximation, section 2.3, Algorithm 1, with k positions for its one), for
sample n and output channel o with the output's gradient dO::

    p_1 .. p_k = positions of the k largest |dO[n, o, p]|
    value_j    = scale * (dO[n, o, p_j] + (sum over p of dO[n, o, p] - sum of the kept) / k)
    dW[o, i, t] = sum over n, j of value_j * pre[n, i, p_j * stride + t * dilation - padding]

The dense gradient multiplies a matrix for every position; this one reads dO once and adds up one
patch per sample and output channel, so that its cost does not grow with the map.

Selection goes in two steps: the largest value of each stretch of positions, then the largest within
the stretches that hold them. Nothing of dO's size is written. Accumulation is an `embedding_bag`:
for each output channel and tap, the sum of the pixels that it meets, weighted. Both are ATen's own
vectorised kernels on any device; on CUDA, 2-D convolutions have kernels of their own, see
`fxlocal.ops.topk_triton`.

Shapes: B batch, I input channels, O output channels, G groups, P positions of the output's map,
K kept positions, T taps (positions of the kernel). Selection, values and sums are float32 (float64
for float64).
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["accumulate", "conv_topk", "linear_topk", "scaled", "select"]

_HAS_TRITON = find_spec("triton") is not None  # not on every platform


def conv_topk(
    pre: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    k: int,
    scale: float | None,
) -> Tensor:
    """Return the weight gradient of a convolution; see the module's docstring.

    Args:
        pre: its input, shape (B, I, *spatial).
        grad: the gradient of its output, shape (B, O, *spatial).
        kernel: size of the kernel, one entry per spatial dimension; like
        stride: of the convolution,
        padding: zeros added on both sides,
        dilation: and
        groups: number of groups.
        k: positions kept, fewer than P.
        scale: factor of the result; None for 1 / B.

    Returns:
        Shape (O, I / G, *kernel), float32 (float64 for float64).
    """
    sliding = (list(kernel), list(stride), list(padding), list(dilation))
    if _HAS_TRITON and pre.is_cuda and pre.dim() == 4 and pre.dtype != torch.float64:
        from .topk_triton import conv2d_topk_weight_grad  # slow to import, and of use here alone

        result: Tensor = conv2d_topk_weight_grad(pre, grad, *sliding, groups, k, scale)
        return result
    position, value = select(grad, k, scale)
    return accumulate(pre, position, value, grad.shape[2:], *sliding, groups)


def linear_topk(pre: Tensor, grad: Tensor, k: int, scale: float | None) -> Tensor:
    """Return that of a linear layer, (O, I), whose map is all between batch and features.

    Arguments as in `conv_topk`, of shapes (B, *, I) and (B, *, O).
    """
    pre_BIP = pre.flatten(1, -2).transpose(1, 2)
    grad_BOP = grad.flatten(1, -2).transpose(1, 2)
    return conv_topk(pre_BIP, grad_BOP, [1], [1], [0], [1], 1, k, scale).squeeze(-1)


def scaled(value: Tensor, scale: float | None, batch: int) -> Tensor:
    """Return ``value`` times ``scale``; where that is None, by the samples of the batch."""
    return value / max(batch, 1) if scale is None else scale * value


def select(grad: Tensor, k: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return position and value of what is kept of ``grad``.

    Args:
        grad: shape (B, O, *spatial), in either memory format.
        k: positions kept.
        scale: factor of the values; None for 1 / B.

    Returns:
        Positions in the flattened map, int64, and values, both of shape (O, B, K).
    """
    channels_last = grad.stride(1) == 1 and grad.shape[1] >= 32  # fewer fill no vector registers
    if channels_last:
        maps, dim, length = grad.movedim(1, -1).flatten(1, -2), 1, 16  # (B, P, O)
    else:
        maps, dim, length = grad.contiguous().flatten(2), 2, 64  # (B, O, P)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = maps.sum(dim, keepdim=True, dtype=dtype)
    position = _largest(maps, dim, k, length)
    value = total
    if k > 1:
        kept = maps.gather(dim, position).to(dtype)
        value = kept + (total - kept.sum(dim, keepdim=True)) / k
    order = (2, 0, 1) if channels_last else (1, 0, 2)
    value = scaled(value, scale, grad.shape[0])
    return position.permute(order).contiguous(), value.permute(order).contiguous()


def _largest(maps: Tensor, dim: int, k: int, length: int) -> Tensor:
    """Return the k positions of the largest sizes along ``dim``, kept as a dimension.

    The k largest lie in the k stretches with the largest maxima.
    """
    num_positions = maps.shape[dim]
    divisors = [d for d in range(1, num_positions + 1) if num_positions % d == 0]
    length = min(divisors, key=lambda d: abs(math.log(d / length)))
    num_stretches = num_positions // length
    fused = k == 1 and torch.compiler.is_compiling()  # into one pass that writes no sizes
    if fused or num_stretches <= max(k, 2):
        return _top(maps.abs(), dim, k)
    shape = [*maps.shape[:dim], num_stretches, length, *maps.shape[dim + 1 :]]
    stretches = maps.view(shape)
    # |v| of the whole map would be written to memory; the two ends are not.
    ends = torch.maximum(stretches.amax(dim + 1), -stretches.amin(dim + 1))
    chosen = _top(ends, dim, k)
    if dim == maps.dim() - 1:  # stretches are rows in memory, which are copied whole
        first = torch.arange(0, ends.numel(), num_stretches, device=maps.device)
        rows = chosen.flatten(0, -2) + first[:, None]
        chosen_rows = stretches.reshape(-1, length).index_select(0, rows.flatten())
        candidates = chosen_rows.view(*maps.shape[:dim], k * length)
    else:
        shape[dim] = k
        index = chosen.unsqueeze(dim + 1).expand(shape)
        candidates = stretches.gather(dim, index).flatten(dim, dim + 1)
    within = _top(candidates.abs(), dim, k)
    return chosen.gather(dim, within // length) * length + within % length


def _top(sizes: Tensor, dim: int, k: int) -> Tensor:
    if k == 1:  # eager's max is the faster of the two, inductor's argmax
        compiling = torch.compiler.is_compiling()
        return sizes.argmax(dim, True) if compiling else sizes.max(dim, True).indices
    return sizes.topk(k, dim, sorted=False).indices


def accumulate(
    pre: Tensor,
    position_OBK: Tensor,
    value_OBK: Tensor,
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Add up the patches of ``pre`` that the kept positions meet, each times its value.

    The positions lie in the flattened map, of ``output_size``; ``pre`` is copied to channels last
    where it is not. The rest is as in `conv_topk`; the result has the values' dtype.
    """
    batch, num_inputs, size = pre.shape[0], pre.shape[1] // groups, pre.shape[2:]
    num_outputs = len(position_OBK)
    if batch == 0:  # there are no rows to take
        return value_OBK.new_zeros(num_outputs, num_inputs, *kernel)
    pixels = pre.movedim(1, -1).reshape(-1, num_inputs).to(value_OBK.dtype)  # (B * area * G, I / G)
    pixel_TOBK = torch.arange(batch, device=pre.device).unsqueeze(-1).expand_as(position_OBK)[None]
    value_TOBK = value_OBK[None]
    for n, at, taps, s, p, d in zip(
        *(size, _unravel(position_OBK, output_size), kernel, stride, padding, dilation), strict=True
    ):
        tap = torch.arange(-p, taps * d - p, d, device=pre.device)[:, None, None, None]
        seen = at * s + tap
        inside = (seen >= 0) & (seen < n)
        pixel_TOBK = (pixel_TOBK[:, None] * n + seen.clamp(0, n - 1)).flatten(0, 1)
        value_TOBK = (value_TOBK[:, None] * inside).flatten(0, 1)
    if groups > 1:
        group_O = torch.arange(num_outputs, device=pre.device) // (num_outputs // groups)
        pixel_TOBK = pixel_TOBK * groups + group_O[:, None, None]
    bags, weights = pixel_TOBK.flatten(0, 1).flatten(1), value_TOBK.flatten(0, 1).flatten(1)
    summed = F.embedding_bag(bags, pixels, mode="sum", per_sample_weights=weights)
    by_tap = summed.view(-1, num_outputs, num_inputs)
    return by_tap.permute(1, 2, 0).reshape(num_outputs, num_inputs, *kernel)


def _unravel(position: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Return the coordinates of positions in a flattened map of ``size``."""
    coordinates = []
    for n in reversed(size):
        coordinates.append(position % n)
        position = position // n
    return coordinates[::-1]
