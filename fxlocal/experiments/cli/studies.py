"""The commands that study one strategy: ``fxlocal sweep`` and ``fxlocal pca``."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from ..report.pca import collect_activations, find_last_local, project
from ..report.tables import pca_table, sweep_table
from ..training.checkpoint import build_fingerprint, load_checkpoint
from ..training.compare import collect_results, write_results
from ..training.measure import analyze_on
from ..training.settings import Machine, Settings, SettingsError
from ..training.strategies import STRATEGIES, Options, StrategyError, build_schedule
from ..training.sweep import build_variants, parse_grid, summarise_sweep
from ..training.trainer import count_steps, train_run
from .console import one_line_errors, progress_bars, refuse_divergence
from .jobs import describe_job, refuse_idle, run_strategies
from .options import (
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    check_folder,
    expand_groups,
    free_folder,
    integers,
)

__all__ = ["pca_command", "sweep_command"]


@one_line_errors
@expand_groups
def sweep_command(
    images: ImageChoice,
    model: ModelChoice,
    options: Options,
    settings: Settings,
    machine: Machine,
    vary: Annotated[
        list[str],
        typer.Option(help="NAME=VALUE,VALUE,... of a strategy's option; repeat it for a grid"),
    ],
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGIES))] = "local-static",
    seeds: Annotated[str, typer.Option(help="Separated by commas")] = "0,1",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one strategy with every combination of options, and find what pays.

    sgd runs beside it. Prints a table, and writes sweep.json and report.html: error against
    speed-up with the Pareto front, and what each option does to both.
    """
    from ..report.page import write_sweep_report  # matplotlib is slow to import

    grid, numbers = parse_grid(vary), integers("--seeds", seeds)
    variants = build_variants(strategy, grid, settings.epochs, options)
    refuse_idle([], options, settings)
    folder = free_folder(out, f"sweep-{images.data}-{model.model}-{strategy}", overwrite)
    data = images.load()
    machine.set_threads(data.shape)
    check_folder(folder)

    def write(results: dict[str, Any]) -> None:
        write_results(summarise_sweep(results, strategy, grid), folder, "sweep.json")

    results = run_strategies(
        *(data, model, variants, numbers, settings, machine, options), on_seed=write
    )
    results = summarise_sweep(results, strategy, grid)
    Console().print(sweep_table(results))
    page = write_sweep_report({**results, **describe_job(settings, options)}, folder)
    typer.echo(f"report: {page}")
    refuse_divergence(results)


@one_line_errors
@expand_groups
def pca_command(
    images: ImageChoice,
    model: ModelChoice,
    options: Options,
    settings: Settings,
    machine: Machine,
    strategies: Annotated[
        str, typer.Option(help=f"Separated by commas, of {', '.join(STRATEGIES)}")
    ] = "sgd,local-static",
    layer: Annotated[
        str | None,
        typer.Option(help="Path of any module; default: the last block that learned locally"),
    ] = None,
    space: Annotated[
        Literal["mean", "flatten"],
        typer.Option(help="Maps: their mean over height and width, or each position a feature"),
    ] = "mean",
    num_images: Annotated[int, typer.Option(min=3, help="Test images, at most")] = 1000,
    seed: Annotated[int, typer.Option(help="Of all networks: equal weights, equal batches")] = 0,
    runs: Annotated[
        str,
        typer.Option(help="Folders that `fxlocal train` wrote, one per strategy, to train no more"),
    ] = "",
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the principal components of one layer's activations, strategy beside strategy.

    Writes pca.png and pca.json, and each network's checkpoint.pt for the next --layer.
    """
    from ..report.page import write_plots
    from ..report.pca_plots import plot_projections  # matplotlib is slow to import

    names = strategies.split(",")
    if len(set(names)) < len(names):
        raise StrategyError(f"--strategies {strategies!r}: one comes twice")
    refuse_idle(names, options, settings)
    folder = free_folder(out, f"pca-{images.data}-{model.model}", overwrite)
    checkpoints = _checkpoints(runs, names, folder)
    data = images.load()
    machine.set_threads(data.shape)
    if data.task != "classification":
        raise SettingsError(f"data {data.name!r} has no class per image to tell apart")
    schedules = {n: build_schedule(n, settings.epochs, options, data.goal) for n in names}
    collect = partial(
        collect_activations,
        data=data,
        machine=machine,
        batch_size=settings.batch_size,
        flatten=space == "flatten",
    )
    if runs:
        for name, schedule in schedules.items():
            fingerprint = build_fingerprint(data, schedule, settings, name, seed)
            _refuse_unfinished(checkpoints[name], fingerprint, settings.epochs)
    example = machine.place(torch.zeros(settings.batch_size, *data.shape))
    untrained = machine.prepare(model.build(data, seed))
    if layer is not None:  # better refused before hours of training than after
        collect(untrained, layer, num_images=3)
    elif not any("local-dynamic" in name for name in names):  # the others' boundary is known now
        analysis = analyze_on(untrained, example)
        plans = [s.plan(analysis, settings.epochs - 1) for s in schedules.values()]
        find_last_local(
            analysis, max(analysis.boundary(p.local.until) if p.local else 0 for p in plans)
        )
    check_folder(folder)
    networks, records = {}, {}
    with progress_bars(
        settings.epochs * len(names), count_steps(data, settings.batch_size)
    ) as bars:
        for name, schedule in schedules.items():
            networks[name] = model.build(data, seed)
            records[name] = train_run(
                networks[name],
                data,
                schedule,
                settings,
                machine,
                strategy=name,
                seed=seed,
                checkpoint=checkpoints[name],
                resume=bool(runs),
                on_step=bars.step,
                on_epoch=bars.epoch,
            )
    boundary = max(run.boundary[-1] for run in records.values())
    path = layer or find_last_local(analyze_on(networks[names[0]], example), boundary)
    projections = {}
    for name, network in networks.items():
        features, labels = collect(network, path, num_images=num_images)
        projections[name] = project(features, labels)
    results = {
        **collect_results(data.name, model.model, settings.epochs, machine, list(records.values())),
        "layer": path,
        "space": space,
        "num_images": len(labels),
        "num_features": features.shape[1],
        "components": [
            {
                "strategy": name,
                "error_percent": records[name].error_percent,
                "explained": projection.explained,
                "separation_plane": projection.separation_plane,
                "separation": projection.separation,
            }
            for name, projection in projections.items()
        ],
    }
    write_results(results, folder, "pca.json")
    title = f"Activations of {path} on {len(labels)} test images of {data.name}"
    write_plots({"pca.png": plot_projections(projections, title)}, folder)
    Console().print(pca_table(results))
    typer.echo(f"picture: {folder / 'pca.png'}")


def _checkpoints(runs: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return each strategy's checkpoint: to be written, or as ``runs`` says to be read."""
    folders = [Path(run) for run in runs.split(",")] if runs else [folder / name for name in names]
    if len(folders) != len(names):
        raise SettingsError(f"--runs {runs!r}: give {len(names)} folders, one per strategy")
    paths = [run / "checkpoint.pt" for run in folders]
    for path in paths if runs else []:
        if not path.is_file():
            raise SettingsError(f"--runs {runs!r}: no {path}; `fxlocal train` writes one")
    return dict(zip(names, paths, strict=True))


def _refuse_unfinished(path: Path, fingerprint: Mapping[str, Any], epochs: int) -> None:
    """Refuse a checkpoint that would be trained on, and so overwritten."""
    epoch = load_checkpoint(path, fingerprint)["driver"]["epoch"]
    if epoch < epochs:
        raise SettingsError(
            f"--runs: {path} is at epoch {epoch} of {epochs}; finish it with fxlocal train --resume"
        )
