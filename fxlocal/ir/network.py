"""The GraphModule that users get: a rewritten graph over the source model's own state.

The source's children, parameters and buffers are shared by identity, so that ``state_dict`` has
the source's keys in the source's order, never-called parameters included. What fxlocal adds
lives in one child, ``fxlocal``: tensors (rates, constants) outside the ``state_dict``, and the
heads of local modules, the only new keys.

In evaluation mode the network *is* the source: its forward calls the source's own, and its `graph`
is one call of the source, for the tools that interpret or copy graphs. A graph of training has the
flag of functional dropout burned in, and must never move a weight while evaluating. Where gradients
are disabled nothing is trained either, as when running statistics are estimated anew: the forward
then is the source's own in train mode.

Each call looks at the source first: a parameter that was frozen or thawed since has the graph made
anew, and another module than the graph was made of is an error.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo

from ..errors import CaptureError
from ..ops.checkpoint import State, checkpointed, refuse_checkpointing
from ..ops.drop import draw_blocks
from ..ops.values import leave_no_gradient
from .additions import ADDITIONS, Additions
from .boundary import state_of_stage
from .codegen import Ungenerated, generate_body, learns
from .source import WRAPPED, Structure, call_graph, call_of_source, call_source, thawed
from .text import History

__all__ = ["Network"]


class Network(fx.GraphModule):
    """A graph over the state of ``source``.

    Args:
        source: the model whose state is shared.
        graph: its captured or rewritten graph; the network takes it over.
        added: what it fetches from ``fxlocal.<name>`` and calls there.
        structure: of the source, when its graph was captured; by default as it is now.

    Raises:
        CaptureError: if the source has a child, parameter or buffer of a name that a network has.
        RuntimeError: if the source has other modules than its graph was captured from.
    """

    fxlocal: Additions
    _source: nn.Module
    _evaluation: fx.Graph | None = None
    _evaluates = True  # in evaluation mode it is the source
    place: tuple[int, int] | None = None  # epoch and step, as a Driver says; else calls count
    _num_draws = 0
    _kind: Any = None  # the class that is its own, once torch.fx has made it

    def __init__(
        self,
        source: nn.Module,
        graph: fx.Graph,
        added: Additions | None = None,
        structure: Structure | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(source).__name__)
        # object.__setattr__: the source is no child, else its state would be listed twice.
        object.__setattr__(self, "_source", source)
        for name in (*source._modules, *source._parameters, *source._buffers):
            if name == ADDITIONS or hasattr(Network, name) or name in vars(self):
                raise CaptureError(
                    f"the model has {name!r}, which in a GraphModule of fxlocal's is something "
                    "else: rename that child, parameter or buffer"
                )
        self._parameters = source._parameters
        self._buffers = source._buffers
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self._modules = {**source._modules, ADDITIONS: added or Additions()}
        self._joined = dict(source._modules)
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        self._structure = structure or Structure(source, called)
        self._seen, self._ids = self._structure.read(), self._structure.ids()
        self._kind = type(self)
        self._graph, graph.owning_module = graph, self
        self.generate_later()

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

    @property
    def graph(self) -> fx.Graph:
        """The graph of training; in evaluation mode, one call of the source."""
        if self.training or not self._evaluates:
            return self._graph
        self._join_children()
        if self._evaluation is None:  # tools keep its nodes between two looks
            self._evaluation = call_graph(self._graph, self._source)
        return self._evaluation

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph, graph.owning_module = graph, self
        self.recompile()

    def clone(self) -> "Network":
        """Return a network with a copied graph over the same state."""
        graph, added = copy.deepcopy(self._graph), self.fxlocal.copy()
        new = Network(self._source, graph, added, self._structure)
        new.meta = dict(self.meta)
        return new

    def generate_later(self) -> None:
        """Let the code be generated from the graph when it is run or read: many never are."""
        self._learns = any(map(learns, self._graph.nodes))
        self._kind.forward = Ungenerated(self.recompile)

    def recompile(self) -> fx.graph.PythonCode:
        """Generate the forward's code from the graph; see `generate_body`."""
        graph = self._graph
        evaluates = self._evaluates and self._kind is not None
        call = call_of_source(graph, self._source) if evaluates else ""
        graph.on_generate_code(lambda _: lambda body: generate_body(graph, call, body))
        self._learns = any(map(learns, graph.nodes))
        self._evaluation = None
        kind = type(self)
        self.__class__ = self._kind or kind  # fully_shard puts another before it
        code = super().recompile()
        self.__class__ = kind
        return code

    @property
    def code(self) -> str:
        """The Python that runs."""
        _ = self.forward  # asked for, it is generated
        return super().code

    def __str__(self) -> str:
        _ = self.forward
        return super().__str__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the source, which may have changed, and run the forward."""
        network = self
        if not torch.compiler.is_compiling():
            self.prepare_call(*args, **kwargs)
            network = self.meta["choose"](self) if "choose" in self.meta else self
        call = super(Network, network).__call__
        if "shard" in self.meta and network.trains:
            call = partial(self.meta["shard"].run, network, call)
        output = call(*args, **kwargs)
        return output if torch.compiler.is_compiling() else self.finish_call(output)

    @_disable_dynamo
    def prepare_call(self, *args: Any, **kwargs: Any) -> None:
        """Do what each call does before the forward, for what runs the graph in another way.

        Of the arguments, how many samples they are counts in a data parallel run.

        Raises:
            RuntimeError: in train mode, if a module of the source is another one than the graph was
                made of, or under activation checkpointing around local updates, where a second
                forward would apply each of them twice.
        """
        self._join_children()
        if not self.training:
            return
        if self._learns:
            refuse_checkpointing()
        seen, ids = self._structure.read(), self._structure.ids()
        if (seen, ids) != (self._seen, self._ids) and not self._structure.is_stood_in_for:
            self._structure.refuse_other_ties()
            frozen = seen[0] != self._seen[0]
            if frozen and (line := self.meta.get("captured", self).meta.get("asks_for_grad")):
                raise RuntimeError(thawed(line))
            self._rewrite_again(frozen)
            self._seen, self._ids = seen, ids
        for noted in self.meta.keys() & {"attributes", "dtypes"} if torch.is_grad_enabled() else ():
            self.meta[noted].warn(self.meta.get("captured", self), args, kwargs)
        if "ranks" in self.meta and torch.is_grad_enabled():
            self.meta["ranks"].meet(self)
            if "reducer" in self.meta:
                self.meta["reducer"].begin(self, (args, kwargs))

    @_disable_dynamo
    def finish_call(self, output: Any) -> Any:
        """Return ``output``, whose backward leaves no gradient in the prefix.

        A penalty over all weights in the user's loss would else have the optimizer move it.
        """
        if self.training:
            leave_no_gradient(output, self.meta.get("prefix", ()))
        return output

    def _rewrite_again(self, frozen: bool) -> None:
        """Take over what the same Plan makes now; the graph, which may be edited, if ``frozen``."""
        if "rewrite" not in self.meta:  # a capture: its graph asks for no gradient
            return
        new = self.meta["rewrite"](self.meta["captured"])
        own = self.fxlocal._buffers
        for name, tensor in new.fxlocal._buffers.items():
            if tensor is None or own.get(name) is None:
                own[name] = tensor
        self.meta.update(new.meta)
        self.meta.pop("variants", None)
        if frozen and new.code != self.code:
            if "forward" in vars(self):  # as accelerate and profilers put there
                raise RuntimeError(WRAPPED)
            self.graph = new._graph

    def _join_children(self) -> None:
        """Bring a child that was put into the source here, and one that was put here there."""
        source = self._source._modules
        own = {name: module for name, module in self._modules.items() if name != ADDITIONS}
        if own == source:
            return
        source.update({n: m for n, m in own.items() if self._joined.get(n) is not m})
        self._joined = dict(source)
        added = self._modules[ADDITIONS]
        self._modules.clear()
        self._modules.update({**source, ADDITIONS: added})

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules by name, as the source has them now."""
        self._join_children()
        found: Iterator[tuple[str, nn.Module]] = super().named_modules(*args, **kwargs)
        return found

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module at a path, as the source has it now."""
        self._join_children()
        return super().get_submodule(target)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's state, and that of the heads."""
        self._join_children()
        return super().state_dict(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the source computes."""
        return call_source(self._source, *args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> set[str]:
        """Names of what never has a gradient: `DistributedDataParallel` asks, compiled or not."""
        silent = {id(parameter) for parameter in self.meta.get("silent", ())}
        named = self.named_parameters(remove_duplicate=False)
        found = {name for name, parameter in named if id(parameter) in silent}
        return found | {f"_orig_mod.{name}" for name in found}

    def draw_blocks(self, survivals: tuple[float, ...]) -> list[bool]:
        """Draw which residual branches this call computes: for one epoch and step, the same."""
        drop = self.history.plan.drop if self.history else None
        assert drop is not None
        self._num_draws += 1
        return draw_blocks(survivals, drop.seed, self.place or self._num_draws)

    def run_checkpointed(self, stage: int, function: Callable[..., Any], *values: Any) -> Any:
        """Return ``function(*values)``, a stage that the backward computes again."""
        return checkpointed(function, values, partial(self._state_of, stage))

    def _state_of(self, stage: int) -> State:
        return state_of_stage(self, self._graph, stage)

    # The source is shared, so whatever changes its state in place is done there, once.

    @property
    def training(self) -> bool:
        """The source's training mode, so that ``model.eval()`` holds for its networks too."""
        source = self.__dict__.get("_source")  # torch.fx asks before there is one
        return source is None or source.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_source" in self.__dict__:  # torch.nn.Module.__init__ sets it before there is one
            self._source.training = mode

    @property
    def trains(self) -> bool:
        """Whether a call trains: in train mode, where gradients are enabled."""
        return self.training and torch.is_grad_enabled()

    def train(self, mode: bool = True) -> "Network":
        """Set the training mode of the source, and so of all its networks."""
        self._source.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Network":
        self._source._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in list(self.additions.values())[:1]:
            self.follow(fn(tensor).device)
        for module in self.fxlocal.children():
            module._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def follow(self, device: torch.device) -> None:
        """Move the tensors that fxlocal added; they are never cast, as a rate is float32."""
        self.meta.pop("variants", None)
        for name, tensor in self.additions.items():
            moved = tensor.to(device)
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved  # in all networks that share it
            else:
                setattr(self.fxlocal, name, moved)

    def __copy__(self) -> "Network":
        new = self.clone()
        new._seen, new._ids = self._seen, self._ids  # of which the graph was made
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        state = self._source, self.fxlocal, self._structure
        source, added, structure = copy.deepcopy(state, memo)
        new = Network(source, copy.deepcopy(self._graph), added, structure=structure)
        new._seen = self._seen
        new._ids = new._ids if self._ids == self._structure.ids() else []
        new.meta = {n: v for n, v in self.meta.items() if n not in ("reducer", "variants")}
        for record in self.history.records if self.history else ():
            _ = record.diff  # the copy shares it, and what has not been printed holds this graph
        for name in {"attributes", "captured", "prefix", "silent"} & new.meta.keys():
            new.meta[name] = copy.deepcopy(self.meta[name], memo)
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
