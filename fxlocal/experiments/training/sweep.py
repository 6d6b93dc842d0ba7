"""A sweep: one strategy under every combination of some options' values, with sgd beside it.

The settings of the run (epochs, learning rate ...) are not swept: sgd, which speed-up and error are
measured against, shares them. A setting is on the Pareto front if no other, nor sgd, has both a
lower error and a higher speed-up, one of the two at least as good, and none of its seeds diverged.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from statistics import fmean
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from ...errors import nearest
from .results import finished_runs, has_diverged
from .strategies import Options, StrategyError, build_schedule

__all__ = ["build_variants", "find_front", "parse_grid", "summarise_sweep", "value_text"]

Grid: TypeAlias = Mapping[str, Sequence[Any]]
Variants: TypeAlias = dict[str, tuple[str, Options]]


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read "NAME=VALUE,VALUE,..." texts; NAME is a field of `Options`, whose type says the values.

    A value of several parts, such as a decay's, has them separated by colons.

    Raises:
        StrategyError: if a name or a value is none, or a name or a value comes twice.

    Example:
        >>> parse_grid(["largest=0.4,0.6", "rate-decay=none,0.5:10"])
        {'largest': (0.4, 0.6), 'rate_decay': (None, (0.5, 10))}
    """
    types = get_type_hints(Options)
    known = [field.name for field in fields(Options)]
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        asked, equals, listed = text.partition("=")
        name = asked.strip().replace("-", "_")
        if not equals:
            raise StrategyError(f"--vary {text!r}: give NAME=VALUE,VALUE, as in largest=0.4,0.6")
        if name not in known:
            raise StrategyError(
                f"--vary {text!r}: no strategy has an option {asked!r}. "
                f"Nearest: {nearest(name, known)}"
            )
        if name in grid:
            raise StrategyError(f"--vary {name} comes twice; list all its values in one")
        values = tuple(_read_value(name, types[name], part.strip()) for part in listed.split(","))
        if len(values) < 2:
            option = f"--{name.replace('_', '-')}"
            raise StrategyError(f"--vary {text!r}: give two values or more; {option} takes one")
        if len(set(values)) < len(values):
            raise StrategyError(f"--vary {text!r}: a value comes twice")
        grid[name] = values
    if not grid:
        raise StrategyError("give at least one --vary NAME=VALUE,VALUE, as in largest=0.4,0.6")
    return grid


def build_variants(strategy: str, grid: Grid, epochs: int, options: Options) -> Variants:
    """Return what `compare` is to run: sgd, and ``strategy`` in each setting, by name.

    Raises:
        StrategyError: if there is no such strategy, a setting makes no schedule for it or comes
            twice, or an option that is varied does not concern it.
    """
    settings = _cross(grid)

    def schedule(setting: Mapping[str, Any]) -> str:
        return repr(build_schedule(strategy, epochs, replace(options, **setting)))

    for name, values in grid.items():
        if all(schedule(s) == schedule({**s, name: values[0]}) for s in settings):
            raise StrategyError(f"--vary {name}: strategy {strategy!r} is the same for each value")
    variants = {"sgd": ("sgd", options)}
    for setting in settings:
        name = " ".join(f"{key}={value_text(value)}" for key, value in setting.items())
        if name in variants:
            raise StrategyError(f"setting {name!r} comes twice")
        variants[name] = (strategy, replace(options, **setting))
    return variants


def summarise_sweep(results: Mapping[str, Any], strategy: str, grid: Grid) -> dict[str, Any]:
    """Add to what `compare` returned for `build_variants`: each row's setting, time and place.

    Returns:
        the content of ``sweep.json``: that of ``results.json`` with the swept strategy and
        "vary", the values by name; rows of the summary with "setting" (the values by name, none of
        sgd), "train_seconds_mean" and "on_front".
    """
    settings = [{}, *_cross(grid)]
    rows, finished = results["summary"], finished_runs(results)
    seconds = [[run["train_seconds"] for run in finished.get(row["strategy"], ())] for row in rows]
    # The seeds that did not diverge say too little of a setting that can.
    lost = {run["strategy"] for run in results["runs"] if has_diverged(run)}
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
    return {**results, "strategy": strategy, "vary": vary, "summary": summary}


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


def value_text(value: Any) -> str:
    """Write a value as `parse_grid` reads it."""
    if isinstance(value, (tuple, list)):
        return ":".join(map(value_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _cross(grid: Grid) -> list[dict[str, Any]]:
    """Return every combination of the values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _read_value(name: str, kind: Any, text: str) -> Any:
    try:
        return _read(kind, text)
    except ValueError:
        raise StrategyError(f"--vary {name}: {text!r} is not {_describe(kind)}") from None


def _read(kind: Any, text: str) -> Any:
    """Return ``text`` as a value of the annotated type; ValueError if it is none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return _read(part, text)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        return tuple(_read(p, t) for p, t in zip(parts, text.split(":"), strict=True))
    if origin is Literal:
        return parts[[str(part) for part in parts].index(text)]
    if kind is NoneType or kind is bool:
        words = {"none": None} if kind is NoneType else {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    return kind(text)


def _describe(kind: Any) -> str:
    """Say in words what `_read` takes for the type."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(kind) is tuple:
        return ":".join(map(_describe, parts))
    if parts:
        return " or ".join(map(_describe, parts))
    words = {float: "a number", int: "a whole number", bool: "true or false", NoneType: "none"}
    return words.get(kind, "a text")
