"""Local updates of weights that lie in shards over the ranks, rows on each: for graphs.

Equation (LoCal+SGD, Figure 1, eq. 4), r the ranks, W_s and delta_s the rows of one of them::

    delta_s = (sum over r of delta_r)_s             a reduce-scatter
    W_s    <- W_s + rate * delta_s / sqrt(sum over s of ||delta_s||^2)

The squares of all layers are summed by one small all-reduce. Rows follow `torch.chunk`: each rank
but the last ones has as many as the first, and the last may have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from .hebbian import add_step, apply_length
from .ranks import group_named

__all__ = ["scattered", "shard_add_", "squares", "whole"]

_library: Any = torch.library.Library("fxlocal", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("whole(Tensor weight, *, bool blank=False) -> Tensor")
_library.define("scattered(Tensor delta, ScalarType dtype, str group) -> Tensor")
_library.define("squares(Tensor[] deltas, Tensor[] weights) -> Tensor")
_library.define(
    "shard_add_(Tensor(a!) weight, Tensor delta, Tensor squares, int index, Tensor rate, *, "
    "bool relative=False, Tensor(b!)? skipped=None, bool stochastic=False) -> ()"
)


def whole(weight: Tensor, *, blank: bool = False) -> Tensor:
    """Return a weight as all ranks' rows together; it is sent only where it is not here.

    Args:
        weight: as its module has it: whole while that is in use, else in shards.
        blank: only its shape is asked for, nothing is sent.
    """
    if (gather := getattr(weight.detach(), "full_tensor", None)) is None:
        return weight
    if blank:
        return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    full: Tensor = gather()
    return full


def scattered(delta: Tensor, dtype: torch.dtype, group: str) -> Tensor:
    """Begin the sum of ``delta`` over ranks, of which each gets its rows, padded with zeros."""
    size = distributed.get_world_size(group_named(group))
    rows = -(-len(delta) // size)
    padding = [0, 0] * (delta.dim() - 1) + [0, rows * size - len(delta)]
    padded = pad(delta.to(dtype), padding).contiguous()
    begin = torch.ops._c10d_functional.reduce_scatter_tensor
    begun: Tensor = begin(padded, "sum", size, group)
    return begun


def squares(deltas: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the squared norms of this rank's rows of all deltas, then of ``weights``."""
    rows = [*deltas, *(_rows(weight) for weight in weights)]
    wide = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
    return torch.stack([torch.linalg.vector_norm(row).double().square() for row in wide])


def shard_add_(
    weight: Tensor,
    delta: Tensor,
    squares: Tensor,
    index: int,
    rate: Tensor,
    *,
    relative: bool = False,
    skipped: Tensor | None = None,
    stochastic: bool = False,
) -> None:
    """Move this rank's rows of ``weight``, in shards, as `normalised_add_` moves all of it.

    ``delta`` is the sum over ranks of its rows, padded; ``squares``, of which ``index`` is its own,
    what `squares` returned, summed over ranks. A weight that is not in shards is refused: what
    moves then is lost with the whole.
    """
    rows = _rows(weight)
    norm = squares[index].sqrt().to(delta.dtype)
    length = rate
    if relative:
        length = rate * squares[index + len(squares) // 2].sqrt().to(delta.dtype)
    step = apply_length(delta[: len(rows)], norm, length, skipped)
    add_step(rows, step, stochastic)


def _rows(weight: Tensor) -> Tensor:
    """Return this rank's rows; what is written there stays."""
    if (get := getattr(weight.detach(), "to_local", None)) is None:
        raise RuntimeError(
            f"a weight of shape {tuple(weight.shape)} that learns locally is not in shards when "
            "the forward ends: its module was not run, or is used elsewhere too. Put the boundary "
            "before it"
        )
    rows: Tensor = get()
    return rows


for _name in __all__:
    _library.impl(_name, globals()[_name], "CompositeImplicitAutograd")
