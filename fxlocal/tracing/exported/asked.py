"""What was asked of the sizes of an exported program's inputs, and for which ones it holds.

Export answers by the example, and notes the question as a guard, which bounds the sizes. Torch's
own code asks how values lie in memory, too, which for one row or none is often another answer, and
of no account: that bounds them only if values get other shapes.
"""

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeGuard

import torch
from sympy import Ne, factor  # type: ignore[import-untyped]
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ...ir.contexts import ContextInterpreter
from ...ir.fakes import with_fake_state
from ...ir.network import Network
from ...ir.source import arguments
from ..assignments import unchanged
from ..doubts import refuse_other_output
from ..examples import Examples
from ..guards import no_random_draws, plain_context, quiet

__all__ = ["Asked", "has_batch", "holds_for"]

Symbol = Any  # of sympy
_SQUEEZES = (*map(partial(getattr, torch.ops.aten.squeeze), ("default", "dim", "dims")),)
_SOME, _MANY = 64, 2048  # how many sizes are tried
_TORCH = os.path.dirname(torch.__file__) + os.sep


class Asked:
    """The sizes of a program's inputs that may be any, and what was asked of them."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        names = program.graph_signature.user_inputs
        values = [node.meta.get("val") for node in program.graph.nodes if node.name in names]
        self.inputs: list[Tensor] = [value for value in values if has_batch(value)]
        self._most: dict[Symbol, int | None] = {}

    @cached_property
    def hints(self) -> dict[Symbol, int]:
        """The sizes that may be any, and what they are in the example."""
        return dict(self._symbols(self.inputs))

    @cached_property
    def _guards(self) -> dict[tuple[Any, bool], None]:
        """What was asked, and whether torch's own code did."""
        sizes: list[Any] = [s for v in self.inputs for s in v.shape if isinstance(s, torch.SymInt)]
        if not sizes:
            return {}
        env = sizes[0].node.shape_env  # what was asked of a size that is another's by now, too
        asked = ((env.replace(g.expr), _is_layout(g.sloc.framework_loc)) for g in env.guards)
        return dict.fromkeys(asked)  # in their order, which a set has not

    def takes_other_lengths(self) -> bool:
        """Tell whether some length may be another by what was asked of it, and batches larger."""
        least, most = self._least(by_model=False), {s: self.most(s) for s in self.hints}
        if any(most[symbol] == self.hints[symbol] for symbol in self.hints.keys() - self._lengths):
            return False
        for guard, layout in self._guards:
            symbols = self._several(guard)
            if not self._lengths.isdisjoint(symbols) and not self._surely(guard, least):
                tried = [{least[s], *self._larger(s, most[s])} for s in symbols]
                if not _hold_together(guard, layout, symbols, tried):
                    return False
        return any(least[symbol] != most[symbol] for symbol in self._lengths)

    @cached_property
    def _lengths(self) -> set[Symbol]:
        return {symbol for symbol, _ in self._symbols(self.inputs, first=1)}

    def _several(self, guard: Any) -> list[Symbol]:
        """Return the sizes that a guard is about if it is about several."""
        symbols = [symbol for symbol in guard.free_symbols if symbol in self.hints]
        return symbols if len(symbols) > 1 else []

    def _larger(self, symbol: Symbol, most: int | None) -> Iterator[int]:
        """Yield the example's size and some larger ones, up to ``most``."""
        sizes = (self.hints[symbol] + i for i in (0, 1, 2, 3, 7, 29))
        yield from (size for size in sizes if most is None or size <= most)

    def bounds(self) -> Iterator[dict[Symbol, int]]:
        """Yield the least of each size that surely hold, and smaller ones that may.

        Those are left out for what torch's code asked alone, or for a squeeze, which drops what is
        one: whether a graph holds for them has to be tried, of each, and first of lengths alone.
        """
        model, least = self._least(by_model=True), self._least(by_model=False)
        for size in self._squeezed():
            raised = self._raised(Ne(size, 1), least, dict.fromkeys(least, _SOME))
            two = {s: max(n, 2) for s, n in least.items() if s in size.free_symbols}
            least |= two if raised is None else raised
        yield (last := least)
        # Up to three less, as a loss may leave out a token or two.
        for less, symbols in product((1, 2, 3), (self._lengths, self.hints)):
            sizes = {symbol: least[symbol] - less for symbol in symbols}
            smaller = {s: max(model[s], size if size > 1 else 0) for s, size in sizes.items()}
            smaller = {**last, **smaller}
            if smaller != last and all(n <= self.hints[s] for s, n in smaller.items()):
                yield (last := smaller)

    def _squeezed(self) -> Iterator[Any]:
        """Yield the sizes that squeezes drop if they are one, of which nobody asked."""
        modules = self._program.graph_module.modules()
        graphs = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
        for node in (node for graph in graphs for node in graph.nodes if node.target in _SQUEEZES):
            value, *told = node.args
            shape = value.meta["val"].shape
            dimensions = pytree.tree_leaves(told) if told else range(len(shape))
            sizes = (shape[dimension] for dimension in dimensions)
            yield from (s.node.expr for s in sizes if isinstance(s, torch.SymInt))

    def _least(self, *, by_model: bool) -> dict[Symbol, int]:
        found = {}
        for symbol, hint in self.hints.items():
            low = lower = int(self._program.range_constraints[symbol].lower)
            if low and not self._holds(symbol, low - 1):
                low = 0  # a guard bounds the range: no size of one is a constant
            tried = {*range(low, low + _SOME), *range(hint - _MANY, hint), lower - 1}
            tried |= {*self._turns(symbol)}
            bad = (n for n in tried if low <= n < hint and not self._holds(symbol, n, by_model))
            found[symbol] = max(bad, default=low - 1) + 1
        for guard, layout in self._guards:
            if self._several(guard) and not (by_model and layout):
                found |= self._raised(guard, found, self.hints) or {}
        return found

    def _raised(
        self, guard: Any, least: Mapping[Symbol, int], most: Mapping[Symbol, int]
    ) -> dict[Symbol, int] | None:
        """Return from which sizes up to ``most`` on a question has one answer; None if from none.

        Lengths are raised if it is about any, as a last batch may be of one.
        """
        if self._surely(guard, least):
            return {}
        symbols = [symbol for symbol in guard.free_symbols if symbol in self.hints]
        some = self._lengths.intersection(symbols) or symbols
        for more in range(_SOME):
            raised = {s: max(least[s], 1) + more * (s in some) for s in symbols}
            if any(size > most[symbol] for symbol, size in raised.items()):
                break
            if self._surely(guard, raised):
                return raised
        return None

    def _surely(self, guard: Any, least: Mapping[Symbol, int]) -> bool:
        """Tell whether a question provably has the example's answer for all sizes in bounds."""
        if not guard.free_symbols:
            return bool(guard)
        if not guard.is_Relational or not guard.free_symbols <= least.keys():
            return False
        most = {symbol: self.most(symbol) for symbol in guard.free_symbols}
        if any(n is not None and least[symbol] > n for symbol, n in most.items()):
            return False
        ranges = {s: ValueRanges(least[s], int_oo if n is None else n) for s, n in most.items()}
        forms = guard, guard.func(*map(factor, guard.args))  # a sum hides that its terms agree
        return any(bool(bound_sympy(form, ranges).lower) for form in forms)

    def most(self, symbol: Symbol) -> int | None:
        """Return the most that a size may be; None if there is no bound.

        Where remainders, quotients or the like of it were asked, that is the last one tried.
        """
        if symbol not in self._most:
            self._most[symbol] = self._find_most(symbol)
        return self._most[symbol]

    def _find_most(self, symbol: Symbol) -> int | None:
        upper, hint = self._program.range_constraints[symbol].upper, self.hints[symbol]
        irregular = not all(_compares_polynomials(guard) for guard, _ in self._own(symbol))
        tried = {*range(hint, hint + (_MANY if irregular else _SOME)), *self._turns(symbol)}
        tried |= set() if irregular else {2**k for k in range(21)}
        good = hint
        for size in sorted(size for size in tried if size >= hint):
            if size > upper:
                return int(upper)
            if not self._holds(symbol, size):
                sizes = range(good, size)
                return good - 1 + bisect_left(sizes, True, key=lambda n: not self._holds(symbol, n))
            good = size
        return int(upper) if upper.is_Integer else good if irregular else None

    def _turns(self, symbol: Symbol) -> Iterator[int]:
        """Yield sizes at which a polynomial that was asked of may turn its sign."""
        for guard, _ in self._own(symbol):
            for relation in _relations(guard):
                difference = relation.lhs - relation.rhs
                if difference.is_polynomial(symbol) and difference.has(symbol):
                    for root in map(int, difference.as_poly(symbol).real_roots()):
                        yield from range(root - 1, root + 3)

    def _symbols(self, values: Iterable[Tensor], first: int = 0) -> Iterator[tuple[Symbol, int]]:
        sizes: Iterable[Any] = (size for value in values for size in value.shape[first:])
        yield from ((s.node.expr, s.node.hint) for s in sizes if _is_any(s))

    def _holds(self, symbol: Symbol, value: int, by_model: bool = False) -> bool:
        """Tell whether what was asked of a size alone has the same answer for ``value``."""
        size = {symbol: value}
        own = self._own(symbol)
        asked = (g for g, layout in own if not (by_model and layout and _is_of_one(g, size)))
        return all(_is_true(guard, size) for guard in asked)

    def _own(self, symbol: Symbol) -> list[tuple[Any, bool]]:
        """Return what was asked of a size alone."""
        return [asked for asked in self._guards if asked[0].free_symbols == {symbol}]


def holds_for(
    network: Network, program: ExportedProgram, examples: Examples, least: Mapping[Symbol, int]
) -> bool:
    """Tell whether a graph makes values of the shapes that its symbols say for the least sizes.

    Or else what the model does, where a size of one changes both.
    """
    least = {symbol: max(size, 1) for symbol, size in least.items()}
    cut, model = _cut(program, examples, least), network.source_model
    small = Examples(model, *examples.map(lambda value: cut.get(id(value), value)))
    with ExitStack() as stack, suppress(Exception):
        for context in (quiet(), unchanged(model), plain_context(), no_random_draws()):
            stack.enter_context(context)
        args, kwargs = small.map(stack.enter_context(with_fake_state(network)))
        _Shapes(network, least).run(*arguments(network.graph, args, kwargs).values())
        return True
    with quiet(), suppress(Exception):
        refuse_other_output(model, network, small)
        return True
    return False


class _Shapes(ContextInterpreter):
    """Interprets a graph and compares the shapes of its values with those that export told."""

    def __init__(self, network: Network, least: Mapping[Symbol, int]) -> None:
        super().__init__(network)
        self._least = least

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result: Any = super().run_node(n)
        told: Any = n.meta.get("val")
        known = isinstance(told, Tensor) and isinstance(result, Tensor)
        if known and [*result.shape] != [*map(self._told, told.shape)]:
            raise ValueError(n.name)
        return result

    def _told(self, size: Any) -> int:
        return size if isinstance(size, int) else int(size.node.expr.xreplace(self._least))


def _cut(
    program: ExportedProgram, examples: Examples, least: Mapping[Symbol, int]
) -> dict[int, Tensor]:
    """Return, by the id of each tensor of the example, one of the least sizes."""
    specs = program.graph_signature.input_specs  # constants are inputs too
    names = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    nodes = [node for node in program.graph.nodes if node.name in names]
    told = examples.named(*pytree.tree_unflatten(nodes, program.call_spec.in_spec))
    given = examples.named(examples.args, examples.kwargs)
    found: dict[int, Tensor] = {}
    for name, value in given.items():
        leaves: list[Any] = pytree.tree_leaves(value)
        for leaf, node in zip(leaves, pytree.tree_leaves(told[name]), strict=True):
            for dimension, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if _is_any(size):
                    small = found.setdefault(id(leaf), leaf)
                    found[id(leaf)] = small.narrow(dimension, 0, least[size.node.expr])
    return {key: value.contiguous() for key, value in found.items()}


def has_batch(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a tensor that has a first dimension."""
    return isinstance(value, Tensor) and value.dim() > 0


def _is_any(size: object) -> bool:
    return isinstance(size, torch.SymInt) and size.node.expr.is_Symbol


def _hold_together(
    guard: Any, layout: bool, symbols: Sequence[Symbol], tried: Sequence[Iterable[int]]
) -> bool:
    """Tell whether what was asked of several sizes is answered alike for others.

    That they are equal, or as many in all, is: operators ask again. What else the model asked may
    be, of any of them.
    """
    if guard.is_Equality and _compares_polynomials(guard) and (layout or guard.lhs.is_Symbol):
        return True
    sizes = (dict(zip(symbols, some, strict=True)) for some in product(*tried))
    return layout and all(_is_true(guard, some) for some in sizes)


def _is_true(guard: Any, sizes: Mapping[Symbol, int]) -> bool:
    try:
        return bool(guard.subs(sizes))
    except ZeroDivisionError:
        return False


def _is_of_one(guard: Any, size: Mapping[Symbol, int]) -> bool:
    """Tell whether a size makes that one or none which is asked of, as a text but its first."""
    if min(size.values()) < 2:
        return True
    sides = (guard.args, guard.args[::-1]) if guard.is_Relational else ()
    return any(known.is_number and bool(value.subs(size) < 2) for known, value in sides)


def _compares_polynomials(guard: Any) -> bool:
    return all(side.is_polynomial() for part in _relations(guard) for side in part.args)


def _relations(guard: Any) -> Iterator[Any]:
    """Yield the comparisons that a question is made of, by "or" and "and" too."""
    if guard.is_Relational:
        yield guard
    else:
        for part in guard.args:
            yield from _relations(part)


def _is_layout(place: Any) -> bool:
    """Tell whether torch's own code asked at a place, but for its layers."""
    path = getattr(place, "filename", str(place))
    return path.startswith(_TORCH) and not path.startswith(f"{_TORCH}nn{os.sep}")
