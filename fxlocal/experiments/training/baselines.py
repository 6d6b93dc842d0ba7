"""Baselines that are plain SGD: for fewer epochs (LoCal+SGD), or on another model.

| name | length of the run |
|---|---|
| ``sgd-same-time`` | what takes the reference's training seconds (Frontiers, Table 3) |
| ``sgd-same-error`` | the fewest epochs to the reference's error (ICLR version, Table 6) |
| a model's name | all epochs, on that model: a smaller one is what whoever lacks time trains |

The reference is the first strategy of a comparison that is neither sgd nor one of these; each
seed has its own. The learning rate falls in proportion to the length, as a run that was cut off
would end at a rate too high to be compared with.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from .results import Run, finished_runs, range_text
from .specs import StrategyError

__all__ = ["BASELINES", "Baseline", "find_reference", "other_lengths"]

Train: TypeAlias = Callable[[int], Run]
Baseline: TypeAlias = Callable[[Run, Run, Train], Run]


def same_time(sgd: Run, reference: Run, train: Train) -> Run:
    """Train for the time of ``reference``, to the nearest whole epoch of ``sgd``'s mean length."""
    seconds_per_epoch = sgd.train_seconds / len(sgd.loss)
    return train(max(1, round(reference.train_seconds / seconds_per_epoch)))


def same_error(sgd: Run, reference: Run, train: Train) -> Run:
    """Return the shortest run found whose error is no higher than that of ``reference``.

    Bisection: errors are taken to fall with the length, which noise can break. If ``sgd`` itself,
    the longest, has the higher error, it is the answer, marked as not having reached it.
    """

    def reaches(run: Run) -> bool:
        error, wanted = run.error_percent, reference.error_percent
        return error is not None and wanted is not None and error <= wanted

    best, too_short, enough = sgd, 0, len(sgd.loss)
    while reaches(best) and enough - too_short > 1:
        middle = (too_short + enough) // 2
        run = train(middle)
        if reaches(run):
            best, enough = run, middle
        else:
            too_short = middle
    return replace(best, reached=reaches(best))


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
