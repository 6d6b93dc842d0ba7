# ruff: noqa: D102  # `Part` says what they are
"""The whole network on each of several ranks, which share each batch out: data parallel.

All ranks draw an epoch's batches whole, from the same generator, and take every so manieth image of
each. So a batch need not be a multiple of the ranks, and a run may go on on other ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ....compiler.ranks import describe, refuse_unlike, spread
from ....ir.random_state import random_state, restore_random_state
from ....parallel import replicate
from ....parallel.ranks import Ranks
from ...tracking import Step
from ..checkpoint import build_fingerprint
from ..measure import Cost
from ..processes import pack, unpack
from ..settings import Experiment
from .whole import OnStep, Whole

__all__ = ["Replica"]


class Replica(Whole):
    """The whole network on a rank, by any schedule; rank 0's running statistics are judged."""

    def __init__(
        self, timeout: float, experiment: Experiment, model: nn.Module, on_step: OnStep
    ) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.is_first = self.rank == 0
        self.ranks = Ranks(0, torch.device(experiment.machine.device), timeout)
        told = {**build_fingerprint(experiment), **describe(model)}
        refuse_unlike(told, distributed.group.WORLD, model)
        super().__init__(experiment, model, lambda step: on_step(self._whole(step)))
        replicate(self.driver)
        self.growth.ranks = self.size

    keeps_steps = False

    @property
    def step(self) -> int:
        return 0  # ranks differ by their buffers and generators inside an epoch

    def _whole(self, step: Step) -> Step:
        """Return what a step is of all ranks, whose mean loss none of them knows."""
        size = self.growth.batch_size
        return replace(step, loss=step.loss if self.size == 1 else None, batch_size=size)

    def train_epoch(self) -> Cost:
        """Take an epoch's steps; the costs are those of the rank with the most."""
        reducer = self.driver.captured.meta.get("reducer")
        before = reducer.sent_bytes if reducer else 0
        cost = super().train_epoch()
        return replace(cost, wire_bytes=reducer.sent_bytes - before if reducer else 0)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of each batch."""
        for x, y in super().batches():
            if (ids := self.stepper.sample_ids) is not None:
                self.stepper.sample_ids = ids[self.rank :: self.size]
            yield (
                self.experiment.machine.place(x[self.rank :: self.size]),
                y[self.rank :: self.size],
            )

    def most(self, amount: int) -> int:
        """Return the most that any rank has."""
        found = torch.tensor(amount)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def collect(self, checkpoint: bool) -> None:
        """Let all ranks go on as those will that begin with rank 0's checkpoint."""
        spread([*self.model.buffers()], distributed.group.WORLD)
        restore_random_state(unpack(_tell(pack(random_state()))))

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state, on rank 0."""
        return self.model.state_dict() if self.is_first else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return super().load_state_dict(unpack(_tell(pack(state))))

    def heartbeat(self) -> None:
        self.ranks.heartbeat()

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value; this waits as long as that goes on, evaluating say."""
        self.ranks.barrier()
        return _tell(value)


def _tell(value: Any) -> Any:
    """Return rank 0's value."""
    values = [value]
    distributed.broadcast_object_list(values, 0)
    return values[0]
