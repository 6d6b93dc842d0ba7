"""What fxlocal adds to a model, the names that it has there, and how both are saved."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python's own from 3.11 on

__all__ = ["ADDITIONS", "CHANGING", "Additions", "SharedState", "UnsavedHeads", "finish_load"]

ADDITIONS = "fxlocal"  # the child of a `Network`
CHANGING = {"rate", "rates", "skipped", "loss_scale"}  # tensors of it that do so as it trains


class Additions(nn.Module):
    """Tensors outside the ``state_dict``, and modules whose state is part of it.

    Constants of the captured model are among the tensors, by names of their own, and the idle ones
    of `fill_up`.

    Attributes:
        rate: 0-dim: the rate of local updates; like the rest, None where there is none.
        rates: in its place one for each layer of the model.
        skipped: 0-dim: how many deltas were not finite.
        loss_scale: 0-dim: factor of losses that are back-propagated in the forward.
        heads: of the local modules but the last.
        loss: a user's own.
        replay: the buffers before local modules.
    """

    rate: Tensor | None
    rates: Tensor | None
    skipped: Tensor | None
    loss_scale: Tensor | None
    heads: nn.ModuleList | None
    loss: nn.Module | None
    replay: nn.ModuleList | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor | None] | None = None,
        modules: Mapping[str, nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        for name in ("rate", "rates", "skipped"):
            self.register_buffer(name, None, persistent=False)
            self.register_buffer(f"idle_{name}", None, persistent=False)
        self.register_buffer("loss_scale", None, persistent=False)
        for name, tensor in (tensors or {}).items():
            self.register_buffer(name, tensor, persistent=False)
        self._modules.update(dict.fromkeys(("heads", "loss", "replay")) | dict(modules or {}))

    def fill_up(self, device: torch.device, num_layers: int) -> None:
        """Put an idle tensor where there are no rates, and no count of what was skipped.

        So all networks of a model have equally many buffers: `torch.optim.swa_utils.AveragedModel`
        pairs them by their place.
        """
        rates = torch.zeros(num_layers, dtype=torch.float32, device=device)
        idle = {"rate": rates.new_zeros(()), "rates": rates}
        idle["skipped"] = torch.tensor(0, device=device)
        for name, value in idle.items():
            if self._buffers[name] is None:
                setattr(self, f"idle_{name}", value)

    def copy(self) -> "Additions":
        """Return the same tensors and modules in another child."""
        return Additions(self._buffers, self._modules)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if strict:  # torch takes a module that is None for one that is there
            absent = tuple(f"{prefix}{name}." for name, m in self._modules.items() if m is None)
            lists[1].extend(name for name in state_dict if name.startswith(absent))


class SharedState(fx.GraphModule):
    """A graph module over the state of its source, and of what is added to it.

    The source's class and hooks may add to a state, rename its keys or convert older ones, so it
    saves and loads its own. Whatever changes it in place is done there, once.
    """

    fxlocal: Additions
    _source: nn.Module
    _joined: dict[str, nn.Module | None]

    @property
    def additions(self) -> dict[str, Tensor]:
        """The tensors that fxlocal added, by name."""
        return {name: t for name, t in self.fxlocal._buffers.items() if t is not None}

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

    @property
    def training(self) -> bool:
        """The source's training mode, so that ``model.eval()`` holds for its networks too."""
        source = self.__dict__.get("_source")  # torch.fx asks before there is one
        return source is None or source.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_source" in self.__dict__:  # torch.nn.Module.__init__ sets it before there is one
            self._source.training = mode

    def train(self, mode: bool = True) -> "Self":
        """Set the training mode of the source, and so of all its networks."""
        self._source.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Self":
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's state, and that of the heads."""
        self._join_children()
        told = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)) | kwargs
        prefix, keep_vars = told.get("prefix", ""), told.get("keep_vars", False)
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        state = self._source.state_dict(**told)
        self.fxlocal.state_dict(
            destination=state, prefix=f"{prefix}{ADDITIONS}.", keep_vars=keep_vars
        )
        for after in self._state_dict_hooks.values():
            changed = after(self, state, prefix, {"version": self._version})
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` returned, in the way that the source has, if its own."""
        self._join_children()
        if type(self._source).load_state_dict is nn.Module.load_state_dict:
            return super().load_state_dict(state_dict, *args, **kwargs)
        start, told = f"{ADDITIONS}.", dict(zip(("strict", "assign"), args, strict=False)) | kwargs
        rest = {name: v for name, v in state_dict.items() if not name.startswith(start)}
        found = self._source.load_state_dict(rest, *args, **kwargs)
        added = {n.removeprefix(start): v for n, v in state_dict.items() if n.startswith(start)}
        self.fxlocal.load_state_dict(added, told.get("strict", True), told.get("assign", False))
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self._join_children()
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, metadata, strict, *lists)
        unexpected, own = lists[1], f"{prefix}{ADDITIONS}."
        before = len(unexpected)
        self._source._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        unexpected[before:] = [n for n in unexpected[before:] if not n.startswith(own)]


def finish_load(network: SharedState, keys: Any) -> None:
    """Do what the source does once all is loaded."""
    for hook in network._source._load_state_dict_post_hooks.values():
        hook(network._source, keys)


class UnsavedHeads(nn.Module):
    """Heads that are moved, reduced and optimized with a model, but are not of its state."""

    NAME = "fxlocal_heads"  # the child that the model has, but while its own forward runs

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads
        self.register_load_state_dict_post_hook(_miss_nothing)  # type: ignore[no-untyped-call]

    def forward(self, value: Any) -> Any:
        """Return what is given: a Sequential that was unpickled calls all that it holds."""
        return value

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what was collected before."""
        return kwargs.get("destination", args[0] if args else {})


def _miss_nothing(heads: nn.Module, keys: Any) -> None:
    """Drop what a model's state lacks of them from the keys that are missing."""
    own = tuple(f"{UnsavedHeads.NAME}.{name}" for name, _ in heads.named_parameters())
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith(own)]
