"""Step time and memory of any Schedule beside plain SGD, on random data.

All take turns in one process, eager, compiled and replayed as CUDA graphs side by side; each has
its own copy of the model. A turn is the same number of steps for all, in which every schedule ends
where it began.

A schedule that cycles over steps hands out a network per *column*, which is a distinct Plan. Each
column has a variant of its own that stays with it, so that the cost of switching can be told
apart::

    switching = seconds per step of the cycling variant / mean of its columns over a period - 1

Memory is the most kept for backward at a time: counted where the network is eager, of prefixes
predicted where it is compiled; on a GPU, the peak during a turn.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from ...compiler.pipeline import check_plans
from ...compiler.resolve import resolve
from ...compiler.split import find_split, find_units
from ...errors import NoEffectWarning
from ...plan import (
    Checkpoint,
    Freeze,
    Hebbian,
    InfoProHead,
    LinearHead,
    LocalModules,
    LocalPrefix,
    Plan,
)
from ...schedules import Constant, Schedule
from ...schedules.base import Facts, Horizon, horizon_of
from ..training.parts.stepper import Stepper
from .spread import find_spread, ratios
from .turns import Job, Mode, refuse_none, take_turns
from .variants import Noised, Summed, Variant

__all__ = ["Entry", "bench_steps", "prefixes"]


@dataclass(frozen=True)
class Entry:
    """What is to be measured: a name, and the Plans of a schedule.

    With ``summed``, the losses of local modules are added up and back-propagated at the end, which
    saves nothing; with ``noised``, what stochastic depth leaves out is computed all the same.
    """

    name: str
    schedule: Schedule
    summed: bool = False
    noised: bool = False

    @property
    def stepper(self) -> type[Stepper]:
        """What takes its steps."""
        return Summed if self.summed else Noised if self.noised else Stepper


def prefixes(
    job: Job, boundaries: Sequence[str | int | float], norm: Literal["train", "eval"] = "train"
) -> list[Entry]:
    """Return a local and a frozen prefix up to each boundary.

    Args:
        job: whose model has the boundaries.
        boundaries: paths, layer indices or fractions, as `fxlocal.LocalPrefix` takes them.
        norm: batch norms of the prefix use batch ("train") or running statistics.

    Raises:
        PlanError: if a boundary does not fit the model.
    """
    found = dict.fromkeys(job.analysis.boundary(until) for until in boundaries)
    return [
        Entry(name, Constant(Plan(local=LocalPrefix(boundary, rule, norm))))
        for boundary in found  # two fractions may mean one block edge
        for name, rule in (("local", Hebbian()), ("freeze", Freeze()))
    ]


def bench_steps(
    job: Job,
    entries: Sequence[Entry],
    *,
    epoch: int = 0,
    repeats: int = 10,
    on_turn: Callable[[str], object] = lambda name: None,
    **facts: Any,
) -> dict[str, Any]:
    """Measure training steps by each schedule, and by plain SGD.

    Args:
        job: what to train, where; with ``compile`` and ``cudagraph``, such variants stand beside
            the eager ones, of the schedules that can.
        entries: names and schedules; SGD comes first without being named.
        epoch: whose Plans are measured.
        repeats: rounds measured.
        on_turn: called with mode and name when a turn comes.
        facts: what more to record.

    Returns:
        What ran, where; "rows": one dict per mode and entry; "columns": one per mode, entry and
        distinct Plan of an entry that has several. Ready for JSON.

    Raises:
        PlanError: if a Plan does not fit the model; like
        SettingsError: if there is nothing to repeat; both before anything is measured.
    """
    refuse_none(repeats=repeats)
    plain = Entry("sgd", Constant(Plan()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # the rows say what stays exact
        others = [entry for entry in entries if entry.name != "sgd"]
        told = [_Contestant(entry, job, epoch) for entry in (plain, *others)]
        steps = math.lcm(*(len(one.plans) for one in told))
        asked: dict[Mode, bool] = {"eager": True, "compiled": job.machine.compile}
        asked["cudagraph"] = job.machine.cudagraph
        groups = [
            _Group(mode, [one for one in told if one.runs(mode)], job, steps)
            for mode in asked
            if asked[mode]
        ]
        variants = [variant for group in groups for variant in group.variants]
        names = {variant: f"{variant.mode} {variant.name}" for variant in variants}
        for variant in variants:
            on_turn(names[variant])
            variant.prepare()
        turns = {variant: variant.time_turn for variant in variants}
        take_turns(turns, repeats, lambda variant: on_turn(names[variant]))
    return {
        **job.describe(),
        "steps": steps,
        "repeats": repeats,
        **facts,
        "rows": [group.row(one) for group in groups for one in group.entries],
        "columns": [row for group in groups for row in group.columns()],
    }


@dataclass(frozen=True)
class _Cycle:
    """The Plans of one epoch, over and over."""

    plans: tuple[Plan, ...]

    def plan(self, analysis: Facts, epoch: int, step: int = 0, rank: int = 0) -> Plan:
        """Return the Plan of ``step``."""
        return self.plans[step % len(self.plans)]

    def horizon(self) -> Horizon:
        """Return after how many steps the Plans repeat."""
        return Horizon(period=len(self.plans))


class _Contestant:
    """An entry on the job's model: its Plans of one period, and what they mean there."""

    def __init__(self, entry: Entry, job: Job, epoch: int) -> None:
        analysis, schedule = job.analysis, entry.schedule
        self.entry, self.name = entry, entry.name
        horizon = horizon_of(schedule)
        steps = range(horizon.start, horizon.start + horizon.period)
        plans = tuple(schedule.plan(analysis, epoch, step) for step in steps)
        distinct = tuple(dict.fromkeys(plans))
        self.columns, self.plans = (distinct, plans) if len(distinct) > 1 else ((), distinct)
        resolved = [resolve(plan, analysis) for plan in distinct]
        check_plans(job.captured, resolved, analysis)
        boundary = max(one.boundary for one in resolved)
        approximated = {layer.path for one in resolved for layer, _ in one.approximations}
        self.stages = distinct[0].modules or distinct[0].checkpoint
        self.predicted = None
        drops = [plan.drop for plan in distinct if plan.drop]
        unsteady = any(drop.mode == "block" or drop.replace for drop in drops)
        self.can_compile = entry.stepper is Stepper and not unsteady
        if not (self.stages or approximated or drops):  # of these the analysis knows nothing
            self.predicted = analysis.saved_bytes(min(one.boundary for one in resolved))
        self.facts = {
            "boundary": boundary,
            "path": analysis.layers[boundary].path,
            **_describe_stages(self.stages, job, entry),
            "num_layers": len(approximated),
            "exact_layers": list(dict.fromkeys(path for one in resolved for path in one.exact)),
        }

    def runs(self, mode: Mode) -> bool:
        """Whether it can: CUDA graphs hold no backward, and no second forward."""
        return mode == "eager" or (self.can_compile and not (self.stages and mode == "cudagraph"))


def _describe_stages(
    stages: LocalModules | Checkpoint | None, job: Job, entry: Entry
) -> dict[str, Any]:
    """Say which method of local modules it is, or checkpointing, and how many blocks each has."""
    if stages is None:
        return dict.fromkeys(("method", "modules", "link", "split", "head", "balance"))
    starts = find_split(job.analysis, stages)
    units = find_units(job.analysis, several=isinstance(stages, Checkpoint))
    split = [b - a for a, b in pairwise((*map(units.index, starts), len(units)))]
    method, link, head = "checkpoint", 0, None
    if isinstance(stages, LocalModules):
        link, head = stages.link, "linear" if isinstance(stages.head, LinearHead) else "conv"
        method = "backlink" if link else "dgl" if stages.replay else "greedy"
        if isinstance(stages.head, InfoProHead):
            method = "infopro"
    facts = {"method": "summed" if entry.summed else method, "modules": stages.count}
    return facts | {"link": link, "split": split, "head": head, "balance": stages.balance}


class _Group:
    """All variants of one mode."""

    def __init__(self, mode: Mode, entries: Sequence[_Contestant], job: Job, steps: int) -> None:
        self.mode, self.entries = mode, entries
        build = partial(Variant, job=job, mode=mode, steps=steps)
        self.own = {
            one: build(one.name, schedule=_Cycle(one.plans), stepper=one.entry.stepper)
            for one in entries
        }
        self.plain = self.own[entries[0]]
        self.constant = {Plan(): self.plain}  # variants that stay with one Plan
        for one, variant in self.own.items():
            if not one.columns and one.entry.stepper is Stepper:
                self.constant.setdefault(one.plans[0], variant)
            for plan in one.columns:
                if plan not in self.constant:
                    name = f"{one.name}, column {one.plans.index(plan)}"
                    self.constant[plan] = build(name, schedule=Constant(plan))
        self.variants = list(dict.fromkeys((*self.own.values(), *self.constant.values())))

    def row(self, one: _Contestant) -> dict[str, Any]:
        """Sum up an entry."""
        row = self._measured(one.name, self.own[one], one.predicted)
        return {**row, **one.facts, **self._switching(one)}

    def columns(self) -> list[dict[str, Any]]:
        """Sum up each column of the entries that have several."""
        return [
            {
                **self._measured(one.name, self.constant[plan], None),
                "steps": [i for i, column in enumerate(one.plans) if column == plan],
            }
            for one in self.entries
            for plan in one.columns
        ]

    def _measured(self, name: str, variant: Variant, predicted: int | None) -> dict[str, Any]:
        kept, plain = variant.saved_bytes, self.plain.saved_bytes
        if self.mode == "compiled":
            kept = predicted if kept is None else kept
            plain = self.entries[0].predicted if plain is None else plain
        return {
            "mode": self.mode,
            "strategy": name,
            **find_spread(
                milliseconds=[1000 * seconds for seconds in variant.seconds],
                speedup=ratios(self.plain.seconds, variant.seconds),
                time_ratio=ratios(variant.seconds, self.plain.seconds),
            ),
            "saved_bytes": kept,
            "memory_ratio": kept / plain if kept is not None and plain else None,
            "first_turn_seconds": variant.first_turn_seconds,
        }

    def _switching(self, one: _Contestant) -> dict[str, Any]:
        if not one.columns:
            return {"switching_percent": None}
        columns = [self.constant[plan].seconds for plan in one.plans]
        means = [statistics.fmean(seconds) for seconds in zip(*columns, strict=True)]
        added = [100 * (ratio - 1) for ratio in ratios(self.own[one].seconds, means)]
        return find_spread(switching_percent=added)
