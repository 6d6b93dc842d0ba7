"""The algorithms by hand, in eager PyTorch: no graph, no pass, nothing of the library.

LoCal+SGD: each network of models.py that has an oracle is written out again, layer by layer, with
a `Prefix` that says for layer i whether it learns locally, and where the gradient stops.

Gradient approximation: `LargestErrors` stands around a step of any eager model and puts the weight
gradients of the k largest errors in the place of the exact ones.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def conv_delta(
    pre: Tensor,
    post: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """delta[o, i, k] = sum over b, p of post[b, o, p] * pre[b, i, p * stride + k * dilation - pad].

    Of a transposed convolution, pre and post change places.
    """
    padded = F.pad(pre, [side for pad in reversed(padding) for side in (pad, pad)])
    inputs, outputs = pre.shape[1] // groups, post.shape[1] // groups
    delta = pre.new_zeros(post.shape[1], inputs, *kernel)
    for k in itertools.product(*map(range, kernel)):
        window = padded[(slice(None), slice(None), *_seen_from(k, post, stride, dilation))]
        for g in range(groups):
            i, o = slice(g * inputs, (g + 1) * inputs), slice(g * outputs, (g + 1) * outputs)
            total = torch.einsum("bop,bip->oi", post[:, o].flatten(2), window[:, i].flatten(2))
            delta[(o, slice(None), *k)] = total
    return delta


def _seen_from(
    k: Sequence[int], post: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> list[slice]:
    """The inputs that kernel position k meets, one slice per dimension."""
    first = [a * d for a, d in zip(k, dilation, strict=True)]
    last = [a + (n - 1) * s for a, n, s in zip(first, post.shape[2:], stride, strict=True)]
    return [slice(a, b + 1, s) for a, b, s in zip(first, last, stride, strict=True)]


def linear_delta(pre: Tensor, post: Tensor) -> Tensor:
    """delta[o, i] = sum over all leading positions of post[o] * pre[i]."""
    delta = pre.new_zeros(post.shape[-1], pre.shape[-1])
    for position in itertools.product(*map(range, pre.shape[:-1])):
        delta += torch.outer(post[position], pre[position])
    return delta


def keep_largest(error: Tensor, k: int, scale: float) -> Tensor:
    """Of each map, the k largest errors, each with an equal share of the others; zeros elsewhere.

    Args:
        error: shape (B, O, *spatial).
        k: how many; 0 keeps none.
        scale: factor.
    """
    maps = error.flatten(2)
    kept = torch.zeros_like(maps)
    for b, o in itertools.product(*map(range, maps.shape[:2])):
        errors = maps[b, o].tolist()
        largest = sorted(range(len(errors)), key=lambda p: abs(errors[p]), reverse=True)[:k]
        dropped = sum(errors[p] for p in range(len(errors)) if p not in largest)
        for p in largest:
            kept[b, o, p] = scale * (errors[p] + dropped / k)
    return kept.view(error.shape)


def conv_topk(pre: Tensor, error: Tensor, *sliding: Any, k: int, scale: float = 1.0) -> Tensor:
    """The weight gradient of the k largest errors; ``sliding`` as in `conv_delta`."""
    return conv_delta(pre, keep_largest(error, k, scale), *sliding)


def linear_topk(pre: Tensor, error: Tensor, k: int, scale: float = 1.0) -> Tensor:
    """The same for a linear layer: all dimensions between batch and features are one map."""
    while pre.dim() < 3:  # of a batch, a map of one position; then of one sample
        at = 1 if pre.dim() == 2 else 0
        pre, error = pre.unsqueeze(at), error.unsqueeze(at)
    return linear_delta(pre, keep_largest(error.movedim(-1, 1), k, scale).movedim(1, -1))


_SLIDING = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_SLIDING[:5], "output_padding", "groups", "dilation")


class LargestErrors(TorchFunctionMode):
    """Under it, the named weights get no gradient by autograd; `finish` adds that of k errors.

    Args:
        model: an eager model.
        kept: (k, scale) of each weight, by its qualified name; k = 0 is a gradient of zeros, and
            None in the place of both is no gradient.
    """

    def __init__(self, model: nn.Module, kept: dict[str, tuple[int, float] | None]) -> None:
        super().__init__()
        self.kept = {model.get_parameter(name): how for name, how in kept.items()}
        self.calls: list[tuple[nn.Parameter, dict[str, Any], list[Tensor]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not name.startswith("conv") and name != "linear":
            return func(*args, **kwargs)
        names = _TRANSPOSED if "transpose" in name else _SLIDING
        call = dict(zip(names, args, strict=False)) | kwargs
        weight = call["weight"]
        if not any(weight is named for named in self.kept):
            return func(*args, **kwargs)
        call["weight"] = weight.detach().requires_grad_()  # with its kernels, apart from its graph
        output = func(**call)
        errors: list[Tensor] = []
        if output.requires_grad:
            output.register_hook(errors.append)
            pre = call["input"].detach().clone()
            self.calls.append((weight, {**call, "input": pre}, errors))
        return output

    def finish(self) -> None:
        """Add each call's gradient to its weight's ``.grad``."""
        for weight, call, errors in self.calls:
            for error in errors if (how := self.kept[weight]) else ():
                gradient = self._gradient(call, error, *how)
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        self.calls.clear()

    def _gradient(self, call: dict[str, Any], error: Tensor, k: int, scale: float) -> Tensor:
        pre, weight = call["input"], call["weight"].detach()
        if k == 0:
            return torch.zeros_like(weight)
        if weight.dim() == 2:
            return linear_topk(pre, error, k, scale)
        kernel, padding = weight.shape[2:], call.get("padding", 0)
        stride, dilation = (_each(call.get(name, 1), kernel) for name in ("stride", "dilation"))
        if padding == "same":  # the odd one goes to the right
            total = [d * (n - 1) for d, n in zip(dilation, kernel, strict=True)]
            pre = F.pad(pre, [s for t in reversed(total) for s in (t // 2, t - t // 2)])
        padding = _each(0 if isinstance(padding, str) else padding, kernel)
        if pre.dim() < weight.dim():
            pre, error = pre[None], error[None]
        sliding = (kernel, stride, padding, dilation, call.get("groups", 1))
        return conv_topk(pre, error, *sliding, k=k, scale=scale)


def _each(value: Any, kernel: Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * len(kernel) if len(values) == 1 else values


@dataclass
class Prefix:
    """Every layer before ``boundary`` learns by itself; ``rate`` 0 freezes it.

    A tuple of rates holds one for each layer.
    """

    boundary: int
    rate: float | tuple[float, ...] = 0.0
    norm: str = "train"
    oja: bool = False
    relative: bool = False

    def cut(self, layer: int, *values: Tensor) -> Sequence[Tensor]:
        """Stop the gradient of all that is alive just before ``layer``."""
        return [v.detach() for v in values] if layer == self.boundary else values

    def normalise(self, layer: int, bn: nn.BatchNorm2d, z: Tensor) -> Tensor:
        if layer < self.boundary and self.norm == "eval":
            mean, var = bn.running_mean[:, None, None], bn.running_var[:, None, None]
            scaled = (z - mean) / (var + bn.eps).sqrt()
            return scaled * bn.weight[:, None, None] + bn.bias[:, None, None]
        return bn(z)

    def learn(self, layer: int, conv: nn.Module, pre: Tensor, post: Tensor) -> None:
        if layer >= self.boundary:
            return
        rate = self.rate[layer] if isinstance(self.rate, tuple) else self.rate
        if rate == 0:
            return
        geometry = conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation, conv.groups
        with torch.no_grad():
            transposed = isinstance(conv, nn.ConvTranspose2d)
            ends = (post, pre) if transposed else (pre, post)
            delta = conv_delta(*ends, *geometry)
            if self.oja:
                for o in range(post.shape[1]):
                    of_o = (slice(None), o) if transposed else o
                    delta[of_o] -= post[:, o].square().sum() * conv.weight[of_o]
            length = delta.square().sum().sqrt()
            step = rate * (conv.weight.square().sum().sqrt() if self.relative else 1)
            if length > 0:
                conv.weight += step * delta / length


def chain(m: nn.Module, x: Tensor, prefix: Prefix) -> Tensor:
    for i, (conv, bn) in enumerate([(m.conv1, m.bn1), (m.conv2, m.bn2), (m.conv3, None)]):
        (x,) = prefix.cut(i, x)
        z = conv(x)
        prefix.learn(i, conv, x, z)
        x = torch.relu(prefix.normalise(i, bn, z) if bn else z)
    (x,) = prefix.cut(3, x.mean((2, 3)))
    return m.fc(x)


def residual(m: nn.Module, x: Tensor, prefix: Prefix) -> Tensor:
    (conv, bn, _), boundary = m.stem, prefix.boundary
    z = conv(x)
    prefix.learn(0, conv, x, z)
    x = torch.relu(prefix.normalise(0, bn, z))

    (x,) = prefix.cut(1, x)
    z = m.block1.conv1(x)
    prefix.learn(1, m.block1.conv1, x, z)
    a = torch.relu(prefix.normalise(1, m.block1.bn1, z))
    a, x = prefix.cut(2, a, x)
    z = m.block1.conv2(a)
    total = prefix.normalise(2, m.block1.bn2, z) + x
    prefix.learn(2, m.block1.conv2, a, total)

    (x,) = prefix.cut(3, torch.relu(total))
    z = m.block2.conv1(x)
    prefix.learn(3, m.block2.conv1, x, z)
    a = torch.relu(prefix.normalise(3, m.block2.bn1, z))
    a, x = prefix.cut(4, a, x)
    z = m.block2.conv2(a)
    main = prefix.normalise(4, m.block2.bn2, z)
    if boundary == 5:  # the sum lies beyond the cut
        prefix.learn(4, m.block2.conv2, a, z)
    main, x = prefix.cut(5, main, x)
    conv, bn = m.block2.shortcut
    total = main + prefix.normalise(5, bn, conv(x))
    if boundary > 5:
        prefix.learn(4, m.block2.conv2, a, total)
        prefix.learn(5, conv, x, total)

    (x,) = prefix.cut(6, torch.relu(total).mean((2, 3)))
    return m.fc(x)


def unet(m: nn.Module, x: Tensor, prefix: Prefix) -> Tensor:
    def conv_norm(i: int, layer: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
        conv, bn, _ = layer
        z = conv(x)
        prefix.learn(i, conv, x, z if skip is None else z + skip)
        return torch.relu(prefix.normalise(i, bn, z))

    a = conv_norm(0, m.enc1, x)
    (a,) = prefix.cut(1, a)
    b = conv_norm(1, m.enc2, F.max_pool2d(a, 2))
    a, b = prefix.cut(2, a, b)
    c = conv_norm(2, m.mid, F.max_pool2d(b, 2))
    a, b, c = prefix.cut(3, a, b, c)
    z = m.up2(c)
    prefix.learn(3, m.up2, c, z)
    a, b, c = prefix.cut(4, a, b, z)
    c = conv_norm(4, m.dec2, torch.cat([b, c], 1), skip=b)
    a, c = prefix.cut(5, a, c)
    up = F.interpolate(c, scale_factor=2.0, mode="nearest")
    c = conv_norm(5, m.dec1, torch.cat([a, up], 1), skip=a)
    (c,) = prefix.cut(6, c)
    return m.head(c)


ORACLES = {"chain": chain, "residual": residual, "unet": unet}


class MomentumSgd:
    """v <- momentum * v + g + decay * w;  w <- w - lr * v;  a weight without gradient stays."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> None:
        self.model, self.lr, self.momentum, self.decay = model, lr, momentum, weight_decay
        self.velocity: dict[str, Tensor] = {}

    def step(self) -> None:
        with torch.no_grad():
            for name, w in self.model.named_parameters():
                if w.grad is not None:
                    g = w.grad.add(w, alpha=self.decay)
                    v = self.velocity.get(name)
                    self.velocity[name] = g if v is None else self.momentum * v + g
                    w.add_(self.velocity[name], alpha=-self.lr)

    def zero_grad(self) -> None:
        for w in self.model.parameters():
            w.grad = None


SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
Trace = list[tuple[Tensor, dict[str, Tensor | None]]]


def train(
    model: nn.Module, optimizer: Any, forwards: Sequence[Callable[[Tensor], Tensor]], x: Tensor
) -> Trace:
    """Take one step with each of ``forwards``; return each step's output and gradients."""
    trace: Trace = []
    for forward in forwards:
        output = forward(x)
        (
            output * torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output)
        ).sum().backward()
        optimizer.step()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        trace.append((output.detach().clone(), gradients))
        optimizer.zero_grad()
    return trace
