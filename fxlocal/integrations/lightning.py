"""Train by a schedule under Lightning's trainer: a callback that attaches a module of yours.

::

    trainer = Trainer(callbacks=[ScheduleCallback(schedules.Static(epochs=90), model="net")])
    trainer.fit(module)  # whose training_step calls self.net(x), as before

Lightning's automatic optimization runs forward, ``zero_grad``, backward. The gradients that local
modules leave in the forward are kept over that, and those of the last step cleared before.
"""

import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from typing import Any, Literal

from torch import Tensor, distributed, nn

from ..compiler.local_modules import scale_losses
from ..errors import CheckpointError, PlanError
from ..ops.ranks import pack, unpack
from ..runtime.attach import AttachedDriver, attach
from ..runtime.optimizers import take_without
from ..schedules import Schedule
from .report import report_step

__all__ = ["ScheduleCallback"]

# Lightning goes by two names, whose classes are not each other's.
_OLD = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
_lightning: Any = import_module("pytorch_lightning" if _OLD else "lightning.pytorch")


class ScheduleCallback(_lightning.Callback):  # type: ignore[misc]
    """Attaches a module of a LightningModule to a driver while it is fitted.

    Its state, the heads of local modules and the random generators of each rank are part of
    Lightning's checkpoints; weights and optimizer stay where Lightning has them.

    Args:
        schedule: says which Plan holds in each epoch and step of the optimizer.
        model: path of the module that ``training_step`` calls, such as "net"; "" is the
            LightningModule itself, called as ``self(x)``.
        compile: as for `fxlocal.attach`, like the next three.
        example_inputs: one batch of inputs, where capture or local modules need shapes.
        leaf_modules: module classes to keep whole.
        target: the argument of the module that local modules learn from too.
        report: log what each layer was trained by in the first step, see `fxlocal.verify`.
        require_state: refuse a checkpoint that was written without this callback, which else
            warns and goes on at the trainer's epoch.

    Attributes:
        driver: the driver, from ``setup`` on.
    """

    def __init__(
        self,
        schedule: Schedule,
        model: str,
        *,
        compile: bool | Literal["cudagraph"] | Mapping[str, Any] = False,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] = (),
        leaf_modules: tuple[type[nn.Module], ...] = (),
        target: str | None = None,
        report: bool = True,
        require_state: bool = False,
    ) -> None:
        self.schedule, self.model = schedule, model
        self.report, self.require_state = report, require_state
        self.driver: AttachedDriver | None = None
        self._options: dict[str, Any] = {"compile": compile, "target": target}
        self._options |= {"example_inputs": example_inputs, "leaf_modules": leaf_modules}
        self._loaded: Mapping[str, Any] = {}
        self._has_heads = False
        self._loss: Tensor | None = None  # of the last backward
        self._stepped: Tensor | None = None  # of the last before the optimizer's step
        self._state_key: str = self._generate_state_key(model=model)  # asked for at each hook
        self._kept: list[tuple[Tensor, Tensor]] = []  # parameters and the gradients kept for them

    @property
    def state_key(self) -> str:
        """Tell callbacks of several modules apart."""
        return self._state_key

    @property
    def _driver(self) -> AttachedDriver:
        assert self.driver is not None
        return self.driver

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach, before the optimizers are made.

        Raises:
            PlanError: if the module was compiled, or there is none of this path, or a callback
                before this one has made a copy that lacks the heads of local modules.
        """
        if stage != "fit":
            return
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise PlanError(
                f"trainer.fit() was given a compiled {type(pl_module).__name__}: give the module "
                "itself, and compile=True to ScheduleCallback"
            )
        if self.driver is not None:  # a fit that was broken off
            self.driver.detach()
        try:
            model = pl_module.get_submodule(self.model)
        except AttributeError as error:
            raise PlanError(
                f"model={self.model!r}: {error}. Give the path of a module that exists before "
                "setup(), not only after configure_model()"
            ) from None
        self._loaded = {}
        precision, options = trainer.precision_plugin, self._options
        with ExitStack() as stack:
            if str(trainer.precision).endswith("-true"):  # of the weights, and from now on
                precision.convert_module(pl_module)
                stack.enter_context(precision.forward_context())
                options = options | {
                    "example_inputs": precision.convert_input(options["example_inputs"])
                }
            self.driver = attach(model, self.schedule, **options)
        self._has_heads = len(self.driver.heads) > 0
        self.driver.paused = not self._has_heads  # until training begins: finders try before
        if self._has_heads and (name := self._copied_before(trainer, pl_module)):
            self.driver.detach()
            raise PlanError(
                f"{name} has copied the module before local modules' heads were in it, and would "
                "average other weights: put ScheduleCallback before it in Trainer(callbacks=[...])"
            )

    def _copied_before(self, trainer: Any, pl_module: Any) -> str | None:
        """Return the name of a callback before this one that holds another module."""
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            held = (v for v in vars(callback).values() if isinstance(v, nn.Module))
            if any(module is not pl_module for module in held):
                return type(callback).__name__
        return None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach."""
        if stage == "fit" and self.driver is not None:
            self.driver.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach; the driver's state is still there to be saved."""
        if self.driver is not None:
            self.driver.detach()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let optimizers, whose states are loaded next, have none of the heads."""
        for optimizer in trainer.optimizers:
            take_without(optimizer, self._driver.heads)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the driver its optimizer, and the epoch at which the trainer begins.

        Raises:
            PlanError: if not one optimizer holds parameters of the module.
        """
        driver, own = self._driver, {id(p) for p in self._driver.model.parameters()}
        held = [
            one
            for one in trainer.optimizers
            if any(id(p) in own for group in one.param_groups for p in group["params"])
        ]
        if len(held) != 1:
            raise PlanError(
                f"{len(held)} of {len(trainer.optimizers)} optimizers hold parameters of "
                f"{self.model!r}: its steps are those of one optimizer. Attach a module that has "
                "one of its own"
            )
        driver.optimizer, driver.paused = held[0], False
        if not self._loaded:
            driver.epoch = trainer.current_epoch
            driver.start_epoch()  # Lightning may go on inside one
        elif self._loaded["started"] and driver.epoch < trainer.current_epoch:
            driver.end_epoch()  # written behind its last batch
            driver.start_epoch()  # of which Lightning tells no one
        elif self._loaded["started"]:
            # The rest of an epoch: the loader that Lightning made for it has drawn since.
            driver.load_state_dict(self._loaded)
        self._loaded = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the driver's epoch, if the trainer's is one that trains."""
        self._pause_without_backward(trainer)
        if not self._driver.paused:
            self._driver.start_epoch()

    def _pause_without_backward(self, trainer: Any) -> None:
        """Let the module run its own forward in an epoch that only estimates norms anew.

        StochasticWeightAveraging appends one; its callback may stand before or behind this one.
        With local modules the module is called with a target, which its own forward does not take.
        """
        self._driver.paused |= trainer.fit_loop._skip_backward and not self._has_heads

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End it."""
        if not self._driver.paused:
            self._driver.end_epoch()
        self._driver.paused = False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make way for gradients of the forward: those of the last step go, losses are scaled."""
        self._kept = []
        self._pause_without_backward(trainer)
        if not pl_module.automatic_optimization:
            return  # whoever divides the loss calls accumulate(callback.driver), or scale_losses
        self._driver.more = trainer.fit_loop.epoch_loop._should_accumulate()
        if not self._has_heads:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            trainer.optimizers[0].zero_grad()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = scaler.get_scale() if scaler else 1.0
        scale_losses(self._driver.captured, factor / trainer.accumulate_grad_batches)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep what local modules left, if the backward of this batch is still to come."""
        if not self._has_heads or not pl_module.automatic_optimization:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._kept.append((parameter, parameter.grad))
                    parameter.grad = None

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Put it back."""
        for parameter, gradient in self._kept:
            parameter.grad = gradient
        self._kept = []
        self._loss = loss.detach()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Observe the loss, where the module's output has none."""
        if self._driver.observes:
            return
        told = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(told, Tensor):  # divided by Lightning where it accumulates gradients
            automatic = pl_module.automatic_optimization
            self._loss = told.detach() * (trainer.accumulate_grad_batches if automatic else 1)
        elif self._stepped is not None:  # others may have been of other optimizers
            self._loss = self._stepped
        if self._loss is not None and not self._driver.paused:
            self._driver.observe(self._loss)
        self._loss = self._stepped = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Drop gradients of the prefix; log once what is trained by what."""
        driver = self._driver
        if optimizer is not driver.optimizer:
            return
        driver.release()
        self._stepped = self._loss
        if self.report and any(driver.inputs):
            self.report = False
            _lightning.utilities.rank_zero_info(report_step(driver))

    def state_dict(self) -> dict[str, Any]:
        """Return the driver's state, without weights and optimizer, and each rank's generators."""
        if self.driver is None:
            return {}
        state = self.driver.state_dict(weights=False)
        return state | {"random": _of_all_ranks(state["random"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where it was taken; a CheckpointError of another model or schedule."""
        if self.driver is None:
            return
        ranks = state_dict["random"]
        rank = distributed.get_rank() if _world_size() > 1 else 0
        self._loaded = state_dict | {"random": ranks[min(rank, len(ranks) - 1)]}
        self.driver.load_state_dict(self._loaded)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Tell of a checkpoint that has no state of this callback.

        Raises:
            CheckpointError: if ``require_state`` was asked for.
        """
        if self.driver is None or self.state_key in checkpoint.get("callbacks", {}):
            return
        told = (
            f"the checkpoint {str(trainer.ckpt_path)!r} was written without a ScheduleCallback: it "
            "has no state of the schedule and no heads"
        )
        if self.require_state:
            raise CheckpointError(f"{told}. Give require_state=False to go on without")
        warnings.warn(
            f"{told}. Going on at the trainer's epoch, with what is new of them", stacklevel=2
        )


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the random generators of all ranks, which all have to call this."""
    if _world_size() == 1:
        return [state]
    packed: list[Any] = [None] * _world_size()
    distributed.all_gather_object(packed, pack(state))  # plain pickle cannot hold all dtypes
    return list(map(unpack, packed))


def _world_size() -> int:
    available = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if available else 1
