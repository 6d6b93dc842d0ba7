"""Baselines that are plain SGD: for fewer epochs (LoCal+SGD), or on another model.

| name | length of the run |
|---|---|
| ``sgd-same-time`` | what takes the reference's training seconds (Frontiers, Table 3) |
| ``sgd-same-error`` | the epochs of sgd's own run to the reference's lowest error (ICLR, Table 6) |
| a model's name | all epochs, on that model: a smaller one is what whoever lacks time trains |

The reference is the first strategy of a comparison that is neither sgd nor one of these; each
seed has its own. For ``sgd-same-time`` the learning rate falls in proportion to the length, as a
run that was cut off would end at a rate too high to be compared with (but not where its schedule
counts epochs, as ``step(every=10)``). ``sgd-same-error`` is such a run nevertheless, since the
paper counts epochs of one schedule, 76 of sgd's 90; it trains nothing, and is as fine as errors are
measured (``--evaluate-every``).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from .results import Run, finished_runs, has_diverged, range_text, summarise
from .specs import StrategyError

__all__ = ["BASELINES", "Baseline", "at_equal_error", "find_reference", "other_lengths"]

Train: TypeAlias = Callable[[int], Run]
Baseline: TypeAlias = Callable[[Run, Run, Train], Run]


def same_time(sgd: Run, reference: Run, train: Train) -> Run:
    """Train for the time of ``reference``, to the nearest whole epoch of ``sgd``'s mean length."""
    seconds_per_epoch = sgd.train_seconds / len(sgd.loss)
    return train(max(1, round(reference.train_seconds / seconds_per_epoch)))


def same_error(sgd: Run, reference: Run, train: Train) -> Run:
    """Return ``sgd`` up to where it has the lowest error of ``reference``."""
    return _until_error(sgd, min(reference.errors, default=-math.inf))


def _until_error(run: Run, error: float) -> Run:
    """Return a run up to the first error that is no higher; all of it if it has not reached one."""
    found = (at for at, own in zip(run.error_epochs, run.errors, strict=True) if own <= error)
    epoch = next(found, None)
    return replace(run, reached=False) if epoch is None else run.until(epoch)


def at_equal_error(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``results.json`` with all runs ended at equal errors, seed by seed.

    That of a strategy ends at its lowest error, and sgd's where it has that of the first strategy;
    a seed without one is left out.
    """
    runs = [Run(**run) for run in results["runs"] if not has_diverged(run)]
    _, reference = find_reference({row["strategy"]: row["strategy"] for row in results["summary"]})
    lowest = {run.seed: min(run.errors) for run in runs if run.strategy == reference}
    rows = [
        _until_error(run, lowest[run.seed] if run.strategy == "sgd" else min(run.errors)).to_json()
        for run in runs
        if run.seed in lowest
    ]
    names = [row["strategy"] for row in results["summary"]]
    return {**results, "runs": rows, "summary": [summarise(name, rows) for name in names]}


BASELINES: dict[str, Baseline] = {"sgd-same-time": same_time, "sgd-same-error": same_error}


def find_reference(strategies: Mapping[str, str]) -> tuple[str, str]:
    """Return the names of plain SGD and of the strategy that the baselines are to match.

    Args:
        strategies: the strategies to be compared, by name.

    Raises:
        StrategyError: if one of the two is missing.
    """
    asked = [name for name, strategy in strategies.items() if strategy in BASELINES]
    plain = [name for name, strategy in strategies.items() if strategy == "sgd"]
    others = [name for name in strategies if name not in (*asked, *plain)]
    if not plain:
        raise StrategyError(
            f"{', '.join(asked)}: plain sgd says how long an epoch takes and what error it ends "
            f"with; add sgd to {', '.join(strategies)}"
        )
    if not others:
        raise StrategyError(
            f"{', '.join(asked)}: no strategy to match in {', '.join(strategies)}; add another, "
            "local-static say"
        )
    return plain[0], others[0]


def other_lengths(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the epochs of each strategy whose runs had another number than the comparison's."""
    lengths = {
        name: {len(run["loss"]) for run in runs} for name, runs in finished_runs(results).items()
    }
    return {
        name: range_text(found) for name, found in lengths.items() if found != {results["epochs"]}
    }
