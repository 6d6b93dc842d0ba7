"""Heads of local modules in a model of several dtypes: they are of that of their features."""

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import ConvHead, LinearHead, LocalModules, Plan

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3])


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b, self.c = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)).double())))


class Single(nn.Module):
    """A head that computes in float32, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, features):
        return self.fc(features.float())


OWN = {
    "of the features": (lambda shape: nn.Linear(6, 4).double(), torch.float64),
    "cast to it": (lambda shape: nn.Linear(6, 4), torch.float64),
    "lazy": (lambda shape: nn.LazyLinear(4), torch.float64),
    "left as it is": (lambda shape: Single(), torch.float32),
    "linear": (LinearHead(), torch.float64),
    "hidden": (ConvHead(), torch.float64),
}


@pytest.mark.parametrize("name", OWN)
def test_a_head_takes_its_features(name):
    head, dtype = OWN[name]
    modules = LocalModules(2, head=head, num_classes=4, balance=("c",))
    network = fxlocal.transform(Mixed(), Plan(modules=modules), X)
    assert {p.dtype for p in network.fxlocal.heads.parameters()} == {dtype}
    _, loss = network(X, TARGET)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
