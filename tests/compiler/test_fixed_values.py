"""Values that all blocks share and nothing learns: position tables, masks, a constant bias."""

from itertools import product

import pytest
import torch
from support import laws
from torch import nn

import fxlocal
from fxlocal import Hebbian, LocalModules, LocalPrefix, Plan


class Row(nn.Module):
    """Linear layers in a row, each of which takes a table."""

    def __init__(self, width=6, count=4):
        super().__init__()
        self.row = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        table = self.table(x)
        for layer in self.row:
            x = torch.relu(layer(x * table) - table)
        return self.head(x.mean(1))


class Rotary(Row):
    """Angles by the length of what comes in."""

    def table(self, x):
        return torch.outer(torch.arange(x.shape[1]) + 1, torch.arange(x.shape[2])).cos()


class Sliced(Row):
    """A buffer, scaled and cut to length."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.randn(8, 6))

    def table(self, x):
        return (self.angles * 2).sin()[: x.size(1)]


class Mask(Row):
    """A constant that the forward makes, filled in place."""

    def table(self, x):
        return torch.ones(5, 6).triu_()


class Written(Row):
    """A table that the input is written into."""

    def table(self, x):
        table = torch.ones(x.shape[1], 6)
        table.mul_(x.detach().mean((0, 2)).unsqueeze(1))
        return table


class Moved(Row):
    """A buffer that is moved by what comes in, and used."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def table(self, x):
        self.mean.copy_(x.mean((0, 1)).detach())
        return self.mean.exp()


class Learned(Row):
    """A table that is learned."""

    def __init__(self):
        super().__init__()
        self.angles = nn.Parameter(torch.randn(5, 6))

    def table(self, x):
        return self.angles.sin()


FIXED, OTHERS = (Rotary, Sliced, Mask), (Written, Moved, Learned)
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", (*FIXED, Written, Moved))
def test_table_that_nothing_learned_goes_into_holds_no_boundary_back(kind):
    assert fxlocal.analyze(kind(), X).boundaries == (0, 1, 2, 3, 4)


def test_table_of_parameters_does():
    assert fxlocal.analyze(Learned(), X).boundaries[1:] in ((), (4,))


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("kind", "until"), [*product((*FIXED, *OTHERS), (1, 4)), (Rotary, 3), (Learned, 3)]
)
def test_training_with_a_table_keeps_the_laws(kind, until):
    torch.manual_seed(0)
    plan = Plan(local=LocalPrefix(until=until, rule=Hebbian(0.1)))
    laws.l2_output_is_exact(kind(), (X,), plan)
    laws.l4_no_leak(kind(), (X,), plan)
    laws.l9_delta_is_closed_form(kind(), (X,), plan)


@pytest.mark.parametrize("kind", FIXED)
def test_local_modules_learn_from_the_features_not_from_the_table(kind):
    model = kind()
    analysis = fxlocal.analyze(model, X)
    assert [edge.shape for edge in analysis.block_inputs[1:-1]] == [(2, 5, 6)] * 3 + [(2, 6)]
    net = fxlocal.transform(model, Plan(modules=LocalModules(count=2, num_classes=3)), X)
    _, loss = net(X, torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
