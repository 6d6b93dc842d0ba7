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

__all__ = ["analyze_on", "clock", "count_saved_bytes", "find_versions"]


def clock(device: torch.device) -> float:
    """Return the time in seconds, once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
