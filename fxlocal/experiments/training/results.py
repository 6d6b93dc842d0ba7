"""What the content of ``results.json`` says of its runs: which came to their end, at what speed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

__all__ = [
    "boundary_text",
    "count_text",
    "finished_runs",
    "has_diverged",
    "is_number",
    "note_of",
    "other_models",
    "range_text",
    "runs_of",
    "speed_seconds",
]

Results: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Mapping[str, Any]


def runs_of(results: Results) -> dict[str, list[Run]]:
    """Return the runs by strategy, in the order of the summary."""
    return {
        row["strategy"]: [run for run in results["runs"] if run["strategy"] == row["strategy"]]
        for row in results["summary"]
    }


def finished_runs(results: Results) -> dict[str, list[Run]]:
    """Return those of `runs_of` that came to their end; strategies without any are left out."""
    finished = {
        name: [run for run in runs if not has_diverged(run)]
        for name, runs in runs_of(results).items()
    }
    return {name: runs for name, runs in finished.items() if runs}


def has_diverged(run: Run) -> bool:
    """Tell whether the run ended with no error, because its loss stopped being a number."""
    return not is_number(run["error_percent"])


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is a finite number, as JSON's null and NaN are not."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def note_of(runs: Sequence[Run]) -> str:
    """Return what to write behind a strategy's name: how many of its runs failed, and how."""
    counts = {
        "diverged": sum(map(has_diverged, runs)),
        "not reached": sum(not run["reached"] and not has_diverged(run) for run in runs),
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return f" ({', '.join(notes)})" if notes else ""


def other_models(results: Results) -> list[str]:
    """Return the rows that are other models than the one that the strategies train."""
    return list(results.get("other_models", ()))


def range_text(values: Iterable[int]) -> str:
    """Return the one value that all share, or the lowest and the highest; nothing of none."""
    numbers = sorted(set(values))
    return " to ".join(str(n) for n in dict.fromkeys([*numbers[:1], *numbers[-1:]]))


def count_text(number: int, one: str, many: str | None = None) -> str:
    """Return the number with what it counts."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def boundary_text(results: Results, strategy: str, runs: Sequence[Run]) -> str:
    """Return the boundary in the last epoch, or from the lowest to the highest of the runs'.

    Nothing of other models, and of local modules without a prefix, which have no boundary.
    """
    boundaries = [run["boundary"][-1] for run in runs]
    none = strategy in results.get("modules", ()) and not any(boundaries)
    return "" if none or strategy in other_models(results) else range_text(boundaries)


def speed_seconds(run: Run) -> float:
    """Return what a speed-up compares: the training seconds per image, times the epochs.

    Of equal lengths, equal images make it proportional to the training seconds; images that an
    epoch of larger batches leaves out are no speed, whereas fewer epochs are.
    """
    return float(run["train_seconds"] / run["images"] * len(run["loss"]))
