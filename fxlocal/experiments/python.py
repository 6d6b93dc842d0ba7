"""The door for scripts and notebooks: `compare`, with strategies, models and data of one's own."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import PlanError
from ..ir.random_state import seeded
from ..plan import Plan, Rule
from ..schedules import Constant, Schedule
from .cli.console import compare_with_bars
from .cli.options import ModelChoice, check_folder, describe_job, free_folder
from .data.catalogue import Data, load_data
from .data.task import Goal
from .files import lock
from .models.catalogue import ModelError
from .models.weights import load_weights
from .own import OwnStrategy
from .training.baselines import BASELINES
from .training.compare import read_contestants
from .training.measure import analyze_on
from .training.recipe.tuning import Tuning, freeze
from .training.results import Results, write_results
from .training.settings import Experiment, Machine, Settings, SettingsError
from .training.specs import Spec, StrategyError
from .training.strategies import STRATEGIES

__all__ = ["Machine", "Results", "Settings", "compare", "load_data"]

Strategy: TypeAlias = str | Plan | Schedule | Callable[..., Plan | Schedule]


def compare(
    strategies: Sequence[str] | Mapping[str, Strategy],
    *,
    data: str | Data = "digits",
    model: str | Callable[[], nn.Module] = "resnet14",
    width: int | None = None,
    settings: Settings = Settings(),  # noqa: B008  # frozen, as the next one
    machine: Machine = Machine(),  # noqa: B008
    seeds: Sequence[int] = (0, 1),
    out: str | Path | None = None,
) -> Results:
    """Train a model with several strategies from the same seeds, as ``fxlocal compare`` does.

    Args:
        strategies: specs, as the command line has them; or by names of your own also Plans, which
            hold throughout, schedules, and functions that make one of both, of ``epochs`` and
            ``goal`` if they name them. Speed-ups are over what is named "sgd".
        data: a name as of ``--data``, or a data set.
        model: a name as of ``--model``, or a function that builds one: the random states of torch,
            Python and numpy are set to the seed meanwhile.
        width: channels of the first stage, of a model by name.
        settings: how to train.
        machine: where; torch's number of threads is as before afterwards.
        seeds: one run of each strategy for each.
        out: a new or empty folder for ``results.json`` and ``report.html``; None writes nothing.

    Raises:
        CaptureError, DataError, ModelError, PlanError, SettingsError, StrategyError: if something
            does not fit, before anything is trained.
    """
    contestants = _read(strategies)
    folder = None if out is None else free_folder(Path(out), "", overwrite=False)
    if folder is not None:
        check_folder(folder)
    loaded = load_data(data) if isinstance(data, str) else data
    build: Callable[[int], nn.Module] = partial(_make, model, settings)
    if width is not None and not isinstance(model, str):
        raise SettingsError(f"width={width}: is of a model by name; leave it out")
    name = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
    if isinstance(model, str):
        build = partial(ModelChoice(model, width).build, loaded, tuning=settings)
    experiment = Experiment(loaded, build, settings=settings, machine=machine, model=name)
    threads = torch.get_num_threads()
    machine.set_threads(loaded.shape)
    try:
        with lock(folder) if folder else nullcontext():
            results = compare_with_bars(experiment, contestants, seeds)
            if folder is not None:
                _write(results, experiment, contestants, folder)
            return results
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Own(Spec):
    """A strategy that is given as it is, under a name."""

    made_by: Any = None

    def schedule(self, epochs: int, goal: Goal = Goal()) -> Schedule:  # noqa: B008  # frozen
        try:
            return OwnStrategy(self.text, self.made_by)(epochs, goal)
        except PlanError as error:
            raise StrategyError(f"strategy {self.text!r}: {error}") from error

    def rule(self, epochs: int) -> Rule | None:
        schedule: Any = self.schedule(epochs)
        local = schedule.fixed.local if isinstance(schedule, Constant) else schedule
        found: Rule | None = getattr(local, "rule", None)
        return found


def _read(strategies: Sequence[str] | Mapping[str, Strategy]) -> dict[str, Spec | str]:
    if isinstance(strategies, str):
        raise StrategyError(f"{strategies!r} is one text: give a list of specs, or a dict")
    if not isinstance(strategies, Mapping):
        return read_contestants(list(strategies))
    contestants: dict[str, Spec | str] = {}
    for name, value in strategies.items():
        if isinstance(value, str):
            (contestants[name],) = read_contestants([value]).values()
        elif name in (*STRATEGIES, *BASELINES):
            raise StrategyError(f"{name!r} is the name of another strategy: give yours its own")
        else:
            contestants[name] = _Own(name, (), value)
    return contestants


def _make(make: Any, tuning: Tuning, seed: int) -> nn.Module:
    model = None
    if not isinstance(make, nn.Module):
        with seeded(seed):
            model = make()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model={type(make).__name__}: give a function that builds an nn.Module anew: each run "
            "begins with its seed's weights"
        )
    if tuning.weights:
        load_weights(model, tuning.weights)
    return freeze(model, tuning)


def _write(
    results: Results, experiment: Experiment, strategies: Mapping[str, Spec | str], folder: Path
) -> None:
    from .report.page import write_page  # Bokeh is slow to import
    from .report.picture import draw_blocks
    from .report.words import describe_strategies

    specs = {name: spec for name, spec in strategies.items() if isinstance(spec, Spec)}
    shape = experiment.settings.batch_size, *experiment.data.shape
    analysis = analyze_on(experiment.build(0), torch.zeros(shape))
    job = describe_job(experiment.settings, strategies)
    job |= describe_strategies(specs, experiment, analysis)
    content = {**results.to_json(), **job, "command": shlex.join(["python", *sys.argv])}
    write_results(content, folder)
    write_page(content, folder, draw_blocks(analysis, 0))
