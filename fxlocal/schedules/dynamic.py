"""A boundary that moves when the transition layer has little left to learn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from ..errors import PlanError
from ..plan import Plan
from ..plan.checks import changed
from .base import Facts, Horizon
from .prefix import MovingPrefix, check_fraction, check_whole

__all__ = ["Dynamic"]


@dataclass(frozen=True)
class Dynamic(MovingPrefix):
    """A boundary that moves right when the transition layer's updates have become small.

    ``u`` is the update norm of an epoch: the L2 norm of the transition layer's weight change over
    it. After each epoch the boundary moves by ``shift`` where the rule holds::

        exponential    W = W + (1 - decay) * (u - W),  W = u at first;      u <= alpha * W
        window         W = mean of u over the K epochs before this one;     u <= alpha * W
                       and K epochs of the run, or since the move, lie before this one;
                       K = epochs / number of moves to ``largest``, rounded, at least 1

    "exponential" is LoCal+SGD, Frontiers 2022, Algorithm 1 (which leaves decay open); its average
    goes on over moves, though the layer that it is taken of changes. "window" is the ICLR 2021
    version's Algorithm 1 and eq. 2. As the text has it, an epoch that decides is not counted, so
    that decisions are K + 1 epochs apart and the window lies on the new transition layer alone.

    The number of moves is largest / shift, or that of the block edges up to ``largest``; with
    ``shift="block"`` K leaves an epoch to move after.

    The only state is ``update_norms``, one per finished epoch; the boundary follows from it.

    Args:
        epochs: the length of the run.
        average: "exponential" or "window".
        alpha: the fraction of the average to fall to, in (0, 1]; None for 0.5, of a window 0.95.
        shift: how far the boundary moves: "block", to the next block edge, or a fraction of the
            layers, in (0, 1), a layer at least; with ``align`` that is snapped down to a block
            edge, but moves by a block at least. None for 0.12, of a window "block".
        largest: the fraction of layers before the boundary at most, in (0, 1).
        decay: what the exponential average keeps per epoch, in [0, 1).
        rule, norm, rate_decay, align, update_every, refresh_every, weak_supervision: by keyword,
            as in `MovingPrefix`.

    Raises:
        PlanError: if a value is of the wrong type or out of range.

    Example:
        >>> class Facts:
        ...     layers, boundaries = tuple(range(20)), tuple(range(0, 20, 4))
        >>> schedule = Dynamic(epochs=6, alpha=0.5, shift=0.2)
        >>> for update_norm in (1.0, 0.9, 0.2, 0.8, 0.3):
        ...     schedule.end_epoch(Facts, update_norm)
        >>> [schedule.boundary(Facts, epoch) for epoch in range(6)]
        [0, 0, 0, 4, 4, 8]
    """

    epochs: int
    average: Literal["exponential", "window"] = "exponential"
    alpha: float | None = None
    shift: float | Literal["block"] | None = None
    largest: float = 0.75
    decay: float = 0.9
    update_norms: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _known: dict[Any, list[int]] = field(  # the boundaries that follow, by model
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs)
        if self.average not in ("exponential", "window"):
            raise PlanError(f"average={self.average!r}: give 'exponential' or 'window'")
        for name, value in _DEFAULTS[self.average].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.alpha is not None and self.shift is not None
        if self.alpha != 1 or isinstance(self.alpha, bool):
            check_fraction("alpha", self.alpha, "average update norm (or 1)")
        if self.shift != "block":
            check_fraction("shift", self.shift, 'layers (or "block")')
        check_fraction("largest", self.largest, "layers")
        check_fraction("decay", self.decay, "running average", zero=True)
        if self.average == "window" and (self._length or 0) >= self.epochs - 1 > 1:
            raise PlanError(
                f"average='window' over K = epochs * shift / largest = {self._length} epochs: of "
                f"{self.epochs} epochs none is left to move after. Give a smaller shift"
            )
        super().__post_init__()

    def end_epoch(self, analysis: Facts, update_norm: float, loss: float = math.nan) -> None:
        """Note the update norm of the epoch that ends."""
        self.update_norms.append(update_norm)

    def boundary(self, analysis: Facts, epoch: int) -> int:
        """Return the index of the transition layer in ``epoch``, from 0.

        An epoch past the next one, which depends on norms to come, has the next one's.
        """
        return self._history(analysis, epoch)[-1]

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``epoch``."""
        return self.plan_at(self._history(analysis, epoch), step)

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        return Horizon(period=self.period)

    def possible_plans(
        self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0
    ) -> Iterator[Plan]:
        """Yield the Plan of each boundary that may be reached from ``epoch`` on, rates decayed."""
        history, reached = self._history(analysis, epoch), -1
        for left in range(max(self.epochs - epoch, 1), 0, -1):  # it moves once an epoch at most
            if history[-1] == reached:
                break
            reached = history[-1]
            yield self.plan_at([*history, *[reached] * (left - 1)], step)
            history.append(self._moved(reached, analysis))

    def asked(self, analysis: Facts) -> Iterator[tuple[float, int]]:
        """Yield where each move would end without edges, and where it ends; last the farthest."""
        free, boundary, last = changed(self, align=False), 0, -1
        while boundary != last:
            last, boundary = boundary, self._moved(boundary, analysis)
            if boundary != last:
                yield free._moved(last, analysis), boundary
        yield self._most(len(analysis.layers)), boundary

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule has seen."""
        return {"update_norms": list(self.update_norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.update_norms[:] = state["update_norms"]
        self._known.clear()

    @property
    def _share(self) -> float | None:
        """The shift as a fraction of the layers; None where it is a block."""
        return None if isinstance(self.shift, str) else self.shift

    @property
    def _length(self) -> int | None:
        """K, the length of the window; None where it depends on the model."""
        share = self._share
        return None if share is None else max(1, round(self.epochs * share / self.largest))

    def _history(self, analysis: Facts, epoch: int) -> list[int]:
        """Return the boundary of each epoch up to this one, of those to come the next one's."""
        model = len(analysis.layers), analysis.boundaries
        if len(self._known.get(model, ())) != len(self.update_norms) + 1:
            self._known[model] = self._boundaries(analysis)
        known = self._known[model]
        return [*known[: epoch + 1], *known[-1:] * (epoch + 1 - len(known))]

    def _window(self, analysis: Facts) -> int:
        """Return K, the length of the window."""
        if self._length is not None:
            return self._length
        moves = len(self._edges_behind(0, analysis))
        return max(1, min(round(self.epochs / max(moves, 1)), self.epochs - 2))

    def _boundaries(self, analysis: Facts) -> list[int]:
        """Return the boundary of each finished epoch and of the next one."""
        assert self.alpha is not None  # since __post_init__
        if self.average == "exponential":
            moves = _exponential(self.update_norms, self.alpha, self.decay)
        else:
            moves = _window(self.update_norms, self.alpha, self._window(analysis))
        boundaries = [0]
        for small in moves:
            last = boundaries[-1]
            boundaries.append(self._moved(last, analysis) if small else last)
        return boundaries

    def _most(self, num_layers: int) -> int:
        return min(math.floor(self.largest * num_layers + 1e-9), num_layers - 1)

    def _edges_behind(self, boundary: int, analysis: Facts) -> list[int]:
        """Return the block edges that are still to come."""
        most = self._most(len(analysis.layers))
        edges = self.edges(analysis) if most > 0 else ()  # else too few layers for any
        return [edge for edge in edges if boundary < edge <= most]

    def _moved(self, boundary: int, analysis: Facts) -> int:
        num_layers = len(analysis.layers)
        if self._share is None:
            return min(self._edges_behind(boundary, analysis), default=boundary)
        target = boundary + max(1, math.floor(self._share * num_layers + 1e-9))
        most = self._most(num_layers)
        if not self.align or most < 1:
            return max(boundary, min(target, most))
        edges = self._edges_behind(boundary, analysis)
        return max([edge for edge in edges if edge <= target], default=min(edges, default=boundary))


_DEFAULTS: dict[str, dict[str, float | str]] = {
    "exponential": {"alpha": 0.5, "shift": 0.12},
    "window": {"alpha": 0.95, "shift": "block"},
}


def _exponential(norms: Sequence[float], alpha: float, decay: float) -> Iterator[bool]:
    average: float | None = None
    for norm in norms:
        rest = norm if average is None else average
        average = rest + (1 - decay) * (norm - rest)
        yield norm <= alpha * average


def _window(norms: Sequence[float], alpha: float, length: int) -> Iterator[bool]:
    waited = 0  # e_k of the text, which checks it before it counts
    for epoch, norm in enumerate(norms):
        small = waited >= length and norm <= alpha * fmean(norms[epoch - length : epoch])
        waited = 0 if small else waited + 1
        yield small
