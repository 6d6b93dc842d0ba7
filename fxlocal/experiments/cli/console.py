"""Errors of one line, and comparisons that say how far they are."""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import typer
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ...errors import CaptureError, CheckpointError, PlanError
from ...parallel import ParallelError
from ..data.catalogue import DataError
from ..models.catalogue import ModelError
from ..own import where_raised
from ..tracking import Tracker
from ..training.checkpoint import build_fingerprint, holds
from ..training.compare import Build, Contestants, Events, compare
from ..training.recipe.dry_run import check_model
from ..training.results import Results, Run, RunLog, has_diverged
from ..training.settings import Experiment, Settings, SettingsError
from ..training.specs import StrategyError
from ..training.trainer import DivergedError, train_run
from .progress import quietly, show_progress
from .start import describe_start

__all__ = ["compare_with_bars", "one_line_errors", "refuse_divergence"]

USER_ERRORS = (
    CaptureError,
    CheckpointError,
    DataError,
    DivergedError,
    ModelError,
    OSError,
    ParallelError,
    PlanError,
    SettingsError,
    StrategyError,
)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Say on stderr what is wrong, without a traceback; exit with 2, or 1 after divergence.

    With ``quiet`` among its values, a command prints nothing else but where its results are.
    """

    @functools.wraps(command)
    def guarded(**values: Any) -> None:
        if "TORCH_LOGS" not in os.environ:  # of what an error is going to say
            logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)
        try:
            with quietly(values.get("quiet", False)):
                command(**values)
        except BrokenPipeError:  # the reader of our output has seen enough: no mistake
            raise
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().splitlines()[0]
            advice = "make --batch-size smaller, or give a --memory-budget that is"
            typer.echo(f"error: {reason} {advice}", err=True)
            raise typer.Exit(2) from error
        except Exception as error:
            _record(error)
            said = str(error)
            if not isinstance(error, USER_ERRORS):
                if not (where := where_raised(error)):
                    raise
                said = f"{where}: {type(error).__name__}: {said}"
            typer.echo(f"error: {' '.join(said.split())}", err=True)
            raise typer.Exit(1 if isinstance(error, DivergedError) else 2) from error

    return guarded


def _record(error: Exception) -> None:
    """Write down for torchrun, if it has started this rank, what it is to say in the end."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def compare_with_bars(
    experiment: Experiment,
    strategies: Contestants,
    seeds: Sequence[int],
    *,
    others: Mapping[str, Build] = MappingProxyType({}),
    settings: Mapping[str, Settings] = MappingProxyType({}),
    done: Mapping[tuple[str, int], Run] = MappingProxyType({}),
    folder: Path | None = None,
    resume: bool = False,
    again: Callable[[Experiment], bool] = lambda experiment: False,
    on_seed: Callable[[Results], object] = lambda results: None,
    on_model: Callable[[Run, nn.Module], object] = lambda run, model: None,
    tracker: Tracker | None = None,
    train: Callable[..., Run] = train_run,
) -> Results:
    """Return what `compare` does, and say meanwhile how far it is, first what is to come.

    A ``folder`` keeps each run that has ended, and how far the one is that goes on. With
    ``resume``, they are not made again, but those that are wanted ``again``.
    """
    if experiment.settings.keep_best:
        raise SettingsError("--keep-best: this keeps no weights; fxlocal train does")
    for build in (experiment.build, *others.values()):  # better refused before hours of training
        model = build(0)
        analysis, notes = check_model(model, experiment)
        if build is experiment.build:
            describe_start(experiment, model, len(analysis.layers), notes, folder)
        else:
            typer.echo("\n".join(notes), nl=bool(notes))
    num_runs = (len(strategies) + len(others)) * len(seeds) - len(done)
    num_epochs = experiment.settings.epochs * num_runs
    with show_progress(num_epochs) as bars:
        events = Events(
            on_run=lambda name, seed: bars.start(f"{name}, seed {seed}"),
            on_step=bars.step,
            on_epoch=bars.epoch,
            on_model=on_model,
            on_seed=on_seed,
            tracker=tracker,
            train=train,
            **({} if folder is None else _keeping(folder, resume, again)),
        )
        options: Any = {"others": others, "settings": settings, "done": done}
        return compare(experiment, strategies, seeds, events=events, **options)


def _keeping(folder: Path, resume: bool, again: Callable[[Experiment], bool]) -> dict[str, Any]:
    """Return how `Events` keep runs in a folder."""
    log = RunLog(folder / "runs.jsonl", resume)

    def find(experiment: Experiment) -> Run | None:
        if again(experiment):
            return None
        name, seed = experiment.strategy, experiment.seed
        return log.find(build_fingerprint(experiment), name, [seed]).get((name, seed))

    def end(experiment: Experiment, run: Run) -> None:
        log.add(build_fingerprint(experiment), run)

    path = folder / "checkpoint.pt"
    if resume:
        holds(path, {})  # better refused if it is damaged before any file is written
    return {"find": find, "on_end": end, "checkpoint": path, "resume": resume}


def refuse_divergence(results: Mapping[str, Any]) -> None:
    """Exit with code 1, naming the runs, if any stopped because its loss was no number."""
    stopped = [
        f"{run['strategy']}, seed {run['seed']}, in epoch {len(run['loss'])}"
        for run in results["runs"]
        if has_diverged(run)
    ]
    if stopped:
        typer.echo(
            f"error: the loss is no longer a finite number: {'; '.join(stopped)}; "
            "try a smaller learning rate",
            err=True,
        )
        raise typer.Exit(1)
