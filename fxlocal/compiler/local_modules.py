"""What a network with local modules has besides its graph: heads, loss, buffers, and its way back.

They are kept on the capture, so that all networks made from it share them: a `fxlocal.Driver` may
change the Plan around them from step to step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..facts import BlockInput, StageBoundary
from ..ir.additions import LOSS_SCALE
from ..ir.network import Network
from ..ir.nodes import unwrapped
from ..ops.local_modules import ModuleLoss
from ..ops.replay import ReplayBuffer
from ..plan import ConvHead, InfoProHead, LinearHead, LocalModules
from .analysis import Analysis
from .heads import build_heads
from .split import find_split

__all__ = ["attach_modules", "attached_modules", "find_borders", "scale_losses", "strip"]

ATTACHED = "modules"


def find_borders(
    analysis: Analysis, modules: LocalModules, boundary: int = 0
) -> tuple[StageBoundary, ...]:
    """Return where the local modules of a model meet.

    Args:
        analysis: the model's, with edges.
        modules: how to split.
        boundary: index of the transition layer; modules before it do not learn, and no error flows
            back into the block that it lies in or those before.

    Raises:
        PlanError: if the split does not fit the model.
    """
    edges = _edges_of(analysis, modules)
    split = find_split(analysis, modules)
    blocks, borders = analysis.blocks, []
    learning = [i for i, block in enumerate(blocks) if block.layers[0] >= boundary]
    for k, block in enumerate(split[1:]):
        tail = next((i for i in learning if i >= block - modules.link), block)
        name = blocks[tail].start if tail < block else None
        learns = blocks[block].layers[0] > boundary
        borders.append(StageBoundary(k, blocks[block].start, edges[block].value, name, learns))
    return tuple(borders)


@contextmanager
def attached_modules(
    captured: Network, analysis: Analysis, modules: LocalModules
) -> Iterator[None]:
    """Do as `attach_modules`, but undo it if the ``with`` block raises."""
    before = {*captured.additions, *captured.added_modules}
    attach_modules(captured, analysis, modules)
    added = {*captured.additions, *captured.added_modules} - before
    try:
        yield
    except BaseException:
        if added:
            captured.drop_additions(*added)
            del captured.meta[ATTACHED]
        raise


def attach_modules(
    captured: Network,
    analysis: Analysis,
    modules: LocalModules,
    given: Mapping[str, nn.Module] | None = None,
) -> None:
    """Give ``captured`` what its networks with these local modules call, if it has not got it.

    Args:
        captured: the capture of the model.
        analysis: the model's, with edges.
        modules: what is asked for.
        given: heads and buffers that there are already, in the place of new ones.

    Raises:
        PlanError: if a head cannot be built, or there are heads of other local modules.
    """
    edges = _edges_of(analysis, modules)
    split = find_split(analysis, modules)
    if (present := captured.meta.get(ATTACHED)) is not None:
        if present != (modules, split):
            raise PlanError(
                f"the network has the heads of {present[0]!r}, whose modules begin at the blocks "
                f"{present[1]}, and an optimizer may hold them: it cannot change to {modules!r} "
                f"at {split}. Transform the model anew"
            )
        return
    _refuse_classes(modules, edges[-1])
    weights = (p.detach() for p in captured.source_model.parameters() if p.is_floating_point())
    reference = next(weights, torch.empty(0))
    if given is None:
        features = [edges[block] for block in split[1:]]
        given = {"heads": build_heads(modules, features, edges[0], edges[-1], reference)}
        if callable(modules.loss):
            given["loss"] = ModuleLoss(modules.loss)
        if modules.replay:
            buffers = (ReplayBuffer(modules.replay) for _ in split[1:])
            given["replay"] = nn.ModuleList(buffers)
    captured.add_tensor(LOSS_SCALE, torch.ones((), device=reference.device))
    for name, module in given.items():
        captured.add_module_of_ours(name, module)
    captured.meta[ATTACHED] = modules, split


def _edges_of(analysis: Analysis, modules: LocalModules) -> Sequence[BlockInput]:
    if not analysis.blocks:
        raise PlanError(f"{modules!r}: the model has no convolution and no linear layer to split")
    if analysis.block_inputs is None:
        raise PlanError(
            f"{modules!r}: the shapes of the features are needed: give one batch of inputs, "
            "transform(model, plan, x), or Driver(..., example_inputs=(x,))"
        )
    if analysis.block_inputs[-1].shape is None:
        raise PlanError(
            f"{modules!r}: the model's output is no single tensor, from which a loss could be "
            "computed: wrap it in a module that returns the tensor to learn from"
        )
    return analysis.block_inputs


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
    if not isinstance(network, Network) or LOSS_SCALE not in network.additions:
        raise TypeError(
            f"scale_losses() got a {type(network).__name__} without local modules: scale its loss "
            "yourself"
        )
    if not factor > 0:
        raise ValueError(f"factor={factor}: must be positive")
    network.additions[LOSS_SCALE].fill_(factor)


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
