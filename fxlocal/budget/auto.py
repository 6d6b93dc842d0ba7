"""Choose a Plan for a budget of memory or time, by prediction, and then by measurement."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NoEffectWarning, PlanError
from ..inspection.report import format_bytes
from ..ir.fakes import run_on_fakes
from ..ir.random_state import random_state, restore_random_state
from ..ir.source import train_mode
from ..ir.text import format_table
from ..plan import Plan
from ..plan.checks import is_number
from ..runtime.cache.activation_cache import read_bytes
from .candidates import PREFIXES, Candidate, find_candidates
from .memory import KeptBytes
from .steps import Steps
from .times import in_turns

__all__ = ["Choice", "Table", "auto"]

_CLOSE = 1.05  # what is no better than another by more is not shown beside it
_ROUNDS = 5  # of steps that take turns with plain training's


@dataclass(frozen=True)
class Table:
    """The Plans that were to choose from, with what each is predicted to take; ``print`` it.

    Attributes:
        rows: plain training first.
    """

    rows: tuple[Candidate, ...]

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """Those of which no other is as good in bytes, time and layers changed, and better in one.

        In the order in which they are preferred: those that change fewer layers first, then those
        that take less time.
        """
        front: list[Candidate] = []
        for row in sorted(self.rows, key=_preference):
            if not any(r.peak_bytes <= row.peak_bytes and r.time <= row.time for r in front):
                front.append(row)
        return tuple(front)

    @cached_property
    def shown(self) -> tuple[Candidate, ...]:
        """Those of `front` of which none before is about as good."""
        shown: list[Candidate] = []
        for row in self.front:
            most = _CLOSE * row.peak_bytes, _CLOSE * row.time
            if not any(r.peak_bytes <= most[0] and r.time <= most[1] for r in shown):
                shown.append(row)
        return tuple(shown)

    def __str__(self) -> str:
        whole, shown = self.rows[0].peak_bytes, self.shown
        header = ["layers changed", "gradients", "kept", "of SGD's bytes", "of SGD's time", "plan"]
        lines = [
            [
                str(row.changed),
                "exact" if row.exact else "not all",
                format_bytes(row.peak_bytes),
                f"{row.peak_bytes / whole:.2f}" if whole else "",
                f"{row.time:.2f}",
                repr(row.plan),
            ]
            for row in shown
        ]
        table = format_table(header, lines, [header[0], *header[2:5]])
        return f"{table}\n{len(lines)} of {len(self.rows)} plans: no other is clearly better"


@dataclass(frozen=True)
class Choice:
    """What `auto` chose, and from what; ``print`` it.

    Attributes:
        plan: for `transform`, or for a `fxlocal.schedules.Constant`.
        table: what it was chosen from.
        predicted: what it was predicted to take.
        peak_bytes: the most that a step of it keeps at a time, as measured.
        time: of its forward and backward as a fraction of plain training's, as measured; None if
            plain training ran out of memory.
        sgd_bytes: the most that a step of plain training keeps; None if it ran out of memory.
        limit: the bytes that the budget allows; None where it is of time alone.
    """

    plan: Plan
    table: Table
    predicted: Candidate
    peak_bytes: int
    time: float | None
    sgd_bytes: int | None
    limit: int | None

    def __str__(self) -> str:
        predicted, took = self.predicted, self.time
        taken = "an unknown part" if took is None else f"{took:.2f}"
        lines = [
            str(self.table),
            "",
            f"{self.plan!r}",
            f"keeps {format_bytes(self.peak_bytes)} ({format_bytes(predicted.peak_bytes)} predicted"
            + (f", {format_bytes(self.sgd_bytes)} plain training" if self.sgd_bytes else "")
            + (f", {format_bytes(self.limit)} allowed" if self.limit is not None else "")
            + ")",
            f"takes {taken} of plain training's step ({predicted.time:.2f} predicted)",
        ]
        if predicted.exact and self.sgd_bytes:
            share = self.peak_bytes / self.sgd_bytes
            lines.append(
                "torch's own way to as many bytes, compiled: torch._functorch.config."
                f"activation_memory_budget = {share:.2f}; see fxlocal bench --auto --compile"
            )
        return "\n".join(lines)


def auto(
    model: nn.Module,
    *example_inputs: Any,
    memory: str | int | float | None = None,
    time: float | None = None,
    exact: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    num_classes: int | None = None,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    **example_inputs_by_name: Any,
) -> Choice:
    """Choose the Plan that changes least of what plain training computes, within a budget.

    Of the Plans that fit, that is the one that leaves most layers their exact gradient, and of
    these the fastest. Bytes are predicted by a run on fake tensors, seconds by blocks, of which
    each kind is measured once. The choice is measured: if a step keeps more, or takes longer, than
    the budget allows, the next smaller Plan is taken. All of that runs eagerly, on a copy: the
    model, its buffers and gradients, and the state of every random generator stay as they are.

    Memory is what autograd keeps for the backward, at the peak of a step; on a GPU it is what a
    step allocates at its peak, gradients and workspace too, beyond what was allocated before.

    Args:
        model: the model, or a network of fxlocal's, whose source is then taken.
        example_inputs: one batch, of the size to be trained on.
        memory: the most bytes, as a number or as text ("6GiB", "500MB"), or a fraction of what
            plain training keeps (0.5).
        time: the most that a step's forward and backward may take, as a fraction of plain
            training's (0.7).
        exact: choose only from Plans that leave all gradients as they are.
        loss: from the output to a scalar; by default as in `verify`.
        num_classes: of a classifier: local modules are tried too, whose heads need it.
        leaf_modules: as in `transform`.
        example_inputs_by_name: those inputs that are given by keyword, as in ``model(**batch)``.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if the model does not take such a batch.
        PlanError: if the budget is none, there are no inputs, the model has no layers, or nothing
            fits; the message says then what the smallest Plan and the fastest take.
        ValueError: if the loss is no scalar.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        >>> choice = auto(model, torch.ones(32, 64), memory=0.5)
        >>> choice.predicted.exact, choice.peak_bytes <= choice.sgd_bytes / 2
        (True, True)
    """
    _check(memory, time, (*example_inputs, *example_inputs_by_name))
    random = random_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            batch = example_inputs, example_inputs_by_name
            steps = Steps(model, *batch, loss, leaf_modules)
            return _choose(steps, memory, time, exact, num_classes)
    finally:
        restore_random_state(random)


def _check(memory: Any, time: Any, inputs: Sequence[Any]) -> None:
    if memory is None and time is None:
        raise PlanError(
            "auto: no budget: give memory='6GiB' (or 0.5, of plain training's), time=0.7, or both"
        )
    if time is not None and not (is_number(time) and time > 0):
        raise PlanError(f"time={time!r}: give a fraction of plain training's step, as 0.7")
    if memory is not None:
        _read_limit(memory, 1)
    if not inputs:
        raise PlanError(
            "auto: bytes and seconds need shapes: give one batch of inputs, of the size to be "
            "trained on, auto(model, x, memory=...)"
        )


def _read_limit(memory: str | int | float, whole: int) -> int:
    """Return the bytes that ``memory`` means, a fraction being one of ``whole``."""
    try:
        if not isinstance(memory, float):
            return read_bytes(memory)
        if 0 < memory <= 1:
            return int(memory * whole)
    except PlanError:
        pass
    raise PlanError(
        f"memory={memory!r}: give bytes (6442450944), a text ('6GiB', '500MB'), or a fraction "
        "of what plain training keeps (0.5)"
    )


def _preference(row: Candidate) -> tuple[int, float, int]:
    return row.changed, row.time, row.peak_bytes


def _choose(
    steps: Steps,
    memory: str | int | float | None,
    time: float | None,
    exact: bool,
    num_classes: int | None,
) -> Choice:
    plain = steps.network(Plan())
    whole = steps.peak_bytes(plain)
    with train_mode(steps.captured):
        run = run_on_fakes(steps.captured, steps.args, steps.kwargs)
    kept = KeptBytes(steps.captured, run, steps.analysis, steps.on_gpu)
    if known := whole < math.inf:
        kept.rest = int(whole) - kept.plain(0)
    limit = math.inf if memory is None else _read_limit(memory, kept.plain(0))
    times = steps.time_blocks(() if exact else PREFIXES)
    found = find_candidates(kept, times, limit, num_classes)
    table = Table(tuple(row for row in found if row.exact or not exact))
    allowed = math.inf if time is None else time
    fitting = [row for row in table.rows if row.peak_bytes <= limit and row.time <= allowed]
    fitting.sort(key=_preference)
    while fitting:
        row = fitting.pop(0)
        network = steps.network(row.plan)
        peak, taken = steps.peak_bytes(network), None
        if peak > limit:
            fitting = [one for one in fitting if one.peak_bytes < row.peak_bytes]
            continue
        if known:
            turns = {"plain": partial(steps.seconds, plain), "row": partial(steps.seconds, network)}
            seconds = dict(in_turns(turns, _ROUNDS))
            taken = seconds["row"] / seconds["plain"]
        if taken is None or taken <= allowed:
            sgd_bytes = int(whole) if known else None
            told = int(limit) if memory is not None else None
            return Choice(row.plan, table, row, int(peak), taken, sgd_bytes, told)
        fitting = [one for one in fitting if one.time < row.time]
    raise PlanError(_nothing_fits(table, limit, allowed, exact))


def _nothing_fits(table: Table, limit: float, allowed: float, exact: bool) -> str:
    whole = table.rows[0].peak_bytes
    smallest = min(table.rows, key=lambda row: (row.peak_bytes, *_preference(row)))
    fastest = min(table.rows, key=lambda row: (row.time, *_preference(row)))
    asked = [format_bytes(int(limit))] if limit < math.inf else []
    asked += [f"{allowed:g} of plain training's step"] if allowed < math.inf else []
    return (
        f"auto: no {'exact ' * exact}plan fits {' and '.join(asked)}: the smallest keeps "
        f"{format_bytes(smallest.peak_bytes)} of plain training's {format_bytes(whole)} "
        f"({smallest.plan!r}), the fastest takes {fastest.time:.2f} of its step "
        f"({fastest.plan!r}). Give more{', or exact=False' * exact}"
    )
