"""What the graph of local modules computes: immediate backward, shared layers, checks.

Equations 4 to 7 of BackLink: in the layers that two modules share, the errors of both are weighted
and their gradients add up. Read literally, each block weights the error anew, which the layers
below get too; or each parameter's gradient is weighted, once, which leaves the error as it is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .custom import for_trial

__all__ = [
    "TARGET",
    "ModuleLoss",
    "backward",
    "call_again",
    "call_weighted",
    "combine_losses",
    "keep_gradients",
    "let_backward_compile",
    "require_target",
    "weight_gradient",
]

TARGET = "target"  # the input that a network with local modules has besides its model's


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float, copied: bool) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)  # no gradient stays none
        return value.clone() if copied else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        return None if gradient is None else gradient * ctx.weight, None, None


def weight_gradient(value: Any, weight: float, copied: bool = False) -> Any:
    """Return ``value``; the gradients of the tensors in it are multiplied by ``weight``.

    What changes in place must be ``copied``: autograd allows no such change of the view that is
    returned else.
    """
    if isinstance(value, Tensor):
        return _WeightGradient.apply(value, weight, copied)
    weighted = partial(weight_gradient, weight=weight, copied=copied)
    return pytree.tree_map_only(Tensor, weighted, value)


def call_weighted(module: nn.Module, weight: float, /, *args: Any, **kwargs: Any) -> Any:
    """Call ``module``; the gradients of its parameters are multiplied by ``weight``."""
    state = {name: weight_gradient(p, weight) for name, p in module.named_parameters()}
    return torch.func.functional_call(module, state, args, kwargs)


def call_again(module: nn.Module, weight: float | None, /, *args: Any, **kwargs: Any) -> Any:
    """Call ``module`` on copies of its buffers, so that no running statistics move.

    The gradients of its parameters are multiplied by ``weight``, if there is one.
    """
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if weight is not None:
        state |= {name: weight_gradient(p, weight) for name, p in module.named_parameters()}
    return torch.func.functional_call(module, state, args, kwargs)


def backward(loss: Tensor, scale: Tensor) -> None:
    """Back-propagate ``scale * loss`` into ``.grad`` at once, and free what was kept for it.

    Nothing happens without gradient: under `torch.no_grad`, or if nothing before it learns.
    """
    if loss.requires_grad:
        with torch.autocast(loss.device.type, enabled=False):  # the forward's, not the backward's
            loss.backward(scale.to(loss.dtype))  # type: ignore[no-untyped-call]


def keep_gradients(loss: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return ``loss``, the last module's, whose backward refuses if others' gradients are gone.

    They are in ``.grad`` when the forward returns; an earlier module has back-propagated into
    ``parameter``. Under `torch.compile` nothing is checked.
    """
    if torch.compiler.is_compiling() or not loss.requires_grad or parameter.grad is None:
        return loss

    def refuse_cleared(gradient: Tensor) -> None:
        if parameter.grad is None:
            raise RuntimeError(
                "the gradients of the earlier local modules, which the forward left in .grad, were "
                "cleared before loss.backward(): call optimizer.zero_grad() before the forward, or "
                "after optimizer.step()"
            )

    loss.register_hook(refuse_cleared)  # type: ignore[no-untyped-call]
    return loss


def combine_losses(
    loss: Tensor, decoded: Tensor, image: Tensor, classification: float, reconstruction: float
) -> Tensor:
    """Return InfoPro's loss: the local loss, and how far ``decoded`` is from ``image``.

    Args:
        loss: scalar.
        decoded: the decoder's output, shape (B, C, H, W).
        image: the model's input, of that shape.
        classification: weight of the loss.
        reconstruction: weight of the mean squared error.
    """
    error = F.mse_loss(decoded, image.detach().to(decoded.dtype))
    return classification * loss + reconstruction * error


class ModuleLoss(nn.Module):
    """A user's loss, a function (output, target) -> scalar."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        super().__init__()
        # object.__setattr__: parameters of a loss are no part of the network's state.
        object.__setattr__(self, "function", function)
        self.tried: set[Any] = set()

    def refuse_no_scalar(self, scores: tuple[int, ...], device: torch.device, target: Any) -> None:
        """Try the loss on the shapes of scores and target, without data, once for each.

        One that `for_trial` has nothing for is not. What else goes wrong with such tensors says
        nothing about true ones.

        Raises:
            ValueError: if it is no scalar.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]
        key = (scores, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if torch.compiler.is_compiling() or key in self.tried:
            return
        self.tried.add(key)
        if (function := for_trial(self.function)) is None:
            return
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            output = torch.empty(scores, device=device)
            fakes = pytree.tree_map_only(Tensor, _fake_like, target)
            try:
                _refuse_no_scalar(self.function, function(output, fakes))
            except _NoScalarError:
                raise
            except Exception:  # whatever the user's function raises where there are no data
                return

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the loss; a ValueError if it is no scalar."""
        return _refuse_no_scalar(self.function, self.function(output, target))  # type: ignore[operator]


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class _NoScalarError(ValueError):
    pass


def _refuse_no_scalar(function: Any, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise _NoScalarError(
            f"the loss {function!r} returned {given}: local modules need a scalar, such as "
            "loss.mean()"
        )
    return loss


def require_target(
    target: Any,
    first_input: Any,
    example: tuple[int, ...],
    scores: tuple[int, ...],
    loss: Any = None,
) -> None:
    """Check a target before anything is computed from it.

    Args:
        target: as it was given.
        first_input: of the model.
        example: its shape in the example; empty if it is no tensor.
        scores: shape of the model's output for the example.
        loss: None for the cross-entropy, whose targets are known: labels of shape (B, ...) or
            probabilities of the scores' shape (B, C, ...); else the `ModuleLoss`.

    Raises:
        ValueError: if there is none, or it does not fit.
    """
    if target is None:
        raise ValueError(
            "no target: a network with local modules takes one while it trains, net(x, target), "
            "and returns (output, loss)"
        )
    if loss is None and not isinstance(target, Tensor):
        raise ValueError(f"a target of {type(target).__name__}: the cross-entropy needs a tensor")
    # Of other inputs the sizes of the scores are not known.
    if example[:1] != scores[:1] or first_input.shape[1:] != example[1:]:
        return
    expected = (first_input.shape[0], *scores[1:])
    if loss is not None:
        loss.refuse_no_scalar(expected, first_input.device, target)
        return
    wanted = expected if target.is_floating_point() else (expected[0], *scores[2:])
    if target.shape != wanted:
        kind = "probabilities" if target.is_floating_point() else "labels"
        raise ValueError(
            f"a target of shape {tuple(target.shape)}: the cross-entropy of scores {expected} "
            f"needs {kind} of shape {wanted}"
        )


def let_backward_compile() -> bool:
    """Let `torch.compile` trace the backward inside a forward; return whether it can.

    It can where Dynamo has a setting for it, which is one for the whole process. Without it such a
    backward is a graph break, so nothing that compiled before stops doing so.
    """
    import torch._dynamo  # takes a second, which a training loop pays anyway

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return False
    torch._dynamo.config.trace_autograd_ops = True
    return True
