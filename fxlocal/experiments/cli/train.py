"""``fxlocal train``: one run, which writes checkpoint.pt each epoch and results.json in the end.

Meanwhile metrics.jsonl, with ``--tensorboard`` also its logs; see `fxlocal.experiments.tracking`.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
import typer

from ..data.task import METRICS
from ..report.tables import print_growth
from ..training.measure import analyze_on
from ..training.ranks import train_parallel
from ..training.results import Results, write_results
from ..training.settings import Machine, Settings, SettingsError
from ..training.specs import parse_spec
from ..training.trainer import train_run
from .console import one_line_errors, progress_bars
from .options import (
    Board,
    ImageChoice,
    ModelChoice,
    Out,
    Overwrite,
    Preset,
    check_folder,
    expand_groups,
    free_folder,
    make_experiment,
    make_tracker,
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
    strategy: Annotated[str, option("A spec", "Training")] = "local-static",
    preset: Preset = "",
    seed: Annotated[int, option("Fixes weights, batches, draws", "Training")] = 0,
    nproc: Annotated[int, option("One process per local module", "Machine")] = 1,
    max_restarts: Annotated[int, option("How often, if one fails", "Machine")] = 0,
    resume: Annotated[
        bool, option("Go on from the folder's checkpoint.pt", "Output", "--resume")
    ] = False,
    tensorboard: Board = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model with one strategy; a broken run goes on with --resume, exactly."""
    if max_restarts < 0 or (max_restarts and nproc == 1):
        raise SettingsError("--max-restarts: starts processes again; give --nproc too")
    spec = parse_spec(strategy)
    if nproc > 1 and any("modules" in part.arguments.keys() - part.given for part in spec.parts):
        spec = replace(spec.told(modules=nproc), text=spec.text)
    name = f"train-{images.data}-{model.model}-{strategy}-{seed}"
    folder = free_folder(out, name, overwrite or resume)
    tracker = make_tracker(folder, tensorboard)
    spec.schedule(settings.epochs)
    experiment = replace(make_experiment(images, model, settings, machine).by(spec), seed=seed)
    data, network = experiment.data, experiment.build(seed)
    analyze_on(network, torch.zeros(2, *data.shape))
    check_folder(folder)
    with progress_bars(settings.epochs, experiment.num_steps) as bars:
        share = partial(train_parallel, nproc=nproc, max_restarts=max_restarts)
        train = train_run if nproc == 1 else share
        run = train(
            replace(experiment, build=lambda seed: network),
            checkpoint=folder / "checkpoint.pt",
            resume=resume,
            on_step=bars.step,
            on_epoch=bars.epoch,
            tracker=tracker,
        )
    metric = METRICS[data.task]
    results = Results(images.data, model.model, settings.epochs, machine, metric, [run]).to_json()
    write_results(results, folder)
    if settings.grows:
        print_growth(results)
    typer.echo(
        f"{metric} {run.error_percent:.2f} %, {run.train_seconds:.1f} s of training, "
        f"boundary at layer {run.boundary[-1]}; {folder}"
    )
