"""Stochastic depth: what a residual block computes for some rows of its batch alone.

    y = shortcut;  y[rows] += scale * branch(x[rows])

Each row is in the sum with the same probability, ``len(rows) / len(x)`` on average, and ``scale``
is one over it: the mean over draws is ``shortcut + branch(x)``, norms over the batch aside.

Rows are drawn by torch's generators, so that a seed fixes them, eager and compiled alike, and a
restored state goes on with them. All here is functional torch: a fixed count of rows is a fixed
shape, which `torch.compile` keeps in one graph.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_rows", "count_rows", "draw_blocks", "draw_each_row", "draw_rows", "take_rows"]


def count_rows(size: int, survival: float) -> int:
    """Return how many of ``size`` rows survive: the nearest number, of two the larger."""
    return int(survival * size + 0.5)


def draw_rows(value: Tensor, survival: float, block: str, batch: object = None) -> Tensor | None:
    """Draw which rows a block is computed for: a fixed number, each set of them equally likely.

    Args:
        value: what enters the block, the batch in dimension 0.
        survival: the share that survives.
        block: its name, for the message.
        batch: an input of the model with as many rows, where that was not checked before.

    Returns:
        Their indices, shape (count,); None for all.

    Raises:
        RuntimeError: if it is none, or ``value`` has other rows than the batch.
    """
    size = value.shape[0]
    if isinstance(batch, Tensor) and batch.dim() and batch.shape[0] != size:
        raise RuntimeError(
            f"stochastic depth: {block!r} takes {tuple(value.shape)} of a batch of "
            f"{batch.shape[0]}: it leaves out rows, so the batch has to be dimension 0"
        )
    count = count_rows(size, survival)
    if count == 0:
        raise RuntimeError(
            f"stochastic depth: of a batch of {size}, no row of {block!r} survives at "
            f"{survival:.3g}. Give larger batches (drop_last=True, if it is the last one), or a "
            "smaller rate"
        )
    return None if count == size else torch.randperm(size, device=value.device)[:count]


def draw_each_row(value: Tensor, survival: float) -> Tensor:
    """Draw whether each row survives by itself: the distribution of DropPath.

    How many there are differs from step to step. They are drawn on the CPU, as a GPU would have to
    be waited for.
    """
    kept = torch.rand(value.shape[0]) < survival
    return kept.nonzero().squeeze(1).to(value.device, non_blocking=True)


def take_rows(value: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``value[rows]``, channels innermost where they were."""
    if rows is None:
        return value
    order, back = _layout(value)
    return value.permute(order).index_select(0, rows).permute(back)


def add_rows(
    shortcut: Tensor, branch: Tensor, rows: Tensor | None, scale: float | None = None
) -> Tensor:
    """Return ``shortcut`` with ``scale * branch`` added to its ``rows``.

    Args:
        shortcut: shape (B, ...).
        branch: shape (len(rows), ...).
        rows: the indices of the branch's rows, none twice; None for all in order.
        scale: None for ``B / len(rows)``.
    """
    if rows is None:
        return shortcut + branch
    if scale is None:
        scale = shortcut.shape[0] / branch.shape[0]
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)
    order, back = _layout(shortcut)
    wide, added = shortcut.to(dtype).permute(order), branch.to(dtype).permute(order)
    return wide.index_add(0, rows, added, alpha=scale).permute(back)


def _layout(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the order of dimensions in which ``value`` is contiguous, and the way back.

    Selecting rows makes a plain contiguous tensor, from which a convolution in channels-last
    layout would have to be copied.
    """
    dims = value.dim()
    for count, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        last = dims == count and value.is_contiguous(memory_format=layout)
        if last and not value.is_contiguous():
            return (0, *range(2, dims), 1), (0, dims - 1, *range(1, dims - 1))
    return (*range(dims),), (*range(dims),)


def draw_blocks(survivals: Sequence[float], seed: int, step: object) -> list[bool]:
    """Draw whether each block survives a step, on the host: the same in each process."""
    drawn = random.Random(f"{seed} {step}")  # a text is hashed alike everywhere
    return [drawn.random() < survival for survival in survivals]
