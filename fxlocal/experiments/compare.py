"""Train the same model with several strategies from the same seeds, and say what each bought."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from .data import Data
from .measure import find_versions
from .settings import Machine, Settings
from .strategies import Options, StrategyError, build_schedule
from .train import DivergedError, Run, train_run

__all__ = ["collect_results", "compare", "write_results"]


def compare(
    data: Data,
    model: str,
    build: Callable[[int], nn.Module],
    strategies: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    machine: Machine,
    options: Options,
    *,
    on_run: Callable[[str, int], None] | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Run], None] | None = None,
) -> dict[str, Any]:
    """Run every strategy from every seed and return the results, ready for ``results.json``.

    Equal seeds mean equal first weights and equal batches. Strategies take turns within a seed, so
    that a machine that grows slower slows them all. A run whose loss stops being a number ends
    there, with an error of None; the others go on.

    Args:
        data: what to learn from.
        model: the model's name, for the record.
        build: makes the model; equal seeds must give equal weights.
        strategies: names of strategies.
        seeds: one run of each strategy for each.
        settings: how long and how fast.
        machine: where and how to compute.
        options: what the strategies may be told.
        on_run: called with strategy and seed when a run begins.
        on_step: called after each step.
        on_epoch: called after each epoch with the run so far.

    Raises:
        StrategyError: if a strategy is unknown, or named twice; before anything is trained.
    """
    for what, values in (("strategy", strategies), ("seed", seeds)):
        if not values or len(set(values)) < len(values):
            raise StrategyError(f"give at least one {what}, and none twice: {list(values)}")
    schedules = {name: build_schedule(name, settings.epochs, options) for name in strategies}
    runs = []
    for seed in seeds:
        for name, schedule in schedules.items():
            if on_run:
                on_run(name, seed)
            try:
                run = train_run(
                    build(seed),
                    data,
                    schedule,
                    settings,
                    machine,
                    strategy=name,
                    seed=seed,
                    on_step=on_step,
                    on_epoch=on_epoch,
                )
            except DivergedError as error:
                run = replace(error.run, error_percent=None)
            runs.append(run)
    return collect_results(data.name, model, settings.epochs, machine, runs)


def collect_results(
    data: str, model: str, epochs: int, machine: Machine, runs: Sequence[Run]
) -> dict[str, Any]:
    """Put runs and their summary into the form of ``results.json``."""
    names = list(dict.fromkeys(run.strategy for run in runs))
    return {
        "data": data,
        "model": model,
        "epochs": epochs,
        "device": machine.name,
        "versions": find_versions(),
        "runs": [_finite(asdict(run)) for run in runs],
        "summary": [_summarise(name, runs) for name in names],
    }


def _summarise(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    finished = {(run.strategy, run.seed): run for run in runs if run.error_percent is not None}
    mine = [run for run in finished.values() if run.strategy == name]
    errors = [run.error_percent for run in mine if run.error_percent is not None]
    # Only seeds that both finished: a pair shares its batches and its hour on the machine.
    pairs = [(finished["sgd", run.seed], run) for run in mine if ("sgd", run.seed) in finished]
    return {
        "strategy": name,
        "error_percent_mean": statistics.fmean(errors) if errors else None,
        "error_percent_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "speedup": (
            sum(sgd.train_seconds for sgd, _ in pairs) / sum(run.train_seconds for _, run in pairs)
            if pairs
            else None
        ),
    }


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say, in nested dicts and lists, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``results.json`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
