"""Turn a model into a graph that computes, bit for bit, what the model computes in train mode.

`torch.fx.symbolic_trace` comes first: it keeps modules, so that the graph reads like the model.
Where it fails and example inputs are given, `torch.export` follows: flat ATen calls, the batch
dimension dynamic. Either way the model's own ``no_grad`` and ``autocast`` regions are kept, as a
tag on each node, and parameters and buffers are the model's own objects.
"""

import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError
from .export import capture_by_export
from .network import ADDITIONS, Network

__all__ = ["capture"]


def capture(
    model: nn.Module, *example_inputs: Any, leaf_modules: tuple[type[nn.Module], ...] = ()
) -> Network:
    """Capture ``model`` as a graph over its own state.

    The model is traced in train mode whatever its mode, and left in the mode that it had. Of a
    network that fxlocal made, its pristine capture is returned, whatever was rewritten since.

    Args:
        model: the model.
        example_inputs: one batch of positional inputs; needed only where symbolic tracing fails.
        leaf_modules: module classes to keep as single nodes.

    Raises:
        CaptureError: if neither way works; the message names the line that blocked each.

    Example:
        >>> net = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [node.name for node in net.graph.nodes]
        ['input_1', '_0', '_1', '_2', 'output']
    """
    if isinstance(model, Network):
        captured: Network = model.meta.get("captured", model)
        return captured
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}: give a torch.nn.Module")
    _refuse_uninitialised(model)
    with _train_mode(model):
        try:
            network = _trace(model, leaf_modules)
        except CaptureError:
            raise
        except Exception as error:
            network = _export_after(error, model, example_inputs)
    _warn_of_hooks(network, model)
    return network


def _export_after(error: Exception, model: nn.Module, example_inputs: tuple[Any, ...]) -> Network:
    blocked = f"symbolic tracing stopped at {_user_line(error)}: {_first_line(error)}"
    if not example_inputs:
        raise CaptureError(
            f"cannot capture {type(model).__name__}: {blocked}. Give example inputs, so that "
            "torch.export can be tried, or make the module at that line a leaf: leaf_modules=(...)"
        ) from error
    try:
        return capture_by_export(model, example_inputs)
    except Exception as second:
        raise CaptureError(
            f"cannot capture {type(model).__name__}: {blocked}; torch.export stopped at "
            f"{_user_line(second)}: {_first_line(second)}. Rewrite that line, or make its module a "
            "leaf: leaf_modules=(...)"
        ) from second


def _trace(model: nn.Module, leaf_modules: tuple[type[nn.Module], ...]) -> Network:
    before = set(vars(model))
    try:
        graph = _Tracer(leaf_modules).trace(model)
    finally:
        # The tracer parks constant tensors on the model; the model is not ours to edit.
        parked = [name for name in vars(model) if name not in before]
        constants = {name: vars(model).pop(name) for name in parked}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            node.target = f"{ADDITIONS}.{node.target}"
    tensors = {name: value for name, value in constants.items() if isinstance(value, Tensor)}
    return Network(model, graph, tensors)


class _Tracer(fx.Tracer):
    """A tracer that tags each node with the context managers that it was traced under."""

    # Else arithmetic on buffers alone would run while tracing and be kept as a constant.
    proxy_buffer_attributes = True

    def __init__(self, leaf_modules: tuple[type[nn.Module], ...]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.leaf_modules = leaf_modules
        self.outside = _ambient()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if (inside := _ambient()) != self.outside:
            _refuse_untraceable_contexts(self.outside, inside)
            node.meta["fxlocal_contexts"] = _contexts_between(self.outside, inside)
        return node


_AUTOCAST_DEVICES = ("cpu", "cuda")


def _ambient() -> tuple[Any, ...]:
    """Return the state that context managers change: gradients, hooks, autocast by device."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    autocast = (
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES
    )
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), hooks, *autocast


def _contexts_between(outside: tuple[Any, ...], inside: tuple[Any, ...]) -> tuple[str, ...]:
    found = []
    if outside[0] != inside[0]:
        found.append("torch.enable_grad()" if inside[0] else "torch.no_grad()")
    for device, old, new in zip(_AUTOCAST_DEVICES, outside[3:], inside[3:], strict=True):
        if old != new:
            enabled, dtype = new
            found.append(f"torch.autocast({device!r}, dtype={dtype}, enabled={enabled})")
    return tuple(found)


def _refuse_untraceable_contexts(outside: tuple[Any, ...], inside: tuple[Any, ...]) -> None:
    stack = traceback.extract_stack()
    in_checkpoint = any(f.filename.endswith("torch/utils/checkpoint.py") for f in stack)
    if in_checkpoint or inside[2] is not outside[2]:
        kind = "activation checkpointing" if in_checkpoint else "saved_tensors_hooks"
        raise CaptureError(
            f"the model uses {kind} at {_line_of(_user_frames(stack)[-1])}: capture would drop it, "
            "and a layer in it could not learn locally (its forward runs twice). Remove it (a "
            "local prefix keeps no activations anyway), or keep its module whole: "
            "leaf_modules=(...)"
        )
    if inside[1]:
        raise CaptureError(
            f"the model enters torch.inference_mode at {_line_of(_user_frames(stack)[-1])}: use "
            "torch.no_grad, whose results can be used in training"
        )


def _user_frames(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Return the frames that are neither torch's nor ours; all of them if none is left."""
    ours = __file__.rpartition("/")[0]
    inside = [
        f
        for f in stack
        if "/torch/" not in f.filename
        and not f.filename.startswith((ours, "<"))
        and "importlib" not in f.filename
    ]
    return inside or list(stack)


def _line_of(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}: `{frame.line}`"


def _user_line(error: BaseException) -> str:
    return _line_of(_user_frames(traceback.extract_tb(error.__traceback__))[-1])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in train mode, unless its root already is; restore each module's flag."""
    if model.training:
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _refuse_uninitialised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CaptureError(
                f"parameter {name!r} has no shape yet (a lazy module): run the model once before"
            )


def _warn_of_hooks(network: Network, model: nn.Module) -> None:
    """Warn of forward hooks that the graph, which calls only leaf modules, will not run."""
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    inside = tuple(f"{path}." for path in called)
    for path, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked and path and path not in called and not path.startswith(inside):
            warnings.warn(
                f"forward hooks of {path!r} will not run in training: the graph calls the modules "
                "inside it. Keep it whole with leaf_modules=(...) if they matter",
                stacklevel=3,
            )
