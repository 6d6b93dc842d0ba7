"""``fxlocal show``: what a model is made of, and what a strategy makes of it."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...compiler.resolve import boundary_of
from ...compiler.transform import transform
from ...inspection.explain import explain
from ...plan import Hebbian, LocalPrefix, Plan
from ...tracing.capture import capture
from ..bench.turns import image_shape
from ..data.task import Goal
from ..models.catalogue import build_model
from ..training.measure import analyze_on
from ..training.settings import SettingsError
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
    strategy: Annotated[
        str | None, option("A spec, as it is in its last epoch", "Strategy")
    ] = None,
    input_size: InputSize = "",
    classes: Classes = 10,
    draw: Annotated[Path | None, option("Draw the blocks into this .svg or .png", "Output")] = None,
) -> None:
    """Show a model's layers, blocks and skips, and how a strategy changes its graph."""
    if until is not None and strategy is not None:
        raise SettingsError("--until and --strategy: give one of them")
    shape = image_shape(input_size, model)
    example = torch.zeros(2, *shape)
    net = capture(build_model(model, num_classes=classes, in_channels=shape[0]), example)
    analysis = analyze_on(net, example)  # notes shapes, which the printed graph then shows
    typer.echo(analysis)
    plan = Plan()
    if until is not None:
        plan = Plan(local=LocalPrefix(read_until(until), Hebbian()))
    if strategy is not None:
        spec = parse_spec(strategy)
        plan = spec.schedule(1, Goal(classes)).plan(analysis, epoch=0)
        for part in spec.parts:
            typer.echo(f"\n{part}, of {describe_strategy(part.name)}")
    if until is not None or strategy is not None:
        typer.echo(f"\n{explain(transform(net, plan, example))}")
    if draw is not None:
        from ..report.picture import write_picture  # matplotlib is slow to import

        rule = plan.local.rule if plan.local else Hebbian()
        write_picture(analysis, boundary_of(plan, analysis), rule, draw)
