"""Stochastic depth: residual blocks that are left out at random while a network trains."""

from dataclasses import dataclass
from typing import Literal

from ..errors import PlanError
from .checks import check_counts, check_switches, is_number

__all__ = ["StochasticDepth"]


@dataclass(frozen=True)
class StochasticDepth:
    """Compute residual blocks for some rows of a batch, or in some steps, alone.

    A block that is left out passes on its shortcut, identity or projection. What is computed is
    divided by the share that survives, so that the mean of a block's sum over many draws is its
    sum without dropping, and evaluation is the model's own (Huang et al., "Deep networks with
    stochastic depth", 2016, which scales in evaluation instead).

    Args:
        rate: share that the last block is left out by, in [0, 1).
        mode: ``"row"`` leaves each block out for other rows of the batch, drawn anew in each step:
            ``round(survival * batch)`` of them are computed, halves rounded up. ``"block"`` leaves
            it out for the whole batch, as the paper does; it is drawn on the host from ``seed``
            and the step, the same on every rank.
        curve: ``"linear"``: block l of L is left out by ``l / L * rate`` (eq. 4 of the paper);
            ``"uniform"``: each by ``rate``.
        replace: compute what the model's own DropPath or ``stochastic_depth`` would multiply by
            zero no more, with its own rates and distribution; ``rate`` and ``curve`` are not used.
        seed: of the draws by block.

    Raises:
        PlanError: if a value is of the wrong type or out of range, or ``replace`` is asked of
            blocks, which such layers do not leave out.
    """

    rate: float = 0.5
    mode: Literal["row", "block"] = "row"
    curve: Literal["linear", "uniform"] = "linear"
    replace: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_number(self.rate) and 0 <= self.rate < 1):
            raise PlanError(f"StochasticDepth(rate={self.rate!r}): give a number in [0, 1)")
        for name, known in (("mode", ("row", "block")), ("curve", ("linear", "uniform"))):
            if (value := getattr(self, name)) not in known:
                wanted = " or ".join(map(repr, known))
                raise PlanError(f"StochasticDepth({name}={value!r}): give {wanted}")
        check_switches(self, "replace")
        check_counts(self, "seed", least=0)
        if self.replace and self.mode == "block":
            raise PlanError(
                "StochasticDepth(mode='block', replace=True): a model's own DropPath leaves out "
                "rows; give mode='row', or build the model without it"
            )

    def survivals(self, count: int) -> tuple[float, ...]:
        """Return the share by which each of ``count`` blocks survives, in execution order."""
        if self.curve == "uniform":
            return (1 - self.rate,) * count
        return tuple(1 - block / count * self.rate for block in range(1, count + 1))
