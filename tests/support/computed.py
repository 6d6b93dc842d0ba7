"""Layers that compute their weight, each with that weight written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

EPS = 1e-6


class Standardised(nn.Conv2d):
    """As in BiT: each output's weights have mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=EPS)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """As in normaliser-free nets: standardised, times a gain that learns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(self.weight, dim=[1, 2, 3], keepdim=True)
        deviation = torch.std(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = self.gain * (self.weight - mean) / (deviation + EPS)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Masked(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask.view_as(self.weight), self.bias)


class Gained(nn.ConvTranspose2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Thinned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]).view(4, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _of_standardised(state: dict[str, Tensor]) -> Tensor:
    weight, axes = state["weight"], (1, 2, 3)
    centred = weight - weight.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()


def _of_scaled(state: dict[str, Tensor]) -> Tensor:
    weight, axes = state["weight"], (1, 2, 3)
    centred = weight - weight.mean(axes, keepdim=True)
    return state["gain"] * centred / (centred.square().mean(axes, keepdim=True).sqrt() + EPS)


def _of_normed(state: dict[str, Tensor]) -> Tensor:
    length, weight = (state[f"parametrizations.weight.original{i}"] for i in (0, 1))
    return length * weight / weight.flatten(1).square().sum(1).sqrt().view_as(length)


def _of_spectral(state: dict[str, Tensor]) -> Tensor:
    """The iteration that the forward makes has moved ``u`` and ``v`` already."""
    weight = state["parametrizations.weight.original"]
    u, v = (state[f"parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    return weight / (u @ weight.flatten(1) @ v)


def _of_symmetric(state: dict[str, Tensor]) -> Tensor:
    weight = state["parametrizations.weight.original"]
    return torch.triu(weight) + torch.triu(weight, 1).t()


def _of_thinned(state: dict[str, Tensor]) -> Tensor:
    return _of_normed(state) * state["parametrizations.weight.1.mask"]


@dataclass
class Kind:
    """How to build the layer, and its weight from its state, by hand."""

    build: Callable[[], nn.Module]
    weight: Callable[[dict[str, Tensor]], Tensor]


def _thinned() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    return parametrize.register_parametrization(layer, "weight", Thinned())


KINDS = {
    "standardised": Kind(lambda: Standardised(4, 4, 3, padding=1), _of_standardised),
    "scaled": Kind(lambda: Scaled(4, 6, 3, stride=2, groups=2), _of_scaled),
    "masked": Kind(lambda: Masked(4, 5), lambda s: s["weight"] * s["mask"].view(5, 4)),
    "gained": Kind(lambda: Gained(4, 3, 2, stride=2), lambda s: s["weight"] * s["gain"]),
    "normed": Kind(lambda: parametrizations.weight_norm(nn.Conv2d(4, 3, 3)), _of_normed),
    "normed linear": Kind(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), _of_normed),
    "spectral": Kind(
        lambda: parametrizations.spectral_norm(nn.Conv2d(4, 3, 3, dilation=2)), _of_spectral
    ),
    "symmetric": Kind(
        lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric()),
        _of_symmetric,
    ),
    "thinned": Kind(_thinned, _of_thinned),
}


class Net(nn.Module):
    """A layer, and a head of any input size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(4, 4), layer, nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.relu(self.layer(x)))

    def behind(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1).mean(1, keepdim=True))
