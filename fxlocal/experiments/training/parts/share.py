# ruff: noqa: D102  # `Part` says what they are
"""One local module of the network, in a process of its own."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ....compiler.analysis import Analysis
from ....ir.random_state import random_state, restore_random_state
from ....parallel import ModelParallel
from ....parallel.ranks import Group
from ....parallel.sharing import gather
from ...tracking import Step
from ..measure import Cost, EpochClock, analyze_on, count_saved_bytes
from ..processes import EVALUATION, pack, unpack
from ..recipe.augment import training_batches
from ..settings import Experiment
from .whole import OnStep

__all__ = ["Share"]


class Share:
    """One local module of the network, on a rank of its own."""

    keeps_steps, step = False, 0

    def __init__(
        self,
        num_steps: int,
        nproc: int,
        timeout: float,
        experiment: Experiment,
        model: nn.Module,
        on_step: OnStep,
    ) -> None:
        plan = experiment.schedule.fixed  # type: ignore[attr-defined]  # checked
        self.experiment, self.num_steps, self.on_step = experiment, num_steps, on_step
        self.rank, count = distributed.get_rank(), plan.modules.count
        self.is_first, self.epoch = self.rank == 0, 0
        self.replica, self.num_replicas = self.rank // count, nproc // count
        self.reads = self.rank % count == 0
        self.last_ranks = range(count - 1, nproc, count)
        self._judged = copy.deepcopy(model) if self.is_first else None
        size = experiment.settings.batch_size // self.num_replicas
        self.network = ModelParallel(model, plan, experiment.example[:size], timeout=timeout)
        self.control: Group = distributed.new_group(backend="gloo", timeout=EVALUATION)
        self.state: dict[str, Tensor] | None = None
        self.notes: list[Any] | None = None

    def analyze(self) -> Analysis:
        assert self._judged is not None
        return analyze_on(self._judged, self.experiment.example)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def train_epoch(self) -> Cost:
        """Take an epoch's steps; sum up on rank 0."""
        device, num_steps = torch.device(self.experiment.machine.device), self.num_steps
        self.clock = timer = EpochClock(device)
        total, saved_bytes = torch.zeros((), device=device), 0
        for step, batch in enumerate(self._batches()):
            if step == 0 and device.type == "cpu":
                with count_saved_bytes(self.network.network, *batch) as count:
                    total += self._step(step, batch)
                saved_bytes = count()
            else:
                total += self._step(step, batch)
        self.network.synchronize()
        seconds, _ = timer.stop(num_steps)
        saved_bytes = timer.peak_bytes() or saved_bytes
        self.epoch += 1
        loss = float(total) / max(num_steps, 1)
        costs = gather((loss, saved_bytes), self.network.ranks, self.control)
        if self.is_first:
            loss = sum(costs[r][0] for r in self.last_ranks) / self.num_replicas
            saved_bytes = max(count for _, count in costs)
        return Cost(loss, saved_bytes, seconds, self.experiment.settings.batch_size, num_steps)

    def _step(self, index: int, batch: tuple[Tensor, ...]) -> Tensor | float:
        with self.experiment.machine.autocast():
            loss = self.network.step(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        rate, size = self.optimizer.param_groups[0]["lr"], self.experiment.settings.batch_size
        known = loss if self.rank in self.last_ranks and self.num_replicas == 1 else None
        self.on_step(Step(self.epoch, known, rate, 0, size, index, self.num_steps))
        return 0.0 if loss is None else loss

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield this replica's share of each batch in module 0, and nothing so often elsewhere."""
        if not self.reads:
            yield from [()] * self.num_steps
            return
        mine = slice(self.replica, None, self.num_replicas)
        size = self.experiment.settings.batch_size
        for x, y in training_batches(self.experiment, size, self.epoch):
            yield self.experiment.machine.place(x[mine]), y[mine]

    def collect(self, checkpoint: bool) -> None:
        """Bring the weights, and what each rank needs to go on exactly, to rank 0."""
        own = None
        if checkpoint:
            own = {"optimizer": self.optimizer.state_dict(), "random": random_state()}
        self.notes = gather(own, self.network.ranks, self.control)
        self.state = self.network.gather_state()

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state, without the heads', on rank 0."""
        names = self.network.network.source_model.state_dict()
        return self.state and {name: self.state[name] for name in names}

    def judged(self) -> nn.Module:
        assert self._judged is not None
        self._judged.load_state_dict(self.weights() or {})
        return self._judged

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.state, "ranks": self.notes, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        given = dict(state or {})
        self.network.load_state_dict(given.pop("model", None))
        content: dict[str, Any] = unpack(self.from_first(pack(given)))
        mine = content["ranks"][self.rank]
        self.optimizer.load_state_dict(mine["optimizer"])
        restore_random_state(mine["random"])
        self.epoch = content["epoch"]
        return content

    def heartbeat(self) -> None:
        self.network.ranks.heartbeat()

    def from_first(self, value: Any) -> Any:
        values, ranks = [value], self.network.ranks
        ranks.barrier()
        with ranks.talking_to(ranks.others):
            distributed.broadcast_object_list(values, 0, group=self.control)
        return values[0]
