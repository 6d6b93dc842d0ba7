"""A sweep: one spec under every combination of some arguments' values, with sgd beside it.

Settings of the run (learning rate, label smoothing ...) are swept too, and sgd with them, so that
it is tuned as the strategy is. Speed-up is measured against sgd as the command line has it. A
setting is on the Pareto front if no other, nor sgd, has both a lower error and a higher speed-up,
one of the two at least as good, and none of its seeds diverged.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeAlias, get_type_hints

from .results import Results, finished_runs, has_diverged
from .settings import Settings
from .specs import Spec, StrategyError, fitted, parse_spec, read_value, split_list, value_text

__all__ = [
    "SWEPT",
    "build_settings",
    "build_variants",
    "find_front",
    "parse_grid",
    "summarise_sweep",
    "value_text",
]

# Settings of the run that may be swept; the others do not change what a step learns.
SWEPT: tuple[str, ...] = ("lr", "lr_schedule", "momentum", "weight_decay", "optimizer")
SWEPT += ("batch_size", "lr_of", "augment", "label_smoothing", "clip", "accumulate", "ema")

Grid: TypeAlias = Mapping[str, Sequence[Any]]


def parse_grid(texts: Sequence[str], spec: Spec) -> dict[str, tuple[Any, ...]]:
    """Read "NAME=VALUE,VALUE,..." texts; NAME is an argument of ``spec`` or a setting of the run.

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
        if name in SWEPT and not any(name in own.arguments for own in spec.parts):
            is_text = get_type_hints(Settings)[name] is str
            return fitted("the run", Settings, name, part if is_text else read_value(part))
        told = spec.told(**{name: read_value(part)})
    except StrategyError as error:
        raise StrategyError(f"--vary {text!r}: {error}") from None
    return next(own.given[name] for own in told.parts if name in own.given)


def build_variants(
    spec: Spec, grid: Grid, epochs: int, settings: Settings | None = None
) -> dict[str, Spec]:
    """Return what `compare` is to run, by name: sgd, and ``spec`` in each setting.

    If settings of the run are swept, sgd comes in each of them but ``settings``, its first ones.

    Raises:
        SettingsError: if a setting is out of range;
        StrategyError: if one makes no schedule or comes twice.
    """
    variants, runs = {"sgd": parse_spec("sgd")}, _of_runs(spec, grid)
    for setting in _cross(runs) if runs else ():
        if settings is None or replace(settings, **setting) != settings:
            variants[f"sgd {_name_of(setting)}"] = parse_spec("sgd")
    for setting in _cross(grid):
        name = _name_of(setting)
        if name in variants:
            raise StrategyError(f"setting {name!r} comes twice")
        variants[name] = spec.told(**{n: v for n, v in setting.items() if n not in runs})
        variants[name].schedule(epochs)
    return variants


def build_settings(spec: Spec, grid: Grid, settings: Settings) -> dict[str, Settings]:
    """Return the settings of each of `build_variants` that has others than ``settings``."""
    runs = _of_runs(spec, grid)
    own = {f"sgd {_name_of(setting)}": setting for setting in _cross(runs) if setting}
    own |= {
        _name_of(setting): {n: v for n, v in setting.items() if n in runs}
        for setting in _cross(grid)
    }
    made = {name: replace(settings, **told) for name, told in own.items()}
    return {name: one for name, one in made.items() if one != settings}


def _of_runs(spec: Spec, grid: Grid) -> Grid:
    """Return the part of the grid that is settings of the run."""
    known = [name for part in spec.parts for name in part.arguments]
    return {name: values for name, values in grid.items() if name not in known}


def _name_of(setting: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value_text(value)}" for key, value in setting.items())


def summarise_sweep(results: Results, spec: Spec, grid: Grid) -> dict[str, Any]:
    """Add to what `compare` returned for `build_variants`: each row's setting, time and place.

    Returns:
        the content of ``sweep.json``: that of ``results.json`` with the swept strategy and
        "vary", the values by name; rows of the summary with "setting" (the values by name, none of
        sgd), "train_seconds_mean" and "on_front".
    """
    content = results.to_json()
    rows, finished = content["summary"], finished_runs(content)
    crossed = _cross(grid)
    settings: list[dict[str, Any]] = [{}] * (len(rows) - len(crossed)) + crossed  # none of sgd
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
