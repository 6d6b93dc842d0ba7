"""``fxlocal train``: one run, which writes checkpoint.pt each epoch and results.json in the end.

Meanwhile metrics.jsonl, with ``--tensorboard`` also its logs; see `fxlocal.experiments.tracking`.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from ...compiler.debug import launched_ranks
from ...errors import CheckpointError
from ..data.task import METRICS
from ..report.tables import print_growth
from ..training.processes import times_restarted
from ..training.ranks import find_world, share_out, train_parallel, train_rank
from ..training.recipe.dry_run import check_model
from ..training.results import Results, Run, write_results
from ..training.settings import Machine, Settings, SettingsError
from ..training.specs import parse_spec
from ..training.trainer import train_run
from .console import one_line_errors
from .folders import JOB, Folder, Resume, find_folder, run_in
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
    check_nproc,
    describe_job,
    expand_groups,
    keep_prefixes,
    make_experiment,
    make_tracker,
    option,
    say_place,
)
from .progress import show_progress
from .start import describe_start

__all__ = ["command"]


@one_line_errors
@expand_groups
def command(
    context: typer.Context,
    images: ImageChoice,
    model: ModelChoice,
    settings: Settings,
    machine: Machine,
    strategy: Annotated[str, option("A spec", "Training")] = "local-static",
    preset: Preset = "",
    seed: Annotated[int, option("Fixes weights, batches, draws", "Training")] = 0,
    cache: Cache = "",
    nproc: Nproc = 1,
    max_restarts: Annotated[int, option("How often, if one fails", "Machine", hidden=True)] = 0,
    folder: Folder = None,
    resume: Resume = False,
    save_every: Annotated[int | None, option("Steps between checkpoints", "Output")] = None,
    tensorboard: Board = False,
    quiet: Quiet = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a model with one strategy; a broken run goes on with --resume, exactly."""
    if max_restarts < 0 or (max_restarts and nproc == 1):
        raise SettingsError("--max-restarts: starts processes again; give --nproc too")
    check_nproc(nproc, machine)
    world, is_first = find_world(), launched_ranks()[0] in (None, "0")
    if world and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise SettingsError("RANK is set without MASTER_ADDR and MASTER_PORT: start by torchrun")
    if save_every is not None and save_every < 1:
        raise SettingsError(f"--save-every {save_every}: give 1 or more")
    if save_every and max(world, nproc) > 1:
        raise SettingsError("--save-every: ranks are kept at an epoch's end; leave out one of both")
    (strategy,) = keep_prefixes([strategy], cache)
    spec = share_out(parse_spec(strategy), world or nproc)
    name = f"train-{images.data}-{model.model}-{strategy}-{seed}"
    again = times_restarted() > 0 or not is_first  # whose folder the first rank makes
    told = {"overwrite": overwrite and not again, "resume": resume or again}
    folder = find_folder(folder, out, name, **told)
    tracker = make_tracker(folder, tensorboard)
    spec.schedule(settings.epochs)
    experiment = replace(make_experiment(images, model, settings, machine).by(spec), seed=seed)
    data, network = experiment.data, experiment.build(seed)
    analysis, notes = check_model(network, experiment)
    path = folder / "checkpoint.pt"
    ended = (folder / "results.json").exists()
    begun = (folder / JOB).exists() and not ended
    if resume and ended:
        notes.append("note: this run had ended; its results are written again")
    if resume and not path.exists() and not begun:  # else it was stopped before its first one
        raise CheckpointError(f"no checkpoint at {path}; leave out --resume to start a run")
    with run_in(folder, context, resume=resume or again, data=data) if is_first else nullcontext():
        if is_first:
            describe_start(experiment, network, len(analysis.layers), notes, folder)
        with show_progress(settings.epochs) as bars:
            bars.start(f"{strategy}, seed {seed}")
            share = partial(train_parallel, nproc=nproc, max_restarts=max_restarts)
            alone = partial(train_run, save_every=save_every)
            train: Any = train_rank if world else alone if nproc == 1 else share
            run: Run = train(
                replace(experiment, build=lambda seed: network),
                checkpoint=path,
                resume=resume and path.exists(),
                on_step=bars.step,
                on_epoch=bars.epoch,
                tracker=tracker,
            )
        if not is_first:
            return
        metric = METRICS[data.task]
        facts = images.data, model.model, settings.epochs, machine, metric
        results = Results(*facts, [run]).to_json()
        write_results({**results, **describe_job(settings, {strategy: spec}, model.width)}, folder)
    if settings.grows:
        print_growth(results)
    say_place(
        folder,
        f"{metric} {run.error_percent:.2f} %, {run.train_seconds:.1f} s of training, "
        f"boundary at layer {run.boundary[-1]}{_speed_text(run)}{_best_text(run, settings)}; "
        f"{folder}",
    )


def _best_text(run: Run, settings: Settings) -> str:
    """Say what the best weights came to, where they are kept or waited for."""
    if not settings.keep_best and settings.patience is None:
        return ""
    best = min(run.errors)
    kept = ", best.pt" if settings.keep_best else ""
    return f", best {best:.2f} % in epoch {run.error_epochs[run.errors.index(best)]}{kept}"


def _speed_text(run: Run) -> str:
    """Say what ranks came to together, and what each of them sent."""
    if not run.wire_bytes:
        return ""
    speed, sent = run.images / run.train_seconds, run.wire_bytes
    return f", {speed:.0f} images/s, {sent[0] / 1e6:.1f} -> {sent[-1] / 1e6:.1f} MB sent an epoch"
