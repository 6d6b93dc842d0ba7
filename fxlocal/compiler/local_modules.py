"""What a network with local modules has besides its graph: heads, loss, buffers, and its way back.

They are kept on the capture, so that all networks made from it share them: a `fxlocal.Driver` may
change the Plan around them from step to step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..facts import BlockInput
from ..ir.network import Network
from ..ir.nodes import unwrapped
from ..ops.local_modules import ModuleLoss
from ..ops.replay import ReplayBuffer
from ..plan import ConvHead, InfoProHead, LinearHead, LocalModules
from .analysis import Analysis
from .heads import build_heads
from .resolve import ResolvedPlan

__all__ = ["attach_modules", "attached_modules", "scale_losses", "strip"]

ATTACHED = "modules"


@contextmanager
def attached_modules(
    captured: Network, analysis: Analysis, resolved: ResolvedPlan
) -> Iterator[None]:
    """Do as `attach_modules`, but undo it if the ``with`` block raises."""
    before = captured.meta.get(ATTACHED)
    attach_modules(captured, analysis, resolved)
    try:
        yield
    except BaseException:
        if before is None and captured.meta.pop(ATTACHED, None):
            added = captured.fxlocal
            added.loss_scale = added.heads = added.loss = added.replay = None
        raise


@torch.inference_mode(False)
def attach_modules(
    captured: Network,
    analysis: Analysis,
    resolved: ResolvedPlan,
    given: Mapping[str, nn.Module] | None = None,
) -> None:
    """Give ``captured`` what networks of this Plan call, if it has local modules and has not yet.

    Heads and buffers that are ``given`` take the place of new ones.

    Raises:
        PlanError: if a head cannot be built, or there are heads of other local modules.
    """
    modules, split, edges = resolved.plan.modules, resolved.split, analysis.block_inputs
    if modules is None or edges is None:
        return
    if (present := captured.meta.get(ATTACHED)) is not None:
        if present != (modules, split):
            raise PlanError(
                f"the network has the heads of {present[0]!r}, whose modules begin at the blocks "
                f"{present[1]}, and an optimizer may hold them: it cannot change to {modules!r} "
                f"at {split}. Transform the model anew"
            )
        return
    output = analysis.prediction(modules)
    _refuse_classes(modules, output)
    weights = (p.detach() for p in captured.source_model.parameters() if p.is_floating_point())
    reference = next(weights, torch.empty(0))
    if given is None:
        features = [edges[block] for block in split[1:]]
        given = {"heads": build_heads(modules, features, edges[0], output, reference)}
        if callable(modules.loss):
            given["loss"] = ModuleLoss(modules.loss)
        if modules.replay:
            buffers = (ReplayBuffer(modules.replay) for _ in split[1:])
            given["replay"] = nn.ModuleList(buffers)
    captured.fxlocal.loss_scale = torch.ones((), device=reference.device)
    for name, module in given.items():
        captured.fxlocal.add_module(name, module)
    captured.meta[ATTACHED] = modules, split


def _refuse_classes(modules: LocalModules, output: BlockInput) -> None:
    """Refuse heads whose scores the target could not be compared with."""
    built_in = isinstance(modules.head, (LinearHead, ConvHead, InfoProHead))
    if modules.count == 1 or not built_in or modules.loss != "cross_entropy" or not output.shape:
        return
    if modules.num_classes != output.shape[1]:
        raise PlanError(
            f"LocalModules(num_classes={modules.num_classes}): the model's output has the shape "
            f"{output.shape}, so {output.shape[1]} classes; heads and model learn from one target"
        )


def scale_losses(network: Callable[..., Any], factor: float) -> None:
    """Multiply the losses that ``network`` back-propagates in its forward by ``factor``.

    What you do to the loss that it returns must be done to those of the earlier modules too, and
    beforehand: give ``1 / n`` where n micro-batches add up to one, and ``scaler.get_scale()`` with
    a `torch.amp.GradScaler`. It holds until it is changed, for all networks of a driver.

    Args:
        network: with local modules; compiled or not.
        factor: positive.

    Raises:
        TypeError: if the network has no local modules.
        ValueError: if the factor is not positive.
    """
    network = unwrapped(network)
    if not isinstance(network, Network) or network.fxlocal.loss_scale is None:
        raise TypeError(
            f"scale_losses() got a {type(network).__name__} without local modules: scale its loss "
            "yourself"
        )
    if not factor > 0:
        raise ValueError(f"factor={factor}: must be positive")
    network.fxlocal.loss_scale.fill_(factor)


def strip(network: Callable[..., Any]) -> nn.Module:
    """Return the model that ``network`` was made from, which has the same parameters, no heads.

    Args:
        network: what `fxlocal.transform` or `Driver.network` returned, compiled or not.

    Raises:
        TypeError: if it is something else.
    """
    network = unwrapped(network)
    if not isinstance(network, Network):
        raise TypeError(f"strip() got a {type(network).__name__}: give what transform returned")
    return network.source_model
