"""Small networks, one per way in which values flow; each is seeded and takes one batch of two."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Written(nn.Module):
    """A net whose forward is a function of itself and of ``x``, and whose children are named."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Any], **children: Any) -> None:
        super().__init__()
        self.body = body
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class Blocks(nn.Module):
    """Two residual blocks, with a plain and with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), BasicBlock(4, 4), BasicBlock(4, 6, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


class Residual(nn.Module):
    """Layers: stem, block1.conv1, block1.conv2, block2.conv1, block2.conv2, projection, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 4)
        self.block1, self.block2 = BasicBlock(4, 4), BasicBlock(4, 8, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    """Layers: enc1, enc2, mid, up2 (transposed), dec2, dec1, head."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = conv_norm(3, 4), conv_norm(4, 8), conv_norm(8, 8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.dec2, self.dec1 = conv_norm(16, 8), conv_norm(12, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        c = self.dec2(torch.cat([b, self.up2(c)], 1))
        c = F.interpolate(c, scale_factor=2.0, mode="nearest")
        return self.head(self.dec1(torch.cat([a, c], 1)))


class Diamond(nn.Module):
    """Parallel branches joined by a concat, as in an Inception block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = conv_norm(3, 4), nn.Conv2d(4, 4, 1)
        self.three = nn.Sequential(conv_norm(4, 4), nn.Conv2d(4, 4, 3, padding=1))
        self.join, self.fc = conv_norm(12, 4, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), F.max_pool2d(x, 3, 1, 1)], 1)
        return self.fc(self.join(x).mean((2, 3)))


class Shared(nn.Module):
    """One convolution called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(x))
        x = torch.relu(self.conv(x))
        return self.fc(x.mean((2, 3)))


class MultiOutput(nn.Module):
    """A dict of two outputs, one from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = conv_norm(3, 4), conv_norm(4, 8, stride=2)
        self.aux, self.fc = nn.Linear(4, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.low(x)
        aux = self.aux(x.mean((2, 3)))
        return {"out": self.fc(self.high(x).mean((2, 3))), "aux": aux}


class DropoutNet(nn.Module):
    """Dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout2d(0.3)
        self.conv2, self.fc = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        x = F.dropout(F.relu(self.conv2(x)), 0.4, self.training)
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """Pre-activation residual blocks with in-place ReLU and in-place sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            out = self.convs[i](self.relu(self.norms[i](x)))
            out = self.convs[i + 1](self.relu(self.norms[i + 1](out)))
            out += x
            x = out
        return self.fc(self.relu(x).mean((2, 3)))


class Functional(nn.Module):
    """Convolutions and a linear layer as functions of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.2)
        self.w2 = nn.Parameter(torch.randn(4, 2, 2, 2) * 0.3)
        self.bias = nn.Parameter(torch.zeros(4))
        self.w3 = nn.Parameter(torch.randn(5, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1, stride=2, padding=1), inplace=True)
        x = F.relu(F.conv2d(x, weight=self.w2, bias=self.bias, padding="same", groups=2))
        return F.linear(x.mean((2, 3)), self.w3)


class AutoEncoder(nn.Module):
    """Down by a strided convolution, up by a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.down(x)))
        return self.out(F.relu(self.up(x)))


class Gate(nn.Module):
    """A residual block with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_norm(3, 4), conv_norm(4, 4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return self.fc((x + gate * out).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over (batch, tokens, channels), residual, with layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
        return self.fc(x.mean(1))


class Returning(nn.Module):
    """Returns what ``make`` makes of its scores, an early layer, and the loss if there are labels.

    ``by_shape`` has it ask for a size first, so that only `torch.export` captures it.
    """

    def __init__(self, make: Callable[..., Any], by_shape: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.by_shape = make, by_shape
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        if self.by_shape and x.shape[-1] < 2:
            raise ValueError
        early = self.first(x).relu()
        scores = self.last(self.second(early).relu())
        loss = None if labels is None else F.cross_entropy(scores, labels)
        return self.make(scores, early, loss)


@dataclass(frozen=True)
class Net:
    """A way to build a seeded model, the inputs that it takes, and how many layers it has."""

    model: Callable[[], nn.Module]
    num_layers: int

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


NETS: dict[str, Net] = {
    "chain": Net(Chain, 4),
    "residual": Net(Residual, 7),
    "unet": Net(UNet, 7),
    "diamond": Net(Diamond, 6),
    "shared": Net(Shared, 4),
    "multi_output": Net(MultiOutput, 4),
    "dropout": Net(DropoutNet, 3),
    "preactivation": Net(PreActivation, 6),
    "functional": Net(Functional, 3),
    "autoencoder": Net(AutoEncoder, 3),
    "gate": Net(Gate, 5),
    "tokens": Net(Tokens, 4),
}


class Deep(nn.Module):
    """A stem, equal residual blocks, and a head."""

    def __init__(self, count=6):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(self.block() for _ in range(count))
        self.head = nn.Linear(4, 3)
        self.activations = [torch.relu] * count

    def block(self):
        block = nn.Module()
        block.a, block.b, block.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.BatchNorm1d(4)
        return block

    def forward(self, x):
        x = self.stem(x)
        for block, activation in zip(self.blocks, self.activations, strict=True):
            hidden = activation(block.a(x))
            torch._assert(hidden.dim() == 2, f"not {hidden.shape}")  # the name of a node
            x = x + block.norm(block.b(hidden))
        return self.head(x)
