"""Cut channels out of a model for good: its tensors, and its optimizer's, become smaller.

Parameters stay the same objects, so that optimizers, schedulers and hooks go on with them; modules
keep their places, and their ``out_channels``, ``num_features``, ``groups`` ... follow. Everything
is computed and checked before anything is assigned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PlanError
from ..facts import Channels
from ..ir.network import Network
from ..ir.source import train_mode
from ..passes import find_channels, find_layers
from ..tracing.capture import capture
from .branches import find_shortened
from .kept import find_cut
from .optimizers import nested, refuse_other_models

__all__ = [
    "Cut",
    "kept_channels",
    "plan_cut",
    "plan_restoring",
    "restoring",
    "see_channels",
    "shrink",
]

Kept = Mapping[str, Sequence[int]]
_RECORD = "_fxlocal_kept"  # an attribute of a model that was shrunk
_MISSING = object()


def shrink(
    model: nn.Module,
    kept: Mapping[str, Iterable[int]],
    *example_inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    **example_inputs_by_name: Any,
) -> None:
    """Keep only some output channels of some layers, in place.

    What can only be cut together with them is cut too (`fxlocal.passes.find_channels`): the inputs
    of the next layers, norms, and all layers of a residual stream. The model then computes what it
    did with all that belongs to the cut channels zero: weights, biases, their norms' shifts, and
    the next layers' weights of them, as an activation may make something of zero. A residual branch
    of which a layer keeps no channel is removed with all that is behind it, biases and norms too:
    its block becomes its shortcut.

    Networks made of the model before are not to be used any more; a `Driver` makes new ones when
    its next epoch starts.

    Args:
        model: the model, or a network that fxlocal made of it, whose source is meant.
        kept: by the path of a layer, the output channels that it keeps, as they are counted now.
        example_inputs: one batch, where capturing needs it.
        optimizer: whose state of the parameters, such as momentum, is cut with them.
        leaf_modules: as in `fxlocal.transform`.
        example_inputs_by_name: those inputs that are given by keyword.

    Raises:
        CaptureError: if the model cannot be captured.
        PlanError: if there is no such layer or channel, one cannot be cut, no channel is left
            where one is needed, or the optimizer is another model's or keeps what cannot be cut;
            nothing has been changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> shrink(model, {"0": [1, 5]})
        >>> model[0].weight.shape, model[2]
        (torch.Size([2, 4]), Linear(in_features=2, out_features=2, bias=True))
    """
    args, by_name = example_inputs, example_inputs_by_name
    network = capture(model, *args, leaf_modules=leaf_modules, **by_name)
    if optimizer is not None:
        refuse_other_models(optimizer, network.parameters())
    channels = see_channels(network)
    plan_cut(network, channels, find_cut(channels, kept), optimizer).swap()


def kept_channels(model: nn.Module) -> dict[str, list[int]]:
    """Return which of the channels that its layers once had a model has kept, where any are cut.

    To be given to `shrink` with a model as it was at first, before it can load the state.
    """
    return {path: list(channels) for path, channels in getattr(model, _RECORD, {}).items()}


def see_channels(network: Network) -> Channels:
    """Return the channels of a captured model."""
    with train_mode(network):
        return find_channels(network, layers=find_layers(network))


@dataclass
class Cut:
    """A change that is ready to be made: `swap` makes it, and a second time undoes it."""

    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    items: list[tuple[MutableMapping[Any, Any], Any, Any]] = field(default_factory=list)

    def swap(self) -> None:
        """Exchange what there is for what is to be."""
        before = Cut()
        for tensor, data, grad in self.tensors:
            before.tensors.append((tensor, tensor.data, tensor.grad))
            tensor.grad = None
            # Another dtype in between has autograd forget the shape, which an earlier graph, that a
            # loss still holds, would keep.
            other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
            tensor.data = torch.empty(0, dtype=other, device=tensor.device)
            tensor.data, tensor.grad = data, grad
        for mapping, key, value in self.items:
            before.items.append((mapping, key, mapping.get(key, _MISSING)))
            if value is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = value
        self.tensors, self.items = before.tensors, before.items[::-1]


def plan_cut(
    network: Network,
    channels: Channels,
    cut: set[int],
    optimizer: torch.optim.Optimizer | None = None,
) -> Cut:
    """Return the change that cuts the channels of these numbers, ready to be made.

    Raises:
        PlanError: if it cannot be made; an `EmptyError` if a layer would have no channels.
    """
    model = network.source_model
    empty = {path for path, own in channels.outputs.items() if cut.issuperset(own)}
    empty |= {
        use.tensor.removesuffix(".weight")
        for use in channels.uses
        if use.role == "in" and cut.issuperset(use.channels)
    }
    shorter = find_shortened(network, model, empty) if empty else {}
    replaced = tuple(f"{path}." for path in shorter)
    named = dict(_named_state(model))
    stays = {id(t) for short in shorter.values() for _, t in _named_state(short)}
    stays |= {id(t) for name, t in named.items() if not name.startswith(replaced)}
    whole: dict[str, dict[int, Tensor]] = {}
    for use in channels.uses:
        left = [i for i, channel in enumerate(use.channels) if channel not in cut]
        if len(left) < len(use.channels) and id(named[use.tensor]) in stays:
            whole.setdefault(use.tensor, {})[use.axis] = torch.tensor(left)
    change = Cut()
    for name, axes in whole.items():
        _slice(change, named[name], axes, optimizer, name)
        _adapt(change, model, name, {axis: len(index) for axis, index in axes.items()})
    for path, short in shorter.items():
        parent, _, child = path.rpartition(".")
        change.items.append((model.get_submodule(parent)._modules, child, short))
    gone = [p for p in model.parameters() if id(p) not in stays]
    _forget(change, gone, optimizer)
    weights = {path: named.get(f"{path}.weight", named.get(path)) for path in channels.outputs}
    record = _record(model, channels, cut, {p for p, w in weights.items() if id(w) not in stays})
    change.items.append((vars(model), _RECORD, record))
    return change


def plan_restoring(
    network: Network, kept: Kept, optimizer: torch.optim.Optimizer | None
) -> Cut | None:
    """Return the change to a model that has kept ``kept``, of what it once had; None for none.

    Raises:
        CheckpointError: if the model has not these layers and channels (any more).
    """
    if (mine := kept_channels(network.source_model)) == (theirs := dict(kept)):
        return None
    try:
        if further := [path for path in mine if path not in theirs]:
            raise PlanError(f"of {further[0]!r} channels are cut here that are not there")
        now = {
            path: [mine[path].index(c) for c in left] if path in mine else left
            for path, left in theirs.items()
            if mine.get(path) != []
        }
        channels = see_channels(network)
        return plan_cut(network, channels, find_cut(channels, now), optimizer)
    except ValueError as error:  # a PlanError is one
        raise CheckpointError(
            f"the checkpoint is of a model whose channels were cut, and this one cannot be cut so: "
            f"{error}. Nothing was loaded; resume with the model as it was built at first"
        ) from error


@contextmanager
def restoring(
    network: Network,
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    follow: Callable[[], None],
) -> Iterator[None]:
    """Make the change of `plan_restoring` for the ``with`` block; undo it if that raises.

    Args:
        network: captured from the model as it is.
        state: a driver's, with what it has kept once the change is made, if it cuts.
        optimizer: of the model's parameters.
        follow: called after each change.

    Raises:
        CheckpointError: if the model has not these layers and channels, or it is no state.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{type(state).__name__} is no Driver's state: give a state_dict()")
    cut = plan_restoring(network, state.get("kept", {}), optimizer)
    if cut is not None:
        cut.swap()
    try:
        follow()
        yield
    except BaseException:
        if cut is not None:
            cut.swap()
            follow()
        raise


def _named_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]


def _slice(
    change: Cut,
    tensor: Tensor,
    axes: Mapping[int, Tensor],
    optimizer: torch.optim.Optimizer | None,
    name: str,
) -> None:
    """Add the cut of one tensor, its gradient and all that the optimizer keeps of its shape."""
    grad = None if tensor.grad is None else _sliced(tensor.grad, axes)
    change.tensors.append((tensor, _sliced(tensor.data, axes), grad))
    for one in nested(optimizer) if optimizer is not None else ():
        for key, value in one.state.get(tensor, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1 < tensor.numel():
                continue
            if value.shape != tensor.shape:
                raise PlanError(
                    f"{type(one).__name__} keeps {key!r} of {name!r} as {tuple(value.shape)}, not "
                    f"in the parameter's shape {tuple(tensor.shape)}: it cannot be cut. Take an "
                    "optimizer such as SGD, Adam or AdamW"
                )
            change.items.append((one.state[tensor], key, _sliced(value, axes)))


def _sliced(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    last = not tensor.is_contiguous() and tensor.dim() == 4  # channels-last
    for axis, index in axes.items():
        tensor = tensor.detach().index_select(axis, index.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


def _adapt(change: Cut, model: nn.Module, name: str, sizes: Mapping[int, int]) -> None:
    """Add the changes of the attributes that say how many channels a module has."""
    path, _, tensor = name.rpartition(".")
    module: Any = model.get_submodule(path)
    new: dict[str, int] = {}
    if isinstance(module, nn.modules.conv._ConvNd) and tensor == "weight":
        first, second = (sizes.get(axis, module.weight.shape[axis]) for axis in (0, 1))
        groups = module.groups
        if 1 < groups == module.in_channels:  # depthwise
            groups = groups * first // module.weight.shape[0]
        second *= groups
        inner, outer = (first, second) if module.transposed else (second, first)
        new = {"in_channels": inner, "out_channels": outer, "groups": groups}
    elif isinstance(module, nn.Linear) and tensor == "weight":
        new = {"out_features": sizes.get(0, module.out_features)}
        new["in_features"] = sizes.get(1, module.in_features)
    elif isinstance(module, nn.GroupNorm):
        groups = module.num_groups * sizes[0] // module.num_channels
        new = {"num_channels": sizes[0], "num_groups": groups}
    elif hasattr(module, "num_features"):
        new = {"num_features": sizes[0]}
    elif isinstance(module, nn.PReLU):
        new = {"num_parameters": sizes[0]}
    change.items += [(vars(module), key, value) for key, value in new.items()]


def _forget(
    change: Cut, gone: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> None:
    """Add that an optimizer drops the parameters of removed branches."""
    out = {id(parameter) for parameter in gone}
    for one in nested(optimizer) if optimizer is not None and out else ():
        for group in one.param_groups:
            left = [p for p in group["params"] if id(p) not in out]
            change.items.append((group, "params", left))
        change.items += [(one.state, p, _MISSING) for p in gone if p in one.state]


def _record(
    model: nn.Module, channels: Channels, cut: set[int], removed: set[str]
) -> dict[str, list[int]]:
    """Return what `kept_channels` will: of a removed branch, just what makes it removed."""
    record = kept_channels(model)
    for path, own in channels.outputs.items():
        left = [i for i, channel in enumerate(own) if channel not in cut]
        if len(left) < len(own) or path in record:
            before = record.pop(path, list(range(len(own))))
            if not left or path not in removed:
                record[path] = [before[i] for i in left]
    return record
