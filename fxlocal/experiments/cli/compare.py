"""``fxlocal compare``: several strategies from the same seeds.

Prints a table; writes results.json, report.html and blocks.svg, metrics.jsonl, with ``--pca`` also
pca.json and pca.png, with ``--tensorboard`` its logs; see `fxlocal.experiments.tracking`.
"""

from functools import partial
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from ..data.catalogue import batches
from ..report.tables import comparison_table, print_growth
from ..training.compare import read_contestants
from ..training.measure import analyze_on
from ..training.objective import trivial_percent
from ..training.ranks import check_shared, find_world, share_out, train_parallel
from ..training.results import write_results
from ..training.settings import Machine, Settings, SettingsError
from ..training.specs import Spec, StrategyError, is_model, split_list
from ..training.trainer import train_run
from .console import compare_with_bars, one_line_errors, refuse_divergence
from .folders import Folder, Resume, find_folder, run_in
from .options import (
    Board,
    Cache,
    ImageChoice,
    ModelChoice,
    Nproc,
    Out,
    Overwrite,
    Preset,
    Quiet,
    Seeds,
    check_nproc,
    describe_job,
    expand_groups,
    integers,
    keep_prefixes,
    make_experiment,
    make_tracker,
    option,
    say_place,
)

__all__ = ["command"]

FREE = ("strategies", "seeds", "pca", "pca_space", "tensorboard", "download", "threads", "compile")
Space = Literal["mean", "flatten"]


@one_line_errors
@expand_groups
def command(
    context: typer.Context,
    images: ImageChoice,
    model: ModelChoice,
    settings: Settings,
    machine: Machine,
    strategies: Annotated[
        str, option("Specs, baselines, models: sgd,topk(k=2)", "Training", show_default=False)
    ] = "sgd,local-static,freeze",
    pca: Annotated[str, option("Layer to project, or last-local", "Output")] = "",
    pca_space: Annotated[
        Space, option("mean or flatten its maps", "Output", metavar="WORD", hidden=True)
    ] = "mean",
    preset: Preset = "",
    seeds: Seeds = "0,1",
    cache: Cache = "",
    nproc: Nproc = 1,
    folder: Folder = None,
    resume: Resume = False,
    tensorboard: Board = False,
    quiet: Quiet = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model with several strategies from the same seeds; see what each buys."""
    from ..report.page import write_page  # Bokeh and matplotlib are slow to import
    from ..report.pca import pca_table
    from ..report.picture import draw_blocks
    from ..report.projections import Projections
    from ..report.words import describe_strategies

    names = keep_prefixes(split_list(strategies), cache)
    numbers = integers("--seeds", seeds)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise StrategyError(f"--strategies {strategies}: {twice} comes twice")
    if pca_space != "mean" and not pca:
        raise SettingsError(f"--pca-space {pca_space}: changes nothing without --pca")
    check_nproc(nproc, machine)
    if find_world():
        raise SettingsError("compare starts its own ranks: leave torchrun out, and give --nproc")
    read = read_contestants([name for name in names if not is_model(name)])
    own = {n: share_out(one, nproc) if isinstance(one, Spec) else one for n, one in read.items()}
    specs = {name: spec for name, spec in own.items() if isinstance(spec, Spec)}
    for spec in specs.values():
        spec.schedule(settings.epochs)
    name = f"compare-{images.data}-{model.model}"
    folder = find_folder(folder, out, name, overwrite=overwrite, resume=resume)
    tracker = make_tracker(folder, tensorboard, keep=resume)
    experiment = make_experiment(images, model, settings, machine)
    for spec in specs.values() if nproc > 1 else ():
        check_shared(experiment.by(spec), nproc)
    data, others = experiment.data, model.others(names, experiment.data, settings)
    analysis = analyze_on(experiment.build(0), torch.zeros(settings.batch_size, *data.shape))
    projection = Projections(experiment, specs, numbers[0], pca, pca_space) if pca else None
    job = describe_job(settings, own, model.width)
    job |= describe_strategies(specs, experiment, analysis)
    with run_in(folder, context, resume=resume, free=FREE):
        results = compare_with_bars(
            experiment,
            own,
            numbers,
            others=others,
            folder=folder,
            resume=resume,
            # Models are not kept, and those of this seed are to be projected.
            again=lambda one: projection is not None and one.seed == numbers[0],
            on_seed=lambda results: write_results({**results.to_json(), **job}, folder),
            on_model=projection.keep if projection else lambda run, model: None,
            tracker=tracker,
            train=partial(train_parallel, nproc=nproc) if nproc > 1 else train_run,
        ).to_json()
        Console().print(comparison_table(results, len(analysis.layers)))
        if data.task == "segmentation":
            trivial = trivial_percent(y for _, y in batches(data.test, settings.batch_size))
            typer.echo(f"all foreground: {results['metric']} {trivial:.2f} %")
        if settings.grows:
            print_growth(results)
        page = write_page({**results, **job}, folder, draw_blocks(analysis, 0))
        say_place(page, f"report: {page}")
        if projection:
            projected = projection.write(results, folder)
            Console().print(pca_table(projected))
            typer.echo(f"picture: {folder / 'pca.png'}")
    refuse_divergence(results)
