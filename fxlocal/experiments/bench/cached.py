"""An epoch with a cache of what a frozen prefix makes, beside what it stands between.

    sgd        plain training
    uncached   the prefix frozen, norm="eval", computed in each step
    cold       the epoch that fills a cache
    warm       an epoch that reads it
    limit      the rest of the network alone, on values that lie in memory batch by batch

All take turns of one epoch, in one process, each with its own copy of the model; samples are
shuffled anew in each turn, but for the limit's.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.nodes import unwrapped
from ...ir.stages import find_halves
from ...plan import Freeze, LocalPrefix, Plan
from ...runtime.cache.activation_cache import ActivationCache
from ...runtime.driver import Driver
from ...schedules import Constant
from ..training.objective import loss_of
from .spread import find_spread, ratios
from .turns import Job, refuse_none, take_turns, time_call
from .variants import small_steps

__all__ = ["COMPARED", "bench_cache"]

COMPARED = ("sgd", "uncached", "limit")  # with which each is


def bench_cache(
    job: Job,
    boundaries: Sequence[str | int | float],
    budget: str,
    *,
    folder: Path | None = None,
    batches: int = 16,
    repeats: int = 5,
    on_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure epochs of ``batches`` batches of random images, for a prefix up to each boundary.

    Args:
        job: what to train, where.
        boundaries: as `fxlocal.LocalPrefix` takes them.
        budget: bytes of the cache.
        folder: for what is more.
        batches: that an epoch has.
        repeats: rounds measured.
        on_turn: called with a name when its turn comes.

    Raises:
        PlanError: if a boundary does not fit the model, or its prefix cannot be kept.
        SettingsError: if there is nothing to repeat.
    """
    refuse_none(repeats=repeats, batches=batches)
    size, generator = len(job.x), torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, *job.x.shape[1:], generator=generator).to(job.x)
    y = job.y.repeat(batches)
    edges = dict.fromkeys(job.analysis.boundary(until) for until in boundaries)
    measured = [
        _measure(job, x, y, edge, budget, folder, partial(take_turns, repeats=repeats), on_turn)
        for edge in edges
    ]
    facts = {**job.describe(), "num_images": len(x), "repeats": repeats}
    rows = [row for found, _ in measured for row in found]
    return facts | {"rows": rows, "cache": [text for _, text in measured]}


def _measure(
    job: Job,
    x: Tensor,
    y: Tensor,
    boundary: int,
    budget: str,
    folder: Path | None,
    take: Callable[..., dict[Any, list[float]]],
    on_turn: Callable[[str], object],
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of one boundary, and what its cache says."""
    frozen = Plan(local=LocalPrefix(boundary, Freeze(), norm="eval"))
    filled, read = (ActivationCache(budget, folder) for _ in range(2))
    ways: dict[str, _Epochs] = {
        "sgd": _Epochs(job, x, y, Plan()),
        "uncached": _Epochs(job, x, y, frozen),
        "cold": _Epochs(job, x, y, frozen, filled, drops=True),
        "warm": _Epochs(job, x, y, frozen, read),
        "limit": _Rest(job, x, y, frozen),
    }
    device, turns = torch.device(job.machine.device), dict[str, Callable[[], float]]()
    for name, way in ways.items():
        on_turn(f"{name}, boundary {boundary}")
        way.take()
        turns[name] = partial(time_call, way.take, device)
    found = take(turns, on_turn=lambda name: on_turn(f"{name}, boundary {boundary}"))
    rows = [
        {
            "name": name,
            "boundary": boundary if name != "sgd" else 0,
            **find_spread(
                seconds=own, **{f"of_{other}": ratios(own, found[other]) for other in COMPARED}
            ),
        }
        for name, own in found.items()
    ]
    text = read.explain()
    filled.drop()
    read.drop()
    return rows, text


class _Epochs:
    """Epochs of a copy of the job's model by one Plan."""

    def __init__(
        self,
        job: Job,
        x: Tensor,
        y: Tensor,
        plan: Plan,
        cache: ActivationCache | None = None,
        drops: bool = False,
    ) -> None:
        self.job, self.x, self.y, self.cache, self.drops = job, x, y, cache, drops
        model = copy.deepcopy(job.model)
        self.driver = Driver(
            model, Constant(plan), compile=job.machine.compile, example_inputs=(job.x,), cache=cache
        )
        self.optimizer = self.driver.optimizer = small_steps(model.parameters())

    def take(self) -> None:
        """Train for an epoch."""
        if self.cache is not None and self.drops:
            self.cache.drop()
        self.driver.start_epoch()
        for step, ids in enumerate(self._order()):
            network = self.driver.network()
            with self.job.machine.autocast():
                loss = loss_of(self._output(network, step, ids), self.y[ids])
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.driver.observe(loss)
        self.driver.end_epoch()

    def _order(self) -> Iterable[Tensor]:
        return torch.split(torch.randperm(len(self.x)), len(self.job.x))

    def _output(self, network: Callable[..., Any], step: int, ids: Tensor) -> Any:
        told = {} if self.cache is None else {"sample_ids": ids}
        return network(self.x[ids], **told)


class _Rest(_Epochs):
    """Epochs of what lies behind the boundary alone."""

    _values: Sequence[tuple[Any, ...]] = ()

    def _order(self) -> Iterable[Tensor]:
        return torch.split(torch.arange(len(self.x)), len(self.job.x))

    def _output(self, network: Callable[..., Any], step: int, ids: Tensor) -> Any:
        if not self._values:
            whole = unwrapped(network)
            start = self.driver._resolve(whole.history.plan).start
            halves = find_halves(whole, start)
            self._behind, self._takes_inputs = halves.behind, bool(halves.others)
            with torch.no_grad(), self.job.machine.autocast():
                self._values = [halves.before(self.x[own]) for own in self._order()]
        others = (self.x[ids],) if self._takes_inputs else ()
        return self._behind(*self._values[step], *others)
