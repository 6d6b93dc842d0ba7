"""What the commands that train share: checks before it, the runs with their bars, the record."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from .compare import compare
from .console import progress_bars
from .data import Data
from .options import ModelChoice
from .settings import Machine, Settings, SettingsError
from .strategies import Options, StrategyError, build_schedule
from .train import count_steps

__all__ = ["describe_job", "make_folder", "refuse_idle", "run_strategies"]


def refuse_idle(strategies: Sequence[str], options: Options, settings: Settings) -> None:
    """Refuse what was given and changes nothing; a value that is the default counts as not given.

    Raises:
        SettingsError: if it is one of the settings.
        StrategyError: if it is an option of none of the strategies, or one of these is unknown.
    """
    if settings.grow_lr != Settings.grow_lr and not settings.grows:
        raise SettingsError("--grow-lr: no batch grows; add --grow-batch or --memory-budget")
    if settings.momentum != Settings.momentum and settings.optimizer != "sgd":
        raise SettingsError(f"--momentum: {settings.optimizer} has none; leave it out")
    for field in fields(options):
        if getattr(options, field.name) == field.default:
            continue
        told = partial(_concerns, field, epochs=settings.epochs, options=options)
        if strategies and not any(map(told, strategies)):
            option, names = field.name.replace("_", "-"), ", ".join(strategies)
            raise StrategyError(f"--{option}: changes nothing about {names}; leave it out")


def _concerns(field: Field[Any], strategy: str, *, epochs: int, options: Options) -> bool:
    """Tell whether the schedule has the option's value, or would be another with its default."""
    schedule = build_schedule(strategy, epochs, options)
    if getattr(schedule, field.name, None) == getattr(options, field.name):
        return True
    default: dict[str, Any] = {field.name: field.default}
    try:
        return repr(build_schedule(strategy, epochs, replace(options, **default))) != repr(schedule)
    except StrategyError:  # c1 without c2, say
        return True


def make_folder(folder: Path) -> None:
    """Make the folder that a command is to write into, before there is something to lose.

    Raises:
        SettingsError: if nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(
            f"cannot write into {folder}: {error.strerror}; give another --out"
        ) from error


def run_strategies(
    data: Data,
    model: ModelChoice,
    strategies: Sequence[str] | Mapping[str, tuple[str, Options]],
    seeds: Sequence[int],
    settings: Settings,
    machine: Machine,
    options: Options,
    on_seed: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Return what `compare` does, with progress bars meanwhile."""
    num_epochs = settings.epochs * len(strategies) * len(seeds)
    with progress_bars(num_epochs, count_steps(data, settings.batch_size)) as bars:
        return compare(
            data,
            model.model,
            partial(model.build, data),
            strategies,
            seeds,
            settings,
            machine,
            options,
            on_run=lambda name, seed: bars.start(f"{name}, seed {seed}"),
            on_step=bars.step,
            on_epoch=bars.epoch,
            on_seed=on_seed,
        )


def describe_job(settings: Settings, options: Options) -> dict[str, Any]:
    """Return what a report says of the command."""
    command = shlex.join(["fxlocal", *sys.argv[1:]])
    return {"command": command, "settings": asdict(settings), "options": asdict(options)}
