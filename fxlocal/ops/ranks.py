"""Sums over the ranks of a data parallel run, for graphs: who they are, and in which precision.

Equation (ours, for LoCal+SGD, Figure 1, eq. 3), r the ranks::

    delta = sum over r of delta_r

as a delta is a sum over samples, and a rank's a partial one. It is taken before the norm, so that
N ranks of a batch b move a weight as one process of N * b does, and whether a delta is finite is
asked of the sum, so that all ranks answer alike.
"""

import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

__all__ = ["BUCKET_BYTES", "Group", "find_group", "group_named", "pack", "unpack", "widened"]

BUCKET_BYTES = 25 * 2**20  # of one message, as in DistributedDataParallel

Group: TypeAlias = Any  # a ProcessGroup; torch is built without it on some systems

_library: Any = torch.library.Library("fxlocal", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("widened(Tensor[] deltas, Tensor[] weights) -> Tensor[]")


def widened(deltas: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return each delta as it is summed over ranks: in float32, or as wide as its weight is wider.

    It is contiguous: what lies where in memory may differ by the rank, as with a batch of one.
    """
    pairs = zip(deltas, weights, strict=True)
    wide = [delta.to(torch.promote_types(w.dtype, torch.float32)) for delta, w in pairs]
    return [delta.contiguous() for delta in wide]


def find_group(process_group: Group = None) -> str | None:
    """Return the name of a process group of several ranks, "" for one rank, None without any.

    Args:
        process_group: None for the default group, if there is one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Group = process_group or distributed.group.WORLD
    if distributed.get_rank(group) < 0:
        raise ValueError(
            f"rank {distributed.get_rank()} is not in the process_group that it was given: give "
            "each rank a group of its own"
        )
    return str(group.group_name) if distributed.get_world_size(group) > 1 else ""


def group_named(name: str) -> Group:
    """Return the process group of this name; a RuntimeError if there is none (any more)."""
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    try:
        return resolve(name)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the process group {name!r}, in which deltas are summed, is gone: transform the model "
            "again, or make a new Driver"
        ) from error


def pack(value: Any) -> bytes:
    """Return ``value`` as bytes; pickling does not know all dtypes, and torch's own may share."""
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def unpack(packed: bytes) -> Any:
    """Return what `pack` packed, its tensors on the CPU."""
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)


_library.impl("widened", widened, "CompositeImplicitAutograd")
