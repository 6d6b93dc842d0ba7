"""``fxlocal report``: the page of a run again, from its folder; of several runs, one page of all.

Writes report.html; of several folders, with ``--out``, also the results.json of all runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import nearest
from ..files import lock
from ..training.results import summarise, write_results
from ..training.settings import SettingsError
from .console import one_line_errors
from .options import Out, Overwrite, check_folder, free_folder

__all__ = ["command"]

NAMES = ("results.json", "sweep.json")
RUNS = ("runs", "summary")  # and what may differ from folder to folder, as the page says
BY_NAME = ("options", "modules", "prefixes", "module_starts")  # of strategies
FREE = (*RUNS, *BY_NAME, "other_models", "command", "date", "commit", "host")
NOTED = ("device", "compile", "versions")


@one_line_errors
def command(
    folders: Annotated[list[Path], typer.Argument(help="Of runs", metavar="FOLDER...")],
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the page of a run again, or one page of several runs of the same settings."""
    from ..report.page import PICTURE, write_page  # Bokeh is slow to import

    contents = {str(folder): _read(folder) for folder in folders}
    if len(contents) > 1 and out is None:
        raise SettingsError("several folders make a page of their own: give its folder, --out")
    folder = folders[0] if out is None else free_folder(out, "", overwrite)
    check_folder(folder)
    try:
        content, drawn = _merged(contents), folders[0] / PICTURE
        picture = drawn.read_text(encoding="utf-8") if drawn.exists() else None
        with lock(folder):
            page = write_page(content, folder, picture)
            if out is not None and "vary" not in content:
                write_results(content, folder)
    except (OSError, SettingsError):
        raise
    except Exception as error:  # of many classes, by what a file lacks
        reason = f"{type(error).__name__}: {error}"
        raise SettingsError(f"{', '.join(contents)}: no page can be made: {reason}") from error
    typer.echo(f"report: {page}")


def _read(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's results; a SettingsError if there are none."""
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if path is None:
        near = nearest(str(folder), (str(p) for p in folder.parent.glob("*") if p.is_dir()))
        raise SettingsError(f"{folder} has no {' or '.join(NAMES)}. Nearest folders: {near}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in (*RUNS, "data", "model", "epochs") if name not in content]
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path} holds no results: {error}") from None
    if missing:
        raise SettingsError(f"{path} holds no results: it has no {', '.join(missing)}")
    return dict(content)


def _merged(contents: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the results of all folders as those of one, if they share what runs of a page do."""
    (first, merged), *others = contents.items()
    for folder, content in others:
        if "vary" in content or "vary" in merged:
            raise SettingsError(f"{first}, {folder}: a sweep has a page of its own")
        names = sorted({*merged, *content}.difference(FREE))
        told = {
            name: f"{name} is {a!r} in {first} and {b!r} in {folder}"
            for name in names
            for a, b in _differing(merged.get(name), content.get(name))
        }
        for name in told.keys() & set(NOTED):
            typer.echo(f"note: {told.pop(name)}")
        if told:
            raise SettingsError(f"one page is of equal settings: {'; '.join(told.values())}")
        merged = _joined(merged, content, f"{first} and {folder}")
    return merged


def _differing(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """Return both, or of two tables the entries that differ, if they do."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
        a, b = ({name: one.get(name) for name in names} for one in (a, b))
    return [(a, b)] if a != b else []


def _joined(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> dict[str, Any]:
    runs = {(run["strategy"], run["seed"]): run for run in one["runs"]}
    for run in other["runs"]:
        name = run["strategy"], run["seed"]
        if runs.setdefault(name, run) != run:
            raise SettingsError(f"{name[0]}, seed {name[1]}, is in {where}, with other numbers")
    rows: Sequence[Any] = list(runs.values())
    summary = [summarise(name, rows) for name in dict.fromkeys(run["strategy"] for run in rows)]
    joined = {**one, "runs": rows, "summary": summary}
    for part in BY_NAME:
        if part in one or part in other:
            joined |= {part: {**one.get(part, {}), **other.get(part, {})}}
    models = dict.fromkeys([*one.get("other_models", ()), *other.get("other_models", ())])
    commands = [content["command"] for content in (one, other) if "command" in content]
    return joined | {"other_models": list(models), "command": "; ".join(commands)}
