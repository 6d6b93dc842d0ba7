"""Of rows that are a grid of settings: the best one, and what a loss of accuracy buys."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean
from typing import Any, TypeAlias

__all__ = ["choose_best", "meet_budgets", "setting_text", "tune"]

Row: TypeAlias = Mapping[str, Any]  # as `tabulate` returns them


def choose_best(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those of a grid, but for the one with the lowest error of each."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        name = row["network"], row["row"], row["modules"]
        pair = best.get(name, row), row
        best[name] = min(pair, key=lambda one: _or_inf(one["error_percent_mean"]))
    return list(best.values())


def tune(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return the mean error of each network's rows by the setting of a grid, the lowest first.

    BackLink chooses alpha so, for a network and not for each of its rows. The error is None of a
    setting by which a row diverged. Networks without a grid are left out.
    """
    errors: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        if row["setting"]:
            own = errors.setdefault(row["network"], {})
            own.setdefault(setting_text(row), []).append(row["error_percent_mean"])
    found = {
        network: {text: _mean(values) for text, values in own.items()}
        for network, own in errors.items()
    }
    return {
        network: dict(sorted(own.items(), key=lambda item: _or_inf(item[1])))
        for network, own in found.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _or_inf(error: float | None) -> float:
    """Return the error, that of what diverged behind all others."""
    return math.inf if error is None else error


def setting_text(row: Row) -> str:
    """Return the setting of a grid that a row is of, empty if it is of none."""
    return ", ".join(f"{name} {value}" for name, value in row["setting"].items())


def meet_budgets(rows: Sequence[Row], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Return what each budget of lost accuracy buys (LoCal+SGD, ICLR version, Table 7).

    Args:
        rows: of one network: sgd's, those of a strategy, and those of the one to set beside it.
        budgets: in points below sgd.

    Returns:
        per budget, "budget", "local": the fastest row of the strategy that loses no more, and
        "frozen": the one of the other that loses the least and takes no longer; None of none.
    """
    names = list(dict.fromkeys(row["row"] for row in rows if row["method"] != "sgd"))
    known = [row for row in rows if None not in (row["error_loss_mean"], row["speedup"])]
    mine, others = ([row for row in known if row["row"] == name] for name in names)
    met = []
    for budget in budgets:
        within = [row for row in mine if row["error_loss_mean"] <= budget]
        local = max(within, key=itemgetter("speedup"), default=None)
        as_fast = [row for row in others if local and row["speedup"] >= local["speedup"]]
        frozen = min(as_fast, key=itemgetter("error_loss_mean"), default=None)
        met.append({"budget": budget, "local": local, "frozen": frozen})
    return met
