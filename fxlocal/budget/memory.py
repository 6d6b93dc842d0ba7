"""Predict the most bytes that a step keeps for its backward at a time, whatever the Plan.

Read from one run on fake tensors. With b the block at the boundary, a node keeps what it saves if
a parameter of block b or of a later one lies on a path to it. Of a network that is checkpointed,
in stages 1 to m - 1 and a tail m, the peak is the greatest of::

    inputs(1) | ... | inputs(m - 1) | saved(m)           when the forward ends
    inputs(1) | ... | inputs(i) | saved(i)               when the backward has made stage i again

and of local modules the greatest ``saved(i) | head's input(i)``. Here ``|`` unites storages, so
that one that is kept twice counts once; parameters, buffers and the model's inputs do not count.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from torch import fx

from ..compiler.analysis import Analysis
from ..ir.fakes import FakeRun
from ..ir.nodes import last_on_path, parameter_uses, sums_of

__all__ = ["KeptBytes"]

_Storages = frozenset[int]
_NONE: _Storages = frozenset()


class KeptBytes:
    """What stretches of blocks of one graph keep.

    Args:
        gm: the unrewritten graph, in train mode.
        run: of it on fake tensors.
        analysis: of it, with its blocks.
        on_gpu: the peak is its allocator's, which counts the gradients made by then too.

    Attributes:
        rest: bytes that the run on fake tensors does not show: the loss's, which are gone once the
            last stage is through; on a GPU workspace, which is there at all times.
    """

    def __init__(
        self, gm: fx.GraphModule, run: FakeRun, analysis: Analysis, on_gpu: bool = False
    ) -> None:
        self.analysis, self.on_gpu, self.rest = analysis, on_gpu, 0
        self._run = run
        starts = [analysis.order[block.start] for block in analysis.blocks[1:]]
        self._block = {n.name: bisect_right(starts, i) for i, n in enumerate(gm.graph.nodes)}
        self._size: dict[int, int] = {}
        for found in (run.saved, run.made):
            for storages in found.values():
                self._size |= storages
        self._nodes: list[list[fx.Node]] = [[] for _ in analysis.blocks]
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                self._nodes[self._block[node.name]].append(node)
        learning = [use for use in parameter_uses(gm) if use[2].requires_grad]
        self._reach = last_on_path(gm, learning, self._block)
        self._gradients = sums_of(learning, self._block, len(self._nodes), lambda p: p.nbytes)
        self.saved = lru_cache(maxsize=None)(self._saved)
        self.taken = lru_cache(maxsize=None)(self._taken)

    def _saved(self, first: int, last: int, boundary: int) -> _Storages:
        """Return what autograd keeps for blocks ``first`` to ``last - 1``."""
        names = (n.name for block in self._nodes[first:last] for n in block)
        kept = (self._run.saved.get(name, ()) for name in names if self._reach[name] >= boundary)
        return _NONE.union(*kept)

    def _taken(self, first: int, last: int) -> _Storages:
        """Return what these blocks take of what earlier ones make."""
        nodes = (n for block in self._nodes[first:last] for n in block)
        values = dict.fromkeys(v.name for node in nodes for v in node.all_input_nodes)
        earlier = (name for name in values if self._block[name] < first)
        return _NONE.union(*(self._run.made.get(name, ()) for name in earlier))

    def bytes(self, storages: Iterable[int]) -> int:
        """Return what they come to."""
        return sum(map(self._size.__getitem__, storages))

    @cached_property
    def per_block(self) -> list[int]:
        """What each block saves, a storage counted where it is saved first."""
        unions = [self.bytes(self.saved(0, k + 1, 0)) for k in range(len(self._nodes))]
        return [b - a for a, b in pairwise([0, *unions])]

    @cached_property
    def _gradient_sums(self) -> list[int]:
        """The bytes of the gradients of all blocks from each on."""
        return [*accumulate(reversed(self._gradients), initial=0)][::-1]

    def plain(self, boundary: int) -> int:
        """Return the peak where blocks before ``boundary`` are local and the rest is kept."""
        return self.bytes(self.saved(boundary, len(self._nodes), boundary)) + self.rest

    def checkpointed(self, boundary: int, starts: Sequence[int]) -> int:
        """Return the peak with stages that begin at ``boundary`` and at ``starts``."""
        ends = [*starts, len(self._nodes)]
        kept, phases = _NONE, list[int]()
        stages = list(zip([boundary, *starts], ends, strict=True))
        for first, last in stages[:-1]:
            phases.append(self._again(first, last, boundary, kept))
            kept |= self.taken(first, last)
        first, last = stages[-1]
        return max(*phases, self.bytes(kept | self.saved(first, last, boundary)) + self.rest)

    def find_stages(self, boundary: int, edges: Sequence[int], limit: float) -> tuple[int, ...]:
        """Return where stages begin whose peak lies within ``limit``; none if there are no such.

        The last one begins as early as it can, so that the least is computed again; those before
        it are as long as they can be, so that the fewest inputs are kept.

        Args:
            boundary: index of the first block of the first stage.
            edges: indices of the blocks behind it at which stages may begin, in order.
            limit: bytes.
        """
        starts: tuple[int, ...] = ()
        first, kept, before = boundary, _NONE, boundary
        for edge in edges:
            if self._again(first, edge, boundary, kept) > limit:
                if before == first:
                    return ()
                kept, first = kept | self.taken(first, before), before
                starts = (*starts, first)
                if self._again(first, edge, boundary, kept) > limit:
                    return ()
            held = kept | self.taken(first, edge) | self.saved(edge, len(self._nodes), boundary)
            if self.bytes(held) + self.rest <= limit:
                return (*starts, edge)
            before = edge
        return ()

    def _again(self, first: int, last: int, boundary: int, kept: _Storages) -> int:
        """Return what is kept once the backward has computed a stage again."""
        more = self._gradient_sums[last] + self.rest if self.on_gpu else 0
        saved = self.saved(first, last, boundary)
        return self.bytes(kept | self.taken(first, last) | saved) + more

    def modules(self, boundary: int, starts: Sequence[int]) -> int:
        """Return the peak with local modules, of which all but the first begin at ``starts``."""
        ends = [*starts, len(self._nodes)]
        peaks = []
        for first, last in zip([boundary, *starts], ends, strict=True):
            head = self.taken(last, last + 1) if last < len(self._nodes) else _NONE
            gone = self._gradient_sums[0] - self._gradient_sums[last] if self.on_gpu else 0
            peaks.append(self.bytes(self.saved(first, last, max(first, boundary)) | head) + gone)
        return max(peaks) + self.rest
