"""Capture by `torch.export`: flat ATen calls, for models that symbolic tracing cannot follow."""

import re
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch
from warnings import WarningMessage, warn

from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_buffer_registration_hooks

from ...errors import CaptureError
from ...ir.additions import Additions
from ...ir.network import Network
from ...ir.nodes import positions
from ...ir.operators import is_inplace, operator_name, origins
from ..assignments import AssignedError, assigns, unchanged
from ..doubts import Dtypes, dtype_of
from ..examples import Examples
from ..guards import as_in_training, no_random_draws, plain_context, quiet, refuse_names
from ..outputs import Output
from ..state import TracedState
from .asked import Asked, holds_for
from .compare import warn_if_other
from .copy_graph import copy_graph
from .sizes import export_with_any_sizes, fixes_batch
from .vmaps import no_derivatives, write_out_vmaps

__all__ = ["capture_by_export"]


def capture_by_export(model: nn.Module, examples: Examples) -> Network:
    """Capture ``model`` as ATen calls over its own parameters, for `sizes` that may be any.

    It is in train mode.

    Raises:
        CaptureError: for outputs that a graph cannot make; for changes through ``.data`` of what
            was used before.
        Exception: whatever `torch.export` raises.
    """
    asked: list[str] = []
    try:
        with as_in_training(model, asked):
            network = _capture(model, examples)
    except CaptureError:
        raise
    except Exception:
        if not asked:
            raise
        network = _capture(model, examples)  # what it does for those that compile it, then
    warn_if_other(model, network, examples, stacklevel=7)
    return network


def _capture(model: nn.Module, examples: Examples) -> Network:
    state, output = TracedState(model), Output()
    around = state.around_forward(output.take_apart)
    draws = no_random_draws(of_torch=False)
    with ExitStack() as stack:
        _, by_torch = stack.enter_context(unchanged(model))
        lost = stack.enter_context(quiet())
        _, state.with_grad = stack.enter_context(plain_context())
        for context in (around, draws):
            stack.enter_context(context)
        stack.enter_context(no_derivatives())
        for own in (model._forward_pre_hooks, model._forward_hooks):  # the graph is of its forward
            stack.enter_context(patch.dict(own, clear=True))
        # Torch leaves one where it fails.
        stack.enter_context(patch.dict(_global_buffer_registration_hooks))
        try:
            program = export_with_any_sizes(model, examples)
        finally:
            _refuse_lost(lost, by_torch)
    if fixes_batch(program, examples):
        warn(
            f"the forward of {type(model).__name__} makes a number of the batch's size, by "
            "len(...) or int(...) of it, so its graph is for batches of that size only: leave "
            "out a last batch that is smaller, or take .shape[0]",
            stacklevel=8,
        )
    state.refuse_kept()
    exported = program.module(check_guards=False)  # inputs are checked below
    assert isinstance(exported, fx.GraphModule)
    if assigned := list(program.graph_signature.buffers_to_mutate.values()):
        raise AssignedError(assigns(", ".join(map(repr, assigned))))
    write_out_vmaps(exported)
    asked = Asked(program)
    make = partial(copy_graph, state, program, exported, examples, output, asked)
    surely, *fewer = asked.bounds()
    network = _network(model, *make(surely))
    for least in fewer:
        smaller = _network(model, *make(least))
        if not holds_for(smaller, program, examples, least):
            break
        network = smaller
    _refuse_detached_changes(network)
    network.meta.update(captured_with="by torch.export", asks_for_grad=state.asks_for_grad)
    if state.asks_for_dtype:
        network.meta["dtypes"] = Dtypes(state.asks_for_dtype, dtype_of(model))
    return network


def _refuse_lost(warned: list[WarningMessage], by_torch: set[str]) -> None:
    """Refuse what the user's code assigns, of which `torch.export` warns."""
    told = (str(warning.message).partition(" assigned ")[0] for warning in warned)
    paths = [path for text in told for path in re.findall(r"self\.([^\s,]+)", text)]
    others = (path for path in dict.fromkeys(paths) if path not in by_torch)
    if own := [path for path in others if "_flat_weights[" not in path]:  # a list, put back
        raise AssignedError(assigns(", ".join(map(repr, own))))


def _network(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> Network:
    refuse_names(graph)
    return Network(model, graph, Additions(constants))


def _refuse_detached_changes(network: Network) -> None:
    """Refuse changes through ``.data`` of what was used before: export takes it for ``detach()``.

    Autograd knows of changes through the one, and not of those through the other.
    """
    place = positions(network.graph)
    for node in (node for node in place if is_inplace(network, node)):
        for through in origins(network, node.all_input_nodes[0]):
            if operator_name(through) != "detach":
                continue
            value = through.all_input_nodes[0]
            if any(place[u] < place[node] for u in value.users if operator_name(u) != "detach"):
                raise CaptureError(
                    f"the forward changes {str(value.target)!r} through .data or detach() after it "
                    "was used, which torch.export does not tell from each other: change it before"
                )
