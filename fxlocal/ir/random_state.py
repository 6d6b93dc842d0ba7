"""Seed, save and restore every random generator that a training loop draws from."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["prepare_random_state", "random_state", "restore_random_state", "seed_all", "seeded"]


def seed_all(seed: int, gpus: bool = True) -> None:
    """Seed torch's generators, Python's and numpy's.

    See "Reproducibility" in torch's documentation: a model, or data, may draw from any of them.

    Args:
        seed: any whole number; each generator takes as many bits of it as it can.
        gpus: those of GPUs too.
    """
    import numpy  # slow to import, where torch has not done so

    (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed % 2**63)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of the CPU for the ``with`` block, which leaves them as they were."""
    before = _cpu_state()
    seed_all(seed, gpus=False)
    try:
        yield
    finally:
        restore_random_state(before)


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, Python's and, if it is loaded, numpy's.

    Only plain values and tensors, so that ``torch.load(weights_only=True)`` reads it.
    """
    on_gpus = {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
    return _cpu_state() | on_gpus


def _cpu_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), torch.from_numpy(keys.copy()), *map(float, rest))
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    prepare_random_state(state)()


def prepare_random_state(state: Mapping[str, Any]) -> Callable[[], None]:
    """Return what restores `random_state`'s ``state``, which a generator of each kind has taken.

    The tensors may lie on any device, as ``torch.load(map_location=...)`` puts them: a generator
    takes its state from the CPU. Those of GPUs stay as they are if there are more or fewer now,
    with a warning.

    Raises:
        Exception: of the generator that cannot take its state; none has been changed then.
    """
    steps: list[Callable[[], None]] = []
    on_cpu = state["torch"].cpu()
    torch.Generator().set_state(on_cpu)
    steps.append(partial(torch.set_rng_state, on_cpu))
    version, internal, gauss = state["python"]
    python = version, tuple(internal), gauss
    random.Random().setstate(python)
    steps.append(partial(random.setstate, python))
    if (given := len(state.get("cuda", ()))) == (count := torch.cuda.device_count()):
        for index, of_gpu in enumerate(state.get("cuda", ())):
            on_cpu = of_gpu.cpu()
            torch.Generator(device=f"cuda:{index}").set_state(on_cpu)
            steps.append(partial(torch.cuda.set_rng_state, on_cpu, index))
    elif given:
        warnings.warn(
            f"the random state is of {given} GPUs, and there are {count}: what is drawn on a GPU "
            "differs from now on",
            stacklevel=3,
        )
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, cached = state["numpy"]
        on_cpu = keys.cpu()
        if on_cpu.dtype is not torch.uint32:  # numpy takes others too, rounded
            raise TypeError(f"numpy's random state is {on_cpu.dtype}, not torch.uint32")
        told = name, on_cpu.numpy(), int(position), int(has_gauss), float(cached)
        numpy.random.RandomState().set_state(told)
        steps.append(partial(numpy.random.set_state, told))

    def restore() -> None:
        for step in steps:
            step()

    return restore
