"""Turn a model into a graph that computes, bit for bit, what the model computes in train mode.

`torch.fx.symbolic_trace` comes first: it keeps modules, so that the graph reads like the model.
Where it fails and example inputs are given, `torch.export` follows: flat ATen calls, the batch
dimension dynamic. Either way the model's own ``no_grad`` and ``autocast`` regions are kept, as a
tag on each node, and parameters and buffers are the model's own objects.
"""

import inspect
import re
from typing import Any
from warnings import warn

from torch import Tensor, _assert, fx, jit, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..ir.additions import ADDITIONS, Additions
from ..ir.network import Network
from ..ir.operators import is_inplace, overwrites
from ..ir.source import ONE_AT_A_TIME, train_mode
from .assignments import AssignedError, unchanged
from .doubts import (
    Dtypes,
    OtherOutputError,
    asks_for_autocast,
    first_line,
    may_differ,
    refuse_other_output,
)
from .examples import Examples
from .exported.capture import capture_by_export
from .guards import no_random_draws, plain_context, refuse_name, refuse_names
from .second_call import Called
from .stand_in import own_forwards
from .state import TracedState
from .symbolic import ContextTracer
from .user_code import Attributes, Line, user_line

__all__ = ["capture", "capture_again"]

_VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def capture(
    model: nn.Module,
    *example_inputs: Any,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    **example_inputs_by_name: Any,
) -> Network:
    """Capture ``model`` as a graph over its own state.

    The model is traced in train mode whatever its mode, and left in the mode that it had. Of a
    network that fxlocal made, its pristine capture is returned, whatever was rewritten since.

    Args:
        model: the model.
        example_inputs: one batch; needed where symbolic tracing fails. Arguments that have a
            default and no example are fixed at the default, and stay optional.
        leaf_modules: module classes to keep as single nodes.
        example_inputs_by_name: those inputs that are given by keyword, as in ``model(**batch)``.

    Raises:
        CaptureError: if neither way works; the message names the line that blocked each.
        TypeError: if the model's forward does not take such a batch.

    Example:
        >>> net = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [node.name for node in net.graph.nodes]
        ['input_1', '_0', '_1', '_2', 'output']
    """
    if isinstance(model, Network):
        captured: Network = model.meta.get("captured", model)
        return captured
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture what is of class {type(model).__name__}: give a torch.nn.Module"
        )
    kinds = leaf_modules if isinstance(leaf_modules, tuple) else (leaf_modules,)
    if not all(isinstance(kind, type) for kind in kinds):
        raise CaptureError(f"leaf_modules={leaf_modules!r}: give classes, as (MyBlock,)")
    _refuse_wrapper(model, leaf_modules)
    _refuse_uninitialised(model)
    with ONE_AT_A_TIME, own_forwards(model), train_mode(model):
        examples = Examples(model, example_inputs, example_inputs_by_name)
        filled: list[str] = []
        try:
            network = _by_either_way(model, examples, leaf_modules)
        except AssignedError as refused:
            if not examples:
                raise
            called = Called(model, examples, refused)
            filled = called.filled
            network = called.network(_assigning_nothing(called.model, examples, leaf_modules))
        if line := asks_for_autocast(model):
            network.meta.setdefault("dtypes", Dtypes(line))
        network.meta["attributes"] = Attributes(model, network._structure.open, filled)
        network._structure.warn_of_hooks(stacklevel=3, traced=True)
        if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
            warn(
                f"the __call__ of {type(model).__name__} will not run in training: the graph is "
                "that of its forward. Move there what it does",
                stacklevel=2,
            )
    if leaf_modules:
        network.meta["captured_with"] = "with leaf_modules"
    return network


def _by_either_way(
    model: nn.Module, examples: Examples, leaf_modules: tuple[type[nn.Module], ...]
) -> Network:
    try:
        network, text = _symbolically(model, examples, leaf_modules)
        if examples and (text or examples.hold_none or may_differ(model)):
            refuse_other_output(model, network, examples)
        elif text:
            warn(
                f"the forward makes text of a value at {text}, which is that of torch.fx's proxy "
                "while it is traced: give example inputs, so that what follows from it is checked",
                stacklevel=4,
            )
        return network
    except CaptureError:
        raise
    except Exception as error:
        return _export_after(error, model, examples)


def _symbolically(
    model: nn.Module, examples: Examples, leaf_modules: tuple[type[nn.Module], ...]
) -> tuple[Network, Line | None]:
    """Return the network, and where the forward makes text of a value, but to assert with it."""
    state = TracedState(model)
    with unchanged(model) as (switched, _), plain_context() as (autocasts, _):
        tracer = ContextTracer(leaf_modules, examples, autocasts, switched, state)
        network = _trace(model, tracer)
    state.refuse_kept()
    network.meta.update(examples=examples.without_values(), asks_for_grad=state.asks_for_grad)
    asserted = str([n.args for n in network.graph.find_nodes(op="call_function", target=_assert)])
    return network, next((at for text, at in state.texts.items() if text not in asserted), None)


def capture_again(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network:
    """Trace ``model`` as it was for a batch of which ``network.meta["examples"]`` has no values."""
    with ONE_AT_A_TIME, own_forwards(model), train_mode(model):
        return _symbolically(model, Examples(model, args, kwargs), ())[0]


def _assigning_nothing(
    model: nn.Module, examples: Examples, leaf_modules: tuple[type[nn.Module], ...]
) -> Network:
    """Capture a model whose caches are filled, so that what it assigns is what is there.

    The sizes that it assigns are known only to `torch.export`.
    """
    try:
        return _by_either_way(model, examples, leaf_modules)
    except AssignedError as refused:
        try:
            return capture_by_export(model, examples)
        except Exception:
            raise refused from None


def _export_after(error: Exception, model: nn.Module, examples: Examples) -> Network:
    other = isinstance(error, OtherOutputError)
    blocked = first_line(error) if other else f"symbolic tracing {_stopped(error)}"
    if not examples:
        raise CaptureError(
            f"cannot capture {type(model).__name__}: {blocked}. Give example inputs, so that "
            "torch.export can be tried, or make the module that does so a leaf: leaf_modules=(...)"
            + _advice(model, examples)
        ) from error
    try:
        return capture_by_export(model, examples)
    except AssignedError:
        raise
    except Exception as second:
        _refuse_names_of(model)  # over which torch.export may have stumbled
        ours = isinstance(second, CaptureError)  # which names the line, if there is one
        found = f"found: {first_line(second)}" if ours else _stopped(second)
        named = re.search(r"\S:\d+: `", found)
        what = "Rewrite that line, or make its module" if named else "Make the module that does so"
        raise CaptureError(
            f"cannot capture {type(model).__name__}: {blocked}; torch.export {found}. {what} a "
            "leaf: leaf_modules=(...)" + _advice(model, examples, found)
        ) from second


def _stopped(error: Exception) -> str:
    line = user_line(error)
    return f"stopped at {line}: {first_line(error)}" if line else f"stopped: {first_line(error)}"


def _refuse_names_of(model: nn.Module) -> None:
    for path, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers()):
        refuse_name(path)
    Network(model, fx.Graph())  # refuses those that it has itself


def _advice(model: nn.Module, examples: Examples, stopped: str = "") -> str:
    """Say what else to do: with a batch of one, for the values of labels, with a model inside."""
    leaves = pytree.tree_leaves(examples.by_argument)
    if any(isinstance(leaf, Tensor) and leaf.shape[:1] == (1,) for leaf in leaves):
        return "; or give a batch of two or more, which norms and branches may want"
    asked = (name for name in examples.by_argument if "label" in name and name[:5] in stopped)
    if "data-dependent" in stopped and (name := next(asked, None)):
        return f"; or leave {name!r} out, and compute the loss from the output"
    if "Unsupported input type" in stopped:
        return "; or give it tensors, or plain containers of such, as dict(batch)"
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    around = [type(child) for child in model.children()]  # one, if it is a model inside
    if kinds & _VARIADIC and len(around) == 1 and around[0] not in (nn.ModuleList, nn.ModuleDict):
        return "; or, as this forward hands on what it is given, give the model inside"
    if "data-dependent" in stopped:
        return (
            "; or, if the boundary lies before that line, rewrite what torch.compile makes of the "
            "model: torch.compile(model, backend=fxlocal.backend(plan))"
        )
    return ""


def _trace(model: nn.Module, tracer: ContextTracer) -> Network:
    with no_random_draws(), tracer.state:
        graph = tracer.trace(model)
    refuse_names(graph)
    # Plain tensors on the root: the model's own, or constants that the tracer parked there, which
    # `unchanged` takes off again.
    constants = {name: value for name, value in vars(model).items() if isinstance(value, Tensor)}
    fetches = [n for n in graph.nodes if n.op == "get_attr" and n.target in constants]
    made = [node for node in fetches if tracer.state.is_made(constants[str(node.target)])]
    storage = {node: constants[str(node.target)].untyped_storage()._cdata for node in made}
    for node in fetches:
        node.target = f"{ADDITIONS}.{node.target}"
    network = Network(model, graph, Additions(constants))
    copies: dict[Any, fx.Node] = {}
    writing = [node for node in graph.nodes if made and is_inplace(network, node)]
    changed = {n.target for n in made if any(overwrites(network, w, n) for w in writing)}
    touched = {storage[node] for node in made if node.target in changed}
    if any(storage[n] in touched and n.target not in changed for n in made):
        raise RuntimeError("a tensor that the forward makes is changed through a view of it")
    # What is changed in place, the model makes anew each time.
    for node in (node for node in made if node.target in changed):
        if node.target not in copies:
            with graph.inserting_after(node):
                copies[node.target] = graph.call_method("clone", (node,))
        copied = copies[node.target]
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, c=copied: user is not c)
    if copies:
        network.generate_code()
    return network


def _refuse_wrapper(model: nn.Module, leaf_modules: tuple[type[nn.Module], ...]) -> None:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for path, module in model.named_modules():
        if isinstance(module, parallel) or (isinstance(module, AveragedModel) and not path):
            inside = f"the model inside: {path or 'model'}.module"
        elif isinstance(module, jit.ScriptModule):
            inside = "the model that was scripted or traced"
        elif "_orig_mod" in module._modules and not path:
            inside = "the model inside: model._orig_mod"
        else:
            continue
        kind = type(module).__name__
        if not path:
            raise CaptureError(f"cannot capture the wrapper {kind}: give {inside}")
        if not isinstance(module, leaf_modules):
            raise CaptureError(
                f"cannot capture {path!r}, a {kind}, whose layers do not show: put in its place "
                f"{inside}"
            )


def _refuse_uninitialised(model: nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise CaptureError(
                f"{name!r} has no shape yet (a lazy module): run the model once before"
            )
