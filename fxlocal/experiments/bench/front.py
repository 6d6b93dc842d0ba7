"""Memory against step time: Plans for a budget beside what else keeps less, all in turns.

Torch's own way is ``torch.compile`` with an ``activation_memory_budget``, a share of what it keeps
otherwise. It stands beside compiled plain training, and beside exact Plans that keep about as large
a share, compiled too; which Plan that is, their eager bytes say.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...budget.auto import Choice, auto
from ...budget.candidates import Candidate
from ...plan import Plan
from ...schedules import Constant
from ..training.measure import count_saved_bytes
from ..training.objective import LOSSES
from .spread import find_spread, ratios
from .turns import Job, Mode, refuse_none, take_turns
from .variants import Variant

__all__ = ["SHARES", "bench_front"]

SHARES = (0.75, 0.5, 0.25)


class _Budgeted(Variant):
    """Plain training, compiled to keep a share of what it would keep; or any other variant."""

    share = 1.0

    def prepare(self) -> None:
        """Compile and warm up under the budget, and count what is kept."""
        patched: AbstractContextManager[Any] = nullcontext()
        if self.share < 1:
            from torch._functorch import config  # slow to import

            patched = config.patch(activation_memory_budget=self.share)
        with patched:
            super().prepare()

    def _measure_memory(self) -> int | None:
        if self.device.type == "cuda":
            return super()._measure_memory()
        heads = self.driver.heads
        there = (self.job.x, *heads.parameters(), *heads.buffers())
        with count_saved_bytes(self.driver.model, *there) as saved_bytes:
            self._turn()
        return saved_bytes()


def bench_front(
    job: Job,
    memory: str | float,
    *,
    repeats: int = 10,
    on_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure the Plans that `fxlocal.auto` would choose from, and torch's own way.

    Args:
        job: what to train, where; with ``compile``, compiled steps too, torch's own among them.
        memory: a budget, as `fxlocal.auto` takes it.
        repeats: rounds measured.
        on_turn: called with mode and name when a turn comes.

    Returns:
        What ran, where; "chosen" and its measured bytes; "rows": one dict per mode and Plan, with
        bytes and milliseconds. Ready for JSON.

    Raises:
        PlanError: if nothing fits the budget; like
        SettingsError: if there is nothing to repeat.
    """
    refuse_none(repeats=repeats)
    on_turn("auto")
    shape = (job.analysis.block_inputs or ())[-1].shape or ()
    with job.machine.autocast():
        choice = auto(
            job.model,
            job.x,
            memory=memory,
            loss=lambda output: LOSSES["classification"](output, job.y),
            num_classes=shape[1] if len(shape) == 2 else None,
        )
    variants: dict[_Budgeted, dict[str, Any]] = {}

    def add(name: str, kind: str, mode: Mode, plan: Plan, share: float = 1.0) -> None:
        one = _Budgeted(name, job, Constant(plan), mode)
        one.share = share
        facts = {"name": name, "kind": kind, "mode": mode, "plan": repr(plan)}
        predicted = {row.plan: row.peak_bytes for row in choice.table.rows}
        variants[one] = {**facts, "predicted_bytes": predicted[plan] if mode == "eager" else None}

    for row in _shown(choice):
        add(_name(row), _kind(row), "eager", row.plan)
    if job.machine.compile:
        add("plain", "plain", "compiled", Plan())
        for share in SHARES:
            add(f"torch's budget {share}", "torch", "compiled", Plan(), share)
            if (best := _exact(choice, share)) is not None:
                add(f"{_name(best)} ({share} eager)", "checkpoint", "compiled", best.plan)
    for one in variants:
        on_turn(f"{one.mode} {one.name}")
        torch._dynamo.reset()  # a compiled variant keeps its code all the same
        one.prepare()
    seconds = take_turns({one: one.time_turn for one in variants}, repeats)
    first = {one.mode: one for one in reversed(variants)}
    rows = [
        {
            **facts,
            "bytes": one.saved_bytes,
            **find_spread(
                milliseconds=[1000 * own for own in seconds[one]],
                time_ratio=ratios(seconds[one], seconds[first[one.mode]]),
            ),
            "chosen": one.mode == "eager" and facts["plan"] == repr(choice.plan),
        }
        for one, facts in variants.items()
    ]
    told = {"limit": choice.limit, "predicted_bytes": choice.predicted.peak_bytes}
    told |= {"measured_bytes": choice.peak_bytes, "sgd_bytes": choice.sgd_bytes}
    return {**job.describe(), "repeats": repeats, "memory": memory, **told, "rows": rows}


def _shown(choice: Choice) -> list[Candidate]:
    """Return plain training first, the exact Plans, some of the others, and the one chosen."""
    shown = dict.fromkeys([choice.table.rows[0], *(r for r in choice.table.shown if r.exact)])
    others = [row for row in choice.table.shown if not row.exact]
    shown |= dict.fromkeys(others[:: max(1, len(others) // 6)])
    return list(shown | {choice.predicted: None})


def _exact(choice: Choice, share: float) -> Candidate | None:
    """Return the fastest exact Plan that keeps such a share of what plain training keeps."""
    whole = choice.table.rows[0].peak_bytes
    found = [r for r in choice.table.rows if r.exact and r.peak_bytes <= share * whole]
    return min(found, key=lambda row: row.time, default=None)


def _kind(row: Candidate) -> str:
    if row.exact:
        return "checkpoint" if row.plan.checkpoint else "plain"
    return "changed"


def _name(row: Candidate) -> str:
    plan, parts = row.plan, list[str]()
    if plan.local:
        rule = type(plan.local.rule).__name__.lower()
        rule += "-eval" if plan.local.norm == "eval" else ""
        parts.append(f"{rule} until {plan.local.until}")
    if plan.checkpoint:
        parts.append(f"checkpoint {plan.checkpoint.count}")
    if plan.modules:
        parts.append(f"modules {plan.modules.count}")
    return ", ".join(parts) or "plain"
