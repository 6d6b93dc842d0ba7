"""What fxlocal adds to a model, and the names that it has there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ADDITIONS", "Additions", "UnsavedHeads"]

ADDITIONS = "fxlocal"  # the child of a `Network`


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
        idle: dict[str, Any] = {"rate": 0.0, "rates": [0.0] * num_layers, "skipped": 0}
        for name, value in idle.items():
            if self._buffers[name] is None:
                setattr(self, f"idle_{name}", torch.tensor(value, device=device))

    def copy(self) -> "Additions":
        """Return the same tensors and modules in another child."""
        return Additions(self._buffers, self._modules)


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
