"""The mean loss of an epoch, without waiting for the device inside it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed

__all__ = ["MeanLoss", "own_rank", "refuse_uneven"]


class MeanLoss:
    """Adds up the losses that are observed, on their device."""

    def __init__(self, total: Tensor | None = None, count: int = 0) -> None:
        self._sum, self._count = total, count

    def state(self) -> tuple[Tensor | None, int]:
        """Return what it was told so far: arguments of another one."""
        return None if self._sum is None else self._sum.clone(), self._count

    def observe(self, loss: Tensor, share: Tensor | float = 1.0) -> None:
        """Add one step's loss, one element, which counts ``share`` of a step's."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"observe() got {given} for a loss: give a tensor of one element, such as "
                "loss.mean()"
            )
        value = loss.detach()
        if value.dim():
            value = value.reshape(())
        if value.dtype not in (torch.float32, torch.float64):
            value = value.to(torch.float32)
        if isinstance(share, Tensor) or share != 1.0:
            value = value * share
        if self._sum is None:
            self._sum = value.clone()  # not the user's own, which may change
        else:
            self._sum = self._sum.to(value.device).add_(value)
        self._count += 1

    def mean(self, tensors: Iterable[Tensor]) -> float:
        """Return the mean of what was observed, on whichever rank; NaN if nothing was.

        All ranks of a data parallel run take part, also one that observed nothing: else its next
        collective would be paired with this one.

        Args:
            tensors: the model's, on whose device the ranks talk.

        Raises:
            RuntimeError: if another rank goes on with the epoch, under `fxlocal.replicate`.
        """
        if not _is_distributed():
            return math.nan if self._sum is None else float(self._sum / self._count)
        device = next(iter(tensors), torch.empty(0)).device
        total = torch.zeros(3, dtype=torch.float64, device=device)
        total[2] = 1.0
        if self._sum is not None:
            total[0], total[1] = self._sum, self._count
        distributed.all_reduce(total)
        loss, count, ended = total.tolist()
        refuse_uneven(ended)
        return loss / count if count else math.nan


def refuse_uneven(ended: float) -> None:
    """Refuse ranks of which ``ended`` have ended an epoch that others go on with.

    Each step of `fxlocal.replicate` begins with a message as that of an epoch's end, but for this
    number; so ranks that take unequal numbers of steps get each other's, and are told so.

    Raises:
        RuntimeError: if not all ranks do the same.
    """
    if 0 < ended < (size := distributed.get_world_size()):
        raise RuntimeError(
            f"{ended:g} of {size} ranks ended the epoch (this is rank {distributed.get_rank()}), "
            "and the others go on with another batch: all need as many. Give each a sampler that "
            "drops or pads the last ones, as torch's DistributedSampler does"
        )


def own_rank() -> int:
    """Return this process's rank; 0 if it is none of a group."""
    return distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    """Tell whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()
