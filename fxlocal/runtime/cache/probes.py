"""Notice that a sample comes with another input than before, by some numbers of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Probes"]

_NUMBERS = 64  # of each input of a sample


class Probes:
    """Some numbers, always at the same random places, of the inputs of samples.

    On a CPU a difference is noticed at once. A GPU is not waited for: it is noticed in a later
    call, once the device has come so far.
    """

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._kept: Tensor | None = None
        self._differs: Tensor | None = None  # on the host, written by a GPU

    def look(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the numbers of each sample, as bytes: (samples, bytes)."""
        if not self._places:
            generator = torch.Generator().manual_seed(0)
            for value in inputs:
                size = value[0].numel()
                drawn = torch.randint(size, (min(_NUMBERS, size),), generator=generator)
                self._places.append(drawn.to(value.device))
        with torch.no_grad():
            found = [
                value.reshape(len(value), -1)[:, places].view(torch.uint8)
                for value, places in zip(inputs, self._places, strict=True)
            ]
            return torch.cat([one.reshape(len(one), -1) for one in found], 1)

    def add(self, first: int, rows: Tensor) -> None:
        """Keep the numbers of samples at ``first`` and behind."""
        needed = first + len(rows)
        if self._kept is None or len(self._kept) < needed:
            grown = rows.new_empty(max(2 * needed, 1024), rows.shape[1])
            if self._kept is not None:
                grown[:first] = self._kept[:first]
            self._kept = grown
        self._kept[first:needed] = rows

    def differing(self, rows: Tensor, at: Sequence[int]) -> int | None:
        """Return the index of the first of ``rows`` that is not what is kept ``at`` its place.

        On a GPU it is -1 where one of an earlier call was not.
        """
        assert self._kept is not None
        differs = (self._kept[torch.tensor(at, device=rows.device)] != rows).any(1)
        if rows.device.type == "cpu":
            return int(differs.int().argmax()) if bool(differs.any()) else None
        if self._differs is None:
            self._differs = torch.zeros((), dtype=torch.bool, pin_memory=rows.is_cuda)
        before = bool(self._differs)
        if not before:
            self._differs.copy_(differs.any(), non_blocking=True)
        return -1 if before else None
