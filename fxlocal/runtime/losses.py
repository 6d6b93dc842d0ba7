"""The mean loss of an epoch, without waiting for the device inside it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

__all__ = ["MeanLoss", "own_rank"]


class MeanLoss:
    """Adds up the losses that are observed, on their device."""

    def __init__(self, total: Tensor | None = None, count: int = 0) -> None:
        self._sum, self._count = total, count

    def state(self) -> tuple[Tensor | None, int]:
        """Return what it was told so far: arguments of another one."""
        return None if self._sum is None else self._sum.clone(), self._count

    def observe(self, loss: Tensor, share: Tensor | float = 1.0) -> None:
        """Add one step's loss, which counts ``share`` of a step's.

        Raises:
            ValueError: if the loss is no tensor of one element.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"observe() got {given} for a loss: give a tensor of one element, such as "
                "loss.mean()"
            )
        value = loss.detach().reshape(())
        value = value.to(torch.promote_types(loss.dtype, torch.float32)) * share
        self._sum = value if self._sum is None else self._sum.to(value.device).add_(value)
        self._count += 1

    def mean(self, tensors: Iterable[Tensor]) -> float:
        """Return the mean of what was observed, on whichever rank; NaN if nothing was.

        All ranks of a data parallel run take part, also one that observed nothing: else its next
        collective would be paired with this one.

        Args:
            tensors: the model's, on whose device the ranks talk.
        """
        if not _is_distributed():
            return math.nan if self._sum is None else float(self._sum / self._count)
        device = next(iter(tensors), torch.empty(0)).device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        if self._sum is not None:
            total[0], total[1] = self._sum, self._count
        distributed.all_reduce(total)
        return float(total[0] / total[1])


def own_rank() -> int:
    """Return this process's rank; 0 if it is none of a group."""
    return distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    """Tell whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()
