"""Drive a model through a schedule: which network runs in this step, and exact resume.

The driver asks the schedule for each step's Plan, rewrites the model once per distinct Plan (a
change of rate only writes a buffer), compiles it if asked, and hands the network out. It reads
nothing back from the device inside an epoch; what schedules learn from is read when it ends.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.analysis import capture_and_analyze
from ..compiler.local_modules import attach_modules
from ..compiler.pipeline import check_plans
from ..compiler.resolve import ResolvedPlan, resolve
from ..compiler.transform import release_gradients, rewrite, set_rate
from ..errors import PlanError
from ..ir.network import Network
from ..ir.random_state import prepare_random_state, random_state
from ..ops.ranks import Group, find_group
from ..ops.replay import ReplayBuffer
from ..plan import Plan
from ..schedules import LearningSchedule, Schedule, find_asked, find_plans
from ..schedules.base import check_plan, check_schedule
from . import epochs
from .cache.activation_cache import ActivationCache, cached
from .cache.refusals import refuse_uncacheable
from .checkpoint import all_or_nothing, find_fingerprint, identify, learned_schedule, refuse_foreign
from .compile import Compiler, How
from .losses import MeanLoss, own_rank
from .optimizers import check_optimizer, keep_off, refuse_without_heads, take_without
from .shrink import kept_channels, restoring

__all__ = ["Driver"]


class Driver:
    """Hands out the network of each step, by a schedule.

    Args:
        model: the model; its parameters are trained in place, so evaluate with it as usual.
        schedule: says which Plan holds in each epoch and step; the attribute is the driver's copy.
        optimizer: kept for `state_dict`, and kept off the prefix. Make that of local modules of
            `parameters`, and set the attribute afterwards.
        compile: options of `torch.compile`, for whole networks; "blocks", for equal blocks once;
            True, for what compiles less, see `explain`; "cudagraph", see `runtime.cudagraph`.
        example_inputs: as in `fxlocal.transform`: a tuple, or a dict, as in ``model(**batch)``.
        leaf_modules, process_group: as in `fxlocal.transform`.
        artifacts: a folder in which torch's compiled code is kept for the next process.
        cache: keeps what crosses the boundary of a frozen prefix; networks take ``sample_ids`` too.

    Attributes:
        epoch, step: the current epoch, and how many of its steps have begun; from 0.
        boundary: index of the current transition layer.
        history, losses: of each finished epoch, the boundary and the mean observed loss, or NaN.
        sign: 1, or -1 in an epoch whose local updates go backwards by weak supervision.
        how, group: ``compile`` as told, and the name of the process group, as of a `ResolvedPlan`.
        networks, resolved: each network and what runs it, and what its Plan means, by Plan.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if the model does not take such a batch.
        PlanError: if the schedule is none, or a resume could not tell it from another; a Plan that
            it can still produce does not fit the model; or the optimizer is none, of another model,
            or calls the forward several times in a step.

    Example:
        >>> from fxlocal import schedules
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> driver = Driver(model, schedules.Static(epochs=4), optimizer=optimizer)
        >>> for epoch in range(driver.epoch, 4):
        ...     driver.start_epoch()
        ...     loss = driver.network()(torch.ones(3, 4)).square().mean()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     driver.observe(loss); driver.end_epoch()
        >>> driver.history
        [0, 0, 1, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        compile: How = False,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] = (),
        leaf_modules: tuple[type[nn.Module], ...] = (),
        process_group: Group = None,
        artifacts: str | os.PathLike[str] | None = None,
        cache: ActivationCache | None = None,
    ) -> None:
        check_schedule("schedule", schedule)
        self._identity = identify(schedule)  # before it learns, or keeps what it has found
        self.model, self.group, self.cache = model, find_group(process_group), cache
        self.schedule = copy.deepcopy(schedule)
        self._compile, self.how = Compiler(compile, artifacts), compile
        self._captured_with = example_inputs, leaf_modules
        self.epoch, self.step, self.history, self.losses = 0, 0, list[int](), list[float]()
        self._capture()
        self._before, self._loss = list[Tensor](), MeanLoss()  # the first: of the transition layer
        self._prefix = list[nn.Parameter]()  # what no gradient moves in this step
        self._started, self._emitted_at = False, 0  # whether an epoch has begun and not ended
        self._has_heads = (plan := self._plan()).modules is not None
        self._refuse_unfit()
        self.boundary = self._resolve(plan).boundary
        attach_modules(self.captured, self.analysis, self._resolve(plan))
        self.optimizer = optimizer

    def _capture(self) -> None:
        """Capture the model as it is now; forget all networks."""
        self.captured, self.analysis = capture_and_analyze(self.model, *self._captured_with)
        self._kept = kept_channels(self.model)
        self.resolved: dict[Plan, ResolvedPlan] = {}
        self.networks: dict[Plan, tuple[Network, Callable[..., Any]]] = {}
        self._current: Any = (None,) * 3  # the last step's Plan, network and callable

    def follow_cuts(self) -> None:
        """Capture the model anew if channels of it were cut since, as `start_epoch` does."""
        if kept_channels(self.model) != self._kept:
            if self._has_heads:
                reason = "with local modules, whose heads have the old shapes"
                raise PlanError(f"channels were cut in a model {reason}: make a new Driver")
            before, go_on = self.captured.meta, ("reducer", "micro_batches")
            self._capture()
            self.captured.meta |= {name: before[name] for name in go_on if name in before}

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, whose steps leave the prefix of the network in use alone."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._set_optimizer(optimizer)

    def _set_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            check_optimizer(optimizer, self.parameters())
            if self._prefix:
                keep_off(optimizer, self._prefix, self.model, while_alive=self)
            take_without(optimizer, self.heads)
        self._optimizer = optimizer

    @property
    def heads(self) -> nn.ModuleList:
        """The heads of local modules, the same in all networks; empty without any."""
        return self.captured.fxlocal.heads or nn.ModuleList()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's parameters, then those of the heads: all that an optimizer moves."""
        yield from dict.fromkeys((*self.model.parameters(), *self.heads.parameters()))

    @property
    def sign(self) -> int:
        """The direction of this epoch's local updates (LoCal+SGD, Algorithm 2)."""
        rose = len(self.losses) > 1 and self.losses[-2] < self.losses[-1]
        return -1 if rose and getattr(self.schedule, "weak_supervision", False) else 1

    def start_epoch(self) -> None:
        """Begin an epoch: set its boundary and make its first network.

        Warns of an epoch past the end of the schedule, which keeps its last boundary.

        Raises:
            PlanError: if its first Plan does not fit the model, or the optimizer lacks heads.
            RuntimeError: if an epoch was begun, and steps taken in it, that has not ended.
        """
        epochs.refuse_unended(self.epoch, self.step if self._started else 0)
        epochs.warn_if_past(self.schedule, self.epoch)
        self.follow_cuts()
        refuse_without_heads(self.optimizer, self.heads)
        self.step, self._loss = 0, MeanLoss()
        plan = self._plan()
        self.boundary = self._resolve(plan).boundary
        if self.boundary != self._emitted_at:
            epochs.release(used for _, used in self.networks.values())
            self._emitted_at = self.boundary
        self._network_of(plan)
        self._before = epochs.copies_of(self._watched())
        self._started = True

    def network(self) -> Callable[..., Any]:
        """Return the network of the next step; call it once per step.

        It is a GraphModule, or what compiles, captures or caches one.
        """
        epochs.warn_of_evaluation(self.model)
        plan, (last, network, used) = self._plan(), self._current
        if plan is not last or not self.networks:  # a hash takes microseconds
            now, (network, used) = network, self._network_of(plan)
            self._current = plan, network, used
            if network is not now:
                self._prefix[:] = release_gradients(network)
                if self.optimizer is not None:
                    keep_off(self.optimizer, self._prefix, self.model, while_alive=self)
        vars(network)["place"], self.step = (self.epoch, self.step), self.step + 1
        set_rate(network, self.sign * plan.rate, [self.sign * rate for rate in plan.rates])
        return used  # type: ignore[no-any-return]

    def explain(self) -> str:
        """Say how networks are compiled, what the cache keeps, and why."""
        return self._compile.explain() + (f"\n{self.cache.explain()}" if self.cache else "")

    def observe(self, loss: Tensor) -> None:
        """Add one step's loss to the epoch's mean, on its device and without waiting for it.

        Raises:
            ValueError: if the loss is no tensor of one element.
        """
        self._loss.observe(loss, getattr(self.captured.meta.get("reducer"), "share", 1.0))

    def end_epoch(self) -> None:
        """End an epoch: record its boundary and mean loss, and let the schedule learn from it.

        All ranks have to call it, as they take their mean together. Warns of updates that were
        left out because a user's rule returned NaN or inf.

        Raises:
            RuntimeError: if the epoch was not begun; nothing has been changed then.
        """
        if not self._started:
            raise RuntimeError(
                f"end_epoch() of epoch {self.epoch}, which was not begun: call start_epoch() first"
            )
        mean = self._loss.mean(self.model.parameters())
        norm = epochs.update_norm(self._watched(), self._before)
        if isinstance(self.schedule, LearningSchedule):
            self.schedule.end_epoch(self.analysis, norm, mean)
        self.history.append(self.boundary)
        self.losses.append(mean)
        ended, self.epoch, self._started = self.epoch, self.epoch + 1, False
        self.step, self._loss, self._current = 0, MeanLoss(), (None,) * 3
        self._prefix.clear()
        self.boundary = self._resolve(self._plan()).boundary
        self._compile.save()
        networks = {plan: network for plan, (network, _) in self.networks.items()}
        epochs.warn_of_skipped(networks, ended)

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs, between any two steps.

        The model's, the heads' and the optimizer's state, the batches in replay buffers, the epoch
        with its steps and their losses, the histories and the state of every random generator
        (torch's on each device, numpy's and Python's). Gradients are not part of it. Safe to load
        with ``torch.load(..., weights_only=True)``.
        """
        learned = self.schedule.state_dict() if isinstance(self.schedule, LearningSchedule) else {}
        return {
            "fingerprint": self._fingerprint(),
            "epoch": self.epoch,
            "history": list(self.history),
            "losses": list(self.losses),
            "schedule": learned,
            "kept": kept_channels(self.model),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "replay": [buffer.batches() for buffer in self._replay_buffers()],
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "random": random_state(),
            "step": self.step,
            "started": self._started,
            "observed": self._loss.state(),
            "before": [tensor.clone() for tensor in self._before],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, with the channels cut that were cut there.

        Inside an epoch, where ``step`` is not 0, do so without `start_epoch`.

        Raises:
            CheckpointError: if the state is of another model, optimizer or schedule, or cannot be
                taken up; nothing has been changed then.
        """
        self.follow_cuts()
        with restoring(self.captured, state, self.optimizer, self.follow_cuts):
            refuse_foreign(state, self._fingerprint())
            schedule = learned_schedule(self.schedule, state["schedule"])
            with all_or_nothing(self.model, self.heads, self.optimizer):
                restore_random = prepare_random_state(state["random"])
                epoch, step = int(state["epoch"]), int(state.get("step", 0))
                history, losses = list(state["history"]), list(state["losses"])
                observed, before = MeanLoss(*state.get("observed", ())), state.get("before", ())
                plan = schedule.plan(self.analysis, epoch, 0, own_rank())
                boundary = self._resolve(plan).boundary
                if state["model"] is not None:  # else it is saved by someone else
                    self.model.load_state_dict(state["model"])
                self.heads.load_state_dict(state.get("heads", {}))  # older ones have none
                if self.optimizer is not None and state["optimizer"] is not None:
                    self.optimizer.load_state_dict(state["optimizer"])
                batches = [[(told, used) for told, used in one] for one in state.get("replay", ())]
                for buffer, one in zip(self._replay_buffers(), batches, strict=False):
                    buffer.refill(one)
        self.epoch, self.step, self.boundary = epoch, step, boundary
        self.history, self.losses = history, losses
        self.schedule, self._started = schedule, bool(state.get("started", False))
        self._current, self._loss, self._before = (None,) * 3, observed, list(before)
        self._prefix.clear()
        restore_random()

    def _replay_buffers(self) -> list[ReplayBuffer]:
        return [b for b in self.captured.fxlocal.replay or () if isinstance(b, ReplayBuffer)]

    def _plan(self) -> Plan:
        plan = self.schedule.plan(self.analysis, self.epoch, self.step, own_rank())
        check_plan(plan, f"the schedule {type(self.schedule).__name__} returned")
        return plan

    def _resolve(self, plan: Plan) -> ResolvedPlan:
        if (key := plan.with_rate(0.0)) not in self.resolved:
            self.resolved[key] = resolve(plan, self.analysis, self.group)
        return self.resolved[key]

    def _refuse_unfit(self) -> None:
        """Refuse a Plan to come that does not fit the model, as far as the schedule tells them."""
        plans = find_plans(self.schedule, self.analysis, self.epoch, own_rank())
        for plan in plans:
            epochs.refuse_late(plan, self.how, self._has_heads)
        check_plans(self.captured, resolved := [*map(self._resolve, plans)], self.analysis)
        self._compile.expect(self.captured, self.analysis, resolved)
        if self.cache is not None:
            refuse_uncacheable(self.cache, resolved, self.captured, self.schedule, self.analysis)
        asked = find_asked(self.schedule, self.analysis, plans)
        self.analysis.warn_if_far(repr(self.schedule), asked, stacklevel=3)

    def _watched(self) -> list[nn.Parameter]:
        """Return what the transition layer's weight is made of, if the schedule learns from it."""
        learns, at = isinstance(self.schedule, LearningSchedule), self.boundary
        return epochs.transition_weights(self.captured, self.analysis, at) if learns else []

    def _network_of(self, plan: Plan) -> tuple[Network, Callable[..., Any]]:
        epochs.refuse_late(plan, self.how, self._has_heads)
        if (key := plan.with_rate(0.0)) not in self.networks:
            network = rewrite(self.captured, self._resolve(plan), self.analysis)
            make = cached(self.cache, self._resolve(plan), self._compile)
            self.networks[key] = network, make(network)
        elif any(p.dtype.itemsize < 4 for p in self.networks[key][0].meta["prefix"]):  # a new rate
            check_plans(self.captured, [resolve(plan, self.analysis, self.group)], self.analysis)
        return self.networks[key]

    def _fingerprint(self) -> dict[str, Any]:
        self.follow_cuts()
        facts = self.analysis, self.captured, self._identity, self.optimizer
        return find_fingerprint(self.model, self.heads, *facts)
