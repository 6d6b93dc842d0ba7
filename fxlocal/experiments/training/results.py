"""What runs showed: `Run` and `Results`, their JSON, and what readers of ``results.json`` ask it.

Dataclasses while runs go on; their JSON, whose keys are those of ``results.json``, is what is
written, and what the report shows of it, now or from a file.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from ..files import write_file
from ..tracking import finite
from .measure import find_versions
from .settings import Machine

__all__ = [
    "DivergedError",
    "Results",
    "Run",
    "RunLog",
    "boundary_text",
    "count_text",
    "end_of",
    "epoch_columns",
    "finished_runs",
    "has_diverged",
    "is_number",
    "note_of",
    "other_models",
    "range_text",
    "runs_of",
    "speed_seconds",
    "summarise",
    "write_results",
]

ResultsJson: TypeAlias = Mapping[str, Any]
RunJson: TypeAlias = Mapping[str, Any]


@dataclass
class Run:
    """What one run showed.

    Lists have one entry per epoch; ``errors`` and ``error_epochs`` one per evaluation. ``seconds``
    counts training seconds from the start of the run, ``images`` all that were learned from, and
    ``flops`` those of an image's forward; ``wire_bytes`` what each rank of several handed to the
    process group in an epoch's steps; ``work`` is the same text where steps compute the same.
    ``reached`` is False of a baseline that is to have another run's error and never does.
    """

    strategy: str
    seed: int
    error_percent: float | None = None
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    saved_bytes: list[int] = field(default_factory=list)
    boundary: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    error_epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)
    predicted_bytes: list[int] = field(default_factory=list)
    images: int = 0
    flops: list[int] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    work: list[str] = field(default_factory=list)
    reached: bool = True

    def until(self, epoch: int) -> "Run":
        """Return the run as it was after ``epoch`` epochs, when its error was measured."""
        known = self.error_epochs.index(epoch) + 1
        lists = {name: v for name, v in vars(self).items() if isinstance(v, list)}
        shorter: dict[str, Any] = {name: values[:epoch] for name, values in lists.items()}
        shorter |= {name: lists[name][:known] for name in ("errors", "error_epochs")}
        return replace(
            self,
            error_percent=self.errors[known - 1],
            train_seconds=self.seconds[epoch - 1],
            images=round(self.images * epoch / len(self.loss)),
            **shorter,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can say of it: numbers that are not finite become None."""
        row: dict[str, Any] = finite(asdict(self))
        return row


class DivergedError(RuntimeError):
    """The loss is no longer a number; ``run`` holds what came before."""

    def __init__(self, message: str, run: Run):
        super().__init__(message, run)  # both, to be sent from process to process
        self.run = run

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Results:
    """What a comparison, or one run, came to.

    Attributes:
        data: the name of the data set.
        model: the name of the model.
        epochs: of each run but the baselines'.
        machine: that they ran on.
        metric: what the error is called.
        runs: in the order in which they ended.
        modules: what local modules or checkpointed stages a strategy has, of those that have any.
        others: names of runs that are plain SGD on another model.
    """

    data: str
    model: str
    epochs: int
    machine: Machine
    metric: str = "error"
    runs: list[Run] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``results.json``, with a summary of each strategy's runs."""
        names = dict.fromkeys(run.strategy for run in self.runs)
        rows = [run.to_json() for run in self.runs]
        content = {
            "data": self.data,
            "model": self.model,
            "epochs": self.epochs,
            "metric": self.metric,
            "device": self.machine.name,
            "compile": self.machine.compile,
            "versions": find_versions(),
            "runs": rows,
            "summary": [summarise(name, rows) for name in names],
        }
        named = {"modules": dict(self.modules), "other_models": list(self.others)}
        return content | {key: value for key, value in named.items() if value}


def summarise(name: str, runs: Sequence[RunJson]) -> dict[str, Any]:
    """Return the row of a strategy in the summary of ``runs``, which sgd's are among."""
    finished = {(run["strategy"], run["seed"]): run for run in runs if not has_diverged(run)}
    mine = [run for run in finished.values() if run["strategy"] == name]
    errors = [run["error_percent"] for run in mine]
    # Only seeds that both finished: a pair shares its batches and its hour on the machine.
    pairs = [(finished["sgd", r["seed"]], r) for r in mine if ("sgd", r["seed"]) in finished]
    seconds = sum(run["train_seconds"] for run in mine)
    return {
        "strategy": name,
        "error_percent_mean": statistics.fmean(errors) if errors else None,
        "error_percent_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "speedup": (
            sum(speed_seconds(sgd) for sgd, _ in pairs) / sum(speed_seconds(r) for _, r in pairs)
            if pairs
            else None
        ),
        "images_per_second": sum(run["images"] for run in mine) / seconds if mine else None,
    }


def write_results(results: ResultsJson, folder: Path, name: str = "results.json") -> Path:
    """Write ``results.json`` into ``folder`` and return its path."""
    path = folder / name
    write_file(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return path


class RunLog:
    """Runs that have ended, in a file of a line of JSON each, so that what was stopped can go on.

    Each is kept with the ``job`` that it was: all that its numbers depend on, as JSON has it.

    Args:
        path: of the file.
        resume: keep what is in it; a line that was not written to its end is lost.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if resume and path.exists() else []
        self._runs: list[tuple[Any, Run]] = []
        for line in lines:
            with suppress(ValueError, TypeError):
                job, run = json.loads(line)
                self._runs.append((job, Run(**run)))
        if path.exists():
            self._write()

    def add(self, job: Mapping[str, Any] | None, run: Run) -> None:
        """Note a run that has ended; without a job, it is none to be found again."""
        if job is not None:
            self._runs.append((_plain(job), run))
            self._write()

    def _write(self) -> None:
        lines = (json.dumps([job, run.to_json()]) + "\n" for job, run in self._runs)
        write_file(self.path, "".join(lines))

    def find(
        self, job: Mapping[str, Any], name: str, seeds: Sequence[int]
    ) -> dict[tuple[str, int], Run]:
        """Return the runs of ``job`` by ``name``, which they have from now on, and seed."""
        wanted = _plain(job)
        runs = [run for own, run in self._runs if own == wanted and run.seed in seeds]
        return {(name, run.seed): replace(run, strategy=name) for run in runs}


def _plain(job: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(job, default=str))


# Of the content of results.json


def runs_of(results: ResultsJson) -> dict[str, list[RunJson]]:
    """Return the runs by strategy, in the order of the summary."""
    return {
        row["strategy"]: [run for run in results["runs"] if run["strategy"] == row["strategy"]]
        for row in results["summary"]
    }


def finished_runs(results: ResultsJson) -> dict[str, list[RunJson]]:
    """Return those of `runs_of` that came to their end; strategies without any are left out."""
    finished = {
        name: [run for run in runs if not has_diverged(run)]
        for name, runs in runs_of(results).items()
    }
    return {name: runs for name, runs in finished.items() if runs}


def has_diverged(run: RunJson) -> bool:
    """Tell whether the run ended with no error, because its loss stopped being a number."""
    return not is_number(run["error_percent"])


def end_of(run: RunJson, epochs: int) -> str:
    """Say how a run of ``epochs`` ended without an error: by its loss, or by being stopped."""
    stopped = 0 < len(run["loss"]) < epochs and all(map(is_number, run["loss"]))
    return "unfinished" if stopped else "diverged"


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is a finite number, as JSON's null and NaN are not."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def note_of(runs: Sequence[RunJson], epochs: int) -> str:
    """Return what to write behind a strategy's name: how many of its runs failed, and how."""
    ends = [end_of(run, epochs) for run in runs if has_diverged(run)]
    counts = {end: ends.count(end) for end in ("diverged", "unfinished")}
    counts |= {"not reached": sum(not run["reached"] and not has_diverged(run) for run in runs)}
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return f" ({', '.join(notes)})" if notes else ""


def other_models(results: ResultsJson) -> list[str]:
    """Return the rows that are other models than the one that the strategies train."""
    return list(results.get("other_models", ()))


def epoch_columns(results: ResultsJson) -> dict[str, tuple[str, str]]:
    """Return the mean seconds of cold and of warm epochs by strategy; nothing if none caches.

    An epoch is cold if its boundary is new, so that a cache is filled, and warm if it was the last
    one's too, so that it is read.
    """
    if not any("cache=" in row["strategy"] for row in results["summary"]):
        return {}
    return {
        name: (_mean_seconds(runs, new=True), _mean_seconds(runs, new=False))
        for name, runs in finished_runs(results).items()
    }


def _mean_seconds(runs: Sequence[RunJson], *, new: bool) -> str:
    found = [seconds for run in runs for seconds in _seconds(run, new=new)]
    return f"{statistics.fmean(found):.2f}" if found else "-"


def _seconds(run: RunJson, *, new: bool) -> Iterator[float]:
    """Yield the seconds of each epoch with a boundary that the epoch before had not, or had."""
    epochs = zip(pairwise([0.0, *run["seconds"]]), pairwise([0, *run["boundary"]]), strict=True)
    for (begin, end), (before, boundary) in epochs:
        if boundary and (before != boundary) == new:
            yield end - begin


def range_text(values: Iterable[int]) -> str:
    """Return the one value that all share, or the lowest and the highest; nothing of none."""
    numbers = sorted(set(values))
    return " to ".join(str(n) for n in dict.fromkeys([*numbers[:1], *numbers[-1:]]))


def count_text(number: int, one: str, many: str | None = None) -> str:
    """Return the number with what it counts."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def boundary_text(results: ResultsJson, strategy: str, runs: Sequence[RunJson]) -> str:
    """Return the boundary in the last epoch, or from the lowest to the highest of the runs'.

    Nothing of other models, and of local modules without a prefix, which have no boundary.
    """
    boundaries = [run["boundary"][-1] for run in runs]
    none = strategy in results.get("modules", ()) and not any(boundaries)
    return "" if none or strategy in other_models(results) else range_text(boundaries)


def speed_seconds(run: RunJson) -> float:
    """Return what a speed-up compares: the training seconds per image, times the epochs.

    Of equal lengths, equal images make it proportional to the training seconds; images that an
    epoch of larger batches leaves out are no speed, whereas fewer epochs are.
    """
    return float(run["train_seconds"] / run["images"] * len(run["loss"]))
