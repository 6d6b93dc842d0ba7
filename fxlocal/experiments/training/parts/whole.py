# ruff: noqa: D102  # `Part` says what they are
"""The whole network in one process."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ....compiler.analysis import Analysis
from ....compiler.resolve import boundary_of
from ....errors import CheckpointError
from ....ir.random_state import random_state, restore_random_state
from ....plan import Plan
from ....runtime.cache.activation_cache import ActivationCache
from ....runtime.driver import Driver
from ...tracking import Step
from ..growth import build_growth, scaled_rates
from ..measure import Cost, EpochClock
from ..objective import find_loss
from ..recipe.augment import training_batches
from ..recipe.cached import cached_batches
from ..settings import Experiment, count_steps
from .stepper import Stepper

__all__ = ["OnStep", "Whole"]

OnStep: TypeAlias = Callable[[Step], None]


class Whole:
    """The whole network in one process, by any schedule."""

    is_first = keeps_steps = True

    def __init__(self, experiment: Experiment, model: nn.Module, on_step: OnStep) -> None:
        self.experiment, self.model, self.on_step = experiment, model, on_step
        machine, settings, example = experiment.machine, experiment.settings, experiment.example
        self.device = torch.device(machine.device)
        compile: Any = "cudagraph" if machine.cudagraph else machine.compile
        if compile is True and settings.grows:
            # Else the second batch size would compile a network for any, which is slower.
            compile = {"dynamic": False}
        cache = None if experiment.cache is None else ActivationCache(experiment.cache)
        told: dict[str, Any] = {"compile": compile, "cache": cache}
        self.driver = Driver(model, experiment.schedule, example_inputs=(example,), **told)
        self.stepper = Stepper(
            self.driver,
            machine,
            experiment.data.task,
            experiment.modulation,
            find_loss(experiment.goal),
            settings.accumulate,
        )
        self.average = None
        if settings.ema is not None:
            decay = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=decay)
        self.growth = build_growth(self.driver, experiment, self.stepper.stages)
        self.growth.ranks = settings.accumulate  # parts of a batch are in memory one by one
        self.compiled: set[tuple[Plan, int]] = set()
        self.clock = EpochClock(self.device)
        self._within: dict[str, Any] = {}  # what the epoch has come to; of a checkpoint inside it
        self._num_steps = count_steps(experiment.data, 1)  # of the epoch, from its begin on
        self._rates: list[float] = []  # of the optimizer, before the batch scales them

    @property
    def epoch(self) -> int:
        return self.driver.epoch

    @property
    def step(self) -> int:
        return self.driver.step if self.driver.step < self._num_steps else 0

    def analyze(self) -> Analysis:
        return self.driver.analysis

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = self.driver.optimizer = optimizer
        self.stepper.use(optimizer, self.experiment.example)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.driver.parameters()

    def train_epoch(self) -> Cost:
        driver, growth = self.driver, self.growth
        self.model.train()
        plans, boundaries = self._plans()
        steps = range(count_steps(self.experiment.data, growth.start_epoch(min(boundaries))))
        self._num_steps = len(steps)
        most = min(steps, key=lambda i: (boundaries[i], len(plans[i].weight_grads)), default=0)
        predicted = growth.predict(boundaries[most], growth.batch_size)
        self.clock = timer = EpochClock(self.device)
        with timer.compiling():
            if not driver.step:
                driver.start_epoch()
        if within := self._within:
            timer.go_on(within)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        with scaled_rates(self.optimizer, growth.rate_factor(self.experiment.settings.grow_lr)):
            saved_bytes = self._run_steps(plans, boundaries, most, predicted, timer)
        flops = sum(cost.flops for cost in driver.analysis.costs or ())
        saved_bytes = self.most(timer.peak_bytes() or saved_bytes)
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self._within = {}
        growth.end_epoch(boundaries[most], saved_bytes, self.most(held))
        driver.end_epoch()
        with timer.compiling():
            if self.stepper.end_epoch():
                self._follow_cuts()
        seconds, compile_seconds = timer.stop(len(steps))
        return Cost(
            loss=driver.losses[-1],
            saved_bytes=saved_bytes,
            seconds=seconds,
            batch_size=growth.batch_size,
            num_steps=len(steps),
            compile_seconds=compile_seconds,
            boundary=driver.history[-1],
            predicted_bytes=predicted,
            rule=plans[0].local.rule if plans[0].local else None,
            flops=flops // self.experiment.settings.batch_size,
            work=self._work(plans, boundaries),
        )

    def _work(self, plans: list[Plan], boundaries: list[int]) -> str:
        """Return what the steps computed, as a text that others' are equal to if they did the same.

        A prefix of no layers is none, and paths and fractions of one boundary are the same.
        """
        if self.driver.cache and any(boundaries):
            return ""  # it may have been read or filled
        meant = Counter(
            repr(replace(plan, local=replace(plan.local, until=at) if at and plan.local else None))
            for plan, at in zip(plans, boundaries, strict=True)
        )
        settings = asdict(self.experiment.settings) | {"lr": None, "epochs": None}
        told = meant, settings, self.experiment.modulation, self.stepper.prune is None
        return sha256(repr(told).encode()).hexdigest()[:8]

    def _follow_cuts(self) -> None:
        self.compiled.clear()
        self.growth.follow(self.driver, self.experiment)

    def _plans(self) -> tuple[list[Plan], list[int]]:
        """Return the Plan and the boundary of each step that the epoch may have."""
        driver, analysis = self.driver, self.driver.analysis
        plans = [
            driver.schedule.plan(analysis, driver.epoch, step).with_rate(0.0)
            for step in range(max(self.experiment.num_steps, 1))
        ]
        return plans, [boundary_of(plan, analysis) for plan in plans]

    def _run_steps(
        self, plans: list[Plan], bounds: list[int], widest: int, predicted: int, timer: EpochClock
    ) -> int:
        """Take the epoch's steps; return the bytes of step ``widest``, but for a GPU's."""
        saved_bytes, machine = int(self._within.get("saved_bytes", 0)), self.experiment.machine
        for step, (x, y) in self._batches_left():
            network = plans[step], len(x)
            compiles = (machine.compile or machine.cudagraph) and network not in self.compiled
            with timer.compiling(steps=1) if compiles else nullcontext():
                if step == widest:
                    loss, saved_bytes = self.stepper.measure_or(predicted, x, y)
                    self.growth.refuse_small_budget(saved_bytes)
                else:
                    loss = self.stepper.take(x, y)
                self._update()
                self.driver.observe(loss)
            if compiles:
                self.compiled.add(network)
            if step == widest:
                self.growth.refuse_small_budget(timer.peak_bytes())  # backward takes the most
            rate = self.optimizer.param_groups[0]["lr"]
            self._within = {"saved_bytes": saved_bytes}
            where = bounds[step], len(x), step, self._num_steps
            self.on_step(Step(self.driver.epoch, loss, rate, *where))
        return saved_bytes

    def _update(self) -> None:
        """Let the optimizer take the step whose gradients are there."""
        if (clip := self.experiment.settings.clip) is not None:
            nn.utils.clip_grad_norm_(self.driver.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _batches_left(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield the steps to come and their batches; those that were taken are drawn again."""
        drawn = enumerate(self.batches())
        if self.driver.step:
            state = random_state()
            for _ in range(self.driver.step):
                next(drawn)
            restore_random_state(state)
        return drawn

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what each step of the epoch takes."""
        told = self.experiment, self.growth.batch_size, self.driver.epoch
        if self.driver.cache is None:
            yield from training_batches(*told)
        else:
            for x, y, self.stepper.sample_ids in cached_batches(*told):
                yield x, y

    def most(self, amount: int) -> int:
        """Return the most that any process has."""
        return amount

    def collect(self, checkpoint: bool) -> None:
        """Do nothing: all is here."""

    def judged(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        state = {name: vars(self)[name].state_dict() for name in self._parts()}
        if self.driver.step:
            state["within"] = self._within | self.clock.state()
            groups = state["driver"]["optimizer"]["param_groups"]
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
        return state

    def _parts(self) -> list[str]:
        own = ("driver", "growth", "stepper", "average")
        return [name for name in own if vars(self)[name] is not None]

    def load_state_dict(self, state: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert state is not None
        if missing := [name for name in self._parts() if name not in state]:
            raise CheckpointError(f"the checkpoint has no {', '.join(missing)}")
        self._within = dict(state.get("within", ()))
        for name in self._parts():
            vars(self)[name].load_state_dict(state.get(name, ()))
        if self.stepper.prune is not None:
            self._follow_cuts()
        return state

    def heartbeat(self) -> None:
        """Do nothing: nobody waits."""

    def from_first(self, value: Any) -> Any:
        return value
