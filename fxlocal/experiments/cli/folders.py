"""The folder of a run: whose it is, one run at a time, and going on in it without typing again."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import CheckpointError
from ..data.dataset import Data
from ..files import PARTIAL, lock, write_file
from ..stopping import StoppedError, handle_signals
from ..training.checkpoint import command_line
from ..training.settings import SettingsError
from .options import check_folder, free_folder, option

__all__ = ["JOB", "Folder", "Resume", "find_folder", "read_job", "run_in"]

JOB = "job.json"
# What --overwrite removes, as it tells of the run before.
OURS = (
    *("checkpoint.pt", "best.pt", JOB, "results.json", "sweep.json", "runs.jsonl"),
    *("metrics.jsonl", "report.html"),
)
NOT_KEPT = ("folder", "resume", "out", "overwrite", "preset", "context", "quiet")


def _use_folder(context: typer.Context, folder: Path | None) -> Path | None:
    """Let the options of the run in a folder stand for those that are not given."""
    if folder is not None and not context.resilient_parsing:  # a shell that completes
        try:
            job = read_job(folder)
            if job["verb"] != context.info_name:
                raise CheckpointError(
                    f"{folder} is a run of fxlocal {job['verb']}, not of {context.info_name}"
                )
        except CheckpointError as error:  # no command has begun that would say so in a line
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        context.default_map = job["options"]
    return folder


def read_job(folder: Path, what: str = "run to go on with") -> dict[str, Any]:
    """Return what was noted of the run in a folder; a CheckpointError if nothing was."""
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        return {**job, "verb": job["verb"], "options": dict(job["options"])}
    except OSError as error:
        raise CheckpointError(f"{folder} has no {what}: {JOB}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder / JOB} is damaged: {reason}") from None


Folder = Annotated[Path | None, typer.Argument(hidden=True, is_eager=True, callback=_use_folder)]
Resume = Annotated[bool, option("Go on in the folder behind it", "Output", "--resume")]


def find_folder(
    folder: Path | None, out: Path | None, name: str, *, overwrite: bool, resume: bool
) -> Path:
    """Return the folder that a command writes into; a SettingsError if it is unclear or in use."""
    if folder and not resume:
        raise SettingsError(f"{folder}: a folder goes with --resume; a new run's with --out")
    if folder and out:
        raise SettingsError(f"--out {out}: --resume goes on in {folder}; leave one out")
    if overwrite and resume:
        raise SettingsError("--overwrite and --resume: give one of them")
    return free_folder(folder or out, name, overwrite or resume)


@contextmanager
def run_in(
    folder: Path,
    context: typer.Context,
    *,
    resume: bool,
    free: Collection[str] | None = None,
    data: Data | None = None,
) -> Iterator[None]:
    """Keep other runs out of the folder, and note in it what is run; say how to go on, if stopped.

    Args:
        folder: made if it is missing.
        context: of the command, with its options.
        resume: leave in the folder what is there.
        free: options that may have changed since; None for all, which something else looks after.
        data: whose facts are noted too, for what is made of the trained model.

    Raises:
        CheckpointError: if another option has.
        LockedError: if another run writes into the folder.
    """
    check_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    kept = {name: value for name, value in context.params.items() if name not in NOT_KEPT}
    options = json.loads(json.dumps(kept, default=str))
    job: dict[str, Any] = {} if data is None else {"data": data.facts}
    job |= {"verb": context.info_name, "command": command_line(), "fxlocal": version("fxlocal")}
    with lock(folder), handle_signals():
        if resume and free is not None and (folder / JOB).exists():
            _refuse_changed(folder, options, free)
        for unfinished in folder.glob("*" + PARTIAL):  # of a run that was killed
            unfinished.unlink()
        for name in () if resume else OURS:
            (folder / name).unlink(missing_ok=True)
        before = (folder / JOB).read_text() if (folder / JOB).exists() else None
        write_file(folder / JOB, json.dumps({**job, "options": options}, indent=2) + "\n")
        try:
            yield
        except Exception:
            if before is not None:  # it is still that other run's folder
                write_file(folder / JOB, before)
            elif [path.name for path in folder.iterdir()] == [JOB]:  # refused before it began
                (folder / JOB).unlink()
                for path in made:
                    path.rmdir()
            raise
        except StoppedError as stop:
            going_on = f"go on with fxlocal {context.info_name} --resume {folder}"
            typer.echo(f"\nstopped {stop.where or 'between two runs'}; {going_on}", err=True)
            raise typer.Exit(128 + stop.number) from None


def _refuse_changed(folder: Path, options: Mapping[str, Any], free: Collection[str]) -> None:
    there = read_job(folder)["options"]
    changed = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in options.items()
        if name not in free and there.get(name) != value
    ]
    if changed:
        raise CheckpointError(f"{folder} is of another run: {'; '.join(changed)}")
