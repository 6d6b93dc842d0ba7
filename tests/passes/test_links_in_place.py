"""Copies behind a link of what the last layers change in place, and whose result nobody reads."""

import pytest
import torch
import torch.nn.functional as F
from support import laws
from torch import nn

import fxlocal
from fxlocal import LinearHead, LocalModules, Plan

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(2))
TARGET = torch.tensor([0, 1, 0])

# In place, its result thrown away; and the same as a new value.
CHANGES = {
    "function": (lambda n, v: F.relu(v, inplace=True), lambda n, v: F.relu(v)),
    "module": (lambda n, v: n.relu(v), lambda n, v: F.relu(v)),
    "method": (lambda n, v: v.mul_(0.5).add_(1.0), lambda n, v: v * 0.5 + 1.0),
    "of what is read before": (lambda n, v: v.sub_(v.mean()), lambda n, v: v - v.mean()),
    "through a view": (lambda n, v: v.flatten(1).clamp_(max=0.3), lambda n, v: v.clamp(max=0.3)),
    "dropout function": (
        lambda n, v: F.dropout(v, 0.5, n.training, inplace=True),
        lambda n, v: F.dropout(v, 0.5, n.training),
    ),
    "dropout module": (lambda n, v: n.drop(v), lambda n, v: F.dropout(v, 0.5, n.training)),
}


class Net(nn.Module):
    def __init__(self, change, returned):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
        self.change, self.returned, self.fc = change, returned, nn.Linear(4, 2)

    def changed(self, v):
        result = self.change(self, v)
        return result if self.returned else v

    def forward(self, x):
        v = self.changed(self.b(torch.tanh(self.a(x))))
        v = self.changed(self.c(v))
        return self.fc(self.d(v).mean((2, 3)))


def trained(change, returned, link):
    torch.manual_seed(0)
    model = Net(change, returned)
    modules = LocalModules(2, link=link, head=LinearHead(), num_classes=2, balance=("d",))
    net = fxlocal.transform(model, Plan(modules=modules), X)
    torch.manual_seed(1)
    output, loss = net(X.clone(), TARGET)
    loss.backward()
    return output.detach(), laws.gradients(model)


@pytest.mark.sample(6)
@pytest.mark.parametrize("link", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_copies_change_their_values_too(change, link):
    in_place, out_of_place = CHANGES[change]
    ours, expected = trained(in_place, False, link), trained(out_of_place, True, link)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
