"""The normalised Hebbian update, in two steps: a delta, and its application to the weight.

Equation (LoCal+SGD, Figure 1, eq. 2 to 4), for a layer with input a and pre-activation output z::

    delta = dW(a, z)                                the layer's weight-gradient with z for the error
    W    <- W + rate * delta / ||delta||            Frobenius norm

`conv_delta` and `linear_delta` are the first line, `normalised_add_` the second, so that another
rule, or a sum of deltas over ranks, fits between them. Where the weight is computed,
`normalised_step` and `add_steps_` are the two halves of the second, and the step is taken back to
the parameters between them; see `fxlocal.ops.computed`.

All are composite operators of `torch.library`: `torch.compile` looks through them and fuses them.
Those that mutate a weight declare it in their schemas, so that no dead-code elimination drops them.

Precision: the product runs in the dtype of the activations (under bf16 autocast on the tensor
cores, which accumulate in float32; in float32 for fp16, whose range a sum over the batch leaves);
norm, scale and sum are float32 on the weight itself (float64 where the weight is). A weight that is
narrower is rounded to the nearest, which loses steps below half of its last digit, or on request
stochastically, which on average loses none.

Shapes: B batch, I input features or channels, O output features or channels, K kernel size.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "add_delta_",
    "add_steps_",
    "conv_delta",
    "linear_delta",
    "normalised_add_",
    "normalised_step",
    "take_total_",
]

_library: Any = torch.library.Library("fxlocal", "DEF")  # type: ignore[no-untyped-call]
LINEAR = "(Tensor pre, Tensor post, Tensor weight) -> Tensor"
CONV = LINEAR.replace(
    ")", ", int[] stride, int[] padding, int[] dilation, bool transposed, int groups)"
)
_library.define(f"conv_delta{CONV}")
_library.define(f"linear_delta{LINEAR}")
STEP = "Tensor delta, Tensor rate, *, bool relative=False, Tensor(b!)? skipped=None"
_library.define(f"normalised_add_(Tensor(a!) weight, {STEP}, bool stochastic=False) -> ()")
_library.define(f"normalised_step(Tensor weight, {STEP}) -> Tensor")
_library.define(
    "add_steps_(Tensor(a!)[] weights, Tensor[] steps, *, Tensor(b!)? skipped=None, "
    "bool stochastic=False) -> ()"
)
_library.define("add_delta_(Tensor(a!) total, Tensor delta) -> ()")
_library.define("take_total_(Tensor(a!) total, Tensor delta) -> Tensor")


def _same_dtype(pre: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype of the product: the narrower of the two, but never fp16."""
    dtype = torch.promote_types(pre.dtype, post.dtype)
    if torch.bfloat16 in (pre.dtype, post.dtype):
        dtype = torch.bfloat16
    if dtype is torch.float16:
        dtype = torch.float32
    return pre.detach().to(dtype), post.detach().to(dtype)


Sliding: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], bool, int]


def own_output(pre: Tensor, post: Tensor, weight: Tensor, sliding: Sliding) -> Tensor:
    """Return ``post`` summed to the size of the convolution's own output.

    It is larger where it is a residual sum that broadcast the output. (A transposed convolution's
    positions are post's: its output padding is not known.)
    """
    stride, padding, dilation, transposed, groups = sliding
    num_spatial, channels = weight.dim() - 2, weight.shape[0]
    if transposed:
        spatial, channels = list(post.shape[-num_spatial:]), weight.shape[1] * groups
    else:
        own = pre.shape[-num_spatial:]
        sizes = zip(own, weight.shape[2:], stride, padding, dilation, strict=True)
        spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return post.sum_to_size(*pre.shape[: -1 - num_spatial], channels, *spatial)


def conv_delta(
    pre: Tensor,
    post: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Tensor:
    """Correlate a convolution's input with its output: one weight-gradient convolution.

    Equation (LoCal+SGD, Figure 1, eq. 3), for stride 1::

        delta[o, i, k] = sum over b, p of post[b, o, p] * pre[b, i, p + k]

    Args:
        pre: the layer's (padded) input, shape (B, I, *spatial), or without B.
        post: its output before the norm, shape (B, O, *spatial), or without B; summed to that
            shape where it is larger (a residual sum that broadcasts).
        weight: its weight; only the shape is used.
        stride: of the convolution, one entry per spatial dimension; like
        padding: zeros added on both sides,
        dilation: and
        transposed: whether it is a transposed convolution.
        groups: number of groups.

    Returns:
        The delta, of the weight's shape.
    """
    pre, post = _same_dtype(pre, post)
    post = own_output(pre, post, weight, (stride, padding, dilation, transposed, groups))
    if pre.dim() < weight.dim():
        pre, post = pre.unsqueeze(0), post.unsqueeze(0)
    output_padding = [0] * (weight.dim() - 2)
    if transposed:
        sizes = zip(pre.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sizes]
        output_padding = [n - m for n, m in zip(post.shape[2:], least, strict=True)]
    sliding = (stride, padding, dilation, transposed, output_padding, groups)
    delta: Tensor = torch.ops.aten.convolution_backward(
        post, pre, weight.detach().to(pre.dtype), [0], *sliding, [False, True, False]
    )[1]
    return delta


def linear_delta(pre: Tensor, post: Tensor, weight: Tensor) -> Tensor:
    """Correlate a linear layer's input with its output, summed over all leading dimensions.

    Equation (LoCal+SGD, Figure 1, eq. 3): ``delta[o, i] = sum over b of post[b, o] * pre[b, i]``.

    Args:
        pre: input, shape (*, I).
        post: output, shape (*, O); summed to that shape where it is larger.
        weight: its weight, shape (O, I); only the shape is used.

    Returns:
        The delta, shape (O, I).
    """
    pre, post = _same_dtype(pre, post)
    post = post.sum_to_size(*pre.shape[:-1], weight.shape[0])
    pre_BI = pre.reshape(-1, pre.shape[-1])
    post_BO = post.reshape(-1, post.shape[-1])
    with torch.autocast(pre.device.type, enabled=False):  # else fp16 comes back
        return post_BO.t() @ pre_BI


def add_delta_(total: Tensor, delta: Tensor) -> None:
    """Add the delta of a micro-batch to the ``total`` of a step, which is applied with the last."""
    total.add_(delta)


def take_total_(total: Tensor, delta: Tensor) -> Tensor:
    """Return ``total`` and the last micro-batch's delta together, and set it back to zero."""
    whole = total + delta
    total.zero_()
    return whole


def normalised_add_(
    weight: Tensor,
    delta: Tensor,
    rate: Tensor,
    *,
    relative: bool = False,
    skipped: Tensor | None = None,
    stochastic: bool = False,
) -> None:
    """Move ``weight`` by a step of length ``rate`` along ``delta``, in place.

    Equation (LoCal+SGD, Figure 1, eq. 4, and Algorithm 2 for a negative rate)::

        weight += rate * delta / ||delta||
        weight += rate * ||weight|| * delta / ||delta||        if relative (ours)

    A delta that is zero, or not finite, moves nothing.

    Args:
        weight: the weight; its memory format is kept.
        delta: of the weight's shape.
        rate: 0-dim; the L2 length of the step, in weight units or, if relative, in lengths of the
            weight. A negative rate steps backwards.
        relative: as above.
        skipped: 0-dim; counts the deltas that were not finite.
        stochastic: round a weight narrower than float32 up or down at random, by torch's generator.

    Raises:
        ValueError: if delta and weight differ in shape.
    """
    step = normalised_step(weight, delta, rate, relative=relative, skipped=skipped)
    add_step(weight, step, stochastic)


def normalised_step(
    weight: Tensor,
    delta: Tensor,
    rate: Tensor,
    *,
    relative: bool = False,
    skipped: Tensor | None = None,
) -> Tensor:
    """Return the step that `normalised_add_` moves ``weight`` by, in float32 or wider."""
    if delta.shape != weight.shape:
        raise ValueError(
            f"a delta of shape {tuple(delta.shape)} for a weight of shape {tuple(weight.shape)}"
        )
    delta = delta.to(torch.promote_types(weight.dtype, torch.float32))
    norm, length = torch.linalg.vector_norm(delta), rate
    if relative:
        length = rate * torch.linalg.vector_norm(weight.detach().to(delta.dtype))
    return apply_length(delta, norm, length, skipped)


def apply_length(delta: Tensor, norm: Tensor, length: Tensor, skipped: Tensor | None) -> Tensor:
    """Return ``delta``, of this norm, at a length; zeros if the norm is zero or not finite."""
    finite = torch.isfinite(norm)
    if skipped is not None:
        skipped.add_(~finite)
    scale = torch.where(finite & (norm > 0), length / norm, 0.0)
    return (delta * scale).nan_to_num_()  # 0 * inf; on a CPU `where` takes four times as long


def add_steps_(
    weights: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    skipped: Tensor | None = None,
    stochastic: bool = False,
) -> None:
    """Add to each of ``weights`` its step, in place; none of them if one is not finite.

    They are the parameters that one weight is computed from; the rest is as in `normalised_add_`.
    """
    finite = torch.stack([torch.linalg.vector_norm(step) for step in steps]).isfinite().all()
    if skipped is not None:
        skipped.add_(~finite)
    for weight, step in zip(weights, steps, strict=True):
        add_step(weight, torch.where(finite, step, 0.0), stochastic)


def add_step(weight: Tensor, step: Tensor, stochastic: bool) -> None:
    """Add a step to a weight in its own dtype, in place."""
    target = weight.detach()
    if stochastic and weight.dtype.itemsize < 4:
        target.copy_(_rounded(target.float() + step, weight.dtype))
    else:
        target.add_(step.to(weight.dtype))
    if torch.is_autocast_enabled(weight.device.type):
        torch.clear_autocast_cache()  # else the next forward in this region sees the old cast


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a neighbour in ``dtype``, up as often as ``total`` lies near it: right on average.

    What ``dtype`` holds exactly stays.
    """
    limits, exponent = torch.finfo(dtype), torch.frexp(total).exponent
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    digit = torch.ldexp(torch.full_like(total, limits.eps), exponent - 1).clamp(min=least)
    scaled = total / digit
    low = scaled.floor()
    return ((low + (torch.rand_like(scaled) < scaled - low)) * digit).to(dtype)


for _name in __all__:
    _library.impl(_name, globals()[_name], "CompositeImplicitAutograd")
