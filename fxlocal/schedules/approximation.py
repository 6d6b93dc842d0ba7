"""Which convolutions' weight gradients are approximated, in which steps and on which ranks.

Source: gradient approximation, section 2.5 and Figure 3 (a table of layers and batches), section 3
and 3.4 (the schedules of its experiments). ``ranks`` is the third axis that its section 5 asks for.

Convolutions are those of ``analysis.layers`` in execution order, counted from 0; steps and ranks
count from 0 too, and the step begins again with every epoch. A module that is called twice counts
once, where it is called first. A convolution whose weight is computed has no weight gradient to
approximate and is not counted. A layer with the method `Full` is left out of the Plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..errors import PlanError, nearest
from ..plan import Full, Plan, WeightGrad
from .base import Facts, Horizon

__all__ = ["NAMED", "Approximation", "Table"]

_METHODS = "give Full(), Zero(), Random() or TopK()"

_NAMED = {
    "schedule-1": (slice(1, None, 4), slice(None)),
    "schedule-2": (slice(1, None, 2), slice(None, None, 2)),
    "schedule-3": (slice(0, None), slice(None, None, 4)),
    "schedule-3-but-first": (slice(1, None), slice(None, None, 4)),
    "cnn2": (slice(1, 2), slice(None, None, 2)),
}
NAMED = tuple(_NAMED)


@dataclass(frozen=True)
class Approximation:
    """One method for some convolutions, in some steps and on some ranks.

    The first convolution is never approximated unless asked for: ``layers`` begins at the second
    one where its start is None. ``slice(None)`` is all but the first, ``slice(0, None)`` all.

    Args:
        method: how the weight gradient is computed: `Zero`, `Random`, `TopK` or `Full`.
        layers: which convolutions; negative ends count from the last one.
        batches: which of the endless steps 0, 1, 2, ... of an epoch.
        ranks: which of the endless ranks 0, 1, 2, ...

    Raises:
        PlanError: if the method is none, or a slice is none, counts backwards, or, of steps and
            ranks, has a negative end or selects nothing; from `plan`, if ``layers`` selects no
            convolution of the model.

    Example:
        >>> import fxlocal
        >>> from torch import nn
        >>> model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6)))
        >>> schedule = Approximation(fxlocal.Zero(), batches=slice(None, None, 2))
        >>> [schedule.plan(fxlocal.analyze(model), epoch=0, step=step) for step in range(2)]
        [Plan(weight_grads={'1': Zero(none=False), '5': Zero(none=False)}), Plan()]
    """

    method: WeightGrad
    # Before Python 3.12 a slice has no hash: none can be a plain default, nor count in one.
    layers: slice = field(default_factory=partial(slice, 1, None, 4), hash=False)
    batches: slice = field(default_factory=partial(slice, None), hash=False)
    ranks: slice = field(default_factory=partial(slice, None), hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, WeightGrad):
            raise PlanError(f"method={self.method!r}: {_METHODS}")
        _check_slice("layers", self.layers)
        _check_slice("batches", self.batches, "steps")
        _check_slice("ranks", self.ranks, "ranks")

    @classmethod
    def named(cls, name: str, method: WeightGrad) -> "Approximation":
        """Return a schedule of the paper's experiments.

        | name | approximates |
        |---|---|
        | ``schedule-1`` | every fourth convolution from the second on, in every step |
        | ``schedule-2`` | every other convolution from the second on, in every other step |
        | ``schedule-3`` | every convolution in every fourth step |
        | ``schedule-3-but-first`` | the same from the second convolution on |
        | ``cnn2`` | the second convolution in every other step: its CNN has two |

        Each approximates a quarter of the cells of layers and steps, less what leaving out the
        first convolution takes: section 3 does so in its first schedule, since approximating that
        layer "is difficult", section 3.4 says "every layer" of the third. Which layers the second
        begins with, and each with which steps, the text leaves open; here with the second
        convolution, and the first step of an epoch.

        Raises:
            PlanError: if there is no such name, or the method is none.
        """
        if name not in NAMED:
            raise PlanError(f"no schedule is named {name!r}. Nearest: {nearest(str(name), NAMED)}")
        layers, batches = _NAMED[name]
        return cls(method, layers, batches)

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``step`` on ``rank``, the same in every epoch."""
        paths, chosen = _conv_paths(analysis), self.layers
        start = 1 if chosen.start is None else chosen.start
        selected = paths[start : chosen.stop : chosen.step]
        if not selected:
            raise PlanError(
                f"layers={chosen!r} selects none of the model's {len(paths)} convolutions, which "
                "count from 0; without a start a slice begins at 1. Print them with "
                "fxlocal.analyze(model)"
            )
        if not (_holds(self.batches, step) and _holds(self.ranks, rank)):
            return Plan()
        return _plan_of(dict.fromkeys(selected, self.method))

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        start, stop, step = self.batches.start, self.batches.stop, self.batches.step
        return Horizon(start=start or 0 if stop is None else stop, period=step or 1)


@dataclass(frozen=True)
class Table:
    """A method for each convolution and step (gradient approximation, Figure 3).

    Tables that differ by rank are joined with `combine`.

    Args:
        cells: one row per convolution, from the first one on; each a method per step, which
            repeats when the row ends. Convolutions without a row have exact gradients.
        ranks: which of the endless ranks 0, 1, 2, ...; the others have exact gradients.

    Raises:
        PlanError: if there are no cells, rows differ in length, a cell is no method or a slice is
            none; from `plan`, if there are more rows than convolutions in the model.

    Example:
        >>> import fxlocal
        >>> from fxlocal import Full, Zero
        >>> from torch import nn
        >>> analysis = fxlocal.analyze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
        >>> table = Table([[Full(), Full()], [Zero(), Full()]])
        >>> [table.plan(analysis, epoch=0, step=step) for step in range(2)]
        [Plan(weight_grads={'1': Zero(none=False)}), Plan()]
        >>> table.plan(analysis, epoch=0, step=2) == table.plan(analysis, epoch=0, step=0)
        True
    """

    cells: Sequence[Sequence[WeightGrad]]
    ranks: slice = field(default_factory=partial(slice, None), hash=False)

    def __post_init__(self) -> None:
        try:
            cells = tuple(tuple(row) for row in self.cells)
        except TypeError:
            raise PlanError(
                f"cells={self.cells!r}: give a sequence of rows, one per convolution, each a "
                "sequence of methods, one per step"
            ) from None
        object.__setattr__(self, "cells", cells)
        if not cells or not cells[0]:
            raise PlanError(f"cells={cells!r}: give at least one row of at least one method")
        for number, row in enumerate(cells):
            if len(row) != len(cells[0]):
                raise PlanError(
                    f"cells: row {number} has {len(row)} steps, row 0 has {len(cells[0])}: give "
                    "every row as many (rows count from 0)"
                )
            for column, method in enumerate(row):
                if not isinstance(method, WeightGrad):
                    raise PlanError(
                        f"cells: row {number}, column {column} (from 0) is {method!r}: {_METHODS}"
                    )
        _check_slice("ranks", self.ranks, "ranks")

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``step`` on ``rank``, the same in every epoch."""
        paths = _conv_paths(analysis)
        if len(self.cells) > len(paths):
            raise PlanError(
                f"the table has {len(self.cells)} rows, the model {len(paths)} convolutions: give "
                "at most one row for each. Print them with fxlocal.analyze(model)"
            )
        if not _holds(self.ranks, rank):
            return Plan()
        column = step % len(self.cells[0])
        rows = zip(paths, self.cells, strict=False)
        return _plan_of({path: row[column] for path, row in rows})

    def horizon(self) -> Horizon:
        """Return how far the schedule has to be followed until no new Plan comes."""
        return Horizon(period=len(self.cells[0]))


def _conv_paths(analysis: Facts) -> tuple[str, ...]:
    """Return the path of each convolution that has a weight of its own, in execution order."""
    convs = (one for one in analysis.layers if one.kind == "conv" and one.weight is not None)
    return tuple(dict.fromkeys(conv.path for conv in convs))


def _plan_of(methods: Mapping[str, WeightGrad]) -> Plan:
    inexact = {path: method for path, method in methods.items() if not isinstance(method, Full)}
    return Plan(weight_grads=inexact)


def _holds(chosen: slice, number: int) -> bool:
    """Tell whether that slice of 0, 1, 2, ... without end holds ``number``."""
    return number in range(number + 1)[chosen]


def _check_slice(name: str, chosen: slice, endless: str = "") -> None:
    """Refuse what is no slice, and of ``endless`` things one from their end or of none."""
    if not isinstance(chosen, slice):
        raise PlanError(f"{name}={chosen!r}: give a slice, such as slice(1, None, 4)")
    for part in (chosen.start, chosen.stop, chosen.step):
        if part is not None and (isinstance(part, bool) or not isinstance(part, int)):
            raise PlanError(f"{name}={chosen!r}: {part!r} is no whole number")
    if chosen.step is not None and chosen.step < 1:
        raise PlanError(f"{name}={chosen!r}: give a step from 1")
    start, stop = chosen.start or 0, chosen.stop
    if endless and (start < 0 or (stop is not None and stop < 0)):
        raise PlanError(
            f"{name}={chosen!r}: {endless} have no end to count back from: give numbers from 0"
        )
    if endless and stop is not None and stop <= start:
        raise PlanError(f"{name}={chosen!r}: selects no {endless}")
