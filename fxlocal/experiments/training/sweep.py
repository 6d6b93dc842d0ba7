"""A sweep: one spec under every combination of some arguments' values, with sgd beside it.

The settings of the run (epochs, learning rate ...) are not swept: sgd, which speed-up and error are
measured against, shares them. A setting is on the Pareto front if no other, nor sgd, has both a
lower error and a higher speed-up, one of the two at least as good, and none of its seeds diverged.
"""

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from .results import Results, finished_runs, has_diverged
from .specs import Spec, StrategyError, parse_spec, read_value, split_list, value_text

__all__ = ["build_variants", "find_front", "parse_grid", "summarise_sweep", "value_text"]

Grid: TypeAlias = Mapping[str, Sequence[Any]]


def parse_grid(texts: Sequence[str], spec: Spec) -> dict[str, tuple[Any, ...]]:
    """Read "NAME=VALUE,VALUE,..." texts; NAME is an argument of ``spec``, of a type of its own.

    Raises:
        StrategyError: if a name or a value is none, or a name or a value comes twice.

    Example:
        >>> parse_grid(["largest=0.4,0.6", "rate-decay=none,(0.5,10)"], parse_spec("local-static"))
        {'largest': (0.4, 0.6), 'rate_decay': (None, (0.5, 10))}
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        asked, equals, listed = text.partition("=")
        name = asked.strip().replace("-", "_")
        if not equals:
            raise StrategyError(f"--vary {text!r}: give NAME=VALUE,VALUE, as in largest=0.4,0.6")
        if name in grid:
            raise StrategyError(f"--vary {name} comes twice; list all its values in one")
        values = tuple(_value(spec, name, part, text) for part in split_list(listed))
        if len(values) < 2:
            raise StrategyError(f"--vary {text!r}: give two values or more; a spec takes one")
        if len(set(values)) < len(values):
            raise StrategyError(f"--vary {text!r}: a value comes twice")
        grid[name] = values
    if not grid:
        raise StrategyError("give at least one --vary NAME=VALUE,VALUE, as in largest=0.4,0.6")
    return grid


def _value(spec: Spec, name: str, part: str, text: str) -> Any:
    try:
        told = spec.told(**{name: read_value(part)})
    except StrategyError as error:
        raise StrategyError(f"--vary {text!r}: {error}") from None
    return next(own.given[name] for own in told.parts if name in own.given)


def build_variants(spec: Spec, grid: Grid, epochs: int) -> dict[str, Spec]:
    """Return what `compare` is to run: sgd, and ``spec`` in each setting, by name.

    Raises:
        StrategyError: if a setting makes no schedule or comes twice.
    """
    variants = {"sgd": parse_spec("sgd")}
    for setting in _cross(grid):
        name = " ".join(f"{key}={value_text(value)}" for key, value in setting.items())
        if name in variants:
            raise StrategyError(f"setting {name!r} comes twice")
        variants[name] = spec.told(**setting)
        variants[name].schedule(epochs)
    return variants


def summarise_sweep(results: Results, spec: Spec, grid: Grid) -> dict[str, Any]:
    """Add to what `compare` returned for `build_variants`: each row's setting, time and place.

    Returns:
        the content of ``sweep.json``: that of ``results.json`` with the swept strategy and
        "vary", the values by name; rows of the summary with "setting" (the values by name, none of
        sgd), "train_seconds_mean" and "on_front".
    """
    settings = [{}, *_cross(grid)]
    content = results.to_json()
    rows, finished = content["summary"], finished_runs(content)
    seconds = [[run["train_seconds"] for run in finished.get(row["strategy"], ())] for row in rows]
    # The seeds that did not diverge say too little of a setting that can.
    lost = {run["strategy"] for run in content["runs"] if has_diverged(run)}
    front = find_front(
        [
            (None, None) if row["strategy"] in lost else (row["error_percent_mean"], row["speedup"])
            for row in rows
        ]
    )
    summary = [
        {
            **row,
            "setting": setting,
            "train_seconds_mean": fmean(times) if times else None,
            "on_front": on_front,
        }
        for row, setting, times, on_front in zip(rows, settings, seconds, front, strict=True)
    ]
    vary = {name: list(values) for name, values in grid.items()}
    return {**content, "strategy": spec.text, "vary": vary, "summary": summary}


def find_front(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Tell which (error, speed-up) no other betters in one and equals in the other, or betters.

    Points that lack one of the two are not on the front, and keep no other from it.
    """
    known = [(error, speed) for error, speed in points if error is not None and speed is not None]

    def is_beaten(error: float, speed: float) -> bool:
        return any(e <= error and s >= speed and (e, s) != (error, speed) for e, s in known)

    return [
        error is not None and speed is not None and not is_beaten(error, speed)
        for error, speed in points
    ]


def _cross(grid: Grid) -> list[dict[str, Any]]:
    """Return every combination of the values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
