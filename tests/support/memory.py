"""What autograd keeps for backward: all of it, and the most at one time."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def kept_bytes(network: Callable[..., Any], inputs: Iterable[Any], aside: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that autograd keeps in one forward, but for ``aside``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in aside}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # autograd holds it, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(*inputs)
    del output
    return sum(kept.values())


class Kept:
    """The most bytes that autograd keeps at one time, each storage once, weights not at all."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        before = self.holders[address]
        self.holders[address] += by
        if address not in self.weights and 0 in (before, before + by):
            self.now += by * storage.nbytes()
            self.peak = max(self.peak, self.now)


class Held:
    """A saved tensor, that says so for as long as autograd holds it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.change(tensor, 1)

    def __del__(self) -> None:
        self.kept.change(self.tensor, -1)


def most_kept(step: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps at the peak of a step, whose loss ``step`` returns."""
    kept = Kept(weights)
    with torch.autograd.graph.saved_tensors_hooks(partial(Held, kept), lambda held: held.tensor):
        step().backward()
    assert kept.now == 0
    return kept.peak
