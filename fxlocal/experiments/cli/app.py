"""The command line: ``fxlocal compare``, ``train``, ``show``, ``bench``, and others' commands."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import typer
from rich.console import Console

from ...compiler.transform import transform
from ...inspection.explain import explain
from ...plan import Freeze, Hebbian, LocalPrefix, Plan
from ..bench.steps import bench_steps, prefixes
from ..bench.turns import build_job, image_shape
from ..data.catalogue import batches
from ..data.task import METRICS, trivial_percent
from ..models.catalogue import MODELS, build_model
from ..report.tables import comparison_table, print_growth, steps_table
from ..training.baselines import BASELINES
from ..training.compare import collect_results, write_results
from ..training.measure import analyze_on
from ..training.parallel import train_parallel
from ..training.settings import Machine, Settings, SettingsError
from ..training.strategies import STRATEGIES, Options, build_schedule
from ..training.trainer import count_steps, train_run
from .console import one_line_errors, progress_bars, refuse_divergence
from .jobs import describe_job, find_schedules, refuse_idle, run_strategies
from .options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    check_file,
    check_folder,
    expand_groups,
    free_folder,
    integers,
    write_file,
)
from .studies import pca_command, sweep_command

app = typer.Typer(
    help="Train a growing part of a network without back-propagation, and see what it buys.",
    no_args_is_help=True,
    add_completion=False,
)

T = TypeVar("T")
ModelName = Annotated[str, typer.Argument(help=", ".join(MODELS))]
InputSize = Annotated[
    str, typer.Option(help="One image: its height and width (224), or 3x32x32 with its channels")
]
Classes = Annotated[int, typer.Option(min=1, help="Number of classes")]
Norm = Annotated[
    Literal["train", "eval"],
    typer.Option(help="Batch norms before the boundary: batch or running statistics"),
]


@app.command("compare")
@one_line_errors
@expand_groups
def compare_command(
    images: ImageChoice,
    model: ModelChoice,
    options: Options,
    settings: Settings,
    machine: Machine,
    strategies: Annotated[
        str,
        typer.Option(
            help=f"Separated by commas, of {', '.join((*STRATEGIES, *BASELINES))}; a prefix and an "
            "approximation joined by a plus, as in freeze-eval+topk; or another model, which sgd "
            "trains"
        ),
    ] = "sgd,local-static,freeze",
    seeds: Annotated[str, typer.Option(help="Separated by commas")] = "0,1",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model with several strategies from the same seeds, and see what each buys.

    Prints a table, and writes results.json and report.html with its plots.
    """
    from ..report.page import write_report  # matplotlib is slow to import, --help needs none of it
    from ..report.picture import draw_blocks

    names, numbers = strategies.split(","), integers("--seeds", seeds)
    refuse_idle(find_schedules(names, model.model), options, settings)
    folder = free_folder(out, f"compare-{images.data}-{model.model}", overwrite)
    data = images.load()
    machine.set_threads(data.shape)
    analysis = analyze_on(model.build(data, 0), torch.zeros(settings.batch_size, *data.shape))
    check_folder(folder)
    job = describe_job(settings, options, model.width)
    results = run_strategies(
        *(data, model, names, numbers, settings, machine, options),
        on_seed=lambda results: write_results({**results, **job}, folder),
    )
    Console().print(comparison_table(results, len(analysis.layers)))
    if data.task == "segmentation":
        trivial = trivial_percent(y for _, y in batches(data.test, settings.batch_size))
        typer.echo(f"all foreground: {results['metric']} {trivial:.2f} %")
    if settings.grows:
        print_growth(results)
    boundary = max(run["boundary"][-1] for run in results["runs"])
    learns = options.learning_rule if "local-" in strategies else Freeze()
    picture = draw_blocks(analysis, boundary, learns)
    page = write_report({**results, **job}, folder, picture)
    typer.echo(f"report: {page}")
    refuse_divergence(results)


@app.command("train")
@one_line_errors
@expand_groups
def train_command(
    images: ImageChoice,
    model: ModelChoice,
    options: Options,
    settings: Settings,
    machine: Machine,
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGIES))] = "local-static",
    seed: Annotated[int, typer.Option(help="Fixes weights, batches and random operations")] = 0,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes: one per local module, or a multiple")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="With --nproc: how often to go on after a process failed")
    ] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's checkpoint.pt")] = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model with one strategy; a broken run goes on with --resume, exactly.

    Writes checkpoint.pt after each epoch, and results.json in the end.
    """
    refuse_idle([strategy], options, settings)
    if max_restarts and nproc == 1:
        raise SettingsError("--max-restarts: starts processes again; give --nproc too")
    if nproc > 1 and options.modules is None:
        options = replace(options, modules=nproc)
    name = f"train-{images.data}-{model.model}-{strategy}-{seed}"
    folder = free_folder(out, name, overwrite or resume)
    data = images.load()
    machine.set_threads(data.shape)
    schedule = build_schedule(strategy, settings.epochs, options, data.goal)
    network = model.build(data, seed)
    analyze_on(network, torch.zeros(2, *data.shape))
    check_folder(folder)
    with progress_bars(settings.epochs, count_steps(data, settings.batch_size)) as bars:
        share = partial(train_parallel, nproc=nproc, max_restarts=max_restarts)
        train = train_run if nproc == 1 else share
        run = train(
            network,
            data,
            schedule,
            settings,
            machine,
            strategy=strategy,
            seed=seed,
            checkpoint=folder / "checkpoint.pt",
            resume=resume,
            on_step=bars.step,
            on_epoch=bars.epoch,
        )
    results = collect_results(
        images.data, model.model, settings.epochs, machine, [run], metric=METRICS[data.task]
    )
    write_results(results, folder)
    if settings.grows:
        print_growth(results)
    typer.echo(
        f"{results['metric']} {run.error_percent:.2f} %, {run.train_seconds:.1f} s of training, "
        f"boundary at layer {run.boundary[-1]}; {folder}"
    )


@app.command("show")
@one_line_errors
def show_command(
    model: ModelName,
    until: Annotated[
        str | None, typer.Option(help="Transition layer: a path, an index or a fraction")
    ] = None,
    rule: Annotated[
        Literal["hebbian", "freeze"], typer.Option(help="How the layers before it learn")
    ] = "hebbian",
    rate: Annotated[float, typer.Option(help="Length of one Hebbian step")] = 1e-4,
    norm: Norm = "train",
    input_size: InputSize = "",
    classes: Classes = 10,
    draw: Annotated[
        Path | None, typer.Option(help="Draw the blocks into this .svg or .png")
    ] = None,
) -> None:
    """Show a model's layers, blocks and skip edges, and how a local prefix changes its graph."""
    shape = image_shape(input_size, model)
    net = build_model(model, num_classes=classes, in_channels=shape[0])
    example = torch.zeros(2, *shape)
    analysis = analyze_on(net, example)
    typer.echo(analysis)
    learns = Hebbian(rate) if rule == "hebbian" else Freeze()
    boundary = 0
    if until is not None:
        prefix = LocalPrefix(_until(until), learns, norm)
        boundary = analysis.boundary(prefix.until)
        typer.echo(f"\n{explain(transform(net, Plan(local=prefix), example))}")
    if draw is not None:
        from ..report.picture import write_picture

        write_picture(analysis, boundary, learns, draw)


# The commands of other files.
app.command("sweep")(sweep_command)
app.command("pca")(pca_command)


@app.command("bench")
@one_line_errors
@expand_groups
def bench_command(
    model: ModelName,
    machine: Machine,
    boundaries: Annotated[
        str, typer.Option(help="Paths, indices or fractions, separated by commas")
    ] = "0.25,0.5,0.75",
    batch: Annotated[int, typer.Option(min=1, help="Images per step")] = 16,
    input_size: InputSize = "",
    classes: Classes = 10,
    width: Annotated[int | None, typer.Option(help="Channels of the first stage")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds to take the median of")] = 10,
    norm: Norm = "train",
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Time one training step with all layers, a local and a frozen prefix learning, in turns.

    With --compile and --cudagraph, such networks are measured beside the eager ones.
    """
    check_file(out)
    job = build_job(
        model, machine, input_size=input_size, batch=batch, classes=classes, width=width
    )
    entries = prefixes(job, [_until(text) for text in boundaries.split(",")], norm)
    with Console().status("") as status:
        results = bench_steps(job, entries, repeats=repeats, on_turn=status.update, norm=norm)
    Console().print(steps_table(results))
    write_file(out, results)


def _until(text: str) -> str | int | float:
    """Read a path, an index or a fraction, whichever the text is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
