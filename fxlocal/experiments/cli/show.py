"""``fxlocal show``: what a model is made of, and what a strategy makes of it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...compiler.analysis import Analysis
from ...compiler.resolve import boundary_of
from ...compiler.transform import transform
from ...facts import Cost
from ...inspection.explain import explain
from ...inspection.report import format_bytes
from ...plan import Hebbian, LocalPrefix, Plan
from ...schedules import LearningSchedule, Schedule
from ...schedules.base import check_plan, horizon_of
from ...tracing.capture import capture
from ..bench.turns import image_shape
from ..data.task import Goal
from ..models.catalogue import build_model
from ..training.measure import analyze_on, taking
from ..training.objective import Pruning
from ..training.results import count_text
from ..training.settings import Settings, SettingsError
from ..training.specs import describe_strategy, parse_spec
from .console import one_line_errors
from .options import Classes, InputSize, ModelName, option
from .options import until as read_until

__all__ = ["command"]


@one_line_errors
def command(
    model: ModelName,
    until: Annotated[
        str | None, option("Of a Hebbian prefix: path, index or fraction", "Strategy")
    ] = None,
    strategy: Annotated[str | None, option("A spec, as it is in --epoch", "Strategy")] = None,
    epochs: Annotated[int, option("Of the run", "Strategy", min=1)] = Settings.epochs,
    epoch: Annotated[
        int | None, option("Which of them, from 1; default: the last", "Strategy", min=1)
    ] = None,
    batch: Annotated[int, option("Images per step", "Data and model", min=1)] = Settings.batch_size,
    input_size: InputSize = "",
    classes: Classes = 10,
    draw: Annotated[Path | None, option("Draw the blocks into this .svg or .png", "Output")] = None,
) -> None:
    """Show a model's layers, blocks and skips, and how a strategy changes its graph."""
    if until is not None and strategy is not None:
        raise SettingsError("--until and --strategy: give one of them")
    if strategy is None and (epoch is not None or epochs != Settings.epochs):
        raise SettingsError("--epoch, --epochs: are of a strategy; give --strategy")
    if epoch is not None and epoch > epochs:
        raise SettingsError(f"--epoch {epoch}: the run has {epochs}; give more --epochs")
    spec = parse_spec(strategy) if strategy is not None else None
    schedule = spec.schedule(epochs, Goal(classes)) if spec else None
    shape = image_shape(input_size, model)
    example = torch.zeros(batch, *shape)
    built = build_model(model, num_classes=classes, in_channels=shape[0])
    with taking(example):
        net = capture(built, example)
    analysis = analyze_on(net, example)  # notes shapes, which the printed graph then shows
    size = "x".join(map(str, shape))
    typer.echo(f"{model}, images of {size}, {classes} classes, batches of {batch}\n")
    own = _of_an_image(analysis, batch)
    typer.echo(f"{own}, of one image{_batch_text(analysis, batch)}")
    plan = Plan()
    if until is not None:
        plan = Plan(local=LocalPrefix(read_until(until), Hebbian()))
    if spec and schedule:
        for part in spec.parts:
            typer.echo(f"\n{part}, of {describe_strategy(part.name)}")
        plan, told = _plan_of(schedule, analysis, epochs, epoch or epochs)
        typer.echo(f"\n{told}")
    if until is not None or spec:
        typer.echo(f"\n{explain(transform(net, plan, example))}")
    if draw is not None:
        from ..report.picture import write_picture  # matplotlib is slow to import

        try:
            draw.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--draw {draw}: {draw.parent} is no folder") from error
        rule = plan.local.rule if plan.local else Hebbian()
        write_picture(own, boundary_of(plan, analysis), rule, draw)


def _of_an_image(analysis: Analysis, batch: int) -> Analysis:
    """Return the facts with an image's share of what a batch costs."""
    if analysis.costs is None or analysis.block_inputs is None:
        return analysis
    costs = (
        Cost(round(one.flops / batch), round(one.saved_bytes / batch), one.parameters)
        for one in analysis.costs
    )
    first, *others = analysis.block_inputs
    first = replace(first, shape=first.shape and (1, *first.shape[1:]))
    return replace(analysis, costs=tuple(costs), block_inputs=(first, *others))


def _batch_text(analysis: Analysis, batch: int) -> str:
    kept = analysis.saved_bytes(0)
    if kept is None or analysis.costs is None:
        return ""
    flops = sum(cost.flops for cost in analysis.costs)
    number = f"{flops / 1e6:,.1f} MFLOPs forward, {format_bytes(kept)} kept for backward"
    return f"\n{number}, of a batch of {count_text(batch, 'image')}"


def _plan_of(schedule: Schedule, analysis: Analysis, epochs: int, epoch: int) -> tuple[Plan, str]:
    """Return the Plan of an epoch, counted from 1, and say how Plans change, and which that is.

    A schedule that learns from the run learns of one whose loss falls, and whose weights move no
    more: its boundary moves as early as it may.
    """
    plans = []
    horizon = horizon_of(schedule)
    steps = range(horizon.start + horizon.period)
    for index in range(epochs):
        plans.append([schedule.plan(analysis, index, step) for step in steps])
        for plan in plans[-1]:
            check_plan(plan, f"the schedule {type(schedule).__name__} returned")
        if isinstance(schedule, LearningSchedule):
            schedule.end_epoch(analysis, 0.0, 0.5**index)
    shown = plans[epoch - 1]
    step = next((i for i, plan in enumerate(shown) if plan != Plan()), 0)
    told = _changes_text([own[step] for own in plans], analysis)
    if isinstance(schedule, LearningSchedule):
        told += (
            "; so in a run whose loss falls and whose weights settle at once: it depends on that"
        )
    if isinstance(schedule, Pruning):
        told += f"; channels are cut every {count_text(schedule.every, 'epoch')}, none here yet"
    if len({*map(repr, shown)}) > 1:
        told += f"; other steps have other plans, which repeat after {len(steps)}"
    where = f"epoch {epoch}" + (f", step {step + 1}" if len(steps) > 1 else "")
    return shown[step], f"{told}; shown: {where}"


def _changes_text(plans: Sequence[Plan], analysis: Analysis) -> str:
    """Say from which epoch on there is what."""
    counts = {
        "boundary at layer": [boundary_of(plan, analysis) for plan in plans],
        "weight gradients approximated:": [len(plan.weight_grads) for plan in plans],
    }
    changing = {what: numbers for what, numbers in counts.items() if len({*numbers}) > 1}
    if not changing:
        same = len({*map(repr, plans)}) == 1
        return f"{'the same plan' if same else 'a plan of its own'} in all {len(plans)} epochs"
    return "; ".join(f"{what} {_by_epoch(numbers)}" for what, numbers in changing.items())


def _by_epoch(numbers: Sequence[int]) -> str:
    runs = [next(run) for _, run in groupby(enumerate(numbers, start=1), lambda pair: pair[1])]
    return ", ".join(f"{number} from epoch {first}" for first, number in runs)
