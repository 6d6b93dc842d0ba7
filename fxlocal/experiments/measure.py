"""What a step costs, in seconds and in bytes kept for backward, and with which versions."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import Tensor, nn

from ..analysis import Analysis, analyze
from ..errors import CaptureError
from .models import ModelError

__all__ = [
    "EpochClock",
    "analyze_on",
    "clock",
    "count_saved_bytes",
    "find_versions",
    "split_seconds",
]


def clock(device: torch.device) -> float:
    """Return the time in seconds, once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class EpochClock:
    """Tells, from its making on, the training seconds of an epoch from its compile seconds."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, clock(device)
        self.compile_seconds, self.num_compiling = 0.0, 0

    @contextmanager
    def compiling(self, steps: int = 0) -> Iterator[None]:
        """Count the ``with`` block as compiling, which takes so many whole steps in as well."""
        start = clock(self.device)
        yield
        self.compile_seconds += clock(self.device) - start
        self.num_compiling += steps

    def stop(self, num_steps: int) -> tuple[float, float]:
        """Return the training seconds and the compile seconds of an epoch of ``num_steps``."""
        total = clock(self.device) - self.start
        return split_seconds(total, self.compile_seconds, num_steps, self.num_compiling)


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
def count_saved_bytes(model: nn.Module, *inputs: Tensor) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves for backward inside the ``with`` block.

    Every storage counts once and whole; the model's own parameters and buffers, and the inputs
    given, do not count, because they are there anyway. Nothing is computed differently.
    """
    there = (*model.parameters(), *model.buffers(), *inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in there}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output would otherwise hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(saved.values())


def analyze_on(model: nn.Module, example: Tensor) -> Analysis:
    """Analyse ``model`` with its costs on a batch like ``example``.

    Raises:
        CaptureError: if the model cannot be captured.
        ModelError: if it cannot take such a batch.
    """
    try:
        return analyze(model, example)
    except CaptureError:
        raise
    except Exception as error:  # the model's own code runs, which may raise anything
        shape = "x".join(map(str, example.shape[1:]))
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the model cannot take images of {shape}: {reason[0]}") from error


def find_versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    packages = {name: version(name) for name in ("fxlocal", "torch", "torchvision")}
    return {"python": platform.python_version(), **packages}
