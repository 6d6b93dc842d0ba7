"""What steps and epochs come to while runs go on: ``metrics.jsonl`` and TensorBoard.

``metrics.jsonl`` has a line for each step and, after those of its steps, one for each epoch. What
has no number is null: a loss that is infinite, or that another process has.

| key | of | what it says |
|---|---|---|
| kind | both | "step" or "epoch" |
| strategy, seed, epochs | both | the run; a baseline may train several, of other lengths |
| epoch | both | from 0 |
| step | both | from 0, through all epochs; an epoch's last |
| loss | both | of the step; the epoch's mean |
| lr | both | learning rate of the first parameter group, in an epoch's last step |
| boundary | both | index of the first layer that back-propagation trains |
| batch_size | both | images in a step |
| seconds | step | since the step before; the epoch's first: since its begin, compilation included |
| seconds | epoch | training, as in ``results.json`` |
| compile_seconds | epoch | compiling, likewise |
| saved_bytes, predicted_bytes | epoch | bytes kept for backward: measured, predicted |
| flops | epoch | of an image's forward |
| wire_bytes | epoch | bytes that each rank of a data parallel run sent; there alone |
| error_percent | epoch | on the test set, if it was evaluated |

A step's numbers stay on the device, and its time is an event there, until `BLOCK` of them are read
at once: no step waits. An epoch is written before its checkpoint, so that each epoch that a resumed
run does not train again is there; the others it writes anew.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..compiler.analysis import Analysis
from ..plan import Rule
from .files import write_file

__all__ = [
    "BLOCK",
    "Board",
    "JsonLines",
    "Reading",
    "RunStart",
    "Step",
    "Tracker",
    "Writer",
    "finite",
]

BLOCK = 100  # steps between two looks at the device
NAMES = ("kind", "strategy", "seed", "epochs", "epoch", "step")  # of a line; the rest are numbers

Draw: TypeAlias = Callable[[Analysis, int, Rule | None], Any]


@dataclass(frozen=True)
class Step:
    """What one step came to.

    Attributes:
        loss: on the device, or None where another process has it.
        index: of the step in its epoch, from 0.
        num_steps: that the epoch has.
    """

    epoch: int
    loss: Tensor | None
    lr: float
    boundary: int
    batch_size: int
    index: int
    num_steps: int


@dataclass(frozen=True)
class Reading:
    """How far a run is: its epoch from 0, of so many, and how many steps of it are taken.

    Attributes:
        loss: of the last step; None where it was not read, as that waits for the device.
    """

    epoch: int
    epochs: int
    step: int
    num_steps: int
    batch_size: int
    loss: float | None


@dataclass(frozen=True)
class RunStart:
    """Where a run begins, or goes on.

    Attributes:
        names: strategy, seed and epochs.
        epoch: its first one from here.
        step: likewise, counted through all epochs.
        device: that it trains on.
        analyze: returns the facts of its model.
    """

    names: Mapping[str, Any]
    epoch: int
    step: int
    device: torch.device
    analyze: Callable[[], Analysis]


class Writer(Protocol):
    """Takes the lines of runs, one run after the other."""

    def start(self, run: RunStart) -> None:
        """Begin a run, or go on with it."""

    def write(self, lines: list[dict[str, Any]], rule: Rule | None = None) -> None:
        """Take some steps, or an epoch whose boundary ``rule`` trains what lies before."""


class Tracker:
    """Collects what steps come to, and has it written in blocks; without writers it is idle."""

    def __init__(self, *writers: Writer) -> None:
        self.writers = writers
        self._steps: list[Step] = []
        self._marks: list[Any] = []  # times: of the step before the first one of the block, and on
        self._run: RunStart | None = None
        self._num_steps, self._lr = 0, math.nan

    def start_run(self, run: RunStart) -> None:
        """Begin a run, or go on with it."""
        self._run, self._num_steps = run, run.step
        for writer in self.writers:
            writer.start(run)

    def start_epoch(self) -> None:
        """Begin an epoch, and its first step."""
        self._steps, self._marks = [], [self._mark()] if self.writers else []

    def step(self, step: Step) -> None:
        """Take a step that is over, without waiting for the device."""
        if self.writers:
            self._steps.append(step)
            self._lr = step.lr
            self._marks.append(self._mark())
            if len(self._steps) == BLOCK:
                self.flush()

    def end_epoch(self, epoch: int, numbers: Mapping[str, Any], rule: Rule | None) -> None:
        """Write the rest of an epoch's steps, then the epoch."""
        if self.writers:
            self.flush()
            line = self._names("epoch", epoch, self._num_steps - 1) | {"lr": self._lr, **numbers}
            for writer in self.writers:
                writer.write([finite(line)], rule)

    def _mark(self) -> Any:
        assert self._run is not None
        if self._run.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._run.device))
        return event

    def flush(self) -> None:
        """Write the steps that are over; this waits for the last one."""
        if not self._steps:
            return
        lines = [
            self._names("step", step.epoch, self._num_steps + i)
            | {"loss": loss, "lr": step.lr, "boundary": step.boundary}
            | {"batch_size": step.batch_size, "seconds": seconds}
            for i, (step, loss, seconds) in enumerate(
                zip(self._steps, self._losses(), self._seconds(), strict=True)
            )
        ]
        self._num_steps += len(lines)
        self._steps, self._marks = [], self._marks[-1:]
        for writer in self.writers:
            writer.write(lines)

    def _losses(self) -> list[float | None]:
        """Read all losses at once, which waits for the last step."""
        losses = [step.loss.detach().float() for step in self._steps if step.loss is not None]
        numbers = iter(torch.stack(losses).tolist() if losses else [])
        return [None if step.loss is None else finite(next(numbers)) for step in self._steps]

    def _seconds(self) -> list[float]:
        if isinstance(self._marks[0], float):
            return [after - mark for mark, after in pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [mark.elapsed_time(after) / 1000 for mark, after in pairwise(self._marks)]

    def _names(self, kind: str, epoch: int, step: int) -> dict[str, Any]:
        assert self._run is not None
        return {"kind": kind, **self._run.names, "epoch": epoch, "step": step}


def finite(value: Any) -> Any:
    """Replace what JSON cannot say, in nested dicts and lists, by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """Appends to ``metrics.jsonl`` in a folder.

    A run drops what an earlier process left of the steps and epochs that it takes again, and what
    that broke off in writing. The first run drops other runs' lines too, unless they are kept.

    Args:
        folder: made if it is missing.
        keep: lines of other runs.
    """

    def __init__(self, folder: Path, keep: bool = False) -> None:
        self.path, self.keep = folder / "metrics.jsonl", keep
        self._ended: set[int] = set()  # epochs whose line is there already
        self._run: RunStart | None = None

    def start(self, run: RunStart) -> None:
        """Note what the run will write again; nothing is written yet."""
        self._run, self._ended = run, set()

    def write(self, lines: list[dict[str, Any]], rule: Rule | None = None) -> None:
        """Append the lines, but for an epoch's that was written before the run was broken off."""
        if run := self._run:
            self._drop(run)
            self.keep, self._run = True, None
        new = [x for x in lines if x["kind"] == "step" or x["epoch"] not in self._ended]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in new)

    def _drop(self, run: RunStart) -> None:
        old = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if run.step and not old:
            self._ended = set(range(run.epoch))  # whoever took them kept no lines
        whole = [line for line in old.splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if self._stays(json.loads(line), run)]
        write_file(self.path, "".join(kept))

    def _stays(self, line: Mapping[str, Any], run: RunStart) -> bool:
        if self.keep and any(line.get(name) != value for name, value in run.names.items()):
            return True
        if line["kind"] == "step":
            return bool(line["step"] < run.step)
        if line["epoch"] < run.epoch:
            self._ended.add(line["epoch"])
        return bool(line["epoch"] < run.epoch)


class Board:
    """Writes for TensorBoard: all numbers of steps and epochs, by step, and the model's picture.

    A run has a folder of its own under ``tensorboard``; one that goes on hides what it writes
    again. The picture is drawn when the boundary moves.

    Args:
        folder: where ``tensorboard`` lies.
        draw: returns the picture (height, width, color) of an analysis, a boundary and its rule.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path, draw: Draw) -> None:
        import torch.utils.tensorboard  # noqa: F401  # now, before anything is trained

        self.folder, self.draw = folder / "tensorboard", draw

    def start(self, run: RunStart) -> None:
        """Note whose the next lines are; nothing is written yet."""
        self._run, self._drawn = run, -1
        self._writer: Any = None

    def write(self, lines: list[dict[str, Any]], rule: Rule | None = None) -> None:
        """Write each number under its kind and name."""
        if self._writer is None:
            self._writer = self._open()
        for line in lines:
            numbers = {key: value for key, value in line.items() if key not in NAMES}
            for key, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(f"{line['kind']}/{key}", value, line["step"])
            if line["kind"] == "epoch" and line["boundary"] != self._drawn:
                self._drawn = line["boundary"]
                picture = self.draw(self._run.analyze(), self._drawn, rule)
                self._writer.add_image("blocks", picture, line["step"], dataformats="HWC")
        self._writer.flush()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        name = "-".join(f"{value}" for value in self._run.names.values())
        safe = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in name)
        return SummaryWriter(self.folder / safe, purge_step=self._run.step)
