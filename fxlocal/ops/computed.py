"""A step of a weight that is computed, taken back to the parameters that it is computed from.

Equation (ours), for a weight W = f(theta) and its step s, `fxlocal.ops.hebbian.normalised_step`::

    theta += (dW / dtheta)^T s

One vector-Jacobian product by autograd, whatever the grad mode around it. f is computed again for
it: the forward keeps nothing. `torch.compile` looks through that of `torch.func`, which in turn
refuses to run under hooks on saved tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bind_parametrization", "bind_pull_back"]


def bind_pull_back(compute: Callable[..., Tensor], count: int) -> Callable[..., Any]:
    """Return ``pull_back(step, *given)``: the steps of the first ``count`` that are given.

    ``compute(*given)`` returns the weight.
    """

    def pull_back(step: Tensor, *given: Any) -> Any:
        fixed = given[count:]
        moved = [parameter.detach() for parameter in given[:count]]
        if torch.compiler.is_compiling():
            done: Any = torch.func.vjp(lambda *moved: compute(*moved, *fixed), *moved)
            return done[1](step.to(done[0].dtype))
        # Under hooks of its own: others would offload, or count as kept, what is gone at once.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            weight = compute(*(parameter.requires_grad_() for parameter in moved), *fixed)
            options = {"allow_unused": True, "materialize_grads": True}
            return torch.autograd.grad(weight, moved, step.to(weight.dtype), **options)

    return pull_back


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def bind_parametrization(names: Sequence[str], still: bool) -> Callable[..., Tensor]:
    """Return ``parametrization(*parameters, module)``, which computes what ``module`` would.

    Args:
        names: of the parameters, in the module.
        still: compute it as in evaluation mode: spectral norm's iteration has been made.
    """

    def parametrization(*given: Any) -> Tensor:
        *parameters, module = given
        training = [part for part in module.modules() if still and part.training]
        for part in training:
            part.training = False
        try:
            return _call(module, dict(zip(names, parameters, strict=True)))
        finally:
            for part in training:
                part.training = True

    return parametrization


def _call(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    weight: Tensor = torch.func.functional_call(module, parameters, ())
    return weight
