"""How far runs are, on a terminal by bars, else by lines; with ``--quiet`` where results are alone.

A line comes after each epoch, and in a long one before the step that would make it a minute since
the last.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..tracking import Reading
from ..training.results import Run
from .groups import option

__all__ = ["Bars", "Lines", "Quiet", "quietly", "say_place", "show_progress"]

MOST = 60.0  # seconds between two lines, if no step takes longer
Clock = Callable[[], float]
Quiet = Annotated[bool, option("Print errors, and where results are, alone", "Output", "--quiet")]


class _Speed:
    """Counts images, and says how many a second came since it last did."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.images, self.since = clock, 0, clock()

    def take(self) -> str:
        now = self.clock()
        images, seconds = self.images, now - self.since
        self.images, self.since = 0, now
        return _speed_text(images, seconds)


def _speed_text(images: int, seconds: float) -> str:
    speed = images / max(seconds, 1e-9)
    return f"{speed:,.{1 if speed < 10 else 0}f} images/s"


def _error_text(run: Run) -> str:
    """Say what the run's last epoch came to, if that was judged."""
    judged = run.error_epochs[-1:] == [len(run.loss)]
    return f"error {run.error_percent:.2f} %" if judged else ""


class Bars:
    """Two bars: epochs of all runs, and steps of the epoch with its loss."""

    def __init__(self, progress: Progress, epochs: int, clock: Clock = time.monotonic) -> None:
        self.progress, self.speed, self.goes_on = progress, _Speed(clock), False
        self.epochs = progress.add_task("epochs", total=epochs)
        self.steps = progress.add_task("steps", total=None)

    def start(self, what: str) -> None:
        """Say what the bars are about from now on."""
        self.goes_on = True
        self.progress.update(self.epochs, description=what)
        self.progress.reset(self.steps, description="steps")

    def step(self, reading: Reading) -> None:
        """Take a step."""
        if self.goes_on:  # perhaps from a checkpoint
            self.progress.advance(self.epochs, reading.epoch)
            self.goes_on = False
        self.speed.images += reading.batch_size
        self.progress.update(self.steps, completed=reading.step, total=reading.num_steps)
        if reading.loss is not None:
            text = f"loss {reading.loss:.4g}, {self.speed.take()}"
            self.progress.update(self.steps, description=text)

    def epoch(self, run: Run) -> None:
        """Count one epoch, and say what it came to."""
        error = _error_text(run)
        state = f"{run.strategy}, seed {run.seed}{error and ': '}{error}"
        self.progress.update(self.epochs, advance=1, description=state)
        self.progress.reset(self.steps)


class Lines:
    """A line for each epoch, and for each minute of it."""

    def __init__(
        self, echo: Callable[[str], None] = typer.echo, clock: Clock = time.monotonic
    ) -> None:
        self.echo, self.clock, self.what = echo, clock, ""
        self.last = clock()  # when the last step was over
        self.speed = _Speed(clock)  # since the last line
        self.loss: float | None = None
        self.reading: Reading | None = None  # of the epoch's last step

    def start(self, what: str) -> None:
        """Begin what lines are about from now on."""
        self.what, self.reading, self.loss = what, None, None

    def step(self, reading: Reading) -> None:
        """Take a step."""
        now = self.clock()
        self.speed.images += reading.batch_size
        self.reading, self.loss = reading, self.loss if reading.loss is None else reading.loss
        if now + (now - self.last) > self.speed.since + MOST:
            loss = "" if self.loss is None else f"loss {self.loss:.4g}, "
            step = f"step {reading.step} of {reading.num_steps}"
            self.echo(f"{self._epoch(reading)}, {step}: {loss}{self.speed.take()}")
        self.last = now

    def epoch(self, run: Run) -> None:
        """Say what an epoch came to; of a run that is there already, that it is."""
        error = _error_text(run)
        if (reading := self.reading) is not None:
            seconds = run.seconds[-1] - (run.seconds[-2] if len(run.seconds) > 1 else 0.0)
            speed = _speed_text(reading.batch_size * reading.num_steps, seconds)
            told = [f"loss {run.loss[-1]:.4g}", *filter(None, [error]), speed]
            self.echo(f"{self._epoch(reading)}: {', '.join(told)}")
        elif self.what:
            self.echo(f"{self.what}: kept from before{error and ', '}{error}")
            self.what = ""
        self.reading = None
        self.speed.take()

    def _epoch(self, reading: Reading) -> str:
        return f"{self.what}, epoch {reading.epoch + 1} of {reading.epochs}"


@contextmanager
def show_progress(epochs: int) -> Iterator[Bars | Lines]:
    """Show `Bars` while the ``with`` block runs, of so many epochs in all; else write `Lines`."""
    console = Console()
    if not console.is_terminal:
        yield Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield Bars(progress, epochs)


class _Hushed:
    stdout: TextIO | None = None  # what nothing but places is written to


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Drop what the ``with`` block prints, if asked, but for places and errors."""
    if not quiet:
        yield
        return
    _Hushed.stdout = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
            yield
    finally:
        _Hushed.stdout = None


def say_place(place: Path, text: str = "") -> None:
    """Say where a result is: ``text``, or with ``--quiet`` the place alone."""
    if _Hushed.stdout is not None:
        typer.echo(place, file=_Hushed.stdout)
    elif text:
        typer.echo(text)
