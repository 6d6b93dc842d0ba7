"""Try on a first batch what a graph does not tell: that a row of a value is its sample's alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import PlanError
from ...ir.contexts import ContextInterpreter
from ...ir.network import Network
from ...ir.operators import is_plain, operator_name
from ...ir.stages import Halves
from .guard import Guard

__all__ = ["rows_of", "try_prefix"]

_ALIKE = 0.02  # relative error of rows that are computed in another batch; bfloat16 rounds so
_ADVICE = "leave cache out, or end the prefix before it"


def try_prefix(
    halves: Halves, guard: Guard, values: Sequence[Any], given: Sequence[Any], count: int
) -> None:
    """Compute half of a batch again, in eager, and compare.

    Args:
        halves: whose prefix made the values.
        guard: knows its state before it ran.
        values: that it made.
        given: of these inputs.
        count: of samples.

    Raises:
        PlanError: naming what draws random numbers, moves a buffer, or mixes samples.
    """
    if (name := guard.changed()) is not None:
        raise PlanError(
            f"cache: the prefix changes {name!r} when it runs, as batch statistics do, and so "
            f"what it makes next: {_ADVICE}"
        )
    part, half = halves.before, max(count // 2, 1)
    some = pytree.tree_map_only(Tensor, lambda value: value[:half], list(given))
    before = _random_states()
    watching = _Watching(part)
    again = watching.run(*some)
    if watching.drawn is not None or not _equal(before, _random_states()):
        raise PlanError(
            f"cache: {watching.drawn or 'the prefix'!r} draws random numbers anew in each step: "
            f"{_ADVICE}"
        )
    at = rows_of(halves, values, count)
    names = list(_names(halves, values))
    first, second = (pytree.tree_leaves(tuple(one)) for one in (values, again))
    for i in at if half < count else ():
        if second[i].shape[:1] != (half,) or not _alike(first[i][:half], second[i]):
            raise PlanError(
                f"cache: a row of {names[i]!r} depends on other samples of its batch, or is not a "
                f"sample's: {_ADVICE}"
            )


def rows_of(halves: Halves, values: Sequence[Any], count: int) -> list[int]:
    """Return which leaves of the values have a row for each sample.

    The others are the same for each batch of a size: sizes, and what is made of weights alone.

    Raises:
        PlanError: naming a value that depends on the samples, and has no row for each.
    """
    varying = _varying(halves.before)
    found = []
    for i, (name, leaf) in enumerate(
        zip(_names(halves, values), pytree.tree_leaves(tuple(values)), strict=True)
    ):
        if name not in varying:
            continue
        if not isinstance(leaf, Tensor) or leaf.shape[:1] != (count,):
            what = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
            raise PlanError(
                f"cache: {name!r} crosses the boundary and has no row for each of {count} "
                f"samples, but is {what}: {_ADVICE}"
            )
        found.append(i)
    return found


def _names(halves: Halves, values: Sequence[Any]) -> Iterator[str]:
    """Yield the name of each leaf's value."""
    for name, value in zip(halves.values, values, strict=True):
        yield from [name] * len(pytree.tree_leaves(value))


def _varying(part: Network) -> set[str]:
    """Return the names of the nodes that depend on the numbers in the inputs."""
    found: set[fx.Node] = set()
    for node in part.graph.nodes:
        reads = operator_name(node) in ("item", "tolist")
        if node.op == "placeholder" or (
            not found.isdisjoint(node.all_input_nodes) and (reads or not is_plain(node))
        ):
            found.add(node)
    return {node.name for node in found}


class _Watching(ContextInterpreter):
    """Runs a graph and notes the first node that draws random numbers."""

    drawn: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        before = _random_states() if self.drawn is None else []
        with torch.no_grad():
            result = super().run_node(n)
        if self.drawn is None and not _equal(before, _random_states()):
            self.drawn = n.name
        return result


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _alike(value: Tensor, other: Tensor) -> bool:
    if not value.is_floating_point():
        return torch.equal(value, other)
    apart = (value.float() - other.float()).norm()
    return not bool(apart > _ALIKE * value.float().norm())  # NaN tells nothing
