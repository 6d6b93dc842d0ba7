"""Layers with their own exact forward and input gradient, and a weight gradient by a method.

Each operator stands in the place of a convolution or linear layer (gradient approximation, section
2)::

    conv_zero     linear_zero       dW = 0, or no gradient
    conv_random   linear_random     dW ~ N(0, std^2), drawn anew in every backward
    conv_topk     linear_topk       dW of the k largest errors alone, see `fxlocal.ops.topk`

They are composite operators of `torch.library` around one autograd.Function: `torch.compile` looks
through both and fuses what is there. Where the weight gradient does not need the layer's input, it
is not kept. Under autocast the product of the forward runs in autocast's dtype, as the layer's own
would; the weight gradient is computed in float32 and returned in the weight's dtype.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import topk

__all__ = ["OPERATORS"]

_library: Any = torch.library.Library("fxlocal", "FRAGMENT")  # type: ignore[no-untyped-call]
_LAYERS = {
    "conv": "Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups",
    "linear": "Tensor input, Tensor weight, Tensor? bias",
}
_METHODS = {"zero": "bool none", "random": "float? std", "topk": "int k, float? scale"}


@dataclass(frozen=True)
class _Conv:
    """A convolution's arithmetic, given how it slides."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(input, weight, bias, *vars(self).values())

    def _backward(self, grad: Tensor, input: Tensor, weight: Tensor, wanted: int) -> Tensor:
        args = (*vars(self).values(), [wanted == 0, wanted == 1, False])
        result: Tensor = torch.ops.aten.convolution_backward(grad, input, weight, None, *args)[
            wanted
        ]
        return result

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, input, weight, 0)

    def weight_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, input, weight, 1)

    def bias_grad(self, grad: Tensor) -> Tensor:
        return grad.sum([0, *range(2, grad.dim())])

    def topk(
        self, grad: Tensor, input: Tensor, weight: Tensor, k: int, scale: float | None
    ) -> Tensor:
        sliding = (weight.shape[2:], self.stride, self.padding, self.dilation, self.groups)
        return topk.conv_topk(input, grad, *sliding, k, scale)

    def map_size(self, output: Tensor) -> Sequence[int]:
        return output.shape[2:]


class _Linear:
    """A linear layer's arithmetic."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = F.linear(input, weight, bias)
        # Of three dimensions it is a view, which nothing behind a Function may change in place.
        own: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return own

    def input_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return (grad.flatten(0, -2) @ weight).view(input.shape)

    def weight_grad(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return grad.flatten(0, -2).t() @ input.flatten(0, -2)

    def bias_grad(self, grad: Tensor) -> Tensor:
        return grad.flatten(0, -2).sum(0)

    def topk(
        self, grad: Tensor, input: Tensor, weight: Tensor, k: int, scale: float | None
    ) -> Tensor:
        return topk.linear_topk(input, grad, k, scale)

    def map_size(self, output: Tensor) -> Sequence[int]:
        return output.shape[1:-1]


_Arithmetic: TypeAlias = _Conv | _Linear
# From the output's gradient, the input (or one as large, if it was not kept) and the weight.
_Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor | None]


class _Approximated(torch.autograd.Function):
    """One layer whose weight gradient is ``rule``'s; ``weight`` is used as ``used``, its cast."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        used: Tensor,
        layer: _Arithmetic,
        rule: _Rule,
        keeps_input: bool,
    ) -> Tensor:
        ctx.layer, ctx.rule, ctx.dtype = layer, rule, weight.dtype
        ctx.save_for_backward(input if keeps_input else None, used)
        ctx.like = None if keeps_input else (input.shape, input.stride())
        return layer.forward(input, used, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        if input is None:  # its shape and strides choose the kernel; no one reads its values
            input = torch.empty_strided(*ctx.like, dtype=weight.dtype, device=weight.device)
        wanted = ctx.needs_input_grad
        grad_input = ctx.layer.input_grad(grad, input, weight) if wanted[0] else None
        grad_weight = ctx.rule(grad, input, weight) if wanted[1] else None
        if grad_weight is not None and (
            grad_weight.dtype != ctx.dtype or grad_weight.stride() != weight.stride()
        ):
            grad_weight = torch.empty_like(weight, dtype=ctx.dtype).copy_(grad_weight)
        grad_bias = ctx.layer.bias_grad(grad) if wanted[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _zero(layer: _Arithmetic, none: bool) -> _Rule:
    return lambda grad, input, weight: None if none else torch.zeros_like(weight)


def _random(layer: _Arithmetic, std: float | None) -> _Rule:
    def draw(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scale = 1 / max(len(input), 1) if std is None else std
        return torch.empty_like(weight, dtype=dtype).normal_(0, scale)

    return draw


def _topk(layer: _Arithmetic, k: int, scale: float | None) -> _Rule:
    def approximate(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        if k == math.prod(layer.map_size(grad)):
            return topk.scaled(layer.weight_grad(grad, input, weight), scale, grad.shape[0])
        return layer.topk(grad, input, weight, k, scale)

    return approximate


_RULES: dict[str, Callable[..., _Rule]] = {"zero": _zero, "random": _random, "topk": _topk}


def _run(
    method: str,
    layer: _Arithmetic,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a transform of torch.func (grad, vjp, vmap, jvp) reaches a layer with an approximated "
            "weight gradient: torch takes no autograd.Function inside an operator there. Use "
            "backward() or torch.autograd.grad, or give that transform the model itself"
        )
    if weight.is_complex():  # made in the forward of real parameters
        raise ValueError(f"a weight of {weight.dtype}: weight gradients other than Full() are real")
    device, used = input.device.type, weight
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        # F.linear asks whether the weight requires a gradient, and takes another kernel if not.
        used = weight.detach().to(dtype).requires_grad_(weight.requires_grad)
        input = input.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rule = _RULES[method](layer, **options)
    with torch.autocast(device, enabled=False):
        args = (input, weight, bias, used, layer, rule, method == "topk" and weight.requires_grad)
        output: Tensor = _Approximated.apply(*args)
    if method == "topk" and options["k"] > math.prod(layer.map_size(output)):
        raise ValueError(
            f"TopK(k={options['k']}) of a map of {tuple(layer.map_size(output))}, that is "
            f"{math.prod(layer.map_size(output))} positions: make k smaller, or give Full()"
        )
    return output


def _operator(method: str) -> Callable[..., Tensor]:
    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, *sliding: Any, **options: Any
    ) -> Tensor:
        layer = _Conv(*sliding) if sliding else _Linear()
        if input.dim() < weight.dim():  # without a batch dimension
            return _run(method, layer, input.unsqueeze(0), weight, bias, options).squeeze(0)
        return _run(method, layer, input, weight, bias, options)

    return run


def _register() -> dict[tuple[str, str], Any]:
    operators = {}
    for kind, layer in _LAYERS.items():
        for method, options in _METHODS.items():
            name = f"{kind}_{method}"
            _library.define(f"{name}({layer}, *, {options}) -> Tensor")
            _library.impl(name, _operator(method), "CompositeImplicitAutograd")
            operators[kind, method] = getattr(torch.ops.fxlocal, name).default
    return operators


OPERATORS = _register()  # by kind of layer and method
