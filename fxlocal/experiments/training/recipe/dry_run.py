"""Whether a model can learn the task, found out before training, by one forward in each mode."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....compiler.analysis import Analysis
from ...models.catalogue import ModelError
from ...own import RAISED
from ..measure import analyze_on
from ..objective import logits_of
from ..results import count_text

if TYPE_CHECKING:  # an experiment is made with what stands beside this
    from ..settings import Experiment

__all__ = ["check_model"]


def check_model(model: nn.Module, experiment: "Experiment") -> tuple[Analysis, list[str]]:
    """Return the analysis of ``model``, and what its user may want to know.

    The model is as it was afterwards: its buffers, its mode, and torch's random state.

    Raises:
        CaptureError: if the model cannot be captured.
        ModelError: if it cannot take the images, or its output is not what the task asks for.
    """
    example, settings = torch.zeros(2, *experiment.data.shape), experiment.settings
    analysis = analyze_on(model, example)
    # A norm may not take a part of a batch that is a single image.
    example = example[: settings.batch_size // settings.accumulate]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training, notes = model.training, dict[str, None]()
    try:
        if not analysis.layers:
            logits_of(_forward(model, example, False), settings.output)  # nothing may come of any
            raise ModelError(
                "the model has no layers: no call of a convolution or a linear map with weights "
                "was found in it, so that there is nothing for a strategy to work on"
            )
        for trains in (True, False):
            output = _forward(model, example, trains)
            notes |= dict.fromkeys(_check(output, experiment, len(example), trains))
    finally:
        nn.Module.train(model, training)
        for buffer, before in buffers:
            buffer.copy_(before)
    return analysis, list(notes)


def _forward(model: nn.Module, example: Tensor, trains: bool) -> Any:
    mode = "training" if trains else "evaluation"
    try:
        model.train(trains) if trains else model.eval()
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(trains):
            return model(example)
    except RAISED as error:
        shape = "x".join(map(str, example.shape[1:]))
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"the model raises in {mode} mode, on {count_text(len(example), 'image')} of {shape}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _check(output: Any, experiment: "Experiment", num: int, trains: bool) -> list[str]:
    data, part = experiment.data, experiment.settings.output
    if part and isinstance(output, Tensor):
        raise ModelError(f"--output {part}: the model returns one tensor; leave it out")
    logits = logits_of(output, part)
    shape, wanted = tuple(logits.shape), data.num_classes
    pixels = data.task == "segmentation"
    kinds = [f"({num}, {wanted}, height, width)"] + [f"({num}, {wanted})"] * (not pixels)
    if logits.dim() not in ((4,) if pixels else (2, 4)) or shape[0] != num:
        told = "no tensor of logits" if not shape else f"the shape {shape}"
        raise ModelError(
            f"the model's output for {count_text(num, 'image')} has {told}; wanted: "
            + " or ".join(reversed(kinds))
            + ("" if part else ", or --output NAME for another part of it")
        )
    if not logits.is_floating_point():
        raise ModelError(f"the model's output is of {logits.dtype}: return logits, not classes")
    if shape[1] < wanted:
        raise ModelError(
            f"the model has {shape[1]} outputs, {data.name} {wanted} classes: build it with "
            f"num_classes={wanted}"
        )
    if trains and not logits.requires_grad:
        raise ModelError(
            "the model's output depends on no parameter that learns (detach(), no_grad(), or all "
            "of them frozen): there is nothing to train"
        )
    if shape[1] > wanted:
        return [f"note: the model has {shape[1]} outputs, {data.name} {wanted} classes"]
    return []
