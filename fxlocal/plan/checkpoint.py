"""Activation checkpointing: stages of a network whose activations are computed twice."""

from dataclasses import dataclass
from typing import Literal

from .checks import check_balance, check_counts

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Keep what crosses from stage to stage alone, and compute each stage again in the backward.

    Gradients are exact, bit for bit. The second forward draws the same dropout masks and moves no
    running statistics. The last stage is not computed again: its backward follows at once. It saves
    the memory that `LocalModules` saves, for a second forward of time, and is their baseline
    (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016).

    Args:
        count: number of stages; 1 is plain training.
        balance: what stages have an equal share of: ``"memory"`` (bytes kept for backward),
            ``"blocks"`` or ``"time"`` (FLOPs); or the names of the blocks that begin stages 2 to
            ``count``.

    Raises:
        PlanError: if a value is of the wrong type or out of range.
    """

    count: int
    balance: Literal["memory", "blocks", "time"] | tuple[str, ...] = "memory"

    def __post_init__(self) -> None:
        check_counts(self, "count")
        check_balance(self)
