"""What local modules share on their ranks: equal weights at the start, and sums of gradients.

Two modules have the same parameters where a link runs layers twice, and nowhere else: blocks with
common parameters are one unit of a split.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..ir.network import Network
from ..ir.stages import Stage
from ..ops.ranks import pack, unpack
from .ranks import Group, Ranks, Work

__all__ = ["GradientSum", "find_sums", "gather", "spread", "tensors_of"]


def tensors_of(network: Network, stage: Stage) -> set[int]:
    """Return the ids of all parameters and buffers that a stage uses."""
    found = set(map(id, stage.parameters.values()))
    for node in stage.network.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = operator.attrgetter(str(node.target))(network)
            found.update(map(id, value.buffers() if isinstance(value, nn.Module) else [value]))
    return found


def spread(state: Mapping[str, Any], ranks: Ranks) -> None:
    """Give all ranks the state of rank 0, in place.

    Raises:
        ParallelError: if a rank is lost.
        ValueError: if the state is another one's.
    """
    wire = ranks.wire(ranks.everyone)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first: list[Any] = [mine]
    with ranks.talking_to(ranks.others):
        distributed.broadcast_object_list(first, 0, group=ranks.everyone, device=wire)
    if first[0] != mine:
        odd = next(name for name in (*mine, *first[0]) if first[0].get(name) != mine.get(name))
        raise ValueError(
            f"{odd!r} has the shape {mine.get(odd)} here and {first[0].get(odd)} on rank 0: every "
            "rank has to make the same model and Plan"
        )
    for tensor in tensors.values():
        sent = tensor.to(wire).contiguous()
        with ranks.talking_to(ranks.others):
            distributed.broadcast(sent, 0, group=ranks.everyone)
        tensor.copy_(sent)


def gather(value: Any, ranks: Ranks, group: Group = None) -> list[Any]:
    """Return every rank's value on rank 0, its tensors on the CPU; nothing elsewhere.

    The values are tensors and plain values, nested. A ``group`` is one of all ranks; default: the
    run's.

    Raises:
        ParallelError: if a rank is lost.
    """
    parts: list[Any] | None = [None] * ranks.size if ranks.rank == 0 else None
    with ranks.talking_to(ranks.others):
        distributed.gather_object(pack(value), parts, group=group or ranks.everyone)
    return [unpack(part) for part in parts or ()]


class GradientSum:
    """Sums the gradients of parameters that several ranks have: over modules, mean over replicas.

    The ranks are ``members``; the parameters are of one dtype, in the same order on all.
    """

    def __init__(
        self, ranks: Ranks, group: Group, members: Sequence[int], parameters: list[nn.Parameter]
    ) -> None:
        self.parameters = parameters
        self._ranks, self._group, self._wire = ranks, group, ranks.wire(group)
        self._others = [rank for rank in members if rank != ranks.rank]

    def begin(self) -> tuple[Work, Tensor]:
        """Send this rank's gradients, in one message."""
        like = self.parameters[0]
        # First which there are: what has none anywhere is to have none after it, not zeros.
        parts = [torch.tensor([float(p.grad is not None) for p in self.parameters])]
        parts += [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([part.to(like.device, like.dtype).reshape(-1) for part in parts])
        flat = flat.to(self._wire)
        with self._ranks.talking_to(self._others):
            return distributed.all_reduce(flat, group=self._group, async_op=True), flat

    def end(self, work: Work, flat: Tensor) -> None:
        """Put the sums into ``.grad``."""
        self._ranks.wait(work, self._others, self._wire)
        sizes = [len(self.parameters), *(p.numel() for p in self.parameters)]
        there, *sums = torch.split(flat, sizes)
        for parameter, has_any, total in zip(self.parameters, there.tolist(), sums, strict=True):
            if has_any:
                mean = total.view_as(parameter) / self._ranks.num_replicas
                parameter.grad = mean.to(parameter.device)


def find_sums(network: Network, used: Sequence[set[int]], ranks: Ranks) -> Iterator[GradientSum]:
    """Yield this rank's sums of gradients: one for each set of ranks with common parameters.

    All ranks have to call this; ``used`` has the ids of the tensors that each module uses.
    """
    common: dict[tuple[tuple[int, ...], torch.dtype], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        users = tuple(k for k, ids in enumerate(used) if id(parameter) in ids)
        if len(users) * ranks.num_replicas > 1:
            common.setdefault((users, parameter.dtype), []).append(parameter)
    for users, _ in common:
        members = [rank for rank in range(ranks.size) if rank % ranks.count in users]
        group = ranks.new_group(members)  # by all ranks, members or not
        if ranks.rank in members:
            yield GradientSum(ranks, group, members, common[users, _])
