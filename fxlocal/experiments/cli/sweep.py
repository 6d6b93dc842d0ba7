"""``fxlocal sweep``: one strategy with many arguments, sgd beside it.

Prints a table; writes sweep.json and report.html with the Pareto front.
"""

from typing import Annotated, Any

import typer
from rich.console import Console

from ..report.tables import sweep_table
from ..training.results import Results, write_results
from ..training.settings import Machine, Settings
from ..training.specs import parse_spec
from ..training.sweep import build_settings, build_variants, parse_grid, summarise_sweep
from .console import compare_with_bars, one_line_errors, refuse_divergence
from .folders import Folder, Resume, find_folder, run_in
from .options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    Preset,
    Quiet,
    Seeds,
    describe_job,
    expand_groups,
    integers,
    make_experiment,
    make_tracker,
    option,
    say_place,
)

__all__ = ["command"]

FREE = ("vary", "seeds", "download", "threads", "compile")


@one_line_errors
@expand_groups
def command(
    context: typer.Context,
    images: ImageChoice,
    model: ModelChoice,
    settings: Settings,
    machine: Machine,
    strategy: Annotated[str, option("A spec", "Strategy")] = ("local-static"),
    vary: Annotated[
        list[str] | None, option("NAME=VALUE,VALUE of it, or lr=...; repeatable", "Strategy")
    ] = None,
    preset: Preset = "",
    seeds: Seeds = "0,1",
    folder: Folder = None,
    resume: Resume = False,
    quiet: Quiet = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one strategy with every combination of arguments, and find what pays."""
    from ..report.page import write_page  # Bokeh is slow to import

    spec = parse_spec(strategy)
    grid, numbers = parse_grid(vary or [], spec), integers("--seeds", seeds)
    variants = build_variants(spec, grid, settings.epochs, settings)
    own = build_settings(spec, grid, settings)
    name = f"sweep-{images.data}-{model.model}-{strategy}"
    folder = find_folder(folder, out, name, overwrite=overwrite, resume=resume)
    experiment = make_experiment(images, model, settings, machine)

    tracker = make_tracker(folder, tensorboard=False, keep=resume)
    job = describe_job(settings, {strategy: spec})

    def write(results: Results) -> None:
        write_results(summarise_sweep(results, spec, grid) | job, folder, "sweep.json")

    with run_in(folder, context, resume=resume, free=FREE):
        kept: Any = {"folder": folder, "resume": resume, "settings": own, "tracker": tracker}
        results = compare_with_bars(experiment, variants, numbers, on_seed=write, **kept)
        content = summarise_sweep(results, spec, grid)
        Console().print(sweep_table(content))
        page = write_page(content | job, folder)
        say_place(page, f"report: {page}")
    refuse_divergence(content)
