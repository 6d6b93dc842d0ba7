"""Local modules and backward links by hand, in eager PyTorch: no graph, nothing of the library.

Each network is written twice: as a model, and as a list of units, one per block, each of which
reads the values that are alive and says which it makes. The value "h" is the one that flows from
unit to unit; the others are skips. `step` runs the units in modules. A duplicate is the tail's
units run a second time, with batch norms of momentum 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.nets import BasicBlock, conv_norm

Live = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Unit:
    """What one block computes, and the layers whose parameters it uses."""

    run: Callable[[Live], Live]
    layers: tuple[nn.Module, ...]

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in layer.parameters()]


# --- networks ------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, more: int = 0) -> None:
        super().__init__()
        sizes = [(3, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 2), *[(8, 8, 1)] * (2 + more)]
        self.units = nn.Sequential(*(conv_norm(*size) for size in sizes))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(x).mean((2, 3)))

    def by_hand(self, masks: Live) -> list[Unit]:
        *lower, last = self.units
        return [*(_layer(unit) for unit in lower), _classified(last, self.fc)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [(4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 2), (8, 8, 1)]
        self.stem = conv_norm(3, 4)
        self.blocks = nn.Sequential(*(BasicBlock(*size) for size in sizes))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))

    def by_hand(self, masks: Live) -> list[Unit]:
        def block(m: BasicBlock, v: Live) -> Live:
            h = m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(v["h"])))))
            return {"h": torch.relu(h + m.shortcut(v["h"]))}

        *lower, last = self.blocks
        units = [Unit(partial(block, m), (m,)) for m in lower]
        ending = Unit(lambda v: _classify(self.fc, block(last, v)["h"]), (last, self.fc))
        return [_layer(self.stem), *units, ending]


class UNetNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pair = [nn.Sequential(conv_norm(i, o), conv_norm(o, o)) for i, o in _U_NET_PAIRS]
        self.enc1, self.enc2, self.bottom, self.dec2, self.dec1 = pair
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        c = self.dec2(torch.cat([b, F.interpolate(c, scale_factor=2.0, mode="nearest")], 1))
        c = torch.cat([a, F.interpolate(c, scale_factor=2.0, mode="nearest")], 1)
        return self.last(self.dec1(c))

    def by_hand(self, masks: Live) -> list[Unit]:
        def encode(layer: nn.Module, skip: str, v: Live) -> Live:
            kept = layer(v["h"])
            return {skip: kept, "h": F.max_pool2d(kept, 2)}

        def decode(layer: nn.Module, skip: str, v: Live) -> Live:
            up = layer(v["h"]).repeat_interleave(2, 2).repeat_interleave(2, 3)
            return {"h": torch.cat([v[skip], up], 1)}

        def unit(run: Callable[..., Live], layer: nn.Module, skip: str) -> Unit:
            return Unit(partial(run, layer, skip), (layer,))

        return [
            *(_layer(self.enc1[0]), unit(encode, self.enc1[1], "a")),
            *(_layer(self.enc2[0]), unit(encode, self.enc2[1], "b")),
            *(_layer(self.bottom[0]), unit(decode, self.bottom[1], "b")),
            *(_layer(self.dec2[0]), unit(decode, self.dec2[1], "a")),
            *(_layer(self.dec1[0]), _layer(self.dec1[1]), _layer(self.last)),
        ]


_U_NET_PAIRS = [(3, 4), (4, 6), (6, 8), (14, 6), (10, 4)]


class Dropped(nn.Module):
    """Dropout of whole channels as a module, and of values as a function, in every unit."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 4, 1), (4, 6, 2), (6, 6, 1), (6, 8, 2), (8, 8, 1)]
        self.units = nn.ModuleList(conv_norm(*size) for size in sizes)
        self.drop, self.fc = nn.Dropout2d(0.3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = F.dropout(self.drop(unit(x)), 0.4, self.training)
        return self.fc(x.mean((2, 3)))

    def by_hand(self, masks: Live) -> list[Unit]:
        def unit(i: int, v: Live) -> Live:
            h = self.units[i](v["h"])
            if f"channels{i}" not in masks:  # the second run of the unit uses the first one's
                ones = torch.ones_like(h)
                masks[f"channels{i}"] = F.dropout2d(ones, 0.3)
                masks[f"values{i}"] = F.dropout(ones, 0.4)
            return {"h": h * masks[f"channels{i}"] * masks[f"values{i}"]}

        last = len(self.units) - 1
        units = [Unit(partial(unit, i), (m,)) for i, m in enumerate(self.units[:last])]
        ending = (self.units[last], self.fc)
        return [*units, Unit(lambda v: _classify(self.fc, unit(last, v)["h"]), ending)]


def _layer(layer: nn.Module) -> Unit:
    return Unit(lambda v: {"h": layer(v["h"])}, (layer,))


def _classified(layer: nn.Module, fc: nn.Module) -> Unit:
    return Unit(lambda v: _classify(fc, layer(v["h"])), (layer, fc))


def _classify(fc: nn.Module, h: Tensor) -> Live:
    return {"h": fc(h.mean((2, 3)))}


DEEP = {"deep": partial(Plain, 4)}
MODELS = {"plain": Plain, "residual": Residual, "unet": UNetNet, "dropped": Dropped} | DEEP


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def batch(name: str, seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8, and a class per image, or per pixel."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 8, 8, generator=random, dtype=torch.float64)
    return x, torch.randint(5, (size, 8, 8) if name == "unet" else (size,), generator=random)


# --- heads ---------------------------------------------------------------------------------------

POOL, HIDDEN, WIDTH = 2, 6, 3  # what the heads of the tests are made with
CLASSIFICATION, RECONSTRUCTION = 0.7, 1.3


class Head(nn.Module):
    """A head's loss, by the papers: of a map of features, the images and the targets."""

    def __init__(self, kind: str, features: Tensor, x: Tensor, y: Tensor) -> None:
        super().__init__()
        dense, channels = y.dim() == 3, features.shape[1]
        pooled = nn.AdaptiveAvgPool2d([min(POOL, side) for side in features.shape[2:]])
        num_pooled = channels * pooled.output_size[0] * pooled.output_size[1]
        conv = [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        if dense and kind == "linear":
            self.classifier = nn.Sequential(nn.Conv2d(channels, 5, 1))
        elif dense:
            last = [nn.Conv2d(channels, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, 5, 1)]
            self.classifier = nn.Sequential(*conv, nn.ReLU(), *last)
        elif kind == "flat":
            self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(features[0].numel(), 5))
        elif kind == "linear":
            self.classifier = nn.Sequential(pooled, nn.Flatten(), nn.Linear(num_pooled, 5))
        else:
            last = [nn.Linear(num_pooled, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 5)]
            self.classifier = nn.Sequential(*conv, nn.ReLU(), pooled, nn.Flatten(), *last)
        if dense:
            self.classifier.append(nn.Upsample(y.shape[1:], mode="bilinear"))
        if kind == "infopro":
            self.decoder = nn.Sequential(
                nn.Upsample(x.shape[2:], mode="bilinear"),
                nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(),
                nn.Conv2d(WIDTH, x.shape[1], 3, padding=1),
            )
        self.to(features.dtype)

    def load(self, other: nn.Module) -> "Head":
        """Take over the values of ``other``, whose tensors come in the same order."""
        theirs = other.state_dict().values()
        with torch.no_grad():
            for mine, value in zip(self.state_dict().values(), theirs, strict=True):
                assert mine.shape == value.shape
                mine.copy_(value)
        return self

    def forward(self, features: Tensor, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
        local = loss(self.classifier(features), y)
        if not hasattr(self, "decoder"):
            return local
        error = (self.decoder(features) - x).square().mean()
        return CLASSIFICATION * local + RECONSTRUCTION * error


def heads_like(
    others: Sequence[nn.Module], kind: str, model: nn.Module, sizes: Sequence[int], *data: Tensor
) -> list[Head]:
    """Build the head of every module but the last, with the values of ``others``."""
    x, y = data
    live, heads, units = {"h": x}, [], model.by_hand({})
    training = model.training
    with torch.no_grad():
        model.eval()
        for other, size in zip(others, sizes[:-1], strict=True):
            for unit in units[:size]:
                live |= unit.run(live)
            units = units[size:]
            heads.append(Head(kind, live["h"], x, y).load(other))
    model.train(training)
    return heads


# --- one step ------------------------------------------------------------------------------------


def even(count: int, modules: int) -> list[int]:
    """Deal ``count`` units out, the remainder to the lower modules."""
    return [count // modules + (k < count % modules) for k in range(modules)]


def step(
    model: nn.Module,
    heads: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    link: int = 0,
    alpha: float = 0.5,
    loss: Loss = F.cross_entropy,
    weighting: str = "once",
) -> tuple[Tensor, Tensor]:
    """Add every module's gradients to ``.grad``; return the output and the last module's loss.

    Args:
        model: one of this file's.
        heads: of each module but the last: features, images, targets and ``loss`` to its loss.
        x, y: images, (B, C, H, W), and targets.
        sizes: how many units each module has.
        link: how many of its last units the next module repeats.
        alpha: what the local error counts in those; the next module's counts 1 - alpha.
        loss: of an output and the targets.
        weighting: "compound" for alpha ** (d + 1) and (1 - alpha) ** (d + 1) in the unit d before
            its module's end, and alpha ** link of the local error in all below a link: of a chain.
    """
    units, compound = model.by_hand({}), weighting == "compound"
    crossing, middle = {"h": x}, dict[str, Tensor]()
    linked: list[Unit] = []  # the tail of the module before
    for k, size in enumerate(sizes):
        last = k == len(sizes) - 1
        end = size if last else size - link
        lower, tail, units = units[:end], units[end:size], units[size:]

        live = _detached(crossing)
        with _still(linked):  # the duplicate: its values take the place of the originals
            live |= _run(linked, _detached(middle))
        middle = live | _run(lower, live)
        crossing = middle | _run(tail, middle)
        h = crossing["h"]
        value = loss(h, y) if last else heads[k](h, x, y, loss)
        left = alpha ** len(tail) if compound else 1.0
        for weight, tops, entering in ((1 - alpha, linked, left), (alpha, tail, 1.0)):
            for d, unit in enumerate(reversed(tops)):
                _accumulate(value, [unit], entering * weight ** (d + 1 if compound else 1))
        _accumulate(value, lower, left)
        _accumulate(value, heads[k : k + 1], 1.0)
        linked = tail
    return crossing["h"].detach(), value.detach()


def summed(
    model: nn.Module, heads: Sequence[nn.Module], x: Tensor, y: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Return the sum of the losses of greedy modules, for one backward over all of them."""
    units, live, total = model.by_hand({}), {"h": x}, torch.zeros(())
    for k, size in enumerate(sizes):
        live = _detached(live)
        live |= _run(units[:size], live)
        units = units[size:]
        h, last = live["h"], k == len(sizes) - 1
        total = total + (F.cross_entropy(h, y) if last else heads[k](h, x, y, F.cross_entropy))
    return total


def _run(units: Sequence[Unit], live: Live) -> Live:
    """Run ``units`` on what is alive; return only what they make."""
    made: Live = {}
    for unit in units:
        made |= unit.run(live | made)
    return made


def _detached(live: Live) -> Live:
    return {name: value.detach() for name, value in live.items()}


@contextmanager
def _still(units: Sequence[Unit]) -> Iterator[None]:
    """Keep the running statistics of the batch norms of ``units`` as they are."""
    layers = [layer for unit in units for top in unit.layers for layer in top.modules()]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum, batches in before:
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(batches)


def _accumulate(value: Tensor, owners: Sequence[Unit | nn.Module], weight: float) -> None:
    parameters = [p for owner in owners for p in owner.parameters()]
    if not parameters:
        return
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        counted = weight * gradient
        p.grad = counted if p.grad is None else p.grad + counted
