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
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo

from ..errors import CaptureError, NoEffectWarning
from ..ops.checkpoint import State, checkpointed, refuse_checkpointing, refuse_reentrant
from ..ops.drop import draw_blocks
from ..ops.values import leave_no_gradient
from .additions import ADDITIONS, CHANGING, Additions, SharedState, finish_load
from .boundary import state_of_stage
from .codegen import Generator, Ungenerated, learns
from .nodes import BLOCK
from .source import EDITED, WRAPPED, Structure, call_graph, call_of_source, call_source, thawed
from .text import History

__all__ = ["Network"]


class Network(SharedState):
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

    _evaluation: fx.Graph | None = None
    _evaluates = True  # in evaluation mode it is the source
    place: tuple[int, int] | None = None  # epoch and step, as a Driver says; else calls count
    _num_draws = 0
    _is_edited = False  # since it was made
    _kind: Any = None  # the class that is its own, once torch.fx has made it
    _is_told = False  # that inputs get no gradient

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
        self._own(graph)
        self.generate_later()
        self.register_load_state_dict_post_hook(finish_load)  # type: ignore[no-untyped-call]

    @property
    def history(self) -> History | None:
        """The plan and what each pass did; None for a capture."""
        return self.meta.get("fxlocal")

    @property
    def _is_other(self) -> bool:
        """Whether its outputs are other numbers than its source's in train mode."""
        plan = self.history.plan if self.history else None
        fixes_norms = plan is not None and plan.local is not None and plan.local.norm == "eval"
        return fixes_norms or (plan is not None and plan.drop is not None)

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
        self._own(graph)
        self.recompile()

    def _own(self, graph: fx.Graph) -> None:
        self._graph, graph.owning_module = graph, self
        graph.set_codegen(Generator())

    def clone(self) -> "Network":
        """Return a network with a copied graph over the same state."""
        graph, added = copy.deepcopy(self._graph), self.fxlocal.copy()
        new = Network(self._source, graph, added, self._structure)
        new.meta = dict(self.meta)
        return new

    def generate_later(self) -> None:
        """Let the code be generated from the graph when it is run or read: many never are."""
        self._look_at_graph()
        self._kind.forward = Ungenerated(self.generate_code)

    def call_of_source(self) -> str:
        """Return the code by which the source is called in evaluation mode; "" for none."""
        evaluates = self._evaluates and self._kind is not None
        return call_of_source(self._graph, self._source) if evaluates else ""

    def _look_at_graph(self) -> None:
        nodes = self._graph.nodes
        self._learns = any(map(learns, nodes))
        self._draws = any(BLOCK in node.meta for node in nodes)

    def recompile(self) -> fx.graph.PythonCode:
        """Generate the forward's code from the graph, which somebody may have edited."""
        before = vars(self).get("_code")
        code = self.generate_code()
        self._is_edited |= self._kind is not None and code.src != before
        return code

    def generate_code(self) -> fx.graph.PythonCode:
        """Generate the forward's code from the graph; see `fxlocal.ir.codegen`."""
        self._graph.owning_module = self  # another GraphModule of this graph has taken it
        self._look_at_graph()
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
                made of, or under activation checkpointing where its two forwards would differ, or
                apply each local update twice.
        """
        self._join_children()
        if not self.training:
            return
        if self._learns or (self._draws and self.place is None):
            refuse_checkpointing()
        elif not torch.is_grad_enabled() and self._is_other:
            refuse_reentrant()
        seen, ids = self._structure.read(), self._structure.ids()
        if (seen, ids) != (self._seen, self._ids) and Tensor not in self._structure.kinds:
            self._structure.refuse_other_ties()
            frozen = seen[0] != self._seen[0]
            if frozen and (line := self.meta.get("captured", self).meta.get("asks_for_grad")):
                raise RuntimeError(thawed(line))
            self._rewrite_again(frozen)
            self._seen, self._ids = seen, ids
        if self.meta.get("prefix") and not self._is_told and torch.is_grad_enabled():
            self._warn_of_inputs((*args, *kwargs.values()))
        for noted in self.meta.keys() & {"attributes", "dtypes"} if torch.is_grad_enabled() else ():
            self.meta[noted].warn(self.meta.get("captured", self), args, kwargs)
        if "ranks" in self.meta and torch.is_grad_enabled():
            self.meta["ranks"].meet(self)
            if "reducer" in self.meta:
                self.meta["reducer"].begin(self, (args, kwargs))

    def _warn_of_inputs(self, given: tuple[Any, ...]) -> None:
        if any(isinstance(value, Tensor) and value.requires_grad for value in given):
            self._is_told = True
            warnings.warn(
                "an input requires a gradient and gets none, as the prefix back-propagates "
                "nothing: what learns before this network stays as it is. Take it into the "
                "network, or detach the input",
                NoEffectWarning,
                stacklevel=6,
            )

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
        if frozen and (self._is_edited or new.code != self.code):
            if "forward" in vars(self) or self._is_edited:  # as accelerate and profilers put there
                raise RuntimeError(EDITED if self._is_edited else WRAPPED)
            self._own(new._graph)
            self.generate_code()

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

    @property
    def trains(self) -> bool:
        """Whether a call trains: in train mode, where gradients are enabled."""
        return self.training and torch.is_grad_enabled()

    def __copy__(self) -> "Network":
        new = self.clone()
        new._seen, new._ids = self._seen, self._ids  # of which the graph was made
        new._is_edited = self._is_edited
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        state = self._source, self.fxlocal, self._structure
        source, added, structure = copy.deepcopy(state, memo)
        new = Network(source, copy.deepcopy(self._graph), added, structure=structure)
        new._seen, new._is_edited = self._seen, self._is_edited
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
        if self._is_edited or self.meta["captured"]._is_edited:
            raise TypeError(EDITED)
        plan, modules = self.meta["fxlocal"].plan, dict(self.fxlocal.named_children())
        rates = {name: t for name, t in self.additions.items() if name in CHANGING}
        return self.meta["rebuild"], (self._source, plan, self.training, modules, rates)
