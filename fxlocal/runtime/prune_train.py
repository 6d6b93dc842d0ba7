"""PruneTrain: a penalty drives channels to zero while a network trains, and they are cut away.

Equations (Lym et al. 2019, section 4, as `docs/sources.md` reads them): with W_l the weight of
layer l, o its output channels and i its input channels,

    penalty = strength * sum_l (sum_o ||W_l[o]|| + sum_i ||W_l[:, i]||)
    strength = share * loss / ((1 - share) * sum_l (...)), at the first batch and then for good,

where depthwise convolutions, the inputs of the first layer and the outputs of the last one are left
out, as is all that cannot be cut. After each ``every`` epochs the channels go whose weights, in all
layers that they belong to, are below ``threshold`` in size.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import CheckpointError, PlanError
from ..facts import ChannelUse
from ..ops.ranks import Group, find_group, group_named
from ..plan.checks import is_number
from ..tracing.capture import capture
from .branches import EmptyError
from .optimizers import refuse_other_models
from .shrink import kept_channels, plan_cut, plan_restoring, see_channels

__all__ = ["PruneTrain", "check_options"]


class PruneTrain:
    """Prunes a model while it trains, in the user's own loop.

    Args:
        model: the model; its parameters stay the same objects.
        optimizer: of its parameters; its state is cut with them.
        share: of the penalty, in the sum of loss and penalty at the first batch.
        every: epochs from cut to cut.
        threshold: channels whose weights are all smaller are cut.
        example_inputs: a batch as a tuple, or a dict by keyword, where capturing needs one.
        leaf_modules: as in `fxlocal.transform`.
        process_group: whose ranks train data parallel, by default all. Their weights are equal to
            the bit, so all cut alike.

    Attributes:
        epoch: how many epochs have ended.
        strength: lambda, a tensor of one element; None before the first batch.

    Raises:
        CaptureError: if the model cannot be captured.
        PlanError: if an argument is out of range, or no channel of the model can be cut.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> prune = PruneTrain(model, optimizer, every=1)
        >>> with torch.no_grad():
        ...     model[0].weight[3:] = model[2].weight[:, 3:] = 0
        >>> loss = model(torch.ones(3, 4)).square().mean()
        >>> (loss + prune.penalty(loss)).backward()
        >>> prune.end_epoch()
        >>> model[0].out_features, prune.kept
        (3, {'0': [0, 1, 2]})
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        share: float = 0.2,
        every: int = 10,
        threshold: float = 1e-4,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] = (),
        leaf_modules: tuple[type[nn.Module], ...] = (),
        process_group: Group = None,
    ) -> None:
        check_options(share, every, threshold)
        if optimizer is not None:
            refuse_other_models(optimizer, model.parameters())
        self.model, self.optimizer = model, optimizer
        self.share, self.every, self.threshold = share, every, threshold
        self._captured_with, self._group = (example_inputs, leaf_modules), process_group
        self.epoch = 0
        self.strength: Tensor | None = None
        self._look()
        if not self._penalised:
            reasons = dict.fromkeys(self._channels.fixed.values())
            raise PlanError(
                f"no channel of {type(model).__name__} can be cut: "
                f"{'; '.join(list(reasons)[:3]) or 'it has no layers'}"
            )
        model.register_load_state_dict_pre_hook(_refuse_other_shapes)  # type: ignore[no-untyped-call]

    @property
    def kept(self) -> dict[str, list[int]]:
        """Which of the channels that its layers once had the model has kept, where any are cut."""
        return kept_channels(self.model)

    def penalty(self, loss: Tensor, num_samples: int = 1) -> Tensor:
        """Return what to add to ``loss`` before its backward; the first call sets `strength`.

        Args:
            loss: of this rank's samples, their mean.
            num_samples: how many those are; it is only asked for where ranks have unequal numbers.

        Raises:
            ValueError: if the first loss, the mean over the samples of all ranks, is not a tensor
                of one element, finite and above 0, of which the penalty could be a share.
        """
        norms = [torch.linalg.vector_norm(w, dim=dims).sum() for _, w, dims in self._penalised]
        total = torch.stack(norms).sum()
        if self.strength is None:
            first = self._mean(loss, num_samples)
            if not 0 < float(first) < math.inf:
                raise ValueError(_not_a_loss(loss))
            share = self.share / (1 - self.share)
            self.strength = share * first.to(total.dtype) / total.detach()
        return self.strength * total

    def end_epoch(self) -> None:
        """End an epoch; cut the channels that have become zero, if it is time.

        Where a layer would lose all channels and is in no residual branch, its largest one stays.
        """
        self.epoch += 1
        if self.epoch % self.every == 0:
            self._look()
            self._cut()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the states of model and optimizer."""
        strength = None if self.strength is None else self.strength.clone()
        return {"epoch": self.epoch, "strength": strength, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: cut the model as it was cut.

        Load its state and its optimizer's after this.

        Raises:
            CheckpointError: if the model cannot be cut so; nothing has been changed then.
        """
        if missing := [name for name in ("epoch", "strength", "kept") if name not in state]:
            raise CheckpointError(f"not a PruneTrain's state: it has no {missing[0]!r}")
        self._look()
        cut = plan_restoring(self._network, state["kept"], self.optimizer)
        if cut is not None:
            cut.swap()
            self._look()
        self.epoch = int(state["epoch"])
        given = state["strength"]
        device = self._penalised[0][1].device
        self.strength = None if given is None else given.to(device)

    def _mean(self, loss: Tensor, num_samples: int) -> Tensor:
        """Return the mean loss over the samples of all ranks."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(_not_a_loss(loss))
        loss = loss.detach()
        if (group := find_group(self._group)) is None:
            return loss
        total = torch.full((2,), num_samples, dtype=torch.float64, device=loss.device)
        total[:1] *= loss.reshape(1)
        distributed.all_reduce(total, group=group_named(group))
        return total[0] / total[1]

    def _look(self) -> None:
        """See which channels the model has now."""
        inputs, leaves = self._captured_with
        args: tuple[Any, ...] = () if isinstance(inputs, Mapping) else inputs
        by_name = inputs if isinstance(inputs, Mapping) else {}
        self._network = capture(self.model, *args, leaf_modules=leaves, **by_name)
        self._channels = see_channels(self._network)
        named = dict(self._network.named_parameters())
        fixed = self._channels.fixed
        self._penalised: list[tuple[ChannelUse, Tensor, list[int]]] = []  # axis, weight, others
        for use in self._channels.uses:
            if use.role in ("in", "out") and fixed.keys().isdisjoint(use.channels):
                weight = named[use.tensor]
                others = [dim for dim in range(weight.dim()) if dim != use.axis]
                self._penalised.append((use, weight, others))

    def _cut(self) -> None:
        channels, largest = self._channels, self._largest()
        cut = {channel for channel, size in largest.items() if size < self.threshold}
        while cut:
            try:
                plan_cut(self._network, channels, cut, self.optimizer).swap()
            except EmptyError as error:
                own = set(channels.outputs[error.path])
                if not own <= cut:  # it is the inputs that it has lost
                    weight = f"{error.path}.weight"
                    own = {
                        channel
                        for use in channels.uses
                        if use.role == "in" and use.tensor == weight
                        for channel in use.channels
                    }
                cut.discard(max(own, key=lambda channel: largest.get(channel, 0.0)))
                continue
            self._look()
            return

    def _largest(self) -> dict[int, float]:
        """Return the size of the largest weight of each channel that can be cut."""
        found: dict[int, float] = {}
        for use, weight, dims in self._penalised:
            sizes = weight.detach().abs().amax(dims).tolist()
            for channel, size in zip(use.channels, sizes, strict=True):
                if not size <= found.setdefault(channel, 0.0):  # NaN is large
                    found[channel] = size
        return found


def _not_a_loss(loss: Any) -> str:
    return (
        f"penalty(loss={loss!r}): the penalty is to be a share of the first batch's loss: give a "
        "tensor of one element, finite and above 0"
    )


def check_options(share: float, every: int, threshold: float) -> None:
    """Raise a PlanError if an option of `PruneTrain` is out of range."""
    if not (is_number(share) and 0 < share < 1):
        raise PlanError(f"share={share!r}: the penalty's share must lie between 0 and 1, as 0.2")
    if type(every) is not int or every < 1:
        raise PlanError(f"every={every!r}: must be a whole number of epochs, at least 1")
    if not (is_number(threshold) and threshold > 0):
        raise PlanError(f"threshold={threshold!r}: must be finite, above 0")


def _refuse_other_shapes(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    for name, own in (*model.named_parameters(), *model.named_buffers()):
        given = state.get(f"{prefix}{name}")
        if isinstance(given, Tensor) and given.shape != own.shape:
            raise CheckpointError(
                f"{name!r} is {list(given.shape)} in the state and {list(own.shape)} here: "
                "channels were cut in one of them. Cut them here before: call load_state_dict of "
                "the PruneTrain, or of the Driver, or fxlocal.shrink(model, kept) with what "
                "PruneTrain.kept was then. Nothing was loaded"
            )
