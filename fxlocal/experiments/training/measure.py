"""What a step costs, in seconds and in bytes kept for backward, and with which versions."""

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...budget.kept import count_saved_bytes
from ...budget.times import clock
from ...compiler.analysis import Analysis, analyze
from ...errors import CaptureError
from ...ir.fakes import ExamplesError
from ...plan import Rule
from ..models.catalogue import ModelError
from ..own import RAISED

__all__ = [
    "Cost",
    "EpochClock",
    "analyze_on",
    "clock",
    "count_saved_bytes",
    "count_wire_bytes",
    "find_commit",
    "find_versions",
    "split_seconds",
    "taking",
]

# By the names that C++ has for dtypes; of the others an element is a byte.
BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::Half": 2, "c10::BFloat16": 2}


@dataclass(frozen=True)
class Cost:
    """What the steps of one epoch came to."""

    loss: float
    saved_bytes: int
    seconds: float
    batch_size: int
    num_steps: int
    compile_seconds: float = 0.0
    boundary: int = 0
    predicted_bytes: int | None = None
    rule: Rule | None = None  # of the layers before the boundary
    flops: int = 0  # of one image's forward
    wire_bytes: int | None = None  # that a rank of several handed to the process group
    work: str = ""  # the same of epochs whose steps compute the same; "" where nobody knows

    @property
    def numbers(self) -> dict[str, Any]:
        """What a line about the epoch says of it."""
        hidden = {"num_steps", "rule", "work"} | (
            {"wire_bytes"} if self.wire_bytes is None else set()
        )
        return {name: value for name, value in vars(self).items() if name not in hidden}


class EpochClock:
    """Measures an epoch from its making on: training and compile seconds, and a GPU's bytes."""

    def __init__(self, device: torch.device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.device, self.start = device, clock(device)
        self.compile_seconds, self.num_compiling = 0.0, 0

    @contextmanager
    def compiling(self, steps: int = 0) -> Iterator[None]:
        """Count the ``with`` block as compiling, which takes so many whole steps in as well."""
        start = clock(self.device)
        yield
        self.compile_seconds += clock(self.device) - start
        self.num_compiling += steps

    def state(self) -> dict[str, Any]:
        """Return what it has counted so far, for `go_on`."""
        counted = {"compile_seconds": self.compile_seconds, "num_compiling": self.num_compiling}
        return {"seconds": clock(self.device) - self.start, **counted}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Count on, from what `state` returned."""
        self.leave_out(-state["seconds"])
        self.compile_seconds += state["compile_seconds"]
        self.num_compiling += state["num_compiling"]

    def leave_out(self, seconds: float) -> None:
        """Count so many seconds less."""
        self.start += seconds

    def stop(self, num_steps: int) -> tuple[float, float]:
        """Return the training seconds and the compile seconds of an epoch of ``num_steps``."""
        total = clock(self.device) - self.start
        return split_seconds(total, self.compile_seconds, num_steps, self.num_compiling)

    def peak_bytes(self) -> int:
        """Return the most bytes that were allocated at a time on a GPU; 0 elsewhere."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def split_seconds(
    total: float, compiling: float, num_steps: int, num_compiling: int
) -> tuple[float, float]:
    """Return an epoch's training seconds and compile seconds, which add up to ``total``.

    Args:
        total: all seconds of the epoch.
        compiling: those spent on compiling, and on the steps that compiled.
        num_steps: all steps of the epoch.
        num_compiling: those that compiled. Each did a step's work too, which is taken to last as
            long as the mean of the others; nothing is known of it if there are no others.
    """
    training = total - compiling
    mean = training / (num_steps - num_compiling) if num_compiling < num_steps else 0.0
    work = min(num_compiling * mean, compiling)
    return training + work, compiling - work


@contextmanager
def count_wire_bytes() -> Iterator[Callable[[], int]]:
    """Count the bytes that this process hands to process groups in the ``with`` block.

    By the profiler, which every backend tells of its collectives, whoever starts them: also those
    of `DistributedDataParallel`, which never come by Python.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it tells of GPUs that there are none of
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield lambda: _wire_bytes(profiler)


def _wire_bytes(profiler: Any) -> int:
    events = profiler.profiler.kineto_results.events()
    collectives = [event for event in events if event.name().startswith(("gloo:", "nccl:"))]
    pairs = (pair for one in collectives for pair in zip(one.shapes(), one.dtypes(), strict=True))
    return sum(math.prod(shape) * BYTES.get(dtype, 1) for shape, dtype in pairs)


def analyze_on(model: nn.Module, example: Tensor) -> Analysis:
    """Analyse ``model`` with its costs on a batch like ``example``.

    Raises:
        CaptureError: if the model cannot be captured.
        ModelError: if it cannot take such a batch.
    """
    with taking(example):
        return analyze(model, example)


@contextmanager
def taking(example: Tensor) -> Iterator[None]:
    """Name the size of the images, by a ModelError, if a model cannot take them in the block."""
    try:
        yield
    except (*RAISED, CaptureError) as given:
        if isinstance(given, CaptureError) and not isinstance(given, ExamplesError):
            raise
        error = given.__cause__ if isinstance(given, ExamplesError) else given
        shape = "x".join(map(str, example.shape[1:]))
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the model cannot take images of {shape}: {reason[0]}") from error


def find_versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    packages = {name: version(name) for name in ("fxlocal", "torch", "torchvision")}
    return {"python": platform.python_version(), **packages}


def find_commit() -> str:
    """Return the commit of the library, or nothing where it is not a checkout of its own."""
    here = Path(__file__).parent
    asked = (["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--dirty"])
    found = ""
    for words in asked:
        try:
            git = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        if git.returncode:
            return ""
        found = git.stdout.strip()
    return found
