"""Forwards that make a plain number of the batch's size: one size only, which is told."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan

X, Y = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(2, 3, 12).view(3, 4)


class Pairs(nn.Module):
    """Compares two batches, as contrastive losses do."""

    def __init__(self, compare):
        super().__init__()
        self.left, self.right, self.compare = nn.Linear(4, 4), nn.Linear(4, 4), compare

    def forward(self, x, y):
        if x.shape != y.shape:  # symbolic tracing stops here
            raise ValueError("unequal")
        return self.compare(self.left(x) @ self.right(y).t())


FORWARDS = {
    "len": lambda scores: nn.functional.cross_entropy(scores, torch.arange(len(scores))),
    "int": lambda scores: scores[torch.arange(int(scores.shape[0]))].logsumexp(1),
    "range": lambda scores: torch.stack([scores[i, i] for i in range(scores.shape[0])]),
    "unpacked": lambda scores: sum(row.tanh() for row in scores),
}


@pytest.mark.parametrize("by", FORWARDS)
def test_a_graph_for_one_size_is_told_of_and_refuses_others(by):
    model = Pairs(FORWARDS[by])
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="the forward of Pairs makes a number of the batch's size"):
        net = fxlocal.transform(model, Plan(local=LocalPrefix(until=1, rule=Freeze())), X, Y)
    assert torch.equal(net(X, Y), plain(X, Y))
    for rows in (2, 4):
        with pytest.raises(RuntimeError, match="graph holds for a size of 3 in dimension 0"):
            net(torch.ones(rows, 4), torch.ones(rows, 4))
    net.eval()
    assert torch.equal(net(X[:2], Y[:2]), plain(X[:2], Y[:2]))


def test_a_symbolic_size_stays_any():
    model = Pairs(lambda scores: nn.functional.cross_entropy(scores, torch.arange(scores.shape[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = fxlocal.transform(model, Plan(), X, Y)
    assert torch.equal(net(X[:2], Y[:2]), model(X[:2], Y[:2]))


def test_sizes_of_two_inputs_may_depend_on_each_other():
    class Halves(Pairs):
        def forward(self, x, y):
            if x.shape[0] != 2 * y.shape[0]:
                raise ValueError("unequal")
            return self.compare(self.left(x).view(-1, 2, 4) + self.right(y)[:, None])

    model = Halves(torch.tanh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = fxlocal.transform(model, Plan(), torch.ones(6, 4), X)
    assert torch.equal(net(torch.ones(4, 4), X[:2]), model(torch.ones(4, 4), X[:2]))
