"""The replay buffer between local modules that run at their own pace (DGL)."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["ReplayBuffer"]


@dataclass
class _Batch:
    values: tuple[Any, ...]
    num_uses: int = 0


class ReplayBuffer(nn.Module):
    """Keep the last batches that a module sent; hand out the one used least (DGL, Algorithm 2).

    Belilovsky et al., "Decoupled greedy learning of CNNs", 2020. A module that is faster than the
    one before it uses a batch again instead of waiting for the next. Of those used equally often
    the oldest comes first, so that each is used before any is used again.

    In one process, a call stands for modules of equal pace: the next one takes a batch while the
    new one is still being made, and so runs a batch behind.

    Copies of batches are kept, and copies handed out: their owners may overwrite them. They are no
    part of the ``state_dict``.

    Args:
        size: most batches to keep, at least 1; one more drives out the oldest.

    Raises:
        ValueError: if the size is below 1.

    Example:
        >>> buffer = ReplayBuffer(2)
        >>> buffer.put("first"), buffer.put("second")
        (None, None)
        >>> [buffer.take() for _ in range(3)]
        [('first',), ('second',), ('first',)]
        >>> buffer("third"), buffer("fourth")
        (('second',), ('third',))
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size}: a replay buffer keeps at least 1 batch")
        self.size = size
        self._batches: deque[_Batch] = deque(maxlen=size)

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Take a batch out and put one in; the first, which has to be there, in this order."""
        if not self._batches:
            self.put(*values)
            return self.take()
        batch = self.take()
        self.put(*values)
        return batch

    def put(self, *values: Any) -> None:
        """Keep a batch: tensors, containers of them, or plain values."""
        copied = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)
        self._batches.append(_Batch(copied))

    def take(self) -> tuple[Any, ...]:
        """Return a copy of the batch used least; an IndexError if there is none yet."""
        if not self._batches:
            raise IndexError("the replay buffer is empty: put a batch in first")
        batch = min(self._batches, key=lambda batch: batch.num_uses)
        batch.num_uses += 1
        copied: tuple[Any, ...] = pytree.tree_map_only(Tensor, Tensor.clone, batch.values)
        return copied

    @property
    def num_unused(self) -> int:
        """The number of batches that have not been taken yet."""
        return sum(batch.num_uses == 0 for batch in self._batches)

    def batches(self) -> list[tuple[tuple[Any, ...], int]]:
        """Return each batch, oldest first, and how often it was used; `refill` takes them."""
        return [(batch.values, batch.num_uses) for batch in self._batches]

    def refill(self, batches: Iterable[tuple[tuple[Any, ...], int]]) -> None:
        """Keep these batches instead."""
        self._batches.clear()
        self._batches.extend(_Batch(values, num_uses) for values, num_uses in batches)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"size={self.size}"
