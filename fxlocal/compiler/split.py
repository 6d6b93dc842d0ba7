"""Split a model's blocks into stages of equal memory, number or time.

Stages are the local modules of a network, or what is computed again by checkpointing.

The units are the analysis' blocks. A classifier that is one linear layer, and the only linear
block, counts with the block before it: it does for the last module what a head does for others.
A block at whose edge several values cross counts with those before it too, where the stages are
local modules: a head takes one.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from operator import itemgetter

from ..errors import PlanError
from ..facts import StageBoundary
from ..plan import Checkpoint, LocalModules
from .analysis import Analysis

__all__ = ["find_split", "find_stage_boundaries", "find_units"]


def find_units(analysis: Analysis, *, several: bool = False) -> tuple[int, ...]:
    """Return the index of the first block of each unit that a split may not part.

    With ``several``, more than one value may cross where it begins.
    """
    units = _find_starts(analysis, several)
    parts = [analysis.blocks[a:b] for a, b in pairwise([*units, len(analysis.blocks)])]
    layers = [[analysis.layers[i] for block in part for i in block.layers] for part in parts]
    linear = [all(layer.kind == "linear" for layer in part) for part in layers]
    joined = len(units) > 1 and sum(linear) == 1 and linear[-1] and len(layers[-1]) == 1
    return units[:-1] if joined else units


def _find_starts(analysis: Analysis, several: bool) -> tuple[int, ...]:
    """Return the blocks at whose edge what crosses may be parted, and the first one."""
    blocks = enumerate(analysis.blocks)
    return tuple(i for i, block in blocks if not i or several or len(block.values) == 1)


def find_split(analysis: Analysis, stages: LocalModules | Checkpoint) -> tuple[int, ...]:
    """Return the index of the first block of each stage.

    Raises:
        PlanError: if there are fewer blocks than stages, a name is none of a block in order, a
            module is shorter than the link, or the costs are not known.
    """
    several = isinstance(stages, Checkpoint)
    starts, units = _find_starts(analysis, several), find_units(analysis, several=several)
    count, link = stages.count, getattr(stages, "link", 0)
    what = f"{type(stages).__name__}(count={count}{f', link={link}' if link else ''})"
    found = _described(analysis, starts, len(units))
    if count > len(units):
        raise PlanError(f"{what}: the model has {found}, and each of {count} needs one at least")
    if (count - 1) * link + 1 > len(units):
        raise PlanError(
            f"{what}: the link is longer than a module: the model has {found}, and each module "
            f"but the last needs {link}. Give a shorter link or fewer modules"
        )
    if isinstance(stages.balance, tuple):
        split = _named(analysis, stages.balance, starts)
    elif stages.balance == "blocks":
        size, more = divmod(len(units), count)  # what does not divide goes to the lower modules
        split = tuple(k * size + min(k, more) for k in range(count))
    else:
        split = _partition(_unit_costs(analysis, stages, units), count, link)
    for k, (start, end) in enumerate(pairwise(split)):
        if link > end - start:
            names = ", ".join(analysis.blocks[i].name for i in starts[start:end])
            raise PlanError(
                f"{what}: the link is longer than module {k}, which has {end - start} blocks "
                f"({names}). Give a shorter link, fewer modules, or another balance"
            )
    return tuple(starts[index] for index in split)


def _described(analysis: Analysis, starts: Sequence[int], num_units: int) -> str:
    """Say how many units a model has, and which blocks are none."""
    blocks, text = analysis.blocks, f"{num_units} blocks"
    if more := len(blocks) - len(starts):
        text += f" that begin with a single value, as a head takes ({more} more begin with several)"
    if num_units < len(starts):
        text += f", its classifier {blocks[-1].name!r} counted with the last"
    return text


def find_stage_boundaries(
    analysis: Analysis, split: Sequence[int], link: int = 0, boundary: int = 0
) -> tuple[StageBoundary, ...]:
    """Return where stages meet.

    The ``split`` is what `find_split` returned; ``link`` blocks of a stage run again in front of
    the next one. Stages before the transition layer, ``boundary``, do not learn, and no error flows
    back into the block that it lies in or those before.
    """
    blocks, starts, found = analysis.blocks, _find_starts(analysis, several=False), []
    for k, block in enumerate(split[1:]):
        end = starts.index(block) if link else 0  # a block of several values is linked to none
        before = (blocks[i] for i in starts[max(end - link, 0) : end])
        linked = tuple(one.start for one in before if one.layers[0] >= boundary)
        tail = linked[0] if linked else None
        learns = blocks[block].layers[0] > boundary
        value = analysis.block_inputs[block].value if analysis.block_inputs else None
        found.append(StageBoundary(k, blocks[block].start, value, tail, learns, linked[1:]))
    return tuple(found)


def _named(analysis: Analysis, names: Sequence[str], starts: Sequence[int]) -> tuple[int, ...]:
    """Return which of ``starts`` the ``names`` mean, in which they must stand in order."""
    firsts = {block.layers[0]: block for block in analysis.blocks}
    split = [0]
    for name in names:
        try:
            layer = analysis.boundary(name)
        except PlanError as error:
            raise PlanError(f"balance: {error}") from error
        if layer not in firsts:
            raise PlanError(
                f"balance: no block begins at {name!r}, whose first layer lies inside a block. The "
                f"blocks: {', '.join(analysis.blocks[i].name for i in starts)}"
            )
        index = analysis.blocks.index(firsts[layer])
        if index not in starts:
            raise PlanError(
                f"balance: {name!r} begins with several values, {', '.join(firsts[layer].values)}, "
                "and a head takes a single one. The blocks that begin with one: "
                f"{', '.join(analysis.blocks[i].name for i in starts)}"
            )
        if starts.index(index) <= split[-1]:
            raise PlanError(
                f"balance={tuple(names)!r}: {name!r} does not lie behind the block before it; name "
                "the blocks that begin the modules after the first, in execution order"
            )
        split.append(starts.index(index))
    return tuple(split)


def _unit_costs(
    analysis: Analysis, stages: LocalModules | Checkpoint, units: Sequence[int]
) -> list[int]:
    """Return what each unit costs of what the balance is of."""
    if analysis.costs is None:
        raise PlanError(
            f"{type(stages).__name__}(balance={stages.balance!r}): the costs of the blocks are "
            "needed, and they need shapes: give example inputs, or balance='blocks'"
        )
    costs = [0] * len(units)
    for index, block in enumerate(analysis.blocks):
        for cost in (analysis.costs[i] for i in block.layers):
            what = cost.saved_bytes if stages.balance == "memory" else cost.flops
            costs[bisect_right(units, index) - 1] += what
    return costs


def _partition(costs: Sequence[int], count: int, link: int) -> tuple[int, ...]:
    """Part ``costs`` so that the dearest part costs least; return where the parts begin.

    A part but the first also pays for the ``link`` entries before it, which run again in it; none
    but the last is shorter than that. Dynamic programming over ends, O(count * n^2).
    """
    sums = [0, *accumulate(costs)]

    @cache
    def best(part: int, end: int) -> tuple[float, tuple[int, ...]]:
        """Return what the dearest of parts 0 to ``part`` costs, up to ``end``, and their begins."""
        if part == 0:
            return (sums[end] if end >= link else math.inf), (0,)
        found = []
        for start in range(part, end if part == count - 1 else end - max(link, 1) + 1):
            dearest, begins = best(part - 1, start)
            cost = sums[end] - sums[start - min(link, start)]
            found.append((max(dearest, cost), (*begins, start)))
        return min(found, key=itemgetter(0), default=(math.inf, ()))

    return best(count - 1, len(costs))[1]
