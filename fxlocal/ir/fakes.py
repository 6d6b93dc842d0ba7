"""Run a graph on fake tensors: shapes, dtypes and strides, but no data and no arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["run_on_fakes"]


def run_on_fakes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    make_interpreter: Callable[[frozenset[int]], fx.Interpreter],
    context: Any = None,
) -> None:
    """Interpret ``gm`` on fake copies of its state and of ``example_inputs``.

    Args:
        gm: the graph.
        example_inputs: one batch of inputs; only shapes, dtypes and devices are used.
        make_interpreter: makes the interpreter of ``gm`` from the storages (their ``_cdata``) of
            its fake state and inputs.
        context: a context manager to run it under.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_faked(v) if isinstance(v, Tensor) else v for v in example_inputs]
        with _faked_state(gm) as state:
            given = [*state, *(v for v in inputs if isinstance(v, Tensor))]
            ignored = frozenset(tensor.untyped_storage()._cdata for tensor in given)
            with context or nullcontext(), torch.enable_grad():
                make_interpreter(ignored).run(*inputs)


@contextmanager
def _faked_state(gm: fx.GraphModule) -> Iterator[list[Tensor]]:
    """Put fake tensors in the place of parameters and buffers, each once.

    Not `torch.func.functional_call`: it swaps a module that has two names twice, and puts back
    the wrong one.
    """
    kept = [
        (tensors, dict(tensors))
        for module in gm.modules()
        for tensors in (module._parameters, module._buffers)
    ]
    fakes: dict[int, Tensor] = {}
    try:
        for tensors, own in kept:
            for name, tensor in own.items():
                if tensor is not None:
                    fake = fakes.setdefault(id(tensor), _faked(tensor))
                    tensors[name] = fake  # type: ignore[assignment]  # no one asks for its class
        yield list(fakes.values())
    finally:
        for tensors, own in kept:
            tensors.update(own)  # type: ignore[arg-type]


def _faked(tensor: Tensor) -> Tensor:
    # Not FakeTensorMode.from_tensor: it leaves weak references, and no one can pickle the tensor.
    like = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return like.requires_grad_(tensor.requires_grad)
