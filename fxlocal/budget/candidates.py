"""Enumerate Plans over the block edges of a model, each with what it is predicted to take.

There is no solver: every block edge is tried as a boundary of each kind of prefix, and what lies
behind it is kept as it is, checkpointed for each of a few peaks, or split into local modules.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from ..compiler.analysis import Analysis
from ..compiler.split import find_units
from ..errors import PlanError
from ..plan import Checkpoint, Freeze, Hebbian, LinearHead, LocalModules, LocalPrefix, Plan
from .memory import KeptBytes
from .times import BlockTime

__all__ = ["PREFIXES", "Candidate", "Times", "find_candidates", "prefix_of"]

_LEVELS = 24  # equal steps of plain training's bytes, for each of which stages are sought
_PARTS = (1.0, 0.98, 0.95)  # of a budget likewise: a prediction may be a little below
_COUNTS = (2, 3, 4, 6, 8, 12, 16)  # of local modules
_NORMS: dict[str, Literal["train", "eval"]] = {"freeze-eval": "eval"}
PREFIXES = ("freeze-eval", "freeze", "local")


@dataclass(frozen=True)
class Candidate:
    """A Plan and what it is predicted to take.

    Attributes:
        plan: the Plan.
        changed: how many layers have no exact gradient: those of a prefix, and of all local
            modules but the last. Of a prefix with ``norm="eval"`` the others see running statistics
            in place of the batch's.
        peak_bytes: the most that a step keeps at a time.
        time: of a step's forward and backward, as a fraction of plain training's.
    """

    plan: Plan
    changed: int
    peak_bytes: int
    time: float

    @property
    def exact(self) -> bool:
        """Whether all gradients are those of plain training."""
        return not self.changed


@dataclass(frozen=True)
class Times:
    """What the blocks of a model take: back-propagated, and in a prefix of each kind."""

    trained: Sequence[BlockTime]
    prefixes: Mapping[str, Sequence[BlockTime]]

    def of(self, boundary: int = 0, prefix: str = "", again: int = 0) -> float:
        """Return the seconds of a step.

        Args:
            boundary: index of the first block that is back-propagated.
            prefix: kind of what lies before it.
            again: index of the first block, from the boundary on, that is not computed twice.
        """
        before = self.prefixes[prefix][:boundary] if boundary else ()
        behind = self.trained[boundary:]
        total = sum(block.forward for block in (*before, *behind, *self.trained[boundary:again]))
        return total + behind[0].first_backward + sum(block.backward for block in behind[1:])


def prefix_of(kind: str, until: str | int) -> LocalPrefix:
    """Return a prefix of one of `PREFIXES`."""
    rule = Hebbian() if kind == "local" else Freeze()
    return LocalPrefix(until, rule, _NORMS.get(kind, "train"))


def find_candidates(
    kept: KeptBytes, times: Times, limit: float, num_classes: int | None
) -> Iterator[Candidate]:
    """Yield plain training, then every other Plan.

    Args:
        kept: of the model.
        times: of its blocks.
        limit: bytes that stages are also sought for; infinity for none.
        num_classes: of a classifier, whose heads local modules get; None for no local modules.
    """
    analysis, whole = kept.analysis, times.of()
    names = {k: _name(analysis, k) for k in range(len(analysis.blocks))}
    edges = [k for k in find_units(analysis, several=True) if names[k]]
    heads = [k for k in find_units(analysis) if names[k]] if num_classes is not None else []
    firsts = [block.layers[0] for block in analysis.blocks]
    levels = [kept.plain(0) * k / _LEVELS for k in range(1, _LEVELS)]
    if limit < math.inf:
        levels += [limit * part for part in _PARTS]
    for boundary, name in names.items():
        if name is None or (boundary and not times.prefixes):
            continue
        plans = [(Plan(), firsts[boundary], kept.plain(boundary), 0)]
        behind = [k for k in edges if k > boundary]
        for starts in {kept.find_stages(boundary, behind, level): None for level in levels}:
            if starts:
                told = tuple(str(names[k]) for k in starts)
                plan = Plan(checkpoint=Checkpoint(len(told) + 1, told))
                peak = kept.checkpointed(boundary, starts)
                plans.append((plan, firsts[boundary], peak, starts[-1]))
        for starts in _find_modules(kept, boundary, [k for k in heads if k > boundary]):
            told, head = tuple(str(names[k]) for k in starts), LinearHead(pool=1)
            modules = LocalModules(len(told) + 1, head=head, num_classes=num_classes, balance=told)
            peak = kept.modules(boundary, starts)
            plans.append((Plan(modules=modules), firsts[starts[-1]], peak, 0))
        for kind in times.prefixes if boundary else ("",):
            local = prefix_of(kind, name) if boundary else None
            for plan, changed, peak, again in plans:
                taken = times.of(boundary, kind, again) / whole
                yield Candidate(replace(plan, local=local), changed, peak, taken)


def _find_modules(kept: KeptBytes, boundary: int, edges: Sequence[int]) -> list[tuple[int, ...]]:
    """Return at which edges local modules of about equal memory may begin, but for the first."""
    sums = [0, *accumulate(kept.per_block)]
    found = dict[tuple[int, ...], None]()
    for count in _COUNTS if edges else ():
        total = sums[-1] - sums[boundary]
        wanted = [sums[boundary] + total * i / count for i in range(1, count)]
        starts = {min(edges, key=lambda k: abs(sums[k] - want)) for want in wanted}
        found[tuple(sorted(starts))] = None
    return list(found)


def _name(analysis: Analysis, block: int) -> str | None:
    """Return what means the block's first layer in a Plan; None if nothing does."""
    first = analysis.blocks[block].layers[0]
    for name in (analysis.blocks[block].name, analysis.layers[first].path):
        try:
            if analysis.boundary(name) == first:
                return name
        except PlanError:  # it means two places
            continue
    return None
