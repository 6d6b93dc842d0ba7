"""Compound weights of errors, where blocks are no chain, or change in place what they are given."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import laws
from support import modules_oracle as oracle
from torch import nn

from fxlocal import LinearHead, LocalModules, Plan, transform


def local(count, link, **settings):
    settings = {"head": LinearHead(2), "num_classes": 5, "balance": "blocks"} | settings
    return LocalModules(count, link, 0.3, weighting="compound", **settings)


def weighted(value, weight):
    """The value, of whose gradient only that part is seen."""
    return weight * value + ((1 - weight) * value).detach()


def run_weighted(units, live, weight):
    """Run ``units``; a value that one makes is read by others with its error weighted."""
    made = {}
    for unit in units:
        made |= {n: weighted(v, weight) for n, v in unit.run(live | made).items()}
    return made


def step_by_errors(model, heads, x, y, sizes, link, alpha):
    """Leave every module's gradients in ``.grad``: each block of a link weights what enters it."""
    units, crossing, middle, linked = model.by_hand({}), {"h": x}, {}, []
    for k, size in enumerate(sizes):
        own, units = units[:size], units[size:]
        end = size if k == len(sizes) - 1 else size - link
        live = oracle._detached(crossing)
        with oracle._still(linked):
            live |= run_weighted(linked, oracle._detached(middle), 1 - alpha)
        middle = live | oracle._run(own[:end], live)
        crossing = middle | run_weighted(own[end:], middle, alpha)
        loss = heads[k](crossing["h"], x, y, F.cross_entropy) if heads[k:] else None
        loss = F.cross_entropy(crossing["h"], y) if loss is None else loss
        loss.backward()
        linked = own[end:]
    return crossing["h"].detach(), loss.detach()


@pytest.mark.parametrize(
    ("name", "borders", "sizes", "link"),
    [
        ("unet", ("enc2", "dec1"), [2, 6, 3], 2),  # a skip over the module in the middle
        ("unet", ("enc2.1", "bottom", "dec1"), [3, 1, 4, 3], 1),
        ("unet", ("dec1.1",), [9, 2], 6),  # both ends of a skip lie in the link
        ("residual", ("blocks.2", "blocks.3"), [3, 1, 3], 1),
    ],
)
def test_a_skip_is_weighted_where_it_enters_a_block(name, borders, sizes, link):
    theirs, (x, y) = oracle.build(name), oracle.batch(name)
    model = copy.deepcopy(theirs)
    net = transform(model, Plan(modules=local(len(sizes), link, balance=borders)), x)
    own = list(net.get_submodule("fxlocal.heads"))
    heads = oracle.heads_like(own, "linear", theirs, sizes, x, y)
    output, loss = net(x, y)
    loss.backward()
    expected = step_by_errors(theirs, heads, x, y, sizes, link, 0.3)
    found = [
        output.detach(),
        loss.detach(),
        *(p.grad for p in nn.ModuleList([model, *own]).parameters()),
    ]
    wanted = [*expected, *(p.grad for p in nn.ModuleList([theirs, *heads]).parameters())]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


# In place, and the same out of place: of a block's layer and what it is given.
BLOCKS = {
    "sum": (lambda f, x: x.add_(f(x)), lambda f, x: x + f(x)),
    "twice": (
        lambda f, x: x.add_(f(x)).mul_(0.5).add_(f(x)),
        lambda f, x: (lambda v: v + f(v))((x + f(x)) * 0.5),
    ),
    "relu": (lambda f, x: f(x) + F.relu(x, inplace=True), lambda f, x: f(x) + F.relu(x)),
    "unread": (lambda f, x: (x.add_(f(x)), x)[1], lambda f, x: x + f(x)),
    "view": (lambda f, x: (x.flatten(1).add_(f(x).flatten(1)), x)[1], lambda f, x: x + f(x)),
}


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        x = self.convs[0](x)
        for conv in self.convs[1:]:
            x = self.block(lambda v, conv=conv: torch.tanh(conv(2 * v)), x)
        return self.fc(x.mean((2, 3)))


def trained(block, count, link, weighting):
    torch.manual_seed(0)
    model, (x, y) = Net(block).double(), oracle.batch("plain")
    modules = replace(local(count, link), weighting=weighting)
    output, loss = (net := transform(model, Plan(modules=modules), x))(x.clone(), y)
    loss.backward()
    return output.detach(), laws.gradients(net)


# Three modules would read one value by a name that is older than the module that changes it.
REFUSED = [("unread", 3, 2), ("view", 3, 2)]
CASES = [(block, count, link) for block in BLOCKS for count, link in ((2, 1), (2, 3), (3, 2))]


@pytest.mark.sample(10)
@pytest.mark.parametrize("weighting", ["once", "compound"])
@pytest.mark.parametrize(("block", "count", "link"), [c for c in CASES if c not in REFUSED])
def test_blocks_may_change_what_they_are_given_in_place(block, count, link, weighting):
    ours, expected = (trained(one, count, link, weighting) for one in BLOCKS[block])
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
