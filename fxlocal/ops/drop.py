"""Stochastic depth: what a residual branch computes for some rows of its batch alone.

    y = shortcut;  y[rows] += scale * branch(x[rows])

Each row survives with the same probability, independently in each branch, and ``scale`` is one over
it: the mean over draws is ``shortcut + branch(x)``, norms over the batch aside. Rows that survive
stand in a row, the last one followed by the first, from one that is drawn: in shuffled batches each
set of samples is equally likely, and eager steps copy stretches of memory and add in one pass what
an index would gather, clone and scatter. A compiled or captured step has indices, as it cannot hold
the drawn number. They are drawn by torch's generators, so that a seed fixes them, and a restored
state goes on with them; eager and compiled alike on a CPU.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["add_rows", "count_rows", "draw_blocks", "draw_each_row", "draw_rows", "take_rows"]

Rows: TypeAlias = Tensor | tuple[int, int] | None  # indices; the first and the number; all


def count_rows(size: int, survival: float) -> int:
    """Return how many of ``size`` rows survive: the nearest number, of two the larger."""
    return int(survival * size + 0.5)


def draw_rows(value: Tensor, survival: float, block: str, batch: object = None) -> Rows:
    """Draw which rows a block is computed for: a fixed number of them.

    Args:
        value: what enters the block, the batch in dimension 0.
        survival: the share that survives.
        block: its name, for the message.
        batch: an input of the model with as many rows, where that was not checked before.

    Returns:
        The first and their number; compiled, their indices, shape (count,); None for all.

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
    if count == size:
        return None
    if torch.compiler.is_compiling() or (
        value.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        # randperm, which inductor leaves to ATen: the same number as in eager
        first = torch.randperm(size, device=value.device)[:1]
        return (first + torch.arange(count, device=value.device)) % size
    return int(torch.randperm(size)[0]), count


def draw_each_row(value: Tensor, survival: float) -> Tensor:
    """Draw whether each row survives by itself: the distribution of DropPath.

    How many there are differs from step to step. They are drawn on the CPU, as a GPU would have to
    be waited for.
    """
    kept = torch.rand(value.shape[0]) < survival
    return kept.nonzero().squeeze(1).to(value.device, non_blocking=True)


def take_rows(value: Tensor, rows: Rows) -> Tensor:
    """Return the ``rows`` of ``value``, channels innermost where they were."""
    if rows is None:
        return value
    if isinstance(rows, tuple):
        taken: Tensor = _TakeRows.apply(value, *rows)
        return taken
    order, back = _layout(value)
    return value.permute(order).index_select(0, rows).permute(back)


def add_rows(shortcut: Tensor, branch: Tensor, rows: Rows, scale: float | None = None) -> Tensor:
    """Return ``shortcut`` with ``scale * branch`` added to its ``rows``.

    Args:
        shortcut: shape (B, ...).
        branch: shape (number of rows, ...).
        rows: which they are, none twice; None for all in order.
        scale: None for ``B / number of rows``.

    Raises:
        RuntimeError: if ``branch`` has other rows, so that they would be added elsewhere.
    """
    if rows is None:
        return shortcut + branch
    count = rows[1] if isinstance(rows, tuple) else rows.shape[0]
    if branch.dim() != shortcut.dim() or branch.shape[0] != count:
        raise RuntimeError(
            f"stochastic depth: a block computes {tuple(branch.shape)} of {count} rows, to be "
            f"added to {tuple(shortcut.shape)}: it leaves out rows, so the batch has to be "
            "dimension 0. Give mode='block'"
        )
    if branch.shape[1:] != shortcut.shape[1:]:
        broadcast: Any = torch.broadcast_shapes
        shape = broadcast(shortcut.shape[1:], branch.shape[1:])
        shortcut, branch = (value.expand(-1, *shape) for value in (shortcut, branch))
    if scale is None:
        scale = shortcut.shape[0] / branch.shape[0]
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)
    shortcut, branch = shortcut.to(dtype), branch.to(dtype)
    if isinstance(rows, tuple):
        total: Tensor = _AddRows.apply(shortcut, branch, *rows, scale)
        return total
    order, back = _layout(shortcut)
    wide, added = shortcut.permute(order), branch.permute(order)
    return wide.index_add(0, rows, added, alpha=scale).permute(back)


def _pieces(size: int, first: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Yield stretches of a batch, and where they stand among the rows that survive."""
    until = min(first + count, size)
    yield slice(first, until), slice(0, until - first)
    if first + count > size:
        yield slice(0, first + count - size), slice(size - first, count)


def _rest(size: int, first: int, count: int) -> Iterator[slice]:
    """Yield the stretches of a batch that do not survive."""
    end = first + count
    spans = ((end - size, first),) if end > size else ((0, first), (end, size))
    yield from (slice(a, b) for a, b in spans if a < b)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, first: int, count: int) -> Tensor:
        ctx.place = value.shape[0], first, count
        pieces = [value[rows] for rows, _ in _pieces(*ctx.place)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        size, *place = ctx.place
        whole = torch.empty_like(gradient[:1].expand(size, *gradient.shape[1:]))
        for rows, kept in _pieces(size, *place):
            whole[rows] = gradient[kept]
        for rows in _rest(size, *place):
            whole[rows] = 0
        return whole, None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, branch: Tensor, first: int, count: int, scale: float
    ) -> Tensor:
        ctx.place, ctx.scale = (shortcut.shape[0], first, count), scale
        total = torch.empty_like(shortcut)
        for rows, kept in _pieces(*ctx.place):
            torch.add(shortcut[rows], branch[kept], alpha=scale, out=total[rows])
        for rows in _rest(*ctx.place):
            total[rows] = shortcut[rows]
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        own = torch.empty_like(gradient[: ctx.place[2]])
        for rows, kept in _pieces(*ctx.place):
            if torch.is_grad_enabled():  # for a gradient of the gradient
                own[kept] = gradient[rows] * ctx.scale
            else:
                torch.mul(gradient[rows], ctx.scale, out=own[kept])
        return gradient, own, None, None, None


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
