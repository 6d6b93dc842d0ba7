"""Where a network attends: by a call, in a module that is kept whole, and written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlocal import analyze

X = torch.zeros(2, 5, 8)


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between, *modules):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between
        self.inner = nn.ModuleList(modules)

    def forward(self, x):
        return self.last(self.between(self, self.first(x)) + x)


def written_out(self, x):
    weights = F.dropout((x @ x.transpose(1, 2)).softmax(-1), 0.1)
    return weights.reshape(2, 5, 5) @ x


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (Net(lambda self, x: F.scaled_dot_product_attention(x, x, x)), ["scaled_dot_product_att"]),
        (Net(lambda self, x: self.inner[0](x, x, x)[0], nn.MultiheadAttention(8, 2)), ["inner_0"]),
        (Net(written_out), ["softmax"]),
        (Net(lambda self, x: self.inner[0](x @ x.mT) @ x, nn.Softmax(-1)), ["inner_0"]),
        (Net(lambda self, x: x.softmax(-1) * x), []),  # a gate
        (Net(lambda self, x: (x @ x.mT) @ x), []),  # computed weights, but no softmax
    ],
    ids=["call", "module", "written out", "softmax module", "gate", "product"],
)
def test_attention_is_found_however_it_is_written(net, names):
    found = analyze(net, X).attentions
    assert [a[: len(b)] for a, b in zip(found, names, strict=True)] == names


def test_a_block_knows_how_often_it_attends():
    analysis = analyze(nn.Sequential(Net(written_out), Net(written_out), nn.Linear(8, 8)), X)
    counts = [analysis.attentions_of(block) for block in analysis.blocks]
    assert sum(counts) == 2 and counts[-1] == 0
