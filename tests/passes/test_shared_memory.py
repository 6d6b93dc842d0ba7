"""Two values that share memory, both taken over a boundary, and changed in place behind it.

In eager PyTorch the one follows the other, its gradient too. Two cuts, or two clones, part them.
"""

import copy

import pytest
import torch
from support import laws
from torch import nn

import fxlocal
from fxlocal import (
    Checkpoint,
    Freeze,
    Hebbian,
    LinearHead,
    LocalModules,
    LocalPrefix,
    Plan,
    PlanError,
)

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(2))

# How another name for the memory of the first layer's output comes about.
TWINS = {
    "a slice": lambda v: v[:, :2],
    "the flattened": lambda v: v.flatten(2),
    "a transposed view": lambda v: v.transpose(2, 3),
    "a narrow view of a view": lambda v: v.permute(0, 2, 3, 1).narrow(3, 1, 2),
    "an idle dropout": lambda v: nn.functional.dropout(v, 0.0),
    "the same memory, detached": lambda v: v.detach(),
}


class Net(nn.Module):
    """The output of ``a`` and ``twin`` of it cross at ``b``, behind which ``write`` changes one.

    With ``side`` a branch spans ``b``, which therefore is no block edge, and both are used last.
    """

    def __init__(self, twin, write, side):
        super().__init__()
        self.side = nn.Conv2d(4, 4, 1) if side else None
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.twin, self.write, self.fc = twin, write, nn.Linear(4, 2)

    def forward(self, x):
        bypass = 0.0 if self.side is None else self.side(x).mean((2, 3))
        v = self.a(x)
        other = self.twin(v)
        y = self.b(torch.tanh(v))
        self.write(v, other, y)
        z = self.c(torch.tanh(v)).mean((2, 3)) + bypass
        return self.fc(z if self.side is None else z + other.sum())


WRITES = {
    "through the twin": lambda v, other, y: other.add_(y.mean()),
    "through a view behind": lambda v, other, y: other.view_as(other)[:1].mul_(y.mean()),
    "in the value": lambda v, other, y: v.mul_(y.sigmoid()),
}
EDGES = ["through the twin", "through a view behind"]  # where the value crosses a block edge


def build(twin, write, side=True):
    torch.manual_seed(0)
    return Net(TWINS[twin], WRITES[write], side)


@pytest.mark.sample(16)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("rule", [Freeze(), Hebbian(0.1)], ids=["freeze", "hebbian"])
def test_a_cut_between_twins_and_their_change_is_refused(twin, write, rule):
    plan = Plan(local=LocalPrefix(until="b", rule=rule))
    with pytest.raises(PlanError, match=r"share memory and cross there, and '\w+' changes both"):
        fxlocal.transform(build(twin, write), plan)


@pytest.mark.sample(8)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("twin", TWINS)
def test_a_cut_elsewhere_is_exact(twin, write):
    eager, ours = build(twin, write), build(twin, write)
    net = fxlocal.transform(ours, Plan(local=LocalPrefix(until="c", rule=Freeze())))
    laws.assert_equal(laws.step(net, (X,)), laws.step(eager, (X,)), "output")
    for name in ("c.weight", "c.bias", "fc.weight", "fc.bias"):
        given, expected = (m.get_parameter(name).grad for m in (ours, eager))
        laws.assert_equal(given, expected, f"gradient of {name}")


class Long(nn.Module):
    """The output of ``stem`` and a twin of it cross all of ``body``, which is parted."""

    def __init__(self, twin, write):
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.twin, self.write = twin, write

    def forward(self, x):
        v = self.stem(x)
        other = self.twin(v)
        y = torch.tanh(v)
        for layer in self.body:
            y = layer(y)
        self.write(v, other, y)
        return torch.tanh(v).mean() + y.mean() + other.sum()


@pytest.mark.parametrize("write", EDGES)
@pytest.mark.parametrize("twin", ["a slice", "the flattened", "the same memory, detached"])
def test_a_checkpointed_stage_between_them_is_refused(twin, write):
    model = Long(TWINS[twin], WRITES[write])
    with pytest.raises(PlanError, match=r"stage 1 takes .* which share memory, and changes both"):
        fxlocal.transform(model, Plan(checkpoint=Checkpoint(2, ("body.3",))))


@pytest.mark.parametrize("begin", ["b", "c"])
@pytest.mark.parametrize("write", EDGES)
@pytest.mark.parametrize("twin", ["a slice", "the flattened", "the same memory, detached"])
def test_a_checkpointed_stage_beside_them_is_exact(twin, write, begin):
    """A block begins before the twin, where a single value crosses."""
    eager, ours = build(twin, write, False), build(twin, write, False)
    net = fxlocal.transform(ours, Plan(checkpoint=Checkpoint(2, (begin,))))
    laws.assert_equal(laws.step(net, (X,)), laws.step(eager, (X,)), "output")
    laws.assert_equal(laws.gradients(ours), laws.gradients(eager), "gradient")


@pytest.mark.parametrize("write", EDGES)
def test_local_modules_part_before_the_twin(write):
    modules = LocalModules(2, head=LinearHead(), num_classes=2, balance=("b",))
    eager, ours = build("a slice", write, False), build("a slice", write, False)
    net = fxlocal.transform(ours, Plan(modules=modules), X)
    output, loss = net(X, torch.tensor([0, 1, 0]))
    laws.assert_equal(output, eager(X), "output")
    loss.backward()
    v = eager.a(X).detach()
    other = eager.twin(v)
    y = eager.b(torch.tanh(v))
    eager.write(v, other, y)
    expected = eager.fc(eager.c(torch.tanh(v)).mean((2, 3)))
    nn.functional.cross_entropy(expected, torch.tensor([0, 1, 0])).backward()
    for name in ("b.weight", "c.weight", "fc.weight"):
        given, oracle = (m.get_parameter(name).grad for m in (ours, eager))
        laws.assert_equal(given, oracle, f"gradient of {name}")


class Disjoint(nn.Module):
    """Two halves cross; each is changed, or only one of two that share memory is used behind."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        v = self.a(x)
        y = v.view_as(v)
        z = self.b(torch.tanh(y))
        return self.c(z.mul_(0.5) + y)


def test_values_of_which_one_alone_crosses_are_cut():
    torch.manual_seed(0)
    eager = Disjoint()
    ours = copy.deepcopy(eager)
    net = fxlocal.transform(ours, Plan(local=LocalPrefix(until="b", rule=Freeze())))
    laws.assert_equal(laws.step(net, (X,)), laws.step(eager, (X,)), "output")
    for name in ("b.weight", "c.weight", "c.bias"):
        given, expected = (m.get_parameter(name).grad for m in (ours, eager))
        laws.assert_equal(given, expected, f"gradient of {name}")
