"""How the layers of a local prefix learn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..errors import PlanError
from .checks import check_amounts, check_switches

__all__ = ["Custom", "Freeze", "Hebbian", "LearningRule", "Oja", "Rule", "name_of"]


@dataclass(frozen=True)
class _Step:
    rate: float = 1e-4
    relative: bool = False

    def __post_init__(self) -> None:
        check_amounts(self, "rate", "rate")
        check_switches(self, "relative")


@dataclass(frozen=True)
class Hebbian(_Step):
    """Move each weight of the prefix one normalised Hebbian step per forward.

    Equation (LoCal+SGD, Figure 1, eq. 3 and 4): ``W += rate * delta / ||delta||`` with
    ``delta`` the product of the layer's input and pre-activation output; see `fxlocal.ops.hebbian`.

    Args:
        rate: the L2 length of one step, in weight units; finite, not negative.
        relative: the step is ``rate * ||W||`` long instead, so that a rate means the same turn of
            the weight in every layer (ours, not the paper's).
    """


@dataclass(frozen=True)
class Oja(_Step):
    """Like `Hebbian`, with Oja's decay: each output forgets as much as it has learned.

    Equation (Oja 1982, eq. 3, summed over batch and positions): the delta of output o is
    ``sum of post[o] * (pre - post[o] * W[o])``, which turns W[o] to the first principal component
    of its inputs; then the step of `Hebbian`. See `fxlocal.ops.oja`.

    Args:
        rate: as in `Hebbian`.
        relative: as in `Hebbian`.
    """


@dataclass(frozen=True)
class Custom:
    """A rule of your own: a function ``(weight, pre, post) -> delta``; the step is `Hebbian`'s.

    The function gets each layer's weight, input and pre-activation output, without gradient, and
    returns a delta of the weight's shape. If it also takes ``product``, it gets a function
    ``product(pre, post)`` that correlates any two tensors of these shapes as the layer's weight
    gradient would: with its stride, padding and groups, for a linear layer as for a convolution.
    A delta that is not finite moves nothing; a `Driver` warns of it when the epoch ends.

    Args:
        delta: the function, hashable; it must change none of the tensors that it gets. Tried on
            small random tensors of each layer before anything is edited.
        rate: as in `Hebbian`.
        relative: as in `Hebbian`.

    Example:
        >>> def covariance(weight, pre, post, product):
        ...     centred = post - post.mean(0, keepdim=True)
        ...     return product(pre, centred)
        >>> from fxlocal import LocalPrefix
        >>> LocalPrefix(until=3, rule=Custom(covariance, rate=1e-3)).rule.rate
        0.001
    """

    delta: Callable[..., Any]
    rate: float = 1e-4
    relative: bool = False

    def __post_init__(self) -> None:
        if not callable(self.delta):
            raise PlanError(
                f"Custom(delta={self.delta!r}): give a function (weight, pre, post) -> delta"
            )
        try:
            hash(self.delta)
        except TypeError as error:
            raise PlanError(
                f"Custom(delta={self.name}): {error}, and a Plan has to be hashable: give a "
                "function, or make its class a frozen dataclass"
            ) from None
        check_amounts(self, "rate", "rate")
        check_switches(self, "relative")

    @property
    def name(self) -> str:
        """Module and name of the function, with the arguments that a partial binds."""
        return name_of(self.delta)

    def __repr__(self) -> str:  # a function's own repr has its address, which changes by the run
        return f"Custom(delta={self.name}, rate={self.rate!r}, relative={self.relative!r})"


@dataclass(frozen=True)
class Freeze:
    """Leave each weight of the prefix as it is: the baseline that a local rule has to beat."""


LearningRule: TypeAlias = Hebbian | Oja | Custom
Rule: TypeAlias = LearningRule | Freeze


def name_of(value: Any) -> str:
    """Return a text that tells ``value`` from others and holds no address."""
    if isinstance(value, partial):
        named = [f"{name}={name_of(argument)}" for name, argument in value.keywords.items()]
        parts = [name_of(value.func), *map(name_of, value.args), *named]
        return f"functools.partial({', '.join(parts)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind: Any = type(value)
    plain = kind.__repr__ is object.__repr__
    return f"{kind.__module__}.{kind.__qualname__}" if plain else repr(value)
