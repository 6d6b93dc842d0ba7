"""How a layer's weight gradient is computed, and the mapping from layers to that.

Whatever the method, the forward, the gradient of the input and that of the bias stay exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, get_args

from ..errors import PlanError
from .checks import check_switches, is_number

__all__ = ["Full", "Random", "TopK", "WeightGrad", "WeightGrads", "Zero"]


@dataclass(frozen=True)
class Full:
    """The exact weight gradient: what a layer has that no method is given for."""


@dataclass(frozen=True)
class Zero:
    """No weight gradient is computed, and the layer's input is not kept for it.

    Source: gradient approximation, section 2.1, which leaves zeros.

    Args:
        none: leave ``.grad`` as it is, so None after ``zero_grad()``: the optimizer passes over
            the weight, and neither momentum nor weight decay moves it. By default the gradient is
            a tensor of zeros, and both do; data parallel training needs one.
    """

    none: bool = False

    def __post_init__(self) -> None:
        check_switches(self, "none")


@dataclass(frozen=True)
class Random:
    """Independent normal numbers of mean 0, drawn anew in every backward.

    They come from the default generator of the weight's device, so that ``torch.manual_seed``
    fixes them and a `Driver`'s checkpoint continues them.

    Source: gradient approximation, section 2.2.

    Args:
        std: their standard deviation; None for one by the number of samples in the batch, as in
            the paper.
    """

    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None and not (is_number(self.std) and self.std >= 0):
            raise PlanError(f"Random(std={self.std!r}): give a finite number from 0, or None")


@dataclass(frozen=True)
class TopK:
    """The weight gradient of each output channel's largest errors alone.

    Of the output's gradient dO, each sample and output channel keep the k positions where it is
    largest in size. Each kept value takes an equal share of what was dropped, so that they sum to
    what the channel did (gradient approximation, section 2.3, Algorithm 1, with k for its 1)::

        value = scale * (dO[position] + (sum of dO - sum of kept dO) / k)

    ``k`` = 1 is the paper's; a k of all positions gives the exact gradient, times ``scale``. The
    loss being a mean over the batch, the exact gradient divides by it already: ``scale=None`` is as
    much shorter as the batch is large.

    Where example inputs tell the shapes, a layer whose exact gradient is predicted to take no
    longer keeps that; `fxlocal.explain` names it.

    Args:
        k: positions kept per sample and output channel, from 1 to the size of the map (of a linear
            layer's input (B, *, I): the product of the dimensions between).
        scale: factor of the gradient; None for one by the number of samples in the batch, as in
            the paper.
        force: approximate even where that is predicted to be slower.
    """

    k: int = 1
    scale: float | None = 1.0
    force: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise PlanError(f"TopK(k={self.k!r}): give a whole number of positions from 1")
        if self.scale is not None and not is_number(self.scale):
            raise PlanError(
                f"TopK(scale={self.scale!r}): give a finite number, or None for 1 / batch"
            )
        check_switches(self, "force")


WeightGrad: TypeAlias = Full | Zero | Random | TopK


class WeightGrads(Mapping[str, WeightGrad]):
    """A mapping from module paths to methods that no one can change, and that has a hash.

    Raises:
        PlanError: if it is given something else.
    """

    def __init__(self, methods: Mapping[str, WeightGrad] | None = None) -> None:
        methods = {} if methods is None else methods
        if not isinstance(methods, Mapping):
            raise PlanError(
                f"weight_grads={methods!r}: give a mapping from module paths to methods, such as "
                "{'layer2.0.conv1': TopK(1)}"
            )
        for path, method in methods.items():
            if not isinstance(path, str):
                raise PlanError(f"weight_grads: {path!r} is no module path, which is a string")
            if type(method) not in get_args(WeightGrad):
                raise PlanError(
                    f"weight_grads[{path!r}]={method!r}: give Full(), Zero(), Random() or TopK(), "
                    "no subclass of one"
                )
        self._methods = dict(methods)
        self._hash = hash(frozenset(self._methods.items()))  # asked for in every step

    def __reduce__(self) -> tuple[type, tuple[dict[str, WeightGrad]]]:
        return WeightGrads, (self._methods,)  # in another process strings have other hashes

    def __getitem__(self, path: str) -> WeightGrad:
        return self._methods[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __eq__(self, other: object) -> bool:
        own = self._methods  # Mapping's own comparison copies both, in every step
        return own == (other._methods if isinstance(other, WeightGrads) else other)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self._methods)
