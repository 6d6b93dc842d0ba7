"""A weight that is used on both sides of a boundary, and that takes no gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlocal
from fxlocal import Driver, Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.schedules import Static

IDS = torch.arange(12).reshape(3, 4) % 7
RATE = 0.05


class Chain(nn.Module):
    """Four layers between two uses of one frozen weight: ``tie`` says which."""

    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.tie = tie
        self.embed = nn.Linear(7, 7, bias=False) if tie == "layer" else nn.Embedding(7, 7)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(4))
        self.head = nn.Linear(7, 7, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        self.embed.requires_grad_(False)

    def first(self, ids):
        return self.embed(F.one_hot(ids, 7).float() if self.tie == "layer" else ids)

    def last(self, h):
        if self.tie == "function":
            return F.linear(h, self.embed.weight)
        return self.embed(h) if self.tie == "layer" else self.head(h)

    def forward(self, ids):
        h = self.first(ids)
        for block in self.blocks:
            h = torch.tanh(block(h))
        return self.last(h)


TIES = ["parameter", "function", "layer"]


def loss_of(scores):
    return F.cross_entropy(scores.flatten(0, 1), IDS.flatten())


def step_by_hand(model, learned):
    """One forward and backward whose prefix is ``model.first`` and the first two blocks."""
    with torch.no_grad():
        h = model.first(IDS)
        deltas = []
        for block in model.blocks[:2]:
            z = block(h)
            deltas.append(z.flatten(0, 1).T @ h.flatten(0, 1))
            h = torch.tanh(z)
    for block in model.blocks[2:]:
        h = torch.tanh(block(h))
    loss = loss_of(model.last(h))
    loss.backward()
    if learned:
        with torch.no_grad():
            for block, delta in zip(model.blocks[:2], deltas, strict=True):
                block.weight += RATE * delta / delta.norm()
    return loss


@pytest.mark.parametrize("rule", [Freeze(), Hebbian(RATE)], ids=["freeze", "hebbian"])
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("inputs", [(), (IDS,)], ids=["bare", "examples"])
def test_a_step_over_a_frozen_tie_is_that_of_the_hand(tie, rule, inputs):
    model, mine = Chain(tie), Chain(tie)
    assert model.embed.weight.equal(mine.embed.weight)
    until = "blocks.2"
    net = fxlocal.transform(model, Plan(local=LocalPrefix(until, rule)), *inputs)
    loss = loss_of(net(IDS))
    loss.backward()
    wanted = step_by_hand(mine, learned=rule != Freeze())
    torch.testing.assert_close(loss, wanted)
    for (name, one), (_, other) in zip(
        model.named_parameters(), mine.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("tie", TIES)
def test_blocks_and_fractions_know_no_frozen_tie(tie):
    model = Chain(tie)
    assert len(fxlocal.analyze(model).blocks) == len(fxlocal.analyze(model).layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Static(epochs=4, start=0.5, largest=0.5, rule=Freeze())
    driver = Driver(model, schedule, optimizer=optimizer)
    for _ in range(4):
        before = {name: value.clone() for name, value in model.named_parameters()}
        driver.start_epoch()
        loss = loss_of(driver.network()(IDS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.observe(loss)
        driver.end_epoch()
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert driver.boundary == (3 if tie == "layer" else 2)
    assert {"blocks.2.weight", "blocks.3.weight"} <= moved
    assert moved.isdisjoint({"embed.weight", "blocks.0.weight"})


@pytest.mark.parametrize("tie", TIES)
def test_a_tie_that_is_thawed_later_is_refused(tie):
    model = Chain(tie)
    net = fxlocal.transform(model, Plan(local=LocalPrefix("blocks.2", Freeze())))
    net(IDS)
    model.embed.requires_grad_(True)
    with pytest.raises(PlanError, match=r"one side or be frozen: call its requires_grad_\(False\)"):
        net(IDS)
    with pytest.raises(PlanError, match=r"Freeze \(requires_grad_\(False\)\) or untie"):
        fxlocal.transform(model, Plan(local=LocalPrefix(0.5, Freeze())))
    model.embed.requires_grad_(False)
    loss_of(net(IDS)).backward()
    assert model.blocks[1].weight.grad is None
    assert model.blocks[2].weight.grad is not None
