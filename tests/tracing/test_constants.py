"""Constants of a forward that have no literal, and annotations, which compute nothing."""

import enum
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxlocal
from fxlocal import CaptureError, Freeze, LocalPrefix, Plan

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Half(float):
    """A number that prints as no Python does."""

    def __repr__(self):
        return "a half"


class Mode(str):
    """A text that prints as no Python does."""

    def __repr__(self):
        return "<mode>"


class Axis(enum.IntEnum):
    ROWS, LAST = 0, -1


class Bits(enum.IntFlag):
    ONE, TWO = 1, 2


OPERATIONS = {
    "float64 as an operand": lambda x: x - np.float64(0.3),
    "float32": lambda x: x * np.float32(0.1),
    "float16 by name": lambda x: torch.add(x, x, alpha=np.float16(0.1)),
    "int64 as a size": lambda x: x.reshape(np.int64(3), np.int32(4)),
    "uint8 in a tuple": lambda x: x.permute((np.uint8(0), np.uint8(1))),
    "in a slice": lambda x: torch.cat([x[:, np.int64(1) :], x[:, : np.int64(1)]], np.int64(1)),
    "not finite": lambda x: x.clamp(max=np.float64("inf")),
    "text": lambda x: F.gelu(x, approximate=np.str_("tanh")),
    "a subclass of float": lambda x: x ** Half(0.5),
    "a subclass of str": lambda x: F.gelu(x, approximate=Mode("tanh")),
    "a member of an enum": lambda x: x.softmax(Axis.LAST),
    "a union of flags": lambda x: x * (Bits.ONE | Bits.TWO),
}


class Net(nn.Module):
    def __init__(self, operation=None):
        super().__init__()
        self.first, self.last, self.operation = nn.Linear(4, 4), nn.Linear(4, 2), operation

    def forward(self, x):
        return self.last(self.operation(self.first(x)))


def frozen(model):
    return fxlocal.transform(model, Plan(local=LocalPrefix(until="last", rule=Freeze())))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_constant_without_a_literal(name):
    model = Net(OPERATIONS[name])
    assert torch.equal(torch.nan_to_num(frozen(model)(X)), torch.nan_to_num(model(X)))


def test_a_scalar_of_numpy_is_kept_as_a_number_of_python():
    graph = fxlocal.capture(Net(lambda x: x * np.float64(0.5) + np.int8(2))).graph
    numbers = [value for node in graph.nodes for value in node.args if not hasattr(value, "op")]
    assert [(type(n), n) for n in numbers if isinstance(n, (int, float))] == [
        (float, 0.5),
        (int, 2),
    ]


class Shaped(Net):
    def forward(self, x: Annotated[Tensor, "batch 4"]) -> Annotated[Tensor, "batch 2"]:
        return self.last(self.first(x))


class Called(Net):
    def forward(self, x: Tensor, after: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return self.last(self.first(x))


class Chosen(Net):
    def forward(self, x: Tensor, how: Literal["a", "b"] = "a") -> "Nowhere":  # noqa: F821
        return self.last(self.first(x))


class Generic(Net):
    def forward(self, x: TypeVar("T", bound=Tensor)) -> {"scores": Tensor}:  # noqa: F821
        return self.last(self.first(x))


@pytest.mark.parametrize("kind", [Shaped, Called, Chosen, Generic])
def test_an_annotation_computes_nothing(kind):
    model = kind()
    net = frozen(model)
    assert torch.equal(net(X), model(X))
    assert "Annotated" not in net.code and "Callable" not in net.code


def test_a_complex_scalar_of_numpy_is_refused_as_torch_drops_its_imaginary_part():
    class Net(nn.Module):
        def forward(self, x):
            return x * np.complex64(1 + 2j)

    with pytest.raises(CaptureError, match=r"numpy\.complex64"):
        fxlocal.transform(Net(), Plan())
