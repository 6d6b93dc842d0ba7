"""What a second call does: of a model whose first call fills caches that later ones only read.

Position tables, masks and buffers that are made when the first batch comes: the first call
assigns them, which no graph does. A copy of the model is called once, and traced; what that call
filled are constants of the graph. Where they hang on more than the shapes of the inputs, or where
the first call also sets parameters, the model would do something else: that is refused.
"""

import copy
import random
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..ir.additions import ADDITIONS, Additions
from ..ir.network import Network
from ..ir.random_state import random_state, restore_random_state
from .assignments import AssignedError, Snapshot, same
from .examples import Examples

__all__ = ["Called"]


class Called:
    """A copy of ``source`` that has been called once.

    Args:
        source: the model; it is left as it is, and so are the random states.
        examples: one batch.
        refused: why a first call cannot be captured; raised where a copy cannot be called.
        other: call it with other numbers and other random ones, of the same shapes.
    """

    def __init__(
        self, source: nn.Module, examples: Examples, refused: AssignedError, other: bool = False
    ) -> None:
        self.source, self.examples, self.refused = source, examples, refused
        try:
            self.model = copy.deepcopy(source)
            before = Snapshot(self.model)
            try:
                self.call(other)
            finally:
                before.outside.restore()
        except Exception as error:
            raise refused from error
        self.hooked, self.filled = before.hooked(), before.changed()

    def call(self, other: bool = False) -> None:
        """Call the copy, with inputs of its own."""
        args, kwargs = self.examples.map(_halved if other else lambda t: t.detach().clone())
        state = random_state()
        try:
            if other:
                torch.manual_seed(torch.initial_seed() ^ 1)
                random.seed(1)
            self.model(*args, **kwargs)
        finally:
            restore_random_state(state)

    def network(self, captured: Network) -> Network:
        """Return the graph of the copy over the state of the source.

        Raises:
            CaptureError: if the source's first call would do more than fill what it reads.
        """
        self._refuse_more_than_caches(captured)
        added, graph = captured.fxlocal.copy(), captured.graph
        for node in graph.find_nodes(op="get_attr"):
            path = str(node.target)
            if path in self.filled:
                name = path.replace(".", "_")
                added.register_buffer(name, attrgetter(path)(self.model), persistent=False)
                node.target = f"{ADDITIONS}.{name}"
        network = Network(self.source, graph, Additions(added._buffers, added._modules))
        network.meta.update(captured.meta, captured_with="by its second call")
        return network

    def _refuse_more_than_caches(self, captured: Network) -> None:
        ours, theirs = dict(self.source.named_parameters()), dict(self.model.named_parameters())
        if ours.keys() != theirs.keys():
            self._refuse(sorted(ours.keys() ^ theirs.keys()), "makes parameters")
        moved = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        if moved:
            self._refuse(moved, "sets parameters")
        buffers = dict(self.model.named_buffers())
        first = {n: b for n, b in self.source.named_buffers() if n not in self.filled}
        moved = [n for n in first if not torch.equal(first[n], buffers[n])]
        leaves = tuple(f"{n.target}." for n in captured.graph.find_nodes(op="call_module"))
        if hooked := [path for path in self.hooked if f"{path}.".startswith(leaves)]:
            self._refuse(hooked, "changes the hooks of")  # all others ran while the copy was traced
        filled = [path for path in self.filled if not path.startswith(leaves)]
        other = Called(self.source, self.examples, self.refused, other=True).model
        for path in filled:
            made = attrgetter(path)(self.model)
            if isinstance(made, nn.Module):
                self._refuse([path], "puts another module in the place of")
            if not _equal(made, attrgetter(path)(other)):
                self._refuse([path], "fills, from the numbers of the batch or random ones,")
        before = {n: buffers[n].clone() for n in moved}
        self.call()
        if once := [n for n in moved if torch.equal(before[n], buffers[n])]:
            self._refuse(once, "sets")

    def _refuse(self, names: list[str], does: str) -> None:
        raise CaptureError(
            f"the model's first call {does} {', '.join(map(repr, names))}, which later calls do "
            "not: run the model once before"
        ) from self.refused


def _halved(value: Tensor) -> Tensor:
    return value.detach() / 2 if value.is_floating_point() else value.detach().clone()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is type(other) and isinstance(one, (list, tuple, dict)):
        parts = [list(v.items()) if isinstance(v, dict) else v for v in (one, other)]
        return len(one) == len(other) and all(map(_equal, *parts))
    return same(one, other)
