"""What a shrunk model has to compute: what the whole one does with those channels zero."""

import copy
from typing import Any

import torch
from fxlocal.passes import find_channels, find_layers
from torch import Tensor, nn

from fxlocal.facts import Channels, ChannelUse
from fxlocal.tracing.capture import capture


def channels_of(model: nn.Module) -> Channels:
    network = capture(model)
    return find_channels(network, layers=find_layers(network))


def some_kept(channels: Channels, share: float = 0.4, seed: int = 0) -> dict[str, list[int]]:
    """Draw which channels each layer keeps, at least one of each, where any may be cut."""
    generator = torch.Generator().manual_seed(seed)
    numbers = sorted({c for own in channels.outputs.values() for c in own} - channels.fixed.keys())
    cut = {c for c in numbers if torch.rand((), generator=generator) < share}
    for own in channels.outputs.values():
        if cut.issuperset(own):
            cut -= set(own)
    kept = {
        p: [i for i, c in enumerate(own) if c not in cut] for p, own in channels.outputs.items()
    }
    return {path: left for path, left in kept.items() if len(left) < len(channels.outputs[path])}


def zeroed(model: nn.Module, channels: Channels, kept: dict[str, list[int]]) -> nn.Module:
    """Return a copy with all zero that makes, scales or shifts a channel that is not kept."""
    model, cut = copy.deepcopy(model), numbers_cut(channels, kept)
    state = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for use in channels.uses:
            if use.role != "in" and "running" not in use.tensor:
                state[use.tensor].index_fill_(use.axis, places(use, cut), 0.0)
    return model


def numbers_cut(channels: Channels, kept: dict[str, list[int]]) -> set[int]:
    """Return the numbers of the channels that are not kept."""
    lost = {path: set(range(len(channels.outputs[path]))) - set(kept[path]) for path in kept}
    return {channels.outputs[path][i] for path in kept for i in lost[path]}


def places(use: ChannelUse, numbers: set[int], *, inside: bool = True) -> Tensor:
    """Return the places along an axis of the channels of these numbers, or of the others."""
    return torch.tensor([i for i, c in enumerate(use.channels) if (c in numbers) is inside]).long()


def stirred(model: nn.Module) -> nn.Module:
    """Give norms and biases values that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator))
    return model


def total(output: Any) -> Tensor:
    values = output.values() if isinstance(output, dict) else [output]
    return sum(value.square().sum() for value in values)  # type: ignore[return-value]


def assert_computes_the_same(
    small: nn.Module, whole: nn.Module, channels: Channels, kept: dict, x: Tensor, tolerance: float
) -> None:
    """Compare outputs in both modes, and every gradient that is left."""
    for mode in (True, False):
        outputs = [total(model.train(mode)(x)) for model in (small, whole)]
        torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
        if mode:
            for output in outputs:
                output.backward()
    full, cut = dict(whole.named_parameters()), numbers_cut(channels, kept)
    for name, parameter in small.named_parameters():
        expected = full[name].grad
        for use in (use for use in channels.uses if use.tensor == name):
            expected = expected.index_select(use.axis, places(use, cut, inside=False))
        largest = 1 + expected.abs().max()
        torch.testing.assert_close(
            parameter.grad / largest, expected / largest, rtol=0, atol=tolerance, msg=name
        )
