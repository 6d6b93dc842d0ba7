"""``fxlocal sweep``: one strategy with many arguments, sgd beside it.

Prints a table; writes sweep.json and report.html with the Pareto front.
"""

from typing import Annotated

from rich.console import Console

from ..report.tables import sweep_table
from ..training.results import Results, write_results
from ..training.settings import Machine, Settings
from ..training.specs import parse_spec
from ..training.sweep import build_settings, build_variants, parse_grid, summarise_sweep
from .console import compare_with_bars, one_line_errors, refuse_divergence
from .options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    Preset,
    Seeds,
    check_folder,
    describe_job,
    expand_groups,
    free_folder,
    integers,
    make_experiment,
    option,
)

__all__ = ["command"]


@one_line_errors
@expand_groups
def command(
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
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one strategy with every combination of arguments, and find what pays."""
    from ..report.page import write_page  # Bokeh is slow to import

    spec = parse_spec(strategy)
    grid, numbers = parse_grid(vary or [], spec), integers("--seeds", seeds)
    variants = build_variants(spec, grid, settings.epochs, settings)
    own = build_settings(spec, grid, settings)
    folder = free_folder(out, f"sweep-{images.data}-{model.model}-{strategy}", overwrite)
    experiment = make_experiment(images, model, settings, machine)
    check_folder(folder)

    def write(results: Results) -> None:
        write_results(summarise_sweep(results, spec, grid), folder, "sweep.json")

    results = compare_with_bars(
        experiment, variants, numbers, settings=own, folder=folder, on_seed=write
    )
    content = summarise_sweep(results, spec, grid)
    Console().print(sweep_table(content))
    page = write_page(content | describe_job(settings, {strategy: spec}), folder)
    print(f"report: {page}")
    refuse_divergence(content)
