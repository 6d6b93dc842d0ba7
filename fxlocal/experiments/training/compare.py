"""Train the same model with several strategies from the same seeds, and say what each bought."""

import contextlib
import gc
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...compiler.analysis import Analysis
from ...compiler.split import find_split
from ...ir.random_state import random_state, restore_random_state
from ...schedules import Schedule
from ..data.catalogue import Data
from ..data.images import choose
from ..data.task import METRICS
from .baselines import BASELINES, find_reference
from .measure import analyze_on, find_versions
from .recompute import describe_modules, modules_of, refuse_compiled
from .results import has_diverged, speed_seconds
from .settings import Machine, Settings
from .strategies import Options, StrategyError, build_schedule
from .trainer import DivergedError, Run, train_run

__all__ = ["collect_results", "compare", "write_results"]


def compare(
    data: Data,
    model: str,
    build: Callable[[int], nn.Module],
    strategies: Sequence[str] | Mapping[str, tuple[str, Options]],
    seeds: Sequence[int],
    settings: Settings,
    machine: Machine,
    options: Options,
    *,
    others: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType({}),
    on_run: Callable[[str, int], None] | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    on_seed: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Run every strategy from every seed and return the results, ready for ``results.json``.

    Equal seeds mean equal first weights and equal batches. Strategies take turns within a seed, so
    that a machine that grows slower slows them all. A run whose loss stops being a number ends
    there, with an error of None; the others go on, but for the `BASELINES` that it is the reference
    of. These come last within a seed. What a process pays but once is paid before the first run.

    Args:
        data: what to learn from.
        model: the model's name, for the record.
        build: makes the model; equal seeds must give equal weights.
        strategies: names of strategies and of `BASELINES`; or, by names of your own, pairs of such
            a name and options, in place of ``options``.
        seeds: one run of each strategy for each.
        settings: how long and how fast.
        machine: where and how to compute.
        options: what the strategies may be told.
        others: other models, by name, each made as ``build`` makes its own: sgd trains them too, as
            what a strategy has to beat.
        on_run: called with strategy and seed when a run begins.
        on_step: called after each step.
        on_epoch: called after each epoch with the run so far.
        on_seed: called with the results so far when all runs of a seed are over.

    Raises:
        StrategyError: if a strategy is unknown, named twice, or a baseline with nothing to match;
            before anything is trained.
        PlanError: if the model has not the blocks for one's local modules;
        SettingsError: if one cannot be compiled as the machine asks; both like this.
    """
    for what, values in (("strategy", [*strategies, *others]), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise StrategyError(f"give at least one {what}, and none twice: {list(values)}")
    if not isinstance(strategies, Mapping):
        strategies = {name: (name, options) for name in strategies}
    schedules = {
        name: build_schedule(strategy, settings.epochs, told, data.goal)
        for name, (strategy, told) in strategies.items()
        if strategy not in BASELINES
    }
    for schedule in schedules.values():
        refuse_compiled(schedule, machine)
    example = torch.zeros(settings.batch_size, *data.shape)
    modules = _find_modules(schedules, analyze_on(build(seeds[0]), example))
    schedules |= {name: build_schedule("sgd", settings.epochs, options) for name in others}
    baselines = {name: BASELINES[s] for name, (s, _) in strategies.items() if s in BASELINES}
    if baselines:
        plain, reference = find_reference({name: s for name, (s, _) in strategies.items()})

    def train(name: str, seed: int, schedule: Schedule, epochs: int) -> Run:
        gc.collect()  # the last run's network may wait in a cycle, and its memory be counted here
        if on_run:
            on_run(name, seed)
        try:
            return train_run(
                others.get(name, build)(seed),
                data,
                schedule,
                replace(settings, epochs=epochs),
                machine,
                strategy=name,
                seed=seed,
                on_step=on_step,
                on_epoch=on_epoch,
            )
        except DivergedError as error:
            return replace(error.run, error_percent=None)

    if not machine.compile:  # compiling is counted apart, and would be paid again
        told = [pair for pair in strategies.values() if pair[0] not in BASELINES]
        _warm_up(data, partial(build, seeds[0]), told, settings, machine)
        for other in others.values():
            _warm_up(data, partial(other, seeds[0]), [("sgd", options)], settings, machine)
    runs: list[Run] = []
    results: dict[str, Any] = {}
    for seed in seeds:
        mine = {name: train(name, seed, s, settings.epochs) for name, s in schedules.items()}
        runs += mine.values()
        for name, baseline in baselines.items():
            if mine[reference].error_percent is not None:
                shorter = partial(train, name, seed, schedules[plain])
                run = baseline(mine[plain], mine[reference], shorter)
                runs.append(replace(run, strategy=name))
        results = collect_results(
            data.name, model, settings.epochs, machine, runs, metric=METRICS[data.task]
        )
        if modules:
            results["modules"] = modules
        if others:
            results["other_models"] = list(others)
        if on_seed:
            on_seed(results)
    return results


def _find_modules(schedules: Mapping[str, Schedule], analysis: Analysis) -> dict[str, str]:
    """Say what local modules or segments each strategy has, of those that have any.

    Raises:
        PlanError: if the model cannot be split so.
    """
    texts = {}
    for name, schedule in schedules.items():
        modules = modules_of(schedule, analysis)
        if modules is not None:
            find_split(analysis, modules)
            texts[name] = describe_modules(schedule, modules)
    return texts


def _warm_up(
    data: Data,
    build: Callable[[], nn.Module],
    strategies: Sequence[tuple[str, Options]],
    settings: Settings,
    machine: Machine,
) -> None:
    """Take two steps by each strategy and forget them, so that no run pays for being first."""
    images = torch.arange(min(2 * settings.batch_size, len(data.train)))  # type: ignore[arg-type]
    few = replace(data, train=choose(data.train, images), test=choose(data.test, images[:1]))
    once = replace(settings, epochs=1, grow_batch=False, memory_budget=None)
    schedules = [build_schedule(name, 1, options, data.goal) for name, options in strategies]
    state = random_state()
    for schedule in {repr(schedule): schedule for schedule in schedules}.values():
        with contextlib.suppress(DivergedError):
            train_run(build(), few, schedule, once, machine)
    restore_random_state(state)


def collect_results(
    data: str,
    model: str,
    epochs: int,
    machine: Machine,
    runs: Sequence[Run],
    *,
    metric: str = "error",
) -> dict[str, Any]:
    """Put runs and their summary into the form of ``results.json``; ``metric`` names the error."""
    names = list(dict.fromkeys(run.strategy for run in runs))
    rows = [_finite(asdict(run)) for run in runs]
    return {
        "data": data,
        "model": model,
        "epochs": epochs,
        "metric": metric,
        "device": machine.name,
        "compile": machine.compile,
        "versions": find_versions(),
        "runs": rows,
        "summary": [_summarise(name, rows) for name in names],
    }


def _summarise(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    finished = {(run["strategy"], run["seed"]): run for run in runs if not has_diverged(run)}
    mine = [run for run in finished.values() if run["strategy"] == name]
    errors = [run["error_percent"] for run in mine]
    # Only seeds that both finished: a pair shares its batches and its hour on the machine.
    pairs = [(finished["sgd", r["seed"]], r) for r in mine if ("sgd", r["seed"]) in finished]
    seconds = sum(run["train_seconds"] for run in mine)
    return {
        "strategy": name,
        "error_percent_mean": statistics.fmean(errors) if errors else None,
        "error_percent_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "speedup": (
            sum(speed_seconds(sgd) for sgd, _ in pairs) / sum(speed_seconds(r) for _, r in pairs)
            if pairs
            else None
        ),
        "images_per_second": sum(run["images"] for run in mine) / seconds if mine else None,
    }


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say, in nested dicts and lists, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(results: Mapping[str, Any], folder: Path, name: str = "results.json") -> Path:
    """Write ``results.json`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
