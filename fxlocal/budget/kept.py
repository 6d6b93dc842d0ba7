"""What a step keeps: counted where autograd saves a tensor, or, on a GPU, by its allocator."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.checkpoint import observe_second_forwards

__all__ = ["count_saved_bytes"]


class _Held:
    """The storages that autograd holds at a time, each counted once and whole."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.holders = own, dict[int, int]()
        self.bytes, self.peak = 0, 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Return what autograd is to keep; it stops counting when that dies."""
        kept = tensor.detach()  # a saved output would otherwise hold the graph that holds it
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.holders[place] = self.holders.get(place, 0) + 1
            if self.holders[place] == 1:
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
            weakref.finalize(kept, self._release, place, size).atexit = False
        return kept

    def _release(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.bytes -= size


@contextmanager
def count_saved_bytes(model: nn.Module, *inputs: Tensor) -> Iterator[Callable[[], int]]:
    """Count the most bytes that autograd holds for backward at a time in the ``with`` block.

    Every storage counts once and whole; the model's own parameters and buffers, and the inputs
    given, do not count, because they are there anyway. Nothing is computed differently. What a
    forward saves and an immediate backward frees counts no longer; what a checkpointed stage saves
    when it is computed again counts too.
    """
    there = (*model.parameters(), *model.buffers(), *inputs)
    held = _Held({tensor.untyped_storage().data_ptr() for tensor in there})
    hooks = torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor)
    with observe_second_forwards(partial(_count_recomputed, held)), hooks:
        yield lambda: held.peak


@contextmanager
def _count_recomputed(held: _Held) -> Iterator[None]:
    """Count what checkpointing's second forward saves.

    Checkpointing takes that with saved-tensor hooks of its own, which hide those further out.
    """
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pack(held.pack(tensor)), unpack):
        yield
