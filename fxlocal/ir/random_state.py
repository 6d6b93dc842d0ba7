"""Save and restore every random generator that a training loop draws from."""

import random
import sys
from typing import Any

import torch

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, Python's and, if it is loaded, numpy's.

    Only plain values and tensors, so that ``torch.load(weights_only=True)`` reads it.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), torch.from_numpy(keys.copy()), *map(float, rest))
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy(), int(position), int(has_gauss), float(cached)))
