"""Stochastic depth by hand: the same draws, sample by sample, without a graph."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Branch = Callable[..., Tensor]
Sum = Callable[[Sequence[Tensor], Branch, Tensor], Tensor]


def survivals(count: int, rate: float, curve: str = "linear") -> list[float]:
    return [1 - rate * (block / count if curve == "linear" else 1) for block in range(1, count + 1)]


def _add(values, branch: Branch, shortcut: Tensor, drawn: list[int], scale: float) -> Tensor:
    parts = branch(*(torch.stack([v[row] for row in drawn]) for v in values)) if drawn else []
    rows = []
    for row in range(len(shortcut)):
        own = parts[drawn.index(row)] * scale if row in drawn else 0
        rows.append(shortcut[row] + own)
    return torch.stack(rows)


def drop_rows(values, branch: Branch, shortcut: Tensor, *, survival: float) -> Tensor:
    """A fixed number of rows survive: those from one that is drawn, around the end."""
    size = len(shortcut)
    count = int(survival * size + 0.5)
    first = 0 if count == size else int(torch.randperm(size)[0])
    drawn = [(first + i) % size for i in range(count)]
    return _add(values, branch, shortcut, drawn, size / count)


def drop_each(values, branch: Branch, shortcut: Tensor, *, survival: float) -> Tensor:
    """Each row survives by itself, as DropPath has it."""
    drawn = [row for row, u in enumerate(torch.rand(len(shortcut)).tolist()) if u < survival]
    return _add(values, branch, shortcut, drawn, 1 / survival)


def drop_block(values, branch: Branch, shortcut: Tensor, *, survival: float, kept: bool) -> Tensor:
    return shortcut + branch(*values) / survival if kept else shortcut


def residual(net: nn.Module, x: Tensor, *, add: Iterator[Sum]) -> Tensor:
    """The forward of `support.nets.Residual`."""
    x = net.stem(x)
    for block in (net.block1, net.block2):

        def branch(v: Tensor, block: nn.Module = block) -> Tensor:
            return block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(v)))))

        x = torch.relu(next(add)((x,), branch, block.shortcut(x)))
    return net.fc(x.mean((2, 3)))


def preactivation(net: nn.Module, x: Tensor, *, add: Iterator[Sum]) -> Tensor:
    """The forward of `support.nets.PreActivation`."""
    x = net.stem(x)
    for i in (0, 2):

        def branch(v: Tensor, i: int = i) -> Tensor:
            for k in (i, i + 1):
                v = net.convs[k](torch.relu(net.norms[k](v)))
            return v

        x = next(add)((x,), branch, x)
    return net.fc(torch.relu(x).mean((2, 3)))


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """What timm calls DropPath."""
    if p == 0.0 or not training:
        return x
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
    mask.div_(1 - p)
    return x * mask


class Attention(nn.Module):
    """A pre-norm transformer block with a mask, whose sizes are read of the first input."""

    def __init__(self, own: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.own = own
        self.embed, self.fc = nn.Linear(3, 4), nn.Linear(4, 5)
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def attend(self, x: Tensor, mask: Tensor, size: int) -> Tensor:
        parts = self.qkv(self.norm1(x)).reshape(size, -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].transpose(-1, -2) + mask[:, None, None]
        return self.proj((scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(size, -1, 4))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm2(x))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        size = x.shape[0]
        x = self.embed(x)
        x = x + self.own(self.attend(x, mask, size))
        x = x + self.own(self.feed(x))
        return self.fc(x.mean(1))


def attention(net: nn.Module, x: Tensor, mask: Tensor, *, add: Iterator[Sum]) -> Tensor:
    """The forward of `Attention`."""
    x = net.embed(x)
    x = next(add)((x, mask), lambda v, m: net.attend(v, m, len(v)), x)
    x = next(add)((x,), net.feed, x)
    return net.fc(x.mean(1))
