"""A callback for the ``Trainer`` of transformers, which imports nothing of it.

    schedule = fxlocal.schedules.Static(epochs=3, rule=Freeze(), norm="eval")
    callback = ScheduleCallback(schedule, example_inputs=batch)
    Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()

The trainer's model is attached (`fxlocal.attach`), so that it runs the network of each step of the
optimizer; micro-batches that are accumulated to one step run the same. Checkpoints get a file
``fxlocal_0.pt``, one for each process, from which ``train(resume_from_checkpoint=...)`` goes on.
What the first step moved is logged, level INFO, as `fxlocal.verify` finds it.
"""

import inspect
import logging
import math
import os
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CheckpointError, NoEffectWarning, PlanError
from ..ir.source import device_of
from ..runtime.attach import AttachedDriver, attach, attached_to
from ..schedules import Schedule, find_plans
from .report import report_step

__all__ = ["ScheduleCallback"]

logger = logging.getLogger(__name__)

COUNT = "num_items_in_batch"
CLOSE = 1e-6  # of a sum over weights, whose order depends on the device


class ScheduleCallback:
    """Trains a ``Trainer``'s model by a schedule.

    Give it to the ``Trainer`` when that is made: the heads of local modules have to be there before
    the optimizer is.

    Args:
        schedule: which Plan holds in each epoch and step of the optimizer.
        example_inputs: one batch of the model's inputs, as for a `Driver`.
        model: path of the module to attach; "" is the trainer's model itself. Trainers that put a
            forward of their own in its place, as TRL's do, still call a part of it: "model".
        target: the model's argument that local modules learn from too, such as "labels".
        compile: as for a `Driver`; in place of the trainer's own ``torch_compile``.
        report: log what each layer was trained by in the first step, see `fxlocal.verify`.
        require_state: refuse a checkpoint that was written without this callback, which else
            warns and goes on at the trainer's epoch.

    Attributes:
        driver: the model's, once the trainer is made; the model has its own forward back after
            training.

    Raises:
        PlanError: when the trainer is made, if the schedule does not fit the model or the trainer's
            arguments.
        CheckpointError: when training begins, if a checkpoint is of another run, or has no state
            and that is to be refused.
    """

    def __init__(
        self,
        schedule: Schedule,
        example_inputs: Any = (),
        *,
        model: str = "",
        target: str | None = None,
        compile: bool | Mapping[str, Any] = False,
        report: bool = True,
        require_state: bool = False,
    ) -> None:
        self.schedule, self.example_inputs, self.model = schedule, example_inputs, model
        self.options: dict[str, Any] = {"target": target, "compile": compile}
        self.report, self.require_state = report, require_state
        self.driver: AttachedDriver | None = None
        self._trains = self._is_within = False  # an epoch

    def __getattr__(self, name: str) -> Any:
        """Return what does nothing at the events that this is not about."""
        if name.startswith("on_"):
            return lambda *given, **others: None
        raise AttributeError(name)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
        """Attach the model, before there is an optimizer."""
        self._attach(args, control, model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **others: Any
    ) -> None:
        """Take the optimizer, and go on from a checkpoint; else begin the schedule anew."""
        attached = attached_to(self._part_of(model))
        if self._trains or attached is not self.driver:  # broken off, or a second time
            self._attach(args, control, model)
        self._trains, driver = True, self._driver()
        driver.optimizer = optimizer
        if state.global_step:
            self._resume(args, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin an epoch, unless it was begun before a checkpoint that was written inside it."""
        driver = self._driver()
        if self._is_within and driver.epoch < int(state.epoch or 0):  # written at its very end
            driver.end_epoch()
            self._is_within = False
        if not self._is_within:
            driver.start_epoch()
        self._is_within = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log what the first step does, on a copy."""
        if self.report:
            self.report = False
            logger.info("%s", report_step(self._driver()))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End the epoch; one that the end of training breaks off may be gone on with."""
        driver = self._driver()
        if not control.should_training_stop or int(state.epoch or 0) > driver.epoch:
            driver.end_epoch()
            self._is_within = False
            if math.isnan(driver.losses[-1]):
                warnings.warn(
                    "no loss was observed in this epoch: where the Trainer computes it "
                    "(label_smoothing_factor, compute_loss), the model's output has none, and "
                    "schedules that learn from losses see nan. Call callback.driver.observe(loss) "
                    "in compute_loss",
                    NoEffectWarning,
                    stacklevel=2,
                )

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the state beside what the trainer has written."""
        path = _folder(args, state) / f"fxlocal_{args.process_index}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        driver = self._driver()
        torch.save(driver.state_dict(weights=False) | {"sum": _sum_weights(driver)}, partial)
        os.replace(partial, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Give the model its own forward back."""
        self._trains = False
        self._driver().detach()

    def _driver(self) -> AttachedDriver:
        if self.driver is None:
            raise RuntimeError("this callback has no model yet: give it to a Trainer and train")
        return self.driver

    def _part_of(self, model: nn.Module) -> nn.Module:
        try:
            return model.get_submodule(self.model)
        except AttributeError as error:
            raise PlanError(
                f"model={self.model!r}: {error}. Give the path of a module in the "
                f"{type(model).__name__} that the trainer has"
            ) from None

    def _attach(self, args: Any, control: Any, whole: nn.Module) -> None:
        """Attach; what a Trainer that was made before attached, as in a notebook, is let go of."""
        _refuse_arguments(args)
        if (before := self.driver) is not None:
            before.detach()
        found = attached_to(model := self._part_of(whole))
        if found is not None and found.owner not in (None, id(control)):
            found.detach()
        config: Any = getattr(whole, "config", None)
        if config is not None and hasattr(args, "use_cache"):
            config.use_cache = args.use_cache  # as the Trainer does next: forwards read it
        device = device_of(model)
        examples = _with_count(model, _as_called(args, self.example_inputs))
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device), examples)
        self.driver = attach(model, self.schedule, example_inputs=moved, **self.options)
        self.driver.owner, self._is_within = id(control), False  # two may be equal
        if before is not None and before.model is model:
            _keep_heads(self.driver.heads, before.heads)
        reference = weakref.ref(self.driver)  # of which copies of the model hold none
        count = partial(_count_in_float, reference, args.gradient_accumulation_steps)
        self.driver.handles.append(model.register_forward_pre_hook(count, with_kwargs=True))
        try:
            _refuse_plans(args, self.driver)
        except PlanError:
            self.driver.detach()
            raise

    def _resume(self, args: Any, state: Any) -> None:
        driver, folder = self._driver(), _folder(args, state)
        given = args.resume_from_checkpoint
        if isinstance(given, str) and Path(given).is_dir():
            folder = Path(given)
        own, first = (folder / f"fxlocal_{rank}.pt" for rank in (args.process_index, 0))
        path = own if own.exists() else first
        if path.exists():
            found = torch.load(path, map_location="cpu", weights_only=True)
            _refuse_other_weights(driver, found["sum"], path)
            driver.load_state_dict(found)
            self._is_within = found["started"]
            return
        message = (
            f"there is no {path}, in which the schedule's state would be: training is resumed at "
            f"epoch {state.epoch:g} of a checkpoint that was written without this callback, or "
            "that lies elsewhere; then set TrainingArguments(resume_from_checkpoint=its folder)"
        )
        if self.require_state:
            raise CheckpointError(message)
        warnings.warn(f"{message}. Going on there, with nothing learned of it", stacklevel=2)
        driver.epoch = int(state.epoch)


def _as_called(args: Any, examples: Any) -> Any:
    """Leave out the labels that the trainer keeps to itself, for a smoothed loss of its own."""
    if not getattr(args, "label_smoothing_factor", 0) or not isinstance(examples, Mapping):
        return examples
    return {name: value for name, value in examples.items() if name != "labels"}


def _with_count(model: nn.Module, examples: Any) -> Any:
    """Add what the trainer gives to models that divide the loss by all labels of a step."""
    signature = inspect.signature(model.forward)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not isinstance(examples, Mapping) or not getattr(model, "accepts_loss_kwargs", takes_any):
        return examples
    labels = examples.get("labels")
    count = {} if labels is None else {COUNT: (labels != -100).sum().float()}
    return count | dict(examples)


def _keep_heads(heads: nn.Module, before: nn.Module) -> None:
    """Give heads the parameters that those of an earlier run have, which an optimizer may hold."""
    for own, theirs in zip(heads.modules(), before.modules(), strict=True):
        own._parameters.update(theirs._parameters)
        own._buffers.update(theirs._buffers)


def _count_in_float(
    attached: weakref.ref[AttachedDriver],
    num_parts: int,
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Give the count the type that the graph was captured for: trainers differ in theirs.

    The loss that is divided by it, a part of the step's, is the same. Without labels there is
    none, and so no count.
    """
    count, labels = kwargs.get(COUNT), kwargs.get("labels")
    if driver := attached():
        driver.loss_scale = 1.0 if count is None else float(num_parts)
    if count is None:
        return None
    if labels is None:
        return args, {name: value for name, value in kwargs.items() if name != COUNT}
    count = torch.as_tensor(count, dtype=torch.float, device=labels.device)
    return args, kwargs | {COUNT: count}


def _folder(args: Any, state: Any) -> Path:
    """Return the folder of the checkpoint that was written at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _sum_weights(driver: AttachedDriver) -> float:
    """Return the sum of the model's weights, which tells one checkpoint's from another's."""
    heads = set(driver.heads.parameters())
    weights = [weight for weight in driver.model.parameters() if weight not in heads]
    return math.fsum(weight.detach().double().sum().item() for weight in weights)


def _refuse_other_weights(driver: AttachedDriver, theirs: float, path: Path) -> None:
    """Refuse a state that lies where that of the loaded weights would, but is of others."""
    own = _sum_weights(driver)
    if not math.isclose(own, theirs, rel_tol=CLOSE, abs_tol=CLOSE):
        raise CheckpointError(
            f"{path} was written with other weights than those that were loaded: their sum is "
            f"{theirs:.9g} there and {own:.9g} here. If training is resumed from another folder, "
            "set TrainingArguments(resume_from_checkpoint=its folder)"
        )


def _refuse_arguments(args: Any) -> None:
    if args.torch_compile:
        raise PlanError(
            "TrainingArguments(torch_compile=True) would compile the network of one Plan and run "
            "it in all steps: leave it out, and give compile=True to the callback"
        )
    if args.n_gpu > 1:
        raise PlanError(
            f"{args.n_gpu} GPUs in one process: nn.DataParallel copies the model in each step, and "
            "no copy is attached. Start one process per GPU with torchrun, or show one GPU alone"
        )
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise PlanError(
            "TrainingArguments(fsdp=...) and (deepspeed=...) keep parts of weights, where the "
            "networks of a schedule need whole ones: train data parallel without them"
        )


def _refuse_plans(args: Any, driver: AttachedDriver) -> None:
    """Refuse Plans that the trainer's way to step would make into something else."""
    plans = find_plans(driver.schedule, driver.analysis)
    with_modules = any(plan.modules is not None for plan in plans)
    if with_modules and (args.gradient_accumulation_steps > 1 or args.fp16):
        raise PlanError(
            "local modules back-propagate losses of their own, which the trainer cannot divide by "
            "gradient_accumulation_steps, nor scale for fp16: leave both out; bf16 works"
        )
    if with_modules and getattr(args, "label_smoothing_factor", False):
        raise PlanError(
            "label_smoothing_factor: the trainer keeps the labels to itself, from which local "
            "modules learn: leave it out"
        )
    if args.world_size == 1:
        return
    if with_modules:
        raise PlanError(
            "several processes would each count the losses of local modules for themselves: train "
            "on one, or without modules"
        )
    if args.ddp_find_unused_parameters is False:
        raise PlanError(
            "ddp_find_unused_parameters=False: gradients would not be averaged once a layer has "
            "none: leave it out, or give True"
        )
