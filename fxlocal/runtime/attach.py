"""Train a model by a schedule where it is: its own forward stands for the network of the step.

The model keeps its class, configuration, signature and state, so whatever wraps, trains, saves and
loads it goes on doing so. Which network runs is chosen at the first forward after each step of the
optimizer; micro-batches that add up to one step run the same.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NoEffectWarning, PlanError
from ..ir.additions import UnsavedHeads
from ..ir.source import device_of
from ..schedules import Schedule
from ..tracing.stand_in import StandIn
from .accumulate import accumulate
from .driver import Driver
from .losses import MeanLoss
from .optimizers import after_step

__all__ = ["AttachedDriver", "attach", "attached_to"]

_DRIVERS: "WeakSet[AttachedDriver]" = WeakSet()


class AttachedDriver(Driver):
    """A driver whose networks run when the model is called; `attach` makes it.

    Attributes:
        inputs: what the network was given, by place and by keyword, in the last forward that
            trained in this step.
        in_use: the network of this step, None before its first forward.
        observes: whether it found a loss in what that returned.
        loss_scale: by what such a loss is multiplied, as where it is a part of a step's.
        more: whether more micro-batches of this step come behind the next one: deltas add up then.
        owner: what attached it, if something did that may be gone before the model.
        handles: of hooks that go when it is detached.
    """

    loss_scale = 1.0
    more = False
    owner: object = None

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        target: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"attach got {type(model).__name__}: give a torch.nn.Module")
        _refuse_attached(model)
        _refuse_compiled(model)
        _refuse_checkpointing(model)
        self._steps: list[Any] = []  # handles of the optimizer's hooks
        self.handles: list[RemovableHandle] = []
        with warnings.catch_warnings():
            # They do, as the model is called.
            own = ".* (hooks of 'the model'|__call__ of .*) will not run"
            warnings.filterwarnings("ignore", own)
            super().__init__(model, schedule, optimizer, **options)
        self._target, self._signature = target, inspect.signature(model.forward)
        if target is not None and target not in self._signature.parameters:
            raise PlanError(
                f"target={target!r}: the forward of {type(model).__name__} has no such argument, "
                f"but {self._signature}. Without it, call the model with the target as last input"
            )
        self.in_use: Callable[..., Any] | None = None
        self._takes_target = False
        self._device = device_of(model)
        self.observes = False
        self._by_hand = False  # whether the user observes losses
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        if len(self.heads):
            model.add_module(UnsavedHeads.NAME, UnsavedHeads(self.heads))
        self._stand_in = StandIn(model, self._run)
        _DRIVERS.add(self)

    @property
    def paused(self) -> bool:
        """Whether the model runs its own forward for now, in training too."""
        return self._stand_in.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._stand_in.paused = paused

    def _set_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        super()._set_optimizer(optimizer)
        for handle in self._steps:
            handle.remove()
        self._steps = after_step(optimizer, self._end_step) if optimizer is not None else []

    def start_epoch(self) -> None:
        """Begin an epoch, as `Driver.start_epoch` does.

        Raises:
            PlanError: as there, or if checkpointing was switched on since the model was captured.
        """
        _refuse_checkpointing(self.model)
        self._end_step()
        super().start_epoch()

    def network(self) -> Callable[..., Any]:
        """Return the network of the next step, and let the model run it until that ends.

        The first forward of a step calls this. Without an optimizer, whose step would tell, call
        it yourself before each step.
        """
        device = device_of(self.model)
        if device != self._device:  # moved since, by a trainer say
            for network in (self.captured, *(network for network, _ in self.networks.values())):
                network.follow(device)
            self._device = device
        self.in_use = super().network()
        self._takes_target = self._current[0].modules is not None
        return self.in_use

    def observe(self, loss: Tensor) -> None:
        """Add one step's loss to the epoch's mean, in place of those found in outputs.

        Raises:
            ValueError: if the loss is no tensor of one element.
        """
        if not self._by_hand:
            self._by_hand, self._loss = True, MeanLoss()
        super().observe(loss)

    def end_epoch(self) -> None:
        """End an epoch, as `Driver.end_epoch` does; warn if no forward of the model trained in it.

        Raises:
            RuntimeError: if the epoch was not begun; nothing has been changed then.
        """
        if self._started and not self.step:
            warnings.warn(
                f"no forward of the attached {type(self.model).__name__} trained in epoch "
                f"{self.epoch}: it was in evaluation mode, or something else was called",
                NoEffectWarning,
                stacklevel=2,
            )
        super().end_epoch()

    def state_dict(self, *, weights: bool = True) -> dict[str, Any]:
        """Return all that an exact resume needs, as `Driver.state_dict` does.

        Args:
            weights: False leaves out the states of model and optimizer, which a trainer saves.
        """
        state = super().state_dict() | {"by_hand": self._by_hand}
        if not weights:
            state |= {"model": None, "optimizer": None}
            del state["fingerprint"]["optimizer"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; model and optimizer as they are without.

        Raises:
            CheckpointError: as `Driver.load_state_dict` does; nothing has been changed then.
        """
        super().load_state_dict(state)
        self._end_step()
        self._by_hand = state.get("by_hand", False)

    def release(self) -> None:
        """Drop the gradients of what no gradient moves in this step.

        For loops that run forward and backward inside the optimizer's step, which does so before.
        """
        for parameter in self._prefix:
            parameter.grad = None

    def detach(self) -> None:
        """Give the model its own forward back and let go of the optimizer."""
        self._stand_in.remove()
        self.model._modules.pop(UnsavedHeads.NAME, None)
        for handle in self.handles:
            handle.remove()
        self.optimizer = None
        self._prefix.clear()
        self._end_step()
        _DRIVERS.discard(self)

    def _end_step(self) -> None:
        self.in_use, self.inputs = None, ((), {})

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network of this step on what the model was called with."""
        if self.in_use is None and self.optimizer is None:
            raise RuntimeError(
                "an attached model trains, and its driver has no optimizer, whose steps tell when "
                "the next Plan begins: set driver.optimizer = ..., or call driver.network() before "
                "each step"
            )
        network = self.network() if self.in_use is None else self.in_use  # some have a length
        if self._takes_target and self._target is not None:
            given = self._signature.bind(*args, **kwargs).arguments
            kwargs = kwargs | {"target": given.get(self._target)}
        self.inputs = args, kwargs
        more = (self.more or _steps_later(self.optimizer)) and self.how != "cudagraph"
        with accumulate(self) if more else nullcontext():
            output = _call(network, args, kwargs)
        if not self._takes_target:
            loss = _loss_in(output)
        elif self._target is None:
            loss = output[1]
        else:
            output, loss = output
        self.observes = loss is not None and not self._by_hand
        if loss is not None and self.observes:
            self._loss.observe(loss, self.loss_scale)
        return output


def attach(
    model: nn.Module,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    target: str | None = None,
    compile: bool | Literal["cudagraph"] | Mapping[str, Any] = False,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] = (),
    leaf_modules: tuple[type[nn.Module], ...] = (),
) -> AttachedDriver:
    """Let ``model`` itself run the network of each step, in the loop that it is trained in.

    While it trains, with gradients, its forward is that of the step's Plan; in evaluation mode and
    under ``no_grad`` it is its own. A copy of it is not attached. Attach before the model is
    wrapped (`DistributedDataParallel`) and before the optimizer is made: the heads of local modules
    are among ``model.parameters()`` then, though not in its ``state_dict``.

    A loss in the output (``output.loss``, ``output["loss"]``, that of local modules) is observed by
    itself; else call ``driver.observe(loss)``.

    Args:
        model: the model.
        schedule: says which Plan holds in each epoch and step of the optimizer.
        optimizer: may be set later, as ``driver.optimizer``, before the first forward.
        target: the argument of the model that local modules learn from too, such as "labels"; they
            return what the model returns. Without it, call ``model(x, target)`` in training, which
            returns ``(output, loss)``.
        compile: as for a `Driver`.
        example_inputs: as for a `Driver`, like the next.
        leaf_modules: module classes to keep whole.

    Returns:
        The driver: begin and end epochs with it; `AttachedDriver.detach` puts all back.

    Raises:
        CaptureError: if the model cannot be captured.
        TypeError: if it is no module.
        PlanError: if a Plan does not fit the model, or the model or a part of it is attached
            already, compiled, or checkpoints its activations; nothing has been changed then.

    Example:
        >>> from fxlocal import schedules
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> driver = attach(model, schedules.Static(epochs=4))
        >>> driver.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(driver.epoch, 4):
        ...     driver.start_epoch()
        ...     loss = model(torch.ones(3, 4)).square().mean()
        ...     loss.backward(); driver.optimizer.step(); driver.optimizer.zero_grad()
        ...     driver.observe(loss)
        ...     driver.end_epoch()
        >>> driver.history
        [0, 0, 1, 1]
    """
    options: dict[str, Any] = {"compile": compile, "example_inputs": example_inputs}
    options["leaf_modules"] = leaf_modules
    return AttachedDriver(model, schedule, optimizer, target=target, **options)


def _call(network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a network; say what to do if it has no such input, where the model takes any."""
    try:
        return network(*args, **kwargs)
    except TypeError as error:
        if "forward() got an unexpected keyword argument" not in str(error):
            raise
        raise TypeError(
            f"{error}: the graph was captured without. Give it in example_inputs too"
        ) from error


def _loss_in(output: Any) -> Tensor | None:
    """Return the loss that an output carries, if it does."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def attached_to(model: nn.Module) -> AttachedDriver | None:
    """Return the driver that ``model`` is attached to, if any."""
    return next((driver for driver in _DRIVERS if driver.model is model), None)


def _refuse_attached(model: nn.Module) -> None:
    mine = set(model.modules())
    for driver in _DRIVERS:
        if not mine.isdisjoint(driver.model.modules()):
            raise PlanError(
                f"{type(model).__name__} shares modules with a {type(driver.model).__name__} that "
                "is attached: two drivers would each rewrite it. Call detach() of the first, or "
                "combine the schedules"
            )


def _steps_later(optimizer: Any) -> bool:
    """Tell whether accelerate's wrapper will pass over the next step, as it accumulates."""
    state = getattr(optimizer, "gradient_state", None)
    return state is not None and not state.sync_gradients


def _refuse_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise PlanError(
                f"{path or type(model).__name__!r} has been compiled, for one forward only: attach "
                "to the model as it was before, with compile=True"
            )


def _refuse_checkpointing(model: nn.Module) -> None:
    for path, module in model.named_modules():
        named = ("gradient_checkpointing", "grad_checkpointing")  # transformers', timm's
        if any(getattr(module, name, False) is True for name in named):
            raise PlanError(
                f"{path or type(model).__name__!r} has gradient checkpointing switched on, which "
                "the networks of a schedule would not do: switch it off, and let the Plan do it, "
                "Plan(checkpoint=Checkpoint(count))"
            )
