"""The GraphModule that users get: a rewritten graph over the source model's own state.

The source's children, parameters and buffers are shared by identity, so that ``state_dict`` has
the source's keys in the source's order, never-called parameters included. What fxlocal adds
lives in one child, ``fxlocal``: tensors (rates, constants) outside the ``state_dict``, and the
heads of local modules, the only new keys.

In evaluation mode the network runs the source's own forward: a graph has the training flag of
functional dropout burned in, and must never move a weight while evaluating.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..ops.checkpoint import State, checkpointed
from .additions import ADDITIONS, Additions
from .codegen import generate_body
from .nodes import CHECKPOINT, module_of
from .text import History

__all__ = ["Network"]


class Network(fx.GraphModule):
    """A graph over the state of ``source``.

    Args:
        source: the model whose state is shared.
        graph: its captured or rewritten graph; the network takes it over.
        added: what it fetches from ``fxlocal.<name>`` and calls there.
        generate: make its code now; else `recompile` is called once the graph is done.

    Raises:
        CaptureError: if the source has a child called ``fxlocal``.
    """

    fxlocal: Additions
    _source: nn.Module

    def __init__(
        self,
        source: nn.Module,
        graph: fx.Graph,
        added: Additions | None = None,
        generate: bool = True,
    ) -> None:
        if ADDITIONS in source._modules:
            raise CaptureError(
                f"the model has a child called {ADDITIONS!r}, the name under which fxlocal keeps "
                "what it adds: rename the child"
            )
        super().__init__(nn.Module(), fx.Graph(), class_name=type(source).__name__)
        # object.__setattr__: the source is no child, else its state would be listed twice.
        object.__setattr__(self, "_source", source)
        for name in (*source._modules, *source._parameters, *source._buffers):
            if hasattr(Network, name) or name in vars(self):
                raise CaptureError(
                    f"the model has {name!r}, which in a GraphModule of fxlocal's is something "
                    "else: rename that child, parameter or buffer"
                )
        self._parameters = source._parameters
        self._buffers = source._buffers
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self._modules = {**source._modules, ADDITIONS: added or Additions()}
        if generate:
            self.graph = graph
        else:
            self._graph, graph.owning_module = graph, self

    @property
    def additions(self) -> dict[str, Tensor]:
        """The tensors that fxlocal added, by name."""
        return {name: t for name, t in self.fxlocal._buffers.items() if t is not None}

    @property
    def history(self) -> History | None:
        """The plan and what each pass did; None for a capture."""
        return self.meta.get("fxlocal")

    @property
    def source_model(self) -> nn.Module:
        """The model whose state is shared."""
        return self._source

    def clone(self, *, generate: bool = True) -> "Network":
        """Return a network with a copied graph over the same state."""
        new = Network(self._source, copy.deepcopy(self.graph), self.fxlocal.copy(), generate)
        new.meta = dict(self.meta)
        return new

    def recompile(self) -> fx.graph.PythonCode:
        """Generate the forward's code from the graph; see `generate_body`."""
        graph, call = self.graph, self._call_of_source()
        graph.on_generate_code(lambda _: lambda body: generate_body(graph, call, body))
        return super().recompile()

    def _call_of_source(self) -> str:
        """Return the code that calls the source with the graph's inputs."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        names = [str(node.target) for node in inputs if "fxlocal" not in node.meta]  # no target
        source = self.__dict__.get("_source")  # not there while torch.fx sets up
        known = inspect.signature(source.forward).parameters if source else {}
        by_name = {n for n, p in known.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return f"self._source({', '.join(f'{n}={n}' if n in by_name else n for n in names)})"

    def run_checkpointed(self, stage: int, function: Callable[..., Any], *values: Any) -> Any:
        """Return ``function(*values)``, a stage that the backward computes again."""
        return checkpointed(function, values, partial(self._state_of, stage))

    def _state_of(self, stage: int) -> State:
        """Return the norms that a stage calls, and all other buffers that it may read or move."""
        nodes = [n for n in self.graph.nodes if n.meta.get(CHECKPOINT) == stage]
        called = [m for node in nodes if (m := module_of(self, node)) is not None]
        modules = dict.fromkeys(inner for module in called for inner in module.modules())
        norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        own = [b for m in modules if m not in norms for b in m.buffers(recurse=False)]
        named = dict(self.named_buffers(remove_duplicate=False))
        taken = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
        own += [named[v.target] for v in taken if v.op == "get_attr" and v.target in named]
        return norms, list({id(buffer): buffer for buffer in own}.values())

    def refuse_recomputation(self) -> None:
        """Raise if this forward runs under activation checkpointing, which would run it twice.

        Raises:
            RuntimeError: a second forward would apply every local update twice.
        """
        if torch.compiler.is_compiling():
            return
        if _is_checkpointed():
            raise RuntimeError(
                "activation checkpointing around a network that learns in its forward: it runs "
                "the forward twice, which would apply each local update, or each local module's "
                "gradient, twice. Call the network outside checkpoint(); what learns locally keeps "
                "no activations anyway"
            )

    # The source is shared, so whatever changes its state in place is done there, once.

    @property
    def training(self) -> bool:
        """The source's training mode, so that ``model.eval()`` holds for its networks too."""
        return self._source.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_source" in self.__dict__:  # torch.nn.Module.__init__ sets it before there is one
            self._source.training = mode

    def train(self, mode: bool = True) -> "Network":
        """Set the training mode of the source, and so of all its networks."""
        self._source.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Network":
        self._source._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.additions.items():  # moved, but never cast: a rate is float32
            moved = tensor.to(fn(tensor).device)
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved  # in all networks that share it
            else:
                setattr(self.fxlocal, name, moved)
        for module in self.fxlocal.children():
            module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def __copy__(self) -> "Network":
        return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        source = copy.deepcopy(self._source, memo)
        added = copy.deepcopy(self.fxlocal, memo)
        new = Network(source, copy.deepcopy(self.graph), added)
        new.meta = dict(self.meta)
        if "captured" in new.meta:
            new.meta["captured"] = copy.deepcopy(self.meta["captured"], memo)
        memo[id(self)] = new
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        # As source and Plan: torch.fx would pickle the code and trace it again, dropping contexts.
        if "rebuild" not in self.meta:
            raise TypeError("only what fxlocal.transform returned can be pickled, not a capture")
        if "captured_with" in self.meta:
            raise TypeError(
                f"a network captured {self.meta['captured_with']} cannot be pickled: save its "
                "state_dict() and the Plan's repr, and capture and transform the model again"
            )
        plan, modules = self.meta["fxlocal"].plan, dict(self.fxlocal.named_children())
        return self.meta["rebuild"], (self._source, plan, self.training, modules)


def _is_checkpointed() -> bool:
    """Tell whether this is a forward of activation checkpointing: the first or the second."""
    if torch._C._current_graph_task_id() != -1:  # inside a backward
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_grad_enabled():
        return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
    frame: FrameType | None = sys._getframe()  # the reentrant form runs its first without gradient
    while frame is not None and not frame.f_code.co_filename.endswith("utils/checkpoint.py"):
        frame = frame.f_back
    return frame is not None
