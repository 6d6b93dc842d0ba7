"""What a network is to its source: called alike, the same in evaluation, made of its modules."""

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from itertools import chain, zip_longest
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as of_modules

from ..ops.values import NOT_GIVEN, require_given, require_value
from .additions import UnsavedHeads
from .nodes import BY_NAME, EXTRA, FIXED, hooks_of

__all__ = [
    "EDITED",
    "OF_ALL_MODULES",
    "ONE_AT_A_TIME",
    "WRAPPED",
    "Structure",
    "arguments",
    "call_graph",
    "call_of_source",
    "call_source",
    "device_of",
    "device_with_data",
    "source_arguments",
    "thawed",
    "train_mode",
]

# Captures put other functions in the place of torch's own, and what runs modules would meet them.
ONE_AT_A_TIME = RLock()
OF_ALL_MODULES: list[Mapping[int, Any]] = [
    *(of_modules._global_forward_hooks, of_modules._global_forward_pre_hooks),
    *(of_modules._global_backward_hooks, of_modules._global_backward_pre_hooks),
]
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

for _function in (require_given, require_value):  # nothing uses what they return
    fx.node.has_side_effect(_function)


def arguments(
    graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the value of each input of ``graph`` in a call with these arguments.

    Raises:
        TypeError: if the graph does not take them.
        RuntimeError: if one is fixed at another value.
    """
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    bound = _signature(inputs).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if name in inputs and FIXED in inputs[name].meta:
            require_value(value, inputs[name].args[0], name)
    return bound.arguments


def _signature(inputs: Mapping[str, fx.Node]) -> inspect.Signature:
    kinds = {1: Parameter.VAR_POSITIONAL, 2: Parameter.VAR_KEYWORD}
    return inspect.Signature(
        [
            Parameter(
                target.lstrip("*"),
                kinds.get(target.count("*"), Parameter.POSITIONAL_OR_KEYWORD),
                default=node.args[0] if node.args else Parameter.empty,
            )
            for target, node in inputs.items()
        ]
    )


def source_arguments(
    source: nn.Module, inputs: Sequence[fx.Node]
) -> tuple[list[fx.Node], dict[str, fx.Node]]:
    """Return which inputs of its network's graph ``source`` takes by position, and which by name.

    By name what comes behind an argument that is no input. Where the forward is decorated, by which
    decorators may look for it: as in the example or, without one, by name what has a default; by
    position if more positions follow.
    """
    others = [n for n in inputs if EXTRA in n.meta or str(n.target).startswith("*")]
    by_name = {str(node.target): node for node in inputs if node not in others}
    args = list[fx.Node]()
    more = any(not str(node.target).startswith("**") for node in others)
    decorated = _is_decorated(source) and not more
    for name, parameter in inspect.signature(source.forward).parameters.items():
        if parameter.kind not in _BY_POSITION or name not in by_name:
            break
        optional = parameter.default is not Parameter.empty
        by_either = parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        named = by_name[name].meta.get(BY_NAME, optional)
        if NOT_GIVEN in by_name[name].args or (decorated and named and by_either):
            break
        args.append(by_name.pop(name))
    return args + others, by_name


def device_of(source: nn.Module) -> torch.device:
    """Return the device of the first parameter; the usual one where there is none, or no data."""
    return device_with_data(next(source.parameters(), None))


def device_with_data(first: Tensor | None) -> torch.device:
    """Return the device of a tensor; where there is none, or no data, the usual one that has."""
    found = torch.get_default_device() if first is None or first.is_meta else first.device
    return torch.device("cpu") if found.type == "meta" else found


def call_source(source: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what ``source`` computes; decorators of it see no argument that is at its default."""
    decorated = not torch.compiler.is_compiling() and _is_decorated(source)
    told = inspect.signature(source.forward).parameters if decorated else {}
    defaults = {name: parameter.default for name, parameter in told.items()}
    for name, value in [*kwargs.items()]:
        if value is NOT_GIVEN or (name in defaults and value is defaults[name]):
            del kwargs[name]
    if not torch.compiler.is_compiling() and is_fx_symbolic_tracing():
        return source.forward(*args, **kwargs)  # a tracer knows no path of it, which is no child
    return source(*args, **kwargs)


def call_graph(graph: fx.Graph, source: nn.Module) -> fx.Graph:
    """Return a graph with the inputs of ``graph``, one of training, that calls ``_source``."""
    called = fx.Graph()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    copies = [called.node_copy(node) for node in inputs if "fxlocal" not in node.meta]  # no target
    args, kwargs = source_arguments(source, copies)
    fetched = called.create_node("get_attr", "_source")
    called.output(called.call_function(call_source, (fetched, *args), {**kwargs}))
    called.owning_module = graph.owning_module
    return called


def call_of_source(graph: fx.Graph, source: nn.Module) -> str:
    """Return the code by which a network of ``graph`` calls ``source`` with its own inputs."""
    taken = [n for n in graph.find_nodes(op="placeholder") if "fxlocal" not in n.meta]  # no target
    args, kwargs = source_arguments(source, taken)
    told = [str(node.target) for node in args] + [f"{name}={name}" for name in kwargs]
    return f"self.evaluate({', '.join(told)})"


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
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


class Structure:
    """The modules of ``source`` as its graph was made, but for what lies inside its leaves.

    Those that the graph calls not whole are ``open``, by path. Each call of a network reads it:
    0.2 microseconds a module, flat lists and no walk.

    Args:
        source: the model.
        leaves: paths of the modules that the graph calls whole.
    """

    def __init__(self, source: nn.Module, leaves: Collection[str]) -> None:
        inside = tuple(f"{leaf}." for leaf in leaves)
        named = [(p, m) for p, m in source.named_modules() if not p.startswith(inside)]
        open_ = {path: module._modules for path, module in named if path not in leaves}
        self._paths, self._children = list(open_), list(open_.values())
        self._then = [dict(children) for children in self._children]
        owners = [(path, module._parameters) for path, module in named if module._parameters]
        self._owners = [own for _, own in owners]
        self._named = [(path, name) for path, own in owners for name in own]
        self._names = [name for _, name in self._named]
        self.open = {path: module for path, module in named if path not in leaves}
        self._hooks = [hooks for _, module in named for hooks in hooks_of(module).values()]
        self._hooked = self._find_hooks()
        self._modules = list(self.open.values())
        self._raw, self._forwards = self._find_forwards(), [*map(_forward_of, self._modules)]
        self._told = set[tuple[str, str]]()
        self._ties = [*self._find_ties()]

    def ids(self) -> list[int]:
        """Return which parameters there are, by their ids."""
        return [*map(id, chain.from_iterable([own.values() for own in self._owners]))]

    def refuse_other_ties(self) -> None:
        """Refuse parameters that are tied otherwise than they were, or given where was none."""
        for (path, name), then, now in zip(self._named, self._ties, self._find_ties(), strict=True):
            if now != then:
                raise RuntimeError(_changed(f"{path}.{name}".lstrip(".")))

    def _find_ties(self) -> Iterator[int]:
        """Yield the place of the first parameter that each is; what a leaf lacks is its own."""
        first: dict[int, int] = {}
        parameters = chain.from_iterable([own.values() for own in self._owners])
        for i, ((path, _), parameter) in enumerate(zip(self._named, parameters, strict=True)):
            if parameter is None:
                yield -1 if path in self.open else i
            else:
                yield first.setdefault(id(parameter), i)

    def read(self) -> tuple[list[bool], list[bool]]:
        """Return which parameters require a gradient, and where hooks are, if anywhere.

        It warns of new ones, as `warn_of_hooks` does.

        Raises:
            RuntimeError: if a module is another one, or has other parameters.
        """
        if self._children != self._then:
            self._refuse_changed()
        if (raw := self._find_forwards()) != self._raw:
            self._raw = raw
            self._refuse_other_forwards()
        if (names := [*chain.from_iterable(self._owners)]) != self._names:
            pairs = zip_longest(self._named, names, fillvalue=("", ""))
            raise RuntimeError(_changed(next(path for (path, name), n in pairs if name != n)))
        parameters = chain.from_iterable([own.values() for own in self._owners])
        if (hooked := self._find_hooks()) != self._hooked:
            self._hooked = hooked
            self.warn_of_hooks(stacklevel=9)
        return [p is not None and p.requires_grad for p in parameters], hooked

    def _find_forwards(self) -> list[Any]:
        """Return what forwards are set on modules, and those of their classes, as they are."""
        kinds: dict[Any, None] = dict.fromkeys(map(type, self._modules))
        return [vars(m).get("forward") for m in self._modules] + [k.forward for k in kinds]

    def _refuse_other_forwards(self) -> None:
        found = zip(self.open.items(), self._forwards, strict=True)
        if path := next((f"{p}.forward" for (p, m), then in found if _forward_of(m) != then), None):
            raise RuntimeError(
                f"{path.lstrip('.')!r} is another function than when the graph was made (a "
                "wrapper, mixed precision, a changed class): the graph would train what was there "
                "before. Transform again, make a new Driver, or attach the part that this calls"
            )

    def _find_hooks(self) -> list[bool]:
        return [*map(bool, hooks)] if any(hooks := [*self._hooks, *OF_ALL_MODULES]) else []

    def warn_of_hooks(self, stacklevel: int, *, traced: bool = False) -> None:
        """Warn of new hooks that the graph, which calls only leaf modules, will not run.

        Those of a model with a forward of its instance's, as `fxlocal.attach` gives it one, do. If
        ``traced``, those of the modules inside it were there when it was.
        """
        for path, kind in self.new_hooks():
            if path or "forward" not in vars(self.open[path]):
                why = "the graph calls the modules inside it"
                if traced and path and kind == "forward":
                    why = "what they made of tensors is in the graph, and nothing else that they do"
                warnings.warn(
                    f"{kind} hooks of {path or 'the model'!r} will not run in training: {why}. "
                    "Keep it whole with leaf_modules=(...) if they matter",
                    stacklevel=stacklevel,
                )

    def new_hooks(self) -> list[tuple[str, str]]:
        """Return the path and kind of hooks of modules that are no leaves, each only once."""
        found = dict.fromkeys(
            (path, kind.split("_")[1])
            for path, module in self.open.items()
            for kind, hooks in hooks_of(module).items()
            if any(_is_of_user(hook) for hook in hooks.values())
        )
        of_all = (hook for hooks in OF_ALL_MODULES for hook in hooks.values())
        if any(map(_is_of_user, of_all)) and self.open:
            found["all modules", "global"] = None
        new = [hook for hook in found if hook not in self._told]
        self._told.update(new)
        return new

    def _refuse_changed(self) -> None:
        for path, now, then in zip(self._paths, self._children, self._then, strict=True):
            names = [name for name in (*then, *now) if now.get(name) != then.get(name)]
            if names and not isinstance(now.get(names[0]), UnsavedHeads):
                raise RuntimeError(_changed(".".join(filter(None, (path, *names[:1])))))

    @property
    def kinds(self) -> set[type]:
        """What its parameters are, or what stands in for them: tensors in a functional call."""
        return {type(p) for own in self._owners for p in own.values()}


def _is_decorated(module: nn.Module) -> bool:
    attached = getattr(module.forward, "fxlocal", None)  # which hides it
    own = attached and (attached.earlier or type(module).forward)
    return hasattr(own or module.forward, "__wrapped__")


def _forward_of(module: nn.Module) -> Any:
    """Return the function of its forward, behind what `fxlocal.attach` puts there."""
    if isinstance(module, fx.GraphModule):  # made anew from its graph, and not always at once
        return None
    forward = vars(module).get("forward", type(module).forward)
    function = found = getattr(forward, "__func__", forward)
    while found is not None:
        if stand_in := getattr(found, "fxlocal", None):
            earlier = stand_in.earlier or type(module).forward
            function = found = getattr(earlier, "__func__", earlier)
        else:
            found = getattr(found, "__wrapped__", None)
    return function


def _is_of_user(hook: Any) -> bool:
    """Tell whether a hook is none that counts modules, makes a weight, or collects outputs."""
    home: str = getattr(hook, "__module__", None) or type(hook).__module__
    return not home.startswith(("torch.utils.", "torch.nn.utils.", "transformers.utils."))


def thawed(line: object) -> str:
    """Return the message that refuses other weights to learn where the forward asks which do."""
    return (
        f"weights were frozen or thawed, and the forward asks which are, at {line}: the graph has "
        "the answer that it got. Transform the model again, or make a new Driver"
    )


EDITED = (
    "the network's graph was edited. Only a copy keeps that: freezing, thawing or replacing "
    "weights, and pickling, make it anew from the Plan. Transform and edit again; save state_dict()"
)

WRAPPED = (
    "the network's forward was wrapped, and holds the code from before weights were frozen, thawed "
    "or replaced: transform again, and wrap it then"
)


def _changed(path: str) -> str:
    return (
        f"{path!r} is another module, or has other parameters, than when the graph was made (a new "
        "head, converted norms, tied weights, pruning, a parametrisation): the graph would train "
        "what was there before. Transform the model again, or make a new Driver"
    )
