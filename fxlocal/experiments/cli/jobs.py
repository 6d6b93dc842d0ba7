"""What the commands that train share: checks before it, the runs with their bars, the record."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from functools import partial
from typing import Any

import torch

from ...errors import nearest
from ..data.catalogue import Data
from ..models.catalogue import MODELS
from ..training.baselines import BASELINES
from ..training.compare import compare
from ..training.measure import analyze_on
from ..training.settings import Machine, Settings, SettingsError
from ..training.strategies import (
    MODULES,
    STRATEGIES,
    Options,
    StrategyError,
    build_schedule,
    is_model,
)
from ..training.trainer import count_steps
from .console import progress_bars
from .options import ModelChoice

__all__ = ["describe_job", "find_schedules", "refuse_idle", "run_strategies"]


def find_schedules(names: Sequence[str], model: str) -> list[str]:
    """Return the strategies whose schedules ``names`` follow; other models are trained by sgd.

    Args:
        names: strategies, baselines and models.
        model: the one that the strategies train.

    Raises:
        StrategyError: if a name is unknown, comes twice, or is ``model``.
    """
    known = [*STRATEGIES, *BASELINES, *MODELS]
    for name in names:
        if names.count(name) > 1:
            raise StrategyError(f"--strategies {','.join(names)}: {name} comes twice")
        if name == model:
            raise StrategyError(f"{name} among --strategies is the --model itself: give sgd for it")
        if name not in known and not is_model(name) and "+" not in name:
            raise StrategyError(f"unknown strategy {name!r}. Nearest: {nearest(name, known)}")
    followed = ["sgd" if is_model(name) else name for name in names if name not in BASELINES]
    return list(dict.fromkeys(followed))


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
    for name in strategies:
        build_schedule(name, settings.epochs, options)
    parts = [part for name in strategies for part in name.split("+")]
    for field in fields(options):
        if getattr(options, field.name) == field.default:
            continue
        told = partial(_concerns, field, epochs=settings.epochs, options=options)
        if strategies and not any(map(told, parts)):
            option, names = field.name.replace("_", "-"), ", ".join(strategies)
            raise StrategyError(f"--{option}: changes nothing about {names}; leave it out")


def _concerns(field: Field[Any], strategy: str, *, epochs: int, options: Options) -> bool:
    """Tell whether the schedule has the option's value, or would be another with its default."""
    if field.name == "modules":  # whose default is a number that may be told too
        return strategy in (*MODULES, "checkpoint")
    schedule = build_schedule(strategy, epochs, options)
    if vars(schedule).get(field.name) == getattr(options, field.name):
        return True
    default: dict[str, Any] = {field.name: field.default}
    try:
        return repr(build_schedule(strategy, epochs, replace(options, **default))) != repr(schedule)
    except StrategyError:  # c1 without c2, say
        return True


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
    """Return what `compare` does, with progress bars meanwhile.

    A strategy that is a model's name means sgd on that model, with the width of ``model``.
    """
    if not isinstance(strategies, Mapping):
        strategies = {name: (name, options) for name in strategies}
    others = {
        name: partial(replace(model, model=strategy).build, data)
        for name, (strategy, _) in strategies.items()
        if is_model(strategy)
    }
    own = partial(model.build, data)
    for build in (own, *others.values()):  # better refused before hours of training than after
        analyze_on(build(0), torch.zeros(2, *data.shape))
    num_epochs = settings.epochs * len(strategies) * len(seeds)
    with progress_bars(num_epochs, count_steps(data, settings.batch_size)) as bars:
        return compare(
            data,
            model.model,
            own,
            {name: pair for name, pair in strategies.items() if name not in others},
            seeds,
            settings,
            machine,
            options,
            others=others,
            on_run=lambda name, seed: bars.start(f"{name}, seed {seed}"),
            on_step=bars.step,
            on_epoch=bars.epoch,
            on_seed=on_seed,
        )


def describe_job(settings: Settings, options: Options, width: int | None = None) -> dict[str, Any]:
    """Return what a report says of the command; a width only if it is not the model's usual."""
    command = shlex.join(["fxlocal", *sys.argv[1:]])
    job = {"command": command, "settings": asdict(settings), "options": asdict(options)}
    return job if width is None else {**job, "width": width}
