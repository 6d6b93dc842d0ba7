"""How the layers of a local prefix learn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..errors import PlanError
from .checks import check_amounts, check_switches

__all__ = ["Custom", "Freeze", "Hebbian", "LearningRule", "Oja", "Rule", "name_of"]


@dataclass(frozen=True, repr=False)
class _Step:
    rate: float = 1e-4
    relative: bool = False
    computed: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        _check_step(self)

    def __repr__(self) -> str:
        return _text_of(self)


def _check_step(rule: object) -> None:
    check_amounts(rule, "rate", "rate")
    check_switches(rule, "relative", "computed", "stochastic")


def _text_of(rule: object, **said: str) -> str:
    """Return the rule as Python; of the options that most do without, those that are on."""
    values = {name: repr(value) for name, value in vars(rule).items()} | said
    idle = [name for name in ("computed", "stochastic") if not getattr(rule, name)]
    shown = ", ".join(f"{name}={text}" for name, text in values.items() if name not in idle)
    return f"{type(rule).__name__}({shown})"


@dataclass(frozen=True, repr=False)
class Hebbian(_Step):
    """Move each weight of the prefix one normalised Hebbian step per forward.

    Equation (LoCal+SGD, Figure 1, eq. 3 and 4): ``W += rate * delta / ||delta||`` with
    ``delta`` the product of the layer's input and pre-activation output; see `fxlocal.ops.hebbian`.

    Args:
        rate: the L2 length of one step, in weight units; finite, not negative.
        relative: the step is ``rate * ||W||`` long instead, so that a rate means the same turn of
            the weight in every layer (ours, not the paper's).
        computed: where a layer computes its weight W (a parametrisation, a standardised or masked
            weight), move the parameters theta that it is computed from, by the transposed Jacobian
            of W times the step of W: ``theta += (dW / dtheta)^T step`` (ours). Without it such a
            layer is refused.
        stochastic: round weights narrower than float32 up or down at random, so that on average no
            step is lost. It draws from torch's generator: dropout behind it sees other numbers.
            Without it a rate whose steps rounding would lose is refused.
    """


@dataclass(frozen=True, repr=False)
class Oja(_Step):
    """Like `Hebbian`, with Oja's decay: each output forgets as much as it has learned.

    Equation (Oja 1982, eq. 3, summed over batch and positions): the delta of output o is
    ``sum of post[o] * (pre - post[o] * W[o])``, which turns W[o] to the first principal component
    of its inputs; then the step of `Hebbian`. See `fxlocal.ops.oja`.

    Args:
        rate: as in `Hebbian`.
        relative: as in `Hebbian`.
        computed: as in `Hebbian`.
        stochastic: as in `Hebbian`.
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
            small random tensors of each layer before anything is edited, an object on a copy of
            it; not a method, or a function that may keep something. What it keeps is called as it
            is, by a `Driver` too, and is part of no checkpoint.
        rate, relative, computed, stochastic: as in `Hebbian`.

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
    computed: bool = False
    stochastic: bool = False

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
        _check_step(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Custom":
        return self  # frozen; a copied function would be another one

    @property
    def name(self) -> str:
        """Module and name of the function, with the arguments that a partial binds."""
        return name_of(self.delta)

    def __repr__(self) -> str:  # a function's own repr has its address, which changes by the run
        return _text_of(self, delta=self.name)


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
