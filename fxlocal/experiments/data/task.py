"""What the labels of a data set are for.

Two tasks: in *classification* each image has one label (a segmentation model then learns it at
every pixel); in *segmentation* each pixel has a label of its own, 1 where the foreground is, and
foreground and prediction are compared by the Dice coefficient.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["METRICS", "SCORES", "Goal", "Task"]

Task: TypeAlias = Literal["classification", "segmentation"]

# What the error of a run is called, and what 100 % less the error is.
METRICS: dict[Task, str] = {"classification": "error", "segmentation": "1 - Dice"}
SCORES = {"error": "accuracy", "1 - Dice": "Dice"}


@dataclass(frozen=True)
class Goal:
    """What there is to learn.

    Attributes:
        num_classes: how many there are.
        task: what the labels are for.
        label_smoothing: as of `torch.nn.functional.cross_entropy`.
        output: the part of the model's output that has the scores, by name or index; or the usual.
    """

    num_classes: int = 10
    task: Task = "classification"
    label_smoothing: float = 0.0
    output: str = ""

    @property
    def part(self) -> str | int | None:
        """``output`` as `fxlocal.LocalModules` takes it."""
        return int(self.output) if self.output.isdigit() else self.output or None
